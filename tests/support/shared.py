"""What is made once for the whole run of the tests, whichever of pytest's processes asks first; the others wait for it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from pytest import TempPathFactory


class Shared:
    """Folders below the temporary folder of the run. They are to be read only: whoever changes something takes a copy."""

    def __init__(self, factory: TempPathFactory):
        own = factory.getbasetemp()
        self.root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of that name, filled by `make` once. What `make` raises, it raises for each that asks."""
        folder = self.root / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.with_name(f"{folder.name}.made")
        with FileLock(f"{folder}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                made.touch()
        return folder
