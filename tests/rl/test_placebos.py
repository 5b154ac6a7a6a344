"""Placebos: rewards that say nothing of an answer, toss alike after a kill, and are named as controls in a config."""

import os
import signal
from collections import Counter
from types import SimpleNamespace

import numpy
import pytest

from tests.conftest import ROOT
from tests.support import small_steps
from tests.training.test_resume import METHODS, end_at, outcome
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError, Interrupted
from workflow_scripts.rl import placebos
from workflow_scripts.tools import differences


def ask(reward, ids, step=0, texts=None):
    completions = [[{"role": "assistant", "content": text}] for text in texts or ["yes"] * len(ids)]
    return reward([[]] * len(ids), completions, id=ids, trainer_state=SimpleNamespace(global_step=step), log_metric=None)


def test_a_coin_is_of_seed_step_prompt_and_place_and_of_nothing_else():
    ids = [f"p{i // 4}" for i in range(400)]
    first = ask(placebos.coins(1), ids)
    assert set(first) == {0.0, 1.0} and 160 < sum(first) < 240
    assert ask(placebos.coins(1), ids, texts=[f"answer {i}" for i in range(400)]) == first
    # the same prompt has the same coins in another batch, and each of its answers one of its own
    assert ask(placebos.coins(1), ids[200:]) == first[200:]
    groups = Counter(tuple(first[i : i + 4]) for i in range(0, 400, 4))
    assert len(groups) == 16
    others = [ask(placebos.coins(2), ids), ask(placebos.coins(1), ids, step=1), ask(placebos.coins(1), [f"q{i}" for i in ids])]
    for other in others:
        assert 0.4 < numpy.mean(numpy.array(first) == other) < 0.6


