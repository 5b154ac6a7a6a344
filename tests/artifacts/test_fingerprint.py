"""What makes a step stale: exactly what can change its outcome, and nothing else."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import planned
from tests.support.planned import ALL_RUNS, DPO, EVALS, EVERYTHING, RM, SLICES, evals, fingerprints, runs, stale
from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config.config import Config
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError

ROOT = Path(__file__).resolve().parents[2]
STEPS = sorted(
    path.stem for path in (ROOT / "workflow_scripts/steps").glob("*.py") if path.stem not in ("__init__", "cli", "scoring")
)
PROBE = fingerprint.PACKAGE + ".plumbing.probe"


def clear_caches():
    for cached in (fingerprint._read_module, fingerprint.closure, fingerprint.locked, fingerprint._parsed):
        cached.cache_clear()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of package and lock files, whose sources are what is fingerprinted. tree(path, old, new) edits one of them."""
    for step in STEPS:
        fingerprint.code(f"{fingerprint.PACKAGE}.steps.{step}")  # what parsing finds lies in __pycache__, and is copied
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "workflow_scripts", root / "workflow_scripts", ignore=shutil.ignore_patterns("*.py[co]", "punkt_tab"))
    shutil.copytree(ROOT / "envs", root / "envs")
    monkeypatch.setattr(fingerprint, "ROOT", root)
    monkeypatch.setattr(fingerprint, "LOCK_FILE", root / "envs/requirements.lock")
    clear_caches()

    def edit(path: str, old: str, new: str) -> None:
        text = (root / path).read_text()
        assert old in text, f"{path} has no {old!r}"
        (root / path).write_text(text.replace(old, new, 1))
        clear_caches()

    edit.root = root
    yield edit
    clear_caches()


@pytest.fixture
def module(tree):
    """module(source): hash of a module of the package with that source."""

    def of(source: str) -> str:
        (tree.root / "workflow_scripts/plumbing/probe.py").write_text(source)
        clear_caches()
        return fingerprint.code(PROBE)["plumbing.probe"]

    return of


@pytest.fixture
def user(tmp_path):
    return planned.config_over_a_local_file(tmp_path)


SCORES = evals("score_ifeval")
ROLLOUTS = runs("ppo", "ppo_ifeval", "grpo", "grpo_numeric", "rloo")  # trained with verifiers

CODE_EDITS = [
    ("steps/train_dpo.py", "callbacks=[trainers.Watch(job.run)]", "callbacks=[trainers.Watch(str(job.run))]", runs(*DPO)),
    ("steps/train_sft.py", "callbacks=[trainers.Watch(job.run)]", "callbacks=[trainers.Watch(str(job.run))]", ALL_RUNS),
    ("steps/generate.py", "tokenize=False", "tokenize=0", EVALS),
    ("steps/score_ifeval.py", "METRICS = (", "X = 1\nMETRICS = (", SCORES),
    ("steps/score_gsm8k.py", "def table(", "X = 1\n\n\ndef table(", evals("score_gsm8k")),
    (
        "steps/train_rm.py",
        "callbacks=[trainers.Watch(job.run)]",
        "callbacks=[trainers.Watch(str(job.run))]",
        RM | runs("ppo", "grpo"),
    ),
    ("rl/advantages.py", "WHITEN_EPSILON = 1e-8", "WHITEN_EPSILON = 1e-7", runs("ppo", "ppo_ifeval")),
    ("rl/rewards.py", "import json\n", "import json\n\nX = 1\n", ROLLOUTS),
    ("rl/reward_model.py", "logaddexp(0, -margins)", "logaddexp(0.0, -margins)", RM | ROLLOUTS),
    ("evaluation/ifeval.py", "random.seed(seed)", "random.seed(str(seed))", SCORES | ROLLOUTS),
    ("training/trainers.py", "import math\n", "import math\n\nX = 1\n", ALL_RUNS),
    ("data/words.py", "text.lower()", "text.casefold()", EVERYTHING),
    ("data/parts.py", '"gpt": "assistant"', '"gpt": "user"', EVERYTHING),
    ("artifacts/manifests.py", '"format": 1', '"format": 2', EVERYTHING),
    ("artifacts/__init__.py", "", "X = 1\n", EVERYTHING),
    ("tiny/chat_template.jinja", "<|im_start|>", "<|im_start|> ", {("base", "base")} | SLICES | ALL_RUNS | EVALS),
    ("tiny/answers.py", "\n\n\n", "\n\nX = 1\n\n\n", EVERYTHING),
    ("artifacts/work.py", "left.unlink()", "left.unlink(True)", set()),
    ("plumbing/progress.py", "10.0", "20.0", set()),
    ("tools/compare.py", "100 *", "101 *", set()),
]


