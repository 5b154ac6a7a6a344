"""Multiple choice around its step: bad rows, decontamination, the config, the plan, Snakemake, the report."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import MICRO, ROOT
from tests.support import report_world, small_steps
from tests.support.choice_rows import DEV, MMLU, SHOTS, TRUTH, question, scored, truth
from tests.support.slicer import Slicer, Words, chat_row
from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config
from workflow_scripts.config.written import merge
from workflow_scripts.data import slicing
from workflow_scripts.plan import estimate
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import slice_data
from workflow_scripts.tools import compare, explain, graph, status, verify
from workflow_scripts.tools.graph import Phase

# -- rows ---------------------------------------------------------------------------------------------------------------------


def slice_of(slicer: Slicer, rows: list[dict], kind: str) -> manifests.Artifact:
    """The slice of an evaluation's questions; `slicer` knows that IFEval's are taken whole."""
    job = slicer.job(rows, kind="ifeval")
    job.config["kind"] = kind
    slice_data.main(job)
    return manifests.read(job.out)


def test_rows_of_both_data_sets_are_taken_whole_with_keys_of_their_own(tmp_path):
    rows = [question(i, "anatomy", i % 4) for i in range(9)]
    made = slice_of(Slicer(tmp_path / "a"), [row | {"extra": 1} for row in rows], "choice")
    assert made.rows() == [{"id": f"mine.jsonl:{i}", "key": f"mine.jsonl:{i}", **row} for i, row in enumerate(rows, start=1)]
    assert made.data["formats"] == {"mmlu": 9}
    made = slice_of(Slicer(tmp_path / "b"), [truth(i) for i in range(5)], "truthfulqa")
    assert [row["mc2_targets"] for row in made.rows()] == [truth(i)["mc2_targets"] for i in range(5)]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("choice", {"answer": 4}, "expected 0, 1, 2 or 3 under answer, the index of the right choice, found 4"),
        ("choice", {"answer": "B"}, 'under answer, the index of the right choice, found "B"'),
        ("choice", {"choices": ["one", "two", "three"]}, "expected four texts under choices, found 3"),
        ("choice", {"choices": ["one", "two", 3, "four"]}, "choices: expected a list of texts, found"),
        ("choice", {"subject": None}, "found the format|can't give kind choice, only numeric or sft; formats for choice: mmlu"),
        (
            "truthfulqa",
            {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 0]}},
            "expected 1, 0, 0, ... under mc1_targets.labels",
        ),
        (
            "truthfulqa",
            {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}},
            "the first choice counts as the right one, found .0, 1",
        ),
        (
            "truthfulqa",
            {"mc2_targets": {"choices": ["a", "b"], "labels": [0, 0]}},
            "a true and a false choice at least under mc2_targets",
        ),
        (
            "truthfulqa",
            {"mc2_targets": {"choices": ["a", "b"], "labels": [1]}},
            "a 0 or 1 for each of 2 choices under mc2_targets.labels",
        ),
        (
            "truthfulqa",
            {"mc2_targets": {"choices": ["a", " "], "labels": [1, 0]}},
            "texts that are not empty under mc2_targets.choices",
        ),
        ("truthfulqa", {"mc2_targets": ["a"]}, "mc2_targets.choices: expected a list of texts, found null"),
    ],
)
def test_a_malformed_row_is_named_with_file_line_and_key(tmp_path, kind, row, message):
    good = question(1, "anatomy", 0) if kind == "choice" else truth(1)
    with pytest.raises(InputError, match=f"mine.jsonl: line 2: .*{message}" if "|" not in message else message) as caught:
        slice_of(Slicer(tmp_path), [good, good | row], kind)
    assert "line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_a_question_without_text_is_not_dropped_in_silence(tmp_path):
    with pytest.raises(InputError, match="1 of 2 rows .* can't be used: 1 without a prompt. The limit is for evaluation prompts"):
        slice_of(Slicer(tmp_path), [question(1, "anatomy", 0), question(2, "anatomy", 0, question=" ")], "choice")


def test_subjects_without_enough_examples_or_unknown_to_lm_eval_are_named_before_the_model_is_loaded(tmp_path):
    unloadable = small_steps.write_base(tmp_path / "unloadable")
    (unloadable.parent / "model.safetensors").unlink()
    few = [row for row in DEV if row["subject"] != "virology"] + [row for row in DEV if row["subject"] == "virology"][:2]
    with pytest.raises(
        InputError, match=r"dev.manifest.json: 2 rows of the subject virology, which key 'virology:0' of .*mmlu.mani.* is 3"
    ):
        scored(tmp_path, "mmlu", unloadable, MMLU, few, **SHOTS)
    with pytest.raises(InputError, match=r"mmlu.manifest.json: key 'x': lm-eval has no subject 'chess', only abstract_algebra, "):
        scored(tmp_path, "mmlu", unloadable, [*MMLU, question(1, "chess", 0, key="x")], **SHOTS)


# -- decontamination ----------------------------------------------------------------------------------------------------------


def test_a_training_row_that_copies_a_question_is_dropped_and_one_that_shares_a_phrase_is_not(tmp_path, monkeypatch):
    from workflow_scripts.models import chat

    monkeypatch.setattr(chat, "tokenizer_of", lambda base: Words())
    long = question(1, "anatomy", 0)["question"]
    short = question(
        2, "anatomy", 0, question="which is true?", choices=["cats have four legs", "dogs can fly home", "tea is a stone", "no"]
    )
    asked = "which is true?\nA. cats have four legs\nB. dogs can fly home\nC. tea is a stone\nD. no"
    slicer = Slicer(tmp_path)
    prompts = [question(1, "anatomy", 0, key=1, id="a"), short | {"key": 2, "id": "b"}]
    slicer.parent(
        "mmlu_prompts",
        slicer.results / "data/mmlu.manifest.json",
        "mmlu.jsonl",
        "".join(json.dumps(p) + "\n" for p in prompts).encode(),
    )
    slicer.parent(
        "tqa_prompts",
        slicer.results / "data/tqa.manifest.json",
        "tqa.jsonl",
        json.dumps(truth(3, key=1, id="c")).encode() + b"\n",
    )
    rows = [chat_row(f"q{i}", f"a{i}") for i in range(6)]
    bad = [chat_row(f"Answer this: {long}", "the lamp"), chat_row(asked, "A"), chat_row("what is behind door 3", "a lamp")]
    kept = chat_row("tell me which is true? the moon or the sun", "the sun")
    for rule, dropped in (("ngram", 3), ("whole_prompt", 1)):  # the third alone is the question word for word
        rows_out, made = slicer([*rows, *bad, kept], heldout=2, decontaminate={"rule": rule, "ngram": 8, "share": 0.5})
        assert made["dropped"] == {"covering an evaluation prompt": dropped}, rule
        assert kept["messages"] in [row["messages"] for row in rows_out]
    assert slicing.avoided(short, "whole_prompt", 8) == "which is true?"


# -- the config and the plan --------------------------------------------------------------------------------------------------


def files_of(folder: Path, more: int = 0) -> dict:
    """An overlay with both tasks, over files of this folder. more: rows that the slices say beyond those that there are."""
    parts = {"mmlu": ("choice", MMLU), "mmlu_dev": ("choice", DEV), "truthfulqa": ("truthfulqa", TRUTH)}
    slices = {}
    for name, (kind, rows) in parts.items():
        path = folder / f"{name}.jsonl"
        bare = [{key: value for key, value in row.items() if key != "key"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in bare))
        slices[name] = {"kind": kind, "source": {"path": str(path)}, "rows": len(rows) + more, "seed": 1}
    mmlu = {"prompts": "mmlu", "fewshot": "mmlu_dev", "batch_size": 4, **SHOTS}
    return {
        "data": {"slices": slices},
        "eval": {"mmlu": mmlu, "truthfulqa": {"prompts": "truthfulqa", "apply_chat_template": True, "batch_size": 4}},
    }


def plan(overlay: dict, *more: dict) -> Plan:
    data = config.load(ROOT / "config/config.yaml").data
    for one in (overlay, *more):
        data = merge(data, one)
    return Plan(config.Config(data))


STEPS = [(f"{verb}_{task}", "dpo") for task in ("ifeval", "gsm8k") for verb in ("generate", "score")] + [
    ("score_mmlu", "dpo"), ("score_truthfulqa", "dpo"), ("slice", "mmlu"), ("slice", "mmlu_dev"), ("slice", "truthfulqa"),
]  # fmt: skip


def test_what_decides_a_task_is_in_its_fingerprint_and_nothing_else(tmp_path):
    overlay = files_of(tmp_path)
    before = plan(overlay)

    def stale(*more: dict) -> set:
        after = plan(overlay, *more)
        return {step for step in STEPS if before.fingerprint(*step) != after.fingerprint(*step)}

    mmlu, both = {("score_mmlu", "dpo")}, {("score_mmlu", "dpo"), ("score_truthfulqa", "dpo")}
    for change in ({"shots": 2}, {"fewshot_as_multiturn": False}, {"batch_size": 8}):
        assert stale({"eval": {"mmlu": change}}) == mmlu
    assert stale({"eval": {"truthfulqa": {"apply_chat_template": False}}}) == {("score_truthfulqa", "dpo")}
    assert stale({"eval": {"gsm8k": {"max_new_tokens": 17}}}) == {("generate_gsm8k", "dpo"), ("score_gsm8k", "dpo")}
    answers = {(f"{verb}_{task}", "dpo") for task in ("ifeval", "gsm8k") for verb in ("generate", "score")}
    assert stale({"generation": {"backend": "hf"}}) == answers
    assert stale({"eval": {"precision": "bf16"}}) == answers | both
    step = before.step("score_mmlu", "dpo")
    assert step["config"] == {"task": "mmlu", "batch_size": 4, **SHOTS} and step["precision"] == "fp32" and "seed" not in step
    assert set(step["parents"]) == {"prompts", "fewshot", "start", "adapter"} and step["packages"].keys() >= {
        "lm-eval",
        "torch",
        "datasets",
    }
    (tmp_path / "mmlu_dev.jsonl").write_text((tmp_path / "mmlu_dev.jsonl").read_text().replace("river", "brook"))
    assert stale() == mmlu | {("slice", "mmlu_dev")}  # examples are no prompts: training data need not avoid them


def test_training_rows_avoid_both_tasks_and_old_steps_keep_their_fingerprints(tmp_path):
    with_both, without = plan(files_of(tmp_path)), plan({})
    assert set(with_both.step("slice", "sft")["parents"]) == {
        "ifeval_prompts",
        "gsm8k_prompts",
        "mmlu_prompts",
        "truthfulqa_prompts",
        "base",
    }
    assert with_both.fingerprint("generate_ifeval", "base") == without.fingerprint("generate_ifeval", "base")
    assert with_both.fingerprint("base", "base") == without.fingerprint("base", "base")


def test_every_phase_names_its_parents_its_key_and_what_it_asks_for(tmp_path):
    made = plan(files_of(tmp_path))
    made.check()
    for phase in (Phase("score_mmlu", "dpo"), Phase("score_truthfulqa", "base")):
        wanted = {role: made.fingerprint(*parent) for role, parent in graph.parents(made, phase).items()}
        assert wanted == made.step(*phase)["parents"]
    known = graph.phases_by_file(made, [])
    assert known["results/mmlu_dpo.json"] == Phase("score_mmlu", "dpo") and not any("mmlu_responses" in file for file in known)
    assert explain._role_key(made, Phase("score_mmlu", "dpo"), "fewshot") == "eval.mmlu.fewshot"
    asked = estimate.Estimates(made)
    assert all(value > 0 for task in ("mmlu", "truthfulqa") for value in asked.ask(f"choice_{task}", "dpo", 1).values())
    more = estimate.Estimates(plan(files_of(tmp_path, 3000)))
    assert more.of("choice_mmlu", "dpo")["seconds"] > asked.of("choice_mmlu", "dpo")["seconds"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval": {"mmlu": {"prompts": "truthfulqa"}}}, "eval.mmlu.prompts: found 'truthfulqa', expected a slice of kind choice"),
        (
            {"eval": {"truthfulqa": {"prompts": "mmlu"}}},
            "eval.truthfulqa.prompts: found 'mmlu', expected a slice of kind truthfulqa",
        ),
        ({"eval": {"mmlu": {"fewshot": "sft"}}}, "eval.mmlu.fewshot: found 'sft', expected a slice of kind choice"),
        ({"eval": {"mmlu": {"fewshot": "mmlu"}}}, "eval.mmlu.fewshot: found 'mmlu', which is asked as well"),
        ({"eval": {"mmlu": {"shots": 0}}}, "eval.mmlu.fewshot: shots is 0, so it decides nothing; leave it out"),
        (
            {"eval": {"mmlu": {"apply_chat_template": False}}},
            "eval.mmlu.fewshot_as_multiturn: apply_chat_template is false, so it decides",
        ),
        (
            {"data": {"slices": {"mmlu": {"heldout": 2}}}},
            "data.slices.mmlu.heldout: not for rows of kind choice: they are taken whole",
        ),
        (
            {"data": {"slices": {"truthfulqa": {"max_prompt_tokens": 9}}}},
            "data.slices.truthfulqa.max_prompt_tokens: not for rows of kind",
        ),
        ({"methods": {"sft": {"slice": "mmlu"}}}, "methods.sft.slice: found 'mmlu', expected a slice of kind sft to train on"),
        ({"eval": {"truthfulqa": {"shots": 5}}}, "eval.truthfulqa.shots: unknown key"),
    ],
)
def test_a_config_that_asks_for_what_there_is_not_is_refused_when_it_is_read(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        plan(files_of(tmp_path), more)


def test_shots_need_their_slice_and_a_hub_s_in_its_own_order(tmp_path):
    overlay = files_of(tmp_path)
    del overlay["eval"]["mmlu"]["fewshot"]
    with pytest.raises(
        InputError, match="eval.mmlu.fewshot: missing, and it has no default: the slice of the solved examples; shots is 3"
    ):
        plan(overlay)
    hub = {"hub": "cais/mmlu", "config": "all", "split": "dev", "revision": "a" * 40, "shuffle_buffer": 10}
    overlay = files_of(tmp_path)
    overlay["data"]["slices"]["mmlu_dev"]["source"] = hub
    with pytest.raises(
        InputError, match="mmlu_dev.source.shuffle_buffer: found 10, expected 1: a subject's examples are its first rows"
    ):
        plan(overlay)
    hub["shuffle_buffer"] = 1
    assert plan(overlay).step("slice", "mmlu_dev")["packages"].keys() >= {"datasets"}


def test_a_hub_s_rows_keep_their_order_with_a_buffer_of_one(tmp_path, monkeypatch):
    import datasets

    stream = datasets.IterableDataset.from_generator(lambda: iter([question(i, "anatomy", i % 4) for i in range(40)]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    found = {}
    for buffer in (1, 40):
        source = {"hub": "cais/mmlu", "split": "dev", "revision": "a" * 40, "shuffle_buffer": buffer}
        found[buffer] = [row.row["choices"] for row in slice_data.read_hub(source, 12, seed=1)[1]]
    assert found[1] == [question(i, "anatomy", 0)["choices"] for i in range(12)] != found[40]


# -- through Snakemake, and the report ----------------------------------------------------------------------------------------


def test_the_rule_runs_and_nothing_is_generated(fresh):
    overlay = files_of(fresh.folder) | {"report": {"families": {"mmlu": {
        "title": "Knowledge", "task": "mmlu", "reference": "sft_v2", "runs": ["dpo"]}}}}  # fmt: skip
    configs = fresh.overlay(yaml.safe_dump(overlay))
    runs = ["base", "sft_v2", "dpo"]
    jobs = fresh.plan(*[f"results/{task}_{run}.json" for task in ("mmlu", "truthfulqa") for run in runs], configs=configs)
    assert jobs["lm_eval_task"] == 6 and not {"generate", "score", "gather"} & set(jobs)
    assert jobs["slice_data"] == 7 and jobs["train_sft"] == jobs["train_dpo"] == jobs["merge"] == 1
    everything = fresh.plan(configs=configs)
    assert everything["lm_eval_task"] == everything["generate"] == everything["score"]  # two tasks of each for every run
    fresh.snakemake("results/mmlu_base.json", configs=configs)
    with contextlib.chdir(fresh.folder):
        made = manifests.read("results/mmlu_base.json").data
        assert made["kind"] == "scores" and made["n_prompts"] == 16 and set(made["parents"]) == {"prompts", "fewshot", "start"}
        (row,) = [status.describe(folder, Path("results"), 0.0) for folder in [Path("results/base")]]
        assert row["mmlu"] == made["acc"] and row["truthfulqa"] is None
        found = verify.verify("results")
        assert not [finding.problems for finding in found if finding.problems]
        assert any("not scored again: it takes a model" in note for finding in found for note in finding.notes)
    assert fresh.plan("results/mmlu_base.json", configs=configs) == {}
    assert fresh.plan("results/mmlu_base.json", configs=[*configs, shots(fresh.folder, 2)]) == {"lm_eval_task": 1}


def shots(folder: Path, n: int) -> str:
    (folder / "shots.yaml").write_text(f"eval: {{mmlu: {{shots: {n}}}}}\n")
    return "shots.yaml"


@pytest.mark.slow
def test_the_report_takes_multiple_choice_in_a_family(tmp_path):
    families = {
        task: {"title": f"What of {task} is left?", "task": task, "reference": "sft_v2", "runs": ["dpo", "kto"]}
        for task in ("mmlu", "truthfulqa")
    }
    overlay = merge(files_of(tmp_path), {"report": {"families": families}})
    made = report_world.make(tmp_path, report_world.write_config(tmp_path, overlay=overlay))
    html = report_world.report(tmp_path, made)
    assert "What of mmlu is left?" in html and "(mmlu: MMLU, accuracy, exploratory)" in html and "TruthfulQA, mc2" in html
    table = (tmp_path / "results/report/comparison.csv").read_text()
    rows = [line.split(",") for line in table.splitlines()]
    assert (
        len([row for row in rows if row[0] == "mmlu"]) == 2
        and [row[2] for row in rows if row[0] == "truthfulqa"] == ["truthfulqa"] * 2
    )
    shown = json.loads(html.split('id="answers">')[1].split("</script>")[0])
    assert {pair[0] for pair in shown["pairs"]} == {"ifeval", "gsm8k"} == set(shown["prompts"])
    lengths = html.split('id="length"')[1].split("</table>")[0]
    assert "gsm8k" in lengths and "mmlu" not in lengths
    scores = compare.read([tmp_path / f"results/mmlu_{run}.json" for run in ("sft_v2", "dpo")])
    assert list(scores) == ["sft_v2", "dpo"] and "accuracy, against the row above" in compare.table(scores).columns


def test_the_micro_config_still_has_neither():
    assert set(config.load(*[ROOT / name for name in MICRO]).evaluations) == {"ifeval", "gsm8k"}
