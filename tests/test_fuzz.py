"""Commands on mutated files"""
import json
import random

import pytest

pytest.importorskip('onnxruntime')

from fuzzing import KINDS, fuzz, judge, mutate, mutate_value, run  # noqa: E402


@pytest.mark.slow
def test_150_mutated_files_are_answered_or_refused_in_one_line():
    found = fuzz(150)
    assert not found['wrong']
    answers = {kind: counts.get('answered', 0) + counts.get('refused', 0) for kind, counts in found['counts'].items()}
    assert sum(answers.values()) >= 145 and min(answers.values()) >= 12 and set(answers) == set(KINDS)


def test_mutations_follow_from_the_seed_and_change_something():
    data = bytes(range(200))
    assert mutate(data, random.Random(3)) == mutate(data, random.Random(3))
    assert sum(mutate(data, random.Random(seed)) != data for seed in range(50)) >= 45
    values = dict(a=[1, 2], b=dict(c='x'))
    changed = [mutate_value(values, random.Random(seed)) for seed in range(50)]
    assert values == dict(a=[1, 2], b=dict(c='x')) and sum(v != values for v in changed) >= 45


@pytest.mark.parametrize('code, out, err, expected', [
    (1, '', 'timm-rs predict: error: a.png is damaged.\n', 'refused'),
    (1, '', 'Traceback (most recent call last):\nKeyError\n', 'traceback'),
    (70, '', 'this is a bug', 'traceback'),
    (1, '', '', 'not one line'),
    (1, '', 'a: error: b\na: error: c\n', 'not one line'),
    (0, json.dumps(dict(top=[dict(probability=0.5)])), '', 'answered'),
    (0, '{"top": [{"probability": NaN}]}', '', 'not finite'),
])
def test_verdicts(tmp_path, code, out, err, expected):
    assert judge(code, out, err, ['predict'], tmp_path)[0] == expected


def test_what_is_left_behind_is_a_fault(tmp_path):
    (tmp_path / '.part-1').mkdir()
    assert judge(0, '', '', ['predict'], tmp_path)[0] == 'half-written'


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    code, out, err = run('timm-rs', ['convert', str(tmp_path / 'nothing.pth'), '--output', str(tmp_path / 'out')])
    assert judge(code, out, err, ['convert'], tmp_path)[0] == 'refused'
