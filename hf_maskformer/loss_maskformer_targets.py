"""The segments of a batch, in the forms in which matching and losses ask for them.

Letters: B images, N segments in one image, P pixels or points; H x W is the padded image, h x w = H/4 x W/4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NO_SEGMENT = -1  # in an index map: the pixel belongs to no segment
NO_LABEL = -100  # in a padded tensor of labels: there is no such segment


@dataclass
class Targets:
    """The segments of a batch, on the device of the logits.

    Args:
        labels: (B, N) int64, -100 where an image has fewer segments.
        masks: One tensor per image: an index map (H, W) int16 (-1 = no segment) or masks (N_i, H, W) bool.
        size: (H, W).
    """

    labels: Tensor
    masks: list[Tensor]
    size: tuple[int, int]


def prepare_targets(
    mask_labels: Tensor | Sequence[Tensor],
    class_labels: Tensor | Sequence[Tensor],
    batch_size: int,
    size: Sequence[int] | None = None,
) -> Targets:
    """Brings every form of labels to one, without waiting for the device.

    Masks in list form may end where their image does: they are then padded on the right and below to the size of the
    batch, which the largest of them must fill.

    Args:
        mask_labels: B tensors (N_i, H_i, W_i), 1 inside, or an index map (B, H, W).
        class_labels: B tensors (N_i,), or (B, N) padded with -100.
        batch_size: B.
        size: (H, W); None takes that of the largest masks.

    Raises:
        ValueError: Labels of another number of images, or masks of another size than the padded images.
    """
    if len(mask_labels) != len(class_labels):
        raise ValueError(f"mask_labels are of {len(mask_labels)} images, but class_labels of {len(class_labels)}.")
    if len(class_labels) != batch_size:
        raise ValueError(f"The labels are of {len(class_labels)} images, but the batch has {batch_size}.")
    labels = (
        class_labels.long()
        if isinstance(class_labels, Tensor)
        else torch.nn.utils.rnn.pad_sequence([labels.long() for labels in class_labels], True, NO_LABEL)
    )
    sizes = [tuple(image_masks.shape[-2:]) for image_masks in mask_labels]
    largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
    height, width = largest if size is None else size
    if largest != (height, width):
        raise ValueError(
            f"mask_labels are {largest[0]} x {largest[1]} pixels, but the padded images have {height} x {width}. Masks "
            "must be resized and padded (with 0, or -1 in an index map) together with their images."
        )
    masks = [
        # Two bytes suffice for all indices that have a label; one that has none is refused later.
        image_masks.long().clamp(NO_SEGMENT, torch.iinfo(torch.int16).max).to(torch.int16)
        if image_masks.dim() == 2
        # transformers' image processor pads its float masks with 255, which is no part of a segment.
        else F.pad(image_masks == 1, (0, width - image_masks.shape[2], 0, height - image_masks.shape[1]))
        for image_masks in mask_labels
    ]
    return Targets(labels, masks, (int(height), int(width)))


def checked_labels(targets: Targets, num_labels: int) -> list[list[int]]:
    """The labels of every image as numbers. Waits for the device.

    Raises:
        ValueError: A label outside 0 to K - 1, an index map that points past the labels, or numbers of masks and
            labels that differ.
    """
    highest = torch.stack(
        [m.max().long() if m.dim() == 2 else m.new_tensor(-1, dtype=torch.long) for m in targets.masks]
    )
    rows = targets.labels.tolist()
    labels = [[label for label in row if label != NO_LABEL] for row in rows]
    for image, (image_labels, image_masks, index) in enumerate(
        zip(labels, targets.masks, highest.tolist(), strict=True)
    ):
        if rows[image][: len(image_labels)] != image_labels:
            raise ValueError(
                f"class_labels of image {image} have {NO_LABEL} before their end, but it only pads on the right: the "
                "index of a segment is the place of its label."
            )
        if index >= len(image_labels):
            raise ValueError(
                f"mask_labels of image {image} point to segment {index}, but it has {len(image_labels)} class_labels."
            )
        if image_masks.dim() == 3 and len(image_masks) != len(image_labels):
            raise ValueError(f"Image {image} has {len(image_masks)} masks, but {len(image_labels)} labels.")
        if image_labels and not 0 <= min(image_labels) <= max(image_labels) < num_labels:
            raise ValueError(
                f"Image {image} has the class labels {sorted(set(image_labels))}, but the model has {num_labels} "
                f"classes (0 to {num_labels - 1}). Check id2label of the configuration against the data."
            )
    return labels


def masks_at(masks: Tensor, segments: Tensor, pixels: Tensor) -> Tensor:
    """Whether pixels belong to segments, (N, P) bool.

    Args:
        masks: An index map (H, W) or masks (N_i, H, W).
        segments: (N,).
        pixels: (P,) or (N, P), positions in the flattened image.
    """
    if masks.dim() == 2:
        return masks.flatten()[pixels] == segments[:, None]
    return masks.flatten(1)[segments[:, None], pixels]


def are_owned_at(masks: Tensor, pixels: Tensor) -> Tensor:
    """Whether pixels, of any shape, belong to any segment."""
    is_owned = masks >= 0 if masks.dim() == 2 else masks.any(0)
    return is_owned.flatten()[pixels]


def pixels_at_stride(size: Sequence[int], low_size: Sequence[int], device: torch.device) -> Tensor:
    """The pixels (h * w,) of H x W that nearest-neighbour interpolation keeps, as the matcher of the paper's code."""
    rows, columns = (
        # The library's own rounding, whatever the ratio is.
        F.interpolate(torch.arange(length, dtype=torch.float32, device=device)[None, None], low_length)[0, 0].long()
        for length, low_length in zip(size, low_size, strict=True)
    )
    return (rows[:, None] * size[1] + columns).flatten()


def pixels_of_segments(masks: Tensor, num_segments: int) -> tuple[Tensor, list[Tensor]]:
    """Positions in the flattened image of the pixels of no segment, and of those of each of the N segments."""
    if masks.dim() == 3:
        void = (~masks.any(0)).flatten().nonzero()[:, 0]
        pixels = masks.flatten(1).nonzero()[:, 1]
        return void, list(pixels.split(masks.sum((1, 2)).tolist()))
    owners, pixels = masks.flatten().sort(stable=True)
    starts = torch.searchsorted(owners, torch.arange(num_segments, device=masks.device, dtype=owners.dtype))
    void, *segments = pixels.tensor_split(starts.cpu())
    return void, segments
