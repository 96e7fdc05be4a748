"""The segments of a batch, in the forms that matching and losses need.

Letters: B images, N segments in one image, P pixels or points; H x W is the padded image, h x w = H/4 x W/4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NO_SEGMENT = -1  # in an index map: the pixel belongs to no segment
NO_LABEL = -100  # in a padded tensor of labels: there is no such segment
MAX_SEGMENTS_OF_MAP = torch.iinfo(torch.int16).max
FLOAT_PADDING = 255  # in masks of floating type: padding by transformers' image processor, part of no segment


@dataclass
class Targets:
    """The segments of a batch, on the device of the logits.

    Args:
        labels: (B, N) int64, -100 where an image has fewer segments.
        masks: One tensor per image: an index map (H, W) int16 (-1 = no segment) or masks (N_i, H, W) bool.
        size: (H, W).
        mask_sizes: (height, width) of each image's masks as they were given.
        image_sizes: (B, 2) int64, (height, width) of each image without its padding, for the check of `mask_sizes`.
        values: (B,) float32, an invalid value in each image's masks, or a valid one if there is none.
        pixels: For each image the positions of its pixels in the flattened image, sorted by the segment that owns them,
            those of no segment first, (H * W,); None if it has masks, or if not requested.
        starts: (B, N + 1) int64, where in `pixels` those of each segment start, and where those of the last end. Masks
            may overlap and have no such list: there the running sum of void and segment areas; 0 if not requested.
    """

    labels: Tensor
    masks: list[Tensor]
    size: tuple[int, int]
    mask_sizes: list[tuple[int, ...]]
    image_sizes: Tensor
    values: Tensor
    pixels: list[Tensor | None]
    starts: Tensor


def prepare_targets(
    mask_labels: Tensor | Sequence[Tensor],
    class_labels: Tensor | Sequence[Tensor],
    batch_size: int,
    size: Sequence[int] | None = None,
    device: torch.device | None = None,
    sort_pixels: bool = False,
    image_sizes: Tensor | None = None,
) -> Targets:
    """Converts every form of labels to one, without waiting for the device.

    In a list masks and index maps may end where their image does: they are then padded on the right and below to the
    size of the batch. Without `image_sizes`, the largest of them must fill the batch.

    Args:
        mask_labels: B tensors (N_i, H_i, W_i), 1 inside (integers: not 0), or index maps (B, H, W) or (H_i, W_i) each.
        class_labels: B tensors (N_i,), or (B, N) padded with -100.
        batch_size: B.
        size: (H, W); None means that of the largest masks.
        device: Device of the targets; None leaves them where they are.
        sort_pixels: Make `pixels` and `starts`.
        image_sizes: (B, 2), (height, width) of each image without its padding; compared by `checked_labels`.

    Raises:
        ValueError: The number of images, the size of the masks, or the shape or type of a tensor does not match.
    """
    if len(mask_labels) != len(class_labels):
        raise ValueError(
            f"mask_labels are for {len(mask_labels)} images, but class_labels for {len(class_labels)}. Give both for "
            "every image."
        )
    if len(class_labels) != batch_size:
        raise ValueError(
            f"The labels are for {len(class_labels)} images, but the batch has {batch_size}. Give labels for each "
            "image."
        )
    _check_forms(mask_labels, class_labels)
    labels = (
        class_labels.long()
        if isinstance(class_labels, Tensor)
        else torch.nn.utils.rnn.pad_sequence([labels.long() for labels in class_labels], True, NO_LABEL)
    )
    sizes = [tuple(image_masks.shape[-2:]) for image_masks in mask_labels]
    largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
    height, width = largest if size is None else size
    is_wrong = largest != (height, width) if image_sizes is None else largest[0] > height or largest[1] > width
    if is_wrong:
        raise ValueError(
            f"mask_labels are {largest[0]} x {largest[1]} pixels, but the padded images have {height} x {width}. Masks "
            "must be resized and padded (with 0, or -1 in an index map) together with their images."
        )
    labels = labels.to(device or labels.device)
    masks, values, pixels, starts = [], [], [], []
    for image_masks in mask_labels:
        prepared, value = _prepared_masks(image_masks, (height, width))
        masks.append(prepared.to(labels.device))
        values.append(value.to(labels.device))
        pixels_of_image, starts_of_image = (
            _pixels_and_starts(masks[-1], labels.shape[1])
            if sort_pixels
            else (None, labels.new_zeros(labels.shape[1] + 1))
        )
        pixels.append(pixels_of_image)
        starts.append(starts_of_image)
    image_sizes = labels.new_tensor(sizes) if image_sizes is None else image_sizes.to(labels.device, torch.int64)
    padded_size = int(height), int(width)
    return Targets(labels, masks, padded_size, sizes, image_sizes, torch.stack(values), pixels, torch.stack(starts))


def _check_forms(mask_labels: Tensor | Sequence[Tensor], class_labels: Tensor | Sequence[Tensor]) -> None:
    """Raises a ValueError for tensors of an invalid shape or type; values are checked later."""
    for image, masks in enumerate(mask_labels):
        if masks.dim() not in (2, 3):
            raise ValueError(
                f"mask_labels of image {image} have the shape {tuple(masks.shape)}, but must be masks (N, H, W) or an "
                "index map (H, W)."
            )
        if masks.dim() == 2 and (masks.is_floating_point() or masks.dtype == torch.bool):
            raise ValueError(
                f"mask_labels of image {image} are one map (H, W) of {masks.dtype}, but an index map holds integers. "
                "If it is a mask, give it the shape (1, H, W)."
            )
    for image, labels in enumerate(class_labels):
        # An empty tensor is floating-point by default.
        if labels.dim() != 1 or (labels.numel() > 0 and (labels.is_floating_point() or labels.dtype == torch.bool)):
            raise ValueError(
                f"class_labels of image {image} are {labels.dtype} of shape {tuple(labels.shape)}, but must be "
                "integers (N,), one for each segment."
            )
    for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=False)):
        if masks.dim() == 2 and len(labels) > MAX_SEGMENTS_OF_MAP:
            raise ValueError(
                f"class_labels of image {image} are {len(labels)}, but an index map has at most {MAX_SEGMENTS_OF_MAP} "
                "segments. Merge some, or give a list of masks."
            )


def _prepared_masks(masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The masks of one image as in `Targets`, and their entry in `values`."""
    value = masks.new_zeros((), dtype=torch.float32)
    padding = (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2])
    if masks.dim() == 2:
        # Two bytes suffice for all indices that have a label; others are rejected later, as are those below -1.
        prepared = masks.long().clamp(NO_SEGMENT - 1, MAX_SEGMENTS_OF_MAP).to(torch.int16)
    elif masks.is_floating_point():
        prepared = masks == 1
        if masks.numel() > 0:
            is_padding = masks == FLOAT_PADDING
            # Padding is common to all masks of an image, and never at its top left.
            is_padding &= is_padding.all(0) & ~is_padding[:, :1, :1]
            is_other = (masks != 0).logical_xor_(prepared).logical_and_(~is_padding)
            value = masks.flatten().take(is_other.view(torch.uint8).argmax()).float()
    else:
        prepared = masks != 0
    if any(padding):
        prepared = F.pad(prepared, padding, value=NO_SEGMENT if masks.dim() == 2 else False)
    return prepared, value


