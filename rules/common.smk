# What the rules share: the plan (which step has which JSON and which inputs) and the one call that runs a step.
import inspect
import json
import os
import shlex
import sys
from functools import cache
from pathlib import Path

from workflow_scripts.artifacts.fingerprint import ROOT
from workflow_scripts.config import bases, names
from workflow_scripts.config import config as configs
from workflow_scripts.plan import estimate
from workflow_scripts.plan.patterns import any_of
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing import cards, gpus
from workflow_scripts.plumbing.environment import name_the_account, run_code_of
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import adopt

run_code_of(ROOT)  # jobs run the code that was hashed
name_the_account()

try:
    PLAN = Plan(configs.Config(config, [str(file) for file in workflow.configfiles]))
    PLAN.check()
    # Snakemake trusts what it has no record of. (A job that parses this on another machine needs no records.)
    if workflow.is_main_process and workflow.workflow_settings.persistence_backend.name == "FILE":
        adopt.check(PLAN.config, PLAN.results)
except InputError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(1)

DEVICE = PLAN.config.data["device"]
THREADS = PLAN.config.data["threads"]
GPU = 1 if DEVICE == "cuda" else 0
ESTIMATES = estimate.Estimates(PLAN)
# What decides no number: not a parameter, since Snakemake would record it, and rerun for it.
OPTIONS = (
    f"--work {shlex.quote(PLAN.work)} --track {PLAN.config.data['track']}"
    f" --checkpoint-minutes {PLAN.config.data['checkpoint_minutes']} --slots {PLAN.config.data['generation']['slots']}"
    f" --speed {shlex.quote(json.dumps(PLAN.config.data['speed']))}"
    f"{' --deterministic' if PLAN.config.data['deterministic'] else ''}"
)
# Several jobs at once say how far they are in a folder, whose lines are shown together (rules/progress.smk).
BOARD = Path(PLAN.work) / "board"
if workflow.is_main_process and workflow.local_exec and (workflow.resource_settings.cores or 1) > THREADS:
    OPTIONS += f" --board {shlex.quote(str(BOARD))}"
# Jobs of a scheduler have the GPUs that they were given.
SHARE = {"always": True, "local": workflow.is_main_process and workflow.local_exec, "never": False}[PLAN.config.data["share_gpu"]]
OFFERED = {}  # what GPUs this host has, once a real run begins: GPU -> MiB
ENV = f"../envs/{'cuda' if DEVICE == 'cuda' else 'cpu'}.yaml"
# Of jobs that answer: vLLM pins libraries of its own.
ANSWER_ENV = "../envs/vllm.yaml" if PLAN.config.generation()["backend"] == "vllm" else ENV

# A run is an experiment, or one with `.seedN` (N from 2): one run has one name.
SEED = r"(\.seed([2-9]|[1-9][0-9]+))?"


def way_of(name):
    """Of an experiment: whether its base lies in parts, and whether it trains over several nodes."""
    return PLAN.config.parts[name] > 1, PLAN.config.nodes[name] > 1


def runs_of(*methods, chosen=True, ways=None):
    """A wildcard constraint: the runs of these methods. chosen: with those whose adapter is chosen among trials; ways: those that
    train in one of these (`way_of`)."""
    names = [name for name, body in PLAN.config.experiments.items() if body["method"] in methods]
    names = [name for name in names if ways is None or way_of(name) in ways]
    return any_of([name for name in names if chosen or name not in PLAN.config.tuned]) + SEED


