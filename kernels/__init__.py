"""Device code and its CPU twins: paged copies, chunk keys, checksums. Imports torch, triton, numba and numpy; never kvkern.

This package imports none of its modules, so `kvkern.kernels.checksum` costs only numpy.
"""
