"""int8: one copy of the weight codes for all sizes

With a scale per output channel, a BatchNorm after a convolution changes that scale and the bias, but not the codes of
the weights. So the sizes share the codes, and each has its own rows of scales and biases. Zero points are shared.
Weights have 7 bits: without VNNI, ONNX Runtime adds two products of a code of 8 bits and a weight in 16 bits, where
products with weights of 8 bits saturate (docs/deploy.md).
Activations are uint8; their ranges are measured at every size on real images. Operators without an integer form in ONNX
Runtime, such as SiLU or attention, stay in float32 between conversions.
"""
import copy
from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnx
from onnx import helper

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.ort import open_onnx

from .merge import SizedGraph, build

__all__ = ['Int8Error', 'measure_ranges', 'to_int8']

MICROSOFT = 'com.microsoft'
_SAME_RANGE = ('MaxPool', 'Flatten', 'Reshape', 'Transpose', 'Squeeze', 'Unsqueeze')  # pass codes on unchanged
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
        for batch in batches[resolution]:
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


def to_int8(graph: SizedGraph, ranges: Ranges) -> SizedGraph:
    """Return the int8 form of a graph.

    Args:
        graph: Graph in float32, its BatchNorms reduced to scale and bias.
        ranges: Least and greatest value of each activation at each size.

    Raises:
        Int8Error: It has no convolution.
    """
    if not any(node.op_type == 'Conv' for node in graph.nodes):
        raise Int8Error('it has no convolution.')
    return _Quantizer(graph, ranges).run()


