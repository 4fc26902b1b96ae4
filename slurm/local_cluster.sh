#!/usr/bin/env bash
# A real Slurm of several nodes on this one machine: for tests, and for trying a job before a cluster sees it.
#
#   slurm/local_cluster.sh start      start it (does nothing where it runs already)
#   slurm/local_cluster.sh stop       cancel its jobs and stop it
#   slurm/local_cluster.sh status     nodes and jobs; exit status 3 where it does not run
#   slurm/local_cluster.sh env        prints what a shell needs:   eval "$(slurm/local_cluster.sh env)"
#
# No systemd, no cgroups, no root needed; every daemon belongs to the user who starts it. Settings, as environment variables:
#   MTP_DIST_SLURM_ROOT    folder of keys, state and logs (default: .cache/slurm of this checkout, or a folder in $TMPDIR where
#                          that path is too long for unix sockets)
#   MTP_DIST_SLURM_NODES   nodes, named node1, node2, ... (default 2)
#   MTP_DIST_SLURM_CPUS    CPUs that each node claims to have (default: those of this machine)
#   MTP_DIST_SLURM_MEM     MiB of memory that each node claims to have (default: nine tenths of this machine's)
#   MTP_DIST_SLURM_PORT    first of NODES + 1 TCP ports (default: drawn from the root folder's name, so that clusters differ)
# Partitions: main (default; its jobs give way and are queued again) and high (goes first).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A unix socket's path holds 107 characters, and Slurm adds about 45 to the root (spool/node1/node1_<job>.<step>).
longest_root=60

default_root() {
  local root=$here/.cache/slurm
  if [ "${#root}" -gt "$longest_root" ]; then root=${TMPDIR:-/tmp}/mtp_dist-slurm-$(id -u); fi
  printf '%s' "$root"
}

root=${MTP_DIST_SLURM_ROOT:-$(default_root)}
nodes=${MTP_DIST_SLURM_NODES:-2}
cpus=${MTP_DIST_SLURM_CPUS:-$(nproc)}
mem=${MTP_DIST_SLURM_MEM:-$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)}
port=${MTP_DIST_SLURM_PORT:-$((20000 + $(printf '%s' "$root" | cksum | cut -d' ' -f1) % 12000))}
host=$(hostname -s)
user=$(id -un)
conf=$root/slurm.conf
socket=$root/munge/socket
daemons=(munged slurmctld slurmd)

fail() { echo "error: $*" >&2; exit 1; }

check_installed() {
  local missing=() name
  for name in "${daemons[@]}" sbatch srun sinfo squeue scancel scontrol; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$name" > /dev/null || missing+=("$name")
  done
  [ "${#missing[@]}" = 0 ] || fail "Slurm is not installed (missing: ${missing[*]}); on Debian and Ubuntu: apt-get install slurm-wlm munge"
}

