#!/usr/bin/env python3
"""Training from JPEGs that are decoded at smaller scales, against all of their pixels: train_rs.py --decode

The first --most training photographs of each class of DIR are enlarged to --side x --side px by bicubic interpolation
and become JPEGs of quality 90, so that most crops can be decoded at a smaller scale. train_rs.py trains on them once
for each --decode and seed; further flags are passed on. Validation is exact, on the photographs of DIR as they are.

    python experiments/decode_training.py DIR --model rs_resnet10t --resolutions 48 40 32 24 --epochs 4
"""
import csv
import shlex
import statistics
from pathlib import Path

from _runs import Run, train_all
from _shared import create_parser, print_table, shell_command, write_json
from PIL import Image

from timm_rs_runtime.files import atomic_write
from timm_rs_runtime.images import find_images, open_image, split_folder
from timm_rs_runtime.preprocess import MARGINS


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('data_dir', metavar='DIR', help='folder with train/ and val/')
    add('--most', type=int, default=100, metavar='N', help='training photographs per class (default: %(default)s)')
    add('--side', type=int, default=448, metavar='N', help='their size in pixels (default: %(default)s)')
    add('--seeds', type=int, nargs='+', default=[0, 1], metavar='N')
    add('--work', type=Path, default=Path('output/decode_training'), metavar='DIR', help='where all is kept')
    parser.set_defaults(output=Path('results/decode_training.csv'))
    args, flags = parser.parse_known_args(argv)
    folder = args.work.resolve() / 'images'
    enlarge(args.data_dir, folder, args.most, args.side)
    runs = {
        (decode, seed): Run(folder.parent / f'{decode}_{seed}', (
            str(folder), *flags, '--decode', decode, '--seed', str(seed)))
        for seed in args.seeds for decode in reversed(MARGINS)}
    for run in runs.values():
        run.check()
    train_all(list(runs.values()), 1)
    rows = []
    for decode in reversed(MARGINS):
        top1 = [runs[decode, seed].result()['top1'] for seed in args.seeds]
        for size in top1[0]:
            found = [scores[size] for scores in top1]
            rows.append(dict(
                decode=decode, size=size, top1=round(statistics.mean(found), 2), lowest=round(min(found), 2),
                highest=round(max(found), 2), seeds=len(found)))
    print_table(list(rows[0]), rows)
    with atomic_write(args.output, overwrite=True, newline='') as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_json(args.output.with_suffix('.json'), dict(
        command=shell_command(), flags=shlex.join(flags),
        runs=[dict(decode=decode, seed=seed, **run.result()) for (decode, seed), run in runs.items()]))


def enlarge(data_dir, folder, most, side):
    """Write the enlarged training photographs, and a link to those of validation."""
    if folder.exists():
        return
    for source in sorted(p for p in Path(split_folder(data_dir, 'train')).iterdir() if p.is_dir()):
        target = folder.with_name('partial') / 'train' / source.name
        target.mkdir(parents=True, exist_ok=True)
        for path in find_images(source)[:most]:
            image = open_image(path).resize((side, side), Image.Resampling.BICUBIC)
            image.save(target / f'{Path(path).stem}.jpg', quality=90)
    folder.with_name('partial').joinpath('val').symlink_to(Path(split_folder(data_dir, 'validation')).resolve())
    folder.with_name('partial').rename(folder)


if __name__ == '__main__':
    main()
