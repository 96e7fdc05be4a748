"""Pickles of numpy arrays are read; anything more is refused by name, and nothing that they ask for is run."""

import collections
import copyreg
import io
import pickle
import struct
import subprocess

import numpy as np
import pytest

from hf_maskformer.hub.unpickling import RefusedPickleError, load_pickle

ARRAYS = {
    "float32": np.arange(6, dtype="f4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "no axes": np.array(3),
    "no values": np.zeros((0, 3), "i8"),
    "truth values": np.array([True, False]),
    "half": np.ones(3, "f2"),
}
OTHERS = {
    "number": 2**70,
    "pi": 3.5,
    "list": [1, None, True],
    "tuple": (1, "é"),
    "ordered": collections.OrderedDict(a=1),
}
CALLS: list[object] = []


def witness(*arguments):
    """What a hostile pickle tries to call."""
    CALLS.append(arguments)


class Call:
    """Pickled, this is the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def write(tmp_path, content: bytes):
    path = tmp_path / "checkpoint.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_checkpoint_holds_comes_back_from_every_protocol(tmp_path, protocol):
    content = {"model": ARRAYS, "scalar": np.float32(2.5), **OTHERS}
    loaded = load_pickle(write(tmp_path, pickle.dumps(content, protocol=protocol)))
    for name, array in ARRAYS.items():
        assert loaded["model"][name].dtype == array.dtype
        assert np.array_equal(loaded["model"][name], array)
    assert loaded["scalar"] == 2.5
    assert {name: loaded[name] for name in OTHERS} == OTHERS


def test_an_array_named_twice_is_read_once(tmp_path):
    array = np.zeros(4)
    loaded = load_pickle(write(tmp_path, pickle.dumps([array, array])))
    assert loaded[0] is loaded[1]


def global_call(module, name, argument=b"N"):
    """A pickle that calls module.name with one argument, whatever the name is."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


HOSTILE_GLOBALS = {
    "os.system": global_call("os", "system", b"X\x02\x00\x00\x00id"),
    "posix.system": global_call("posix", "system"),
    "builtins.eval": global_call("builtins", "eval"),
    "builtins.getattr": global_call("builtins", "getattr"),
    "builtins.bytearray": global_call("builtins", "bytearray", b"J\xff\xff\xff\x7f"),
    "subprocess.Popen": pickle.dumps(Call(subprocess.Popen, ["id"])),
    "test_unpickling.witness": pickle.dumps(Call(witness, 1)),
    "numpy.load": global_call("numpy", "load"),
    "numpy.memmap": pickle.dumps(Call(np.memmap, "file"), protocol=2),
    "functools.partial": pickle.dumps(Call(__import__("functools").partial, print)),
    "builtins.set": b"\x80\x02cbuiltins\nset\n)R.",
    # Dotted names reach attributes of admitted ones.
    "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "os.getcwd": b"(ios\ngetcwd\n.",
}


@pytest.mark.parametrize("name", HOSTILE_GLOBALS)
def test_other_globals_are_refused_by_name_and_not_called(tmp_path, name):
    CALLS.clear()
    shown = r"INST" if name == "os.getcwd" else name.replace(".", r"\.")
    with pytest.raises(RefusedPickleError, match=rf"{shown}.* refused"):
        load_pickle(write(tmp_path, HOSTILE_GLOBALS[name]))
    assert not CALLS


class WithState:
    def __setstate__(self, state):
        witness(state)


def object_with_state():
    instance = WithState()
    instance.value = 1
    return instance


def ndarray_state(shape, dtype, data):
    """A pickle of one array with this state, which numpy itself might not write."""
    rebuild = np.zeros(0).__reduce__()[0]

    class Array:
        def __reduce__(self):
            return rebuild, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data)

    return pickle.dumps(Array(), protocol=4)


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return "somewhere" if value == "stored elsewhere" else None


def persistent_pickle(protocol):
    buffer = io.BytesIO()
    Persistent(buffer, protocol=protocol).dump("stored elsewhere")
    return buffer.getvalue()


RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n"
HOSTILE_CONTENT = {
    "an object's state": (pickle.dumps(object_with_state()), r"test_unpickling\.WithState"),
    "an array of objects": (pickle.dumps(np.array([object()], dtype=object)), r"type 'O8'"),
    "an array of text": (pickle.dumps(np.array(["a"])), r"type 'U1'"),
    "an array with fields": (pickle.dumps(np.zeros(2, dtype=[("a", "f4"), ("b", "O")])), r"type 'V12'"),
    "an array's subclass": (pickle.dumps(np.zeros(2).view(np.recarray)), r"numpy\.rec"),
    "another class to rebuild": (
        b"\x80\x02" + RECONSTRUCT + b"cnumpy\ndtype\nK\x00\x85C\x01b\x87R.",
        r"an array of class",
    ),
    "bytes in place of a class": (b"\x80\x02" + RECONSTRUCT + b"C\x01xK\x00\x85C\x01b\x87R.", r"an array of class"),
    "a scalar of objects": (b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87R.", r"type 'O8'"),
    "too large a shape": (ndarray_state((2**40,), np.dtype("f4"), b"abcd"), r"comes with 4 bytes"),
    "a negative shape": (ndarray_state((-1, -1), np.dtype("f4"), b"abcd"), r"its shape is"),
    "a list in place of bytes": (ndarray_state((1,), np.dtype("O"), [witness]), r"refused"),
    "a call of an array": (b"\x80\x02cnumpy\nndarray\nK\x01\x85R.", r"it calls .*refused"),
    "a call of a string": (b"\x80\x02X\x01\x00\x00\x00x)R.", r"it calls 'x'"),
    "an object made without a call": (b"\x80\x02cnumpy\nndarray\n)\x81.", r"NEWOBJ"),
    "a state for a dictionary": (b"\x80\x02}}b.", r"sets the state of a dict"),
    "a persistent id": (persistent_pickle(0), r"PERSID"),
    "a binary persistent id": (persistent_pickle(4), r"BINPERSID"),
    "a set": (pickle.dumps({1, 2}, protocol=4), r"EMPTY_SET"),
    "bytes": (pickle.dumps(b"abc"), r"it holds a bytes"),
    "a class": (b"\x80\x02cnumpy\nndarray\n.", r"it holds a type"),
    "a list inside itself": (b"\x80\x02]q\x00h\x00a.", r"contain themselves"),
    "an announced gigabyte": (
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        r"announces 4611686018427387904 bytes",
    ),
    "an announced byte array": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.", r"announces 1099511627776 bytes"),
    "an announced text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.", r"announces"),
    "an announced frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.", r"announces"),
    "a buffer from outside": (b"\x80\x05\x97.", r"NEXT_BUFFER"),
    "no such protocol": (b"\x80\x63N.", r"not a readable pickle"),
    "no such instruction": (b"\x80\x02\xff.", r"not a readable pickle"),
    "an empty stack": (b"\x80\x02R.", r"not a readable pickle"),
    "nothing at all": (b"", r"announces 1 bytes where only 0 are left"),
    "the end is missing": (pickle.dumps(ARRAYS)[:-20], r"announces"),
    "not a pickle": (b"PK\x03\x04 a zip archive", r"checkpoint\.pkl"),
}


