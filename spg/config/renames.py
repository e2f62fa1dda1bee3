"""What older versions named otherwise, or did not have: paths of classes, and settings.

Both stand in the config.yaml of runs and in the identity that checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

T = TypeVar("T")

# moved as a whole: the path until 0.5 -> the path now
RENAMED: dict[str, str] = {
    "spg.adapters.LoRA": "spg.models.lora.LoRA",
    "spg.adapters.SavedLoRA": "spg.models.lora.SavedLoRA",
    "spg.advantages.GroupMean": "spg.algorithms.advantages.GroupMean",
    "spg.advantages.LeaveOneOut": "spg.algorithms.advantages.LeaveOneOut",
    "spg.advantages.Normalized": "spg.algorithms.advantages.Normalized",
    "spg.advantages.Raw": "spg.algorithms.advantages.Raw",
    "spg.advantages.Shifted": "spg.algorithms.advantages.Shifted",
    "spg.decoding.Decoder": "spg.rollout.decoder.Decoder",
    "spg.estimators.ELBO": "spg.algorithms.estimators.ELBO",
    "spg.estimators.EUBO": "spg.algorithms.estimators.EUBO",
    "spg.estimators.Loose": "spg.algorithms.estimators.Loose",
    "spg.estimators.Mixture": "spg.algorithms.estimators.Mixture",
    "spg.estimators.Sandwich": "spg.algorithms.estimators.Sandwich",
    "spg.estimators.Zero": "spg.algorithms.estimators.Zero",
    "spg.masking.BlockAll": "spg.algorithms.masking.BlockAll",
    "spg.masking.BlockRandom": "spg.algorithms.masking.BlockRandom",
    "spg.masking.Complementary": "spg.algorithms.masking.Complementary",
    "spg.masking.Full": "spg.algorithms.masking.Full",
    "spg.masking.Random": "spg.algorithms.masking.Random",
    "spg.masking.Spread": "spg.algorithms.masking.Spread",
    "spg.masking.Trajectory": "spg.algorithms.masking.Trajectory",
    "spg.objectives.dpo.DPO": "spg.algorithms.objectives.dpo.DPO",
    "spg.objectives.espo.ESPO": "spg.algorithms.objectives.espo.ESPO",
    "spg.objectives.grpo.GRPO": "spg.algorithms.objectives.grpo.GRPO",
    "spg.objectives.spg.SPG": "spg.algorithms.objectives.spg.SPG",
    "spg.objectives.wd1.WD1": "spg.algorithms.objectives.wd1.WD1",
    "spg.preferences.Preferences": "spg.tasks.preferences.Preferences",
}

# settings that runs of older versions lack -> the value, as text, with which a run is still the same run
ADDED: dict[str, str] = {
    "decoding.threshold": "None",
    "decoding.factor": "None",
    "decoding.cfg_scale": "0.0",
    "trainer.nodes": "1",
    "trainer.checkpoint_format": "whole",
    "trainer.requeue": "False",
}


def current_path(target: str) -> str:
    """Return the present path of a class, for a path of this or of an older version."""
    return RENAMED.get(target, target)


def update_paths(node: T) -> T:
    """Return a configuration, or what is nested in lists and mappings, with every class by its present path.

    In a configuration only the values of `_target_` are paths. In plain lists and mappings, such as the
    identity of a checkpoint, every text that is one of the old paths counts.

    Args:
        node: It is not changed itself.
    """
    result: Any = node
    if isinstance(node, DictConfig | ListConfig):
        if _holds_old(node):
            result = node.copy()
            _update(result)
    elif isinstance(node, Mapping):
        result = {key: update_paths(value) for key, value in node.items()}
    elif isinstance(node, list):
        result = [update_paths(item) for item in node]
    elif isinstance(node, str):
        result = current_path(node)
    return cast(T, result)


def _children(node: Any) -> list[Any]:
    if not OmegaConf.is_config(node) or node._is_none() or node._is_missing() or node._is_interpolation():
        return []
    names = range(len(node)) if isinstance(node, ListConfig) else list(node)
    return [node._get_node(name) for name in names]


def _target(node: Any) -> Any:
    own = node._get_node("_target_") if isinstance(node, DictConfig) and "_target_" in node else None
    return None if own is None else own._value()


def _holds_old(node: Any) -> bool:
    children = _children(node)
    return (bool(children) and _target(node) in RENAMED) or any(_holds_old(child) for child in children)


def _update(node: Any) -> None:
    children = _children(node)
    if children and _target(node) in RENAMED:
        node._get_node("_target_")._set_value(RENAMED[_target(node)])
    for child in children:
        _update(child)
