"""One LiteRT file for all sizes; litert-torch needs an environment of its own, so CI leaves these out"""
import json
import os
import zipfile

import pytest
import torch
from conftest import mixed_network, randomize_bn

from timm_rs.export import ExportError, export_litert
from timm_rs_runtime.errors import UserError

pytest.importorskip('litert_torch')
from ai_edge_litert.interpreter import Interpreter  # noqa: E402

SIZES = (16, 12)


@pytest.fixture(scope='module')
def small():
    return randomize_bn(mixed_network(SIZES))


@pytest.fixture(scope='module')
def exported(small, tmp_path_factory):
    path = tmp_path_factory.mktemp('litert') / 'all.tflite'
    return path, export_litert(small, str(path), class_names=list('abcde'), batch_size=2)


def test_signatures_compute_what_the_network_does(small, exported):
    path, found = exported
    assert list(found) == [16, 12] and all(error < 1e-5 for error in found.values())
    interpreter = Interpreter(str(path))
    for size in SIZES:
        x = torch.randn(2, 3, size, size)
        logits = interpreter.get_signature_runner(f'forward_{size}')(images=x.numpy())['logits']
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), small.at(size)(x), rtol=1e-5, atol=1e-5)


def test_shared_weights_are_in_the_file_once(small, exported):
    weights = sum(p.numel() * 4 for p in small.at(16).parameters())
    assert weights < os.path.getsize(exported[0]) < 1.25 * weights


def test_a_file_records_what_it_needs(exported):
    metadata = json.loads(zipfile.ZipFile(exported[0]).read('timm_rs.json'))
    assert metadata['class_names'] == list('abcde') and metadata['resolutions'] == [16, 12]


@pytest.mark.parametrize('change', [dict(batch_size=0), dict(class_names=['a']), dict(overwrite=False)])
def test_mistakes_leave_a_file_as_it_is(small, tmp_path, change):
    path = tmp_path / 'a.tflite'
    path.write_text('mine')
    with pytest.raises(UserError):
        export_litert(small, str(path), **{'overwrite': True, **change})
    assert path.read_text() == 'mine' and os.listdir(tmp_path) == ['a.tflite']


def test_a_file_that_differs_from_the_network_is_not_kept(small, tmp_path, monkeypatch):
    from timm_rs.export import litert

    monkeypatch.setattr(litert, 'load', lambda path: lambda images: torch.zeros(len(images), 5))
    with pytest.raises(ExportError, match='differs from the network by'):
        export_litert(small, str(tmp_path / 'a.tflite'))
    assert not os.listdir(tmp_path)
