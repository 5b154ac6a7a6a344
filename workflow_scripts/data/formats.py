"""Data formats: what a row of a public data set looks like, and how it becomes a row of a slice's kind.

Each kind has one canonical form: sft `{messages}`; preference `{prompt, chosen, rejected}`; unpaired `{prompt, completion,
label}`; numeric `{prompt, answer, final}`, where all but label, answer and final are lists of `{role, content}` turns; choice
`{question, choices, answer, subject}`; truthfulqa `{question, mc1_targets, mc2_targets}`, both `{choices, labels}`; prompts
`{prompt}`, to be answered and judged.

A row is recognised by its keys (a null counts as missing): of FORMATS, in their order, the first whose keys are all there,
whose condition holds, and which gives the slice's kind. So a row with `messages`, `chosen` and `rejected` is a conversation
for a slice of kind sft and a pair for one of kind preference. `format:` in the slice names one instead.

Text is passed on as it is, but for what a format's own markup demands: an HH transcript loses its speaker labels with the
one space after each, an alpaca instruction and its input are joined by a blank line. Keys that no format reads are left
out. InputError, with file and line, on a row that is malformed; `Unusable` on one that is well formed and no use.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from workflow_scripts.data import parts
from workflow_scripts.plumbing.messages import InputError

RESERVED = ("id", "heldout", "messages", "prompt", "chosen", "rejected", "completion", "label", "answer", "final")
HH_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
HH_LABEL = re.compile(r"\n\n(Human|Assistant):")
GSM8K_FINAL = re.compile(r"####\s*(-?[0-9,]*\.?[0-9]+)\s*$")
TOOLS = ("tools", "functions", "tool_calls", "function_call")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MARKS = ("weight", "train", "trainable", "loss", "loss_weight")  # of a turn: how much it counts in the loss
NOTHING: tuple = (None, False, "", "[]", [], {})
TALKS = ("messages", "conversations", "prompt", "chosen", "rejected", "completion")  # keys that may hold turns


class Unusable(Exception):
    """A well-formed row that can't be trained on. Its text is the reason under which such rows are counted."""


class Format(NamedTuple):
    name: str
    needs: tuple[str, ...]
    kinds: tuple[str, ...]
    convert: Callable[[dict, str, str], dict]  # (row, kind, place) -> canonical row
    reads: tuple[str, ...] = ()  # keys that it reads where they are there
    fits: Callable[[dict], bool] = lambda row: True  # beyond the keys, to tell formats of the same keys apart

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.needs)})"


def convert(row: dict, kind: str, place: str, named: str | None = None) -> tuple[str, dict]:
    """(name of the format, the row in the canonical form of `kind`). `named`: the format to take instead of recognising one.

    InputError, beginning with `place`, on a row that no format or another one fits. Unusable as the docstring on top says.
    """
    given = {key: value for key, value in row.items() if value is not None}
    if reason := _beyond_text(given, kind):
        raise Unusable(reason)
    if named is None:
        form = _recognise(given, kind, place, row)
    else:
        form = next(form for form in FORMATS if form.name == named)
        if missing := [key for key in form.needs if key not in given]:
            has = f"a row of the format {named} has {', '.join(form.needs)}"
            raise InputError(f"{place}: {missing[0]} is missing; {has}, found {_keys(row)}")
    return form.name, form.convert(given, kind, place)


