// Example images, drawn by the page: nothing is loaded.

const WIDTH = 640;
const HEIGHT = 480;

const shade = (context, stops, from, to) => {
  const gradient = context.createLinearGradient(0, from, 0, to);
  stops.forEach((stop, index) => gradient.addColorStop(index / (stops.length - 1), stop));
  return gradient;
};
const block = (context, fill, x, y, w, h, round = 0) => {
  context.fillStyle = fill;
  context.beginPath();
  context.roundRect(x, y, w, h, round);
  context.fill();
};
const disc = (context, fill, x, y, rx, ry = rx, turn = 0) => {
  context.fillStyle = fill;
  context.beginPath();
  context.ellipse(x, y, rx, ry, turn, 0, 7);
  context.fill();
};
const shape = (context, fill, points) => {
  context.fillStyle = fill;
  context.beginPath();
  points.forEach(([x, y]) => context.lineTo(x, y));
  context.closePath();
  context.fill();
};

function street(c) {
  block(c, shade(c, ["#7db7e8", "#dcecf5"], 0, 300), 0, 0, WIDTH, 300);
  for (const [x, top, w, wall] of [[0, 90, 150, "#b98d6b"], [150, 40, 130, "#8f9aa5"], [280, 120, 170, "#c7a57b"], [450, 60, 190, "#a06f5c"]]) {
    block(c, wall, x, top, w, 240);
    for (let y = top + 22; y < 270; y += 46) for (let u = x + 16; u < x + w - 26; u += 40) block(c, "#34475a", u, y, 22, 28, 2);
  }
  block(c, "#9a9c9e", 0, 300, WIDTH, 40);
  block(c, shade(c, ["#4b4e52", "#63676b"], 340, HEIGHT), 0, 340, WIDTH, 140);
  for (let x = 10; x < WIDTH; x += 110) block(c, "#e8e4d0", x, 408, 56, 7);
  // bus
  block(c, "#c23b2e", 30, 190, 250, 165, 14);
  block(c, "#23313d", 44, 208, 222, 56, 6);
  for (const x of [98, 154, 210]) block(c, "#c23b2e", x, 206, 7, 60);
  block(c, "#f2d36b", 30, 318, 250, 9);
  for (const x of [88, 222]) { disc(c, "#16181a", x, 355, 27); disc(c, "#a7abae", x, 355, 12); }
  // car
  shape(c, "#2d6aa8", [[352, 350], [392, 300], [500, 300], [548, 350]]);
  shape(c, "#1f2c38", [[370, 346], [400, 308], [442, 308], [442, 346]]);
  shape(c, "#1f2c38", [[452, 346], [452, 308], [492, 308], [526, 346]]);
  block(c, "#2d6aa8", 322, 344, 262, 54, 18);
  block(c, "#ffe9a3", 566, 354, 18, 13, 5);
  for (const x of [382, 522]) { disc(c, "#16181a", x, 398, 28); disc(c, "#b5b9bc", x, 398, 13); }
  // person
  disc(c, "#d8a782", 604, 232, 14, 17);
  disc(c, "#3a2a20", 604, 222, 15, 11);
  block(c, "#3f7d4e", 586, 250, 37, 62, 11);
  block(c, "#d8a782", 579, 256, 9, 52, 4); block(c, "#d8a782", 621, 256, 9, 52, 4);
  block(c, "#2b3448", 589, 306, 14, 62, 4); block(c, "#2b3448", 607, 306, 14, 62, 4);
  // traffic light
  block(c, "#3a3f44", 302, 150, 7, 195); block(c, "#22262a", 292, 92, 28, 72, 6);
  ["#e2483a", "#6b5a22", "#2c5a34"].forEach((fill, index) => disc(c, fill, 306, 106 + 22 * index, 8));
}

function table(c) {
  block(c, shade(c, ["#e6dfd3", "#cfc4b2"], 0, 170), 0, 0, WIDTH, 170);
  block(c, shade(c, ["#a8713f", "#7d4f29"], 170, HEIGHT), 0, 170, WIDTH, 310);
  c.globalAlpha = 0.18;
  for (let y = 195; y < HEIGHT; y += 34) block(c, "#3f230e", 0, y, WIDTH, 3);
  c.globalAlpha = 0.3;
  for (const each of [[215, 372, 150, 30], [482, 300, 62, 16], [520, 428, 98, 20]]) disc(c, "#20120a", ...each);
  c.globalAlpha = 1;
  // plate with an apple, an orange and a banana
  disc(c, "#f4f4f1", 210, 345, 168, 74); disc(c, "#dcdeDd", 210, 342, 122, 50);
  disc(c, "#e88a1c", 272, 304, 46); disc(c, "#f7b65e", 258, 288, 13, 9, -0.5);
  disc(c, "#c22b2b", 176, 300, 52, 50); disc(c, "#e5716a", 158, 280, 13, 17, 0.5);
  block(c, "#5b3a1e", 173, 240, 6, 24, 3); disc(c, "#4f8a3c", 194, 246, 18, 8, -0.4);
  c.strokeStyle = "#e9c93d"; c.lineWidth = 30; c.lineCap = "round";
  c.beginPath(); c.arc(210, 250, 122, 0.55, 2.35); c.stroke();
  c.strokeStyle = "#6b5420"; c.lineWidth = 9; c.beginPath(); c.arc(210, 250, 122, 0.42, 0.47); c.stroke();
  // cup
  c.strokeStyle = "#2f7f86"; c.lineWidth = 13; c.beginPath(); c.arc(530, 236, 28, -1.5, 1.5); c.stroke();
  block(c, "#37939b", 430, 180, 102, 122, 20); disc(c, "#2f7f86", 481, 182, 51, 15); disc(c, "#3c2416", 481, 184, 42, 11);
  // book
  shape(c, "#27457a", [[420, 400], [592, 376], [626, 428], [446, 456]]);
  shape(c, "#f3efe4", [[446, 456], [626, 428], [628, 440], [448, 468]]);
  shape(c, "#27457a", [[446, 466], [628, 438], [629, 444], [448, 473]]);
  shape(c, "#e5c868", [[470, 412], [566, 398], [572, 407], [476, 421]]);
}

function shapes(c) {
  block(c, shade(c, ["#8fb9dd", "#b9d4e8"], 0, 190), 0, 0, WIDTH, 190);
  block(c, shade(c, ["#3c7fa3", "#2f6788"], 190, 320), 0, 190, WIDTH, 130);
  block(c, shade(c, ["#b59a6a", "#94794b"], 320, HEIGHT), 0, 320, WIDTH, 160);
  disc(c, "#d9443a", 165, 150, 84);
  shape(c, "#f0d23c", [[330, 330], [432, 128], [545, 318]]);
  c.save(); c.translate(190, 365); c.rotate(0.3); block(c, "#5a2a86", -68, -68, 136, 136); c.restore();
  const star = [];
  for (let i = 0; i < 10; i++) {
    const radius = i % 2 ? 36 : 86;
    star.push([500 + radius * Math.sin((i * Math.PI) / 5), 385 - radius * Math.cos((i * Math.PI) / 5)]);
  }
  shape(c, "#1d8a55", star);
}

const EXAMPLES = [["street", street], ["table", table], ["shapes", shapes]];

function drawExample(canvas, paint) {
  [canvas.width, canvas.height] = [WIDTH, HEIGHT];
  paint(canvas.getContext("2d"));
}