MODELS = any_of(PLAN.config.models)
SLICES = list(PLAN.config.data["data"]["slices"])
# Slices that a run makes, of a seed as that run is; those whose answers several jobs share, and the others.
SAMPLED = any_of([name for name in SLICES if PLAN.is_sampled(name)]) + SEED
SAMPLED_SHARDED = any_of([name for name in SLICES if PLAN.is_sampled(name) and PLAN.sample_shards(name) > 1]) + SEED
SAMPLED_WHOLE = any_of([name for name in SLICES if PLAN.is_sampled(name) and PLAN.sample_shards(name) == 1]) + SEED
# What is trained to answer: every run but reward models.
TRAINED = runs_of(*(set(PLAN.config.data["methods"]) - {"rm"}))
# ... in whatever way it is judged.
OF_MODELS = [name for name in PLAN.config.judged if PLAN.config.view(name)[0] in PLAN.config.models]
ANSWERING = f"{any_of(OF_MODELS)}|{any_of(set(PLAN.config.judged) - set(OF_MODELS)) + SEED}"
# Tasks that are answered in text; those whose answers are then scored; and those of multiple choice, which one step does.
ANSWERED = names.answered(PLAN.config.asked)
SCORED = any_of([task for task in ANSWERED if task not in (names.JUDGED, names.DEVELOPMENT)])
CHOICE = any_of([task for task in PLAN.config.evaluations if task in names.CHOICE])
OWN_TASKS = any_of(list(PLAN.config.own_tasks))
# What has its answers judged by a reward model.
JUDGED = ANSWERING if names.JUDGED in PLAN.config.evaluations else any_of([])
# Tasks whose prompts several jobs share, and the others.
SHARDED = any_of([task for task in ANSWERED if PLAN.shards(task) > 1])
WHOLE = any_of([task for task in ANSWERED if PLAN.shards(task) == 1])


def signed(function):
    """The function with its signature beside it: Snakemake asks for it at each call, and `inspect` would build it each time."""
    function.__signature__ = inspect.signature(function)
    return function


ON_GPU = "--gpu-mb {resources.gpu_mb}" if GPU else ""


@cache
def spread_of(run):
    """Of a training: its processes, each with a GPU where it has one, and their nodes."""
    name = PLAN.config.run(run)[0]
    return PLAN.config.gpus[name], PLAN.config.nodes[name]


@signed
def ranks_of(wildcards):
    return spread_of(wildcards.run)[0]


@signed
def nodes_of(wildcards):
    return spread_of(wildcards.run)[1]


@signed
def threads_of(wildcards):
    """Of a training; over several nodes, those of one process."""
    return THREADS * (spread_of(wildcards.run)[0] if spread_of(wildcards.run)[1] == 1 else 1)


@signed
def gpus_of(wildcards):
    """Of a training on one node; over several, each process asks for its own (SPREAD)."""
    return GPU * spread_of(wildcards.run)[0] if spread_of(wildcards.run)[1] == 1 else 0


