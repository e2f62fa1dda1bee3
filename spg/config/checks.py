"""The check of a composed configuration: each value alone, then what must fit together.

The rules between parts are in `spg.core.combinations`. What they need to know of a part is a fact that its
class declares (`spg.config.parts`), so that they hold for your own parts too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from spg.config.errors import ConfigError
from spg.config.names import nearest
from spg.config.saved import shipped_option
from spg.config.values import Node, check_values, nodes, part_at
from spg.core.combinations import (
    check_commit_rule,
    check_couples,
    check_group_size,
    check_length_counted_once,
    check_omega_has_data,
    check_pairs,
    check_sums,
)
from spg.core.process import place
from spg.core.rules import allows, words


def check(cfg: DictConfig) -> None:
    """Refuse a configuration in which something is missing, out of its range, or does not fit the rest.

    Raises:
        ConfigError: for the first mistake.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{key} must be given: {key}=...; --help says what it is")
    if "task" in cfg:
        check_task(cfg)
    check_values(cfg)
    _check_order(cfg)
    if "trainer" in cfg:
        check_trainer(cfg)
    if "model" in cfg and cfg.get("run") is None:  # else the run's model decides
        check_model(cfg)
    if "decoding" in cfg:
        check_decoding(cfg)
    if cfg.get("preferences") is not None:
        check_preferences(cfg)
    if "samples" in cfg and cfg.get("run") is None:  # else the run's decoding decides
        check_samples(cfg)
    if "algorithm" in cfg:
        try:
            check_method(cfg)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def check_task(cfg: DictConfig) -> None:
    """Refuse settings of another task, which an experiment made for that task brings along.

    Raises:
        ConfigError: for such settings, and for a `parser` that the task does not have.
    """
    part = part_at("task", str(cfg.task.get("_target_")))
    if part is None or part.open:
        return
    known = part.parameters or {}
    others = [key for key in map(str, cfg.task) if not key.startswith("_") and key not in known]
    option = shipped_option("task", cfg.task)
    name = part.name if option is None else option[0]
    # one key that is nearly right is a slip in the file of the task itself
    if others and (len(others) > 1 or nearest(others[0], list(known)) is None or option is not None):
        raise ConfigError(
            f"task={name} has no setting {', '.join(others)}: the experiment or the option of tuned/task is "
            f"for another task; choose it for {name}, or leave out task={name}"
        )
    rule, parser = part.rule("parser"), cfg.get("parser")
    if parser is not None and cfg.get("run") is None and rule is not None and not allows(rule, parser):
        raise ConfigError(f"parser={parser}: out of range; allowed: {words(rule)}")


def _check_order(cfg: DictConfig) -> None:
    """Refuse a lower limit above its upper one, for parameters that a class declares as `ordered`."""
    for node in nodes(cfg):
        for low, high in node.fact("ordered", ()):
            below, above = node.get(low), node.get(high)
            if below is not None and above is not None and below > above:
                raise ConfigError(
                    f"{node.key}.{low}={below} is above {node.key}.{high}={above}; lower it, or raise "
                    f"{node.key}.{high}"
                )


def check_files(cfg: DictConfig) -> None:
    """Refuse paths that do not exist, for the parameters of parts that a class declares as `files`.

    A run or an evaluation that goes on is not checked: its data may be elsewhere now, and not be needed.

    Raises:
        ConfigError: for the first such path.
    """
    for node in nodes(cfg):
        for name, *words_allowed in node.fact("files", ()):
            value = node.get(name)
            if value is None or value in words_allowed or Path(str(value)).exists():
                continue
            also = "".join(f", or {node.key}.{name}={word}" for word in words_allowed)
            raise ConfigError(
                f"{node.key}.{name}={value}: this file or folder does not exist "
                f"({Path(str(value)).absolute()}); give one that exists{also}"
            )


