#!/bin/sh
# The second run, on a host with GPUs, from the root of the tree:  sh docs/studies/smollm2/second/run.sh [options of snakemake]
# Stage after stage, in the order of their worth (README.md): what a stage has made stays, and the next adds to it. A run that was cut
# off goes on where it stood.  STAGES="ppo+placebo losses" sh .../run.sh -n
here=docs/studies/smollm2/second
failed=0
laid="config/smollm2.yaml $here/common.yaml"
for stage in ${STAGES:-ppo+placebo+precision ranks losses kto sft own sources}; do
  for name in $(echo "$stage" | tr + ' '); do laid="$laid $here/$name.yaml"; done
  first=
  case $laid in *ppo.yaml*)  # reward model, then PPO: the longest chain. It asks for 30 GiB and took 11.2: so it takes the place of any job that ends
    for seed in "" .seed2 .seed3; do first="$first results/smollm2_second/ppo$seed/adapter/manifest.json"; done
    first="--prioritize $first --set-resources train_ppo:gpu_mb=20000" ;;
  esac
  echo "$(date +%T) $stage: snakemake report --configfile $laid"
  snakemake "$@" $first --configfile $laid -- report && echo "$(date +%T) $stage: done" || { echo "$(date +%T) $stage: not finished"; failed=1; }
done
exit $failed
