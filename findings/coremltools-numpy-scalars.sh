#!/usr/bin/env bash
# coremltools 9.0 sets no upper bound for NumPy, but with NumPy 2.4.6 it cannot convert a traced network that computes
# with a size of its input: x.view(x.size(0), -1), as many classifiers have it, ends in a TypeError about arrays that are
# converted to Python scalars. With NumPy 2.3.5 the same network is converted.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
cat > "$folder/convert.py" <<'EOF'
import logging
import sys
import warnings

import coremltools
import numpy
import torch

warnings.simplefilter('ignore')
logging.disable(logging.CRITICAL)


class Flatten(torch.nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1) + 1


x = torch.rand(1, 3, 16, 16)
try:
    coremltools.convert(
        torch.jit.trace(Flatten().eval(), x), inputs=[coremltools.TensorType(shape=x.shape)], skip_model_load=True,
        minimum_deployment_target=coremltools.target.iOS18)
    found = 'converted'
except TypeError as e:
    found = f'TypeError: {e}'
print(f'coremltools {coremltools.__version__}, NumPy {numpy.__version__}, torch {torch.__version__}: {found}')
sys.exit(('scalars' in found) != (sys.argv[1] == 'fails') or (found == 'converted') != (sys.argv[1] == 'works'))
EOF
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 coremltools==9.0 numpy==2.4.6
"$folder/bin/python" "$folder/convert.py" fails 2> /dev/null
"$folder/bin/pip" install --quiet --disable-pip-version-check numpy==2.3.5
"$folder/bin/python" "$folder/convert.py" works 2> /dev/null
