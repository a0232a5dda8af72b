"""Data sets: one way to read images, one meaning of DIR"""
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from timm_rs.data.classes import check_labels
from timm_rs.data.datasets import choose_img_mode, create_dataset, describe
from timm_rs.data.readers import UNREADABLE, skip_unreadable
from timm_rs_runtime import ImageError
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.images import extensions, open_image, split_folder
from timm_rs_runtime.unreadable import ReadErrors, UnreadableError

GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def files():
    """Return names and contents of images: 16 bits, turned by EXIF, one that is cut, one that timm would not find."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(Image.effect_noise((40, 40), 50), 'PNG')
    return {
        'cat/0.png': encoded(Image.fromarray(GRADIENT.astype(np.uint16) * 257), 'PNG'),
        'cat/1.jpg': encoded(Image.fromarray(GRADIENT[:, :12]), 'JPEG', exif=exif),
        'dog/2.png': whole[:len(whole) // 2],
        'dog/3.webp': encoded(Image.fromarray(GRADIENT.T), 'WEBP', lossless=True),
    }


def write_folder(root):
    for name, content in files().items():
        path = root / 'val' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return dict(name='', root=str(root), split='validation')


def write_tar(root):
    with tarfile.open(root / 'images.tar', 'w') as tar:
        for name, content in files().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return dict(name='', root=str(root / 'images.tar'), split='')


def write_shard(root):
    with tarfile.open(root / 'val-0.tar', 'w') as tar:
        for image, content in files().items():
            label = str(int('dog' in image)).encode()
            for name, part in ((image, content), (image.split('.')[0] + '.cls', label)):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    return dict(name='wds/x', root=str(root), split='val-0.tar', num_samples=4)


def write_parquet(root):
    datasets = pytest.importorskip('datasets')
    datasets.disable_progress_bars()
    features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog'])))
    columns = dict(
        image=[dict(bytes=content, path=name) for name, content in files().items()],
        label=[int('dog' in name) for name in files()])
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(root / 'validation-0.parquet'))
    return dict(name=f'hfds/{root}', root=str(root / 'cache'), split='validation')


KINDS = dict(
    folder=write_folder,
    torchvision=lambda root: dict(write_folder(root), name='torch/image_folder'),
    tar=write_tar,
    wds=write_shard,
    hfds=write_parquet,
    hfids=lambda root: dict(write_parquet(root), name=f'hfids/{root}', num_samples=4),
)


@pytest.fixture(params=[*((kind, 'exact') for kind in KINDS), *((kind, 'scaled') for kind in KINDS)])
def dataset(request, tmp_path):
    kind, decode = request.param
    if kind == 'wds':
        pytest.importorskip('webdataset')
    dataset = create_dataset(**KINDS[kind](tmp_path), input_img_mode='L', decode=decode)
    dataset.transform = Image.Image.copy  # which needs the pixels
    return dataset


@pytest.fixture
def expected():
    contents = list(files().values())
    return [np.asarray(open_image(contents[i], 'L')) for i in (0, 1, 3)]


def test_every_kind_of_data_set_is_read_one_way(dataset, expected):
    """Deep images are scaled, none is turned, and the one that is cut is named, counted and marked."""
    errors = ReadErrors()
    found = list(skip_unreadable(dataset, errors, stand_in=False))
    assert [target for _, target in found] == [0, 0, UNREADABLE, 1]
    for image, pixels in zip([found[i][0] for i in (0, 1, 3)], expected):
        assert np.array_equal(image, pixels)
    assert np.array_equal(found[0][0], GRADIENT) and found[1][0].size == (12, 16)
    assert found[2][0].getextrema() == (0, 0)
    errors.check()
    (name,), (reason,) = errors.names, errors.names.values()
    assert 'dog/2.png' in name and 'truncated' in reason


def test_another_image_stands_in(dataset, expected):
    """To train the number of images stays; after an unreadable one comes the next twice."""
    found = list(skip_unreadable(dataset, ReadErrors(), stand_in=True))
    assert [target for _, target in found] == [0, 0, 1, 1]
    for image, pixels in zip([image for image, _ in found], [*expected, expected[-1]]):
        assert np.array_equal(image, pixels)


def test_an_unreadable_image_is_an_error_otherwise(dataset):
    with pytest.raises(ImageError, match='cannot be read as an image: image file is truncated'):
        list(dataset)


def test_too_many(dataset):
    errors = ReadErrors(limit=0)
    list(skip_unreadable(dataset, errors, stand_in=False))
    with pytest.raises(UnreadableError, match='^1 images cannot be read, expected at most 0 .*2.png$'):
        errors.check()


def test_a_shard_is_read_by_the_key_that_is_asked_for(tmp_path):
    """Samples without it are unreadable."""
    pytest.importorskip('webdataset')
    dataset = create_dataset(**write_shard(tmp_path), input_key='png', input_img_mode='L')
    (image, first), *others = skip_unreadable(dataset, ReadErrors(), stand_in=False)
    assert np.array_equal(image, GRADIENT) and first == 0
    assert [target for _, target in others] == [UNREADABLE] * 3


def test_samples_of_a_shard_without_label_or_image_are_counted(tmp_path):
    """timm would leave them out without a word."""
    pytest.importorskip('webdataset')
    image = encoded(Image.fromarray(GRADIENT), 'PNG')
    with tarfile.open(tmp_path / 'val-0.tar', 'w') as tar:
        for name, content in (
                ('a.png', image), ('a.cls', b'1'), ('b.png', image), ('c.png', image), ('c.cls', b'cat'),
                ('d.jpeg', image), ('d.cls', b'1')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    dataset = create_dataset('wds/x', str(tmp_path), 'val-0.tar', num_samples=4, input_img_mode='L')
    errors = ReadErrors()
    found = list(skip_unreadable(dataset, errors, stand_in=False))
    assert [target for _, target in found] == [1, UNREADABLE, UNREADABLE, UNREADABLE]
    errors.check()
    b, c, d = errors.names.values()
    assert "its label cannot be read: KeyError: 'cls'" in b and 'its label cannot be read: ValueError: ' in c
    assert d == 'it holds jpeg, cls, expected an image, jpg or png or webp (--input-key)'


@pytest.mark.parametrize('label', [-1, 2, None, 'cat', 0.5, [0, 1]])
def test_labels_that_are_none_of_the_classes(label):
    class Data:
        source, target_transform = 'split of data', None

    check_labels(Data, 2)
    with pytest.raises(UserError, match='split of data.* label'):
        Data.target_transform(label)
    assert [Data.target_transform(found) for found in (0, np.int64(1), torch.tensor(1))] == [0, 1, 1]


def test_splits_and_fields_that_a_data_set_lacks(tmp_path):
    (tmp_path / 'data').mkdir()
    arguments = dict(write_parquet(tmp_path / 'data'), root=str(tmp_path / 'cache'))
    with pytest.raises(UserError, match="Cannot read split 'valid' of data set hfds/.*Unknown split"):
        create_dataset(**dict(arguments, split='valid'))
    for flag, key in (('--input-key', 'img'), ('--target-key', 'fine_label')):
        key = {flag[2:].replace('-', '_'): key}
        with pytest.raises(UserError, match=f'has nothing in a field .*, give {flag}: it has image, label'):
            create_dataset(**arguments, **key)


def test_a_row_without_an_image(tmp_path):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features(dict(image=datasets.Image(), label=datasets.Value('int64')))
    image = dict(bytes=encoded(Image.fromarray(GRADIENT), 'PNG'), path='a.png')
    datasets.Dataset.from_dict(dict(image=[image, None], label=[0, 1]), features=features).to_parquet(
        str(tmp_path / 'validation-0.parquet'))
    dataset = create_dataset(f'hfds/{tmp_path}', str(tmp_path / 'cache'), 'validation', input_img_mode='L')
    dataset.transform, errors = Image.Image.copy, ReadErrors()
    assert [target for _, target in skip_unreadable(dataset, errors, stand_in=False)] == [0, UNREADABLE]
    errors.check()
    assert list(errors.names) == ['number 1']


def test_timm_finds_all_formats_that_are_read(tmp_path):
    before = get_img_extensions()
    (tmp_path / 'cat').mkdir()
    for ending in (*extensions(), '.txt', '.eps'):
        (tmp_path / 'cat' / f'a{ending.upper()}').touch()
    dataset = create_dataset('', str(tmp_path), 'validation')
    assert len(dataset) == len(extensions()) and {'.jpg', '.png', '.webp', '.tiff', '.avif'} < set(extensions())
    assert get_img_extensions() == before


def test_what_is_not_a_file_is_unreadable(tmp_path):
    """A link that leads nowhere."""
    arguments = write_folder(tmp_path)
    (tmp_path / 'val' / 'cat' / '4.png').symlink_to(tmp_path / 'nowhere')
    errors = ReadErrors()
    found = skip_unreadable(create_dataset(**arguments), errors, stand_in=False)
    assert [target for _, target in (found[i] for i in range(len(found)))] == [0, 0, UNREADABLE, UNREADABLE, 1]
    errors.check()
    assert errors.names[str(tmp_path / 'val' / 'cat' / '4.png')].startswith('[Errno 2] No such file')


# What DIR and --split mean

@pytest.mark.parametrize('folders, split, expected', [
    ('train val', 'train', 'train'),
    ('train val', 'training', 'train'),
    ('train val', 'validation', 'val'),
    ('train validation', 'val', 'validation'),
    ('train val validation', 'val', 'val'),
    ('train val validation', 'validation', 'validation'),
    ('train val test', 'test', 'test'),
    ('train val extra', 'extra', 'extra'),
    ('cat dog', 'val', '.'),
    ('cat dog', 'train', '.'),
    ('cat dog', '', '.'),
    ('bus train', '', '.'),
    ('', 'val', '.'),
    ('train', 'val', "holds train; expected one of them as the split instead of 'val'."),
    ('train val', '', "holds train, val; expected one of them as the split instead of ''."),
    ('train val', 'train[:50%]', "holds train, val; expected one of them as the split instead of 'train[:50%]'."),
    ('test val', 'train', "holds test, val; expected one of them as the split instead of 'train'."),
])
def test_split_folder(tmp_path, folders, split, expected):
    for name in folders.split():
        (tmp_path / name).mkdir()
    (tmp_path / 'eval').touch()  # a file is not a split
    if ' ' in expected:
        with pytest.raises(UserError) as e:
            split_folder(tmp_path, split)
        assert str(e.value) == f'{tmp_path} {expected}'
    else:
        assert split_folder(tmp_path, split) == str(tmp_path if expected == '.' else tmp_path / expected)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='nowhere does not exist, expected a folder of images'):
        split_folder(tmp_path / 'nowhere', 'val')


def test_a_data_set_says_where_its_images_are(tmp_path):
    assert describe(create_dataset(**write_folder(tmp_path))) == f'4 images of {tmp_path}/val'


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
def test_digits_are_of_the_mode_that_is_asked_for(mode):
    pytest.importorskip('sklearn')
    assert create_dataset('digits', None, 'train', input_img_mode=mode)[0][0].mode == mode


@pytest.mark.parametrize('in_chans, mode, expected', [
    (1, None, 'L'), (3, '', 'RGB'), (4, None, 'RGBA'), (2, 'LA', 'LA'),
])
def test_img_mode(in_chans, mode, expected):
    assert choose_img_mode(in_chans, mode) == expected


@pytest.mark.parametrize('mode', ['I;16', 'F', '1', 'cmyk'])
def test_images_have_8_bits(mode):
    with pytest.raises(UserError, match=f'--input-img-mode {mode}: expected an 8-bit mode of PIL'):
        choose_img_mode(1, mode)


def test_an_empty_split_is_a_folder_without_splits(tmp_path):
    """One class may be named like a split."""
    for name in ('bus', 'train'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / name / '0.png')
    assert len(create_dataset('', str(tmp_path), '')) == 2
