"""Tasks of `eval.tasks` around their step: what is refused and when, what decides a task, Snakemake, the report, other tools."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import ROOT
from tests.support import own_task, report_world, study
from tests.support.own_task import ASKED, CHOICE, MEAN, write
from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config
from workflow_scripts.config.written import merge
from workflow_scripts.data import hub
from workflow_scripts.plan import estimate, records
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.report import collect
from workflow_scripts.tools import compare, differences, graph, pin, rehearse, status, verify
from workflow_scripts.tools.graph import Phase

COMMIT = "a" * 40


def plan(tasks: dict, *more: dict) -> Plan:
    data = config.load(ROOT / "config/config.yaml").data
    for one in ({"eval": {"tasks": tasks}}, *more):
        data = merge(data, one)
    return Plan(config.Config(data))


def body(metric: str = "acc", group_by: str = "", **asked) -> dict:
    return {"lm_eval": ASKED | asked, "metric": metric} | ({"group_by": group_by} if group_by else {})


# -- refused when the config is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("x", body(task="arc_eazy"), "tasks.x.lm_eval.task: lm-eval has no task 'arc_eazy'; nearest: arc_easy"),
        ("x", body(task="arc_easy"), "tasks.x.lm_eval.revision: missing: the rows are allenai/ai2_arc's, on a hub"),
        ("x", body(task="humaneval"), "tasks.x.lm_eval.task: runs code that the model writes .unsafe_code: true."),
        ("x", body(task="mbpp"), "tasks.x.lm_eval.task: runs code that the model writes"),
        ("x", body(task="mmlu"), "tasks.x.lm_eval.revision: missing: the rows are cais/mmlu's, on a hub"),
        ("x", body(task="glue", revision=COMMIT), "the task has .*|is a group whose rows come from"),
        ("x", body(task="tinyBenchmarks", revision=COMMIT), "has a task with settings of its own inside the group"),
        ("x", body(task="mmlu", data_files={"test": "a.jsonl"}), "data_files: names files for a group of 57 tasks"),
        ("x", body(task="squadv2"), "tasks.x.lm_eval.task: is a task written in Python"),
        (
            "x",
            body(task="wikitext"),
            "is of output_type loglikelihood_rolling, expected one of generate_until",
        ),
        ("x", body("f1", task="arc_easy", revision=COMMIT), "tasks.x.metric: found 'f1', and the task has acc, acc_norm"),
        ("x", body("exact_match", task="gsm8k", revision=COMMIT), "in 2 ways: exact_match,strict-match, exact_match,flexible"),
        (
            "x",
            body("exact_match,loose", task="gsm8k", revision=COMMIT),
            "found 'exact_match,loose', and the task reads",
        ),
        ("x", body("acc", task="arc_easy", file="mine.yaml"), "tasks.x.lm_eval: expected either task .* or file"),
        ("x", body("acc"), "tasks.x.lm_eval: expected either task .* or file"),
        ("x", body("acc", file="nowhere.yaml"), "tasks.x.lm_eval.file: .*nowhere.yaml: cannot be read: No such file"),
        ("x", body("acc", task="arc_easy", data_files={"test": "nowhere.jsonl"}), "data_files: nowhere.jsonl is missing"),
        (
            "x",
            body("acc", task="arc_easy", data_files={"test": "a/b.jsonl", "train": "c.csv"}),
            "files that end in .csv, .jsonl",
        ),
        ("x", body("acc", task="arc_easy", revision="main"), "tasks.x.lm_eval.revision: "),
        (
            "x",
            body("acc", task="arc_easy", revision=COMMIT, fewshot_as_multiturn=True),
            "multiturn: found true, and there",
        ),
        ("x", body("acc", task="arc_easy", revision=COMMIT) | {"weight": 1}, "tasks.x.weight: unknown key"),
        ("gsm8k", body("acc", task="arc_easy", revision=COMMIT), "tasks.gsm8k: is a name that has a meaning of its own here"),
        (
            "ifeval_dpo",
            body("acc", task="arc_easy", revision=COMMIT),
            "of ipo and those of ifeval for dpo_ipo would be one",
        ),
        ("A", body("acc", task="arc_easy", revision=COMMIT), "eval.tasks"),
    ],
)
def test_what_can_not_be_asked_or_counted_is_one_line(name, asked, message):
    more = {"experiments": {"ipo": {"extends": "dpo"}}} if name == "ifeval_dpo" else {}
    with pytest.raises(InputError, match=message) as caught:
        plan({name: asked}, more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unsafe_code": True}, "lm_eval.file: runs code that the model writes .* set eval.tasks.mine.allow_code: true"),
        ({"filter_list": []}, "metric: is asked of a task with filter_list: .., of which lm-eval judges nothing"),
        ({"generation_kwargs": {"until": ["e"], "do_sample": True, "temperature": 0.7}}, "draws its answers"),
        ({"repeats": 4}, "draws its answers"),
        ({"generation_kwargs": {"until": ["e"], "repetition_penalty": 1.3}}, "has repetition_penalty under generation_kwargs"),
        ({"doc_to_image": "image"}, "asks about pictures or sound"),
        ({"metric_list": [{"metric": "exact_match", "aggregation": "perplexity"}]}, "put together over all items .perplexity."),
        ({"dataset_path": "json", "dataset_kwargs": None}, "no files under dataset_kwargs.data_files"),
        ({"dataset_kwargs": {"data_files": {"test": "https://there.org/a.jsonl"}}}, "reads https://there.org/a.jsonl; fetch it"),
        ({"dataset_path": "org/set", "dataset_kwargs": {}}, "revision: missing: the rows are org/set's, on a hub"),
        ({"include": "other.yaml"}, "other.yaml: cannot be read"),
    ],
)
def test_a_file_of_one_s_own_is_held_against_the_same_rules(tmp_path, change, message):
    file = write(tmp_path, "generate_until", **change)
    with pytest.raises(InputError, match=message) as caught:
        plan({"mine": body("exact_match,whole", file=str(file))})
    assert "\n" not in str(caught.value)


def test_code_that_is_not_there_is_refused_and_no_code_runs_in_a_plan(tmp_path):
    file = write(tmp_path, "multiple_choice")
    file.write_text(file.read_text() + "process_docs: !function helpers.chosen\n")
    with pytest.raises(InputError, match=r"!function helpers.chosen: there is no .*/helpers.py"):
        plan({"mine": body(file=str(file))})
    (tmp_path / "helpers.py").write_text("raise SystemExit('ran')\n")
    assert plan({"mine": body(file=str(file))}).step("score_mine", "base")["external"]


def test_two_tasks_never_share_a_score_file(tmp_path):
    file = write(tmp_path, "multiple_choice")
    both = {"mine": body(file=str(file)), "mine_dpo": body(file=str(file))}
    assert plan(both).results_of("dpo")[-2:] == ["results/mine_dpo.json", "results/mine_dpo_dpo.json"]
    with pytest.raises(InputError, match="tasks.mine_dpo: its scores of ipo and those of mine for dpo_ipo would be one file"):
        plan(both, {"experiments": {"ipo": {"extends": "dpo"}}})


# -- what decides a task ------------------------------------------------------------------------------------------------------


def test_what_decides_a_task_is_in_its_fingerprint_and_nothing_else(tmp_path):
    choice, said = write(tmp_path, "multiple_choice"), write(tmp_path / "said", "generate_until", name="said")
    (tmp_path / "helpers.py").write_text("import below\n\n\ndef chosen(docs):\n    return docs\n")
    (tmp_path / "below.py").write_text("N = 1\n")
    choice.write_text(choice.read_text() + "process_docs: !function helpers.chosen\n")
    tasks = {"mine": body(file=str(choice)), "said": body("exact_match,whole", file=str(said))}
    before = plan(tasks)
    steps = [("score_mine", "dpo"), ("score_said", "dpo"), *((f"{verb}_ifeval", "dpo") for verb in ("generate", "score"))]
    steps += [("train", "dpo"), ("slice", "sft"), ("base", "base")]
    assert all(plan({"mine": tasks["mine"]}).fingerprint(*step) == before.fingerprint(*step) for step in steps[2:])

    def stale(*more: dict) -> set:
        after = plan(tasks, *more)
        return {step[0] for step in steps if before.fingerprint(*step) != after.fingerprint(*step)}

    def of(name: str, key: str, value: object) -> dict:
        return {"eval": {"tasks": {name: {"lm_eval": {key: value}}}}}

    for key, value in (("num_fewshot", 2), ("chat_template", True), ("system", "Hello."), ("limit", 3)):
        assert stale(of("mine", key, value)) == {"score_mine"} and stale(of("said", key, value)) == {"score_said"}
    assert stale({"eval": {"tasks": {"mine": {"metric": "acc_norm"}}}}) == {"score_mine"}
    assert stale({"eval": {"batch_size": 7}}) == {"score_mine"}
    assert stale({"generation": {"backend": "hf"}}) == {"score_said", "generate_ifeval", "score_ifeval"}
    said_of = {}
    for file, old, new, wanted in (
        (choice, "Question", "Query", "score_mine"),
        (tmp_path / "helpers.py", "docs", "rows", "score_mine"),
        (tmp_path / "below.py", "1", "2", "score_mine"),
        (tmp_path / "mine_test.jsonl", "river", "brook", "score_mine"),
        (tmp_path / "said/said_solved.jsonl", "river", "brook", "score_said"),
    ):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        assert stale() == {wanted}, file
        after = plan(tasks)
        said_of[file.name] = differences.differences(
            after.config, wanted, "dpo", *(one.step(wanted, "dpo") for one in (before, after))
        )
        file.write_text(text)
    assert stale() == set()
    assert said_of["mine.yaml"] == said_of["below.py"] == [f"external content: {choice}, or its code, changed"]
    solved = tmp_path / "said/said_solved.jsonl"
    assert said_of["said_solved.jsonl"] == [f"external content: rows of {tmp_path}/said/said_test.jsonl, {solved} changed"]


def test_what_an_answer_may_take_decides_tasks_that_run_answers_alone(tmp_path):
    runs = write(tmp_path / "runs", "generate_until", name="runs", unsafe_code=True)
    said = write(tmp_path / "said", "generate_until", name="said")
    tasks = {
        "runs": body("exact_match,whole", file=str(runs)) | {"allow_code": True},
        "said": body("exact_match,whole", file=str(said)),
    }
    before, after = plan(tasks), plan(tasks, {"eval": {"sandbox": {"seconds": 60}}})
    assert before.step("score_runs", "dpo")["config"]["allow_code"]["seconds"] == 30
    stale = {of for of in ("runs", "said") if before.fingerprint(f"score_{of}", "dpo") != after.fingerprint(f"score_{of}", "dpo")}
    assert stale == {"runs"}


def test_where_the_files_lie_decides_nothing(tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        write(folder, "multiple_choice")
        files = {split: str(folder / f"mine_{split}.jsonl") for split in ("test", "solved")}
        (folder / "task.yaml").write_text(
            yaml.safe_dump({"task": "mine", **own_task.SHARED, **own_task.DEFINITIONS["multiple_choice"]})
        )
        found.append(plan({"mine": body(file=str(folder / "task.yaml"), data_files=files)}).fingerprint("score_mine", "base"))
    assert found[0] == found[1]


def test_every_phase_names_its_parents_its_key_and_what_it_asks_for(tmp_path):
    choice, said = write(tmp_path, "multiple_choice"), write(tmp_path / "said", "generate_until", name="said")
    made = plan({"my_own": body(file=str(choice)), "said": body("exact_match,whole", file=str(said))})
    made.check()
    assert made.results_of("dpo")[-2:] == ["results/my_own_dpo.json", "results/said_dpo.json"]
    for phase in (Phase("score_my_own", "dpo"), Phase("score_said", "base"), Phase("score_said", "sft_v2_merged")):
        wanted = {role: made.fingerprint(*parent) for role, parent in graph.parents(made, phase).items()}
        assert wanted == made.step(*phase)["parents"]
    assert graph.phases_by_file(made, [])["results/my_own_dpo.json"] == Phase("score_my_own", "dpo")
    for task, shots in (("my_own", 2), ("said", 3)):
        more = plan(merge(made.config.own_tasks, {task: {"lm_eval": {"num_fewshot": shots}}}))
        old, new = (one.step(f"score_{task}", "dpo") for one in (made, more))
        lines = differences.differences(more.config, f"score_{task}", "dpo", old, new)
        assert lines == [f"eval.tasks.{task}.lm_eval.num_fewshot: 0 -> {shots}"]
        asked, later = estimate.Estimates(made), estimate.Estimates(more)
        assert all(value > 0 for value in asked.ask(f"own_{task}", "dpo", 1).values())
        assert later.gpu_mb(f"own_{task}", "dpo") > asked.gpu_mb(f"own_{task}", "dpo") > 0


# -- a hub --------------------------------------------------------------------------------------------------------------------


def test_a_hub_s_rows_are_looked_for_before_the_first_job(tmp_path, monkeypatch):
    from huggingface_hub import constants

    step = plan({"arc": body("acc_norm", task="arc_easy", revision=COMMIT)}).step("score_arc", "base")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=f"eval.tasks.arc: the dataset allenai/ai2_arc at revision {COMMIT} is not here"
    ) as caught:
        hub.check([step])
    assert "under the task's `data_files`" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / f"datasets--allenai--ai2_arc/snapshots/{COMMIT}").mkdir(parents=True)
    (tmp_path / f"datasets--allenai--ai2_arc/snapshots/{COMMIT}/a.parquet").write_text("")
    hub.check([step])


def test_the_commit_of_a_task_s_rows_is_pinned(tmp_path):
    own = write(tmp_path, "multiple_choice", dataset_path="org/set", dataset_kwargs={})
    text = f"""eval:
  tasks:
    arc:
      lm_eval:
        task: arc_easy      # science
        num_fewshot: 0
    own: {{lm_eval: {{file: {own}, limit: null}}, metric: acc}}
    here: {{lm_eval: {{task: arc_easy, data_files: {{test: a.jsonl}}}}}}
    local: {{lm_eval: {{file: {write(tmp_path / "local", "multiple_choice")}}}}}
