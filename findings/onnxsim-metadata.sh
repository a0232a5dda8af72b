#!/usr/bin/env bash
# onnxsim 0.8.1 records in the metadata of a simplified file how it was called and the name of every node and value that
# it removed or changed, here half of the file. The values are plain text, some of them empty, beside metadata of the
# file's author that may all be JSON: who reads metadata has to pick the own entries. Metadata that were there before
# stay.
#
# Prints the version, the entries and their lengths; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxsim==0.8.1
cat > "$folder/simplify.py" <<'EOF'
import sys
from importlib.metadata import version

import numpy
import onnx
import onnxsim
from onnx import TensorProto, helper, numpy_helper

ones = numpy_helper.from_array(numpy.ones(3, numpy.float32), 'ones')
kernel = numpy_helper.from_array(numpy.ones((3, 3, 1, 1), numpy.float32), 'kernel')
nodes, last = [], 'images'
for i in range(20):
    nodes.append(helper.make_node('Conv', [last, 'kernel'], [f'stage{i}.conv'], f'stage{i}.conv'))
    nodes.append(helper.make_node(
        'BatchNormalization', [f'stage{i}.conv', *['ones'] * 4], [f'stage{i}.bn'], f'stage{i}.bn'))
    last = f'stage{i}.bn'
image = [1, 3, 8, 8]
model = helper.make_model(
    helper.make_graph(
        nodes, 'network', [helper.make_tensor_value_info('images', TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, image)], [ones, kernel]),
    opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
model.metadata_props.add(key='mean', value='[0.5, 0.5, 0.5]')
onnx.checker.check_model(model)

simplified, _ = onnxsim.simplify(model)
metadata = {entry.key: entry.value for entry in simplified.metadata_props}
added = {key: value for key, value in metadata.items() if key != 'mean'}
characters = sum(len(key) + len(value) for key, value in added.items())
graph = len(simplified.SerializeToString()) - characters
print(f'onnxsim {version("onnxsim")}: {len(added)} entries of {characters} characters, the rest of the file {graph} bytes')
print('the longest:', max(added, key=lambda key: len(added[key])), '- empty:', sum(not v for v in added.values()))
sys.exit(not (
    metadata['mean'] == '[0.5, 0.5, 0.5]' and all(key.startswith('onnxsim.') for key in added)
    and '(stage7.bn)' in added['onnxsim.removed_nodes'] and '' in added.values()))
EOF
"$folder/bin/python" "$folder/simplify.py"
