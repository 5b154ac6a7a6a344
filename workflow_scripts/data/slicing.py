"""Which rows of a source a slice takes, and which of them can't be used. Light: the plan calls it at parse time.

A slice's *candidate rows* are those that seed and row limit pick from its source, before any row is dropped. Their hash
stands in the slice's fingerprint: a changed row inside the selection makes the slice stale; a touched file, or a change
outside the selection, does not. Several files count as one, in the order in which they are named.

A file is read by its name's ending: `.parquet` as Parquet, anything else as a list of objects where it begins with `[` and as
JSONL where it does not. CSV and other tables are refused: what is a number in them and what a text is anyone's guess. JSONL is
read twice (count, then take) and Parquet by row groups and only in the columns that a format reads, so that a few rows of a
large file never hold it in memory; a JSON list has to be read whole.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from workflow_scripts.data import formats
from workflow_scripts.data.words import whole, words
from workflow_scripts.plumbing.content_cache import ContentCache
from workflow_scripts.plumbing.messages import InputError

TABLES = {".csv": "read_csv", ".tsv": "read_table", ".xlsx": "read_excel", ".xls": "read_excel"}


class Candidate(NamedTuple):
    """A row that was picked: its file, its number there from 1 (of the line in JSONL, else of the row), and its JSON text."""

    file: str
    number: int
    text: str

    @property
    def id(self) -> str:
        return f"{os.path.basename(self.file)}:{self.number}"

    @property
    def place(self) -> str:
        return f"{self.file}: {'line' if _form(self.file) == 'jsonl' else 'row'} {self.number}"


def candidates(files: list[str], rows: int, seed: int, kind: str, group_by: str | None = None) -> list[Candidate]:
    """The rows picked from the files: `rows` of their rows (non-blank lines in JSONL), drawn by `seed`, in the files' order.

    All of them where there are no more. `kind` and `group_by` of the slice say which columns of a Parquet file are read.
    InputError where there is no row, or where a file can't be read.
    """
    counts = [_count(file) for file in files]
    if 0 in counts:
        raise InputError(f"{files[counts.index(0)]}: no rows in this file")
    total = sum(counts)
    drawn = sorted(random.Random(seed).sample(range(total), rows)) if total > rows else range(total)
    picked, first = [], 0
    for file, count in zip(files, counts, strict=True):
        wanted = [index - first for index in drawn if first <= index < first + count]
        picked += [Candidate(file, number, text) for number, text in _take(file, wanted, kind, group_by)] if wanted else []
        first += count
    return picked


def _form(file: str) -> str:
    """jsonl, json or parquet."""
    if os.path.splitext(file)[1].lower() == ".parquet":
        return "parquet"
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        while (start := opened.read(64)) and not start.strip():
            pass
    return "json" if start.lstrip().startswith("[") else "jsonl"


def _unreadable(file: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{file}: cannot be read as UTF-8 text: {reason}")


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank; a byte order mark is passed over."""
    try:
        with open(file, encoding="utf-8-sig") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _objects(file: str) -> list:
    try:
        with open(file, encoding="utf-8-sig") as opened:
            return json.load(opened)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None


def _count(file: str) -> int:
    if (ending := os.path.splitext(file)[1].lower()) in TABLES:
        to = f"{os.path.splitext(file)[0]}.jsonl"
        program = f"import pandas; pandas.{TABLES[ending]}({file!r}).to_json({to!r}, orient='records', lines=True)"
        why = "it does not say what is a number, a list or no value"
        raise InputError(f'{file}: {ending} is not read, since {why}; convert it once: python -c "{program}"')
    try:
        form = _form(file)
    except OSError as error:
        raise _unreadable(file, error) from None
    if form == "parquet":
        with _parquet(file) as table:
            return table.metadata.num_rows
    return len(_objects(file)) if form == "json" else sum(1 for _ in _lines(file))


