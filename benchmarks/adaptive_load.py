#!/usr/bin/env python3
"""Serving under bursts: a session that adapts its resolution against the largest and the smallest one

Requests for real images arrive at random (Poisson), whether or not earlier ones are answered (open loop): a calm rate
that the largest size can carry, and bursts that it cannot. Both rates are fractions of what was measured at the start:
a burst's is --burst times the rate at which only the largest size is fully busy. The same arrivals and images go to

- adaptive: timm_rs_runtime.AdaptiveSession with --budget-ms;
- fixed at the largest and at the smallest size: the same queue and the same budget, one size to choose from.

Time runs from a request's arrival to its answer, the reading of the image included; a miss is an answer later than the
budget, or a refusal. Accuracy is that of the answers, late ones included, where folders name classes
(timm_rs_runtime.fitting.label_folders). n: --cycles cycles of calm and burst. Contenders take turns, cycle by cycle.
Wanted: in bursts, adaptive misses less than 1 % where the largest size misses more than 30 %, and is right more often
than the smallest size.

    python benchmarks/adaptive_load.py --model FILE.onnx --data-dir DIR --threads 1
"""
import collections
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from _common import add_deployed_arguments, create_parser, print_table, write_results

from timm_rs_runtime import AdaptiveSession, Session
from timm_rs_runtime.fitting import label_folders
from timm_rs_runtime.images import split_folder

COLUMNS = ('contender', 'phase', 'requests', 'p50_ms', 'p99_ms', 'misses', 'accuracy', 'mean_size')


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    add = parser.add_argument
    add('--budget-ms', type=float, default=200., metavar='T')
    add('--calm', type=float, default=0.4, metavar='X', help='load of the largest size (default: %(default)s)')
    add('--burst', type=float, default=1.6, metavar='X', help='the same in bursts (default: %(default)s)')
    add('--calm-seconds', type=float, default=5., metavar='T')
    add('--burst-seconds', type=float, default=5., metavar='T')
    add('--cycles', type=int, default=6, metavar='N')
    args = parser.parse_args()

    session = Session(args.model, args.threads)
    paths, labels = label_folders(split_folder(args.data_dir, args.split), session, args.most)
    capacity = {r: 1 / seconds for r, seconds in measure_service(session, paths[:40]).items()}
    rate = capacity[session.resolutions[0]]
    print('images a second: ' + ', '.join(f'{r} px {n:.0f}' for r, n in capacity.items()), flush=True)
    plan = schedule(args, rate, len(paths))
    records = collections.defaultdict(list)
    for cycle, requests in enumerate(plan):
        for name in turns(('adaptive', 'largest', 'smallest'), cycle):
            records[name] += run_cycle(open_contender(name, session, args), requests, paths, labels)
    rows = [
        dict(contender=name, phase=phase, **summarize(records[name], phase))
        for name in ('adaptive', 'largest', 'smallest') for phase in ('calm', 'burst', 'all')]
    print_table(COLUMNS, rows)
    for row in rows:
        row['images_per_second'] = {r: round(n, 1) for r, n in capacity.items()}
    write_results(args, rows)
    plot(records, args)


def measure_service(session, paths):
    """Return median seconds of an image at each size, with its reading, the sizes in turns."""
    seconds = {r: [] for r in session.resolutions}
    for path in paths:
        for r in seconds:
            start = time.perf_counter()
            session.predict(path, r)
            seconds[r].append(time.perf_counter() - start)
    return {r: float(np.median(found)) for r, found in seconds.items()}


def schedule(args, rate, num_images):
    """Return for each cycle the arrivals: (second, image, phase)."""
    random = np.random.default_rng(0)
    plan = []
    for _ in range(args.cycles):
        now, requests = 0., []
        for phase, load, length in (('calm', args.calm, args.calm_seconds), ('burst', args.burst, args.burst_seconds)):
            end = now + length
            while (now := now + random.exponential(1 / (load * rate))) < end:
                requests.append((now, int(random.integers(num_images)), phase))
            now = end
        plan.append(requests)
    return plan


