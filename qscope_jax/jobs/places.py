"""Where a command runs: as which of several processes, and over which devices of its own.

Processes that share the work each hold a whole replica and exchange nothing while they work, so that none ever waits
for the batches of another; they meet at the end.
"""

from pathlib import Path

import jax
from jax.sharding import Mesh

from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source
from qscope_jax.jobs.run import say
from qscope_jax.mesh import finish_together, make_mesh, start_distributed
from qscope_jax.sae.formats import open_sae
from qscope_jax.sae.formats.facts import settle
from qscope_jax.steering.files import Bound, combine_hashes


def join_processes(
    coordinator: str | None, processes: int | None, process: int | None, *, shard: str = "0/1"
) -> tuple[int, int]:
    """Joins the job's other processes, if any, and returns (I, N): this is process I of N that share the work.

    Call it before anything touches a device. Options are those of `start_distributed`; `shard` is what processes that
    know nothing of each other were told instead.

    Raises:
      ValueError: the options contradict one another.
    """
    told = parse_shard(shard)
    start_distributed(coordinator, processes, process)
    if not jax.distributed.is_initialized():
        return told
    finish_together("all have begun")  # JAX waits no longer than two minutes for the devices of the others
    own = jax.process_index(), jax.process_count()
    if told not in ((0, 1), own):
        raise ValueError(
            f"--shard {shard}: this is process {own[0]} of {own[1]}, which share the work already; leave --shard out, "
            "or say --processes 1"
        )
    say(f"process {own[0]} of {own[1]}: should one of them die, all end; what is finished stays")
    return own


def meet() -> None:
    """Waits at the end of a command for the job's other processes; JAX makes an error for all of one that just ends."""
    finish_together("all have ended")


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` as numbers.

    Raises:
      ValueError: not 0 <= I < N.
    """
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"--shard {text}: expected I/N with 0 <= I < N, for example 0/2 and 1/2")
    return int(first), int(last)


def parse_mesh(text: str) -> tuple[int, int]:
    """`DATAxMODEL` as numbers.

    Raises:
      ValueError: not two numbers of at least 1.
    """
    data, cross, model = text.partition("x")
    if not (cross and data.isdecimal() and model.isdecimal() and int(data) and int(model)):
        raise ValueError(f"--mesh {text}: expected DATAxMODEL, for example 2x4")
    return int(data), int(model)


def local_mesh(text: str) -> Mesh | None:
    """A mesh `DATAxMODEL` over the first devices of this process; None for a single one.

    Raises:
      ValueError: not two numbers of at least 1.
      MeshError: there are too few devices.
    """
    data, model = parse_mesh(text)
    return None if data * model == 1 else make_mesh(data, model, devices=jax.local_devices()[: data * model])


def model_files(model: Source) -> list[Path]:
    """The files that decide what a backbone computes, fetched: config.json and its weights."""
    weights = [name for name in model.names() if name.endswith(".safetensors") and "/" not in name]
    return [model.fetch(name) for name in ("config.json", *weights)]


def model_name(model: Source) -> str:
    """What SAEs call the backbone that they were made for: owner/name on the hub, else its folder's name."""
    if model.kind == "demo":
        return "qscope-demo"
    return model.spec.removeprefix("hf://").split("@")[0] if model.kind == "hub" else model.name


def bind(model: Source, sae: Source, layers: tuple[int, ...], *, k: int | None = None) -> Bound:
    """What recipes for this model and the SAEs of these layers are bound to; fetches their files, reads no weights.

    `k` overrules what the SAEs say, as in `load_sae`.

    Raises:
      FormatError, SourceError: see `load_sae`.
    """
    opened = {layer: open_sae(sae, layer) for layer in layers}
    saes = {layer: next(iter(hash_files([one.path]).values())) for layer, one in opened.items()}
    settled = {layer: settle(str(one.path), one.facts, k=k).k for layer, one in opened.items()}
    return Bound(combine_hashes(hash_files(model_files(model))), saes, settled, model_name(model), sae.name)
