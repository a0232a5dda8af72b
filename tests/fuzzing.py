"""Mutated files, and how the commands that read them answer

    python tests/fuzzing.py --cases 3000 --output results/fuzz.json

Checkpoints, model folders, ONNX files, cascades, configurations, label files and images are mutated by a seed: bytes
are flipped, cut, copied and inserted, values of JSON and YAML replaced. A command that reads one has to answer, or to
fail with one line and exit status 1 or 2. It must not show a traceback, run for more than LIMIT seconds, leave anything
half-written, or print or save a value that is not finite. Commands run in worker processes: a library that crashes on a
damaged file takes its worker along, which is counted by itself.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Tuple

LIMIT = 20  # seconds
KINDS = ('checkpoint', 'safetensors', 'config', 'onnx', 'metadata', 'cascade', 'yaml', 'labels', 'image')
FORMATS = ('jpg', 'png', 'webp', 'gif', 'tif')
VALUES = (
    None, True, -1, 0, 1, 3.5, 1e308, 10 ** 30, float('nan'), float('inf'), '', 'x', 'x' * 5000, 'nan', [], [0], {},
    {'a': 1}, [[[[[[1]]]]]], '2001-99-99', 'hf-hub:a/b', '/nowhere/file', [1] * 2000)

Case = Tuple[str, int]  # kind and seed


def make_originals(folder: Path) -> None:
    """Write a small network in every form, images, and what else the commands read."""
    import onnx
    import timm
    import torch
    import yaml
    from PIL import Image

    import timm_rs  # noqa: F401  registers the models
    from timm_rs.export import export_switchable
    from timm_rs.hub.convert import save_model

    torch.manual_seed(0)
    model = timm.create_model('rs_test_resnet', resolutions=(48, 32), num_classes=3).eval()
    args = argparse.Namespace(
        model='rs_test_resnet', resolutions=(48, 32), num_classes=3, in_chans=None, gp=None, bn_eps=None,
        model_kwargs={}, mean=None, std=None, interpolation='', crop_pct=None)
    checkpoint = dict(state_dict=model.state_dict(), args=args, epoch=1, arch='rs_test_resnet')
    torch.save(checkpoint, folder / 'checkpoint.pth.tar')
    save_model(model, str(folder / 'config'), ['cat', 'dog', 'owl'])
    shutil.copy(folder / 'config' / 'model.safetensors', folder / 'weights.safetensors')
    export_switchable(model, str(folder / 'model.onnx'), ['cat', 'dog', 'owl'])
    metadata = {p.key: p.value for p in onnx.load(folder / 'model.onnx').metadata_props}
    (folder / 'metadata.json').write_text(json.dumps({k: json.loads(v) for k, v in metadata.items()}))
    (folder / 'cascade.json').write_text(json.dumps(dict(thresholds={'32': 0.4, '48': 0.}, average=False)))
    flags = dict(
        model='rs_test_resnet', resolutions=[48, 32], epochs=3, lr=0.1, opt='sgd', batch_size=8, mean=[0.5] * 3,
        amp=False, reprob=0.1, log_interval=10, val_interval=1, sched='cosine', model_kwargs=dict(num_classes=3))
    (folder / 'config.yaml').write_text(yaml.safe_dump(flags))
    (folder / 'labels.txt').write_text('cat\ndog\nowl\n')
    pixels = random.Random(0).randbytes(3 * 60 * 40)
    for ending in FORMATS:
        Image.frombytes('RGB', (60, 40), pixels).save(folder / f'image.{ending}')


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Flip, cut, copy or insert some bytes."""
    data = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        at = generator.randrange(max(1, len(data)))
        length = generator.choice((1, 2, 8, 64))
        how = generator.randrange(5)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << generator.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at:at + length]
        elif how == 3:
            data[at:at] = generator.randbytes(length)
        else:
            data[at:at] = data[:length]
    return bytes(data)


