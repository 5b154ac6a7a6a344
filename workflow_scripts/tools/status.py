"""Each run with the state of its phases, its score, its size on disk and its age. Reads files only, and changes none.

    python -m workflow_scripts.tools.status [results] [--json]

States of a phase:

    made       its manifest is there and so is every file that it lists
    freed      merged weights that were deleted; they are rebuilt when something needs them
    half made  some of its files are there, but no manifest, or not all that it lists: snakemake makes it again
    outdated   made from a parent that has been made again since
    -          not there

Whether a phase is stale for the *config* as it is now (a changed number, changed code) is for `snakemake -n` to say.
"""

import argparse
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from workflow_scripts.artifacts.manifests import WEIGHTS
from workflow_scripts.plan import records
from workflow_scripts.tools import runs

METRIC = runs.METRICS["ifeval"]
TITLES = {"gsm8k": "gsm8k exact, %", "mmlu": "mmlu, %", "truthfulqa": "truthfulqa mc1, %", "rm": "pairs right, %"}


def state(manifest: Path) -> str:
    """The state of one phase, by its files (see above). Contents are not hashed: that takes minutes for a large model."""
    data = runs.read_json(manifest)
    if data is None or not isinstance(data.get("files"), dict):
        stem = manifest.name.removesuffix("manifest.json")  # "" in a folder of its own, "ifeval_responses." in the run's
        rest = manifest.parent.glob(f"{stem}*") if manifest.parent.exists() else iter(())
        return "half made" if any(not path.name.startswith(".") for path in rest) else "-"
    missing = {name for name in data["files"] if not (manifest.parent / name).is_file()}
    if missing:
        return "freed" if data.get("kind") == "merged" and missing == {WEIGHTS} else "half made"
    return "outdated" if outdated(data) else "made"


def outdated(data: dict) -> bool:
    """True if a parent that the manifest names has another fingerprint now. A parent that is gone says nothing."""
    for listed in data.get("parents", {}).values():
        now = runs.read_json(Path(listed["path"]))
        if now is not None and now.get("fingerprint") != listed["fingerprint"]:
            return True
    return False


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder. A folder that a job removes meanwhile has none; Path.rglob would raise."""
    for where, _, names in os.walk(folder):
        yield from (Path(where, name) for name in names)


def disk(paths: list[Path]) -> tuple[int, float | None]:
    """(bytes, time of the last change) of these files and of all files below these folders; a file with two names counts once."""
    seen: dict[tuple[int, int], tuple[int, float]] = {}
    for top in paths:
        for path in [top] if top.is_file() else files_below(top):
            try:
                if path.is_file() and not path.is_symlink():
                    stat = path.stat()
                    seen[stat.st_dev, stat.st_ino] = (stat.st_size, stat.st_mtime)
            except OSError:
                continue  # a job put it elsewhere just now
    return sum(size for size, _ in seen.values()), max((time for _, time in seen.values()), default=None)


def describe(folder: Path, results: Path, now: float) -> dict:
    """One run as plain data: states of its phases, score and standard error as shares, bytes, age in seconds."""
    phases = {name: state(folder / file) for name, file in runs.PHASES.items()}
    if folder.name == "base" or (folder / "model.safetensors").exists():
        phases = {"base": state(folder / "manifest.json"), "responses": phases["responses"]}
    files = {task: runs.scores_file(folder, task) for task in runs.METRICS}
    metrics = {task: runs.read_json(path) or {} for task, path in files.items()}
    main = "rm" if files["rm"].exists() else "ifeval"  # a reward model answers nothing: its pairs are its score
    phases["scores"] = state_of_scores(files[main], runs.METRICS[main])
    scores = metrics["ifeval"]
    others = {
        task: path for path in sorted(folder.parent.glob(f"*_{folder.name}.json")) if (task := records.own_task_of(path))
    }  # of `eval.tasks`
    own = {task: runs.read_json(path) or {} for task, path in others.items() if path == runs.scores_file(folder, task)}
    size, changed = disk([folder, *files.values(), *(runs.scores_file(folder, task) for task in own)])
    return {
        "run": str(folder.relative_to(results)),
        "phases": phases,
        "score": scores.get(METRIC),
        "stderr": scores.get(f"{METRIC}_stderr"),
        "prompts": scores.get("n_prompts"),
        **{task: metrics[task].get(metric) for task, metric in runs.METRICS.items() if task != "ifeval"},
        "tasks": {task: found.get(found.get("metric", "")) for task, found in own.items()},
        "bytes": size,
        "age_s": None if changed is None else max(0, round(now - changed)),
    }


def state_of_scores(path: Path, metric: str) -> str:
    """A score file is its own manifest."""
    if not path.exists():
        return "-"
    data = runs.read_json(path)
    if data is None or metric not in data:
        return "half made"
    return "outdated" if outdated(data) else "made"


def at_work(results: Path) -> list[str]:
    """Who holds the lock of a step, in the words that the step left in it."""
    holders = []
    for lock in sorted(path for path in files_below(results) if path.match(".work/locks/*.lock")):
        try:
            with open(lock, encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    holders.append(file.read().strip() or "a process")
        except OSError:
            continue
    return holders


def human_bytes(size: int) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} B"


def human_age(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def table(found: list[dict]) -> str:
    import pandas

    names = ("base", "adapter", "merged", "responses", "scores")
    rows = []
    for run in found:
        row = {"run": run["run"]} | {name: run["phases"].get(name, "") for name in names}
        spread = "" if run["stderr"] is None else f" +- {100 * run['stderr']:.1f}"
        row["prompt strict, %"] = "" if run["score"] is None else f"{100 * run['score']:.1f}{spread}"
        for task, title in TITLES.items():
            row[title] = "" if run[task] is None else f"{100 * run[task]:.1f}"
        row |= {f"{task}, %": "" if share is None else f"{100 * share:.1f}" for task, share in run["tasks"].items()}
        rows.append(row | {"size": human_bytes(run["bytes"]), "age": human_age(run["age_s"])})
    frame = pandas.DataFrame(rows).fillna("")
    shown = [name for name in frame.columns if (frame[name] != "").any()]
    return frame[shown].to_string(index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path("results"), help="a results folder (default: results)")
    parser.add_argument("--json", action="store_true", help="the same as JSON: shares, bytes, seconds")
    args = parser.parse_args()
    now = time.time()
    found = [describe(folder, args.results, now) for folder in runs.find(args.results)]
    working = at_work(args.results)
    if args.json:
        print(json.dumps({"runs": found, "at_work": working}, indent=1))
        return
    print(table(found) if found else f"{args.results}: no runs yet")
    for holder in working:
        print(f"at work: {holder}")


if __name__ == "__main__":
    runs.command(main)
