#!/usr/bin/env bash
# timm 1.0.31 with datasets 5.2.0 turns a JPEG as its EXIF orientation says when a table is streamed (hfids/...), and does
# not when the same table is read at random (hfds/...) or the same file lies in a folder: a network trained from one and
# validated on the other sees differently turned pictures.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 timm==1.0.31 datasets==5.2.0
mkdir -p "$folder/run/data" "$folder/run/pictures/cat"
cd "$folder/run"
"$folder/bin/python" - <<'EOF'
import io
import os
import sys

import datasets
import timm
from PIL import Image
from timm.data import create_dataset

exif = Image.Exif()
exif[0x0112] = 6  # to be turned by 90 degrees, as telephones write it
file = io.BytesIO()
Image.new('RGB', (40, 20)).save(file, 'JPEG', exif=exif)
with open('pictures/cat/1.jpg', 'wb') as f:
    f.write(file.getvalue())
features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog'])))
rows = dict(image=[dict(bytes=file.getvalue(), path=None)] * 2, label=[0, 1])
datasets.Dataset.from_dict(rows, features=features).to_parquet('data/train-0.parquet')
print('timm', timm.__version__, 'datasets', datasets.__version__)
table = dict(root='cache', split='train')
sizes = {
    'folder': create_dataset('', root='pictures')[0][0].size,
    'hfds': next(iter(create_dataset(f'hfds/{os.getcwd()}/data', **table)))[0].size,
    'hfids': next(iter(create_dataset(f'hfids/{os.getcwd()}/data', **table, num_samples=2)))[0].size}
for name, size in sizes.items():
    print(f'{name}: {size[0]} x {size[1]}')
sys.exit(list(sizes.values()) != [(40, 20), (40, 20), (20, 40)])
EOF
