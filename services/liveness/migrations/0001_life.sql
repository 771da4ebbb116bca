-- Before: nothing. After: agents, the evidence about their lives, their restarts, and orders to kill.
-- Safe while the old code runs: it knows none of these tables.

-- What is believed of each agent. Lock order: inbox, agents by id, restarts by id, orders, evidence, outbox.
CREATE TABLE agents (
  workspace_id     text PRIMARY KEY,
  -- The registry's word.
  rev              bigint NOT NULL,
  incarnation      bigint NOT NULL,
  runtime          jsonb NOT NULL DEFAULT '{}',
  driver           text,
  expects_beats    boolean NOT NULL DEFAULT true,
  restart_wedged   boolean NOT NULL DEFAULT false,
  cordoned         boolean NOT NULL DEFAULT false,
  paused           boolean NOT NULL DEFAULT false,
  desired          text NOT NULL DEFAULT 'running' CHECK (desired IN ('running', 'stopped')),
  removed          boolean NOT NULL DEFAULT false,
  -- What was heard of this incarnation. Moments are ours, by the database's clock.
  cadence_s        float8 NOT NULL CHECK (cadence_s > 0),
  beat_rev         bigint NOT NULL DEFAULT 0,
  beats            bigint NOT NULL DEFAULT 0,
  gap_mean_s       float8 NOT NULL DEFAULT 0,
  gap_deviation_s  float8 NOT NULL DEFAULT 0,
  beat_at          timestamptz,
  heard_at         timestamptz,
  active           bigint NOT NULL DEFAULT 0,
  progress         float8,
  progress_at      timestamptz,
  -- What is believed; status_rev numbers what was told.
  status           text NOT NULL DEFAULT 'online'
                   CHECK (status IN ('online', 'suspect', 'offline', 'restarting', 'wedged', 'paused', 'gave_up', 'removed')),
  reason           text NOT NULL DEFAULT '',
  status_rev       bigint NOT NULL DEFAULT 0,
  status_at        timestamptz NOT NULL DEFAULT now(),
  suspected_at     timestamptz,
  suspected_last_at timestamptz,
  suspicions       bigint NOT NULL DEFAULT 0,
  blind_since      timestamptz,
  -- What its driver saw or started; known: it has ever seen it.
  known            boolean NOT NULL DEFAULT false,
  container_id     text,
  started_at       timestamptz,
  boot_until       timestamptz,
  next_check_at    timestamptz,
  -- Restarts: the fence numbers them; unheard ones are those since it was last heard.
  fence            bigint NOT NULL DEFAULT 0,
  restarts         bigint NOT NULL DEFAULT 0,
  backoffs         bigint NOT NULL DEFAULT 0,
  unheard          bigint NOT NULL DEFAULT 0,
  restarted_at     timestamptz,
  -- Restarts before that are no longer held against it.
  forgiven_at      timestamptz,
  CHECK ((suspicions = 0) = (suspected_at IS NULL)),
  CHECK (suspected_last_at >= suspected_at),
  CHECK (removed = (status = 'removed')),
  CHECK (driver IS NOT NULL OR next_check_at IS NULL)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX agents_due ON agents (next_check_at) WHERE next_check_at IS NOT NULL;

-- One restart from its decision to its end. due_at: backoff, then its turn. lease_until: a replica is at it; when that has
-- passed another goes on under the same fence.
CREATE TABLE restarts (
  restart_id    uuid PRIMARY KEY,
  workspace_id  text NOT NULL,
  incarnation   bigint NOT NULL,
  fence         bigint NOT NULL,
  reason        text NOT NULL
                CHECK (reason IN ('first_start', 'stopped', 'not_found', 'exited', 'wedged', 'operator', 'ceiling')),
  evidence      text NOT NULL,
  container_id  text,
  driver        text NOT NULL,
  -- kill: end it first, and say so to whoever ordered it; start: the driver ends what is left and starts.
  phase         text NOT NULL CHECK (phase IN ('kill', 'start')),
  decided_at    timestamptz NOT NULL DEFAULT now(),
  due_at        timestamptz NOT NULL,
  began_at      timestamptz,
  lease_until   timestamptz,
  owner         text,
  tries         bigint NOT NULL DEFAULT 0,
  asked_again   bigint NOT NULL DEFAULT 0,
  last_error    text,
  ended_at      timestamptz,
  result        text CHECK (result IN ('started', 'killed', 'recovered', 'withdrawn', 'cannot_run', 'replaced')),
  CHECK ((ended_at IS NULL) = (result IS NULL)),
  CHECK (ended_at IS NULL OR lease_until IS NULL),
  CHECK ((owner IS NULL) = (lease_until IS NULL))
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

CREATE UNIQUE INDEX restarts_open ON restarts (workspace_id) WHERE ended_at IS NULL;
CREATE INDEX restarts_due ON restarts (due_at) WHERE ended_at IS NULL;
CREATE INDEX restarts_newest ON restarts (workspace_id, decided_at);

-- Orders to end the container that a session runs in, each answered once.
CREATE TABLE orders (
  order_id      uuid PRIMARY KEY,
  workspace_id  text NOT NULL,
  session_id    text NOT NULL,
  incarnation   bigint NOT NULL,
  rev           bigint NOT NULL,
  expires_at    timestamptz NOT NULL,
  at            timestamptz NOT NULL DEFAULT now(),
  result        text CHECK (result IN ('applied', 'stale', 'already_ended', 'not_killable', 'expired')),
  answered_at   timestamptz,
  CHECK ((result IS NULL) = (answered_at IS NULL))
);

CREATE INDEX orders_open ON orders (workspace_id) WHERE result IS NULL;
CREATE INDEX orders_killed ON orders (workspace_id, incarnation) WHERE result = 'applied';

-- What was seen and decided, each with its sentence; kept for some days.
CREATE TABLE evidence (
  id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  workspace_id  text NOT NULL,
  at            timestamptz NOT NULL DEFAULT now(),
  incarnation   bigint NOT NULL,
  source        text NOT NULL,
  seen          text NOT NULL,
  container_id  text,
  verdict       text NOT NULL,
  reason        text NOT NULL,
  sentence      text NOT NULL
);

CREATE INDEX evidence_of ON evidence (workspace_id, id);
CREATE INDEX evidence_old ON evidence (at);

-- Proxies that were heard, and since when without a break: while none is, silence counts for nobody.
CREATE TABLE proxies (
  proxy_id  text PRIMARY KEY,
  beat_at   timestamptz NOT NULL,
  since_at  timestamptz NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

-- Who changed what. A command that is said again is found by its query_id.
CREATE TABLE audit (
  query_id      uuid PRIMARY KEY,
  at            timestamptz NOT NULL DEFAULT now(),
  caller_id     text NOT NULL,
  action        text NOT NULL,
  workspace_id  text NOT NULL,
  note          text NOT NULL
);
