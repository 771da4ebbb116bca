-- Statements of liveness. $n of a moment may be null: then it is the database's clock.

-- name: read_clock
SELECT coalesce($1::timestamptz, clock_timestamp())

-- name: lock_agents
SELECT * FROM agents WHERE workspace_id = ANY($1::text[]) ORDER BY workspace_id FOR NO KEY UPDATE

-- name: find_agent
SELECT * FROM agents WHERE workspace_id = $1

-- name: save_agents
-- Of those not in $2 the caller found none: where somebody else was faster with the first word, nothing is written.
INSERT INTO agents
SELECT (jsonb_populate_record(NULL::agents, each.value)).* FROM jsonb_array_elements($1::jsonb) AS each
ON CONFLICT (workspace_id) DO UPDATE
SET rev = EXCLUDED.rev, incarnation = EXCLUDED.incarnation, runtime = EXCLUDED.runtime, driver = EXCLUDED.driver,
    expects_beats = EXCLUDED.expects_beats, restart_wedged = EXCLUDED.restart_wedged, cordoned = EXCLUDED.cordoned,
    paused = EXCLUDED.paused, desired = EXCLUDED.desired, removed = EXCLUDED.removed, cadence_s = EXCLUDED.cadence_s,
    beat_rev = EXCLUDED.beat_rev, beats = EXCLUDED.beats, gap_mean_s = EXCLUDED.gap_mean_s,
    gap_deviation_s = EXCLUDED.gap_deviation_s, beat_at = EXCLUDED.beat_at, heard_at = EXCLUDED.heard_at,
    active = EXCLUDED.active, progress = EXCLUDED.progress, progress_at = EXCLUDED.progress_at, status = EXCLUDED.status,
    reason = EXCLUDED.reason, status_rev = EXCLUDED.status_rev, status_at = EXCLUDED.status_at,
    suspected_at = EXCLUDED.suspected_at, suspected_last_at = EXCLUDED.suspected_last_at,
    suspicions = EXCLUDED.suspicions, blind_since = EXCLUDED.blind_since, known = EXCLUDED.known, container_id = EXCLUDED.container_id,
    started_at = EXCLUDED.started_at, boot_until = EXCLUDED.boot_until, next_check_at = EXCLUDED.next_check_at,
    fence = EXCLUDED.fence, restarts = EXCLUDED.restarts, backoffs = EXCLUDED.backoffs, unheard = EXCLUDED.unheard,
    restarted_at = EXCLUDED.restarted_at, forgiven_at = EXCLUDED.forgiven_at
WHERE agents.workspace_id = ANY($2::text[])
RETURNING workspace_id

-- name: claim_looks
-- Agents whose look is due within $2 s, each for one replica: it looks at them together, one list per engine.
WITH due AS (
  SELECT workspace_id FROM agents
  WHERE next_check_at <= coalesce($1, clock_timestamp()) + make_interval(secs => $2) AND EXISTS (
    SELECT FROM agents WHERE next_check_at <= coalesce($1, clock_timestamp()))
  ORDER BY workspace_id LIMIT $3
  FOR NO KEY UPDATE SKIP LOCKED)
UPDATE agents SET next_check_at = coalesce($1, clock_timestamp()) + make_interval(secs => $4)
FROM due WHERE agents.workspace_id = due.workspace_id
RETURNING agents.*

-- name: next_look_in
SELECT extract(epoch FROM min(next_check_at) - coalesce($1::timestamptz, clock_timestamp()))::float8 FROM agents
WHERE next_check_at IS NOT NULL

-- name: insert_evidence
INSERT INTO evidence (workspace_id, at, incarnation, source, seen, container_id, verdict, reason, sentence)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)

-- name: last_evidence
SELECT * FROM evidence WHERE workspace_id = $1 ORDER BY id DESC LIMIT $2

-- name: forget_evidence
DELETE FROM evidence WHERE id IN (
  SELECT id FROM evidence WHERE at < coalesce($1, now()) - make_interval(days => $2) ORDER BY at LIMIT $3)

