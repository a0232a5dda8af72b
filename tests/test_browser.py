"""The page of examples/browser: its JavaScript in Node.js, and all of it in Chromium"""
import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from timm_rs.export import export_switchable  # noqa: E402
from timm_rs_runtime import Session  # noqa: E402
from timm_rs_runtime.predict import top  # noqa: E402
from timm_rs_runtime.preprocess import Preprocessing  # noqa: E402

PAGE = Path(__file__).parents[1] / 'examples' / 'browser'
WEB_BUILD = PAGE / 'node_modules' / 'onnxruntime-web'
needs_web_build = pytest.mark.skipif(
    not WEB_BUILD.is_dir(), reason='onnxruntime-web is not installed: npm install --prefix examples/browser')


@pytest.fixture(scope='module')
def session(tmp_path_factory):
    """Return the packaged network."""
    path = str(tmp_path_factory.mktemp('browser') / 'model.onnx')
    export_switchable(timm.create_model('rs_resnet10t.imagenette', pretrained=True).eval(), path)
    return Session(path, threads=1, decode='exact')


# In Node.js

def run_node(script, *arguments):
    """Return what a script prints, and how it fails. `page` imports a file of the page."""
    if not shutil.which('node'):
        pytest.skip('Node.js is not installed')
    head = f"import fs from 'node:fs'; const page = (name) => import('{PAGE.as_uri()}/' + name);\n"
    done = subprocess.run(
        ['node', '--input-type=module', '-e', head + script, *map(str, arguments)],
        capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def test_input_is_bit_for_bit_that_of_the_runtime(tmp_path):
    cases, expected = [], []
    for i, (width, height, size) in enumerate([(70, 50, 37), (33, 90, 24), (20, 20, 37), (300, 200, 37)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 4), np.uint8)
        pixels.tofile(tmp_path / str(i))
        for interpolation in ('box', 'bilinear', 'hamming', 'bicubic', 'lanczos'):
            for crop_mode in ('center', 'squash', 'border'):
                for crop_pct, channels in ((0.875, 3), (1., 1), (1.2, 3)):
                    metadata = dict(
                        mean=(.5, .4, .3)[:channels], std=(.2, .3, .25)[:channels], interpolation=interpolation,
                        crop_pct=crop_pct, crop_mode=crop_mode)
                    cases.append(dict(file=i, width=width, height=height, size=size, metadata=metadata))
                    image = Image.fromarray(pixels[..., :3]).convert('RGB' if channels == 3 else 'L')
                    expected.append(Preprocessing(**metadata)(image, size))
    (tmp_path / 'cases.json').write_text(json.dumps(cases))
    _, errors = run_node('''
        const {preprocess} = await page('preprocess.js');
        const folder = process.argv[1];
        const inputs = JSON.parse(fs.readFileSync(`${folder}/cases.json`)).map(({file, size, metadata, ...picture}) => {
          picture.data = new Uint8ClampedArray(fs.readFileSync(`${folder}/${file}`));
          return Buffer.from(preprocess(picture, size, metadata).buffer);
        });
        fs.writeFileSync(`${folder}/inputs`, Buffer.concat(inputs));''', tmp_path)
    assert not errors
    inputs = np.fromfile(tmp_path / 'inputs', np.float32)
    np.testing.assert_allclose(inputs, np.concatenate([x.ravel() for x in expected]), rtol=1e-5, atol=1e-6)


READ = '''
    const {readMetadata} = await page('network.js');
    try {
      console.log(JSON.stringify(readMetadata(new Uint8Array(fs.readFileSync(process.argv[1])))));
    } catch (e) {
      console.error(e.message);
    }'''


def test_metadata_are_read_from_the_file(session):
    printed, _ = run_node(READ, session.path)
    found = json.loads(printed)
    assert tuple(found['class_names']) == session.class_names and tuple(found['resolutions']) == session.resolutions
    assert found['crop_mode'] == 'center' and found['architecture'] == 'rs_resnet10t'


@pytest.mark.parametrize('content, message', [
    (b'', 'not a file of timm-rs export: its metadata lack resolutions, mean'),
    (b'nothing at all', 'not a whole ONNX file'),
    (b'\x08' + b'\xff' * 20, 'not an ONNX file'),
    (b'\x72\x05\x0a\x01a\x12\x00', 'not a file of timm-rs export'),
])
def test_one_sentence_on_other_files(tmp_path, content, message):
    (tmp_path / 'other').write_bytes(content)
    printed, error = run_node(READ, tmp_path / 'other')
    assert not printed and re.match(message, error) and len(error.splitlines()) == 1, error


def test_several_labels():
    out, errors = run_node('''
        const {answer} = await page('network.js');
        const metadata = {class_names: ['cat', 'dog', 'emu'], multilabel_threshold: 0.5};
        const network = {metadata, run: async () => [2, -2, 1]};
        const {classes} = await answer(network, () => 0, 0, 32);
        console.log(classes.map((c) => c.name + c.probability.toFixed(2)).join());
        ''')
    assert out.strip() == 'cat0.88,emu0.73' and not errors


def test_choice_of_a_size():
    printed, _ = run_node('''
        const {chooseSize, median} = await page('network.js');
        const milliseconds = {64: 20, 48: 10, 32: 5};
        console.log([20, 19, 5, 4].map((budget) => chooseSize([64, 48, 32], milliseconds, budget)).join());
        console.log(median([3, 1, 2]), median([4, 1, 2, 3]));''')
    assert printed.split() == ['64,48,32,32', '2', '2.5']


@needs_web_build
def test_web_build_computes_what_the_runtime_does(session, tmp_path):
    inputs = {r: np.random.default_rng(r).standard_normal((1, 3, r, r), np.float32) for r in session.resolutions}
    for r, x in inputs.items():
        x.tofile(tmp_path / str(r))
    printed, errors = run_node('''
        const ort = await page('node_modules/onnxruntime-web/dist/ort.node.min.mjs');
        const {openNetwork} = await page('network.js');
        const [file, folder] = process.argv.slice(1);
        const network = await openNetwork(ort, new Uint8Array(fs.readFileSync(file)));
        for (const size of network.metadata.resolutions) {
          const input = new Float32Array(new Uint8Array(fs.readFileSync(`${folder}/${size}`)).buffer);
          console.log(JSON.stringify(Array.from(await network.run(input, size))));
        }''', session.path, tmp_path)
    assert not errors
    for (r, x), line in zip(inputs.items(), printed.splitlines(), strict=True):
        np.testing.assert_allclose(json.loads(line), session.predict(x, r)[0], atol=1e-4)


# In Chromium

@pytest.fixture(scope='module')
def site(session):
    """Return the address of the page, with the network beside it."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return session.path if path == '/model.onnx' else super().translate_path(path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=PAGE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    camera = ['--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']
    with playwright.sync_playwright() as p:
        try:
            opened = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox', *camera])
        except playwright.Error:
            pytest.skip('no browser is installed: playwright install chromium')
        yield opened
        opened.close()


@pytest.fixture
def open_tab(browser):
    tabs = []

    def open_tab(address, width=1280):
        tabs.append(browser.new_page(viewport=dict(width=width, height=800)))
        tabs[-1].set_default_timeout(120000)
        tabs[-1].goto(address)
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.close()


def table(tab, name):
    return [row.split('\t') for row in tab.locator(f'#{name} tbody').inner_text().split('\n') if '\t' in row]


def set_budget(tab, milliseconds):
    tab.locator('#budget').evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(milliseconds))


@needs_web_build
def test_page(site, open_tab, session):
    """The example's answers are the runtime's, the budget chooses the size, and nothing is fetched from elsewhere."""
    asked, failed = [], []
    tab = open_tab('about:blank', width=390)
    tab.on('request', lambda request: asked.append(request.url))
    tab.on('pageerror', lambda error: failed.append(str(error)))
    tab.on('console', lambda message: failed.append(message.text))
    tab.goto(site)
    sizes = tab.locator('#sizes tbody tr')
    sizes.nth(3).wait_for()

    rows = table(tab, 'sizes')
    assert [row[0] for row in rows] == [f'{r} px' for r in session.resolutions]
    for r, row in zip(session.resolutions, rows):
        (best,) = top(session.predict(str(PAGE / 'example.jpg'), r)[0], session.class_names, 1)
        assert row[1] == best['name'] == 'church'
    best = top(session.predict(str(PAGE / 'example.jpg'), 48)[0], session.class_names, 5)
    found = table(tab, 'classes')
    assert [row[0] for row in found] == [answer['name'] for answer in best]
    for row, answer in zip(found, best):
        assert float(row[1].removesuffix(' %')) == pytest.approx(100 * answer['probability'], abs=0.3)

    set_budget(tab, 1e9)
    assert tab.locator('#chosen').inner_text() == 'church at 48 px'
    assert 'chosen' in sizes.nth(0).get_attribute('class')
    set_budget(tab, 0)
    assert tab.locator('#chosen').inner_text() == 'church at 24 px (the smallest; no size keeps the budget)'
    assert 'chosen' in sizes.nth(3).get_attribute('class')

    assert tab.evaluate('document.documentElement.scrollWidth') == 390
    assert asked and all(url.startswith((site, 'data:')) for url in asked)
    assert not failed


@needs_web_build
def test_camera_and_what_is_not_a_picture(site, open_tab):
    tab = open_tab(site)
    tab.locator('#sizes tbody tr').nth(3).wait_for()
    tab.locator('#file').set_input_files([dict(name='a.jpg', mimeType='image/jpeg', buffer=b'nothing')])
    tab.get_by_text('a.jpg is not a picture that this browser can open.').wait_for()
    tab.locator('#camera').click()
    tab.locator('#video:not([hidden])').wait_for()
    tab.locator('#chosen', has_text=re.compile('^(?!church).* at .* px')).wait_for()  # a green disc with numbers
    tab.locator('#camera').click()
    tab.locator('#picture:not([hidden])').wait_for()


@needs_web_build
def test_a_missing_network_is_named(site, open_tab):
    tab = open_tab(f'{site}?model=nowhere.onnx')
    tab.get_by_text('nowhere.onnx cannot be loaded (404). Make it: timm-rs export').wait_for()
    tab.goto(f'{site}?model=example.jpg')
    tab.locator('#message', has_text=re.compile('^example.jpg: not a')).wait_for()
