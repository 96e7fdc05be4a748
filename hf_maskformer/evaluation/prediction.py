"""Segments images with a checkpoint and writes the results."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..data.folder import IMAGE_SUFFIXES, files_by_name
from ..data.sample import check_file_name, load_image, to_rgb
from ..image_processing_maskformer import MaskFormerImageProcessor
from ..image_processing_maskformer_images import download_image, is_url
from ..modeling_maskformer import MaskFormerForInstanceSegmentation
from ..modeling_per_pixel_baseline import PerPixelBaselineForSemanticSegmentation
from .drawing import draw_segmentation
from .segmentation_maps import to_numpy
from .tasks import Task, check_model, inputs_for, instance_options, outputs_for


@dataclass
class Prediction:
    """The segments of one image.

    Attributes:
        segmentation: (H, W) integers, at the size of the image: the segment id of each pixel. For the semantic task
            ids are class ids; for the others they count from 1, and 0 is void. Where instances overlap, the one with
            the highest score owns the pixel.
        segments: `id`, `label_id`, `label` and `area` (pixels of the map) of each segment, and `score` and `was_fused`
            except for the semantic task.
    """

    segmentation: np.ndarray
    segments: list[dict[str, Any]]


@torch.no_grad()
def predict(
    model: MaskFormerForInstanceSegmentation | PerPixelBaselineForSemanticSegmentation,
    image_processor: MaskFormerImageProcessor,
    image: Image.Image,
    task: Task,
    **thresholds: float,
) -> Prediction:
    """Segments one RGB image at its own size.

    Args:
        model, image_processor, image: what to segment, and with what.
        task: which task to perform.
        thresholds: for the instance and panoptic tasks, those of the image processor's post-processing.

    Raises:
        ValueError: the model does not support the task, or thresholds are given for the semantic one.
    """
    check_model(task, model)
    if task == "semantic" and thresholds:
        raise ValueError(
            f"Semantic segmentation gives every pixel a class and has no {', '.join(thresholds)}. Leave it out."
        )
    inputs = inputs_for(model, image_processor(images=image, return_tensors="pt"))
    outputs = outputs_for(task, model, image_processor, inputs, thresholds.get("threshold"))
    target_sizes = [(image.height, image.width)]
    if task != "semantic":
        post_process = getattr(image_processor, f"post_process_{task}_segmentation")
        options: dict[str, Any] = instance_options(model, thresholds) if task == "instance" else thresholds
        (result,) = post_process(outputs, target_sizes=target_sizes, **options)
        segmentation, segments = to_numpy(result["segmentation"]), result["segments_info"]
    else:
        (label_map,) = image_processor.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)
        segmentation = to_numpy(label_map)
        segments = [{"id": label, "label_id": label} for label in np.unique(segmentation).tolist()]
    names: dict[int, str] = model.config.id2label  # type: ignore[assignment]  # the configuration has integer ids
    areas = dict(zip(*(values.tolist() for values in np.unique(segmentation, return_counts=True)), strict=True))
    described = [
        {**segment, "label": names[segment["label_id"]], "area": areas.get(segment["id"], 0)} for segment in segments
    ]
    return Prediction(segmentation, described)


def write_prediction(
    prediction: Prediction, image: Image.Image, id2label: dict[int, str], task: Task, folder: Path, name: str
) -> list[Path]:
    """Writes NAME_labels.png (ids, 8 bits, or 16 where one exceeds 255), NAME_segments.json and NAME_overlay.png.

    Returns their paths. The folder is created if it does not exist; existing files are replaced. Raises a ValueError
    for a name that leads out of it.
    """
    check_file_name(name, folder, "The prediction")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}{ending}" for ending in ("_labels.png", "_segments.json", "_overlay.png")]
    ids = prediction.segmentation
    Image.fromarray(ids.astype(np.uint16 if ids.max() > 255 else np.uint8)).save(paths[0])
    content = {"task": task, "height": image.height, "width": image.width, "segments": prediction.segments}
    paths[1].write_text(json.dumps(content, indent=1))
    segments = None if task == "semantic" else prediction.segments
    # No class has the id -1: a semantic prediction covers every pixel.
    draw_segmentation(image, ids, id2label, segments=segments, ignore_index=-1, labels=True).save(paths[2])
    return paths


def read_images(source: str, failed: list[Path] | None = None) -> Iterator[tuple[str, Image.Image]]:
    """Yields the name and the upright RGB image of a file, of every image in a folder, or of an http(s) URL.

    An image in a folder that cannot be read is skipped, with a message on stderr, and its path is added to `failed`.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder holds no image.
        ValueError: a single file is damaged or has mode I or F, two in a folder have the same name, or a URL is not
            http(s), is not an image, or exceeds the limits of `download_image`.
    """
    if is_url(source):
        yield Path(unquote(urlparse(source).path)).stem or "image", _download(source)
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist. Name an image, a folder of images or an http(s) URL.")
    files = [path]
    if path.is_dir():
        files = list(files_by_name(path, IMAGE_SUFFIXES).values())
        if not files:
            raise FileNotFoundError(
                f"{source} holds no image ({', '.join(IMAGE_SUFFIXES)}); folders inside it are not searched."
            )
    for file in files:
        try:
            image = to_rgb(ImageOps.exif_transpose(load_image(file)), str(file))
        except ValueError as error:
            if not path.is_dir():
                raise
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            if failed is not None:
                failed.append(file)
            continue
        yield file.stem, image


def _download(url: str) -> Image.Image:
    try:
        image = download_image(url)
    # The client has its own family of errors, and the content may not be an image.
    except Exception as error:
        raise ValueError(f"{url} cannot be read as an image ({error}). Check the address.") from error
    return to_rgb(image, url)
