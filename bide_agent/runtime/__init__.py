"""The runtime: any handler behind an A2A server that is never deaf. `bide_agent.serve` and `bide_agent.hosted`."""
