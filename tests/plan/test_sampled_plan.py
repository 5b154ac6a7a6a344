"""Sampled slices in the plan: their seeds, what an edit makes stale, where they lie, what `explain` and `fits` say of them."""

import json

import pytest
import yaml

from tests.conftest import ROOT
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan import estimate, records
from workflow_scripts.plan.gpu_memory import Memory, need
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import adopt, differences, fits, graph
from workflow_scripts.tools.graph import Phase

FILES = [ROOT / "config/config.yaml", ROOT / "config/self_made.yaml"]
OWN = "def brief(completions, **columns):\n    return [-float(len(turns[-1]['content'])) for turns in completions]\n"
MADE = """
data: {slices: {best_of_8: {source: {sampled: {reward: {brief: 0.5, rm: 0.5}, require_reward_above_chance: true}}}}}
"""


@pytest.fixture
def config(tmp_path) -> dict:
    """The default config with the overlay; what is best is said by a reward of the user's own and by a reward model."""
    (tmp_path / "own.py").write_text(OWN)
    user = merge(read_yaml(FILES[0]), read_yaml(FILES[1]))
    user = merge(user, yaml.safe_load(MADE))
    return merge(user, {"rewards": {"brief": {"file": str(tmp_path / "own.py"), "function": "brief"}}, "seeds": [1, 2]})


def marks(user: dict) -> dict[Phase, str]:
    plan = Plan(Config(user))
    runs = [
        "sft_v1",
        "sft_v2",
        "sft_v2.seed2",
        "dpo",
        "rm",
        "rft",
        "rft.seed2",
        "dpo_onpolicy",
        "dpo_onpolicy_round2",
        "kto_onpolicy",
    ]
    found = [Phase("train", run) for run in runs] + [Phase("slice", name) for name in ("instructions", "pairs")]
    found += [Phase(kind, name) for name in plan.sampled_slices([1, 2]) for kind in ("slice", "samples")]
    answers_of = ("pairs_of_8", "labels_of_8")  # have no answers of their own
    return {one: plan.fingerprint(*one) for one in found if one.kind != "samples" or not one.name.startswith(answers_of)}


def stale(user: dict, edit: dict) -> set[str]:
    before, after = marks(user), marks(merge(user, edit))
    return {f"{kind} {name}" for (kind, name), mark in after.items() if before.get(Phase(kind, name), mark) != mark}


def sampled(**keys) -> dict:
    return {"data": {"slices": {"best_of_8": {"source": {"sampled": keys}}}}}


RFT = {"slice best_of_8", "slice best_of_8.seed2", "train rft", "train rft.seed2"}
OTHERS = {f"slice {name}{seed}" for name in ("pairs_of_8", "labels_of_8", "dpo_onpolicy_round2") for seed in ("", ".seed2")}
OTHERS |= {"train dpo_onpolicy", "train dpo_onpolicy_round2", "train kto_onpolicy"}
ROUND2 = {f"samples dpo_onpolicy_round2{seed}" for seed in ("", ".seed2")}
ANSWERS = {"samples best_of_8", "samples best_of_8.seed2"}


@pytest.mark.parametrize(
    "edit, expected",
    [
        (sampled(keep="all_right", least=1.0), RFT),
        (sampled(least=0.25), RFT),
        (sampled(reward={"brief": 0.25, "rm": 0.75}), RFT),
        (sampled(flip_labels=True), RFT),
        (sampled(temperature=0.7), ANSWERS | RFT | OTHERS | ROUND2),
        (sampled(top_p=0.9), ANSWERS | RFT | OTHERS | ROUND2),
        ({"experiments": {"more": {"extends": "rft", "train": {"learning_rate": 0.5}}}}, set()),
        ({"experiments": {"dpo_onpolicy": {"rounds": 3}}}, set()),
        ({"data": {"slices": {"more": {"kind": "sft", "rows": 800, "seed": 1, "heldout": 9, "source": {"sampled": {
            "answers_of": "best_of_8", "reward": "ifeval", "keep": "best"}}}}}}, set()),
        ({"methods": {"rm": {"train": {"learning_rate": 0.5}}}}, RFT | {"train rm"}),
    ],
)  # fmt: skip
def test_an_edit_makes_stale_what_it_decides(config, edit, expected):
    assert stale(config, edit) == expected


