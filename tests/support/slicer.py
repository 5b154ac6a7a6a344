"""Slicing of rows that a test writes, over parents made by hand."""

import json
from pathlib import Path

import pytest

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import file_sha256
from workflow_scripts.data import slicing
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import slice_data

QUESTION = "name three rivers of the far north"


class Words:
    """A tokenizer of one token a word, with one more for each turn and for the start of the answer."""

    added_tokens_decoder: dict = {}
    name_or_path = "words"

    def apply_chat_template(self, turns, add_generation_prompt=False, tokenize=True):
        if not tokenize:
            return "\n".join(turn["content"] for turn in turns)
        start = ["<answer>"] * add_generation_prompt
        return {"input_ids": [word for turn in turns for word in ["<turn>", *turn["content"].split()]] + start}


def turn(role, content):
    return {"role": role, "content": content}


def chat_row(question, answer, *before):
    return {"messages": [*before, turn("user", question), turn("assistant", answer)]}


def pair_row(question, chosen="yes it is", rejected="no it is not"):
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def good(kind, n):
    return [chat_row(f"q{i}", f"a{i}") if kind == "sft" else pair_row(f"q{i}") for i in range(n)]


class Slicer:
    """Runs `main` on a source, over parents made by hand: a slice of one evaluation prompt, and an empty base."""

    def __init__(self, folder: Path):
        self.folder, self.results = folder, folder / "results"
        self.parents = {}
        prompts = [{"key": 1, "prompt": QUESTION, "instruction_id_list": ["x"], "kwargs": [{}], "id": "p:1"}]
        self.parent("ifeval_prompts", self.results / "data/ifeval.manifest.json", "ifeval.jsonl", lines(prompts))
        self.parent("base", self.results / "base/manifest.json", "config.json", b"{}")

    def parent(self, role: str, manifest: Path, name: str, data: bytes) -> None:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        (manifest.parent / name).write_bytes(data)
        content = {"fingerprint": f"{role:0>32}", "files": {name: file_sha256(manifest.parent / name)}}
        manifest.write_text(json.dumps(content))
        self.parents[role] = manifest

    def job(self, data, kind="sft", name="mine.jsonl", **config) -> manifests.Job:
        source = self.folder / name
        source.write_bytes(data if isinstance(data, bytes) else lines(data))
        config = {"kind": kind, "rows": 1000, "seed": 1, "source": {"file": name}} | config
        if kind != "ifeval":
            rule = {"rule": "whole_prompt", "ngram": 3, "share": 0.5}
            config = {"heldout": 1, "max_drop": 1.0, "max_prompt_tokens": 50, "decontaminate": rule} | config
        step = {
            "step": "slice_data",
            "config": config,
            "parents": {role: f"{role:0>32}" for role in self.parents} if kind != "ifeval" else {},
            "packages": {},
            "external": {
                "candidate_rows": slicing.candidates_hash(
                    [str(source)], config["rows"], config["seed"], kind, config.get("group_by"), f"{source}.cache"
                )
            },
        }
        inputs = [source, *self.parents.values(), self.results / "data/ifeval.jsonl"] if kind != "ifeval" else [source]
        return manifests.Job(step, inputs, self.results / "data/made.manifest.json", self.results / ".work")

    def __call__(self, data, kind="sft", limits=(), **config) -> tuple[list[dict], dict]:
        """(rows of the slice, its manifest); limits: as Plan.limits has them for a slice"""
        job = self.job(data, kind, **config)
        job.limits = {"made": list(limits)}
        slice_data.main(job)
        made = manifests.read(job.out)
        return made.rows(), made.data

    def error(self, data, kind="sft", **config) -> str:
        with pytest.raises(InputError) as caught:
            self(data, kind, **config)
        assert not (self.results / "data/made.jsonl").exists() and not (self.results / "data/made.manifest.json").exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
