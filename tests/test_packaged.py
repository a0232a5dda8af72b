"""Networks whose weights come with the package"""
from pathlib import Path

import pytest
import timm
import torch
from conftest import assert_equal, images
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_model_data_config

import timm_rs
from timm_rs.checkpoint import read_checkpoint
from timm_rs.hub.convert import save_model
from timm_rs.load import load_model
from timm_rs.models.rs_models import RESOLUTIONS, _packaged

FOLDER = Path(timm_rs.__file__).parent / 'models' / 'weights'


@pytest.fixture(params=_packaged)
def name(request):
    return request.param


def test_there_is_one():
    assert 'rs_resnet10t.imagenette' in _packaged


def test_files(name):
    assert all((FOLDER / f'{name}.{kind}').stat().st_size for kind in ('safetensors', 'json', 'md'))
    assert (FOLDER / f'{name}.safetensors').stat().st_size <= 11e6
    assert name in timm.list_pretrained('rs_*')


def test_holds_the_weights(name):
    model = timm.create_model(name, pretrained=True).eval()
    found = read_checkpoint(str(FOLDER / f'{name}.safetensors')).state_dict
    assert {v.dtype for v in found.values()} == {torch.float16, torch.int64}
    assert_equal(model.state_dict(), {k: v.float() if v.is_floating_point() else v for k, v in found.items()})
    assert len(set(model.pretrained_cfg['label_names'])) == model.num_classes
    size = model.resolutions[0]
    assert resolve_model_data_config(model)['input_size'] == (3, size, size)
    image = Image.new('RGB', (2 * size, 3 * size), (255, 0, 0))
    red = create_transform(**resolve_model_data_config(model))(image)[:, size // 2, size // 2]
    expected = [(v - m) / s for v, m, s in zip((1, 0, 0), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    torch.testing.assert_close(red, torch.tensor(expected))


def test_same_sizes_and_classes_without_weights(name):
    model, trained = timm.create_model(name), timm.create_model(name, pretrained=True)
    assert (model.resolutions, model.num_classes) == (trained.resolutions, trained.num_classes)


def test_other_sizes_and_classes(name):
    trained = timm.create_model(name, pretrained=True).eval()
    sizes = trained.resolutions[::2]
    model = timm.create_model(name, pretrained=True, resolutions=sizes, num_classes=7).eval()
    x = images(sizes[-1])
    assert model.resolutions == sizes and model(x).shape == (2, 7)
    assert_equal(model.forward_features(x), trained.at(sizes[-1]).forward_features(x))


def test_is_not_what_the_bare_name_means(name):
    model = timm.create_model(name.split('.')[0])
    assert model.resolutions == RESOLUTIONS and model.num_classes == 1000


def test_saved_and_loaded(name, tmp_path):
    model = load_model(name).model
    save_model(model, str(tmp_path / 'saved'))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    for r in model.resolutions:
        x = images(r)
        assert_equal(loaded(x), model(x))
    assert loaded.pretrained_cfg['label_names'] == list(model.pretrained_cfg['label_names'])
    assert str(FOLDER) not in (tmp_path / 'saved' / 'config.json').read_text()


def test_unknown_tag():
    with pytest.raises(ValueError, match='Cannot load rs_resnet10t.nothing: Invalid pretrained tag'):
        load_model('rs_resnet10t.nothing')
