"""Questions of MMLU and TruthfulQA made by hand, and their step run on a model: for the tests of multiple choice."""

from pathlib import Path

from tests.support import small_steps

SUBJECTS = {"anatomy": 5, "philosophy": 4, "virology": 7}  # of three groups; unequal, so that weights matter
WORDS = ["river", "cat", "stone", "lamp", "cloud", "horse", "apple", "door"]


def question(i: int, subject: str, answer: int, **more) -> dict:
    text = f" which of these comes after the {WORDS[i % 8]} in the old story of the {WORDS[(3 * i + 1) % 8]}? "
    return {"question": text, "choices": [WORDS[(i + k) % 8] for k in range(4)], "answer": answer, "subject": subject} | more


def truth(i: int, **more) -> dict:
    false = [f"a {word} of {i}" for word in WORDS[: 2 + i % 3]]
    two = {"choices": [f"the {WORDS[i % 8]}", "nobody knows", *false], "labels": [1, 1, *[0] * len(false)]}
    one = {"choices": [f"the {WORDS[i % 8]}", *false], "labels": [1, *[0] * len(false)]}
    return {"question": f"what is behind door {i}", "mc1_targets": one, "mc2_targets": two} | more


MMLU = [
    question(7 * j + i, subject, (i + j) % 4, key=f"{subject}:{i}")
    for j, (subject, n) in enumerate(SUBJECTS.items())
    for i in range(n)
]
MMLU = sorted(MMLU, key=lambda row: row["key"].split(":")[1])  # subjects in turn: the order of a slice means nothing
DEV = [question(50 + i, subject, i % 4, key=f"dev/{subject}:{i}") for i in range(4) for subject in SUBJECTS]
TRUTH = [truth(i, key=f"t:{i}") for i in range(11)]
SHOTS = {"shots": 3, "apply_chat_template": True, "fewshot_as_multiturn": True}


def scored(
    folder: Path, task: str, base: Path, rows: list[dict], solved: list[dict] = DEV, adapter: Path | None = None, **settings
) -> dict:
    """The score file of the step itself."""
    parents = {"prompts": small_steps.write_slice(folder / "data", task, rows, heldout=0), "start": base}
    if settings.get("shots"):
        parents["fewshot"] = small_steps.write_slice(folder / "data", "dev", solved, heldout=0)
    if adapter:
        parents["adapter"] = adapter
    job = small_steps.job("lm_eval_task", folder / f"{task}_x.json", parents, {"task": task, "batch_size": 4} | settings)
    return small_steps.run(job).data
