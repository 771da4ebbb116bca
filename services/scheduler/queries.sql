-- Statements of scheduler. $n of a moment may be null: then it is the database's now().

-- name: read_clock
SELECT coalesce($1::timestamptz, clock_timestamp())

-- name: claim_due
-- What another replica holds is left to it: that one fires it, or dies and lets go.
-- Without the prompts, which the queue has.
SELECT schedule_id, workspace_id, name, cron, every_s, at, timezone, anchor_at, '' AS prompt, context, overlap, priority,
       catchup_window_s, jitter_s, ceiling_s, ends_at, remaining_runs, paused, pause_note, paused_by_error, next_fire_at,
       due_at, rev, coalesce($2, now()) AS clock
FROM schedules s
WHERE s.due_at <= coalesce($2, now())
ORDER BY s.due_at LIMIT $1
FOR NO KEY UPDATE SKIP LOCKED

-- name: next_due_in
SELECT extract(epoch FROM min(due_at) - coalesce($1::timestamptz, clock_timestamp()))::float8 FROM schedules
WHERE due_at IS NOT NULL

-- name: insert_fires
-- A fire that is there already was fired: its tick must not be told again.
INSERT INTO fires (schedule_id, fire_at, last_fire_at, count, by_hand, outcome, reason, merged_into, queue_id, rev, settled_at)
SELECT n.*, CASE WHEN n.outcome IS NOT NULL THEN now() END
FROM unnest($1::uuid[], $2::timestamptz[], $3::timestamptz[], $4::bigint[], $5::bool[], $6::text[], $7::text[],
            $8::timestamptz[], $9::uuid[], $10::bigint[])
  AS n (schedule_id, fire_at, last_fire_at, count, by_hand, outcome, reason, merged_into, queue_id, rev)
ON CONFLICT DO NOTHING
RETURNING schedule_id, fire_at

-- name: advance_schedules
-- By their place, here and below: a plan that was made while there were few would compare each with each. All are held.
UPDATE schedules s
SET next_fire_at = n.next_fire_at, due_at = n.due_at, remaining_runs = n.remaining_runs,
    fires_total = s.fires_total + n.fires, coalesced = s.coalesced + n.merged, missed = s.missed + n.missed
