"""Reads detectron2's YAML files, complete ones and those that override the values of another."""

import ast
import os
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 8  # detectron2's own have four levels


class _Loader(yaml.SafeLoader):
    """Plain data only, and the tuples that detectron2 writes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        node = super().compose_node(parent, index)
        # detectron2's own files share lists by alias; nested mappings shared that way could expand without end.
        if isinstance(node, yaml.MappingNode):
            if id(node) in self.mappings:
                raise yaml.composer.ComposerError(None, None, "a mapping is used twice by alias", node.start_mark)
            self.mappings.add(id(node))
        return node

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.mappings: set[int] = set()


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)
# The paper's files compute augmentation sizes in Python. They are not used, so their source text suffices.
_Loader.add_constructor(
    "tag:yaml.org,2002:python/object/apply:eval", lambda loader, node: loader.construct_sequence(node, deep=True)
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a file and its bases: `_BASE_` names one, relative to the file, whose values it overrides.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is not a mapping of plain data, or the chain of bases is circular.
    """
    return _read(Path(path), ())


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns `{"MODEL": {"MASK_ON": x}}` into `{"MODEL.MASK_ON": x}`.

    Strings that are Python literals are evaluated, as in detectron2: in YAML, `("name",)` is not a list.

    Raises:
        ValueError: It is nested deeper than any configuration, for instance by an alias of itself.
    """
    if prefix.count(".") > MAX_DEPTH:
        raise ValueError(f"the configuration is nested more than {MAX_DEPTH} deep at {prefix[:80]}...")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: _decoded(value)})
    return flat


def _decoded(value: Any) -> Any:
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    # RecursionError, MemoryError: brackets within brackets.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return value


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in readers:
        chain = " -> ".join(str(reader) for reader in (*readers, path))
        raise ValueError(f"The files have a circular chain of bases: {chain}. Change a _BASE_.")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, but is the _BASE_ of {readers[-1]}. Put it there, or change _BASE_."
            if readers
            else f"{path} does not exist. Give the YAML file that belongs to the checkpoint."
        )
    try:
        # Only plain data and tuples are constructed: the loader is a SafeLoader with additional tags.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    # Invalid dates, numbers and booleans raise errors of other types.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file of plain data: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}, but a configuration is a mapping of names to values."
        )
    base = values.pop("_BASE_", None)
    if base is None:
        return values
    if not isinstance(base, str) or "://" in base:
        raise ValueError(f"{path} has _BASE_ {base!r}; it must be the name of a file.")
    return _merge(_read(path.parent / os.path.expanduser(base), (*readers, path)), values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both_nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_nested else value
    return merged
