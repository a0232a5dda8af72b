#!/usr/bin/env python3
"""Serving: which size a request gets, by five rules, under four loads, with one and two replicas

Photographs of --data-dir are as they are or enlarged to a shorter side of 500, 1000 and 2000 px (shares 4 : 3 : 2 : 1).
Their decoding and inference are measured in CPU time of one thread, each image at each size, twice, the shorter time
counts. The queue in front of a replica is simulated on these costs with timm_rs_runtime's Controller and ReadingTime,
so that other programs do not count and a run can be repeated. A request goes to the replica with the shortest line and
has --budget-ms; 256 may wait.

- largest, smallest: one size.
- slackfit: the largest size that the time left of the first in line allows, after SuperServe (arXiv 2312.16733),
  without its batches.
- adaptive: AdaptiveSession as it is by default; what is late is served late.
- refusing: AdaptiveSession(refuse_late=True), as in timm-rs serve.

Loads, in parts of what the largest size carries, n: 3 seeds of --seconds each: steady, Poisson at 1.2; bursts, a
Poisson process of two states, 0.4 and 2.0, that last 5 s in the mean (Markov-modulated); flood, the same with 0.4 and
6.0, more than the smallest size carries; day, Poisson from 0.2 to 1.8 and back over the seconds. With --trace instead,
the times in the first column of a table, all divided by one number, so that their mean rate is what the largest size
carries; the seeds choose the images. `bound` is the most that any rule can reach: in each second the best mixture of
sizes whose mean time fits.

Wanted: refusing has at least 99 % in time where the largest size has at most 60 %, and what is right in time is above
that of adaptive, or near the bound.

    python benchmarks/serving.py --model FILE.onnx --data-dir DIR
"""
import collections
import heapq
import io
import itertools
import time
from pathlib import Path

import numpy as np
from _common import add_deployed_arguments, create_parser, write_results
from PIL import Image

from timm_rs_runtime import Controller, Session
from timm_rs_runtime.adaptive import measure_reading
from timm_rs_runtime.controller import ReadingTime
from timm_rs_runtime.fitting import label_folders
from timm_rs_runtime.images import open_image, split_folder, work_of

POLICIES = ('largest', 'smallest', 'slackfit', 'adaptive', 'refusing')
SIDES = (0, 0, 0, 0, 500, 500, 500, 1000, 1000, 2000)
LOADS = ('steady', 'bursts', 'flood', 'day')
SEEDS = 3
MOST_WAITING = 256
Request = collections.namedtuple('Request', 'arrival image deadline')


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    add = parser.add_argument
    add('--budget-ms', type=float, default=200., metavar='T')
    add('--seconds', type=float, default=60., metavar='T', help='simulated for each seed (default: %(default)s)')
    add('--trace', nargs='+', metavar='FILE.csv', help='times of requests, instead of the loads')
    args = parser.parse_args()
    write_results(args, measure(args))


def photographs(args, session):
    """Return the bytes of images of mixed sizes, and their classes."""
    paths, labels = label_folders(split_folder(args.data_dir, args.split), session, args.most)
    contents = []
    for path, side in zip(paths, itertools.cycle(SIDES)):
        if not side:
            contents.append(Path(path).read_bytes())
            continue
        image, file = open_image(path), io.BytesIO()
        scale = side / min(image.size)
        image.resize([round(scale * s) for s in image.size], Image.Resampling.BICUBIC).save(file, 'JPEG', quality=90)
        contents.append(file.getvalue())
    return contents, labels


class Costs:
    """Seconds of CPU and right answers of each image at each size [images, sizes], and what a session expects."""

    def __init__(self, args):
        session = Session(args.model, 1)
        contents, labels = photographs(args, session)
        self.resolutions = session.resolutions
        needs = list(map(session.preprocessing.needed, self.resolutions))
        self.works = [work_of(content, needs) for content in contents]
        self.prices = measure_reading(clock=time.process_time)
        found = []
        for content, label in zip(contents, labels):
            for resolution in self.resolutions:
                times = []
                for _ in range(2):
                    start = time.process_time()
                    image = session.read(content, resolution)
                    opened = time.process_time()
                    logits = session.predict(session.preprocess(image, resolution)[None])
                    times.append((opened - start, time.process_time() - opened))
                found.append((*np.min(times, 0), logits.argmax() == label))
        self.reading, self.network, self.right = np.array(found).reshape(len(contents), -1, 3).transpose(2, 0, 1)
        self.total = self.reading + self.network
        self.rate = 1 / self.total[:, 0].mean()  # that the largest size carries


