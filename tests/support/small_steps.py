"""A base model of a few thousand weights, slices and jobs made by hand: enough to run the real steps in-process, in seconds.

The settings are the tiny world's own, read from config/config.yaml and config/reference_free.yaml, so that a test sees what a
step is really given.
"""

import copy
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.processors import SEED
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import file_sha256
from workflow_scripts.config import config
from workflow_scripts.config.experiments import rewards
from workflow_scripts.tiny import world

ROOT = Path(__file__).resolve().parents[2]
CONFIG = config.load(ROOT / "config" / "config.yaml", ROOT / "config" / "reference_free.yaml")
LORA, QUANT = CONFIG.data["lora"], CONFIG.data["quant"]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}


def answering(new: int, batch: int = 0, **more) -> dict:
    """The config of a step that answers greedily: by `graphs`, or with `batch` by `hf`, so many prompts at a time."""
    who = {"backend": "hf", "batch_size": batch} if batch else {"backend": "graphs", "adapter": "match"}
    return {"max_new_tokens": new, "decoding": "greedy", "generation": who} | more


def write_manifest(path: Path, kind: str, fingerprint: str, files: list[str], **more) -> Path:
    listed = {name: file_sha256(path.parent / name) for name in files}
    path.write_text(manifests.dump({"format": 1, "kind": kind, "fingerprint": fingerprint, "files": listed, **more}))
    return path


def write_base(folder: Path, seed: int = SEED, steps: int = 0, shape: dict | None = None, **train) -> Path:
    """A base model: random weights, or pretrained for `steps` steps. Returns its manifest."""
    import torch

    from workflow_scripts.tiny import pretrain

    torch.set_num_threads(1)
    numbers = copy.deepcopy(CONFIG.data["base"]["scratch"])
    numbers["documents"]["n"] = 1500
    numbers["model"] = {**SHAPE, **(shape or {})}
    numbers["train"] |= {"steps": steps, **train}
    model, tokenizer = pretrain.build(numbers, seed)
    model.save_pretrained(folder, max_shard_size="1000GB")
    tokenizer.save_pretrained(folder)
    names = sorted(path.name for path in folder.iterdir())
    return write_manifest(folder / "manifest.json", "base", f"base of {folder.name}", names)


def copy_tiny_base(folder: Path) -> Path:
    """The tiny world's own base, the same bytes on every processor. Returns its manifest."""
    shutil.copytree(ROOT / "tests/files/tiny_base", folder, ignore=shutil.ignore_patterns("README.md"))
    return write_manifest(folder / "manifest.json", "base", "tiny base", sorted(path.name for path in folder.iterdir()))


