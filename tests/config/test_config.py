"""What the config accepts, and that each mistake is one line that names the file, the key and the remedy."""

import copy
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from workflow_scripts.config.config import Config, load
from workflow_scripts.config.experiments import rewards
from workflow_scripts.config.names import REFERENCE_FREE, run_name
from workflow_scripts.config.schema import SCHEMA
from workflow_scripts.config.written import METHODS_FILE, merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "config" / "config.yaml"
SWEEP = ROOT / "config" / "rank_sweep.yaml"
# What names a base stands alone; the others are overlays.
ALONE = sorted(path for path in (ROOT / "config").glob("*.yaml") if re.search(r"^  source: ", path.read_text(), flags=re.M))
SHIPPED = [files for path in ALONE for files in ([path], [path, SWEEP])]
OVER = {"config": ("reference_free",), "qwen05b": ("qwen7b", "large_gpu"), "smollm2": ("smollm2_quick", "large_gpu")}
SHIPPED += [[ROOT / f"config/{name}.yaml", ROOT / f"config/{over}.yaml"] for name, overs in OVER.items() for over in overs]
shipped = pytest.mark.parametrize("files", SHIPPED, ids=lambda files: " ".join(path.stem for path in files))
HUB = "hub: a/b, split: train, shuffle_buffer: 9"
FILE_SLICE = "kind: sft, rows: 9, heldout: 1, seed: 1"
X = "data.slices.x."


def slice_x(source: str) -> str:
    """An overlay with a slice x over this source."""
    return f"data: {{slices: {{x: {{{FILE_SLICE}, source: {source}}}}}}}"


@pytest.fixture
def mistakes(tmp_path):
    """mistakes(overlay): the lines of the error of an overlay (YAML text) laid over the default config."""

    def of(overlay: str) -> list[str]:
        (tmp_path / "overlay.yaml").write_text(overlay)
        with pytest.raises(InputError) as caught:
            load(DEFAULT, tmp_path / "overlay.yaml")
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return of


LORA = "one block for all methods.*Set the global `lora:` on top"
TRL_CONFIGS = {
    "sft": "SFTConfig",
    **dict.fromkeys(("dpo", "simpo", "cpo", "orpo"), "DPOConfig"),
    "kto": "KTOConfig",
    "rm": "RewardConfig",
    **dict.fromkeys(("ppo", "grpo"), "GRPOConfig"),
    "rloo": "RLOOConfig",
}

