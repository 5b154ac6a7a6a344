"""Artifacts as a config plans them, with made-up files, and Snakemake's records of them: results that look made, at once."""

import json
import os
from pathlib import Path

from tests.conftest import MICRO, Clone
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import file_sha256, fingerprint
from workflow_scripts.config import config as configs
from workflow_scripts.plan import records
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.records import place_of
from workflow_scripts.tools import verify

MAIN_JOB = [("score_ifeval", run) for run in ("base", "sft_v2", "dpo")]


def plan_of(clone: Clone, *overlays: str) -> Plan:
    return Plan(configs.load(*(clone.folder / file for file in [*MICRO, *overlays])))


def lay_out(clone: Clone, plan: Plan, *keys: tuple[str, str]) -> None:
    """Artifacts as the config plans them, and all that they are made from, with made-up files; and Snakemake's records."""
    known = [("slice", name) for name in plan.config.data["data"]["slices"]] + [("base", "base")]
    known += [(kind, run) for run in plan.runs() for kind in ("train", "merge")]
    known += [(f"generate_{task}", run) for run in ["base", *plan.runs()] for task in plan.config.asked]
    known += [(f"score_{task}", run) for run in ["base", *plan.runs()] for task in plan.config.asked]
    by_mark = {plan.fingerprint(*key): key for key in known}
    new: list[records.Place] = []

    def visit(key: tuple[str, str]) -> dict:
        kind, name = key
        place = place_of(plan.results, kind, name)
        out = clone.folder / place.manifest
        if out.exists():
            return json.loads(out.read_text())
        step, parents = plan.step(kind, name), {}
        for role, mark in step["parents"].items():
            parent = place_of(plan.results, *by_mark[mark]).manifest
            parents[role] = {"path": parent, "fingerprint": visit(by_mark[mark])["fingerprint"]}
        out.parent.mkdir(parents=True, exist_ok=True)
        names = [Path(file).name for file in place.outputs[1:]] or (["model.safetensors"] if kind == "merge" else [])
        files = {}
        for file in [*names, *(["adapter_config.json"] if kind == "train" else [])]:
            (out.parent / file).write_text(f"{file} of {kind} {name}\n")
            files[file] = file_sha256(out.parent / file)
        sort = {"slice": "slice", "base": "base", "train": "adapter", "merge": "merged"}.get(kind, kind)
        manifest = {"format": 1, "kind": sort, "fingerprint": fingerprint(step), "step": step, "files": files, "parents": parents}
        out.write_text(manifests.dump(manifest))
        new.append(place)
        return manifest

    for key in keys:
        visit(key)
    cwd = os.getcwd()
    os.chdir(clone.folder)
    try:
        for place in new:
            finding = verify.examine(place)
            assert not finding.problems and finding.artifact is not None, (place, finding.problems)
            records.write(place, finding.step, verify.ancestors(place, finding.artifact))
    finally:
        os.chdir(cwd)
