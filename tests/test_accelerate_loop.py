"""The loop of docs/fine_tuning.md as it stands there, on two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_config

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.data.coco import CocoPanoptic
from hf_maskformer.data.generated_scenes import write_generated_scenes
from hf_maskformer.data.opening import open_dataset
from hf_maskformer.data.parquet import write_parquet
from hf_maskformer.evaluation.evaluation import evaluate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    write_generated_scenes(root / "scenes", num_train=5, num_val=3, image_size=(64, 64))
    for split in ("train", "val"):
        dataset = CocoPanoptic(
            root / f"scenes/panoptic_{split}.json", root / f"scenes/images/{split}", root / f"scenes/panoptic/{split}"
        )
        write_parquet(dataset, root / "columns", split)
    tiny_config(freeze_batch_norm=False).save_pretrained(root / "config")
    return root


def run_loop(root, num_processes):
    """Gives what the loop prints."""
    (block,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "docs/fine_tuning.md").read_text(), re.DOTALL)
    for name, path in (("DATA", "columns"), ("CONFIG", "config"), ("OUTPUT", "output")):
        block = block.replace(f'"{name}"', repr(str(root / path)))
    script = root / "loop.py"
    script.write_text(f'{block}\naccelerator.print("of", accelerator.num_processes, "processes")\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_loop_of_the_docs_runs_on_a_stream_with_two_processes_that_count_every_sample_once(columns):
    printed = re.fullmatch(r"PQ (\S+)\nof 2 processes\n", run_loop(columns, num_processes=2))
    model = MaskFormerForInstanceSegmentation.from_pretrained(columns / "output")
    processor = MaskFormerImageProcessor.from_pretrained(columns / "output")
    val = open_dataset(str(columns / "columns"), "val", format="columns")
    assert evaluate(model, processor, val)["pq"] == pytest.approx(float(printed[1]), abs=1e-6)
