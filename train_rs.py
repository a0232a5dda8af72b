#!/usr/bin/env python3
"""Train a Resolution Switchable Network

    python train_rs.py DIR --model rs_resnet18 --config configs/rs_resnet18.yaml
    ./distributed_train.sh 8 DIR --model rs_resnet18 --config configs/rs_resnet18.yaml
    python train_rs.py --dataset digits --model rs_resnet10t --resolutions 32 24 16 --epochs 10

The flags are those of timm's train.py, and --resolutions, --distill and --flip. The output folder holds args.yaml,
summary.csv (accuracy at every resolution, of the ensemble, and their mean), the last and the best checkpoints.
"""
import importlib
import logging
import os
import sys
from contextlib import nullcontext
from datetime import datetime
from functools import partial

import torch
import yaml
from timm import utils
from timm.models import resume_checkpoint, safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_rs.errors import one_line_errors
from timm_rs.train.arguments import parse_args
from timm_rs.train.builders import (
    build_datasets,
    build_loaders,
    build_model,
    build_optimizer,
    build_task,
    select_device,
)
from timm_rs.train.engine import ensemble_weights, train_one_epoch, validate

_logger = logging.getLogger('train')


def main(argv=None):
    utils.setup_default_logging()
    args = parse_args(argv)
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)

    with one_line_errors('train_rs.py'):
        for module in args.device_modules or ():
            importlib.import_module(module)
        device = select_device(args)
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        utils.random_seed(args.seed, args.rank)
        output_dir, resume = find_output(args)
        datasets = build_datasets(args)
        model = build_model(args, device)
        loaders = build_loaders(args, model, device, *datasets)
        task = build_task(args, model, device)
        optimizer = build_optimizer(args, model)

        amp_autocast, loss_scaler = nullcontext, None
        if args.amp:
            dtype = getattr(torch, args.amp_dtype)
            amp_autocast = partial(torch.autocast, device_type=device.type, dtype=dtype)
            if device.type == 'cuda' and dtype == torch.float16:
                loss_scaler = utils.NativeScaler(device=device.type)
        if args.model_ema:
            ema_device = 'cpu' if args.model_ema_force_cpu else None
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)

        start_epoch = 0
        if resume:
            start_epoch = resume_run(resume, args, model, task, optimizer, loss_scaler)
        if args.start_epoch is not None:
            start_epoch = args.start_epoch
        if args.torchcompile:
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.distributed:
            device_ids = [device] if device.type == 'cuda' else None
            task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)

        updates_per_epoch = (len(loaders.train) + args.grad_accum_steps - 1) // args.grad_accum_steps
        decreasing = args.eval_metric.startswith('loss')
        lr_scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing), updates_per_epoch=updates_per_epoch)
        if lr_scheduler is not None and start_epoch > 0:
            if args.sched_on_updates:
                lr_scheduler.step_update(start_epoch * updates_per_epoch)
            else:
                lr_scheduler.step(start_epoch)

        saver = None
        if utils.is_primary(args):
            os.makedirs(output_dir, exist_ok=True)
            saver = utils.CheckpointSaver(
                model=model, optimizer=optimizer, args=args, amp_scaler=loss_scaler, checkpoint_dir=output_dir,
                recovery_dir=output_dir, decreasing=decreasing, max_history=args.checkpoint_hist, task=task)
            if resume and os.path.dirname(resume) == output_dir:
                saver.load_state_dict_from_checkpoint(resume)
                utils.trim_summary(os.path.join(output_dir, 'summary.csv'), start_epoch)
            with open(os.path.join(output_dir, 'args.yaml'), 'w') as f:
                f.write(args_text)
            if args.log_wandb:
                import wandb
                wandb.init(
                    project=args.wandb_project, name=args.experiment, config=vars(args), tags=args.wandb_tags,
                    resume='must' if args.wandb_resume_id else None, id=args.wandb_resume_id or None)

    stop_epoch = num_epochs if args.stop_epoch is None else min(args.stop_epoch, num_epochs)
    if utils.is_primary(args):
        _logger.info(
            f'Training {args.model} at {" ".join(map(str, args.resolutions))} for {stop_epoch} epochs of '
            f'{updates_per_epoch} updates, distillation {args.distill}. Output: {output_dir}')
    best_metric = best_epoch = None
    for epoch in range(start_epoch, stop_epoch):
        if hasattr(loaders.train.sampler, 'set_epoch'):
            loaders.train.sampler.set_epoch(epoch)
        train_metrics = train_one_epoch(
            epoch, task, loaders, optimizer, args, lr_scheduler, loss_scaler, amp_autocast, saver, output_dir)
        if args.distributed and args.dist_bn:
            utils.distribute_bn(model, args.world_size, args.dist_bn == 'reduce')

        milestone = epoch + 1 in (args.save_epochs or ())
        eval_metrics = None
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == stop_epoch or milestone:
            eval_metrics = validate(task.get_eval_model(), loaders, args, amp_autocast)
            if task.has_ema() and not args.model_ema_force_cpu:
                ema = task.get_eval_model(ema=True)
                if args.distributed and args.dist_bn:
                    utils.distribute_bn(ema, args.world_size, args.dist_bn == 'reduce')
                eval_metrics = validate(ema, loaders, args, amp_autocast, name='Test (EMA)')
        if lr_scheduler is not None:
            metric = eval_metrics[args.eval_metric] if eval_metrics else None
            lr_scheduler.step(epoch + 1, metric)

        if saver is not None and eval_metrics:
            lrs = [g['lr'] for g in optimizer.param_groups]
            utils.update_summary(
                epoch, dict(train_metrics, **ensemble_weights(model)), eval_metrics,
                filename=os.path.join(output_dir, 'summary.csv'), lr=sum(lrs) / len(lrs), log_wandb=args.log_wandb)
            best_metric, best_epoch = saver.save_checkpoint(epoch, metric=eval_metrics[args.eval_metric])
            if milestone:
                saver.save_milestone(epoch + 1)
    if args.distributed:
        torch.distributed.destroy_process_group()
    if best_metric is not None:
        _logger.info(f'*** Best {args.eval_metric}: {best_metric:.2f} (epoch {best_epoch})')


