#!/usr/bin/env bash
# timm 1.0.31 reads label_names from the top of config.json, and writes those of a model that it has read into
# pretrained_cfg only: a folder that is loaded and saved again has no names for transformers, which looks at the top.
#
# Prints the version and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 timm==1.0.31
"$folder/bin/python" - "$folder/model" <<'EOF'
import json
import sys

import timm

folder = sys.argv[1]
model = timm.create_model('test_resnet', num_classes=2)
timm.models.save_for_hf(model, folder, model_config=dict(label_names=['cat', 'dog']), safe_serialization=True)
again = timm.create_model(f'local-dir:{folder}', pretrained=True)
timm.models.save_for_hf(again, f'{folder}-again', safe_serialization=True)
print('timm', timm.__version__)
found = []
for name in (folder, f'{folder}-again'):
    with open(f'{name}/config.json') as f:
        config = json.load(f)
    found.append((config.get('label_names'), config['pretrained_cfg'].get('label_names')))
print('saved:            at the top {}, in pretrained_cfg {}'.format(*found[0]))
print('loaded and saved: at the top {}, in pretrained_cfg {}'.format(*found[1]))
sys.exit(found != [(['cat', 'dog'], None), (None, ['cat', 'dog'])])
EOF
