"""The remote tier: chunks as values in a store that every node shares.

stores/base.py says what a store has to do. value_format.py says what a chunk is there. tier.py moves chunks both ways.
"""
