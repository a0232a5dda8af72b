// A file of `timm-rs export`: what it records about itself, and a session for each of its sizes.

const ROUNDS = 5;  // of which the time is the median
const WARM_UP = 2;  // rounds before them: the browser compiles WebAssembly again once it has run for a while
const METADATA_PROPS = 14;  // field of ModelProto in onnx.proto
const FIXED_LENGTHS = {1: 8, 5: 4};  // bytes of a field by its wire type
const BYTES = 2;  // the wire type of texts and messages

const REQUIRED = ['resolutions', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode'];

/** Return what `timm-rs export` recorded in an ONNX file, parsed as JSON. onnxruntime-web does not give it. */
export function readMetadata(bytes) {
  const decoder = new TextDecoder();
  const found = {};
  for (const [field, property] of fields(bytes)) {
    if (field !== METADATA_PROPS) continue;
    const texts = Object.fromEntries([...fields(property)].map(([f, text]) => [f, decoder.decode(text)]));
    found[texts[1]] = texts[2];
  }
  const missing = REQUIRED.filter((name) => !(name in found));
  if (missing.length) throw new Error(`not a file of timm-rs export: its metadata lack ${missing.join(', ')}`);
  // Other tools add some of their own.
  const names = [...REQUIRED, 'architecture', 'class_names', 'multilabel_threshold'];
  return Object.fromEntries(names.filter((name) => name in found).map((name) => [name, JSON.parse(found[name])]));
}

/** Yield number and content of the fields of a protobuf message that have a length. */
function* fields(bytes) {
  let at = 0;
  const integer = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length || scale > 2 ** 63) throw new Error('not an ONNX file');
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = integer();
    const type = key & 7;
    if (type === 0) {
      integer();
      continue;
    }
    const length = type === BYTES ? integer() : FIXED_LENGTHS[type];
    if (!(at + length <= bytes.length)) throw new Error('not a whole ONNX file');
    if (type === BYTES) yield [Math.floor(key / 8), bytes.subarray(at, at + length)];
    at += length;
  }
}

/** Return the network in a file: `metadata`, and `run(input, size)`, which returns logits. */
export async function openNetwork(ort, bytes) {
  const metadata = readMetadata(bytes);
  const sessions = {};
  for (const size of metadata.resolutions) {  // with fixed sides a session is the plain network of its size
    sessions[size] = await ort.InferenceSession.create(bytes, {freeDimensionOverrides: {height: size, width: size}});
  }
  return {
    metadata,
    async run(input, size) {
      const images = new ort.Tensor('float32', input, [1, metadata.mean.length, size, size]);
      const {logits} = await sessions[size].run({images});
      return logits.data;
    },
  };
}

/** Return the answer to a picture at a size: the best classes and the milliseconds for resizing and the network. */
export async function answer(network, preprocess, picture, size) {
  const start = performance.now();
  const logits = await network.run(preprocess(picture, size, network.metadata), size);
  const milliseconds = performance.now() - start;
  return {size, milliseconds, logits, classes: top(logits, network.metadata)};
}

/** Return the answer at every size, by size, with median times. The sizes take turns, so that all are slowed down alike. */
export async function answerAll(network, preprocess, picture) {
  const sizes = network.metadata.resolutions, rounds = [];
  for (let i = 0; i < WARM_UP + ROUNDS; i++) {
    const round = {};
    for (const size of sizes) {
      round[size] = await answer(network, preprocess, picture, size);
      await new Promise((resolve) => setTimeout(resolve));  // let the page be drawn
    }
    if (i >= WARM_UP) rounds.push(round);
  }
  return Object.fromEntries(sizes.map((size) => [
    size, {...rounds[0][size], milliseconds: median(rounds.map((round) => round[size].milliseconds))}]));
}

/** Return name and probability of the most probable classes; of several labels, of those that reach the threshold. */
function top(logits, {class_names: names, multilabel_threshold: threshold}, count = 5) {
  const probabilities = threshold == null ? softmax(logits) : Array.from(logits, (x) => 1 / (1 + Math.exp(-x)));
  return probabilities.map((probability, i) => ({name: names?.[i] ?? `class ${i}`, probability}))
    .filter(({probability}) => probability >= (threshold ?? 0))
    .sort((a, b) => b.probability - a.probability).slice(0, count);
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const exponentials = Array.from(logits, (x) => Math.exp(x - largest));
  const sum = exponentials.reduce((a, b) => a + b);
  return exponentials.map((e) => e / sum);
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** Return the largest size whose time is within a budget, or the smallest size. */
export function chooseSize(sizes, milliseconds, budget) {
  return sizes.find((size) => milliseconds[size] <= budget) ?? sizes.at(-1);
}
