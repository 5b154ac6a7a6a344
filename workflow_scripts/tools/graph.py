"""The phases of a plan by name, what each is made from, and the files that each declares. Light: nothing is read or run."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from workflow_scripts.config import choices, comparison
from workflow_scripts.config.names import CHOICE, DEVELOPMENT, JUDGED
from workflow_scripts.plan import records
from workflow_scripts.plan.plan import Plan


class Phase(NamedTuple):
    """A step of the plan, by the arguments of `Plan.step`."""

    kind: str
    name: str

    @property
    def label(self) -> str:
        """The phase's name for people."""
        verb, _, task = self.kind.partition("_")
        words = {
            "base": self.name,
            "slice": f"data {self.name}",
            "samples": f"data {self.name} answers",
            "train": f"{self.name} adapter",
            "merge": f"{self.name} merged",
        }
        words |= {"generate": f"{self.name} {task} answers", "score": f"{self.name} {task} scores", "eval": f"{self.name} eval"}
        words |= {"report": "report"}
        return words[verb]


BASE = Phase("base", "base")
NEVER = [f"generate_{task}" for task in CHOICE]  # multiple choice is not answered in text


def outputs(plan: Plan, phase: Phase) -> tuple[str, ...]:
    """The files that the phase's rule declares, its manifest first."""
    return records.place_of(plan.results, *phase).outputs


def start(plan: Plan, run: str) -> Phase:
    """The full-precision model that a run starts from."""
    before = plan.start_run(run)
    return BASE if before == "base" else Phase("merge", before)


def parents(plan: Plan, phase: Phase) -> dict[str, Phase]:
    """Role -> phase, for each parent of the phase's step: `Plan.step(...)["parents"]` with names in place of fingerprints."""
    kind, run = phase
    verb, _, task = kind.partition("_")
    if kind == "report":
        scores = {
            f"{task} {run}": Phase(f"score_{task}", run) for run in comparison.runs(plan.config) for task in plan.config.scored
        }
        scores |= {f"{task} {run}": Phase(f"score_{task}", run) for task, run in plan.trial_scores()}
        return scores | {f"rm {run}": Phase("eval_rm", run) for run in comparison.reward_models(plan.config)}
    prompts = {name: Phase("slice", slice_name) for name, slice_name in plan.config.asked.items()}
    if kind == "samples":
        asked = plan.sampling(run)[1]
        return {"prompts": Phase("slice", asked["prompts"])} | _judged(plan, asked["run"])
    if kind == "slice":
        avoided = {role: Phase("slice", name) for role, name in plan.avoided(run).items()}
        if plan.is_sampled(run):
            owner, asked = plan.sampling(run)
            avoided |= {"answers": Phase("samples", owner), "prompts": Phase("slice", asked["prompts"])}
            avoided |= _judges(plan, plan.judges(run))
        return avoided | ({"base": BASE} if plan.config.trains_on(run) else {})
    if kind == "base":
        return {"prompts": Phase("slice", plan.prompts_slice)} if plan.base_needs(run) else {}
    own = task in plan.config.own_tasks
    if verb == "score" and task not in CHOICE and not own:
        found = {"prompts": prompts[task], "responses": Phase(f"generate_{task}", run)}
        if task != JUDGED:
            return found
        model = plan.config.data["eval"][JUDGED]["reward"]
        return found | {"start": start(plan, model), "adapter": Phase("train", model)}
    found = {"prompts": prompts[task]} if verb in ("generate", "score") and not own else {}
    if verb == "score" and (fewshot := choices.fewshot(plan.config.data["eval"], task)):
        found["fewshot"] = Phase("slice", fewshot)
    if kind not in ("train", "merge", "eval_rm"):
        return found | _judged(plan, run)
    found["start"] = start(plan, run)
    if kind != "merge":
        found["rows"] = Phase("slice", plan.slice_of(run))
    if kind != "train":
        return found | {"adapter": Phase("train", run)}
    if plan.tuned(run) is not None:
        found |= {f"adapter {one}": Phase("train", one) for one in plan.chosen_from(run)}
        return found | {f"score {one}": Phase(f"score_{DEVELOPMENT}", one) for one in plan.development_scores(run)}
    return found | _judges(plan, plan.reward_models(run))


def _judged(plan: Plan, name: str) -> dict[str, Phase]:
    """What a run, or a view of one, is judged as."""
    run, view = plan.config.view(name)
    if run in plan.config.models:
        return {"start": Phase("base", run)}
    if view == "merged":
        return {"start": Phase("merge", run)}
    return {"start": start(plan, run), "adapter": Phase("train", run)}


def _judges(plan: Plan, models: list[str]) -> dict[str, Phase]:
    found: dict[str, Phase] = {}
    for model in models:
        name = plan.config.run(model)[0]
        found |= {f"reward {name}": Phase("train", model), f"start of {name}": start(plan, model)}
    return found


def phases_by_file(plan: Plan, named: Iterable[str]) -> dict[str, Phase]:
    """Declared file -> phase, for every phase of the plan and of the seeds that occur in the paths `named`."""
    models = plan.config.models
    found = [
        *(Phase("base", name) for name in models),
        *(Phase("slice", name) for name in plan.config.data["data"]["slices"] if not plan.is_sampled(name)),
    ]
    words = {match[0] for path in named for match in re.finditer(r"[a-z][a-z0-9_]*(\.seed[1-9][0-9]*)?", path)}
    words |= {name.removeprefix(f"{task}_") for name in words for task in [*plan.config.asked, *plan.config.own_tasks]}
    known = {*plan.config.experiments, *plan.config.judged}
    extra = [name for name in sorted(words - {*models}) if name.split(".")[0] in known and not name.endswith(".seed1")]
    own = plan.sampled_slices(plan.config.data["seeds"])
    own += [name for name in sorted(words) if name.split(".")[0] in {one.split(".")[0] for one in own}]
    found += [Phase(kind, name) for name in dict.fromkeys(own) for kind in ("samples", "slice") if not name.endswith(".seed1")]
    if "report" in plan.config.data:
        found.append(Phase("report", ""))
        extra += comparison.runs(plan.config)
    for run in dict.fromkeys([*models, *plan.runs(), *extra]):
        kinds = [f"{verb}_{task}" for verb in ("generate", "score") for task in plan.config.asked]
        kinds = [kind for kind in kinds if kind not in NEVER] + [f"score_{task}" for task in plan.config.own_tasks]
        if run not in models:
            if plan.config.view(run)[1]:
                pass  # judged alone
            elif plan.is_reward_model(run):
                kinds = ["train", "eval_rm"]
            else:
                kinds = ["train", "merge", *kinds]
        found += [Phase(kind, run) for kind in kinds]
    return {file: phase for phase in found for file in outputs(plan, phase)}


def in_order(plan: Plan, wanted: Iterable[Phase]) -> list[Phase]:
    """These phases and all that they are made from, each after its parents."""
    done: dict[Phase, None] = {}

    def visit(phase: Phase) -> None:
        if phase not in done:
            for parent in parents(plan, phase).values():
                visit(parent)
            done[phase] = None

    for phase in wanted:
        visit(phase)
    return list(done)
