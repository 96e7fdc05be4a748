"""Model cards: what a training says of itself, which licence it inherits, and what the Hub makes of the metadata."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_stand_in import hub, metadata_errors
from huggingface_hub import ModelCard
from models import tiny_model
from PIL import Image
from test_scripts import load
from test_training import SCENES, our_trainer, scenes_model
from transformers import ResNetForImageClassification

from hf_maskformer import (
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerTrainingArguments,
)
from hf_maskformer.hub.key_table import to_original
from hf_maskformer.hub.model_card import (
    AUTHORS_LICENCE,
    TEMPLATE,
    StartingPoint,
    inherited_licence,
    make_card,
    rename_card,
    starting_point,
)
from hf_maskformer.hub.publishing import publish
from hf_maskformer.training import trainer as trainer_module
from hf_maskformer.training.presets import PRESETS
from hf_maskformer.training.run_card import (
    LOSS_CURVE,
    eval_results,
    figures_of_weights,
    results_text,
    training_text,
    write_loss,
)
from hf_maskformer.training.starting_point import load_backbone_weights

__all__ = ["hub"]  # a fixture
DOCS, MODEL_CARDS = (Path(__file__).parents[1] / folder for folder in ("docs", "model_cards"))
ABOUT_DATA = {"dataset": "drawn scenes", "dataset_tags": "ada/scenes", "split": "val"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer that has trained, evaluated and written its card."""
    torch.manual_seed(0)
    trainer = our_trainer(tmp_path_factory.mktemp("runs") / "run", num_pictures=2, hub_token="very secret")
    trainer.train()
    trainer.metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(**ABOUT_DATA)
    return trainer


@pytest.fixture
def card(run):
    return ModelCard.load(f"{run.args.output_dir}/README.md")


def saved_with_card(folder, **metadata):
    scenes_model().save_pretrained(folder)
    lines = "".join(f"{name}: {value}\n" for name, value in metadata.items())
    (folder / "README.md").write_text(f"---\n{lines}---\n\n# it\n")
    return folder


def card_of_fine_tune(tmp_path, checkpoint, **arguments):
    model = MaskFormerForInstanceSegmentation.from_pretrained(checkpoint)
    trainer = our_trainer(tmp_path / "tuned", model=model, num_pictures=0)
    trainer.create_model_card(**arguments)
    return ModelCard.load(tmp_path / "tuned" / "README.md")


def test_the_metadata_say_task_data_and_figures(run, card):
    assert metadata_errors(card.content) == []
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-segmentation", "transformers")
    assert card.data.datasets == ["ada/scenes"]
    (result,) = card.data.eval_results
    assert result.metric_type == "mean_iou"
    assert result.metric_value == pytest.approx(run.metrics["eval_mean_iou"], abs=1e-4)
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == ("drawn scenes", "ada/scenes", "val")


def test_the_text_says_how_it_was_trained_and_shows_what_it_predicts(run, card):
    for line in (
        "2 steps of 2 images",
        "starting from random weights",
        "| `learning_rate` | 0.0001 |",
        "Hardware: cpu",
        f"torch {torch.__version__}",
        f"| mean_iou | {100 * run.metrics['eval_mean_iou']:.2f} |",
        "![Image, ground truth and prediction](pictures/sample_2.jpg)",
        "at most 6 segments",
        'from_pretrained("run")',
    ):
        assert line in card.text
    assert {path.name for path in (Path(run.args.output_dir) / "pictures").iterdir()} == {
        "sample_1.jpg",
        "sample_2.jpg",
    }


def test_neither_token_nor_paths_of_this_machine_are_in_card_or_arguments(run, card):
    folder = Path(run.args.output_dir)
    arguments = (folder / "training_args.json").read_text()
    assert json.loads(arguments)["learning_rate"] == 1e-4
    for content in (card.content, arguments, (folder / "training_args.bin").read_bytes().decode("latin1")):
        assert "very secret" not in content
    assert str(folder.parent) not in card.content


def test_without_an_evaluation_the_card_says_so(tmp_path):
    trainer = our_trainer(tmp_path, num_pictures=0)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert "These weights were not evaluated." in card.text
    assert card.data.eval_results is None
    assert "The loss was not logged." in card.text


