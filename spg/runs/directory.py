"""Runs on disk: starting one, going on with one, and one job of a multirun.

A run's directory holds its resolved config.yaml from the start; what went on in it is in status.json.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spg import __version__, config
from spg.config import CONF_DIR, ConfigError
from spg.core.errors import InputError, Interrupted, RunError
from spg.core.files import write_text
from spg.models import hub
from spg.runs.status import LEFT_ALONE, STOPPING, InUseError, at_work, read_status, write_status
from spg.training.launching import rank

log = logging.getLogger(__name__)

# what a run may go on with in another way: the last three change rounding at most, and the dropout's noise
CHANGEABLE = (
    "trainer.max_updates",
    "trainer.checkpoint_every",
    "trainer.keep_every",
    "trainer.samples_every",
    "trainer.threads",
    "trainer.micro_batch_size",
    "trainer.eval_batch_size",
    "logger",
)
LIBRARIES = ("torch", "lightning", "hydra-core", "omegaconf", "transformers", "peft")


class OtherRunError(ConfigError):
    """A directory holds another run than the one that is to go on in it."""


def identity(cfg: DictConfig, changeable: Sequence[str] = CHANGEABLE) -> dict[str, str]:
    """Return the settings, by dotted keys, that must stay what they are while a run lasts."""
    free = (*changeable, "resume")
    leaves: dict[str, str] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                walk(child, f"{key}.{name}" if key else str(name))
        elif key not in free and key.partition(".")[0] not in free:
            leaves[key] = str(node)

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return leaves


def start(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Start a run in `folder`; raises ConfigError where that holds one already, or an evaluation."""
    if (folder / "generations.jsonl").exists():
        raise ConfigError(f"{folder} holds an evaluation; give another hydra.run.dir")
    if any((folder / name).exists() for name in ("metrics.csv", "checkpoints")):  # what could be lost
        raise ConfigError(
            f"{folder} holds a run already; go on with it (python -m spg.train resume={folder}), or give "
            "another hydra.run.dir"
        )
    with at_work(folder):
        cfg = hub.settle(cfg)
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
    changed_cfg = changed(cfg, overrides, folder)
    config.check(changed_cfg)
    checkpoint = target if target.suffix == ".ckpt" else None
    if rank() > 0:
        _train(changed_cfg, folder, started, checkpoint)
        logging.shutdown()
        # gloo's threads may abort an ordinary exit, which the first process would take for a death
        os._exit(0)
    with at_work(folder):
        if read_status(folder).get("state") == "finished" and checkpoint is None and changed_cfg == cfg:
            raise ConfigError(
                f"resume={path}: this run is finished; train on with a higher trainer.max_updates than "
                f"{cfg.trainer.max_updates}"
            )
        log_to(folder / "train.log")
        swept = (folder.parent / "sweep.json").is_file()
        _work(changed_cfg, folder, checkpoint, overrides, folder.parent.name if swept else None)


def sweep_job(cfg: DictConfig, folder: Path, overrides: list[str], values: Mapping[str, Any]) -> None:
    """Do one training run of a multirun: start it, go on with it, or leave it where it is finished.

    values: what the multirun's keys are in this job.
    """

    def work() -> bool:
        config.check(cfg)
        own = hub.settle(cfg)
        fresh = not (folder / "config.yaml").exists()
        if fresh:
            _new(own, folder, overrides)
        before = read_config(folder)
        same(identity(before), identity(own), folder)
        finished = read_status(folder).get("state") == "finished"
        if finished and own.trainer.max_updates <= before.trainer.max_updates:
            log.info("Finished already: %s", folder)
            return False
        if not fresh:
            write_config(own, folder)
        write_status(folder, overrides=dict(values))
        return _work(own, folder, group=folder.parent.name)

    one_of_many(folder, values, work)


def one_of_many(folder: Path, values: Mapping[str, Any], work: Callable[[], bool]) -> None:
    """Do one job of a multirun in `folder`; `work` returns whether the user asked to stop meanwhile.

    A failure is written to the job's status.json and error.txt, and the multirun goes on. A directory that
    is in use, or holds another run, is not touched. When the user stops one job, no other starts: joblib
    would kill those at work if this one raised. values: what the multirun's keys are in this job.
    """
    stopping = folder.parent / STOPPING
    if stopping.exists():
        return
    try:
        with at_work(folder):
            if work():
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


def holds_run(folder: Path) -> bool:
    """Return whether `folder` holds a training run, or a configuration that is no evaluation's."""
    if any((folder / name).exists() for name in ("metrics.csv", "checkpoints", "weights.safetensors")):
        return True
    path = folder / "config.yaml"
    return path.exists() and "generations" not in (config.saved(path) or ())


