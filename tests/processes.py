"""Several processes that find each other as those of torchrun do"""
import multiprocessing
import os
import signal
import socket
import time

import torch
from timm.utils import setup_default_logging

CONTEXT = multiprocessing.get_context('fork')  # the children need not import torch anew


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
