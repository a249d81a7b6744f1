#!/usr/bin/env python3
"""Tests of convert.py: python3 tests/test_convert.py. Standard library only; needs no C program.

Small made-up checkpoints go through convert.py and back; a reader written for this test alone looks
at the weights file in between. Damaged inputs must end in a message: no traceback, no output. With
LVM_REFERENCE set to a folder that holds llama/ and tokenizer/, these make the round trip too.
"""

import contextlib
import io
import json
import math
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import unittest

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TOP)
sys.dont_write_bytecode = True
import convert  # noqa: E402

SIZE = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F64": 8, "F8_E4M3": 1}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 80,
         "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
         "torch_dtype": "float16"}
VQGAN = {"_class_name": "VQGANModel", "resolution": 16, "num_channels": 3, "hidden_channels": 32,
         "channel_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8],
         "no_attn_mid_block": False, "z_channels": 8, "num_embeddings": 64,
         "quantized_embed_dim": 4, "resample_with_conv": True}


# ---- made-up checkpoints -------------------------------------------------------------------------

TAME = bytes(b & 0xBF for b in range(256))  # clears the top bit of every float's exponent: |x| < 2


def numbers(rng, dtype, n):
    """n finite values as bytes."""
    size = SIZE[dtype]
    raw = bytearray(rng.getrandbits(8 * size * n + 8).to_bytes(size * n + 1, "little")[:-1])
    raw[size - 1::size] = raw[size - 1::size].translate(TAME)
    return bytes(raw)


def llama_shapes(c, biases=""):
    d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    k = d // c["num_attention_heads"] * c.get("num_key_value_heads", c["num_attention_heads"])
    shapes = {"model.embed_tokens.weight": [v, d], "model.norm.weight": [d]}
    for n in range(c["num_hidden_layers"]):
        at = "model.layers.%d." % n
        shapes.update({at + "input_layernorm.weight": [d],
                       at + "post_attention_layernorm.weight": [d],
                       at + "mlp.gate_proj.weight": [f, d], at + "mlp.up_proj.weight": [f, d],
                       at + "mlp.down_proj.weight": [d, f]})
        for letter, rows in (("q", d), ("k", k), ("v", k), ("o", d)):
            shapes[at + "self_attn.%s_proj.weight" % letter] = [rows, d]
            if letter in biases:
                shapes[at + "self_attn.%s_proj.bias" % letter] = [rows]
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [v, d]
    return shapes


class Modules(dict):
    """Builds the tokenizer's parameter shapes the way its class builds its modules."""

    def conv(self, name, i, o, k):
        self[name + ".weight"], self[name + ".bias"] = [o, i, k, k], [o]

    def norm(self, name, n):
        self[name + ".weight"] = self[name + ".bias"] = [n]

    def res(self, name, i, o):
        self.norm(name + ".norm1", i)
        self.conv(name + ".conv1", i, o, 3)
        self.norm(name + ".norm2", o)
        self.conv(name + ".conv2", o, o, 3)
        if i != o:
            self.conv(name + ".nin_shortcut", i, o, 1)

    def attn(self, name, n):
        self.norm(name + ".norm", n)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(name + "." + part, n, n, 1)

    def mid(self, name, n, attn):
        self.res(name + ".block_1", n, n)
        if attn:
            self.attn(name + ".attn_1", n)
        self.res(name + ".block_2", n, n)


def vqgan_shapes(c):
    m, ch, mult = Modules(), c["hidden_channels"], c["channel_mult"]
    levels, top, attn = len(mult), ch * mult[-1], c["attn_resolutions"]
    attn = [attn] if isinstance(attn, int) else attn
    m.conv("encoder.conv_in", 3, ch, 3)
    width, size = ch, c["resolution"]
    for n in range(levels):
        for j in range(c["num_res_blocks"]):
            m.res("encoder.down.%d.block.%d" % (n, j), width, ch * mult[n])
            width = ch * mult[n]
            if size in attn:
                m.attn("encoder.down.%d.attn.%d" % (n, j), width)
        if n < levels - 1:
            size //= 2
            if c["resample_with_conv"]:
                m.conv("encoder.down.%d.downsample.conv" % n, width, width, 3)
    m.mid("encoder.mid", top, not c["no_attn_mid_block"])
    m.norm("encoder.norm_out", top)
    m.conv("encoder.conv_out", top, c["z_channels"], 3)
    m.conv("quant_conv", c["z_channels"], c["quantized_embed_dim"], 1)
    m["quantize.embedding.weight"] = [c["num_embeddings"], c["quantized_embed_dim"]]
    m.conv("post_quant_conv", c["quantized_embed_dim"], c["z_channels"], 1)
    m.conv("decoder.conv_in", c["z_channels"], top, 3)
    m.mid("decoder.mid", top, not c["no_attn_mid_block"])
    width, size = top, c["resolution"] // 2 ** (levels - 1)
    for n in range(levels - 1, -1, -1):
        for j in range(c["num_res_blocks"] + 1):
            m.res("decoder.up.%d.block.%d" % (n, j), width, ch * mult[n])
            width = ch * mult[n]
            if size in attn:
                m.attn("decoder.up.%d.attn.%d" % (n, j), width)
        if n:
            size *= 2
            if c["resample_with_conv"]:
                m.conv("decoder.up.%d.upsample.conv" % n, width, width, 3)
    m.norm("decoder.norm_out", width)
    m.conv("decoder.conv_out", width, 3, 3)
    return dict(m)


def fill(shapes, dtype, seed=1):
    """{name: (dtype, shape, bytes)} of random values."""
    rng = random.Random(seed)
    return {name: (dtype, list(shape), numbers(rng, dtype, math.prod(shape)))
            for name, shape in shapes.items()}


