"""What the trainers share: arguments that are not the method's, progress, the held-out objective, and the saved artifact."""

import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.artifacts.manifests import Artifact, Draft, Job
from workflow_scripts.data.fitting import fitting
from workflow_scripts.models import chat, distance, lora
from workflow_scripts.plumbing import ranks
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.plumbing.progress import Progress
from workflow_scripts.training import checkpoints, over_ranks, speed, units
from workflow_scripts.training.change import Units, changes
from workflow_scripts.training.groups import InGroups

# Measurements of time: they go to run.json, not into a manifest or a curve that two equal runs share.
CLOCK = ("runtime", "per_second", "total_flos", "preparation_time", "step_time")
SINCE_RESUME = ("train_loss",)  # transformers' mean over the steps since the last resume: no figure of the run

Measured = tuple[dict[str, Any], Units]  # the held-out objective: its values, and the units of each one that is a mean over units


def arguments(job: Job) -> dict[str, Any]:
    """TrainingArguments that no experiment may choose: seed, precision, device, optimiser, and where things go."""
    step = job.step
    return {
        "output_dir": str(job.work / fingerprint(step) / "trainer"),
        "seed": step["seed"],
        "data_seed": step["seed"],
        "use_cpu": step["device"] == "cpu",
        "bf16": step["precision"] == "bf16",
        "fp16": step["precision"] == "fp16",
        "optim": job.config["optim"],
        "save_strategy": "no",  # training/checkpoints.py says when
        "eval_strategy": "no",
        "logging_strategy": "steps",
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": job.track if ranks.first() else "none",
        "run_name": job.run,
        "dataloader_num_workers": 0,
    }


def rows_of(rows: Artifact, heldout: bool, fields: tuple[str, ...]) -> Any:
    """The rows of a slice as a data set: `fields` for the trainer, and `id`, which TRL carries along unread (`check_rows`)."""
    return data_set([{key: row[key] for key in ("id", *fields)} for row in usable(rows, heldout)])


def usable(rows: Artifact, heldout: bool) -> list[dict]:
    """The rows of a slice that are trained on, or those kept from training. InputError if there are none."""
    found = rows.rows(heldout)
    if not found:
        which = "held-out rows; without them nothing shows whether the method trained" if heldout else "rows to train on"
        raise InputError(f"{rows.path}: has no {which}; change `rows` or `heldout` of this slice")
    return found


def whole(tokenizer: Any, rows: Artifact, config: dict) -> tuple[dict[bool, list[dict]], dict]:
    """The usable rows of preferences that `max_length` cuts nothing of (data/fitting.py), held-out ones under True; facts."""
    found = {heldout: usable(rows, heldout) for heldout in (False, True)}
    return fitting(tokenizer, found, config["train"]["max_length"], config["max_left_out"], str(rows.path))


def pairs(short: dict[bool, list[dict]], config: dict) -> tuple[Any, Any]:
    """`whole` pairs as data sets, to train on and held out; `flip_labels` makes those to train on prefer the worse answer.

    Held-out pairs stay as they are: on them the objective has to go the wrong way.
    """
    fields = ("id", "prompt", "chosen", "rejected")
    train, heldout = (data_set([{key: row[key] for key in fields} for row in short[held]]) for held in (False, True))
    if config.get("flip_labels"):
        train = train.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    return train, heldout


