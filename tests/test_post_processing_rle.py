"""COCO's run-length encoding: by hand, as the format is described, and against pycocotools."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_maskformer.post_processing_maskformer_rle import encode_tiles


def encode_masks(masks: torch.Tensor, side: int = 2) -> list[dict]:
    """Cuts masks (N, H, W) into tiles, leaves out the empty ones, and encodes the others."""
    height, width = masks.shape[1:]
    padded = torch.nn.functional.pad(masks, (0, -width % side, 0, -height % side))
    grid = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    places = grid.any(dim=(3, 4)).nonzero()
    counts = encode_tiles(len(masks), places[:, 0], places[:, 1:], grid[tuple(places.T)], (height, width))
    return [{"size": [height, width], "counts": each} for each in counts]


def test_run_lengths_go_down_the_columns_and_begin_with_zeros():
    masks = torch.tensor([[[0, 1], [1, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]]).bool()
    # 1 3; 0 1 3; 4: each as a character, 48 higher
    assert [entry["counts"] for entry in encode_masks(masks)] == ["13", "013", "4"]


def test_long_and_shrinking_runs_take_several_characters():
    mask = torch.zeros(1, 1, 141, dtype=torch.bool)
    mask[..., 100:130] = True
    mask[..., 140] = True
    # 100 = 3 x 32 + 4, 30 has its fifth bit set as a negative number would, then 10, and 1 - 30 = -29
    assert encode_masks(mask)[0]["counts"] == coco_string(100, 30, 10, 1 - 30)


def coco_string(*numbers: int) -> str:
    """Written as the format is described: two's complement, 5 bits at a time."""
    characters = ""
    for number in numbers:
        while True:
            digit, number = number & 31, number >> 5
            is_last = number == (-1 if digit & 16 else 0)
            characters += chr(48 + digit + (0 if is_last else 32))
            if is_last:
                break
    return characters


def test_a_run_goes_on_from_the_end_of_a_column_and_into_tiles_that_hold_none_of_it():
    full, halves = torch.ones(5, 3), torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    assert encode_masks(full[None].bool())[0]["counts"] == coco_string(0, 15)
    assert encode_masks(halves[None].bool())[0]["counts"] == coco_string(2, 4, 2, 2 - 4, 6 - 2)


def test_all_masks_leave_their_device_at_once(monkeypatch):
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or copy(tensor))
    assert len(encode_masks(torch.ones(5, 2, 3, dtype=torch.bool))) == 5
    assert len(copies) == 1


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_pycocotools_decodes_what_is_encoded(seed):
    coco = pytest.importorskip("pycocotools.mask")
    generator = torch.Generator().manual_seed(seed)
    height, width, period = (int(torch.randint(1, 60, (), generator=generator)) for _ in range(3))
    masks = torch.rand(3, -(-height // period), width, generator=generator).repeat_interleave(period, dim=1) > 0.6
    masks = masks[:, :height]
    encoded = encode_masks(masks, side=1 + seed % 9)
    assert torch.equal(torch.from_numpy(coco.decode(encoded)).permute(2, 0, 1).bool(), masks)
    assert coco.area(encoded).tolist() == masks.sum((1, 2)).tolist()
    fortran = numpy.asfortranarray(masks.permute(1, 2, 0).numpy().astype("uint8"))
    assert [entry["counts"].encode() for entry in encoded] == [entry["counts"] for entry in coco.encode(fortran)]
