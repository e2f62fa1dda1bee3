"""The policy: a network with its tokenizer, asked for tokens or for log-probabilities.

The vocabulary axis stays in here: log-probabilities leave as [N T], choices as token ids.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.limits import check_limits
from spg.core.types import Prompts
from spg.models.head import rows_at_once
from spg.models.lora import LoRA, add_adapter, load_adapter, save_adapter
from spg.models.network import Cache, Network, Places

# what `propose` can tell of a choice beside the token: how sure the policy is, and by how much it won
Measure = Literal["probability", "margin", "negative_entropy", "lead"]


class Policy(nn.Module):
    """A masked diffusion language model, pi(x_i | z_t, c) for every masked position at once.

    precision: `32-true`, or `bf16-mixed` for a network that computes in bfloat16 (autocast); softmax and
    sampling are in float32 or better always. Raises ValueError where the tokenizer lacks a mask, EOS or
    padding token.
    """

    def __init__(
        self, network: Network, tokenizer: PreTrainedTokenizerBase, precision: str = "32-true"
    ) -> None:
        super().__init__()
        check_limits(precision=precision)
        self.network = network
        self.tokenizer = tokenizer
        self.precision = precision
        self.mask_id = self._token_id("mask_token_id")
        self.eos_id = self._token_id("eos_token_id")
        self.pad_id = self._token_id("pad_token_id")
        self._never: Tensor | None = None
        # in lists, so that neither is a submodule: the adapter wraps the network, the copy is not trained
        self._adapter: list[Any] = []
        self._reference: list[Network] = []
        # a group repeats its prompt, and templates repeat short texts
        self._encode_text = lru_cache(maxsize=4096)(self._encode)

    def _token_id(self, name: str) -> int:
        token_id = getattr(self.tokenizer, name)
        if token_id is None:
            raise ValueError(f"the tokenizer has no {name}; masked diffusion needs mask, EOS and pad")
        return token_id

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device

    def adapt(self, lora: LoRA) -> None:
        """Train an adapter from now on instead of the network's own weights."""
        self._adapter = [add_adapter(self.network, lora)]

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained instead of the network's own weights."""
        return bool(self._adapter)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, which `peft.PeftModel.from_pretrained` loads."""
        save_adapter(self._adapter[0], folder)

    def load_adapter(self, folder: Path) -> None:
        """Fill the adapter from a PEFT folder; raises ValueError where it does not fit."""
        load_adapter(self._adapter[0], folder)

    def keep_reference(self) -> None:
        """Remember the model as it is now, for `as_reference`.

        With an adapter that costs nothing: the model without it is the reference.
        """
        if not self._adapter:
            self._reference = [copy.deepcopy(self.network).requires_grad_(False)]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Be the reference model, without dropout: the adapter switched off, or the frozen copy.

        Raises ValueError where none was kept.
        """
        if not (self._adapter or self._reference):
            raise ValueError("no reference model was kept; call keep_reference() before training")
        was_training, own = self.training, self.network
        self.eval()
        try:
            if self._adapter:
                with self._adapter[0].disable_adapter():
                    yield
            else:
                self.network = self._reference[0].to(next(own.parameters())).eval()
                yield
        finally:
            self.network = own
            self.train(was_training)

    def encode(self, prompt: str | Chat) -> list[int]:
        """Return the token ids of a text, or of a chat in the model's template.

        Raises InputError where the tokenizer cannot write the text.
        """
        if isinstance(prompt, str):
            return list(self._encode_text(prompt))
        if self.tokenizer.chat_template is None:
            raise InputError(
                "this model's tokenizer has no chat template, so it cannot read an instruct prompt; "
                "use task.prompt_style=bare, or an instruction-tuned model"
            )
        opening = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else None
        asked = prompt if opening is None else prompt[:-1]
        text = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return list(self._encode_text(text + (opening or "")))

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
            raise InputError(f"the tokenizer has no tokens for parts of {text!r}")
        return tuple(ids)

    def text(self, completion_ids: Tensor) -> str:
        """Return the text of one completion [T], up to its first EOS."""
        ids = completion_ids.tolist()
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prepare(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str | Chat],
        templates: Sequence[Template | None],
        group: Tensor,
        index: Tensor,
        gen_length: int,
    ) -> Prompts:
        """Tokenise B prompts and templates, pad them, and put them on the policy's device.

        group [B]: number of each sequence's prompt; index [B]: of the sequence itself. A completion
        shorter than `gen_length` tokens ends in given EOS. Raises InputError where a template is longer.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        width = max(len(ids) for ids in encoded)
        completions = [self._lay_out(template, gen_length) for template in templates]
        return Prompts(
            ids=self._tensor([[self.pad_id] * (width - len(ids)) + ids for ids in encoded]),
            mask=self._tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]).bool(),
            template=self._tensor([ids for ids, _ in completions]),
            given=self._tensor([given for _, given in completions]).bool(),
            group=group.to(self.device),
            index=index.to(self.device),
            examples=tuple(examples),
        )

    def _lay_out(self, template: Template | None, length: int) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        given: list[bool] = []
        for part in (length,) if template is None else template:
            tokens = [self.mask_id] * part if isinstance(part, int) else self.encode(part)
            ids += tokens
            given += [isinstance(part, str)] * len(tokens)
        rest = length - len(ids)
        if rest < 0:
            raise InputError(f"a template has {len(ids)} tokens, but gen_length={length}; raise gen_length")
        return ids + [self.eos_id] * rest, given + [True] * rest

    def _tensor(self, rows: Sequence[Sequence[int | bool]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def computing(self) -> AbstractContextManager[None]:
        """Return the context in which the network computes in the policy's precision.

        It is entered for one pass at a time: autocast keeps its copies of weights while it lasts, and would
        not see that an optimizer changed them.
        """
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def token_logps(self, tokens: Tensor, mask: Tensor | None, targets: Tensor, scored: Tensor) -> Tensor:
        """Return log pi(targets | tokens) [N T] at the scored positions, 0 elsewhere, in float32.

        tokens [N L] with [MASK] in place; mask [N L] True at real tokens, or None; targets and
        scored [N T] belong to the last T positions.
        """
        width = tokens.shape[1] - targets.shape[1]
        with self.computing():
            picked = self.network.hidden(tokens, mask, Places.of(F.pad(scored, (width, 0))))
            logps = self.network.logps(picked, targets[scored])
        return torch.zeros(targets.shape, device=logps.device).masked_scatter(scored, logps)

    @torch.no_grad()
    def propose(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        columns: Tensor,
        temperature: float,
        noise: Tensor | None,
        measures: Sequence[Measure] = ("probability",),
        *,
        shared: bool = True,
        cache: Cache | None = None,
        window: slice | None = None,
    ) -> tuple[Tensor, ...]:
        """Choose a token for every position of `columns` [N K], and measure how clear each choice is.

        tokens [N L]; mask [N L] or None. At temperature 0 the likeliest token; above it a draw from
        softmax(logits / temperature) by inverse CDF in float64, from noise [N K] uniform on [0, 1). [MASK],
        padding (unless it is EOS) and rows of the head that belong to no token are never chosen. shared:
        compute equal rows once, which has to wait for the device. cache: of these rows; where it is filled,
        only the positions of `window`, which holds those of `columns`, are computed, else all, and it is
        filled.

        Returns ids [N K] and each of `measures` [N K], in float32, at temperature 1 and without noise:
        `probability` of the chosen token; `margin`, by which the likeliest token's probability exceeds the
        next one's; `negative_entropy` of the distribution, in nats; `lead`, the same two tokens' distance in
        logits, which is that in log-probabilities.
        """
        with self.computing():
            if cache is not None and cache.filled:
                assert window is not None
                seen = tokens[:, window]
                at = Places(columns - window.start)
                states = self.network.hidden(seen, mask, at, cache, window.start)
            elif shared:
                rows = torch.cat([tokens if mask is None else 2 * tokens + mask, columns], dim=1)
                first, which = distinct_rows(rows)
                own = None if mask is None else mask[first]
                few = self.network.hidden(tokens[first], own, Places(columns[first]), cache)
                states = few.view(len(first), -1, few.shape[-1])[which].flatten(0, 1)
                if cache is not None:
                    cache.select(which)
            else:
                states = self.network.hidden(tokens, mask, Places(columns), cache)
        noise = None if noise is None or temperature == 0 else noise.flatten()
        size = rows_at_once(self.network.head_width, states.device)
        if noise is not None and states.device.type == "cuda":
            size = max(1, size // 8)  # in float64, and as logits, probabilities and their sums
        pieces = range(0, len(states), size)
        found = [
            self._choose(
                states[i : i + size], temperature, None if noise is None else noise[i : i + size], measures
            )
            for i in pieces
        ]
        return tuple(torch.cat(parts).view_as(columns) for parts in zip(*found, strict=True))

    def _choose(
        self, states: Tensor, temperature: float, noise: Tensor | None, measures: Sequence[Measure]
    ) -> tuple[Tensor, ...]:
        """Choose a token from each of states [S D], and measure the choices; see `propose`."""
        with self.computing():
            logits = self.network.logits(states)
        logits = logits.float()
        never = self._never_chosen(logits.shape[-1], logits.device)
        allowed = logits.masked_fill(never, -torch.inf)
        ids = allowed.argmax(-1) if noise is None else _draw(allowed.double() / temperature, noise)

        def measured(name: Measure) -> Tensor:
            if name == "lead":
                return _ahead(allowed)
            # over the whole head, as released: what is never chosen takes its share of the probability
            probabilities = logits.softmax(-1)
            if name == "probability":
                return probabilities.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            if name == "margin":
                return _ahead(probabilities.masked_fill(never, 0.0))
            # `entr` is 0 at 0, where p log p has no value
            return -torch.special.entr(probabilities).sum(-1)

        return ids, *map(measured, measures)

    def _never_chosen(self, rows: int, device: torch.device) -> Tensor:
        if self._never is not None and self._never.device == device:
            return self._never
        never = torch.arange(rows, device=device) >= len(self.tokenizer)
        never[self.mask_id] = True
        if self.pad_id != self.eos_id:
            never[self.pad_id] = True
        self._never = never
        return never


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return for rows [N L] the numbers [U] of the different ones, and which of these each row is [N]."""
    distinct, which = torch.unique(rows, dim=0, return_inverse=True)
    numbers = torch.arange(len(rows), device=rows.device)
    return torch.zeros_like(distinct[:, 0]).scatter(0, which, numbers), which


def _draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw from softmax(logits) [S V] by inverse CDF, from noise [S] uniform on [0, 1), all in float64."""
    cumulative = logits.softmax(-1).cumsum(-1)
    threshold = noise.unsqueeze(-1) * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return ids.clamp_max(logits.shape[-1] - 1)


def _ahead(values: Tensor) -> Tensor:
    """Return by how much the largest of `values` [... V] exceeds the second largest [...]."""
    largest = values.topk(2, dim=-1).values
    return largest[..., 0] - largest[..., 1]
