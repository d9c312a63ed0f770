"""Nothing in; the versions and the hardware that a measurement was made with out."""

import importlib.metadata
import os
import platform
from pathlib import Path


def environment() -> dict[str, dict[str, str]]:
    packages = ("torch", "numpy", "zarr", "numcodecs", "transformers")
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "hardware": {"processor": processor, "cpus": str(os.cpu_count()), "system": platform.system()},
        "before": {"load": load},
    }


def listed(environment: dict[str, dict[str, str]]) -> str:
    return "\n".join(f"{k}: " + ", ".join(f"{a} {b}" for a, b in v.items()) for k, v in environment.items())
