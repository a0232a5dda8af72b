"""Values from files are checked where they are read"""
import json
import math

import pytest

from timm_rs_runtime.cascade import read_cascade
from timm_rs_runtime.errors import UserError
from timm_rs_runtime.fields import (
    array,
    check_fields,
    either,
    flag,
    integer,
    number,
    optional,
    plain,
    read_json,
    read_text,
    record,
    resolutions,
    size_text,
    table,
    text,
)
from timm_rs_runtime.format import parse_metadata

RIGHT = [
    (integer(1, 4), 4, 4),
    (number(), -2.5, -2.5),
    (number(0, 1), 1, 1),
    (text(3), 'abc', 'abc'),
    (text(choices=('a', 'b')), 'b', 'b'),
    (flag(), False, False),
    (optional(flag()), None, None),
    (either(text(), integer(0, 9)), 7, 7),
    (array(integer(1, 9), 2, 3), [3, 1], (3, 1)),
    (table(text(), number()), {'a': 1.5}, {'a': 1.5}),
    (record(dict(a=flag(), b=flag())), dict(a=True, c=1), dict(a=True)),
    (resolutions(), [96, 224], (224, 96)),
    (resolutions(), 96, (96,)),
    (size_text, '96', 96),
    (plain(), dict(a=[1, 'x', None, True]), dict(a=[1, 'x', None, True])),
]
WRONG = [
    (integer(1, 4), 5, 'is 5, expected an integer from 1 to 4'),
    (integer(1, 4), True, 'is True, expected an integer'),
    (integer(1, 4), 2., 'is 2.0, expected an integer'),
    (integer(1, 4), '2', "is '2', expected an integer"),
    (number(), math.nan, 'is nan, expected a finite number'),
    (number(), 10 ** 400, 'expected a finite number'),
    (number(0, 4, above=True), 0, 'is 0, expected a number above 0 and at most 4'),
    (number(0), -1, 'is -1, expected a finite number of at least 0'),
    (text(3), 'abcd', 'expected text of at most 3 characters'),
    (text(), None, 'is None, expected text'),
    (text(choices=('a', 'b')), ['a'], 'expected one of a, b'),
    (flag(), 1, 'is 1, expected true or false'),
    (either(text(), integer(0, 9)), 10, 'expected text of at most 1000 characters or an integer from 0 to 9'),
    (array(integer(1, 9), 2, 3), [3], 'is [3], expected a list of 2 to 3 values'),
    (array(integer(1, 9)), [3, 0], '[1] is 0, expected an integer from 1 to 9'),
    (table(text(), number()), {'a': 'x'}, "a is 'x', expected a finite number"),
    (record(dict(a=flag()), required=['a']), {}, 'a is missing, expected true or false'),
    (record(dict(a=record(dict(b=array(flag()))))), dict(a=dict(b=[True, 3])), 'a.b[1] is 3, expected true or false'),
    (record({}), [], 'the content is [], expected a dict'),
    (resolutions(), [], 'is [], expected a list of 1 to 64'),
    (resolutions(), [96, 96], 'is [96, 96], expected different input sizes'),
    (resolutions(), [5000], '[0] is 5000, expected an integer from 1 to 4096'),
    (size_text, '96x', "is '96x', expected an integer from 1 to 4096"),
    (size_text, '٣٣٣٣٣', 'expected an integer from 1 to 4096'),
    (plain(), [[[[[[1]]]]]], 'is [[[[[[1]]]]]], expected at most 2000 values on at most 5 levels'),
    (plain(), [[0] * 1000] * 1000, 'expected at most 2000 values'),
    (plain(), dict(a=[1e7]), 'a[0] is 10000000.0, expected true or false or a number'),
    (plain(), [{3}], '[0] is {3}, expected'),
    (plain(), {10 ** 400: 1}, ', expected text of at most 100 characters'),
]


@pytest.mark.parametrize('check, value, expected', RIGHT)
def test_right_values(check, value, expected):
    found = check_fields(value, check, 'x.json')
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize('check, value, message', WRONG)
def test_wrong_values_are_one_line(check, value, message):
    with pytest.raises(UserError) as e:
        check_fields(value, check, 'x.json')
    assert str(e.value).startswith('x.json: ') and message in str(e.value)
    assert len(str(e.value)) < 300 and '\n' not in str(e.value)


def test_long_and_deep_values_are_shown_in_few_words():
    deep = []
    for _ in range(10000):
        deep = [deep]
    shared = ['x']
    for _ in range(100):
        shared = [shared, shared]  # 2^100 values if they were written out
    for value in (10 ** 5000, 'x' * 10 ** 6, list(range(10 ** 6)), deep, shared, 'a\nb' * 1000):
        with pytest.raises(UserError) as e:
            check_fields(value, flag(), 'x.json')
        assert len(str(e.value)) < 300 and '\n' not in str(e.value)


