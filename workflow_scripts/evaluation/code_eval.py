"""Whether programs pass their tests: what the library `evaluate` has as `code_eval`, which HumanEval and MBPP take from a hub.

Written anew (Chen et al. 2021, arXiv:2107.03374, section 2.1): no hub is asked, and no program runs but in evaluation/sandbox.py.
"""

import contextlib
import math
import os
import secrets
import signal
import time
from typing import Any

from workflow_scripts.evaluation import sandbox

TIMEOUT = 3.0  # seconds of one program, as there


class CodeEval:
    """`code_eval`: a program passes if it ends without an exception, its test below it, within `timeout`."""

    def compute(self, predictions: list[list[str]], references: list[str], k: Any = (1, 10, 100), timeout: float = TIMEOUT,
                **_: Any) -> tuple[dict[str, float], dict[int, list[bool]]]:  # fmt: skip
        """({pass@k: the mean of its unbiased estimate}, whether each program passed). Outside the sandbox nothing runs or passes:
        some tasks try it with a program of theirs when they are imported."""
        passed = {
            number: [sandbox.entered and passes(f"{program}\n{test}", timeout) for program in programs]
            for number, (programs, test) in enumerate(zip(predictions, references, strict=True))
        }
        found = {}
        for many in [k] if isinstance(k, int) else k:
            if all(len(each) >= many for each in passed.values()):
                none = [math.comb(len(each) - sum(each), many) / math.comb(len(each), many) for each in passed.values()]
                found[f"pass@{many}"] = 1 - sum(none) / len(none)
        return found, passed


def passes(program: str, timeout: float) -> bool:
    """Whether it gets to its end. That is told by a number that it does not know, since it may end the process with any other."""
    passed, child = 2 + secrets.randbelow(250), os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            exec(program, {"__name__": "__main__"})  # noqa: S102, in the sandbox
            os._exit(passed)
        os._exit(1)
    until = time.monotonic() + timeout
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1]) == passed


def provide() -> None:
    """What `evaluate.load("code_eval")` gives in this process from now on."""
    import evaluate

    right = evaluate.load
    if getattr(right, "ours", False):
        return

    def load(path: str, *given: Any, **named: Any) -> Any:
        return CodeEval() if path == "code_eval" else right(path, *given, **named)

    load.ours = True  # type: ignore[attr-defined]
    evaluate.load = load
