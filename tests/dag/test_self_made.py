"""Data that a model makes itself, through Snakemake: from its answers to what trains on them, and what an edit runs again."""

import contextlib
import functools
import json
import random
import shutil
import time
from collections import Counter

import pytest

from tests.conftest import Clone, make_clone
from tests.support import kills, warm
from workflow_scripts.plumbing.jsonl import read_jsonl

pytestmark = pytest.mark.slow
CONFIGS = [
    "config/config.yaml",
    "tests/support/config/world.yaml",
    "config/self_made.yaml",
    "tests/support/config/self_made.yaml",
]
ADAPTERS = [f"results/{run}/adapter/manifest.json" for run in ("rft", "kto_onpolicy", "dpo_onpolicy_round2")]
# What rft trains on is rewarded by a function of the user's own, pairs by a reward model, which starts from the merge of sft_v2.
OWN = """
rewards: {full: {file: full.py, function: full}}
data:
  slices:
    best_of_8: {source: {sampled: {reward: {full: 0.5, ifeval: 1.0}}}}
    pairs_of_8: {source: {sampled: {reward: rm, require_reward_above_chance: false}}}
"""
FULL = "def full(completions, **columns):\n    return [float(turns[-1]['content'].endswith('.')) for turns in completions]\n"


@pytest.fixture(scope="module")
def made(shared) -> Clone:
    def make(folder) -> None:
        clone = make_clone(folder)
        (folder / "full.py").write_text(FULL)
        (folder / "own.yaml").write_text(OWN)
        clone.snakemake(*ADAPTERS, configs=[*CONFIGS, "own.yaml"])

    return Clone(shared.folder("self_made", make))


def planned(made: Clone, *more: str) -> dict[str, int]:
    return made.plan(*ADAPTERS, configs=[*CONFIGS, "own.yaml", *more])


def test_each_method_trains_on_what_was_kept_of_one_set_of_answers(made):
    data = made.folder / "results/data"
    answers = sorted(path.name for path in data.glob("*.answers.jsonl"))
    assert answers == ["best_of_8.answers.jsonl", "dpo_onpolicy_round2.answers.jsonl"]  # pairs and labels take the first
    for run, name in (("rft", "best_of_8"), ("kto_onpolicy", "labels_of_8"), ("dpo_onpolicy", "pairs_of_8")):
        adapter = json.loads((made.folder / f"results/{run}/adapter/manifest.json").read_text())
        rows = json.loads((data / f"{name}.manifest.json").read_text())
        assert adapter["parents"]["rows"] == {"path": f"results/data/{name}.manifest.json", "fingerprint": rows["fingerprint"]}
        assert (
            rows["step"]["parents"]["answers"]
            == json.loads((data / "best_of_8.answers.manifest.json").read_text())["fingerprint"]
        )
    second = json.loads((data / "dpo_onpolicy_round2.answers.manifest.json").read_text())
    first = json.loads((made.folder / "results/dpo_onpolicy/adapter/manifest.json").read_text())
    assert second["parents"]["adapter"]["fingerprint"] == first["fingerprint"]  # the second round is answered by the first
    card = (made.folder / "results/rft/adapter/README.md").read_text()  # of rows that a run made it names the run, and the reward
    assert '"run":"results/sft_v2"' in card and '"prompts":"instructions"' in card and '"full":0.5' in card
    assert '"run":"results/dpo_onpolicy"' in (made.folder / "results/dpo_onpolicy_round2/adapter/README.md").read_text()
    chosen = read_jsonl(data / "pairs_of_8.jsonl")
    assert chosen and all(row["rewards"][0] > row["rewards"][1] for row in chosen)


