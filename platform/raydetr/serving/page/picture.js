// A file to a picture that this browser shows and the server reads alike; and drawing on it.

const SMALL_SIDE = 1600;

// The type of a file that the server reads, by its first bytes, as the server finds it; null for any other file.
async function formatOf(file) {
  const bytes = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const start = String.fromCharCode(...bytes);
  if (start.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (start.startsWith("\x89PNG\r\n\x1a\n")) return "image/png";
  return start.startsWith("RIFF") && start.slice(8) === "WEBP" ? "image/webp" : null;
}

// Another encoding of what the browser shows: upright, no longer than `side`.
async function copy(bitmap, side, type) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const size = [bitmap.width, bitmap.height].map((each) => Math.max(1, Math.round(each * scale)));
  const canvas = new OffscreenCanvas(...size);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, ...size);
  return canvas.convertToBlob({ type, quality: 0.92 });
}

// {blob: to send, bitmap, name, note: what was changed}; null where it is no picture.
async function readPicture(file, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const type = await formatOf(file);
  if (!type) {
    return { blob: await copy(bitmap, Infinity, "image/png"), bitmap, name, note: "sent as PNG" };
  }
  return { blob: file.slice(0, file.size, type), bitmap, name, note: "" };
}

// The server turns a picture upright by its EXIF orientation (orientation=apply), and so does the browser, but they may
// find it in different places. Boxes are of the pixels that the server has.
function isSeenAlike(picture, image) {
  return image.width === picture.bitmap.width && image.height === picture.bitmap.height;
}

async function upright(picture) {
  return { ...picture, blob: await copy(picture.bitmap, Infinity, "image/png"), note: "sent upright" };
}

async function smaller(picture) {
  const blob = await copy(picture.bitmap, SMALL_SIDE, "image/jpeg");
  const bitmap = await createImageBitmap(blob);
  return { ...picture, blob, bitmap, note: "sent as a smaller copy" };
}

// One colour for a class everywhere, far from those of the classes next to it.
function colour(labelId) {
  const hue = (labelId * 137.508 + 25) % 360;
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.58 - 0.38 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}
const css = (labelId) => `rgb(${colour(labelId).join(" ")})`;

// As near to (x, y) as the edges and the names in `placed` let it.
function drawName(context, text, x, y, labelId, [width, height], placed) {
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

// Draws items (the surest first) on the picture; `active` is drawn before all others, which step back.
function draw(canvas, picture, items, active, room) {
  const { width, height } = picture.bitmap;
  const scale = Math.min(room.width / width, room.height / height, 8);
  const size = [Math.round(width * scale), Math.round(height * scale)];
  const dots = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = size.map((each) => Math.round(each * dots));
  [canvas.style.width, canvas.style.height] = size.map((each) => `${each}px`);
  const context = canvas.getContext("2d");
  context.scale(dots, dots);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture.bitmap, 0, 0, ...size);
  const order = items.filter((item) => item !== active).reverse();
  if (items.includes(active)) order.push(active);
  const faint = (item) => (active && items.includes(active) && item !== active ? 0.25 : 1);
  for (const item of order) {
    context.globalAlpha = faint(item);
    if (item.mask) {
      item.paint ??= paintMask(item.mask, colour(item.labelId));
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
      drawName(context, item.title, item.box.xmin * scale, top < 24 ? top + 2 : top - 23, item.labelId, size, placed);
    } else if (item.place) {
      drawName(context, item.title, item.place[0] * size[0] - 20, item.place[1] * size[1] - 11, item.labelId, size, placed);
    }
  }
  return scale;
}
