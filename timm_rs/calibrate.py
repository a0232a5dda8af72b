"""A resolution that was not trained

`add_resolution` gives a switchable network one more resolution from unlabelled images: the new BN layers start from
their trained neighbours, their statistics are fitted to the new size, and the network at its largest size can teach
the new one.
"""
import copy
import logging
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task.evaluator import ClassificationEvaluator
from tqdm import tqdm

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.fields import check_argument, integer, number

from .data.readers import UNREADABLE
from .data.resample import INTERPOLATIONS, downscale
from .evaluate import METRICS, create_evaluator
from .private_bn import PrivateBN, interpolate
from .resolutions import check_resolutions, nearest_resolution, neighbours
from .switchable import SwitchableMixin, classifiers

__all__ = ['METHODS', 'add_resolution', 'measure_statistics', 'tune']

_logger = logging.getLogger(__name__)

METHODS = ('copy', 'statistics', 'tune_bn', 'tune_bn_head')


def add_resolution(
        model: nn.Module,
        resolution: int,
        loader: Optional[Iterable] = None,
        method: str = 'tune_bn',
        epochs: int = 2,
        lr: float = 1e-3,
        min_images: int = 64,
        test_loader: Optional[Iterable] = None,
) -> nn.Module:
    """Give a switchable network a resolution that it was not trained at, in place.

    The new BN layers start from those of the two neighbouring resolutions, interpolated by area, or from the nearest
    one outside of the trained range. What happens then depends on the method:

    - 'copy': nothing; no images are needed;
    - 'statistics': running mean and variance are re-estimated on the images (as in fvcore's precise BN);
    - 'tune_bn': the network at its largest resolution teaches the new one without labels, by the KL divergence of the
      answers, label by label if there are several per image; only the affine parameters of the new BN layers learn, and
      the running statistics stay: those of the new size's images ruin some networks (EfficientNet and MobileNet of
      TensorFlow);
    - 'tune_bn_head': the classifier learns too. It is shared, so the other resolutions change: only for a network that
      serves nothing but the new resolution.

    On images like those of use, 'tune_bn' gains most where the new size is far below the trained ones; unrelated
    images can make it worse (docs/train.md). The log reports the divergence of every epoch.

    The ensemble weights become a longer parameter. An optimizer made before has neither it nor the new BN layers.

    Args:
        model: A switchable network.
        resolution: Input size in pixels.
        loader: Gives batches of normalized images [N, C, H, W], or tuples that begin with these, as often as it is
            iterated over, at the largest of all resolutions including the new one. They are downscaled here, as if
            the originals had been resized once, by the interpolation of the network's configuration.
        method: One of these.
        epochs: Passes over the loader while tuning.
        lr: Learning rate of tuning, AdamW with a cosine schedule.
        min_images: Fewer images than this are refused.
        test_loader: Gives batches (images, labels), the images as those of loader; the log then reports the accuracy at
            the new size before and after, or with several labels per image, as vectors of 0 and 1, the mean average
            precision.

    Returns:
        The same network, with the new resolution among its resolutions.

    Raises:
        ValueError: The network is plain or has this resolution, the method is unknown, or images are too few, too
            small or given only once. Whatever is raised, the network is then as it was before.

    Example:
        >>> import timm, timm_rs
        >>> model = timm.create_model('rs_resnet18', resolutions=(64, 32))
        >>> loader = [torch.rand(32, 3, 64, 64), torch.rand(32, 3, 64, 64)]
        >>> timm_rs.add_resolution(model, 48, loader).resolutions
        (64, 48, 32)
    """
    if not isinstance(model, SwitchableMixin):
        raise UserError(f'{type(model).__name__} is a plain network, expected a switchable one (make_switchable).')
    if method not in METHODS:
        raise UserError(f'Unknown method {method!r}, expected one of {", ".join(METHODS)}.')
    (resolution,) = check_resolutions((resolution,))
    if resolution in model.resolutions:
        raise UserError(f'Cannot add resolution {resolution!r} to {model.resolutions}, expected a new size in pixels.')
    if method == 'tune_bn_head' and not hasattr(model, 'get_classifier'):
        raise UserError(f'{type(model).__name__} has no classifier to teach (get_classifier), take method tune_bn.')
    check_argument('epochs', epochs, integer(1, 10 ** 6))
    check_argument('lr', lr, number(0, above=True))
    if method != 'copy':
        _check_images(loader, max(resolution, model.resolutions[0]), min_images)

    with _restored(model, method == 'tune_bn_head'):
        _insert(model, resolution)
        model.eval()
        before = None if test_loader is None else _score(model, resolution, test_loader)
        if method == 'statistics':
            measure_statistics(model, resolution, loader)
        if method.startswith('tune'):
            tune(model, resolution, loader, head=method == 'tune_bn_head', epochs=epochs, lr=lr)
        if before is not None:
            after = _score(model, resolution, test_loader)
            name = METRICS[_evaluator(model).default_metric]
            _logger.info(f'{name} at {resolution} px: {before:.2f} before, {after:.2f} after.')
    return model


