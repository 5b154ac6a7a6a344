"""The reference's log-probabilities of DPO and KTO: computed once, shared by the ranks of a training, kept for other trainings.

They are a forward pass over all rows before the first step, a third of a training's work or more. A training of the same base on
the same rows needs the same numbers: a variant of the loss, another beta, a trial of `tune:`, another seed on one base, a killed
run that goes on. So they lie in `results/.work/references/`, each under the hash of all that they follow from: the start's
weights and how they are loaded, the machine, the versions and the code, and every padded batch as the model would see it. What
batches hold decides: KTO's rows of its KL estimate are paired within a group, in an order of the seed, and are found again only
where all of that is the same. It is a cache, and no output: with it and without, the numbers are those of the same pass, on a CPU
bit for bit. Nobody waits for it: two trainings that start together both compute.

Why no phase of its own: it would load the model once more, which takes longer than the pass over a thousand pairs
(docs/performance.md). Alone and with nothing kept, the numbers are TRL's own (`compute_ref_log_probs`), batch by batch.
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from trl import DPOTrainer, KTOTrainer

from workflow_scripts.artifacts.manifests import Artifact, Job
from workflow_scripts.plumbing import ranks
from workflow_scripts.plumbing.progress import Progress
from workflow_scripts.training import exchange, speed
from workflow_scripts.training.groups import InGroups, InKlGroups

ROWS = 32  # of a pass that takes no gradient
STEP = ("code", "packages", "device", "precision", "threads")  # of the step's JSON, what a forward pass follows from


def of(job: Job, start: Artifact) -> dict[str, Any]:
    """Arguments of the trainers below: where references are kept, and what theirs follows from beside the batches."""
    gpu = job.step["device"] == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    how = {"unpadded": bool(job.speed.get("unpadded")) and gpu, "deterministic": job.deterministic and gpu,
           "compiled": speed.wants_pieces(job)}  # fmt: skip
    facts = {key: job.step.get(key) for key in STEP} | {
        "weights": start.weights_sha256,
        "model": start.data["files"]["config.json"],
        "quant": job.config.get("quant"),
    }
    return {"kept": job.work / "references", "follows_from": facts | how | {"where": where, "torch": torch.__version__}}


class KeptReference:
    """Beside a trainer of TRL that computes its reference once."""

    COLUMNS: tuple[str, ...]

    def __init__(self, *args: Any, kept: Path, follows_from: dict, **more: Any):
        self.kept, self.follows_from = kept, follows_from  # TRL's constructor computes the reference
        with _unhashed(type(self)):
            super().__init__(*args, **more)

    def _precompute_ref_logps(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        batch_size = self._at_once(batch_size)

        def batches() -> Iterator[dict]:
            for first in range(0, len(dataset), batch_size):
                yield self.data_collator([dataset[n] for n in range(first, min(first + batch_size, len(dataset)))])

        file = self.kept / f"{self._mark(batches())}.safetensors"
        found = exchange.of_first(_read(file, len(dataset)) if ranks.first() else None, f"the kept reference of {name}")
        if found is None:
            found = self._computed(batches(), name, -(-len(dataset) // batch_size))
            if ranks.first():
                _write(file, found)
        else:
            print(f"reference of {name}: taken over from {file}", flush=True)
        for column, values in found.items():
            dataset = dataset.add_column(column, values.numpy())
        return dataset

    def _at_once(self: Any, batch_size: int) -> int:
        """Rows of a pass: on a GPU up to ROWS, since with a few it waits for the processor. No more than the training's own
        passes take of its memory: one layer of eight batches is less than what all layers of one keep for their gradient."""
        if self.args.device.type != "cuda" or self.args.gradient_checkpointing:
            return batch_size
        layers = self.model.config.get_text_config().num_hidden_layers
        return max(batch_size, min(ROWS, batch_size * min(8, layers // 3)))

    def _mark(self: Any, batches: Iterator[dict]) -> str:
        about = self.follows_from | {"columns": self.COLUMNS, "ld_alpha": getattr(self, "ld_alpha", None)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for batch in batches:
            for name, value in sorted(batch.items()):
                digest.update(f"{name} {getattr(value, 'shape', '')} {getattr(value, 'dtype', '')}".encode())
                digest.update(value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
        return digest.hexdigest()

    def _computed(self: Any, batches: Iterator[dict], name: str, count: int) -> dict[str, torch.Tensor]:
        """Each batch by one rank, and all get it."""
        bar, done = Progress(count, f"reference of {name}"), iter(range(1, count + 1))

        def one(batch: dict) -> list[torch.Tensor]:
            here = {key: value.to(self.accelerator.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            made = self.compute_ref_log_probs(self.ref_model or self.model, here)
            bar.step(next(done))
            return [column.float().cpu() for column in made if column is not None]

        columns = zip(*exchange.shared_out(batches, one, f"reference of {name}", count), strict=True)
        bar.close()
        return {column: torch.cat(parts) for column, parts in zip(self.COLUMNS, columns, strict=False)}


class DPO(KeptReference, InGroups, DPOTrainer):  # type: ignore[misc]
    COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class KTO(KeptReference, InKlGroups, KTOTrainer):  # type: ignore[misc]
    COLUMNS = ("ref_logps", "ref_KL_logps")  # the second where the loss has a KL estimate


@contextmanager
def _unhashed(kind: type) -> Iterator[None]:
    """TRL would hash all weights, in fp32, for a name in a cache that is thrown away with the process: seconds at 0.5 B."""
    module = sys.modules[next(one.__module__ for one in kind.__mro__ if one.__module__.startswith("trl."))]
    before = module.hash_module  # type: ignore[attr-defined]
    module.hash_module = lambda model: ""  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.hash_module = before  # type: ignore[attr-defined]


def _read(file: Path, rows: int) -> dict[str, torch.Tensor] | None:
    try:
        found = load_file(file)
    except (OSError, SafetensorError):  # none, or one that is broken: computed again
        return None
    return found if found and all(len(values) == rows for values in found.values()) else None


def _write(file: Path, found: dict[str, torch.Tensor]) -> None:
    """Whole or not at all, whoever else writes it. It is a cache: where it can't be written, that is said, and nothing fails."""
    part = file.with_suffix(f".{platform.node()}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as out:  # with the mode that the umask asks for; safetensors' own file is for its writer alone
            out.write(save({name: values.contiguous() for name, values in found.items()}))
        os.replace(part, file)
    except OSError as error:
        print(f"{file}: not kept: {error}", flush=True)
        with suppress(OSError):
            part.unlink(missing_ok=True)
