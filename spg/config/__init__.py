"""Composing and checking the configuration, before torch is imported.

`preflight` composes and checks a command line in about a second; a mistake is answered with what was
given, what is allowed and the nearest right name, before a job starts.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from spg.core.errors import InputError
from spg.core.limits import (
    LIMITS,
    check_length_counted_once,
    check_omega_has_data,
    check_pair_of_completions,
    check_pairs,
    check_sums,
)

log = logging.getLogger(__name__)

_PACKAGED = Path(__file__).parent.parent / "conf"
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"

# root keys that parts interpolate; mu, group_size and seed are read by the training loop itself
KNOBS = ("beta", "omega", "block_size", "num_mc", "gen_length")

# groups of which none may be chosen
OPTIONAL = ("experiment", "model/lora", "tuned", "tuned/task", "tuned/method", "preferences")

OmegaConf.register_new_resolver("ceil_div", lambda a, b: -(-int(a) // int(b)), replace=True)


class ConfigError(InputError):
    """A mistake in what the user asked for; its text is all that the user needs to see."""


@dataclass(frozen=True)
class Plan:
    """What a command line asks for: one job, or a multirun over `swept` keys, whose values `jobs` hold."""

    arguments: tuple[str, ...]
    multirun: bool = False
    name: str = ""
    swept: tuple[str, ...] = ()
    jobs: tuple[tuple[str, ...], ...] = ()


def preflight(primary: str, argv: list[str]) -> Plan | None:
    """Check a command line; None if it only asked for help, which has then been given.

    Raises ConfigError.
    """
    args = get_args_parser().parse_args(argv)
    if args.help:
        from spg.config.help import show

        show(primary)
        return None
    if args.cfg or args.info or args.hydra_help:
        return Plan(tuple(argv))
    name = (args.config_name or primary).removesuffix(".yaml")
    with _searching(args.config_dir):
        overrides = _parse(args.overrides)
        _check_names(name, overrides)
        sweeper = _compose(name, [], with_hydra=True).hydra
        params = dict(sweeper.sweeper.params or {})
        multirun = args.multirun or str(sweeper.mode) == "RunMode.MULTIRUN"
        given = {_written(override) for override in overrides}
        # as Hydra does: what the command line gives takes the place of what a sweep's file says
        every = [*_parse([f"{k}={v}" for k, v in params.items() if k not in given]), *overrides]
        _check_names(name, every)
        for lines in _one_at_a_time(every, multirun):
            check(_compose(name, lines))
    last = {_written(o): o for o in every if not _is_hydra(o)}  # what Hydra takes of several
    values = {
        key: [f"{key}={value}" for value in o.sweep_string_iterator()]
        for key, o in last.items()
        if o.is_sweep_override()
    }
    asked = sorted(o.input_line or "" for o in overrides if not _is_hydra(o))
    digest = hashlib.sha256(" ".join(asked).encode()).hexdigest()[:8]
    title = name if args.config_name else "_".join(values) or "single"
    title = title if args.config_name and not asked else f"{title}-{digest}"
    title = re.sub(r"[^\w.-]", ".", title)
    return Plan(tuple(argv), multirun, title, tuple(values), tuple(itertools.product(*values.values())))


def sweep_folder(primary: str, plan: Plan) -> Path:
    """Return the directory of a plan's multirun, with the environment set that its name comes from."""
    args = get_args_parser().parse_args(list(plan.arguments))
    with _searching(args.config_dir):
        lines = [o.input_line or "" for o in _parse(args.overrides) if _is_hydra(o)]
        cfg = _compose((args.config_name or primary).removesuffix(".yaml"), lines, with_hydra=True)
    return Path(str(cfg.hydra.sweep.dir))


