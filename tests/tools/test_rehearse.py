"""What would fail at a score or at the first rollout is said before the first job: here, with the rows that are there."""

import json
from types import SimpleNamespace

import pytest

from tests.support.choice_rows import DEV, MMLU
from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.evaluation import ifeval
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import rehearse

PARAGRAPH = "length_constraints:nth_paragraph_first_word"
ROWS = [
    {"id": f"r:{n}", "key": n, "prompt": f"river {n}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for n in range(5)
]
BAD = {**ROWS[4], "instruction_id_list": [PARAGRAPH], "kwargs": [{"num_paragraphs": 2, "keyword": "sea"}]}
NUMBERS = [{"id": "n:1", "key": 1, "prompt": "how many?", "answer": "two", "final": "2"}]
IFEVAL = {"judge": "ifeval", "of": "eval.ifeval", "strip_think": True, "rows": ""}
REWARD = {"judge": "ifeval", "of": "reward ifeval on mine", "reward": True, "rows": ""}


def write(tmp_path, name, rows) -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def said(monkeypatch, *parts) -> str:
    """What the command says as it ends with exit status 1; nothing where all can judge."""
    monkeypatch.setattr("sys.argv", ["rehearse", json.dumps(parts)])
    try:
        rehearse.main()
    except SystemExit as ended:
        return str(ended.code)
    return ""


def test_what_judges_well_says_nothing(monkeypatch, tmp_path):
    rows, numbers = write(tmp_path, "rows.jsonl", ROWS), write(tmp_path, "numbers.jsonl", NUMBERS)
    gsm8k = {"judge": "gsm8k", "of": "eval.gsm8k", "strip_think": False, "rows": numbers}
    numeric = {"judge": "gsm8k", "of": "reward numeric on mine", "reward": True, "rows": numbers}
    assert said(monkeypatch, {**IFEVAL, "rows": rows}, {**REWARD, "rows": rows}, gsm8k, numeric, IFEVAL, REWARD) == ""


@pytest.mark.parametrize("part", [IFEVAL, REWARD])
def test_tables_that_are_not_there_are_missed_before_any_slice_is(monkeypatch, tmp_path, part):
    monkeypatch.setattr(ifeval, "_TOKENIZERS", tmp_path)
    assert "punkt_tab/english: not found; it belongs to this package" in said(monkeypatch, part)


def test_whatever_a_library_raises_is_one_line_that_names_the_task(monkeypatch):
    import langdetect

    def refuses(text):
        raise PermissionError(13, "Permission denied: 'profiles'")

    monkeypatch.setattr(langdetect, "detect", refuses)
    wanted = "eval.ifeval: can't judge an answer on this machine (PermissionError: [Errno 13] Permission denied: 'profiles')"
    assert said(monkeypatch, IFEVAL) == wanted


@pytest.mark.parametrize("part", [IFEVAL, REWARD])
def test_a_row_of_a_slice_that_is_there_is_judged_too(monkeypatch, tmp_path, part):
    """One that was made before rows were judged, or with another lm-eval."""
    rows = write(tmp_path, "rows.jsonl", [*ROWS[:4], BAD])
    assert said(monkeypatch, {**part, "rows": rows}).startswith(f"{rows}: row r:4: {PARAGRAPH} refuses the kwargs")


def test_one_row_of_each_form_is_enough():
    wanted = [ROWS[0], {**ROWS[1], "kwargs": [{"count": 2}]}, {**ROWS[3], "kwargs": [{"count": 2.5}]}]
    given = [wanted[0], ROWS[1], wanted[1], {**ROWS[2], "kwargs": [{"count": 3}]}, wanted[2], ROWS[4]]
    assert list(rehearse.one_of_each(given)) == wanted and list(rehearse.one_of_each(NUMBERS * 3)) == NUMBERS


@pytest.mark.parametrize("made", [True, False])
def test_a_subject_with_too_few_examples_is_said_also_while_its_slices_are_files(monkeypatch, tmp_path, made):
    names = [write(tmp_path, name, rows) for name, rows in (("asked.jsonl", MMLU), ("dev.jsonl", DEV))]
    one = [{"made": name} if made else {"made": "", "files": [name], "rows": 99, "seed": 1, "format": None} for name in names]
    part = {"judge": "mmlu", "of": "eval.mmlu", "asked": one[0], "solved": one[1]}
    assert said(monkeypatch, {**part, "shots": 4}) == ""
    assert f"{names[1]}: 4 rows of the subject anatomy" in said(monkeypatch, {**part, "shots": 5})


def test_tasks_of_multiple_choice_are_made_where_no_question_is_known_yet(monkeypatch):
    hub = {"made": "", "files": []}
    both = [{"judge": task, "of": f"eval.{task}", "asked": hub, "shots": 0} for task in ("mmlu", "truthfulqa")]
    assert said(monkeypatch, *both) == ""


def job(rule: str, **wildcards):
    return SimpleNamespace(rule=SimpleNamespace(name=rule), wildcards=type("W", (dict,), {"__getattr__": dict.get})(wildcards))


def test_a_run_is_asked_for_its_scorers_and_verifiers_each_once(tmp_path):
    user = read_yaml("config/config.yaml")
    plan = Plan(Config(merge(user, {"pathvars": {"results": str(tmp_path)}, "eval": {"gsm8k": {"strip_think": True}}})))
    (tmp_path / "data").mkdir()
    for name in ("ifeval", "instructions", "sums_eval"):
        (tmp_path / f"data/{name}.jsonl").write_text("")
    jobs = [job("score", task=task, run=run) for task in ("ifeval", "gsm8k") for run in ("base", "dpo")]
    assert rehearse.parts(plan, jobs) == []  # they come first themselves
    jobs += [job(f"train_{plan.experiment(run)['method']}", run=run) for run in ("dpo", "grpo", "grpo.seed2", "ppo_ifeval", "rm")]
    found = {part.pop("of"): part for part in rehearse.parts(plan, [*jobs, job("slice_data", slice="sums_eval")])}
    assert found == {
        "eval.ifeval": {"judge": "ifeval", "rows": f"{tmp_path}/data/ifeval.jsonl", "strip_think": False},
        "eval.gsm8k": {"judge": "gsm8k", "rows": "", "strip_think": True},
        "reward ifeval on instructions": {"judge": "ifeval", "rows": f"{tmp_path}/data/instructions.jsonl", "reward": True},
    }


def test_a_program_for_curves_that_is_not_installed_is_said(tmp_path, monkeypatch):
    user = merge(read_yaml("config/config.yaml"), {"pathvars": {"results": str(tmp_path)}, "track": "wandb"})
    plan = Plan(Config(user))
    assert rehearse.parts(plan, [job("make_base", run="base")]) == []  # nothing trains
    found = rehearse.parts(plan, [job("train_dpo", run="dpo")])
    assert found == [{"of": "track", "judge": "track", "name": "wandb"}]
    for installed in (True, False):
        monkeypatch.setattr(rehearse, "find_spec", lambda name, there=installed: there and name == "wandb")
        expected = "track: wandb is not installed here; pip install wandb (it decides no number), or set `track: none`"
        assert said(monkeypatch, found[0]) == ("" if installed else expected)


def test_a_server_that_is_not_installed_is_said_before_the_first_job(tmp_path, monkeypatch):
    more = {
        "pathvars": {"results": str(tmp_path)},
        "generation": {"backend": "vllm"},
        "device": "cuda",
        "eval": {"precision": "bf16"},
    }
    plan = Plan(Config(merge(read_yaml("config/config.yaml"), more)))
    assert "generation.backend" not in {part["of"] for part in rehearse.parts(plan, [job("train_dpo", run="dpo")])}
    (found,) = rehearse.parts(plan, [job("generate", run="dpo", task="ifeval")])
    versions = fingerprint.of_vllm({"torch": ""})
    assert found == {"of": "generation.backend", "judge": "generation.backend", "versions": versions}
    (alone,) = rehearse.parts(
        Plan(Config(merge(plan.config.data, {"allow_package_mismatch": True}))), [job("generate_shard", run="dpo", task="ifeval")]
    )
    assert alone["versions"] == {"vllm": versions["vllm"]}
    wants = "generation.backend: vllm needs an environment of its own, with {} (here: {}); run snakemake with `--sdm conda` "
    wants += "(envs/vllm.yaml), or set `generation.backend: graphs`"
    assert said(monkeypatch, found) == wants.format(f"vllm {versions['vllm']}", "not installed")
    for torch, expected in (("2.0.0", wants.format(f"torch {versions['torch']}", "2.0.0 is installed")), (versions["torch"], "")):
        monkeypatch.setattr(rehearse.runinfo, "installed", lambda names, torch=torch: {**versions, "torch": torch})
        assert said(monkeypatch, found) == expected


def test_what_chooses_is_tried_as_the_task_that_it_stands_for(tmp_path):
    user = merge(merge(read_yaml("config/config.yaml"), read_yaml("config/tuned.yaml")), {"pathvars": {"results": str(tmp_path)}})
    jobs = [job("score_development", run="dpo_t1"), job("train_dpo", run="dpo_t1")]
    assert rehearse.parts(Plan(Config(user)), jobs) == [
        {"of": "tune.choose", "judge": "ifeval", "rows": "", "strip_think": False}
    ]
