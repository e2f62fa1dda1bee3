"""Which process of a run this is.

A run of several processes starts them with their number in the environment, so that the answer needs
neither torch nor a process group.
"""

from __future__ import annotations

import os

# set for every process of a run except the first one
RANK = "SPG_RANK"


def rank() -> int:
    """Return the number of this process in its run, 0 for the first or only one."""
    return int(os.environ.get(RANK, "0"))
