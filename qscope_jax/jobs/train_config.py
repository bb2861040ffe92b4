"""The options of `qscope train-sae`, and what they mean for a model: the plan, with every default filled in."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.files.outbox import locate
from qscope_jax.jobs.places import parse_mesh
from qscope_jax.mesh import make_mesh
from qscope_jax.sae.card import check_license
from qscope_jax.sae.loss import Objective
from qscope_jax.training.loop import Plan, buffer_batches
from qscope_jax.training.metrics import Writer, check_writers
from qscope_jax.training.optimizer import Schedule, default_rate
from qscope_jax.training.state import Group, ModelAxis, abstract_group
from qscope_jax.training.step import NEVER

_BATCH_TOKENS = {True: 4096, False: 32_768}
# What --activations have no use for.
_OF_TEXT = ("data", "weights", "text_field", "token_field", "document", "end_token", "fsdp")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train SAEs on the residual streams of a model."""

    data: tuple[str, ...] = ("demo",)
    """Files, folders, globs or addresses of JSONL, parquet or text; "demo" ships along, "synthetic" is random."""
    weights: tuple[float, ...] = ()
    """The share of each name of --data in the tokens; by default all documents are equally likely."""
    activations: tuple[str, ...] = ()
    """Residual vectors of one layer on disk in the place of --data: files or folders of .npy or safetensors [n, d].
    Of --model only config.json is read then, and a row may have any length."""
    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, the output of decoder layer n); all by default."""
    width: tuple[int, ...] = ()
    """Latents of an SAE; 16 times the model's width by default. Several widths are trained side by side."""
    k: tuple[int, ...] = (50,)
    """Latents per token. Several are trained side by side, for every width."""
    out: str = "qscope-out/train-sae"
    """Folder of the results, local or remote. The same command goes on in it; another is refused."""

    tokens: int = 1_000_000
    """Tokens to train on; the data is gone through as often as that takes."""
    steps: int | None = None
    """Steps to train for, instead of --tokens."""
    batch_tokens: int | None = None
    """Tokens of a step, over all devices; by default 4,096 on a CPU and 32,768 elsewhere."""
    row_length: int | None = None
    """Tokens of a row, which may hold several documents; by default 512, or the model's context if that is less."""
    shards: int | None = None
    """Virtual shards of the data, each with documents and rows of its own. They divide the rows of a step, and DATA in
    --mesh divides them. By default one per row, or fewer where there are not so many documents."""
    buffer_bytes: int | None = None
    """Size of the mixing buffer over all devices; by default what makes a step's tokens come from 256 rows, at most
    8 steps' worth and 8 GiB."""
    held_out: float = 0.01
    """Share of the documents that is never trained on, at least one; quality is measured on them."""
    end_token: int | None = None
    """Token id put after every document."""

    selection: Literal["token", "batch"] = "token"
    """TopK of each token, or BatchTopK: k on average. Files hold a TopK SAE in both cases."""
    prefixes: tuple[float, ...] = ()
    """Matryoshka: shares of the latents that must reconstruct by themselves too, for example 0.0625 0.25."""
    lr: float | None = None
    """Largest learning rate, above 0; 2e-4 sqrt(2^14 / width) by default."""
    warmup_steps: int | None = None
    """Steps over which the rate rises; by default a twentieth of all, at most 1,000."""
    decay_share: float = 0.2
    """Share of the steps, the last ones, over which the rate falls to 0."""
    clip: float = 1.0
    """Largest norm of an SAE's gradient."""
    aux_k: int | None = None
    """Dead latents per token in the auxiliary loss; half the model's width by default, at most 512; 0: none."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss."""
    dead_after: int | None = None
    """Tokens after which a silent latent counts as dead; by default a fortieth of all, at least four steps of them and
    at most 10,000,000."""
    seed: int = 0
    """Decides the order of documents, what SAEs start from, and how tokens are mixed."""
    max_failing: int = 20
    """Steps that an SAE may skip because something was not finite, before the run is given up: in a row, or as more
    than half of the steps of every line of metrics.jsonl over so many steps."""

    precision: Literal["fast", "parity"] = "fast"
    """The model and products in bfloat16, sums and weights of SAEs in float32; or all in float32."""
    mesh: str | None = None
    """DATAxMODEL over all devices of all processes, for example 4x2; all on DATA by default."""
    model_axis: ModelAxis = "latents"
    """What of the SAEs lies on MODEL: the latents of each, or whole SAEs. A run may go on with the other."""
    fsdp: bool = False
    """Split the model's weights over DATA too."""
    coordinator: str | None = None
    """HOST:PORT of process 0 of several; on Cloud TPU and in Slurm these three are found by themselves."""
    processes: int | None = None
    """How many processes there are; 1 is alone."""
    process: int | None = None
    """Which of them this one is, from 0."""

    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    checkpoints: str | None = None
    """Folder of the checkpoints, shared by all processes or gs://; by default checkpoints/ in --out. Must be given
    where --out is remote and not gs://."""
    keep: int = 3
    """Checkpoints that stay, the newest ones."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    judge_every: int = 100
    """Steps between looks at held-out text; a multiple of --log-every."""
    eval_tokens: int = 32_768
    """Held-out tokens that the finished SAEs are evaluated on, in whole steps, a quarter of them for cross-entropy; no
    document is used twice. 0: not."""
    log: tuple[Writer, ...] = ()
    """Where metrics go besides: tensorboard, wandb."""
    profile: int = 0
    """Trace so many steps, after the first ten, for XProf; into profile/ in --out."""
    format: Literal["safetensors", "qwen-scope"] = "safetensors"
    """Of the SAE files: safetensors, or the release's .pt; `qscope convert` makes others."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the SAE files."""
    license: str = "other"
    """Licence that the model card states, as the hub calls it."""

    text_field: str = "text"
    """Column of the text."""
    token_field: str | None = None
    """Column of lists of token ids, if the data is tokenised already."""
    document: Literal["line", "file"] = "line"
    """Whether each line or each file of plain text is a document."""


