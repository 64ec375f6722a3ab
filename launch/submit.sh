#!/usr/bin/env bash
# Migrate a fleet on a long-lived Ray cluster and wait for the end; exits with translora's own exit code.
#
#   launch/submit.sh /shared/fleets/fleet.yaml [options of translora migrate]
#
# TRANSLORA_COMMAND=prepare or evaluate runs that command with its own file instead.
# RAY_API_SERVER_ADDRESS: the cluster's dashboard (default http://127.0.0.1:8265, where `ray dashboard` tunnels to).
# The token: ~/.ray/auth_token, or the file that RAY_AUTH_TOKEN_PATH names. The fleet file and all paths in it must be
# the same on the cluster. The job goes on when this script is stopped; `ray job stop ID` stops it.
set -euo pipefail

(($#)) || { echo "usage: $0 FLEET.yaml [options of translora migrate]" >&2; exit 2; }
fleet=$(realpath -e -- "$1") || exit 2
shift

export RAY_AUTH_MODE=token
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
job=translora-$(date +%Y%m%d-%H%M%S)-$$

submitted=0
ray job submit --submission-id "$job" -- python -m translora "${TRANSLORA_COMMAND:-migrate}" "$fleet" "$@" || submitted=$?

# Ray 2.60 exits with 1 whatever the job's exit code was, and with 0 for a job that was stopped.
exec python -c '
import sys
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

job, submitted = sys.argv[1], sys.argv[2] == "0"
try:
    info = JobSubmissionClient().get_job_info(job)
except (AuthenticationError, RuntimeError, ConnectionError) as error:
    outcome = "its end is not known" if submitted else "not submitted"
    reason = str(error).strip().splitlines()[0]
    sys.stderr.write(f"{job}: {outcome}: {reason}\n")
    sys.exit(3)
if not info.status.is_terminal():
    sys.stderr.write(f"{job}: the connection is lost, the job goes on: ray job logs --follow {job}\n")
    sys.exit(3)
if info.status == JobStatus.STOPPED:
    sys.exit(143)
if info.driver_exit_code is None:
    sys.stderr.write(f"{job}: {info.message}\n")  # it never started, or its node was lost
    sys.exit(3)
sys.exit(info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code)
' "$job" "$submitted"
