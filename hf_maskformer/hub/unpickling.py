"""Reads pickled checkpoints without executing any code from them.

A pickle is a program. This interpreter supports only the instructions that build numbers, strings, dictionaries, lists
and tuples, and calls nothing but the stand-ins below, which replace numpy's functions and check their arguments. So no
function of numpy, or of anything else, ever gets an argument from the file.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ALLOWED_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE FLOAT BINFLOAT INT BININT BININT1 BININT2 LONG LONG1
    LONG4 STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
"""
OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
NUMBER_TYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


KEY_TYPES = (str, int, float, bool, type(None))


class RefusedPickleError(ValueError):
    """The file is damaged, or contains or does more than a checkpoint of numpy arrays needs."""


def load_pickle(path: str | Path) -> Any:
    """Reads a pickle of numpy arrays, numbers, strings, dictionaries, lists and tuples.

    Arrays are read-only views of the file's content, so that a small file cannot exhaust memory.

    Raises:
        RefusedPickleError: The file refers to, builds or calls anything else, which is named and not executed, or it is
            truncated.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            return _finish(_RestrictedUnpickler(_BoundedReader(file, size)).load(), done={}, depth=0)
        except RefusedPickleError as error:
            raise RefusedPickleError(f"{path}: {error}") from error
        # Anything that a damaged program does to the interpreter's stack ends here.
        except Exception as error:
            raise RefusedPickleError(
                f"{path} is not a readable pickle ({type(error).__name__}: {error}): truncated, or in another format?"
            ) from error


def shown(value: Any) -> str:
    """A value from the file for a message; only the type of a container, which may expand without end."""
    is_plain = value is None or type(value) in (str, int, float, bool)
    return repr(value)[:100] if is_plain else f"a {type(value).__name__}"


class _BoundedReader(io.RawIOBase):
    """A file that refuses to read past its end, before memory is allocated for a size in a header."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.left:
            raise RefusedPickleError(
                f"it announces {size} bytes where only {self.left} are left. Is it truncated? Download it again."
            )
        self.left -= size
        return self.file.read(size)

    def readinto(self, buffer: Any) -> int:
        buffer[:] = self.read(len(buffer))
        return len(buffer)

    def readline(self, size: int | None = -1) -> bytes:
        line = self.file.readline(-1 if size is None else size)
        self.left -= len(line)
        return line


class _DType:
    """Stands in for `numpy.dtype`."""

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        if type(name) is not str or name not in NUMBER_TYPES:
            raise RefusedPickleError(f"an array of type {shown(name)} is refused: only numbers and booleans are read.")
        self.name: str = name
        self.byte_order = "="

    def set_state(self, state: Any) -> None:
        _version, self.byte_order, *structure = state
        # Sub-arrays, names and fields could hide objects in an array of numbers.
        if self.byte_order not in ("<", ">", "|", "=") or any(part is not None for part in structure[:3]):
            raise RefusedPickleError("an array with fields or sub-arrays is refused: only plain numbers are read.")

    def finished(self) -> np.dtype:
        return np.dtype(self.byte_order + self.name)


class _Array:
    """Stands in for `numpy.ndarray`."""

    def __init__(self) -> None:
        self.content: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.set_content(data, dtype, shape, "F" if is_fortran else "C")

    def set_content(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
            raise RefusedPickleError("an array is refused: its content is not plain bytes of a number type.")
        if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
            raise RefusedPickleError(f"an array is refused: its shape is {shown(shape)}.")
        number_type = dtype.finished()
        if math.prod(shape) * number_type.itemsize != len(data):
            raise RefusedPickleError(f"an array of shape {shape} is refused: it comes with {len(data)} bytes.")
        self.content = np.ndarray(shape, number_type, data, order=order)
        self.content.flags.writeable = False


def _empty_array(array_type: Any, shape: Any, type_code: Any) -> _Array:
    if array_type is not _Array:
        raise RefusedPickleError(f"an array of class {shown(array_type)} is refused: only numpy.ndarray is read.")
    return _Array()


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.set_content(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    return _array_from_buffer(data, dtype, ()).content.item()  # type: ignore[union-attr]  # set_content has set it


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError(f"_codecs.encode with {shown(encoding)} is refused: only text as latin1 is read.")
    return text.encode("latin1")


def _empty_dict() -> dict:
    return {}


def _empty_bytes() -> bytes:
    """Old protocols have no instruction for empty bytes."""
    return b""


STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    # numpy 2 moved its core.
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _empty_array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_from_buffer),
        )
    },
}
CALLABLE = (_empty_dict, _encode, _empty_bytes, _DType, _empty_array, _scalar, _array_from_buffer)


