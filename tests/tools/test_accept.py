"""`make accept`: one change does not matter for one artifact and what is made from it; anything else counts as ever."""

import json
import shutil

import pytest

from tests.conftest import Clone
from tests.support.laid_out import lay_out, plan_of
from tests.tools.test_adopt import ALONE, BETA, DPO, FROM_SFT, adopted, forget, verified
from workflow_scripts.artifacts import fingerprint, manifests
from workflow_scripts.plan import records

SFT = "results/sft_v2/adapter/manifest.json"
ADAPTER = "results/dpo/adapter/manifest.json"
WHY = 'only a log line, "no number" changed'
STEP = "workflow_scripts/steps/train_sft.py"


def accept(clone: Clone, target: str, *more: str, why: str = WHY, configs: list[str] | None = None) -> str:
    """What the command says; it begins with "error" where it refuses."""
    configs = configs or ["config/config.yaml", "tests/support/config/micro.yaml"]
    command = ("python", "-m", "workflow_scripts.tools.accept", target, "--reason", why, "--configfile", *configs, *more)
    done = clone.run(*command, check=False)
    assert done.returncode == done.stderr.startswith("error: "), done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    return done.stdout + done.stderr.removeprefix("error: ")


def edit(clone: Clone) -> None:
    """A line of logic in SFT's step that changes no number: what a user would accept."""
    clone.edit(STEP, "\n\nif __name__ ==", "\n\nLABEL = 'sft'\n\n\nif __name__ ==")


def note(clone: Clone, manifest: str) -> list[dict]:
    return json.loads(manifests.accepted_file(clone.folder / manifest).read_text())["accepted"]


# -- accepting ----------------------------------------------------------------------------------------------------------------


def test_a_change_is_accepted_with_what_differs_only_by_it_and_later_changes_count(made):
    edit(made)
    assert made.plan(DPO) == FROM_SFT
    said = accept(made, SFT)
    assert f"accepted  {SFT}: code: steps/train_sft.py changed" in said
    assert f"accepted  {DPO}: parents.responses: " in said
    assert said.count("accepted ") == 7 and "stale" not in said  # SFT, its merge; answers and scores of both; the DPO adapter
    assert made.plan(DPO, "results/ifeval_sft_v2.json") == {}
    assert made.plan(DPO, configs=made.overlay(BETA)) == ALONE
    assert made.plan(DPO, configs=made.overlay("methods: {sft: {train: {learning_rate: 1.0e-4}}}")) == FROM_SFT
    made.edit(STEP, "LABEL = 'sft'", "LABEL = 'SFT'")  # the same line again
    assert made.plan(DPO) == FROM_SFT


def test_the_note_says_what_why_when_and_from_which_fingerprint_to_which(made):
    before = json.loads((made.folder / SFT).read_text())
    edit(made)
    accept(made, SFT)
    assert json.loads((made.folder / SFT).read_text()) == before  # the manifest still says how it was made
    [entry] = note(made, SFT)
    assert (
        entry["what"] == ["code: steps/train_sft.py changed"] and entry["why"] == WHY and entry["from"] == before["fingerprint"]
    )
    assert entry["to"] != entry["from"] and {**entry["step"], "code": 0} == {**before["step"], "code": 0}
    assert entry["when"].endswith("Z") and "who" not in entry
    [below] = note(made, DPO)
    assert below["with"] == SFT and (made.folder / "results/accepted.ifeval_dpo.json").exists()
    code, said = verified(made, "results", "--quick")
    assert code == 0 and f"note   {SFT}: accepted {entry['when'][:10]}, {WHY!r}: code: steps/train_sft.py changed" in said
    assert made.run("python", "-m", "workflow_scripts.tools.status").stdout.count("ifeval") == 0  # no run called accepted


def test_what_has_a_change_of_its_own_stays_stale(made):
    edit(made)
    configs = made.overlay(BETA)
    said = accept(made, SFT, configs=configs)
    assert f"stale     {ADAPTER}: has changed in another way as well" in said
    assert made.plan(DPO, configs=configs) == ALONE
    assert made.plan("results/ifeval_sft_v2.json", configs=configs) == {}
    assert "beta: 0.1 -> 0.2" in accept(made, ADAPTER, configs=configs)  # the config's tiny beta is 0.1
    assert made.plan(DPO, configs=configs) == {}
    assert made.plan(DPO) == ALONE  # back at 0.1: accepted is one value, not every value


