"""What the tests of the commands share: photographs, a run, and the line of an error"""
import json
import random

import pytest
from PIL import Image

import timm_rs_cli
import train_rs
import validate_rs

MODEL = 'rs_test_resnet'
TINY = (
    f'--model {MODEL} --resolutions 32 16 --batch-size 4 --workers 0 --device cpu --lr 0.05 --warmup-epochs 0'
).split()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Photographs of several shapes in two classes, one of them greyscale."""
    root = tmp_path_factory.mktemp('images')
    generator = random.Random(0)
    for split, count in (('train', 5), ('validation', 7)):
        for name in ('cat', 'dog'):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = (generator.randint(20, 60), generator.randint(20, 60))
                image = Image.frombytes('RGB', size, generator.randbytes(3 * size[0] * size[1]))
                image.convert('L' if i == 0 else 'RGB').save(folder / f'{i}.jpg')
    return root


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    output = tmp_path_factory.mktemp('trained')
    train_rs.main([str(images), *TINY, '--epochs', '2', '--output', str(output), '--experiment', 'run'])
    return output / 'run'


def fails(main, argv, capfd):
    """Return the one line on stderr that a failing command ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert e.value.code not in (0, None)
    captured = capfd.readouterr()
    assert 'Traceback' not in captured.err
    errors = [line for line in captured.err.splitlines() if 'error: ' in line]
    assert len(errors) == 1 and captured.err.strip().endswith(errors[0])
    return errors[0]


def validated(images, tmp_path, *flags):
    """Return what validate_rs.py writes of each resolution."""
    results = tmp_path / f'results{len(list(tmp_path.iterdir()))}.json'  # which is never overwritten
    validate_rs.main([str(images), *flags, '--workers', '0', '--device', 'cpu', '--results-file', str(results)])
    return {row['resolution']: row for row in json.loads(results.read_text())}


def run(*argv, code=None, capsys=None):
    """Run timm-rs; with a status code, return its one line on stderr."""
    argv = [str(a) for a in argv]
    if code is None:
        return timm_rs_cli.main(argv)
    with pytest.raises(SystemExit) as e:
        timm_rs_cli.main(argv)
    assert e.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    return line
