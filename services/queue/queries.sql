-- Statements of queue. Lock order: workspaces by id → schedules by id → idempotency_keys → a2a_queue by queue_id →
-- a2a_finished → proxies → outbox.
-- An item moves only under the lock of its workspace, so the counters there are exact and no claim can race another.
-- $n "now" is a moment that a test passes; null: the database's clock.

-- name: ensure_workspaces
-- Whoever makes the name makes the row; the others wait for it.
WITH made AS (
  INSERT INTO workspace_ids SELECT unnest($1::text[]) ORDER BY 1 ON CONFLICT DO NOTHING RETURNING workspace_id)
INSERT INTO workspaces (workspace_id) SELECT workspace_id FROM made

-- name: lock_workspaces
-- LATERAL … LIMIT, here and below: however small a table was when the plan was made, it is looked into once per key.
-- In the order given. There is one row each: the newest version is looked for first, because under a snapshot held open
-- elsewhere all its earlier ones are still there.
-- With its place, so that whoever saves it need not look for it again, and the time once it was locked.
SELECT w.*, extract(epoch FROM w.beat_at)::float8 AS beat_epoch, extract(epoch FROM w.paused_at)::float8 AS paused_epoch,
       extract(epoch FROM w.not_before)::float8 AS not_before_epoch, extract(epoch FROM w.life_at)::float8 AS life_epoch,
       extract(epoch FROM w.dead_at)::float8 AS dead_epoch,
       extract(epoch FROM coalesce($2::timestamptz, clock_timestamp()))::float8 AS now_epoch
FROM unnest($1::text[]) AS named(workspace_id) CROSS JOIN LATERAL (
  SELECT *, ctid AS version FROM workspaces WHERE workspace_id = named.workspace_id
  ORDER BY rev DESC LIMIT 1 FOR NO KEY UPDATE) w

-- name: read_clock
SELECT extract(epoch FROM coalesce($1::timestamptz, clock_timestamp()))::float8

-- name: read_begun
SELECT extract(epoch FROM now())::float8

-- name: read_workspaces
SELECT w.*, extract(epoch FROM w.beat_at)::float8 AS beat_epoch, extract(epoch FROM w.paused_at)::float8 AS paused_epoch,
       extract(epoch FROM w.not_before)::float8 AS not_before_epoch, extract(epoch FROM w.life_at)::float8 AS life_epoch,
       extract(epoch FROM w.dead_at)::float8 AS dead_epoch
FROM unnest($1::text[]) AS named(workspace_id) CROSS JOIN LATERAL (
  SELECT *, ctid AS version FROM workspaces WHERE workspace_id = named.workspace_id ORDER BY rev DESC LIMIT 1) w

-- name: save_workspaces
-- `version` is the place of the row as it was locked, so nobody can have moved it since.
UPDATE workspaces w SET
  registry_rev = s.registry_rev, url = s.url, agent_authorization = s.agent_authorization,
  max_concurrent = s.max_concurrent, at_most_once = s.at_most_once, give_up_after_s = s.give_up_after_s,
  ceiling_s = s.ceiling_s, paused = s.paused, removed = s.removed, incarnation = s.incarnation,
  beat_rev = s.beat_rev, beat_at = to_timestamp(s.beat_at), beat_active = s.beat_active,
  beat_cadence_s = s.beat_cadence_s, paused_at = to_timestamp(s.paused_at), waiting = s.waiting,
  waiting_critical = s.waiting_critical, waiting_info = s.waiting_info, running = s.running,
  started_since = s.started_since, ended_since = s.ended_since, recent_ended = s.recent_ended, forwards = s.forwards,
  not_before = to_timestamp(s.not_before), busy_streak = s.busy_streak, rev = s.rev, floors = s.floors,
  served_critical = s.served_critical, turns_s = s.turns_s, gates = s.gates, gate_generation = s.gate_generation,
  ever_active = s.ever_active, engaged = s.engaged, checkpoint_grace_s = s.checkpoint_grace_s,
  stop_grace_s = s.stop_grace_s, unsaid = s.unsaid, life_at = to_timestamp(s.life_at), status = s.status,
  status_rev = s.status_rev, dead_incarnation = s.dead_incarnation, dead_at = to_timestamp(s.dead_at)
FROM jsonb_to_recordset($1::jsonb) AS s(
  workspace_id text, registry_rev bigint, url text, agent_authorization text, max_concurrent int, at_most_once boolean,
  give_up_after_s float8, ceiling_s float8, paused boolean, removed boolean, incarnation bigint, beat_rev bigint,
  beat_at float8, beat_active int, beat_cadence_s float8, paused_at float8, waiting int, waiting_critical int,
  waiting_info int, running int, started_since int, ended_since int, recent_ended float8[], forwards jsonb,
  not_before float8, busy_streak int, rev bigint, floors bigint[], served_critical boolean, turns_s float8[],
  gates jsonb, gate_generation bigint, ever_active boolean, engaged boolean, checkpoint_grace_s float8,
  stop_grace_s float8, unsaid text[], life_at float8, status text, status_rev bigint, dead_incarnation bigint,
  dead_at float8, version tid)
WHERE w.ctid = s.version AND w.workspace_id = s.workspace_id

-- name: save_counters
-- What deliveries and kept messages change of a workspace. An array of arrays must be even: lists come as text.
UPDATE workspaces w SET
  waiting = s.waiting, waiting_critical = s.waiting_critical, waiting_info = s.waiting_info, running = s.running,
  started_since = s.started_since, ended_since = s.ended_since, recent_ended = s.recent_ended::float8[],
  not_before = to_timestamp(s.not_before), busy_streak = s.busy_streak, rev = s.rev,
  floors = ARRAY[s.floor_critical, s.floor_rest], served_critical = s.served_critical, turns_s = s.turns_s::float8[]
FROM unnest($1::tid[], $2::text[], $3::int[], $4::int[], $5::int[], $6::int[], $7::int[], $8::int[], $9::text[],
            $10::float8[], $11::int[], $12::bigint[], $13::bigint[], $14::bigint[], $15::boolean[], $16::text[])
  AS s(version, workspace_id, waiting, waiting_critical, waiting_info, running, started_since, ended_since,
       recent_ended, not_before, busy_streak, rev, floor_critical, floor_rest, served_critical, turns_s)
