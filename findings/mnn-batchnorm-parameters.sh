#!/usr/bin/env bash
# MNN 3.6.1 converts an ONNX BatchNormalization only if its scale and bias are constants, although they are inputs: for rows
# that a Gather picks the converter prints "BatchNorm's gamma not valid!" and writes no file.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 MNN==3.6.1
"$folder/bin/python" - <<'EOF'
import importlib.metadata
import os
import subprocess
import sys
import tempfile

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

constants = dict(scales=[[1, 2], [3, 4]], biases=[[10, 20], [30, 40]], mean=[0, 0], var=[1, 1])
graph = helper.make_graph(
    [helper.make_node('Gather', ['scales', 'row'], ['scale'], axis=0),
     helper.make_node('Gather', ['biases', 'row'], ['bias'], axis=0),
     helper.make_node('BatchNormalization', ['x', 'scale', 'bias', 'mean', 'var'], ['y'], epsilon=0.)],
    'batch_norm',
    [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 2, 1, 1]),
     helper.make_tensor_value_info('row', TensorProto.INT64, [])],
    [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, 2, 1, 1])],
    [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in constants.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
with tempfile.TemporaryDirectory() as folder:
    onnx.save(model, f'{folder}/a.onnx')
    # not the command mnnconvert, which reports its use and installs a package for that
    arguments = ['mnnconvert', '-f', 'ONNX', '--modelFile', f'{folder}/a.onnx', '--MNNModel', f'{folder}/a.mnn',
                 '--bizCode', 'x']
    program = f'import _tools; _tools.mnnconvert({arguments})'
    result = subprocess.run([sys.executable, '-c', program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            cwd=folder)  # where the converter leaves a file of its own
    written = os.path.exists(f'{folder}/a.mnn') and os.path.getsize(f'{folder}/a.mnn')
print('MNN', importlib.metadata.version('MNN'))
print('\n'.join(line for line in result.stdout.splitlines() if 'BatchNorm' in line))
print('file:', f'{written} bytes' if written else 'none')
sys.exit('gamma not valid' not in result.stdout or bool(written))
EOF
