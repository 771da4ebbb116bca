-- Before: nothing. After: the tables that the bus needs in every schema. Safe while the old code runs: it knows none of them.

-- Facts that took effect (3-bus rule 5). Partitioned by the hour that stands in a uuid7, so that forgetting is DROP TABLE
-- and the key needs nothing but the id. Partitions are made when the first fact of their hour arrives, and dropped when
-- nothing was added to them for as long as the inbox remembers: a fact may take effect long after it was made.
CREATE TABLE inbox (
  fact_id uuid PRIMARY KEY,
  at      timestamptz NOT NULL DEFAULT now()
) PARTITION BY RANGE (fact_id);

-- Facts that must leave although this process may die (3-bus rule 6). claimed_until: somebody is publishing it.
CREATE TABLE outbox (
  id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  fact_type     text NOT NULL,
  fact          bytea NOT NULL,
  added_at      timestamptz NOT NULL DEFAULT now(),
  claimed_until timestamptz
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

-- Facts that could not be read or stored, byte for byte, with the reason (3-bus rule 3). The digest makes a batch that is
-- delivered again set the same fact aside once.
CREATE TABLE dead_letters (
  digest    bytea PRIMARY KEY CHECK (octet_length(digest) = 32),
  at        timestamptz NOT NULL DEFAULT now(),
  fact_type text NOT NULL,
  reason    text NOT NULL CHECK (reason IN ('invalid', 'unstorable', 'handler_error', 'undeliverable')),
  error     text NOT NULL,
  fact      bytea NOT NULL
);
