#!/usr/bin/env bash
# ExecuTorch 1.5.1, Python runtime: a method reads its input in the order of memory, whatever the strides say. A tensor
# in channels_last gives other numbers than the same tensor when contiguous, without an error or a warning, with the
# portable kernels and with XNNPACK.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 executorch==1.5.1
"$folder/bin/python" - "$folder/model.pte" 2> /dev/null <<'EOF'
import importlib.metadata
import sys

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

print('executorch', importlib.metadata.version('executorch'), 'torch', torch.__version__)
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten()).eval()
x = torch.randn(1, 3, 3, 3)
expected = network(x)
errors = []
for name, partitioner in ('portable kernels', []), ('XNNPACK', [XnnpackPartitioner()]):
    program = to_edge_transform_and_lower(torch.export.export(network, (x,)), partitioner=partitioner)
    with open(sys.argv[1], 'wb') as file:
        program.to_executorch().write_to_file(file)
    method = Runtime.get().load_program(sys.argv[1]).load_method('forward')
    for layout in torch.contiguous_format, torch.channels_last:
        found = method.execute([x.contiguous(memory_format=layout)])[0].clone()
        errors.append((found - expected).abs().max().item())
        print(f'{name}, {layout}: {found.tolist()}, expected {expected.tolist()}')
sys.exit(not (errors[0] < 1e-5 and errors[2] < 1e-5 and errors[1] > 0.1 and errors[3] > 0.1))
EOF
