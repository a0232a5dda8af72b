#!/usr/bin/env bash
# tract 0.23.9 refuses an ONNX Gemm of float16, which the operator allows: "expected 1,2,F16 got 1,2,F32". The same as
# MatMul and Add is taken and right.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 tract==0.23.9
"$folder/bin/python" - <<'EOF'
import importlib.metadata
import sys
import tempfile

import numpy as np
import onnx
import tract
from onnx import helper, numpy_helper


def run(dtype, *nodes):
    """Return [1, 2] times the identity plus [10, 20], or the error."""
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes, 'linear',
        [helper.make_tensor_value_info('x', elem_type, [1, 2])],
        [helper.make_tensor_value_info('y', elem_type, [1, 2])],
        [numpy_helper.from_array(np.eye(2, dtype=dtype), 'w'), numpy_helper.from_array(np.array([10, 20], dtype), 'b')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    with tempfile.NamedTemporaryFile(suffix='.onnx') as file:
        onnx.save(model, file.name)
        try:
            runnable = tract.onnx().load(file.name).into_model().into_runnable()
        except Exception as e:
            return ' '.join(str(e).split('Stack')[0].split())
    return runnable.run([np.array([[1, 2]], dtype)])[0].to_numpy().ravel().tolist()


gemm = helper.make_node('Gemm', ['x', 'w', 'b'], ['y'])
single, half = run(np.float32, gemm), run(np.float16, gemm)
mat_mul = run(np.float16, helper.make_node('MatMul', ['x', 'w'], ['p']), helper.make_node('Add', ['p', 'b'], ['y']))
print('tract', importlib.metadata.version('tract'))
print('Gemm, float32           ->', single)
print('Gemm, float16           ->', half)
print('MatMul and Add, float16 ->', mat_mul)
sys.exit(single != [11, 22] or 'expected 1,2,F16 got 1,2,F32' not in half or mat_mul != [11, 22])
EOF
