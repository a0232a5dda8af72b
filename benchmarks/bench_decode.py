#!/usr/bin/env python3
"""From photograph to logits: JPEGs decoded at the scale that a size needs, against all of their pixels

--measure logits: photographs of --data-dir are enlarged to 4000 x 3000, 1600 x 1200 and 500 x 375 px by bicubic
interpolation, get noise of 4 levels, which no interpolation makes, and become JPEGs of quality 90 in memory.
timm_rs_runtime.Session answers them one by one at 224 and 96 px, in ONNX Runtime, batch 1, random weights, with
decode='scaled', 'fast' and 'exact'. Decoders take turns (A B A B ...); n: 1 load, 5 rounds. A ratio is the median
within a round.

--measure decoders: the input for 96 px of these JPEGs, against torchvision, and simplejpeg if it is installed.
--measure ahead: many files, the next ones read while the network runs, against one after the other.
--measure cascade: 10 photographs at 96 px, of which 2 or 5 go on to 224 px, decoded for 96 px and again where they go
on, against decoded once for 224 px.
--measure memory: most memory of a process that answers one photograph.

--measure accuracy, with --model: top-1 accuracy of the trained network in this file on the photographs, at each of its
sizes, how many answers are those of exact, how far the pixels of its input are from exact's (rms, of 255 levels), and
how many decoded pixels a side has for each one after resizing. 'noise' is exact plus -1, 0 or 1 level at random. The
photographs are as they are, or enlarged to a shorter side of --side px, with noise of --noise levels.

    python benchmarks/bench_decode.py --data-dir imagenette --clock cpu
    python benchmarks/bench_decode.py --data-dir imagenette --measure accuracy --model rs_resnet10t.onnx --output FILE
"""
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from _common import add_timing_arguments, create_parser, measure, median, print_table, ratio, write_results
from PIL import Image
from torchvision.transforms import v2 as transforms

import timm_rs  # noqa: F401  registers rs_*
from timm_rs.export.export import export_switchable
from timm_rs_runtime import Preprocessing, Session
from timm_rs_runtime.fitting import label_folders
from timm_rs_runtime.images import find_images, open_image, split_folder
from timm_rs_runtime.predict import Predictor
from timm_rs_runtime.preprocess import MARGINS
from timm_rs_runtime.session import IMAGES_AT_A_TIME, ahead

SIZES = ((4000, 3000), (1600, 1200), (500, 375))
RESOLUTIONS = (224, 96)
NETWORKS = ('mobilenetv2_100', 'resnet18')
PHOTOGRAPHS = 2
BATCH = 16


def main():
    parser = create_parser(__doc__)
    add_timing_arguments(parser, builds=1, rounds=5)
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='photographs, in class folders')
    parser.add_argument('--split', default='validation', metavar='NAME', help='split of DIR (default: %(default)s)')
    parser.add_argument('--measure', default='logits', choices=MEASURES, help='default: %(default)s')
    parser.add_argument('--model', metavar='FILE.onnx', help='the trained network whose accuracy is measured')
    parser.add_argument('--most', type=int, metavar='N', help='photographs that are answered (default: all)')
    parser.add_argument('--side', type=int, default=0, metavar='N', help='enlarge them to a shorter side of N px')
    parser.add_argument('--noise', type=float, default=4, metavar='X', help='noise of enlarged ones (default: 4)')
    args = parser.parse_args()
    rows = MEASURES[args.measure](args)
    print_table([key for key in rows[0] if not key.endswith('_range')], rows)
    write_results(args, rows)


def enlarged(path, size, noise):
    """Return an enlarged photograph as the bytes of a JPEG."""
    image = open_image(path).resize(size, Image.Resampling.BICUBIC)
    if noise:
        pixels = np.asarray(image) + np.random.default_rng(0).normal(0, noise, (*size[::-1], 3))
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=90)
    return file.getvalue()


def photographs_of(args, sizes=SIZES):
    """Return JPEGs by size."""
    paths = find_images(split_folder(args.data_dir, args.split), PHOTOGRAPHS)
    return {size: [enlarged(path, size, 4) for path in paths] for size in sizes}


def export(folder, names=NETWORKS):
    """Write networks with random weights."""
    for name in names:
        torch.manual_seed(0)
        export_switchable(timm.create_model(f'rs_{name}', resolutions=RESOLUTIONS).eval(), f'{folder}/{name}.onnx')


def compare(runs, args, case, first, second, unit):
    """Return a row: the medians of two contenders, and their ratio."""
    found = ratio(runs, f'{first} {case}', f'{second} {case}')
    return {
        'case': case, f'{first}_ms': median(runs, f'{first} {case}', unit),
        f'{second}_ms': median(runs, f'{second} {case}', unit), 'ratio': found['ratio'],
        'n': f'{args.builds} x {args.rounds}'}


