"""Builds and loads the two small libraries of the pretended device, before torch is imported.

This module needs no torch: the libraries have to be there when torch is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# in the order in which they are loaded, each with torch's library that comes after it
LIBRARIES = {"accelerator": "libtorch_cpu.so", "device": None}


# why no device is pretended in this process; None if one is
missing: str | None = "run these tests by themselves: pytest -m fake"


class NotBuiltError(Exception):
    """The device can't be pretended here; the message says why."""


def torch_folder() -> Path:
    """Return the folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(cache: Path) -> dict[str, Path]:
    """Compile the libraries, unless `cache` has them for these sources, this torch and this Python.

    Raises:
        NotBuiltError: if there is no compiler, torch is not the CPU build, or the sources do not compile.
    """
    version = importlib.metadata.version("torch")
    if sys.platform != "linux":
        raise NotBuiltError("a CUDA device can be pretended on Linux only")
    if "+cpu" not in version and (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        raise NotBuiltError(
            f"torch {version} has CUDA itself; a device is pretended with the CPU build alone"
        )
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NotBuiltError("there is no C++ compiler (g++, or CXX)")
    key = hashlib.blake2b(f"{version} {sys.version} {compiler}".encode(), digest_size=8)
    for name in LIBRARIES:
        key.update((HERE / f"{name}.cpp").read_bytes())
    folder = cache / key.hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _compile(compiler, HERE / f"{name}.cpp", folder / f"{name}.so") for name in LIBRARIES}


def _compile(compiler: str, source: Path, target: Path) -> Path:
    if target.exists():
        return target
    include = torch_folder() / "include"
    staged = target.with_name(f"{target.name}.{os.getpid()}")  # others may compile it at the same time
    line = [compiler, "-O0", "-std=c++20", "-fPIC", "-shared", str(source), "-o", str(staged)]
    line += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotBuiltError(f"{source.name} does not compile: {done.stderr[:2000]}")
    os.replace(staged, target)
    return target


def load(libraries: dict[str, Path]) -> None:
    """Load the libraries among those of torch.

    Raises:
        NotBuiltError: if torch is imported already.
    """
    if "torch" in sys.modules:
        raise NotBuiltError("torch is imported already; a device has to be pretended before")
    lib = torch_folder() / "lib"
    ctypes.CDLL(str(lib / "libc10.so"), mode=ctypes.RTLD_GLOBAL)
    for name, following in LIBRARIES.items():
        ctypes.CDLL(str(libraries[name]), mode=ctypes.RTLD_GLOBAL)
        if following is not None:
            ctypes.CDLL(str(lib / following), mode=ctypes.RTLD_GLOBAL)


def prepare(cache: Path) -> None:
    """Build and load the libraries; `missing` then says whether that was possible."""
    global missing
    try:
        load(build(cache))
    except NotBuiltError as error:
        missing = str(error)
    else:
        missing = None
