"""Model cards: one template for all of them, and the licence that weights inherit."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

from ..configuration_maskformer import MaskFormerConfig
from ..configuration_per_pixel_baseline import PerPixelBaselineConfig

TEMPLATE = Path(__file__).with_name("model_card_template.md")
PAPER = "[arXiv 2107.06278](https://arxiv.org/abs/2107.06278)"
CARD_FILE = "README.md"

# The licence of the weights that the paper's authors published; on the Hub, their names have this prefix.
AUTHORS_LICENCE = "cc-by-nc-4.0"
AUTHORS_WEIGHTS = "facebook/maskformer-"
AUTHORS_LICENCE_TEXT = "CC BY-NC 4.0, under which the paper's authors publish their weights: no commercial use."
# Fields of a card that state a model's licence.
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Picture:
    """An image file next to the card that the card shows."""

    title: str
    file: str


@dataclass(frozen=True)
class StartingPoint:
    """What training started from.

    Attributes:
        name: its display name; None for random weights.
        base_model: its name on the Hub, if it has one, or that of its own base model.
        licence: the licence fields of its card; empty if unknown.
    """

    name: str | None = None
    base_model: str | None = None
    licence: tuple[tuple[str, str], ...] = ()


def starting_point(name_or_path: str) -> StartingPoint:
    """Looks up the card of the checkpoint from which a model was trained.

    Args:
        name_or_path: `name_or_path` of the model: a folder, a weights file, a name on the Hub, or "" for random
            weights. The card is read from the folder or the Hub; if it is missing or unreadable, the licence is
            unknown.
    """
    if not name_or_path:
        return StartingPoint()
    path = Path(name_or_path)
    if path.is_file():
        return StartingPoint(path.name)
    base_model = None if path.is_dir() else name_or_path
    if name_or_path.startswith(AUTHORS_WEIGHTS):
        return StartingPoint(name_or_path, base_model, (("license", AUTHORS_LICENCE),))
    try:
        card = read_card(path / CARD_FILE if path.is_dir() else name_or_path)
    except HFValidationError:  # not a Hub name, so a folder that no longer exists
        return StartingPoint(path.name)
    except (OSError, ValueError, EntryNotFoundError, HTTPError):
        return StartingPoint(path.name if base_model is None else name_or_path, base_model)
    fields = tuple((field, card.data.get(field)) for field in LICENCE_FIELDS if card.data.get(field))
    if base_model is None:
        base_model = card.data.get("base_model")
    return StartingPoint(path.name if path.is_dir() else name_or_path, base_model, fields)


def read_card(source: str | Path) -> ModelCard:
    """Loads the card in a file (a `Path`) or of a model on the Hub (a string). Raises a ValueError if it is invalid."""
    try:
        return ModelCard.load(source, ignore_metadata_errors=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of {source}, between the two ---, is not YAML: {error}. Fix it.") from error


def inherited_licence(start: StartingPoint, given: str | None = None) -> tuple[dict[str, str], str]:
    """The licence of a model that was trained from `start`: the fields of its card, and in words.

    Args:
        start: what training started from.
        given: the licence that its owner chose, a Hub identifier such as "apache-2.0".

    Raises:
        ValueError: the initial weights are for non-commercial use only, and `given` is another licence.
    """
    inherited = dict(start.licence)
    if inherited.get("license") == AUTHORS_LICENCE and given not in (None, AUTHORS_LICENCE):
        raise ValueError(
            f"license is {given!r}, but training started from {start.name}, whose weights are {AUTHORS_LICENCE}: "
            "this also applies to models trained from them. Leave the licence out, or start from other weights."
        )
    if given is not None:
        return {"license": given}, f"`{given}`, as chosen by whoever trained it."
    if inherited.get("license") == AUTHORS_LICENCE:
        return inherited, f"{AUTHORS_LICENCE_TEXT} It is inherited from `{start.name}`, from which training started."
    if inherited:
        name = inherited.get("license_name", inherited.get("license"))
        return inherited, f"`{name}`, that of `{start.name}`, from which training started."
    if start.name is None:
        return {"license": "unknown"}, "Not stated. Training started from random weights, so none is inherited."
    return {"license": "unknown"}, f"Not stated. That of `{start.name}`, from which training started, applies here too."


def make_card(
    config: MaskFormerConfig | PerPixelBaselineConfig,
    task: str,
    name: str,
    *,
    origin: str,
    licence: dict[str, str],
    licence_text: str,
    limits: Sequence[str] = (),
    results: Iterable[EvalResult] = (),
    results_text: str = "",
    training_text: str = "",
    pictures: Sequence[Picture] = (),
    tags: Iterable[str] = (),
    **metadata: Any,
) -> ModelCard:
    """Fills the template.

    Args:
        config: the model's.
        task: "semantic", "instance" or "panoptic".
        name: what the examples load: a name on the Hub, or a folder.
        origin: where the model comes from, the first paragraph.
        licence, licence_text: fields of the card, and in words.
        limits: sentences on limitations; those of every model are added.
        results, results_text: figures for the card's metadata, and in words.
        training_text: how it was trained.
        pictures: files that the card shows.
        tags: Hub tags, in addition to that of the model type.
        metadata: further fields of `ModelCardData`.
    """
    data = ModelCardData(
        **licence,  # type: ignore[arg-type]  # only fields that are strings
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=[config.model_type, "image-segmentation", *tags],
        eval_results=list(results) or None,
        model_name=name.rpartition("/")[2] if results else None,
        **metadata,
    )
    is_baseline = isinstance(config, PerPixelBaselineConfig)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        task=task,
        origin=origin,
        model_class=f"{'PerPixelBaselineForSemantic' if is_baseline else 'MaskFormerForInstance'}Segmentation",
        runs_in_stock=_runs_in_stock(config),
        pictures=pictures,
        results_text=results_text,
        training_text=training_text,
        limits_text=" ".join((*_common_limits(config), *limits)),
        licence_text=licence_text,
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"  # left by absent sections
    return card


def describe(config: MaskFormerConfig | PerPixelBaselineConfig, task: str) -> str:
    """Describes a model, without a full stop."""
    method = "MaskFormer"
    if isinstance(config, PerPixelBaselineConfig):
        method = "PerPixelBaseline" if config.decoder_config is None else "PerPixelBaseline+"
    backbone: Any = config.backbone_config
    return f"{method} ({PAPER}) for {task} segmentation into {config.num_labels} classes, on a `{backbone.model_type}`"


def rename_card(card: ModelCard, name: str) -> ModelCard:
    """The card with another name, in its heading, its examples and its results.

    If the examples do not load the name in the heading, as in a card written by hand, the text is unchanged.
    """
    renamed = ModelCard(card.content)
    heading = re.search(r"^# (.+?)[ \t\r]*$", card.text, re.MULTILINE)
    # Only where a model is loaded: it may be called "semantic" or "photo.jpg", as other strings in the examples are.
    loads = heading and re.compile(rf'(from_pretrained\(|model=)"{re.escape(heading[1])}"')
    if heading and loads and loads.search(card.text):
        text = card.text[: heading.start()] + f"# {name}" + card.text[heading.end() :]
        renamed.text = loads.sub(lambda found: f'{found[1]}"{name}"', text)
    if renamed.data.get("eval_results"):
        renamed.data["model_name"] = name.rpartition("/")[2]
    return renamed


def _runs_in_stock(config: MaskFormerConfig | PerPixelBaselineConfig) -> bool:
    if isinstance(config, PerPixelBaselineConfig):
        return False
    parts: Any = (config.backbone_config, config.decoder_config)
    return parts[0].model_type in ("resnet", "swin", "maskformer-swin") and parts[1].model_type == "detr"


def _common_limits(config: MaskFormerConfig | PerPixelBaselineConfig) -> list[str]:
    limits = [
        f"It knows only its {config.num_labels} classes: anything else gets one of them or none.",
        "Results are worse on images unlike the training data, which the figures in a card do not show.",
    ]
    if isinstance(config, PerPixelBaselineConfig):
        return [*limits, "It distinguishes classes, but not objects of one class."]
    queries = config.decoder_config.num_queries
    return [*limits, f"It finds at most {queries} segments in an image."]
