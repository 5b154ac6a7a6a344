"""Artifacts: a manifest and the files that it vouches for. The manifest is the edge of the DAG.

`manifest.json` is deterministic: the step's JSON and fingerprint, the sha256 of each file, the parents' identities, the
phase's own objective. What varies between two equal runs (time, host, memory) goes to run.json, which nothing reads.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from workflow_scripts.artifacts import runinfo, work
from workflow_scripts.artifacts.fingerprint import file_sha256, fingerprint
from workflow_scripts.plumbing import ranks
from workflow_scripts.plumbing.jsonl import read_jsonl
from workflow_scripts.plumbing.messages import InputError

WEIGHTS = "model.safetensors"
VOLATILE = ("run.json", "metrics.csv")

_sums: dict[tuple[str, int, int, int, int], str] = {}  # a merge asks for its base three times, which may be gigabytes


def _sha256(path: Path) -> str:
    """Of a file as it is: read again only where its size, times or inode are others than in this process before."""
    stat = path.stat()
    key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    if key not in _sums:
        _sums[key] = file_sha256(path)
    return _sums[key]


@dataclass(frozen=True)
class Artifact:
    """A manifest that was read, and where it lies."""

    path: Path
    data: dict

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def fingerprint(self) -> str:
        return self.data["fingerprint"]

    @property
    def weights_sha256(self) -> str:
        return self.data["files"][WEIGHTS]

    def stands_for(self) -> set[str]:
        """Its own fingerprint, and those of the steps in whose place the user has accepted it (tools/accept)."""
        return {self.fingerprint, *(entry["to"] for entry in accepted(self))}

    def file(self, name: str) -> Path:
        """A file that the manifest lists, checked against its sha256."""
        path = self.folder / name
        wanted = self.data["files"].get(name)
        if wanted is None:
            raise InputError(f"{self.path}: lists no file {name}")
        if not path.is_file():
            raise InputError(f"{path}: missing, though {self.path.name} lists it; delete {self.path} and run snakemake again")
        if _sha256(path) != wanted:
            raise InputError(
                f"{path}: altered since it was made (sha256 differs from {self.path}); delete it and run snakemake again"
            )
        return path

    def rows(self, heldout: bool | None = None) -> list[dict]:
        """The rows of a slice; only those kept from training, or only the others, if `heldout` is given."""
        name = self.path.name.replace(".manifest.json", ".jsonl")
        return [row for row in read_jsonl(self.file(name)) if heldout is None or row.get("heldout", False) == heldout]


def read(path: Path | str) -> Artifact:
    """The artifact of a manifest file. InputError if it cannot be read."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        data["fingerprint"], data["files"]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a manifest of this pipeline; delete it and run snakemake again") from None
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):  # manifests name their parents by relative paths
        path = path.relative_to(Path.cwd())
    return Artifact(path, data)


def accepted_file(manifest: Path) -> Path:
    """Where accepted changes of an artifact are noted: beside its manifest. A score file's note has a name apart from scores'."""
    if manifest.name.endswith("manifest.json"):
        return manifest.with_name(manifest.name.removesuffix("manifest.json") + "accepted.json")
    return manifest.with_name(f"accepted.{manifest.name}")