def test_one_leaf_of_many(made):
    made.edit("workflow_scripts/steps/generate.py", "bar.close()", "bar.close()\n    del bar")
    said = accept(made, "results/dpo/ifeval_responses.jsonl")  # any output of the artifact names it
    assert said.count("accepted ") == 2
    assert made.plan(DPO) == {}
    assert made.plan("results/ifeval_sft_v2.json") == {"generate": 1, "score": 1}


def test_of_two_experiments_with_equal_settings_the_one_that_is_named(made):
    configs = made.overlay("experiments: {sft_copy: {extends: sft_v2}, dpo_copy: {extends: dpo, start_from: sft_copy}}")
    lay_out(made, plan_of(made, "overlay.yaml"), ("train", "sft_copy"), ("merge", "sft_copy"), ("score_ifeval", "dpo_copy"))
    assert made.plan(DPO, "results/ifeval_dpo_copy.json", configs=configs) == {}
    edit(made)
    said = accept(made, "results/sft_copy/adapter/manifest.json", configs=configs)
    assert "accepted  results/dpo_copy/adapter/manifest.json" in said and ADAPTER not in said
    assert made.plan("results/ifeval_dpo_copy.json", configs=configs) == {}
    assert made.plan(DPO, configs=configs) == FROM_SFT


def test_a_second_acceptance_adds_to_the_first(made):
    edit(made)
    accept(made, SFT)
    made.edit(STEP, "LABEL = 'sft'", "LABEL = 'SFT'")
    assert accept(made, SFT, why="the case of a label").count("accepted ") == 7
    assert [entry["why"] for entry in note(made, SFT)] == [WHY, "the case of a label"]
    assert made.plan(DPO) == {}
    assert "nothing to accept" in accept(made, SFT) and len(note(made, SFT)) == 2


def test_taking_the_change_back_is_settled_by_accepting_it(made):
    text = (made.folder / STEP).read_text()
    edit(made)
    accept(made, SFT)
    (made.folder / STEP).write_text(text)
    assert made.plan(DPO) == FROM_SFT  # Snakemake compares with what it has on record
    assert "as the config plans it" in accept(made, SFT, why="taken back")
    assert made.plan(DPO) == {}


def test_a_kill_between_note_and_record_is_finished_by_the_same_command(made):
    shutil.copytree(made.folder / ".snakemake", made.folder / "before")
    edit(made)
    accept(made, SFT)
    shutil.rmtree(made.folder / ".snakemake")
    (made.folder / "before").rename(made.folder / ".snakemake")
    assert made.plan(DPO) == FROM_SFT
    accept(made, SFT)
    assert made.plan(DPO) == {}


def test_adopting_keeps_what_was_accepted(made):
    edit(made)
    accept(made, SFT)
    forget(made)
    assert "14 artifacts adopted, 0 left" in adopted(made)
    assert made.plan(DPO) == {}
    assert made.plan(DPO, configs=made.overlay(BETA)) == ALONE
    shutil.copytree(made.folder / "results", made.folder / "copy")  # newer than the records: compared, and found to agree
    shutil.rmtree(made.folder / "results")
    (made.folder / "copy").rename(made.folder / "results")
    assert made.plan(DPO) == {}


def test_an_artifact_that_was_made_again_is_not_what_was_accepted(made, monkeypatch):
    edit(made)
    accept(made, SFT)
    manifest = made.folder / SFT
    old = manifests.read(manifest)
    assert old.stands_for() == {old.fingerprint, note(made, SFT)[0]["to"]}
    data = json.loads(manifest.read_text())
    step = data["step"] | {"seed": 99}
    manifest.write_text(json.dumps(data | {"step": step, "fingerprint": fingerprint.fingerprint(step)}))
    assert manifests.read(manifest).stands_for() == {fingerprint.fingerprint(step)}


# -- refusing -----------------------------------------------------------------------------------------------------------------


