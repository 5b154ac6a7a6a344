"""What makes a step stale: the canonical JSON of everything that decides its outcome, and the hash of that JSON.

A step's fingerprint covers its resolved config, its parents' fingerprints (so that a change travels down the DAG), the
code that it can reach, the locked versions of the libraries that this code imports, and the content of its external
files. Times decide nothing.

The code part is a hash for each module of the step's import closure in `workflow_scripts`: the syntax tree without
docstrings (comments and layout are not in the tree), so that a comment never retrains a model and a line of logic
always does. Files that a module names in a string constant, such as a chat template, count as its code.
"""

import ast
import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from workflow_scripts.plumbing.messages import InputError

PACKAGE = "workflow_scripts"
ROOT = Path(__file__).resolve().parents[2]
LOCK_FILE = ROOT / "envs" / "requirements.lock"

# Plumbing: command line, the card beside an adapter, progress, messages, provenance, hashes of files, locks of
# work and of GPUs; and what refuses a row. A test checks that no number passes through.
EXEMPT = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        "steps.cli", "tools.card", "artifacts.fingerprint", "artifacts.own_code",
        "artifacts.runinfo", "artifacts.work", "data.hub",
        "evaluation.rows", "plumbing.cards", "plumbing.content_cache", "plumbing.gpus", "plumbing.launch", "plumbing.messages",
        "plumbing.nodes", "plumbing.progress", "plumbing.ranks", "plumbing.startup",
    )
)  # fmt: skip

# The tiny world's generators count only for steps whose source is the tiny world (see `code`).
TINY = f"{PACKAGE}.tiny"
# And these only for steps whose source is another: they bring in a model that was not made here.
IMPORTS = (f"{PACKAGE}.models.sources", f"{PACKAGE}.models.templates")

# Import name -> distribution in the lock file, where the two differ.
DISTRIBUTIONS = {"lm_eval": "lm_eval", "yaml": "PyYAML", "triton": "torch"}  # torch pins the Triton that it comes with
# Libraries that compute on behalf of the one that is imported.
BROUGHT_ALONG = {
    "transformers": ("torch", "tokenizers", "safetensors", "numpy", "jinja2"),
    "trl": ("accelerate", "datasets", "transformers", "torch"),
    "peft": ("accelerate", "bitsandbytes", "torch"),
    "lm_eval": ("nltk", "langdetect"),
}


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text (1.0 is written as 1). NaN is refused."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    """Whole floats as integers, so that `weight_decay: 0` and `0.0` are one setting."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def fingerprint(step: dict) -> str:
    """32 hex digits (128 bits) of the SHA-256 of the step's canonical JSON."""
    return of_text(canonical(step))


