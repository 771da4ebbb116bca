-- Before: nothing. After: schedules, their fires, and what the calendar knows of workspaces.
-- Safe while the old code runs: it knows none of these tables.

-- What the registry said of a workspace, as far as the calendar needs it. Lock order: inbox, workspaces by id, schedules by
-- id, fires, outbox.
CREATE TABLE workspaces (
  workspace_id  text PRIMARY KEY,
  removed       boolean NOT NULL DEFAULT false,
  rev           bigint NOT NULL DEFAULT 0
);

CREATE TABLE schedules (
  schedule_id       uuid PRIMARY KEY,
  workspace_id      text NOT NULL,
  name              text NOT NULL,
  -- When: one of three.
  cron              text,
  every_s           bigint CHECK (every_s >= 1),
  at                timestamptz,
  timezone          text NOT NULL,
  -- Intervals count from here: when the rule was given.
  anchor_at         timestamptz NOT NULL,
  -- What: told to the agent, and with which rules.
  prompt            text NOT NULL,
  context           text NOT NULL CHECK (context IN ('fresh', 'same')),
  overlap           text NOT NULL CHECK (overlap IN ('queue_one', 'queue_all', 'skip')),
  priority          text NOT NULL CHECK (priority IN ('CRITICAL', 'TASK', 'INFO')),
  catchup_window_s  float8 CHECK (catchup_window_s > 0),
  jitter_s          float8 NOT NULL CHECK (jitter_s >= 0),
  ceiling_s         float8 CHECK (ceiling_s >= 0),
  ends_at           timestamptz,
  remaining_runs    bigint CHECK (remaining_runs >= 0),
  paused            boolean NOT NULL DEFAULT false,
  pause_note        text,
  paused_by_error   text,
  -- The next nominal moment, and when it is due: later by the schedule's jitter. None while paused, deleted or over.
  next_fire_at      timestamptz,
  due_at            timestamptz,
  -- What became of its fires. An open one is in fires_total and in no outcome.
  fires_total       bigint NOT NULL DEFAULT 0,
  delivered         bigint NOT NULL DEFAULT 0,
  coalesced       bigint NOT NULL DEFAULT 0,
  skipped           bigint NOT NULL DEFAULT 0,
  missed            bigint NOT NULL DEFAULT 0,
  failed            bigint NOT NULL DEFAULT 0,
  ceiling           bigint NOT NULL DEFAULT 0,
  canceled          bigint NOT NULL DEFAULT 0,
  run_count         bigint NOT NULL DEFAULT 0,
  last_ran_at       timestamptz,
  -- Fires since then that bounced.
  bounces           bigint NOT NULL DEFAULT 0 CHECK (bounces >= 0),
  rev               bigint NOT NULL DEFAULT 1,
  created_at        timestamptz NOT NULL DEFAULT now(),
  deleted_at        timestamptz,
  CHECK (num_nonnulls(cron, every_s, at) = 1),
  CHECK ((next_fire_at IS NULL) = (due_at IS NULL)),
  CHECK (due_at >= next_fire_at),
  CHECK (next_fire_at IS NULL OR (NOT paused AND deleted_at IS NULL)),
  CHECK (next_fire_at IS NULL OR remaining_runs IS NULL OR remaining_runs > 0),
  CHECK (paused OR (pause_note IS NULL AND paused_by_error IS NULL)),
  CHECK (fires_total >= delivered + coalesced + skipped + missed + failed + ceiling + canceled)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

-- Only what will fire: paused, deleted and ended ones have no moment.
CREATE INDEX schedules_due ON schedules (due_at) WHERE due_at IS NOT NULL;
CREATE UNIQUE INDEX schedules_named ON schedules (workspace_id, name) WHERE deleted_at IS NULL;
CREATE INDEX schedules_failed ON schedules (schedule_id) WHERE paused_by_error IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX schedules_deleted ON schedules (deleted_at) WHERE deleted_at IS NOT NULL;

-- A fire, or several that came to the same end together: from fire_at to last_fire_at, count of them. Without an outcome it
-- is on its way to its agent as the item queue_id.
CREATE TABLE fires (
  schedule_id   uuid NOT NULL,
  fire_at       timestamptz NOT NULL,
  last_fire_at  timestamptz NOT NULL,
  count         bigint NOT NULL DEFAULT 1 CHECK (count >= 1),
  by_hand       boolean NOT NULL DEFAULT false,
  -- It found its agent busy: it was skipped, told with another one, or another was told with it.
  bounced       boolean NOT NULL DEFAULT false,
  outcome       text CHECK (outcome IN ('delivered', 'coalesced', 'skipped', 'missed', 'failed', 'ceiling', 'canceled')),
  reason        text,
  merged_into   timestamptz,
  queue_id      uuid,
  began_at      timestamptz,
  rev           bigint NOT NULL,
  at            timestamptz NOT NULL DEFAULT now(),
  settled_at    timestamptz,
  PRIMARY KEY (schedule_id, fire_at),
  CHECK ((outcome IS NULL) = (settled_at IS NULL)),
  CHECK (outcome IS NOT NULL OR queue_id IS NOT NULL),
  CHECK (CASE WHEN count = 1 THEN last_fire_at = fire_at ELSE last_fire_at > fire_at END),
  CHECK (count = 1 OR outcome IN ('coalesced', 'missed', 'canceled'))
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX fires_settled ON fires (settled_at) WHERE settled_at IS NOT NULL;

-- Who changed what; never a prompt. A command that is said again is found by its query_id.
CREATE TABLE audit (
  query_id      uuid PRIMARY KEY,
  at            timestamptz NOT NULL DEFAULT now(),
  caller_id     text NOT NULL,
  action        text NOT NULL,
  workspace_id  text NOT NULL,
  schedule_id   uuid NOT NULL,
  rev           bigint NOT NULL,
  fire_at       timestamptz
);
