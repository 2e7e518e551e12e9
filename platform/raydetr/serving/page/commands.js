// The request of the page, for a terminal and for Python.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curlCommand(picture, path, query, asksForToken) {
  const url = new URL(at(path));
  for (const [name, value] of Object.entries(query)) url.searchParams.append(name, value);
  const parts = [`curl ${quoted(url.href)}`, `-H ${quoted(`Content-Type: ${picture.blob.type}`)}`];
  if (asksForToken) parts.push('-H "Authorization: Bearer $TOKEN"');
  parts.push(`--data-binary ${quoted(`@${picture.name}`)}`);
  return parts.join(" \\\n  ");
}

function pythonCode(picture, mode, query, asksForToken) {
  const file = JSON.stringify(picture.name);
  const token = asksForToken ? ', token=os.environ["TOKEN"]' : "";
  const threshold = query.threshold === undefined ? "" : `, threshold=${query.threshold}`;
  const given = `${threshold}, orientation="${query.orientation}"`;
  const call = mode === "boxes" ? `detect(${file}${given})` : `segment(${file}, "${mode}"${given})`;
  const loop =
    mode === "boxes"
      ? "for found in result.detections:\n    print(found.label, found.score, found.box)"
      : "for found in result.segments:\n    print(found.label, found.score, found.mask.size)";
  return [
    ...(asksForToken ? ["import os", ""] : []),
    "from raydetr.client.client import Client",
    "",
    `with Client("${at(".").replace(/\/$/, "")}"${token}) as client:`,
    `    result = client.${call}`,
    loop,
  ].join("\n");
}

async function copyText(element) {
  const selection = getSelection();
  selection.selectAllChildren(element);
  try {
    await navigator.clipboard.writeText(element.textContent);
    selection.removeAllRanges();
    return true;
  } catch {
    return document.execCommand("copy"); // a page that did not come by https has no clipboard
  }
}
