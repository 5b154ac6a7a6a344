#!/usr/bin/env bash
# A Slurm that lives as long as one command, of one node, or of $SLURM_NODES that are all this host:
#
#     tests/slurm/cluster.sh COMMAND [ARGUMENT...]
#
# starts munged, slurmctld and slurmd (Debian's packages, root, no systemd), runs COMMAND with sbatch, srun and squeue leading to
# them, and ends with its status. `tests/slurm/cluster.sh bash` is a shell on a cluster. The node claims 16 CPUs, 64 GB and 2 GPUs,
# (each node does), which nothing enforces: requests are scheduled and recorded as on a real one. Files are in $SLURM_DIR (a new folder in /tmp if
# it is not set); exit status 77: packages or rights are missing, said in one line.
set -euo pipefail

PACKAGES="munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins"

fail() { echo "tests/slurm/cluster.sh: $2" >&2; exit "$1"; }

[ $# -gt 0 ] || fail 2 "say what to run on the cluster, for instance: tests/slurm/cluster.sh bash"
[ "$(id -u)" = 0 ] || fail 77 "needs root: slurmd starts jobs as their users"
for program in munged mungekey slurmctld slurmd sbatch srun squeue scontrol; do
    command -v "$program" >/dev/null || fail 77 "no $program here; on Debian: apt-get install --no-install-recommends $PACKAGES"
done

dir=${SLURM_DIR:-$(mktemp -d /tmp/slurm.XXXXXX)}
mkdir -p "$dir"/{etc,bin,log,state,spool,gpu}
[ ${#dir} -le 60 ] || fail 2 "$dir: too long a path for the sockets below it, at most 60 characters"
host=$(hostname -s)
ports=($(python3 -c 'import socket as s
held = [s.create_server(("127.0.0.1", 0)) for _ in range(2 + int("'"${SLURM_NODES:-1}"'"))]
print(*(one.getsockname()[1] for one in held))'))
nodes=$(seq -s' ' "${SLURM_NODES:-1}")

# What most clusters use: of a job step's processes only its first one hears SIGTERM (cgroup.conf, SignalChildrenProcesses).
# Where control groups can't be written to, as in most containers, Slurm follows the process tree, and every process hears it.
tracking=proctrack/linuxproc
if [ -z "${SLURM_TRACKING:-}" ] && mkdir "/sys/fs/cgroup/freezer/phaseline.$$" 2>/dev/null; then
    rmdir "/sys/fs/cgroup/freezer/phaseline.$$"
    tracking=proctrack/cgroup
fi
echo "CgroupPlugin=cgroup/v1" >"$dir/etc/cgroup.conf"

# slurmd wants a device file for each GPU; the number at the end of its name is the GPU's index.
for gpu in 0 1; do ln -sf /dev/null "$dir/gpu/gpu$gpu"; done
echo "Name=gpu File=$dir/gpu/gpu[0-1]" >"$dir/etc/gres.conf"

# Listen on loopback only, where the host's own name allows it.
case $(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }') in
    127.*) listen=CommunicationParameters=NoInAddrAny,NoCtldInAddrAny ;;
    *) listen="" ;;
esac

# MinJobAge: squeue has to know ended jobs, as there is no accounting. cred_expire: a requeued job waits for as long (120 s).
cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=phaseline
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
$listen
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdDebug=debug2
ProctrackType=$tracking
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.log
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
KillWait=30
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
$(for n in $nodes; do
    echo "NodeName=node$n NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[n]} CPUs=16 RealMemory=64000 Gres=gpu:2"
done)
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 DefMemPerCPU=100
PartitionName=urgent Nodes=ALL PriorityTier=10 DefMemPerCPU=100
CONF

# The plugin's job step drops SLURM_CONF, with every other SLURM_ variable, before it calls srun.
printf '#!/bin/sh\nSLURM_CONF=%s/etc/slurm.conf exec %s "$@"\n' "$dir" "$(command -v srun)" >"$dir/bin/srun"
# What looks at the queue leaves a mark when it has seen it. With PATIENT_LOOKS a look ends when one more job has ended, at the
# latest after 40 s: Snakemake's executor, which asks by state, then learns of it at once and not at its next look.
cat >"$dir/bin/squeue" <<LOOK
#!/bin/sh
told=\$(cat $dir/told 2>/dev/null || echo 0)
for _ in \$(seq 80); do
    said=\$($(command -v squeue) "\$@")
    code=\$?
    ended=\$(echo "\$said" | grep -cE '[|](CANCELLED|COMPLETED|FAILED|TIMEOUT|NODE_FAIL|PREEMPTED)')
    [ -n "\$PATIENT_LOOKS" ] && [ \$code = 0 ] && [ "\$ended" -le "\$told" ] || break
    sleep 0.5
done
[ -z "\$PATIENT_LOOKS" ] || echo "\$ended" >$dir/told
[ -z "\$said" ] || echo "\$said"
touch $dir/looked
exit \$code
LOOK
chmod +x "$dir/bin/srun" "$dir/bin/squeue"
export SLURM_CONF=$dir/etc/slurm.conf SLURM_DIR=$dir PATH=$dir/bin:$PATH

daemons=()
launch() { # NAME COMMAND...: what it says goes to the log folder
    local name=$1
    shift
    setsid "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
    daemons=($! "${daemons[@]}")
}
stop() {
    trap '' TERM INT
    timeout 10 scancel --user=root 2>/dev/null || true
    for _ in $(seq 100); do
        [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
        sleep 0.1
    done
    for pid in "${daemons[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

[ -s "$dir/munge.key" ] || mungekey --create --keyfile "$dir/munge.key"
launch munged munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
for _ in $(seq 100); do [ -S "$dir/munge.socket" ] && break; sleep 0.05; done
launch slurmctld slurmctld -D
for n in $nodes; do mkdir -p "$dir/spool/node$n"; launch "slurmd$n" slurmd -D -N "node$n"; done
for _ in $(seq 300); do
    state=$(sinfo --noheader --partition=test --format=%T 2>/dev/null) || true
    [ "$state" = idle ] && break
    sleep 0.1
done
[ "$state" = idle ] || { tail -n 8 "$dir"/log/* >&2; fail 1 "the node is not idle after 30 s but '$state'; logs are in $dir/log"; }

"$@" &
command=$!
trap 'kill $command 2>/dev/null; wait $command; exit 143' TERM
wait "$command"