WHERE w.ctid = s.version AND w.workspace_id = s.workspace_id

-- name: set_bounds
-- At the start of a replica: the defaults may be others than when the workspaces registered.
UPDATE workspaces SET
  ceiling_s = CASE WHEN 'ceiling_s' = ANY(unsaid) THEN $1 ELSE ceiling_s END,
  checkpoint_grace_s = CASE WHEN 'checkpoint_grace_s' = ANY(unsaid) THEN $2 ELSE checkpoint_grace_s END,
  stop_grace_s = CASE WHEN 'stop_grace_s' = ANY(unsaid) THEN $3 ELSE stop_grace_s END
WHERE ('ceiling_s' = ANY(unsaid) AND ceiling_s <> $1)
   OR ('checkpoint_grace_s' = ANY(unsaid) AND checkpoint_grace_s <> $2)
   OR ('stop_grace_s' = ANY(unsaid) AND stop_grace_s <> $3)

-- name: waiting_workspaces
-- What a sweep looks at: somebody waits or is said to run. Keyset, so that a page of closed ones hides nobody (B-08).
SELECT workspace_id FROM workspaces
WHERE (waiting > 0 OR running > 0) AND workspace_id > $1
ORDER BY workspace_id LIMIT $2

-- name: active_workspaces
-- What a snapshot may have to name: those that are engaged only may turn out not to be.
SELECT *, ctid AS version, extract(epoch FROM beat_at)::float8 AS beat_epoch,
       extract(epoch FROM paused_at)::float8 AS paused_epoch,
       extract(epoch FROM not_before)::float8 AS not_before_epoch, extract(epoch FROM life_at)::float8 AS life_epoch,
       extract(epoch FROM dead_at)::float8 AS dead_epoch
FROM workspaces WHERE waiting > 0 OR running > 0 OR engaged ORDER BY workspace_id

-- name: running_items
-- The newest first, and no more than the workspace's counter says there are. The turn of one that goes on with a Task began
-- with the Task.
SELECT q.queue_id, q.workspace_id, q.delivery_no, q.key_hash, q.dispatched_at, q.ceiling_s, q.schedule_id,
       CASE WHEN q.task_delivery_no = q.delivery_no THEN q.task_began_at ELSE q.dispatched_at END AS started_at,
       extract(epoch FROM q.stop_at)::float8 AS stop_epoch
FROM unnest($1::text[], $2::int[]) AS named(workspace_id, running) CROSS JOIN LATERAL (
  SELECT * FROM a2a_queue WHERE status = 'dispatched' AND workspace_id = named.workspace_id
  ORDER BY dispatched_at DESC LIMIT named.running) q

-- name: counted_workspaces
-- A page of the workspaces that have items or are said to have: whoever has them by a loose scan, one step in the index
-- per workspace however many its items, because a counter that is wrongly 0 is found by its rows alone.
WITH RECURSIVE held(workspace_id) AS (
  (SELECT q.workspace_id FROM a2a_queue q WHERE q.workspace_id > $1 ORDER BY q.workspace_id LIMIT 1)
  UNION ALL
  SELECT (SELECT q.workspace_id FROM a2a_queue q WHERE q.workspace_id > held.workspace_id
          ORDER BY q.workspace_id LIMIT 1)
  FROM held WHERE held.workspace_id IS NOT NULL)
SELECT workspace_id FROM (SELECT workspace_id FROM held WHERE workspace_id IS NOT NULL LIMIT $2) found
UNION
SELECT workspace_id FROM (
  SELECT workspace_id FROM workspaces WHERE (waiting > 0 OR running > 0) AND workspace_id > $1
  ORDER BY workspace_id LIMIT $2) said
ORDER BY workspace_id LIMIT $2

-- name: count_items
-- The truth that the counters are held against (B-06). Waiting ones are counted up to $2, CRITICAL first; null: all.
SELECT w.workspace_id, line.*,
  (SELECT count(*) FROM a2a_queue q WHERE q.workspace_id = w.workspace_id AND q.status = 'dispatched')::int AS running
FROM unnest($1::text[]) AS w(workspace_id) CROSS JOIN LATERAL (
  SELECT count(*)::int AS waiting, (count(*) FILTER (WHERE priority = 100))::int AS waiting_critical,
         (count(*) FILTER (WHERE priority = 10))::int AS waiting_info
  FROM (SELECT q.priority FROM a2a_queue q WHERE q.workspace_id = w.workspace_id AND q.status = 'queued'
        ORDER BY q.lane, q.rank_ms, q.queue_id LIMIT $2) waiting
) line

-- name: insert_keys
INSERT INTO idempotency_keys (workspace_id, caller_hash, key_hash, queue_id, body_hash, expires_at)
SELECT u.*, now() + make_interval(secs => $6)
FROM unnest($1::text[], $2::bytea[], $3::bytea[], $4::uuid[], $5::bytea[]) AS u ORDER BY 1, 2, 3
ON CONFLICT (workspace_id, caller_hash, key_hash) DO UPDATE
  SET queue_id = excluded.queue_id, body_hash = excluded.body_hash, expires_at = excluded.expires_at
  WHERE idempotency_keys.expires_at < now()
RETURNING queue_id

-- name: find_keys
SELECT k.workspace_id, k.caller_hash, k.key_hash, k.queue_id, k.body_hash
FROM unnest($1::text[], $2::bytea[], $3::bytea[]) AS u(workspace_id, caller_hash, key_hash) CROSS JOIN LATERAL (
  SELECT * FROM idempotency_keys
  WHERE workspace_id = u.workspace_id AND caller_hash = u.caller_hash AND key_hash = u.key_hash LIMIT 1) k

-- name: find_ids
SELECT queue_id, workspace_id, caller_hash, body_hash FROM a2a_queue WHERE queue_id = ANY($1::uuid[])
UNION ALL
SELECT queue_id, workspace_id, caller_hash, body_hash FROM a2a_finished WHERE queue_id = ANY($1::uuid[])

-- name: insert_items
-- Two keys of one batch that are the same are one item here too.
INSERT INTO a2a_queue (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, lane, rank_ms, method,
                       body, reason, context_id, hops, not_before, expires_at, give_up_at, retry_of)
