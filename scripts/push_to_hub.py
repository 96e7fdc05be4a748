"""Publishes a trained model on the Hub: weights, image processor, card, figures and pictures, in one commit.

    python scripts/push_to_hub.py OUTPUT user/name --private

OUTPUT is the output folder of training or of scripts/convert_checkpoint.py. --with_code includes the modelling files,
so that the model runs where this package is not installed. Log in first with `hf auth login`, or set HF_TOKEN. If the
upload is interrupted, the repository stays as it was; run the same again.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_maskformer import MaskFormerImageProcessor, register_remote_code
from hf_maskformer.command_line import OptionParser, errors_as_messages
from hf_maskformer.hub.publishing import publish, published_files
from hf_maskformer.training.starting_point import model_class_of


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = OptionParser(description=__doc__)
    parser.add_argument("folder", help="The saved model.")
    parser.add_argument("repo_id", help="user/name, or name for the logged-in user; created if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--with_code", action="store_true", help="Include the modelling files.")
    parser.add_argument("--max_shard_size", default="5GB", help="Split the weights into files of at most this size.")
    parser.add_argument("--revision", help="Branch, created if it does not exist.")
    parser.add_argument("--message", default="Upload model", help="Commit message.")
    return parser.parse_args(command_line)


def main(arguments: argparse.Namespace) -> None:
    with TemporaryDirectory() as copy:
        prepare(Path(arguments.folder), Path(copy), arguments.with_code, arguments.max_shard_size)
        commit = publish(
            copy,
            arguments.repo_id,
            private=arguments.private or None,
            revision=arguments.revision,
            commit_message=arguments.message,
        )
    print(commit.commit_url)


def prepare(folder: Path, copy: Path, has_code: bool, max_shard_size: str) -> None:
    """Saves the model again, which also checks that it loads, and copies its other files."""
    for name in published_files(folder):
        if name.endswith((".safetensors", ".safetensors.index.json", ".py")):
            continue
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, copy / name)
    model = model_class_of(str(folder)).from_pretrained(folder)
    image_processor = MaskFormerImageProcessor.from_pretrained(folder)
    if has_code:
        register_remote_code()
    model.save_pretrained(copy, max_shard_size=max_shard_size)
    image_processor.save_pretrained(copy)


if __name__ == "__main__":
    with errors_as_messages():
        main(parse_arguments())
