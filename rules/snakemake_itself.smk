# What is changed in Snakemake itself, for every job and every plan.
import gc

from snakemake.persistence import PersistenceBase

from workflow_scripts.plumbing import signals

gc.disable()  # planning allocates and hardly frees: a fifth of the time of a large plan
# Where pandas is installed, Snakemake loads it (0.3 s, 65 MB) to compare parameters. Ours are text.
if hasattr(PersistenceBase, "_serialize_param_builtin"):
    PersistenceBase._serialize_param_pandas = PersistenceBase._serialize_param_builtin

# In a job of a cluster. (The Snakemake that starts Slurm's job step must not: srun takes SIGTERM for an order to kill the step.)
if not workflow.is_main_process:
    signals.pass_on(lambda: workflow.local_exec)
