"""A thousand composed prompts (evaluation/compose.py): do any conflict, which kinds occur, how near are they to IFEval's 541?

    PYTHONPATH=. python -m measurements.composed_prompts

Questions are those of the real files that ship (data/README.md), as config/smollm2.yaml names them. Prints the table of
docs/methods.md. Seconds on a CPU; no model.
"""

import json
from pathlib import Path

from workflow_scripts.data.questions import questions
from workflow_scripts.data.slicing import Decontaminator
from workflow_scripts.data.words import words
from workflow_scripts.evaluation import compose, ifeval

DATA = Path(__file__).resolve().parents[1] / "data"
FILES = ("preference/ultrafeedback_1k.jsonl", "sft/gpteacher_roleplay.jsonl", "sft/oasst_en_conversations.jsonl")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + 8]) for i in range(len(found) - 7)}


def conflicting(rows: list[dict]) -> int:
    """Prompts with two instructions of which lm-eval's table, read in either direction, says that they conflict."""
    with ifeval.reference() as checkers:
        table = checkers.instructions_registry.INSTRUCTION_CONFLICTS
    found = 0
    for row in rows:
        names = row["instruction_id_list"]
        found += any(other in table[one] for one in names for other in names if other != one) or len(set(names)) < len(names)
    return found


def main() -> None:
    evaluated = [row["prompt"] for row in read("ifeval/input_data.jsonl")]
    theirs = [grams(text) for text in evaluated]
    anywhere = set().union(*theirs)
    rows = [(f"{name}:{number}", name, row) for name in FILES for number, row in enumerate(read(name), 1)]
    parts = {part: questions(rows, part, 120)[0] for part in ("train", "dev")}
    made, facts = compose.prompts(parts["train"], 1000, 1, 3, None, Decontaminator(evaluated, "ngram", 8, 0.5))
    dev = {one.text for one in parts["dev"]}
    own = [grams(row["prompt"]) for row in made]
    of_ours = [len(one & anywhere) / len(one) for one in own]
    of_theirs = [max(len(one & other) / len(other) for other in theirs if other) for one in own]
    inside = sum(any(row["prompt"] in other or other in row["prompt"] for other in evaluated) for row in made)
    kinds = sorted(facts["kinds"].values())
    print(f"| questions of {len(rows)} rows: to train on, for development, in both | ", end="")
    print(f"{len(parts['train'])}, {len(parts['dev'])}, {len(dev & {one.text for one in parts['train']})} |")
    print(f"| prompts, with 1, 2, 3 instructions | {len(made)}: {', '.join(map(str, facts['instructions'].values()))} |")
    print(f"| with instructions that conflict | {conflicting(made)} |")
    print(f"| kinds that occur; the rarest, the commonest | {len(kinds)} of 25; {kinds[0]}, {kinds[-1]} |")
    print(f"| inside one of the 541, or around one | {inside} |")
    print(f"| of their own 8-grams, anywhere in the 541: mean, largest | {sum(of_ours) / 1000:.1%}, {max(of_ours):.1%} |")
    print(
        f"| of the 8-grams of one of the 541: mean of the nearest, largest | {sum(of_theirs) / 1000:.1%}, {max(of_theirs):.1%} |"
    )


if __name__ == "__main__":
    main()
