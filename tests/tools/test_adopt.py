"""Results without Snakemake's records are noticed, verified and adopted; what changed since then is planned as ever."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import Clone, make_clone
from tests.support.laid_out import lay_out, plan_of
from tests.support.right_way import sample
from workflow_scripts.plan import records
from workflow_scripts.tools import adopt

DPO = "results/ifeval_dpo.json"
ALONE = {"train_dpo": 1, "generate": 1, "score": 1}
FROM_SFT = {"train_sft": 1, "merge": 1, **ALONE}
BETA = "methods: {dpo: {train: {beta: 0.2}}}"


def adopted(clone: Clone, *args: str, check: bool = True) -> str:
    done = clone.run("python", "-m", "workflow_scripts.tools.adopt", *args, check=check)
    return done.stdout + done.stderr


def verified(clone: Clone, *args: str) -> tuple[int, str]:
    done = clone.run("python", "-m", "workflow_scripts.tools.verify", *args, check=False)
    return done.returncode, done.stdout + done.stderr


def forget(clone: Clone) -> None:
    shutil.rmtree(clone.folder / ".snakemake")


def stopped(clone: Clone, **options) -> str:
    """The line with which a dry run stops."""
    done = clone.snakemake("-n", DPO, check=False, **options)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if "make adopt" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


# -- noticing -----------------------------------------------------------------------------------------------------------------


def test_results_without_records_stop_the_pipeline_with_one_line(made):
    forget(made)
    line = stopped(made)
    assert line.startswith("results/data/ifeval.manifest.json and 13 more: here without a record") and "`make adopt`" in line


def test_one_lost_record_is_noticed_and_so_is_one_of_the_two_of_an_adapter(made):
    lost = records.record_file("results/dpo/adapter/adapter_model.safetensors")
    (made.folder / lost).unlink()
    assert stopped(made).startswith("results/dpo/adapter/manifest.json: here without")
    adopted(made)
    made.snakemake("--cleanup-metadata", "results/sft_v2/merged/manifest.json")  # which would be blind for good
    assert stopped(made).startswith("results/sft_v2/merged/manifest.json: here without")


def test_no_false_alarm(made):
    """Other people's files, runs of another config, an artifact whose manifest is gone, and what Snakemake itself will redo."""
    results = made.folder / "results"
    for file in (
        "ifeval_mine.json",
        "mine/adapter/manifest.json",
        "ifeval_dpo.seed1.json",
        "data/mine.manifest.json",
        "dpo/notes.md",
    ):
        (results / file).parent.mkdir(parents=True, exist_ok=True)
        (results / file).write_text("{}")
    (results / "sft_v2/merged/manifest.json").unlink()
    assert made.plan(DPO) == {}
    for out in ("results/dpo/adapter/manifest.json", "results/dpo/adapter/adapter_model.safetensors"):  # killed before the record
        (made.folder / records.record_file(out)).unlink()
        (made.folder / records.record_file(out, records.INCOMPLETE)).write_text('{"external_jobid": null}')
    assert made.plan(DPO)["train_dpo"] == 1


def test_results_that_were_copied_over_others_are_noticed_and_judged_by_what_they_are(made, tmp_path):
    other = make_clone(tmp_path / "other")
    other.overlay(BETA)
    lay_out(other, plan_of(other, "overlay.yaml"), ("score_ifeval", "dpo"))
    shutil.copytree(other.folder / "results/dpo", made.folder / "results/dpo", dirs_exist_ok=True)
    shutil.copy2(other.folder / DPO, made.folder / DPO)
    assert stopped(made).startswith("results/dpo/adapter/manifest.json and 2 more")
    assert "3 artifacts adopted, 0 left" in adopted(made)
    assert made.plan(DPO) == ALONE
    assert made.plan(DPO, configs=made.overlay(BETA)) == {}


def test_touched_and_copied_files_are_no_reason_to_stop(made, tmp_path):
    for path in (made.folder / "results").rglob("*"):
        os.utime(path)
    assert made.plan(DPO) == {}
    shutil.copytree(made.folder / "results", tmp_path / "copy")
    shutil.rmtree(made.folder / "results")
    shutil.copytree(tmp_path / "copy", made.folder / "results")  # newer than every record
    assert made.plan(DPO) == {}