def _has_several_labels(model: nn.Module) -> bool:
    return getattr(model, 'multilabel_threshold', None) is not None


def _evaluator(model: nn.Module) -> ClassificationEvaluator:
    return create_evaluator('multilabel' if _has_several_labels(model) else 'classification', model.alpha.device)


@torch.no_grad()
def _score(model: nn.Module, resolution: int, loader: Iterable) -> float:
    """Return the top-1 accuracy, or the mean average precision with several labels per image, in percent."""
    evaluator = _evaluator(model)
    for images, target in loader:
        (images,) = next(_batches(model, [images], resolution))
        target = target.to(images.device)
        counted = (target if target.ndim == 1 else target[:, 0]) != UNREADABLE
        evaluator.update(model(images)[counted].float(), target[counted])
    return evaluator.compute()[evaluator.default_metric]


@contextmanager
def _restored(model: nn.Module, head: bool) -> Iterator[None]:
    """Restore mode and size of a network at the end, and its layers and classifier if anything is raised."""
    modes = {m: m.training for m in model.modules()}
    layers = {m: m._modules for m in modes if isinstance(m, PrivateBN)}
    resolution, resolutions, alpha = model.resolution, model.resolutions, model.alpha
    args = dict(getattr(model, '_model_args', {}))
    classifier = copy.deepcopy(classifiers(model).state_dict()) if head else None
    try:
        yield
    except BaseException:
        for module, kept in layers.items():
            module._modules = kept
        model.alpha = alpha
        model._switch.resolutions = resolutions
        if args:
            model._model_args = args
        if head:
            classifiers(model).load_state_dict(classifier)
        raise
    finally:
        for module in model.modules():
            module.training = modes.get(module, model.training)
        model.switch_to(resolution)


