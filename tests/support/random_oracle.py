"""By hand, what an edit makes stale: for random_edits.py, which makes the edits, and test_random_edits.py.

The oracle asks nothing of the code that it judges. It is these tables: who starts from whom (random_graph.py), which key
stands in which steps (`KEYS`, `METHOD_KEYS`), which file is code of which steps (`CODE`), which library (`PACKAGES`), and
which rows a slice takes (`selection`). An edit names the phases that depend on it directly; what starts from those follows.
A phase is (kind, name): ("slice", "sft"), ("base", "base"), ("train", "dpo"), ("merge", "sft_v2"), ("generate_ifeval", "dpo")...
"""

import json
import random
from pathlib import Path
from typing import Any

from tests.support.random_graph import FINISHED, FROM_FILES, PROMPTS, RUNS, TRAINED_ON, Phase, Run

# -- the config -------------------------------------------------------------------------------------------------------------


def of(*kinds: str) -> set[Phase]:
    return {phase for phase in FINISHED if phase[0] in kinds}


def trained(*runs: str) -> set[Phase]:
    return {("train", run) for run in runs}


# Runs whose base is in 4-bit: all but DPO's own.
QUANTISED = {name for name, run in RUNS.items() if run.method != "dpo"} | {"dpo_4bit"}


def slices(*names: str) -> set[Phase]:
    return {("slice", name) for name in names}


BASE: set[Phase] = {("base", "base")}
ANSWERS = of("generate_ifeval", "generate_gsm8k")
MACHINE = BASE | of("train", "merge", "eval_rm") | ANSWERS
IN_4_BIT = trained(*(run for run in RUNS if RUNS[run].method != "dpo"), "dpo_4bit") | {("eval_rm", "rm")}
NOTHING: set[Phase] = set()
SAME = "the value that it has"
ARC = {"task": "arc_easy", "revision": "a" * 40, "num_fewshot": 0, "chat_template": False, "fewshot_as_multiturn": False}
ARC |= {"system": None, "limit": None}