"""
    asked = []

    class Hub:
        def dataset_info(self, name: str, revision: str | None) -> SimpleNamespace:
            asked.append((name, revision))
            return SimpleNamespace(sha=COMMIT)

    new, made = pin.pin(text, Hub())
    assert asked == [("allenai/ai2_arc", None), ("org/set", None)] and len(made) == 2
    tasks = yaml.safe_load(new)["eval"]["tasks"]
    assert tasks["arc"]["lm_eval"] == {"task": "arc_easy", "revision": COMMIT, "num_fewshot": 0} and "# science" in new
    assert tasks["own"] == {"lm_eval": {"file": str(own), "revision": COMMIT, "limit": None}, "metric": "acc"}
    assert {name: tasks[name] for name in ("here", "local")} == {
        name: yaml.safe_load(text)["eval"]["tasks"][name] for name in ("here", "local")
    }
    assert pin.pin(new, Hub()) == (new, []) and len(asked) == 2


# -- through Snakemake, and the report ----------------------------------------------------------------------------------------


def test_a_second_run_is_a_no_op_and_a_changed_setting_plans_that_task_alone(fresh):
    choice = write(fresh.folder / "tasks", "multiple_choice", root=fresh.folder)
    said = write(fresh.folder / "tasks", "generate_until", name="said", root=fresh.folder)
    tasks = {
        "my_own": body("acc_norm", group_by="story", file=str(choice.relative_to(fresh.folder))),
        "said": body("exact_match,whole", file=str(said.relative_to(fresh.folder))),
    }
    configs = fresh.overlay(yaml.safe_dump({"eval": {"tasks": tasks}}))
    targets = ["results/my_own_base.json", "results/said_base.json"]
    everything = fresh.plan(configs=configs)
    assert everything["own_task"] == everything["generate"] == everything["score"]  # two tasks of each for every run
    fresh.snakemake(*targets, configs=configs)
    assert fresh.plan(*targets, configs=configs) == {}
    tasks["said"]["lm_eval"]["num_fewshot"] = 1
    changed = fresh.overlay(yaml.safe_dump({"eval": {"tasks": tasks}}))
    assert fresh.plan(*targets, configs=changed) == {"own_task": 1} and fresh.plan(targets[0], configs=changed) == {}
    with contextlib.chdir(fresh.folder):
        made = manifests.read(targets[0]).data
        assert made["n_prompts"] == 18 and made["n_groups"] == 6 and made["metric"] == "acc_norm"
        places = {(place.kind, place.name) for place in records.find("results")}
        assert {("score_my_own", "base"), ("score_said", "base")} <= places
        findings = verify.verify("results")
        assert not [finding.problems for finding in findings if finding.problems]
        (row,) = [status.describe(folder, Path("results"), 0.0) for folder in [Path("results/base")]]
        assert row["tasks"]["my_own"] == made["acc_norm"] and set(row["tasks"]) == {"my_own", "said"}
        assert "my_own, %" in status.table([row])
    text = (fresh.folder / "tasks/mine_test.jsonl").read_text()
    (fresh.folder / "tasks/mine_test.jsonl").write_text(text.replace("river", "brook"))
    assert fresh.plan(targets[0], configs=changed) == {"own_task": 1}


def test_a_task_is_tried_before_anything_is_trained(tmp_path):
    def tried(kind: str, metric: str, rows: list[dict] = CHOICE, **more) -> None:
        file = write(tmp_path, kind, rows, **more)
        made = plan({"mine": body(metric, file=str(file))})
        rehearse.own("own", "eval.tasks.mine", made.step("score_mine", "base")["config"], made.own_task_inputs("mine"))

    for kind, metric in (("multiple_choice", "acc"), ("loglikelihood", "acc"), ("generate_until", "exact_match,whole")):
        tried(kind, metric)
    with pytest.raises(
        InputError, match="eval.tasks.mine: lm-eval can't make this task of .*mine.yaml .*'nothing' is undefined|nothing"
    ):
        tried("multiple_choice", "acc", doc_to_choice="{{nothing.there}}")
    pair = [{"metric": "f1", "aggregation": "mean"}, {"metric": "acc", **MEAN}]
    with pytest.raises(InputError, match="eval.tasks.mine.metric: f1 of an item is .*, expected 0 or 1"):
        tried("multiple_choice", "f1", metric_list=pair)


@pytest.mark.slow
def test_the_report_takes_any_task_in_a_family(tmp_path):
    tasks = {"my_own": body(file=str(write(tmp_path, "multiple_choice")))}
    families = {"own": {"title": "What of mine is left?", "task": "my_own", "reference": "sft_v2", "runs": ["dpo", "kto"]}}
    overlay = {"eval": {"tasks": tasks}, "report": {"families": families}}
    made = report_world.make(tmp_path, report_world.write_config(tmp_path, overlay=overlay))
    html = report_world.report(tmp_path, made)
    assert "What of mine is left?" in html and "(own: my_own, acc, exploratory)" in html
    rows = [line.split(",") for line in (tmp_path / "results/report/comparison.csv").read_text().splitlines()]
    assert [row[2] for row in rows if row[0] == "own"] == ["my_own", "my_own"]
    shown = json.loads(html.split('id="answers">')[1].split("</script>")[0])
    assert {pair[0] for pair in shown["pairs"]} == {"ifeval", "gsm8k"}
    scores = compare.read([tmp_path / f"results/my_own_{run}.json" for run in ("sft_v2", "dpo")])
    assert "accuracy, against the row above" in compare.table(scores).columns
    file = Path(tmp_path / "results/my_own_dpo.json")
    found = json.loads(file.read_text())
    file.write_text(manifests.dump(found | {"acc": 0.5 * found["acc"]}))
    with pytest.raises(InputError, match="my_own_dpo.json: acc is .*, and its verdicts make"):
        report_world.report(tmp_path, made)
    file.write_text(manifests.dump(found | {"generation_config": {"repetition_penalty": 1.2}}))
    other = tmp_path / "results/my_own_kto.json"
    other.write_text(manifests.dump(json.loads(other.read_text()) | {"generation_config": {}}))
    with pytest.raises(InputError, match="report.families.own: .* that compares settings of decoding"):
        report_world.report(tmp_path, made)


def test_the_table_of_scores_takes_groups_as_clusters():
    rows = [{"key": i, "correct": i < 3, "group": f"g{i // 2}"} for i in range(6)]
    world = collect.World({}, {("mine", "dpo"): {"metric": "acc", "per_prompt": rows}}, {})
    assert world.clusters("mine", "dpo") == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]] and world.label("mine") == "mine, acc"


def test_rows_of_a_hub_are_taken_at_their_revision_and_a_hub_that_is_not_there_is_one_line(fresh, tmp_path):
    repository = tmp_path / "hub/datasets/allenai/ai2_arc"
    repository.mkdir(parents=True)
    letters = ["A", "B", "C"]
    lines = [
        {"question": row["question"], "choices": {"text": row["options"], "label": letters}, "answerKey": letters[row["right"]]}
        for row in CHOICE
    ]
    files = []
    for split in ("train", "validation", "test"):
        (repository / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append({"split": split, "path": f"{split}.jsonl"})
    card = yaml.safe_dump({"configs": [{"config_name": "ARC-Easy", "data_files": files}]})
    (repository / "README.md").write_text(f"---\n{card}---\n")
    configs = fresh.overlay(yaml.safe_dump({"eval": {"tasks": {"arc": body("acc_norm", task="arc_easy", revision=COMMIT)}}}))
    fresh.variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = fresh.snakemake("results/arc_base.json", configs=configs, check=False)
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "ai2_arc" in line]
    assert done.returncode and line.startswith(f"eval.tasks.arc: the dataset allenai/ai2_arc at revision {COMMIT} is not here")
    assert not (fresh.folder / "results/base").exists(), "it is told before anything is made"
    server, fresh.variables = study.serve(tmp_path / "hub")
    try:
        fresh.snakemake("results/arc_base.json", configs=configs)
    finally:
        server.shutdown()
    asked = {one.split(" ", 1)[1] for one in server.RequestHandlerClass.asked}
    assert asked == {f"allenai/ai2_arc {COMMIT}"}
    made = json.loads((fresh.folder / "results/arc_base.json").read_text())
    assert made["n_prompts"] == 18 and made["example"]["prompt"].startswith("Question: what stands behind the river")
    assert "unpinned" not in made and fresh.plan("results/arc_base.json", configs=configs) == {}
