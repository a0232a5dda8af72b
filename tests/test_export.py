"""Files that run without timm, against the networks they were made of"""
import copy
import json
import os

import pytest
import timm
import torch
from conftest import RESOLUTIONS, TINY, images, plain_model, randomize_bn, rs_model
from timm.data import ImageNetInfo

from timm_rs import make_switchable
from timm_rs.private_bn import PrivateBN
from timm_rs.resolutions import nearest_resolution

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

from timm_rs.export import ExportError, export, export_resolution, export_switchable  # noqa: E402
from timm_rs.export.batch_norm import fuse_batch_norms  # noqa: E402
from timm_rs.export.describe import describe  # noqa: E402

# A small network of some families.
FAMILIES = {
    'byobnet': 'test_byobnet',
    'efficientnet': 'test_efficientnet',
    'efficientvit_mit': 'efficientvit_b0',
    'fasternet': 'fasternet_t0',
    'lcnetv2': 'lcnetv2_small',
    'mobilenetv3': 'mobilenetv3_small_050',
    'regnet': 'regnetx_002',
    'resnet': 'resnet10t',
    'resnetv2': 'resnetv2_18',
    'senet': 'legacy_seresnet18',
    'starnet': 'starnet_s050',
    'vovnet': 'ese_vovnet19b_slim_dw',
}


def run_onnx(path, x, **sizes):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


def assert_runs_as(model, path):
    """The file, run only by ONNX Runtime, computes what the network does at every size."""
    for x in images(*model.resolutions):
        with torch.no_grad():
            expected = model.at(x.shape[-1])(x)
        torch.testing.assert_close(run_onnx(path, x), expected, rtol=1e-5, atol=1e-4)


def weights_bytes(model):
    """Return the bytes of what the sizes share."""
    private = {id(p) for m in model.modules() if isinstance(m, PrivateBN) for p in m.parameters()}
    return sum(4 * p.numel() for n, p in model.named_parameters() if id(p) not in private and n != 'alpha')


# All sizes

def test_one_file_for_all_sizes(tiny, tmp_path):
    path = tmp_path / 'all.onnx'
    errors = export_switchable(tiny, str(path))
    assert list(errors) == [64, 48, 32] and max(errors.values()) < 1e-5
    assert_runs_as(tiny, path)
    x = images(48)
    with torch.no_grad():
        assert (run_onnx(path, x) - tiny.at(64)(x)).abs().max() > 0.1  # so the sizes do differ
    assert os.listdir(tmp_path) == ['all.onnx']


def test_shared_weights_are_in_the_file_once(tiny, tmp_path):
    export_switchable(tiny, str(tmp_path / 'all.onnx'))
    tables = sum(2 * 4 * len(RESOLUTIONS) * m.weight.numel() for m in tiny.modules() if isinstance(m, PrivateBN))
    graph = 40_000  # operators and their names
    assert os.path.getsize(tmp_path / 'all.onnx') < weights_bytes(tiny) + tables + graph


def test_told_the_size_batch_norms_fold(tiny, tmp_path):
    export_switchable(tiny, str(tmp_path / 'all.onnx'))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / 'folded.onnx')
    for name in ('height', 'width'):
        options.add_free_dimension_override_by_name(name, 48)
    onnxruntime.InferenceSession(str(tmp_path / 'all.onnx'), options, providers=['CPUExecutionProvider'])
    operators = {n.op_type for n in onnx.load(tmp_path / 'folded.onnx').graph.node}
    assert not operators & {'BatchNormalization', 'Gather', 'Less', 'Shape', 'Slice', 'Split', 'Mul'}
    x = images(48)
    with torch.no_grad():
        torch.testing.assert_close(
            run_onnx(tmp_path / 'all.onnx', x, height=48, width=48), tiny.at(48)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', [(40, 40), (56, 56), (33, 47), (96, 64)])
def test_other_sizes_take_the_nearest(tiny, tmp_path, size):
    export_switchable(tiny, str(tmp_path / 'all.onnx'))
    x = torch.randn(2, 3, *size)
    nearest = tiny.at(nearest_resolution(*size, tiny.resolutions))
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / 'all.onnx', x), nearest(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', FAMILIES.values())
def test_families(name, tmp_path):
    model = rs_model(name, (64, 32))
    with torch.no_grad():
        largest = model.at(32)(images(32)).abs().max().item()
    assert largest > 1e-3  # or anything would do
    export_switchable(model, str(tmp_path / 'all.onnx'))
    assert os.path.getsize(tmp_path / 'all.onnx') < 1.25 * weights_bytes(model) + 400_000


class Fickle(torch.nn.Sequential):
    """Does another thing at another size."""
    num_classes = 4

    def __init__(self, kind):
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(2))
        self.kind = kind

    def forward(self, x):
        large = x.shape[-1] > 14
        x = super().forward(x)
        if self.kind == 'operators' and large:
            x = x.relu()
        x = x.sigmoid() if self.kind == 'operator' and large else x.tanh()
        return x.amax(2 if large or self.kind != 'attribute' else 1)[:, :4]


