"""`bide`, the operator's command: it talks HTTP to the proxy, and to nothing else."""