# -- adopting -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", sample("scrambled", "one second", "as made", "reversed", n=2))
def test_after_adopting_a_change_is_planned_as_ever_whatever_the_times(made, order):
    forget(made)
    files = sorted(path for path in (made.folder / "results").rglob("*") if path.is_file())
    now = time.time() - 1000
    for i, path in enumerate(files):
        shift = {"as made": i, "reversed": -i, "scrambled": 37 * i % 11, "one second": 0}[order]
        os.utime(path, (now + shift, now + shift))
    assert "14 artifacts adopted, 0 left" in adopted(made)
    assert made.plan(DPO) == {}
    assert made.plan(DPO, configs=made.overlay(BETA)) == ALONE
    assert made.plan(DPO, configs=made.overlay("lora: {r: 8}")) == FROM_SFT
    assert "0 artifacts adopted, 0 left" in adopted(made)  # it is done once


def test_an_altered_adapter_is_named_and_made_again(made):
    forget(made)
    (made.folder / "results/dpo/adapter/adapter_model.safetensors").write_text("tampered")
    code, said = verified(made, "results", "--quick")
    assert code == 1
    assert "WRONG  results/dpo/adapter/manifest.json: adapter_model.safetensors has another content than when it was made" in said
    said = adopted(made)
    assert "results/dpo/adapter/manifest.json: adapter_model.safetensors has another content" in said
    assert "13 artifacts adopted, 1 left to be made again" in said
    assert made.plan(DPO) == ALONE and made.plan("results/ifeval_sft_v2.json") == {}
    assert made.plan(DPO, configs=made.overlay(BETA)) == ALONE
    (made.folder / "results/dpo/adapter/adapter_model.safetensors").write_text("adapter_model.safetensors of train dpo\n")
    assert "1 artifacts adopted, 0 left" in adopted(made)  # copied once more, whole this time
    assert made.plan(DPO) == {}


@pytest.mark.parametrize("change", ["step", "no json", "file list"])
def test_an_edited_manifest_is_named_and_made_again(made, change):
    forget(made)
    path = made.folder / "results/dpo/adapter/manifest.json"
    data = json.loads(path.read_text())
    if change == "step":
        data["step"]["config"]["train"]["beta"] = 0.3
    elif change == "file list":
        data["files"]["adapter_model.safetensors"] = "0" * 64
    path.write_text("{" if change == "no json" else json.dumps(data))
    said = adopted(made)
    assert said.startswith("results/dpo/adapter/manifest.json: ")
    if change == "no json":  # and its answers can't be traced to it
        assert "results/dpo/ifeval_responses.manifest.json: made from adapter" in said and "12 artifacts adopted, 2 left" in said
    else:
        assert "13 artifacts adopted, 1 left" in said
    assert made.plan(DPO) == ALONE


def test_what_lacks_its_ancestor_or_has_another_one_is_named_and_made_again(made):
    forget(made)
    for path in ("results/sft_v2/merged", "results/sft_v2/adapter"):
        shutil.rmtree(made.folder / path)
    said = adopted(made)
    assert "results/dpo/adapter/manifest.json: made from start results/sft_v2/merged/manifest.json, which is not here" in said
    assert made.plan(DPO) == FROM_SFT
    forget(made)
    made.overlay("methods: {sft: {train: {learning_rate: 1.0e-4}}}")
    lay_out(made, plan_of(made, "overlay.yaml"), ("merge", "sft_v2"))
    code, said = verified(made, "results", "--quick")
    assert code == 1 and "results/dpo/adapter/manifest.json: made from another start (" in said


def test_deleted_outputs_are_made_again_when_something_needs_them_and_only_then(made):
    forget(made)
    for file in ("dpo/adapter/adapter_model.safetensors", "sft_v2/merged/model.safetensors"):
        (made.folder / "results" / file).unlink()
    assert "14 artifacts adopted, 0 left" in adopted(made)
    assert made.plan(DPO) == {}
    assert made.plan(DPO, configs=made.overlay("generation: {backend: hf}")) == ALONE
    assert made.plan("results/dpo/adapter/adapter_model.safetensors") == {"train_dpo": 1}
    (made.folder / "results/dpo/adapter/adapter_config.json").unlink()  # no declared output: Snakemake would not miss it
    forget(made)
    assert "adapter_config.json is gone; snakemake makes it again" in adopted(made)


