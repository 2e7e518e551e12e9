// Decode COCO's compressed run lengths to masks that can be drawn.

function runLengths(counts) {
  const runs = [];
  for (let place = 0; place < counts.length; ) {
    let value = 0;
    for (let shift = 0; ; shift += 5) {
      const part = counts.charCodeAt(place++) - 48;
      value |= (part & 31) << shift;
      if (part & 32) continue;
      if (part & 16) value |= -1 << (shift + 5); // negative
      break;
    }
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value); // from the fourth run on: a difference
  }
  return runs;
}

// Maximum length of a stored mask's longer side, because large images may have many masks.
const MASK_SIDE = 1024;

// {bits: width × height of 0 or 1, width, height, scale, area: share of the image's pixels}
function readMask({ size: [height, width], counts }) {
  const full = new Uint8Array(height * width); // column by column
  let position = 0;
  let area = 0;
  runLengths(counts).forEach((run, index) => {
    if (index % 2) {
      full.fill(1, position, position + run);
      area += run;
    }
    position += run;
  });
  const scale = Math.min(1, MASK_SIDE / Math.max(height, width));
  const [w, h] = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const bits = new Uint8Array(w * h);
  for (let y = 0; y < h; y++) {
    const row = Math.min(height - 1, Math.floor(((y + 0.5) * height) / h));
    for (let x = 0; x < w; x++) {
      bits[y * w + x] = full[Math.min(width - 1, Math.floor(((x + 0.5) * width) / w)) * height + row];
    }
  }
  return { bits, width: w, height: h, area: area / (height * width) };
}

// A canvas with the mask in a color, with an opaque edge.
function paintMask({ bits, width, height }, [red, green, blue]) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : bits[y * width + x]);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!bits[y * width + x]) continue;
      const inside = at(x - 1, y) && at(x + 1, y) && at(x, y - 1) && at(x, y + 1);
      pixels.data.set([red, green, blue, inside ? 120 : 255], 4 * (y * width + x));
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// The position of the mask's label: the pixel of the mask that is nearest to its center, relative to the image size.
function findAnchor({ bits, width, height }) {
  let [x, y, count] = [0, 0, 0];
  bits.forEach((bit, index) => {
    if (!bit) return;
    x += index % width;
    y += Math.floor(index / width);
    count += 1;
  });
  if (!count) return null;
  [x, y] = [x / count, y / count];
  let minDistance = Infinity;
  let nearest = null;
  bits.forEach((bit, index) => {
    if (!bit) return;
    const [u, v] = [index % width, Math.floor(index / width)];
    const distance = (u - x) ** 2 + (v - y) ** 2;
    if (distance < minDistance) [minDistance, nearest] = [distance, [(u + 0.5) / width, (v + 0.5) / height]];
  });
  return nearest;
}
