"""One epoch of training, one pass of validation, and what they report"""
import argparse
import logging
import os
import random
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision
from timm import utils
from tqdm import tqdm

from timm_rs_runtime.unreadable import ReadErrors

from ..evaluate import METRICS, average, check_images, create_evaluator, evaluate, format_scores
from .faults import TrainingFault
from .loaders import Loaders
from .preemption import Preempted, Preemption
from .saver import AtomicCheckpointSaver, Progress
from .seeding import mix_seed, seed_all
from .task import TERMS, MultiResolutionTask

__all__ = [
    'choose_levels',
    'choose_statistics',
    'ensemble_weights',
    'flatten_metrics',
    'train_one_epoch',
    'validate',
]

_logger = logging.getLogger('train')
_BEARABLE = 0.8  # see docs/findings.md


class _Faults:
    """Finds the first step whose loss is not finite, without waiting for the device at every step."""

    def __init__(self, resolutions: List[int], device: torch.device):
        self.resolutions = resolutions
        self.step = torch.full((), -1, device=device, dtype=torch.int64)
        self.finite = torch.ones(len(resolutions), device=device, dtype=torch.bool)
        self.at_once = device.type == 'cpu'

    def note(self, step: int, losses: Dict[str, Any], levels: Optional[Tuple[int, ...]]) -> None:
        finite = torch.stack([z.detach().isfinite().all() for z in losses['output']])
        if levels is not None:
            finite = torch.ones_like(self.finite).index_copy_(0, torch.tensor(levels, device=finite.device), finite)
        first = (self.step < 0) & ~(losses['loss'].detach().isfinite() & finite.all())
        self.step = torch.where(first, step, self.step)
        self.finite = torch.where(first, finite, self.finite)
        if self.at_once:
            self.check()

    def check(self) -> None:
        step = self.step.item()
        if step >= 0:
            where = [str(r) for r, fine in zip(self.resolutions, self.finite.tolist()) if not fine]
            place = f"logits at resolution {', '.join(where)}" if where else 'the logits are finite'
            raise TrainingFault(
                f'The loss is not finite at batch {step}: {place}. The last checkpoint is kept; a lower --lr, '
                '--clip-grad or --amp-dtype bfloat16 may help.')


