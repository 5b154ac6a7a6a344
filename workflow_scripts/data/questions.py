"""Questions that people really asked, out of rows of any format: what instructions are added to (evaluation/compose.py).

A question is a row's first user turn, where nothing stands before it. Each is taken once, whatever its case and spaces. A
question belongs to one of PARTS by the sha256 of that text alone: a fifth is for development, on which settings are chosen, the
others for training. So no question is in both, whichever files, hubs, seeds or formats two slices read it from.

Light: the plan counts the questions of files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from workflow_scripts.data import formats, slicing
from workflow_scripts.data.words import blank, whole, words
from workflow_scripts.plumbing.content_cache import ContentCache
from workflow_scripts.plumbing.messages import InputError

PARTS = ("train", "dev")
DEV_PERCENT = 20  # one number for every slice: with two, a question could be in both parts
GIVES = ("prompts", "sft", "preference")  # kinds of slices whose formats have a question, the plainest first


class Question(NamedTuple):
    id: str  # of its row in the source
    text: str


def part_of(text: str) -> str:
    """The part that a question belongs to: a function of its text alone."""
    bucket = int.from_bytes(hashlib.sha256(_plain(text).encode()).digest()[:8], "big") % 100
    return "dev" if bucket < DEV_PERCENT else "train"


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def asked(row: dict, place: str) -> str | None:
    """The question of a row; None where a system turn stands before it. InputError on a row of no format."""
    given = {key for key, value in row.items() if value is not None}
    fitting = [form for form in formats.FORMATS if set(form.needs) <= given]
    kind = next((kind for kind in GIVES if any(kind in form.kinds for form in fitting)), GIVES[0])
    first = slicing.prompt_turns(formats.convert(row, kind, place)[1])[:1]
    return first[0]["content"].strip() if first and first[0]["role"] == "user" else None


def questions(rows: Iterable[tuple[str, str, dict]], part: str, max_words: int) -> tuple[list[Question], Counter]:
    """(the questions of one part, in the rows' order; why other rows gave none, with counts). rows: (id, place, row)."""
    found: dict[str, Question] = {}
    left: Counter = Counter()
    for row_id, place, row in rows:
        try:
            text = asked(row, place)
        except formats.Unusable as no_use:
            left[str(no_use)] += 1
            continue
        if text is None or blank(text) or not whole(text):
            left["without a question that stands alone"] += 1
        elif len(words(text)) > max_words:
            left[f"with a question above {max_words} words"] += 1
        elif part_of(text) != part:
            left["of the other part"] += 1
        elif _plain(text) in found:
            left["with a question that was there before"] += 1
        else:
            found[_plain(text)] = Question(row_id, text)
    return [*found.values()], left


def candidates_hash(files: list[str], source: dict, rows: int, seed: int, cache_file: str) -> str:
    """As `slicing.candidates_hash`. InputError where the rows that are read have fewer questions than prompts are asked for."""

    def made() -> str:
        picked = slicing.candidates(files, source["read"], seed, "ifeval")
        read = ((one.id, one.place, json.loads(one.text)) for one in picked)
        found, left = questions(read, source["part"], source["max_words"])
        if len(found) < rows:
            raise too_few(len(found), len(picked), rows, left)
        return slicing.rows_hash(picked)

    settings = [source["read"], seed, source["part"], source["max_words"], rows]
    return ContentCache(cache_file).hash_of(files, made, settings)


def too_few(found: int, read: int, rows: int, left: Counter) -> InputError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items())) or "none"
    return InputError(
        f"{found} prompts can be made of {read} rows, one a question, and `rows` asks for {rows} (left out: {reasons}); name "
        "more questions, raise read or max_words, or lower rows"
    )
