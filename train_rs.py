#!/usr/bin/env python3
"""Train a Resolution Switchable Network

    python train_rs.py DIR --config configs/rs_resnet18.yaml
    ./distributed_train.sh 8 DIR --config configs/rs_resnet18.yaml
    python train_rs.py --dataset digits --model rs_resnet10t --resolutions 32 24 16 --epochs 10

The flags are those of timm's train.py, and --resolutions, --distill, --loss-reduction, --small-steps,
--sizes-per-update, --private, --flip, --resample, --memory and --decoded-cache. The output folder holds args.yaml,
summary.csv (accuracy at every resolution, of the ensemble, and their mean), label_names.txt where the data set names
its classes, the last and the best checkpoints. A run that was killed goes on with --resume auto as if it had not been.
"""
import importlib
import logging
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Callable, Optional

import torch
import yaml
from timm import utils
from timm.models import resume_checkpoint, safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_rs.hub.push import TrainingPush, write_label_names
from timm_rs.train import MultiResolutionTask
from timm_rs.train.builders import (
    Loaders,
    build_datasets,
    build_loaders,
    build_model,
    build_optimizer,
    build_task,
    select_device,
)
from timm_rs.train.loop import ensemble_weights, train_one_epoch, validate
from timm_rs.train.options import parse_args
from timm_rs.train.preemption import Preempted, Preemption
from timm_rs.train.saver import AtomicCheckpointSaver, Progress, find_latest
from timm_rs.train.summary import append_summary, trim_summary
from timm_rs_runtime.errors import UserError, one_line_errors

_logger = logging.getLogger('train')

# Flags that decide which groups of parameters an optimizer has, or what it keeps of each parameter.
_OPTIMIZER_FLAGS = (
    'opt', 'distill', 'private', 'weight_decay', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale',
    'opt_kwargs')


@dataclass
class Run:
    """What a run is made of; the saver, the writer and the push are on rank 0 only."""
    model: torch.nn.Module
    task: MultiResolutionTask
    loaders: Loaders
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    loss_scaler: Optional[Callable]
    amp_autocast: Callable
    output_dir: str
    stop_epoch: int
    saver: Optional[AtomicCheckpointSaver]
    writer: Any
    push: Optional[TrainingPush]


def main(argv=None):
    args = parse_args(argv)
    flags = dict(vars(args))
    local_rank, rank, _ = utils.distributed.world_info_from_env()
    if rank > 0:
        logging.getLogger().setLevel(logging.WARNING)  # the first process says what they have in common
    with one_line_errors('train_rs.py', args.traceback, quiet=local_rank > 0):
        run = set_up(args, flags)
    with one_line_errors('train_rs.py', args.traceback):
        train(run, args)


def train(run, args):
    """Train to the end, or to a safe point after a SIGTERM."""
    preemption = Preemption(args.distributed)
    try:
        fit(run, args, preemption)
    except Preempted:
        progress = run.task.progress
        if run.saver is not None:
            run.saver.save_recovery(progress.epoch, progress.batch)
            _logger.warning(
                f'SIGTERM: saved after batch {progress.batch} of epoch {progress.epoch}, '
                f'go on with --resume auto --output {os.path.dirname(run.output_dir)} '
                f'--experiment {os.path.basename(run.output_dir)}.')
        preemption.barrier()  # a launcher ends the others when one has gone
        raise SystemExit(128 + 15) from None
    except RuntimeError as e:
        fault = None if isinstance(e, UserError) else run.loaders.errors.fault()
        if fault is None:
            raise
        raise fault from e
    finally:
        preemption.close()
    if args.distributed:
        torch.distributed.destroy_process_group()
    if run.push is not None and not run.push.finish():
        raise SystemExit(1)


