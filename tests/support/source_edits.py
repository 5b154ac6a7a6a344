"""Random edits of a Python file: two of its logic, three of its layout. For random_edits.py."""

import ast
import random
import subprocess
import sys
from pathlib import Path


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """Statements before which a line can be added."""
    return [
        body[i]
        for node in ast.walk(tree)
        for body in [getattr(node, "body", None)]
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and isinstance(body, list)
        for i in range(len(body))
        if not getattr(body[i], "decorator_list", None)
        and not (isinstance(body[i], ast.ImportFrom) and body[i].module == "__future__")
    ]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def added_statement(source: bytes, rng: random.Random, number: int) -> bytes:
    """The source with a statement more. Not before a docstring, which would be one no more."""
    lines = source.splitlines(keepends=True)
    places = [node for node in _statements(ast.parse(source)) if not _is_text(node)]
    if not places:
        return source + f"EDITED = {number}\n".encode()
    node = rng.choice(places)
    lines.insert(node.lineno - 1, b" " * node.col_offset + f"EDITED_{number} = {number}\n".encode())
    return b"".join(lines)


def changed_number(source: bytes, rng: random.Random, number: int) -> bytes:
    """The source with another number in it; a statement more where there is none."""
    tree = ast.parse(source)
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for child in ast.walk(node)}
    numbers = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) in (int, float) and id(n) not in inside]
    if not numbers:
        return added_statement(source, rng, number)
    node = rng.choice(numbers)
    lines = source.splitlines(keepends=True)
    line = lines[node.lineno - 1]
    lines[node.lineno - 1] = line[: node.col_offset] + f"{node.value + number}".encode() + line[node.end_col_offset :]
    return b"".join(lines)


def commented(source: bytes, rng: random.Random, number: int) -> bytes:
    lines = source.splitlines(keepends=True)
    places = [node.lineno - 1 for node in _statements(ast.parse(source))] or [0]
    lines.insert(rng.choice(places), f"# edited {number}\n".encode())
    return b"".join(lines) + f"\n\n# {number}\n".encode()


def other_docstring(source: bytes, rng: random.Random, number: int) -> bytes:
    """A docstring said in another way, taken away, or added."""
    tree = ast.parse(source)
    owners = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module) and n.body]
    if not owners:
        return b'"""Edited."""\n' + source
    owner = rng.choice(owners)
    first = owner.body[0]
    lines = source.splitlines(keepends=True)
    if not _is_text(first):
        if first.lineno == getattr(owner, "lineno", 0):  # def f(): return 1
            return b"".join(lines) + b"# edited\n"
        top = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) - 1
        lines.insert(top, b" " * first.col_offset + f'"""Edited {number}."""\n'.encode())
        return b"".join(lines)
    indent = b" " * first.col_offset
    new = (
        []
        if len(owner.body) > 1 and rng.random() < 0.3
        else [indent + f'"""Edited {number}.\n\n'.encode() + indent + b'More."""\n']
    )
    return b"".join(lines[: first.lineno - 1] + new + lines[first.end_lineno :])


def reformatted(source: bytes, rng: random.Random, number: int) -> bytes:
    """By ruff, with another width and other quotes; or with other line ends."""
    if rng.random() < 0.15:
        return source.replace(b"\n", b"\r\n")
    quotes = rng.choice(("single", "double"))
    command = ["ruff", "format", "--isolated", "--line-length", str(rng.choice((50, 79, 100, 200)))]
    command += ["--config", f"format.quote-style='{quotes}'", "-"]
    ruff = Path(sys.executable).parent / command[0]
    return subprocess.run([ruff, *command[1:]], input=source, capture_output=True, check=True).stdout


LOGIC, LAYOUT = (added_statement, changed_number), (commented, other_docstring, reformatted)
