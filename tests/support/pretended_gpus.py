"""A host that pretends to have GPUs: its nvidia-smi says what cards there are, and who uses how much of them."""

import json
import os
import sys
import uuid
from pathlib import Path

# Answers the two questions of plumbing/cards.py from files: the cards, and a file for each process that uses one.
NVIDIA_SMI = """#!{python} -SE
import json, os, sys
folder = {folder!r}
cards = json.load(open(folder + "/cards.json"))
used = []
for name in os.listdir(folder + "/using"):
    try:
        gpu, mib = open(f"{{folder}}/using/{{name}}").read().split()
        if not name.isdigit() or os.path.exists("/proc/" + name):
            used.append((gpu, name, int(mib)))
    except (OSError, ValueError):
        pass
if "gpu_uuid" in sys.argv[1]:
    for gpu, pid, mib in used:
        if pid.isdigit() and cards[gpu].get("names", True):
            print(f"{{gpu}}, {{pid}}, {{mib}}")
else:
    for gpu, card in cards.items():
        print(f"{{gpu}}, {{card['total']}}, {{card['foreign'] + sum(mib for one, _, mib in used if one == gpu)}}, 0")
"""


class PretendedGpus:
    """Cards of so many MiB each. `foreign` of a card is used by processes that its list does not name."""

    def __init__(self, folder: Path, *totals: int):
        self.folder, self.gpus = folder, [f"GPU-{uuid.uuid4()}" for _ in totals]
        (folder / "bin").mkdir()
        (folder / "using").mkdir()
        self.cards = {gpu: {"total": total, "foreign": 0} for gpu, total in zip(self.gpus, totals, strict=True)}
        self.say()
        script = folder / "bin/nvidia-smi"
        script.write_text(NVIDIA_SMI.format(python=sys.executable, folder=str(folder)))
        script.chmod(0o755)

    def say(self) -> None:
        part = self.folder / "cards.part"
        part.write_text(json.dumps(self.cards))
        part.replace(self.folder / "cards.json")

    def environment(self) -> dict[str, str]:
        env = {**os.environ, "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        env.pop("CUDA_VISIBLE_DEVICES", None)
        return env
