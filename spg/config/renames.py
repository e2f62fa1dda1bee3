"""Old paths of classes and the new ones, for the config.yaml files and checkpoints of earlier versions."""

from __future__ import annotations

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


def current(target: str) -> str:
    """Return the present path of a class, for a path of this or of an older version."""
    return RENAMED.get(target, target)
