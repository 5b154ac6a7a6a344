"""Rewards that the config declares: what is wrong with one is one line, early; a line of it retrains what used it alone."""

import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml

from tests.conftest import ROOT
from tests.support import small_steps
from tests.training.test_resume import METHODS, end_at, outcome
from workflow_scripts.artifacts import manifests, own_code
from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.models import loading
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError, Interrupted
from workflow_scripts.rl import declared, expressions
from workflow_scripts.tools import differences, rehearse

GOOD = '''"""Short answers are good."""
import helper_of_mine


def concise(prompts, completions, **columns):
    return [helper_of_mine.short(completion[-1]["content"]) for completion in completions]


def other(prompts, completions, **columns):
    return [0.0] * len(completions)
'''
HELPER = "def short(text):\n    return 1 / (1 + len(text))\n"
HEAD = "def concise(prompts, completions, id, **columns):\n"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Modules of one test are none of the next one's."""
    there = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    yield
    declared._module.cache_clear()
    for name in set(sys.modules) - there:
        if "of_mine" in name or name == "my_rewards":
            del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    """write(source, name): a file of the user's own; its folder has a helper."""
    folder = tmp_path / "own"
    folder.mkdir()

    def to(source: str = GOOD, name: str = "my_rewards.py", helper: str = HELPER):
        (folder / "helper_of_mine.py").write_text(helper)
        (folder / name).write_text(source)
        return folder / name

    return to


def config_with(rewards: dict, experiments: dict | None = None) -> Config:
    return Config(merge(read_yaml(ROOT / "config/config.yaml"), {"rewards": rewards, "experiments": experiments or {}}))


def config_of(file, function="concise", **more) -> Config:
    own = {"own": {"extends": "grpo", "reward": {"mine": 0.7, "ifeval": 0.3}}}
    return config_with({"mine": {"file": str(file), "function": function}, **more}, own)


def job_of(method: str, file, base, slices, out, reward: dict | None = None, more: dict | None = None, **config) -> manifests.Job:
    made = small_steps.train_config(method, **METHODS[method])
    own = {"mine": {"file": file.name, "function": "concise"}} if file else {}
    made |= {"reward": reward or {"mine": 0.7, "ifeval": 0.3}, "rewards": own | (more or {}), **config}
    parents = {"start": base, "rows": slices[method]}
    job = small_steps.job(f"train_{made['method']}", out / "adapter/manifest.json", parents, made)
    if file:
        source = own_code.read(file)
        job.inputs.extend(source.files)
        job.step["external"] = {"rewards": {"mine": source.logic}}
    return job


def test_the_example_of_the_documentation_plans_and_judges(write, tmp_path, monkeypatch):
    text = (ROOT / "docs/add-an-experiment.md").read_text().split("## Rewards of your own")[1].split("\n## ")[0]
    source, first, second = re.findall(r"```(?:python|yaml)\n(.*?)```", text, flags=re.S)
    file = write(source)
    monkeypatch.chdir(file.parent)
    told = merge(yaml.safe_load(first), yaml.safe_load(second))
    Plan(config_with(told["rewards"], told["experiments"])).check()
    rows = [{"id": f"a:{n}", "prompt": "p", "final": "18", "chosen": "c"} for n in (1, 2)]
    monkeypatch.setattr(expressions, "check", lambda settings: lambda response, row: False)  # its library is optional
    for name, settings in told["rewards"].items():
        assert declared.make(name, settings, Path(settings["file"]) if "file" in settings else None, rows, "rows")
    assert declared.own(file, "concise")([], [[{"content": "one two"}]], ["a:1"], ["{}"]) == [1 / 3]


# -- mistakes ------------------------------------------------------------

AT_PLANNING = {
    "def concise(prompts, completions, **columns)\n    return 1\n": r"mine.file: .*rewards.py: line 1: no Python: expected ':'",
    "x = 1\nreturn x\n": r"mine.file: .*my_rewards.py: line 2: no Python: 'return' outside function",
    "def concis(prompts, completions, **columns):\n    return []\n": r"mine.function: .*no function 'concise'; it has concis$",
    "\n\ndef concise(prompts, completions):\n    return []\n": r"mine.function: .*line 3: concise takes no `\*\*columns`",
    "async def concise(prompts, completions, **columns):\n    return []\n": "line 1: concise is `async`; write a plain `def`",
    "from . import helper_of_mine\n" + GOOD: r"my_rewards.py: line 1: a relative import",
    "import helper_of_mine\n" + GOOD: None,
}


