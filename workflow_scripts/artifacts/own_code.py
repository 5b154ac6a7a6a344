"""Code of the user's own that a step runs: a file that the config names, and what it imports beside it, read and never run.

What decides is what the files do, as with the project's modules: the syntax tree without docstrings (artifacts/fingerprint.py),
of the file and of each module in its folder that it imports, inside functions too, and of those in turn. A file beside a module
that one of its texts names counts by its bytes. What is found only while it runs (`importlib.import_module`, a path that is
put together) is not seen.
"""

import ast
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.plumbing.messages import InputError


class Own(NamedTuple):
    """A file and what it imports. Names of files are below its folder."""

    path: Path
    logic: dict[str, str]  # file -> the hash of what it does
    beside: tuple[str, ...]  # top-level modules and packages of its folder that it imports
    project: tuple[str, ...]  # modules of this project
    libraries: tuple[str, ...]  # all others but the standard library's

    @property
    def files(self) -> list[Path]:
        return [self.path.parent / name for name in self.logic]


def read(path: Path) -> Own:
    """InputError, with file and line, where one of the files can't be read or is no Python."""
    folder, logic = path.parent, dict[str, str]()
    beside, project, libraries = set[str](), set[str](), set[str]()
    todo = [path.name]
    while todo:
        name = todo.pop()
        if name in logic:
            continue
        tree = parse(folder / name)
        logic[name] = fingerprint.logic(tree)[:16]
        for imported in _imports(tree, folder, name):
            top = imported.split(".")[0]
            if top in sys.stdlib_module_names:
                continue
            if top == fingerprint.PACKAGE:
                project.update([imported] if fingerprint._module_file(imported) else [])
            elif found := _beside(folder, imported):
                beside.add(top)
                todo += found
            else:
                libraries.add(top)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and fingerprint.RESOURCE.fullmatch(node.value):
                file = (folder / name).parent / node.value
                if ".." not in node.value and file.is_file() and file.suffix != ".py":
                    logic[file.relative_to(folder).as_posix()] = fingerprint.file_sha256(file)[:16]
    return Own(path, dict(sorted(logic.items())), *(tuple(sorted(names)) for names in (beside, project, libraries)))


def parse(path: Path) -> ast.Module:
    try:
        source = path.read_bytes()
        compile(source, str(path), "exec", dont_inherit=True)  # finds what the grammar alone allows, such as a `return` outside
        return ast.parse(source, filename=str(path))
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except SyntaxError as error:
        raise InputError(f"{path}: line {error.lineno}: no Python: {error.msg}") from None
    except ValueError as error:
        raise InputError(f"{path}: no Python: {error}") from None


def _imports(tree: ast.Module, folder: Path, name: str) -> Iterator[str]:
    package = Path(name).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(package):
                problem = "a relative import, though the file is in no package; write the name alone (`import helpers`)"
                raise InputError(f"{folder / name}: line {node.lineno}: {problem}")
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = [*above, *([node.module] if node.module else [])]
            yield from ([".".join(start)] if start else [])
            yield from (".".join([*start, alias.name]) for alias in node.names)


def _beside(folder: Path, module: str) -> list[str]:
    """The files of a folder that `import module` runs: of the packages above it, and its own."""
    found, parts = [], module.split(".")
    for n in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:n])
        if (place / "__init__.py").is_file():
            found.append(place / "__init__.py")
        elif place.with_name(f"{place.name}.py").is_file():
            found.append(place.with_name(f"{place.name}.py"))
            break
        elif not place.is_dir():
            break
    return [file.relative_to(folder).as_posix() for file in found]


# Arguments by which TRL calls a reward function, besides the columns of the rows.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_function(path: Path, name: str) -> None:
    """InputError where the file has no function of this name, or one that TRL can't call, as far as its text says."""
    tree = parse(path)
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if (node := defined.get(name)) is None:
        names = {
            symbol.get_name()
            for symbol in symtable.symtable(path.read_bytes(), str(path), "exec").get_symbols()  # type: ignore
            if symbol.is_assigned() or symbol.is_imported()
        }
        stars = [one for one in ast.walk(tree) if isinstance(one, ast.ImportFrom) and one.names[0].name == "*"]
        if name not in names and not stars:
            raise InputError(f"{path}: has no function {name!r}; it has {', '.join(defined) or 'none'}")
        return
    place = f"{path}: line {node.lineno}: {name}"
    if isinstance(node, ast.AsyncFunctionDef):
        raise InputError(f"{place} is `async`; write a plain `def`")
    if not node.decorator_list and node.args.kwarg is None:
        problem = "takes no `**columns`: every column of the rows is handed over by its name"
        raise InputError(f"{place} {problem}; write `def {name}(prompts, completions, **columns)`")
    if node.args.posonlyargs:
        raise InputError(f"{place} takes arguments by position, and all are handed over by name; leave out the `/`")
