"""What both torch packages share here: settings, timing, and folding into a = relu(topk(x W_enc + b_enc)).

Both subtract the decoder bias from their input: (x - b_dec) W + b = x W + (b - b_dec W).
"""

import argparse
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activations import Activations
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
CHECKED = 8_192  # held-out tokens on which the folded form must equal the package's own forward


def arguments(description: str, config: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / config)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a TOML line over the config")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="0: as many as the activations give")
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    parsed.out.mkdir(parents=True, exist_ok=True)
    return parsed


def settings(parsed: argparse.Namespace) -> dict[str, Any]:
    config = tomllib.loads(parsed.config.read_text())
    for line in parsed.set:
        for key, value in tomllib.loads(line).items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def steps_of(parsed: argparse.Namespace, acts: Activations, batch: int) -> int:
    found = acts.count("train") // batch
    if parsed.steps > found:
        raise SystemExit(f"{parsed.acts} holds {found} batches of {batch} tokens, --steps asks for {parsed.steps}")
    return parsed.steps or found


def fold(w_enc: torch.Tensor, b_enc: torch.Tensor, w_dec: torch.Tensor, b_dec: torch.Tensor) -> Tensors:
    """float64 weights of the form above, from w_enc [d, f] and w_dec [f, d] of an SAE that subtracts b_dec first."""
    w_enc, b_enc, w_dec, b_dec = (t.detach().double() for t in (w_enc, b_enc, w_dec, b_dec))
    return {"w_enc": w_enc, "b_enc": b_enc - b_dec @ w_enc, "w_dec": w_dec, "b_dec": b_dec}


def reconstruct(p: Tensors, x: torch.Tensor, k: int) -> torch.Tensor:
    values, indices = torch.topk(x @ p["w_enc"] + p["b_enc"], k, dim=-1)
    acts = torch.zeros(len(x), len(p["b_enc"]), dtype=x.dtype).scatter_(1, indices, values.relu())
    return acts @ p["w_dec"] + p["b_dec"]


@torch.no_grad()
def store(
    path: Path, p: Tensors, own: Callable[[torch.Tensor], torch.Tensor], acts: Activations, facts: dict[str, Any]
) -> None:
    """Writes one SAE and its facts, after its folded form was found equal to `own`, its package's forward in float64.

    Raises:
      SystemExit: they differ by more than 1e-9 of the activations' size.
    """
    x = torch.from_numpy(acts.rows(facts["layer"], "heldout", 0, CHECKED)).double()
    theirs, ours = own(x), reconstruct(p, x, facts["k"])
    apart = float((theirs - ours).abs().max() / x.square().mean().sqrt())
    if apart > 1e-9:
        raise SystemExit(
            f"{path}: the folded SAE is {apart:.1e} of the activations away from its package's own forward"
        )
    fvu = float((x - theirs).square().sum() / (x - x.mean(0)).square().sum())
    save_file({name: t.float().contiguous() for name, t in p.items()}, str(path.with_suffix(".safetensors")))
    facts = {**facts, "own_fvu": fvu, "own_tokens": CHECKED, "folded_apart": apart}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{path.name}: FVU {fvu:.5f} on {CHECKED} held-out tokens", flush=True)
