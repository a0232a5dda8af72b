"""Training of one network of the comparison, on a CPU, or on a GPU beside others"""
import math
import sys
import threading
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from _common import environment
from _photographs import Boxes, Photographs, crop, normalize, random_boxes
from _variants import ENSEMBLES, share_half
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from timm_rs.evaluate import ENSEMBLE, count_parameters
from timm_rs.quant import quantize
from timm_rs.train import ResolutionPyramid
from timm_rs_runtime.files import atomic_path

__all__ = [
    'Diverged', 'Run', 'Stopped', 'choose_levels', 'create_network', 'level_shares', 'say', 'train_network',
]

TERMS = ('loss', 'classification', 'ensemble', 'distillation')
SECONDS_BETWEEN_CHECKPOINTS = 20

_one_at_a_time = threading.Lock()  # torch has one random state of the CPU, and captures one graph at a time


class Diverged(Exception):
    """The loss is not finite."""


class Stopped(Exception):
    """Training was asked to stop."""


@dataclass(frozen=True)
class Run:
    """A network to train.

    Attributes:
        method: Key of METHODS.
        sizes: Sizes in pixels that it is trained at, largest first.
        lr: Learning rate.
        seed: Of weights, order and crops.
        search: Trained without the held-out images and evaluated on them, to choose the learning rate.
    """
    method: str
    sizes: Tuple[int, ...]
    lr: float
    seed: int
    search: bool = False

    @property
    def name(self) -> str:
        sizes = f'-{self.sizes[0]}' if self.method == 'inet' else ''
        lr = '?' if math.isnan(self.lr) else f'{self.lr:g}'
        return f"{self.method}{sizes}-lr{lr}-seed{self.seed}{'-search' if self.search else ''}"

    @property
    def switchable(self) -> bool:
        return self.method not in ('inet', 'random_size')


def train_network(
        run: Run, args: Namespace, photographs: Photographs, checkpoint: Path, stop: Callable[[], bool] = lambda: False,
) -> Tuple[dict, Dict[str, torch.Tensor]]:
    """Train a network, or go on with it, and evaluate it.

    Args:
        run: The network.
        args: Flags of paper_table.py.
        photographs: Images, those for training on the device.
        checkpoint: File to keep the state in.
        stop: Asked after every epoch.

    Returns:
        (what it reaches, its weights).

    Raises:
        Diverged: The loss is not finite.
        Stopped: It was stopped; the checkpoint has what is done.
    """
    began, device = time.perf_counter(), torch.device(args.device)
    count = photographs.num_fit if run.search else len(photographs.train)
    labels = photographs.train_labels[:count].to(device)
    with _one_at_a_time:
        torch.manual_seed(run.seed)
        model = create_network(run, args, len(photographs.classes))
    model.to(device, memory_format=layout_of(args))
    if args.private != 'both':
        share_half(model, args.private)
    mode = run.method if run.method in ('ens', 'ens_topdown') else 'none'
    criterion = ENSEMBLES[args.ensemble](mode, len(run.sizes), len(photographs.classes)).to(device)
    average = ModelEmaV3(model, decay=args.ema) if args.ema else None
    step = Step(run, args, model, criterion, photographs.train, labels)
    epochs, steps = args.search_epochs if run.search else args.epochs, count // args.batch_size
    epoch, spent, saved = 0, 0., began
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state['model'])
        criterion.load_state_dict(state['criterion'])
        step.load_state_dict(state['optimizer'])
        epoch, spent = state['epoch'], state['seconds']
        if average:
            average.load_state_dict(state['average'])

    while epoch < epochs:
        sums = torch.zeros(len(TERMS), device=device)
        model.train()
        for i, (boxes, chosen) in enumerate(draw_epoch(run, args, epoch, count, photographs.train.shape[-1], device)):
            at = epoch + i / steps
            warm = min(1., (at + 1 / steps) / max(args.warmup_epochs, 1e-9))
            lr = run.lr * min(warm, 0.5 * (1 + math.cos(math.pi * at / epochs)))
            sums += step(boxes, chosen, lr, min(1., at / args.distill_ramp) if args.distill_ramp else 1.)
            if average:
                average.update(model)
        losses = (sums / steps).tolist()
        if not all(map(math.isfinite, losses)):
            raise Diverged(f'{run.name}: the loss is not finite in epoch {epoch}.')
        epoch += 1
        now = time.perf_counter()
        seconds = spent + now - began
        losses, left = '/'.join(f'{v:.3f}' for v in losses), seconds / epoch * (epochs - epoch)
        say(f'{run.name}: epoch {epoch}/{epochs}, loss {losses}, {left / 60:.0f} min to go')
        stopped = stop()
        if stopped or epoch == epochs or now - saved >= SECONDS_BETWEEN_CHECKPOINTS:
            state = dict(model=model.state_dict(), criterion=criterion.state_dict(), optimizer=step.state_dict(),
                         epoch=epoch, seconds=seconds)
            if average:
                state.update(average=average.state_dict())
            with atomic_path(checkpoint, overwrite=True) as partial:
                torch.save(state, partial)
            saved = now
        if stopped:
            raise Stopped(run.name)

    held = (photographs.held_out, photographs.train_labels[count:])
    target = held if run.search else (photographs.val, photographs.val_labels)
    sizes = run.sizes if run.method == 'inet' and (run.search or run.sizes[0] != args.sizes[0]) else args.sizes
    reached = accuracy(model.eval(), criterion, sizes, *target, args)
    if average:
        model, last = average.module, reached
        reached = dict(accuracy(model.eval(), criterion, sizes, *target, args), without_average=last)
    result = dict(
        asdict(run), **reached, params=count_parameters(model), seconds=seconds, device=device_name(device),
        images_per_second=count * epochs / seconds)
    reached = ', '.join(f'{s} px {v:.2f}' if s.isdigit() else f'{s} {v:.2f}' for s, v in result['top1'].items())
    say(f'{run.name}: {reached}')
    return result, {k: v.half().cpu() if v.is_floating_point() else v.cpu() for k, v in model.state_dict().items()}


