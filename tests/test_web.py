"""The local web page: what it computes, what its server answers, and what a browser shows"""
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import break_size, rs_model
from PIL import Image

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export.export import export_switchable  # noqa: E402
from timm_rs_cli import main  # noqa: E402
from timm_rs_runtime import ImageError, Session  # noqa: E402
from timm_rs_runtime.cascade import softmax  # noqa: E402
from timm_rs_runtime.web import answer_all, build_app, choose, serve  # noqa: E402

SIZES = (64, 48, 32)


@pytest.fixture(scope='module')
def session(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('web') / 'all.onnx')
    export_switchable(
        rs_model('resnet10t', channels=[8, 8, 16, 16], stem_width=8), path, [f'class {i}' for i in range(10)])
    return Session(path, threads=1)


@pytest.fixture(scope='module')
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp('photograph') / 'a.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope='module')
def page(session):
    """Return the address of the page, served by Gradio."""
    pytest.importorskip('gradio')
    app, address = serve(session, block=False)
    yield address
    app.close()


def expected(session, photograph):
    """Return size, share of the cost, the five best classes and their probabilities, as the page shows them."""
    rows = []
    for r in SIZES:
        p = softmax(session.predict(photograph, r)[0])
        best = [text for i in np.argsort(-p)[:5] for text in (f'class {i}', f'{p[i]:.1%}')]
        rows.append((f'{r}', f'{session.madds[r] / session.madds[64]:.0%}', best))
    return rows


def shown(html):
    """Return the same of the page's HTML."""
    cards = re.findall(r'<section.*?</section>', html)
    return [(re.search(r'(\d+) px', card)[1], re.search(r'(\d+%)</small>', card)[1],
             [text for text in re.findall(r'<td>([^<]+)</td>', card)]) for card in cards]


# Without Gradio

def test_answers_at_every_size(session, photograph):
    milliseconds = {64: 5., 48: 3., 32: 2.}
    rows = answer_all(session, photograph, milliseconds)
    assert [row['resolution'] for row in rows] == list(SIZES)
    assert rows[0]['cost'] == 1 and rows[2]['madds'] == session.madds[32]
    for row in rows:
        p = softmax(session.predict(photograph, row['resolution'])[0])
        assert [best['class'] for best in row['top']] == np.argsort(-p)[:5].tolist()
        assert row['top'][0]['probability'] == pytest.approx(p.max(), abs=1e-6)
        assert row['milliseconds'] == milliseconds[row['resolution']]
    with pytest.raises(ImageError, match='nowhere.jpg does not exist'):
        answer_all(session, 'nowhere.jpg', milliseconds)


@pytest.mark.parametrize('budget, resolution, fits', [(20, 64, True), (19, 48, True), (5, 32, True), (4, 32, False)])
def test_choice_of_a_budget(budget, resolution, fits):
    rows = [dict(resolution=r, milliseconds=ms) for r, ms in ((64, 20), (48, 10), (32, 5))]
    assert choose(rows, budget) == (rows[SIZES.index(resolution)], fits)


