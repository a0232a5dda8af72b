"""timm-rs push"""
import argparse
import os
import shlex
import sys

from ._source import add_packed, add_source, load, read_labels

EXAMPLES = ['output/train/RUN me/model --private']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add = parser.add_argument
    add('repo_id', metavar='USER/NAME', help='repository on the Hub, made if there is none')
    add('--private', action='store_true', help='make it private')
    add('--revision', metavar='BRANCH', help='branch to push to, made if there is none (default: main)')
    add('--create-pr', action='store_true', help='open a pull request instead')
    add_packed(parser)
    add('--message', default='Add model', metavar='TEXT', help='first line of the commit')
    add('--license', metavar='NAME', help='license of the weights (default: apache-2.0)')
    add('--dataset', metavar='NAME', help='data set of the metrics (default: that of the training run)')
    add('--results', metavar='FILE',
        help='metrics for the card, of validate_rs.py (default: summary.csv beside the checkpoint)')


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from timm_rs.hub.push import HubError, has_averaged_metrics, push_to_hub, read_metrics
    from timm_rs.records import SUMMARY_FILE

    labels = read_labels(args)
    loaded = load(args)
    results = args.results
    beside = os.path.join(os.path.dirname(loaded.source), SUMMARY_FILE)
    if results is None and loaded.epoch is not None and os.path.isfile(beside):
        if has_averaged_metrics(loaded.args) == args.use_ema:
            results = beside
        else:
            kind, flag = ('not those', 'without') if args.use_ema else ('those', 'with')
            print(f'{beside}: its accuracies are {kind} of the moving average, so the card holds none; push {flag} '
                  '--use-ema, or give --results.')
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
            label_names=labels,
            license=args.license,
            commit_message=args.message,
            revision=args.revision,
            private=args.private,
            create_pr=args.create_pr,
            packed=args.packed,
        )
    except HubError as e:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # after a progress bar that the client leaves open
        again = shlex.join(['timm-rs', *args.argv])
        raise HubError(f'{e} The weights are still in {args.checkpoint}; push again with: {again}') from e
    print(f'{args.checkpoint}: pushed to {url}')
