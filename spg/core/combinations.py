"""Rules between parts, which the configuration check and the parts' constructors both apply.

This module knows only numbers and words, so that a bad combination is refused before torch is imported.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

# what an objective's loss joins in other ways than by a sum; see spg.algorithms.objectives.coupling
Couples = Literal["sequence", "group", "batch"]


def check_length_counted_once(normalization: str, length_weighting: bool) -> None:
    """Refuse an estimator and an objective that would both weight a sequence by its length.

    Bounds with `elbo_weight` are sums over tokens, so they grow with the length already: the mean over scored
    tokens, times the length in the loss, is the sum with weight 1/t.

    Raises:
        ValueError: if both do.
    """
    if normalization == "elbo_weight" and length_weighting:
        raise ValueError(
            "normalization=elbo_weight with length_weighting=true would count a sequence's length "
            "twice; set algorithm.objective.length_weighting=false, or keep normalization=per_token"
        )


def check_pairs(num_mc: int, kind: str) -> None:
    """Refuse an odd number of draws for a mask that draws pairs.

    Args:
        num_mc: Masked samples of each completion.
        kind: What the pairs are called, for the message.

    Raises:
        ValueError: if `num_mc` is odd.
    """
    if num_mc % 2:
        raise ValueError(
            f"num_mc={num_mc} is odd: {kind} pairs need an even num_mc; set num_mc={num_mc + 1}, say"
        )


def check_sums(normalization: str, adaptive: bool, objective: str) -> None:
    """Refuse an estimator whose bounds are not sums over tokens, or which would learn its omega.

    Args:
        normalization: The estimator's.
        adaptive: Whether the estimator's omega is `auto`.
        objective: Name of the objective that needs sums, for the message.

    Raises:
        ValueError: for such an estimator.
    """
    if adaptive:
        raise ValueError(
            f"omega=auto is learned by SPG's objective alone, not by {objective}; give a number from 0 to 1"
        )
    if normalization != "elbo_weight":
        raise ValueError(
            f"{objective} needs log-likelihoods of whole sequences, but its estimator has normalization="
            f"{normalization}; set algorithm.normalization=elbo_weight"
        )


def check_group_size(group_size: int, needed: int, what: str) -> None:
    """Refuse another number of completions for each prompt than a part needs.

    Args:
        group_size: Completions of each prompt.
        needed: How many the part needs.
        what: The part and its reason, for the message.

    Raises:
        ValueError: if the two numbers differ.
    """
    if group_size != needed:
        raise ValueError(f"group_size={group_size}, but {what}; give group_size={needed}")


def check_omega_has_data(num_mc: int, mu: int, fresh: bool, masking: str) -> None:
    """Refuse omega=auto if an update would never see what omega is estimated from.

    The estimate compares the masks of successive inner updates on one rollout. With one draw the EUBO per
    token is the ELBO, and no omega is better than another.

    Args:
        num_mc: Masked samples of each completion.
        mu: Inner updates on each rollout.
        fresh: Whether each inner update draws new masks.
        masking: Name of the masking, for the message.

    Raises:
        ValueError: if there is nothing to compare.
    """
    if not fresh:
        raise ValueError(
            f"omega=auto compares the masks of inner updates, and masking={masking} has the same in all; set "
            "another masking, or omega to a number from 0 to 1"
        )
    if num_mc == 1:
        raise ValueError(
            "omega=auto with num_mc=1: one draw can't tell ELBO and EUBO apart; set num_mc=2 or more, or "
            "omega to a number from 0 to 1"
        )
    if mu == 1:
        raise ValueError(
            "omega=auto with mu=1: masks are compared between the inner updates on a rollout; set mu=2 or "
            "more, or omega to a number from 0 to 1"
        )


def check_couples(value: Any, objective: str) -> Couples:
    """Return the `couples` of an objective's class, the name of which is for the message.

    Raises:
        ValueError: if it is not one of the known values.
    """
    allowed: tuple[Couples, ...] = get_args(Couples)
    for known in allowed:
        if value == known:
            return known
    raise ValueError(f"{objective} has couples={value!r}; set it to one of {', '.join(allowed)}")


def check_commit_rule(remasking: str, threshold: float | None, factor: float | None) -> None:
    """Refuse two rules for the number of tokens that a step commits, and a rule without a confidence.

    Args:
        remasking: What orders the positions.
        threshold: The confidence above which a position is committed.
        factor: The factor of the rule that takes a threshold's place.

    Raises:
        ValueError: if both are given, or if `remasking` does not measure a confidence from 0 to 1.
    """
    if threshold is not None and factor is not None:
        raise ValueError(
            f"decoding.threshold={threshold} and decoding.factor={factor} are two rules for the same thing; "
            "give one of the two, and null for the other"
        )
    for name, value in (("threshold", threshold), ("factor", factor)):
        if value is not None and remasking not in ("low_confidence", "margin"):
            raise ValueError(
                f"decoding.{name}={value} needs a confidence between 0 and 1, and decoding.remasking="
                f"{remasking} is none; give decoding.remasking=low_confidence or margin, or "
                f"decoding.{name}=null"
            )
