-- Before: a life of an agent is a number, and whoever died is found out by whoever delivers there; a turn's ceiling is the
-- only bound of it that a workspace may say itself.
-- After: liveness' word about the life, which life is over and since when, and both graces beside the ceiling.
-- Safe while the old code runs: it knows none of these columns, and delivers to the dead as before.

ALTER TABLE workspaces
  ADD COLUMN checkpoint_grace_s  float8 NOT NULL DEFAULT 120,
  ADD COLUMN stop_grace_s        float8 NOT NULL DEFAULT 30,
  ADD COLUMN unsaid              text[] NOT NULL DEFAULT '{ceiling_s,checkpoint_grace_s,stop_grace_s}',  -- the service's own
  ADD COLUMN life_at             timestamptz,  -- when the incarnation was first heard of
  ADD COLUMN status              text,
  ADD COLUMN status_rev          bigint NOT NULL DEFAULT 0,
  ADD COLUMN dead_incarnation    bigint NOT NULL DEFAULT 0,  -- the last one that was declared dead
  ADD COLUMN dead_at             timestamptz;
UPDATE workspaces SET unsaid = '{checkpoint_grace_s,stop_grace_s}' WHERE ceiling_s <> 1800;
