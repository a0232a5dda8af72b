#!/usr/bin/env python3
"""What a browser's own resizing costs: answers of examples/browser against those of the Python runtime

Chromium opens each photograph and answers it twice: resized by preprocess.js, and resized by a canvas (smoothing
quality high). Both are compared with Session(decode='exact').

    npm install --prefix examples/browser --ignore-scripts
    timm-rs export MODEL -o model.onnx
    python experiments/browser_resize.py --model model.onnx --data-dir DIR

Writes results/browser_resize.json: a row per size and way of resizing.
"""
import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
from _shared import add_deployed_arguments, create_parser, print_table, write_results
from playwright.sync_api import sync_playwright

from timm_rs_runtime import Session
from timm_rs_runtime.fitting import label_folders
from timm_rs_runtime.images import split_folder

PAGE = Path(__file__).resolve().parents[1] / 'examples' / 'browser'
ANSWER = '''async (count) => {
  const ort = await import('/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs');
  const {openNetwork} = await import('/network.js');
  const {pixelsOf, preprocess} = await import('/preprocess.js');
  const network = await openNetwork(ort, new Uint8Array(await (await fetch('/given/model')).arrayBuffer()));
  const {crop_pct: cropPct, resolutions} = network.metadata;
  const answers = [];
  for (let i = 0; i < count; i++) {
    const blob = await (await fetch(`/given/${i}`)).blob();
    const image = await createImageBitmap(blob, {colorSpaceConversion: 'none', imageOrientation: 'none'});
    const pixels = pixelsOf(image);
    for (const size of resolutions) {
      const scale = Math.floor(size / cropPct) / Math.min(image.width, image.height);
      const [width, height] = [image.width * scale, image.height * scale].map(Math.floor);
      const context = new OffscreenCanvas(size, size).getContext('2d');
      context.imageSmoothingQuality = 'high';
      context.drawImage(image, Math.round((size - width) / 2), Math.round((size - height) / 2), width, height);
      const drawn = context.getImageData(0, 0, size, size);
      for (const [picture, metadata] of [[pixels, network.metadata], [drawn, {...network.metadata, crop_pct: 1}]]) {
        answers.push(Array.from(await network.run(preprocess(picture, size, metadata), size)));
      }
    }
  }
  return answers;
}'''


def main():
    parser = create_parser(__doc__)
    add_deployed_arguments(parser)
    args = parser.parse_args()
    session = Session(args.model, args.threads, decode='exact')
    images, _ = label_folders(split_folder(args.data_dir, args.split), session, args.most)
    expected = np.array([[session.predict(image, r)[0] for r in session.resolutions] for image in images])
    found = in_browser(args.model, images).reshape(len(images), len(session.resolutions), 2, -1)
    rows = []
    for i, resolution in enumerate(session.resolutions):
        for j, resize in enumerate(('preprocess.js', 'canvas')):
            logits, reference = found[:, i, j], expected[:, i]
            rows.append(dict(
                resolution=resolution, resize=resize, images=len(images),
                same_answer=round(100 * float((logits.argmax(1) == reference.argmax(1)).mean()), 2),
                largest_difference=float(f'{np.abs(logits - reference).max():.2g}')))
    print_table(list(rows[0]), rows)
    write_results(args, rows)


def in_browser(model, images):
    """Return the logits of every image at every size, resized in two ways."""
    given = {'model': model, **{str(i): image for i, image in enumerate(images)}}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return given[path.split('/')[-1]] if path.startswith('/given/') else super().translate_path(path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Handler, directory=PAGE)) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        tab = browser.new_page()
        tab.goto(f'http://127.0.0.1:{server.server_port}/package.json')
        answers = np.array(tab.evaluate(ANSWER, len(images)))
        browser.close()
        server.shutdown()
    return answers


if __name__ == '__main__':
    main()
