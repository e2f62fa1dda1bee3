"""`python -m spg.evaluate`: complete and score held-out examples with a model, a run, or from a file."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from spg import config
from spg.cli import base_weights, launch
from spg.cli.job_names import swept_values
from spg.config import ConfigError
from spg.core.errors import Interrupted, RunError
from spg.evaluation.results import report
from spg.evaluation.sources import fingerprints
from spg.models import hub
from spg.runs import directory as runs
from spg.runs.identity import OtherRunError, apply_changes, check_same, identity
from spg.runs.jobs import run_job
from spg.runs.status import lock, read_status, record_failure, write_status

log = logging.getLogger(__name__)

# what an evaluation may go on with in another way; both change rounding at most
CHANGEABLE = ("eval_batch_size", "threads")
# what says how completions are made, and nothing where they are made already
OF_COMPLETING = (
    "run",
    "adapter",
    "select",
    "split",
    "samples",
    "model",
    "pretrain",
    "decoding",
    "block_size",
    "gen_length",
    "temperature",
    "seed",
    "accelerator",
)


def job(cfg: DictConfig) -> None:
    """Evaluate as configured and leave a folder with config.yaml, generations.jsonl and results.json."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    # a task that the command line did not choose is the run's own, with the run's settings
    overrides = [line for line in hydra_cfg.overrides.task if line != os.environ.get("SPG_RUN_TASK")]
    if hydra_cfg.mode == RunMode.MULTIRUN:
        values = swept_values(cfg)
        run_job(folder, values, lambda: sweep_job(settings(cfg, overrides), folder, values))
    else:
        start(settings(cfg, overrides), folder)


def start(cfg: DictConfig, folder: Path) -> None:
    """Start an evaluation in `folder`; raises ConfigError where that holds one already, or a run."""
    if (folder / "generations.jsonl").exists():
        raise ConfigError(
            f"{folder} holds an evaluation already; go on with it (python -m spg.evaluate resume={folder}), "
            "or give another hydra.run.dir"
        )
    if runs.holds_run(folder):
        raise ConfigError(f"{folder} holds a training run; give another hydra.run.dir")
    with lock(folder):
        runs.write_config(cfg, folder)
        _work(cfg, folder)


def resume(path: str, overrides: list[str]) -> None:
    """Go on with the evaluation in the folder `path`; raises ConfigError where it is none, or finished."""
    folder = Path(path)
    cfg = config.saved(folder / "config.yaml")
    if cfg is None or "generations" not in cfg:
        raise ConfigError(
            f"resume={path} is no evaluation's directory; give the one that `python -m spg.evaluate` printed"
        )
    changed = apply_changes(cfg, overrides, folder, CHANGEABLE)
    config.check(changed)
    with lock(folder):
        if read_status(folder).get("state") == "finished":
            raise ConfigError(
                f"resume={path}: this evaluation is finished: {folder / 'results.json'}; to score its "
                f"completions anew: generations={folder / 'generations.jsonl'}"
            )
        runs.write_config(changed, folder)
        runs.log_to(folder / "evaluate.log")
        _work(changed, folder)


def sweep_job(cfg: DictConfig, folder: Path, values: dict[str, Any]) -> bool:
    """Do one job of a multirun, or what is left of it; never asks the others to stop."""
    before = config.saved(folder / "config.yaml")
    if before is not None:
        check_same(identity(before, CHANGEABLE), identity(cfg, CHANGEABLE), folder)
    status = read_status(folder)
    if status.get("state") == "finished":
        _same_files(status.get("made_with", {}), cfg, folder)
        log.info("Finished already: %s", folder)
        return False
    write_status(folder, overrides=values)
    runs.write_config(cfg, folder)
    _work(cfg, folder)
    return False


def _same_files(made_with: dict[str, Any], cfg: DictConfig, folder: Path) -> None:
    """Raise OtherRunError where the files that a finished evaluation's figures come from are others now."""
    before = {name: about for name, about in made_with.items() if name != "device"}
    now = fingerprints(cfg)
    others = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if others:
        raise OtherRunError(
            f"{folder} holds figures of {', '.join(others)} as it was before it changed; give another "
            "hydra.sweep.dir, or remove it"
        )


def _work(cfg: DictConfig, folder: Path) -> None:
    """Evaluate, and tell in the folder's status how it ended; Ctrl-C and SIGTERM say how to go on."""
    again = f"python -m spg.evaluate resume={folder}"
    write_status(folder, state="running", error=None)
    with record_failure(folder), _stopping(f"stopped; what was completed is saved; go on with: {again}"):
        from spg.evaluation.run import evaluate

        try:
            evaluate(cfg, folder, base_weights.ensure)
        except RunError as error:
            raise RunError(f"{error}\nGo on with: {again}") from error
    write_status(folder, state="finished")


