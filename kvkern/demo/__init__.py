"""Shows what kvkern saves: a real vLLM, real prompts, time to first token with and without kvkern.

Knows vLLM's offline API. Knows nothing of chunks, slots or keys: the demo only switches kvkern on or off, and reads its
effect from vLLM's own metrics.
"""
