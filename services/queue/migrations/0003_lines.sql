-- Before: one floor for both lanes of a workspace, one counter for all that waits, clocks that a pause only holds.
-- After: a floor and a counter per lane, what every second turn needs, when a pause began, and how long deliveries take.
-- Not safe while the old code runs, which reads and writes the one floor: stop every replica of queue first.

ALTER TABLE workspaces DROP COLUMN floor, DROP COLUMN floor_rev,
  -- [CRITICAL, the rest]: the rank below which nothing waits in that lane.
  ADD COLUMN floors            bigint[] NOT NULL DEFAULT '{0,0}' CHECK (cardinality(floors) = 2),
  -- Of `waiting`; the others are TASK.
  ADD COLUMN waiting_critical  int NOT NULL DEFAULT 0 CHECK (waiting_critical >= 0),
  ADD COLUMN waiting_info      int NOT NULL DEFAULT 0 CHECK (waiting_info >= 0),
  ADD COLUMN served_critical   boolean NOT NULL DEFAULT false,   -- what was claimed last
  ADD COLUMN paused_at         timestamptz,
  ADD COLUMN turns_s           float8[] NOT NULL DEFAULT '{}';   -- lengths of the newest answered deliveries

UPDATE workspaces w SET paused_at = CASE WHEN paused THEN now() END,
  waiting = (SELECT count(*) FROM a2a_queue q WHERE q.workspace_id = w.workspace_id AND q.status = 'queued'),
  waiting_critical = (SELECT count(*) FROM a2a_queue q
                      WHERE q.workspace_id = w.workspace_id AND q.status = 'queued' AND q.priority = 100),
  waiting_info = (SELECT count(*) FROM a2a_queue q
                  WHERE q.workspace_id = w.workspace_id AND q.status = 'queued' AND q.priority = 10);
-- Patience: INFO that waits goes 120 s further back, behind the TASK messages of those two minutes.
UPDATE a2a_queue SET rank_ms = rank_ms + 120000 WHERE priority = 10;

ALTER TABLE workspaces ADD CHECK (waiting >= waiting_critical + waiting_info),
  ADD CHECK (paused = (paused_at IS NOT NULL));

-- What repeats what. retried_by is all that ever changes of a row that has ended; no index is needed for it, and one on
-- retry_of would cost every claim two buffers while it is empty.
ALTER TABLE a2a_queue ADD COLUMN retry_of uuid;
ALTER TABLE a2a_finished ADD COLUMN retry_of uuid, ADD COLUMN retried_by uuid;
