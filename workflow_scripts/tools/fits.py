"""What fits on which GPU, and on which disk, before either is taken. From the config alone: no GPU, no model, no torch.

    python -m workflow_scripts.tools.fits [--configfile F...] [--gpu GB] [--json]        (make fits)

One line for each phase: the peak of what torch allocates, in GiB, for the longest rows that the config lets through; when it is
reached; and the cards that have room for it and for a reserve (the CUDA context, the allocator's waste: plan/gpu_memory.py).
Then, for each card on which something does not fit, the keys to change: of the experiment, or of its method for all its
experiments, so that they stay comparable. The effective batch stays, and so do the groups of KTO's KL estimate, which are part
of the method. Not without consequence are the last resorts: `quantise: nf4` is another variant of a method,
`max_prompt_tokens` drops rows, `eval.batch_size` (of the backend `hf`) is one for all scores; `generation.slots` decides no
answer. Where `nf4` would be the way out, a line says how many cards have room for the base in parts (`gpus`, `shard`), which
changes no number. `--gpu 16` asks about one card, and ends with exit status 1 if something does not fit on it.
"""

import argparse
import copy
import json
import math

from workflow_scripts.config import config as configs
from workflow_scripts.config.names import answered
from workflow_scripts.config.over_gpus import IN_ONE_ORDER, can_share_base
from workflow_scripts.data.unpaired import kl_rows
from workflow_scripts.plan.estimate import Estimates
from workflow_scripts.plan.gpu_memory import CARDS, GIB, Memory, Phase, fits, need
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import runs

SHARED_BY = (2, 4, 8, 16)  # cards that a base may lie on
LEAST_PROMPT = 128  # tokens; below it no advice


def remedy(memory: Memory, phase: Phase, card: float) -> tuple[dict[str, object], float] | None:
    """(keys to change, the peak then) that make a phase fit on a card of so many GB; None if none of these does."""
    if phase.kind in ("generate", "sample"):
        config, evaluates = memory.config, phase.kind == "generate"
        size = config.at_once() if evaluates else config.sampled_at_once()
        again = memory.generate if evaluates else memory.samples
        while not fits(phase.peak, card):
            if size == 1:
                return None
            size //= 2
            phase = again(phase.name, size)
        graphs = (config.generation()["backend"] if evaluates else config.data["generation"]["rollouts"]) == "graphs"
        key = "generation.slots" if graphs else "eval.batch_size"
        return {key: size}, phase.peak
    if phase.kind == "choose":  # a batch of its own, which decides no more than rounding
        return None
    body = copy.deepcopy(memory.config.experiments[phase.name])
    changes: dict[str, object] = {}
    made = memory.train if phase.kind == "train" else memory.eval_rm
    while not fits(phase.peak, card):
        if not (moved := _move(memory, phase.stage, body)):
            return None
        changes |= moved
        phase = made(phase.name, body)
    return changes, phase.peak


def in_parts(memory: Memory, phase: Phase, card: float) -> tuple[dict[str, object], float] | None:
    """As `remedy`, for a training in full precision over cards that share its base, as few as have room; `quantise` stays."""
    body = copy.deepcopy(memory.config.experiments[phase.name]) if phase.kind == "train" else {}
    if not body or not can_share_base(body):
        return None
    changes: dict[str, object] = {}
    counts = [count for count in SHARED_BY if count <= IN_ONE_ORDER or not memory.config.data["deterministic"]]
    while True:
        for count in counts:
            made = memory.train(phase.name, body | {"parts": count})
            if body["train"]["gradient_accumulation_steps"] % count == 0 and fits(made.peak, card):
                return changes | {"gpus": count, "shard": True}, made.peak
        moved = _move(memory, made.stage, body)
        if not moved or "quantise" in moved:
            return None
        changes |= moved


