#!/usr/bin/env bash
# OpenCV 5.0.0.93 loads an ONNX MaxPool of uint8 or int8, which the operator allows since operator set 12, and refuses to
# run it: "MaxPool: unsupported data type". Quantized networks whose MaxPool reads codes do not run there.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    opencv-python-headless==5.0.0.93
"$folder/bin/python" - <<'EOF'
import sys
import tempfile

import cv2
import numpy as np
import onnx
import onnxruntime
from onnx import helper


def run(dtype):
    """Return the largest of four numbers in ONNX Runtime and in OpenCV, or the error."""
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node('MaxPool', ['x'], ['y'], kernel_shape=[2, 2])], 'max_pool',
        [helper.make_tensor_value_info('x', elem_type, [1, 1, 2, 2])],
        [helper.make_tensor_value_info('y', elem_type, [1, 1, 1, 1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    x = np.array([[[[1, 2], [3, 4]]]], dtype)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    with tempfile.NamedTemporaryFile(suffix='.onnx') as file:
        onnx.save(model, file.name)
        network = cv2.dnn.readNetFromONNX(file.name)
    network.setInput(x)
    try:
        found = network.forward().item()
    except cv2.error as e:
        found = e.err
    return session.run(None, {'x': x})[0].item(), found


results = {dtype.__name__: run(dtype) for dtype in (np.float32, np.uint8, np.int8)}
print('OpenCV', cv2.__version__)
for name, (expected, found) in results.items():
    print(f'{name}: ONNX Runtime {expected}, OpenCV {found}')
sys.exit(results['float32'] != (4, 4) or any(
    'unsupported data type' not in str(results[name][1]) for name in ('uint8', 'int8')))
EOF
