"""Batches and replicas on Ray: one small cluster for all tests"""
import asyncio
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import rs_model
from PIL import Image

pytest.importorskip('onnx')
pytest.importorskip('prometheus_client')
ray = pytest.importorskip('ray', reason='Ray is not installed: the extra ray')

import pyarrow as pa  # noqa: E402
import pyarrow.parquet  # noqa: E402
from ray import serve as ray_serve  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_runtime import Session, UserError, replicas  # noqa: E402
from timm_rs_runtime.cascade import softmax  # noqa: E402
from timm_rs_runtime.ray import Worker, predict  # noqa: E402
from timm_rs_runtime.replicas import Replicas, Settings, connect, serve  # noqa: E402
from timm_rs_runtime.service import UPLOAD_SECONDS  # noqa: E402

NAMES = [f'{i:02}.png' for i in range(12)]


def encoded(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 80, 3), np.uint8)).save(file, 'png')
    return file.getvalue()


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('ray') / 'm.onnx')
    export_switchable(rs_model(), path)
    return path


@pytest.fixture(scope='module')
def best(model):
    """The probability of the best class of each image at 48 px."""
    session = Session(model, 1)
    return pytest.approx({
        name: softmax(session.predict(io.BytesIO(encoded(i)), 48)[0]).max() for i, name in enumerate(NAMES)}, abs=1e-5)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Twelve images, and one that is none, in two folders."""
    folder = tmp_path_factory.mktemp('images')
    (folder / 'sub').mkdir()
    for i, name in enumerate(NAMES):
        (folder / ('sub' if i % 2 else '') / name).write_bytes(encoded(i))
    (folder / 'bad.jpg').write_text('nothing')
    return folder


@pytest.fixture(scope='module')
def cluster():
    connect(None, num_cpus=3)
    yield
    ray.shutdown()


@pytest.fixture(scope='module')
def port(cluster):
    """Where Ray Serve listens."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    ray_serve.start(proxy_location='HeadOnly', http_options=dict(port=port))
    return port


def rows_of(output):
    return pa.parquet.read_table(output).to_pylist()


def test_a_table_of_images(model, folder, best, tmp_path):
    """Without a cluster; what was done is left out, and the same table makes the same file."""
    paths = [str(folder / 'bad.jpg'), str(folder / '00.png'), str(folder / 'sub' / '01.png')]
    worker = Worker(model, str(tmp_path), {paths[2]}, ('path', None), 2, resolution=48, threads=1)
    for _ in range(2):
        assert worker(pa.table(dict(path=paths))).to_pylist() == [dict(images=2, failed=1)]
    assert [name for name in os.listdir(tmp_path) if name[0] == '_'] == [] and len(os.listdir(tmp_path)) == 1
    bad, good = rows_of(tmp_path)
    assert bad['path'] == paths[0] and 'is not an image' in bad['error'] and bad['top'] is None
    assert good['resolution'] == 48 and good['milliseconds'] > 0 and good['error'] is None
    assert len(good['top']) == 2


