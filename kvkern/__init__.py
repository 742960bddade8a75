"""kvkern: a cache for the KV cache of LLM inference engines. It loads a prefix that was computed before.

    import kvkern
    cache = kvkern.open_cache(layout, tensors, model="my-model", weights="revision-1", capacity="8GiB")

The package imports each name at its first use, so `import kvkern` loads neither torch nor numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from .api import Match, PagedCache, open_cache
    from .errors import ArenaError, ConfigError, KvkernError, LayoutError, UnsupportedError
    from .kernels import layout
    from .keys import Namespace, weights_fingerprint

__all__ = [
    "ArenaError",
    "ConfigError",
    "KvkernError",
    "LayoutError",
    "Match",
    "Namespace",
    "PagedCache",
    "UnsupportedError",
    "__version__",
    "layout",
    "open_cache",
    "weights_fingerprint",
]

_HOME = {
    **dict.fromkeys(("Match", "PagedCache", "open_cache"), "api"),
    **dict.fromkeys(("ArenaError", "ConfigError", "KvkernError", "LayoutError", "UnsupportedError"), "errors"),
    **dict.fromkeys(("Namespace", "weights_fingerprint"), "keys"),
}


def __getattr__(name: str) -> Any:
    if name == "layout":
        return import_module(".kernels.layout", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
