"""By hand, who starts from whom in the clone that is edited at random: see random_oracle.py, which asks nothing of the code."""

from collections.abc import Iterable
from typing import NamedTuple

Phase = tuple[str, str]


class Run(NamedTuple):
    method: str
    start: str
    slice: str
    rewards: tuple[str, ...] = ()


# Config files: config.yaml, micro.yaml and random_edits.yaml. Seed 2 of dpo brings its own sft_v2.
RUNS = {
    "sft_v1": Run("sft", "base", "sft"),
    "sft_v2": Run("sft", "base", "sft"),
    "sft_v2.seed2": Run("sft", "base", "sft"),
    "dpo": Run("dpo", "sft_v2", "mine"),
    "dpo.seed2": Run("dpo", "sft_v2.seed2", "mine"),
    "dpo_ipo": Run("dpo", "sft_v2", "mine"),
    "dpo_4bit": Run("dpo", "sft_v2", "mine"),
    "dpo_base": Run("dpo", "base", "mine"),
    "kto": Run("kto", "sft_v2", "pairs"),
    "rm": Run("rm", "sft_v2", "mixed"),
    "ppo": Run("ppo", "sft_v2", "instructions", ("rm",)),
    "ppo_ifeval": Run("ppo", "sft_v2", "instructions"),
    "grpo": Run("grpo", "sft_v2", "instructions"),
    "grpo_numeric": Run("grpo", "sft_v2", "sums"),
    "grpo_rm": Run("grpo", "sft_v2", "instructions", ("rm",)),
    "rloo": Run("rloo", "sft_v2", "instructions"),
}
PROMPTS = {"ifeval": "ifeval", "gsm8k": "sums_eval"}
TRAINED_ON = ("sft", "pairs", "mine", "mixed", "instructions", "sums")
FROM_FILES = ("mine", "mixed")
NEEDS_GRADE = [run for run in ("base", *RUNS) if run not in ("rm", "sft_v2.seed2")]  # what the targets score
MERGED = ("sft_v2", "sft_v2.seed2", "dpo_base")  # the last one on demand


def parents(runs: dict[str, Run]) -> dict[Phase, set[Phase]]:
    """Phase -> the phases that it starts from, of all phases that these runs can have."""
    prompts: set[Phase] = {("slice", name) for name in PROMPTS.values()}
    graph: dict[Phase, set[Phase]] = {phase: set() for phase in prompts}
    graph["base", "base"] = {("slice", "ifeval")}
    for name in TRAINED_ON:
        graph["slice", name] = prompts | {("base", "base")}

    def start(run: str) -> Phase:
        return ("base", "base") if runs[run].start == "base" else ("merge", runs[run].start)

    for run, (method, _, rows, rewards) in runs.items():
        graph["train", run] = {start(run), ("slice", rows)}
        for model in rewards:
            graph["train", run] |= {("train", model), start(model)}
        model_and_start = {start(run), ("train", run)}
        if method == "rm":
            graph["eval_rm", run] = model_and_start | {("slice", rows)}
        else:
            graph["merge", run] = model_and_start
            for task in PROMPTS:
                graph[f"generate_{task}", run] = model_and_start | {("slice", PROMPTS[task])}
    for task in PROMPTS:
        graph[f"generate_{task}", "base"] = {("base", "base"), ("slice", PROMPTS[task])}
        for run in ("base", *runs):
            if run == "base" or runs[run].method != "rm":
                graph[f"score_{task}", run] = {(f"generate_{task}", run), ("slice", PROMPTS[task])}
    return graph


def above(phases: Iterable[Phase], graph: dict[Phase, set[Phase]]) -> set[Phase]:
    """The phases and all that they start from."""
    found: set[Phase] = set()
    todo = list(phases)
    while todo:
        if (phase := todo.pop()) not in found:
            found.add(phase)
            todo += graph[phase]
    return found


GRAPH = parents(RUNS)
TARGETS: list[Phase] = [(f"score_{task}", run) for task in PROMPTS for run in NEEDS_GRADE]
TARGETS += [("eval_rm", "rm"), ("merge", "dpo_base")]
FINISHED = above(TARGETS, GRAPH)


def expected(direct: set[Phase], targets: list[Phase], runs: dict[str, Run] | None = None) -> set[Phase]:
    """What must be planned for these targets: of all that they start from, what depends on an edit or was never made."""
    graph = parents(runs or RUNS)
    needed = above(targets, graph)
    return {phase for phase in needed if (above([phase], graph) & needed) & (direct | (needed - FINISHED))}


def phase_of(output: str) -> Phase:
    """The phase that makes a file: its rule's first output."""
    parts = output.removeprefix("results/").split("/")
    if parts[0] == "data":
        return "slice", parts[1].removesuffix(".manifest.json")
    if parts[0] == "base" and parts[1] == "manifest.json":
        return "base", "base"
    if len(parts) == 1:
        task, run = parts[0].removesuffix(".json").split("_", 1)
        return f"score_{task}", run
    if parts[1] == "rm_eval.json":
        return "eval_rm", parts[0]
    if parts[1] in ("adapter", "merged"):
        return {"adapter": "train", "merged": "merge"}[parts[1]], parts[0]
    return f"generate_{parts[1].removesuffix('_responses.manifest.json')}", parts[0]


def file_of(phase: Phase) -> str:
    """The target's file of a phase that is asked for: `phase_of` the other way round."""
    kind, name = phase
    return {"eval_rm": f"results/{name}/rm_eval.json", "merge": f"results/{name}/merged/manifest.json"}.get(
        kind, f"results/{kind.removeprefix('score_')}_{name}.json"
    )
