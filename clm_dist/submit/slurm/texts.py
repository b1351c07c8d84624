"""The texts of the scripts for `sbatch`, with `{fields}` that `clm_dist.submit.slurm.render` fills."""

HEAD_BY_ROUTE = """\
# (A host's own name may stand for 127.0.1.1 in its /etc/hosts, so the route to another host tells.)
other=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 2p)
other=$(getent ahostsv4 "${other:-$(hostname)}" | awk '$1 !~ /^127\\./ {print $1; exit}')
head=$(ip -4 route get "${other:-127.0.0.1}" 2>/dev/null | sed -n 's/.* src \\([0-9.]*\\).*/\\1/p')"""

RUN = """\
#!/bin/bash
# {name}: fine-tunes a language model with clm_dist on {nodes}. What runs here, and what it leaves:
# - Step 0 runs one Ray node a host; the driver, `clm_dist run`, runs in this script, on the first host.
# - A signal USR1 (time limit, preemption) makes the driver save a checkpoint and exit with 75. Then, and where Ray
#   has failed, the job requeues itself and goes on from the last checkpoint.
# - Local files are in /tmp/clm-dist-job-JOBID.*, which step 0 removes. Logs are in the directory that `state` names.
{options}

told='' warned=''       # TERM is the last word; what comes before the job is ready is passed on then
trap 'told=${{told:-USR1}} warned=1' USR1
trap 'told=TERM' TERM
state={state}
{exports}
max_requeues={max_requeues}

# --- the environment
{environment}
set -uo pipefail

# --- what Ray's nodes and the driver need to know
attempt=${{SLURM_RESTART_COUNT:-0}}
id=$SLURM_JOB_ID.$attempt
job={job}
say() {{ printf '%(%F %T)T job %s, attempt %s: %s\\n' -1 "$SLURM_JOB_ID" "$attempt" "$*"; }}
if [ "$attempt" -gt "$max_requeues" ]; then
    say "this is requeue $attempt, and cluster.slurm.max_requeues is $max_requeues: submit the job again to go on"
    exit 1
fi
{find_head}
if [ -z "$head" ]; then say "no address of this host: is cluster.slurm.interface right, and ip installed?"; exit 2; fi
# Two ports of this job's own, and others after a failure; below the ephemeral ports, above those of Ray's workers.
export RAY_ADDRESS=$head:$((20000 + 2 * ((SLURM_JOB_ID + 1009 * attempt) % 5000)))
export CLM_DIST_NODES=$SLURM_JOB_NUM_NODES
# Who reaches Ray's ports could run programs as this user, so Ray asks for a token.
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
(umask 077; head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n' >"$state/token")
export no_proxy=${{no_proxy:+$no_proxy,}}$head NO_PROXY=${{NO_PROXY:+$NO_PROXY,}}$head
tmp=/tmp/clm-dist-job-$id-driver        # step 0 removes it, too, in case this script is killed
(umask 077; mkdir "$tmp") || exit 1
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK      # srun no longer takes it from sbatch
# The attempt runs while this file says so: its end adds a word, and a later attempt writes its own number.
echo "$id" >"$state/attempt"
says() {{ local now; now=$(cat "$state/attempt" 2>/dev/null); [ -z "$now" ] || [ "$now" = "$id$1" ]; }}

# --- Ray, and the driver
say "hosts $SLURM_JOB_NODELIST, Ray at $RAY_ADDRESS"
passed='' failed=''
{srun} --kill-on-bad-exit={on_bad_exit} {python} -m clm_dist.submit.slurm.ray_node "$state" "$id" &
ray=$!
TMPDIR=$tmp {driver} "$state/job.yaml" &
driver=$!
while kill -0 $driver 2>/dev/null && kill -0 $ray 2>/dev/null && says ''; do
    now=$told
    if [ "$now" != "$passed" ]; then say "signal $now"; kill -"$now" $driver; passed=$now; fi
    sleep 1 & wait $!
done
if kill -KILL $driver 2>/dev/null; then say "Ray has ended, or a later attempt has begun"; failed=1; fi
wait $driver
status=$?
say "the driver ended with $status"
[ $status -eq 0 ] || {{ sleep 2; kill -0 $ray 2>/dev/null && says '' || failed=1; }}     # without Ray it ends, too

# --- the end
if ! says '' && ! says ' ended'; then say "a later attempt has begun"; kill -KILL $ray; rm -rf "$tmp"; exit 1; fi
echo "$id ended" >"$state/attempt"
for ((i = 0; i < 100; i++)); do kill -0 $ray 2>/dev/null || break; sleep 0.2; done
kill -KILL $ray 2>/dev/null
rm -rf "$state/token" "$tmp"
case $status in 0 | 2 | 126 | 127) exit $status ;; esac     # done, or the fault of the job file or the environment
cancelled() {{ scontrol show job "$job" | grep -q JobState=CANCELLED; }}
# Slurm requeues by itself, or the job is cancelled; but not where it was warned of the time limit and saved too late.
if [ "$told" = TERM ] && {{ [ -z "$warned" ] || cancelled; }}; then exit 143; fi
if [ $status -ne 75 ] && [ -z "$warned$failed" ]; then exit $status; fi
if [ "$attempt" -ge "$max_requeues" ]; then say "not requeued: cluster.slurm.max_requeues"; exit $status; fi
say "requeueing"
for ((i = 0; i < 12; i++)); do      # the controller may be away for a moment
    if scontrol requeue "$job"; then sleep 300; exit $status; fi      # Slurm ends the sleep
    sleep 10
done
say "scontrol requeue was refused: submit the job again to go on"
exit $status
"""

PREPARE = """\
#!/bin/bash
# {name}: prepares text for a job of clm_dist that starts after this one, so that no GPU waits for it.
{options}
{exports}
unset RAY_ADDRESS       # the submitter's, if there is one, is no cluster of this job
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
{environment}
set -euo pipefail
{calls}
"""
