"""A model from elsewhere becomes a base: as it is stored, whole, and able to answer; else one line before anything is trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import chat, loading, sources
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import make_base

WEIGHTS, HEAD = "model.safetensors", "model.embed_tokens.weight"  # input and output embeddings are one
INNER = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path) -> Path:
    small_steps.copy_tiny_base(tmp_path / "model").unlink()
    return tmp_path / "model"


def write(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def change(model: Path, name: str, value) -> None:
    """Another tensor of this name; `value` makes it of the old one."""
    weights = load_file(model / WEIGHTS)
    weights[name] = value(weights.get(name))
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})


def row(number: int, value: float):
    def changed(weight):
        weight[number] = value
        return weight

    return changed


def imported(model: Path, dtype: str = "fp32") -> manifests.Artifact:
    config = {"source": "path", "path": model.name, "dtype": dtype}
    out = model.parent / "base/manifest.json"
    job = small_steps.job("make_base", out, {}, config)
    job.inputs, job.step["external"] = [model], {"content": sources.content_sha256(sources.folder_hashes(model))}
    make_base.main(job)
    return manifests.read(out)


def refused(model: Path, dtype: str = "fp32") -> str:
    with pytest.raises(InputError) as caught:
        imported(model, dtype)
    assert not (model.parent / "base/manifest.json").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_are_not_rounded_to_a_coarser_dtype_that_the_config_names(model):
    """transformers' dtype="auto" asks config.json before the weights (huggingface/transformers pull 34919)."""
    write(model / "config.json", dtype="bfloat16")
    base = imported(model)
    stored, made = load_file(model / WEIGHTS), load_file(base.folder / WEIGHTS)
    assert stored.keys() == made.keys() and all(torch.equal(stored[name], made[name]) for name in stored)
    assert json.loads((base.folder / "config.json").read_text())["dtype"] == "float32"


def test_weights_that_the_config_has_no_place_for_are_not_left_out_in_silence(model):
    """huggingface/transformers #39719."""
    write(model / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    assert "no place for: model.layers.2.input_layernorm.weight, " in (said := refused(model)) and "(24 tensors)" in said


def test_a_folder_with_an_adapter_in_it_is_refused_when_the_plan_is_made(model):
    """transformers loads the base that it names, and save_pretrained writes the adapter alone (huggingface/peft #1381)."""
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    for name in ("model.safetensors", "config.json"):  # and where the adapter is all there is
        with pytest.raises(InputError, match=r"has an adapter \(adapter_config.json\), expected a whole model.*merge_and_unload"):
            sources.folder_hashes(model)
        (model / name).unlink()


@pytest.mark.parametrize(
    ("dtype", "value", "says"),
    [
        ("fp32", float("nan"), "no finite numbers in float32; fetch it again"),
        ("fp16", 1e6, "no finite numbers in float16; numbers above 65504 are none in fp16: set `dtype: bf16` or fp32"),
    ],
)
def test_weights_that_are_no_numbers_in_the_declared_dtype_are_named(model, dtype, value, says):
    """Such a base answers with nothing, and is scored for it (hiyouga/LlamaFactory #1618)."""
    change(model, INNER, row(3, value))
    assert f"{INNER} holds values that are {says}" in refused(model, dtype)


def test_a_model_that_cannot_write_the_end_of_a_turn_is_refused(model):
    """A base model whose tokens for turns were never trained: no adapter on linear layers teaches it to stop
    (meta-pytorch/torchtune #2429, hiyouga/LlamaFactory #7943)."""
    change(model, HEAD, row(2, 1e-20))
    said = refused(model)
    assert "the end of a turn, '<|im_end|>' (token 2), was never trained" in said and "base.end_of_turn" in said


@pytest.mark.parametrize(
    "settings",
    [
        {"stop_strings": ["."]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True},
        {"max_time": 0.0001},
    ],
    ids=lambda value: next(iter(value)),
)
def test_settings_of_decoding_that_no_answer_can_follow_do_not_act_in_greedy_answers(model, settings):
    """huggingface/transformers #34571: stop_strings in generation_config.json ended the first evaluation; max_time let the clock
    decide where an answer ends."""
    write(model / "generation_config.json", **settings)
    made = imported(model)
    loaded, tokenizer = loading.load(made, model, "cpu", "fp32").eval(), chat.tokenizer_of(made)
    chat.decode_as_declared(loaded, tokenizer, "greedy")
    asked = torch.tensor([[2, 5, 6]] * 2)
    found = loaded.generate(input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=4, eos_token_id=[])
    assert found.shape == (2, 7)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6, "top_p": 0.9}, {"max_length": 20}, {"num_beams": 4, "length_penalty": 0.5}]
)
def test_settings_that_greedy_answers_pass_over_are_no_mistake(model, settings):
    """huggingface/transformers #29988: a temperature without do_sample could not be saved."""
    write(model / "generation_config.json", do_sample=False, **settings)
    assert imported(model).data["end_of_turn"] == "<|im_end|>"
