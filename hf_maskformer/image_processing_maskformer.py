"""Images and segmentation maps in, a batch out; model outputs in, segmentations out.

B images, N_i segments in image i, H x W the padded size of the batch. A segment is one region with one label in one
image. Sizes are (height, width). Images stay uint8 until they lie in the batch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image
from transformers.utils import logging

from .image_processing_maskformer_settings import (
    DEFAULT_SIZE,
    OLD_SETTINGS,
    RESAMPLING,
    SETTINGS,
    ImageProcessorSettings,
    current_settings,
    unknown_settings,
)
from .image_processing_maskformer_targets import (
    COMMON_IGNORE_VALUE,
    check_map_sizes,
    instance_labels_of_images,
    pad_as_label_map,
    pad_as_masks,
    pad_as_segment_map,
    read_segmentation_map,
    split_segmentation_map,
)
from .post_processing_maskformer import Size, panoptic_segmentation, per_pixel_segmentation, semantic_segmentation

logger = logging.get_logger(__name__)

_BASE_CLASS_SETTINGS = {"feature_extractor_type", "image_processor_type", "processor_class", "auto_map"}


class MaskFormerImageProcessor(BaseImageProcessor):
    """Prepares images and segmentation maps for MaskFormer and turns the model's outputs into segmentations.

    Call it with images, and with segmentation maps to train (see `preprocess`); the `post_process_*` methods go the way
    back. It reads and writes the `preprocessor_config.json` of transformers' class of the same name, including files of
    2022 (`reduce_labels`, `size_divisibility`, an integer `size` with `max_size`), and does not need torchvision.

    Args:
        do_resize: whether to resize images and their maps.
        size: `{"shortest_edge", "longest_edge"}` scales to the shortest edge unless the longest would exceed its bound
            (which may be left out), `{"max_height", "max_width"}` to the largest size within both, and
            `{"height", "width"}` to exactly this size, whatever the aspect ratio. An integer is the shortest edge.
        size_divisor: the batch is padded (images are not stretched) until height and width are multiples of this; with
            0 or None only to the size of its largest image.
        resample: PIL's number of the filter for images: 2 (bilinear), 3 (bicubic) or 0 (nearest). Maps take nearest.
        do_rescale, rescale_factor: whether to multiply pixels by this factor, by default 1 / 255.
        do_normalize, image_mean, image_std: whether to subtract the mean of each channel and divide by its deviation,
            by default those of ImageNet.
        ignore_index: the value in segmentation maps whose pixels belong to no segment, also in maps of ids.
        do_reduce_labels: labels in maps are one too high and 0 means "other": 1 becomes 0, and so on; 0 and the ignore
            value (255 unless ignore_index says otherwise) belong to no segment. With `instance_id_to_semantic_id` it
            applies to the semantic ids.
        num_labels: maps are checked to hold labels below this number only; by default they are not.
        pad_size: `{"height", "width"}` of every batch, instead of that of its largest image.
        label_ids_to_fuse: labels of uncountable stuff, of which a panoptic segmentation has one segment each.

    Raises:
        ValueError: a setting is unknown, contradicts another or has no meaning.
    """

    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 (as the base class declares it)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{name: settings.pop(name) for name in _BASE_CLASS_SETTINGS & settings.keys()})
        checked = ImageProcessorSettings(**current_settings(settings, DEFAULT_SIZE))
        for name in SETTINGS:
            setattr(self, name, getattr(checked, name))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a processor from the settings of a file. Settings among `kwargs`, old names too, outweigh them.

        Returns the processor, or with `return_unused_kwargs=True` a tuple of it and the other `kwargs`.
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        base = {name: value for name, value in image_processor_dict.items() if name in _BASE_CLASS_SETTINGS}
        settings = {name: value for name, value in image_processor_dict.items() if name not in base}
        if cls._auto_class is None:
            # It names files beside the one that was read, which a processor saved from here will not have.
            base.pop("auto_map", None)
        # A file of a later transformers may hold more; an argument of the caller must mean something.
        unknown = unknown_settings(settings)
        if unknown:
            logger.warning(
                f"Unknown settings in the image processor's file are left out: {', '.join(sorted(unknown))}."
            )
        settings = {name: value for name, value in settings.items() if name not in unknown}
        settings = current_settings(settings, DEFAULT_SIZE)
        overrides = {name: kwargs.pop(name) for name in (SETTINGS | OLD_SETTINGS) & kwargs.keys()}
        settings |= current_settings(overrides, settings.get("size", DEFAULT_SIZE))
        processor = cls(**base, **settings)
        return (processor, kwargs) if return_unused_kwargs else processor

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
        *,
        target_format: Literal["masks", "segment_map", "label_map"] = "masks",
        input_data_format: str | None = None,
        return_tensors: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Makes a batch of images and, from segmentation maps, the targets to train with.

        Args:
            images: a PIL image, an array or tensor ((height, width, 3), (3, height, width) or (height, width), uint8 or
                float), a path or URL; a list of these or a stacked array.
            segmentation_maps: for each image a PIL image, array or tensor of integers (height, width), of its size.
            instance_id_to_semantic_id: says that maps hold ids of segments, and which label each has; one dictionary
                for all images or a list with one for each. Without it maps hold labels, and all pixels of a label
                form one segment.
            target_format: `"masks"`, or `"segment_map"` for the same targets in a fraction of the memory; `"label_map"`
                for models that classify pixels, such as the per-pixel baselines.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape leaves it open.
            return_tensors: `"np"` for arrays; otherwise the batch holds tensors.
            overrides: settings of the processor, for this call only.

        Returns:
            A dictionary with:

            - `pixel_values` (B, 3, H, W) float32, padded on the right and below with 0 after normalisation,
            - `pixel_mask` (B, H, W) int64, 1 in the image and 0 in the padding,
            - with maps, `mask_labels` and `class_labels`: as `"masks"`, lists of (N_i, H, W) bool masks and of (N_i,)
              int64 labels; as `"segment_map"`, (B, H, W) int16 with the index of the segment that owns each pixel, -1
              for none, and (B, max N_i) int64 labels filled up with -100. Segments are in ascending order of their
              value in the map; padding belongs to none. As `"label_map"`, instead `labels` (B, H, W) int64 with the
              label of each pixel, and `ignore_index` (255 unless set) where no segment or padding is.

        Raises:
            ValueError: images, maps or settings that do not fit, naming the image by its index.
        """
        settings = self._settings_with(overrides)
        if target_format not in ("masks", "segment_map", "label_map"):
            raise ValueError(f'target_format is {target_format!r}; give "masks", "segment_map" or "label_map".')
        pixels = [_read_image(image, index, input_data_format) for index, image in _enumerate("images", images, 3)]
        _warn_of_double_rescaling(pixels, settings)
        sizes = [_size_of(image) for image in pixels]
        resized_sizes = [settings.resized_size(size) for size in sizes]
        padded_size = settings.padded_size(resized_sizes)
        resized = [resize_image(*pair, settings.resample) for pair in zip(pixels, resized_sizes, strict=True)]
        data = _normalise_and_pad(resized, padded_size, settings)
        if segmentation_maps is not None:
            numbered = _enumerate("segmentation_maps", segmentation_maps, 2)
            maps = [read_segmentation_map(segmentation_map, index) for index, segmentation_map in numbered]
            check_map_sizes(maps, sizes)
            instance_labels = instance_labels_of_images(instance_id_to_semantic_id, len(maps))
            segments = [
                split_segmentation_map(resize_nearest(maps[index], size), settings, instance_labels[index], index)
                for index, size in enumerate(resized_sizes)
            ]
            if target_format == "label_map":
                ignore_index = COMMON_IGNORE_VALUE if settings.ignore_index is None else settings.ignore_index
                data["labels"] = pad_as_label_map(segments, padded_size, ignore_index)
            else:
                pad = pad_as_masks if target_format == "masks" else pad_as_segment_map
                data["mask_labels"], data["class_labels"] = pad(segments, padded_size)
        elif instance_id_to_semantic_id is not None:
            raise ValueError("instance_id_to_semantic_id is given without segmentation_maps that hold these ids.")
        return _batch_feature(data, return_tensors)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[Size] | None = None
    ) -> list[Tensor]:
        """Gives each pixel a label, as the paper does (see `semantic_segmentation`).

        Args:
            outputs: of the model, or of a per-pixel baseline. Without their `image_sizes` and `padded_sizes` (from
                transformers' model), an image is taken to fill its input, and its input to be four times the size of
                the mask logits.
            target_sizes: the (height, width) of each result, usually that of the original image; without it, results
                have the size that the image had in the batch.

        Returns:
            One (height, width) int64 map of labels per image.
        """
        if hasattr(outputs, "logits"):
            return per_pixel_segmentation(outputs.logits, outputs.image_sizes, outputs.padded_sizes, target_sizes)
        return semantic_segmentation(*_logits_and_sizes(outputs), target_sizes)

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: Sequence[Size] | None = None,
    ) -> list[dict[str, Any]]:
        """Gives each pixel to at most one segment, as the paper does (see `panoptic_segmentation`).

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold, mask_threshold, overlap_mask_area_threshold: as in `panoptic_segmentation`.
            label_ids_to_fuse: labels of which all queries form one segment; without it, those of the processor.

        Returns:
            One dictionary per image: `segmentation`, (height, width) int32 with ids of segments and 0 for void, and
            `segments_info`, for each segment its `id`, `label_id`, `was_fused` and `score`.
        """
        if label_ids_to_fuse is None:
            label_ids_to_fuse = self._settings_with({}).label_ids_to_fuse or ()
        thresholds = threshold, mask_threshold, overlap_mask_area_threshold
        return panoptic_segmentation(*_logits_and_sizes(outputs), *thresholds, label_ids_to_fuse, target_sizes)

    def _settings_with(self, overrides: Mapping[str, Any]) -> ImageProcessorSettings:
        own = {name: getattr(self, name) for name in SETTINGS}
        return ImageProcessorSettings(**own | current_settings(overrides, own["size"]))


