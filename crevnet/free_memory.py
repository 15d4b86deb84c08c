"""How much memory a training may take on its device."""

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be taken: of the GPU's memory, or of the machine's and the control groups' of this process.

    Args:
        device: A CUDA device or a CPU.
        root: Where `/proc` and `/sys` are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_machine(root), *_control_groups(root)]))


def _machine(root: Path) -> int:
    """What the kernel can give without swapping; where it does not say, all the memory there is."""
    try:
        entries = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_groups(root: Path) -> list[int]:
    """What is left below the limit of every control group that this process is in, of either version."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left: list[int] = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:
            top, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.strip("/")
        # In a container the path may be that of the host, which is not there: then the top is this process's group.
        for folder in (group, *group.parents):
            left += _left(folder, limit, usage, cache)
            if folder == top:
                break
    return left


def _left(folder: Path, limit: str, usage: str, cache: str) -> list[int]:
    """The limit less what is used, without the files that the kernel keeps as long as nobody wants the memory."""
    try:
        texts = [(folder / name).read_text() for name in (limit, usage, "memory.stat")]
        statistics = dict(line.split() for line in texts[2].splitlines())
        return [int(texts[0]) - int(texts[1]) + int(statistics.get(cache, 0))]
    except (OSError, ValueError):  # no such group, or "max": no limit
        return []
