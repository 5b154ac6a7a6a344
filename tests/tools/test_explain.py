"""Why a phase would run: the states and reasons that `explain` gives, against changes made by hand. Nothing is trained:
manifests, Snakemake's records and the times of earlier runs are written as a finished run leaves them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import MICRO, Clone, make_clone
from tests.support import cpu
from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config
from workflow_scripts.plan import records
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import explain, graph
from workflow_scripts.tools.graph import Phase

DPO, MINE = "results/ifeval_dpo.json", "results/ifeval_dpo_mine.json"
CONFIGS = [*MICRO, "local.yaml", "overlay.yaml"]
LOCAL = """
data: {slices: {mine: {kind: preference, source: {path: mine.jsonl}, rows: 10, heldout: 2, seed: 1}}}
experiments: {dpo_mine: {extends: dpo, slice: mine}}
"""
BELOW_SFT = ("sft_v2 merged", "dpo adapter", "dpo ifeval answers", "dpo ifeval scores")
UPSTREAM = ["data ifeval", "base", "data sums_eval", "data sft", "sft_v2 adapter", "sft_v2 merged", "data pairs"]


def because_of(cause: str, *phases: str) -> dict[str, list[str]]:
    return {phase: [f"because of: {cause}"] for phase in phases}


BELOW_DPO = because_of("dpo adapter", "dpo ifeval answers", "dpo ifeval scores")


def plan_of(*configs: str) -> Plan:
    return Plan(config.load(*configs))


def write(plan: Plan, phase: Phase, seconds: float) -> None:
    """An artifact as its step leaves it (with a byte for weights), Snakemake's record, and the time that it took."""
    step, parents = plan.step(*phase), graph.parents(plan, phase)
    place = records.place_of(plan.results, *phase)
    listed = {
        role: {"path": graph.outputs(plan, parent)[0], "fingerprint": plan.fingerprint(*parent)}
        for role, parent in parents.items()
    }
    manifest = {"fingerprint": plan.fingerprint(*phase), "step": step, "files": {}, "parents": listed, "rows": {"kept": 64}}
    for out in place.outputs:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text("x")
    path = Path(place.manifest)
    path.write_text(manifests.dump(manifest))
    if path.name.endswith("manifest.json"):
        path.with_name(path.name.replace("manifest", "run")).write_text(manifests.dump({"seconds": seconds}))
    else:
        benchmark = Path(f"benchmarks/{phase.name}/{phase.kind}.tsv")
        benchmark.parent.mkdir(parents=True, exist_ok=True)
        benchmark.write_text(f"s\th:m:s\n{seconds}\t0:00:01\n")
    if phase.kind == "merge":
        path.with_name("model.safetensors").write_text("x")
    records.write(place, step, [one["path"] for one in listed.values()])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Clone:
    """A clone with everything that the two targets need. Do not change it."""
    clone = make_clone(tmp_path_factory.mktemp("explain") / "phaseline")
    pairs = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
    (clone.folder / "mine.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (clone.folder / "local.yaml").write_text(LOCAL)
    (clone.folder / "overlay.yaml").write_text("{}")
    before = os.getcwd()
    os.chdir(clone.folder)
    try:
        plan = plan_of(*CONFIGS)
        wanted = [Phase("score_ifeval", run) for run in ("dpo", "dpo_mine")]
        for number, phase in enumerate(graph.in_order(plan, wanted), start=1):
            write(plan, phase, 10.0 * number)
    finally:
        os.chdir(before)
    return clone


@pytest.fixture
def clone(made: Clone, tmp_path: Path, monkeypatch) -> Clone:
    shutil.copytree(made.folder, tmp_path / "phaseline", symlinks=True)
    monkeypatch.chdir(tmp_path / "phaseline")
    return Clone(tmp_path / "phaseline")


def run(clone: Clone, *args: str, check: bool = True):
    return clone.run("python", "-m", "workflow_scripts.tools.explain", *args, "--configfile", *CONFIGS, check=check)


def explained(clone: Clone, *targets: str) -> list[dict]:
    return json.loads(run(clone, *targets, "--json").stdout)


def in_state(rows: list[dict], state: str) -> dict[str, list[str]]:
    return {row["phase"]: row["reasons"] for row in rows if row["state"] == state}


def shown(rows: list[dict]) -> list[str]:
    return explain.lines([explain.Finding(**row) for row in rows], colour=False)


def will_run(clone: Clone, *targets: str, overlay: str = "{}") -> dict[str, list[str]]:
    """Phase -> reasons of what will run; checks that nothing is said to be stale that is not planned."""
    (clone.folder / "overlay.yaml").write_text(overlay)
    rows = explained(clone, *targets)
    assert not in_state(rows, "STALE")
    return in_state(rows, "will run")


def test_nothing_to_do_is_said_of_each_phase_in_the_order_of_the_graph_and_docstrings_are_nothing(clone):
    clone.edit("workflow_scripts/steps/train_sft.py", '"""Train a LoRA adapter', '"""Trains a LoRA adapter')
    rows = explained(clone, DPO)
    assert [row["phase"] for row in rows] == [*UPSTREAM, "dpo adapter", "dpo ifeval answers", "dpo ifeval scores"]
    assert all(row["state"] == "up to date" and not row["reasons"] and row["seconds"] is None for row in rows)
    assert rows[-1]["output"] == DPO and rows[1]["output"] == "results/base/manifest.json"


def test_beta_is_named_where_it_stands_and_the_jobs_are_those_of_snakemake_with_the_times_of_their_last_runs(clone):
    (clone.folder / "overlay.yaml").write_text("methods: {dpo: {train: {beta: 0.2}}}")
    rows = explained(clone, DPO)
    reasons = {"dpo adapter": ["methods.dpo.train.beta: 0.1 -> 0.2"], **BELOW_DPO}
    assert in_state(rows, "will run") == reasons
    assert [row["seconds"] for row in rows[-3:]] == [80.0, 90.0, 100.0]  # run.json, run.json, the benchmark
    assert sum(clone.plan(DPO, configs=CONFIGS).values()) == 3
    text = run(clone, DPO).stdout
    assert "dpo adapter         will run, 1 min 20 s  methods.dpo.train.beta: 0.1 -> 0.2\n" in text
    assert text.endswith("3 of 10 phases will run; expected time, one after another: 4 min 30 s\n")
    assert "\033" not in text


@pytest.mark.parametrize(
    ("target", "overlay", "expected"),
    [
        (
            DPO,
            "{methods: {sft: {train: {learning_rate: 1.0e-3}}}, experiments: {dpo: {train: {beta: 0.2}}}}",
            {
                "sft_v2 adapter": ["methods.sft.train.learning_rate: 0.002 -> 0.001"],
                "sft_v2 merged": ["because of: sft_v2 adapter"],
                "dpo adapter": ["experiments.dpo.train.beta: 0.1 -> 0.2", "parent sft_v2 merged will be made again"],
                **because_of("sft_v2 adapter, dpo adapter", "dpo ifeval answers", "dpo ifeval scores"),
            },
        ),
        (
            DPO,
            "{generation: {backend: hf}, eval: {precision: bf16, ifeval: {strip_think: true}}}",
            {
                "dpo ifeval answers": [
                    "generation.adapter: match -> (not set)",
                    "generation.backend: graphs -> hf",
                    "eval.batch_size: (not set) -> 12",
                    "eval.precision: fp32 -> bf16",
                ],
                "dpo ifeval scores": ["eval.ifeval.strip_think: false -> true", "parent dpo ifeval answers will be made again"],
            },
        ),
        (
            MINE,
            "{data: {slices: {mine: {heldout: 3}}, max_drop: 0.06}, lora: {dropout: 0.1}}",
            {
                "data sft": ["data.max_drop: 0.05 -> 0.06"],
                "sft_v2 adapter": ["lora.dropout: 0.05 -> 0.1", "input: rows of sft (kept 64 -> ?)"],
                "sft_v2 merged": ["because of: sft_v2 adapter"],
                "data mine": ["data.slices.mine.heldout: 2 -> 3", "data.max_drop: 0.05 -> 0.06"],
                "dpo_mine adapter": [
                    "lora.dropout: 0.05 -> 0.1",
                    "parent sft_v2 merged will be made again",
                    "input: rows of mine (kept 64 -> ?)",
                ],
                **because_of("sft_v2 adapter, dpo_mine adapter", "dpo_mine ifeval answers", "dpo_mine ifeval scores"),
            },
        ),
        (
            DPO,
            "experiments: {dpo: {start_from: base, slice: mine, train: {loss_type: ipo}}}",
            {
                "dpo adapter": [
                    "experiments.dpo.train.loss_type: sigmoid -> ipo",
                    "experiments.dpo.slice: pairs -> mine",
                    "experiments.dpo.start_from: sft_v2 -> base",
                ],
                **BELOW_DPO,
            },
        ),
        (
            "results/ifeval_new.seed2.json",
            "experiments: {new: {extends: dpo, start_from: base, train: {beta: 0.3}}}",
            {
                name: ["missing: never made"]
                for name in ("new.seed2 adapter", "new.seed2 ifeval answers", "new.seed2 ifeval scores")
            },
        ),
    ],
)
def test_a_change_of_the_config_is_told_by_its_keys(clone, target, overlay, expected):
    assert will_run(clone, target, overlay=overlay) == expected


def test_a_line_of_code_is_told_by_its_file(clone):
    path = clone.folder / "workflow_scripts/steps/train_sft.py"
    first = "from workflow_scripts.artifacts import"
    path.write_text(path.read_text().replace(first, f"from workflow_scripts.evaluation import numerals\n{first}", 1))
    reason = "code: steps/train_sft.py changed; evaluation/__init__.py, evaluation/numerals.py added"
    assert will_run(clone, DPO) == {"sft_v2 adapter": [reason], **because_of("sft_v2 adapter", *BELOW_SFT)}


def test_a_locked_version_a_template_and_a_row_are_told_as_such(clone):
    clone.edit("envs/requirements.lock", "trl==1.16.0", "trl==1.17.0")
    packages = ["packages: trl 1.16.0 -> 1.17.0"]
    assert will_run(clone, DPO) == {
        "sft_v2 adapter": packages,
        "sft_v2 merged": ["because of: sft_v2 adapter"],
        "dpo adapter": [*packages, "parent sft_v2 merged will be made again"],
        **because_of("sft_v2 adapter, dpo adapter", "dpo ifeval answers", "dpo ifeval scores"),
    }
    clone.edit("envs/requirements.lock", "trl==1.17.0", "trl==1.16.0")
    clone.edit("workflow_scripts/tiny/chat_template.jinja", "<|im_start|>", "<|im_start|> ")
    (reason,) = will_run(clone, "results/base/manifest.json")["base"]
    assert reason.startswith("code: tiny/") and reason.endswith(".py (or a file that it names) changed")
    clone.edit("workflow_scripts/tiny/chat_template.jinja", "<|im_start|> ", "<|im_start|>")
    clone.edit("mine.jsonl", "good", "better")
    assert will_run(clone, DPO, MINE) == {
        "data mine": ["external content: candidate rows of mine.jsonl changed"],
        **because_of("data mine", "dpo_mine adapter", "dpo_mine ifeval answers", "dpo_mine ifeval scores"),
    }


def test_missing_files_are_told_when_they_are_wanted_and_only_noted_before(clone):
    (clone.folder / "results/dpo/adapter/adapter_model.safetensors").unlink()
    (clone.folder / "results/sft_v2/merged/model.safetensors").unlink()
    shutil.rmtree(clone.folder / "results/sft_v2/adapter")
    rows = explained(clone, DPO)
    assert in_state(rows, "will run") == {}
    notes = {row["phase"]: (row["state"], row["reasons"]) for row in rows if row["reasons"]}
    later = "; made again when something needs it"
    assert notes == {
        "sft_v2 adapter": ("not needed", [f"not here: manifest.json, adapter_model.safetensors{later}"]),
        "sft_v2 merged": ("up to date", [f"not here: model.safetensors{later}"]),
        "dpo adapter": ("up to date", [f"not here: adapter_model.safetensors{later}"]),
    }
    (clone.folder / "overlay.yaml").write_text("eval: {ifeval: {max_new_tokens: 9}}")
    rows = explained(clone, DPO)
    found = in_state(rows, "will run")
    assert found["sft_v2 adapter"] == ["missing: never made"]  # nothing is left that says otherwise
    assert found["dpo adapter"] == [
        "missing: results/dpo/adapter/adapter_model.safetensors",
        "parent sft_v2 merged will be made again",
    ]
    assert found["dpo ifeval answers"] == [
        "eval.ifeval.max_new_tokens: 16 -> 9",
        "parent sft_v2 merged will be made again",
        "parent dpo adapter will be made again",
    ]
    unknown = shown(rows)
    assert "sft_v2 adapter      will run, time unknown  missing: never made" in unknown
    assert unknown[-1].endswith("expected time, one after another: 5 min 30 s, and 1 of unknown time")


def test_what_is_stale_but_not_planned_is_shouted_and_what_was_accepted_is_not(clone):
    (clone.folder / "overlay.yaml").write_text("methods: {dpo: {train: {beta: 0.2}}}")
    plan = plan_of(*CONFIGS)
    touched = [Phase("train", "dpo"), Phase("generate_ifeval", "dpo"), Phase("score_ifeval", "dpo")]
    for phase in touched:  # as `snakemake --touch` would leave the records
        records.write(records.place_of(plan.results, *phase), plan.step(*phase), [])
    rows = explained(clone, DPO)
    assert in_state(rows, "STALE") == {
        "dpo adapter": [explain.UNPLANNED, "methods.dpo.train.beta: 0.1 -> 0.2"],
        **{phase: [explain.UNPLANNED, *reasons] for phase, reasons in BELOW_DPO.items()},
    }
    assert "make adopt" in explain.UNPLANNED and not in_state(rows, "will run")
    assert shown(rows)[-1].startswith("STALE: 3 of 10 phases are not what is planned now")
    assert "nothing to be done" not in shown(rows)
    for phase in touched:
        made = manifests.read(graph.outputs(plan, phase)[0])
        entry = {"from": made.fingerprint, "to": plan.fingerprint(*phase), "step": plan.step(*phase)}
        note = {"accepted": [entry | {"what": [], "why": "a trial", "when": "2026-01-01T00:00:00Z"}]}
        manifests.accepted_file(made.path).write_text(json.dumps(note))
    rows = explained(clone, DPO)
    assert in_state(rows, "accepted") == {row["phase"]: ["accepted: a trial"] for row in rows[-3:]}
    assert not in_state(rows, "STALE")
    change = will_run(clone, DPO, overlay="methods: {dpo: {train: {beta: 0.4}}}")
    assert change["dpo adapter"] == ["methods.dpo.train.beta: 0.2 -> 0.4"]  # since it was accepted


def test_a_parent_that_was_remade_since_and_a_cut_off_manifest_are_told(clone):
    (clone.folder / "overlay.yaml").write_text("data: {slices: {pairs: {rows: 60}}}")
    write(plan_of(*CONFIGS), Phase("slice", "pairs"), 1.0)
    rows = explained(clone, DPO, MINE)
    assert in_state(rows, "will run") == {"dpo adapter": ["input: data pairs has changed since"], **BELOW_DPO}
    assert not in_state(rows, "STALE")
    Path(DPO).write_text(Path(DPO).read_text()[:100])
    cut = explain.explain(plan_of(*CONFIGS), [DPO], [])[-1]
    assert (cut.state, cut.reasons[0]) == ("STALE", explain.UNPLANNED)
    assert cut.reasons[1].startswith(f"manifest: {DPO} is no manifest, or cut off")


def test_a_mistake_is_one_line(clone):
    done = run(clone, "results/nope.json", check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: snakemake -n: No rule to produce results/nope.json")
    assert len(done.stderr.splitlines()) == 1
    (clone.folder / "overlay.yaml").write_text("methods: {dpo: {train: {betta: 0.2}}}")
    done = run(clone, DPO, check=False)
    assert done.returncode == 1 and "overlay.yaml: methods.dpo.train.betta: unknown key" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = clone.run("python", "-m", "workflow_scripts.tools.explain", "--configfile", *CONFIGS, DPO, check=False)
    assert (
        done.returncode == 1 and f"no target; --configfile took all of {' '.join(CONFIGS)} {DPO}: name one first" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


def test_it_costs_at_most_a_second_more_than_snakemake_n(clone):
    def cpu_seconds(*command: str) -> float:
        before = cpu.seconds()
        whole = [*command, DPO, "--configfile", *CONFIGS]  # processes of their own: the tool starts such a Snakemake too
        subprocess.run(whole, cwd=clone.folder, env=clone.environment(), capture_output=True, check=True)
        return cpu.seconds() - before

    own = cpu_seconds("python", "-m", "workflow_scripts.tools.explain") - cpu_seconds("snakemake", "-n")
    assert own < 1.0  # of the processor, so that a busy machine doesn't count; 0.3 to 0.4 s where it was measured


def test_a_job_that_the_plan_knows_nothing_of_is_shown_with_snakemakes_reason(clone):
    job = explain.Job("report", ["results/report.html"], "Missing output files: results/report.html", "")
    found = explain.explain(plan_of(*CONFIGS), ["results/report.html"], [job])
    assert [(one.phase, one.state, one.reasons, one.seconds) for one in found] == [
        ("rule report", "will run", ["Snakemake: Missing output files: results/report.html"], None)
    ]
    planned = explain.Job("train_dpo", ["results/dpo/adapter/manifest.json"], "Incomplete output files: x", "")
    dpo = explain.explain(plan_of(*CONFIGS), [], [planned])[-1]
    assert (dpo.phase, dpo.reasons) == ("dpo adapter", ["Snakemake: Incomplete output files: x"])
    plan = plan_of(*CONFIGS)
    records.write(records.place_of("results", "train", "dpo"), plan.step("train", "dpo"), [], left_out="adapter altered")
    assert explain.explain(plan, [], [planned])[-1].reasons == ["left by `make adopt`: adapter altered"]