OF_CPO = {"simpo_gamma", "cpo_alpha"}  # fields of TRL's CPOConfig, which goes with a trainer that is not used
MISTAKES = {
    # overlay: (key path, what the line says, remedy included)
    "experiments: {dpo: {lora: {r: 8}}}": ("experiments.dpo.lora.r", LORA),
    "experiments: {dpo: {lora: 8}}": ("experiments.dpo.lora", LORA),
    "methods: {dpo: {lora: {alpha: 8, r: 4}}}": ("methods.dpo.lora.alpha", LORA),
    "experiments: {dpo: {quant: {double: false}}}": ("experiments.dpo.quant.double", "Set the global `quant:` on top"),
    # types
    "methods: {dpo: {train: {learning_rate: 5e-6}}}": (
        "methods.dpo.train.learning_rate", r"found the string '5e-6', expected a number above 0; write 5\.0e-06"),
    "experiments: {dpo: {train: {learning_rate: 5e-6}}}": ("experiments.dpo.train.learning_rate", r"'5e-6'.*; write 5\.0e-06"),
    "experiments: {dpo: {train: {learning_rate: 125e-8}}}": ("experiments.dpo.train.learning_rate", r"write 1\.25e-06 "),
    "data: {slices: {sft: {rows: '1234567'}}}": ("data.slices.sft.rows", "expected an integer at least 1; write 1234567 "),
    "data: {slices: {sft: {rows: 300.0}}}": ("data.slices.sft.rows", "found 300.0, expected an integer at least 1"),
    "threads: 0": ("threads", "found 0, expected an integer at least 1"),
    "threads: true": ("threads", "found true, expected an integer"),
    "methods: {dpo: {train: {learning_rate: .nan}}}": ("methods.dpo.train.learning_rate", "found nan, expected a number above 0"),
    "methods: {dpo: {train: {beta: .inf}}}": ("methods.dpo.train.beta", "found inf, expected a number above 0"),
    "experiments: {dpo: {train: {beta: 0}}}": ("experiments.dpo.train.beta", "found 0, expected a number above 0"),
    "device: gpu": ("device", "found the string 'gpu', expected one of cpu, cuda"),
    "lora: {bias: all}": ("lora.bias", "found the string 'all', expected 'none'"),
    "lora: {dropout: 1.0}": ("lora.dropout", "found 1.0, expected a number at least 0 below 1"),
    "methods: {sft: {quantise: null}}": ("methods.sft.quantise", r"found nothing \(null\), expected one of nf4, none"),
    "pathvars: {results: ~/results}": ("pathvars.results", r"found the string '~/results'.*~ is no home here, write it out"),
    "pathvars: {logs: ''}": ("pathvars.logs", "found the string '', expected a string .a folder"),
    "seeds: []": ("seeds", "expected a list of at least 1 entries"),
    "seeds: [1, 1]": ("seeds", "expected a list .*without repetition"),
    "experiments: {x: {method: sft, train: 5}}": ("experiments.x.train", "found 5, expected a mapping"),
    "experiments: {x: null}": ("experiments.x", "expected a mapping"),
    "data: {slices: {ifeval: {kind: sftt}}}": ("data.slices.ifeval.kind", "expected one of sft, preference, unpaired, numeric"),
    # unknown keys, on each level
    "experimnts: {}": ("experimnts", "unknown key; known here: .*experiments"),
    "experiments: {dpo: {betta: 0.2}}": ("experiments.dpo.betta", "unknown key; known here: class_weights, extends"),
    "experiments: {dpo: {train: {betta: 0.2}}}": ("experiments.dpo.train.betta", "unknown key for method dpo; .* beta,"),
    "methods: {dpo: {train: {betta: 0.2}}}": ("methods.dpo.train.betta", "unknown key; known here: .*beta"),
    "methods: {orpoo: {}}": ("methods.orpoo", "unknown key; known here: cpo, dpo, grpo, kto, orpo, ppo, rloo, rm, sft"),
    "experiments: {ppo: {ppo: {lambda: 1}}}": ("experiments.ppo.ppo.lambda", "unknown key for method ppo; .* lam,"),
    "experiments: {ppo: {train: {num_generations: 4}}}": ("experiments.ppo.train.num_generations", "unknown key for method ppo"),
    "data: {slices: {sft: {heldot: 3}}}": ("data.slices.sft.heldot", "unknown key; known here: format, group_by, heldout, kind"),
    "data: {slices: {sft: {source: {tiny: {share: 1}}}}}": ("data.slices.sft.source.tiny.share", "here: follow, numeric, split"),
    "base: {scratch: {train: {lr: 1}}}": ("base.scratch.train.lr", "unknown key; known here: adamw_learning_rate"),
    "eval: {ifeval: {strip: true}}": ("eval.ifeval.strip", "unknown key; known here: max_new_tokens"),
    "experiments: {sft_v1: {train: {beta: 0.2}}}": ("experiments.sft_v1.train.beta", "unknown key for method sft"),
    "experiments: {dpo: {train: {packing: true}}}": ("experiments.dpo.train.packing", "unknown key for method dpo"),
    "experiments: {x: {extends: sft_v2, method: dpo, train: {packing: true}}}": ("experiments.x.train.packing", "for method dpo"),
    # references
    "experiments: {dpo: {start_from: nowhere}}": (
        "experiments.dpo.start_from", "found 'nowhere', expected one of base, dpo, dpo_4bit, dpo_flipped, dpo_ipo"),
    "experiments: {dpo: {start_from: nowhere}, a: {extends: dpo}}": ("experiments.dpo.start_from", "found 'nowhere'"),
    "methods: {sft: {start_from: nowhere}}": ("methods.sft.start_from", "found 'nowhere'"),
    "experiments: {sft_v2: {start_from: dpo}}": ("experiments.sft_v2.start_from", "a loop: dpo -> sft_v2 -> dpo; one of"),
    "experiments: {sft_v1: {start_from: sft_v1}}": ("experiments.sft_v1.start_from", "a loop: sft_v1 -> sft_v1"),
    "experiments: {x: {extends: y}, y: {extends: x}}": ("experiments.y.extends", "a loop: x -> y -> x"),
    "experiments: {w: {extends: x}, x: {extends: y}, y: {extends: x}}": ("experiments.y.extends", "a loop: x -> y -> x"),
    "experiments: {x: {extends: nothing}}": ("experiments.x.extends", "found 'nothing', expected one of dpo"),
    "experiments: {x: {train: {}}}": ("experiments.x.method", "missing; name a method, or an experiment with `extends:`"),
    "experiments: {x: {method: spo}}": ("experiments.x.method", "found the string 'spo', expected one of sft, dpo, simpo"),
    "experiments: {x: {method: sft, slice: pairs}}": (
        "experiments.x.slice", "found 'pairs', expected a slice of kind sft to train on: sft"),
    "methods: {dpo: {slice: pears}}": ("methods.dpo.slice", "found 'pears', expected a slice of kind preference to"),
    "eval: {ifeval: {prompts: pairs}}": ("eval.ifeval.prompts", "found 'pairs', expected a slice of kind ifeval"),
    "eval: {gsm8k: {prompts: instructions}}": ("eval.gsm8k.prompts", "found 'instructions', expected a slice of kind numeric"),
    # names
    "experiments: {Dpo: {method: dpo}}": ("experiments.Dpo", "not a name to use here: lower-case letters, digits and _"),
    "experiments: {dpo.seed2: {method: dpo}}": ("experiments.dpo.seed2", "not a name to use here"),
    "experiments: {base: {method: sft}}": ("experiments.base", "not a name to use here.*none of base, data, report"),
    f"experiments: {{{'a' * 42}: {{method: sft}}}}": (f"experiments.{'a' * 42}", "at most 41"),
    # slices
    "data: {slices: {x: {kind: sft, rows: 9, seed: 1, source: {path: a.jsonl}}}}": ("data.slices.x.heldout", "missing; rows"),
    "data: {slices: {sft: {heldout: 0}}}": ("data.slices.sft.heldout", "found 0, expected at least 1 and below rows"),
    "data: {slices: {sft: {rows: 9, heldout: 9}}}": ("data.slices.sft.heldout", r"found 9, expected .* below rows \(9\)"),
    "data: {slices: {ifeval: {heldout: 3}}}": ("data.slices.ifeval.heldout", "leave the key out"),
    f"data: {{slices: {{x: {{{FILE_SLICE}, source: {{pth: a}}}}}}}}": (
        "data.slices.x.source.pth", "known here: composed, config, hub"),
    f"data: {{slices: {{x: {{{FILE_SLICE}, source: a.jsonl}}}}}}": (
        "data.slices.x.source", "of the keys composed, config, hub, path"),
    f"data: {{slices: {{x: {{{FILE_SLICE}, source: {{path: 5}}}}}}}}": ("data.slices.x.source.path", "found 5, expected"),
    "data: {slices: {sft: {source: {path: a.jsonl}}}}": ("data.slices.sft.source", "keys path, tiny, expected exactly one of"),
    # formats, groups, several files, a hub
    slice_x("{path: a}, format: hh"): (X + "format", "found 'hh', expected one of messages, sharegpt, alpaca, gsm8k"),
    slice_x("{path: a}, group_by: messages"): (X + "group_by", "found 'messages', a key of this pipeline's own rows; rename it"),
    "data: {slices: {sft: {format: alpaca}}}": ("data.slices.sft.format", "not for rows of kind ifeval or of the tiny world"),
    "data: {slices: {ifeval: {group_by: key}}}": ("data.slices.ifeval.group_by", "not for rows of kind ifeval"),
    "data: {slices: {sft: {kind: unpaired}}}": ("data.slices.sft.kind", "one of sft, preference, numeric, ifeval for the tiny"),
    "data: {slices: {sums: {source: {tiny: {split: sft}}}}}": (
        "data.slices.sums.source.tiny.split", "found 'sft', expected pairs or eval or dev for kind numeric"),
    slice_x("{paths: []}"): (X + "source.paths", "expected a list of at least 1 entries"),
    slice_x("{paths: [a/b, c/b]}"): (X + "source.paths", "two files are called b, and row ids could not tell them apart"),
    slice_x(f"{{{HUB}}}"): (X + "source.revision", "missing; name the full commit .*, or set allow_unpinned: true"),
    slice_x(f"{{{HUB}, revision: main}}"): (X + "source.revision", "found the string 'main', expected .*full commit"),
    slice_x("{hub: a/b, split: train}"): (X + "source.shuffle_buffer", "missing, and it has no default"),
    "data: {slices: {sft: {source: {tiny: {split: pairs}}}}}": ("data.slices.sft.source.tiny.split", "expected sft for kind sft"),
    "data: {slices: {pairs: {source: {tiny: {follow: 0.5}}}}}": ("data.slices.pairs.source.tiny.follow", "leave it out"),
    f"data: {{slices: {{x: {{{FILE_SLICE}, source: {{tiny: {{split: sft, numeric: 0}}}}}}}}}}": (
        "data.slices.x.source.tiny.follow", "missing, and it has no default"),
}  # fmt: skip


