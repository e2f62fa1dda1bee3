"""The policy: a network with its tokenizer, asked for tokens or for log-probabilities.

The vocabulary axis stays in here: log-probabilities leave as [N T], choices as token ids.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from spg.adapters import LoRA, add_adapter, load_adapter, save_adapter
from spg.errors import InputError
from spg.models.network import Network, Places
from spg.tasks.base import Chat, Example, Template
from spg.types import Prompts

# what `propose` can tell of a choice beside the token: how sure the policy is, and by how much it won
Measure = Literal["probability", "margin", "negative_entropy", "lead"]


class Policy(nn.Module):
    """A masked diffusion language model, pi(x_i | z_t, c) for every masked position at once.

    head_chunk: positions that the output head takes at a time; beyond it, logits are computed chunk
    by chunk and again in the backward pass. Raises ValueError where the tokenizer lacks a mask, EOS
    or padding token.
    """

    def __init__(self, network: Network, tokenizer: PreTrainedTokenizerBase, head_chunk: int = 16384) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.head_chunk = head_chunk
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

    def token_logps(self, tokens: Tensor, mask: Tensor | None, targets: Tensor, scored: Tensor) -> Tensor:
        """Return log pi(targets | tokens) [N T] at the scored positions, 0 elsewhere, in float32.

        tokens [N L] with [MASK] in place; mask [N L] True at real tokens, or None; targets and
        scored [N T] belong to the last T positions.
        """
        width = tokens.shape[1] - targets.shape[1]
        picked = self.network.hidden(tokens, mask, Places.of(F.pad(scored, (width, 0))))
        wanted = targets[scored]
        if len(picked) <= self.head_chunk:
            logps = self._log_softmax_at(picked, wanted)
        else:
            size = self.head_chunk
            pieces = zip(torch.split(picked, size), torch.split(wanted, size), strict=True)
            logps = torch.cat(
                [checkpoint(self._log_softmax_at, h, t, use_reentrant=False) for h, t in pieces]
            )
        return torch.zeros(targets.shape, device=logps.device).masked_scatter(scored, logps)

    def _log_softmax_at(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(self.network.logits(hidden).float(), targets, reduction="none")

    @torch.no_grad()
    def propose(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        window: slice,
        temperature: float,
        noise: Tensor | None,
        measures: Sequence[Measure] = ("probability",),
    ) -> tuple[Tensor, ...]:
        """Choose a token for every position of a window, and measure how clear each choice is.

        tokens [N L]; mask [N L] or None; the window has W of the L positions. At temperature 0 the
        likeliest token; above it a draw from softmax(logits / temperature) by inverse CDF in
        float64, from noise [N W] uniform on [0, 1). [MASK], padding (unless it is EOS) and rows of the
        head that belong to no token are never chosen. Returns ids [N W] and each of `measures` [N W],
        in float32, at temperature 1 and without noise: `probability` of the chosen token; `margin`, by
        which the likeliest token's probability exceeds the next one's; `negative_entropy` of the
        distribution, in nats; `lead`, the same two tokens' distance in logits, which is that in
        log-probabilities.
        """
        # equal rows, as the completions of one prompt are at first, are computed once
        rows = tokens if mask is None else 2 * tokens + mask
        distinct, which = torch.unique(rows, dim=0, return_inverse=True)
        first = torch.zeros_like(distinct[:, 0]).scatter(
            0, which, torch.arange(len(rows), device=rows.device)
        )
        tokens, mask = tokens[first], None if mask is None else mask[first]
        at = torch.zeros_like(tokens, dtype=torch.bool)
        at[:, window] = True
        logits = self.network.logits(self.network.hidden(tokens, mask, Places.of(at))).float()
        logits = logits.view(len(tokens), -1, logits.shape[-1])
        never = self._never_chosen(logits.shape[-1], logits.device)
        allowed = logits.masked_fill(never, -torch.inf)
        if temperature == 0 or noise is None:
            ids = allowed.argmax(-1)[which]
        else:
            cumulative = (allowed.double() / temperature).softmax(-1).cumsum(-1)[which]
            threshold = noise.double().unsqueeze(-1) * cumulative[..., -1:]
            ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
            ids = ids.clamp_max(logits.shape[-1] - 1)

        def measured(name: Measure) -> Tensor:
            if name == "lead":
                return _ahead(allowed)[which]
            # over the whole head, as released: what is never chosen takes its share of the probability
            probabilities = logits.softmax(-1)
            if name == "probability":
                return probabilities[which].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            if name == "margin":
                return _ahead(probabilities.masked_fill(never, 0.0))[which]
            # `entr` is 0 at 0, where p log p has no value
            return -torch.special.entr(probabilities).sum(-1)[which]

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


def _ahead(values: Tensor) -> Tensor:
    """Return by how much the largest of `values` [... V] exceeds the second largest [...]."""
    largest = values.topk(2, dim=-1).values
    return largest[..., 0] - largest[..., 1]