def turns(names, cycle):
    """Return the names, another one first in each cycle."""
    start = cycle % len(names)
    return names[start:] + names[:start]


def open_contender(name, session, args):
    """Return the adaptive session, or one that has a single size to choose from."""
    if name != 'adaptive':
        session = OneSize(session, session.resolutions[0 if name == 'largest' else -1])
    return AdaptiveSession(session, args.budget_ms, max_queue=10 ** 6)


class OneSize:
    """A session as if its file had one size."""

    def __init__(self, session, resolution):
        self.resolutions = (resolution,)
        self.mean, self.batch_size = session.mean, session.batch_size
        self.predict, self.preprocess = session.predict, session.preprocess
        self.read = partial(session.read, resolution=resolution)


def run_cycle(contender, requests, paths, labels):
    """Send the requests at their times; return a record of each."""
    records = []
    lock = threading.Lock()

    def ask(arrival, image, phase):
        try:  # what the request waited for a thread counts as well
            waited = 1e3 * (time.perf_counter() - begin - arrival)
            answer = contender.predict(paths[image], budget_ms=max(contender.budget_ms - waited, 1e-3))
            record = dict(latency=1e3 * (time.perf_counter() - begin - arrival), size=answer.resolution,
                          right=bool(answer.logits[0].argmax() == labels[image]))
        except RuntimeError as e:
            record = dict(latency=float('inf'), size=None, right=False, error=str(e))
        record.update(arrival=arrival, phase=phase, missed=record['latency'] > contender.budget_ms)
        with lock:
            records.append(record)

    with ThreadPoolExecutor(512) as pool:
        begin = time.perf_counter()
        for request in requests:
            delay = begin + request[0] - time.perf_counter()
            if delay > 0:
                time.sleep(delay)
            pool.submit(ask, *request)
    return sorted(records, key=lambda r: r['arrival'])


def summarize(records, phase):
    chosen = [r for r in records if phase in (r['phase'], 'all')]
    latency = [r['latency'] for r in chosen]
    sizes = collections.Counter(r['size'] for r in chosen if r['size'])
    return dict(
        requests=len(chosen),
        p50_ms=round(float(np.percentile(latency, 50)), 1),
        p99_ms=round(float(np.percentile(latency, 99)), 1),
        misses=round(100 * float(np.mean([r['missed'] for r in chosen])), 2),
        accuracy=round(100 * float(np.mean([r['right'] for r in chosen])), 2),
        mean_size=round(sum(r * n for r, n in sizes.items()) / max(sum(sizes.values()), 1), 1),
        sizes={str(r): n for r, n in sorted(sizes.items())},
    )


def plot(records, args):
    """Draw load, chosen size and latency over the time of the first two cycles."""
    from matplotlib.figure import Figure

    length = args.calm_seconds + args.burst_seconds
    figure = Figure(figsize=(8, 6.5), layout='constrained')
    load, size, latency = figure.subplots(3, 1, sharex=True)
    for name, found in records.items():
        times, cycle = [], 0
        for before, record in zip([None, *found], found):
            cycle += before is not None and record['arrival'] < before['arrival']
            times.append(cycle * length + record['arrival'])
        keep = np.array(times) < 2 * length
        times = np.array(times)[keep]
        shown = [r for r, k in zip(found, keep) if k]
        if name == 'adaptive':
            counts, edges = np.histogram(times, np.arange(0, 2 * length + 0.5, 0.5))
            load.stairs(counts / 0.5, edges, color='black')
            size.plot(times, [r['size'] or np.nan for r in shown], '.', markersize=3)
        latency.plot(times, [r['latency'] for r in shown], '.', markersize=3, label=name)
    load.set_ylabel('arrivals a second')
    size.set_ylabel('size chosen (px)')
    latency.axhline(args.budget_ms, color='black', linestyle='--', linewidth=1)
    latency.set(ylabel='latency (ms)', xlabel='time (s)', yscale='log')
    latency.legend(loc='upper left', markerscale=3)
    for axis in (load, size, latency):
        axis.grid(alpha=0.3)
    figure.savefig(args.output.with_suffix('.png'), dpi=150)


if __name__ == '__main__':
    main()
