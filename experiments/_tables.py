"""Tables and figures of accuracy by method and size"""
import csv
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from _shared import environment, shell_command, write_json

__all__ = ['METHODS', 'plot', 'rows_of', 'scores_of', 'write_table']

METHODS = dict(
    inet='I-Nets', parallel='Parallel', ens='RS-Net, ensemble only', ens_topdown='RS-Net', random_size='random size')
_COLORS = dict(zip(METHODS.values(), ('C0', 'C2', 'C5', 'C3', 'C4')))  # the same in every figure

Scores = Dict[Tuple[str, int], List[dict]]


def scores_of(runs: Sequence[dict], sizes: Sequence[int]) -> Scores:
    """Return runs by the title of their method and by size, in the order of the table.

    Args:
        runs: Each with method, sizes that it was trained at, seed, and top1 and top5 in percent by size.
        sizes: In pixels, largest first.
    """
    found = {}
    for method, title in METHODS.items():
        for size in sizes:
            found[title, size] = [
                r for r in runs if r['method'] == method and (method != 'inet' or list(r['sizes']) == [size])]
        if method == 'inet':
            largest = [r for r in runs if r['method'] == 'inet' and list(r['sizes']) == [sizes[0]]]
            if any(len(r['top1']) > len(sizes) // 2 for r in largest):  # evaluated at the other sizes too
                found.update({(f'I-{sizes[0]}', size): largest for size in sizes})
    return {key: chosen for key, chosen in found.items() if chosen}


def rows_of(scores: Scores, **common: Any) -> List[dict]:
    """Return a row for each method and size."""
    rows = []
    for (title, size), runs in scores.items():
        first, fifth = ([r[key][str(size)] for r in runs] for key in ('top1', 'top5'))
        rows.append(dict(
            common, method=title, resolution=size, seeds=len(runs), top1_mean=round(statistics.mean(first), 2),
            top1_std=round(statistics.stdev(first), 2) if first[1:] else '',
            top5_mean=round(statistics.mean(fifth), 2)))
    return rows


def write_table(path: Path, rows: List[dict], tables: Dict[str, Scores], sizes: Sequence[int], **content: Any) -> None:
    """Write rows as .csv, the tables of one or more recipes as .md, and all that they are made of as .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(tables, sizes)
    path.with_suffix('.md').write_text(text)
    write_json(path.with_suffix('.json'), dict(command=shell_command(), environment=environment(), **content))
    print(text)


def markdown(tables: Dict[str, Scores], sizes: Sequence[int]) -> str:
    """Return a line for each recipe and method.

    In brackets stand gains over the I-Nets of the recipe; the last column has the mean gain over the same method of the
    first recipe. Both are of the seeds that both have.
    """
    first = next(iter(tables))
    heads = ['recipe', 'method', 'seeds', *(f'{s} px' for s in sizes), 'mean', f'over {first}']
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for recipe, scores in tables.items():
        for title in dict.fromkeys(title for title, _ in scores):
            found = [_top1(scores.get((title, s), []), s) for s in sizes]
            plain = [_top1(scores.get((METHODS['inet'], s), []), s) if title != METHODS['inet'] else {} for s in sizes]
            base = [_top1(tables[first].get((title, s), []), s) for s in sizes]
            means = [statistics.mean(f.values()) for f in found if f]
            gains = [_gain(f, b) for f, b in zip(found, base)]
            lines.append('| ' + ' | '.join([
                recipe, title, ', '.join(map(str, sorted(set().union(*found)))),
                *(_cell(f, p) for f, p in zip(found, plain)),
                f'{statistics.mean(means):.1f}' if len(means) == len(sizes) else '',
                '' if recipe == first or None in gains else f'{statistics.mean(gains):+.1f}']) + ' |')
    return '\n'.join(lines) + '\n'


def _top1(runs: Sequence[dict], size: int) -> Dict[int, float]:
    """Return the accuracy at a size by seed."""
    return {r['seed']: r['top1'][str(size)] for r in runs}


def _gain(scores: Dict[int, float], base: Dict[int, float]) -> Optional[float]:
    """Return the mean difference over the seeds that both have, or None where they share none."""
    seeds = scores.keys() & base.keys()
    return statistics.mean(scores[seed] - base[seed] for seed in seeds) if seeds else None


def _cell(scores: Dict[int, float], base: Dict[int, float]) -> str:
    """Return mean, standard deviation where there are several seeds, and in brackets the gain."""
    if not scores:
        return ''
    spread = f' ± {statistics.stdev(scores.values()):.1f}' if len(scores) > 1 else ''
    difference = _gain(scores, base)
    return f'{statistics.mean(scores.values()):.1f}{spread}' + ('' if difference is None else f' ({difference:+.1f})')


def plot(rows: List[dict], heading: str, path: Path) -> None:
    """Draw accuracy against multiply-adds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout='constrained')
    axis = figure.subplots()
    for method in dict.fromkeys(row['method'] for row in rows):
        points = [
            (row['madds'] / 1e6, row['top1_mean'], row['top1_std'] or 0) for row in rows if row['method'] == method]
        style = dict(marker='s', linestyle='', zorder=3) if method == METHODS['inet'] else dict(marker='o')
        (seeds, *_) = (row['seeds'] for row in rows if row['method'] == method)
        label = f"{method}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
        axis.errorbar(*zip(*points), label=label, capsize=2, color=_COLORS.get(method, 'C1'), **style)
    sizes = {row['madds'] / 1e6: f"{row['resolution']} px" for row in rows}
    axis.secondary_xaxis('top').set_xticks(list(sizes), sizes.values())
    axis.set(xlabel='multiply-adds (millions)', ylabel='top-1 accuracy (%)', title=heading)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
