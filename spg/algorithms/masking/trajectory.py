"""Masks that follow the decoder: one draw for each step that it took."""

from __future__ import annotations

import torch

from spg.algorithms.masking.base import MaskingStrategy, Region
from spg.core.rules import Probability, checked
from spg.core.seeding import Streams
from spg.core.types import MaskedSamples, Rollout


class Trajectory(MaskingStrategy):
    """Shows the sequence as the policy saw it in each of its decoding steps (StepWise, LLaDOU).

    Draw s is the s-th step, in order, that committed a token of the region: those tokens are scored, with
    weight M, so that the mean over draws is the sum over steps; its log-probabilities at temperature 1 are
    the rollout's commit_logps. M is the largest number of such steps of a sequence. A sequence with fewer
    steps scores nothing in the draws that it lacks, and needs no forward pass for them.
    """

    # facts for the configuration check, see spg.config.parts
    fresh_each_update = False
    needs_commit_steps = True

    @checked
    def __init__(self, prompt_mask_prob: Probability = 0.0, region: Region = "to_eos") -> None:
        super().__init__(prompt_mask_prob, region)

    def __call__(self, rollout: Rollout, mask_id: int, seed: int) -> MaskedSamples:
        """Return one masked copy per decoding step; `seed` matters for the prompt alone."""
        region = self._region(rollout)
        committed = region & (rollout.commit_step >= 0)
        steps = max(1, int(rollout.commit_step.amax()) + 1)
        taken = torch.zeros(len(region), steps + 1, dtype=torch.long, device=region.device)
        taken = taken.scatter(1, rollout.commit_step.masked_fill(~committed, steps), 1)[:, :steps]
        draws = max(1, int(taken.sum(-1).amax()))
        # the steps of a row come first, in order; it has nothing to score in the others
        step = taken.argsort(dim=-1, descending=True, stable=True)[:, :draws]
        scored = committed.unsqueeze(1) & (rollout.commit_step.unsqueeze(1) == step.unsqueeze(-1))
        prompt = self._mask_prompt(rollout.prompt_mask, draws, Streams(seed, rollout.index))
        hidden = torch.cat([prompt, torch.zeros_like(scored)], dim=-1)
        tokens = rollout.inputs_at(step, mask_id).masked_fill(hidden, mask_id)
        return MaskedSamples(tokens, scored, scored * float(draws), region)
