"""Tables of what runs of paper_table.py reach"""
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

__all__ = ['DEFAULTS', 'METHODS', 'cell', 'describe', 'gain', 'markdown', 'plot', 'summarize', 'top1']

METHODS = dict(
    inet='I-Nets', parallel='Parallel', ens='RS-Net, ensemble alone', ens_topdown='RS-Net', random_size='random size')
COLORS = dict(inet='C0', parallel='C2', ens='C5', ens_topdown='C3', random_size='C4')  # the same in every figure
DEFAULTS = dict(
    weight_bits=32, activation_bits=32, resample='matched', private='both', ensemble='sizes', ema=0, sampled=False,
    mean_loss=True, zero_init=False, distill_ramp=0, initial_checkpoint='', pretrained=False, pretrained_path='',
    model_kwargs={}, small_steps=0)


def top1(results: List[dict], size: int) -> Dict[int, float]:
    """Return the top-1 accuracy of runs by seed."""
    return {r['seed']: r['top1'][str(size)] for r in results}


def gain(scores: Dict[int, float], base: Dict[int, float]) -> Optional[float]:
    """Return the mean difference over the seeds that both have, or None where they share none."""
    seeds = scores.keys() & base.keys()
    return statistics.mean(scores[seed] - base[seed] for seed in seeds) if seeds else None


def cell(scores: Dict[int, float], base: Optional[Dict[int, float]] = None) -> str:
    """Return mean, standard deviation where there are several seeds, and in brackets the gain."""
    spread = f' ± {statistics.stdev(scores.values()):.1f}' if len(scores) > 1 else ''
    difference = gain(scores, base or {})
    return f'{statistics.mean(scores.values()):.1f}{spread}' + ('' if difference is None else f' ({difference:+.1f})')


def summarize(args: Namespace, method: str, size: int, results: List[dict], madds: int) -> dict:
    """Return a row of the table: what the runs of a method reach at a size."""
    first, fifth = ([r[k][str(size)] for r in results] for k in ('top1', 'top5'))
    return dict(
        dataset=args.dataset, model=args.model, method=method, resolution=size, seeds=len(results), epochs=args.epochs,
        top1_mean=round(statistics.mean(first), 2), top1_std=round(statistics.stdev(first), 2) if first[1:] else '',
        top5_mean=round(statistics.mean(fifth), 2), madds=madds, params=results[0]['params'])


def markdown(rows: List[dict], scores: Dict[Tuple[str, int], Dict[int, float]], args: Namespace) -> str:
    """Return the table in the paper's form.

    Args:
        rows: Of summarize.
        scores: Top-1 accuracy in percent by method and size, and in it by seed.
        args: Flags.
    """
    seeds = {}
    for row in rows:
        seeds.setdefault(row['method'], set()).add(row['seeds'])
    counts = set.union(*seeds.values())
    heads, most = list(seeds), max(counts)
    if len(counts) > 1:
        heads = [f"{m}, {' or '.join(map(str, sorted(n)))} seed{'s' * (max(n) > 1)}" for m, n in seeds.items()]
    lines = [
        f'Top-1 accuracy of {describe(args)}, ' + (
            f'mean and standard deviation over {most} seeds; in brackets the gain over the I-Net of that size and seed.'
            if most > 1 else 'one seed; in brackets the gain over the I-Net of that size.'), '',
        '| size | MAdds | ' + ' | '.join(heads) + ' |', '|---' * (2 + len(heads)) + '|']
    madds = {row['resolution']: row['madds'] for row in rows}
    for size in args.sizes:
        base = scores.get((METHODS['inet'], size))
        cells = []
        for method in seeds:
            found = scores.get((method, size))
            cells.append('' if found is None else cell(found, None if method == METHODS['inet'] else base))
        lines.append(f'| {size} | {madds[size] / 1e6:.0f}M | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def describe(args: Namespace) -> str:
    """Tell what the table is of, and in what it is not the default."""
    parts = [f'{args.model} on {args.dataset}', f'{args.epochs} epochs']
    for key, text in (
        ('weight_bits', '{}-bit weights'), ('activation_bits', '{}-bit activations'), ('resample', '{} downscaling'),
        ('private', 'private {}'), ('ensemble', 'ensemble by {}'), ('ema', 'moving average {}'),
        ('sampled', 'sampled sizes'), ('mean_loss', 'sum of losses'), ('zero_init', 'residual branches from zero'),
        ('distill_ramp', 'distillation from epoch 0 to {}'), ('small_steps', 'steps of small sizes alone {}'),
        ('initial_checkpoint', 'from {}'), ('pretrained_path', 'from {}'), ('pretrained', "from timm's weights"),
    ):
        value = getattr(args, key)
        if value != DEFAULTS[key]:
            parts.append(text.format(value))
    return ', '.join(parts)


def plot(rows: List[dict], heading: str, path: Path) -> None:
    """Draw accuracy against multiply-adds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout='constrained')
    axis = figure.subplots()
    colors = {METHODS[key]: color for key, color in COLORS.items()}
    for method in dict.fromkeys(row['method'] for row in rows):
        chosen = [row for row in rows if row['method'] == method]
        points = [(row['madds'] / 1e6, row['top1_mean'], row['top1_std'] or 0) for row in chosen]
        style = dict(marker='s', linestyle='', zorder=3) if method == METHODS['inet'] else dict(marker='o')
        axis.errorbar(*zip(*points), label=method, capsize=2, color=colors.get(method, 'C1'), **style)
    axis.set(xlabel='multiply-adds (millions)', ylabel='top-1 accuracy (%)', title=heading)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
