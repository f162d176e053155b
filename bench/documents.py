"""What results are stored as: JSON that says what it was measured with and on."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

SCHEMAS = {"quality": 3, "latency": 2}  # of the kinds whose form has changed; others have 1


def new(kind: str, **content: Any) -> dict[str, Any]:
    """A document of its kind."""
    return {"schema": SCHEMAS.get(kind, 1), "kind": kind, **content}


def origin(device: str) -> dict[str, Any]:
    """The command line and the machine that a number is from."""
    return {"argv": sys.argv[1:], "machine": machine(device)}


def machine(device: str = "cuda") -> dict[str, Any]:
    """What a number was measured on and with; a GPU, if there is one, unless the device is the CPU."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    used = device.startswith("cuda") and torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(torch.device(device)) if used else None
    packages = ("torch", "diffusers", "tomesd")
    return {
        "cpu": cpu or platform.processor(),
        "cores": torch.get_num_threads(),
        "memory_gib": round(int(memory) / 2**20),
        "gpu": gpu and gpu.name,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": _output("git", "describe", "--always", "--dirty"),
    }


def read(path: Path) -> dict[str, Any]:
    """A document that `write` wrote."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON such that an interruption leaves the old file or the new one.

    Raises:
        ValueError: There is a NaN or an infinity in it, which JSON does not have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
