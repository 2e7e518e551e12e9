// Read a file to an image that the browser and the server decode alike, and draw on it.

const SMALL_SIDE = 1600;

// The MIME type of a file by its first bytes, as the server detects it; null for a format that the server does not read.
async function formatOf(file) {
  const bytes = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const start = String.fromCharCode(...bytes);
  if (start.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (start.startsWith("\x89PNG\r\n\x1a\n")) return "image/png";
  return start.startsWith("RIFF") && start.slice(8) === "WEBP" ? "image/webp" : null;
}

// Re-encode what the browser shows: upright, with a longer side of at most `side`.
async function encode(bitmap, side, type) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const size = [bitmap.width, bitmap.height].map((each) => Math.max(1, Math.round(each * scale)));
  const canvas = new OffscreenCanvas(...size);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, ...size);
  return canvas.convertToBlob({ type, quality: 0.92 });
}

// {blob: to send, bitmap, name, note: what was changed}; null if the browser cannot decode the file.
async function readImage(file, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const type = await formatOf(file);
  if (!type) {
    return { blob: await encode(bitmap, Infinity, "image/png"), bitmap, name, note: "sent as PNG" };
  }
  return { blob: file.slice(0, file.size, type), bitmap, name, note: "" };
}

// Both the server (orientation=apply) and the browser turn an image upright by its EXIF orientation, but they may read it
// from different places of the file. Boxes refer to the image as the server decoded it.
function hasSameSize(image, decoded) {
  return decoded.width === image.bitmap.width && decoded.height === image.bitmap.height;
}

async function encodeUpright(image) {
  return { ...image, blob: await encode(image.bitmap, Infinity, "image/png"), note: "sent upright" };
}

async function encodeSmaller(image) {
  const blob = await encode(image.bitmap, SMALL_SIDE, "image/jpeg");
  const bitmap = await createImageBitmap(blob);
  return { ...image, blob, bitmap, note: "sent as a smaller copy" };
}

// The color of a class. The golden angle (137.5°) between hues keeps neighboring classes apart.
function color(labelId) {
  const hue = (labelId * 137.508 + 25) % 360;
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.58 - 0.38 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}
const css = (labelId) => `rgb(${color(labelId).join(" ")})`;

// Draw a label as close to (x, y) as the edges and the labels in `placed` allow.
function drawLabel(context, text, x, y, labelId, [width, height], placed) {
  context.font = "600 14px system-ui,sans-serif";
  const w = context.measureText(text).width + 16;
  const left = Math.max(0, Math.min(x, width - w));
  const fit = (each) => Math.max(0, Math.min(each, height - 22));
  const free = (top) => placed.every(([l, t, r]) => left >= r || left + w <= l || Math.abs(top - t) >= 23);
  const top = [0, 23, -23, 46, -46, 69].map((step) => fit(y + step)).find(free) ?? fit(y);
  placed.push([left, top, left + w]);
  context.fillStyle = "rgb(0 0 0 / .78)";
  context.fillRect(left, top, w, 22);
  context.fillStyle = css(labelId);
  context.fillRect(left, top, 5, 22);
  context.fillStyle = "#fff";
  context.textBaseline = "middle";
  context.fillText(text, left + 10, top + 11.5);
}

// Draw items (by descending score) on the image. `active` is drawn on top, and all others are faded.
function draw(canvas, image, items, active, room) {
  const { width, height } = image.bitmap;
  const scale = Math.min(room.width / width, room.height / height, 8);
  const size = [Math.round(width * scale), Math.round(height * scale)];
  const dots = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = size.map((each) => Math.round(each * dots));
  [canvas.style.width, canvas.style.height] = size.map((each) => `${each}px`);
  const context = canvas.getContext("2d");
  context.scale(dots, dots);
  context.imageSmoothingQuality = "high";
  context.drawImage(image.bitmap, 0, 0, ...size);
  const order = items.filter((item) => item !== active).reverse();
  if (items.includes(active)) order.push(active);
  const faint = (item) => (active && items.includes(active) && item !== active ? 0.25 : 1);
  for (const item of order) {
    context.globalAlpha = faint(item);
    if (item.mask) {
      item.paint ??= paintMask(item.mask, color(item.labelId));
      context.drawImage(item.paint, 0, 0, ...size);
    } else if (item.box) {
      const { xmin, ymin, xmax, ymax } = item.box;
      const rectangle = [xmin, ymin, xmax - xmin, ymax - ymin].map((each) => each * scale);
      context.lineJoin = "round";
      for (const [line, style] of [[item === active ? 8 : 5, "rgb(0 0 0 / .65)"], [item === active ? 4.5 : 2.5, css(item.labelId)]]) {
        context.lineWidth = line;
        context.strokeStyle = style;
        context.strokeRect(...rectangle);
      }
    }
  }
  const placed = [];
  for (const item of order.reverse()) {
    if (faint(item) < 1) continue;
    context.globalAlpha = 1;
    if (item.box) {
      const top = item.box.ymin * scale;
      drawLabel(context, item.title, item.box.xmin * scale, top < 24 ? top + 2 : top - 23, item.labelId, size, placed);
    } else if (item.anchor) {
      drawLabel(context, item.title, item.anchor[0] * size[0] - 20, item.anchor[1] * size[1] - 11, item.labelId, size, placed);
    }
  }
  return scale;
}
