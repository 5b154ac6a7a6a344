"""Did a method train at all? From one adapter's manifest, by the method's own objective on held-out rows."""

from typing import Any

from workflow_scripts.plumbing.messages import InputError

UP, DOWN = "up", "down"
# Method -> its objective and which way is good. The loss of DPO, KTO and RM is left out: accuracy and margin say the same in
# terms that compare, whatever the loss type. DPO and KTO need both: before training policy and reference are one, every pair is
# a tie and a tie counts as wrong, so that any change at all, even rounding, moves the accuracy up; the margin it does not move.
OBJECTIVES: dict[str, dict[str, str]] = {
    "sft": {"loss": DOWN},
    "dpo": {"accuracy": UP, "margin": UP},
    "kto": {"accuracy": UP, "margin": UP},
    "rm": {"accuracy": UP, "margin": UP},
    "ppo": {"reward": UP},
    "grpo": {"reward": UP},
    "rloo": {"reward": UP},
}
# A control that trained on flipped labels has to go the other way on held-out rows, whose labels are right. By the margin alone:
# from nothing but ties, accuracy can only rise.
FLIPPED = {"margin": DOWN}
TRAINED, NOT_TRAINED, UNKNOWN = "trained", "did not train with these settings", "not known"
OTHER_WAY, NOT_OTHER_WAY = "moved the other way, as it should", "did not move the other way, as flipped labels should"


def in_words(moved: bool | None, flipped: bool) -> str:
    return {True: OTHER_WAY if flipped else TRAINED, False: NOT_OTHER_WAY if flipped else NOT_TRAINED, None: UNKNOWN}[moved]


def trained(manifest: dict[str, Any]) -> dict[str, Any]:
    """`method`; `flipped`: whether its labels are; `values`, one entry for each value of its objective; `trained`: True, False,
    or None; `verdict`, that in words.

    An entry: `name`, `good` (up | down; for flipped labels the way that it has to go), `before`, `after`, `change`, `interval`
    (95 %, of the change) and `moved`: whether all of the interval lies on the good side of 0. A method trained if all its values
    moved. `change` is None where the manifest has none, and `interval` and `moved` where it has no standard error (manifests from
    before there was one; a single unit).
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
        moved = None if interval is None else interval[0] > 0 if good == UP else interval[1] < 0
        values.append(
            {"name": name, "good": good, "before": before[name], "after": after[name]}
            | {"change": None if change is None else change["mean"], "interval": interval, "moved": moved}
        )
    verdicts = [value["moved"] for value in values]
    told = False if False in verdicts else None if None in verdicts or not values else True
    return {"method": method, "flipped": flipped, "values": values, "trained": told, "verdict": in_words(told, flipped)}


def interval_of(mean: float, stderr: float | None, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a mean of n units, by Student's t with n - 1 degrees of freedom; None without a standard error."""
    if stderr is None or n < 2:
        return None
    from scipy.stats import t

    reach = float(t.ppf(0.975, n - 1)) * stderr
    return mean - reach, mean + reach