def resize_image(image: Tensor, size: Size, resample: int) -> Tensor:
    """Resizes an image (3, h, w), uint8 or float, to (3, H, W) with the antialiased filter of this number in PIL.

    Bilinear uint8 results lie within one level of PIL's.
    """
    if _size_of(image) == size:
        return image
    if RESAMPLING[resample] == "nearest":
        return resize_nearest(image, size)
    return F.interpolate(image[None], size, mode=RESAMPLING[resample], antialias=True, align_corners=False)[0]


def resize_nearest(pixels: Tensor, size: Size) -> Tensor:
    """Resizes (..., h, w) of any type to (..., H, W): each pixel takes the value at its centre, as in PIL."""
    for axis, length in ((-1, size[1]), (-2, size[0])):
        if pixels.shape[axis] != length:
            step = pixels.shape[axis] / length
            # Summed up step by step as PIL does, so that a centre between two pixels falls on the same side.
            centres = np.cumsum([step / 2] + [step] * (length - 1))
            pixels = pixels.index_select(axis, torch.from_numpy(centres.astype(np.int64)))
    return pixels


def _normalise_and_pad(images: Sequence[Tensor], size: Size, settings: ImageProcessorSettings) -> dict[str, Any]:
    factor = settings.rescale_factor if settings.do_rescale else 1.0
    mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else ([0.0] * 3, [1.0] * 3)
    # (pixel * factor - mean) / std, with two passes over the pixels instead of three.
    scale = torch.tensor([factor / deviation for deviation in std])[:, None, None]
    shift = torch.tensor([average / deviation for average, deviation in zip(mean, std, strict=True)])[:, None, None]
    pixel_values = torch.zeros(len(images), 3, *size)
    pixel_mask = torch.zeros(len(images), *size, dtype=torch.int64)
    for index, image in enumerate(images):
        height, width = _size_of(image)
        pixel_values[index, :, :height, :width].copy_(image).mul_(scale).sub_(shift)
        pixel_mask[index, :height, :width] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def _batch_feature(data: dict[str, Any], return_tensors: Any) -> BatchFeature:
    kind = getattr(return_tensors, "value", return_tensors)
    if kind not in (None, "pt", "np"):
        raise ValueError(f'return_tensors is {return_tensors!r}; give "pt" or "np".')
    if kind == "np":
        for name, value in data.items():
            data[name] = [each.numpy() for each in value] if isinstance(value, list) else value.numpy()
    return BatchFeature(data)


