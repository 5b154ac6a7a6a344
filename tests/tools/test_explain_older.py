"""Results of an older checkout: `explain` names the keys that they lack and the modules that changed since.

The steps' JSON below is that of manifests from before adapters were judged beside the weights of their start and before
`eval.base` and `eval.decoding` existed, on the tests' micro config. Of `code` it holds the modules that this change rewrote, with
the hashes that they had; the others, which say nothing of it, are taken from today, and so are the packages.
"""

import copy
from pathlib import Path

import pytest

from tests.conftest import MICRO, ROOT
from tests.tools.test_explain import write
from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import explain, graph
from workflow_scripts.tools.differences import differences
from workflow_scripts.tools.graph import Phase

OLD = {
    "generate_ifeval": {
        "code": {"models.chat": "5992f79c69d8fa86", "models.loading": "43b62b19dd4893db", "steps.generate": "2a825f86c17632ce"},
        "config": {"batch_size": 12, "max_new_tokens": 16},
        "device": "cpu",
        "precision": "fp32",
        "step": "generate",
        "threads": 1,
    },
    "merge": {
        "code": {"models.chat": "5992f79c69d8fa86", "models.loading": "43b62b19dd4893db", "steps.merge": "9f66d1e49f082b2a"},
        "config": {"quant": {"double": True, "type": "nf4"}, "quantise": "nf4"},
        "step": "merge",
        "threads": 1,
    },
}
SINCE = ("models.distance",)  # modules that there were not


def plan_of(tmp_path: Path, overlay: str = "{}") -> Plan:
    (tmp_path / "overlay.yaml").write_text(overlay)
    return Plan(configs.load(*[ROOT / name for name in MICRO], tmp_path / "overlay.yaml"))


def old_step(plan: Plan, kind: str, run: str) -> dict:
    today = plan.step(kind, run)
    step = copy.deepcopy(OLD[kind])
    assert set(step["code"]) <= set(today["code"]) and set(SINCE) <= set(today["code"])
    later = {name for name in today["code"] if name in SINCE or kind != "merge" and name.startswith("generation")}
    old = {name: mark for name, mark in today["code"].items() if name not in later}
    step["code"] = old | step["code"]
    return step | {"packages": today["packages"], "parents": today["parents"]}


def of_phase(tmp_path: Path, kind: str, run: str, overlay: str = "{}") -> list[str]:
    plan = plan_of(tmp_path, overlay)
    return differences(plan.config, kind, run, old_step(plan, kind, run), plan.step(kind, run))


ADDED = [
    f"generation/{name}.py"
    for name in "__init__ answers attention attention_kernel decoder draws generator graphs hf prefixes vllm_engine".split()
]
CODE = f"code: models/chat.py, models/loading.py, steps/generate.py changed; {', '.join(ADDED)}, models/distance.py added"
DECODING = "eval.decoding: (not set) -> greedy"
BATCH = "eval.batch_size: 12 -> (not set)"  # the generator answers each prompt by itself
GRAPHS = "generation: (not set) -> {adapter: match, backend: graphs}"
HF = "generation: (not set) -> {backend: hf, batch_size: 12}"
TRAINED = "eval.base: trained"


@pytest.mark.parametrize(
    ("run", "overlay", "expected"),
    [
        ("dpo", "{}", [DECODING, GRAPHS]),
        ("base", "{eval: {decoding: folder}}", ["eval.decoding: (not set) -> folder", HF]),
        ("kto", "{eval: {precision: bf16}}", [DECODING, GRAPHS, "eval.precision: fp32 -> bf16"]),
        ("kto", "{eval: {base: trained}}", [DECODING, GRAPHS, f"base that it is judged on ({TRAINED}): full precision -> nf4"]),
        ("dpo", "{eval: {base: trained}}", [DECODING, GRAPHS]),  # trained in full precision: judged as ever
        ("base", "{eval: {base: trained}}", [DECODING, GRAPHS]),
    ],
)
def test_an_older_answer_is_told_by_the_keys_of_eval_that_it_lacks_and_by_the_code(tmp_path, run, overlay, expected):
    assert of_phase(tmp_path, "generate_ifeval", run, overlay) == [BATCH, *expected, CODE]


