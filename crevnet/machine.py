"""What a run is trained on and with, besides its configuration: what its time and its memory depend on."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__)


def trained_on(device: torch.device, processes: int) -> dict[str, Any]:
    """PyTorch's version, the device, CPU threads of a process, processes, and the commit.

    Args:
        device: Of this process.
        processes: How many there are.
    """
    cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "commit": commit(_HERE),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or failing that its architecture."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def commit(file: Path) -> str | None:
    """The commit that a file is of, with `-dirty` behind it where its checkout has changes; None outside a checkout.

    A package that is installed within a checkout of something else is of no commit.
    """
    # Without optional locks the index is left alone.
    git = ("git", "-C", str(file.parent), "--no-optional-locks")
    try:
        subprocess.run([*git, "cat-file", "-e", f"HEAD:./{file.name}"], capture_output=True, check=True)
        found = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(found, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
