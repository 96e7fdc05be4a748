"""Images and label maps in, a batch out; model outputs in, segmentations out.

B images in a batch, N_i segments in image i, H x W the padded size. A *segment* is one region with one label in one image;
a *segmentation map* (height, width) holds at each pixel a label, or the id of a segment whose label a dictionary tells.
Sizes are (height, width). Images stay uint8 until they lie in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import load_image

from .post_processing_maskformer import Size, panoptic_segmentation, semantic_segmentation

# Padding of class labels in the tensor form; the value that cross-entropy ignores by default.
NO_LABEL = -100

_DEFAULT_SHORTEST_EDGE, _DEFAULT_LONGEST_EDGE, _DEFAULT_SIZE_DIVISOR = 800, 1333, 32
_SIZE_FORMS = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"}, {"max_height", "max_width"})
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}

# Settings that transformers' own files may hold and that have only one meaning here.
_FIXED_SETTINGS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_pad": True,
    "do_center_crop": False,
    "default_to_square": False,
    "data_format": "channels_first",
    "crop_size": None,
    "device": None,
    "input_data_format": None,
    "return_tensors": None,
    "image_seq_length": None,
}
# Bookkeeping that older versions of transformers left in files.
_MEANINGLESS_SETTINGS = {"disable_grouping", "_valid_processor_keys", "_valid_kwargs_names", "_max_size"}
_BASE_CLASS_SETTINGS = {"feature_extractor_type", "image_processor_type", "processor_class", "auto_map"}


@dataclass
class ImageProcessorSettings:
    """The settings of `MaskFormerImageProcessor`, checked. See there for their meaning.

    Raises:
        ValueError: a setting has no meaning, naming it, its value and what it may be.
    """

    do_resize: bool = True
    size: dict[str, int] = field(
        default_factory=lambda: {"shortest_edge": _DEFAULT_SHORTEST_EDGE, "longest_edge": _DEFAULT_LONGEST_EDGE}
    )
    size_divisor: int = _DEFAULT_SIZE_DIVISOR
    resample: int = 2
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    ignore_index: int | None = None
    do_reduce_labels: bool = False
    num_labels: int | None = None
    pad_size: dict[str, int] | None = None
    label_ids_to_fuse: list[int] | None = None

    def __post_init__(self) -> None:
        pass
