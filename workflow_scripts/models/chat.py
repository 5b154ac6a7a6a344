"""Chat templates and loss masks: what the end of a turn is, and that every batch trains on the right tokens."""

from pathlib import Path
from typing import Any

import torch

from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.plumbing.messages import InputError

IGNORE = -100  # label of a token without a loss
THOUGHT = ("<think>", "</think>")  # what marks where a model thinks: `evaluation/scores.py:answer` takes it off


def tokenizer_of(base: Artifact) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)


def end_of_turn(tokenizer: Any) -> int:
    """The id of the token that closes an assistant turn, found by its text.

    The template is rendered around a known answer: what it writes right after the answer must be the tokenizer's
    end-of-sequence token, by its text. Ids alone are not trusted: one release of transformers read a GGUF tokenizer with the
    *start*-of-turn token as its end. InputError if the template has no end of turn, or another one.
    """
    if not tokenizer.chat_template:
        raise InputError(f"tokenizer of {tokenizer.name_or_path}: has no chat template; set one that closes each turn")
    answer = "ANSWER"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": answer}], tokenize=False
    )
    tail = text.partition(answer)[2]
    if not tokenizer.eos_token or not tail.startswith(tokenizer.eos_token):
        raise InputError(
            f"chat template of {tokenizer.name_or_path}: writes {tail[:20]!r} after an answer, but the end-of-sequence token is "
            f"{tokenizer.eos_token!r}; generation would not stop there. Set eos_token to the token that closes a turn"
        )
    return tokenizer.eos_token_id


def declared_ends(*configs: Any) -> list[int]:
    """The end tokens that a model's configs declare: one, several, or none."""
    found: list[int] = []
    for config in configs:
        one = config.eos_token_id
        found += one if isinstance(one, list) else [] if one is None else [one]
    return list(dict.fromkeys(found))


def ends(tokenizer: Any, model: Any) -> list[int]:
    """Every token that ends an answer: the end of a turn, and what else the model declares (Llama 3 and Qwen2.5 have several)."""
    return list(dict.fromkeys([end_of_turn(tokenizer), *declared_ends(model.generation_config)]))


def said(tokenizer: Any, tokens: list[int], asked: str) -> str:
    """The text of what a model generated, without special tokens, but for the marks of a thought where these are special ones.

    Without them the thought would read as the answer. Where the template opens the thought at the end of the prompt (`asked`, its
    rendered text), the mark stands before the text: else a thought that was cut off before its end would have no mark at all.
    Anything else is `decode` with skip_special_tokens, byte for byte.
    """
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = [number for number in tokens if special.get(number) in THOUGHT]
    if kept:
        tokens = [number for number in tokens if number in kept or number not in special]
    text = tokenizer.decode(tokens, skip_special_tokens=not kept)
    return THOUGHT[0] + text if asked.rstrip().endswith(THOUGHT[0]) else text


def sample_plainly(model: Any) -> None:
    """For rollouts: what a model's folder says of decoding (min_p, penalties, repeated n-grams) does not act. They are drawn from
    the policy itself, as the config says; TRL resets only what its own config has a key for."""
    from transformers import GenerationConfig

    own = model.generation_config
    ids = {key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)


def decode_as_declared(model: Any, tokenizer: Any, decoding: str) -> None:
    """For answers: `greedy` takes the most likely token, whatever the model's folder says; `folder` lets its penalties act."""
    own = ends(tokenizer, model)
    if decoding == "greedy":
        sample_plainly(model)
    model.generation_config.eos_token_id = own
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):  # nothing is sampled
        setattr(model.generation_config, name, None)
    model.generation_config.do_sample = False
    model.generation_config.return_dict_in_generate = False


def control_tokens(tokenizer: Any) -> list[str]:
    """Texts of the tokens that the tokenizer calls special. Where a row's text spells one, it would become a real one: an end in
    the middle of an answer, a turn that nobody took."""
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def unwritable(tokenizer: Any, talks: list[list[dict]], control: list[str], every: bool = False) -> str | None:
    """Why the chat template can't write one of these conversations as what it is, or None.

    control: `control_tokens`. Some templates leave out of an answer what it says up to `</think>`: the last answer, or each one
    where `every` is trained on, must be in the text, but for spaces. And some tokenizers make one token of a question's last
    line break and an answer's first: the answer would be trained after other tokens than it is asked for with.
    """
    from jinja2.exceptions import TemplateError

    for talk in talks:
        for mark in control:
            if any(mark in turn["content"] for turn in talk):
                return f"with the control token {mark} in a text"
        try:
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=talk[-1]["role"] != "assistant")
        except (TemplateError, TypeError):
            return "that the model's chat template refuses"
        if talk[-1]["role"] == "assistant":
            written = "".join(text.split())
            places = [n for n, turn in enumerate(talk) if turn["role"] == "assistant" and (every or n == len(talk) - 1)]
            if not all("".join(talk[n]["content"].split()) in written for n in places):
                return "with an answer that the model's chat template does not write whole"
            if any(talk[n]["content"][:1].isspace() and _joined(tokenizer, talk[:n], talk[: n + 1]) for n in places):
                return "with an answer whose first line breaks the tokenizer joins to the question"
    return None


def _joined(tokenizer: Any, asked: list[dict], answered: list[dict]) -> bool:
    """Whether the tokens of a question, up to where the answer begins, are not the first ones once it is answered."""
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    return tokenizer.apply_chat_template(answered)["input_ids"][: len(before)] != before


def check_prompts(tokenizer: Any, asked: list[tuple[Any, list[dict]]], file: Path) -> None:
    """InputError on a prompt of an evaluation that the chat template can't write. asked: (key, turns); file: for the message."""
    control = control_tokens(tokenizer)
    for key, turns in asked:
        if reason := unwritable(tokenizer, [turns], control):
            where = tokenizer.name_or_path
            raise InputError(f"{file}: key {key!r}: a prompt {reason} ({where}); change it, or leave it out of the source")


class MaskCheck:
    """A collator that lets no batch pass whose loss mask is empty or misses the end of the answer.

    Wraps a TRL collator. SFT batches carry `labels` (B, T), -100 where there is no loss; DPO batches carry `completion_mask`
    (B, T), 1 on the answer. For each row: at least one token has a loss, and one of them is the end-of-turn token, unless the
    row fills `max_length` (it was cut, and its end with it). Raises InputError otherwise.
    """

    def __init__(self, collator: Any, end_id: int, max_length: int | None):
        self.collator, self.end_id, self.max_length = collator, end_id, max_length

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(rows)
        self.check(batch)
        return batch

    def check(self, batch: dict) -> None:
        tokens = batch["input_ids"]
        mask = batch["completion_mask"].bool() if "completion_mask" in batch else batch["labels"] != IGNORE
        lengths = batch["attention_mask"].sum(-1) if "attention_mask" in batch else torch.tensor([tokens.shape[-1]])
        for i in range(len(tokens)):
            cut = self.max_length is not None and int(lengths[i % len(lengths)]) >= self.max_length
            if not mask[i].any():
                raise InputError(
                    f"row {i} of a batch has no token with a loss"
                    + (
                        f": its prompt alone fills max_length ({self.max_length}); raise it, or lower data.max_prompt_tokens"
                        if cut
                        else ": the chat template marks no assistant text ({% generation %} ... {% endgeneration %})"
                    )
                )
            if not cut and not (tokens[i][mask[i]] == self.end_id).any():
                raise InputError(
                    f"row {i} of a batch does not train the end-of-turn token (id {self.end_id}): the model would never learn to "
                    "stop. The template must close its generation span after that token"
                )
