"""What rewards bring into the JSON of a step: of an experiment that samples, and of a choice among answers."""

from pathlib import Path

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config.experiments import VERIFIERS, rewards
from workflow_scripts.plan.graph import Graph

EXPRESSIONS = "workflow_scripts.rl.expressions"


def config(graph: Graph, body: dict) -> dict:
    """The keys of a step's config that come from `reward` of a body: which, how declared, who judges without thoughts."""
    found: dict = {"reward": rewards(body)}
    tasks = {name: graph.config.data["eval"].get(VERIFIERS[name], {}) for name in found["reward"] if name in VERIFIERS}
    if thinking := [name for name, task in tasks.items() if task.get("strip_think")]:
        found["strip_think"] = thinking  # a verifier judges what the evaluation judges
    if declared := graph.declared(body):
        found["rewards"] = {name: _declared(one) for name, one in declared.items()}
    return found | ({"placebo": body["placebo"]} if "placebo" in body else {})


def _declared(body: dict) -> dict:
    """A reward's declaration, without what decides nothing: the folder of its file, and `strip_think: false`."""
    told = {key: value for key, value in body.items() if value is not False}
    return told | ({"file": Path(body["file"]).name} if "file" in body else {})


def with_own_code(graph: Graph, step: dict, declared: dict[str, dict]) -> dict:
    """With what the files of rewards of the user's own do, and what they import of this project and of locked libraries.
    A library that is not in the lock has no declared version, and counts for nothing."""
    if any("math" in body for body in declared.values()):
        step["code"] = step["code"] | fingerprint.code(EXPRESSIONS)
        step["packages"] = step["packages"] | fingerprint.packages(EXPRESSIONS) | fingerprint.versions(["sympy"])
    for name in (name for name, body in declared.items() if "file" in body):
        own = graph.code_of(name)
        step.setdefault("external", {}).setdefault("rewards", {})[name] = own.logic
        for module in own.project:
            step["code"] = step["code"] | fingerprint.code(module)
            step["packages"] = step["packages"] | fingerprint.packages(module)
        step["packages"] = step["packages"] | fingerprint.versions(own.libraries)
    return step
