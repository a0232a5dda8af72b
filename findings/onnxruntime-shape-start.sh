#!/usr/bin/env bash
# ONNX Runtime 1.32.0 computes Shape(start=2) of [batch, 3, 32, 32] in every run, although both of its values are known:
# it folds a Shape only where all dimensions are known, also those that start and end leave out.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/bin/python" - <<'EOF'
import sys
import tempfile

import onnx
import onnxruntime
from onnx import TensorProto, helper


def operators(shape):
    """Return what is left of height x width after all optimizations."""
    graph = helper.make_graph(
        [helper.make_node('Shape', ['x'], ['sides'], start=2),
         helper.make_node('ReduceProd', ['sides'], ['area'], keepdims=0)],
        'area',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info('area', TensorProto.INT64, [])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f'{folder}/optimized.onnx'
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
        return [n.op_type for n in onnx.load(f'{folder}/optimized.onnx').graph.node]


fixed, free = operators([2, 3, 32, 32]), operators(['batch', 3, 32, 32])
print('onnxruntime', onnxruntime.__version__)
print('[2, 3, 32, 32]     ->', fixed)
print('[batch, 3, 32, 32] ->', free)
sys.exit(fixed != [] or free != ['Shape', 'ReduceProd'])
EOF
