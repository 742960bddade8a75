"""The exceptions users meet.

    KvkernError
    |- LayoutError        a tensor, stride or size does not fit the paged layout, or a layout does not round-trip
    |- ConfigError        an option has a value kvkern cannot work with
    |- ArenaError         the shared memory cannot be had, or belongs to something else
    `- UnsupportedError   the engine, its version or a feature it has switched on is not supported

A miss is a value, not an exception. Every message names the value, the limit and the remedy.
"""

from .kernels.errors import KvkernError, LayoutError

__all__ = ["ArenaError", "ConfigError", "KvkernError", "LayoutError", "UnsupportedError"]


class ConfigError(KvkernError, ValueError):
    """An option is unknown, missing, or out of range."""


class ArenaError(KvkernError, RuntimeError):
    """The arena cannot be created or attached, or two processes disagree on its geometry."""


class UnsupportedError(KvkernError, RuntimeError):
    """The engine runs in a way that kvkern does not handle: refused at start rather than served wrongly."""
