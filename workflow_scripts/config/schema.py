"""The schema's judgement: every key known, every value of its type and range, each mistake one line with file and path.

`config/schema.yaml` judges the merged config; each experiment, once it is resolved, is judged again by the schema of its method.
"""

import math

from jsonschema import Draft202012Validator, validators

from workflow_scripts.artifacts.fingerprint import ROOT
from workflow_scripts.config.names import REFERENCE_FREE
from workflow_scripts.config.schema_errors import explain
from workflow_scripts.config.written import Written
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plumbing.messages import InputError

SCHEMA_FILE = ROOT / "config" / "schema.yaml"
SCHEMA = read_yaml(SCHEMA_FILE)
CONSTANT_BLOCKS = ("lora", "quant")
# An integer is written as one (JSON Schema takes 16.0 for an integer, `random.sample` and TRL do not), a number is finite.
_Validator = validators.extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ).redefine(
        "number", lambda _, value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ),
)


def _violations(schema: dict, data: dict) -> list[tuple[list, str]]:
    """(path of the key, sentence) of each mistake, once, in the order of the paths."""
    errors = sorted(_Validator(schema).iter_errors(data), key=lambda e: [str(p) for p in e.absolute_path])
    return [found for error in errors for found in explain(error, SCHEMA)]


def _raise(errors: list[InputError]) -> None:
    """One line for each mistake, if there is any."""
    if errors:
        raise InputError("\n".join(dict.fromkeys(map(str, errors))))


def check(config: Written) -> None:
    """InputError on what the schema does not allow, or on a constant block inside a method or an experiment."""
    _refuse_overrides(config)
    _raise([config.fail(path, problem) for path, problem in _violations(SCHEMA, config.data)])


def _refuse_overrides(config: Written) -> None:
    """The constant blocks stand once, on top: a copy inside a method or an experiment is refused with the reason."""
    for group in ("methods", "experiments"):
        bodies = config.data.get(group)
        for name, body in bodies.items() if isinstance(bodies, dict) else ():
            for block in CONSTANT_BLOCKS:
                if isinstance(body, dict) and block in body:
                    keys = sorted(body[block]) if isinstance(body[block], dict) else []
                    raise config.fail(
                        [group, name, block, *keys[:1]],
                        f"refused: `{block}:` is one block for all methods, because a comparison of methods is fair only at "
                        f"equal adapter capacity. Set the global `{block}:` on top of the config, for every method"
                        + (", or declare a rank sweep with `sweep: rank`" if block == "lora" else ""),
                    )


def of_method(body: dict) -> list[tuple[list, str]]:
    """(path of the key, sentence) of each mistake of a resolved experiment, by the schema of its method."""
    schema = {"$defs": SCHEMA["$defs"], "$ref": f"#/$defs/method_{body['method']}"}
    own = {key: value for key, value in body.items() if key not in ("method", "sweep", "placebo")}
    unknown = f"unknown key for method {body['method']};"
    found = [(path, problem.replace("unknown key;", unknown)) for path, problem in _violations(schema, own)]
    free = body["method"] in REFERENCE_FREE
    return [
        (path, f"no reference model in {body['method']}; {problem}" if free and _of_a_reference(path) else problem)
        for path, problem in found
    ]


def _of_a_reference(path: list) -> bool:
    """Whether a key is of what DPO's or KTO's policy is held against."""
    return str(path[-1]).startswith(("precompute_ref", "f_divergence")) or path[-1] == "ref_model"


def check_experiments(config: Written, experiments: dict[str, dict]) -> None:
    """Each resolved experiment against the schema of its method: which keys and values fit is known only now."""
    errors = []
    for name, body in experiments.items():
        for path, problem in of_method(body):
            place = config.place(name, path)
            if place[0] == "experiments" and experiments[place[1]]["method"] != body["method"]:
                problem += f" (experiments.{name} inherits it)"
            errors.append(config.fail(place, problem))
    _raise(errors)
