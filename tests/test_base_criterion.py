"""The loss of one size that timm's flags choose: weights of classes, poly"""
import math

import pytest
import torch

from timm_rs.train.builders import _create_criterion
from timm_rs.train.options import parse_args
from timm_rs_runtime.errors import UserError

PLAIN = '--device cpu --lr 0.01 --weight-decay 0.01 --smoothing 0 --log-interval 1000'.split()


def criterion(*flags, num_classes=3):
    """Return the base criterion of a run."""
    args = parse_args([*PLAIN, *flags])
    args.num_classes = num_classes
    return _create_criterion(args)


@pytest.mark.parametrize('flags,positive,weight', [
    ('--loss-pos-weight 3', [3, 3, 3], [1, 1, 1]),
    ('--bce-pos-weight 2', [2, 2, 2], [1, 1, 1]),
    ('--loss-class-weight 1,2,4', [1, 1, 1], [1, 2, 4]),
    ('--class-stats {stats} --loss-pos-weight neg_pos', [9, 1.5, 1 / 9], [1, 1, 1]),
    ('--class-stats {stats} --loss-pos-weight neg_pos --loss-weight-power 0.5', [3, 1.5 ** 0.5, 1 / 3], [1, 1, 1]),
    ('--class-stats {stats} --loss-pos-weight neg_pos --loss-weight-max 2', [2, 1.5, 1 / 9], [1, 1, 1]),
    # 1 / frequency is 10, 2.5 and 10 / 9, over their mean
    ('--class-stats {stats} --loss-class-weight inv_freq', [1, 1, 1],
     [v * 3 / (10 + 2.5 + 10 / 9) for v in (10, 2.5, 10 / 9)]),
])
@pytest.mark.parametrize('task', ['multilabel', 'classification'])
def test_class_weights(tmp_path, task, flags, positive, weight):
    """Binary cross entropy of class c is weight_c * (-positive_c y log p - (1 - y) log(1 - p))."""
    (tmp_path / 'stats.json').write_text('{"pos_counts": [1, 4, 9], "num_samples": 10, "task": "multilabel"}')
    loss = criterion('--task', task, '--loss', 'bce', *flags.format(stats=tmp_path / 'stats.json').split())
    p = torch.tensor([[0.2, 0.5, 0.9]])
    y = torch.tensor([[0., 1., 0.]])
    w, v = torch.tensor(weight), torch.tensor(positive)
    expected = (w * (-v * y * p.log() - (1 - y) * (1 - p).log())).mean()
    target = y if task == 'multilabel' else torch.tensor([1])
    torch.testing.assert_close(loss(p.logit(), target), expected)


def test_poly_losses():
    p = torch.tensor([[0.2, 0.5, 0.3]])
    found = criterion('--loss', 'poly', '--poly-epsilon', '1.5')(p.log(), torch.tensor([1]))
    assert found.item() == pytest.approx(-math.log(0.5) + 1.5 * (1 - 0.5))
    q, y = torch.tensor([[0.2, 0.9]]), torch.tensor([[0., 1.]])  # the probabilities of the right answers: 0.8, 0.9
    loss = criterion(*'--task multilabel --loss poly --poly-epsilon 1 --poly-gamma 2'.split(), num_classes=2)
    found = loss(q.logit(), y)
    focal = [(1 - t) ** 2 * -math.log(t) + (1 - t) ** 3 for t in (0.8, 0.9)]
    assert found.item() == pytest.approx(sum(focal) / 2, rel=1e-5)


@pytest.mark.parametrize('flags,message', [
    ('--loss bce --loss-class-weight 1,2', '--loss-class-weight 1,2: 2 values, expected one for each of 3 classes'),
    ('--loss bce --loss-pos-weight neg_pos', '--loss-pos-weight neg_pos: Class weight method'),
    ('--loss bce --loss-pos-weight nowhere.json', '--loss-pos-weight nowhere.json: could not convert'),
    ('--loss bce --loss-pos-weight=-1', '--loss-pos-weight -1: Loss weights must be finite and non-negative'),
    ('--loss ce --loss-pos-weight 2', '--loss-pos-weight 2: Class and positive weights are only supported by'),
    ('--loss zlpr', "Loss type 'zlpr' requires multi-label targets"),
    ('--loss bce --class-stats {broken} --loss-pos-weight neg_pos', 'broken.json is not valid JSON: it holds NaN'),
    ('--loss bce --class-stats nowhere.json', 'nowhere.json does not exist'),
])
def test_losses_that_are_refused(tmp_path, flags, message):
    (tmp_path / 'broken.json').write_text('{"pos_counts": [1, NaN, 9], "num_samples": 10}')
    with pytest.raises(UserError) as e:
        criterion(*flags.format(broken=tmp_path / 'broken.json').split())
    assert message in str(e.value) and len(str(e.value).splitlines()) == 1
