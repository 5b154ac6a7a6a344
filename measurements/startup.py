"""What a phase costs whatever its rows: from the start of its process to its first useful work, and from the last to its end.

    snakemake results/ifeval_dpo.json --configfile config/config.yaml tests/support/config/micro.yaml
    python measurements/startup.py --out startup.json
    python measurements/startup.py --against ../older_clone --times 5 --out pairs.json

Runs one phase of each kind that `--world` (a folder with `results/`) holds, again, as a process of its own, from its manifest
into a folder that is thrown away. Steps may be slow for their rows: what lies between the two ends is not counted as fixed. Times
are user and system seconds of the process and what it started (`cpu`), and seconds on the clock (`wall`, which other work on
the machine makes longer). `--against` runs the same phase with another checkout's code, in turn, so that a machine whose speed
drifts is no difference; printed are medians, and the median of the ratios.

The first useful work is the first call of a function of ours that WORK names; the last ends where the outputs have their names
(`work.publish`). `loaded` are packages of HEAVY that were there by the first work, and `same` whether all outputs but run.json
have the bytes that the world's have. `--imports` adds milliseconds by package, their own modules alone (`python -X importtime`,
which doubles them).
"""

import argparse
import collections
import importlib.abc
import importlib.machinery
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = {
    "train": "training.trainers:fit",
    "generate": "generation.generator:of",
    "merge": "models.distance:survives",
    "make_base": "tiny.pretrain:build",
    "slice_data": "models.chat:control_tokens",
    "slice_data of an evaluation": "evaluation.ifeval:check_instructions",
    "score_ifeval": "evaluation.ifeval:verdicts",
    "score_gsm8k": "evaluation.scores:check_rows",
    "eval_rm": "rl.reward_model:score",
    "judge_answers": "rl.reward_model:score",
    "lm_eval_task": "evaluation.lm_tasks:evaluate",
    "report": "report.collect:read",
}
DONE = "artifacts.work:publish"
HEAVY = (
    "torch", "torch._dynamo", "torch._inductor.compile_fx", "transformers", "peft", "bitsandbytes", "trl", "accelerate",
    "datasets", "pyarrow", "pandas", "numpy", "scipy.stats", "sklearn", "nltk", "lm_eval", "statsmodels", "matplotlib", "sympy",
)  # fmt: skip