@signed
def tasks_on_each(wildcards):
    """Of a training over several nodes; Slurm's executor refuses a single one, of which srun then takes one."""
    return max(2, ranks_of(wildcards) // nodes_of(wildcards))


# What a training over several nodes asks Slurm's executor for, beside what it asks on each. `mpi`: the step itself calls srun.
SPREAD = {"mpi": "srun", "nodes": nodes_of, "tasks_per_node": tasks_on_each}
if GPU:
    SPREAD["gres"] = signed(lambda wildcards: f"gpu:{ranks_of(wildcards) // nodes_of(wildcards)}")


SHARD = {False: (), True: ("--shard",)}  # of the command
NODES = {False: (), True: ("--nodes {resources.nodes}",)}


def call(step, out, *more):
    """The one shell command of a rule: a step's module, and the output that it is told (the others lie beside it)."""
    words = [
        f"exec python -m workflow_scripts.steps.{step} --step {{params.step:q}} --inputs {{input:q}}",
        *more,
        f"--out {{output.{out}:q}} {OPTIONS.replace('{', '{{').replace('}', '}}')} --log {{log:q}}",
    ]
    return " ".join(words)


def asks(key, kind):
    """A resource of a rule, from the estimate of its step (plan/estimate.py); more with each attempt, in case it lacked some.

    A kind that ends in `_` is of the wildcard's task.
    """

    def ask(wildcards, attempt):
        whole = kind + wildcards.task if kind.endswith("_") else kind
        asked = ESTIMATES.ask(whole, wildcards.get("slice") or wildcards.get("run", ""), attempt)[key]
        return -(-asked // nodes_of(wildcards)) if kind == "train" and key == "mem_mb" else asked  # of each node

    return signed(ask)


def by_model(wildcards):
    """Whether a reward model chooses the rows of a sampled slice."""
    return bool(PLAN.judges(wildcards.slice))


def room(kind, needed=lambda wildcards: True):
    """The MiB of a GPU that a job asks for, as a resource; all of one where jobs do not share it, or it has no more.

    Not detected: where a run begins, what its host has bounds it (rules/turn.smk). needed: whether a job takes a GPU at all.
    """

    def ask(wildcards):
        if not needed(wildcards):
            return 0
        whole = kind + wildcards.task if kind.endswith("_") else kind
        count = ranks_of(wildcards) if kind == "train" else 1
        alone = count > 1 or not SHARE  # ranks take whole cards
        asked = gpus.WHOLE if alone else ESTIMATES.gpu_mb(whole, wildcards.get("slice") or wildcards.run)
        return min(count * min(asked, max(OFFERED.values(), default=asked)), sum(OFFERED.values()) or count * asked)

    return {"gpu_mb": signed(ask)} if GPU else {}


@signed
def prompts_of(wildcards):
    return edges(PLAN.prompts_inputs(wildcards.task))


@signed
def own_task_inputs(wildcards):
    return edges(PLAN.own_task_inputs(wildcards.task))


@signed
def own_env(wildcards):
    """Of a task of `eval.tasks`: what is answered in text is answered where all answers are, the rest where all else is."""
    return ANSWER_ENV if "generation" in PLAN.step(f"score_{wildcards.task}", wildcards.run)["config"] else ENV


def edges(files):
    """The edges of the DAG: manifests as they are, everything else `ancient()`.

    What is stale is decided by the parameter, which holds the parents' fingerprints, never by time: a manifest is small,
    so Snakemake compares it by checksum where it is newer. It must not be `ancient()`: where a job is planned, Snakemake 9
    does not look at the parameters of the jobs below it, and plans them only through an edge that is not ancient.

    Edges are what planning costs, so a file is none where the edge to a manifest says all: to its own, for weights and rows,
    or to that of the merge that it went into. It is one where it is gone and that manifest is not: then it is made again.
    """
    take_turn()
    behind = {file: manifest for manifest in files for file in PLAN.behind(manifest)}
    return [edge(file) for file in files if file not in behind or not is_there(file) and is_there(behind[file])]


is_there = cache(os.path.exists)


@cache
def edge(file):
    return file if file.endswith("manifest.json") else ancient(file)


@signed
def base_inputs(wildcards):
    return edges(PLAN.base_needs(wildcards.run))


@signed
def slice_inputs(wildcards):
    files = PLAN.source_files(wildcards.slice)
    for prompts in PLAN.avoided(wildcards.slice).values():
        files += PLAN.slice_inputs(prompts)
    if PLAN.config.trains_on(wildcards.slice):
        files += PLAN.base_inputs()
    return edges(files)


@signed
def choice_inputs(wildcards):
    """With the base's manifest, whose tokenizer it asks: behind the merge that a reward model starts from, it would be no edge."""
    found = edges(PLAN.choice_inputs(wildcards.slice))
    return found + [file for file in PLAN.base_inputs()[:1] if file not in found]


@signed
def train_inputs(wildcards):
    return edges(PLAN.train_inputs(wildcards.run))


@signed
def select_inputs(wildcards):
    """Score files are not `ancient()`, as in `report_inputs`."""
    return edges(PLAN.train_inputs(wildcards.run)) + PLAN.score_files(wildcards.run)


@signed
def answers_of(wildcards):
    return edges(PLAN.answers_inputs(wildcards.task, wildcards.run))


@signed
def model_inputs(wildcards):
    """What a run is judged as: the model that it starts from with its adapter, a merged model, or one that is not trained here."""
    return edges(PLAN.judged_inputs(wildcards.run))


@signed
def base_files(wildcards, input):
    """The folder or file of a model: not an input, so that a clone can plan without it; what it holds is in the step."""
    return " ".join(shlex.quote(file) for file in bases.files(PLAN.config.models[wildcards.run]))


@signed
def report_inputs(wildcards):
    """Score files, which are small and their own manifests. Not `ancient()`, for the reason above."""
    take_turn()
    return PLAN.report_inputs()


wildcard_constraints:
    run=any_of({*PLAN.config.models, *PLAN.config.experiments, *PLAN.config.judged}) + SEED,
    slice=any_of(SLICES) + SEED,