SELECT i.queue_id, i.workspace_id, i.caller_id, i.caller_hash, i.key_hash, i.body_hash, i.priority, i.lane, i.rank_ms,
       i.method, i.body, i.reason, i.context_id, i.hops, i.not_before, i.expires_at,
       now() + make_interval(secs => i.give_up_after_s), i.retry_of
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::bytea[], $6::bytea[], $7::smallint[], $8::smallint[],
            $9::bigint[], $10::text[], $11::bytea[], $12::text[], $13::text[], $14::int[], $15::timestamptz[],
            $16::timestamptz[], $17::float8[], $18::uuid[])
  AS i(queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, lane, rank_ms, method, body,
       reason, context_id, hops, not_before, expires_at, give_up_after_s, retry_of)
ORDER BY i.queue_id
ON CONFLICT DO NOTHING
RETURNING queue_id

-- name: find_active_keys
SELECT q.queue_id, q.workspace_id, q.caller_hash, q.key_hash, q.body_hash
FROM unnest($1::text[], $2::bytea[], $3::bytea[]) AS u(workspace_id, caller_hash, key_hash) CROSS JOIN LATERAL (
  SELECT * FROM a2a_queue
  WHERE workspace_id = u.workspace_id AND caller_hash = u.caller_hash AND key_hash = u.key_hash LIMIT 1) q

-- name: insert_finished
-- Proposed ids that never became items: superseded or in conflict. No unique index spans the days: under the lock of its
-- workspace an id is looked for among what waits and what has ended (find_ids) before it is written here.
INSERT INTO a2a_finished (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, status, reason,
                          method, body, context_id, enqueued_at, ended_at, attempts, delivery_no, superseded_by, rev)
SELECT i.queue_id, i.workspace_id, i.caller_id, i.caller_hash, i.key_hash, i.body_hash, i.priority, i.status, i.reason,
       i.method, i.body, i.context_id, now(), now(), 0, 0, s.by, 1
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::bytea[], $6::bytea[], $7::smallint[], $8::text[],
            $9::text[], $10::text[], $11::bytea[], $12::text[]) WITH ORDINALITY
  AS i(queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, status, reason, method, body,
       context_id, n)
JOIN unnest($13::uuid[]) WITH ORDINALITY AS s(by, n) USING (n)

-- name: insert_unreadable
-- A message that was promised and could not be kept; its bytes are in dead_letters. Looked for before, as above.
INSERT INTO a2a_finished (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, status, reason,
                          method, body, enqueued_at, ended_at, attempts, delivery_no, last_error, rev)
VALUES ($1, $2, $3, $4, $5, $6, 50, 'failed', $7, '', '', now(), now(), 0, 0, $8, 1)

-- name: claim_items
-- Second statement of the claim: the workspaces are locked by then. Repeats status in the outer UPDATE. For workspaces
-- where no CRITICAL waits: the line of the rest alone. `first_rank` is that of what stands first in the line, also when
-- it may not be claimed yet, or any more: the lane's next floor.
WITH wanted AS (SELECT * FROM unnest($1::text[], $2::int[], $3::bigint[]) AS w(workspace_id, spare, floor)),
head AS MATERIALIZED (
  SELECT line.place, line.first_rank FROM wanted w CROSS JOIN LATERAL (
    SELECT * FROM (
      SELECT q.ctid AS place, q.rank_ms, q.queue_id, q.not_before, least(q.expires_at, q.give_up_at) AS ends_at,
             first_value(q.rank_ms) OVER along AS first_rank
      FROM a2a_queue q
      WHERE q.workspace_id = w.workspace_id AND q.status = 'queued' AND q.lane = 1 AND q.rank_ms >= w.floor
      WINDOW along AS (ORDER BY q.rank_ms, q.queue_id ROWS UNBOUNDED PRECEDING)) waiting
    WHERE (not_before IS NULL OR not_before <= coalesce($5, clock_timestamp()))
      AND ends_at > coalesce($5, clock_timestamp())
    ORDER BY rank_ms, queue_id LIMIT w.spare) line)
UPDATE a2a_queue q SET status = 'dispatched', owner = $4, delivery_no = delivery_no + 1,
  dispatched_at = coalesce($5, clock_timestamp()), rev = q.rev + 1
FROM head WHERE q.ctid = head.place AND q.status = 'queued'
RETURNING q.queue_id, q.workspace_id, q.delivery_no, q.method, q.body, q.attempts, q.deaths, q.hops, q.agent_task_id,
          q.cancel_at, q.priority, q.lane, q.rank_ms, q.rev, extract(epoch FROM q.dispatched_at)::float8 AS dispatched_epoch,
          extract(epoch FROM q.enqueued_at)::float8 AS enqueued_epoch, head.first_rank

-- name: line_heads
-- Where CRITICAL waits: the first of both lanes, in their order. Which of them go is not SQL's to say.
SELECT w.workspace_id, w.lane, line.place, line.first_rank, line.enqueued_epoch
FROM unnest($1::text[], $2::int[], $3::smallint[], $4::bigint[]) WITH ORDINALITY AS w(workspace_id, spare, lane, floor, n)
CROSS JOIN LATERAL (
  SELECT * FROM (
    SELECT q.ctid AS place, q.rank_ms, q.queue_id, q.not_before, least(q.expires_at, q.give_up_at) AS ends_at,
           first_value(q.rank_ms) OVER along AS first_rank,
           extract(epoch FROM q.enqueued_at)::float8 AS enqueued_epoch
    FROM a2a_queue q
    WHERE q.workspace_id = w.workspace_id AND q.status = 'queued' AND q.lane = w.lane AND q.rank_ms >= w.floor
    WINDOW along AS (ORDER BY q.rank_ms, q.queue_id ROWS UNBOUNDED PRECEDING)) waiting
  WHERE (not_before IS NULL OR not_before <= coalesce($5, clock_timestamp()))
    AND ends_at > coalesce($5, clock_timestamp())
  ORDER BY rank_ms, queue_id LIMIT w.spare) line

-- name: claim_places
UPDATE a2a_queue q SET status = 'dispatched', owner = $2, delivery_no = delivery_no + 1,
  dispatched_at = coalesce($3, clock_timestamp()), rev = q.rev + 1
