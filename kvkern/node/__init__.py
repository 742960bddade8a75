"""One cache per node: a daemon that owns arena, index and policy, and the client that engines reach it with.

Read in this order: protocol and framing (the messages), daemon/sessions (who holds what), daemon/server (the daemon),
client/reconnecting_link and client/cache_client (an engine's side), client/admin_client (an operator's side).
"""
