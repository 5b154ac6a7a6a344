"""The main job in clones as people have them: of umask 0002, another account's, moved; its steps as an ordinary account's."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MICRO
from workflow_scripts.artifacts.work import place

OWNER, MEMBER, GROUP = 12345, 12346, 12347  # of a clone, of who runs in it, of both
# What may differ between two people's shells, stands in no fingerprint, and so must decide nothing (docs/staleness.md).
ELSEWHERE = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "7"}


def readable_for_all(path: Path) -> bool:
    return all(one.stat().st_mode & stat.S_IXOTH for one in [path, *path.resolve().parents])


def as_member(clone, *command: str) -> subprocess.CompletedProcess:
    """Run a command as an ordinary account, with umask 0002. It may read an interpreter that lies in root's home, no more."""
    account = ["setpriv", "--reuid", str(MEMBER), "--regid", str(GROUP), "--clear-groups", "--no-new-privs"]
    if not readable_for_all(Path(sys.executable)):
        account += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    for above in (clone.folder.parent, *clone.folder.parent.parents):
        if not above.stat().st_mode & stat.S_IXOTH and above != Path("/"):
            above.chmod(
                above.stat().st_mode | 0o011
            )  # pytest's folders are its own account's alone, again with each pytest that begins
    scratch = clone.folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    os.chown(scratch, MEMBER, GROUP)
    # No home, as in a container that runs as a number: snakemake/snakemake #1593.
    # Of root's folders bash finds no command for that account, and would take another python of the PATH.
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = clone.environment() | ELSEWHERE | {"PATH": path} | {"HOME": "/nonexistent", "TMPDIR": str(scratch)}
    env.pop("XDG_CACHE_HOME", None)
    script = ["bash", "-c", 'umask 0002; exec "$@"', "bash", *command]
    return subprocess.run([*account, *script], cwd=clone.folder, env=env, capture_output=True, text=True, timeout=600)


def readable(clone) -> bool:
    """Whether that account finds this environment's packages: root's may be closed even to who may search all folders."""
    probe = "import importlib.metadata as m; [m.version(name) for name in ('jinja2', 'langdetect', 'torch')]"
    return as_member(clone, "bash", "-c", f'exec python -c "{probe}"').returncode == 0


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become other accounts (setpriv)")
def test_a_colleague_of_the_group_makes_again_what_another_account_made_and_moves_the_clone(clone):
    if not readable(clone):
        pytest.skip("another account can't read this environment's packages")
    for path in [clone.folder, *clone.folder.rglob("*")]:
        os.chown(path, OWNER, GROUP, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o060 | (0o010 if path.is_dir() else 0))
    scores = [f"results/ifeval_{run}.json" for run in ("base", "sft_v2", "dpo")]  # those of `make demo`
    command = ["snakemake", *scores, "--cores", "2", "--quiet", "rules", "--configfile", *MICRO]
    before = [(clone.folder / score).read_text() for score in scores]
    for score in scores:
        (clone.folder / score).unlink()
    for made in ("results/dpo", "logs/dpo"):  # adapter and answers
        shutil.rmtree(clone.folder / made)
    (clone.folder / "logs/dpo").mkdir()
    os.chown(clone.folder / "logs/dpo", OWNER, GROUP)
    for name in ("pairs.jsonl", "pairs.manifest.json"):
        (clone.folder / "results/data" / name).unlink()

    left = clone.folder / ".snakemake/iocache/latest.pkl"  # of the owner's last dry run, with umask 022
    left.write_bytes(b"")
    os.chown(left, OWNER, GROUP)
    left.chmod(0o644)
    done = as_member(clone, *command, "-n")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "latest.pkl: can't be written, since " in done.stderr
    left.unlink()

    (clone.folder / "logs/dpo").chmod(0o755)  # the owner's alone: said before any job, and not by one after the training
    done = as_member(clone, *command)
    assert done.returncode == 1 and "logs/dpo/" in done.stderr, done.stderr
    assert "can't be written, since " in done.stderr and "belongs to the account 12345" in done.stderr
    assert not (clone.folder / "results/data/pairs.jsonl").exists()
    (clone.folder / "logs/dpo").chmod(0o775)
    held = clone.folder / "results/.work/locks" / f"{place(Path(clone.folder / 'results/dpo/adapter/manifest.json'))}.lock"
    held.touch(0o644)  # of the owner's umask 022, in a folder that both may write to
    os.chown(held, OWNER, GROUP)
    done = as_member(clone, *command)
    assert done.returncode == 1 and f"{held.relative_to(clone.folder)}: can't be written, since " in done.stderr, done.stderr
    held.chmod(0o664)

    done = as_member(clone, *command)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [(clone.folder / score).read_text() for score in scores] == before
    for file in [clone.folder / "results/dpo/adapter/adapter_model.safetensors", *(clone.folder / score for score in scores)]:
        found = file.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (MEMBER, GROUP, 0o664), file

    moved = type(clone)(clone.folder.rename(clone.folder.parent / "moved"))
    (moved.folder / scores[0]).unlink()
    done = as_member(moved, *command)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert json.loads((moved.folder / scores[0]).read_text()) == json.loads(before[0])
    assert "1 of 1 steps (100%) done" in done.stdout + done.stderr


@pytest.mark.parametrize("moved", [True, False])
def test_make_installs_anew_in_a_clone_that_was_moved_and_only_there(fresh, moved):
    """The commands of a virtual environment name the folder that they were installed in."""
    stamp = fresh.folder / ".venv/.installed"
    stamp.parent.mkdir()
    stamp.write_text(f"{'/somewhere/else' if moved else fresh.folder}\n")
    found = subprocess.run(["make", "-n", "setup"], cwd=fresh.folder, capture_output=True, text=True, check=True).stdout
    assert ("-m venv --clear .venv" in found) is moved


@pytest.mark.parametrize("name", ["results", "logs"])
def test_a_folder_behind_a_link_that_leads_nowhere_is_named_before_any_job(fresh, name):
    """On a scratch file system that is not mounted here, or was cleared: snakemake/snakemake #2971 has results on such a one."""
    (fresh.folder / name).symlink_to(fresh.folder / "scratch/me")
    done = fresh.snakemake("results/data/sft.jsonl", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = f"{name}: a link to {fresh.folder}/scratch/me, which is not there (not mounted here, or cleared); make that folder"
    assert said in done.stderr and not list(fresh.folder.glob("results/data/*"))


def test_a_clone_lies_anywhere_and_its_results_somewhere_else(fresh, tmp_path):
    """Spaces, quotes and accents (snakemake/snakemake #2981, #3235), and results behind a link to another folder (#2971)."""
    place = tmp_path / "Ma's recherche été"
    fresh.folder.rename(place)
    (tmp_path / "on scratch").mkdir()
    (place / "results").symlink_to(tmp_path / "on scratch")
    type(fresh)(place).snakemake("results/data/ifeval.jsonl")
    assert len((tmp_path / "on scratch/data/ifeval.jsonl").read_text().splitlines()) == 24
