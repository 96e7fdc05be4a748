"""Publishing on the Hub, against a stand-in for it: all of a folder or nothing, and what it says when it fails."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_stand_in import hub
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from models import needs_auto_image_processor, swin_config, tiny_model
from test_auto_classes import TRAVELLING, load_in_clean_process
from test_scripts import load

from hf_maskformer import MaskFormerForInstanceSegmentation, MaskFormerImageProcessor
from hf_maskformer.hub.model_card import make_card
from hf_maskformer.hub.publishing import PUBLISHED, publish

__all__ = ["hub"]  # a fixture
PAGE = Path(__file__).parents[1] / "docs" / "publishing.md"
# The files of a repository with a saved model, its card and figures.
EVALUATED = {
    ".gitattributes",
    "README.md",
    "config.json",
    "eval_results.json",
    "model.safetensors",
    "preprocessor_config.json",
}
EXPIRED = "expired or is wrong. Nothing was published. Log in"


def save(folder, max_shard_size="5GB"):
    """A small model with what belongs to it."""
    torch.manual_seed(0)
    model = tiny_model(swin_config())
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    card = make_card(
        model.config, "semantic", "a-name", origin="Made for a test.", licence={"license": "mit"}, licence_text="MIT."
    )
    card.save(folder / "README.md")
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)).masks_queries_logits


@pytest.mark.parametrize("part_size", [None, 20_000])
@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_a_published_model_loads_again(hub, tmp_path, part_size, max_shard_size):
    hub.part_size = part_size
    model = save(tmp_path / "model", max_shard_size)
    publish(tmp_path / "model", "ada/name")
    weights = [path for path in hub.repositories["ada/name"].files() if path.endswith(".safetensors")]
    assert (len(weights) > 1) == (max_shard_size == "50KB")
    loaded = MaskFormerForInstanceSegmentation.from_pretrained("ada/name", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), logits(model))
    processor = MaskFormerImageProcessor.from_pretrained("ada/name", cache_dir=tmp_path / "cache")
    assert processor.size == {"shortest_edge": 64, "longest_edge": 128}


def test_all_files_come_in_one_commit_and_the_card_has_the_name(hub, tmp_path):
    save(tmp_path)
    publish(tmp_path, "name")
    repository = hub.repositories["ada/name"]
    assert [commit.title for commit in repository.branches["main"]] == ["initial commit", "Upload model"]
    assert not repository.private
    card = ModelCard(repository.files()["README.md"].decode())
    assert card.text.lstrip().startswith("# ada/name\n")
    assert 'from_pretrained("ada/name")' in card.text
    assert "a-name" not in card.text


def test_checkpoints_logs_and_pickles_stay_at_home(hub, tmp_path):
    save(tmp_path)
    for path in (
        "checkpoint-2/model.safetensors",
        "runs/events",
        "training_args.bin",
        "trainer_state.json",
        "mine.txt",
        "analysis.py",
        "pictures/mine.pkl",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("private")
    (tmp_path / "eval_results.json").write_text("{}")
    publish(tmp_path, "ada/name")
    assert hub.repositories["ada/name"].files().keys() == EVALUATED


def test_what_a_training_leaves_for_its_card_goes_along(hub, tmp_path):
    save(tmp_path)
    results = {f"{name}_results.json" for name in ("train", "eval", "all")}
    left = {"pictures/sample_1.jpg", "loss_curve.png", "training_args.json", "metrics.json", *results}
    for path in left:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("{}")
    publish(tmp_path, "ada/name")
    assert left <= hub.repositories["ada/name"].files().keys()


def test_the_figures_arguments_and_pictures_of_a_training_are_published(hub, tmp_path):
    names = {f"{name}.json" for name in ("training_args", "train_results", "eval_results", "all_results", "metrics")}
    names |= {"loss_curve.png", "pictures/sample_1.jpg"}
    save(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in names:
        (tmp_path / name).write_text("{}")
    publish(tmp_path, "ada/name")
    assert names <= hub.repositories["ada/name"].files().keys()


def test_what_the_folder_no_longer_has_leaves_an_existing_repository_in_the_same_commit(hub, tmp_path):
    save(tmp_path / "sharded", "50KB")
    model = save(tmp_path / "whole")
    publish(tmp_path / "sharded", "ada/name")
    repository = hub.repositories["ada/name"]
    by_hand = {"notes.txt", "float16/model.safetensors", "tools/mine.py", "pictures/of/mine.png"}
    repository.files().update(dict.fromkeys(by_hand, b"by hand"))
    publish(tmp_path / "whole", "ada/name")
    assert len(repository.branches["main"]) == 3
    assert [path for path in repository.files().keys() - by_hand if "safetensors" in path] == ["model.safetensors"]
    assert by_hand <= repository.files().keys()
    loaded = MaskFormerForInstanceSegmentation.from_pretrained("ada/name", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), logits(model))


def test_a_private_repository_is_private(hub, tmp_path, monkeypatch):
    save(tmp_path / "model")
    publish(tmp_path / "model", "ada/name", private=True)
    publish(tmp_path / "model", "ada/name", private=True)
    assert hub.repositories["ada/name"].private
    MaskFormerForInstanceSegmentation.from_pretrained("ada/name", cache_dir=tmp_path / "cache")
    hub.add_token("bob's", user="bob")
    monkeypatch.setenv("HF_TOKEN", "bob's")
    with pytest.raises(OSError, match="ada/name"):
        MaskFormerForInstanceSegmentation.from_pretrained("ada/name", cache_dir=tmp_path / "other cache")


def test_what_shall_be_private_does_not_go_into_a_public_repository(hub, tmp_path):
    save(tmp_path)
    publish(tmp_path, "ada/name")
    with pytest.raises(ValueError, match="ada/name exists and is public, so nothing was uploaded"):
        publish(tmp_path, "ada/name", private=True)
    assert len(hub.repositories["ada/name"].branches["main"]) == 2


def test_a_branch_is_made_and_keeps_no_shards_that_the_folder_no_longer_has(hub, tmp_path):
    save(tmp_path / "sharded", "50KB")
    save(tmp_path / "whole")
    publish(tmp_path / "sharded", "ada/name", revision="second")
    publish(tmp_path / "whole", "ada/name", revision="second")
    repository = hub.repositories["ada/name"]
    assert [path for path in repository.files("second") if "safetensors" in path] == ["model.safetensors"]
    assert repository.files("main").keys() == {".gitattributes"}


def test_the_weights_of_adapters_are_published_too(hub, tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    publish(tmp_path, "ada/name")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.repositories["ada/name"].files().keys()


def test_an_expired_token_is_named_and_nothing_is_published(hub, tmp_path):
    save(tmp_path)
    hub.users.clear()
    with pytest.raises(PermissionError, match=EXPIRED):
        publish(tmp_path, "ada/name")
    assert hub.repositories == {}


def test_a_token_that_is_missing_is_not_called_wrong(hub, tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(PermissionError, match="There is no token for the Hub, so nothing was published"):
        publish(tmp_path, "ada/name")
    assert hub.repositories == {}


@pytest.mark.parametrize("request_path", ["/preupload/", "objects/batch", "/commit/"])
def test_a_token_that_expires_on_the_way_publishes_nothing(hub, tmp_path, request_path):
    save(tmp_path)
    hub.expires_at = request_path
    with pytest.raises(PermissionError, match=EXPIRED):
        publish(tmp_path, "ada/name")
    assert hub.repositories["ada/name"].files().keys() == {".gitattributes"}


def test_a_token_that_may_only_read_is_named(hub, tmp_path):
    save(tmp_path)
    hub.add_token("reads", user="ada", may_write=False)
    with pytest.raises(PermissionError, match="cannot write to ada/name; nothing was published"):
        publish(tmp_path, "ada/name", token="reads")
    assert hub.repositories == {}


def test_without_a_token_one_is_asked_for(hub, tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="hf auth login"):
        publish(tmp_path, "ada/name")


@pytest.mark.parametrize("request_path", ["^/lfs/", "/commit/"])
def test_a_connection_that_drops_on_the_way_leaves_the_repository_as_it_was(hub, tmp_path, request_path):
    save(tmp_path / "first")
    publish(tmp_path / "first", "ada/name")
    repository = hub.repositories["ada/name"]
    before = repository.files()
    model = save(tmp_path / "second", "50KB")
    hub.breaks_at = request_path
    with pytest.raises(ConnectionError, match=r"ada/name was interrupted .* as it was before, .* Run the same again"):
        publish(tmp_path / "second", "ada/name")
    assert repository.files() == before

    hub.breaks_at = None
    publish(tmp_path / "second", "ada/name")
    assert len(repository.branches["main"]) == 3
    loaded = MaskFormerForInstanceSegmentation.from_pretrained("ada/name", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), logits(model))


def test_an_error_of_the_hub_itself_leaves_the_repository_as_it_was(hub, tmp_path):
    save(tmp_path)
    hub.fails_at = "/commit/"
    with pytest.raises(ConnectionError, match=r"ada/name was interrupted .* Run the same again"):
        publish(tmp_path, "ada/name")
    assert hub.repositories["ada/name"].files().keys() == {".gitattributes"}


def test_a_repeated_upload_sends_only_what_has_not_arrived(hub, tmp_path):
    save(tmp_path, "50KB")
    weights = sorted(tmp_path.glob("*.safetensors"))
    publish(tmp_path, "ada/name")
    repository = hub.repositories["ada/name"]
    del repository.branches["main"][1:]  # as if the connection had dropped before the commit, with one file missing
    oid = next(iter(repository.large_files))
    del repository.large_files[oid]
    hub.requests.clear()
    publish(tmp_path, "ada/name")
    assert [request for request in hub.requests if request.startswith("PUT")] == [f"PUT /lfs/ada/name/{oid}"]
    assert len(weights) > 2
    assert {path.name for path in weights} <= repository.files().keys()


def test_an_unreachable_hub_is_told_of(hub, tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="ada/name was interrupted"):
        publish(tmp_path, "ada/name")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("config.json", "save_model"), ("preprocessor_config.json", "image processor"), ("README.md", "create_model")],
)
def test_an_incomplete_folder_is_refused_before_anything_is_sent(hub, tmp_path, name, remedy):
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*{remedy}"):
        publish(tmp_path, "ada/name")
    assert hub.requests == []


def test_a_model_without_one_of_its_shards_is_refused_before_anything_is_sent(hub, tmp_path):
    save(tmp_path, "50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}, which model.safetensors.index.json names"):
        publish(tmp_path, "ada/name")
    assert hub.requests == []


def test_an_index_that_an_earlier_saving_has_left_stays_at_home(hub, tmp_path):
    model = save(tmp_path, "50KB")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    publish(tmp_path, "ada/name")
    files = hub.repositories["ada/name"].files()
    assert [path for path in files if "safetensors" in path] == ["model.safetensors"]
    loaded = MaskFormerForInstanceSegmentation.from_pretrained("ada/name", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), logits(model))


def test_weights_in_two_forms_are_refused_before_anything_is_sent(hub, tmp_path):
    save(tmp_path)
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "kept.safetensors")
    save(tmp_path, "50KB")
    (tmp_path / "kept.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"holds weights twice, in model\.safetensors and in shards"):
        publish(tmp_path, "ada/name")
    assert hub.requests == []


def test_a_module_that_the_code_lacks_is_named_before_anything_is_sent(hub, tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "mine.C", "AutoModel": None}})
    )
    (tmp_path / "mine.py").write_text("from .gone import help_me\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.py is missing, which mine\.py needs"):
        publish(tmp_path, "ada/name")
    assert hub.requests == []


def test_code_goes_along_if_the_settings_name_it_and_stays_in_the_repository(hub, tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "mine.MyConfig",
        "AutoModel": "user/other--theirs.Model",
        "AutoImageProcessor": [None, "mine.P"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("from .helper import help_me\n")
    for name in ("helper.py", "theirs.py", "unused.py"):
        (tmp_path / name).write_text("")
    publish(tmp_path, "ada/name")
    files = hub.repositories["ada/name"].files()
    assert {path for path in files if path.endswith(".py")} == {"mine.py", "helper.py"}
    files["by_hand.py"] = b""
    (tmp_path / "eval_results.json").write_text("{}")
    publish(tmp_path, "ada/name")
    assert {"by_hand.py", "eval_results.json"} <= hub.repositories["ada/name"].files().keys()


def test_a_card_with_bad_metadata_is_refused_by_the_hub_before_the_upload(hub, tmp_path):
    save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace("license: mit", "license: [what, ever]"))
    with pytest.raises(ValueError, match="license"):
        publish(tmp_path, "ada/name")
    assert hub.repositories["ada/name"].files().keys() == {".gitattributes"}


def test_model_and_processor_push_themselves_with_their_code_as_the_docs_say(hub, tmp_path, monkeypatch):
    for travelling in TRAVELLING:
        monkeypatch.setattr(travelling, "_auto_class", None)  # what it is again afterwards
    (block,) = re.findall(r"```python\n(from hf_maskformer import register_remote.*?)```", PAGE.read_text(), re.DOTALL)
    hub.add_token("user's", user="user")
    monkeypatch.setenv("HF_TOKEN", "user's")
    model = save(tmp_path / "model")
    exec(block, {"model": model, "processor": MaskFormerImageProcessor()})
    files = hub.repositories["user/name"].files()
    assert {"README.md", "model.safetensors", "modeling_maskformer.py", "preprocessor_config.json"} <= files.keys()
    assert "image_processing_maskformer.py" in files
    loaded = MaskFormerForInstanceSegmentation.from_pretrained("user/name", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_shards_large_weights_when_it_pushes_itself(hub, tmp_path):
    save(tmp_path / "model").push_to_hub("ada/name", max_shard_size="50KB")
    assert "model.safetensors.index.json" in hub.repositories["ada/name"].files()


@pytest.mark.parametrize("request_path", ["^/lfs/", "/commit/"])
def test_a_model_that_pushes_itself_goes_on_after_a_dropped_connection(hub, tmp_path, request_path):
    model = save(tmp_path / "model")
    hub.breaks_at = request_path
    with pytest.raises((OSError, RuntimeError, HTTPError)):
        model.push_to_hub("ada/name", max_shard_size="50KB")
    assert hub.repositories["ada/name"].files().keys() == {".gitattributes"}
    hub.breaks_at = None
    model.push_to_hub("ada/name", max_shard_size="50KB")
    loaded = MaskFormerForInstanceSegmentation.from_pretrained("ada/name", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), logits(model))


def test_a_card_whose_metadata_cannot_be_read_is_refused(hub, tmp_path):
    save(tmp_path)
    (tmp_path / "README.md").write_text("---\n[broken\n---\n")
    with pytest.raises(ValueError, match=r"README.md, between the two ---, is not YAML"):
        publish(tmp_path, "ada/name")
    assert hub.requests == []


@needs_auto_image_processor
def test_the_script_publishes_a_model_whose_code_runs_without_this_package(hub, tmp_path, monkeypatch, capsys):
    model = save(tmp_path / "model")
    options = ["--private", "--with_code", "--max_shard_size", "50KB"]
    for travelling in TRAVELLING:
        monkeypatch.setattr(travelling, "_auto_class", None)  # what it is again afterwards
    script = load("push_to_hub")
    script.main(script.parse_arguments([str(tmp_path / "model"), "ada/name", *options]))
    repository = hub.repositories["ada/name"]
    commit = repository.branches["main"][-1]
    assert capsys.readouterr().out.strip() == f"{hub.url}/ada/name/commit/{commit.oid}"
    assert repository.private
    assert len([path for path in commit.files if path.endswith(".safetensors")]) > 1
    assert not list((tmp_path / "model").glob("*.py"))

    downloaded = snapshot_download("ada/name", local_dir=tmp_path / "downloaded", cache_dir=tmp_path / "cache")
    (report,) = load_in_clean_process("code", [downloaded], tmp_path)
    assert report["classes"]["AutoModel"].startswith("transformers_modules.")
    torch.testing.assert_close(torch.tensor(report["logits"]), logits(model).flatten(), rtol=1e-4, atol=1e-4)


def test_the_script_publishes_without_code_what_belongs_to_the_model(hub, tmp_path):
    save(tmp_path / "model", "50KB")
    (tmp_path / "model" / "eval_results.json").write_text("{}")
    (tmp_path / "model" / "notes.txt").write_text("private")
    script = load("push_to_hub")
    script.main(script.parse_arguments([str(tmp_path / "model"), "ada/name"]))
    assert hub.repositories["ada/name"].files().keys() == EVALUATED
    assert not hub.repositories["ada/name"].private
    (tmp_path / "model" / "eval_results.json").write_text('{"mean_iou": 0.5}')  # what is equal makes no commit
    options = ["--revision", "second", "--message", "Another"]
    script.main(script.parse_arguments([str(tmp_path / "model"), "ada/name", *options]))
    branches = hub.repositories["ada/name"].branches
    assert [branch[-1].title for branch in (branches["main"], branches["second"])] == ["Upload model", "Another"]


__all__ = ["hub"]  # a fixture


def test_a_given_token_is_used_for_every_step(hub, tmp_path, monkeypatch):
    save(tmp_path / "sharded", "50KB")
    save(tmp_path / "whole")
    monkeypatch.setenv("HF_TOKEN", "of nobody")
    options = {"private": True, "revision": "second", "token": "ada's"}
    publish(tmp_path / "sharded", "ada/name", **options)
    publish(tmp_path / "whole", "ada/name", **options)
    repository = hub.repositories["ada/name"]
    assert repository.private
    assert [path for path in repository.files("second") if "safetensors" in path] == ["model.safetensors"]


def test_code_that_only_a_list_or_the_processor_names_goes_along(hub, tmp_path):
    save(tmp_path)
    for name, entry in (("config.json", [None, "one.P"]), ("preprocessor_config.json", "two.P")):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(settings | {"auto_map": {"AutoImageProcessor": entry}}))
    for name in ("one.py", "two.py", "three.py"):
        (tmp_path / name).write_text("")
    publish(tmp_path, "ada/name")
    assert {path for path in hub.repositories["ada/name"].files() if path.endswith(".py")} == {"one.py", "two.py"}


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": "../a.safetensors"}}'])
def test_an_index_that_from_pretrained_would_refuse_is_refused_before_anything_is_sent(hub, tmp_path, content):
    save(tmp_path, "50KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(OSError, match=r"model\.safetensors\.index\.json"):
        publish(tmp_path, "ada/name")
    assert hub.requests == []


def test_every_file_that_is_named_is_published_and_nothing_else(hub, tmp_path):
    save(tmp_path)
    files = [pattern.replace("*", "x") for pattern in PUBLISHED if "safetensors" not in pattern]
    for name in (*files, "pictures/deep/x.jpg", "pictures/x.txt", "training_args.bin", "optimizer.pt", "x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text("{}")
    (tmp_path / "metrics").mkdir()
    publish(tmp_path, "ada/name")
    assert hub.repositories["ada/name"].files().keys() == {*files, ".gitattributes", "model.safetensors"}
    assert {"pictures/x.png", "pictures/x.jpg", "loss_curve.png", "metrics.json"} <= {*files}


def test_what_else_the_hub_refuses_is_no_upload_that_broke_off(hub, tmp_path, monkeypatch):
    save(tmp_path)

    def refuse(*_, **__):
        response = SimpleNamespace(status_code=413, headers={}, request=None)
        raise HfHubHTTPError("a file is too large", response=response)

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", refuse)
    with pytest.raises(HfHubHTTPError, match="a file is too large"):
        publish(tmp_path, "ada/name")
