#!/usr/bin/env bash
# timm 1.0.31 reads WebDataset shards whose images have another key than jpg (--input-key png) not at all: it keeps the
# decoded image under jpg whatever its key was, and then looks for it under the key that was asked for. 'jpg;png' works.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 timm==1.0.31 webdataset==1.0.2
mkdir "$folder/run"
cd "$folder/run"
"$folder/bin/python" - <<'EOF'
import io
import sys
import tarfile

import timm
import webdataset
from PIL import Image
from timm.data import create_dataset

image = io.BytesIO()
Image.new('RGB', (8, 8)).save(image, 'PNG')
with tarfile.open('val-0.tar', 'w') as tar:
    for name, content in (('a.png', image.getvalue()), ('a.cls', b'1')):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
print('timm', timm.__version__, 'webdataset', webdataset.__version__)
found = []
for key in 'jpg;png', 'png':
    dataset = create_dataset('wds/x', root='.', split='val-0.tar', num_samples=1, input_key=key)
    try:
        found.append(f'{len(list(dataset))} image')
    except Exception as e:
        found.append(type(e).__name__)
    print(f'{key!r}: {found[-1]}')
sys.exit(found[0] != '1 image' or found[1] == '1 image')
EOF