def test_a_stale_ancestor_is_named_and_nothing_is_written(made):
    edit(made)
    said = accept(made, DPO)
    assert said.startswith(
        f"{DPO}: made from {SFT}, which is stale itself (code: steps/train_sft.py changed); accept that change first"
    )
    assert accept(made, ADAPTER).startswith(f"{ADAPTER}: made from {SFT}, which is stale itself")
    assert not list(made.folder.rglob("*accepted*.json")) and made.plan(DPO) == FROM_SFT


@pytest.mark.parametrize(
    ("target", "why", "words"),
    [
        (SFT, "", "say why the change does not matter"),
        (SFT, "  ", "say why the change does not matter"),
        ("results/ifeval_nothing.json", WHY, "results/ifeval_nothing.json: not an output of this config; name a manifest"),
        ("results/ifeval_kto.json", WHY, "results/ifeval_kto.json: not here, so there is nothing to accept"),
        ("config/config.yaml", WHY, "config/config.yaml: not an output of this config"),
    ],
)
def test_refusals_are_one_line(made, target, why, words):
    edit(made)
    assert words in accept(made, target, why=why)
    assert not list(made.folder.rglob("*accepted*.json"))


def test_an_altered_file_is_no_change_to_accept(made):
    edit(made)
    (made.folder / "results/sft_v2/adapter/adapter_model.safetensors").write_text("tampered")
    said = accept(made, SFT)
    assert (
        f"{SFT}: adapter_model.safetensors has another content than when it was made; a change of the file itself can't be"
        in said
    )
    assert made.plan(DPO) == FROM_SFT


def test_without_records_adopting_comes_first(made):
    edit(made)
    forget(made)
    assert "Snakemake has no record of it; run `make adopt` first" in accept(made, SFT)
    assert "Snakemake has no record of it; run `make adopt` first" in accept(made, ADAPTER)


def test_what_is_planned_can_not_be_accepted_for_what_was_made_from_something_older(made):
    """DPO's adapter was made from an SFT of another learning rate, which has been made again since: a real difference."""
    path = made.folder / "results/sft_v2"
    shutil.rmtree(path)
    for out in ("adapter/manifest.json", "adapter/adapter_model.safetensors", "merged/manifest.json"):
        (made.folder / records.record_file(f"results/sft_v2/{out}")).unlink()
    configs = made.overlay("methods: {sft: {train: {learning_rate: 1.0e-4}}}")
    lay_out(made, plan_of(made, "overlay.yaml"), ("merge", "sft_v2"))
    edit(made)
    said = accept(made, SFT, configs=configs)
    assert f"stale     {ADAPTER}" in said and f"accepted  {SFT}" in said and "accepted  results/sft_v2/merged" in said
    assert made.plan(DPO, configs=configs) == ALONE


# -- going on from it -----------------------------------------------------------------------------------------------------------


def test_a_new_experiment_starts_from_an_artifact_that_was_accepted(clone):
    edit(clone)
    assert clone.plan(DPO) == FROM_SFT
    accept(clone, SFT)
    configs = clone.overlay("experiments: {dpo_more: {extends: dpo, train: {beta: 0.2}}}")
    assert clone.plan("results/ifeval_dpo_more.json", configs=configs) == ALONE
    clone.snakemake("results/ifeval_dpo_more.json", configs=configs)
    made = json.loads((clone.folder / "results/dpo_more/adapter/manifest.json").read_text())
    merged = manifests.read(clone.folder / "results/sft_v2/merged/manifest.json")
    assert made["parents"]["start"]["fingerprint"] == merged.fingerprint  # what it was really made from
    assert made["step"]["parents"]["start"] == note(clone, "results/sft_v2/merged/manifest.json")[0]["to"]
    code, said = verified(clone, "results")
    assert code == 0 and "17 artifacts in results: none with something wrong" in said
    assert clone.plan("results/ifeval_dpo_more.json", DPO, configs=configs) == {}
    (clone.folder / "results/sft_v2/merged/model.safetensors").unlink()  # rebuilt from an adapter that was accepted
    more = clone.overlay("experiments: {dpo_more: {extends: dpo, train: {beta: 0.3}}}")
    clone.snakemake("results/dpo_more/adapter/manifest.json", configs=more)
