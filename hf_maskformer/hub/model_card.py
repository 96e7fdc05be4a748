"""Model cards: one template for all of them, and the licence that weights pass on."""

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

# Of the weights that the paper's authors published. transformers' authors converted them to names of this kind.
AUTHORS_LICENCE = "cc-by-nc-4.0"
AUTHORS_WEIGHTS = "facebook/maskformer-"
AUTHORS_LICENCE_TEXT = "CC BY-NC 4.0, under which the paper's authors publish their weights: no commercial use."
# Fields of a card that say under which conditions a model may be used.
LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Picture:
    """A file beside the card that the card shows."""

    title: str
    file: str


@dataclass(frozen=True)
class StartingPoint:
    """What a training began with.

    Attributes:
        name: what people call it; None for random weights.
        base_model: its name on the Hub, if it has one, or that of the model which it comes from.
        licence: the fields of its card that say its licence; empty where nothing is known.
    """

    name: str | None = None
    base_model: str | None = None
    licence: tuple[tuple[str, str], ...] = ()


def starting_point(name_or_path: str) -> StartingPoint:
    """Looks up the card of the checkpoint with which a model began.

    Args:
        name_or_path: `name_or_path` of the model: a folder, a file of weights, a name on the Hub, or "" for random
            weights. The card is read beside the weights, from the folder or from the Hub; a missing or unreadable one
            leaves the licence open.
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
    except HFValidationError:  # no name of the Hub, so a folder that is gone
        return StartingPoint(path.name)
    except (OSError, ValueError, EntryNotFoundError, HTTPError):
        return StartingPoint(path.name if base_model is None else name_or_path, base_model)
    fields = tuple((field, card.data.get(field)) for field in LICENCE_FIELDS if card.data.get(field))
    if base_model is None:
        base_model = card.data.get("base_model")
    return StartingPoint(path.name if path.is_dir() else name_or_path, base_model, fields)


def read_card(source: str | Path) -> ModelCard:
    """The card in a file, a `Path`, or of a model on the Hub, a string. Raises a ValueError if it is none."""
    try:
        return ModelCard.load(source, ignore_metadata_errors=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of {source}, between the two ---, are no YAML: {error}. Mend them.") from error


def inherited_licence(start: StartingPoint, given: str | None = None) -> tuple[dict[str, str], str]:
    """The licence of a model that began with `start`: the fields of its card, and in words.

    Args:
        start: what the training began with.
        given: the licence that its owner chose, an identifier of the Hub such as "apache-2.0".

    Raises:
        ValueError: the weights it began with are for no commercial use, and `given` is something else.
    """
    inherited = dict(start.licence)
    if inherited.get("license") == AUTHORS_LICENCE and given not in (None, AUTHORS_LICENCE):
        raise ValueError(
            f"license is {given!r}, but the training began with {start.name}, whose weights are {AUTHORS_LICENCE}: "
            "what is trained from them stays so. Leave the licence out, or begin with other weights."
        )
    if given is not None:
        return {"license": given}, f"`{given}`, as chosen by whoever trained it."
    if inherited.get("license") == AUTHORS_LICENCE:
        return inherited, f"{AUTHORS_LICENCE_TEXT} It is passed on by `{start.name}`, with which the training began."
    if inherited:
        name = inherited.get("license_name", inherited.get("license"))
        return inherited, f"`{name}`, that of `{start.name}`, with which the training began."
    if start.name is None:
        return {"license": "unknown"}, "Not stated. The training began with random weights, so that none is passed on."
    return {"license": "unknown"}, f"Not stated. That of `{start.name}`, with which the training began, holds here too."


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
        limits: what a user must know, sentences; those that hold for every model are added.
        results, results_text: figures for the card's metadata, and in words.
        training_text: how it was trained.
        pictures: files that the card shows.
        tags: tags of the Hub, beside that of the model type.
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
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"  # what absent sections leave
    return card


def describe(config: MaskFormerConfig | PerPixelBaselineConfig, task: str) -> str:
    """What a model is, without a full stop."""
    method = "MaskFormer"
    if isinstance(config, PerPixelBaselineConfig):
        method = "PerPixelBaseline" if config.decoder_config is None else "PerPixelBaseline+"
    backbone: Any = config.backbone_config
    return f"{method} ({PAPER}) for {task} segmentation into {config.num_labels} classes, on a `{backbone.model_type}`"


def rename_card(card: ModelCard, name: str) -> ModelCard:
    """The card with another name, in its heading, in what its examples load and in its results.

    The text of a card whose examples load something else than its heading says, such as one written by hand, stays.
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
        f"It knows its {config.num_labels} classes and nothing else: every other thing is given one of them or none.",
        "Images unlike those it was trained on give worse results, which the figures of a card do not show.",
    ]
    if isinstance(config, PerPixelBaselineConfig):
        return [*limits, "It tells classes apart, and not the objects of one class."]
    queries = config.decoder_config.num_queries
    return [*limits, f"It finds at most {queries} segments in an image."]
