"""Slices whose source is a run: what is refused, rounds, circles, and the copies of a rank sweep."""

import pytest

from tests.conftest import ROOT
from workflow_scripts.config.config import Config, load
from workflow_scripts.plumbing.messages import InputError

DEFAULT, MADE, SWEEP = (ROOT / f"config/{name}.yaml" for name in ("config", "self_made", "rank_sweep"))
ASKED = {"run": "sft_v2", "prompts": "instructions", "n": 4, "temperature": 1.0, "max_new_tokens": 32, "reward": "ifeval"}
BEST = "data.slices.best.source.sampled"


def user(sampled: dict, kind: str = "sft", experiments: dict | None = None, **slice_keys) -> dict:
    """What overlays the default config: a sampled slice `best`, and experiments."""
    body = {"kind": kind, "source": {"sampled": sampled}, "rows": 100, "heldout": 10, "seed": 1} | slice_keys
    return {"data": {"slices": {"best": body}}, "experiments": experiments or {}}


@pytest.fixture
def over(tmp_path):
    def of(body: dict, *more) -> Config:
        import yaml

        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
        return load(DEFAULT, *more, tmp_path / "overlay.yaml")

    return of


def without(key: str) -> dict:
    return {one: value for one, value in ASKED.items() if one != key}


BEST_OF = ASKED | {"keep": "best"}
REFUSED = {
    "no run": (user(without("run") | {"keep": "best"}), rf"{BEST}.run: missing.*answers_of"),
    "an unknown run": (user(BEST_OF | {"run": "sft"}), rf"{BEST}.run: found 'sft', expected who answers: base, .*sft_v2"),
    "a reward model's": (user(BEST_OF | {"run": "rm"}), rf"{BEST}.run: found 'rm', expected who answers"),
    "a view that is the run": (user(BEST_OF | {"run": "sft_v2_full"}), rf"{BEST}.run: found 'sft_v2_full', expected who answers"),
    "unknown prompts": (user(BEST_OF | {"prompts": "x"}), rf"{BEST}.prompts: found 'x', expected a slice with prompts: pairs"),
    "prompts that are judged": (user(BEST_OF | {"prompts": "ifeval"}), rf"{BEST}.prompts: found 'ifeval', the prompts of ifeval"),
    "more than there are": (user(BEST_OF, rows=801), "data.slices.best.rows: found 801, and instructions, .* has 800"),
    "another kind": (user(BEST_OF, kind="preference"), "data.slices.best.kind: found preference, expected sft"),
    "a verifier of other prompts": (user(BEST_OF | {"prompts": "sums"}, rows=9, heldout=2), "reward: found ifeval, .*sums is"),
    "an unknown reward": (user(BEST_OF | {"reward": "x"}), rf"{BEST}.reward: found 'x', expected ifeval, numeric or"),
    "a model's worth unsaid": (user(BEST_OF | {"reward": "rm"}), rf"{BEST}.require_reward_above_chance: missing: rm is a"),
    "a worth of no model": (user(BEST_OF | {"require_reward_above_chance": True}), "of a reward model; leave it out"),
    "no threshold": (user(ASKED | {"keep": "all_right"}), rf"{BEST}.least: missing: keep: all_right"),
    "a threshold of pairs": (
        user(ASKED | {"keep": "pairs", "pair": "all", "least": 1}, kind="preference"),
        rf"{BEST}.least: of keep: best",
    ),
    "no way to pair": (user(ASKED | {"keep": "pairs"}, kind="preference"), rf"{BEST}.pair: missing: keep: pairs needs it"),
    "no margin": (user(ASKED | {"keep": "pairs", "pair": "margin"}, kind="preference"), rf"{BEST}.margin: missing"),
    "a margin of none": (
        user(ASKED | {"keep": "pairs", "pair": "all", "margin": 0.5}, kind="preference"),
        rf"{BEST}.margin: of pair: margin",
    ),
    "one answer to pair": (user(ASKED | {"keep": "pairs", "pair": "all", "n": 1}, kind="preference"), rf"{BEST}.n: found 1"),
    "a temperature of 0": (user(BEST_OF | {"temperature": 0}), rf"{BEST}.temperature: found 0, expected a number above 0"),
    "an unknown key": (user(BEST_OF | {"samples": 2}), rf"{BEST}.samples: unknown key"),
    "answers of itself": (user({"answers_of": "best", "reward": "ifeval", "keep": "best"}), rf"{BEST}.answers_of: found 'best'"),
    "twice said": (user(BEST_OF | {"answers_of": "pairs"}), rf"{BEST}.run: is that of pairs"),
    "a group of nobody": (user(BEST_OF, group_by="topic"), "best.group_by: found 'topic', expected what instructions"),
    "a format": (user(BEST_OF, format="messages"), "data.slices.best.format: not for rows that a run makes"),
    "no held-out rows": (
        {"data": {"slices": {"best": {"kind": "sft", "source": {"sampled": BEST_OF}, "rows": 9, "seed": 1}}}},
        "best.heldout: missing",
    ),
    "a circle of one": (
        user(BEST_OF | {"run": "rft"}, experiments={"rft": {"method": "sft", "start_from": "sft_v2", "slice": "best"}}),
        rf"{BEST}.run: a circle: rft -> best \(a slice\) -> rft; let another run answer",
    ),
    "a circle of several": (
        user(
            BEST_OF | {"run": "two"},
            experiments={
                "one": {"method": "sft", "start_from": "sft_v2", "slice": "best"},
                "two": {"method": "dpo", "start_from": "one"},
            },
        ),
        r"a circle: one -> best \(a slice\) -> two -> one",
    ),
    "a circle by the reward": (
        user(
            BEST_OF | {"reward": "rm_2", "require_reward_above_chance": True},
            experiments={
                "rft": {"method": "sft", "start_from": "sft_v2", "slice": "best"},
                "rm_2": {"method": "rm", "start_from": "rft"},
            },
        ),
        r"a circle: (rft -> best \(a slice\) -> rm_2 -> rft|rm_2 -> rft -> best \(a slice\) -> rm_2)",
    ),
    "rounds on given rows": (user(BEST_OF, experiments={"dpo": {"rounds": 2}}), "dpo.rounds: found 2, but pairs, .*no sampled"),
    "rounds from elsewhere": (
        user(BEST_OF, experiments={"rft": {"method": "sft", "start_from": "sft_v1", "slice": "best", "rounds": 2}}),
        "experiments.rft.rounds: found 2, but best has answers of sft_v2, and rft starts from sft_v1",
    ),
    "a round of a taken name": (
        user(
            BEST_OF,
            experiments={
                "rft": {"method": "sft", "start_from": "sft_v2", "slice": "best", "rounds": 2},
                "rft_round2": {"method": "sft"},
            },
        ),
        "experiments.rft.rounds: round 2 and its slice would be called rft_round2",
    ),
    "one round": (user(BEST_OF, experiments={"rft": {"method": "sft", "slice": "best", "rounds": 1}}), "found 1, .*at least 2"),
}  # fmt: skip