FROM unnest($1::uuid[], $2::timestamptz[], $3::timestamptz[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[],
            $8::bigint[])
  AS n (schedule_id, was, next_fire_at, due_at, remaining_runs, fires, merged, missed)
CROSS JOIN LATERAL (SELECT ctid AS place FROM schedules WHERE schedule_id = n.schedule_id LIMIT 1) held
WHERE s.ctid = held.place AND s.next_fire_at = n.was

-- name: count_fires
UPDATE schedules SET fires_total = fires_total + $2, canceled = canceled + $3 WHERE schedule_id = $1

-- name: pause_failed
UPDATE schedules
SET paused = true, paused_by_error = $2, pause_note = NULL, next_fire_at = NULL, due_at = NULL, rev = rev + 1
WHERE schedule_id = $1 AND deleted_at IS NULL AND NOT paused
RETURNING *

-- name: lock_schedules
SELECT s.* FROM schedules s WHERE s.schedule_id = ANY($1::uuid[]) ORDER BY s.schedule_id FOR NO KEY UPDATE

-- name: find_schedule
SELECT * FROM schedules WHERE schedule_id = $1

-- name: list_schedules
SELECT * FROM schedules
WHERE workspace_id = $1 AND deleted_at IS NULL AND name > $2
ORDER BY name LIMIT $3

-- name: count_schedules
SELECT count(*) FROM (
  SELECT FROM schedules WHERE workspace_id = $1 AND deleted_at IS NULL LIMIT $2) AS found

-- name: is_named
SELECT EXISTS (
  SELECT FROM schedules WHERE workspace_id = $1 AND name = $2 AND deleted_at IS NULL AND schedule_id <> $3)

-- name: insert_schedule
INSERT INTO schedules (schedule_id, workspace_id, name, cron, every_s, at, timezone, anchor_at, prompt, context, overlap,
                       priority, catchup_window_s, jitter_s, ceiling_s, ends_at, remaining_runs, paused, pause_note,
                       paused_by_error, next_fire_at, rev, due_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23)
ON CONFLICT DO NOTHING
RETURNING schedule_id

-- name: save_schedule
UPDATE schedules
SET name = $3, cron = $4, every_s = $5, at = $6, timezone = $7, anchor_at = $8, prompt = $9, context = $10, overlap = $11,
    priority = $12, catchup_window_s = $13, jitter_s = $14, ceiling_s = $15, ends_at = $16, remaining_runs = $17,
    paused = $18, pause_note = $19, paused_by_error = $20, next_fire_at = $21, rev = $22, due_at = $23
WHERE schedule_id = $1 AND workspace_id = $2 AND deleted_at IS NULL

-- name: delete_schedule
UPDATE schedules SET deleted_at = now(), next_fire_at = NULL, due_at = NULL, rev = rev + 1
WHERE schedule_id = $1 AND deleted_at IS NULL
RETURNING *

-- name: schedules_of
SELECT schedule_id FROM schedules
WHERE workspace_id = ANY($1::text[]) AND deleted_at IS NULL
ORDER BY schedule_id FOR NO KEY UPDATE

-- name: delete_schedules
UPDATE schedules SET deleted_at = now(), next_fire_at = NULL, due_at = NULL, rev = rev + 1
WHERE schedule_id = ANY($1::uuid[]) AND deleted_at IS NULL
RETURNING *

-- name: hear_workspaces
-- Sorted by the caller. Returns those of whom this is news.
INSERT INTO workspaces AS w (workspace_id, rev, removed, incarnation, settings)
SELECT * FROM unnest($1::text[], $2::bigint[], $3::bool[], $4::bigint[], $5::jsonb[])
ON CONFLICT (workspace_id) DO UPDATE
  SET rev = excluded.rev, removed = excluded.removed, incarnation = greatest(w.incarnation, excluded.incarnation),
      settings = excluded.settings
  WHERE w.rev < excluded.rev
RETURNING workspace_id, removed

-- name: ensure_workspaces
INSERT INTO workspaces (workspace_id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING

-- name: hold_workspaces
-- Whoever creates a schedule holds its workspace, so that a removal either is seen here or sees the schedule.
SELECT workspace_id, removed FROM workspaces WHERE workspace_id = ANY($1::text[]) ORDER BY workspace_id FOR SHARE

-- name: settle_fires
-- Each fire ends once: one that has an outcome keeps it.
-- Sorted by the caller, who holds their schedules.
WITH mine AS MATERIALIZED (
  SELECT open.place, n.outcome, n.reason, n.merged_into, n.began_at
  FROM unnest($1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::timestamptz[], $6::timestamptz[])
    AS n (schedule_id, fire_at, outcome, reason, merged_into, began_at)
  CROSS JOIN LATERAL (
    SELECT ctid AS place FROM fires
    WHERE schedule_id = n.schedule_id AND fire_at = n.fire_at AND outcome IS NULL
    LIMIT 1 FOR NO KEY UPDATE) open)
UPDATE fires f
SET outcome = mine.outcome, reason = coalesce(mine.reason, f.reason), merged_into = mine.merged_into,
    began_at = mine.began_at, settled_at = now()
FROM mine
WHERE f.ctid = mine.place AND f.outcome IS NULL
RETURNING f.schedule_id, f.fire_at, f.by_hand, f.outcome, f.began_at, f.merged_into

-- name: bounce_fires
-- Each fire bounces once, whoever says so first.
UPDATE fires f SET bounced = true
FROM unnest($1::uuid[], $2::timestamptz[]) AS n (schedule_id, fire_at)
CROSS JOIN LATERAL (
  SELECT ctid AS place FROM fires WHERE schedule_id = n.schedule_id AND fire_at = n.fire_at LIMIT 1) held
WHERE f.ctid = held.place AND NOT f.bounced
RETURNING f.schedule_id, f.fire_at

-- name: settle_schedules
-- `began_at` is the newest run among the settled. Where it is news, `anew`, what has bounced since then is counted.
UPDATE schedules s
SET delivered = s.delivered + n.delivered, coalesced = s.coalesced + n.merged, skipped = s.skipped + n.skipped,
    missed = s.missed + n.missed, failed = s.failed + n.failed, ceiling = s.ceiling + n.ceiling,
    canceled = s.canceled + n.canceled, run_count = s.run_count + n.ran,
    remaining_runs = s.remaining_runs + n.given_back,
    last_ran_at = greatest(s.last_ran_at, n.began_at),
    bounces = CASE
      WHEN n.anew THEN (
        SELECT count(*) FROM fires f
        WHERE f.schedule_id = s.schedule_id AND f.bounced AND f.fire_at > n.began_at)
      ELSE s.bounces + n.bounced END
FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[],
            $9::bigint[], $10::bigint[], $11::bigint[], $12::timestamptz[], $13::bool[])
  AS n (schedule_id, delivered, merged, skipped, missed, failed, ceiling, canceled, ran, given_back, bounced, began_at,
        anew)
CROSS JOIN LATERAL (SELECT ctid AS place FROM schedules WHERE schedule_id = n.schedule_id LIMIT 1) held
WHERE s.ctid = held.place

-- name: revive_schedule
UPDATE schedules SET next_fire_at = $2, due_at = $3 WHERE schedule_id = $1

-- name: list_fires
SELECT * FROM fires WHERE schedule_id = $1 AND fire_at < $2 ORDER BY fire_at DESC LIMIT $3

-- name: find_fire
SELECT * FROM fires WHERE schedule_id = $1 AND fire_at = $2

-- name: find_command
SELECT schedule_id, workspace_id, action, fire_at FROM audit WHERE query_id = $1

-- name: insert_audit
INSERT INTO audit (query_id, caller_id, action, workspace_id, schedule_id, rev, fire_at)
VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING

-- name: measure
SELECT (SELECT count(*) FROM (SELECT FROM schedules WHERE due_at <= now() LIMIT $1) AS found) AS due,
       (SELECT count(*) FROM (
          SELECT FROM schedules WHERE paused_by_error IS NOT NULL AND deleted_at IS NULL LIMIT $1) AS found) AS failed

-- name: forget_schedules
-- With all that is left of them, also what nobody ever settled.
WITH old AS (
  SELECT schedule_id FROM schedules WHERE deleted_at < coalesce($1::timestamptz, now()) - make_interval(days => $2)
  ORDER BY schedule_id LIMIT $3 FOR UPDATE SKIP LOCKED),
fires_of_them AS (DELETE FROM fires f USING old WHERE f.schedule_id = old.schedule_id)
DELETE FROM schedules s USING old WHERE s.schedule_id = old.schedule_id

-- name: forget_fires
WITH old AS (
  SELECT schedule_id, fire_at FROM fires WHERE settled_at < coalesce($1::timestamptz, now()) - make_interval(days => $2)
  ORDER BY schedule_id, fire_at LIMIT $3 FOR UPDATE SKIP LOCKED)
DELETE FROM fires f USING old WHERE f.schedule_id = old.schedule_id AND f.fire_at = old.fire_at

-- name: take_snapshot
-- One replica takes in each snapshot, and none an older one than was taken in. One from a clock that is ahead is as old as
-- it can be: the next from a right one must not be taken for an older one.
UPDATE last_snapshot SET at = least($1, clock_timestamp()), snapshot_id = $2
WHERE at < least($1, clock_timestamp()) AND snapshot_id IS DISTINCT FROM $2
RETURNING at

-- name: open_sessions
SELECT * FROM sessions WHERE ended_at IS NULL ORDER BY session_id

-- name: sessions_of
SELECT * FROM sessions WHERE ended_at IS NULL AND workspace_id = ANY($1::text[]) ORDER BY session_id

-- name: lock_sessions_of
SELECT * FROM sessions WHERE ended_at IS NULL AND workspace_id = ANY($1::text[]) ORDER BY session_id FOR NO KEY UPDATE

-- name: lock_sessions
SELECT * FROM sessions WHERE ended_at IS NULL AND session_id = ANY($1::text[]) ORDER BY session_id FOR NO KEY UPDATE

-- name: claim_sessions
-- What another replica holds is left to it.
SELECT s.*, coalesce($1, clock_timestamp()) AS clock FROM sessions s
WHERE s.due_at <= coalesce($1, clock_timestamp())
ORDER BY s.due_at LIMIT $2
FOR NO KEY UPDATE SKIP LOCKED

-- name: look_later
UPDATE sessions SET due_at = $2::timestamptz + make_interval(secs => $3) WHERE session_id = $1 AND ended_at IS NULL

-- name: next_session_in
SELECT extract(epoch FROM min(due_at) - coalesce($1::timestamptz, clock_timestamp()))::float8 FROM sessions
WHERE due_at IS NOT NULL

-- name: insert_sessions
-- One that was gone and is there again goes on where it was.
INSERT INTO sessions (session_id, workspace_id, kind, incarnation, schedule_id, ceiling_s, started_at, state, noted_at, due_at)
SELECT n.*, 'running', $8, $8
FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::uuid[], $6::float8[], $7::timestamptz[])
  AS n (session_id, workspace_id, kind, incarnation, schedule_id, ceiling_s, started_at)
