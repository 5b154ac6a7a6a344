"""Win rates by a reward model, on prompts that nothing was trained on. Descriptive: steps/judge_answers.py says why."""

import numpy

from workflow_scripts.config.names import JUDGED
from workflow_scripts.report.collect import World
from workflow_scripts.report.sections import mean_and_error, models, percent


def wins(world: World) -> dict | None:
    """`rows`: each model's share of prompts on which its answer has the higher reward than the reference's answer of the same
    seed, a tie counting half; its mean reward; its answers' length. None where nothing is judged."""
    declared = world.config.get("judge")
    if declared is None:
        return None
    against = world.seeded(declared["against"])
    rows = []
    for name in models(world):
        runs = world.seeded(name)
        scores = [world.scores[JUDGED, run] for run in runs]
        won = [share(score, world.scores[JUDGED, other]) for score, other in zip(scores, against, strict=True)]
        alone = name == declared["against"]
        rows.append(
            {
                "name": name,
                "won": "" if alone else mean_and_error([[[value] for value in one] for one in _distinct(won, runs, against)]),
                "each": "" if alone else ", ".join(percent(float(numpy.mean(one))) for one in won),
                "reward": f"{numpy.mean([score['mean_reward'] for score in scores]):.3f}",
                "tokens": f"{numpy.mean([score['mean_response_tokens'] for score in scores]):.0f}",
            }
        )
    # Policies that were trained against the judge, or against a reward model of its experiment with another seed.
    trained = [
        name
        for name, body in world.config["experiments"].items()
        if declared["reward"] in rewards(body) and not {"view", "placebo"} & set(body)
    ]
    return declared | {"rows": rows, "n": world.scores[JUDGED, against[0]]["n_prompts"], "trained": trained}


def share(score: dict, other: dict) -> list[float]:
    """For each prompt 1 where the first answer has the higher reward, 0 where the second has, 0.5 where they tie."""
    known = {row["key"]: row["reward"] for row in other["per_prompt"]}
    return [float(numpy.sign(row["reward"] - known[row["key"]]) + 1) / 2 for row in score["per_prompt"]]


def _distinct(won: list[list[float]], runs: list[str], against: list[str]) -> list[list[float]]:
    """One entry for each pair of runs: a model without seeds against another one is a single comparison."""
    return list(dict(zip(zip(runs, against, strict=True), won, strict=True)).values())


def rewards(body: dict) -> list[str]:
    reward = body.get("reward", [])
    return [reward] if isinstance(reward, str) else list(reward)
