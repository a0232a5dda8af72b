"""The card of a switchable network on the Hub: card.md, filled in"""
import os
from pathlib import Path
from string import Template
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import torch.nn as nn
import yaml

from timm_rs_runtime.errors import UserError

from .._compat import get_model_input_config
from ..evaluate import ENSEMBLE, METRICS, count_madds, count_parameters
from ..train.options import WARM_START, is_warm_start, parse_args
from .convert import architecture_of

__all__ = ['MARK', 'Metrics', 'model_card']

MARK = '<!-- timm_rs wrote this card and updates it with every push. Remove this line to keep what you change. -->'
Metrics = Mapping[Union[int, str], Mapping[str, float]]

_TRAINING = """\
## Training

Flags of `train_rs.py` that are not its defaults:

```yaml
{}```

"""
# Flags of a run that describe the machine and not the training.
_MACHINE = (
    'checkpoint_hist', 'class_map', 'class_stats', 'config', 'data', 'data_dir', 'dataset_download',
    'decoded_cache', 'decoded_cache_gb', 'decoded_cache_side', 'device', 'device_modules', 'distributed',
    'experiment', 'hub_private', 'initial_checkpoint', 'local_rank', 'log_interval', 'log_tensorboard', 'log_wandb',
    'max_unreadable', 'no_prefetcher', 'output', 'pin_mem', 'pretrained_cfg_overlay', 'pretrained_path',
    'push_interval', 'push_to_hub', 'recovery_interval', 'resume', 'save_epochs', 'save_images', 'traceback',
    'workers',
)
_MAY_BE_FILES = 'kd_model_name', 'loss_class_weight', 'loss_pos_weight'


def model_card(
        model: nn.Module,
        repo_id: str,
        metrics: Optional[Metrics] = None,
        recipe: Optional[Mapping[str, Any]] = None,
        dataset: Optional[str] = None,
        license: str = 'apache-2.0',
) -> Tuple[str, Any]:
    """Return the text of a model card and its metadata, a huggingface_hub.ModelCardData; see push_to_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    architecture = architecture_of(model)
    metrics, recipe = metrics or {}, recipe or {}
    folder = os.path.basename(os.path.normpath(recipe.get('data_dir') or 'unknown'))
    dataset = dataset or recipe.get('dataset') or folder
    in_chans = get_model_input_config(model)['input_size'][0]
    madds: Dict[Any, Optional[int]] = {r: _count_madds(model, r, in_chans) for r in model.resolutions}
    madds[ENSEMBLE] = sum(madds.values()) if None not in madds.values() else None
    rows = [key for key in madds if key != ENSEMBLE or key in metrics]
    threshold = getattr(model, 'multilabel_threshold', None)
    columns = dict(top1='Top-1', top5='Top-5') if threshold is None else {k: METRICS[k] for k in ('map', 'macro_f1')}

    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=dict(map='mean_average_precision', macro_f1='f1').get(name, 'accuracy'),
            metric_name=f"{title} {'of the ensemble' if key == ENSEMBLE else f'at {key} px'}",
            metric_value=round(metrics[key][name], 3),
        )
        for key in rows if key in metrics
        for name, title in columns.items() if name in metrics[key]
    ]
    metadata = ModelCardData(
        library_name='timm',
        license=license,
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rs', 'resolution-switchable']
        + ['multi-label'] * (threshold is not None),
        model_name=repo_id.split('/')[-1],
        eval_results=results or None,
    )

    def cell(key: Any, name: str) -> str:
        return f'{metrics[key][name]:.2f}' if name in metrics.get(key, {}) else ''

    table = [
        f"| resolution | {' | '.join(f'{title[0].lower()}{title[1:]} (%)' for title in columns.values())} | "
        'millions of MAdds |',
        '|---|---|---|---|',
        *(f"| {'ensemble' if r == ENSEMBLE else r} | {' | '.join(cell(r, name) for name in columns)} | "
          f"{'' if madds[r] is None else f'{madds[r] / 1e6:.1f}'} |" for r in rows),
    ]
    shown = _recipe(recipe)
    text = Template(Path(__file__).with_name('card.md').read_text(encoding='utf-8')).substitute(
        mark=MARK,
        architecture=architecture,
        num_classes=model.num_classes,
        kind='classes' if threshold is None else f'independent labels (from a probability of {threshold:g} on)',
        sizes=', '.join(map(str, model.resolutions)),
        smallest=model.resolutions[-1],
        quantization=_quantization(model),
        dataset=f' on {dataset}' if results else '',
        table='\n'.join(table),
        parameters=f'{count_parameters(model) / 1e6:.2f}',
        repo_id=repo_id,
        training=_TRAINING.format(shown) if shown else '',
    )
    return text, metadata


def _recipe(args: Mapping[str, Any]) -> str:
    """Return the flags that are not the defaults of train_rs.py as YAML, without those that describe the machine."""
    task = 'multilabel' if args.get('task') == 'multilabel' else 'classification'
    defaults = dict(vars(parse_args(['--task', task])), task='classification')
    if is_warm_start(args):
        defaults.update(dict.fromkeys(WARM_START))
    shown = {k: v for k, v in args.items() if k in defaults and v != defaults[k] and k not in _MACHINE}
    shown = {k: v for k, v in shown.items() if k not in _MAY_BE_FILES or not _is_path(v)}
    shown = {k: list(v) if isinstance(v, tuple) else v for k, v in shown.items() if not k.startswith('wandb')}
    return yaml.safe_dump(shown, sort_keys=True) if shown else ''


def _is_path(value: Any) -> bool:
    """Return whether it is a file or folder of the machine, not a number or a name such as hf-hub:user/name."""
    if not isinstance(value, str) or ':' in value[2:]:
        return str(value).startswith('local-dir:')
    return os.path.exists(value) or '/' in value or os.sep in value


def _count_madds(model: nn.Module, resolution: int, in_chans: int) -> Optional[int]:
    try:
        return count_madds(model, resolution, in_chans)
    except UserError:  # the weights are pushed without the count
        return None


def _quantization(model: nn.Module) -> str:
    """Return a sentence on the bits of a quantized network."""
    config = getattr(model, '_quantization', None)
    if config is None:
        return ''
    activations = f', activations of {config.activation_bits}' if config.activation_bits < 32 else ''
    return (f' Its convolutions, except the first one, have weights of {config.weight_bits} bits{activations} '
            '([arXiv:1807.10029](https://arxiv.org/abs/1807.10029)).')

