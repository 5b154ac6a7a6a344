"""Whether what a run needs of a hub can be had: asked once, at the start of a real run, before any job. Decides no number.

A dry run asks nothing: a login node without a network plans what a node with one runs.
"""

import json
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workflow_scripts.plumbing.messages import InputError

PATIENCE_S = 6  # for the hub's first answer


def needed(step: dict) -> tuple[str, str, str, str | None] | None:
    """(place in the config, `model` or `dataset`, id, revision) of what a step takes from a hub, or None."""
    config, source = step["config"], step["config"].get("source")
    if source == "hub":
        return "hub", "model", config["hub"]["id"], config["hub"].get("revision")
    if hub := config.get("lm_eval", {}).get("hub"):
        return f"eval.tasks.{config['task']}", "dataset", hub["id"], hub.get("revision")
    source = source["composed"]["questions"] if isinstance(source, dict) and "composed" in source else source
    if isinstance(source, dict) and "hub" in source:
        body: Any = source["hub"] if isinstance(source["hub"], dict) else {**source, "id": source["hub"]}
        return "data.slices", "dataset", str(body.get("id") or body.get("name")), body.get("revision")
    return None


def unreachable(place: str, kind: str, name: str, revision: str | None, why: str) -> str:
    """The one error of a run whose hub cannot be reached: what is needed, and three ways to have it."""
    other = "the model's `path:` with `source: path`" if kind == "model" else "the slice's `source: {path: ...}`"
    other = "the task's `data_files`" if place.startswith("eval.tasks") else other
    return (
        f"{place}: the {kind} {name} at revision {revision or 'main'} is not here and cannot be fetched: {why}. Either (1) use a "
        f"local copy: name its folder or file under {other}; or (2) point HF_HOME at a cache that holds it, or HF_ENDPOINT at a "
        "mirror that serves it; or (3) unset HF_HUB_OFFLINE and run where there is a network"
    )


def check(steps: Iterable[dict]) -> None:
    """InputError if a step needs something of a hub that is neither in the local cache nor behind a hub that answers."""
    wanted = sorted({found for step in steps if (found := needed(step))}, key=lambda found: (found[1] != "model", str(found)))
    if not wanted:
        return
    from huggingface_hub import constants

    why: str | None = None
    for place, kind, name, revision in wanted:
        if _cached(Path(constants.HF_HUB_CACHE), kind, name, revision):
            continue
        if constants.HF_HUB_OFFLINE:
            raise InputError(unreachable(place, kind, name, revision, "HF_HUB_OFFLINE is set"))
        why = _silence(constants.ENDPOINT) if why is None else why
        if why:
            raise InputError(unreachable(place, kind, name, revision, why))


def _cached(cache: Path, kind: str, name: str, revision: str | None) -> bool:
    """True if a snapshot is in the hub's cache: `models--org--name/snapshots/<commit>/`."""
    folder = cache / f"{kind}s--{name.replace('/', '--')}"
    try:
        commit = revision or (folder / "refs" / "main").read_text().strip()
        return any((folder / "snapshots" / commit).iterdir())
    except OSError:
        return False


def _silence(endpoint: str) -> str:
    """Why the hub gives no answer, or '' if it gives any. Looking up a name can take long without a network: hence a thread."""
    result: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE_S):
                result.append("")
        except urllib.error.HTTPError:
            result.append("")  # it answers
        except (OSError, ValueError) as error:
            result.append(f"no answer from {endpoint} ({getattr(error, 'reason', error)})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return result[0] if result else f"no answer from {endpoint} within {PATIENCE_S} s"


def check_jobs(jobs: Iterable[Any]) -> None:
    """Before the first job of a real run: check what its jobs take from a hub, and that the models' own files are there.

    jobs: Snakemake's; each has the step's JSON as its parameter, and one that makes a model the folder or file it comes from.
    """
    steps = []
    for job in jobs:
        if "step" in job.params.keys():
            steps.append(json.loads(job.params.step))
        for name in shlex.split(job.params.get("files", "")):
            if not Path(name).exists():
                raise InputError(f"{name} is missing; fetch it (`make smollm2` fetches the file of config/smollm2.yaml)")
    check(steps)
