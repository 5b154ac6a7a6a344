"""Whether a response ends in an expression that equals the row's: 1/2 is 0.5, and sqrt(8) is 2 sqrt(2).

By math-verify (https://github.com/huggingface/Math-Verify), which reads LaTeX and plain expressions out of a text and compares
them by sympy. Of these versions, which are the lock's, is known what they say, so others are refused.

It takes more than it should, as its page says: (1, 2) is also the open interval, and equals {1, 2}. What takes longer than
SECONDS to read or compare is wrong; that bounds towers of powers, and a slow machine may meet it where a fast one does not.
"""

from collections.abc import Callable
from importlib import import_module, metadata

from workflow_scripts.plumbing.messages import InputError

NEEDED = {"math-verify": "0.9.0", "latex2sympy2_extended": "1.11.0", "antlr4-python3-runtime": "4.13.2"}
SECONDS = 5
INSTALL = "pip install " + " ".join(f"{name}=={version}" for name, version in NEEDED.items())


def check(settings: dict) -> Callable[[str, dict], bool]:
    """Whether the response gives an expression that is that of the row's `field`. InputError without the library."""
    for name, version in NEEDED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            raise InputError(f"the reward `math` needs {name} {version}, found {found}; install it for the jobs: {INSTALL}")
    library, field = import_module("math_verify"), settings["field"]

    def read(text: str) -> list:
        return library.parse(text, parsing_timeout=SECONDS)

    def same(response: str, row: dict) -> bool:
        wanted = str(row[field])
        gold = read(wanted) if "$" in wanted or "\\boxed" in wanted else read(f"${wanted}$")
        if not gold:
            raise InputError(f"row {row.get('id')}: {field} is {wanted!r}, in which no expression is found; correct the row")
        return bool(library.verify(gold, read(response), timeout_seconds=SECONDS))

    return same