@torch.no_grad()
def measure_statistics(model: nn.Module, resolution: int, loader: Iterable) -> None:
    """Set the running mean and variance of one resolution to those of all activations over the loader.

    Each layer sees activations that were normalized by the statistics of their batch, as in training. Mean and
    unbiased variance are then taken over all batches at once, not averaged over batches.

    Args:
        model: A switchable network in eval mode.
        resolution: Input size in pixels.
        loader: See add_resolution.
    """
    sums: Dict[nn.Module, List[torch.Tensor]] = {}

    def add(layer: nn.Module, inputs: Any) -> None:
        x = inputs[0].cpu() if inputs[0].device.type == 'mps' else inputs[0]  # MPS has no float64
        x = x.double()
        dims = [d for d in range(x.ndim) if d != 1]
        batch = [x.sum(dims), x.square().sum(dims), torch.tensor(float(x.numel() // x.shape[1]), device=x.device)]
        sums[layer] = [a + b for a, b in zip(sums.get(layer, (0., 0., 0.)), batch)]
        _set_statistics(layer, *batch)

    hooks = [layer.register_forward_pre_hook(add) for layer in _layers(model, resolution)]
    try:
        for (images,) in _batches(model, loader, resolution):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, values in sums.items():
        _set_statistics(layer, *values)


@torch.enable_grad()
def tune(
        model: nn.Module,
        resolution: int,
        loader: Iterable,
        head: bool = False,
        epochs: int = 2,
        lr: float = 1e-3,
) -> None:
    """Teach the affine parameters of one resolution's BN from the network at its largest one, without labels.

    The network is in eval mode, and its BN layers stay in it while they learn. See add_resolution for the arguments;
    with `head` the shared classifier learns too.
    """
    parameters = [p for layer in _layers(model, resolution) for p in layer.parameters()]
    teacher = max(r for r in model.resolutions if r != resolution)
    teaching = model.at(teacher)
    if head:
        teaching = copy.deepcopy(teaching)  # the teacher must not change
        parameters += classifiers(model).parameters()
    if not parameters:
        raise UserError(f'{type(model).__name__} has only frozen BN parameters, none to teach.')
    frozen = [p for p in parameters if not p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.)
    steps = epochs * (len(loader) if hasattr(loader, '__len__') else sum(1 for _ in loader))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for epoch in range(epochs):
            losses = []
            bar = tqdm(_batches(model, loader, teacher, resolution), f'Tune {resolution}', steps // epochs, leave=False,
                       disable=None)
            for larger, images in bar:
                with torch.no_grad():
                    target = teaching(larger)
                logits = model(images)
                if not isinstance(logits, torch.Tensor):
                    name = type(model).__name__
                    raise UserError(f'{name} returns a {type(logits).__name__}, expected logits to teach.')
                if _has_several_labels(model):  # both answers to each of them
                    target, log_p = (F.logsigmoid(torch.stack([z, -z], -1).float()) for z in (target, logits))
                else:
                    target, log_p = (F.log_softmax(z.float(), dim=-1) for z in (target, logits))
                loss = F.kl_div(log_p, target, reduction='batchmean', log_target=True)
                if not loss.isfinite():
                    raise UserError(f'The loss at {resolution} px is not finite, expected a smaller lr than {lr:g}.')
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                    parameter.grad = gradient  # only of these, whatever gradients the others hold
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(kl=f'{losses[-1]:.4f}')
            _logger.info(f'Tuned {resolution} px, epoch {epoch + 1} of {epochs}: KL divergence from the answers at '
                         f'{teacher} px {sum(losses) / len(losses):.4f} on average.')
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _set_statistics(layer: nn.Module, total: torch.Tensor, squares: torch.Tensor, count: torch.Tensor) -> None:
    """Set mean and unbiased variance from the sums of values and of their squares per channel, and their number."""
    mean = total / count
    layer.running_mean.copy_(mean)
    layer.running_var.copy_((squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1))


def _layers(model: nn.Module, resolution: int) -> List[nn.Module]:
    """Return the BN layers of a resolution that keep statistics."""
    layers = [m[resolution] for m in model.modules() if isinstance(m, PrivateBN)]
    return [layer for layer in layers if getattr(layer, 'track_running_stats', False)]  # not those that timm froze


def _check_images(loader: Optional[Iterable], size: int, min_images: int) -> None:
    if loader is None:
        raise UserError('Calibration needs a loader of images, except for method copy.')
    if iter(loader) is loader:
        raise UserError(f'The loader is an iterator ({type(loader).__name__}), which gives its images only once; '
                        'expected a list or a DataLoader.')
    count = 0
    for batch in loader:
        images = _images_of(batch)
        if tuple(images.shape[-2:]) != (size, size):
            got = f'{images.shape[-2]}x{images.shape[-1]}'
            raise UserError(f'The loader gives images of {got}, expected {size}x{size}.')
        count += len(images)
        if count >= min_images:
            return
    raise UserError(f'The loader gives {count} images, expected at least {min_images}.')


def _images_of(batch: Any) -> torch.Tensor:
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        kind = type(images).__name__
        got = f'tensors of {images.ndim} dimensions' if isinstance(images, torch.Tensor) else kind
        raise UserError(f'The loader gives {got}, expected batches [N, C, H, W], or tuples that begin with these.')
    return images


def _insert(model: nn.Module, resolution: int) -> None:
    """Insert BN layers interpolated between those of the neighbouring resolutions."""
    known = model.resolutions
    nearest = nearest_resolution(resolution, resolution, known)
    below, above, share = neighbours(resolution, resolution, known)
    resolutions = tuple(sorted((*known, resolution), reverse=True))
    for module in model.modules():
        if isinstance(module, PrivateBN):
            layer = copy.deepcopy(module[nearest])
            layer.load_state_dict(interpolate(module[below], module[above], share).state_dict())
            layers = {**module._modules, str(resolution): layer}
            module._modules = type(module._modules)((str(r), layers[str(r)]) for r in resolutions)
    index = known.index(nearest)
    values = dict(zip(known, model.alpha.data))
    alpha = torch.stack([values.get(r, model.alpha.data[index]) for r in resolutions])
    model.alpha = nn.Parameter(alpha, requires_grad=model.alpha.requires_grad)
    model._switch.resolutions = resolutions
    if hasattr(model, '_model_args'):
        model._model_args['resolutions'] = resolutions


def _batches(model: nn.Module, loader: Iterable, *sizes: int) -> Iterator[List[torch.Tensor]]:
    """Yield the images on the network's device at each size, as sharp as those of evaluation."""
    interpolation = (getattr(model, 'pretrained_cfg', None) or {}).get('interpolation')
    interpolation = interpolation if interpolation in INTERPOLATIONS else INTERPOLATIONS[0]
    for batch in loader:
        images = _images_of(batch)
        if not images.isfinite().all():
            raise UserError('The loader gives images with values that are NaN or infinite.')
        images = images.to(device=model.alpha.device, dtype=model.alpha.dtype)
        yield [downscale(images, size, interpolation) for size in sizes]