FROM unnest($1::tid[]) AS head(place) WHERE q.ctid = head.place AND q.status = 'queued'
RETURNING q.queue_id, q.workspace_id, q.delivery_no, q.method, q.body, q.attempts, q.deaths, q.hops, q.agent_task_id,
          q.cancel_at, q.priority, q.lane, q.rank_ms, q.rev, extract(epoch FROM q.dispatched_at)::float8 AS dispatched_epoch,
          extract(epoch FROM q.enqueued_at)::float8 AS enqueued_epoch

-- name: oldest_items
-- Since when the first of a lane waits; $3: of those that may go then by their own clock.
SELECT w.workspace_id, w.lane, q.enqueued_at
FROM unnest($1::text[], $2::smallint[]) AS w(workspace_id, lane) CROSS JOIN LATERAL (
  SELECT enqueued_at FROM a2a_queue WHERE workspace_id = w.workspace_id AND status = 'queued' AND lane = w.lane
    AND ($3::timestamptz IS NULL OR not_before IS NULL OR not_before <= $3)
  ORDER BY rank_ms, queue_id LIMIT 1) q

-- name: shift_clocks
-- A pause is over: what waited through it, or through a part of it, has that much more time.
UPDATE a2a_queue q SET
  expires_at = q.expires_at + (to_timestamp(w.until) - greatest(to_timestamp(w.since), q.enqueued_at)),
  give_up_at = q.give_up_at + (to_timestamp(w.until) - greatest(to_timestamp(w.since), q.enqueued_at))
FROM unnest($1::text[], $2::float8[], $3::float8[]) AS w(workspace_id, since, until)
WHERE q.workspace_id = w.workspace_id AND q.enqueued_at < to_timestamp(w.until)

-- name: finish_items
-- Fenced by delivery_no. A success that comes late also completes the row while it is queued again.
WITH done AS (
  SELECT * FROM unnest($1::uuid[], $2::int[], $3::text[], $4::text[], $5::int[], $6::bytea[], $7::text[])
    AS d(queue_id, delivery_no, status, reason, attempts, answer, last_error)),
mine AS (
  SELECT q.queue_id FROM (SELECT * FROM done ORDER BY queue_id) d CROSS JOIN LATERAL (
    SELECT queue_id FROM a2a_queue WHERE queue_id = d.queue_id AND (
      (status = 'dispatched' AND delivery_no = d.delivery_no)
      OR (d.status = 'completed' AND status = 'queued' AND delivery_no >= d.delivery_no))
    LIMIT 1 FOR UPDATE) q),
gone AS (DELETE FROM a2a_queue q WHERE q.queue_id = ANY(ARRAY(SELECT queue_id FROM mine)) RETURNING q.*),
kept AS (
  INSERT INTO a2a_finished (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, status, reason,
    method, body, context_id, enqueued_at, dispatched_at, ended_at, attempts, delivery_no, agent_task_id, last_error,
    answer, retry_of, rev, schedule_id, fire_at, merged_count, first_missed_at)
  SELECT g.queue_id, g.workspace_id, g.caller_id, g.caller_hash, g.key_hash, g.body_hash, g.priority, d.status, d.reason,
    g.method, g.body, g.context_id, g.enqueued_at, g.dispatched_at, clock_timestamp(), g.attempts + d.attempts, g.delivery_no,
    g.agent_task_id, coalesce(d.last_error, g.last_error), d.answer, g.retry_of, g.rev + 1,
    g.schedule_id, g.fire_at, g.merged_count, g.first_missed_at
  FROM gone g JOIN done d USING (queue_id))
SELECT queue_id, workspace_id, status, delivery_no, priority, rev + 1 AS rev, schedule_id, fire_at, rev_needed,
       extract(epoch FROM dispatched_at)::float8 AS dispatched_epoch FROM gone

-- name: requeue_items
-- The same row, the same rank. Fenced by delivery_no. A tick gives its body back, for it is claimed with the newest; and
-- one that its agent may have goes on alone, for it would be told of nothing that came since.
WITH back AS (
  SELECT * FROM unnest($1::uuid[], $2::int[], $3::int[], $4::int[], $5::float8[], $6::text[], $7::text[], $8::boolean[])
    AS b(queue_id, delivery_no, attempts, deaths, wait_s, reason, last_error, may_run)),
mine AS (
  SELECT q.queue_id FROM (SELECT * FROM back ORDER BY queue_id) b CROSS JOIN LATERAL (
    SELECT queue_id FROM a2a_queue
    WHERE queue_id = b.queue_id AND status = 'dispatched' AND delivery_no = b.delivery_no
    LIMIT 1 FOR NO KEY UPDATE) q)
UPDATE a2a_queue q SET status = 'queued', owner = NULL, attempts = q.attempts + b.attempts, deaths = q.deaths + b.deaths,
  not_before = CASE WHEN b.wait_s > 0 THEN clock_timestamp() + make_interval(secs => b.wait_s) ELSE q.not_before END,
  reason = b.reason, last_error = coalesce(b.last_error, q.last_error), rev = q.rev + 1,
  body = CASE WHEN q.schedule_id IS NULL THEN q.body ELSE '' END,
  coalesces = q.coalesces AND NOT b.may_run AND q.agent_task_id IS NULL
FROM back b WHERE q.queue_id = ANY(ARRAY(SELECT queue_id FROM mine)) AND q.queue_id = b.queue_id
RETURNING q.queue_id, q.workspace_id, q.priority, q.lane, q.rank_ms, q.schedule_id, q.coalesces,
          extract(epoch FROM q.dispatched_at)::float8 AS dispatched_epoch

-- name: set_agent_task
-- $4: it goes on from an earlier delivery. What was written before this could be has no beginning but this delivery's.
UPDATE a2a_queue SET agent_task_id = $3, task_delivery_no = $2, rev = rev + 1,
  task_began_at = CASE WHEN $4 THEN coalesce(task_began_at, dispatched_at) ELSE dispatched_at END
WHERE queue_id = $1 AND status = 'dispatched' AND delivery_no = $2 RETURNING queue_id