def _pixels_and_starts(masks: Tensor, num_segments: int) -> tuple[Tensor | None, Tensor]:
    """Entries of one image in `pixels` and `starts`; `num_segments` is N."""
    if masks.dim() == 2:
        owners, pixels = masks.flatten().sort(stable=True)
        segments = torch.arange(num_segments + 1, device=masks.device, dtype=owners.dtype)
        return pixels, torch.searchsorted(owners, segments)
    num_void = (~are_owned(masks)).sum()
    # One by one: a sum over all would convert all. That there are as many as labels is checked later.
    areas = [mask.sum() for mask in masks[:num_segments]]
    areas += [torch.zeros_like(num_void)] * (num_segments - len(areas))
    return None, torch.stack([num_void, *areas]).cumsum(0)


def copy_to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Copies tensors from their device to the host, all at once, since the synchronisation is what takes time."""
    parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    copies = torch.cat(parts).cpu().split([len(part) for part in parts])
    return [
        # A copy is aligned for its type; a slice need not be.
        copied.clone().view(tensor.dtype).view(tensor.shape).numpy()
        for copied, tensor in zip(copies, tensors, strict=True)
    ]


def host_check_tensors(targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, the lowest and highest index of each index map, `values` and `image_sizes`, for `checked_labels`."""
    no_bounds = targets.labels.new_full((2,), NO_SEGMENT)
    bounds = [torch.stack(masks.aminmax()).long() if masks.dim() == 2 else no_bounds for masks in targets.masks]
    return targets.labels, torch.stack(bounds), targets.values, targets.image_sizes


