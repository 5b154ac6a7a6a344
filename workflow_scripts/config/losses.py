"""Loss types that ask for something else: TRL says so once a card is taken, or takes a default that means another loss."""

from collections.abc import Iterator

from workflow_scripts.config.written import Written
from workflow_scripts.data.unpaired import kl_rows

# DPO's losses that take the difference of two rewards, by which an f-divergence can stand in for the reverse KL (TRL's list).
DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
SIZE = "per_device_train_batch_size"
TEMPERATURES = ("sapo_temperature_pos", "sapo_temperature_neg")


def check(config: Written, name: str, body: dict) -> None:
    """InputError on the first key of a resolved experiment that does not fit its loss."""
    problems = {"dpo": _dpo, "grpo": _grpo}.get(body["method"])
    for key, problem in problems(body["train"]) if problems else ():
        raise config.fail(config.place(name, ["train", key]), problem)
    if body["method"] == "kto" and (size := body["train"][SIZE]) % kl_rows(body):
        fitting = ", ".join(str(number) for number in range(2, size + 1) if size % number == 0)
        problem = f"found {kl_rows(body)}, but a micro-batch of {size} (train.{SIZE}) has no whole groups of it; take {fitting}, "
        problem += "or another micro-batch"
        raise config.fail(config.place(name, ["kl_rows"]), problem)


def _dpo(train: dict) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it)."""
    given, weights = train["loss_type"], train.get("loss_weights")
    types = given if isinstance(given, list) else [given]
    if isinstance(given, list) and weights is None:
        yield "loss_weights", f"missing: a sum of {', '.join(types)} needs a weight for each"
    elif weights is not None and not isinstance(given, list):
        yield "loss_weights", f"found {weights} with one loss ({given}); make loss_type a list, or leave the weights out"
    elif weights is not None and len(weights) != len(types):
        yield "loss_weights", f"found {len(weights)} weights, and loss_type has {len(types)} entries; give one for each"
    if "aot" in types and train[SIZE] < 2:
        yield (
            SIZE,
            "found 1: aot sorts the pairs of a batch, and one pair alone is sigmoid; take 2 or more",
        )
    if "exo_pair" in types and not train.get("label_smoothing"):
        yield "label_smoothing", "missing: exo_pair has a logarithm of it; its paper takes 1.0e-3"
    if train.get("f_divergence_type", "reverse_kl") != "reverse_kl" and (other := sorted({*types} - DIFFERENCES)):
        yield "f_divergence_type", f"found {train['f_divergence_type']} with {', '.join(other)}, which knows reverse_kl alone"


def _grpo(train: dict) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it)."""
    loss = train["loss_type"]
    if loss == "cispo" and (bound := train.get("epsilon_high", 0)) < 1:
        found = f"found {bound}" if bound else "missing"
        problem = "cispo bounds the ratio itself by it, which is 1 where an answer is new (TRL would take epsilon); set 5.0, say"
        yield "epsilon_high", f"{found}: {problem}"
    for key in TEMPERATURES:
        if loss == "sapo" and key not in train:
            yield key, "missing: sapo's gate needs it; its paper takes 1.0 (pos) and 1.05 (neg)"
        if loss != "sapo" and key in train:
            yield key, f"found {train[key]} with loss_type {loss}, which has no such gate; leave it out"
