"""What a task passes on: an example, a chat, and a completion with holes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# One item of a task, as its data set holds it; only the task itself knows the keys.
Example = Mapping[str, Any]
# Messages with `role` and `content`; a last one of the assistant opens the completion.
Chat = list[dict[str, str]]
# A completion with holes: texts are given, a number stands for that many tokens to decode.
Template = tuple[str | int, ...]
