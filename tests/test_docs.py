"""The code in README and docs runs, on small models and drawn scenes, and links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from models import tiny_model
from PIL import Image

from hf_maskformer import MaskFormerDataCollator, MaskFormerForInstanceSegmentation, PanopticQuality
from hf_maskformer.data.generated_scenes import write_generated_scenes
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.training.starting_point import image_processor_for

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
# Blocks that change a whole process, by what is in them.
RUN_ALONE = ("register_auto_classes()", "evaluate.load(")
# Blocks that need more than this process, and the tests that read them from their pages and run them.
RUN_ELSEWHERE = {
    "trainer.push_to_hub(": "test_model_card",
    "model.push_to_hub(": "test_publishing",
    "DataLoaderConfiguration(": "test_accelerate_loop",
    "onnxruntime": "test_export",
}
# What stands for the names of data and models, and for numbers that would take long.
STAND_INS = {
    '"facebook/maskformer-swin-tiny-ade"': '"checkpoint"',
    "image_size=512": "image_size=64",
    "max_steps=1000": 'max_steps=1, use_cpu=True, report_to="none"',
    'eval_strategy="epoch"': 'eval_strategy="epoch", use_cpu=True, report_to="none"',
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data, a checkpoint and a photograph."""
    folder = tmp_path_factory.mktemp("world")
    write_generated_scenes(folder / "DATA", num_train=3, num_val=2, image_size=(64, 64))
    (folder / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):  # as COCO lies after download
        for source, name in (
            (f"images/{split}", f"{split}2017"),
            (f"panoptic/{split}", f"annotations/panoptic_{split}2017"),
            (f"panoptic_{split}.json", f"annotations/panoptic_{split}2017.json"),
        ):
            (folder / "coco" / name).symlink_to(folder / "DATA" / source)
    dataset = open_dataset(str(folder / "coco"), "val", format="coco-panoptic")
    torch.manual_seed(0)
    tiny_model(id2label=dataset.labels.id2label).save_pretrained(folder / "checkpoint")
    image_processor_for(dataset.labels, 64, task="panoptic").save_pretrained(folder / "checkpoint")
    dataset[0]["image"].save(folder / "photo.jpg")
    return folder


@pytest.fixture
def names(world):
    """What pages take for given, as variables."""
    train, val = (open_dataset(str(world / "coco"), split, format="coco-panoptic") for split in ("train", "val"))
    image = Image.open(world / "photo.jpg").convert("RGB")  # read now: several threads get it
    ids = np.array([[1, 1], [0, 1]])
    masks = ids[None].astype(bool)
    metric = PanopticQuality(num_labels=18, thing_ids=range(18))
    segments = {"segmentation": ids, "segments_info": [{"id": 1, "label_id": 17}]}
    metric.add_batch(predictions=[segments], references=[segments])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    rows = {"image": [image], "label": [Image.new("L", image.size)]}
    return {
        "checkpoint": str(world / "checkpoint"),
        "dataset": datasets.Dataset.from_dict(rows, features=features),
        "model": MaskFormerForInstanceSegmentation.from_pretrained(world / "checkpoint"),
        "processor": image_processor_for(train.labels, 64, task="panoptic"),
        "train_dataset": train,
        "eval_dataset": val,
        "labels": train.labels,
        "task": "panoptic",
        "image": image,
        "images": [image, image],
        "photographs": [image, image],
        "MaskFormerDataCollator": MaskFormerDataCollator,
        "predicted_map": ids,
        "label_map": ids,
        "id_map": ids,
        "true_id_map": ids,
        "true_segments": [{"id": 1, "label_id": 17}],
        "masks": masks,
        "true_masks": masks,
        "scores": [0.5],
        "label_ids": [17],
        "true_label_ids": [17],
        "metric": metric,
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_runs(block, world, names, monkeypatch):
    elsewhere = [name for part, name in RUN_ELSEWHERE.items() if part in block]
    if elsewhere:
        assert (ROOT / "tests" / f"{elsewhere[0]}.py").is_file()
        return
    if "torchao" in block:
        pytest.importorskip("torchao")
    for name, stand_in in STAND_INS.items():
        block = block.replace(name, stand_in)
    monkeypatch.chdir(world)
    if any(part in block for part in RUN_ALONE):
        monkeypatch.setenv("HF_HOME", str(world / "cache"))
        monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
        subprocess.run([sys.executable, "-c", block], check=True, timeout=300)
        return
    exec(compile(block, "<documented code>", "exec"), names)


def anchors(page):
    """The fragments by which a page's headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_and_headings_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?://", target):
            path, _, fragment = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not fragment or fragment in anchors(linked), target
