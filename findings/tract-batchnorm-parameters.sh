#!/usr/bin/env bash
# tract 0.23.9 takes an ONNX BatchNormalization only if its scale and bias are constants, although they are inputs: rows
# that a Gather picks are refused. The same as Mul and Add is taken and right.
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
from onnx import TensorProto, helper, numpy_helper


def run(nodes):
    """Return y of ones and row 1, or the error."""
    constants = dict(scales=[[1, 2], [3, 4]], biases=[[10, 20], [30, 40]], mean=[0, 0], var=[1, 1])
    picks = [helper.make_node('Gather', [table, 'row'], [row], axis=0)
             for table, row in (('scales', 'scale'), ('biases', 'bias'))]
    graph = helper.make_graph(
        picks + nodes, 'batch_norm',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 2, 1, 1]),
         helper.make_tensor_value_info('row', TensorProto.INT64, [])],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, 2, 1, 1])],
        [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in constants.items()]
        + [numpy_helper.from_array(np.array([1, 2]), 'axes')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    with tempfile.NamedTemporaryFile(suffix='.onnx') as file:
        onnx.save(model, file.name)
        try:
            runnable = tract.onnx().load(file.name).into_model().into_runnable()
        except Exception as e:
            return ' '.join(str(e).split()[:12])
    return runnable.run([np.ones((1, 2, 1, 1), np.float32), np.array(1)])[0].to_numpy().ravel().tolist()


norm = run([helper.make_node('BatchNormalization', ['x', 'scale', 'bias', 'mean', 'var'], ['y'], epsilon=0.)])
mul_add = run([helper.make_node('Unsqueeze', ['scale', 'axes'], ['s']), helper.make_node('Mul', ['x', 's'], ['p']),
               helper.make_node('Unsqueeze', ['bias', 'axes'], ['b']), helper.make_node('Add', ['p', 'b'], ['y'])])
print('tract', importlib.metadata.version('tract'))
print('BatchNormalization ->', norm)
print('Mul and Add        ->', mul_add)
sys.exit('Params are not const' not in norm or mul_add != [33, 44])
EOF
