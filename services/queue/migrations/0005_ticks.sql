-- Before: messages only. After: a fire of a schedule is an item as well, and what a schedule says now is known here.
-- Safe while the old code runs as long as no scheduler does: it could claim a tick, and would find no body in it.

-- The copy. A deleted one stays for a while: its last ticks may come after the word of its end.
CREATE TABLE schedules (
  schedule_id   uuid PRIMARY KEY,
  workspace_id  text NOT NULL,
  rev           bigint NOT NULL,
  prompt        bytea NOT NULL,  -- UTF-8; a text column takes no NUL, which is legal in JSON
  paused        boolean NOT NULL,
  deleted       boolean NOT NULL,
  changed_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX schedules_deleted ON schedules (changed_at) WHERE deleted;

-- A tick is an item with a schedule. No index of its own: its caller is its schedule, so the key's index finds it, and an
-- empty partial one would cost every claim two buffers.
ALTER TABLE a2a_queue
  ADD COLUMN schedule_id      uuid,
  ADD COLUMN fire_at          timestamptz,  -- the fire that it became the item of
  ADD COLUMN last_fire_at     timestamptz,  -- the newest that it stands for
  ADD COLUMN first_missed_at  timestamptz,  -- the oldest, if they are several
  ADD COLUMN merged_count     int,
  ADD COLUMN rev_needed       bigint,       -- until the copy has it, not_before is infinity
  ADD COLUMN coalesces        boolean,      -- it may come to stand for others
  ADD COLUMN ceiling_s        float8,       -- instead of its workspace's
  ADD CHECK (CASE WHEN schedule_id IS NULL THEN num_nonnulls(fire_at, last_fire_at, merged_count, rev_needed) = 0
                  ELSE num_nonnulls(fire_at, last_fire_at, merged_count, rev_needed, coalesces) = 5 AND merged_count > 0
             END),
  -- Its body is made of the newest prompt when it is claimed.
  ADD CHECK (schedule_id IS NULL OR status = 'dispatched' OR body = '');
ALTER TABLE a2a_finished
  ADD COLUMN schedule_id      uuid,
  ADD COLUMN fire_at          timestamptz,
  ADD COLUMN merged_count     int,
  ADD COLUMN first_missed_at  timestamptz;
