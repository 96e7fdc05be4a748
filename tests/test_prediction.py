import http.server
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny_model
from PIL import Image
from test_per_pixel_baseline import tiny_baseline

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.evaluation.prediction import Prediction, predict, read_images, write_prediction
from hf_maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput

ID2LABEL = {0: "sky", 1: "road", 2: "car"}


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def image_processor():
    return MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, label_ids_to_fuse=[0, 1])


class TwoCars(torch.nn.Module):
    """Sees a car in the left half and another in the right half of every image, and sky nowhere."""

    config = SimpleNamespace(id2label=ID2LABEL)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values, pixel_mask):
        is_left = torch.arange(16) < 8
        masks = torch.stack([is_left, ~is_left, is_left]).float()[None, :, None].expand(1, 3, 16, 16) * 20 - 10
        classes = torch.tensor([[[0, 0, 9.0, 0], [0, 0, 9.0, 0], [0, 0, 0, 9.0]]])
        sizes = torch.stack([pixel_mask[:, :, 0].sum(1), pixel_mask[:, 0].sum(1)], dim=1)
        padded = torch.tensor([pixel_mask.shape[1:]])
        return MaskFormerForInstanceSegmentationOutput(
            class_queries_logits=classes, masks_queries_logits=masks, image_sizes=sizes, padded_sizes=padded
        )


def test_two_cars_are_one_class_or_two_segments(image, image_processor):
    semantic = predict(TwoCars(), image_processor, image, "semantic")
    assert semantic.segments == [{"id": 2, "label_id": 2, "label": "car", "area": 50 * 70}]
    panoptic = predict(TwoCars(), image_processor, image, "panoptic")
    assert [(segment["id"], segment["label"]) for segment in panoptic.segments] == [(1, "car"), (2, "car")]
    assert panoptic.segmentation[25, [5, 65]].tolist() == [1, 2]


def test_tasks_that_the_model_does_not_know_are_refused(image, image_processor):
    with pytest.raises(ValueError, match=r"task is 'depth'; it must be one of semantic, instance, panoptic"):
        predict(TwoCars(), image_processor, image, "depth")
    with pytest.raises(ValueError, match="A per-pixel baseline has no segments, so its task is semantic"):
        predict(tiny_baseline(), image_processor, image, "panoptic")


def test_thresholds_that_would_do_nothing_are_refused(image, image_processor):
    with pytest.raises(ValueError, match="gives every pixel a class and has no threshold"):
        predict(TwoCars(), image_processor, image, "semantic", threshold=0.5)


@pytest.mark.parametrize(("options", "count"), [({}, 2), ({"top_k": 1}, 1), ({"top_k": None, "threshold": None}, 2)])
def test_options_of_instances_are_those_of_post_processing(image, image_processor, options, count):
    assert len(predict(TwoCars(), image_processor, image, "instance", **options).segments) == count


def test_thresholds_of_the_processor_outweigh_the_defaults(image, image_processor):
    image_processor.panoptic_thresholds = {"threshold": 1.0}
    assert predict(TwoCars(), image_processor, image, "panoptic").segments == []


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_the_segments_describe_the_map(image, image_processor, task):
    prediction = predict(TwoCars(), image_processor, image, task)
    assert prediction.segmentation.shape == (50, 70)
    assert len(prediction.segments) > 0
    ids, areas = np.unique(prediction.segmentation, return_counts=True)
    found = dict(zip(ids.tolist(), areas.tolist(), strict=True))
    for segment in prediction.segments:
        assert segment["area"] == found.get(segment["id"], 0)
        assert segment["label"] == ID2LABEL[segment["label_id"]]
    if task == "semantic":
        assert sum(segment["area"] for segment in prediction.segments) == 50 * 70


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_written_files_hold_the_prediction(tmp_path, image, image_processor, task):
    prediction = predict(TwoCars(), image_processor, image, task)
    labels, segments, overlay = write_prediction(prediction, image, ID2LABEL, task, tmp_path, "new/photo")
    assert np.array_equal(np.asarray(Image.open(labels)), prediction.segmentation)
    assert json.loads(segments.read_text())["segments"] == prediction.segments
    assert Image.open(overlay).size == image.size


def test_ids_beyond_eight_bits_survive(tmp_path):
    segmentation = np.array([[3, 256]])
    segments = [{"id": number, "label_id": 0, "label": "sky", "area": 1} for number in (3, 256)]
    paths = write_prediction(
        Prediction(segmentation, segments), Image.new("RGB", (2, 1)), ID2LABEL, "panoptic", tmp_path, "x"
    )
    assert np.asarray(Image.open(paths[0])).tolist() == [[3, 256]]


def test_a_folder_is_read_in_order_and_other_files_are_left_alone(tmp_path):
    for name in ("b.png", "a.jpg"):
        Image.new("L", (4, 3)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert [(name, image.mode) for name, image in read_images(str(tmp_path))] == [("a", "RGB"), ("b", "RGB")]


def test_a_photograph_stored_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "turned.jpg", exif=exif)
    ((_, image),) = read_images(str(tmp_path / "turned.jpg"))
    assert image.size == (3, 4)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of the folder tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_an_image_behind_a_url_is_read(tmp_path, served):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "my photo.png")
    ((name, image),) = read_images(f"{served}/my%20photo.png?width=4")
    assert (name, image.getpixel((0, 0))) == ("my photo", (255, 0, 0))


