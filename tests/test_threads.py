"""One switch per network and thread, and per process"""
import copy
import multiprocessing
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.fx
from conftest import RESOLUTIONS, assert_equal, gradients, images, randomize_bn, rs_model, small_net

from timm_rs import PrivateBN, make_switchable


def at_once(function, jobs, threads=4):
    """Return the results of jobs that many threads take in turns, all of them more than once."""
    barrier = Barrier(threads)

    def work(mine):
        barrier.wait()
        with torch.no_grad():
            return [function(*job) for job in mine]

    shares = [jobs[i::threads] for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(work, shares))
    return [results[i % threads][i // threads] for i in range(len(jobs))]


@pytest.fixture
def fast_turns():
    """Let threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def random_jobs(count, sizes):
    generator = random.Random(0)
    return [generator.choice(sizes) for _ in range(count)]


def test_threads_side_by_side(fast_turns):
    model = rs_model()
    jobs = [(model.at(r), images(r)) for r in random_jobs(40, RESOLUTIONS)]
    with torch.no_grad():
        serial = [m(x) for m, x in jobs]
    assert_equal(at_once(lambda m, x: m(x), jobs), serial)


@pytest.mark.filterwarnings('ignore:.*no BatchNorm for')
@pytest.mark.parametrize('compiled', [False, True])
def test_threads_share_a_network(fast_turns, compiled):
    """At trained sizes, between them, and in lists, whatever the other threads run."""
    model = randomize_bn(make_switchable(small_net(), RESOLUTIONS)).eval() if compiled else rs_model()
    jobs = [(images(s),) for s in random_jobs(100, RESOLUTIONS if compiled else (*RESOLUTIONS, 56, 40))]
    jobs += [(images(*random.Random(i).sample(RESOLUTIONS, 2)),) for i in range(0 if compiled else 20)]
    if compiled:
        torch.compiler.reset()
        model = torch.compile(model, backend='eager')
    with torch.no_grad():
        serial = [model(x) for x, in jobs]
    assert_equal(at_once(model, jobs), serial)


def test_threads_choose_for_themselves(fast_turns):
    model = rs_model()

    def features(r, x):
        model.switch_to(r)
        return model.forward_features(x)

    jobs = [(r, images(64)) for r in random_jobs(40, RESOLUTIONS)]
    expected = [model.at(r).forward_features(x) for r, x in jobs]
    model.switch_to(32)
    assert_equal(at_once(features, jobs), expected)
    assert model.resolution == 32


def test_a_thread_that_has_not_chosen_takes_what_was_switched_to():
    model = rs_model()

    def elsewhere(function):
        return pool.submit(function).result()

    with ThreadPoolExecutor(1) as pool:
        for r in (48, 32, 64):
            model.switch_to(r)
            assert elsewhere(lambda: model.resolution) == r
        model(images(48))
        assert (model.resolution, elsewhere(lambda: model.resolution)) == (48, 64)
        elsewhere(lambda: model(images(32)))
        assert (model.resolution, elsewhere(lambda: model.resolution)) == (48, 32)


def replicate(model, count):
    """Do on the CPU what torch.nn.parallel.replicate does on GPUs."""
    modules = list(model.modules())
    copies = [[m._replicate_for_data_parallel() for m in modules] for _ in range(count)]
    for made in copies:
        places = dict(zip(modules, made))
        for module, replica in places.items():
            for name, child in module._modules.items():
                setattr(replica, name, places[child])
            for name, tensor in module._parameters.items():
                setattr(replica, name, tensor)
    return [made[0] for made in copies]


def test_replicas_of_data_parallel(fast_turns):
    model = rs_model()
    replicas, sizes = replicate(model, 2), random_jobs(80, RESOLUTIONS)
    jobs = [(replica, images(s)) for s in sizes for replica in replicas]
    with torch.no_grad():
        expected = [model(x) for _, x in jobs]
    model.switch_to(48)
    assert_equal(at_once(lambda replica, x: replica(x), jobs, threads=2), expected)
    pyramids = [(replica, images(*RESOLUTIONS)) for replica in replicas * 5]
    expected = [[model.at(r)(x) for r, x in zip(RESOLUTIONS, pyramid)] for _, pyramid in pyramids]
    assert_equal(at_once(lambda replica, x: replica(x), pyramids, threads=2), expected)
    assert model.resolution == 48


@pytest.mark.parametrize('how', ['set_grad_checkpointing', 'set_resolution_checkpointing'])
def test_threads_that_recompute(fast_turns, how):
    """Each its own network, as DataParallel's replicas are, and all of them the same layers."""
    model, other = (rs_model().train() for _ in range(2))
    other.load_state_dict(model.state_dict())
    getattr(other, how)()
    pyramid = images(*RESOLUTIONS)

    def train(net):
        with torch.enable_grad():
            sum(z.square().mean() * (i + 1) for i, z in enumerate(net(pyramid))).backward()

    train(model)
    at_once(train, [(replica,) for replica in replicate(other, 2)], threads=2)
    for p in gradients(other).values():
        p.div_(2)
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-4, atol=1e-6)


def test_a_shallow_copy_switches_on_its_own():
    model = rs_model()
    model.switch_to(48)
    other = copy.copy(model)
    assert type(other) is type(model) and other.resolution == 48
    assert all(a is b for a, b in zip(model.parameters(), other.parameters()))
    other.switch_to(32)
    assert {m.resolution for m in other.modules() if isinstance(m, PrivateBN)} == {32} and model.resolution == 48
    assert_equal(other.forward_features(images(64)).shape, model.forward_features(images(64)).shape)
    x = images(64)
    assert_equal(other.forward_features(x), model.at(32).forward_features(x))
    assert_equal(model.forward_features(x), model.at(48).forward_features(x))


def test_a_forked_process_switches_on_its_own():
    model = rs_model()
    model.switch_to(48)
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()

    def switch():
        before = model.resolution
        model.switch_to(32)
        queue.put((before, model.resolution))

    process = context.Process(target=switch)
    process.start()
    assert queue.get() == (48, 32) and model.resolution == 48
    process.join()