LOG = [
    {"step": 1, "eval_mean_iou": 0.3},
    {"step": 2, "eval_mean_iou": 0.2},
    {"step": 2, "train_runtime": 9.0},
]


@pytest.mark.parametrize(
    ("log", "is_best_loaded", "checkpoint", "expected"),
    [
        (LOG, False, "out/checkpoint-1", 0.2),
        (LOG, True, "out/checkpoint-1", 0.3),
        (LOG, True, None, 0.2),
        ([*LOG, {"step": 2, "eval_mean_iou": 0.4}], True, "out/checkpoint-1", 0.4),
        (LOG[:1], False, "out/checkpoint-1", None),
        (LOG[:2], True, "out/checkpoint-1", 0.2),
    ],
    ids=["last", "best", "best without checkpoint", "afterwards", "of other weights", "interrupted"],
)
def test_figures_are_those_of_the_weights_that_are_saved(log, is_best_loaded, checkpoint, expected):
    state = SimpleNamespace(log_history=log, global_step=2, best_global_step=1, best_model_checkpoint=checkpoint)
    assert figures_of_weights(state, is_best_loaded).get("eval_mean_iou") == expected


def test_the_card_says_which_weights_a_run_has_and_knows_no_epochs_of_a_stream(tmp_path):
    trainer = our_trainer(tmp_path, num_pictures=0)
    trainer.state.log_history, trainer.state.global_step, trainer.state.epoch = LOG, 2, 1.0
    assert "for 2 steps of 2 images (1 epochs).\n" in training_text(trainer, "scenes", None, "")
    trainer.args.load_best_model_at_end, trainer.state.best_model_checkpoint = True, "out/checkpoint-1"
    trainer.train_dataset = iter([])
    text = training_text(trainer, "scenes", None, "")
    assert "for 2 steps of 2 images. The weights are those of step 1, the best evaluation.\n" in text


def test_each_of_several_data_sets_has_an_entry():
    metrics = {"eval_day_pq": 0.5, "eval_day_pq_things": 0.1, "eval_night_pq": 0.25}
    results = eval_results(metrics, "panoptic", "roads", "ada/roads", "val")
    assert [(result.dataset_name, result.metric_value) for result in results] == [
        ("roads, day", 0.5),
        ("roads, night", 0.25),
    ]


def test_a_card_says_with_what_the_training_began_if_it_is_told(tmp_path):
    folder = saved_with_card(tmp_path / "start", license=AUTHORS_LICENCE)
    trainer = our_trainer(tmp_path / "tuned", num_pictures=0)
    trainer.create_model_card(finetuned_from=str(folder))
    assert ModelCard.load(tmp_path / "tuned" / "README.md").data.license == AUTHORS_LICENCE


def test_pictures_are_small_and_replace_those_of_an_earlier_card(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_maskformer.training.pictures.MAX_SIDE", 50)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "sample_9.jpg").touch()
    our_trainer(tmp_path, num_pictures=1).create_model_card()
    (path,) = (tmp_path / "pictures").iterdir()
    assert path.name == "sample_1.jpg"
    assert max(Image.open(path).size) == 50


def test_a_fine_tune_of_a_folder_inherits_its_licence_and_base_model(tmp_path):
    folder = saved_with_card(tmp_path / "start", license=AUTHORS_LICENCE, base_model="someone/else")
    card = card_of_fine_tune(tmp_path, folder)
    assert card.data.license == AUTHORS_LICENCE
    assert card.data.base_model == "someone/else"
    assert "no commercial use. It is inherited from `start`" in card.text
    scenes_model().save_pretrained(tmp_path / "tuned")
    assert card_of_fine_tune(tmp_path / "again", tmp_path / "tuned").data.license == AUTHORS_LICENCE


def test_a_fine_tune_of_the_authors_weights_cannot_be_given_away_under_another_licence(tmp_path):
    folder = saved_with_card(tmp_path / "start", license=AUTHORS_LICENCE)
    with pytest.raises(ValueError, match="license is 'mit', but training started from start"):
        card_of_fine_tune(tmp_path, folder, license="mit")
    assert not (tmp_path / "tuned" / "README.md").exists()


def test_a_licence_with_a_name_of_its_own_is_inherited_whole(tmp_path):
    folder = saved_with_card(tmp_path / "start", license="other", license_name="house-rules", license_link="LICENSE")
    card = card_of_fine_tune(tmp_path, folder)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "house-rules", "LICENSE")


