"""Counts the VLIW bundles of the TPU encode's schedules: no TPU is needed, libtpu compiles on any machine.

python scripts/tpu_schedules.py [--chips v6e ...] [--cases d2048-f32768-k50 ...] [--contracts fast exact] [--json FILE]

A bundle is what a core issues in one cycle if nothing stalls: transfers between HBM and VMEM are not in these numbers.
Counted per row block, over all tiles of w_enc, everything included: the encode and its finish, against a Pallas matmul
with the same tiles that stores bfloat16 and keeps nothing. XLA's own matmul has loops of its own: what it would take is
estimated from the share of matrix issue slots that its innermost loop fills. One process per compilation, 2 GB each.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_LARGE = 60  # bundles; shorter conditional regions start transfers, and count as part of every step


def compile_one(chip: str, name: str, what: str, tokens: int) -> dict[str, Any]:
    """Compiles one of "plain", "xla", "fast", "exact" and returns the tiles it used."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from qscope_kernels.cases import RELEASED
    from qscope_kernels.topk_encode import tpu, tpu_plan

    case = next(case for case in RELEASED if case.name == name)
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    place = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    x, w = place((tokens, case.d), jnp.bfloat16), place((case.d, case.f), jnp.bfloat16)
    arrays = x, w, place((case.f,), jnp.float32)
    known = tpu_plan.chip(device.device_kind)
    plan = known and tpu_plan.make_plan(known, x, w, case.k)
    if known is None or plan is None:
        raise ValueError(f"{device.device_kind} has no plan for {name}")
    if what == "xla":
        step, arrays = partial(jnp.dot, preferred_element_type=jnp.bfloat16), arrays[:2]
    elif what == "plain":
        step, arrays = partial(plain_matmul, rows=plan.rows, columns=plan.columns, vmem=known.vmem), arrays[:2]
    else:
        step = partial(tpu.topk_encode, k=case.k, contract=what, kind=device.device_kind)
    compiled = jax.jit(step).lower(*arrays).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    failure = tokens * plan.failure_probability(case.f, case.k)
    return {"tiles": plan._asdict(), "steps": case.f // plan.columns, "temporary": temporary, "failures": failure}


def plain_matmul(x, w, *, rows: int, columns: int, vmem: int):
    """x @ w in bfloat16 with the tiles of the encode."""
    import jax.numpy as jnp
    from qscope_kernels.pallas_tpu import call, pl

    def body(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    (n, d), f = x.shape, w.shape[1]
    return call(
        body,
        x,
        w,
        out=[((n, f), jnp.bfloat16)],
        out_specs=[pl.BlockSpec((rows, columns), lambda i, j: (i, j))],
        grid=(n // rows, f // columns),
        in_specs=[pl.BlockSpec((rows, d), lambda i, j: (i, 0)), pl.BlockSpec((d, columns), lambda i, j: (0, j))],
        semantics=("parallel", "arbitrary"),
        vmem=vmem,
        name="plain_matmul",
    )[0]


def read_schedule(folder: Path, kernel: str) -> tuple[int, int, float]:
    """Bundles of every step, bundles of regions that run once per row block, and the share of matrix slots in use."""
    file = next(f for f in folder.glob("*pre-delay*per-bundle-utilization.txt") if f"-{kernel}" in f.name)
    rows = []
    for line in file.read_text().splitlines():
        if re.fullmatch(r"[\d ]+", line):
            rows.append([int(word) for word in line.split()])
    capacity, rows = rows[0][0], rows[1:]
    stem = re.sub(r"-\d+-pre-delay.*", "", file.name)
    packed = next(f for f in folder.glob(f"{stem}-*-packed-bundles-post-ra.txt") if "schedule" not in f.name)
    branches, here = [], 0
    for line in packed.read_text().splitlines():
        if found := re.match(r"\s*(0x[0-9a-f]+|0)\s", line):
            here = int(found[1], 16)
        branches += [(here, int(target)) for target in re.findall(r"sbr\.rel .*?target bundleno = (\d+)", line)]
    matmuls = [row[0] for row in rows]
    uses = sum(matmuls)
    once, end = 0, 0
    for start, target in sorted(branches):
        inside = sum(matmuls[start:target])
        # A large forward jump skips what only the first or the last step does; one over nearly all skips the body.
        if start >= end and _LARGE < target - start < 0.9 * len(rows) and inside * 10 <= uses:
            once, end = once + target - start, target
    loops = [
        (start - target, target, start) for start, target in branches if target < start and sum(matmuls[target:start])
    ]
    _, first, last = min(loops) if loops else (0, 0, len(rows))
    return len(rows) - once, once, sum(matmuls[first:last]) / (capacity * max(1, last - first))


def measure(chip: str, case: str, what: str, tokens: int) -> dict[str, Any]:
    """Compiles in a process of its own and reads what it dumped."""
    with tempfile.TemporaryDirectory() as folder:
        dumps = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_mosaic_dump_to={folder}"
        settings = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": dumps,
        }
        command = [sys.executable, __file__, "--one", chip, case, what, "--tokens", str(tokens)]
        run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{chip} {case} {what} did not compile:\n{run.stderr[-2000:]}")
        found = json.loads(run.stdout.splitlines()[-1])
        kernel = {"plain": "plain_matmul", "xla": "", "fast": "topk_encode_fast", "exact": "topk_encode_exact"}[what]
        if what == "xla":
            return found | {"filled": max(filled for *_, filled in every_schedule(Path(folder)))}
        step, once, filled = read_schedule(Path(folder), kernel)
        found |= {"step": step, "once": once, "filled": filled, "sweep": step * found["steps"] + once}
        if kernel.startswith("topk"):
            step, once, _ = read_schedule(Path(folder), "topk_finish")
            found["finish"] = (8 * step + once) * found["tiles"]["rows"] / 1024
        return found


def every_schedule(folder: Path):
    """The schedules of all of a program's parts."""
    for file in folder.glob("*pre-delay*per-bundle-utilization.txt"):
        name = re.sub(r"^\d+-|-\d+-pre-delay.*", "", file.name)
        yield read_schedule(folder, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--cases", nargs="+", help="such as d2048-f32768-k50; all released shapes if left out")
    parser.add_argument("--contracts", nargs="+", default=["fast"], choices=["fast", "exact"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # for the process that compiles
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_one(*options.one, tokens=options.tokens)))
        return
    from qscope_kernels.cases import RELEASED

    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    print(" ".join(f"{name} {version}" for name, version in versions.items()), "| bundles per row block, no HBM")
    print(f"{'chip':6}{'case':20}{'':6}{'XLA':>9}{'plain':>9}{'encode':>9}{'finish':>8}  of XLA  of plain")
    rows: list[dict[str, Any]] = []
    for chip in options.chips:
        for case in options.cases or [case.name for case in RELEASED]:
            plain, xla = (measure(chip, case, what, options.tokens) for what in ("plain", "xla"))
            for contract in options.contracts:
                found = measure(chip, case, contract, options.tokens)
                ours, estimate = found["sweep"] + found["finish"], plain["sweep"] * plain["filled"] / xla["filled"]
                row = {"chip": chip, "case": case, "contract": contract, "of_plain": plain["sweep"] / ours}
                row["of_xla"] = estimate / ours
                rows.append(row | {"plain": plain, "xla": xla, "encode": found})
                print(
                    f"{chip:6}{case:20}{contract:6}{estimate:9.0f}{plain['sweep']:9}{found['sweep']:9}"
                    f"{found['finish']:8.0f}{row['of_xla']:8.3f}{row['of_plain']:10.3f}",
                    flush=True,
                )
                if options.json:  # after every row: a long run that is cut short leaves what it has
                    options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
