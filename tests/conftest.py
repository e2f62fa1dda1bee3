"""One CPU thread in the test processes, so that sums of floats do not depend on the machine's cores."""

import os

# runs that the tests start share the cores with each other: threads must not wait spinning
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

torch.set_num_threads(1)
