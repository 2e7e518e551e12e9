"""The section of the evaluation report that shows the worst images of each kind of error."""

from collections.abc import Mapping, Sequence
from html import escape

import pyarrow as pa

from raydetr.data.shards import Manifest
from raydetr.data.stream.mask_targets import MaskKind
from raydetr.reports.page_matching import Item, match_image
from raydetr.reports.page_pictures import Album, PredictedImage, detections, open_album, read_predicted
from raydetr.reports.page_text import ERRORS, plural
from raydetr.results.analysis import Analysis

MAX_IMAGES = 12
"""Maximum images per kind of error."""
MAX_PANOPTIC = 8
"""Maximum images whose segments are shown."""
MIN_SCORE = 0.3
"""Minimum score of a detection that is drawn, unless the analysis has another one."""

CONTROLS = (
    '<div class="controls"><label><input type="checkbox" id="show-truth" checked> ground truth '
    '<span class="swatch"></span></label><label><input type="checkbox" id="show-found" checked> predictions '
    '<span class="swatch dashed"></span></label><label><input type="checkbox" id="show-other" checked> other objects '
    "and detections (thin)</label></div>"
)


def gallery_section(
    analysis: Analysis, manifest: Manifest, predictions: pa.Table, kind: MaskKind = "none"
) -> str:
    """Render the worst images of each kind of error with ground truth and predictions, and the segments of some."""
    worst = {kind: ids[:MAX_IMAGES] for kind, ids in analysis.worst.items() if kind in ERRORS and ids}
    chosen = list(dict.fromkeys(image_id for ids in worst.values() for image_id in ids))
    if not chosen:
        return "<p>No image has an error.</p>"
    predicted = read_predicted(predictions, chosen)
    album = open_album(manifest, chosen, kind, len(chosen) + 2 * MAX_PANOPTIC)
    min_score = analysis.errors.min_score if analysis.errors else MIN_SCORE
    costs = analysis.errors.costs if analysis.errors else {}
    parts: list[str] = []
    for error in sorted(worst, key=lambda error: -costs.get(error, 0)):
        figures = [_figure(error, album, image_id, predicted, min_score) for image_id in worst[error]]
        name, meaning, _ = ERRORS[error]
        parts.append(
            f"<details{'' if parts else ' open'}><summary>{name} <small>{meaning}: {plural(len(figures), 'image')}, "
            f"worst first</small></summary><div class=gallery>{''.join(figures)}</div></details>"
        )
    segments = _segments(album, chosen, predicted)
    lead = (
        "<p>Solid lines are the ground truth. Dashed lines with a score are predictions. The errors of the kind have "
        f"thick lines and labels. Detections with a score below {min_score:g} are not shown.</p>"
    )
    return album.pixels() + lead + CONTROLS + "".join(parts) + segments


def caption_of(album: Album, image_id: int, more: str) -> str:
    """Render the caption: file name, id, a remark in HTML, and the button that enlarges the image."""
    return (
        f"<figcaption>{escape(album.entries[image_id].file_name)}, image {image_id}{more} <button "
        'type="button" class="script-only" data-enlarge aria-pressed="false">larger</button></figcaption>'
    )


def not_shown(image_id: int, predicted: PredictedImage | None) -> str:
    """Render the placeholder of an image that cannot be decoded."""
    error = None if predicted is None else predicted.error
    reason = error or "it is not in the data set or cannot be decoded"
    return f"<figure><figcaption>image {image_id}: cannot be shown ({escape(reason)})</figcaption></figure>"


def _figure(
    kind: str, album: Album, image_id: int, predicted: Mapping[int, PredictedImage], min_score: float
) -> str:
    if image_id not in album.entries:
        return not_shown(image_id, predicted.get(image_id))
    entry = album.entries[image_id]
    items = detections(predicted.get(image_id), entry.image.size[::-1], min_score)
    key_objects, key_items = _key(kind, entry.objects, items)
    overlay = album.overlay(image_id, [("truth", entry.objects, key_objects), ("found", items, key_items)])
    count = sum(key_objects) if kind == "missed" else sum(key_items)
    return f"<figure>{overlay}{caption_of(album, image_id, f', {ERRORS[kind][0].lower()}: {count}')}</figure>"


def _key(kind: str, objects: Sequence[Item], items: Sequence[Item]) -> tuple[list[bool], list[bool]]:
    """Return which objects and which detections to emphasize for this kind of error."""
    matching = match_image(objects, items)
    if kind == "missed":
        return [status == "missed" for status in matching.objects], [False] * len(items)
    key_items = [each == kind for each in matching.detections]
    referred = {index for index, key in zip(matching.referred, key_items, strict=True) if key}
    return [index in referred for index in range(len(objects))], key_items


def _segments(album: Album, chosen: Sequence[int], predicted: Mapping[int, PredictedImage]) -> str:
    """Render the segments of ground truth and predictions side by side, for images that have both."""
    figures: list[str] = []
    for image_id in chosen:
        of_image = predicted.get(image_id)
        if image_id not in album.entries or of_image is None or of_image.segments is None:
            continue
        if len(figures) == MAX_PANOPTIC:
            break
        if ground_truth := album.panoptic(image_id, None):
            figures.append(
                f"<figure class=triple><div class=panels><div><p>ground truth</p>{ground_truth}</div><div><p>prediction"
                f"</p>{album.panoptic(image_id, of_image)}</div></div>{caption_of(album, image_id, '')}</figure>"
            )
    if not figures:
        return ""
    return (
        f"<details open><summary>Segments <small>panoptic segments of {plural(len(figures), 'image')} "
        f"from above</small></summary><div class=gallery>{''.join(figures)}</div></details>"
    )
