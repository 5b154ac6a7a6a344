"""Win rates by a reward model in the config: what `eval.judge` asks for, and its step's JSON. Plans; runs nothing.

All runs are judged by one reward model, that of seed 1, so that their rewards compare.
"""

from typing import Any

from workflow_scripts.config.names import JUDGED


def check(config: Any) -> None:
    """InputError where `eval.judge` names what can't judge or be compared with. config: a `Config` with resolved experiments."""
    body, place = config.data["eval"].get(JUDGED), ["eval", JUDGED]
    if body is None:
        return
    models = [name for name, one in config.experiments.items() if one["method"] == "rm"]
    if body["reward"] not in models:
        known = ", ".join(models) or "there is none yet"
        raise config.fail([*place, "reward"], f"found {body['reward']!r}, expected a reward model's experiment: {known}")
    answering = [*config.models, *(name for name in config.experiments if name not in models)]
    if body["against"] not in answering:
        raise config.fail([*place, "against"], f"found {body['against']!r}, expected one of {', '.join(answering)}")


def step_config(config: Any, model: str) -> dict:
    """What decides the rewards of a model besides what it judges: how it is loaded, and how much it is given to read."""
    body = config.experiments[model]
    made = {"quantise": body["quantise"], "batch_size": body["train"]["per_device_eval_batch_size"]}
    made["max_length"] = body["train"]["max_length"]
    return made | ({"quant": config.data["quant"]} if body["quantise"] != "none" else {})
