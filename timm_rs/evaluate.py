"""Accuracy and cost at every resolution"""
import logging
import time
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn as nn
from timm.task.evaluator import ClassificationEvaluator, MultiLabelClassificationEvaluator
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.unreadable import UnreadableError

from ._compat import BatchNorm, FakeTensorMode
from .data.readers import UNREADABLE
from .quant.quantize import fold, is_quantized
from .resolutions import check_resolutions, nearest_resolution
from .switchable import SwitchableMixin

__all__ = [
    'ENSEMBLE', 'METRICS', 'TASKS', 'average', 'check_images', 'choose_amp', 'count_madds', 'count_parameters',
    'create_evaluator', 'evaluate', 'format_scores',
]

ENSEMBLE = 'ens'  # key of the ensemble beside the resolutions
TASKS = ('classification', 'multilabel')
METRICS = dict(  # by their titles, those of both tasks
    top1='Acc@1', top5='Acc@5', map='mAP', micro_f1='micro F1', macro_f1='macro F1', sample_f1='sample F1', loss='Loss')

_logger = logging.getLogger(__name__)


def count_parameters(model: nn.Module) -> int:
    """Return the number of learnable values; a switchable network counts every private BN and the ensemble weights."""
    return sum(p.numel() for p in model.parameters())


def count_madds(model: nn.Module, resolution: int, in_chans: int = 3) -> int:
    """Return the multiply-adds of convolutions and matrix products for one image, each counted once.

    Args:
        model: Any network; a switchable one is counted with the BN nearest to the resolution.
        resolution: Input size in pixels.
        in_chans: Image channels.

    Raises:
        ValueError: The network cannot take an image of this size.

    Example:
        >>> import timm
        >>> round(count_madds(timm.create_model('resnet18'), 224) / 1e9, 2)
        1.81
    """
    if isinstance(model, SwitchableMixin):
        model = model.at(nearest_resolution(resolution, resolution, model.resolutions))
    if is_quantized(model):
        model = fold(model)
    modes = {m: m.training for m in model.modules()}
    layers = [(m, m.__dict__.get('forward')) for m in modes if isinstance(m, BatchNorm)]
    model.eval()
    for layer, _ in layers:  # torch works out the shapes of BatchNorm in Python, which is half of the time
        layer.forward = lambda x: x
    logger = logging.getLogger('torch._subclasses.fake_tensor')  # logs a traceback of what is raised anyway
    disabled, logger.disabled = logger.disabled, True
    try:
        reference = next(model.parameters())
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, in_chans, resolution, resolution, device=reference.device, dtype=reference.dtype))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UserError(f'{type(model).__name__} cannot take images of {resolution}x{resolution}: {e}') from e
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, forward in layers:
            del layer.forward
            if forward is not None:
                layer.forward = forward
        logger.disabled = disabled
    return counter.get_total_flops() // 2


def average(metrics: Dict[Union[int, str], Dict[str, float]]) -> Dict[str, float]:
    """Return the mean over resolutions of each metric, without the ensemble."""
    rows = [row for key, row in metrics.items() if key != ENSEMBLE]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def create_evaluator(
        task: str = 'classification',
        device: Optional[torch.device] = None,
        threshold: float = 0.5,
) -> ClassificationEvaluator:
    """Return timm's evaluator of a task of TASKS; it counts labels from a probability of `threshold` on."""
    if task == 'multilabel':
        return MultiLabelClassificationEvaluator(device, threshold=threshold)
    return ClassificationEvaluator(device)


def format_scores(metrics: Mapping[Any, Mapping[str, float]]) -> str:
    """Return the main metric of each resolution in words.

    Example:
        >>> format_scores({64: dict(loss=0.5, top1=80.), 48: dict(loss=0.6, top1=75.)})
        'Acc@1  64: 80.00  48: 75.00'
    """
    name = next(name for name in METRICS if name in next(iter(metrics.values())))
    return '  '.join([METRICS[name], *(f'{key}: {row[name]:.2f}' for key, row in metrics.items())])


