"""The main job end to end on the micro config, and what a change makes stale: exactly that, never less."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import Clone, make_clone
from tests.support import cpu

DPO = "results/ifeval_dpo.json"
ALL = {"slice_data": 4, "make_base": 1, "train_sft": 1, "merge": 1, "train_dpo": 1, "generate": 1, "score": 1}
DPO_ALONE = {"train_dpo": 1, "generate": 1, "score": 1}
FROM_SFT = {"train_sft": 1, "merge": 1, "train_dpo": 1, "generate": 1, "score": 1}


def hashes(clone: Clone) -> dict[str, str]:
    """Deterministic results: adapters, merged weights, manifests, answers, scores, slices."""
    root = clone.folder / "results"
    files = [p for p in root.rglob("*") if p.is_file() and ".work" not in p.parts and not p.name.endswith("run.json")]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def test_each_phase_is_an_artifact_whose_manifest_names_its_parents(finished):
    results = finished.folder / "results"
    scores = json.loads((results / "ifeval_dpo.json").read_text())
    assert scores["n_prompts"] == len(scores["per_prompt"]) == 24
    responses = json.loads((results / "dpo/ifeval_responses.manifest.json").read_text())
    dpo = json.loads((results / "dpo/adapter/manifest.json").read_text())
    merged = json.loads((results / "sft_v2/merged/manifest.json").read_text())
    sft = json.loads((results / "sft_v2/adapter/manifest.json").read_text())
    base = json.loads((results / "base/manifest.json").read_text())
    assert scores["parents"]["responses"]["fingerprint"] == responses["fingerprint"]
    assert responses["parents"]["adapter"]["fingerprint"] == dpo["fingerprint"]
    assert responses["parents"]["start"]["fingerprint"] == merged["fingerprint"]
    assert dpo["base"] == {"path": "results/sft_v2/merged", "weights_sha256": merged["files"]["model.safetensors"]}
    assert merged["parents"]["adapter"]["fingerprint"] == sft["fingerprint"]
    assert sft["base"]["weights_sha256"] == base["files"]["model.safetensors"]
    assert sft["adapter_moved"] == dpo["adapter_moved"] == 1.0
    assert dpo["objective"]["before"]["loss"] == pytest.approx(0.693147)  # ln 2: policy and reference are one at the start
    assert dpo["objective"]["after"]["margin"] != dpo["objective"]["before"]["margin"] == 0
    config = json.loads((results / "dpo/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "results/sft_v2/merged"
    run = json.loads((results / "dpo/adapter/run.json").read_text())
    assert {"git_commit", "git_dirty", "host", "seconds", "peak_memory_bytes", "tokens", "packages"} <= set(run)
    assert run["tokens"] > 0
    metrics = (results / "dpo/adapter/metrics.csv").read_text().splitlines()
    assert "loss" in metrics[0] and len(metrics) > 1


def test_a_second_run_has_nothing_to_do_and_says_so_at_once(clone):
    before = cpu.seconds()
    done = clone.snakemake(DPO)
    assert "Nothing to be done" in done.stdout + done.stderr
    assert cpu.seconds() - before < 10  # 1.5 s on a fast machine


def test_comments_docstrings_and_touched_files_change_nothing(clone):
    for path in (clone.folder / "workflow_scripts").rglob("*.py"):
        text = path.read_text()
        path.write_text(f"# a comment\n{text}\n\n# another\n")
    clone.edit("workflow_scripts/steps/train_sft.py", '"""Train a LoRA adapter', '"""Trains a LoRA adapter')
    for path in sorted(p for p in clone.folder.rglob("*") if p.is_file() and ".snakemake" not in p.parts):
        os.utime(path)
    assert clone.plan(DPO) == {}


def test_times_in_any_order_change_nothing(clone):
    now = time.time()
    files = sorted(p for p in (clone.folder / "results").rglob("*") if p.is_file())
    for i, path in enumerate(files):
        os.utime(path, (now - 100 * (i % 7), now - 100 * (i % 7)))
    assert clone.plan(DPO) == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("methods: {dpo: {train: {beta: 0.2}}}", DPO_ALONE),
        ("experiments: {dpo: {train: {beta: 0.2}}}", DPO_ALONE),
        ("experiments: {dpo_ipo: {train: {beta: 0.2}}}", {}),
        ("methods: {sft: {train: {learning_rate: 1.0e-3}}}", FROM_SFT),
        ("lora: {r: 8}", FROM_SFT),
        ("generation: {backend: hf}", {"generate": 1, "score": 1}),
        ("eval: {ifeval: {strip_think: true}}", {"score": 1}),
        ("data: {slices: {pairs: {rows: 60}}}", {"slice_data": 1, **DPO_ALONE}),
        ("data: {slices: {ifeval: {rows: 20}}}", {**ALL, "slice_data": 3}),
        ("methods: {rm: {train: {learning_rate: 1.0e-4}}}", {}),
        ("base: {scratch: {train: {steps: 31}}}", {**ALL, "slice_data": 2}),
        ("threads: 2", {**ALL, "slice_data": 2}),
        ("track: tensorboard", {}),
        ("seeds: [1, 2]", {}),
        # Both ends of the chain at once: Snakemake does not look at the parameters below a planned job.
        ("{methods: {dpo: {train: {beta: 0.2}}}, data: {slices: {sft: {rows: 70}}}}", {"slice_data": 1, **FROM_SFT}),
    ],
)
def test_a_change_of_the_config_plans_what_it_decides_and_no_more(clone, change, expected):
    assert clone.plan(DPO, configs=clone.overlay(change)) == expected


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        ("workflow_scripts/steps/train_sft.py", "Watch(job.run)", "Watch(str(job.run))", FROM_SFT),
        ("workflow_scripts/steps/train_dpo.py", "Watch(job.run)", "Watch(str(job.run))", DPO_ALONE),
        ("workflow_scripts/steps/generate.py", "tokenize=False", "tokenize=0", {"generate": 1, "score": 1}),
        ("workflow_scripts/evaluation/ifeval.py", "random.seed(seed)", "random.seed(str(seed))", {"score": 1}),
        ("workflow_scripts/plumbing/progress.py", "10.0", "20.0", {}),
        ("workflow_scripts/tiny/chat_template.jinja", "<|im_start|>", "<|im_start|> ", {**ALL, "slice_data": 2}),
        ("envs/requirements.lock", "trl==1.16.0", "trl==1.17.0", FROM_SFT),
        ("envs/dev.lock", "pytest==", "pytest==1", {}),
    ],
)
def test_a_change_of_the_code_plans_the_phases_that_can_run_it(clone, path, old, new, expected):
    clone.edit(path, old, new)
    assert clone.plan(DPO) == expected


def test_a_sibling_experiment_plans_itself_and_its_evaluation_alone(clone):
    assert clone.plan("results/ifeval_dpo_ipo.json") == DPO_ALONE
    assert clone.plan("results/ifeval_dpo_4bit.json") == DPO_ALONE
    assert clone.plan("results/ifeval_dpo.seed2.json") == FROM_SFT


def test_a_deleted_adapter_is_made_again_when_it_is_wanted_and_only_then(clone):
    (clone.folder / "results/dpo/adapter/adapter_model.safetensors").unlink()
    assert clone.plan(DPO) == {}
    assert clone.plan("results/dpo/adapter/adapter_model.safetensors") == {"train_dpo": 1}
    assert clone.plan(DPO, configs=clone.overlay("generation: {backend: hf}")) == DPO_ALONE


def test_deleted_merged_weights_cost_nothing_until_they_are_needed_and_come_back_the_same(clone):
    weights = clone.folder / "results/sft_v2/merged/model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.unlink()
    assert clone.plan(DPO) == {}
    configs = clone.overlay("methods: {dpo: {train: {beta: 0.2}}}")
    assert clone.plan(DPO, configs=configs) == DPO_ALONE
    clone.snakemake("results/dpo/adapter/manifest.json", configs=configs)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before


@pytest.mark.long
def test_two_fresh_clones_give_the_same_bytes(finished, fresh):
    fresh.snakemake("results/ifeval_base.json", "results/ifeval_sft_v2.json", "results/ifeval_dpo.json")
    mine, theirs = hashes(finished), hashes(fresh)
    assert mine == theirs
    assert {"dpo/adapter/adapter_model.safetensors", "ifeval_dpo.json", "dpo/adapter/metrics.csv"} <= set(mine)


def test_another_seed_gives_another_adapter_from_the_same_data(clone):
    clone.snakemake("results/dpo.seed2/adapter/manifest.json")
    manifests = [clone.folder / f"results/{run}/adapter/manifest.json" for run in ("dpo", "dpo.seed2")]
    first, second = (json.loads(path.read_text()) for path in manifests)
    assert first["files"]["adapter_model.safetensors"] != second["files"]["adapter_model.safetensors"]
    assert first["parents"]["rows"] == second["parents"]["rows"]
    assert second["parents"]["start"]["path"] == "results/sft_v2.seed2/merged/manifest.json"


def test_a_step_runs_by_hand_from_its_manifest_and_gives_the_same_adapter(clone):
    clone.run(
        "python", "-m", "workflow_scripts.steps.train_dpo", "--step", "results/dpo/adapter/manifest.json",
        "--inputs", "results/sft_v2/merged/manifest.json", "results/data/pairs.manifest.json",
        "--out", "trial/adapter/manifest.json", "--work", "trial/.work",
    )  # fmt: skip
    manifests = [clone.folder / folder / "adapter/manifest.json" for folder in ("trial", "results/dpo")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        ("experiments: {dpo: {lora: {r: 8}}}", "overlay.yaml: experiments.dpo.lora.r: refused"),
        ("methods: {dpo: {train: {learning_rate: 5e-6}}}", "methods.dpo.train.learning_rate: found the string '5e-6'"),
        ("experiments: {dpo: {start_from: nowhere}}", "overlay.yaml: experiments.dpo.start_from: found 'nowhere'"),
        ("experiments: {sft_v2: {start_from: dpo}}", "overlay.yaml: experiments.sft_v2.start_from: a loop"),
        ("experiments: {dpo: {train: {betta: 0.2}}}", "overlay.yaml: experiments.dpo.train.betta: unknown key"),
    ],
)
def test_a_wrong_config_is_one_clear_line_at_parse_time(fresh, overlay, words):
    done = fresh.snakemake("-n", DPO, configs=fresh.overlay(overlay), check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert sum("overlay.yaml" in line for line in done.stderr.splitlines()) == 1
    assert not (fresh.folder / "results").exists()


def test_without_a_configfile_the_tiny_world_is_planned_and_a_named_config_does_not_see_it(fresh):
    assert fresh.plan(DPO, configs=[]) == ALL
    named = (fresh.folder / "config/config.yaml").read_text().split("experiments:")[0] + "experiments: {mine: {method: sft}}\n"
    (fresh.folder / "named.yaml").write_text(named)
    done = fresh.snakemake("-n", DPO, configs=["named.yaml"], check=False)
    assert done.returncode == 1 and "No rule to produce results/ifeval_dpo.json" in done.stdout + done.stderr
    assert fresh.plan("results/ifeval_mine.json", configs=["named.yaml"])["train_sft"] == 1


@pytest.mark.parametrize(
    "target, near",
    [
        ("results/ifeval_dpoo.json", "results/ifeval_dpo.json"),
        ("results/ifval_rloo.json", "results/ifeval_rloo.json"),
        ("results/dpo/adaptr/manifest.json", "results/dpo/adapter/manifest.json"),
        ("results/data/pair.manifest.json", "results/data/pairs.manifest.json"),
    ],
)
def test_a_target_that_nothing_makes_is_told_with_the_nearest(fresh, target, near):
    done = fresh.snakemake("-n", target, check=False)
    assert done.returncode == 1 and f"No rule to produce {target}" in done.stdout
    assert done.stdout.rpartition("Nearest: ")[2].startswith(near)


def test_a_report_is_asked_for_by_name_and_a_config_that_compares_nothing_says_so(fresh):
    assert fresh.plan("report", configs=["config/example_own.yaml"])["report"] == 1
    own = fresh.folder / "config/example_own.yaml"
    own.write_text(own.read_text().partition("\nreport:")[0])
    done = fresh.snakemake("-n", "report", configs=["config/example_own.yaml"], check=False)
    assert done.returncode == 1 and "this config compares nothing: it has no `report:`" in done.stdout + done.stderr


def test_the_default_target_is_every_experiment_and_the_base(clone):
    jobs = clone.plan()
    assert jobs["train_dpo"] == 3 and jobs["train_sft"] == 1  # dpo_ipo, dpo_4bit, dpo_flipped; sft_v1: the others are there
    assert {jobs[f"train_{method}"] for method in ("kto", "rm", "rloo")} == {1} and jobs["train_grpo"] == jobs["train_ppo"] == 2
    assert jobs["score"] == 10 + 13  # IFEval of the runs that lack it, GSM8K of all
    assert jobs["eval_rm"] == 1


def test_grpo_needs_no_other_method_and_with_a_reward_model_only_that(fresh):
    chain = {**ALL, "slice_data": 4, "train_grpo": 1}
    del chain["train_dpo"]
    assert fresh.plan("results/ifeval_grpo.json") == chain
    configs = fresh.overlay("experiments: {grpo: {reward: {rm: 0.5, ifeval: 0.5}}}")
    assert fresh.plan("results/ifeval_grpo.json", configs=configs) == {**chain, "slice_data": 5, "train_rm": 1}


def test_ppo_needs_its_reward_model_and_with_a_verifier_no_other_method(fresh):
    chain = {**ALL, "slice_data": 4, "train_ppo": 1}
    del chain["train_dpo"]
    assert fresh.plan("results/ifeval_ppo_ifeval.json") == chain
    assert fresh.plan("results/ifeval_ppo.json") == {**chain, "slice_data": 5, "train_rm": 1}


def test_a_failing_step_leaves_nothing_half_written_and_says_why(clone):
    pairs = clone.folder / "results/data/pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("write", "wrote", 1))
    done = clone.snakemake(DPO, configs=clone.overlay("methods: {dpo: {train: {beta: 0.2}}}"), check=False)
    assert done.returncode == 1
    assert "results/data/pairs.jsonl: altered since it was made" in done.stderr
    assert "The step ended with exit status 1" in done.stderr and '"step":' not in done.stderr, "the step's JSON is no message"
    assert "0 of 3 steps done, 1 running, about " in done.stderr
    assert not (clone.folder / "results/dpo/adapter/manifest.json").exists()


def test_a_step_runs_the_code_of_the_snakefile_that_planned_it(fresh, tmp_path):
    """Not that of another clone, in which the command is given and which the environment names."""
    head = "def main(job: manifests.Job) -> None:\n"
    fresh.edit("workflow_scripts/steps/slice_data.py", head, f'{head}    raise RuntimeError("the code that was hashed")\n')
    other = make_clone(tmp_path / "other")
    done = other.snakemake("-s", f"{fresh.folder}/Snakefile", "results/data/ifeval.manifest.json", check=False)
    assert done.returncode == 1 and "RuntimeError: the code that was hashed" in done.stderr, done.stderr[-2000:]


def test_a_base_that_another_config_replaces_is_said_to_be_replaced(clone):
    steps = clone.overlay("base: {scratch: {train: {steps: 2}}}")
    assert clone.snakemake("results/base/manifest.json").stderr.count("is made anew") == 0
    done = clone.snakemake("results/base/manifest.json", configs=steps)
    said = [line for line in done.stderr.splitlines() if line.startswith("results/base/manifest.json: is made anew")]
    assert len(said) == 1 and "base.scratch.train.steps: 30 -> 2" in said[0] and "`pathvars` of its own" in said[0]


def test_every_file_of_the_package_is_small_and_imports_no_snakemake():
    root = Path(__file__).resolve().parents[2]
    names = subprocess.run(["git", "-C", str(root), "ls-files", "*.py", "*.smk"], capture_output=True, text=True).stdout.split()
    for name in names:
        text = (root / name).read_text()
        assert len(text.splitlines()) <= 400, name
        if name.startswith("workflow_scripts/"):
            assert "import snakemake" not in text and "from snakemake" not in text, name
        if name.startswith("rules/"):
            assert "torch" not in text, name


def test_a_card_that_is_not_there_is_said_before_any_job(clone):
    """With the precision of the evaluations too: it would be known at the first answers, after every training."""
    clone.variables["CUDA_VISIBLE_DEVICES"] = ""
    done = clone.snakemake("results/ifeval_dpo.json", configs=clone.overlay("{device: cuda, precision: fp16}"), check=False)
    assert done.returncode == 1 and "device: cuda, but torch " in done.stderr and "finds no GPU here" in done.stderr
    assert "rule train_sft" not in done.stdout + done.stderr


def test_a_scorer_that_cannot_judge_is_said_before_any_job(made):
    """With rows of a slice that is there, and so is not judged anew: they would end the last step, after the training."""
    row = {"id": "r:1", "key": 1, "prompt": "x", "instruction_id_list": ["no:such"], "kwargs": [{}]}
    (made.folder / "results/data/ifeval.jsonl").write_text(json.dumps(row))
    shutil.rmtree(made.folder / "results/dpo")
    (made.folder / "results/ifeval_dpo.json").unlink()
    done = made.snakemake("results/ifeval_dpo.json", check=False)
    assert done.returncode == 1, done.stderr
    assert "results/data/ifeval.jsonl: row r:1: lm-eval does not know the instruction 'no:such'" in done.stderr
    assert "rule train_dpo" not in done.stdout + done.stderr
