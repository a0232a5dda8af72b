#!/usr/bin/env python3
"""Write timm_rs/models/zoo.csv: which architectures of the installed timm become rs_* models, and why the others do not

An architecture becomes one if it holds BatchNorm and runs at every default resolution. Each is built and run on the
meta device: nothing is computed, nothing downloaded. The column params counts its parameters in millions.

    make zoo    # or: python tools/make_zoo.py

One run takes a few minutes on one core. Run it after an update of timm, then `make sweep`.
"""
import argparse
import csv
import re
import sys
import warnings
from pathlib import Path
from typing import Tuple

import timm
import torch
from _meta import speed_up_batch_norm
from timm.models import list_models
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from timm_rs_runtime.files import atomic_write

OUTPUT = Path(__file__).parents[1] / 'timm_rs' / 'models' / 'zoo.csv'
RESOLUTIONS = (224, 192, 160, 128, 96)  # not imported: timm_rs cannot be imported without the file that is made here


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    parser.add_argument('--output', default=OUTPUT, type=Path, metavar='FILE', help='file to write')
    args = parser.parse_args()

    torch.set_num_threads(1)
    speed_up_batch_norm()
    names = list_models(exclude_filters='rs_*')
    rows = [(name, *examine(name)) for name in tqdm(names, disable=None)]
    with atomic_write(args.output, overwrite=True, newline='') as f:
        f.write(f'# timm {timm.__version__}: its architectures and why one is not an rs_* model (tools/make_zoo.py)\n')
        csv.writer(f, lineterminator='\n').writerows([('name', 'params', 'reason'), *rows])
    registered = sum(not reason for *_, reason in rows)
    print(f'{registered} of the {len(rows)} architectures of timm {timm.__version__} become rs_* models')


def examine(name: str) -> Tuple[str, str]:
    """Return the parameters of an architecture of timm in millions, '' if unknown, and what why_not returns."""
    try:
        with torch.device('meta'):
            model = timm.create_model(name).eval()
    except Exception as e:  # whatever it lacks
        return '', f'cannot be built: {shorten(e)}'
    return f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}', why_not(model)


def why_not(model: torch.nn.Module) -> str:
    """Return why there can be no rs_* model of an architecture, in words that follow its name; '' if there can."""
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return 'holds no BatchNorm'
    refused = [r for r in RESOLUTIONS if not takes(model, r)]
    if not refused:
        return ''
    if model.pretrained_cfg.get('fixed_input_size'):
        return 'takes one input size, {}x{}'.format(*model.pretrained_cfg['input_size'][1:])
    sizes = [f'{r}x{r}' for r in refused]
    return f"cannot take {' and '.join(filter(None, (', '.join(sizes[:-1]), sizes[-1])))}"


@torch.no_grad()
def takes(model: torch.nn.Module, resolution: int) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model(torch.empty(2, 3, resolution, resolution, device='meta'))
    except Exception:  # architectures check their input in many ways, or not at all
        return False
    return True


def shorten(error: Exception) -> str:
    """Return the first sentence of an error, without what belongs to this machine."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r'\S*[/\\]\S*', '...', lines[0])[:80]


if __name__ == '__main__':
    sys.exit(main())