-- name: forget_restarts
DELETE FROM restarts WHERE restart_id IN (
  SELECT restart_id FROM restarts WHERE ended_at < coalesce($1, now()) - make_interval(days => $2) LIMIT $3)

-- name: forget_orders
DELETE FROM orders WHERE order_id IN (
  SELECT order_id FROM orders WHERE answered_at < coalesce($1, now()) - make_interval(days => $2) LIMIT $3)

-- name: open_restart
-- The fence of a death: this incarnation, still believed to be alive, and no other restart of it under way.
INSERT INTO restarts (restart_id, workspace_id, incarnation, fence, reason, evidence, container_id, driver, phase, decided_at,
                      due_at)
SELECT $1, a.workspace_id, a.incarnation, a.fence + 1, $4, $5, a.container_id, a.driver, $6, $7, $8
FROM agents a
WHERE a.workspace_id = $2 AND a.incarnation = $3 AND NOT a.removed AND a.driver IS NOT NULL
  AND a.status IN ('online', 'suspect', 'wedged', 'gave_up', 'paused', 'offline', 'restarting')
ON CONFLICT (workspace_id) WHERE ended_at IS NULL DO NOTHING
RETURNING fence

-- name: find_open
SELECT * FROM restarts WHERE workspace_id = $1 AND ended_at IS NULL

-- name: ask_again
-- A request during a restart is that restart (A-L-06); an order makes it due.
UPDATE restarts SET asked_again = asked_again + 1, due_at = least(due_at, $2)
WHERE workspace_id = $1 AND ended_at IS NULL

-- name: recent_restarts
SELECT count(*) FROM restarts
WHERE workspace_id = $1 AND decided_at > $2 AND reason NOT IN ('operator', 'ceiling') AND result = 'started'

-- name: hold_fleet
-- One replica at a time counts who is restarting: the cap is exact.
SELECT pg_advisory_xact_lock(hashtext('bide.liveness.restarts'))

-- name: fleet_in_flight
SELECT a.driver, count(*) AS agents,
       count(*) FILTER (WHERE r.lease_until > $1 OR (
         a.status = 'restarting' AND a.boot_until IS NOT NULL AND a.restarted_at > $1 - make_interval(secs => $2))) AS in_flight
FROM agents a LEFT JOIN restarts r ON r.workspace_id = a.workspace_id AND r.ended_at IS NULL
WHERE a.driver IS NOT NULL AND NOT a.removed
GROUP BY a.driver

-- name: due_restarts
-- So many of each engine: one whose cap is full keeps those of no other waiting, least of all an order to kill.
SELECT r.restart_id, r.workspace_id
FROM (
  SELECT restart_id, row_number() OVER (PARTITION BY driver ORDER BY due_at, restart_id) AS place FROM restarts
  WHERE ended_at IS NULL AND due_at <= $1 AND (lease_until IS NULL OR lease_until < $1)) AS due
JOIN restarts r USING (restart_id) JOIN agents a USING (workspace_id)
WHERE due.place <= $2 AND r.ended_at IS NULL AND r.due_at <= $1 AND (r.lease_until IS NULL OR r.lease_until < $1)
ORDER BY r.due_at, r.restart_id
FOR NO KEY UPDATE OF a, r SKIP LOCKED

-- name: lock_restart
SELECT * FROM restarts WHERE restart_id = $1 FOR NO KEY UPDATE

-- name: lease_restart
UPDATE restarts
SET lease_until = $2::timestamptz + make_interval(secs => $3), owner = $4, tries = tries + 1,
    began_at = coalesce(began_at, $2::timestamptz)
WHERE restart_id = $1

-- name: next_restart_in
SELECT extract(epoch FROM min(greatest(due_at, lease_until)) - coalesce($1::timestamptz, clock_timestamp()))::float8
FROM restarts WHERE ended_at IS NULL

-- name: end_restart
-- Only by whoever holds it, or while nobody does.
UPDATE restarts SET ended_at = $2, result = $3, owner = NULL, lease_until = NULL, last_error = coalesce($4, last_error)
WHERE restart_id = $1 AND ended_at IS NULL AND (owner IS NULL OR owner = $5 OR lease_until < $2)
RETURNING workspace_id

