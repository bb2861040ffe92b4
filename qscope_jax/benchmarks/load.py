"""Peak anonymous memory of loading a checkpoint and an SAE, each in a process of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qscope_jax.backbone.weights import Backbone, save_backbone
from qscope_jax.benchmarks.shapes import qwen3_1p7b, random_params
from qscope_jax.sae.formats import save_sae
from qscope_jax.sae.model import SaeConfig, init_sae

# Samples RssAnon while the load runs, after importing and starting jax; file pages are the kernel's to drop.
_CHILD = """
import json, sys, threading, time
import jax, jax.numpy as jnp, qscope_jax
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
jnp.zeros(8).block_until_ready()
base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch, daemon=True); thread.start()
kind, path, dtype = sys.argv[1:]
loaded = getattr(qscope_jax, "load_" + kind)(path, dtype=dtype)
jax.block_until_ready(loaded.params); done.set(); thread.join()
size = sum(a.nbytes for a in jax.tree.leaves(loaded.params))
print(json.dumps({"arrays_bytes": size, "peak_bytes": peak - base, "ratio": (peak - base) / size}))
"""


def bench_load() -> dict[str, Any]:
    """Peak over arrays for a 0.5-billion-parameter bfloat16 checkpoint and a float32 W32K SAE, each loaded both ways.

    Raises:
      OSError: this system has no /proc/self/status (Linux only).
    """
    result: dict[str, Any] = {"what": "peak anonymous bytes while loading / bytes of the arrays"}
    with tempfile.TemporaryDirectory() as folder:
        config = qwen3_1p7b(4)
        params = random_params(config, dtype=jnp.bfloat16)
        save_backbone(Backbone(config, params), Path(folder, "model"))
        sae = init_sae(jax.random.key(1), SaeConfig(d_model=2048, d_sae=32_768, k=50, layer=0))
        places = {"backbone": Path(folder, "model"), "sae": save_sae(sae, Path(folder, "sae"), format="qwen-scope")}
        for kind, path in places.items():
            result[kind] = {dtype: _measure(kind, path, dtype) for dtype in ("bfloat16", "float32")}
    return result


def _measure(kind: str, path: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, kind, str(path), dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
