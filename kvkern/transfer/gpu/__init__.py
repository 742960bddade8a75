"""Moving chunks between a GPU and the arena: what the link can do, which way to move a job, and the copies themselves."""
