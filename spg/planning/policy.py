"""The policy that a plan asks: the configured network without numbers, and answers made up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from spg.config import build
from spg.models.choice import distinct_rows
from spg.models.factory import setting
from spg.models.network import Cache, Network
from spg.models.policy import Policy
from spg.planning.four_bits import put_in_four_bits
from spg.planning.phantom import CPU, Ledger, Phantom, Work, make_phantom


@dataclass(frozen=True)
class Call:
    """A question to the policy, by what decides its work.

    Attributes:
        kind: `propose`, or `token_logps`.
        rows: Sequences that the network computes.
        positions: Positions of each that are computed.
        seen: Positions of each that are attended to.
        chosen: Positions that the head is needed at.
        cached: Whether keys and values of the other positions are there.
        kept: Whether keys and values are kept.
        masked: Whether something is padded.
        learns: Whether a backward pass follows.
    """

    kind: str
    rows: int
    positions: int
    seen: int
    chosen: int
    cached: bool = False
    kept: bool = False
    masked: bool = False
    learns: bool = False

    @property
    def family(self) -> Call:
        """What calls have in common whose work grows evenly with their sizes."""
        return replace(self, positions=0, chosen=0)


@dataclass
class Asked:
    """One question of a survey.

    Attributes:
        call: Its sizes.
        live: Bytes of other tensors that were alive.
        arguments: The arguments by name, in copies.
        before: For a filled cache, the question that filled it.
    """

    call: Call
    live: int
    arguments: dict[str, Any]
    before: Asked | None = None


class PlannedPolicy(Policy):
    """A policy of phantoms. It answers with made-up tokens and log-probabilities, never with EOS.

    Attributes:
        survey: Takes the questions, which are then answered without computing; None to compute.
        ledger: Knows how much memory is in use.
    """

    survey: list[Asked] | None = None
    ledger: Ledger | None = None

    @property
    def device(self) -> torch.device:
        """The CPU, where tokens and masks are."""
        return CPU

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the policy's precision: autocast of the CPU, and code that asks for CUDA's sees it."""
        if self.precision == "32-true":
            yield
            return
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])

    @torch.no_grad()
    def propose(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Answer with random tokens and random measures of their clarity."""
        given = _arguments(Policy.propose, self, args, kwargs)
        columns, cache = given["columns"], given.get("cache")
        if self.survey is None:
            super().propose(*args, **kwargs)
        else:
            self._note(given, cache)
        ids = torch.randint(0, len(self.tokenizer), columns.shape)
        special = torch.tensor([self.mask_id, self.eos_id, self.pad_id])
        ids = torch.where(torch.isin(ids, special), self.ordinary, ids)
        return ids, *(torch.rand(columns.shape) for _ in given["measures"])

    def token_logps(self, *args: Any, **kwargs: Any) -> Tensor:
        """Answer with -1 at the positions that are scored."""
        given = _arguments(Policy.token_logps, self, args, kwargs)
        scored = given["scored"]
        if self.survey is None:
            found = super().token_logps(*args, **kwargs)
            return made_real(found, scored)
        rows, positions = given["tokens"].shape
        masked, learns = given["mask"] is not None, torch.is_grad_enabled()
        chosen = int(scored.sum())
        call = Call("token_logps", rows, positions, positions, chosen, masked=masked, learns=learns)
        self.survey.append(Asked(call, self._live(), given))
        return (-scored.float()).requires_grad_(learns)

    @property
    def ordinary(self) -> int:
        """A token that is none of the special ones."""
        return next(i for i in range(4) if i not in (self.mask_id, self.eos_id, self.pad_id))

    def _note(self, given: dict[str, Any], cache: Cache | None) -> None:
        assert self.survey is not None
        tokens, mask, columns = given["tokens"], given["mask"], given["columns"]
        cached = cache is not None and cache.filled
        rows, seen = tokens.shape
        positions = seen
        if cached:
            positions = given["window"].stop - given["window"].start
        elif given["shared"]:
            rows = len(distinct_rows(torch.cat([tokens, columns], dim=1))[0])
        kept, masked = cache is not None, mask is not None
        copies = 1 if given.get("guidance") is None else 2
        chosen = copies * columns.numel()
        call = Call("propose", copies * rows, positions, seen, chosen, cached, kept, masked)
        before = None
        if cached:
            before = next(a for a in reversed(self.survey) if a.call.kept and not a.call.cached)
        if cache is not None and not cached:
            cache.slot(0, 0)  # now it counts as filled
        kept_as_is = {n: v.clone() if isinstance(v, Tensor) else v for n, v in given.items()}
        kept_as_is.pop("cache")
        self.survey.append(Asked(call, self._live(), kept_as_is, before))

    def _live(self) -> int:
        return 0 if self.ledger is None else self.ledger.live


def _arguments(method: Callable[..., Any], policy: Policy, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(method).bind(policy, *args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "self"}


class _MadeReal(torch.autograd.Function):
    """Turns log-probabilities without numbers into -1, whose gradient has no numbers again."""

    @staticmethod
    def forward(ctx: Any, phantom: Tensor, scored: Tensor) -> Tensor:
        return -scored.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return Phantom(torch.empty_like(gradient, device="meta")), None


def made_real(logps: Tensor, scored: Tensor) -> Tensor:
    """Return ordinary log-probabilities [N T] in the place of phantoms; gradients pass through."""
    answer: Tensor = _MadeReal.apply(logps, scored)  # type: ignore[no-untyped-call]
    return answer


def planned_policy(cfg: DictConfig, tokenizer: Any, sliced: bool) -> PlannedPolicy:
    """Return the configured policy without numbers.

    Args:
        cfg: Configuration of a run.
        tokenizer: Has a mask, an EOS and a padding token.
        sliced: Whether processes share out the weights. The network then computes with gathered ones, in the
            type of the computation.
    """
    model, precision = cfg.model, setting(cfg, "precision")
    trained = model.lora is None
    computed = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    dtype = torch.float32 if trained else getattr(torch, setting(cfg, "dtype"))
    with torch.device("meta"):
        network: Network = build(model.network, seed=None)
        network.to(computed if trained and sliced else dtype)
        network.checkpointing = setting(cfg, "checkpointing")
        policy = PlannedPolicy(network, tokenizer, precision)
        if not trained:
            policy.adapt(build(model.lora))
    make_phantom(policy)
    if setting(cfg, "quantization") is not None:
        put_in_four_bits(network, dtype)
    return policy


def fill_and_measure(policy: PlannedPolicy, ledger: Ledger, asked: Asked) -> tuple[Work, int]:
    """Compute the answer to one question of a survey.

    Returns:
        Its work, and the most bytes that it holds, with its cache, above what is held before.
    """
    start, cache = ledger.live, None
    arguments = dict(asked.arguments)
    if asked.call.kept:
        cache = Cache()
        if asked.before is not None:
            policy.propose(**asked.before.arguments, cache=cache)
        arguments["cache"] = cache
    ledger.begin()
    with torch.set_grad_enabled(asked.call.learns):
        getattr(policy, asked.call.kind)(**arguments)
    return ledger.work, ledger.peak - start