@pytest.mark.parametrize('content, message', [
    (b'{"a": NaN}', 'x.json is not valid JSON: it holds NaN'),
    (b'{"a": -Infinity}', 'it holds -Infinity'),
    (b'{"a": ', 'is not valid JSON: Expecting value'),
    (b'[' * 100000, 'is not valid JSON: maximum recursion depth'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'is not valid JSON: Exceeds the limit'),
    (b'{"a": "\xff"}', 'x.json is not text in UTF-8: invalid start byte at byte 7'),
    (b'{"a": 1e999}', 'x.json: a is inf, expected a finite number'),
    (b'\xef\xbb\xbf[]', 'x.json: the content is [], expected a dict'),
])
def test_json_files(content, message, tmp_path):
    path = tmp_path / 'x.json'
    path.write_bytes(content)
    with pytest.raises(UserError, match='^[^\n]*$') as e:
        read_json(path, record(dict(a=number())))
    assert message in str(e.value)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    import os

    (tmp_path / 'large').write_bytes(b'x' * 11)
    with pytest.raises(UserError, match='large is larger than 10 bytes'):
        read_text(tmp_path / 'large', most=10)
    assert read_text(tmp_path / 'large', most=11) == 'x' * 11
    os.mkfifo(tmp_path / 'pipe')
    for name in ('pipe', 'missing', '.'):
        with pytest.raises(UserError, match='does not exist or is not a regular file'):
            read_text(tmp_path / name)


METADATA = dict(resolutions=[32, 64], num_classes=2, mean=[.5] * 3, std=[.5] * 3, interpolation='bicubic', crop_pct=1.,
                crop_mode='center', class_names=['cat', 'dog'], madds={'32': 10, '64': 40}, timm_rs='0.1')


def test_metadata():
    found = parse_metadata({k: json.dumps(v) for k, v in METADATA.items()}, 'm.onnx')
    assert found['resolutions'] == (64, 32) and found['madds'] == {32: 10, 64: 40} and found['timm_rs'] == '0.1'


@pytest.mark.parametrize('change, message', [
    (dict(madds=None), 'm.onnx: madds is None, expected a dict'),
    (dict(madds={'32': -1}), 'madds.32 is -1, expected an integer from 0'),
    (dict(resolutions=[]), 'm.onnx: resolutions is [], expected'),
    (dict(resolutions=[32, '64']), "resolutions[1] is '64', expected an integer from 1 to 4096"),
    (dict(num_classes=3), 'm.onnx: there are 2 class_names, but num_classes is 3'),
    (dict(num_classes=10 ** 9), 'num_classes is 1000000000, expected an integer from 0 to 1000000'),
    (dict(mean=[]), 'mean is [], expected a list of 1'),
    (dict(mean=[.5]), 'mean has 1 channels, but std has 3'),
    (dict(std=[.5, .5, 0]), 'std[2] is 0, expected a finite number above 0'),
    (dict(interpolation='best'), "interpolation is 'best', expected one of nearest"),
    (dict(crop_pct=True), 'crop_pct is True, expected a number of at least 0.1 and at most 4'),
    (dict(class_names='ab'), "class_names is 'ab', expected a list"),
])
def test_bad_metadata(change, message):
    with pytest.raises(UserError) as e:
        parse_metadata({k: json.dumps(v) for k, v in dict(METADATA, **change).items()}, 'm.onnx')
    assert message in str(e.value)


@pytest.mark.parametrize('content, message', [
    ('{}', 'c.json: thresholds is missing, expected a dict'),
    ('{"thresholds": {"24": 0.5, "48": 0}, "average": "no"}', "average is 'no', expected true or false"),
    ('{"thresholds": {"24": "0.5", "48": 0}}', "thresholds.24 is '0.5', expected a number of at least 0 and at most 1"),
    ('{"thresholds": {"big": 0}}', "thresholds.big is 'big', expected an integer from 1 to 4096"),
    ('{"thresholds": {"48": 0.5, "24": 0}}', 'c.json: {48: 0.5, 24: 0} is not a cascade'),
    ('[]', 'c.json: the content is [], expected a dict'),
])
def test_bad_cascades(content, message, tmp_path):
    (tmp_path / 'c.json').write_text(content)
    with pytest.raises(UserError) as e:
        read_cascade(tmp_path / 'c.json')
    assert message in str(e.value)
