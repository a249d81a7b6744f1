#!/usr/bin/env python3
"""Tests of convert.py: python3 tests/test_convert.py. Standard library only.

Small made-up checkpoints go through convert.py and back; a reader written for this test alone looks
at the weights file in between. Damaged inputs must end in a message: no traceback, no output. Where
both programs must refuse one file alike, lvm is asked too. With LVM_REFERENCE set to a folder that
holds llama/ and tokenizer/, these make the round trip too.
python3 tests/test_convert.py --fuzz EXECUTIONS [SEED] damages inputs for longer.
"""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
import unittest
import unittest.mock
import zipfile
import zlib
from collections import OrderedDict

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
    header.pop("__metadata__", None)
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


# ---- files as torch.save writes them -------------------------------------------------------------

STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
            "F64": "DoubleStorage", "I8": "CharStorage"}


class Storage:
    """Stands for a storage; in pickles there is a persistent id in its place."""

    def __init__(self, dtype, raw):
        self.dtype, self.raw = dtype, raw


class Strided:
    """Stands for a tensor or a parameter; pickles as these do."""

    def __init__(self, storage, shape, strides=None, offset=0, parameter=False, extra=()):
        if strides is None:
            strides = [math.prod(shape[n + 1:]) for n in range(len(shape))]
        self.args = (storage, offset, tuple(shape), tuple(strides), False, OrderedDict(), *extra)
        self.parameter = parameter

    def plain(self):
        return Strided(*[self.args[n] for n in (0, 2, 3, 1)], extra=self.args[6:])

    def __reduce__(self):
        utils = TORCH["torch._utils"]
        if not self.parameter:
            return utils._rebuild_tensor_v2, self.args
        if self.parameter == "old":
            return utils._rebuild_tensor, self.args[:4]
        if self.parameter == "state":
            return utils._rebuild_parameter_with_state, (self.plain(), True, OrderedDict(),
                                                         {"tag": 1, "names": ["a", (2, None)]})
        if self.parameter == "subclass":
            kind = TORCH["torch.nn.parameter"].Parameter
            inner = utils._rebuild_parameter, kind, (self.plain(), True, OrderedDict()), {"tag": 1}
            return TORCH["torch._tensor"]._rebuild_from_type_v2, inner
        return utils._rebuild_parameter, (self.plain(), True, OrderedDict())


def stand_ins():
    """Modules in which pickle finds the names that it is to write; nothing in them is called."""
    modules = {name: types.ModuleType(name) for name in (
        "torch", "torch._utils", "torch._tensor", "torch.nn", "torch.nn.parameter")}
    for module, name in [("torch", name) for name in STORAGES.values()] + [
            ("torch.nn.parameter", "Parameter")]:
        setattr(modules[module], name, type(name, (), {"__module__": module}))
    for module, name in (("torch._utils", "_rebuild_tensor"),
                         ("torch._utils", "_rebuild_tensor_v2"),
                         ("torch._utils", "_rebuild_parameter"),
                         ("torch._utils", "_rebuild_parameter_with_state"),
                         ("torch._tensor", "_rebuild_from_type_v2")):
        def rebuild(*_):
            raise AssertionError("nothing calls this")
        rebuild.__module__, rebuild.__name__, rebuild.__qualname__ = module, name, name
        setattr(modules[module], name, rebuild)
    return modules


TORCH = stand_ins()


class Pickler(pickle.Pickler):
    """Notes the storages that come by, in self.storages. Old files have one more word for each."""

    def __init__(self, file, protocol, old):
        super().__init__(file, protocol)
        self.storages, self.old = {}, old

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key, _ = self.storages.setdefault(id(obj), (str(len(self.storages)), obj))
        kind = getattr(TORCH["torch"], STORAGES[obj.dtype])
        words = ("storage", kind, key, "cpu", len(obj.raw) // SIZE[obj.dtype])
        return words + (None,) if self.old else words


def pickled(value, protocol=2, old=False):
    """(pickle, [(key, Storage)]) of a value that holds Strideds."""
    out = io.BytesIO()
    pickler = Pickler(out, protocol, old)
    with unittest.mock.patch.dict(sys.modules, TORCH):
        pickler.dump(value)
    return out.getvalue(), list(pickler.storages.values())


def records(value, protocol=2, top="archive/"):
    """[(name, bytes)] of torch.save's archive."""
    text, storages = pickled(value, protocol)
    return ([(top + "data.pkl", text), (top + "byteorder", b"little")]
            + [(top + "data/" + key, s.raw) for key, s in storages] + [(top + "version", b"3\n")])


def write_zip(path, entries, deflate=False, wide=False):
    """An archive as PyTorch lays it out: data at multiples of 64, sizes behind it, 64-bit numbers
    at the end; with wide, also in the directory. An entry that is a number is a hole of so many
    bytes."""
    with open(path, "wb") as f:
        directory = b""
        for name, raw in entries:
            name, pos = name.encode(), f.tell()
            size, crc = (raw, 0) if isinstance(raw, int) else (len(raw), zlib.crc32(raw))
            if deflate:
                machine = zlib.compressobj(9, zlib.DEFLATED, -15)
                raw = machine.compress(raw) + machine.flush()
            packed, method = size if isinstance(raw, int) else len(raw), 8 if deflate else 0
            pad = -(pos + 34 + len(name)) % 64
            f.write(struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0x808, method, 0, 0, crc, 0, 0,
                                len(name), 4 + pad) + name)
            f.write(struct.pack("<2sH", b"FB", pad) + b"Z" * pad)
            if isinstance(raw, int):
                f.seek(raw, os.SEEK_CUR)
            else:
                f.write(raw)
            f.write(struct.pack("<4s3I", b"PK\7\x08", crc, packed, size))
            extra = struct.pack("<2H3Q", 1, 24, size, packed, pos) if wide else b""
            numbers = [0xFFFFFFFF] * 3 if wide else [packed, size, pos]
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0x808, method, 0, 0, crc,
                                     *numbers[:2], len(name), len(extra), 0, 0, 0, 0, numbers[2])
            directory += name + extra
        pos = f.tell()
        f.write(directory)
        end, n = f.tell(), len(entries)
        f.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, len(directory), pos))
        f.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        numbers = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if wide else (n, len(directory), pos)
        f.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, numbers[0], *numbers, 0))