def set_up(args, flags):
    """Build all parts of the run, restored from the checkpoint to resume, if any."""
    for module in args.device_modules or ():
        importlib.import_module(module)
    device = select_device(args)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    found = [find_output(args) if utils.is_primary(args) else None]
    if args.distributed:
        torch.distributed.broadcast_object_list(found)  # its clock gives the name, its disk the checkpoint
    output_dir, resume = found[0]

    utils.random_seed(args.seed)  # the same weights everywhere, also in the moving average
    datasets = build_datasets(args)
    model = build_model(args, device)
    loaders = build_loaders(args, model, device, *datasets)
    task = build_task(args, model, device)
    optimizer = build_optimizer(args, model)
    if args.small_steps or args.sizes_per_update:  # of Lookahead the one inside, whose step it calls
        getattr(optimizer, '_base_optimizer', optimizer).register_step_pre_hook(lambda *_: task.drop_idle_gradients())
    amp_autocast, loss_scaler = nullcontext, None
    if args.amp:
        dtype = getattr(torch, args.amp_dtype)
        amp_autocast = partial(torch.autocast, device_type=device.type, dtype=dtype)
        if dtype == torch.float16:
            loss_scaler = utils.NativeScaler(device=device.type)
    if args.model_ema:
        ema_device = 'cpu' if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
    checkpoint = resume_run(resume, args, model, task, optimizer, loss_scaler) if resume else None
    if args.start_epoch is not None:
        task.progress = Progress(args.start_epoch)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        device_ids = [device] if device.type == 'cuda' else None
        task.prepare_distributed(device_ids=device_ids, **(dict(broadcast_buffers=False) if args.no_ddp_bb else {}))

    decreasing = args.eval_metric.startswith('loss')
    updates_per_epoch = (len(loaders.train) + args.grad_accum_steps - 1) // args.grad_accum_steps
    rates = [group['lr'] for group in optimizer.param_groups]
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing), updates_per_epoch=updates_per_epoch)
    progress = task.progress
    if lr_scheduler is not None and (progress.epoch or progress.batch):
        if args.sched == 'plateau' and progress.epoch > args.warmup_epochs:  # timm begins with the warm-up again
            for group, rate in zip(optimizer.param_groups, rates):
                group['lr'] = rate
        elif args.sched_on_updates:
            lr_scheduler.step_update(progress.epoch * updates_per_epoch - (-progress.batch // args.grad_accum_steps))
        else:
            lr_scheduler.step(progress.epoch)

    saver = writer = push = None
    if utils.is_primary(args):
        writer = open_writer(args, output_dir)
        push = TrainingPush(args, output_dir) if args.push_to_hub else None
        os.makedirs(output_dir, exist_ok=True)
        saver = AtomicCheckpointSaver(
            model=model, optimizer=optimizer, args=args, amp_scaler=loss_scaler, checkpoint_dir=output_dir,
            recovery_dir=output_dir, decreasing=decreasing, max_history=args.checkpoint_hist, task=task)
        if resume and os.path.dirname(resume) == output_dir:
            trim_summary(os.path.join(output_dir, 'summary.csv'), progress.epoch)
            saver.resume(checkpoint)
        with open(os.path.join(output_dir, 'args.yaml'), 'w') as f:
            yaml.safe_dump(dict(flags, num_classes=args.num_classes, in_chans=args.in_chans), f)
        write_label_names(output_dir, datasets[1], args.num_classes)
        _logger.info(
            f'Training {args.model} at {" ".join(map(str, args.resolutions))}, distillation {args.distill}, for '
            f'{args.stop_epoch or num_epochs} epochs of {updates_per_epoch} updates. Output: {output_dir}')
    return Run(
        model, task, loaders, optimizer, lr_scheduler, loss_scaler, amp_autocast, output_dir,
        min(args.stop_epoch or num_epochs, num_epochs), saver, writer, push)


def fit(run, args, preemption):
    """Train, validate and save, epoch by epoch."""
    while run.task.progress.epoch < run.stop_epoch:
        epoch = run.task.progress.epoch
        start, first_image = time.perf_counter(), run.task.progress.num_images
        train_metrics = train_one_epoch(
            run.task.progress, run.task, run.loaders, run.optimizer, args, preemption, run.lr_scheduler,
            run.loss_scaler, run.amp_autocast, run.saver, run.output_dir)
        images = (run.task.progress.num_images - first_image) * args.world_size
        rate = images / (time.perf_counter() - start)

        milestone = epoch + 1 in (args.save_epochs or ())
        eval_metrics = {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == run.stop_epoch or milestone:
            eval_metrics = validate(run.task.get_eval_model(), run.loaders, args, preemption, run.amp_autocast)
            if run.task.has_ema() and not args.model_ema_force_cpu:
                ema = run.task.get_eval_model(ema=True)
                eval_metrics = validate(ema, run.loaders, args, preemption, run.amp_autocast, name='Test (EMA)')
        metric = eval_metrics.get(args.eval_metric)
        if run.lr_scheduler is not None:
            run.lr_scheduler.step(epoch + 1, metric)

        run.task.progress = Progress(epoch + 1)
        if run.saver is not None:
            lrs = [g['lr'] for g in run.optimizer.param_groups]
            row = {f'train_{k}': v for k, v in dict(train_metrics, **ensemble_weights(run.model)).items()}
            row.update({f'eval_{k}': v for k, v in eval_metrics.items()}, lr=sum(lrs) / len(lrs))
            append_summary(os.path.join(run.output_dir, 'summary.csv'), dict(epoch=epoch, **row))
            write_scalars(run.writer, epoch, dict(row, images_per_second=rate))
            _logger.info(f'Epoch {epoch}: {rate:.1f} images/s')
            if eval_metrics:
                run.saver.save_checkpoint(epoch, metric=metric)
            else:
                run.saver.save_recovery(epoch, batch_idx=len(run.loaders.train) - 1)
            if milestone:
                run.saver.save_milestone(epoch + 1)
        if run.push is not None and args.push_interval and (epoch + 1) % args.push_interval == 0:
            if epoch + 1 < run.stop_epoch:  # behind the last epoch comes the last push
                run.push.start()
    if run.saver is not None and run.saver.best_metric is not None:
        _logger.info(f'*** Best {args.eval_metric}: {run.saver.best_metric:.2f} (epoch {run.saver.best_epoch})')


def find_output(args):
    """Return the output folder, which nothing is overwritten in, and the checkpoint to resume, if any."""
    root = args.output or os.path.join('output', 'train')
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        safe_model_name(args.model),
        str(max(args.resolutions)) if args.resolutions else 'default',
    ])
    output_dir = os.path.join(root, name)
    resume = find_latest(output_dir) if args.resume == 'auto' else args.resume
    if resume and not os.path.isfile(resume):
        raise UserError(f'--resume {resume}: there is no such checkpoint.')
    in_place = resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(output_dir)
    unfinished = args.resume == 'auto' and not resume  # killed before its first checkpoint
    if os.path.isdir(output_dir) and os.listdir(output_dir) and not in_place and not unfinished:
        raise UserError(
            f'Output folder {output_dir} exists and is not overwritten, give another --experiment or --resume auto.')
    return output_dir, os.path.join(output_dir, os.path.basename(resume)) if in_place else resume


def resume_run(path, args, model, task, optimizer, loss_scaler):
    """Restore a checkpoint of a run of the same network and return what else it holds."""
    checkpoint = utils.load_checkpoint_metadata(path)
    saved = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    if saved is None or 'task_state' not in checkpoint:
        raise UserError(f'--resume {path} is no checkpoint of train_rs.py, load it with --initial-checkpoint.')
    for name in ('model', 'resolutions', 'num_classes'):
        if getattr(saved, name, None) != getattr(args, name):
            raise UserError(
                f"--resume {path} was trained with --{name.replace('_', '-')} {getattr(saved, name, None)}, "
                f'now it is {getattr(args, name)}.')
    private = getattr(saved, 'private', 'both')
    if args.private not in ('both', private):
        raise UserError(
            f'--resume {path} was trained with --private {private}, now it is {args.private}: load it with '
            '--initial-checkpoint, and all resolutions begin with what they share of the largest.')
    if args.no_resume_opt:
        resume_checkpoint(model, path, log_info=utils.is_primary(args))
    else:
        resume_with_optimizer(path, saved, args, model, optimizer, loss_scaler)
    if task.has_ema():
        task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
    task.load_task_state(checkpoint['task_state'])
    if (saved.world_size, saved.batch_size) != (args.world_size, args.batch_size):
        task.progress = share_progress(task.progress, saved, args)
    return checkpoint


def resume_with_optimizer(path, saved, args, model, optimizer, loss_scaler):
    """Restore weights and what the optimizer has gathered; its rates, decay and momentum are those of the flags."""
    names = ('lr_scale', 'weight_decay', 'momentum', 'betas', 'eps', *args.opt_kwargs)
    if args.sched == 'plateau':  # its rate follows from what has happened
        _logger.warning('--sched plateau goes on at the learning rate that it had come to, its patience begins anew.')
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
            'give --no-resume-opt to start with a new one.') from None
    for group, hyperparameters, rate in zip(optimizer.param_groups, given, rates):
        group.update(hyperparameters)
        if 'initial_lr' in group:  # from which the schedule starts
            group['initial_lr'] = rate