@pytest.mark.parametrize(("path", "old", "new", "expected"), CODE_EDITS, ids=[edit[0] for edit in CODE_EDITS])
def test_a_line_of_logic_makes_the_steps_that_can_run_it_stale(tree, user, path, old, new, expected):
    before = fingerprints(user)
    tree(f"workflow_scripts/{path}", old, new)
    assert stale(before, fingerprints(user)) == expected


def test_the_tiny_worlds_modules_count_only_where_the_source_is_the_tiny_world(tree, user):
    user["data"]["slices"]["sft"] = user["data"]["slices"]["pairs"] | {"kind": "sft"}
    before = fingerprints(user)
    tree("workflow_scripts/tiny/world.py", "import hashlib\n", "import hashlib\n\nX = 1\n")
    plan = Plan(Config(user))
    assert fingerprints(user) != before  # prompts and base are tiny
    tiny_steps = {("slice", "ifeval"): True, ("slice", "pairs"): False, ("base", "base"): True, ("train", "dpo"): False}
    for (kind, name), tiny in tiny_steps.items():
        assert any(module.startswith("tiny") for module in plan.step(kind, name)["code"]) == tiny, (kind, name)


LOCK_EDITS = [
    ("trl==1.16.0", "trl==1.17.0", ALL_RUNS),
    ("lm_eval==0.4.13", "lm_eval==0.4.14", SCORES | evals("score_gsm8k") | ROLLOUTS),
    ("langdetect==1.0.9", "langdetect==1.0.10", SCORES | evals("score_gsm8k") | ROLLOUTS),
    ("torch==2.13.0", "torch==2.13.1", EVERYTHING),
    ("torch==2.13.0", "torch==2.13.0+cpu", set()),
    ("tensorboard==", "tensorboard==1", set()),
]


@pytest.mark.parametrize(("old", "new", "expected"), LOCK_EDITS, ids=[edit[1] for edit in LOCK_EDITS])
def test_a_locked_version_makes_the_steps_that_import_the_library_stale(tree, user, old, new, expected):
    before = fingerprints(user)
    tree("envs/requirements.lock", old, new)
    assert stale(before, fingerprints(user)) == expected


def test_what_only_checks_is_in_no_fingerprint(tree, user):
    """Not even where a step would import it: the lock of what runs has no version of it."""
    before = fingerprints(user)
    for line in (tree.root / "envs/dev.lock").read_text().splitlines():
        tree("envs/dev.lock", line, f"{line}.post9")
    assert fingerprints(user) == before
    (tree.root / "workflow_scripts/plumbing/probe.py").write_text("import pytest\n")
    clear_caches()
    with pytest.raises(InputError, match="no version of pytest, which workflow_scripts.plumbing.probe imports"):
        fingerprint.packages(PROBE)


def test_a_library_that_the_lock_lacks_is_an_error_that_names_it(tree):
    tree("envs/requirements.lock", "trl==", "not-trl==")
    with pytest.raises(InputError, match=r"requirements.lock: no version of trl, which workflow_scripts.steps.train_dpo imports"):
        fingerprint.packages(fingerprint.PACKAGE + ".steps.train_dpo")


