"""Progress of long work: a bar with ETA on a terminal, plain lines in a log. Plumbing: decides no number.

Where several jobs run at once their bars would overwrite each other: each writes its line into a file of a folder, the board, and
who started them shows the lines together (rules/progress.smk).
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TextIO

_terminal: TextIO | None = None
_board: Path | None = None


def set_terminal(stream: TextIO | None) -> None:
    """Where bars go while standard output and error are redirected into a log file; None where there is no terminal."""
    global _terminal
    _terminal = stream


def set_board(folder: Path) -> None:
    """Where this process writes its line instead of drawing a bar."""
    global _board
    _board = folder / str(os.getpid())
    with contextlib.suppress(OSError):  # it decorates: what can't be written is missing there
        folder.mkdir(parents=True, exist_ok=True)


def on_board(folder: Path) -> list[str]:
    """The lines of those that work; what the dead have left is cleared away."""
    lines = []
    for path in sorted(folder.glob("[0-9]*")):
        with contextlib.suppress(OSError):  # it ends at this moment
            try:
                os.kill(int(path.name), 0)
                lines.append(path.read_text().strip())
            except ProcessLookupError:
                path.unlink()
    return sorted(filter(None, lines))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Progress:
    """`step(done, note)` after each unit of work. A line at the first and last unit and every `every_s` seconds between."""

    def __init__(self, total: int, label: str, every_s: float = 10.0):
        from tqdm import tqdm

        self.total, self.label, self.every_s = total, label, every_s
        self.started = self.last = time.monotonic()
        stream = None if _board else _terminal or (sys.stderr if sys.stderr.isatty() else None)
        self.bar = tqdm(total=total, desc=label, file=stream, dynamic_ncols=True) if stream else None
        self.quiet = stream is sys.stderr

    def step(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        left = (now - self.started) / max(done, 1) * (self.total - done)
        if _board is not None:
            with contextlib.suppress(OSError):
                _board.write_text(f"{self.label}: {done}/{self.total}  {note}  eta {_clock(left)}")
        if not self.quiet and (done >= self.total or done <= 1 or now - self.last >= self.every_s):
            self.last = now
            print(f"{self.label}: {done}/{self.total}  {note}  eta {_clock(left)}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if _board is not None:
            with contextlib.suppress(OSError):
                _board.unlink()
