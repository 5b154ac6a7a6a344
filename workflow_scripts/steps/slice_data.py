"""Cut a slice of rows from a source: checked, cleaned, decontaminated against the evaluation prompts, and pinned.

In: a JSONL file, or a generator of the tiny world. Out: JSONL in conversational form (`messages`; or `prompt`, `chosen`,
`rejected` as lists of messages; or IFEval's own prompt rows), each row with its `id` in the source and, for training kinds,
`heldout`. Rows that can't be used are dropped, by reason and count; above `data.max_drop` the slice fails. Malformed rows are
errors with file and line. Held-out rows share no prompt with the others.

    python -m workflow_scripts.steps.slice_data --step results/data/pairs.manifest.json --out trial/pairs.manifest.json \\
        --inputs results/data/ifeval.manifest.json results/base/manifest.json
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

from workflow_scripts.core import artifacts, cli, slicing
from workflow_scripts.core.messages import InputError

FIELDS = {
    "sft": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "ifeval": ("prompt", "instruction_id_list", "kwargs"),
}


def main(job: artifacts.Job) -> None:
    config, parents = job.config, job.parents()
    kind = config["kind"]
    source, candidates = read_candidates(job, parents)
    rows, dropped = clean(candidates, kind, source)
    if kind != "ifeval":
        from workflow_scripts.core import chat

        check = slicing.Decontaminator((row["prompt"] for row in parents["prompts"].rows()), **config["decontaminate"])
        tokenizer = chat.tokenizer_of(parents["base"])
        rows, more = filter_rows(rows, check, tokenizer, config["max_prompt_tokens"])
        dropped += more
    share = sum(dropped.values()) / len(candidates)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if dropped and share > config["max_drop"]:
        raise InputError(
            f"{source}: {sum(dropped.values())} of {len(candidates)} rows ({share:.1%}) can't be used: {reasons}. The limit is "
            f"data.max_drop = {config['max_drop']:.1%}; clean the source, or raise the limit"
        )
    if kind != "ifeval":
        rows = hold_out(rows, config["heldout"], job.out)
    print(
        f"{job.out.stem}: kept {len(rows)} of {len(candidates)} rows" + (f", dropped {reasons}" if reasons else ""),
        flush=True,
    )
    with artifacts.complete(job, "slice", parents) as draft:
        name = job.out.name.replace(".manifest.json", ".jsonl")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (draft.folder / name).write_text(text, encoding="utf-8")
        draft.manifest |= {
            "source": source,
            "rows": {
                "candidates": len(candidates),
                "kept": len(rows),
                "heldout": sum(row.get("heldout", False) for row in rows),
            },
            "dropped": dict(sorted(dropped.items())),
        }


def read_candidates(job: artifacts.Job, parents: dict[str, artifacts.Artifact]) -> tuple[str, list[tuple[str, dict]]]:
    """(name of the source for messages, [(row id, row)]) of the rows that seed and row limit pick."""
    config = job.config
    if "tiny" in config["source"]:
        from workflow_scripts.tiny import world

        options = {key: value for key, value in config["source"]["tiny"].items() if key != "split"}
        split = config["source"]["tiny"]["split"]
        if config["kind"] == "sft":
            rows = world.sft_rows(config["rows"], config["seed"], **options)
        elif config["kind"] == "preference":
            rows = world.preference_rows(config["rows"], config["seed"], **options)
        else:
            rows = world.eval_rows(config["rows"], config["seed"], split=split, **options)
        return f"the tiny world's {split} split", [(f"{split}/{i}", row) for i, row in enumerate(rows)]
    name = config["source"]["file"]
    made = {parent.folder / file for parent in parents.values() for file in parent.data["files"]}
    files = [path for path in job.inputs if path.name == name and path not in made]
    if len(files) != 1:
        raise InputError(f"{job.out}: expected the source file {name} among the inputs, found {len(files)}")
    lines = slicing.candidates(str(files[0]), config["rows"], config["seed"])
    text = "\n".join(f"{number} {line}" for number, line in lines)
    if hashlib.sha256(text.encode()).hexdigest() != job.step["external"]["candidate_rows"]:
        raise InputError(f"{files[0]}: changed since this step was planned; run snakemake again")
    return str(files[0]), [(f"{name}:{number}", parse(line, f"{files[0]}: line {number}")) for number, line in lines]


def parse(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row


def clean(candidates: list[tuple[str, dict]], kind: str, source: str) -> tuple[list[dict], Counter]:
    """Rows of the kind's form with their ids, and the reasons and counts of what was dropped. InputError on another form."""
    rows: list[dict] = []
    dropped: Counter = Counter()
    for row_id, row in candidates:
        place = f"{source}: row {row_id}"
        if missing := [field for field in FIELDS[kind] if field not in row]:
            found = ", ".join(sorted(row)) or "nothing"
            raise InputError(
                f"{place}: {missing[0]} is missing; a row of kind {kind} has {', '.join(FIELDS[kind])}, found {found}"
            )
        if kind == "ifeval":
            check_prompt(row, place)
            rows.append({**row, "key": row.get("key", row_id), "id": row_id})
            continue
        made = {"messages": turns(row["messages"], place)} if kind == "sft" else pair(row, place)
        if reason := unusable(made):
            dropped[reason] += 1
        else:
            rows.append({"id": row_id, **made})
    if kind == "ifeval" and (twice := [key for key, count in Counter(str(row["key"]) for row in rows).items() if count > 1]):
        raise InputError(f"{source}: the key {twice[0]} stands in more than one row; answers could not be told apart")
    return rows, dropped


