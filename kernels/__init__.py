"""Device code and its CPU twins: paged copies, chunk keys, checksums. Imports torch, triton, numba and numpy; never kvkern.

Nothing here is imported eagerly, so `kvkern.kernels.checksum` costs numpy and no more.
"""
