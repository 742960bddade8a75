"""A double of the Kubernetes API server over a real socket, for tests of what talks to one.

`running_api_server` serves a `Store`, which is the same server without HTTP. The only controller is the garbage collector;
tests/operator/toy_cluster has others, and kubelets. RBAC holds for clients with the token of a service account
(`ApiServer.kubeconfig_of`); others may do everything. Each module says what it leaves out.
"""

from .deletion import Deletion
from .errors import ApiError, ConnectionLost
from .faults import Write
from .server import ApiServer, running_api_server
from .store import Options, Store

__all__ = ["ApiError", "ApiServer", "ConnectionLost", "Deletion", "Options", "Store", "Write", "running_api_server"]
