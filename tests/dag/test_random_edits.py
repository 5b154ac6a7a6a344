"""Random edits of a finished clone with every method: what Snakemake plans equals what the tables of random_oracle.py say.

A sample of the trials in `make test`; forty in `make test-all`, or as many as PHASELINE_TRIALS says. Each makes one to three
edits (config, rows, code, templates, locked versions, times, copies), plans the whole or a few targets, and puts everything
back. Below that, row by row, the table of docs/staleness.md for the default config.

The finished clones are not trained. Snakemake itself runs all its jobs, with its own rules, parameters and records, but a
stand-in for `python` makes them: it writes small files and the manifest that the step would write, and stops where a step
was not given what it was planned with.
"""

import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Clone, make_clone
from tests.support import random_graph as graph
from tests.support import random_oracle as oracle
from tests.support.random_edits import CONFIGS, EDITS, PACKAGE, Box, a_file_that_decides_nothing, a_key
from tests.support.random_graph import Phase
from tests.support.source_edits import commented, reformatted

pytestmark = pytest.mark.slow
SAMPLE, TRIALS = 8, int(os.environ.get("PHASELINE_TRIALS", "40"))

STAND_IN = """#!{python}
import json, sys
from pathlib import Path
from workflow_scripts.artifacts.fingerprint import file_sha256, fingerprint

args = sys.argv[1:]
if args[1] == "workflow_scripts.tools.rehearse":
    sys.exit()
module, step, out = args[1], json.loads(args[args.index("--step") + 1]), Path(args[args.index("--out") + 1])
inputs = [Path(name) for name in args[args.index("--inputs") + 1 : args.index("--out")]]
given = {{(read := json.loads(path.read_text()))["fingerprint"]: path for path in inputs if path.name.endswith("manifest.json")}}
for role, parent in step["parents"].items():
    if parent not in given:
        sys.exit(f"{{out}}: its {{role}} is not among its inputs")
names = {{
    "slice_data": [out.name.replace(".manifest.json", ".jsonl")],
    "generate": [out.name.replace(".manifest.json", ".jsonl")],
    "make_base": ["model.safetensors"],
    "merge": ["model.safetensors"],
}}.get(step["step"], ["adapter_model.safetensors"] if step["step"].startswith("train_") else [])
assert module == "workflow_scripts.steps." + step["step"], module
for name in names:
    (out.parent / name).write_text(fingerprint(step))
manifest = {{"format": 1, "kind": step["step"], "fingerprint": fingerprint(step), "step": step}}
manifest["files"] = {{name: file_sha256(out.parent / name) for name in names}}
manifest["parents"] = {{
    role: {{"path": str(given[parent]), "fingerprint": parent}} for role, parent in step["parents"].items()
}}
out.write_text(json.dumps(manifest, indent=1, sort_keys=True))
"""


OWN_REWARD = """import own_helper

def brief(prompts, completions, **columns):
    \"\"\"Few characters.\"\"\"
    return [own_helper.of(len(one[-1]["content"])) for one in completions]


def polite(prompts, completions, **columns):
    return [float("please" in one[-1]["content"]) for one in completions]
"""


