#!/usr/bin/env python3
"""What HTTP and Ray Serve add to an AdaptiveSession, and requests while replicas are killed

A MobileNetV2 of 96 px (random weights), one thread, answers a JPEG of 224 x 224 and about 12 KB.

- hop: milliseconds of AdaptiveSession.predict in this process, and of POST /predict to timm-rs serve with one replica
  over one connection, in turns, on the wall. n: --requests of each, after 50.
- kills: --rate requests a second at random times (Poisson) to two replicas; every 8 s one of them is killed by SIGKILL.
  Counts answers (200), errors (503) and others, and those that came later than the budget of 1 s and than 50 ms after.

    python benchmarks/bench_service.py
"""
import collections
import http.client
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import numpy as np
import timm
import torch
from _common import create_parser, print_table, write_results
from PIL import Image

import timm_rs  # noqa: F401  (registers rs_mobilenetv2_100)
from timm_rs.export.export import export_switchable
from timm_rs_runtime import AdaptiveSession

PORT = 8765
BUDGET_MS = 1000.


def main():
    parser = create_parser(__doc__)
    parser.add_argument('--requests', type=int, default=300, metavar='N')
    parser.add_argument('--kills', type=int, default=10, metavar='N')
    parser.add_argument('--rate', type=float, default=20., metavar='X')
    args = parser.parse_args()
    torch.manual_seed(0)
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(128, 18, (224, 224, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).save(file, 'JPEG', quality=75)
    with tempfile.TemporaryDirectory() as folder:
        model = f'{folder}/m.onnx'
        export_switchable(timm.create_model('rs_mobilenetv2_100', resolutions=(96, 64)).eval(), model)
        rows = [measure_hop(args, model, file.getvalue()), measure_kills(args, model, file.getvalue())]
    for row in rows:
        print_table(list(row), [row])
    write_results(args, rows)


class Service:
    """timm-rs serve while a with block runs."""

    def __init__(self, model, replicas):
        self.command = [
            sys.executable, '-m', 'timm_rs_runtime', 'serve', model, '--budget-ms', str(BUDGET_MS), '--port', str(PORT),
            '--replicas', str(replicas), '--min-replicas', str(replicas)]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process.stdout.readline()

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)


def post(connection, content):
    connection.request('POST', '/predict', content, {'Content-Type': 'image/jpeg'})
    response = connection.getresponse()
    return response.status, response.read()


def measure_hop(args, model, content):
    session = AdaptiveSession(model, BUDGET_MS, threads=1)
    times = dict(here=[], http=[])
    with Service(model, 1):
        connection = http.client.HTTPConnection('127.0.0.1', PORT)
        contenders = dict(here=lambda: session.predict(content), http=lambda: post(connection, content))
        for _ in range(50 + args.requests):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    p50, p99 = ({name: np.percentile(found[50:], q) for name, found in times.items()} for q in (50, 99))
    return dict(
        measure='hop', bytes=len(content), requests=args.requests, here_p50=round(p50['here'], 2),
        http_p50=round(p50['http'], 2), added_p50=round(p50['http'] - p50['here'], 2), here_p99=round(p99['here'], 2),
        http_p99=round(p99['http'], 2))


def replicas_now():
    """Return the processes of the replicas."""
    with urllib.request.urlopen(f'http://127.0.0.1:{PORT}/metrics') as page:
        lines = page.read().decode().splitlines()
    names = {line.partition('session="')[2].partition('"')[0] for line in lines if 'timm_rs_queue_length{' in line}
    return [int(name.rpartition('-')[2]) for name in names]


def measure_kills(args, model, content):
    found, chosen, kills, lock = [], random.Random(0), 0, threading.Lock()

    def ask():
        start = time.perf_counter()
        try:
            connection = http.client.HTTPConnection('127.0.0.1', PORT, timeout=30)
            status = post(connection, content)[0]
            connection.close()
        except OSError as e:
            status = type(e).__name__
        with lock:
            found.append((status, 1e3 * (time.perf_counter() - start)))

    with Service(model, 2):
        start = now = time.perf_counter()
        threads = []
        while kills < args.kills or now < start + 8 * (kills + 1):
            now += chosen.expovariate(args.rate)
            time.sleep(max(now - time.perf_counter(), 0))
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            if kills < args.kills and now > start + 8 * (kills + 1):
                running = replicas_now()
                if running:
                    os.kill(chosen.choice(running), signal.SIGKILL)
                    kills += 1
        for thread in threads:
            thread.join()
    statuses = collections.Counter(str(status) for status, _ in found)
    return dict(
        measure='kills', kills=kills, requests=len(found), statuses=dict(statuses),
        late=sum(ms > BUDGET_MS for _, ms in found), late_by_50_ms=sum(ms > BUDGET_MS + 50 for _, ms in found),
        slowest_ms=round(max(ms for _, ms in found), 1))


if __name__ == '__main__':
    main()