@pytest.mark.parametrize("step", STEPS)
def test_each_step_has_locked_versions_and_counts_its_own_module(step):
    packages = fingerprint.packages(f"{fingerprint.PACKAGE}.steps.{step}", tiny=True)
    assert packages["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert all("+" not in version for version in packages.values())
    code = fingerprint.code(f"{fingerprint.PACKAGE}.steps.{step}", tiny=True)
    assert {f"steps.{step}", "artifacts.manifests", "plumbing.jsonl"} <= set(code)
    assert not {f"{fingerprint.PACKAGE}.{name}" for name in code} & fingerprint.EXEMPT


LOGIC = "def f(x, y=1):\n    return [x, y]\n\n\nclass A:\n    z = 'text'\n"


@pytest.mark.parametrize(
    "source",
    [
        "# a comment\n" + LOGIC,
        '"""Of the module."""\n\n' + LOGIC,
        LOGIC.replace("    return", '    """Of the function."""\n    # why\n    return'),
        LOGIC.replace("    z =", '    """Of the class."""\n\n    z ='),
        "\n\n" + LOGIC.replace("[x, y]", "[\n        x,\n        y,\n    ]").replace("'text'", '"text"'),
        LOGIC.replace("\n", "\r\n"),
    ],
)
def test_comments_docstrings_blank_lines_and_layout_are_not_logic(module, source):
    assert module(LOGIC) == module(source) and source != LOGIC


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y=1", "y=2"),
        ("[x, y]", "[y, x]"),
        ("'text'", "'texts'"),
        ("f(x", "g(x"),
        ("return", "yield"),
        ("class A", "class A(dict)"),
    ],
)
def test_a_change_of_logic_is_seen(module, old, new):
    assert module(LOGIC) != module(LOGIC.replace(old, new, 1))


def test_imports_inside_functions_are_followed_and_relative_ones_refused(module):
    def reached(source: str) -> set:
        module(source)
        return set(fingerprint.code(PROBE))

    assert "models.chat" not in reached("X = 1\n")
    inside = "def f():\n    if f:\n        {}\n"
    for line in (
        "from workflow_scripts.models import chat",
        "from workflow_scripts.models.chat import IGNORE",
        "import workflow_scripts.models.chat as c",
    ):
        assert {"workflow_scripts", "models", "models.chat", "plumbing.jsonl"} <= reached(inside.format(line))
    module("def f():\n    import trl\n")
    assert {"trl", "torch", "accelerate"} <= set(fingerprint.packages(PROBE))
    with pytest.raises(ImportError, match=r"probe.py: line 1: relative import"):
        module("from . import chat\n")


@pytest.mark.parametrize(
    "source", ["X = Path(__file__).with_name('table.txt')\n", "X = 'plumbing/table.txt'\n", "X = f('tables/x')\n"]
)
def test_a_file_that_a_string_names_is_code(tree, module, source):
    room = tree.root / "workflow_scripts/plumbing"
    (room / "tables/x").mkdir(parents=True)
    for path in (room / "table.txt", room / "tables/x/one.txt"):
        path.write_text("1")
    before = module(source)
    assert module(source) == before
    for path in (room / "table.txt", room / "tables/x/one.txt"):
        path.write_text("2")
    assert module(source) != before