ORDER BY n.session_id
ON CONFLICT (session_id) DO UPDATE
  SET ended_at = NULL, end_reason = NULL, noted_at = excluded.noted_at, due_at = excluded.due_at, rev = sessions.rev + 1
  WHERE sessions.end_reason = 'gone'

-- name: forget_idle_sessions
WITH mine AS (
  SELECT session_id FROM sessions
  WHERE session_id = ANY($1::text[]) AND state = 'running' AND asks = '[]' AND ended_at IS NULL
  ORDER BY session_id FOR UPDATE)
DELETE FROM sessions s USING mine WHERE s.session_id = mine.session_id

-- name: end_sessions
WITH mine AS (
  SELECT session_id FROM sessions WHERE session_id = ANY($1::text[]) AND ended_at IS NULL
  ORDER BY session_id FOR NO KEY UPDATE)
UPDATE sessions s SET ended_at = coalesce($3, now()), end_reason = $2, due_at = NULL, rev = s.rev + 1
FROM mine WHERE s.session_id = mine.session_id
RETURNING s.*

-- name: answer_orders
-- They were gone before the order was answered, and may be seen no more.
WITH mine AS (
  SELECT session_id FROM sessions
  WHERE session_id = ANY($1::text[]) AND end_reason = 'gone' AND state = 'kill_ordered'
  ORDER BY session_id FOR NO KEY UPDATE)
