"""What fits on which GPU: the formulas count what torch and peft really hold, and are within 20 % of what was measured."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workflow_scripts.config.config import Config, load
from workflow_scripts.config.names import CHOICE
from workflow_scripts.config.written import merge
from workflow_scripts.plan import gpu_memory
from workflow_scripts.plan.gpu_memory import GIB, Memory, Pass
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import fits

ROOT = Path(__file__).resolve().parents[2]
STUDY, LARGE = ["config/qwen05b.yaml"], ["config/qwen05b.yaml", "config/qwen7b.yaml"]
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def memory(*overlays: dict, files=STUDY) -> Memory:
    data = load(*(ROOT / file for file in files)).data
    for overlay in overlays:
        data = merge(data, overlay)
    return Memory(Config(data))


# -- parameters ------------------------------------------------------------------------------------------------------


def test_the_adapter_of_the_study_has_the_parameters_that_its_manifest_says():
    assert memory().adapter == 8_798_208
    assert memory(files=LARGE).adapter == 8 * 28 * (2 * (3584 + 512) + 2 * 2 * 3584 + 3 * (3584 + 18944)) == 20_185_088


SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 640, "vocab_size": 512}
R = 8


def shape_of(layers: int, tied: bool = True) -> gpu_memory.Shape:
    given = SHAPE | {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    return gpu_memory.shape_of(
        Config(merge(load(ROOT / STUDY[0]).data, {"base": {"shape": given | {"parameters": parameters(layers, tied)}}}))
    )


def parameters(layers: int, tied: bool) -> int:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=tied)).num_parameters()


def build(folder: Path, layers: int, nf4: bool, dropout: float, targets=SEVEN):
    """A real peft model in bf16 with fp32 adapters, as the steps load it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

    from workflow_scripts.models import loading

    base = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)).to(torch.bfloat16)
    base.save_pretrained(folder)
    options: dict = {"dtype": torch.bfloat16}
    if nf4:
        quant = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        options |= {"quantization_config": quant, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    loading.keep_trainable_on_cpu(model)
    block = LoraConfig(r=R, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(model, block)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


@pytest.mark.parametrize("targets", [SEVEN, ("q_proj", "v_proj")], ids=["seven", "two"])
def test_adapters_are_counted_as_peft_makes_them(tmp_path, targets):
    model = build(tmp_path, 3, False, 0.0, targets)
    real = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert gpu_memory.lora_parameters(shape_of(3), {"r": R, "target_modules": list(targets)}) == real


def test_a_target_of_unknown_size_is_named():
    with pytest.raises(InputError, match="lora.target_modules: c_attn: of no known size; without the model only q_proj"):
        memory({"lora": {"target_modules": ["q_proj", "c_attn"]}})


def test_an_nf4_base_takes_what_bitsandbytes_stores(tmp_path):
    model = build(tmp_path, 2, True, 0.0).get_base_model()
    real = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" not in name)
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and hasattr(module, "weight"):
            state = module.weight.quant_state
            real += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax))
    estimated = gpu_memory.weights(shape_of(2), 2, nf4=True, double=True)
    assert estimated == pytest.approx(real, rel=0.005)


# -- activations -----------------------------------------------------------------------------------------------------


