"""Every environment variable that the package reads."""

from __future__ import annotations

import os


def configured() -> bool:
    """Whether KT_COPROC asks for the co-process."""
    return os.environ.get("KT_COPROC", "") not in ("", "off")


def address() -> str:
    """KT_COPROC, or "auto" where it is not set."""
    return os.environ["KT_COPROC"] if configured() else "auto"


def job_name() -> str:
    """KT_COPROC_JOB: what the daemon's status calls this job. Empty: the daemon chooses."""
    return os.environ.get("KT_COPROC_JOB", "")


def other_models_are_plain() -> bool:
    """Whether KT_COPROC_OTHER_MODELS lets models that the daemon does not serve run in this process."""
    return os.environ.get("KT_COPROC_OTHER_MODELS") == "plain"


def world_size() -> int:
    """WORLD_SIZE, as launchers set it; 1 where it is not set."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> str:
    """RANK, as launchers set it, for messages."""
    return os.environ.get("RANK", "?")
