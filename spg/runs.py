"""Runs on disk: starting one, going on with one, and one job of a multirun.

A run's directory holds its resolved config.yaml from the start; what went on in it is in status.json.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.config import CONF_DIR, ConfigError
from spg.errors import InputError, Interrupted, RunError
from spg.files import write_text
from spg.ranks import rank
from spg.status import LEFT_ALONE, STOPPING, InUseError, at_work, read_status, write_status

log = logging.getLogger(__name__)

# what a run may go on with in another way: the last three change rounding at most
CHANGEABLE = (
    "trainer.max_updates",
    "trainer.checkpoint_every",
    "trainer.keep_every",
    "trainer.samples_every",
    "trainer.threads",
    "trainer.micro_batch_size",
    "trainer.eval_batch_size",
)


class OtherRunError(ConfigError):
    """A directory holds another run than the one that is to go on in it."""


def identity(cfg: DictConfig) -> dict[str, str]:
    """Return the settings, by dotted keys, that must stay what they are while a run lasts."""
    leaves: dict[str, str] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                walk(child, f"{key}.{name}" if key else str(name))
        elif key not in (*CHANGEABLE, "resume") and not key.startswith("logger."):
            leaves[key] = str(node)

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return leaves


def start(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Start a run in `folder`; raises ConfigError where that holds one already."""
    if any((folder / name).exists() for name in ("metrics.csv", "checkpoints")):  # what could be lost
        raise ConfigError(
            f"{folder} holds a run already; go on with it (python -m spg.train resume={folder}), or give "
            "another hydra.run.dir"
        )
    with at_work(folder):
        _new(cfg, folder, overrides)
        _work(cfg, folder)


def resume(path: str, overrides: list[str]) -> None:
    """Go on with the run in the directory `path`, or from one of its checkpoints.

    Raises ConfigError where it is no run's, or where an override would change what was done already.
    """
    started = time.perf_counter()
    target = Path(path)
    folder = target.parent.parent if target.suffix == ".ckpt" else target
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"resume={path} is no run's directory: it has no config.yaml; give the directory that "
            "`python -m spg.train` printed, or a checkpoint in it"
        )
    cfg = read_config(folder)
    changed = _changed(cfg, overrides, folder)
    config.check(changed)
    checkpoint = target if target.suffix == ".ckpt" else None
    if rank() > 0:
        _train(changed, folder, started, checkpoint)
        return
    with at_work(folder):
        if read_status(folder).get("state") == "finished" and checkpoint is None and changed == cfg:
            raise ConfigError(
                f"resume={path}: this run is finished; train on with a higher trainer.max_updates than "
                f"{cfg.trainer.max_updates}"
            )
        _log_to(folder)
        swept = (folder.parent / "sweep.json").is_file()
        _work(changed, folder, checkpoint, overrides, folder.parent.name if swept else None)


def sweep_job(cfg: DictConfig, folder: Path, overrides: list[str], values: Mapping[str, Any]) -> None:
    """Do one job of a multirun: start it, go on with it, or leave it where it is finished.

    A failure is written to the job's status.json and error.txt, and the multirun goes on. A directory that
    is in use, or holds another run, is not touched. When the user stops one job, no other starts: joblib
    would kill those at work if this one raised. values: what the multirun's keys are in this job.
    """
    stopping = folder.parent / STOPPING
    if stopping.exists():
        return
    try:
        with at_work(folder):
            config.check(cfg)
            fresh = not (folder / "config.yaml").exists()
            if fresh:
                _new(cfg, folder, overrides)
            before = read_config(folder)
            _same(identity(before), identity(cfg), folder)
            finished = read_status(folder).get("state") == "finished"
            if finished and cfg.trainer.max_updates <= before.trainer.max_updates:
                log.info("Finished already: %s", folder)
                return
            if not fresh:
                write_config(cfg, folder)
            write_status(folder, overrides=dict(values))
            if _work(cfg, folder, group=folder.parent.name):
                stopping.touch()
            (folder / "error.txt").unlink(missing_ok=True)  # of a failure before
    except (Interrupted, KeyboardInterrupt) as stop:
        log.info("%s: %s", folder.name, stop or "stopped")
        stopping.touch()
    except (InUseError, OtherRunError) as error:
        log.error("%s left alone: %s", folder.name, error)
        with (folder.parent / LEFT_ALONE).open("a", encoding="utf-8") as file:
            file.write(f"{folder.name}: {error}\n")
    except (RunError, InputError) as error:
        log.error("%s failed: %s", folder.name, error)
        _note_failure(folder, values, str(error))
    except Exception as error:  # noqa: BLE001  # whatever it is, the other jobs go on, and it is told
        log.error("%s failed: %r (%s)", folder.name, error, folder / "error.txt")
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        _note_failure(folder, values, f"{type(error).__name__}: {error}")