def _beyond_text(given: dict, kind: str) -> str | None:
    """What a row has beside its texts, in any format, without which what is left would be trained as if it were the whole row.

    Tools and calls of them; pictures and sound; a thought that stands beside the answer and not in it; and, where every answer
    of a conversation is trained on (sft), a mark that one of them shall not be, as several other programs read it.
    """
    talks = [given[key] if isinstance(given.get(key), list) else [given.get(key)] for key in TALKS]
    turns = [one for talk in talks for one in talk if isinstance(one, dict)]
    speakers = [one.get("role", one.get("from")) for one in turns]

    def has(keys: tuple[str, ...], *where: dict) -> bool:
        return any(one.get(key) not in NOTHING for one in where for key in keys)

    if any(isinstance(who, str) and who in parts.MACHINES for who in speakers) or has(TOOLS, given, *turns):
        return "with tools"
    shown = [part for one in turns if isinstance(one.get("content"), list) for part in one["content"] if isinstance(part, dict)]
    if has(MEDIA, given, *turns) or any(part.get("type", "text") != "text" for part in shown):
        return "with pictures or sound"
    if has(THOUGHTS, *turns):
        return "with a thought beside the answer"
    answers = [one for one, who in zip(turns, speakers, strict=True) if who in ("assistant", "gpt")]
    if kind == "sft" and any(one.get(key) not in (None, True, "true", "1") for one in answers for key in MARKS):  # 1 is True
        return "with an answer that is marked not to be trained on"
    return None


def _recognise(given: dict, kind: str, place: str, row: dict) -> Format:
    forms = [form for form in FORMATS if kind in form.kinds or form.kinds != ("prompts",)]  # any row may have a prompt
    found = [form for form in forms if set(form.needs) <= set(given) and form.fits(given)]
    for form in found:
        if kind in form.kinds:
            return form
    if not found:
        raise unknown(place, row, kind)
    gives = " or ".join(dict.fromkeys(kind for form in found for kind in form.kinds))
    raise InputError(
        f"{place}: a row of the format {found[0]} can't give kind {kind}, only {gives}; formats for {kind}: {known(kind)}"
    )


def unknown(place: str, keys: dict | Iterable[str], kind: str) -> InputError:
    """The one error for rows that are in no format."""
    nulls = isinstance(keys, dict) and None in keys.values()
    there = nulls and any(kind in form.kinds and set(form.needs) <= set(keys) for form in FORMATS)
    remedy = "a null counts as missing: fill it in, or leave the row out" if there else "rename the keys"
    return InputError(
        f"{place}: found the keys {_keys(keys)}, which is none of the formats for kind {kind}: {known(kind)}; {remedy}"
    )


def _keys(row: dict | Iterable[str]) -> str:
    nulls = {key for key in row if isinstance(row, dict) and row[key] is None}
    return ", ".join(f"{key} (null)" if key in nulls else key for key in sorted(row)) or "nothing"


def known(kind: str) -> str:
    return ", ".join(str(form) for form in FORMATS if kind in form.kinds)


def names(kind: str) -> list[str]:
    return [form.name for form in FORMATS if kind in form.kinds]


def columns(kind: str, present: Iterable[str], place: str) -> list[str]:
    """Of the columns of a table, those that a format of `kind` may read. InputError where no format has all that it needs."""
    present = list(present)
    forms = [form for form in FORMATS if kind in form.kinds]
    if not any(set(form.needs) <= set(present) for form in forms):
        raise unknown(place, present, kind)
    wanted = {*TOOLS, *MEDIA, *(key for form in forms for key in (*form.needs, *form.reads))}
    return [name for name in present if name in wanted]


# -- formats --------------------------------------------------------------------------------------------------------------


def _from_messages(row: dict, kind: str, place: str) -> dict:
    return {"messages": parts.turns(row["messages"], place)}


def _from_kto_messages(row: dict, kind: str, place: str) -> dict:
    talk = parts.turns(row["messages"], place)
    return {"prompt": talk[:-1], "completion": talk[-1:], "label": parts.label(row, place)}


def _from_sharegpt(row: dict, kind: str, place: str) -> dict:
    return {"messages": parts.with_system(row, parts.spoken(row["conversations"], place), place)}


