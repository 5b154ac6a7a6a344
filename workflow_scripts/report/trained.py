"""Did a method train at all? From one adapter's manifest, by the method's own objective on held-out rows."""

from typing import Any

from workflow_scripts.config.names import REFERENCE_FREE
from workflow_scripts.plumbing.messages import InputError

UP, DOWN = "up", "down"
# Method -> its objective and which way is good. The loss of DPO, KTO and RM is left out: accuracy and margin say the same in
# terms that compare, whatever the loss type. DPO and KTO need both: before training policy and reference are one, every pair is
# a tie and a tie counts as wrong, so that any change at all, even rounding, moves the accuracy up; the margin it does not move.
# Without a reference pairs are ordered from the start, and the accuracy moves by those few that cross: the margin alone is asked.
OBJECTIVES: dict[str, dict[str, str]] = {
    "sft": {"loss": DOWN},
    "dpo": {"accuracy": UP, "margin": UP},
    "kto": {"accuracy": UP, "margin": UP},
    **dict.fromkeys(REFERENCE_FREE, {"margin": UP}),
    "rm": {"accuracy": UP, "margin": UP},
    "ppo": {"reward": UP},
    "grpo": {"reward": UP},
    "rloo": {"reward": UP},
}
# A control that trained on flipped labels has to go the other way on held-out rows, whose labels are right. By the margin alone:
# from nothing but ties, accuracy can only rise.
FLIPPED = {"margin": DOWN}
# What an interval on both sides of 0 says is less than "did not train": a change may be there, and too small for so few rows.
TRAINED, NOT_SEEN, WRONG_WAY, UNKNOWN = "trained", "no change that its held-out rows show", "moved the wrong way", "not known"
PLACEBO = "a placebo: nothing has to move"
OTHER_WAY, SAME_WAY = "moved the other way, as it should", "moved the good way, in spite of its flipped labels"


def trained(manifest: dict[str, Any]) -> dict[str, Any]:
    """`method`; `values`, one entry for each value of its objective; `trained`: True, False, or None; `verdict`, in words.

    An entry: `name`, `good` (up | down; for flipped labels the way that it has to go), `before`, `after`, `change`, `interval`
    (95 %, of the change), `moved`: whether all of the interval lies on the good side of 0, and `wrong`: on the other side. A
    method trained if all its values moved. `change` is None where the manifest has none, and `interval`, `moved` and `wrong`
    where it has no standard error (manifests from before there was one; a single unit).
    InputError if it is no adapter's manifest.
    """
    try:
        config, objective = manifest["step"]["config"], manifest["objective"]
        method, flipped = config["method"], bool(config.get("flip_labels"))
        before, after, goods = objective["before"], objective["after"], FLIPPED if flipped else OBJECTIVES[method]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"a manifest of kind {manifest.get('kind')!r}: expected an adapter's, with the objective of its method ({error}); "
            "give results/<experiment>/adapter/manifest.json"
        ) from error
    values = []
    for name, good in goods.items():
        if before.get(name) is None or after.get(name) is None:
            continue  # KTO on unpaired rows has no pairs to order
        change = objective.get("change", {}).get(name)
        interval = None if change is None else interval_of(**change)
        moved = wrong = None
        if interval is not None:
            up, down = interval[0] > 0, interval[1] < 0
            moved, wrong = (up, down) if good == UP else (down, up)
        values.append(
            {"name": name, "good": good, "before": before[name], "after": after[name]}
            | {"change": None if change is None else change["mean"], "interval": interval, "moved": moved, "wrong": wrong}
        )
    verdicts = [value["moved"] for value in values]
    told = False if False in verdicts else None if None in verdicts or not values else True
    if told is False:
        verdict = (SAME_WAY if flipped else WRONG_WAY) if any(value["wrong"] for value in values) else NOT_SEEN
    else:
        verdict = UNKNOWN if told is None else OTHER_WAY if flipped else TRAINED
    if "placebo" in config:
        told, verdict = None, PLACEBO
    return {"method": method, "values": values, "trained": told, "verdict": verdict}


def interval_of(mean: float, stderr: float | None, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a mean of n units, by Student's t with n - 1 degrees of freedom; None without a standard error."""
    if stderr is None or n < 2:
        return None
    from scipy.stats import t

    reach = float(t.ppf(0.975, n - 1)) * stderr
    return mean - reach, mean + reach
