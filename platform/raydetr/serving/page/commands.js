// The page's request as a curl command and as Python code.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curlCommand(image, path, query, needsToken) {
  const url = new URL(at(path));
  for (const [name, value] of Object.entries(query)) url.searchParams.append(name, value);
  const parts = [`curl ${quoted(url.href)}`, `-H ${quoted(`Content-Type: ${image.blob.type}`)}`];
  if (needsToken) parts.push('-H "Authorization: Bearer $TOKEN"');
  parts.push(`--data-binary ${quoted(`@${image.name}`)}`);
  return parts.join(" \\\n  ");
}

function pythonCode(image, mode, query, needsToken) {
  const file = JSON.stringify(image.name);
  const token = needsToken ? ', token=os.environ["TOKEN"]' : "";
  const threshold = query.threshold === undefined ? "" : `, threshold=${query.threshold}`;
  const options = `${threshold}, orientation="${query.orientation}"`;
  const call = mode === "boxes" ? `detect(${file}${options})` : `segment(${file}, "${mode}"${options})`;
  const loop =
    mode === "boxes"
      ? "for detection in result.detections:\n    print(detection.label, detection.score, detection.box)"
      : "for segment in result.segments:\n    print(segment.label, segment.score, segment.mask.size)";
  return [
    ...(needsToken ? ["import os", ""] : []),
    "from raydetr.client import Client",
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
    return document.execCommand("copy"); // without https there is no clipboard API
  }
}
