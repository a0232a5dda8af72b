"""What the Hub, the network or the user does wrong while a network is pushed"""
import time

import huggingface_hub
import pytest
import timm
from hub_server import TOKEN
from test_hub import NAME, REPO, assert_restores, card, create, hub, model, reset_client, run_folder  # noqa: F401

from timm_rs.hub.push import HubError, push_to_hub
from timm_rs_cli import main
from timm_rs_runtime import UserError


@pytest.mark.parametrize('repo_id', ['user/net/x', 'user/ne t', ''])
def test_malformed_repo_id(repo_id, hub, model):
    with pytest.raises(UserError, match='is not a name of a repository, expected user/name'):
        push_to_hub(model, repo_id)
    assert not hub.requests


def test_plain_network_is_refused(hub):
    with pytest.raises(ValueError, match='ResNet is not switchable; timm.models.push_to_hf_hub pushes plain'):
        push_to_hub(timm.create_model('test_resnet'), REPO)


# The words are those of the client's transport, httpx or requests.
DROPPED = 'Server disconnected' if hasattr(huggingface_hub, 'set_client_factory') else "(ProtocolError('Connection"
FAULTS = [
    ('POST', '/api/repos/create', 401, 'the Hub does not accept the token (401, Denied.), set HF_TOKEN or log in'),
    ('POST', '/api/repos/create', 403, 'the token has no permission to write there (403, Denied.).'),
    ('POST', '/preupload/', 404, 'there is no such repository or revision, or the token has no permission to see it '
                                 '(404'),
    ('POST', '/commit/', 403, 'the token has no permission to write there (403, Denied.).'),
    ('POST', '/commit/', 409, 'the Hub is busy with another change of this repository (409, Conflict.).'),
    ('POST', '/api/repos/create', 'drop', DROPPED),
    ('POST', '/commit/', 'drop', DROPPED),
    ('PUT', '/lfs/', 403, 'the token has no permission to write there (403, Denied.).'),
    ('PUT', '/lfs/', 'drop', f"Error while uploading 'model.safetensors' to the Hub: {DROPPED}"),
    ('POST', '/commit/', 500, 'the Hub answers 500'),
]


@pytest.mark.parametrize('method, pattern, how, message', FAULTS)
def test_failed_push_is_one_line_and_keeps_the_weights(method, pattern, how, message, hub, run_folder, capsys):
    checkpoint = run_folder / 'model_best.pth.tar'
    before = checkpoint.read_bytes()
    hub.fail(method, pattern, how)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(['push', str(checkpoint), REPO, '--message', 'third try'])
    assert e.value.code == 1
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    assert line.startswith(f'timm-rs push: error: Cannot push to {REPO}: {message}')
    assert line.endswith(f"push again with: timm-rs push {checkpoint} {REPO} --message 'third try'")
    assert 'Traceback' not in err and TOKEN not in err
    assert checkpoint.read_bytes() == before

    hub.faults.clear()
    main(['push', str(checkpoint), REPO])
    assert sorted(hub.files(REPO)) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    assert '| 64 | 21.00 | 22.00 |' in card(hub)[1]


def test_connection_that_drops_once_does_no_harm(hub, model):
    hub.fail('PUT', '/lfs/', 'drop', times=1)
    push_to_hub(model, REPO)
    assert_restores(model, create())


def test_offline(hub, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    reset_client()
    with pytest.raises(HubError, match='Cannot push to user/net: offline mode is on, unset HF_HUB_OFFLINE.'):
        push_to_hub(model, REPO)


def test_command_offline(hub, run_folder, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    reset_client()
    with pytest.raises(SystemExit):
        main(['push', str(run_folder / 'model_best.pth.tar'), REPO])
    (line,) = capsys.readouterr().err.splitlines()
    assert 'offline mode is on' in line and 'push again with: timm-rs push ' in line
    assert not hub.requests


def test_no_server(hub, model, monkeypatch):
    hub.close()
    with pytest.raises(HubError, match='Cannot push to user/net: .*[Cc]onnect'):
        push_to_hub(model, REPO)


@pytest.mark.skipif(not hasattr(huggingface_hub, 'set_client_factory'), reason='clients with requests cannot')
def test_a_hub_that_does_not_answer(hub, model, monkeypatch):
    monkeypatch.setattr('hub_server._Handler.create_repo', lambda self: time.sleep(5))
    monkeypatch.setattr('timm_rs.hub.push._PATIENCE', 0.5)
    with pytest.raises(HubError, match='Cannot push to user/net: .*timed out'):
        push_to_hub(model, REPO)
    assert huggingface_hub.utils.get_session().timeout.read is None


def test_no_hub(hub, model, monkeypatch):
    monkeypatch.setattr('hub_server._Handler.create_repo', lambda self: self.answer(200, b'<html>log in first</html>'))
    with pytest.raises(HubError, match='the answer does not come from the Hub'):
        push_to_hub(model, REPO)


@pytest.mark.parametrize('given', [None, 'hf_AnotherToken'])
def test_token_is_nowhere(given, hub, model, capfd, caplog, monkeypatch):
    token = given or TOKEN
    monkeypatch.setattr('hub_server.TOKEN', token)
    for name in ('huggingface_hub', 'timm', 'timm_rs', 'train'):
        caplog.set_level('DEBUG', logger=name)
    push_to_hub(model, REPO, recipe=dict(token=token, hub_token=token, model=NAME), token=given)
    monkeypatch.setattr('hub_server._Handler.create_repo', lambda self: self.error(400, f'bad {self.authorization}'))
    with pytest.raises(HubError, match='400, bad Bearer <token>') as e:
        push_to_hub(model, REPO, token=given)
    written = b''.join(hub.files(REPO).values()).decode(errors='replace')
    assert token not in ''.join([written, str(e.value), caplog.text, *capfd.readouterr()])