def old_format(value):
    """The bytes of torch.save before version 1.6."""
    text, storages = pickled(value, old=True)
    out = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    out += pickle.dumps({"protocol_version": 1001, "little_endian": True,
                         "type_sizes": {"short": 2, "int": 4, "long": 4}}, 2) + text
    out += pickle.dumps([key for key, _ in storages], 2)
    return out + b"".join(struct.pack("<Q", len(s.raw) // SIZE[s.dtype]) + s.raw
                          for _, s in storages)


def strided(tensors, parameter=False):
    """A dictionary of tensors as load_safetensors gives them, each with a storage of its own."""
    return OrderedDict((name, Strided(Storage(dtype, raw), shape, parameter=parameter))
                       for name, (dtype, shape, raw) in tensors.items())


# ---- an independent look at a weights file -------------------------------------------------------


def load_gguf(path, strict=True):
    """(keys, {name: (type number, dims, bytes)}); asserts what lvm's format promises, if strict."""
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
            kind = take("I")
            return [value(kind) for _ in range(take("Q"))]
        return take("BbHhIif?  Qqd"[kind])

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
    align = keys.get("general.alignment", 32)
    start, tensors = -(-pos // align) * align, {}
    end = 0
    for name, dims, kind, offset in infos:
        size = math.prod(dims) * {0: 128, 1: 64, 2: 18, 8: 34, 30: 64}[kind] // 32
        assert not strict or offset == end and offset % 64 == 0
        tensors[name] = (kind, dims, blob[start + offset : start + offset + size])
        end = -(-(offset + size) // 64) * 64
    assert not strict or start + end == len(blob)
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
        head = {"lm_head.weight": embedding}
        turned_kept = self.llama(name="turned", extra=head, tie_word_embeddings=True)
        self.keep(turned_kept, lambda name: name != "model.embed_tokens.weight")
        self.good("-o", self.path("turned.bin"), "--llama", turned_kept)
        self.assertEqual(load_gguf(self.path("turned.bin")), load_gguf(self.out))

    def keep(self, folder, wanted):
        path = os.path.join(folder, "model.safetensors")
        tensors = load_safetensors(path)
        save_safetensors(path, {name: t for name, t in tensors.items() if wanted(name)})

    def test_tied_and_different(self):
        """As transformers 5: both are kept, and it is said."""
        other = fill({"lm_head.weight": [80, 32]}, "F16", 9)
        folder = self.llama(name="other", tie_word_embeddings=True, extra=other)
        _, err = self.good("-o", self.out, "--llama", folder)
        self.assertRegex(err, "tie_word_embeddings is true, but lm_head.weight .* both are written")
        tensors = load_gguf(self.out)[1]
        self.assertEqual(tensors["output.weight"][2], other["lm_head.weight"][2])
        self.assertNotEqual(tensors["output.weight"], tensors["token_embd.weight"])

    def test_untied_needs_both(self):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            folder = self.llama(name=name)
            self.keep(folder, lambda n, name=name: n != name)
            self.refused(name + r" .* is missing .*tie_word_embeddings true", "-o", self.out,
                         "--llama", folder)

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

    def test_bounds_that_float32_misses(self):
        """1e12 and 1e-30 are others as float32, which --to-hf must still read."""
        self.round_trip(self.llama(rope_theta=1e12, rms_norm_eps=1e-30))
        config = self.config_back("llama")
        self.assertEqual((config["rope_theta"], config["rms_norm_eps"]), (1e12, 1e-30))

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
                       {"channel_mult": [2]},
                       {"channel_mult": [1, 1, 2], "attn_resolutions": [16, 4]},
                       {"no_attn_mid_block": True, "resample_with_conv": False},
                       {"num_res_blocks": 2}):
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

    def test_own_writer(self):
        """What lvm writes from nothing is a file that convert.py takes, and makes again."""
        made = self.path("made.bin")
        subprocess.run([os.path.join(TOP, "build", "test_backend"), "--model", made], check=True)
        self.good(made, "--to-hf", self.path("hf"))
        self.good("-o", self.out, "--llama", self.path("hf", "llama"),
                  "--vqgan", self.path("hf", "vqgan"))
        (made_keys, made_tensors), (keys, tensors) = load_gguf(made), load_gguf(self.out)
        self.assertEqual({k: v for k, v in keys.items() if k.startswith("lvm.")},
                         {k: v for k, v in made_keys.items() if k.startswith("lvm.")})
        self.assertEqual(tensors, made_tensors)

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


# ---- PyTorch's own files -------------------------------------------------------------------------


def turned(tensor, rng):
    """The tensor with its elements elsewhere in a larger storage: (Strided, its usual form)."""
    dtype, shape, raw = tensor
    size, order = SIZE[dtype], list(range(len(shape)))
    rng.shuffle(order)
    strides, step = [0] * len(shape), rng.choice((1, 1, 2))
    for d in order:
        strides[d] = step
        step *= shape[d]
    offset = rng.randrange(5)
    room = bytearray(numbers(rng, dtype, offset + step))
    places = [offset]
    for n, stride in zip(shape, strides):
        places = [at + i * stride for at in places for i in range(n)]
    for i, at in enumerate(places):
        room[at * size:(at + 1) * size] = raw[i * size:(i + 1) * size]
    return Strided(Storage(dtype, bytes(room)), shape, strides, offset)


class Torch(Case):
    """Checkpoints of torch.save give the bytes that the same tensors give as safetensors."""

    def setUp(self):
        super().setUp()
        self.sources, self.wanted = {}, {}
        for part, folder in (("llama", self.llama()), ("vqgan", self.vqgan("F32"))):
            self.good("-o", self.out, "--" + part, folder)
            with open(self.out, "rb") as f:
                self.wanted[part] = f.read()
            os.remove(self.out)
            model = os.path.join(folder, "model.safetensors")
            self.sources[part] = load_safetensors(model)
            os.remove(model)

    def same(self, part="llama", given=None):
        """Converts the folder, or what is given in its place."""
        self.good("-o", self.out, "--" + part, given or self.path(part))
        with open(self.out, "rb") as f:
            self.assertEqual(f.read(), self.wanted[part])
        os.remove(self.out)

    def save(self, value, part="llama", name="pytorch_model.bin", **how):
        path = self.path(part, name)
        write_zip(path, records(value, how.pop("protocol", 2)), **how)
        return path

    def test_formats(self):
        for part, tensors in self.sources.items():
            value = strided(tensors)
            for how in ({}, {"wide": True}, {"deflate": True}, {"protocol": 4}, {"protocol": 5}):
                with self.subTest(part=part, how=how):
                    self.save(value, part, **how)
                    self.same(part)
            for parameter in (True, "old", "state", "subclass"):
                self.save(strided(tensors, parameter=parameter), part)
                self.same(part)
            with open(self.path(part, "pytorch_model.bin"), "wb") as f:
                f.write(old_format(value))
            self.same(part)
            with zipfile.ZipFile(self.path(part, "pytorch_model.bin"), "w") as z:
                for name, raw in records(value, top="x/"):
                    z.writestr(name, raw)
            self.same(part)

    def test_strides_and_offsets(self):
        rng = random.Random(8)
        for part, tensors in self.sources.items():
            value = OrderedDict((name, turned(t, rng)) for name, t in tensors.items())
            for deflate in (False, True):
                self.save(value, part, deflate=deflate)
                self.same(part)
            with open(self.path(part, "pytorch_model.bin"), "wb") as f:
                f.write(old_format(value))
            self.same(part)

    def test_negative_bit(self):
        """Tensors whose numbers lie there with the other sign: x.conj().imag is one."""
        rng = random.Random(9)
        for part, tensors in self.sources.items():
            value = OrderedDict()
            for n, (name, tensor) in enumerate(tensors.items()):
                size, raw = SIZE[tensor[0]], bytearray(tensor[2])
                raw[size - 1::size] = bytes(b ^ 0x80 for b in raw[size - 1::size])
                t = Strided(Storage(tensor[0], bytes(raw)), tensor[1])
                t = turned((tensor[0], tensor[1], bytes(raw)), rng) if n % 2 else t
                value[name] = Strided(*[t.args[i] for i in (0, 2, 3, 1)], parameter=n % 3 == 0,
                                      extra=({"neg": True},))
            for deflate in (False, True):
                self.save(value, part, deflate=deflate)
                self.same(part)
        name, (dtype, shape, raw) = next(iter(tensors.items()))
        value[name] = Strided(Storage(dtype, raw), shape, extra=({"neg": False},))
        self.save(dict(strided(tensors), **{name: value[name]}), part)
        self.same(part)
        for odd in ({"conj": True}, {"neg": 1}, [], {"x": None}):
            value[name] = Strided(Storage(dtype, raw), shape, extra=(odd,))
            self.save(value, part)
            self.refused("properties other than a sign", "-o", self.out, "--" + part,
                         self.path(part))

    def test_untyped_storages(self):
        """Types that have no storage of their own, such as uint16 in which bfloat16 was hidden."""
        old = b"ctorch._utils\n_rebuild_tensor_v2\n"
        for words, message in ((b"ctorch\nuint16\n", "has type U16, not F32"),
                               (b"ctorch\nfloat8_e4m3fn\n", "has type F8_E4M3, not F32")):
            size = 1 if b"float8" in words else 2
            body = (b"\x80\2}X\x11\0\0\0model.norm.weight" + old.replace(b"v2", b"v3")
                    + b"((X\7\0\0\0storagectorch.storage\nUntypedStorage\nX\1\0\0\0000"
                    b"X\3\0\0\0cpuK"
                    + bytes([32 * size]) + b"tQK\0K\x20\x85K\1\x85\x89ccollections\nOrderedDict\n)R"
                    + words + b"tRs.")
            write_zip(self.path("llama", "pytorch_model.bin"),
                      [("a/data.pkl", body), ("a/data/0", bytes(32 * size))])
            self.refused(message, "-o", self.out, "--llama", self.path("llama"))

    def test_python_2(self):
        """There an OrderedDict is made of a list of pairs."""
        class Old(OrderedDict):
            def __reduce__(self):
                return OrderedDict, ([[name, t] for name, t in self.items()],)
        self.save(Old(strided(self.sources["llama"])))
        self.same()

    def test_one_storage_for_all(self):
        for part, tensors in self.sources.items():
            dtype = {"llama": "F16", "vqgan": "F32"}[part]
            storage, value, at = Storage(dtype, b"".join(t[2] for t in tensors.values())), {}, 0
            for name, (_, shape, raw) in tensors.items():
                value[name] = Strided(storage, shape, offset=at)
                at += len(raw) // SIZE[dtype]
            self.save(value, part)
            self.same(part)

    def test_tied(self):
        value = strided(self.sources["llama"])
        value["lm_head.weight"] = value["model.embed_tokens.weight"]
        with open(self.path("llama", "config.json"), "w") as f:
            json.dump(dict(LLAMA, tie_word_embeddings=True), f)
        self.save(value)
        self.good("-o", self.out, "--llama", self.path("llama"))
        self.assertNotIn("output.weight", load_gguf(self.out)[1])
        with open(self.path("llama", "config.json"), "w") as f:
            json.dump(LLAMA, f)
        self.good("-o", self.out, "--llama", self.path("llama"), "--force")
        tensors = load_gguf(self.out)[1]
        self.assertEqual(tensors["output.weight"], tensors["token_embd.weight"])

    def test_nested_and_attributes(self):
        class Attributed(OrderedDict):
            """As state_dict() makes them: an OrderedDict with an attribute."""
            def __reduce__(self):
                return (OrderedDict, (), {"_metadata": {"": {"version": 1}}}, None,
                        iter(self.items()))

        value = Attributed(strided(self.sources["llama"]))
        for nest in (lambda v: v, lambda v: {"epoch": 3, "state_dict": v, "best": None},
                     lambda v: {"model": v, "lr": 1e-3, "names": ["a", "b", (1, 2, 3, 4)]},
                     lambda v: {"optimizer": {"state": {0: {"step": 1 << 40, "on": True}}},
                                "model": {"state_dict": dict(v)}}):
            self.save(nest(value))
            self.same()
        value.update(epoch=3)
        self.save(value)
        self.refused("holds epoch, which is no tensor", "-o", self.out, "--llama",
                     self.path("llama"))
        for odd in ([1], None, {"state_dict": [value["model.norm.weight"]]}, {3: 4}):
            self.save(odd)
            self.refused("holds (no dictionary|state_dict|3)", "-o", self.out, "--llama",
                         self.path("llama"))

    def test_prefixes(self):
        for part, tensors in self.sources.items():
            for prefix in ("module.", "_orig_mod.", "model.", "vqgan.net."):
                self.save(strided({prefix + name: t for name, t in tensors.items()}), part)
                self.same(part)
            self.save(strided(dict({"x." + name: t for name, t in tensors.items()},
                                   y=("F32", [1], bytes(4)))), part)
            self.refused("tensor y does not begin with x[.] as", "-o", self.out, "--" + part,
                         self.path(part))

    def test_inv_freq(self):
        angles = Strided(Storage("F32", bytes(16)), [4])
        value = strided(self.sources["llama"])
        for n in range(2):
            value["model.layers.%d.self_attn.rotary_emb.inv_freq" % n] = angles
        self.save(value)
        self.same()
        value["model.layers.0.mlp.rotary_emb.inv_freq"] = angles
        self.save(value)
        self.refused("mlp.rotary_emb.inv_freq is unexpected", "-o", self.out, "--llama",
                     self.path("llama"))

    def test_shards(self):
        names, where = sorted(self.sources["llama"]), {}
        for n in range(3):
            file = "pytorch_model-%05d-of-00003.bin" % (n + 1)
            part = {name: self.sources["llama"][name] for name in names[n::3]}
            where.update(dict.fromkeys(part, file))
            self.save(strided(part), name=file)
        self.same()                 # they say themselves how many they are
        os.rename(self.path("llama", file), self.path("away"))
        self.refused("holds 2 of 3 shards; %s is missing" % file, "-o", self.out, "--llama",
                     self.path("llama"))
        os.rename(self.path("away"), self.path("llama", file))
        with open(self.path("llama", "pytorch_model.bin.index.json"), "w") as f:
            json.dump({"metadata": {"total_size": 1}, "weight_map": where}, f)
        self.same()
        self.save(strided(self.sources["llama"]), name=file)
        self.refused("as another shard does", "-o", self.out, "--llama", self.path("llama"))

    def test_which_file(self):
        value = strided(self.sources["vqgan"])
        for name in ("diffusion_pytorch_model.bin", "last.ckpt", "vq.pt", "vq.pth", "weights.bin"):
            path = self.save(value, "vqgan", name=name)
            self.same("vqgan")
            self.same("vqgan", path)
            os.remove(path)
        path = self.save(value, "vqgan", name="a.pt")
        self.save(OrderedDict(), "vqgan", name="b.pt")
        self.refused("holds a.pt and more", "-o", self.out, "--vqgan", self.path("vqgan"))
        self.same("vqgan", path)
        self.refused("also an input", "-o", path, "--vqgan", path, "--force", path=path)
        save_safetensors(self.path("vqgan", "pytorch_model.safetensors"), self.sources["vqgan"])
        self.same("vqgan")
        for name in os.listdir(self.path("vqgan")):
            os.remove(self.path("vqgan", name))
        with open(self.path("vqgan", "model_config.pt"), "w"):
            self.refused("convert2hf.py", "-o", self.out, "--vqgan", self.path("vqgan"))

    def test_what_is_no_checkpoint(self):
        path = self.path("llama", "pytorch_model.bin")
        with zipfile.ZipFile(self.path("plain"), "w") as z:
            z.writestr("a/b/data.pkl", b"N.")
        with open(self.path("plain"), "rb") as f:
            plain = f.read()
        good = old_format(strided({"a": ("F32", [2], bytes(8))}))
        for blob, message in (
                (b"", "no checkpoint of PyTorch"), (b"\x93NUMPY", "no checkpoint of PyTorch"),
                (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
                (plain, "none that torch.save wrote"), (plain[:-30], "without an end"),
                (pickle.dumps({}, 2), "none that torch.save wrote"),
                (good + b"\0", "where its pickle tells of"), (good[:-1], "tells of"),
                (good[:-9], "not those that its pickle"), (good[:-17], "ends too early"),
                (good.replace(b"little_endianq\2\x88", b"little_endianq\2\x89"), "big-endian")):
            with open(path, "wb") as f:
                f.write(blob)
            self.refused(message, "-o", self.out, "--llama", self.path("llama"), path=path)
        value = records(strided({"a": ("F32", [2], bytes(8))}))
        for change, message in (
                (value[:1] + [("archive/byteorder", b"big")] + value[2:], "big-endian"),
                (value + [("x/data.pkl", b"N.")], "none that torch.save wrote"),
                (value + value[2:3], "holds archive/data/0 twice"),
                (value[:2], "storage 0, but there are none"),
                (value[:2] + [("archive/data/0", bytes(12))], "needs 8 bytes .* there are 12"),
                ([(value[0][0], b" " * (convert.MAX_HEADER + 1))], "a short record is expected")):
            write_zip(path, change)
            self.refused(message, "-o", self.out, "--llama", self.path("llama"), path=path)

    def test_expanded_and_sliced(self):
        """Few bytes that stand for many, and tensors that are a thin slice of much."""
        value = strided(self.sources["llama"])
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            value[name] = Strided(Storage("F16", bytes(64)), [1 << 30, 32], [0, 1])
        self.save(value)
        for tied in (False, True):              # equal, which would take long to find out
            with open(self.path("llama", "config.json"), "w") as f:
                json.dump(dict(LLAMA, vocab_size=1 << 30, tie_word_embeddings=tied), f)
            self.refused("far more than the", "-o", self.out, "--llama", self.path("llama"))
        with open(self.path("llama", "config.json"), "w") as f:
            json.dump(LLAMA, f)
        value = strided(self.sources["llama"])
        value["model.norm.weight"] = Strided(Storage("F16", bytes(1 << 21)), [32], [1 << 15])
        self.save(value)
        self.refused("model.norm.weight is a small part", "-o", self.out, "--llama",
                     self.path("llama"))
        value["model.norm.weight"] = Strided(Storage("F16", bytes(64)), [32], [0])
        self.save(value)
        self.good("-o", self.out, "--llama", self.path("llama"))
        self.assertEqual(load_gguf(self.out)[1]["output_norm.weight"][2], bytes(128))


# PEFT's names of the matrices, and the weights file's.
LORA = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down"}


class Lora(Case):
    """Adapters of PEFT to a file for lvm and back; tests/golden_lora is one that PEFT saved."""

    def name(self, layer, matrix, half):
        return "base_model.model.model.layers.%d.%s.lora_%s.weight" % (layer, matrix, half)

    def tensors(self, layers=(0, 1), matrices=tuple(LORA), rank=4, dtype="F32", width=64):
        shapes = {}
        for layer in layers:
            for matrix in matrices:
                shapes[self.name(layer, matrix, "A")] = [rank, width]
                shapes[self.name(layer, matrix, "B")] = [width, rank]
        return fill(shapes, dtype)

    def folder(self, name="lora", tensors=None, file="adapter_model.safetensors", **config):
        os.makedirs(self.path(name))
        with open(self.path(name, "adapter_config.json"), "w") as f:
            json.dump(dict({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}, **config), f)
        if tensors is None:
            tensors = self.tensors()
        if file.endswith(".bin"):
            write_zip(self.path(name, file), records(strided(tensors)))
        else:
            save_safetensors(self.path(name, file), tensors)
        return self.path(name)

    def test_as_peft_saved_it(self):
        """The same bytes as safetensors itself wrote; and once more through lvm's file."""
        golden = os.path.join(TOP, "tests", "golden_lora")
        out, err = self.good("-o", self.out, "--lora", golden, "--name", "a style", "--license", "MIT")
        self.assertEqual((out, err), (self.out + "\n", ""))
        keys, tensors = load_gguf(self.out)
        self.assertEqual(keys, {
            "general.architecture": "lvm", "general.alignment": 64, "general.name": "a style",
            "general.license": "MIT", "lvm.format_version": 1, "general.type": "adapter",
            "adapter.type": "lora", "adapter.lora.alpha": 6.0})
        source = load_safetensors(os.path.join(golden, "adapter_model.safetensors"))
        for layer in range(2):
            for hf, gguf in LORA.items():
                for half in "AB":
                    _, shape, raw = source[self.name(layer, hf, half)]
                    self.assertEqual(tensors.pop("blk.%d.%s.weight.lora_%s" % (layer, gguf, half.lower())),
                                     (0, shape[::-1], raw))
        self.assertEqual(tensors, {})
        out, _ = self.good(self.out, "--to-hf", self.path("back"))
        self.assertEqual(out, self.path("back") + "\n")
        with open(os.path.join(golden, "adapter_model.safetensors"), "rb") as f, open(
                self.path("back", "adapter_model.safetensors"), "rb") as g:
            self.assertEqual(f.read(), g.read())
        with open(self.path("back", "adapter_config.json")) as f, open(
                os.path.join(golden, "adapter_config.json")) as g:
            back, given = json.load(f), json.load(g)
        given["target_modules"].sort()
        for key in back:
            if key != "base_model_name_or_path":
                self.assertEqual(back[key], given[key], key)
        self.good("-o", self.path("again.bin"), "--lora", self.path("back"), "--name", "a style",
                  "--license", "MIT")
        with open(self.out, "rb") as f, open(self.path("again.bin"), "rb") as g:
            self.assertEqual(f.read(), g.read())

    def test_types_and_sources(self):
        for dtype in ("F32", "F16", "BF16"):
            tensors = self.tensors((0, 11, 2), ("self_attn.q_proj", "mlp.down_proj"), dtype=dtype)
            folder = self.folder(dtype, tensors)
            self.good("-o", self.out, "--lora", folder, "--force")
            self.assertEqual(list(load_gguf(self.out)[1])[:5], [
                "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b",
                "blk.0.ffn_down.weight.lora_a", "blk.0.ffn_down.weight.lora_b",
                "blk.2.attn_q.weight.lora_a"])
            self.good(self.out, "--to-hf", self.path("back"), "--force")
            self.assertEqual(load_safetensors(self.path("back", "adapter_model.safetensors")), tensors)
            with open(self.path("back", "adapter_config.json")) as f:
                config = json.load(f)
            self.assertEqual(config["target_modules"], ["down_proj", "q_proj"])
            self.assertEqual(config["layers_to_transform"], [0, 2, 11])
            with open(self.out, "rb") as f:
                wanted = f.read()
            for n, given in enumerate((
                    os.path.join(folder, "adapter_model.safetensors"),
                    self.folder(dtype + "bin", tensors, "adapter_model.bin"),
                    self.folder(dtype + "default", {k.replace("lora_A", "lora_A.default"): v
                                                    for k, v in tensors.items()}),
                    self.folder(dtype + "short", {k.replace("base_model.model.", ""): v
                                                  for k, v in tensors.items()}))):
                self.good("-o", self.path("same.bin"), "--lora", given, "--force")
                with open(self.path("same.bin"), "rb") as f:
                    self.assertEqual(f.read(), wanted, n)

    def test_alpha(self):
        for n, (config, wanted) in enumerate((
                ({}, 8.0), ({"lora_alpha": 0.5}, 0.5), ({"use_rslora": True}, 16.0))):
            self.good("-o", self.out, "--lora", self.folder(str(n), **config), "--force")
            self.assertEqual(load_gguf(self.out)[0]["adapter.lora.alpha"], wanted)
        self.good(self.out, "--to-hf", self.path("back"))
        with open(self.path("back", "adapter_config.json")) as f:
            config = json.load(f)
        self.assertEqual((config["lora_alpha"], config["use_rslora"], config["r"]), (16, False, 4))

    def test_refused_configurations(self):
        harmless = {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian",
                    "target_modules": "all-linear", "modules_to_save": None, "use_dora": False,
                    "megatron_core": "megatron.core", "rank_pattern": {}, "unheard_of": None}
        self.good("-o", self.out, "--lora", self.folder("harmless", **harmless))
        os.remove(self.out)
        for n, (message, config) in enumerate((
                ('peft_type is "IA3"; only "LORA" is', {"peft_type": "IA3"}),
                ('bias is "all"; only "none"', {"bias": "all"}),
                ("use_dora is true; only plain LoRA", {"use_dora": True}),
                ("lora_bias is true", {"lora_bias": True}),
                ("fan_in_fan_out is true", {"fan_in_fan_out": True}),
                (r'modules_to_save is \["lm_head"\]', {"modules_to_save": ["lm_head"]}),
                ("rank_pattern is", {"rank_pattern": {"q_proj": 8}}),
                ("alpha_pattern is", {"alpha_pattern": {"q_proj": 8}}),
                ("unheard_of is 1; only plain", {"unheard_of": 1}),
                ('init_lora_weights is "pissa_niter_4", which changes', {
                    "init_lora_weights": "pissa_niter_4"}),
                ('init_lora_weights is "OLoRA"', {"init_lora_weights": "OLoRA"}),
                ("r is missing; it must be a whole number from 1", {"r": None}),
                ("r is true", {"r": True}),
                ("lora_alpha is 0; it must be a number", {"lora_alpha": 0}),
                ('lora_alpha is "8"', {"lora_alpha": "8"}))):
            with self.subTest(message):
                folder = self.folder(str(n), **config)
                self.refused(message, "-o", self.out, "--lora", folder,
                             path=os.path.join(folder, "adapter_config.json"))

    def test_refused_tensors(self):
        q, k = "self_attn.q_proj", "self_attn.k_proj"
        good = self.tensors()
        a, b = good[self.name(0, q, "A")], good[self.name(0, q, "B")]
        for n, (message, change) in enumerate((
                (r"layers.1.mlp.up_proj.lora_B.weight is missing",
                 {self.name(1, "mlp.up_proj", "B"): None}),
                (r"layers.1.mlp.up_proj.lora_A.weight is missing",
                 {self.name(1, "mlp.up_proj", "A"): None}),
                (r"lora_A.weight is \[64, 4\]; its rank should be 4", {self.name(0, q, "A"): b}),
                (r"lora_B.weight is \[4, 64\]; its rank should be 4", {self.name(0, k, "B"): a}),
                (r"lora_A.weight is \[64\]; its rank", {self.name(0, q, "A"): ("F32", [64], a[2][:256])}),
                ("has type I32, not F32, F16, BF16", {self.name(0, q, "A"): ("I32", a[1], a[2])}),
                ("embed_tokens.lora_embedding_A is no half", {
                    "base_model.model.model.embed_tokens.lora_embedding_A": a}),
                ("q_proj.lora_magnitude_vector is no half", {
                    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": a}),
                ("lora_A.default.weight stands there under two names", {
                    self.name(0, q, "A").replace("lora_A", "lora_A.default"): a}),
                ("layers.00.self_attn.q_proj.lora_A.weight is no half", {
                    self.name(0, q, "A").replace("layers.0", "layers.00"): a}),
                ("mlp.gate.lora_A.weight is no half", {self.name(0, "mlp.gate", "A"): a}),
                ("1 of its 256 values are NaN", {
                    self.name(0, q, "A"): ("F32", a[1], a[2][:-4] + b"\0\0\xc0\x7f")}),
                ("holds no adapters", dict.fromkeys(good)))):
            with self.subTest(message):
                tensors = {name: t for name, t in dict(good, **change).items() if t is not None}
                self.refused(message, "-o", self.out, "--lora", self.folder(str(n), tensors))
        self.good("-o", self.out, "--lora", self.path("11"), "--allow-nonfinite")

    def test_refused_folders(self):
        os.makedirs(self.path("empty"))
        self.refused("holds no adapter_config.json", "-o", self.out, "--lora", self.path("empty"))
        self.refused("is no folder; give the one that holds adapter_config.json", "-o", self.out,
                     "--lora", self.path("nowhere"))
        self.refused("holds no adapter_config.json.*whole model is given as --llama", "-o", self.out,
                     "--lora", self.llama())
        folder = self.folder()
        os.remove(os.path.join(folder, "adapter_model.safetensors"))
        self.refused("holds no adapter_model.safetensors and no adapter_model.bin", "-o", self.out,
                     "--lora", folder)
        folder = self.folder("whole")
        self.refused("is a LoRA adapter of the model null.*give it as --lora", "-o", self.out,
                     "--llama", folder, path=folder)
        with open(self.path("exists.bin"), "wb") as f:
            f.write(b"precious")
        self.refused("exists already", "-o", self.path("exists.bin"), "--lora", folder)
        config = os.path.join(folder, "adapter_config.json")
        self.refused("is also an input", "-o", config, "--force", "--lora", folder)

    def test_usage(self):
        folder = self.folder()
        for extra in (["--llama", folder], ["--vqgan", folder], ["--type", "f16"], ["--bos", "1"],
                      ["--lvm", "x"], ["x.bin"]):
            status, _, err = self.run_main("-o", self.out, "--lora", folder, *extra)
            self.assertEqual(status, 2)
            self.assertIn("--lora takes -o FILE", err)
        status, _, err = self.run_main("--lora", folder)
        self.assertEqual(status, 2)

    def test_refused_files_back(self):
        """Files of adapters that lvm could have, but PEFT's layout has no place for."""
        def file(name, tensors, kind="lora", alpha=8.0):
            keys = [convert.gguf_key("general.architecture", 8, "lvm"),
                    convert.gguf_key("lvm.format_version", 4, 1),
                    convert.gguf_key("general.alignment", 4, 64),
                    convert.gguf_key("general.type", 8, "adapter"),
                    convert.gguf_key("adapter.type", 8, kind),
                    convert.gguf_key("adapter.lora.alpha", 6, alpha)]
            save_safetensors(self.path("t"), fill(tensors, "F32"))
            jobs = [convert.Job(n, t.dtype, t.shape, t, None)
                    for n, t in convert.read_safetensors(self.path("t")).items()]
            with open(self.path(name), "wb") as f:
                f.writelines(convert.gguf_pieces(keys, jobs))
            return self.path(name)
        q, k = "blk.0.attn_q.weight.lora_", "blk.0.attn_k.weight.lora_"
        good = {q + "a": [4, 8], q + "b": [8, 4]}
        self.good(file("good", good), "--to-hf", self.path("hf"))
        for n, (message, args) in enumerate((
                ("ranks 2, 4; only one rank", (dict(good, **{k + "a": [2, 8], k + "b": [8, 2]}),)),
                ('adapter.type is "ia3"; only "lora"', (good, "ia3")),
                ("adapter.lora.alpha is 0.0", (good, "lora", 0.0)),
                ("blk.0.attn_norm.weight.lora_a is no half", ({"blk.0.attn_norm.weight.lora_a": [4, 8]},)),
                ("blk.0.attn_q.weight is no half", ({"blk.0.attn_q.weight": [4, 8]},)),
                ("lora_B.weight is missing", ({q + "a": [4, 8]},)),
                ("attn_q.weight.lora_b is no half", ({q + "a": [4, 8], q + "b": [32]},)))):
            with self.subTest(message):
                self.refused(message, file(str(n), *args), "--to-hf", self.path("back"))


class DeLVM(Case):
    """InternLM's class as DeLVM's tools export it: LLaMA with four biases a layer."""

    CONFIG = dict({k: v for k, v in LLAMA.items() if k not in (
        "num_key_value_heads", "rope_theta", "bos_token_id", "eos_token_id")},
        architectures=["InternLMForCausalLM"], model_type="internlm", bias=True, use_cache=True,
        auto_map={"AutoConfig": "modeling_internlm.InternLMConfig"})

    def test_export(self):
        tensors = fill(llama_shapes(dict(LLAMA, num_key_value_heads=4), "qkvo"), "F16")
        for n in range(2):
            tensors["model.layers.%d.self_attn.rotary_emb.inv_freq" % n] = ("F16", [4], bytes(8))
        folder = save(self.path("delvm"), self.CONFIG, {})
        os.remove(os.path.join(folder, "model.safetensors"))
        write_zip(os.path.join(folder, "pytorch_model.bin"), records(strided(tensors)))
        _, err = self.good("-o", self.out, "--llama", folder)
        self.assertRegex(err, r"\Aconvert.py: .*: passed over, as the model does not compute with "
                         r"them: model.layers.0.self_attn.rotary_emb.inv_freq and 1 more\n\Z")
        keys, made = load_gguf(self.out)
        self.assertEqual(keys["lvm.rope.freq_base"], 10000.0)
        self.assertNotIn("lvm.bos_token_id", keys)
        self.assertEqual(len([n for n in made if n.endswith(".bias")]), 8)
        self.good(self.out, "--to-hf", self.path("hf"))
        back = load_safetensors(self.path("hf", "llama", "model.safetensors"))
        for name in back:
            self.assertEqual(back[name], tensors[name], name)
        config = self.config_back("llama")
        self.assertEqual((config["architectures"], config["attention_bias"]),
                         (["LlamaForCausalLM"], True))

    def test_refusals(self):
        tensors = fill(llama_shapes(dict(LLAMA, num_key_value_heads=4)), "F16")
        for n, (message, change) in enumerate((
                ('InternLMForCausalLM.* of type "vit"', {"model_type": "vit", "norm_eps": 1e-6}),
                ('"Other"', {"architectures": ["Other"]}),
                ('of type "llama"', {"model_type": "llama"}),
                ("rotary is .*dynamic", {"rotary": {"base": 10000, "type": "dynamic"}}),
                ("rope_theta is 500.0", {"rope_theta": 500.0}),
                ("bias is 3", {"bias": 3}), ("promises attention biases", {}),
                ("promises attention biases", {"bias": None}))):
            config = {k: v for k, v in dict(self.CONFIG, **change).items() if v is not None}
            folder = save(self.path(str(n)), config, tensors)
            self.refused(message, "-o", self.out, "--llama", folder, path=folder)
        folder = save(self.path("none"), dict(self.CONFIG, bias=False, architectures=None), tensors)
        self.good("-o", self.out, "--llama", folder)


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
            ("hidden_channels 48 is no multiple of 32", {"hidden_channels": 48}),
            ("channel_mult is empty", {"channel_mult": []}),
            ("channel_mult is .*list of at most 8", {"channel_mult": [1] * 9}),
            ("attn_resolutions is .*whole numbers", {"attn_resolutions": ["16"]}),
            ("no_attn_mid_block is 1", {"no_attn_mid_block": 1}),
            ("num_res_blocks is 1000", {"num_res_blocks": 1000}),
            ("resolution is -1", {"resolution": -1}),
            ("num_res_blocks is 0", {"num_res_blocks": 0}),
            ("resolution 13 does not halve 1 times", {"resolution": 13}),
            ("double_z is true", {"double_z": True}),
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
        self.refused("a: is empty", "-o", self.path("a", "out.bin"), "--llama", self.path("a"))
        with open(self.path("a", "config.json"), "w") as f:
            f.write("{}")
        self.refused("holds no model.safetensors", "-o", self.out, "--llama", self.path("a"))

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
        self.refused("is a folder", "-o", vqgan, "--vqgan", vqgan, "--force", path=vqgan)
        self.refused("is a folder", "-o", self.path("new") + "/", "--vqgan", vqgan)
        self.refused("folder does not exist", "-o", self.path("no", "x"), "--vqgan", vqgan)
        self.good(self.out, "--to-hf", self.path("hf"))
        self.refused("exists already", self.out, "--to-hf", self.path("hf"))
        self.good(self.out, "--to-hf", self.path("hf"), "--force")
        self.refused("there is no such file", self.path("no"), "--to-hf", self.path("hf"))
        self.refused("no GGUF at its start", source, "--to-hf", self.path("hf2"))

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
                     ("-o", "x", "--llama", "d", "--encoder-type", "f16"),
                     ("-o", "x", "--vqgan", "d", "--encoder-type", "q4_0"),
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
            (1, 2, both + tensor(1 << 60, 0, 0), "outside the file"),
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


class Hostile(Case):
    """Pickles and archives made to do harm: one message each."""

    def setUp(self):
        super().setUp()
        self.folder = self.llama(num_hidden_layers=1)
        os.remove(os.path.join(self.folder, "model.safetensors"))
        self.file = os.path.join(self.folder, "pytorch_model.bin")

    def refuses(self, message, blob=None):
        if blob is not None:
            with open(self.file, "wb") as f:
                f.write(blob)
        return self.refused(message, "-o", self.out, "--llama", self.folder, path=self.file)

    def refuses_pickle(self, message, text):
        write_zip(self.file, [("a/data.pkl", text), ("a/data/0", bytes(8))])
        self.refuses(message)

    def test_programs_in_pickles(self):
        marker = self.path("marker")
        shell = b"X" + struct.pack("<I", len(marker) + 6) + b"touch " + marker.encode()
        for text, message in (
                (b"cos\nsystem\n" + shell + b"\x85R.", "asks for os.system"),
                (b"\x80\4\x8c\2os\x8c\6system\x93" + shell + b"\x85R.", "asks for os.system"),
                (b"cbuiltins\neval\n.", "asks for builtins.eval"),
                (b"ctorch\nload\n.", "asks for torch.load"),
                (b"ctorch.storage\n_load_from_bytes\n.", "asks for torch.storage._load_from"),
                (b"c" + b"x" * 300 + b"\n\n.", "ends too early"),
                (b"c\x1b[2J\nx\n.", r"asks for '\\x1b\[2J.x'"),
                (b"(" + shell + b"ios\nsystem\n.", "operation 'i'"),
                (b"(cos\nsystem\n" + shell + b"o.", "asks for os.system"),
                (b"ccollections\nOrderedDict\n)\x81.", r"operation '\\x81'"),
                (b"\x82\1.", r"operation '\\x82'"), (b"I1\n.", "operation 'I'"),
                (b"L9999999L\n.", "operation 'L'"),
                (b"\x8b\xff\xff\xff\x7f.", r"operation '\\x8b'"),
                (b"Pkey\n.", "operation 'P'"), (b"\x97.", r"operation '\\x97'"),
                (b"ccollections\nOrderedDict\n(K\1tR.", "a call that no checkpoint"),
                (b"ctorch\nFloatStorage\n)R.", "a call that no checkpoint"),
                (b"K\1)R.", "a call that no checkpoint"),
                (b"ctorch._utils\n_rebuild_parameter\n(NNNtR.", "a call that no checkpoint"),
                (b"K\1\x8c\1x\x93.", "by no string"), (b"NNb.", "takes NoneType for dict"),
                (b"K\1K\2a.", "takes int for list")):
            with self.subTest(text):
                self.refuses_pickle(message, text)
        self.assertFalse(os.path.exists(marker))

    def test_broken_pickles(self):
        storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\2tQ"
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
        tensor = rebuild + b"K\0K\2\x85K\1\x85\x89NtR"
        for text, message in (
                (b"", "ends too early"), (b".", "empty stack"), (b"(.", "empty stack"),
                (b"t.", "empty stack"), (b"N(\x85.", "empty stack"), (b"K", "ends too early"),
                (b"h\0.", "never kept"), (b"q\0N.", "empty stack"), (b"\x80\6N.", "protocol"),
                (b"\x8c\1\xff.", "not UTF-8"), (b"X\xff\xff\xff\xffx.", "ends too early"),
                (b"\x8d" + b"\xff" * 8 + b"x.", "ends too early"),
                (b"\x8e" + b"\xff" * 8 + b"x.", "ends too early"), (b"}Ns.", "empty stack"),
                (b"}(Nu.", "without a value"), (b"}(NNu.", "neither a name nor"),
                (b"}()Nu.", "neither a name nor"), (b"}G" + b"\0" * 8 + b"Ns.", "neither a name"),
                (b"}J\0\0\0\x80Ns.", "neither a name nor"), (b"}\x8c\1xN\x8c\1xN(u.", "dict"),
                (b"}(\x8c\1xN\x8c\1xNu.", "has x twice"), (b"}(K\1N\x88Nu.", "has True twice"),
                (b"NQ.", "other than a storage"), (b")Q.", "other than a storage"),
                (storage.replace(b"K\2", b"J\xff\xff\xff\xff"), "a storage wrongly"),
                (storage.replace(b"ctorch\nFloatStorage\n", b"N"), "a storage wrongly"),
                (storage.replace(b"ctorch\nFloatStorage\n",
                                 b"ccollections\nOrderedDict\n"), "a storage wrongly"),
                (storage + storage.replace(b"K\2", b"K\3"), "storage 0 in two ways"),
                (rebuild + b"K\1K\2\x85K\1\x85\x89NtR.", r"tensor \[2\] outside its"),
                (rebuild + b"K\0K\2\x85J\xff\xff\xff\xff\x85\x89NtR.", "a tensor wrongly"),
                (rebuild + b"K\0K\2\x85)\x89NtR.", "a tensor wrongly"),
                (rebuild + b"K\0K\2K\1\x89NtR.", "a tensor wrongly"),
                (rebuild + b"\x88K\2\x85K\1\x85\x89NtR.", "a tensor wrongly"),
                (rebuild + b"K\0(" + b"K\1" * 9 + b"t(" + b"K\1" * 9 + b"t\x89NtR.",
                 "a tensor wrongly"),
                (b"(" + tensor + b"l.", "operation 'l'"), (tensor + b".", "no dictionary"),
                (b"}q\0\x8c\1xh\0s.", "holds x, which is no tensor"),
                (b"}\x8c\5modelh\0s.", "never kept"), (b"}q\0\x8c\5modelh\0s.", "holds model"),
                (b"}X\1\0\0\0a" + tensor + b"s.", "not those that its configuration")):
            with self.subTest(text):
                if "configuration" in message:
                    write_zip(self.file, [("a/data.pkl", text), ("a/data/0", bytes(8))])
                    self.refused(message, "-o", self.out, "--llama", self.folder)
                else:
                    self.refuses_pickle(message, text)

    def test_bombs(self):
        """Each in a process of its own with 400 MB of addresses and 20 s."""
        n = convert.MAX_STEPS
        deep = b"]" * (n // 2 - 9) + b"a" * (n // 2 - 10) + b"."
        chain = b"N" + b"\x85" * (n - 3) + b"."
        memo = b"}" + b"".join(b"r" + struct.pack("<I", 4096 * i) for i in range(n // 2)) + b"."
        keys = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(n // 3)) + b"u."
        wide = b"}(" + b"\x8c\1aN" * (n // 3) + b"u."
        zeros = zlib.compress(bytes(1 << 26), 9)[2:-4]
        tensors = fill(llama_shapes(dict(LLAMA, num_hidden_layers=1)), "F16")
        cases = [([("a/data.pkl", text)], message) for text, message in (
            (deep, "no dictionary"), (chain, "no dictionary"), (memo, "holds no|not those"),
            (keys, "holds 0, which"), (wide, "has a twice"), (b"]" * (n + 9), "operations"),
            (b"(" * (n + 9), "operations"), (b"]" * (convert.MAX_HEADER - 9), "operations"))]
        for entries, message in cases:
            with self.subTest(message):
                write_zip(self.file, entries)
                self.limited(message)
        entries = records(strided(tensors))
        write_zip(self.file, entries[:2] + [(entries[2][0], bytes(1 << 26))], deflate=True)
        self.limited("needs .* bytes as storage")
        with open(self.file, "wb") as f:        # a pickle of 64 MB in 64 KB
            name = b"a/data.pkl"
            f.write(struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 8, 0, 0, 0, len(zeros), 1 << 20,
                                len(name), 0) + name + zeros)
            pos = f.tell()
            f.write(struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, 0, 8, 0, 0, 0, len(zeros), 1 << 20,
                                len(name), 0, 0, 0, 0, 0, 0) + name)
            f.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 46 + len(name), pos, 0))
        self.limited("operation")

    def limited(self, message):
        code = ("import resource, sys; sys.path.insert(0, %r); sys.dont_write_bytecode = True\n"
                "resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
                "import convert; sys.exit(convert.main(sys.argv[1:]))" % TOP)
        done = subprocess.run([sys.executable, "-c", code, "-o", self.out, "--llama", self.folder],
                              capture_output=True, check=False, timeout=20)
        err = done.stderr.decode()
        self.assertEqual((done.returncode, done.stdout), (1, b""), err)
        self.assertRegex(err, message)
        self.assertTrue(err.startswith("convert.py: " + self.folder), err)
        self.assertNotIn("memory", err)

    def test_broken_archives(self):
        """Changes in one place of a good archive, found by its bytes."""
        tensors = fill(llama_shapes(dict(LLAMA, num_hidden_layers=1)), "F16")
        write_zip(self.file, records(strided(tensors)), wide=True)
        with open(self.file, "rb") as f:
            good = f.read()
        at, end = good.index(b"PK\1\2"), good.index(b"PK\6\6")
        second = good.index(b"PK\1\2", at + 1)
        header = good.index(b"PK\3\4", 1)
        name = good[at + 46:at + 46 + 16]
        big = struct.pack("<Q", 1 << 63)
        for place, data, message in (
                (at, b"XX", "directory is damaged"), (at + 8, b"\1", "encrypted or patched"),
                (at + 10, b"\14", "unknown way"), (at + 10, b"\10", "another in its own header"),
                (at + 28, b"\xff\xff", "directory is damaged|is damaged"),
                (at + 46 + 16 + 4, big, "unknown way"), (at + 46 + 16 + 20, big, "is damaged"),
                (at + 46 + 16 + 20, struct.pack("<Q", header), "another in its own header"),
                (second + 46, name, "twice|another in its own"),
                (header, b"XX", "is damaged"), (header + 30, b"zz", "another in its own header"),
                (header + 28, b"\xff\xff", "overlaps another"),
                (end, b"XX", "end is damaged"), (end + 32, big, "cannot fit"),
                (end + 40, big, "cannot fit"), (end + 48, big, "cannot fit"),
                (end + 32, struct.pack("<Q", 1), "none that torch.save|there are none"),
                (len(good) - 22, b"XX", "without an end"), (len(good) - 34, big, "end is damaged")):
            with self.subTest(place=place, data=data):
                changed = bytearray(good)
                changed[place:place + len(data)] = data
                self.refuses(message, bytes(changed))
        write_zip(self.file, records(strided(tensors)), deflate=True)
        with open(self.file, "rb") as f:
            packed = bytearray(f.read())
        at = packed.index(b"archive/data/3") + len(b"archive/data/3")
        packed[at + 40:at + 4000] = b"\xff" * 3960
        self.refuses("damaged|less compressed", bytes(packed))

    def test_entries_inside_others(self):
        """An archive may grow without end where entries share their bytes."""
        inner = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, 0, 0, 8, 0) + b"a/data/1"
        write_zip(self.file, [("a/data.pkl", b"}."), ("a/data/0", inner + bytes(8)),
                              ("a/data/1", bytes(8))])
        with open(self.file, "rb") as f:
            blob = f.read()
        place = blob.rindex(b"PK\1\2") + 42
        nested = struct.pack("<I", blob.index(inner))
        self.refuses("overlaps another", blob[:place] + nested + blob[place + 4:])

    def test_storage_shared_by_all(self):
        """What 200 layers of one storage would write is refused before anything is."""
        config = dict(LLAMA, num_hidden_layers=200)
        with open(os.path.join(self.folder, "config.json"), "w") as f:
            json.dump(config, f)
        storage = Storage("F16", bytes(2 * 80 * 32))
        value = {name: Strided(storage, shape) for name, shape in llama_shapes(config).items()}
        write_zip(self.file, records(value))
        self.refused("would take .* bytes, far more", "-o", self.out, "--llama", self.folder)


# ---- one set of rules for both programs ----------------------------------------------------------


class Both(Case):
    """lvm and convert.py judge one weights file alike."""

    LVM = os.path.join(TOP, os.environ.get("LVM", "lvm"))

    def jobs(self, *argv):
        """(keys, jobs) of a weights file to be, for changing."""
        args = convert.parse_arguments(["-o", self.out, *argv])
        keys, jobs, codes = convert.general_keys(args), [], 8192
        if args.vqgan:
            more, jobs, _, codes = convert.vqgan_part(args, [])
            keys += more
        if args.llama:
            more, llama_jobs, _ = convert.llama_part(args, codes, [])
            keys, jobs = keys + more, llama_jobs + jobs
        return keys, jobs

    def put(self, keys, jobs):
        with open(self.out, "wb") as f:
            f.writelines(convert.gguf_pieces(keys, jobs))

    def verdicts(self):
        """What each program says of the file; "" of a good one."""
        done = subprocess.run([self.LVM, "info", self.out], capture_output=True, check=False)
        hf = self.path("hf")
        _, _, err = self.run_main(self.out, "--to-hf", hf, "--quiet")
        shutil.rmtree(hf, ignore_errors=True)
        self.assertNotIn("Traceback", err)
        return done.stderr.decode(), err

    def both_refuse(self, *words):
        for verdict in self.verdicts():
            for word in (self.out + ": ",) + words:
                self.assertIn(word, verdict)

    def both_take(self):
        self.assertEqual(self.verdicts(), ("", ""))

    def test_tables_of_bounds(self):
        """The numbers of lvm.c's chapter 4 and of convert.py, read from their sources."""
        with open(os.path.join(TOP, "lvm.c"), encoding="utf-8") as f:
            text = f.read()
        limits = {name: int(n) for name, n in re.findall(r"\b(MAX_[A-Z_]+) = (\d+)\b", text)}
        rows = re.findall(r'\{"lvm\.([a-z._]+)", ([^,{}]+), ([^,{}]+)[,}]', text)
        bounds = {name: tuple(eval(re.sub(r"f$", "", word), {}, limits) for word in pair)
                  for name, *pair in rows if name != "format_version"}
        keys = convert.LLAMA_KEYS + convert.TOKEN_KEYS + convert.VQGAN_KEYS
        self.assertEqual({key.gguf[4:]: (key.low, key.high) for key in keys}, bounds)
        most = {key.gguf: key.most for key in keys if key.kind == convert.GGUF_ARRAY}
        self.assertEqual(most, {"lvm.vq.channel_mult": limits["MAX_LEVELS"],
                                "lvm.vq.attn_resolutions": limits["MAX_ATTN_AT"]})

    def test_at_and_beyond_every_bound(self):
        keys, jobs = self.jobs("--llama", self.llama(), "--vqgan", self.vqgan())
        for key in convert.LLAMA_KEYS + convert.TOKEN_KEYS + convert.VQGAN_KEYS:
            if key.kind == convert.GGUF_BOOL:
                continue
            name = convert.gguf_string(key.gguf)
            others = [k for k in keys if not k.startswith(name)]
            tiny = key.low / 2, key.high * 1.001
            beyond = tiny if key.kind == convert.GGUF_F32 else (key.low - 1, key.high + 1)
            for value, fits in ((key.low, True), (key.high, True), (beyond[0], False),
                                (beyond[1], False)):
                with self.subTest(key=key.gguf, value=value):
                    kind = convert.GGUF_I32 if key.kind == convert.GGUF_U32 else key.kind
                    form = {convert.GGUF_F32: "<f", convert.GGUF_I32: "<i",
                            convert.GGUF_ARRAY: "<IQi"}[kind]
                    head = (convert.GGUF_I32, 1) if kind == convert.GGUF_ARRAY else ()
                    raw = name + struct.pack("<I", kind) + struct.pack(form, *head, value)
                    self.put(others + [raw], jobs)
                    self.assertEqual(["must be a" in v for v in self.verdicts()], [not fits] * 2)

    def test_cases_of_bounds(self):
        """What convert.py would not open again, it does not write."""
        for name, value in (("rope_theta", 1e13), ("rope_theta", 0.5), ("rms_norm_eps", 2.0),
                            ("max_position_embeddings", (1 << 20) + 1)):
            folder = self.llama(name="%s %s" % (name, value), **{name: value})
            self.refused(name + " is .*; it must be a", "-o", self.out, "--llama", folder)

    def test_overlap(self):
        keys, jobs = self.jobs("--llama", self.llama())
        self.put(keys, jobs)
        self.both_take()
        with open(self.out, "rb") as f:
            blob = bytearray(f.read())
        places = []
        for name in (b"blk.0.attn_q.weight", b"blk.1.attn_q.weight"):
            at = blob.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
            places.append(at + 4 + 16 + 4)          # behind dimensions, sizes and type
        for shift in (0, 64):
            (first,) = struct.unpack_from("<Q", blob, places[0])
            struct.pack_into("<Q", blob, places[1], first + shift)
            with open(self.out, "wb") as f:
                f.write(blob)
            self.both_refuse("overlaps tensor", "blk.1.attn_q.weight", "blk.0.attn_q.weight")

    def test_unknown_tensors(self):
        keys, jobs = self.jobs("--llama", self.llama(), "--vqgan", self.vqgan())
        known = {job.name for job in jobs}
        self.assertIn("vq.encoder.down.1.attn.0.q.weight", known)   # carried, never run
        self.put(keys, jobs)
        self.both_take()
        for names in (["lora"], ["blk.2.attn_q.weight"], ["vq.encoder.down.1.attn.1.q.weight"],
                      ["vq.encoder.down.0.attn.0.q.weight"], ["vq.encoder.down.1.attn.0.x.weight"],
                      ["vq.encoder.down.9.attn.0.q.weight"],
                      ["vq.loss.%d" % n for n in range(5)]):
            extra = [jobs[-1]._replace(name=name) for name in names]
            self.put(keys, jobs + extra)
            self.both_refuse(*names[:3])
        self.assertIn("5 tensors", self.verdicts()[0])

    def test_optional_tensors(self):
        for biases in ("", "qkv", "o"):
            folder = self.llama(name="b" + biases, biases=biases, attention_bias=bool(biases))
            self.put(*self.jobs("--llama", folder))
            self.both_take()

    def test_tied_either_way(self):
        keys, jobs = self.jobs("--llama", self.llama(tie_word_embeddings=True))
        for name in ("token_embd.weight", "output.weight"):
            self.put(keys, [job._replace(name=name) if job.name == "token_embd.weight" else job
                            for job in jobs])
            self.both_take()
            self.good(self.out, "--to-hf", self.path("hf"), "--force")
            self.assertTrue(self.config_back("llama")["tie_word_embeddings"])
            self.assertIn("model.embed_tokens.weight",
                          load_safetensors(self.path("hf", "llama", "model.safetensors")))
            shutil.rmtree(self.path("hf"))
        self.put(keys, [job for job in jobs if job.name != "token_embd.weight"])
        self.both_refuse("token_embd.weight", "missing")

    def test_special_tokens_and_codes(self):
        keys, jobs = self.jobs("--llama", self.llama(), "--vqgan", self.vqgan())
        bos = convert.gguf_key("lvm.bos_token_id", convert.GGUF_U32, 80)
        self.put(keys + [bos], jobs)
        self.both_refuse("bos", "outside the vocabulary of 80")
        vocab = convert.gguf_key("lvm.vocab_size", convert.GGUF_U32, 80)
        small = [convert.gguf_key("lvm.vocab_size", convert.GGUF_U32, 60) if k == vocab else k
                 for k in keys]
        cut = [job._replace(shape=(60, 32), source=job.source._replace(
            shape=(60, 32), nbytes=60 * 64)) if job.shape == (80, 32) else job for job in jobs]
        self.put(small, cut)
        self.both_refuse("the tokenizer has 64 codes, the transformer's vocabulary 60")


# ---- what a folder is ----------------------------------------------------------------------------


class Strangers(Case):
    """Every wrong folder gets a sentence that says what it is and what to do."""

    def folder(self, name, **files):
        """A folder of files; __ in a name stands for a dot."""
        os.makedirs(self.path(name))
        for file, content in files.items():
            content = json.dumps(content) if isinstance(content, dict) else content
            with open(self.path(name, file.replace("__", ".")), "wb") as f:
                f.write(content.encode() if isinstance(content, str) else content)
        return self.path(name)

    def weights(self, name, config, tensors, file="model.safetensors"):
        folder = save(self.path(name), config or {}, tensors, file)
        if config is None:
            os.remove(os.path.join(folder, "config.json"))
        return folder

    def test_by_files(self):
        for n, (message, files) in enumerate((
                ("is empty; give", {}),
                ("is empty; give", {"__hidden": ""}),
                ('LoRA adapter of the model "org/base", no whole.*give it as --lora', {
                    "adapter_config__json": {"peft_type": "LORA",
                                             "base_model_name_or_path": "org/base"},
                    "adapter_model__safetensors": ""}),
                ('LoRA adapter of the model "m", beside a whole model', {
                    "adapter_config__json": {"base_model_name_or_path": "m"},
                    "config__json": LLAMA, "model__safetensors__index__json": {}}),
                ("pipeline of diffusers", {"model_index__json": {}}),
                ("Meta's layout.*convert_llama", {"params__json": {}, "consolidated__00__pth": ""}),
                ("what training leaves .training_args.bin.", {
                    "config__json": LLAMA, "training_args__bin": "", "trainer_state__json": ""}),
                ("what training leaves .optimizer.pt.", {
                    "config__json": LLAMA, "optimizer__pt": "", "training_args__bin": ""}),
                ("what training leaves", {"rng_state_0__pth": "", "scheduler__pt": ""}),
                ("DeepSpeed.*zero_to_fp32", {"config__json": LLAMA, "zero_to_fp32__py": ""}),
                ("checkpoint of several processes", {"__0_0__distcp": "", "a__distcp": ""}),
                ("checkpoint of JAX", {"streaming_train_state_80": ""}),
                ("checkpoint of TensorFlow", {"config__json": LLAMA, "tf_model__h5": ""}),
                ("holds a GGUF file", {"model__gguf": "GGUF"}),
                ("no config.json and no weights", {"readme": ""}),
                ("holds no model.safetensors", {"config__json": LLAMA}),
                ("is a web page", {"config__json": LLAMA, "model__safetensors": "<!doctype html>"}),
                ("is a GGUF file, no checkpoint", {"config__json": LLAMA,
                                                   "pytorch_model__bin": "GGUF\3\0\0\0"}),
                ("UTF-16", {"config__json": json.dumps(LLAMA).encode("utf-16")}))):
            with self.subTest(message):
                folder = self.folder(str(n), **files)
                self.refused(message, "-o", self.out, "--llama", folder, path=folder)
        os.makedirs(self.path("top"))
        shutil.copytree(self.llama(), self.path("top", "llama"))
        self.refused("its folder llama does; give that", "-o", self.out, "--llama",
                     self.path("top"))

    def test_by_configuration(self):
        for n, (message, part, config) in enumerate((
                ('quantised ."gptq"', "llama", dict(LLAMA, quantization_config={
                    "quant_method": "gptq", "bits": 4})),
                ('quantised ."awq"', "llama", dict(LLAMA, quantization_config={
                    "quant_method": "awq"})),
                ('describes a tokenizer ."VQGANModel".; give it as --vqgan', "llama", VQGAN),
                ('describes a transformer ."llama".; give it as --llama', "vqgan", LLAMA),
                ("keeps the transformer under text_config", "llama", {
                    "model_type": "llava", "text_config": LLAMA}))):
            with self.subTest(message):
                folder = self.folder(str(n), config__json=config)
                self.refused(message, "-o", self.out, "--" + part, folder, path=folder)

    def test_by_tensors(self):
        one = ("F16", [2], bytes(4))
        for n, (message, part, config, name) in enumerate((
                ("quantised .GPTQ, AWQ", "llama", LLAMA, "model.layers.0.mlp.up_proj.qweight"),
                ("is a LoRA adapter", "llama", LLAMA, "base.layers.0.q_proj.lora_A.weight"),
                ("Meta's layout", "llama", LLAMA, "tok_embeddings.weight"),
                ("is a tokenizer", "llama", LLAMA, "encoder.conv_in.weight"),
                ("is a transformer", "vqgan", VQGAN, "model.layers.0.self_attn.q_proj.weight"),
                ("tokenizer of LlamaGen", "vqgan", VQGAN, "encoder.conv_blocks.0.res.0.norm1.bias"),
                ("tokenizer of LlamaGen", "vqgan", None, "encoder.conv_blocks.0.res.0.norm1.bias"),
                ("tokenizer of diffusers", "vqgan", VQGAN, "encoder.down_blocks.0.norm.weight"),
                ("tokenizer of taming", "vqgan", None, "loss.discriminator.main.0.weight"),
                ("tokenizer of taming", "vqgan", None, "encoder.down.0.block.0.norm1.weight"))):
            with self.subTest(message):
                folder = self.weights(str(n), config, {name: one})
                self.refused(message, "-o", self.out, "--" + part, folder, path=folder)
                file = os.path.join(folder, "model.safetensors")
                self.refused(message, "-o", self.out, "--" + part, file, path=file)

    def test_file_of_an_adapter(self):
        tensor = ("F16", [2], bytes(4))
        folder = self.weights("a", LLAMA, {"m.layers.0.q_proj.lora_A.weight": tensor})
        with open(os.path.join(folder, "adapter_config.json"), "w") as f:
            json.dump({"peft_type": "LORA", "base_model_name_or_path": "org/base"}, f)
        file = os.path.join(folder, "model.safetensors")
        self.refused('LoRA adapter of the model "org/base"', "-o", self.out, "--llama", file,
                     path=file)

    def test_swapped(self):
        llama, vqgan = self.llama(), self.vqgan()
        self.refused("describes a transformer", "-o", self.out, "--llama", vqgan, "--vqgan", llama)
        self.refused("describes a tokenizer", "-o", self.out, "--llama", vqgan)
        self.good("-o", self.path("w.bin"), "--llama", llama)
        self.refused("is a GGUF file", "-o", self.out, "--llama", self.path("w.bin"),
                     path=self.path("w.bin"))

    def test_contents_before_names(self):
        """A byte order mark; a pickle called safetensors and the other way round; lost indices."""
        source = self.llama()
        self.good("-o", self.path("plain.bin"), "--llama", source)
        with open(os.path.join(source, "config.json"), "rb") as f:
            config = f.read()
        with open(os.path.join(source, "config.json"), "wb") as f:
            f.write(b"\xef\xbb\xbf" + config)
        tensors = load_safetensors(os.path.join(source, "model.safetensors"))
        folders = [source, self.weights("bin", LLAMA, tensors, "pytorch_model.bin"),
                   self.weights("st", LLAMA, {}), self.weights("old", LLAMA, {})]
        write_zip(os.path.join(folders[2], "model.safetensors"), records(strided(tensors)))
        with open(os.path.join(folders[3], "model.safetensors"), "wb") as f:
            f.write(old_format(strided(tensors)))
        shards = self.weights("shards", LLAMA, {}, "model-00001-of-00002.safetensors")
        for n in range(2):
            save_safetensors(os.path.join(shards, "model-%05d-of-00002.safetensors" % (n + 1)),
                             {name: tensors[name] for name in sorted(tensors)[n::2]})
        for folder in folders + [shards]:
            self.good("-o", self.out, "--llama", folder, "--force")
            self.assertEqual(load_gguf(self.out), load_gguf(self.path("plain.bin")))
        os.rename(os.path.join(shards, "model-00001-of-00002.safetensors"), self.path("away"))
        self.refused("holds 1 of 2 shards; model-00001-of-00002.safetensors is missing", "-o",
                     self.out, "--llama", shards, "--force", path=shards)

    def test_padded_header_and_empty_tensors(self):
        folder = self.llama()
        path = os.path.join(folder, "model.safetensors")
        with open(path, "rb") as f:
            blob = f.read()
        (n,) = struct.unpack_from("<Q", blob)
        header = json.loads(blob[8:8 + n])
        header["model.rotary_emb.inv_freq"] = {"dtype": "F32", "shape": [0],
                                               "data_offsets": [0, 0]}
        text = json.dumps(header).encode() + b" " * 77
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + blob[8 + n:])
        self.good("-o", self.out, "--llama", folder)

    def test_keys_that_change_the_model(self):
        for n, (key, value) in enumerate((
                ("sliding_window", 64), ("embedding_multiplier", 12.0), ("logits_scaling", 8.0),
                ("attention_multiplier", 0.1), ("residual_multiplier", 0.2), ("clip_qkv", 8),
                ("rope_interleaved", True), ("partial_rotary_factor", 0.5), ("scale_emb", 12),
                ("num_local_experts", 8), ("final_logit_softcapping", 30.0), ("head_dim", 16),
                ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
                ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
                ("hidden_act", "relu"), ("mlp_bias", True))):
            with self.subTest(key):
                folder = self.llama(name=str(n), **{key: value})
                self.refused(key + " is ", "-o", self.out, "--llama", folder, path=folder)
        for n, good in enumerate(({"sliding_window": 512}, {"hidden_act": "swish"},
                                  {"sliding_window": 4, "use_sliding_window": False},
                                  {"sliding_window": None, "partial_rotary_factor": 1.0})):
            self.good("-o", self.out, "--force", "--llama", self.llama(name="g%d" % n, **good))
        folder = self.llama(name="biased", biases="q", attention_bias=False)
        self.refused("has no biases, but tensors hold", "-o", self.out, "--force", "--llama",
                     folder, path=folder)

    def test_harmless_tensors(self):
        """What training leaves inside a checkpoint is passed over by one list, and it is said."""
        source = self.vqgan()
        self.good("-o", self.path("plain.bin"), "--vqgan", source)
        tensors = load_safetensors(os.path.join(source, "model.safetensors"))
        copies = {"ema." + name: (t[0], t[1], bytes(len(t[2]))) for name, t in tensors.items()}
        more = {name: ("F32", [2], bytes(8)) for name in (
            "loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight",
            "model_ema.decay", "quantize.cluster_size", "quantize.embed_avg")}
        for prefix in ("", "module."):
            given = {prefix + name: t for name, t in dict(tensors, **copies, **more).items()}
            folder = self.weights("v" + prefix, VQGAN, given)
            _, err = self.good("-o", self.out, "--vqgan", folder, "--force")
            self.assertRegex(err, r"passed over.*and %d more\n\Z" % (len(copies) + 4))
            self.assertEqual(load_gguf(self.out), load_gguf(self.path("plain.bin")))
        folder = self.weights("odd", VQGAN, dict(tensors, **{"encoder.loss.x": more[
            "model_ema.decay"]}))
        self.refused("encoder.loss.x is unexpected", "-o", self.out, "--force", "--vqgan", folder)


# ---- numbers that are none -----------------------------------------------------------------------


class Nonfinite(Case):
    def folder(self, name, dtype, *values, tensor="model.layers.1.mlp.up_proj.weight"):
        """A checkpoint of which one tensor begins and ends with such values (their bits)."""
        folder = self.llama(dtype, name=name)
        path = os.path.join(folder, "model.safetensors")
        tensors = load_safetensors(path)
        kind, shape, raw = tensors[tensor]
        size, raw = SIZE[kind], bytearray(raw)
        for n, bits in enumerate(values):
            at = (n if n % 2 else len(raw) // size - 1 - n) * size
            raw[at:at + size] = bits.to_bytes(size, "little")
        tensors[tensor] = (kind, shape, bytes(raw))
        save_safetensors(path, tensors)
        return folder

    def test_each_type(self):
        for dtype, bits in (("F32", (0x7FC00000, 0xFF800000, 0x7F800001)),
                            ("BF16", (0x7FC0, 0xFF80, 0x7F80)),
                            ("F16", (0x7E00, 0xFC00, 0x7C01))):
            for tensor in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
                with self.subTest(dtype=dtype, tensor=tensor):
                    folder = self.folder(dtype + tensor, dtype, *bits, tensor=tensor)
                    self.refused("tensor %s: 3 of its .* NaN or infinite;" % tensor, "-o",
                                 self.out, "--llama", folder,
                                 path=os.path.join(folder, "model.safetensors"))
                    self.good("-o", self.out, "--llama", folder, "--allow-nonfinite")
                    self.refused("3 of its", self.out, "--to-hf", self.path("hf"), path=self.out)
                    self.good(self.out, "--to-hf", self.path("hf"), "--allow-nonfinite")
                    shutil.rmtree(self.path("hf"))
                    os.remove(self.out)

    def test_largest_numbers_are_good(self):
        for dtype, bits in (("F32", (0x7F7FFFFF, 0xFF7FFFFF, 1)), ("BF16", (0x7F7F, 0xFF7F, 1)),
                            ("F16", (0x7BFF, 0xFBFF, 1))):
            self.good("-o", self.out, "--force", "--llama", self.folder(dtype, dtype, *bits))

    def test_too_large_for_the_new_type(self):
        """65520 becomes infinite as float16; a block of Q8_0 holds 127 times that."""
        lvm = os.path.join(TOP, os.environ.get("LVM", "lvm"))
        as_bits = lambda x: struct.unpack("<I", struct.pack("<f", x))[0]  # noqa: E731
        for kind, most in (("f16", 65520.0), ("q8_0", 65520.0 * 127), ("q4_0", 65520.0 * 8)):
            argv = ("--type", kind, "--lvm", lvm, "--force", "-o", self.out, "--llama")
            below = struct.unpack("<f", struct.pack("<I", as_bits(most) - 1))[0]
            self.good(*argv, self.folder(kind + "good", "F32", as_bits(below)))
            bad = self.folder(kind, "F32", as_bits(-most), as_bits(most))
            self.refused("2 of its .* or too large for float16", *argv, bad)
        bad = self.folder("bf16", "BF16", 0x4780)
        self.refused("1 of its", "-o", self.out, "--llama", bad, "--type", "f16", "--lvm", lvm,
                     "--force")

    def test_tokenizer(self):
        folder = self.vqgan()
        path = os.path.join(folder, "model.safetensors")
        tensors = load_safetensors(path)
        kind, shape, raw = tensors["encoder.conv_in.weight"]
        tensors["encoder.conv_in.weight"] = (kind, shape, b"\0\x7e" + raw[2:])
        save_safetensors(path, tensors)
        self.refused("encoder.conv_in.weight: 1 of its 864", "-o", self.out, "--vqgan", folder)


# ---- where output goes, and how work stops -------------------------------------------------------


class Places(Case):
    def program(self, *argv, **how):
        command = [sys.executable, os.path.join(TOP, "convert.py"), *argv]
        return subprocess.run(command, capture_output=True, check=False, timeout=60, **how)

    def test_links(self):
        vqgan = self.vqgan()
        self.good("-o", self.path("plain.bin"), "--vqgan", vqgan)
        os.makedirs(self.path("far"))
        target, link = self.path("far", "target"), self.path("link")
        os.symlink(os.path.join("far", "target"), link)
        for mode in (None, 0o640, 0o444):
            self.good("-o", link, "--vqgan", vqgan, *["--force"] * (mode is not None))
            self.assertTrue(os.path.islink(link))
            self.assertEqual(load_gguf(target), load_gguf(self.path("plain.bin")))
            if mode:
                self.assertEqual(stat.S_IMODE(os.stat(target).st_mode), mode)
            os.chmod(target, {None: 0o640, 0o640: 0o444, 0o444: 0o644}[mode])
        self.refused("exists already", "-o", link, "--vqgan", vqgan, path=link)
        os.symlink(os.path.join(vqgan, "model.safetensors"), self.path("input"))
        self.refused("also an input", "-o", self.path("input"), "--vqgan", vqgan, "--force")
        self.assertEqual(os.listdir(self.path("far")), ["target"])

    def test_links_of_to_hf(self):
        self.good("-o", self.out, "--vqgan", self.vqgan())
        os.makedirs(self.path("hf", "vqgan"))
        for name in ("config.json", "model.safetensors"):
            os.symlink(self.path("same"), self.path("hf", "vqgan", name))
        self.refused("same file as another output", self.out, "--to-hf", self.path("hf"))
        os.remove(self.path("hf", "vqgan", "config.json"))
        self.good(self.out, "--to-hf", self.path("hf"))
        self.assertTrue(os.path.islink(self.path("hf", "vqgan", "model.safetensors")))
        self.assertTrue(load_safetensors(self.path("same")))
        os.remove(self.path("same"))
        os.symlink(self.out, self.path("same"))
        self.refused("also an input", self.out, "--to-hf", self.path("hf"), "--force")
        self.refused("taken by what is no folder", self.out, "--to-hf", self.out)
        self.refused("name is empty", self.out, "--to-hf", "")

    def test_devices_and_pipes(self):
        vqgan = self.vqgan()
        self.good("-o", self.out, "--vqgan", vqgan)
        with open(self.out, "rb") as f:
            wanted = f.read()
        for name in ("-", "/dev/stdout"):
            done = self.program("-o", name, "--vqgan", vqgan)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertEqual(done.stdout, wanted)
            with open(self.path("redirected"), "wb") as f:
                subprocess.run([sys.executable, os.path.join(TOP, "convert.py"), "-o", name,
                                "--vqgan", vqgan], stdout=f, check=True)
            with open(self.path("redirected"), "rb") as f:
                self.assertEqual(f.read(), wanted)
        out, _ = self.good("-o", os.devnull, "--vqgan", vqgan)
        self.assertEqual((out, stat.S_ISCHR(os.stat(os.devnull).st_mode)), ("", True))
        if os.path.exists("/dev/full"):
            done = self.program("-o", "/dev/full", "--vqgan", vqgan)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (
                1, b"", b"convert.py: /dev/full: cannot be written: No space left on device\n"))
        fifo = self.path("fifo")
        os.mkfifo(fifo)
        with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as cat:
            with subprocess.Popen([sys.executable, os.path.join(TOP, "convert.py"), "-o", fifo,
                                   "--vqgan", vqgan]) as child:
                self.assertEqual((cat.stdout.read(), child.wait(60)), (wanted, 0))
        self.refused("quantising needs one", "-o", fifo, "--vqgan", vqgan, "--vq-type", "f16",
                     "--lvm", sys.executable)
        self.assertTrue(stat.S_ISFIFO(os.stat(fifo).st_mode))

    def test_reader_that_leaves(self):
        with subprocess.Popen([sys.executable, os.path.join(TOP, "convert.py"), "-o", "-",
                               "--vqgan", self.vqgan("F32")], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as child:
            child.stdout.read(9)
            child.stdout.close()
            self.assertEqual((child.wait(60), child.stderr.read()), (-signal.SIGPIPE, b""))

    def test_fifo_as_input(self):
        folder = self.llama()
        fifo = self.path("fifo")
        os.mkfifo(fifo)
        self.refused("is a pipe or a device", fifo, "--to-hf", self.path("hf"), path=fifo)
        self.refused("is a pipe or a device", "-o", self.out, "--llama", fifo, path=fifo)
        for name in ("model.safetensors", "config.json"):
            path = os.path.join(folder, name)
            os.remove(path)
            os.rename(fifo, path)
            self.refused("is a pipe or a device", "-o", self.out, "--llama", folder, path=path)
            os.mkfifo(fifo)

    def test_before_any_work(self):
        """A bad place shows before the checkpoint is looked at."""
        for place, message in ((self.path("no", "x"), "folder does not exist"), ("", "name is emp"),
                               (self.path("y" * 300), "File name too long|cannot be written")):
            self.refused(message, "-o", place, "--llama", self.path("nowhere"))
        for argv in (("--llama", ""), ("--vqgan", "")):
            self.refused("name is empty", "-o", self.out, *argv)
        usage = unittest.mock.Mock(return_value=types.SimpleNamespace(total=9 << 20, free=1 << 10))
        with unittest.mock.patch.object(shutil, "disk_usage", usage):
            self.refused("it needs 1 MB, and 0 MB are free", "-o", self.out, "--vqgan",
                         self.vqgan())

    def test_long_name(self):
        name = self.path("n" * 251 + ".bin")
        self.good("-o", name, "--vqgan", self.vqgan())
        self.assertTrue(load_gguf(name))

    def test_names_in_messages(self):
        odd = self.path("a\n\x1b[31mb")
        err = self.refused("there is no such file|is no folder", "-o", self.out, "--llama", odd)
        self.assertIn(r"a\n\x1b[31mb", err)
        self.assertEqual(err.count("\n"), 1)
        err = self.refused("is no folder", "-o", self.out, "--llama",
                           "/".join([self.dir] + ["d" * 50] * 9 + ["end"]))
        self.assertLess(len(err), 320)
        self.assertIn("end: is no folder", err)
        status, _, err = self.run_main("-o", self.out, "--llama", "d", "--x\n\x1b[31m")
        self.assertEqual(status, 2)
        self.assertIn(r"--x\n\x1b[31m", err)

    def test_closed_streams(self):
        vqgan = self.vqgan()
        command = '"$0" "$1" -o "$2" --vqgan "$3" --force %s'
        for close, status in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 1)):
            if "full" in close and not os.path.exists("/dev/full"):
                continue
            done = subprocess.run(["sh", "-c", command % close, sys.executable,
                                   os.path.join(TOP, "convert.py"), self.out, vqgan],
                                  capture_output=True, check=False)
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertNotIn(b"Traceback", done.stderr)
            self.assertNotIn(b"ignored", done.stderr)


class Stops(Case):
    """Signals leave nothing behind and end the program as a shell expects."""

    def start(self, *argv, **how):
        """convert.py with a checkpoint that takes seconds."""
        child = subprocess.Popen([sys.executable, os.path.join(TOP, "convert.py"), "-o", self.out,
                                  *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
        self.addCleanup(child.kill)
        return child

    def big(self):
        """A checkpoint of 1 GB of holes."""
        config = dict(LLAMA, vocab_size=1 << 19, hidden_size=1024, num_hidden_layers=1,
                      tie_word_embeddings=True)
        shapes, header, pos = llama_shapes(config), {}, 0
        for name, shape in shapes.items():
            size = 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [pos, pos + size]}
            pos += size
        folder, text = save(self.path("big"), config, {}), json.dumps(header).encode()
        with open(os.path.join(folder, "model.safetensors"), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + pos)
        return folder

    def temps(self):
        return [name for name in os.listdir(self.dir) if name.endswith(".tmp")]

    def wait_for_bytes(self, child, least):
        for _ in range(3000):
            found = self.temps()
            if found and os.path.getsize(self.path(found[0])) > least:
                return
            self.assertIsNone(child.poll())
            time.sleep(0.01)
        self.fail("nothing is written")

    def test_signals(self):
        folder = self.big()
        before = sorted(os.listdir(self.dir))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child = self.start("--llama", folder)
            self.wait_for_bytes(child, 1 << 20)
            child.send_signal(number)
            out, err = child.communicate(timeout=60)
            self.assertEqual((child.returncode, out), (-number, b""), err)
            self.assertRegex(err, rb"\Aconvert.py: [^\n]*; no file was changed\n\Z")
            self.assertEqual(sorted(os.listdir(self.dir)), before)

    def test_file_size_limit(self):
        folder = self.big()
        before = sorted(os.listdir(self.dir))

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, 1 << 22))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        child = self.start("--llama", folder, preexec_fn=limit)
        _, err = child.communicate(timeout=60)
        self.assertEqual(child.returncode, -signal.SIGXFSZ, err)
        self.assertIn(b"ulimit -f", err)
        self.assertEqual(sorted(os.listdir(self.dir)), before)

    def test_nohup(self):
        """A signal that was ignored stays so."""
        child = self.start("--llama", self.big(),
                           preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        self.wait_for_bytes(child, 1 << 20)
        child.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        self.assertIsNone(child.poll())
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
        self.assertEqual((child.returncode, self.temps()), (-signal.SIGTERM, []))

    def test_quantising(self):
        """The program that quantises is told to stop too, and cleans up itself."""
        lvm = self.path("stand-in")
        with open(lvm, "w") as f:
            f.write("#!/bin/sh\ntrap 'echo stopped >\"%s\"; exit 1' TERM\ntouch \"%s\"\n"
                    "while :; do sleep 0.05; done\n" % (self.path("log"), self.path("begun")))
        os.chmod(lvm, 0o755)
        child = self.start("--llama", self.llama(), "--type", "f16", "--lvm", lvm)
        for _ in range(3000):
            if os.path.exists(self.path("begun")):
                break
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
        self.assertEqual(child.returncode, -signal.SIGTERM, err)
        self.assertTrue(os.path.exists(self.path("log")))
        self.assertEqual((self.temps(), os.path.exists(self.out)), ([], False))

    def test_quantising_begins(self):
        """A signal while that program is being started stops it as well."""
        code = """if True:
            import os, signal, subprocess, sys
            sys.path.insert(0, sys.argv[1])
            import convert
            class Popen(subprocess.Popen):
                def __init__(self, *args, **how):
                    super().__init__(*args, **how)
                    os.kill(os.getpid(), signal.SIGTERM)
            convert.subprocess.Popen = Popen
            convert.SIGNALS.install()
            try:
                convert.run(["sleep", "60"])    # which keeps the test's pipe open
            except convert.Stopped:
                print("stopped")"""
        done = subprocess.run([sys.executable, "-c", code, TOP], capture_output=True, timeout=30,
                              check=False)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"stopped\n", b""))


# ---- mutations -----------------------------------------------------------------------------------


WEIRD = (None, True, False, -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 63, 10 ** 30, 0.5, 1e308,
         float("nan"), "", "x", "\0", "../x", [], {}, [[]], [1, 2], [1 << 62, 4], {"a": 1},
         "F32", "F64", "BF16")
NUMBERS = (0, 1, 2, 7, 8, 31, 32, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 31,
           (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)
OPERATIONS = (b"(", b")", b"]", b"}", b"N", b"\x88", b"K\1", b"J\xff\xff\xff\xff", b"t", b"\x85",
              b"\x86", b"\x87", b"R", b"b", b"s", b"u", b"a", b"e", b"Q", b"q\0", b"h\0", b"h\1",
              b"r\xff\xff\xff\xff", b"\x94", b"\x93", b"cos\nsystem\n", b"ctorch\nHalfStorage\n",
              b"ccollections\nOrderedDict\n", b"X\1\0\0\0x", b"\x8c\7storage", b"2", b"0", b"1",
              b"\x8a\x09" + b"\xff" * 9, b"\x8b\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b".",
              b"(" * 999, b"]" * 999, b"\x85" * 999, b"ctorch.storage\nUntypedStorage\n", b"\x81")


def mutate_bytes(rng, data, ends):
    """A few random changes, most of them in front of ends."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(min(ends, len(data)) if rng.random() < 0.8 and ends else len(data) + 1)
        kind = rng.randrange(9)
        if kind < 3 and at < len(data):
            data[at] = data[at] ^ 1 << rng.randrange(8) if kind else rng.randrange(256)
        elif kind < 6:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) & (1 << 8 * size) - 1
            data[at:at + size] = number.to_bytes(size, "little")
        elif kind == 6:
            del data[at:at + rng.choice((1, 2, 8, 100))]
        elif kind == 7:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start:start + rng.choice((1, 4, 40, 400))]
        else:
            del data[at if rng.random() < 0.3 else len(data) - rng.randrange(1, 99):]
        if not data:
            break
    return bytes(data)


def mutate_json(rng, data, _):
    """Another value, name or absence somewhere in a JSON text."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = value
        while True:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not (isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8):
                break
            at = at[key]
        kind = rng.randrange(4)
        if kind == 0 and len(at) > 1:
            del at[key]
        elif kind == 1 and isinstance(at, dict):
            at[rng.choice(("x", "", "\x1b", key + key))] = at[key]
        elif kind == 2 and isinstance(at[key], (int, float)):
            at[key] = at[key] * 2 if rng.random() < 0.5 else rng.choice(NUMBERS)
        else:
            at[key] = copy.deepcopy(rng.choice(WEIRD))
    return json.dumps(value).encode()


def mutate_pickle(rng, data, _):
    """Operations left out, repeated, swapped or added."""
    places = [pos for _, _, pos in pickletools.genops(data)] + [len(data)]
    parts = [data[a:b] for a, b in zip(places, places[1:])]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0:
            del parts[at]
        elif kind == 1:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 2:
            parts[at] = mutate_bytes(rng, parts[at], 0)
        else:
            parts.insert(at, rng.choice(OPERATIONS) if kind == 3 else rng.choice(parts))
        parts = parts or [b"."]
    return b"".join(parts)


class Rereader(pickle._Unpickler):
    """Python's own machine says what a pickle holds; only for what convert.py accepted."""

    def find_class(self, module, name):
        if name == "OrderedDict":
            return OrderedDict
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        return (lambda data, *_: data) if name == "_rebuild_parameter" else name

    def persistent_load(self, pid):
        return pid[1], pid[2]


def elements(tensor, raws):
    """(type, bytes) of what Rereader gives for a tensor."""
    (kind, key), offset, shape, strides = tensor
    dtype = {v: k for k, v in STORAGES.items()}[kind]
    size, places = SIZE[dtype], [offset]
    for n, stride in zip(shape, strides):
        places = [at + i * stride for at in places for i in range(n)]
    return dtype, b"".join(raws[key][at * size:at * size + size] for at in places)


def torch_tensors(path):
    """{name: (type, bytes)} of a file of torch.save, by zipfile and pickle."""
    with open(path, "rb") as f:
        if f.read(2) == b"PK":
            with zipfile.ZipFile(path) as z:
                top = [name for name in z.namelist() if name.endswith("/data.pkl")][0][:-8]
                value = Rereader(z.open(top + "data.pkl")).load()
                raws = {name[len(top) + 5:]: z.read(name) for name in z.namelist()}
        else:
            f.seek(0)
            for _ in range(3):
                Rereader(f).load()
            value, keys, raws = Rereader(f).load(), Rereader(f).load(), {}
            rest, sizes = f.read(), storage_sizes(value)
            for key in keys:
                raws[key] = rest[8:8 + struct.unpack("<Q", rest[:8])[0] * sizes[key]]
                rest = rest[8 + len(raws[key]):]
    for key in ("state_dict", "model_state_dict", "model", "module") * 2:
        value = value[key] if isinstance(value.get(key), dict) else value
    return {name: elements(t, raws) for name, t in value.items()}


def storage_sizes(value):
    return {t[0][1]: SIZE[{v: k for k, v in STORAGES.items()}[t[0][0]]] for t in value.values()}


def wide(dtype, raw):
    """The values as F32."""
    if dtype == "F16":
        return struct.pack("<%df" % (len(raw) // 2), *struct.unpack("<%de" % (len(raw) // 2), raw))
    if dtype == "BF16":
        return b"".join(b"\0\0" + raw[i:i + 2] for i in range(0, len(raw), 2))
    return raw


class Fuzzer:
    """Damages each kind of input in turn. Every run must end in one message about that input and
    leave nothing behind, or in a result that an independent reading of the input confirms."""

    def __init__(self, case):
        self.case, self.kinds, self.verdicts = case, [], 0
        config = dict(LLAMA, hidden_size=8, intermediate_size=4, num_hidden_layers=1,
                      num_attention_heads=2, num_key_value_heads=1, vocab_size=6)
        tensors = fill(llama_shapes(config), "F16")
        value = strided(dict(tensors, **{"model.layers.0.self_attn.rotary_emb.inv_freq":
                                         ("F32", [2], bytes(8))}))
        folder = save(case.path("st"), config, tensors)
        self.add("safetensors", os.path.join(folder, "model.safetensors"), mutate_bytes, 2000)
        self.add("config", os.path.join(folder, "config.json"), mutate_json)
        self.add("config bytes", os.path.join(folder, "config.json"), mutate_bytes)
        self.add_header(os.path.join(folder, "model.safetensors"))
        self.add_index(config, tensors)
        for name, how in (("zip", {}), ("wide", {"wide": True}), ("deflated", {"deflate": True})):
            path = self.torch_folder(name, config)
            write_zip(path, records(value), **how)
            self.add(name, path, mutate_zip)
        entries = records({"model": value, "epoch": 3}, 4)
        path = self.torch_folder("pickle", config)
        write_zip(path, entries)
        self.add("pickle", path, lambda rng, _, ends: mutate_pickle(rng, entries[0][1], ends),
                 pack=lambda text: write_zip(path, [(entries[0][0], text)] + entries[1:]))
        old = self.torch_folder("old", config)
        with open(old, "wb") as f:
            f.write(old_format(value))
        self.add("old", old, mutate_bytes, 3000)
        self.add_others(folder, config)

    def add(self, name, path, mutate, ends=0, pack=None):
        argv = ("-o", self.case.out, "--quiet", "--llama", os.path.dirname(path))
        with open(path, "rb") as f:
            self.kinds.append((name, path, f.read(), argv, mutate, ends, pack))

    def torch_folder(self, name, config):
        folder = save(self.case.path(name), config, {})
        os.remove(os.path.join(folder, "model.safetensors"))
        return os.path.join(folder, "pytorch_model.bin")

    def add_header(self, path):
        """The JSON of a safetensors file, with its length made right again."""
        with open(path, "rb") as f:
            blob = f.read()
        end = 8 + struct.unpack("<Q", blob[:8])[0]

        def pack(text):
            with open(path, "wb") as f:
                f.write(struct.pack("<Q", len(text)) + text + blob[end:])
        self.add("header", path, lambda rng, *_: mutate_json(rng, blob[8:end], 0), pack=pack)

    def add_index(self, config, tensors):
        folder = save(self.case.path("shards"), config, {})
        os.remove(os.path.join(folder, "model.safetensors"))
        where = {}
        for n in range(2):
            file = "model-%d.safetensors" % n
            part = {name: tensors[name] for name in sorted(tensors)[n::2]}
            save_safetensors(os.path.join(folder, file), part)
            where.update(dict.fromkeys(part, file))
        index = os.path.join(folder, "model.safetensors.index.json")
        with open(index, "w") as f:
            json.dump({"metadata": {"total_size": 1}, "weight_map": where}, f)
        self.add("index", index, mutate_json)
        self.add("index bytes", index, mutate_bytes)

    def add_others(self, folder, config):
        """A weights file, of which --to-hf reads, and the tokenizer's config.json."""
        self.case.good("-o", self.case.path("in.bin"), "--llama", folder)
        self.add("gguf", self.case.path("in.bin"), mutate_bytes, 2600)
        self.kinds[-1] = self.kinds[-1][:3] + ((self.case.path("in.bin"), "--to-hf", self.case.path(
            "hf"), "--quiet"),) + self.kinds[-1][4:]
        vqgan = dict(VQGAN, channel_mult=[1, 1], attn_resolutions=[], no_attn_mid_block=True)
        path = os.path.join(save(self.case.path("vqgan"), vqgan, fill(vqgan_shapes(vqgan), "F16")),
                            "config.json")
        self.add("vqgan config", path, mutate_json)
        argv = ("-o", self.case.out, "--quiet", "--vqgan", self.case.path("vqgan"))
        self.kinds[-1] = self.kinds[-1][:3] + (argv,) + self.kinds[-1][4:]

    def run(self, count, seed):
        """So many executions; the first fault ends them with an AssertionError that names it."""
        self.before = sorted(os.listdir(self.case.dir))
        for n in range(count):
            rng = random.Random("%s %s" % (seed, n))
            name, path, original, argv, mutate, ends, pack = self.kinds[n % len(self.kinds)]
            data = mutate(rng, original, ends or len(original))
            if pack:
                pack(data)
            else:
                with open(path, "wb") as f:
                    f.write(data)
            try:
                self.one(path, argv)
            except BaseException as fault:
                if isinstance(fault, KeyboardInterrupt):
                    raise
                raise AssertionError("%s, seed %s, execution %d" % (name, seed, n)) from fault
            with open(path, "wb") as f:
                f.write(original)

    def one(self, path, argv):
        signal.alarm(20)
        status, out, err = self.case.run_main(*argv)
        signal.alarm(0)
        left = sorted(os.listdir(self.case.dir))
        if status:
            assert status == 1 and out == "" and left == self.before, (status, out, left, err)
            assert err.startswith("convert.py: " + self.case.dir) and "memory" not in err, err
            return
        assert out and not err, err
        self.confirm(path, argv)
        for name in set(os.listdir(self.case.dir)) - set(self.before):
            (shutil.rmtree if os.path.isdir(self.case.path(name)) else os.remove)(
                self.case.path(name))

    def confirm(self, path, argv):
        hf = self.case.path("hf")
        if "--to-hf" in argv:
            self.case.good("-o", self.case.out, "--llama", os.path.join(hf, "llama"), "--quiet")
            both = [{name: wide({0: "F32", 1: "F16", 30: "BF16"}.get(kind), raw)
                     for name, (kind, _, raw) in load_gguf(file, False)[1].items()}
                    for file in (path, self.case.out)]
            assert both[0] == both[1]
            self.verdicts += 1
            return
        keys, _ = load_gguf(self.case.out)
        self.confirm_config(keys, os.path.join(argv[-1], "config.json"))
        self.case.good(self.case.out, "--to-hf", hf, "--quiet")
        part = argv[-2].strip("-")
        back = load_safetensors(os.path.join(hf, part, "model.safetensors"))
        try:
            source = self.independent(argv[-1])
        except self.NO_VERDICT:
            return
        for name, (dtype, raw) in source.items():
            found = [b for b in back if name == b or name.endswith("." + b)]
            assert len(found) == 1 or name.endswith("inv_freq"), (name, found)
            if found:
                tensor = back.pop(found[0])
                assert wide(tensor[0], tensor[2]) == wide(dtype, raw), name
        assert not back, sorted(back)
        self.verdicts += 1

    def independent(self, folder):
        tensors = {}
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.endswith(".safetensors"):
                tensors.update((n, t[::2]) for n, t in load_safetensors(path).items())
            elif name.endswith(".bin"):
                tensors.update(torch_tensors(path))
        return tensors

    # what Python's own modules refuse although convert.py need not, such as a wrong checksum
    NO_VERDICT = (zipfile.BadZipFile, NotImplementedError, pickle.UnpicklingError, zlib.error,
                  UnicodeDecodeError, AttributeError)

    def confirm_config(self, keys, path):
        with open(path) as f:
            config = json.load(f)
        for hf, gguf in (("hidden_size", "embedding_length"), ("vocab_size", "vocab_size"),
                         ("num_attention_heads", "attention.head_count"),
                         ("max_position_embeddings", "context_length"),
                         ("rope_theta", "rope.freq_base"), ("resolution", "vq.resolution"),
                         ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
                         ("channel_mult", "vq.channel_mult")):
            if "lvm." + gguf in keys and config.get(hf) is not None:
                value = config[hf]
                if gguf.startswith(("rope", "attention.layer")):
                    value = struct.unpack("<f", struct.pack("<f", value))[0]
                assert keys["lvm." + gguf] == value, (hf, value)


def mutate_zip(rng, data, _):
    """Most changes go to the pickle, the headers and the directory, which is at the end."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data, 3000)
    at = data.index(b"PK\1\2")
    return data[:at] + mutate_bytes(rng, data[at:], 0)


def fuzz(count, seed):
    """python3 tests/test_convert.py --fuzz EXECUTIONS [SEED]: in 600 MB of addresses."""
    resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    signal.signal(signal.SIGALRM, hung)
    os.fsync = lambda fd: None
    if os.path.isdir("/dev/shm"):
        tempfile.tempdir = "/dev/shm"
    case = Case()
    case.setUp()
    start = time.process_time()
    fuzzer = Fuzzer(case)
    try:
        fuzzer.run(count, seed)
    except AssertionError as fault:
        traceback.print_exception(type(fault), fault, fault.__traceback__, file=sys.stdout)
        print("fuzz: the input is in %s" % case.dir)
        return 1
    case.doCleanups()
    print("fuzz: %d executions, %d results confirmed, %.0f s of processor time, no finding"
          % (count, fuzzer.verdicts, time.process_time() - start))
    return 0


def hung(*_):
    raise TimeoutError("no end after 20 s")


class Mutations(unittest.TestCase):
    def test_some(self):
        done = subprocess.run([sys.executable, os.path.abspath(__file__), "--fuzz", "1500", "1"],
                              capture_output=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""), done.stdout)


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
        self.assertEqual(words[3:], ["--force", "--type", "q8_0", "--vq-type", "f16"])
        self.assertEqual([os.path.dirname(w) for w in words[1:3]], [self.dir] * 2)
        self.assertFalse([n for n in os.listdir(self.dir) if n.endswith(".tmp")])
        self.good("-o", self.path("plain.bin"), *parts)
        self.assertEqual(load_gguf(self.out), load_gguf(self.path("plain.bin")))
        self.good("-o", self.out, *parts, "--lvm", lvm, "--encoder-type", "f32", "--force")
        with open(self.path("log")) as f:
            self.assertEqual(f.read().split()[3:], ["--force", "--encoder-type", "f32"])
        self.good("-o", self.out, *parts, "--lvm", lvm, "--type", "q4_0", "--force")
        with open(self.path("log")) as f:
            self.assertEqual(f.read().split()[3:], ["--force", "--type", "q4_0"])

    def test_same_as_quantize(self):
        """One policy: the file is what `lvm quantize` makes of the exact one, its encoder F16."""
        lvm = os.path.abspath(os.environ.get("LVM", os.path.join(TOP, "lvm")))
        parts = [a for part in ("llama", "vqgan") for a in ("--" + part, os.path.join(TOP, "tests", "golden", "both", part))]
        exact, small = self.path("exact.bin"), self.path("small.bin")
        self.good("-o", exact, *parts)
        for options, encoder in (((), 1), (("--encoder-type", "q8_0"), 8), (("--encoder-type", "f32"), 0)):
            types = ("--type", "q8_0", "--vq-type", "q8_0") + options
            self.good("-o", self.out, *parts, "--lvm", lvm, "--force", *types)
            subprocess.run([lvm, "quantize", exact, small, "--force", *types], check=True, stdout=subprocess.DEVNULL)
            with open(small, "rb") as f, open(self.out, "rb") as g:
                self.assertEqual(f.read(), g.read())
            tensors = load_gguf(self.out)[1]
            self.assertEqual([tensors["vq.%scoder.mid.block_1.conv1.weight" % half][0] for half in ("en", "de")], [encoder, 8])

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


# ---- side by side with llama.cpp -----------------------------------------------------------------


class LlamaCpp(Case):
    """tests/bench/make_gguf.py: the numbers of the weights file, Q and K in another order."""

    def make(self, *argv):
        command = [sys.executable, os.path.join(TOP, "tests", "bench", "make_gguf.py"), *argv]
        return subprocess.run(command, capture_output=True, check=False, text=True)

    def order(self, rows):
        """Where the rows of heads of 8 come from."""
        return [head + n // 2 + n % 2 * 4 for head in range(0, rows, 8) for n in range(8)]

    def test_file(self):
        self.good("-o", self.out, "--llama", self.llama(biases="qkvo", attention_bias=True),
                  "--vqgan", self.vqgan(), "--bos", "70")
        done = self.make(self.out, self.path("x.gguf"))
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (0, self.path("x.gguf") + "\n", ""))
        keys, tensors = load_gguf(self.out)
        made_keys, made = load_gguf(self.path("x.gguf"))
        self.assertEqual(made.keys(), {n for n in tensors if not n.startswith("vq.")})
        for name, (kind, dims, raw) in made.items():
            old = tensors[name][2]
            if ".attn_q." in name or ".attn_k." in name:
                size = len(old) // dims[-1]
                old = b"".join(old[r * size:r * size + size] for r in self.order(dims[-1]))
                self.assertNotEqual(raw, tensors[name][2])
            self.assertEqual((kind, dims, raw), tensors[name][:2] + (old,), name)
        self.assertEqual(made_keys["general.architecture"], "llama")
        for name in ("embedding_length", "block_count", "attention.head_count_kv",
                     "rope.freq_base", "attention.layer_norm_rms_epsilon"):
            self.assertEqual(made_keys["llama." + name], keys["lvm." + name])
        self.assertEqual((made_keys["llama.rope.dimension_count"],
                          made_keys["tokenizer.ggml.bos_token_id"]), (8, 70))
        words = made_keys["tokenizer.ggml.tokens"]
        self.assertEqual((len(set(words)), words[10], len(made_keys["tokenizer.ggml.token_type"])),
                         (80, "<0x0A>", 80))

    def test_quantised_rows(self):
        rng = random.Random(4)
        blocks = [struct.pack("<e32b", 0.5, *[rng.randint(-9, 9) for _ in range(32)])
                  for _ in range(16)]
        self.good("-o", self.out, "--llama", self.llama())
        Quantised.rewrite(self, "blk.0.attn_k.weight", 8, b"".join(blocks))
        self.assertEqual(self.make(self.out, self.path("x.gguf")).returncode, 0)
        made = load_gguf(self.path("x.gguf"))[1]["blk.0.attn_k.weight"]
        self.assertEqual(made, (8, [32, 16], b"".join(blocks[r] for r in self.order(16))))

    def test_refusals(self):
        self.good("-o", self.out, "--vqgan", self.vqgan())
        done = self.make(self.out, self.path("x.gguf"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("make_gguf.py: %s: lvm.context_length is missing" % self.out, done.stderr)
        self.good("-o", self.out, "--llama", self.llama(), "--force")
        self.assertIn("also an input", self.make(self.out, self.out, "--force").stderr)
        self.assertIn("--force", self.make(self.out, self.path("vqgan", "config.json")).stderr)
        self.assertEqual(self.make().returncode, 2)
        self.assertEqual(self.make("--config", "100m", self.out, self.path("x.gguf")).returncode, 2)

    def test_random(self):
        done = self.make("--config", "100m", "--type", "q4_0", self.path("x.gguf"))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        keys, made = load_gguf(self.path("x.gguf"))
        self.assertEqual(len(made), 22 * 9 + 3)
        self.assertEqual((keys["llama.attention.head_count"], len(keys["tokenizer.ggml.tokens"])),
                         (10, 8292))
        self.assertEqual(made["output.weight"][:2], (8, [640, 8292]))
        kind, dims, raw = made["blk.21.ffn_down.weight"]
        self.assertEqual((kind, dims, len(raw)), (2, [1664, 640], 1664 * 640 // 32 * 18))
        self.assertEqual(made["output_norm.weight"], (0, [640], struct.pack("<f", 1) * 640))


class Compare(Case):
    """tests/bench/compare.py with stand-ins for the programs: its turns, ratios and refusals."""

    def program(self, name, code):
        path = self.path(name)
        with open(path, "w", encoding="utf-8") as f:
            f.write("#!%s\nimport json, sys\nargs = sys.argv[1:]\n%s" % (sys.executable, code))
        os.chmod(path, 0o755)
        return path

    def compare(self, *argv):
        lvm = self.program("lvm", "if args == ['--version']: sys.exit(print('lvm 9'))\n"
                           "print(json.dumps({'kernels': 'none'}))\n"
                           "print(json.dumps({'seconds': 2, 'stage': args[-1]}))\n")
        command = [sys.executable, os.path.join(TOP, "tests", "bench", "compare.py"), "--lvm", lvm,
                   "--config", "100m", "--type", "q4_0", "--runs", "3", *argv]
        return subprocess.run(command, capture_output=True, check=False, text=True)

    def test_ratios(self):
        # Three seconds with flash attention, nine without; the model must be there.
        ik = self.program("ik", "open(args[args.index('-m') + 1]).close()\n"
                          "took = 9e9 - 6e9 * int(args[args.index('-fa') + 1])\n"
                          "print('noise'), print(json.dumps([{'build_commit': 'abc',"
                          "'samples_ns': [took]}]))\n")
        broken = self.program("broken", "sys.exit('no such option')\n")
        done = self.compare("--ik", ik, "--llama", broken, "--stage", "prefill,generate",
                            "--json", self.path("out.json"))
        self.assertEqual(done.returncode, 0)
        turns = done.stderr.splitlines()        # three of lvm, after a warm-up, and so on
        self.assertEqual([turn for turn in turns if turn.startswith("prefill") and "lvm" in turn],
                         ["prefill, %s: lvm: 2.000 s" % name for name in
                          ("warm-up", "turn 1 of 3", "turn 2 of 3", "turn 3 of 3")])
        self.assertIn("generate, turn 3 of 3: ik_llama.cpp -fa 1 -rtr 1: 3.000 s", turns)
        self.assertIn("ik_llama.cpp: abc", done.stdout)
        self.assertRegex(done.stdout, r"prefill +lvm +2\.000 s +1920\.00 tokens/s\n")
        self.assertRegex(done.stdout, r"prefill +ik_llama.cpp -fa 1 -rtr 0 .* 1\.50x +best\n")
        self.assertRegex(done.stdout, r"prefill +ik_llama.cpp -fa 0 -rtr 0 .* 4\.50x +one run\n")
        self.assertRegex(done.stdout, r"prefill +llama.cpp +left out: .*: no such option\n")
        self.assertRegex(done.stdout, r"\ngenerate +2\.000 s +3\.000 s +1\.50x  ik_llama\.cpp -fa 1 ")
        with open(self.path("out.json"), encoding="utf-8") as f:
            found = json.load(f)
        self.assertEqual(found["ratios"]["generate"]["ratio"], 1.5)
        self.assertEqual([len(e["seconds"]) for e in found["stages"]["prefill"][:3]], [3, 1, 3])

    def test_refusals(self):
        done = self.compare("--stage", "decode", "--python", self.path("none"), "--open-muse", ".")
        self.assertRegex(done.stdout, r"decode +PyTorch +left out: .*none: No such file")
        self.assertEqual(self.compare("--stage", "sleep").returncode, 2)
        self.assertEqual(self.compare("--python", "python3").returncode, 2)
        done = self.compare("--lvm", self.path("nothing"))
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("nothing: No such file", done.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        sys.exit(fuzz(int(sys.argv[2]), (sys.argv[3:] or ["1"])[0]))
    unittest.main()
