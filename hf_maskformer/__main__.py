"""The command `hf-maskformer`: runs the scripts by name, even if only the package is installed.

`python -m hf_maskformer` does the same, also in `accelerate launch -m hf_maskformer train ...`.
"""

import ast
import difflib
import sys
from pathlib import Path
from types import ModuleType

from .command_line import COMMANDS, PROGRAM, SCRIPTS, as_commands, errors_as_messages


def main() -> int:
    """Runs the given command as `python scripts/NAME.py` would.

    Exit codes: 0 for success, 1 for invalid input, 2 for an invalid command line.
    """
    name, *options = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        from . import __version__

        print(__version__)
    elif name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        problem = f"there is no command {name}.{hint}" if name else "a command is missing."
        print(f"error: {problem}\n{PROGRAM} --help shows the commands.", file=sys.stderr)
        return 2
    else:
        script, *first = COMMANDS[name].split()
        # The program name in a script's help: one with its own commands adds the command itself.
        sys.argv = [PROGRAM if first else f"{PROGRAM} {name}", *first, *options]
        run(SCRIPTS / script)
    return 0


def run(script: Path) -> None:
    """Runs a script as the main module, where its child processes look for its classes."""
    # runpy.run_path would do so too, but show the script's path instead of the command's name in the help.
    module = ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    sys.path.insert(0, str(script.parent))
    with errors_as_messages():
        exec(compile(script.read_text(), script, "exec"), module.__dict__)


def overview() -> str:
    """Lists every command with its purpose and an example, from its script's docstring."""
    lines = [f"usage: {PROGRAM} COMMAND ...", ""]
    for name, words in COMMANDS.items():
        text = as_commands(ast.get_docstring(ast.parse((SCRIPTS / words.split()[0]).read_text())) or "")
        example = text[text.index(f"{PROGRAM} {name} ") :].partition("\n\n")[0].splitlines()
        first = example[0] if not example[0].endswith("\\") else f"{example[0]}\n{example[1]}"
        lines += [f"  {name:<10}{text.splitlines()[0]}", f"{'':12}{first}", ""]
    return "\n".join([*lines, f"{PROGRAM} COMMAND --help shows the options of a command."])


if __name__ == "__main__":
    sys.exit(main())