# Key -> (values that it does not have, the phases in whose step it stands).
KEYS: dict[str, tuple[list, set[Phase]]] = {
    "lora.r": ([8, 32], of("train")),
    "lora.alpha": ([16, 64], of("train")),
    "lora.dropout": ([0.0, 0.1], of("train")),
    "lora.target_modules": ([["q_proj", "v_proj"]], of("train")),
    "quant.double": ([False], IN_4_BIT | of("merge")),  # a merge is measured against its 4-bit start
    "threads": ([2, 3], MACHINE),
    "precision": (["bf16"], MACHINE - BASE - ANSWERS),  # answers have eval.precision
    "device": (["cuda"], MACHINE - BASE),
    "eval.precision": (["bf16"], ANSWERS),
    "generation.backend": (["hf"], ANSWERS),
    "generation.rollouts": (["hf"], trained("ppo", "ppo_ifeval", "grpo", "grpo_numeric", "grpo_rm", "rloo")),
    "eval.decoding": (["folder"], of("generate_ifeval", "generate_gsm8k")),
    "eval.base": (["trained"], {phase for phase in of("generate_ifeval", "generate_gsm8k") if phase[1] in QUANTISED}),
    "eval.ifeval.max_new_tokens": ([9, 33], of("generate_ifeval")),
    "eval.gsm8k.max_new_tokens": ([9, 33], of("generate_gsm8k")),
    "eval.drawn.seed": ([2], NOTHING),  # nothing is drawn here
    "eval.ifeval.strip_think": ([True], of("score_ifeval") | trained("ppo_ifeval", "grpo", "rloo", "grpo_rm")),
    "eval.gsm8k.strip_think": ([True], of("score_gsm8k") | trained("grpo_numeric")),
    "data.max_drop": ([0.5, 0.07], slices(*TRAINED_ON)),
    "data.max_prompt_tokens": ([91], slices(*TRAINED_ON)),
    "data.decontaminate.rule": (["ngram"], slices(*TRAINED_ON)),
    "data.decontaminate.share": ([0.6], slices(*TRAINED_ON)),
    "data.slices.sft.source.tiny.follow": ([0.4], slices("sft")),
    "data.slices.mine.max_prompt_tokens": ([91], slices("mine")),
    "data.slices.mine.group_by": (["topic"], slices("mine")),
    "data.slices.mine.format": (["pairs"], slices("mine")),
    "data.slices.mixed.source.paths": ([["mine/pairs.jsonl", "mine/more.json"]], slices("mixed")),
    "data.slices.rm_pairs.rows": ([60], NOTHING),  # nobody trains on it here
    "base.scratch.seed": ([2], BASE),
    "base.scratch.documents.n": ([1400], BASE),
    "base.scratch.documents.follow": ([0.2], BASE),
    "base.scratch.tokenizer.vocab_size": ([900], BASE),
    "base.scratch.model.hidden_size": ([64], BASE),
    "base.scratch.train.steps": ([29], BASE),
    "base.scratch.train.newton_schulz_steps": ([4], BASE),
    "base.scratch.train.warmup_steps": ([3], BASE),
    "base.scratch.train.muon_learning_rate": ([4.0e-3], BASE),
    "allow_package_mismatch": ([True], FINISHED),
    "methods.kto.class_weights": ([{"desirable": 1.0, "undesirable": 2.0}], trained("kto")),
    "methods.kto.kl_rows": ([4, 8], trained("kto")),
    "methods.rm.max_left_out": ([0.3], trained("rm")),
    "methods.kto.max_left_out": ([0.3], trained("kto")),
    "methods.grpo.require_reward_above_chance": ([False], trained("grpo", "grpo_numeric")),  # grpo_rm has its own
    "methods.ppo.ppo.kl_coef": ([0.07], trained("ppo", "ppo_ifeval")),
    "methods.ppo.ppo.kl_target": ([4.0], trained("ppo", "ppo_ifeval")),
    "experiments.ppo.ppo.gamma": ([0.99], trained("ppo", "ppo_ifeval")),
    "experiments.ppo_ifeval.ppo.whiten_rewards": ([True], trained("ppo_ifeval")),
    "methods.sft.quantise": (["none"], trained("sft_v1", "sft_v2", "sft_v2.seed2")),
    "experiments.dpo.quantise": (["nf4"], trained("dpo", "dpo.seed2", "dpo_ipo", "dpo_base")),  # dpo_4bit has it
    "experiments.grpo.reward": ([{"ifeval": 2.0}], trained("grpo")),  # the other two have their own
    "experiments.grpo_rm.reward": ([{"rm": 0.25, "ifeval": 0.75}, "rm"], trained("grpo_rm")),
    "experiments.rloo.reward": ([{"ifeval": 0.5}], trained("rloo")),
    "rewards.brief.function": (["polite"], trained("rloo")),
    "rewards.brief.strip_think": ([True], trained("rloo")),
    # Decide nothing, or not in this config
    "eval.tasks": ([{"arc": {"metric": "acc", "lm_eval": ARC}}], NOTHING),  # phases of its own
    "eval.batch_size": ([7, 31], NOTHING),  # of generation.backend: hf
    "generation.slots": ([7, 31], NOTHING),
    "generation.chunk": ([7, 31], NOTHING),  # of generation.backend: vllm
    "generation.correct": (["truncated"], trained("grpo", "grpo_numeric", "grpo_rm", "rloo")),
    "generation.cap": ([2.0], NOTHING),  # of generation.correct: truncated
    "methods.rloo.missing_eos_penalty": ([0.5], trained("rloo")),
    "generation.adapter": (["fp32"], NOTHING),  # beside an evaluation in bf16 or fp16
    "track": (["tensorboard"], NOTHING),
    "seeds": ([[1, 2, 3], [2]], NOTHING),
    "checkpoint_minutes": ([3, 0.5], NOTHING),
    "share_gpu": (["never", "always"], NOTHING),
    "deterministic": ([True], NOTHING),
    "speed.unpadded": ([False], NOTHING),
    "speed.dequantised": ([False], NOTHING),
    "speed.fused": ([False], NOTHING),
    "speed.compiled": ([0, 3], NOTHING),
    "speed.captured": ([False], NOTHING),
    **dict.fromkeys(("pathvars.logs", "pathvars.benchmarks"), (["elsewhere"], NOTHING)),
    "allow_unpinned": ([True], NOTHING),
    "rewards.more": ([{"length": {"unit": "words", "least": 0, "most": 9}}], NOTHING),  # nobody is trained with it
    "sweep_ranks": ([[4, 64]], NOTHING),
    "experiments.kto.sweep": (["none"], NOTHING),
    "base.dtype": (["bf16"], NOTHING),
    "base.end_of_turn": (["<end>"], NOTHING),
    "base.path": (["nowhere"], NOTHING),
    "experiments.more": ([{"extends": "dpo", "train": {"beta": 0.5}}], NOTHING),
    "data.slices.more": ([{"kind": "ifeval", "rows": 5, "seed": 1, "source": {"tiny": {"split": "dev"}}}], NOTHING),
    # The same, said in another way
    f"methods.dpo.train.weight_decay {SAME}": ([0], NOTHING),
    f"methods.sft.train.num_train_epochs {SAME}": ([1.0], NOTHING),
    f"methods.sft.train.learning_rate {SAME}": ([0.002], NOTHING),
    f"experiments.dpo_ipo.train.beta {SAME}": ([0.1], NOTHING),
    f"experiments.grpo.reward {SAME}": ([{"ifeval": 1}], NOTHING),
    f"rewards.brief.strip_think {SAME}": ([False], NOTHING),
    f"rewards.brief.file {SAME}": (["./mine/rewards.py"], NOTHING),
    f"data.slices.mine.max_prompt_tokens {SAME}": ([96], NOTHING),
    f"data.slices.mine.source.path {SAME}": (["./mine/pairs.jsonl", "mine/../mine/pairs.jsonl"], NOTHING),
    f"experiments.kto.quantise {SAME}": (["nf4"], NOTHING),
    f"allow_package_mismatch {SAME}": ([False], NOTHING),
}
for _name in (*TRAINED_ON, *PROMPTS.values()):
    KEYS[f"data.slices.{_name}.seed"] = ([5, 6], slices(_name))
    KEYS[f"data.slices.{_name}.rows"] = ([19, 23], slices(_name))
    if _name in TRAINED_ON:
        KEYS[f"data.slices.{_name}.heldout"] = ([4, 5], slices(_name))

