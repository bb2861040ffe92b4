"""The four tensors of an SAE, checked, and turned to the way we hold them: w_enc [d, f], w_dec [f, d]."""

from typing import Literal, NamedTuple

from qscope_jax.files.recognise import FormatError
from qscope_jax.sae.formats.facts import Facts
from qscope_jax.sae.formats.stored import StoredTensor

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")
Layout = Literal["release", "saelens", "sparsify"]
_FOREIGN = {
    "encoder.weight": "sparsify without its cfg.json, dictionary_learning or OpenAI's sparse_autoencoder",
    "W_E": "llamascopium",
    "W_skip": "a transcoder with a skip connection",
    "threshold": "a JumpReLU SAE, not a TopK one",
    "model.embed_tokens.weight": "a language model",
}


class StoredSae(NamedTuple):
    """The tensors of one SAE in our orientation, not yet read, and what their file says."""

    w_enc: StoredTensor
    b_enc: StoredTensor
    w_dec: StoredTensor
    b_dec: StoredTensor
    facts: Facts
    centred: bool = False
    """Whether the file's encoder subtracts b_dec from its input; b_enc is then to be folded before it is used."""


def check_matrices(where: str, tensors: dict[str, StoredTensor], layout: Layout) -> StoredSae:
    """Checks names and shapes of the four tensors and orients them.

    The release stores W_enc (d_sae, d_model) and W_dec (d_model, d_sae); SAELens stores both the other way round, and
    sparsify both as (d_sae, d_model).

    Raises:
      FormatError: a tensor is missing, unknown, of another rank or shape, or the matrices are swapped.
    """
    _check_names(where, tensors)
    shapes = {key: tensors[key].array.shape for key in KEYS}
    found = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
    if [len(shapes[key]) for key in KEYS] != [2, 2, 1, 1] or 0 in [size for s in shapes.values() for size in s]:
        raise FormatError(f"{where}: expected two matrices and two vectors, found {found}")
    (d_sae,), (d_model,) = shapes["b_enc"], shapes["b_dec"]
    wide, tall = (d_model, d_sae), (d_sae, d_model)
    enc, dec = wide if layout == "saelens" else tall, wide if layout == "release" else tall
    if (shapes["W_enc"], shapes["W_dec"]) != (enc, dec):
        why = f"{where}: expected W_enc {enc} and W_dec {dec} from the lengths of b_enc and b_dec, found {found}"
        if enc != dec and (shapes["W_enc"], shapes["W_dec"]) == (dec, enc):
            why += "; both matrices are swapped or transposed: was the file written in another layout?"
        raise FormatError(why)
    facts = Facts(f"the tensors of {where}", d_model=d_model, d_sae=d_sae)
    w_enc, w_dec = tensors["W_enc"], tensors["W_dec"]
    if layout != "saelens":
        w_enc = w_enc.transposed()
    if layout == "release":
        w_dec = w_dec.transposed()
    return StoredSae(w_enc, tensors["b_enc"], w_dec, tensors["b_dec"], facts)


def _check_names(where: str, tensors: dict[str, StoredTensor]) -> None:
    missing, extra = [key for key in KEYS if key not in tensors], [key for key in tensors if key not in KEYS]
    if not missing and not extra:
        return
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"unknown {', '.join(key[:40] for key in extra[:6])}{', ...' if len(extra) > 6 else ''}"] if extra else []
    foreign = next((name for key, name in _FOREIGN.items() if key in tensors), None)
    hint = f"; this looks like {foreign}, which is not supported" if foreign else ""
    raise FormatError(f"{where}: expected the tensors {', '.join(KEYS)}: {'; '.join(parts)}{hint}")
