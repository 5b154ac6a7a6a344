"""Tasks of lm-eval (`eval.tasks`): lm-eval's own figures for each type, groups, answers that are cut, what can't be counted."""

import json
import math

import pytest

from tests.support import small_steps
from tests.support.own_task import ASKED, CHOICE, WORDS, scored, write
from tests.support.slicer import chat_row
from workflow_scripts.data import task_files
from workflow_scripts.plumbing.messages import InputError

pytestmark = pytest.mark.usefixtures("undescribed")


@pytest.fixture
def base(speaking_base):
    return speaking_base


def by_itself(base, file, **settings) -> list[dict]:
    """lm-eval's samples of the task, by its own model runner and generation, from the folder of the model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(file.parent))
    found = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(base.parent), "dtype": "float32"}, ["mine"], batch_size=4, device="cpu", task_manager=manager,
        bootstrap_iters=0, **settings,
    )  # fmt: skip
    return sorted(found["samples"]["mine"], key=lambda one: one["doc_id"])


SETTINGS = [
    ({}, {"num_fewshot": 0}),
    ({"num_fewshot": 2}, {"num_fewshot": 2}),
    (
        {"num_fewshot": 2, "chat_template": True, "fewshot_as_multiturn": True, "system": "Be brief."},
        {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Be brief."},
    ),
    (
        {"chat_template": True, "limit": 7},
        {"num_fewshot": 0, "apply_chat_template": True, "fewshot_as_multiturn": False, "limit": 7},
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), SETTINGS, ids=["plain", "shots", "turns", "limit"])
@pytest.mark.parametrize(
    ("kind", "metric"), [("multiple_choice", "acc_norm"), ("loglikelihood", "acc"), ("generate_until", "exact_match")]
)
def test_each_item_has_lm_evals_verdict(base, tmp_path, kind, metric, ours, theirs):
    rows, more = CHOICE, {}
    if kind != "multiple_choice":  # half of the items ask for what the model says: no verdict is right by itself
        more = {"target_delimiter": ""} if kind == "loglikelihood" else {}
        first = {"generation_kwargs": {"until": ["~"], "max_gen_toks": 3}} if kind == "loglikelihood" else {}
        own = by_itself(base, write(tmp_path / "first", "generate_until", **first), **theirs | {"limit": None})
        said = [one["resps"][0][0] for one in own if one["filter"] == "whole"]
        rows = [row | {"options": [text] * 3} if i % 2 else row for i, (row, text) in enumerate(zip(CHOICE, said, strict=True))]
    file = write(tmp_path / "task", kind, rows, **more)
    full = f"{metric},whole" if kind == "generate_until" else metric
    made = scored(tmp_path, kind, base, file, full, **ours)
    own = by_itself(base, file, **theirs)
    own = [one for one in own if one["filter"] in ("none", "whole")]
    verdicts = [bool(one[metric]) for one in own]
    assert [row["correct"] for row in made["per_prompt"]] == verdicts and [row["key"] for row in made["per_prompt"]] == list(
        range(len(own))
    )
    assert 0 < sum(verdicts) < len(verdicts), "else the models could be any two"
    n, share = len(verdicts), sum(verdicts) / len(verdicts)
    assert made["metric"] == metric and made[metric] == pytest.approx(share) and made["n_prompts"] == made["n_groups"] == n
    assert made[f"{metric}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    assert made["example"]["prompt"] == own[0]["arguments"][0][0] and made["cut"] == 0
    if kind == "generate_until":
        assert [row["response"] for row in made["per_prompt"]] == [one["resps"][0][0] for one in own]
    if kind == "multiple_choice":
        assert made["other"] == {"acc": pytest.approx(sum(one["acc"] for one in own) / n)}


def test_the_filter_that_is_named_counts(base, tmp_path):
    own = by_itself(base, write(tmp_path / "first", "generate_until"), num_fewshot=0)
    letters = [one["filtered_resps"][0] for one in own if one["filter"] == "first"]
    rows = [
        row | {"options": [letter] * 3} if i % 2 else row for i, (row, letter) in enumerate(zip(CHOICE, letters, strict=True))
    ]
    file = write(tmp_path / "task", "generate_until", rows)
    own = by_itself(base, file, num_fewshot=0)
    found = {}
    for name in ("whole", "first"):
        found[name] = [
            row["correct"] for row in scored(tmp_path / name, "generate_until", base, file, f"exact_match,{name}")["per_prompt"]
        ]
        assert found[name] == [bool(one["exact_match"]) for one in own if one["filter"] == name]
    assert found["whole"] != found["first"]


def test_items_of_one_group_are_one_cluster_of_the_standard_error(base, tmp_path):
    alike = [CHOICE[i - i % 3] | {"right": i // 3 % 3, "options": CHOICE[0]["options"]} for i in range(18)]
    file = write(tmp_path / "task", "multiple_choice", alike)  # three times the same, so that a third as many are known
    grouped = scored(tmp_path / "a", "multiple_choice", base, file, "acc", more={"group_by": "story"})
    apart = scored(tmp_path / "b", "multiple_choice", base, file, "acc")
    once = write(tmp_path / "once", "multiple_choice", alike[::3])
    assert (grouped["n_prompts"], grouped["n_groups"], apart["n_groups"]) == (18, 6, 18)
    assert grouped["acc"] == apart["acc"] and 0 < grouped["acc"] < 1
    assert grouped["acc_stderr"] == pytest.approx(scored(tmp_path / "c", "multiple_choice", base, once, "acc")["acc_stderr"])
    assert grouped["acc_stderr"] > 1.5 * apart["acc_stderr"]
    with pytest.raises(InputError, match="eval.tasks.mine.group_by: item 0 has no 'page', only question, options, right, story"):
        scored(tmp_path / "d", "multiple_choice", base, file, "acc", more={"group_by": "page"})


def test_an_answer_is_cut_where_the_task_stops_and_one_that_was_not_counts_as_cut_off(base, tmp_path):
    long = {"generation_kwargs": {"until": ["~"], "max_gen_toks": 3}}
    made = scored(tmp_path / "a", "generate_until", base, write(tmp_path / "long", "generate_until", **long), "exact_match,whole")
    stops = {"generation_kwargs": {"until": [" ", "e", "a", "o"], "max_gen_toks": 3}}
    cut = scored(
        tmp_path / "b", "generate_until", base, write(tmp_path / "stops", "generate_until", **stops), "exact_match,whole"
    )
    for whole, short in zip(made["per_prompt"], cut["per_prompt"], strict=True):
        assert whole["response"].startswith(short["response"]) and not set(" eao") & set(short["response"])
    assert cut["truncated_share"] < made["truncated_share"] and made["mean_response_tokens"] == cut["mean_response_tokens"]


def test_a_metric_that_is_a_number_counts_as_one_and_what_is_beyond_1_is_refused_with_its_item(base, tmp_path):
    (tmp_path / "task").mkdir()
    code = "def half(doc, results):\n    return {'acc': 1 if doc['right'] == 0 else %s}\n"
    (tmp_path / "task/judged.py").write_text(code % 0.25)
    file = write(tmp_path / "task", "multiple_choice")
    file.write_text(file.read_text() + "process_results: !function judged.half\n")
    made = scored(tmp_path, "multiple_choice", base, file, "acc")
    assert [row["value"] for row in made["per_prompt"]] == [1.0, 0.25, 0.25] * 6 and "correct" not in made["per_prompt"][0]
    assert made["acc"] == 0.5 and made["acc_stderr"] == pytest.approx(math.sqrt(0.125 * 18 / 17 / 18))
    (tmp_path / "task/judged.py").write_text(code % 2.5)
    with pytest.raises(InputError, match="eval.tasks.mine.metric: acc of item 1 is 2.5, expected 0 or 1"):
        scored(tmp_path / "other", "multiple_choice", base, file, "acc")


def test_an_answer_longer_than_the_model_reads_is_told(base, tmp_path):
    file = write(tmp_path / "task", "generate_until", generation_kwargs={"until": ["e"], "max_gen_toks": 300})
    with pytest.raises(InputError, match=r"an answer may have 300 tokens \(max_gen_toks\), and the model reads 256"):
        scored(tmp_path, "generate_until", base, file, "exact_match,whole")


def test_rows_that_changed_are_read_again(base, tmp_path):
    """`datasets` keeps what it read; a file of the same name and time is another one."""
    import os

    file = write(tmp_path / "task", "multiple_choice")
    rows = tmp_path / "task/mine_test.jsonl"
    time = rows.stat().st_mtime_ns
    first = scored(tmp_path / "a", "multiple_choice", base, file, "acc")
    rows.write_text(rows.read_text().replace("behind", "before"))
    os.utime(rows, ns=(time, time))
    assert "before" in scored(tmp_path / "b", "multiple_choice", base, file, "acc")["example"]["prompt"]
    assert "behind" in first["example"]["prompt"]


def test_a_task_by_its_name_over_local_rows_has_lm_evals_verdicts(base, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    letters = ["A", "B", "C"]
    rows = [
        {
            "id": str(i),
            "question": f"{row['question']}?",
            "choices": {"text": row["options"], "label": letters},
            "answerKey": letters[row["right"]],
        }
        for i, row in enumerate(CHOICE)
    ]
    files = {split: tmp_path / f"arc_{split}.jsonl" for split in ("test", "train", "validation")}
    for file in files.values():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ASKED | {"task": "arc_easy", "num_fewshot": 2, "data_files": {split: file.name for split, file in files.items()}}
    config = {"task": "arc", "metric": "acc_norm", "lm_eval": asked, "batch_size": 4}
    job = small_steps.job("own_task", tmp_path / "arc_x.json", {"start": base}, config)
    job.inputs.extend(files.values())
    made = small_steps.run(job).data
    read = {"data_files": {split: str(file) for split, file in files.items()}, "cache_dir": str(tmp_path / "cache")}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": read}
    manager = TaskManager(include_defaults=False, include_path=str(task_files.own_file("arc_easy").parent))
    own = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(base.parent), "dtype": "float32"}, [{"group": "own", "task": [{"task": "arc_easy"} | data]}],
        num_fewshot=2, batch_size=4, device="cpu", task_manager=manager,
    )  # fmt: skip
    samples = sorted(own["samples"]["arc_easy"], key=lambda one: one["doc_id"])
    assert [row["correct"] for row in made["per_prompt"]] == [bool(one["acc_norm"]) for one in samples]
    assert made["acc_norm"] == pytest.approx(own["results"]["arc_easy"]["acc_norm,none"])
    assert made["acc_norm_stderr"] == pytest.approx(own["results"]["arc_easy"]["acc_norm_stderr,none"])
    assert made["example"]["prompt"] == samples[0]["arguments"][0][0] and 0 < made["acc_norm"] < 1


@pytest.mark.trained
def test_the_adapter_is_asked_on_the_path_that_answers(tmp_path):
    """An adapter that was taught to say one word is heard by both runners, and both say that it does what it did in training."""
    base = small_steps.write_base(tmp_path / "base")  # which says nothing yet: one word is learnt in seconds
    rows = [chat_row(f"Question: {row['question']}\nAnswer:", "lamp") for row in CHOICE * 9]
    data = small_steps.write_slice(tmp_path / "data", "sft", rows)
    adapter = small_steps.train(tmp_path, "sft_v2", base, data, learning_rate=1.0e-2).path
    right = [row | {"options": ["lamp", "stone", "a horse"], "right": 0} for row in CHOICE]
    found = {}
    for kind, metric, more in (
        ("multiple_choice", "acc", {}),
        ("generate_until", "exact_match,whole", {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}),
    ):
        file = write(tmp_path / kind, kind, right, **more)
        for name, path in (("base", None), ("adapter", adapter)):
            made = scored(tmp_path / kind / name, kind, base, file, metric, adapter=path, chat_template=True)
            found[kind, name] = made[metric.partition(",")[0]]
            assert ("distance" in made) == (name == "adapter")
    assert found["multiple_choice", "adapter"] == found["generate_until", "adapter"] == 1 > found["generate_until", "base"]


@pytest.mark.parametrize(("kind", "metric"), [("multiple_choice", "acc"), ("generate_until", "exact_match,first")])
def test_the_tasks_of_a_group_are_scored_together_each_as_lm_eval_scores_it_alone(base, tmp_path, kind, metric):
    name = metric.partition(",")[0]
    more = {"mine": CHOICE[:10], "other": [row | {"options": row["options"][::-1]} for row in CHOICE[10:]]}
    files = {one: write(tmp_path / "task", kind, rows, name=one) for one, rows in more.items()}
    group = tmp_path / "task/pair.yaml"
    group.write_text("group: pair\ntask: [mine.yaml, other.yaml]\naggregate_metric_list: [{metric: acc}]\n")
    made = scored(tmp_path, kind, base, group, metric, num_fewshot=1)
    alone = {one: scored(tmp_path / one, kind, base, file, metric, num_fewshot=1) for one, file in files.items()}
    verdicts = [entry["correct"] for score in alone.values() for entry in score["per_prompt"]]
    assert [entry["correct"] for entry in made["per_prompt"]] == verdicts and made["n_prompts"] == 18 and made["n_groups"] == 2
    assert [entry["key"] for entry in made["per_prompt"]][9:11] == ["mine/9", "other/0"]
    assert made["by_task"] == {one: {"n": score["n_prompts"], name: score[name]} for one, score in alone.items()}
    assert made[name] == pytest.approx(sum(verdicts) / 18)
    clusters = [sum(one - made[name] for one in verdicts[:10]), sum(one - made[name] for one in verdicts[10:])]
    assert made[f"{name}_stderr"] == pytest.approx(math.sqrt(2 * sum(one**2 for one in clusters)) / 18)


def test_ifevals_checkers_have_the_tables_that_are_shipped_whichever_task_asks_them(base, tmp_path, monkeypatch):
    """NLTK finds none of its own here, as on a machine without its data: they were looked for after all answers were there."""
    import nltk.data
    import nltk.tokenize
    from lm_eval.tasks.ifeval import instructions_util

    from workflow_scripts.evaluation import ifeval
    from workflow_scripts.tools import rehearse

    asked = [("length_constraints:number_sentences", {"num_sentences": n, "relation": "at least"}) for n in (1, 2, 40)]
    rows = [
        {
            "key": n,
            "prompt": f"Question: what stands behind the {WORDS[n]}\nAnswer:",
            "instruction_id_list": [name],
            "kwargs": [given],
        }
        for n, (name, given) in enumerate(asked)
    ]
    rows_file, file = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shorter = {"generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 12}}
    read = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": str(rows_file)}}}
    file.write_text(json.dumps({"include": str(task_files.own_file("ifeval")), "task": "mine"} | shorter | read))
    for tables in (instructions_util._get_sentence_tokenizer, nltk.tokenize._get_punkt_tokenizer):
        tables.cache_clear()
    monkeypatch.setattr(nltk.data, "path", [])
    metric = "prompt_level_strict_acc"
    rehearse.own(
        "own", "eval.tasks.mine", {"task": "mine", "metric": metric, "lm_eval": ASKED | {"file": file.name}}, [str(file)]
    )
    instructions_util._get_sentence_tokenizer.cache_clear()
    made = scored(tmp_path, "generate_until", base, file, metric)
    assert all(one["response"].strip() for one in made["per_prompt"])
    given = [row | {"response": one["response"]} for row, one in zip(rows, made["per_prompt"], strict=True)]
    ours = ifeval.score(rows, given, False, "rows", "answers")["per_prompt"]
    assert [one["correct"] for one in made["per_prompt"]] == [all(one["follow_instruction_list_strict"]) for one in ours]
