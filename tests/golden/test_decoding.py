"""Decodings against the authors' and LLaDA's decoders, token by token, at temperature 0."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from spg.rollout.decoder import Decoder
from spg.rollout.schedule import transfer_counts
from tests.helpers import GOLDEN, golden, golden_policy, open_prompts

CASES = sorted(path.name for path in (GOLDEN / "decoding").glob("*.npz"))
SAMPLED = [name for name in CASES if "_T0.9" in name or "random" in name]
MASK_IN_PROMPT = "spgeval_prompt_contains_mask_g16_s8_b8.npz"
POLICY = golden_policy()


def decoder_of(args: dict[str, Any]) -> Decoder:
    length, size, steps = args["gen_length"], args["block_length"], args["steps"]
    return Decoder(length, size, steps, args["temperature"], args["remasking"], stop_at_eos=False)


@pytest.mark.parametrize("name", [name for name in CASES if name not in [*SAMPLED, MASK_IN_PROMPT]])
def test_identical_tokens_and_steps(name: str) -> None:
    """What the reference's model saw in each call is ours with the tokens of later steps masked.

    The left-padded cases come from code that ignores the attention mask: here all is real.
    """
    z, args = golden(f"decoding/{name}")
    prompt, length = z["prompt"], args["gen_length"]
    rollout = decoder_of(args)(POLICY, open_prompts(prompt, length))
    assert torch.equal(rollout.completion_ids, z["output"][:, prompt.shape[1] :])
    for call, seen in enumerate(z["inputs_per_call"]):
        open_yet = rollout.commit_step >= call
        rebuilt = rollout.completion_ids.masked_fill(open_yet, POLICY.mask_id)
        assert torch.equal(torch.cat([prompt, rebuilt], -1), seen)
    assert int(rollout.commit_step.max()) < len(z["inputs_per_call"])


def test_a_mask_in_the_prompt_is_left_alone() -> None:
    """The reference decodes it, which changes that row's completion; ours never writes into a prompt."""
    z, args = golden(f"decoding/{MASK_IN_PROMPT}")
    prompt = z["prompt"]
    rollout = decoder_of(args)(POLICY, open_prompts(prompt, args["gen_length"]))
    touched = (prompt == POLICY.mask_id).any(-1)
    assert torch.equal(rollout.prompt_ids, prompt)
    assert touched.tolist() == [True, False, False]
    assert torch.equal(rollout.completion_ids[~touched], z["output"][~touched, prompt.shape[1] :])
    assert (z["output"][touched, : prompt.shape[1]] != prompt[touched]).any()
    assert not (rollout.completion_ids == POLICY.mask_id).any()


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_cases_differ_by_their_generator_only(name: str) -> None:
    """Seeded draws depend on the generator's order of use; ours repeats itself and fills every hole."""
    z, args = golden(f"decoding/{name}")
    prompts = open_prompts(z["prompt"], args["gen_length"])
    first, second = (decoder_of(args)(POLICY, prompts, 5) for _ in range(2))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert (first.commit_step >= 0).all()
    assert not (first.completion_ids == POLICY.mask_id).any()
    counts = first.commit_step.flatten().bincount()
    assert torch.equal(counts, torch.full((args["steps"],), 3 * args["gen_length"] // args["steps"]))


def test_rounding_of_tokens_to_steps() -> None:
    for row in json.loads((GOLDEN / "decoding" / "num_transfer_tokens.json").read_text()):
        ours = transfer_counts(torch.tensor(row["mask_counts"]), row["steps"])
        assert ours.tolist() == row["spg_eval"] == row["llada"]
