#!/usr/bin/env bash
# timm 1.0.31 writes num_classes into model_args of config.json too, where transformers 5.24.0 passes it on beside its
# own: AutoModelForImageClassification.from_pretrained ends with a TypeError for every folder of save_for_hf.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 timm==1.0.31 transformers==5.24.0
"$folder/bin/python" - "$folder/model" <<'EOF'
import json
import sys

import timm
import torch
import transformers

folder = sys.argv[1]
model = timm.create_model('test_resnet', num_classes=4).eval()
timm.models.save_for_hf(model, folder, safe_serialization=True)
print('timm', timm.__version__, 'transformers', transformers.__version__)


def load():
    try:
        return transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    except TypeError as e:
        return str(e)


print('as written:', before := load())
with open(f'{folder}/config.json') as f:
    config = json.load(f)
del config['model_args']['num_classes']  # it stands at the top too
with open(f'{folder}/config.json', 'w') as f:
    json.dump(config, f)
x = torch.rand(2, 3, 160, 160)
with torch.no_grad():
    difference = (load()(x).logits - model(x)).abs().max().item()
print('without num_classes in model_args: largest difference of logits', difference)
sys.exit('multiple values' not in str(before) or difference != 0)
EOF