def test_a_folder_and_where_it_stopped(cluster, model, folder, best, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_rs_runtime.ray.ROWS', 5)
    output = str(tmp_path / 'answers')
    found = predict(str(folder), model, output, resolution=48, k=1, workers=2)
    assert (found['images'], found['failed'], found['before']) == (13, 1, 0)
    rows = {os.path.basename(row['path']): row for row in rows_of(output)}
    assert len(rows_of(output)) == len(rows) == 13 and 'is not an image' in rows.pop('bad.jpg')['error']
    assert {name: row['top'][0]['probability'] for name, row in rows.items()} == best
    first, *others = sorted(name for name in os.listdir(output) if name[0] != '_')
    lost = len(pa.parquet.read_table(os.path.join(output, first)))
    os.remove(os.path.join(output, first))  # as if it had been killed before
    found = predict(str(folder), model, output, resolution=48, k=1, workers=2)
    assert (found['images'], found['before']) == (lost, 13 - lost)
    assert sorted(row['path'] for row in rows_of(output)) == sorted({row['path'] for row in rows_of(output)})
    with pytest.raises(UserError, match='was begun with another model or other options'):
        predict(str(folder), model, output, resolution=64, k=1)


def test_bytes_in_parquet_and_in_shards(cluster, model, best, tmp_path):
    images = [*map(encoded, range(len(NAMES))), None]
    pa.parquet.write_table(pa.table(dict(
        id=[*NAMES, 'none'], image=[dict(bytes=image, path='') for image in images])), tmp_path / 'bytes.parquet')
    with tarfile.open(tmp_path / 'shard.tar', 'w') as tar:
        for name, image in zip(NAMES, images):
            for ending, content in (('png', image), ('cls', b'7')):
                info = tarfile.TarInfo(f'{name[:2]}.{ending}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for source, failed in (('bytes.parquet', 1), ('shard.tar', 0)):
        output = tmp_path / f'{source}-answers'
        found = predict(str(tmp_path / source), model, str(output), resolution=48, workers=2, columns=('id', 'image'))
        assert (found['images'], found['failed']) == (12 + failed, failed)
        rows = {row['path']: row['top'][0] for row in rows_of(output) if row['error'] is None}
        assert sorted(rows) == [name if failed else str(tmp_path / 'shard.tar' / name[:2]) for name in NAMES]
        assert {f'{os.path.basename(name)[:2]}.png': found['probability'] for name, found in rows.items()} == best


@pytest.mark.parametrize('source, output, kwargs, message', [
    ('nowhere', 'a', {}, 'nowhere does not exist'),
    ('full', 'a', {}, 'holds no images'),
    ('full', 'full', {}, 'full is not an output of `predict --ray`, and not empty'),
    ('full', 'a', dict(workers=0), 'workers is 0'),
    ('full', 'a', dict(workers=3), '3 workers need 4 cores, one to read; the cluster has 3'),
    ('full', 'a', dict(resolution=3), 'Unknown resolution 3'),
    ('named', 'a', {}, 'named holds a file whose name is not UTF-8, which Parquet needs'),
    ('table.parquet', 'a', {}, 'table.parquet has the columns image, label, expected path and bytes'),
])
def test_unusable_batches(cluster, model, tmp_path, source, output, kwargs, message):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'note.txt').write_text('x')
    (tmp_path / 'named').mkdir()
    (tmp_path / 'named' / os.fsdecode(b'caf\xe9.png')).write_bytes(encoded(0))
    pa.parquet.write_table(pa.table(dict(image=[encoded(0)], label=[3])), tmp_path / 'table.parquet')
    with pytest.raises(UserError, match=message):
        predict(str(tmp_path / source), model, str(tmp_path / output), **kwargs)


def test_a_configuration_for_serve_deploy(port, model):
    """Its import_path and args: Ray Serve's proxy, the door, a replica."""
    settings = Settings(path=model, budget_ms=20000, max_bytes=20000, k=1)
    ray_serve.run(replicas.app(settings), name='configured', route_prefix='/')
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    try:
        for method, path, body, status, key in (
                ('POST', '/predict', encoded(0), 200, 'top'), ('POST', '/predict', b'text', 422, 'error'),
                ('POST', '/predict', bytes(20001), 413, 'error'), ('GET', '/predict', None, 405, 'error'),
                ('GET', '/healthz', None, 200, 'replicas')):
            connection.request(method, path, body)
            response = connection.getresponse()
            assert (response.status, next(iter(json.load(response)))) == (status, key)
    finally:
        ray_serve.delete('configured')


def test_a_service_leaves_nothing_in_the_cluster(port, model):
    """It ends although an upload stalls, before that is given up."""
    command = [
        sys.executable, '-m', 'timm_rs_runtime', 'serve', model, '--budget-ms', '2000', '--port', str(port + 1),
        '--ray', ray.get_runtime_context().gcs_address]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() and list(ray_serve.status().applications)
        stalled = http.client.HTTPConnection('127.0.0.1', port + 1)
        stalled.putrequest('POST', '/predict')
        stalled.putheader('Content-Length', '1000')
        stalled.endheaders(b'begun')
        start = time.perf_counter()
        process.terminate()
        assert process.wait(60) == 0 and time.perf_counter() - start < UPLOAD_SECONDS
    assert not ray_serve.status().applications


def test_a_replica_that_is_killed_and_one_that_is_replaced(port, model):
    """Every request has its answer or error within the budget; the new replica is there before the old one ends."""
    budget_ms = 20000.
    application = replicas._replicas(Settings(path=model, budget_ms=budget_ms))
    handle = replicas._deploy('test', application)

    async def ask(door, seconds=0.):
        found, end = [await door.predict(encoded(0), budget_ms)], time.perf_counter() + seconds
        while time.perf_counter() < end:
            found.append(await door.predict(encoded(0), budget_ms))
        return found

    async def check():
        door = Replicas(handle)
        assert [status for status, _ in await ask(door)] == [200]
        ((name, stats),) = (await door.stats()).items()
        assert sum(stats['requests'].values()) == 1
        running = asyncio.create_task(ask(door, 1.))
        await asyncio.sleep(0.2)
        os.kill(int(name.rpartition('-')[2]), signal.SIGKILL)
        assert {status for status, _ in await running} == {200}
        update = asyncio.get_running_loop().run_in_executor(None, replicas._deploy, 'test', application)
        found = []
        while not update.done():
            found += await ask(door)
        assert {status for status, _ in found + await ask(door)} == {200}
        assert name not in await door.stats()

    try:
        asyncio.run(check())
    finally:
        ray_serve.delete('test')


class Handle:
    """Answers by a function, as Ray Serve's handles do."""

    def __init__(self, answer):
        self.answer, self.predict = answer, self

    def remote(self, content, budget_ms):
        task = asyncio.ensure_future(self.answer(budget_ms))
        return task


def test_a_request_whose_replica_dies_goes_to_another_one():
    calls = []

    async def answer(budget_ms):
        calls.append(budget_ms)
        if len(calls) < 3:
            raise RayActorError()
        return 200, dict(milliseconds=1.)

    status, _ = asyncio.run(Replicas(Handle(answer)).predict(b'', 1000.))
    assert status == 200 and 1000 > calls[0] > calls[1] > calls[2] > 900


def test_no_answer_in_time():
    async def answer(budget_ms):
        await asyncio.sleep(60)

    start = time.perf_counter()
    status, content = asyncio.run(Replicas(Handle(answer)).predict(b'', 50.))
    assert status == 503 and content['retry_after'] == 1 and time.perf_counter() - start < 5


def test_the_window(monkeypatch):
    """It begins with what a replica holds; a refusal takes a fifth, answers in a full window bring it back."""
    monkeypatch.setattr(replicas, 'MAX_ONGOING', 8)
    refused = False

    async def answer(budget_ms):
        await asyncio.sleep(0.01)
        return (503, dict(error='', retry_after=1.)) if refused else (200, dict(milliseconds=1.))

    async def ask(door, count):
        return [status for status, _ in await asyncio.gather(*(door.predict(b'', 60000.) for _ in range(count)))]

    async def check():
        nonlocal refused
        door = Replicas(Handle(answer))
        assert (await ask(door, 10)).count(503) == 2
        refused = True
        assert await ask(door, 4) == [503] * 4
        refused = False
        assert (await ask(door, 10)).count(503) in (2, 3)  # 6.4, once in a budget, and what the answers bring
        for _ in range(10):
            await ask(door, 8)
        assert await ask(door, 8) == [200] * 8

    asyncio.run(check())


def test_ray_that_does_not_start(monkeypatch):
    def init(*_, **__):
        raise Exception('The current node timed out during startup.')  # as Ray does on a busy machine

    monkeypatch.setattr(replicas.ray, 'init', init)
    for name in ('RAY_worker_niceness', 'RAY_AUTH_TOKEN'):  # connect would set them for the other tests too
        monkeypatch.setenv(name, '0')
    with pytest.raises(UserError, match='Ray does not start: The current node timed out during startup.'):
        connect(None, num_cpus=1)


def test_unusable_services(model, tmp_path):
    features = tmp_path / 'features.onnx'
    export_switchable(rs_model(num_classes=0), str(features))
    with pytest.raises(UserError, match='No Ray cluster answers at 127.0.0.1:1: '):
        connect('127.0.0.1:1')
    for values, message in (
            (dict(replicas=0), 'replicas is 0'), (dict(min_replicas=2), 'min_replicas is 2'),
            (dict(max_bytes=0), 'max_bytes is 0'), (dict(path=f'{model}.none'), 'm.onnx.none'),
            (dict(path=str(features)), 'features.onnx has no classes, expected a classifier'),
            (dict(budget_ms=1e-3), 'The smallest size of .* takes .* ms here')):
        settings = Settings(**dict(dict(path=model, budget_ms=1000.), **values))
        for start in (serve, replicas.app):
            with pytest.raises(UserError, match=message):
                start(settings)
    for kwargs, message in (
            (dict(port=0), 'port is 0'), (dict(host='192.0.2.77'), 'Cannot listen at 192.0.2.77, port 8000')):
        with pytest.raises(UserError, match=message):
            serve(Settings(path=model, budget_ms=1000.), **kwargs)