# Edits that change who starts from whom: key -> (value, runs as they are then, phases whose step changes itself).
REWIRINGS: list[tuple[str, Any, dict[str, Run], set[Phase]]] = [
    (
        "experiments.dpo.start_from",
        "sft_v1",
        {run: RUNS[run]._replace(start="sft_v1") for run in ("dpo", "dpo_ipo", "dpo_4bit")}
        | {"dpo.seed2": Run("dpo", "sft_v1.seed2", "mine"), "sft_v1.seed2": RUNS["sft_v1"]},
        trained("dpo", "dpo.seed2", "dpo_ipo", "dpo_4bit"),
    ),
    ("experiments.dpo_ipo.start_from", "dpo_4bit", {"dpo_ipo": Run("dpo", "dpo_4bit", "mine")}, trained("dpo_ipo")),
    ("experiments.kto.start_from", "base", {"kto": Run("kto", "base", "pairs")}, trained("kto")),
    ("methods.kto.slice", "mine", {"kto": Run("kto", "sft_v2", "mine")}, trained("kto")),
    ("experiments.dpo_4bit.slice", "mixed", {"dpo_4bit": Run("dpo", "sft_v2", "mixed")}, trained("dpo_4bit")),
    ("experiments.grpo.reward", "rm", {"grpo": Run("grpo", "sft_v2", "instructions", ("rm",))}, trained("grpo")),
    ("experiments.ppo.reward", "ifeval", {"ppo": RUNS["ppo_ifeval"]}, trained("ppo")),
    ("experiments.grpo_rm.reward", "ifeval", {"grpo_rm": RUNS["grpo"]}, trained("grpo_rm")),
    ("experiments.rloo", {"slice": "sums", "reward": "numeric"}, {"rloo": Run("rloo", "sft_v2", "sums")}, trained("rloo")),
]

