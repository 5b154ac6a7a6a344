"""A published comparison with tuned methods: development scores and trials are in its files; a second study beside the first."""

import contextlib
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.report.test_sensitivity import ACCURACY, overlay
from tests.support import report_world
from tests.tools.test_study import made_elsewhere
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import runs, study

FOLDER = ROOT / "docs/studies/smollm2/second"


def second(*names: str) -> Plan:
    return Plan(configs.load(ROOT / "config/smollm2.yaml", *(FOLDER / f"{name}.yaml" for name in ("common", *names))))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Frozen from results that were drawn, which are gone; rebuilt once."""
    folder = tmp_path_factory.mktemp("tuned")
    config = report_world.write_config(folder, seeds=2, overlay=overlay())
    report_world.make(folder, config, accuracy=ACCURACY)
    made_elsewhere(folder)
    with contextlib.chdir(folder):
        study.freeze(Path("studies/one/second"), {"tuned": [config]}, [])
    shutil.rmtree(folder / "results")
    config.unlink()
    with contextlib.chdir(folder):
        assert not study.rebuild(Path("studies/one/second"), Path("studies/one/second"))
    return folder / "studies/one/second"


def test_the_picture_of_the_grid_is_made_from_the_files_alone(published, capsys):
    assert {path.name for path in published.iterdir()} == {
        study.ARCHIVE,
        *(f"tuned{end}" for end in (".step.json", ".html", ".csv", "_scores.csv", ".svg", "_sensitivity.svg")),
    }
    picture = (published / "tuned_sensitivity.svg").read_text()
    assert "dpo_tuned, by prompt_level_strict_acc" in picture and "kto_tuned" in picture
    assert (
        "the best learning_rate is the largest that was tried (0.005) in 2 of 2 seeds" in (published / "tuned.html").read_text()
    )
    assert study.rebuild(published, published) and capsys.readouterr().out.count("as it was") == 5


def test_several_folders_are_looked_at_and_the_one_that_differs_is_named(published, tmp_path, monkeypatch, capsys):
    same, other = (shutil.copytree(published, tmp_path / name) for name in ("same", "other"))
    (other / "tuned_sensitivity.svg").write_text("drawn by hand")
    monkeypatch.setattr(sys, "argv", ["study", "rebuild", str(same), str(other), "--check"])
    with pytest.raises(SystemExit) as ended:
        runs.command(study.main)
    said = capsys.readouterr()
    assert ended.value.code == 1 and f"{other}: not as it was" in said.err and str(same) not in said.err
    assert f"{other}/tuned_sensitivity.svg: another than it was" in said.out


@pytest.mark.parametrize(
    "laid",
    [
        "",
        "ppo",
        "ppo placebo",
        "ppo own",
        "precision",
        "precision ranks",
        "precision losses",
        "kto",
        "sft",
        "sources",
        "ppo placebo precision ranks losses kto sft own sources five_seeds",
    ],
)
def test_each_comparison_of_the_second_run_stands_alone(laid):
    """What is not finished is left out, whole: each file goes without the others, but for what it says that it is laid over."""
    plan = second(*laid.split())
    plan.check()
    files = {name: [f"{name}{seed}.json" for seed in ("", ".seed2", ".seed3")] for name in ("dev_dpo_t1", "ifeval_dpo_tuned")}
    assert {f"results/smollm2_second/{file}" for each in files.values() for file in each} <= set(plan.report_inputs())


def test_what_is_laid_over_changes_nothing_of_the_others():
    """So stages may follow each other on one folder, and what is left out need not be made again."""
    few, all_of_it = second("ppo"), second("ppo", "placebo", "precision", "ranks", "losses", "kto", "sft", "own", "sources")
    for phase, run in [
        ("train", "dpo_tuned"),
        ("train", "dpo_t1.seed3"),
        ("train", "ppo.seed2"),
        ("score_ifeval", "sft_v2"),
        ("score_dev", "dpo"),
    ]:
        assert few.fingerprint(phase, run) == all_of_it.fingerprint(phase, run), (phase, run)


def test_each_tuned_method_has_four_trials_and_two_have_the_same_multiples():
    tuned = second("kto", "sft").config.tuned
    assert {name: len(one.trials) for name, one in tuned.items()} == {"dpo_tuned": 4, "kto_tuned": 4, "sft_v2_tuned": 4}
    rates = {name: [point["train.learning_rate"] for point in one.trials.values()] for name, one in tuned.items()}
    assert rates["dpo_tuned"] == rates["kto_tuned"] == [1.5e-5, 5e-5, 1.5e-4, 5e-4]
    assert max(rates["sft_v2_tuned"]) == 2e-4 and [*tuned["dpo_tuned"].trials][1] == "dpo"
