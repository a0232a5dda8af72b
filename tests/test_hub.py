"""The Hub's own client over HTTP against a server on this machine"""
import argparse
import json
import re
import shutil
import types

import huggingface_hub
import pytest
import timm
import torch
import yaml
from conftest import assert_equal, images, randomize_bn
from hub_server import TOKEN, HubServer

from timm_rs.evaluate import count_madds
from timm_rs.hub import card as timm_rs_card
from timm_rs.hub import push as timm_rs_hub
from timm_rs.hub.card import model_card
from timm_rs.hub.push import TrainingPush, push_to_hub, read_metrics
from timm_rs_cli import main

RESOLUTIONS = (64, 48, 32)
NAME = 'rs_resnet10t'
TINY = dict(channels=[8, 16, 24, 32], stem_width=8)
REPO = 'user/net'
METRICS = {64: dict(top1=70.1234, top5=90.), 48: dict(top1=65., top5=85.), 32: dict(top1=60., top5=80.),
           'ens': dict(top1=71., top5=91.)}


def rs_model(**kwargs):
    return randomize_bn(timm.create_model(NAME, resolutions=RESOLUTIONS, num_classes=10, **TINY, **kwargs)).eval()


@pytest.fixture(scope='module')
def model():
    return rs_model()


@pytest.fixture(scope='module')
def run_folder(model, tmp_path_factory):
    """Return the output folder of a training run."""
    folder = tmp_path_factory.mktemp('run')
    args = argparse.Namespace(
        model=NAME, num_classes=10, resolutions=list(RESOLUTIONS), lr=0.3, mean=None, std=None, crop_pct=None,
        interpolation='', data_dir='/data/of/me/flowers', dataset='', output='/data/of/me/output', epochs=5,
        model_kwargs=TINY)
    torch.save(dict(epoch=3, state_dict=model.state_dict(), args=args), folder / 'model_best.pth.tar')
    (folder / 'summary.csv').write_text(
        'epoch,train_loss,eval_top1_64,eval_top5_64,eval_top1_ens,eval_top1_mean\n'
        '2,1.0,11,12,13,14\n'
        '3,0.9,21,22,23,24\n')
    return folder


