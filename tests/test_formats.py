"""Files for other tools, read back as those tools read them."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_post_processing_rle import encode_masks

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.evaluation.drawing import draw_segmentation
from hf_maskformer.evaluation.formats import (
    coco_results,
    panoptic_annotation,
    panoptic_image,
    semantic_image,
    write_panoptic,
)
from hf_maskformer.evaluation.segmentation_maps import to_numpy

RESULT = {
    "segmentation": torch.tensor([[0, 1, 1], [2, 2, 1]], dtype=torch.int32),
    "segments_info": [
        {"id": 1, "label_id": 0, "was_fused": False, "score": 0.9},
        {"id": 2, "label_id": 3, "was_fused": True, "score": 0.8},
    ],
}


def test_panoptic_files_hold_what_panopticapi_reads(tmp_path):
    path = write_panoptic([(42, "photo", RESULT)], tmp_path / "panoptic", {0: 17, 3: 200})
    (annotation,) = json.loads(path.read_text())["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (42, "photo.png")
    assert [(entry["id"], entry["category_id"]) for entry in annotation["segments_info"]] == [(1, 17), (2, 200)]
    assert [(entry["area"], entry["bbox"]) for entry in annotation["segments_info"]] == [
        (3, [1, 0, 2, 2]),
        (2, [0, 1, 2, 1]),
    ]
    colours = np.asarray(Image.open(tmp_path / "panoptic" / "photo.png")).astype(int)
    ids = colours[..., 0] + 256 * colours[..., 1] + 256**2 * colours[..., 2]
    assert ids.tolist() == RESULT["segmentation"].tolist()


def test_names_of_panoptic_files_may_have_folders(tmp_path):
    path = write_panoptic([(42, "train/0001", RESULT)], tmp_path / "panoptic")
    assert (tmp_path / "panoptic" / "train" / "0001.png").is_file()
    assert json.loads(path.read_text())["annotations"][0]["file_name"] == "train/0001.png"


def test_panoptic_images_are_segmentation_maps_of_the_image_processor():
    ids = np.array([[1, 300], [70_000, 256**3 - 1]])
    labels = {1: 4, 300: 5, 70_000: 6, 256**3 - 1: 7}
    processor = MaskFormerImageProcessor(do_resize=False)
    batch = processor(np.zeros((2, 2, 3), np.uint8), panoptic_image(ids), labels)
    assert batch["class_labels"][0].tolist() == [4, 5, 6, 7]


def test_ids_beyond_three_bytes_are_refused():
    for ids in ([[256**3]], [[-1]]):
        with pytest.raises(ValueError, match="three bytes hold 0 to 16777215"):
            panoptic_image(ids)


def test_coco_results_of_a_map_of_ids_are_refused():
    result = {"segmentation": torch.ones(4, 4, dtype=torch.int32), "segments_info": [{"id": 1, "label_id": 0}]}
    with pytest.raises(ValueError, match=r"holds no run-length encodings.*return_coco_annotation=True"):
        coco_results(result, 1)


def test_coco_results_load_in_pycocotools():
    coco = pytest.importorskip("pycocotools.coco")
    masks = torch.tensor([[[0, 1, 1], [0, 0, 1]], [[1, 1, 0], [1, 0, 0]]]).bool()
    result = {"segmentation": encode_masks(masks), "segments_info": RESULT["segments_info"]}
    entries = json.loads(json.dumps(coco_results(result, 42, {0: 17, 3: 200})))
    assert [(entry["category_id"], entry["score"]) for entry in entries] == [(17, 0.9), (200, 0.8)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {"images": [{"id": 42, "height": 2, "width": 3}], "categories": [{"id": 17}, {"id": 200}]}
        truth.createIndex()
        loaded = truth.loadRes(entries)
    assert [annotation["area"] for annotation in loaded.loadAnns(loaded.getAnnIds())] == [3, 3]
    assert np.array_equal(loaded.annToMask(loaded.loadAnns([2])[0]), masks[1].numpy())


def test_a_category_without_an_id_is_named():
    with pytest.raises(ValueError, match="category_ids lacks label 3"):
        coco_results({**RESULT, "segmentation": [None, None]}, 1, {0: 17})


def test_semantic_images_hold_labels_and_show_colours(tmp_path):
    palette = np.array([[9, 9, 9], [200, 0, 0], [0, 200, 0]])
    semantic_image(torch.tensor([[0, 2], [1, 1]]), palette).save(tmp_path / "labels.png")
    image = Image.open(tmp_path / "labels.png")
    assert np.asarray(image).tolist() == [[0, 2], [1, 1]]
    assert image.convert("RGB").getpixel((1, 0)) == (0, 200, 0)
    for highest in (255, 256, 65535):
        assert np.asarray(semantic_image([[0, highest]])).tolist() == [[0, highest]]
    assert semantic_image(np.full((2, 2), 255)).getpixel((0, 0)) == 255
    with pytest.raises(ValueError, match="labels from -1 to 0"):
        semantic_image([[-1, 0]])


def test_values_with_gradients_become_an_array():
    assert to_numpy(torch.tensor([1.5], requires_grad=True)).tolist() == [1.5]
    assert to_numpy([[1, 2]]).tolist() == [[1, 2]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_on_a_gpu_are_written_and_drawn_like_those_on_the_cpu(tmp_path):
    on_gpu = {**RESULT, "segmentation": RESULT["segmentation"].cuda()}
    for name, result in (("cpu", RESULT), ("gpu", on_gpu)):
        write_panoptic([(42, "photo", result)], tmp_path / name)
        semantic_image(result["segmentation"]).save(tmp_path / name / "labels.png")
        draw_segmentation(Image.new("RGB", (3, 2)), result, {0: "sky", 3: "car"}).save(tmp_path / name / "drawn.png")
    assert (tmp_path / "cpu.json").read_text() == (tmp_path / "gpu.json").read_text()
    for name in ("photo.png", "labels.png", "drawn.png"):
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "gpu" / name).read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_prepared_on_a_gpu_can_be_arrays():
    label_map = np.array([[0, 1], [1, 1]])
    batch = MaskFormerImageProcessor(do_resize=False)(
        np.zeros((2, 2, 3), np.uint8), label_map, device="cuda", return_tensors="np"
    )
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert batch["class_labels"][0].tolist() == [0, 1]


@pytest.mark.parametrize("num_colors", [256, 300])
def test_the_last_label_of_eight_bits_has_a_colour_too(num_colors):
    palette = np.full((num_colors, 3), 9)
    palette[255] = 200, 0, 0
    image = semantic_image([[0, 255]], palette)
    assert (image.mode, image.convert("RGB").getpixel((1, 0))) == ("P", (200, 0, 0))


def test_a_segment_without_a_pixel_has_an_empty_box():
    result = {"segmentation": torch.zeros(2, 3, dtype=torch.int32), "segments_info": [{"id": 1, "label_id": 0}]}
    (entry,) = panoptic_annotation(result, 1, "a.png")["segments_info"]
    assert (entry["area"], entry["bbox"]) == (0, [0, 0, 0, 0])


def test_a_folder_with_a_dot_in_its_name_keeps_all_of_it(tmp_path):
    assert write_panoptic([], tmp_path / "run.1") == tmp_path / "run.1.json"


def test_panoptic_files_are_made_in_new_folders_and_replaced_in_those_that_are_there(tmp_path):
    folder = tmp_path / "run" / "panoptic"
    write_panoptic([(1, "train/a", RESULT), (2, "train/b", RESULT)], folder)
    nothing = {"segmentation": torch.zeros(2, 3, dtype=torch.int32), "segments_info": []}
    path = write_panoptic([(3, "train/a", nothing)], folder)
    assert [entry["image_id"] for entry in json.loads(path.read_text())["annotations"]] == [3]
    assert not np.asarray(Image.open(folder / "train/a.png")).any()
    assert np.asarray(Image.open(folder / "train/b.png")).any()


def test_a_panoptic_file_never_lies_outside_its_folder(tmp_path):
    with pytest.raises(ValueError, match=r"The results has the file name '\.\./photo\.png', which is not one inside"):
        write_panoptic([(42, "../photo", RESULT)], tmp_path / "panoptic")
    assert [path.name for path in tmp_path.rglob("*")] == ["panoptic"]


def test_segments_that_were_found_are_no_crowds():
    assert [info["iscrowd"] for info in panoptic_annotation(RESULT, 1, "a.png")["segments_info"]] == [0, 0]


def test_labels_beyond_sixteen_bits_are_refused():
    with pytest.raises(ValueError, match="labels from 0 to 65536; a PNG holds 0 to 65535"):
        semantic_image([[0, 65536]])
