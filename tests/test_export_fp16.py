"""Files of 16 bits, against the networks they were made of"""
import json
import os

import numpy as np
import pytest
import torch
from conftest import RESOLUTIONS, images

from timm_rs.resolutions import nearest_resolution
from timm_rs_runtime import Session

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime.transformers.float16', reason='its converter is not installed')

from timm_rs.export import ExportError, export_resolution, export_switchable  # noqa: E402
from timm_rs_runtime.errors import UserError  # noqa: E402


@pytest.fixture(scope='module')
def exported(tiny, tmp_path_factory):
    """Return the file and the errors that its export found."""
    path = str(tmp_path_factory.mktemp('fp16') / 'fp16.onnx')
    return path, export_switchable(tiny, path, precision='fp16')


def assert_near(logits, model, x, tolerance=0.01):
    with torch.no_grad():
        expected = model.at(nearest_resolution(*x.shape[2:], model.resolutions))(x).numpy()
    assert 0 < np.abs(logits - expected).max() < tolerance * np.abs(expected).max()


def test_fp16(tiny, exported, tmp_path):
    path, errors = exported
    assert list(errors) == list(RESOLUTIONS) and all(1e-5 < error < 0.1 for error in errors.values())
    export_switchable(tiny, str(tmp_path / 'float32.onnx'))
    model, full = onnx.load(path), onnx.load(tmp_path / 'float32.onnx')
    onnx.checker.check_model(model, full_check=True)  # the nodes in their order: not every runtime sorts them
    weights = [[t for t in m.graph.initializer if len(t.dims) == 4] for m in (model, full)]
    assert len(weights[0]) == len(weights[1])
    assert {t.data_type for t in weights[0]} == {onnx.TensorProto.FLOAT16}
    assert sum(len(t.raw_data) for t in weights[0]) * 2 == sum(len(t.raw_data) for t in weights[1])
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {p.key: p.value for p in model.metadata_props}['precision'] == json.dumps('fp16')


@pytest.mark.parametrize('mode', ['fast', 'low_memory'])
def test_a_session_runs_it(tiny, exported, mode):
    with Session(exported[0], threads=1, mode=mode) as session:
        for x in images(*RESOLUTIONS):
            assert_near(session.predict(x.numpy()), tiny, x)


def test_openvino_runs_it(tiny, exported):
    openvino = pytest.importorskip('openvino', reason='OpenVINO is not installed')
    core, settings = openvino.Core(), {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    free = core.compile_model(exported[0], 'CPU', settings)
    for x in (*images(*RESOLUTIONS), images(40), torch.randn(1, 3, 70, 60)):
        model = core.read_model(exported[0])
        model.reshape(x.shape)
        for compiled in (free, core.compile_model(model, 'CPU', settings)):
            assert_near(compiled([x.numpy()])[0], tiny, x)


def test_what_16_bits_do_not_hold_is_refused(tiny, tmp_path):
    """Activations above 65504."""
    model = tiny.at(64)  # which shares its parameters
    model.layer1[0].bn2.weight.data *= 1e7
    try:
        with pytest.raises(ExportError, match='differs from the network by (nan|inf|[0-9.e+]+) at 64 px'):
            export_switchable(tiny, str(tmp_path / 'fp16.onnx'), precision='fp16')
    finally:
        model.layer1[0].bn2.weight.data /= 1e7
    assert os.listdir(tmp_path) == []


def test_one_size(tiny, tmp_path):
    path = str(tmp_path / 'one.onnx')
    assert export_resolution(tiny, 48, path, precision='fp16') < 0.1
    x = images(48)
    with Session(path, threads=1) as session:
        assert_near(session.predict(x.numpy()), tiny, x)
    with pytest.raises(UserError, match='fp16 is written to ONNX files, expected format onnx instead of torchscript'):
        export_resolution(tiny, 48, str(tmp_path / 'one.pt'), 'torchscript', precision='fp16')
    with pytest.raises(UserError, match="Unknown precision 'half', expected float32 or fp16"):
        export_switchable(tiny, str(tmp_path / 'all.onnx'), precision='half')
    assert os.listdir(tmp_path) == ['one.onnx']
