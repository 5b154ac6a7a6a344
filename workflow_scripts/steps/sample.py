"""Draw answers of a run to the prompts of a slice, several to each: what a sampled slice is chosen from (steps/choose_rows.py).

The model is put together as an evaluation asks it: the adapter beside the weights of its start, in the config's precision. Each
answer has a random stream of its own, from the slice's seed, the run's, the prompt's place and the answer's number: it depends
neither on what is drawn beside it nor on where a killed run was. An answer is kept as soon as it is drawn. With `eval.shards: N`
the prompts are shared among N jobs, as in steps/generate.py.

Each prompt is asked once, though several rows may have it; of more prompts than `rows`, the slice's seed draws which.

    python -m workflow_scripts.steps.sample --step results/data/best_of_8.answers.manifest.json \\
        --out trial/best_of_8.answers.manifest.json \\
        --inputs results/base/manifest.json results/sft_v2/adapter/manifest.json results/data/instructions.manifest.json
"""

import random

from workflow_scripts.artifacts import manifests
from workflow_scripts.data import slicing
from workflow_scripts.steps import cli, generate


def prompts_of(rows: list[dict], count: int, seed: int) -> list[dict]:
    """The rows whose prompts are asked, in their order: the first of each prompt, and `count` of these where there are more."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(slicing.prompt_of(row), row)
    found = [*first.values()]
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), count))] if len(found) > count else found


def stream(slice_seed: int, run_seed: int) -> int:
    """The seed that the answers' streams are made from: another one for each pair."""
    return slice_seed * 2**32 + run_seed


def main(job: manifests.Job) -> None:
    from workflow_scripts.plumbing.jsonl import write_jsonl

    parents, config = job.parents(), job.config
    asked = config["source"]["sampled"]
    rows = prompts_of(parents["prompts"].rows(), config["rows"], config["seed"])
    n, seed = asked["n"], stream(config["seed"], job.step["seed"])
    cut = {key: asked[key] for key in ("top_p", "top_k") if key in asked}
    drawn = {"temperature": asked["temperature"], "samples": n, "seed": seed, **cut}
    label = f"answers of {job.out.name.partition('.')[0]}"
    settings = {"max_new_tokens": asked["max_new_tokens"], "decoding": "greedy", "drawn": drawn}
    answers, facts = generate.gather(job, n * len(rows)) or generate.respond(job, parents, rows, settings, label)
    if "shard" in job.step:
        generate.write_shard(job, parents, answers, facts)
        return
    with manifests.complete(job, "samples", parents) as draft:
        keys = ("response", "tokens", "finish_reason")
        given = [[{key: one[key] for key in keys} for one in answers[first : first + n]] for first in range(0, len(answers), n)]
        made = [{"id": row["id"], "prompt": row["prompt"], "answers": some} for row, some in zip(rows, given, strict=True)]
        write_jsonl(draft.folder / job.out.name.replace(".manifest.json", ".jsonl"), made)
        tokens = sum(one["tokens"] for one in answers)
        draft.manifest |= facts | {"answers": {"prompts": len(rows), "sampled": len(answers), "tokens": tokens}}
        draft.run["tokens"] = tokens


if __name__ == "__main__":
    cli.run(main, __doc__)
