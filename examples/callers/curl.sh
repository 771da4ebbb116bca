#!/usr/bin/env bash
# The same with curl: send a message and follow it if Bide keeps it; ask for a kept one; cancel one that waits.
#
#   export BIDE=http://127.0.0.1:20080 TOKEN=<the admin token that `make run` prints>
#   examples/callers/curl.sh send <workspace> <text>
#   examples/callers/curl.sh poll <queue_id>
#   examples/callers/curl.sh cancel <queue_id>
set -euo pipefail

# call METHOD PATH [BODY]: fills $status, $headers and $body.
call() {
  local reply
  reply=$(curl -sS -i -X "$1" "$BIDE$2" -H "Authorization: Bearer $TOKEN" -H 'X-Workspace-ID: lead' \
    ${3:+-H 'Content-Type: application/json' --data-binary "$3"})
  headers=$(tr -d '\r' <<<"$reply" | sed '/^$/q')
  body=$(tr -d '\r' <<<"$reply" | sed '1,/^$/d')
  status=$(awk 'NR == 1 { print $2 }' <<<"$headers")
}

header() { awk -v name="$1:" 'tolower($1) == name { print $2 }' <<<"$headers"; }

pause() { sleep "$(header retry-after | grep . || echo 2)"; }

quoted() { sed 's/[\\"]/\\&/g' <<<"$1"; }

poll() {
  while pause; do
    call GET "/queue/$1"
    echo "$status $body"
    case $status in 200 | 429 | 503) ;; *) exit 1 ;; esac
    [ "$status" != 200 ] || grep -Eq '"status": ?"(queued|dispatched)"' <<<"$body" || break
  done
}

case ${1:-} in
  send)
    message="{\"role\": \"user\", \"messageId\": \"$(cat /proc/sys/kernel/random/uuid)\",
      \"parts\": [{\"type\": \"text\", \"text\": \"$(quoted "$3")\"}]}"
    call POST "/workspaces/$2/a2a" "{\"method\": \"message/send\", \"params\": {\"message\": $message}}"
    echo "$status $body"
    case $status in
      200) ;;
      202) poll "$(header x-queue-id)" ;;
      *) exit 1 ;;
    esac
    ;;
  poll)
    headers='retry-after: 0'
    poll "$2"
    ;;
  cancel)
    call DELETE "/queue/$2"
    echo "$status $body"
    [ "$status" -lt 400 ]
    ;;
  *)
    sed -n '2,/^set/{/^set/!p}' "$0" >&2
    exit 2
    ;;
esac