def test_an_edit_runs_again_what_it_decides_and_no_sampling_for_another_choice(made):
    assert planned(made) == {}
    folder = made.folder
    (folder / "keep.yaml").write_text("data: {slices: {best_of_8: {source: {sampled: {keep: all_right, least: 1.5}}}}}\n")
    assert planned(made, "keep.yaml") == {"choose_rows": 1, "train_sft": 1}
    (folder / "warm.yaml").write_text("data: {slices: {best_of_8: {source: {sampled: {temperature: 0.7}}}}}\n")
    assert planned(made, "warm.yaml") == {
        "sample": 2,
        "choose_rows": 4,
        "train_sft": 1,
        "train_kto": 1,
        "train_dpo": 2,
        "merge": 1,
    }
    try:
        (folder / "full.py").write_text(FULL.replace("float(", "2 * float("))
        assert planned(made) == {"choose_rows": 1, "train_sft": 1}
    finally:
        (folder / "full.py").write_text(FULL)
    said = made.run(
        "python", "-m", "workflow_scripts.tools.explain", ADAPTERS[0], "--configfile", *CONFIGS, "own.yaml", "warm.yaml"
    )
    lines = {line.split("  ")[0]: line for line in said.stdout.splitlines()}
    key = "data.slices.best_of_8.source.sampled.temperature: 1 -> 0.7"
    assert key in lines["data best_of_8 answers"] and "because of: data best_of_8 answers" in lines["data best_of_8"]
    assert "will run" in lines["rft adapter"] and "up to date" in lines["sft_v2 adapter"]


def test_results_that_came_without_records_are_adopted_and_verified(made):
    done = made.run("python", "-m", "workflow_scripts.tools.verify", "results", "--quick")
    assert "altered" not in done.stdout and "ancestor" not in done.stdout
    (made.folder / ".snakemake/metadata").rename(made.folder / ".snakemake/kept")
    try:
        refused = made.snakemake("-n", *ADAPTERS, configs=[*CONFIGS, "own.yaml"], check=False)
        assert refused.returncode and "here without a record" in refused.stderr
        made.run("python", "-m", "workflow_scripts.tools.adopt", "results")
        assert planned(made) == {}
    finally:
        if (made.folder / ".snakemake/metadata").exists():
            shutil.rmtree(made.folder / ".snakemake/metadata")
        (made.folder / ".snakemake/kept").rename(made.folder / ".snakemake/metadata")


# -- kills ----------------------------------------------------------------------------------------------------------------------

AFTER_SFT = ("rft", "kto_onpolicy", "dpo_onpolicy", "dpo_onpolicy_round2")
KILLED = ("sample", "choose_rows", "train_sft", "train_kto", "train_dpo")


def at_work(clone: kills.Runs, step: str) -> bool:
    """Whether a step of this kind has begun and not ended: its working folder says so."""
    for where in (clone.folder / "results/.work").glob("*/where.json"):
        try:
            if json.loads(where.read_text())["step"]["step"] == step and not (where.parent / "done").exists():
                return True
        except (OSError, ValueError):
            continue  # just removed, or just written
    return False


def start_over(clone: kills.Runs) -> None:
    """Remove all that is made from sft_v2's answers, the answers too."""
    for run in AFTER_SFT:
        shutil.rmtree(clone.folder / f"results/{run}")
    for path in (clone.folder / "results/data").iterdir():
        if path.name.split(".")[0] in ("best_of_8", "pairs_of_8", "labels_of_8", "dpo_onpolicy_round2"):
            path.unlink()
    shutil.rmtree(clone.folder / "results/.work")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("times, steps", [(1, ("sample", "choose_rows")), pytest.param(4, KILLED, marks=pytest.mark.long)])
def test_random_kills_in_sampling_choice_and_training_give_the_same_bytes(made, tmp_path, times, steps):
    """In `make test` steps are forks, spared their loading, and are killed within half a second from their beginning."""
    warmed = steps != KILLED
    clone = kills.Runs(made.folder).copy(tmp_path / "phaseline")
    expected = kills.results(clone)
    (clone.folder / "often.yaml").write_text("checkpoint_minutes: 1.0e-6\n")
    configs, draws, killed = [*CONFIGS, "own.yaml", "often.yaml"], random.Random(1), Counter[str]()
    for _ in range(times):
        start_over(clone)
        for step in steps:
            process = clone.start(*ADAPTERS, configs=configs, warmed=warmed)
            with contextlib.suppress(kills.Missed):  # it was made while another one was waited for
                kills.wait_for(functools.partial(at_work, clone, step), process, 1200, 0.05)
                time.sleep(draws.uniform(0, 0.5 if warmed else 10))
                killed[step] += at_work(clone, step)
            kills.kill_group(process)
            if warmed:
                warm.until_still(clone.folder)
        clone.finish(*ADAPTERS, configs=configs)
        assert kills.results(clone) == expected
    print(dict(killed))
    assert killed["sample"] and killed.total() >= 0.6 * times * len(steps)
