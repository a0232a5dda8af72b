"""The console command timm-rs

A sub-command is a row of COMMANDS: its name, one line of help, a function that adds its arguments and one that runs it.
What only one of them needs is imported where it runs.
"""
import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from typing import Callable, Optional, Sequence

from .errors import OneLineParser, one_line_errors
from .version import __version__

__all__ = ['COMMANDS', 'Command', 'main']


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        name: Its name.
        help: One line on what it does.
        add_arguments: Adds its arguments to a parser.
        run: Does it; what it raises becomes one line on stderr.
    """
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _add_source(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT',
        help="file of train_rs.py, of timm or of the authors' code, folder with config.json, or hf-hub:user/name")
    add('--model', metavar='NAME', help='name of an rs_* model (default: what the checkpoint tells)')
    add('--resolutions', type=int, nargs='+', metavar='N',
        help='input sizes in pixels (default: what the checkpoint tells, else 224 192 160 128 96)')
    add('--num-classes', type=int, metavar='N', help='number of classes (default: what the checkpoint tells)')
    add('--use-ema', action='store_true', help='take the moving average of the weights')
    add('--label-names', metavar='FILE', help='names of the classes in their order, one a line')


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument('--output', required=True, metavar='DIR', help='folder to make')
    parser.add_argument('--extract', type=int, metavar='N', help='take this resolution out, as a plain timm model')


def _convert(args: argparse.Namespace) -> None:
    from .convert import check_output, load_model, save_model

    check_output(args.output)
    labels = _read_labels(args.label_names)
    model = load_model(args.checkpoint, args.model, args.resolutions, args.num_classes, args.use_ema).model
    what = ' '.join(map(str, model.resolutions))
    if args.extract is not None:
        model, what = model.at(args.extract), args.extract
    save_model(model, args.output, labels)
    print(f"{args.output}: {model.pretrained_cfg['architecture']} at {what}, loaded by "
          f"timm.create_model('local-dir:{args.output}', pretrained=True)")


def _add_push(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add('repo_id', metavar='USER/NAME', help='repository on the Hub, made if there is none')
    add('--private', action='store_true', help='make it a private one')
    add('--revision', metavar='BRANCH', help='branch to push to, made if there is none (default: main)')
    add('--create-pr', action='store_true', help='open a pull request instead')
    add('--message', default='Add model', metavar='TEXT', help='first line of the commit')
    add('--license', metavar='NAME', help='license of the weights (default: apache-2.0)')
    add('--dataset', metavar='NAME', help='data set that the metrics are of (default: that of the training run)')
    add('--results', metavar='FILE',
        help='metrics for the card, of validate_rs.py (default: summary.csv beside the checkpoint)')


def _push(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from .convert import load_model
    from .hub import LABEL_FILE, HubError, push_to_hub, read_metrics

    beside = os.path.dirname(args.checkpoint)
    labels = args.label_names
    if labels is None and os.path.isfile(os.path.join(beside, LABEL_FILE)):
        labels = os.path.join(beside, LABEL_FILE)
    loaded = load_model(args.checkpoint, args.model, args.resolutions, args.num_classes, args.use_ema)
    results = args.results
    if results is None and loaded.epoch is not None and os.path.isfile(os.path.join(beside, 'summary.csv')):
        results = os.path.join(beside, 'summary.csv')
    metrics = read_metrics(results, loaded.epoch) if results else None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        url = push_to_hub(
            loaded.model,
            args.repo_id,
            metrics=metrics,
            recipe=loaded.args,
            dataset=args.dataset,
            label_names=_read_labels(labels),
            license=args.license,
            commit_message=args.message,
            revision=args.revision,
            private=args.private,
            create_pr=args.create_pr,
        )
    except HubError as e:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # behind a progress bar that the client leaves open
        again = shlex.join(['timm-rs', *args.argv])
        raise HubError(f'{e} The weights are in {args.checkpoint} still; push again with: {again}') from e
    print(f'{args.checkpoint}: pushed to {url}')


def _read_labels(path: Optional[str]) -> Optional[Sequence[str]]:
    if path is None:
        return None
    with open(path, encoding='utf-8') as f:
        return f.read().splitlines()


COMMANDS = (
    Command('convert', 'make a model folder of a checkpoint, or of one resolution of it', _add_convert, _convert),
    Command('push', 'push a checkpoint to the Hugging Face Hub', _add_push, _push),
)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a sub-command; errors are one line on stderr and end with a status other than 0."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = OneLineParser(prog='timm-rs', description='Resolution Switchable Networks for timm.')
    parser.add_argument('--version', action='version', version=f'timm-rs {__version__}')
    subparsers = parser.add_subparsers(metavar='COMMAND', required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=f'{command.help}.'.capitalize())
        command.add_arguments(subparser)
        subparser.set_defaults(command=command, argv=argv)
    args = parser.parse_args(argv)
    with one_line_errors(f'timm-rs {args.command.name}'):
        args.command.run(args)


if __name__ == '__main__':
    main()