def test_another_results_folder_is_adopted_under_the_name_that_the_config_gives_it(made):
    configs = made.overlay("pathvars: {results: results/deep}")
    shutil.copytree(made.folder / "results", made.folder / "deep")
    shutil.move(made.folder / "deep", made.folder / "results/deep")
    done = made.snakemake("-n", "results/deep/ifeval_dpo.json", configs=configs, check=False)
    assert "`make adopt RESULTS=results/deep`" in done.stderr
    assert "results/deep: 14 artifacts adopted" in adopted(made, "--configfile", *configs)
    assert made.plan("results/deep/ifeval_dpo.json", configs=configs) == {}
    forget(made)
    assert "results: 28 artifacts adopted" in adopted(made, "results/")  # all configs at once
    assert made.plan("results/deep/ifeval_dpo.json", configs=configs) == {} == made.plan(DPO)


def test_snakemakes_working_directory_is_where_records_are_looked_for(made, tmp_path):
    for name in ("results", ".snakemake", "config", "profiles", "envs", "tests"):
        (tmp_path / "work").mkdir(exist_ok=True)
        shutil.move(made.folder / name, tmp_path / "work" / name)
    shutil.copytree(tmp_path / "work/config", made.folder / "config")
    shutil.copytree(tmp_path / "work/envs", made.folder / "envs")
    configs = [str(tmp_path / "work" / file) for file in ("config/config.yaml", "tests/support/config/micro.yaml")]
    command = ("-n", DPO, "--directory", str(tmp_path / "work"))
    done = made.snakemake(*command, configs=configs)
    assert "Nothing to be done" in done.stdout + done.stderr
    shutil.rmtree(tmp_path / "work/.snakemake")
    assert "make adopt" in made.snakemake(*command, configs=configs, check=False).stderr


def test_no_folder_is_one_clear_line(fresh):
    done = fresh.run("python", "-m", "workflow_scripts.tools.adopt", check=False)
    assert (
        done.returncode == 1
        and done.stderr == "error: results: no such folder; copy the results here first, or name their folder\n"
    )


def test_a_tampered_copy_is_adopted_and_comes_back_the_same(finished, clone):
    """The whole way, for real: rsync without .snakemake, one adapter tampered, adopt, run."""
    forget(clone)
    weights = clone.folder / "results/dpo/adapter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    shutil.rmtree(clone.folder / "results/.work")
    assert "13 artifacts adopted, 1 left to be made again" in adopted(clone)
    assert clone.plan(DPO) == ALONE
    clone.snakemake(DPO)
    code, said = verified(clone, "results")
    assert code == 0 and said == "14 artifacts in results: none with something wrong\n"
    for file in ("dpo/adapter/adapter_model.safetensors", "dpo/adapter/manifest.json", "ifeval_dpo.json"):
        assert (clone.folder / "results" / file).read_bytes() == (finished.folder / "results" / file).read_bytes()


# -- verifying ----------------------------------------------------------------------------------------------------------------


def test_scores_are_checked_against_the_responses(clone):
    path = clone.folder / DPO
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"prompt_level_strict_acc": 0.9}))
    code, said = verified(clone, "results")
    was = data["prompt_level_strict_acc"]
    assert (
        code == 1
        and f"{DPO}: prompt_level_strict_acc does not follow from results/dpo/ifeval_responses.manifest.json: 0.9" in said
    )
    assert f"should be {was}" in said and said.count("WRONG") == 1
    clone.edit("workflow_scripts/evaluation/ifeval.py", "random.seed(seed)", "random.seed(str(seed))")
    code, said = verified(clone, "results")
    assert code == 0 and f"note   {DPO}: not scored again: the scorer has changed since" in said


def test_a_copy_elsewhere_is_verified_by_itself(made, tmp_path):
    shutil.copytree(made.folder / "results", tmp_path / "elsewhere")
    shutil.rmtree(made.folder / "results")
    assert verified(made, str(tmp_path / "elsewhere"), "--quick")[0] == 0
    (tmp_path / "elsewhere/base/model.safetensors").write_text("other")
    code, said = verified(made, str(tmp_path / "elsewhere"), "--quick", "--json")
    report = json.loads(said)
    wrong = {Path(one["path"]).parent.name: one["problems"] for one in report["artifacts"] if one["problems"]}
    assert code == 1 and report["wrong"] == 1
    assert wrong == {"base": {"altered": ["model.safetensors has another content than when it was made"]}}


