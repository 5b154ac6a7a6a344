"""Cut a slice of rows from a source: checked, cleaned, decontaminated against the evaluation prompts, and pinned.

In: files (JSONL, JSON, Parquet; the formats of data/formats.py), a hub data set by revision, or a generator of the tiny
world; of files or a hub also questions, to which instructions are added (evaluation/compose.py). Out: JSONL in the canonical form
of the slice's kind (or IFEval's own prompt rows), each row with its `id` in the source, the key that `group_by` names and, for
training kinds, `heldout`. Rows that can't be used are dropped, by reason and count; above `data.max_drop` the slice fails.
Malformed rows are errors with file and line. Held-out rows share no prompt, and no value of `group_by`, with the others.

    python -m workflow_scripts.steps.slice_data --step results/data/pairs.manifest.json --out trial/pairs.manifest.json \\
        --inputs results/data/ifeval.manifest.json results/base/manifest.json
"""

import hashlib
import json
import os
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from workflow_scripts.artifacts import manifests
from workflow_scripts.data import formats, slicing
from workflow_scripts.data.fitting import fitting
from workflow_scripts.data.words import blank, whole
from workflow_scripts.evaluation import rows as judging
from workflow_scripts.plumbing import startup
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli

IFEVAL = ("prompt", "instruction_id_list", "kwargs")


class Source(NamedTuple):
    """A row as it was read: the name of its source, its id there, where it stands for messages, and its content."""

    name: str
    id: str
    place: str
    row: dict


def main(job: manifests.Job) -> None:
    config, parents = job.config, job.parents()
    kind, group_by = config["kind"], config.get("group_by")
    name = job.out.name.replace(".manifest.json", ".jsonl")
    source, candidates = read_candidates(job, parents)
    facts: dict = {}
    evaluation = "heldout" not in config  # its rows are taken whole: nothing is dropped, cut or held out
    places = {one.id: one.place for one in candidates}
    if rule := config.get("decontaminate"):
        evaluated = [row for role, one in parents.items() if role.endswith("_prompts") for row in one.rows()]
        check = slicing.Decontaminator([slicing.avoided(row, rule["rule"], rule["ngram"]) for row in evaluated], **rule)
    dropped: Counter[str] = Counter()
    if "composed" in config["source"]:
        compose = import_module("workflow_scripts.evaluation.compose")  # and so lm-eval counts for these slices alone (see Steps)
        rows, facts["composed"] = compose.rows(candidates, config, check, source)
    elif kind == "ifeval":
        rows = prompts(candidates, source)
    else:
        if group_by:
            check_groups(candidates, group_by)
        rows, dropped, facts["formats"] = clean(candidates, kind, config.get("format"), group_by)
        rows = [row | {"key": row["id"]} for row in rows] if evaluation else rows
    judging.check(kind, ((places[row["id"]], row) for row in rows))
    if rule and evaluation and "composed" not in config["source"]:
        slicing.check_apart(rows, evaluated, rule, source)
    if not evaluation:
        from workflow_scripts.models import chat

        tokenizer = chat.tokenizer_of(parents["base"])
        startup.ready()
        for role, one in parents.items():  # an evaluation that the base can't be asked would end after every training
            if role.endswith("_prompts"):
                asked = [(row["key"], slicing.prompt_turns(row)) for row in one.rows() if "question" not in row]
                chat.check_prompts(tokenizer, asked, one.path)
        rows, more = filter_rows(rows, check, tokenizer, config["max_prompt_tokens"])
        dropped += more
    usable = facts["composed"]["prompts"] if "composed" in facts else len(candidates)
    share = sum(dropped.values()) / usable
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if dropped and share > (limit := config.get("max_drop", 0.0)):
        where = "data.max_drop = " if "max_drop" in config else "for evaluation prompts, which are taken whole, "
        raise InputError(
            f"{source}: {sum(dropped.values())} of {usable} rows ({share:.1%}) can't be used: {reasons}. The limit is "
            f"{where}{limit:.1%}; clean the source, or raise the limit"
        )
    if not evaluation:
        rows = hold_out(rows, config["heldout"], job.out, group_by)
        for one in job.limits.get(name.removesuffix(".jsonl"), []):  # else it is found after the SFT that they start from
            fitting(tokenizer, {held: [row for row in rows if row["heldout"] is held] for held in (False, True)}, **one)
    fewer = f"; {config['rows']} were asked for" if len(candidates) < config["rows"] else ""
    out = f", {sum(row['heldout'] for row in rows)} of them held out" if not evaluation else ""
    dropped_text = f", dropped {reasons}" if reasons else ""
    print(f"{job.out.stem}: kept {len(rows)} of {usable} rows{out}{dropped_text}{fewer}", flush=True)
    read = rows_source(config)[0]
    if "hub" in read and "revision" not in read:
        facts["unpinned"] = True
    with manifests.complete(job, "slice", parents) as draft:
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
            **facts,
        }


