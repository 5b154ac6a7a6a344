"""How lm-eval reads the number of an answer to GSM8K: the filters `strict-match` and `flexible-extract` of its task gsm8k.

What they are, and what is left out of two texts before they are compared, is read from lm-eval's own definition of the task and
done by its own code: another version of lm-eval brings its own. How they differ from our rule: evaluation/numerals.py.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

RULES = ("strict-match", "flexible-extract")


@cache
def _task() -> dict[str, Any]:
    spec = importlib.util.find_spec("lm_eval")  # finds it, and imports nothing
    assert spec is not None and spec.origin is not None
    return yaml.safe_load((Path(spec.origin).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))


@cache
def _filters(rule: str) -> tuple[Any, ...]:
    import lm_eval.filters  # noqa: F401, fills the registry
    from lm_eval.api.registry import get_filter

    (found,) = (one["filter"] for one in _task()["filter_list"] if one["name"] == rule)
    return tuple(get_filter(one["function"])(**{key: one[key] for key in one if key != "function"}) for one in found)


def read(rule: str, response: str) -> str:
    """What a rule takes of a response; lm-eval's "[invalid]" where it finds nothing."""
    found: Any = [[response]]
    for one in _filters(rule):
        found = list(one.apply(found, [{}]))
    return str(found[0])


@cache
def _metric() -> tuple[Callable[..., dict], dict[str, Any]]:
    from lm_eval.api.metrics import exact_match_hf_evaluate

    (listed,) = (one for one in _task()["metric_list"] if one["metric"] == "exact_match")
    return exact_match_hf_evaluate, {key: listed[key] for key in listed if key.startswith(("ignore", "regexes"))}


def match(rule: str, response: str, final: str) -> bool:
    """Whether a rule's reading of a response is `final`, the text of the right number, as lm-eval compares the two."""
    compare, settings = _metric()
    return bool(compare([read(rule, response)], [final], **settings)["exact_match"])
