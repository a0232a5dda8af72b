import pytest
import torch
from conftest import assert_equal

from timm_rs.train import ResolutionPyramid


def checkerboard(size):
    """Return 0 and 1 in turn, 0 in the corner."""
    i = torch.arange(size)
    return ((i[:, None] + i) % 2).float()[None, None]


def test_sizes():
    x = torch.rand(2, 3, 64, 64)
    pyramid = ResolutionPyramid((32, 64, 48))(x)  # in any order
    assert [tuple(y.shape) for y in pyramid] == [(2, 3, 64, 64), (2, 3, 48, 48), (2, 3, 32, 32)]
    assert pyramid[0] is x


def test_single_resolution():
    x = torch.rand(2, 3, 8, 8)
    assert_equal(ResolutionPyramid(8)(x), [x])


def test_checkerboard_halved_is_grey():
    # The triangle of half width 2 around the middle of two pixels weighs 1/8, 3/8, 3/8, 1/8: on 0, 1, 0, 1 that is
    # 1/2. At the border one pixel is missing: (3 - 3 + 1) / 7 = 1/7 of the amplitude is left in each direction.
    half = ResolutionPyramid((16, 8), resample='antialiased')(checkerboard(16))[1][0, 0]
    expected = torch.full((8, 8), 0.5)
    expected[0, 0] = expected[-1, -1] = 0.5 - 0.5 / 49
    expected[0, -1] = expected[-1, 0] = 0.5 + 0.5 / 49
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-6)


def test_checkerboard_at_a_third_is_nearly_grey():
    # Without antialiasing every third pixel is picked, which is a checkerboard again. The triangle of half width 3
    # weighs 1, 2, 3, 2, 1: (3 - 4 + 2) / 9 = 1/9 of the amplitude is left in each direction.
    third = ResolutionPyramid((24, 8), resample='antialiased')(checkerboard(24))[1][0, 0, 1:-1, 1:-1]
    expected = 0.5 + (checkerboard(6)[0, 0] - 0.5) / 81
    torch.testing.assert_close(third, expected, rtol=0, atol=1e-6)


def test_leaves_nothing_in_checkpoints():
    assert not ResolutionPyramid((16, 8)).state_dict()


@pytest.mark.parametrize('resample', ['matched', 'antialiased'])
def test_constant_stays_constant(resample):
    for y in ResolutionPyramid((20, 13, 7), resample=resample)(torch.full((1, 3, 20, 20), 0.7)):
        torch.testing.assert_close(y, torch.full_like(y, 0.7), rtol=0, atol=1e-6)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('flip', ['shared', 'independent'])
def test_keeps_memory_format(flip, memory_format):
    x = torch.rand(2, 3, 16, 16).contiguous(memory_format=memory_format)
    assert all(y.is_contiguous(memory_format=memory_format) for y in ResolutionPyramid((16, 8, 4), flip)(x))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_keeps_dtype(dtype):
    assert {y.dtype for y in ResolutionPyramid((16, 8))(torch.rand(2, 3, 16, 16, dtype=dtype))} == {dtype}


def test_has_no_gradient():
    pyramid = ResolutionPyramid((16, 8), flip='independent')(torch.rand(2, 3, 16, 16, requires_grad=True))
    assert not any(y.requires_grad for y in pyramid)


def test_shared_flip_is_that_of_the_input():
    x, pyramid = torch.rand(8, 3, 16, 16), ResolutionPyramid((16, 8, 4))
    for y, flipped in zip(pyramid(x), pyramid(x.flip(-1))):
        torch.testing.assert_close(flipped, y.flip(-1))


@pytest.mark.parametrize('hflip, flipped', [(0., False), (1., True)])
def test_independent_flip_of_none_and_of_all(hflip, flipped):
    x = torch.rand(4, 3, 16, 16)
    shared = ResolutionPyramid((16, 8))(x)
    independent = ResolutionPyramid((16, 8), flip='independent', hflip=hflip)(x)
    assert_equal(independent, [y.flip(-1) if flipped else y for y in shared])


def test_independent_flip_is_drawn_per_image_and_size():
    x = torch.rand(200, 1, 8, 8)
    shared = ResolutionPyramid((8, 4))(x)
    flips = []
    for plain, drawn in zip(shared, ResolutionPyramid((8, 4), flip='independent', hflip=0.25)(x)):
        flipped = (drawn == plain.flip(-1)).flatten(1).all(1)
        assert (flipped ^ (drawn == plain).flatten(1).all(1)).all()
        assert 25 < flipped.sum() < 75  # 50 expected, standard deviation 6
        flips.append(flipped)
    assert not torch.equal(*flips)


@pytest.mark.parametrize('shape', [(2, 3, 32, 32), (2, 3, 64, 48), (2, 3, 128, 128)])
def test_wrong_size(shape):
    with pytest.raises(ValueError, match=f'{shape[2]}x{shape[3]}, expected the largest resolution 64'):
        ResolutionPyramid((64, 48))(torch.rand(shape))


@pytest.mark.parametrize('kwargs, message', [
    (dict(flip='both'), "flip policy 'both', expected one of shared, independent"),
    (dict(resample='nearest'), "resampling 'nearest', expected one of matched, antialiased"),
    (dict(interpolation='lanczos'), "interpolation 'lanczos', expected one of bilinear, bicubic"),
])
def test_unknown_choice(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ResolutionPyramid((64, 48), **kwargs)


@pytest.mark.parametrize('resolutions, message', [((), 'empty'), ((64, 64), 'twice'), ((64, 0), 'holds 0')])
def test_bad_resolutions(resolutions, message):
    with pytest.raises(ValueError, match=message):
        ResolutionPyramid(resolutions)