def test_a_line_of_the_reward_file_is_the_choice_and_what_follows_and_a_comment_is_nothing(config, tmp_path):
    before = marks(config)
    (tmp_path / "own.py").write_text("# a comment\n" + OWN)
    assert marks(config) == before
    (tmp_path / "own.py").write_text(OWN.replace("float(", "0.5 + float("))
    after = marks(config)
    assert {f"{kind} {name}" for (kind, name), mark in after.items() if before[Phase(kind, name)] != mark} == RFT


def test_a_slice_belongs_to_the_chain_of_its_seed(config):
    plan = Plan(Config(config))
    assert (
        plan.slice_of("rft.seed2") == "best_of_8.seed2"
        and plan.slice_of("rft") == "best_of_8"
        and plan.slice_of("dpo.seed2") == "pairs"
    )
    assert plan.train_inputs("rft.seed2")[-2:] == [
        "results/data/best_of_8.seed2.manifest.json",
        "results/data/best_of_8.seed2.jsonl",
    ]
    assert "results/sft_v2.seed2/adapter/manifest.json" in plan.sample_inputs("best_of_8.seed2")
    assert "results/rm.seed2/adapter/manifest.json" in plan.choice_inputs("best_of_8.seed2")
    assert "results/data/best_of_8.seed2.answers.jsonl" in plan.choice_inputs("pairs_of_8.seed2")
    assert plan.step("samples", "best_of_8.seed2")["seed"] == 2
    assert "seed" not in plan.step("slice", "best_of_8.seed2")  # all that chance decides stands in the answers
    assert "results/data/best_of_8.seed2.manifest.json" in plan.targets()


def test_the_choice_takes_a_gpu_for_a_reward_model_alone(config):
    plan = Plan(Config(merge(config, {"device": "cuda", "precision": "bf16"})))
    assert plan.step("slice", "best_of_8")["device"] == "cuda" and "device" not in plan.step("slice", "pairs_of_8")
    assert plan.step("slice", "best_of_8")["config"]["require_reward_above_chance"] is True


def test_the_parents_that_explain_names_are_those_of_the_steps(config):
    plan = Plan(Config(config))
    for phase in marks(config):
        named = graph.parents(plan, phase)
        assert {role: plan.fingerprint(*parent) for role, parent in named.items()} == plan.step(*phase)["parents"], phase
    where = graph.phases_by_file(plan, ["results/data/best_of_8.seed7.answers.jsonl"])
    assert where["results/data/best_of_8.seed7.answers.jsonl"] == Phase("samples", "best_of_8.seed7")
    assert where["results/data/pairs_of_8.seed2.jsonl"] == Phase("slice", "pairs_of_8.seed2")
    assert where["results/data/pairs.jsonl"] == Phase("slice", "pairs") and "results/data/pairs.seed2.jsonl" not in where


@pytest.mark.parametrize(
    "kind, name, edit, said",
    [
        ("samples", "best_of_8.seed2", sampled(temperature=0.5), "data.slices.best_of_8.source.sampled.temperature: 1 -> 0.5"),
        ("samples", "dpo_onpolicy_round2", sampled(n=4), "data.slices.best_of_8.source.sampled.n: 8 -> 4"),
        ("samples", "best_of_8", {"generation": {"rollouts": "hf"}}, "generation.rollouts: graphs -> hf"),
        ("slice", "best_of_8", sampled(least=0.75), "data.slices.best_of_8.source.sampled.least: 0.5 -> 0.75"),
        (
            "slice",
            "best_of_8",
            sampled(reward={"brief": 2}),
            "best_of_8.source.sampled.reward: {brief: 0.5, rm: 0.5} -> {brief: 2, rm: 0.5}",
        ),
        ("slice", "best_of_8", {"data": {"max_drop": 0.5}}, "data.max_drop: 0.05 -> 0.5"),
        ("slice", "pairs_of_8", {"data": {"slices": {"pairs_of_8": {"heldout": 9}}}}, "data.slices.pairs_of_8.heldout: 60 -> 9"),
    ],
)
def test_a_difference_is_said_by_the_key_that_was_written(config, kind, name, edit, said):
    before, after = Plan(Config(config)), Plan(Config(merge(config, edit)))
    lines = differences.differences(after.config, kind, name, before.step(kind, name), after.step(kind, name))
    assert any(line.endswith(said) for line in lines), lines


