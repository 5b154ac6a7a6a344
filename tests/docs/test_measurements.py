"""The scripts that measured the pages' figures are run by hand: what they take from the project has to be there still."""

import ast
import importlib

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "measurements").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_measurement_imports_of_the_project_is_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("workflow_scripts", "tests"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
