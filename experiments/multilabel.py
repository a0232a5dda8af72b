#!/usr/bin/env python3
"""Several labels per image: distillation between sizes against none, on pairs of handwritten digits

Every image shows two of scikit-learn's handwritten digits at random places; its labels are the digits that it shows.
Digits of training and of validation are different ones. train_rs.py trains one network at all sizes, with and without
distillation, from several seeds; the table holds mean average precision and macro F1 of the last epoch, in percent.

    python experiments/multilabel.py
"""
import io
import json
import random
import statistics
import tarfile
from pathlib import Path

from _runs import Run, train_all
from _shared import create_parser, environment, print_table, shell_command, write_json
from PIL import Image

from timm_rs.data.datasets import DigitsDataset
from timm_rs.train.loss import EnsembleDistillationLoss

COUNTS = dict(train=2000, validation=1000)
CANVAS, DIGIT = 32, 14  # pixels
METRICS = ('map', 'macro_f1')


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--modes', nargs='+', default=['none', 'ens_topdown'], choices=EnsembleDistillationLoss.MODES,
        help='distillation to compare (default: none ens_topdown)')
    add('--model', default='rs_test_resnet', metavar='NAME', help='network (default: %(default)s)')
    add('--sizes', type=int, nargs='+', default=[32, 24, 16], metavar='N', help='input sizes (default: 32 24 16)')
    add('--seeds', type=int, nargs='+', default=[0, 1], metavar='N', help='seeds (default: 0 1)')
    add('--epochs', type=int, default=5, metavar='N', help='epochs (default: %(default)s)')
    add('--images', type=int, default=COUNTS['train'], metavar='N', help='images to train on (default: %(default)s)')
    add('--jobs', type=int, default=1, metavar='N', help='runs at a time (default: %(default)s)')
    add('--work', type=Path, default=Path('output/multilabel'), metavar='DIR', help='images and runs')
    parser.set_defaults(output=Path('results/multilabel.json'))
    args = parser.parse_args(argv)
    counts = dict(COUNTS, train=args.images)
    shards = args.work / f'pairs-{args.images}'
    for split, count in counts.items():
        write_shard(shards / f'{split}-0000.tar', split, count)
    flags = [
        *f'--dataset wds/pairs --data-dir {shards.resolve()} --target-key labels --task multilabel --num-classes 10 '
        f'--train-split train-0000.tar --train-num-samples {counts["train"]} --val-split validation-0000.tar '
        f'--val-num-samples {counts["validation"]} --model {args.model} --no-aug --mean 0 0 0 --std 1 1 1 --opt adamw '
        f'--lr 0.002 --warmup-epochs 1 --sched-on-updates -b 64 --loss-reduction mean --workers 1 --channels-last '
        f'--device cpu --checkpoint-hist 1 --val-interval {args.epochs} --epochs {args.epochs}'.split(),
        '--resolutions', *map(str, args.sizes)]
    runs = {(mode, seed): Run(args.work / f'{mode}-{args.epochs}-seed{seed}', (
        *flags, '--distill', mode, '--seed', str(seed))) for mode in args.modes for seed in args.seeds}
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
        command=shell_command(), environment=environment(), images=counts, flags=' '.join(flags[4:]), rows=rows))


def write_shard(path, split, count):
    """Write a WebDataset shard of pairs of digits of a split; one that is there is kept."""
    if path.exists():
        return
    digits, generator = DigitsDataset(split, input_img_mode='L'), random.Random(split)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial')
    with tarfile.open(partial, 'w') as tar:
        for number in range(count):
            canvas, labels = Image.new('L', (CANVAS, CANVAS)), set()
            for left in (0, CANVAS // 2):
                image, label = digits[generator.randrange(len(digits))]
                free = CANVAS // 2 - DIGIT, CANVAS - DIGIT
                place = left + generator.randint(0, free[0]), generator.randint(0, free[1])
                canvas.paste(image.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC), place)
                labels.add(label)
            file = io.BytesIO()
            canvas.convert('RGB').save(file, 'png')
            for name, content in (
                    ('png', file.getvalue()), ('json', json.dumps(dict(labels=sorted(labels))).encode())):
                info = tarfile.TarInfo(f'{number:05d}.{name}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    partial.rename(path)


if __name__ == '__main__':
    main()
