import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from hf_maskformer.data.rle import encode_rle
from hf_maskformer.evaluation import label_placement
from hf_maskformer.evaluation.drawing import (
    draw_comparison,
    draw_segmentation,
    label_colors,
    legend_labels,
    segment_shades,
)
from hf_maskformer.image_processing_maskformer import SemanticSegmentation

ID2LABEL = {0: "sky", 1: "road", 2: "car"}
PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)


@pytest.fixture
def image():
    return Image.new("RGB", (40, 30), (100, 100, 100))


@pytest.fixture
def label_map():
    label_map = np.zeros((30, 40), dtype=np.uint8)
    label_map[:, 20:] = 1
    return label_map


def pixels(picture):
    return np.asarray(picture).tolist()


def test_a_label_keeps_its_colour_when_there_are_more_labels():
    np.testing.assert_array_equal(label_colors(5), label_colors(150)[:5])


def test_two_hundred_labels_have_two_hundred_colours():
    assert len(np.unique(label_colors(200), axis=0)) == 200


def test_the_first_labels_are_far_apart():
    colors = label_colors(12).astype(int)
    gaps = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(12, dtype=int)
    assert gaps.min() >= 85  # a third of one channel


def test_more_labels_than_colours_still_all_have_one():
    assert label_colors(1500).shape == (1500, 3)


def test_a_segment_blends_its_colour_with_the_image(image, label_map):
    drawn = pixels(draw_segmentation(image, label_map, ID2LABEL, palette=PALETTE, alpha=0.5))
    assert drawn[15][5] == [150, 50, 50]
    assert drawn[15][35] == [50, 150, 50]


def test_the_surest_of_overlapping_masks_lies_on_top_in_every_form(image):
    masks = np.zeros((2, 30, 40), dtype=bool)
    masks[0, 10:20, 10:20], masks[1, 5:15, 5:30] = True, True
    segments = [{"id": 1, "label_id": 2}, {"id": 2, "label_id": 0}]
    ids = np.where(masks[0], 1, 2 * masks[1])
    encodings = [{"size": [30, 40], "counts": encode_rle(mask)} for mask in masks]
    expected = draw_segmentation(image, ids, ID2LABEL, segments=segments)
    for segmentation in (ids, masks, encodings):
        result = {"segmentation": segmentation, "segments_info": segments}
        assert pixels(draw_segmentation(image, result, ID2LABEL)) == pixels(expected)


@pytest.mark.parametrize("nothing", [[], np.zeros((0, 30, 40), dtype=bool), np.zeros((30, 40), dtype=int)])
def test_where_nothing_was_found_the_image_stays_as_it_is(image, nothing):
    drawn = draw_segmentation(image, {"segmentation": nothing, "segments_info": []}, ID2LABEL)
    assert pixels(drawn) == pixels(image)


def test_a_semantic_result_with_scores_is_drawn_as_its_map(image, label_map):
    result = SemanticSegmentation(torch.from_numpy(label_map), torch.zeros(3, 30, 40))
    assert pixels(draw_segmentation(image, result, ID2LABEL)) == pixels(draw_segmentation(image, label_map, ID2LABEL))


def test_arrays_and_names_from_json_are_drawn_alike(image, label_map):
    names = {str(label): name for label, name in ID2LABEL.items()}
    drawn = draw_segmentation(np.asarray(image), label_map, names, legend=True, labels=True)
    assert pixels(drawn) == pixels(draw_segmentation(image, label_map, ID2LABEL, legend=True, labels=True))
    with pytest.raises(ValueError, match=r"The image is float64 of shape \(3, 30, 40\); give a PIL image"):
        draw_segmentation(np.zeros((3, 30, 40)), label_map, ID2LABEL)


def test_the_hue_of_a_label_does_not_depend_on_the_image(label_map):
    grey = Image.new("RGB", (40, 30), (76, 76, 76))
    red = Image.new("RGB", (40, 30), (255, 0, 0))  # as bright as that grey
    assert pixels(draw_segmentation(red, label_map, ID2LABEL)) == pixels(draw_segmentation(grey, label_map, ID2LABEL))


def test_a_border_darkens_both_sides_and_nothing_else(image, label_map):
    drawn = pixels(draw_segmentation(image, label_map, ID2LABEL, palette=PALETTE, alpha=0.5))
    row = [[150, 50, 50]] * 19 + [[90, 0, 0], [0, 90, 0]] + [[50, 150, 50]] * 19
    assert drawn == [row] * 30


def test_ignored_pixels_show_the_image(image, label_map):
    label_map[:, :10] = 255
    drawn = np.asarray(draw_segmentation(image, label_map, ID2LABEL))
    np.testing.assert_array_equal(drawn[:, :10], np.asarray(image)[:, :10])
    assert (drawn[:, 10:] != 100).any(-1).all()


