"""Tasks of lm-eval by their names, over local rows: each item has the verdict of `simple_evaluate` on the same model."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support import small_steps
from tests.support.own_task import ASKED, WORDS
from workflow_scripts.data import task_files

COUNT = 12


def hellaswag(i: int, right: str) -> dict:
    word = WORDS[i % 8]
    endings = [f"{WORDS[(i + k) % 8]} [step] is here" for k in range(4)]
    return {"activity_label": "Looking", "ctx_a": f"There is a {word} [title]", "ctx_b": "near it", "endings": endings,
            "label": str(i % 4)}  # fmt: skip


def gsm8k(i: int, right: str) -> dict:
    return {"question": f"{i} + 2?", "answer": f"It is\n#### {right or i + 2}"}


def triviaqa(i: int, right: str) -> dict:
    aliases = [right or f"{WORDS[i % 8]}{i}", WORDS[i % 8]]
    return {"question": f"what is near the {WORDS[i % 8]}", "answer": {"aliases": aliases, "value": aliases[0]}}


# task -> (its rows, splits, metric, settings here, and by lm-eval's names)
TASKS = {
    "hellaswag": (hellaswag, ("train", "validation"), "acc_norm", "none", {}, {"num_fewshot": 0}),
    "gsm8k": (gsm8k, ("train", "test"), "exact_match", "flexible-extract", {"num_fewshot": 8}, {"num_fewshot": 8}),
    "triviaqa": (triviaqa, ("train", "validation"), "exact_match", "remove_whitespace", {"chat_template": True},
                 {"num_fewshot": 0, "apply_chat_template": True, "fewshot_as_multiturn": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(speaking_base, tmp_path_factory) -> Path:
    """The same model with a longer context: its places are rotary, and an answer of these tasks may have 256 tokens."""
    folder = tmp_path_factory.mktemp("long") / "base"
    shutil.copytree(speaking_base.parent, folder, ignore=shutil.ignore_patterns("manifest.json"))
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        told = (folder / name).read_text()
        (folder / name).write_text(told.replace(f'"{key}": 256', f'"{key}": 1024'))
    files = sorted(path.name for path in folder.iterdir())
    return small_steps.write_manifest(folder / "manifest.json", "base", "long base", files)


def by_lm_eval(base: Path, task: str, files: dict[str, Path], cache: Path, settings: dict, kind: str) -> list[dict]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    read = {"data_files": {split: str(file) for split, file in files.items()}, "cache_dir": str(cache)}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": read}
    manager = TaskManager(include_defaults=False, include_path=str(task_files.own_file(task).parent))
    found = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(base.parent), "dtype": "float32"}, [{"group": "own", "task": [{"task": task} | data]}],
        batch_size=4, device="cpu", task_manager=manager, bootstrap_iters=0, **settings,
    )  # fmt: skip
    name = next(name for name in found["samples"] if name.endswith(task))
    return sorted((one for one in found["samples"][name] if one["filter"] == kind), key=lambda one: one["doc_id"])


def written(folder: Path, task: str, said: list[str]) -> dict[str, Path]:
    """The files of a task's splits; of every second item, what the model says is right."""
    make, splits = TASKS[task][:2]
    folder.mkdir()
    files = {}
    for split in splits:
        rows = [make(i, said[i] if said and split != "train" and i % 2 else "") for i in range(COUNT)]
        files[split] = folder / f"{task}_{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.mark.parametrize("task", TASKS)
def test_each_item_has_the_verdict_of_simple_evaluate(base, tmp_path, task):
    _, _, metric, kind, ours, theirs = TASKS[task]
    said: list[str] = []
    if metric == "exact_match":  # else no verdict would be right
        first = by_lm_eval(base, task, written(tmp_path / "first", task, []), tmp_path / "c1", theirs, kind)
        said = [one["filtered_resps"][0] for one in first]
    files = written(tmp_path / "task", task, said)
    named = metric if kind == "none" else f"{metric},{kind}"
    asked = ASKED | ours | {"task": task, "data_files": {split: file.name for split, file in files.items()}}
    config = {"task": "named", "metric": named, "lm_eval": asked, "batch_size": 4}
    if metric == "exact_match":
        config |= {"decoding": "greedy", "generation": {"backend": "graphs", "adapter": "match"}}
    job = small_steps.job("own_task", tmp_path / "named_x.json", {"start": base}, config)
    job.inputs.extend(files.values())
    made = small_steps.run(job).data
    samples = by_lm_eval(base, task, files, tmp_path / "c2", theirs, kind)
    verdicts = [bool(one[metric]) for one in samples]
    assert [row["correct"] for row in made["per_prompt"]] == verdicts and 0 < sum(verdicts) < COUNT
    assert made["example"]["prompt"] == samples[0]["arguments"][0][0]
