"""What the scorers share: rows checked, responses joined to their prompts, reasoning taken off, standard errors."""

import math
from collections.abc import Sequence
from typing import Any

from workflow_scripts.plumbing.messages import InputError


def answer(response: str) -> str:
    """The response without its reasoning: what follows the last `</think>`, as in lm-eval's `think_end_token`.

    The opening tag may be missing, since some chat templates write it into the prompt. Departure from lm-eval:
    reasoning that was cut off before `</think>` leaves no answer, so "" (lm-eval would judge the reasoning itself).
    """
    _, tag, after = response.rpartition("</think>")
    text = after.lstrip() if tag else response
    return "" if text.lstrip().startswith("<think>") else text


def mean_stderr(clusters: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """The mean over all items and its standard error, clustered: items of one prompt are not independent.

    The cluster-robust variance of a mean (Liang & Zeger 1986, Biometrika 73; Cameron & Miller 2015, J. Human Resources
    50(2), section II; for evaluations Miller 2024, arXiv:2411.00640, which leaves out the factor G / (G - 1)):

        V = G / (G - 1) * sum over clusters g of (sum over i in g of (x_i - mean))^2 / N^2

    with N items in G clusters; the same as statsmodels' OLS on a constant with cov_type="cluster". With one item in
    each cluster it is the sample standard deviation over sqrt(n), lm-eval's `mean_stderr`. One cluster has no standard
    error: None. Sums are exactly rounded, so the order of clusters does not matter.
    """
    n, groups = sum(map(len, clusters)), len(clusters)
    mean = sum(map(sum, clusters)) / n
    if groups == 1:
        return mean, None
    squares = math.fsum((sum(cluster) - mean * len(cluster)) ** 2 for cluster in clusters)
    return mean, math.sqrt(groups / (groups - 1) * squares) / n


def label(row: dict, by: str = "key") -> str:
    """How a message names a row: by its key, or by the beginning of its prompt."""
    if by == "key" and row.get("key") is not None:
        return f"key {row['key']!r}"
    text = row["prompt"]
    return f"the prompt that begins {text[:60] + ('...' if len(text) > 60 else '')!r}"


def check_rows(rows: list[dict], name: str, fields: tuple[str, ...]) -> None:
    """InputError, with file and row, unless there are rows and each has the texts `fields` and, at most, a usable key."""
    if not rows:
        raise InputError(f"{name}: has no rows; expected one JSON object a line")
    for number, row in enumerate(rows, start=1):
        for field in fields:
            if not isinstance(row.get(field), str):
                what = f"{field!r} is {row[field]!r}, expected a text" if field in row else f"has no {field!r}"
                hint = " (an empty text counts as a failed response)" if field == "response" else ""
                needs = " and ".join(map(repr, fields))
                raise InputError(f"{name}, row {number}: {what}; each row needs {needs}{hint}")
        key = row.get("key")
        if key is not None and (isinstance(key, bool) or not isinstance(key, int | str)):
            raise InputError(f"{name}, row {number}: 'key' is {key!r}, expected a whole number or a text")


def join(prompts: list[dict], responses: list[dict], prompts_name: str, responses_name: str) -> list[dict]:
    """The response rows in the order of the prompts, each exactly once."""
    keyed = all(row.get("key") is not None for row in [*prompts, *responses])
    by = "key" if keyed else "prompt"
    tables: list[dict[Any, dict]] = []
    for rows, name in ((prompts, prompts_name), (responses, responses_name)):
        table: dict[Any, dict] = {}
        for row in rows:
            if row[by] in table:
                remedy = "keep one" if keyed else "keep one, or give every row of both files a 'key' of its own"
                raise InputError(f"{name}: {label(row, by)} stands in two rows; {remedy}")
            table[row[by]] = row
        tables.append(table)
    asked, given = tables
    unknown = [row for value, row in given.items() if value not in asked]
    if unknown:
        raise InputError(
            f"{responses_name}: {label(unknown[0], by)} is not in {prompts_name} ({len(unknown)} of {len(given)} rows "
            f"are unknown, joined by {by}); score against the prompts that the responses were generated from"
        )
    missing = [row for value, row in asked.items() if value not in given]
    if missing:
        raise InputError(
            f"{responses_name}: no response to {label(missing[0], by)} of {prompts_name} ({len(missing)} of "
            f"{len(asked)} prompts lack one, joined by {by}); generate it, or give '' to count it as failed"
        )
    return [given[row[by]] for row in prompts]


def joined(prompts: list[dict], responses: list[dict], prompts_name: str, responses_name: str) -> list[list[dict]]:
    """The answers to each prompt, in the order of the prompts: one, or several, told apart by `sample` (0, 1, ...).

    InputError unless every prompt has as many.
    """
    numbers = {row.get("sample") for row in responses}
    if numbers == {None}:
        return [[row] for row in join(prompts, responses, prompts_name, responses_name)]
    if numbers != set(range(len(numbers))) or len(responses) != len(prompts) * len(numbers):
        raise InputError(
            f"{responses_name}: has {len(responses)} answers to {len(prompts)} prompts; where one has several, every prompt "
            "needs as many, and each row its number under 'sample', from 0"
        )
    each = [[row for row in responses if row["sample"] == number] for number in range(len(numbers))]
    found = [join(prompts, rows, prompts_name, f"{responses_name}, sample {number}") for number, rows in enumerate(each)]
    return [[*answers] for answers in zip(*found, strict=True)]


def entries(key: object, answers: list[dict], value: float) -> dict:
    """A prompt's entry under `per_prompt`: what was found of its answer; of several, each fact as a list, and their `value`."""
    if len(answers) == 1:
        return {"key": key, **answers[0]}
    return {fact: [one[fact] for one in answers] for fact in answers[0]} | {"key": key, "value": value}


def optional(rows: list[dict], field: str, kind: type, name: str) -> list[Any] | None:
    """A field that all rows have or none (None): a mean over a part of the rows would look like one over all."""
    values = [row.get(field) for row in rows]
    absent = sum(value is None for value in values)
    if absent == len(values):
        return None
    if absent:
        raise InputError(f"{name}: {absent} of {len(values)} rows have no {field!r}; give it in every row or in none")
    for row, value in zip(rows, values, strict=True):
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = "a count (a whole number)" if kind is int else "a text"
            raise InputError(f"{name}, {label(row)}: {field!r} is {value!r}, expected {expected}")
    return values
