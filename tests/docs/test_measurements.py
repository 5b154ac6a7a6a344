"""The scripts that measured the pages' figures are run by hand: what they take from the project has to be there still."""

import ast
import importlib

import pytest

from measurements import limited
from tests.conftest import ROOT
from workflow_scripts.models import device
from workflow_scripts.steps import cli, train_sft


@pytest.mark.parametrize("path", sorted((ROOT / "measurements").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_measurement_imports_of_the_project_is_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("workflow_scripts", "tests"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_a_smaller_card_is_pretended_however_a_step_prepares_its_device(monkeypatch):
    asked = []
    monkeypatch.setenv("LIMITED_GB", "40")
    monkeypatch.setenv("LIMITED_STEP", "train_sft")
    monkeypatch.setattr(device, "prepare", lambda step, deterministic=False: asked.append((step, deterministic)))
    monkeypatch.setattr(train_sft, "main", lambda job: device.prepare(job, True))
    monkeypatch.setattr(cli, "run", lambda main, doc: main({"device": "cpu"}))
    limited.main()
    assert asked == [({"device": "cpu"}, True)]
