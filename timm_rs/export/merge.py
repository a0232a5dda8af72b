"""One ONNX graph for all sizes

The graphs of one network at several sizes have the same nodes and the same convolution weights. What differs are
constants: the scale and bias of each BatchNorm, and shapes. Each becomes a table with a row per size; the height and
width of the input pick the row. ONNX Runtime folds the tables if height and width are fixed, see
timm_rs_runtime.Session.
"""
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, List, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.format import INDEX
from timm_rs_runtime.ort import open_onnx

__all__ = ['MergeError', 'SizedGraph', 'build', 'merge']


class MergeError(UserError):
    """The graphs differ in more than constants; the message says where."""


@dataclass
class SizedGraph:
    """The graph of a network at several sizes.

    Attributes:
        resolutions: Input sizes in pixels, largest first.
        nodes: The operators in the order of execution.
        constants: Value of each constant at each size, by name.
        template: Model with the input 'images' [N, C, H, W], the outputs and the versions of the operators.
        picked: Names of constants that are picked by the size of the input even where all sizes have the same.
    """
    resolutions: Sequence[int]
    nodes: List[onnx.NodeProto]
    constants: Dict[str, List[np.ndarray]]
    template: onnx.ModelProto
    picked: FrozenSet[str] = frozenset()


def merge(models: Sequence[onnx.ModelProto], resolutions: Sequence[int]) -> SizedGraph:
    """Lay the graphs of a network at several sizes over each other.

    Args:
        models: The network at each size, exported with a fixed height and width.
        resolutions: Input sizes in pixels, largest first.

    Raises:
        MergeError: The graphs differ in more than constants.
    """
    graphs = [_Graph(_settle_sizes(model)) for model in models]
    for graph, resolution in zip(graphs[1:], resolutions[1:]):
        _check_alike(graphs[0], graph, f'{resolutions[0]} and {resolution} px')
    merged = SizedGraph(resolutions, [], {}, models[0])
    for versions in zip(*(g.nodes for g in graphs)):
        node = onnx.NodeProto()
        node.CopyFrom(versions[0])
        for i, name in enumerate(node.input):
            if name in graphs[0].constants:
                names = [v.input[i] for v in versions]
                # Equal values of one size share a name there, but may differ at another.
                node.input[i] = name if len(set(names)) == 1 else '|'.join(names)
                merged.constants[node.input[i]] = [g.constants[n] for g, n in zip(graphs, names)]
        merged.nodes.append(node)
    return merged


def build(graph: SizedGraph) -> onnx.ModelProto:
    """Return one model whose input may have any of the sizes; another size takes the rows of the nearest by area."""
    constants = _Constants(graph.resolutions)
    nodes = []
    for original in graph.nodes:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        for i, name in enumerate(node.input):
            if name in graph.constants:
                node.input[i] = constants.add(name, graph.constants[name], name in graph.picked)
        nodes.append(node)
    model = onnx.ModelProto()
    model.CopyFrom(graph.template)
    for field in ('node', 'initializer', 'value_info'):
        model.graph.ClearField(field)
    model.graph.node.extend([*constants.select(), *nodes])
    model.graph.initializer.extend(constants.initializers.values())
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], ('height', 'width')):
        dim.dim_param = name
    return model


