"""Draws docs/card_sharing.png: what a GPU did while seven methods shared it, and while they came one after another.

    python -m measurements.card_sharing

The seconds are nvidia-smi's, of the runs that docs/cluster.md describes (card_sharing_h200.csv).
"""

import csv
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]


def main() -> None:
    with (ROOT / "measurements/card_sharing_h200.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True, layout="constrained")
    for way, part in groupby(rows, key=lambda row: row["way"]):
        made = [[float(row[key]) for key in ("second", "busy_percent", "memory_mib")] for row in part]
        seconds, busy, memory = zip(*made, strict=True)
        label = f"{way}: {max(seconds):.0f} s, busy {sum(busy) / len(busy):.0f} %"
        top.plot(seconds, busy, lw=0.8, label=label)
        bottom.plot(seconds, [one / 1024 for one in memory], lw=0.8)
    top.set_ylabel("GPU busy, %")
    bottom.set_ylabel("memory, GiB")
    bottom.set_xlabel("seconds")
    top.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs/card_sharing.png", dpi=130)


if __name__ == "__main__":
    main()
