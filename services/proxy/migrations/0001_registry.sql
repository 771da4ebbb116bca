-- Before: nothing. After: who exists, where, with which token, settings and incarnation; who may call.
-- Safe while the old code runs: it knows none of these tables.

-- One row per workspace, for ever: a removed one is never resurrected. rev counts every change of the row.
CREATE TABLE workspaces (
  workspace_id         text PRIMARY KEY CHECK (workspace_id ~ '^[A-Za-z0-9._-]{1,128}$' AND workspace_id <> '-'),
  owner_caller         text NOT NULL,
  url                  text NOT NULL,                     -- '': its agent is reachable nowhere yet
  token_hash           bytea NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
  agent_authorization  text,
  agent_card           json,                              -- json, not jsonb: it keeps what the agent wrote, NUL escapes too
  runtime              json NOT NULL DEFAULT '{}',
  settings             json NOT NULL DEFAULT '{}',
  capabilities         text[] NOT NULL DEFAULT '{}',
  max_concurrent       int NOT NULL CHECK (max_concurrent >= 1),
  heartbeat_interval_s float8 NOT NULL CHECK (heartbeat_interval_s > 0),
  desired              text NOT NULL DEFAULT 'running' CHECK (desired IN ('running', 'stopped')),
  paused               boolean NOT NULL DEFAULT false,
  pause_note           text,
  boot_id              text,                              -- of the process that lives now
  boots_past           text[] NOT NULL DEFAULT '{}',      -- of those before it, the newest 8: a straggler bumps nothing
  booted_at            timestamptz,                       -- for agents without boot_id: receive time minus uptime
  incarnation          bigint NOT NULL DEFAULT 1 CHECK (incarnation >= 1),
  registered_at        timestamptz NOT NULL DEFAULT now(),
  removed_at           timestamptz,
  rev                  bigint NOT NULL DEFAULT 1
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

-- API keys, as sha256. A key that was revoked stays, so that its name is not given away again.
CREATE TABLE callers (
  key_hash    bytea PRIMARY KEY CHECK (octet_length(key_hash) = 32),
  caller_id   text NOT NULL CHECK (caller_id <> ''),
  rights      text[] NOT NULL DEFAULT '{}' CHECK (rights <@ ARRAY['critical', 'operator']),
  created_at  timestamptz NOT NULL DEFAULT now(),
  revoked_at  timestamptz
);

-- Who changed what. Never a token, a card or an authorization.
CREATE TABLE audit (
  id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at            timestamptz NOT NULL DEFAULT now(),
  caller_id     text NOT NULL,
  action        text NOT NULL,
  workspace_id  text NOT NULL,
  detail        json NOT NULL DEFAULT '{}'
);
