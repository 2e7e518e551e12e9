// Requests to this server, and explanations of their errors.

const TOKEN = "raydetr-token";
const at = (path) => new URL(path, document.baseURI).href;

class RequestFailed extends Error {
  // status 0: no response.
  constructor(status, message, { wait = null, id = "" } = {}) {
    super(message);
    Object.assign(this, { status, wait, id });
  }
}

async function send(path, { query = {}, body, signal } = {}) {
  const url = new URL(at(path));
  for (const [name, value] of Object.entries(query)) url.searchParams.append(name, value);
  const headers = { Accept: "application/json" };
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = body.type;
  let response, content;
  try {
    response = await fetch(url, { method: body ? "POST" : "GET", body, headers, signal });
    content = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailed(0, "");
  }
  const id = response.headers.get("X-Request-Id") || "";
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  const wait = Number.isNaN(seconds) ? null : seconds;
  let answer;
  try {
    answer = JSON.parse(content);
  } catch {
    throw new RequestFailed(response.ok ? 502 : response.status, "The response is not JSON.", { wait, id });
  }
  if (!response.ok) {
    throw new RequestFailed(response.status, answer?.error?.message ?? answer?.detail ?? "", { wait, id });
  }
  return answer;
}

const NOT_AN_IMAGE = ["This file is not a readable image", "Choose a JPEG, PNG or WebP file that opens in other programs."];

// Title and advice for the user.
function explain(status) {
  const known = {
    0: ["The server does not answer", "It may have been stopped, or the network is down. Your image is still here: try again later."],
    400: NOT_AN_IMAGE,
    401: ["The server does not accept the token", "Enter another one above."],
    403: ["The server does not allow this", "Ask its operator."],
    404: ["The server does not know this request", "The page may be outdated: reload it."],
    408: ["The upload took too long", "Try again, or send a smaller copy."],
    409: ["This model has no masks", "It only detects boxes."],
    413: ["The image is too large for this server", "Send a smaller copy: the model resizes images anyway."],
    415: NOT_AN_IMAGE,
    422: ["The server does not understand the request", "The page may be outdated: reload it."],
    429: ["The server is busy", "Too many requests are waiting."],
    503: ["No model is ready yet", "The model is starting or being replaced: wait a moment."],
    504: ["The request timed out", "Try again, or send a smaller image."],
  };
  return known[status] || ["The server failed", "Try again. If it happens again, tell its operator."];
}
