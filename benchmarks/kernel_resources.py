"""What the Triton compiler makes of every kernel, for GPUs that need not be there.

The operators run on CPU tensors, with a driver that says it is such a GPU: their launchers specialise and compile as
they would on one, and then nothing is launched. `python -m benchmarks.kernel_resources` prints what was found as JSON.
It must be a process of its own, as it changes Triton, and one without `TRITON_INTERPRET`, under which nothing is
compiled.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import iter_modules
from typing import Any
from unittest import mock

import revgrad_kernels
import torch
from revgrad_kernels import backend
from revgrad_kernels.backend import triton

from benchmarks.gpu.operators import ELEMENTS, OPERATORS, Inputs, Operator, backward, outputs, with_gradients
from benchmarks.launches import Launches

ROOT = Path(__file__).parents[1]
CAPABILITIES = (80, 90)
NEWEST = max(CAPABILITIES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 16
_WARP = 32
_DIGITS = 12
"""Of the hash that tells binaries apart."""


@dataclass(frozen=True)
class Launch:
    """A launch that did not happen."""

    kernel: Any
    constants: dict[str, Any]
    """Compile-time arguments and options such as `num_warps`."""
    bytes: int
    """Of the tensors it was given."""
    compiled: Any
    """None if it was only looked at."""


class Recorder:
    """Stands between the launchers and Triton.

    Args:
        capability: Of the GPU to compile for, 90 for instance; None compiles nothing.
        largest: Of the tuned configurations, take only the one with most elements per thread.
    """

    def __init__(self, capability: int | None = None, largest: bool = False) -> None:
        self._capability = capability
        self._largest = largest
        self.launches: list[Launch] = []

    @contextmanager
    def active(self) -> Iterator["Recorder"]:
        """Record what is launched meanwhile."""
        from triton.runtime import driver
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        compile_only, recorder = JITFunction.run, self

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compiled = None
            if recorder._capability is not None:
                compiled = compile_only(kernel, *args, grid=grid, warmup=True, **kwargs)
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            sizes = {(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}
            constants = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
            recorder.launches.append(Launch(kernel, constants, sum(sizes.values()), compiled))

        def launch_every(tuner: Any, *args: Any, **kwargs: Any) -> None:
            configurations = [c.all_kwargs() for c in tuner.configs]
            for configuration in [max(configurations, key=_elements)] if recorder._largest else configurations:
                tuner.fn.run(*args, **kwargs, **configuration)

        with (
            mock.patch.object(JITFunction, "run", launch),
            mock.patch.object(Autotuner, "run", launch_every),
            mock.patch.object(driver, "_active", _Pretended(self._capability or 0)),
            mock.patch.object(backend, "INTERPRETED", True),  # so that kernels are tried on CPU tensors
        ):
            yield self


class _Pretended:
    """A driver of one GPU, as far as compiling needs it."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, _WARP)

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


def measure(capability: int, operator: Operator, dtype: str, channels_last: bool, largest: bool) -> list[dict]:
    """A row for every kernel that an operator launches, forward and backward, in every configuration."""
    layout = {"channels_last": channels_last}
    compiled = _passes(operator, Inputs(BATCH, DTYPES[dtype], **layout), capability, largest)
    one, two = (_passes(operator, Inputs(n * BATCH, DTYPES[dtype], **layout), None, largest) for n in (1, 2))
    return [
        {
            "operator": operator.name,
            "pass": direction,
            "kernel": f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__name__}",
            "dtype": dtype,
            "layout": "channels-last" if channels_last else "contiguous",
            "target": f"sm_{capability}",
            "tile": launch.constants["TILE"],
            "warps": launch.constants["num_warps"],
            # A difference, so that tables of constant size are no bytes per element.
            "bytes_per_element": (more.bytes - less.bytes) / (BATCH * ELEMENTS),
            **resources(launch.compiled),
            "binary": launch.compiled.hash[:_DIGITS],
        }
        for direction in compiled
        for launch, less, more in zip(compiled[direction], one[direction], two[direction], strict=True)
    ]


def _passes(
    operator: Operator, made: Inputs, capability: int | None = None, largest: bool = False
) -> dict[str, list[Launch]]:
    """What an operator launches forward and backward."""
    with Recorder(capability, largest).active() as forward:
        leaves = operator.leaves(made)
        results = outputs(operator.fused(*leaves, backend="triton"))
    found = {"forward": forward.launches}
    if operator.differentiable:
        grads = [torch.randn_like(t) for t in with_gradients(results)]
        with Recorder(capability, largest).active() as back:
            backward(results, leaves, grads)
        found["backward"] = back.launches
    return found


