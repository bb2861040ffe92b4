"""Text to features: one jitted step, and a loop that keeps the device busy while the host looks at results.

step: tokens [b, t] -> forward to the last hook -> encode every layer's residual -> codes [b, t, k] per layer
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params, check_tokens, forward
from qscope_jax.backbone.weights import Backbone
from qscope_jax.data.batches import Batch, Buckets, Filled, Segments, cut_documents, fill_batch, plan_batches
from qscope_jax.mesh import mesh_of
from qscope_jax.sae.model import Contract, Sae, SaeConfig, SparseCode, encode
from qscope_jax.sae.quality import sink_threshold

SINK_TOKENS = 65_536  # how much of the input measures a sink threshold that the SAE does not bring along

Key = TypeVar("Key")
Tensor = jax.Array | np.ndarray


class StepOutput(NamedTuple):
    """Codes of every layer, [b, t, k] each, and residual norms [l, b, t]; meaningless where the mask is False."""

    codes: tuple[SparseCode, ...]
    norms: Float[Array, "l b t"]


class HostCode(NamedTuple):
    """A `SparseCode` in NumPy: `values` and `indices`, both [..., k], sorted by value, descending."""

    values: np.ndarray
    indices: np.ndarray


class HostOutput(NamedTuple):
    """A `StepOutput` in NumPy."""

    codes: tuple[HostCode, ...]
    norms: np.ndarray


class DocumentCodes(NamedTuple):
    """One document: its token ids [t], and per layer the code [t, k] and the residual norms [t] of its tokens."""

    tokens: np.ndarray
    codes: dict[int, HostCode]
    norms: dict[int, np.ndarray]


class ExtractStep:
    """The jitted step, made by `make_extract_step`; `shapes` lists the batch shapes it was compiled for."""

    def __init__(self, config: ModelConfig, layers: tuple[int, ...], contract: Contract):
        self.config, self.layers, self.shapes = config, layers, list[tuple[int, ...]]()

        def step(params, saes, tokens, mask, segment_ids):
            self.shapes.append(tokens.shape)  # Python runs only while jit traces: once per compilation
            residual = forward(
                params, config, tokens, mask=mask, segment_ids=segment_ids,
                capture=layers, stop_after=max(layers), logits="none",
            ).captured  # fmt: skip
            codes = tuple(encode(sae, residual[i], contract=contract) for i, sae in enumerate(saes))
            return StepOutput(codes, jnp.linalg.norm(residual.astype(jnp.float32), axis=-1))

        self._jitted = jax.jit(step)

    @property
    def compilations(self) -> int:
        """How often the step was compiled; equals the number of distinct batch shapes it saw."""
        return len(self.shapes)

    def __call__(
        self,
        params: Params,
        saes: Sequence[Sae],
        tokens: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
        segment_ids: Int[Tensor, "b t"],
    ) -> StepOutput:
        return self._jitted(params, tuple(saes), tokens, mask, segment_ids)


def make_extract_step(config: ModelConfig, layers: Sequence[int], *, contract: Contract = "exact") -> ExtractStep:
    """The step for SAEs of these layers, in this order: (params, saes, tokens, mask, segment_ids) -> StepOutput.

    The last three are [b, t], a batch's content as `fill_batch` makes it: rows may hold several documents.
    With weights on a mesh, rows are split over "data", which must divide b.

    Raises:
      ValueError: no layers, a layer twice, or one the model does not have.
    """
    layers = tuple(layers)
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < config.num_layers for layer in layers):
        raise ValueError(f"layers = {layers}; expected different layers among 0..{config.num_layers - 1}")
    return ExtractStep(config, layers, contract)


def check_sae(config: ModelConfig, layer: int, sae: SaeConfig) -> None:
    """Refuses an SAE that was not made for this model's residual stream.

    Raises:
      ValueError: another width, or a layer the model does not have.
    """
    if sae.d_model != config.hidden_size:
        raise ValueError(
            f"the SAE of layer {layer} reads vectors of {sae.d_model}, the model's residual stream has "
            f"{config.hidden_size}: they do not belong together"
        )
    if not 0 <= layer < config.num_layers:
        raise ValueError(f"an SAE of layer {layer}, but the model has the layers 0..{config.num_layers - 1}")


def stream(
    step: ExtractStep,
    params: Params,
    saes: Sequence[Sae],
    feed: Iterable[tuple[Key, Filled]],
    *,
    ahead: int = 2,
    watch: Callable[[Filled, StepOutput], None] | None = None,
) -> Iterator[tuple[Key, HostOutput]]:
    """Runs the step over a feed of (key, content) and yields (key, results as NumPy arrays) in order.

    `ahead` batches are always under way while the caller works on the one before. `watch` is given each batch and its
    results on the device, in order and before they are known, for what the device shall make of them.

    Raises:
      FloatingPointError: a residual is NaN or infinite at a real token.
    """
    pending: deque[tuple[Key, np.ndarray, StepOutput]] = deque()

    def fetch() -> tuple[Key, HostOutput]:
        key, mask, device = pending.popleft()
        codes = tuple(HostCode(np.asarray(code.values), np.asarray(code.indices)) for code in device.codes)
        output = HostOutput(codes, np.asarray(device.norms))
        if not np.isfinite(output.norms[:, mask]).all():
            wrong = np.flatnonzero(~np.isfinite(np.where(mask, output.norms, 0)).all(axis=(1, 2)))
            raise FloatingPointError(
                f"the residual stream is not finite at layers {[step.layers[i] for i in wrong]}; the weights are "
                "damaged or overflow in this precision: try --precision parity"
            )
        return key, output

    for key, content in feed:
        output = step(params, saes, *content)
        if watch is not None:
            watch(content, output)
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        pending.append((key, content.mask, output))
        if len(pending) > ahead:
            yield fetch()
    while pending:
        yield fetch()


def extract_documents(
    backbone: Backbone,
    saes: Mapping[int, Sae],
    documents: Sequence[np.ndarray],
    *,
    batch_tokens: int = 4096,
    max_length: int = 4096,
    long: Literal["truncate", "window"] = "truncate",
    step: ExtractStep | None = None,
) -> list[DocumentCodes]:
    """Codes of every token of a few documents, in memory; `qscope extract` is for many.

    Args:
      backbone: the model, on one device or a mesh.
      saes: per layer; on the model's mesh.
      documents: token ids [n_tokens], none empty.
      batch_tokens: positions per batch.
      max_length: longer documents are truncated or cut into windows.
      long: which of the two.
      step: a step to use again, made for the same model and layers.

    Raises:
      ValueError: an empty document, an id outside the vocabulary, or SAEs of another width.
    """
    for layer, sae in saes.items():
        check_sae(backbone.config, layer, sae.config)
    if not documents:
        return []
    step = step or make_extract_step(backbone.config, tuple(saes))
    segments = cut_documents(documents, max_length, long=long)
    check_tokens(segments.tokens, backbone.config)
    pieces: dict[int, HostOutput] = {}
    mesh = mesh_of(backbone.params["embed"])
    buckets = Buckets(batch_tokens, max_length, multiple=1 if mesh is None else mesh.shape["data"])
    plan = plan_batches(segments.lengths, buckets)
    for batch, output in stream(step, backbone.params, tuple(saes.values()), feed_batches(plan, segments)):
        flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), output.codes)
        norms = output.norms.reshape(len(saes), -1)
        for segment, begin in zip(batch.segments, batch.begin, strict=True):
            own = slice(begin, begin + segments.lengths[segment])
            codes = tuple(HostCode(code.values[own], code.indices[own]) for code in flat)
            pieces[int(segment)] = HostOutput(codes, norms[:, own])
    return [_document(segments, pieces, tuple(saes), d) for d in range(len(documents))]


def feed_batches(plan: Iterable[Batch], segments: Segments) -> Iterator[tuple[Batch, Filled]]:
    """What `stream` takes, with the batch as key."""
    for batch in plan:
        yield batch, fill_batch(batch, segments)


def measure_sinks(
    step: ExtractStep, params: Params, saes: Sequence[Sae], documents: Iterable[np.ndarray], buckets: Buckets
) -> dict[int, float]:
    """Per layer, the norm above which a token is a sink: what its SAE says, or else ten times the median norm.

    That is measured over the first 65,536 tokens of the documents, which are read no further than that.

    Raises:
      ValueError: there is nothing to measure it on.
    """
    said = {n: sae.config.sink_threshold for n, sae in zip(step.layers, saes, strict=True)}
    known = {n: value for n, value in said.items() if value is not None}
    return known if len(known) == len(saes) else _measure(step, params, saes, documents, buckets) | known


def _measure(step, params, saes, documents: Iterable[np.ndarray], buckets: Buckets) -> dict[int, float]:
    chosen, room = list[np.ndarray](), SINK_TOKENS
    for document in documents:
        chosen.append(document[: min(room, buckets.max_length)])
        room -= len(chosen[-1])
        if not room:
            break
    segments = cut_documents(chosen, buckets.max_length)
    plan = plan_batches(segments.lengths, buckets)
    norms = [np.zeros((len(step.layers), 0), np.float32)]
    for batch, output in stream(step, params, saes, feed_batches(plan, segments)):
        norms.append(output.norms[:, fill_batch(batch, segments).mask])
    found = np.concatenate(norms, axis=1)
    if not found.size:
        raise ValueError(
            "no document to measure the sink threshold on; give an SAE that knows its own, or drop --mask-sinks"
        )
    return dict(zip(step.layers, map(sink_threshold, found), strict=True))


def _document(
    segments: Segments, pieces: Mapping[int, HostOutput], layers: tuple[int, ...], document: int
) -> DocumentCodes:
    rows = np.flatnonzero(segments.document == document).tolist()
    tokens = np.concatenate([segments.tokens[segments.begin[r] : segments.end[r]] for r in rows])
    codes = {}
    for i, layer in enumerate(layers):
        values, indices = zip(*(pieces[r].codes[i] for r in rows), strict=True)
        codes[layer] = HostCode(np.concatenate(values), np.concatenate(indices))
    norms = {layer: np.concatenate([pieces[r].norms[i] for r in rows]) for i, layer in enumerate(layers)}
    return DocumentCodes(tokens, codes, norms)
