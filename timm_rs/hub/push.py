"""Switchable networks on the Hugging Face Hub, around timm's own push"""
import argparse
import csv
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import torch.nn as nn
from timm.models import push_to_hf_hub
from timm.models._input import get_model_input_config
from timm.utils import unwrap_model

from timm_rs_runtime.errors import UserError
from timm_rs_runtime.files import atomic_write

from ..data.datasets import number_classes
from ..evaluate import ENSEMBLE, count_madds, count_parameters
from ..switchable import SwitchableMixin
from .convert import describe_for_timm, ready_to_save

__all__ = [
    'LABEL_FILE', 'HubError', 'TrainingPush', 'model_card', 'push_to_hub', 'read_metrics', 'write_label_names']

_logger = logging.getLogger('train')

LABEL_FILE = 'label_names.txt'  # beside a checkpoint

_MARK = '<!-- timm_rs wrote this card and updates it with every push. Remove this line to keep what you change. -->'
_PAPER = """\
@inproceedings{wang2020resolution,
  title={Resolution Switchable Networks for Runtime Efficient Image Recognition},
  author={Wang, Yikai and Sun, Fuchun and Li, Duo and Yao, Anbang},
  booktitle={European Conference on Computer Vision (ECCV)},
  year={2020}
}"""
# Flags of a run that tell of the machine and not of the training.
_MACHINE = (
    'checkpoint_hist', 'config', 'data', 'data_dir', 'dataset_download', 'device', 'device_modules', 'distributed',
    'class_map', 'experiment', 'hub_private', 'initial_checkpoint', 'local_rank', 'log_interval', 'log_tensorboard',
    'log_wandb', 'max_unreadable', 'no_prefetcher', 'output', 'pin_mem', 'pretrained_path', 'push_interval',
    'push_to_hub', 'recovery_interval', 'resume', 'save_epochs', 'save_images', 'workers',
)
Metrics = Mapping[Union[int, str], Mapping[str, float]]


class HubError(UserError, RuntimeError):
    """The Hub could not be reached or declined, told in one line."""


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        metrics: Optional[Metrics] = None,
        recipe: Optional[Mapping[str, Any]] = None,
        dataset: Optional[str] = None,
        label_names: Optional[Sequence[str]] = None,
        license: Optional[str] = None,
        commit_message: str = 'Add model',
        token: Optional[str] = None,
        revision: Optional[str] = None,
        private: bool = False,
        create_pr: bool = False,
        packed: bool = False,
) -> str:
    """Push a switchable network by timm.models.push_to_hf_hub, as safetensors only, with a config.json and a card.

    `timm.create_model('hf-hub:user/name', pretrained=True)` then restores it with its resolutions. The repository is
    made if there is none, and so is the branch of a revision. A README that is there already is left alone, unless it
    is one of ours: every card that we write holds a line that says so, and as long as it is there a push brings the
    card up to date. The token comes from the argument, HF_TOKEN or `hf auth login`; it is never printed or written.

    Args:
        model: Switchable network, or a wrapper of it (DistributedDataParallel, torch.compile, timm's EMA).
        repo_id: 'user/name' on the Hub.
        metrics: For each resolution, and 'ens' for the ensemble, 'top1' and 'top5' in percent, as timm_rs.evaluate
            gives them.
        recipe: Flags of the training run; those that tell of the machine, such as paths, stay out of the card.
        dataset: Name of the data set that the metrics are of.
        label_names: Names of the classes, in their order.
        license: License of the weights, that of the pretrained weights or apache-2.0 if None.
        commit_message: First line of the commit.
        token: Access token.
        revision: Branch to push to, the main one if None.
        private: Make the repository a private one.
        create_pr: Open a pull request instead of changing the branch.
        packed: Push the weights of a quantized network as K bits each.

    Returns:
        Address of the commit or pull request.

    Raises:
        HubError: The Hub could not be reached or declined.
        ValueError: The network is not switchable or not timm's, the repo_id is malformed, or the repository is public
            although a private one was asked for.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    model = unwrap_model(model)
    if not isinstance(model, SwitchableMixin):
        raise UserError(f'{type(model).__name__} is not switchable; timm.models.push_to_hf_hub pushes plain networks.')
    validate_repo_id(repo_id)
    described = describe_for_timm(model, label_names)
    license = license or model.pretrained_cfg.get('license') or 'apache-2.0'
    body, metadata = model_card(model, repo_id, metrics, recipe, dataset, license)
    api = HfApi(token=token, library_name='timm_rs')
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise UserError(f'{repo_id} exists and is public, nothing was pushed because a private one was asked for.')
        if revision and not create_pr and not revision.startswith('refs/'):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        readme = _read_readme(api, repo_id, revision)
        with ready_to_save(model, packed) as ready:
            commit = push_to_hf_hub(
                ready,
                repo_id,
                commit_message=commit_message,
                token=token,
                revision=revision,
                private=private,
                create_pr=create_pr,
                # with our mark in it, the card that timm writes is ours should the connection end here
                model_card=dict(description=body, tags=metadata.tags, license=license),
                safe_serialization=True,
                **described,
            )
        if readme is None or _MARK in readme:
            pr_revision = commit.pr_revision
            card = api.upload_file(  # which skips a card that has not changed
                path_or_fileobj=f"---\n{metadata}\n---\n# Model card for {repo_id.split('/')[-1]}\n\n{body}\n".encode(),
                path_in_repo='README.md',
                repo_id=repo_id,
                revision=pr_revision or revision,
                create_pr=create_pr and not pr_revision,
                commit_message='Update model card',
            )
            commit = commit if pr_revision else card
        return commit.pr_url or commit.commit_url
    except Exception as e:  # the client raises those of its transport, which change with its version
        message = _explain(e)
        if message is None:
            raise
        secret = token or get_token()
        if secret:
            message = message.replace(secret, '<token>')
        raise HubError(f'Cannot push to {repo_id}: {message}') from e


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

    architecture = describe_for_timm(model)['model_config']['pretrained_cfg']['architecture']
    metrics, recipe = metrics or {}, recipe or {}
    folder = os.path.basename(os.path.normpath(recipe.get('data_dir') or 'unknown'))
    dataset = dataset or recipe.get('dataset') or folder
    in_chans = get_model_input_config(model)['input_size'][0]
    madds: Dict[Any, Optional[int]] = {r: _count_madds(model, r, in_chans) for r in model.resolutions}
    madds[ENSEMBLE] = sum(madds.values()) if None not in madds.values() else None
    rows = [key for key in madds if key != ENSEMBLE or key in metrics]

    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type='accuracy',
            metric_name=f"{title} {'of the ensemble' if key == ENSEMBLE else f'at {key} px'}",
            metric_value=round(metrics[key][name], 3),
        )
        for key in rows if key in metrics
        for name, title in (('top1', 'Top-1'), ('top5', 'Top-5')) if name in metrics[key]
    ]
    metadata = ModelCardData(
        library_name='timm',
        license=license,
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rs', 'resolution-switchable'],
        model_name=repo_id.split('/')[-1],
        eval_results=results or None,
    )

    def cell(key: Any, name: str) -> str:
        return f'{metrics[key][name]:.2f}' if name in metrics.get(key, {}) else ''

    table = [
        '| resolution | top-1 (%) | top-5 (%) | MAdds |',
        '|---|---|---|---|',
        *(f"| {'ensemble' if r == ENSEMBLE else r} | {cell(r, 'top1')} | {cell(r, 'top5')} | {_giga(madds[r])} |"
          for r in rows),
    ]
    sizes = ', '.join(map(str, model.resolutions))
    sections = [
        _MARK,
        f'`{architecture}` of {model.num_classes} classes, a Resolution Switchable Network '
        f'([arXiv:2007.09558](https://arxiv.org/abs/2007.09558)): one set of weights for images of {sizes} pixels, '
        f'of which only the BatchNorms are private to each size.{_quantization(model)}',
        '## Accuracy' + (f' on {dataset}' if results else ''),
        '\n'.join(table),
        f'{count_parameters(model):,} parameters in all. MAdds are multiply-adds of one image.',
        '## Use',
        f"""\
