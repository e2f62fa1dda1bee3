"""Root keys that the selected parts do not read, and what else a user should know about a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

# root keys that parts interpolate; the training loop itself reads mu, group_size and seed
KNOBS = ("beta", "omega", "block_size", "num_mc", "gen_length")


def unread_knobs(cfg: DictConfig) -> list[str]:
    """Return the root keys that no selected part of the configuration refers to.

    An estimator counts as a part only if the objective refers to it: not every method has one.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    unread = unread_estimators(cfg)
    selected = str({key: value for key, value in raw.items() if key not in (*KNOBS, *unread)})
    return [knob for knob in KNOBS if knob in raw and f"${{{knob}}}" not in selected]


def unread_estimators(cfg: DictConfig) -> list[str]:
    """Return `estimator` and `positive`, each if the objective does not refer to it."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    objective = str(raw.get("algorithm", {}))
    return [name for name in ("estimator", "positive") if name in raw and f"${{{name}}}" not in objective]


def unread_steps(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the line that says so if the command line sets a number of steps that decoding does not read."""
    asked = any(line.lstrip("+").startswith("decoding.steps=") for line in overrides)
    for rule in ("threshold", "factor") if asked else ():
        value = OmegaConf.select(cfg, f"decoding.{rule}")
        if value is not None:
            return [
                f"Note: decoding.steps={cfg.decoding.steps} is not read: with decoding.{rule}={value} a "
                "block takes the steps that it needs."
            ]
    return []


def notes(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return what a user should know about a valid configuration, a line each.

    Args:
        cfg: The configuration, not yet resolved.
        overrides: The command line: what it does not name stands by default.
    """
    lines = []
    unread = unread_knobs(cfg)
    asked = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    for knob in (k for k in unread if k in asked):
        lines.append(f"Warning: {knob}={cfg[knob]} is read by no selected part and changes nothing.")
    for name in unread_estimators(cfg):
        group = "estimator" if name == "estimator" else "estimator@positive"
        for line in overrides:
            key = line.lstrip("+").partition("=")[0]
            if key == group or key.startswith(f"{name}."):
                lines.append(f"Warning: {line} is read by no selected part and changes nothing.")
    lines += unread_steps(cfg, overrides)
    if "beta" in cfg and "beta" not in unread and cfg.beta < 1:
        lines.append(f"Note: with beta={cfg.beta}, below 1, the EUBO is not an upper bound.")
    return [*lines, *decoding_notes(cfg)]


def decoding_notes(cfg: DictConfig) -> list[str]:
    """Return what a user should know about the lengths and steps of a valid configuration, a line each."""
    lines = []
    length, steps = cfg.gen_length, cfg.decoding.steps
    by_confidence = any(cfg.decoding.get(rule) is not None for rule in ("threshold", "factor"))
    if steps > length and not by_confidence:
        lines.append(
            f"Note: decoding.steps={steps} is above gen_length={length}. A step commits one token or more, "
            f"so there are {length} steps at most."
        )
    sizes = {"decoding.block_size": cfg.decoding.block_size}
    if "masking" in cfg and cfg.masking.get("block_size") not in (None, cfg.decoding.block_size):
        sizes["masking.block_size"] = cfg.masking.block_size
    for key, size in sizes.items():
        if size < length and length % size:
            lines.append(
                f"Note: {key}={size} does not divide gen_length={length}. The last block is shorter "
                f"({length % size})."
            )
    return lines
