"""What a bug report should begin with: versions, devices, what attention may use."""

import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from tome_fx.families.registry import FAMILIES
from tome_fx.plan import __version__

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft")


def info() -> str:
    """A table for people to paste: versions, devices, the SDPA backends that are allowed, the models known."""
    from tabulate import tabulate  # only tables need it

    rows = [
        ("tome_fx", __version__),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        *((name, _version(name)) for name in PACKAGES),
        ("torch is built for", _built_for()),
        ("devices", "\n".join(_devices())),
        ("SDPA backends allowed", ", ".join(_sdpa_backends())),
        ("models", "\n".join(name for family in FAMILIES for name in family.NAMES)),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _built_for() -> str:
    found = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return ", ".join(f"{name} {number}" for name, number in found.items() if number) or "no CUDA, no ROCm"


def _devices() -> Iterator[str]:
    """What there is to compute on; ROCm's go by the name of CUDA."""
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield f"{found.name}, capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield f"MPS, {platform.processor()}"
    yield f"CPU, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def _sdpa_backends() -> Iterator[str]:
    switches: dict[str, Callable[[], bool]] = {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "math": torch.backends.cuda.math_sdp_enabled,
    }
    return (name for name, enabled in switches.items() if enabled())
