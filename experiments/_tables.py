"""Tables and figures of accuracy by method and size"""
import csv
import statistics
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from _shared import environment, shell_command, write_json

__all__ = ['METHODS', 'plot', 'rows_of', 'scores_of', 'write_rows', 'write_table']

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


def write_rows(path: Path, rows: List[dict]) -> None:
    """Write rows as .csv; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_table(path: Path, rows: List[dict], scores: Scores, sizes: Sequence[int], **content: Any) -> None:
    """Write rows as .csv, a line for each method as .md, and all that they are made of as .json."""
    write_rows(path, rows)
    text = markdown(scores, sizes)
    path.with_suffix('.md').write_text(text)
    write_json(path.with_suffix('.json'), dict(command=shell_command(), environment=environment(), **content))
    print(text)


def markdown(scores: Scores, sizes: Sequence[int]) -> str:
    """Return a line for each method: its seeds, mean and standard deviation at each size, and the mean of the means.

    In brackets stand gains over the I-Nets, of the seeds that both have.
    """
    heads = ['method', 'seeds', *(f'{s} px' for s in sizes), 'mean']
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for title in dict.fromkeys(title for title, _ in scores):
        found = [_top1(scores, title, s) for s in sizes]
        plain = [_top1(scores, METHODS['inet'], s) if title != METHODS['inet'] else {} for s in sizes]
        means = [statistics.mean(f.values()) for f in found if f]
        lines.append('| ' + ' | '.join([
            title, ', '.join(map(str, sorted(set().union(*found)))), *map(_cell, found, plain),
            f'{statistics.mean(means):.1f}' if len(means) == len(sizes) else '']) + ' |')
    return '\n'.join(lines) + '\n'


def _top1(scores: Scores, title: str, size: int) -> Dict[int, float]:
    """Return the accuracy of a method at a size by seed."""
    return {r['seed']: r['top1'][str(size)] for r in scores.get((title, size), [])}


def _cell(found: Dict[int, float], plain: Dict[int, float]) -> str:
    """Return mean, standard deviation where there are several seeds, and in brackets the gain."""
    if not found:
        return ''
    spread = f' ± {statistics.stdev(found.values()):.1f}' if len(found) > 1 else ''
    gains = [found[seed] - plain[seed] for seed in found.keys() & plain.keys()]
    gain = f' ({statistics.mean(gains):+.1f})' if gains else ''
    return f'{statistics.mean(found.values()):.1f}{spread}{gain}'


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