def rows_source(config: dict) -> tuple[dict, int]:
    """Where the rows come from, and how many are read; of a composed slice, those of its questions."""
    composed = config["source"].get("composed")
    return (composed["questions"], composed["read"]) if composed else (config["source"], config["rows"])


def read_candidates(job: manifests.Job, parents: dict[str, manifests.Artifact]) -> tuple[str, list[Source]]:
    """(name of the source for messages, rows that seed and row limit pick)."""
    config, (source, limit) = job.config, rows_source(job.config)
    if "tiny" in source:
        from workflow_scripts.tiny import world

        options = {key: value for key, value in source["tiny"].items() if key != "split"}
        split = source["tiny"]["split"]
        if config["kind"] == "sft":
            rows = world.sft_rows(config["rows"], config["seed"], **options)
        elif config["kind"] == "preference":
            rows = world.preference_rows(config["rows"], config["seed"], **options)
        elif config["kind"] == "numeric":
            rows = world.numeric_rows(config["rows"], config["seed"], split)
        else:
            rows = world.eval_rows(config["rows"], config["seed"], split=split, **options)
        name = f"the tiny world's {split} split"
        return name, [Source(name, f"{split}/{i}", f"{name}: row {split}/{i}", row) for i, row in enumerate(rows)]
    if "hub" in source:
        return read_hub(source, limit, config["seed"])
    made = {parent.folder / file for parent in parents.values() for file in parent.data["files"]}
    files = []
    for name in source["files"] if "files" in source else [source["file"]]:
        found = [str(path) for path in job.inputs if path.name == name and path not in made]
        if len(found) != 1:
            raise InputError(f"{job.out}: expected the source file {name} among the inputs, found {len(found)}")
        files += found
    picked = slicing.candidates(files, limit, config["seed"], config["kind"], config.get("group_by"))
    all_files = ", ".join(files)
    if slicing.rows_hash(picked) != job.step["external"]["candidate_rows"]:
        raise InputError(f"{all_files}: changed since this step was planned; run snakemake again")
    return all_files, [Source(one.file, one.id, one.place, parse(one.text, one.place)) for one in picked]


def read_hub(source: dict, rows: int, seed: int) -> tuple[str, list[Source]]:
    """The first `rows` rows of a hub data set that is streamed through a seeded shuffle, so that only these are fetched whole.

    The shuffle draws from a buffer of `shuffle_buffer` rows: a small one stays near the start of the data set, and with 1 the
    rows keep its order. A row's id is its place in the order that comes out. InputError, with the remedies, where the data set
    can't be had.
    """
    revision, split = source.get("revision"), source["split"]
    name = f"{source['hub']}@{revision or 'its newest revision'}, split {split}"
    try:
        datasets = import_module("datasets")  # and so it counts only for slices with a hub source (see Steps)
        startup.ready()
        stream = datasets.load_dataset(source["hub"], name=source.get("config"), split=split, revision=revision, streaming=True)
        buffer = source["shuffle_buffer"]
        found = list((stream.shuffle(seed=seed, buffer_size=buffer) if buffer > 1 else stream).take(rows))
    except Exception as error:  # a dozen classes of four libraries, for no network, no such data set, no right to it
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        raise InputError(
            f"{name}: could not be read from the hub ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Give a file "
            "that you have with `source: {path: ...}`, or set HF_ENDPOINT to a mirror, or "
            + ("set HF_HUB_OFFLINE=0 (it is on here)" if offline else "run where there is a network, with HF_HUB_OFFLINE=0")
        ) from None
    if not found:
        raise InputError(f"{name}: no rows in this split")
    ids = [f"{source['hub']}/{split}:{number}" for number in range(1, len(found) + 1)]
    return name, [
        Source(name, one, f"{name}: row {number}", row) for number, (one, row) in enumerate(zip(ids, found, strict=True), 1)
    ]


