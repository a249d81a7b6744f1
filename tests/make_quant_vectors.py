"""Vectors for the block formats Q8_0 and Q4_0: tests/golden/quant/.

    python make_quant_vectors.py [OUT]

Needs numpy and the PyPI package gguf, whose quantize() its own tests hold equal to ggml's C code.
Writes x.npy (64, 256) float32, and q8_0.npy and q4_0.npy, the rows' blocks as bytes. As a check the
blocks are computed a second time here, in float32 in the order of the C code; bytes that differ
are an error. Left out on purpose: blocks whose largest magnitude is so small that 1 / d overflows
(C converts an infinity to an integer there, which means nothing), infinities and NaNs.
"""
import os
import sys

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

F32 = np.float32
F16_MAX = 65504.0


def ties(rng, steps, d):
    """Blocks whose values are whole and half multiples of d; the first sets the block's scale."""
    blocks = rng.integers(-2 * steps, 2 * steps + 1, (8, 32)).astype(F32) * F32(d / 2)
    blocks[:, 0] = -steps * F32(d)
    return blocks.reshape(-1)


def beside_halves(rng):
    """x / d within two steps of -7.5, -6.5 or -5.5: where Q4_0's x * id + 8.5 comes out different
    when a compiler fuses it, so the multiplication has to round on its own."""
    blocks = np.empty((8, 32), F32)
    for block in blocks:
        d = F32(rng.uniform(1, 2))
        block[:] = np.repeat(np.array([-7.5, -6.5, -5.5, -7.5], F32), 8) * d
        block += np.spacing(block) * rng.integers(-2, 3, 32)
        block[0] = -8 * d
    return blocks.reshape(-1)


def signed_zeros():
    """Blocks begin with +0: from -0 gguf makes a scale of +0, ggml's C reference always -0."""
    return np.where(np.arange(256) % 32 % 3 == 1, F32(-0.0), F32(0.0))


def both_extremes(rng):
    """The largest magnitude occurs with both signs: the first one sets the sign of Q4_0's scale."""
    blocks = rng.uniform(-1, 1, (8, 32))
    for i, block in enumerate(blocks):
        first, second = sorted(rng.choice(32, 2, replace=False))
        block[first], block[second] = (3.0, -3.0) if i % 2 else (-3.0, 3.0)
    return blocks.reshape(-1)


def one_sided(rng, sign):
    return sign * rng.uniform(0.01, 5, 256)


def at_scale(rng, amax):
    """Every block's largest magnitude is amax, its sign random."""
    blocks = rng.uniform(-0.9, 0.9, (8, 32)) * amax
    for block in blocks:
        block[rng.integers(32)] = amax * rng.choice([-1, 1])
    return blocks.reshape(-1)


def sparse(rng):
    x = np.zeros(256)
    x[rng.choice(256, 12, replace=False)] = rng.standard_normal(12)
    return x


def rows(rng):
    tiny = rng.uniform(-1e-38, 1e-38, 256)      # denormals beside one normal value a block
    tiny[::32] = rng.uniform(0.5, 1, 8)
    special = [
        signed_zeros(), sparse(rng), sparse(rng), tiny,
        ties(rng, 127, 1.0), ties(rng, 127, 0.25), ties(rng, 8, 1.0), ties(rng, 8, 2.0 ** -7),
        ties(rng, 127, 2.0 ** -20), ties(rng, 8, 0.3),
        beside_halves(rng), beside_halves(rng),
        both_extremes(rng), both_extremes(rng), one_sided(rng, 1), one_sided(rng, -1),
        np.full(256, 1.5), np.full(256, -1.5),
        at_scale(rng, 1e30), at_scale(rng, 3e38),
        at_scale(rng, 2e-35), at_scale(rng, 7e-37),     # d a float32 denormal, 1 / d finite
    ]
    # d around the largest f16, below and above the point where it rounds to infinity, and around
    # f16's smallest normal and denormal numbers
    for unit in (127, 8):
        for d in (F16_MAX, 65519.0, 65521.0, 6.1e-5, 6e-8, 2.97e-8, 3.0e-8):
            special.append(at_scale(rng, unit * d))
    spread = [rng.standard_normal(256) * 10.0 ** rng.uniform(-4, 3) for _ in range(20)]
    heavy = [rng.standard_t(2, 256) * 0.02 for _ in range(64 - len(special) - len(spread))]
    with np.errstate(under="ignore"):
        return np.stack(special + spread + heavy).astype(F32)


def inverse(d):
    with np.errstate(divide="ignore"):
        return np.where(d == 0, F32(0), F32(1) / d).astype(F32)


def half_bytes(d):
    with np.errstate(over="ignore", under="ignore"):
        return d.astype("<f2").view(np.uint8)


def round_away(x):
    """C's roundf; x + 0.5 would already round for the float32 just below a half."""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.copysign(F32(1), x), F32(0))


def q8_0(blocks):
    d = np.abs(blocks).max(1, keepdims=True) / F32(127)
    q = round_away(blocks * inverse(d)).astype(np.int8)
    return np.concatenate([half_bytes(d), q.view(np.uint8)], 1)


def q4_0(blocks):
    first = np.abs(blocks).argmax(1)[:, None]       # argmax gives the first of equals
    d = np.take_along_axis(blocks, first, 1) / F32(-8)
    q = np.minimum(15, (blocks * inverse(d) + F32(8.5)).astype(np.int8)).astype(np.uint8)
    return np.concatenate([half_bytes(d), q[:, :16] | q[:, 16:] << 4], 1)


def save(folder, name, array, dtype):
    with open(os.path.join(folder, name + ".npy"), "wb") as f:
        np.lib.format.write_array(f, np.ascontiguousarray(array, dtype=dtype), version=(1, 0))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "golden", "quant")
    os.makedirs(out, exist_ok=True)
    x = rows(np.random.default_rng(20240601))
    save(out, "x", x, "<f4")
    differ = 0
    for name, again in (("q8_0", q8_0), ("q4_0", q4_0)):
        with np.errstate(all="ignore"):
            blocks = quantize(x, GGMLQuantizationType[name.upper()])
            mine = again(x.reshape(-1, 32)).reshape(blocks.shape)
        for row in np.flatnonzero((blocks != mine).any(1)):
            print(f"{name}: row {row}: {(blocks[row] != mine[row]).sum()} bytes differ")
            differ += 1
        save(out, name, blocks, "|u1")
        print(name, blocks.shape)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
