"""Which processes have the arena mapped, as the kernel says. A process list that lies in shared memory proves nothing."""

from __future__ import annotations

import os

from ...arena.file import Arena


def maps_arena(arena: Arena, pid: int) -> bool | None:
    """Return whether a process has the arena mapped. None: this user may not see that."""
    device, inode = arena.file_id()
    found, name = b"%02x:%02x" % (os.major(device), os.minor(device)), os.fsencode(arena.path.name)
    wanted = b"%d" % inode
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            for line in file:
                fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode, path
                # some file systems give another device here than in fstat: then the name counts
                if len(fields) >= 5 and fields[4] == wanted and (fields[3] == found or name in fields[-1]):
                    return True
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return None
    return False
