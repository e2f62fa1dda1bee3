"""Stand-ins for SLURM's commands on this machine: sbatch, srun, sacct, scontrol and scancel.

`install` writes them to a folder that goes to the front of PATH. A job runs its script at once, with the
variables that SLURM sets; `srun` starts the tasks of a step as processes of this machine, on as many "nodes"
as are asked for. A job may be signalled, as SLURM does before the time limit, and be requeued.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "sacct", "scontrol", "scancel", "supervise")
# variable with the folder in which the stand-ins note their jobs
STATE = "STAND_IN_SLURM"
FLAGS = ("requeue", "exclusive", "overlap", "unbuffered")


def install(folder: Path) -> dict[str, str]:
    """Write the commands to `folder` and return the environment in which they are found first."""
    (folder / "jobs").mkdir(parents=True)
    for name in COMMANDS:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__)}" {name} "$@"\n')
        path.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return inherited | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", STATE: str(folder / "jobs")}


def jobs_in(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return what is noted of each job, by its number."""
    folder = Path(environment[STATE])
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def send(environment: dict[str, str], job: str, number: int) -> None:
    """Signal the steps of a job, as SLURM does for `--signal`, once there is one."""
    folder = Path(environment[STATE])
    while not (found := list(folder.glob(f"{job}.step*"))):
        time.sleep(0.05)
    for path in found:
        os.kill(int(path.read_text()), number)


def wait_for_all(environment: dict[str, str], seconds: float) -> dict[str, dict[str, Any]]:
    """Wait until no job runs any more and return what is noted of them."""
    deadline = time.monotonic() + seconds
    while any(job["State"] in ("RUNNING", "REQUEUED") for job in jobs_in(environment).values()):
        assert time.monotonic() < deadline, jobs_in(environment)
        time.sleep(0.2)
    return jobs_in(environment)


