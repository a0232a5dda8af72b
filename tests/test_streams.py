"""WebDataset shards and Hugging Face data sets, from files of this machine, with one and two processes"""
import io
import json
import random
import signal
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from conftest import assert_equal
from PIL import Image
from processes import Job, models, outcome, train, train_and_signal
from timm.data import IterableImageDataset

import timm_rs.data.datasets
import train_rs
import validate_rs
from timm_rs.data.datasets import create_dataset, create_eval_loader, share_shards

KINDS = ('wds', 'hfds', 'hfids')
SHARDS = dict(train=(5, 5, 5, 5), validation=(4, 2, 1))  # images in each
TARS = ('train-{0000..0003}.tar', 'validation-{0000..0002}.tar')
TINY = (
    '--model rs_test_resnet --resolutions 32 16 --num-classes 2 --batch-size 4 --workers 2 --device cpu --lr 0.01 '
    '--warmup-epochs 0 --epochs 2 --log-interval 1000 --checkpoint-hist 1'
).split()
RANDOM = '--recovery-interval 1 --reprob 0.5 --drop-path 0.2 --mixup 0.2 --model-ema --model-ema-decay 0.5'.split()


@pytest.fixture(autouse=True, scope='module')
def no_sleep():
    """Leave out the five seconds that datasets sleeps at the end of each pass."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec('datasets'):
            patch.setattr('datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN', 0.)
        yield


def pictures(split):
    """Return the shards of a split, each a list of an image file and its label."""
    generator = random.Random(split)
    shards = []
    for count in SHARDS[split]:
        shards.append([])
        for _ in range(count):
            file = io.BytesIO()
            Image.frombytes('RGB', (40, 36), generator.randbytes(40 * 36 * 3)).save(file, 'png')
            shards[-1].append((file.getvalue(), generator.randrange(2)))
    return shards


def write_tars(root):
    for split in SHARDS:
        for number, shard in enumerate(pictures(split)):
            with tarfile.open(root / f'{split}-{number:04d}.tar', 'w') as tar:
                for i, (image, label) in enumerate(shard):
                    for extension, content in (('png', image), ('cls', str(label).encode())):
                        info = tarfile.TarInfo(f'{number}{i:03d}.{extension}')
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


def write_parquet(root):
    import datasets
    datasets.disable_progress_bars()
    features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog'])))
    for split, counts in SHARDS.items():
        for number, shard in enumerate(pictures(split)):
            columns = dict(
                image=[dict(bytes=image, path=None) for image, _ in shard], label=[label for _, label in shard])
            path = root / f'{split}-{number:05d}-of-{len(counts):05d}.parquet'
            datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The same images as plain files."""
    root = tmp_path_factory.mktemp('folder')
    for split in SHARDS:
        for i, (image, label) in enumerate(sum(pictures(split), [])):
            path = root / split / ('cat', 'dog')[label] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    return root


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
    pytest.importorskip('webdataset')
    root = tmp_path_factory.mktemp('tars')
    write_tars(root)
    return root


@pytest.fixture(scope='module')
def parquet(tmp_path_factory):
    pytest.importorskip('datasets')
    root = tmp_path_factory.mktemp('parquet')
    assert Job(write_parquet, root, world_size=1).finish() == [0]  # whose threads this process need not have
    return root


@pytest.fixture(scope='module')
def source(request, tmp_path_factory):
    """Return the flags that name a stream, to train and to validate."""
    kind = request.param
    if kind == 'wds':
        common = ['--dataset', 'wds/pictures', '--data-dir', str(request.getfixturevalue('tars'))]
        train_split, val_split = TARS
    else:
        cache = tmp_path_factory.mktemp('cache')
        common = ['--dataset', f"{kind}/{request.getfixturevalue('parquet')}", '--data-dir', str(cache)]
        train_split, val_split = 'train', 'validation'
    counts = ['--train-num-samples', '20', '--val-num-samples', '7'] if kind != 'hfds' else []
    return (
        [*common, '--train-split', train_split, '--val-split', val_split, *counts],
        [*common, '--split', val_split, '--num-samples', '7'])


@pytest.fixture(scope='module')
def uninterrupted(source, tmp_path_factory):
    output = tmp_path_factory.mktemp('uninterrupted')
    assert Job(train, arguments(source, output), str(output)).finish() == [0, 0]
    return output


def arguments(source, output, *flags):
    return [*source[0], *TINY, *RANDOM, '--output', str(output), '--experiment', 'run', '--resume', 'auto', *flags]


@pytest.mark.parametrize('source', KINDS, indirect=True)
def test_two_processes(source, uninterrupted, folder, tmp_path):
    """They end with one model, and evaluate each image once: its results are those of the folder of images."""
    first, second = models(uninterrupted)
    assert_equal(first, second)
    row = outcome(uninterrupted)[1][-1]
    for number, flags in enumerate(([str(folder)], source[1])):
        results = tmp_path / f'results{number}.json'
        validate_rs.main([
            *flags, '--checkpoint', str(uninterrupted / 'run' / 'last.pth.tar'), '--use-ema', '--workers', '0',
            '--device', 'cpu', '--results-file', str(results)])
        for expected in json.loads(results.read_text()):
            where = expected['resolution']
            assert float(row[f'eval_top1_{where}']) == expected['top1']
            assert float(row[f'eval_loss_{where}']) == pytest.approx(expected['loss'], rel=1e-5)


