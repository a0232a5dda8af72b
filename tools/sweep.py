#!/usr/bin/env python3
"""Put every rs_* model through its paces, into results/zoo.csv

Each one is built, run at every resolution, compared with what `at` takes out (bit for bit), trained for one step that
has to leave a gradient on every parameter, given a new classifier, and, where its plain network can be
re-parameterized, compared with that. Networks that are too costly for one core do all this on the meta device, where
shapes and gradients are there but no numbers.

    make sweep    # or: python tools/sweep.py

It takes about three quarters of an hour on one core. The table is written after every model: a run that was stopped
goes on where it was, unless timm or torch changed, and tries the rows that failed again. Its columns: family is timm's
module, bn_count the BN layers of the plain network, params_added the parameters that the private BN layers and the
ensemble weights add, madds_<size> the multiply-adds of one image, device where it was run, note what is worth knowing.
"""
import argparse
import csv
import fnmatch
import json
import platform
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List, Set

import timm
import torch
import torch.nn as nn
from _meta import speed_up_batch_norm
from _table import write_json, write_rows
from timm.models import model_entrypoint
from timm.utils import reparameterize_model
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import timm_rs
from timm_rs import PrivateBN
from timm_rs.evaluate import count_parameters
from timm_rs.models.rs_models import PREFIX, RESOLUTIONS, RS_MODELS
from timm_rs.train.task import MultiResolutionTask

OUTPUT = Path(__file__).parents[1] / 'results' / 'zoo.csv'
MADDS = {r: f'madds_{r}' for r in RESOLUTIONS}
COLUMNS = ('name', 'family', 'bn_count', 'params_added', *MADDS.values(), 'device', 'status', 'note')
BATCH_SIZE = 2
CPU_MADDS = 12e9  # for one image at all resolutions, and
CPU_PARAMETERS = 50e6  # in the plain network: more than one of these goes to the meta device


