-- Before: what was started and ran, but was never heard, stayed so for ever. After: that is a reason to restart it.
-- Safe while the old code runs: it writes no such reason, and only counts the rows that have it.
ALTER TABLE restarts DROP CONSTRAINT restarts_reason_check;
ALTER TABLE restarts ADD CONSTRAINT restarts_reason_check CHECK (
  reason IN ('first_start', 'stopped', 'not_found', 'exited', 'unheard', 'wedged', 'operator', 'ceiling'));
