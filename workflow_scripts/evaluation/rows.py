"""Can a row be judged? Asked once, when it is sliced, of what will judge it: lm-eval's checkers, the reader of numbers, subjects.

A row that passes stays as it is, and one that does not makes no slice: this decides no number, so it is in no fingerprint.
"""

import re
from collections.abc import Iterable
from typing import Any

from workflow_scripts.evaluation import ifeval, lm_tasks
from workflow_scripts.evaluation.numerals import gold
from workflow_scripts.plumbing.messages import InputError

# A dozen paragraphs with a list, a title and a section: whatever a checker looks for, it finds something to look at.
CANNED = "\n\n".join(["<<A title>>", "SECTION 1", "* one, two", *(f"Paragraph {n} is here. It ends well!" for n in range(9))])


def check(kind: str, rows: Iterable[tuple[str, dict]]) -> None:
    """InputError on the first row that can't be judged. rows: (place, which the error begins with; row in the kind's form)."""
    if kind == "ifeval":
        with ifeval.reference() as checkers:
            for place, row in rows:
                instructions(checkers, place, row)
    elif kind == "numeric":
        for place, row in rows:
            try:
                gold(row["final"])
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
    elif kind == "choice":
        known: set[str] = set()
        for place, row in rows:
            known = known or set(lm_tasks.groups(lm_tasks.manager()))
            if row["subject"] not in known:
                near = ", ".join(sorted(known))
                raise InputError(f"{place}: lm-eval has no subject {row['subject']!r} under subject, only {near}")


def instructions(checkers: Any, place: str, row: dict) -> None:
    """Build each checker of a row of IFEval, and run it on a text."""
    for number, arguments in enumerate(row["kwargs"], start=1):
        if not isinstance(arguments, dict):
            raise InputError(
                f"{place}: expected an object for instruction {number} under kwargs, found {arguments!r}"
                + ("; it is JSON in a text: parse it once more" if isinstance(arguments, str) else "")
            )
    ifeval.check_instructions(checkers, row, place)
    try:
        ifeval.verdicts(checkers, row, CANNED)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        given = dict(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        raise InputError(f"{place}: lm-eval's checkers can't judge an answer with {given!r} ({error!r})") from None