@pytest.mark.parametrize("overlay", MISTAKES)
def test_a_mistake_is_one_line_with_file_key_and_remedy(mistakes, overlay):
    path, words = MISTAKES[overlay]
    lines = mistakes(overlay)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"overlay.yaml: {path}: "), lines[0]
    assert re.search(words, lines[0]), lines[0]


def test_several_mistakes_are_a_line_each(mistakes):
    lines = mistakes("{foo: 1, bar: 2, threads: two, data: {slices: {x: {kind: sft}}}, methods: {dpo: {train: {beta: 0, x: 1}}}}")
    places = [line.split(": ")[1] for line in lines]
    slice_x = [f"data.slices.x.{key}" for key in ("rows", "seed", "source")]
    assert sorted(places) == sorted(["bar", "foo", *slice_x, "methods.dpo.train.beta", "methods.dpo.train.x", "threads"])


def test_mistakes_in_train_of_several_experiments_are_all_said(mistakes):
    lines = mistakes("experiments: {a: {method: sft, train: {beta: 1, x: 1}}, b: {extends: dpo, train: {loss_type: kto_pair}}}")
    assert [line.split(": ")[1] for line in lines] == [
        "experiments.a.train.beta", "experiments.a.train.x", "experiments.b.train.loss_type",
    ]  # fmt: skip