# All that a counted module may use of the plumbing, and why no number comes from it.
PLUMBING_USED = {
    "messages.InputError": "stops a step",
    "messages.Interrupted": "ends a step",
    "progress.Progress": "prints",
    "card.lay_beside": "writes a README.md beside an adapter, which nothing reads",
    "rows.check": "stops a step",
    "cli.run": "is the way in: gets `main`, returns nothing (the test below)",
    "content_cache.ContentCache": "identity of files, as fingerprint.file_sha256",
    "fingerprint.fingerprint": "names a folder and a manifest",
    "fingerprint.file_sha256": "identity of a file",
    **dict.fromkeys(("own_code.read", "own_code.Own"), "a reward's files, which are run as they are or not at all"),
    "runinfo.check_packages": "stops a step; what differs is written beside the results",
    "runinfo.collect": "run.json, which nothing reads",
    "startup.ready": "says when garbage is looked for",
    **dict.fromkeys(("ranks.first", "ranks.count", "ranks.number"), "who shares the work, and who writes: decides no result"),
    "ranks.in_step": "which of several ranks computes what all of them get",
    **dict.fromkeys(("ranks.come", "ranks.Lost", "ranks.PATIENCE"), "who is waited for, and how long"),
    **dict.fromkeys(("nodes.read_address", "nodes.write_address", "ranks.nodes"), "where ranks of several hosts meet"),
    **dict.fromkeys(("ranks.meeting", "ranks.device"), "where ranks meet, and by which backend"),
    "gpus.limit": "bounds what a step may allocate: it fails or not; with vllm, how many answers are decoded at once; in "
    "training, which batches are recorded: the same kernels either way",
    "gpus.remember_peak": "a figure of run.json",
    "work.publish": "moves finished files",
    "work.exclusive": "waits",
    "work.claim": "says whose working folder it is",
    "hub.unreachable": "the text of an error",
}