def _take(file: str, wanted: list[int], kind: str, group_by: str | None) -> Iterator[tuple[int, str]]:
    """(number, JSON text) of the rows at the indices `wanted`, which rise from 0."""
    form = _form(file)
    if form == "parquet":
        yield from _take_parquet(file, wanted, kind, group_by)
    elif form == "json":
        objects = _objects(file)
        yield from ((index + 1, _text(objects[index])) for index in wanted)
    else:
        chosen = set(wanted)
        yield from (numbered for index, numbered in enumerate(_lines(file)) if index in chosen)


def _text(row: object) -> str:
    """A row as JSON. Half a character stays an escape: as a character no text could be hashed or written."""
    text = json.dumps(row, ensure_ascii=False)
    return text if whole(text) else json.dumps(row)


def _parquet(file: str):
    """A ParquetFile. What it reads stands in the hash of the candidate rows, so the version of pyarrow decides nothing more."""
    from importlib import import_module  # and so pyarrow is no package of slices that read other sources

    try:
        return import_module("pyarrow.parquet").ParquetFile(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _take_parquet(file: str, wanted: list[int], kind: str, group_by: str | None) -> Iterator[tuple[int, str]]:
    with _parquet(file) as table:
        present = table.schema_arrow.names
        read = present if kind == "ifeval" else formats.columns(kind, present, file)
        read = read + [group_by] if group_by in present and group_by not in read else read
        first = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            here = [index - first for index in wanted if first <= index < first + count]
            if here:
                try:
                    rows = table.read_row_group(group, columns=read).take(here).to_pylist()
                except (OSError, ValueError) as error:
                    raise InputError(f"{file}: cannot be read as Parquet: {' '.join(str(error).split())}") from None
                for index, row in zip(here, rows, strict=True):
                    yield first + index + 1, _row_text(row, f"{file}: row {first + index + 1}")
            first += count


def _row_text(row: dict, place: str) -> str:
    row = {key: bool(value) if key in formats.MEDIA else value for key, value in row.items()}  # that it is there drops the row
    try:
        return json.dumps(row, ensure_ascii=False, sort_keys=True)
    except TypeError as error:  # bytes, times
        raise InputError(f"{place}: holds a value that JSON has no form for: {error}") from None


def rows_hash(picked: list[Candidate]) -> str:
    """SHA-256 of candidate rows with their numbers and, where there are several files, their files' names."""
    several = len({row.file for row in picked}) > 1
    lines = (f"{row.id if several else row.number} {row.text}" for row in picked)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def candidates_hash(files: list[str], rows: int, seed: int, kind: str, group_by: str | None, cache_file: str) -> str:
    """`rows_hash` of the candidate rows; where the cache has it, no file is read."""
    settings = [rows, seed, kind, group_by]
    return ContentCache(cache_file).hash_of(files, lambda: rows_hash(candidates(files, rows, seed, kind, group_by)), settings)


def prompt_turns(row: dict) -> list[dict]:
    """The turns before a row's last answer. The prompts of IFEval's format, and questions with options, are texts: one turn."""
    if "messages" in row:
        return row["messages"][:-1]
    if "question" in row:
        return [{"role": "user", "content": row["question"]}]
    return [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]


def conversations(row: dict) -> list[list[dict]]:
    """The conversations that a row is trained on, each with an answer at its end: both sides of a pair."""
    if "messages" in row:
        return [row["messages"]]
    return [row["prompt"] + row[key] for key in ("chosen", "rejected", "completion") if key in row]


def answer_texts(row: dict) -> list[str]:
    """The texts of a row's answers: the last turn of a conversation, both sides of a pair."""
    if "answer" in row:
        return [row["answer"]]
    answers = (
        row["messages"][-1:]
        if "messages" in row
        else [turn for key in ("chosen", "rejected", "completion") for turn in row.get(key, [])]
    )
    return [turn["content"] for turn in answers]


def prompt_of(row: dict) -> str:
    """The text that identifies a row's prompt: all turns before the last answer."""
    return "\n".join(turn["content"] for turn in prompt_turns(row))


def avoided(row: dict, rule: str, ngram: int) -> str:
    """The text of an evaluation prompt that no training row may cover.

    A question of MMLU may have fewer words than an n-gram and say nothing by itself ("Which of the following is true?"): whatever
    has that phrase would be dropped. By n-grams such a question counts with its choices, lettered as it is asked.
    """
    text = prompt_of(row)
    if "choices" in row and rule == "ngram" and len(words(text)) < ngram:
        return "\n".join([text, *(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))])
    return text