def write_sources(folder: Path) -> None:
    """Two files of pairs: one of more than 5 MB, and a JSON list. A reward, what it imports, and a file beside them."""
    (folder / "mine").mkdir()
    (folder / "mine/rewards.py").write_text(OWN_REWARD)
    (folder / "mine/own_helper.py").write_text("def of(size):\n    return 1 / (1 + size)\n")
    (folder / "mine/aside.py").write_text("import own_helper\n\nX = own_helper.of(3)\n")
    words = random.Random(1)
    with open(folder / "mine/pairs.jsonl", "w") as file:
        for i in range(2600):
            text = " ".join(words.choice(("sea", "stone", "wind", "bird")) for _ in range(500))
            row = {"prompt": f"question {i}", "chosen": f"good {i} {text}", "rejected": f"bad {i}", "topic": i % 7}
            file.write(json.dumps(row) + "\n")
    more = [{"prompt": f"more {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "topic": i} for i in range(60)]
    (folder / "mine/more.json").write_text(json.dumps(more))
    assert os.path.getsize(folder / "mine/pairs.jsonl") > 5_000_000


def make(folder: Path, *targets: str, configs: list[str], config: dict[str, str] | None = None) -> Clone:
    """A clone of which the targets are made by the stand-in. config: what is replaced in config/config.yaml first."""
    clone = make_clone(folder / "phaseline")
    write_sources(clone.folder)
    for old, new in (config or {}).items():
        clone.edit("config/config.yaml", old, new)
    stand_in = folder / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    path = f"PATH={stand_in.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    clone.run("env", path, "snakemake", *targets, *(["--configfile", *configs] if configs else []))
    return clone


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Clone:
    """A clone of which every target of the oracle is made. Each trial puts back what it changes."""
    return make(tmp_path_factory.mktemp("edits"), *map(graph.file_of, graph.TARGETS), configs=CONFIGS)


def planned(clone: Clone, targets: list[Phase], configs: list[str]) -> set[Phase]:
    """The phases that `snakemake -n` plans, by the outputs that it names."""
    done = clone.snakemake("-n", *map(graph.file_of, targets), configs=configs)
    text = done.stdout + done.stderr
    outputs = re.findall(r"^    output: ([^,\n]+)", text, flags=re.M)
    table = text.split("Job stats:")[-1]
    total = re.search(r"^total +(\d+)$", table, flags=re.M)
    assert int(total[1]) == len(outputs) if total else "Nothing to be done" in text, text[-3000:]
    return {graph.phase_of(output) for output in outputs}


def trial(clone: Clone, seed: int, edits: dict = EDITS) -> tuple[list[str], set[Phase], set[Phase]]:
    """(the edits in words, phases that should be planned, phases that are). edits: those to draw from, with their weights."""
    rng = random.Random(seed)
    box = Box(clone, rng)
    wanted = rng.choices((1, 2, 3), (5, 3, 2))[0]
    done = 0
    try:
        while done < wanted:
            direct = rng.choices(list(edits), list(edits.values()))[0](box)
            if direct is not None:
                box.direct |= direct
                done += 1
        targets = graph.TARGETS if rng.random() < 0.7 else rng.sample(graph.TARGETS, rng.choice((1, 1, 2)))
        box.did.append(f"targets: {len(targets)} {targets[:2]}")
        return box.did, graph.expected(box.direct, targets, graph.RUNS | box.runs), planned(clone, targets, box.configs())
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {'; '.join(box.did)}: {error}") from None
    finally:
        box.restore()


def test_the_stand_in_has_made_every_phase_of_the_tables_and_nothing_is_to_be_done(made):
    results = made.folder / "results"
    manifests = [path for path in results.rglob("*.json") if ".work" not in path.parts]
    assert {graph.phase_of(str(path.relative_to(made.folder))) for path in manifests} == graph.FINISHED
    assert planned(made, graph.TARGETS, CONFIGS) == set()


def test_every_file_of_the_package_stands_in_the_table():
    root = Path(__file__).resolve().parents[2] / PACKAGE
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files = {file for file in files if not file.startswith(("evaluation/nltk_data/", "tools/"))}
    assert files - set(oracle.CODE) == set(), "say in CODE which steps can run it"
    assert {file for file in oracle.CODE if not (root / file).is_file()} == set()


@pytest.mark.timeout(300 + 30 * TRIALS)  # two seconds a trial on an idle machine
@pytest.mark.parametrize("seeds", [range(SAMPLE), pytest.param(range(SAMPLE, TRIALS), marks=pytest.mark.long)], ids=str)
def test_random_edits_plan_what_the_oracle_says(made, seeds):
    missed, needless, phases, started = 0, 0, 0, time.monotonic()
    wrong = []
    for seed in seeds:
        did, should, does = trial(made, seed)
        missed += len(should - does)
        needless += len(does - should)
        phases += len(should)
        if should != does:
            wrong.append(f"seed {seed}: {'; '.join(did)}\n  missed {sorted(should - does)}\n  needless {sorted(does - should)}")
            print(wrong[-1], flush=True)
    seconds = (time.monotonic() - started) / max(1, len(seeds))
    print(f"{len(seeds)} trials, {phases} phases to rerun: {missed} missed, {needless} needless ({seconds:.1f} s each)")
    assert not wrong, "\n".join(wrong)
    assert planned(made, graph.TARGETS, CONFIGS) == set()  # all was put back


@pytest.mark.parametrize(
    ("file", "old", "new", "edit", "needless"),
    [
        pytest.param(
            "profiles/default/profile.yaml",
            "triggers: [params]",
            "triggers: [params, code]",
            a_file_that_decides_nothing,
            True,
            marks=pytest.mark.long,  # it takes many trials to hit a file that a rule's command names
        ),
        ("rules/common.smk", 'file if file.endswith("manifest.json") else ancient(file)', "ancient(file)", a_key, False),
    ],
)
def test_the_trials_see_a_pipeline_that_plans_too_much_or_too_little(made, file, old, new, edit, needless):
    """By the rules' commands Snakemake plans what it should not; with all edges `ancient()` it misses what it should plan."""
    path = made.folder / file
    before = path.read_text()
    made.edit(file, old, new)
    try:
        for seed in range(60):
            _, should, does = trial(made, seed, {edit: 1})
            if (does - should) if needless else (should - does):
                return
    finally:
        path.write_text(before)
    raise AssertionError("60 trials saw nothing")


# -- the table of docs/staleness.md ------------------------------------------------------------------------------------------

OVERLAY = ["config/config.yaml", "overlay.yaml"]


@pytest.fixture(scope="module")
def default_made(tmp_path_factory) -> Clone:
    """The default config, all made. Both slices of pairs come from a file; one experiment more trains with the reward model."""
    mine = "source: {path: mine/pairs.jsonl}"
    return make(
        tmp_path_factory.mktemp("default"),
        configs=[],
        config={
            "pairs: {kind: preference, source: {tiny: {split: pairs}}": f"pairs: {{kind: preference, {mine}",
            "experiments:\n": "experiments:\n  grpo_rm: {extends: grpo, reward: rm}\n",
        },
    )


@pytest.fixture
def default(default_made: Clone, tmp_path: Path) -> Clone:
    shutil.copytree(default_made.folder, tmp_path / "phaseline", symlinks=True)
    return Clone(tmp_path / "phaseline")


ALL = {"all": 1}
DPO = {"train_dpo": 4, "generate": 8, "score": 8, **ALL}
ADAPTERS = {"train_sft": 2, "merge": 1, "train_dpo": 4, "train_kto": 1, "train_rm": 1, "eval_rm": 1}
ADAPTERS |= {"train_ppo": 2, "train_grpo": 3, "train_rloo": 1, "generate": 26, "score": 26, **ALL}
REWARD = {"train_rm": 1, "eval_rm": 1, "train_ppo": 1, "train_grpo": 1}  # the reward model, and what is trained with it

BY_CONFIG = {
    "{}": {},
    "methods: {dpo: {train: {beta: 0.2}}}": DPO,
    "lora: {r: 8}": ADAPTERS,
    "generation: {backend: hf}": {"generate": 28, "score": 28, **ALL},
    "eval: {ifeval: {max_new_tokens: 50}}": {"generate": 14, "score": 14, **ALL},
    "eval: {ifeval: {strip_think: true}}": {
        "train_ppo": 1,
        "train_grpo": 1,
        "train_rloo": 1,
        "generate": 6,
        "score": 17,
        **ALL,  # what is rewarded by IFEval's checkers
    },  # fmt: skip
    "data: {slices: {ifeval: {rows: 300}}}": {**ADAPTERS, "slice_data": 6, "make_base": 1, "generate": 28, "score": 28},
    "data: {slices: {sums_eval: {rows: 150}}}": {**ADAPTERS, "slice_data": 6, "generate": 27, "score": 27},
    "threads: 2": {**ADAPTERS, "slice_data": 5, "make_base": 1, "generate": 28, "score": 28},
    "methods: {rm: {train: {learning_rate: 2.0e-3}}}": {**REWARD, "generate": 4, "score": 4, **ALL},
    "experiments: {more: {extends: dpo, train: {beta: 0.5}}}": {"train_dpo": 1, "generate": 2, "score": 2, **ALL},
    "seeds: [1, 2]": ADAPTERS,
}


@pytest.mark.parametrize("overlay", BY_CONFIG)
def test_the_table_a_change_of_the_config(default_made, overlay):
    (default_made.folder / "overlay.yaml").write_text(overlay)
    assert default_made.plan(configs=OVERLAY) == BY_CONFIG[overlay]


def test_the_table_touch_comments_and_layout_rerun_nothing(default):
    rng = random.Random(1)
    for number, path in enumerate(sorted((default.folder / PACKAGE).rglob("*.py"))):
        path.write_bytes(reformatted(commented(path.read_bytes(), rng, number), rng, number))
    for path in sorted(path for path in default.folder.rglob("*") if path.is_file() and ".snakemake" not in path.parts):
        os.utime(path)
    assert default.plan(configs=[]) == {}


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        ("steps/train_dpo.py", "callbacks=[trainers.Watch(job.run)]", "callbacks=[trainers.Watch(str(job.run))]", DPO),
        ("steps/score_ifeval.py", "in units.items()", "in [*units.items()]", {"score": 14, **ALL}),
        # lm-eval's checkers are a reward as well
        (
            "evaluation/ifeval.py",
            "random.seed(seed)",
            "random.seed(str(seed))",
            {"train_ppo": 2, "train_grpo": 3, "train_rloo": 1, "generate": 12, "score": 20, **ALL},
        ),
    ],
)
def test_the_table_a_line_of_logic(default, path, old, new, expected):
    default.edit(f"{PACKAGE}/{path}", old, new)
    assert default.plan(configs=[]) == expected


