"""Streams a JSON file that is too large for memory, such as COCO's, and later reads single entries of it."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

Span = tuple[int, int]  # first byte, and the one after the last

CHUNK = 2**22


def stream_json(path: Path, arrays: Collection[str]) -> Iterator[tuple[str, Any, Span]]:
    """Yields the members of the object in a file, in order: (key, value, span in the file).

    The lists named in `arrays` are yielded one element at a time, so that only one is in memory. Raises a ValueError
    that names file and byte if the file is not a JSON object, is truncated, or such a list is not a list.
    """
    with path.open("rb") as file:
        cursor = _Cursor(path, file)
        for _ in cursor.items("{", "}"):
            key, _ = cursor.value()
            cursor.expect(":")
            if key in arrays:
                for _ in cursor.items("[", "]"):
                    yield key, *cursor.value()
            else:
                yield key, *cursor.value()


def read_entries(path: Path, spans: Collection[Span]) -> list[Any]:
    """Reads the values at spans from `stream_json`. Raises a ValueError if the file has changed since."""
    try:
        with path.open("rb") as file:
            return [_read_entry(file, span) for span in spans]
    except ValueError as error:
        raise ValueError(f"{path} has changed since it was opened ({error}). Open the data set again.") from error


def _read_entry(file: IO[bytes], span: Span) -> Any:
    file.seek(span[0])
    return json.loads(file.read(span[1] - span[0]))


class _Cursor:
    """A position in a JSON file, of which a window is in memory: one character per byte, so positions are bytes."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._decoder = json.JSONDecoder()
        self._window = file.read(max(CHUNK, 3)).decode("latin-1")
        self._start = 0
        # Windows editors prepend a byte order mark.
        self._place = 3 if self._window.startswith("\xef\xbb\xbf") else 0

    def value(self) -> tuple[Any, Span]:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._place)
                # A number at the very end of the window may continue, as with "." or "e-".
                if not re.fullmatch(r"|\.|[eE][+-]?", self._window[end : end + 3]) or not self._read_on():
                    break
            except RecursionError as error:
                raise self._error("is nested too deeply") from error
            except ValueError as error:
                if not self._read_on():
                    raise self._error("is not a complete JSON value") from error
        text = self._window[self._place : end]
        if not text.isascii():
            try:
                value = json.loads(text.encode("latin-1"))
            except UnicodeDecodeError as error:
                raise self._error(f"begins a value that is not UTF-8 ({error})") from error
        span = (self._start + self._place, self._start + end)
        self._place = end
        return value, span

    def items(self, opening: str, closing: str) -> Iterator[None]:
        """Yields before each item of a list or object, which the caller then reads."""
        self.expect(opening)
        if self._peek() != closing:
            yield
        while self._peek() != closing:
            self.expect(",")
            yield
        self.expect(closing)

    def expect(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"should be '{character}'")
        self._place += 1

    def _peek(self) -> str:
        while True:
            while self._place < len(self._window):
                character = self._window[self._place]
                if character not in " \t\r\n":
                    return character
                self._place += 1
            if not self._read_on():
                raise self._error("is the end of the file, in the middle of its content")

    def _read_on(self) -> bool:
        # The window doubles for a value that does not fit, so that it is not reparsed many times.
        chunk = self._file.read(max(CHUNK, len(self._window) - self._place))
        if not chunk:
            return False
        self._window = self._window[self._place :] + chunk.decode("latin-1")
        self._start += self._place
        self._place = 0
        return True

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._path}: byte {self._start + self._place} {problem}. Download or export it again.")
