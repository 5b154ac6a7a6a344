"""The config: files merged, every key and type checked once, experiments resolved. Runs at parse time, in milliseconds.

Every error names the file and the path of the key. Nothing is detected here (no GPU, no network): a login node plans what a GPU
node plans.
"""

from functools import cached_property
from pathlib import Path

from workflow_scripts.config import (
    answering,
    declared,
    experiments,
    over_gpus,
    own_tasks,
    references,
    sampled,
    schema,
    sweep,
    tuning,
)
from workflow_scripts.config.names import RUN_NAME, VIEWS, view_of
from workflow_scripts.config.written import Written, merge_all
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plumbing.messages import InputError


class Config(Written):
    """A config that has been checked. `data` is the merged tree, `experiments` the resolved experiments by name."""

    def __init__(self, user: dict, files: list[str] | None = None):
        """user: the merged config (as Snakemake hands it over); files: where it came from, for the errors.

        Raises InputError with the file and the path of the key.
        """
        super().__init__(user, files)
        self.copies: dict[str, str] = {}  # of a rank sweep -> the experiment that each is a copy of
        self.tuned: dict[str, tuning.Tuned] = {}
        self.rounds: dict[str, str] = {}  # experiment of a later round -> the one with `rounds:`
        schema.check(self)
        self.experiments: dict[str, dict] = experiments.resolve(self)
        self.experiments, self.rounds = sampled.in_rounds(self, self.experiments)
        schema.check_experiments(self, self.experiments)
        self.experiments, self.tuned = tuning.expand(self, self.experiments)
        models = self.models
        taken = dict.fromkeys(models, "a model") | dict.fromkeys(self.experiments, "an experiment")
        declared.check(self, taken)  # before who is made from whom: a reward with an experiment's name would be that experiment
        references.check(self, self.experiments, [*self.tuned, *self.rounds])
        self.experiments, self.copies = sweep.expand(self, self.experiments)
        self.tuned = tuning.swept(self.tuned, self.copies)
        self.experiments, several = over_gpus.apart(self, self.experiments)
        self.gpus, self.parts, self.nodes = several.gpus, several.parts, several.nodes
        declared.check(self, taken | dict.fromkeys(self.copies, "an experiment"))
        for name in self.experiments:
            stem = view_of(name)[0]
            if stem != name and (stem in self.experiments or stem in models):
                raise self.fail(
                    ["experiments", name], f"the endings {', '.join(VIEWS)} say how a run is judged; take another name"
                )
        own_tasks.check_names(self, self.judged)
        self._check_who_answers()
        answering.check(self, self.experiments)

    def place(self, name: str, path: list) -> list:
        name = self.copies.get(name, name)
        if name in self.rounds and path in (["start_from"], ["slice"]):
            return super().place(self.rounds[name], ["rounds"])
        origin = tuning.trials(self.tuned) | {made: body.of for made, body in self.tuned.items()}
        origin |= self.rounds
        return tuning.place(self, self.tuned, name, path) or super().place(origin.get(name, name), path)

    def _check_who_answers(self) -> None:
        """InputError where the `run` of a sampled slice writes no answers."""
        for name, body in self.data["data"]["slices"].items():
            if (run := body["source"].get("sampled", {}).get("run")) is None:
                continue
            path = ["data", "slices", name, "source", "sampled", "run"]
            if run not in self.judged:
                known = ", ".join([*self.models, *(one for one in self.experiments if one in self.judged)])
                raise self.fail(path, f"found {run!r}, expected who answers: {known}, or a view of one (_merged, _nf4)")

    def run(self, name: str) -> tuple[str, int]:
        """(experiment, seed) of a run's name, such as `dpo` (seed 1) or `dpo.seed2`. InputError if there is none."""
        match = RUN_NAME.fullmatch(name)
        if not match or match["experiment"] not in self.experiments:
            raise InputError(f"{name}: no experiment of this config ({', '.join(self.experiments)})")
        if match["seed"] is not None and (int(match["seed"]) < 2 or match["seed"].startswith("0")):
            raise InputError(f"{name}: {match['experiment']} without a suffix is seed 1; suffixes start at .seed2")
        return match["experiment"], int(match["seed"] or 1)

    def view(self, name: str) -> tuple[str, str]:
        """(run, how it is judged) of what is scored: `dpo` is judged as `eval.base` says, `dpo_nf4`, `dpo_full` on that base,
        `sft_v2_merged` as the merged model. InputError if there is no such run, or where the view is what `eval.base` says."""
        experiment = name.partition(".")[0]
        if experiment in self.experiments or experiment in self.models:
            return name, ""
        run, view = view_of(name)
        trained = run not in self.models and self.experiments[self.run(run)[0]]
        if view == "merged" and (not trained or trained["method"] == "rm"):
            raise InputError(f"{name}: {run} is not trained to answer, so there is nothing to merge")
        if view in ("nf4", "full") and (view == "nf4") == self.judged_in_4bit(run):
            raise InputError(f"{name}: that is {run} itself, by eval.base: {self.data['eval']['base']}; one run has one name")
        return run, view

    def judged_in_4bit(self, name: str) -> bool:
        """Whether the base is in NF4 when a run, or a view of one, is judged."""
        experiment = name.partition(".")[0]
        if experiment in self.experiments:
            return self.data["eval"]["base"] == "trained" and self.experiments[experiment]["quantise"] != "none"
        return experiment not in self.models and view_of(name)[1] == "nf4"

    def generation(self) -> dict:
        """Who answers an evaluation's prompts, with what of it can change an answer."""
        return answering.of_evaluations(self)

    def at_once(self) -> int:
        """Answers of an evaluation that are written at once, at most: a batch of `hf`, a chunk of `vllm`, slots of `graphs`."""
        return self.generation().get("batch_size", self.data["generation"]["slots"])

    def sampled_at_once(self) -> int:
        """The same of the answers that a sampled slice is made from: a batch of `hf` is that of evaluations."""
        given = self.data["generation"]
        return self.data["eval"]["batch_size"] if given["rollouts"] == "hf" else given["slots"]

    @cached_property
    def trials(self) -> dict[str, str]:
        """Trial of `tune:` -> the experiment that it is a copy of. On the evaluation trials are judged on demand alone."""
        return tuning.trials(self.tuned)

    @cached_property
    def judged(self) -> list[str]:
        """What can be judged, without seeds: models and what is trained to answer, each with its views."""
        answering = [name for name, body in self.experiments.items() if body["method"] != "rm"]
        other = {name: f"{name}_{'full' if self.judged_in_4bit(name) else 'nf4'}" for name in [*self.models, *answering]}
        return [*other, *other.values(), *(f"{name}_merged" for name in answering)]

    def lora(self, experiment: str) -> dict:
        """The LoRA block of an experiment: the global one, or that of a copy's rank."""
        return self.experiments[experiment].get("lora", self.data["lora"])


def load(*files: Path | str) -> Config:
    """The config of files given in the order in which they are laid over each other."""
    return Config(merge_all([read_yaml(file) for file in files]), [str(file) for file in files])
