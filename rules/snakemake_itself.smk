# What is changed in Snakemake itself, for every job and every plan.
import difflib
import gc

from snakemake.exceptions import MissingRuleException
from snakemake.persistence import PersistenceBase

from workflow_scripts.plumbing import signals

gc.disable()  # planning allocates and hardly frees: a fifth of the time of a large plan
# Where pandas is installed, Snakemake loads it (0.3 s, 65 MB) to compare parameters. Ours are text.
if hasattr(PersistenceBase, "_serialize_param_builtin"):
    PersistenceBase._serialize_param_pandas = PersistenceBase._serialize_param_builtin

# In a job of a cluster. (The Snakemake that starts Slurm's job step must not: srun takes SIGTERM for an order to kill the step.)
if not workflow.is_main_process:
    signals.pass_on(lambda: workflow.local_exec)


def with_the_nearest(error):
    """What Snakemake says of a target that nothing makes, and those of this config that are called nearly like it."""
    said = error.args[0]
    target = said.removeprefix("No rule to produce ").partition(" (if")[0]
    if target == "report":
        return "this config compares nothing: it has no `report:` (docs/report.md), so there is no page to make"
    near = difflib.get_close_matches(target, PLAN.targets(), n=3)
    return f"{said} Nearest: {', '.join(near)}" if near else said


MissingRuleException.__str__ = with_the_nearest