def share_progress(progress, saved, args):
    """Return how far an epoch is with another number of images per step: about as many of them are done."""
    batch = progress.batch * saved.world_size * saved.batch_size // (args.world_size * args.batch_size)
    if not batch:
        return Progress(progress.epoch)
    _logger.warning(
        f'--resume with {args.world_size} x {args.batch_size} images per step instead of {saved.world_size} x '
        f'{saved.batch_size}: epoch {progress.epoch} goes on at batch {batch} instead of {progress.batch}, some of its '
        'images come twice or not at all.')
    num_images = batch * args.batch_size
    sums = torch.tensor(progress.sums, dtype=torch.float64).view(saved.world_size, -1).mean(0)
    sums *= num_images / progress.num_images
    return Progress(progress.epoch, batch, sums.repeat(args.world_size).tolist(), num_images)


def open_writer(args, output_dir):
    """Return a TensorBoard writer, wandb, or None."""
    if args.log_tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise UserError(f'--log-tensorboard needs the package tensorboard: {e}.') from e
        return SummaryWriter(output_dir)
    if args.log_wandb:
        try:
            import wandb
        except ImportError as e:
            raise UserError(f'--log-wandb needs the package wandb: {e}.') from e
        wandb.init(
            project=args.wandb_project, name=args.experiment or os.path.basename(output_dir), config=vars(args),
            tags=args.wandb_tags, resume='must' if args.wandb_resume_id else None, id=args.wandb_resume_id or None)
        return wandb
    return None


def write_scalars(writer, epoch, scalars):
    if hasattr(writer, 'add_scalar'):
        for name, value in scalars.items():
            writer.add_scalar(name.replace('_', '/', 1), value, epoch)
        writer.flush()
    elif writer is not None:
        writer.log(dict(scalars, epoch=epoch))


if __name__ == '__main__':
    utils.setup_default_logging()
    sys.exit(main())
