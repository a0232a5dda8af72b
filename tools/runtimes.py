#!/usr/bin/env python3
"""Run exported files in every runtime that is installed, into results/runtimes.csv and the table of docs/runtimes.md

For each runtime, form of the file and size: whether it loads, the largest difference of logits from the network in
PyTorch, the share of photographs with the same top-1, the CPU time as a multiple of what this runtime takes for its own
plain file of that size and precision, and the file's size as a multiple of the plain one's. Each file is run in a
process of its own, by tools/_runtimes.py. Rows of runtimes that are not installed, or not named, stay as they are.

    python tools/runtimes.py --data-dir DIR
"""
import argparse
import copy
import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from _runtimes import RUNTIMES, installed
from _table import write_json, write_rows
from tqdm import tqdm

import timm_rs
from timm_rs.export import export_executorch, export_int8, export_litert, export_resolution, export_switchable
from timm_rs.export.describe import describe
from timm_rs_runtime.files import atomic_write
from timm_rs_runtime.format import preprocessing_of
from timm_rs_runtime.images import find_images, split_folder

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / 'results' / 'runtimes.csv'
PAGE = ROOT / 'docs' / 'runtimes.md'
MARKS = '<!-- table: python tools/runtimes.py -->', '<!-- end of table -->'
SUFFIXES = {'ExecuTorch': '.pte', 'LiteRT': '.tflite'}  # the others run ONNX files
COLUMNS = ('runtime', 'version', 'file', 'size', 'images', 'problem', 'error', 'same_top1', 'latency', 'file_size')
MINUTES = 20  # of a file in a runtime, for one that compiles on a busy machine


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    add = parser.add_argument
    add('--data-dir', required=True, metavar='DIR', help='folder of photographs with train/ and val/')
    add('--model', default='rs_resnet10t.imagenette', metavar='NAME', help='pretrained model (default: %(default)s)')
    add('--images', default=64, type=int, metavar='N', help='photographs (default: %(default)s)')
    add('--runtimes', nargs='+', default=list(RUNTIMES), choices=RUNTIMES, metavar='NAME', help='default: all')
    add('--output', default=OUTPUT, type=Path, metavar='FILE', help='table to write (default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = timm.create_model(args.model, pretrained=True).eval()
    runtimes = [runtime for runtime in args.runtimes if installed(runtime)]
    rows = [row for row in read_rows(args.output) if row['runtime'] not in runtimes]
    with tempfile.TemporaryDirectory() as folder:
        images = find_images(split_folder(args.data_dir, 'train'), args.images)
        files = write_onnx(model, folder, images) if set(runtimes) - set(SUFFIXES) else {}
        if 'ExecuTorch' in runtimes:
            files.update(write_programs(model, folder, images))
        if 'LiteRT' in runtimes:
            files.update(write_litert(model, folder))
        expected = write_inputs(model, folder, find_images(split_folder(args.data_dir, 'validation'), args.images))
        for runtime in tqdm(runtimes, disable=None):
            for form, (path, plain) in files.items():
                if path.endswith(SUFFIXES.get(runtime, '.onnx')):
                    rows += run(runtime, form.partition('.')[0], path, plain, folder, expected)
                    rows.sort(key=lambda row: list(RUNTIMES).index(row['runtime']))
                    write_rows(args.output, COLUMNS, rows)
    write_json(args.output.with_suffix('.json'), dict(
        command=shlex.join(['python', 'tools/runtimes.py', *sys.argv[1:]]),
        versions=dict(timm=timm.__version__, torch=torch.__version__, python=platform.python_version()),
        timm_rs=timm_rs.__version__, model=args.model))
    if args.output == OUTPUT:
        write_page(rows)


def read_rows(path):
    """Return the rows of a table, without empty cells."""
    if not path.exists():
        return []
    with open(path, newline='', encoding='utf-8') as f:
        return [{column: text for column, text in row.items() if text} for row in csv.DictReader(f)]


def write_onnx(model, folder, images):
    """Return for each form the file for all sizes, and the plain file of each size that it is compared with."""
    def paths(name):
        return f'{folder}/{name}.onnx', {r: f'{folder}/{name}-{r}.onnx' for r in model.resolutions}

    files = {}
    for precision in ('float32', 'fp16'):
        files[precision] = paths(precision)
        export_switchable(model, files[precision][0], precision=precision)
        files[f'{precision}, split'] = f'{folder}/{precision}-split.onnx', files[precision][1]
        export_switchable(model, files[f'{precision}, split'][0], precision=precision, split_batch_norm=True)
    files['int8'] = paths('int8')
    export_int8(model, files['int8'][0], images)
    files['int8, qoperator'] = f'{folder}/qoperator.onnx', files['int8'][1]
    export_int8(model, files['int8, qoperator'][0], images, int8_format='qoperator')
    for r in model.resolutions:
        export_resolution(model, r, files['float32'][1][r])
        export_resolution(model, r, files['fp16'][1][r], precision='fp16')
        export_int8(of_one_size(model, r), files['int8'][1][r], images)
    return files


def write_programs(model, folder, images):
    """Return as write_onnx the programs of ExecuTorch; a plain program in float32 has its BatchNorms fused."""
    from timm_rs.export.batch_norm import fuse_batch_norms  # needs executorch
    from timm_rs.export.executorch import lower
    from timm_rs.export.trace import example_images

    files = {f'{name}.pte': (f'{folder}/{name}.pte', {r: f'{folder}/{name}-{r}.pte' for r in model.resolutions})
             for name in ('float32', 'int8')}
    (float32, plain), (int8, plain_int8) = files.values()
    export_executorch(model, float32)
    export_executorch(model, int8, images)
    for r in model.resolutions:
        x = example_images(model, r, 1)
        lower({r: torch.export.export(fuse_batch_norms(model.at(r), x), (x,))}, {}, plain[r])
        export_executorch(of_one_size(model, r), plain_int8[r], images)
    return files


def write_litert(model, folder):
    """Return as write_onnx the file of LiteRT; a plain file has its BatchNorms fused."""
    from timm_rs.export.batch_norm import reduce_batch_norms  # needs litert-torch
    from timm_rs.export.litert import convert, save

    path, plain = f'{folder}/float32.tflite', {r: f'{folder}/float32-{r}.tflite' for r in model.resolutions}
    export_litert(model, path)
    for r in model.resolutions:
        save(convert({r: model.at(r)}, 1, reduce_batch_norms), {}, plain[r])
    return {'float32.tflite': (path, plain)}


def of_one_size(model, resolution):
    return timm_rs.make_switchable(copy.deepcopy(model.at(resolution)), (resolution,))


def write_inputs(model, folder, images):
    """Write the photographs as inputs of each size, and return the logits of the network in PyTorch."""
    preprocess = preprocessing_of(describe(model, model.resolutions))
    inputs = {r: np.stack([preprocess(image, r) for image in images]) for r in model.resolutions}
    np.savez(os.path.join(folder, 'inputs.npz'), **{f'inputs_{r}': x for r, x in inputs.items()})
    with torch.inference_mode():
        return {r: model.at(r)(torch.from_numpy(x)).numpy() for r, x in inputs.items()}


def run(runtime, form, path, plain, folder, expected):
    """Return the rows of a file in a runtime."""
    row = dict(runtime=runtime, version=installed(runtime), file=form)
    if runtime == 'MNN' and 'split' not in form:
        return [dict(row, problem="MNN's converter crashes on it")]
    job = dict(runtime=runtime, file=path, sizes=list(expected), plain=plain)
    try:
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name('_runtimes.py'), os.path.join(folder, 'inputs.npz')],
            input=json.dumps(job), capture_output=True, text=True, timeout=60 * MINUTES, cwd=folder,
            env=dict(os.environ, OMP_NUM_THREADS='1', PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"))
        lines = done.stdout.strip().splitlines()
    except subprocess.TimeoutExpired:
        return [dict(row, problem=f'nothing within {MINUTES} minutes')]
    if done.returncode:
        text = (done.stdout + done.stderr).strip().splitlines()[-1:]
        return [dict(row, problem=short(' '.join([f'exit {done.returncode}', *text])))]
    rows = []
    for size, found in sorted(json.loads(lines[-1]).items(), key=lambda item: -int(item[0])):
        row = dict(row, size=int(size))
        if 'problem' in found:
            rows.append(dict(row, problem=short(found['problem'])))
            continue
        logits = np.array(found['logits'])
        reference = expected[int(size)][:len(logits)]
        rows.append(dict(
            row, images=len(logits), error=f'{np.abs(logits - reference).max():.1e}',
            same_top1=f'{100 * (logits.argmax(1) == reference.argmax(1)).mean():.1f}'))
        if int(size) in plain:
            rows[-1]['file_size'] = f'{os.path.getsize(path) / os.path.getsize(plain[int(size)]):.3f}'
        if 'latency' in found:
            rows[-1]['latency'] = f"{found['latency']:.2f}"
    return rows


def short(text):
    return ' '.join(text.split())[:160]


def write_page(rows):
    """Put the table, a line per runtime and file, between the marks of the page."""
    lines = ['| runtime | version | file | runs at | largest error | same top-1, % | latency | file size |',
             '|---|---|---|---|---|---|---|---|']
    for key in dict.fromkeys((row['runtime'], row['file']) for row in rows):
        some = [row for row in rows if (row['runtime'], row['file']) == key]
        right = [row for row in some if 'error' in row]
        cells = [key[0], some[0]['version'], key[1]]
        if right:
            worst = max(float(row['error']) for row in right)
            cells += [', '.join(str(row['size']) for row in right), f'{worst:.1e}',
                      *(spread(right, column) for column in ('same_top1', 'latency', 'file_size'))]
        else:
            cells += ['does not load', *4 * ['']]
        lines.append(f"| {' | '.join(cells)} |")
    before, rest = PAGE.read_text(encoding='utf-8').split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    with atomic_write(PAGE, overwrite=True) as f:
        f.write('\n'.join([before + MARKS[0], *lines, MARKS[1] + after]))


def spread(rows, column):
    """Return the range of a column."""
    values = sorted((row[column] for row in rows if column in row), key=float)
    return ' to '.join(dict.fromkeys((values[0], values[-1]))) if values else ''


if __name__ == '__main__':
    main()