-- name: killed_restart
-- The kill is done; the start that follows is the same restart.
UPDATE restarts SET phase = 'start' WHERE restart_id = $1 AND ended_at IS NULL AND owner = $2 AND phase = 'kill'
RETURNING workspace_id

-- name: postpone_restart
UPDATE restarts SET owner = NULL, lease_until = NULL, due_at = $2, last_error = $3
WHERE restart_id = $1 AND ended_at IS NULL AND owner = $4
RETURNING workspace_id

-- name: last_restarts
SELECT * FROM restarts WHERE workspace_id = $1 ORDER BY decided_at DESC LIMIT $2

-- name: insert_order
INSERT INTO orders (order_id, workspace_id, session_id, incarnation, rev, expires_at, at)
VALUES ($1, $2, $3, $4, $5, $6, $7)
-- The same order with more time is told again when the first had run out, or has not been carried out yet.
ON CONFLICT (order_id) DO UPDATE SET expires_at = EXCLUDED.expires_at, result = NULL, answered_at = NULL
WHERE (orders.result IS NULL OR orders.result = 'expired') AND EXCLUDED.expires_at > orders.expires_at
RETURNING order_id

-- name: open_orders
SELECT * FROM orders WHERE workspace_id = $1 AND result IS NULL ORDER BY order_id

-- name: was_killed
-- An agent without boot ids keeps its number through a restart: what was killed so long ago was another life of it.
SELECT EXISTS (
  SELECT FROM orders
  WHERE workspace_id = $1 AND incarnation = $2 AND result = 'applied' AND answered_at > $3::timestamptz - interval '180 seconds')

-- name: answer_order
UPDATE orders SET result = $2, answered_at = $3 WHERE order_id = $1 AND result IS NULL
RETURNING *

-- name: hear_proxies
-- A proxy that was silent for longer than three beats begins anew.
INSERT INTO proxies (proxy_id, beat_at, since_at)
SELECT heard.proxy_id, clock_timestamp(), clock_timestamp() FROM unnest($1::text[]) AS heard (proxy_id)
ON CONFLICT (proxy_id) DO UPDATE
SET since_at = CASE WHEN EXCLUDED.beat_at - proxies.beat_at > interval '15 seconds' THEN EXCLUDED.beat_at
                    ELSE proxies.since_at END,
    beat_at = EXCLUDED.beat_at

-- name: hearing
-- Since when proxies are heard without a break; no row: none is heard now.
SELECT min(since_at) AS since_at FROM proxies WHERE beat_at > $1::timestamptz - interval '15 seconds' HAVING count(*) > 0

-- name: forget_proxies
DELETE FROM proxies WHERE beat_at < now() - interval '1 day'

-- name: fleet_doubts
-- How many agents an engine has, and how many of them turned suspect in the last 30 s, without those of this very look.
SELECT count(*) AS agents,
       count(*) FILTER (WHERE suspected_at > $1::timestamptz - interval '30 seconds' AND workspace_id <> ALL($3::text[])) AS suspects
FROM agents WHERE driver = $2 AND NOT removed AND NOT paused AND desired = 'running' AND status <> 'gave_up'

-- name: fleet_heard
SELECT count(*) AS expected, max(beat_at) AS beat_at, max(cadence_s) AS cadence_s
FROM agents WHERE expects_beats AND NOT removed AND NOT paused AND desired = 'running' AND beats > 0
  AND status IN ('online', 'suspect')

-- name: repeat_statuses
SELECT * FROM agents WHERE status_rev > 0 AND NOT removed ORDER BY workspace_id

-- name: measure
SELECT status, count(*) AS agents,
       count(*) FILTER (WHERE blind_since < now() - interval '120 seconds') AS blind,
       max(extract(epoch FROM now() - heard_at)) FILTER (WHERE expects_beats AND NOT removed)::float8 AS silent_s
FROM agents GROUP BY status

-- name: insert_audit
INSERT INTO audit (query_id, caller_id, action, workspace_id, note) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
RETURNING query_id