class Marks(importlib.abc.MetaPathFinder):
    """Notes the time at the first call of functions of ours, without importing anything that the step does not import itself."""

    def __init__(self, functions: dict[str, str]) -> None:
        self.functions = {place.partition(":")[0]: (place.partition(":")[2], mark) for mark, place in functions.items()}
        self.found: dict[str, Any] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        own = self.functions.get(name.removeprefix("workflow_scripts."))
        if own is None or (spec := importlib.machinery.PathFinder.find_spec(name, path)) is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def execute(module: Any) -> None:
            run(module)
            function, mark = own
            setattr(module, function, self.noting(getattr(module, function), mark))

        spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def noting(self, function: Any, mark: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if mark == "work" and mark not in self.found:
                self.found[mark] = now() | {"loaded": [name for name in HEAVY if name in sys.modules]}
            result = function(*args, **kwargs)
            if mark == "done":
                self.found[mark] = now()
            return result

        return noted


def now() -> dict[str, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"cpu": sum(one.ru_utime + one.ru_stime for one in used), "wall": time.time()}


def child(phase: str, step: str, marks: Path, argv: list[str]) -> None:
    """The step, as `python -m` runs it, with the marks left in a file (before the interpreter ends, which costs as well)."""
    import atexit
    import runpy

    kind = "train" if step.startswith("train_") else phase
    watch = Marks({"work": WORK[kind if kind in WORK else step], "done": DONE})
    sys.meta_path.insert(0, watch)
    atexit.register(lambda: marks.write_text(json.dumps(watch.found)))
    sys.argv = [step, *argv]
    runpy.run_module(f"workflow_scripts.steps.{step}", run_name="__main__", alter_sys=True)


def phases(world: Path) -> dict[str, Path]:
    """Kind of step -> the first manifest (or score file) of one in a world, by name."""
    found: dict[str, Path] = {}
    files = [*world.glob("results/*.json"), *world.glob("results/*/*manifest.json"), *world.glob("results/*/*/manifest.json")]
    for file in sorted([*files, *world.glob("results/*/rm_eval.json")]):
        step = json.loads(file.read_text()).get("step", {})
        name = step.get("step", "")
        if name == "slice_data" and "heldout" not in step["config"]:
            name = "slice_data of an evaluation"
        if name == "generate" and "adapter" not in step["parents"]:
            name = "generate of a base"
        if name:
            found.setdefault(name, file)
    return found


def run(phase: str, manifest: Path, world: Path, code: Path, imports: bool = False) -> dict[str, Any]:
    """One run of a phase: seconds of its two ends and of all of it, what was loaded, whether its outputs are the same."""
    made = json.loads(manifest.read_text())
    parents = [world / parent["path"] for parent in made["parents"].values()]
    given = [str(path.relative_to(world)) for path in parents]
    if phase == "report":
        given = sorted(str(path.relative_to(world)) for path in world.glob("results/*_*.json"))
    with tempfile.TemporaryDirectory(prefix="startup.") as folder:
        out, marks = Path(folder, *manifest.parts[-3:]), Path(folder, "marks.json")
        command = [sys.executable, *(["-X", "importtime"] if imports else []), __file__]
        command += ["--child", phase, made["step"]["step"], str(marks)]
        command += ["--step", str(manifest), "--inputs", *given, "--out", str(out), "--work", f"{folder}/.work"]
        command += ["--log", f"{folder}/log"]
        env = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
        began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(command, cwd=world, env=env, capture_output=True, text=True)
        wall, after = time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        log = Path(folder, "log")
        if ended.returncode:
            sys.exit(f"{phase}: {ended.stderr}\n{log.read_text() if log.exists() else ''}")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = json.loads(marks.read_text())
        work, done = found["work"], found["done"]
        sums = {name: sha for name, sha in made["files"].items()}
        again = json.loads(out.read_text())
        return {
            "cpu": {"before": work["cpu"], "after": cpu - done["cpu"], "all": cpu},
            "wall": {"before": work["wall"] - began, "after": began + wall - done["wall"], "all": wall},
            "loaded": work["loaded"],
            "same": again["files"] == sums and again == made,
            "imports_ms": by_package(log.read_text()) if imports else {},
        }


def by_package(log: str) -> dict[str, int]:
    """Milliseconds of `-X importtime` by top-level package, its own modules alone; the ten slowest."""
    sums: collections.Counter[str] = collections.Counter()
    for microseconds, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", log):
        sums[name.split(".")[0]] += int(microseconds)
    return {name: round(value / 1000) for name, value in sums.most_common(10)}


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    whole = {key: {part: round(median(one[key][part] for one in runs), 2) for part in runs[0][key]} for key in ("cpu", "wall")}
    return whole | {"loaded": runs[-1]["loaded"], "same": all(one["same"] for one in runs)}


def measure(phase: str, manifest: Path, options: argparse.Namespace) -> dict[str, Any]:
    codes = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in codes}
    for _ in range(options.times):
        for name, code in codes.items():
            runs[name].append(run(phase, manifest, options.world, code))
    found: dict[str, Any] = {name: middle(some) for name, some in runs.items()}
    if options.against:
        pairs = [
            [one["cpu"]["before"] + one["cpu"]["after"] for one in pair] for pair in zip(runs["this"], runs["other"], strict=True)
        ]
        found["ratio"] = round(median(a / b for a, b in pairs), 3)
    if options.imports:
        found["imports_ms"] = run(phase, manifest, options.world, ROOT, imports=True)["imports_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path(), help="folder with results/ in it")
    parser.add_argument("--against", type=Path, help="another checkout, to run in turn with this one")
    parser.add_argument("--phases", nargs="*", help="these alone")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--imports", action="store_true", help="and milliseconds of imports by package")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    options.world = options.world.resolve()
    found = {}
    for phase, manifest in phases(options.world).items():
        if options.phases is None or phase in options.phases:
            found[phase] = measure(phase, manifest, options)
            for name in ("this", "other"):
                if name in found[phase]:
                    one = found[phase][name]
                    print(f"{phase:28} {name:6} cpu {one['cpu']} wall {one['wall']} same {one['same']}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
    else:
        main()
