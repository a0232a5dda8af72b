"""Switchable networks on the Hugging Face Hub"""
import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import torch.nn as nn
from timm.utils import unwrap_model

from timm_rs_runtime import fields
from timm_rs_runtime.errors import UserError, one_line

from ..evaluate import ENSEMBLE, METRICS
from ..records import find_checkpoint, read_csv, to_number
from ..switchable import SwitchableMixin
from .card import MARK, Metrics, model_card
from .convert import write_model

__all__ = ['HubError', 'TrainingPush', 'has_averaged_metrics', 'push_to_hub', 'read_metrics']

_logger = logging.getLogger('train')
_PATIENCE = 300  # seconds for the next bytes from the Hub; its client would wait for ever
_ROWS = fields.array(fields.table(fields.text(), fields.plain()))
_METRICS = fields.table(
    lambda key: key if key == ENSEMBLE else fields.size_text(key), fields.table(fields.text(), fields.number()))


class HubError(UserError, RuntimeError):
    """The Hub could not be reached or declined; the message is one line."""


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
    """Push a switchable network as safetensors, with a config.json as timm writes it and a card.

    `timm.create_model('hf-hub:user/name', pretrained=True)` then restores it with its resolutions. The repository is
    made if there is none, and so is the branch of a revision. An existing README is replaced only if it is one of ours:
    every card that we write holds a line that says so, and a push updates the card as long as this line is there. The
    token comes from the argument, HF_TOKEN or `hf auth login`; it is never printed or written.

    Args:
        model: Switchable network, or a wrapper of it (DistributedDataParallel, torch.compile, timm's EMA).
        repo_id: 'user/name' on the Hub.
        metrics: For each resolution, and 'ens' for the ensemble, 'top1' and 'top5', or 'map' and 'macro_f1' for several
            labels per image, in percent, as timm_rs.evaluate gives them.
        recipe: Flags of the training run; those that describe the machine, such as paths, stay out of the card.
        dataset: Name of the data set of the metrics.
        label_names: Names of the classes, in their order.
        license: License of the weights; if None that of the pretrained weights, or apache-2.0.
        commit_message: First line of the commit.
        token: Access token.
        revision: Branch to push to, the main one if None.
        private: Make the repository private.
        create_pr: Open a pull request instead of changing the branch.
        packed: Push the weights of a quantized network as K bits each.

    Returns:
        Address of the commit or pull request.

    Raises:
        HubError: The Hub could not be reached or declined.
        ValueError: The network is not switchable or not timm's, the repo_id is malformed, or a private repository was
            asked for and it is public.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

    model = unwrap_model(model)
    if not isinstance(model, SwitchableMixin):
        raise UserError(f'{type(model).__name__} is not switchable; timm.models.push_to_hf_hub pushes plain networks.')
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise UserError(f'{repo_id!r} is not a name of a repository, expected user/name: {one_line(e)}') from None
    license = license or model.pretrained_cfg.get('license') or 'apache-2.0'
    api, client = HfApi(token=token, library_name='timm_rs'), get_session()
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, folder, label_names, packed)
        text, metadata = model_card(model, repo_id, metrics, recipe, dataset, license)
        before, client.timeout = getattr(client, 'timeout', None), _PATIENCE
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.model_info(repo_id).private:
                raise UserError(
                    f'{repo_id} is public, expected a private repository; nothing was pushed.')
            if revision and not create_pr and not revision.startswith('refs/'):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            readme = _read_readme(api, repo_id, revision)
            if readme is None or MARK in readme:
                card = f"---\n{metadata}\n---\n# Model card for {repo_id.split('/')[-1]}\n\n{text}"
                Path(folder, 'README.md').write_text(card, encoding='utf-8')
            commit = api.upload_folder(  # in one commit, without the files that have not changed
                repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
                commit_message=commit_message)
            return commit.pr_url or commit.commit_url
        except Exception as e:  # the client raises those of its transport, which change with its version
            message = _explain(e)
            if message is None:
                raise
            secret = token or get_token()
            if secret:
                message = message.replace(secret, '<token>')
            raise HubError(f'Cannot push to {repo_id}: {message}') from e
        finally:
            client.timeout = before


def read_metrics(path: str, epoch: Optional[int] = None) -> Dict[Union[int, str], Dict[str, float]]:
    """Return the metrics of each resolution from results of validate_rs.py, or from a summary.csv of train_rs.py.

    Args:
        path: Name of the file, .json or .csv.
        epoch: Epoch whose row of the summary is read.

    Raises:
        ValueError: The file holds no such metrics.
    """
    rows = fields.read_json(path, _ROWS) if path.endswith('.json') else read_csv(path)
    found: Dict[str, Dict[str, float]] = {}
    for row in rows:
        if 'resolution' in row:
            cells = [(name, str(row['resolution']), row.get(name)) for name in METRICS]
        elif 'epoch' in row:
            columns = [re.fullmatch(rf"eval_({'|'.join(METRICS)})_(\d+|{ENSEMBLE})", name) for name in row]
            cells = [(m[1], m[2], row[m[0]]) for m in columns if m and epoch in (None, to_number(row['epoch'], path))]
        else:
            raise UserError(f'{path} does not hold results of validate_rs.py or train_rs.py.')
        for name, key, value in cells:
            if value not in (None, ''):
                found.setdefault(key, {})[name] = to_number(value, f'{path}: {name} of {key}')
    return fields.check_fields(found, _METRICS, path)


def has_averaged_metrics(recipe: Mapping[str, Any]) -> bool:
    """Return whether the metrics of a run with these flags are those of the moving average of its weights."""
    return bool(recipe.get('model_ema')) and not recipe.get('model_ema_force_cpu')


class TrainingPush:
    """Pushes the best checkpoint of a run in a separate process, so that training neither waits nor fails with it."""

    def __init__(self, args: argparse.Namespace, output_dir: str):
        from huggingface_hub import get_token

        self.output_dir = output_dir
        self.flags = [args.push_to_hub]
        if args.hub_private:
            self.flags.append('--private')
        if has_averaged_metrics(vars(args)):
            self.flags.append('--use-ema')
        self.process: Optional[subprocess.Popen] = None
        if not get_token():
            _logger.warning('There is no token for --push-to-hub: log in with `hf auth login` before training ends.')

    def start(self) -> None:
        """Start a push, unless there is nothing yet or the last push is not finished."""
        if self.process is not None and self.process.poll() is None:
            _logger.info('The last push is still running, this one is left out.')
            return
        try:
            checkpoint = find_checkpoint(self.output_dir)
        except UserError:  # there is none yet
            return
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get('PYTHONPATH')]))
        env = dict(os.environ, PYTHONPATH=path, HF_HUB_DISABLE_PROGRESS_BARS='1')
        command = [sys.executable, '-m', 'timm_rs_cli', 'push', checkpoint, *self.flags]
        self.process = subprocess.Popen(command, env=env)

    def finish(self) -> bool:
        """Push the best checkpoint at the end and return whether that worked."""
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


def _explain(error: BaseException) -> Optional[str]:
    """Return in one line why the Hub failed, None for an error of another kind."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    response = next((e.response for e in chain if getattr(e, 'response', None) is not None), None)
    if response is not None:
        said = next((e.server_message for e in chain if getattr(e, 'server_message', None)), None)
        said = f"{response.status_code}{f', {said.splitlines()[0]}' if said else ''}"
        return {
            401: f'the Hub does not accept the token ({said}), set HF_TOKEN or log in with `hf auth login`.',
            403: f'the token has no permission to write there ({said}).',
            404: f'there is no such repository or revision, or the token has no permission to see it ({said}).',
            409: f'the Hub is busy with another change of this repository ({said}).',
        }.get(response.status_code, f'the Hub answers {said}.')
    if any(type(e).__name__ == 'OfflineModeIsEnabled' for e in chain):
        return 'offline mode is on, unset HF_HUB_OFFLINE.'
    if isinstance(error, json.JSONDecodeError):
        return 'the answer does not come from the Hub, check HF_ENDPOINT and the proxy.'
    if isinstance(error, (AttributeError, KeyError, TypeError, ValueError)):
        return None
    messages = [' '.join(str(e).split()).rstrip('.') or type(e).__name__ for e in chain]
    return textwrap.shorten(': '.join(dict.fromkeys(messages)), 300, placeholder=' ...') + '.'