@pytest.mark.parametrize("body, said", REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_meant_is_refused_with_its_key(over, body, said):
    with pytest.raises(InputError, match=said):
        over(body)


def test_a_slice_that_takes_the_answers_of_another_has_its_prompts_and_seed(over):
    body = user({"answers_of": "best_of_8", "reward": "ifeval", "keep": "all_right", "least": 1}, rows=700)
    with pytest.raises(InputError, match="data.slices.best.rows: found 700, and 800 in best_of_8, whose answers are taken"):
        over(body, MADE)
    body = user({"answers_of": "pairs_of_8", "reward": "ifeval", "keep": "best"}, rows=800)
    with pytest.raises(
        InputError, match="answers_of: found 'pairs_of_8', expected a sampled slice with answers of its own: best_of_8"
    ):
        over(body, MADE)


def test_whoever_answers_may_be_a_model_a_view_or_a_run_that_is_chosen(over):
    for run in ("base", "sft_v2_merged", "sft_v2_nf4"):
        assert over(user(BEST_OF | {"run": run})).data["data"]["slices"]["best"]["source"]["sampled"]["run"] == run
    tuned = over(user(BEST_OF | {"run": "sft_v2_tuned"}), ROOT / "config/tuned.yaml")
    assert "sft_v2_tuned" in tuned.judged


def test_rounds_write_a_chain_each_on_answers_of_the_one_before(over):
    body = user(ASKED | {"keep": "pairs", "pair": "best_worst", "run": "sft_v2_merged"}, kind="preference", seed=7)
    body["experiments"] = {
        "dpo_on": {"method": "dpo", "start_from": "sft_v2", "slice": "best", "rounds": 3, "train": {"beta": 0.3}}
    }
    config = over(body)
    chain = {name: config.experiments[name] for name in ("dpo_on", "dpo_on_round2", "dpo_on_round3")}
    assert [one["start_from"] for one in chain.values()] == ["sft_v2", "dpo_on", "dpo_on_round2"]
    assert [one["slice"] for one in chain.values()] == ["best", "dpo_on_round2", "dpo_on_round3"]
    assert all(one["train"]["beta"] == 0.3 and "rounds" not in one for one in chain.values())
    slices = config.data["data"]["slices"]
    runs = [slices[one["slice"]]["source"]["sampled"]["run"] for one in chain.values()]
    assert runs == ["sft_v2_merged", "dpo_on_merged", "dpo_on_round2_merged"]  # the view stays
    assert [slices[one["slice"]]["seed"] for one in chain.values()] == [7, 8, 9]  # other prompts, where some are drawn
    written = over(body | {"experiments": {"dpo_on": {**body["experiments"]["dpo_on"], "rounds": 2}}})
    assert written.experiments["dpo_on_round2"] == config.experiments["dpo_on_round2"]  # more rounds leave the others alone
    assert config.place("dpo_on_round2", ["train", "beta"]) == ["experiments", "dpo_on", "train", "beta"]


def test_a_round_after_answers_that_are_shared_asks_as_they_were_asked(over):
    config = over({}, MADE)
    slices = config.data["data"]["slices"]
    second, first = slices["dpo_onpolicy_round2"]["source"]["sampled"], slices["best_of_8"]["source"]["sampled"]
    assert second == {**{key: first[key] for key in ("prompts", "n", "temperature", "max_new_tokens", "reward")}} | {
        "run": "dpo_onpolicy", "keep": "pairs", "pair": "best_worst"
    }  # fmt: skip


def test_a_rank_sweep_copies_a_slice_with_the_run_that_makes_it(over):
    body = user(
        ASKED | {"keep": "pairs", "pair": "all", "reward": {"rm": 1.0}, "require_reward_above_chance": True}, kind="preference"
    )
    body["data"]["slices"]["again"] = {**body["data"]["slices"]["best"], "source": {"sampled": {
        "answers_of": "best", "reward": "ifeval", "keep": "pairs", "pair": "best_worst"}}}  # fmt: skip
    body["data"]["slices"]["of_base"] = {**body["data"]["slices"]["best"], "source": {"sampled": {
        **ASKED, "run": "base", "keep": "pairs", "pair": "all"}}}  # fmt: skip
    body["experiments"] = {
        "dpo_on": {"method": "dpo", "start_from": "sft_v2", "slice": "again"},
        "dpo_off": {"method": "dpo", "start_from": "base", "slice": "again"},  # swept by its slice alone
        "dpo_base": {"method": "dpo", "start_from": "base", "slice": "of_base"},
    }
    config = over(body, SWEEP)
    slices, experiments = config.data["data"]["slices"], config.experiments
    assert experiments["dpo_on_r8"]["slice"] == "again_r8" and experiments["dpo_off_r8"]["slice"] == "again_r8"
    assert slices["again_r8"]["source"]["sampled"]["answers_of"] == "best_r8"
    assert slices["best_r8"]["source"]["sampled"]["run"] == "sft_v2_r8"
    assert slices["best_r32"]["source"]["sampled"]["reward"] == {"rm_r32": 1.0}
    assert "dpo_base_r8" not in experiments and "of_base_r8" not in slices
