#!/usr/bin/env python3
"""What timm-rs serve adds to an AdaptiveSession, requests while replicas are killed, and Ray Data against a loop

A MobileNetV2 of 96 px (random weights), one thread, answers a JPEG of 224 x 224 and about 12 KB. --measure

- hop: milliseconds of AdaptiveSession.predict in this process, and of POST /predict over one connection to timm-rs
  serve with one replica. In turns, on the wall. n: --requests of each, after 50. Wanted: at most 5 ms more.
- kills: --rate requests a second at random times (Poisson) to two replicas; every 8 s one of them is killed by SIGKILL.
  Counts answers (200), errors (503) and others, and those that came later than the budget of 1 s and than 50 ms after.
- batch: photographs of --data-dir a second at 224 px of a loop (`answers`, which decodes ahead), of two such loops at a
  time, in a process each, and of Ray Data with one and with two workers, in turns, on the wall; of Ray Data after each
  worker has written its first file, of 32 rows instead of 256. n: --photographs, --rounds times. Wanted: one worker
  does at least 0.9 of what the loop does, two 1.7 times that.

    python benchmarks/bench_service.py
    python benchmarks/bench_service.py --measure batch --data-dir DIR --output results/bench_batch.json
"""
import collections
import concurrent.futures
import contextlib
import http.client
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet
import timm
import torch
from _common import create_parser, median, ratio, write_results
from PIL import Image

import timm_rs  # noqa: F401  (registers rs_mobilenetv2_100)
from timm_rs.export.export import export_switchable
from timm_rs_runtime import AdaptiveSession
from timm_rs_runtime import ray as batches
from timm_rs_runtime.images import find_images
from timm_rs_runtime.predict import Predictor, answers
from timm_rs_runtime.replicas import connect

PORT = 8765
BUDGET_MS = 1000.


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--measure', nargs='+', default=['hop', 'kills'], choices=MEASURES, help='default: hop kills')
    add('--requests', type=int, default=300, metavar='N')
    add('--kills', type=int, default=10, metavar='N')
    add('--rate', type=float, default=20., metavar='X')
    add('--data-dir', metavar='DIR', help='photographs of batch')
    add('--photographs', type=int, default=384, metavar='N')
    add('--rounds', type=int, default=3, metavar='N')
    args = parser.parse_args()
    torch.manual_seed(0)
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(128, 18, (224, 224, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).save(file, 'JPEG', quality=75)
    with tempfile.TemporaryDirectory() as folder:
        model = f'{folder}/m.onnx'
        sizes = (224, 96) if 'batch' in args.measure else (96, 64)
        export_switchable(timm.create_model('rs_mobilenetv2_100', resolutions=sizes).eval(), model)
        write_results(args, [
            dict(measure=name, **MEASURES[name](args, model, file.getvalue())) for name in args.measure])


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
    response.read()
    return response.status


def measure_hop(args, model, content):
    session, times = AdaptiveSession(model, BUDGET_MS, threads=1), collections.defaultdict(list)
    with Service(model, 1):
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
    with Service(model, 2), concurrent.futures.ThreadPoolExecutor(512) as pool:
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


def loop(model, names):
    """Return the seconds that it takes to answer photographs."""
    predictor, start = Predictor(model, threads=1), time.perf_counter()
    assert all('top' in row for row in answers(predictor, zip(names, names)))
    return time.perf_counter() - start


def ray_data(model, folder, output, workers):
    """Return the seconds that Ray Data takes for a photograph."""
    batches.predict(str(folder), model, str(output), workers=workers)
    files = sorted(output.glob('[!_]*'), key=os.path.getmtime)
    rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files[workers:])
    return (os.path.getmtime(files[-1]) - os.path.getmtime(files[workers - 1])) / rows


def measure_batch(args, model, _):
    folder, seconds = Path(model).parent / 'photographs', collections.defaultdict(list)
    names = find_images(args.data_dir)
    names = [os.path.abspath(name) for name in names[::len(names) // args.photographs][:args.photographs]]
    folder.mkdir()
    for index, name in enumerate(names):
        (folder / f'{index}.jpg').symlink_to(name)
    batches.ROWS = 32
    connect(None, num_cpus=3)
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context('spawn')) as pool:
        list(pool.map(loop, [model] * 2, [names[:9]] * 2))
        for index in range(args.rounds):
            seconds['loop'] += [loop(model, names) / len(names)]
            seconds['two_loops'] += [max(pool.map(loop, [model] * 2, [names[::2], names[1::2]])) / len(names)]
            seconds['worker'] += [ray_data(model, folder, folder.with_name(f'1-{index}'), 1)]
            seconds['two_workers'] += [ray_data(model, folder, folder.with_name(f'2-{index}'), 2)]
    ratios = dict(worker='loop', two_workers='worker', two_loops='loop')
    return dict(
        photographs=len(names), **{f'{name}_ms': median([seconds], name) for name in seconds},
        **{f'{name}_per_{base}': ratio([seconds], base, name)['ratio'] for name, base in ratios.items()},
        rates={name: [round(1 / s, 1) for s in found] for name, found in seconds.items()})


MEASURES = dict(hop=measure_hop, kills=measure_kills, batch=measure_batch)

if __name__ == '__main__':
    main()