def test_a_key_that_another_method_left_behind_names_where_it_stands_and_who_inherits_it(tmp_path):
    (tmp_path / "overlay.yaml").write_text("experiments: {x: {extends: sft_v1, method: dpo}}")
    with pytest.raises(InputError, match=r"experiments.sft_v1.train.assistant_only_loss: unknown key for method dpo") as caught:
        load(DEFAULT, tmp_path / "overlay.yaml")
    assert str(caught.value).startswith(str(DEFAULT)) and str(caught.value).endswith("(experiments.x inherits it)")


def test_a_mistake_names_the_file_in_which_it_stands(tmp_path):
    data = yaml.safe_load(DEFAULT.read_text())
    data["methods"]["dpo"]["train"]["learning_rate"] = "5e-6"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "over.yaml").write_text("methods: {dpo: {train: {beta: 0.2}}}")
    with pytest.raises(InputError, match=f"^{tmp_path}/mine.yaml: methods.dpo.train.learning_rate: "):
        load(tmp_path / "mine.yaml", tmp_path / "over.yaml")
    (tmp_path / "over.yaml").write_text("methods: {dpo: {train: {learning_rate: 5.0e-6}}}")
    assert load(tmp_path / "mine.yaml", tmp_path / "over.yaml").experiments["dpo"]["train"]["learning_rate"] == 5e-6
    (tmp_path / "over.yaml").write_text("methods: {dpo: {train: {learning_rate: 0}}}")
    with pytest.raises(InputError, match=f"^{tmp_path}/over.yaml: methods.dpo.train.learning_rate: found 0"):
        load(tmp_path / "mine.yaml", tmp_path / "over.yaml")


