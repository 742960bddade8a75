"""One cache per node: a daemon that owns arena, index and policy, and the client that engines reach it with.

Read in this order: protocol (what they say), sessions (who holds what), server and place (the daemon), link and client
(an engine's side), operator (a person's side).
"""
