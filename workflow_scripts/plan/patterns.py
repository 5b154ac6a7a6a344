"""Regular expressions for the rules' wildcards. Plumbing: no step imports it."""


def any_of(names: list[str]) -> str:
    """A regular expression for these names, which are words, and for nothing else. None matches nothing.

    Snakemake puts a wildcard's constraint into every pattern of a rule and searches all of it for each file, so that a plain
    alternation of a thousand names takes a fifth of the planning. What names share is written once: a sweep like
    dpo_0001, ..., dpo_0999 takes some tens of characters.
    """
    return _tree(set(names)) if names else "(?!)"


def _tree(words: set[str]) -> str:
    tails: dict[str, set[str]] = {}
    for word in words - {""}:
        tails.setdefault(word[0], set()).add(word[1:])
    heads: dict[str, list[str]] = {}  # what follows -> the first letters that it follows
    for head in sorted(tails):
        heads.setdefault(_tree(tails[head]), []).append(head)
    branches = [(f"[{''.join(first)}]" if first[1:] else first[0]) + tail for tail, first in heads.items()]
    if not branches:
        return ""
    if "" in words:
        return f"(?:{'|'.join(branches)})?"
    return f"(?:{'|'.join(branches)})" if branches[1:] else branches[0]
