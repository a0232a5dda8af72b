"""A cheaper form of the file for all sizes, with the weights in memory once

A BatchNorm with tables is an operator between convolutions that ONNX Runtime cannot run on its blocked channels: it
would convert to plain ones and back. A depthwise convolution of 1x1 does the same and stays blocked, along with the
ReLU or the sum behind it. ONNX Runtime blocks constant weights only. So it is given stand-ins, which the rows of the
tables replace in the graph that it makes.
"""
import os
import tempfile
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from .merge import INDEX

__all__ = ['blocked_model']

_BLOCKED = 'com.microsoft.nchwc'
_FIRST_MARK = 2. ** 22  # exact in float32, and so are a million whole numbers after it


def blocked_model(path: str) -> Optional[bytes]:
    """Return an ONNX model for this machine, to be run as it is; None if ONNX Runtime does not block channels here.

    Args:
        path: File of export_switchable.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    rows = _rows(model)
    marks: Dict[float, np.ndarray] = {}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def stand_in(name: str, shape: Tuple[int, ...]) -> str:
        mark = _FIRST_MARK + len(marks)
        marks[mark] = rows[name].reshape(len(rows[name]), *shape)
        model.graph.initializer.append(numpy_helper.from_array(np.full(shape, mark, np.float32), f'mark{len(marks)}'))
        return f'mark{len(marks)}'

    nodes = []
    for node in model.graph.node:
        before = made_by.get(node.input[0]) if node.op_type == 'BatchNormalization' else None
        if before is not None and before.op_type == 'Conv' and all(x in rows for x in node.input[1:3]):
            channels = rows[node.input[1]].shape[1]
            scale, bias = stand_in(node.input[1], (channels, 1, 1, 1)), stand_in(node.input[2], (channels,))
            node = helper.make_node('Conv', [node.input[0], scale, bias], node.output, node.name, group=channels)
        nodes.append(node)
    model.graph.ClearField('node')
    model.graph.node.extend(nodes)
    # An output, or it would be taken for superfluous.
    model.graph.output.append(helper.make_tensor_value_info(INDEX, onnx.TensorProto.INT64, []))
    optimized = _optimize(model.SerializeToString())
    if not marks or not any(n.domain == _BLOCKED for n in optimized.graph.node):
        return None
    return _fill_in(optimized, marks)


def _rows(model: Any) -> Dict[str, np.ndarray]:
    """Return the table [S, C] behind each row of float32 that the graph picks."""
    from onnx import numpy_helper

    initializers = {t.name: t for t in model.graph.initializer}
    picks = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == 'Gather' and n.input[1] == INDEX}
    rows = {}
    for node in model.graph.node:
        if node.op_type == 'Split' and node.input[0] in picks:
            table = numpy_helper.to_array(initializers[picks[node.input[0]]])
            lengths = numpy_helper.to_array(initializers[node.input[1]])
            if table.dtype == np.float32:
                rows.update(zip(node.output, np.split(table, np.cumsum(lengths)[:-1], axis=1)))
    return rows


def _optimize(model: bytes) -> Any:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, 'optimized.onnx')
        onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
        return onnx.load(options.optimized_model_filepath)


def _fill_in(model: Any, marks: Dict[float, np.ndarray]) -> Optional[bytes]:
    """Put the rows in the place of their stand-ins, whose channels ONNX Runtime may have filled up with zeros."""
    from onnx import helper, numpy_helper

    tables: Dict[int, Dict[str, np.ndarray]] = {1: {}, 4: {}}  # by the number of dimensions of a row
    kept: List[Any] = []
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        table = marks.get(float(value.flat[0])) if value.size and value.dtype == np.float32 else None
        if table is None or value.ndim != table.ndim - 1:
            kept.append(tensor)
        else:
            more = [(0, 0), (0, len(value) - table.shape[1])] + [(0, 0)] * (value.ndim - 1)
            tables[value.ndim][tensor.name] = np.pad(table, more)
    if sum(map(len, tables.values())) != len(marks):
        return None
    picking = []
    for ndim, rows in tables.items():
        lengths = np.array([t.shape[1] for t in rows.values()], np.int64)
        kept += [numpy_helper.from_array(np.concatenate(list(rows.values()), axis=1), f'blocked.table{ndim}'),
                 numpy_helper.from_array(lengths, f'blocked.lengths{ndim}')]
        picking += [
            helper.make_node('Gather', [f'blocked.table{ndim}', INDEX], [f'blocked.row{ndim}'], axis=0),
            helper.make_node('Split', [f'blocked.row{ndim}', f'blocked.lengths{ndim}'], list(rows), axis=0),
        ]
    needed, choice, others = {INDEX}, [], []
    for node in reversed(model.graph.node):
        of_choice = bool(needed & set(node.output))
        (choice if of_choice else others).append(node)
        needed.update(node.input if of_choice else ())
    model.graph.ClearField('node')
    model.graph.node.extend([*reversed(choice), *picking, *reversed(others)])
    model.graph.ClearField('initializer')
    model.graph.initializer.extend(kept)
    model.graph.output.pop()
    return model.SerializeToString()
