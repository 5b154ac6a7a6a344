"""Which chat template a real model trains with, and proof that it marks the right tokens and asks as the model's own does.

The loss of sft_v2 needs a template with generation markers ({% generation %} ... {% endgeneration %}). In this order: the
model's own, if it has them; TRL's training template of its family; the one that `base.training_template` names; else an error.
The chosen one is saved with the base, so that training and evaluation render the same text.
"""

import re
from datetime import date
from typing import Any

from workflow_scripts.plumbing.messages import InputError

# Some templates write today's date into the system turn (Llama 3.1, Granite), so that the same config would give other bytes
# tomorrow. Theirs is this one, which Llama's own template falls back to.
DAY = date(2024, 7, 26)
TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<form>[^'\"]*)(?P=quote)\s*\)")
SYSTEM, QUESTION, ANSWER = "Be SYSTEMATIC.", "First QUESTION?", "First ANSWER."
QUESTION_2, ANSWER_2 = "Second QUESTION?", "Second ANSWER."
HOW_TO = (
    "Write one: copy the model's chat template, put {% generation %} before an assistant turn's text and {% endgeneration %} "
    "after the end-of-turn token that closes it, and name the file under base.training_template (docs/your-data.md)"
)


def _turns(*texts: str, system: bool = False) -> list[dict]:
    roles = ("user", "assistant")
    made = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": SYSTEM}, *made] if system else made


SINGLE = [_turns(QUESTION), _turns(QUESTION, ANSWER), _turns(QUESTION, system=True), _turns(QUESTION, ANSWER, system=True)]
SEVERAL = [_turns(QUESTION, ANSWER, QUESTION_2), _turns(QUESTION, ANSWER, QUESTION_2, ANSWER_2)]


def own(tokenizer: Any) -> str | None:
    """The tokenizer's own template; of several named ones, the default."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def undated(template: str) -> str:
    """The template with DAY for today. InputError where it asks for the time in a way that is not understood."""
    found = TODAY.sub(lambda call: repr(DAY.strftime(call["form"])), template)
    if "strftime_now(" in found:
        place = found.index("strftime_now(")
        raise InputError(
            f"chat template: writes the time of day into what a model sees ({found[place : place + 40]!r}); name a copy with a "
            "fixed date under base.training_template"
        )
    return found


def select(tokenizer: Any, given: str | None) -> tuple[str, dict]:
    """(the training template, facts for the manifest: its `origin`, and `unused` where `given` was not needed).

    given: the text of `base.training_template`, for models whose own template has no markers and whose family TRL lacks.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = own(tokenizer)
    facts = {"unused": "base.training_template"} if given is not None else {}
    if template and has_generation_markers(template):
        return template, {"origin": "the model's own", **facts}
    if template:
        try:
            tokenizer.chat_template = template
            if trained := get_training_chat_template(tokenizer):
                return trained, {"origin": "TRL's training template of the model's family", **facts}
        except ValueError:
            pass  # a family that TRL does not know
    if given is None:
        lacks = "has a chat template without generation markers" if template else "has no chat template"
        chatml = "" if template else ". For ChatML as text: `base.training_template: chatml_text`"
        raise InputError(f"{tokenizer.name_or_path}: {lacks}, and TRL has no training template for it. {HOW_TO}{chatml}")
    if not has_generation_markers(given):
        raise InputError(f"base.training_template: has no generation markers. {HOW_TO}")
    # A model that was trained to see its start-of-sequence token first, and has no template to say so, keeps seeing it.
    starts = not template and "bos_token" not in given and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token }}" if starts else "") + given, {"origin": "base.training_template"}


def install(tokenizer: Any, given: str | None, end_of_turn: str | None) -> dict:
    """Give the tokenizer its training template, its end of turn and a padding token; check all three. Facts for the manifest.

    end_of_turn: the text of the token that closes a turn, where the tokenizer's end-of-sequence token is not trusted to be it
    (a base model with a chat template; a GGUF file read by a release that takes the wrong one). No token is ever added.
    """
    before = own(tokenizer) or ""
    template, facts = select(tokenizer, given)
    if (fixed := undated(template)) != template:
        template, facts["date"] = fixed, DAY.isoformat()
    try:
        before = undated(before)
    except InputError:  # the given template stands in for one that asks for the time: there is no text to hold it against
        before, facts["differs"] = "", "from the model's own template, which writes the time of day"
    if end_of_turn is not None and tokenizer.eos_token != end_of_turn:
        if end_of_turn not in tokenizer.get_vocab():
            raise InputError(f"base.end_of_turn: {end_of_turn!r} is not a token of this tokenizer, and none is added")
        facts["eos_token_was"] = tokenizer.eos_token
        tokenizer.eos_token = end_of_turn
    if tokenizer.eos_token is None:
        raise InputError(f"{tokenizer.name_or_path}: has no end-of-sequence token; name one under base.end_of_turn")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        facts["pad_token_was"] = None
    facts["pad_token"] = tokenizer.pad_token
    if before:
        facts |= compare(tokenizer, before, template, strict=not facts["origin"].startswith("TRL"))
    tokenizer.chat_template = template
    check_end(tokenizer)
    check_prefixes(tokenizer)
    facts["in_loss"] = check_mask(tokenizer)
    return facts