@pytest.mark.parametrize("source", AT_PLANNING)
def test_a_file_that_can_not_work_is_one_line_of_the_plan(write, source):
    plan = Plan(config_of(write(source)))
    if AT_PLANNING[source] is None:
        return plan.check()
    with pytest.raises(InputError, match=AT_PLANNING[source]) as caught:
        plan.check()
    assert str(caught.value).startswith("--config: rewards.mine.") and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_helper_that_is_no_python(write, tmp_path):
    with pytest.raises(InputError, match="rewards.mine.file: .*nowhere.py: can't be read: No such file"):
        Plan(config_of(tmp_path / "nowhere.py")).check()
    with pytest.raises(InputError, match="rewards.mine.file: .*helper_of_mine.py: line 1: no Python"):
        Plan(config_of(write(helper="def short(:\n"))).check()


BEFORE_A_MODEL = {
    HEAD + "    return [1.0]\n": r"my_rewards.py: line 1: concise gives 1 numbers for 2 completions",
    HEAD + "    return 1.0\n": r"line 1: concise gives a float, expected a list of 2 numbers",
    HEAD + "    return [0.5, float('nan')]\n": r"line 1: concise gives nan for row instructions/1, expected a finite number",
    HEAD + "    return [None, 1]\n": r"concise gives None for row instructions/0",
    HEAD + "    return [[1], [2]]\n": r"concise gives \[1\] for row instructions/0",
    HEAD + "    return [1 / len(c[0]['content']) for c in completions]\n": (
        r"my_rewards.py: line 2: ZeroDivisionError: division by zero \(row instructions/1\)"),
    "import nothing_of_mine\n" + HEAD + "    return [1.0] * len(id)\n": (
        r"my_rewards.py: line 1: ModuleNotFoundError: No module named 'nothing_of_mine'; install it"),
    "import helper_of_mine\nx = helper_of_mine.absent\n" + HEAD + "    pass\n": "my_rewards.py: line 2: AttributeError: module",
    "def concise(prompts, completions, topic, **columns):\n    return []\n": (
        r"line 1: concise: missing a required argument: 'topic'; it is called with id, .*instruction_id_list"),
    "import sys\n" + HEAD + "    sys.exit('enough')\n": r"line 3: SystemExit: enough \(row instructions/0\)",
}  # fmt: skip


@pytest.mark.parametrize("source", BEFORE_A_MODEL)
def test_a_reward_that_can_not_judge_two_rows_is_one_line_before_a_model_is_loaded(
    write, source, base, slices, tmp_path, monkeypatch
):
    file = write(source)
    job = job_of("grpo", file, base, slices, tmp_path)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=BEFORE_A_MODEL[source]) as caught:
        small_steps.run(job)
    assert "\n" not in str(caught.value) and not job.out.exists()
    assert BEFORE_A_MODEL[source] and said(monkeypatch, file, slices["instructions"]) == str(caught.value)


def said(monkeypatch, file, slice_manifest) -> str:
    """What the rehearsal says of it as the run begins."""
    rows = str(slice_manifest).replace(".manifest.json", ".jsonl")
    part = {"judge": "declared", "of": "reward mine on instructions", "name": "mine", "kind": "ifeval"}
    part |= {"settings": {"file": str(file), "function": "concise"}, "asked": {"made": rows, "files": []}}
    monkeypatch.setattr("sys.argv", ["rehearse", json.dumps([part])])
    try:
        rehearse.main()
    except SystemExit as ended:
        return str(ended.code)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo_ifeval"])
