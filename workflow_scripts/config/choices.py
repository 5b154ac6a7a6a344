"""Multiple choice in the config: what `eval.mmlu` and `eval.truthfulqa` ask for, and their steps' JSON. Plans; runs nothing."""

from workflow_scripts.config.names import CHOICE
from workflow_scripts.config.written import Written

KINDS = ("choice", "truthfulqa")  # of slices whose rows are questions with options


def check(config: Written) -> None:
    """InputError where the blocks of multiple choice, or the slices that they name, ask for what there is not.

    config: with keys that the schema has passed.
    """
    slices, evaluation = config.data["data"]["slices"], config.data["eval"]
    for name, body in slices.items():
        for key in ("heldout", "max_prompt_tokens", "group_by") if body["kind"] in KINDS else ():
            if key in body:
                problem = f"not for rows of kind {body['kind']}: they are taken whole, and nothing trains on them; leave it out"
                raise config.fail(["data", "slices", name, key], problem)
    if "mmlu" not in evaluation:
        return
    body, place = evaluation["mmlu"], ["eval", "mmlu"]
    wanted = {"fewshot": body["shots"] > 0, "fewshot_as_multiturn": body["shots"] > 0 and body["apply_chat_template"]}
    for key, needed in wanted.items():
        if needed and key not in body:
            what = "the slice of the solved examples" if key == "fewshot" else "whether each of them is a turn of its own"
            raise config.fail([*place, key], f"missing, and it has no default: {what}; shots is {body['shots']}")
        if key in body and not needed:
            why = "shots is 0" if body["shots"] == 0 else "apply_chat_template is false"
            raise config.fail([*place, key], f"{why}, so it decides nothing; leave it out")
    if "fewshot" not in body:
        return
    shots = slices.get(body["fewshot"], {})
    if shots.get("kind") != "choice":
        raise config.fail([*place, "fewshot"], f"found {body['fewshot']!r}, expected a slice of kind choice")
    if body["fewshot"] == body["prompts"]:
        problem = f"found {body['fewshot']!r}, which is asked as well: questions would come with their own answers"
        raise config.fail([*place, "fewshot"], problem)
    if shots["source"].get("shuffle_buffer", 1) > 1:
        problem = (
            f"found {shots['source']['shuffle_buffer']}, expected 1: a subject's examples are its first rows, in their order"
        )
        raise config.fail(["data", "slices", body["fewshot"], "source", "shuffle_buffer"], problem)


def fewshot(evaluation: dict, task: str) -> str | None:
    """The slice of a task's solved examples, if it has any."""
    return evaluation[task].get("fewshot") if task in CHOICE else None


def step_config(evaluation: dict, task: str) -> dict:
    """What of the task's block decides the outcome; its slices are parents."""
    return {"task": task, **{key: value for key, value in evaluation[task].items() if key not in ("prompts", "fewshot")}}