def test_pixels_of_another_ignored_value_show_the_image_too(image, label_map):
    label_map[:, :10] = 7
    drawn = np.asarray(draw_segmentation(image, label_map, ID2LABEL, ignore_index=7))
    np.testing.assert_array_equal(drawn[:, :10], np.asarray(image)[:, :10])


def test_five_instances_of_one_label_have_five_shades():
    segments = [{"id": number, "label_id": 1} for number in range(1, 6)]
    shades = segment_shades(segments, PALETTE)
    assert len({tuple(shade) for shade in shades.values()}) == 5


def test_an_image_as_an_array_of_other_numbers_than_bytes_is_refused(label_map):
    with pytest.raises(ValueError, match=r"The image is float64 of shape \(30, 40, 3\)"):
        draw_segmentation(np.zeros((30, 40, 3)), label_map, ID2LABEL)


def test_masks_of_another_size_than_the_image_are_refused(image):
    result = {"segmentation": np.ones((1, 15, 20), bool), "segments_info": [{"id": 1, "label_id": 2}]}
    with pytest.raises(ValueError, match=r"map is \(15, 20\), but the image is \(30, 40\)"):
        draw_segmentation(image, result, ID2LABEL)


def test_segments_bear_the_names_of_their_labels(image, label_map):
    segments = [{"id": 1, "label_id": 2}, {"id": 2, "label_id": 0}]

    def drawn(names):
        return np.asarray(draw_segmentation(image, label_map + 1, names, segments=segments, labels=True))

    # There is no segment of label 1.
    np.testing.assert_array_equal(drawn(ID2LABEL), drawn(ID2LABEL | {1: "another"}))
    assert (drawn(ID2LABEL) != drawn(ID2LABEL | {2: "another"})).any()


