"""What is wrong with a daemon, in words, each with a remedy. Looks at figures only; finds nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

FULL_SHARE = 0.9  # of the connections
HELD_SHARE = 0.1  # of the slots in quarantine

Figures = Mapping[str, int | float | str]


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that an operator should know."""

    level: str  # "error": chunks are lost or wrong; "warning": the cache helps less than it could
    what: str
    remedy: str

    def row(self) -> dict[str, str]:
        """Return it as a row of JSON."""
        return asdict(self)


def advice(
    stat: Figures,  # the row that answers Stat
    hour: Mapping[str, int],  # by how much its counters have grown within the last hour
    max_connections: int,
    split_models: list[str],  # models that engines cache under several hash identities
) -> list[Advice]:
    """Return what an operator should know, the worst first."""
    found = []
    if hour["bad_chunks"]:
        found.append(
            Advice(
                "error",
                f"{hour['bad_chunks']} chunks failed their checksum within the last hour. They were dropped, and engines "
                f"computed them again",
                "Check the host's memory, and who may use this cache. The log names the processes that stored them",
            )
        )
    if hour["faults"]:
        found.append(
            Advice(
                "error",
                f"{hour['faults']} faults of kvkern became misses within the last hour",
                "The log has one line and a traceback for each kind. Please report it",
            )
        )
    if stat.get("remote") and not stat.get("remote_works"):
        found.append(
            Advice(
                "error",
                f"The remote store {stat['remote']} does not work. Engines compute what they would load from it",
                "Look at the store and at the network. kvkern tries again by itself; the log says what failed",
            )
        )
    elif hour["remote_failures"]:
        found.append(
            Advice(
                "warning",
                f"{hour['remote_failures']} calls to the remote store failed within the last hour",
                "Look at the store's log and at the network",
            )
        )
    if hour["remote_dropped_chunks"]:
        found.append(
            Advice(
                "warning",
                f"{hour['remote_dropped_chunks']} chunks were not written to the remote store within the last hour",
                "Give the store more room or a faster network, or the daemon a longer queue (--remote-queue)",
            )
        )
    if hour["dropped_chunks"]:
        found.append(
            Advice(
                "warning",
                f"{hour['dropped_chunks']} chunks found no free slot within the last hour, because all others were on lease",
                "Give the arena more memory (--capacity)",
            )
        )
    slots, held = int(stat.get("slots", 0)), int(stat.get("quarantined_slots", 0))
    if slots and held > HELD_SHARE * slots:
        found.append(
            Advice(
                "warning",
                f"{held} of {slots} slots wait for processes that have disconnected but still run",
                "End the processes of engines that hang; their slots are free when they are gone",
            )
        )
    if int(stat["connections"]) > FULL_SHARE * max_connections:
        found.append(
            Advice(
                "warning",
                f"{stat['connections']} of {max_connections} connections are open",
                "Close clients that are not needed, or run another daemon",
            )
        )
    found += [
        Advice(
            "warning",
            f"Engines cache {model} under different hash identities, so they share nothing",
            "Give all engines the same PYTHONHASHSEED and prefix_caching_hash_algo",
        )
        for model in split_models
    ]
    return found