class _Quantizer:
    """Walks a graph; each activation exists as float32, as codes, or as both if both are needed."""

    def __init__(self, graph: SizedGraph, ranges: Ranges):
        self.graph, self.ranges = copy.deepcopy(graph), ranges
        self.constants = dict(graph.constants)
        self.nodes: List[onnx.NodeProto] = []
        self.codes: Dict[str, str] = {}  # name of an activation -> name of its codes
        self.floats = {'images'}
        self.grid: Dict[str, Tuple[str, str]] = {}  # name of codes -> names of their scale and zero point
        self.readers: Dict[str, List[onnx.NodeProto]] = {}
        for node in self.graph.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {o.name for o in graph.template.graph.output}
        self.done = set()  # nodes that an earlier one has taken in

    def run(self) -> SizedGraph:
        rules = dict.fromkeys(_SAME_RANGE, self._hand_on)
        rules.update(Add=self._add, Conv=self._conv, Gemm=self._gemm, GlobalAveragePool=self._global_average_pool,
                     Pad=self._pad)
        for node in self.graph.nodes:
            if id(node) in self.done:
                continue
            rule = rules.get(node.op_type)
            if rule is None or not rule(node):
                self._leave(node)
        for name in self.outputs:
            self._float(name)
        template = onnx.ModelProto()
        template.CopyFrom(self.graph.template)
        if MICROSOFT not in [o.domain for o in template.opset_import]:
            template.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        return SizedGraph(self.graph.resolutions, self.nodes, self.constants, template)

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

        x = self._code(node.input[0])
        x_scale, x_zero = self.grid[x]
        negative = np.all([s <= 0 for s in scale], axis=0)  # at every size: then it is the weights that are negative
        weight = np.where(negative[:, None, None, None], -weight, weight)
        scale = [np.where(negative, -s, s) for s in scale]
        step = np.abs(weight).reshape(len(weight), -1).max(1) / _MOST
        step = np.where(step > 0, step, 1.).astype(np.float32)
        codes = np.clip(np.rint(weight / step[:, None, None, None]), -_MOST, _MOST).astype(np.int8)
        steps, biases = [], []
        for s, b, xs in zip(scale, shift, self.constants[x_scale]):
            size = np.maximum(np.abs(s * step), np.abs(b) / (xs * _BIAS_LIMIT))  # a scale may be 0
            size = np.where(size > 0, size, 1e-20)
            steps.append((np.where(s < 0, -size, size)).astype(np.float32))
            biases.append(np.rint(b / (steps[-1].astype(np.float64) * xs)).astype(np.int32))
        self._make(
            'QLinearConv',
            [x, x_scale, x_zero, self._constant(f'{node.input[1]}.codes', codes),
             self._sized(f'{output}.weight_scale', steps), self._constant(f'{node.input[1]}.zero', np.int8(0)),
             *self._new_grid(output), self._sized(f'{output}.bias', biases)],
            output, attributes=node.attribute)
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
        if any(x in self.constants for x in node.input) or not any(x in self.codes for x in node.input):
            return False
        a, b = (self._code(x) for x in node.input)
        output = self._with_activation(node)
        self._make('QLinearAdd', [a, *self.grid[a], b, *self.grid[b], *self._new_grid(output)], output, MICROSOFT)
        return True

    def _global_average_pool(self, node: onnx.NodeProto) -> bool:
        if node.input[0] not in self.codes:
            return False
        x = self._code(node.input[0])
        output = node.output[0]
        self._make('QLinearGlobalAveragePool', [x, *self.grid[x], *self._new_grid(output)], output, MICROSOFT,
                   channels_last=0)
        return True

    def _gemm(self, node: onnx.NodeProto) -> bool:
        """A classifier: its logits stay float32."""
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weights = self.constants.get(node.input[1])
        usual = given.get('transB') == 1 and not given.get('transA') and given.get('alpha', 1.) == 1.
        if weights is None or not usual or given.get('beta', 1.) != 1. or len(node.input) < 3 or any(
                not np.array_equal(w, weights[0]) for w in weights[1:]):
            return False
        x = self._code(node.input[0])
        x_scale, x_zero = self.grid[x]
        weight, bias = weights[0], self.constants[node.input[2]]
        step = np.maximum(np.abs(weight).max(1), 1e-20).astype(np.float32) / _MOST
        codes = np.clip(np.rint(weight / step[:, None]), -_MOST, _MOST).astype(np.int8)
        biases = [np.rint(np.clip(b / (step.astype(np.float64) * xs), -_BIAS_LIMIT, _BIAS_LIMIT)).astype(np.int32)
                  for b, xs in zip(bias, self.constants[x_scale])]
        output = node.output[0]
        self.nodes.append(helper.make_node(
            'QGemm',
            [x, x_scale, x_zero, self._constant(f'{node.input[1]}.codes', codes),
             self._constant(f'{output}.weight_scale', step),
             self._constant(f'{node.input[1]}.zero', np.zeros(len(step), np.int8)),
             self._sized(f'{output}.bias', biases)],
            [output], f'{output}.quantized', domain=MICROSOFT, transB=1))
        self.floats.add(output)
        return True

    def _hand_on(self, node: onnx.NodeProto) -> bool:
        if node.input[0] not in self.codes:
            return False
        x = self.codes[node.input[0]]
        of_codes = onnx.NodeProto()
        of_codes.CopyFrom(node)
        of_codes.input[0] = x
        of_codes.output[0] = f'{node.output[0]}.codes'
        self.nodes.append(of_codes)
        self.codes[node.output[0]] = of_codes.output[0]
        self.grid[of_codes.output[0]] = self.grid[x]
        return True

    def _leave(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in self.codes:
                self._float(name)
        self.nodes.append(node)
        self.floats.update(node.output)

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
        """Return the output of a node, or of a ReLU or ReLU6 after it, which clipped codes replace."""
        follower = self._only_reader(node)
        if follower is not None and (follower.op_type == 'Relu' or self._is_relu6(follower)):
            return self._take(follower).output[0]
        return node.output[0]

    def _is_relu6(self, node: onnx.NodeProto) -> bool:
        limits = [self.constants.get(x) for x in node.input[1:]]
        return node.op_type == 'Clip' and None not in limits and [float(v[0]) for v in limits] == [0., 6.]

    def _code(self, name: str) -> str:
        """Return the codes of an activation."""
        if name not in self.codes:
            self._make('QuantizeLinear', [name, *self._new_grid(name)], name)
        return self.codes[name]

    def _float(self, name: str) -> None:
        """Return the name of an activation as float32."""
        if name not in self.floats:
            codes = self.codes[name]
            self.nodes.append(helper.make_node(
                'DequantizeLinear', [codes, *self.grid[codes]], [name], f'{name}.dequantize'))
            self.floats.add(name)

    def _new_grid(self, name: str) -> Tuple[str, str]:
        """Return the names of scale and zero point of an activation: the zero point of all sizes, a scale for each."""
        ranges = np.array(self.ranges[name])
        low, high = ranges.min(0)[0], ranges.max(0)[1]
        zero = int(np.clip(np.rint(-low / max(high - low, 1e-12) * 255), 0, 255))
        scales = []
        for low, high in ranges:
            above = high / (255 - zero) if zero < 255 else 0.
            below = -low / zero if zero > 0 else 0.
            scales.append(np.array(max(above, below, 1e-8), np.float32))
        return self._sized(f'{name}.scale', scales), self._constant(f'{name}.zero', np.uint8(zero))

    def _make(self, op: str, inputs: Sequence[str], output: str, domain: str = '', attributes=(), **more: Any) -> None:
        """Add an operator whose output is codes; its scale and zero point are the last inputs except a bias."""
        codes = f'{output}.codes'
        node = helper.make_node(op, inputs, [codes], f'{codes}.node', domain=domain, **more)
        node.attribute.extend(attributes)
        self.nodes.append(node)
        self.codes[output] = codes
        self.grid[codes] = (f'{output}.scale', f'{output}.zero')

    def _sized(self, name: str, values: List[np.ndarray]) -> str:
        self.constants[name] = values
        return name

    def _constant(self, name: str, value: np.ndarray) -> str:
        return self._sized(name, [np.asarray(value)] * len(self.graph.resolutions))
