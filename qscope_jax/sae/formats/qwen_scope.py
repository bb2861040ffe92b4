"""The release's own files: `layer{n}.sae.pt`, a torch pickle of W_enc (d_sae, d_model), W_dec (d_model, d_sae), biases.

The format has no place for k, layer or backbone: names and config.json carry them.
"""

from pathlib import Path

import numpy as np

from qscope_jax.mesh import to_host
from qscope_jax.sae.formats.matrices import StoredSae, check_matrices
from qscope_jax.sae.formats.torch_pickle import open_torch
from qscope_jax.sae.formats.torch_write import write_torch
from qscope_jax.sae.model import Sae, SaeParams

ENDING = ".sae.pt"


def read(path: Path) -> StoredSae:
    """The SAE in a release file, not yet read.

    Raises:
      FormatError: see `open_torch` and `check_matrices`.
    """
    return check_matrices(str(path), open_torch(path), "release")


def write(sae: Sae, path: Path) -> None:
    """Writes a release file; `torch.load` and the release's example read it unchanged."""
    write_torch(path, release_arrays(sae.params))


def release_arrays(params: SaeParams) -> dict[str, np.ndarray]:
    """The tensors under the release's names and in its orientation, on the host (see `to_host`), matrices as views."""
    w_enc, b_enc, w_dec, b_dec = map(to_host, params)
    return {"W_enc": w_enc.T, "W_dec": w_dec.T, "b_enc": b_enc, "b_dec": b_dec}
