"""Figures of training runs: accuracy per resolution over epochs, and accuracy against multiply-adds"""
import os
from dataclasses import dataclass
from typing import Dict, List, Sequence

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import atomic_path

from .checkpoint import read_checkpoint
from .evaluate import ENSEMBLE, count_madds
from .load import create, model_args, shapes_only
from .records import ARGS_FILE, SUMMARY_FILE, check_run, read_summary, read_yaml

__all__ = ['RunHistory', 'plot_accuracy_against_madds', 'plot_curves', 'read_run']


@dataclass
class RunHistory:
    """The output folder of a run.

    Attributes:
        name: Name of the folder.
        resolutions: Input sizes in pixels, largest first.
        rows: Validated epochs of summary.csv.
        args: Flags of the run.
        metric: Column of the accuracy, 'top1' or, with several labels per image, 'map'.
    """
    name: str
    resolutions: List[int]
    rows: List[Dict[str, float]]
    args: dict
    metric: str = 'top1'

    @property
    def best(self) -> Dict[str, float]:
        """The validated epoch with the highest mean accuracy over resolutions."""
        return max(self.rows, key=lambda row: row[f'eval_{self.metric}_mean'])

    def madds(self) -> Dict[int, int]:
        """Return the multiply-adds of one image at each resolution."""
        name = self.args.get('model') or ''
        with shapes_only(self.name):
            model = create(self.name, name, resolutions=self.resolutions, **model_args(name, self.args, {}))
            try:
                return {r: count_madds(model, r, self.args.get('in_chans') or 3) for r in self.resolutions}
            except UserError as e:
                raise UserError(f'{self.name}: {e}') from e


def read_run(folder: str) -> RunHistory:
    """Read the output folder of a run.

    Raises:
        ValueError: It does not hold the summary of a run, or no epoch is validated yet.
    """
    paths = [os.path.join(folder, name) for name in (SUMMARY_FILE, ARGS_FILE)]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f'{folder} is not an output folder of train_rs.py, {os.path.basename(path)} is missing.')
    rows = read_summary(paths[0])
    metric = 'map' if any('eval_map_mean' in row for row in rows) else 'top1'
    names = {key.rpartition('_')[2] for row in rows for key in row if key.startswith(f'eval_{metric}_')}
    sizes = [fields.check_fields(name, fields.size_text, paths[0]) for name in names if name.isdecimal()]
    columns = ['epoch', *(f'eval_{metric}_{key}' for key in ('mean', ENSEMBLE, *sizes))]
    check = fields.record(dict.fromkeys(columns, fields.number()), required=columns)
    rows = [fields.check_fields(row, check, paths[0]) for row in rows if f'eval_{metric}_mean' in row]
    if not rows:
        raise UserError(f'{paths[0]} holds no validated epoch yet.')
    args = check_run(read_yaml(paths[1]), paths[1])
    if ':' in (args.get('model') or ''):  # the checkpoint records the network instead
        args = read_checkpoint(folder).args
    name = os.path.basename(os.path.normpath(folder))
    return RunHistory(name, sorted(sizes, reverse=True), rows, args, metric)


def plot_curves(runs: Sequence[RunHistory], path: str, overwrite: bool = False) -> None:
    """Draw accuracy over epochs, a panel per run and a line per resolution and for the ensemble.

    The ending of the path chooses the format of the file.
    """
    figure, axes = _figure(len(runs))
    for axis, run in zip(axes, runs):
        epochs = [row['epoch'] for row in run.rows]
        for key in [*run.resolutions, ENSEMBLE]:
            is_ensemble = key == ENSEMBLE
            label = 'ensemble' if is_ensemble else f'{key} px'
            style = dict(color='black', linestyle='--') if is_ensemble else {}
            values = [row[f'eval_{run.metric}_{key}'] for row in run.rows]
            axis.plot(epochs, values, label=label, marker='.' if len(epochs) < 30 else '', **style)
        axis.set(xlabel='epoch', title=_literal(run.name))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(loc='lower right')
    axes[0].set_ylabel(_label(runs))
    with atomic_path(path, overwrite) as partial:
        figure.savefig(partial, dpi=150)


def plot_accuracy_against_madds(runs: Sequence[RunHistory], path: str, overwrite: bool = False) -> None:
    """Draw the accuracy of each run's best epoch against the multiply-adds of each resolution, see plot_curves."""
    figure, (axis,) = _figure(1)
    for run in runs:
        cost = run.madds()
        accuracy = [run.best[f'eval_{run.metric}_{r}'] for r in run.resolutions]
        axis.plot([cost[r] / 1e6 for r in run.resolutions], accuracy, marker='o', label=_literal(run.name))
        for r, value in zip(run.resolutions, accuracy):
            axis.annotate(f'{r} px', (cost[r] / 1e6, value), textcoords='offset points', xytext=(4, -11), fontsize=8)
    axis.margins(x=0.12)
    axis.set(xlabel='multiply-adds (millions)', ylabel=_label(runs))
    axis.legend(loc='lower right')
    with atomic_path(path, overwrite) as partial:
        figure.savefig(partial, dpi=150)


def _literal(name: str) -> str:
    """Return a name that matplotlib neither typesets as a formula nor leaves out of a legend."""
    return ' ' * name.startswith('_') + name.replace('$', r'\$')


def _label(runs: Sequence[RunHistory]) -> str:
    titles = dict(top1='top-1 accuracy', map='mean average precision')
    return ' or '.join(sorted({titles[run.metric] for run in runs}, reverse=True)) + ' (%)'


def _figure(panels: int):
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("Figures need matplotlib: pip install ./runtime '.[plot]'.") from e
    figure = Figure(figsize=(1.5 + 4.5 * panels, 4), layout='constrained')
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes
