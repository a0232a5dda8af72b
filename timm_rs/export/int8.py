"""int8: one copy of the weight codes for all sizes

With a scale per output channel, a BatchNorm after a convolution changes that scale and the bias, but not the codes of
the weights. So the sizes share the codes, and each has its own rows of scales and biases. Zero points are shared.
Weights have 7 bits: without VNNI, ONNX Runtime adds two products of a code of 8 bits and a weight in 16 bits, where
products with weights of 8 bits saturate (docs/deploy.md).
Activations are uint8; their ranges are measured at every size on real images.

In the format 'qdq' the operators are those of float32, between QuantizeLinear and DequantizeLinear: a runtime replaces
what it has in integers; the rest, such as SiLU or attention, is computed in float32. ONNX Runtime replaces convolutions
only if their scales are constant, which they are where height and width are fixed beforehand. In the format
'qoperator', for free sides, convolutions are QLinearConv, which few other runtimes read.
"""
import copy
from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnx
from onnx import helper
from tqdm import tqdm

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.ort import open_onnx

from .merge import SizedGraph, build

__all__ = ['Int8Error', 'measure_ranges', 'to_int8']

_SAME_GRID = ('MaxPool', 'Flatten', 'Reshape', 'Transpose', 'Squeeze', 'Unsqueeze')  # values stay on the same grid
_MOST = 64  # code of a weight: 2 x 255 x 64 < 2 ** 15
_BIAS_LIMIT = 2. ** 30  # codes of a bias, which sums of products are added to in int32

Ranges = Dict[str, List[Tuple[float, float]]]


class Int8Error(UserError):
    """A network has no int8 form; the message says why."""


def measure_ranges(graph: SizedGraph, batches: Dict[int, Sequence[np.ndarray]]) -> Ranges:
    """Return the range of each activation at each size: the mean over batches of their least and greatest values.

    Args:
        graph: Graph in float32.
        batches: Preprocessed images of every size.
    """
    names = _needed(graph)
    model = build(graph)
    known = {o.name for o in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in known | {'images'})
    session = open_onnx(model.SerializeToString())
    names = [n for n in names if n != 'images']
    ranges: Ranges = {name: [] for name in ['images', *names]}
    for resolution in graph.resolutions:
        seen = {name: [] for name in ranges}
        for batch in tqdm(batches[resolution], f'Measure ranges at {resolution} px', leave=False, disable=None):
            for name, values in zip(ranges, [batch, *session.run(names, {'images': batch})]):
                seen[name].append((values.min(), values.max()))
        for name, extremes in seen.items():
            low, high = np.mean(extremes, axis=0, dtype=np.float64)
            ranges[name].append((min(low, 0.), max(high, 0.)))
    return ranges


def _needed(graph: SizedGraph) -> List[str]:
    """Return the names of the activations whose ranges to_int8 asks for."""
    asked: Ranges = defaultdict(lambda: [(-1., 1.)] * len(graph.resolutions))
    to_int8(graph, asked)
    return list(asked)


def to_int8(graph: SizedGraph, ranges: Ranges, int8_format: str = 'qdq') -> SizedGraph:
    """Return the int8 form of a graph.

    Args:
        graph: Graph in float32, its BatchNorms reduced to scale and bias.
        ranges: Least and greatest value of each activation at each size.
        int8_format: 'qdq', or 'qoperator' for ONNX Runtime where height and width are free.

    Raises:
        Int8Error: It has no convolution.
    """
    if not any(node.op_type == 'Conv' for node in graph.nodes):
        raise Int8Error('it has no convolution.')
    return _Quantizer(graph, ranges, int8_format).run()


