// The page: pictures in, the answer of the chosen size and the time of every size out.

import * as ort from './node_modules/onnxruntime-web/dist/ort.wasm.min.mjs';
import {answer, answerAll, chooseSize, median, openNetwork} from './network.js';
import {pixelsOf, preprocess} from './preprocess.js';

const FILE = new URLSearchParams(location.search).get('model') ?? 'model.onnx';
const RECENT = 9;  // camera pictures whose times count

const element = (id) => document.getElementById(id);
let network, answers = {}, task = Promise.resolve();

/** Show a message, or none; an Error as such. */
function say(message = '') {
  element('message').textContent = message.message ?? message;
  element('message').classList.toggle('error', message instanceof Error);
}

/** Run one task after the other, so that none is in the time of another. */
function inTurn(f) {
  task = task.then(f).catch(say);
  return task;
}

async function load() {
  const response = await fetch(FILE);
  if (!response.ok) {
    throw new Error(`${FILE} cannot be loaded (${response.status}). Make it: timm-rs export NETWORK -o ${FILE}`);
  }
  try {
    network = await openNetwork(ort, new Uint8Array(await response.arrayBuffer()));
  } catch (e) {
    throw new Error(`${FILE}: ${e.message ?? e}`);
  }
  const {architecture, resolutions} = network.metadata;
  element('title').textContent = `${architecture} at ${resolutions.join(', ')} px`;
}

/** Answer a picture at every size, largest first. */
async function show(blob, name) {
  await stopCamera();
  say('Measuring the time of every size.');
  let bitmap;
  try {  // as stored: without turning it by EXIF and without another colour space, as in training
    bitmap = await createImageBitmap(blob, {colorSpaceConversion: 'none', imageOrientation: 'none'});
  } catch {
    throw new Error(`${name} is not a picture that this browser can open.`);
  }
  draw(bitmap);
  const pixels = pixelsOf(bitmap);
  bitmap.close();
  answers = await answerAll(network, preprocess, pixels);
  setBudgets();
  update();
  say();
}

async function showFile(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} cannot be loaded (${response.status}).`);
  await show(await response.blob(), name);
}

function draw(source) {
  const canvas = element('picture');
  [canvas.width, canvas.height] = [source.width, source.height];
  canvas.getContext('2d').drawImage(source, 0, 0);
}

/** Let the slider go from half the fastest time to somewhat more than the slowest; keep its value where that fits. */
function setBudgets() {
  const slider = element('budget'), times = Object.values(answers).map((a) => a.milliseconds);
  const first = !slider.dataset.set;
  slider.min = Math.min(...times) / 2;
  slider.max = Math.max(...times) * 1.25;
  if (first) slider.value = slider.max;
  slider.dataset.set = 'true';
}

/** Return the size that keeps the budget, by the times of all sizes. */
function chosenSize() {
  const milliseconds = Object.fromEntries(Object.values(answers).map((a) => [a.size, a.milliseconds]));
  return chooseSize(network.metadata.resolutions, milliseconds, Number(element('budget').value));
}

/** Return the name of the most probable class; of several labels none may reach the threshold. */
function best({classes}) {
  return classes.length ? classes[0].name : 'no label';
}

function update() {
  const budget = Number(element('budget').value);
  element('milliseconds').textContent = `${format(budget)} ms`;
  if (!Object.keys(answers).length) return;
  const chosen = answers[chosenSize()];
  const fits = chosen.milliseconds <= budget;
  element('chosen').textContent =
    `${best(chosen)} at ${chosen.size} px${fits ? '' : ' (the smallest; no size keeps the budget)'}`;
  rows('classes', chosen.classes.map(({name, probability}) =>
    [{}, name, `${(100 * probability).toFixed(1)} %`, [probability, 1]]));
  const slowest = Math.max(...Object.values(answers).map((a) => a.milliseconds));
  rows('sizes', network.metadata.resolutions.map((size) => {
    const {milliseconds} = answers[size];
    return [{chosen: size === chosen.size}, `${size} px`, best(answers[size]), `${format(milliseconds)} ms`,
      [milliseconds, slowest]];
  }));
}

/** Fill a table: classes of a row, then texts, the last of them a number, and [value, maximum] of a bar. */
function rows(id, content) {
  element(id).tBodies[0].replaceChildren(...content.map(([classes, ...cells]) => {
    const row = document.createElement('tr');
    row.classList.toggle('chosen', Boolean(classes.chosen));
    const [value, max] = cells.pop();
    cells.forEach((text, i) => {
      const cell = row.insertCell();
      cell.textContent = text;
      if (i === cells.length - 1) cell.className = 'number';
    });
    const bar = row.insertCell();
    bar.className = 'bar';
    bar.append(Object.assign(document.createElement('meter'), {max, value}));
    return row;
  }));
}

const format = (x) => x.toPrecision(x < 100 ? 2 : 3);

/** Answer pictures of the camera at the size that keeps the budget, one after the other. */
async function startCamera() {
  const video = element('video');
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment', width: 640}});
  } catch (e) {
    throw new Error(`No camera: ${e.message}. Browsers give it to pages of https and of localhost.`);
  }
  await video.play();
  say();
  showVideo(true);
  answers = await answerAll(network, preprocess, pixelsOf(video));
  setBudgets();
  const atStart = {...answers}, slowdowns = [];  // what slows down one size slows down all
  while (video.srcObject) {
    const found = await answer(network, preprocess, pixelsOf(video), chosenSize());
    slowdowns.push(found.milliseconds / atStart[found.size].milliseconds);
    if (slowdowns.length > RECENT) slowdowns.shift();
    for (const [size, {milliseconds}] of Object.entries(atStart)) {
      answers[size] = {...answers[size], milliseconds: milliseconds * median(slowdowns)};
    }
    answers[found.size].classes = found.classes;
    update();
    await new Promise(requestAnimationFrame);
  }
}

async function stopCamera() {
  const video = element('video');
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  showVideo(false);
}

function showVideo(visible) {
  element('video').hidden = !visible;
  element('picture').hidden = visible;
  element('camera').setAttribute('aria-pressed', visible);
}

element('file').addEventListener('change', ({target}) => {
  const [file] = target.files;
  if (file) stopCamera().then(() => inTurn(() => show(file, file.name)));
  target.value = '';  // the same file may be chosen again
});
element('example').addEventListener('click', () => stopCamera().then(() => inTurn(() => showFile('example.jpg'))));
element('camera').addEventListener('click', () => {
  if (element('video').srcObject) stopCamera();
  else inTurn(startCamera);
});
element('budget').addEventListener('input', update);

inTurn(async () => {
  await load();
  await showFile('example.jpg');
});
