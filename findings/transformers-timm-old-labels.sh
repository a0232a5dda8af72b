#!/usr/bin/env bash
# transformers 5.24.0: a timm network whose config.json has names of its classes (label_names), loaded for other classes
# and saved again, is saved with the names of before: TimmWrapperConfig.to_dict writes those of id2label only where there
# are none. Loaded again, each class has an old name where there are as many classes as before, else LABEL_0, LABEL_1 ...
# Without label_names in the configuration object (del config.label_names) the new names are saved.
#
# Prints the version and the names; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 2>/dev/null
cd "$folder"
"$folder/bin/python" - 2>/dev/null <<'EOF'
import json
import sys
from pathlib import Path

import transformers

print('transformers', transformers.__version__)
trained, tuned = Path('trained'), Path('tuned')
trained.mkdir()
before = dict(
    architecture='resnet18', num_classes=3, label_names=['cat', 'dog', 'fox'], model_type='timm_wrapper',
    pretrained_cfg=dict(num_classes=3))
(trained / 'config.json').write_text(json.dumps(before))
results = []
for names in (['apple', 'pear', 'plum'], ['ripe', 'rotten']):
    for keep in (True, False):
        config = transformers.AutoConfig.from_pretrained(
            trained, num_labels=len(names), id2label=dict(enumerate(names)))
        assert list(config.id2label.values()) == names
        if not keep:
            del config.label_names
        config.save_pretrained(tuned)
        saved = json.loads((tuned / 'config.json').read_text())['label_names']
        again = list(transformers.AutoConfig.from_pretrained(tuned).id2label.values())
        print(f'{names}, label_names {"kept" if keep else "deleted"}: saved as {saved}, loaded again as {again}')
        results.append((saved, again))
old = before['label_names']
sys.exit(results != [
    (old, old), (['apple', 'pear', 'plum'],) * 2, (old, ['LABEL_0', 'LABEL_1']), (['ripe', 'rotten'],) * 2])
EOF
