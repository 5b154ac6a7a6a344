"""Win rates by a reward model: the rewards, what the page makes of them, what the config may not say."""

import json
import re

import pytest
import yaml

from tests.conftest import MICRO, ROOT
from tests.support import report_world, small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.report import winning
from workflow_scripts.tools import graph

JUDGE = """
data: {slices: {judge: {kind: prompts, source: {path: PROMPTS}, rows: 6, seed: 1}}}
eval: {judge: {prompts: judge, reward: rm, against: sft_v2, max_new_tokens: 8}}
"""


@pytest.fixture
def overlay(tmp_path) -> str:
    """A config's text with prompts to judge; their rows have answers too, which nobody reads."""
    rows = [{"prompt": f"Write about the river number {i}.", "chosen": "yes", "rejected": "no"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JUDGE.replace("PROMPTS", str(tmp_path / "prompts.jsonl"))


def load(tmp_path, text: str) -> configs.Config:
    (tmp_path / "over.yaml").write_text(text)
    return configs.load(*[ROOT / name for name in MICRO], tmp_path / "over.yaml")


@pytest.mark.slow
def test_rewards_are_those_of_the_evaluation_of_the_reward_model(tmp_path):
    """The chosen answers of its held-out pairs, given as a run's answers, get the rewards that eval_rm gave them."""
    base = small_steps.write_base(tmp_path / "base")
    pairs = small_steps.pairs_slice(tmp_path, 40)
    adapter = small_steps.train(tmp_path / "rm", "rm", base, pairs, max_steps=2).path
    train = small_steps.train_config("rm")
    settings = {
        "quantise": train["quantise"],
        "quant": train["quant"],
        "batch_size": 4,
        "max_length": train["train"]["max_length"],
    }
    parents = {"start": base, "adapter": adapter, "rows": pairs}
    known = small_steps.run(small_steps.job("eval_rm", tmp_path / "rm_eval.json", parents, settings)).data["per_pair"]

    rows = {row["id"]: row for row in manifests.read(pairs).rows(heldout=True)}
    prompts = [{"key": one["id"], "prompt": rows[one["id"]]["prompt"]} for one in reversed(known)]
    answers = [
        {
            "key": one["id"],
            "prompt": "",
            "response": rows[one["id"]]["chosen"][-1]["content"],
            "tokens": 5,
            "finish_reason": "stop",
        }
        for one in known
    ]
    parents = {
        "prompts": small_steps.write_slice(tmp_path, "judge", prompts, heldout=0),
        "responses": small_steps.write_slice(tmp_path, "judge_responses", answers, heldout=0),
        "start": base, "adapter": adapter,
    }  # fmt: skip
    made = small_steps.run(small_steps.job("judge_answers", tmp_path / "judge_dpo.json", parents, settings)).data
    assert [row["key"] for row in made["per_prompt"]] == [row["key"] for row in prompts]
    rewards = {row["key"]: row["reward"] for row in made["per_prompt"]}
    assert rewards == pytest.approx({one["id"]: one["chosen"] for one in known}, abs=1e-5)
    assert made["mean_reward"] == pytest.approx(sum(rewards.values()) / len(rewards), abs=1e-5)
    assert made["n_prompts"] == len(known) > 4 and made["mean_reward_stderr"] > 0 and made["mean_response_tokens"] == 5


def test_each_run_is_judged_by_one_reward_model_and_nothing_trains_on_its_prompts(tmp_path, overlay):
    plan = Plan(load(tmp_path, overlay))
    plan.check()
    judge = plan.fingerprint("train", "rm")
    for run in ("base", "dpo", "dpo.seed2"):
        step = plan.step("score_judge", run)
        assert step["parents"]["adapter"] == judge and step["parents"]["responses"] == plan.fingerprint("generate_judge", run)
    assert plan.results_of("dpo")[-1] == "results/judge_dpo.json"
    assert all("judge_prompts" in plan.step("slice", name)["parents"] for name in ("sft", "pairs", "instructions"))
    for run in ("dpo", "base"):
        phase = graph.Phase("score_judge", run)
        named = {role: plan.fingerprint(*parent) for role, parent in graph.parents(plan, phase).items()}
        assert named == plan.step(*phase)["parents"]
    other = Plan(load(tmp_path, overlay.replace("against: sft_v2", "against: base")))
    assert other.score("judge", "dpo") == plan.score("judge", "dpo") and other.report() != plan.report()


def test_it_runs_in_the_pipeline(clone, overlay):
    text = overlay + "methods: {rm: {train: {max_steps: 2}}}\n"
    done = clone.plan("results/judge_dpo.json", configs=clone.overlay(text))
    assert {rule: done[rule] for rule in ("train_rm", "generate", "judge_answers")} == {
        "train_rm": 1,
        "generate": 1,
        "judge_answers": 1,
    }
    assert "score" not in done
    clone.snakemake("results/judge_dpo.json", "--cores", "2", configs=clone.overlay(text))
    made = json.loads((clone.folder / "results/judge_dpo.json").read_text())
    assert made["n_prompts"] == 6 and all(isinstance(row["reward"], float) for row in made["per_prompt"])
    assert clone.plan("results/judge_dpo.json", configs=clone.overlay(text)) == {}
    assert "not scored again: it takes a model" in clone.run("python", "-m", "workflow_scripts.tools.verify", check=False).stdout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("reward: rm", "reward: dpo", "eval.judge.reward: found 'dpo', expected a reward model's experiment: rm"),
        ("against: sft_v2", "against: rm", "eval.judge.against: found 'rm', expected one of base, "),
        ("prompts: judge", "prompts: pairs", "eval.judge.prompts: found 'pairs', expected a slice of kind prompts"),
        ("rows: 6", "rows: 6, heldout: 2", "data.slices.judge.heldout: the prompts of an evaluation are taken as they are"),
        ("eval:", "report: {families: {primary: {task: judge}}}\neval:", "families.primary.task: found 'judge', expected what"),
    ],
)
def test_what_a_judge_must_not_be(tmp_path, overlay, old, new, words):
    with pytest.raises(InputError) as error:
        Plan(load(tmp_path, overlay.replace(old, new, 1))).check()
    assert words in str(error.value)


def test_a_win_is_a_higher_reward_and_a_tie_half_a_win():
    score, other = ({"per_prompt": [{"key": k, "reward": r} for k, r in rows]} for rows in (
        [("a", 1.0), ("b", 0.5), ("c", -2.0)], [("c", -1.0), ("b", 0.5), ("a", 0.0)],
    ))  # fmt: skip
    assert winning.share(score, other) == [1.0, 0.5, 0.0] and winning.share(other, score) == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_the_page_has_win_rates_that_say_what_they_are(tmp_path, overlay):
    (tmp_path / "made").mkdir()
    config = report_world.write_config(tmp_path, overlay=yaml.safe_load(overlay))
    html = report_world.report(
        tmp_path / "made", report_world.make(tmp_path / "made", config, accuracy={"dpo": 0.9, "sft_v2": 0.3})
    )
    section = html[html.index('id="wins"') : html.index('id="kinds"')]
    rows = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", section, flags=re.S))
    won = {name: float(found[1]) for name, row in rows.items() if (found := re.match(r"<td>([\d.]+) \+- ", row))}
    assert won["dpo"] > 70 and won["base"] < 50 and "sft_v2" in rows and "sft_v2" not in won
    assert "Descriptive, and no measure of what people" in section and "ppo learned what rm rewards" in section
    assert "GSM8K" in html
