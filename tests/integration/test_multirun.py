"""Multiruns: names, side by side as one after the other, failures, kills, and the same command again."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from spg import config
from spg.cli.job_names import job_name
from spg.cli.train import resume, train
from spg.config import ConfigError
from spg.runs import directory as runs
from spg.runs import lifecycle
from spg.runs.jobs import LEFT_ALONE, train_job
from spg.runs.lifecycle import Run
from spg.runs.status import lock, read_status, write_status
from tests import warm
from tests.helpers import QUICK, ROOT, command, same_run

# a job of about a second: four updates, two checkpoints
TINY = (
    *QUICK,
    "mu=2",
    "task.eval_size=8",
    "trainer.max_updates=4",
    "trainer.checkpoint_every=2",
    "trainer.validate_every=2",
    "trainer.prompts_per_rollout=2",
    "trainer.samples_every=0",
)
GRID = ("estimator=elbo,mixture", "seed=1,2")
JOBS = {
    f"estimator-{estimator}_seed-{seed}": {"estimator": estimator, "seed": seed}
    for estimator in ("elbo", "mixture")
    for seed in (1, 2)
}
SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml") if path.stem != "tiny_sudoku")
# prints what Hydra makes of a command line, a line a job, instead of training
ONLY_TOLD = (
    "from hydra.core.hydra_config import HydraConfig; from spg.cli import launch\n"
    "launch.run('config', lambda cfg: print('job:', *HydraConfig.get().overrides.task))\n"
)

Done = subprocess.CompletedProcess[str]


def call(line: list[str], folder: Path = ROOT) -> Done:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm.run(line, cwd=folder, env=environment)


def call_afresh(line: list[str], folder: Path = ROOT) -> Done:
    """Run a command in an interpreter that has imported nothing yet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def multirun(folder: Path, *lines: str, fault: str | None = None) -> Done:
    """Run a multirun of tiny jobs into `folder`, with one of tests.faults planted."""
    arguments = ["-m", *TINY, *lines, f"hydra.sweep.dir={folder}"]
    if fault is None:
        return call(command("train", *arguments))
    return call(command("tests.faults", fault, "spg.train", *arguments))


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return all files below `folder` but the logs, with the times of their last change and contents."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "train.log"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory of a multirun, one job after the other, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "serial"
    done = multirun(folder, *GRID)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_what_a_multirun_leaves_and_prints(serial: tuple[Path, str]) -> None:
    folder, text = serial
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(JOBS)
    for name, values in JOBS.items():
        status = read_status(folder / name)
        assert (status["state"], status["error"], status["updates"]) == ("finished", None, 4)
        assert status["overrides"] == values
    about = json.loads((folder / "sweep.json").read_text())
    assert about["swept"] == ["estimator", "seed"]
    assert about["command"] == shlex.join(
        ["python", "-m", "spg.train", "-m", *TINY, *GRID, f"hydra.sweep.dir={folder}"]
    )
    with (folder / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == list(JOBS)
    for row in rows:
        summary = json.loads((folder / row["job"] / "summary.json").read_text())
        assert float(row["accuracy.after"]) == summary["accuracy.after"]
        assert row["state"] == "finished"
    table = text[text.index("4 of 4 jobs finished") :]
    for estimator in ("elbo", "mixture"):
        for seed in "12":
            assert any(line.split()[:3] == ["finished", estimator, seed] for line in table.splitlines())
    assert f"Multirun: {folder}" in table


def test_a_jobs_directory_goes_back_on_the_command_line_as_it_is(serial: tuple[Path, str]) -> None:
    for name in JOBS:
        folder = serial[0] / name
        (override,) = OverridesParser.create().parse_overrides([f"run={folder}"])
        assert override.value() == str(folder)
        assert shlex.quote(str(folder)) == str(folder), "nor does a shell need quotes"
        with pytest.raises(ConfigError, match="this run is finished"):
            resume(str(folder), [])


@pytest.mark.long
def test_side_by_side_they_are_the_same_jobs_and_one_that_fails_stops_no_other(
    serial: tuple[Path, str], tmp_path: Path
) -> None:
    """In worker processes no fault can be planted: one job finds half a checkpoint."""
    folder = tmp_path / "parallel"
    broken = folder / "estimator-elbo_seed-2" / "checkpoints" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half a checkpoint")
    done = multirun(folder, *GRID, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of the multirun's 4 jobs did not finish" in done.stderr
    failed = read_status(folder / "estimator-elbo_seed-2")
    assert failed["state"] == "failed"
    assert "can't be read as a checkpoint" in failed["error"]
    assert f"estimator-elbo_seed-2 failed: {failed['error']}" in done.stdout
    others = [name for name in JOBS if name != "estimator-elbo_seed-2"]
    assert all(same_run(serial[0] / name, folder / name) for name in others)
    broken.unlink()
    cfg = config.compose("config", [*TINY, "estimator=elbo", "seed=2"])
    train_job(cfg, broken.parent.parent, [], JOBS["estimator-elbo_seed-2"], train)
    assert same_run(serial[0] / "estimator-elbo_seed-2", broken.parent.parent)


@pytest.mark.long
def test_one_job_fails_and_the_command_that_is_named_does_only_this_one(
    serial: tuple[Path, str], tmp_path: Path
) -> None:
    """The job of another command, finished before, does not make up for it."""
    shutil.copytree(serial[0] / "estimator-elbo_seed-1", tmp_path / "s" / "estimator-zero")
    done = multirun(tmp_path / "s", "estimator=mixture,elbo", fault="fails_where=mixture")
    elbo, mixture = tmp_path / "s" / "estimator-elbo", tmp_path / "s" / "estimator-mixture"
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 of 3 jobs finished" in done.stdout
    assert "1 of the multirun's 2 jobs did not finish" in done.stderr
    assert "estimator-mixture failed: ZeroDivisionError: planted" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "ZeroDivisionError: planted" in (mixture / "error.txt").read_text()
    assert read_status(elbo)["state"] == "finished", "it came after the one that failed"
    status = read_status(mixture)
    assert (status["state"], status["error"]) == ("failed", "ZeroDivisionError: planted")
    assert status["overrides"] == {"estimator": "mixture"}
    before = everything(elbo)
    told = done.stderr.partition("the same command again does these only: ")[2]
    assert told.strip() == json.loads((tmp_path / "s" / "sweep.json").read_text())["command"]
    again = call([sys.executable, *shlex.split(told)[1:]])
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"Finished already: {elbo}" in again.stdout
    assert f"Finished already: {mixture}" not in again.stdout
    assert everything(elbo) == before
    status = read_status(mixture)
    assert (status["state"], status["error"]) == ("finished", None)
    assert "3 of 3 jobs finished" in again.stdout


@pytest.mark.long
def test_a_killed_multirun_goes_on_with_the_same_command(serial: tuple[Path, str], tmp_path: Path) -> None:
    """A job writes four checkpoints: the second job dies after the first that it could go on from."""
    folder, lines = tmp_path / "killed", ("estimator=elbo", "seed=1,2")
    assert multirun(folder, *lines, fault="killed_while_saving=7").returncode == -9
    assert (folder / "seed-2" / "checkpoints" / "last.ckpt").is_file()
    assert read_status(folder / "seed-2")["state"] == "running"
    before = everything(folder / "seed-1")
    done = multirun(folder, *lines)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Going on after update 2 (last.ckpt)" in done.stdout
    assert everything(folder / "seed-1") == before
    for seed in (1, 2):
        assert same_run(serial[0] / f"estimator-elbo_seed-{seed}", folder / f"seed-{seed}")


@pytest.mark.long
def test_what_other_commands_left_undone_is_not_this_ones_failure(
    serial: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(serial[0], folder)
    (folder / "estimator-elbo_seed-9").mkdir()
    write_status(folder / "estimator-elbo_seed-9", state="failed", overrides={"estimator": "elbo", "seed": 9})
    done = multirun(folder, *GRID, "seed=2,1,2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 5 jobs finished" in done.stdout


@pytest.mark.long
def test_jobs_of_another_configuration_are_left_alone(serial: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(serial[0], folder)
    write_status(folder / "estimator-elbo_seed-1", state="interrupted")
    before = everything(folder)
    done = multirun(folder, *GRID, "mu=4")
    assert done.returncode == 1, done.stdout + done.stderr
    for name in JOBS:
        assert f"{folder / name} holds a run with mu=2, not 4; give another hydra.sweep.dir" in done.stdout
    assert "4 of the multirun's jobs were left alone" in done.stderr
    assert "the same command again" not in done.stderr, "it would not help"
    after = everything(folder)
    changed = {Path(path).name for path in after if after[path] != before.get(path)}
    assert changed == {"multirun.yaml", "runs.csv", LEFT_ALONE}, "Hydra's notes, ours, and the new state"
    done = multirun(folder, *GRID, "beta=3,4")
    assert done.returncode == 2
    assert f"{folder} holds another multirun (python -m spg.train -m " in done.stderr


def test_a_job_that_another_process_is_at_work_on_is_left_alone(tmp_path: Path) -> None:
    cfg = config.compose("config", [*TINY])
    with lock(tmp_path / "job"):
        write_status(tmp_path / "job", state="running")
        train_job(cfg, tmp_path / "job", [], {}, train)
    assert read_status(tmp_path / "job") == {"state": "running"}
    assert (tmp_path / LEFT_ALONE).read_text().startswith(f"job: {tmp_path / 'job'} is in use")


@pytest.mark.long
def test_more_updates_train_on(serial: tuple[Path, str], tmp_path: Path) -> None:
    """A finished job of two updates, asked for four, is the job that was asked for four at once."""
    lines, values = ["estimator=elbo", "seed=1"], {"estimator": "elbo", "seed": 1}
    for updates in (2, 4, 4):
        cfg = config.compose("config", [*TINY, *lines, f"trainer.max_updates={updates}"])
        train_job(cfg, tmp_path / "job", [], values, train)
        assert read_status(tmp_path / "job")["updates"] == updates
    assert same_run(serial[0] / "estimator-elbo_seed-1", tmp_path / "job")
    assert runs.read_config(tmp_path / "job").trainer.max_updates == 4


def test_a_job_that_is_resumed_by_itself_stays_in_its_group(serial: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(serial[0], tmp_path / "sweep")
    shutil.copytree(serial[0] / "estimator-elbo_seed-1", tmp_path / "single")
    groups: list[str | None] = []

    def note_group(run: Run) -> bool:
        groups.append(run.group)
        return False

    for folder in (tmp_path / "sweep" / "estimator-elbo_seed-1", tmp_path / "single"):
        lifecycle.resume(str(folder), ["trainer.max_updates=6"], note_group)
    assert groups == ["sweep", None]


@pytest.mark.long
def test_the_default_directory_is_the_commands_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def directory(*argv: str) -> str:
        plan = config.preflight("config", list(argv))
        assert plan is not None
        monkeypatch.setenv("SPG_SWEEP", plan.name)
        return str(config.sweep_folder("config", plan))

    first = directory("-m", "estimator=elbo,mixture", "seed=1,2")
    assert first.startswith("runs/sweep-estimator_seed-")
    assert directory("--multirun", *GRID) == first
    assert directory("-m", *GRID, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == first
    others = [
        directory("-m", *GRID, "mu=2"),
        directory("-m", "estimator=elbo,mixture", "seed=1,3"),
        directory("-m", "estimator=elbo,eubo", "seed=1,2"),
        directory("-m", "seed=1,2"),
    ]
    assert len({first, *others}) == 5
    assert directory("-m", "mu=2", *GRID) == others[0]
    assert directory("-m", *GRID, "hydra.sweep.dir=here") == "here"
    file = ("-cd", str(ROOT / "sweeps"), "-cn", "omega")
    assert directory(*file) == directory(*file, "hydra/launcher=joblib") == "runs/sweep-omega"
    assert directory(*file, "seed=4").startswith("runs/sweep-omega-")


ODD = [
    "1",
    "-1",
    "1e-4",
    "[1,2]",
    "[1,3]",
    "[12]",
    "'a b'",
    "a-b",
    "'a=b'",
    "a_b",
    "'a,b'",
    "null",
    "{a:1}",
    "/data/some.csv",
    "",
    "ö",
]


def test_names_of_odd_values_are_plain_and_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPG_SWEPT", json.dumps(["task.path", "estimator@positive", "model/lora"]))
    rest = ["seed=1", "estimator@positive=elbo"]
    names = [
        job_name([f"{plus}task.path={value}", *rest, f"model/lora={lora}"])
        for plus, lora in (("", "null"), ("++", "paper"))
        for value in ODD
    ]
    assert len(set(names)) == 2 * len(ODD)
    assert names[0] == "task.path-1_estimator.positive-elbo_model.lora-null"
    for name in names:
        assert shlex.quote(name) == name
        (override,) = OverridesParser.create().parse_overrides([f"resume=runs/{name}"])
        assert override.value() == f"runs/{name}"
    monkeypatch.setenv("SPG_SWEPT", "[]")
    assert job_name(["seed=1"]) == "job"


@pytest.mark.long
def test_keys_are_swept_under_the_names_they_are_given_by() -> None:
    def swept(*argv: str) -> tuple[str, ...]:
        plan = config.preflight("config", list(argv))
        assert plan is not None
        return plan.swept

    assert swept("-m", "estimator@positive=elbo,eubo", "seed=1,2") == ("estimator@positive", "seed")
    assert swept("-m", "++optimizer.lr=1e-4,2e-4", "hydra.verbose=true,false") == ("optimizer.lr",)
    assert swept("-m", "experiment=glob(*)", "seed=range(3)") == ("experiment", "seed")
    assert swept("-m", "beta=1,2", "seed=1,2", "beta=3") == ("seed",), "the last of several stands"
    with pytest.raises(ConfigError, match="names no value"):
        swept("-m", "task.format=glob(*)")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.long] if n in ("omega", "methods_countdown") else [])
        for n in SWEEPS
    ],
)
def test_sweeps_are_multiruns_of_valid_values_over_several_seeds(name: str) -> None:
    plan = config.preflight("config", ["-cd", str(ROOT / "sweeps"), "-cn", name])
    assert plan is not None
    assert plan.multirun
    several = {"beta": ("estimator", "beta", "seed")}
    several |= dict.fromkeys(("methods_sudoku", "methods_countdown"), ("algorithm", "seed"))
    expected = several.get(name, (name, "seed"))
    assert plan.swept == expected
    params = OmegaConf.load(ROOT / "sweeps" / f"{name}.yaml").hydra.sweeper.params
    sizes = {}
    for key, values in params.items():
        (override,) = OverridesParser.create().parse_overrides([f"{key}={values}"])
        sizes[key] = len(set(override.sweep_string_iterator()))
    assert sizes["seed"] >= 3
    assert min(sizes.values()) >= 2


def jobs_of(folder: Path, *argv: str) -> list[set[str]]:
    """Return the overrides of each job that a command line makes."""
    done = call([sys.executable, "-c", ONLY_TOLD, *argv], folder)
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob("sweep.json")), "only training leaves runs"
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("job: ")]


@pytest.mark.long
def test_the_command_line_takes_the_place_of_a_sweep_files_values(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "seed=4", "-cd", str(ROOT / "sweeps"), "-cn", "omega")
    assert jobs == [{f"omega={omega}", "seed=4"} for omega in ("0", "0.25", "0.5", "0.75", "1", "auto")]
    (tmp_path / "own.yaml").write_text(
        "defaults: [config, _self_]\n"
        "hydra:\n"
        "  mode: MULTIRUN\n"
        "  sweeper:\n"
        "    params: {trainer.max_updates: '2,4', estimator: 'elbo,eubo', seed: '1,2'}\n"
    )
    jobs = jobs_of(tmp_path, "-cd", str(tmp_path), "-cn", "own", "trainer.max_updates=8", "seed=3,4")
    assert jobs == [
        {"trainer.max_updates=8", f"estimator={estimator}", f"seed={seed}"}
        for estimator in ("elbo", "eubo")
        for seed in (3, 4)
    ]
    jobs = jobs_of(tmp_path, "-cd", str(tmp_path), "-cn", "own", "estimator@positive=eubo", "seed=3")
    assert len(jobs) == 4, "estimator and estimator@positive are two"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("omga=0.5", "nearest: omega"),
        ("omega=0,0.5,2", "omega=2: out of range; allowed: a number from 0 to 1"),
        ("estimator=elbo,mixtrue", "nearest: estimator=mixture"),
    ],
)
def test_a_mistake_beside_a_sweep_file_is_answered_without_torch(
    tmp_path: Path, line: str, words: str
) -> None:
    code = (
        f"import sys\ntry:\n    exec({ONLY_TOLD!r})\n"
        "finally:\n    assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    )
    sweeps = ("-cd", str(ROOT / "sweeps"), "-cn", "omega")
    done = call_afresh([sys.executable, "-c", code, *sweeps, line], tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_one_value_is_refused_before_any_job_starts(tmp_path: Path) -> None:
    done = multirun(tmp_path / "s", "estimator=elbo,mixtrue", "seed=1,2")
    assert done.returncode == 2, done.stderr
    assert "nearest: estimator=mixture" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_combination_that_is_out_of_range_fails_its_own_job(tmp_path: Path) -> None:
    """Each value alone is allowed, so that only the job can tell."""
    cfg = config.compose("config", list(QUICK))
    OmegaConf.update(cfg, "task.min_empty", 10)
    OmegaConf.update(cfg, "task.max_empty", 6)
    train_job(cfg, tmp_path / "sweep" / "job", [], {"task.min_empty": 10}, train)
    status = read_status(tmp_path / "sweep" / "job")
    assert status["state"] == "failed"
    assert "task.min_empty=10 is above task.max_empty=6" in status["error"]


@pytest.mark.long
def test_ctrl_c_under_joblib_saves_the_jobs_at_work_and_starts_no_other(tmp_path: Path) -> None:
    lines = ["-m", *QUICK, "seed=1,2,3", "trainer.max_updates=4000", "hydra/launcher=joblib"]
    lines += ["hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    process = subprocess.Popen(
        command("train", *lines),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "sweep").glob("*/checkpoints/last.ckpt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "stopped; the multirun goes on with the same command" in text
    states = {p.parent.name: json.loads(p.read_text())["state"] for p in tmp_path.glob("sweep/*/status.json")}
    assert states == {"seed-1": "interrupted", "seed-2": "interrupted"}