class Replica:
    """A line and the rule that serves it."""

    def __init__(self, policy, costs):
        self.policy, self.costs = policy, costs
        self.controller = Controller(dict(zip(costs.resolutions, np.median(costs.network, 0).tolist())))
        self.reading = ReadingTime(*costs.prices)
        self.line = collections.deque()
        self.end = 0.  # of the request that is served

    def outlook(self, line, now):
        return [r.deadline - now for r, _ in line], [1] * len(line), [reading for _, reading in line]

    def admit(self, request, now):
        """Put a request in line; return False if it is refused."""
        kind, size, pixels = self.costs.works[request.image]
        entry = request, self.reading.expected(kind, self.reading.prices(size, pixels))
        if self.policy == 'refusing' and (self.line or self.end > now):
            left, counts, reading = self.outlook([*self.line, entry], now)
            busy = [max(self.end - now, 0.)] * len(self.costs.resolutions)
            if self.controller.lateness([np.inf, *left], [0, *counts], [busy, *reading]) > 0:
                return False
        if len(self.line) == MOST_WAITING:
            return False
        self.line.append(entry)
        return True

    def choose(self, now):
        """Return the index of the size for the first in line."""
        if self.policy in ('largest', 'smallest'):
            return 0 if self.policy == 'largest' else -1
        if self.policy == 'slackfit':
            return self.costs.resolutions.index(self.controller.largest(*self.outlook([self.line[0]], now)))
        return self.costs.resolutions.index(self.controller.choose(*self.outlook(self.line, now)))

    def learn(self, image, size):
        kind, length, pixels = self.costs.works[image]
        self.reading.observe(kind, self.reading.prices(length, pixels)[size], self.costs.reading[image, size])
        self.controller.observe(self.costs.resolutions[size], self.costs.network[image, size], 0.)


def simulate(policy, arrivals, costs, replicas, budget):
    """Return for each request (arrival, latency or inf, size or None, right)."""
    found, events = [], [(r.arrival, i, None, r) for i, r in enumerate(arrivals)]
    pool = [Replica(policy, costs) for _ in range(replicas)]
    number = itertools.count(len(events))
    while events:
        now, _, replica, request = heapq.heappop(events)
        if replica is None:
            replica = min(pool, key=lambda p: len(p.line) + (p.end > now))
            if not replica.admit(request, now):
                found.append((request.arrival, np.inf, None, False))
        while replica.line and replica.end <= now:
            size, entry = replica.choose(now), replica.line.popleft()
            first = entry[0]
            if policy == 'refusing' and replica.line and replica.controller.lateness(
                    *replica.outlook([entry], now)) > 0:
                found.append((first.arrival, np.inf, None, False))
                continue
            replica.end = now + costs.total[first.image, size]
            replica.learn(first.image, size)
            found.append((first.arrival, replica.end - first.arrival, costs.resolutions[size],
                          bool(costs.right[first.image, size])))
            heapq.heappush(events, (replica.end, next(number), replica, None))
    return sorted(found, key=lambda row: row[0])


def replayed(path, rate):
    """Return the times of a trace in which `rate` requests come in a second in the mean."""
    times = np.loadtxt(path, 'datetime64[ns]', delimiter=',', skiprows=1, usecols=0)
    times = np.sort((times - times.min()) / np.timedelta64(1, 's'))
    return times * (len(times) / rate / times[-1])


def drawn(load, rate, seconds, random):
    """Return times of requests; `rate` a second is all that the largest size carries."""
    ends, levels = np.array([seconds]), [1.2]
    if load == 'day':
        ends = np.arange(1, seconds + 1)
        levels = 1 - 0.8 * np.cos(2 * np.pi * (ends - 0.5) / seconds)
    elif load in ('bursts', 'flood'):
        ends = random.exponential(5, 1 + int(seconds)).cumsum()  # more than last that long
        levels = np.resize((0.4, 2. if load == 'bursts' else 6.), len(ends))
    ends = ends.clip(max=seconds)
    lengths = np.diff(ends, prepend=0.)
    counts = random.poisson(rate * np.array(levels) * lengths)
    return np.sort(np.repeat(ends, counts) - np.repeat(lengths, counts) * random.random(counts.sum()))


