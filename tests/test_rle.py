"""Run lengths and polygons: by hand, against each other, and against COCO's own tools where these are installed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from hf_maskformer.data.rle import decode_mask, decode_rle, draw_polygons, encode_rle

masks = st_numpy.arrays(bool, st_numpy.array_shapes(min_dims=2, max_dims=2, max_side=40))


def test_runs_go_down_the_columns_and_begin_with_background():
    assert decode_rle([1, 2, 3], (2, 3)).tolist() == [[False, True, False], [True, False, False]]
    assert decode_rle([0, 6], (2, 3)).all()


@settings(deadline=None)
@given(masks)
def test_packing_and_unpacking_gives_the_mask_back(mask):
    assert (decode_rle(encode_rle(mask), mask.shape) == mask).all()
    assert (decode_rle(encode_rle(mask).encode(), mask.shape) == mask).all()


@settings(deadline=None)
@given(masks)
def test_packed_runs_are_those_of_cocos_tools(mask):
    tools = pytest.importorskip("pycocotools.mask")
    packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert encode_rle(mask) == packed.decode()


@settings(deadline=None, max_examples=300)
@given(st.data(), st.tuples(st.integers(1, 50), st.integers(1, 50)), st.integers(3, 8), st.booleans())
def test_polygons_are_drawn_as_cocos_tools_draw_them(data, size, num_corners, is_whole):
    tools = pytest.importorskip("pycocotools.mask")
    coordinate = st.floats(-min(size), 2 * min(size), width=32).map(round if is_whole else float)
    polygons = [data.draw(st.lists(coordinate, min_size=2 * num_corners, max_size=2 * num_corners)) for _ in range(2)]
    polygons[1] += polygons[1][:2]  # some close their outline by repeating a corner
    expected = tools.decode(tools.merge(tools.frPyObjects(polygons, *size)))
    assert (draw_polygons(polygons, size) == expected).all()


def test_a_square_polygon_covers_the_pixels_whose_centres_it_holds():
    mask = draw_polygons([[1, 1, 3, 1, 3, 3, 1, 3]], (4, 5))
    assert np.argwhere(mask).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_polygons_of_one_object_are_joined():
    mask = draw_polygons([[0, 0, 2, 0, 2, 2, 0, 2], [3, 0, 4, 0, 4, 2, 3, 2]], (2, 4))
    assert mask.tolist() == [[True, True, False, True]] * 2


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "neither a list of polygons nor an RLE"),
        ({"size": [2, 3]}, "neither a list of polygons nor an RLE"),
        ({"size": [3, 2], "counts": [6]}, r"has the size \[3, 2\], but its image is 2 x 3"),
        ({"size": None, "counts": [6]}, "has the size None, but its image is 2 x 3"),
        ({"size": 6, "counts": [6]}, "has the size 6, but its image is 2 x 3"),
        ({"size": [2, 3], "counts": [4]}, "has runs of 4 pixels in total, but its image has 6"),
        ({"size": [2, 3], "counts": [4, 3]}, "has runs of 7 pixels in total, but its image has 6"),
        ({"size": [2, 3], "counts": [10**15]}, "has a run of 1000000000000000 pixels, but its image has 6"),
        ({"size": [2, 3], "counts": [8, -2]}, "has a run of -2 pixels"),
        ({"size": [2, 3], "counts": [1.5, 4.5]}, "has counts that are not a list of integers"),
        ({"size": [2, 3], "counts": [[6]]}, "has counts that are not a list of integers"),
        ({"size": [2, 3], "counts": []}, "has runs of 0 pixels in total"),
        ({"size": [2, 3], "counts": ""}, "has runs of 0 pixels in total"),
        ({"size": [2, 3], "counts": "6~"}, "a character that they never contain"),
        ({"size": [2, 3], "counts": "6é"}, "has runs of|a character that they never contain"),
        ({"size": [2, 3], "counts": "P"}, "end within a number"),
        ({"size": [2, 3], "counts": "P" * 30 + "0"}, "with a number of 31 digits"),
        ({"size": [2, 3], "counts": "ooooooo0"}, "has a run of"),
        ([], "has no polygon"),
        ([[1, 1, 2, 2]], "polygon of 4 numbers"),
        ([[1, 1, 2, 2, 3, 3, 4]], "polygon of 7 numbers"),
        ([["a", 1, 2, 2, 3, 3]], "which is not a list of numbers"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], r"has the coordinate 1000000000\.0, far outside its image"),
        ([[0, 0, float("nan"), 0, 1, 1]], "has the coordinate nan, far outside"),
    ],
)
def test_what_does_not_fit_the_image_is_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(segmentation, (2, 3))


def test_a_size_may_be_a_tuple_or_an_array():
    mask = np.array([[True, False, True], [False, False, True]])
    for size in ((2, 3), np.array([2, 3])):
        assert np.array_equal(decode_mask({"size": size, "counts": encode_rle(mask)}, (2, 3)), mask)
