"""Several processes that find each other as those of torchrun do"""
import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from timm.utils import setup_default_logging

import train_rs
from timm_rs.train import MultiResolutionTask

CONTEXT = multiprocessing.get_context('fork')  # the children need not import torch again


class Job:
    """Run target(*args) in every process, each the leader of a session of its own."""

    def __init__(self, target, *args, world_size=2):
        port = free_port()
        self.processes = [
            CONTEXT.Process(target=_child, args=(rank, world_size, port, target, args)) for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def kill(self, ranks=None, signum=signal.SIGKILL):
        """Signal some of the processes, all if None; a SIGKILL takes their children along."""
        for process in self.processes if ranks is None else [self.processes[r] for r in ranks]:
            if process.is_alive():
                (os.killpg if signum == signal.SIGKILL else os.kill)(process.pid, signum)

    def wait(self, seconds):
        """Return whether all processes ended within some seconds."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        return not any(process.is_alive() for process in self.processes)

    def finish(self, seconds=90):
        """Return the exit codes; it is an error if a process hangs."""
        ended = self.wait(seconds)
        self.kill()
        self.wait(10)
        assert ended, f'not all processes ended within {seconds} s'
        return [process.exitcode for process in self.processes]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _child(rank, world_size, port, target, args):
    os.setsid()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port))
    torch.set_num_threads(1)
    setup_default_logging()
    target(*args)


def train(argv, folder):
    """Train, save the final models of each process beside the folder, and let only the first write into it."""
    rank, fit, save = int(os.environ['RANK']), train_rs.fit, torch.save
    if rank:
        forbid_writing(folder)

    def fit_and_save(run, *args):
        fit(run, *args)
        ema = run.task.get_trainable_module(ema=True)
        states = [run.model.state_dict(), ema.module.state_dict() if ema is not None else {}]
        with open(os.open(f'{folder}-{rank}.pth', os.O_WRONLY | os.O_CREAT), 'wb') as f:
            save(states, f)

    train_rs.fit = fit_and_save
    train_rs.main(argv)


def train_and_signal(argv, rank, step, signum):
    """Train, and signal one of the processes as it begins a step of the training."""
    forward, calls = MultiResolutionTask.forward, 0

    def forward_or_signal(self, *args):
        nonlocal calls
        calls += 1
        if calls == step + 1 and int(os.environ['RANK']) == rank:
            # its loader workers too, as torchrun and Slurm do, and from without
            subprocess.run(['bash', '-c', f'trap "" TERM; kill -{signum:d} -{os.getpgrp()}'])
        return forward(self, *args)

    MultiResolutionTask.forward = forward_or_signal
    train_rs.main(argv)


def forbid_writing(folder):
    """End the process with status 97 when it changes a file below a folder."""
    def hook(event, args):
        changes = event in ('os.mkdir', 'os.rename', 'os.remove', 'os.link', 'os.truncate')
        opens = event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (changes or opens) and str(args[0]).startswith(f'{folder}{os.sep}'):
            os._exit(97)

    sys.addaudithook(hook)
    torch.save = lambda *args, **kwargs: os._exit(97)  # opens files without Python


def models(output):
    return [torch.load(f'{output}-{rank}.pth') for rank in range(2)]


def outcome(output):
    """Return what a run has left behind."""
    folder = Path(output) / 'run'
    last = torch.load(folder / 'last.pth.tar', weights_only=False)
    summary = list(csv.DictReader((folder / 'summary.csv').open()))
    return {k: last[k] for k in ('state_dict', 'state_dict_ema', 'optimizer') if k in last}, summary
