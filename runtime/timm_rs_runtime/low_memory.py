"""A cheaper form of the file for all sizes, with the weights in memory once

A BatchNorm with tables is an operator between convolutions that ONNX Runtime cannot run on its blocked channels: it
would convert to plain ones and back. A depthwise convolution of 1x1 does the same and stays blocked, along with the
ReLU or the sum behind it; behind a depthwise convolution there is no need of one, whose few weights have a row for each
size. ONNX Runtime blocks constant weights only. So it is given stand-ins, which the rows of the tables replace in the
graph that it makes: each element is another number, which tells where it went.
"""
import os
import tempfile
from collections import Counter
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from .format import INDEX

__all__ = ['blocked_model']

_BLOCKED = 'com.microsoft.nchwc'
_FIRST_MARK = 2 ** 22  # of the elements of stand-ins
_LAST_MARK = 2 ** 24  # up to which float32 knows all whole numbers


def blocked_model(path: str) -> Optional[bytes]:
    """Return an ONNX model for this machine, to be run as it is; None if ONNX Runtime does not block channels here.

    Args:
        path: File of export_switchable.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    rows = _rows(model)
    weights = {t.name: t for t in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    uses = Counter(name for node in model.graph.node for name in node.input)
    tables: List[np.ndarray] = []  # [S, elements] of each stand-in

    def stand_in(table: np.ndarray) -> str:
        first = _FIRST_MARK + sum(t.shape[1] for t in tables)
        tables.append(table.reshape(len(table), -1))
        values = np.arange(first, first + tables[-1].shape[1], dtype=np.float32).reshape(table.shape[1:])
        model.graph.initializer.append(numpy_helper.from_array(values, f'stand_in{len(tables)}'))
        return f'stand_in{len(tables)}'

    nodes = []
    for node in model.graph.node:
        conv = made_by.get(node.input[0]) if node.op_type == 'BatchNormalization' else None
        if conv is not None and conv.op_type == 'Conv' and all(x in rows for x in node.input[1:3]):
            scale, bias = (rows[x] for x in node.input[1:3])
            scale = scale.reshape(*scale.shape, 1, 1, 1)
            weight = numpy_helper.to_array(weights[conv.input[1]]) if conv.input[1] in weights else None
            channels = scale.shape[1]
            if weight is not None and weight.shape[:2] == (channels, 1) and len(conv.input) == 2 \
                    and conv.output[0] not in outputs and uses[conv.output[0]] == 1:
                nodes.remove(conv)
                inputs = [conv.input[0], stand_in(weight * scale), stand_in(bias)]
                node = helper.make_node('Conv', inputs, node.output, node.name)
                node.attribute.extend(conv.attribute)
            else:
                inputs = [node.input[0], stand_in(scale), stand_in(bias)]
                node = helper.make_node('Conv', inputs, node.output, node.name, group=channels)
        nodes.append(node)
    table = np.concatenate(tables, axis=1) if tables else np.zeros((0, 0))
    if not table.size or _FIRST_MARK + table.shape[1] > _LAST_MARK:
        return None
    model.graph.ClearField('node')
    model.graph.node.extend(nodes)
    # An output, or it would be taken for superfluous.
    model.graph.output.append(helper.make_tensor_value_info(INDEX, onnx.TensorProto.INT64, []))
    optimized = _optimize(model.SerializeToString())
    if not any(n.domain == _BLOCKED for n in optimized.graph.node):
        return None
    return _fill_in(optimized, table)


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


def _fill_in(model: Any, table: np.ndarray) -> Optional[bytes]:
    """Put the rows of a table in the place of the stand-ins, None if not each of their elements is there once."""
    from onnx import helper, numpy_helper

    blocked: Dict[Tuple[int, ...], Dict[str, np.ndarray]] = {}  # tables by the shape of an element of dimension 0
    kept: List[Any] = []
    found: List[np.ndarray] = []
    padded = np.pad(table, [(0, 0), (1, 0)])  # ONNX Runtime fills channels up with zeros
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.size and value.max() >= _FIRST_MARK:
            places = np.where(value >= _FIRST_MARK, value - (_FIRST_MARK - 1), 0).astype(int)
            if (value != np.where(places, places + _FIRST_MARK - 1, 0)).any() or places.max() > table.shape[1]:
                return None
            found.append(places[places > 0])
            blocked.setdefault(value.shape[1:], {})[tensor.name] = padded[:, places]
        else:
            kept.append(tensor)
    if not found or not np.array_equal(np.sort(np.concatenate(found)), np.arange(1, table.shape[1] + 1)):
        return None
    picking = []
    for i, rows in enumerate(blocked.values()):
        lengths = np.array([t.shape[1] for t in rows.values()], np.int64)
        kept += [numpy_helper.from_array(np.concatenate(list(rows.values()), axis=1), f'blocked.table{i}'),
                 numpy_helper.from_array(lengths, f'blocked.lengths{i}')]
        picking += [
            helper.make_node('Gather', [f'blocked.table{i}', INDEX], [f'blocked.row{i}'], axis=0),
            helper.make_node('Split', [f'blocked.row{i}', f'blocked.lengths{i}'], list(rows), axis=0),
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
