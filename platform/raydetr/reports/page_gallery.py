"""The section of the evaluation's page with the images that go most wrong, by kind of error."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pyarrow as pa

from raydetr.data.shards import Manifest
from raydetr.data.stream.mask_targets import MaskKind
from raydetr.reports.page_matching import Item, match_image
from raydetr.reports.page_pictures import Album, detections, open_album, rows_of
from raydetr.reports.page_text import ERRORS, plural

MOST = 12
"""Images of a kind."""
PANOPTIC = 8
"""Images whose segments are shown."""

CONTROLS = (
    '<div class="controls"><label><input type="checkbox" id="show-truth" checked> truth '
    '<span class="swatch"></span></label><label><input type="checkbox" id="show-found" checked> prediction '
    '<span class="swatch dashed"></span></label><label><input type="checkbox" id="show-other" checked> objects '
    "that the picture is not about (thin)</label></div>"
)


def gallery_section(
    analysis: Mapping[str, Any], manifest: Manifest, predictions: pa.Table, kind: MaskKind = "none"
) -> str:
    """The worst images of each kind of error with truth and prediction, and the segments of some."""
    worst = {
        kind: list(ids)[:MOST] for kind, ids in analysis.get("worst", {}).items() if kind in ERRORS and ids
    }
    chosen = list(dict.fromkeys(image_id for ids in worst.values() for image_id in ids))
    if not chosen:
        return "<p>No image with an error.</p>"
    found = rows_of(predictions, chosen)
    album = open_album(manifest, chosen, kind, len(chosen) + 2 * PANOPTIC)
    min_score = float(analysis.get("errors", {}).get("min_score", 0.3))
    cost = analysis.get("errors", {}).get("cost", {})
    parts: list[str] = []
    for error in sorted(worst, key=lambda error: -cost.get(error, 0)):
        figures = [_figure(error, album, image_id, found, min_score) for image_id in worst[error]]
        name, meaning, _ = ERRORS[error]
        parts.append(
            f"<details{'' if parts else ' open'}><summary>{name} <small>{meaning}: {plural(len(figures), 'image')}, "
            f"the worst first</small></summary><div class=gallery>{''.join(figures)}</div></details>"
        )
    segments = _segments(album, chosen, found)
    lead = (
        "<p>Solid lines are the truth, dashed lines with a score are predictions. Labelled and thick is what the "
        f"picture is about. Detections with a score of less than {min_score:g} are left out.</p>"
    )
    return album.pixels() + lead + CONTROLS + "".join(parts) + segments


def caption_of(album: Album, image_id: int, more: str) -> str:
    """File name, id and a remark, HTML, with the button that enlarges."""
    return (
        f"<figcaption>{escape(album.shots[image_id].file_name)}, image {image_id}{more} <button "
        'type="button" class="script-only" data-enlarge aria-pressed="false">larger</button></figcaption>'
    )


def not_shown(image_id: int, row: Mapping[str, Any] | None) -> str:
    """In place of an image that cannot be decoded."""
    reason = (row or {}).get("error") or "it is not in the data set or cannot be decoded"
    return (
        f"<figure><figcaption>image {image_id}: cannot be shown ({escape(str(reason))})</figcaption></figure>"
    )


def _figure(
    kind: str, album: Album, image_id: int, found: Mapping[int, Mapping[str, Any]], min_score: float
) -> str:
    if image_id not in album.shots:
        return not_shown(image_id, found.get(image_id))
    shot = album.shots[image_id]
    items = detections(found.get(image_id), shot.image.size[::-1], min_score)
    key_objects, key_items = _key(kind, shot.objects, items)
    picture = album.picture(image_id, [("truth", shot.objects, key_objects), ("found", items, key_items)])
    count = sum(key_objects) if kind == "missed" else sum(key_items)
    return f"<figure>{picture}{caption_of(album, image_id, f': {count} {ERRORS[kind][0].lower()}')}</figure>"


def _key(kind: str, objects: Sequence[Item], items: Sequence[Item]) -> tuple[list[bool], list[bool]]:
    """Which objects and which detections a picture of this kind of error is about."""
    verdict = match_image(objects, items)
    if kind == "missed":
        return [fate == "missed" for fate in verdict.objects], [False] * len(items)
    key_items = [each == kind for each in verdict.detections]
    meant = {index for index, key in zip(verdict.meant, key_items, strict=True) if key}
    return [index in meant for index in range(len(objects))], key_items


def _segments(album: Album, chosen: Sequence[int], found: Mapping[int, Mapping[str, Any]]) -> str:
    """Truth and prediction of whole images, where there are any, side by side."""
    figures: list[str] = []
    for image_id in chosen:
        row = found.get(image_id)
        if image_id not in album.shots or row is None or not row.get("panoptic") or len(figures) == PANOPTIC:
            continue
        if truth := album.panoptic(image_id, None):
            figures.append(
                f"<figure class=triple><div class=panels><div><p>truth</p>{truth}</div><div><p>prediction</p>"
                f"{album.panoptic(image_id, row)}</div></div>{caption_of(album, image_id, '')}</figure>"
            )
    if not figures:
        return ""
    return (
        f"<details open><summary>Segments <small>whole images divided into segments: {plural(len(figures), 'image')} "
        f"of those above</small></summary><div class=gallery>{''.join(figures)}</div></details>"
    )
