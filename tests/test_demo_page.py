"""The page for the browser: in a real one where there is one, and what it asks for without."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from models import tiny_model
from PIL import Image, ImageColor
from test_scripts import SCRIPTS

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.data.generated_scenes import LABELS, GeneratedScenes
from hf_maskformer.evaluation.drawing import label_colors, segment_shades
from hf_maskformer.evaluation.prediction import Prediction

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_asks_for_the_small_model_where_none_is_named(tmp_path):
    command = [sys.executable, SCRIPTS / "demo.py", "--web", f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: {tmp_path / 'checkpoint'} does not exist. Train the small model first" in done.stderr


def test_a_port_that_cannot_be_is_refused(tmp_path):
    command = [sys.executable, SCRIPTS / "demo.py", "--web", "--port=99999"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "\nerror: --port is 99999; it must be 1 to 65535, or left out.\n")


@pytest.fixture(scope="module")
def page():
    return pytest.importorskip("hf_maskformer.demo.page", reason="needs the extra demo", exc_type=ImportError)


@pytest.fixture(scope="module")
def address(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    label2id = {name: label for label, name in LABELS.id2label.items()}
    tiny_model(id2label=LABELS.id2label, label2id=label2id).save_pretrained(folder)
    # So low a threshold that the queries of random weights pass it.
    MaskFormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 256},
        segmentation_task="panoptic",
        panoptic_thresholds={"threshold": 0.01, "mask_threshold": 0.05, "overlap_mask_area_threshold": 0.0},
    ).save_pretrained(folder)
    app, url, _ = page.launch(str(folder), prevent_thread_lock=True, quiet=True)
    yield url
    app.get_blocks().close()


@pytest.fixture
def browser_page(address):
    """The page in a browser, with the addresses of all that it asked for."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector("#segment")
        yield page
        browser.close()
    assert not [url for url in requests if not url.startswith((address, "data:", "blob:"))]


