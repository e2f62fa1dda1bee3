"""The policy: a network with its tokenizer, which gives tokens or log-probabilities.

The vocabulary axis never leaves this module: log-probabilities leave as [N T], choices as token ids.
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

from spg.core.devices import send
from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.rules import checked
from spg.core.types import Prompts
from spg.models.choice import Measure, choose, distinct_rows
from spg.models.guidance import Guidance
from spg.models.head import rows_at_once
from spg.models.lora import (
    FusedLayer,
    LoRA,
    add_adapter,
    fused,
    keep_input_types,
    load_adapter,
    save_adapter,
)
from spg.models.network import Cache, Network, Positions


class Policy(nn.Module):
    """A masked diffusion language model, pi(x_i | z_t, c) for every masked position at once.

    Args:
        network: Computes hidden states and logits.
        tokenizer: Has a mask, an EOS and a padding token.
        precision: `32-true`, or `bf16-mixed` for a network that computes in bfloat16 (autocast). Softmax and
            sampling are always in float32 or better.

    Raises:
        ValueError: if the tokenizer lacks one of the three tokens.
    """

    @checked
    def __init__(
        self,
        network: Network,
        tokenizer: PreTrainedTokenizerBase,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
    ) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.precision = precision
        self.mask_id = self._token_id("mask_token_id")
        self.eos_id = self._token_id("eos_token_id")
        self.pad_id = self._token_id("pad_token_id")
        self._excluded: Tensor | None = None
        # lists keep both from becoming submodules: the adapter wraps the network, the copy is not trained
        self._adapter: list[Any] = []
        self._reference: list[Network] = []
        self._fused: list[FusedLayer] = []
        self._is_decoding = False
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
        """Train an adapter from now on, instead of the own weights of the network."""
        adapter = add_adapter(self.network, lora)
        self._adapter, self._fused = [adapter], FusedLayer.of(adapter)
        if self.precision != "32-true":
            keep_input_types(adapter)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, instead of the own weights of the network."""
        return bool(self._adapter)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, which `peft.PeftModel.from_pretrained` loads."""
        save_adapter(self._adapter[0], folder)

    def load_adapter(self, folder: Path) -> None:
        """Load the adapter from a PEFT folder; raise ValueError if it does not fit."""
        load_adapter(self._adapter[0], folder)

    def keep_reference(self) -> None:
        """Keep a copy of the model as it is now, for `as_reference`.

        With an adapter no copy is needed: the model without it is the reference.
        """
        if not self._adapter:
            self._reference = [copy.deepcopy(self.network).requires_grad_(False)]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Act as the reference model, without dropout: the adapter is switched off, or the copy takes over.

        Raises:
            ValueError: if no reference was kept.
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

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Decode in a `with` block: in evaluation mode, without gradients, with a fused adapter.

        The weights must not change in it.
        """
        was_training, was_decoding = self.training, self._is_decoding
        lower = None if self.precision == "32-true" else torch.bfloat16
        self.eval()
        self._is_decoding = True
        try:
            with torch.no_grad(), nullcontext() if was_decoding else fused(self._fused, lower):
                yield
        finally:
            self._is_decoding = was_decoding
            self.train(was_training)

    def encode(self, prompt: str | Chat) -> list[int]:
        """Return the token ids of a text, or of a chat in the template of the model.

        Raises:
            InputError: if the tokenizer has no tokens for the text, or no template for chats.
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
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # the tokenizer would raise a TypeError
            raise InputError(
                f"{text!r} holds one half of a surrogate pair, which does not encode a character; "
                "write the character whole, or leave it out"
            ) from error
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

    def texts(self, completion_ids: Tensor) -> tuple[str, ...]:
        """Return the texts of completions [B T], which are read from the device at once."""
        return tuple(self.text(row) for row in completion_ids.cpu())

    def prepare(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str | Chat],
        templates: Sequence[Template | None],
        group: Tensor,
        index: Tensor,
        gen_length: int,
    ) -> Prompts:
        """Tokenize B prompts and templates, pad them, and move them to the device of the policy.

        Args:
            examples: Example of each sequence.
            prompts: Prompt of each sequence.
            templates: Completion with holes of each sequence; None for a free completion.
            group: Number of each sequence's prompt [B].
            index: Number of each sequence [B].
            gen_length: Number of completion tokens T. After a shorter template, given EOS tokens follow.

        Raises:
            InputError: if a template is longer than `gen_length`.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        width = max(len(ids) for ids in encoded)
        completions = [self._lay_out(template, gen_length) for template in templates]
        return Prompts(
            ids=self._tensor([[self.pad_id] * (width - len(ids)) + ids for ids in encoded]),
            mask=self._tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]).bool(),
            template=self._tensor([ids for ids, _ in completions]),
            given=self._tensor([given for _, given in completions]).bool(),
            group=send(group, self.device),
            index=send(index, self.device),
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
        return send(torch.tensor(rows, dtype=torch.long), self.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which the network computes in the precision of the policy.

        Enter it for one pass at a time: autocast keeps its copies of weights until it ends, and would miss
        a change by an optimizer.
        """
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def token_logps(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        targets: Tensor,
        scored: Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return log pi(targets | tokens) [N T] at the scored positions, 0 elsewhere, in float32.

        Args:
            tokens: Token ids with [MASK] in place [N L].
            mask: True at real tokens [N L]; None if nothing is padded.
            targets: Token ids of the last T positions [N T].
            scored: True at the positions to compute [N T].
            counts: Number of scored positions in each row; None to read it, for which the device is waited
                for.
        """
        width = tokens.shape[1] - targets.shape[1]
        at = Positions.of_mask(F.pad(scored, (width, 0)), counts)
        places = at.places(targets.shape[1], width)
        with self.autocast():
            picked = self.network.hidden(tokens, mask, at)
            logps = self.network.logps(picked, targets.flatten()[places])
        return torch.zeros(targets.numel(), device=logps.device).scatter(0, places, logps).view_as(targets)

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
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, ...]:
        """Choose a token for every position of `columns`, and measure how clear each choice is.

        At temperature 0 this is the most likely token. Above, it is a draw from softmax(logits / temperature)
        by inverse CDF in float64. [MASK], padding (unless it is EOS) and rows of the head without a token are
        never chosen.

        Args:
            tokens: Token ids with [MASK] in place [N L].
            mask: True at real tokens [N L]; None if nothing is padded.
            columns: Positions to choose for [N K].
            temperature: Of the draws; 0 for none.
            noise: Uniform on [0, 1) [N K]; None without draws.
            measures: What to return beside the tokens.
            shared: Compute equal rows once. This waits for the device.
            cache: Keys and values of these rows. If it is filled, only the positions of `window` are
                computed; else all are, and it is filled.
            window: Positions to compute with a filled cache; it holds those of `columns`.
            guidance: Changes the distribution. A copy of each row is computed too, and the cache holds both.

        Returns:
            Token ids [N K], then each of `measures` [N K], in float32, at temperature 1 and without noise.
            `probability` is that of the chosen token, `unguided_probability` what it is without guidance.
            `margin` is the difference in probability between the
            two most likely tokens, `lead` their difference in logits, which is that in log-probabilities.
            `negative_entropy` is that of the distribution, in nats.
        """
        shape = columns.shape
        if guidance is not None:
            tokens, columns = guidance.with_copies(tokens, self.mask_id), columns.repeat(2, 1)
            mask = None if mask is None else mask.repeat(2, 1)
        with self.autocast():
            states = self._states_at(tokens, mask, columns, shared, cache, window)
        states, *copies = states.chunk(1 if guidance is None else 2)
        noise = None if noise is None or temperature == 0 else noise.flatten()
        size = max(1, rows_at_once(self.network.head_width, states.device) // (1 + len(copies)))
        if noise is not None and states.device.type == "cuda":
            size = max(1, size // 8)  # in float64, and as logits, probabilities and their sums
        found = []
        for i in range(0, len(states), size):
            part = slice(i, i + size)
            own = self._logits(states[part])
            logits = own if guidance is None else guidance.guide(own, self._logits(copies[0][part]))
            excluded = self._excluded_ids(logits.shape[-1], logits.device)
            own_noise = None if noise is None else noise[part]
            found.append(choose(logits, own, excluded, temperature, own_noise, measures))
        return tuple(torch.cat(parts).view(shape) for parts in zip(*found, strict=True))

    def _states_at(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        columns: Tensor,
        shared: bool,
        cache: Cache | None,
        window: slice | None,
    ) -> Tensor:
        """Return the last layer's states [N * K D] at `columns` [N K]; see `propose`."""
        if cache is not None and cache.filled:
            assert window is not None
            at = Positions(columns - window.start)
            return self.network.hidden(tokens[:, window], mask, at, cache, window.start)
        if not shared:
            return self.network.hidden(tokens, mask, Positions(columns), cache)
        rows = torch.cat([tokens if mask is None else 2 * tokens + mask, columns], dim=1)
        first, which = distinct_rows(rows)
        own = None if mask is None else mask[first]
        few = self.network.hidden(tokens[first], own, Positions(columns[first]), cache)
        if cache is not None:
            cache.select(which)
        return few.view(len(first), -1, few.shape[-1])[which].flatten(0, 1)

    def _logits(self, states: Tensor) -> Tensor:
        """Return the logits [S V] of states [S D], in float32."""
        with self.autocast():
            return self.network.logits(states).float()

    def _excluded_ids(self, rows: int, device: torch.device) -> Tensor:
        if self._excluded is not None and self._excluded.device == device:
            return self._excluded
        excluded = torch.arange(rows) >= len(self.tokenizer)
        excluded[self.mask_id] = True
        if self.pad_id != self.eos_id:
            excluded[self.pad_id] = True
        self._excluded = send(excluded, device)
        return self._excluded
