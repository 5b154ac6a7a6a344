"""A comparison to publish: what its page was made from, in one folder, and the page made again from it, on any machine.

    python -m workflow_scripts.tools.study freeze docs/studies/mine --page ifeval config/smollm2.yaml mine.yaml
    python -m workflow_scripts.tools.study rebuild docs/studies/mine

`freeze` takes finished results, which may have been made elsewhere (another GPU, Python or torch): `results.tar.xz` gets the
score files that the report of these configs reads, with the answers, curves and manifests beside them, and no weights: an
adapter's sha256 is in its manifest. `NAME.step.json` is the report's step with the fingerprints of what was found. Each phase
must have the config that is planned now; its code and packages are those that it was made with, and stand in its manifest.
Several pages share the files: `--page` again. `--also` takes runs that no page shows.

`rebuild` writes, for each page, `NAME.html`, `NAME.csv` (the comparisons), `NAME_scores.csv`, `NAME.svg` (each experiment with
its interval) and, where something is tuned, `NAME_sensitivity.svg` (each over its grid), and says of each whether it is as it
was. Takes several folders. Needs no GPU, no weights and no config; the same files give the same bytes.
"""

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config as configs
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.jsonl import write_atomically
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import differences, runs

ARCHIVE = "results.tar.xz"
# What a run has beside its scores, from its folder.
BESIDE = (
    "manifest.json", "run.json", "adapter/manifest.json", "adapter/run.json", "adapter/metrics.csv", "merged/manifest.json",
    "merged/run.json", "*_responses.manifest.json", "*_responses.run.json", "*_responses.jsonl", "rm_eval.json",
)  # fmt: skip


def place(results: Path, role: str) -> Path:
    """The score file that plays a role in the report: "ifeval dpo.seed2", or "rm rm.seed2"."""
    task, run = role.split(" ")
    return runs.scores_file(results / run, task)


def phases(plan: Plan, role: str) -> Iterator[tuple[Path, str, str]]:
    """(manifest, phase, run) of a score file and of the training and the answers behind it, as far as they are there."""
    results, (task, run) = Path(plan.results), role.split(" ")
    yield place(results, role), "eval_rm" if task == "rm" else f"score_{task}", run
    answers, adapter = results / run / f"{task}_responses.manifest.json", results / run / "adapter/manifest.json"
    if answers.is_file():
        yield answers, f"generate_{task}", run
    if adapter.is_file():
        yield adapter, "train", run


def page(files: list[Path], also: list[str]) -> tuple[dict, dict[str, Path]]:
    """(the report's step, name in the archive -> file). InputError where a file is missing or of another config."""
    plan = Plan(configs.load(*files))
    results, step = Path(plan.results), plan.step("report", "")
    scores = [place(results, role) for role in step["parents"]]
    for role in step["parents"]:
        for path, kind, run in phases(plan, role):
            made, planned = manifests.read(path).data["step"]["config"], plan.step(kind, run)["config"]
            for key, before, after in differences.changed(made, planned):
                other = f"{'.'.join(key)}: made with {differences.text(before)}, planned {differences.text(after)}"
                raise InputError(f"{path}: {other}; make it again, or freeze with the config that it was made with")
        step["parents"][role] = manifests.read(place(results, role)).fingerprint
    names = [*(role.split(" ")[1] for role in step["parents"]), *also]
    patterns = [f"{name}/{file}" for name in names for file in BESIDE] + [f"*_{name}.json" for name in also]
    beside = [path for pattern in (*patterns, "data/*.manifest.json") for path in results.glob(pattern)]
    return step, {str(path.relative_to(results)): path for path in [*scores, *beside]}


def freeze(folder: Path, pages: dict[str, list[Path]], also: list[str]) -> None:
    kept: dict[str, Path] = {}
    for name, files in pages.items():
        step, found = page(files, also)
        kept |= found
        write_atomically(folder / f"{name}.step.json", (json.dumps(step, indent=1, sort_keys=True) + "\n").encode())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9) as archive:
        for inside in sorted(kept, key=lambda name: (name.rpartition("/")[2], name)):  # alike beside alike: half the size
            info = tarfile.TarInfo(inside)  # no owner, no time: the same files give the same bytes
            data = kept[inside].read_bytes()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    write_atomically(folder / ARCHIVE, packed.getvalue())
    print(f"{folder / ARCHIVE}: {len(kept)} files, {len(packed.getvalue()) / 1e6:.1f} MB")