def test_a_fine_tune_of_a_model_on_the_hub_inherits_from_its_card(hub, tmp_path, monkeypatch):
    folder = saved_with_card(tmp_path / "start", license="apache-2.0")
    MaskFormerImageProcessor().save_pretrained(folder)
    publish(folder, "ada/start")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    start = starting_point("ada/start")
    assert start == StartingPoint("ada/start", "ada/start", (("license", "apache-2.0"),))
    assert starting_point("ada/unknown") == StartingPoint("ada/unknown", "ada/unknown")


def test_the_authors_weights_on_the_hub_are_known_without_asking():
    start = starting_point("facebook/maskformer-swin-tiny-ade")
    assert dict(start.licence) == {"license": AUTHORS_LICENCE}
    assert start.base_model == "facebook/maskformer-swin-tiny-ade"


def test_random_weights_inherit_nothing_and_unreadable_cards_leave_the_licence_open(tmp_path):
    assert starting_point("") == StartingPoint()
    assert inherited_licence(StartingPoint())[0] == {"license": "unknown"}
    assert inherited_licence(StartingPoint(), "mit")[0] == {"license": "mit"}
    assert starting_point(str(tmp_path / "gone")) == StartingPoint("gone")
    (tmp_path / "README.md").write_text("---\n[broken\n---\n")
    start = starting_point(str(tmp_path))
    assert start == StartingPoint(tmp_path.name)
    fields, text = inherited_licence(start)
    assert fields == {"license": "unknown"}
    assert f"That of `{tmp_path.name}`" in text


