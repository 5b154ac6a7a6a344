"""Progress of long work: a bar with ETA on a terminal, plain lines in a log. Plumbing: decides no number."""

import sys
import time
from typing import TextIO

_terminal: TextIO | None = None


def set_terminal(stream: TextIO | None) -> None:
    """Where bars go while standard output and error are redirected into a log file; None where there is no terminal."""
    global _terminal
    _terminal = stream


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Progress:
    """`step(done, note)` after each unit of work. A line at the first and last unit and every `every_s` seconds between."""

    def __init__(self, total: int, label: str, every_s: float = 10.0):
        from tqdm import tqdm

        self.total, self.label, self.every_s = total, label, every_s
        self.started = self.last = time.monotonic()
        stream = _terminal or (sys.stderr if sys.stderr.isatty() else None)
        self.bar = tqdm(total=total, desc=label, file=stream, dynamic_ncols=True) if stream else None
        self.quiet = stream is sys.stderr

    def step(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        if not self.quiet and (done >= self.total or done <= 1 or now - self.last >= self.every_s):
            self.last = now
            left = (now - self.started) / max(done, 1) * (self.total - done)
            print(f"{self.label}: {done}/{self.total}  {note}  eta {_clock(left)}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
