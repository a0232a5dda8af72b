"""int8 files, against the networks they were made of"""
import os

import numpy as np
import pytest
import torch
from conftest import RESOLUTIONS, rs_model
from PIL import Image

from timm_rs import make_switchable

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnx.version_converter')
onnxruntime = pytest.importorskip('onnxruntime')

from timm_rs.export import ExportError, export_int8, export_switchable  # noqa: E402
from timm_rs.export.export import INT8_FORMATS, _read  # noqa: E402
from timm_rs_runtime.unreadable import ReadErrors  # noqa: E402


@pytest.fixture(scope='module', params=INT8_FORMATS)
def exported(tiny, photographs, request, tmp_path_factory):
    """Return the format, the file and what its export found."""
    path = str(tmp_path_factory.mktemp(request.param) / 'int8.onnx')
    files = sorted(str(p) for p in photographs.iterdir())
    return request.param, path, export_int8(tiny, path, files, int8_format=request.param)


def batch_of(size):
    return np.random.default_rng(size).standard_normal((2, 3, size, size), np.float32)


def assert_near(logits, network, x):
    """By root mean square, over the spread of the network's logits."""
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    assert np.square(logits - expected).mean() < 0.2 ** 2 * np.square(expected - expected.mean(1, keepdims=True)).mean()


def optimized(path, folder, level='EXTENDED', **sizes):
    """Return the graph that ONNX Runtime is left with."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f'ORT_ENABLE_{level}')
    options.optimized_model_filepath = str(folder / 'optimized.onnx')
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return onnx.load(folder / 'optimized.onnx').graph


def test_int8_of_one_logit(photographs, tmp_path):
    model = rs_model('resnet10t', num_classes=1, channels=[8, 16, 24, 32], stem_width=8)
    found = export_int8(model, str(tmp_path / 'int8.onnx'), sorted(map(str, photographs.iterdir())))
    assert all(0 < row['error'] < 0.5 and 0.5 < row['agreement'] <= 1 for row in found.values())


def test_unreadable_images_leave_whole_batches(tmp_path):
    for i in range(5):
        Image.new('RGB', (40, 40)).save(tmp_path / f'{i}.png')
    (tmp_path / '1.png').write_text('nothing')
    metadata = dict(
        resolutions=[32], mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1., crop_mode='center', interpolation='bilinear')
    found = _read(sorted(map(str, tmp_path.iterdir())), 2, metadata, ReadErrors(1))
    assert [len(batch) for batch in found[32]] == [2, 2]


def test_int8(tiny, exported, tmp_path):
    int8_format, path, found = exported
    assert set(found) == set(RESOLUTIONS) and all(row['error'] < 0.3 for row in found.values())
    export_switchable(tiny, str(tmp_path / 'float.onnx'))
    assert os.path.getsize(path) < os.path.getsize(tmp_path / 'float.onnx')
    model = onnx.load(path)
    weights = [t for t in model.graph.initializer if len(t.dims) == 4]
    assert len(weights) == sum(isinstance(m, torch.nn.Conv2d) for m in tiny.modules())
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    convolution, other = ('Conv', 'QLinearConv') if int8_format == 'qdq' else ('QLinearConv', 'Conv')
    operators = [n.op_type for n in model.graph.node]
    assert operators.count(convolution) == len(weights) and other not in operators and 'Relu' not in operators
    assert [(o.domain, o.version <= 21) for o in model.opset_import] == [('', True)]
    assert not any(n.domain for n in model.graph.node)
    constants = {t.name for t in model.graph.initializer}
    made_by = {name: n for n in model.graph.node for name in n.output}
    for n in model.graph.node:  # see merge.build
        if n.op_type == 'QLinearConv':
            assert n.input[2] not in constants
        elif n.op_type == 'Conv':
            assert made_by[n.input[0]].input[2] not in constants
    if int8_format == 'qdq':
        assert made_by['images.rounded'].input[1] in constants and operators.count('Reshape') == 1


def test_onnxruntime_computes_in_integers(exported, tiny, tmp_path):
    """With fixed sides all of it; with free ones the convolutions if they are QLinearConv."""
    int8_format, path, _ = exported
    count = sum(isinstance(m, torch.nn.Conv2d) for m in tiny.modules())
    fixed = [n.op_type for n in optimized(path, tmp_path, height=48, width=48).node]
    assert fixed.count('QLinearConv') == count and fixed.count('QuantizeLinear') == 1
    assert not set(fixed) & {'Conv', 'Add', 'Gemm', 'DequantizeLinear', 'Gather', 'Less', 'Shape', 'Slice', 'Split'}
    if int8_format == 'qoperator':
        free = [n.op_type for n in optimized(path, tmp_path).node]
        assert free.count('QLinearConv') == count and free.count('QuantizeLinear') == 1
        assert not set(free) & {'Conv', 'Add', 'Gemm', 'DequantizeLinear'}


def test_scales_are_constant_where_sides_are_fixed(exported, tmp_path):
    """Compilers for accelerators need that, such as QNN's."""
    graph = optimized(exported[1], tmp_path, 'BASIC', batch=1, height=48, width=48)
    constants = {t.name for t in graph.initializer}
    quantized = [n for n in graph.node if 'Linear' in n.op_type]
    assert quantized and all(name in constants for n in quantized for name in n.input[1:3])


def test_openvino_computes_in_integers(exported, tiny):
    openvino = pytest.importorskip('openvino', reason='OpenVINO is not installed')
    int8_format, path, _ = exported
    if int8_format == 'qoperator':
        pytest.skip('that is for ONNX Runtime')
    core, settings = openvino.Core(), {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    with pytest.raises(RuntimeError):  # with free sides it would keep the weights of the first size
        core.compile_model(path, 'CPU', settings)
    for size in RESOLUTIONS:
        x, network = batch_of(size), tiny.at(size)
        model = core.read_model(path)
        model.reshape(x.shape)
        fixed = core.compile_model(model, 'CPU', settings)
        assert_near(fixed([x])[0], network, x)
        layers = [{k: v.value for k, v in op.get_rt_info().items() if k in ('layerType', 'runtimePrecision')}
                  for op in fixed.get_runtime_model().get_ops()]
        precisions = {i['runtimePrecision'] for i in layers if i.get('layerType') == 'Convolution'}
        assert precisions == {'u8'}, f'{size} px: {precisions}'


def test_reference_evaluator(exported, tiny):
    evaluator = pytest.importorskip('onnx.reference')
    x = batch_of(RESOLUTIONS[-1])
    model = onnx.version_converter.convert_version(onnx.load(exported[1]), 21)  # it has no DequantizeLinear of 17
    assert_near(evaluator.ReferenceEvaluator(model).run(None, {'images': x})[0], tiny.at(x.shape[2]), x)


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
    for int8_format in INT8_FORMATS:
        found = export_int8(model, str(tmp_path / f'{int8_format}.onnx'), files, int8_format=int8_format)
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
