#!/usr/bin/env python3
"""Writes the transformer of a weights file as a GGUF file of llama.cpp, to measure side by side:

    python3 tests/bench/make_gguf.py weights.bin llama.gguf
    llama-bench -m llama.gguf

Standard library only. Every number stays as it is, quantised ones too; only the rows of Q and K
change places: lvm turns the halves of a head together (row j with row j + head_dim / 2), llama.cpp
turns neighbours (rows 2j and 2j + 1). Its vocabulary is a stand-in of the right size.
"""

import argparse
import os
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.dont_write_bytecode = True
import convert  # noqa: E402

NORMAL, BYTE = 1, 6         # llama.cpp's types of tokens


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
    with convert.Outputs({weights}, force, True) as outputs:
        outputs.check(output)
        outputs.write(output, pieces(model_keys(config, special), jobs, head_dim))
        outputs.commit()


def main(argv):
    parser = argparse.ArgumentParser(prog="make_gguf.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a weights file of lvm")
    parser.add_argument("output", help="the GGUF file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    try:
        make(args.weights, args.output, args.force)
    except (convert.Bad, OSError) as fault:
        print("make_gguf.py: %s" % fault, file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
