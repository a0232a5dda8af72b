#!/usr/bin/env bash
# ONNX Runtime 1.32.0, CPU: a Conv between DequantizeLinear and QuantizeLinear becomes QLinearConv also if the scale of
# its weights is computed in the graph. If it has a bias, whose scale is then computed too, it stays a Conv in float32,
# without a message.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2
"$folder/bin/python" - "$folder/model.onnx" <<'EOF'
import sys
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

print('onnxruntime', version('onnxruntime'), 'onnx', version('onnx'))
rng = np.random.default_rng(0)


def operators(picked, bias, path):
    """Return what a quantized convolution becomes; the scale of its weights is constant, or picked by the width."""
    constants = dict(
        codes=rng.integers(-63, 64, (4, 4, 3, 3)).astype(np.int8), scale=np.float32(0.01), zero=np.uint8(128),
        weight_zero=np.int8(0), scales=np.float32([0.01, 0.03]), step=np.float32(0.02), least=np.int64(7),
        out=np.float32(0.1), bias_codes=np.arange(4, dtype=np.int32), bias_zero=np.int32(0),
        bias_scale=np.float32(0.0002))
    scale, bias_scale = ('picked', 'picked_bias_scale') if picked else ('scale', 'bias_scale')
    nodes = [
        helper.make_node('Shape', ['x'], ['side'], start=3, end=4),
        helper.make_node('Less', ['side', 'least'], ['is_small']),
        helper.make_node('Cast', ['is_small'], ['row'], to=TensorProto.INT64),
        helper.make_node('Gather', ['scales', 'row'], ['one']),
        helper.make_node('Squeeze', ['one'], ['picked']),
        helper.make_node('Mul', ['picked', 'step'], ['picked_bias_scale']),
    ] if picked else []
    nodes += [
        helper.make_node('QuantizeLinear', ['x', 'step', 'zero'], ['q']),
        helper.make_node('DequantizeLinear', ['q', 'step', 'zero'], ['d']),
        helper.make_node('DequantizeLinear', ['codes', scale, 'weight_zero'], ['weight']),
    ]
    if bias:
        nodes.append(helper.make_node('DequantizeLinear', ['bias_codes', bias_scale, 'bias_zero'], ['bias']))
    nodes += [
        helper.make_node('Conv', ['d', 'weight', *(['bias'] if bias else [])], ['c']),
        helper.make_node('QuantizeLinear', ['c', 'out', 'zero'], ['cq']),
        helper.make_node('DequantizeLinear', ['cq', 'out', 'zero'], ['y']),
    ]
    graph = helper.make_graph(
        nodes, 'g', [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 4, 'h', 'w'])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, 4, 'a', 'b'])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = path, 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return {node.op_type for node in onnx.load(path).graph.node} & {'Conv', 'QLinearConv'}


found = []
for bias in (False, True):
    for picked in (False, True):
        found.append(*operators(picked, bias, sys.argv[1]))
        print('with' if bias else 'without', 'bias, scale', 'picked by the width:' if picked else 'constant:', found[-1])
sys.exit(found != ['QLinearConv', 'QLinearConv', 'QLinearConv', 'Conv'])
EOF
