"""Toy controllers over the store of the API server's double: enough of a cluster to see what an operator's objects do.

Nothing runs in containers. Each module says what of the real controller it leaves out.
"""

from .cluster import ToyCluster
from .kubelet import Pace
from .observer import Clash, is_cache_pod, is_socket_folder

__all__ = ["Clash", "Pace", "ToyCluster", "is_cache_pod", "is_socket_folder"]
