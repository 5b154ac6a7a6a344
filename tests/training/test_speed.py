"""How a training computes on a GPU decides no number: tried on a CPU, in fp32, by the same hooks (tests/gpu has the kernels)."""

import pandas
import pytest
import torch

from tests.support import small_steps
from workflow_scripts.models import lora
from workflow_scripts.tiny import world
from workflow_scripts.training import speed

BLOCK = small_steps.LORA | {"dropout": 0.0}  # another shape draws another dropout mask


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def base(here):
    return small_steps.write_base(here / "base", steps=60)


@pytest.fixture(scope="module")
def slices(here):
    pairs = world.preference_rows(40, seed=1)
    return {
        "sft": small_steps.write_slice(here / "data", "sft", world.sft_rows(32, seed=1, follow=0.5, numeric=0.1), heldout=8),
        "pairs": small_steps.write_slice(here / "data", "pairs", pairs, heldout=8),
        "ifeval": small_steps.write_slice(here / "data", "ifeval", world.eval_rows(80, seed=1, split="pairs"), heldout=8),
    }


ROWS = (
    {"sft_v2": "sft"}
    | dict.fromkeys(("dpo", "simpo", "kto", "rm"), "pairs")
    | dict.fromkeys(("ppo_ifeval", "grpo", "rloo"), "ifeval")
)


def trained(experiment, out, base, slices, **how):
    config = small_steps.train_config(experiment, lora=BLOCK, logging_steps=1, max_steps=2)
    job = small_steps.job(
        f"train_{config['method']}", out / "adapter" / "manifest.json", {"start": base, "rows": slices[ROWS[experiment]]}, config
    )
    job.speed = how
    made = small_steps.run(job)
    return made, pandas.read_csv(made.folder / "metrics.csv")["loss"].dropna().tolist()


@pytest.mark.parametrize("experiment", ROWS)
def test_without_padding_each_method_trains_the_same(experiment, base, slices, here, monkeypatch):
    plain, losses = trained(experiment, here / experiment / "plain", base, slices)
    monkeypatch.setattr(speed, "hinders_unpadding", lambda model, step: None)
    seen = []
    real = speed.attend

    def attend(*args, **kwargs):
        seen.append(kwargs.get("cu_seq_lens_q"))
        return real(*args, **kwargs)

    monkeypatch.setattr(speed, "attend", attend)
    made, ours = trained(experiment, here / experiment / "unpadded", base, slices, unpadded=True)
    assert any(ends is not None and len(ends) > 2 for ends in seen)
    assert ours == pytest.approx(losses, abs=2e-5)
    before, after = (one.data["objective"]["after"] for one in (plain, made))
    assert {name: after[name] for name in before} == pytest.approx(before, abs=2e-4)


def batch(model, rows):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def test_a_text_sees_neither_its_neighbours_nor_a_padding_on_the_left(base):
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import loading

    start = manifests.read(base)
    plain, fast = (loading.load(start, base.parent, "cpu", "fp32") for _ in range(2))
    speed.Unpadded(fast)
    rows = [[5, 9, 20, 31, 8], [7, 11], [40, 3, 12]]
    ids, mask = batch(plain, rows)
    for turned in (False, True):
        given = {"input_ids": ids.flip(1) if turned else ids, "attention_mask": mask.flip(1) if turned else mask}
        one, other = (model(**given, use_cache=False).logits for model in (plain, fast))
        real = given["attention_mask"].bool()
        assert torch.allclose(one[real], other[real], atol=1e-4)
        hidden = fast.base_model(**given, use_cache=False).last_hidden_state
        assert not hidden[~real].any() and hidden[real].any()
    asked = {"input_ids": ids[:1], "attention_mask": mask[:1], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(model.generate(**asked) for model in (plain, fast)))


def test_a_batch_that_fails_leaves_nothing_behind(base):
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import loading

    model = loading.load(manifests.read(base), base.parent, "cpu", "fp32")
    hooks = speed.Unpadded(model)
    ids, mask = batch(model, [[5, 9], [7]])
    with pytest.raises(IndexError):
        model(input_ids=ids + 10**6, attention_mask=mask, use_cache=False)
    assert hooks.places is None
    assert model(input_ids=ids[:1], use_cache=False).logits.shape[1] == 2


def test_a_base_dequantised_once_multiplies_with_the_same_numbers(base):
    from peft import get_peft_model

    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import loading

    model = loading.load(manifests.read(base), base.parent, "cpu", "fp32", {"type": "nf4", "double": True})
    model = get_peft_model(model, lora.adapter_config(BLOCK, model))
    ids = torch.tensor([[5, 9, 20, 31, 8]])
    before = model(input_ids=ids, use_cache=False).logits
    layers = sum(type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state") for module in model.modules())
    count = speed.dequantise(model)
    assert count == 7 * model.config.num_hidden_layers and layers >= count
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, before, atol=1e-5)
    assert not [one for one in model.modules() if type(one).__name__ == "Linear4bit" and hasattr(one, "quant_state")]


def test_on_a_cpu_nothing_is_changed(base, slices, here):
    made, _ = trained("dpo", here / "left_alone", base, slices, unpadded=True, dequantised=True, compiled=1)
    import json

    run = json.loads((made.folder / "run.json").read_text())
    assert 0 < run["timing"]["step_seconds_median"] < run["timing"]["train_runtime"]
    beside = run["timing"]["held_out_seconds"] + run["timing"]["distance_seconds"]
    assert 0 < beside < run["seconds"] - run["timing"]["train_runtime"]  # the rest is what it takes to start and to save
    assert run["speed"] == {
        "unpadded": False, "dequantised": 0, "fused": 0, "compiled": 0, "captured": False}  # fmt: skip


def test_models_whose_attention_is_another_one_keep_their_padding(monkeypatch):
    from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    step = {"device": "cuda", "precision": "bf16"}
    known = Qwen2ForCausalLM(Qwen2Config(**small, vocab_size=90))
    assert speed.hinders_unpadding(known, step) is None
    assert speed.hinders_unpadding(GemmaForCausalLM(GemmaConfig(**small, head_dim=8, vocab_size=90)), step) is None
    assert "rotary" in speed.hinders_unpadding(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90)), step)
    sliding = Qwen2Config(**small, vocab_size=90, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert "sliding" in speed.hinders_unpadding(Qwen2ForCausalLM(sliding), step)
    assert "16 bits" in speed.hinders_unpadding(known, step | {"precision": "fp32"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0" in speed.hinders_unpadding(known, step)
