#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU: a convolution whose weights come from DequantizeLinear, with a scale that depends on the
# input's width, has right answers for the first width that it is given. For every later width they are wrong, and from
# then on for the first one too, without an error or a warning.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 onnx==1.23.2
"$folder/bin/python" - "$folder/model.onnx" <<'EOF'
import sys
from importlib.metadata import version

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

print('openvino', version('openvino'), 'onnx', version('onnx'))
rng = np.random.default_rng(0)
codes = rng.integers(-63, 64, (8, 3, 3, 3)).astype(np.int8)
scales = np.array([[0.01], [0.03]], np.float32)  # by size: 8 px, 6 px
constants = dict(
    codes=codes, scales=scales, step=np.float32(0.02), zero=np.uint8(128), least=np.int64(7), axis=np.int64(0))
nodes = [
    helper.make_node('QuantizeLinear', ['x', 'step', 'zero'], ['q']),
    helper.make_node('DequantizeLinear', ['q', 'step', 'zero'], ['d']),
    helper.make_node('Shape', ['x'], ['side'], start=3, end=4),
    helper.make_node('Less', ['side', 'least'], ['is_small']),
    helper.make_node('Cast', ['is_small'], ['row'], to=TensorProto.INT64),
    helper.make_node('Gather', ['scales', 'row'], ['picked']),
    helper.make_node('Squeeze', ['picked'], ['scale']),
    helper.make_node('DequantizeLinear', ['codes', 'scale'], ['weight']),
    helper.make_node('Conv', ['d', 'weight'], ['y']),
]
graph = helper.make_graph(
    nodes, 'g', [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 3, 'h', 'w'])],
    [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, 8, 'a', 'b'])],
    [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
onnx.checker.check_model(model)
onnx.save(model, sys.argv[1])


def expected(x):
    d = (np.clip(np.rint(x / np.float32(0.02)) + 128, 0, 255) - 128) * np.float32(0.02)
    weight = codes * scales[0 if x.shape[-1] > 7 else 1]
    windows = np.lib.stride_tricks.sliding_window_view(d, (3, 3), axis=(2, 3))
    return np.einsum('bchwij,ocij->bohw', windows, weight)


compiled = openvino.Core().compile_model(sys.argv[1], 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
errors = []
for size in (8, 6, 8):
    x = rng.uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
    want = expected(x)
    errors.append(np.abs(compiled([x])[0] - want).max() / want.std())
    print(f'{size} px: largest error {errors[-1]:.2g} of the standard deviation')
sys.exit(not (errors[0] < 0.01 and errors[1] > 0.1))
EOF
