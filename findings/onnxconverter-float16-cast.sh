#!/usr/bin/env bash
# onnxconverter-common 1.16.0 converts the output of a Cast to float into float16, but not the Cast's 'to'
# (microsoft/onnxconverter-common#320): the file does not load. onnxruntime.transformers.float16 converts both.
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
from onnxruntime.transformers import float16 as other

graph = helper.make_graph(  # x / the number of its rows
    [helper.make_node('Shape', ['x'], ['rows'], name='shape', end=1),
     helper.make_node('Cast', ['rows'], ['count'], name='cast', to=TensorProto.FLOAT),
     helper.make_node('Div', ['x', 'count'], ['y'], name='div')],
    'share',
    [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['rows', 2])],
    [helper.make_tensor_value_info('y', TensorProto.FLOAT, ['rows', 2])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)


def run(converter):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    converted = converter.convert_float_to_float16(copy)
    try:
        session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=['CPUExecutionProvider'])
    except Exception as e:
        return str(e)
    return session.run(None, {'x': np.ones((4, 2), np.float16)})[0].tolist()


results = run(float16), run(other)
print('onnxconverter-common', onnxconverter_common.__version__, '->', results[0])
print('onnxruntime', onnxruntime.__version__, 'transformers.float16 ->', results[1])
sys.exit('does not match expected type (tensor(float))' not in results[0] or results[1] != [[0.25, 0.25]] * 4)
EOF
