"""Qwen-Scope for JAX: Qwen backbones, TopK sparse autoencoders and the tools built on them.

The public names are here; each is imported when it is first used, so that `qscope --help` does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qscope_jax.api import FeatureExplorer as FeatureExplorer
    from qscope_jax.api import Intervention as Intervention
    from qscope_jax.api import SAEModel as SAEModel
    from qscope_jax.backbone.cache import Cache as Cache
    from qscope_jax.backbone.cache import init_cache as init_cache
    from qscope_jax.backbone.config import ModelConfig as ModelConfig
    from qscope_jax.backbone.forward import ForwardOutput as ForwardOutput
    from qscope_jax.backbone.forward import forward as forward
    from qscope_jax.backbone.forward import init_params as init_params
    from qscope_jax.backbone.weights import Backbone as Backbone
    from qscope_jax.backbone.weights import load_backbone as load_backbone
    from qscope_jax.backbone.weights import save_backbone as save_backbone
    from qscope_jax.data.store import FeatureStore as FeatureStore
    from qscope_jax.data.tokenizer import load_tokenizer as load_tokenizer
    from qscope_jax.features.discovery import discover as discover
    from qscope_jax.features.files import load_statistics as load_statistics
    from qscope_jax.generation import GenerateOutput as GenerateOutput
    from qscope_jax.generation import Taps as Taps
    from qscope_jax.generation import generate as generate
    from qscope_jax.generation import pad_left as pad_left
    from qscope_jax.mesh import make_mesh as make_mesh
    from qscope_jax.mesh import start_distributed as start_distributed
    from qscope_jax.sae.formats import load_sae as load_sae
    from qscope_jax.sae.formats import load_saes as load_saes
    from qscope_jax.sae.formats import save_sae as save_sae
    from qscope_jax.sae.model import Sae as Sae
    from qscope_jax.sae.model import SaeConfig as SaeConfig
    from qscope_jax.sae.model import SaeParams as SaeParams
    from qscope_jax.sae.model import SparseCode as SparseCode
    from qscope_jax.sae.model import decode as decode
    from qscope_jax.sae.model import encode as encode
    from qscope_jax.sae.model import from_dense as from_dense
    from qscope_jax.sae.model import init_sae as init_sae
    from qscope_jax.sae.model import to_dense as to_dense
    from qscope_jax.steering import Applied as Applied
    from qscope_jax.steering import Steer as Steer
    from qscope_jax.steering import count_applied as count_applied
    from qscope_jax.steering import load_recipe as load_recipe
    from qscope_jax.steering import save_recipe as save_recipe
    from qscope_jax.steering import steer as steer
    from qscope_jax.taps import Tap as Tap
    from qscope_jax.taps import chain as chain

_MODULES = {
    "api": ("FeatureExplorer", "Intervention", "SAEModel"),
    "backbone.cache": ("Cache", "init_cache"),
    "backbone.config": ("ModelConfig",),
    "backbone.forward": ("ForwardOutput", "forward", "init_params"),
    "backbone.weights": ("Backbone", "load_backbone", "save_backbone"),
    "data.store": ("FeatureStore",),
    "data.tokenizer": ("load_tokenizer",),
    "features.discovery": ("discover",),
    "generation": ("GenerateOutput", "Taps", "generate", "pad_left"),
    "mesh": ("make_mesh", "start_distributed"),
    "sae.formats": ("load_sae", "load_saes", "save_sae"),
    "sae.model": (
        "Sae",
        "SaeConfig",
        "SaeParams",
        "SparseCode",
        "decode",
        "encode",
        "from_dense",
        "init_sae",
        "to_dense",
    ),
    "features.files": ("load_statistics",),
    "steering": ("Applied", "Steer", "count_applied", "load_recipe", "save_recipe", "steer"),
    "taps": ("Tap", "chain"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