@pytest.mark.parametrize("name", ["backbone.pth", "folder"])
def test_a_pretrained_backbone_is_what_a_new_model_began_with(tmp_path, name):
    model = tiny_model()
    source = tmp_path / name
    if name.endswith(".pth"):
        tensors = to_original(model.state_dict())
        torch.save({k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}, source)
    else:
        ResNetForImageClassification(model.config.backbone_config).save_pretrained(source)
        (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    load_backbone_weights(model, str(source))
    start = starting_point(model.name_or_path)
    assert (start.name, start.base_model) == (name, None)
    assert dict(start.licence) == ({} if name.endswith(".pth") else {"license": "apache-2.0"})
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


def test_a_renamed_card_loads_by_its_new_name_and_keeps_the_rest(card):
    renamed = rename_card(card, "ada/scenes")
    assert renamed.text.count('"ada/scenes"') == card.text.count('"run"') == 3
    assert renamed.data.model_name == "scenes"
    assert rename_card(renamed, "run").text == card.text
    assert [result.metric_value for result in renamed.data.eval_results] == [
        result.metric_value for result in card.data.eval_results
    ]


def test_a_renamed_card_keeps_its_task_where_the_model_was_called_after_it(card):
    called_so = rename_card(card, "semantic")
    renamed = rename_card(called_so, "ada/scenes")
    assert renamed.text == rename_card(card, "ada/scenes").text
    assert 'subtask="semantic"' in renamed.text


@pytest.mark.parametrize(
    "text", ["WARNING: not for medical use.\n\nMore.\n", "# Scenes of mine\n\nText.\n", "<!-- mine -->\n\n"]
)
def test_nothing_of_a_card_written_by_hand_is_lost_by_renaming(text):
    card = ModelCard(f"---\nlicense: mit\n---\n{text}")
    assert rename_card(card, "ada/scenes").content == card.content


def test_the_loss_is_a_table_where_nothing_draws(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_loss([{"step": step, "loss": 3.0 / step} for step in range(1, 101)], tmp_path)
    rows = text.splitlines()[2:]
    assert len(rows) == 10
    assert (rows[0], rows[-1]) == ("| 1 | 3 |", "| 100 | 0.03 |")
    assert not list(tmp_path.iterdir())


def test_the_loss_is_a_curve_with_matplotlib(tmp_path):
    pytest.importorskip("matplotlib")
    text = write_loss([{"step": step, "loss": 3.0 / step} for step in range(1, 101)], tmp_path)
    assert f"]({LOSS_CURVE})" in text
    assert (tmp_path / LOSS_CURVE).stat().st_size > 5000


def test_a_trainer_publishes_everything_in_one_commit(hub, tmp_path, monkeypatch):
    trainer = our_trainer(tmp_path / "run", num_pictures=1, hub_model_id="ada/scenes", hub_private_repo=True)
    trainer.train()
    trainer.evaluate()
    commit = trainer.push_to_hub(**ABOUT_DATA, license="mit")
    repository = hub.repositories["ada/scenes"]
    assert repository.private
    assert commit.oid == repository.branches["main"][-1].oid
    assert [commit.title for commit in repository.branches["main"]] == ["initial commit", "End of training"]
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "pictures/sample_1.jpg"}
    assert expected | {"training_args.json", "eval_results.json"} <= repository.files().keys()
    assert "training_args.bin" not in repository.files()
    assert ModelCard(repository.files()["README.md"].decode()).data.license == "mit"
    loaded = MaskFormerForInstanceSegmentation.from_pretrained("ada/scenes", cache_dir=tmp_path / "cache")
    batch = trainer.data_collator([SCENES[0]])
    with torch.no_grad():
        expected_logits = trainer.model.eval()(**batch).masks_queries_logits
        assert torch.equal(loaded(**batch).masks_queries_logits, expected_logits)


def test_the_training_of_the_docs_is_published(hub, tmp_path):
    (block,) = re.findall(r"```python\n(trainer.train.*?)```", (DOCS / "publishing.md").read_text(), re.DOTALL)
    exec(block, {"trainer": our_trainer(tmp_path / "run", num_pictures=0)})
    repository = hub.repositories["ada/run"]
    card = ModelCard(repository.files()["README.md"].decode())
    assert (card.data.datasets, card.data.eval_results[0].dataset_split) == (["user/streets"], "val")
    assert repository.private


def test_a_trainer_that_does_not_wait_gives_a_future(hub, tmp_path):
    trainer = our_trainer(tmp_path / "run", num_pictures=0)
    future = trainer.push_to_hub(blocking=False)
    assert future.result().oid == hub.repositories["ada/run"].branches["main"][-1].oid


def test_a_trainer_says_that_the_token_has_expired_and_keeps_the_model(hub, tmp_path):
    hub.users.clear()
    trainer = our_trainer(tmp_path / "run", num_pictures=0)
    with pytest.raises(PermissionError, match="Nothing was published"):
        trainer.push_to_hub()
    assert hub.repositories == {}
    MaskFormerForInstanceSegmentation.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("name", PRESETS)
def test_the_card_of_a_model_of_the_paper_is_what_its_script_writes(name):
    written = (MODEL_CARDS / f"{name}.md").read_text()
    assert load("model_cards").card(PRESETS[name]).content == written
    assert metadata_errors(written) == []
    card = ModelCard(written)
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert card.data.license == AUTHORS_LICENCE
    for result in card.data.eval_results:
        assert result.metric_name.endswith("(reported by the authors, not measured)")
        assert result.source_url
    assert card.data.eval_results[0].metric_value == PRESETS[name].reported
    assert "not measured again here" in card.text


def test_every_model_of_the_paper_has_a_card_and_the_template_is_beside_them():
    assert {path.stem for path in MODEL_CARDS.glob("*.md")} == {*PRESETS, "README", "TEMPLATE"}
    assert (MODEL_CARDS / "TEMPLATE.md").read_text() == TEMPLATE.read_text()


def test_what_the_hub_would_refuse_in_a_card_is_found(card):
    """The check itself, on which the tests above rely."""
    for good, bad in (("license: unknown", "license: [a]"), ("ada/scenes", "a/b/c"), ("value: ", "value: about ")):
        assert good in card.content
        assert metadata_errors(card.content.replace(good, bad, 1))


def test_no_token_is_uploaded_with_the_weights_of_a_running_training(hub, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "ada/run", "hub_token": "ada's", "num_pictures": 0}
    options |= {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 1}
    trainer = our_trainer(tmp_path / "run", **options)
    trainer.train()
    trainer.save_model()
    commits = hub.repositories["ada/run"].branches["main"]
    assert {"Training in progress, step 1", "Model save"} <= {commit.title for commit in commits}
    assert any("training_args.bin" in commit.files for commit in commits)
    assert not any(b"ada's" in content for commit in commits for content in commit.files.values())


def test_a_training_is_published_at_its_end_alone_unless_told_otherwise(hub, tmp_path):
    options = {"push_to_hub": True, "hub_model_id": "ada/run", "hub_token": "ada's", "num_pictures": 0}
    trainer = our_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, **options)
    trainer.train()
    trainer.save_model()
    before = len(hub.repositories["ada/run"].branches["main"])
    trainer.push_to_hub()
    commits = hub.repositories["ada/run"].branches["main"]
    assert [commit.title for commit in commits[before:]] == ["End of training"]
    (commit,) = (commit for commit in commits if "model.safetensors" in commit.files)
    assert "training_args.bin" not in commit.files


