"""Models that think aloud between <think> and </think>, where these are special tokens: both judges see where a thought ends."""

import pytest

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.evaluation import ifeval
from workflow_scripts.models import chat
from workflow_scripts.plumbing.jsonl import read_jsonl

MARKS, END = ["<think>", "</think>"], "<|im_end|>"
OPENS = ("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
ROWS = [
    {"key": i, "prompt": f"name river number {i}. no commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for i in range(24)
]
# What a model writes -> whether its answer has no comma. A thought that was cut off is no answer, whatever stands in it.
WRITTEN = {
    f"<think>well, rivers.</think>the long river{END}": 1.0,
    f"<think>rivers.</think>the long, long river{END}": 0.0,
    "<think>the long river and the": 0.0,
    f"the long river{END}": 1.0,
    f"the long, long river{END}": 0.0,
}
OPENED = {f"well, rivers.</think>the long river{END}": 1.0, "the long river and the": 0.0}  # the template writes <think>


@pytest.fixture(scope="module")
def thinking(base, folder):
    """The base with two more tokens, both special."""
    from transformers import AddedToken, AutoModelForCausalLM

    there = folder / "thinking"
    made = small_steps.copy_base(base, there)
    tokenizer, model = chat.tokenizer_of(manifests.read(made)), AutoModelForCausalLM.from_pretrained(there)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(there)
    tokenizer.save_pretrained(there)
    return small_steps.copy_base(made, folder / "two more tokens")


@pytest.fixture(scope="module")
def opening(thinking, folder):
    return small_steps.copy_base(thinking, folder / "opening", OPENS)


@pytest.fixture
def writes(monkeypatch):
    """(base, text): from now on every model writes this, in evaluations and in rollouts."""
    import torch
    from transformers.generation import GenerationMixin

    def script(base, text):
        ids = torch.tensor(chat.tokenizer_of(manifests.read(base))(text, add_special_tokens=False)["input_ids"])

        def generate(model, *args, input_ids, **kwargs):
            return torch.cat([input_ids, ids.expand(len(input_ids), -1)], dim=1)

        monkeypatch.setattr(GenerationMixin, "generate", generate)

    return script


def evaluated(base, folder, written):
    """IFEval's verdicts on the answers of a model that writes this, without its thought."""
    prompts = small_steps.write_slice(folder / "data", "ifeval", ROWS[:2], heldout=0)
    out = folder / "run/ifeval_responses.manifest.json"
    job = small_steps.job(
        "generate", out, {"start": base, "prompts": prompts}, small_steps.answering(48, 2)
    )  # by `generate`, which says what is written
    answers = read_jsonl(small_steps.run(job).file("ifeval_responses.jsonl"))
    return answers[0]["response"], ifeval.score(ROWS[:2], answers, strip_think=True)["prompt_level_strict_acc"]


@pytest.mark.parametrize(("which", "texts"), [("thinking", WRITTEN), ("opening", OPENED)])
def test_an_evaluation_judges_what_stands_after_the_thought(which, texts, request, writes, tmp_path):
    base = request.getfixturevalue(which)
    for n, (written, right) in enumerate(texts.items()):
        writes(base, written)
        response, share = evaluated(base, tmp_path / str(n), written)
        assert response == ("<think>" if which == "opening" else "") + written.removesuffix(END)
        assert share == right, written


@pytest.mark.parametrize("method", ["ppo_ifeval", "grpo", "rloo"])
@pytest.mark.parametrize(("which", "texts"), [("thinking", WRITTEN), ("opening", OPENED)])
def test_a_rollouts_reward_judges_the_same(which, texts, method, request, writes, tmp_path, monkeypatch):
    base, config = request.getfixturevalue(which), small_steps.train_config
    monkeypatch.setattr(small_steps, "train_config", lambda *args, **more: config(*args, **more) | {"strip_think": ["ifeval"]})
    few = {"per_device_train_batch_size": 4} | ({} if method == "ppo_ifeval" else {"num_generations": 4})
    rows = small_steps.write_slice(tmp_path / "data", "rivers", ROWS)
    trainer = small_steps.built_trainer(tmp_path / method, method, base, rows, **few)
    for written, right in texts.items():
        writes(base, written)
        trainer._metrics["train"].clear()
        trainer._generate_and_score_completions([trainer.train_dataset[0] for _ in range(4)])
        assert trainer._metrics["train"]["rewards/ifeval/mean"] == [right], written


def test_other_special_tokens_stay_removed_and_texts_without_a_mark_are_decoded_as_ever(base, thinking):
    tokenizer = chat.tokenizer_of(manifests.read(thinking))

    def said(text, one=tokenizer, asked="<|im_start|>assistant\n"):
        return chat.said(one, one(text, add_special_tokens=False)["input_ids"], asked)

    assert said("<|im_start|><think>a<|endoftext|></think> b<|im_end|>") == "<think>a</think> b"
    assert said("<|im_start|>a<|endoftext|> b<|im_end|>") == "a b"
    plain = chat.tokenizer_of(manifests.read(base))  # one that spells the marks in letters
    for text in ("a river, long.", "<think>a</think> b", " two  spaces \n", "é<|im_end|>"):
        ids = plain(text, add_special_tokens=False)["input_ids"]
        assert chat.said(plain, ids, "x") == plain.decode(ids, skip_special_tokens=True)
    assert said("a", asked="<|im_start|>assistant\n<think>\n\n</think>\n\n") == "a"  # a thought that the template closed itself
