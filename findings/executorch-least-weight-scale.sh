#!/usr/bin/env bash
# ExecuTorch 1.5.1: the configuration that XNNPACK's quantizer comes with (PT2E, symmetric, a scale per channel) takes no
# scale of a weight below 2 ** -12. A channel whose largest weight is below 127 * 2 ** -12 = 0.031, as the small gain of
# a BatchNorm that is fused into it makes it, gets fewer of the 255 levels: a convolution is 1 % off, the same one with
# weights times 1e-3 7 %, times 1e-4 64 % of its output. A larger gain behind it would bring that back to full size.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 executorch==1.5.1
"$folder/bin/python" - 2> /dev/null <<'EOF'
import importlib.metadata
import sys

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

print(*(f'{name} {importlib.metadata.version(name)}' for name in ('executorch', 'torchao', 'torch')))
torch.manual_seed(0)
x = torch.randn(8, 3, 9, 9)
weight = torch.randn(4, 3, 3, 3)
errors = []
for factor in 1., 1e-2, 1e-3, 1e-4:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False)).eval()
    network[0].weight.data = factor * weight
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(network, (x,)).module(), quantizer)
    prepared(x)
    with torch.no_grad():
        expected, found = network(x), convert_pt2e(prepared)(x)
    errors.append(((found - expected).square().mean() / expected.square().mean()).sqrt().item())
    print(f'weights times {factor}: root mean square error {errors[-1]:.1%} of the output')
sys.exit(not (errors[0] < 0.02 and errors[2] > 0.05 and errors[3] > 0.5))
EOF
