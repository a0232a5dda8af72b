"""The row that a file for all sizes picks: the same in every runtime and after every conversion"""
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_rs import make_switchable
from timm_rs.resolutions import nearest_resolution

onnx = pytest.importorskip('onnx')
evaluator = pytest.importorskip('onnx.reference')
ort = pytest.importorskip('onnxruntime')

from timm_rs.export import export_int8, export_resolution, export_switchable  # noqa: E402
from timm_rs.export.export import INT8_FORMATS  # noqa: E402

# Below and above 256 px, whose area float16 does not hold; an odd sum of areas.
SIZES = [(64, 48, 32), (288, 256, 224), (448, 384, 320, 256), (33, 32, 20)]
STEP = 10.  # between the logits of a class at two rows


def marked_model(resolutions):
    """Return a network whose logits are STEP times its row, and 1 to 8 more."""
    conv, bn = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4)
    network = torch.nn.Sequential(conv, bn, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network.num_classes = 4
    conv.weight.data.uniform_(-0.01, 0.01)
    model = make_switchable(network.eval(), resolutions)
    for row, resolution in enumerate(model.resolutions):
        model[1][resolution].bias.data = STEP * row + torch.tensor([1., 3., 5., 7.])
        model[1][resolution].weight.data.fill_(row + 1.)
    return model


def batches(resolutions):
    """Return inputs of the trained sizes, and of areas at, one below and one above each halfway, and beyond all."""
    shapes = [(r, r) for r in resolutions] + [(1, 16), (1, resolutions[0] ** 2 + 1)]
    for larger, smaller in zip(resolutions, resolutions[1:]):
        halfway = (larger ** 2 + smaller ** 2) // 2
        shapes += [(1, halfway + i) for i in (-1, 0, 1)]
    return [np.random.default_rng(0).standard_normal((1, 3, *shape), np.float32) for shape in shapes]


def expected_row(x, resolutions):
    return resolutions.index(nearest_resolution(*x.shape[2:], resolutions))


def assert_picks(run, resolutions, inputs=None):
    for x in batches(resolutions) if inputs is None else inputs:
        logits = np.asarray(run(x), np.float32)
        expected = expected_row(x, resolutions)
        assert (logits // STEP == expected).all(), f'{x.shape[2:]}: {logits}, expected row {expected}'


def run_ort(model, level='ORT_ENABLE_ALL', **sizes):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    model = model if isinstance(model, str) else model.SerializeToString()
    session = ort.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    return lambda x: session.run(None, {'images': x})[0]


@pytest.fixture(scope='module', params=SIZES, ids=str)
def marked(request, tmp_path_factory):
    """Return resolutions and a file of them."""
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp('marked') / 'all.onnx')
    export_switchable(marked_model(request.param), path)
    return request.param, path


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """Return the packaged network and its file."""
    model = timm.create_model('rs_resnet10t.imagenette', pretrained=True).eval()
    path = str(tmp_path_factory.mktemp('network') / 'all.onnx')
    export_switchable(model, path)
    return model, path


def assert_logits(run, model, tolerance=1e-4, inputs=lambda x: x):
    """The logits are the network's at its sizes, between and beyond them."""
    for height, width in [(r, r) for r in model.resolutions] + [(36, 37), (20, 20), (56, 48)]:
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = model.at(nearest_resolution(height, width, model.resolutions))(x).numpy()
        assert np.abs(run(inputs(x.numpy())) - expected).max() < tolerance


# ONNX Runtime

LEVELS = ['ORT_DISABLE_ALL', 'ORT_ENABLE_BASIC', 'ORT_ENABLE_EXTENDED', 'ORT_ENABLE_ALL']


@pytest.mark.parametrize('level', LEVELS)
def test_onnxruntime(marked, level):
    resolutions, path = marked
    assert_picks(run_ort(path, level), resolutions)
    for x in batches(resolutions):
        assert_picks(run_ort(path, level, height=x.shape[2], width=x.shape[3]), resolutions, [x])


@pytest.mark.parametrize('level', LEVELS)
def test_onnxruntime_runs_the_network(network, level):
    model, path = network
    assert_logits(run_ort(path, level), model)


def export_marked_int8(resolutions, path, int8_format):
    noise = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), np.uint8)
    torch.manual_seed(0)
    export_int8(marked_model(resolutions), path, [Image.fromarray(n) for n in noise], int8_format=int8_format)


@pytest.mark.parametrize('int8_format', INT8_FORMATS)
def test_int8(marked, int8_format, tmp_path):
    resolutions, path = marked[0], str(tmp_path / 'int8.onnx')
    export_marked_int8(resolutions, path, int8_format)
    for level in LEVELS:
        assert_picks(run_ort(path, level), resolutions)


