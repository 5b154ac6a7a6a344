"""Snakemake's records as this pipeline reads and writes them: those of the pinned Snakemake, key by key."""

import json
import re
import shutil
from pathlib import Path

import pytest
from snakemake.persistence import RECORD_FORMAT_VERSION, MetadataRecord
from snakemake.persistence.file import FilePersistence
from snakemake.settings.types import DAGSettings

from tests.conftest import MICRO, make_clone
from workflow_scripts.artifacts.fingerprint import canonical
from workflow_scripts.config import config as configs
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan import records
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.records import place_of
from workflow_scripts.tools import adopt


def recorded(folder: Path) -> dict[str, dict]:
    """Every record, by the path of its file."""
    files = sorted(path for path in (folder / ".snakemake/metadata").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in files}


# -- the format ---------------------------------------------------------------------------------------------------------------


def test_records_are_those_that_snakemake_writes(clone, monkeypatch):
    theirs = recorded(clone.folder)
    shutil.rmtree(clone.folder / ".snakemake")
    monkeypatch.chdir(clone.folder)
    adopted, left = adopt.adopt("results")
    ours = recorded(clone.folder)
    assert not left and set(ours) == set(theirs) and len(ours) > 16
    for file, record in theirs.items():
        assert set(ours[file]) == set(record)
        for key in ("rule", "params", "record_format_version", "incomplete", "endtime"):
            assert ours[file][key] == record[key], (record["rule"], key)
        edges = {path: checksum for path, checksum in record["input_checksums"].items() if path.endswith("manifest.json")}
        assert edges == {path: ours[file]["input_checksums"].get(path) for path in edges}
    assert {record["rule"] for record in ours.values()} == {
        "slice_data", "make_base", "train_sft", "merge", "train_dpo", "generate", "score",
    }  # fmt: skip
    assert clone.plan("results/ifeval_dpo.json", "results/ifeval_sft_v2.json", "results/ifeval_base.json") == {}


def test_the_format_is_that_of_the_snakemake_that_is_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert records.FORMAT == RECORD_FORMAT_VERSION
    assert records.CHECKSUM_LIMIT == DAGSettings().max_checksum_file_size
    theirs = FilePersistence(path=tmp_path / ".snakemake")
    Path("x").mkdir()
    for out in ("results/dpo/adapter/manifest.json", "/a/" + "long/" * 60 + "manifest.json", "e/" * 95 + "m", "ü/>>>???.json"):
        assert str(records.record_file(out, tmp_path / "x")) == theirs._record_path(str(tmp_path / "x"), out)
    Path("out").mkdir()
    Path("out/ifeval_x.json").write_text("{}")
    place = place_of("out", "score_ifeval", "x")
    records.write(place, {"step": "score_ifeval", "parents": {}}, [])
    written = records.read(place.manifest)
    assert set(written) == set(MetadataRecord.model_fields)
    read = theirs._read_record(place.manifest)
    assert read is not None and read.rule == "score" and read.params == written["params"]


@pytest.fixture(scope="module")
def planned_by_snakemake(tmp_path_factory) -> dict[str, tuple[str, list[str]]]:
    """Manifest -> (rule, outputs) of every job of the micro config with a second seed, from a dry run on nothing."""
    fresh = make_clone(tmp_path_factory.mktemp("fresh") / "phaseline")
    said = fresh.snakemake("-n", configs=fresh.overlay("seeds: [1, 2]")).stdout
    jobs = re.findall(r"^rule (\w+):\n(?: {4}.*\n)*? {4}output: (.*)$", said, flags=re.M)
    return {outputs.split(", ")[0]: (rule, outputs.split(", ")) for rule, outputs in jobs if rule != "all"}


@pytest.mark.slow
def test_places_and_rules_are_those_of_the_rules(planned_by_snakemake):
    config = merge(read_yaml(MICRO[0]), merge(read_yaml(MICRO[1]), {"seeds": [1, 2]}))
    plan = Plan(configs.Config(config))
    keys = [("slice", name) for name in plan.config.data["data"]["slices"]] + [("base", "base")]
    for run in ["base", *plan.runs()]:
        tasks = [*plan.config.evaluations, "rm", ""]
        for kind in [kind for kind in records.kinds_of(run) if kind.partition("_")[2] in tasks]:
            if kind not in ("base", "merge") and (run != "base" or kind != "train"):
                if (kind == "eval_rm") == (run != "base" and plan.is_reward_model(run)) or kind == "train":
                    keys.append((kind, run))
    keys += [("merge", "sft_v2"), ("merge", "sft_v2.seed2")]
    ours = {}
    for key in keys:
        place = place_of(plan.results, *key)
        ours[place.manifest] = (records.rule_of(key[0], plan.step(*key)), list(place.outputs))
    assert ours == planned_by_snakemake and len(ours) > 60


# -- reading ------------------------------------------------------------------------------------------------------------------


def test_what_lies_in_a_results_folder_is_found_and_other_peoples_files_are_not(made, monkeypatch):
    monkeypatch.chdir(made.folder)
    before = list(records.find("results"))
    assert {(place.kind, place.name) for place in before} == {
        *(("slice", name) for name in ("ifeval", "sums_eval", "sft", "pairs")), ("base", "base"),
        ("merge", "sft_v2"), ("train", "sft_v2"), ("train", "dpo"),
        *((f"{verb}_ifeval", run) for run in ("base", "sft_v2", "dpo") for verb in ("generate", "score")),
    }  # fmt: skip
    others = [
        "results/notes.json", "results/ifeval_.json", "results/ifeval_dpo.txt", "results/dpo/manifest.json",
        "results/report.html", "results/dpo/adapter/README.md", "results/arc_dpo.json", "results/data/mine.jsonl",
        "results/accepted.ifeval_dpo.json", "results/Mine/adapter/manifest.json", "results/dpo/ifeval_responses.run.json",
        "results/.work/x/done/manifest.json",
    ]  # fmt: skip
    for other in others:
        Path(other).parent.mkdir(parents=True, exist_ok=True)
        Path(other).write_text("{}")
    assert list(records.find("results")) == before
    assert list(records.find("nowhere")) == [] and records.folders("nowhere") == []
    shutil.copytree("results", "deeper/results/qwen05b")
    assert records.folders("deeper") == ["deeper/results/qwen05b"] and records.folders("results") == ["results"]


def test_a_record_is_of_one_step_and_of_no_other(made, monkeypatch):
    monkeypatch.chdir(made.folder)
    out = "results/dpo/adapter/manifest.json"
    step = json.loads(Path(out).read_text())["step"]
    assert records.agrees(out, step) and records.agrees(out, {"step": "x"}, step)
    assert not records.agrees(out, step | {"seed": 2}) and not records.agrees(out)
    assert records.read(out)["params"] == sorted([repr("train_dpo"), repr(canonical(step))])
    assert records.never_matches(out) is None and not records.is_incomplete(out)
    records.write(place_of("results", "train", "dpo"), step, [], left_out="altered")
    assert records.never_matches(out) == "altered" and not records.agrees(out, step)
    records.record_file(out).write_text('{"params": [')
    assert records.read(out) is None and not records.agrees(out, step) and records.never_matches(out) is None