def test_artifacts_are_found_where_the_rules_put_them_and_are_of_this_config(config, tmp_path):
    plan, folder = Plan(Config(config)), tmp_path / "results/data"
    folder.mkdir(parents=True)
    names = ["best_of_8.seed2", "best_of_8.seed2.answers", "pairs", "pairs.seed2", "pairs_of_8.answers", "pairs_of_8"]
    for name in names:
        (folder / f"{name}.manifest.json").write_text("{}")
    found = {(one.kind, one.name): adopt.planned(plan.config, one) for one in records.find(str(tmp_path / "results"))}
    assert found == {
        ("slice", "best_of_8.seed2"): True, ("samples", "best_of_8.seed2"): True, ("slice", "pairs"): True,
        ("slice", "pairs.seed2"): False, ("samples", "pairs_of_8"): False, ("slice", "pairs_of_8"): True,
    }  # fmt: skip
    for kind in ("samples", "slice"):
        place = records.place_of("results", kind, "best_of_8.seed2")
        assert graph.phases_by_file(plan, [])[place.manifest] == Phase(kind, "best_of_8.seed2")


def test_estimates_and_fits_know_the_answers_and_a_choice_by_a_model(config):
    study = merge(config, {"device": "cuda", "precision": "bf16"})
    plan = Plan(Config(study))
    estimates, memory = estimate.Estimates(plan), Memory(plan.config)
    more = Plan(Config(merge(study, sampled(n=16))))
    for kind in ("samples", "slice"):
        asked = estimates.ask(kind, "best_of_8.seed2", 1)
        assert set(asked) == {"mem_mb", "runtime", "disk_mb"} and min(asked.values()) > 0
        assert estimate.Estimates(more).of(kind, "best_of_8")["seconds"] > estimates.of(kind, "best_of_8")["seconds"]
        assert 0 < estimates.gpu_mb(kind, "best_of_8.seed2") < 20_000
    assert [one.name for one in memory.phases() if one.kind == "sample"] == ["best_of_8", "dpo_onpolicy_round2"]
    assert memory.samples("best_of_8", 384).peak > memory.samples("best_of_8", 16).peak


def test_what_hf_samples_takes_its_memory_by_its_own_batches(config):
    """Slots are those of the other backend: fewer of them change nothing, and fits does not advise it."""
    batches = {"device": "cuda", "precision": "bf16", "generation": {"rollouts": "hf"}, "eval": {"batch_size": 64}}
    study = merge(config, batches)
    peak, remedies = {}, {}
    for name, over in {"as it is": {}, "slots": {"generation": {"slots": 4}}, "batch": {"eval": {"batch_size": 8}}}.items():
        memory = Memory(Config(merge(study, over)))
        phase = next(one for one in memory.phases() if (one.kind, one.name) == ("sample", "best_of_8"))
        peak[name], remedies[name] = phase.peak, fits.remedy(memory, phase, need(phase.peak) * 0.97e-9)
        assert memory.of("samples", "best_of_8").peak == phase.peak
    assert peak["slots"] == peak["as it is"] > peak["batch"]
    assert list(remedies["as it is"][0]) == ["eval.batch_size"]


def test_the_overlay_plans_over_three_seeds():
    plan = Plan(load(FILES[0], ROOT / "config/three_seeds.yaml", FILES[1]))
    plan.check()
    report = json.loads(plan.report())["config"]
    assert report["experiments"]["rft"]["sampled"] == {
        "run": "sft_v2", "prompts": "instructions", "n": 8, "answers": "best_of_8", "reward": {"ifeval": 1}
    }  # fmt: skip
    assert report["experiments"]["dpo_onpolicy_round2"]["sampled"]["answers"] == "dpo_onpolicy_round2"
    assert "sampled" not in report["experiments"]["dpo"]


def test_shards_share_the_answers_and_decide_nothing(config):
    one, four = Plan(Config(config)), Plan(Config(merge(config, {"eval": {"shards": 4}})))
    assert one.fingerprint("samples", "best_of_8") == four.fingerprint("samples", "best_of_8")
    assert one.sample_shard_files("best_of_8") == [] and four.sample_shard_files("best_of_8.seed2")[3].endswith(
        "data/best_of_8.seed2_shards/4of4.json"
    )
    assert json.loads(four.sample_shard("best_of_8.seed2", 3))["shard"] == [3, 4]