def compare_time(args):
    """Return a row for each network, photograph and size."""
    photographs = photographs_of(args)
    cases = [(name, size, resolution) for name in NETWORKS for size in SIZES for resolution in RESOLUTIONS]
    with tempfile.TemporaryDirectory() as folder:
        export(folder)

        def build():
            sessions = {
                (name, decode): Session(f'{folder}/{name}.onnx', args.threads, decode=decode)
                for name in NETWORKS for decode in MARGINS}
            return {
                f'{decode} {case}': lambda s=sessions[case[0], decode], size=case[1], r=case[2]: [
                    s.predict(photograph, r) for photograph in photographs[size]]
                for case in cases for decode in MARGINS}

        runs = measure(build, args, warmup=1)
    rows = []
    for case in cases:
        name, (width, height), resolution = case
        row = dict(case=f'{name}, {width}x{height} at {resolution} px', exact_ms=median(
            runs, f'exact {case}', 1e-3 * PHOTOGRAPHS))
        for decode in ('scaled', 'fast'):
            found = ratio(runs, f'{decode} {case}', f'exact {case}')
            row.update({
                f'{decode}_ms': median(runs, f'{decode} {case}', 1e-3 * PHOTOGRAPHS), decode: found['ratio'],
                f'{decode}_range': found['range']})
        rows.append(dict(row, n=f'{args.builds} x {args.rounds}'))
    return rows


