"""The JSON of each step: everything that decides its outcome, and nothing else.

The resolved config of that step alone, the fingerprints of its parents, code and package versions, and what its external files
contain. The hash of this JSON is the step's fingerprint (artifacts/fingerprint.py).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config import answering, bases, choices, comparison, judged, own_tasks, sampled
from workflow_scripts.config.experiments import rewards
from workflow_scripts.config.names import CHOICE, DEVELOPMENT, JUDGED, run_name
from workflow_scripts.config.tuning import GROUPS, OBJECTIVES, Tuned
from workflow_scripts.data import questions, slicing, task_files
from workflow_scripts.models import sources
from workflow_scripts.plan import rewarded
from workflow_scripts.plan.graph import Graph, seed_of
from workflow_scripts.plumbing.content_cache import ContentCache
from workflow_scripts.plumbing.messages import InputError

STEPS = "workflow_scripts.steps."
COMPOSE = "workflow_scripts.evaluation.compose"


class Steps:
    """Makes the steps of a graph; their parents' fingerprints come from who keeps them (plan/plan.py)."""

    def __init__(self, graph: Graph, fingerprint_of: Callable[[str, str], str]):
        self.graph, self.config, self.fingerprint = graph, graph.config, fingerprint_of
        # The same for every step of a module: thousands of steps share one mapping, which nobody changes.
        self._code, self._packages = cache(fingerprint.code), cache(fingerprint.packages)
        self._of_own_task = cache(self._own_task_alone)

    def make(self, kind: str, name: str) -> dict:
        """kind: slice, samples, base, train, merge, generate_TASK, score_TASK, eval_rm, report; name: a slice's or a run's."""
        verb, _, task = kind.partition("_")
        if verb in ("generate", "score"):
            return getattr(self, f"_{verb}")(task, name)
        return getattr(self, f"_{kind}")(name)

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

    def _slice(self, name: str) -> dict:
        data, body = self.config.data["data"], self.config.slice_body(name)
        config: dict = dict(body)
        parents = {role: self.fingerprint("slice", prompts) for role, prompts in self.graph.avoided(name).items()}
        if self.graph.is_sampled(name):
            return self._choice(name, config, parents)
        if self.config.trains_on(name):  # evaluation prompts are taken as they are: nothing is dropped or held out
            config |= {key: body.get(key, data[key]) for key in ("max_drop", "max_prompt_tokens", "decontaminate")}
            parents["base"] = self.fingerprint("base", "base")
        elif parents:  # refused if they are not apart from what is judged
            config["decontaminate"] = data["decontaminate"]
        more: dict[str, Any] = {}
        read = source = self.graph.rows_source(name)
        if files := self.graph.source_files(name):
            bare = [file.rsplit("/", 1)[-1] for file in files]
            read = {"file": bare[0]} if "path" in source else {"files": bare}
            more["external"] = {"candidate_rows": self._candidate_rows(name, files)}
        elif "hub" in source:
            more["external"] = {key: source.get(key) for key in ("hub", "revision", "split")}
        config["source"] = read
        if composed := body["source"].get("composed"):
            config |= {"source": {"composed": composed | {"questions": read}}, "decontaminate": data["decontaminate"]}
        step = self._step("slice_data", config, parents, tiny=self.graph.is_tiny_slice(name), **more)
        if composed:  # lm-eval draws instructions there alone, so its module is not in the step's import closure
            step["code"] = step["code"] | self._code(COMPOSE, False)
            step["packages"] = step["packages"] | self._packages(COMPOSE, False)
        if "hub" in source:  # `datasets` shuffles the stream; the same
            step["packages"] = step["packages"] | {"datasets": fingerprint.locked()["datasets"]}
        return step

    def _samples(self, name: str) -> dict:
        """The answers of a sampled slice: what decides them, and not what is kept of them."""
        asked, data = self.graph.sampling(name)[1], self.config.data
        config = {key: asked[key] for key in ("rows", "seed")}
        config["source"] = {"sampled": {key: value for key, value in asked.items() if key not in ("run", "prompts", *config)}}
        backend = {"backend": "graphs", "adapter": "match"}
        hf = {"backend": "hf", "batch_size": data["eval"]["batch_size"]}
        config["generation"] = backend if data["generation"]["rollouts"] == "graphs" else hf
        parents = {"prompts": self.fingerprint("slice", asked["prompts"])} | self._model(asked["run"])
        return self._step("sample", config | self._quantised(asked["run"]), parents, seed=seed_of(name), **self._machine())

    def _choice(self, name: str, config: dict, parents: dict[str, str]) -> dict:
        """The choice among the answers of a sampled slice. What its answers were asked for stands in theirs."""
        (owner, asked), found, data = self.graph.sampling(name), sampled.block(self.config, name), self.config.data["data"]
        choice = {key: found[key] for key in ("keep", "least", "pair", "margin", "flip_labels") if key in found}
        config |= {key: config.get(key, data[key]) for key in ("max_drop", "max_prompt_tokens", "decontaminate")}
        config |= {"source": {"sampled": choice}} | rewarded.config(self.graph, found)
        if models := self.graph.judges(name):
            config["require_reward_above_chance"] = found["require_reward_above_chance"]
        parents |= {"base": self.fingerprint("base", "base"), "answers": self.fingerprint("samples", owner)}
        parents |= {"prompts": self.fingerprint("slice", asked["prompts"])} | self._judges(models)
        more: dict[str, Any] = {"seed": seed_of(name)} if "placebo" in found else {}
        step = self._step("choose_rows", config, parents, **more, **(self._machine() if models else {}))
        return rewarded.with_own_code(self.graph, step, self.graph.declared(found))

    def _candidate_rows(self, name: str, files: list[str]) -> str:
        """The hash of the rows that seed and limit pick. InputError, with the key, where they can't be read or do not suffice."""
        body, cache = self.config.slice_body(name), f"{self.graph.work}/content_cache.json"
        composed = body["source"].get("composed")
        try:
            if composed:
                return questions.candidates_hash(files, composed, body["rows"], body["seed"], cache)
            return slicing.candidates_hash(files, body["rows"], body["seed"], body["kind"], body.get("group_by"), cache)
        except InputError as error:
            key = "path" if "path" in self.graph.rows_source(name) else "paths"
            place = ["source", "composed", "questions", key] if composed else ["source", key]
            raise self.config.fail(["data", "slices", name, *place], str(error)) from None

    def _base(self, name: str) -> dict:
        base = self.config.models[name]
        source = base["source"]
        config = {"source": source, source: base[source]}
        if source == "scratch":
            parents = {"prompts": self.fingerprint("slice", self.graph.prompts_slice)}
            return self._step("make_base", config, parents, tiny=True, threads=self.config.data["threads"])  # in fp32, on the CPU
        # A model from elsewhere depends on neither the evaluation prompts nor the machine: it is copied and cast.
        config |= {key: base[key] for key in ("dtype", "end_of_turn") if key in base}
        if "training_template" in base:
            config["training_template"] = bases.training_template(self.config, name)
        more: dict[str, Any] = {}
        if source == "path":
            config["path"] = Path(base["path"]).name
            try:
                hashes = sources.folder_hashes(base["path"], f"{self.graph.work}/model_cache.json")
            except InputError as error:
                raise self.config.fail([*bases.place(name), "path"], str(error)) from None
            more["external"] = {"content": sources.content_sha256(hashes)}
        elif source == "gguf":
            config["gguf"] = base["gguf"] | {"file": Path(base["gguf"]["file"]).name}
        elif "revision" not in base["hub"]:
            more["allow_unpinned"] = True
        return self._step("make_base", config, {}, **more)

    def _start_fingerprint(self, run: str) -> str:
        start = self.graph.start_run(run)
        return self.fingerprint("base", "base") if start == "base" else self.fingerprint("merge", start)

    def _train(self, run: str) -> dict:
        if (tuned := self.graph.tuned(run)) is not None:
            return self._select(run, tuned)
        body, config = self.graph.experiment(run), self._train_config(run)
        parents = {"start": self._start_fingerprint(run), "rows": self.fingerprint("slice", self.graph.slice_of(run))}
        parents |= self._judges(self.graph.reward_models(run))
        step = self._step(f"train_{body['method']}", config, parents, seed=self.config.run(run)[1], **self._machine())
        return rewarded.with_own_code(self.graph, step, self.graph.declared(body))

    def _judges(self, models: list[str]) -> dict[str, str]:
        """The parents of a step that reward models judge in."""
        parents: dict[str, str] = {}
        for model in models:
            name = self.config.run(model)[0]
            parents |= {
                f"reward {name}": self.fingerprint("train", model),
                f"start of {name}": self._start_fingerprint(model),
            }
        return parents

    def _train_config(self, run: str) -> dict:
        body = self.graph.experiment(run)
        config = {key: value for key, value in body.items() if key not in ("start_from", "slice")}
        config["lora"] = self.config.lora(self.config.run(run)[0])
        if body["quantise"] != "none":
            config["quant"] = self.config.data["quant"]
        config["optim"] = "paged_adamw_32bit" if self.config.data["device"] == "cuda" else "adamw_torch"
        if "reward" in body:
            config |= {"generation": self.config.data["generation"]["rollouts"]} | rewarded.config(self.graph, body)
            config |= answering.correction(self.config, body["method"])
        return config

    def _select(self, run: str, tuned: Tuned) -> dict:
        """The choice among trials: an adapter like any other, which was trained as one of them. What trials share stands in its
        config as in theirs."""
        body, seed = self.graph.experiment(run), self.config.run(run)[1]
        by = OBJECTIVES[body["method"]] if tuned.objective else (self.config.development["task"],)
        trials = [
            {"name": name, "point": point, "run": run_name(name, seed), "judged": self.graph.judging(run, name)}
            for name, point in tuned.trials.items()
        ]
        config, varied = self._train_config(run), next(iter(tuned.trials.values()))
        config |= {
            group: {key: value for key, value in config[group].items() if f"{group}.{key}" not in varied}
            for group in GROUPS
            if group in config
        }
        config |= {"trials": trials, "by": {"objective" if tuned.objective else "task": list(by)}}
        config["per_seed"] = self.config.data["tune"]["per_seed"]
        parents = {"start": self._start_fingerprint(run), "rows": self.fingerprint("slice", self.graph.slice_of(run))}
        parents |= {f"adapter {one}": self.fingerprint("train", one) for one in self.graph.chosen_from(run)}
        scores = self.graph.development_scores(run)
        parents |= {f"score {one}": self.fingerprint(f"score_{DEVELOPMENT}", one) for one in scores}
        return self._step("select", config, parents, seed=seed, **self._machine())

    def _merge(self, run: str) -> dict:
        body = self.graph.experiment(run)
        config = {"quantise": body["quantise"], "quant": self.config.data["quant"]}
        parents = {"start": self._start_fingerprint(run), "adapter": self.fingerprint("train", run)}
        return self._step(
            "merge", config, parents, threads=self.config.data["threads"]
        )  # in fp32 on the CPU, whatever the device

    def _generate(self, task: str, run: str) -> dict:
        evaluation = self.config.data["eval"]
        config = {"max_new_tokens": self.config.task(task)["max_new_tokens"], "decoding": evaluation["decoding"]}
        config |= {"generation": self.config.generation()} | self._quantised(run)
        if drawn := self.config.drawn(task):
            config["drawn"] = drawn
        step = self._step("generate", config, self._evaluated(task, run), **self._machine(evaluation["precision"]))
        return answering.served(self.config, step, run)

    def _quantised(self, run: str) -> dict:
        return {"quant": self.config.data["quant"]} if self.config.judged_in_4bit(run) else {}

    def _evaluated(self, task: str, run: str) -> dict[str, str]:
        """The parents of a step that puts a task's prompts to a model: the prompts, and what the model is made of."""
        parents = {"prompts": self.fingerprint("slice", self.config.asked[task])}
        if fewshot := choices.fewshot(self.config.data["eval"], task):
            parents["fewshot"] = self.fingerprint("slice", fewshot)
        return parents | self._model(run)

    def _model(self, run: str) -> dict[str, str]:
        """The parents that what is judged is made of."""
        parents: dict[str, str] = {}
        run, view = self.config.view(run)
        if run in self.config.models:
            return parents | {"start": self.fingerprint("base", run)}
        if view == "merged":
            return parents | {"start": self.fingerprint("merge", run)}
        return parents | {"start": self._start_fingerprint(run), "adapter": self.fingerprint("train", run)}

    def _own_task(self, task: str, run: str) -> dict:
        """A task of `eval.tasks`, which is asked and scored in one step."""
        config, external = self._of_own_task(task)
        config, precision = config | self._quantised(run), self.config.data["eval"]["precision"]
        step = self._step("own_task", config, self._model(run), external=external, **self._machine(precision))
        return answering.served(self.config, step, run)

    def _own_task_alone(self, task: str) -> tuple[dict, dict]:
        """(config, what its files hold) of a task, whoever is asked."""
        evaluation, config = self.config.data["eval"], own_tasks.step_config(self.config, task)
        if own_tasks.output_type(self.config, task) == "generate_until":
            config |= {"decoding": evaluation["decoding"], "generation": self.config.generation()}
        else:
            config["batch_size"] = evaluation["batch_size"]
        external = {}
        if "file" in config["lm_eval"]:  # lm-eval's own are of its version
            external["definition"] = own_tasks.definition(self.config, task).sha256()
        if files := own_tasks.rows(self.config, task):
            kept = ContentCache(f"{self.graph.work}/content_cache.json")
            external["rows"] = kept.hash_of(files, lambda: task_files.sha256(files), ["eval.tasks"])
        return config, external

    def _score(self, task: str, run: str) -> dict:
        if task in self.config.own_tasks:
            return self._own_task(task, run)
        if task in CHOICE:
            evaluation = self.config.data["eval"]
            config = choices.step_config(evaluation, task) | self._quantised(run)
            return self._step("lm_eval_task", config, self._evaluated(task, run), **self._machine(evaluation["precision"]))
        parents = {
            "prompts": self.fingerprint("slice", self.config.asked[task]),
            "responses": self.fingerprint(f"generate_{task}", run),
        }
        if task == JUDGED:
            model = self.config.data["eval"][JUDGED]["reward"]
            parents |= {"start": self._start_fingerprint(model), "adapter": self.fingerprint("train", model)}
            return self._step("judge_answers", self._judge(model), parents, **self._machine())
        of = self.config.development["task"] if task == DEVELOPMENT else task
        return self._step(f"score_{of}", {"strip_think": self.config.task(task)["strip_think"]}, parents)

    def _judge(self, model: str) -> dict:
        return judged.step_config(self.config.experiments[model], self.config.data["quant"])

    def _eval_rm(self, run: str) -> dict:
        config = self._judge(self.config.run(run)[0])
        parents = {
            "start": self._start_fingerprint(run),
            "adapter": self.fingerprint("train", run),
            "rows": self.fingerprint("slice", self.graph.slice_of(run)),
        }
        return self._step("eval_rm", config, parents, **self._machine())

    def _report(self, name: str) -> dict:
        data = self.config.data
        experiments = {
            name: {key: body[key] for key in ("method", "start_from", "slice", "quantise", "reward", "placebo") if key in body}
            for name, body in self.config.experiments.items()
            if name not in self.config.trials
        }
        for body in experiments.values():
            if self.graph.is_sampled(body["slice"]):
                owner, asked = sampled.asking(self.config, body["slice"])
                found = {key: asked[key] for key in ("run", "prompts", "n")}
                body["sampled"] = found | {"answers": owner, "reward": rewards(sampled.block(self.config, body["slice"]))}
        for view in comparison.views(self.config):
            run, how = self.config.view(view)
            if run not in self.config.models:
                experiments[view] = experiments[run] | {"of": run, "view": how}
        families = [
            {"name": name, **family} for name, family in data["report"]["families"].items()
        ]  # their order says which is first
        config = {
            "report": data["report"] | {"families": families},
            "seeds": data["seeds"],
            "experiments": experiments,
            "device": data["device"],
        }
        of_models = [name for name in comparison.views(self.config) if self.config.view(name)[0] in self.config.models]
        if "models" in data or of_models:
            config["models"] = [*data.get("models", {}), *of_models]
        config["tasks"] = comparison.verdict_tasks(self.config)
        if protocols := own_tasks.protocols(self.config):
            config["protocols"] = protocols
        if JUDGED in self.config.evaluations:
            config["judge"] = {key: data["eval"][JUDGED][key] for key in ("reward", "against")}
        if ranks := comparison.ranks(self.config):
            config["sweep"] = ranks
        parents = {
            f"{task} {run}": self.fingerprint(f"score_{task}", run)
            for run in comparison.runs(self.config)
            for task in self.config.scored
        }
        if self.config.tuned:
            config["tune"] = comparison.tuned(self.config)
            parents |= {f"{task} {run}": self.fingerprint(f"score_{task}", run) for task, run in self.graph.trial_scores()}
        parents |= {f"rm {run}": self.fingerprint("eval_rm", run) for run in comparison.reward_models(self.config)}
        return self._step("report", config, parents)