def check_trainer(cfg: DictConfig) -> None:
    """Refuse numbers of processes and prompts that do not fit together; raises ConfigError."""
    trainer = cfg.trainer
    nodes = trainer.get("nodes", 1)
    count = nodes * trainer.devices
    given = f"trainer.nodes={nodes} times " if nodes > 1 else ""
    given += f"trainer.devices={trainer.devices}"
    if trainer.prompts_per_rollout % count:
        raise ConfigError(
            f"trainer.prompts_per_rollout={trainer.prompts_per_rollout} can't be shared out among "
            f"{given} processes; give a multiple of {count}"
        )
    if count > 1 and trainer.strategy == "auto" and "hardware" not in cfg:  # a plan takes ddp
        raise ConfigError(f"{given} needs trainer=ddp (trainer.strategy=ddp with resume=...)")
    if trainer.get("checkpoint_format") == "sharded" and trainer.strategy != "fsdp":
        raise ConfigError(
            "trainer.checkpoint_format=sharded is for weights in slices, and trainer.strategy="
            f"{trainer.strategy} has none; give trainer=fsdp, or trainer.checkpoint_format=whole"
        )
    if trainer.strategy == "fsdp" and cfg.model.get("lora") is not None:
        raise ConfigError(
            "trainer=fsdp shares out the weights that are trained, and an adapter trains few: give "
            "trainer=ddp, where each process holds the frozen weights whole, or model.lora=null"
        )


def check_launcher(cfg: DictConfig, multirun: bool = False) -> None:
    """Refuse a number of processes that the launcher of this process has not started.

    Args:
        cfg: Configuration of a run.
        multirun: Whether it is a job of a multirun.

    Raises:
        ConfigError: with the numbers, and how to start the run.
    """
    if "trainer" in cfg:
        nodes, own = cfg.trainer.get("nodes", 1), place()
        if multirun and (nodes > 1 or own.shared):
            what = f"trainer.nodes={nodes}" if nodes > 1 else f"{own.starter} started {own.size} processes"
            raise ConfigError(
                f"{what}, but a job of a multirun is one process that starts the others on its machine: give "
                "trainer.nodes=1 (and hydra.launcher.tasks_per_node=1), or start runs one by one"
            )
        complaint = own.complaint(nodes, cfg.trainer.devices)
        if complaint is not None:
            raise ConfigError(complaint)


def check_model(cfg: DictConfig) -> None:
    """Refuse settings of a model that contradict each other; raises ConfigError."""
    model = cfg.model
    path, weights = model.get("path"), model.get("weights")
    if weights == "published" and path is None:
        raise ConfigError(
            "model.weights=published needs model.path, a folder or the name of a model on the hub; this "
            "model is not published: give model.path=..., or model.weights=random"
        )
    option = shipped_option("model", model) if weights == "random" and path is not None else None
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
    if model.get("quantization") is not None:
        _check_quantization(cfg)


def _check_quantization(cfg: DictConfig) -> None:
    given = f"model.quantization={cfg.model.quantization}"
    if cfg.model.get("weights") == "base":
        raise ConfigError(
            f"{given} is for published models, not for base weights that are made here; give "
            "model.quantization=null"
        )
    if cfg.model.get("lora") is None:
        raise ConfigError(
            f"{given} needs an adapter, for weights of 4 bits can't be trained; give model.lora=paper, or "
            "model.quantization=null"
        )
    for key in ("trainer.accelerator", "accelerator"):
        if OmegaConf.select(cfg, key) == "cpu":
            raise ConfigError(f"{given} needs a CUDA device, not {key}=cpu; give model.quantization=null")


