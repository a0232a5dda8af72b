#!/usr/bin/env bash
# litert-torch 0.10.0: two signatures of one convolution share its weights in the file if what follows is the same. If
# each multiplies the channels by factors of its own, the converter folds these into the weights, and the file holds the
# weights twice. Written as a depthwise convolution of 1x1 the factors are not folded, and the weights are there once.
#
# Prints the versions and the sizes; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 litert-torch==0.10.0
"$folder/bin/python" - "$folder/model.tflite" 2> /dev/null <<'EOF'
import contextlib
import importlib.metadata
import io
import os
import sys

import litert_torch
import torch

print('litert-torch', importlib.metadata.version('litert-torch'), 'torch', torch.__version__)
torch.manual_seed(0)
shared = torch.nn.Conv2d(64, 256, 3)


class Factors(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factors = torch.nn.Parameter(torch.rand(1, 256, 1, 1) + 0.5)

    def forward(self, x):
        return x * self.factors


found = {}
for name, others in {
    'one signature': [Factors()],
    'two, the same factors': [Factors()] * 2,
    'two, factors of their own': [Factors(), Factors()],
    'two, depthwise convolutions of their own': [torch.nn.Conv2d(256, 256, 1, groups=256) for _ in range(2)],
}.items():
    converter = litert_torch
    for i, other in enumerate(others):
        network = torch.nn.Sequential(shared, other).eval()
        converter = converter.signature(f'forward_{i}', network, (torch.zeros(1, 64, 8 + i, 8 + i),))
    with contextlib.redirect_stdout(io.StringIO()):
        converter.convert().export(sys.argv[1])
    found[name] = os.path.getsize(sys.argv[1])
    print(f'{name}: {found[name]} bytes')
one, same, own, depthwise = found.values()
sys.exit(not (same < 1.1 * one and depthwise < 1.1 * one and own > 1.9 * one))
EOF