def _note_failure(folder: Path, values: Mapping[str, Any], text: str) -> None:
    if read_status(folder).get("state") != "finished":  # a finished run stays what it is
        write_status(folder, state="failed", error=text.splitlines()[0], overrides=dict(values))


def read_config(folder: Path) -> DictConfig:
    """Return the configuration of the run in `folder`."""
    cfg = OmegaConf.load(folder / "config.yaml")
    if not isinstance(cfg, DictConfig) or "trainer" not in cfg:
        raise ConfigError(f"{folder / 'config.yaml'} is no run's configuration")
    return cfg


def _new(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    # unread knobs are told by interpolations, which what is written has no more
    write_status(folder, state="running", unused_knobs=config.unread_knobs(cfg))
    write_config(cfg, folder)
    for line in config.notes(cfg, overrides):
        log.warning(line)


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write the run's configuration, resolved, to `<folder>/config.yaml`, whole or not at all."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def _changed(cfg: DictConfig, overrides: list[str], folder: Path) -> DictConfig:
    """Return the run's configuration with what may change changed; raises ConfigError for the rest."""
    changed = cfg.copy()
    for line in overrides:
        key, _, value = line.partition("=")
        if key not in (*config.keys(cfg), "logger"):
            guess = config.nearest(key, [*CHANGEABLE, "logger"])
            raise ConfigError(
                f"{line}: beside resume=... only these are taken: {', '.join(CHANGEABLE)}, logger"
                + (f"; nearest: {guess}" if guess else "")
            )
        if key == "logger" and (CONF_DIR / "logger" / f"{value}.yaml").is_file():
            changed.logger = OmegaConf.load(CONF_DIR / "logger" / f"{value}.yaml")
            continue
        old = OmegaConf.select(cfg, key) if config.is_known(cfg, key) else None
        new = OmegaConf.create(f"x: {value}").x
        if key in CHANGEABLE:
            OmegaConf.update(changed, key, new)
        elif old != new:
            raise ConfigError(
                f"{line}: a run goes on with its own settings ({key}={old} in {folder / 'config.yaml'}); "
                f"allowed: {', '.join(CHANGEABLE)}, logger; start a new run for others"
            )
    return changed


def _same(before: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise OtherRunError(
                f"{folder} holds a run with {key}={before.get(key, 'nothing')}, not "
                f"{now.get(key, 'nothing')}; give another hydra.sweep.dir, or remove it"
            )


def _log_to(folder: Path) -> None:
    """Log as Hydra sets it up for a run that starts: to the terminal and to train.log."""
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def _work(
    cfg: DictConfig,
    folder: Path,
    checkpoint: Path | None = None,
    changes: Sequence[str] = (),
    group: str | None = None,
) -> bool:
    """Train, and tell in the directory's status how it ended; return whether the user asked to stop.

    A finished run that did not get as far as training on stays finished.
    """
    started = time.perf_counter()
    try:
        asked = _train(cfg, folder, started, checkpoint, changes, group=group)
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        if read_status(folder).get("state") != "finished":
            text = (str(error) or type(error).__name__).splitlines()[0]
            write_status(folder, state="interrupted" if stopped else "failed", error=text)
        raise
    write_status(folder, state="finished", updates=cfg.trainer.max_updates)
    return asked


def _train(cfg: DictConfig, folder: Path, *rest: Any, group: str | None = None) -> bool:
    if cfg.trainer.devices > 1 or group is not None:
        # threads that wait spinning are fast alone and starve those of other processes on the same cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from spg.training import train

    return train(cfg, folder, *rest, group=group)
