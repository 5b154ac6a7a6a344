"""What the tools share: which runs a results folder has, what a run consists of, and one line for a mistake.

A run is a folder below results: `base`, an experiment, or an experiment with `.seedN`. A results folder may hold others
(`results/qwen05b/dpo`); their runs are named by their path from the outer one.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.config.names import METRIC
from workflow_scripts.plumbing.messages import InputError

METRICS = METRIC | {"rm": "accuracy"}  # the first one of each score file

# Phase of a run -> its manifest, from the run's folder.
PHASES = {
    "adapter": "adapter/manifest.json",
    "merged": "merged/manifest.json",
    "responses": "ifeval_responses.manifest.json",
}


@dataclass(frozen=True)
class Run:
    """What a model consists of: the full-precision model that it starts from and, unless that is all, its adapter."""

    folder: Path
    start: Artifact
    adapter: Artifact | None

    @property
    def work(self) -> Path:
        """Where the pipeline keeps locks: a merge that has to be rebuilt is rebuilt under one."""
        return self.folder.parent / ".work"


def scores_file(folder: Path, task: str = "ifeval") -> Path:
    return folder / "rm_eval.json" if task == "rm" else folder.parent / f"{task}_{folder.name}.json"


def read_json(path: Path) -> dict | None:
    """A JSON file, None where it is missing or cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_run(folder: Path) -> bool:
    """True for a folder with something of a run in it, finished or not."""
    if folder.name == "base":
        return any(folder.iterdir())
    parts = ("adapter", "merged", "model.safetensors", "ifeval_responses.manifest.json", "ifeval_responses.jsonl")
    return any((folder / part).exists() for part in parts)


def find(results: Path) -> list[Path]:
    """The folders of all runs in a results folder and in those below it: the base first, then by name.

    A run of which only the score file is left counts too.
    """
    if not results.is_dir():
        raise InputError(f"{results}: no such folder; give a results folder, or make one with snakemake")
    folders = [path for path in results.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "data"]
    here = {path for path in folders if is_run(path)}
    here |= {results / path.stem.removeprefix("ifeval_") for path in results.glob("ifeval_*.json")}
    below = [run for path in sorted(folders) if path not in here for run in find(path)]
    return sorted(here, key=lambda path: (path.name != "base", path.name)) + below


def open_run(folder: Path) -> Run:
    """The run of a folder such as `results/dpo` or `results/base`. InputError if there is none, or its parts do not fit."""
    if (folder / PHASES["adapter"]).is_file():
        adapter = manifests.read(folder / PHASES["adapter"])
        return Run(folder, parent(adapter, "start"), adapter)
    if (folder / "manifest.json").is_file():
        start = manifests.read(folder / "manifest.json")
        if start.data.get("kind") in ("base", "merged"):
            return Run(folder, start, None)
    near = [str(path) for path in find(folder.parent)] if folder.parent.is_dir() else []
    known = [path for path in near if (Path(path) / PHASES["adapter"]).is_file() or path.endswith("/base")]
    raise InputError(
        f"{folder}: no trained run here; expected the folder of a run, such as results/dpo, with adapter/manifest.json in it"
        + (f"; there is {', '.join(known)}" if known else "; make it with snakemake first")
    )


def parent(artifact: Artifact, role: str) -> Artifact:
    """The parent in this role, where it lies and as it was when the artifact was made. InputError otherwise."""
    listed = artifact.data["parents"][role]
    if not Path(listed["path"]).is_file():
        raise InputError(
            f"{artifact.path}: its {role} is {listed['path']}, which is not here; run this from the folder in which snakemake ran"
        )
    found = manifests.read(listed["path"])
    if found.fingerprint != listed["fingerprint"]:
        raise InputError(
            f"{artifact.path}: made from another {role} ({listed['fingerprint'][:12]}) than {found.path} is now "
            f"({found.fingerprint[:12]}); run snakemake again"
        )
    return found


def command(main: Callable[[], None]) -> None:
    """Run a tool's `main`: an InputError is one line on standard error and exit status 1; a closed pipe ends it quietly."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
