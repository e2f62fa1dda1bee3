"""The files of checkpoints as Lightning writes them, with a checksum that is computed meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from spg.core.checksums import SummingWriter, sum_file
from spg.models.weights import read_checkpoint


class SummedFiles(TorchCheckpointIO):
    """Writes checkpoints straight to their files, and keeps the checksum of each until it is asked for.

    Lightning's own class makes a copy of the whole checkpoint in memory first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[Path, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to the file `path`; raise OSError if the disk does not take it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = SummingWriter(path)
        try:
            torch.save(checkpoint, cast(IO[bytes], writer))
        finally:
            self._sums[path] = writer.close()

    def load_checkpoint(self, path: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        """Return a checkpoint with whole tensors on the CPU, whether its file holds them or slices."""
        return read_checkpoint(path)

    def take_sum(self, path: Path) -> str:
        """Return the checksum of the file that was written to `path`."""
        return self._sums.pop(path, None) or sum_file(path)