@torch.inference_mode()
def choose_amp(model: nn.Module, device: torch.device, name: Optional[str], in_chans: int = 3) -> torch.dtype:
    """Return the lower precision of mixed precision; a CPU that is slower with it than in float32 is told so by a line.

    Args:
        model: The network, on the device.
        device: Its device.
        name: Name of the dtype; if None it is float16, bfloat16 on a CPU.
        in_chans: Image channels.
    """
    dtype = getattr(torch, name or ('bfloat16' if device.type == 'cpu' else 'float16'))
    if device.type == 'cpu' and next(model.parameters()).dtype == torch.float32:
        resolution = min(getattr(model, 'resolutions', None) or model.pretrained_cfg['input_size'][1:])
        images = torch.ones(8, in_chans, resolution, resolution)
        modes = {m: m.training for m in model.modules()}
        model.eval()
        times: Dict[bool, List[float]] = {True: [], False: []}
        for is_lower in (True, False) * 4:
            start = time.perf_counter()
            with torch.autocast('cpu', dtype, enabled=is_lower):
                model(images)
            times[is_lower].append(time.perf_counter() - start)
        for module, training in modes.items():
            module.training = training
        ratio = min(times[True]) / min(times[False])
        if ratio > 1.1:
            _logger.warning(
                f"--amp in {str(dtype).partition('.')[2]} takes {ratio:.1f} times as long as float32 on this CPU, in a "
                f'forward pass at {resolution} px.')
    return dtype


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Any,
        resolutions: Sequence[int],
        normalize: Callable[[torch.Tensor], torch.Tensor],
        amp_autocast: Callable = nullcontext,
        max_samples: Optional[int] = None,
        distributed: bool = False,
        on_batch: Optional[Callable[[int, Dict], None]] = None,
        evaluator: Callable[[torch.device], ClassificationEvaluator] = ClassificationEvaluator,
        classes: Optional[Sequence[int]] = None,
        mirrored: bool = False,
) -> Dict[Union[int, str], Dict[str, float]]:
    """Evaluate a network at several resolutions, and their ensemble if they are all those of a switchable network.

    Args:
        model: A switchable or a plain network, possibly compiled or wrapped.
        loader: Gives (list of uint8 images per resolution, largest first, targets), see create_eval_loader of
            timm_rs.data.datasets.
        resolutions: Input sizes in pixels, those of the loader.
        normalize: Brings a uint8 batch to the device and normalizes it.
        amp_autocast: Context of mixed precision.
        max_samples: Images of this process, without the loader's padding.
        distributed: Sum the counts over processes.
        on_batch: Called with the batch number and the running metrics.
        evaluator: Returns an evaluator of timm, given the device; see create_evaluator.
        classes: Indices of the classes that can be answers, if not all, in the order of the targets.
        mirrored: Take the mean over the logits of an image and of its mirror image.

    Returns:
        For each resolution, and 'ens' for the ensemble: the metrics of the evaluator ('loss', 'top1' and 'top5', or
        with several labels per image 'loss', 'map', 'micro_f1', 'macro_f1' and 'sample_f1', all but the loss in
        percent), 'images' (which these are means over), 'unreadable' (images that are left out, see ReadableDataset),
        and 'images_per_second' of this process, only of the model.
    """
    resolutions = check_resolutions(resolutions)
    keys: List[Union[int, str]] = list(resolutions)
    weights = None
    network = unwrap_model(model)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # the wrapper would wait at each batch for the others, which may have fewer
    if isinstance(network, SwitchableMixin) and network.resolutions == resolutions:
        weights = network.alpha.float().softmax(0)
        keys.append(ENSEMBLE)
    device = next(network.parameters()).device
    evaluators = {key: evaluator(device) for key in keys}
    seconds = dict.fromkeys(keys, 0.)
    model.eval()
    num_images = num_counted = num_unreadable = 0
    for batch_idx, (pyramid, target) in enumerate(loader):
        num_images += len(target)
        padding = 0 if max_samples is None else min(max(num_images - max_samples, 0), len(target))
        first = target[:len(target) - padding] if target.ndim == 1 else target[:len(target) - padding, 0]
        (counted,) = (first != UNREADABLE).nonzero(as_tuple=True)
        num_counted += len(counted)
        num_unreadable += len(target) - padding - len(counted)
        counted = counted.to(device, non_blocking=True)
        target = target.to(device, non_blocking=True)[counted]
        logits = []
        for resolution, images in zip(resolutions, pyramid):
            images = normalize(images)
            start = _now(images.device)
            with amp_autocast():
                found = model(images).float()
                if mirrored:
                    found = (found + model(images.flip(-1)).float()) / 2
            logits.append((found if classes is None else found[:, classes])[counted])
            seconds[resolution] += _now(images.device) - start
            evaluators[resolution].update(logits[-1], target)
        if weights is not None:
            evaluators[ENSEMBLE].update(torch.einsum('s,snc->nc', weights, torch.stack(logits)), target)
        if on_batch is not None:
            on_batch(batch_idx, {key: e.summary() for key, e in evaluators.items()})
    seconds[ENSEMBLE] = sum(seconds.values())
    counts = torch.tensor([num_counted, num_unreadable], device=device)
    if distributed:
        torch.distributed.all_reduce(counts)
    counts = dict(zip(('images', 'unreadable'), counts.tolist()))
    return {
        key: dict(
            counts, **e.compute(distributed=distributed), images_per_second=num_images / max(seconds[key], 1e-9))
        for key, e in evaluators.items()
    }


def check_images(metrics: Dict[Union[int, str], Dict[str, float]]) -> None:
    """Raise UnreadableError if an evaluation saw no images, or none that can be read, so that nothing is averaged."""
    row = next(iter(metrics.values()))
    if not row['images']:
        raise UnreadableError(
            f"None of the {row['unreadable']} images can be read." if row['unreadable'] else
            'The data set gave no images to evaluate on.')


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
