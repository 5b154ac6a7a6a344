"""`gpus: N`: one training over several GPUs (training/over_ranks.py), and why some can't.

N decides no number beyond the order of sums, as `speed` does: it stands beside the resolved experiments and not in them, so that
no step and no comparison sees it.
"""

from workflow_scripts.config.written import Written

ALONE = {"ppo": "its policy and its value are two backward passes on two adapters, which would need an exchange of their own"}


def apart(config: Written, experiments: dict[str, dict]) -> tuple[dict[str, dict], dict[str, int]]:
    """(the resolved experiments without the key, GPUs of each one). InputError where they can't share its micro-batches."""
    found = {name: body.get("gpus", 1) for name, body in experiments.items()}
    for name, count in found.items():
        body = experiments[name]
        if count == 1:
            continue
        if reason := ALONE.get(body["method"]):
            raise config.fail(config.place(name, ["gpus"]), f"found {count}, but {body['method']} trains on one GPU: {reason}")
        if count > 2 and config.data["deterministic"]:
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
    return {name: {key: body[key] for key in body if key != "gpus"} for name, body in experiments.items()}, found
