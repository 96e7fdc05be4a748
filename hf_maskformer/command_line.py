"""How scripts parse their options, and how they exit on invalid input."""

import argparse
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

PROGRAM = "hf-maskformer"
# A wheel has the scripts inside the package; in a checkout they are next to it.
SCRIPTS = next(root / "scripts" for root in Path(__file__).parents if (root / "scripts").is_dir())
# The commands of PROGRAM, each with its script and, if that has its own commands, the one of the same name.
COMMANDS = {
    "train": "train.py",
    "evaluate": "evaluate.py",
    "predict": "predict.py",
    "convert": "convert_checkpoint.py",
    "export": "export.py",
    "push": "push_to_hub.py",
    "check": "prepare_dataset.py check",
    "parquet": "prepare_dataset.py parquet",
    "demo": "demo.py",
    "benchmark": "benchmark.py",
}

# Names of these options in other programs.
SYNONYMS = {
    "--batch_size": "--per_device_train_batch_size",
    "--epochs": "--num_train_epochs",
    "--lr": "--learning_rate",
    "--num_epochs": "--num_train_epochs",
    "--num_steps": "--max_steps",
}

_WHOLE = r"(?<![\w./\\-])"  # the match is not a part of a longer path, which a message may quote


def as_commands(text: str) -> str:
    """A script's text with scripts replaced by commands of PROGRAM, and with full paths of configurations and docs."""
    for name, words in COMMANDS.items():
        text = text.replace(f"accelerate launch scripts/{words} ", f"accelerate launch -m hf_maskformer {name} ")
        text = re.sub(rf"(python )?{_WHOLE}scripts/{re.escape(words)}", f"{PROGRAM} {name}", text)
    return re.sub(
        rf"{_WHOLE}(docs/(?=\w+\.md)|scripts/configs/)", lambda found: f"{SCRIPTS.parent}/{found.group()}", text
    )


class _Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the formatting of examples in a description, and shows defaults that are not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):  # --no_NAME, in addition to a --NAME that is true by default
            return f"Same as --{action.dest} false."
        return action.help if action.default is None else super()._get_help_string(action)


class OptionParser(HfArgumentParser):
    """A parser for dataclasses or plain options that suggests the closest match for an unknown option.

    If PROGRAM runs a script, the description shows PROGRAM's commands instead of scripts.

    Args:
        dataclass_types: As for `HfArgumentParser`.
        hidden: Options that are shown only by `--help_all`.
        kwargs: As for `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Any = None, hidden: Collection[str] = (), **kwargs: Any) -> None:
        super().__init__(dataclass_types, **{"formatter_class": _Format, **kwargs})
        if self.description and self.prog.startswith(PROGRAM):
            self.description = as_commands(self.description)
        self.hidden = hidden
        if hidden:
            self.add_argument("--help_all", action="help", help=f"Show {len(hidden)} more options.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self._prepare(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for word in sys.argv[1:] if args is None else args:
            name, known = word.partition("=")[0], self._option_string_actions
            meant = SYNONYMS.get(name)
            if meant in known and name not in known:
                self.error(f"there is no option {name}. Did you mean {meant}?")
        return super().parse_known_args(args, namespace)

    def parse_args_into_dataclasses(self, args: Any = None) -> tuple[Any, ...]:  # type: ignore[override]
        self._prepare(sys.argv[1:] if args is None else args)
        *parsed, rest = super().parse_args_into_dataclasses(args, return_remaining_strings=True)
        if rest:
            self.error(f"unexpected arguments: {' '.join(rest)}.")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        """Exits without printing the usage, which can be longer than a screen and would hide the message."""
        self.exit(2, f"\nerror: {message}\n{self.prog} --help shows the options.\n")

    def _prepare(self, command_line: Collection[str]) -> None:
        if "--help_all" not in command_line:
            for action in self._actions:
                if action.dest in self.hidden:
                    action.help = argparse.SUPPRESS
        parser: argparse.ArgumentParser | None = self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = next((action.choices[word] for word in command_line if word in action.choices), None)
        if parser is None:  # which argparse reports
            return
        known = parser._option_string_actions
        for word in command_line:
            name = word.partition("=")[0]
            # Options may be abbreviated.
            if word.startswith("--") and not any(option.startswith(name) for option in known):
                nearest = difflib.get_close_matches(name, known, n=1)
                parser.error(f"there is no option {name}.{f' Did you mean {nearest[0]}?' if nearest else ''}")


def check_output(path: str | Path, option: str = "--output", is_folder: bool = True) -> None:
    """Raises a ValueError, before the work starts, if the folder or file that an option names is not writable."""
    existing = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    if existing.is_file() and (is_folder or existing != Path(path)):
        raise ValueError(f"{option} is {path}, but {existing} is a file. Choose another path.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{option} is {path}, but {existing} is not writable. Choose another path.")


def message_of(error: Exception) -> str:
    """The message of an error, with scripts replaced by commands of PROGRAM if that is running."""
    return as_commands(str(error)) if sys.argv[0].startswith(PROGRAM) else str(error)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Exits the script with the message of an error in its input, without a traceback.

    Exit codes: 1 for such an error, that of a child script if it failed, 130 for an interruption. With `python -X dev`
    errors keep their traceback.
    """
    if sys.flags.dev_mode:
        yield
        return
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = message_of(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            path = error.filename  # that the system could not create as a folder; our own errors have none
            if path and not Path(path).is_dir():
                message = f"{path} is a file, or inside one, where a folder is needed. Choose another path."
        print(f"\nerror: {message}", file=sys.stderr)
        sys.exit(1)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
