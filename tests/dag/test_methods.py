"""Every method through Snakemake: its artifact, its results, and what it was made from."""

import json

import pytest

from tests.conftest import MICRO, WORLD, Clone
from tests.support import gains


def check_methods(clone: Clone, names: tuple[str, ...]) -> None:
    """AssertionError unless these were trained from sft_v2, with objectives before and after, and the reward model was judged."""
    read = {name: json.loads((clone.folder / f"results/{name}/adapter/manifest.json").read_text()) for name in names}
    start = json.loads((clone.folder / "results/sft_v2/merged/manifest.json").read_text())["fingerprint"]
    for name, manifest in read.items():
        assert manifest["step"]["parents"]["start"] == start
        assert set(manifest["objective"]["before"]) == set(manifest["objective"]["after"]), name
        assert set(manifest["objective"]["change"]) == set(manifest["objective"]["after"]) - {"n"}, name
    report = json.loads((clone.folder / "results/rm/rm_eval.json").read_text())
    assert report["accuracy"] == pytest.approx(read["rm"]["objective"]["after"]["accuracy"], abs=1e-6)


METHODS = ("rm", "grpo_numeric", *gains.METHODS)


@pytest.mark.timeout(3600)
def test_each_method_makes_its_artifact_and_its_results(world):
    check_methods(world, ("rm", "grpo_numeric", *gains.MOST))
    assert json.loads((world.folder / "results/gsm8k_grpo_numeric.json").read_text())["n_prompts"] == 200
    assert world.plan(*gains.targets(gains.MOST, 1), configs=WORLD) == {}


@pytest.mark.long
def test_each_method_in_the_micro_world_and_a_reward_model_that_learned_nothing(clone):
    configs = clone.overlay(
        "experiments: {grpo: {reward: {rm: 0.5, ifeval: 0.5}, require_reward_above_chance: false}}"  # it learns nothing here
    )
    targets = [f"results/{task}_{name}.json" for name in METHODS if name != "rm" for task in ("ifeval", "gsm8k")]
    clone.snakemake("results/rm/rm_eval.json", *targets, configs=configs)
    check_methods(clone, METHODS)
    assert json.loads((clone.folder / "results/gsm8k_kto.json").read_text())["n_prompts"] == 20
    assert clone.plan(*targets, "results/rm/rm_eval.json", configs=configs) == {}
    weak = clone.snakemake("results/ifeval_grpo.json", configs=clone.overlay("experiments: {grpo: {reward: rm}}"), check=False)
    assert weak.returncode == 1 and "not above chance" in weak.stderr


@pytest.mark.long
def test_losses_on_pairs_in_the_micro_world_and_a_control_with_flipped_labels(clone):
    configs = [*MICRO, "config/reference_free.yaml"]
    names = ("simpo", "cpo", "orpo", "simpo_flipped", "dpo_mpo")
    targets = [f"results/ifeval_{name}.json" for name in names]
    clone.snakemake(*targets, configs=configs)
    read = {name: json.loads((clone.folder / f"results/{name}/adapter/manifest.json").read_text()) for name in names}
    assert len({manifest["step"]["parents"]["rows"] for manifest in read.values()}) == 1  # the same pairs
    assert len({manifest["rows"]["ids_sha256"] for manifest in read.values()}) == 1
    assert read["simpo"]["objective"]["before"] == read["simpo_flipped"]["objective"]["before"]  # held-out labels stay right
    assert read["simpo"]["objective"]["after"] != read["simpo_flipped"]["objective"]["after"]
    assert all((clone.folder / target).exists() for target in targets) and clone.plan(*targets, configs=configs) == {}
