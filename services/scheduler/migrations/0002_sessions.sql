-- Before: schedules and fires. After: sessions too, what their workspaces allow them, and what was last seen of them.
-- Safe while the old code runs: it writes none of this, and gives every column a default.

ALTER TABLE workspaces ADD COLUMN settings jsonb NOT NULL DEFAULT '{}', ADD COLUMN incarnation bigint NOT NULL DEFAULT 0;

-- What runs, and how it is being ended. One that ended while nobody had asked it for anything is deleted.
-- Lock order: workspaces, schedules, fires, sessions by id, outbox.
CREATE TABLE sessions (
  session_id     text PRIMARY KEY,
  workspace_id   text NOT NULL,
  kind           text NOT NULL CHECK (kind IN ('delivery', 'forward', 'foreign')),
  incarnation    bigint NOT NULL,
  schedule_id    uuid,
  ceiling_s      float8 CHECK (ceiling_s >= 0),      -- its own; null: its workspace's; 0: none
  started_at     timestamptz NOT NULL,
  state          text NOT NULL CHECK (state IN ('running', 'checkpoint_sent', 'stop_sent', 'kill_ordered')),
  deadline_at    timestamptz,                        -- of the state; written once
  stop_reason    text CHECK (stop_reason IN ('ceiling', 'operator')),
  said_at        timestamptz,
  gate_said_at   timestamptz,
  asks           jsonb NOT NULL DEFAULT '[]',        -- checkpoints that were asked for, each once
  closing        jsonb,                              -- the gate's last word
  orders         int NOT NULL DEFAULT 0,
  unenforceable  boolean NOT NULL DEFAULT false,     -- nobody can end its container
  noted_at       timestamptz NOT NULL,               -- when the snapshot was true that showed it first
  due_at         timestamptz,                        -- when to look at it again
  ended_at       timestamptz,
  end_reason     text,
  rev            bigint NOT NULL DEFAULT 1,
  CHECK ((ended_at IS NULL) = (end_reason IS NULL)),
  CHECK (ended_at IS NULL OR due_at IS NULL),
  CHECK ((state IN ('stop_sent', 'kill_ordered')) = (stop_reason IS NOT NULL)),
  CHECK (state <> 'running' OR deadline_at IS NULL),
  CHECK (deadline_at IS NOT NULL OR state = 'running' OR unenforceable)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX sessions_due ON sessions (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX sessions_open ON sessions (workspace_id, started_at) WHERE ended_at IS NULL;
CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL;

-- What heartbeats have shown of work that neither deliveries nor live forwards explain.
CREATE TABLE activities (
  workspace_id  text PRIMARY KEY,
  incarnation   bigint NOT NULL,
  beats         int NOT NULL,
  nones         int NOT NULL,
  beat_at       timestamptz,
  since         timestamptz,
  number        int NOT NULL
);

-- The snapshot that was taken in last; whoever raises it takes in the next.
CREATE TABLE last_snapshot (
  one          boolean PRIMARY KEY DEFAULT true CHECK (one),
  at           timestamptz NOT NULL,
  snapshot_id  uuid
);
INSERT INTO last_snapshot (at) VALUES ('-infinity');

-- Fires on their way: who waits for a session to end.
CREATE INDEX fires_open ON fires (schedule_id, fire_at) WHERE outcome IS NULL;

-- A command about sessions is about no schedule.
ALTER TABLE audit ALTER COLUMN schedule_id DROP NOT NULL;
