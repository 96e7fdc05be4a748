"""Publishes a folder on the Hub in one commit, all or nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RevisionNotFoundError
from transformers.dynamic_module_utils import get_relative_import_files

from ..data.labels import shorten
from ..modeling_maskformer_pretrained import check_weight_indices
from .model_card import CARD_FILE, read_card, rename_card

WEIGHTS = "*.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MODEL_SETTINGS, PROCESSOR_SETTINGS = "config.json", "preprocessor_config.json"
# Patterns of the paths that are published, in addition to the code that the model runs. Training checkpoints, logs and
# pickles are not.
PUBLISHED = (
    MODEL_SETTINGS,
    PROCESSOR_SETTINGS,
    "adapter_config.json",
    WEIGHTS,
    INDEX,
    CARD_FILE,
    "training_args.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "metrics.json",
    "loss_curve.png",
    "pictures/*.jpg",
    "pictures/*.png",
)

BROKEN_OFF = (
    "The upload to {repo_id} was interrupted ({reason}). All files go there in one commit, so the repository is as it "
    "was before, unless that commit had just arrived. Run the same again: what has arrived is not sent twice."
)
# For creating the repository before training.
BROKEN_OFF_BEFORE = (
    "The Hub cannot be reached to create {repo_id} ({reason}), so nothing was trained. Train without push_to_hub and "
    "publish the result later (scripts/push_to_hub.py), or check the connection."
)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Publishes a saved model with its image processor, card, figures and pictures, in one commit.

    Uploads the files that match `PUBLISHED`, and the code that the settings name. Files in the repository that match
    `PUBLISHED` but are not in the folder, such as other shards of the weights, are removed in the same commit. So the
    repository is either unchanged or complete, whatever happens. Its name is written into the card, if this package
    created that.

    Args:
        folder: what `save_pretrained` or a trainer has written, with a README.md.
        repo_id: "user/name" or "name"; created if it does not exist.
        private: whether a new repository is visible to its owner only.
        token: one with write access; by default that of `hf auth login` or of the variable HF_TOKEN.
        revision: branch, created if it does not exist; default "main".
        commit_message: of the commit.

    Raises:
        FileNotFoundError: the folder has no saved model, image processor or card, or a part of the model or of its code
            is missing.
        OSError: an index of weights is invalid, or the folder holds the weights twice.
        ValueError: the repository is public, but `private` is true; or the card's metadata cannot be read, or the Hub
            rejects it.
        PermissionError: there is no token, it has expired, or it has no write access.
        ConnectionError: the upload was interrupted.
    """
    folder = Path(folder)
    paths = published_files(folder)
    card = read_card(folder / CARD_FILE)
    api = HfApi(library_name="hf_maskformer")
    with explained_errors(repo_id):
        # `create_repo` returns the name with the owner's, which the examples in the card need.
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, token=token).private:
            raise ValueError(
                f"{repo_id} exists and is public, so nothing was uploaded. Make it private in its settings, choose "
                "another name, or publish it without asking for a private repository."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        content = rename_card(card, repo_id).content.encode()
        operations: list[Any] = [
            CommitOperationAdd(path, content if path == CARD_FILE else folder / path) for path in paths
        ]
        present = api.list_repo_files(repo_id, revision=revision, token=token)
        stale = [path for path in present if _is_published(path) and path not in paths]
        operations += [CommitOperationDelete(path) for path in stale]
        # Not upload_folder: with hf_xet, it makes several commits for a large folder or a slow upload.
        return api.create_commit(
            repo_id, operations=operations, commit_message=commit_message, revision=revision, token=token
        )


def published_files(folder: Path) -> list[str]:
    """The files of a folder that `publish` uploads, as paths in it. Raises its errors for an invalid folder."""
    found = {path.relative_to(folder).as_posix() for pattern in PUBLISHED for path in folder.glob(pattern)}
    paths = sorted(path for path in found | _code_files(folder) if (folder / path).is_file())
    save_model = "Save a model there with save_pretrained or trainer.save_model."
    required = {
        MODEL_SETTINGS: save_model,
        WEIGHTS: save_model,
        PROCESSOR_SETTINGS: "Save the image processor there too, with its save_pretrained.",
        CARD_FILE: "trainer.create_model_card() writes one; without a trainer, write it by hand.",
    }
    for pattern, remedy in required.items():
        if not any(fnmatch(path.removeprefix("adapter_"), pattern) for path in paths):
            raise FileNotFoundError(f"{folder} has no {pattern}, so nothing was published. {remedy}")
    check_weight_indices(folder, "")
    for index in folder.glob(INDEX):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shards - set(paths))
        whole = index.name.removesuffix(".index.json")
        if whole in paths and not missing:
            raise FileExistsError(f"{folder} holds weights twice, in {whole} and in shards. Remove those of one kind.")
        if whole in paths:
            paths.remove(index.name)  # transformers leaves it when a sharded model is saved again in one file
        elif missing:
            raise FileNotFoundError(
                f"{folder} lacks {shorten(missing)}, which {index.name} names, so nothing was published. {save_model}"
            )
    return paths


def _code_files(folder: Path) -> set[str]:
    """The modules in the folder that the settings name, and those that they import."""
    names = set()
    for settings in (folder / MODEL_SETTINGS, folder / PROCESSOR_SETTINGS):
        content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        for entry in (content.get("auto_map") or {}).values():
            # "file.Class", or two of them, one of which may be None; "user/name--file.Class" lies elsewhere.
            for class_name in filter(None, [entry] if isinstance(entry, str) else entry or ()):
                module = folder / f"{class_name.partition('.')[0]}.py"
                if not module.is_file():
                    continue
                try:
                    names |= {module.name, *(Path(path).name for path in get_relative_import_files(module))}
                except FileNotFoundError as error:
                    raise FileNotFoundError(
                        f"{error.filename} is missing, which {module.name} needs, so nothing was published."
                    ) from error
    return names


def _is_published(path: str) -> bool:
    # fnmatch's "*" also matches slashes, unlike that of glob.
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in PUBLISHED)


@contextmanager
def explained_errors(repo_id: str, broken_off: str = BROKEN_OFF) -> Iterator[None]:
    """Explains errors of the Hub to the user; `broken_off` is the message for a failed connection."""
    login = "Log in with `hf auth login`, or set HF_TOKEN, using a write token (huggingface.co/settings/tokens)."
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"There is no token for the Hub, so nothing was published. {login}") from error
    except RevisionNotFoundError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and "authorization" not in error.response.request.headers:
            raise PermissionError(f"There is no token for the Hub, so nothing was published. {login}") from error
        if status == 401:
            raise PermissionError(
                f"The Hub does not accept the token: it has expired or is wrong. Nothing was published. {login}"
            ) from error
        if status == 403:
            raise PermissionError(f"The token cannot write to {repo_id}; nothing was published. {login}") from error
        if status < 500:
            raise
        raise _connection_error(broken_off, repo_id, error) from error
    except PermissionError as error:  # of hf_xet
        raise PermissionError(f"{error}. Nothing was published. {login}") from error
    # HTTPError: a failed transfer. RuntimeError: how huggingface_hub wraps it for a file.
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
        raise _connection_error(broken_off, repo_id, error) from error


def _connection_error(text: str, repo_id: str, error: Exception) -> ConnectionError:
    reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
    return ConnectionError(text.format(repo_id=repo_id, reason=reason))
