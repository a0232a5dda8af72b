"""Where a run is written, who may write there, and how it is resumed"""
import argparse
import glob
import logging
import os
import re
import socket
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from timm import utils
from timm.models import resume_checkpoint, safe_model_name
from torch import distributed as dist

from timm_rs_runtime.errors import UserError, one_line
from timm_rs_runtime.files import make_folder

from ..checkpoint import check_archive
from ..records import read_summary
from .faults import name_flags
from .saver import Progress
from .task import MultiResolutionTask

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ['Output', 'claim_output', 'find_whole', 'hold_folder', 'resume_run']

_logger = logging.getLogger('train')

_LOCK = '.lock'
# Checkpoints of one progress are the same file: the first of these is named.
_KINDS = (r'last', r'recovery-\d+-\d+', r'checkpoint-\d+', r'milestone-\d+', r'model_best')

# Flags that decide which groups of parameters an optimizer has, or what it keeps of each parameter.
_OPTIMIZER_FLAGS = (
    'opt', 'distill', 'private', 'weight_decay', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale',
    'opt_kwargs')


@dataclass
class Output:
    """The folder of a run.

    Attributes:
        folder: Its name.
        resume: Checkpoint to continue from, '' if there is none.
        whole: Checkpoints in it that are whole, the furthest one first.
    """
    folder: str
    resume: str = ''
    whole: List[str] = field(default_factory=list)

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is of the run in this folder, not of another one."""
        return bool(self.resume) and os.path.dirname(self.resume) == self.folder


def claim_output(args: argparse.Namespace, held: ExitStack) -> Output:
    """Find the output folder of a run, the same one on all processes, and lock it while the stack is open.

    Raises:
        UserError: It is in use, holds what would be overwritten, or has no whole checkpoint to continue from.
    """
    found: List[Any] = [None]
    if utils.is_primary(args):
        try:
            output = _find_output(args)
            held.enter_context(hold_folder(output.folder))
            _find_checkpoint(args, output)
            found = [output]
        except (OSError, UserError) as e:
            found = [e]
    if args.distributed:
        dist.broadcast_object_list(found)  # the clock of the first process gives the name, its disk the checkpoint
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _find_output(args: argparse.Namespace) -> Output:
    root = args.output or os.path.join('output', 'train')
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        name_flags(args, 'model')(safe_model_name)(args.model),
        str(max(args.resolutions)) if args.resolutions else 'default',
    ])
    folder = os.path.join(root, name)
    resume = args.resume if args.resume != 'auto' else ''
    if os.path.isdir(resume):  # of another run, or of this one
        whole, _ = find_whole(resume)
        if not whole:
            raise UserError(f'--resume {resume}: the folder holds no whole checkpoint.')
        resume = whole[0]
    if resume and not os.path.isfile(resume):
        raise UserError(f'--resume {resume}: there is no such checkpoint.')
    if resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(folder):
        resume = os.path.join(folder, os.path.basename(resume))
    elif args.resume != 'auto' and os.path.isdir(folder) and set(os.listdir(folder)) - {_LOCK}:
        raise UserError(
            f'Output folder {folder} exists and is not overwritten, give another --experiment or --resume auto.')
    return Output(folder, resume)


def _find_checkpoint(args: argparse.Namespace, output: Output) -> None:
    """Note the checkpoints in the folder, and the one to continue from."""
    if output.resume:
        _read_progress(output.resume)
    output.whole, damaged = find_whole(output.folder)
    if output.resume:
        return
    if damaged and not output.whole:
        raise UserError(
            f"{output.folder}: none of its checkpoints is whole ({', '.join(map(os.path.basename, damaged))}). They "
            'are not overwritten, give another --experiment.')
    rows = read_summary(os.path.join(output.folder, 'summary.csv'))
    if not output.whole and len(rows) > 1:  # the first may be there before a checkpoint is
        raise UserError(
            f'{output.folder}: summary.csv has {len(rows)} epochs, but there is no checkpoint to continue from. It '
            'is not overwritten, give another --experiment.')
    output.resume = output.whole[0] if output.whole else ''


@contextmanager
def hold_folder(folder: str) -> Iterator[None]:
    """Lock a folder, which is made if it is missing and then deleted at the end if it is still empty.

    Loader workers do not inherit the lock, so they cannot keep it when their parent is killed.

    Raises:
        UserError: Another process holds it, which the message names.
    """
    made = [p for p in (Path(folder), *Path(folder).parents) if not p.exists()]
    make_folder(folder)
    with open(os.path.join(folder, _LOCK), 'a+') as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or 'another process'
            raise UserError(
                f'{folder} is in use by {holder}: wait until it ends, or give another --experiment.') from None
        except OSError as e:
            _logger.warning(f'{folder} cannot be locked, so a second run in it would not be noticed: {e}')
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n')
        file.flush()
        try:
            yield
        finally:
            if os.listdir(folder) == [_LOCK]:
                os.unlink(file.name)
                with suppress(OSError):
                    for path in made:
                        path.rmdir()


def find_whole(folder: str) -> Tuple[List[str], List[str]]:
    """Return the whole checkpoints of a folder, the furthest one first, and the damaged ones."""
    whole, damaged = [], []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.pth.tar'))):
        kind = next((i for i, k in enumerate(_KINDS) if re.fullmatch(k, os.path.basename(path)[:-8])), None)
        if kind is None:
            continue
        try:
            progress = _read_progress(path)
            whole.append((-progress.epoch, -progress.batch, kind, path))
        except UserError as e:
            damaged.append(path)
            _logger.warning(f'Skipping a checkpoint: {e}')
    return [path for *_, path in sorted(whole)], damaged


def _read_progress(path: str) -> Progress:
    """Return the progress in a checkpoint, which must be whole."""
    try:
        check_archive(path)
        checkpoint = utils.load_checkpoint_metadata(path)
    except Exception as e:  # what the readers raise for damaged files is not documented
        raise UserError(f'{path} is damaged or not a checkpoint: {one_line(e, 200)}') from e
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('task_state'), dict):
        raise UserError(f'{path} is not a checkpoint of train_rs.py, load it with --initial-checkpoint.')
    return Progress(**checkpoint['task_state'])


def resume_run(
        output: Output,
        args: argparse.Namespace,
        model: nn.Module,
        task: MultiResolutionTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Optional[Callable],
) -> Dict[str, Any]:
    """Restore the checkpoint, of a run of the same network, and return what else it holds."""
    path = output.resume
    checkpoint = utils.load_checkpoint_metadata(path)
    saved = checkpoint.get('args')
    if saved is None:
        raise UserError(f'--resume {path} is not a checkpoint of train_rs.py, load it with --initial-checkpoint.')
    network = ('model', 'model_kwargs', 'gp', 'in_chans', 'resolutions', 'num_classes')
    for name in (*network, *['eval_metric'] * output.continues):  # which ranks the best
        if getattr(saved, name, None) != getattr(args, name):
            raise UserError(
                f"--resume {path} was trained with --{name.replace('_', '-')} {getattr(saved, name, None)}, "
                f'but now it is {getattr(args, name)}.')
    if args.bn_statistics == 'auto':
        args.bn_statistics = getattr(saved, 'bn_statistics', 'batch')
    changed = [f'{k} {v}, now {getattr(args, k)}' for k, v in vars(saved).items()
               if k in vars(args) and k not in ('config', 'resume') and v != getattr(args, k)]
    if changed:
        _logger.info(f"Flags that differ from those of the checkpoint: {'; '.join(changed)}.")
    private = getattr(saved, 'private', 'both')
    if args.private not in ('both', private):
        raise UserError(
            f'--resume {path} was trained with --private {private}, but now it is {args.private}: load it with '
            '--initial-checkpoint; all resolutions then begin with what the largest has of the shared parts.')
    if args.no_resume_opt:
        resume_checkpoint(model, path, log_info=utils.is_primary(args))
    else:
        _resume_with_optimizer(path, saved, args, model, optimizer, loss_scaler)
    if task.has_ema():
        task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
    task.load_task_state(checkpoint['task_state'])
    if (saved.world_size, saved.batch_size) != (args.world_size, args.batch_size):
        task.progress = _share_progress(task.progress, saved, args)
    return checkpoint


def _resume_with_optimizer(path, saved, args, model, optimizer, loss_scaler):
    """Restore weights and the state of the optimizer; its rates, decay and momentum are those of the flags."""
    names = ('lr_scale', 'weight_decay', 'momentum', 'betas', 'eps', *args.opt_kwargs)
    if args.sched == 'plateau':  # its rate depends on the past
        _logger.warning('--sched plateau continues at its last learning rate; its patience starts again.')
    else:
        names += ('lr',)
    given = [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]
    rates = [group['lr'] for group in optimizer.param_groups]
    changed = [n for n in _OPTIMIZER_FLAGS if getattr(saved, n, None) != getattr(args, n)]
    try:
        if 'opt' in changed:  # the state of another optimizer can load, and fail in the first step
            raise ValueError
        resume_checkpoint(model, path, optimizer, loss_scaler, log_info=utils.is_primary(args))
    except ValueError:
        if not changed:
            raise
        before, now = (
            ' '.join(f"--{n.replace('_', '-')} {getattr(a, n, None)}" for n in changed) for a in (saved, args))
        raise UserError(
            f'--resume {path} holds the state of an optimizer with {before}, which does not fit {now}: '
            'repeat the flags of the run (--config its args.yaml), or give --no-resume-opt for a new one.') from None
    for group, hyperparameters, rate in zip(optimizer.param_groups, given, rates):
        group.update(hyperparameters)
        if 'initial_lr' in group:  # from which the schedule starts
            group['initial_lr'] = rate


def _share_progress(progress: Progress, saved: argparse.Namespace, args: argparse.Namespace) -> Progress:
    """Return the progress of an epoch with another number of images per step: about as many images are done."""
    batch = progress.batch * saved.world_size * saved.batch_size // (args.world_size * args.batch_size)
    if not batch:
        return Progress(progress.epoch)
    _logger.warning(
        f'--resume with {args.world_size} x {args.batch_size} images per step instead of {saved.world_size} x '
        f'{saved.batch_size}: epoch {progress.epoch} continues at batch {batch} instead of {progress.batch}; some of '
        'its images come twice or not at all.')
    num_images = batch * args.batch_size
    sums = torch.tensor(progress.sums, dtype=torch.float64).view(saved.world_size, -1).mean(0)
    sums *= num_images / progress.num_images
    return Progress(progress.epoch, batch, sums.repeat(args.world_size).tolist(), num_images)
