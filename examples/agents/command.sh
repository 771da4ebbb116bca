#!/bin/sh
# A command-line agent: any program that reads a prompt on stdin and writes its answer to stdout.
#
#   export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
#   examples/agents/command.sh <workspace> codex exec -
#
# Each conversation has a working directory of its own. A program that knows a signal for "save and exit" is asked with
# it (--checkpoint-signal USR1); the next delivery of the same message finds BIDE_RESUMED=1 and the same directory.
set -eu
workspace=$1
shift
export BIDE_URL="$BIDE" BIDE_TOKEN="$TOKEN"
exec "${PYTHON:-.venv/bin/python}" -m bide_agent run --workspace "$workspace" --checkpoint-signal USR1 -- "$@"
