"""Trained adapters and the merge: what moves, what is reproducible, who can load it, and which base is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support import small_steps
from tests.support.processors import SEED
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import file_sha256
from workflow_scripts.models import loading, lora
from workflow_scripts.plumbing.messages import InputError

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def other_base(folder):
    return small_steps.write_base(folder / "other", seed=SEED + 1)


@pytest.fixture(scope="module")
def sft(folder, base, slices):
    return small_steps.train(folder / "sft", "sft_v2", base, slices["sft"], num_train_epochs=4, learning_rate=0.02)


@pytest.fixture(scope="module")
def merged(folder, base, sft):
    return small_steps.merge(folder / "sft", base, sft.path)


@pytest.fixture(scope="module")
def dpo(folder, merged, slices):
    return small_steps.train(folder / "dpo", "dpo", merged.path, slices["dpo"])


def weights(artifact):
    from safetensors.torch import load_file

    return load_file(artifact.folder / ADAPTER)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 43).reshape(2, 20)).logits.float()


# -- trained adapters -------------------------------------------------------------------------------------------------


def test_every_matrix_of_the_adapter_moves_in_each_method(sft, dpo):
    for artifact in (sft, dpo):
        assert artifact.data["adapter_moved"] == 1.0
        found = weights(artifact)
        assert len(found) == 2 * 7 * 2
        assert all(p.dtype == torch.float32 and (p != 0).any() for p in found.values())


def test_a_part_of_the_adapter_that_does_not_train_is_noticed(base, slices, tmp_path, monkeypatch):
    right = lora.settle

    def freeze_a_layer(trainer, seed):
        right(trainer, seed)
        for name, p in trainer.model.named_parameters():
            if ".layers.0." in name and "lora_" in name:
                p.register_hook(torch.zeros_like)  # still trainable, but no gradient arrives

    monkeypatch.setattr(lora, "settle", freeze_a_layer)
    made = small_steps.train(tmp_path / "run", "sft_v2", base, slices["sft"])
    assert made.data["adapter_moved"] == 0.5


LOAD = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
import torch
torch.set_num_threads(1)
sums = []
for manifest in sys.argv[1:]:
    base = json.load(open(manifest))["base"]["path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), manifest.rpartition("/")[0])
    sums.append(model(torch.arange(3, 23).reshape(1, 20)).logits.abs().sum().item())
assert not {"trl", "workflow_scripts"} & set(sys.modules)
print(json.dumps(sums))
"""


