#!/usr/bin/env python3
"""Writes the transformer of a weights file as a GGUF file of llama.cpp, to measure side by side:

    python3 tests/bench/make_gguf.py weights.bin llama.gguf
    python3 tests/bench/make_gguf.py --config 300m --type q8_0 random.gguf
    llama-bench -m llama.gguf

Standard library only. Every number stays as it is, quantised ones too; only the rows of Q and K
change places: lvm turns the halves of a head together (row j with row j + head_dim / 2), llama.cpp
turns neighbours (rows 2j and 2j + 1). Its vocabulary is a stand-in of the right size. --config in
place of a weights file makes random weights of the shape and types that `lvm bench` makes.
"""

import argparse
import os
import random
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.dont_write_bytecode = True
import convert  # noqa: E402

NORMAL, BYTE = 1, 6         # llama.cpp's types of tokens

# Layers, width, feed-forward width, heads: lvm.c's shape_table.
CONFIGS = {"100m": (22, 640, 1664, 10), "300m": (22, 1024, 2688, 8), "600m": (22, 1536, 4096, 16),
           "1b": (22, 2048, 5504, 16), "3b": (26, 3200, 8640, 32), "7b": (32, 4096, 11008, 32)}
VOCABULARY, CONTEXT = 8292, 4352


def array_key(name, kind, count, body):
    return convert.gguf_string(name) + struct.pack("<IIQ", convert.GGUF_ARRAY, kind, count) + body


def vocabulary(size, special):
    """Keys of a vocabulary that loads: 256 bytes, as far as they fit, and numbered words."""
    n_bytes = min(size, 256)
    words = ["<0x%02X>" % n for n in range(n_bytes)] + ["w%d" % n for n in range(n_bytes, size)]
    types = [BYTE] * n_bytes + [NORMAL] * (size - n_bytes)
    keys = [convert.gguf_key("tokenizer.ggml.model", convert.GGUF_STRING, "llama"),
            array_key("tokenizer.ggml.tokens", convert.GGUF_STRING, size,
                      b"".join(map(convert.gguf_string, words))),
            array_key("tokenizer.ggml.scores", convert.GGUF_F32, size, bytes(4 * size)),
            convert.gguf_key("tokenizer.ggml.token_type", convert.GGUF_ARRAY, types),
            convert.gguf_key("tokenizer.ggml.add_bos_token", convert.GGUF_BOOL, False)]
    for name, number in special.items():
        keys.append(convert.gguf_key("tokenizer.ggml." + name, convert.GGUF_U32, number))
    return keys


def model_keys(config, special):
    keys = [convert.gguf_key("general.architecture", convert.GGUF_STRING, "llama"),
            convert.gguf_key("general.alignment", convert.GGUF_U32, convert.ALIGN)]
    for key in convert.LLAMA_KEYS:
        keys.append(convert.gguf_key(key.gguf.replace("lvm.", "llama.", 1), key.kind,
                                     config[key.hf]))
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    keys.append(convert.gguf_key("llama.rope.dimension_count", convert.GGUF_U32, head_dim))
    return keys + vocabulary(config["vocab_size"], special)


def neighbours(data, rows, head_dim):
    """The rows of every head in the order 0, h, 1, h + 1, ... where h is half of head_dim."""
    size, view, half = len(data) // rows, memoryview(data), head_dim // 2
    order = (head + j + part for head in range(0, rows, head_dim)
             for j in range(half) for part in (0, half))
    return b"".join(view[row * size:(row + 1) * size] for row in order)


def pieces(keys, jobs, head_dim):
    """The whole file."""
    yield convert.gguf_head(keys, jobs)
    for job in jobs:
        if ".attn_q." in job.name or ".attn_k." in job.name:
            yield neighbours(b"".join(convert.chunks(job.source)), job.shape[0], head_dim)
        else:
            yield from convert.chunks(job.source)
        yield convert.padding(job.source.nbytes)


def save(output, data, inputs, force):
    with convert.Outputs(inputs, force, True) as outputs:
        outputs.open(output)
        outputs.write(output, data)
        outputs.commit()


def random_block(dtype, rng):
    """32 weights that a trained model might have: uniform within 0.06."""
    if dtype == "Q8_0":
        return struct.pack("<e", rng.uniform(3e-4, 6e-4)) + rng.randbytes(32)
    return struct.pack("<e", rng.uniform(5e-3, 1e-2)) + rng.randbytes(16)


def random_pieces(keys, jobs):
    """The whole file; the rows of a matrix repeat the same few thousand blocks."""
    rng = random.Random(1)
    blocks = {dtype: b"".join(random_block(dtype, rng) for _ in range(5000))
              for dtype in ("Q8_0", "Q4_0")}
    blocks["F32"] = struct.pack("<f", 1) * 5000
    yield convert.gguf_head(keys, jobs)
    for job in jobs:
        size = convert.nbytes(job.dtype, job.shape)
        source = blocks[job.dtype]
        for start in range(0, size, len(source)):
            yield source[:size - start]
        yield convert.padding(size)


def make_random(name, dtype, output, force):
    layers, width, feed_forward, heads = CONFIGS[name]
    config = {"max_position_embeddings": CONTEXT, "hidden_size": width,
              "num_hidden_layers": layers, "intermediate_size": feed_forward,
              "vocab_size": VOCABULARY, "num_attention_heads": heads,
              "num_key_value_heads": heads, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    jobs = []
    for spec in convert.llama_specs(config, tied=False):
        if spec.group is not None:
            continue
        kind = "Q8_0" if spec.gguf == "output.weight" else dtype
        jobs.append(convert.Job(spec.gguf, "F32" if len(spec.shape) == 1 else kind, spec.shape,
                                None, None))
    save(output, random_pieces(model_keys(config, {}), jobs), set(), force)


def make(weights, output, force):
    keys, tensors = convert.read_gguf(weights)
    tensors = {name: t for name, t in tensors.items() if not name.startswith("vq.")}
    config = convert.llama_config(weights, keys, "gguf")
    tied = "output.weight" not in tensors
    pairs = convert.match(weights, convert.llama_specs(config, tied), tensors, "gguf",
                          tuple(convert.TYPES))
    jobs = [convert.Job(t.name, t.dtype, t.shape, t, None) for _, t in pairs]
    special = convert.read_config(
        weights, keys, [key for key in convert.TOKEN_KEYS if key.gguf in keys], "gguf")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    save(output, pieces(model_keys(config, special), jobs, head_dim), {weights}, force)


def main(argv):
    parser = argparse.ArgumentParser(prog="make_gguf.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", help="a weights file of lvm")
    parser.add_argument("output", help="the GGUF file to write")
    parser.add_argument("--config", choices=CONFIGS, help="random weights of this shape instead")
    parser.add_argument("--type", choices=("q8_0", "q4_0"), default="q8_0",
                        help="of the random weights (q8_0)")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    if (args.weights is None) == (args.config is None):
        parser.error("give a weights file or --config")
    try:
        if args.config:
            make_random(args.config, args.type.upper(), args.output, args.force)
        else:
            make(args.weights, args.output, args.force)
    except (convert.Bad, OSError) as fault:
        print("make_gguf.py: %s" % fault, file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
