"""A step whose answers vLLM writes: by what stands for it (tests/support/vllm_standin.py), from prompts to a manifest."""

import json
import os

import pytest
import torch

from tests.support import own_task, small_steps, vllm_standin
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.plumbing.jsonl import read_jsonl
from workflow_scripts.plumbing.messages import InputError

pytestmark = pytest.mark.slow
CHUNK, PROMPTS = 5, 12


@pytest.fixture(scope="module")
def adapter(folder, base, slices):
    return small_steps.train(folder / "dpo", "dpo", base, slices["pairs"], learning_rate=2e-3)


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return vllm_standin.stand_in(monkeypatch)


@pytest.fixture
def asked(base, adapter, tmp_path):
    def job(adapted=True, name="run", **more):
        rows = small_steps.write_slice(tmp_path / "data", "ifeval", small_steps.world.eval_rows(PROMPTS, seed=3), heldout=0)
        parents = {"start": base, "prompts": rows} | ({"adapter": adapter.path} if adapted else {})
        config = small_steps.answering(12, generation={"backend": "vllm", "batch_size": CHUNK}, **more)
        made = small_steps.job("generate", tmp_path / name / "ifeval_responses.manifest.json", parents, config)
        made.step["precision"] = "bf16"
        return made

    return job


def rows_of(artifact):
    return read_jsonl(artifact.path.with_name("ifeval_responses.jsonl"))


def test_answers_are_those_of_the_adapter_beside_its_base(standin, asked):
    made = small_steps.run(asked())
    assert made.data["answered_by"] == f"vllm, {CHUNK} at a time" and len(rows_of(made)) == PROMPTS
    assert made.data["distance"]["kl"] > 0 and made.data["distance_served"]["share"] == pytest.approx(1, abs=0.1)
    (engine,) = standin.ENGINES
    assert engine["dtype"] == "bfloat16" and engine["enable_lora"] and engine["max_lora_rank"] == 16
    assert [call["prompts"] for call in standin.CALLS[2:]] == [CHUNK, CHUNK, 2]
    same = asked(name="graphs")
    same.step["config"]["generation"] = {"backend": "graphs", "adapter": "match"}
    ours = rows_of(small_steps.run(same))
    assert sum(a["response"] == b["response"] for a, b in zip(ours, rows_of(made), strict=True)) >= PROMPTS - 3  # bf16: near-ties
    assert [row["key"] for row in ours] == [row["key"] for row in rows_of(made)]


def test_a_model_without_an_adapter_is_answered_for_too(standin, asked):
    made = small_steps.run(asked(adapted=False))
    assert "distance" not in made.data and "distance_served" not in made.data
    assert not standin.ENGINES[0]["enable_lora"] and {call["adapter"] for call in standin.CALLS} == {None}


@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_an_adapter_that_vllm_does_not_apply_as_peft_does_stops_the_evaluation(standin, asked, strength):
    standin.STRENGTH[0] = strength
    job = asked()
    with pytest.raises(InputError, match="vllm: the adapter does .* of what it does in peft"):
        small_steps.run(job)
    assert not job.out.exists()


def test_a_killed_evaluation_answers_again_the_chunk_that_it_was_at(standin, asked, monkeypatch):
    whole = small_steps.run(asked(name="whole"))
    calls, true = [], vllm_standin.LLM.generate

    def killed(self, prompts, *others, **more):
        calls.append(len(prompts))
        if len(calls) == 4:  # two that compare, one chunk, and then
            raise KeyboardInterrupt
        return true(self, prompts, *others, **more)

    job = asked()
    monkeypatch.setattr(vllm_standin.LLM, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        small_steps.run(job)
    saved = job.work / fingerprint(job.step) / "answers.jsonl"
    assert len([json.loads(line) for line in saved.read_text().splitlines()]) == CHUNK
    monkeypatch.setattr(vllm_standin.LLM, "generate", true)
    vllm_standin.CALLS.clear()
    again = small_steps.run(job)
    assert [call["prompts"] for call in vllm_standin.CALLS[2:]] == [CHUNK, 2]
    assert rows_of(again) == rows_of(whole)


def test_the_model_has_left_the_card_before_the_engine_comes(standin, asked, monkeypatch):
    where, true = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to, **more: (where.append(to), true(self, *to, **more))[1])
    small_steps.run(asked())
    assert ("cpu",) in where


def test_an_answer_longer_than_the_model_knows_places_for_is_said(standin, asked):
    job = asked()
    job.step["config"]["max_new_tokens"] = small_steps.SHAPE["max_position_embeddings"]
    with pytest.raises(InputError, match="the model knows 256 positions, and vLLM answers no further"):
        small_steps.run(job)
    assert not standin.ENGINES and not job.out.exists()


def test_a_task_of_the_configs_own_is_answered_by_it_too(standin, base, adapter, tmp_path):
    file = own_task.write(tmp_path, "generate_until")
    config = {"task": "mine", "metric": "exact_match", "lm_eval": own_task.ASKED | {"file": file.name}, "decoding": "greedy"}
    config |= {"generation": {"backend": "vllm", "batch_size": CHUNK}, "batch_size": 4}
    job = small_steps.job("own_task", tmp_path / "mine_x.json", {"start": base, "adapter": adapter.path}, config)
    job.step["precision"] = "bf16"
    made = small_steps.run(manifests.Job(job.step, [*job.inputs, file], job.out, job.work)).data
    assert made["answered_by"] == f"vllm, {CHUNK} at a time" and made["distance_served"]["share"] == pytest.approx(1, abs=0.1)
    assert made["n_prompts"] == sum(call["prompts"] for call in standin.CALLS[2:])
