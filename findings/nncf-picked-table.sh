#!/usr/bin/env bash
# NNCF 3.4.0 with OpenVINO 2026.4.1: `nncf.quantize` takes every Gather from a constant of floats for an embedding and
# stores that constant in 8 bits with one scale per row. A table of per-channel parameters from which the network picks
# a row is rounded with it, so small parameters of a row become zero. With
# IgnoredScope(types=['Gather']) the table stays as it is.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check nncf==3.4.0 openvino==2026.4.1
"$folder/bin/python" - 2>/dev/null <<'EOF'
import sys
from importlib.metadata import version

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as op

print('nncf', version('nncf'), 'openvino', version('openvino'))
rng = np.random.default_rng(0)
table = np.array([[5, 1, 0.1, 0.01], [4, 2, 0.3, 0.01]], np.float32)  # a factor per channel, by size of the image


def build():
    images = op.parameter([1, 3, -1, -1], np.float32, name='images')
    weights = op.constant(rng.normal(size=(4, 3, 3, 3)).astype(np.float32))
    features = op.convolution(images, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    zero = op.constant(np.int64(0))
    width = op.gather(op.shape_of(images), op.constant(np.int64(3)), zero)
    row = op.convert(op.less(width, op.constant(np.int64(12))), np.int64)
    picked = op.gather(op.constant(table), row, zero, name='picked')
    factors = op.reshape(picked, op.constant(np.array([1, 4, 1, 1])), False)
    return ov.Model([op.relu(op.multiply(features, factors))], [images])


def picked(**kwargs):
    images = [rng.normal(size=(1, 3, 16, 16)).astype(np.float32) for _ in range(8)]
    model = nncf.quantize(build(), nncf.Dataset(images), **kwargs)
    (node,) = [node for node in model.get_ops() if node.get_friendly_name() == 'picked']
    part = ov.Model([node.output(0)], model.get_parameters())
    return ov.compile_model(part, 'CPU')(images[0])[0]


plain, ignored = picked(), picked(ignored_scope=nncf.IgnoredScope(types=['Gather']))
print('row of the table:   ', table[0])
print('picked after NNCF:  ', plain.round(4))
print('with Gather ignored:', ignored)
rounded = plain[3] == 0 and abs(plain[2] / table[0, 2] - 1) > 0.1
sys.exit(0 if rounded and (ignored == table[0]).all() else 1)
EOF
