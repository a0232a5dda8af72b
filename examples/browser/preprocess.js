// From a picture to the input of a network, as timm_rs_runtime does it with Pillow.

const ONE = 2 ** 22;  // weights are integers, as in Pillow, so that sums are rounded alike

// Support in pixels and weight at a distance, as in Pillow.
const sinc = (x) => x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1;
const FILTERS = {
  box: [0.5, (x) => x > -0.5 && x <= 0.5 ? 1 : 0],
  bilinear: [1, (x) => Math.max(1 - Math.abs(x), 0)],
  hamming: [1, (x) => Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0],
  bicubic: [2, (x) => {
    x = Math.abs(x);
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
  lanczos: [3, (x) => Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0],
};

/** Return the pixels of what a canvas can draw: {width, height, data: RGBA}. */
export function pixelsOf(source) {
  const [width, height] = [source.videoWidth ?? source.width, source.videoHeight ?? source.height];
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(source, 0, 0);
  return context.getImageData(0, 0, width, height);
}

/** Return the input of a network: Float32Array [channels, size, size]. */
export function preprocess(picture, size, {mean, std, interpolation, crop_pct: cropPct, crop_mode: cropMode}) {
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`the network wants pictures resized by ${interpolation}, expected one of ` +
    Object.keys(FILTERS).join(', '));
  const [width, height] = resized(picture.width, picture.height, Math.floor(size / cropPct), cropMode);
  const columns = weights(picture.width, width, size, filter);
  const rows = weights(picture.height, height, size, filter);
  const pixels = mean.length === 1 ? grey(picture.data) : picture.data;
  const top = rows[0].start, bottom = Math.max(...rows.map((row) => row.start + row.weights.length));
  const lines = combine(pixels, bottom - top, columns, (x, y) => (top + y) * picture.width + x, 1);
  const shown = combine(lines, columns.length, rows, (y, x) => (y - top) * columns.length + x, columns.length);
  const left = Math.max(offset(width, size), 0), above = Math.max(offset(height, size), 0);
  const input = new Float32Array(mean.length * size * size);
  for (let channel = 0; channel < mean.length; channel++) {
    const normalized = (level) => (level / 255 - mean[channel]) / std[channel];
    const plane = input.subarray(channel * size * size, (channel + 1) * size * size);
    plane.fill(normalized(cropMode === 'border' ? roundHalfToEven(255 * mean[channel]) : 0));
    for (let x = 0, i = channel; x < columns.length; x++) {
      for (let y = 0; y < rows.length; y++, i += 4) {
        plane[(above + y) * size + left + x] = normalized(shown[i]);
      }
    }
  }
  return input;
}

/** Return width and height before the crop. */
function resized(width, height, target, cropMode) {
  if (cropMode === 'squash') return [target, target];
  if (cropMode === 'border') {
    const ratio = Math.max(width, height) / target;
    return [width, height].map((side) => Math.max(roundHalfToEven(side / ratio), 1));
  }
  return width <= height ? [target, Math.floor(target * height / width)] : [Math.floor(target * width / height), target];
}

/** Return where an image starts in its central crop; negative if it is cut. */
function offset(length, crop) {
  return crop > length ? Math.floor((crop - length) / 2) : -roundHalfToEven((length - crop) / 2);
}

function roundHalfToEven(x) {
  return x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

/** Return for each pixel that the crop shows of a resized side: the first pixel that it is made of, and the weights. */
function weights(length, target, crop, [support, filter]) {
  const scale = length / target;
  const stretch = Math.max(scale, 1);  // the filter covers all pixels of a larger image
  const start = Math.max(-offset(target, crop), 0);
  return Array.from({length: Math.min(target, crop)}, (_, i) => {
    const center = (start + i + 0.5) * scale;
    const first = Math.max(Math.floor(center - support * stretch + 0.5), 0);
    const end = Math.min(Math.floor(center + support * stretch + 0.5), length);
    const values = Float64Array.from({length: end - first}, (_, j) => filter((first + j - center + 0.5) / stretch));
    const sum = values.reduce((a, b) => a + b);
    return {start: first, weights: values.map((value) => Math.round(value / sum * ONE))};
  });
}

/**
 * Return weighted sums of pixels: for each of `count` lines, one for each entry of `parts`.
 *
 * A line's pixels are `step` apart, and `index(i, line)` is where pixel i of a line is. In the result the sums of a
 * line follow each other.
 */
function combine(pixels, count, parts, index, step) {
  const sums = new Uint8ClampedArray(4 * count * parts.length);  // it clamps
  for (let line = 0; line < count; line++) {
    for (let part = 0; part < parts.length; part++) {
      const {start, weights} = parts[part];
      let red = ONE / 2, green = ONE / 2, blue = ONE / 2;
      for (let i = 0, p = 4 * index(start, line); i < weights.length; i++, p += 4 * step) {
        red += weights[i] * pixels[p];
        green += weights[i] * pixels[p + 1];
        blue += weights[i] * pixels[p + 2];
      }
      const at = 4 * (line * parts.length + part);
      sums[at] = Math.floor(red / ONE);
      sums[at + 1] = Math.floor(green / ONE);
      sums[at + 2] = Math.floor(blue / ONE);
    }
  }
  return sums;
}

/** Return RGBA pixels in grey. */
function grey(pixels) {
  const result = new Uint8ClampedArray(pixels.length);
  for (let i = 0; i < pixels.length; i += 4) {
    result.fill((pixels[i] * 19595 + pixels[i + 1] * 38470 + pixels[i + 2] * 7471 + 32768) >> 16, i, i + 3);
  }
  return result;
}
