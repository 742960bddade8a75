"""kvkern's version, in one place. `kvkern.__version__` is the same."""

VERSION = "0.1.0"
