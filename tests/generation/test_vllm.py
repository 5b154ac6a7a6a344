"""The backend `vllm` against what stands for it: what it is asked, answers, and refuses. vLLM itself never ran here."""

import dataclasses
import inspect
import json
import os

import pytest
import torch

from tests.conftest import ROOT
from tests.generation.conftest import ENDS, NEW, greedy, model_of
from tests.support import vllm_standin
from workflow_scripts.artifacts import fingerprint
from workflow_scripts.generation import vllm_engine
from workflow_scripts.generation.answers import Asked
from workflow_scripts.plumbing import gpus
from workflow_scripts.plumbing.messages import InputError

REAL = json.loads((ROOT / "tests/files/vllm_api.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model and an adapter in folders, as steps leave them, and the model with it."""
    folder = tmp_path_factory.mktemp("served")
    model_of("Llama", False).save_pretrained(folder / "base")
    base = model_of("Llama", False)
    from peft import LoraConfig, get_peft_model

    with_adapter = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])).eval()
    torch.manual_seed(1)
    for name, weight in with_adapter.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape)
    with_adapter.save_pretrained(folder / "adapter")
    return folder, with_adapter


@pytest.fixture
def served(place, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    vllm_standin.stand_in(monkeypatch)

    def make(adapter=True, size=10, length=64):
        return vllm_engine.Engine(place[0] / "base", place[0] / "adapter" if adapter else None, 4, "float32", length, size)

    return make


def answers(engine, prompts, **asked):
    found = {}
    numbered = [*enumerate(prompts)]
    groups = [numbered[first : first + engine.size] for first in range(0, len(numbered), engine.size)]
    asked = Asked(**{"ends": ENDS, "max_new_tokens": NEW} | asked)
    engine.answer(groups, asked, lambda place, sample, made: found.__setitem__((place, sample), made))
    return found


@pytest.mark.parametrize("name", ["SamplingParams", "LoRARequest", "RequestOutput", "CompletionOutput", "Logprob"])
def test_what_stands_for_it_knows_no_argument_that_the_real_one_does_not(name):
    ours = {one.name for one in dataclasses.fields(getattr(vllm_standin, name))}
    assert ours <= set(REAL[name]) and REAL["version"] == vllm_standin.__version__


def test_the_engine_and_its_call_have_the_real_ones_arguments():
    assert set(inspect.signature(vllm_standin.LLM).parameters) <= {*REAL["LLM"], *REAL["EngineArgs"]}
    assert set(inspect.signature(vllm_standin.LLM.generate).parameters) - {"self"} <= set(REAL["LLM.generate"])
    assert set(inspect.signature(vllm_standin.TokensPrompt).parameters) <= set(REAL["TokensPrompt"])
    assert list(vllm_engine.RANKS) == REAL["ranks"]
    assert {name for name in vllm_engine.ENVIRONMENT if name.startswith("VLLM_")} <= set(REAL["variables"])


def test_the_version_is_that_of_its_lock_and_the_environment_installs_it():
    there = fingerprint.of_vllm({"torch": "0", "unknown": "7"})
    assert there["vllm"] == REAL["version"] and there["unknown"] == "7"
    assert there["torch"] not in ("0", fingerprint.locked()["torch"])  # a torch of its own: hence an environment of its own
    for step in ("generate", "own_task"):
        packages = fingerprint.packages(f"workflow_scripts.steps.{step}")
        assert {name for name, version in fingerprint.of_vllm(packages).items() if packages.get(name) != version} == {
            "numpy", "torch", "vllm",
        }  # fmt: skip
    assert "-r vllm.lock" in (ROOT / "envs/vllm.yaml").read_text()
    assert "vllm" not in fingerprint.locked()


@pytest.mark.parametrize("adapter", [False, True])
def test_greedy_answers_are_those_of_generate_whatever_the_folder_says(served, place, prompts, adapter, monkeypatch):
    folder, model = place
    said = {"eos_token_id": 11, "repetition_penalty": 3.0}
    (folder / "base/generation_config.json").write_text(json.dumps(said))
    found = answers(served(adapter), prompts[:14])
    with model.disable_adapter() if not adapter else vllm_standin.torch.no_grad():
        wanted = [greedy(model, ids) for ids in prompts[:14]]
    assert [found[place, 0].tokens for place in range(14)] == wanted
    for one in found.values():
        assert one.stopped == (one.tokens[-1] in ENDS) and (one.stopped or len(one.tokens) == NEW) and one.logprobs is None
    assert [call["prompts"] for call in vllm_standin.CALLS] == [10, 4]
    assert {bool(call["adapter"]) for call in vllm_standin.CALLS} == {adapter}


def test_an_end_of_the_folder_that_is_not_declared_ends_nothing(served, place, prompts):
    wanted, ids = next((said, ids) for ids in prompts if len(said := greedy(place[1], ids)) > 3)
    (place[0] / "base/generation_config.json").write_text(json.dumps({"eos_token_id": wanted[1]}))
    assert answers(served(), [ids])[0, 0].tokens == wanted


def test_the_engine_is_asked_for_what_the_config_says(served):
    served(size=300)
    (made,) = vllm_standin.ENGINES
    wanted = {
        "dtype": "float32",
        "generation_config": "vllm",
        "trust_remote_code": False,
        "enforce_eager": False,
        "max_model_len": 64,
    }
    wanted |= {"enable_lora": True, "max_lora_rank": 8, "max_num_seqs": 256, "gpu_memory_utilization": 0.72}
    assert {key: made[key] for key in wanted} == wanted
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_it_fills_no_more_of_a_card_than_the_ledger_granted(served, monkeypatch):
    monkeypatch.setattr(gpus, "limit", lambda: 20)
    served()
    assert vllm_standin.ENGINES[0]["gpu_memory_utilization"] == pytest.approx(0.9 * 20 / 100)


def test_a_row_draws_from_its_own_seed_and_a_seed_draws_again(served, prompts):
    drawn = {"temperature": 0.8, "samples": 3, "seed": 5}
    whole = {key: one.tokens for key, one in answers(served(), prompts[:8], **drawn).items()}
    assert len(whole) == 24 and len({tuple(one) for one in whole.values()}) > 20
    chunked = {key: one.tokens for key, one in answers(served(size=3), prompts[:8], **drawn).items()}
    assert chunked == whole
    other = {key: one.tokens for key, one in answers(served(), prompts[:8], **drawn | {"seed": 6}).items()}
    assert sum(other[key] == whole[key] for key in whole) < 4


def test_log_probabilities_are_at_the_temperature_that_was_drawn_at(served, place, prompts):
    for temperature in (0.0, 0.5):
        for (which, _), one in answers(served(), prompts[:4], temperature=temperature, seed=1, logprobs=True).items():
            ids = prompts[which]
            with torch.no_grad():
                logits = place[1](torch.tensor([ids + one.tokens])).logits[0, len(ids) - 1 : -1] / (temperature or 1.0)
            wanted = logits.log_softmax(-1)[range(len(one.tokens)), one.tokens]
            assert one.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_what_it_would_do_otherwise_than_asked_is_refused(served, prompts, tmp_path):
    with pytest.raises(InputError, match=r"temperature: found 0.001; vLLM draws at 0.01 or more"):
        answers(served(), prompts[:1], temperature=0.001)
    with pytest.raises(AssertionError, match="after top-k and top-p"):
        answers(served(), prompts[:1], temperature=1.0, top_k=4, logprobs=True)
    assert [vllm_engine.room_for(rank, tmp_path) for rank in (1, 4, 16, 17, 512)] == [1, 8, 16, 32, 512]
    with pytest.raises(InputError, match="rank 513; vLLM takes 512 at most"):
        vllm_engine.room_for(513, tmp_path)


@pytest.mark.parametrize(("reason", "tokens"), [("stop", [3, 4]), ("length", [3, 2]), ("abort", [3]), ("repetition", [3, 3])])
def test_an_answer_that_ended_otherwise_than_it_says_is_no_answer(reason, tokens):
    with pytest.raises(RuntimeError, match=f"vLLM ended an answer by '{reason}'"):
        vllm_engine.read(vllm_standin.CompletionOutput(tokens, reason), Asked(ENDS, 8))


def test_the_adapters_part_on_its_path_is_compared_with_that_on_pefts(served, place, prompts):
    engine, model = served(), place[1]
    texts = [ids for ids in prompts if len(ids) > 1][:6]

    def peft(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]

    with_it = torch.cat([peft(ids) for ids in texts])
    with model.disable_adapter():
        without = torch.cat([peft(ids) for ids in texts])
    ours = [a - b for a, b in zip(engine.likely(texts, True), engine.likely(texts, False), strict=True)]
    theirs = (with_it - without).tolist()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert vllm_engine.agreement(ours, theirs)["share"] == pytest.approx(1, abs=1e-3)
    for wrong in ([0.0] * len(theirs), [4 * one for one in theirs], [-one for one in theirs]):
        with pytest.raises(InputError, match="not what was trained"):
            vllm_engine.agreement(wrong, theirs)
    assert vllm_engine.agreement([0.0, 0.0], [0.0, 0.0]) == {}


def test_rounding_as_large_as_the_update_refuses_nobody():
    draw = torch.Generator().manual_seed(2)
    update, noise = (0.02 * torch.randn(300, generator=draw) for _ in range(2))
    found = vllm_engine.agreement((update + noise).tolist(), update.tolist())
    assert abs(found["share"] - 1) < 4 * found["se"] and found["se"] == pytest.approx(300**-0.5, rel=0.2)
