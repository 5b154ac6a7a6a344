"""Rewards that are functions of a response: is its number right (GSM8K), which share of IFEval's instructions does it follow.

How a number is read, and where that departs from lm-eval: evaluation/numerals.py.
"""

import re
from decimal import Decimal
from typing import Any

from workflow_scripts.evaluation import ifeval
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
