"""The options of `qscope train-sae`, and what they mean for a model: the plan, with every default filled in."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

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
from qscope_jax.training.metrics import Writer
from qscope_jax.training.optimizer import Schedule, default_rate
from qscope_jax.training.state import Group, ModelAxis

_BATCH_TOKENS = {True: 4096, False: 32_768}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train SAEs on the residual streams of a model."""

    data: tuple[str, ...] = ("demo",)
    """Files, folders, globs or addresses of JSONL, parquet or text; "demo" ships along, "synthetic" is random."""
    weights: tuple[float, ...] = ()
    """The share of each name of --data in the tokens; by default all documents are equally likely."""
    activations: tuple[str, ...] = ()
    """Residual vectors of one layer on disk in the place of --data: files or folders of .npy or safetensors [n, d].
    Of --model only config.json is read then."""
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
    """Virtual shards of the data: every number of processes, and of DATA in --mesh, must divide them. 8 by default."""
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
    """Largest learning rate; 2e-4 sqrt(2^14 / width) by default."""
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
    """Tokens after which a silent latent counts as dead; by default a fortieth of all, at most 10,000,000."""
    seed: int = 0
    """Decides the order of documents, what SAEs start from, and how tokens are mixed."""
    max_failing: int = 20
    """Steps in a row that an SAE may skip because something was not finite, before the run is given up."""

    precision: Literal["fast", "parity"] = "fast"
    """The model and products in bfloat16, sums and weights of SAEs in float32; or all in float32."""
    mesh: str | None = None
    """DATAxMODEL over all devices of all processes, for example 4x2; all on DATA by default."""
    model_axis: ModelAxis = "latents"
    """What of the SAEs lies on MODEL: the latents of each, or whole SAEs."""
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
    """Held-out tokens that the finished SAEs are evaluated on, at most, a quarter of them for cross-entropy; 0: not."""
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


def plan_for(config: Config, constants: ModelConfig, mesh: Mesh | None) -> tuple[Plan, int]:
    """The plan and the number of steps, with the defaults filled in.

    Raises:
      ValueError: numbers that do not fit, named.
    """
    d, context = constants.hidden_size, constants.max_position_embeddings
    batch = config.batch_tokens or _BATCH_TOKENS[jax.default_backend() == "cpu"]
    length = config.row_length or min(context, 512)
    if not 0 < length <= context:
        raise ValueError(f"--row-length {length}: expected 1 to {context}, the model's context")
    data = 1 if mesh is None else mesh.shape["data"]
    shards = config.shards or math.lcm(8, data)
    if batch % (length * shards) or shards % data:
        raise ValueError(
            f"--batch-tokens {batch} must be a multiple of --row-length {length} times --shards {shards}, and the "
            f"{data} devices of the mesh axis 'data' must divide the shards"
        )
    steps = config.steps or math.ceil(config.tokens / batch)
    layers = config.layers or tuple(range(constants.num_layers))
    if len(set(layers)) != len(layers) or not all(0 <= layer < constants.num_layers for layer in layers):
        raise ValueError(f"--layers {layers}: expected different layers among 0..{constants.num_layers - 1}")
    rows, groups = batch // length, []
    for width in config.width or (16 * d,):
        for k in config.k:
            schedule = Schedule(
                config.lr or default_rate(width),
                steps,
                min(1000, steps // 20) if config.warmup_steps is None else config.warmup_steps,
                config.decay_share,
            )
            objective = _objective(config, width, k, d, steps * batch)
            groups.append(Group(tuple(sorted(layers)), objective, schedule, config.clip))
    if len({group.name for group in groups}) < len(groups):
        raise ValueError(f"--width {config.width} and --k {config.k}: a pair is named twice")
    dtype = jnp.bfloat16 if config.precision == "fast" else jnp.float32
    size = len(layers) * batch * d * jnp.dtype(dtype).itemsize
    buffer = buffer_batches(config.buffer_bytes, size, rows)
    return Plan(tuple(groups), config.seed, rows, length, shards, buffer, config.model_axis), steps


def _objective(config: Config, width: int, k: int, d: int, tokens: int) -> Objective:
    fast = config.precision == "fast"
    return Objective(
        width,
        k,
        selection=config.selection,
        prefixes=tuple(round(share * width) for share in config.prefixes),
        aux_k=min(d // 2, 512, width) if config.aux_k is None else config.aux_k,
        aux_weight=config.aux_weight,
        dead_after=config.dead_after or min(10_000_000, max(1, tokens // 40)),
        dtype=jnp.bfloat16 if fast else jnp.float32,
        contract="fast" if fast else "exact",
    )


def check_options(config: Config) -> None:
    """Refuses what is wrong whatever the model and the data.

    Raises:
      ValueError: an option that makes no sense, named.
    """
    check_license(config.license)
    if config.activations and len(config.layers) != 1:
        raise ValueError("--activations are of one layer: say which, with --layers")
    if config.activations and (config.weights or config.token_field or config.end_token is not None):
        raise ValueError("--activations: --weights, --token-field and --end-token are for text")
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
    if config.clip <= 0:
        raise ValueError(f"--clip {config.clip}: expected a positive number")
    if not all(0 < share < 1 for share in config.prefixes):
        raise ValueError(f"--prefixes {config.prefixes}: expected shares of the latents, between 0 and 1")
