-- Statements of proxy. Every change of a workspace is one statement, so that its row's lock decides between replicas.

-- name: all_workspaces
SELECT *, extract(epoch FROM booted_at)::float8 AS booted_epoch FROM workspaces ORDER BY workspace_id

-- name: some_workspaces
SELECT *, extract(epoch FROM booted_at)::float8 AS booted_epoch FROM workspaces WHERE workspace_id = ANY($1::text[])

-- name: find_token
SELECT *, extract(epoch FROM booted_at)::float8 AS booted_epoch FROM workspaces WHERE token_hash = $1

-- name: find_caller
SELECT caller_id, rights FROM callers WHERE key_hash = $1 AND revoked_at IS NULL

-- name: insert_caller
INSERT INTO callers (key_hash, caller_id, rights) VALUES ($1, $2, $3)

-- name: insert_audit
INSERT INTO audit (caller_id, action, workspace_id, detail) VALUES ($1, $2, $3, $4)

-- name: register_workspace
-- Zero rows: it was removed, or a process that another one has replaced wants to come back.
-- A token (null: keep it) is written by whoever enrolls. The incarnation grows only when both boot ids are known and differ.
INSERT INTO workspaces AS w (workspace_id, owner_caller, url, token_hash, agent_card, capabilities, max_concurrent,
                             heartbeat_interval_s, boot_id, registered_boot)
VALUES ($1, $2, $3, coalesce($4, sha256(gen_random_uuid()::text::bytea)), $5, $6, $7, $8, $9, $9)
ON CONFLICT (workspace_id) DO UPDATE SET
  url = excluded.url,
  token_hash = coalesce($4, w.token_hash),
  agent_card = coalesce(excluded.agent_card, w.agent_card),
  capabilities = excluded.capabilities,
  max_concurrent = excluded.max_concurrent,
  heartbeat_interval_s = excluded.heartbeat_interval_s,
  boot_id = coalesce(excluded.boot_id, w.boot_id),
  registered_boot = excluded.boot_id,
  boots_past = CASE WHEN excluded.boot_id <> w.boot_id THEN (w.boot_id || w.boots_past)[1:8] ELSE w.boots_past END,
  booted_at = CASE WHEN excluded.boot_id <> w.boot_id THEN NULL ELSE w.booted_at END,
  incarnation = w.incarnation + CASE WHEN excluded.boot_id <> w.boot_id THEN 1 ELSE 0 END,
  rev = w.rev + 1
WHERE w.removed_at IS NULL AND NOT coalesce(excluded.boot_id = ANY(w.boots_past), false)
RETURNING *, extract(epoch FROM booted_at)::float8 AS booted_epoch, xmax = 0 AS is_new

-- name: renew_boot
-- A heartbeat with another boot id. Zero rows: another replica was faster, or it is a process of the past.
UPDATE workspaces SET
  boot_id = $2,
  boots_past = CASE WHEN boot_id IS NULL THEN boots_past ELSE (boot_id || boots_past)[1:8] END,
  booted_at = NULL,
  incarnation = incarnation + CASE WHEN boot_id IS NULL THEN 0 ELSE 1 END,
  rev = rev + 1
WHERE workspace_id = $1 AND removed_at IS NULL AND boot_id IS DISTINCT FROM $2 AND NOT $2 = ANY(boots_past)
RETURNING *, extract(epoch FROM booted_at)::float8 AS booted_epoch

-- name: renew_uptime
-- A heartbeat without boot ids: $2 is its receive time minus its uptime. The first one is only remembered; a later start
-- ($3 seconds of slack, for uptimes are rounded) is another life.
UPDATE workspaces SET
  booted_at = to_timestamp($2),
  incarnation = incarnation + CASE WHEN booted_at IS NULL THEN 0 ELSE 1 END,
  rev = rev + 1
WHERE workspace_id = $1 AND removed_at IS NULL AND boot_id IS NULL
  AND (booted_at IS NULL OR to_timestamp($2) > booted_at + make_interval(secs => $3))
RETURNING *, extract(epoch FROM booted_at)::float8 AS booted_epoch

-- name: update_card
UPDATE workspaces SET agent_card = $2, rev = rev + 1 WHERE workspace_id = $1 AND removed_at IS NULL
RETURNING *, extract(epoch FROM booted_at)::float8 AS booted_epoch

-- name: lock_workspace
SELECT *, extract(epoch FROM booted_at)::float8 AS booted_epoch FROM workspaces WHERE workspace_id = $1 FOR NO KEY UPDATE

-- name: write_settings
UPDATE workspaces SET settings = $2, paused = $3, pause_note = $4, desired = $5, runtime = $6, agent_authorization = $7,
  rev = rev + 1
WHERE workspace_id = $1 RETURNING *, extract(epoch FROM booted_at)::float8 AS booted_epoch

-- name: remove_workspace
-- Its token is worth nothing from now on: no other row has this hash, and nobody knows what it is the hash of.
UPDATE workspaces SET removed_at = now(), token_hash = sha256(gen_random_uuid()::text::bytea), agent_authorization = NULL,
  rev = rev + 1
WHERE workspace_id = $1 AND removed_at IS NULL RETURNING *, extract(epoch FROM booted_at)::float8 AS booted_epoch

-- name: insert_task_owners
INSERT INTO task_owners (task_hash, caller_hash) SELECT * FROM unnest($1::bytea[], $2::bytea[]) ON CONFLICT DO NOTHING

-- name: find_task_owners
SELECT task_hash, caller_hash FROM task_owners WHERE task_hash = ANY($1::bytea[])

-- name: forget_task_owners
DELETE FROM task_owners WHERE told_at < now() - make_interval(secs => $1)
