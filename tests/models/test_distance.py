"""What is evaluated is what was trained: how far an adapter takes its model, and what of it a merge or an evaluation loses."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import chat, distance, loading, lora
from workflow_scripts.plumbing.messages import InputError


@pytest.fixture(scope="module")
def large(folder, base, slices):
    return small_steps.train(folder / "large", "dpo", base, slices["pairs"], learning_rate=2e-3)


@pytest.fixture(scope="module")
def bf16_base(folder, base):
    """The base, on the grid of bf16."""
    from transformers import AutoModelForCausalLM

    there = folder / "bf16"
    AutoModelForCausalLM.from_pretrained(base.parent, dtype=torch.bfloat16).save_pretrained(there)
    chat.tokenizer_of(manifests.read(base)).save_pretrained(there)
    return small_steps.write_manifest(there / "manifest.json", "base", "bf16 base", sorted(p.name for p in there.iterdir()))


def adapted(start, adapter, tmp_path, dtype="fp32"):
    return lora.attach(loading.load(start, tmp_path, "cpu", dtype), start, adapter).eval()


def answer(folder, base, adapter, **more):
    rows = small_steps.write_slice(folder / "data", "ifeval", small_steps.world.eval_rows(4, seed=3), heldout=0)
    parents = {"start": base, "prompts": rows} | ({"adapter": adapter.path} if adapter else {})
    config = small_steps.answering(12, **more)
    return small_steps.run(small_steps.job("generate", folder / "run/ifeval_responses.manifest.json", parents, config))


@pytest.mark.parametrize("experiment", ["sft_v2", "dpo", "kto", "grpo", "rm"])
def test_every_adapter_says_how_far_it_is_from_its_start(experiment, base, slices, tmp_path):
    more = {"max_completion_length": 16} if experiment == "grpo" else {}
    made = small_steps.train(tmp_path / "run", experiment, base, slices[experiment], max_steps=2, **more).data["distance"]
    assert set(made["norm"]) == set(small_steps.LORA["target_modules"]) and min(made["norm"].values()) > 0
    if experiment == "rm":
        assert "kl" not in made
    else:
        assert made["kl"] > 0 and made["noise"] < made["kl"] / 5 and 0 <= made["changed"] <= 1
        assert 1 <= len(made["tokens"]) <= distance.ROWS and max(map(len, made["tokens"])) <= distance.TOKENS


def test_rows_longer_than_what_an_evaluation_writes_have_room_in_it(base, tmp_path):
    talks = small_steps.world.sft_rows(20, seed=2, follow=0.5, numeric=0.0)
    for row in talks:
        row["messages"][-1]["content"] = " ".join([row["messages"][-1]["content"]] * 12)
    rows = small_steps.write_slice(tmp_path / "data", "sft", talks, heldout=4)
    adapter = small_steps.train(tmp_path / "run", "sft_v2", base, rows, max_steps=2)
    assert distance.longest(adapter) == distance.TOKENS
    assert answer(tmp_path, base, adapter).data["distance"]["kl"] == pytest.approx(adapter.data["distance"]["kl"], rel=0.05)


def test_the_figures_are_those_worked_by_hand(base, large, tmp_path):
    start, file = manifests.read(base), load_file(large.file("adapter_model.safetensors"))
    with_adapter, plain = adapted(start, large, tmp_path), loading.load(start, tmp_path, "cpu", "fp32").eval()
    kl, changed, places = 0.0, 0, 0
    for ids in large.data["distance"]["tokens"]:
        with torch.no_grad():
            p, q = (torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1) for model in (with_adapter, plain))
        kl += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        changed, places = changed + (p.argmax(-1) != q.argmax(-1)).sum().item(), places + len(ids)
    assert large.data["distance"]["kl"] == pytest.approx(kl / places, rel=0.02)
    assert large.data["distance"]["changed"] == pytest.approx(changed / places, abs=1e-3)
    squares = {}
    for name in file:
        if name.endswith("lora_A.weight"):
            d = 2 * file[name.replace("lora_A", "lora_B")] @ file[name]  # alpha/r = 2
            kind = name.split(".")[-3]
            squares[kind] = squares.get(kind, 0.0) + d.double().pow(2).sum().item()
    assert large.data["distance"]["norm"] == pytest.approx({kind: value**0.5 for kind, value in squares.items()}, rel=1e-3)


@pytest.mark.parametrize("quant", [False, True])
def test_an_evaluation_finds_what_training_found_and_says_so(base, slices, tmp_path, quant):
    """Also where it was trained on an NF4 base, and is judged on that or on the full one."""
    sft = small_steps.train(tmp_path / "sft", "sft_v2", base, slices["sft"])
    found = answer(tmp_path, base, sft, **({"quant": small_steps.QUANT} if quant else {})).data["distance"]
    assert found["kept"] == 1.0
    assert found["kl"] == pytest.approx(sft.data["distance"]["kl"], rel=1e-3 if quant else 0.5)


def test_a_merge_in_bf16_loses_a_small_update_and_the_evaluation_of_such_a_model_stops(base, bf16_base, tmp_path, monkeypatch):
    """The fault that there was: the adapter merged, the sum rounded to the grid on which the weights lie already. The update is
    as small as the study's: below half a step of bf16 on most weights."""
    start = manifests.read(bf16_base)
    small = small_steps.train(tmp_path / "dpo", "dpo", bf16_base, dpo_rows(tmp_path), learning_rate=5e-6)
    lost = distance.survives(adapted(start, small, tmp_path), torch.bfloat16)
    assert lost["kept"] < 0.9 and lost["unchanged"] > 0.5
    assert distance.survives(adapted(start, small, tmp_path), torch.float32)["kept"] > distance.KEPT
    answer(tmp_path / "right", bf16_base, small)

    right = lora.attach

    def rounded(model, start, adapter):
        made = right(model, start, adapter)
        for module in made.modules():
            if isinstance(module, LoraLayer):
                delta = module.get_delta_weight("default")
                module.base_layer.weight.data = (module.base_layer.weight + delta).to(torch.bfloat16).float()
                module.lora_B["default"].weight.data.zero_()
        return made

    monkeypatch.setattr(lora, "attach", rounded)
    with pytest.raises(InputError, match="what is evaluated is not what was trained: 0.0% of the update is in the model"):
        answer(tmp_path / "wrong", bf16_base, small)


