#!/usr/bin/env python3
"""Cascades against fixed sizes: accuracy, mean multiply-adds and mean latency on real images

Thresholds are fitted on other images than those that they are judged on: the images are dealt into --folds folds, and
each fold is answered by the cascade that was fitted on all others (cross-fitting), so that every image counts. Cascades
are fitted to costs (--targets, in percent of the largest size's multiply-adds). Latency is measured image by image with
timm_rs_runtime.CascadeSession and Session, the reading of the image included, contenders in turns; a mean over images,
as it would be paid.

Wanted: the accuracy of the largest size at no more than 60 % of its multiply-adds. Beside the difference to the largest
size, in points, stands its standard error from image to image, answers being compared in pairs.

    python experiments/cascade.py --model FILE.onnx --data-dir DIR --threads 1
"""
import time

import numpy as np
from _shared import add_deployed_arguments, create_parser, write_results

from timm_rs_runtime import CascadeSession, Session
from timm_rs_runtime.fitting import collect_logits, fit, label_folders
from timm_rs_runtime.images import split_folder


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    add = parser.add_argument
    add('--folds', type=int, default=5, metavar='N')
    add('--targets', type=float, nargs='+', default=[30, 40, 50, 60, 70, 80], metavar='PERCENT')
    add('--timed', type=int, default=100, metavar='N', help='images that are timed (default: %(default)s)')
    args = parser.parse_args()

    session = Session(args.model, args.threads, decode='exact')
    paths, labels = label_folders(split_folder(args.data_dir, args.split), session, args.most)
    folds = np.random.default_rng(0).permutation(len(paths)) % args.folds
    logits, _ = collect_logits(session, paths)
    networks = {}  # name: right answers and multiply-adds of each image, what answers image i, settings of each fold
    for r in session.resolutions:
        networks[f'{r} px'] = (
            logits[r].argmax(-1) == labels, np.full(len(labels), session.madds[r]),
            lambda i, r=r: session.predict(paths[i], r), [])
    most = session.madds[session.resolutions[0]]
    for target in args.targets:
        cascades = [
            CascadeSession(session, fit(
                {r: found[folds != fold] for r, found in logits.items()}, labels[folds != fold], session.madds,
                target_madds=target / 100 * most).cascade)
            for fold in range(args.folds)]
        right, madds = np.zeros(len(labels), bool), np.zeros(len(labels))
        for fold, cascade in enumerate(cascades):
            (chosen,) = np.nonzero(folds == fold)
            answer = cascade.predict([paths[i] for i in chosen])
            right[chosen], madds[chosen] = answer.logits.argmax(-1) == labels[chosen], answer.madds
        networks[f'cascade {target:g}%'] = (
            right, madds, lambda i, cascades=cascades: cascades[folds[i]].predict(paths[i]),
            [dict(thresholds=c.cascade.thresholds, average=c.cascade.average) for c in cascades])
    timed = np.linspace(0, len(paths) - 1, min(args.timed, len(paths))).astype(int)
    seconds = {name: [] for name in networks}
    for i in timed:
        for name, (_, _, answer, _) in networks.items():
            start = time.perf_counter()
            answer(i)
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, (right, madds, _, fitted) in networks.items():
        difference = right.astype(float) - next(iter(networks.values()))[0]
        rows.append(dict(
            network=name,
            accuracy=round(100 * float(right.mean()), 2),
            difference=round(100 * float(difference.mean()), 2),
            standard_error=round(100 * float(difference.std() / len(difference) ** 0.5), 2),
            madds_M=round(float(madds.mean()) / 1e6, 1),
            madds_percent=round(100 * float(madds.mean()) / most, 1),
            mean_ms=round(1e3 * float(np.mean(seconds[name])), 2),
            images=len(labels),
            timed=len(timed),
            folds=fitted,
        ))
    write_results(args, rows)
    plot(rows, args.output.with_suffix('.png'))


def plot(rows, path):
    """Draw accuracy against mean multiply-adds and against mean latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    labels = dict(madds_M='mean multiply-adds (millions)', mean_ms='mean latency (ms)')
    for axis, (key, label) in zip(figure.subplots(1, 2, sharey=True), labels.items()):
        for kind, marker in (('fixed size', 'o'), ('cascade', 's')):
            chosen = sorted((r for r in rows if bool(r['folds']) == (kind == 'cascade')), key=lambda r: r[key])
            axis.plot([r[key] for r in chosen], [r['accuracy'] for r in chosen], marker=marker, label=kind)
            for row in chosen if kind == 'fixed size' else ():
                axis.annotate(row['network'], (row[key], row['accuracy']), textcoords='offset points', xytext=(4, -11),
                              fontsize=8)
        axis.margins(x=0.12, y=0.12)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc='lower right')
    figure.axes[0].set_ylabel('top-1 accuracy (%)')
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    main()
