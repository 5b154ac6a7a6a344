"""YAML that is read strictly: no key twice, no key that is not text, no objects (a SafeLoader)."""

import codecs
import io
from pathlib import Path

import yaml

from workflow_scripts.plumbing.messages import InputError

NO_BREAK = "\u00a0"


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the same in C, where it was built
    """SafeLoader that refuses a key given twice, where PyYAML would silently keep the last one, and keys that aren't text."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # `<<: *anchor`
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, str) and NO_BREAK in key:
            raise InputError(
                f"{key_node.start_mark.name}: line {line}: a no-break space, which is no space to YAML; type it anew"
            )
        if not isinstance(key, str):
            raise InputError(
                f"{key_node.start_mark.name}: line {line}: YAML reads this key as {key!r}, expected text; put it in quotes"
            )
        if key in seen:
            raise InputError(
                f"{key_node.start_mark.name}: line {key_node.start_mark.line + 1}: the key {key!r} stands here twice"
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path | str) -> dict:
    """The mapping in a YAML file. InputError on a syntax error, a doubled key, or anything but a mapping."""
    text = _text(path)
    try:
        if "\t" in text:  # Snakemake reads by the loader in Python, which takes fewer tabs than the one in C
            list(yaml.scan(_Named(text, str(path)), Loader=yaml.SafeLoader))
        data = yaml.load(_Named(text, str(path)), Loader=_StrictLoader)  # noqa: S506, a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        there = text.splitlines()[max(0, mark.line - 1) : mark.line + 1] if mark else []
        hint = "; YAML takes spaces, no tabs" if any("\t" in line for line in there[-1:]) else _no_break(text, there)
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}{hint}") from None
    if data is None:
        raise InputError(
            f"{path}: empty, or comments alone, which Snakemake takes for no config; write {{}} into it, or leave it out"
        )
    if not isinstance(data, dict):
        hint = _no_break(text, text.splitlines())
        raise InputError(f"{path}: expected a mapping of keys on top, found {type(data).__name__}{hint}")
    return data


class _Named(io.StringIO):
    """A text with the name of its file, which YAML's errors name."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name


def _text(path: Path | str) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise InputError(f"{path}: line 1: not UTF-8 text but UTF-16, as some editors write; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text (the byte 0x{data[error.start]:02x}); save it as UTF-8") from None


def _no_break(text: str, there: list[str]) -> str:
    """The line of the first no-break space, if one of these lines has any: a space to people, and to YAML a letter."""
    lines = [number for number, line in enumerate(text.splitlines(), 1) if NO_BREAK in line and line in there]
    return f"; line {lines[0]} has a no-break space, which is no space to YAML: type it anew" if lines else ""
