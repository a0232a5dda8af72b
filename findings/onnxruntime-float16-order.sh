#!/usr/bin/env bash
# onnxruntime 1.32.0, transformers.float16.convert_float_to_float16(keep_io_types=True): the Cast of the input is added
# after the nodes that read it, but ONNX wants nodes in the order of execution. ONNX Runtime sorts them and loads the
# model; ONNX's checker and reference evaluator and other runtimes refuse it. OnnxModel.graph_topological_sort mends it.
# onnxconverter-common 1.16.0, which this was copied from, has them in order (its issue 208).
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/bin/python" - <<'EOF'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel


def result(check):
    try:
        check()
        return 'taken'
    except Exception as e:
        return ' '.join(str(e).split()[:12])


def results(model):
    def run():
        ReferenceEvaluator(model).run(None, {'x': np.ones((1, 2), np.float32)})

    return [result(check) for check in (
        lambda: onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider']),
        lambda: onnx.checker.check_model(model), run)]


graph = helper.make_graph(
    [helper.make_node('Relu', ['x'], ['y'], name='relu')], 'relu',
    [helper.make_tensor_value_info('x', TensorProto.FLOAT, [1, 2])],
    [helper.make_tensor_value_info('y', TensorProto.FLOAT, [1, 2])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
converted = convert_float_to_float16(model, keep_io_types=True)
print('onnxruntime', onnxruntime.__version__, 'onnx', onnx.__version__)
print('nodes:', [node.name for node in converted.graph.node])
found = results(converted)
print('ONNX Runtime, checker, reference evaluator ->', *found, sep='\n    ')
OnnxModel.graph_topological_sort(converted.graph)
after = results(converted)
print('sorted ->', *after)
sys.exit(found[0] != 'taken' or 'topologically sorted' not in found[1] or 'Unable to find input' not in found[2]
         or after != ['taken'] * 3)
EOF