def dpo_rows(tmp_path):
    return small_steps.pairs_slice(tmp_path / "rows")


def test_an_update_of_half_the_strength_is_another_one(base, large, tmp_path):
    with_adapter = adapted(manifests.read(base), large, tmp_path)
    assert distance.check(distance.Peft(with_adapter), large, alike=True)["kept"] == 1.0
    with distance.scaled(with_adapter, 0.5):
        distance.check(distance.Peft(with_adapter), large, alike=False)  # on another base the KL says little
    with distance.scaled(with_adapter, 0.5), pytest.raises(InputError, match=r"nats a token from its start"):
        distance.check(distance.Peft(with_adapter), large, alike=True)
    distance.check(distance.Peft(with_adapter), large, alike=True)  # as strong as before
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.97
    with pytest.raises(InputError, match="97.0% of the update is in the model"):
        distance.check(distance.Peft(with_adapter), large, alike=True)


@pytest.mark.parametrize(("rate", "dtype"), [(5e-6, "float32"), (3.0, "bfloat16")])
def test_a_merge_is_kept_in_the_dtype_in_which_the_update_survives(bf16_base, tmp_path, rate, dtype):
    trained = small_steps.train(tmp_path / "dpo", "dpo", bf16_base, dpo_rows(tmp_path), learning_rate=rate, max_steps=2)
    made = small_steps.merge(tmp_path / "merge", bf16_base, trained.path)
    assert made.data["dtype"] == dtype == json.loads((made.folder / "config.json").read_text())["dtype"]
    kept = {name: one["kept"] for name, one in made.data["update"].items()}
    assert kept[dtype] >= distance.KEPT and (kept["bfloat16"] < distance.KEPT) is (dtype == "float32")