class Step:
    """An update of a network by a batch.

    A small network leaves a GPU waiting for Python. With --cuda-graphs all that a step does there, from the crops to
    the optimizer, is captured and then launched at once.

    Args:
        run: The network.
        args: Flags of paper_table.py.
        model: Its module.
        criterion: Its loss.
        images: All for training, on the device.
        labels: Their classes, on the device.
    """
    EAGER = 3  # steps before one is captured, in which libraries and the optimizer allocate what they need

    def __init__(
            self, run: Run, args: Namespace, model: torch.nn.Module, criterion: torch.nn.Module, images: torch.Tensor,
            labels: torch.Tensor,
    ):
        self.run, self.args, self.model, self.criterion, self.images, self.labels = (
            run, args, model, criterion, images, labels)
        self.network = torch.compile(model) if args.torchcompile else model
        self.pyramid = ResolutionPyramid(run.sizes, resample=args.resample)
        self.lr, self.ramp = run.lr, 1.
        if args.cuda_graphs:
            self.lr, self.ramp = (torch.tensor(v, device=images.device) for v in (self.lr, self.ramp))
        fused = dict(fused=True) if args.cuda_graphs else {}
        self.optimizer = create_optimizer_v2(
            model, opt='sgd', lr=self.lr, momentum=0.9, weight_decay=args.weight_decay, **fused)
        if criterion.mode != 'none' and any(True for _ in criterion.parameters()):
            self.optimizer.add_param_group(dict(params=list(criterion.parameters()), weight_decay=0.))
        self._seen, self._graphs = {}, {}

    def __call__(self, boxes: Boxes, chosen: Tuple[int, ...], lr: float, ramp: float) -> torch.Tensor:
        """Make an update.

        Args:
            boxes: Crops, on the device.
            chosen: Indices of the sizes to train.
            lr: Learning rate.
            ramp: Weight of distillation.

        Returns:
            The loss and its terms [4], which the next call may overwrite.
        """
        if not self.args.cuda_graphs:
            self.ramp = ramp
            for group in self.optimizer.param_groups:
                group['lr'] = lr
            return self._update(boxes, chosen)
        self.lr.fill_(lr)
        self.ramp.fill_(ramp)
        if chosen not in self._graphs:
            self._seen[chosen] = self._seen.get(chosen, 0) + 1
            if self._seen[chosen] <= self.EAGER:
                return self._update(boxes, chosen)
            self._graphs[chosen] = self._capture(boxes, chosen)
        graph, static, terms = self._graphs[chosen]
        for target, source in zip(static, boxes):
            target.copy_(source)
        graph.replay()
        return terms

    def _capture(self, boxes: Boxes, chosen: Tuple[int, ...]):
        static, graph, stream = Boxes(*(x.clone() for x in boxes)), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with _one_at_a_time, torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            terms = self._update(static, chosen)
        return graph, static, terms

    def _update(self, boxes: Boxes, chosen: Tuple[int, ...]) -> torch.Tensor:
        run = self.run
        self.optimizer.zero_grad(set_to_none=not self.args.cuda_graphs)
        crops = crop(self.images, boxes, run.sizes[0]).contiguous(memory_format=layout_of(self.args))
        with autocast(self.args):
            levels = self.pyramid(crops)
            if run.switchable and len(chosen) == len(levels):
                logits = self.network(levels)
            else:
                logits = [self.network(levels[i]) for i in chosen]
        alpha = torch.stack([self.model.alpha[i] for i in chosen]) if run.switchable else torch.zeros(1)
        terms = self.criterion(logits, self.labels[boxes.indices], alpha)
        loss = terms['classification'] + terms['ensemble'] + self.ramp * terms['distillation']
        (loss / len(logits) if self.args.mean_loss else loss).backward()
        self.optimizer.step()
        return torch.stack([terms[k].detach() for k in TERMS])

    def state_dict(self) -> dict:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)
        if self.args.cuda_graphs:
            for group in self.optimizer.param_groups:
                group['lr'] = self.lr


