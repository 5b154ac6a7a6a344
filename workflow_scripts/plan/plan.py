"""From a checked config to the steps: for each artifact its path, its parents, and the JSON that decides its outcome.

The Snakefile asks this module, and nothing else, what a rule's parameter and inputs are. A step's JSON holds the resolved
config of that step alone, the fingerprints of its parents, code and package versions, and what its external files
contain: its hash is the step's fingerprint (see `fingerprint`). Runs at parse time, without heavy imports.
"""

import json
import math
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config import bases, choices, comparison, judged, sweep
from workflow_scripts.config.config import VERIFIERS, Config, rewards
from workflow_scripts.config.names import CHOICE, JUDGED, answered, run_name
from workflow_scripts.data import slicing
from workflow_scripts.models import sources
from workflow_scripts.plumbing.messages import InputError

STEPS = "workflow_scripts.steps."


class Plan:
    """The steps of one config. Names of runs: `base` or another model, an experiment (seed 1), or an experiment with `.seedN`."""

    def __init__(self, config: Config):
        self.config = config
        paths = config.data.get("pathvars", {})
        self.results: str = paths.get("results", "results")
        # The same for every step of a module: thousands of steps share one mapping, which nobody changes.
        self._code, self._packages = cache(fingerprint.code), cache(fingerprint.packages)
        self._behind: dict[str, list[str]] = {}
        self._texts: dict[tuple[str, str], str] = {}
        self._fingerprints: dict[tuple[str, str], str] = {}

    # -- paths ------------------------------------------------------------------------------------------------------

    @property
    def work(self) -> str:
        """Locks, staging and finished copies, by fingerprint."""
        return f"{self.results}/.work"

    def slice_inputs(self, name: str) -> list[str]:
        return [f"{self.results}/data/{name}.manifest.json", f"{self.results}/data/{name}.jsonl"]

    def base_inputs(self, name: str = "base") -> list[str]:
        """Files of a model that is not trained here."""
        return [f"{self.results}/{name}/manifest.json", f"{self.results}/{name}/model.safetensors"]

    def adapter_inputs(self, run: str) -> list[str]:
        return [f"{self.results}/{run}/adapter/{name}" for name in ("manifest.json", "adapter_model.safetensors")]

    def prompts_inputs(self, task: str) -> list[str]:
        """The slices of a task: its prompts and, if it has any, their solved examples."""
        fewshot = choices.fewshot(self.config.data["eval"], task)
        return self.slice_inputs(self.config.evaluations[task]) + (self.slice_inputs(fewshot) if fewshot else [])

    def answers_inputs(self, task: str, run: str) -> list[str]:
        return [f"{self.results}/{run}/{task}_responses{ending}" for ending in (".manifest.json", ".jsonl")]

    def judge_inputs(self, run: str) -> list[str]:
        """Files that the judging of a run's answers reads: the answers, their prompts, and the reward model with its start."""
        model = self.config.data["eval"][JUDGED]["reward"]
        files = self.answers_inputs(JUDGED, run) + self.prompts_inputs(JUDGED)
        return list(dict.fromkeys(files + self.start_inputs(model) + self.adapter_inputs(model)))

    def report_inputs(self) -> list[str]:
        """Every score file that the report reads. Answers, manifests and curves lie beside them."""
        scores = [f"{self.results}/{task}_{run}.json" for run in comparison.runs(self.config) for task in self.config.evaluations]
        return scores + [f"{self.results}/{run}/rm_eval.json" for run in comparison.reward_models(self.config)]

    def start_inputs(self, run: str) -> list[str]:
        """Files of the full-precision model that `run` starts from: the base or a merged experiment.

        A merge's weights are a cache, so its manifest stands for it, with what they can be rebuilt from.
        """
        start = self.start_run(run)
        if start == "base":
            return self.base_inputs()
        return [f"{self.results}/{start}/merged/manifest.json", *self.start_inputs(start), *self.adapter_inputs(start)]

    def train_inputs(self, run: str) -> list[str]:
        """Files that a run's training reads: the model that it starts from, its rows, and its reward models with their starts."""
        files = self.start_inputs(run) + self.slice_inputs(self.experiment(run)["slice"])
        for model in self.reward_models(run):
            files += self.start_inputs(model) + self.adapter_inputs(model)
        return list(dict.fromkeys(files))

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

    # -- the graph --------------------------------------------------------------------------------------------------

    @cached_property
    def prompts_slice(self) -> str:
        return self.config.data["eval"]["ifeval"]["prompts"]

    def is_reward_model(self, run: str) -> bool:
        return run not in self.config.models and self.experiment(run)["method"] == "rm"

    def reward_models(self, run: str) -> list[str]:
        """The runs of the reward models that `run` is trained with, of the same seed."""
        return [run_name(name, self.config.run(run)[1]) for name in rewards(self.experiment(run)) if name not in VERIFIERS]

    def shards(self, task: str) -> int:
        """Jobs that share the answering of a task's prompts: as many as the config says, and no more than there are batches."""
        evaluation = self.config.data["eval"]
        rows = self.config.data["data"]["slices"][self.config.evaluations[task]]["rows"]
        return min(evaluation["shards"], math.ceil(rows / evaluation["batch_size"]))

    def shard_files(self, task: str, run: str) -> list[str]:
        """The answers of each shard, where there are several."""
        count = self.shards(task)
        return [f"{self.results}/{run}/{task}_shards/{n}of{count}.json" for n in range(1, count + 1)] if count > 1 else []

    def results_of(self, run: str) -> list[str]:
        """The files that tell how good a run is: its scores, or for a reward model how well it tells answers apart."""
        if self.is_reward_model(run):
            return [f"{self.results}/{run}/rm_eval.json"]
        return [f"{self.results}/{task}_{run}.json" for task in self.config.evaluations]

    def experiment(self, run: str) -> dict:
        return self.config.experiments[self.config.run(run)[0]]

    def start_run(self, run: str) -> str:
        """The run whose merged model `run` starts from, with the same seed; `base` for the base model."""
        experiment, seed = self.config.run(run)
        return run_name(self.config.experiments[experiment]["start_from"], seed)

    def is_tiny_slice(self, name: str) -> bool:
        return "tiny" in self.config.data["data"]["slices"][name]["source"]

    def runs(self) -> list[str]:
        """Every run of the config: each experiment with each seed."""
        return [run_name(name, seed) for name in self.config.experiments for seed in self.config.data["seeds"]]

    # -- the steps --------------------------------------------------------------------------------------------------

    def base(self, name: str = "base") -> str:
        return self._text(*self.base_phase(name))

    @staticmethod
    def base_phase(name: str = "base") -> tuple[str, str]:
        """The step that makes a model which is not trained here: the base's has no name."""
        return "base", "" if name == "base" else name

    def slice(self, name: str) -> str:
        return self._text("slice", name)

    def train(self, run: str) -> str:
        return self._text("train", run)

    def merge(self, run: str) -> str:
        return self._text("merge", run)

    def generate(self, task: str, run: str) -> str:
        return self._text(f"generate_{task}", run)

    def shard(self, task: str, run: str, number: int) -> str:
        """The step of one shard: that of all answers, which it is a part of, and which part."""
        step = self.step(f"generate_{task}", run)
        return fingerprint.canonical(step | {"shard": [number, self.shards(task)]})

    def score(self, task: str, run: str) -> str:
        return self._text(f"score_{task}", run)

    def eval_rm(self, run: str) -> str:
        return self._text("eval_rm", run)

    def report(self) -> str:
        return self._text("report", "")

    def check(self) -> None:
        """Resolve every step of the config once (seed 1), so that what can't be planned is said at once."""
        comparison.check(self.config)
        wanted, most = self.config.data["eval"]["shards"], max(map(self.shards, answered(self.config.evaluations)))
        if wanted > most:
            problem = (
                f"found {wanted}, but the prompts make {most} batches at most, and a shard takes whole batches; lower it, or "
            )
            raise self.config.fail(["eval", "shards"], problem + "eval.batch_size")
        for name in self.config.data["data"]["slices"]:
            self._text("slice", name)
        for name in [*self.config.models, *self.config.experiments]:
            for kind in ["eval_rm"] if self.is_reward_model(name) else [f"score_{task}" for task in self.config.evaluations]:
                self._text(kind, name)

    def _text(self, kind: str, name: str) -> str:
        """What is kept of a step: its dict takes several times the memory."""
        key = (kind, name)
        if key not in self._texts:
            self._texts[key] = fingerprint.canonical(self._make(kind, name))
        return self._texts[key]

    def fingerprint(self, kind: str, name: str) -> str:
        key = (kind, name)
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint.of_text(self._text(kind, name))
        return self._fingerprints[key]

    def step(self, kind: str, name: str = "") -> dict:
        """The step as it was first planned, whatever has changed on disk since."""
        return json.loads(self._text(kind, name))

    def _make(self, kind: str, name: str) -> dict:
        verb, _, task = kind.partition("_")
        if verb in ("generate", "score"):
            return getattr(self, f"_{verb}_step")(task, name)
        return getattr(self, f"_{kind}_step")(*([name] if name else []))

    def _step(self, module: str, config: dict, parents: dict[str, str], tiny: bool = False, **more) -> dict:
        step = {
            "step": module,
            "config": config,
            "parents": parents,
            "code": self._code(STEPS + module, tiny),
            "packages": self._packages(STEPS + module, tiny),
            **more,
        }
        if self.config.data.get("allow_package_mismatch"):
            step["allow_package_mismatch"] = True
        return step

    def _machine(self, precision: str = "") -> dict:
        """What of the machine decides numbers; declared, never detected. precision: an evaluation's, in place of training's."""
        found = {key: self.config.data[key] for key in ("device", "precision", "threads")}
        return found | ({"precision": precision} if precision else {})

    def _slice_step(self, name: str) -> dict:
        data = self.config.data["data"]
        body = data["slices"][name]
        config: dict = dict(body)
        parents, more = {}, {}
        if self.config.trains_on(name):  # evaluation prompts are taken as they are: nothing is dropped or held out
            config |= {key: body.get(key, data[key]) for key in ("max_drop", "max_prompt_tokens", "decontaminate")}
            parents = {f"{task}_prompts": self.fingerprint("slice", prompts) for task, prompts in self.config.evaluations.items()}
            parents["base"] = self.fingerprint("base", "")
        source = body["source"]
        if files := self.source_files(name):
            bare = [file.rsplit("/", 1)[-1] for file in files]
            config["source"] = {"file": bare[0]} if "path" in source else {"files": bare}
            try:
                rows = slicing.candidates_hash(
                    files, body["rows"], body["seed"], body["kind"], body.get("group_by"), f"{self.work}/content_cache.json"
                )
            except InputError as error:
                key = "path" if "path" in source else "paths"
                raise self.config.fail(["data", "slices", name, "source", key], str(error)) from None
            more["external"] = {"candidate_rows": rows}
        elif "hub" in source:
            more["external"] = {key: source.get(key) for key in ("hub", "revision", "split")}
        step = self._step("slice_data", config, parents, tiny=self.is_tiny_slice(name), **more)
        if "hub" in source:  # `datasets` shuffles the stream; imported there alone, so not in the step's import closure
            step["packages"] = step["packages"] | {"datasets": fingerprint.locked()["datasets"]}
        return step

    def source_files(self, name: str) -> list[str]:
        """The files that a slice is cut from; none for a slice from a hub or from the tiny world."""
        source = self.config.data["data"]["slices"][name]["source"]
        return source.get("paths") or ([source["path"]] if "path" in source else [])

    def _base_step(self, name: str = "base") -> dict:
        base = self.config.models[name]
        source = base["source"]
        config = {"source": source, source: base[source]}
        if source == "scratch":
            parents = {"prompts": self.fingerprint("slice", self.prompts_slice)}
            return self._step("make_base", config, parents, tiny=True, threads=self.config.data["threads"])  # in fp32, on the CPU
        # A model from elsewhere depends on neither the evaluation prompts nor the machine: it is copied and cast.
        config |= {key: base[key] for key in ("dtype", "end_of_turn") if key in base}
        if "training_template" in base:
            config["training_template"] = bases.training_template(self.config, name)
        more: dict[str, Any] = {}
        if source == "path":
            config["path"] = Path(base["path"]).name
            try:
                hashes = sources.folder_hashes(base["path"], f"{self.work}/model_cache.json")
            except InputError as error:
                raise self.config.fail([*bases.place(name), "path"], str(error)) from None
            more["external"] = {"content": sources.content_sha256(hashes)}
        elif source == "gguf":
            config["gguf"] = base["gguf"] | {"file": Path(base["gguf"]["file"]).name}
        elif "revision" not in base["hub"]:
            more["allow_unpinned"] = True
        return self._step("make_base", config, {}, **more)

    def base_needs(self, name: str = "base") -> list[str]:
        """Files of the steps that a model starts from: the evaluation prompts for one made here, none for one from elsewhere."""
        return self.slice_inputs(self.prompts_slice) if self.config.models[name]["source"] == "scratch" else []

    def _start_fingerprint(self, run: str) -> str:
        start = self.start_run(run)
        return self.fingerprint("base", "") if start == "base" else self.fingerprint("merge", start)

    def _train_step(self, run: str) -> dict:
        body = self.experiment(run)
        config = {key: value for key, value in body.items() if key not in ("start_from", "slice")}
        config["lora"] = sweep.lora(self.config, self.config.run(run)[0])
        if body["quantise"] != "none":
            config["quant"] = self.config.data["quant"]
        config["optim"] = "paged_adamw_32bit" if self.config.data["device"] == "cuda" else "adamw_torch"
        parents = {"start": self._start_fingerprint(run), "rows": self.fingerprint("slice", body["slice"])}
        if "reward" in body:
            config["reward"] = rewards(body)
            for model in self.reward_models(run):
                name = self.config.run(model)[0]
                parents |= {
                    f"reward {name}": self.fingerprint("train", model),
                    f"start of {name}": self._start_fingerprint(model),
                }
        return self._step(f"train_{body['method']}", config, parents, seed=self.config.run(run)[1], **self._machine())

    def _merge_step(self, run: str) -> dict:
        body = self.experiment(run)
        config = {"quantise": body["quantise"], "quant": self.config.data["quant"]}
        parents = {"start": self._start_fingerprint(run), "adapter": self.fingerprint("train", run)}
        return self._step(
            "merge", config, parents, threads=self.config.data["threads"]
        )  # in fp32 on the CPU, whatever the device

    def _generate_step(self, task: str, run: str) -> dict:
        evaluation = self.config.data["eval"]
        config = {"batch_size": evaluation["batch_size"], "max_new_tokens": evaluation[task]["max_new_tokens"]}
        return self._step("generate", config, self._evaluated(task, run), **self._machine(evaluation["precision"]))

    def _evaluated(self, task: str, run: str) -> dict[str, str]:
        """The parents of a step that puts a task's prompts to a model: the prompts, and what the model is made of."""
        parents = {"prompts": self.fingerprint("slice", self.config.evaluations[task])}
        if fewshot := choices.fewshot(self.config.data["eval"], task):
            parents["fewshot"] = self.fingerprint("slice", fewshot)
        if run in self.config.models:
            return parents | {"start": self.fingerprint(*self.base_phase(run))}
        return parents | {"start": self._start_fingerprint(run), "adapter": self.fingerprint("train", run)}

    def _score_step(self, task: str, run: str) -> dict:
        if task in CHOICE:
            config, evaluation = choices.step_config(self.config.data["eval"], task), self.config.data["eval"]
            return self._step("lm_eval_task", config, self._evaluated(task, run), **self._machine(evaluation["precision"]))
        parents = {
            "prompts": self.fingerprint("slice", self.config.evaluations[task]),
            "responses": self.fingerprint(f"generate_{task}", run),
        }
        if task == JUDGED:
            model = self.config.data["eval"][JUDGED]["reward"]
            parents |= {"start": self._start_fingerprint(model), "adapter": self.fingerprint("train", model)}
            return self._step("judge_answers", judged.step_config(self.config, model), parents, **self._machine())
        return self._step(f"score_{task}", {"strip_think": self.config.data["eval"][task]["strip_think"]}, parents)

    def _eval_rm_step(self, run: str) -> dict:
        body, config = self.experiment(run), judged.step_config(self.config, self.config.run(run)[0])
        parents = {
            "start": self._start_fingerprint(run),
            "adapter": self.fingerprint("train", run),
            "rows": self.fingerprint("slice", body["slice"]),
        }
        return self._step("eval_rm", config, parents, **self._machine())

    def _report_step(self) -> dict:
        data = self.config.data
        experiments = {
            name: {key: body[key] for key in ("method", "start_from", "slice", "quantise", "reward") if key in body}
            for name, body in self.config.experiments.items()
        }
        families = [
            {"name": name, **family} for name, family in data["report"]["families"].items()
        ]  # their order says which is first
        config = {
            "report": data["report"] | {"families": families},
            "seeds": data["seeds"],
            "experiments": experiments,
            "device": data["device"],
        }
        if "models" in data:
            config["models"] = list(data["models"])
        config["tasks"] = [task for task in self.config.evaluations if task != JUDGED]
        if JUDGED in self.config.evaluations:
            config["judge"] = {key: data["eval"][JUDGED][key] for key in ("reward", "against")}
        if ranks := sweep.ranks(self.config):
            config["sweep"] = ranks
        parents = {
            f"{task} {run}": self.fingerprint(f"score_{task}", run)
            for run in comparison.runs(self.config)
            for task in self.config.evaluations
        }
        parents |= {f"rm {run}": self.fingerprint("eval_rm", run) for run in comparison.reward_models(self.config)}
        return self._step("report", config, parents)