def kept(model, padded: bool, autocast: bool) -> int:
    """Bytes of the tensors that autograd keeps in a forward pass, each storage once, parameters left out."""
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 64))
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0 if padded else 1
    own = {p.untyped_storage().data_ptr() for p in itertools.chain(model.parameters(), model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > 1:
            found[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_keeps_what_autograd_keeps_byte_for_byte(tmp_path, monkeypatch, nf4, autocast, padded, dropout):
    # peft asks whether autocast is on for CUDA, whatever the device: here it is to hear that of the CPU.
    real = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": real(device))
    sizes = [kept(build(tmp_path / str(layers), layers, nf4, dropout), padded, autocast) for layers in (2, 3)]
    how = Pass(shape_of(3), SEVEN, R, 2, dropout > 0, copies=not (nf4 and autocast), autocast=autocast, masked=padded)
    # On a CPU dropout keeps its mask in the dtype of its input, where CUDA keeps a byte.
    expected = how.kept(128, 64, mask_byte=2 if nf4 and autocast else 4)
    if autocast:
        expected += 2 * gpu_memory.lora_parameters(shape_of(1), {"r": R, "target_modules": list(SEVEN)})  # the adapter in bf16
    assert sizes[1] - sizes[0] == expected


# -- against what was measured ---------------------------------------------------------------------------------------


def measured() -> list[tuple[str, float, float, float]]:
    """(what, estimate, measured, ratio) of the table in docs/performance.md."""
    text = (ROOT / "docs/performance.md").read_text().split("## What fits on which GPU")[1]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.M)
    assert len(rows) == 8
    return [(what.strip(), float(estimate), float(found), float(ratio)) for what, estimate, found, ratio in rows]


def estimated() -> dict[str, float]:
    """The estimates of that table, in GiB. Tokens as they were there: rows of 1,024, but 12,640 tokens without padding in two."""
    made = memory()
    shape, adapter = made.shape, made.adapter

    def at(nf4: bool, step: float, state: int = 16, adapters: int = 1) -> float:
        return (gpu_memory.weights(shape, 2, nf4, True) + (state * adapters + 2) * adapter + step) / GIB

    def how(nf4: bool, dropout: bool, masked: bool = True, plain: bool = False) -> Pass:
        return Pass(shape, SEVEN, 16, 2, dropout, copies=plain or not nf4, autocast=not plain, masked=masked)

    def step(nf4: bool, dropout: bool, tokens: int, row: int, checkpointing: bool, scored: float, **more) -> float:
        return gpu_memory.step(how(nf4, dropout, **more), tokens, row, checkpointing, scored)

    answers = 12640 * 0.55  # of SFT's tokens
    pairs = 18000  # completion tokens of 32 rows; the tile is full from 4,096 on
    full = {"masked": False}
    return {
        "SFT, NF4, checkpointing, 4 x 4, 8-bit AdamW": at(True, step(True, True, 4096, 1024, True, answers / 4), 10),
        "SFT, NF4, no checkpointing, 16 x 1, no padding": at(True, step(True, True, 12640, 789, False, answers, **full)),
        "SFT, bf16, no checkpointing, 16 x 1, no padding": at(False, step(False, True, 12640, 789, False, answers, **full)),
        "DPO, bf16, checkpointing, 2 x 8": at(False, step(False, False, 4096, 1024, True, pairs / 8)),
        "DPO, bf16, no checkpointing, 16 x 1": at(False, step(False, False, 32768, 1024, False, pairs)),
        "DPO, NF4, no checkpointing, 16 x 1": at(True, step(True, False, 32768, 1024, False, pairs)),
        "SFT, NF4, checkpointing, 4 x 1,024 tokens": at(True, step(True, True, 4096, 1024, True, 4096, **full)),
        "PPO with a reward model, the same": at(
            True, step(True, False, 4096, 1024, True, 0, plain=True) + 4 * adapter, adapters=2
        ),
    }


def test_estimates_are_within_20_percent_of_what_was_measured_and_the_page_says_so():
    made, shown = estimated(), measured()
    assert {what for what, *_ in shown} == set(made)
    for what, estimate, found, ratio in shown:
        assert made[what] == pytest.approx(estimate, rel=0.01), what
        assert ratio == pytest.approx(estimate / found, abs=0.01), what
        assert 0.8 < ratio < 1.2, what


def test_the_phases_of_the_study_are_within_20_percent_of_what_was_measured_at_its_shape():
    """docs/study_memory.py's own settings; of multiple choice the tokens that its rows had."""
    from docs.study_memory import configured

    text = (ROOT / "docs/performance.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) B \| [\w ]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$", text, flags=re.M)
    assert len(rows) == 21
    made = {name: Memory(configured(shape, False, 1024)) for name, shape in (("0.5", "05b"), ("7", "7b"))}
    for name, shape, estimate, found, ratio in rows:
        one = made[shape]
        if name in CHOICE:
            phase = one.choose(name, *{"mmlu": (3254, 2), "truthfulqa": (881, 8)}[name])
        elif name == "ifeval":
            phase = one.generate(name, one.config.data["eval"]["batch_size"])
        else:
            body = one.config.experiments[name.removeprefix("eval_")]
            phase = (one.eval_rm if name == "eval_rm" else one.train)(name, body)
        assert phase.peak / GIB == pytest.approx(float(estimate), abs=0.006), (name, shape)
        assert float(ratio) == pytest.approx(float(estimate) / float(found), abs=0.015), (name, shape)
        assert 0.8 < float(ratio) < 1.2, (name, shape)


# -- the plan --------------------------------------------------------------------------------------------------------


def peaks(made: Memory) -> dict[str, float]:
    return {f"{phase.kind} {phase.name}": phase.peak for phase in made.phases()}


@pytest.mark.parametrize(
    ("phase", "overlay"),
    [
        ("train sft_v2", {"methods": {"sft": {"train": {"per_device_train_batch_size": 16}}}}),
        ("train sft_v2", {"methods": {"sft": {"train": {"gradient_checkpointing": False}}}}),
        ("train sft_v2", {"methods": {"sft": {"quantise": "none"}}}),
        ("train dpo", {"methods": {"dpo": {"train": {"max_length": 4096}}}}),
        ("train kto", {"methods": {"kto": {"train": {"per_device_eval_batch_size": 8}}}}),
        ("train ppo", {"methods": {"ppo": {"train": {"steps_per_generation": 16}}}}),
        ("train grpo", {"experiments": {"grpo": {"reward": "rm"}}}),
        ("train grpo", {"data": {"slices": {"gsm8k_train": {"max_prompt_tokens": 4000}}}}),
        ("generate ifeval", {"eval": {"batch_size": 256}}),
        ("generate gsm8k", {"eval": {"gsm8k": {"max_new_tokens": 4096}}}),
        ("eval_rm rm", {"methods": {"rm": {"train": {"per_device_eval_batch_size": 64}}}}),
    ],
)
def test_what_asks_for_more_memory_is_estimated_higher(phase, overlay):
    assert peaks(memory(overlay))[phase] > 1.05 * peaks(memory())[phase]


def test_every_shipped_config_has_a_line_for_each_phase():
    for files in (["config/config.yaml"], ["config/smollm2.yaml"], STUDY, LARGE):
        made = memory(files=files)
        trained = {f"train {name}" for name in made.config.experiments}
        tasks = made.config.evaluations
        asked = {f"{'choose' if task in CHOICE else 'generate'} {task}" for task in tasks}
        assert set(peaks(made)) == trained | {"eval_rm rm"} | asked and len(tasks) > 1
        assert all(0 < peak < 40 * GIB for peak in peaks(made).values())


def test_a_model_folder_says_its_own_shape(tmp_path):
    from tests.support import small_steps

    folder = small_steps.write_base(tmp_path / "base").parent
    data = merge(load(ROOT / STUDY[0]).data, {})
    data["base"] = {"source": "path", "path": str(folder), "dtype": "bf16"}
    found = gpu_memory.shape_of(Config(data))
    manifest = json.loads((folder / "config.json").read_text())
    assert found.tied and found.layers == manifest["num_hidden_layers"] and found.query == found.hidden == 32 and found.key == 16
    assert found.parameters > found.linear + found.embedding


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_key_value_heads": None}, "base.shape: num_key_value_heads: missing, .*config.json"),
        (
            {"tie_word_embeddings": False},
            r"base.shape: parameters: found 494,032,768, but .* have 630,.*tie_word_embeddings right",
        ),
        ({"parameters": 494032768 * 2}, "base.shape: parameters: found 988,065,536, but"),
    ],
)
def test_a_shape_that_is_incomplete_or_does_not_add_up_is_refused(shape, message):
    data = load(ROOT / STUDY[0]).data
    data["base"]["shape"] = {key: value for key, value in (data["base"]["shape"] | shape).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Memory(Config(data))


# -- the tool --------------------------------------------------------------------------------------------------------


def tool(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "workflow_scripts.tools.fits", *args], cwd=ROOT, capture_output=True, text=True)


