import csv
from pathlib import Path

import pytest
import timm
import torch
from conftest import assert_equal, images, randomize_bn
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, model_entrypoint
from timm.utils import reparameterize_model
from torch.nn.modules.batchnorm import _BatchNorm

from timm_rs import PrivateBN, explain_unknown_model, make_switchable
from timm_rs.models.rs_models import RS_MODELS, _packaged
from timm_rs.train.task import MultiResolutionTask

ROOT = Path(__file__).parents[1]
LIST = ROOT / 'timm_rs' / 'models' / 'zoo.csv'
MADE_WITH = LIST.read_text(encoding='utf-8').split(':', 1)[0].split()[-1]

# The smallest rs_* model of timm's families that do something of their own with their layers, features or classifier.
SMALLEST = {
    'byoanet': 'lambda_resnet26t',
    'byobnet': 'test_byobnet',
    'densenet': 'densenet121',
    'dpn': 'dpn48b',
    'efficientnet': 'test_efficientnet',
    'efficientvim': 'efficientvim_m1',
    'efficientvit_mit': 'efficientvit_b0',
    'efficientvit_msra': 'efficientvit_m0',
    'fastvit': 'fastvit_t8',
    'ghostnet': 'ghostnet_050',
    'hrnet': 'hrnet_w18_small',
    'iformer': 'iformer_t',
    'inception_v3': 'inception_v3',
    'lcnetv2': 'lcnetv2_small',
    'mobilenetv3': 'mobilenetv3_small_050',
    'nextvit': 'nextvit_small',
    'repghost': 'repghostnet_050',
    'repvit': 'repvit_m1',
    'resnet': 'test_resnet',
    'resnetv2': 'resnetv2_18',
    'shvit': 'shvit_s1',
    'swiftformer': 'swiftformer_xs',
    'tiny_vit': 'tiny_vit_5m_224',
    'tresnet': 'tresnet_m',
    'vgg': 'vgg11_bn',
    'xcit': 'xcit_nano_12_p8_224',
}
# The others string the same layers together; tools/sweep.py does with every model what the tests below do.
OTHERS = (
    'convmixer', 'cpubone', 'cspnet', 'cspnext', 'dla', 'fasternet', 'hardcorenas', 'hgnet', 'inception_next',
    'inception_resnet_v2', 'inception_v4', 'lowformer', 'mobilevit', 'nasnet', 'pnasnet', 'regnet', 'res2net',
    'resnest', 'rexnet', 'selecsls', 'senet', 'sknet', 'starnet', 'vovnet', 'xception', 'xception_aligned',
)
KWARGS = {'vgg': dict(mlp_ratio=0.01)}
SIZES = {'inception_v3': (80, 76)}  # it takes none below 75
FAMILIES = [f for f, name in SMALLEST.items() if name in RS_MODELS]  # of an older timm maybe not all


def create(family, **kwargs):
    resolutions = SIZES.get(family, (64, 32))
    model = timm.create_model(f'rs_{SMALLEST[family]}', resolutions=resolutions, **KWARGS.get(family, {}), **kwargs)
    return randomize_bn(model.eval())


