"""Rewards that the config declares under `rewards:`, for `reward:` to name: a function of the user's or a check with settings."""

import re

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from workflow_scripts.config.written import Written

KINDS = ("file", "exact", "number", "math", "regex", "json_schema", "length")


def names(config: Written) -> list[str]:
    return list(config.data.get("rewards", {}))


def check(config: Written, taken: dict[str, str]) -> None:
    """InputError on a declaration that says nothing or two things, can't be meant, or has the name of something else.

    taken: name -> what it is of already.
    """
    for name, body in config.data.get("rewards", {}).items():
        path = ["rewards", name]
        if name in taken:
            raise config.fail(path, f"the name of {taken[name]}; take another one")
        if len(found := [kind for kind in KINDS if kind in body]) != 1:
            problem = f"found {' and '.join(found) or 'none of them'}, expected one of {', '.join(KINDS)}"
            raise config.fail(path, problem)
        if ("file" in body) != ("function" in body):
            missing = "file" if "function" in body else "function"
            problem = "missing: a reward of your own is a file and a function in it" if missing == "function" else "missing"
            raise config.fail([*path, missing], problem)
        if "regex" in body:
            try:
                re.compile(body["regex"]["pattern"])
            except re.error as error:
                raise config.fail([*path, "regex", "pattern"], f"no regular expression: {error}") from None
        if "json_schema" in body:
            try:
                Draft202012Validator.check_schema(body["json_schema"])
            except SchemaError as error:
                problem = f"no JSON schema (draft 2020-12): {error.message}"
                raise config.fail([*path, "json_schema", *error.absolute_path], problem) from None
        if (length := body.get("length")) and length["least"] > length["most"]:
            raise config.fail([*path, "length"], f"found least {length['least']} above most {length['most']}")
