"""What to change in a run that does not fit, or that could do with less."""

from __future__ import annotations

from omegaconf import DictConfig

from spg.planning.hardware import GIB
from spg.planning.plan import Plan


def advise(plan: Plan, cfg: DictConfig) -> list[str]:
    """Return sentences that say what to change, each with the setting to give.

    Args:
        plan: What the run takes.
        cfg: Its configuration.
    """
    found = [_judge_static(plan, cfg), _judge_update(plan, cfg)]
    found += [_judge_rows(plan, cfg, name) for name in ("rollout", "evaluation")]
    return [sentence for sentence in found if sentence]


def _judge_static(plan: Plan, cfg: DictConfig) -> str:
    """Say what to do if weights and optimizer alone leave too little."""
    held, memory = plan.held, plan.hardware.memory
    always = held.always + held.gradients
    if always < 0.9 * memory:
        return ""
    words = f"weights, gradients and optimizer alone take {always / GIB:.1f} GiB"
    if cfg.model.lora is None:
        more = (
            "trainer=fsdp with more processes shares them out" if not held.slices else "more processes help"
        )
        return f"{words}: {more}; or train an adapter (model.lora=paper)"
    if cfg.model.get("quantization") is None and plan.hardware.device == "cuda":
        return f"{words}: model.quantization=nf4 keeps the frozen weights in a quarter of the memory"
    return f"{words}: this needs a device with more memory"


def _judge_update(plan: Plan, cfg: DictConfig) -> str:
    """Say how many masked sequences fit at once, and whether to recompute layers."""
    sizes, needed = plan.largest_micro_batch, _phase(plan, "update")
    all_of_them = plan.masked
    asked = min(plan.micro_batch_size or all_of_them, all_of_them)
    own = bool(cfg.model.get("checkpointing"))
    if needed <= plan.hardware.memory:
        if own and sizes.get(False, 0) >= asked:
            return "model.checkpointing=false fits too, and saves computing the layers twice"
        if asked < sizes.get(own, 0):
            largest = sizes[own]
            value = "null" if largest >= all_of_them else str(largest)
            return f"trainer.micro_batch_size={value} fits too: fewer, larger passes"
        return ""
    if sizes.get(False, 0) > 0 and not own:
        return f"the update does not fit: give trainer.micro_batch_size={sizes[False]} or less" + (
            f", or model.checkpointing=true with {sizes[True]} or less"
            if sizes.get(True, 0) > sizes[False]
            else ""
        )
    if sizes.get(True, 0) > 0:
        return (
            f"the update does not fit: give model.checkpointing=true trainer.micro_batch_size={sizes[True]}"
        )
    return "the update does not fit, not even one masked sequence at a time with model.checkpointing=true"


def _judge_rows(plan: Plan, cfg: DictConfig, name: str) -> str:
    """Say how to complete fewer sequences at once."""
    if _phase(plan, name) <= plan.hardware.memory:
        return ""
    if name == "evaluation":
        return (
            f"the evaluation does not fit: give trainer.eval_batch_size below {cfg.trainer.eval_batch_size}"
        )
    words = "fewer trainer.prompts_per_rollout, more trainer.devices (each completes fewer)"
    if cfg.decoding.cache != "none":
        words += f", or decoding.cache=none (the cache of {plan.sequences} sequences is held)"
    return f"the rollout of {plan.sequences} sequences does not fit: {words}"


def _phase(plan: Plan, name: str) -> float:
    return next(phase.bytes for phase in plan.phases if phase.name == name)
