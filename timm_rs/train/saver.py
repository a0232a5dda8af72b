"""Checkpoints that a kill at any moment leaves whole"""
import glob
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from timm.utils import CheckpointSaver, load_checkpoint_metadata

from .faults import CheckpointError

__all__ = ['AtomicCheckpointSaver', 'CheckpointError', 'Progress', 'find_latest']

_logger = logging.getLogger('train')


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: Epoch under way, or the one to begin with.
        batch: Batches of it that are done.
        sums: Sums of the loss terms over its images so far.
        num_images: Images of it so far.
    """
    epoch: int = 0
    batch: int = 0
    sums: List[float] = field(default_factory=list)
    num_images: int = 0


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's saver, each of whose files is at any time the old one or the new one, whole and on the disk."""

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
            with open(save_path, 'rb') as f:
                os.fsync(f.fileno())
        except (OSError, RuntimeError) as e:
            if os.path.exists(save_path):
                os.remove(save_path)
            reason = ' '.join(str(e).split())
            raise CheckpointError(f'Cannot write {save_path}: {reason}. The last checkpoint before is whole.') from e

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f'{dst}.tmp'
        if os.path.lexists(temporary):
            os.remove(temporary)
        try:
            os.link(src, temporary)
        except (OSError, NotImplementedError):
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)

    def resume(self, checkpoint: Dict[str, Any]) -> None:
        """Go on with the history of a checkpoint in this folder, finishing a save that was cut off behind it.

        Args:
            checkpoint: Metadata of the last or a recovery checkpoint, whose weights are restored already.
        """
        state = checkpoint.get('saver') or {}
        epoch, metric = state.get('pending', (None, None))
        self.load_state_dict(dict(state, pending=(None, None)))
        recovery = os.path.join(self.recovery_dir, f'{self.recovery_prefix}-*{self.extension}')
        files = sorted(glob.glob(recovery), key=_recovery_position)
        self.prev_recovery_file, self.curr_recovery_file = ([''] * 2 + files)[-2:]
        if metric is not None:
            self.save_checkpoint(epoch, metric)


def _recovery_position(path: str) -> Tuple[int, int]:
    match = re.search(r'-(\d+)-(\d+)\.pth\.tar$', path)
    return (int(match.group(1)), int(match.group(2))) if match else (-1, -1)


def find_latest(output_dir: str) -> str:
    """Return the checkpoint of a folder that is furthest, empty if there is none.

    A recovery checkpoint within an epoch is behind the last checkpoint of that epoch's end.
    """
    found = []
    last = os.path.join(output_dir, 'last.pth.tar')
    for path in [last, *glob.glob(os.path.join(output_dir, 'recovery-*-*.pth.tar'))]:
        if not os.path.isfile(path):
            continue
        try:
            progress = load_checkpoint_metadata(path)['task_state']
        except (EOFError, KeyError, OSError, RuntimeError, TypeError) as e:
            _logger.warning(f"Passing over {path}, it cannot be read: {' '.join(str(e).split())}")
            continue
        found.append(((progress['epoch'], progress['batch'], path == last), path))
    return max(found)[1] if found else ''
