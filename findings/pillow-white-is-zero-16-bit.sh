#!/usr/bin/env bash
# Pillow 12.3.0 opens a grey TIFF of 16 bits whose tag says that zero is white (PhotometricInterpretation 0) as its own
# negative, without a warning; the same picture in 8 bits is inverted as the tag says. In big-endian order the file of
# 16 bits is not opened at all.
#
# Prints the version and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check pillow==12.3.0
"$folder/bin/python" - <<'EOF'
import io
import struct
import sys

import PIL
from PIL import Image


def tiff(values, bits, order):  # 3 x 2 pixels
    data = b''.join(struct.pack(order + {8: 'B', 16: 'H'}[bits], v) for v in values)
    tags = {256: 3, 257: 2, 258: bits, 259: 1, 262: 0, 273: 10 + 12 * 9 + 4, 277: 1, 278: 2, 279: len(data)}
    entries = b''.join(struct.pack(order + 'HHII', tag, 4, 1, value) for tag, value in tags.items())
    return {'<': b'II', '>': b'MM'}[order] + struct.pack(order + 'HIH', 42, 8, len(tags)) + entries + bytes(4) + data


print('Pillow', PIL.__version__)
found = {}
for bits in 8, 16:
    stored = [i * (2 ** bits - 1) // 5 for i in range(6)]  # from white to black
    for order in '<>':
        try:
            image = Image.open(io.BytesIO(tiff(stored, bits, order)))
            found[bits, order] = 'white first' if image.getpixel((0, 0)) > image.getpixel((2, 1)) else 'black first'
        except OSError as e:
            found[bits, order] = type(e).__name__
        print(f'{bits} bits, {"little" if order == "<" else "big"} endian: {found[bits, order]}, expected white first')
sys.exit(list(found.values()) != ['white first', 'white first', 'black first', 'UnidentifiedImageError'])
EOF