def _enumerate(name: str, items: Any, num_dimensions: int) -> Iterator[tuple[int, Any]]:
    """Numbers the items of a list or of a stacked array; anything else is one item."""
    if items is None:
        raise ValueError(f"{name} is None; give at least one image.")
    if isinstance(items, np.ndarray | Tensor) and items.ndim > num_dimensions:
        items = list(items)
    if not isinstance(items, list | tuple):
        items = [items]
    if len(items) == 0:
        raise ValueError(f"{name} is empty; give at least one image.")
    return enumerate(items)


def _read_image(image: Any, index: int, input_data_format: str | None) -> Tensor:
    """Gives (3, h, w), uint8 or float32."""
    if isinstance(image, str | Path):
        is_url = str(image).startswith(("http://", "https://"))
        image = load_image(str(image)) if is_url else ImageOps.exif_transpose(Image.open(image))
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise ValueError(f"Image {index} has mode {image.mode}, more than 8 bits; convert it to RGB first.")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if not isinstance(image, np.ndarray | Tensor):
        kind = type(image).__name__
        raise ValueError(f"Image {index} is a {kind}; give a PIL image, an array, a tensor, a path or a URL.")
    pixels = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image, order="C"))
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and _channels_are_last(tuple(pixels.shape), input_data_format):
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or len(pixels) not in (1, 3, 4) or pixels.numel() == 0:
        raise ValueError(
            f"Image {index} has shape {tuple(image.shape)}; give (height, width), or height, width and 1, 3 or 4 "
            "channels, which may come first or last."
        )
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    return pixels if pixels.dtype == torch.uint8 else pixels.float()