@pytest.mark.parametrize(
    ("endpoint", "token", "error", "message"),
    [
        ("http://127.0.0.1:9", "ada's", ConnectionError, "cannot be reached to create ada/run"),
        (None, "unknown", PermissionError, "does not accept the token"),
        (None, "reads", PermissionError, "cannot write to ada/run"),
    ],
)
def test_a_training_that_cannot_be_published_does_not_begin(
    hub, tmp_path, monkeypatch, endpoint, token, error, message
):
    hub.add_token("reads", user="ada", may_write=False)
    if endpoint is not None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(error, match=message):
        our_trainer(tmp_path, push_to_hub=True, hub_model_id="ada/run", hub_token=token)


def test_the_card_counts_images_that_are_accumulated(tmp_path):
    trainer = our_trainer(tmp_path, gradient_accumulation_steps=3, num_pictures=0)
    trainer.create_model_card()
    assert "0 steps of 6 images" in (tmp_path / "README.md").read_text()


def test_the_card_counts_the_images_of_all_processes(tmp_path, monkeypatch):
    trainer = our_trainer(tmp_path, num_pictures=0)
    monkeypatch.setattr(MaskFormerTrainingArguments, "world_size", property(lambda self: 4))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "0 steps of 8 images" in card
    assert "Hardware: 4 processes, each on cpu" in card


@pytest.mark.parametrize("given", [{}, {"token": "hf_b", "revision": "branch", "private": False}])
def test_arguments_of_the_hub_are_those_of_the_training_unless_given(tmp_path, monkeypatch, given):
    asked = []
    monkeypatch.setattr(trainer_module, "publish", lambda folder, repo_id, **options: asked.append(options))
    options = {"hub_token": "hf_a", "hub_revision": "trial", "hub_private_repo": True}
    our_trainer(tmp_path, num_pictures=0, **options).push_to_hub(**given)
    expected = {"token": "hf_a", "revision": "trial", "private": True, "commit_message": "End of training"}
    assert asked == [expected | given]


def test_processes_but_the_first_write_nothing_and_publish_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskFormerTrainingArguments, "should_save", property(lambda self: False))
    monkeypatch.setattr(trainer_module, "publish", lambda *_, **__: pytest.fail("published"))
    (tmp_path / "run").write_text("in the way")  # what is not written may be a folder of another machine
    trainer = our_trainer(tmp_path / "run", save_strategy="no")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    trainer.create_model_card()
    assert trainer.push_to_hub() is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_licence_of_the_authors_may_be_chosen_for_what_began_with_their_weights():
    start = StartingPoint("start", None, (("license", AUTHORS_LICENCE),))
    assert inherited_licence(start, AUTHORS_LICENCE)[0] == {"license": AUTHORS_LICENCE}
    with pytest.raises(ValueError, match="license is 'mit'"):
        inherited_licence(start, "mit")


def test_a_model_in_an_account_is_called_by_its_own_name_in_results(card):
    made = make_card(
        tiny_model().config,
        "semantic",
        "ada/scenes",
        origin="",
        licence={},
        licence_text="",
        results=card.data.eval_results,
    )
    assert made.data.model_name == "scenes"


def test_a_card_with_results_of_another_form_still_says_its_licence(tmp_path):
    metadata = "license: apache-2.0\nmodel-index:\n- name: scenes\n  results: none"
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# scenes\n")
    assert starting_point(str(tmp_path)).licence == (("license", "apache-2.0"),)


