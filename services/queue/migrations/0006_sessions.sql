-- Before: a workspace is open or shut by itself, and a delivery ends when its agent ends it.
-- After: a gate that is kept closed while a session there is being ended, stops of deliveries, which proxies live, and
-- what a snapshot names although nothing of ours waits or runs there.
-- Safe while the old code runs as long as no scheduler that ends sessions does: it could send back what was told to stop.

ALTER TABLE workspaces
  -- session → [rev of the last word about it, until, whether it has left]
  ADD COLUMN gates            jsonb NOT NULL DEFAULT '{}',
  ADD COLUMN gate_generation  bigint NOT NULL DEFAULT 0,    -- how often the gate went from open to closed
  ADD COLUMN ever_active      boolean NOT NULL DEFAULT false,  -- its agent's beats have shown more than 0 once
  -- Its agent's beat shows work, a proxy forwards there, or a session is in its gate; a snapshot looks closer.
  ADD COLUMN engaged          boolean NOT NULL DEFAULT false;
UPDATE workspaces SET ever_active = beat_active > 0, engaged = beat_active > 0 OR forwards <> '{}';

-- One index for sweeps and snapshots: another would cost every claim two buffers.
DROP INDEX workspaces_active;
CREATE INDEX workspaces_active ON workspaces (workspace_id) WHERE waiting > 0 OR running > 0 OR engaged;

-- stop_at stands in 0001. A row with it never waits again.
ALTER TABLE a2a_queue
  ADD COLUMN stop_reason    text,
  ADD COLUMN stop_heard_at  timestamptz,  -- the newest repetition
  ADD COLUMN hang_up_at     timestamptz,  -- nothing else ends it
  ADD CHECK ((stop_at IS NULL) = (stop_reason IS NULL)),
  ADD CHECK (stop_at IS NULL OR status = 'dispatched');

-- Who may begin a forward. unbroken_since as in replicas: who has itself been heard all the time says that silence counts.
CREATE TABLE proxies (
  proxy_id        text PRIMARY KEY,
  beat_at         timestamptz NOT NULL DEFAULT now(),
  unbroken_since  timestamptz NOT NULL DEFAULT now()
);