def check_method(cfg: DictConfig) -> None:
    """Refuse parts of a method that can't work together; their constructors would say so later.

    Raises:
        ValueError: for the first such parts.
    """
    objective = _node(cfg, "algorithm.objective")
    masking = _node(cfg, "masking")
    estimators = [node for node in _parts_below(cfg, "algorithm.objective") if "normalization" in node.cfg]
    adaptive = any(node.get("omega") == "auto" for node in estimators)
    # a method without an estimator has the setting all the same
    scales = [str(node.get("normalization")) for node in estimators or [_node(cfg, "algorithm")]]
    for scale in scales:
        check_length_counted_once(scale, bool(objective.get("length_weighting")))
        if objective.fact("needs_sums", False):
            check_sums(scale, adaptive, _name(objective))
    check_couples(objective.fact("couples", "batch"), _name(objective))
    completions = objective.fact("completions_per_prompt")
    if completions is not None:
        what = f"{_name(objective)} compares {completions} completions of each prompt"
        check_group_size(cfg.group_size, completions, what)
    if adaptive:
        fresh = masking.fact("fresh_each_update", True)
        check_omega_has_data(cfg.num_mc, cfg.mu, fresh, _option("masking", masking))
    pairs = _pairs(masking)
    if pairs is not None:
        check_pairs(masking.get("num_mc"), pairs)


def _node(cfg: DictConfig, key: str) -> Node:
    node = OmegaConf.select(cfg, key)
    assert isinstance(node, DictConfig)
    target = node.get("_target_")
    return Node(key, node, None if target is None else part_at(key, str(target)))


def _parts_below(cfg: DictConfig, key: str) -> list[Node]:
    """Return the nodes below a key, those that interpolations name too."""
    node = OmegaConf.select(cfg, key)
    found = []
    for name in map(str, node):
        child = node[name]
        if isinstance(child, DictConfig):
            inner = f"{key}.{name}"
            found += [_node(cfg, inner), *_parts_below(cfg, inner)]
    return found


def _name(node: Node) -> str:
    return str(node.get("_target_")).rpartition(".")[2]


def _option(group: str, node: Node) -> str:
    """Return the name of a shipped option, or the name of a class of the user's."""
    option = shipped_option(group, node.cfg)
    return _name(node) if option is None else option[0]


def _pairs(masking: Node) -> str | None:
    """Return what the pairs that a masking draws are called, or None if it draws none."""
    declared = masking.fact("draws_in_pairs")
    if isinstance(declared, Mapping):
        found = (masking.get(key) for key, kinds in declared.items() if masking.get(key) in kinds)
        return next(map(str, found), None)
    return None if declared is None else str(declared)


def check_preferences(cfg: DictConfig) -> None:
    """Refuse recorded pairs that the other settings can't learn from; raises ConfigError."""
    path = cfg.preferences.path
    completions = _node(cfg, "preferences").fact("completions_per_prompt")
    if completions is not None and cfg.group_size != completions:
        raise ConfigError(
            f"group_size={cfg.group_size}, but preferences=pairs has {completions} completions of each "
            f"prompt; give group_size={completions}, which algorithm=vrpo does"
        )
    if not Path(path).is_file():
        raise ConfigError(
            f"preferences.path={path} is not a file; give one with a pair on each line, as "
            "`python -m spg.pairs` makes"
        )
    masking = _node(cfg, "masking")
    if masking.fact("needs_commit_steps", False):
        name = _option("masking", masking)
        raise ConfigError(
            f"masking={name} follows the steps in which a completion was decoded, and recorded ones have "
            "none; give masking=random, or leave out preferences=pairs"
        )


def check_decoding(cfg: DictConfig) -> None:
    """Refuse rules of a decoder that exclude each other; raises ConfigError."""
    decoding = cfg.decoding
    try:
        check_commit_rule(str(decoding.get("remasking")), decoding.get("threshold"), decoding.get("factor"))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_samples(cfg: DictConfig) -> None:
    """Refuse an evaluation that would complete an example several times alike; raises ConfigError."""
    if cfg.samples > 1 and cfg.temperature == 0 and cfg.decoding.get("remasking") != "random":
        raise ConfigError(
            f"samples={cfg.samples} with temperature=0 would be {cfg.samples} times the same completion; "
            "give temperature=0.9, decoding.remasking=random, or samples=1"
        )