def of_this_version(path: str) -> DictConfig:
    """Return the configuration of the run in the directory `path` as this version would have written it.

    What an older one had no setting for yet gets its default. Raises ConfigError where there is no run, and
    where one of its settings is no more.
    """
    cfg = config.saved(Path(path) / "config.yaml")
    if cfg is None or "trainer" not in cfg:
        raise ConfigError(
            f"run={path} is no run's directory: it has no config.yaml of one; give the directory that "
            "`python -m spg.train` printed at its end"
        )
    other = f"run={path} is of another version of this project"
    remedy = "evaluate it with that version, which its summary.json names (git_commit)"
    parts = ("gen_length", "block_size", "decoding", "task", "model", "pretrain")
    missing = [key for key in parts if key not in cfg]
    if missing:
        raise ConfigError(f"{other}: its config.yaml has no {', '.join(missing)}; {remedy}")
    if cfg.task.get("reward") == "cells":  # its name until 0.2
        cfg.task.reward = "released"
    if "precision" not in cfg.model and "precision" in cfg.trainer:  # where it was until 0.3
        cfg.model.precision = cfg.trainer.precision
    for part in ("task", "model"):
        option = config.shipped(part, cfg[part])
        if option is None:  # one of the user's own
            continue
        unknown = [f"{part}.{key}" for key in cfg[part] if key not in option[1]]
        if unknown:
            raise ConfigError(f"{other}: there is no setting {', '.join(unknown)} any more; {remedy}")
        for key in option[1]:
            if key not in cfg[part]:
                cfg[part][key] = option[1][key]
    try:
        config.check(OmegaConf.create({key: cfg[key] for key in parts}))
    except ConfigError as error:
        raise ConfigError(f"{other}: {error}; {remedy}") from error
    return cfg


def read_config(folder: Path) -> DictConfig:
    """Return the configuration of the run in `folder`."""
    cfg = OmegaConf.load(folder / "config.yaml")
    if not isinstance(cfg, DictConfig) or "trainer" not in cfg:
        raise ConfigError(f"{folder / 'config.yaml'} is no run's configuration")
    return cfg


def _new(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    # unread knobs are told by interpolations, which what is written has no more
    write_status(folder, state="running", unused_knobs=config.unread_knobs(cfg), arguments=list(overrides))
    write_config(cfg, folder)
    for line in config.notes(cfg, overrides):
        log.warning(line)


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write the run's configuration, resolved, to `<folder>/config.yaml`, whole or not at all."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def changed(
    cfg: DictConfig, overrides: list[str], folder: Path, changeable: Sequence[str] = CHANGEABLE
) -> DictConfig:
    """Return a configuration with what may change changed; raises ConfigError for the rest."""
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


def same(before: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Raise OtherRunError where two identities differ."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise OtherRunError(
                f"{folder} holds a run with {key}={before.get(key, 'nothing')}, not "
                f"{now.get(key, 'nothing')}; give another hydra.sweep.dir, or remove it"
            )


def log_to(file: Path) -> None:
    """Log as Hydra sets it up for a run that starts: to the terminal and to `file`."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


@contextmanager
def told_in_status(folder: Path) -> Iterator[None]:
    """Tell in the directory's status how what a `with` block does ended, if it did not end well.

    A finished run that did not get as far as going on stays finished.
    """
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        if read_status(folder).get("state") != "finished":
            text = (str(error) or type(error).__name__).splitlines()[0]
            write_status(folder, state="interrupted" if stopped else "failed", error=text)
        raise


def _work(
    cfg: DictConfig,
    folder: Path,
    checkpoint: Path | None = None,
    changes: Sequence[str] = (),
    group: str | None = None,
) -> bool:
    """Train, and tell in the directory's status how it ended; return whether the user asked to stop."""
    started = time.perf_counter()
    with told_in_status(folder):
        asked = _train(cfg, folder, started, checkpoint, changes, group=group)
    write_status(folder, state="finished", updates=cfg.trainer.max_updates)
    return asked


def _train(cfg: DictConfig, folder: Path, *rest: Any, group: str | None = None) -> bool:
    if cfg.trainer.devices > 1 or group is not None:
        # threads that wait spinning are fast alone and starve those of other processes on the same cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from spg.training.run import train

    return train(cfg, folder, *rest, group=group)


def fingerprint(path: Path) -> list[int]:
    """Return what tells whether a file, or the largest of a folder, is still the same: its size and time."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    about = max((file.stat() for file in files), key=lambda stat: stat.st_size)
    return [about.st_size, about.st_mtime_ns]


def versions() -> dict[str, str]:
    """Return the versions of this project, Python and the libraries that numbers depend on."""
    own = {"spg": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in LIBRARIES}


def git_commit() -> str | None:
    """Return the commit of the source tree, with `+` where it is changed; None outside a checkout."""
    where = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(where), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()
