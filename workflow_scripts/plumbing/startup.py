"""The fixed cost of a process that loads large libraries. Plumbing: decides no number.

Their modules are a million objects that stay until the process ends. Looking through them for garbage finds none, while they are
loaded and once more when the interpreter ends: a third of what `import peft` took (docs/performance.md).
"""

import atexit
import gc


def begin() -> None:
    """No garbage is looked for until `ready`, and none among what is there at the end."""
    gc.disable()
    atexit.register(gc.freeze)


def ready() -> None:
    """The libraries are loaded, and the work begins: from here on its garbage is found, and only its own is looked through."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