class _Quantizer:
    """Walks a graph and rounds activations to a grid, by QuantizeLinear and DequantizeLinear."""

    def __init__(self, graph: SizedGraph, ranges: Ranges, int8_format: str):
        self.graph, self.ranges = copy.deepcopy(graph), ranges
        self.fuse = int8_format == 'qoperator'
        self.constants = dict(graph.constants)
        self.nodes: List[onnx.NodeProto] = []
        self.rounded: Dict[str, str] = {}  # name of an activation -> its name on a grid
        self.grid: Dict[str, Tuple[str, str]] = {}  # that name -> names of the scale and the zero point
        self.readers: Dict[str, List[onnx.NodeProto]] = {}
        for node in self.graph.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {o.name for o in graph.template.graph.output}
        self.done = set()  # nodes that an earlier one has taken in
        self.picked = set()  # see SizedGraph
        self.guarded = self.fuse  # whether OpenVINO refuses free sides, see _weigh

    def run(self) -> SizedGraph:
        rules = dict.fromkeys(_SAME_GRID, self._same_grid)
        rules.update(Add=self._add, Conv=self._conv, Gemm=self._gemm, GlobalAveragePool=self._global_average_pool,
                     Pad=self._pad)
        for node in self.graph.nodes:
            if id(node) in self.done:
                continue
            rule = rules.get(node.op_type)
            if rule is None or not rule(node):
                self.nodes.append(node)
        read = self.outputs.union(*(node.input for node in self.nodes))
        nodes = [node for node in self.nodes if read & set(node.output)]  # convolutions may have taken the codes
        return SizedGraph(self.graph.resolutions, nodes, self.constants, self.graph.template, frozenset(self.picked))

    # Rules return whether they took the node.

    def _conv(self, node: onnx.NodeProto) -> bool:
        weights = self.constants.get(node.input[1])
        if weights is None or weights[0].ndim != 4 or any(w is not weights[0] and not np.array_equal(w, weights[0])
                                                          for w in weights[1:]):
            return False
        weight = weights[0]
        count = len(weights)
        shift = self.constants[node.input[2]] if len(node.input) > 2 else [np.zeros(len(weight), np.float32)] * count
        scale = [np.ones(len(weight), np.float32)] * count
        end = node
        follower = self._only_reader(end)
        if follower is not None and follower.op_type == 'BatchNormalization' and self._is_affine(follower):
            gain, bias = (self.constants[follower.input[i]] for i in (1, 2))
            shift = [b + g * s for b, g, s in zip(bias, gain, shift)]
            scale = gain
            end = self._take(follower)
        output = self._with_activation(end)
        x = self._round(node.input[0])
        x_scales = self.constants[self.grid[x][0]]
        negative = np.all([s <= 0 for s in scale], axis=0)  # at every size: then it is the weights that are negative
        weight = np.where(negative[:, None, None, None], -weight, weight)
        step = np.abs(weight).reshape(len(weight), -1).max(1) / _MOST
        step = np.where(step > 0, step, 1.).astype(np.float32)
        steps = []
        for s, b, x_scale in zip(scale, shift, x_scales):
            size = np.maximum(np.abs(s * step), np.abs(b) / (x_scale * _BIAS_LIMIT))  # a scale may be 0
            size = np.where(size > 0, size, 1e-20)
            steps.append(np.where(np.where(negative, -s, s) < 0, -size, size).astype(np.float32))
        grid = self._new_grid(output)
        integers, bias = self._integers(node.input[1], x, weight, step, steps, shift, output)
        if self.fuse:
            inputs = [f'{x}.codes', *self._picked_grid(x), *integers, *grid, bias]
            self._dequantize(self._node('QLinearConv', inputs, f'{output}.codes', node.attribute), output, grid)
        else:
            self._weigh(node, x, integers, bias, f'{output}.unrounded')
            self._quantize(f'{output}.unrounded', output, grid)
        return True

    def _pad(self, node: onnx.NodeProto) -> bool:
        """Zeros around an image: left to the convolution after it."""
        follower = self._only_reader(node)
        pads = self.constants.get(node.input[1])
        fill = [v for name in node.input[2:3] if name for v in self.constants.get(name, [1.])]
        constant = all(a.name != 'mode' or a.s == b'constant' for a in node.attribute)
        if follower is None or follower.op_type != 'Conv' or node.input[3:] or not constant or any(fill) or (
                pads is None or len(pads[0]) != 8 or any(not np.array_equal(p, pads[0]) for p in pads)
                or pads[0][[0, 1, 4, 5]].any() or pads[0].min() < 0):
            return False
        for attribute in follower.attribute:
            if attribute.name == 'pads':
                sums = [a + b for a, b in zip(attribute.ints, pads[0][[2, 3, 6, 7]].tolist())]
                del attribute.ints[:]
                attribute.ints.extend(sums)
                follower.input[0] = node.input[0]
                return True
        return False

    def _add(self, node: onnx.NodeProto) -> bool:
        if any(x in self.constants for x in node.input) or not any(x in self.rounded for x in node.input):
            return False
        inputs = [self._round(x) for x in node.input]
        output = self._with_activation(node)
        self._operator(node, inputs, output, self._new_grid(output))
        return True

    def _global_average_pool(self, node: onnx.NodeProto) -> bool:
        if node.input[0] not in self.rounded:
            return False
        self._operator(node, [self._round(node.input[0])], node.output[0], self._new_grid(node.output[0]))
        return True

    def _same_grid(self, node: onnx.NodeProto) -> bool:
        if node.input[0] not in self.rounded:
            return False
        x = self._round(node.input[0])
        output, more = node.output[0], node.input[1:]
        if self.fuse:
            codes = self._node(node.op_type, [f'{x}.codes', *more], f'{output}.codes', node.attribute)
            self._dequantize(codes, output, self.grid[x])
        else:
            self._operator(node, [x, *more], output, self.grid[x])
        return True

    def _gemm(self, node: onnx.NodeProto) -> bool:
        """A classifier: its logits stay float32."""
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weights = self.constants.get(node.input[1])
        usual = given.get('transB') == 1 and not given.get('transA') and given.get('alpha', 1.) == 1.
        if weights is None or not usual or given.get('beta', 1.) != 1. or len(node.input) < 3 or any(
                not np.array_equal(w, weights[0]) for w in weights[1:]):
            return False
        step = np.maximum(np.abs(weights[0]).max(1), 1e-20).astype(np.float32) / _MOST
        x, output = self._round(node.input[0]), node.output[0]
        self._weigh(node, x, *self._integers(
            node.input[1], x, weights[0], step, [step] * len(weights), self.constants[node.input[2]], output), output)
        return True

    # What the rules are made of

    def _only_reader(self, node: onnx.NodeProto) -> Optional[onnx.NodeProto]:
        readers = self.readers.get(node.output[0], [])
        return readers[0] if len(readers) == 1 and node.output[0] not in self.outputs else None

    def _take(self, node: onnx.NodeProto) -> onnx.NodeProto:
        self.done.add(id(node))
        return node

    def _is_affine(self, bn: onnx.NodeProto) -> bool:
        """Return whether a BatchNorm has mean 0, variance 1 and epsilon 0, see reduce_batch_norms."""
        epsilon = [a.f for a in bn.attribute if a.name == 'epsilon']
        mean, var = (self.constants[bn.input[i]] for i in (3, 4))
        return epsilon == [0.] and not np.any(mean) and np.all(np.equal(var, 1))

    def _with_activation(self, node: onnx.NodeProto) -> str:
        """Return the output of a node, or of a ReLU or ReLU6 after it, which the ends of the grid replace."""
        follower = self._only_reader(node)
        if follower is not None and (follower.op_type == 'Relu' or self._is_relu6(follower)):
            return self._take(follower).output[0]
        return node.output[0]

    def _is_relu6(self, node: onnx.NodeProto) -> bool:
        limits = [self.constants.get(x) for x in node.input[1:]]
        return node.op_type == 'Clip' and None not in limits and [float(v[0]) for v in limits] == [0., 6.]

    def _integers(
            self,
            name: str,
            x: str,
            weight: np.ndarray,
            step: np.ndarray,
            steps: Sequence[np.ndarray],
            shift: Sequence[np.ndarray],
            output: str,
    ) -> Tuple[Tuple[str, str, str], str]:
        """Return the names of codes, scales and zero points of weights, and of the codes of the bias.

        Args:
            name: Of the weights.
            x: The input on a grid.
            weight: Float weights, output channels first.
            step: Value of a unit of the codes, per output channel.
            steps: The same at each size, with the scale of a BatchNorm.
            shift: Float bias at each size.
            output: Name of the output.
        """
        codes = np.clip(np.rint(weight / step.reshape(-1, *[1] * (weight.ndim - 1))), -_MOST, _MOST).astype(np.int8)
        biases = [
            np.rint(np.clip(b / (s.astype(np.float64) * x_scale), -_BIAS_LIMIT, _BIAS_LIMIT)).astype(np.int32)
            for b, s, x_scale in zip(shift, steps, self.constants[self.grid[x][0]])]
        zero = self._constant(f'{name}.zero', np.zeros(len(codes), np.int8))
        return (
            (self._constant(f'{name}.codes', codes), self._sized(f'{output}.weight_scale', steps), zero),
            self._sized(f'{output}.bias_codes', biases),
        )

    def _weigh(
            self,
            node: onnx.NodeProto,
            x: str,
            integers: Sequence[str],
            bias: str,
            output: str,
    ) -> None:
        """Add a convolution or classifier with integers as weights, see _integers.

        With free sides OpenVINO 2026.4 would keep the weights of the first size for all. It refuses weights whose shape
        depends on the input: the first ones have such a shape until the sides are fixed.
        """
        codes, scale, zero = integers
        if not self.guarded:
            self.guarded = True
            shape = self._pick(f'{codes}.shape', [np.array(c.shape) for c in self.constants[codes]])
            codes = self._node('Reshape', [codes, shape], f'{codes}.shaped')
        weight = self._node('DequantizeLinear', [codes, scale, zero], f'{output}.weight', axis=0)
        bias_scale = self._node('Mul', [scale, self.grid[x][0]], f'{output}.bias_scale')
        shift = self._node('DequantizeLinear', [bias, bias_scale], f'{output}.bias', axis=0)
        self._node(node.op_type, [x, weight, shift], output, node.attribute)

    def _operator(self, node: onnx.NodeProto, inputs: Sequence[str], output: str, grid: Tuple[str, str]) -> None:
        """Add an operator, its output on a grid."""
        self._quantize(self._node(node.op_type, inputs, f'{output}.unrounded', node.attribute), output, grid)

    def _round(self, name: str) -> str:
        """Return the name of an activation on a grid."""
        if name not in self.rounded:
            self._quantize(name, f'{name}.rounded', self._new_grid(name))
            self.rounded[name] = f'{name}.rounded'
        return self.rounded[name]

    def _quantize(self, name: str, output: str, grid: Tuple[str, str]) -> None:
        """Round an activation to a grid."""
        self._dequantize(self._node('QuantizeLinear', [name, *grid], f'{output}.codes'), output, grid)

    def _dequantize(self, codes: str, output: str, grid: Tuple[str, str]) -> None:
        self.rounded[output] = output
        self.grid[output] = grid
        self._node('DequantizeLinear', [codes, *self._picked_grid(output)], output)

    def _picked_grid(self, name: str) -> Tuple[str, str]:
        """Return the names of scale and zero point of codes that are read.

        With a constant zero point ONNX Runtime 1.26 and older leave out a bias that is not constant.
        """
        scale, zero = self.grid[name]
        return scale, self._pick(f'{zero}.picked', self.constants[zero])

    def _pick(self, name: str, values: List[np.ndarray]) -> str:
        self.picked.add(name)
        return self._sized(name, values)

    def _new_grid(self, name: str) -> Tuple[str, str]:
        """Return the names of scale and zero point of an activation: the zero point of all sizes, a scale for each.

        Images have one scale. With a scale per size OpenVINO 2026.4 computes 14 of the 15 layers of
        rs_resnet10t.imagenette in float32; in a MobileNetV2 it makes no difference.
        """
        ranges = np.array(self.ranges[name])
        low, high = ranges.min(0)[0], ranges.max(0)[1]
        if name == 'images':
            ranges[:] = low, high
        zero = int(np.clip(np.rint(-low / max(high - low, 1e-12) * 255), 0, 255))
        scales = []
        for low, high in ranges:
            above = high / (255 - zero) if zero < 255 else 0.
            below = -low / zero if zero > 0 else 0.
            scales.append(np.array(max(above, below, 1e-8), np.float32))
        return self._sized(f'{name}.scale', scales), self._constant(f'{name}.zero', np.uint8(zero))

    def _node(self, op: str, inputs: Sequence[str], output: str, attributes=(), **more: Any) -> str:
        node = helper.make_node(op, inputs, [output], f'{output}.node', **more)
        node.attribute.extend(attributes)
        self.nodes.append(node)
        return output

    def _sized(self, name: str, values: List[np.ndarray]) -> str:
        self.constants[name] = values
        return name

    def _constant(self, name: str, value: np.ndarray) -> str:
        return self._sized(name, [np.asarray(value)] * len(self.graph.resolutions))