def together(rows: list[dict], evaluated: list[dict], rule: str, ngram: int, share: float) -> list[dict]:
    """The rows whose prompt covers a prompt that is evaluated, or is covered by one (`Decontaminator`: by which rule)."""
    there = Decontaminator([avoided(row, rule, ngram) for row in evaluated], rule, ngram, share)
    here = Decontaminator([avoided(row, rule, ngram) for row in rows], rule, ngram, share)
    larger = [text for text in map(prompt_of, evaluated) if here.covers([text], text)]

    def within(row: dict) -> bool:
        one = Decontaminator([avoided(row, rule, ngram)], rule, ngram, share)
        return any(one.covers([text], text) for text in larger)

    return [row for row in rows if there.covers([prompt_of(row)], prompt_of(row)) or within(row)]


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


class Decontaminator:
    """Says whether a training row covers an evaluation prompt.

    `ngram`: the row's text holds at least `share` of the n-grams (words, lower case; data/words.py) of an evaluation prompt, the
    rule of Tulu 3 (Lambert et al. 2024, arXiv:2411.15124, section 3.2: 8-grams, 50 %). A prompt shorter than n words counts as
    one n-gram of its own length. `whole_prompt`: one of the row's user turns *is* an evaluation prompt, up to case and
    spaces; for worlds whose prompts share their phrases.
    """

    def __init__(self, prompts: Iterable[str], rule: str, ngram: int, share: float):
        self.rule, self.n, self.share = rule, ngram, share
        self.whole = {" ".join(prompt.lower().split()) for prompt in prompts} - {""}
        counted = [(prompt, min(ngram, len(words(prompt)))) for prompt in sorted(self.whole)]
        self.grams = [_ngrams(prompt, n) for prompt, n in counted if n]
        self.index: dict[tuple[str, ...], list[int]] = {}
        for i, grams in enumerate(self.grams):
            for gram in grams:
                self.index.setdefault(gram, []).append(i)
        self.lengths = sorted({len(gram) for gram in self.index})

    def covers(self, questions: Iterable[str], text: str) -> bool:
        """questions: the row's user turns. text: the whole row, system turns and answers included."""
        if self.rule == "whole_prompt":
            return any(" ".join(question.lower().split()) in self.whole for question in questions)
        hits: dict[int, int] = {}
        for length in self.lengths:
            for gram in _ngrams(text, length):
                for i in self.index.get(gram, ()):
                    hits[i] = hits.get(i, 0) + 1
        return any(count >= self.share * len(self.grams[i]) for i, count in hits.items())

    def covered(self, text: str) -> bool:
        """The other way round: the evaluation prompts together hold `share` of this text's n-grams, or one has it whole."""
        if any(" ".join(text.lower().split()) in prompt for prompt in self.whole):
            return True
        grams = _ngrams(text, min(self.n, len(words(text)))) if self.rule == "ngram" else set()
        return bool(grams) and sum(gram in self.index for gram in grams) >= self.share * len(grams)


def check_apart(rows: list[dict], evaluated: list[dict], rule: dict, source: str) -> None:
    """InputError where development prompts, by which trials are chosen, are among those that the result is judged by."""
    if found := together(rows, evaluated, **rule):
        raise InputError(
            f"{source}: {len(found)} of {len(rows)} development prompts share a prompt with an evaluation, by data.decontaminate "
            f"({rule['rule']}), such as row {found[0]['id']}; what is chosen there can't be judged there: take other prompts"
        )
