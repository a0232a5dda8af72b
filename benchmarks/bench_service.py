#!/usr/bin/env python3
"""What timm-rs serve adds to an AdaptiveSession, and requests while replicas are killed

A MobileNetV2 of 96 px (random weights), one thread, answers a JPEG of 224 x 224 and about 12 KB.

- hop: milliseconds of AdaptiveSession.predict in this process, and of POST /predict over one connection to timm-rs
  serve with one replica. In turns, on the wall. n: --requests of each, after 50. Wanted: at most 5 ms more.
- kills: --rate requests a second at random times (Poisson) to two replicas; every 8 s one of them is killed by SIGKILL.
  Counts answers (200), errors (503) and others, and those that came later than the budget of 1 s and than 50 ms after.

    python benchmarks/bench_service.py
"""
import collections
import concurrent.futures
import contextlib
import http.client
import io
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import timm
import torch
from _common import create_parser, write_results
from PIL import Image

import timm_rs  # noqa: F401  (registers rs_mobilenetv2_100)
from timm_rs.export.export import export_switchable
from timm_rs_runtime import AdaptiveSession

PORT = 8765
BUDGET_MS = 1000.


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--measure', nargs='+', default=list(MEASURES), choices=MEASURES, help='default: all')
    add('--requests', type=int, default=300, metavar='N')
    add('--kills', type=int, default=10, metavar='N')
    add('--rate', type=float, default=20., metavar='X')
    args = parser.parse_args()
    torch.manual_seed(0)
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(128, 18, (224, 224, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).save(file, 'JPEG', quality=75)
    with tempfile.TemporaryDirectory() as folder:
        model = f'{folder}/m.onnx'
        export_switchable(timm.create_model('rs_mobilenetv2_100', resolutions=(96, 64)).eval(), model)
        write_results(args, [
            dict(measure=name, **MEASURES[name](args, model, file.getvalue())) for name in args.measure])


@contextlib.contextmanager
def service(model, replicas):
    """Run timm-rs serve during a with block."""
    command = [
        sys.executable, '-m', 'timm_rs_runtime', 'serve', model, '--budget-ms', str(BUDGET_MS), '--port', str(PORT),
        '--replicas', str(replicas), '--min-replicas', str(replicas)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if not process.stdout.readline():
        raise SystemExit(f'{shlex.join(command)} ended before it served.')
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def post(connection, content):
    connection.request('POST', '/predict', content, {'Content-Type': 'image/jpeg'})
    response = connection.getresponse()
    response.read()
    return response.status


def measure_hop(args, model, content):
    session, times = AdaptiveSession(model, BUDGET_MS, threads=1), collections.defaultdict(list)
    with service(model, 1):
        connection = http.client.HTTPConnection('127.0.0.1', PORT)
        calls = dict(here=lambda: session.predict(content), ray=lambda: post(connection, content))
        for _ in range(50 + args.requests):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    found = {
        f'{name}_p{q}': round(np.percentile(row[50:], q), 2) for q in (50, 99) for name, row in times.items()}
    return dict(
        bytes=len(content), requests=args.requests, **found,
        added_by_ray=round(found['ray_p50'] - found['here_p50'], 2))


def replicas_now():
    """Return the processes of the replicas."""
    with urllib.request.urlopen(f'http://127.0.0.1:{PORT}/metrics') as page:
        lines = page.read().decode().splitlines()
    names = {line.partition('session="')[2].partition('"')[0] for line in lines if 'timm_rs_queue_length{' in line}
    return [int(name.rpartition('-')[2]) for name in names]


def ask(content):
    """Return the status of a request, or the name of its error, and its milliseconds."""
    start = time.perf_counter()
    try:
        with contextlib.closing(http.client.HTTPConnection('127.0.0.1', PORT, timeout=30)) as connection:
            status = post(connection, content)
    except OSError as e:
        status = type(e).__name__
    return str(status), 1e3 * (time.perf_counter() - start)


def measure_kills(args, model, content):
    chosen, kills, asked = random.Random(0), 0, []
    with service(model, 2), concurrent.futures.ThreadPoolExecutor(512) as pool:
        start = now = time.perf_counter()
        while kills < args.kills or now < start + 8 * (kills + 1):
            now += chosen.expovariate(args.rate)
            time.sleep(max(now - time.perf_counter(), 0))
            asked.append(pool.submit(ask, content))
            if kills < args.kills and now > start + 8 * (kills + 1):
                running = replicas_now()
                if running:
                    os.kill(chosen.choice(running), signal.SIGKILL)
                    kills += 1
        statuses, times = zip(*(each.result() for each in asked))
    return dict(
        kills=kills, requests=len(asked), statuses=dict(collections.Counter(statuses)),
        late=sum(ms > BUDGET_MS for ms in times), late_by_50_ms=sum(ms > BUDGET_MS + 50 for ms in times),
        slowest_ms=round(max(times), 1))


MEASURES = dict(hop=measure_hop, kills=measure_kills)

if __name__ == '__main__':
    main()