# Keys under `train:` -> values that no run has.
_ALL = {
    "learning_rate": [1.3e-4, 2.7e-3], "lr_scheduler_type": ["linear", "constant_with_warmup"], "warmup_steps": [0.07, 5],
    "weight_decay": [0.01], "max_grad_norm": [0.5], "num_train_epochs": [2, 1.5], "per_device_train_batch_size": [12],
    "per_device_eval_batch_size": [20], "gradient_accumulation_steps": [2], "gradient_checkpointing": [True],
    "logging_steps": [3], "adam_beta1": [0.8], "adam_beta2": [0.99], "adam_epsilon": [1.0e-7], "max_steps": [5],
}  # fmt: skip
_ROLLOUTS = {
    "num_generations": [2], "num_generations_eval": [5], "max_completion_length": [11], "num_iterations": [2],
    "temperature": [0.9], "top_p": [0.9], "top_k": [50], "beta": [0.27], "epsilon": [0.1],
    "mask_truncated_completions": [True],
}  # fmt: skip
METHOD_KEYS: dict[str, dict[str, list]] = {
    "sft": _ALL | {"max_length": [99], "assistant_only_loss": [False], "loss_type": ["dft"], "neftune_noise_alpha": [5]},
    "dpo": _ALL | {"max_length": [99], "beta": [0.27], "loss_type": ["hinge"]},
    "kto": _ALL | {"max_length": [99], "beta": [0.27], "loss_type": ["apo_zero_unpaired"]},
    "rm": _ALL | {"max_length": [99], "center_rewards_coefficient": [0.01]},
    "ppo": _ALL
    | {"max_completion_length": [11], "steps_per_generation": [4], "num_iterations": [3], "temperature": [0.9]}
    | {"top_p": [0.9], "top_k": [50], "epsilon": [0.1]},
    "grpo": _ALL | _ROLLOUTS | {"loss_type": ["dapo"], "scale_rewards": ["none"]},
    "rloo": _ALL | _ROLLOUTS | {"normalize_advantages": [True]},
}  # fmt: skip
EXTENDS = {"dpo_ipo": "dpo", "dpo_4bit": "dpo", "dpo_base": "dpo", "grpo_numeric": "grpo", "grpo_rm": "grpo"}
EXTENDS["ppo_ifeval"] = "ppo"
OWN = {"sft_v1": {"assistant_only_loss"}, "dpo_ipo": {"loss_type"}, "grpo_numeric": {"max_completion_length"}}