def end_all(environment: dict[str, str]) -> None:
    """End the jobs that a test has left behind."""
    folder = Path(environment[STATE])
    for job in jobs_in(environment).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(job["supervisor"], signal.SIGKILL)
    for path in folder.glob("*.step*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGINT)  # srun ends its tasks


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return options and what stands behind them."""
    options: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        options[name] = value if equals or name in FLAGS else rest.pop(0)
    return options, rest


def _state(job: str) -> Path:
    return Path(os.environ[STATE]) / f"{job}.json"


def _note(job: str, **changes: Any) -> None:
    path = _state(job)
    before = json.loads(path.read_text()) if path.exists() else {}
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(before | changes))
    os.replace(staged, path)


def sbatch(words: list[str]) -> int:
    """Start a script as a job, or as an array of jobs."""
    given, (script, *arguments) = _options(words)
    directives = re.findall(r"^#SBATCH (\S+)$", Path(script).read_text(), flags=re.MULTILINE)
    options = _options(directives)[0] | given
    number = int(time.time() * 10) % 10**8
    last = re.match(r"0-(\d+)", options.get("array", ""))
    for index in [None] if last is None else range(int(last[1]) + 1):
        job = str(number) if index is None else f"{number}_{index}"
        about = {
            "options": options,
            "script": script,
            "arguments": arguments,
            "index": index,
            "cwd": os.getcwd(),
        }
        _note(job, JobID=job, State="RUNNING", raw=number + (index or 0), array=number, **about)
        supervisor = subprocess.Popen(
            ["supervise", job], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _note(job, supervisor=supervisor.pid)
    _say(f"Submitted batch job {number}")
    return 0


def supervise(words: list[str]) -> int:
    """Run the script of a job to its end, and again if it is requeued meanwhile."""
    (job,) = words
    about = json.loads(_state(job).read_text())
    options, restarts = about["options"], 0
    nodes, per_node = (int(options.get(name, 1)) for name in ("nodes", "ntasks-per-node"))
    variables = {
        "SLURM_JOB_ID": str(about["raw"]),
        "SLURM_JOB_NAME": options.get("job-name", "job"),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    if "gpus-per-node" in options:
        variables["SLURM_GPUS_ON_NODE"] = options["gpus-per-node"]
    if about["index"] is not None:
        variables |= {"SLURM_ARRAY_JOB_ID": str(about["array"]), "SLURM_ARRAY_TASK_ID": str(about["index"])}
    output = Path(about["cwd"]) / _fill(options.get("output", "slurm-%j.out"), variables)
    inherited = dict(os.environ)
    if inherited.get("SBATCH_EXPORT") == "NONE":  # but Python must find what the checkout has
        kept = ("PATH", "PYTHONPATH", "HOME", STATE)
        inherited = {name: value for name, value in inherited.items() if name in kept}
    while True:
        variables["SLURM_RESTART_COUNT"] = str(restarts)
        with output.open("ab") as file:
            done = subprocess.run(
                ["bash", about["script"], *about["arguments"]],
                cwd=about["cwd"],
                env=inherited | variables,
                stdout=file,
                stderr=file,
                check=False,
            )
        if json.loads(_state(job).read_text())["State"] != "REQUEUED":
            break
        restarts += 1
        _note(job, State="RUNNING", restarts=restarts)
    _note(job, State="COMPLETED" if done.returncode == 0 else "FAILED", code=done.returncode)
    return 0


def _fill(pattern: str, variables: dict[str, str], task: int = 0) -> str:
    array = variables.get("SLURM_ARRAY_JOB_ID", variables["SLURM_JOB_ID"])
    values = {"%j": variables["SLURM_JOB_ID"], "%A": array, "%a": variables.get("SLURM_ARRAY_TASK_ID", "0")}
    for mark, value in (values | {"%t": str(task)}).items():
        pattern = pattern.replace(mark, value)
    return pattern


def _own_job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def srun(words: list[str]) -> int:
    """Start the tasks of a step, pass signals on to them, and end when all have ended."""
    options, command = _options(words)
    nodes = int(options.get("nodes", os.environ["SLURM_NNODES"]))
    per_node = int(options.get("ntasks-per-node", os.environ["SLURM_NTASKS_PER_NODE"]))
    size, tasks = nodes * per_node, []
    step = os.getpid()
    for number in range(size):
        variables = {
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(size),
            "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": str(per_node),
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number % per_node),
            "SLURM_NODEID": str(number // per_node),
        }
        streams = {}
        for name, stream in (("output", "stdout"), ("error", "stderr")):
            if name in options:
                path = Path(_fill(options[name], dict(os.environ), number))
                streams[stream] = path.open("ab")  # the task writes to it
        tasks.append(
            subprocess.Popen(command, env=os.environ | variables, start_new_session=True, **streams)  # type: ignore[call-overload]
        )

    def pass_on(number: int, frame: object) -> None:
        for task in tasks:
            if task.poll() is None:
                task.send_signal(number)

    for each in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(each, pass_on)
    noted = Path(os.environ[STATE]) / f"{_own_job()}.step{step}"
    noted.write_text(str(step))
    ended_early = False
    while any(task.poll() is None for task in tasks):
        time.sleep(0.1)
        if not ended_early and options.get("kill-on-bad-exit") == "1":
            ended_early = any(task.poll() not in (None, 0) for task in tasks)
            if ended_early:
                pass_on(signal.SIGTERM, None)
    noted.unlink()
    codes = [task.returncode for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def sacct(words: list[str]) -> int:
    """Write the states of all jobs."""
    _say("JobID|State|NodeList")
    for path in sorted(Path(os.environ[STATE]).glob("*.json")):
        about = json.loads(path.read_text())
        _say(f"{about['JobID']}|{about['State']}|localhost")
    return 0


def scontrol(words: list[str]) -> int:
    """Requeue a job, show its state, or list the hosts of a job."""
    if words[:2] == ["show", "hostnames"]:
        _say(words[2].replace(",", "\n"))
        return 0
    job = next(
        path.stem
        for path in Path(os.environ[STATE]).glob("*.json")
        if words[-1] in (path.stem, str(json.loads(path.read_text())["raw"]))
    )
    if words[0] == "requeue":
        _note(job, State="REQUEUED")
    else:
        _say(f"JobId={words[-1]} JobState={json.loads(_state(job).read_text())['State']}")
    return 0


def scancel(words: list[str]) -> int:
    """End the steps of jobs."""
    for job in words:
        for path in Path(os.environ[STATE]).glob(f"{job}.step*"):
            os.kill(int(path.read_text()), signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
