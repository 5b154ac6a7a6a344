"""A comparison that is published: frozen from results that were drawn, rebuilt without them; and the one in docs/studies."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy
import pytest

from tests.conftest import ROOT
from tests.support import report_world
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import study

NUMBER = r"(\d+\.\d+)"  # whole numbers are counts, seeds and colours: those are equal
PUBLISHED = sorted(archive.parent for archive in (ROOT / "docs/studies").rglob(study.ARCHIVE))
PAGES = {"main.html", "main.csv", "main_scores.csv", "main.svg"}


def made_elsewhere(folder: Path) -> None:
    """Each result in a folder with a config gets the step that it would have had on another machine."""
    plan = report_world.plan_of(folder)
    with contextlib.chdir(folder):
        for role in plan.step("report", "")["parents"]:
            for path, kind, run in study.phases(plan, role):
                data = json.loads(path.read_text())
                step = plan.step(kind, run)
                data |= {"step": step | {"code": {"elsewhere": "1"}}, "fingerprint": "f" * 32}
                path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def made(compared, tmp_path_factory) -> Path:
    """A folder with a config and its results, which were made elsewhere."""
    folder = shutil.copytree(compared, tmp_path_factory.mktemp("study") / "made")
    shutil.rmtree(folder / "results/report")
    made_elsewhere(folder)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def freeze(folder: Path, *more: Path) -> None:
    with contextlib.chdir(folder):
        study.freeze(Path("study"), {"main": [Path("world.yaml"), *more]}, [])


@pytest.fixture(scope="module")
def published(made, tmp_path_factory) -> tuple[Path, str]:
    """The study in a folder of its own, rebuilt there once without results or config; and what was said. Take a copy of it."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(made, folder / "here")
    freeze(folder / "here")
    shutil.move(folder / "here/study", folder / "study")
    shutil.rmtree(folder / "here")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert not study.rebuild(folder / "study", folder / "study")
    return folder / "study", said.getvalue()


def test_what_was_made_elsewhere_is_frozen_and_rebuilt_without_results_or_config(published, tmp_path, capsys):
    folder, said = published
    assert {path.name for path in folder.iterdir()} == PAGES | {"main.step.json", study.ARCHIVE}
    assert said.count("new") == 4
    shutil.copytree(folder, tmp_path / "study")
    assert study.rebuild(tmp_path / "study", tmp_path / "study")
    said = capsys.readouterr().out
    assert (
        said.count("as it was") == 4
        and "null control: passed" in said
        and "primary: dpo against sft_v2_merged: better by" in said
    )


def test_the_same_results_give_the_same_archive(copy):
    freeze(copy)
    first = (copy / "study" / study.ARCHIVE).read_bytes()
    for path in (copy / "results").rglob("*.json"):
        path.touch()
    freeze(copy)
    assert (copy / "study" / study.ARCHIVE).read_bytes() == first


def test_a_changed_verdict_is_another_page(copy, published, capsys):
    shutil.copytree(published[0], copy / "study")
    path = copy / "results/ifeval_dpo.json"
    data = json.loads(path.read_text())
    row = next(row for row in data["per_prompt"] if row["follow_instruction_list_strict"] == [True])
    row["follow_instruction_list_strict"] = [False]
    data["prompt_level_strict_acc"] -= 1 / data["n_prompts"]
    path.write_text(json.dumps(data))
    freeze(copy)
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in (copy / "study").iterdir()}
    assert not study.rebuild(copy / "study", copy / "study", check=True)
    assert "main_scores.csv: another than it was" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (copy / "study").iterdir()} == before  # a check leaves what it found


def test_a_phase_of_another_config_is_not_frozen(copy):
    (copy / "other.yaml").write_text("methods: {dpo: {train: {learning_rate: 0.123}}}\n")
    with pytest.raises(InputError, match=r"results/dpo/adapter/manifest.json: train.learning_rate: made with .*, planned 0.123"):
        freeze(copy, Path("other.yaml"))
    assert not (copy / "study").exists()


def test_a_missing_score_is_one_line(copy):
    (copy / "results/ifeval_kto.seed2.json").unlink()
    with pytest.raises(InputError, match=r"results/ifeval_kto\.seed2\.json"):
        freeze(copy)


def test_pages_of_several_folders_are_not_written_over_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study", "rebuild", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)])
    with pytest.raises(InputError, match="^--out takes the pages of one folder"):
        study.main()


def test_a_folder_that_is_none_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no results.tar.xz with a NAME.step.json"):
        study.rebuild(tmp_path, tmp_path)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_published_study_is_what_its_files_say(folder, tmp_path):
    """`make study`: the same bytes, but for what another processor's arithmetic does to a last digit. After a change of the
    report's code rebuild it, and look at what changed."""
    study.rebuild(folder, tmp_path)
    assert len(list(tmp_path.iterdir())) >= 4 * len(list(folder.glob("*.step.json")))
    for path in tmp_path.iterdir():
        new, old = (re.split(NUMBER, (where / path.name).read_text(encoding="utf-8")) for where in (tmp_path, folder))
        assert new[::2] == old[::2], f"{path.name}: python -m workflow_scripts.tools.study rebuild {folder}"
        assert numpy.allclose(numpy.array(new[1::2], float), numpy.array(old[1::2], float), rtol=1e-4, atol=0.11), path.name


def test_the_published_study_s_config_still_names_what_it_ran():
    """config/smollm2.yaml grows; what was not run then is null in study.yaml."""
    folder = ROOT / "docs/studies/smollm2"
    for name, more in (("ifeval", []), ("gsm8k", [folder / "gsm8k.yaml"])):
        plan = Plan(configs.load(ROOT / "config/smollm2.yaml", folder / "study.yaml", *more))
        plan.check()
        ran, step = json.loads((folder / f"{name}.step.json").read_text()), plan.step("report", "")
        assert set(step["parents"]) == set(ran["parents"])
        families = [{family["name"] for family in one["config"]["report"]["families"]} for one in (step, ran)]
        assert families[0] == families[1]
