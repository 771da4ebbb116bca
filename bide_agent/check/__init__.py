"""The conformance checker: plays Bide towards an agent and says what it keeps of the protocol. `bide-agent check`."""
