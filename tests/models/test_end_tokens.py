"""Models that declare several end tokens, and settings of decoding in a model's folder."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import chat
from workflow_scripts.plumbing.jsonl import read_jsonl
from workflow_scripts.steps import make_base
from workflow_scripts.tiny import world

ROLLOUTS = ("ppo_ifeval", "grpo", "rloo")


def copied(folder, **settings):
    """The tiny world's base, whose folder says these things of decoding."""
    small_steps.copy_tiny_base(folder).unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0} | settings))
    return folder


def imported(folder, out):
    """The base that make_base makes of it. Its manifest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    make_base.settle(model, tokenizer, "fp32", out)
    model.save_pretrained(out, max_shard_size="1000GB")
    tokenizer.save_pretrained(out)
    return small_steps.write_manifest(out / "manifest.json", "base", out.name, sorted(path.name for path in out.iterdir()))


@pytest.fixture(scope="module")
def one(folder):
    return imported(copied(folder / "one"), folder / "one/made")


@pytest.fixture(scope="module")
def two(folder):
    """The same model, but that it writes token 0 where the other writes 2, and says that both are ends."""
    there = copied(folder / "two", eos_token_id=[2, 0])
    weights = load_file(there / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[[0, 2]] = head[[2, 0]]
    save_file(weights | {"lm_head.weight": head}, there / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((there / "config.json").read_text()) | {"tie_word_embeddings": False, "eos_token_id": [2, 0]}
    (there / "config.json").write_text(json.dumps(config))
    return imported(there, folder / "two/made")


def answers(base, folder):
    prompts = small_steps.write_slice(folder / "data", "ifeval", world.eval_rows(12, seed=3), heldout=0)
    out = folder / "run/ifeval_responses.manifest.json"
    job = small_steps.job("generate", out, {"start": base, "prompts": prompts}, small_steps.answering(48))
    return read_jsonl(small_steps.run(job).file("ifeval_responses.jsonl"))


def test_every_end_that_a_model_declares_ends_an_answer(one, two, tmp_path):
    usual, other = answers(one, tmp_path / "one"), answers(two, tmp_path / "two")
    assert {row["finish_reason"] for row in usual} == {"stop"}
    assert other == usual
    for base, ends in ((one, 2), (two, [2, 0])):
        for name in ("config.json", "generation_config.json"):
            assert json.loads((base.parent / name).read_text())["eos_token_id"] == ends


def test_the_end_of_a_turn_comes_first_and_what_it_replaces_stays_an_end(folder):
    """A base model whose documents end with another token than its turns."""
    there = copied(folder / "replaced", eos_token_id=0)
    assert json.loads((imported(there, folder / "replaced/made").parent / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [2, 0]


@pytest.mark.parametrize("method", ROLLOUTS)
def test_rollouts_end_at_each_of_them_and_follow_no_setting_of_the_folder(method, two, instructions, tmp_path):
    settings = json.loads((two.parent / "generation_config.json").read_text()) | {"min_p": 0.3, "no_repeat_ngram_size": 3}
    (tmp_path / "base").mkdir()
    for path in two.parent.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
    names = sorted(path.name for path in (tmp_path / "base").iterdir() if path.name != "manifest.json")
    base = small_steps.write_manifest(tmp_path / "base/manifest.json", "base", "one with settings", names)
    few = (
        {"per_device_train_batch_size": 8, "num_generations": 4} if method != "ppo_ifeval" else {"per_device_train_batch_size": 4}
    )
    trainer = small_steps.built_trainer(tmp_path / "run", method, base, instructions, **few)
    assert trainer.eos_token_ids == [2, 0]
    own = trainer.model.generation_config
    assert own.eos_token_id == [2, 0] and own.min_p is None and own.no_repeat_ngram_size in (None, 0)
    assert chat.ends(chat.tokenizer_of(manifests.read(base)), trainer.model) == [2, 0]