```python
import timm, timm_rs  # pip install timm_rs; importing it registers the rs_* models
model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))  # the size of the image chooses the resolution
plain = model.at({model.resolutions[-1]})  # one resolution as a plain timm model, to deploy
```""",
    ]
    shown = _recipe(recipe)
    if shown:
        sections += ['## Training', 'Flags of `train_rs.py` that are not its defaults:', f'```yaml\n{shown}```']
    sections += ['## Citation', f'```bibtex\n{_PAPER}\n```']
    return '\n\n'.join(sections), metadata


def read_metrics(path: str, epoch: Optional[int] = None) -> Dict[Union[int, str], Dict[str, float]]:
    """Return the metrics of each resolution from results of validate_rs.py, or from a summary.csv of train_rs.py.

    Args:
        path: Name of the file, .json or .csv.
        epoch: Epoch whose row of the summary is meant.

    Raises:
        ValueError: The file holds no such metrics.
    """
    try:
        with open(path, newline='') as f:
            rows = json.load(f) if path.endswith('.json') else list(csv.DictReader(f))
        found = {}
        for row in rows:
            if 'resolution' in row:
                told = {k: row[k] for k in ('top1', 'top5', 'loss') if row.get(k) not in (None, '')}
                found[str(row['resolution'])] = {k: float(v) for k, v in told.items()}
            elif epoch is None or int(row['epoch']) == epoch:
                for key, value in row.items():
                    match = re.fullmatch(rf'eval_(top1|top5|loss)_(\d+|{ENSEMBLE})', key)
                    if match and value:
                        found.setdefault(match[2], {})[match[1]] = float(value)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f'{path} holds no results of validate_rs.py or train_rs.py ({type(e).__name__}: {e}).') from e
    return {int(key) if key.isdigit() else key: row for key, row in found.items()}


def write_label_names(output_dir: str, dataset: Any, num_classes: int) -> None:
    """Write the names of the classes beside the checkpoints of a run, if its data set tells one for each class."""
    numbers = number_classes(dataset) or {}
    if sorted(numbers.values()) == list(range(num_classes)):
        with atomic_write(os.path.join(output_dir, LABEL_FILE), overwrite=True) as f:
            f.writelines(f'{name}\n' for name in sorted(numbers, key=numbers.get))


class TrainingPush:
    """Pushes the best checkpoint of a run in a process of its own, so that training neither waits nor fails with it.

    Args:
        args: Flags of the run.
        output_dir: Folder of its checkpoints.
    """

    def __init__(self, args: argparse.Namespace, output_dir: str):
        from huggingface_hub import get_token

        self.output_dir = output_dir
        self.flags = [args.push_to_hub]
        if args.hub_private:
            self.flags.append('--private')
        if args.model_ema and not args.model_ema_force_cpu:  # which the metrics are of
            self.flags.append('--use-ema')
        self.process: Optional[subprocess.Popen] = None
        if not get_token():
            _logger.warning('There is no token for --push-to-hub: log in with `hf auth login` before training ends.')

    def start(self) -> None:
        """Begin to push, unless there is nothing yet or the last push is not done."""
        if self.process is not None and self.process.poll() is None:
            _logger.info('The last push is under way still, this one is left out.')
            return
        for name in ('model_best.pth.tar', 'last.pth.tar'):
            checkpoint = os.path.join(self.output_dir, name)
            if os.path.exists(checkpoint):
                package = str(Path(__file__).parents[1])
                path = os.pathsep.join(filter(None, [package, os.environ.get('PYTHONPATH')]))
                env = dict(os.environ, PYTHONPATH=path, HF_HUB_DISABLE_PROGRESS_BARS='1')
                command = [sys.executable, '-m', 'timm_rs_cli', 'push', checkpoint, *self.flags]
                self.process = subprocess.Popen(command, env=env)
                return

    def finish(self) -> bool:
        """Push what is best in the end and return whether that went well."""
        if self.process is not None:
            self.process.wait()
        self.start()
        return self.process is None or self.process.wait() == 0


def _read_readme(api: Any, repo_id: str, revision: Optional[str]) -> Optional[str]:
    if not api.file_exists(repo_id, 'README.md', revision=revision):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, 'README.md', revision=revision, local_dir=folder)
        return Path(path).read_text(encoding='utf-8')


def _recipe(args: Mapping[str, Any]) -> str:
    """Return the flags that are not the defaults of train_rs.py as YAML, without those that tell of the machine."""
    import yaml

    from ..train.options import create_parser

    defaults = vars(create_parser().parse_args([]))
    shown = {k: v for k, v in args.items() if k in defaults and v != defaults[k] and k not in _MACHINE}
    shown = {k: list(v) if isinstance(v, tuple) else v for k, v in shown.items() if not k.startswith('wandb')}
    return yaml.safe_dump(shown, sort_keys=True) if shown else ''


def _explain(error: BaseException) -> Optional[str]:
    """Return in one line what came of talking to the Hub, None for an error of another kind."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    response = next((e.response for e in chain if getattr(e, 'response', None) is not None), None)
    if response is not None:
        said = next((e.server_message for e in chain if getattr(e, 'server_message', None)), None)
        said = f"{response.status_code}{f', {said.splitlines()[0]}' if said else ''}"
        return {
            401: f'the Hub does not accept the token ({said}), set HF_TOKEN or log in with `hf auth login`.',
            403: f'the token may not write there ({said}).',
            404: f'there is no such repository or revision, or the token may not see it ({said}).',
            409: f'the Hub is busy with another change of this repository ({said}).',
        }.get(response.status_code, f'the Hub answers {said}.')
    if any(type(e).__name__ == 'OfflineModeIsEnabled' for e in chain):
        return 'offline mode is on, unset HF_HUB_OFFLINE.'
    if isinstance(error, json.JSONDecodeError):
        return 'the answer is not one of the Hub, look at HF_ENDPOINT and the proxy.'
    if isinstance(error, (AttributeError, KeyError, TypeError, ValueError)):
        return None
    told = [' '.join(str(e).split()).rstrip('.') or type(e).__name__ for e in chain]
    return textwrap.shorten(': '.join(dict.fromkeys(told)), 300, placeholder=' ...') + '.'


def _count_madds(model: nn.Module, resolution: int, in_chans: int) -> Optional[int]:
    try:
        return count_madds(model, resolution, in_chans)
    except ValueError:  # no reason to keep the weights back
        return None


def _quantization(model: nn.Module) -> str:
    """Return a sentence on the bits of a quantized network."""
    told = getattr(model, '_quantization', None)
    if not told:
        return ''
    activations = f", activations of {told['activation_bits']}" if told['activation_bits'] < 32 else ''
    return (f" Its convolutions have weights of {told['weight_bits']} bits{activations}, but for the first one "
            '([arXiv:1807.10029](https://arxiv.org/abs/1807.10029)).')


def _giga(madds: Optional[int]) -> str:
    if madds is None:
        return ''
    return f'{madds / 1e9:.2f} G' if madds >= 1e9 else f'{madds / 1e6:.1f} M'
