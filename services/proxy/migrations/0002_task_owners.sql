-- Before: a live forward's Task was its agent's alone to guard. After: whom the agent gave it to is remembered.
-- Safe while the old code runs: it knows no such table.

-- One row per Task and caller. No id is kept, only sha256 of workspace and id: it answers "whose is this?" and no more.
CREATE TABLE task_owners (
  task_hash    bytea NOT NULL CHECK (octet_length(task_hash) = 32),
  caller_hash  bytea NOT NULL CHECK (octet_length(caller_hash) = 32),
  told_at      timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (task_hash, caller_hash)
);
CREATE INDEX task_owners_told ON task_owners USING brin (told_at);