def check_prompt(row: dict, place: str) -> None:
    """InputError on an evaluation prompt that could be answered but not scored."""
    ids, arguments = row["instruction_id_list"], row["kwargs"]
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise InputError(f"{place}: expected a text under prompt, found {json.dumps(row['prompt'])[:80]}")
    if not isinstance(ids, list) or not isinstance(arguments, list) or not ids or len(ids) != len(arguments):
        raise InputError(f"{place}: expected lists of equal length, not empty, under instruction_id_list and kwargs")


def turns(messages: object, place: str) -> list[dict]:
    """Messages with role and content only. InputError if they are not a conversation."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: expected a list of messages, found {type(messages).__name__}")
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise InputError(f"{place}: a message needs the strings role and content, found {json.dumps(message)[:80]}")
        if message["role"] not in ("system", "user", "assistant"):
            raise InputError(f"{place}: found the role {message['role']!r}, expected system, user or assistant")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def pair(row: dict, place: str) -> dict:
    """prompt, chosen, rejected as lists of messages; plain strings become one turn.

    Some data sets (UltraFeedback-binarized) repeat the prompt at the start of chosen and rejected: it is taken off there, or
    the trainer would ask the question twice.
    """

    def as_turns(value: object, role: str) -> list[dict]:
        return [{"role": role, "content": value}] if isinstance(value, str) else turns(value, place)

    prompt, chosen, rejected = (
        as_turns(row[key], role) for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    )
    n = len(prompt)
    if chosen[:n] == prompt and rejected[:n] == prompt and len(chosen) > n and len(rejected) > n:
        chosen, rejected = chosen[n:], rejected[n:]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def unusable(row: dict) -> str | None:
    """Why a well-formed row can't be trained on, or None."""
    answers = [row["messages"]] if "messages" in row else [row["chosen"], row["rejected"]]
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        return "without an answer at the end"
    if not any(turn["role"] == "user" and turn["content"].strip() for turn in slicing.prompt_turns(row)):
        return "without a prompt"
    if "chosen" in row and any(turn["role"] != "assistant" for answer in answers for turn in answer):
        return "with other turns than the assistant's in an answer"
    if any(not turn["content"].strip() for answer in answers for turn in answer if turn["role"] == "assistant"):
        return "with an empty answer"
    if "chosen" in row and [t["content"].strip() for t in row["chosen"]] == [t["content"].strip() for t in row["rejected"]]:
        return "with chosen equal to rejected"
    return None


def filter_rows(rows: list[dict], check: slicing.Decontaminator, tokenizer, max_prompt_tokens: int) -> tuple[list[dict], Counter]:
    """Drop what covers an evaluation prompt and what has too long a prompt."""
    kept: list[dict] = []
    dropped: Counter = Counter()
    for row in rows:
        before = slicing.prompt_turns(row)
        answers = row["messages"][-1:] if "messages" in row else [*row["chosen"], *row["rejected"]]
        questions = [turn["content"] for turn in before if turn["role"] == "user"]
        if check.covers(questions, "\n".join(turn["content"] for turn in [*before, *answers])):
            dropped["covering an evaluation prompt"] += 1
        elif len(tokenizer.apply_chat_template(before, add_generation_prompt=True)["input_ids"]) > max_prompt_tokens:
            dropped[f"with a prompt above {max_prompt_tokens} tokens"] += 1
        else:
            kept.append(row)
    return kept, dropped


def hold_out(rows: list[dict], heldout: int, out: Path) -> list[dict]:
    """Mark `heldout` rows, whole prompts at a time in the order of a hash of the prompt, so that no prompt is on both sides."""
    order: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        order.setdefault(hashlib.sha256(slicing.prompt_of(row).encode()).hexdigest(), []).append(i)
    chosen: set[int] = set()
    for prompt in sorted(order):
        if len(chosen) + len(order[prompt]) <= heldout:
            chosen.update(order[prompt])
    if len(chosen) == len(rows):
        raise InputError(
            f"{out}: no rows left to train on: {len(rows)} usable rows, {heldout} of them held out; raise rows or lower heldout"
        )
    if not chosen:
        raise InputError(
            f"{out}: no rows could be held out: each prompt has more than heldout = {heldout} of the {len(rows)} rows; raise it"
        )
    return [{**row, "heldout": i in chosen} for i, row in enumerate(rows)]


if __name__ == "__main__":
    cli.run(main, __doc__)
