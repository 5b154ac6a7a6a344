"""Two locks: what runs holds all that the package imports and nothing that only checks; both follow from pyproject.toml."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from workflow_scripts.artifacts.fingerprint import DISTRIBUTIONS, LOCK_FILE
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import lock

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(file: Path) -> set[str]:
    lines = file.read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s+]+", line) for line in lines), file
    return {lock.canonical(line.split("==")[0]) for line in lines}


RUNNING, CHECKING = names(LOCK_FILE), names(lock.DEV_LOCK)


def test_each_lock_has_what_it_is_for_and_they_share_nothing():
    extras = PROJECT["optional-dependencies"]
    assert {lock.canonical(Requirement(name).name) for name in PROJECT["dependencies"] + extras["track"]} <= RUNNING
    assert {lock.canonical(name) for name in extras["dev"]} <= CHECKING
    assert not RUNNING & CHECKING
    assert not set(lock.needed(PROJECT["dependencies"])) & CHECKING


def test_the_package_imports_what_setup_installs():
    made = subprocess.run(["git", "ls-files", "workflow_scripts/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    imported: set[str] = set()
    for file in made.stdout.split():
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    others = imported - sys.stdlib_module_names - {"workflow_scripts"}
    assert {"torch", "trl", "yaml", "lm_eval", "packaging"} <= others
    found = metadata.packages_distributions()
    for name in sorted(others):
        assert {lock.canonical(one) for one in found.get(name, [DISTRIBUTIONS.get(name, name)])} & RUNNING, name


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Distributions that are only metadata: name -> what it requires."""
    requires = {
        "app": ["lib", "torch", 'lint; extra == "check"', 'never; sys_platform == "nowhere"'],
        "lib": ["Deep_One>=1", "app"],  # a circle
        "Deep_One": [],
        "torch": ["setuptools"],
        "setuptools": [],
        "board": ["lib[more]"],
        "extra": [],
        "lint": ["lib", "only-lint"],
        "only-lint": [],
        "stray": [],
    }
    requires["lib"].append('extra; extra == "more"')
    for name, needs in requires.items():
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        version = "1.0+cpu" if name == "torch" else "1.0"
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return {"dependencies": ["app"], "optional-dependencies": {"track": ["board"], "dev": ["lint"]}}


def test_what_runs_and_what_only_checks_follow_from_the_requirements(world):
    running, checking = lock.locks(world)
    assert running == ["app==1.0", "board==1.0", "Deep_One==1.0", "extra==1.0", "lib==1.0", "torch==1.0"]
    assert checking == ["lint==1.0", "only-lint==1.0"]
    assert lock.needed(["app[check]"]).keys() - lock.needed(["app"]).keys() == {"lint", "only-lint"}


def test_what_is_not_installed_is_named(world):
    with pytest.raises(InputError, match="no-such-library: not installed; run `make setup-dev`"):
        lock.needed(["app", "no-such-library"])


def test_a_lock_is_written_and_what_changes_is_said(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["lib"]\n[project.optional-dependencies]\ntrack = []\ndev = ["lint"]\n'
    )
    files = {"LOCK_FILE": tmp_path / "requirements.lock", "DEV_LOCK": tmp_path / "dev.lock"}
    files["LOCK_FILE"].write_text("lib==0.9\nDeep_One==1.0\n")
    for name, value in (files | {"ROOT": tmp_path}).items():
        monkeypatch.setattr(lock, name, value)
    monkeypatch.setattr(sys, "argv", ["lock", "--dry-run"])
    lock.main()
    said = capsys.readouterr().out
    assert "requirements.lock: + lib==1.0\n" in said and "requirements.lock: - lib==0.9\n" in said and "Deep" not in said
    assert not files["DEV_LOCK"].exists()
    monkeypatch.setattr(sys, "argv", ["lock"])
    lock.main()
    assert files["LOCK_FILE"].read_text() == "app==1.0\nDeep_One==1.0\nlib==1.0\ntorch==1.0\n"
    assert files["DEV_LOCK"].read_text() == "lint==1.0\nonly-lint==1.0\n"
