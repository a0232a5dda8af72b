"""An exported network at work in ONNX Runtime, without torch"""
import os
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import numpy as np

from .errors import UserError
from .format import PREPROCESSING, parse_metadata
from .images import MODES as IMAGE_MODES
from .images import ImageError, ImageSource, is_image_source
from .preprocess import Preprocessing, stack

__all__ = ['MODES', 'Session']

MODES = ('fast', 'low_memory')


class Session:
    """Runs a file of `timm-rs export` at any of its resolutions; safe to be called from several threads.

    Args:
        path: File of `timm-rs export --format onnx`, for all sizes or for one.
        threads: Threads of an inference, all cores if None.
        mode: 'fast' holds a graph per size, each with its BatchNorms folded into its weights, at the latency of a plain
            network; 'low_memory' holds the weights once for all sizes.
        warm_up: Run each size once now, so that no request pays for it.

    Attributes:
        path: The file.
        mode: 'fast' or 'low_memory'.
        resolutions: Input sizes in pixels, largest first.
        num_classes: Number of classes.
        class_names: Names of the classes, or None.
        madds: Multiply-adds of an image, by resolution.
        preprocessing: What is done to an image; None where the channels are not those of one, so that only batches go.
        mean: Pixel mean of each channel, of values in [0, 1].
        std: Pixel standard deviation of each channel.
        batch_size: Images that are run at a time, where the file takes batches of one size only; None for any number.
        metadata: All that the file tells of itself.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: The file is no export of timm_rs, or an argument is not usable.

    Example:
        >>> session = Session('model.onnx', threads=1)    # doctest: +SKIP
        >>> session.predict('photo.jpg', resolution=160).argmax(-1)    # doctest: +SKIP
        array([207])
    """

    def __init__(
            self,
            path: Union[str, os.PathLike],
            threads: Optional[int] = None,
            mode: str = 'fast',
            warm_up: bool = True,
    ):
        if mode not in MODES:
            raise UserError(f"Unknown mode {mode!r}, expected {' or '.join(map(repr, MODES))}.")
        if threads is not None and threads < 1:
            raise UserError(f'threads is {threads}, expected a positive number.')
        self.path = os.fspath(path)
        self.mode = mode
        self.metadata = read_metadata(self.path)
        self.resolutions: Tuple[int, ...] = self.metadata['resolutions']
        self.num_classes: int = self.metadata['num_classes']
        self.class_names: Optional[Tuple[str, ...]] = self.metadata.get('class_names')
        self.madds: Dict[int, int] = self.metadata.get('madds', {})
        self.mean: Tuple[float, ...] = self.metadata['mean']
        self.std: Tuple[float, ...] = self.metadata['std']
        self.preprocessing = preprocessing_of(self.metadata) if len(self.mean) in IMAGE_MODES else None
        self._sessions = self._open(threads)
        (images,) = self._sessions[self.resolutions[0]].get_inputs()
        self._input = images.name
        self.batch_size: Optional[int] = images.shape[0] if isinstance(images.shape[0], int) else None
        if warm_up:
            self.warm_up()

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.path!r}, mode={self.mode!r}, resolutions={self.resolutions})'

    def predict(
            self,
            images: Union[ImageSource, Sequence[ImageSource], np.ndarray],
            resolution: Optional[int] = None,
    ) -> np.ndarray:
        """Return the logits of images.

        Args:
            images: An image or a list of them, each the name of a file, a binary file or a PIL image; or a batch that
                is preprocessed already, float32 [N, C, H, W].
            resolution: Input size in pixels, the largest if None, that of the batch if there is one.

        Returns:
            Array of float32 [N, num_classes].

        Raises:
            ImageError: A ValueError that names an image that cannot be used.
            ValueError: There is no such resolution, or the batch is none of float32 [N, C, H, W] of a known size.
            RuntimeError: ONNX Runtime fails, for example for lack of memory.
        """
        if not isinstance(images, np.ndarray):
            images = [images] if is_image_source(images) else list(images)
            resolution = self.check_resolution(self.resolutions[0] if resolution is None else resolution)
            if not images:
                return np.zeros((0, self.num_classes), np.float32)
            self.check_takes_images()
            images = stack(images, self.preprocessing, resolution)
        else:
            resolution = self._check_batch(images, resolution)
        if not len(images):
            return np.zeros((0, self.num_classes), np.float32)
        size = self.batch_size or len(images)
        return np.concatenate([self._run(images[i:i + size], resolution) for i in range(0, len(images), size)])

    def preprocess(self, image: ImageSource, resolution: Optional[int] = None) -> np.ndarray:
        """Return the input that predict makes of an image: float32 [C, resolution, resolution].

        Raises:
            ImageError: The image cannot be used.
            ValueError: There is no such resolution.
        """
        self.check_takes_images()
        resolution = self.resolutions[0] if resolution is None else resolution
        return self.preprocessing(image, self.check_resolution(resolution))

    def warm_up(self, rounds: int = 1) -> None:
        """Run every size with a batch of one, so that its buffers are there."""
        for resolution in self.resolutions:
            images = np.zeros((self.batch_size or 1, len(self.mean), resolution, resolution), np.float32)
            for _ in range(rounds):
                self.predict(images)

    def check_resolution(self, resolution: int) -> int:
        """Return a resolution that this network has.

        Raises:
            ValueError: It has another.
        """
        if resolution not in self.resolutions:
            known = ', '.join(map(str, self.resolutions))
            raise UserError(f'Unknown resolution {resolution!r}, {self.path} has {known}.')
        return int(resolution)

    def _run(self, images: np.ndarray, resolution: int) -> np.ndarray:
        """Return the logits of a batch, which is filled up with zeros where the file takes batches of one size only."""
        count = len(images)
        if self.batch_size and count < self.batch_size:
            images = np.concatenate([images, np.zeros((self.batch_size - count, *images.shape[1:]), images.dtype)])
        try:
            return self._sessions[resolution].run(None, {self._input: images})[0][:count]
        except Exception as e:  # ONNX Runtime has no common class of its errors
            raise RuntimeError(f'Cannot run a batch of {images.shape} with {self.path}: {_first_line(e)}') from e

    def _open(self, threads: Optional[int]) -> Dict[int, Any]:
        """Return the session of ONNX Runtime that serves each size."""
        if len(self.resolutions) == 1:
            return dict.fromkeys(self.resolutions, open_onnx(self.path, threads))
        if self.mode == 'low_memory':
            session = self._open_blocked(threads) if self.metadata.get('precision') == 'float32' else None
            return dict.fromkeys(self.resolutions, session or open_onnx(self.path, threads))
        # Told the size, ONNX Runtime folds the choice of it, the tables and then the BatchNorms.
        return {r: open_onnx(self.path, threads, dict(height=r, width=r)) for r in self.resolutions}

    def _open_blocked(self, threads: Optional[int]) -> Optional[Any]:
        """Return a session of the file's faster form, None where there is none or it does something else."""
        try:
            from .low_memory import blocked_model
        except ImportError:  # onnx is not installed
            return None
        model = blocked_model(self.path)
        if model is None:
            return None
        blocked = open_onnx(model, threads, optimize=False)
        size = self.resolutions[-1]
        images = np.random.default_rng(0).standard_normal((1, len(self.mean), size, size), np.float32)
        expected, actual = (s.run(None, {'images': images})[0] for s in (open_onnx(self.path, threads), blocked))
        return blocked if np.allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()) else None

    def check_takes_images(self) -> None:
        """Raise ImageError if the channels are not those of an image."""
        if self.preprocessing is None:
            raise ImageError(f'{self.path} takes {len(self.mean)} channels, so no images but float32 arrays of them.')

    def _check_batch(self, images: np.ndarray, resolution: Optional[int]) -> int:
        channels = len(self.mean)
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != channels:
            raise UserError(
                f'Got an array of {images.dtype} {list(images.shape)}, expected float32 [N, {channels}, H, W].')
        height, width = images.shape[2:]
        if height != width or height not in self.resolutions or resolution not in (None, height):
            expected = [resolution] if resolution is not None else self.resolutions
            expected = ', '.join(f'{r}x{r}' for r in expected)
            raise UserError(f'Got a batch of {height}x{width}, expected {expected}.')
        return height


