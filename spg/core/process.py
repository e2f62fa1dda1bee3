"""Which process of a run this is, and who started it.

The answer comes from the environment, so that it needs neither torch nor a process group. There are three
cases. A process is *alone*: a run on one machine starts its other processes itself, and these count as alone
too. Or torchrun has started it. Or it is a task of a SLURM step with several tasks (`srun`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spg.core.commands import command_line
from spg.core.errors import InputError

# set for every process of a run that starts its processes itself, except for the first one
RANK = "SPG_RANK"
# names that a shell on a node of the cluster gives to its job; no step with tasks of a run has them
_SHELLS = ("bash", "interactive")


@dataclass(frozen=True)
class Place:
    """A process among those that its launcher has started.

    Attributes:
        launcher: Who started it; `alone` if it is the only one, or if the run's first process did.
        rank: Its number among all, from 0.
        size: How many the launcher has started; 1 if the run starts its processes itself.
        local_rank: Its number on its node, from 0.
        nodes: Number of nodes; None if the launcher does not say.
        per_node: Processes on each node; None if the launcher does not say, or if nodes differ.
        address: Host of the first process.
        token: Text that the processes of one start have in common, and those of no other start.
    """

    launcher: Literal["alone", "torchrun", "slurm"] = "alone"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: int | None = 1
    per_node: int | None = 1
    address: str = "127.0.0.1"
    token: str = ""

    @property
    def shared(self) -> bool:
        """Whether a launcher has started several processes for one run."""
        return self.launcher != "alone" and self.size > 1

    @property
    def starter(self) -> str:
        """The program that started the process."""
        return {"alone": "python", "torchrun": "torchrun", "slurm": "srun"}[self.launcher]

    def command(self, *arguments: str) -> str:
        """Return the command that trains with these arguments, started as this process was."""
        alone = command_line("train", *arguments)
        if self.launcher == "torchrun":
            return f"torchrun <options as before> {alone.removeprefix('python ')}"
        return alone if self.launcher == "alone" else f"srun <options as before> {alone}"

    def complaint(self, nodes: int, devices: int) -> str | None:
        """Return what is wrong with this start for a run of `nodes` times `devices` processes, if anything.

        Args:
            nodes: Nodes that the run is configured for.
            devices: Processes on each of them.
        """
        asked = f"trainer.nodes={nodes} and trainer.devices={devices} make {nodes * devices}"
        if self.launcher == "alone":
            return None if nodes == 1 else _ask_for_launcher(asked, nodes, devices)
        same = self.nodes in (None, nodes) and self.per_node in (None, devices)
        if same and self.size == nodes * devices:
            return None
        name, torchrun = self.starter, self.launcher == "torchrun"
        started = "process" if torchrun else "task"
        if self.size > 1:
            started += "es" if torchrun else "s"
        options = ("--nnodes", "--nproc-per-node") if torchrun else ("--nodes", "--ntasks-per-node")
        found = f"{name} started {self.size} {started}"
        found += "" if self.nodes is None else f" on {self.nodes} node{'s' if self.nodes > 1 else ''}"
        own_nodes = self.nodes or 1
        own = f"trainer.nodes={own_nodes} trainer.devices={self.size // own_nodes}"
        part = "trainer=ddp " if self.size > 1 and nodes * devices == 1 else ""
        return (
            f"{found}, but {asked}; give {part}{own}, or start {name} with "
            f"{options[0]}={nodes} {options[1]}={devices}"
        )


def _ask_for_launcher(asked: str, nodes: int, devices: int) -> str:
    """Return the message for a run on several nodes that no launcher has started."""
    torchrun = (
        f"torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d "
        "--rdzv-endpoint=<first node>:29400 -m spg.train ... on each node"
    )
    slurm = f"srun python -m spg.train ..., in a job with --nodes={nodes} --ntasks-per-node={devices}"
    first, other = (slurm, torchrun) if "SLURM_JOB_ID" in os.environ else (torchrun, slurm)
    return f"{asked}, and a run on several nodes needs a launcher: {first} (or {other})"


def find_place(environ: Mapping[str, str]) -> Place:
    """Return the place of a process with these environment variables.

    Raises:
        InputError: if another launcher started it as one of several.
    """
    if RANK in environ:  # first: such a process has inherited the variables of the shell
        number = int(environ[RANK])
        return Place(rank=number, local_rank=number)
    if "TORCHELASTIC_RUN_ID" in environ:
        return _under_torchrun(environ)
    if _is_task(environ):
        return _under_slurm(environ)
    return Place()


def check_launcher(environ: Mapping[str, str]) -> None:
    """Refuse a launcher that is not known here; a run would start once for each of its processes.

    Raises:
        InputError: if the variables say that such a launcher started this process as one of several.
    """
    place = find_place(environ)
    if place.launcher != "alone" or place.rank > 0:
        return
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        number = environ.get(name, "1")
        if number.isdigit() and int(number) > 1 and "SLURM_JOB_ID" not in environ:
            raise InputError(
                f"a launcher that is not known here started this process as one of {number} ({name}); "
                "start a run with torchrun or srun, or alone: python -m spg.train trainer.devices=..."
            )


def _under_torchrun(environ: Mapping[str, str]) -> Place:
    size = int(environ["WORLD_SIZE"])
    local = int(environ.get("LOCAL_WORLD_SIZE", size))
    nodes = int(environ.get("GROUP_WORLD_SIZE", -(-size // local)))
    # without the number of the restart, which torchrun counts differently on the node where a process died
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return Place(
        "torchrun",
        rank=int(environ["RANK"]),
        size=size,
        local_rank=int(environ["LOCAL_RANK"]),
        nodes=nodes,
        per_node=local if local * nodes == size else None,
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        token="/".join(["torchrun", *(environ.get(name, "") for name in names)]),
    )


def _is_task(environ: Mapping[str, str]) -> bool:
    """Return whether a process is a task of a SLURM step with several tasks.

    The script of a batch job has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but it is no step. A job of
    submitit's is a step with one task, which starts its processes itself.
    """
    if "SLURM_STEP_ID" not in environ or environ.get("SLURM_JOB_NAME") in _SHELLS:
        return False
    return "SLURM_PROCID" in environ and _tasks(environ) > 1


def _tasks(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)


def _under_slurm(environ: Mapping[str, str]) -> Place:
    size = _tasks(environ)
    nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1"
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    number = None if nodes is None else int(nodes)
    return Place(
        "slurm",
        rank=int(environ["SLURM_PROCID"]),
        size=size,
        local_rank=int(environ.get("SLURM_LOCALID", 0)),
        nodes=number,
        per_node=size // number if number and size % number == 0 else None,
        address=environ.get("MASTER_ADDR") or first_host(hosts),
        token="/".join(["slurm", *(environ.get(name, "") for name in names)]),
    )


def first_host(hosts: str) -> str:
    """Return the first host of a SLURM list, for example gpu03 for `gpu[03-05,9],cpu1`."""
    head = re.split(r"[, ](?![^\[]*\])", hosts, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def place() -> Place:
    """Return the place of this process."""
    return find_place(os.environ)


def rank() -> int:
    """Return the number of this process in its run, 0 for the first or only one."""
    return place().rank