def find_output(args):
    """Return the output folder, which nothing is overwritten in, and the checkpoint to resume, if any."""
    root = args.output or os.path.join('output', 'train')
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        safe_model_name(args.model),
        str(max(args.resolutions)) if args.resolutions else 'default',
    ])
    output_dir = os.path.join(root, name)
    resume = args.resume
    if resume == 'auto':
        last = os.path.join(output_dir, 'last.pth.tar')
        resume = last if os.path.exists(last) else ''
    elif resume and not os.path.isfile(resume):
        raise ValueError(f'--resume {resume}: there is no such checkpoint.')
    in_place = resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(output_dir)
    if os.path.isdir(output_dir) and os.listdir(output_dir) and not in_place:
        raise ValueError(
            f'Output folder {output_dir} exists and is not overwritten, give another --experiment or --resume auto.')
    return output_dir, os.path.join(output_dir, os.path.basename(resume)) if in_place else resume


def resume_run(path, args, model, task, optimizer, loss_scaler):
    """Restore a checkpoint of a run of the same resolutions and return the epoch to go on with."""
    checkpoint = utils.load_checkpoint_metadata(path)
    saved = checkpoint.get('args') if isinstance(checkpoint, dict) else None
    if saved is None:
        raise ValueError(f'--resume {path} is no training checkpoint, load it with --initial-checkpoint.')
    for name in ('model', 'resolutions', 'num_classes'):
        if getattr(saved, name, None) != getattr(args, name):
            raise ValueError(
                f"--resume {path} was trained with --{name.replace('_', '-')} {getattr(saved, name, None)}, "
                f'now it is {getattr(args, name)}.')
    start_epoch = resume_checkpoint(
        model, path, optimizer=None if args.no_resume_opt else optimizer,
        loss_scaler=None if args.no_resume_opt else loss_scaler, log_info=utils.is_primary(args))
    if task.has_ema() and 'state_dict_ema' in checkpoint:
        task.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)
    return start_epoch or 0


if __name__ == '__main__':
    sys.exit(main())
