"""The parts of `explain`: the plan's graph by names, Snakemake's print read, differences in words, times and tables."""

import json

import pytest

from tests.conftest import MICRO
from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config import config
from workflow_scripts.config.written import merge_all
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import explain, graph
from workflow_scripts.tools.differences import differences
from workflow_scripts.tools.graph import Phase


def test_each_parent_has_the_fingerprint_that_the_step_names():
    mixture = {"experiments": {"grpo": {"reward": {"rm": 0.5, "ifeval": 0.5}}}}
    plan = Plan(config.Config(merge_all([*map(read_yaml, MICRO), mixture])))
    phases = set(graph.phases_by_file(plan, ["results/grpo.seed2/adapter/manifest.json"]).values())
    assert {Phase("train", "grpo.seed2"), Phase("eval_rm", "rm"), Phase("generate_gsm8k", "base")} <= phases
    for phase in phases:
        named = {role: plan.fingerprint(*parent) for role, parent in graph.parents(plan, phase).items()}
        assert named == plan.step(*phase)["parents"], phase
        assert phase.label
    order = graph.in_order(plan, phases)
    assert set(order) >= phases and len(set(order)) == len(order)
    for i, phase in enumerate(order):
        assert set(graph.parents(plan, phase).values()) <= set(order[:i])


def test_jobs_are_read_from_what_snakemake_prints_and_none_is_dropped():
    printed = """Building DAG of jobs...
[Wed Nov 25 03:10:45 2026]
rule train_dpo:
    input: a, b
    output: results/dpo/adapter/manifest.json, results/dpo/adapter/adapter_model.safetensors
    benchmark: benchmarks/dpo/train.tsv
    reason: Missing output files: b, a; Params have changed since last execution: before: '{"rule x": 1}' now: '{}'
    wildcards: run=dpo
[Wed Nov 25 03:10:45 2026]
group job 1 (jobs in lexicogr. order):
    [Wed Nov 25 03:10:45 2026]
    rule score:
        output: results/ifeval_dpo.json
[Wed Nov 25 03:10:45 2026]
localrule all:
    input: results/ifeval_dpo.json
    reason: Input files updated by another job: e, d, c, b, a
"""
    jobs = explain.parse_jobs(printed)
    assert [(job.rule, job.outputs[:1], job.benchmark) for job in jobs] == [
        ("train_dpo", ["results/dpo/adapter/manifest.json"], "benchmarks/dpo/train.tsv"),
        ("score", ["results/ifeval_dpo.json"], ""),
        ("all", [], ""),
    ]
    assert explain.shortened(jobs[0].reason) == "Missing output files: a, b; Params have changed since last execution"
    assert explain.shortened(jobs[2].reason) == "Input files updated by another job: a, b, c and 2 more"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (17.4, "17 s"),
        (60, "1 min"),
        (231, "3 min 51 s"),
        (599.6, "10 min"),
        (3599, "1 h 0 min"),
        (11520, "3 h 12 min"),
    ],
)
def test_durations(seconds, shown):
    assert explain.duration(seconds) == shown


def test_one_reason_a_line_and_colour_where_it_is_asked_for():
    found = [explain.Finding("dpo adapter", "x", "will run", ["a", "b"], 90.0), explain.Finding("base", "y", "up to date")]
    plain = explain.lines(found, colour=False)
    assert plain[:3] == [
        "dpo adapter  will run, 1 min 30 s  a",
        "                                   b",
        "base         up to date",
    ]
    assert explain.lines(found, colour=True)[0] == "dpo adapter  \033[33mwill run, 1 min 30 s\033[0m  a"


def test_parts_of_a_step_that_have_no_words_of_their_own_are_shown_by_name():
    plan = Plan(config.load(*MICRO))
    new = fingerprint.canonical(plan.step("train", "dpo"))
    old = json.loads(new) | {"precision": "bf16", "invented": 1, "allow_package_mismatch": True, "seed": 1.0}
    old["config"] = old["config"] | {"quantise": "nf4", "quant": {"type": "nf4"}, "optim": "paged_adamw_32bit"}
    old["packages"] = {**old["packages"], "gguf": "0.19.0"}
    assert differences(plan.config, "train", "dpo", old, json.loads(new)) == [
        "optim (follows device): paged_adamw_32bit -> adamw_torch",
        "methods.dpo.quantise: nf4 -> none",
        "allow_package_mismatch: true -> false",
        "invented: 1 -> (not set)",
        "precision: bf16 -> fp32",
        "packages: gguf removed",
    ]