def draw_epoch(
        run: Run, args: Namespace, epoch: int, count: int, side: int, device: torch.device,
) -> List[Tuple[Boxes, Tuple[int, ...]]]:
    """Return the crops of every batch of an epoch, on the device, and which sizes it trains."""
    generator = torch.Generator().manual_seed(1000003 * run.seed + epoch)
    batches, levels = [], []
    for indices in torch.randperm(count, generator=generator).split(args.batch_size):
        if len(indices) == args.batch_size:
            batches.append(random_boxes(indices, side, tuple(args.scale), generator, args.hflip))
            levels.append(choose_levels(run, args, generator))
    stacked = (torch.stack(parts).to(device) for parts in zip(*batches))
    return list(zip(map(Boxes._make, zip(*stacked)), levels))


def create_network(run: Run, args: Namespace, num_classes: int) -> torch.nn.Module:
    kwargs = dict(args.model_kwargs, num_classes=num_classes)
    if args.pretrained or args.pretrained_path:
        kwargs.update(pretrained=True)
    if args.pretrained_path:
        kwargs.update(pretrained_cfg_overlay=dict(file=args.pretrained_path))
    if args.zero_init:
        kwargs.update(zero_init_last=True)
    quantized = args.weight_bits < 32
    if not run.switchable and not quantized:
        model = timm.create_model(args.model, **kwargs)
    else:
        sizes = run.sizes if run.switchable else run.sizes[:1]
        model = timm.create_model(f'rs_{args.model}', resolutions=sizes, **kwargs)
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    if quantized:
        trained = bool(args.initial_checkpoint or kwargs.get('pretrained'))
        quantize(model, args.weight_bits, args.activation_bits, trained=trained)
    return model if run.switchable or not quantized else model.at(run.sizes[0])


def choose_levels(run: Run, args: Namespace, generator: torch.Generator) -> Tuple[int, ...]:
    """Return which of the sizes of a run a step trains."""
    count = len(run.sizes)
    if run.method == 'random_size':
        return int(torch.randint(count, (), generator=generator)),
    if args.sampled and count > 3:
        return 0, 1 + int(torch.randint(count - 2, (), generator=generator)), count - 1
    if args.small_steps and count > 1 and float(torch.rand((), generator=generator)) < args.small_steps:
        return tuple(range(count // 2, count))
    return tuple(range(count))


def level_shares(run: Run, args: Namespace) -> List[float]:
    """Return the expected share of the steps of a run that train each of its sizes, see choose_levels."""
    count = len(run.sizes)
    if run.method == 'random_size':
        return [1 / count] * count
    if args.sampled and count > 3:
        return [1., *[1 / (count - 2)] * (count - 2), 1.]
    if count == 1:
        return [1.]
    return [1 - args.small_steps] * (count // 2) + [1.] * (count - count // 2)


@torch.inference_mode()
def accuracy(
        model: torch.nn.Module, criterion: torch.nn.Module, sizes: Sequence[int], images: Dict[int, torch.Tensor],
        labels: torch.Tensor, args: Namespace,
) -> Dict[str, Dict[str, float]]:
    """Return top-1 and top-5 in percent and the loss at each size, and of the ensemble."""
    logits = {}
    for size in sizes:
        with autocast(args):
            logits[str(size)] = torch.cat(
                [model(normalize(x.to(args.device))).float() for x in images[size].split(250)])
    if hasattr(model, 'alpha'):
        logits[ENSEMBLE] = criterion.ensemble(torch.stack(list(logits.values())), model.alpha)
    labels = labels.to(args.device).view(-1, 1)
    hits = {k: z.topk(min(5, z.shape[1])).indices == labels for k, z in logits.items()}
    return dict(
        top1={k: 100 * h[:, :1].any(1).float().mean().item() for k, h in hits.items()},
        top5={k: 100 * h.any(1).float().mean().item() for k, h in hits.items()},
        loss={k: F.cross_entropy(z, labels[:, 0]).item() for k, z in logits.items()})


def autocast(args: Namespace):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.amp else nullcontext()


def layout_of(args: Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f"{environment()['cpu']}, {torch.get_num_threads()} threads"


def say(text: str) -> None:
    sys.stdout.write(f'{text}\n')  # at once, other threads speak too
    sys.stdout.flush()

