"""The runner: any command that reads a prompt and writes an answer, as an agent. `bide-agent run … -- command`."""