def test_gradio_is_asked_for(session, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gradio', None)
    with pytest.raises(ImportError, match='Gradio: pip install gradio'):
        build_app(session)


def test_command_refuses_other_files(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(['demo', str(tmp_path / 'nowhere.onnx')])
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 1 and line.startswith('timm-rs demo: error: ') and 'nowhere.onnx does not exist' in line


# Over HTTP

@pytest.fixture(scope='module')
def client(page):
    return pytest.importorskip('gradio_client').Client(page, verbose=False)


def test_server_answers(client, session, photograph):
    """The time of a size is a median of the start, so that it is the same for every picture."""
    from gradio_client import handle_file

    budget = largest_budget(client)
    html, chosen = client.predict(handle_file(photograph), budget, api_name='/classify')
    assert shown(html) == expected(session, photograph) and html.index('class=chosen') < html.index('64 px')
    assert chosen.startswith(f'Within {budget:g} ms: ') and 'at 64 px' in chosen
    again, _ = client.predict(handle_file(photograph), budget, api_name='/classify')
    assert again == html


def largest_budget(client):
    (slider,) = [c['props'] for c in client.config['components'] if c['type'] == 'slider']
    assert 0 < slider['minimum'] <= slider['step'] < slider['value'] < slider['maximum']
    return slider['maximum']


@pytest.mark.parametrize('content, message', [
    (b'nothing', r'photo.jpg is not an image, expected one of JPEG, PNG, .*\.'),
    (None, r'photo.jpg cannot be read as an image: .*\.'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'photo.jpg is not an image, .*'),
])
def test_one_sentence_on_what_is_not_an_image(client, session, photograph, tmp_path, capfd, content, message):
    from gradio_client import handle_file

    capfd.readouterr()
    budget = largest_budget(client)
    with open(photograph, 'rb') as f:
        (tmp_path / 'photo.jpg').write_bytes(f.read()[:900] if content is None else content)
    with pytest.raises(Exception) as e:
        client.predict(handle_file(str(tmp_path / 'photo.jpg')), budget, api_name='/classify')
    assert re.fullmatch(message, str(e.value)), e.value
    assert not capfd.readouterr().err
    html, _ = client.predict(handle_file(photograph), budget, api_name='/classify')
    assert shown(html) == expected(session, photograph)


def test_only_uploads_are_read(page, photograph):
    httpx = pytest.importorskip('httpx')
    call = f'{page}gradio_api/call/classify'
    given = [dict(path=photograph, meta=dict(_type='gradio.FileData')), 1]
    event = httpx.post(call, json=dict(data=given), timeout=240).json()['event_id']
    answer = httpx.get(f'{call}/{event}', timeout=240).text
    assert 'event: error' in answer and 'event: complete' not in answer and 'class ' not in answer


def test_one_sentence_on_a_broken_network(tmp_path, photograph):
    pytest.importorskip('gradio')
    from gradio_client import Client, handle_file

    path = str(tmp_path / 'broken.onnx')
    export_switchable(rs_model(), path)
    break_size(path, 1)
    app, address = serve(path, threads=1, block=False)
    try:
        client = Client(address, verbose=False)
        with pytest.raises(Exception) as e:
            client.predict(handle_file(photograph), largest_budget(client), api_name='/classify')
        assert str(e.value) == 'broken.onnx at 48 px answers with logits that are not finite numbers: a.jpg.'
    finally:
        app.close()


def test_uploads_are_limited_and_deleted(session, photograph):
    pytest.importorskip('gradio')
    httpx = pytest.importorskip('httpx')
    app, address = serve(session, block=False)
    try:
        upload = f'{address}gradio_api/upload'
        too_much = httpx.post(upload, files={'files': ('a.png', bytes(65 * 2**20))}, timeout=240)
        assert too_much.status_code == 413
        with open(photograph, 'rb') as f:
            kept, = httpx.post(upload, files={'files': ('a.jpg', f)}, timeout=240).json()
        assert Path(kept).is_file()
    finally:
        app.close()
    assert not Path(kept).exists()


@pytest.mark.skipif(os.name == 'nt', reason='there is no SIGTERM')
def test_the_command_ends_on_sigterm_and_deletes_pictures(session, photograph, tmp_path):
    """Also where SIGINT is ignored, as in the background of a script."""
    pytest.importorskip('gradio')
    httpx = pytest.importorskip('httpx')
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_rs_runtime', 'demo', session.path], stdout=subprocess.PIPE, text=True,
        env=dict(os.environ, GRADIO_TEMP_DIR=str(tmp_path)),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    with process:
        address = process.stdout.readline().split()[-1]
        with open(photograph, 'rb') as f:
            kept, = httpx.post(f'{address}gradio_api/upload', files={'files': ('a.jpg', f)}, timeout=240).json()
        assert Path(kept).is_file()
        process.terminate()
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not Path(kept).exists()


# In a browser

@pytest.fixture
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        try:
            opened = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        except playwright.Error:
            pytest.skip('no browser is installed: playwright install chromium')
        yield opened
        opened.close()


def test_picture_table_and_slider(page, browser, session, photograph):
    tab = browser.new_page()
    asked = []
    tab.on('request', lambda request: asked.append(request.url))
    tab.goto(page)
    tab.locator('input[type=file]').first.set_input_files(photograph)
    tab.wait_for_function("document.querySelector('#sizes')?.innerText.includes('32 px')", timeout=240000)
    assert tab.locator('#sizes section').count() == 3
    names = tab.locator('#sizes section tr:first-child td:first-child').all_inner_texts()
    assert names == [row[2][0] for row in expected(session, photograph)]
    assert tab.locator('#sizes svg circle').count() == 3 and tab.locator('#sizes .chosen').count() == 1
    before = tab.locator('#sizes').inner_html()
    tab.get_by_text('Take an example picture').click()
    tab.wait_for_function('b => document.querySelector("#sizes").innerHTML !== b', arg=before, timeout=240000)
    slider = tab.locator('input[type=number]')
    for budget in (slider.get_attribute('max'), slider.get_attribute('min')):
        slider.fill(budget)
        slider.press('Tab')
        pattern = re.compile(rf'(Within|No size keeps) {budget} ms')
        tab.locator('#chosen').get_by_text(pattern).wait_for(timeout=240000)
        assert re.search(r'class \d at (64|48|32) px', tab.locator('#chosen').inner_text())
    assert asked and all(url.startswith((page, 'data:', 'blob:')) for url in asked)