def test_greedy_is_greedy_whatever_a_folder_says_and_folder_is_a_choice(speaking_base, tmp_path):
    """A repetition penalty of 1.1 changed 59 of 60 greedy answers of the tiny world."""
    plain = answer(tmp_path / "plain", speaking_base, None, max_new_tokens=32)
    there = tmp_path / "penalty"
    there.mkdir()
    for path in speaking_base.parent.iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    settings = json.loads((there / "generation_config.json").read_text()) | {"repetition_penalty": 1.5, "temperature": 0.6}
    (there / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
    names = sorted(path.name for path in there.iterdir() if path.name != "manifest.json")
    other = small_steps.write_manifest(there / "manifest.json", "base", "one with a penalty", names)
    found = {
        how: answer(tmp_path / how, other, None, **small_steps.answering(32, 4 * (how == "folder"), decoding=how))
        .file("ifeval_responses.jsonl")
        .read_text()
        for how in ("greedy", "folder")
    }
    assert found["greedy"] == plain.file("ifeval_responses.jsonl").read_text() != found["folder"]


@pytest.fixture(scope="module")
def page():
    """What docs/methods.md says of the limits, by name."""
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    patterns = {
        "tokens": r"the first (\d+) tokens of the first \d+ held-out rows",
        "rows": r"the first \d+ tokens of the first (\d+) held-out rows",
        "weak": r"told by ([\d.]+) of the update",
        "kept": r"by projection \| at least (\d+) %",
        "agrees": r"found again \| at least ([\d.]+)",
        "told": r"more than \| (\d+) times the noise, that of training and the one found",
    }
    return {name: float(re.findall(pattern, text)[0]) for name, pattern in patterns.items()}


def test_the_page_says_what_is_looked_at(page):
    assert (page["tokens"], page["rows"], page["weak"]) == (distance.TOKENS, distance.ROWS, distance.WEAK)
    assert page["kept"] / 100 == distance.KEPT  # by which a merge is kept, too


@pytest.mark.parametrize("limit", ["kept", "agrees", "noise found", "noise of training"])
def test_an_evaluation_stops_at_the_limits_that_the_page_says(page, monkeypatch, tmp_path, limit):
    """The right path at each limit's better side, and the same a little beyond it."""

    def stops(kept=1.0, found=1.0, noise=0.0, trained_noise=0.0):
        """Effects and noise beside a trained effect of 1."""
        data = {"distance": {"kl": 1 + trained_noise, "noise": trained_noise, "tokens": []}}
        monkeypatch.setattr(distance, "kept", lambda model, adapter: kept)
        monkeypatch.setattr(distance, "measure", lambda model, rows: {"kl": found + noise, "noise": noise, "changed": 0.0})
        try:
            distance.check(None, SimpleNamespace(data=data, folder=tmp_path, path=tmp_path), alike=True)
        except InputError:
            return True
        return False

    kept, agrees, third = page["kept"] / 100, page["agrees"], 1 / page["told"]
    good, beyond = {
        "kept": ({"kept": kept + 1e-3}, {"kept": kept - 1e-3}),
        "agrees": ({"found": agrees + 1e-3}, {"found": agrees - 1e-3}),
        "noise found": ({"found": 0.1, "noise": third + 1e-3}, {"found": 0.1, "noise": third - 1e-3}),
        "noise of training": ({"found": 0.1, "trained_noise": third + 1e-3}, {"found": 0.1, "trained_noise": third - 1e-3}),
    }[limit]
    assert not stops(**good) and stops(**beyond)