def test_an_exception_on_row_17_ends_the_training_at_its_rollout_with_row_and_line(write, method, base, slices, tmp_path):
    body = (
        "    for one in id:\n        if one.endswith('/17'):\n            helper_of_mine.fall(one)\n    return [1.0] * len(id)\n"
    )
    helper = HELPER + "\ndef fall(one):\n    return {}[one]\n"
    file = write("import helper_of_mine\n" + HEAD + body, helper=helper)
    job = job_of(method, file, base, slices, tmp_path, {"mine": 1.0})
    job.config["train"]["max_steps"] = 40
    with pytest.raises(InputError, match=r"helper_of_mine.py: line 5: KeyError: 'instructions/17' \(row instructions/17\)$"):
        small_steps.run(job)
    assert [path.name for path in job.out.parent.iterdir()] == [".work"]


def test_a_module_that_is_not_the_one_that_was_hashed_is_refused(write):
    file = write("import small_of_mine\n" + HEAD + "    return [1.0] * len(id)\n")
    (file.parent / "small_of_mine.py").write_text("")
    sys.modules["small_of_mine"] = SimpleNamespace(__spec__=None)  # of another folder
    with pytest.raises(InputError, match="imports small_of_mine, and another module has that name; rename .*own/small_of_mine"):
        declared.own(file, "concise")


def test_a_folder_may_be_named_in_another_way_or_by_a_link(write, tmp_path, monkeypatch):
    file = write()
    monkeypatch.setattr(sys, "path", [*sys.path, str(file.parent)])
    (tmp_path / "link").symlink_to(file.parent)
    for path in (file.parent / ".." / "own" / file.name, tmp_path / "link" / file.name):
        assert declared.own(path, "other")([], [[]], ["a:1"], ["{}"]) == [0.0]
        del sys.modules["helper_of_mine"]


def test_a_file_that_changed_after_planning_is_not_run(write, base, slices, tmp_path):
    file = write()
    job = job_of("grpo", file, base, slices, tmp_path)
    write(helper=HELPER.replace("1 +", "2 +"))
    with pytest.raises(InputError, match="my_rewards.py: it, or what it imports, changed since this step was planned"):
        small_steps.run(job)
    job.inputs = [path for path in job.inputs if path.suffix != ".py"]
    with pytest.raises(InputError, match="expected my_rewards.py, the file of the reward mine, among the inputs"):
        small_steps.run(job)


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ({"grpo": {"exact": {"field": "final", "ignore_case": True}}}, "rewards.grpo: the name of an experiment; take another"),
        ({"numeric": {"json_schema": {}}}, "rewards.numeric: not a name to use here"),
        ({"tokens": {"json_schema": {}}}, "rewards.tokens: not a name to use here"),
        ({"mine": {"file": "a.py"}}, "rewards.mine.function: missing"),
        ({"mine": {"function": "a", "json_schema": {}}}, "rewards.mine.file: missing"),
        ({"mine": {}}, "rewards.mine: found none of them, expected one of file, exact, number, math, regex, json_schema, length"),
        ({"mine": {"json_schema": {}, "regex": {"pattern": "a", "whole": True}}}, "found regex and json_schema, expected one of"),
        ({"mine": {"regex": {"pattern": "(", "whole": True}}}, "rewards.mine.regex.pattern: no regular expression: missing"),
        ({"mine": {"json_schema": {"type": "text"}}}, "rewards.mine.json_schema.type: no JSON schema"),
        ({"mine": {"length": {"unit": "words", "least": 5, "most": 4}}}, "rewards.mine.length: found least 5 above most 4"),
        ({"mine": {"length": {"unit": "words", "most": 4}}}, "rewards.mine.length.least: missing"),
        ({"mine": {"file": "a.txt", "function": "f"}}, "rewards.mine.file: found the string 'a.txt', expected"),
    ],
)
def test_a_declaration_that_says_nothing_or_too_much_is_one_line(rewards, words):
    with pytest.raises(InputError, match=words) as caught:
        config_with(rewards)
    assert "\n" not in str(caught.value)


def test_the_names_of_a_rank_sweep_and_of_models_are_taken_too():
    sweep = {"grpo": {"sweep": "rank"}}
    with pytest.raises(InputError, match="rewards.grpo_r8: the name of an experiment"):
        config_with({"grpo_r8": {"json_schema": {}}}, sweep)
    with pytest.raises(InputError, match="experiments.x.reward: found 'mien', expected ifeval, numeric, mine or"):
        config_with({"mine": {"json_schema": {}}}, {"x": {"extends": "grpo", "reward": "mien"}})


