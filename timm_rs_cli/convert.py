"""timm-rs convert"""
import argparse

from timm_rs_runtime.files import check_new_folder

from ._source import add_packed, add_source, load, print_saved, read_labels

EXAMPLES = [
    'output/train/RUN --output model',
    'output/train/RUN --extract 160 --output small',
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument('-o', '--output', required=True, metavar='DIR', help='folder to make')
    parser.add_argument('--extract', type=int, metavar='N', help='take this resolution out, as a plain timm model')
    add_packed(parser)


def run(args: argparse.Namespace) -> None:
    from timm_rs.hub.convert import save_model

    check_new_folder(args.output)
    labels = read_labels(args)
    model = load(args).model
    what = ' '.join(map(str, model.resolutions))
    if args.extract is not None:
        model, what = model.at(args.extract), args.extract
    save_model(model, args.output, labels, args.packed)
    print_saved(args.output, model, what)
