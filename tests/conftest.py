"""One CPU thread in the test processes, so that sums of floats do not depend on the machine's cores.

`pytest -m fake` lets torch find a CUDA device that is not there; this has to happen before torch is imported.
"""

import os
from pathlib import Path

import pytest

# runs that the tests start share the cores with each other: threads must not wait spinning
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "fake":
        from tests.fake import build

        assert config.cache is not None
        build.prepare(Path(config.cache.mkdir("fake")))
    import torch

    torch.set_num_threads(1)