def test_the_study_fits_on_16_gb_and_a_7b_base_does_not_everywhere():
    done = tool("--configfile", *STUDY, "--gpu", "16")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^train sft_v2 +1\.\d +step +yes$", done.stdout, flags=re.M)
    assert re.search(r"^disk: \d+\.\d GB \(merged ", done.stdout, flags=re.M)
    done = tool("--configfile", *LARGE, "--gpu", "16")
    assert done.returncode == 1 and "train dpo_4bit" in done.stdout
    assert re.search(r"^16 GB: train dpo, .*: quantise: nf4; then \d\.\d GiB$", done.stdout, flags=re.M)
    assert re.search(
        r"^16 GB: generate ifeval, generate gsm8k, .*: merge in fp32: no key makes it fit; it needs 40 GB$",
        done.stdout,
        flags=re.M,
    )


def test_json_is_the_same_and_a_card_of_nothing_is_refused():
    found = json.loads(tool("--configfile", *STUDY, "--json").stdout)
    sft = next(one for one in found["phases"] if one["phase"] == "train sft_v2")
    assert sft["trainable"] == 8_798_208 and sft["fits"] == [16, 24, 40, 80, 141] and sft["peak"] == max(sft["stages"].values())
    assert tool("--gpu", "0").returncode == 2