def plumbing_used(source: str) -> set[str]:
    """`module.name` of everything that a source takes from the exempt modules."""
    tree, aliases, used = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in fingerprint.EXEMPT:
                    aliases[alias.asname or alias.name] = alias.name
                elif node.module in fingerprint.EXEMPT:
                    used.add(f"{node.module.rsplit('.', 1)[1]}.{alias.name}")
        elif isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names if alias.name in fingerprint.EXEMPT}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in aliases:
            used.add(aliases[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            used.add(f"{aliases[node.value.id]}.{node.attr}")
    return {name for name in used if "." in name}


def test_no_number_passes_through_the_modules_that_do_not_count():
    """What can be checked: the plumbing imports nothing that computes or draws, and counted code takes from it only names
    that are known to give no number back. A new use of the plumbing fails here, so that somebody thinks about it."""
    for name in fingerprint.EXEMPT:
        source = (ROOT / Path(*name.split("."))).with_suffix(".py").read_text()
        imported = {n.split(".")[0] for node in ast.walk(ast.parse(source)) for n in _imported(node)}
        assert imported <= sys.stdlib_module_names | {fingerprint.PACKAGE, "tqdm", "huggingface_hub"}, name
        assert not imported & {"random", "statistics", "math", "decimal", "secrets"}, name
        ours = {n for node in ast.walk(ast.parse(source)) for n in _imported(node) if n.startswith(fingerprint.PACKAGE)}
        reads = {f"{fingerprint.PACKAGE}.{one}" for one in ("artifacts.manifests", "plumbing.jsonl", "tools.runs")}
        allowed = fingerprint.EXEMPT | (reads if name.endswith((".steps.cli", ".tools.card")) else set())
        if name.endswith(".evaluation.rows"):  # asks the judges, and gives nothing back
            allowed |= {f"{fingerprint.PACKAGE}.evaluation.{one}" for one in ("ifeval", "lm_tasks", "numerals")}
        assert ours <= allowed, name
    counted = {m for step in STEPS for t in (True, False) for m in fingerprint.closure(f"{fingerprint.PACKAGE}.steps.{step}", t)}
    used = {name for m in counted for name in plumbing_used(fingerprint._module_file(m).read_text())}
    assert used <= set(PLUMBING_USED), sorted(used - set(PLUMBING_USED))
    assert {"messages.InputError", "cli.run", "work.publish"} <= used


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [
            f"{node.module}.{alias.name}" if fingerprint._module_file(f"{node.module}.{alias.name}") else node.module or ""
            for alias in node.names
        ]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_the_check_of_the_plumbing_can_fail():
    assert plumbing_used("from workflow_scripts.artifacts import work\nx = work.half(3)\n") == {"work.half"}
    assert plumbing_used("from workflow_scripts.steps.cli import seed as s\n") == {"cli.seed"}
    assert plumbing_used("import workflow_scripts.plumbing.progress\n") == {"workflow_scripts.plumbing.progress"}


def test_canonical_json_is_one_text_for_equal_values_and_refuses_nan():
    assert fingerprint.canonical({"b": [1.0, 0.5, True], "a": {"ä": None}}) == '{"a":{"ä":null},"b":[1,0.5,true]}'
    assert fingerprint.canonical({"a": 1, "b": 2}) == fingerprint.canonical({"b": 2.0, "a": 1.0})
    assert fingerprint.canonical(1) != fingerprint.canonical(True)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            fingerprint.canonical({"a": [value]})
    step = {"a": 1, "b": 5e-6}
    assert fingerprint.fingerprint(step) == hashlib.sha256(b'{"a":1,"b":5e-06}').hexdigest()[:32]
    assert fingerprint.fingerprint(json.loads(fingerprint.canonical(step))) == fingerprint.fingerprint(step)


def test_the_same_config_gives_the_same_steps_whatever_the_hash_seed():
    program = (
        "import hashlib; from workflow_scripts.config import config; from workflow_scripts.plan import plan; "
        "p = plan.Plan(config.load('config/config.yaml')); "
        "print([hashlib.sha256(t.encode()).hexdigest() for t in (p.base('base'), p.slice('sft'), p.train('dpo'), p.merge('dpo'), "
        "p.score('ifeval', 'dpo_ipo.seed3'), p.generate('gsm8k', 'base'))])"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(texts) == 1 and len(texts.pop()) > 300


def test_planning_imports_no_heavy_library():
    program = (
        "import sys; from workflow_scripts.artifacts import work; from workflow_scripts.config import config; "
        "from workflow_scripts.plan import plan; "
        "plan.Plan(config.load('config/config.yaml')).check(); "
        "print(sorted({'torch', 'numpy', 'transformers', 'trl', 'pandas', 'datasets', 'snakemake'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_package_of_the_steps_counts_for_every_step_and_a_hidden_file_for_none(tree, user):
    before = fingerprints(user)
    (tree.root / "workflow_scripts/evaluation/nltk_data/tokenizers/.DS_Store").write_text("left there by a file manager")
    clear_caches()
    assert fingerprints(user) == before
    (tree.root / "workflow_scripts/steps/__init__.py").write_text("X = 1\n")
    clear_caches()
    assert stale(before, fingerprints(user)) == set(before)


def test_what_parsing_found_is_kept_by_content_and_never_trusted_for_another(tree, monkeypatch):
    """An edit is seen under an old time; nothing is parsed twice; a broken note, or no place for one, does no harm."""
    parsed = []
    real = fingerprint._parse
    monkeypatch.setattr(fingerprint, "_parse", lambda source, path: parsed.append(str(path)) or real(source, path))
    step, file = "workflow_scripts.steps.train_dpo", tree.root / "workflow_scripts/plumbing/jsonl.py"
    shutil.rmtree(tree.root / "workflow_scripts/__pycache__")
    clear_caches()
    before = fingerprint.code(step)
    assert len(parsed) == len(set(parsed)) > 10
    parsed.clear()
    clear_caches()
    assert fingerprint.code(step) == before and parsed == []
    text, times = file.read_text(), (file.stat().st_atime, file.stat().st_mtime)
    file.write_text(text + "X = 1\n")
    os.utime(file, times)
    clear_caches()
    edited = fingerprint.code(step)
    assert [name for name in edited if edited[name] != before[name]] == ["plumbing.jsonl"] and parsed == [str(file)]
    file.write_text(text)
    (note,) = (tree.root / "workflow_scripts/__pycache__").glob("logic-*.json")
    for broken in ("", "[]", "{"):
        note.write_text(broken)
        clear_caches()
        assert fingerprint.code(step) == before
    shutil.rmtree(note.parent)
    note.parent.write_text("no folder can be made here")
    clear_caches()
    assert fingerprint.code(step) == before
