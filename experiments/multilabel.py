#!/usr/bin/env python3
"""Several labels per image: distillation between sizes against none

Every image shows two of scikit-learn's handwritten digits at random places; its labels are the digits that it shows.
Digits of training and of validation are different ones. With --photos and --table the images are photographs, and each
has one label per column of the table. train_rs.py trains one network at all sizes, with and without distillation, from
several seeds; the table holds mean average precision and macro F1 of the last epoch, in percent.

    python experiments/multilabel.py
"""
import csv
import io
import json
import random
import statistics
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

from _runs import Run, train_all
from _shared import create_parser, environment, print_table, shell_command, write_json
from PIL import Image

from timm_rs.data.datasets import DigitsDataset
from timm_rs.train.loss import EnsembleDistillationLoss

COUNTS = dict(train=2000, validation=1000)
CANVAS, DIGIT = 32, 14  # pixels
METRICS = ('map', 'macro_f1')
RECIPE = ('--model rs_test_resnet --no-aug --mean 0 0 0 --std 1 1 1 --opt adamw --lr 0.002 --warmup-epochs 1 '
          '--sched-on-updates --loss-reduction mean')


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--modes', nargs='+', default=['none', 'ens_topdown'], choices=EnsembleDistillationLoss.MODES,
        help='distillation to compare (default: none ens_topdown)')
    add('--recipe', default=RECIPE, metavar='FLAGS', help='flags of train_rs.py (default: %(default)s)')
    add('--photos', type=Path, metavar='DIR', help='photographs named ID.jpg, instead of digits')
    add('--table', type=Path, metavar='CSV', help='labels of the photographs: a column "id" and those of --columns')
    add('--columns', nargs='+', default=['articleType', 'baseColour'], metavar='NAME',
        help='columns that hold a label each (default: articleType baseColour)')
    add('--min-count', type=int, default=100, metavar='N',
        help='leave out photographs with a label that fewer of them have (default: %(default)s)')
    add('--sizes', type=int, nargs='+', default=[32, 24, 16], metavar='N', help='input sizes (default: 32 24 16)')
    add('--seeds', type=int, nargs='+', default=[0, 1], metavar='N', help='seeds (default: 0 1)')
    add('--epochs', type=int, default=5, metavar='N', help='epochs (default: %(default)s)')
    for split, count in COUNTS.items():
        add(f'--{split}-images', type=int, default=count, metavar='N', help=f'images of {split} (default: %(default)s)')
    add('--jobs', type=int, default=1, metavar='N', help='runs at a time (default: %(default)s)')
    add('--work', type=Path, default=Path('output/multilabel'), metavar='DIR', help='images and runs')
    parser.set_defaults(output=Path('results/multilabel.json'))
    args = parser.parse_args(argv)
    counts = {split: getattr(args, f'{split}_images') for split in COUNTS}
    if args.photos:
        names, samples = read_photos(args.photos, args.table, args.columns, args.min_count, counts)
    else:
        names = [str(digit) for digit in range(10)]
        samples = {split: digit_pairs(split, count) for split, count in counts.items()}
    shards = args.work / '-'.join([args.photos.name if args.photos else 'pairs', *map(str, counts.values())])
    for split in counts:
        write_shard(shards / f'{split}-0000.tar', samples[split])
    flags = [
        *f'--dataset wds/{shards.name} --data-dir {shards.resolve()} --target-key labels --task multilabel '
        f'--num-classes {len(names)} --train-split train-0000.tar --train-num-samples {counts["train"]} '
        f'--val-split validation-0000.tar --val-num-samples {counts["validation"]} {args.recipe} -b 64 --workers 1 '
        f'--channels-last --device cpu --checkpoint-hist 1 --val-interval {args.epochs} --epochs {args.epochs}'.split(),
        '--resolutions', *map(str, args.sizes)]
    runs = {(mode, seed): Run(args.work / f'{mode}-{args.epochs}-seed{seed}', (
        *flags, '--distill', mode, '--seed', str(seed))) for seed in args.seeds for mode in args.modes}
    for run in runs.values():
        run.check()
    train_all(list(runs.values()), args.jobs)
    rows = []
    for mode in args.modes:
        for place in (*map(str, sorted(args.sizes, reverse=True)), 'ens'):
            found = {m: [runs[mode, seed].result()[m][place] for seed in args.seeds] for m in METRICS}
            rows.append(dict(distill=mode, size=place, **{m: round(statistics.mean(v), 2) for m, v in found.items()},
                             **{f'{m}_by_seed': [round(x, 2) for x in v] for m, v in found.items()}))
    print_table(('distill', 'size', *METRICS), rows)
    write_json(args.output, dict(
        command=shell_command(), environment=environment(), images=counts, labels=names, flags=' '.join(flags[4:]),
        rows=rows))


def digit_pairs(split, count):
    """Yield images of two digits of a split, as PNG, and their labels."""
    digits, generator = DigitsDataset(split, input_img_mode='L'), random.Random(split)
    for _ in range(count):
        canvas, labels = Image.new('L', (CANVAS, CANVAS)), set()
        for left in (0, CANVAS // 2):
            image, label = digits[generator.randrange(len(digits))]
            free = CANVAS // 2 - DIGIT, CANVAS - DIGIT
            place = left + generator.randint(0, free[0]), generator.randint(0, free[1])
            canvas.paste(image.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC), place)
            labels.add(label)
        file = io.BytesIO()
        canvas.convert('RGB').save(file, 'png')
        yield 'png', file.getvalue(), sorted(labels)


def read_photos(folder, table, columns, min_count, counts):
    """Return the names of the labels, and for each split as many photographs, drawn at random, with their labels."""
    with open(table, newline='') as f:
        rows = [row for row in csv.DictReader(f) if (folder / f'{row["id"]}.jpg').is_file()]
    common = [{k for k, n in Counter(row[c] for row in rows).items() if n >= min_count} for c in columns]
    rows = [row for row in rows if all(row[c] in kept for c, kept in zip(columns, common))]
    names = [f'{c}: {name}' for c, kept in zip(columns, common) for name in sorted(kept)]
    random.Random(0).shuffle(rows)
    if len(rows) < sum(counts.values()):
        raise SystemExit(f'{table} has labels for {len(rows)} photographs of {folder}, {counts} are asked for.')
    rows = iter(rows)
    return names, {split: [
        ('jpg', (folder / f'{row["id"]}.jpg').read_bytes(), [names.index(f'{c}: {row[c]}') for c in columns])
        for row in islice(rows, count)] for split, count in counts.items()}


def write_shard(path, samples):
    """Write a WebDataset shard of images with labels; one that is there is kept."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial')
    with tarfile.open(partial, 'w') as tar:
        for number, (kind, image, labels) in enumerate(samples):
            for name, content in ((kind, image), ('json', json.dumps(dict(labels=labels)).encode())):
                info = tarfile.TarInfo(f'{number:05d}.{name}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    partial.rename(path)


if __name__ == '__main__':
    main()