def reset_client():
    """Have the client notice another offline mode: old ones keep a session of each."""
    getattr(huggingface_hub.utils._http, 'reset_sessions', lambda: None)()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the server, with the client pointed at it and logged in."""
    server = HubServer()
    for name, value in dict(
        ENDPOINT=server.url,
        HUGGINGFACE_CO_URL_TEMPLATE=server.url + '/{repo_id}/resolve/{revision}/{filename}',
        HF_HUB_OFFLINE=False,
        HF_HUB_DISABLE_XET=True,
        HF_HUB_CACHE=str(tmp_path / 'cache'),
    ).items():
        for module in (huggingface_hub.constants, huggingface_hub.file_download):  # old clients look at both
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setattr(timm_rs_card, 'count_madds', lambda model, resolution, in_chans: 1000 * resolution ** 2)
    no_sleep = types.SimpleNamespace(**dict(vars(huggingface_hub.utils._http.time), sleep=lambda seconds: None))
    monkeypatch.setattr(huggingface_hub.utils._http, 'time', no_sleep)  # between the client's attempts
    reset_client()
    yield server
    server.close()
    monkeypatch.undo()
    reset_client()


def create(revision=None):
    return timm.create_model(f"hf-hub:{REPO}{f'@{revision}' if revision else ''}", pretrained=True).eval()


def assert_restores(model, restored):
    assert type(restored) is type(model) and restored.resolutions == model.resolutions
    for x in images(*model.resolutions):
        assert_equal(restored(x), model(x))
    assert_equal(dict(restored.state_dict()), dict(model.state_dict()))


def card(server, revision='main'):
    """Return the metadata and the text of the model card."""
    text = server.files(REPO, revision)['README.md'].decode()
    _, front, body = text.split('---\n', 2)
    return yaml.safe_load(front), body


def test_push_and_create(hub, model):
    model.switch_to(32)
    url = push_to_hub(model, REPO)
    assert url.startswith(f'{hub.url}/{REPO}/commit/')
    assert model.resolution == 32
    assert sorted(hub.files(REPO)) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    config = json.loads(hub.files(REPO)['config.json'])
    assert config['architecture'] == NAME and config['model_args']['resolutions'] == list(RESOLUTIONS)
    assert config['pretrained_cfg']['input_size'] == [3, 64, 64]
    assert_restores(model, create())
    assert create().pretrained_cfg['input_size'][-1] == 64
    assert not any(authorization for _, path, authorization in hub.requests if path.startswith('/cdn/'))


def test_wrapped_networks_and_channels_last(hub):
    model = rs_model(in_chans=1, global_pool='max').to(memory_format=torch.channels_last)
    push_to_hub(torch.nn.DataParallel(model), REPO)
    restored = create()
    assert_equal(dict(restored.state_dict()), dict(model.state_dict()))
    for x in images(*RESOLUTIONS, channels=1):
        torch.testing.assert_close(restored(x), model(x))


def test_card(hub, model):
    recipe = dict(
        model=NAME, lr=0.3, epochs=5, data_dir='/data/of/me/flowers', output='/data/of/me', wandb_project='x',
        kd_model_name='local-dir:of/me/teacher', class_stats='/of/me.json', loss_pos_weight='/of/me.txt',
        traceback=True)
    push_to_hub(model, REPO, metrics=METRICS, recipe=recipe, license='mit')
    metadata, body = card(hub)
    assert metadata['library_name'] == 'timm' and metadata['license'] == 'mit'
    assert metadata['pipeline_tag'] == 'image-classification' and 'timm' in metadata['tags']
    (index,) = metadata['model-index']
    (result,) = index['results']
    assert index['name'] == 'net' and result['dataset'] == dict(name='flowers', type='flowers')
    assert result['task'] == dict(type='image-classification')
    found = {m['name']: m['value'] for m in result['metrics'] if m['type'] == 'accuracy'}
    assert found == {
        'Top-1 at 64 px': 70.123, 'Top-5 at 64 px': 90., 'Top-1 at 48 px': 65., 'Top-5 at 48 px': 85.,
        'Top-1 at 32 px': 60., 'Top-5 at 32 px': 80., 'Top-1 of the ensemble': 71., 'Top-5 of the ensemble': 91.,
    }
    assert '| 64 | 70.12 | 90.00 | 4.1 |' in body and '| ensemble | 71.00 | 91.00 | 7.4 |' in body
    assert f"timm.create_model('hf-hub:{REPO}', pretrained=True)" in body
    assert yaml.safe_load(re.search('```yaml\n(.*?)```', body, re.DOTALL)[1]) == dict(model=NAME, lr=0.3, epochs=5)
    assert 'of/me' not in body


def test_madds_in_the_card(model):
    body, _ = model_card(model, REPO)
    assert f"| 48 |  |  | {count_madds(timm.create_model(NAME[3:], **TINY, num_classes=10), 48) / 1e6:.1f} |" in body


def test_use_in_the_card_runs(hub, model):
    push_to_hub(model, REPO)
    code = re.search('```python\n(.*?)```', card(hub)[1], re.DOTALL)[1]
    assert len(code.splitlines()) == 5
    from PIL import Image

    scope = dict(image=Image.new('RGB', (80, 80)))
    exec(code, scope)
    assert scope['logits'].shape == (1, 10) and type(scope['plain']) is timm.models.ResNet


def test_card_without_metrics_has_no_index(hub, model):
    push_to_hub(model, REPO)
    metadata, body = card(hub)
    assert 'model-index' not in metadata and '| 48 |  |  |' in body and '## Training' not in body


def test_second_push_updates_our_card_and_skips_what_is_there(hub, model):
    push_to_hub(model, REPO)
    uploads = len([r for r in hub.requests if r[0] == 'PUT'])
    push_to_hub(model, REPO, metrics=METRICS)
    assert 'model-index' in card(hub)[0]
    assert len([r for r in hub.requests if r[0] == 'PUT']) == uploads == 1
    assert hub.repos[REPO].messages == ['initial commit', 'Add model', 'Add model']


def test_card_of_the_user_is_left_alone(hub, model):
    push_to_hub(model, REPO)
    repo = hub.repos[REPO]
    repo.refs['main'] = repo.commit(repo.refs['main'], {'README.md': b'# Mine\n'}, 'my card')
    push_to_hub(model, REPO, metrics=METRICS)
    assert hub.files(REPO)['README.md'] == b'# Mine\n'


def test_private(hub, model):
    push_to_hub(model, REPO, private=True)
    assert hub.repos[REPO].private
    assert_restores(model, create())
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        huggingface_hub.HfApi().model_info(REPO, token=False)


def test_private_never_goes_to_a_public_repository(hub, model):
    huggingface_hub.HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match='user/net is public, expected a private repository; nothing was pushed'):
        push_to_hub(model, REPO, private=True)
    assert hub.repos[REPO].messages == ['initial commit']


def test_revision(hub, model):
    push_to_hub(model, REPO)
    other = rs_model()
    for _ in range(2):  # the branch is made, then found
        push_to_hub(other, REPO, revision='v2')
    assert_restores(other, create('v2'))
    assert_restores(model, create())


def test_pull_request(hub, model):
    huggingface_hub.HfApi().create_repo(REPO)
    url = push_to_hub(model, REPO, metrics=METRICS, create_pr=True)
    assert url == f'{hub.url}/{REPO}/discussions/1'
    assert sorted(hub.repos[REPO].refs) == ['main', 'refs/pr/1'] and list(hub.files(REPO)) == ['.gitattributes']
    assert 'model-index' in card(hub, 'refs/pr/1')[0]
    assert_restores(model, create('refs/pr/1'))
    push_to_hub(rs_model(), REPO, revision='refs/pr/1')  # goes on with it
    assert sorted(hub.repos[REPO].refs) == ['main', 'refs/pr/1'] and list(hub.files(REPO)) == ['.gitattributes']


def test_label_names(hub, model):
    push_to_hub(model, REPO, label_names=list('abcdefghij'))
    assert list(create().pretrained_cfg['label_names']) == list('abcdefghij')
    with pytest.raises(ValueError, match='There are 2 label names, expected one for each of 10 classes'):
        push_to_hub(model, REPO, label_names=['cat', 'dog'])


def test_command_takes_metrics_recipe_and_labels_from_the_run(hub, model, run_folder, capsys):
    labels = run_folder / 'label_names.txt'
    labels.write_text('\n'.join('abcdefghij'))
    main(['push', str(run_folder / 'model_best.pth.tar'), REPO, '--private', '--license', 'mit', '--message', 'Best'])
    labels.unlink()
    assert f'pushed to {hub.url}/{REPO}/commit/' in capsys.readouterr().out
    assert_restores(model, create())
    metadata, body = card(hub)
    assert '| 64 | 21.00 | 22.00 |' in body and '| ensemble | 23.00 |' in body and 'lr: 0.3' in body
    assert metadata['license'] == 'mit' and hub.repos[REPO].private and 'Best' in hub.repos[REPO].messages
    assert list(create().pretrained_cfg['label_names']) == list('abcdefghij')


@pytest.mark.parametrize('of_average, use_ema', [(True, False), (False, True)])
def test_the_card_has_no_metrics_of_other_weights(hub, model, run_folder, tmp_path, capsys, of_average, use_ema):
    folder = shutil.copytree(run_folder, tmp_path / 'run')
    held = torch.load(folder / 'model_best.pth.tar', weights_only=False)
    held['args'].model_ema, held['args'].model_ema_force_cpu = True, not of_average
    torch.save(dict(held, state_dict_ema=held['state_dict']), folder / 'model_best.pth.tar')
    argv = ['push', str(folder / 'model_best.pth.tar'), REPO]
    main([*argv, *['--use-ema'] * use_ema])
    assert 'summary.csv: its accuracies are' in capsys.readouterr().out and '21.00' not in card(hub)[1]
    main([*argv, *['--use-ema'] * (not use_ema)])
    assert '| 64 | 21.00 | 22.00 |' in card(hub)[1]


def test_command_takes_results_of_validate_rs(hub, run_folder, tmp_path):
    row = dict(resolution=64, top1=1.5, top5=2.5, loss=0.5, madds=1, params=2, images_per_second=3.)
    (tmp_path / 'results.json').write_text(json.dumps([row, dict(row, resolution='ens', top1=4.5)]))
    main(['push', str(run_folder / 'model_best.pth.tar'), REPO, '--results', str(tmp_path / 'results.json')])
    assert '| 64 | 1.50 | 2.50 |' in card(hub)[1] and '| ensemble | 4.50 |' in card(hub)[1]


def test_read_metrics(tmp_path):
    path = tmp_path / 'results.csv'
    path.write_text('resolution,top1,top5,loss\n64,1,2,3\nens,4,5,6\n')
    assert read_metrics(str(path)) == {64: dict(top1=1., top5=2., loss=3.), 'ens': dict(top1=4., top5=5., loss=6.)}
    for content, message in (
        ('a,b\n1,2\n', 'bad.csv does not hold results of'),
        ('resolution,top1\n64,high\n', "bad.csv: top1 of 64 is 'high', expected a number"),
        ('resolution,top1\n64,nan\n', 'bad.csv: 64.top1 is nan, expected a finite number'),
        ('resolution,top1\n64\n', 'a row and the header have different numbers of values'),
        ('epoch,eval_top1_99999\n1,2\n', "bad.csv: 99999 is '99999', expected an integer from 1 to 4096"),
        ('{"a": 1}', "bad.json: the content is {'a': 1}, expected a list"),
        ('[1]', 'is 1, expected a dict'),
    ):
        path = tmp_path / ('bad.json' if content[0] in '{[' else 'bad.csv')
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_metrics(str(path), epoch=1)


def test_convert_from_the_hub(hub, model, tmp_path):
    push_to_hub(model, REPO)
    main(['convert', f'hf-hub:{REPO}', '--output', str(tmp_path / 'plain'), '--extract', '48'])
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    x = images(48)
    assert_equal(plain(x), model(x))


class Process:
    """Stands for a push that takes its time."""

    def __init__(self, command, env):
        self.command, self.env, self.code, self.waited = command, env, None, 0

    def poll(self):
        return self.code

    def wait(self):
        self.waited += 1
        self.code = 0
        return self.code


def test_training_push(run_folder, tmp_path, monkeypatch):
    started = []

    def popen(command, env):
        started.append(Process(command, env))
        return started[-1]

    monkeypatch.setattr(timm_rs_hub.subprocess, 'Popen', popen)
    args = argparse.Namespace(
        push_to_hub=REPO, hub_private=True, model_ema=True, model_ema_force_cpu=False, num_classes=2)
    push = TrainingPush(args, str(tmp_path))
    push.start()
    assert not started  # nothing to push yet
    (tmp_path / 'last.pth.tar').touch()
    push.start()
    (tmp_path / 'model_best.pth.tar').touch()
    push.start()  # while the first is under way
    assert len(started) == 1
    assert started[0].command[-4:] == [str(tmp_path / 'last.pth.tar'), REPO, '--private', '--use-ema']
    assert push.finish()
    assert [p.waited for p in started] == [1, 1] and str(tmp_path / 'model_best.pth.tar') in started[1].command


def test_training_push_in_its_own_process(hub, model, run_folder, monkeypatch, capfd):
    for name, value in dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1').items():
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(
        push_to_hub=REPO, hub_private=False, model_ema=False, model_ema_force_cpu=False, num_classes=10)
    push = TrainingPush(args, str(run_folder))
    assert push.finish()
    assert_restores(model, create())
    assert TOKEN not in ''.join(capfd.readouterr()) and TOKEN not in str(push.process.args)
