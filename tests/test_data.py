"""What data sets tell of themselves"""
import pytest
from PIL import Image

from timm_rs.data.datasets import choose_img_mode, create_dataset


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
def test_digits_are_of_the_mode_that_is_asked_for(mode):
    pytest.importorskip('sklearn')
    assert create_dataset('digits', None, 'train', input_img_mode=mode)[0][0].mode == mode


@pytest.mark.parametrize('in_chans, mode, expected', [
    (1, None, 'L'), (3, '', 'RGB'), (4, None, 'RGBA'), (2, 'LA', 'LA'),
])
def test_img_mode(in_chans, mode, expected):
    assert choose_img_mode(in_chans, mode) == expected


def test_an_empty_split_is_a_folder_without_splits(tmp_path):
    """One class may be named like a split."""
    for name in ('bus', 'train'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / name / '0.png')
    assert len(create_dataset('', str(tmp_path), '')) == 2
