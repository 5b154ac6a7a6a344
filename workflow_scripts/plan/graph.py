"""What depends on what: the runs and slices that a run is made from, and the files of them that each step reads."""

import math
from functools import cache, cached_property
from pathlib import Path

from workflow_scripts.artifacts import own_code
from workflow_scripts.config import choices, comparison, own_tasks, sampled
from workflow_scripts.config.config import Config
from workflow_scripts.config.experiments import rewards
from workflow_scripts.config.names import DEVELOPMENT, JUDGED, run_name
from workflow_scripts.config.tuning import Tuned
from workflow_scripts.plan.places import Places
from workflow_scripts.plumbing.messages import InputError


def seed_of(slice_name: str) -> int:
    return int(slice_name.partition(".seed")[2] or 1)


class Graph(Places):
    """The edges of the DAG."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._task_files = cache(lambda task: own_tasks.inputs(config, task))
        self._behind: dict[str, list[str]] = {}
        self._own: dict[str, own_code.Own] = {}

    @cached_property
    def prompts_slice(self) -> str:
        return self.config.data["eval"]["ifeval"]["prompts"]

    def reward_models(self, run: str) -> list[str]:
        """The runs of the reward models that `run` is trained with, of the same seed."""
        return self._models_of(self.experiment(run), self.config.run(run)[1])

    def _models_of(self, body: dict, seed: int) -> list[str]:
        return [run_name(name, seed) for name in rewards(body) if name in self.config.experiments]

    def declared(self, body: dict) -> dict[str, dict]:
        """Of the rewards of an experiment, or of a sampled slice, those that the config declares under `rewards:`."""
        known = self.config.data.get("rewards", {})
        return {name: known[name] for name in rewards(body) if name in known}

    def code_of(self, name: str) -> own_code.Own:
        """The file of a reward of the user's own with what it imports, as first read. InputError, with the key, if wrong."""
        if name not in self._own:
            body = self.config.data["rewards"][name]
            try:
                found = own_code.read(Path(body["file"]))
            except InputError as error:
                raise self.config.fail(["rewards", name, "file"], str(error)) from None
            try:
                own_code.check_function(found.path, body["function"])
            except InputError as error:
                raise self.config.fail(["rewards", name, "function"], str(error)) from None
            self._own[name] = found
        return self._own[name]

    def start_run(self, run: str) -> str:
        """The run whose merged model `run` starts from, with the same seed; `base` for the base model."""
        experiment, seed = self.config.run(run)
        return run_name(self.config.experiments[experiment]["start_from"], seed)

    def is_tiny_slice(self, name: str) -> bool:
        return "tiny" in self.config.slice_body(name)["source"]

    def runs(self) -> list[str]:
        """Every run of the config: each experiment with each seed."""
        return [run_name(name, seed) for name in self.config.experiments for seed in self.config.data["seeds"]]

    def rows_source(self, name: str) -> dict:
        """Where a slice's rows come from; of a composed one, its questions."""
        source = self.config.slice_body(name)["source"]
        return source["composed"]["questions"] if "composed" in source else source

    def avoided(self, name: str) -> dict[str, str]:
        """Role -> slice, of the evaluations whose prompts no row of this slice may cover.

        Slices that are trained on, or that settings are chosen on, keep away from what is evaluated. Composed prompts keep away
        from every slice that is there to evaluate on, so that prompts for development, too, are none of IFEval's; from
        each other they are apart by their questions (config/slices.py). Of development prompts and evaluated ones, it is the
        former that keep away; of rows to train on and development prompts, the rows. In the tiny world their splits share none.
        """
        slices = self.config.data["data"]["slices"]
        composed = [one for one in slices if "composed" in slices[one]["source"]]
        evaluated = {f"{task}_prompts": prompts for task, prompts in self.config.evaluations.items()}
        chosen_by = self.config.development.get("prompts", "")
        if name not in composed:
            if not self.config.trains_on(name):
                return evaluated if name == chosen_by else {}
            apart_anyway = not chosen_by or self._in_tiny_world(name) and self._in_tiny_world(chosen_by)
            return evaluated | ({} if apart_anyway else {f"{DEVELOPMENT}_prompts": chosen_by})
        evaluated = {role: prompts for role, prompts in evaluated.items() if prompts not in composed}
        avoids_it = chosen_by if name in self.config.evaluations.values() else ""
        not_these = [*composed, *evaluated.values(), avoids_it]
        others = [one for one in slices if not self.config.trains_on(one) and one not in not_these]
        return evaluated | {f"slice_{one}_prompts": one for one in others}

    def _in_tiny_world(self, name: str) -> bool:
        """Whether a slice's prompts are of the tiny world; of a sampled slice, those that are asked."""
        name = sampled.asking(self.config, name)[1]["prompts"] if self.is_sampled(name) else name
        return self.is_tiny_slice(name)

    def shown(self) -> list[str]:
        """The runs that are scored without being asked for. Trials are not: on the evaluation they are nobody's business."""
        return [run for run in self.runs() if self.config.run(run)[0] not in self.config.trials]

    # -- trials, and the choice among them (config/tuning.py) -----------------------------------------------------------

    def tuned(self, run: str) -> Tuned | None:
        """What stands behind a run whose adapter is chosen; None for one that is trained."""
        return self.config.tuned.get(self.config.run(run)[0])

    def judging(self, run: str, trial: str) -> list[str]:
        """The runs of a trial by which `run` is chosen: that of its own seed, or those of all seeds of the config."""
        one_seed = self.config.data["tune"]["per_seed"]
        seeds = [self.config.run(run)[1]] if one_seed else self.config.data["seeds"]
        return [run_name(trial, seed) for seed in seeds]

    def development_scores(self, run: str) -> list[str]:
        """The runs whose scores on the development prompts choose; none where the method's own objective does."""
        body = self.tuned(run)
        return [] if body is None or body.objective else [one for trial in body.trials for one in self.judging(run, trial)]

    def chosen_from(self, run: str) -> list[str]:
        """The runs whose adapters are read where `run` is chosen: the trials of its seed, and those whose objectives choose."""
        body = self.tuned(run)
        if body is None:
            return []
        own = [run_name(trial, self.config.run(run)[1]) for trial in body.trials]
        judging = [one for trial in body.trials for one in self.judging(run, trial)] if body.objective else []
        return list(dict.fromkeys([*own, *judging]))

    def score_files(self, run: str) -> list[str]:
        return [f"{self.results}/{DEVELOPMENT}_{one}.json" for one in self.development_scores(run)]

    # -- slices whose rows a run makes (config/sampled.py) ----------------------------------------------------------------

    def sampling(self, name: str) -> tuple[str, dict]:
        """(the slice whose answers a sampled slice takes, of its seed; what is asked there, `run` of that seed)."""
        seed = seed_of(name)
        owner, asked = sampled.asking(self.config, name)
        run = asked["run"]
        of_models = self.config.view(run)[0] in self.config.models
        return self.of_seed(owner, seed), asked | {"run": run if of_models else run_name(run, seed)}

    def judges(self, name: str) -> list[str]:
        """The runs of the reward models by which the rows of a sampled slice are chosen."""
        return self._models_of(sampled.block(self.config, name), seed_of(name))

    def sampled_slices(self, seeds: list[int]) -> list[str]:
        names = [name for name in self.config.data["data"]["slices"] if self.is_sampled(name)]
        return [self.of_seed(name, seed) for name in names for seed in seeds]

    def sample_shards(self, name: str) -> int:
        """Jobs that share the answers of a sampled slice, as they share a task's (plan/places.py)."""
        rows, hf = sampled.asking(self.config, name)[1]["rows"], self.config.data["generation"]["rollouts"] == "hf"
        return min(self.config.data["eval"]["shards"], math.ceil(rows / (self.config.data["eval"]["batch_size"] if hf else 1)))

    def sample_shard_files(self, name: str) -> list[str]:
        """The answers of each shard, where there are several."""
        count = self.sample_shards(name)
        return [f"{self.results}/data/{name}_shards/{n}of{count}.json" for n in range(1, count + 1)] if count > 1 else []

    def sample_inputs(self, name: str) -> list[str]:
        """Files that the answers of a sampled slice are made from: the prompts, and what the run is judged as."""
        asked = self.sampling(name)[1]
        return list(dict.fromkeys([*self.slice_inputs(asked["prompts"]), *self.judged_inputs(asked["run"])]))

    def choice_inputs(self, name: str) -> list[str]:
        """Files that the choice reads: answers, their prompts, those to keep away from, the tokenizer, what rewards need."""
        owner, asked = self.sampling(name)
        files = [*self.samples_inputs(owner), *self.slice_inputs(asked["prompts"])]
        for prompts in self.avoided(name).values():
            files += self.slice_inputs(prompts)
        files += self.base_inputs() + self._reward_inputs(sampled.block(self.config, name), self.judges(name))
        return list(dict.fromkeys(files))

    # -- files that a step reads ----------------------------------------------------------------------------------------

    def source_files(self, name: str) -> list[str]:
        """The files that a slice is cut from; none for a slice from a hub or from the tiny world."""
        source = self.rows_source(name)
        return source.get("paths") or ([source["path"]] if "path" in source else [])

    def base_needs(self, name: str) -> list[str]:
        """Files of the steps that a model starts from: the evaluation prompts for one made here, none for one from elsewhere."""
        return self.slice_inputs(self.prompts_slice) if self.config.models[name]["source"] == "scratch" else []

    def prompts_inputs(self, task: str) -> list[str]:
        """The slices of a task: its prompts and, if it has any, their solved examples."""
        fewshot = choices.fewshot(self.config.data["eval"], task)
        return self.slice_inputs(self.config.asked[task]) + (self.slice_inputs(fewshot) if fewshot else [])

    def own_task_inputs(self, task: str) -> list[str]:
        """Files of a task of `eval.tasks`: its definition, and rows that are no hub's."""
        return self._task_files(task)

    def start_inputs(self, run: str) -> list[str]:
        """Files of the full-precision model that `run` starts from: the base or a merged experiment.

        A merge's weights are a cache, so its manifest stands for it, with what they can be rebuilt from.
        """
        start = self.start_run(run)
        if start == "base":
            return self.base_inputs()
        return [f"{self.results}/{start}/merged/manifest.json", *self.start_inputs(start), *self.adapter_inputs(start)]

    def judged_inputs(self, name: str) -> list[str]:
        """Files of the model that a run, or a view of one, is judged as: what it starts from and its adapter, or its merge."""
        run, view = self.config.view(name)
        if run in self.config.models:
            return self.base_inputs(run)
        own = self.start_inputs(run) + self.adapter_inputs(run)
        return [f"{self.results}/{run}/merged/manifest.json", *own] if view == "merged" else own

    def train_inputs(self, run: str) -> list[str]:
        """Files that a run's training reads: the model that it starts from, its rows, its reward models with their starts,
        and the files of rewards of the user's own.

        Of a run that is chosen: its start and rows, and the adapters among which (their scores on top: `score_files`).
        """
        if self.tuned(run) is not None:
            adapters = [file for one in self.chosen_from(run) for file in self.adapter_inputs(one)]
            return list(dict.fromkeys([*self.start_inputs(run), *self.slice_inputs(self.slice_of(run)), *adapters]))
        files = self.start_inputs(run) + self.slice_inputs(self.slice_of(run))
        return list(dict.fromkeys(files + self._reward_inputs(self.experiment(run), self.reward_models(run))))

    def _reward_inputs(self, body: dict, models: list[str]) -> list[str]:
        files = [file for model in models for file in self.start_inputs(model) + self.adapter_inputs(model)]
        own = [name for name, one in self.declared(body).items() if "file" in one]
        return files + [str(file) for name in own for file in self.code_of(name).files]

    def judge_inputs(self, run: str) -> list[str]:
        """Files that the judging of a run's answers reads: the answers, their prompts, and the reward model with its start."""
        model = self.config.data["eval"][JUDGED]["reward"]
        files = self.answers_inputs(JUDGED, run) + self.prompts_inputs(JUDGED)
        return list(dict.fromkeys(files + self.start_inputs(model) + self.adapter_inputs(model)))

    def report_inputs(self) -> list[str]:
        """Every score file that the report reads. Answers, manifests and curves lie beside them."""
        scores = [f"{self.results}/{task}_{run}.json" for run in comparison.runs(self.config) for task in self.config.scored]
        scores += [f"{self.results}/{task}_{run}.json" for task, run in self.trial_scores()]
        return scores + [f"{self.results}/{run}/rm_eval.json" for run in comparison.reward_models(self.config)]

    def trial_scores(self) -> list[tuple[str, str]]:
        """(task, run) of the scores of trials that the report reads: by which they are chosen and, where the config asks for its
        curve, those on the evaluation that choosing stands for: it is the one that the curve shows."""
        tuned = [run for run in self.shown() if self.tuned(run) is not None]
        found = [(DEVELOPMENT, one) for run in tuned for one in self.development_scores(run)]
        if self.config.data.get("tune", {}).get("curve"):
            curve = [one for run in tuned for one in self.chosen_from(run) if self.config.run(one)[0] in self.config.trials]
            found += [(self.config.development.get("task", "ifeval"), one) for one in curve if not self.is_reward_model(one)]
        return list(dict.fromkeys(found))

    def behind(self, file: str) -> list[str]:
        """The files that are made before this manifest, or with it: where one of them is made, it is made too."""
        if file not in self._behind:
            folder, _, name = file.rpartition("/")
            if name.endswith(".manifest.json"):
                found = [f"{folder}/{name.removesuffix('.manifest.json')}.jsonl"]
            elif name != "manifest.json":
                found = []
            elif folder.endswith("/merged"):
                run = folder.split("/")[-2]
                found = self.start_inputs(run) + self.adapter_inputs(run)
            else:
                found = [f"{folder}/{'adapter_model' if folder.endswith('/adapter') else 'model'}.safetensors"]
            self._behind[file] = found
        return self._behind[file]