check_root() {
  [[ $root = /* ]] || fail "MTP_DIST_SLURM_ROOT=$root is not an absolute path"
  [[ $root != *[[:space:]]* ]] || fail "MTP_DIST_SLURM_ROOT=$root holds white space, which slurm.conf cannot"
  [ "${#root}" -le "$longest_root" ] ||
    fail "MTP_DIST_SLURM_ROOT=$root is longer than $longest_root characters; unix sockets below it could not be made. Choose a shorter one"
}

# Several slurmd on one machine differ by name and port. What differs from a cluster's usual file, and why:
#   cred_expire=5                 a job put in the queue again starts after this many seconds, not after two minutes
#   SlurmdTimeout=20              a dead node is noticed soon
#   proctrack/linuxproc, task/none   no cgroups and no root
#   config_overrides              the nodes may claim more than the machine has
write_conf() {
  {
    cat << C
ClusterName=mtp_dist
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0
SlurmdParameters=config_overrides
PrologFlags=Alloc
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd-%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
C
    local i
    for i in $(seq "$nodes"); do
      echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus RealMemory=$mem State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
    echo "PartitionName=high Nodes=node[1-$nodes] Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
  } > "$conf"
}

# Whether a process is that daemon and lives: a number left over from before a reboot may be anyone's, and where nobody reaps
# processes a dead one stays as a zombie.
is_daemon() {
  grep -q "^Name:[[:space:]]*$2\$" "/proc/$1/status" 2> /dev/null && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2> /dev/null
}

# The pid of a pid file, if that very daemon lives.
living() {
  local pid
  pid=$(cat "$1" 2> /dev/null) && [ -n "$pid" ] && is_daemon "$pid" "$2" && printf '%s' "$pid"
}

idle_nodes() { sinfo --noheader --partition=main --states=idle,mixed,allocated --format=%D 2> /dev/null | awk '{n += $1} END {print n + 0}'; }

start() {
  check_installed
  check_root
  mkdir -p "$root"/{munge,state,log,run,spool}
  chmod 755 "$root" "$root/munge"
  # One start at a time; the daemons must not inherit the lock (9>&-).
  exec 9> "$root/lock"
  flock 9
  [ -f "$root/munge/key" ] || (umask 077 && head -c 128 /dev/urandom > "$root/munge/key")
  if living "$root/run/slurmctld.pid" slurmctld > /dev/null; then
    nodes=$(grep -c '^NodeName=' "$conf")
  else
    write_conf
  fi
  living "$root/run/munged.pid" munged > /dev/null ||
    munged --force --key-file="$root/munge/key" --socket="$socket" --pid-file="$root/run/munged.pid" \
      --log-file="$root/log/munged.log" --seed-file="$root/munge/seed" --num-threads=2 9>&-
  living "$root/run/slurmctld.pid" slurmctld > /dev/null || slurmctld -c -f "$conf" 9>&-
  local i
  for i in $(seq "$nodes"); do
    mkdir -p "$root/spool/node$i"
    living "$root/run/slurmd-node$i.pid" slurmd > /dev/null || slurmd -N "node$i" -f "$conf" 9>&-
  done
  for _ in $(seq 120); do
    if [ "$(idle_nodes)" = "$nodes" ]; then
      sinfo
      return
    fi
    sleep 0.5
  done
  tail -n 20 "$root"/log/*.log >&2
  fail "the $nodes nodes did not come up within a minute; the logs are in $root/log"
}

# End one daemon: ask, wait up to ten seconds, then end it and its children.
end() {
  local pid
  pid=$(living "$1" "$2") || return 0
  kill "$pid" 2> /dev/null || return 0
  for _ in $(seq 40); do
    # By number: a daemon removes its pid file before it has ended.
    is_daemon "$pid" "$2" || return 0
    sleep 0.25
  done
  # shellcheck disable=SC2046
  kill -9 $(pgrep -P "$pid") "$pid" 2> /dev/null || true
}

stop() {
  if living "$root/run/slurmctld.pid" slurmctld > /dev/null; then
    scancel --user="$user" 2> /dev/null || true
    # Let the jobs answer; slurmd waits for them no longer than this.
    for _ in $(seq 20); do
      [ -n "$(squeue --noheader --states=all --format=%t 2> /dev/null | grep -E 'R|CG')" ] || break
      sleep 0.5
    done
  fi
  local file
  for file in "$root"/run/slurmd-*.pid; do end "$file" slurmd; done
  end "$root/run/slurmctld.pid" slurmctld
  # munged last: the others cannot say goodbye without it.
  end "$root/run/munged.pid" munged
}

status() {
  if ! living "$root/run/slurmctld.pid" slurmctld > /dev/null; then
    echo "the local cluster in $root does not run"
    return 3
  fi
  sinfo
  squeue
}

export SLURM_CONF=$conf PATH=$PATH:/usr/sbin:/sbin
case "${1:-}" in
  start) start ;;
  stop) stop ;;
  status) status ;;
  env) printf 'export SLURM_CONF=%q\n' "$conf" ;;
  *)
    sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac
