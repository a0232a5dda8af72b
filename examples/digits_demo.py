#!/usr/bin/env python3
"""One network for three input sizes against its fixed-resolution twin, on handwritten digits

Trains rs_resnet10t at 32, 24 and 16 px and, for as many epochs, the same network only at 32 px; evaluates both at all
three sizes; prints one table and saves one figure, accuracy against multiply-adds. Takes about two minutes on two CPU
cores. Every step is a command of train_rs.py or validate_rs.py and is printed, so that it can be repeated.

    python examples/digits_demo.py --output output/demo
"""
import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESOLUTIONS = ('32', '24', '16')
RECIPE = (
    '--dataset digits --model rs_resnet10t --batch-size 64 --lr 0.1 --warmup-epochs 1 --sched-on-updates '
    '--smoothing 0 --color-jitter 0 --hflip 0 --scale 0.6 1 --crop-pct 1 --workers 0 --device cpu --log-interval 100 '
    '--checkpoint-hist 1'
).split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n', 1)[0])
    parser.add_argument('--output', default='output/demo', type=Path, help='folder of the results')
    parser.add_argument('--epochs', default=8, type=int, help='epochs of both networks (default: 8)')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    networks = {
        'RS-Net': ['--resolutions', *RESOLUTIONS],
        'fixed 32': ['--resolutions', RESOLUTIONS[0], '--distill', 'none'],
    }
    results = {}
    for name, flags in networks.items():
        run = name.replace(' ', '-').lower()
        shutil.rmtree(args.output / run, ignore_errors=True)
        train(args, run, flags)
        results[name] = validate(args, run)
    print_table(results)
    plot(results, args.output / 'accuracy_vs_madds.png')


def train(args, run, flags):
    call(
        'train_rs.py', *RECIPE, '--epochs', str(args.epochs), '--val-interval', str(args.epochs), *flags,
        '--output', str(args.output), '--experiment', run)


def validate(args, run):
    """Return the rows of validate_rs.py at all sizes."""
    results_file = args.output / f'{run}.json'
    call(
        'validate_rs.py', '--dataset', 'digits', '--checkpoint', str(args.output / run / 'last.pth.tar'), '--img-size',
        *RESOLUTIONS, '--workers', '0', '--device', 'cpu', '--results-file', str(results_file), '--overwrite')
    return {str(row['resolution']): row for row in json.loads(results_file.read_text())}


def call(script, *flags):
    command = [sys.executable, str(ROOT / script), *flags]
    print(f'\n$ python {script} {shlex.join(flags)}', flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)


def print_table(results):
    print('\nTop-1 accuracy on 450 digits, one set of weights per row:\n')
    print(f"{'network':<12}" + ''.join(f'{s + " px":>10}' for s in RESOLUTIONS))
    for name, rows in results.items():
        print(f'{name:<12}' + ''.join(f"{rows[s]['top1']:>10.2f}" for s in RESOLUTIONS))
    rows = next(iter(results.values()))
    print(f"{'MAdds':<12}" + ''.join(f"{rows[s]['madds'] / 1e6:>9.1f}M" for s in RESOLUTIONS))


def plot(results, path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    for (name, rows), marker in zip(results.items(), 'os'):
        madds = [rows[s]['madds'] / 1e6 for s in RESOLUTIONS]
        axes.plot(madds, [rows[s]['top1'] for s in RESOLUTIONS], marker=marker, label=name)
    for s in RESOLUTIONS:
        row = next(iter(results.values()))[s]
        axes.annotate(
            f'{s} px', (row['madds'] / 1e6, row['top1']), textcoords='offset points', xytext=(0, 7), ha='center')
    axes.set(xlabel='multiply-adds (millions)', ylabel='top-1 accuracy (%)', ylim=(0, 108))
    axes.set_title('Handwritten digits: one network, three input sizes')
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    figure.savefig(path, dpi=150)
    print(f'\nFigure: {path}')


if __name__ == '__main__':
    main()
