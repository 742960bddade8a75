"""Which chunks of the DRAM tier are written to the remote store, and when. One set of modes for the whole project.

    all         every chunk, when it is stored
    hot         every chunk, when it is hit for the first time
    evicted     every chunk, when it is evicted
    predicted   when it is evicted, if  P(use within the remote's residency) * saved > written

`saved` is the time that a hit saves: prefill of the chunk, less the time to read it. `written` is the time to write it. Both
are in seconds. A second of the link counts as much as a second of the accelerator. The threshold follows from measured
figures, not from a constant.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..errors import ConfigError


class Persist(enum.StrEnum):
    """The modes; the module's docstring explains them."""

    ALL = "all"
    HOT = "hot"
    EVICTED = "evicted"
    PREDICTED = "predicted"


def checked_persist(name: str) -> Persist:
    """Return the mode of that name. Raises ConfigError if there is none."""
    try:
        return Persist(name)
    except ValueError as error:
        raise ConfigError(f"persist is {name!r}; expected one of {', '.join(Persist)}") from error


def persist_mode(
    name: str,  # empty: `predicted` if the policy can predict, else `evicted`
    policy: str,  # its name
) -> Persist:
    """Return the mode for a tier with that policy. Raises ConfigError if the mode is unknown or the policy cannot do it."""
    predicts = policy == "grit"
    if not name:
        return Persist.PREDICTED if predicts else Persist.EVICTED
    mode = checked_persist(name)
    if mode is Persist.PREDICTED and not predicts:
        raise ConfigError(f"persist is 'predicted', but policy {policy!r} predicts nothing; use grit")
    return mode


@dataclass(frozen=True, slots=True)
class Costs:
    """Figures that a deployment measures.

    The defaults are for an 8 B model in bfloat16 (128 KiB a token) on one H100-class GPU and a 100 Gb/s network. They are
    orders of magnitude to start from, not measurements of this project.
    """

    token_nbytes: int = 128 * 1024
    prefill_tokens_s: float = 15_000.0
    write_nbytes_s: float = 10e9
    read_nbytes_s: float = 10e9

    @property
    def threshold(self) -> float:
        """The probability of use above which a write pays; infinite if it never pays. The same for chunks of any size."""
        saved_s = 1 / self.prefill_tokens_s - self.token_nbytes / self.read_nbytes_s
        written_s = self.token_nbytes / self.write_nbytes_s
        return written_s / saved_s if saved_s > 0 else float("inf")