def download(page, button, folder):
    with page.expect_download() as event:
        page.click(button)
    path = folder / event.value.suggested_filename
    event.value.save_as(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_an_example_is_segmented_and_its_files_are_downloaded(browser_page, task, tmp_path):
    browser_page.locator("button.gallery-item").first.click()
    browser_page.wait_for_selector("#picture img")
    browser_page.get_by_label(task).check()
    browser_page.click("#segment")
    browser_page.wait_for_selector("#overlay img")
    content = json.loads(download(browser_page, "#json", tmp_path).read_text())
    ids = np.asarray(Image.open(download(browser_page, "#ids", tmp_path)))
    assert content["task"] == task
    assert ids.shape == (content["height"], content["width"]) == (128, 128)
    areas = {segment["id"]: segment["area"] for segment in content["segments"] if segment["area"]}
    assert areas
    assert areas == {number: int((ids == number).sum()) for number in np.unique(ids).tolist() if number in areas}
    assert Image.open(download(browser_page, "#png", tmp_path)).size == (128, 128)
    for segment in content["segments"]:
        if segment["area"]:
            assert segment["label"] in browser_page.inner_text("#segments")


@pytest.mark.slow
def test_a_large_picture_is_shown_small_with_the_names_under_the_pointer_and_its_files_are_large(
    browser_page, tmp_path
):
    Image.effect_noise((2000, 1000), 90).convert("RGB").save(tmp_path / "photo.png")
    browser_page.set_input_files("#picture input[type=file]", tmp_path / "photo.png")
    browser_page.wait_for_selector("#picture img")
    browser_page.get_by_label("semantic").check()
    browser_page.click("#segment")
    shown = browser_page.locator("#overlay img.base-image")
    width = shown.evaluate("async image => (await image.decode(), image.naturalWidth)")
    assert width == 1280
    ids = np.asarray(Image.open(download(browser_page, "#ids", tmp_path)))
    assert ids.shape == (1000, 2000)

    box = shown.bounding_box()
    scale = min(box["width"] / 2000, box["height"] / 1000)
    # Where the labels of Gradio do not lie on the picture, and no border is near.
    places = [(row, column) for row in range(500, 980, 7) for column in range(20, 1980, 7)]
    inner = [(r, c) for r, c in places if len(np.unique(ids[r - 4 : r + 5, c - 4 : c + 5])) == 1]
    assert inner
    browser_page.wait_for_function("[...document.querySelectorAll('#overlay img.mask')].every(mask => mask.complete)")
    for row, column in inner[:: -(-len(inner) // 20)]:
        x = box["x"] + box["width"] / 2 + scale * (column - 1000)
        browser_page.mouse.move(x, box["y"] + box["height"] / 2 + scale * (row - 500))
        name = LABELS.id2label[int(ids[row, column])]
        assert browser_page.get_attribute("#overlay .image-container", "title") == name


@pytest.mark.slow
def test_thresholds_are_for_segments_and_choose_among_them(browser_page):
    browser_page.locator("button.gallery-item").first.click()
    browser_page.wait_for_selector("#picture img")
    browser_page.get_by_label("semantic").check()
    browser_page.wait_for_selector("#threshold input[type=number]:disabled")
    browser_page.get_by_label("instance").check()
    browser_page.wait_for_selector("#threshold input[type=number]:enabled")
    browser_page.wait_for_selector("#overlap_mask_area_threshold input[type=number]:disabled")
    browser_page.get_by_label("panoptic").check()
    browser_page.wait_for_selector("#overlap_mask_area_threshold input[type=number]:enabled")
    browser_page.click("#segment")
    browser_page.wait_for_selector("#overlay img.mask", state="attached")
    browser_page.fill("#threshold input[type=number]", "1")
    browser_page.click("#segment")
    browser_page.wait_for_selector("#overlay img.mask", state="detached")
    browser_page.get_by_text("No segment was found").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no image", "cut off"])
def test_a_broken_file_shows_an_error_that_names_it(browser_page, kind, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "broken.png")
    content = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(content[: len(content) // 2] if kind == "cut off" else b"no image")
    browser_page.set_input_files("#picture input[type=file]", tmp_path / "broken.png")
    browser_page.wait_for_selector("#picture img", state="attached")
    browser_page.click("#segment")
    toast = browser_page.get_by_text("cannot be read as an image")
    toast.wait_for()
    assert toast.inner_text().startswith("broken.png cannot be read as an image")
    assert "/" not in toast.inner_text()


@pytest.mark.slow
def test_a_press_without_a_picture_shows_what_to_do(browser_page):
    browser_page.click("#segment")
    browser_page.get_by_text("Choose a picture first.").wait_for()


def prediction_of(ids, *segments):
    ids = np.array(ids)
    fields = [
        {"id": number, "label_id": label, "label": name, "area": int((ids == number).sum()), "score": score}
        for number, label, name, score in segments
    ]
    return Prediction(ids, fields)


TWO_CARS = prediction_of(
    [[1, 1, 3, 3], [4, 4, 4, 0]], (1, 1, "car", 0.98765), (2, 0, "sky", 0.9), (3, 1, "car", 0.8), (4, 2, "tree", 0.7)
)


def test_segments_of_one_label_are_numbered_and_those_without_a_pixel_are_not_shown(page):
    assert page.segment_titles(TWO_CARS) == {1: "car 1", 3: "car 2", 4: "tree"}
    assert page.table(TWO_CARS) == [["tree", 0.7, 37.5], ["car 1", 0.988, 25.0], ["car 2", 0.8, 25.0]]


def test_a_class_without_a_score_has_an_empty_place_for_it(page):
    segments = [
        {"id": 0, "label_id": 0, "label": "sky", "area": 2},
        {"id": 1, "label_id": 1, "label": "car", "area": 4},
    ]
    rows = page.table(Prediction(np.array([[1, 1, 0], [1, 1, 0]]), segments))
    assert rows == [["car", None, 66.67], ["sky", None, 33.33]]


def test_masks_and_colours_of_the_page_are_those_of_the_drawing(page):
    masks, colors = page.annotations(TWO_CARS, {0: "sky", 1: "car", 2: "tree"}, (8, 4))
    ids = TWO_CARS.segmentation.repeat(2, axis=0).repeat(2, axis=1)
    assert [title for _, title in masks] == ["car 1", "car 2", "tree"]
    for (mask, _), number in zip(masks, (1, 3, 4), strict=True):
        assert mask.tolist() == (page.OPACITY * (ids == number)).tolist()
    shades = segment_shades(TWO_CARS.segments, label_colors(3))
    for title, number in (("car 1", 1), ("car 2", 3), ("tree", 4)):
        assert ImageColor.getrgb(colors[title]) == tuple(int(value) for value in shades[number])


def test_the_examples_are_scenes_that_the_small_model_was_not_trained_on(page, tmp_path):
    pictures = {np.asarray(Image.open(path)).tobytes() for path in page.draw_examples(tmp_path)}
    assert [len(picture) for picture in pictures] == [3 * page.EXAMPLE_SIDE**2] * page.NUM_EXAMPLES
    trained = GeneratedScenes(100, image_size=(page.EXAMPLE_SIDE, page.EXAMPLE_SIDE))
    assert pictures.isdisjoint(trained.scene(index).image.tobytes() for index in range(len(trained)))