# The interpreter in Python, whose table of instructions can be restricted; the one in C has all of them built in.
_Unpickler: Any = pickle._Unpickler


class _RestrictedUnpickler(_Unpickler):
    """Executes only the allowed instructions."""

    dispatch: dict[int, Callable[[Any], None]]

    def __init__(self, file: _BoundedReader) -> None:
        super().__init__(file)
        self.decoded_bytes_left = file.left

    def find_class(self, module: str, name: str) -> Any:
        if type(module) is not str or type(name) is not str:
            raise RefusedPickleError("it asks for something whose name is not a string, which is refused.")
        if (module, name) not in STAND_INS:
            remedy = "Give the .pth that it was made from. " if module.partition(".")[0] == "torch" else ""
            raise RefusedPickleError(
                f"it asks for {module}.{name}, which is refused and was not run. {remedy}A .pkl needs only numpy "
                "arrays, numbers, strings, dictionaries and lists."
            )
        return STAND_INS[module, name]

    def load_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.append(self.find_class(module, name))

    def load_global(self) -> None:
        module, name = (self.readline()[:-1].decode("utf-8") for _ in range(2))
        self.append(self.find_class(module, name))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if function not in CALLABLE or type(arguments) is not tuple:
            raise RefusedPickleError(f"it calls {shown(function)}, which is refused and was not run.")
        result = function(*arguments)
        if isinstance(result, bytes):
            # A few instructions could decode one long text many times.
            self.decoded_bytes_left -= len(result)
            if self.decoded_bytes_left < 0:
                raise RefusedPickleError("it decodes more bytes than it holds, which is refused.")
        self.append(result)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(self.stack[-1], items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        # A tuple is hashed through all its levels, and a few bytes can build one that takes years.
        if type(target) is not dict or any(type(key) not in KEY_TYPES for key in items[::2]):
            raise RefusedPickleError("it holds a dictionary whose keys are not strings or numbers, which is refused.")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_bytearray8(self) -> None:
        # The inherited method allocates the announced memory before it reads.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) not in (_Array, _DType):
            raise RefusedPickleError(f"it sets the state of a {type(target).__name__}, which is refused.")
        target.set_state(state)


def _refuse(name: str) -> Callable[[_RestrictedUnpickler], None]:
    def refuse(unpickler: _RestrictedUnpickler) -> None:
        raise RefusedPickleError(f"it uses the instruction {name}, which is refused and was not run.")

    return refuse


_RestrictedUnpickler.dispatch = {
    **{code: _refuse(name) for code, name in OPCODE_NAMES.items()},
    **{code: _Unpickler.dispatch[code] for code, name in OPCODE_NAMES.items() if name in ALLOWED_OPCODES.split()},
    pickle.STACK_GLOBAL[0]: _RestrictedUnpickler.load_stack_global,
    pickle.GLOBAL[0]: _RestrictedUnpickler.load_global,
    pickle.REDUCE[0]: _RestrictedUnpickler.load_reduce,
    pickle.BUILD[0]: _RestrictedUnpickler.load_build,
    pickle.BYTEARRAY8[0]: _RestrictedUnpickler.load_bytearray8,
    pickle.SETITEM[0]: _RestrictedUnpickler.load_setitem,
    pickle.SETITEMS[0]: _RestrictedUnpickler.load_setitems,
    pickle.DICT[0]: _RestrictedUnpickler.load_dict,
}


def _finish(value: Any, done: dict[int, Any], depth: int) -> Any:
    """Replaces stand-ins by their arrays, in every container, and refuses anything else that is left."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth > 20:
        raise RefusedPickleError("its containers are nested more than 20 deep, or contain themselves.")
    # A container that occurs again is finished once: a few bytes may refer to it many times.
    if id(value) not in done:
        if type(value) is _Array and value.content is not None:
            done[id(value)] = value.content
        elif type(value) is dict:
            pairs = ((_finish(key, done, depth + 1), item) for key, item in value.items())
            done[id(value)] = {key: _finish(item, done, depth + 1) for key, item in pairs}
        elif type(value) in (list, tuple):
            done[id(value)] = type(value)(_finish(item, done, depth + 1) for item in value)
        else:
            raise RefusedPickleError(f"it holds a {type(value).__name__}, which no checkpoint needs.")
    return done[id(value)]
