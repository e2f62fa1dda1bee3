"""What happens around the updates, one file a concern.

Lightning keys a callback's state in checkpoints by the name of its class: these names do not change.
"""

from spg.training.callbacks.before_and_after import BeforeAndAfter
from spg.training.callbacks.checkpoints import Checkpoints
from spg.training.callbacks.interruption import Interruption
from spg.training.callbacks.progress_bar import ProgressBar
from spg.training.callbacks.samples import Samples
from spg.training.callbacks.validation import Validation

__all__ = ["BeforeAndAfter", "Checkpoints", "Interruption", "ProgressBar", "Samples", "Validation"]