def test_the_input_comes_before_the_panels(image):
    drawn = np.asarray(draw_comparison(image, [("truth", Image.new("RGB", image.size, "red"))], []))
    row = drawn[len(drawn) // 2]
    left, right = row[len(row) // 4], row[3 * len(row) // 4]
    assert (left.tolist(), right.tolist()) == ([100, 100, 100], [255, 0, 0])


def test_a_legend_enlarges_a_picture_to_the_least_width_for_it():
    image, label_map = Image.new("RGB", (200, 100)), np.zeros((100, 200), dtype=np.uint8)
    assert draw_segmentation(image, label_map, ID2LABEL, legend=True).width == 400


def test_a_map_that_is_all_ignored_gives_back_the_image(image):
    assert pixels(draw_segmentation(image, np.full((30, 40), 255), ID2LABEL)) == pixels(image)


def test_instances_of_one_label_differ_a_little_and_have_a_border(image):
    segmentation = np.zeros((30, 40), dtype=np.int32)
    segmentation[:, 10:25], segmentation[:, 25:] = 7, 9
    segments = [{"id": 7, "label_id": 2}, {"id": 9, "label_id": 2}]
    drawn = draw_segmentation(image, segmentation, ID2LABEL, palette=PALETTE, alpha=1, segments=segments)
    row = pixels(drawn)[15]
    assert row[5] == [100, 100, 100]
    assert row[15] == [0, 0, 200]
    assert row[35] == [77, 77, 217]  # 0.7 of the label's colour, 0.3 of white
    assert row[24] == [0, 0, 90]


def test_no_segments_leave_the_image(image):
    assert pixels(draw_segmentation(image, np.zeros((30, 40)), ID2LABEL, segments=[])) == pixels(image)


def test_a_result_of_post_processing_brings_its_segments(image, label_map):
    result = {"segmentation": label_map + 1, "segments_info": [{"id": 1, "label_id": 2}, {"id": 2, "label_id": 0}]}
    drawn = draw_segmentation(image, result, ID2LABEL)
    expected = draw_segmentation(image, result["segmentation"], ID2LABEL, segments=result["segments_info"])
    assert pixels(drawn) == pixels(expected)


def test_names_are_written_where_they_fit_and_never_overlap(monkeypatch):
    boxes = []
    monkeypatch.setattr(
        label_placement.ImageDraw.ImageDraw, "rounded_rectangle", lambda self, box, **style: boxes.append(box)
    )
    ids = np.tile(np.arange(300) // 20 + 1, (200, 1))  # stripes narrower than their names
    ids[:5, :] = 99  # thinner than the letters
    segments = [{"id": number, "label_id": 0} for number in (*range(1, 16), 99)]
    result = {"segmentation": ids, "segments_info": segments}
    draw_segmentation(Image.new("RGB", (300, 200)), result, {0: "a long name"}, labels=True)
    boxes.sort()
    assert len(boxes) >= 4
    assert all(first[2] <= second[0] for first, second in itertools.pairwise(boxes))
    assert all(0 <= left < right <= 300 and 0 <= top < bottom <= 200 for left, top, right, bottom in boxes)


def test_distances_are_taken_in_the_boxes_of_segments_that_may_hold_a_name(monkeypatch):
    sizes, transform = [], scipy.ndimage.distance_transform_edt
    monkeypatch.setattr(
        scipy.ndimage, "distance_transform_edt", lambda mask: sizes.append(mask.shape) or transform(mask)
    )
    ids = np.zeros((200, 300), dtype=int)
    ids[150:190, 200:280] = 70_000
    ids[10:13, 10:200], ids[20:100:40, 20:100:20] = 2, 3  # too thin; too few pixels, in a large box
    segments = [{"id": number, "label_id": 0} for number in (2, 3, 70_000)]
    result = {"segmentation": ids, "segments_info": segments}
    picture = draw_segmentation(Image.new("RGB", (300, 200)), result, {0: "name"}, labels=True)
    assert sizes == [(42, 82)]
    written = np.argwhere((np.asarray(picture) == 255).all(-1))
    assert ((written >= (150, 200)) & (written < (190, 280))).all()


def test_a_name_without_room_in_the_picture_is_left_out():
    image, ids = Image.new("RGB", (20, 20)), np.zeros((20, 20), dtype=int)
    name = {0: "much longer than twenty pixels"}
    assert pixels(draw_segmentation(image, ids, name, labels=True)) == pixels(draw_segmentation(image, ids, name))


def test_a_legend_lists_what_occurs_below_the_picture(image, label_map):
    drawn = draw_segmentation(image, label_map, ID2LABEL, palette=PALETTE, legend=True)
    assert drawn.width == 320  # enlarged eight times, for the names
    below = np.asarray(drawn)[240:]
    assert [(below == color).all(-1).any() for color in PALETTE] == [True, True, False]


def test_a_map_of_another_size_is_refused(image):
    with pytest.raises(ValueError, match=r"map is \(40, 30\), but the image is \(30, 40\)"):
        draw_segmentation(image, np.zeros((40, 30), dtype=int), ID2LABEL)


def test_an_id_without_label_is_refused(image, label_map):
    label_map[0, 0] = 9
    with pytest.raises(ValueError, match=r"contains id 9, .* add it to id2label"):
        draw_segmentation(image, label_map, ID2LABEL)
    with pytest.raises(ValueError, match=r"contains id 9, .* add it to segments"):
        draw_segmentation(image, label_map, ID2LABEL, segments=[{"id": 1, "label_id": 0}])


def test_a_segment_of_an_unknown_label_is_refused(image, label_map):
    with pytest.raises(ValueError, match="Segment 1 has label 3, but id2label goes up to 2"):
        draw_segmentation(image, label_map, ID2LABEL, segments=[{"id": 1, "label_id": 3}])


def test_a_palette_that_is_too_short_is_refused(image, label_map):
    with pytest.raises(ValueError, match="palette has 2 colours"):
        draw_segmentation(image, label_map, ID2LABEL, palette=PALETTE[:2])


def test_the_legend_lists_only_labels_that_occur():
    labels = legend_labels([[2, 0], [2, 255]], ID2LABEL, palette=PALETTE)
    assert labels == [("sky", (200, 0, 0)), ("car", (0, 0, 200))]


def test_small_panels_are_enlarged_by_a_whole_factor_and_shown_unchanged(image):
    green = Image.new("RGB", image.size, (10, 250, 10))
    sheet = np.asarray(draw_comparison(image, [("prediction", green)], []))
    assert (sheet == (100, 100, 100)).all(-1).sum() == 320 * 240  # 40 x 30 enlarged eight times
    assert (sheet == (10, 250, 10)).all(-1).sum() == 320 * 240


def test_large_panels_keep_their_size():
    photograph = Image.new("RGB", (500, 400), (100, 100, 100))
    sheet = np.asarray(draw_comparison(photograph, [], []))
    assert (sheet == (100, 100, 100)).all(-1).sum() == 500 * 400


def test_every_legend_entry_is_drawn_whole(image):
    names = [f"label number {index}" for index in range(100)] + ["a name far longer than the sheet is wide " * 10]
    labels = [(name, (255, 2 * index, 0)) for index, name in enumerate(names)]
    sheet = draw_comparison(image, [("truth", image)], labels)
    areas = {color: area for area, color in sheet.getcolors(maxcolors=sheet.width * sheet.height)}
    patches = {areas[color] for _, color in labels}
    assert len(patches) == 1  # a patch that was overlapped or cut off would be smaller than the others
    assert patches.pop() > 100
    assert (np.asarray(sheet)[-4:] == 255).all()
    assert (np.asarray(sheet)[:, -4:] == 255).all()


def test_a_panel_of_another_size_is_refused(image):
    with pytest.raises(ValueError, match='Panel "truth" is'):
        draw_comparison(image, [("truth", image.resize((20, 20)))], [])


def test_a_name_lies_in_the_middle_of_its_segment_in_a_large_picture_too():
    ids = np.zeros((1100, 3100), dtype=int)
    ids[400:900, 1500:2900] = 1
    picture = draw_segmentation(Image.new("RGB", (3100, 1100)), ids, {0: "a", 1: "b"}, labels=True)
    part = (np.asarray(picture)[400:900, 1500:2900] == 255).all(-1)
    rows, columns = np.nonzero(part)
    assert abs(rows.mean() - 250) < 8
    assert 200 < columns.mean() < 1200  # anywhere on the line that is furthest from the border
    assert 20 < np.ptp(rows) < 80


@pytest.mark.parametrize("numbers", [[-1, 0, 7, 7], [5], [3, 2**24, 9, -4], [0, 255]])
def test_ids_are_numbered_as_by_sorting(numbers):
    ids = np.resize(np.array(numbers), (5, 6))
    found, expected = label_placement.number_ids(ids), np.unique(ids, return_inverse=True)
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1].reshape(ids.shape).tolist()


def test_names_lie_in_their_segments_of_a_picture_that_a_legend_enlarges(monkeypatch, image, label_map):
    middles = []
    pen = label_placement.ImageDraw.ImageDraw
    monkeypatch.setattr(pen, "rounded_rectangle", lambda self, box, **style: middles.append((box[0] + box[2]) / 2))
    draw_segmentation(image, label_map, ID2LABEL, labels=True, legend=True)  # 40 pixels become 320
    assert sorted(middles) == pytest.approx([80, 240], abs=4)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_segment_whose_label_has_no_name_is_refused(image, label_map, label):
    with pytest.raises(ValueError, match=f"Segment 1 has label {label}"):
        draw_segmentation(image, label_map + 1, ID2LABEL, segments=[{"id": 1, "label_id": label}])


@pytest.fixture
def written(monkeypatch):
    """The names that are written and the heights at which they end."""
    names, tops = [], []
    pen = label_placement.ImageDraw.ImageDraw
    monkeypatch.setattr(pen, "text", lambda self, place, name, *style, **options: names.append(name))
    monkeypatch.setattr(pen, "rounded_rectangle", lambda self, box, **style: tops.append((box[1], box[3])))
    return names, tops


def test_where_two_names_do_not_fit_the_larger_segment_has_its_own(written):
    ids = np.repeat([[0] * 40 + [1] * 80], 40, axis=0)
    names = {0: "the name of the smaller", 1: "the name of the larger"}
    draw_segmentation(Image.new("RGB", (120, 40)), ids, names, labels=True)
    assert written[0] == ["the name of the larger"]


def test_names_of_segments_at_the_edge_lie_in_the_picture(written):
    ids = np.zeros((100, 200), dtype=int)
    ids[:7], ids[-7:] = 1, 2
    draw_segmentation(Image.new("RGB", (200, 100)), ids, {0: "a", 1: "b", 2: "c"}, labels=True)
    assert sorted(written[0]) == ["a", "b", "c"]
    assert (min(written[1])[0], max(written[1])[1]) == (0, 100)


def test_a_name_higher_than_the_picture_is_left_out(written):
    draw_segmentation(Image.new("RGB", (200, 10)), np.zeros((10, 200), dtype=int), {0: "a"}, labels=True)
    assert written[0] == []


def test_a_band_as_high_as_a_name_bears_it_in_a_wide_picture_too(written):
    ids = np.zeros((60, 2100), dtype=int)
    ids[20:32] = 1
    draw_segmentation(Image.new("RGB", (2100, 60)), ids, {0: "a", 1: "b"}, labels=True)
    assert sorted(written[0]) == ["a", "b"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_a_photograph_of_another_mode_is_drawn_like_its_colours(mode, label_map):
    gradient = np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))
    photograph = Image.fromarray(gradient).convert(mode)
    label_map[:, :5] = 255
    drawn = draw_segmentation(photograph, label_map, ID2LABEL)
    assert pixels(drawn) == pixels(draw_segmentation(photograph.convert("RGB"), label_map, ID2LABEL))
    assert pixels(drawn)[0][1] == [6, 6, 6]


def test_the_sixth_instance_of_a_label_looks_like_the_first():
    shades = segment_shades([{"id": number, "label_id": 1} for number in range(1, 7)], PALETTE)
    assert shades[6].tolist() == shades[1].tolist() == [0, 200, 0]
