"""What makes two runs the same run: the settings that must not change, and those that may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.config import CONF_DIR, ConfigError
from spg.config.renames import ADDED

# settings that a resumed run may change; threads, the batch sizes and how processes share the work change
# rounding at most, and noise of dropout
CHANGEABLE = (
    "trainer.max_updates",
    "trainer.checkpoint_every",
    "trainer.keep_every",
    "trainer.samples_every",
    "trainer.threads",
    "trainer.micro_batch_size",
    "trainer.eval_batch_size",
    "trainer.checkpoint_format",
    "trainer.nodes",
    "trainer.devices",
    "trainer.strategy",
    "trainer.requeue",
    "logger",
)


class OtherRunError(ConfigError):
    """A directory holds a run with other settings than those that were asked for."""


def identity(cfg: DictConfig, changeable: Sequence[str] = CHANGEABLE) -> dict[str, str]:
    """Return the settings that must not change while a run lasts, by their dotted keys.

    A setting that older versions lacked is left out at the value that they worked with.
    """
    free = (*changeable, "resume")
    leaves: dict[str, str] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                walk(child, f"{key}.{name}" if key else str(name))
        elif key not in free and key.partition(".")[0] not in free and ADDED.get(key) != str(node):
            leaves[key] = str(node)

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return leaves


def check_same(
    before: Mapping[str, str], now: Mapping[str, str], folder: Path, option: str = "hydra.sweep.dir"
) -> None:
    """Compare the identity of the run in `folder` with the one that was asked for.

    Args:
        before: Identity of the run in `folder`.
        now: Identity that was asked for.
        folder: Directory of the run.
        option: The key that sets the directory, for the message.

    Raises:
        OtherRunError: if they differ, with the first setting that does.
    """
    found = find_difference(before, now)
    if found is not None:
        now_alone = found[1].removeprefix(f"{found[0].partition('=')[0]}=")
        raise OtherRunError(
            f"{folder} holds a run with {found[0]}, not {now_alone}; give another {option}, or remove it"
        )


def find_difference(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the first setting in which two identities differ, once as `before` and once as `now` has it.

    If one of them has settings below a key and the other has none, as for an adapter, the words are about the
    key.

    Returns:
        The two in words, or None if the identities are equal.
    """
    other = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    # a setting at the root is what the user sets, and others may take its value
    key = min(other, key=lambda key: (key.count("."), key), default=None)
    if key is None:
        return None
    names = key.split(".")
    above = (".".join(names[:end]) for end in range(1, len(names)))
    key = next((name for name in above if name in before or name in now), key)
    return _in_words(before, key), _in_words(now, key)


def _in_words(leaves: Mapping[str, str], key: str) -> str:
    """Return the value of a key, or of all keys below it, as words of a message."""
    value = leaves.get(key)
    inner = {k.removeprefix(f"{key}."): v for k, v in leaves.items() if k.startswith(f"{key}.")}
    if key == "model.lora":
        numbers = ", ".join(f"{name}={inner[name]}" for name in ("r", "alpha") if name in inner)
        return f"a LoRA adapter ({numbers})" if inner else "all weights trained (model.lora=null)"
    if inner:
        return f"{key}={{{', '.join(f'{name}: {setting}' for name, setting in inner.items())}}}"
    return f"{key}={'null' if value == 'None' else value}" if key in leaves else f"no {key}"


def changes(before: DictConfig, now: DictConfig) -> list[str]:
    """Return the settings of the trainer that a run changes when it goes on, as lines `key=value`."""
    lines = []
    for key in CHANGEABLE:
        old, new = (OmegaConf.select(cfg, key) for cfg in (before, now))
        if key.startswith("trainer.") and old != new:
            lines.append(f"{key}={'null' if new is None else new}")
    return lines


def apply_changes(
    cfg: DictConfig, overrides: Sequence[str], folder: Path, changeable: Sequence[str] = CHANGEABLE
) -> DictConfig:
    """Return the configuration of the run in `folder` with changed settings.

    Args:
        cfg: Configuration that the run has so far; it is not changed.
        overrides: Lines `key=value` of the command line.
        folder: Directory of the run, for messages.
        changeable: Keys that may change.

    Raises:
        ConfigError: if an override would change anything else.
    """
    result = cfg.copy()
    for line in overrides:
        key, _, value = line.partition("=")
        if key not in (*config.keys(cfg), *changeable):
            guess = config.nearest(key, list(changeable))
            raise ConfigError(
                f"{line}: beside resume=... only these are taken: {', '.join(changeable)}"
                + (f"; nearest: {guess}" if guess else "")
            )
        if key == "logger" and (CONF_DIR / "logger" / f"{value}.yaml").is_file():
            result.logger = OmegaConf.load(CONF_DIR / "logger" / f"{value}.yaml")
            continue
        old = OmegaConf.select(cfg, key) if config.is_known(cfg, key) else None
        new = OmegaConf.create(f"x: {value}").x
        if key in changeable and key != "logger":
            OmegaConf.update(result, key, new)
        elif old != new:
            raise ConfigError(
                f"{line}: a run goes on with its own settings ({key}={old} in {folder / 'config.yaml'}); "
                f"allowed: {', '.join(changeable)}; start a new run for others"
            )
    return result
