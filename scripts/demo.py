"""Draws a data set, trains a small MaskFormer on it from scratch, evaluates it and shows its predictions.

    python scripts/demo.py --output outputs/demo
    python scripts/demo.py --web
    python scripts/demo.py --web --checkpoint facebook/maskformer-swin-tiny-ade

With --web, serves a web page instead, which segments images with that model or another checkpoint; it needs the extra
`demo`.

Otherwise it needs no download and takes a few minutes on two CPU cores. The output folder gets data/ (the drawn
scenes), checkpoint/, metrics.json and pictures/ (input, ground truth and prediction side by side).
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.command_line import OptionParser, errors_as_messages
from hf_maskformer.data.folder import SegmentationFolder
from hf_maskformer.data.generated_scenes import color_classifier_mean_iou, write_generated_scenes
from hf_maskformer.training.pictures import draw_samples

SCRIPTS = Path(__file__).parent
SIDE = 128  # of the scenes, in pixels
NUM_PICTURES = 6
RECIPE = {
    "config": SCRIPTS / "configs" / "small.json",
    "image_size": SIDE,
    "min_scale": 1.0,
    "max_scale": 1.0,
    "change_colors": False,
    "per_device_train_batch_size": 8,
    "learning_rate": 1.5e-3,
    "backbone_learning_rate_factor": 1.0,
    "max_grad_norm": 1.0,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class Arguments:
    output: str = field(default="outputs/demo", metadata={"help": "Folder for the results; must be empty."})
    num_train: int = field(default=1000, metadata={"help": "Scenes to train on."})
    num_val: int = field(default=100, metadata={"help": "Held-out scenes to evaluate on."})
    max_steps: int = field(default=700, metadata={"help": "Training steps."})
    web: bool = field(default=False, metadata={"help": "Serve a web page that segments images."})
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "With --web: a folder or a Hub name; by default the one in --output."},
    )
    port: int | None = field(default=None, metadata={"help": "With --web: port of the page; by default a free one."})


def main(arguments: Arguments) -> None:
    output = Path(arguments.output)
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty. Empty it, or choose another folder with --output.")
    data, checkpoint, metrics_file = output / "data", output / "checkpoint", output / "metrics.json"
    write_generated_scenes(data, arguments.num_train, arguments.num_val, image_size=(SIDE, SIDE))
    steps = {"max_steps": arguments.max_steps, "warmup_steps": min(100, arguments.max_steps // 2)}
    run("train.py", data=data, output_dir=checkpoint, **steps, **RECIPE)
    run("evaluate.py", checkpoint=checkpoint, data=data, batch_size=10, output=metrics_file)
    pictures = draw_pictures(checkpoint, data, output / "pictures")

    train, val = SegmentationFolder(data, "train"), SegmentationFolder(data, "val")
    colour_score = color_classifier_mean_iou(iter(train), iter(val), val.labels.num_labels)
    mean_iou = json.loads(metrics_file.read_text())["mean_iou"]
    print(f"\nMean IoU on {arguments.num_val} held-out scenes: {mean_iou:.3f} ({metrics_file})")
    print(f"For comparison, the best classifier that sees one pixel's colour only: {colour_score:.3f}")
    print(f"Checkpoint, for from_pretrained: {checkpoint}")
    print("Pictures:", *pictures, sep="\n  ")


def serve(arguments: Arguments) -> None:
    if arguments.port is not None and not 0 < arguments.port < 2**16:
        raise ValueError(f"--port is {arguments.port}; it must be 1 to 65535, or left out.")
    checkpoint = arguments.checkpoint or str(Path(arguments.output) / "checkpoint")
    if arguments.checkpoint is None and not Path(checkpoint).is_dir():
        raise FileNotFoundError(
            f"{checkpoint} does not exist. Train the small model first, with the same command without --web, or give "
            "a model with --checkpoint."
        )
    try:
        from hf_maskformer.demo.page import launch
    except ModuleNotFoundError as error:
        raise ImportError(f"The page needs Gradio ({error}): pip install 'hf-maskformer[demo]'.") from error
    launch(checkpoint, server_port=arguments.port)


def run(script: str, **options: object) -> None:
    command = [sys.executable, str(SCRIPTS / script), *(f"--{name}={value}" for name, value in options.items())]
    print("\n$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def draw_pictures(checkpoint: Path, data: Path, folder: Path) -> list[Path]:
    """Reloads the checkpoint and draws its predictions beside the ground truth."""
    model = MaskFormerForInstanceSegmentation.from_pretrained(checkpoint)
    image_processor = MaskFormerImageProcessor.from_pretrained(checkpoint)
    folder.mkdir()
    paths = []
    for name, picture in draw_samples(model, image_processor, SegmentationFolder(data, "val"), NUM_PICTURES):
        paths.append(folder / f"{name}.png")
        picture.save(paths[-1])
    return paths


if __name__ == "__main__":
    with errors_as_messages():
        (arguments,) = OptionParser(Arguments, description=__doc__).parse_args_into_dataclasses()
        serve(arguments) if arguments.web else main(arguments)