@pytest.mark.parametrize("kind", HOSTILE_CONTENT)
def test_what_is_no_checkpoint_is_refused_and_not_run(tmp_path, kind):
    content, message = HOSTILE_CONTENT[kind]
    CALLS.clear()
    with pytest.raises(RefusedPickleError, match=message):
        load_pickle(write(tmp_path, content))
    assert not CALLS


@pytest.mark.parametrize("ending", [b"Ns.", b"\x93.", b"K\x01K\x02\x87R."])
def test_a_tuple_of_itself_many_times_over_is_never_unfolded(tmp_path, ending):
    """Forty levels of (x, x): to hash or to show it would take years."""
    nested = b")" + b"2\x86" * 40
    with pytest.raises(RefusedPickleError):
        load_pickle(write(tmp_path, b"\x80\x04}" + nested + nested + ending))


def test_the_registry_of_extensions_is_not_asked(tmp_path):
    copyreg.add_extension("test_unpickling", "witness", 1234)
    try:
        content = pickle.dumps(Call(witness, 1), protocol=2)
        assert b"\x83\xd2\x04" in content  # EXT2 and the number, no name
        CALLS.clear()
        pickle.loads(content)  # afterwards the function lies in the registry's cache
        assert CALLS
        CALLS.clear()
        with pytest.raises(RefusedPickleError, match=r"EXT2"):
            load_pickle(write(tmp_path, content))
        assert not CALLS
    finally:
        copyreg.remove_extension("test_unpickling", "witness", 1234)


def test_one_text_decoded_over_and_over_is_refused(tmp_path):
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x00"
    decode = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0"
    with pytest.raises(RefusedPickleError, match=r"decodes more bytes than it holds"):
        load_pickle(write(tmp_path, b"\x80\x02" + text + decode * 1000 + b"."))


@pytest.mark.parametrize("protocol", [0, 2])
def test_files_of_numpy_before_and_after_it_moved_its_core_are_read(tmp_path, protocol):
    content = pickle.dumps({**ARRAYS, "scalar": np.float32(2.5)}, protocol=protocol)
    for core in (b"core", b"_core"):
        moved = content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", b"numpy." + core + b".")
        assert b"numpy." + core + b".multiarray" in moved
        loaded = load_pickle(write(tmp_path, moved))
        assert all(np.array_equal(loaded[name], array) for name, array in ARRAYS.items())
        assert loaded["scalar"] == 2.5
