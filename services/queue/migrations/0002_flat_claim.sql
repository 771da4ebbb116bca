-- Before: under a snapshot held open elsewhere (a backup, a report) nothing dead can be cleared away, and every claim met
-- all that had died since: earlier items at the head of the line, earlier versions of the workspace's own row.
-- After: a claim begins at the floor, and finds the newest version of a workspace and of its deliveries first.
-- Safe while the old code runs: it raises rev and not floor_rev with every row, and a floor of another rev is not
-- believed. A workspace that both make in the same instant may have two rows; the one with the higher rev counts.

-- (lane, rank_ms): nothing that waits in this workspace lies below it.
ALTER TABLE workspaces ADD COLUMN floor bigint[] NOT NULL DEFAULT '{0,0}' CHECK (cardinality(floor) = 2),
                       ADD COLUMN floor_rev bigint NOT NULL DEFAULT 0;

-- A unique index meets every version of its key whenever one is added. So there is one for names, which never change, and
-- the rows that change with every item are told apart by rev.
CREATE TABLE workspace_ids (workspace_id text PRIMARY KEY);
INSERT INTO workspace_ids SELECT workspace_id FROM workspaces;
ALTER TABLE workspaces DROP CONSTRAINT workspaces_pkey, ADD PRIMARY KEY (workspace_id, rev);

CREATE INDEX a2a_queue_running ON a2a_queue (workspace_id, dispatched_at) WHERE status = 'dispatched';
DROP INDEX a2a_queue_dispatched;

-- With the id, so that a page of what is due goes on where the last one ended without a sort.
DROP INDEX a2a_queue_ending;
CREATE INDEX a2a_queue_ending ON a2a_queue (least(expires_at, give_up_at), queue_id) WHERE status = 'queued';

-- Every claim wrote into it, and what it served is small: all deliveries of all replicas, once a second.
DROP INDEX a2a_queue_owned;