def checkpoint_folder(config: Config) -> str:
    """Where the checkpoints lie.

    Raises:
      ValueError: in --out they cannot, and no other folder is named.
    """
    if config.checkpoints:
        return config.checkpoints
    if not (shares_out(config) or config.out.startswith("gs://")):
        raise ValueError(
            f"--out {config.out}: checkpoints cannot lie there; name a folder for them with --checkpoints, on a disk "
            "that all processes share or under gs://"
        )
    return f"{locate(config.out)}/checkpoints"


def shares_out(config: Config) -> bool:
    """True if all processes work in --out itself, False if each works in a folder of its own and it is remote."""
    return isinstance(locate(config.out), Path)


def mesh_for(config: Config) -> Mesh | None:
    """The mesh over all devices of all processes; None for a single one.

    Raises:
      ValueError: not DATAxMODEL.
      MeshError: there are too few devices, or, of several processes, too many.
    """
    count = jax.device_count()
    data, model = (count, 1) if config.mesh is None else parse_mesh(config.mesh)
    if jax.process_count() == 1 and config.mesh is not None:
        return make_mesh(data, model, devices=jax.devices()[: data * model]) if data * model > 1 else None
    return make_mesh(data, model) if count > 1 else None


def evaluates(config: Config) -> bool:
    """True if finished SAEs are evaluated on held-out data."""
    return bool(config.held_out and config.eval_tokens)


def plan_for(config: Config, constants: ModelConfig, mesh: Mesh | None, *, stored: Any = None) -> tuple[Plan, int]:
    """The plan and the number of steps, with the defaults filled in; `stored` is the type of vectors on disk.

    Raises:
      ValueError: numbers that do not fit, named.
      MeshError: the mesh does not divide what it would split of the SAEs.
    """
    d, data = constants.hidden_size, 1 if mesh is None else mesh.shape["data"]
    rows, length, shards = _batch(config, constants.max_position_embeddings, data)
    steps = config.steps or math.ceil(config.tokens / (rows * length))
    layers = config.layers or tuple(range(constants.num_layers))
    if len(set(layers)) != len(layers) or not all(0 <= layer < constants.num_layers for layer in layers):
        raise ValueError(f"--layers {layers}: expected different layers among 0..{constants.num_layers - 1}")
    groups = _groups(config, d, tuple(sorted(layers)), steps, rows * length)
    if mesh is not None:
        _check_places(config, groups, d, mesh)
    dtype = stored if config.activations else jnp.bfloat16 if config.precision == "fast" else jnp.float32
    size = len(layers) * rows * length * d * jnp.dtype(dtype).itemsize
    buffer = buffer_batches(config.buffer_bytes, size, rows, data)
    return Plan(groups, config.seed, rows, length, shards, buffer, config.model_axis), steps


