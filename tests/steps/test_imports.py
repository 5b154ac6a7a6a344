"""What a step loads before it works: large libraries only where they are needed. They are most of what a short phase costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = sorted(path.stem for path in (ROOT / "workflow_scripts/steps").glob("*.py") if "__main__" in path.read_text())
TORCH = {"torch", "transformers"}
LARGE = TORCH | {
    "accelerate", "bitsandbytes", "datasets", "lm_eval", "matplotlib", "nltk", "numpy", "pandas", "peft", "pyarrow",
    "scipy.stats", "sklearn", "snakemake", "statsmodels", "tensorboard", "trl",
}  # fmt: skip
ANSWER = {*TORCH, "accelerate", "numpy"}
TRAIN = {*ANSWER, "bitsandbytes", "datasets", "pandas", "peft", "pyarrow", "trl"}
# Steps -> what may be there once the imports inside their functions have run, those of functions that few configs call included.
MAY_LOAD = {
    ("score_gsm8k", "score_ifeval"): set(),
    ("select",): {"numpy", "scipy.stats"},
    ("slice_data",): {*TORCH, "numpy"},
    # peft where there is an adapter, and not before
    ("generate", "judge_answers", "lm_eval_task", "make_base", "merge", "own_task", "sample"): ANSWER,
    ("choose_rows",): {*ANSWER, "bitsandbytes", "peft"},
    ("eval_rm",): {*TRAIN, "scipy.stats"} - {"trl"},
    ("train_dpo", "train_grpo", "train_kto", "train_ppo", "train_rloo", "train_rm", "train_sft"): TRAIN,
    ("train_cpo", "train_orpo", "train_simpo"): TRAIN,
    ("report",): {"matplotlib", "numpy", "pandas", "pyarrow", "scipy.stats", "statsmodels"},
}
# A fork of a process that has loaded what some steps do runs the next: what those may load, this one may too, so that nothing it
# adds against the table is hidden, and the largest are loaded once. First step of each -> the one before it.
AFTER = {
    "select": "score_gsm8k", "report": "select", "slice_data": "score_gsm8k", "generate": "slice_data",
    "choose_rows": "generate", "eval_rm": "choose_rows", "train_dpo": "choose_rows", "train_cpo": "train_dpo",
}  # fmt: skip
FORKS = """
import json, os, sys

def run(step):
    if child := os.fork():
        return os.waitpid(child, 0)
    for line in IMPORTS[step]:
        exec(line, {})
    print(json.dumps([step, [name for name in LARGE if name in sys.modules]]), flush=True)
    for one in AFTER:
        if AFTER[one] == step:
            run(one)
    os._exit(0)

run("score_gsm8k")
"""


def loaded(program: str) -> set[str]:
    """The large packages that a process of its own has at the end of a program."""
    program += f"\nimport json, sys\nprint(json.dumps([name for name in {sorted(LARGE)} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def inside_functions(step: str) -> list[str]:
    """The imports that a step makes when it works."""
    tree = ast.parse((ROOT / f"workflow_scripts/steps/{step}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    imports = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [ast.unparse(node) for node in imports]


def test_each_step_is_in_the_table():
    assert sorted(step for steps in MAY_LOAD for step in steps) == STEPS


def test_help_is_there_without_a_large_library():
    assert loaded("\n".join(f"import workflow_scripts.steps.{step}" for step in STEPS)) == set()


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    """First step of each entry -> the large packages that are there once its imports have run."""
    imports = {steps[0]: [line for step in steps for line in inside_functions(step)] for steps in MAY_LOAD}
    program = f"IMPORTS, AFTER, LARGE = {imports}, {AFTER}, {sorted(LARGE)}\n{FORKS}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return {step: set(names) for step, names in map(json.loads, done.stdout.splitlines())}


def test_a_step_may_load_all_that_the_one_before_it_may():
    allowed = {steps[0]: names for steps, names in MAY_LOAD.items()}
    assert AFTER.keys() == allowed.keys() - {"score_gsm8k"}
    assert all(allowed[before] <= allowed[step] for step, before in AFTER.items())


@pytest.mark.parametrize("steps", MAY_LOAD, ids=lambda steps: steps[0])
def test_a_step_loads_what_it_needs(found, steps):
    more = found[steps[0]] - MAY_LOAD[steps]
    assert not more, f"{steps}: {sorted(more)} need not be loaded"


def test_scoring_instructions_loads_no_model_library():
    assert not loaded("from workflow_scripts.evaluation import ifeval\nwith ifeval.reference():\n    pass") & (
        TORCH | {"trl", "peft"}
    )


@pytest.mark.parametrize("step", STEPS)
def test_garbage_is_looked_for_again_once_a_step_works(step):
    """steps/cli.py switches that off while libraries are loaded; a step that left it off would keep its cycles, on a GPU too."""
    source = (ROOT / f"workflow_scripts/steps/{step}.py").read_text()
    assert any(call in source for call in ("device.prepare(", "startup.ready(", "ifeval.score", "generate.respond("))
    assert "device.prepare(" in (ROOT / "workflow_scripts/steps/generate.py").read_text()
    for module in ("models/device", "evaluation/ifeval"):
        assert "startup.ready()" in (ROOT / f"workflow_scripts/{module}.py").read_text()


def test_after_the_start_garbage_is_found_and_what_was_loaded_is_left_alone():
    program = """
import gc, weakref
from workflow_scripts.plumbing import startup
class Thing: pass
def cycle():
    one = Thing()
    one.itself = one
    return weakref.ref(one)
startup.ready()
assert gc.isenabled() and not gc.get_freeze_count()
startup.begin()
before = cycle()
assert not gc.isenabled()
startup.ready()
after = cycle()
gc.collect()
assert gc.isenabled() and after() is None and before() is not None
"""
    assert loaded(program) == set()