# -- what an edit makes stale ------------------------------------------------------------


def steps_of(config: Config) -> dict:
    plan = Plan(config)
    return {name: plan.fingerprint("train", name) for name in config.experiments}


def test_a_line_retrains_what_used_it_and_only_that_and_a_comment_nothing(write):
    file = write()
    (file.parent / "alone_of_mine.py").write_text("x = 1\n")
    more = {"below": {"extends": "dpo", "start_from": "own"}, "dealt": {"extends": "rloo", "reward": {"shuffled": "mine"}}}

    def now():
        config = config_of(file)
        return steps_of(config_with(config.data["rewards"], {"own": config.data["experiments"]["own"], **more}))

    before = now()
    used = {"own", "below", "dealt"}
    same = [
        (GOOD.replace("import helper", "# a comment\n\nimport helper"), HELPER),
        (GOOD.replace("Short answers", "Brief answers"), '"""Says."""\n' + HELPER.replace("1 / (1", "1  /  (1")),
    ]
    for source, helper in same:
        write(source, helper=helper)
        assert now() == before
    for source, helper in [(GOOD.replace("[-1]", "[0]"), HELPER), (GOOD, HELPER.replace("1 +", "2 +"))]:
        write(source, helper=helper)
        assert {name for name, found in now().items() if found != before[name]} == used
    write()
    (file.parent / "alone_of_mine.py").write_text("x = 2\n")  # nobody imports it
    assert now() == before


def test_what_counts_are_modules_beside_it_files_that_they_name_our_modules_and_locked_libraries(write):
    source = "import json, numpy, nothing_locked\nfrom package_of_mine.deep import one\n"
    source += "from workflow_scripts.evaluation import numerals\n" + HEAD + "    return open('words_of_mine.txt')\n"
    file = write(source)
    package = file.parent / "package_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("from . import beside\nfrom .beside import two as one\n")
    (package / "beside.py").write_text("two = 2\n")
    (file.parent / "words_of_mine.txt").write_text("a")
    step = Plan(config_of(file)).step("train", "own")
    names = ["__init__", "beside", "deep"]
    assert set(step["external"]["rewards"]["mine"]) == {
        "my_rewards.py", "words_of_mine.txt", *(f"package_of_mine/{name}.py" for name in names)
    }  # fmt: skip
    assert "evaluation.numerals" in step["code"] and "numpy" in step["packages"] and "nothing-locked" not in step["packages"]
    assert set(map(str, own_code.read(file).files)) < set(Plan(config_of(file)).train_inputs("own"))
    before = step["external"]
    (file.parent / "words_of_mine.txt").write_text("b")
    after = Plan(config_of(file)).step("train", "own")["external"]
    config = config_of(file)
    lines = differences._external(config, "train", "own", before, after)
    assert lines == ["external content: words_of_mine.txt of the reward mine changed"]
    assert differences.place(config, "train", "own", ["rewards", "mine", "function"]) == "rewards.mine.function"


def test_where_the_file_lies_decides_nothing_and_what_it_is_asked_for_does(write, tmp_path):
    file = write()
    before = Plan(config_of(file)).step("train", "own")
    moved = tmp_path / "moved"
    file.parent.rename(moved)
    assert Plan(config_of(moved / file.name)).step("train", "own") == before
    assert Plan(config_of(moved / file.name, "other")).step("train", "own") != before


