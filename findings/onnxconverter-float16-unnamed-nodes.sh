#!/usr/bin/env bash
# onnxconverter-common 1.16.0, convert_float_to_float16(keep_io_types=True): where an input is read by two nodes without
# names (names of nodes are optional in ONNX), both Casts that it adds have the same name and the same output, so the
# model is not valid and does not load. With names it is.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 onnxconverter-common==1.16.0
"$folder/bin/python" - <<'EOF'
import sys

import numpy as np
import onnx
import onnxconverter_common
import onnxruntime
from onnx import TensorProto, helper
from onnxconverter_common import float16


def run(*names):
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], name=name) for name, op, inputs, output in zip(
            names, ('Relu', 'Neg', 'Add'), (['x'], ['x'], ['a', 'b']), ('a', 'b', 'y'))],
        'relu_minus_x',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, [2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    converted = float16.convert_float_to_float16(model, keep_io_types=True)
    try:
        session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=['CPUExecutionProvider'])
    except Exception as e:
        return str(e)
    return session.run(None, {'x': np.array([1, -2], np.float32)})[0].tolist()


results = run('relu', 'neg', 'add'), run('', '', '')
print('onnxconverter-common', onnxconverter_common.__version__)
print('named nodes   ->', results[0])
print('unnamed nodes ->', results[1])
sys.exit(results[0] != [0, 2] or 'two nodes with same node name' not in results[1])
EOF