def check_end(tokenizer: Any) -> None:
    """`chat.end_of_turn`, with the key of the config that mends it."""
    from jinja2.exceptions import TemplateError

    from workflow_scripts.models import chat

    try:
        chat.end_of_turn(tokenizer)
    except TemplateError as error:
        raise InputError(
            f"chat template of {tokenizer.name_or_path}: can't write a question and its answer ({error}); name one that can "
            "under base.training_template"
        ) from None
    except InputError as error:
        raise InputError(f"{error}: base.end_of_turn in the config") from None


def rendered(tokenizer: Any, template: str, turns: list[dict]) -> str | None:
    """The text of a conversation, asked to go on where a user spoke last; None if the template refuses it (no system role)."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=turns[-1]["role"] == "user"
        )
    except TemplateError:
        return None


def compare(tokenizer: Any, before: str, template: str, strict: bool) -> dict:
    """InputError if the training template writes another text than the model's own: evaluation would ask in another form.

    Later turns may differ where not `strict`: TRL's templates keep what some models' own drop from earlier turns (thinking),
    so that each turn is a prefix of the next. That is recorded.
    """
    for turns in SINGLE + SEVERAL:
        wanted, found = rendered(tokenizer, before, turns), rendered(tokenizer, template, turns)
        if wanted == found:
            continue
        if not strict and turns in SEVERAL:
            return {"differs": "from the model's own template in conversations of several turns"}
        a, b = wanted or "", found or ""
        at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        near = slice(max(0, at - 20), at + 30)
        raise InputError(
            f"base.training_template: writes another text than the model's own template: {b[near]!r}, expected {a[near]!r}; "
            "a template for training may add generation markers, nothing else"
        )
    return {}


def check_prefixes(tokenizer: Any) -> None:
    """InputError if a turn is written, or cut into tokens, in another way once a later turn follows.

    An answer counts up to its end-of-turn token: some templates mark the end of the whole conversation after it.
    """
    turns = SEVERAL[1]
    texts = [rendered(tokenizer, tokenizer.chat_template, turns[: n + 1]) or "" for n in range(len(turns))]
    for n, after in enumerate(texts[1:]):
        before = texts[n]
        if turns[n]["role"] == "assistant":
            head, answer, _ = before.rpartition(turns[n]["content"])
            before = head + answer + tokenizer.eos_token
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
        if not after.startswith(before) or ids[1][: len(ids[0])] != ids[0]:
            raise InputError(
                f"chat template of {tokenizer.name_or_path}: turn {n + 1} is not a prefix of a conversation that goes on "
                "after it; training would ask in another form than evaluation"
            )


def check_mask(tokenizer: Any) -> str:
    """The text that has a loss in a conversation of two rounds, a bar between answers. InputError unless it is the answers.

    Each span must be an answer and its end-of-turn token; line breaks around it may be in it, and what a template of TRL's
    writes before an answer (an empty thought).
    """
    made = tokenizer.apply_chat_template(
        SEVERAL[1], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    spans: list[list[int]] = []
    last = 0
    for token, inside in zip(made["input_ids"], made["assistant_masks"], strict=True):
        if inside and not last:
            spans.append([])
        if inside:
            spans[-1].append(token)
        last = inside
    texts = [tokenizer.decode(span, skip_special_tokens=False) for span in spans]
    good = len(spans) == 2 and all(
        tokenizer.eos_token_id in span and answer in text and "QUESTION" not in text
        and text.partition(answer)[2].replace(tokenizer.eos_token, "").strip() == ""
        for span, text, answer in zip(spans, texts, (ANSWER, ANSWER_2), strict=False)
    )  # fmt: skip
    if not good:
        raise InputError(
            f"chat template of {tokenizer.name_or_path}: has a loss on {texts!r}, expected two spans, each an answer and its "
            f"end-of-turn token {tokenizer.eos_token!r}. {HOW_TO}"
        )
    return "|".join(texts)
