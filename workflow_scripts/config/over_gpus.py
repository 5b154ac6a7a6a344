"""`gpus: N`: one training over several GPUs (training/over_ranks.py), and why some can't. `shard: true`: they share its base too
(training/sharded.py), so that one fits which no card holds alone. `nodes: M`: they are in so many nodes of a Slurm.

None decides a number beyond the order of sums, as `speed` does: they stand beside the resolved experiments and not in them, so
that no step and no comparison sees them.
"""

from dataclasses import dataclass

from workflow_scripts.config.written import Written

ALONE = {"ppo": "its policy and its value are two backward passes on two adapters, which would need an exchange of their own"}
KEYS = ("gpus", "shard", "nodes")
DRAWS = ("ppo", "grpo", "rloo")
IN_ONE_ORDER = 2  # cards, at most, whose numbers NCCL adds up in one order


@dataclass
class Several:
    """Of each experiment: its GPUs; in how many parts its base lies on them, 1 where it is whole on each; their nodes."""

    gpus: dict[str, int]
    parts: dict[str, int]
    nodes: dict[str, int]


def apart(config: Written, experiments: dict[str, dict]) -> tuple[dict[str, dict], Several]:
    """(the resolved experiments without the keys, what these say). InputError where GPUs can't share the micro-batches of one, or
    its base, or nodes its GPUs."""
    found = {name: body.get("gpus", 1) for name, body in experiments.items()}
    parts = {name: found[name] if body.get("shard") else 1 for name, body in experiments.items()}
    nodes = {name: body.get("nodes", 1) for name, body in experiments.items()}
    for name, count in found.items():
        body = experiments[name]
        if count % nodes[name]:
            said = f"found {nodes[name]}, but {name} has {count} GPUs (gpus), which so many nodes can't share evenly"
            raise config.fail(config.place(name, ["nodes"]), said)
        if body.get("shard") and (reason := _hinders_sharding(name, body, count)):
            raise config.fail(config.place(name, ["shard"]), f"found true, but {reason}")
        if count == 1:
            continue
        if reason := ALONE.get(body["method"]):
            raise config.fail(config.place(name, ["gpus"]), f"found {count}, but {body['method']} trains on one GPU: {reason}")
        if count > IN_ONE_ORDER and config.data["deterministic"]:
            raise config.fail(
                config.place(name, ["gpus"]),
                f"found {count} with deterministic: true; NCCL may add up those of more than two cards in any order: "
                "take 1 or 2, or deterministic: false",
            )
        steps = body["train"]["gradient_accumulation_steps"]
        if steps % count:
            fitting = ", ".join(str(number) for number in range(1, steps + 1) if steps % number == 0)
            raise config.fail(
                config.place(name, ["gpus"]),
                f"found {count}, but the {steps} micro-batches of a step (train.gradient_accumulation_steps) are shared out, so "
                f"that the effective batch stays; take {fitting}"
                + (", or smaller micro-batches and more of them" if steps < count else ""),
            )
    kept = {name: {key: body[key] for key in body if key not in KEYS} for name, body in experiments.items()}
    return kept, Several(found, parts, nodes)


def can_share_base(body: dict) -> bool:
    """Whether a resolved experiment could have `shard: true`, with enough GPUs."""
    return _hinders_sharding("", body, 2) is None


def _hinders_sharding(name: str, body: dict, count: int) -> str | None:
    if body["method"] in DRAWS:
        return f"{body['method']} draws its answers with the weights of the whole base; leave it away"
    if body["quantise"] != "none":
        return f"the base of {name} is in 4-bit, which is not shared out; set quantise: none, or shard: false for {name}"
    return f"{name} has one GPU, on which all of the base lies; set gpus: 2 or more" if count == 1 else None
