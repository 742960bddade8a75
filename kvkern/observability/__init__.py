"""What an operator sees of the cache: metrics, log lines, spans."""
