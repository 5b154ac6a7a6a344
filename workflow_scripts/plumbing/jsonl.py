"""JSON Lines: one JSON object a line, UTF-8, lines ended by "\\n" alone."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from workflow_scripts.plumbing.messages import InputError


def read_jsonl(path: Path | str) -> list[dict]:
    """The rows of a file, in order. Blank lines and a byte order mark are passed over; an empty file gives [].

    Lines end at "\\n" only: U+2028, U+0085 and the like are text and may stand unescaped inside a JSON string, where
    `str.splitlines` would cut a row in two. Raises InputError with file and line number.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a JSONL file") from error
    rows = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: is not UTF-8 (byte {error.start}); save the file as UTF-8") from error
        except (json.JSONDecodeError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            raise InputError(f"{place}: is not JSON ({reason}); expected one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{place}: found a JSON {type(row).__name__}, expected one object {{...}} a line")
        rows.append(row)
    return rows


def write_jsonl(path: Path | str, rows: Iterable[dict]) -> None:
    """Write rows so that equal rows give equal bytes: keys in the order of each dict, text unescaped, "\\n" at the end.

    The file appears by rename when it is whole. Raises InputError for what JSON or UTF-8 has no form for (NaN, a lone
    surrogate, an object of ours), with the number of the row.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            lines.append(line.encode("utf-8"))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, row {number}: cannot be written as JSON ({error}); correct the row") from error
    write_atomically(path, b"".join(lines))


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write a file beside its place and rename it: a reader sees the old file or the whole new one, never a part.

    Missing folders are made. Raises InputError if the place cannot be written; the old file is then untouched.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file to write")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); check folder, rights and disk") from error
