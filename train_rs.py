#!/usr/bin/env python3
"""Train a Resolution Switchable Network

    python train_rs.py DIR --config configs/rs_resnet18.yaml
    ./distributed_train.sh 8 DIR --config configs/rs_resnet18.yaml
    python train_rs.py --dataset digits --model rs_resnet10t --resolutions 32 24 16 --epochs 10

The flags are those of timm's train.py, and --resolutions, --distill, --loss-reduction, --small-steps,
--sizes-per-update, --private, --bn-statistics, --flip, --resample, --memory, --decode and --decoded-cache. From trained
weights (--pretrained, --pretrained-path, --initial-checkpoint) some defaults differ, and the first lines of the log say
which.
The output folder holds args.yaml, summary.csv (accuracy at every resolution, of the ensemble, and their mean),
label_names.txt if the data set names its classes, the last and the best checkpoints. With --resume auto a killed run
continues as if it had not been killed.
"""
import importlib
import logging
import os
import shlex
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Optional

import torch
import yaml
from timm import utils
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_rs.data.classes import number_classes
from timm_rs.evaluate import choose_amp
from timm_rs.hub.push import TrainingPush
from timm_rs.records import write_label_names
from timm_rs.train import MultiResolutionTask
from timm_rs.train.builders import build_optimizer, build_task, select_device
from timm_rs.train.classifier import fit_classifier
from timm_rs.train.faults import name_flags
from timm_rs.train.loaders import Loaders, build_datasets, build_loaders
from timm_rs.train.loop import ensemble_weights, train_one_epoch, validate
from timm_rs.train.model import build_model
from timm_rs.train.options import parse_args
from timm_rs.train.preemption import Preempted, Preemption
from timm_rs.train.resume import claim_output, resume_run
from timm_rs.train.saver import AtomicCheckpointSaver, Progress
from timm_rs.train.summary import append_summary
from timm_rs_runtime.errors import UserError, one_line_errors
from timm_rs_runtime.files import atomic_write

_logger = logging.getLogger('train')


@dataclass
class Run:
    """The parts of a run; saver, writer and push exist only on rank 0."""
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
    local_rank, rank, _ = utils.distributed.world_info_from_env()
    if rank > 0:
        logging.getLogger().setLevel(logging.WARNING)  # the first process logs what they have in common
    args = parse_args(argv)
    flags = dict(vars(args))
    with ExitStack() as held:
        with one_line_errors('train_rs.py', args.traceback, quiet=local_rank > 0):
            run = set_up(args, flags, held)
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
                f'continue with --resume auto --output {shlex.quote(os.path.dirname(run.output_dir))} '
                f'--experiment {shlex.quote(os.path.basename(run.output_dir))}.')
        preemption.barrier()  # a launcher ends the others when one has ended
        raise SystemExit(128 + 15) from None
    finally:
        preemption.close()
    if args.distributed:
        torch.distributed.destroy_process_group()
    if run.push is not None and not run.push.finish():
        raise SystemExit(1)


def set_up(args, flags, held):
    """Build all parts of the run, restored from a checkpoint if there is one; held keeps the output folder locked."""
    for module in args.device_modules or ():
        importlib.import_module(module)
    device = select_device(args)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    output = claim_output(args, held)
    output_dir = output.folder

    utils.random_seed(args.seed)  # the same weights everywhere, also in the moving average
    datasets = build_datasets(args)
    classes = number_classes(datasets[1])
    model = build_model(args, device, classes)
    loaders = build_loaders(args, model, device, *datasets)
    task = build_task(args, model, device, classes)
    if args.new_classifier and args.new_classifier_init == 'fitted' and not output.resume:
        fit_classifier(task, loaders, args)
    optimizer = build_optimizer(args, model)
    inner = getattr(optimizer, '_base_optimizer', optimizer)  # Lookahead calls the step of that
    inner.register_step_pre_hook(lambda *_: task.adjust_gradients())  # unless clipping has done so
    amp_autocast, loss_scaler = nullcontext, None
    if args.amp:
        dtype = choose_amp(model, device, args.amp_dtype, args.in_chans)
        amp_autocast = partial(torch.autocast, device_type=device.type, dtype=dtype)
        if dtype == torch.float16:
            loss_scaler = utils.NativeScaler(device=device.type)
    if args.model_ema:
        ema_device = 'cpu' if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
    checkpoint = resume_run(output, args, model, task, optimizer, loss_scaler) if output.resume else None
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
    lr_scheduler, num_epochs = name_flags(args, 'sched')(create_scheduler_v2)(
        optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing), updates_per_epoch=updates_per_epoch)
    progress = task.progress
    if lr_scheduler is not None and (progress.epoch or progress.batch):
        if args.sched == 'plateau' and progress.epoch > args.warmup_epochs:  # timm would begin with the warm-up again
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
        saver = AtomicCheckpointSaver(
            model=model, optimizer=optimizer, args=args, amp_scaler=loss_scaler, checkpoint_dir=output_dir,
            recovery_dir=output_dir, decreasing=decreasing, max_history=args.checkpoint_hist, task=task)
        if output.continues:
            saver.resume(checkpoint, output.whole)
        with atomic_write(os.path.join(output_dir, 'args.yaml'), overwrite=True) as f:
            yaml.safe_dump(dict(flags, num_classes=args.num_classes, in_chans=args.in_chans), f)
        write_label_names(output_dir, classes, args.num_classes)
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
            try:
                append_summary(os.path.join(run.output_dir, 'summary.csv'), dict(epoch=epoch, **row))
                write_scalars(run.writer, epoch, dict(row, images_per_second=rate))
            finally:  # the weights are kept, even where the row cannot be written
                if eval_metrics:
                    run.saver.save_checkpoint(epoch, metric=metric)
                else:
                    run.saver.save_recovery(epoch, batch_idx=len(run.loaders.train) - 1)
            if rate:  # none where a resumed epoch had no batch left
                _logger.info(f'Epoch {epoch}: {rate:.1f} images/s')
            if milestone:
                run.saver.save_milestone(epoch + 1)
        if run.push is not None and args.push_interval and (epoch + 1) % args.push_interval == 0:
            if epoch + 1 < run.stop_epoch:  # the last push follows the last epoch
                run.push.start()
    if run.saver is not None and run.saver.best_metric is not None:
        _logger.info(f'*** Best {args.eval_metric}: {run.saver.best_metric:.2f} (epoch {run.saver.best_epoch})')


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
