"""transformers' image segmentation pipeline, thinly adapted to MaskFormer."""

import base64
import difflib
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ImageSegmentationPipeline

from ..configuration_per_pixel_baseline import is_per_pixel_baseline
from ..image_processing_maskformer_images import download_image, is_url, open_image, to_rgb
from ..post_processing_maskformer_inputs import Size
from .tasks import TASKS, Task, instance_options, outputs_for, task_for

# The options of transformers' pipeline; of these, semantic segmentation ignores the thresholds.
THRESHOLDS = ("threshold", "mask_threshold", "overlap_mask_area_threshold")
OPTIONS = {
    "semantic": (*THRESHOLDS, "mode"),
    "instance": (*THRESHOLDS, "top_k", "min_area"),
    "panoptic": (*THRESHOLDS, "label_ids_to_fuse"),
}
OPTIONS_OF_ALL = ("subtask", "timeout", "progress_bar")


class MaskFormerPipeline(ImageSegmentationPipeline):
    """Images in, segments out: the mask, label, score, box and area of each::

        segment = pipeline(
            "image-segmentation", model=model, image_processor=image_processor, pipeline_class=MaskFormerPipeline
        )
        segments = segment("photo.jpg")
        for segments in segment(photographs, batch_size=8):  # a generator streams, images of any sizes
            ...

    Calls accept what transformers' pipeline accepts. `subtask` is by default the task that the model was trained for,
    the image processor's `segmentation_task`, or "semantic" if that is not set. Its `label_ids_to_fuse` determines
    which stuff is fused. Options are those of the subtask's post-processing, with the same defaults: the thresholds,
    `mode` (semantic), `top_k` and `min_area` (instance), `label_ids_to_fuse` (panoptic). `progress_bar` shows one over
    many images. Images of one shape in a batch go through the model together: none is padded for the sake of another,
    so results do not depend on the rest of the batch. With `num_workers`, that many threads read and preprocess the
    next images meanwhile, as many as a batch has or one each.

    Returns, for each image, a list of segments:

    - `mask`: a PIL image of the input's size, 255 inside the segment and 0 outside. Masks of instances may overlap.
    - `label`: the name of its label.
    - `score`: 0 to 1. For a semantic segment, the mean over its pixels of its label's share of the scores of all labels
      nearby, on the grid of the logits.
    - `box`: `xmin`, `ymin`, `xmax`, `ymax`, in pixels; the last two are exclusive.
    - `area`: the pixels of its mask.

    Raises a ValueError for an option that is unknown or not one of the subtask, and for an image that cannot be read,
    with its name or position; and for panoptic and instance segmentation a RuntimeError for a model in training mode.
    """

    image_processor: Any
    model: Any

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        subtask = kwargs.get("subtask")
        if subtask is not None and subtask not in TASKS:
            raise ValueError(f"subtask is {subtask!r}; it must be one of {', '.join(TASKS)}.")
        known = sorted({*OPTIONS_OF_ALL, *itertools.chain(*OPTIONS.values())})
        for name in kwargs.keys() - set(known):
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {nearest[0]}?" if nearest else f"Options are {', '.join(known)}."
            raise ValueError(f"{name}={kwargs[name]!r} is not an option of the pipeline. {hint}")
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if "progress_bar" in kwargs:
            preprocess["progress_bar"] = kwargs["progress_bar"]
        postprocess |= {name: kwargs[name] for name in kwargs.keys() - set(OPTIONS_OF_ALL)}
        forward |= {name: kwargs[name] for name in ("subtask", "threshold") if name in kwargs}
        return preprocess, forward, postprocess

    def check_model_type(self, supported_models: Any) -> None:
        kind = type(self.image_processor)
        # A checkpoint's remote code is in another module, and transformers' class copies any field of the file.
        if kind.__module__.startswith("transformers.") or not hasattr(self.image_processor, "segmentation_task"):
            raise ValueError(
                f"The image processor is {kind.__module__}.{kind.__name__}, not one of this package. Call "
                "register_auto_classes() before pipeline(...), which then loads model and image processor of this "
                "package, or pass both as objects."
            )
        # transformers does not list the baselines among its models and would log an error.
        if not is_per_pixel_baseline(self.model):
            super().check_model_type(supported_models)

    def __call__(self, inputs: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        # transformers would index the first image of an empty list.
        is_empty = isinstance(inputs, list | tuple) and not inputs
        return [] if is_empty else super().__call__(inputs, **kwargs)

    def preprocess(  # type: ignore[override]
        self, image: Any, *, timeout: float | None = None, index: int = 0, **_: Any
    ) -> Any:
        loaded = _as_rgb(image, timeout, index)
        inputs = self.image_processor(images=[loaded], return_tensors="pt").to(self.dtype)
        inputs["target_size"] = [(loaded.height, loaded.width)]
        return inputs

    def _forward(  # type: ignore[override]
        self, model_inputs: Any, subtask: Task | None = None, threshold: float | None = None
    ) -> Any:
        target_size = model_inputs.pop("target_size")
        outputs = outputs_for(self._task(subtask), self.model, self.image_processor, model_inputs, threshold)
        outputs["target_size"] = target_size
        return outputs

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._postprocess_batch(model_outputs, **parameters)[0]

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[list[dict[str, Any]]]:
        """Segments the images batch by batch; only the current batch, and with workers the next, is in memory."""
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size is {batch_size} and num_workers {num_workers}; the minimum is 1 and 0.")
        total = len(inputs) if hasattr(inputs, "__len__") else None  # type: ignore[arg-type]
        # A `Dataset` has a length and indices, but iterating over it may never end.
        images = iter(inputs) if total is None else (inputs[index] for index in range(total))  # type: ignore[index]

        def prepare(numbered: tuple[int, Any]) -> Any:
            index, image = numbered
            return self.preprocess(image, timeout=preprocess_params.get("timeout"), index=index)

        prepared = _prepared_ahead(prepare, enumerate(images), num_workers, max(batch_size, num_workers))
        with tqdm(
            total=total, desc="Segmenting", unit="image", disable=not preprocess_params.get("progress_bar")
        ) as progress:
            while batch := list(itertools.islice(prepared, batch_size)):
                for segments in self._segment_batch(batch, forward_params, postprocess_params):
                    progress.update()
                    yield segments

    def _segment_batch(
        self, batch: list[Any], forward_params: dict[str, Any], postprocess_params: dict[str, Any]
    ) -> list[list[dict[str, Any]]]:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, inputs in enumerate(batch):
            by_shape.setdefault(tuple(inputs["pixel_values"].shape), []).append(index)
        results: list[list[dict[str, Any]]] = [[] for _ in batch]
        for indices in by_shape.values():
            outputs = self.forward(_stacked([batch[index] for index in indices]), **forward_params)
            for index, segments in zip(indices, self._postprocess_batch(outputs, **postprocess_params), strict=True):
                results[index] = segments
        return results

    def _postprocess_batch(
        self, outputs: Any, subtask: Task | None = None, **options: Any
    ) -> list[list[dict[str, Any]]]:
        subtask = self._task(subtask)
        for name in options.keys() - set(OPTIONS[subtask]):
            raise ValueError(
                f"{name} is not an option of {subtask} segmentation, which has {', '.join(OPTIONS[subtask])}. Omit it "
                "or choose another subtask."
            )
        sizes = outputs["target_size"]
        if subtask == "semantic":
            options = {name: value for name, value in options.items() if name not in THRESHOLDS}
            maps = self.image_processor.post_process_semantic_segmentation(outputs, target_sizes=sizes, **options)
            rows = zip(maps, *_shares_of_labels(outputs), outputs.image_sizes.tolist(), strict=True)
            return [self._semantic_segments(*row) for row in rows]
        if subtask == "instance":
            results = self.image_processor.post_process_instance_segmentation(
                outputs, target_sizes=sizes, return_binary_maps=True, **instance_options(self.model, options)
            )
        else:
            results = self.image_processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, **options)
        return [self._scored_segments(result) for result in results]

    def _task(self, subtask: Task | None) -> Task:
        return subtask or task_for(self.image_processor)

    def _scored_segments(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        segmentation = result["segmentation"]
        return [
            self._segment(
                segmentation[index] if segmentation.ndim == 3 else segmentation == info["id"],
                info["label_id"],
                info["score"],
            )
            for index, info in enumerate(result["segments_info"])
        ]

    def _semantic_segments(
        self, label_map: Tensor, shares: Tensor, covered_size: Size, image_size: Size
    ) -> list[dict[str, Any]]:
        lengths = zip(label_map.shape, image_size, shares.shape[1:], covered_size, strict=True)
        rows, columns = (
            (
                (torch.arange(target, dtype=torch.float32, device=label_map.device) + 0.5)
                * (image * grid / (target * covered))
            ).long()
            for target, image, grid, covered in lengths
        )
        score_map = shares[label_map, rows[:, None], columns]
        # In float32 a sum over millions of pixels would be inexact, and a mean of ones could exceed 1.
        sums = torch.bincount(label_map.flatten(), weights=score_map.flatten().double())
        areas = torch.bincount(label_map.flatten())
        return [
            self._segment(label_map == label, label, (sums[label] / areas[label]).item())
            for label in areas.nonzero().flatten().tolist()
        ]

    def _segment(self, mask: Tensor, label_id: int, score: float) -> dict[str, Any]:
        picture = Image.fromarray(mask.to(torch.uint8).mul_(255).numpy())
        left, top, right, bottom = picture.getbbox() or (0, 0, 0, 0)
        return {
            "mask": picture,
            "label": self.model.config.id2label[label_id],
            "score": score,
            "box": {"xmin": left, "ymin": top, "xmax": right, "ymax": bottom},
            "area": int(mask.sum()),
        }


def _prepared_ahead(
    prepare: Callable[[Any], Any], images: Iterator[Any], num_workers: int, num_ahead: int
) -> Iterator[Any]:
    """The results of `prepare` for the images, in order; with workers, `num_ahead` images in advance."""
    if num_workers == 0:
        yield from map(prepare, images)
        return
    pool = ThreadPoolExecutor(num_workers)
    submitted = _submitted(pool, prepare, images)
    try:
        pending = deque(itertools.islice(submitted, num_ahead))
        while pending:
            pending.extend(itertools.islice(submitted, 1))
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, prepare: Callable[[Any], Any], images: Iterator[Any]) -> Iterator[Future[Any]]:
    try:
        for image in images:
            yield pool.submit(prepare, image)
    except Exception as error:  # from the source of the images: raised in its turn, after the images before it
        failed: Future[Any] = Future()
        failed.set_exception(error)
        yield failed