UPDATE sessions s SET end_reason = $2, rev = s.rev + 1
FROM mine WHERE s.session_id = mine.session_id
RETURNING s.*

-- name: save_sessions
UPDATE sessions s SET
  state = n.state, deadline_at = n.deadline_at, stop_reason = n.stop_reason, said_at = n.said_at,
  gate_said_at = n.gate_said_at, asks = n.asks, orders = n.orders, unenforceable = n.unenforceable, due_at = n.due_at,
  rev = n.rev
FROM jsonb_to_recordset($1::jsonb) AS n(
  session_id text, state text, deadline_at timestamptz, stop_reason text, said_at timestamptz, gate_said_at timestamptz,
  asks jsonb, orders int, unenforceable boolean, due_at timestamptz, rev bigint)
WHERE s.session_id = n.session_id AND s.ended_at IS NULL

-- name: hear_closings
-- The newest word of the gate; it may be what a kill waits for.
WITH mine AS (
  SELECT s.session_id, n.closing FROM unnest($1::text[], $2::jsonb[]) AS n (session_id, closing)
  JOIN sessions s ON s.session_id = n.session_id
  WHERE s.ended_at IS NULL
    AND (s.closing IS NULL OR (s.closing->>'at')::timestamptz < (n.closing->>'at')::timestamptz)
  ORDER BY s.session_id FOR NO KEY UPDATE OF s)