def test_a_value_of_the_command_line_is_named_as_such_and_the_files_keep_their_own_mistakes():
    user = read_yaml(DEFAULT)
    with pytest.raises(InputError, match=r"^--config: track: found the string 'wandbb'"):
        Config(merge(user, {"track": "wandbb"}), [str(DEFAULT)])
    with pytest.raises(InputError, match=r"^--config: experiments.dpo.train.beta: found 0"):
        Config(merge(user, {"experiments": {"dpo": {"train": {"beta": 0}}}}), [str(DEFAULT)])
    broken = merge(user, {"experiments": {"sft_v1": {"start_from": "nowhere"}}, "track": "wandb"})
    with pytest.raises(InputError, match=r"^--config: experiments.sft_v1.start_from"):
        Config(broken, [str(DEFAULT)])


def test_numbers_in_lists_and_mappings_of_the_command_line_are_numbers():
    """Snakemake reads `--config seeds=[1,2]` as ["1", "2"]."""
    user = merge(read_yaml(DEFAULT), {"seeds": ["1", "2"], "requests": {"time": "4.5"}, "base": {"source": "scratch"}})
    made = Config(user, [str(DEFAULT)])
    assert made.data["seeds"] == [1, 2] and made.data["requests"]["time"] == 4.5
    assert made.data["lora"]["target_modules"] == read_yaml(METHODS_FILE)["lora"]["target_modules"]


def test_a_mistake_of_a_file_is_not_put_on_the_command_line(tmp_path):
    (tmp_path / "over.yaml").write_text(
        "experiments: {dpo: {start_from: nowhere}, x: {method: sft, train: {max_grad_norm: .nan}}}"
    )
    user = merge(merge(read_yaml(DEFAULT), read_yaml(tmp_path / "over.yaml")), {"track": "wandb"})
    with pytest.raises(InputError) as caught:
        Config(user, [str(DEFAULT), str(tmp_path / "over.yaml")])
    assert all(line.startswith(f"{tmp_path}/over.yaml: experiments.") for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", r"bad.yaml: line 2: the key 'c' stands here twice"),
        ("a: 1\nb: 2\na: 3\n", r"bad.yaml: line 3: the key 'a' stands here twice"),
        ("a: {1: x}\n", r"bad.yaml: line 1: YAML reads this key as 1, expected text; put it in quotes"),
        ("\nno: x\n", r"bad.yaml: line 2: YAML reads this key as False"),
        ("? [a]\n: 1\n", r"bad.yaml: line 1: YAML reads this key as \['a'\]"),
        ("a: 1\nb:\n\tc: 1\n", r"bad.yaml: not valid YAML: .*line 3, column 1; YAML takes spaces, no tabs"),
        (
            "a:\u00a01\n",
            r"bad.yaml: expected a mapping of keys on top, found str; line 1 has a no-break space, which is no space to YAML",
        ),
        ("a: 1\nb:\u00a0cpu\nc: 1\n", r"bad.yaml: not valid YAML: .*line 3.*; line 2 has a no-break space"),
        ("a: 1\nb:\n\u00a0\u00a0c: 1\n", r"bad.yaml: line 3: a no-break space, which is no space to YAML; type it anew"),
        ("a:\t1\n", r"bad.yaml: not valid YAML: .*line 1, column 3; YAML takes spaces, no tabs"),
        ("a: 1\n".encode("utf-16"), r"bad.yaml: line 1: not UTF-8 text but UTF-16, as some editors write; save it as UTF-8"),
        ("a: 1\n".encode("utf-16-le"), r"bad.yaml: line 1: not UTF-8 text but UTF-16"),
        ("a: 1\nb: für\n".encode("latin-1"), r"bad.yaml: line 2: not UTF-8 text \(the byte 0xfc\); save it as UTF-8"),
        (
            "# nothing yet\n",
            r"bad.yaml: empty, or comments alone, which Snakemake takes for no config; write",
        ),
        ("a: [1,\n", r"bad.yaml: not valid YAML: .*line 2"),
        ("- a\n", r"bad.yaml: expected a mapping of keys on top, found list"),
        (None, r"bad.yaml: cannot be read: No such file"),
    ],
)
def test_what_is_no_mapping_of_single_text_keys_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as caught:
        read_yaml(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_target_that_was_read_as_a_config_is_told_apart_from_one(tmp_path):
    """`--configfile F TARGET`: Snakemake takes every word that follows for a config file, and a score is JSON."""
    score = tmp_path / "ifeval_dpo.json"
    score.write_text('{"fingerprint": "ab", "step": {}, "prompt_level_strict_acc": 0.5}')
    with pytest.raises(InputError, match=rf"{score}: is a result, no config; .* before it: snakemake {score} --conf"):
        load(DEFAULT, score)


def test_anchors_and_merge_keys_of_yaml_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}