def _stacked(inputs: list[Any]) -> Any:
    """Stacks the inputs of single images of one shape into one batch."""
    batch = inputs[0]
    for name, values in batch.items():
        parts = [each[name] for each in inputs]
        batch[name] = torch.cat(parts) if isinstance(values, Tensor) else [value for part in parts for value in part]
    return batch


def _as_rgb(image: Any, timeout: float | None, index: int) -> Image.Image:
    try:
        # transformers would clip 16-bit grey images to 255, download a URL of any size, and pass PostScript to
        # Ghostscript.
        if isinstance(image, Image.Image):
            opened = image
        elif not isinstance(image, str | Path):
            raise TypeError(f"it is a {type(image).__name__}; pass a PIL image, a path, a URL or base64")
        elif os.path.isfile(image):
            opened = open_image(image)
        elif is_url(image):
            opened = download_image(str(image)) if timeout is None else download_image(str(image), timeout)
        else:
            opened = open_image(_from_base64(str(image)))
        return to_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # decoders and HTTP clients raise many kinds of error
        # A string may also be the image itself, in base64.
        source = f" ({str(image)[:200]})" if isinstance(image, str | Path) else ""
        raise ValueError(f"Image {index}{source} cannot be read: {error}") from error


def _from_base64(text: str) -> BytesIO:
    """Decodes a data URL, or the base64 after its comma alone."""
    header, _, content = text.partition(",")
    is_data_url = re.fullmatch(r"data:image/[\w.+-]+;base64", header)
    try:
        return BytesIO(base64.b64decode("".join((content if is_data_url else text).split()), validate=True))
    except ValueError:
        raise ValueError("there is no such file, and it is neither an http(s) URL nor base64") from None


def _shares_of_labels(outputs: Any) -> tuple[list[Tensor], list[Size]]:
    """The share of each label at each grid point, (K, h, w), for each image; and the size that each grid covers."""
    if hasattr(outputs, "logits"):
        shares = list(outputs.logits.float().softmax(dim=1))
        return shares, [(4 * height, 4 * width) for height, width in (each.shape[1:] for each in shares)]
    shares = []
    for class_logits, mask_logits in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
        probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
        scores = torch.einsum("qk,qhw->khw", probabilities, mask_logits.float().sigmoid())
        # Scores are sums over queries, so they may exceed 1, and may all be 0 where no query has a mask.
        shares.append(scores / scores.sum(dim=0).clamp(min=torch.finfo(scores.dtype).tiny))
    return shares, outputs.padded_sizes.tolist()