def plain_bytes(operator: Operator, dtype: str) -> dict[str, float | None]:
    """Bytes per element that the operators read and write which plain PyTorch takes, forward and backward.

    None where PyTorch sees one operator only: exact arithmetic is differentiable as a whole.
    """
    counted = []
    for n in (1, 2):
        leaves = operator.leaves(Inputs(n * BATCH, DTYPES[dtype]))
        with Launches() as forward, torch.no_grad():
            operator.plain(*leaves)
        found = {"forward": forward.counts}
        if operator.differentiable:
            results = outputs(operator.plain(*leaves))
            grads = [torch.randn_like(t) for t in with_gradients(results)]
            with Launches() as back:
                backward(results, leaves, grads)
            found["backward"] = back.counts
        counted.append(found)
    return {
        name: None
        if any(key.startswith("revgrad::") for key in counts)
        else sum(counted[1][name][key].bytes - count.bytes for key, count in counts.items()) / (BATCH * ELEMENTS)
        for name, counts in counted[0].items()
    }


def resources(compiled: Any) -> dict[str, Any]:
    """What a compiled kernel takes of a GPU; accesses are bytes per instruction and thread."""
    return {
        **parse_usage(_usage(compiled.asm["cubin"])),
        "shared": compiled.metadata.shared,  # asked for at launch, so the binary does not say it
        "loads": access_widths(compiled.asm["ptx"], "ld"),
        "stores": access_widths(compiled.asm["ptx"], "st"),
    }


def parse_usage(text: str) -> dict[str, int]:
    """Registers and bytes of stack and local memory from what `cuobjdump -res-usage` prints; the most of any function.

    Raises:
        ValueError: No function in it.
    """
    found = [{k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)} for line in text.splitlines()]
    found = [usage for usage in found if usage]
    if not found:
        raise ValueError(f"cuobjdump names no function: {text!r}")
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    return {name: max(usage[key] for usage in found) for name, key in names.items()}


def access_widths(ptx: str, kind: str) -> list[int]:
    """Widths in bytes of a program's loads (`ld`) or stores (`st`) of global memory, each once, ascending."""
    widths = set()
    for suffixes in re.findall(rf"\b{kind}\.global((?:\.[\w:]+)+)", ptx):
        vector = re.search(r"\.v(\d)", suffixes)
        bits = re.search(r"\.[bsuf](\d+)", suffixes)
        widths.add(int(vector[1] if vector else 1) * int(bits[1]) // 8)
    return sorted(widths)


def kernels() -> dict[str, Any]:
    """All kernels of the package by name: compiled functions that no other compiled function calls."""
    from triton.runtime.jit import JITFunction

    modules = [import_module(f"{revgrad_kernels.__name__}.{m.name}") for m in iter_modules(revgrad_kernels.__path__)]
    compiled = {id(x): x for m in modules for x in vars(m).values() if isinstance(x, JITFunction)}.values()
    called = {id(f.fn.__globals__.get(name)) for f in compiled for name in f.fn.__code__.co_names}
    return {f"{f.fn.__module__}.{f.fn.__name__}": f for f in compiled if id(f) not in called}


def in_own_process(*arguments: str) -> dict[str, list]:
    """What this module prints, from a process in which Triton compiles.

    Raises:
        RuntimeError: It failed; with its output.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    command = [sys.executable, "-W", "ignore", "-m", __name__, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout)


@cache
def _cuobjdump() -> str:
    return triton.knobs.nvidia.cuobjdump.path


@cache
def _usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _elements(constants: dict[str, Any]) -> tuple[float, int]:
    """Elements of a tile per warp, and of a tile."""
    return constants["TILE"] / constants["num_warps"], constants["TILE"]


def main() -> None:
    """Print rows, kernels that no operator launched, and the versions of the compilers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--largest",
        action="store_true",
        help="only the configuration with most elements per thread; for the older GPU only contiguous float32",
    )
    largest = parser.parse_args().largest
    cases = [
        (capability, operator, dtype, channels_last)
        for capability, operator, dtype, channels_last in product(CAPABILITIES, OPERATORS, DTYPES, (False, True))
        if not largest or capability == NEWEST or (dtype == "float32" and not channels_last)
    ]
    rows = [row for case in cases for row in measure(*case, largest)]
    plain = [
        {"operator": o.name, "pass": name, "dtype": dtype, "bytes_per_element": found}
        for o in ([] if largest else OPERATORS)
        for dtype in DTYPES
        for name, found in plain_bytes(o, dtype).items()
    ]
    missing = sorted(kernels().keys() - {row["kernel"] for row in rows})
    print(json.dumps({"rows": rows, "plain": plain, "missing": missing, "triton": triton.__version__}))


if __name__ == "__main__":
    main()
