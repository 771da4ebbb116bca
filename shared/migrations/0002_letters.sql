-- Before: dead letters were kept and nothing else. After: they can be listed by age, counted, and marked as replayed.
-- Safe while the old code runs: it names its columns.

ALTER TABLE dead_letters ADD COLUMN replayed_at timestamptz;
CREATE INDEX dead_letters_newest ON dead_letters (at, digest);
CREATE INDEX dead_letters_waiting ON dead_letters (reason) WHERE replayed_at IS NULL;
