"""Rewards that are functions of a response: is its number right (GSM8K), which share of IFEval's instructions does it follow.
`CHECKS` are those with settings, which a config declares under `rewards:`; each says whether it holds.

How a number is read, and where that departs from lm-eval: evaluation/numerals.py.
"""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from workflow_scripts.evaluation import ifeval, lm_rules
from workflow_scripts.evaluation.numerals import final_number, gold
from workflow_scripts.plumbing.messages import InputError


def numeric(response: str, final: str | int | Decimal) -> bool:
    """Whether the final number of a response equals `final`, as numbers: 18.00 is 18, 0.333 is not 1/3.

    Raises InputError if `final` is not a number.
    """
    return final_number(response) == gold(final)


def ifeval_share(utils: Any, row: dict, response: str) -> float:
    """Share of a prompt's instructions that the response follows, 0 to 1, by lm-eval's strict checkers.

    utils: what `ifeval.reference()` gives; call it inside that block, which holds `random` and langdetect still and puts
    them back. row: `instruction_id_list`, `kwargs`, `prompt` and, normally, `key`. The share and not "all or none", the
    score of the evaluation: a prompt of two instructions of which one is hard to follow still tells answers apart.
    An empty response follows nothing. Raises InputError on a row that can't be judged.
    """
    try:
        followed = ifeval.verdicts(utils, row, response, ("strict",))["strict"]
        return sum(followed) / len(followed)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        name = row.get("key", row.get("id"))
        raise InputError(
            f"the prompt with key {name!r}: its instruction_id_list and kwargs can't be judged ({error!r}); correct the row"
        ) from error


Check = Callable[[str, dict], bool]  # (response, row)


def exact(settings: dict) -> Check:
    """Whether the response, without blanks around it, is what the row says in `field`."""

    def plain(value: Any) -> str:
        text = str(value).strip()
        return text.casefold() if settings["ignore_case"] else text

    return lambda response, row: plain(response) == plain(row[settings["field"]])


def number(settings: dict) -> Check:
    """Whether the response gives the number in the row's `field`, as one of lm-eval's rules for GSM8K reads and compares it."""
    rule, field = settings["rule"], settings["field"]
    return lambda response, row: lm_rules.match(rule, response, str(row[field]))


def regex(settings: dict) -> Check:
    """Whether `pattern` is in the response or, with `whole`, all of it but blanks around it."""
    pattern = re.compile(settings["pattern"])
    return lambda response, row: bool(pattern.fullmatch(response.strip()) if settings["whole"] else pattern.search(response))


def json_schema(schema: dict) -> Check:
    """Whether the response is JSON and nothing else, and the schema (draft 2020-12) allows it. No `$ref` is fetched."""
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    validator = Draft202012Validator(schema, registry=Registry())

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def check(response: str, row: dict) -> bool:
        try:
            return validator.is_valid(json.loads(response, parse_constant=refuse))
        except Unresolvable as error:
            raise InputError(f"json_schema: {error.ref!r} is not in the schema itself; write it under $defs") from None
        except (ValueError, RecursionError):
            return False

    return check


def length(settings: dict) -> Check:
    """Whether the response has at least `least` and at most `most` words (by blanks) or characters."""

    def check(response: str, row: dict) -> bool:
        size = len(response.split() if settings["unit"] == "words" else response)
        return settings["least"] <= size <= settings["most"]

    return check


def expressions(settings: dict) -> Check:
    """Whether the response gives an expression that equals the one in the row's `field` (rl/expressions.py)."""
    from importlib import import_module

    # So that its code counts for rewards that use it alone (plan/rewarded.py).
    return import_module("workflow_scripts.rl.expressions").check(settings)


CHECKS: dict[str, Callable[[dict], Check]] = {
    "exact": exact,
    "number": number,
    "math": expressions,
    "regex": regex,
    "json_schema": json_schema,
    "length": length,
}
