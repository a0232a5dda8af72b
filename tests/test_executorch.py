"""One ExecuTorch program for all sizes, run by its Python runtime"""
import json
import os

import numpy as np
import pytest
import torch
from conftest import mixed_network, randomize_bn
from PIL import Image

from timm_rs.export import ExportError, export_executorch
from timm_rs_cli import main
from timm_rs_runtime.errors import UserError

runtime = pytest.importorskip('executorch.runtime')
SIZES = (16, 12)


@pytest.fixture(scope='module')
def small():
    """With BatchNorms of other signs at the smaller size."""
    model = randomize_bn(mixed_network(SIZES))
    model[5][12].weight.data[::2] *= -1
    return model


@pytest.fixture(scope='module')
def photographs():
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize((20, 20)) for image in noise]


def run(path, x):
    program = runtime.Runtime.get().load_program(str(path))
    return program.load_method(f'forward_{x.shape[-1]}').execute([x])[0].clone()


@pytest.fixture(scope='module')
def exported(small, tmp_path_factory):
    path = tmp_path_factory.mktemp('float') / 'all.pte'
    return path, export_executorch(small, str(path), class_names=list('abcde'))


def test_methods_compute_what_the_network_does(small, exported):
    path, found = exported
    assert list(found) == [16, 12] and all(error < 1e-5 for error in found.values())
    for size in SIZES:
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(run(path, x), small.at(size)(x), rtol=1e-5, atol=1e-5)


def test_a_program_records_what_it_needs(exported):
    program = runtime.Runtime.get().load_program(str(exported[0]))
    assert program.method_names == {'forward_16', 'forward_12', 'resolutions', 'metadata'}
    assert program.load_method('resolutions').execute([]) == [16, 12]
    metadata = json.loads(program.load_method('metadata').execute([])[0])
    assert metadata['class_names'] == list('abcde') and metadata['mean'] == [0.5] * 3


def test_shared_weights_are_in_the_file_once(small, exported):
    weights = sum(p.numel() * 4 for p in small.at(16).parameters())
    assert weights < os.path.getsize(exported[0]) < 1.25 * weights


def test_int8(small, photographs, tmp_path):
    """Integers are shared too, although BatchNorms of the sizes have other scales and signs; here in batches."""
    found = export_executorch(small, str(tmp_path / 'int8.pte'), photographs, batch_size=2)
    assert all(row['error'] < 0.1 for row in found.values())
    weights = sum(p.numel() for p in small.at(16).parameters())
    assert weights < os.path.getsize(tmp_path / 'int8.pte') < 1.8 * weights
    assert run(tmp_path / 'int8.pte', torch.randn(2, 3, 12, 12)).shape == (2, 5)


def test_logits_of_int8_may_be_larger_than_those_measured():
    """The logit is the sum of three channels: 1 for the images that ranges are measured on, 3 for a white one."""
    from timm_rs.export.executorch import trace_int8

    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 3, 1, bias=False), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(3, 1, bias=False)).eval()
    network.pretrained_cfg = dict(input_size=(3, 4, 4))
    network[0].weight.data = torch.eye(3).view(3, 3, 1, 1)
    network[4].weight.data.fill_(1.)
    colours = [channel.expand(1, 4, 4, 3).permute(0, 3, 1, 2).contiguous().numpy() for channel in torch.eye(3)]
    program = trace_int8({4: network}, {4: colours})[4].module()
    assert program(torch.from_numpy(colours[0])).item() == pytest.approx(1, abs=0.05)
    assert program(torch.ones(1, 3, 4, 4)).item() == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize('change, message', [
    (dict(batch_size=0), 'batch_size is 0, expected a positive number'),
    (dict(class_names=['a']), '1 class names, expected one for each of 5'),
    (dict(images=[Image.new('RGB', (20, 20))], batch_size=2), 'fewer readable images than batch_size, 2'),
])
def test_bad_arguments(small, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        export_executorch(small, str(tmp_path / 'a.pte'), **change)
    assert os.listdir(tmp_path) == []


def test_a_file_that_differs_is_not_written(small, tmp_path, monkeypatch):
    from timm_rs.export import executorch

    monkeypatch.setattr(executorch, 'lower', lambda programs, metadata, path: open(path, 'w').close())
    monkeypatch.setattr(executorch, 'load', lambda path: lambda x: small.at(x.shape[-1])(x) + 0.01)
    with pytest.raises(ExportError, match='differs from the network'):
        export_executorch(small, str(tmp_path / 'a.pte'))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('flags, message', [
    (['--resolution', '16'], 'does not go with --resolution'),
    (['--dynamic-batch'], 'does not go with --dynamic-batch'),
])
def test_command_tells_what_is_wrong(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(['export', 'rs_resnet10t.imagenette', '-o', str(tmp_path / 'a.pte'), '--format', 'executorch', *flags])
    assert message in capsys.readouterr().err