def _from_sharegpt_pairs(row: dict, kind: str, place: str) -> dict:
    """LLaMA-Factory's form: chosen and rejected are one turn each."""
    prompt = _from_sharegpt(row, kind, place)["messages"]
    chosen, rejected = (
        parts.spoken([row[key]] if isinstance(row[key], dict) else row[key], f"{place}: {key}") for key in ("chosen", "rejected")
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _from_alpaca(row: dict, kind: str, place: str) -> dict:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise InputError(f"{place}: expected pairs of texts, question and answer, under history, found {parts.show(history)}")
    before = [turn for question, answer in history for turn in (parts.turn("user", question), parts.turn("assistant", answer))]
    question = [parts.text(row, key, place) for key in ("instruction", "input") if row.get(key) is not None]
    talk = [*before, parts.turn("user", "\n\n".join(text for text in question if text))]
    return {"messages": [*parts.with_system(row, talk, place), parts.turn("assistant", parts.text(row, "output", place))]}


def _are_conversations(row: dict) -> bool:
    """Whether chosen and rejected hold whole conversations, question and all, not only the answer."""
    first = [row[key][0] for key in ("chosen", "rejected") if isinstance(row[key], list) and row[key]]
    return len(first) == 2 and all(isinstance(turn, dict) and turn.get("role") in ("system", "user") for turn in first)


def _from_ultrafeedback(row: dict, kind: str, place: str) -> dict:
    """chosen and rejected repeat the prompt: it is taken off there, or the trainer would ask the question twice."""
    chosen, rejected = (parts.turns(row[key], f"{place}: {key}") for key in ("chosen", "rejected"))
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        raise Unusable("whose chosen and rejected differ before the last turn")
    if "prompt" in row:
        given = row["prompt"] if isinstance(row["prompt"], str) else parts.turns(row["prompt"], f"{place}: prompt")
        asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
        if given not in (asked if isinstance(given, str) else [prompt]):
            raise Unusable("whose prompt is not the one in chosen and rejected")
    return {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _from_pairs(row: dict, kind: str, place: str) -> dict:
    roles = (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    return {key: parts.text_or_turns(row, key, role, place) for key, role in roles}


def _transcript(row: dict, key: str, place: str) -> list[dict]:
    """The turns of an HH transcript. A label inside a turn's own text can't be told from a turn."""
    text = row[key]
    if not isinstance(text, str) or not HH_LABEL.match(text):
        raise InputError(f"{place}: expected a transcript under {key} that begins with '\\n\\nHuman: ', found {parts.show(text)}")
    said = HH_LABEL.split(text)[1:]
    talk = [parts.turn(HH_SPEAKERS[who], one.removeprefix(" ")) for who, one in zip(said[::2], said[1::2], strict=True)]
    if [turn["role"] for turn in talk] != ["user", "assistant"] * (len(talk) // 2):
        raise Unusable("with turns out of order")
    return talk


def _from_hh(row: dict, kind: str, place: str) -> dict:
    """Bai et al. 2022 (arXiv:2204.05862): two transcripts that differ in the last answer."""
    chosen, rejected = _transcript(row, "chosen", place), _transcript(row, "rejected", place)
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("whose chosen and rejected differ before the last turn")
    if any(not turn["content"].strip() for turn in chosen[:-1]):
        raise Unusable("with an empty turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _from_kto(row: dict, kind: str, place: str) -> dict:
    prompt, completion = (
        parts.text_or_turns(row, key, role, place) for key, role in (("prompt", "user"), ("completion", "assistant"))
    )
    return {"prompt": prompt, "completion": completion, "label": parts.label(row, place)}


def _from_gsm8k(row: dict, kind: str, place: str) -> dict:
    """Cobbe et al. 2021 (arXiv:2110.14168): the answer ends with `#### ` and the number, here without thousands' commas.

    The calculator's marks (`<<2*3=6>>`) are part of the text and stay.
    """
    question, answer = parts.text(row, "question", place), parts.text(row, "answer", place)
    if not (final := GSM8K_FINAL.search(answer)):
        raise InputError(f"{place}: expected an answer that ends with '#### ' and a number, found {parts.show(answer[-40:])}")
    prompt = [parts.turn("user", question)]
    if kind == "sft":
        return {"messages": [*prompt, parts.turn("assistant", answer)]}
    return {"prompt": prompt, "answer": answer, "final": final[1].replace(",", "")}


def _from_numeric(row: dict, kind: str, place: str) -> dict:
    final = row["final"]
    if isinstance(final, bool) or not GSM8K_FINAL.fullmatch(f"#### {final}"):
        raise InputError(f"{place}: expected a number under final, found {parts.show(final)}")
    prompt = parts.text_or_turns(row, "prompt", "user", place)
    return {"prompt": prompt, "answer": parts.text(row, "answer", place), "final": str(final).replace(",", "")}


def _from_prompt(row: dict, kind: str, place: str) -> dict:
    """The prompt of any row that has one; what answers it has is not read."""
    return {"prompt": parts.text_or_turns(row, "prompt", "user", place)}


def _from_mmlu(row: dict, kind: str, place: str) -> dict:
    """Hendrycks et al. 2021 (arXiv:2009.03300): four options, the index of the right one, the subject."""
    options, answer = parts.texts(row["choices"], f"{place}: choices"), row["answer"]
    if len(options) != 4:
        raise InputError(f"{place}: expected four texts under choices, found {len(options)}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < 4:
        raise InputError(
            f"{place}: expected 0, 1, 2 or 3 under answer, the index of the right choice, found {parts.show(answer)}"
        )
    question, subject = parts.text(row, "question", place), parts.text(row, "subject", place)
    return {"question": question, "choices": options, "answer": answer, "subject": subject}


def _from_truthfulqa(row: dict, kind: str, place: str) -> dict:
    """Lin et al. 2022 (arXiv:2109.07958): of mc1 one choice is true, and lm-eval takes the first for it; of mc2 any number."""
    made: dict = {"question": parts.text(row, "question", place)}
    for key in ("mc1_targets", "mc2_targets"):
        targets = row[key] if isinstance(row[key], dict) else {}
        options, labels = parts.texts(targets.get("choices"), f"{place}: {key}.choices"), targets.get("labels")
        if not options or not all(text.strip() for text in options):
            raise InputError(f"{place}: expected texts that are not empty under {key}.choices, found {parts.show(options)}")
        if not isinstance(labels, list) or len(labels) != len(options) or any(label not in (0, 1) for label in labels):
            raise InputError(
                f"{place}: expected a 0 or 1 for each of {len(options)} choices under {key}.labels, {_found(labels)}"
            )
        if key == "mc1_targets" and (labels[0] != 1 or sum(labels) != 1):
            raise InputError(
                f"{place}: expected 1, 0, 0, ... under {key}.labels: the first choice counts as the right one, {_found(labels)}"
            )
        if not 0 < sum(labels) < len(labels):
            raise InputError(f"{place}: expected a true and a false choice at least under {key}.labels, {_found(labels)}")
        made[key] = {"choices": options, "labels": [int(label) for label in labels]}
    return made


def _found(value: object) -> str:
    return f"found {parts.show(value)}"


PAIR = ("chosen", "rejected")
FORMATS = (
    Format("messages", ("messages",), ("sft",), _from_messages),
    Format("kto_messages", ("messages", "label"), ("unpaired",), _from_kto_messages),
    Format("sharegpt", ("conversations",), ("sft",), _from_sharegpt, ("system",)),
    Format("sharegpt_pairs", ("conversations", *PAIR), ("preference",), _from_sharegpt_pairs, ("system",)),
    Format("alpaca", ("instruction", "output"), ("sft",), _from_alpaca, ("input", "system", "history")),
    Format("ultrafeedback_binarized", PAIR, ("preference",), _from_ultrafeedback, ("prompt",), _are_conversations),
    Format("pairs", ("prompt", *PAIR), ("preference",), _from_pairs),
    Format("hh", PAIR, ("preference",), _from_hh),
    Format("kto", ("prompt", "completion", "label"), ("unpaired",), _from_kto),
    Format("gsm8k", ("question", "answer"), ("numeric", "sft"), _from_gsm8k),
    Format("numeric", ("prompt", "answer", "final"), ("numeric",), _from_numeric),
    Format("prompt", ("prompt",), ("prompts",), _from_prompt),
    Format("mmlu", ("question", "subject", "choices", "answer"), ("choice",), _from_mmlu),
    Format("truthfulqa", ("question", "mc1_targets", "mc2_targets"), ("truthfulqa",), _from_truthfulqa),
)
