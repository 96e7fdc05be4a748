"""Images and segmentation maps in, a batch out; model outputs in, segmentations out.

B images, N_i segments in image i, H x W the padded size of the batch. A segment is one region with one label in one
image. Sizes are (height, width). Images stay uint8 until they are written to the batch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, ModelOutput, logging

from .configuration_maskformer_parts import errors_as_value_errors
from .image_processing_maskformer_images import (
    empty_batch,
    enumerate_items,
    make_batch,
    read_image,
    size_of,
)
from .image_processing_maskformer_settings import (
    DEFAULT_INSTANCE_THRESHOLD,
    DEFAULT_PANOPTIC_THRESHOLDS,
    DEFAULT_SIZE,
    FIXED_SETTINGS,
    OLD_SETTINGS,
    SETTINGS,
    ImageProcessorSettings,
    current_settings,
    plain,
    unknown_settings,
)
from .image_processing_maskformer_targets import (
    COMMON_IGNORE_VALUE,
    check_ignore_value,
    check_map_sizes,
    instance_labels_of_images,
    is_single_map,
    pad_as_label_map,
    pad_as_masks,
    pad_as_segment_map,
    read_segmentation_map,
    resized_segments,
)
from .post_processing_maskformer import panoptic_segmentation, semantic_scores, semantic_segmentation
from .post_processing_maskformer_inputs import Size, logits_and_sizes, split_batch
from .post_processing_maskformer_instance import Form, instance_segmentation
from .post_processing_maskformer_tiles import Mode
from .post_processing_per_pixel_baseline import per_pixel_scores, per_pixel_segmentation

logger = logging.get_logger(__name__)

_BASE_CLASS_SETTINGS = {"feature_extractor_type", "image_processor_type", "processor_class", "auto_map"}


@dataclass
class SemanticSegmentation(ModelOutput):
    """A semantic segmentation with its scores.

    Args:
        segmentation: (height, width) int64, labels.
        segmentation_scores: (K, height, width) float32.
    """

    segmentation: Tensor | None = None
    segmentation_scores: Tensor | None = None


class MaskFormerImageProcessor(BaseImageProcessor):
    """Prepares images and segmentation maps for MaskFormer and turns the model's outputs into segmentations.

    Call it with images, and with segmentation maps to train (see `preprocess`); the `post_process_*` methods do the
    reverse. It reads and writes the `preprocessor_config.json` of transformers' class of the same name, including files
    from 2022 (`reduce_labels`, `size_divisibility`, an integer `size` with `max_size`), and does not need torchvision.

    Args:
        do_resize: whether to resize images and their maps.
        size: `{"shortest_edge", "longest_edge"}` scales to the shortest edge unless the longest would exceed its bound
            (which may be left out), `{"max_height", "max_width"}` to the largest size within both, and
            `{"height", "width"}` to exactly this size, whatever the aspect ratio. An integer is the shortest edge.
        size_divisor: the batch is padded (images are not stretched) until height and width are multiples of this; with
            0 or None only to the size of its largest image.
        resample: PIL's number for the image filter: 2 (bilinear), 3 (bicubic) or 0 (nearest). Maps use nearest.
        do_rescale, rescale_factor: whether to multiply pixels by this factor, by default 1 / 255.
        do_normalize, image_mean, image_std: whether to subtract the mean of each channel and divide by its standard
            deviation, by default those of ImageNet.
        ignore_index: the value of void pixels in segmentation maps, also in maps of ids.
        do_reduce_labels: labels in maps are one too high and 0 means "other": 1 becomes 0, and so on; 0 and the ignore
            value (255 unless ignore_index is set) are void. With `instance_id_to_semantic_id` it applies to the
            semantic ids.
        num_labels: maps are checked to hold only labels below this number; by default they are not checked.
        pad_size: `{"height", "width"}` of every batch, instead of that of its largest image.
        label_ids_to_fuse: labels of stuff classes, each of which forms a single segment in a panoptic segmentation.
        segmentation_task: what the model was trained for, "semantic", "instance" or "panoptic"; `MaskFormerPipeline`
            does that by default.
        panoptic_thresholds: `{"threshold", "mask_threshold", "overlap_mask_area_threshold"}` or some of them, the
            defaults of `post_process_panoptic_segmentation`; the paper's differ between data sets.

    Raises:
        ValueError: a setting is unknown, invalid or contradicts another.
    """

    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 (as the base class declares it)

    do_resize: bool
    size: dict[str, int]
    size_divisor: int
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]
    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None
    pad_size: dict[str, int] | None
    label_ids_to_fuse: list[int] | None
    segmentation_task: str | None
    panoptic_thresholds: dict[str, float] | None

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{name: settings.pop(name) for name in _BASE_CLASS_SETTINGS & settings.keys()})
        self._take(ImageProcessorSettings(**current_settings(settings, DEFAULT_SIZE)))

    def to_dict(self) -> dict[str, Any]:
        """The settings for a file, with Python's numbers instead of numpy's."""
        return {name: plain(value) for name, value in super().to_dict().items()}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers. Raises a ValueError for an invalid setting, and writes nothing."""
        self._take(self._settings_with({}))
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Reads the JSON of a processor. Raises an OSError if there is none, or it is not a JSON object."""
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        name = kwargs.get("image_processor_filename", IMAGE_PROCESSOR_NAME)
        if folder.is_dir() and not any((folder / each).is_file() for each in (name, PROCESSOR_NAME)):
            raise OSError(f"{folder} has no {name}. Save the image processor there too, with its save_pretrained.")
        try:
            return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, RecursionError) as error:
            raise OSError(f"{pretrained_model_name_or_path} holds no processor as a JSON object ({error}).") from error

    @classmethod
    @errors_as_value_errors("The image processor's file")
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a processor from the settings of a file. Settings among `kwargs`, old names too, override them.

        Returns the processor, or with `return_unused_kwargs=True` a tuple of it and the other `kwargs`. Raises a
        ValueError for a setting of a wrong type or with an invalid value.
        """
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        base = {name: value for name, value in image_processor_dict.items() if name in _BASE_CLASS_SETTINGS}
        settings = {name: value for name, value in image_processor_dict.items() if name not in base}
        if cls._auto_class is None:
            # It refers to files beside the one that was read, which a processor saved from here will not have.
            base.pop("auto_map", None)
        # A file from a later transformers may hold more; an argument of the caller must be known.
        unknown = unknown_settings(settings)
        if unknown:
            logger.warning(f"Unknown settings in the image processor's file are ignored: {', '.join(sorted(unknown))}.")
        settings = {name: value for name, value in settings.items() if name not in unknown}
        settings = current_settings(settings, DEFAULT_SIZE)
        overrides = {
            name: kwargs.pop(name) for name in (SETTINGS | OLD_SETTINGS | FIXED_SETTINGS.keys()) & kwargs.keys()
        }
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
        device: str | torch.device | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Makes a batch of images and, from segmentation maps, the training targets.

        Args:
            images: a PIL image, an array or tensor ((height, width, 3), (3, height, width) or (height, width), uint8 or
                float), a path or URL; a list of these or a stacked array. Files are rotated upright by their EXIF tag,
                PIL images are used as they are. 16-bit grey images and uint16 are scaled to 8 bits.
            segmentation_maps: for each image a PIL image, array or tensor of integers (height, width), of its size, or
                the path or URL of such an image (a palette image is read as indices); or a COCO panoptic PNG in colour,
                (height, width, 3) uint8, whose ids are R + 256 G + 65536 B.
            instance_id_to_semantic_id: the label of each segment id that maps hold; one dictionary for all images or a
                list with one for each. Without it maps hold labels, and all pixels of a label form one segment.
            target_format: `"masks"`, or `"segment_map"` for the same targets in a fraction of the memory; `"label_map"`
                for models that classify pixels, such as the per-pixel baselines.
            input_data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
            return_tensors: `"np"` for arrays; otherwise the batch holds tensors.
            device: where to resize and normalise, and to put the batch; by default the CPU.
            overrides: settings of the processor, for this call only.

        Returns:
            A dictionary with:

            - `pixel_values` (B, 3, H, W) float32, padded on the right and below with 0 after normalisation,
            - `pixel_mask` (B, H, W) int64, 1 in the image and 0 in the padding,
            - with maps, `mask_labels` and `class_labels`: as `"masks"`, lists of (N_i, H, W) bool masks and of (N_i,)
              int64 labels; as `"segment_map"`, (B, H, W) int16 (int32 in several processes, which cannot exchange
              int16, or where indices exceed it) with the index of the segment that owns each pixel, -1 for none, and
              (B, max N_i) int64 labels padded with -100. Segments are in ascending order of their value in the map;
              padding belongs to none. As `"label_map"`, instead `labels` (B, H, W) int64 with the label of each pixel,
              and `ignore_index` (255 unless set; not a label) for void pixels and padding.

        Raises:
            ValueError: images, maps or settings are invalid; the message gives the image's index.
        """
        settings = self._settings_with(overrides)
        if target_format not in ("masks", "segment_map", "label_map"):
            raise ValueError(f'target_format is {target_format!r}; give "masks", "segment_map" or "label_map".')
        numbered = enumerate_items("images", images, 3)
        pixels = [read_image(image, index, input_data_format) for index, image in numbered]
        _warn_of_wrong_rescaling(pixels, settings)
        sizes = [size_of(image) for image in pixels]
        resized_sizes = [settings.resized_size(size) for size in sizes]
        padded_size = settings.padded_size(resized_sizes)
        targets: dict[str, Any] = {}
        # Maps first, so that their errors show before the images are processed.
        if segmentation_maps is not None:
            check_ignore_value(settings, target_format)
            num_dimensions = 2 + is_single_map(segmentation_maps, len(pixels))
            numbered = enumerate_items("segmentation_maps", segmentation_maps, num_dimensions)
            has_ids = instance_id_to_semantic_id is not None
            maps = [read_segmentation_map(segmentation_map, index, has_ids) for index, segmentation_map in numbered]
            check_map_sizes(maps, sizes)
            instance_labels = instance_labels_of_images(instance_id_to_semantic_id, len(maps))
            segments = [
                resized_segments(segmentation_map, resized_sizes[index], settings, instance_labels[index], index)
                for index, segmentation_map in enumerate(maps)
            ]
            if target_format == "label_map":
                ignore_index = COMMON_IGNORE_VALUE if settings.ignore_index is None else settings.ignore_index
                targets["labels"] = pad_as_label_map(segments, padded_size, ignore_index, device)
            else:
                pad = pad_as_masks if target_format == "masks" else pad_as_segment_map
                targets["mask_labels"], targets["class_labels"] = pad(segments, padded_size, device)
        elif instance_id_to_semantic_id is not None:
            raise ValueError("instance_id_to_semantic_id is given without segmentation_maps that hold these ids.")
        data = make_batch(pixels, resized_sizes, padded_size, settings, device)
        return _batch_feature(data | targets, return_tensors)

    def pad_and_create_pixel_mask(
        self, pixel_values_list: Sequence[Any], return_tensors: str | None = None, **overrides: Any
    ) -> BatchFeature:
        """Makes a batch of images that are already resized and normalised.

        Args:
            pixel_values_list: arrays or tensors (3, height, width).
            return_tensors: `"np"` for arrays; otherwise the batch holds tensors.
            overrides: settings of the processor, for this call; only `size_divisor` and `pad_size` matter.

        Returns:
            A dictionary with `pixel_values` and `pixel_mask` as `preprocess` gives them.

        Raises:
            ValueError: there is no image, or one has another shape or does not fit into `pad_size`.
        """
        numbered = enumerate_items("pixel_values_list", pixel_values_list, 3)
        images = [read_image(image, index, "channels_first") for index, image in numbered]
        sizes = [size_of(image) for image in images]
        data = empty_batch(sizes, self._settings_with(overrides).padded_size(sizes))
        for place, image, (height, width) in zip(data["pixel_values"], images, sizes, strict=True):
            place[:, :height, :width] = image
        return _batch_feature(data, return_tensors)

    def resized_size(self, size: Size) -> Size:
        """The (height, width) to which images of this size are resized, before padding."""
        return self._settings_with({}).resized_size(size)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Size] | None = None,
        return_segmentation_scores: bool = False,
        *,
        mode: Mode = "paper",
    ) -> list[Any]:
        """Assigns each pixel a label, as the paper does.

        Args:
            outputs: of the model, or of a per-pixel baseline. Without `image_sizes` and `padded_sizes` (from
                transformers' model), an image is assumed to fill its input, and its input to be four times the size of
                the mask logits.
            target_sizes: the (height, width) of each result, usually that of the original image; without it, results
                have the size that the image had in the batch.
            return_segmentation_scores: whether to return the scores too, at the cost of their memory: those of
                `semantic_scores`, or a baseline's probabilities.
            mode: what is resized to the target: `"paper"`, `"direct"` or `"fast"` (see `semantic_scores`). Baselines
                support only `"paper"`.

        Returns:
            One (height, width) int64 map of labels per image; or with scores, one `SemanticSegmentation`.

        Raises:
            ValueError: the mode is unknown or unsupported by the model, logits are not finite, or target_sizes does not
                match the batch.
        """
        if hasattr(outputs, "logits"):
            if mode != "paper":
                raise ValueError(f'A per-pixel baseline has no masks to resize, so its mode is "paper", not {mode!r}.')
            self._warn_of_padding(outputs.image_sizes, outputs.padded_sizes, target_sizes)
            logits = outputs.logits, outputs.image_sizes, outputs.padded_sizes, target_sizes
            if not return_segmentation_scores:
                return per_pixel_segmentation(*logits)
            all_scores = per_pixel_scores(*logits)
        else:
            batch = self._batch(outputs, target_sizes)
            if not return_segmentation_scores:
                return semantic_segmentation(*batch, target_sizes, mode)
            images = split_batch(*batch, target_sizes)
            all_scores = [semantic_scores(*image[:2], *image.sizes, mode) for image in images]
        return [SemanticSegmentation(scores.argmax(dim=0), scores) for scores in all_scores]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = DEFAULT_INSTANCE_THRESHOLD,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: Sequence[Size] | None = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool | None = False,
        *,
        top_k: int | None = None,
        min_area: int = 1,
    ) -> list[dict[str, Any]]:
        """Finds instances, which may overlap, in descending order of score (see `instance_segmentation`).

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold, mask_threshold, overlap_mask_area_threshold, top_k, min_area: as in `instance_segmentation`.
            return_coco_annotation: return masks in COCO's run-length encoding instead of an id map.
            return_binary_maps: return masks instead of an id map.

        Returns:
            One dictionary per image: `segmentation`, (height, width) int32 with ids of instances, the highest-scoring
            on top, and 0 for void, or (N, height, width) bool masks, or N run-length encodings; and `segments_info`,
            for each instance its `id`, `label_id`, `was_fused` and `score`, in descending order of score.

        Raises:
            ValueError: both other forms are requested; see also `instance_segmentation`.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps exclude each other; set one of them.")
        form: Form = "rle" if return_coco_annotation else "masks" if return_binary_maps else "id_map"
        thresholds = threshold, mask_threshold, overlap_mask_area_threshold
        batch = self._batch(outputs, target_sizes)
        return instance_segmentation(*batch, *thresholds, target_sizes, form, top_k, min_area)

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: Sequence[Size] | None = None,
    ) -> list[dict[str, Any]]:
        """Assigns each pixel to at most one segment, as the paper does (see `panoptic_segmentation`).

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold, mask_threshold, overlap_mask_area_threshold: as in `panoptic_segmentation`; by default those of
                the processor's `panoptic_thresholds`, and for what that leaves out 0.5, 0.5 and 0.8.
            label_ids_to_fuse: labels whose queries are fused into one segment each; by default those of the processor.

        Returns:
            One dictionary per image: `segmentation`, (height, width) int32 with ids of segments and 0 for void, and
            `segments_info`, for each segment its `id`, `label_id`, `was_fused` and `score`.

        Raises:
            ValueError: see `panoptic_segmentation`.
        """
        settings = self._settings_with({})
        if label_ids_to_fuse is None:
            label_ids_to_fuse = settings.label_ids_to_fuse or ()
        defaults: dict[str, Any] = DEFAULT_PANOPTIC_THRESHOLDS | (settings.panoptic_thresholds or {})
        given = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap_mask_area_threshold,
        }
        thresholds = defaults | {name: value for name, value in given.items() if value is not None}
        batch = self._batch(outputs, target_sizes)
        return panoptic_segmentation(
            *batch, **thresholds, label_ids_to_fuse=label_ids_to_fuse, target_sizes=target_sizes
        )

    def _batch(self, outputs: Any, target_sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = logits_and_sizes(outputs)
        self._warn_of_padding(*batch[2:], target_sizes)
        return batch

    def _warn_of_padding(self, image_sizes: Tensor, padded_sizes: Tensor, target_sizes: Sequence[Size] | None) -> None:
        """Warns if the model treated padding as image: targets of the original sizes tell how much there is."""
        if target_sizes is None or not torch.equal(image_sizes, padded_sizes):
            return
        settings = self._settings_with({})
        try:
            targets = [(int(height), int(width)) for height, width in target_sizes]
            sizes = [settings.resized_size(target) for target in targets]
            padded_size = settings.padded_size(sizes)
        except (TypeError, ValueError, ArithmeticError):
            return  # they are not sizes, which is reported later, or not the original ones
        is_padded = any(padded_size not in (target, size) for target, size in zip(targets, sizes, strict=True))
        if is_padded and padded_size == tuple(padded_sizes[0].tolist()):
            logger.warning_once(
                "The model was called without pixel_mask, or ignores it, so it treated padding as image, and results "
                "are shifted. Pass it all outputs of the image processor: model(**inputs)."
            )

    def _take(self, settings: ImageProcessorSettings) -> None:
        for name in SETTINGS:
            setattr(self, name, getattr(settings, name))

    def _settings_with(self, overrides: Mapping[str, Any]) -> ImageProcessorSettings:
        own = {name: getattr(self, name) for name in SETTINGS}
        return ImageProcessorSettings(**own | current_settings(overrides, own["size"]))


def _batch_feature(data: dict[str, Any], return_tensors: Any) -> BatchFeature:
    kind = getattr(return_tensors, "value", return_tensors)
    if kind not in (None, "pt", "np"):
        raise ValueError(f'return_tensors is {return_tensors!r}; give "pt" or "np".')
    if kind == "np":
        for name, value in data.items():
            is_list = isinstance(value, list)
            data[name] = [each.numpy(force=True) for each in value] if is_list else value.numpy(force=True)
    return BatchFeature(data)


def _warn_of_wrong_rescaling(images: Sequence[Tensor], settings: ImageProcessorSettings) -> None:
    if settings.do_rescale and any(image.is_floating_point() and image.max() <= 1 for image in images):
        logger.warning_once("Images are already between 0 and 1 and are rescaled again; set do_rescale=False.")
    # A factor for 16-bit images, which are read as 8-bit.
    blackens_bytes = settings.do_rescale and settings.rescale_factor < 1e-4
    if blackens_bytes and not all(image.is_floating_point() for image in images):
        logger.warning_once(
            "Integer images, 16-bit ones too, are read as 0 to 255, and become black with the rescale_factor "
            f"{settings.rescale_factor:.2g}; leave it at 1 / 255."
        )
