"""What Snakemake and its jobs find in their environment. Plumbing: decides no number."""

import getpass
import os
from collections.abc import Iterable
from pathlib import Path

from workflow_scripts.plumbing.messages import InputError


def run_code_of(root: Path) -> None:
    """What this process starts runs the package in this folder: not that of another clone, in the environment or in the working
    folder."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if (path := os.environ.get("PYTHONPATH", "")).split(os.pathsep)[0] != str(root):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), path]).rstrip(os.pathsep)


def name_the_account() -> None:
    """Snakemake and torch ask who runs them, and end with a KeyError where a container runs as a number without a name."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["LOGNAME"] = str(os.getuid())


def check_links(place: Path) -> None:
    """InputError if a place lies behind a link to what is not there: `results` on a scratch file system that was cleared."""
    for one in [place, *place.parents]:
        if one.is_symlink() and not one.exists():
            raise InputError(
                f"{one}: a link to {one.readlink()}, which is not there (not mounted here, or cleared); make that folder, or "
                "remove the link"
            )


def check_writable(files: Iterable[str]) -> None:
    """InputError if one of these files, which jobs or Snakemake will write, could not be: a folder or a file there is another
    account's, or a link leads nowhere."""
    seen: dict[Path, bool] = {}
    linked: set[Path] = set()
    for file in map(Path, files):
        # An output is renamed over what is there, which asks for the folder alone; the others are written into what is there.
        inside = file.suffix in (".log", ".lock", ".pkl") and file.exists()
        if file.parent not in linked:
            linked.add(file.parent)
            check_links(file.parent)
        place = file if inside else next(one for one in file.absolute().parents if one.exists())
        if place not in seen:
            seen[place] = os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0))
        if not seen[place]:
            raise InputError(
                f"{file}: can't be written, since {place} belongs to {owner(place)} and this account may not write there; ask "
                "for group access (chmod -R g+w), or give this config `pathvars` of its own"
            )


def owner(place: Path) -> str:
    try:
        return place.owner()
    except KeyError:
        return f"the account {place.stat().st_uid}"
