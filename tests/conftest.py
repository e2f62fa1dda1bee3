"""One CPU thread in the test process, so that sums of floats do not depend on the machine's cores."""

import torch

torch.set_num_threads(1)
