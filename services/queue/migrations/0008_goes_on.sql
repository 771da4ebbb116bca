-- Before: a Task that an agent accepted is followed by whichever delivery has the row, and each of them is a session that
-- begins anew.
-- After: since when the Task runs, and which delivery has found it running: that one's session began then.
-- Safe while the old code runs: it writes neither, and its sessions begin with their deliveries.

ALTER TABLE a2a_queue
  ADD COLUMN task_began_at     timestamptz,
  ADD COLUMN task_delivery_no  int;