def shown_arguments(tmp_path, **options):
    our_trainer(tmp_path, num_pictures=0, **options).create_model_card()
    return dict(re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", (tmp_path / "README.md").read_text()))


def test_the_card_shows_the_arguments_that_have_a_meaning(tmp_path):
    shown = shown_arguments(tmp_path)
    assert (shown["lr_scheduler_type"], shown["warmup_steps"]) == ("polynomial", "0")
    assert not shown.keys() & {"paper_schedule", "lr_milestones", "warmup_factor", "bf16", "fp16"}
    shown = shown_arguments(tmp_path, paper_schedule="steps", lr_milestones=[0.5])
    assert (shown["paper_schedule"], shown["lr_milestones"], shown["warmup_factor"]) == ("steps", "[0.5]", "1e-06")
    assert not shown.keys() & {"lr_scheduler_type", "lr_scheduler_kwargs"}
    shown = shown_arguments(tmp_path, paper_schedule="poly", bf16=True)
    assert (shown["paper_schedule"], shown["bf16"]) == ("poly", "True")
    assert not shown.keys() & {"lr_milestones", "lr_scheduler_type"}


def test_the_card_calls_data_model_and_start_by_their_names(tmp_path):
    trainer = our_trainer(tmp_path, num_pictures=0, hub_model_id="ada/scenes")
    trainer.model.name_or_path = str(tmp_path / "start")
    trainer.model.add_model_tags("house")
    trainer.create_model_card(dataset_tags="ada/drawn", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert "Trained on ada/drawn, starting from `start`, for 0 steps" in card.text
    assert 'from_pretrained("ada/scenes")' in card.text
    assert {"mine", "house"} <= set(card.data.tags)
    trainer.create_model_card(model_name="eve/scenes")
    assert 'from_pretrained("eve/scenes")' in (tmp_path / "README.md").read_text()


def test_figures_are_said_to_be_of_the_split_that_was_evaluated():
    for split, where in (("val", "on roads, split `val`, in percent"), (None, "on roads, in percent")):
        assert where in results_text({"eval_mean_iou": 0.5}, "roads", split)


def test_the_card_counts_the_images_of_all_gpus(tmp_path, monkeypatch):
    trainer = our_trainer(tmp_path, num_pictures=0)
    monkeypatch.setattr(MaskFormerTrainingArguments, "n_gpu", 4, raising=False)
    trainer.create_model_card()
    assert "0 steps of 8 images" in (tmp_path / "README.md").read_text()


def test_the_pictures_are_of_the_first_of_several_data_sets(tmp_path):
    our_trainer(tmp_path, eval_dataset={"a": SCENES, "b": SCENES}, num_pictures=9).create_model_card()
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"sample_{i}.jpg" for i in range(1, 5)}


def test_the_curve_of_an_earlier_training_is_removed_and_one_loss_is_no_curve(tmp_path, monkeypatch):
    (tmp_path / LOSS_CURVE).touch()
    monkeypatch.setattr("hf_maskformer.training.run_card._draw", lambda *_: pytest.fail("drawn"))
    assert write_loss([{"step": 3, "loss": 2.0}], tmp_path).splitlines()[2:] == ["| 3 | 2 |"]
    assert not (tmp_path / LOSS_CURVE).exists()
    monkeypatch.setattr("hf_maskformer.training.run_card._draw", lambda *_: True)
    text = write_loss([{"step": step, "loss": 3.0 / step} for step in range(1, 5)], tmp_path)
    assert "The last logged loss is 0.75." in text


def test_the_card_has_the_time_of_the_last_training(tmp_path):
    trainer = our_trainer(tmp_path, max_steps=1, num_pictures=0)
    trainer.train()
    trainer.state.log_history.append({"step": 1, "train_runtime": 3725.4})
    trainer.create_model_card()
    assert "Training took 1:02:05 (h:mm:ss)." in (tmp_path / "README.md").read_text()


def test_a_model_that_is_saved_goes_to_the_branch_of_the_arguments(tmp_path, monkeypatch):
    trainer = our_trainer(tmp_path, num_pictures=0, hub_revision="trial", hub_strategy="every_save", hub_token="a")
    trainer.args.push_to_hub = True
    asked = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **options: asked.append(options))
    trainer.save_model()
    assert asked == [{"commit_message": "Model save", "revision": "trial"}]
