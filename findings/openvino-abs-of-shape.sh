#!/usr/bin/env bash
# OpenVINO 2026.4.1 leaves out an Abs of what is computed from a shape (openvinotoolkit/openvino#38166): the
# output of Abs is negative, and ArgMin over distances to known sizes answers another size than the nearest.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 openvino==2026.4.1
"$folder/bin/python" - <<'EOF'
import sys

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

graph = helper.make_graph(  # which of 9 and 4 is the number of rows of x nearest to?
    [helper.make_node('Shape', ['x'], ['rows'], end=1),
     helper.make_node('Sub', ['known', 'rows'], ['difference']),
     helper.make_node('Abs', ['difference'], ['distance']),
     helper.make_node('ArgMin', ['distance'], ['nearest'], axis=0, keepdims=0)],
    'nearest',
    [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['rows', 2])],
    [helper.make_tensor_value_info('distance', TensorProto.INT64, [2]),
     helper.make_tensor_value_info('nearest', TensorProto.INT64, [])],
    [numpy_helper.from_array(np.array([9, 4], np.int64), 'known')])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)

x = np.zeros((8, 2), np.float32)
expected = ReferenceEvaluator(model).run(None, {'x': x})
core = openvino.Core()
result = core.compile_model(core.read_model(model.SerializeToString()), 'CPU')([x])
print('openvino', openvino.__version__)
print('|9 - 8|, |4 - 8| and the row of the least, expected:', expected[0].tolist(), int(expected[1]))
print('|9 - 8|, |4 - 8| and the row of the least, OpenVINO:', result[0].tolist(), int(result[1]))
sys.exit(result[0].tolist() != [1, -4])
EOF
