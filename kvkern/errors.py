"""The exceptions that users see.

    KvkernError
    |- LayoutError        a tensor, stride or size does not fit the paged layout, or a layout does not round-trip
    |- ConfigError        an option has a value that kvkern cannot work with
    |- ArenaError         the shared memory cannot be allocated, or the file is another user's or another program's
    `- UnsupportedError   kvkern does not support the engine, its version, or a feature that it has switched on

A miss is a value, not an exception. Every message names the value, the limit and the remedy.
"""

from .kernels.errors import KvkernError, LayoutError

__all__ = ["ArenaError", "ConfigError", "KvkernError", "LayoutError", "UnsupportedError"]


class ConfigError(KvkernError, ValueError):
    """An option is unknown, missing, or out of range."""


class ArenaError(KvkernError, RuntimeError):
    """A process cannot create or attach to the arena, or two processes disagree on its geometry."""


class UnsupportedError(KvkernError, RuntimeError):
    """The engine runs in a way that kvkern does not handle. kvkern refuses it at start, before it serves a wrong answer."""
