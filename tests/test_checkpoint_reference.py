"""Checkpoints of the authors' code: networks of its layout, written again here, against what they are converted to"""
import json

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import RESOLUTIONS, images, randomize_bn

from timm_rs.checkpoint import adapt_reference, is_reference
from timm_rs.load import load_model
from timm_rs.train.model import build_model
from timm_rs.train.options import parse_args
from timm_rs_cli import main


class Shared(nn.Module):
    """One layer for all sizes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, xs):
        return [self.module(x) for x in xs]


class Private(nn.Module):
    """A BN layer for each size, the first for the largest."""

    def __init__(self, channels):
        super().__init__()
        for i in range(len(RESOLUTIONS)):
            self.add_module(f'bn_{i}', nn.BatchNorm2d(channels))

    def forward(self, xs):
        return [getattr(self, f'bn_{i}')(x) for i, x in enumerate(xs)]


def conv(inp, out, kernel=1, stride=1, groups=1):
    return Shared(nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False))


def relu(xs):
    return [F.relu(x) for x in xs]


class Block(nn.Module):
    """A block of a ResNet, with three convolutions if it is a bottleneck."""

    def __init__(self, inp, planes, stride, bottleneck, groups=1, base_width=64):
        super().__init__()
        width = planes * base_width // 64 * groups if bottleneck else planes
        out = planes * 4 if bottleneck else planes
        shapes = [(inp, width, 3, stride, 1), (width, out, 3, 1, 1)]
        if bottleneck:
            shapes = [(inp, width, 1, 1, 1), (width, width, 3, stride, groups), (width, out, 1, 1, 1)]
        self.depth = len(shapes)
        for i, shape in enumerate(shapes, start=1):
            self.add_module(f'conv{i}', conv(*shape))
            self.add_module(f'bn{i}', Private(shape[1]))
        self.downsample = None
        if stride > 1 or inp != out:
            self.downsample = nn.Sequential(conv(inp, out, 1, stride), Private(out))

    def forward(self, xs):
        ys = xs
        for i in range(1, self.depth + 1):
            ys = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(ys))
            ys = relu(ys) if i < self.depth else ys
        shortcuts = xs if self.downsample is None else self.downsample(xs)
        return relu([y + s for y, s in zip(ys, shortcuts)])


class ResNet(nn.Module):
    def __init__(self, depths, bottleneck, num_classes, **kwargs):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(len(RESOLUTIONS)))
        self.conv1, self.bn1 = conv(3, 64, 7, 2), Private(64)
        inp = 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Block(inp, 64 * 2 ** i, stride, bottleneck, **kwargs))
                inp = 64 * 2 ** i * (4 if bottleneck else 1)
            self.add_module(f'layer{i + 1}', nn.Sequential(*blocks))
        self.fc = Shared(nn.Linear(inp, num_classes))

    def forward(self, xs):
        xs = [F.max_pool2d(x, 3, 2, 1) for x in relu(self.bn1(self.conv1(xs)))]
        for i in range(1, 5):
            xs = getattr(self, f'layer{i}')(xs)
        return self.fc([x.mean((2, 3)) for x in xs])


class ReLU6(nn.Module):
    def forward(self, xs):
        return [x.clamp(0, 6) for x in xs]


def conv_bn(inp, out, kernel=1, stride=1, groups=1):
    return [conv(inp, out, kernel, stride, groups), Private(out), ReLU6()]


class InvertedResidual(nn.Module):
    def __init__(self, inp, out, stride, expansion):
        super().__init__()
        hidden = inp * expansion
        layers = conv_bn(inp, hidden) if expansion > 1 else []
        layers += conv_bn(hidden, hidden, 3, stride, hidden)
        self.conv = nn.Sequential(*layers, conv(hidden, out), Private(out))
        self.identity = stride == 1 and inp == out

    def forward(self, xs):
        ys = self.conv(xs)
        return [x + y for x, y in zip(xs, ys)] if self.identity else ys


class MobileNetV2(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(len(RESOLUTIONS)))
        features, inp = [nn.Sequential(*conv_bn(3, 32, 3, 2))], 32
        for expansion, out, depth, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):
            for i in range(depth):
                features.append(InvertedResidual(inp, out, stride if i == 0 else 1, expansion))
                inp = out
        self.features = nn.Sequential(*features)
        self.conv = nn.Sequential(*conv_bn(320, 1280))
        self.classifier = Shared(nn.Linear(1280, num_classes))

    def forward(self, xs):
        return self.classifier([x.mean((2, 3)) for x in self.conv(self.features(xs))])


REFERENCES = {
    'resnet18': lambda: ResNet((2, 2, 2, 2), False, 10),
    'resnet34': lambda: ResNet((3, 4, 6, 3), False, 10),
    'resnet50': lambda: ResNet((3, 4, 6, 3), True, 10),
    'resnet101': lambda: ResNet((3, 4, 23, 3), True, 10),
    'resnet152': lambda: ResNet((3, 8, 36, 3), True, 10),
    'resnext50_32x4d': lambda: ResNet((3, 4, 6, 3), True, 10, groups=32, base_width=4),
    'resnext101_32x8d': lambda: ResNet((3, 4, 23, 3), True, 10, groups=32, base_width=8),
    'mobilenetv2_100': lambda: MobileNetV2(10),
}


def save_reference(path, name='resnet18'):
    """Write a checkpoint as the authors' script does, from under DataParallel, and return the network."""
    network = randomize_bn(REFERENCES[name]()).eval()
    state_dict = {f'module.{k}': v for k, v in network.state_dict().items()}
    torch.save(dict(epoch=120, arch=name, state_dict=state_dict, best_acc1=torch.tensor(71.1)), path)
    return network


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('reference') / 'best.pth.tar'
    save_reference(path)
    return str(path)


