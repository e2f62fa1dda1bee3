"""Names of runs and of the jobs of a multirun, as the configuration's `${method:}` and `${job_name:}`."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

# how the processes of a multirun learn which keys it sweeps
SWEPT = "SPG_SWEPT"


def swept_keys() -> list[str]:
    """Return the keys that the multirun sweeps, [] outside one."""
    keys: list[str] = json.loads(os.environ.get(SWEPT, "[]"))
    return keys


def swept_values(cfg: DictConfig) -> dict[str, Any]:
    """Return this job's values of the swept keys; an option of a group counts by its name."""
    choices = HydraConfig.get().runtime.choices
    values = {key: choices[key] if key in choices else OmegaConf.select(cfg, key) for key in swept_keys()}
    return {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in values.items()}


def job_name(overrides: Sequence[str]) -> str:
    """Return the name of the directory of a job with these overrides.

    It is made of the swept keys and values, as `estimator-elbo_seed-1`. It needs no quotes.
    """
    given = dict(line.lstrip("+").partition("=")[::2] for line in overrides)
    parts = []
    for key in swept_keys():
        value = given.get(key, "")
        plain = re.sub(r"[^A-Za-z0-9.-]", "-", value)
        # values that differ only in replaced characters get different names
        mark = "" if plain == value else f"-{zlib.crc32(value.encode()):08x}"
        parts.append(f"{re.sub(r'[^A-Za-z0-9_.-]', '.', key)}-{plain}{mark}")
    return "_".join(parts) or "job"


def method() -> str:
    """Return what a run is named after: its estimator if the algorithm is SPG, else the algorithm."""
    choices = HydraConfig.get().runtime.choices
    return str(choices["estimator"] if choices["algorithm"] == "spg" else choices["algorithm"])


OmegaConf.register_new_resolver("method", method, replace=True)
OmegaConf.register_new_resolver(
    "job_name", lambda: job_name(list(HydraConfig.get().overrides.task)), replace=True
)
