"""Seconds of computing: unlike those of a clock, they are the same on a machine that has other things to do."""

import os


def seconds() -> float:
    """Of this process, and of the ended ones that it started and waited for, so far."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system
