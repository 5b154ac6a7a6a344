"""Models that are not trained here: where they come from, and what a source asks of the other keys. Runs at parse time.

`base:` is the model that the experiments are made from. `models:` names others that are only scored beside it, such as one that
is known to be better: a positive control. Each has a folder of its name in the results, as the base has.
"""

from pathlib import Path

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config.written import Written

CHATML_TEXT = fingerprint.ROOT / fingerprint.PACKAGE / "models" / "chat_templates" / "chatml_text.jinja"


def place(name: str) -> list[str]:
    """Where a model stands in the config."""
    return ["base"] if name == "base" else ["models", name]


def check(config: Written) -> None:
    """InputError where a model lacks a key that its source asks for, or has the name of an experiment."""
    for name, body in config.models.items():
        path, source = place(name), body["source"]
        if name in config.data["experiments"]:
            raise config.fail(path, f"an experiment has the name {name} too; rename one")
        if source not in body:
            raise config.fail([*path, source], f"missing; {'.'.join(path)}.source is {source}, and this key says which")
        if source == "scratch":
            continue
        if "dtype" not in body:
            raise config.fail([*path, "dtype"], "missing, and it has no default; the weights are saved in it: bf16 or fp32")
        if source == "hub" and "revision" not in body["hub"] and not config.data.get("allow_unpinned"):
            raise config.fail(
                [*path, "hub", "revision"],
                "missing; name the full commit (40 hexadecimal digits), or set allow_unpinned: true and let the model be "
                "whatever the hub holds that day",
            )


def training_template(config: Written, name: str) -> str:
    """The text of the template that a model's `training_template` names: it counts, and not where the file lies."""
    value = config.models[name]["training_template"]
    path = CHATML_TEXT if value == "chatml_text" else Path(value)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{value}: cannot be read: {getattr(error, 'strerror', None) or error}; name a jinja file, or chatml_text"
        raise config.fail([*place(name), "training_template"], problem) from None


def files(body: dict) -> list[str]:
    """The folder or file that a model comes from. Given to its step by hand, not as an edge: planning needs no GGUF file."""
    return {"path": lambda: [body["path"]], "gguf": lambda: [body["gguf"]["file"]]}.get(body["source"], list)()