# Keys of methods.yaml that config.yaml or micro.yaml say again: there an edit of methods.yaml decides nothing.
_AGAIN = {"learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
_AGAIN |= {"gradient_checkpointing"}
_AGAIN_ROLLOUTS = _AGAIN | {"lr_scheduler_type", "warmup_steps", "num_generations", "max_completion_length", "beta"}
SAID_AGAIN = {method: _AGAIN | {"max_length"} for method in ("sft", "dpo", "kto", "rm")} | {
    "ppo": _AGAIN | {"lr_scheduler_type", "warmup_steps", "steps_per_generation", "num_iterations", "max_completion_length"},
    "grpo": _AGAIN_ROLLOUTS,
    "rloo": _AGAIN_ROLLOUTS,
}
# And of config.yaml, that micro.yaml says again.
_IN_MICRO = {"max_steps", "per_device_train_batch_size", "max_completion_length"}
IN_MICRO = dict.fromkeys(("grpo", "rloo"), _IN_MICRO | {"num_generations"})
IN_MICRO["ppo"] = _IN_MICRO | {"steps_per_generation", "num_iterations"}


def who_has(method: str, key: str, experiment: str | None = None) -> set[Phase]:
    """The trainings that an edit of `train: key` reaches, in the method's block or in an experiment's."""
    runs = [run for run in RUNS if RUNS[run].method == method]
    if experiment:
        runs = [run for run in runs if experiment in (run.split(".")[0], EXTENDS.get(run.split(".")[0]))]
    return trained(*(run for run in runs if key not in OWN.get(run, ()) or run == experiment))


# -- code and libraries -----------------------------------------------------------------------------------------------------

TRAIN = [f"train_{method}" for method in METHOD_KEYS]
SLICE = ["slice tiny", "slice file"]
SCORE = ["score_ifeval", "score_gsm8k"]
MODELS = ["merge", "generate", "eval_rm", *TRAIN]
ROLLOUTS = ["train_ppo", "train_grpo", "train_rloo"]
EVERY = [*SLICE, "make_base", *MODELS, *SCORE]
# Plumbing; what plans; what only models from elsewhere need.
NO_STEP = """steps/cli plumbing/cards plumbing/content_cache plumbing/gpus plumbing/launch
plumbing/nodes plumbing/ranks plumbing/progress
plumbing/messages plumbing/signals plumbing/startup artifacts/runinfo artifacts/work artifacts/fingerprint artifacts/own_code
config/declared data/hub evaluation/rows config/__init__ config/config config/schema_errors config/yaml_files config/bases
config/comparison config/choices config/judged config/names config/sweep config/written config/tuning config/own_tasks
config/sampled config/losses config/over_gpus config/answering config/schema config/experiments config/references config/slices
plan/__init__
plan/plan plan/places plan/graph plan/steps plan/rewarded plan/records plan/estimate plan/gpu_memory plan/passes plan/patterns
plan/shape plumbing/environment models/sources models/templates""".split()
# The report, which is no target here, and multiple choice, tasks of lm-eval, tuning and sampled slices, which this config has not
REPORT = """steps/select steps/sample steps/choose_rows data/choosing stats/selection report/__init__ report/capacity
report/collect report/drawn report/figures report/judge report/page report/protocols report/sections report/sensitivity
report/trained report/winning steps/report evaluation/lm_tasks steps/lm_eval_task steps/judge_answers steps/own_task
evaluation/own_tasks evaluation/code_eval evaluation/judge_code evaluation/sandbox
data/task_files stats/__init__ stats/accuracy stats/clusters stats/components stats/family
stats/moderated stats/power""".split()
PAGE = [f"report/templates/report.{ending}" for ending in ("html.jinja", "css", "js")]
# File of the package -> the steps that can run it.
CODE: dict[str, list[str]] = {
    **dict.fromkeys(
        (
            "__init__.py",
            "steps/__init__.py",
            "artifacts/__init__.py",
            "artifacts/manifests.py",
            "plumbing/__init__.py",
            "plumbing/jsonl.py",
        ),
        EVERY,
    ),
    **dict.fromkeys(
        ("tiny/__init__.py", "tiny/world.py", "tiny/answers.py", "tiny/instructions.py"), ["slice tiny", "make_base"]
    ),
    **dict.fromkeys(("tiny/pretrain.py", "tiny/muon.py", "tiny/chat_template.jinja"), ["make_base"]),
    **dict.fromkeys(("models/__init__.py", "models/chat.py"), [*SLICE, "make_base", *MODELS]),
    "models/device.py": ["make_base", *MODELS],
    **dict.fromkeys(("models/loading.py", "models/lora.py", "models/distance.py"), MODELS),
    **dict.fromkeys(
        tuple(
            f"training/{name}.py"
            for name in (
                "__init__ trainers checkpoints speed fused captured units change over_ranks exchange passes groups".split()
            )
        ),
        ["eval_rm", *TRAIN],
    ),
    "data/__init__.py": [*SLICE, "make_base", *MODELS, "score_gsm8k"],
    "data/slicing.py": [*SLICE, *MODELS],
    "rl/expressions.py": [],  # of the reward `math`, which this config has not
    **dict.fromkeys(("data/questions.py", "evaluation/compose.py"), []),  # of composed slices, which this config has not
    "data/fitting.py": [*SLICE, "eval_rm", *TRAIN],
    **dict.fromkeys(("data/formats.py", "data/parts.py", "data/words.py"), [*SLICE, *MODELS, "score_gsm8k"]),
    "evaluation/__init__.py": [*SLICE, *SCORE, *ROLLOUTS],
    "evaluation/scores.py": [*SCORE, *ROLLOUTS],
    "steps/scoring.py": SCORE,
    "evaluation/gsm8k.py": ["score_gsm8k"],
    "evaluation/samples.py": [*SCORE, *ROLLOUTS],
    "evaluation/lm_rules.py": ["score_gsm8k", *ROLLOUTS],
    "data/unpaired.py": ["train_kto"],
    "training/reference.py": ["train_dpo", "train_kto"],
    "training/sharded.py": [step for step in TRAIN if step not in ("train_ppo", "train_grpo", "train_rloo")],
    **dict.fromkeys(("training/reference_free.py", *(f"steps/train_{method}.py" for method in ("simpo", "cpo", "orpo"))), []),
    "evaluation/ifeval.py": ["score_ifeval", *ROLLOUTS],
    "evaluation/nltk_data/tokenizers/punkt_tab/english/abbrev_types.txt": ["score_ifeval", *ROLLOUTS],
    "rl/__init__.py": ["eval_rm", "train_rm", *ROLLOUTS],
    "evaluation/numerals.py": ["score_gsm8k", *ROLLOUTS],
    **dict.fromkeys(("rl/verifiers.py", "rl/rewards.py", "rl/placebos.py", "rl/declared.py"), ROLLOUTS),
    **dict.fromkeys(("rl/ppo_trainer.py", "rl/advantages.py"), ["train_ppo"]),
    "rl/reward_model.py": ["eval_rm", "train_rm", *ROLLOUTS],
    **dict.fromkeys(
        tuple(
            f"generation/{n}.py"
            for n in "__init__ answers graphs prefixes decoder attention attention_kernel draws generator hf".split()
        ),
        ["generate", *ROLLOUTS],
    ),
    "rl/rollouts.py": ROLLOUTS,
    "rl/correction.py": [step for step in ROLLOUTS if step != "train_ppo"],
    "generation/vllm_engine.py": ["generate"],
    "steps/slice_data.py": SLICE,
    **{f"steps/{step}.py": [step] for step in ("make_base", "merge", "generate", "eval_rm", *SCORE, *TRAIN)},
    **dict.fromkeys((f"{name}.py" for name in NO_STEP), []),
    **dict.fromkeys((f"tools/{name}.py" for name in "__init__ compare status card push pin runs chat".split()), []),
    **dict.fromkeys([*(f"{name}.py" for name in REPORT), *PAGE], []),
    **dict.fromkeys(("models/chat_templates/chatml_text.jinja", "models/chat_templates/smollm2.jinja"), []),
}
# Modules that run when Snakemake plans: there a statement may be added, and nothing changed.
PLANNING = set(NO_STEP) - {"models/templates"}
PLANNING |= {
    "data/slicing",
    "data/questions",
    "data/task_files",
    "data/formats",
    "data/parts",
    "data/words",
    "artifacts/manifests",
    "plumbing/jsonl",
}

TORCH = [*SLICE, "make_base", *MODELS]
IFEVAL = ["score_ifeval", *ROLLOUTS]
CHECKS = ("pytest", "ruff")  # in the other lock
PACKAGES: dict[str, list[str]] = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "numpy", "Jinja2"), TORCH),
    "datasets": ["eval_rm", *TRAIN],  # training/trainers.py takes rows through it
    **dict.fromkeys(("peft", "accelerate", "bitsandbytes"), MODELS),
    "pandas": ["eval_rm", *TRAIN],
    "trl": TRAIN,
    "scipy": ["eval_rm", *ROLLOUTS],
    **dict.fromkeys(("lm_eval", "nltk", "langdetect"), ["score_gsm8k", *IFEVAL]),
    "PyYAML": ["score_gsm8k", *ROLLOUTS],  # lm-eval's definition of its task gsm8k is read by it
    **dict.fromkeys(("jsonschema", "referencing"), ROLLOUTS),
    **dict.fromkeys((*CHECKS, "snakemake", "tqdm", "statsmodels", "gguf", "tensorboard"), []),
}