def save_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def load_safetensors(path):
    with open(path, "rb") as f:
        blob = f.read()
    (n,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + n])
    header.pop("__metadata__")
    result = {}
    for name, e in header.items():
        begin, end = e["data_offsets"]
        assert begin % SIZE[e["dtype"]] == 0, name
        result[name] = (e["dtype"], e["shape"], blob[8 + n + begin : 8 + n + end])
    return result


def save(folder, config, tensors, name="model.safetensors"):
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    save_safetensors(os.path.join(folder, name), tensors)
    return folder


# ---- an independent look at a weights file -------------------------------------------------------


def load_gguf(path):
    """(keys, {name: (type number, dims, bytes)}); asserts what the format promises."""
    with open(path, "rb") as f:
        blob = f.read()
    pos = 0

    def take(code):
        nonlocal pos
        (value,) = struct.unpack_from("<" + code, blob, pos)
        pos += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal pos
        n = take("Q")
        pos += n
        return blob[pos - n : pos].decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            assert take("I") == 5
            return [take("i") for _ in range(take("Q"))]
        return take({4: "I", 6: "f", 7: "?"}[kind])

    assert blob[:4] == b"GGUF"
    pos = 4
    assert take("I") == 3
    n_tensors, n_keys = take("Q"), take("Q")
    keys = {}
    for _ in range(n_keys):
        name = text()
        keys[name] = value(take("I"))
    infos = []
    for _ in range(n_tensors):
        name = text()
        assert len(name) < 64
        infos.append((name, [take("Q") for _ in range(take("I"))], take("I"), take("Q")))
    start, tensors = -(-pos // 64) * 64, {}
    end = 0
    for name, dims, kind, offset in infos:
        size = math.prod(dims) * {0: 4, 1: 2, 30: 2}[kind]
        assert offset == end and offset % 64 == 0
        tensors[name] = (kind, dims, blob[start + offset : start + offset + size])
        end = -(-(offset + size) // 64) * 64
    assert start + end == len(blob)
    return keys, tensors


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)
        self.out = self.path("out.bin")

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def run_main(self, *argv):
        """(exit status, stdout, stderr) of convert.py run right here; exceptions are failures."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = convert.main([str(a) for a in argv])
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    def good(self, *argv):
        status, out, err = self.run_main(*argv)
        self.assertEqual(status, 0, err)
        return out, err

    def refused(self, message, *argv, path=None):
        """The command fails with one message about path; nothing is left behind."""
        before = sorted(os.listdir(self.dir))
        status, out, err = self.run_main(*argv)
        self.assertEqual((status, out), (1, ""), err)
        self.assertRegex(err, message)
        self.assertTrue(err.startswith("convert.py: " + (path or "")), err)
        self.assertEqual(sorted(os.listdir(self.dir)), before)
        return err

    def llama(self, dtype="F16", biases="", drop=(), name="llama", extra=None, **config):
        config = dict(LLAMA, **config)
        shapes = llama_shapes(config, biases)
        for key in drop:
            del config[key]
        return save(self.path(name), config, dict(fill(shapes, dtype), **(extra or {})))

    def vqgan(self, dtype="F16", drop=(), file="model.safetensors", **config):
        config = dict(VQGAN, **config)
        shapes = vqgan_shapes(config)
        for key in drop:
            del config[key]
        return save(self.path("vqgan"), config, fill(shapes, dtype, 2), file)

    def round_trip(self, llama=None, vqgan=None):
        """Both ways, bit for bit. Returns (keys, tensors) of the file in between."""
        parts = [("llama", llama)] * bool(llama) + [("vqgan", vqgan)] * bool(vqgan)
        self.good("-o", self.out, *[a for part, folder in parts for a in ("--" + part, folder)])
        out, _ = self.good(self.out, "--to-hf", self.path("hf"))
        self.assertEqual(out.split(), [self.path("hf", part) for part, _ in parts])
        for part, folder in parts:
            source = {}
            for name in os.listdir(folder):
                if name.endswith(".safetensors"):
                    source.update(load_safetensors(os.path.join(folder, name)))
            back = load_safetensors(self.path("hf", part, "model.safetensors"))
            self.assertEqual(sorted(source), sorted(back))
            for name in source:
                self.assertEqual(source[name], back[name], name)
        self.assertFalse([n for n in os.listdir(self.dir) if n.endswith(".tmp")])
        return load_gguf(self.out)

    def config_back(self, part):
        with open(self.path("hf", part, "config.json")) as f:
            return json.load(f)


# ---- what is written -----------------------------------------------------------------------------


class RoundTrip(Case):
    def test_both_parts(self):
        keys, tensors = self.round_trip(self.llama(), self.vqgan())
        single = struct.unpack("<f", struct.pack("<f", 1e-5))[0]
        self.assertEqual(keys,
                         {"general.architecture": "lvm", "general.alignment": 64,
                          "lvm.format_version": 1, "lvm.context_length": 512,
                          "lvm.embedding_length": 32, "lvm.block_count": 2,
                          "lvm.feed_forward_length": 48, "lvm.vocab_size": 80,
                          "lvm.attention.head_count": 4, "lvm.attention.head_count_kv": 2,
                          "lvm.attention.layer_norm_rms_epsilon": single,
                          "lvm.rope.freq_base": 500000.0, "lvm.vq.resolution": 16,
                          "lvm.vq.hidden_channels": 32, "lvm.vq.channel_mult": [1, 2],
                          "lvm.vq.num_res_blocks": 1, "lvm.vq.attn_resolutions": [8],
                          "lvm.vq.no_attn_mid_block": False, "lvm.vq.z_channels": 8,
                          "lvm.vq.num_embeddings": 64, "lvm.vq.quantized_embed_dim": 4,
                          "lvm.vq.resample_with_conv": True})
        self.assertEqual(tensors["blk.1.attn_k.weight"][:2], (1, [32, 16]))
        self.assertEqual(tensors["token_embd.weight"][:2], (1, [32, 80]))
        self.assertEqual(tensors["vq.encoder.conv_in.weight"][:2], (1, [3, 3, 3, 32]))
        self.assertEqual(tensors["vq.quantize.embedding.weight"][:2], (1, [4, 64]))
        self.assertIn("vq.encoder.down.1.attn.0.q.weight", tensors)  # never run, still carried
        for name, (kind, dims, _) in tensors.items():
            self.assertEqual(kind, 0 if len(dims) == 1 else 1, name)
        config = self.config_back("llama")
        for key in set(LLAMA) - {"bos_token_id", "eos_token_id"}:
            self.assertEqual(config[key], LLAMA[key], key)
        self.assertEqual((config["bos_token_id"], config["eos_token_id"], config["head_dim"]),
                         (None, None, 8))
        for key in VQGAN:
            self.assertEqual(self.config_back("vqgan")[key], VQGAN[key], key)

    def test_numbers_and_order(self):
        """Values by their place: rows stay, input channels become contiguous, vectors widen."""
        llama, vqgan = self.llama("BF16"), self.vqgan("F16")
        _, tensors = self.round_trip(llama, vqgan)
        source = load_safetensors(os.path.join(llama, "model.safetensors"))
        self.assertEqual(tensors["blk.0.attn_q.weight"][2],
                         source["model.layers.0.self_attn.q_proj.weight"][2])
        norm = source["model.norm.weight"][2]
        self.assertEqual(tensors["output_norm.weight"][2],
                         b"".join(b"\0\0" + norm[i : i + 2] for i in range(0, len(norm), 2)))
        source = load_safetensors(os.path.join(vqgan, "model.safetensors"))
        _, (o, i, h, w), raw = source["encoder.down.1.block.0.conv1.weight"]
        old = struct.unpack("<%de" % (o * i * h * w), raw)
        new = struct.unpack("<%de" % (o * i * h * w),
                            tensors["vq.encoder.down.1.block.0.conv1.weight"][2])
        for a, b, y, x in ((0, 0, 0, 0), (5, 31, 2, 1), (63, 7, 1, 2), (63, 31, 2, 2),
                           (17, 3, 0, 1)):
            self.assertEqual(new[((a * h + y) * w + x) * i + b], old[((a * i + b) * h + y) * w + x])
        bias = struct.unpack("<64e", source["encoder.down.1.block.0.conv1.bias"][2])
        self.assertEqual(struct.unpack("<64f", tensors["vq.encoder.down.1.block.0.conv1.bias"][2]),
                         bias)

    def test_types(self):
        for dtype in ("F32", "BF16"):
            with self.subTest(dtype):
                self.setUp()
                self.round_trip(self.llama(dtype), self.vqgan(dtype))
                self.assertEqual(self.config_back("llama")["torch_dtype"],
                                 {"F32": "float32", "BF16": "bfloat16"}[dtype])

    def test_vectors_that_do_not_narrow_stay_f32(self):
        for value in (1 / 3, 1e6):
            with self.subTest(value):
                self.setUp()
                fine = struct.pack("<32f", *[value] * 32)
                extra = {"model.norm.weight": ("F32", [32], fine)}
                self.good("-o", self.out, "--llama", self.llama(extra=extra))
                self.good(self.out, "--to-hf", self.path("hf"))
                back = load_safetensors(self.path("hf", "llama", "model.safetensors"))
                self.assertEqual(back["model.norm.weight"], ("F32", [32], fine))
                self.assertEqual(back["model.layers.0.input_layernorm.weight"][0], "F32")
                self.assertEqual(back["model.embed_tokens.weight"][0], "F16")

    def test_tied(self):
        embedding = fill({"model.embed_tokens.weight": [80, 32]}, "F16",
                         1)["model.embed_tokens.weight"]
        _, tensors = self.round_trip(self.llama(tie_word_embeddings=True))
        self.assertNotIn("output.weight", tensors)
        self.assertTrue(self.config_back("llama")["tie_word_embeddings"])
        same = self.llama(name="same", tie_word_embeddings=True,
                          extra={"lm_head.weight": embedding})
        self.good("-o", self.path("same.bin"), "--llama", same)
        self.assertEqual(load_gguf(self.path("same.bin")), load_gguf(self.out))
        other = (embedding[0], embedding[1], embedding[2][::-1])
        other = self.llama(name="other", tie_word_embeddings=True, extra={"lm_head.weight": other})
        self.refused("tie_word_embeddings.*lm_head", "-o", self.path("x"), "--llama", other)

    def test_biases(self):
        for biases in ("qkvo", "qkv", "o"):
            with self.subTest(biases):
                self.setUp()
                _, tensors = self.round_trip(self.llama(biases=biases, attention_bias=True))
                self.assertEqual([b for b in "qkv" if "blk.1.attn_%s.bias" % b in tensors],
                                 [b for b in "qkv" if b in biases])
                self.assertEqual("blk.0.attn_output.bias" in tensors, "o" in biases)
                self.assertTrue(self.config_back("llama")["attention_bias"])

    def test_shards(self):
        folder = self.llama()
        whole = os.path.join(folder, "model.safetensors")
        tensors = load_safetensors(whole)
        os.remove(whole)
        names, where = sorted(tensors), {}
        for n, part in enumerate((names[::2], names[1::2]), 1):
            file = "model-0000%d-of-00002.safetensors" % n
            save_safetensors(os.path.join(folder, file), {name: tensors[name] for name in part})
            where.update(dict.fromkeys(part, file))
        index = os.path.join(folder, "model.safetensors.index.json")

        def write_index(weight_map):
            with open(index, "w") as f:
                json.dump({"metadata": {}, "weight_map": weight_map}, f)

        write_index(where)
        self.round_trip(folder)
        for bad, message in ((dict(where, extra=file), "tensor extra is in"), ([], "no weight_map"),
                             (dict(where, extra="../x"), "lists ../x"),
                             (dict(where, extra="gone"), "lists gone"),
                             ({name: 1 for name in where}, "no weight_map")):
            write_index(bad)
            self.refused(message, "-o", self.path("x"), "--llama", folder, path=index)
        write_index(where)
        save_safetensors(os.path.join(folder, file), tensors)
        self.refused("as another shard does", "-o", self.path("x"), "--llama", folder)

    def test_rope_theta_places(self):
        nested = {"rope_theta": 1e6, "rope_type": "default"}
        cases = ((("rope_theta",), {"rope_parameters": nested}),
                 ((), {"rope_theta": 1e6, "rope_scaling": None}),
                 ((), {"rope_theta": 1000000, "rope_parameters": nested}))
        for n, (drop, config) in enumerate(cases):
            self.good("-o", self.out, "--force", "--llama",
                      self.llama(name=str(n), drop=drop, **config))
            self.assertEqual(load_gguf(self.out)[0]["lvm.rope.freq_base"], 1e6)

    def test_defaults_of_both_classes(self):
        folder = self.llama(num_key_value_heads=4,
                            drop=("rope_theta", "rms_norm_eps", "max_position_embeddings",
                                  "num_key_value_heads", "hidden_act"))
        keys, _ = self.round_trip(folder)
        self.assertEqual([keys["lvm." + k]
                          for k in ("rope.freq_base", "context_length", "attention.head_count_kv")],
                         [10000.0, 2048, 4])
        self.assertEqual(self.config_back("llama")["rms_norm_eps"], 1e-6)
        self.setUp()
        vqgan = self.vqgan(drop=("no_attn_mid_block", "resample_with_conv", "num_channels",
                                 "_class_name"))
        keys, _ = self.round_trip(vqgan=vqgan)
        self.assertEqual((keys["lvm.vq.no_attn_mid_block"], keys["lvm.vq.resample_with_conv"]),
                         (False, True))

    def test_vqgan_shapes_of_many_configs(self):
        for config in ({"attn_resolutions": []}, {"attn_resolutions": 4},
                       {"resolution": 13, "attn_resolutions": [12]}, {"channel_mult": [2]},
                       {"channel_mult": [1, 1, 2], "attn_resolutions": [16, 4]},
                       {"no_attn_mid_block": True, "resample_with_conv": False},
                       {"num_res_blocks": 2},
                       {"channel_mult": [1, 1], "num_res_blocks": 0, "attn_resolutions": [16]}):
            with self.subTest(str(config)):
                self.setUp()
                folder = self.vqgan(file="diffusion_pytorch_model.safetensors", **config)
                keys, tensors = self.round_trip(vqgan=folder)
                shapes = vqgan_shapes(dict(VQGAN, **config))
                self.assertEqual(sorted(tensors), sorted("vq." + name for name in shapes))
                self.assertIsInstance(keys["lvm.vq.attn_resolutions"], list)

    def test_inv_freq_is_ignored(self):
        odd = ("F8_E4M3", [4], bytes(4))
        plain = self.llama(name="plain")
        folder = self.llama(extra={"model.layers.0.self_attn.rotary_emb.inv_freq": odd})
        self.good("-o", self.out, "--llama", folder)
        self.good("-o", self.path("plain.bin"), "--llama", plain)
        self.assertEqual(load_gguf(self.out), load_gguf(self.path("plain.bin")))

    def test_special_tokens(self):
        def written(*argv, **config):
            folder = self.llama(name="l%d" % len(os.listdir(self.dir)), **config)
            _, err = self.good("-o", self.out, "--force", "--llama", folder, *argv)
            keys = load_gguf(self.out)[0]
            return keys.get("lvm.bos_token_id"), keys.get("lvm.eos_token_id"), err

        vqgan = ("--vqgan", self.vqgan())
        self.assertEqual(written(*vqgan, bos_token_id=64, eos_token_id=79), (64, 79, ""))
        bos, eos, err = written(*vqgan, bos_token_id=63, eos_token_id=80)
        self.assertEqual((bos, eos, err.count("not written")), (None, None, 2))
        self.assertEqual(written(*vqgan, "--bos", "70", bos_token_id=64, eos_token_id=[3, 66])[:2],
                         (70, 66))
        self.assertEqual(written(*vqgan, "--bos", "none", bos_token_id=64)[0], None)
        # 8192 codes where no tokenizer says
        self.assertEqual(written(bos_token_id=64)[0], None)
        self.assertEqual(written(bos_token_id=8192, vocab_size=8193, eos_token_id=None),
                         (8192, None, ""))
        self.good(self.out, "--to-hf", self.path("hf"))
        self.assertEqual(self.config_back("llama")["bos_token_id"], 8192)
        self.refused("--bos 80 is outside", "-o", self.path("x"), "--llama", self.llama(), "--bos",
                     "80")

    def test_general_keys(self):
        self.good("-o", self.out, "--vqgan", self.vqgan(), "--name", "Größe", "--license", "MIT")
        keys, _ = load_gguf(self.out)
        self.assertEqual((keys["general.name"], keys["general.license"]), ("Größe", "MIT"))
        self.assertEqual(list(keys)[0], "general.architecture")

    @unittest.skipUnless(os.environ.get("LVM_REFERENCE"), "LVM_REFERENCE is not set")
    def test_reference(self):
        top = os.environ["LVM_REFERENCE"]
        keys, tensors = self.round_trip(os.path.join(top, "llama"), os.path.join(top, "tokenizer"))
        self.assertEqual((keys["lvm.bos_token_id"], keys["lvm.eos_token_id"]), (8192, 8193))
        for part, source in (("llama", "llama"), ("vqgan", "tokenizer")):
            with open(os.path.join(top, source, "config.json")) as f:
                self.assertEqual(self.config_back(part), json.load(f))


# ---- quantised tensors back to floats ------------------------------------------------------------


class Quantised(Case):
    def rewrite(self, name, kind, blocks):
        """Replaces a tensor of the weights file by quantised blocks at the end of the file."""
        with open(self.out, "rb") as f:
            blob = bytearray(f.read())
        text = struct.pack("<Q", len(name)) + name.encode()
        at = blob.index(text) + len(text)
        (dims,) = struct.unpack_from("<I", blob, at)
        last = b"blk.1.ffn_down.weight"
        descriptions_end = blob.index(last) + len(last) + 4 + 2 * 8 + 4 + 8
        start = -(-descriptions_end // 64) * 64
        struct.pack_into("<IQ", blob, at + 4 + 8 * dims, kind, len(blob) - start)
        with open(self.out, "wb") as f:
            f.write(bytes(blob) + blocks + bytes(-len(blocks) % 64))

    def back(self, name, kind, blocks):
        self.good("-o", self.out, "--llama", self.llama())
        self.rewrite(name, kind, blocks)
        self.good(self.out, "--to-hf", self.path("hf"))
        return load_safetensors(self.path("hf", "llama", "model.safetensors"))

    def test_q8_0(self):
        rng = random.Random(3)
        scales = [rng.choice((0.0, -0.0, 6e-8, -1.5, 0.0371, 65504.0)) for _ in range(80)]
        quants = [[rng.randint(-128, 127) for _ in range(32)] for _ in scales]
        blocks = b"".join(struct.pack("<e32b", d, *q) for d, q in zip(scales, quants))
        back = self.back("token_embd.weight", 8, blocks)
        exact = [struct.unpack("<e", struct.pack("<e", d))[0] * q
                 for d, row in zip(scales, quants) for q in row]
        self.assertEqual(back["model.embed_tokens.weight"],
                         ("F32", [80, 32], struct.pack("<2560f", *exact)))
        self.assertEqual(back["model.norm.weight"][0], "F32")  # the part's own type is now F32
        self.assertEqual(back["lm_head.weight"][0], "F16")

    def test_q4_0(self):
        low, high = list(range(16)), [15 - n // 2 for n in range(16)]
        block = struct.pack("<e16B", -0.5, *(a | b << 4 for a, b in zip(low, high)))
        back = self.back("blk.0.attn_v.weight", 2, block * 16)
        exact = struct.pack("<32f", *[(q - 8) * -0.5 for q in low + high])
        self.assertEqual(back["model.layers.0.self_attn.v_proj.weight"],
                         ("F32", [16, 32], exact * 16))
        self.assertEqual(back["model.norm.weight"][0], "F16")


# ---- what is refused -----------------------------------------------------------------------------


class Refusals(Case):
    def test_llama_configs(self):
        cases = (
            ("rope_scaling is .*linear", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
            ("rope_parameters is .*yarn", {"rope_parameters": {"rope_type": "yarn"}}),
            ("rope_scaling is 3", {"rope_scaling": 3}),
            ("two values for rope_theta", {"rope_parameters": {"rope_theta": 1e4}}),
            ("head_dim is 16", {"head_dim": 16}),
            ("mlp_bias is true", {"mlp_bias": True}),
            ('hidden_act is "gelu"', {"hidden_act": "gelu"}),
            ("describes .*Mistral", {"architectures": ["MistralForCausalLM"]}),
            ("describes", {"model_type": "qwen2"}),
            ("quantization_config is", {"quantization_config": {"bits": 4}}),
            ("tie_word_embeddings is .*yes", {"tie_word_embeddings": "yes"}),
            ("rms_norm_eps is 0", {"rms_norm_eps": 0}),
            ("rms_norm_eps is NaN", {"rms_norm_eps": float("nan")}),
            ("rope_theta is true", {"rope_theta": True}),
            ("num_attention_heads is 4.0", {"num_attention_heads": 4.0}),
            ("num_hidden_layers is 100000", {"num_hidden_layers": 100000}),
            ("heads cannot share", {"hidden_size": 36}),
            ("do not divide", {"num_key_value_heads": 3}),
            ("promises attention biases", {"attention_bias": True}),
        )
        for n, (message, config) in enumerate(cases):
            with self.subTest(message):
                folder = save(self.path(str(n)), dict(LLAMA, **config),
                              fill(llama_shapes(LLAMA), "F16"))
                self.refused(message, "-o", self.out, "--llama", folder, path=folder)
        for key in ("hidden_size", "vocab_size"):
            config = {k: v for k, v in LLAMA.items() if k != key}
            folder = save(self.path(key), config, fill(llama_shapes(LLAMA), "F16"))
            self.refused(key + " is missing", "-o", self.out, "--llama", folder, path=folder)
        both = ("--llama", self.llama(vocab_size=60), "--vqgan", self.vqgan())
        self.refused("vocab_size is 60, less than", "-o", self.out, *both)

    def test_vqgan_configs(self):
        cases = (
            ("_class_name is .*Paella", {"_class_name": "PaellaVQModel"}),
            ("num_channels is 1", {"num_channels": 1}),
            ("hidden_channels is 48", {"hidden_channels": 48}),
            ("channel_mult is empty", {"channel_mult": []}),
            ("channel_mult is .*list of at most 16", {"channel_mult": [1] * 17}),
            ("attn_resolutions is .*whole numbers", {"attn_resolutions": ["16"]}),
            ("no_attn_mid_block is 1", {"no_attn_mid_block": 1}),
            ("num_res_blocks is 1000", {"num_res_blocks": 1000}),
            ("resolution is -1", {"resolution": -1}),
        )
        for n, (message, config) in enumerate(cases):
            with self.subTest(message):
                folder = save(self.path(str(n)), dict(VQGAN, **config),
                              fill(vqgan_shapes(VQGAN), "F16"))
                self.refused(message, "-o", self.out, "--vqgan", folder, path=folder)

    def test_every_wrong_tensor_is_named(self):
        tensors = fill(llama_shapes(LLAMA, "q"), "F16")
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.q_proj.bias"]
        tensors["lm_head.weight"] = ("F16", [32, 80], tensors["lm_head.weight"][2])
        tensors["model.layers.0.mlp.up_proj.weight"] = ("I8", [48, 32], bytes(48 * 32))
        tensors["model.embed_tokens.weight"] = ("F64", [80, 32], bytes(80 * 32 * 8))
        tensors["what\x1b[2J"] = ("F8_E4M3", [2], bytes(2))
        folder = save(self.path("wrong"), LLAMA, tensors)
        err = self.refused("tensors are not those", "-o", self.out, "--llama", folder)
        for fault in ("model.norm.weight [32] is missing",
                      "layers.1.self_attn.q_proj.bias [32] is missing",
                      "lm_head.weight is [32, 80] instead of [80, 32]",
                      "up_proj.weight has type I8, not F32", "embed_tokens.weight has type F64",
                      "'what\\x1b[2J' is unexpected"):
            self.assertIn(fault, err)
        empty = save(self.path("empty"), VQGAN, {})
        err = self.refused("and \\d+ more", "-o", self.out, "--vqgan", empty)
        self.assertEqual(err.count("is missing"), 20)
        del tensors["what\x1b[2J"]
        tied = save(self.path("untied"), LLAMA,
                    fill(llama_shapes(dict(LLAMA, tie_word_embeddings=True)), "F16"))
        self.refused("lm_head.weight .* is missing", "-o", self.out, "--llama", tied)

    def test_folders(self):
        self.refused("is no folder", "-o", self.out, "--llama", self.path("nowhere"))
        os.makedirs(self.path("a"))
        self.refused("config.json: there is no such file", "-o", self.out, "--llama",
                     self.path("a"))
        with open(self.path("a", "config.json"), "w") as f:
            f.write("{}")
        self.refused("holds no model.safetensors", "-o", self.out, "--llama", self.path("a"))
        with open(self.path("a", "pytorch_model.bin"), "w"):
            self.refused("safe_serialization", "-o", self.out, "--llama", self.path("a"))

    def test_json(self):
        folder = self.llama()
        for text, message in ((b"[]", "not a JSON object"), (b'{"a":1,"a":2}', "twice"),
                              (b"\xff{}", "not valid JSON"), (b"{", "not valid JSON"),
                              (b'{"hidden_act":' + b"[" * 100000, "not valid JSON"),
                              (b'{"hidden_size":' + b"9" * 9999 + b"}", "."),
                              (b"", "not valid JSON"),
                              (b'{"model_type":"llama","hidden_act":' + b"[" * 900 + b"]" * 900
                               + b"}", ".")):
            with open(os.path.join(folder, "config.json"), "wb") as f:
                f.write(text)
            self.refused(message, "-o", self.out, "--llama", folder, path=folder)

    def test_outputs(self):
        vqgan = self.vqgan()
        self.good("-o", self.out, "--vqgan", vqgan)
        with open(self.out, "rb") as f:
            first = f.read()
        self.refused("exists already.*--force", "-o", self.out, "--vqgan", vqgan, path=self.out)
        self.good("-o", self.out, "--vqgan", vqgan, "--force", "--quiet")
        with open(self.out, "rb") as f:
            self.assertEqual(f.read(), first)
        source = os.path.join(vqgan, "model.safetensors")
        os.link(source, self.path("link"))
        for path in (source, os.path.join(vqgan, "config.json"), self.path("link")):
            self.refused("also an input", "-o", path, "--vqgan", vqgan, "--force", path=path)
        self.refused("no ordinary file", "-o", vqgan, "--vqgan", vqgan, "--force", path=vqgan)
        self.refused("no ordinary file", "-o", os.devnull, "--vqgan", vqgan, "--force",
                     path=os.devnull)
        self.refused("folder does not exist", "-o", self.path("no", "x"), "--vqgan", vqgan)
        self.good(self.out, "--to-hf", self.path("hf"))
        self.refused("exists already", self.out, "--to-hf", self.path("hf"))
        self.good(self.out, "--to-hf", self.path("hf"), "--force")
        self.refused("there is no such file", self.path("no"), "--to-hf", self.path("hf"))
        self.refused("no GGUF file", source, "--to-hf", self.path("hf2"))

    def test_full_disk_and_interrupt_leave_nothing(self):
        vqgan = self.vqgan()
        before = sorted(os.listdir(self.dir))
        pieces = convert.job_pieces
        self.addCleanup(setattr, convert, "job_pieces", pieces)
        for fault, status in ((OSError(28, "No space left on device"), 1),
                              (KeyboardInterrupt(), 130)):

            def failing(job, fault=fault):
                yield from pieces(job)
                if job.name.endswith("decoder.conv_out.weight"):
                    raise fault

            convert.job_pieces = failing
            result = self.run_main("-o", self.out, "--vqgan", vqgan)
            self.assertEqual(result[0], status)
            self.assertEqual(sorted(os.listdir(self.dir)), before)

    def test_usage(self):
        for argv in ((), ("-o", "x"), ("x",), ("--llama", "d"), ("x", "-o", "y", "--llama", "d"),
                     ("x", "--to-hf", "d", "--llama", "e"), ("--to-hf", "d"),
                     ("-o", "x", "--vqgan", "d", "--type", "f16"),
                     ("-o", "x", "--llama", "d", "--vq-type", "f16"),
                     ("-o", "x", "--vqgan", "d", "--bos", "3"),
                     ("-o", "x", "--llama", "d", "--bos", "-3"),
                     ("-o", "x", "--llama", "d", "--type", "q5_0"),
                     ("-o", "x", "--vqgan", "d", "--vq-type", "q4_0"), ("--wrong",)):
            status, _, err = self.run_main(*argv)
            self.assertEqual(status, 2, argv)
            self.assertIn("usage:", err)

    def test_program_from_a_shell(self):
        command = [sys.executable, os.path.join(TOP, "convert.py")]
        done = subprocess.run(command + ["-o", self.out, "--vqgan", self.vqgan()],
                              capture_output=True, check=False)
        self.assertEqual((done.returncode, done.stdout.decode(), done.stderr),
                         (0, self.out + "\n", b""))
        done = subprocess.run(command + ["-h"], capture_output=True, check=False)
        self.assertIn(b"--to-hf", done.stdout)


class Damage(Case):
    def attack(self, path, blob, argv, ends=None):
        """Cuts and changes a file in many places: exit 0 or 1, and never an output after 1."""
        rng = random.Random(5)
        cuts = sorted(set(range(0, min(ends, 400), 7))
                      | {rng.randrange(len(blob)) for _ in range(150)} | {len(blob) - 1})
        variants = [(blob[:n], True) for n in cuts] + [(blob + b"\0" * 64, None)]
        for _ in range(500):
            changed = bytearray(blob)
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(ends)
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"),
                                          changed[at] ^ 1 << rng.randrange(8)))
            variants.append((bytes(changed), None))
        for data, must_fail in variants:
            with open(path, "wb") as f:
                f.write(data)
            status, _, err = self.run_main(*argv)
            self.assertIn(status, (0, 1))
            written = os.path.exists(self.out) or os.path.exists(self.path("hf", "llama",
                                                                           "model.safetensors"))
            self.assertEqual(written, status == 0, err)
            if must_fail:
                self.assertEqual(status, 1)
            if status:
                self.assertTrue(err.startswith("convert.py: " + self.dir), err)
            for leftover in (self.out, self.path("hf")):
                if os.path.isdir(leftover):
                    shutil.rmtree(leftover)
                elif os.path.exists(leftover):
                    os.remove(leftover)

    def test_safetensors(self):
        folder = self.llama(num_hidden_layers=1)
        path = os.path.join(folder, "model.safetensors")
        with open(path, "rb") as f:
            blob = f.read()
        self.attack(path, blob, ("-o", self.out, "--llama", folder),
                    8 + struct.unpack("<Q", blob[:8])[0])

    def test_gguf(self):
        self.good("-o", self.out, "--llama", self.llama(num_hidden_layers=1))
        path = self.path("damaged.bin")
        os.rename(self.out, path)
        with open(path, "rb") as f:
            blob = f.read()
        self.attack(path, blob, (path, "--to-hf", self.path("hf")),
                    blob.index(b"ffn_down.weight") + 50)

    def test_safetensors_lies(self):
        folder = self.llama()
        path = os.path.join(folder, "model.safetensors")
        good = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
        cases = (
            ({"a": dict(good, shape=[3])}, 4, "is F16 .3. but has 4 bytes"),
            ({"a": dict(good, shape=[1 << 62, 4])}, 4, "but has 4 bytes"),
            ({"a": dict(good, shape=[-2])}, 4, "no proper shape"),
            ({"a": dict(good, shape=[True, 2])}, 4, "no proper shape"),
            ({"a": dict(good, data_offsets=[0, 8])}, 4, "lies at bytes 0 to 8 of 4"),
            ({"a": dict(good, data_offsets=[4, 0])}, 4, "lies at bytes 4 to 0"),
            ({"a": dict(good, data_offsets=[0])}, 4, "no proper shape or data_offsets"),
            ({"a": 3}, 4, "no proper description"),
            ({"a": dict(good, dtype=7)}, 4, "no proper description"),
            ({"a": good, "b": good}, 4, "overlaps another"),
            ({"a": good, "b": dict(good, data_offsets=[6, 10])}, 10, "follows a gap"),
            ({"a": good}, 9, "5 bytes more than"),
        )
        for header, data, message in cases:
            text = json.dumps(header).encode()
            with open(path, "wb") as f:
                f.write(struct.pack("<Q", len(text)) + text + bytes(data))
            self.refused(message, "-o", self.out, "--llama", folder, path=path)
        for raw, message in ((b"", "cut short"), (b"1234567", "cut short"),
                             (b"\xff" * 8 + b"{}", "cut short"),
                             (struct.pack("<Q", 3) + b"{}", "cut short"),
                             (struct.pack("<Q", 18) + b'{"a":{},"a":{}}   ', "twice")):
            with open(path, "wb") as f:
                f.write(raw)
            self.refused(message, "-o", self.out, "--llama", folder, path=path)

    def test_gguf_lies(self):
        def text(s):
            return struct.pack("<Q", len(s)) + s

        def key(name, kind, raw):
            return text(name) + struct.pack("<I", kind) + raw

        def tensor(size, kind, offset):
            return text(b"a") + struct.pack("<IQIQ", 1, size, kind, offset)

        arch = key(b"general.architecture", 8, text(b"lvm"))
        version = key(b"lvm.format_version", 4, struct.pack("<I", 1))
        both, room = arch + version, bytes(128)
        cases = (
            (1 << 60, 0, b"", "items cannot fit"),
            (0, 1 << 60, b"", "items cannot fit"),
            (0, 1, text(b"k") + struct.pack("<I", 99), "no type 99"),
            (0, 1, key(b"k", 9, struct.pack("<IQ", 9, 1)) + room, "no array of type 9"),
            (0, 1, key(b"k", 9, struct.pack("<IQ", 5, 1 << 61)), "items cannot fit"),
            (0, 1, key(b"k", 8, struct.pack("<Q", 1 << 62)), "bytes are wanted"),
            (0, 1, key(b"k", 8, text(b"\xff\xff")), "not UTF-8"),
            (0, 2, arch + arch, "stands there twice"),
            (0, 1, version + room, "architecture is null"),
            (0, 1, arch, "format_version is null"),
            (0, 2, both, "holds no tensors"),
            (0, 1, key(b"general.alignment", 4, struct.pack("<I", 48)), "alignment is 48"),
            (1, 2, both + text(b"a") + struct.pack("<I", 5) + room, "has 5 dimensions"),
            (1, 2, both + tensor(8, 77, 0), "type 77"),
            (1, 2, both + tensor(33, 8, 0), "cannot be"),
            (1, 2, both + tensor(8, 0, 7) + room, "unaligned"),
            (1, 2, both + tensor(1 << 60, 0, 0), "ends behind"),
            (2, 2, both + tensor(8, 0, 0) + tensor(8, 0, 0) + room, "stands there twice"),
            (1, 2, both + tensor(8, 0, 0) + room, "context_length is missing"),
        )
        for n_tensors, n_keys, body, message in cases:
            path = self.path("lie.bin")
            with open(path, "wb") as f:
                f.write(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + body)
            self.refused(message, path, "--to-hf", self.path("hf"), path=path)
        with open(path, "wb") as f:
            f.write(b"GGUF" + struct.pack("<IQQ", 2, 0, 0))
        self.refused("version 2", path, "--to-hf", self.path("hf"), path=path)


# ---- quantising and memory -----------------------------------------------------------------------


class Program(Case):
    def stand_in(self, body):
        path = self.path("lvm-stand-in")
        with open(path, "w") as f:
            f.write("#!/bin/sh\n" + body + "\n")
        os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)
        return path

    def test_quantize_is_called(self):
        lvm = self.stand_in('echo "$@" >"%s"; cp "$2" "$3"; echo chatter' % self.path("log"))
        parts = ("--llama", self.llama(), "--vqgan", self.vqgan())
        out, _ = self.good("-o", self.out, *parts, "--lvm", lvm, "--type", "q8_0", "--vq-type",
                           "f16")
        self.assertEqual(out, self.out + "\n")
        with open(self.path("log")) as f:
            words = f.read().split()
        self.assertEqual(words[0], "quantize")
        self.assertEqual(words[3:], ["--type", "q8_0", "--vq-type", "f16"])
        self.assertEqual([os.path.dirname(w) for w in words[1:3]], [self.dir] * 2)
        self.assertFalse([n for n in os.listdir(self.dir) if n.endswith(".tmp")])
        self.good("-o", self.path("plain.bin"), *parts)
        self.assertEqual(load_gguf(self.out), load_gguf(self.path("plain.bin")))
        self.good("-o", self.out, *parts, "--lvm", lvm, "--type", "q4_0", "--force")
        with open(self.path("log")) as f:
            self.assertEqual(f.read().split()[3:], ["--type", "q4_0"])

    def test_quantize_fails(self):
        llama = self.llama()
        argv = ("-o", self.out, "--llama", llama, "--type", "q8_0", "--lvm")
        self.refused("is no program.*run make", *argv, self.path("nothing"))
        for body in ("exit 3", "exit 0", 'cp "$2" "$3"; exit 1', "kill -9 $$"):
            self.refused("quantising failed", *argv, self.stand_in(body))
        with open(self.path("lvm-stand-in"), "w") as f:
            f.write("\0no program")
        self.refused("lvm-stand-in", *argv, self.path("lvm-stand-in"))

    def test_memory(self):
        """A 134 MB matrix (a hole in its file) must pass through in pieces."""
        config = dict(LLAMA, vocab_size=1 << 18, hidden_size=256, num_hidden_layers=1,
                      tie_word_embeddings=True)
        shapes = llama_shapes(config)
        header, pos = {}, 0
        for name in sorted(shapes, key=lambda n: n == "model.embed_tokens.weight"):
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name],
                            "data_offsets": [pos, pos + size]}
            pos += size
        folder = save(self.path("big"), config, {})
        text = json.dumps(header).encode()
        with open(os.path.join(folder, "model.safetensors"), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + pos)
        code = ("import resource, sys; sys.path.insert(0, %r); sys.dont_write_bytecode = True\n"
                "import convert\n" "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                "status = convert.main(sys.argv[1:])\n"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
                "sys.exit(status)" % TOP)
        unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
        for argv in (("-o", self.out, "--llama", folder), (self.out, "--to-hf", self.path("hf"))):
            done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True,
                                  check=True)
            self.assertLess(int(done.stdout.split()[-1]) * unit, 32e6)
        self.assertGreater(os.path.getsize(self.out), 134e6)


if __name__ == "__main__":
    unittest.main()