-- name: owned_items
-- A replica's own deliveries, with where their agents are now and when those last beat.
SELECT q.queue_id, q.workspace_id, q.delivery_no, q.method, q.body, q.attempts, q.deaths, q.hops, q.agent_task_id,
       q.cancel_at, q.priority, q.lane, q.rank_ms, q.rev,
       extract(epoch FROM q.dispatched_at)::float8 AS dispatched_epoch,
       extract(epoch FROM q.enqueued_at)::float8 AS enqueued_epoch,
       w.url, w.agent_authorization, w.incarnation, coalesce(q.ceiling_s, w.ceiling_s) AS ceiling_s,
       w.checkpoint_grace_s, w.stop_grace_s, w.beat_active, w.dead_incarnation,
       extract(epoch FROM clock.now - w.dead_at)::float8 AS dead_age_s,
       extract(epoch FROM w.life_at - q.dispatched_at)::float8 AS led_s,
       w.ever_active, q.stop_at IS NOT NULL AS stopped, q.hang_up_at IS NOT NULL AS hung_up,
       extract(epoch FROM clock.now - w.beat_at)::float8 AS beat_age_s,
       extract(epoch FROM clock.now - q.stop_at)::float8 AS stop_age_s,
       extract(epoch FROM clock.now - q.stop_heard_at)::float8 AS stop_heard_age_s
FROM a2a_queue q CROSS JOIN LATERAL (
  SELECT * FROM workspaces WHERE workspace_id = q.workspace_id ORDER BY rev DESC LIMIT 1) w
CROSS JOIN (SELECT coalesce($2, clock_timestamp()) AS now) clock
WHERE q.owner = $1 AND q.status = 'dispatched'

-- name: ending_instead
-- Of items that would go back, or end as if by themselves: those that were told to stop, or that somebody wants canceled,
-- and ticks, with what their schedule says now.
SELECT q.queue_id, q.stop_reason, q.cancel_at IS NOT NULL AS canceled, q.schedule_id, q.rev_needed, q.agent_task_id, s.rev,
       s.paused, s.schedule_id IS NULL OR s.deleted AS deleted
FROM a2a_queue q LEFT JOIN schedules s ON s.schedule_id = q.schedule_id
WHERE q.queue_id = ANY($1::uuid[]) AND (q.cancel_at IS NOT NULL OR q.schedule_id IS NOT NULL OR q.stop_at IS NOT NULL)

-- name: stop_items
-- Fenced by delivery_no. Said again, only that it was: the first word counts, and a hang-up is for good.
WITH said AS (
  SELECT * FROM unnest($1::uuid[], $2::int[], $3::text[], $4::text[], $5::boolean[])
    AS s(queue_id, delivery_no, workspace_id, reason, hangs_up)),
mine AS (
  SELECT q.queue_id, q.first, said.reason, said.hangs_up FROM (SELECT * FROM said ORDER BY queue_id) said
  CROSS JOIN LATERAL (
    SELECT queue_id, stop_at IS NULL AS first FROM a2a_queue
    WHERE queue_id = said.queue_id AND status = 'dispatched' AND delivery_no = said.delivery_no
      AND workspace_id = said.workspace_id
    LIMIT 1 FOR NO KEY UPDATE) q)
UPDATE a2a_queue q SET stop_at = coalesce(q.stop_at, $6, clock_timestamp()),
  stop_heard_at = coalesce($6, clock_timestamp()), stop_reason = coalesce(q.stop_reason, mine.reason),
  hang_up_at = CASE WHEN mine.hangs_up THEN coalesce(q.hang_up_at, $6, clock_timestamp()) ELSE q.hang_up_at END,
  rev = q.rev + 1
FROM mine WHERE q.queue_id = ANY(ARRAY(SELECT queue_id FROM mine)) AND q.queue_id = mine.queue_id
RETURNING q.queue_id, q.workspace_id, q.delivery_no, q.stop_reason, mine.first

-- name: beat_proxies
-- A gap of half of what one may be silent breaks its line: it may be that nobody was heard.
INSERT INTO proxies (proxy_id, beat_at, unbroken_since)
SELECT proxy_id, coalesce($3, clock_timestamp()), coalesce($3, clock_timestamp()) FROM unnest($1::text[]) AS p(proxy_id)
ORDER BY 1
ON CONFLICT (proxy_id) DO UPDATE SET beat_at = excluded.beat_at,
  unbroken_since = CASE WHEN proxies.beat_at < excluded.beat_at - make_interval(secs => $2 / 2)
                        THEN excluded.beat_at ELSE proxies.unbroken_since END

-- name: living_proxies
-- One that is silent counts until another was heard for all of that time: after an outage of ours everybody is silent.
SELECT proxy_id FROM proxies
WHERE beat_at > coalesce($2, clock_timestamp()) - make_interval(secs => $1)
  OR NOT EXISTS (SELECT FROM proxies WHERE beat_at > coalesce($2, clock_timestamp()) - make_interval(secs => $1)
                   AND unbroken_since <= coalesce($2, clock_timestamp()) - make_interval(secs => $1))

-- name: forget_proxies
DELETE FROM proxies WHERE beat_at < clock_timestamp() - make_interval(secs => $1 * 10)
  AND EXISTS (SELECT FROM proxies WHERE beat_at > clock_timestamp() - make_interval(secs => $1)
                AND unbroken_since <= clock_timestamp() - make_interval(secs => $1))

-- name: beat_replica
-- A gap of half of what an owner may be silent breaks the judge's own line already: what held its beats back held the
-- owner's back for longer, by a beat and by how much later it came through.
INSERT INTO replicas (replica_id) VALUES ($1)
ON CONFLICT (replica_id) DO UPDATE SET beat_at = clock_timestamp(),
  unbroken_since = CASE WHEN replicas.beat_at < clock_timestamp() - make_interval(secs => $2 / 2)
                        THEN clock_timestamp() ELSE replicas.unbroken_since END
RETURNING clock_timestamp() - unbroken_since >= make_interval(secs => $2) AS may_judge

-- name: lost_items
-- Rows whose owner is silent, or has no row at all. Only for a replica that may judge, and only up to its own last beat:
-- Postgres may have stood still since. A claim is a sign of life too: who comes back may claim before it beats. Keyset,
-- so that a page of rows that cannot be written hides nobody (B-08).
SELECT q.queue_id, q.workspace_id, q.delivery_no, q.method, q.body, q.attempts, q.deaths, q.hops, q.agent_task_id,
       q.cancel_at, q.priority, q.lane, q.rank_ms, q.rev,
       extract(epoch FROM q.dispatched_at)::float8 AS dispatched_epoch,
       extract(epoch FROM q.enqueued_at)::float8 AS enqueued_epoch
