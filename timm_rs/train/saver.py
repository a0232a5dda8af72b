"""Checkpoints that stay whole if the process is killed at any moment"""
import glob
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import Any, Container, Dict, List, Optional

from timm.utils import CheckpointSaver

from timm_rs_runtime.errors import one_line
from timm_rs_runtime.files import atomic_path

from .faults import TrainingFault

__all__ = ['AtomicCheckpointSaver', 'Progress']


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: The current epoch, or the one to begin with.
        batch: Batches of the epoch that are done.
        sums: Sums of the loss terms over the images of the epoch so far.
        num_images: Images of the epoch so far.
    """
    epoch: int = 0
    batch: int = 0
    sums: List[float] = field(default_factory=list)
    num_images: int = 0


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's saver; at any time each of its files is the old one or the new one, whole and on the disk."""

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        try:
            with atomic_path(save_path, overwrite=True) as partial:
                super()._save(partial, epoch, metric)
        except (OSError, RuntimeError) as e:
            raise TrainingFault(f'Cannot write {save_path}: {one_line(e)}. The checkpoint before it is whole.') from e

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with atomic_path(dst, overwrite=True) as partial:
            try:
                os.link(src, partial)
            except (OSError, NotImplementedError):
                shutil.copy2(src, partial)

    def resume(self, checkpoint: Dict[str, Any], whole: Container[str]) -> None:
        """Continue the history of a checkpoint in this folder, and finish a save that was cut off after it.

        Args:
            checkpoint: Its metadata; the weights are already restored.
            whole: Checkpoints in the folder that are not damaged; others are dropped from the history.
        """
        state = checkpoint.get('saver') or {}
        epoch, metric = state.get('pending', (None, None))
        self.load_state_dict(dict(state, pending=(None, None)))
        self.checkpoint_files = [(path, value) for path, value in self.checkpoint_files if path in whole]
        best = os.path.join(self.checkpoint_dir, f'model_best{self.extension}')
        if self.best_epoch is not None and best not in whole:
            self.best_epoch = self.best_metric = None
            ranked = [(path, value) for path, value in self.checkpoint_files if value is not None]
            if ranked:
                path, self.best_metric = ranked[0]
                self.best_epoch = int(path.removesuffix(self.extension).rpartition('-')[2])
                self._duplicate(path, best)
        recovery = os.path.join(glob.escape(self.recovery_dir), f'{self.recovery_prefix}-*{self.extension}')
        files = sorted(glob.glob(recovery), key=lambda path: list(map(int, re.findall(r'\d+', os.path.basename(path)))))
        self.prev_recovery_file, self.curr_recovery_file = ([''] * 2 + files)[-2:]
        if metric is not None:
            self.save_checkpoint(epoch, metric)
