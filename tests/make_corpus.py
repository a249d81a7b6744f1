#!/usr/bin/env python3
"""Makes the first inputs of the fuzz targets: python3 tests/make_corpus.py FOLDER. Standard
library only.

FOLDER/gguf gets heads of small weights files (tests/test_fuzz.c adds the data), FOLDER/cache what
`build/test_fuzz --cache FILE` writes, FOLDER/ckpt what `--ckpt FILE` does, FOLDER/lora adapters,
FOLDER/jsonl, tokens, lines, coco, layout and scores a few lines, FOLDER/tok small .tok files; images
start from tests/images. What a fuzzer found later lies there beside them.
"""
import os
import struct
import sys

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
TESTS = os.path.dirname(os.path.abspath(__file__))


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


def u32(name, v):
    return text(name) + struct.pack("<II", 4, v)


def f32(name, v):
    return text(name) + struct.pack("<If", 6, v)


def i32s(name, values):
    return text(name) + struct.pack("<IIQ%di" % len(values), 9, 5, len(values), *values)


def size(kind, n):
    return {F32: 4 * n, F16: 2 * n, Q4_0: n // 32 * 18, Q8_0: n // 32 * 34}[kind]


def head(keys, tensors):
    """tensors: (name, dims slowest first, type)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    offset = 0
    for name, dims, kind in tensors:
        out += text(name) + struct.pack("<I%dQ" % len(dims), len(dims), *dims[::-1])
        out += struct.pack("<IQ", kind, offset)
        n = 1
        for d in dims:
            n *= d
        offset = (offset + size(kind, n) + 31) // 32 * 32
    return out


COMMON = [text("general.architecture") + struct.pack("<I", 8) + text("lvm"), u32("lvm.format_version", 1)]


def llama(kind, D=32, H=2, G=1, F=32, V=40, context=600, layers=1, bos=True, bias=True):
    keys = [u32("lvm.context_length", context), u32("lvm.embedding_length", D),
            u32("lvm.block_count", layers), u32("lvm.feed_forward_length", F), u32("lvm.vocab_size", V),
            u32("lvm.attention.head_count", H), u32("lvm.attention.head_count_kv", G),
            f32("lvm.attention.layer_norm_rms_epsilon", 1e-5), f32("lvm.rope.freq_base", 10000.0)]
    if bos:
        keys.append(u32("lvm.bos_token_id", V - 1))
    d, tensors = D // H, [("token_embd.weight", (V, D), kind), ("output_norm.weight", (D,), F32)]
    for i in range(layers):
        b = "blk.%d." % i
        tensors += [(b + "attn_norm.weight", (D,), F32), (b + "ffn_norm.weight", (D,), F32),
                    (b + "attn_q.weight", (H * d, D), kind), (b + "attn_k.weight", (G * d, D), kind),
                    (b + "attn_v.weight", (G * d, D), kind), (b + "attn_output.weight", (D, H * d), kind),
                    (b + "ffn_gate.weight", (F, D), kind), (b + "ffn_up.weight", (F, D), kind),
                    (b + "ffn_down.weight", (D, F), kind)]
        if bias:
            tensors.append((b + "attn_q.bias", (H * d,), F32))
    return keys, tensors


def vqgan(kind, R=4, mult=(1, 1), blocks=1, attn=(4,), z=4, e=4, codes=32, hidden=32):
    keys = [u32("lvm.vq.resolution", R), u32("lvm.vq.hidden_channels", hidden),
            u32("lvm.vq.num_res_blocks", blocks), u32("lvm.vq.z_channels", z),
            u32("lvm.vq.num_embeddings", codes), u32("lvm.vq.quantized_embed_dim", e),
            u32("lvm.vq.no_attn_mid_block", 0), i32s("lvm.vq.channel_mult", mult),
            i32s("lvm.vq.attn_resolutions", attn)]
    t = []

    def norm(name, c):
        t.extend([(name + ".weight", (c,), F32), (name + ".bias", (c,), F32)])

    def conv(name, i, o, k):
        t.extend([(name + ".weight", (o, k, k, i), kind if i % 32 == 0 else F16), (name + ".bias", (o,), F32)])

    def res(name, i, o):
        norm(name + "norm1", i)
        conv(name + "conv1", i, o, 3)
        norm(name + "norm2", o)
        conv(name + "conv2", o, o, 3)
        if i != o:
            conv(name + "nin_shortcut", i, o, 1)

    def attention(name, c):
        norm(name + "norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(name + part, c, c, 1)

    last, c_mid = len(mult) - 1, hidden * mult[-1]
    for half, c_in, first, end, c_out in (("vq.encoder.", 3, hidden, c_mid, z),
                                          ("vq.decoder.", z, c_mid, hidden * mult[0], 3)):
        conv(half + "conv_in", c_in, first, 3)
        norm(half + "norm_out", end)
        conv(half + "conv_out", end, c_out, 3)
        res(half + "mid.block_1.", c_mid, c_mid)
        res(half + "mid.block_2.", c_mid, c_mid)
        attention(half + "mid.attn_1.", c_mid)
    for i in range(len(mult)):
        for half, n in (("vq.encoder.down.%d." % i, blocks), ("vq.decoder.up.%d." % i, blocks + 1)):
            down = half.startswith("vq.e")
            c = hidden * mult[i]
            before = hidden * (1 if i == 0 else mult[i - 1]) if down else hidden * mult[min(i + 1, last)]
            for b in range(n):
                res(half + "block.%d." % b, before if b == 0 else c, c)
                if R >> i in attn and n > 1:
                    attention(half + "attn.%d." % b, c)
            if down and i < last:
                conv(half + "downsample.conv", c, c, 3)
            if not down and i > 0:
                conv(half + "upsample.conv", c, c, 3)
    conv("vq.quant_conv", z, e, 1)
    conv("vq.post_quant_conv", e, z, 1)
    t.append(("vq.quantize.embedding.weight", (codes, e), F32))
    return keys, t


def save(folder, target, name, data):
    os.makedirs(os.path.join(folder, target), exist_ok=True)
    with open(os.path.join(folder, target, name), "wb") as f:
        f.write(data)


def file_of(*parts):
    return head(COMMON + sum((p[0] for p in parts), []), sum((p[1] for p in parts), []))


def write_lora(folder):
    """Of rank 2, on two matrices of the little model (tests/trainer.h); whole files."""
    keys = COMMON + [text("general.type") + struct.pack("<I", 8) + text("adapter"),
                     text("adapter.type") + struct.pack("<I", 8) + text("lora"),
                     f32("adapter.lora.alpha", 4.0)]
    for name, kind, number in (("f32", F32, "<f"), ("f16", F16, "<e")):
        halves = [(matrix + ".weight.lora_" + half, (2, cols) if half == "a" else (rows, 2), kind)
                  for matrix, rows, cols in (("blk.0.attn_q", 32, 32), ("blk.1.ffn_down", 32, 64))
                  for half in "ab"]
        data = b""
        for _, (rows, cols), _ in halves:
            part = b"".join(struct.pack(number, (i % 7 - 3) / 16) for i in range(rows * cols))
            data += part + bytes(-len(part) % 32)
        start = head(keys, halves)
        save(folder, "lora", name, start + bytes(-len(start) % 32) + data)


def write_gguf(folder):
    for name, kind in (("f16", F16), ("q8_0", Q8_0), ("q4_0", Q4_0), ("f32", F32)):
        save(folder, "gguf", "llama_" + name, file_of(llama(kind)) + b"\x01")
    save(folder, "gguf", "llama_wide", file_of(llama(F16, D=40, H=4, G=2, layers=2, bos=False, bias=False)) + b"\x02")
    save(folder, "gguf", "vqgan_f16", file_of(vqgan(F16)) + b"\x01")
    save(folder, "gguf", "both_nan", file_of(llama(Q8_0, context=40), vqgan(Q8_0)) + b"\x03")
    save(folder, "gguf", "both_q8_0", file_of(llama(Q8_0, context=40), vqgan(Q8_0, mult=(1, 2, 1), attn=())) + b"\x01")
    save(folder, "gguf", "both_zero", file_of(llama(F16, context=9), vqgan(F16, blocks=2, attn=(4, 2))) + b"\x00")


def write_text(folder):
    save(folder, "jsonl", "targets", b'{"input": ["a.png", [1, 2]], "target": "b.png"}\n'
         b'{"input_tokens": [1, 2, 3, 4], "output_tokens": [[5, 6]], "x": [{"y": null}, -1.5e3]}\n')
    save(folder, "jsonl", "puzzle", b'{"input_tokens": "AQAAAAIAAAA=", "choices": ["\\u00e9\\ud83d\\udc0b", '
         b'"\\n"], "answer": 1, "output": "c.png"}\n\n')
    save(folder, "jsonl", "rules", b'{"input": null, "input_tokens": [1.0, 2e0], "target": [3, 4], '
         b'"output": "./a.jpg", "score": NaN, "x": [Infinity, -Infinity]}\n{"input": [], "choices": ["a"], "answer": 0.0, "Inputs": 1}\n')
    save(folder, "jsonl", "faults", b'{"input": ["a",]}\n{"input": [], "input_tokens": []}\n{"target": "a", '
         b'"output": ["a"]}\n{"x": 1, "x": {},}\n{\'input\': None}\n{"input": ["a"\n\xff\xfe{\x00\n'
         b'{"answer": 1e999, "input": [""]}\n')
    save(folder, "coco", "all", b'{"info": [1, {"x": null}], "annotations": [{"image_id": 3, "category_id": 2, '
         b'"bbox": [1, 2, 3.5, 1e0], "segmentation": [[1, 1, 7, 1, 7, 5]], "iscrowd": 0, "keypoints": [' +
         b", ".join(b"%d, %d, 2" % (i % 9, i % 6) for i in range(17)) + b']}, {"image_id": 3, "iscrowd": 1, '
         b'"segmentation": {"size": [6, 9], "counts": [20, 8, 26]}}, {"image_id": 1, "segmentation": '
         b'{"counts": "d08j0", "size": [6, 9]}}, {"image_id": 77}],\n "images": [{"id": 3, "file_name": '
         b'"x/a.jpg"}, {"file_name": "b.png", "id": 1.0}, {"id": 4, "file_name": "c"}], "categories": [{"id": 2}]}')
    save(folder, "coco", "faults", b'{"images": [{"id": 1e999}]}')
    save(folder, "layout", "lines", b'a.png b "*a.png"\n# no\n\t b b\tb\nc.png\n** a *b\n"a\n')
    save(folder, "tokens", "two", b"1 2 3 4\n5 6 70 8\n")
    save(folder, "tokens", "bad", b"1 -2 x\n99999999999\n")
    save(folder, "scores", "palette", b"#ff0000\n\n0 204 0 green\n26, 77,255\n255\t255 0\n")
    save(folder, "scores", "detection", b"q s 7 20 10 2 2 9 9 9 9 0 0 3 3\n")
    save(folder, "scores", "colorization", b"n01/a.png n01/b.png\n")
    outline = bytearray(b"\x20" * (2 * 3 * 16 * 14))   # two images with a red box in each
    for y in range(28):
        for x in range(16):
            if 2 <= x <= 13 and (x in (2, 3, 12, 13) or y % 14 in (2, 3, 10, 11)) and 2 <= y % 14 <= 11:
                outline[3 * (16 * y + x):3 * (16 * y + x) + 3] = b"\xff\0\0"
    save(folder, "scores", "boxes", bytes(outline))


def tok(sentences, weights=None, image=0, bound=None):
    """A .tok file by the drawing in chapter 8."""
    def part(data):
        return data + bytes(-len(data) % 64)

    ids = [i for s in sentences for i in s]
    starts = [sum(map(len, sentences[:i])) for i in range(len(sentences) + 1)]
    out = part(b"LVM.tok\n" + struct.pack("<I", 1)) + part(struct.pack("<%dH" % len(ids), *ids))
    if weights is not None:
        out += part(bytes(weights))
    out += part(struct.pack("<%dQ" % len(starts), *starts))
    return out + struct.pack("<QQIII28x", len(sentences), len(ids), max(ids + [-1]) + 1 if bound is None else bound,
                             image, weights is not None) + b"LVM.tok\n"


def write_training(folder):
    save(folder, "tok", "plain", tok([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]))
    save(folder, "tok", "weights", tok([[1, 2], [3, 65535]], [0, 16, 255, 1], 2))
    save(folder, "tok", "none", tok([]))
    save(folder, "tok", "bound", tok([[1, 2], [9, 9, 3]], bound=9))
    save(folder, "tok", "many", tok([[i, i + 1] for i in range(40)], [16] * 80, 1))
    save(folder, "lines", "forms", b'{"tokens": [5, 1, 2, 6]}\n{"tokens": "AQAAAAIAAAA="}\n'
         b'{"input_tokens": [[1, 2], [3]], "output": [4, 7], "x": {"y": [null]}}\n')
    save(folder, "lines", "weights", b'{"tokens": [5, 1, 2], "weights": [16, 0, 255]}\n'
         b'{"input": "AQAAAA==", "target_tokens": [2], "weights": "AP8=", "image_tokens": 2}\n ')
    save(folder, "lines", "faults", b'{"tokens": [65536]}\n{"tokens": [5, 6]}\n{"token": [1]}\n{"input": ["a.png"], '
         b'"output": []}\n{"tokens": [1], "weights": [256]}\n{"tokens": "AAA"}\n[1]\n{"tokens": [1, 5, 2]}\n'
         b'{"tokens": [7]}\n')


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: make_corpus.py FOLDER")
    write_gguf(sys.argv[1])
    write_lora(sys.argv[1])
    write_text(sys.argv[1])
    write_training(sys.argv[1])


if __name__ == "__main__":
    main()