UPDATE sessions s SET closing = mine.closing, due_at = least(s.due_at, now()), rev = s.rev + 1
FROM mine WHERE s.session_id = mine.session_id

-- name: read_rules
SELECT workspace_id, settings, incarnation FROM workspaces WHERE workspace_id = ANY($1::text[])

-- name: look_at_sessions_of
-- What these workspaces allow has changed.
WITH mine AS (
  SELECT session_id FROM sessions WHERE ended_at IS NULL AND workspace_id = ANY($1::text[])
  ORDER BY session_id FOR NO KEY UPDATE)
UPDATE sessions s SET due_at = least(s.due_at, now()) FROM mine WHERE s.session_id = mine.session_id

-- name: look_at_sessions
-- At the start of a replica: what is allowed where nothing else is said may have changed.
WITH mine AS (SELECT session_id FROM sessions WHERE ended_at IS NULL ORDER BY session_id FOR NO KEY UPDATE)
UPDATE sessions s SET due_at = least(s.due_at, now()) FROM mine WHERE s.session_id = mine.session_id

-- name: read_activities
SELECT * FROM activities ORDER BY workspace_id

-- name: save_activities
INSERT INTO activities (workspace_id, incarnation, beats, nones, beat_at, since, number)
SELECT * FROM unnest($1::text[], $2::bigint[], $3::int[], $4::int[], $5::timestamptz[], $6::timestamptz[], $7::int[])
ON CONFLICT (workspace_id) DO UPDATE
  SET incarnation = excluded.incarnation, beats = excluded.beats, nones = excluded.nones, beat_at = excluded.beat_at,
      since = excluded.since, number = excluded.number

-- name: open_fires
-- The oldest fires on their way in each of these workspaces, with the rules of their schedules; without the prompts.
SELECT s.*
FROM unnest($1::text[]) AS asked (workspace_id) CROSS JOIN LATERAL (
  SELECT f.fire_at, f.queue_id, s.schedule_id, s.workspace_id, s.name, s.cron, s.every_s, s.at, s.timezone, s.anchor_at,
         '' AS prompt, s.context, s.overlap, s.priority, s.catchup_window_s, s.jitter_s, s.ceiling_s, s.ends_at,
         s.remaining_runs, s.paused, s.pause_note, s.paused_by_error, s.next_fire_at, s.rev
  FROM schedules s JOIN fires f ON f.schedule_id = s.schedule_id AND f.outcome IS NULL
  WHERE s.workspace_id = asked.workspace_id AND s.deleted_at IS NULL
  ORDER BY f.fire_at, s.schedule_id LIMIT $2) s

-- name: bouncing_schedules
SELECT s.workspace_id, s.schedule_id, s.name, s.bounces, s.next_fire_at
FROM unnest($1::text[]) AS asked (workspace_id) CROSS JOIN LATERAL (
  SELECT workspace_id, schedule_id, name, bounces, next_fire_at FROM schedules
  WHERE workspace_id = asked.workspace_id AND deleted_at IS NULL
  ORDER BY bounces DESC, name LIMIT $2) s
ORDER BY s.workspace_id, s.bounces DESC, s.name

-- name: measure_sessions
SELECT state, unenforceable, count(*) AS sessions,
  count(*) FILTER (WHERE state = 'stop_sent' AND deadline_at < now()) AS late
FROM sessions WHERE ended_at IS NULL GROUP BY 1, 2

-- name: forget_sessions
WITH old AS (
  SELECT session_id FROM sessions WHERE ended_at < coalesce($1::timestamptz, now()) - make_interval(days => $2)
  ORDER BY session_id LIMIT $3 FOR UPDATE SKIP LOCKED)
DELETE FROM sessions s USING old WHERE s.session_id = old.session_id

-- name: forget_audit
-- Without an index of its own: it is walked once an hour, and grows by what people do.
DELETE FROM audit WHERE query_id IN (
  SELECT query_id FROM audit WHERE at < coalesce($1::timestamptz, now()) - make_interval(days => $2) LIMIT $3
  FOR UPDATE SKIP LOCKED)