def preprocessing_of(metadata: Dict[str, Any]) -> Preprocessing:
    """Return the preprocessing that the metadata of a file tell."""
    values = {k: metadata[k] for k in PREPROCESSING}
    return Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_metadata(path: str) -> Dict[str, Any]:
    """Return what a file of timm-rs export records of itself, see format.parse_metadata."""
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist, expected a file of timm-rs export.')
    session = open_onnx(path, threads=1, optimize=False)
    metadata = parse_metadata(session.get_modelmeta().custom_metadata_map, path)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or not outputs or len(outputs[0].shape) != 2:
        raise UserError(f'{path} is not a file of timm-rs export, expected one input of 4 axes and logits of 2.')
    channels, *sides = inputs[0].shape[1:]
    for name, found, expected in (
        ('mean', channels, [len(metadata['mean'])]),
        ('num_classes', outputs[0].shape[1], [metadata['num_classes'] or outputs[0].shape[1]]),
        *(('resolutions', side, metadata['resolutions']) for side in sides),
    ):
        if isinstance(found, int) and found not in expected:
            raise UserError(f'{path}: the graph has {found} where {name} records {expected[0]}.')
    return metadata


def open_onnx(
        model: Union[str, bytes],
        threads: Optional[int] = None,
        sizes: Optional[Dict[str, int]] = None,
        optimize: bool = True,
) -> Any:
    """Open a model with ONNX Runtime.

    Args:
        model: Name of a file, or what is in it.
        threads: Threads of an inference, all cores if None.
        sizes: What height and width will be.
        optimize: Let ONNX Runtime rewrite the graph.

    Raises:
        ValueError: It is no ONNX file.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise ImportError("timm_rs_runtime needs the package onnxruntime: pip install 'timm_rs[export]'.") from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry('session.force_spinning_stop', '1')  # another size's threads take over
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    except Exception as e:
        path = model if isinstance(model, str) else 'This'
        raise UserError(f'{path} is no ONNX file that ONNX Runtime can load: {_first_line(e)}') from e


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
