-- Before: a life that beats and was never registered looked like any other. After: the boot id of the last registration.
-- Safe while the old code runs: it writes no such column, and what is null is not held against an agent.

ALTER TABLE workspaces ADD COLUMN registered_boot text;   -- null: it registered without a boot id, or before this column
