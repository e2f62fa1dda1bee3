"""How the C library's allocator treats the large, short-lived tensors of a small model on CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have freed memory kept for reuse instead of returned to the system, where that is glibc's.

    By default every tensor above 128 KiB is mapped and unmapped anew, and its pages are cleared by
    the kernel each time: a fifth of a small model's run.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
