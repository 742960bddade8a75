"""Shows what kvkern saves: a real vLLM, real prompts, time to first token with and without kvkern.

Knows vLLM's offline API. Knows nothing of chunks, slots or keys: kvkern is only switched on or off, and
what it did is read from vLLM's own metrics.
"""
