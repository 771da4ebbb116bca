-- Statements of the machinery that every service has. Each runs in the service's own schema.

-- name: inbox_partition_exists
SELECT to_regclass($1) IS NOT NULL

-- name: insert_inbox
-- New facts only. Sorted by the caller: two replicas with the same batch must not lock each other out (4-data, lock order).
INSERT INTO inbox (fact_id) SELECT unnest($1::uuid[]) ON CONFLICT DO NOTHING RETURNING fact_id

-- name: inbox_partitions
SELECT c.relname AS name
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'inbox'::regclass
ORDER BY c.relname

-- name: insert_outbox
INSERT INTO outbox (fact_type, fact) SELECT * FROM unnest($1::text[], $2::bytea[])

-- name: claim_outbox
-- Rows are changed by their place, here and below: a plan that was made while the outbox was empty, as it is nearly always,
-- would by id compare each of its rows with each of the claimed.
WITH due AS (
  SELECT ctid AS place FROM outbox
  WHERE claimed_until IS NULL OR claimed_until < coalesce($3, now())
  ORDER BY id LIMIT $1
  FOR NO KEY UPDATE SKIP LOCKED)
UPDATE outbox SET claimed_until = coalesce($3, now()) + make_interval(secs => $2)
FROM due WHERE outbox.ctid = due.place
RETURNING outbox.id, outbox.fact_type, outbox.fact, outbox.claimed_until

-- name: release_outbox
-- Only while the claim is still ours.
WITH mine AS (
  SELECT ctid AS place FROM outbox WHERE id = ANY($1::bigint[]) AND claimed_until = $2 ORDER BY id FOR NO KEY UPDATE)
UPDATE outbox SET claimed_until = NULL FROM mine WHERE outbox.ctid = mine.place

-- name: delete_outbox
WITH mine AS (SELECT ctid AS place FROM outbox WHERE id = ANY($1::bigint[]) ORDER BY id FOR UPDATE)
DELETE FROM outbox USING mine WHERE outbox.ctid = mine.place

-- name: outbox_oldest_age
-- Of the first by id: min(added_at) would read all that waits, at each turn.
SELECT coalesce(extract(epoch FROM now() - (SELECT added_at FROM outbox ORDER BY id LIMIT 1)), 0)::float8

-- name: insert_dead_letter
INSERT INTO dead_letters (digest, fact_type, reason, error, fact) VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
