# The DAG: data slices -> base -> SFT -> merge -> DPO, KTO, RM, PPO, GRPO, RLOO -> answers -> scores -> report. Targets are files:
#   snakemake results/ifeval_dpo.json             one score, and whatever it needs
#   snakemake                                     every experiment and seed that the config names
#   snakemake results/... --configfile config/other.yaml [OVERLAY...]     (the target first)
from snakemake.utils import min_version

min_version("9.27")


# Snakemake would merge a named config into the default one: the tiny world's experiments would leak into it.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "rules/snakemake_itself.smk"
include: "rules/common.smk"
include: "rules/turn.smk"
include: "rules/progress.smk"
include: "rules/preflight.smk"
include: "rules/data.smk"
include: "rules/base.smk"
include: "rules/train.smk"
include: "rules/select.smk"
include: "rules/merge.smk"
include: "rules/eval.smk"


if "report" in PLAN.config.data:

    include: "rules/report.smk"


rule all:
    default_target: True
    input:
        [PLAN.results_of(run) for run in [*PLAN.config.models, *PLAN.shown()]],
    localrule: True


onstart:
    preflight()
