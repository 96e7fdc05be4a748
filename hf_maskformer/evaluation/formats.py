"""Segmentations in the file formats of other tools: panopticapi, COCO results, semantic PNGs.

Results are those of the image processor's `post_process_*` methods. Data sets have their own category ids; with
`category_ids`, a mapping from label ids to them, files hold these.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..data.sample import check_file_name
from .drawing import label_colors
from .segmentation_maps import to_numpy

MAX_SEGMENT_ID = 256**3 - 1


def panoptic_image(segmentation: npt.ArrayLike) -> Image.Image:
    """Encodes ids (H, W) as COCO panoptic colours, id = R + 256 G + 65536 B. Raises ValueError beyond 24 bits."""
    ids = to_numpy(segmentation)
    if ids.size and not 0 <= ids.min() <= ids.max() <= MAX_SEGMENT_ID:
        raise ValueError(
            f"The segmentation holds ids from {ids.min()} to {ids.max()}, but three bytes hold 0 to {MAX_SEGMENT_ID}."
        )
    return Image.fromarray(np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8))


def panoptic_annotation(
    result: Mapping[str, Any], image_id: int | str, file_name: str, category_ids: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """Returns a panoptic result as panopticapi's entry of "annotations", with area and box of each segment."""
    ids = to_numpy(result["segmentation"])
    segments_info = [
        {
            "id": info["id"],
            "category_id": _category(info["label_id"], category_ids),
            "area": int((ids == info["id"]).sum()),
            "bbox": _box(ids == info["id"]),
            "iscrowd": 0,
        }
        for info in result["segments_info"]
    ]
    return {"image_id": image_id, "file_name": file_name, "segments_info": segments_info}


def write_panoptic(
    results: Iterable[tuple[int | str, str, Mapping[str, Any]]],
    folder: Path,
    category_ids: Mapping[int, int] | None = None,
) -> Path:
    """Writes what panopticapi evaluates: one PNG per image in `folder`, and FOLDER.json beside it.

    Args:
        results: the id of each image, the name of its file without suffix, which may include a folder ("train/0001"),
            and its panoptic result.
        folder: created if it does not exist.
        category_ids: see above.

    Returns:
        The path of the JSON file.

    Raises:
        ValueError: a name leads out of the folder, and what `panoptic_image` and `panoptic_annotation` raise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    annotations = []
    for image_id, name, result in results:
        check_file_name(f"{name}.png", folder, "The results")
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)  # names in some data sets include folders
        panoptic_image(result["segmentation"]).save(path)
        annotations.append(panoptic_annotation(result, image_id, f"{name}.png", category_ids))
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps({"annotations": annotations}))
    return path


def coco_results(
    result: Mapping[str, Any], image_id: int, category_ids: Mapping[int, int] | None = None
) -> list[dict[str, Any]]:
    """Turns an instance result with `return_coco_annotation=True` into entries of a COCO results file.

    The file is a JSON list of the entries of all images, for `COCO.loadRes`. Raises ValueError for a result in another
    form.
    """
    if not isinstance(result["segmentation"], list):
        raise ValueError(
            "The result holds no run-length encodings; make it with post_process_instance_segmentation(..., "
            "return_coco_annotation=True)."
        )
    return [
        {
            "image_id": image_id,
            "category_id": _category(info["label_id"], category_ids),
            "segmentation": encoding,
            "score": info["score"],
        }
        for info, encoding in zip(result["segments_info"], result["segmentation"], strict=True)
    ]


def semantic_image(label_map: npt.ArrayLike, palette: np.ndarray | None = None) -> Image.Image:
    """Returns an image whose pixels are the labels (H, W), with a palette so that viewers show colours.

    Args:
        label_map: integers. With labels above 255 the image has 16 bits, and no palette.
        palette: one colour per label, (K, 3) 0 to 255; by default `label_colors`.

    Raises ValueError for labels below 0 or above 65535.
    """
    labels = to_numpy(label_map)
    if labels.size and not 0 <= labels.min() <= labels.max() < 2**16:
        raise ValueError(f"The map holds labels from {labels.min()} to {labels.max()}; a PNG holds 0 to 65535.")
    if labels.max(initial=0) > 255:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels.astype(np.uint8))
    colors = label_colors(256) if palette is None else to_numpy(palette)[:256]
    image.putpalette(colors.astype(np.uint8).tobytes())
    return image


def _category(label_id: int, category_ids: Mapping[int, int] | None) -> int:
    if category_ids is None:
        return label_id
    if label_id not in category_ids:
        raise ValueError(f"category_ids lacks label {label_id}; add the data set's id for it.")
    return category_ids[label_id]


def _box(mask: np.ndarray) -> list[int]:
    """Left, top, width and height."""
    left, top, right, bottom = Image.fromarray(mask.view(np.uint8)).getbbox() or (0, 0, 0, 0)
    return [left, top, right - left, bottom - top]