def fewer_shards(plan: Plan, documents: int, mesh: Mesh | None) -> Plan:
    """The plan with as many virtual shards, at most one per row, as there are documents for and "data" divides."""
    data = 1 if mesh is None else mesh.shape["data"]
    fitting = [count for count in range(data, min(plan.rows, documents) + 1, data) if plan.rows % count == 0]
    return dataclasses.replace(plan, shards=max(fitting, default=plan.shards))


def _batch(config: Config, context: int, data: int) -> tuple[int, int, int]:
    """Rows of a global batch, tokens of a row, and virtual shards."""
    batch = config.batch_tokens or _BATCH_TOKENS[jax.default_backend() == "cpu"]
    length = config.row_length or (512 if config.activations else min(context, 512))
    if length > context and not config.activations:
        raise ValueError(f"--row-length {length}: expected 1 to {context}, the model's context")
    if config.shards and config.shards % data:
        raise ValueError(f"--shards {config.shards}: the {data} devices of the mesh axis 'data' must divide them")
    if batch % (length * (config.shards or data)):
        parts = f"--shards {config.shards}" if config.shards else f"the {data} devices of the mesh axis 'data'"
        raise ValueError(f"--batch-tokens {batch} must be a multiple of --row-length {length} times {parts}")
    return batch // length, length, config.shards or batch // length


def _groups(config: Config, d: int, layers: tuple[int, ...], steps: int, batch: int) -> tuple[Group, ...]:
    groups = []
    for width in config.width or (16 * d,):
        for k in config.k:
            schedule = Schedule(
                default_rate(width) if config.lr is None else config.lr,
                steps,
                min(1000, steps // 20) if config.warmup_steps is None else config.warmup_steps,
                config.decay_share,
            )
            groups.append(Group(layers, _objective(config, width, k, d, steps, batch), schedule, config.clip))
    if len({group.name for group in groups}) < len(groups):
        raise ValueError(f"--width {config.width} and --k {config.k}: a pair is named twice")
    return tuple(groups)


def _objective(config: Config, width: int, k: int, d: int, steps: int, batch: int) -> Objective:
    fast = config.precision == "fast"
    return Objective(
        width,
        k,
        selection=config.selection,
        prefixes=tuple(round(share * width) for share in config.prefixes),
        aux_k=min(d // 2, 512, width) if config.aux_k is None else config.aux_k,
        aux_weight=config.aux_weight,
        # No shorter than some steps: a latent that a single batch had no use for is not dead.
        dead_after=config.dead_after or min(10_000_000, max(4 * batch, steps * batch // 40)),
        dtype=jnp.bfloat16 if fast else jnp.float32,
        contract="fast" if fast else "exact",
    )


def _check_places(config: Config, groups: tuple[Group, ...], d: int, mesh: Mesh) -> None:
    model = mesh.shape["model"]
    for group in groups:
        abstract_group(group, d, mesh=mesh, model_axis=config.model_axis)
        if evaluates(config) and group.objective.d_sae % model:
            raise ValueError(
                f"--width {group.objective.d_sae}: finished SAEs are evaluated with their latents split over the "
                f"{model} devices of MODEL, which must divide them whatever --model-axis is; choose another width or "
                "--mesh, or leave the evaluation to `qscope eval-sae` with --eval-tokens 0"
            )


def check_options(config: Config) -> None:
    """Refuses what is wrong whatever the model and the data.

    Raises:
      ValueError: an option that makes no sense, named.
    """
    check_license(config.license)
    if config.activations and len(config.layers) != 1:
        raise ValueError("--activations are of one layer: say which, with --layers")
    if config.activations and (
        ignored := [name for name in _OF_TEXT if getattr(config, name) != getattr(Config, name)]
    ):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        raise ValueError(f"--activations: {options} would be ignored, being for text or the model that reads it")
    check_writers(config.log)
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a finite number")
    for name in ("tokens", "steps", "batch_tokens", "row_length", "shards", "dead_after", "max_failing", "keep",
                 "checkpoint_every", "log_every", "judge_every"):  # fmt: skip
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if config.judge_every % config.log_every:
        raise ValueError(f"--judge-every {config.judge_every} must be a multiple of --log-every {config.log_every}")
    for name in ("eval_tokens", "profile"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected at least 0")
    if (config.dead_after or 0) >= NEVER:
        raise ValueError(f"--dead-after {config.dead_after}: expected less than {NEVER:,}, where counters stop")
    if config.clip <= 0:
        raise ValueError(f"--clip {config.clip}: expected a positive number")
    if not all(0 < share < 1 for share in config.prefixes):
        raise ValueError(f"--prefixes {config.prefixes}: expected shares of the latents, between 0 and 1")
