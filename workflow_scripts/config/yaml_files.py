"""YAML that is read strictly: no key twice, no key that is not text, no objects (a SafeLoader)."""

from pathlib import Path

import yaml

from workflow_scripts.plumbing.messages import InputError


class _StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the same in C, where it was built
    """SafeLoader that refuses a key given twice, where PyYAML would silently keep the last one, and keys that aren't text."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # `<<: *anchor`
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            line = key_node.start_mark.line + 1
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
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.load(file, Loader=_StrictLoader)  # noqa: S506, a SafeLoader
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text (UTF-16, as some editors write?); save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        there = Path(path).read_text(encoding="utf-8").splitlines()[mark.line : mark.line + 1] if mark else []
        hint = "; YAML takes spaces, no tabs" if any("\t" in line for line in there) else ""
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}{hint}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        hint = "; a no-break space after a colon is none to YAML" if "\u00a0" in str(data) else ""
        raise InputError(f"{path}: expected a mapping of keys on top, found {type(data).__name__}{hint}")
    return data
