"""The HTTP service, without the cluster behind it: uploads, errors in JSON, refusals, limits and metrics"""
import asyncio
import io

import numpy as np
import pytest
from conftest import rs_model
from PIL import Image

pytest.importorskip('onnx')
pytest.importorskip('fastapi')
pytest.importorskip('prometheus_client')

from fastapi.testclient import TestClient  # noqa: E402
from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_runtime import Session, service  # noqa: E402
from timm_rs_runtime.metrics import Collector  # noqa: E402
from timm_rs_runtime.service import Replica, create_app  # noqa: E402

BUDGET_MS = 60000.


def encoded(width=80, height=70, form='jpeg'):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(file, form)
    return file.getvalue()


@pytest.fixture(scope='module')
def replica(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('service') / 'm.onnx')
    export_switchable(rs_model(), path)
    return Replica(path, BUDGET_MS, k=2, max_pixels=80 * 70, threads=1)


def app_of(predict, **options):
    async def stats():
        return {}

    return create_app(predict, stats, BUDGET_MS, **options)


@pytest.fixture(scope='module')
def client(replica):
    async def stats():
        return dict([await replica.stats()])

    with TestClient(create_app(replica.predict, stats, BUDGET_MS, max_bytes=20000)) as client:
        yield client


@pytest.mark.parametrize('upload', [
    dict(content=encoded()),
    dict(content=encoded(), headers={'Content-Type': 'image/jpeg'}),
    dict(content=encoded(), headers={'Content-Type': 'application/x-www-form-urlencoded'}),  # curl --data-binary
    dict(files=dict(image=('photo.jpg', encoded()))),
    dict(files=dict(photo=encoded()), data=dict(note='x')),
])
def test_answers_an_image(client, replica, upload):
    found = client.post('/predict', **upload)
    assert found.status_code == 200
    content = found.json()
    logits = Session(replica.session.session.path, 1).predict(encoded(), 64)[0]
    assert [best['class'] for best in content['top']] == np.argsort(-logits)[:2].tolist()
    assert content['resolution'] == 64 and 0 < content['milliseconds'] < BUDGET_MS and content['in_time'] is True


@pytest.mark.parametrize('method, url, upload, status, message', [
    ('GET', '/predict', {}, 405, 'Method Not Allowed'),
    ('GET', '/nothing', {}, 404, 'Not Found'),
    ('POST', '/predict', dict(content=b''), 422, 'The image is not an image'),
    ('POST', '/predict', dict(content=b'text'), 422, 'The image is not an image, expected one of JPEG'),
    ('POST', '/predict', dict(content=encoded()[:900]), 422, 'cannot be read as an image'),
    ('POST', '/predict', dict(content=encoded(81, 70)), 413, 'is 81x70, expected at most 5,600 pixels'),
    ('POST', '/predict', dict(content=bytes(20001)), 413, 'larger than 20,000 bytes'),
    ('POST', '/predict', dict(content=iter([bytes(15000)] * 2)), 413, 'larger than 20,000 bytes'),
    ('POST', '/predict', dict(data=dict(a='b'), files=dict(c=(None, 'd'))), 400, 'The form holds no file'),
    ('POST', '/predict', dict(files=[('a', encoded()), ('b', encoded())]), 400, 'Too many files'),
    ('POST', '/predict', dict(content=b'x', headers={'Content-Type': 'multipart/form-data'}), 400, 'boundary'),
    ('POST', '/predict', dict(content=b'x', headers={'Content-Type': 'multipart/form-data; boundary=y'}), 400, ''),
    ('POST', '/predict?budget_ms=nan', {}, 422, 'query.budget_ms'),
    ('POST', '/predict?budget_ms=0', {}, 422, 'greater than 0'),
    ('POST', '/predict?budget_ms=60001', {}, 422, 'less than or equal to 60000'),
    ('POST', '/predict?budget_ms=x', {}, 422, 'valid number'),
])
def test_every_error_is_one_line_of_json(client, method, url, upload, status, message):
    found = client.request(method, url, **upload)
    assert found.status_code == status and found.headers['Content-Type'] == 'application/json'
    (error,) = found.json().values()
    assert list(found.json()) == ['error'] and message in error and '\n' not in error
    assert client.post('/predict', content=encoded()).status_code == 200  # the next one is served


def test_a_refusal_says_when_to_come_back():
    async def predict(content, budget_ms):
        return 503, dict(error='Later.', retry_after=1.2)

    found = TestClient(app_of(predict)).post('/predict', content=b'x')
    assert (found.status_code, found.json(), found.headers['Retry-After']) == (503, {'error': 'Later.'}, '2')


def test_a_bug_is_an_error_in_json_too():
    async def predict(content, budget_ms):
        return 1 / 0

    found = TestClient(app_of(predict), raise_server_exceptions=False).post('/predict', content=b'x')
    assert (found.status_code, found.json()) == (500, {'error': 'This is a bug of the service.'})


def test_the_budget_of_a_request(replica):
    budgets = []

    async def predict(content, budget_ms):
        budgets.append(budget_ms)
        return await replica.predict(content, budget_ms)

    client = TestClient(app_of(predict))
    for query in ('', '?budget_ms=50000'):
        client.post(f'/predict{query}', content=encoded())
    assert 59000 < budgets[0] <= 60000 and 49000 < budgets[1] <= 50000


