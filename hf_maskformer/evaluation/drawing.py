"""Visualises segmentations: overlays on the image and titled panels side by side, drawn with Pillow alone."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..data.rle import decode_mask
from .label_placement import Color, font_for, number_ids, write_labels
from .segmentation_maps import to_numpy

MIN_PANEL_SIDE = 320
MARGIN = 12
INK: Color = (30, 30, 30)
PAPER: Color = (255, 255, 255)


def label_colors(num_labels: int) -> np.ndarray:
    """Returns one colour per label, (num_labels, 3) uint8, independent of the number of labels.

    Each colour is the one that looks least like those before it, so that the first few, which most images need, are
    the furthest apart. Colours repeat after 1,000 labels.
    """
    candidates = _vivid_colors()
    looks = _oklab(candidates)
    chosen = [0]
    gaps = np.full(len(looks), np.inf)
    while len(chosen) < min(num_labels, 1000):
        gaps = np.minimum(gaps, np.square(looks - looks[chosen[-1]]).sum(1))
        chosen.append(int(gaps.argmax()))
    return candidates[np.resize(chosen, num_labels)]


def _vivid_colors() -> np.ndarray:
    """The RGB grid without greys, near-black, near-white and glaring colours; a blue comes first."""
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3, indexing="ij"), -1).reshape(-1, 3)
    lightness, green_red, blue_yellow = _oklab(grid).T
    chroma = np.hypot(green_red, blue_yellow)
    vivid = grid[(lightness > 0.45) & (lightness < 0.92) & (chroma > 0.09) & (chroma < 0.23)]
    start = np.abs(vivid - np.array([51, 119, 221])).sum(1).argmin()
    return np.roll(vivid, -start, axis=0).astype(np.uint8)


def _oklab(colors: np.ndarray) -> np.ndarray:
    """Converts sRGB (N, 3), 0 to 255, to Oklab, where distances are perceptual (Ottosson, 2020)."""
    scaled = colors / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.41222147, 0.21190350, 0.08830246],
            [0.53633254, 0.68069955, 0.28171884],
            [0.05144599, 0.10739696, 0.62997870],
        ]
    )
    return np.cbrt(cones) @ np.array(
        [
            [0.21045426, 1.97799850, 0.02590404],
            [0.79361779, -2.42859221, 0.78277177],
            [-0.00407205, 0.45059371, -0.80867577],
        ]
    )


def draw_segmentation(
    image: Image.Image | npt.ArrayLike,
    result: Any,
    id2label: Mapping[Any, str],
    *,
    palette: np.ndarray | None = None,
    alpha: float = 0.55,
    ignore_index: int = 255,
    segments: Sequence[Mapping[str, Any]] | None = None,
    labels: bool = False,
    legend: bool = False,
) -> Image.Image:
    """Overlays the colours of a segmentation on its image in grey, with a thin border around every segment.

    Args:
        image: the picture, (H, W); or an array of bytes, (H, W, 3) or (H, W).
        result: (H, W) integers: label ids, where `ignore_index` leaves the image as it is, or, with `segments`, segment
            ids, where 0 and below do. Or the result of post-processing for an image, in any of its forms; where masks
            overlap, the one with the highest score is on top.
        id2label: names of the labels by id, which may be strings, as in a JSON file.
        palette: one colour per label id, (num_labels, 3) 0 to 255; by default `label_colors`.
        alpha: opacity of the colours, 0 to 1.
        ignore_index: value of unlabelled pixels in a map of label ids.
        segments: `segments_info` of post-processing: dicts with `id` and `label_id`. Segments of one label get slightly
            different shades.
        labels: write names into the segments that are large enough for them. Names never overlap: without enough room,
            that of the smaller segment is left out.
        legend: list the labels that occur under the picture.

    Returns:
        An RGB image of the same size; with a legend it is taller, and small images are enlarged by an integer factor.

    Raises ValueError if sizes differ, the map holds an id without a label, or the palette is too short.
    """
    image = image if isinstance(image, Image.Image) else _as_picture(to_numpy(image))
    id2label = _by_number(id2label)
    if isinstance(result, Mapping):
        result, segments = result["segmentation"], result.get("segments_info")
    ids = to_numpy(result) if segments is None else _id_map(result, segments, (image.height, image.width))
    if ids.shape != (image.height, image.width):
        raise ValueError(
            f"The segmentation map is {ids.shape}, but the image is {(image.height, image.width)}; resize one."
        )
    colors = _label_palette(id2label, palette)
    if segments is None:
        shades, labelled = {label: colors[label] for label in id2label}, ids != ignore_index
        label_of_id = {label: label for label in id2label}
    else:
        shades, labelled = segment_shades(segments, colors), ids > 0
        label_of_id = {segment["id"]: segment["label_id"] for segment in segments}
    occurring = np.unique(ids[labelled])
    unknown = np.setdiff1d(occurring, list(shades))
    if unknown.size:
        remedy = "add it to id2label, or pass it as ignore_index" if segments is None else "add it to segments"
        raise ValueError(f"The segmentation map contains id {unknown[0]}, which has no label; {remedy}.")
    picture = _overlay(image, ids, labelled, shades, alpha)
    if legend:
        factor = max(1, -(-MIN_PANEL_SIDE // max(picture.size)))
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)
        ids = ids.repeat(factor, 0).repeat(factor, 1)
    if labels:
        names = {int(number): id2label[label_of_id[int(number)]] for number in occurring}
        write_labels(picture, ids, names)
    if legend:
        label_ids = [label_of_id[int(number)] for number in occurring]
        picture = _with_legend(picture, legend_labels(label_ids, id2label, palette=palette))
    return picture


def _as_picture(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2:
        raise ValueError(
            f"The image is {pixels.dtype} of shape {pixels.shape}; give a PIL image, or uint8 (H, W, 3) or (H, W)."
        )
    return Image.fromarray(pixels)


def _by_number(id2label: Mapping[Any, str]) -> dict[int, str]:
    return {int(label): name for label, name in id2label.items()}


def _id_map(segmentation: Any, segments: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """The ids of segments (H, W), from such a map, from masks (N, H, W) or from run-length encodings of masks."""
    if isinstance(segmentation, list) and all(isinstance(mask, Mapping) for mask in segmentation):
        masks = [decode_mask(mask, size) for mask in segmentation]
    else:
        array = to_numpy(segmentation)
        if array.ndim != 3:
            return array
        masks, size = list(array), array.shape[1:]
    ids = np.zeros(size, dtype=np.int32)
    # The highest scores come first.
    for segment, mask in reversed(list(zip(segments, masks, strict=True))):
        ids[mask.astype(bool)] = segment["id"]
    return ids


def _label_palette(id2label: Mapping[int, str], palette: np.ndarray | None) -> np.ndarray:
    num_labels = max(id2label, default=-1) + 1
    if palette is None:
        return label_colors(num_labels)
    if len(palette) < num_labels:
        raise ValueError(f"The palette has {len(palette)} colours, but id2label goes up to {num_labels - 1}.")
    return to_numpy(palette)


def segment_shades(segments: Sequence[Mapping[str, Any]], colors: np.ndarray) -> dict[int, np.ndarray]:
    """The colour of each segment by id: that of its label, lighter or darker from the second segment of a label on."""
    seen: Counter[int] = Counter()
    shades = {}
    for segment in segments:
        label = segment["label_id"]
        if not 0 <= label < len(colors):
            raise ValueError(f"Segment {segment['id']} has label {label}, but id2label goes up to {len(colors) - 1}.")
        towards, share = ((0, 0.0), (255, 0.3), (0, 0.25), (255, 0.5), (0, 0.4))[seen[label] % 5]
        shades[segment["id"]] = colors[label] * (1 - share) + towards * share
        seen[label] += 1
    return shades


def _overlay(
    image: Image.Image, ids: np.ndarray, labelled: np.ndarray, shades: Mapping[int, np.ndarray], alpha: float
) -> Image.Image:
    numbers, places = number_ids(ids)
    colors = np.array([shades.get(int(number), np.zeros(3)) for number in numbers], dtype=np.float32)
    # Over grey, a label keeps the hue of the legend, whatever the colours of the image. A lookup table of the blend of
    # each label with each grey is used, since an image has millions of pixels.
    greys = np.arange(256, dtype=np.float32)[:, None]
    table = _as_bytes(greys + alpha * (colors[:, None] - greys)).reshape(-1, 3)
    pixels = np.array(image.convert("RGB"))
    drawn = table[places * 256 + np.asarray(image.convert("L"))]
    np.copyto(pixels, drawn, where=labelled[..., None])
    # Darker than its own colour, so that a border is visible next to any neighbour.
    edge = labelled & _borders(ids, width=max(1, min(ids.shape) // 400))
    pixels[edge] = _as_bytes(0.45 * colors)[places[edge]]
    return Image.fromarray(pixels)


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _borders(ids: np.ndarray, width: int) -> np.ndarray:
    """True where an id differs from one at most `width` pixels above, below, left or right, (H, W)."""
    borders = np.zeros(ids.shape, dtype=bool)
    for step in range(1, width + 1):
        for here, there in ((np.s_[step:], np.s_[:-step]), (np.s_[:, step:], np.s_[:, :-step])):
            changes = ids[here] != ids[there]
            borders[here] |= changes
            borders[there] |= changes
    return borders


def legend_labels(
    label_ids: npt.ArrayLike, id2label: Mapping[Any, str], *, palette: np.ndarray | None = None
) -> list[tuple[str, Color]]:
    """Returns name and colour of each label that occurs in `label_ids` (any shape) and in `id2label`, in id order.

    Pass `palette` as to `draw_segmentation`; ids without a name, such as the one for unlabelled pixels, are left out.
    """
    id2label = _by_number(id2label)
    colors = _label_palette(id2label, palette)
    occurring = [int(label) for label in np.unique(to_numpy(label_ids)) if int(label) in id2label]
    return [(id2label[label], _color(colors[label])) for label in occurring]


def _color(values: np.ndarray) -> Color:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def draw_comparison(
    image: Image.Image, panels: Sequence[tuple[str, Image.Image]], labels: Sequence[tuple[str, Color]]
) -> Image.Image:
    """Places the input image and titled visualisations side by side, with a legend underneath.

    Args:
        image: the input, shown first.
        panels: titles and pictures, for instance ground truth and prediction, all the size of `image`.
        labels: names and colours for the legend, as `legend_labels` gives them.

    Returns:
        An RGB image. Small pictures are enlarged by an integer factor so that titles fit; large ones keep their size.

    Raises ValueError if a panel differs in size from `image`.
    """
    for title, panel in panels:
        if panel.size != image.size:
            raise ValueError(
                f'Panel "{title}" is {panel.size} (width, height), but the image is {image.size}; resize one.'
            )
    factor = max(1, -(-MIN_PANEL_SIDE // max(image.size)))
    width, height = image.width * factor, image.height * factor
    font = font_for((width, height))
    line = int(font.size * 1.5)
    total_width = MARGIN + (len(panels) + 1) * (width + MARGIN)
    rows = _legend_rows(labels, font, total_width - 2 * MARGIN)
    canvas = Image.new("RGB", (total_width, 2 * MARGIN + line + height + len(rows) * line), PAPER)
    pen = ImageDraw.Draw(canvas)
    for index, (title, panel) in enumerate([("input", image), *panels]):
        left = MARGIN + index * (width + MARGIN)
        pen.text((left, MARGIN + line / 2), _shortened(title, font, width), INK, font, anchor="lm")
        enlarged = panel.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        canvas.paste(enlarged, (left, MARGIN + line))
    for index, row in enumerate(rows):
        _draw_legend_row(pen, row, font, middle=1.5 * MARGIN + line * (index + 1.5) + height)
    return canvas


def _with_legend(picture: Image.Image, labels: Sequence[tuple[str, Color]]) -> Image.Image:
    font = font_for(picture.size)
    rows, line = _legend_rows(labels, font, picture.width - 2 * MARGIN), int(font.size * 1.5)
    canvas = Image.new("RGB", (picture.width, picture.height + len(rows) * line + MARGIN), PAPER)
    canvas.paste(picture)
    for index, row in enumerate(rows):
        _draw_legend_row(ImageDraw.Draw(canvas), row, font, middle=picture.height + MARGIN / 2 + (index + 0.5) * line)
    return canvas


def _legend_rows(
    labels: Iterable[tuple[str, Color]], font: ImageFont.FreeTypeFont, width: float
) -> list[list[tuple[float, str, Color]]]:
    """Breaks the legend into rows of (offset, name, colour) that fit a width; a longer name is cut."""
    rows: list[list[tuple[float, str, Color]]] = []
    offset = width
    for name, color in labels:
        name = _shortened(name, font, width - 1.4 * font.size)
        needed = 1.4 * font.size + font.getlength(name)
        if offset + needed > width:
            rows.append([])
            offset = 0
        rows[-1].append((offset, name, color))
        offset += needed + 1.2 * font.size
    return rows


def _draw_legend_row(
    pen: ImageDraw.ImageDraw, row: list[tuple[float, str, Color]], font: ImageFont.FreeTypeFont, middle: float
) -> None:
    half = font.size / 2
    for offset, name, color in row:
        left = MARGIN + offset
        pen.rectangle((left, middle - half, left + 2 * half, middle + half), fill=color, outline=INK)
        pen.text((left + 1.4 * font.size, middle), name, INK, font, anchor="lm")


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