@pytest.mark.parametrize('kind, message', [
    ('operators', 'the graphs at 16 and 12 px have 10 and 9 operators'),
    ('operator', 'at 16 and 12 px the operators of .* are Sigmoid and Tanh'),
    ('attribute', 'ReduceMax .* has another axes at 16 and 12 px'),
])
def test_sizes_that_need_other_operators_are_refused(tmp_path, kind, message):
    model = make_switchable(Fickle(kind).eval(), (16, 12))
    with pytest.raises(ExportError, match=f'RSFickle has no graph that serves all sizes: {message}'):
        export_switchable(model, str(tmp_path / 'all.onnx'))
    assert os.listdir(tmp_path) == []


def test_constants_of_other_shapes(tmp_path):
    class Positions(torch.nn.Sequential):
        num_classes = 4

        def forward(self, x):
            x = super().forward(x).flatten(2)
            return (x * torch.linspace(-1, 1, x.shape[-1])).sum(2)

    model = make_switchable(Positions(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval(), (16, 12))
    export_switchable(model, str(tmp_path / 'all.onnx'))
    for x in images(16, 12):
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(tmp_path / 'all.onnx', x), model(x), rtol=1e-5, atol=1e-4)


def test_other_networks_and_channels(tmp_path):
    conv, linear = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4, 3)
    network = torch.nn.Sequential(
        torch.nn.BatchNorm2d(1), conv, torch.nn.BatchNorm2d(4, affine=False), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), linear, torch.nn.BatchNorm1d(3))
    network.num_classes = 3
    network.pretrained_cfg = dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.5,))
    for module in network:
        if hasattr(module, 'running_mean'):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = make_switchable(network.eval(), (16, 12))
    export_switchable(model, str(tmp_path / 'all.onnx'))
    for x in images(16, 12, channels=1):
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(tmp_path / 'all.onnx', x), model(x), rtol=1e-5, atol=1e-5)


def test_the_file_tells_of_itself(tiny, tmp_path):
    path = str(tmp_path / 'all.onnx')
    export_switchable(tiny, path, [f'class {i}' for i in range(10)])
    metadata = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    assert metadata['resolutions'] == [64, 48, 32] and metadata['precision'] == 'float32'
    assert metadata['class_names'][3] == 'class 3' and metadata['num_classes'] == 10
    assert metadata['madds']['32'] < metadata['madds']['48'] < metadata['madds']['64']
    config = timm.data.resolve_model_data_config(tiny)
    for key in ('interpolation', 'crop_pct', 'crop_mode'):
        assert metadata[key] == config[key]
    assert metadata['mean'] == list(config['mean']) and metadata['std'] == list(config['std'])


def test_imagenet_names_come_along(tmp_path):
    model = rs_model('resnet10t', num_classes=1000, **TINY)
    export_switchable(model, str(tmp_path / 'all.onnx'))
    names = {p.key: p.value for p in onnx.load(tmp_path / 'all.onnx').metadata_props}['class_names']
    assert json.loads(names)[207] == 'golden retriever'
    wordnet_ids = ImageNetInfo('imagenet-1k').label_names()
    found = describe(model, (64,), wordnet_ids)
    assert found['class_names'] == json.loads(names) and found['class_ids'] == wordnet_ids
    assert describe(model, (64,), [f'class {i}' for i in range(1000)])['class_ids'] is None


