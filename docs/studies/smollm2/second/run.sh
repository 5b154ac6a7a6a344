#!/bin/sh
# The second run, on a host with GPUs, from the root of the tree:  sh docs/studies/smollm2/second/run.sh [options of snakemake]
# Stage after stage, in the order of their worth (README.md): what a stage has made stays, and the next adds to it. A run that was cut
# off goes on where it stood.  STAGES="ppo+placebo losses" sh .../run.sh -n
here=docs/studies/smollm2/second
laid="config/smollm2.yaml $here/common.yaml"
for stage in ${STAGES:-ppo+placebo+precision ranks losses kto sft own sources}; do
  for name in $(echo "$stage" | tr + ' '); do laid="$laid $here/$name.yaml"; done
  echo "$(date +%T) $stage: snakemake report --configfile $laid"
  snakemake "$@" --configfile $laid -- report && echo "$(date +%T) $stage: done" || echo "$(date +%T) $stage: not finished"
done
