#!/usr/bin/env bash
# torch 2.14.1, torch.onnx.export(dynamo=False, verbose=False): if an operator is not supported, the whole graph is printed
# to standard output besides the error, and ONNX's log stays on for the rest of the process. setup_onnx_logging in
# torch/onnx/_internal/torchscript_exporter/utils.py asks whether the function _jit_is_onnx_log_enabled is true, which every
# function is, instead of calling it.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6 onnx==1.23.2
"$folder/bin/python" -W ignore - 2>/dev/null <<'EOF' | tee "$folder/output"
import io

import torch

print('torch', torch.__version__)
print('log before:', torch._C._jit_is_onnx_log_enabled(), flush=True)
try:
    torch.onnx.export(
        torch.nn.AdaptiveAvgPool2d(2), (torch.zeros(1, 1, 3, 3),), io.BytesIO(), dynamo=False, verbose=False)
except torch.onnx.errors.SymbolicValueError as e:
    print(type(e).__name__, str(e)[:60], flush=True)
print('log after:', torch._C._jit_is_onnx_log_enabled())
EOF
grep -q 'log before: False' "$folder/output" && grep -q 'Torch IR graph at exception' "$folder/output" \
    && grep -q 'log after: True' "$folder/output"
