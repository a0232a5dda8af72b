"""Fixed teachers: their loss in closed form, their images, and the flags"""
import argparse
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn
from conftest import RESOLUTIONS, assert_equal, images, rs_model
from torch.testing import assert_close

from timm_rs import EnsembleDistillationLoss
from timm_rs.hub.convert import save_model
from timm_rs.records import write_label_names
from timm_rs.train import MultiResolutionTask
from timm_rs.train.builders import build_task
from timm_rs.train.model import build_model
from timm_rs.train.options import parse_args
from timm_rs.train.teacher import FixedTeachers
from timm_rs_runtime.errors import UserError

HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)


class Constant(nn.Module):
    """Answers with the same probabilities whatever it sees, and keeps what it saw."""

    def __init__(self, *p, **cfg):
        super().__init__()
        self.num_classes, self.pretrained_cfg = len(p), cfg
        self.logits = nn.Parameter(torch.tensor(p).log())

    def forward(self, x):
        self.seen = x
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize('reduction, share', [('sum', 1.), ('mean', 0.5)])
@pytest.mark.parametrize('weights, task_weight, distill_weight', [
    ({}, 1., 1.), (dict(task_weight=0.25), 0.25, 0.75), (dict(distill_weight=3.), 1., 3.),
    (dict(task_weight=2., distill_weight=3.), 2., 3.),
])
def test_loss_by_hand(reduction, share, weights, task_weight, distill_weight):
    teachers = FixedTeachers([Constant(0.9, 0.1), Constant(0.3, 0.7)], **HALF, temperature=1., **weights)
    answers = teachers(torch.zeros(3, 3, 4, 4))
    assert_close(teachers.log_mixture(answers).exp(), torch.tensor([[0.6, 0.4]] * 3))
    uniform, other = torch.zeros(3, 2), torch.tensor([[0.2, 0.8]] * 3).log()
    losses = dict(loss=torch.tensor(5.), distillation=torch.tensor(1.))
    found = teachers.combine(losses, [uniform, other], answers, reduction)
    divergence = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    divergence += 0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8)
    assert_close(found['loss'], torch.tensor(5 * task_weight + distill_weight * share * divergence))
    assert_close(found['distillation'], torch.tensor(1 + divergence))


def test_temperature():
    teachers = FixedTeachers([Constant(0.8, 0.2)], **HALF, temperature=2.)
    found = teachers.combine(
        dict(loss=torch.tensor(0.), distillation=torch.tensor(0.)), [torch.zeros(1, 2)],
        teachers(torch.zeros(1, 3, 4, 4)), 'sum')
    p = 2 / 3  # the square root of 0.8 is twice that of 0.2
    assert_close(found['loss'], torch.tensor(4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))))


def test_each_teacher_gets_the_largest_images_as_it_needs_them():
    same, other = Constant(0.5, 0.5, **HALF), Constant(0.5, 0.5, mean=(0., 0., 0.), std=(1., 1., 1.))
    x = images(8)
    FixedTeachers([same, other], **HALF)(x)
    assert_equal(same.seen, x)
    assert_close(other.seen, x * 0.5 + 0.5)


def test_teachers_stay_as_they_are():
    teacher = timm.create_model('resnet10t', num_classes=3)
    teachers = FixedTeachers([teacher], **HALF)
    task = MultiResolutionTask(rs_model(num_classes=3), teachers=teachers, verbose=False).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    task(images(RESOLUTIONS[0], n=4), torch.arange(4) % 3)['loss'].backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert_equal(dict(teacher.state_dict()), before)
    assert all(p.grad is not None for p in task.trainable_module.parameters())


def test_without_labels_the_answers_are_the_targets():
    criterion = EnsembleDistillationLoss('none', nn.CrossEntropyLoss())  # which takes probabilities too
    teachers = FixedTeachers([Constant(0.6, 0.3, 0.1)], **HALF, distill_weight=0., label_free=True)
    task = MultiResolutionTask(rs_model(num_classes=3).eval(), criterion, teachers=teachers, verbose=False)
    x = images(RESOLUTIONS[0], n=4)
    found = task(x, torch.full((4,), 7))  # a label that there is not
    expected = sum(
        -(torch.tensor([0.6, 0.3, 0.1]) * z.log_softmax(1)).sum(1).mean() for z in found['output'])
    assert_close(found['loss'], expected)


def build(*flags, classes=None):
    args = parse_args(['--model', 'rs_resnet10t', '--resolutions', '64', '32', '--num-classes', '3', *flags])
    vars(args).update(distributed=False, rank=0, world_size=1)
    device = torch.device('cpu')
    model = build_model(args, device, classes)
    return model, build_task(args, model, device, classes)