def test_an_experiment_lies_over_what_it_extends_and_that_over_its_method(tmp_path):
    (tmp_path / "over.yaml").write_text(
        "experiments:\n"
        "  one: {extends: dpo, train: {beta: 0.3, ld_alpha: 0.8}}\n"
        "  two: {extends: one, train: {beta: 0.4}, quantise: nf4}\n"
        "  three: {extends: two, train: {loss_type: hinge}, start_from: sft_v1}\n"
    )
    made = load(DEFAULT, tmp_path / "over.yaml").experiments
    methods, own = read_yaml(METHODS_FILE)["methods"]["dpo"], yaml.safe_load(DEFAULT.read_text())["methods"]["dpo"]
    train = {**methods["train"], **own["train"], "beta": 0.4, "ld_alpha": 0.8, "loss_type": "hinge"}
    rest = {"method": "dpo", "slice": "pairs", "quantise": "nf4", "max_left_out": 0.2, "start_from": "sft_v1"}
    assert made["three"] == {**rest, "train": train}
    assert made["dpo"]["train"]["beta"] == 0.1 and "ld_alpha" not in made["dpo"]["train"]
    assert made["one"]["quantise"] == "none" and made["one"]["train"]["loss_type"] == "sigmoid"


def test_merging_changes_neither_side():
    base, over = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 1}}
    before = copy.deepcopy((base, over))
    assert merge(base, over) == {"a": {"b": 1, "c": [2]}, "d": {"e": 1}}
    assert (base, over) == before


def test_a_method_takes_its_own_loss_types_alone(mistakes, tmp_path):
    (tmp_path / "over.yaml").write_text("experiments: {x: {method: sft, train: {loss_type: nll}}}")
    assert load(DEFAULT, tmp_path / "over.yaml").experiments["x"]["train"]["loss_type"] == "nll"
    (line,) = mistakes("experiments: {x: {method: dpo, train: {loss_type: nll}}}")
    assert "expected one of sigmoid, hinge, ipo" in line


def test_one_run_has_one_name():
    config = load(DEFAULT)
    assert config.run("dpo") == ("dpo", 1) and config.run("dpo.seed2") == ("dpo", 2) and config.run("dpo.seed12") == ("dpo", 12)
    for name in ("dpo.seed0", "dpo.seed1", "dpo.seed01", "dpo.seed02"):
        with pytest.raises(InputError, match=r"dpo without a suffix is seed 1; suffixes start at \.seed2"):
            config.run(name)
    for name in ("nothing", "dpo.seed", "dpo.seed2x", "dpo.seed٢", "dpo.seed2.seed3", "dpo\n"):
        with pytest.raises(InputError, match="no experiment of this config"):
            config.run(name)
    assert [run_name("dpo", seed) for seed in (1, 2)] == ["dpo", "dpo.seed2"]
    assert run_name("base", 3) == "base"