BATCH = {"per_device_train_batch_size": 64, "gradient_checkpointing": False, "gradient_accumulation_steps": 1}
WIDE = {"methods": {name: {"train": BATCH} for name in ("sft", "dpo", "kto", "rm")}}


def test_advice_makes_it_fit_and_keeps_the_effective_batch():
    made = memory(WIDE)
    for name in ("sft_v2", "dpo", "rm"):
        body = made.config.experiments[name]
        before = made.train(name, body)
        changes, peak = fits.remedy(made, before, 16)
        assert not gpu_memory.fits(before.peak, 16) and gpu_memory.fits(peak, 16)
        after = memory(
            WIDE, {"experiments": {name: {"train": {key.removeprefix("train."): value for key, value in changes.items()}}}}
        )
        train = after.config.experiments[name]["train"]
        assert peaks(after)[f"train {name}"] == peak
        assert (
            train["gradient_checkpointing"] and train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 64
        )


def test_advice_leaves_ktos_micro_batch_alone():
    made = memory(WIDE, {"methods": {"kto": {"train": {"per_device_train_batch_size": 512}}}})
    kto = made.train("kto", made.config.experiments["kto"])
    assert fits.remedy(made, kto, 16) is None
    (line,) = fits.advice(made, [kto], 16)
    assert line.startswith("train kto: step: no key makes it fit; it needs ")


def test_advice_on_rollouts_draws_groups_in_turn_and_then_shortens_prompts():
    made = memory(files=LARGE)
    phases = {f"{phase.kind} {phase.name}": phase for phase in made.phases()}
    changes, _ = fits.remedy(made, phases["train grpo"], 16)
    assert changes == {"train.steps_per_generation": 4}
    changes, _ = fits.remedy(made, phases["train ppo"], 24)
    assert list(changes) == ["data.slices.prompts.max_prompt_tokens"]


def test_disk_counts_every_seed():
    def total(seeds):
        plan = Plan(Config(merge(load(ROOT / STUDY[0]).data, {"seeds": seeds})))
        return fits.disk(plan, Memory(plan.config))

    one, three = total([1]), total([1, 2, 3])
    assert one["merged"] == pytest.approx(2 * 494_032_768 / 1e9) and three["merged"] == pytest.approx(3 * one["merged"])
    assert three["adapters"] == pytest.approx(3 * 12 * 4 * 8_798_208 / 1e9) and one["base"] == three["base"]