# Files of the repository that no step reads.
UNUSED = ["README.md", "CHANGELOG.md", "docs/methods.md", "docs/staleness.md", "Makefile", "pyproject.toml", "tests/conftest.py"]
UNUSED += ["config/schema.yaml", "config/qwen05b.yaml", "config/smollm2.yaml", "profiles/default/profile.yaml", "envs/cpu.yaml"]
UNUSED += ["envs/vllm.yaml", "envs/vllm.lock"]  # of generation.backend: vllm
RULES = "base common data eval merge preflight progress select snakemake_itself train turn".split()
UNUSED += ["LICENSE", "Snakefile", *(f"rules/{name}.smk" for name in RULES)]


def step_of(phase: Phase) -> str:
    """The step, as `CODE` and `PACKAGES` name it, that makes a phase."""
    kind, name = phase
    if kind == "slice":
        return "slice file" if name in FROM_FILES else "slice tiny"
    if kind == "train":
        return f"train_{RUNS[name].method}"
    return {"base": "make_base"}.get(kind, "generate" if kind.startswith("generate") else kind)


def running(steps: list[str]) -> set[Phase]:
    return {phase for phase in FINISHED if step_of(phase) in steps}


# Files of a reward of the user's own, as random_edits.yaml has it -> who is trained with them.
OWN_REWARD = {"mine/rewards.py": trained("rloo"), "mine/own_helper.py": trained("rloo"), "mine/aside.py": NOTHING}


# -- rows -------------------------------------------------------------------------------------------------------------------

# Slice -> (files, rows, seed), as random_edits.yaml has them.
LOCAL = {"mine": (("mine/pairs.jsonl",), 64, 1), "mixed": (("mine/more.json", "mine/pairs.jsonl"), 64, 2)}


def selection(folder: Path, name: str) -> list[tuple[str, int, Any]]:
    """(file, number, row) of the rows that a slice takes: so many of all rows of its files, drawn by its seed.

    A row of JSONL is its line without what ends it, its number that of the line; blank lines count for the number alone.
    """
    files, rows, seed = LOCAL[name]
    there: list[tuple[str, int, Any]] = []
    for file in files:
        text = (folder / file).read_text(encoding="utf-8-sig")
        if file.endswith(".json"):
            there += [(file, number, json.dumps(row)) for number, row in enumerate(json.loads(text), 1)]
        else:
            there += [(file, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [there[i] for i in sorted(random.Random(seed).sample(range(len(there)), rows))]