def of_text(text: str) -> str:
    """The fingerprint of a step whose canonical JSON this is."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def logic(tree: ast.Module) -> str:
    """The hash of what a source file does: its syntax tree, which it leaves without docstrings."""
    return hashlib.sha256(ast.dump(_strip_docstrings(tree), include_attributes=False).encode()).hexdigest()


def _strip_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body = node.body[1:]
    return tree


def _module_file(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


RESOURCE = re.compile(r"\w[\w./-]*[./][\w-]+")  # texts that may name a file or a folder


def _resource(text: str, folder: Path) -> Path | None:
    """The file or folder of the package that a string constant names: `tiny/chat_template.jinja`, or a file beside it."""
    if not RESOURCE.fullmatch(text) or ".." in text:
        return None
    for path in (ROOT / PACKAGE / text, folder / text):
        if path.exists() and path.suffix != ".py":
            return path
    return None


def _parse(source: bytes, path: Path) -> dict:
    """What a source file says by itself: the hash of its logic, the names that it imports, texts that may name a resource."""
    tree = ast.parse(source, filename=str(path))
    hashed = logic(tree)
    names: set[str] = set()
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ImportError(f"{path}: line {node.lineno}: relative import; write the full name ({PACKAGE}...)")
            assert node.module is not None
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and RESOURCE.fullmatch(node.value):
            texts.append(node.value)
    return {"logic": hashed, "imports": sorted(names), "texts": texts}


class _Parsed:
    """`_parse` of the files as they are, kept on disk by the hash of their bytes: parsing all takes a third of a short plan.

    Derived from the source as .pyc files are, and kept beside them; without a place to write, parsed each time.
    """

    def __init__(self) -> None:
        self.file = ROOT / PACKAGE / "__pycache__" / f"logic-{sys.version_info.major}.{sys.version_info.minor}.json"
        self.known: dict[str, dict] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.file.read_text(encoding="utf-8"))
            self.known = found if isinstance(found, dict) else {}

    def of(self, path: Path) -> dict:
        source = path.read_bytes()
        key = f"{path.relative_to(ROOT)} {hashlib.sha256(source + _OWN).hexdigest()}"
        if key not in self.known:
            name = key.split(" ")[0]
            self.known = {other: found for other, found in self.known.items() if other.split(" ")[0] != name}
            self.known[key] = _parse(source, path)
            part = self.file.with_suffix(f".{os.getpid()}.part")
            with contextlib.suppress(OSError):
                self.file.parent.mkdir(exist_ok=True)
                part.write_text(json.dumps(self.known), encoding="utf-8")
                os.replace(part, self.file)
        return self.known[key]


_OWN = Path(__file__).read_bytes()  # what `_parse` finds changes with this file
_parsed = cache(_Parsed)


@cache
def _read_module(module: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(hash of the module's logic and resources, modules of ours that it imports, other top-level imports)."""
    path = _module_file(module)
    assert path is not None, module
    said = _parsed().of(path)
    ours: set[str] = set()
    others: set[str] = set()
    digest = hashlib.sha256(said["logic"].encode())
    for text in said["texts"]:
        if found := _resource(text, path.parent):
            files = [found] if found.is_file() else [p for p in found.rglob("*") if p.is_file() and not p.name.startswith(".")]
            for file in sorted(files):  # hidden ones are left there by file managers
                digest.update(f"{file.relative_to(ROOT)} {file_sha256(file)}".encode())
    for name in said["imports"]:
        if name.split(".")[0] != PACKAGE:
            others.add(name.split(".")[0])
        elif _module_file(name):
            parts = name.split(".")  # an import runs the packages above a module as well
            ours.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return digest.hexdigest()[:16], tuple(sorted(ours)), tuple(sorted(others - set(sys.stdlib_module_names)))


@cache
def closure(module: str, tiny: bool) -> tuple[str, ...]:
    """The modules of `workflow_scripts` that `module` can import, itself included, without the plumbing.

    `tiny` says whether the tiny world's generators count: they run only where the source of a step is the tiny world.
    """
    seen: set[str] = set()
    parts = module.split(".")
    todo = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]  # running a module runs the packages above it first
    while todo:
        name = todo.pop()
        left_out = name in IMPORTS if tiny else name == TINY or name.startswith(TINY + ".")
        if name in seen or name in EXEMPT or left_out:
            continue
        seen.add(name)
        todo.extend(_read_module(name)[1])
    return tuple(sorted(seen))


def code(module: str, tiny: bool = False) -> dict[str, str]:
    """Module name (without the package) -> hash of its logic, for the import closure of `module`."""
    return {name.removeprefix(PACKAGE + "."): _read_module(name)[0] for name in closure(module, tiny)}


@cache
def locked() -> dict[str, str]:
    """Distribution name (lower case, with dashes) -> version in the lock file, local tags (+cpu, +cu128) left out."""
    return _locked_in(LOCK_FILE)


def _locked_in(file: Path) -> dict[str, str]:
    versions = {}
    for line in file.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;+]+)", line):
            versions[match[1].lower().replace("_", "-")] = match[2].split("+")[0]
    return versions


def of_vllm(packages: dict[str, str]) -> dict[str, str]:
    """A step's packages as they are in the environment of `generation.backend: vllm`, with vLLM itself."""
    there = _locked_in(LOCK_FILE.with_name("vllm.lock"))
    return {name: there.get(name, version) for name, version in packages.items()} | {"vllm": there["vllm"]}


def packages(module: str, tiny: bool = False) -> dict[str, str]:
    """Python's minor version and the locked versions of the libraries that the step's import closure uses."""
    names: set[str] = set()
    for name in closure(module, tiny):
        for other in _read_module(name)[2]:
            names.update((other, *BROUGHT_ALONG.get(other, ())))
    versions = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in sorted(names):
        distribution = DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
        if distribution not in locked():
            raise InputError(f"{LOCK_FILE}: no version of {distribution}, which {module} imports; run `make lock`")
        versions[distribution] = locked()[distribution]
    return versions


def versions(names: Iterable[str]) -> dict[str, str]:
    """The locked versions of libraries by the names under which they are imported, with those that they bring along; none of
    what is not in the lock file."""
    wanted = {other for name in names for other in (name, *BROUGHT_ALONG.get(name, ()))}
    distributions = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in wanted}
    return {name: locked()[name] for name in sorted(distributions) if name in locked()}