@contextmanager
def _searching(config_dir: str | None) -> Iterator[None]:
    """Let Hydra find the project's configurations and those of `config_dir` (-cd)."""
    search = create_config_search_path(str(CONF_DIR))
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is no directory")
        search.prepend("command-line", f"file://{folder}", "schema")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name="spg", config_search_path=search)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def group_choices(argv: list[str]) -> list[str]:
    """Write choices in Hydra's way: an option of a nested group with `/`, none of a group as `~group`."""
    found = []
    for line in argv:
        key, equals, value = line.partition("=")
        group = CONF_DIR.joinpath(*key.split("."))
        if equals and "." in key and group.is_dir() and not value.startswith("{"):
            line = f"{key.replace('.', '/')}={value}"
        if line in [f"{name}=null" for name in OPTIONAL]:
            line = f"~{line.removesuffix('=null')}"
        found.append(line)
    return found


def compose(primary: str, overrides: list[str]) -> DictConfig:
    """Compose and check a configuration; raises ConfigError."""
    with _searching(None):
        overrides = group_choices(overrides)
        _check_names(primary, _parse(overrides))
        cfg = _compose(primary, overrides)
    check(cfg)
    return cfg


def defaults(primary: str) -> DictConfig:
    """Return a configuration as it is without a command line, unchecked."""
    with _searching(None):
        return _compose(primary, [])


def _check_names(primary: str, overrides: list[Override]) -> None:
    """Raise ConfigError where a group, an option or a key does not exist."""
    for override in overrides:
        _check_group(override)
    # of several options the first one tells which keys there are
    chosen = [
        f"{(o.input_line or '').split('=', 1)[0]}={next(o.sweep_string_iterator())}"
        if o.is_sweep_override()
        else o.input_line or ""
        for o in overrides
        if _is_group(o)
    ]
    known = _compose(primary, chosen)
    for override in overrides:
        _check_key(override, known)


def _is_hydra(override: Override) -> bool:
    return override.key_or_group == "hydra" or override.key_or_group.startswith(("hydra.", "hydra/"))


def _written(override: Override) -> str:
    """Return the key as the command line has it: `estimator@positive` is another than `estimator`."""
    return override.get_key_element().lstrip("+~")


def _is_group(override: Override) -> bool:
    options = GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)
    return bool(options) and not override.is_delete()


def _parse(lines: list[str]) -> list[Override]:
    try:
        return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(lines)
    except HydraException as error:
        raise ConfigError(f"the command line can't be read: {str(error).splitlines()[0]}") from error


def _one_at_a_time(overrides: list[Override], multirun: bool) -> Iterator[list[str]]:
    """Yield command lines without sweeps that together hold every value that a sweep names."""
    values = []
    for override in overrides:
        if override.is_sweep_override():
            if not multirun:
                raise ConfigError(
                    f"{override.input_line} names several values; add --multirun for a run of each, or "
                    f"quote a text with commas: '{override.key_or_group}=\"...\"'"
                )
            head = override.input_line.split("=", 1)[0]
            values.append([f"{head}={value}" for value in override.sweep_string_iterator()])
            if not values[-1]:
                raise ConfigError(f"{override.input_line} names no value")
        else:
            values.append([override.input_line or ""])
    first = [options[0] for options in values]
    yield first
    for i, options in enumerate(values):
        for other in options[1:]:
            yield [*first[:i], other, *first[i + 1 :]]


def nearest(given: str, allowed: list[str]) -> str | None:
    """Return the allowed names that a mistyped one most likely meant, or None."""
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    if close:
        return close[0]
    ends = [name.rpartition(".")[2] for name in allowed]
    close_ends = difflib.get_close_matches(given.rpartition(".")[2], ends, n=1, cutoff=0.6)
    found = [name for name, end in zip(allowed, ends, strict=True) if end in close_ends]
    return " or ".join(found) or None


def _check_group(override: Override) -> None:
    """Raise ConfigError where an override chooses an option that its group does not have."""
    group = override.key_or_group
    if not _is_group(override) or group.startswith("hydra"):
        return
    options = sorted(GlobalHydra.instance().config_loader().get_group_options(group))
    chosen = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    for value in chosen:
        name = "null" if value is None else str(value)
        if name not in options:
            key = _written(override)
            guess = nearest(name, options)
            raise ConfigError(
                f"{key}={name}: {group} has no option {name!r}; allowed: {', '.join(options)}"
                + (f"; {key}=null can be chosen in a run of its own" if group in OPTIONAL else "")
                + (f"; nearest: {key}={guess}" if guess else "")
            )