def train_one_epoch(
        progress: Progress,
        task: MultiResolutionTask,
        loaders: Loaders,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        preemption: Preemption,
        lr_scheduler: Any = None,
        loss_scaler: Optional[Callable] = None,
        amp_autocast: Callable = nullcontext,
        saver: Optional[AtomicCheckpointSaver] = None,
        output_dir: Optional[str] = None,
) -> Dict[str, float]:
    """Train for the rest of an epoch, keeping progress up to date.

    Returns:
        The loss and its terms, as means over the epoch's images of all processes.

    Raises:
        TrainingFault: The loss is not finite, or memory ran out.
        UnreadableError: Too many images cannot be read.
        Preempted: The process was asked to end; progress records where it is.
    """
    epoch = progress.epoch
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if loaders.mixup is not None:
            loaders.mixup.mixup_enabled = False
        loaders.train.mixup_enabled = False
    task.keep_statistics = args.bn_statistics == 'running'
    task.train()
    device = task.device
    accum_steps = args.grad_accum_steps
    num_batches = len(loaders.train)
    last_accum_steps = num_batches % accum_steps or accum_steps
    updates_per_epoch = (num_batches + accum_steps - 1) // accum_steps
    last_idx = num_batches - 1
    num_updates = epoch * updates_per_epoch - (-progress.batch // accum_steps)  # the last one may have fewer batches
    sums = _own_sums(progress.sums, args, device)
    faults = _Faults(args.resolutions, device)
    clip_parameters = partial(task.get_clip_parameters, exclude_head='agc' in args.clip_mode)
    window_start = fetch_start = time.perf_counter()
    window_images, data_time = 0, 0.

    seed_all(args.seed, args.rank, epoch)
    loaders.begin_epoch(epoch, progress.batch)
    batches = tqdm(
        enumerate(loaders.train, start=progress.batch if loaders.order is not None else 0),
        desc=f'Train {epoch}', total=num_batches, initial=progress.batch, leave=False,
        disable=None if args.rank == 0 else True,
    )
    second_order = getattr(optimizer, 'is_second_order', False)  # Adahessian
    optimizer.zero_grad()
    for batch_idx, (images, target) in batches:
        if batch_idx < progress.batch:  # a stream starts over, its first batches are done
            continue
        task.levels = choose_levels(args, epoch, batch_idx // accum_steps)
        seed_all(args.seed, args.rank, epoch, batch_idx)
        images, target = loaders.prepare(images, target)
        data_time += time.perf_counter() - fetch_start
        need_update = batch_idx == last_idx or (batch_idx + 1) % accum_steps == 0
        steps = last_accum_steps if batch_idx > last_idx - last_accum_steps else accum_steps

        try:
            if args.bn_statistics == 'auto':
                args.bn_statistics = choose_statistics(task, images, args)  # also for the checkpoint
                task.keep_statistics = args.bn_statistics == 'running'
                task.train()
            with nullcontext() if need_update else task.no_sync():
                with amp_autocast():
                    losses = task(images, target)
                faults.note(batch_idx, losses, task.levels)
                loss = losses['loss'] / steps
                if loss_scaler is not None:
                    loss_scaler(
                        loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
                        parameters=clip_parameters(), create_graph=second_order, need_update=need_update)
                else:
                    loss.backward(create_graph=second_order)
                    if need_update:
                        if args.clip_grad is not None:
                            utils.dispatch_clip_grad(clip_parameters(), value=args.clip_grad, mode=args.clip_mode)
                        optimizer.step()
        except torch.OutOfMemoryError as e:
            raise TrainingFault(_explain_out_of_memory(task, args, e)) from e
        except ValueError as e:
            if 'more than 1 value per channel' not in str(e):
                raise
            raise TrainingFault(
                f'BatchNorm needs more than one value per channel, --batch-size {args.batch_size} gives only one where '
                f'a map has shrunk to a pixel. ({e})') from e
        sums += torch.stack([losses[term].detach() for term in TERMS]).to(sums.dtype) * len(images)
        progress.num_images += len(images)
        progress.batch = batch_idx + 1
        window_images += len(images)
        loaders.errors.check()

        if need_update:
            optimizer.zero_grad()
            num_updates += 1
            task.update_ema(step=num_updates)
            if args.synchronize_step and device.type == 'cuda':
                torch.cuda.synchronize()
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=num_updates)
            update_idx = batch_idx // accum_steps
            if update_idx % args.log_interval == 0 or batch_idx == last_idx:
                faults.check()
                means = (sums / progress.num_images).tolist()
                now = time.perf_counter()
                if utils.is_primary(args):
                    rate = window_images * args.world_size / (now - window_start)
                    lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
                    _logger.info(
                        f'Train: {epoch} [{update_idx:>4d}/{updates_per_epoch} '
                        f'({100. * (update_idx + 1) / updates_per_epoch:>3.0f}%)]  '
                        f"Loss: {losses['loss'].item():#.3g} ({means[0]:#.3g})  "
                        f'Cls: {means[1]:#.3g}  Ens: {means[2]:#.3g}  Dis: {means[3]:#.3g}  '
                        f'Rate: {rate:.1f}/s  LR: {lr:.3e}  Data: {data_time:.2f}s')
                    if args.save_images and output_dir:
                        path = os.path.join(output_dir, f'train-batch-{batch_idx}.jpg')
                        torchvision.utils.save_image(images, path, padding=0, normalize=True)
                window_start, window_images, data_time = now, 0, 0.
            if batch_idx == last_idx and args.distributed:
                _share_statistics(task, args)
            recover = args.recovery_interval and (update_idx + 1) % args.recovery_interval == 0
            end = preemption.poll()
            if recover or end:
                faults.check()
                progress.sums = _all_sums(sums, args)
                if recover and saver is not None:
                    saver.save_recovery(epoch, batch_idx=batch_idx)
                if end:
                    raise Preempted
        fetch_start = time.perf_counter()

    faults.check()
    if progress.batch < num_batches:  # the other processes would wait forever
        raise TrainingFault(f'The training data ended after batch {progress.batch} of {num_batches}.')
    progress.sums = _all_sums(sums, args)
    count = torch.tensor(progress.num_images, device=device, dtype=sums.dtype)
    if args.distributed:
        dist.all_reduce(sums)
        dist.all_reduce(count)
    unreadable = loaders.errors.summary()
    if unreadable:
        _logger.warning(unreadable)
    return dict(zip(TERMS, (sums / count).tolist()))


def choose_statistics(task: MultiResolutionTask, images: torch.Tensor, args: argparse.Namespace) -> str:
    """Return what is to normalize in training, 'running' or 'batch' statistics, and log why in one line."""
    similar = torch.tensor(task.measure_statistics(images), device=images.device)
    if args.distributed:
        dist.all_reduce(similar)
        similar /= args.world_size
    chosen = 'batch' if similar.mean() >= _BEARABLE else 'running'
    if utils.is_primary(args):
        found = ', '.join(f'{s:.2f} at {r}' for s, r in zip(similar.tolist(), args.resolutions))
        _logger.info(
            f'Features with the statistics of the batch are similar to those with the running ones by {found} px, '
            f"{'at least' if chosen == 'batch' else 'below'} {_BEARABLE} on average: --bn-statistics {chosen}.")
    return chosen


def choose_levels(args: argparse.Namespace, epoch: int, update: int) -> Optional[Tuple[int, ...]]:
    """Return the indices of the resolutions that an update trains, None for all.

    With --sizes-per-update they are drawn at random; with --small-steps some updates train only the smaller half; both
    end at --all-sizes-from. They are the same on all processes and after a resume.
    """
    if args.all_sizes_from is not None and epoch >= args.all_sizes_from * args.epochs:
        return None
    count, generator = len(args.resolutions), random.Random(mix_seed(args.seed, epoch, update))
    if args.sizes_per_update:
        return tuple(sorted(generator.sample(range(count), args.sizes_per_update)))
    return tuple(range(count // 2, count)) if generator.random() < args.small_steps else None


def _own_sums(sums: List[float], args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Return the sums of this process out of those of all."""
    dtype = _sum_dtype(device)
    if not sums:
        return torch.zeros(len(TERMS), device=device, dtype=dtype)
    return torch.tensor(sums, device=device, dtype=dtype).view(args.world_size, len(TERMS))[args.rank].clone()


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == 'mps' else torch.float64  # mps has no float64


def _all_sums(sums: torch.Tensor, args: argparse.Namespace) -> List[float]:
    """Return the sums of all processes, concatenated, so that each can continue with its own."""
    if not args.distributed:
        return sums.tolist()
    gathered = [torch.empty_like(sums) for _ in range(args.world_size)]
    dist.all_gather(gathered, sums)
    return torch.cat(gathered).tolist()


def _share_statistics(task: MultiResolutionTask, args: argparse.Namespace) -> None:
    """Make the running statistics of BN equal on all processes.

    Here and not after the epoch, because a checkpoint that is saved at its last batch must hold them. The moving
    average takes the statistics of the first process: a checkpoint holds only these, and resuming must give the same.
    """
    if args.dist_bn or not args.no_ddp_bb:
        utils.distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
    if task.has_ema() and not args.model_ema_force_cpu:
        utils.distribute_bn(task.get_trainable_module(ema=True), args.world_size)


def _explain_out_of_memory(task: MultiResolutionTask, args: argparse.Namespace, error: Exception) -> str:
    resolution = utils.unwrap_model(task.get_trainable_module()).resolution
    return (
        f'Out of memory at resolution {resolution} with a batch of {args.batch_size}: a smaller --batch-size with '
        f'--grad-accum-steps, --memory lean, --grad-checkpointing, --amp or --channels-last may help. '
        f"({' '.join(str(error).split())[:200]})")


def validate(
        model: nn.Module,
        loaders: Loaders,
        args: argparse.Namespace,
        preemption: Preemption,
        amp_autocast: Callable = nullcontext,
        name: str = 'Test',
) -> Dict[str, float]:
    """Evaluate at every resolution and as an ensemble, and log one line.

    Returns:
        As flatten_metrics does.

    Raises:
        UnreadableError: Too many images cannot be read, or all of them.
        Preempted: The process was asked to end.
    """
    batches = tqdm(loaders.eval, desc=name, leave=False, disable=None if args.rank == 0 else True)
    metrics = evaluate(
        model,
        _until_preempted(batches, preemption, loaders.errors),
        args.resolutions,
        loaders.normalize,
        amp_autocast=amp_autocast,
        max_samples=loaders.eval_samples,
        distributed=args.distributed,
        evaluator=partial(create_evaluator, args.task, threshold=args.multilabel_threshold),
        mirrored=args.tta == 2,
    )
    if preemption.agree():
        raise Preempted
    loaders.errors.check()
    check_images(metrics)
    flat = flatten_metrics(metrics)
    if utils.is_primary(args):
        scores = format_scores(dict(metrics, mean=average(metrics)))
        _logger.info(f"{name}: {scores}  Loss mean: {flat['loss_mean']:.3f}")
    return flat


def _until_preempted(batches: Iterable, preemption: Preemption, errors: ReadErrors) -> Iterator:
    """Give batches until a SIGTERM comes; the process still takes part in the sums, which the others wait for."""
    for batch in batches:
        errors.check()
        yield batch
        if preemption.requested:
            return


def flatten_metrics(metrics: Dict[Union[int, str], Dict[str, float]]) -> Dict[str, float]:
    """Return top1_224, top5_224, loss_224, ..., top1_ens, ..., and the means over resolutions top1_mean, ..."""
    rows = dict(metrics, mean=average(metrics))
    return {f'{name}_{key}': row[name] for key, row in rows.items() for name in METRICS if name in row}


def ensemble_weights(model: nn.Module) -> Dict[str, float]:
    """Return the ensemble weights after the softmax as alpha_224, alpha_192, ..."""
    weights = model.alpha.detach().float().softmax(0).tolist()
    return {f'alpha_{r}': w for r, w in zip(model.resolutions, weights)}
