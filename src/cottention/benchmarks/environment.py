"""What a figure was measured on: without it, it means nothing.

describe_environment("cpu")["processor"]
"""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import cottention
from cottention.errors import SettingsError
from cottention.files import usable_cores
from cottention.ops.native import binding

_PACKAGES = ("torch", "triton", "flash-linear-attention", "pytorch-fast-transformers")


def check_clock(device: str, processor_time: bool) -> None:
    """Refuse to count the processor's time where it is not that of the call.

    Raises:
        SettingsError: several threads run, whose times would be added up, or the work is done by a GPU.
    """
    if processor_time and (device != "cpu" or torch.get_num_threads() != 1):
        raise SettingsError(
            f"processor_time needs one thread on a CPU (OMP_NUM_THREADS=1); got {torch.get_num_threads()} on {device}"
        )


def machine_line(environment: dict[str, Any], settings: dict[str, Any]) -> str:
    """The processor, how it was used and the clock, from the JSON of a report."""
    threads = environment["threads"]
    clock = ", processor time" if settings.get("processor_time") else ""
    where = f"{environment['processor']} ({environment['instruction_set']})"
    return f"{where}, {threads} thread{'' if threads == 1 else 's'}{clock}"


def describe_environment(device: str) -> dict[str, object]:
    """The machine, the versions, and how busy the machine is."""
    described: dict[str, object] = {
        "device": device,
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cottention": cottention.__version__,
        "native": _native(),
        "packages": {name: version for name in _PACKAGES if (version := _version_of(name))},
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        described["gpu"] = properties.name
        described["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["cuda"] = torch.version.cuda
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _native() -> dict[str, str] | None:
    """Which build of the native library, and how it runs; None when there is none."""
    if not binding.is_available():
        return None
    digest = hashlib.sha256(Path(binding.loaded_library()._name).read_bytes()).hexdigest()[:12]
    return {"instruction_set": binding.instruction_set(), "sha256": digest}


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
