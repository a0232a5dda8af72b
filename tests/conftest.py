"""What the tests share: fixed seeds, no network, tiny models"""
import os

os.environ['HF_HUB_OFFLINE'] = '1'  # before timm is imported

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.layers import BatchNormAct2d, Conv2dSame
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs import make_switchable

RESOLUTIONS = (64, 48, 32)
TINY = dict(channels=[8, 16, 24, 32], stem_width=8)  # of a resnet10t
# Of BatchNorm2d in places and in a Sequential, of BatchNormAct2d, with squeeze-excite, with BatchNorm1d in the head.
NETWORKS = ('test_resnet', 'test_efficientnet', 'test_byobnet', 'repvit_m0_9')


@pytest.fixture(autouse=True, scope='session')
def float32_as_written():
    """One thread and full precision: sums are the same whichever way a network is run."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision('highest')


@pytest.fixture(autouse=True, scope='module')
def seed_module():
    """What a module's tests share is the same whichever module ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize_bn(model):
    """Give every BN parameters and statistics of its own, as training would."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(std=0.2)
    return model


def plain_model(name='test_resnet', num_classes=10, **kwargs):
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()


def rs_model(name='test_resnet', resolutions=RESOLUTIONS, **kwargs):
    """Return a switchable network in eval mode whose resolutions differ from each other."""
    return randomize_bn(make_switchable(plain_model(name, **kwargs), resolutions))


def plain_key(key, resolutions=RESOLUTIONS):
    """Return timm's name of a switchable network's parameter or buffer, and its resolution (None if shared)."""
    head, _, tail = key.rpartition('.')
    name, _, resolution = head.rpartition('.')
    if resolution in map(str, resolutions):
        return f'{name}.{tail}', int(resolution)
    return key, None


def plain_state_dict(model, resolution):
    """Return the weights of one resolution under timm's names, by splitting keys."""
    named = [(*plain_key(k, model.resolutions), v) for k, v in model.state_dict().items() if k != 'alpha']
    return {k: v for k, r, v in named if r in (None, resolution)}


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mixed_network(sizes):
    """Return a switchable network of layers of several kinds, the convolution most of a file."""
    network = nn.Sequential(
        Conv2dSame(3, 64, 3, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=64, bias=False),
        nn.Conv2d(64, 96, 3, bias=False), BatchNormAct2d(96), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 5))
    network.num_classes = 5
    network.pretrained_cfg = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    return make_switchable(network.eval(), sizes)


def gradients(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def images(*sizes, n=2, channels=3):
    """Return a batch of each square size, not a list if there is only one size."""
    batches = [torch.randn(n, channels, s, s) for s in sizes]
    return batches if len(batches) > 1 else batches[0]


def assert_equal(actual, expected):
    """Bit by bit, also in lists and dictionaries."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return rs_model('resnet10t', **TINY)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Return the files of smooth images of many colours."""
    folder = tmp_path_factory.mktemp('photographs')
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize((80, 70), Image.Resampling.BICUBIC).save(folder / f'{i:02}.jpg')
    return folder


def break_size(path, index):
    """Put NaN into the row of a size in an exported file, as a training that diverged there would."""
    import onnx

    model = onnx.load(path)
    table = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] == len(RESOLUTIONS))
    values = onnx.numpy_helper.to_array(table).copy()
    values[index] = float('nan')
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, path)


def pytest_collection_modifyitems(items):
    """Put first what forks: a process that has run a backward pass, as test_streams does, may not fork one that runs
    another. Then long files.
    """
    forking = ('test_distributed', 'test_resume', 'test_experiments', 'test_quant_distributed', 'test_streams')
    long = ('test_executorch', 'test_runtime_alone', 'test_zoo', 'test_scripts', 'test_training_options', 'test_export')
    order = {name: i for i, name in enumerate((*forking, *long))}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
