#!/usr/bin/env bash
# onnx.utils.extract_model of onnx 1.23.2, with which people cut a classifier off a network to get its features, leaves
# out the metadata of the file: class names and preprocessing, where an exporter keeps them there, are gone without a
# word. The other tools of the same package that write a model anew keep them: the version converter, shape inference,
# compose.add_prefix and compose.merge_models.
#
# Prints the version and the metadata after each tool; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2
cat > "$folder/extract.py" <<'EOF'
import sys
from importlib.metadata import version

import numpy
import onnx
from onnx import TensorProto, compose, helper, numpy_helper, shape_inference, utils, version_converter


def save(path, nodes, names, weights=()):
    """Write a model from the first of names, a tensor of [1, 4, 6, 6], to the last."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6, 6]) for name in names]
    graph = helper.make_graph(nodes, 'graph', values[:1], values[-1:], weights, value_info=values[1:-1])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    if weights:
        helper.set_model_props(model, {'labels': 'cat, dog', 'mean': '0.5'})
    onnx.save(model, path)
    return model


folder = sys.argv[1]
kernel = numpy_helper.from_array(numpy.ones((4, 4, 1, 1), numpy.float32), 'kernel')
model = save(f'{folder}/model.onnx', [
    helper.make_node('Conv', ['images', 'kernel'], ['features']), helper.make_node('Relu', ['features'], ['logits']),
], ['images', 'features', 'logits'], [kernel])
other = save(f'{folder}/other.onnx', [helper.make_node('Abs', ['before'], ['after'])], ['before', 'after'])
utils.extract_model(f'{folder}/model.onnx', f'{folder}/features.onnx', ['images'], ['features'])
kept = {}
for tool, made in {
    'version_converter.convert_version': version_converter.convert_version(model, 20),
    'shape_inference.infer_shapes': shape_inference.infer_shapes(model),
    'compose.add_prefix': compose.add_prefix(model, 'first_'),
    'compose.merge_models': compose.merge_models(model, other, [('logits', 'before')]),
    'utils.extract_model': onnx.load(f'{folder}/features.onnx'),
}.items():
    kept[tool] = sorted(entry.key for entry in made.metadata_props)
    print(f'onnx {version("onnx")}: after {tool}: {kept[tool]}')
sys.exit(kept.pop('utils.extract_model') != [] or any(keys != ['labels', 'mean'] for keys in kept.values()))
EOF
"$folder/bin/python" "$folder/extract.py" "$folder"
