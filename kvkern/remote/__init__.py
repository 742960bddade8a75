"""The remote tier: values in stores that exist and scale, shared by every node.

base.py is what a store has to do, value.py what a chunk is there, tier.py what goes there and comes back.
"""
