"""Parts of rows, as several formats have them: texts, labels, turns. Each is checked when it is taken out of a row.

InputError, beginning with `place`, where a part is not what it must be.
"""

import json

from workflow_scripts.plumbing.messages import InputError

ROLES = ("system", "user", "assistant")
MACHINES = {"tool", "function", "ipython", "observation", "function_call", "tool_call", "function_response", "tool_response"}
LABELS = {True: True, False: False, "1": True, "0": False, "true": True, "false": False}  # 1 and 0 are equal to True and False
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def show(value: object) -> str:
    """A value in an error: its first 80 characters as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def text(row: dict, key: str, place: str) -> str:
    if not isinstance(row[key], str):
        raise InputError(f"{place}: expected a text under {key}, found {show(row[key])}")
    return row[key]


def label(row: dict, place: str) -> bool:
    """True or false, also as 1 or 0, or as a text of these."""
    found = row["label"]
    found = found.strip().lower() if isinstance(found, str) else found
    if not isinstance(found, bool | int | float | str) or found not in LABELS:
        raise InputError(
            f"{place}: expected true or false (or 1 or 0) under label, found {show(row['label'])}; write true for what is wanted"
        )
    return LABELS[found]


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def turns(messages: object, place: str) -> list[dict]:
    """Messages with role and content only. InputError if they are not a conversation."""
    if not isinstance(messages, list) or not messages:
        found = "an empty one" if messages == [] else type(messages).__name__
        raise InputError(f"{place}: expected a list of messages, found {found}")
    made = []
    for message in messages:
        content = joined(message.get("content")) if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise InputError(f"{place}: a message needs the strings role and content, found {show(message)}")
        if message["role"] not in ROLES:
            raise InputError(f"{place}: found the role {message['role']!r}, expected system, user or assistant")
        made.append(turn(message["role"], content))
    return made


def joined(content: object) -> object:
    """The text of a content that stands as parts, `[{type: text, text}, ...]`, as templates write it: one after the other."""
    if not isinstance(content, list) or not content:
        return content
    found = [part["text"] for part in content if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    return "".join(found) if len(found) == len(content) and all(isinstance(one, str) for one in found) else content


def text_or_turns(row: dict, key: str, role: str, place: str) -> list[dict]:
    return [turn(role, row[key])] if isinstance(row[key], str) else turns(row[key], f"{place}: {key}")


def spoken(value: object, place: str) -> list[dict]:
    """ShareGPT's turns, `{from, value}`."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{place}: expected a list of turns with from and value, found {type(value).__name__}")
    made = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("from"), str) or not isinstance(one.get("value"), str):
            raise InputError(f"{place}: a turn needs the strings from and value, found {show(one)}")
        if one["from"] not in SPEAKERS:
            raise InputError(f"{place}: found the speaker {one['from']!r}, expected one of {', '.join(SPEAKERS)}")
        made.append(turn(SPEAKERS[one["from"]], one["value"]))
    return made


def with_system(row: dict, before: list[dict], place: str) -> list[dict]:
    """The turns with the text of the row's `system` key, if it has one, in front."""
    if not row.get("system"):
        return before
    if before and before[0]["role"] == "system":
        raise InputError(f"{place}: has a system text under system and another in its first turn; leave one")
    return [turn("system", text(row, "system", place)), *before]


def texts(value: object, place: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{place}: expected a list of texts, found {show(value)}")
    return value