def test_flags(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('rs_resnet10t', resolutions=(64, 32), num_classes=3)
    save_model(model, str(tmp_path / 'rs'))
    save_model(timm.create_model('resnet10t', num_classes=3), str(tmp_path / 'plain'))
    weights = ['--initial-checkpoint', str(tmp_path / 'rs')]
    built, task = build(*weights, '--self-teacher', '--kd-model-name', f"local-dir:{tmp_path / 'plain'}")
    x = images(64)
    own, other = task.teachers.teachers
    assert_equal(own(x), built.at(64).eval()(x))
    with torch.no_grad():
        built.conv1[0].weight.zero_()  # the teacher is a copy
    assert_equal(own(x), model.at(64).eval()(x))
    assert task.teachers.temperature == 4 and not task.teachers.label_free
    assert build(*weights)[1].teachers is None
    run = tmp_path / 'run'
    run.mkdir()
    args = argparse.Namespace(model='rs_resnet10t', resolutions=[64, 32], num_classes=3)
    torch.save(dict(state_dict=model.state_dict(), args=args), run / 'last.pth.tar')
    for name in str(run), f'local-dir:{run}', str(run / 'last.pth.tar'), str(tmp_path / 'rs'):
        _, task = build('--kd-model-name', name)
        assert_equal(task.teachers.teachers[0](x), model.at(64).eval()(x))


def test_a_switchable_teacher_has_the_batch_norms_of_the_largest_images(tmp_path):
    model = rs_model('resnet10t', (96, 64, 32), num_classes=3)
    save_model(model, str(tmp_path / 'rs'))
    _, task = build('--kd-model-name', str(tmp_path / 'rs'))
    x = images(64)
    assert_equal(task.teachers.teachers[0](x), model.at(64).eval()(x))


def test_a_classifier_of_other_names_that_is_kept_can_teach(tmp_path):
    model = timm.create_model('rs_resnet10t', resolutions=(64, 32), num_classes=3)
    save_model(model, str(tmp_path / 'rs'), ['a', 'b', 'c'])
    flags = ['--model', f"local-dir:{tmp_path / 'rs'}", '--pretrained', '--head-init-scale', '1', '--self-teacher']
    model, task = build(*flags, classes=dict(x=0, y=1, z=2))
    x = images(64)
    assert_equal(task.teachers.teachers[0](x), model.at(64).eval()(x))


@pytest.mark.parametrize('flags, message', [
    (['--self-teacher'], '--self-teacher needs trained weights with their classifier for 3 classes'),
    (['--pretrained-path', 'RS', '--self-teacher'], '--self-teacher needs trained weights with their classifier'),
    (['--kd-model-name', 'local-dir:PLAIN'], 'has 5 classes, expected 3'),
    (['--kd-model-name', 'resnet18000'], 'resnet18000 does not exist, expected a checkpoint'),
    (['--kd-model-name', 'LABELS'], 'was trained with several labels per image'),
    (['--model', 'local-dir:EMPTY'], 'holds no config.json: timm-rs convert makes a folder with one'),
])
def test_unusable_teachers(flags, message, tmp_path):
    save_model(timm.create_model('rs_resnet10t', resolutions=(64, 32), num_classes=3), str(tmp_path / 'rs'))
    save_model(timm.create_model('resnet10t', num_classes=5), str(tmp_path / 'plain'))
    labels = timm.create_model('resnet10t', num_classes=3)
    args = argparse.Namespace(model='resnet10t', num_classes=3, task='multilabel', multilabel_threshold=0.5)
    torch.save(dict(state_dict=labels.state_dict(), args=args), tmp_path / 'labels.pth')
    names = dict(RS='rs', LABELS='labels.pth', PLAIN='plain', EMPTY='')
    places = {k: str(tmp_path / name) for k, name in names.items()}
    with pytest.raises(UserError, match=message):
        build(*[next((f.replace(k, v) for k, v in places.items() if k in f), f) for f in flags])


@pytest.mark.parametrize('flags, message', [
    (['--label-free'], '--label-free needs a teacher'),
    (['--kd-model-name', 'resnet18', '--kd-temperature', '0'], '--kd-temperature is 0.0, expected a finite number'),
])
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert message in capsys.readouterr().err


def test_teachers_in_another_precision_and_normalization():
    teacher = timm.create_model('resnet10t', num_classes=3)
    x = images(64, n=4).bfloat16()
    expected = teacher.eval()((x.float() * 0.5 + 0.5 - torch.tensor(teacher.pretrained_cfg['mean']).view(1, -1, 1, 1))
                              / torch.tensor(teacher.pretrained_cfg['std']).view(1, -1, 1, 1))
    assert_close(FixedTeachers([teacher], **HALF)(x)[0], expected)
    assert FixedTeachers([copy.deepcopy(teacher).bfloat16()], **HALF)(x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize('name, kwargs, message', [
    ('resnet10t', dict(in_chans=1), 'to have 1 channels, but got 3 channels'),
    ('test_vit', dict(img_size=96, dynamic_img_size=False), "Input height \\(64\\) doesn't match model \\(96\\)"),
])
def test_teachers_that_do_not_take_the_images(name, kwargs, message, tmp_path):
    model = timm.create_model(name, num_classes=3, **kwargs)
    args = argparse.Namespace(model=name, num_classes=3, model_kwargs=kwargs)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    with pytest.raises(UserError, match=f'--kd-model-name .*: .*{message}'):
        build('--kd-model-name', str(tmp_path))


@pytest.mark.parametrize('flags', [['--kd-model-name', 'RUN'], ['--self-teacher', '--initial-checkpoint', 'RUN']])
def test_teachers_of_other_classes_are_noted(flags, tmp_path, caplog):
    model = timm.create_model('rs_resnet10t', resolutions=(64, 32), num_classes=3)
    args = argparse.Namespace(model='rs_resnet10t', resolutions=[64, 32], num_classes=3)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    write_label_names(str(tmp_path), dict(ant=0, bee=1, cow=2), 3)
    flags = [f.replace('RUN', str(tmp_path)) for f in flags]
    for classes, is_noted in (None, False), (dict(ant=0, bee=1, cow=2), False), (dict(bee=0, ant=1, cow=2), True):
        caplog.clear()
        build(*flags, classes=classes)
        assert ("teaches other classes than those of the data set: class 0 is 'bee', expected 'ant'"
                in caplog.text) == is_noted
