-- Before: one table of what has ended, kept for ever. After: a partition per UTC day of the ending, so that retention is a
-- DROP; expired idempotency keys are found by their time.
-- Safe while the old code runs: it names its columns, and its ON CONFLICT DO NOTHING only has nothing to meet any more.

ALTER TABLE a2a_finished
  -- The body was given up before the item.
  ADD COLUMN body_dropped boolean NOT NULL DEFAULT false CHECK (NOT body_dropped OR body = ''),
  DROP CONSTRAINT a2a_finished_pkey;  -- a key over all days would have to hold the day
ALTER INDEX a2a_finished_listed RENAME TO a2a_finished_listed_before;

-- What has ended so far is the first partition, however long ago, and goes with its last day. A partition is named after
-- the last day that it holds.
DO $$
DECLARE
  last date := (SELECT (greatest(clock_timestamp(), max(ended_at)) AT TIME ZONE 'UTC')::date FROM a2a_finished);
  before text := 'a2a_finished_' || to_char(last, 'YYYYMMDD');
BEGIN
  EXECUTE format('ALTER TABLE a2a_finished RENAME TO %I', before);
  EXECUTE format('CREATE TABLE a2a_finished (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING STORAGE)
                  PARTITION BY RANGE (ended_at)', before);
  EXECUTE format('ALTER TABLE a2a_finished ATTACH PARTITION %I FOR VALUES FROM (MINVALUE) TO (%L)',
                 before, (last + 1)::timestamp AT TIME ZONE 'UTC');
END
$$;

-- Where an ending goes whose day has no partition: refused, it would be taken for bad data.
CREATE TABLE a2a_finished_default PARTITION OF a2a_finished DEFAULT;
CREATE INDEX a2a_finished_default_ended ON a2a_finished_default (ended_at);

CREATE INDEX a2a_finished_found ON a2a_finished (queue_id);
CREATE INDEX a2a_finished_listed ON a2a_finished (workspace_id, queue_id);

CREATE INDEX idempotency_keys_expiring ON idempotency_keys (expires_at);