def bound_of(arrivals, costs, replicas):
    """Return the most requests in a hundred that can be right in time."""
    times, right = costs.total.mean(0), costs.right.mean(0)
    counts = np.bincount([int(r.arrival) for r in arrivals])
    total = 0.
    for count in counts[counts > 0]:
        time_each = replicas / count
        mixed = [min(time_each / times[-1], 1) * right[-1]]
        for a, b in itertools.combinations(range(len(times)), 2):  # a is the larger size
            if times[b] <= time_each:
                share = min((time_each - times[b]) / (times[a] - times[b]), 1)
                mixed.append(share * right[a] + (1 - share) * right[b])
        total += count * max(mixed)
    return 100 * total / counts.sum()


def measure(args):
    costs, budget, rows, shown = Costs(args), args.budget_ms / 1e3, [], {}
    means = {r: round(1e3 * float(t), 2) for r, t in zip(costs.resolutions, costs.total.mean(0))}
    print(f'ms of an image: {means}', flush=True)
    for load, replicas in itertools.product(args.trace or LOADS, (1, 2)):
        rate, images = replicas * costs.rate, len(costs.right)
        traces = []
        for random in map(np.random.default_rng, range(SEEDS)):
            times = replayed(load, rate) if args.trace else drawn(load, rate, args.seconds, random)
            chosen = random.integers(images, size=len(times)).tolist()
            traces.append([Request(time, image, time + budget) for time, image in zip(times.tolist(), chosen)])
        bound = float(np.mean([bound_of(trace, costs, replicas) for trace in traces]))
        for policy in POLICIES:
            runs = [simulate(policy, trace, costs, replicas, budget) for trace in traces]
            if load in ('bursts', *(args.trace or ())) and replicas == 1:
                shown[policy] = runs[0]
            rows.append(dict(
                load=load, replicas=replicas, policy=policy, **summarize(runs, budget), bound=round(bound, 1)))
    right = costs.right.mean(0)
    rows += [dict(load='none', policy=f'{r} px', cpu_ms=means[r], right_in_time=round(100 * float(share), 1))
             for r, share in zip(costs.resolutions, right)]
    plot(shown, args)
    return rows


def summarize(runs, budget):
    rows = [row for run in runs for row in run]
    latency = np.array([row[1] for row in rows])
    answered, in_time = np.isfinite(latency), latency <= budget
    right = np.array([row[3] for row in rows])
    by_run = [100 * np.mean([row[3] and row[1] <= budget for row in run]) for run in runs]
    return dict(
        requests=len(rows),
        in_time=round(100 * float(in_time.mean()), 2),
        refused=round(100 * float(1 - answered.mean()), 2),
        right_of_in_time=round(100 * float(right[in_time].mean()), 1) if in_time.any() else 0.,
        right_in_time=round(float(np.mean(by_run)), 1),
        range=[round(float(min(by_run)), 1), round(float(max(by_run)), 1)],
        p50_ms=round(1e3 * float(np.median(latency[answered])), 1),
        p99_ms=round(1e3 * float(np.percentile(latency[answered], 99)), 1),
        mean_size=round(float(np.mean([row[2] for row in rows if row[2]])), 1),
    )


def plot(runs, args):
    """Draw arrivals, chosen size and right answers in time over the first minute of bursts."""
    from matplotlib.figure import Figure

    edges = np.arange(0, min(args.seconds, 60.) + 1)
    figure = Figure(figsize=(8, 7), layout='constrained')
    load, size, right = figure.subplots(3, 1, sharex=True)

    def mean(times, values):
        count = np.histogram(times, edges)[0].clip(1)
        return edges[:-1] + 0.5, np.histogram(times, edges, weights=values)[0] / count

    for policy, run in runs.items():
        times = [row[0] for row in run]
        line = dict(label=policy, linestyle='--' if policy == 'refusing' else '-')  # it often lies on adaptive
        if policy == 'largest':
            load.stairs(np.histogram(times, edges)[0], edges, color='black')
        size.plot(*mean(*zip(*((row[0], row[2]) for row in run if row[2]))), **line)
        right.plot(*mean(times, [100. * (row[3] and row[1] <= args.budget_ms / 1e3) for row in run]), **line)
    load.set_ylabel('arrivals a second')
    size.set_ylabel('mean size (px)')
    right.set(ylabel='right in time (%)', xlabel='time (s)')
    figure.legend(*size.get_legend_handles_labels(), loc='outside upper center', ncols=len(runs))
    for axis in (load, size, right):
        axis.grid(alpha=0.3)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output.with_suffix('.png'), dpi=150)


if __name__ == '__main__':
    main()
