"""The command `hf-maskformer`: runs the scripts by name, also where only the package is installed.

`python -m hf_maskformer` is the same, for `accelerate launch -m hf_maskformer train ...` too.
"""

import ast
import difflib
import sys
from pathlib import Path
from types import ModuleType

from .command_line import COMMANDS, PROGRAM, SCRIPTS, as_commands, errors_as_messages


def main() -> int:
    """Runs what the command line asks for as `python scripts/NAME.py` would.

    Exit codes: 0, 1 for an error in what was given, 2 for a command line that cannot be understood.
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
        # What the help of a script calls it: one that has commands of its own adds the name itself.
        sys.argv = [PROGRAM if first else f"{PROGRAM} {name}", *first, *options]
        run(SCRIPTS / script)
    return 0


def run(script: Path) -> None:
    """Runs a script as the main module, where processes that it starts look for its classes."""
    # runpy.run_path would do so too, but put the script's path in place of the command's name for the help.
    module = ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    sys.path.insert(0, str(script.parent))
    with errors_as_messages():
        exec(compile(script.read_text(), script, "exec"), module.__dict__)


def overview() -> str:
    """Every command, what it does and an example of it, as its script says them."""
    lines = [f"usage: {PROGRAM} COMMAND ...", ""]
    for name, words in COMMANDS.items():
        text = as_commands(ast.get_docstring(ast.parse((SCRIPTS / words.split()[0]).read_text())) or "")
        example = text[text.index(f"{PROGRAM} {name} ") :].partition("\n\n")[0].splitlines()
        first = example[0] if not example[0].endswith("\\") else f"{example[0]}\n{example[1]}"
        lines += [f"  {name:<10}{text.splitlines()[0]}", f"{'':12}{first}", ""]
    return "\n".join([*lines, f"{PROGRAM} COMMAND --help shows the options of a command."])


if __name__ == "__main__":
    sys.exit(main())
