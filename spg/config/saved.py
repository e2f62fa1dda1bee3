"""Configurations that lie in files: those of runs and evaluations, and the shipped options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from spg.config import parts, renames
from spg.config.errors import ConfigError
from spg.config.knobs import KNOBS
from spg.config.names import nearest
from spg.config.options import files, folder_of_user
from spg.config.paths import unquote
from spg.config.settings import NODES

# settings without which a run can't go on; older runs have them too
NEEDED = (
    *("mu", "group_size", "gen_length", "seed", "logger.wandb", "task._target_", "decoding._target_"),
    *("masking._target_", "advantage._target_", "algorithm.objective._target_", "optimizer.lr"),
    *("model.network._target_", "model.tokenizer._target_", "model.weights", "model.lora"),
    *("pretrain.steps", "pretrain.batch_size", "pretrain.lr", "pretrain.seed"),
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.threads"),
    *("trainer.max_updates", "trainer.prompts_per_rollout", "trainer.micro_batch_size"),
    *("trainer.eval_batch_size", "trainer.validate_every", "trainer.checkpoint_every"),
    "trainer.samples_every",
)
# settings of older runs that have another place now
FORMER = ("trainer.precision",)


def load_saved(path: Path) -> DictConfig | None:
    """Return the configuration that a run or an evaluation left at `path`, or None if there is none.

    Classes that an older version named by another path have their present one.
    """
    try:
        cfg = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError):
        return None
    return renames.update_paths(cfg) if isinstance(cfg, DictConfig) else None


def check_complete(cfg: DictConfig, path: Path) -> None:
    """Refuse the configuration of a run in which a setting is missing, or that has one nobody knows.

    Args:
        cfg: The configuration.
        path: Its file, for the message.

    Raises:
        ConfigError: for the first such setting.
    """
    have = keys_of(cfg)
    inner = {key.rpartition(".")[0] for key in have}
    missing = next((key for key in NEEDED if key not in have and key not in inner), None)
    unknown = [key for key in have if key not in FORMER and not _is_setting(key)]
    own = [key for key in unknown if "." in key]  # a root key that is not known may belong to a task
    if missing is None and not own:
        return
    guess = nearest(own[0], _settings_beside(own[0])) if missing is None else nearest(missing, unknown)
    what = f"there is an unknown setting {own[0]}" if missing is None else f"there is no {missing}"
    raise ConfigError(
        f"{path}: {what}{'' if guess is None else f' (nearest: {guess})'}; it is not as a run writes it. "
        "Restore the file, or start a new run"
    )


def keys_of(cfg: Any) -> list[str]:
    """Return the dotted names of all leaves of a configuration, those of class names too."""
    found: list[str] = []
    for name in map(str, cfg):
        node = cfg._get_node(name)
        inner = isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()
        found += [f"{name}.{key}" for key in keys_of(node)] if inner else [name]
    return found


def _is_setting(key: str) -> bool:
    """Return whether a key is a known one, for root keys and for nodes whose settings are all known."""
    node, _, name = key.rpartition(".")
    if node not in ("", "trainer", "optimizer", "pretrain"):
        return True
    return key in _settings_beside(key) or (not node and name in (*KNOBS, "resume"))


def _settings_beside(key: str) -> list[str]:
    """Return the keys of all settings in the node of a key."""
    node = key.rpartition(".")[0]
    names = (name for schema in NODES[node] for name in parts.hints(schema))
    return [f"{node}.{name}" if node else name for name in names]


def shipped_option(group: str, node: Any, own: Path | None = None) -> tuple[str, DictConfig] | None:
    """Return name and settings of the option of a group that has the classes of `node`, or None.

    Args:
        group: `model`, or a group whose options have one class, as `task`.
        node: What a configuration holds for that group.
        own: A folder of the user's, whose options count too.
    """
    found: list[tuple[str, DictConfig]] = []
    keys_of = ("network._target_", "tokenizer._target_") if group == "model" else ("_target_",)
    for path in files(group, own):
        option = _read_option(path, path.stat().st_mtime_ns).copy()
        option = option.get("task", option) if group == "task" else option
        classes = [OmegaConf.select(option, key) for key in keys_of]
        if OmegaConf.is_config(node) and classes == [OmegaConf.select(node, key) for key in keys_of]:
            option.pop("defaults", None)
            found.append((path.stem, option))
    # several models have the same classes and differ in where their weights are
    same = [pair for pair in found if pair[1].get("path") == node.get("path")]
    return next(iter(same + found), None)


@lru_cache(maxsize=256)
def _read_option(path: Path, changed: int) -> DictConfig:
    """Return an option as its file stands; `changed` is when the file last changed."""
    return load_saved(path) or OmegaConf.create()


def task_of_run(argv: Sequence[str]) -> str | None:
    """Return `task=...` for the runs that `run=` names; None if one is chosen, or the runs differ."""
    given = dict(line.lstrip("+").partition("=")[::2] for line in argv if not line.startswith("-"))
    if "task" in given or not given.get("run"):
        return None
    found, own = set(), folder_of_user(argv)
    plain = unquote(given["run"])
    for run in given["run"].split(",") if plain == given["run"] else [plain]:
        cfg = load_saved(Path(unquote(run)) / "config.yaml")
        option = None if cfg is None else shipped_option("task", cfg.get("task"), own)
        found.add(option and option[0])
    name = found.pop() if len(found) == 1 else None
    return None if name is None else f"task={name}"


def make_paths_absolute(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with absolute local paths, so that a run can go on from another directory.

    These are a folder of published weights (model.path) and a file of preference pairs (preferences.path).
    """
    if cfg.get("preferences") is not None:
        cfg = cfg.copy()
        cfg.preferences.path = str(Path(cfg.preferences.path).absolute())
    path = None if "model" not in cfg else cfg.model.get("path")
    if path is not None and Path(path).is_dir():
        cfg = cfg.copy()
        cfg.model.path = str(Path(path).absolute())
    return cfg
