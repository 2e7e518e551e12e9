// Requests to this server, and what their errors mean.

const TOKEN = "raydetr-token";
const at = (path) => new URL(path, document.baseURI).href;

class Refused extends Error {
  // status 0: no answer at all.
  constructor(status, message, { wait = null, id = "" } = {}) {
    super(message);
    Object.assign(this, { status, wait, id });
  }
}

async function ask(path, { query = {}, body, signal } = {}) {
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
    throw new Refused(0, "");
  }
  const id = response.headers.get("X-Request-Id") || "";
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  const wait = Number.isNaN(seconds) ? null : seconds;
  let answer;
  try {
    answer = JSON.parse(content);
  } catch {
    throw new Refused(response.ok ? 502 : response.status, "The answer is no JSON.", { wait, id });
  }
  if (!response.ok) {
    throw new Refused(response.status, answer?.error?.message ?? answer?.detail ?? "", { wait, id });
  }
  return answer;
}

const NOT_AN_IMAGE = ["This file is not a picture that can be read", "Choose a JPEG, PNG or WebP file that opens in other programs too."];

// Title and advice for a person.
function explain(status) {
  const known = {
    0: ["The server does not answer", "It may have been stopped, or the network is down. The picture is still here: try again when it is back."],
    400: NOT_AN_IMAGE,
    401: ["The server does not accept the token", "Enter another one above."],
    403: ["The server does not allow this", "Ask whoever runs it."],
    404: ["The server does not know this request", "It may be of another version: reload the page."],
    408: ["The picture arrived too slowly", "Try again, or send a smaller copy."],
    409: ["This model cannot do that", "It finds boxes only."],
    413: ["The picture is too large for this server", "A smaller copy is nearly always good enough: objects are found at a reduced size anyway."],
    415: NOT_AN_IMAGE,
    422: ["The server does not understand the request", "It may be of another version: reload the page."],
    429: ["The server is busy", "Others are ahead of you."],
    503: ["No model is ready yet", "It is starting, or being replaced: wait a little."],
    504: ["It took too long", "The server gave up. Try again, or send a smaller picture."],
  };
  return known[status] || ["The server failed", "Try again. If it goes on, tell whoever runs it."];
}
