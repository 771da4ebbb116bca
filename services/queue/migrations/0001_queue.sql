-- Before: nothing. After: what is kept, what is finished, and the queue's own copy of each workspace.
-- Safe while the old code runs: it knows none of these tables.

-- The copy of the registry, the lock under which a workspace's items move, and the counters that the lock makes exact.
CREATE TABLE workspaces (
  workspace_id         text PRIMARY KEY,
  -- What the registry said, at its revision.
  registry_rev         bigint NOT NULL DEFAULT 0,
  url                  text,
  agent_authorization  text,
  max_concurrent       int NOT NULL DEFAULT 1 CHECK (max_concurrent >= 1),
  at_most_once         boolean NOT NULL DEFAULT false,
  give_up_after_s      float8 NOT NULL DEFAULT 86400,
  ceiling_s            float8 NOT NULL DEFAULT 1800,
  paused               boolean NOT NULL DEFAULT false,
  removed              boolean NOT NULL DEFAULT false,
  incarnation          bigint NOT NULL DEFAULT 0,
  -- The agent's last beat. rev is its receive time in µs.
  beat_rev             bigint NOT NULL DEFAULT 0,
  beat_at              timestamptz,
  beat_active          int NOT NULL DEFAULT 0,
  beat_cadence_s       float8 NOT NULL DEFAULT 30,
  -- Ours: items that wait and that are being delivered; deliveries begun and answered since the beat; the newest ends.
  waiting              int NOT NULL DEFAULT 0 CHECK (waiting >= 0),
  running              int NOT NULL DEFAULT 0 CHECK (running >= 0),
  started_since        int NOT NULL DEFAULT 0,
  ended_since          int NOT NULL DEFAULT 0,
  recent_ended         float8[] NOT NULL DEFAULT '{}',
  -- Live forwards: proxy → {rev, at, running: [[session, key, started]], ended: [[started, ended, counts]]}.
  forwards             jsonb NOT NULL DEFAULT '{}',
  -- Busy closes the workspace, not the row.
  not_before           timestamptz,
  busy_streak          int NOT NULL DEFAULT 0,
  rev                  bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX workspaces_active ON workspaces (workspace_id) WHERE waiting > 0 OR running > 0;

-- Hot: only what is not finished. The body is what came, byte for byte.
CREATE TABLE a2a_queue (
  queue_id        uuid PRIMARY KEY,
  workspace_id    text NOT NULL,
  caller_id       text NOT NULL,
  caller_hash     bytea NOT NULL,
  key_hash        bytea NOT NULL,
  body_hash       bytea NOT NULL,
  priority        smallint NOT NULL CHECK (priority IN (100, 50, 10)),
  lane            smallint NOT NULL CHECK (lane = CASE WHEN priority = 100 THEN 0 ELSE 1 END),
  rank_ms         bigint NOT NULL,
  status          text NOT NULL DEFAULT 'queued' CHECK (status IN ('queued', 'dispatched')),
  method          text NOT NULL,
  body            bytea NOT NULL,
  reason          text NOT NULL,
  context_id      text,
  hops            int NOT NULL DEFAULT 0,
  enqueued_at     timestamptz NOT NULL DEFAULT now(),
  not_before      timestamptz,
  expires_at      timestamptz,
  give_up_at      timestamptz NOT NULL,
  attempts        int NOT NULL DEFAULT 0,
  deaths          int NOT NULL DEFAULT 0,
  delivery_no     int NOT NULL DEFAULT 0,
  dispatched_at   timestamptz,
  owner           text,
  incarnation     bigint NOT NULL DEFAULT 0,
  agent_task_id   text,
  stop_at         timestamptz,
  cancel_at       timestamptz,
  last_error      text,
  rev             bigint NOT NULL DEFAULT 1,
  CHECK ((status = 'dispatched') = (owner IS NOT NULL)),
  CHECK (status = 'queued' OR dispatched_at IS NOT NULL)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX a2a_queue_waiting ON a2a_queue (workspace_id, lane, rank_ms, queue_id) WHERE status = 'queued';
CREATE INDEX a2a_queue_dispatched ON a2a_queue (workspace_id) WHERE status = 'dispatched';
CREATE INDEX a2a_queue_owned ON a2a_queue (owner) WHERE status = 'dispatched';
CREATE INDEX a2a_queue_ending ON a2a_queue (least(expires_at, give_up_at)) WHERE status = 'queued';
CREATE UNIQUE INDEX a2a_queue_key ON a2a_queue (workspace_id, caller_hash, key_hash);

-- Terminal rows never change.
CREATE TABLE a2a_finished (
  queue_id       uuid PRIMARY KEY,
  workspace_id   text NOT NULL,
  caller_id      text NOT NULL,
  caller_hash    bytea NOT NULL,
  key_hash       bytea NOT NULL,
  body_hash      bytea NOT NULL,
  priority       smallint NOT NULL,
  status         text NOT NULL CHECK (status IN ('completed', 'failed', 'expired', 'canceled', 'superseded')),
  reason         text,
  method         text NOT NULL,
  body           bytea NOT NULL,
  context_id     text,
  enqueued_at    timestamptz NOT NULL,
  dispatched_at  timestamptz,
  ended_at       timestamptz NOT NULL,
  attempts       int NOT NULL,
  delivery_no    int NOT NULL,
  agent_task_id  text,
  last_error     text,
  superseded_by  uuid,
  answer         bytea,
  rev            bigint NOT NULL,
  CHECK (status = 'completed' OR reason IS NOT NULL),
  CHECK ((status = 'superseded') = (superseded_by IS NOT NULL))
);

CREATE INDEX a2a_finished_listed ON a2a_finished (workspace_id, queue_id);

-- Explicit Idempotency-Keys, for the whole retention.
CREATE TABLE idempotency_keys (
  workspace_id  text NOT NULL,
  caller_hash   bytea NOT NULL,
  key_hash      bytea NOT NULL,
  queue_id      uuid NOT NULL,
  body_hash     bytea NOT NULL,
  expires_at    timestamptz NOT NULL,
  PRIMARY KEY (workspace_id, caller_hash, key_hash)
);

-- Who delivers. A row that is silent for owner_silent_s has lost its deliveries.
CREATE TABLE replicas (
  replica_id      text PRIMARY KEY,
  beat_at         timestamptz NOT NULL DEFAULT now(),
  unbroken_since  timestamptz NOT NULL DEFAULT now()
);