def test_what_manifests_state_is_said_and_is_not_wrong(made):
    path = made.folder / "results/sft_v2/merged/manifest.json"
    data = json.loads(path.read_text())
    path.write_text(
        json.dumps(data | {"package_mismatch": {"trl": {"locked": "1.16.0", "installed": "1.17.0"}}, "pinned": False})
    )
    (path.parent / "model.safetensors").unlink()
    forget(made)
    code, said = verified(made, "results", "--quick")
    assert code == 0
    for words in (
        "made with trl 1.17.0, the lock file says 1.16.0",
        "no pinned revision",
        "model.safetensors was deleted; it is rebuilt",
    ):
        assert f"note   results/sft_v2/merged/manifest.json: {words}" in said.replace("its source had ", "")


def test_a_record_that_was_touched_over_a_change_is_wrong(made):
    made.snakemake("--touch", DPO, configs=made.overlay("methods: {sft: {train: {learning_rate: 1.0e-4}}}"))
    code, said = verified(made, "results", "--quick")
    assert code == 1 and "results/sft_v2/adapter/manifest.json: Snakemake's record of manifest.json is of another step" in said


def test_a_manifest_that_was_edited_where_its_fingerprint_does_not_see_it(made):
    path = made.folder / "results/sft_v2/adapter/manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"objective": {"before": {"loss": 1}, "after": {"loss": 0}}}))
    code, said = verified(made, "results", "--quick")
    assert (
        code == 1 and "results/sft_v2/merged/manifest.json: results/sft_v2/adapter/manifest.json has another content than" in said
    )


# -- sharing ------------------------------------------------------------------------------------------------------------------

FINGERPRINTS = """
import json, sys
from workflow_scripts.config import config
from workflow_scripts.plan.plan import Plan
plan = Plan(config.load(*sys.argv[1:]))
plan.check()
steps = [("slice", name) for name in plan.config.data["data"]["slices"]] + [("base", "base")]
steps += [(kind, run) for run in plan.runs() for kind in ("train", "merge")]
steps += [(f"score_{task}", run) for run in ["base", *plan.runs()] for task in plan.config.evaluations]
print(json.dumps({" ".join(step): plan.fingerprint(*step) for step in steps}))
"""


def test_two_users_with_the_same_clone_config_and_data_get_the_same_fingerprints(tmp_path):
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(90)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    found = []
    for user, env in (
        ("ada", {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C"}),
        ("bob/deep er", {"OMP_NUM_THREADS": "64", "CUDA_VISIBLE_DEVICES": "0,1", "PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo"}),
    ):
        clone = make_clone(tmp_path / user / "phaseline")
        data = tmp_path / user / "my data"
        data.mkdir()
        (data / "pairs.jsonl").write_text(text)
        configs = clone.overlay(
            f"data: {{slices: {{mine: {{source: {{path: '{data}/pairs.jsonl'}}, kind: preference, rows: 64, seed: 1, heldout: 9}}"
            "}}\nexperiments: {dpo: {slice: mine}}\nseeds: [1, 2]\n"
        )
        settings = [f"{key}={value}" for key, value in env.items()]
        found.append(json.loads(clone.run("env", *settings, "python", "-c", FINGERPRINTS, *configs).stdout))
    assert found[0] == found[1] and len(found[0]) > 40
    assert found[0]["slice mine"] != found[0]["slice pairs"]


def test_looking_for_lost_records_costs_next_to_nothing(laid_out, monkeypatch):
    """Two names and a time for each artifact: nothing is opened."""
    monkeypatch.chdir(laid_out.folder)
    plan = plan_of(laid_out)
    opened = []
    for name in ("read", "agrees", "never_matches"):
        monkeypatch.setattr(records, name, lambda *_, name=name: opened.append(name))
    adopt.check(plan.config, plan.results)
    assert opened == []


def test_hashes_are_of_bytes(made):
    manifest = json.loads((made.folder / "results/base/manifest.json").read_text())
    content = (made.folder / "results/base/model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"] == hashlib.sha256(content).hexdigest()
