"""Chat templates and loss masks: what the end of a turn is, and that every batch trains on the right tokens."""

from typing import Any

import torch

from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.plumbing.messages import InputError

IGNORE = -100  # label of a token without a loss


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