FROM a2a_queue q LEFT JOIN replicas r ON r.replica_id = q.owner
CROSS JOIN (SELECT coalesce($3, beat_at) - make_interval(secs => $2) AS since FROM replicas WHERE replica_id = $1) silent
WHERE q.status = 'dispatched' AND q.owner <> $1 AND q.dispatched_at < silent.since
  AND (r.replica_id IS NULL OR r.beat_at < silent.since)
  AND ($4::uuid IS NULL OR q.queue_id > $4)
ORDER BY q.queue_id LIMIT $5

-- name: forget_replicas
DELETE FROM replicas r WHERE r.beat_at < clock_timestamp() - make_interval(secs => $1)
  AND NOT EXISTS (SELECT FROM a2a_queue q WHERE q.owner = r.replica_id AND q.status = 'dispatched')

-- name: leave_replica
DELETE FROM replicas WHERE replica_id = $1

-- name: finished_days
-- The partitions of what has ended, each named after the last day that it holds.
SELECT c.relname AS name FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'a2a_finished'::regclass ORDER BY c.relname

-- name: forget_finished
-- What no day took, by batch. SKIP LOCKED, here and below: two replicas that forget share the work.
WITH old AS (
  SELECT ctid FROM a2a_finished_default WHERE ended_at < $1 ORDER BY ended_at LIMIT $2 FOR UPDATE SKIP LOCKED)
DELETE FROM a2a_finished_default WHERE ctid = ANY(ARRAY(SELECT ctid FROM old))

-- name: blank_bodies
-- Of what ended from $1 (null: ever) to $2, a page by its ids.
WITH old AS (
  SELECT queue_id FROM a2a_finished
  WHERE ended_at >= coalesce($1::timestamptz, '-infinity') AND ended_at < $2 AND queue_id > $3 AND NOT body_dropped
  ORDER BY queue_id LIMIT $4 FOR NO KEY UPDATE)
UPDATE a2a_finished SET body = '', body_dropped = true
WHERE ended_at >= coalesce($1::timestamptz, '-infinity') AND ended_at < $2
  AND queue_id = ANY(ARRAY(SELECT queue_id FROM old))
RETURNING queue_id

-- name: forget_schedules
WITH old AS (
  SELECT schedule_id FROM schedules WHERE deleted AND changed_at < $1
  ORDER BY changed_at LIMIT $2 FOR UPDATE SKIP LOCKED)
DELETE FROM schedules WHERE schedule_id = ANY(ARRAY(SELECT schedule_id FROM old))

-- name: forget_keys
WITH old AS (
  SELECT ctid FROM idempotency_keys WHERE expires_at < coalesce($1, now())
  ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED)
DELETE FROM idempotency_keys WHERE ctid = ANY(ARRAY(SELECT ctid FROM old))

-- name: forget_letters
WITH old AS (
  SELECT digest FROM dead_letters WHERE at < coalesce($1, now()) - make_interval(days => $2)
  ORDER BY at, digest LIMIT $3 FOR UPDATE SKIP LOCKED)
DELETE FROM dead_letters WHERE digest = ANY(ARRAY(SELECT digest FROM old))

-- name: count_letters
-- Up to $2 of each reason: a flood of them must not cost a scan at every look.
SELECT r.reason, (SELECT count(*) FROM (
  SELECT FROM dead_letters d WHERE d.reason = r.reason AND d.replayed_at IS NULL LIMIT $2) waiting)::int AS waiting
FROM unnest($1::text[]) AS r(reason)

-- name: list_letters
SELECT digest, at, fact_type, reason, error, octet_length(fact) AS size, replayed_at FROM dead_letters
WHERE (at, digest) < (coalesce($1::timestamptz, 'infinity'), coalesce($2::bytea, ''))
ORDER BY at DESC, digest DESC LIMIT $3

-- name: lock_letter
SELECT fact_type, reason, fact, replayed_at FROM dead_letters WHERE digest = $1 FOR NO KEY UPDATE

-- name: mark_replayed
UPDATE dead_letters SET replayed_at = now() WHERE digest = $1 RETURNING replayed_at

-- name: ending_items
-- Not while its workspace is paused: both clocks stop then. now(), for an index is not compared with what is volatile.
-- Keyset, as above.
SELECT q.queue_id, q.workspace_id, least(q.expires_at, q.give_up_at) AS due_at
FROM a2a_queue q CROSS JOIN LATERAL (
  SELECT paused FROM workspaces WHERE workspace_id = q.workspace_id ORDER BY rev DESC LIMIT 1) w
WHERE q.status = 'queued' AND least(q.expires_at, q.give_up_at) <= coalesce($1, now()) AND NOT w.paused
  AND ($2::timestamptz IS NULL OR (least(q.expires_at, q.give_up_at), q.queue_id) > ($2, $3::uuid))
ORDER BY least(q.expires_at, q.give_up_at), q.queue_id LIMIT $4

-- name: end_items
-- Items that wait and end without a delivery: canceled, expired, given up; a tick that another stands for.
WITH wanted AS (
  SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[]) AS w(queue_id, status, reason, superseded_by)),
mine AS (
  SELECT q.queue_id FROM (SELECT * FROM wanted ORDER BY queue_id) w CROSS JOIN LATERAL (
    SELECT queue_id FROM a2a_queue WHERE queue_id = w.queue_id AND status = 'queued' LIMIT 1 FOR UPDATE) q),
gone AS (DELETE FROM a2a_queue q WHERE q.queue_id = ANY(ARRAY(SELECT queue_id FROM mine)) RETURNING q.*),
kept AS (
  INSERT INTO a2a_finished (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, status, reason,
    method, body, context_id, enqueued_at, dispatched_at, ended_at, attempts, delivery_no, agent_task_id, last_error,
    retry_of, superseded_by, rev, schedule_id, fire_at, merged_count, first_missed_at)
  SELECT g.queue_id, g.workspace_id, g.caller_id, g.caller_hash, g.key_hash, g.body_hash, g.priority, w.status, w.reason,
    g.method, g.body, g.context_id, g.enqueued_at, g.dispatched_at, clock_timestamp(), g.attempts, g.delivery_no,
    g.agent_task_id, g.last_error, g.retry_of, w.superseded_by, g.rev + 1,
    g.schedule_id, g.fire_at, g.merged_count, g.first_missed_at
  FROM gone g JOIN wanted w USING (queue_id))
