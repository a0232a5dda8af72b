"""One epoch of training, one pass of validation, and what they report"""
import argparse
import logging
import os
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn
import torchvision
from timm import utils
from tqdm import tqdm

from ..evaluate import average, evaluate
from .builders import Loaders
from .task import MultiResolutionTask

__all__ = ['ensemble_weights', 'flatten_metrics', 'train_one_epoch', 'validate']

_logger = logging.getLogger('train')
_TERMS = ('loss', 'classification', 'ensemble', 'distillation')


def train_one_epoch(
        epoch: int,
        task: MultiResolutionTask,
        loaders: Loaders,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        lr_scheduler: Any = None,
        loss_scaler: Optional[Callable] = None,
        amp_autocast: Callable = nullcontext,
        saver: Optional[utils.CheckpointSaver] = None,
        output_dir: Optional[str] = None,
) -> Dict[str, float]:
    """Train for one epoch.

    Returns:
        Means over the epoch's images of the loss and its terms, and images per second over all processes.
    """
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if loaders.mixup is not None:
            loaders.mixup.mixup_enabled = False
        loaders.train.mixup_enabled = False
    task.train()
    device = task.device
    accum_steps = args.grad_accum_steps
    last_accum_steps = len(loaders.train) % accum_steps or accum_steps
    updates_per_epoch = (len(loaders.train) + accum_steps - 1) // accum_steps
    last_idx = len(loaders.train) - 1
    num_updates = epoch * updates_per_epoch
    sums = torch.zeros(len(_TERMS), device=device, dtype=torch.float64)
    num_images = 0
    start = window_start = time.perf_counter()
    window_images = 0
    data_time = 0.
    fetch_start = start

    optimizer.zero_grad()
    progress = tqdm(loaders.train, desc=f'Train {epoch}', leave=False, disable=None if args.rank == 0 else True)
    for batch_idx, (images, target) in enumerate(progress):
        if args.no_prefetcher:
            images, target = images.to(device, dtype=loaders.normalize.mean.dtype), target.to(device)
            if loaders.mixup is not None:
                images, target = loaders.mixup(images, target)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        data_time += time.perf_counter() - fetch_start
        need_update = batch_idx == last_idx or (batch_idx + 1) % accum_steps == 0
        steps = last_accum_steps if batch_idx > last_idx - last_accum_steps else accum_steps

        with nullcontext() if need_update else task.no_sync():
            with amp_autocast():
                losses = task(images, target)
            loss = losses['loss'] / steps
            clip_parameters = partial(task.get_clip_parameters, exclude_head='agc' in args.clip_mode)
            if loss_scaler is not None:
                loss_scaler(
                    loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
                    parameters=clip_parameters(), need_update=need_update)
            else:
                loss.backward()
                if need_update:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(clip_parameters(), value=args.clip_grad, mode=args.clip_mode)
                    optimizer.step()
        if need_update:
            optimizer.zero_grad()
            num_updates += 1
            task.update_ema(step=num_updates)
        sums += torch.stack([losses[term].detach() for term in _TERMS]).double() * len(images)
        num_images += len(images)
        window_images += len(images)
        if args.synchronize_step and device.type == 'cuda':
            torch.cuda.synchronize()

        if need_update:
            update_idx = batch_idx // accum_steps
            if update_idx % args.log_interval == 0 or batch_idx == last_idx:
                means = (sums / num_images).tolist()
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
                        torchvision.utils.save_image(
                            images, os.path.join(output_dir, f'train-batch-{batch_idx}.jpg'), padding=0, normalize=True)
                window_start, window_images, data_time = now, 0, 0.
            if saver is not None and args.recovery_interval and (update_idx + 1) % args.recovery_interval == 0:
                saver.save_recovery(epoch, batch_idx=update_idx)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=num_updates)
        fetch_start = time.perf_counter()

    if args.distributed:
        torch.distributed.all_reduce(sums)
    means = (sums / (num_images * args.world_size)).tolist()
    rate = num_images * args.world_size / (time.perf_counter() - start)
    return dict(zip(_TERMS, means), images_per_second=rate)


def validate(
        model: nn.Module,
        loaders: Loaders,
        args: argparse.Namespace,
        amp_autocast: Callable,
        name: str = 'Test',
) -> Dict[str, float]:
    """Evaluate at every resolution and as an ensemble, and log a line of it.

    Returns:
        As flatten_metrics does.
    """
    progress = tqdm(total=len(loaders.eval), desc=name, leave=False, disable=None if args.rank == 0 else True)
    metrics = evaluate(
        model,
        loaders.eval,
        args.resolutions,
        loaders.normalize,
        amp_autocast=amp_autocast,
        max_samples=loaders.eval_samples,
        distributed=args.distributed,
        on_batch=lambda *_: progress.update(),
    )
    progress.close()
    flat = flatten_metrics(metrics)
    if utils.is_primary(args):
        top1 = '  '.join(f"{key}: {row['top1']:.2f}" for key, row in metrics.items())
        _logger.info(f"{name}: Acc@1  {top1}  mean: {flat['top1_mean']:.2f}  Loss mean: {flat['loss_mean']:.3f}")
    return flat


def flatten_metrics(metrics: Dict[Union[int, str], Dict[str, float]]) -> Dict[str, float]:
    """Return top1_224, top5_224, loss_224, ..., top1_ens, ..., and the means over resolutions top1_mean, ..."""
    rows = dict(metrics, mean=average(metrics))
    return {f'{name}_{key}': row[name] for key, row in rows.items() for name in ('top1', 'top5', 'loss')}


def ensemble_weights(model: nn.Module) -> Dict[str, float]:
    """Return the softmaxed ensemble weights as alpha_224, alpha_192, ..., 'ens' and the like left out."""
    weights = model.alpha.detach().float().softmax(0).tolist()
    return {f'alpha_{r}': w for r, w in zip(model.resolutions, weights)}
