"""GSM8K scores of responses that were generated before (Cobbe et al. 2021, arXiv:2110.14168), and of any numeric slice.

Three verdicts on each response:
- `correct`: its final number equals the right one, by the verifier that is the reward of numeric training
  (`evaluation/numerals.py` says how a number is read). `exact_match` is their mean.
- `strict`, `flexible`: what lm-eval calls exact_match of the filters strict-match and flexible-extract in its task gsm8k, by its
  own code (`evaluation/lm_rules.py`). The first wants `#### ` before the number: only a model that was shown the mark, in its
  prompt or in training, can score there. The second takes the last number of the text. Their means: `strict_match`,
  `flexible_match`.
lm-eval asks with five solved examples in front and stops at "Question:"; here each question stands alone in a chat turn.
"""

from typing import Any

from workflow_scripts.data import formats, parts
from workflow_scripts.evaluation import lm_rules, samples
from workflow_scripts.evaluation.numerals import final_number, gold
from workflow_scripts.evaluation.scores import answer, check_rows, entries, joined, mean_stderr, optional
from workflow_scripts.plumbing.messages import InputError

METRICS = {"exact_match": "correct", "strict_match": "strict", "flexible_match": "flexible"}  # metric -> its verdict


def score(
    rows: list[dict],
    responses: list[dict],
    strip_think: bool,
    rows_name: str = "prompts",
    responses_name: str = "responses",
) -> dict:
    """Scores of the responses to each row: one, or as many to every row.

    rows: the canonical rows of kind numeric (data/formats.py: prompt and final, the right number; normally with a key), or
    GSM8K's own (question and answer). A prompt is a text or a list of turns. responses: rows with prompt and response
    (text; "" fails) and optionally key, finish_reason and tokens (a count), the last two in all rows or in none.
    strip_think: judge what follows the last `</think>`. Rows are joined by key where every row of both has one, else by
    the prompt's text. Order means nothing.

    Returns exact_match, strict_match and flexible_match (shares, 0 to 1), each with `<metric>_stderr` (None for a single row);
    no_answer_share: responses without a number; n_prompts; truncated_share (finish_reason "length") and
    mean_response_tokens, None where not given; strip_think; reworded_keys: keys whose response row has another prompt text;
    per_prompt, in the order of `rows`: key, correct, strict, flexible, extracted (the number that was read, as a text, or None).
    With several responses to a row (`sample` tells them apart) the metrics are means over all of them, with errors clustered by
    row; an entry of per_prompt has its verdicts as lists and `value`, the share that is right; and there are samples and pass_at
    (evaluation/samples.py), majority and its stderr. Raises InputError; the names say in it which file is meant.
    """
    asked = [_asked(row, f"{rows_name}, row {number}") for number, row in enumerate(rows, start=1)]
    given = [_with_text(row, f"{responses_name}, row {number}") for number, row in enumerate(responses, start=1)]
    check_rows(asked, rows_name, ("prompt",))
    check_rows(given, responses_name, ("prompt", "response"))
    answers = joined(asked, given, rows_name, responses_name)
    flat = [one for each in answers for one in each]
    reasons = optional(flat, "finish_reason", str, responses_name)
    tokens = optional(flat, "tokens", int, responses_name)
    read = [[_read(row, one["response"], strip_think) for one in each] for row, each in zip(asked, answers, strict=True)]
    scores: dict[str, Any] = {
        "n_prompts": len(asked),
        "no_answer_share": sum(one["extracted"] is None for each in read for one in each) / len(flat),
        "truncated_share": None if reasons is None else sum(reason == "length" for reason in reasons) / len(reasons),
        "mean_response_tokens": None if tokens is None else sum(tokens) / len(tokens),
        "strip_think": strip_think,
        "reworded_keys": [
            a["key"] for a, each in zip(asked, answers, strict=True) if any(a["prompt"] != b["prompt"] for b in each)
        ],
        "per_prompt": [
            entries(row.get("key"), each, sum(one["correct"] for one in each) / len(each))
            for row, each in zip(asked, read, strict=True)
        ],
    }
    for metric, verdict in METRICS.items():
        scores[metric], scores[f"{metric}_stderr"] = mean_stderr([[one[verdict] for one in each] for each in read])
    if len(read[0]) > 1:
        scores |= samples.several([[one["correct"] for one in each] for each in read])
        votes = [samples.majority([one["extracted"] for one in each], row["gold"]) for row, each in zip(asked, read, strict=True)]
        scores["majority"], scores["majority_stderr"] = mean_stderr([[vote] for vote in votes])
    return scores


def _read(row: dict, response: str, strip_think: bool) -> dict:
    """The verdicts on one response, and the number that was read."""
    text = answer(response) if strip_think else response
    number = final_number(text)
    return {
        "correct": number == row["gold"],
        "strict": lm_rules.match("strict-match", text, row["final"]),
        "flexible": lm_rules.match("flexible-extract", text, row["final"]),
        "extracted": None if number is None else format(number, "f"),
    }


def _asked(row: dict, place: str) -> dict:
    """The row with its prompt as one text, `final` as the text of the right number, and `gold`, the number itself."""
    if "final" not in row:
        if not {"question", "answer"} <= set(row):
            raise InputError(
                f"{place}: found the keys {', '.join(sorted(row)) or 'nothing'}, expected prompt and final (a row of a numeric "
                "slice) or question and answer (a row of GSM8K)"
            )
        _, made = formats.convert(row, "numeric", place, "gsm8k")
        row = made | {"key": row.get("key")}
    try:
        number = gold(row["final"])
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return _with_text(row, place) | {"final": str(row["final"]).replace(",", ""), "gold": number}


def _with_text(row: dict, place: str) -> dict:
    """The row with its prompt as one text: the contents of its turns, one below the other."""
    if not isinstance(row.get("prompt"), list):
        return row
    turns = parts.turns(row["prompt"], f"{place}: prompt")
    return row | {"prompt": "\n".join(turn["content"] for turn in turns)}