SELECT queue_id, workspace_id, priority, rev + 1 AS rev, schedule_id, fire_at, rev_needed, attempts,
       extract(epoch FROM dispatched_at)::float8 AS dispatched_epoch FROM gone

-- name: ask_cancel
UPDATE a2a_queue SET cancel_at = coalesce(cancel_at, clock_timestamp()), rev = rev + 1
WHERE queue_id = $1 AND status = 'dispatched' RETURNING queue_id

-- name: find_item
SELECT queue_id, workspace_id, caller_id, caller_hash, status, NULL::text AS ended_reason, priority, attempts, delivery_no,
       enqueued_at, dispatched_at, NULL::timestamptz AS ended_at, least(expires_at, give_up_at) AS expires_at, lane, rank_ms,
       context_id, method, agent_task_id, NULL::uuid AS superseded_by, NULL::bytea AS answer, last_error, retry_of,
       NULL::uuid AS retried_by, not_before, schedule_id, fire_at, merged_count, first_missed_at
FROM a2a_queue WHERE queue_id = $1
UNION ALL
SELECT queue_id, workspace_id, caller_id, caller_hash, status, reason, priority, attempts, delivery_no, enqueued_at,
       dispatched_at, ended_at, NULL, NULL, NULL, context_id, method, agent_task_id, superseded_by, answer, last_error,
       retry_of, retried_by, NULL, schedule_id, fire_at, merged_count, first_missed_at
FROM a2a_finished WHERE queue_id = $1

-- name: find_failed
-- All that a new item takes over from one that ended.
SELECT queue_id, workspace_id, caller_id, caller_hash, body_hash, priority, status, method, body, context_id, retried_by
FROM a2a_finished WHERE queue_id = $1

-- name: set_retried
UPDATE a2a_finished SET retried_by = $2 WHERE queue_id = $1

-- name: promote_item
-- Before whatever stands first in its lane. One that stands there already stays: said twice, it is the same.
UPDATE a2a_queue q SET rank_ms = first.rank_ms - 1, rev = q.rev + 1
FROM (SELECT head.queue_id, head.rank_ms FROM a2a_queue mine CROSS JOIN LATERAL (
        SELECT queue_id, rank_ms FROM a2a_queue
        WHERE workspace_id = mine.workspace_id AND status = 'queued' AND lane = mine.lane
        ORDER BY rank_ms, queue_id LIMIT 1) head
      WHERE mine.queue_id = $1 AND mine.status = 'queued') first
WHERE q.queue_id = $1 AND q.status = 'queued' AND first.queue_id <> q.queue_id
RETURNING q.workspace_id, q.lane, q.rank_ms

-- name: match_waiting
-- In delivery order. What matches is ended in pages; all of it is counted up to a bound.
SELECT queue_id FROM a2a_queue
WHERE workspace_id = $1 AND status = 'queued' AND ($2::smallint IS NULL OR priority = $2)
  AND ($3::bytea IS NULL OR caller_hash = $3)
  AND ($4::float8 IS NULL OR enqueued_at < coalesce($5, now()) - make_interval(secs => $4))
ORDER BY lane, rank_ms, queue_id LIMIT $6

-- name: is_known
-- Whether $3 is an item of this caller here, waiting or ended, or $4 one of his explicit keys.
SELECT EXISTS (SELECT FROM a2a_queue WHERE queue_id = $3 AND workspace_id = $1 AND caller_hash = $2)
  OR EXISTS (SELECT FROM a2a_finished WHERE queue_id = $3 AND workspace_id = $1 AND caller_hash = $2)
  OR EXISTS (SELECT FROM idempotency_keys
             WHERE workspace_id = $1 AND caller_hash = $2 AND key_hash = $4 AND expires_at > now())

-- name: count_ahead
SELECT count(*)::int FROM (
  SELECT FROM a2a_queue WHERE workspace_id = $1 AND status = 'queued' AND (lane, rank_ms, queue_id) < ($2, $3, $4)
  LIMIT 1000) ahead

-- name: list_waiting
-- In delivery order; the cursor is the last item's place.
SELECT queue_id, workspace_id, caller_id, caller_hash, status, NULL::text AS ended_reason, priority, attempts, delivery_no,
       enqueued_at, dispatched_at, NULL::timestamptz AS ended_at, least(expires_at, give_up_at) AS expires_at, lane, rank_ms,
       context_id, method, agent_task_id, NULL::uuid AS superseded_by, NULL::bytea AS answer, last_error, retry_of,
       NULL::uuid AS retried_by, not_before, schedule_id, fire_at, merged_count, first_missed_at
FROM a2a_queue
WHERE workspace_id = $1 AND ($2::bytea IS NULL OR caller_hash = $2)
  AND ($7::smallint IS NULL OR priority = $7) AND status = 'queued'
  AND (lane, rank_ms, queue_id) > ($3::smallint, $4::bigint, $5::uuid)
ORDER BY lane, rank_ms, queue_id LIMIT $6

-- name: list_dispatched
SELECT queue_id, workspace_id, caller_id, caller_hash, status, NULL::text AS ended_reason, priority, attempts, delivery_no,
       enqueued_at, dispatched_at, NULL::timestamptz AS ended_at, least(expires_at, give_up_at) AS expires_at, lane, rank_ms,
       context_id, method, agent_task_id, NULL::uuid AS superseded_by, NULL::bytea AS answer, last_error, retry_of,
       NULL::uuid AS retried_by, not_before, schedule_id, fire_at, merged_count, first_missed_at
FROM a2a_queue
WHERE workspace_id = $1 AND ($2::bytea IS NULL OR caller_hash = $2)
  AND ($7::smallint IS NULL OR priority = $7) AND status = 'dispatched'
  AND (lane, rank_ms, queue_id) > ($3::smallint, $4::bigint, $5::uuid)
