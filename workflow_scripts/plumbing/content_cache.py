"""Hashes of files' contents, kept so that gigabytes are not read at each planning.

A hash is kept by path, size, times and inode of each file that it is of. The time of the last change of the inode counts too: a
copy can restore the other one (`cp -p`). It is a cache only: without it, or where it is broken or can't be written, the files are
read again.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from workflow_scripts.plumbing.messages import InputError


class ContentCache:
    """The hashes in a JSON file; without one, nothing is kept."""

    def __init__(self, file: str | None):
        self.file = file
        self.known: dict[str, str] = {}
        if file:
            with contextlib.suppress(OSError, ValueError):
                read = json.loads(Path(file).read_text(encoding="utf-8"))
                self.known = read if isinstance(read, dict) else {}

    def hash_of(self, files: Sequence[Path | str], make: Callable[[], str], settings: Sequence[object] = ()) -> str:
        """The hash that `make` gives for the files as they are. settings: what else it follows from.

        InputError where a file can't be read.
        """
        key = json.dumps([part for file in files for part in _state(file)] + list(settings))
        if not isinstance(found := self.known.get(key), str):
            self.known[key] = found = make()
            self._write()
        return found

    def _write(self) -> None:
        """Whole or not at all, whoever else writes at the same time: what is lost is made again."""
        if not self.file:
            return
        part = Path(f"{self.file}.{os.getpid()}")
        with contextlib.suppress(OSError):
            part.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps(self.known), encoding="utf-8")
                part.replace(self.file)
            finally:
                part.unlink(missing_ok=True)


def _state(file: Path | str) -> list[str | int]:
    try:
        stat = os.stat(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    return [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
