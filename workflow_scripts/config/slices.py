"""What a slice's kind and source ask of its other keys."""

from collections.abc import Iterable

from workflow_scripts.config.names import DEVELOPMENT
from workflow_scripts.config.written import Written
from workflow_scripts.data import formats

# Kind of a slice -> (the tiny world's splits for it, the keys that stand beside `split`).
TINY_SOURCES = {
    "sft": (("sft",), {"follow", "numeric"}),
    "preference": (("pairs",), set()),
    "numeric": (("pairs", "eval", "dev"), set()),
    "ifeval": (("pairs", "eval", "dev"), set()),
}


def check(config: Written, name: str, body: dict) -> None:
    """What a slice's kind asks of its other keys."""
    path, kind = ["data", "slices", name], body["kind"]
    if config.trains_on(name):
        if "heldout" not in body:
            raise config.fail([*path, "heldout"], "missing; rows kept from training show whether a method trained at all")
        if not 1 <= body["heldout"] < body["rows"]:
            problem = f"found {body['heldout']}, expected at least 1 and below rows ({body['rows']}); these rows show whether a "
            raise config.fail([*path, "heldout"], problem + "method trained at all")
    _check_rows(config, path, body)
    if "tiny" in body["source"]:
        if kind not in TINY_SOURCES:
            raise config.fail([*path, "kind"], f"found {kind}, expected one of {', '.join(TINY_SOURCES)} for the tiny world")
        tiny, (splits, keys) = body["source"]["tiny"], TINY_SOURCES[kind]
        path += ["source", "tiny"]
        if tiny["split"] not in splits:
            raise config.fail([*path, "split"], f"found {tiny['split']!r}, expected {' or '.join(splits)} for kind {kind}")
        for key in sorted((set(tiny) - {"split"}) ^ keys):
            problem = "missing, and it has no default" if key in keys else f"not for a slice of kind {kind}; leave it out"
            raise config.fail([*path, key], problem)


def check_parts(config: Written, trained: Iterable[str]) -> None:
    """InputError where prompts that something is judged or chosen by may have questions of other composed prompts in use.

    Two of one part are not apart by their questions, whatever their sources. trained: the slices that experiments train on.
    """
    slices = config.data["data"]["slices"]
    parts = {name: body["source"]["composed"]["part"] for name, body in slices.items() if "composed" in body["source"]}
    asked = {name: task for task, name in config.asked.items() if name in parts}
    for name, task in asked.items():
        what = "trials are chosen" if task == DEVELOPMENT else f"{task} is judged"
        for other, part in parts.items():
            if other != name and part == parts[name] and other in {*asked, *trained}:
                problem = f"found {part}, which is also the part of {name}, by which {what}: both may have the same questions; "
                raise config.fail(
                    ["data", "slices", other, "source", "composed", "part"], f"{problem}name the other part in one of them"
                )


def _check_rows(config: Written, path: list, body: dict) -> None:
    """What a slice's rows are asked for: format, groups, files of different names, a revision."""
    kind, source = body["kind"], body["source"]
    below = ["source"]
    if composed := source.get("composed"):
        if kind != "ifeval":
            raise config.fail([*path, "kind"], f"found {kind}, expected ifeval: that is what questions with instructions are")
        if composed["read"] < body["rows"]:
            problem = f"found {composed['read']}, expected at least rows ({body['rows']}): a row gives one prompt at most"
            raise config.fail([*path, "source", "composed", "read"], problem)
        source, below = composed["questions"], ["source", "composed", "questions"]
    for key in ("format", "group_by"):
        if key in body and (kind == "ifeval" or "tiny" in source):
            raise config.fail([*path, key], "not for rows of kind ifeval or of the tiny world; leave it out")
    if "format" in body and body["format"] not in formats.names(kind):
        known = ", ".join(formats.names(kind))
        raise config.fail([*path, "format"], f"found {body['format']!r}, expected one of {known} for kind {kind}")
    if body.get("group_by") in formats.RESERVED:
        problem = f"found {body['group_by']!r}, a key of this pipeline's own rows; rename it in the source"
        raise config.fail([*path, "group_by"], problem)
    names = [file.rsplit("/", 1)[-1] for file in source.get("paths", [])]
    if twice := [name for name in names if names.count(name) > 1]:
        problem = f"two files are called {twice[0]}, and row ids could not tell them apart; rename one"
        raise config.fail([*path, *below, "paths"], problem)
    if "hub" in source and "revision" not in source and not config.data.get("allow_unpinned"):
        problem = "missing; name the full commit (40 hexadecimal digits), or set allow_unpinned: true and let the rows be "
        raise config.fail([*path, *below, "revision"], problem + "whatever the hub holds that day")
