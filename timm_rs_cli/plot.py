"""timm-rs plot"""
import argparse
import os

from timm_rs_runtime.files import check_new_file, make_folder

EXAMPLES = ['output/train/RUN']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('runs', nargs='+', metavar='OUTPUT_DIR', help='output folders of train_rs.py')
    add('-o', '--output', default='.', metavar='DIR', help='folder of the figures (default: the current one)')
    add('--format', default='png', choices=('png', 'pdf', 'svg'), help='of the figures (default: %(default)s)')
    add('--overwrite', action='store_true', help='replace a file of this name')


def run(args: argparse.Namespace) -> None:
    from timm_rs.plot import plot_accuracy_against_madds, plot_curves, read_run

    runs = [read_run(folder) for folder in args.runs]
    make_folder(args.output)
    paths = [os.path.join(args.output, f'{name}.{args.format}') for name in ('curves', 'accuracy_vs_madds')]
    for path in paths:
        check_new_file(path, args.overwrite)
    for path, plot in zip(paths, (plot_curves, plot_accuracy_against_madds)):
        plot(runs, path, args.overwrite)
        print(path)
