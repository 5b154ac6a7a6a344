"""Which rows of preferences a method trains on: those that are whole within its `max_length`. One rule for DPO, KTO and RM.

TRL cuts what is longer for DPO and KTO, and leaves it out for a reward model, both without a word: three methods of one slice
would see three sets of rows. A cut answer has lost its end, which the other side of the pair may have kept, so that the loss
teaches not to end; and a pair whose sides differ after the cut alone has no gradient at all. So a row with an answer that is
longer is left out, counted in the manifest, and above `max_left_out` nothing is trained.
"""

import hashlib
import json
from typing import Any

from workflow_scripts.data import slicing
from workflow_scripts.plumbing.messages import InputError


def tokens(tokenizer: Any, row: dict) -> int:
    """Of the longest conversation that a row is trained on, as the chat template writes it: prompt, answer and its end."""
    return max(len(tokenizer.apply_chat_template(turns)["input_ids"]) for turns in slicing.conversations(row))


def fitting(
    tokenizer: Any, rows: dict[bool, list[dict]], max_length: int, max_left_out: float, place: str, user: str = ""
) -> tuple[dict[bool, list[dict]], dict]:
    """(the rows that are no longer than `max_length` tokens, facts for the manifest).

    rows: to train on, and under True the held-out ones. user: the experiment that asks, for messages. The facts: how many rows
    of either kind were left out, how many are trained on, and a hash of the ids of all that are left, by which two methods
    are known to have had the same. InputError if more than the share `max_left_out` is too long, or all of one kind is.
    """
    kept = {held: [row for row in some if tokens(tokenizer, row) <= max_length] for held, some in rows.items()}
    total, left = (sum(map(len, found.values())) for found in (rows, kept))
    if not all(kept.values()) or total - left > max_left_out * total:
        none = "" if all(kept.values()) else ", no row to train on or none held out is left"
        whose = f" for {user}" if user else ""
        raise InputError(
            f"{place}: {total - left} of {total} rows have an answer that ends beyond train.max_length ({max_length} tokens)"
            f"{none}; max_left_out allows {max_left_out:.0%}. Raise one of them{whose}, or take shorter rows"
        )
    ids = json.dumps([row["id"] for some in kept.values() for row in some])
    return kept, {
        "left_out": {"train": len(rows[False]) - len(kept[False]), "heldout": len(rows[True]) - len(kept[True])},
        "rows": {"train": len(kept[False]), "heldout": len(kept[True]), "ids_sha256": hashlib.sha256(ids.encode()).hexdigest()},
    }
