"""Steering written down a second time, token by token in float64, from the table of `qscope_jax.steering`."""

import numpy as np


def chosen(rule, position, prompt_length):
    """Whether a rule means the token at `position` of a text whose first `prompt_length` tokens were given."""
    for term in rule.split(","):
        if term in ("all", "prompt", "generated", "last"):
            generated = position >= prompt_length
            last = position == prompt_length - 1
            if {"all": True, "prompt": not generated, "generated": generated, "last": last}[term]:
                return True
        else:
            low, _, high = term.partition("-")
            if int(low) <= position <= int(high or low):
                return True
    return False


def activation(sae, vector, feature):
    """relu(top-k(x w_enc + b_enc)) of one feature; ties go to the lowest index."""
    pre = vector @ np.asarray(sae.params.w_enc, np.float64) + np.asarray(sae.params.b_enc, np.float64)
    kept = np.argsort(-pre, kind="stable")[: sae.config.k]
    return max(pre[feature], 0.0) if feature in kept else 0.0


def delta(entry, sae, vector):
    """What one entry, whose strength is raw, adds to one token."""
    d = np.asarray(entry.direction if entry.feature is None else sae.params.w_dec[entry.feature], np.float64)
    a = activation(sae, vector, entry.feature) if entry.feature is not None else 0.0
    if entry.mode == "project":
        u = d / np.linalg.norm(d)
        return (entry.strength - vector @ u) * u
    s = entry.strength
    coefficient = {
        "add": lambda: s,
        "clamp": lambda: s - a,
        "min-clamp": lambda: max(s - a, 0.0),
        "ablate": lambda: -a,
        "scale": lambda: (s - 1) * a,
    }[entry.mode]()
    return coefficient * d


def steer_layer(h, entries, layer, saes, positions, prompt_lengths, mask):
    """h [b, t, d] after one layer's entries (a list per row), and the tokens [b, t] that changed."""
    h = np.asarray(h, np.float64)
    out, moved = h.copy(), np.zeros(h.shape[:2], bool)
    for b, t in zip(*np.nonzero(mask), strict=True):
        vector, total, keep = h[b, t], 0.0, False
        for entry in entries[b]:
            if entry.layer == layer and chosen(entry.positions, positions[b, t], prompt_lengths[b]):
                change = delta(entry, saes.get(layer), vector)
                total, keep = total + change, keep or (entry.preserve_norm and bool(np.any(change)))
        if np.any(total):
            steered = vector + total
            if keep:
                steered *= np.linalg.norm(vector) / np.linalg.norm(steered)
            out[b, t], moved[b, t] = steered, True
    return out, moved
