"""Runs a function of scenarios.py in several real processes on this machine, four simulated devices each."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

DEVICES = 4


class Ended(NamedTuple):
    """How one process ended: its exit code (negative: a signal), its output, and seconds from the start of all."""

    code: int
    output: str
    seconds: float


def free_port(first: int = 0) -> int:
    """A port that nobody listens on: any, or the first free one from a number."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first))
                return probe.getsockname()[1]
            except OSError:
                first += 1


def slurm_environment(process: int, processes: int, port: int) -> dict[str, str]:
    """What `srun` tells a task, as far as JAX reads it; JAX derives its port, 61440 to 65535, from the job's number."""
    told = {
        "JOB_ID": port - 61440,
        "STEP_NODELIST": "localhost",
        "NTASKS": processes,
        "PROCID": process,
        "LOCALID": process,
    }
    return {f"SLURM_{name}": str(value) for name, value in told.items()}


@pytest.fixture
def together(tmp_path):
    """A function (scenario, folder, ...) -> [Ended, ...]; with `slurm`, processes find each other by themselves."""

    def run(scenario, folder, *, processes=2, silence=60, slurm=False, timeout=240):
        port = free_port(61440 if slurm else 0)
        base = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}", "JAX_PLATFORMS": "cpu"}
        script, outputs, running, start = Path(__file__).with_name("scenarios.py"), [], [], time.monotonic()
        for process in range(processes):
            flags = [] if slurm else [f"127.0.0.1:{port}", str(processes), str(process)]
            environment = base | (slurm_environment(process, processes, port) if slurm else {})
            outputs.append(tmp_path / f"{scenario}{process}.log")
            command = [sys.executable, "-P", str(script), scenario, str(folder), str(silence), *flags]
            with open(outputs[-1], "w") as log:
                running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        seconds: dict[int, float] = {}
        try:
            while len(seconds) < processes and time.monotonic() < start + timeout:
                for number, child in enumerate(running):
                    if number not in seconds and child.poll() is not None:
                        seconds[number] = time.monotonic() - start
                time.sleep(0.05)
        finally:
            for child in running:
                child.kill()
                child.wait()
        assert len(seconds) == processes, f"not ended after {timeout} s: {[path.read_text() for path in outputs]}"
        return [
            Ended(child.returncode, path.read_text(), seconds[i])
            for i, (child, path) in enumerate(zip(running, outputs, strict=True))
        ]

    return run