def arms(world: Any) -> Any:
    """A row for each task and experiment: mean over its seeds, 95 % interval over prompts and seeds, and each seed's score."""
    import pandas

    from workflow_scripts.config.names import metric_of
    from workflow_scripts.report.sections import models
    from workflow_scripts.stats import accuracy

    rows = []
    for task in world.config["tasks"]:
        for name in models(world):
            found = list(dict.fromkeys(world.seeded(name)))
            clusters: list = [world.clusters(task, run) for run in found]
            arm = accuracy.of_arm(clusters)
            each = " ".join(f"{world.scores[task, run][metric_of(task, world.scores[task, run])]:.6g}" for run in found)
            rows.append({"task": task, "experiment": name, "mean": arm.mean, "stderr": arm.stderr, "low": arm.low,
                         "high": arm.high, "seeds": arm.seeds, "prompts": arm.prompts, "each": each})  # fmt: skip
    return pandas.DataFrame(rows)


def rebuild(folder: Path, out: Path, check: bool = False) -> bool:
    """Write the pages of `folder` to `out`; with `check` nothing is written. True if each was there already with these bytes."""
    from workflow_scripts.report import collect, figures, judge, sensitivity
    from workflow_scripts.report import page as pages

    steps = sorted(folder.glob("*.step.json"))
    if not steps or not (folder / ARCHIVE).is_file():
        raise InputError(f"{folder}: no {ARCHIVE} with a NAME.step.json beside it; `freeze` writes them")
    same = True
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary)
        with tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(results, filter="data")
        for file in steps:
            name, step = file.name.removesuffix(".step.json"), json.loads(file.read_text(encoding="utf-8"))
            inputs = [place(results, role) for role in step["parents"]]
            world = collect.read(manifests.Job(step, inputs, results / "report/manifest.json", results / ".work"))
            families, controls = judge.families(world), judge.controls(world)
            scores = arms(world)
            made = {
                f"{name}.html": pages.render(world, families, controls),
                f"{name}.csv": pages.table(families),
                f"{name}_scores.csv": scores.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
                f"{name}.svg": figures.arms(scores, {task: world.label(task) for task in world.config["tasks"]}),
            }
            if tuned := sensitivity.sensitivity(world):
                made[f"{name}_sensitivity.svg"] = tuned["picture"]
            for inside, text in made.items():
                before = (out / inside).read_bytes() if (out / inside).is_file() else None
                what = "new" if before is None else "as it was" if before == text.encode() else "another than it was"
                same = same and what == "as it was"
                if not check:
                    write_atomically(out / inside, text.encode())
                print(f"{out / inside}: {what}", flush=True)
            for control in controls:
                print(f"  {control.name} control: {control.state}: {control.what}")
            for family in families:
                for one in family.result.comparisons:
                    print(f"  {family.name}: {one.after} against {one.before}: {one.words}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    freezing = commands.add_parser("freeze", help="put what finished results' pages are made from into a folder")
    freezing.add_argument("folder", type=Path)
    freezing.add_argument("--page", nargs="+", action="append", required=True, metavar=("NAME", "CONFIG"), help="its configs")
    freezing.add_argument("--also", nargs="+", default=[], metavar="RUN", help="runs that no page shows")
    rebuilding = commands.add_parser("rebuild", help="make the pages of a folder again")
    rebuilding.add_argument("folders", nargs="+", type=Path, metavar="folder")
    rebuilding.add_argument("--out", type=Path, help="write the pages there instead")
    rebuilding.add_argument("--check", action="store_true", help="write nothing, and fail where a page is not as it was")
    args = parser.parse_args()
    if args.command == "freeze":
        freeze(args.folder, {name: [Path(file) for file in files] for name, *files in args.page}, args.also)
    elif args.out and len(args.folders) > 1:
        raise InputError("--out takes the pages of one folder: those of several may have one name; give it for each")
    elif changed := [str(one) for one in args.folders if not rebuild(one, args.out or one, args.check)]:
        if args.check:
            raise InputError(f"{', '.join(changed)}: not as it was; without --check the pages are written anew")


if __name__ == "__main__":
    runs.command(main)