def _channels_are_last(shape: tuple[int, ...], input_data_format: str | None) -> bool:
    if input_data_format is not None:
        return getattr(input_data_format, "value", input_data_format) == "channels_last"
    # Three channels are the most likely, then grey and RGBA; where both ends fit, the first are the channels.
    counts = [count for count in (3, 1, 4) if count in (shape[0], shape[-1])]
    return bool(counts) and shape[0] != counts[0]


def _warn_of_double_rescaling(images: Sequence[Tensor], settings: ImageProcessorSettings) -> None:
    if settings.do_rescale and any(image.is_floating_point() and image.max() <= 1 for image in images):
        logger.warning_once("Images lie between 0 and 1 already and are rescaled again; set do_rescale=False.")


def _logits_and_sizes(outputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    class_logits, mask_logits = outputs.class_queries_logits, outputs.masks_queries_logits
    image_sizes = getattr(outputs, "image_sizes", None)
    if image_sizes is None:
        height, width = mask_logits.shape[-2:]
        input_sizes = torch.tensor([[4 * height, 4 * width]] * len(mask_logits))
        return class_logits, mask_logits, input_sizes, input_sizes
    return class_logits, mask_logits, image_sizes, outputs.padded_sizes


def _size_of(pixels: Tensor) -> Size:
    return pixels.shape[-2], pixels.shape[-1]