def test_batch_norms_that_multiply_and_add(marked, tmp_path):
    resolutions, _ = marked
    torch.manual_seed(0)
    path = str(tmp_path / 'split.onnx')
    export_switchable(marked_model(resolutions), path, split_batch_norm=True)
    operators = [n.op_type for n in onnx.load(path).graph.node]
    assert 'BatchNormalization' not in operators and operators.count('Mul') == operators.count('Add') == 1
    for run in (run_ort(path), run_openvino(path)):
        assert_picks(run, resolutions)


def test_fixed_sides_leave_nothing_of_the_choice(network, tmp_path):
    """With a free batch too, ONNX Runtime is left with the operators of a plain file."""
    model, path = network
    export_resolution(model, 32, str(tmp_path / 'plain.onnx'))
    operators = []
    for file, sizes in ((path, ('height', 'width')), (str(tmp_path / 'plain.onnx'), ())):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
        for name in sizes:
            options.add_free_dimension_override_by_name(name, 32)
        ort.InferenceSession(file, options, providers=['CPUExecutionProvider'])
        operators.append(sorted(n.op_type for n in onnx.load(tmp_path / 'optimized.onnx').graph.node))
    assert operators[0] == operators[1] and len(operators[0]) == 29


@pytest.mark.parametrize('sizes', [{}, dict(height=32, width=32)])
def test_an_empty_batch_has_empty_logits(network, sizes):
    assert run_ort(network[1], **sizes)(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 10)


def test_integers_only(network):
    """From the sides of the input to the row: a conversion to float16 changes nothing there."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(network[1])).graph
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    made_by = {name: node for node in graph.node for name in node.output}
    names, operators = ['resolution_index'], []
    while names:
        name = names.pop()
        assert types[name] in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
        operators.append(made_by[name].op_type)
        if operators[-1] != 'Shape':
            names += [x for x in made_by[name].input if x in made_by]
    assert operators == ['ReduceSum', 'Cast', 'Less', 'ReduceProd', 'Shape']


# Other runtimes

def run_openvino(model):
    openvino = pytest.importorskip('openvino', reason='OpenVINO is not installed')
    compiled = openvino.Core().compile_model(
        model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1})
    return lambda x: compiled([x])[0]


def reshape(path, shape):
    openvino = pytest.importorskip('openvino', reason='OpenVINO is not installed')
    model = openvino.Core().read_model(path)
    model.reshape(shape)
    return model


def to_ir(path, folder, fp16):
    openvino = pytest.importorskip('openvino', reason='OpenVINO is not installed')
    openvino.save_model(openvino.Core().read_model(path), folder / 'all.xml', compress_to_fp16=fp16)
    return str(folder / 'all.xml')


def test_openvino(marked, tmp_path):
    resolutions, path = marked
    assert_picks(run_openvino(path), resolutions)
    for fp16 in (False, True):
        assert_picks(run_openvino(to_ir(path, tmp_path, fp16)), resolutions)
    for i, x in enumerate(batches(resolutions)):
        assert_picks(run_openvino(reshape(path, [(1, -1)[i % 2], *x.shape[1:]])), resolutions, [x])


def test_openvino_int8(marked, tmp_path):
    resolutions, path = marked[0], str(tmp_path / 'int8.onnx')
    export_marked_int8(resolutions, path, 'qdq')
    for x in batches(resolutions):
        assert_picks(run_openvino(reshape(path, x.shape)), resolutions, [x])


def test_openvino_runs_the_network(network, tmp_path):
    model, path = network
    assert_logits(run_openvino(path), model)
    assert_logits(run_openvino(to_ir(path, tmp_path, fp16=False)), model)
    assert_logits(run_openvino(to_ir(path, tmp_path, fp16=True)), model, 0.05)


def test_reference_evaluator(marked):
    resolutions, path = marked
    run = evaluator.ReferenceEvaluator(path).run
    inputs = [x for x in batches(resolutions) if x.size <= 3 * 65 ** 2 or resolutions[0] == 288 and x.shape[2] == 1]
    assert_picks(lambda x: run(None, {'images': x})[0], resolutions, inputs)


# float16

def by_onnxruntime(path, **kwargs):
    float16 = pytest.importorskip('onnxruntime.transformers.float16', reason='its converter is not installed')
    return float16.convert_float_to_float16(onnx.load(path), **kwargs)


def by_onnxconverter(path, **kwargs):
    float16 = pytest.importorskip('onnxconverter_common.float16', reason='onnxconverter-common is not installed')
    return float16.convert_float_to_float16(onnx.load(path), **kwargs)


@pytest.mark.parametrize('keep_io_types', [False, True])
@pytest.mark.parametrize('convert', [by_onnxruntime, by_onnxconverter])
def test_float16(marked, convert, keep_io_types):
    resolutions, path = marked
    run = run_ort(convert(path, keep_io_types=keep_io_types))
    assert_picks(lambda x: run(x if keep_io_types else x.astype(np.float16)), resolutions)


@pytest.mark.parametrize('convert', [by_onnxruntime, by_onnxconverter])
def test_float16_runs_the_network(network, convert):
    model, path = network
    assert_logits(run_ort(convert(path)), model, 0.05, partial(np.asarray, dtype=np.float16))