def _settle_sizes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of one size in which everything computed from sizes, except that of the batch, is a constant."""
    known = {t.name for t in model.graph.initializer}
    computed = []
    for node in model.graph.node:
        if node.op_type == 'Constant' or (node.op_type == 'Identity' and node.input[0] in known):
            known.add(node.output[0])
        elif node.op_type == 'Shape' or (node.input and all(x in known for x in node.input if x)):
            known.update(node.output)
            computed += node.output
    if not computed:
        return model
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.ClearField('output')
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in computed)
    session = open_onnx(probe.SerializeToString(), optimize=False)
    _, *shape = session.get_inputs()[0].shape
    runs = [session.run(computed, {'images': np.zeros((n, *shape), np.float32)}) for n in (2, 3)]
    constants = {name: a for name, a, b in zip(computed, *runs) if a.shape == b.shape and np.array_equal(a, b)}
    nodes = [n for n in model.graph.node if not set(n.output) <= set(constants)]
    used = {name for node in nodes for name in node.input}
    settled = onnx.ModelProto()
    settled.CopyFrom(model)
    settled.graph.ClearField('node')
    settled.graph.node.extend(n for n in nodes if n.op_type != 'Shape' or n.output[0] in used)
    settled.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants.items() if name in used)
    return settled


class _Graph:
    """Nodes without those that only pass on a constant or an alias, and the constants by name."""

    def __init__(self, model: onnx.ModelProto):
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.nodes: List[onnx.NodeProto] = []
        alias: Dict[str, str] = {}
        outputs = {o.name for o in model.graph.output}
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = alias.get(name, name)
            if node.op_type == 'Constant':
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == 'Identity' and node.output[0] not in outputs:
                alias[node.output[0]] = node.input[0]
            else:
                self.nodes.append(node)


def _check_alike(first: _Graph, other: _Graph, sizes: str) -> None:
    """Raise MergeError if an operator, attribute or connection differs somewhere."""
    if len(first.nodes) != len(other.nodes):
        raise MergeError(f'the graphs at {sizes} have {len(first.nodes)} and {len(other.nodes)} operators.')
    names: Dict[str, str] = {}  # name in the other graph -> name in the first
    for a, b in zip(first.nodes, other.nodes):
        if a.op_type != b.op_type or len(a.input) != len(b.input):
            raise MergeError(f'at {sizes} the operators of {a.name} are {a.op_type} and {b.op_type}.')
        ours, theirs = ({t.name: t.SerializeToString() for t in n.attribute} for n in (a, b))
        different = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if different:
            raise MergeError(f"{a.op_type} {a.name} has another {', '.join(different)} at {sizes}.")
        for x, y in zip(a.input, b.input):
            if (x in first.constants) != (y in other.constants) or (
                    x not in first.constants and names.get(y, y) != x):
                raise MergeError(f'{a.op_type} {a.name} has another input at {sizes}.')
        names.update(zip(b.output, a.output))


class _Constants:
    """Initializers of a model, each value once, and the nodes that pick a row of a table.

    Rows of one type that are vectors lie side by side in one table: picking one costs as much as picking all.
    """

    def __init__(self, resolutions: Sequence[int]):
        self.initializers: Dict[tuple, onnx.TensorProto] = {}
        self._resolutions = resolutions
        self._nodes: List[onnx.NodeProto] = []
        self._packs: Dict[str, Dict[str, np.ndarray]] = {}
        self._picked: Dict[tuple, str] = {}

    def add(self, name: str, values: Sequence[np.ndarray], picked: bool = False) -> str:
        """Return the name of a value that is values[i] at size i; if `picked`, even where all are the same."""
        first = values[0]
        same_shape = all(v.shape == first.shape for v in values)
        if not picked and same_shape and all(np.array_equal(v, first) for v in values[1:]):
            return self._initializer(name, first)
        if same_shape:
            return self._pick(name, np.stack(values))
        ends = np.cumsum([v.size for v in values])
        flat = self._initializer(f'{name}.values', np.concatenate([v.ravel() for v in values]))
        start = self._pick(f'{name}.start', (ends - [v.size for v in values])[:, None])
        end = self._pick(f'{name}.end', ends[:, None])
        shape = self._pick(f'{name}.shape', np.array([v.shape for v in values], np.int64))
        self._node('Slice', [flat, start, end], [f'{name}.flat'])
        return self._node('Reshape', [f'{name}.flat', shape], [f'{name}.picked'])

    def select(self) -> List[onnx.NodeProto]:
        """Return the nodes that find the row and pick it from all tables.

        The row is the number of areas, halfway between two sizes, that are larger than the input's area. Only integers:
        float16 ends at 65504, less than 256 x 256, and OpenVINO 2026.4 drops an Abs of what comes from a shape. Where
        height and width are fixed but the batch is not, ONNX Runtime folds a Shape only if there is no batch dimension:
        here that of a plane, the sum of the first channel of one image, or of no image if the batch is empty.
        """
        if not self._picked:
            return []
        nodes, self._nodes = self._nodes, []
        areas = np.square(self._resolutions, dtype=np.int64)
        halfway = (areas[:-1] + areas[1:] + 1) // 2  # this area and all above it belong to the larger size
        first, end, axes = (self._initializer(f'first_plane.{k}', np.array(v, np.int64))
                            for k, v in (('start', [0, 0]), ('end', [1, 1]), ('axes', [0, 1])))
        self._node('Slice', ['images', first, end, axes], ['images.slice'])
        self._node('ReduceSum', ['images.slice', axes], ['images.plane'], keepdims=0)
        self._node('Shape', ['images.plane'], ['images.size'])
        self._node('ReduceProd', ['images.size'], ['images.area'], keepdims=1)
        self._node('Less', ['images.area', self._initializer('halfway_areas', halfway)], ['images.below'])
        self._node('Cast', ['images.below'], ['images.below.int'], to=onnx.TensorProto.INT64)
        self._node('ReduceSum', ['images.below.int'], [INDEX], keepdims=0)
        for kind, pack in self._packs.items():
            lengths = np.array([table.shape[1] for table in pack.values()], np.int64)
            table = self._initializer(f'table.{kind}', np.concatenate(list(pack.values()), axis=1))
            row = self._node('Gather', [table, INDEX], [f'row.{kind}'], axis=0)
            self._node('Split', [row, self._initializer(f'lengths.{kind}', lengths)], list(pack), axis=0)
        return self._nodes + nodes

    def _pick(self, name: str, table: np.ndarray) -> str:
        key = _key(table)
        if key not in self._picked:
            self._picked[key] = f'{name}.row'
            if table.ndim == 2:
                self._packs.setdefault(table.dtype.name, {})[f'{name}.row'] = table
            else:
                self._node('Gather', [self._initializer(f'{name}.table', table), INDEX], [f'{name}.row'], axis=0)
        return self._picked[key]

    def _initializer(self, name: str, value: np.ndarray) -> str:
        key = _key(value)
        if key not in self.initializers:
            self.initializers[key] = numpy_helper.from_array(np.asarray(value, order='C'), name)
        return self.initializers[key].name

    def _node(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op_type, inputs, outputs, f'{outputs[0]}.node', **attributes))
        return outputs[0]


def _key(value: np.ndarray) -> tuple:
    return value.dtype.str, value.shape, value.tobytes()
