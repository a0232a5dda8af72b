"""Random resized crops of a whole batch at once, on any device"""
from typing import Sequence

import torch

__all__ = ['crop', 'random_boxes']


def random_boxes(
        numbers: torch.Tensor,
        aspects: torch.Tensor,
        scale: Sequence[float] = (0.08, 1.),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
) -> torch.Tensor:
    """Return random resized crops and flips, chosen by random numbers.

    As in torchvision's RandomResizedCrop, the area of a box is uniform and its aspect ratio log-uniform. A box that
    would be higher or wider than the image is cut to it instead of drawn again.

    Args:
        numbers: Uniform in [0, 1) [N, 5].
        aspects: Width over height of the images [N].
        scale: Range of the share of the area.
        ratio: Range of width over height.
        hflip: Probability of a horizontal flip.

    Returns:
        Top, height, left and width as shares of the image, and 1 to flip or 0 [5, N].

    Example:
        >>> random_boxes(torch.tensor([[0.5, 0.5, 0.5, 0., 0.9]]), torch.ones(1), scale=(0.25, 0.25))[:, 0]
        tensor([0.2500, 0.5000, 0.0000, 0.5000, 0.0000])
    """
    area = scale[0] + (scale[1] - scale[0]) * numbers[:, 0]
    low, high = torch.tensor(ratio).log().tolist()
    relative = (low + (high - low) * numbers[:, 1]).exp() / aspects
    height, width = ((area * r).sqrt().clamp(max=1) for r in (1 / relative, relative))
    top, left = numbers[:, 2] * (1 - height), numbers[:, 3] * (1 - width)
    return torch.stack([top, height, left, width, (numbers[:, 4] < hflip).float()])


def crop(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Crop, resize and flip a batch on its device.

    The resize is antialiased bilinear interpolation of the crop, written as a product with one matrix per side and
    image, so that a whole batch with its different boxes is two batched matrix products.

    Args:
        images: Squares [N, C, side, side], uint8.
        boxes: Boxes of random_boxes, on the same device [5, N].
        size: Height and width of the crops in pixels.

    Returns:
        Crops [N, C, size, size], float32, with the same range of values.
    """
    side = images.shape[-1]
    top, height, left, width, flip = boxes
    rows, columns = _resize_matrices(top, height, side, size), _resize_matrices(left, width, side, size)
    columns = torch.where(flip.view(-1, 1, 1) > 0, columns.flip(1), columns)
    return rows[:, None] @ images.float() @ columns[:, None].transpose(-1, -2)


def _resize_matrices(starts: torch.Tensor, lengths: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Return the weights [N, size, side] of antialiased bilinear interpolation of a range, given in shares of the side.

    Example:
        >>> _resize_matrices(torch.tensor([0.]), torch.tensor([1.]), 4, 2)
        tensor([[[0.4286, 0.4286, 0.1429, 0.0000],
                 [0.0000, 0.1429, 0.4286, 0.4286]]])
    """
    scale = (lengths * side / size).view(-1, 1, 1)
    centers = starts.view(-1, 1, 1) * side + (torch.arange(size, device=starts.device).view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(side, device=starts.device).view(1, 1, -1) + 0.5
    weights = (1 - (pixels - centers).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)
