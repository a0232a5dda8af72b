"""One ONNX graph for all sizes

The graphs of one network at several sizes have the same nodes and the same convolution weights. What differs are
constants: the scale and bias of each BatchNorm, and shapes. Each becomes a table with a row per size, from which the
input's height and width pick. ONNX Runtime folds it all when it is told the size, see timm_rs.deploy.Session.
"""
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ['INDEX', 'MergeError', 'merge_sizes']

INDEX = 'resolution_index'  # int64 scalar: the row of the tables, 0 for the largest size


class MergeError(ValueError):
    """The graphs differ in more than constants; the message says where."""


def merge_sizes(models: Sequence[onnx.ModelProto], resolutions: Sequence[int]) -> onnx.ModelProto:
    """Return one model whose input is of any of the sizes; another size takes the row of the nearest by area.

    Args:
        models: The network at each size, exported with a fixed height and width. Input 'images' [N, C, H, W].
        resolutions: Input sizes in pixels, largest first.

    Raises:
        MergeError: The graphs differ in more than constants.
    """
    graphs = [_Graph(model) for model in models]
    constants = _Constants(resolutions)
    nodes = []
    for versions in _aligned(graphs, resolutions):
        node = onnx.NodeProto()
        node.CopyFrom(versions[0])
        for i in range(len(node.input)):
            values = [g.constants.get(v.input[i]) for g, v in zip(graphs, versions)]
            if values[0] is not None:
                node.input[i] = constants.add(versions[0].input[i], values)
        nodes.append(node)
    model = onnx.ModelProto()
    model.CopyFrom(models[0])
    model.graph.ClearField('node')
    model.graph.ClearField('initializer')
    model.graph.ClearField('value_info')
    model.graph.initializer.extend(constants.initializers.values())
    model.graph.node.extend([*constants.nodes, *nodes])
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], ('height', 'width')):
        dim.dim_param = name
    onnx.checker.check_model(model)
    return model


class _Graph:
    """Nodes without those that only hand on a constant or an alias, and the constants by name."""

    def __init__(self, model: onnx.ModelProto):
        self.constants: Dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
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


def _aligned(graphs: Sequence[_Graph], resolutions: Sequence[int]) -> Iterator[Tuple[onnx.NodeProto, ...]]:
    """Yield each node as it is at every size.

    Raises:
        MergeError: There is another operator, attribute or connection at some size.
    """
    first = graphs[0]
    for graph, resolution in zip(graphs[1:], resolutions[1:]):
        sizes = f'{resolutions[0]} and {resolution} px'
        if len(graph.nodes) != len(first.nodes):
            raise MergeError(f'The graphs at {sizes} have {len(first.nodes)} and {len(graph.nodes)} nodes.')
        renamed = {}
        for ours, theirs in zip(graph.nodes, first.nodes):
            where = f'{theirs.op_type} ({theirs.name}) at {sizes}'
            if ours.op_type != theirs.op_type or len(ours.input) != len(theirs.input):
                raise MergeError(f'The graphs at {sizes} differ: {theirs.op_type} and {ours.op_type}.')
            mine, other = ({a.name: a.SerializeToString() for a in n.attribute} for n in (ours, theirs))
            if mine != other:
                names = [k for k in {**mine, **other} if mine.get(k) != other.get(k)]
                raise MergeError(f"{where} differs in {', '.join(names)}.")
            for a, b in zip(ours.input, theirs.input):
                if (a in graph.constants) != (b in first.constants) or (
                        a not in graph.constants and renamed.get(a, a) != b):
                    raise MergeError(f'{where} has other inputs.')
            renamed.update(zip(ours.output, theirs.output))
    yield from zip(*(g.nodes for g in graphs))


class _Constants:
    """Initializers of the merged graph, each value once, and the nodes that pick a row of a table."""

    def __init__(self, resolutions: Sequence[int]):
        self.initializers: Dict[tuple, onnx.TensorProto] = {}
        self.nodes: List[onnx.NodeProto] = []
        self._picked: Dict[tuple, str] = {}
        areas = np.array([r * r for r in resolutions], np.float32)
        # ONNX Runtime folds a Shape only where all dimensions are known, which the batch is not.
        self._node('GatherND', ['images', self._initializer('first', np.zeros(2, np.int64))], 'images.first')
        self._node('Shape', ['images.first'], 'images.size')
        self._node('ReduceProd', ['images.size'], 'images.area', keepdims=1)
        self._node('Cast', ['images.area'], 'images.area.float', to=onnx.TensorProto.FLOAT)
        self._node('Sub', [self._initializer('resolution_areas', areas), 'images.area.float'], 'images.area.from')
        self._node('Abs', ['images.area.from'], 'images.area.distance')
        self._node('ArgMin', ['images.area.distance'], INDEX, axis=0, keepdims=0)

    def add(self, name: str, values: Sequence[np.ndarray]) -> str:
        """Return the name of a value that is values[i] at size i."""
        first = values[0]
        if all(v.shape == first.shape and np.array_equal(v, first) for v in values[1:]):
            return self._initializer(name, first)
        if all(v.shape == first.shape for v in values):
            return self._pick(name, np.stack(values))
        ends = np.cumsum([v.size for v in values])
        flat = self._initializer(f'{name}.values', np.concatenate([v.ravel() for v in values]))
        start = self._pick(f'{name}.start', (ends - [v.size for v in values])[:, None])
        end = self._pick(f'{name}.end', ends[:, None])
        shape = self._pick(f'{name}.shape', np.array([v.shape for v in values], np.int64))
        self._node('Slice', [flat, start, end], f'{name}.flat')
        return self._node('Reshape', [f'{name}.flat', shape], f'{name}.picked')

    def _pick(self, name: str, table: np.ndarray) -> str:
        table = self._initializer(f'{name}.table', table)
        if table not in self._picked:
            self._picked[table] = self._node('Gather', [table, INDEX], f'{name}.row', axis=0)
        return self._picked[table]

    def _initializer(self, name: str, value: np.ndarray) -> str:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.initializers:
            self.initializers[key] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return self.initializers[key].name

    def _node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Optional[int]) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], f'{output}.node', **attributes))
        return output