@pytest.mark.parametrize('source', KINDS, indirect=True)
def test_resume_reads_the_stream_again(source, uninterrupted, tmp_path):
    """Killed in the second epoch; the batches that are done come again and are passed over."""
    output = tmp_path / 'o'
    batches = 4 if '--train-num-samples' in source[0] else 2  # a stream rounds up to whole batches of every worker
    codes = Job(train_and_signal, arguments(source, output), 1, batches + 1, signal.SIGKILL).finish()
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert list((output / 'run').glob('recovery-1-0.pth.tar'))
    assert Job(train, arguments(source, output), str(output)).finish() == [0, 0]
    assert outcome(output)[1] == outcome(uninterrupted)[1]
    assert_equal(outcome(output)[0], outcome(uninterrupted)[0])
    assert_equal(models(output), models(uninterrupted))


@pytest.mark.parametrize('source', ['wds', 'hfids'], indirect=True)
def test_fitting_a_classifier_leaves_the_stream_as_it_is(source, tmp_path):
    """It reads the beginning of the first epoch, which comes again."""
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
    found = []
    for init in ('fitted', 'zero'):
        flags = [
            '--pretrained-path', str(tmp_path / 'weights.pth'), '--bn-statistics', 'batch', '--opt', 'sgd', '--lr', '0',
            '--new-classifier-init', init]
        output = tmp_path / init
        assert Job(train, arguments(source, output, *flags), str(output), world_size=1).finish() == [0]
        found.append(outcome(output)[0]['state_dict'])
    assert found[0]['fc.weight'].any() and not found[1]['fc.weight'].any()
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items() if not k.startswith('fc.'))


def read(tars, rank, world_size, num_workers):
    """Return the labelled images that one process evaluates."""
    dataset = create_dataset('wds/pictures', str(tars), TARS[1], batch_size=2)
    dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, world_size  # as in a process group
    share_shards(dataset, False, rank, world_size, num_workers)
    loader = create_eval_loader(dataset, (32,), 2, CONFIG, num_workers)
    return [(image.sum().item(), label.item()) for images, labels in loader for image, label in zip(images[0], labels)]


CONFIG = timm.data.resolve_data_config(dict(input_size=(3, 32, 32)))


@pytest.mark.parametrize('world_size', [1, 2, 3, 4])
@pytest.mark.filterwarnings('ignore:Length of IterableDataset')
def test_shards_are_evaluated_once(tars, world_size):
    expected = sorted(read(tars, 0, 1, 0))
    assert len(expected) == len(set(expected)) == 7
    found = [read(tars, rank, world_size, num_workers=rank % 3) for rank in range(world_size)]
    assert sorted(sum(found, [])) == expected
    assert [len(images) for images in found] == {1: [7], 2: [5, 2], 3: [4, 2, 1], 4: [4, 2, 1, 0]}[world_size]


@pytest.fixture
def flags(tars, tmp_path):
    return [
        '--dataset', 'wds/pictures', '--data-dir', str(tars), '--train-split', TARS[0], '--train-num-samples', '20',
        '--val-split', TARS[1], '--val-num-samples', '7', *TINY, '--output', str(tmp_path), '--experiment', 'run']


def test_every_epoch_is_shuffled_again(flags, monkeypatch):
    epochs = []
    monkeypatch.setattr(IterableImageDataset, 'set_epoch', lambda self, epoch: epochs.append(epoch))
    train_rs.main([*flags, '--workers', '0'])
    assert epochs == [0, 1]


def fails(argv, capfd):
    with pytest.raises(SystemExit) as e:
        train_rs.main(argv)
    assert e.value.code == 1
    return capfd.readouterr().err.splitlines()[-1]


def test_fewer_shards_than_workers(flags, capfd):
    line = fails([*flags, '--workers', '5'], capfd)
    assert '4 training shards for 1 processes with 5 --workers each, expected at least 5' in line


def test_shards_without_images(flags, tmp_path, capfd):
    for number in range(4):
        (tmp_path / f'train-{number:04d}.tar').write_bytes(b'no tar')
    for path in Path(flags[3]).glob('validation*'):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    line = fails([*flags, '--data-dir', str(tmp_path), '--workers', '0'], capfd)
    assert 'The training data ended after batch 0 of 5' in line


@pytest.mark.parametrize('dataset,package', [('wds/x', 'webdataset'), ('hfds/x', 'datasets'), ('hfids/x', 'datasets')])
def test_missing_package(dataset, package, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(timm_rs.data.datasets, 'find_spec', lambda name: None)
    line = fails(['--dataset', dataset, '--data-dir', str(tmp_path), *TINY], capfd)
    assert f"--dataset {dataset} needs the package {package}: pip install ./runtime '.[stream]'" in line


def test_a_reader_that_timm_does_not_have(capfd, tmp_path):
    """timm would read the folder."""
    line = fails(['--dataset', 'hfd/x', str(tmp_path), *TINY], capfd)
    assert 'Unknown data set hfd/x, expected torch/, hfds/, hfids/, tfds/ or wds/ before the name.' in line
