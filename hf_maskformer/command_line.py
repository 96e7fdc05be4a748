"""How scripts end when something is wrong with what they were given."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Ends the script with the message of an error of its input, without the way there through the code.

    Exit codes: 1 for such an error, that of a failed script for the one that ran it, 130 for an interruption. With
    `python -X dev` errors keep their traceback.
    """
    if sys.flags.dev_mode:
        yield
        return
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