def test_the_table_rows_of_the_preference_source(default):
    """What a row decides is told by its place: in the rows of both slices of pairs, of one, or of none."""
    path = default.folder / "mine/pairs.jsonl"
    lines = path.read_text().splitlines()
    taken = [set(random.Random(seed).sample(range(len(lines)), rows)) for rows, seed in ((1100, 1), (2200, 2))]
    rows = set(range(len(lines)))
    pairs = {"slice_data": 1, "train_dpo": 4, "train_kto": 1, "generate": 10, "score": 10, **ALL}
    for where, expected in (
        (rows - taken[0] - taken[1], {}),
        (taken[0] - taken[1], pairs),
        (taken[1] - taken[0], {**REWARD, "slice_data": 1, "generate": 4, "score": 4, **ALL}),
        (taken[0] & taken[1], {**pairs, **REWARD, "slice_data": 2, "generate": 14, "score": 14}),
    ):
        at = min(where)
        path.write_text("\n".join([*lines[:at], lines[at].replace("good", "fine"), *lines[at + 1 :]]) + "\n")
        os.utime(path, (1, 1))  # an older file copied over a newer one
        assert default.plan(configs=[]) == expected


def test_the_table_deleted_merged_weights_rerun_nothing_and_nothing_more(default):
    (default.folder / "results/sft_v2/merged/model.safetensors").unlink()
    assert default.plan(configs=[]) == {}
    (default.folder / "overlay.yaml").write_text("methods: {dpo: {train: {beta: 0.2}}}")
    assert default.plan(configs=OVERLAY) == DPO
