"""A helpful error for when a data-loading worker dies."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

DEAD_WORKER = "DataLoader worker"  # how torch's message begins


@contextmanager
def dead_workers_named(num_workers: int) -> Iterator[None]:
    """Turns the error of a `DataLoader` whose worker process died into one that says what to do.

    Raises a ChildProcessError; errors that a worker reports itself propagate unchanged.
    """
    try:
        yield
    except Exception as error:
        # A worker that dies while handing over a batch shows up as a broken connection.
        is_cut_off = isinstance(error, ConnectionError | EOFError) and not str(error).startswith("Caught")
        report = _report_of_death(error)
        is_named = isinstance(error, ChildProcessError)  # by an evaluation during training
        if is_named or not num_workers or not (is_cut_off or report):
            raise
        if is_cut_off:
            # On the signal of the death, torch raises too, whatever runs then.
            with suppress(RuntimeError):
                for _ in range(20):
                    time.sleep(0.1)
        raise ChildProcessError(
            f"One of the {num_workers} data-loading workers died ({report or error}). Usually memory ran out and the "
            "system killed it: use fewer workers (--dataloader_num_workers in training, --num_workers in evaluation) "
            "or smaller batches, or give a container more memory and shared memory. If it also dies with 0 workers, "
            "the reader of one of the files crashes; scripts/prepare_dataset.py check finds it."
        ) from error


def _report_of_death(error: BaseException | None) -> BaseException | None:
    """torch's own error, raised in a signal handler and so possibly chained to whatever was running."""
    while error is not None and not (isinstance(error, RuntimeError) and str(error).startswith(DEAD_WORKER)):
        error = error.__cause__ or error.__context__
    return error
