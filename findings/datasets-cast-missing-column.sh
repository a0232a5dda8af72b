#!/usr/bin/env bash
# datasets 5.2.0: `cast_column` of a column that a data set does not have raises ValueError for plain types, but with
# Image it adds the column, empty: every row then has None for its image. timm 1.0.31 casts the field of --input-key
# in this way, so a misspelt name gives a data set of the right length whose images are all missing.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0
"$folder/bin/python" - <<'EOF'
import sys

import datasets
import PIL

print('datasets', datasets.__version__, 'pillow', PIL.__version__)
held = datasets.Dataset.from_dict(dict(picture=[None, None], label=[0, 1]))
found = []
for feature in datasets.Value('int64'), datasets.Image(decode=False):
    try:
        found.append(held.cast_column('image', feature).column_names)
    except ValueError as e:
        found.append(type(e).__name__)
    print(f'{type(feature).__name__}: {found[-1]}')
sys.exit(found != ['ValueError', ['picture', 'label', 'image']])
EOF
