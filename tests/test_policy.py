"""The policy: tokenizer, templates, log-probabilities."""

from __future__ import annotations

import pytest
import torch

from spg.models.tokenizer import CHARACTERS, TAGS, tiny_tokenizer
from spg.policy import Policy
from tests.helpers import small_policy


def test_every_character_and_tag_is_one_token() -> None:
    policy = small_policy()
    for text in [*CHARACTERS, *TAGS]:
        assert len(policy.encode(text)) == 1
    text = "<reasoning>1+2*(3-4)\n</reasoning><answer>0123456789</answer>"
    assert policy.tokenizer.decode(policy.encode(text)) == text
    assert len(policy.encode(text)) == len("1+2*(3-4)\n0123456789") + 4


def test_vocabulary_is_what_the_tiny_model_is_built_for() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 29
    special = {
        tokenizer.mask_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    }
    assert len(special) == 4


def test_text_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens for parts of 'Solve"):
        small_policy().encode("Solve 12")
    with pytest.raises(ValueError, match=r"task\.prompt_style=bare"):
        small_policy().encode([{"role": "user", "content": "1"}])


def test_templates_are_laid_out_and_padded_with_given_eos() -> None:
    policy = small_policy()
    prompts = policy.prepare(
        [{}, {}], ["1", "1234"], [("<answer>", 2, "3"), None], torch.tensor([0, 1]), gen_length=6
    )
    assert prompts.mask.tolist() == [[False, False, False, True], [True] * 4]
    assert prompts.given.tolist() == [[True, False, False, True, True, True], [False] * 6]
    tag, three = policy.encode("<answer>")[0], policy.encode("3")[0]
    expected = [tag, policy.mask_id, policy.mask_id, three, policy.eos_id, policy.eos_id]
    assert prompts.template[0].tolist() == expected
    with pytest.raises(ValueError, match=r"7 tokens, but gen_length=6; raise gen_length"):
        policy.prepare([{}], ["1"], [("1234567",)], torch.tensor([0]), 6)


def test_text_ends_at_eos() -> None:
    policy = small_policy()
    ids = torch.tensor([*policy.encode("12"), policy.eos_id, *policy.encode("34")])
    assert policy.text(ids) == "12"


def test_head_in_chunks_gives_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(5, 28, (4, n), generator=g) for n in (9, 6))
    scored = torch.rand(4, 6, generator=g) < 0.6
    results = []
    for chunk in (10**6, 5):
        policy = small_policy()
        policy.head_chunk = chunk
        logps = policy.token_logps(tokens, None, targets, scored)
        (logps * torch.arange(6)).sum().backward()
        grad = policy.network.model.transformer.ff_out.weight.grad  # type: ignore[union-attr]
        results.append((logps.detach(), grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_log_probabilities_are_those_of_the_whole_softmax() -> None:
    policy = small_policy()
    g = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(5, 28, (2, n), generator=g) for n in (7, 4))
    scored = torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        logps = policy.token_logps(tokens, None, targets, scored)
        logits = policy.network.logits(policy.network.hidden(tokens))[:, -4:]
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(logps, expected, atol=1e-6)


def test_a_tokenizer_without_mask_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask_token_id"):
        Policy(small_policy().network, tokenizer)  # type: ignore[arg-type]