# -- trained ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("method", "placebo"), [("grpo", None), ("rloo", "shuffled"), ("ppo_ifeval", None)])
def test_a_mixture_with_it_trains_in_the_micro_world(write, method, placebo, base, slices, tmp_path):
    config = {"placebo": placebo} if placebo else {}
    more = {"short": {"length": {"unit": "characters", "least": 0, "most": 30}, "strip_think": True}}
    reward = {"mine": 1.0} if placebo else {"mine": 0.5, "ifeval": 0.3, "short": 0.2}
    made = small_steps.run(job_of(method, write(), base, slices, tmp_path, reward, more, **config))
    after = made.data["objective"]["after"]
    parts = sum(weight * after[name] for name, weight in reward.items())
    penalty = after.get("missing_eos", 0.0) if method == "ppo_ifeval" else 0.0
    assert 0 < after["mine"] <= 1 and after["reward"] == pytest.approx(parts + penalty, abs=1e-4)
    assert made.data["step"]["config"]["rewards"]["mine"] == {"file": "my_rewards.py", "function": "concise"}


@pytest.mark.slow
def test_a_training_that_was_ended_goes_on_with_the_rewards_that_it_would_have_drawn(write, base, slices, tmp_path):
    file = write("import random\n" + HEAD + "    return [random.random() for _ in id]\n")
    whole = small_steps.run(job_of("grpo", file, base, slices, tmp_path / "whole", {"mine": 1.0}))
    job = job_of("grpo", file, base, slices, tmp_path / "ended", {"mine": 1.0})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        end_at(3, patch)
        small_steps.run(job)
    assert outcome(small_steps.run(job)) == outcome(whole)


def test_columns_are_the_fields_of_the_rows_and_what_it_draws_or_changes_is_undone(write):
    source = """import random, numpy, torch
seen = []
def concise(prompts, completions, final, topic, trainer_state, **columns):
    seen.append((prompts, completions, final, topic, trainer_state.global_step, sorted(columns)))
    completions.clear()
    return torch.tensor([random.random(), float(numpy.random.rand() + torch.rand(()))])
"""
    reward = declared.own(write(source), "concise")
    rows = [
        {"id": "a:1", "prompt": "one?", "final": 1, "heldout": False},
        {"id": "a:2", "prompt": "two?", "topic": "x", "final": 2},
    ]
    talks = [[{"role": "assistant", "content": text}] for text in ("1", "2")]
    before = random.getstate(), numpy.random.get_state()[2], torch.get_rng_state()
    given = {"prompts": [["p"], ["q"]], "completions": talks, "completion_ids": [[1], [2]], "id": ["a:1", "a:2"]}
    given |= {"row": [json.dumps(row) for row in rows], "trainer_state": SimpleNamespace(global_step=3)}
    first = reward(**given)
    assert first == reward(**given) and len(talks) == 2 and first[0] != first[1]
    assert (random.getstate(), numpy.random.get_state()[2]) == before[:2] and torch.equal(torch.get_rng_state(), before[2])
    seen = sys.modules["my_rewards"].seen[0]
    assert seen[0] == [["p"], ["q"]] and seen[2:] == ([1, 2], [None, "x"], 3, ["completion_ids", "id"])


def test_rehearsal_takes_rows_from_files_where_the_slice_is_not_made_yet(write, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{n}", "chosen": "a", "rejected": "b"}) + "\n" for n in "123")
    )
    source = {"path": str(tmp_path / "pairs.jsonl")}
    user = read_yaml(ROOT / "config/config.yaml")
    user["data"]["slices"]["pairs"] |= {"source": source, "rows": 3, "heldout": 1}
    user["pathvars"]["results"] = str(tmp_path / "results")
    file = write(HEAD + "    return [float('inf')] * len(columns['chosen'])\n")
    over = {"rewards": {"mine": {"file": str(file), "function": "concise"}}}
    over["experiments"] = {"own": {"extends": "grpo", "slice": "pairs", "reward": {"shuffled": "mine"}, "missing_eos_penalty": 0}}
    plan = Plan(Config(merge(user, over)))
    wildcards = type("W", (dict,), {"__getattr__": dict.get})(run="own")
    parts = rehearse.parts(plan, [SimpleNamespace(rule=SimpleNamespace(name="train_grpo"), wildcards=wildcards)])
    assert [part["of"] for part in parts] == ["reward mine on pairs"]
    monkeypatch.setattr("sys.argv", ["rehearse", json.dumps(parts)])
    with pytest.raises(SystemExit, match="line 1: concise gives inf for row pairs.jsonl:1, expected a finite number"):
        rehearse.main()
