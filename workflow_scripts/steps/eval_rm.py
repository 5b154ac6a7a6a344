"""How well a reward model tells the better answer from the worse one, on pairs kept from its training.

`accuracy`: the share of held-out pairs whose chosen answer has the higher reward (a tie is wrong), with its standard error
and the exact 95 % interval (Clopper & Pearson 1934); none of these pairs shares a prompt with a training pair.
`calibration`: pairs in five groups by the size of the margin |r_chosen - r_rejected|; in each the mean probability
sigmoid(|margin|) that the model gives to its own order (Bradley & Terry 1952), against the share of pairs where that order
is right; `expected_calibration_error` is their weighted mean distance. `length`: Spearman's correlation of reward with the
answer's length in tokens, over answers and, within pairs, of the margin with the difference of lengths; `longer_is_chosen`
is the accuracy of simply preferring the longer answer.

    python -m workflow_scripts.steps.eval_rm --step results/rm/rm_eval.json --out trial/rm_eval.json \\
        --inputs results/sft_v2/merged/manifest.json results/rm/adapter/manifest.json results/data/pairs.manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli

GROUPS = 5


def report(chosen: list[float], rejected: list[float], lengths: list[tuple[int, int]]) -> dict:
    """The figures above from the rewards of n pairs and the (chosen, rejected) lengths of their answers; None where undefined."""
    import numpy
    from scipy.stats import binomtest, spearmanr

    better, worse = numpy.asarray(chosen, float), numpy.asarray(rejected, float)
    tokens = numpy.asarray(lengths)
    margins, right = better - worse, better > worse
    n = len(right)
    interval = binomtest(int(right.sum()), n).proportion_ci(0.95)
    groups = []
    order = numpy.argsort(numpy.abs(margins), kind="stable")
    for rows in numpy.array_split(order, min(GROUPS, n)):
        sure = 1 / (1 + numpy.exp(-numpy.abs(margins[rows])))
        groups.append({"n": len(rows), "mean_probability": float(sure.mean()), "accuracy": float(right[rows].mean())})

    def correlation(a, b) -> float | None:
        return float(spearmanr(a, b).statistic) if len(set(a.tolist())) > 1 and len(set(b.tolist())) > 1 else None

    longer, shorter = tokens[:, 0] > tokens[:, 1], tokens[:, 0] < tokens[:, 1]
    return {
        "n_pairs": n,
        "accuracy": float(right.mean()),
        "accuracy_stderr": float(right.std(ddof=1) / numpy.sqrt(n)) if n > 1 else None,
        "accuracy_ci95": [float(interval.low), float(interval.high)],
        "mean_margin": float(margins.mean()),
        "calibration": groups,
        "expected_calibration_error": float(sum(g["n"] * abs(g["mean_probability"] - g["accuracy"]) for g in groups) / n),
        "length": {
            "reward_against_tokens": correlation(numpy.concatenate([better, worse]), tokens.T.ravel()),
            "margin_against_difference": correlation(margins, tokens[:, 0] - tokens[:, 1]),
            "longer_is_chosen": float((longer.sum() + 0.5 * (~longer & ~shorter).sum()) / n),
        },
    }


def main(job: manifests.Job) -> None:
    from workflow_scripts.models import device
    from workflow_scripts.rl import reward_model
    from workflow_scripts.training import trainers

    config, step, parents = job.config, job.step, job.parents()
    device.prepare(step, job.deterministic)
    quant = config.get("quant") if config["quantise"] != "none" else None
    start, adapter, rows = parents["start"], parents["adapter"], parents["rows"]
    model, tokenizer = reward_model.load(start, adapter, job.work, step["device"], step["precision"], quant)
    held = trainers.usable(rows, heldout=True)

    whole = [reward_model.lengths(tokenizer, row) for row in held]
    pairs = [row for row, length in zip(held, whole, strict=True) if max(length) <= config["max_length"]]
    chosen, rejected = reward_model.score_pairs(
        model, tokenizer, pairs, config["batch_size"], config["max_length"], f"pairs of {job.out.parent.name}"
    )
    prompts = [len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]) for row in pairs]
    fitting = [length for length in whole if max(length) <= config["max_length"]]
    lengths = [(better - n, worse - n) for (better, worse), n in zip(fitting, prompts, strict=True)]
    found = report(chosen, rejected, lengths)
    low, high = found["accuracy_ci95"]
    print(f"{job.out}: {found['accuracy']:.1%} of {len(pairs)} held-out pairs in the right order ({low:.1%} to {high:.1%})")
    with manifests.complete(job, "rm_eval", parents) as draft:
        draft.manifest |= found | {
            "left_out": len(held) - len(pairs),
            "per_pair": [
                {"id": row["id"], "chosen": round(a, 6), "rejected": round(b, 6), "tokens": list(length)}
                for row, a, b, length in zip(pairs, chosen, rejected, lengths, strict=True)
            ],
        }


if __name__ == "__main__":
    cli.run(main, __doc__)
