"""Win rates by a reward model in the config: what `eval.judge` asks for, and its step's JSON. Plans; runs nothing.

All runs are judged by one reward model, that of seed 1, so that their rewards compare.
"""

from workflow_scripts.config.names import JUDGED
from workflow_scripts.config.written import Written


def check(config: Written, experiments: dict[str, dict]) -> None:
    """InputError where `eval.judge` names what can't judge or be compared with. experiments: resolved."""
    body, place = config.data["eval"].get(JUDGED), ["eval", JUDGED]
    if body is None:
        return
    models = [name for name, one in experiments.items() if one["method"] == "rm"]
    if body["reward"] not in models:
        known = ", ".join(models) or "there is none yet"
        raise config.fail([*place, "reward"], f"found {body['reward']!r}, expected a reward model's experiment: {known}")
    answering = [*config.models, *(name for name in experiments if name not in models)]
    if body["against"] not in answering:
        raise config.fail([*place, "against"], f"found {body['against']!r}, expected one of {', '.join(answering)}")


def step_config(body: dict, quant: dict) -> dict:
    """What decides the rewards of a model besides what it judges: how it is loaded, and how much it is given to read.

    body: the resolved experiment of the reward model.
    """
    made = {"quantise": body["quantise"], "batch_size": body["train"]["per_device_eval_batch_size"]}
    made["max_length"] = body["train"]["max_length"]
    return made | ({"quant": quant} if body["quantise"] != "none" else {})