def parse(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON: {error}; expected one JSON object on each line") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row


def prompts(candidates: list[Source], source: str) -> list[dict]:
    """Prompts with instructions that can be verified, each with a key of its own."""
    rows: list[dict] = []
    for _, row_id, place, row in candidates:
        if missing := [field for field in IFEVAL if field not in row]:
            found = ", ".join(sorted(row)) or "nothing"
            raise InputError(f"{place}: {missing[0]} is missing; a row of kind ifeval has {', '.join(IFEVAL)}, found {found}")
        check_prompt(row, place)
        key, arguments = plain(row.get("key", row_id)), plain(row["kwargs"])
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise InputError(f"{place}: expected a number or a text under key, found {json.dumps(key)[:80]}")
        rows.append({**row, "key": key, "kwargs": arguments, "id": row_id})
        if not whole(json.dumps(rows[-1], ensure_ascii=False)):
            raise InputError(f"{place}: holds half a character (a lone surrogate, as \\ud83d); it was cut in two somewhere")
    if twice := [key for key, count in Counter(str(row["key"]) for row in rows).items() if count > 1]:
        raise InputError(f"{source}: the key {twice[0]} stands in more than one row; answers could not be told apart")
    return rows


def plain(value: Any) -> Any:
    """Whole floats as integers and NaN as null, at any depth: what pandas makes of counts in a column with empty cells."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    return value


def clean(
    candidates: list[Source], kind: str, form: str | None, group_by: str | None
) -> tuple[list[dict], Counter, dict[str, int]]:
    """Rows in the kind's form with their ids; reasons and counts of what was dropped; how many rows of each format there were."""
    rows: list[dict] = []
    dropped: Counter = Counter()
    found: Counter = Counter()
    for _, row_id, place, row in candidates:
        try:
            name, made = formats.convert(row, kind, place, form)
        except formats.Unusable as no_use:
            dropped[str(no_use)] += 1
            continue
        found[name] += 1
        if reason := unusable(made):
            dropped[reason] += 1
        else:
            group = {group_by: row[group_by]} if group_by and row.get(group_by) is not None else {}
            rows.append({"id": row_id, **made, **group})
    return rows, dropped, dict(sorted(found.items()))


def check_groups(candidates: list[Source], key: str) -> None:
    """InputError unless in each file all rows have the group's key or none has it, and in one at least all have it."""
    sides: dict[str, dict[bool, Source]] = {}
    for one in candidates:
        sides.setdefault(one.name, {}).setdefault(one.row.get(key) is not None, one)
    for side in sides.values():
        if len(side) == 2:
            raise InputError(f"{side[False].place}: has no {key}, which group_by names and other rows of this file have")
    if not any(True in side for side in sides.values()):
        raise InputError(f"{candidates[0].place}: has no {key}, which group_by names, and neither has any other row")


def check_prompt(row: dict, place: str) -> None:
    """InputError on an evaluation prompt that could be answered but not scored."""
    ids, arguments = row["instruction_id_list"], row["kwargs"]
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise InputError(f"{place}: expected a text under prompt, found {json.dumps(row['prompt'])[:80]}")
    if not isinstance(ids, list) or not isinstance(arguments, list) or not ids or len(ids) != len(arguments):
        raise InputError(f"{place}: expected lists of equal length, not empty, under instruction_id_list and kwargs")


def unusable(row: dict) -> str | None:
    """Why a well-formed row can't be trained on, or None."""
    if not whole(json.dumps(row, ensure_ascii=False)):
        return "with half a character (a lone surrogate)"
    answers = [row["messages"]] if "messages" in row else [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    if any(answer[-1]["role"] != "assistant" for answer in answers):
        return "without an answer at the end"
    before = slicing.prompt_turns(row)
    if not any(turn["role"] == "user" and not blank(turn["content"]) for turn in before):
        return "without a prompt"
    if before[-1]["role"] == "assistant":
        return "with a prompt that ends with the assistant's turn"
    if "messages" not in row and any(turn["role"] != "assistant" for answer in answers for turn in answer):
        return "with other turns than the assistant's in an answer"
    if any(blank(turn["content"]) for answer in answers for turn in answer if turn["role"] == "assistant"):
        return "with an empty answer"
    if "chosen" in row and [t["content"].strip() for t in row["chosen"]] == [t["content"].strip() for t in row["rejected"]]:
        return "with chosen equal to rejected"
    return None


def filter_rows(rows: list[dict], check: slicing.Decontaminator, tokenizer, max_prompt_tokens: int) -> tuple[list[dict], Counter]:
    """Drop what covers an evaluation prompt, what the model's chat template can't write, and what has too long a prompt."""
    from workflow_scripts.models import chat

    kept: list[dict] = []
    control = chat.control_tokens(tokenizer)
    dropped: Counter = Counter()
    for row in rows:
        before = slicing.prompt_turns(row)
        questions = [turn["content"] for turn in before if turn["role"] == "user"]
        if check.covers(questions, "\n".join([*(turn["content"] for turn in before), *slicing.answer_texts(row)])):
            dropped["covering an evaluation prompt"] += 1
        elif reason := chat.unwritable(tokenizer, [before, *slicing.conversations(row)], control, "messages" in row):
            dropped[reason] += 1
        elif len(tokenizer.apply_chat_template(before, add_generation_prompt=True)["input_ids"]) > max_prompt_tokens:
            dropped[f"with a prompt above {max_prompt_tokens} tokens"] += 1
        else:
            kept.append(row)
    return kept, dropped


def hold_out(rows: list[dict], heldout: int, out: Path, group_by: str | None = None) -> list[dict]:
    """Mark `heldout` rows, whole groups at a time, so that no prompt and no value of the key `group_by` is on both sides.

    A group is what is joined by a common prompt or value, over any number of steps: a-b by the prompt and b-c by the value put
    a and c together. Groups come in the order of the smallest hash of their prompts.
    """
    prompts = [hashlib.sha256(slicing.prompt_of(row).encode()).hexdigest() for row in rows]
    leader: dict[str, str] = {}  # of a prompt's hash, or of a value: one step towards the smallest of its group

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    for prompt, row in zip(prompts, rows, strict=True):
        find(prompt)
        if group_by and group_by in row:
            ends = sorted((find(prompt), find(f"value {json.dumps(row[group_by], sort_keys=True)}")))  # after all hashes
            leader[ends[1]] = ends[0]
    order: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        order.setdefault(find(prompt), []).append(i)
    chosen: set[int] = set()
    for group in sorted(order):
        if len(chosen) + len(order[group]) <= heldout:
            chosen.update(order[group])
    if len(chosen) == len(rows):
        raise InputError(
            f"{out}: no rows left to train on: {len(rows)} usable rows, {heldout} of them held out; raise rows or lower heldout"
        )
    if not chosen:
        unit = "group" if group_by else "prompt"
        raise InputError(
            f"{out}: no rows could be held out: each {unit} has more than heldout = {heldout} of the {len(rows)} rows; raise it"
        )
    return [{**row, "heldout": i in chosen} for i, row in enumerate(rows)]


if __name__ == "__main__":
    cli.run(main, __doc__)