def _compose(primary: str, lines: list[str], with_hydra: bool = False) -> DictConfig:
    try:
        return hydra.compose(primary, lines, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _check_key(override: Override, known: DictConfig) -> None:
    """Raise ConfigError where an override sets a key that no part reads, or removes one."""
    key = override.key_or_group
    if _is_hydra(override):
        return
    if override.is_delete() and key in OPTIONAL:
        return
    if override.is_delete():
        raise ConfigError(f"{override.input_line}: {key!r} can't be removed; set it to another value")
    if is_known(known, key) or GlobalHydra.instance().config_loader().get_group_options(key):
        return
    # a task's table of styles may be set, but is seldom what was meant
    allowed = [*(name for name in keys(known) if not name.startswith("styles.")), *groups()]
    guess = nearest(key, allowed)
    siblings = [name for name in allowed if name.rpartition(".")[0] == key.rpartition(".")[0]]
    raise ConfigError(
        f"{override.input_line}: there is no key {key!r}; allowed here: {', '.join(siblings or groups())}"
        + (f"; nearest: {guess}" if guess else "")
    )


def groups() -> list[str]:
    """Return the names of the config groups, nested ones as `model/lora`."""
    return sorted(str(path.relative_to(CONF_DIR)) for path in CONF_DIR.rglob("*") if path.is_dir())


def keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all leaves of a configuration, but for class names."""
    names: list[str] = []
    for key in map(str, cfg):
        node = cfg._get_node(key)
        if key.startswith("_"):
            continue
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            names += keys(node, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


def is_known(cfg: DictConfig, key: str) -> bool:
    """Return whether `key` names a leaf or a node of the configuration."""
    return any(name == key or name.startswith(f"{key}.") for name in keys(cfg))


def check(cfg: DictConfig) -> None:
    """Raise ConfigError where something must be given, or a number or choice is out of its limits."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{key} must be given: {key}=...; --help says what it is")
    for key in keys(cfg):
        name = key.rpartition(".")[2]
        if name not in LIMITS:
            continue
        try:
            value = OmegaConf.select(cfg, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if not LIMITS[name].allows(value):
            raise ConfigError(f"{key}={value}: out of range; allowed: {LIMITS[name].words}")
    if "trainer" in cfg and cfg.trainer.prompts_per_rollout % cfg.trainer.devices:
        raise ConfigError(
            f"trainer.prompts_per_rollout={cfg.trainer.prompts_per_rollout} can't be shared out among "
            f"trainer.devices={cfg.trainer.devices} processes; give a multiple of that number"
        )
    if "trainer" in cfg and cfg.trainer.devices > 1 and cfg.trainer.strategy == "auto":
        raise ConfigError(f"trainer.devices={cfg.trainer.devices} needs trainer=ddp")
    if "trainer" in cfg and cfg.trainer.strategy == "fsdp" and cfg.model.lora is not None:
        raise ConfigError(
            "trainer=fsdp shares out the weights that are trained, and an adapter trains few: give "
            "trainer=ddp, where each process holds the frozen weights whole, or model.lora=null"
        )
    if "task" in cfg and cfg.task.get("min_empty", 1) > cfg.task.get("max_empty", 16):
        raise ConfigError(
            f"task.min_empty={cfg.task.min_empty} is above task.max_empty={cfg.task.max_empty}; lower it"
        )
    if "task" in cfg:
        check_task(cfg)
    if "model" in cfg and cfg.get("run") is None:  # else the run's model decides
        check_model(cfg)
    if cfg.get("preferences") is not None:
        check_preferences(cfg)
    if "samples" in cfg and cfg.get("run") is None:  # else the run's way of decoding decides
        check_samples(cfg)
    if "algorithm" in cfg:
        try:
            check_method(cfg)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def check_task(cfg: DictConfig) -> None:
    """Raise ConfigError where a task was given settings of another one, as by an experiment made for that."""
    name, known = _task_settings(str(cfg.task.get("_target_")))
    others = [str(key) for key in cfg.task if name and key not in known]
    if others:
        raise ConfigError(
            f"task={name} has no setting {', '.join(others)}: the experiment or the option of tuned/task is "
            f"for another task; choose it for {name}, or leave out task={name}"
        )


@cache
def _task_settings(target: str) -> tuple[str, tuple[str, ...]]:
    """Return name and settings of the shipped task of a class, "" and none where there is no such task."""
    option = shipped("task", OmegaConf.create({"_target_": target}))
    return ("", ()) if option is None else (option[0], tuple(map(str, option[1])))


def check_model(cfg: DictConfig) -> None:
    """Raise ConfigError where a model's settings contradict each other."""
    model = cfg.model
    path, weights = model.get("path"), model.get("weights")
    if weights == "published" and path is None:
        raise ConfigError(
            "model.weights=published needs model.path, a folder or the name of a model on the hub; this "
            "model is not published: give model.path=..., or model.weights=random"
        )
    option = shipped("model", model) if weights == "random" and path is not None else None
    if option is not None and option[1].get("path") is None:
        raise ConfigError(
            f"model.path={path} would not be read: this model's weights are random; give "
            "model.weights=published too, or model.path=null"
        )
    if weights == "base" and path is not None:
        raise ConfigError(
            f"model.weights=base: base weights are made here, and this model is published ({path}); give "
            "model.weights=published, random or a safetensors file"
        )
    if model.get("quantization") is None:
        return
    if weights == "base":
        raise ConfigError(
            f"model.quantization={model.quantization} is for published models, not for base weights that are "
            "made here; give model.quantization=null"
        )
    if model.get("lora") is None:
        raise ConfigError(
            f"model.quantization={model.quantization} needs an adapter, for weights of 4 bits can't be "
            "trained; give model.lora=paper, or model.quantization=null"
        )
    for key in ("trainer.accelerator", "accelerator"):
        if OmegaConf.select(cfg, key) == "cpu":
            raise ConfigError(
                f"model.quantization={model.quantization} needs a CUDA device, not {key}=cpu; give "
                "model.quantization=null"
            )


def check_method(cfg: DictConfig) -> None:
    """Raise ValueError where a method's parts can't work together; their constructors would say so late."""
    objective, masking = cfg.algorithm.objective, cfg.masking
    kind = str(objective.get("_target_")).rpartition(".")[2]
    check_length_counted_once(cfg.algorithm.normalization, objective.get("length_weighting", False))
    adaptive = cfg.get("omega") == "auto" and "omega" not in unread_knobs(cfg)
    if kind in ("WD1", "ESPO", "DPO"):
        check_sums(cfg.algorithm.normalization, adaptive, kind)
    if kind == "DPO":
        check_pair_of_completions(cfg.group_size)
    strategy = str(masking.get("_target_")).rpartition(".")[2]
    if adaptive:
        check_omega_has_data(cfg.num_mc, cfg.mu, strategy != "Trajectory")
    pairs = "complementary" if strategy == "Complementary" else masking.get("draws")
    if pairs in ("antithetic", "complementary"):
        check_pairs(masking.num_mc, pairs)


def check_preferences(cfg: DictConfig) -> None:
    """Raise ConfigError where recorded pairs can't be learned from in the way that was chosen."""
    path = cfg.preferences.path
    if cfg.group_size != 2:
        raise ConfigError(
            f"group_size={cfg.group_size}, but preferences=pairs has two completions of each prompt; give "
            "group_size=2, which algorithm=vrpo does"
        )
    if not Path(path).is_file():
        raise ConfigError(
            f"preferences.path={path} is no file; give one with a pair a line, as `python -m spg.pairs` makes"
        )
    if cfg.masking.get("_target_") == "spg.algorithms.masking.Trajectory":
        raise ConfigError(
            "masking=trajectory follows the steps in which a completion was decoded, and recorded ones have "
            "none; give masking=random, or leave out preferences=pairs"
        )


def settle_paths(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with absolute local paths, so that a run goes on from another directory, too.

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


def check_samples(cfg: DictConfig) -> None:
    """Raise ConfigError where an evaluation would complete an example several times in the same way."""
    if cfg.samples > 1 and cfg.temperature == 0 and cfg.decoding.remasking != "random":
        raise ConfigError(
            f"samples={cfg.samples} with temperature=0 would be {cfg.samples} times the same completion; "
            "give temperature=0.9, decoding.remasking=random, or samples=1"
        )


def saved(path: Path) -> DictConfig | None:
    """Return the configuration that a run or an evaluation left at `path`, None where there is none."""
    try:
        cfg = OmegaConf.load(path)
    except (OSError, YAMLError):
        return None
    return cfg if isinstance(cfg, DictConfig) else None


def shipped(group: str, node: Any) -> tuple[str, DictConfig] | None:
    """Return name and settings of the shipped option of `task` or `model` that has the classes of `node`."""
    found: list[tuple[str, DictConfig]] = []
    keys_of = {"task": ("_target_",), "model": ("network._target_", "tokenizer._target_")}[group]
    for path in sorted((CONF_DIR / group).glob("*.yaml")):
        option = saved(path) or OmegaConf.create()
        option = option.task if group == "task" else option
        classes = [OmegaConf.select(option, key) for key in keys_of]
        if OmegaConf.is_config(node) and classes == [OmegaConf.select(node, key) for key in keys_of]:
            option.pop("defaults", None)
            found.append((path.stem, option))
    # several models are of the same classes, and differ in where their weights are
    same = [pair for pair in found if pair[1].get("path") == node.get("path")]
    return next(iter(same + found), None)


def task_of_run(argv: list[str]) -> str | None:
    """Return `task=...` for the runs that `run=` names; None where a task is chosen, or they have not one."""
    given = dict(line.lstrip("+").partition("=")[::2] for line in argv if not line.startswith("-"))
    if "task" in given or not given.get("run"):
        return None
    found = set()
    for run in given["run"].split(","):
        cfg = saved(Path(run.strip("'\"")) / "config.yaml")
        option = None if cfg is None else shipped("task", cfg.get("task"))
        found.add(option and option[0])
    name = found.pop() if len(found) == 1 else None
    return None if name is None else f"task={name}"


def unread_knobs(cfg: DictConfig) -> list[str]:
    """Return the root keys that no selected part of the configuration refers to.

    An estimator is a part where the objective refers to it: not every method has one.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    unread = unread_estimators(cfg)
    parts = str({key: value for key, value in raw.items() if key not in (*KNOBS, *unread)})
    return [knob for knob in KNOBS if knob in raw and f"${{{knob}}}" not in parts]


def unread_estimators(cfg: DictConfig) -> list[str]:
    """Return `estimator` and `positive`, each where the objective does not refer to it."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    objective = str(raw.get("algorithm", {}))
    return [name for name in ("estimator", "positive") if name in raw and f"${{{name}}}" not in objective]


def notes(cfg: DictConfig, overrides: list[str]) -> list[str]:
    """Return what a user should know about a valid configuration, a line each.

    overrides: the command line, to tell what was asked for from what stands by default.
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
            if key != group and not key.startswith(f"{name}."):
                continue
            lines.append(f"Warning: {line} is read by no selected part and changes nothing.")
    if "beta" in cfg and "beta" not in unread and cfg.beta < 1:
        lines.append(f"Note: with beta={cfg.beta}, below 1, the EUBO is no upper bound.")
    return lines


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a node of the configuration; a constructor's ValueError becomes a ConfigError."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise ConfigError(str(cause)) from error
        raise
