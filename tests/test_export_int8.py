"""int8 files, against the networks they were made of"""
import os

import numpy as np
import pytest
import torch
from conftest import RESOLUTIONS, rs_model
from PIL import Image

from timm_rs import make_switchable

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export import ExportError, export_int8, export_switchable  # noqa: E402


def test_int8(tiny, photographs, tmp_path):
    files = sorted(str(p) for p in photographs.iterdir())
    found = export_int8(tiny, str(tmp_path / 'int8.onnx'), files)
    assert set(found) == set(RESOLUTIONS) and all(row['error'] < 0.3 for row in found.values())
    export_switchable(tiny, str(tmp_path / 'float.onnx'))
    sizes = [os.path.getsize(tmp_path / f'{n}.onnx') for n in ('int8', 'float')]
    assert sizes[0] < sizes[1]
    model = onnx.load(tmp_path / 'int8.onnx')
    weights = [t for t in model.graph.initializer if len(t.dims) == 4]
    assert len(weights) == sum(isinstance(m, torch.nn.Conv2d) for m in tiny.modules())
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    assert {n.op_type for n in model.graph.node} >= {'QLinearConv', 'QLinearAdd', 'QGemm'}
    assert 'Relu' not in {n.op_type for n in model.graph.node}
    constants = {t.name for t in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == 'QLinearConv']
    assert not any(n.input[2] in constants and n.input[8] not in constants for n in convolutions)  # see merge.build


def of_one_conv(gains, biases, resolutions=(16, 12)):
    """Return a network of a convolution, its BatchNorm and a mean, with a BatchNorm given for each size."""
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
    bn, pool = torch.nn.BatchNorm2d(4, eps=0.), torch.nn.AdaptiveAvgPool2d(1)
    network = torch.nn.Sequential(conv, bn, pool, torch.nn.Flatten())
    network.num_classes = 4
    network.pretrained_cfg = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    model = make_switchable(network.eval(), resolutions)
    for resolution, gain, bias in zip(resolutions, gains, biases):
        model[1][resolution].weight.data = torch.tensor(gain)
        model[1][resolution].bias.data = torch.tensor(bias)
    return model


@pytest.mark.parametrize('gains', [
    [[1., 2., -0.5, 0.3], [0.5, 1., -2., 0.1]],  # a negative one at both sizes
    [[1., 2., -0.5, 0.3], [-0.5, 1., 2., -0.1]],  # opposite signs
    [[1., 0., 0.5, 1e-9], [0., 1., 2., 1.]],  # nothing comes through
])
def test_int8_with_gains_of_any_sign(gains, photographs, tmp_path):
    biases = [[0.5, -0.5, 1., 2.], [1., 0.25, -1., -2.]]
    model = of_one_conv(gains, biases)
    files = sorted(str(p) for p in photographs.iterdir())
    found = export_int8(model, str(tmp_path / 'int8.onnx'), files)
    assert all(row['error'] < 0.05 for row in found.values())


def test_int8_products_do_not_saturate(tmp_path):
    """Without VNNI, ONNX Runtime adds two products of codes in 16 bits: here 2 x 255 x 127 with weights of 8 bits."""
    conv = torch.nn.Conv2d(3, 4, 3, bias=False)
    conv.weight.data.fill_(0.1)
    network = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network.num_classes = 4
    model = make_switchable(network.eval(), (16, 12))
    for resolution in model.resolutions:
        model[1][resolution].weight.data = torch.tensor([1., 2., 3., 4.])
    found = export_int8(model, str(tmp_path / 'int8.onnx'), [Image.new('RGB', (20, 20), (255, 255, 255))] * 4)
    assert all(row['error'] < 0.02 for row in found.values())
    for tensor in onnx.load(tmp_path / 'int8.onnx').graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            assert np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() <= 64


def test_int8_far_from_the_network_is_refused(tiny, photographs, tmp_path, monkeypatch):
    from timm_rs.export import int8

    monkeypatch.setattr(int8, 'measure_ranges', lambda graph, batches: int8.defaultdict(lambda: [(-1e3, 1e3)] * 3))
    with pytest.raises(ExportError, match='int8 form of .* off at 64 px'):
        export_int8(tiny, str(tmp_path / 'int8.onnx'), [str(next(photographs.iterdir()))])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name', ['test_efficientnet', 'test_byobnet'])
def test_int8_of_families(name, photographs, tmp_path):
    """With operators that stay in float32 between conversions."""
    model = rs_model(name, (64, 32))
    files = sorted(str(p) for p in photographs.iterdir())[:4]
    found = export_int8(model, str(tmp_path / 'int8.onnx'), files)
    assert all(row['error'] < 0.3 for row in found.values())


def test_int8_convolutions_pad_themselves(photographs, tmp_path):
    """'same' padding is computed from the size and takes an operator of its own in float32."""
    model = rs_model('test_efficientnet', (64, 32), pad_type='same')
    export_switchable(model, str(tmp_path / 'float.onnx'))
    export_int8(model, str(tmp_path / 'int8.onnx'), [str(next(photographs.iterdir()))])
    operators = [{n.op_type for n in onnx.load(tmp_path / f'{n}.onnx').graph.node} for n in ('float', 'int8')]
    assert 'Pad' in operators[0] and 'Pad' not in operators[1]
    assert all(operator not in operators[0] for operator in ('Div', 'Ceil', 'Concat'))
