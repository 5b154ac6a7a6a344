"""Qwen2.5's tokenizer from the vocabulary that Qwen published with its first models, in a package of the index.

Qwen2.5 has the same 151,643 tokens and 22 special ones, and its embeddings 151,936 rows (config.json of Qwen/Qwen2.5-0.5B), so
271 rows stand for no token.
"""

import base64
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.support.packages import packages

ROWS, TOKENS, WORDS = 151_936, 151_665, 151_643
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> "
    "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()  # in the order of their ids, from 151,643 on


def chat_template() -> str:
    """Qwen2.5's own, of which TRL carries a copy."""
    from trl import chat_template_utils

    return (Path(chat_template_utils.__file__).parent / "chat_templates/qwen2_5.jinja").read_text()


def tokenizer() -> Any:
    """With Qwen2.5's chat template. OSError, saying what is missing, if the package can't be had."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = packages(ROOT / "tests/support/qwen/requirements.txt") / "dashscope/resources/qwen.tiktoken"

    class Ranks(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = Path(tiktoken_url).read_bytes().splitlines()
            return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}

    vocabulary, merges = Ranks().extract_vocab_merges_from_model(str(file))
    assert len(vocabulary) == WORDS
    made = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template = chat_template()
    return made