def accepted(artifact: Artifact) -> list[dict]:
    """The changes that were accepted for this artifact, oldest first: to (a fingerprint), step, what, why, when.

    What was accepted for another artifact of this name, which has been made again since, does not count.
    """
    path = accepted_file(artifact.path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["accepted"]
        return [entry for entry in entries if entry["from"] == artifact.fingerprint and entry["to"] and entry["step"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a note of `make accept`; delete it, and accept the change again") from None


@dataclass
class Job:
    """One step to run: its JSON, the files that it may read, and where its manifest goes."""

    step: dict
    inputs: list[Path]
    out: Path
    work: Path
    track: str = "none"
    checkpoint_minutes: float = 10.0
    slots: int = 384  # answers at once, at most
    speed: dict = field(default_factory=dict)  # how a training computes (training/speed.py)
    limits: dict = field(default_factory=dict)  # slice -> who trains on it, with the longest row that it takes (Plan.limits)
    deterministic: bool = False  # whether equal runs on a GPU are to end with the same bytes (models/device.py)
    shard: bool = False  # whether the ranks of a training share its base (training/sharded.py)
    started: float = field(default_factory=time.time)

    @property
    def config(self) -> dict:
        return self.step["config"]

    @property
    def run(self) -> str:
        """The run's name for people: the folder below results."""
        folder = self.out.parent
        return folder.parent.name if folder.name in ("adapter", "merged") or folder.name.endswith("_shards") else folder.name

    def parents(self) -> dict[str, Artifact]:
        """Role -> artifact, for each parent of the step, matched by fingerprint. InputError where one is missing.

        An artifact that was accepted in place of the one that is planned counts as that one.
        """
        given = [read(path) for path in self.inputs if path.name.endswith("manifest.json")]
        found = {}
        for role, wanted in self.step["parents"].items():
            match = [artifact for artifact in given if wanted in artifact.stands_for()]
            if not match:
                for artifact in given:
                    if artifact.fingerprint != fingerprint(artifact.data.get("step", {})):
                        raise InputError(
                            f"{artifact.path}: altered since it was made: its fingerprint is not that of the step in it; "
                            f"delete {artifact.path} and run snakemake again"
                        )
                raise InputError(
                    f"{self.out}: none of its inputs is the {role} that this step was planned with (fingerprint "
                    f"{wanted[:12]}); given: "
                    + ", ".join(f"{artifact.path} ({artifact.fingerprint[:12]})" for artifact in given)
                    + ". Results and config have moved apart: run snakemake again"
                )
            found[role] = match[0]
        return found


@dataclass
class Draft:
    """What a step writes: files into `folder`, facts into `manifest` (deterministic) and `run` (volatile)."""

    folder: Path
    manifest: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)


def dump(data: dict) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def complete(job: Job, kind: str, parents: dict[str, Artifact]) -> Iterator[Draft]:
    """A folder to write an artifact's files into; on leaving it, the manifest is added and all appear under their names.

    Nothing appears if an exception leaves the block. The manifest lists every file but the volatile ones by sha256.
    """
    if not ranks.first():  # one of several ranks writes, and the others do as if
        with tempfile.TemporaryDirectory() as unread:
            yield Draft(Path(unread))
        return
    mark = fingerprint(job.step)
    home = job.work / mark
    stage, done = home / "stage", home / "done"
    for folder in (stage, done):
        shutil.rmtree(folder, ignore_errors=True)
    stage.mkdir(parents=True)
    draft = Draft(stage)
    yield draft
    names = sorted(path.name for path in stage.iterdir() if not path.name.endswith(VOLATILE))
    manifest = {
        "format": 1,
        "kind": kind,
        "fingerprint": mark,
        "step": job.step,
        "files": {name: file_sha256(stage / name) for name in names},
        "parents": {role: {"path": str(a.path), "fingerprint": a.fingerprint} for role, a in parents.items()},
    }
    assert not set(manifest) & set(draft.manifest), "a step may not write what identifies its artifact"
    manifest |= draft.manifest
    if mismatch := runinfo.check_packages(job.step):
        manifest["package_mismatch"] = mismatch
    asked = {"deterministic": job.deterministic} if job.step.get("device") == "cuda" else {}
    if job.out.name.endswith("manifest.json"):  # a score file is its own manifest and stands alone
        (stage / job.out.name.replace("manifest.json", "run.json")).write_text(
            dump(runinfo.collect(job.started, asked | draft.run)), encoding="utf-8"
        )
    (stage / job.out.name).write_text(dump(manifest), encoding="utf-8")
    mode = (stage / job.out.name).stat().st_mode  # what the umask asks for: safetensors writes 0600 whatever that is
    for path in stage.iterdir():
        path.chmod(mode)
    os.rename(stage, done)
    work.publish(done, job.out)