def mutate_value(value: Any, generator: random.Random) -> Any:
    """Replace, remove or add a value somewhere in what JSON or YAML holds."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        value = dict(value)
        key = generator.choice(sorted(value, key=str))
        if generator.random() < 0.15:
            del value[key]
        elif generator.random() < 0.1:
            value[generator.choice(('', 'x', 'pretrained', 'file', 'url'))] = generator.choice(VALUES)
        else:
            value[key] = mutate_value(value[key], generator)
        return value
    if isinstance(value, list) and value and generator.random() < 0.5:
        value = list(value)
        value[generator.randrange(len(value))] = generator.choice(VALUES)
        return value
    return generator.choice(VALUES)


def mutate_file(path: Path, generator: random.Random) -> None:
    """Mutate a file, one of text by its values or its bytes."""
    import yaml

    if path.suffix in ('.json', '.yaml') and generator.random() < 0.75:
        load, dump = (json.loads, json.dumps) if path.suffix == '.json' else (yaml.safe_load, yaml.safe_dump)
        path.write_text(dump(mutate_value(load(path.read_text()), generator)))
    else:
        path.write_bytes(mutate(path.read_bytes(), generator))


def prepare(case: Case, originals: Path, folder: Path) -> Tuple[str, List[str]]:
    """Write the mutated file of a case and return the program and arguments that read it."""
    kind, seed = case
    generator = random.Random(f'{kind} {seed}')
    if kind == 'config':
        shutil.copytree(originals / 'config', folder / 'model')
        mutate_file(folder / 'model' / 'config.json', generator)
        return 'timm-rs', ['convert', str(folder / 'model'), '--output', str(folder / 'out')]
    name = dict(
        checkpoint='checkpoint.pth.tar', safetensors='weights.safetensors', onnx='model.onnx',
        metadata='metadata.json', cascade='cascade.json', yaml='config.yaml', labels='labels.txt',
        image=f'image.{generator.choice(FORMATS)}')[kind]
    file = folder / name
    shutil.copy(originals / name, file)
    mutate_file(file, generator)
    model, image = str(originals / 'model.onnx'), str(originals / 'image.png')
    if kind == 'metadata':
        write_metadata(originals / 'model.onnx', file, folder / 'model.onnx')
        file = folder / 'model.onnx'
    if kind == 'yaml':
        return 'train_rs.py', ['--config', str(file), '--data-dir', str(folder)]
    return 'timm-rs', dict(
        checkpoint=['convert', str(file), '--output', str(folder / 'out')],
        safetensors=['convert', str(file), '--model', 'rs_test_resnet', '--output', str(folder / 'out')],
        labels=['convert', str(originals / 'config'), '--label-names', str(file), '--output', str(folder / 'out')],
        onnx=['predict', image, '--model', str(file), '--json', '--threads', '1'],
        metadata=['predict', image, '--model', str(file), '--json', '--threads', '1'],
        cascade=['predict', image, '--model', model, '--cascade', str(file), '--json', '--threads', '1'],
        image=['predict', str(file), '--model', model, '--json', '--threads', '1'],
    )[kind]


def write_metadata(source: Path, values: Path, target: Path) -> None:
    """Write an ONNX file with other metadata; what is not JSON becomes one value."""
    import onnx

    model = onnx.load(source)
    del model.metadata_props[:]
    text = values.read_text(errors='replace')
    try:
        held = json.loads(text)
    except ValueError:
        held = text
    if not isinstance(held, dict):
        held = dict(resolutions=held)
    for key, value in held.items():
        model.metadata_props.add(key=key, value=json.dumps(value).encode('utf-8', 'replace').decode())
    onnx.save(model, target)


def run(program: str, argv: List[str]) -> Tuple[Any, str, str]:
    """Run a program in this process and return its exit status and what it printed."""
    from timm_rs.train.options import parse_args
    from timm_rs_cli import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            (main if program == 'timm-rs' else parse_args)(argv)
        except SystemExit as e:
            code = e.code
        except Exception as e:
            return 'exception', out.getvalue(), f'Traceback: {type(e).__name__}: {e}'
    return code or 0, out.getvalue(), err.getvalue()


def judge(code: Any, out: str, err: str, argv: List[str], folder: Path) -> Tuple[str, str]:
    """Return 'answered' or 'refused', or what is wrong, and why."""
    output = folder / 'out'
    if any('.part-' in str(p) for p in folder.rglob('*')):
        return 'half-written', str(list(folder.rglob('*')))
    if 'Traceback' in err or code not in (0, 1, 2):
        return 'traceback', f'{code}: {err[-2000:]}'
    if code:
        errors = [line for line in err.splitlines() if 'error: ' in line]
        errors += [line for line in out.splitlines() if '"error"' in line]
        if len(errors) != 1:
            return 'not one line', f'{err}\n{out}'
        return ('half-written', str(output)) if output.exists() else ('refused', errors[0])
    if argv[0] == 'convert':
        return judge_folder(output)
    if argv[0] == 'predict':
        rows = [json.loads(line, parse_constant=lambda name: name) for line in out.splitlines()]
        probabilities = [row['probability'] for answer in rows for row in answer['top']]
        if not probabilities or not all(isinstance(p, float) and 0 <= p <= 1 for p in probabilities):
            return 'not finite', out
    return 'answered', ''


def judge_folder(output: Path) -> Tuple[str, str]:
    """Judge a folder that timm-rs convert wrote."""
    import safetensors.torch

    weights = safetensors.torch.load_file(output / 'model.safetensors')
    wrong = [name for name, value in weights.items() if not value.double().isfinite().all()]
    return ('not finite', str(wrong)) if wrong else ('answered', '')


def work(connection: Any, originals: str) -> None:
    """Run cases until there are no more, in a separate process."""
    import warnings

    import torch

    import timm_rs  # noqa: F401
    import timm_rs.hub.convert  # noqa: F401

    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    connection.send(None)
    while True:
        case = connection.recv()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            program, argv = prepare(case, Path(originals), folder)
            before = set(os.listdir('.'))
            verdict = judge(*run(program, argv), argv, folder)
            if set(os.listdir('.')) - before:
                verdict = 'half-written', f'new files: {set(os.listdir(".")) - before}'
        connection.send(verdict)


class Worker:
    """A process that runs cases; a new one takes the place of one that has crashed or hangs."""

    def __init__(self, originals: Path):
        self.originals = originals
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context('fork')  # which need not import torch again
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, str(self.originals)), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(300):
            raise TimeoutError('The worker does not start.')
        self.connection.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def __call__(self, case: Case) -> Tuple[str, str]:
        self.connection.send(case)
        try:
            if self.connection.poll(LIMIT):
                return self.connection.recv()
            verdict = 'hang', f'more than {LIMIT} s'
        except EOFError:
            self.process.join()
            verdict = 'crashed in a library', f'exit status {self.process.exitcode}'
        self.stop()
        self.start()
        return verdict


def fuzz(count: int, first: int = 0) -> Dict[str, Any]:
    """Run cases, the kinds in turn.

    Returns:
        'counts': How many cases of each kind ended in which way; 'wrong': The cases that are faults, with reasons.
    """
    counts = {kind: Counter() for kind in KINDS}
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        originals = Path(name)
        make_originals(originals)
        worker = Worker(originals)
        try:
            for i in range(count):
                case = KINDS[i % len(KINDS)], first + i // len(KINDS)
                verdict, why = worker(case)
                counts[case[0]][verdict] += 1
                if verdict not in ('answered', 'refused', 'crashed in a library'):
                    wrong.append((*case, verdict, why))
        finally:
            worker.stop()
    return dict(counts={k: dict(sorted(c.items())) for k, c in counts.items()}, wrong=wrong)


def main() -> None:
    import onnxruntime
    import PIL
    import safetensors
    import torch

    from timm_rs_runtime.files import atomic_write

    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    parser.add_argument('--cases', type=int, default=3000, metavar='N', help='mutated files (default: %(default)s)')
    parser.add_argument('--first', type=int, default=0, metavar='SEED', help='first seed (default: %(default)s)')
    parser.add_argument('--output', type=Path, metavar='FILE', help='JSON file to write')
    args = parser.parse_args()
    start = time.monotonic()
    found = fuzz(args.cases, args.first)
    for case in found['wrong']:
        print(*case, sep=': ')
    total = sum((Counter(c) for c in found['counts'].values()), Counter())
    print(f"{args.cases} cases: {', '.join(f'{n} {verdict}' for verdict, n in sorted(total.items()))}")
    if args.output:
        versions = dict(python=platform.python_version(), torch=torch.__version__, onnxruntime=onnxruntime.__version__,
                        pillow=PIL.__version__, safetensors=safetensors.__version__)
        records = dict(command=' '.join(['python', 'tests/fuzzing.py', *sys.argv[1:]]), versions=versions, total=total,
                    counts=found['counts'], seconds=round(time.monotonic() - start))
        with atomic_write(args.output, overwrite=True) as f:
            f.write(json.dumps(records, indent=2) + '\n')
    sys.exit(bool(found['wrong']))


if __name__ == '__main__':
    main()
