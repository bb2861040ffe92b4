"""Writes continuations.safetensors beside the tiny checkpoints of `make_goldens.py`: what `transformers.generate` adds.

Needs torch. `python scripts/make_continuations.py [FOLDER]`; tests of generation use the functions on other prompts.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_goldens import CLEAR_MARGIN, CONFIGS, FOLDER, LENGTHS, clear_rows, read_back
from transformers import GenerationConfig

from qscope_jax.files.tensors import write_tensors

NEW = 16


def generate(model: Any, tokens: np.ndarray, mask: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """What `transformers.generate` greedily adds to prompts padded left.

    `tokens` [b, new], `logprobs` [b, new] of them under the model's own distribution, `lengths` [b], and the least
    `margin` [1] of a token over the second likeliest.

    Behind a row's end stand pads (the first eos id) and zeros. Options are those of GenerationConfig.
    """
    eos = options.pop("eos_token_id", [])
    pad = eos[0] if eos else 0
    model.generation_config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=eos or None, pad_token_id=pad, output_scores=True,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    out = model.generate(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
    chosen = out.sequences[:, tokens.shape[1] :]
    width = chosen.shape[1]  # of the longest row
    ends = np.isin(chosen.numpy(), eos)
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, width).astype(np.int32)
    own = np.arange(width) < lengths[:, None]
    picked = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    found, logprobs = np.full((len(tokens), NEW), pad, np.int32), np.zeros((len(tokens), NEW), np.float32)
    found[:, :width], logprobs[:, :width] = chosen.numpy(), np.where(own, picked.numpy(), 0)
    two = torch.stack(out.scores, 1).topk(2).values.numpy()[own]
    return {"tokens": found, "logprobs": logprobs, "lengths": lengths, "margin": (two[:, :1] - two[:, 1:]).min(0)}


def continuations(model: Any, lengths: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """Prompts padded left and what follows them: `greedy`, with a `penalty`, and with three ids as `eos`.

    Of the first seed, from `seed` on, that leaves no doubt about any token, and whose rows end at different places.
    """
    for attempt in itertools.count(seed):
        tokens, mask = clear_rows(model, lengths, "left", attempt)
        cases = {"greedy": generate(model, tokens, mask)}
        eos = [int(cases["greedy"]["tokens"][0, 5]), int(cases["greedy"]["tokens"][1, 9]), model.config.vocab_size - 1]
        cases["penalty"] = generate(model, tokens, mask, repetition_penalty=1.3)
        cases["eos"] = generate(model, tokens, mask, eos_token_id=eos)
        spread = sorted(cases["eos"]["lengths"])
        if min(case["margin"][0] for case in cases.values()) > CLEAR_MARGIN and 2 < spread[0] < spread[1] < spread[2]:
            arrays = {f"{name}/{key}": array for name, case in cases.items() for key, array in case.items()}
            return arrays | {"prompts": tokens, "mask": mask, "eos_ids": np.array(eos, np.int32)}
    raise AssertionError("the seeds do not end")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for family in CONFIGS:
        place = folder / f"{family}_tiny"
        write_tensors(place / "continuations.safetensors", continuations(read_back(place), LENGTHS[family], seed=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
