"""The command timm-rs export"""
import argparse
import json
import os
import shutil

import pytest
import timm
import torch
from conftest import RESOLUTIONS, TINY, images, rs_model
from PIL import Image

from timm_rs.hub.convert import save_model
from timm_rs_cli import main

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def folder(tiny, tmp_path_factory):
    model = timm.create_model('rs_resnet10t', resolutions=RESOLUTIONS, num_classes=10, **TINY)
    model.load_state_dict(tiny.state_dict())
    path = str(tmp_path_factory.mktemp('model') / 'model')
    save_model(model.eval(), path, [f'digit {i}' for i in range(10)])
    return path


def test_command(folder, tmp_path, photographs, capsys):
    main(['export', folder, '-o', str(tmp_path / 'all.onnx')])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(' px: differs')[0] for line in lines[:3]] == ['64', '48', '32']
    assert 'rs_resnet10t at 64 48 32' in lines[3]
    metadata = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / 'all.onnx').metadata_props}
    assert metadata['class_names'][7] == 'digit 7'
    main(['export', folder, '-o', str(tmp_path / 'fp16.onnx'), '--precision', 'fp16', '--resolution', '32'])
    assert {p.key: p.value for p in onnx.load(tmp_path / 'fp16.onnx').metadata_props}['precision'] == '"fp16"'
    main(['export', folder, '-o', str(tmp_path / 'one.pt'), '--resolution', '32'])
    assert torch.jit.load(str(tmp_path / 'one.pt'))(images(32)).shape == (2, 10)
    capsys.readouterr()
    shutil.copytree(photographs, tmp_path / 'data' / 'train')
    (tmp_path / 'data' / 'val').mkdir()
    (tmp_path / 'data' / 'train' / '+.png').touch()  # the first by name
    main(['export', folder, '-o', str(tmp_path / 'int8.onnx'), '--quantize', 'int8', '--data-dir',
          str(tmp_path / 'data'), '--images', '4', '--int8-format', 'qoperator'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Read 3 images of {tmp_path / 'data' / 'train'}, 1 more cannot be read."
    assert 'of 3 images as the network' in lines[1]
    assert 'QLinearConv' in {n.op_type for n in onnx.load(tmp_path / 'int8.onnx').graph.node}


@pytest.mark.parametrize('flags, message', [
    (['--format', 'torchscript'], '--format torchscript needs --resolution'),
    (['--batch-size', '2'], '--batch-size needs --resolution'),
    (['--resolution', '40'], 'Unknown resolution 40'),
    (['--quantize', 'int8'], '--data-dir DIR need each other'),
    (['--quantize', 'int8', '--calibration-data', 'nowhere'], 'nowhere does not exist'),
    (['--quantize', 'int8', '--calibration-data', 'x', '--resolution', '48'], 'leave --resolution out'),
    (['--precision', 'fp16', '--quantize', 'int8', '--data-dir', 'x'], 'fp16 does not go with --quantize int8'),
    (['--precision', 'fp16', '--format', 'executorch'],
     '--precision fp16 does not go with --format executorch, only with onnx and coreml'),
    (['--format', 'litert', '--quantize', 'int8', '--data-dir', 'x'], 'int8 is for ONNX and ExecuTorch'),
    (['--int8-format', 'qoperator'], '--int8-format needs --quantize int8 and --format onnx'),
    (['--split-batch-norm', '--resolution', '48'], '--split-batch-norm is for one ONNX file for all resolutions'),
])
def test_command_tells_what_is_wrong(folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        main(['export', folder, '-o', str(tmp_path / 'out'), *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and message in line and os.listdir(tmp_path) == []


@pytest.mark.parametrize('name, format, message', [
    ('a.pt', 'onnx', '.pt is for --format torchscript, not onnx'),
    ('a.onnx', 'executorch', '.onnx is for --format onnx, not executorch'),
    ('a.mnn', None, 'a.mnn: unknown suffix, expected .onnx, .pte, .tflite, .mlpackage, .pt2, .pt, or --format'),
])
def test_a_suffix_of_another_format_is_refused(folder, tmp_path, capsys, name, format, message):
    with pytest.raises(SystemExit):
        main(['export', folder, '-o', str(tmp_path / name), *(['--format', format] if format else [])])
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_command_overwrites_only_when_told(folder, tmp_path, capsys):
    (tmp_path / 'all.onnx').write_text('mine')
    with pytest.raises(SystemExit):
        main(['export', folder, '-o', str(tmp_path / 'all.onnx')])
    assert 'exists and is not overwritten' in capsys.readouterr().err
    assert (tmp_path / 'all.onnx').read_text() == 'mine'
    main(['export', folder, '-o', str(tmp_path / 'all.onnx'), '--overwrite'])
    assert (tmp_path / 'all.onnx').stat().st_size > 1000 and os.listdir(tmp_path) == ['all.onnx']


def test_command_of_a_training_run(tmp_path, capsys):
    """One channel, and class names beside the checkpoint that are not those of the weights it began with."""
    model = rs_model('resnet10t', num_classes=3, in_chans=1, **TINY)
    args = argparse.Namespace(
        model='rs_resnet10t.imagenette', num_classes=3, in_chans=1, resolutions=list(RESOLUTIONS), model_kwargs=TINY)
    torch.save(dict(state_dict=model.state_dict(), args=args, epoch=0), tmp_path / 'last.pth.tar')
    command = ['export', str(tmp_path / 'last.pth.tar'), '-o']
    main([*command, str(tmp_path / 'unnamed.onnx')])
    (tmp_path / 'label_names.txt').write_text('\ufeffcat\ndog\ncow\n\n', encoding='utf-8')
    main([*command, str(tmp_path / 'named.onnx')])
    for name, expected in (('unnamed', None), ('named', ['cat', 'dog', 'cow'])):
        metadata = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / f'{name}.onnx').metadata_props}
        assert metadata['class_names'] == expected and len(metadata['mean']) == 1
    photograph = tmp_path / 'a.png'
    Image.effect_noise((70, 80), 50).save(photograph)
    capsys.readouterr()
    main(['predict', str(photograph), '--model', str(tmp_path / 'named.onnx'), '--top', '3', '--threads', '1'])
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]} == {'cat', 'dog', 'cow'}


def test_command_looks_at_the_output_first(tmp_path, capsys):
    for output, message in ((tmp_path / 'no' / 'a.onnx', 'no does not exist, expected a folder for a.onnx'),
                            (tmp_path, 'is a folder, expected the name of a file')):
        with pytest.raises(SystemExit):
            main(['export', 'nowhere.pth', '-o', str(output)])
        assert message in capsys.readouterr().err
