"""Messages to people. Plumbing: nothing here may decide a number, so the code fingerprint leaves this module out."""


class InputError(Exception):
    """Something that the user gave is wrong. The text names the place, what was found, what was expected and the remedy."""


class Interrupted(Exception):
    """The step was asked to end and did, in a state from which it can go on. The text says where."""