def test_names_of_other_classes_do_not_come_along(tmp_path):
    model = rs_model('resnet10t', num_classes=5, **TINY)
    model.pretrained_cfg['label_names'] = [f'class {i}' for i in range(10)]
    assert describe(model, (64,))['class_names'] is None
    model.pretrained_cfg['label_names'] = [f'class {i}' for i in range(5)]
    assert describe(model, (64,))['class_names'][4] == 'class 4'


@pytest.mark.parametrize('change, message', [
    (dict(interpolation='cubic'), "interpolation is 'cubic', expected one of nearest"),
    (dict(std=(0., 0., 0.)), r'std\[0\] is 0.0, expected a finite number above 0'),
    (dict(crop_pct=87.5), 'crop_pct is 87.5'),
])
def test_preprocessing_that_cannot_be(tiny, change, message):
    model = copy.deepcopy(tiny)
    model.pretrained_cfg = dict(model.pretrained_cfg, **change)
    with pytest.raises(ValueError, match=message):
        describe(model, (64,))


def test_one_mean_for_all_channels(tiny):
    model = copy.deepcopy(tiny)
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.5,), std=(0.25,))
    described = describe(model, (64,))
    assert described['mean'] == [0.5] * 3 and described['std'] == [0.25] * 3


def test_the_network_stays_as_it_was(tiny, tmp_path):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    resolution = tiny.resolution
    export_switchable(tiny, str(tmp_path / 'all.onnx'))
    export_resolution(tiny, 32, str(tmp_path / 'one.pt'), 'torchscript')
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert tiny.resolution == resolution and not tiny.training


# One size

@pytest.mark.parametrize('batch_size', [None, 2])
@pytest.mark.parametrize('format', export.FORMATS)
def test_take_one_out(tiny, tmp_path, format, batch_size):
    path = str(tmp_path / 'one.pt2')
    error = export_resolution(tiny, 48, path, format, batch_size)
    assert error < 1e-5 and os.listdir(tmp_path) == ['one.pt2']
    run = {
        'onnx': lambda x: run_onnx(path, x),
        'torch-export': lambda x: torch.export.load(path).module()(x),
        'torchscript': lambda x: torch.jit.load(path)(x),
    }[format]
    x = images(48, n=2)
    with torch.no_grad():
        torch.testing.assert_close(run(x), tiny.at(48)(x), rtol=1e-5, atol=1e-5)
        if batch_size is None:
            assert run(images(48, n=5)).shape == (5, 10)
        elif format != 'torchscript':  # which does not check
            with pytest.raises(Exception, match='(?s)size|Got invalid'):
                run(images(48, n=5))


@pytest.mark.parametrize('format', export.FORMATS)
def test_batch_norms_are_fused(tiny, tmp_path, format):
    path = str(tmp_path / 'one.pt2')
    export_resolution(tiny, 48, path, format)
    text = {
        'onnx': lambda: [n.op_type for n in onnx.load(path).graph.node],
        'torch-export': lambda: torch.export.load(path).graph_module.code,
        'torchscript': lambda: str(torch.jit.load(path).inlined_graph),
    }[format]()
    assert 'Conv' in text or 'conv' in text
    assert 'BatchNormalization' not in text and 'batch_norm' not in text


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'resnetv2_18', 'test_byobnet'])
def test_fusing_changes_nothing(name):
    network = randomize_bn(plain_model(name))
    x = images(64)
    fused = fuse_batch_norms(network, x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-5)
    count = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in n.modules()) for n in (network, fused)]
    assert count[1] < count[0]


def test_compiles(tiny):
    network = tiny.at(48)
    x = images(48)
    with torch.no_grad():
        compiled = torch.compile(network, backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-5, atol=1e-5)