ORDER BY lane, rank_ms, queue_id LIMIT $6

-- name: list_finished
SELECT queue_id, workspace_id, caller_id, caller_hash, status, reason AS ended_reason, priority, attempts, delivery_no,
       enqueued_at, dispatched_at, ended_at, NULL::timestamptz AS expires_at, NULL::smallint AS lane,
       NULL::bigint AS rank_ms, context_id, method, agent_task_id, superseded_by, NULL::bytea AS answer, last_error,
       retry_of, retried_by, NULL::timestamptz AS not_before, schedule_id, fire_at, merged_count, first_missed_at
FROM a2a_finished
WHERE workspace_id = $1 AND ($2::bytea IS NULL OR caller_hash = $2)
  AND ($6::smallint IS NULL OR priority = $6) AND status = $3 AND queue_id < $4
ORDER BY queue_id DESC LIMIT $5

-- name: find_schedules
SELECT schedule_id, rev, paused, deleted FROM schedules WHERE schedule_id = ANY($1::uuid[])

-- name: save_schedules
-- The newest word counts. Nobody needs the prompt of one that is gone.
INSERT INTO schedules (schedule_id, workspace_id, rev, prompt, paused, deleted)
SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bytea[], $5::boolean[], $6::boolean[])
  AS s(schedule_id, workspace_id, rev, prompt, paused, deleted) ORDER BY schedule_id
ON CONFLICT (schedule_id) DO UPDATE SET rev = excluded.rev, prompt = excluded.prompt, paused = excluded.paused,
  deleted = schedules.deleted OR excluded.deleted, changed_at = now()
WHERE schedules.rev < excluded.rev

-- name: find_ticks
-- All that waits and runs of these schedules, by the index of their caller; in the order of the line.
SELECT q.queue_id, q.workspace_id, q.schedule_id, q.fire_at, q.last_fire_at, q.first_missed_at, q.merged_count,
       q.rev_needed, q.coalesces, q.context_id, q.ceiling_s, q.status = 'queued' AND q.agent_task_id IS NULL AS waits
FROM unnest($1::text[], $2::bytea[]) AS w(workspace_id, caller_hash) CROSS JOIN LATERAL (
  SELECT * FROM a2a_queue WHERE workspace_id = w.workspace_id AND caller_hash = w.caller_hash) q
WHERE q.schedule_id IS NOT NULL

-- name: insert_ticks
-- One whose prompt has not come yet is claimed by nobody until it has.
INSERT INTO a2a_queue (queue_id, workspace_id, caller_id, caller_hash, key_hash, body_hash, priority, lane, rank_ms, method,
                       body, reason, give_up_at, schedule_id, fire_at, last_fire_at, first_missed_at, merged_count,
                       rev_needed, coalesces, context_id, ceiling_s, not_before)
SELECT i.queue_id, i.workspace_id, i.caller_id, i.caller_hash, i.key_hash, i.key_hash, i.priority, i.lane, i.rank_ms,
       'message/send', '', 'tick', now() + make_interval(secs => i.give_up_after_s), i.schedule_id, i.fire_at,
       i.last_fire_at, i.first_missed_at, i.merged_count, i.rev_needed, i.coalesces, i.context_id, i.ceiling_s,
       CASE WHEN s.rev >= i.rev_needed THEN NULL ELSE 'infinity'::timestamptz END
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::bytea[], $6::smallint[], $7::smallint[], $8::bigint[],
            $9::float8[], $10::uuid[], $11::timestamptz[], $12::timestamptz[], $13::timestamptz[], $14::int[],
            $15::bigint[], $16::boolean[], $17::text[], $18::float8[])
  AS i(queue_id, workspace_id, caller_id, caller_hash, key_hash, priority, lane, rank_ms, give_up_after_s, schedule_id,
       fire_at, last_fire_at, first_missed_at, merged_count, rev_needed, coalesces, context_id, ceiling_s)
LEFT JOIN schedules s ON s.schedule_id = i.schedule_id
ORDER BY i.queue_id

-- name: merge_ticks
-- What waits stands for more fires now. The newest of them has its own time until it is given up.
UPDATE a2a_queue q SET last_fire_at = m.last_fire_at, first_missed_at = m.first_missed_at, merged_count = m.merged_count,
  rev_needed = m.rev_needed, context_id = m.context_id, ceiling_s = m.ceiling_s, rev = q.rev + 1,
  give_up_at = greatest(q.give_up_at, now() + make_interval(secs => m.give_up_after_s)),
  not_before = CASE WHEN (SELECT s.rev FROM schedules s WHERE s.schedule_id = q.schedule_id) >= m.rev_needed
                    THEN q.not_before ELSE 'infinity' END
FROM unnest($1::uuid[], $2::timestamptz[], $3::timestamptz[], $4::int[], $5::bigint[], $6::text[], $7::float8[],
            $8::float8[])
  AS m(queue_id, last_fire_at, first_missed_at, merged_count, rev_needed, context_id, ceiling_s, give_up_after_s)
WHERE q.queue_id = ANY($1::uuid[]) AND q.queue_id = m.queue_id AND q.status = 'queued'

-- name: release_ticks
-- Their prompts have come.
UPDATE a2a_queue q SET not_before = NULL, rev = q.rev + 1
FROM schedules s
WHERE q.queue_id = ANY($1::uuid[]) AND s.schedule_id = q.schedule_id AND q.status = 'queued'
  AND q.not_before = 'infinity' AND s.rev >= q.rev_needed

-- name: read_prompts
-- For ticks that were claimed, under the lock of their workspaces.
SELECT q.queue_id, q.workspace_id, q.schedule_id, q.fire_at, q.last_fire_at, q.first_missed_at, q.merged_count,
       q.rev_needed, q.coalesces, q.context_id, q.ceiling_s, false AS waits, s.rev AS prompt_rev, s.prompt
FROM a2a_queue q JOIN schedules s ON s.schedule_id = q.schedule_id
WHERE q.queue_id = ANY($1::uuid[]) AND s.rev >= q.rev_needed

-- name: save_bodies
UPDATE a2a_queue q SET body = b.body FROM unnest($1::uuid[], $2::bytea[]) AS b(queue_id, body)
WHERE q.queue_id = ANY($1::uuid[]) AND q.queue_id = b.queue_id
