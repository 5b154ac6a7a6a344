"""What a run can be judged as: by `eval.base`, and by the endings `_merged`, `_nf4` and `_full`."""

import pytest

from tests.conftest import ROOT
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import graph

DEFAULT = ROOT / "config/config.yaml"


def plan(tmp_path, text="{}\n"):
    (tmp_path / "over.yaml").write_text(text)
    return Plan(configs.load(DEFAULT, tmp_path / "over.yaml"))


def test_by_default_all_are_judged_in_full_precision_and_in_4_bit_by_name(tmp_path):
    made = plan(tmp_path)
    quant = made.config.data["quant"]
    for run in ("base", "dpo", "kto", "kto.seed2", "sft_v2_merged"):
        assert "quant" not in made.step("generate_ifeval", run)["config"], run
    for run in ("base_nf4", "dpo_nf4", "kto_nf4.seed2"):
        assert made.step("generate_ifeval", run)["config"]["quant"] == quant, run
    assert made.step("generate_ifeval", "kto_nf4")["parents"] == made.step("generate_ifeval", "kto")["parents"]


def test_trained_is_the_base_that_each_trained_on(tmp_path):
    made = plan(tmp_path, "eval: {base: trained}\n")
    in_4_bit = {
        run: "quant" in made.step("generate_ifeval", run)["config"] for run in ("base", "dpo", "dpo_4bit", "kto", "kto_full")
    }
    assert in_4_bit == {"base": False, "dpo": False, "dpo_4bit": True, "kto": True, "kto_full": False}
    assert {"kto_full", "dpo_nf4", "base_nf4", "sft_v2_merged"} <= set(made.config.judged)
    assert not {"kto_nf4", "dpo_full", "base_full", "base_merged", "rm_merged", "rm_nf4"} & set(made.config.judged)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dpo_full", "dpo_full: that is dpo itself, by eval.base: full; one run has one name"),
        ("rm_merged", "rm_merged: rm is not trained to answer, so there is nothing to merge"),
        ("base_merged", "base_merged: base is not trained to answer"),
        ("nothing_nf4", "nothing: no experiment of this config"),
    ],
)
def test_what_is_no_view_is_refused_by_name(tmp_path, name, says):
    with pytest.raises(InputError, match=f"^{says}"):
        plan(tmp_path).config.view(name)


def test_no_experiment_is_called_like_a_view_of_another(tmp_path):
    with pytest.raises(InputError, match="experiments.dpo_nf4: the endings merged, nf4, full say how a run is judged"):
        plan(tmp_path, "experiments: {dpo_nf4: {extends: dpo, quantise: nf4}}\n")
    assert "sums_nf4" in plan(tmp_path, "experiments: {sums_nf4: {extends: dpo}}\n").config.experiments  # of nothing


def test_the_merged_model_is_judged_as_a_model_and_is_the_reference_of_what_starts_from_it(tmp_path):
    made = plan(tmp_path)
    assert made.step("generate_ifeval", "sft_v2_merged.seed2")["parents"].keys() == {"prompts", "start"}
    assert made.step("generate_ifeval", "sft_v2_merged")["parents"]["start"] == made.fingerprint("merge", "sft_v2")
    assert made.judged_inputs("sft_v2_merged")[0] == "results/sft_v2/merged/manifest.json"
    assert "results/ifeval_sft_v2_merged.json" in made.report_inputs()
    assert made.config.data["report"]["families"]["primary"]["reference"] == "sft_v2_merged"
    for name in ("sft_v2_merged", "kto_nf4.seed3", "base_nf4"):
        phase = graph.Phase("generate_ifeval", name)
        wanted = {role: made.fingerprint(*parent) for role, parent in graph.parents(made, phase).items()}
        assert wanted == made.step(*phase)["parents"]
        assert graph.phases_by_file(made, [f"results/ifeval_{name}.json"])[f"results/{name}/ifeval_responses.jsonl"] == phase


def test_how_answers_are_decoded_stands_in_their_step(tmp_path):
    one, other = (plan(tmp_path, f"eval: {{decoding: {how}}}\n").step("generate_ifeval", "dpo") for how in ("greedy", "folder"))
    assert one["config"]["decoding"] == "greedy" and other["config"] == one["config"] | {
        "decoding": "folder",
        "generation": {"backend": "hf", "batch_size": 100},  # penalties are transformers' own
    }
    with pytest.raises(InputError, match="eval.decoding: found 'sampled'|eval.decoding: found the string 'sampled'"):
        plan(tmp_path, "eval: {decoding: sampled}\n")


@pytest.mark.parametrize(("overlay", "how"), [("matched_full", "none"), ("matched_nf4", "nf4")])
@pytest.mark.parametrize("under", ["smollm2", "qwen05b"])
def test_the_matched_configs_train_and_judge_every_method_on_one_base(overlay, how, under):
    made = configs.load(*(ROOT / f"config/{name}.yaml" for name in (under, overlay)))
    bodies = {name: body for name, body in made.experiments.items() if name != "dpo_4bit"}
    assert {body["quantise"] for body in bodies.values()} == {how} and {"dpo", "kto", "grpo_rm"} <= set(bodies)
    judged = {name: made.judged_in_4bit(name) for name, body in bodies.items() if body["method"] != "rm"}
    assert set(judged.values()) == {how == "nf4"}
    assert made.data["pathvars"]["results"] == f"results/{overlay}"
