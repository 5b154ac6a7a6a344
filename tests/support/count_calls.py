"""`snakemake` with its function calls counted: a last line `calls N`."""

import cProfile
import pstats

from snakemake.cli import main

profile = cProfile.Profile()
try:
    profile.runcall(main)
except SystemExit as end:
    assert not end.code, end.code
print("\ncalls", pstats.Stats(profile).total_calls)
