-- Roles and schemas: one of each per service, and nothing shared between them.
--
-- Run once by an administrator in Bide's database; again is harmless. Roles belong to the whole cluster, so two runs at one
-- moment in two databases may fail with "tuple concurrently updated": repeat it. Passwords are not set here:
--   ALTER ROLE bide_queue PASSWORD '…';
--
-- The limits below are the last line of defence (I8): code has shorter ones of its own.

DO $$
DECLARE
  service text;
  setting text;
BEGIN
  EXECUTE format('REVOKE CREATE ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
  REVOKE ALL ON SCHEMA public FROM PUBLIC;

  FOREACH service IN ARRAY ARRAY['proxy', 'queue', 'scheduler', 'liveness'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'bide_' || service) THEN
      EXECUTE format('CREATE ROLE %I LOGIN', 'bide_' || service);
    END IF;
    -- An administrator who is not a superuser may give a schema only to a role it is a member of.
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
       AND NOT pg_has_role(current_user, 'bide_' || service, 'MEMBER') THEN
      EXECUTE format('GRANT %I TO %I', 'bide_' || service, current_user);
    END IF;
    EXECUTE format('ALTER ROLE %I SET search_path = %I', 'bide_' || service, service);
    EXECUTE format('ALTER ROLE %I SET statement_timeout = %L', 'bide_' || service, '30s');
    EXECUTE format('ALTER ROLE %I SET lock_timeout = %L', 'bide_' || service, '10s');
    EXECUTE format('ALTER ROLE %I SET idle_in_transaction_session_timeout = %L', 'bide_' || service, '5s');
    EXECUTE format('ALTER ROLE %I SET jit = off', 'bide_' || service);
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), 'bide_' || service);
    EXECUTE format('CREATE SCHEMA IF NOT EXISTS %I AUTHORIZATION %I', service, 'bide_' || service);
    EXECUTE format('REVOKE ALL ON SCHEMA %I FROM PUBLIC', service);
  END LOOP;

  -- Every statement of the queue goes along an index, row by row, and its plan is kept for as long as its connection. One
  -- that was made while a table was empty, never analysed or all of one workspace would read or sort the whole backlog
  -- for each claim. So the planner is not asked: where an index leads, it is taken.
  FOREACH setting IN ARRAY ARRAY['enable_seqscan', 'enable_bitmapscan', 'enable_hashjoin', 'enable_mergejoin', 'enable_sort']
  LOOP
    EXECUTE format('ALTER ROLE bide_queue SET %I = off', setting);
    -- The scheduler's tables and its outbox are empty or quiet, and then a hundred thousand schedules are due in one moment.
    -- It may sort: some of what it reads by one index is locked in the order of another.
    IF setting <> 'enable_sort' THEN
      EXECUTE format('ALTER ROLE bide_scheduler SET %I = off', setting);
    END IF;
  END LOOP;
END
$$;
