"""Tasks of lm-eval made by hand: YAML files with their rows, for the tests of `eval.tasks`, and their step run on a model."""

import json
from pathlib import Path

import yaml

from tests.support import small_steps
from workflow_scripts.artifacts import manifests

WORDS = ["river", "cat", "stone", "lamp", "cloud", "horse", "apple", "door"]
CHOICE = [
    {
        "question": f"what stands behind the {WORDS[i % 8]}",
        "options": [WORDS[(i + k) % 8] + " here" * k for k in range(3)],
        "right": i % 3,
        "story": f"s{i // 3}",
    }
    for i in range(18)
]
SOLVED = [row | {"question": f"what stood near the {word}"} for row, word in zip(CHOICE, WORDS, strict=False)]
MEAN = {"aggregation": "mean", "higher_is_better": True}
SHARED = {"test_split": "test", "fewshot_split": "solved", "dataset_path": "json"}
DEFINITIONS: dict[str, dict] = {
    "multiple_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "right",
        "doc_to_choice": "{{options}}",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "loglikelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{options[right]}}",
        "metric_list": [
            {"metric": "acc", **MEAN},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "generate_until": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{options[right]}}",
        "generation_kwargs": {"until": ["e"], "do_sample": False, "max_gen_toks": 12},
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(\\S)"}, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}
ASKED = {"num_fewshot": 0, "chat_template": False, "fewshot_as_multiturn": False, "system": None, "limit": None}


def write(folder: Path, kind: str, rows: list[dict] = CHOICE, name: str = "mine", root: Path | None = None, **more) -> Path:
    """The task's file, with its rows beside it. root: the folder from which paths are told, else they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, part in (("test", rows), ("solved", SOLVED)):
        file = folder / f"{name}_{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
        files[split] = str(file.relative_to(root) if root else file)
    body = {"task": name, **SHARED, "dataset_kwargs": {"data_files": files}, **DEFINITIONS[kind], **more}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def scored(
    folder: Path, kind: str, base: Path, file: Path, metric: str, adapter: Path | None = None, more: dict | None = None, **asked
) -> dict:
    """The score file of the step itself."""
    config = {"task": "mine", "metric": metric, "lm_eval": ASKED | {"file": file.name} | asked} | (more or {})
    if kind == "generate_until":
        config |= {"decoding": "greedy", "generation": {"backend": "graphs", "adapter": "match"}}
    config = {"batch_size": 4} | config
    parents = {"start": base} | ({"adapter": adapter} if adapter else {})
    job = small_steps.job("own_task", folder / "mine_x.json", parents, config)
    job.inputs.append(file)
    return small_steps.run(manifests.Job(job.step, job.inputs, job.out, job.work)).data
