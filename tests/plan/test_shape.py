"""Weights and adapters are counted as peft and bitsandbytes make them, and a shape that does not add up is refused."""

import json

import pytest

from tests.support.shapes import LARGE, ROOT, SEVEN, STUDY, R, build, memory, small_shape
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.plan import shape
from workflow_scripts.plan.gpu_memory import Memory
from workflow_scripts.plumbing.messages import InputError


def test_the_adapter_of_the_study_has_the_parameters_that_its_manifest_says():
    assert memory().adapter == 8_798_208
    assert memory(files=LARGE).adapter == 8 * 28 * (2 * (3584 + 512) + 2 * 2 * 3584 + 3 * (3584 + 18944)) == 20_185_088


@pytest.mark.parametrize("targets", [SEVEN, ("q_proj", "v_proj")], ids=["seven", "two"])
def test_adapters_are_counted_as_peft_makes_them(tmp_path, targets):
    model = build(tmp_path, 3, False, 0.0, targets)
    real = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert shape.lora_parameters(small_shape(3), {"r": R, "target_modules": list(targets)}) == real


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
    estimated = shape.weights(small_shape(2), 2, nf4=True, double=True)
    assert estimated == pytest.approx(real, rel=0.005)


def test_a_model_folder_says_its_own_shape(tmp_path):
    from tests.support import small_steps

    folder = small_steps.write_base(tmp_path / "base").parent
    data = merge(load(ROOT / STUDY[0]).data, {})
    data["base"] = {"source": "path", "path": str(folder), "dtype": "bf16"}
    found = shape.shape_of(Config(data))
    manifest = json.loads((folder / "config.json").read_text())
    assert found.tied and found.layers == manifest["num_hidden_layers"] and found.query == found.hidden == 32 and found.key == 16
    assert found.parameters > found.linear + found.embedding


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_key_value_heads": None}, "base.shape: num_key_value_heads: missing, .*config.json"),
        (
            {"tie_word_embeddings": False},
            r"base.shape: parameters: found 494,032,768, but .* have 630,.*tie_word_embeddings right",
        ),
        ({"parameters": 494032768 * 2}, "base.shape: parameters: found 988,065,536, but"),
    ],
)
def test_a_shape_that_is_incomplete_or_does_not_add_up_is_refused(given, message):
    data = load(ROOT / STUDY[0]).data
    data["base"]["shape"] = {key: value for key, value in (data["base"]["shape"] | given).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Memory(Config(data))