def write_slice(folder: Path, name: str, rows: list[dict], heldout: int = 8) -> Path:
    """A slice whose last `heldout` rows are kept from training. Returns its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    marked = [{"id": f"{name}/{i}", **row, "heldout": i >= len(rows) - heldout} for i, row in enumerate(rows)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    return write_manifest(folder / f"{name}.manifest.json", "slice", f"slice {folder.name}/{name}", [f"{name}.jsonl"])


def sft_slice(folder: Path, n: int = 40, name: str = "sft") -> Path:
    return write_slice(folder, name, world.sft_rows(n, seed=1, follow=0.5, numeric=0.1))


def pairs_slice(folder: Path, n: int = 40, name: str = "pairs") -> Path:
    return write_slice(folder, name, world.preference_rows(n, seed=1))


def unpaired_slice(folder: Path, desirable: int, undesirable: int, heldout: int = 8, name: str = "unpaired") -> Path:
    """Single answers with a label, to prompts of their own. The held-out rows come on top, half of them desirable."""
    labels = [True] * desirable + [False] * undesirable + [True, False] * (heldout // 2)
    pairs = world.preference_rows(len(labels), seed=1)
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}
        for pair, label in zip(pairs, labels, strict=True)
    ]
    return write_slice(folder, name, rows, heldout)


def instructions_slice(folder: Path, n: int = 40, name: str = "instructions") -> Path:
    return write_slice(folder, name, world.eval_rows(n, seed=1, split="pairs"))


def sums_slice(folder: Path, n: int = 40, name: str = "sums") -> Path:
    rows = world.numeric_rows(n, seed=1, split="pairs")
    turns = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}], "final": str(row["final"])} for row in rows]
    return write_slice(folder, name, turns)


SLICES = {"sft": sft_slice, "pairs": pairs_slice, "instructions": instructions_slice, "sums": sums_slice}


def write_slices(folder: Path) -> None:
    """A slice of each kind."""
    for write in SLICES.values():
        write(folder)


def slices_in(folder: Path) -> dict[str, Path]:
    """The manifests that `write_slices` left, by name and by each experiment that trains on such a slice."""
    made = {name: folder / f"{name}.manifest.json" for name in SLICES}
    return made | {name: made[body["slice"].removeprefix("rm_")] for name, body in CONFIG.experiments.items()}


def train_config(experiment: str, **more) -> dict:
    """The config of a train step; keys that are not the step's own are fields of TRL's config."""
    body = CONFIG.experiments[experiment]
    config = copy.deepcopy({key: value for key, value in body.items() if key not in ("start_from", "slice")})
    config |= {"lora": copy.deepcopy(LORA), "optim": "adamw_torch"}
    if "reward" in body:
        config |= {"reward": rewards(body), "generation": CONFIG.data["generation"]["rollouts"]}
    for key, value in more.items():
        (config if key in config or key == "flip_labels" else config["train"])[key] = value
    if config["quantise"] != "none":
        config["quant"] = QUANT
    return config


def job(name: str, out: Path, parents: dict[str, Path], config: dict, seed: int = SEED) -> manifests.Job:
    """A step as the plan would hand it over, but with fingerprints of our own."""
    read = {role: manifests.read(path) for role, path in parents.items()}
    step = {
        "step": name,
        "config": config,
        "parents": {role: artifact.fingerprint for role, artifact in read.items()},
        "packages": {},
        "device": "cpu",
        "precision": "fp32",
        "threads": 1,
        "seed": seed,
        "out": out.parent.name + "/" + out.name,  # two runs of one config into two places are two steps here
    }
    return manifests.Job(step, list(parents.values()), out, out.parent / ".work")


def run(job: manifests.Job) -> manifests.Artifact:
    """Run a step's own `main`; its artifact."""
    importlib.import_module(f"workflow_scripts.steps.{job.step['step']}").main(job)
    return manifests.read(job.out)


class _Built(Exception):
    pass


def built_trainer(out: Path, experiment: str, start: Path, rows: Path, seed: int = SEED, **more) -> Any:
    """The trainer of a step as it stands before training: adapter settled, mask checked, not yet asserted on."""
    from workflow_scripts.models import lora

    kept = []

    def stop(trainer, *args, **kwargs):
        kept.append(trainer)
        raise _Built

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Built):
        patch.setattr(lora, "check_trainer", stop)
        train(out, experiment, start, rows, seed, **more)
    return kept[0]


def copy_base(base: Path, folder: Path, template: tuple[str, str] = ("", ""), **tokenizer_config) -> Path:
    """A copy of a base model with a piece of its chat template replaced, or other keys in its tokenizer config."""
    shutil.copytree(base.parent, folder)
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    assert template[0] in jinja.read_text()
    jinja.write_text(jinja.read_text().replace(*template))
    settings.write_text(json.dumps(json.loads(settings.read_text()) | tokenizer_config))
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    return write_manifest(folder / "manifest.json", "base", f"base of {folder.name}", names)


def train(
    out: Path,
    experiment: str,
    start: Path,
    rows: Path,
    seed: int = SEED,
    models: dict[str, tuple[Path, Path]] | None = None,
    **more,
) -> manifests.Artifact:
    """Train an adapter of `experiment` into out/adapter. models: reward model's name -> manifests of (its start, its adapter)."""
    config = train_config(experiment, **more)
    parents = {"start": start, "rows": rows}
    for name, (model_start, adapter) in (models or {}).items():
        parents |= {f"start of {name}": model_start, f"reward {name}": adapter}
    return run(job(f"train_{config['method']}", out / "adapter" / "manifest.json", parents, config, seed))


def merge(out: Path, start: Path, adapter: Path, quantise: str = "nf4") -> manifests.Artifact:
    config = {"quantise": quantise, "quant": QUANT}
    return run(job("merge", out / "merged" / "manifest.json", {"start": start, "adapter": adapter}, config))
