#!/usr/bin/env python3
"""Cascades against fixed sizes: accuracy, mean multiply-adds and mean latency on real images

Cascades are fitted to costs (--targets, in percent of the largest size's multiply-adds) and judged as `timm-rs
fit-cascade` does: on images that their thresholds were not fitted on, by 5-fold cross-fitting. Latency is measured
image by image, sizes in turns, 3 times; that of a cascade is reading plus the sizes that its images go through.

Wanted: the accuracy of the largest size at no more than 60 % of its multiply-adds.

    python experiments/cascade.py --model FILE.onnx --data-dir DIR --threads 1
"""
from _shared import add_deployed_arguments, create_parser, write_results

from timm_rs_runtime import Session
from timm_rs_runtime.fitting import collect_logits, compare, cross_fit, label_folders, measure_images
from timm_rs_runtime.images import split_folder, spread


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    add = parser.add_argument
    add('--targets', type=float, nargs='+', default=[30, 40, 50, 60, 70, 80], metavar='PERCENT')
    add('--timed', type=int, default=100, metavar='N', help='images that are timed (default: %(default)s)')
    args = parser.parse_args()
    session = Session(args.model, args.threads, decode='exact')
    paths, labels = label_folders(split_folder(args.data_dir, args.split), session, args.most)
    logits, _ = collect_logits(session, paths)
    times = measure_images(session, spread(paths, args.timed))
    most, rows = session.madds[session.resolutions[0]], []
    for target in args.targets:
        found = cross_fit(logits, labels, session.madds, target_madds=target / 100 * most)
        *sizes, cascade = compare(session, found, logits, labels, *times)
        cascade.update(network=f'cascade {target:g}%', thresholds=found.cascade.thresholds)
        rows.append(cascade)
    rows = [
        dict(row, images=len(labels), madds_percent=round(100 * row['madds'] / most, 1)) for row in (*sizes, *rows)]
    write_results(args, rows)
    plot(rows, args.output.with_suffix('.png'))


def plot(rows, path):
    """Draw accuracy against mean multiply-adds and against mean latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    labels = dict(madds='mean multiply-adds (millions)', milliseconds='mean latency (ms)')
    for axis, (key, label) in zip(figure.subplots(1, 2, sharey=True), labels.items()):
        unit = 1e6 if key == 'madds' else 1
        for kind, marker in (('fixed size', 'o'), ('cascade', 's')):
            chosen = sorted((r for r in rows if ('thresholds' in r) == (kind == 'cascade')), key=lambda r: r[key])
            points = [(r[key] / unit, 100 * r['accuracy']) for r in chosen]
            axis.plot(*zip(*points), marker=marker, label=kind)
            for row, point in zip(chosen, points) if kind == 'fixed size' else ():
                axis.annotate(row['network'], point, textcoords='offset points', xytext=(4, -11), fontsize=8)
        axis.margins(x=0.12, y=0.12)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc='lower right')
    figure.axes[0].set_ylabel('top-1 accuracy (%)')
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    main()
