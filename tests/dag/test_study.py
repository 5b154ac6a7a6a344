"""The study's config end to end in small, from a hub of local folders: tests/support/study.py says how, and what differs.

Its sources and its plan here; every target of it, with `make test-study` (some ten minutes on two cores).
"""

import json
import re
import sys

import pytest

from tests.conftest import ROOT, make_clone
from tests.support import study
from tests.support.study import STUDY
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan

SIZES = re.compile(r"(rows|heldout|max_new_tokens|max_completion_length|batch_size|pathvars\.\w+|seeds|threads): ")
# No sizes. A CPU computes in fp32; sixty rows are too few for a limit on dropped ones; three steps teach a reward model nothing.
OTHERS = {
    "device",
    "precision",
    "eval.precision",
    "data.max_drop",
    *(f"methods.{method}.max_left_out" for method in ("dpo", "simpo", "orpo", "kto", "rm")),
    "methods.ppo.require_reward_above_chance",
    *(f"data.slices.{name}.source.sampled.require_reward_above_chance" for name in ("best_of_8", "pairs_of_8")),
    "data.slices.best_of_8.source.sampled.n",
}


def test_only_sizes_and_paths_differ_from_the_study():
    found = study.differences()
    assert {line.split(": ")[0] for line in found if not SIZES.search(line.split(" -> ")[0] + ": ")} <= OTHERS, found
    assert len(found) > 20
    ours, theirs = (configs.load(*[ROOT / name for name in files]) for files in (STUDY, STUDY[:1]))
    assert ours.experiments.keys() == theirs.experiments.keys() and ours.evaluations == theirs.evaluations
    for name, body in ours.experiments.items():
        own, other = study.flat(body), study.flat(theirs.experiments[name])
        changed = {key for key in own if own[key] != other[key]}
        assert changed <= {"train.max_completion_length", "max_left_out", "require_reward_above_chance"}, name


@pytest.fixture
def hub(tmp_path):
    """A running hub of the study's repositories: (what was asked of it, the variables by which it is found)."""
    study.make_hub(tmp_path / "hub")
    server, address = study.serve(tmp_path / "hub")
    yield server.RequestHandlerClass.asked, address
    server.shutdown()


def test_its_models_and_rows_come_from_the_hub_at_their_revisions(hub, tmp_path):
    clone = make_clone(tmp_path / "phaseline")
    asked, clone.variables = hub
    plan = Plan(configs.load(*[ROOT / name for name in STUDY]))
    targets = ["base/manifest.json", "instruct/manifest.json"]
    targets += [f"data/{name}.manifest.json" for name in ("sft", "pairs", "prompts")]
    clone.snakemake("--cores", "2", *[f"results/study/{target}" for target in targets], configs=STUDY)
    made = {target.split(".")[0]: json.loads((clone.folder / "results/study" / target).read_text()) for target in targets}
    for name in ("base", "instruct"):
        manifest = made[f"{name}/manifest"]
        assert manifest["pinned"] and manifest["revision"] == plan.config.models[name]["hub"]["revision"]
        assert manifest["end_of_turn"] == "<|im_end|>" and manifest["template"]["origin"].startswith("TRL's training template")
        assert manifest["template"]["in_loss"].count("<|im_end|>") == 2
    assert made["base/manifest"]["template"]["eos_token_was"] == "<|endoftext|>"  # a base model ends documents, not turns
    for name, rows in {"sft": 60, "pairs": 60, "prompts": 80}.items():
        lines = [json.loads(line) for line in (clone.folder / f"results/study/data/{name}.jsonl").read_text().splitlines()]
        dropped = sum(made[f"data/{name}"]["dropped"].values())
        assert len(lines) + dropped == rows and len(lines) > rows / 2
    pinned = {line.split(" ", 1)[1] for line in asked}
    wanted = {(body["hub"]["id"], body["hub"]["revision"]) for body in plan.config.models.values()}
    slices = plan.config.data["data"]["slices"].values()
    wanted |= {(body["source"]["hub"], body["source"]["revision"]) for body in slices if "hub" in body["source"]}
    assert pinned == {f"{name} {revision}" for name, revision in wanted}

    planned = clone.plan("all", "results/study/report/comparison.html", configs=STUDY)
    methods = {body["method"] for body in plan.config.experiments.values()}
    assert {rule for rule in planned if rule.startswith("train_")} == {f"train_{method}" for method in methods}
    assert "make_base" not in planned and planned["report"] == 1


@pytest.mark.long
@pytest.mark.timeout(study.LIMIT)
def test_every_target_of_the_study(tmp_path, hub):
    clone = make_clone(tmp_path / "phaseline")
    clone.limit, clone.variables = study.LIMIT, hub[1]
    clone.snakemake("all", "results/study/report/comparison.html", "--cores", "2", configs=STUDY)
    plan = Plan(configs.load(*[ROOT / name for name in STUDY]))
    for run in ["base", "instruct", *plan.runs()]:
        for file in plan.results_of(run):
            assert (clone.folder / file).is_file(), file
    assert clone.plan("all", "results/study/report/comparison.html", configs=STUDY) == {}
    print((clone.folder / "results/study/report/comparison.csv").read_text(), file=sys.stderr)
