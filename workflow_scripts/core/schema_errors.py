"""A schema error as a sentence for the person who wrote the config: which key, what was found, what was expected."""

from typing import Any, cast

from jsonschema.exceptions import ValidationError

LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
NOUNS = {"object": "a mapping", "array": "a list", "integer": "an integer", "boolean": "true or false"}


def explain(error: ValidationError, schema: dict) -> tuple[list, str] | None:
    """(path of the key, sentence) of an error against `schema`; None where another error already says it."""
    while error.context and error.validator in ("anyOf", "oneOf"):
        # Of the forms that a key may take, explain the one that the user began to write.
        begun = [e for e in error.context if not (e.validator == "required" and len(e.path) == 0)]
        keyed = [e for e in begun if e.validator != "additionalProperties"]
        if len(keyed or begun) != 1:
            break
        error = (keyed or begun)[0]
    path, rule, value = list(error.absolute_path), cast(dict, error.schema), cast(Any, error.instance)
    if error.validator in ("additionalProperties", "unevaluatedProperties"):
        known = _known_keys(rule, schema)
        unknown = sorted(set(value) - known)
        if not unknown:  # jsonschema counts a known key with a wrong value as unevaluated too
            return None
        return [*path, unknown[0]], f"unknown key; known here: {', '.join(sorted(known))}"
    if error.validator == "required":
        missing = sorted(set(rule["required"]) - set(value))
        return [*path, missing[0]], "missing, and it has no default"
    if "propertyNames" in error.absolute_schema_path:
        return [
            *path,
            value,
        ], "not a name to use here: lower-case letters, digits and _, at most 41, and none of base, data, report, ifeval, numeric"
    found = _found(value)
    if error.validator == "type" and isinstance(value, str) and _is_number(value) and "string" not in str(rule["type"]):
        return path, f"found {found}, expected {_expected(rule)}; write {_plain(float(value))} (YAML reads 5e-6 as text)"
    note = f" ({rule['description']})" if "description" in rule else ""
    return path, f"found {found}, expected {_expected(rule)}{note}"


def dotted(path: list) -> str:
    return ".".join(str(part) for part in path) or "(top level)"


def _known_keys(rule: dict, schema: dict) -> set[str]:
    known = set(rule.get("properties", {}))
    for part in rule.get("allOf", []):
        known |= set(schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]["properties"])
    return known


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(number: float) -> str:
    """A number as YAML reads it as one: 5.0e-06, 0.1, 200."""
    return f"{number:.1e}" if number and not 1e-3 <= abs(number) < 1e6 else f"{number:g}"


def _found(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {value!r}"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def _expected(rule: dict) -> str:
    if "const" in rule:
        return repr(rule["const"])
    if "enum" in rule:
        return "one of " + ", ".join(str(option) for option in rule["enum"])
    if "oneOf" in rule:
        return "one of the forms in config/schema.yaml"
    kind = rule.get("type", "another value")
    limits = [f"{word} {rule[key]}" for key, word in LIMITS.items() if key in rule]
    return " ".join([NOUNS.get(kind, f"a {kind}"), *limits])
