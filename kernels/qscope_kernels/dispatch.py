"""Which implementation of an operation runs: the one asked for, else the kernel of the device where it serves these
shapes, else the portable one. Decided while tracing, from the device that the arrays are on.

Should a kernel misbehave on some device, QSCOPE_IMPL=xla in the environment does without any, wherever none is named.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.core import Tracer


class Device(NamedTuple):
    """What a program is made for: "cpu", "gpu" or "tpu", the kind, such as "TPU v6 lite" or "NVIDIA H200", how many
    cores (of a GPU: streaming multiprocessors) one has, where that is known, and whether arrays are split over several
    by the compiler: it cannot split a kernel, which must stand inside `shard_map` there."""

    platform: str
    kind: str
    cores: int | None = None
    split: bool = False


class Kernel(NamedTuple):
    """An implementation for one platform. `unsuited` takes the device and then what `run` takes, and says in a few
    words why `run` cannot serve that; None where it can. One that is not `automatic` runs only where it is named: no
    measurement shows yet that it is the better choice."""

    platform: str
    run: Callable[..., Any]
    unsuited: Callable[..., str | None]
    automatic: bool = True


def deferred(platform: str, module: str, name: str, *, automatic: bool = True) -> Kernel:
    """The kernel `name` of a module, which is imported when a device of that platform asks: Pallas takes a while."""

    def called(function: str) -> Callable[..., Any]:
        return lambda *args, **options: getattr(importlib.import_module(module), function)(*args, **options)

    return Kernel(platform, called(name), called("unsuited"), automatic)


def device_of(*arrays: jax.Array) -> Device:
    """The device that arrays are on: that of their mesh, or where they were put; else, as for traced arrays that are on
    no mesh, the one that JAX uses by default (`jax.default_device`)."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    for device in (getattr(mesh, "abstract_device", None) for mesh in meshes):
        if device is not None:
            return Device(device.platform, device.device_kind, device.num_cores, any(map(_splits, meshes)))
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.committed:
            return _described(next(iter(array.devices())))
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return _described(default)


def _described(device: Any) -> Device:
    return Device(device.platform, device.device_kind, getattr(device, "core_count", None))


def _splits(mesh: Any) -> bool:
    """Whether a mesh has an axis of several devices that `shard_map` has not taken over."""
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(size > 1 and kind != jax.sharding.AxisType.Manual for kind, size in axes)


SPLIT = "it cannot be split over the devices of a mesh: call it inside shard_map, or the operation's sharded form"


def automatic(kernels: Mapping[str, Kernel], *arrays: jax.Array, **options: Any) -> str | None:
    """The name of the first automatic kernel that serves these arguments on their device; None where none does."""
    device = device_of(*arrays)
    for name, kernel in kernels.items():
        here = kernel.automatic and kernel.platform == device.platform
        if here and kernel.unsuited(device, *arrays, **options) is None:
            return name
    return None


def offered(impl: str | None, *tables: Mapping[str, Any]) -> str | None:
    """`impl` if one of an operation's tables has it, else None: for an operation whose gradient this is."""
    return impl if any(impl in table for table in tables) else None


def pick(
    operation: str,
    portable: Mapping[str, Callable[..., Any]],
    kernels: Mapping[str, Kernel],
    impl: str | None,
    *arrays: jax.Array,
    **options: Any,
) -> Callable[..., Any]:
    """The implementation for these arguments; called with the same arrays and options.

    Raises:
      ValueError: `impl` names none of the implementations, or one that cannot serve this device or these shapes.
    """
    device = device_of(*arrays)
    impl = impl or os.environ.get("QSCOPE_IMPL")
    if not impl:
        name = automatic(kernels, *arrays, **options)
        return portable["xla"] if name is None else kernels[name].run
    if impl in portable:
        return portable[impl]
    if impl not in kernels:
        names = sorted([*portable, *kernels])
        raise ValueError(f"{operation} has no implementation {impl!r}; there are {names}")
    kernel = kernels[impl]
    if kernel.platform != device.platform:
        raise ValueError(
            f"{operation}: impl = {impl!r} runs on a {kernel.platform.upper()}, these arrays are on {device.kind} "
            f"({device.platform}); leave impl out, or choose one of {sorted(portable)}"
        )
    if (why := kernel.unsuited(device, *arrays, **options)) is not None:
        raise ValueError(f"{operation}: impl = {impl!r} cannot serve this: {why}; leave impl out")
    return kernel.run
