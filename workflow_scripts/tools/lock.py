"""Write what is installed into the two lock files: what runs (envs/requirements.lock) and what checks (envs/dev.lock).

    python -m workflow_scripts.tools.lock [--dry-run]        (make lock)

What runs is what the `dependencies` and the extra `track` of pyproject.toml need, and what these need in turn; what checks is
what the extra `dev` needs beside. So `make setup` installs no linter, and no linter's version is one that a fingerprint could
name. Versions are those that are installed, without local tags (+cpu). What is installed and needed by neither is in no lock.
"""

import argparse
import re
import tomllib
from importlib import metadata

from packaging.requirements import Requirement

from workflow_scripts.artifacts.fingerprint import LOCK_FILE, ROOT
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import runs

DEV_LOCK = LOCK_FILE.with_name("dev.lock")
INSTALLERS = {"pip", "setuptools", "wheel"}  # which pip keeps out of what it freezes as well


def canonical(name: str) -> str:
    """One spelling for a distribution: `lm_eval` is `lm-eval`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(requirements: list[str]) -> dict[str, str]:
    """Distribution, in one spelling -> `name==version`, of what is installed for these requirements and all that they need here.

    InputError for one that is not installed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        one = todo.pop()
        name = canonical(one.name)
        extras = {extra for extra in ("", *one.extras) if (name, extra) not in seen}
        if not extras or name in INSTALLERS:
            continue
        seen |= {(name, extra) for extra in extras}
        try:
            there = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise InputError(f"{one.name}: not installed; run `make setup-dev`, or install it, and lock again") from None
        found[name] = f"{there.metadata['Name']}=={there.version.split('+')[0]}"
        for more in map(Requirement, there.requires or []):
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(more)
    return found


def locks(project: dict) -> tuple[list[str], list[str]]:
    """(lines of what runs, lines of what only checks) for the table `project` of a pyproject.toml."""
    extras = project["optional-dependencies"]
    running = needed(project["dependencies"] + extras["track"])
    checking = {name: line for name, line in needed(extras["dev"]).items() if name not in running}
    return [line for _, line in sorted(running.items())], [line for _, line in sorted(checking.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="say only what would change")
    args = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for file, lines in zip((LOCK_FILE, DEV_LOCK), locks(project), strict=True):
        before = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
        for line in sorted(before.symmetric_difference(lines), key=str.lower):
            print(f"{file.name}: {'-' if line in before else '+'} {line}")
        if not args.dry_run:
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    runs.command(main)