def data_set(rows: list[dict]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def check_rows(trainer: Any, given: tuple[Any, Any], rows: Artifact) -> None:
    """InputError if a row that was given did not get into the trainer.

    TRL drops rows whose prompt alone fills `max_length` without a word; two experiments of one slice would then train on
    different rows.
    """
    for wanted, dataset in zip(given, (trainer.train_dataset, trainer.eval_dataset), strict=True):
        if "id" not in dataset.column_names:  # packed: the rows are joined, none is dropped
            continue
        kept = set(dataset["id"])
        if lost := [one for one in wanted["id"] if one not in kept]:
            raise InputError(
                f"{rows.path}: row {lost[0]} and {len(lost) - 1} more have a prompt that alone fills train.max_length "
                f"({trainer.args.max_length} tokens), so nothing is left to train on; raise it, or lower data.max_prompt_tokens"
            )


def settle(
    trainer: Any, job: Job, tokenizer: Any, given: tuple[Any, Any], rows: Artifact, dropout: bool = True, mask: bool = True
) -> dict:
    """Make a built trainer what the comparison needs, and assert it. Returns what was asserted, for the manifest.

    Every row of `given`, the data sets for training and for the held-out objective, is there; each batch's loss mask is
    checked (`mask`: where a batch has one); the adapter is fp32 with the start of its seed; dropout (off only where `dropout`
    says so), optimiser and precision are the declared ones. The log is left to `Watch`.
    """
    trainer.remove_callback(PrinterCallback)
    check_rows(trainer, given, rows)
    check_rollout(trainer, rows)
    check_context(trainer, job, tokenizer, given)
    if mask:
        trainer.data_collator = chat.MaskCheck(trainer.data_collator, chat.end_of_turn(tokenizer), trainer.args.max_length)
    lora.settle(trainer, job.step["seed"])
    facts = lora.check_trainer(trainer, job.config["lora"], job.config["optim"], dropout)
    trainer.speed = speed.settle(trainer, job)
    over_ranks.settle(trainer, job)
    return facts


def check_rollout(trainer: Any, rows: Artifact) -> None:
    """InputError if there are fewer rows than one rollout has prompts: TRL would train no step, without a word."""
    args = trainer.args
    if (answers := getattr(args, "generation_batch_size", None)) is None:
        return
    prompts, there = answers // args.num_generations, len(trainer.train_dataset)
    if prompts > there:
        raise InputError(
            f"{rows.path}: {there} rows to train on, but one rollout takes {prompts} prompts; take more rows, or lower "
            "train.per_device_train_batch_size, or how many batches a rollout has"
        )


def longest_prompt(tokenizer: Any, given: tuple[Any, Any]) -> int:
    """Tokens of the longest prompt among the rows trained on and those held out."""
    prompts = [prompt for dataset in given for prompt in dataset["prompt"]]
    return max(len(tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]) for one in prompts)


def check_context(trainer: Any, job: Job, tokenizer: Any, given: tuple[Any, Any]) -> None:
    """InputError if a sequence could be longer than the model's context. Rollouts: the longest prompt plus what is generated."""
    context = getattr(trainer.model.config, "max_position_embeddings", None)
    train, place = job.config["train"], f"methods.{job.config['method']}.train"
    if "max_completion_length" in train:
        longest = longest_prompt(tokenizer, given)
        needed, key = longest + train["max_completion_length"], "max_completion_length"
        found = f"found {train[key]}, and the longest prompt has {longest} tokens"
    else:
        needed, key = train["max_length"], "max_length"
        found = f"found {needed}"
    if context is not None and needed > context:
        raise InputError(
            f"{place}.{key}: {found}, but the model's context is {context} tokens; lower it (and data.max_prompt_tokens below it)"
        )


class Watch(TrainerCallback):
    """Shows progress and stops at the first logged loss that is not a number."""

    def __init__(self, label: str):
        self.label, self.note = label, ""
        self.progress: Progress | None = None
        self.ends: list[float] = []  # of the steps since the start or the last resume

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.monotonic())
        self.progress = self.progress or Progress(state.max_steps, self.label)
        self.progress.step(state.global_step, self.note)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in ("loss", "train_loss", "eval_loss"):
            value = (logs or {}).get(key)
            if value is None:
                continue
            self.note = f"reward {logs['reward']:.4f}" if logs and "reward" in logs else f"loss {value:.4f}"
            if not math.isfinite(value):
                raise InputError(
                    f"{self.label}: {key} is {value} at step {state.global_step}; lower the learning rate, or check the data"
                )

    def on_train_end(self, args, state, control, **kwargs):
        if self.progress is not None:
            self.progress.close()


