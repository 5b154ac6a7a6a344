"""Which rows of a source a slice takes, and which of them can't be used. Light: the plan calls it at parse time.

A slice's *candidate rows* are those that seed and row limit pick from its source, before any row is dropped. Their hash
stands in the slice's fingerprint: a changed row inside the selection makes the slice stale; a touched file, or a change
outside the selection, does not.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path

from workflow_scripts.core.messages import InputError


def candidates(path: str, rows: int, seed: int) -> list[tuple[int, str]]:
    """(line number from 1, text) of the rows picked from a JSONL file: `rows` of its non-blank lines, drawn by `seed`.

    In the order of the file. All of them where the file has no more. InputError where there is none.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # a byte order mark is passed over
            lines = [(number, line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read as UTF-8 text: {reason}") from None
    if not lines:
        raise InputError(f"{path}: no rows in this file")
    if len(lines) <= rows:
        return lines
    return sorted(random.Random(seed).sample(lines, rows))


def candidates_hash(path: str, rows: int, seed: int, cache_file: str) -> str:
    """SHA-256 of the candidate rows with their line numbers, cached by path, size, times and inode of the source.

    The time of the last change of the inode counts too: a copy can restore the other one (`cp -p`).
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    key = json.dumps([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, rows, seed])
    cache: dict[str, str] = {}
    try:
        found = json.loads(Path(cache_file).read_text())
        cache = found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        cache = {}  # a cache only: without it the file is read again
    if key not in cache:
        text = "\n".join(f"{number} {line}" for number, line in candidates(path, rows, seed))
        cache[key] = hashlib.sha256(text.encode()).hexdigest()
        try:
            os.makedirs(os.path.dirname(cache_file), exist_ok=True)
            part = f"{cache_file}.{os.getpid()}"
            Path(part).write_text(json.dumps(cache))
            os.replace(part, cache_file)
        except OSError:
            return cache[key]  # a read-only folder costs the reading, never the plan
    return cache[key]


def prompt_turns(row: dict) -> list[dict]:
    """The turns before a row's last answer."""
    return row["messages"][:-1] if "messages" in row else row["prompt"]


def prompt_of(row: dict) -> str:
    """The text that identifies a row's prompt: all turns before the last answer."""
    return "\n".join(turn["content"] for turn in prompt_turns(row))


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


class Decontaminator:
    """Says whether a training row covers an evaluation prompt.

    `ngram`: the row's text holds at least `share` of the n-grams (words, lower case) of an evaluation prompt, the rule of
    Tulu 3 (Lambert et al. 2024, arXiv:2411.15124, section 3.2: 8-grams, 50 %). A prompt shorter than n words counts as
    one n-gram of its own length. `whole_prompt`: one of the row's user turns *is* an evaluation prompt, up to case and
    spaces; for worlds whose prompts share their phrases.
    """

    def __init__(self, prompts: Iterable[str], rule: str, ngram: int, share: float):
        self.rule, self.n, self.share = rule, ngram, share
        self.whole = {" ".join(prompt.lower().split()) for prompt in prompts} - {""}
        self.grams = [grams for prompt in sorted(self.whole) if (grams := _ngrams(prompt, min(ngram, len(prompt.split()))))]
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
