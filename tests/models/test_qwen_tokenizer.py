"""Qwen2.5's own vocabulary and chat template through make_base."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.support import qwen_vocabulary, small_steps
from tests.support.qwen_vocabulary import ROWS, SPECIAL, TOKENS, WORDS
from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config as configs
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.models import chat
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder as the hub's: Qwen2.5's tokenizer, and a model of its vocabulary that is small otherwise."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    try:
        tokenizer = qwen_vocabulary.tokenizer()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("qwen") / "model"
    config = Qwen2Config(
        vocab_size=ROWS, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, bos_token_id=WORDS, eos_token_id=WORDS,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(model) -> manifests.Artifact:
    """The base that make_base makes of it, with what config/qwen05b.yaml says of the base but its source."""
    study = configs.load(ROOT / "config/qwen05b.yaml").data
    user = merge(read_yaml(ROOT / "config/qwen05b.yaml"), {"device": "cpu", "precision": "fp32"})
    user["base"] = {key: study["base"][key] for key in ("dtype", "end_of_turn")} | {"source": "path", "path": str(model)}
    plan = Plan(configs.Config(user))
    out = model.parent / "base/manifest.json"
    return small_steps.run(manifests.Job(plan.step("base", "base"), [model], out, model.parent / ".work"))


@pytest.fixture(scope="module")
def tokenizer(made):
    """Only to be read."""
    return chat.tokenizer_of(made)


def test_turns_end_with_a_token_of_the_vocabulary_and_documents_with_another(made, tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(WORDS, TOKENS)) and len(tokenizer) == TOKENS
    assert made.data["end_of_turn"] == "<|im_end|>" and chat.end_of_turn(tokenizer) == tokenizer.eos_token_id == 151_645
    assert made.data["template"]["eos_token_was"] == tokenizer.pad_token == "<|endoftext|>"
    for part in ("config", "generation_config"):
        saved = json.loads((made.folder / f"{part}.json").read_text())
        assert (saved["eos_token_id"], saved["pad_token_id"]) == ([151_645, WORDS], WORDS)  # what the model declared stays an end
    assert json.loads((made.folder / "config.json").read_text())["vocab_size"] == ROWS  # no row is added or cut


def test_text_is_split_as_qwen_splits_it(tokenizer):
    """One token for each digit, words with their space, whatever is no word by bytes; every text comes back."""
    assert tokenizer.tokenize("12,345 tokens") == ["1", "2", ",", "3", "4", "5", "Ġtokens"]
    assert tokenizer("Hello world")["input_ids"] == [9707, 1879]
    for text in ("Two  spaces,\n\n\tand don't", "cafés 日本語 🙂", "x" * 300):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_loss_is_on_the_answers_and_on_what_ends_them(tokenizer):
    turns = [
        {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5."},
        {"role": "user", "content": "And 3 + 4?"}, {"role": "assistant", "content": "7."},
    ]  # fmt: skip
    found = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    # TRL's training template of the family counts the line breaks around a turn's text, which never vary.
    assert tokenizer.decode(marked) == "\n5.<|im_end|>\n\n7.<|im_end|>\n"
    text = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    kept = {name: tensor[: TOKENS - 1].clone() if len(tensor) == ROWS else tensor for name, tensor in weights.items()}
    save_file(kept, tmp_path / "model/model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": TOKENS - 1}))
    user = merge(read_yaml(ROOT / "config/qwen05b.yaml"), {"device": "cpu", "precision": "fp32"})
    user["base"] = {"source": "path", "path": str(tmp_path / "model"), "dtype": "bf16", "end_of_turn": "<|im_end|>"}
    step = Plan(configs.Config(user)).step("base", "base")
    job = manifests.Job(step, [tmp_path / "model"], tmp_path / "base/manifest.json", tmp_path)
    with pytest.raises(InputError, match="a token 151664, the model's embeddings have 151664 rows"):
        small_steps.run(job)