def fit(trainer: Any, job: Job, measure: Callable[[], Measured]) -> dict:
    """Train, from the step's last checkpoint where there is one.

    Returns the objective before and after, and its change with a standard error, and how far the adapter takes the model, for
    the manifest.
    """
    args = trainer.args
    # Micro-steps on one set of sampled answers; without rollouts, 1: every step can be resumed from.
    rollout = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
    boundary = rollout // math.gcd(rollout, args.gradient_accumulation_steps)
    trainer.beside = {"held_out_seconds": 0.0}

    def timed() -> Measured:
        start = time.monotonic()
        found = measure()
        trainer.beside["held_out_seconds"] += time.monotonic() - start
        return found

    before, after = checkpoints.train(trainer, fingerprint(job.step), job.checkpoint_minutes, boundary, timed)
    over_ranks.check_equal(trainer)
    found: dict[str, Any] = {"before": before[0], "after": after[0], "change": changes(before[1], after[1])}
    start = time.monotonic()
    with trainer.accelerator.autocast():
        far = distance.of_training(trainer.model, trainer.processing_class, job.parents()["rows"])
    trainer.beside["distance_seconds"] = time.monotonic() - start
    return {"objective": found, "adapter_moved": changed(trainer), "distance": far}


def objective(trainer: Any, keys: dict[str, str]) -> Measured:
    """The method's own objective on the held-out rows: our name -> value, from the trainer's `eval_` metrics by `keys`.

    A value is the mean of its units (training/units.py). Losses of pairs, and of KTO's groups, count one by one in any batch
    of whole ones (training/groups.py). The others' batches get one size, so that TRL's means over batches weigh rows (or
    sampled answers) equally: the largest that is no larger than the config's, divides them, and holds whole groups.
    """
    args = trainer.args
    group: Any = getattr(args, "num_generations_eval", None) or getattr(trainer, "kl_rows", 1)
    size, rows = args.per_device_eval_batch_size, len(trainer.eval_dataset) * group
    sizes = range(group, max(size, group) + 1, group)
    args.per_device_eval_batch_size = max(n for n in sizes if isinstance(trainer, InGroups) or rows % n == 0)
    with units.kept(trainer) as found:
        trainer.evaluate()
    args.per_device_eval_batch_size = size
    return {name: round(fmean(found[key]), 6) for name, key in keys.items()}, {name: found[key] for name, key in keys.items()}


def save(trainer: Any, draft: Draft, job: Job, start: Artifact, facts: dict) -> None:
    """Write adapter, curves and facts into the draft of an artifact."""
    import json

    import pandas

    adapter = trainer.accelerator.unwrap_model(trainer.model)
    adapter.peft_config["default"].base_model_name_or_path = str(start.folder)
    adapter.save_pretrained(draft.folder, safe_serialization=True, selected_adapters=["default"])
    (draft.folder / "README.md").unlink(missing_ok=True)  # peft's card says nothing of this run
    config_file = draft.folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set in peft: its order would change with the process
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    history = [
        {key: value for key, value in row.items() if key not in SINCE_RESUME and not any(word in key for word in CLOCK)}
        for row in trainer.state.log_history
    ]
    curves = pandas.DataFrame(history)  # in an order of ours: a resumed run reads its columns back in another one
    columns = ["step", "epoch", *sorted(set(curves.columns) - {"step", "epoch"})]
    curves[columns].to_csv(draft.folder / "metrics.csv", index=False)
    draft.manifest |= {"base": {"path": str(start.folder), "weights_sha256": start.weights_sha256}, **facts}
    timing = {
        k: v
        for row in trainer.state.log_history
        for k, v in row.items()
        if k.startswith("train_") and any(word in k for word in CLOCK)
    }
    draft.run |= {
        "rows": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen or getattr(trainer, "_total_train_tokens", None),
        "timing": timing | {"step_seconds_median": steady(trainer)} | {key: round(s, 2) for key, s in trainer.beside.items()},
        "speed": speed.described(trainer),
        "trl_config": {k: v for k, v in trainer.args.to_dict().items() if k not in ("output_dir", "logging_dir")},
    }
    lora.check_optimizer_state(trainer)


def steady(trainer: Any) -> float | None:
    """Median seconds of a step, between the ends of two: without what the first one waits for."""
    ends = next(one.ends for one in trainer.callback_handler.callbacks if isinstance(one, Watch))
    return round(median(b - a for a, b in pairwise(ends)), 4) if len(ends) > 1 else None


def changed(trainer: Any) -> float:
    """Share of the adapter's B matrices (zero at the start) that moved: 1.0 where all of the adapter trains."""
    import torch

    matrices = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.requires_grad]
    return sum(bool(torch.any(p != 0)) for p in matrices) / len(matrices)