def test_what_a_url_holds_is_read_as_a_file_is(tmp_path, served):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(0, 65536, 1366, dtype=np.uint16)[:48].reshape(6, 8))
    deep.save(tmp_path / "deep.png", exif=exif)
    ((_, from_url),), ((_, from_file),) = read_images(f"{served}/deep.png"), read_images(str(tmp_path / "deep.png"))
    assert np.array_equal(from_url, from_file)
    assert len(np.unique(from_url)) == 48
    processor = MaskFormerImageProcessor(do_resize=False)
    batches = [processor(source)["pixel_values"] for source in (f"{served}/deep.png", tmp_path / "deep.png")]
    assert torch.equal(*batches)
    with pytest.raises(ValueError, match=r"no\.png cannot be read as an image .*404"):
        list(read_images(f"{served}/no.png"))


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg does not exist"):
        list(read_images("nowhere.jpg"))
    with pytest.raises(FileNotFoundError, match="holds no image"):
        list(read_images(str(tmp_path)))


def test_two_images_of_one_name_would_overwrite_each_other_and_are_refused(tmp_path):
    for name in ("photo.png", "photo.jpg"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds both photo\.jpg and photo\.png"):
        list(read_images(str(tmp_path)))


def test_sixteen_bits_are_scaled_and_an_image_of_unknown_range_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    ((_, image),) = read_images(str(tmp_path / "deep.png"))
    assert image.getpixel((0, 0)) == (128, 128, 128)
    Image.fromarray(np.full((4, 4), 4000, dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"wide\.tif cannot be used as an image: mode I"):
        list(read_images(str(tmp_path / "wide.tif")))


def test_a_url_without_an_image_is_named(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/photo\.png cannot be read as an image"):
        list(read_images("http://127.0.0.1:9/photo.png"))


def test_a_damaged_image_is_named_and_does_not_stop_the_others_of_its_folder(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image .*Replace the file or remove it\.$"):
        list(read_images(str(tmp_path / "cut.png")))
    Image.new("RGB", (4, 3)).save(tmp_path / "whole.png")
    failed = []
    assert [name for name, _ in read_images(str(tmp_path), failed)] == ["whole"]
    assert failed == [tmp_path / "cut.png"]
    assert f"skipped: {tmp_path / 'cut.png'} cannot be read" in capsys.readouterr().err


def test_the_size_of_the_image_is_written_with_its_segments(tmp_path, image, image_processor):
    prediction = predict(TwoCars(), image_processor, image, "panoptic")
    _, segments, _ = write_prediction(prediction, image, ID2LABEL, "panoptic", tmp_path, "photo")
    content = json.loads(segments.read_text())
    assert (content["task"], content["height"], content["width"]) == ("panoptic", 50, 70)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_queries_that_only_the_given_threshold_keeps_are_found(image, image_processor, task):
    model = tiny_model().eval()  # no query is sure enough for the defaults
    options = {"threshold": 0.0} | ({"overlap_mask_area_threshold": 0.0} if task == "panoptic" else {})
    found = predict(model, image_processor, image, task, **options).segments
    model.predict = lambda threshold, **inputs: model(**inputs)
    expected = predict(model, image_processor, image, task, **options).segments
    assert [segment["label_id"] for segment in found] == [segment["label_id"] for segment in expected]
    assert len(found) > 2


class OneSureQuery(TwoCars):
    """As a model of which only one query is computed; it may be a road or a car."""

    config = SimpleNamespace(id2label=ID2LABEL, decoder_config=SimpleNamespace(num_queries=6))

    def forward(self, pixel_values, pixel_mask):
        outputs = super().forward(pixel_values, pixel_mask)
        outputs["class_queries_logits"] = torch.tensor([[[0.01, 0.45, 0.5, 0.04]]]).log()
        outputs["masks_queries_logits"] = torch.full((1, 1, 16, 16), 20.0)
        return outputs


def test_all_labels_of_the_only_sure_query_are_candidates_and_one_below_owns_no_pixel(
    image,
    image_processor,
):
    prediction = predict(OneSureQuery(), image_processor, image, "instance", threshold=0.4)
    found = [(segment["label"], segment["area"]) for segment in prediction.segments]
    assert found == [("car", 50 * 70), ("road", 0)]


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_a_model_of_half_precision_finds_nearly_the_same(image, image_processor, task):
    model, options = tiny_model().eval(), {} if task == "semantic" else {"threshold": 0.0}
    expected = predict(model, image_processor, image, task, **options)
    found = predict(model.bfloat16(), image_processor, image, task, **options)
    assert (found.segmentation == expected.segmentation).mean() > 0.8


def test_the_overlay_shows_every_class_and_names_them(tmp_path):
    picture, ids = Image.new("RGB", (300, 200), (100, 100, 100)), np.zeros((200, 300), np.int64)
    segments = [{"id": 0, "label_id": 0, "label": "sky", "area": ids.size}]
    *_, overlay = write_prediction(Prediction(ids, segments), picture, ID2LABEL, "semantic", tmp_path, "x")
    colors = {color for _, color in Image.open(overlay).getcolors(1 << 16)}
    assert (100, 100, 100) not in colors  # the class 0 is a class
    assert (255, 255, 255) in colors  # under its name


@pytest.mark.parametrize("name", ["../photo", "/photo", "a/../../photo"])
def test_a_prediction_stays_in_its_folder(tmp_path, name):
    prediction = Prediction(np.zeros((2, 2), np.int64), [])
    with pytest.raises(ValueError, match="The prediction"):
        write_prediction(prediction, Image.new("RGB", (2, 2)), ID2LABEL, "semantic", tmp_path / "out", name)
    assert not [*tmp_path.rglob("*.png")]