@pytest.fixture(scope='module', params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return create(request.param, num_classes=4)


def family_of(base):
    return model_entrypoint(base).__module__.split('.')[-1]


# The list

def test_list_is_that_of_the_installed_timm():
    if timm.__version__ != MADE_WITH:
        for base in RS_MODELS[::80]:
            with torch.device('meta'):
                timm.create_model(f'rs_{base}')
        pytest.skip(f'zoo.csv was made with timm {MADE_WITH}, installed is {timm.__version__}: a sample was built')
    with open(LIST, newline='', encoding='utf-8') as f:
        names = [name for name, *_ in list(csv.reader(f))[2:]]
    assert names == timm.list_models(exclude_filters=['rs_*', 'preresnet*']), 'Run `make zoo`, then `make sweep`.'


@pytest.mark.skipif(timm.__version__ != MADE_WITH, reason=f'the sweep was made with timm {MADE_WITH}')
@pytest.mark.skipif(not (ROOT / 'results' / 'zoo.csv').exists(), reason='the sweep has not been published yet')
def test_the_sweep_found_all_in_order():
    with open(ROOT / 'results' / 'zoo.csv', newline='', encoding='utf-8') as f:
        status = {row['name']: row['status'] for row in csv.DictReader(f)}
    assert status == {f'rs_{base}': 'ok' for base in RS_MODELS}, 'Run `make sweep`.'


@pytest.mark.skipif(timm.__version__ != MADE_WITH, reason=f'the families are those of timm {MADE_WITH}')
def test_every_family_is_known():
    assert sorted({family_of(base) for base in RS_MODELS}) == sorted((*SMALLEST, *OTHERS))
    assert all(family_of(name) == family for family, name in SMALLEST.items())


# The registry

def test_listed_like_timms_own():
    assert len(RS_MODELS) > 600 or timm.__version__ != MADE_WITH
    assert timm.list_models('rs_*') == timm.list_models(module='rs_models')
    assert timm.list_models('rs_mobileone*') == [f'rs_{name}' for name in timm.list_models('mobileone*')]
    assert 'rs_vit_base_patch16_224' not in timm.list_models()
    assert not set(timm.list_models('rs_*', exclude_filters='*resnet*')) & set(timm.list_models('*resnet*'))


def test_tags_are_timms_but_of_what_comes_with_the_package():
    ours = [name for name in timm.list_pretrained('rs_*') if name not in _packaged]
    assert ours == [f'rs_{name}' for name in timm.list_pretrained(exclude_filters='rs_*')
                    if name.split('.')[0] in RS_MODELS]
    for base in RS_MODELS:
        cfg, plain = get_pretrained_cfg(f'rs_{base}'), get_pretrained_cfg(base)
        assert (cfg.tag, cfg.hf_hub_id, cfg.url) == (plain.tag, plain.hf_hub_id, plain.url)  # the default too


@pytest.mark.parametrize('base, reason, family', [
    ('vit_base_patch16_224', 'holds no BatchNorm', None),
    ('levit_128s', 'takes one input size, 224x224', None),
    ('botnet26t_256', 'takes one input size, 256x256', 'byoanet'),
    ('haloregnetz_b', 'cannot take 192x192, 160x160, 128x128 and 96x96', 'byoanet'),
])
@pytest.mark.parametrize('tag', ['', '.tag_in1k'])
def test_the_others_say_why_not(base, reason, family, tag):
    with pytest.raises(ValueError) as e:
        timm.create_model(f'rs_{base}{tag}', pretrained=bool(tag), num_classes=10)
    message = str(e.value)
    assert message.startswith(f'There is no rs_{base}: {base} {reason}. The nearest that works is rs_')
    nearest = message.removesuffix('.').split(' is rs_')[1]
    assert nearest in RS_MODELS and family in (None, family_of(nearest))
    assert message == explain_unknown_model(base) == explain_unknown_model(f'rs_{base}{tag}')


def test_the_nearest_costs_about_the_same():
    """LeViT-128s has 7.78 million parameters, EfficientNet-B1 7.79."""
    assert explain_unknown_model('levit_128s').endswith('The nearest that works is rs_efficientnet_b1.')


# A small model of some families

def test_at_is_bit_equal(model):
    model.eval()
    with torch.no_grad():
        for r in model.resolutions:
            x = images(r)
            taken = model.at(r)
            expected = taken(x)
            assert not any(isinstance(m, PrivateBN) for m in taken.modules()) and expected.isfinite().all()
            assert_equal(model(x), expected)
        fused = reparameterize_model(taken)(x)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_training_step_reaches_every_parameter(model):
    task = MultiResolutionTask(model.train(), verbose=False)
    x, target = images(model.resolutions[0]), torch.tensor([0, 3])

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        task(x, target)['loss'].backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients()
    assert [name for name, grad in expected.items() if grad is None] == []
    try:
        model.set_grad_checkpointing(True)
    except AssertionError:  # the family has none
        return
    assert_equal(gradients(), expected)
    model.set_grad_checkpointing(False)


def test_a_new_classifier_shares_no_bn(model):
    model.eval().reset_classifier(3)
    private = {id(bn) for m in model.modules() if isinstance(m, PrivateBN) for bn in m.children()}
    assert all(id(m) in private for m in model.modules() if isinstance(m, _BatchNorm))
    r = model.resolutions[-1]
    with torch.no_grad():
        x = images(r)
        assert_equal(model(x), model.at(r)(x))


@pytest.mark.parametrize('family', FAMILIES)
def test_features(family):
    model = create(family, features_only=True)
    r = model.resolutions[-1]
    with torch.no_grad():
        x = images(r, n=1)
        assert_equal(model(x), model.at(r)(x))


# What only some have

@pytest.mark.parametrize('base', ['mobileone_s1', 'ghostnetv3_050'])
def test_at_can_be_reparameterized(base):
    model = randomize_bn(timm.create_model(f'rs_{base}', resolutions=(96, 64)).eval())
    taken = model.at(64)
    with torch.no_grad():
        x = images(64)
        expected, fused = model(x), reparameterize_model(taken)
        assert len(list(fused.modules())) < len(list(taken.modules()))
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_network_of_one_size_can_be_made_switchable_for_it():
    model = randomize_bn(make_switchable(timm.create_model('levit_128s', num_classes=4).eval(), 224))
    model.reset_classifier(3)
    x = images(224, n=1)
    expected = model(x)  # with gradients: LeViT keeps its attention biases with their graph
    assert_equal(model.at(224)(x), expected)
    with torch.no_grad():
        fused = reparameterize_model(model.at(224))(x)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('base', ['efficientvit_m0', 'xcit_nano_12_p16_384'])
def test_data_config_of_a_network_with_an_input_size_of_its_own(base):
    model = timm.create_model(f'rs_{base}')
    for r in (224, 96):
        model.switch_to(r)
        assert resolve_model_data_config(model)['input_size'] == (3, r, r)
    assert resolve_model_data_config(model.at(160))['input_size'] == (3, 160, 160)


def test_position_embeddings_are_those_of_timm():
    with torch.device('meta'):
        plain = timm.create_model('resnet50x4_clip')  # for 288x288
        taken = timm.create_model('rs_resnet50x4_clip').at(224)
    assert {k: v.shape for k, v in taken.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