def checked_labels(
    targets: Targets,
    num_labels: int,
    labels: np.ndarray,
    bounds: np.ndarray,
    values: np.ndarray,
    image_sizes: np.ndarray,
) -> list[list[int]]:
    """The labels of every image as Python integers.

    Args:
        targets: The segments.
        num_labels: K.
        labels, bounds, values, image_sizes: `host_check_tensors`, on the host.

    Raises:
        ValueError: A label outside 0 to K - 1, an index map that points past the labels or below -1, numbers of masks
            and labels that differ, masks with invalid values, or masks that end neither where their image does nor
            where the batch does.
    """
    _check_mask_sizes(targets, image_sizes)
    rows = labels.tolist()
    labels_of_images = [[label for label in row if label != NO_LABEL] for row in rows]
    for image, (row, image_labels, masks, (lowest, index), value) in enumerate(
        zip(rows, labels_of_images, targets.masks, bounds.tolist(), values.tolist(), strict=True)
    ):
        if row[: len(image_labels)] != image_labels:
            raise ValueError(
                f"class_labels of image {image} have {NO_LABEL} before their end, but it only pads on the right: the "
                "index of a segment is the position of its label."
            )
        if index >= len(image_labels):
            raise ValueError(
                f"mask_labels of image {image} point to segment {index}, but it has {len(image_labels)} class_labels."
            )
        if lowest < NO_SEGMENT:
            raise ValueError(
                f"mask_labels of image {image} hold an index below {NO_SEGMENT}, which stands for pixels of no segment."
            )
        if masks.dim() == 3 and len(masks) != len(image_labels):
            raise ValueError(
                f"Image {image} has {len(masks)} masks, but {len(image_labels)} labels. (Accelerate cuts lists of a "
                "stream unless dispatch_batches=False.)"
            )
        if image_labels and not 0 <= min(image_labels) <= max(image_labels) < num_labels:
            raise ValueError(
                f"Image {image} has the class labels {sorted(set(image_labels))}, but the model has {num_labels} "
                f"classes (0 to {num_labels - 1}). Check id2label of the configuration against the data."
            )
        if value not in (0, 1):
            raise ValueError(
                f"mask_labels of image {image} contain {value:g}, but floating-point masks are 1 inside, 0 outside and "
                f"{FLOAT_PADDING} where there is padding in all masks. Make them bool, for example by a threshold."
            )
    return labels_of_images


def _check_mask_sizes(targets: Targets, image_sizes: np.ndarray) -> None:
    for image, (mask_size, image_size) in enumerate(zip(targets.mask_sizes, image_sizes.tolist(), strict=True)):
        has_masks = targets.masks[image].dim() == 2 or len(targets.masks[image]) > 0
        if has_masks and mask_size not in (targets.size, tuple(image_size)):
            raise ValueError(
                f"mask_labels of image {image} are {mask_size[0]} x {mask_size[1]} pixels, but the padded images have "
                f"{targets.size[0]} x {targets.size[1]}, and by its pixel_mask the image has {image_size[0]} x "
                f"{image_size[1]}. Resize masks together with their image; they may end where it or the batch does."
            )


def masks_at(masks: Tensor, segments: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Whether pixels belong to segments, (N, P) bool.

    Args:
        masks: An index map (H, W) or masks (N_i, H, W).
        segments: (N,).
        pixels: (P,) or (N, P), positions in the flattened image; None for all.
    """
    if masks.dim() == 2:
        owners = masks.flatten()
        return (owners if pixels is None else owners[pixels]) == segments[:, None]
    return masks.flatten(1)[segments] if pixels is None else masks.flatten(1)[segments[:, None], pixels]


def are_owned(masks: Tensor) -> Tensor:
    """Whether pixels belong to any segment, (H, W) bool; `masks` as in `Targets`."""
    if masks.dim() == 2:
        return masks >= 0
    if len(masks) == 0:
        return masks.new_zeros(masks.shape[1:])
    return masks.view(torch.uint8).amax(0).view(torch.bool)  # on a CPU far faster than any(0)


def pixels_at_stride(size: Sequence[int], low_size: Sequence[int], device: torch.device) -> Tensor:
    """The pixels (h * w,) of H x W that nearest-neighbour interpolation keeps, as in the paper's matcher."""
    rows, columns = (
        # torch's own rounding, whatever the ratio is.
        F.interpolate(torch.arange(length, dtype=torch.float32, device=device)[None, None], low_length)[0, 0].long()
        for length, low_length in zip(size, low_size, strict=True)
    )
    return (rows[:, None] * size[1] + columns).flatten()


def pixels_of_segment(targets: Targets, image: int, segment: int, starts: Sequence[int]) -> Tensor:
    """Positions in the flattened image of the pixels of a segment.

    Those of masks are found here, one mask at a time: all at once would take eight times the memory of the masks.

    Args:
        targets: The segments, with sorted pixels.
        image, segment: Which one.
        starts: Those of the image, see `Targets`, on the host.
    """
    start, stop = starts[segment], starts[segment + 1]
    pixels = targets.pixels[image]
    if pixels is None:
        return targets.masks[image][segment].flatten().nonzero_static(size=stop - start)[:, 0]
    return pixels[start:stop]


def void_pixels(targets: Targets, image: int, starts: Sequence[int]) -> Tensor:
    """Positions of the void pixels, likewise."""
    pixels = targets.pixels[image]
    if pixels is None:
        return (~are_owned(targets.masks[image])).flatten().nonzero_static(size=starts[0])[:, 0]
    return pixels[: starts[0]]