@shipped
def test_a_shipped_config_loads_plans_and_has_numbers_of_the_right_type(files):
    config = load(*files)
    assert bool(config.copies) == (SWEEP in files)
    for name, body in config.experiments.items():
        train = body["train"]
        for key in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            assert type(train[key]) in (int, float), (name, key)
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            assert type(train[key]) is int, (name, key)
        assert type(train["gradient_checkpointing"]) is bool


def test_a_named_config_does_not_see_the_default_one(tmp_path):
    data = yaml.safe_load(DEFAULT.read_text())
    data["experiments"] = {"mine": {"method": "sft"}}
    del data["methods"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    config = load(tmp_path / "mine.yaml")
    assert list(config.experiments) == ["mine"]
    assert config.experiments["mine"]["train"]["learning_rate"] == 2e-4  # the study's, not the tiny world's


def test_every_key_of_the_schema_is_a_field_of_the_trl_config_that_it_goes_to():
    import trl

    parts = {method: [f"train_{method}", "train_rollouts"][: 2 if method in ("grpo", "rloo") else 1] for method in TRL_CONFIGS}
    parts |= {method: ["train_reference_free", f"train_{method}"][: 2 if method != "orpo" else 1] for method in REFERENCE_FREE}
    for method, name in TRL_CONFIGS.items():
        fields = {field.name for field in dataclasses.fields(getattr(trl, name))}
        keys = {key for part in ("train", *parts[method]) for key in SCHEMA["$defs"][part]["properties"]}
        assert keys - OF_CPO <= fields, sorted(keys - fields)
        assert "learning_rate" in keys
        required = SCHEMA["$defs"][f"method_{method}"]["properties"]["train"]["allOf"]
        assert {one["$ref"].rsplit("/", 1)[-1] for one in required} == {"train", *parts[method]}
    assert set(TRL_CONFIGS) == set(SCHEMA["properties"]["methods"]["properties"])


@shipped
def test_each_experiment_of_a_shipped_config_makes_its_real_trl_config(files, tmp_path):
    import trl

    from workflow_scripts.training import trainers

    plan = Plan(load(*files))
    for name in plan.config.experiments:
        step = plan.step("train", name) | {"device": "cpu", "precision": "fp32"}
        step["config"] = step["config"] | {"optim": "adamw_torch"}
        job = SimpleNamespace(step=step, config=step["config"], work=tmp_path, track="none", run=name)
        train = {key: value for key, value in step["config"]["train"].items() if key not in OF_CPO}
        made = getattr(trl, TRL_CONFIGS[step["config"]["method"]])(**trainers.arguments(job), **train)
        assert made.use_cpu and made.seed == made.data_seed == 1 and made.report_to == [] and not made.bf16
        for key, value in train.items():
            given = getattr(made, key)
            assert given == value or given == [value], (name, key, given)  # TRL keeps DPO's losses as a list
            assert not isinstance(given, str) or isinstance(value, str), (name, key)
        if step["config"]["train"]["warmup_steps"] == 0.03:
            assert made.get_warmup_steps(100) == 3  # a share, though the field's name says steps


def test_a_reward_replaces_the_one_that_it_is_laid_over_as_a_whole(tmp_path):
    (tmp_path / "over.yaml").write_text(
        "experiments: {mixed: {extends: grpo, reward: {rm: 0.5, ifeval: 0.5}}, one: {extends: mixed, reward: {rm: 1.0}}}"
    )
    made = load(DEFAULT, tmp_path / "over.yaml")
    assert rewards(made.experiments["mixed"]) == {"ifeval": 0.5, "rm": 0.5}
    assert rewards(made.experiments["one"]) == {"rm": 1.0}
    assert rewards(made.experiments["grpo"]) == {"ifeval": 1.0}


def test_a_config_that_names_an_object_of_python_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / "evil.yaml").write_text(f"a: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]\n")
    with pytest.raises(InputError, match="not valid YAML: could not determine a constructor"):
        load(tmp_path / "evil.yaml")
    assert not (tmp_path / "ran").exists()
