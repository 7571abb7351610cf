"""Where this package keeps what it can make again (preprocessed cases, compiled programs, embedded phantoms), and what
folders of domains and classes are called.
"""

import os
import re
from pathlib import Path


def cache_home() -> Path:
    """$MEDSEG_CACHE, else $XDG_CACHE_HOME/medseg_jax, else ~/.cache/medseg_jax."""
    if own := os.environ.get("MEDSEG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medseg_jax"


def safe_name(text: str) -> str:
    """A domain's or class's name as part of a folder's name: letters of any script and digits stay."""
    return re.sub(r"[^\w.-]+", "_", text)
