"""`gpus: N`: one training over several GPUs (training/over_ranks.py), and why some can't. `shard: true`: they share its base too
(training/sharded.py), so that one fits which no card holds alone.

Neither decides a number beyond the order of sums, as `speed` does: they stand beside the resolved experiments and not in them, so
that no step and no comparison sees them.
"""

from workflow_scripts.config.written import Written

ALONE = {"ppo": "its policy and its value are two backward passes on two adapters, which would need an exchange of their own"}
DRAWS = ("ppo", "grpo", "rloo")


def apart(config: Written, experiments: dict[str, dict]) -> tuple[dict[str, dict], dict[str, int], dict[str, int]]:
    """(the resolved experiments without the keys, GPUs of each one, parts in which its base lies on them: 1 where it is whole on
    each). InputError where they can't share its micro-batches, or its base."""
    found = {name: body.get("gpus", 1) for name, body in experiments.items()}
    parts = {name: found[name] if body.get("shard") else 1 for name, body in experiments.items()}
    for name, count in found.items():
        body = experiments[name]
        if body.get("shard") and (reason := _hinders_sharding(name, body, count)):
            raise config.fail(config.place(name, ["shard"]), f"found true, but {reason}")
        if count == 1:
            continue
        if reason := ALONE.get(body["method"]):
            raise config.fail(config.place(name, ["gpus"]), f"found {count}, but {body['method']} trains on one GPU: {reason}")
        steps = body["train"]["gradient_accumulation_steps"]
        if steps % count:
            fitting = ", ".join(str(number) for number in range(1, steps + 1) if steps % number == 0)
            raise config.fail(
                config.place(name, ["gpus"]),
                f"found {count}, but the {steps} micro-batches of a step (train.gradient_accumulation_steps) are shared out, so "
                f"that the effective batch stays; take {fitting}"
                + (", or smaller micro-batches and more of them" if steps < count else ""),
            )
    kept = {name: {key: body[key] for key in body if key not in ("gpus", "shard")} for name, body in experiments.items()}
    return kept, found, parts


def can_share_base(body: dict) -> bool:
    """Whether a resolved experiment could have `shard: true`, with enough GPUs."""
    return _hinders_sharding("", body, 2) is None


def _hinders_sharding(name: str, body: dict, count: int) -> str | None:
    if body["method"] in DRAWS:
        return f"{body['method']} draws its answers with the weights of the whole base; leave it away"
    if body["quantise"] != "none":
        return f"the base of {name} is in 4-bit, which is not shared out; set quantise: none, or shard: false for {name}"
    return f"{name} has one GPU, on which all of the base lies; set gpus: 2 or more" if count == 1 else None
