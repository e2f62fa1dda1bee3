"""Whether the Hugging Face hub answers, asked once for each model or data set."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Literal

log = logging.getLogger(__name__)

# seconds to wait for the hub's first answer before a cached copy is used
PATIENCE = 5.0


@lru_cache(maxsize=32)
def hub_answers(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> bool:
    """Return whether the hub can be reached for a model or a data set.

    A refusal counts as an answer: fetching the files then says why the hub refuses.

    Args:
        kind: What `name` names.
        name: Hub id, `owner/name`.
        revision: Branch, tag or commit; None for the main branch.
    """
    import huggingface_hub

    ask = {"model": "model_info", "dataset": "dataset_info"}[kind]
    try:
        getattr(huggingface_hub.HfApi(), ask)(name, revision=revision, timeout=PATIENCE)
    except huggingface_hub.errors.HfHubHTTPError as error:
        log.debug("The hub refuses %s: %s", name, one_line(error))
    except Exception as error:  # noqa: BLE001  # its class changes with the hub's HTTP library
        log.debug("The hub does not answer for %s: %s", name, one_line(error))
        return False
    return True


def one_line(error: BaseException) -> str:
    """Return an error's class and text in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
