"""The command timm-rs: usage, help, what is imported, and how errors end"""
import argparse
import importlib
import os
import shlex
import subprocess
import sys

import pytest
from command_lines import run

import timm_rs
import timm_rs.calibrate
import timm_rs_cli.calibrate
import timm_rs_cli.convert
import timm_rs_runtime.version
from timm_rs_cli import COMMANDS, main


@pytest.mark.parametrize('argv', [
    [], ['fly'], ['convert'], ['convert', 'a.pth'], ['push', 'a.pth'], ['convert', '--extract', 'a'],
])
def test_usage_errors(argv, capsys):
    assert run(*argv, code=2, capsys=capsys).startswith('timm-rs')


@pytest.mark.parametrize('argv, message', [
    (['exprot'], "there is no command 'exprot', did you mean export?"),
    (['fly'], "there is no command 'fly'."),
    (['convert', 'a.pth', '--outptu', 'b'], 'unknown flag --outptu, did you mean --output?'),
    (['convert', 'a.pth', '--fly=1', '--output', 'b'], 'unknown flag --fly.'),
    (['convert', 'a.pth', '--output', 'b', '--model-kwargs', 'width'], '--model-kwargs width: expected key=value.'),
    (['convert', 'a.pth', '--output', 'b', '--model-kwargs', '3=1'], '--model-kwargs 3=1: expected key=value.'),
])
def test_usage_errors_say_what_was_meant(argv, message, capsys):
    assert run(*argv, code=2, capsys=capsys).endswith(message)


def test_abbreviated_flags_and_what_looks_like_flags(monkeypatch):
    calls = []
    monkeypatch.setattr(timm_rs_cli.convert, 'run', calls.append)
    run('convert', 'a.pth', '--outp=b', '--model-kwargs', 'width=2', 'name=x-y', 'text=(', '--use')
    run('convert', '--output', 'b', '--', '--a.pth')
    assert calls[0].output == 'b' and calls[0].model_kwargs == dict(width=2, name='x-y', text='(') and calls[0].use_ema
    assert calls[1].checkpoint == '--a.pth'


def test_help_and_version(capsys):
    for argv in (['--help'], ['convert', '--help'], ['push', '--help'], ['--version']):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 0
    assert 'USER/NAME' in capsys.readouterr().out


def test_one_version():
    assert timm_rs.__version__ == timm_rs_runtime.version.__version__


def test_choices_are_those_of_the_functions():
    assert timm_rs_cli.calibrate.METHODS == timm_rs.calibrate.METHODS


ARGUMENTS = """
import sys
from timm_rs_cli import COMMANDS, main
for argv in (['--help'], ['fly'], *([name, flag] for name in COMMANDS for flag in ('--help', '--fly'))):
    try:
        main(argv)
    except SystemExit as e:
        assert e.code == (0 if '--help' in argv else 2), argv
slow = {'timm', 'timm_rs', 'torch', 'onnx', 'matplotlib', 'gradio', 'huggingface_hub', 'asyncio'}
sys.exit(str(slow & set(sys.modules)) if slow & set(sys.modules) else 0)
"""


def test_help_and_wrong_arguments_import_nothing_that_takes_time():
    subprocess.run([sys.executable, '-c', ARGUMENTS], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_can_show_its_traceback(name, capsys):
    with pytest.raises(SystemExit):
        main([name, '--help'])
    text = capsys.readouterr().out
    assert '--traceback' in text and COMMANDS[name][1:40] in text


@pytest.mark.parametrize('name', COMMANDS)
def test_examples_of_the_help_are_accepted(name):
    package = 'timm_rs_cli' if name in timm_rs_cli._COMMANDS else 'timm_rs_runtime.commands'
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    for example in module.EXAMPLES:
        parser.parse_args(shlex.split(example))


def test_scripts_are_commands(monkeypatch):
    calls = []
    monkeypatch.setattr(os, 'execv', lambda path, argv: calls.append(argv))
    main(['train', 'DIR', '--model', 'rs_resnet18'])
    main(['validate', '--help'])
    assert [(os.path.basename(argv[1]), argv[2:]) for argv in calls] == [
        ('train_rs.py', ['DIR', '--model', 'rs_resnet18']), ('validate_rs.py', ['--help'])]
    assert all(argv[0] == sys.executable and os.path.isfile(argv[1]) for argv in calls)


def of_ours():
    importlib.import_module('timm_rs.engine')


def of_others():
    raise ImportError("Figures need matplotlib: pip install ./runtime '.[plot]'.")


def of_nobody():
    raise ImportError("cannot import name 'Nobody'", name='timm.nobody')


@pytest.mark.parametrize('error, code, last', [
    (KeyError('input_size'), 70, 'timm-rs convert: this is a bug, please report it with the lines above.'),
    (AssertionError(), 70, 'timm-rs convert: this is a bug, please report it with the lines above.'),
    (of_ours, 70, 'timm-rs convert: this is a bug, please report it with the lines above.'),
    (of_others, 1, "timm-rs convert: error: Figures need matplotlib: pip install ./runtime '.[plot]'."),
    (of_nobody, 1, "timm-rs convert: error: cannot import name 'Nobody'"),
    (FileNotFoundError(2, 'No such file', 'a\x1b[31m.pth'), 1,
        "timm-rs convert: error: [Errno 2] No such file: 'a\\x1b[31m.pth'"),
    (KeyboardInterrupt(), 130, 'timm-rs convert: interrupted.'),
])
def test_only_bugs_show_their_traceback(error, code, last, monkeypatch, capsys):
    def fail(args):
        if callable(error):
            error()
        raise error

    monkeypatch.setattr(timm_rs_cli.convert, 'run', fail)
    with pytest.raises(SystemExit) as e:
        main(['convert', 'a.pth', '--output', 'b'])
    lines = capsys.readouterr().err.splitlines()
    assert (e.value.code, lines[-1]) == (code, last)
    assert len(lines) == 1 or (code == 70 and lines[0] == 'Traceback (most recent call last):' and 'fail' in str(lines))


def test_traceback_of_what_is_raised_for_the_user(tmp_path):
    with pytest.raises(ValueError, match='does not exist, expected a checkpoint'):
        main(['convert', str(tmp_path / 'a.pth'), '--output', str(tmp_path / 'b'), '--traceback'])
