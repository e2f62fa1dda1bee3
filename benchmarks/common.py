"""What the benchmarks of rollout and update share: the model, the clock, the machine, the floors."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spg import __version__, config
from spg.core.errors import InputError, RunError
from spg.core.memory import keep_freed_memory
from spg.core.types import Prompts
from spg.models.factory import build_policy
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.policy import Policy
from spg.planning.stand_ins import Numbers

# the network that is timed if no model is named
SIZES = {"d_model": 256, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 768, "vocab_size": 32000}
# largest relative difference between the plain way and ours, by the policy's precision
TOLERANCE = {"32-true": 1e-5, "bf16-mixed": 5e-2}


def make_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks of a model understand."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides",
        nargs="*",
        help="the model and its settings, as of spg.train: model=llada_8b model.weights=random; by default a "
        "random LLaDA",
    )
    parser.add_argument(
        "--size", action="append", default=[], metavar="NAME=N", help=f"of that LLaDA, instead of {SIZES}"
    )
    parser.add_argument("--group", type=int, default=6, help="completions of the prompt")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--block", type=int, default=32, help="tokens of a block")
    parser.add_argument("--rounds", type=int, default=rounds, help="timings of each, in turn")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and noise")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--profile", action="store_true", help="print where the time of one of each goes")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options, with overrides anywhere between them, and set threads and allocator.

    A mistake ends the program with exit status 2.
    """
    given = parser.parse_intermixed_args(argv)
    for name in ("group", "prompt", "tokens", "block", "rounds", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be 1 or more")
    if given.tokens % given.block:
        parser.error(f"--tokens {given.tokens} must be a multiple of --block {given.block}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: torch finds no CUDA device here; give --device cpu")
    if getattr(given, "alone", None) is None:  # what is kept would count as memory in use
        keep_freed_memory()  # as training does; for the plain way too
    torch.set_num_threads(given.threads)
    return given


def numbers(kind: type[float]) -> Callable[[str], list[float]]:
    """Return a reader of numbers with commas between them."""

    def read(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    return read


def run(main: Callable[[], None]) -> None:
    """Run a command; print the text of an error that stops it. A mistake of the user has exit status 2."""
    try:
        main()
    except (InputError, RunError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2 if isinstance(error, InputError) else 1)


def make_policy(given: argparse.Namespace) -> Policy:
    """Build the policy that is timed, without dropout, on its device; raises InputError.

    A model with random weights needs no files: it gets a tokenizer of bare numbers. Plain decoding may choose
    [MASK] and rows of the head that belong to no token, ours never does: with random weights those rows are
    0, so that neither does.
    """
    if given.overrides:
        cfg = config.compose("config", given.overrides)
        random = cfg.model.weights == "random"
        cfg.trainer.accelerator = given.device.partition(":")[0]
        if random:
            name = f"{Numbers.__module__}.{Numbers.__name__}"
            cfg.model.tokenizer = {"_target_": name, "size": cfg.model.network.config.vocab_size}
        policy = build_policy(cfg)
    else:
        sizes = SIZES | _numbers(given.size)
        vocabulary = sizes["vocab_size"]
        network = LLaDA(
            LLaDAConfig(**sizes, n_kv_heads=sizes["n_heads"], embedding_size=vocabulary), seed=given.seed
        )
        policy, random = Policy(network, Numbers(vocabulary)), True
    policy = policy.to(given.device).eval()
    if random:
        weight = policy.network.head.weight
        assert isinstance(weight, Tensor)
        never = {policy.mask_id, policy.pad_id} - {policy.eos_id}
        with torch.no_grad():
            weight[[*never, *range(len(policy.tokenizer), len(weight))]] = 0.0
    return policy


def _numbers(sizes: Sequence[str]) -> dict[str, int]:
    found = {}
    for size in sizes:
        name, _, number = size.partition("=")
        if name not in SIZES or not number.isdecimal():
            raise InputError(f"--size {size} is not NAME=N with one of {', '.join(SIZES)}")
        found[name] = int(number)
    return found


def make_prompts(policy: Policy, given: argparse.Namespace, distinct: bool) -> Prompts:
    """Return prompts of random tokens: one for each row if `distinct`, else one for all rows."""
    special = {policy.mask_id, policy.eos_id, policy.pad_id}
    ordinary = torch.tensor([i for i in range(len(policy.tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(given.seed)
    rows = given.group if distinct else 1
    drawn = torch.randint(len(ordinary), (rows, given.prompt), generator=generator)
    ids = ordinary[drawn].expand(given.group, -1).to(policy.device)
    group = torch.arange(given.group, device=policy.device)
    return Prompts(
        ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        template=torch.full((given.group, given.tokens), policy.mask_id, device=policy.device),
        given=torch.zeros(given.group, given.tokens, dtype=torch.bool, device=policy.device),
        group=group if distinct else torch.zeros_like(group),
        index=group,
        examples=({},) * given.group,
    )


def measure_seconds(work: Callable[[], Any], device: str) -> float:
    """Return the seconds that `work` takes, until the device has done it; garbage is collected before."""
    gc.collect()
    return _seconds(work, device)


def _seconds(work: Callable[[], Any], device: str) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles, and how many values there are."""
    if len(values) == 1:
        (only,) = values
        return {"median": only, "low": only, "high": only, "n": 1}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "n": len(values)}


def compare(plain: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return the spread of both in seconds, and the ratio of their medians."""
    ratio = statistics.median(plain) / statistics.median(ours)
    return {"plain": spread(plain), "ours": spread(ours), "ratio": ratio}


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were measured on, and how busy it was."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "load": os.getloadavg(),
    }


def versions() -> dict[str, str]:
    """Return the versions that the figures belong to."""
    libraries = ("torch", "transformers", "peft", "lightning")
    found = {name: version(name) for name in libraries}
    return {"spg": __version__, "python": platform.python_version(), **found, "cuda": str(torch.version.cuda)}


def list_settings(given: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    """Return all options, the sizes and the types of the network."""
    options = {name: value for name, value in vars(given).items() if name not in ("output", "profile")}
    return {
        **options,
        "precision": policy.precision,
        "weights": str(next(policy.network.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "trained": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        "network": asdict(Sizes.of(policy)),
    }


def write(result: Mapping[str, Any], output: Path | None) -> None:
    """Write the figures to a JSON file, if one is named."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(title: str, rows: Mapping[str, Mapping[str, Any]], unit: str = "s") -> str:
    """Return a table of what `compared` gave, a row for each name."""
    lines = [f"{title:<24}{f'plain, {unit}':>28}{f'ours, {unit}':>28}{'ratio':>8}"]
    for name, row in rows.items():
        cells = [f"{c['median']:.4g} ({c['low']:.4g}-{c['high']:.4g})" for c in (row["plain"], row["ours"])]
        lines.append(f"{name:<24}{cells[0]:>28}{cells[1]:>28}{row['ratio']:>8.2f}")
    return "\n".join(lines) + "\n"


def profile(name: str, work: Callable[[], Any]) -> str:
    """Return a table of the operations that take most of the time of `work`."""
    with torch.profiler.profile() as profile:
        work()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return f"{name}\n{profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=40)}\n"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network that its work follows from."""

    layers: int
    matrices: int  # weights of a layer's matrices
    trained: int  # those of them that are trained
    from_keys: int  # those of them that make keys and values
    attention: int  # width of the queries
    keys: int  # width of keys and values together
    width: int
    head: int  # rows of the output head
    head_trained: bool
    weight_bytes: int  # of one weight

    @classmethod
    def of(cls, policy: Policy) -> Sizes:
        """Read the sizes off a policy's network."""
        layers = list(policy.network.layers)
        found = {name: module for name, module in layers[0].named_modules() if _is_matrix(module)}
        outputs = {name.replace(".base_layer", "").rpartition(".")[2]: m for name, m in found.items()}
        keys = [m for name, m in found.items() if "k_proj" in name or "v_proj" in name]
        head = policy.network.head.weight
        assert isinstance(head, Tensor)
        return cls(
            layers=len(layers),
            matrices=sum(map(_size, found.values())),
            trained=sum(_size(m) for m in found.values() if m.weight.requires_grad),
            from_keys=sum(map(_size, keys)),
            attention=outputs["q_proj"].out_features,
            keys=outputs["k_proj"].out_features + outputs["v_proj"].out_features,
            width=head.shape[1],
            head=head.shape[0],
            head_trained=head.requires_grad,
            weight_bytes=2 if policy.precision == "bf16-mixed" else head.element_size(),
        )

    def forward(self, rows: int, positions: int, seen: int, last: float, at_head: float) -> float:
        """Return the operations of a pass over `positions` of the `seen` positions of each of `rows`.

        last: positions that the last layer's queries and feed-forward part are needed at; at_head: those
        that the head is needed at. A multiplication and its addition are two operations.
        """
        a_position = 2 * self.matrices + 4 * self.attention * seen
        whole = (self.layers - 1) * positions * a_position
        final = positions * 2 * self.from_keys + last * (a_position - 2 * self.from_keys)
        return rows * (whole + final + at_head * 2 * self.width * self.head)

    def update(self, rows: int, positions: int, last: float, at_head: float) -> float:
        """Return the operations of a forward and a backward pass over `rows` of `positions`.

        The backward pass takes as many as the forward pass for the inputs of its products, as many again for
        attention, both of whose factors have gradients, and for the weights that are trained. Nothing is
        computed twice.
        """
        computed = (self.layers - 1) * positions + last
        attention = 4 * self.attention * positions * computed
        weights = 2 * self.trained * computed + 2 * self.width * self.head * at_head * self.head_trained
        return 2 * self.forward(rows, positions, positions, last, at_head) + rows * (attention + weights)

    def read(self) -> int:
        """Return the bytes of all matrices, which a pass reads once at least."""
        return (self.layers * self.matrices + self.width * self.head) * self.weight_bytes


def _is_matrix(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features") and _has_weight(module)


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), Tensor)


def _size(module: Any) -> int:
    return int(module.in_features * module.out_features)


def rates(given: argparse.Namespace, policy: Policy) -> dict[str, float]:
    """Return operations a second of a matrix product, bytes a second of a copy: the best of half a second."""
    on_gpu = given.device.startswith("cuda")
    kind = torch.bfloat16 if policy.precision == "bf16-mixed" else torch.float32
    side, length = (8192, 2**28) if on_gpu else (1536, 2**24)
    a, b = (torch.randn(side, side, device=given.device).to(kind) for _ in range(2))
    source = torch.zeros(length, device=given.device)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        work()
        found: list[float] = []
        while len(found) < 3 or sum(found) < 0.5:
            found.append(_seconds(work, given.device))
        return min(found)

    return {
        "operations_per_s": 2 * side**3 / best(lambda: torch.matmul(a, b)),
        "bytes_per_s": 8 * length / best(lambda: target.copy_(source)),
    }


def best_rates(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the higher of rates measured twice: what else runs on a machine only lowers them."""
    return {name: max(first[name], second[name]) for name in first}


def floor(operations: float, moved: float, rate: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return the least operations and bytes, and the seconds that they take at the measured rates.

    `share` is the part of `seconds` that this is.
    """
    least = max(operations / rate["operations_per_s"], moved / rate["bytes_per_s"])
    return {"operations": operations, "bytes": moved, "seconds": least, "share": least / seconds}


def trim() -> None:
    """Give freed memory back to the system, if the C library can."""
    gc.collect()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
