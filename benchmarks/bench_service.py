#!/usr/bin/env python3
"""What HTTP and Ray Serve add to an AdaptiveSession, requests while replicas are killed, and Ray Data against a loop

A MobileNetV2 of 96 px (random weights), one thread, answers a JPEG of 224 x 224 and about 12 KB.

- hop: milliseconds of AdaptiveSession.predict in this process, and of POST /predict over one connection: to the same
  application around a session, without Ray (http); to timm-rs serve with one replica, which sends requests as tasks of
  Ray (tasks), or straight to the replica, as it does by default (ray). In turns, on the wall. n: --requests of each,
  after 50.
- kills: --rate requests a second at random times (Poisson) to two replicas; every 8 s one of them is killed by SIGKILL.
  Counts answers (200), errors (503) and others, and those that came later than the budget of 1 s and than 50 ms after.

With --data-dir instead: photographs a second at 224 px of a loop (`answers`, which decodes ahead), of two such loops at
a time, in a process each, and of Ray Data with one and with two workers, in turns, on the wall; of Ray Data after each
worker has written its first file, of 32 rows instead of 256. n: --photographs, --rounds times.

Wanted: at most 5 ms are added at the median; one worker does at least 0.9 of what the loop does, two 1.7 times that.

    python benchmarks/bench_service.py
    python benchmarks/bench_service.py --data-dir DIR --output results/bench_batch.json
"""
import collections
import concurrent.futures
import http.client
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet
import timm
import torch
import uvicorn
from _common import create_parser, median, print_table, ratio, write_results
from PIL import Image

import timm_rs  # noqa: F401  (registers rs_mobilenetv2_100)
from timm_rs.export.export import export_switchable
from timm_rs_runtime import AdaptiveSession
from timm_rs_runtime import ray as batches
from timm_rs_runtime.images import find_images
from timm_rs_runtime.predict import Predictor, answers
from timm_rs_runtime.replicas import connect
from timm_rs_runtime.service import Replica, create_app

PORT = 8765  # and the next two
BUDGET_MS = 1000.


def main():
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--requests', type=int, default=300, metavar='N')
    add('--kills', type=int, default=10, metavar='N')
    add('--rate', type=float, default=20., metavar='X')
    add('--data-dir', metavar='DIR')
    add('--photographs', type=int, default=384, metavar='N')
    add('--rounds', type=int, default=3, metavar='N')
    args = parser.parse_args()
    torch.manual_seed(0)
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(128, 18, (224, 224, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).save(file, 'JPEG', quality=75)
    with tempfile.TemporaryDirectory() as folder:
        model = f'{folder}/m.onnx'
        sizes = (224, 96) if args.data_dir else (96, 64)
        export_switchable(timm.create_model('rs_mobilenetv2_100', resolutions=sizes).eval(), model)
        measures = [measure_batch] if args.data_dir else [measure_hop, measure_kills]
        rows = [measure(args, model, file.getvalue()) for measure in measures]
    for row in rows:
        print_table(list(row), [row])
    write_results(args, rows)


class Service:
    """timm-rs serve while a with block runs."""

    def __init__(self, model, replicas, port=PORT, **environment):
        self.command = [
            sys.executable, '-m', 'timm_rs_runtime', 'serve', model, '--budget-ms', str(BUDGET_MS), '--port', str(port),
            '--replicas', str(replicas), '--min-replicas', str(replicas)]
        self.environment = dict(os.environ, **environment)

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self.environment)
        self.process.stdout.readline()

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)


def serve_alone(model):
    """Serve without Ray."""
    async def stats():
        return {}

    app = create_app(Replica(model, BUDGET_MS, threads=1).predict, stats, BUDGET_MS)
    uvicorn.run(app, port=PORT + 2, log_level='error', access_log=False)


def post(connection, content):
    connection.request('POST', '/predict', content, {'Content-Type': 'image/jpeg'})
    response = connection.getresponse()
    return response.status, response.read()


def measure_hop(args, model, content):
    session = AdaptiveSession(model, BUDGET_MS, threads=1)
    alone = multiprocessing.get_context('spawn').Process(target=serve_alone, args=(model,))
    alone.start()
    times = collections.defaultdict(list)
    with Service(model, 1), Service(model, 1, PORT + 1, RAY_SERVE_USE_GRPC_BY_DEFAULT='0'):
        connections = {
            name: http.client.HTTPConnection('127.0.0.1', port)
            for name, port in (('http', PORT + 2), ('tasks', PORT + 1), ('ray', PORT))}
        for _ in range(50 + args.requests):
            start = time.perf_counter()
            session.predict(content)
            times['here'].append(1e3 * (time.perf_counter() - start))
            for name, connection in connections.items():
                start = time.perf_counter()
                post(connection, content)
                times[name].append(1e3 * (time.perf_counter() - start))
    alone.terminate()
    found = {
        f'{name}_p{q}': round(np.percentile(row[50:], q), 2) for q in (50, 99) for name, row in times.items()}
    added = {f'added_by_{name}': round(found[f'{name}_p50'] - found['here_p50'], 2) for name in connections}
    return dict(measure='hop', bytes=len(content), requests=args.requests, **found, **added)


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
        measure='batch', photographs=len(names), **{f'{name}_ms': median([seconds], name) for name in seconds},
        **{f'{name}_per_{base}': ratio([seconds], base, name)['ratio'] for name, base in ratios.items()},
        rates={name: [round(1 / s, 1) for s in found] for name, found in seconds.items()})


if __name__ == '__main__':
    main()