def _move(memory: Memory, stage: str, body: dict) -> dict[str, object]:
    """The next change to a resolved experiment that lowers a stage's peak, made in it: key -> value. Empty if there is none."""
    train, method = body["train"], body["method"]
    size, each = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
    together = kl_rows(body) if method == "kto" else 1
    group = train.get("num_generations_eval", together)
    changed: dict[str, object] = {}
    if stage in ("objective", "scoring") and (judged := train["per_device_eval_batch_size"] // 2 // group * group):
        changed = {"per_device_eval_batch_size": judged}
    elif stage in ("step", "value step") and not train["gradient_checkpointing"]:
        changed = {"gradient_checkpointing": True}
    elif stage in ("step", "value step") and size % (2 * together) == 0:
        changed = {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": 2 * each}
        if "steps_per_generation" in train:
            changed["steps_per_generation"] = 2 * train["steps_per_generation"]
    elif stage == "rollout" and method in ("grpo", "rloo"):  # groups are compared within themselves, whenever they are drawn
        steps = train.get("steps_per_generation", each)
        whole = steps % 2 == 0 and (steps // 2 * size) % train["num_generations"] == 0
        if whole and steps * size > train["per_device_eval_batch_size"]:
            changed = {"steps_per_generation": steps // 2}
    if changed:
        train.update(changed)
        return {f"train.{key}": value for key, value in changed.items()}
    if stage in ("rollout", "rewards") and (prompt := memory.prompt(body) // 2) >= LEAST_PROMPT:
        body["max_prompt_tokens"] = prompt
        return {f"data.slices.{body['slice']}.max_prompt_tokens": prompt}
    if body["quantise"] == "none":
        body["quantise"] = "nf4"
        return {"quantise": "nf4"}
    return {}


def advice(memory: Memory, phases: list[Phase], card: float) -> list[str]:
    """A line for each way out, with the phases that it is for; phases for which there is none come last."""
    ways: dict[str, list[Phase]] = {}
    for phase in phases:
        if fits(phase.peak, card):
            continue
        found, parts = remedy(memory, phase, card), None
        if found is None or "quantise" in found[0]:  # which is another variant; more cards are none
            parts = in_parts(memory, phase, card)
        if found is None and parts is not None:
            found, parts = parts, None
        if found is None:
            larger = next((f"{one} GB" for one in CARDS if fits(phase.peak, one)), "more than any of these has")
            why = f"{phase.stage}: no key makes it fit; it needs {larger}"
        else:
            why = _changed(*found) + (f"; or {_changed(*parts)} on each" if parts else "")
        ways.setdefault(why, []).append(phase)
    order = sorted(ways, key=lambda why: "no key" in why)
    return [f"{', '.join(f'{phase.kind} {phase.name}' for phase in ways[why])}: {why}" for why in order]


def _changed(changes: dict[str, object], peak: float) -> str:
    return f"{', '.join(f'{key}: {str(value).lower()}' for key, value in changes.items())}; then {peak / GIB:.1f} GiB"


def disk(plan: Plan, memory: Memory) -> dict[str, float]:
    """GB that all seeds of a plan take, by what takes them. Merges that other runs start from; any other is made on demand."""
    data, estimates = plan.config.data, Estimates(plan)
    base = data["base"]
    weights = memory.shape.parameters * (2 if base.get("dtype") == "bf16" else 4)
    starts = {plan.start_run(run) for run in plan.runs()} - {"base"}
    trained = [phase.trainable for phase in memory.phases() if phase.kind == "train"]
    answers = sum(estimates.of(f"generate_{task}", "base")["disk_mb"] for task in answered(plan.config.asked)) * (
        1 + len(plan.runs())
    )
    rows = sum(estimates.of("slice", name)["disk_mb"] for name in data["data"]["slices"] if not plan.is_sampled(name))
    own = plan.sampled_slices(data["seeds"])
    rows += sum(estimates.of(kind, name.partition(".")[0])["disk_mb"] for name in own for kind in ("samples", "slice"))
    found = {
        "base": weights * len(plan.config.models),
        "merged": 4 * memory.shape.parameters * len(starts),  # in fp32, unless the base's dtype keeps the update
        "adapters": 4 * sum(memory.adapter_of(plan.experiment(run)) for run in plan.runs()),
        "checkpoints": 2 * 12 * max(trained),  # two of a training: weights and both moments
        "rows and answers": 1e6 * (rows + answers),
        "put in place": 4 * memory.shape.parameters,  # what is written stands twice until it is complete
    }
    if fetched := sum(body["source"] == "hub" for body in plan.config.models.values()):
        found["hub's cache"] = weights * fetched
    return {name: size / 1e9 for name, size in found.items()}


def table(phases: list[Phase], cards: list[float], of: dict[str, int], parts: dict[str, int]) -> str:
    """of: experiment -> GPUs of its training, each of which needs the peak; parts: in how many its base lies on them."""
    rows = [["phase", "peak GiB", "at", *(f"{card:g} GB" for card in cards)]]
    for phase in phases:
        marks = ["yes" if fits(phase.peak, card) else "no" for card in cards]
        several = f" (each of {of[phase.name]})" if phase.kind == "train" and of[phase.name] > 1 else ""
        several += ", base in parts" if phase.kind == "train" and parts[phase.name] > 1 else ""
        rows.append([f"{phase.kind} {phase.name}{several}", f"{phase.peak / GIB:.1f}", phase.stage, *marks])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", nargs="+", default=["config/config.yaml"], help="as given to snakemake")
    parser.add_argument("--gpu", type=positive, metavar="GB", help="one card's memory, as it is named: 16, 24, 40, 80, 141")
    parser.add_argument("--json", action="store_true", help="the same as JSON: bytes")
    args = parser.parse_args()
    plan = Plan(configs.load(*args.configfile))
    memory = Memory(plan.config)
    phases, cards = memory.phases(), [args.gpu] if args.gpu else [float(card) for card in CARDS]
    lines = {card: advice(memory, phases, card) for card in cards}
    found = disk(plan, memory)
    if args.json:
        shown = []
        for one in phases:
            sizes = {"peak": round(one.peak), "need": round(need(one.peak)), "trainable": one.trainable}
            stages = {name: round(size) for name, size in one.stages.items()}
            room = [card for card in cards if fits(one.peak, card)]
            shown.append({"phase": f"{one.kind} {one.name}", **sizes, "stages": stages, "fits": room})
        print(json.dumps({"phases": shown, "advice": {f"{card:g}": lines[card] for card in cards}, "disk_gb": found}, indent=1))
    else:
        if plan.config.data["device"] == "cpu":
            print("device: cpu, so nothing here takes a GPU; on one it would be:")
        print(table(phases, cards, plan.config.gpus, plan.config.parts))
        for card in cards:
            for line in lines[card]:
                print(f"{card:g} GB: {line}")
        largest = sorted(found.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {size:.1f}" for name, size in largest if size >= 0.05)
        print(f"disk: {sum(found.values()):.1f} GB" + (f" ({parts})" if parts else ""))
    if args.gpu and lines[args.gpu]:
        raise SystemExit(1)


if __name__ == "__main__":
    runs.command(main)
