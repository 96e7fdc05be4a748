"""Training and evaluating panoptic and instance segmentation by the scripts, on a few drawn scenes."""

import json
import os
import subprocess
import sys

import pytest
import transformers
from models import tiny_config
from test_scripts import SCRIPTS, call

from hf_maskformer import MaskFormerImageProcessor
from hf_maskformer.data.coco import CocoPanoptic
from hf_maskformer.data.generated_scenes import write_generated_scenes
from hf_maskformer.data.parquet import write_parquet
from hf_maskformer.evaluation import evaluation
from hf_maskformer.evaluation.tasks import predict_batch, reference_of


class Instances:
    """The things of a panoptic data set as masks."""

    def __init__(self, dataset):
        self.dataset, self.labels = dataset, dataset.labels

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        return {"image": sample["image"], "name": sample["name"], **reference_of(sample, self.labels, "instance")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Parquet folders by task."""
    root = tmp_path_factory.mktemp("tasks")
    write_generated_scenes(root / "scenes", num_train=2, num_val=3, image_size=(64, 64))
    for split in ("train", "val"):
        dataset = CocoPanoptic(
            root / f"scenes/panoptic_{split}.json", root / f"scenes/images/{split}", root / f"scenes/panoptic/{split}"
        )
        write_parquet(dataset, root / "panoptic", split)
        write_parquet(Instances(dataset), root / "instance", split)
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    # Wide enough for group norm on the single pixel that half the size leaves.
    tiny_config(freeze_batch_norm=False, fpn_feature_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("panoptic", "pq"), ("instance", "ap")], ids=lambda param: param[0])
def trained(request, data, config, tmp_path_factory):
    task, figure = request.param
    output = tmp_path_factory.mktemp("run")
    call("train", config=config, data=data / task, image_size=64, max_steps=2, output_dir=output)
    return task, figure, data / task, output


def test_the_labels_say_what_is_trained_and_evaluated(trained, tmp_path, capsys):
    task, figure, data, checkpoint = trained
    assert MaskFormerImageProcessor.from_pretrained(checkpoint).segmentation_task == task
    call("evaluate", checkpoint=checkpoint, data=data, output=tmp_path / "metrics.json", predictions=tmp_path / "found")
    after_training = json.loads((checkpoint / "eval_results.json").read_text())[f"eval_{figure}"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics[figure] == pytest.approx(after_training, abs=1e-6)
    assert "disc" in metrics["per_category"]
    assert figure.upper() in capsys.readouterr().out
    assert (tmp_path / "found" / {"panoptic": "panoptic.json", "instance": "instances.json"}[task]).is_file()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(trained, tmp_path):
    task, figure, data, checkpoint = trained
    content = []
    for processes in (1, 2):
        output, found = tmp_path / f"{processes}.json", tmp_path / f"found_{processes}"
        options = {"checkpoint": checkpoint, "data": data, "output": output, "predictions": found}
        if processes == 1:
            call("evaluate", **options)
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command += [SCRIPTS / "evaluate.py", *(f"--{name}={value}" for name, value in options.items()), "--json"]
            environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "CUDA_VISIBLE_DEVICES": ""}
            environment["OMP_NUM_THREADS"] = "1"
            done = subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True, text=True)
            assert figure in json.loads(done.stdout)  # of one process alone
            assert "Evaluating: 100%|██████████| 3/3" not in done.stderr  # which has seen two of the three images
        written = json.loads((found / {"panoptic": "panoptic.json", "instance": "instances.json"}[task]).read_text())
        entries = written["annotations"] if task == "panoptic" else written
        content.append((json.loads(output.read_text()), sorted({entry["image_id"] for entry in entries}), len(entries)))
    (alone, *written_alone), (together, *written_together) = content
    assert written_alone == written_together
    for name in alone.keys() - {"per_category"}:
        assert together[name] == pytest.approx(alone[name], abs=1e-4), name


def test_semantic_evaluation_of_masks_ends_in_a_clear_error(data, config, tmp_path):
    with pytest.raises(ValueError, match="has masks, which may overlap and leave pixels without a class"):
        call("train", config=config, data=data / "instance", task="semantic", max_steps=1, output_dir=tmp_path)


def test_a_stream_without_a_number_of_steps_is_refused_before_it_is_opened(config, tmp_path):
    with pytest.raises(ValueError, match=r"The length of a stream is unknown\. Give --max_steps"):
        call("train", config=config, data=tmp_path / "nowhere", streaming=True, output_dir=tmp_path)


def test_evaluation_finds_what_cannot_be_done_before_it_reads_the_data(data, tmp_path):
    wrong = {"checkpoint": tmp_path / "nowhere", "data": data / "instance"}
    with pytest.raises(ValueError, match="has masks, which may overlap, but panoptic segmentation"):
        call("evaluate", task="panoptic", **wrong)
    with pytest.raises(ValueError, match=r"--output .* is a folder\. Give a JSON file in it"):
        call("evaluate", output=tmp_path, **wrong)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_a_checkpoint_of_transformers_is_evaluated_on_any_task(data, tmp_path, monkeypatch, task):
    labels = CocoPanoptic(
        data / "scenes/panoptic_val.json", data / "scenes/images/val", data / "scenes/panoptic/val"
    ).labels
    stock = transformers.MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig.from_dict(tiny_config(id2label=labels.id2label, fpn_feature_size=64).to_dict())
    )
    stock.save_pretrained(tmp_path)
    transformers.MaskFormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 256}).save_pretrained(tmp_path)
    options = {"tta": True} if task == "semantic" else {}
    fused = []

    def observe(model, image_processor, *args):
        fused.append(image_processor.label_ids_to_fuse)
        return predict_batch(model, image_processor, *args)

    monkeypatch.setattr(evaluation, "predict_batch", observe)
    call("evaluate", checkpoint=tmp_path, data=data / "panoptic", task=task, output=tmp_path / "m.json", **options)
    assert json.loads((tmp_path / "m.json").read_text())
    # Its files do not say which classes are stuff, but the data do.
    assert all(ids == list(labels.stuff_ids) for ids in fused)
    assert bool(fused) == (task != "semantic")