def test_layout_is_that_of_the_authors():
    keys = set(REFERENCES['resnet18']().state_dict())
    assert {
        'conv1.module.weight', 'bn1.bn_0.weight', 'bn1.bn_2.num_batches_tracked', 'layer2.0.downsample.0.module.weight',
        'layer2.0.downsample.1.bn_1.running_var', 'fc.module.weight', 'fc.module.bias', 'alpha',
    } <= keys
    keys = set(REFERENCES['mobilenetv2_100']().state_dict())
    assert {
        'features.0.0.module.weight', 'features.0.1.bn_0.weight', 'features.1.conv.0.module.weight',
        'features.17.conv.7.bn_2.running_mean', 'conv.0.module.weight', 'conv.1.bn_0.weight',
        'classifier.module.weight',
    } <= keys


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'mobilenetv2_100'])
def test_converted_logits_equal_those_of_the_authors_network(name, tmp_path, capsys):
    network = save_reference(tmp_path / 'best.pth.tar', name)
    folder = tmp_path / 'converted'
    main(['convert', str(tmp_path / 'best.pth.tar'), '--model', f'rs_{name}', '--output', str(folder),
          '--resolutions', *map(str, RESOLUTIONS)])
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert f'rs_{name} at 64 48 32' in capsys.readouterr().out
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()

    assert model.resolutions == RESOLUTIONS and model.num_classes == 10
    torch.testing.assert_close(model.alpha.data, network.alpha.data, rtol=0, atol=0)
    pyramid = images(*RESOLUTIONS)
    with torch.no_grad():
        expected = network(pyramid)
        for x, z in zip(pyramid, expected):
            torch.testing.assert_close(model(x), z, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model.at(64)(pyramid[1]), model(pyramid[1]), rtol=1e-3)  # the BN layers differ

    data = timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{folder}'))
    assert (*data['mean'], *data['std']) == (0, 0, 0, 1, 1, 1)
    assert (data['interpolation'], data['crop_pct'], data['input_size']) == ('bilinear', 0.875, (3, 64, 64))
    cfg = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    assert not {'tag', 'license', 'origin_url', 'hf_hub_id', 'url'} & set(cfg)  # of timm's weights, not of these


@pytest.mark.parametrize('name', REFERENCES)
def test_keys_and_shapes_of_all_networks_fit(name):
    with torch.device('meta'):
        adapted = adapt_reference(REFERENCES[name]().state_dict(), RESOLUTIONS)
        expected = timm.create_model(f'rs_{name}', resolutions=RESOLUTIONS, num_classes=10).state_dict()
    assert {k: v.shape for k, v in adapted.items()} == {k: v.shape for k, v in expected.items()}


def test_without_data_parallel_and_without_alpha(tmp_path):
    network = REFERENCES['resnet18']().eval()
    state_dict = {k: v for k, v in network.state_dict().items() if k != 'alpha'}
    assert is_reference(state_dict)
    torch.save(state_dict, tmp_path / 'weights.pth')
    model = load_model(str(tmp_path / 'weights.pth'), 'rs_resnet18', RESOLUTIONS).model
    assert model.alpha.tolist() == [0., 0., 0.]
    x = images(48)
    torch.testing.assert_close(model(x), network([x] * 3)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('flags, message', [
    (['--model', 'rs_resnet18'], 'holds 3 sizes, but --resolutions are 5 (224 192 160 128 96)'),
    (['--model', 'rs_resnet18', '--resolutions', '64', '32'], 'holds 3 sizes, but --resolutions are 2 (64 32)'),
    (['--model', 'rs_resnet34', '--resolutions', '64', '48', '32'], 'layer1.2.conv1.weight, layer1.2.bn1.64.weight'),
    (['--model', 'rs_mobilenetv2_100', '--resolutions', '64', '48', '32'], 'rs_mobilenetv2_100: conv_stem.weight, '),
    (['--resolutions', '64', '48', '32'], 'does not record its model, give --model'),
    (['--model', 'rs_resnet18', '--resolutions', '64', '48', '32', '--use-ema'], 'no moving average'),
    (['--model', 'rs_resnet18', '--resolutions', '64', '48', '32', '--num-classes', '5'], 'expected (5, 512)'),
])
def test_what_does_not_fit_is_one_line(flags, message, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(['convert', checkpoint, '--output', str(tmp_path / 'converted'), *flags])
    assert e.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and checkpoint in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flag', ['--initial-checkpoint', '--pretrained-path'])
def test_loading_without_conversion_says_so(flag, checkpoint):
    args = parse_args(['--model', 'rs_resnet18', '--resolutions', '64', '48', '32', '--num-classes', '10',
                       flag, checkpoint])
    with pytest.raises(ValueError, match='mean 0 and std 1: convert them first by timm-rs convert'):
        build_model(args, torch.device('cpu'))
