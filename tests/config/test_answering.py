"""Who answers, and what of it stands in a step: what can not be done is refused, and what is not asked for is not there."""

import pytest
import yaml

from tests.conftest import ROOT
from workflow_scripts.artifacts import fingerprint, runinfo
from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan.estimate import Estimates
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.gpus import WHOLE
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools.differences import place

SERVED = "device: cuda\neval: {precision: bf16}\ngeneration: {backend: vllm}\n"


def plan(*overlays: str) -> Plan:
    data = read_yaml(ROOT / "config/config.yaml")
    for overlay in overlays:
        data = merge(data, yaml.safe_load(overlay))
    made = Plan(Config(data))
    made.check()
    return made


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        (
            "generation: {rollouts: vllm}",
            r"generation.rollouts: found vllm, which answers evaluations alone: .*; set graphs, or hf",
        ),
        ("device: cpu", "generation.backend: found vllm with device: cpu; it needs device: cuda"),
        ("eval: {precision: fp32}", "generation.backend: found vllm with eval.precision: fp32"),
        ("generation: {adapter: fp32}", "generation.adapter: found fp32; vLLM rounds an adapter"),
        ("eval: {base: trained}", "generation.backend: found vllm, but dpo_4bit is judged on its base in 4-bit"),
        ("eval: {shards: 4}", "eval.shards: found 4, but there are 1 chunks at most; lower it, or generation.chunk"),
        ("generation: {correct: truncated, rollouts: hf}", "generation.correct: found truncated with rollouts: hf"),
        (
            "generation: {correct: truncated}\nmethods: {rloo: {train: {top_p: 0.9}}}",
            "generation.correct: found truncated, but rloo draws with top_k: 0, top_p: 0.9",
        ),
        ("generation: {cap: 0.5}", "generation.cap: found 0.5"),
    ],
)
def test_what_it_can_not_do_is_refused_with_the_key(overlay, said):
    with pytest.raises(InputError, match=said):
        plan(SERVED, overlay)


def test_a_view_on_a_base_in_4_bit_is_refused_where_it_is_asked_for():
    made = plan(SERVED)
    with pytest.raises(InputError, match="found vllm, but kto_nf4 is judged on its base in 4-bit"):
        made.step("generate_ifeval", "kto_nf4")


def test_its_chunk_and_the_versions_of_its_own_environment_stand_in_the_step():
    before, made = plan("device: cuda\neval: {precision: bf16}"), plan(SERVED, "generation: {chunk: 40}\neval: {shards: 2}")
    old, new = (one.step("generate_ifeval", "dpo") for one in (before, made))
    assert new["config"] == old["config"] | {"generation": {"backend": "vllm", "batch_size": 40}}
    assert new["packages"] == fingerprint.of_vllm(old["packages"]) and new["packages"]["torch"] != old["packages"]["torch"]
    assert {key: new[key] for key in new if key not in ("config", "packages")} == {
        key: old[key] for key in old if key not in ("config", "packages")
    }
    assert made.step("score_ifeval", "dpo")["packages"] == before.step("score_ifeval", "dpo")["packages"]
    assert made.step("train", "grpo") == before.step("train", "grpo")
    assert place(made.config, "generate_ifeval", "dpo", ["generation", "batch_size"]) == "generation.chunk"
    assert place(before.config, "generate_ifeval", "dpo", ["generation", "batch_size"]) == "eval.batch_size"


def test_settings_of_the_folder_are_answered_by_transformers_all_the_same():
    made = plan(SERVED, "eval: {decoding: folder}")
    assert made.step("generate_ifeval", "dpo")["config"]["generation"]["backend"] == "hf"
    assert "vllm" not in made.step("generate_ifeval", "dpo")["packages"]


def test_it_asks_for_a_card_of_its_own_and_the_others_do_not():
    served, own = (Estimates(plan(*overlays)) for overlays in ((SERVED,), ("device: cuda\neval: {precision: bf16}",)))
    assert served.gpu_mb("generate_ifeval", "dpo") == WHOLE > own.gpu_mb("generate_ifeval", "dpo")
    assert served.gpu_mb("train", "dpo") == own.gpu_mb("train", "dpo")


def test_the_weights_of_rollouts_stand_in_the_steps_that_weigh_and_in_no_other():
    plain, made, other = plan(), plan("generation: {correct: truncated}"), plan("generation: {correct: truncated, cap: 2.0}")
    for run in ("grpo", "rloo"):
        step = plain.step("train", run)
        assert "correction" not in step["config"]
        assert made.step("train", run)["config"] == step["config"] | {"correction": 3}
        assert other.step("train", run)["config"] == step["config"] | {"correction": 2}
    for run in ("ppo", "dpo", "sft_v2"):
        assert made.step("train", run) == plain.step("train", run)
    assert place(made.config, "train", "grpo", ["correction"]) == "generation.cap"


def test_a_job_that_finds_another_environment_says_which_one_it_needs():
    step = plan(SERVED).step("generate_ifeval", "dpo")
    with pytest.raises(InputError, match=r"the lock file says .*: run snakemake with `--sdm conda` \(envs/vllm.yaml\), or set"):
        runinfo.check_packages(step)