def test_a_budget_that_is_over_at_once():
    found = TestClient(app_of(never)).post('/predict?budget_ms=1e-9', content=b'x')
    assert found.status_code == 503 and found.headers['Retry-After'] == '1'


def test_a_budget_that_no_size_keeps_is_not_asked_for_again(replica, monkeypatch):
    """422 if the budget of the request is too small for its image, 503 if only what the upload left of it is."""
    monkeypatch.setattr(replica.session, 'latency', dict.fromkeys(replica.session.latency, 10.))
    monkeypatch.setattr(replica.session._controller, 'lateness', lambda *_: 7.)
    monkeypatch.setattr(replica.session, '_next_trial', float('inf'))
    assert replica.answer(encoded(), 9000.)[0] == 422
    for budget_ms, status in ((9000, 422), (10500, 503)):
        async def predict(content, _):
            return replica.answer(content, 9000.)

        found = TestClient(app_of(predict)).post(f'/predict?budget_ms={budget_ms}', content=encoded())
        assert found.status_code == status and list(found.json()) == ['error']
        assert ('Retry-After' in found.headers) == (status == 503)


def test_a_replica_that_is_full(replica, monkeypatch):
    monkeypatch.setattr(replica.session._controller, 'lateness', lambda *_: 7.)
    monkeypatch.setattr(replica.session, '_next_trial', float('inf'))
    status, content = replica.answer(encoded(), 1000.)
    assert (status, content['retry_after']) == (503, 7.) and 'try again later' in content['error']


def upload(app, receive, headers=()):
    """Return the status and the headers that a client gets whose messages come from `receive`."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = dict(
        type='http', asgi={'version': '3.0'}, http_version='1.1', method='POST', path='/predict', raw_path=b'/predict',
        query_string=b'', root_path='', scheme='http', client=('127.0.0.1', 1), server=('127.0.0.1', 2),
        headers=list(headers))
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    return sent[0]['status'], dict(sent[0]['headers'])


async def never(content, budget_ms):
    raise AssertionError('was asked')


def test_a_slow_upload_is_given_up():
    async def receive():
        await asyncio.sleep(60)

    status, headers = upload(app_of(never, upload_seconds=0.05), receive)
    assert status == 408 and headers[b'connection'] == b'close'


def test_an_upload_that_is_cut_short():
    messages = iter([dict(type='http.request', body=b'abc', more_body=True), dict(type='http.disconnect')])

    async def receive():
        return next(messages)

    assert upload(app_of(never), receive)[0] == 400


def test_a_length_that_is_too_large_is_refused_at_once():
    async def receive():
        raise AssertionError('was read')

    status, headers = upload(app_of(never), receive, [(b'content-length', b'99999999')])
    assert status == 413 and headers[b'connection'] == b'close'


def test_uploads_together_are_limited(monkeypatch):
    monkeypatch.setattr(service, 'MAX_HELD', 1000)
    client = TestClient(app_of(never))
    for _ in range(2):  # what was held is given back
        found = client.post('/predict', content=bytes(1001))
        assert found.status_code == 503 and found.headers['Retry-After'] == '1'


def test_health_and_metrics(client, replica):
    client.post('/predict', content=encoded())
    client.post('/predict', content=b'text')
    client.post('/predict', content=bytes(20001))
    client.post('/predict', data=dict(a='b'), files=dict(c=(None, 'd')))
    assert client.get('/healthz').json() == {'replicas': 1}
    lines = client.get('/metrics').text.splitlines()
    (session, stats) = asyncio.run(replica.stats())
    assert f'timm_rs_requests_total{{resolution="48",session="{session}"}} 0.0' in lines
    assert f'timm_rs_failed_total{{session="{session}"}} {float(stats["failed"])}' in lines
    assert f'timm_rs_budget_seconds{{session="{session}"}} 60.0' in lines
    for status in (200, 400, 413, 422):
        assert any(line.startswith(f'timm_rs_answer_seconds_count{{status="{status}"}}') for line in lines)
    found = TestClient(app_of(never)).get('/healthz')
    assert (found.status_code, found.json()) == (503, {'error': 'No replica answers.'})


def test_metrics_of_a_session_in_this_process():
    registry = CollectorRegistry()
    by_size = {224: 2, 96: 1}
    registry.register(Collector(lambda: {'here': dict(
        requests=by_size, misses=1, rejected=2, failed=3, queue=4, resolution=96, slowdown=1.5, reading_ms=2000.,
        network_ms=3000., expected_reading_ms=by_size, expected_ms=by_size, budget_ms=20, feasible=True)}))
    lines = generate_latest(registry).decode().splitlines()
    for line in ('# TYPE timm_rs_requests_total counter', 'timm_rs_requests_total{resolution="224",session="here"} 2.0',
                 'timm_rs_deadline_misses_total{session="here"} 1.0', 'timm_rs_queue_length{session="here"} 4.0',
                 'timm_rs_budget_seconds{session="here"} 0.02', 'timm_rs_reading_seconds_total{session="here"} 2.0',
                 'timm_rs_expected_seconds{resolution="96",session="here"} 0.001'):
        assert line in lines, line


def test_the_description(client):
    found = client.get('/openapi.json').json()
    assert set(found['paths']) == {'/predict', '/healthz', '/metrics'}
    predict = found['paths']['/predict']['post']
    assert {'200', '400', '408', '413', '422', '500', '503'} <= set(predict['responses'])
    assert 'multipart/form-data' in predict['requestBody']['content']
