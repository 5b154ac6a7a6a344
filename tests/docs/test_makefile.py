"""The Makefile's environment."""

import shutil
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.fixture
def installed(tmp_path):
    """A clone of which `make setup` has installed everything, as far as make can tell."""
    for name in ("Makefile", "pyproject.toml", "envs/requirements.lock", "envs/dev.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").write_text(f"{tmp_path}\n")
    (tmp_path / ".venv/.installed-dev").touch()
    return tmp_path


def planned(folder) -> str:
    return subprocess.run(["make", "-n", "setup-dev"], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_what_is_installed_is_not_installed_again(installed):
    assert "Nothing to be done" in planned(installed)


def test_a_moved_clone_installs_anew(installed):
    """The commands in .venv name the folder that they were installed in."""
    moved = installed.rename(installed.with_name("moved"))
    steps = planned(moved)
    assert steps.index("-m venv --clear") < steps.index("requirements.lock\n") < steps.index("dev.lock\n")
