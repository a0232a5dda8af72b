#!/usr/bin/env bash
# timm 1.0.31 updates the moving average of a parameter that has several names (tied weights) once per name: after an
# update with decay 0.5 it has moved by 0.75 of the way, not 0.5. ModelEmaV2 and ModelEmaV3 alike.
#
# Prints the version and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 timm==1.0.31
"$folder/bin/python" - <<'EOF'
import sys

import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

print('timm', timm.__version__, 'torch', torch.__version__)
found = []
for name, average, options in (
        ('ModelEmaV2', ModelEmaV2, {}), ('ModelEmaV3', ModelEmaV3, {}),
        ('ModelEmaV3, not foreach', ModelEmaV3, dict(foreach=False))):
    for is_tied in False, True:
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        if is_tied:
            model[1].weight = model[0].weight
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[1].weight)
        ema = average(model, decay=0.5, **options)
        nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)
        ema.update(model)
        found.append(ema.module[0].weight.item())
        print(f'{name}, {"tied" if is_tied else "not tied"}: {found[-1]}, expected 0.5')
sys.exit(found != [0.5, 0.75] * 3)
EOF
