"""A schema error as a sentence for the person who wrote the config: which key, what was found, what was expected."""

import math
from typing import Any, cast

from jsonschema.exceptions import ValidationError

LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
NOUNS = {"object": "a mapping", "array": "a list", "integer": "an integer", "boolean": "true or false"}
SIZES = {"minItems": "of at least {} entries", "minProperties": "of at least {} entries", "uniqueItems": "without repetition"}


def explain(error: ValidationError, schema: dict) -> list[tuple[list, str]]:
    """(path of the key, sentence) of each mistake behind an error against `schema`; [] where another error already says it."""
    if error.validator == "oneOf":
        return _explain_forms(error, schema)
    path, rule, value = list(error.absolute_path), cast(dict, error.schema), cast(Any, error.instance)
    if error.validator in ("additionalProperties", "unevaluatedProperties"):
        # jsonschema counts a known key with a wrong value as unevaluated too: that one is explained by its own error
        return _unknown(path, value, _known_keys(rule, schema))
    if error.validator == "required":
        # one error for each missing key, all with the same text here: doubled lines are dropped by the caller
        return [([*path, key], "missing, and it has no default") for key in sorted(set(rule["required"]) - set(value))]
    if "propertyNames" in error.absolute_schema_path:
        names = "lower-case letters, digits and _, at most 41, and none of base, data, report, ifeval, numeric, random, shuffled"
        return [([*path, value], f"not a name to use here: {names}")]
    found = _found(value)
    if error.validator == "type" and isinstance(value, str) and _is_number(value) and "string" not in str(rule["type"]):
        sentence = f"found {found}, expected {_expected(rule)}; write {_plain(float(value))} (YAML reads 5e-6 as text)"
        return [(path, sentence)]
    note = f" ({rule['description']})" if "description" in rule else ""
    return [(path, f"found {found}, expected {_expected(rule)}{note}")]


def _unknown(path: list, value: dict, known: set[str]) -> list[tuple[list, str]]:
    return [([*path, key], f"unknown key; known here: {', '.join(sorted(known))}") for key in sorted(set(value) - known, key=str)]


def _explain_forms(error: ValidationError, schema: dict) -> list[tuple[list, str]]:
    """Of the forms that a mapping may take (each with keys of its own), explain the one that the user began to write."""
    path, value = list(error.absolute_path), cast(Any, error.instance)
    rule = cast(dict, error.schema)
    if any("$ref" not in form for form in rule["oneOf"]):  # a word or a small mapping: its description says all
        inside = [e for e in error.context or () if e.path or isinstance(value, dict) and e.validator != "type"]
        lines = [line for e in inside if isinstance(value, dict) and "const" != e.validator for line in explain(e, schema)]
        return lines[:1] or [(path, f"found {_found(value)}, expected {rule['description']}")]
    forms = [schema["$defs"][form["$ref"].rsplit("/", 1)[-1]]["properties"] for form in cast(dict, error.schema)["oneOf"]]
    known = set().union(*forms)
    if not isinstance(value, dict):
        return [(path, f"found {_found(value)}, expected a mapping with one of the keys {', '.join(sorted(known))}")]
    found = _unknown(path, value, known)
    begun = [i for i, form in enumerate(forms) if set(form) & set(value)]
    if len(begun) == 1:
        inside = [e for e in error.context or () if e.schema_path[0] == begun[0] and (e.path or e.validator == "required")]
        found += [line for e in inside for line in explain(e, schema)]
    elif begun or not found:
        given = ", ".join(sorted(value, key=str)) or "none"
        found.append((path, f"found the keys {given}, expected exactly one of {', '.join(sorted(known))}"))
    return found


def dotted(path: list) -> str:
    return ".".join(str(part) for part in path) or "(top level)"


def _known_keys(rule: dict, schema: dict) -> set[str]:
    known = set(rule.get("properties", {}))
    for part in rule.get("allOf", []):
        known |= set(schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]["properties"])
    return known


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _plain(number: float) -> str:
    """The same number as YAML reads it as one: 5.0e-06, 0.1, 200."""
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    mantissa, e, exponent = repr(number).partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if e else mantissa


def _found(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {value!r}"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if value in ([], {}):
        return "an empty mapping" if isinstance(value, dict) else "an empty list"
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def _expected(rule: dict) -> str:
    if "const" in rule:
        return repr(rule["const"])
    if "enum" in rule:
        return "one of " + ", ".join(str(option) for option in rule["enum"])
    kind = rule.get("type", "another value")
    limits = [f"{word} {rule[key]}" for key, word in LIMITS.items() if key in rule]
    sizes = [text.format(rule[key]) for key, text in SIZES.items() if rule.get(key)]
    return " ".join([NOUNS.get(kind, f"a {kind}"), *limits, *sizes])