def test_an_older_merge_is_told_by_its_code(tmp_path):
    changed = "code: models/chat.py, models/loading.py, steps/merge.py changed; models/distance.py added"
    assert of_phase(tmp_path, "merge", "sft_v2") == [changed]


def test_the_base_that_a_run_is_judged_on_is_told_by_its_key_for_each_kind_of_task_and_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text("{}\n" * 4)
    rows = "data: {slices: {questions: {kind: truthfulqa, source: {path: q.jsonl}, rows: 4, seed: 1}}}"
    task = "truthfulqa: {prompts: questions, apply_chat_template: true, batch_size: 4}"
    full, trained = (plan_of(tmp_path, f"{{{rows}, eval: {{base: {base}, {task}}}}}") for base in ("full", "trained"))
    for kind in ("generate_ifeval", "generate_gsm8k", "score_truthfulqa"):
        old, new = full.step(kind, "kto"), trained.step(kind, "kto")
        there = ["base that it is judged on (eval.base: trained): full precision -> nf4"]
        assert differences(trained.config, kind, "kto", old, new) == there, kind
        back = ["base that it is judged on (eval.base: full): nf4 -> full precision"]
        assert differences(full.config, kind, "kto", new, old) == back, kind


def test_what_a_judge_reads_with_is_told_where_the_reward_models_training_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text("{}\n" * 4)
    rows = "data: {slices: {questions: {kind: prompts, source: {path: q.jsonl}, rows: 4, seed: 1}}}"
    judge = "eval: {judge: {prompts: questions, reward: rm, against: sft_v2, max_new_tokens: 8}}"
    train = "methods: {rm: {train: {per_device_eval_batch_size: 3, max_length: 96}}}"
    old = plan_of(tmp_path, f"{{{rows}, {judge}}}").step("score_judge", "dpo")
    plan = plan_of(tmp_path, f"{{{rows}, {judge}, precision: bf16, {train}}}")
    found = differences(plan.config, "score_judge", "dpo", old, plan.step("score_judge", "dpo"))
    assert [line.partition(":")[0] for line in found] == [
        "methods.rm.train.per_device_eval_batch_size",
        "methods.rm.train.max_length",
        "precision",
    ]


def test_explain_says_it_of_each_phase_of_older_results(tmp_path, monkeypatch):
    """Manifests as an older checkout left them under today's config, and the jobs that Snakemake plans for them."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path)
    target = "results/ifeval_dpo.json"
    for phase in graph.in_order(plan, [Phase("score_ifeval", "dpo")]):
        write(plan, phase, 10.0)
    stale = [Phase("merge", "sft_v2"), Phase("generate_ifeval", "dpo")]
    for phase in stale:
        path = Path(graph.outputs(plan, phase)[0])
        made = manifests.read(path).data | {"step": old_step(plan, *phase), "fingerprint": "0" * 32}
        path.write_text(manifests.dump(made))
    phases = [*stale, Phase("train", "dpo"), Phase("score_ifeval", "dpo")]
    jobs = [explain.Job("step", graph.outputs(plan, phase), "Params have changed since last execution", "") for phase in phases]
    found = {one.phase: one.reasons for one in explain.explain(plan, [target], jobs) if one.state == explain.WILL_RUN}
    assert found == {
        "sft_v2 merged": ["code: models/chat.py, models/loading.py, steps/merge.py changed; models/distance.py added"],
        "dpo adapter": ["because of: sft_v2 merged"],
        "dpo ifeval answers": [
            BATCH,
            DECODING,
            GRAPHS,
            CODE,
            "parent sft_v2 merged will be made again",
            "parent dpo adapter will be made again",
        ],
        "dpo ifeval scores": ["because of: dpo ifeval answers"],
    }
    assert not any("Params have changed" in reason for reasons in found.values() for reason in reasons)
