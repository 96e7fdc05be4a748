"""Writes model_cards/NAME.md, a card for each model of the paper, with its authors' results.

    python scripts/model_cards.py

The figures are theirs and are marked as such; nothing is measured. Run it again after changing presets or template.
"""

from pathlib import Path

from huggingface_hub import ModelCard

from hf_maskformer.command_line import OptionParser
from hf_maskformer.hub.conversion_card import AUTHORS_TABLE, reported_results, reported_text
from hf_maskformer.hub.model_card import AUTHORS_LICENCE, AUTHORS_LICENCE_TEXT, describe, make_card
from hf_maskformer.training.presets import PRESETS, Preset
from hf_maskformer.training.recipes import RECIPES

FOLDER = Path(__file__).parents[1] / "model_cards"


def card(preset: Preset) -> ModelCard:
    """The card of a preset with the weights of the paper's authors, converted to a folder with the preset's name."""
    config = preset.config()
    task = preset.data_set.task
    return make_card(
        config,
        task,
        preset.name,
        origin=origin(preset, describe(config, task)),
        licence={"license": AUTHORS_LICENCE},
        licence_text=AUTHORS_LICENCE_TEXT,
        results=reported_results(preset, task),
        results_text=f"{reported_text(preset)} Their table: [{AUTHORS_TABLE[0]}]({AUTHORS_TABLE[1]}).",
        training_text=training_text(preset),
        limits=["Neither these weights nor these figures were checked here."],
        datasets=[preset.data_set_name],
    )


def origin(preset: Preset, description: str) -> str:
    """What it is, and how to get it."""
    return (
        f"{description} ({preset.backbone}), with {preset.reported_parameters:.1f} million parameters, for "
        f"{preset.data_set.title}.\n\nThe weights are those of the paper's authors and not part of this package. "
        f"Download [{preset.weights_file}]({preset.weights_url}) and convert it to the folder that the examples load:"
        f"\n\n    python scripts/convert_checkpoint.py {preset.weights_file} {preset.name} --preset {preset.name}"
    )


def training_text(preset: Preset) -> str:
    """The recipe, and the command that reproduces it."""
    recipe = RECIPES[preset.name]
    options = {"images per step": recipe.data.batch_size} | recipe.options()
    layout = " --format coco-panoptic" if preset.data_set.task == "panoptic" else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in options.items() if value is not False)
    return (
        f"As the paper trained it:\n\n| setting | value |\n| --- | --- |\n{rows}\n\n"
        "To train it again (docs/reproducing.md):\n\n"
        f"    accelerate launch scripts/train.py --preset {preset.name} --data DATA{layout} \\\n"
        "        --backbone_weights BACKBONE --output_dir OUTPUT"
    )


def main() -> None:
    for name, preset in PRESETS.items():
        card(preset).save(FOLDER / f"{name}.md")


if __name__ == "__main__":
    OptionParser(description=__doc__).parse_args()
    main()