def test_plain_peft_loads_the_adapters_on_the_base_that_their_manifest_names(base, merged, sft, dpo, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(sft.path), str(dpo.path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    sums = json.loads(done.stdout.splitlines()[-1])
    for start, adapter, found in ((manifests.read(base), sft, sums[0]), (merged, dpo, sums[1])):
        assert json.loads((adapter.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start.folder)
        bare = loading.load(start, tmp_path, "cpu", "fp32")
        without = logits(bare)[:1].abs().sum().item()
        assert found == pytest.approx(logits(lora.attach(bare, start, adapter))[:1].abs().sum().item(), rel=1e-6)
        assert found != pytest.approx(without, rel=1e-6)


# -- the merge --------------------------------------------------------------------------------------------------------


@pytest.mark.trained
def test_the_merged_model_is_base_and_adapter_in_fp32(base, sft, merged, tmp_path, figure):
    start = manifests.read(base)
    bare = loading.load(start, tmp_path, "cpu", "fp32")
    name = "model.layers.1.mlp.down_proj"
    before = bare.get_submodule(name).weight.detach().clone()
    plain = logits(bare)
    apart = logits(lora.attach(bare, start, sft))
    fused = loading.load(merged, tmp_path, "cpu", "fp32")
    figure("logits: merged less base and adapter", (logits(fused) - apart).abs().max().item(), at_most=1e-5)
    figure("logits: what the adapter does", (apart - plain).abs().max().item(), at_least=1e-2)
    a, b = (weights(sft)[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert torch.allclose(fused.get_submodule(name).weight, before + 32 / 16 * b @ a, atol=1e-7)


@pytest.mark.trained
def test_the_manifest_says_how_far_the_merge_is_from_what_was_trained(merged, figure):
    exact, trained = (merged.data[f"logits_from_{kind}_base_and_adapter"] for kind in ("full_precision", "nf4"))
    figure("in full precision", exact["max_abs"], at_most=1e-5)
    figure("in NF4, the mean", trained["mean_abs"], at_least=1e-3)
    assert exact["same_next_token"] == 1.0 and trained["max_abs"] >= trained["mean_abs"]
    assert 0 <= trained["same_next_token"] <= 1
    assert merged.data["trained_quantised"] == "nf4"


def test_an_adapter_on_another_base_is_refused_by_name(other_base, base, sft, folder, tmp_path):
    both = f"trained on {base.parent} .*not on {other_base.parent} "
    start = manifests.read(other_base)
    model = loading.load(start, tmp_path, "cpu", "fp32")
    with pytest.raises(InputError, match=both):
        lora.attach(model, start, sft)
    with pytest.raises(InputError, match=both):
        small_steps.merge(tmp_path / "run", other_base, sft.path)
    prompts = small_steps.write_slice(tmp_path, "ifeval", small_steps.world.eval_rows(2, 1), heldout=0)
    parents = {"start": other_base, "adapter": sft.path, "prompts": prompts}
    config = small_steps.answering(4)
    with pytest.raises(InputError, match=both):
        small_steps.run(small_steps.job("generate", tmp_path / "x" / "ifeval_responses.manifest.json", parents, config))


@pytest.fixture
def copy(base, sft, merged, tmp_path):
    """A merge without its weights, in copies of its parents that a test may spoil."""
    for part, artifact in (("base", manifests.read(base)), ("adapter", sft), ("merged", merged)):
        shutil.copytree(artifact.folder, tmp_path / part, ignore=shutil.ignore_patterns(".work"))
    data = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    for role, part in (("start", "base"), ("adapter", "adapter")):
        data["parents"][role]["path"] = str(tmp_path / part / "manifest.json")
    (tmp_path / "merged" / "manifest.json").write_text(json.dumps(data))
    (tmp_path / "merged" / manifests.WEIGHTS).unlink()
    return tmp_path


def test_deleted_weights_of_a_merge_are_rebuilt_to_the_byte(copy, merged):
    (copy / "merged" / "tokenizer.json").unlink()
    again = manifests.read(copy / "merged" / "manifest.json")
    loading.load(again, copy, "cpu", "fp32")
    assert file_sha256(copy / "merged" / manifests.WEIGHTS) == merged.weights_sha256
    assert file_sha256(copy / "merged" / "tokenizer.json") == merged.data["files"]["tokenizer.json"]
    assert not list((copy / "merged").glob(".rebuild*"))


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoilt", ["base/model.safetensors", f"adapter/{ADAPTER}", "adapter/adapter_config.json"])
def test_a_merge_is_not_rebuilt_from_files_that_were_altered(copy, spoilt):
    path = copy / spoilt
    if path.suffix == ".json":
        path.write_text(path.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))
    else:
        spoil(path)
    with pytest.raises(InputError, match=f"{path}: altered since it was made"):
        loading.load(manifests.read(copy / "merged" / "manifest.json"), copy, "cpu", "fp32")
    assert not (copy / "merged" / manifests.WEIGHTS).exists()


def test_a_merge_is_not_rebuilt_from_another_adapter(copy, base, slices):
    shutil.rmtree(copy / "adapter")
    small_steps.train(copy, "sft_v2", base, slices["sft"], seed=3)
    with pytest.raises(InputError, match="but with another content than"):
        loading.load(manifests.read(copy / "merged" / "manifest.json"), copy, "cpu", "fp32")
    assert not (copy / "merged" / manifests.WEIGHTS).exists()


def test_a_merge_whose_weights_were_altered_is_refused(merged, tmp_path):
    shutil.copytree(merged.folder, tmp_path / "merged")
    spoil(tmp_path / "merged" / manifests.WEIGHTS)
    with pytest.raises(InputError, match="model.safetensors: altered since it was made"):
        loading.load(manifests.read(tmp_path / "merged" / "manifest.json"), tmp_path, "cpu", "fp32")
