"""Models that begin with a token of their own, which the chat template writes and the tokenizer adds too (Llama 3, Gemma); and
models whose padding is their end of turn."""

import json

import pytest

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import chat, templates
from workflow_scripts.tiny import world

START = "<|start|>"
SMALL = {"max_steps": 2, "max_completion_length": 8, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
ROLLOUTS = {"grpo": SMALL | {"num_generations": 4}, "ppo_ifeval": SMALL | {"steps_per_generation": 2}}
METHODS = {"sft_v2": {}, "dpo": {}, "kto": {}, "rm": {}, "orpo": {}, **ROLLOUTS}


@pytest.fixture(scope="module")
def starting(base, folder):
    """The base with a token that its tokenizer puts before every text, and its template before every conversation."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AddedToken, AutoModelForCausalLM

    there = folder / "starting"
    tokenizer = chat.tokenizer_of(manifests.read(small_steps.copy_base(base, there)))
    model = AutoModelForCausalLM.from_pretrained(there)
    tokenizer.add_special_tokens({"bos_token": AddedToken(START, special=True, normalized=False)})
    pair = [(START, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{START} $A", f"{START} $A {START} $B", pair)
    tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(there)
    tokenizer.save_pretrained(there)
    made = small_steps.copy_base(there / "manifest.json", folder / "starting, whole")
    read = chat.tokenizer_of(manifests.read(made))
    assert read("a")["input_ids"][0] == read.bos_token_id and templates.install(read, None, None)
    return made, read.bos_token_id


@pytest.fixture
def seen(monkeypatch):
    """Every row of tokens that a model is given from now on."""
    from transformers import Qwen2Model

    rows, forward = [], Qwen2Model.forward

    def looked_at(self, input_ids=None, **more):
        if input_ids is not None and input_ids.shape[1] > 1:
            rows.extend(input_ids.tolist())
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(Qwen2Model, "forward", looked_at)
    return rows


def begins_once(rows, start, padding=0):
    """Whether each row, but for its padding, begins with the token and has it nowhere else."""
    texts = [[one for one in row if one != padding] for row in rows]
    return bool(texts) and all(text[0] == start and text.count(start) == 1 for text in texts if text)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_sees_it_once(method, starting, seen, slices, tmp_path):
    """huggingface/trl #1591 (two in DPO, CPO, ORPO and KTO) and #3520 (none in GRPO's rollouts)."""
    small_steps.train(tmp_path, method, starting[0], slices[method], **METHODS[method])
    assert begins_once(seen, starting[1])


def test_an_evaluation_sees_it_once(starting, seen, tmp_path):
    """Without it Llama 3.1 lost four points of IFEval (tenstorrent/tt-metal #48444), by it Gemma's perplexity is 3
    (EleutherAI/lm-evaluation-harness #1455)."""
    prompts = small_steps.write_slice(tmp_path / "data", "ifeval", world.eval_rows(6, seed=3), heldout=0)
    out = tmp_path / "run/ifeval_responses.manifest.json"
    parents = {"start": starting[0], "prompts": prompts}
    small_steps.run(small_steps.job("generate", out, parents, small_steps.answering(8, 3)))
    assert begins_once(seen, starting[1])
    assert json.loads(out.read_text())["kind"] == "responses"


@pytest.mark.parametrize("method", METHODS)
def test_a_padding_that_is_the_end_of_a_turn_changes_no_number(method, base, slices, folder, tmp_path):
    """mlabonne/llm-course #33, unslothai/unsloth #416: whoever leaves out the loss of padding by its id teaches no end."""
    padded = folder / "padded with the end"
    made = padded / "manifest.json"
    if not padded.exists():
        small_steps.copy_base(base, padded, pad_token="<|im_end|>")
        assert chat.tokenizer_of(manifests.read(made)).pad_token_id == chat.tokenizer_of(manifests.read(made)).eos_token_id
    found = [
        small_steps.train(tmp_path / start.parent.name, method, start, slices[method], **METHODS[method]).data["objective"]
        for start in (base, made)
    ]
    assert found[0] == found[1]
