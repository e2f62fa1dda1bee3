"""Exact sums over every path of a small discrete-time masked diffusion model.

n tokens, V symbols, T time steps. alpha_1 = 1 >= ... >= alpha_{T+1} = 0: z_1 is clean, z_{T+1} wholly
masked. Going from t+1 to t, a masked token is revealed with probability
r_t = (alpha_t - alpha_{t+1}) / (1 - alpha_{t+1}) and then drawn from the network, a table that holds a
distribution over symbols for every sequence with masks and every position. All in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MASK = -1
State = tuple[int, ...]


@dataclass(frozen=True)
class Toy:
    """A random table and a noise schedule."""

    n: int
    symbols: int
    alphas: np.ndarray  # [T + 1], alphas[0] = alpha_1 = 1, alphas[T] = alpha_{T+1} = 0
    table: dict[State, np.ndarray]  # state -> [n V]

    @property
    def reveal(self) -> np.ndarray:
        """Return r_t for t = 1..T."""
        return (self.alphas[:-1] - self.alphas[1:]) / (1 - self.alphas[1:])


def make_toy(
    n: int, symbols: int, steps: int, seed: int, order_free: bool = False, sharp: float = 1.5
) -> Toy:
    """Return a toy with random schedule and table; `order_free`: one distribution a position."""
    rng = np.random.default_rng(seed)
    inner = np.sort(rng.uniform(0.05, 0.95, steps - 1))[::-1]
    alphas = np.concatenate([[1.0], inner, [0.0]])

    def draw() -> np.ndarray:
        logits = sharp * rng.standard_normal((n, symbols))
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    one = draw()
    states = itertools.product([MASK, *range(symbols)], repeat=n)
    return Toy(n, symbols, alphas, {state: one if order_free else draw() for state in states})


def masked_copies(x: State) -> Iterator[State]:
    """Yield every partly masked copy of x."""
    for hidden in itertools.product([False, True], repeat=len(x)):
        yield tuple(MASK if h else v for h, v in zip(hidden, x, strict=True))


def probability(toy: Toy, x: State) -> float:
    """Return p(x), summed over all paths from the masked sequence to x."""
    reached = {(MASK,) * toy.n: 1.0}
    for r in toy.reveal[::-1]:
        following: dict[State, float] = {}
        for state, mass in reached.items():
            choices = []
            for i, value in enumerate(state):
                if value != MASK:
                    choices.append([(value, 1.0)])
                else:
                    choices.append([(MASK, 1 - r), (x[i], r * toy.table[state][i, x[i]])])
            for option in itertools.product(*choices):
                weight = mass * np.prod([p for _, p in option])
                if weight > 0:
                    key = tuple(v for v, _ in option)
                    following[key] = following.get(key, 0.0) + weight
        reached = following
    return reached.get(x, 0.0)


def mask_probability(toy: Toy, t: int, z: State) -> float:
    """Return q(z_t = z | x) for t from 1 to T + 1."""
    alpha = toy.alphas[t - 1]
    return float(np.prod([1 - alpha if v == MASK else alpha for v in z]))


def token_terms(toy: Toy, x: State) -> list[tuple[float, float, State]]:
    """Return (probability of the mask, weight r_t, z_{t+1}) for every time and mask."""
    return [
        (mask_probability(toy, t + 1, z), float(toy.reveal[t - 1]), z)
        for t in range(1, len(toy.alphas))
        for z in masked_copies(x)
    ]


def elbo(toy: Toy, x: State) -> float:
    """Return the discrete-time ELBO: sum_t E sum_i r_t 1(masked) log pi(x_i | z_{t+1})."""
    return sum(
        q * w * np.log(toy.table[z][i, x[i]])
        for q, w, z in token_terms(toy, x)
        for i in range(toy.n)
        if z[i] == MASK
    )


def eubo(toy: Toy, x: State, beta: float) -> float:
    """Return the discrete-time EUBO of Theorem 1, without its constant."""
    total = 0.0
    for i in range(toy.n):
        inside = sum(q * w * toy.table[z][i, x[i]] ** beta for q, w, z in token_terms(toy, x) if z[i] == MASK)
        total += np.log(inside) / beta
    return total


def log_constant(toy: Toy, x: State, beta: float) -> float:
    """Return C(T) = (1/beta) log E_q[q(z_{1:T} | x)^{-n}] for beta < n, and 0 otherwise.

    q is a product over tokens, each of which is hidden from some step on: token-wise, the sum over
    the T hiding times of q^{1-n} to the power n tokens.
    """
    if beta >= toy.n:
        return 0.0
    # a token revealed at step t (z_t clean, z_{t+1} masked) has probability alpha_t - alpha_{t+1}
    times = toy.alphas[:-1] - toy.alphas[1:]
    return float(toy.n * np.log((times ** (1.0 - toy.n)).sum()) / beta)
