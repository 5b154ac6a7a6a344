"""Rows for KTO: answers with a label, in an order that suits its KL estimate, and the weights of the two classes."""

import json
import random
from typing import Any

from workflow_scripts.plumbing.messages import InputError

TRIES = 20  # shuffles, of which the one with the fewest prompts twice in a group is taken


def kl_rows(body: dict) -> int:
    """Answers of a group, from within which the pairs of KTO's KL estimate come. body: the experiment, resolved."""
    given = body["kl_rows"]
    return body["train"]["per_device_train_batch_size"] if given == "micro_batch" else given  # type: ignore[no-any-return]


def unpair(rows: list[dict]) -> list[dict]:
    """One row for each answer: `id`, `prompt`, `completion`, `label`. Rows that are unpaired already stay as they are."""
    found = []
    for row in rows:
        if "chosen" in row:
            for side in ("chosen", "rejected"):
                made = {"id": f"{row['id']}/{side}", "completion": row[side], "label": side == "chosen"}
                found.append({"prompt": row["prompt"], **made})
        else:
            found.append({key: row[key] for key in ("id", "prompt", "completion", "label")})
    return found


def spread(rows: list[dict], group: int, seed: int) -> tuple[list[dict], int]:
    """(the rows in a random order in which no group has a prompt twice, how often one has all the same).

    Groups are filled from a shuffled list; a row whose prompt is in the group already waits for the next one. A last group of
    one row, whose mismatched answer would be its own, is left out.
    """
    best: tuple[int, list[dict]] | None = None
    for attempt in range(TRIES):
        coming = [(json.dumps(row["prompt"]), row) for row in rows]
        random.Random(f"{seed}/{attempt}").shuffle(coming)
        coming.reverse()  # taken from the end
        late: list[tuple[str, dict]] = []
        order: list[dict] = []
        twice = 0
        while coming or late:
            inside: set[str] = set()
            taken: list[dict] = []
            waiting: list[tuple[str, dict]] = []
            late.reverse()
            while len(taken) < group and (late or coming):
                prompt, row = (late or coming).pop()
                if prompt in inside:
                    waiting.append((prompt, row))
                else:
                    taken.append(row)
                    inside.add(prompt)
            late = waiting + late[::-1]
            if len(taken) < group and late:  # nothing left but prompts that are in this group
                missing = group - len(taken)
                twice += len(late[:missing])
                taken, late = taken + [row for _, row in late[:missing]], late[missing:]
            order += taken
        if best is None or twice < best[0]:
            best = (twice, order)
        if twice == 0:
            break
    assert best is not None
    twice, order = best
    return (order[:-1] if len(order) % group == 1 else order), twice


def weights(rows: list[dict], chosen: str | dict, place: str) -> dict[str, Any]:
    """`desirable_weight` and `undesirable_weight` of TRL's config. InputError if one of the two classes has no row."""
    desirable = sum(row["label"] for row in rows)
    undesirable = len(rows) - desirable
    if not desirable or not undesirable:
        which = "undesirable (label false)" if desirable else "desirable (label true)"
        raise InputError(f"{place}: none of the {len(rows)} rows is {which}; KTO needs both kinds of answers")
    if chosen != "ratio":
        assert isinstance(chosen, dict)
        return {"desirable_weight": chosen["desirable"], "undesirable_weight": chosen["undesirable"]}
    return {
        "desirable_weight": max(1.0, undesirable / desirable),
        "undesirable_weight": max(1.0, desirable / undesirable),
    }