def test_shuffled_keeps_the_rewards_of_a_batch_and_breaks_the_pairing():
    def real(prompts, completions, id, **columns):
        return [float(completion[-1]["content"]) for completion in completions]

    rng, own, given = numpy.random.default_rng(0), [], []
    reward, ids = placebos.shuffled(real, 1), [str(i // 4) for i in range(16)]
    for step in range(300):
        values = [f"{value:.3f}" for value in rng.normal(size=16)]
        found = ask(reward, ids, step, values)
        assert sorted(found) == sorted(map(float, values)) and found != list(map(float, values))
        assert found == ask(placebos.shuffled(real, 1), ids, step, values)
        mean = numpy.mean(found)  # of a batch: what advantages are taken against
        own += [float(value) - mean for value in values]
        given += [value - mean for value in found]
    # over 4,800 answers a correlation is known to 0.015; were no answer to keep its own, it would be -1/15
    assert abs(numpy.corrcoef(own, given)[0, 1]) < 0.04
    assert ask(placebos.shuffled(real, 2), ids, 0, values) != found


# -- trained --------------------------------------------------------------------------------------------------------------


def job_of(method: str, placebo: str, base, slices, out) -> manifests.Job:
    config = small_steps.train_config(method, **METHODS[method])
    config |= {"placebo": placebo, "reward": {} if placebo == "random" else config["reward"]}
    if config["method"] == "ppo":
        config["ppo"] |= {"missing_eos_penalty": 0.0}
    parents = {"start": base, "rows": slices[method]}
    return small_steps.job(f"train_{config['method']}", out / "adapter/manifest.json", parents, config)


@pytest.fixture
def given(monkeypatch) -> dict:
    """(step, ids of the prompts) -> the rewards that a batch was given, by what they were before: filled while trainings run."""
    found: dict = {}

    def recorded(make):
        def made(*args):
            reward = make(*args)

            def judge(prompts, completions, id, trainer_state, **columns):
                rewards = reward(prompts, completions, id=id, trainer_state=trainer_state, **columns)
                before = args[0](prompts, completions, id=id, **columns) if callable(args[0]) else None
                key = (trainer_state.global_step, tuple(id))
                assert found.setdefault(key, (rewards, before)) == (rewards, before)  # whenever it is asked for again
                return rewards

            return judge

        return made

    for name in ("coins", "shuffled"):
        monkeypatch.setattr(placebos, name, recorded(getattr(placebos, name)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("method", "placebo"), [("grpo", "random"), ("rloo", "shuffled"), ("ppo_ifeval", "random")])
def test_a_training_that_was_ended_goes_on_with_the_same_rewards(method, placebo, base, slices, tmp_path, given):
    whole = small_steps.run(job_of(method, placebo, base, slices, tmp_path / "whole"))
    undisturbed = dict(given)
    given.clear()
    job = job_of(method, placebo, base, slices, tmp_path / "ended")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        end_at(3, patch, by=lambda: os.kill(os.getpid(), signal.SIGTERM))
        small_steps.run(job)
    resumed = small_steps.run(job)
    assert given == undisturbed and len({step for step, _ in given}) > 3
    assert outcome(resumed) == outcome(whole)
    for rewards, before in given.values():
        assert set(rewards) <= {0.0, 1.0} if placebo == "random" else sorted(rewards) == sorted(before)
    if placebo == "shuffled":
        assert any(rewards != before for rewards, before in given.values())
    assert whole.data["step"]["config"]["placebo"] == placebo


# -- in the config ----------------------------------------------------------------------------------------------------------


def config_with(experiments: dict, controls: dict | None = None) -> Config:
    overlay = {"experiments": experiments, "report": {"controls": {"placebo": controls} if controls else {}}}
    return Config(merge(read_yaml(ROOT / "config/config.yaml"), overlay))


FREE = {"missing_eos_penalty": 0}
GOOD = {
    "coin": {"extends": "grpo", "reward": "random"},
    "dealt": {"extends": "rloo", "reward": {"shuffled": "ifeval"}},
    "dealt_rm": {"extends": "ppo", "reward": {"shuffled": "rm"}, "ppo": FREE},
    "coin_ppo": {"extends": "ppo", "reward": "random", "ppo": FREE},
}


def test_a_placebo_trains_on_the_rows_of_its_kind_and_a_coin_needs_no_reward_model():
    config = config_with(GOOD, {"task": "ifeval", "runs": [*GOOD], "against": "sft_v2_merged"})
    plan = Plan(config)
    plan.check()
    steps = {name: plan.step("train", name) for name in GOOD}
    assert {name: (step["config"]["placebo"], step["config"]["reward"]) for name, step in steps.items()} == {
        "coin": ("random", {}), "dealt": ("shuffled", {"ifeval": 1}),
        "dealt_rm": ("shuffled", {"rm": 1}), "coin_ppo": ("random", {}),
    }  # fmt: skip
    assert "reward rm" in steps["dealt_rm"]["parents"] and set(steps["coin_ppo"]["parents"]) == {"start", "rows"}
    assert "placebo" not in plan.step("train", "grpo")["config"]
    # its slice may be any with prompts, as no row has to be judged
    assert Plan(config_with({"coin": {"extends": "grpo", "reward": "random", "slice": "sums"}})).step("train", "coin")
    assert all(f"ifeval {name}" in plan.step("report", "")["parents"] for name in GOOD)


def test_make_why_names_the_key_that_the_user_wrote():
    config = config_with(GOOD)
    assert differences.place(config, "train", "dealt", ["placebo"]) == "experiments.dealt.reward"


def test_a_placebo_is_of_the_rank_of_its_sweep():
    config = config_with({"sft_v2": {"sweep": "rank"}, "rm": {"sweep": "rank"}, "dealt_rm": GOOD["dealt_rm"]})
    copy = config.experiments["dealt_rm_r8"]
    assert (copy["reward"], copy["placebo"], copy["lora"]["r"]) == ("rm_r8", "shuffled", 8)


@pytest.mark.parametrize(
    ("experiments", "controls", "words"),
    [
        ({"x": {"extends": "ppo", "reward": "random"}}, None, "methods.ppo.ppo.missing_eos_penalty: found 1.0 with a placebo"),
        (
            {"x": {"extends": "grpo", "reward": {"random": 0.5, "rm": 0.5}}},
            None,
            "experiments.x.reward: found 'random', expected",
        ),
        ({"x": {"extends": "grpo", "reward": {"shuffled": "ifeval", "rm": 1}}}, None, r"\(random and shuffled stand alone\)"),
        ({"x": {"extends": "grpo", "reward": {"shuffled": "nope"}}}, None, "experiments.x.reward: found 'nope', expected ifeval"),
        ({"x": {"extends": "grpo", "reward": {"shuffled": "random"}}}, None, "experiments.x.reward: found 'random'"),
        (
            {"x": {"extends": "grpo", "reward": {"shuffled": 1}}},
            None,
            "experiments.x.reward.shuffled: found 1, expected a string",
        ),
        (
            {"x": {"extends": "grpo", "reward": {"shuffled": "numeric"}}},
            None,
            "found 'instructions', expected a slice of kind num",
        ),
        ({"random": {"extends": "grpo"}}, None, "experiments.random: not a name to use here"),
        ({}, {"task": "ifeval", "runs": ["grpo"], "against": "base"}, "controls.placebo.runs: found 'grpo', which is no placebo"),
        (GOOD, {"task": "mmlu", "runs": ["coin"], "against": "base"}, "controls.placebo.task: found 'mmlu', expected what"),
        (GOOD, {"task": "gsm8k", "runs": ["coin"], "against": "nope"}, "controls.placebo: found 'nope', expected one of base"),
    ],
)
def test_what_a_placebo_must_not_be_is_one_line(experiments, controls, words):
    with pytest.raises(InputError, match=words) as caught:
        Plan(config_with(experiments, controls)).check()
    assert "\n" not in str(caught.value)