@contextmanager
def _stopping(words: str) -> Iterator[None]:
    """Raise Interrupted, with `words`, at Ctrl-C and SIGTERM, where this thread may take signals over."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(words)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settings(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the whole configuration of an evaluation: a run's parts in place, split and parser settled.

    Raises ConfigError where settings contradict each other.
    """
    config.check(cfg)
    given = _keys(overrides)
    if cfg.generations is not None:
        for key in given:
            if key.partition(".")[0] in OF_COMPLETING:
                raise ConfigError(
                    f"{key}={_value(cfg, key)} can't be given with generations=..., whose file says what was "
                    "completed; leave one of the two out"
                )
    if "decoding.temperature" in given:
        raise ConfigError(
            f"decoding.temperature={cfg.decoding.temperature} is that of rollouts in training; an evaluation "
            f"has its own: temperature={cfg.decoding.temperature}"
        )
    if cfg.adapter is not None and cfg.run is not None:
        raise ConfigError(
            f"adapter={cfg.adapter} and run={cfg.run} can't be given together: a run's adapter is "
            "evaluated with it; leave one of the two out"
        )
    merged = cfg.copy() if cfg.run is None else of_run(cfg, overrides)
    if cfg.adapter is not None:
        OmegaConf.set_struct(merged, False)
        merged.model.lora = of_folder(Path(cfg.adapter))
        for key in (key for key in given if key == "model.lora" or key.startswith("model.lora.")):
            log.warning("%s is not read: the folder adapter=%s has its own numbers", key, cfg.adapter)
    if cfg.split == "auto" and cfg.generations is None:
        # a checkpoint that the validation half chose is tested on the other half
        by_validation = cfg.run is not None and cfg.select == "validation"
        merged.split = "test" if by_validation else "heldout"
    if cfg.parser is not None:
        if "parser" not in merged.task:
            raise ConfigError(f"parser={cfg.parser}: this task has one parser only; leave it out")
        merged.task.parser = cfg.parser
    for key in ("run", "adapter", "generations"):  # so that it goes on from another directory, too
        if cfg[key] is not None:
            merged[key] = str(Path(cfg[key]).absolute())
    merged = hub.settle(merged)
    config.check(merged)
    config.check_model(merged)
    config.check_samples(merged)
    return merged


def of_folder(folder: Path) -> dict[str, str]:
    """Return the settings of the adapter in a PEFT folder; raises ConfigError where it is none of LoRA's."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        inner = folder / "adapter"
        remedy = (
            f"adapter={inner}" if (inner / path.name).is_file() else "the one that the run left, adapter/"
        )
        raise ConfigError(f"adapter={folder} is no PEFT folder: it has no adapter_config.json; give {remedy}")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} can't be read ({error}); give another adapter=...") from error
    if kind != "LORA":
        raise ConfigError(f"{path}: an adapter of kind {kind} can't be evaluated; only LORA can")
    return {"_target_": "spg.models.lora.SavedLoRA", "folder": str(folder.absolute())}


def _keys(overrides: list[str]) -> list[str]:
    """Return the dotted keys and the groups that a command line sets."""
    return [line.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".") for line in overrides]


def _value(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return "..." if OmegaConf.is_config(value) else value


def of_run(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return `cfg` with the model, task and decoding of the run `cfg.run`, unless overridden.

    With another task, its own lengths and decoding hold; with another length, tokens a step stay the run's.
    Raises ConfigError where the directory holds no run.
    """
    trained = runs.read_updated_config(cfg.run)
    given = _keys(overrides)
    merged = cfg.copy()
    OmegaConf.set_struct(merged, False)
    merged.model = trained.model
    merged.pretrain = trained.pretrain
    parts = ["model"]
    if "task" not in given:
        parts += ["task", "decoding"]
        merged.task = trained.task
        for key in ("gen_length", "block_size"):
            merged[key] = cfg[key] if key in given else trained[key]
        merged.decoding = _stretched(cfg, trained, "decoding" in given, merged.gen_length, merged.block_size)
    for key in given:
        part = key.partition(".")[0]
        if part not in parts or key == "decoding":
            continue
        if part == "task" and key.removeprefix("task.") not in trained.task:
            raise ConfigError(
                f"{key}: the run's task has no such setting; it has {', '.join(config.keys(trained.task))}"
            )
        OmegaConf.update(merged, key, OmegaConf.select(cfg, key))
    for key in ("path", "revision"):  # a run's configuration is resolved: its tokenizer follows here
        if f"model.{key}" in given and trained.model.tokenizer.get(key) == trained.model.get(key):
            merged.model.tokenizer[key] = merged.model[key]
    return merged


def _stretched(
    cfg: DictConfig, trained: DictConfig, another: bool, gen_length: int, block_size: int
) -> dict[str, Any]:
    """Return the run's way of decoding, or `another` that was chosen, for these sizes.

    A run's configuration is resolved: what followed its lengths there follows the new ones here.
    """
    kind = cfg if another else trained
    decoding = OmegaConf.to_container(kind.decoding, resolve=True)
    assert isinstance(decoding, dict)
    if kind.decoding.block_size == kind.block_size:
        block = block_size
    elif kind.decoding.block_size == kind.gen_length:
        block = gen_length
    else:
        block = kind.decoding.block_size
    steps = -(-gen_length * trained.decoding.steps // trained.gen_length)
    return {str(k): v for k, v in decoding.items()} | {
        "gen_length": gen_length,
        "block_size": block,
        "steps": steps,
    }


def main() -> None:
    """Run the command."""
    launch.run("evaluate", job, resume, report)