def compare_decoders(args):
    """Return a row for each photograph and other decoder."""
    photographs = photographs_of(args)
    size, resize = RESOLUTIONS[-1], int(RESOLUTIONS[-1] / 0.875)
    ours = Preprocessing((0.5,) * 3, (0.5,) * 3, decode='scaled')
    finish = transforms.Compose([
        transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size),
        transforms.ToDtype(torch.float32, scale=True), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def by_torchvision(jpeg):
        data = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
        return finish(torchvision.io.decode_image(data, torchvision.io.ImageReadMode.RGB))

    others = {'torchvision': by_torchvision}
    try:
        import simplejpeg
    except ImportError:
        print('simplejpeg is not installed.')
    else:
        for name, least in (('simplejpeg', 0), ('simplejpeg_scaled', 2 * resize)):
            others[name] = lambda jpeg, least=least: ours(
                Image.fromarray(simplejpeg.decode_jpeg(jpeg, 'RGB', min_height=least, min_width=least)), size)
    contenders = dict(others, timm_rs=lambda jpeg: ours(jpeg, size))
    runs = measure(lambda: {
        f'{name} {width}x{height}': lambda call=call, jpegs=jpegs: list(map(call, jpegs))
        for (width, height), jpegs in photographs.items() for name, call in contenders.items()}, args, warmup=1)
    return [
        dict(case=f'{width}x{height} to {size} px', other=name, timm_rs_ms=row['timm_rs_ms'],
             other_ms=row[f'{name}_ms'], ratio=row['ratio'], n=row['n'])
        for width, height in photographs for name in others
        for row in [compare(runs, args, f'{width}x{height}', 'timm_rs', name, 1e-3 * PHOTOGRAPHS)]]


def compare_ahead(args):
    """Return a row for each way to answer many files, photograph and size."""
    with tempfile.TemporaryDirectory() as folder:
        export(folder, NETWORKS[:1])
        paths = {}
        for (width, height), jpegs in photographs_of(args, SIZES[1:2]).items():
            files = [Path(folder, f'{width}x{height}_{i}.jpg') for i in range(2 * IMAGES_AT_A_TIME)]
            for i, path in enumerate(files):
                path.write_bytes(jpegs[i % len(jpegs)])
            paths[f'{width}x{height}'] = files

        def build():
            calls = {}
            for threads in (1, None):
                session = Session(f'{folder}/{NETWORKS[0]}.onnx', threads)
                for case, files in paths.items():
                    for r in RESOLUTIONS:
                        name, one = f'{case} at {r} px, {threads or "all"} threads', Predictor(session, r)
                        calls.update({
                            f'in_turn command, {name}': lambda p=one, f=files: list(map(p, f)),
                            f'ahead command, {name}': lambda p=one, f=files: list(map(p, ahead(map(p.read, f)))),
                            f'in_turn predict, {name}': lambda s=session, f=files, r=r: [
                                s.predict(f[i:i + IMAGES_AT_A_TIME], r) for i in range(0, len(f), IMAGES_AT_A_TIME)],
                            f'ahead predict, {name}': lambda s=session, f=files, r=r: s.predict(f, r)})
            return calls

        runs = measure(build, args, warmup=1)
    cases = [name.removeprefix('ahead ') for name in runs[0] if name.startswith('ahead ')]
    return [compare(runs, args, case, 'ahead', 'in_turn', 1e-3 * 2 * IMAGES_AT_A_TIME) for case in cases]


def compare_cascade(args):
    """Return a row for each photograph and share of images that go on."""
    photographs = photographs_of(args)
    large, small = RESOLUTIONS
    with tempfile.TemporaryDirectory() as folder:
        export(folder, NETWORKS[:1])

        def answer(session, jpegs, decoded_for, share):
            for i in range(10):
                image = session.read(jpegs[i % len(jpegs)], decoded_for)
                session.predict(image, small)
                if i < share:
                    session.predict(image, large)  # decoded again if it has too few pixels

        def build():
            session = Session(f'{folder}/{NETWORKS[0]}.onnx', args.threads)
            return {
                f'{name} {width}x{height}, {share} of 10 go on': lambda jpegs=jpegs, r=r, share=share: answer(
                    session, jpegs, r, share)
                for (width, height), jpegs in photographs.items() for share in (2, 5)
                for name, r in (('again', small), ('once', large))}

        runs = measure(build, args, warmup=1)
    cases = [name.removeprefix('once ') for name in runs[0] if name.startswith('once ')]
    return [compare(runs, args, case, 'again', 'once', 1e-2) for case in cases]


def compare_memory(args):
    """Return a row for each photograph and way of decoding."""
    program = (
        'import sys; from timm_rs_runtime import Session\n'
        'def most(): return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))\n'
        'session = Session(sys.argv[1], 1, decode=sys.argv[3]); before = most()\n'
        'session.predict(sys.argv[2], 224); print(before, most())')
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        export(folder, NETWORKS[:1])
        for (width, height), (jpeg, *_) in photographs_of(args).items():
            Path(folder, 'a.jpg').write_bytes(jpeg)
            for decode in MARGINS:
                command = [sys.executable, '-c', program, f'{folder}/{NETWORKS[0]}.onnx', f'{folder}/a.jpg', decode]
                before, after = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
                rows.append(dict(
                    case=f'{width}x{height} at 224 px', decode=decode, process_mb=round(after / 1024, 1),
                    request_mb=round((after - before) / 1024, 1)))
    return rows


def compare_accuracy(args):
    """Return a row for each size and way of decoding; and for noise, which shows how little changes answers."""
    sessions = {decode: Session(args.model, args.threads, decode=decode) for decode in MARGINS}
    exact = sessions['exact']
    crop_pct, std = exact.preprocessing.crop_pct, np.array(exact.std, np.float32)[:, None, None]
    paths, labels = label_folders(split_folder(args.data_dir, args.split), exact, args.most)
    noise = np.random.default_rng(0)
    found = {(r, decode): [] for r in exact.resolutions for decode in (*MARGINS, 'noise')}
    for start in range(0, len(paths), BATCH):
        batch = paths[start:start + BATCH]
        if args.side:
            batch = [enlarged(path, to_side(args.side, *open_image(path).size), args.noise) for path in batch]
        whole = list(map(exact.read, batch))  # once: all its sizes decode the same
        for r in exact.resolutions:
            inputs = np.stack([exact.preprocess(image, r) for image in whole])
            for decode in (*MARGINS, 'noise'):
                opened, changed = whole, inputs
                if decode in ('scaled', 'fast'):
                    opened = [sessions[decode].read(photograph, r) for photograph in batch]
                    changed = np.stack([sessions[decode].preprocess(image, r) for image in opened])
                elif decode == 'noise':
                    changed = inputs + noise.integers(-1, 2, inputs.shape).astype(np.float32) / (255 * std)
                answers = exact.predict(changed).argmax(-1)
                ratios = [min(image.size) * crop_pct / r for image in opened]
                errors = ((255 * std * (changed - inputs)) ** 2).mean((1, 2, 3))
                found[r, decode] += zip(answers, ratios, errors)
    rows = []
    for (r, decode), values in found.items():
        answers, ratios, errors = map(np.array, zip(*values))
        reference = np.array([answer for answer, *_ in found[r, 'exact']])
        rows.append(dict(
            resolution=r, decode=decode, images=len(paths), pixels_per_side=round(float(np.median(ratios)), 2),
            rms_levels=round(float(errors.mean()) ** 0.5, 2), top1=round(100 * float((answers == labels).mean()), 2),
            agreement=round(100 * float((answers == reference).mean()), 2)))
    return rows


def to_side(side, width, height):
    factor = side / min(width, height)
    return round(width * factor), round(height * factor)


MEASURES = dict(
    logits=compare_time, decoders=compare_decoders, ahead=compare_ahead, cascade=compare_cascade, memory=compare_memory,
    accuracy=compare_accuracy)

if __name__ == '__main__':
    main()
