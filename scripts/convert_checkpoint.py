"""Converts a checkpoint of the paper's code to a folder that `from_pretrained` loads.

With the model's own configuration file, or the name of a model of the paper (docs/model_zoo.md lists them):

    python scripts/convert_checkpoint.py model_final.pkl OUTPUT --config config.yaml
    python scripts/convert_checkpoint.py model_final_d8dbeb.pkl OUTPUT --preset ade20k-r50

SOURCE may also be a backbone trained on ImageNet (torchvision's or detectron2's ResNets, Swin): then the other weights
of the model are random. No code from the file is executed.
"""

import argparse

from hf_maskformer.command_line import OptionParser, errors_as_messages
from hf_maskformer.data.labels import LabelSet
from hf_maskformer.hub.conversion import convert_checkpoint
from hf_maskformer.hub.original_config import OriginalConfig
from hf_maskformer.training.presets import find_preset


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__)
    parser.add_argument("source", help="Checkpoint: a .pkl or .pth file.")
    parser.add_argument("output", help="Folder for the result, new or empty.")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", help="Its YAML file, complete or with _BASE_.")
    model.add_argument("--preset", help="Name of a model of the paper.")
    parser.add_argument("--classes", help="classes.json with the names of the classes.")
    return parser.parse_args(command_line)


def main(arguments: argparse.Namespace) -> None:
    original = OriginalConfig(arguments.config) if arguments.config else find_preset(arguments.preset)
    labels = LabelSet.from_json(arguments.classes) if arguments.classes else None
    config, image_processor = original.config(labels), original.image_processor(labels)
    model = convert_checkpoint(arguments.source, arguments.output, config, image_processor)
    print(f"{arguments.output}: {type(model).__name__} with {model.num_parameters() / 1e6:.1f} million parameters.")


if __name__ == "__main__":
    with errors_as_messages():
        main(parse_arguments())
