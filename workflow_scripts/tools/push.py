"""Upload a run to a model hub, with the card that its manifests give (`tools/card.py`).

    python -m workflow_scripts.tools.push results/dpo user/name --dry-run     what would go
    python -m workflow_scripts.tools.push results/dpo user/name               the adapter, to a private repository
    python -m workflow_scripts.tools.push results/dpo user/name --merged      the fused model: stands alone

Each file is checked against its manifest's sha256 first. What says something about your machine (run.json) stays here.
`adapter_config.json` names its base by a local path; where that base is a plain hub model, the uploaded copy names it by id
and revision, so that `AutoPeftModelForCausalLM` finds it. The token is huggingface_hub's own business (environment or
`hf auth login`): this tool neither reads nor prints it.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import card, runs
from workflow_scripts.tools.status import human_bytes

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def stage(run: runs.Run, folder: Path, repo: str, merged: bool) -> list[str]:
    """Put what is to be uploaded into `folder`; the names, sorted. InputError if a file is not what its manifest says."""
    if merged:
        artifact = _merged(run)
        described = runs.Run(run.folder, artifact, None)
    elif run.adapter is not None:
        artifact, described = run.adapter, run
    else:
        raise InputError(f"{run.folder}: has no adapter; expected the folder of a trained run, such as results/dpo")
    for name in artifact.data["files"]:
        _link(artifact.file(name), folder / name)
    _link(artifact.path, folder / "manifest.json")
    if (curves := artifact.folder / "metrics.csv").is_file():
        _link(curves, folder / curves.name)
    if not merged and (base := card.hub_base(run.start)):
        _name_base(folder / "adapter_config.json", base)
    (folder / "README.md").write_text(card.card(described, repo), encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())


def _merged(run: runs.Run) -> manifests.Artifact:
    path = run.folder / runs.PHASES["merged"]
    if not path.is_file():
        raise InputError(f"{path}: missing; make it first: snakemake {path}")
    merged = manifests.read(path)
    if run.adapter is not None and merged.data["parents"]["adapter"]["fingerprint"] != run.adapter.fingerprint:
        raise InputError(f"{path}: made from another adapter than {run.adapter.path} is now; make it again: snakemake {path}")
    if any(not (merged.folder / name).is_file() for name in merged.data["files"]):
        from workflow_scripts.models import loading

        loading.ensure_merged(merged, run.work)
    kept = merged.data["update"][merged.data["dtype"]]["kept"]
    print(f"{path}: in {merged.data['dtype']}, which keeps {kept:.1%} of what was trained", flush=True)
    return merged


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _name_base(config_file: Path, base: dict) -> None:
    """Name the base by its hub id, in the copy that is uploaded; the file at home stays what its manifest says."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base["id"], "revision": base["revision"]}
    config_file.unlink()  # it may be the very file at home, under another name
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def upload(api: Any, folder: Path, repo: str, private: bool, message: str) -> str:
    """Make the repository if it is not there, upload the folder, return its address. InputError where the hub refuses."""
    from huggingface_hub import errors

    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message))
    except errors.OfflineModeIsEnabled:
        raise InputError(f"{repo}: huggingface_hub is set to offline (HF_HUB_OFFLINE); unset it to push") from None
    except errors.LocalTokenNotFoundError:
        raise InputError(f"{repo}: not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # a text of the network's own may hold more than is for the screen: only its kind is told
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the hub answers {status}" if status else f"{type(error).__name__}, the hub cannot be reached"
        advice = "check the name, and that your token may write there" if status in (401, 403, 404) else "try again later"
        raise InputError(f"{repo}: not pushed: {reason}; {advice}") from None


def push(api: Any, run: runs.Run, repo: str, merged: bool = False, private: bool = True, dry: bool = False) -> list[str]:
    """Upload, or only list. Returns the lines to show."""
    if not REPO.fullmatch(repo):
        raise InputError(f"{repo}: expected the name of a repository, user/name")
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".push") as home:
        names = stage(run, Path(home), repo, merged)
        lines = [f"{human_bytes((Path(home) / name).stat().st_size):>10}  {name}" for name in names]
        if dry:
            return [f"would go to {repo} ({'private' if private else 'public'} if it is new):", *lines]
        made = manifests.read(Path(home) / "manifest.json")
        url = upload(api, Path(home), repo, private, f"{run.folder.name}, fingerprint {made.fingerprint}")
    return [f"pushed to {url}", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run, such as results/dpo")
    parser.add_argument("repo", help="user/name on the hub")
    parser.add_argument("--merged", action="store_true", help="push the fused model instead of the adapter")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.add_argument("--dry-run", action="store_true", help="only list what would go")
    args = parser.parse_args()
    run = runs.open_run(args.run)
    api = None
    if not args.dry_run:
        from huggingface_hub import HfApi

        api = HfApi()
    print("\n".join(push(api, run, args.repo, args.merged, not args.public, args.dry_run)))


if __name__ == "__main__":
    runs.command(main)
