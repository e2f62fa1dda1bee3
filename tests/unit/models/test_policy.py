"""The policy: tokenizer, templates, log-probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spg.models.attention import scaled_dot_product
from spg.models.llada import LLaDA, LLaDAConfig, RMSNorm, _Normalize
from spg.models.network import Positions
from spg.models.policy import Policy
from spg.models.tokenizer import CHARACTERS, TAGS, tiny_tokenizer
from tests.helpers import columns, small_policy


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
        [{}, {}], ["1", "1234"], [("<answer>", 2, "3"), None], torch.arange(2), torch.arange(2), 6
    )
    assert prompts.mask.tolist() == [[False, False, False, True], [True] * 4]
    assert prompts.given.tolist() == [[True, False, False, True, True, True], [False] * 6]
    tag, three = policy.encode("<answer>")[0], policy.encode("3")[0]
    expected = [tag, policy.mask_id, policy.mask_id, three, policy.eos_id, policy.eos_id]
    assert prompts.template[0].tolist() == expected
    with pytest.raises(ValueError, match=r"7 tokens, but gen_length=6; raise gen_length"):
        policy.prepare([{}], ["1"], [("1234567",)], torch.zeros(1), torch.zeros(1), 6)


def test_text_ends_at_eos() -> None:
    policy = small_policy()
    ids = torch.tensor([*policy.encode("12"), policy.eos_id, *policy.encode("34")])
    assert policy.text(ids) == "12"


def gradients(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


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
        results.append((logps.detach(), gradients(policy)))
    assert int(scored.sum()) > 10, "more than two chunks"
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    size = float(results[0][1].abs().max())
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6 * size)


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
    some = torch.tensor([[True, False, True, False], [False] * 4])
    with torch.no_grad():
        partly = policy.token_logps(tokens, None, targets, some)
    assert torch.allclose(partly, expected * some, atol=1e-6), "0 where not scored"


def test_nothing_scored_is_zero_with_a_gradient() -> None:
    policy = small_policy()
    tokens = torch.full((2, 5), policy.mask_id)
    logps = policy.token_logps(tokens, None, tokens[:, 2:], torch.zeros(2, 3, dtype=torch.bool))
    logps.sum().backward()
    assert not logps.any()
    assert not gradients(policy).any(), "nor NaN"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_is_never_proposed(temperature: float) -> None:
    """Not even where the network is sure of it."""
    policy = small_policy()
    with torch.no_grad():
        head = policy.network.get_parameter("model.transformer.ff_out.weight")
        head[policy.mask_id] *= 100
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 29, (64, 6), generator=g)
    noise = torch.rand(64, 4, dtype=torch.double, generator=g)
    noise[0] = 0.0
    noise[1] = 1 - 2**-53
    with torch.no_grad():
        logits = policy.network.logits(policy.network.hidden(tokens)[:, 2:])
    ids, confidence = policy.propose(tokens, None, columns(tokens, 2, 6), temperature, noise)
    assert (logits.argmax(-1) == policy.mask_id).any()
    assert not (ids == policy.mask_id).any()
    assert int(ids.max()) < 32
    assert torch.isfinite(confidence).all()


def test_sizes_of_the_network_are_checked() -> None:
    sizes = {
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "mlp_hidden_size": 48,
        "vocab_size": 29,
        "embedding_size": 32,
    }
    network = LLaDA(LLaDAConfig(**sizes))
    assert network.logits(network.hidden(torch.zeros(1, 3, dtype=torch.long))).shape == (1, 3, 32)
    for name, value, words in (
        ("embedding_size", 28, "embedding_size=28 must be vocab_size=29 or more"),
        ("n_heads", 3, "n_heads=3 must divide d_model=32"),
        ("n_heads", 32, "heads of even width"),
        ("n_kv_heads", 4, "n_kv_heads=4 must divide n_heads=2"),
        ("n_layers", 0, "n_layers=0 is out of range; allowed: a whole number, 1 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            LLaDAConfig(**{**sizes, name: value})


def test_the_same_seed_makes_the_same_network() -> None:
    first, same, other = (small_policy(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    matrices = [name for name in first if first[name].ndim == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


@pytest.mark.parametrize("token", ["mask_token", "eos_token", "pad_token"])
def test_a_tokenizer_without_a_needed_token_is_refused(token: str) -> None:
    tokenizer = tiny_tokenizer()
    setattr(tokenizer, token, None)
    with pytest.raises(ValueError, match=f"no {token}_id; masked diffusion needs mask, EOS and pad"):
        Policy(small_policy().network, tokenizer)


@pytest.mark.parametrize("padded", [False, True])
def test_states_of_some_positions_are_those_of_the_whole(padded: bool) -> None:
    """The last layer computes what is asked for; values and gradients are those of all positions."""
    g = torch.Generator().manual_seed(3)
    network = small_policy().network
    ids = torch.randint(5, 28, (5, 9), generator=g)
    mask = torch.arange(9) >= torch.tensor([[0], [2], [4], [1], [0]]) if padded else None
    at = torch.rand(5, 9, generator=g) < 0.3
    at[2] = False
    weights = torch.randn(int(at.sum()), 32, generator=g)
    results = []
    for states in (network.hidden(ids, mask)[at], network.hidden(ids, mask, Positions.of_mask(at))):
        network.zero_grad()
        (states * weights).sum().backward()
        results.append(
            (
                states.detach(),
                torch.cat([p.grad.flatten() for p in network.model.transformer.blocks.parameters()]),
            )
        )
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_short_attention_is_the_fused_one() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=g, requires_grad=True) for _ in range(3))
    visible = (torch.arange(7) >= torch.tensor([[0], [3]]))[:, None, None, :]
    for bias in (None, visible):
        ours, theirs = (
            scaled_dot_product(q, k, v, bias),
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        )
        assert torch.allclose(ours, theirs, atol=1e-6)
        weights = torch.randn(ours.shape, generator=g)
        pairs = zip(
            torch.autograd.grad((ours * weights).sum(), (q, k, v)),
            torch.autograd.grad((theirs * weights).sum(), (q, k, v)),
            strict=True,
        )
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_normalisation_is_the_library_s() -> None:
    norm = RMSNorm(16, 1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ours, theirs = norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    inputs = (x, norm.weight)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)
    exact = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _Normalize.apply(x, 1e-5), (exact,))


def test_equal_rows_are_computed_once_and_proposed_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    rows = torch.tensor([[5, 6, 2], [7, 6, 2], [5, 6, 2], [7, 6, 2], [5, 6, 2]])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[4, 0] = False
    noise = torch.rand(5, 1, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    apart = [
        policy.propose(rows[i : i + 1], mask[i : i + 1], columns(rows[:1], 2, 3), 1.0, noise[i : i + 1])
        for i in range(5)
    ]
    seen = []
    original = policy.network.hidden
    monkeypatch.setattr(policy.network, "hidden", lambda *a: seen.append(len(a[0])) or original(*a))
    ids, confidence = policy.propose(rows, mask, columns(rows, 2, 3), 1.0, noise)
    assert seen == [3]
    assert torch.equal(ids, torch.cat([i for i, _ in apart]))
    assert torch.allclose(confidence, torch.cat([c for _, c in apart]), atol=1e-6)
