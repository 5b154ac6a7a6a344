"""How often three readings of a number differ: this project's, lm-eval's strict-match and flexible-extract (docs/methods.md).

    python -m measurements.number_rules                                           # people's own answers to GSM8K
    python -m measurements.number_rules results/smollm2/data/gsm8k_test.jsonl results/smollm2/base/gsm8k_responses.jsonl

People's answers are read without their last line (`#### 18`), as a model writes that was never shown the mark. Of a model's: the
prompts that it was asked, then its answers, one file or several.
"""

import sys
from decimal import Decimal, InvalidOperation
from pathlib import Path

from workflow_scripts.evaluation import gsm8k, lm_rules
from workflow_scripts.plumbing.jsonl import read_jsonl


def same(ours: str | None, theirs: str) -> bool:
    try:
        return (None if ours is None else Decimal(ours)) == Decimal(theirs.replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:  # "[invalid]", or no number
        return ours is None and not any(char.isdigit() for char in theirs)


def show(name: str, rows: list[dict], given: list[dict]) -> None:
    scores = gsm8k.score(rows, given, strip_think=False)
    found, texts = scores["per_prompt"], [row["response"] for row in given]
    marked = sum(lm_rules.read("strict-match", text) != "[invalid]" for text in texts)
    other = sum(
        not same(one["extracted"], lm_rules.read("flexible-extract", text)) for one, text in zip(found, texts, strict=True)
    )
    print(f"{name}: {len(found)} answers, {marked} with a number after `#### `")
    for metric, verdict in gsm8k.METRICS.items():
        right = sum(one[verdict] for one in found)
        apart = sum(one[verdict] != one["correct"] for one in found)
        print(f"  {metric:<16}{right:6d} right  {100 * scores[metric]:6.2f} %   {apart:5d} verdicts other than exact_match's")
    print(f"  flexible-extract reads another number, or none, in {other}")


def main() -> None:
    if len(sys.argv) > 1:
        rows = read_jsonl(Path(sys.argv[1]))
        for path in map(Path, sys.argv[2:]):
            by_key = {row["key"]: row for row in read_jsonl(path)}
            show(str(path), rows, [by_key[row["key"]] for row in rows])
        return
    rows = [row for split in ("train", "test") for row in read_jsonl(Path(f"data/gsm8k/{split}.jsonl"))]
    bodies = [row["answer"].rpartition("\n#### ")[0] for row in rows]
    given = [{"prompt": row["question"], "response": body} for row, body in zip(rows, bodies, strict=True)]
    show("people", rows, given)


if __name__ == "__main__":
    main()