class Failure(Exception):
    """A model does not do what it has to."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    parser.add_argument('filter', nargs='?', default='*', help='wildcard for the names (default: all)')
    parser.add_argument('--output', default=OUTPUT, type=Path, metavar='FILE', help='table to write')
    args = parser.parse_args()
    torch.set_num_threads(1)
    speed_up_batch_norm()
    warnings.filterwarnings('ignore')
    sidecar = args.output.with_suffix('.json')
    args.output.parent.mkdir(parents=True, exist_ok=True)

    versions = dict(timm=timm.__version__, torch=torch.__version__, python=platform.python_version())
    rows, seconds = {}, 0.  # CPU time
    if args.output.exists() and sidecar.exists():
        before = json.loads(sidecar.read_text())
        if before['versions'] == versions:
            with open(args.output, newline='', encoding='utf-8') as f:
                rows = {row['name']: row for row in csv.DictReader(f) if row['name'] in map(rs_name, RS_MODELS)}
            seconds = before['cpu_seconds']
    todo = [base for base in RS_MODELS if fnmatch.fnmatch(rs_name(base), args.filter)]
    todo = [base for base in todo if rows.get(rs_name(base), {}).get('status') != 'ok']
    for base in tqdm(todo, disable=None):
        start = time.process_time()
        rows[rs_name(base)] = row = sweep(base)
        row_seconds = time.process_time() - start
        seconds += row_seconds
        print(f"{row['name']}: {row['status']} ({row['device']}, {row_seconds:.1f} s)", flush=True)
        done = [rows[name] for name in map(rs_name, RS_MODELS) if name in rows]
        write_rows(args.output, COLUMNS, done)
        write_json(sidecar, dict(
            command=shlex.join(['python', 'tools/sweep.py', *sys.argv[1:]]),
            versions=versions,
            timm_rs=timm_rs.__version__,
            platform=f'{platform.system()} {platform.machine()}, 1 thread',
            settings=dict(
                resolutions=RESOLUTIONS, batch_size=BATCH_SIZE, cpu_madds=CPU_MADDS, cpu_parameters=CPU_PARAMETERS),
            models=len(RS_MODELS),
            ok=sum(r['status'] == 'ok' for r in rows.values()),
            on_cpu=sum(r['device'] == 'cpu' for r in rows.values()),
            cpu_seconds=round(seconds),
        ))
    failed = [row for row in rows.values() if row['status'] != 'ok']
    print(f'{len(rows) - len(failed)} of {len(RS_MODELS)} ok')
    return 1 if failed else 0


def sweep(base: str) -> Dict[str, Any]:
    """Return the row of a model."""
    row = dict(dict.fromkeys(COLUMNS, ''), name=rs_name(base), device='meta')
    row['family'] = model_entrypoint(base).__module__.split('.')[-1]
    try:  # on the meta device, and again with numbers where that is cheap
        plain = create(base, 'meta')
        model = create(row['name'], 'meta')
        row['bn_count'] = sum(isinstance(m, _BatchNorm) for m in plain.modules())
        row['params_added'] = count_parameters(model) - count_parameters(plain)
        madds = {column: check_taken(model.at(r), plain, r) for r, column in MADDS.items()}
        row.update(madds)
        if sum(madds.values()) <= CPU_MADDS and count_parameters(plain) <= CPU_PARAMETERS:
            row['device'] = 'cpu'
            torch.manual_seed(0)
            model = create(row['name'], 'cpu')
        check_inference(model, row['device'])
        row['note'] = check_training(model, plain, row['device'])
        check_new_classifier(model)
        row['status'] = 'ok'
    except Exception as e:  # the sweep goes on, the row records it
        row['status'] = ' '.join(f'{"" if isinstance(e, Failure) else type(e).__name__ + ": "}{e}'.split())[:200]
    return row


def check_taken(taken: nn.Module, plain: nn.Module, resolution: int) -> int:
    """Check what `at` takes out against the network that timm builds, and return its multiply-adds for one image."""
    if type(taken) is not type(plain) or taken.state_dict().keys() != plain.state_dict().keys():
        raise Failure(f'at({resolution}) is not a {type(plain).__name__} as timm builds it')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        taken.eval()(torch.empty(1, 3, resolution, resolution, device='meta'))
    return counter.get_total_flops() // 2


def check_inference(model: nn.Module, device: str) -> None:
    """Check every resolution against the network that is taken out."""
    model.eval()
    if device != 'meta':
        randomize_bn(model)
    with torch.inference_mode():
        for r in model.resolutions:
            x = torch.randn(BATCH_SIZE, 3, r, r, device=device)
            logits = model(x)
            if model.resolution != r or logits.shape != (BATCH_SIZE, model.num_classes or model.num_features):
                raise Failure(f'logits at {r} have the shape {tuple(logits.shape)}')
            if device == 'meta':
                continue
            taken = model.at(r)
            expected = taken(x)
            if not logits.isfinite().all() or not torch.equal(logits, expected):
                raise Failure(f'at({r}) differs from the switched network')
            if r == model.resolutions[-1] and torch.equal(logits, model.at(model.resolutions[0])(x)):
                raise Failure('the resolutions do not differ')
            if r == model.resolutions[-1] and can_reparameterize(taken):
                difference = (reparameterize_model(taken)(x) - expected).abs().max() / expected.abs().max()
                if not difference <= 1e-4:
                    raise Failure(f'at({r}) differs from its re-parameterized network by {difference:.1e}')


def check_training(model: nn.Module, plain: nn.Module, device: str) -> str:
    """Take one step and return a note on parameters that have no gradient in timm either."""
    task = MultiResolutionTask(model.train(), verbose=False)
    size = model.resolutions[0]
    images = torch.randn(BATCH_SIZE, 3, size, size, device=device)
    loss = task(images, torch.zeros(BATCH_SIZE, dtype=torch.long, device=device))['loss']
    loss.backward()
    if device != 'meta' and not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        raise Failure('a gradient is not finite')
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    without = without_gradient(model)
    if not without:
        return ''
    outputs = plain.train()(torch.empty(BATCH_SIZE, 3, size, size, device='meta'))
    sum(t.sum() for t in tree_leaves(outputs)).backward()
    private = [name for name, m in model.named_modules() if isinstance(m, PrivateBN)]
    expected = without_gradient(plain)
    expected |= {f'{name}.{r}.{key}' for name in private for r in model.resolutions for key in ('weight', 'bias')
                 if f'{name}.{key}' in expected}
    if without - expected:
        raise Failure(f'no gradient at {summarize(without - expected)}')
    return f'no gradient in timm either: {summarize(without)}'


def check_new_classifier(model: nn.Module) -> None:
    model.reset_classifier(10)
    private = {id(bn) for m in model.modules() if isinstance(m, PrivateBN) for bn in m.children()}
    shared = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and id(m) not in private]
    if shared:
        raise Failure(f'reset_classifier leaves BN layers shared: {summarize(shared)}')


def create(name: str, device: str) -> nn.Module:
    with torch.device(device):
        return timm.create_model(name)


def rs_name(base: str) -> str:
    return PREFIX + base


def randomize_bn(model: nn.Module) -> None:
    """Make the resolutions differ, as training would; scales below 1 keep deep untrained networks finite."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            if module.affine:
                nn.init.uniform_(module.weight, 0.1, 0.5)
                nn.init.normal_(module.bias, std=0.1)


def can_reparameterize(model: nn.Module) -> bool:
    names = ('fuse', 'reparameterize', 'switch_to_deploy')  # that timm's reparameterize_model looks for
    return any(hasattr(m, name) for m in model.modules() for name in names)


def without_gradient(model: nn.Module) -> Set[str]:
    return {name for name, p in model.named_parameters() if p.grad is None}


def summarize(names: Any) -> str:
    names: List[str] = sorted(names)
    return ', '.join(names[:2]) + (f' and {len(names) - 2} more' if len(names) > 2 else '')


if __name__ == '__main__':
    sys.exit(main())
