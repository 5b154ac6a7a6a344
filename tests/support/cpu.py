"""Seconds of computing: unlike those of a clock, they are the same on a machine that has other things to do."""

import os

of_forks = 0.0  # what ran as forks of another process, to the end: tests/support/warm.py adds it


def seconds() -> float:
    """Of this process, and of the ended ones that it started and waited for, so far."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system + of_forks
