#!/usr/bin/env python3
"""Tests of the command line: python3 tests/test_cli.py. Standard library only.

LVM names the program (./lvm), WEIGHTS the shipped model (weights.bin), SANITIZE says that the
program was built with sanitizers: it is slow then and may take address space. Most tests use the
small random model of tests/golden/both, which convert.py puts together, in an empty folder each.

A failure must end in one line on stderr that says what is wrong, the right exit status (1 the work
failed, 2 wrong usage), and a folder in which nothing has changed.
"""

import base64
import fcntl
import json
import math
import os
import pty
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
import termios
import time
import unittest
import zlib

TESTS = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(TESTS)
LVM = os.path.abspath(os.environ.get("LVM", os.path.join(TOP, "lvm")))
WEIGHTS = os.path.abspath(os.environ.get("WEIGHTS", os.path.join(TOP, "weights.bin")))
SANITIZED = bool(os.environ.get("SANITIZE"))
TIMEOUT = 180 if SANITIZED else 60
MEMORY = 2 << 30                          # address space that a hostile file may take
T, CODES, WINDOW = 64, 256, 4             # of the small model: tokens an image, codes, images
REPORTS = ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "runtime error:",
           "WARNING: ThreadSanitizer")
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8         # GGUF's numbers
U32, I32, FLOAT, TEXT, ARRAY = 4, 5, 6, 8, 9


# ---- files ---------------------------------------------------------------------------------------

def read(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, data):
    with open(path, "wb") as f:
        f.write(data)
    return path


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)


def png(width, height, rows):
    return (png_header(width, height) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def image(seed, width=40, height=36):
    """An RGB PNG with a gradient and some noise that the seed chooses."""
    rng = random.Random(seed)
    a, b, c = (rng.randrange(1, 9) for _ in range(3))
    rows = bytearray()
    for y in range(height):
        rows.append(0)
        for x in range(width):
            rows += bytes(((a * x + b * y) % 256, (c * x * y) % 256, rng.randrange(256)))
    return png(width, height, bytes(rows))


def png_size(data):
    """Width and height of a whole RGB PNG; an error where it is not one."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-12:] == chunk(b"IEND", b""), "no whole PNG"
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (depth, colour) == (8, 2), "not 8-bit RGB"
    at, pixels = 8, b""
    while at < len(data):
        size, = struct.unpack(">I", data[at:at + 4])
        assert data[at:at + 12 + size] == chunk(data[at + 4:at + 8], data[at + 8:at + 8 + size])
        if data[at + 4:at + 8] == b"IDAT":
            pixels += data[at + 8:at + 8 + size]
        at += 12 + size
    assert len(zlib.decompress(pixels)) == height * (1 + 3 * width), "too few or too many pixels"
    return width, height


def pixels(data):
    """Rows of an RGB PNG that test_cli.png_size finds whole, filters undone."""
    width, height = png_size(data)
    at, packed = 8, b""
    while at < len(data):
        size, = struct.unpack(">I", data[at:at + 4])
        if data[at + 4:at + 8] == b"IDAT":
            packed += data[at + 8:at + 8 + size]
        at += 12 + size
    raw, rows, n = zlib.decompress(packed), [], 3 * width
    for y in range(height):
        kind, row = raw[y * (n + 1)], bytearray(raw[y * (n + 1) + 1:(y + 1) * (n + 1)])
        above = rows[-1] if rows else bytes(n)
        for i in range(n):
            left, up = row[i - 3] if i >= 3 else 0, above[i]
            corner = above[i - 3] if i >= 3 else 0
            p = left + up - corner
            paeth = min((abs(p - left), 0, left), (abs(p - up), 1, up), (abs(p - corner), 2, corner))[2]
            row[i] = (row[i] + (0, left, up, (left + up) // 2, paeth)[kind]) & 255
        rows.append(bytes(row))
    return rows


def npy(path, code):
    """The values of a .npy file of float32 ("f") or int32 ("i")."""
    data = read(path)
    start = 10 + struct.unpack("<H", data[8:10])[0]
    return struct.unpack("<%d%s" % ((len(data) - start) // 4, code), data[start:])


class Gguf:
    """A weights file apart: keys [name, type, value bytes], tensors [name, ne, type, offset]."""

    def __init__(self, data):
        self.at, self.whole = 8, data
        n_tensors, n_keys = self.number(8), self.number(8)
        self.keys, self.tensors = [], []
        for _ in range(n_keys):
            name, kind = self.text(), self.number(4)
            start = self.at
            self.skip(kind)
            self.keys.append([name, kind, data[start:self.at]])
        for _ in range(n_tensors):
            name, n_dims = self.text(), self.number(4)
            ne = [self.number(8) for _ in range(n_dims)]
            kind = self.number(4)
            self.tensors.append([name, ne, kind, self.number(8)])
        self.head = self.at
        self.data = data[(self.at + 63) // 64 * 64:]

    def number(self, size):
        self.at += size
        return int.from_bytes(self.whole[self.at - size:self.at], "little")

    def text(self):
        n = self.number(8)
        self.at += n
        return self.whole[self.at - n:self.at]

    def skip(self, kind):
        if kind == TEXT:
            self.text()
        elif kind == ARRAY:
            of, n = self.number(4), self.number(8)
            for _ in range(n):
                self.skip(of)
        else:
            self.at += (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)[kind]

    def key(self, name, kind, value):
        """Sets a key; value None removes it."""
        self.keys = [k for k in self.keys if k[0] != name]
        if value is not None:
            self.keys.append([name, kind, value])

    def tensor(self, name):
        return next(t for t in self.tensors if t[0] == name)

    def bytes(self, n_tensors=None, n_keys=None):
        out = bytearray(b"GGUF" + struct.pack(
            "<IQQ", 3, len(self.tensors) if n_tensors is None else n_tensors,
            len(self.keys) if n_keys is None else n_keys))
        for name, kind, value in self.keys:
            out += gguf_text(name) + struct.pack("<I", kind) + value
        for name, ne, kind, offset in self.tensors:
            out += gguf_text(name) + struct.pack("<I", len(ne)) + struct.pack("<%dQ" % len(ne), *ne)
            out += struct.pack("<IQ", kind, offset)
        return bytes(out) + bytes(-len(out) % 64) + self.data


def gguf_text(name):
    return struct.pack("<Q", len(name)) + name


def u32(n):
    return struct.pack("<I", n)


def f32(x):
    return struct.pack("<f", x)


# ---- running -------------------------------------------------------------------------------------

def ignore_file_limit(size):
    """In the child: no file may grow beyond size, and the write fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def processor_time():
    """Of all programs that ran so far; a busy machine does not lengthen it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def heed_interrupts():
    """A shell's background jobs are born deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def limit_memory(size=MEMORY):
    if not SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


class Case(unittest.TestCase):
    """A test in an empty folder of its own, with the small model as self.weights."""

    SAID = (r"\Alvm: note: [^\n]+ \(\d+ bytes\), [^\n]+: \d+\.\d\d s \(prompt \d+\.\d\d, "
            r"tokens \d+\.\d\d, images \d+\.\d\d\)\n")

    @classmethod
    def setUpClass(cls):
        cls.shared = tempfile.mkdtemp(prefix="test_cli.")
        cls.weights = os.path.join(cls.shared, "both.bin")
        golden = os.path.join(TESTS, "golden", "both")
        cls.convert(cls.weights, "--llama", os.path.join(golden, "llama"), "--vqgan",
                    os.path.join(golden, "vqgan"))
        cls.images = [write(os.path.join(cls.shared, "p%d.png" % i), image(i))
                        for i in range(4)]

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.shared)

    @staticmethod
    def convert(out, *args):
        subprocess.run([sys.executable, os.path.join(TOP, "convert.py"), "-o", out] + list(args),
                       check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def setUp(self):
        self.folder = tempfile.mkdtemp(dir=self.shared)
        self.addCleanup(shutil.rmtree, self.folder, True)

    def tearDown(self):
        left = [n for n in os.listdir(self.folder) if n.endswith(".tmp")]
        self.assertEqual(left, [], "temporary files were left")

    def path(self, name):
        return os.path.join(self.folder, name)

    def put(self, name, data):
        return write(self.path(name), data)

    def start(self, *args, **how):
        how.setdefault("stdout", subprocess.PIPE)
        how.setdefault("stderr", subprocess.PIPE)
        how.setdefault("stdin", subprocess.PIPE)
        how["env"] = dict(os.environ, **how.get("env", {}))
        return subprocess.Popen([LVM] + list(args), cwd=self.folder, **how)

    def finish(self, process, data=b"", limit=TIMEOUT):
        try:
            out, err = process.communicate(data, limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.fail("did not end within %d seconds: %s" % (limit, process.args))
        err = (err or b"").decode("utf-8", "replace")
        for report in REPORTS:
            self.assertNotIn(report, err, "%s\n%s" % (process.args, err))
        return process.returncode, out or b"", err

    def run_lvm(self, *args, **how):
        data, limit = how.pop("data", b""), how.pop("limit", TIMEOUT)
        return self.finish(self.start(*args, **how), data, limit)

    def good(self, *args, **how):
        """Runs a command that must succeed in silence, but for what a prediction says of itself; its
        standard output."""
        code, out, err = self.run_lvm(*args, **how)
        self.assertEqual((code, re.sub(self.SAID, "", err)), (0, ""), args)
        return out

    def lines(self, *args, **how):
        return self.good(*args, **how).decode().splitlines()

    def bad(self, status, words, *args, **how):
        """Runs a command that must fail with one line that holds all words, and change nothing."""
        before = sorted(os.listdir(self.folder))
        code, out, err = self.run_lvm(*args, **how)
        what = "%s\n%s" % (args, err)
        self.assertEqual(code, status, what)
        self.assertEqual(out, b"", what)
        self.assertRegex(err, r"\Alvm: [ -~]+\n\Z", what)
        for word in [words] if isinstance(words, str) else words:
            self.assertIn(word, err, what)
        self.assertEqual(sorted(os.listdir(self.folder)), before, what)
        return err

    def predict(self, *args, **how):
        """The bytes of the one image that a prediction writes."""
        args += ("-o", "once.png") + (() if "-j" in args else ("-j", "1"))
        self.assertEqual(self.lines(self.weights, *args, **how), ["once.png"])
        return read(self.path("once.png"))


# ---- what works ----------------------------------------------------------------------------------

class Commands(Case):
    def test_version(self):
        version = self.good("--version")
        self.assertRegex(version, rb"\Alvm \d+\.\d+\.\d+ \(([\w.-]+, )?(gcc|clang) \d+\.\d+\.\d+, "
                                  rb"(scalar|avx2|avx512|neon|neon-dot), \d+ processors\)\n\Z")
        for args in (("-V",), ("version",), ("encode", "-V"), ("-j", "2", "-V"), ("-o", "x", "--version")):
            self.assertEqual(self.good(*args), version, args)
        self.bad(2, "takes no words", "version", "x")

    def test_help(self):
        text = self.good("help").decode()
        commands = ("predict", "encode", "decode", "info", "quantize", "help", "version")
        for word in commands + ("--version", "--greedy"):
            self.assertIn(word, text)
        self.assertEqual(self.good("--help").decode(), text)
        self.assertEqual(self.good("-h").decode(), text)
        for command in commands:
            self.assertIn("lvm ", self.good("help", command).decode())
        self.assertIn("--temperature", self.good("help", "predict").decode())
        self.assertNotIn("--temperature", self.good("help", "decode").decode())
        self.bad(2, "nope", "help", "nope")

    def test_help_without_arguments(self):
        code, out, err = self.run_lvm()
        self.assertEqual((code, out), (2, b""))
        self.assertIn("WEIGHTS", err)

    def test_info(self):
        text = self.good("info", self.weights).decode()
        for word in ("both.bin", str(os.path.getsize(self.weights)), "32 x 32 pixels", "256 codes",
                     "2 layers", "width 64", "vocabulary 260", "256 tokens = 4 images", "bos 256",
                     "f16", "bf16"):
            self.assertIn(word, text)
        self.assertEqual(self.good("info", self.weights, "--no-mmap").decode(), text)
        every = self.good("info", self.weights, "--tensors").decode()
        self.assertTrue(every.startswith(text))
        for t in Gguf(read(self.weights)).tensors:
            shape = " ".join(str(n) for n in reversed(t[1]))
            self.assertRegex(every, r"(?m)^%s +\S+ +%s$" % (re.escape(t[0].decode()), shape))

    def test_info_of_parts(self):
        golden = os.path.join(TESTS, "golden", "both")
        self.convert(self.path("t.bin"), "--llama", os.path.join(golden, "llama"))
        self.convert(self.path("v.bin"), "--vqgan", os.path.join(golden, "vqgan"))
        self.assertIn("tokenizer     none", self.good("info", "t.bin").decode())
        self.assertIn("transformer   none", self.good("info", "v.bin").decode())
        self.assertEqual(self.good("encode", "v.bin", self.images[0]),
                         self.good("encode", self.weights, self.images[0]))
        self.bad(1, ["v.bin", "no transformer"], "v.bin", self.images[0])
        self.bad(1, ["t.bin", "no tokenizer"], "t.bin", self.images[0])
        self.bad(1, ["t.bin", "no tokenizer"], "encode", "t.bin", self.images[0])
        self.put("ids", b"1 " * 256)
        self.bad(1, ["t.bin", "no tokenizer"], "decode", "t.bin", "ids")

    def test_encode(self):
        out = self.lines("encode", self.weights, *self.images)
        self.assertEqual(len(out), len(self.images))
        for line in out:
            ids = [int(n) for n in line.split(" ")]
            self.assertEqual(len(ids), T)
            self.assertTrue(all(0 <= n < CODES for n in ids))
        self.assertEqual(len(set(out)), len(out), "different images, the same tokens")
        self.assertEqual(self.lines("encode", self.weights, self.images[2]), out[2:3])

    def test_encode_to_a_file(self):
        out = self.good("encode", self.weights, *self.images)
        self.assertEqual(self.lines("encode", self.weights, "-o", "ids", *self.images), ["ids"])
        self.assertEqual(read(self.path("ids")), out)
        self.good("encode", self.weights, self.images[0], "--output=ids")
        self.assertEqual(read(self.path("ids")), out.splitlines(True)[0])
        self.assertEqual(self.good("encode", self.weights, *(self.images + ["-o", "-"])), out)
        self.assertEqual(os.listdir(self.folder), ["ids"])

    def test_decode(self):
        ids = self.good("encode", self.weights, *self.images[:2])
        self.put("ids", ids)
        self.assertEqual(self.lines("decode", self.weights, "ids", "-o", "d.png"),
                         ["d-1.png", "d-2.png"])
        self.put("first", ids.splitlines()[0].replace(b" ", b"\n \t"))
        self.assertEqual(self.lines("decode", self.weights, "first"), ["out.png"])
        self.assertEqual(png_size(read(self.path("out.png"))), (32, 32))
        self.assertEqual(read(self.path("out.png")), read(self.path("d-1.png")))
        self.assertNotEqual(read(self.path("out.png")), read(self.path("d-2.png")))
        first = ids.splitlines()[0]
        self.assertEqual(self.lines("decode", self.weights, "-", "-o", "in.png", data=first),
                         ["in.png"])
        self.assertEqual(read(self.path("in.png")), read(self.path("out.png")))

    def test_standard_output(self):
        one = self.predict(self.images[0])
        self.assertEqual(self.good(self.weights, self.images[0], "-o", "-"), one)
        ids = self.good("encode", self.weights, self.images[0])
        self.good("decode", self.weights, "-", "-o", "d.png", data=ids)
        self.assertEqual(self.good("decode", self.weights, "-", "-o", "-", data=ids),
                         read(self.path("d.png")))
        self.bad(2, "-o", self.weights, self.images[0], "-o", "-", "-n", "2")
        self.assertEqual(sorted(os.listdir(self.folder)), ["d.png", "once.png"])

    def test_predict(self):
        self.assertEqual(self.lines(self.weights, self.images[0]), ["out.png"])
        self.assertEqual(png_size(read(self.path("out.png"))), (32, 32))
        self.assertEqual(self.predict(self.images[0]), read(self.path("out.png")))
        os.mkdir(self.path("a.b"))
        self.assertEqual(self.lines("predict", self.weights, self.images[0], "-oa.b/../c.png"),
                         ["a.b/../c.png"])
        self.assertEqual(self.lines("predict", self.weights, self.images[0], "-o", "c"), ["c.png"])
        self.assertEqual(read(self.path("c.png")), read(self.path("out.png")))
        self.assertEqual(self.lines("-o", "d.png", self.weights, "--", self.images[0]), ["d.png"])

    def test_names_of_several(self):
        def names(*args):
            return self.lines(self.weights, self.images[0], "-q", "-j", "1", *args)
        self.assertEqual(names("-n", "3"), ["out-1.png", "out-2.png", "out-3.png"])
        self.assertEqual(names("-c", "2"), ["out-1a.png", "out-1b.png"])
        os.mkdir(self.path("a.b"))
        self.assertEqual(names("-n2", "--candidates=2", "-o", "a.b/x.y.png"),
                         ["a.b/x.y-1a.png", "a.b/x.y-1b.png", "a.b/x.y-2a.png", "a.b/x.y-2b.png"])
        self.assertEqual(names("-n", "2", "-o", "a.b/x"), ["a.b/x-1.png", "a.b/x-2.png"])
        self.assertEqual(names("-c", "27", "-o", "m.png")[::26], ["m-1-01.png", "m-1-27.png"])
        several = names("-n", "11", "-o", "z.png")         # they sort as they are numbered
        self.assertEqual((several, several[0]), (sorted(several), "z-01.png"))
        for name in ("out-3.png", "out-1b.png", "a.b/x.y-2b.png", "a.b/x-2.png",
                     "m-1-27.png"):
            self.assertEqual(png_size(read(self.path(name))), (32, 32))

    def words(self, name):
        """What a PNG says of itself: its iTXt chunk "parameters"."""
        found = re.search(rb"iTXtparameters\0\0\0\0\0(.*?)....IDAT", read(self.path(name)), re.S)
        return found.group(1)[:-4].decode()

    def test_parameters(self):
        """An image's file says what decided its pixels, and nothing else: equal pixels, equal files."""
        self.good(self.weights, *self.images[:2], "-c", "2", "-n", "2", "-j", "1")
        size = os.path.getsize(self.weights)
        self.assertRegex(self.words("out-2b.png"), r"\A[^,]+ \(%d bytes\), seed 1, temperature 1, "
                         r"top-p 0\.9, window 4, squash, kv f16, candidate 2, image 2\Z" % size)
        self.good(self.weights, *self.images[:2], "-j", "2", "-o", "one.png", "-s", "1")
        self.assertEqual(read(self.path("one.png")), read(self.path("out-1a.png")))
        code, _, err = self.run_lvm(self.weights, self.images[0], "--greedy", "--fit", "crop",
                                    "--window", "3", "--kv", "f32", "--exact", "-s", "7")
        self.assertIn("greedy, window 3, crop, kv f32, exact", self.words("out.png"))
        self.assertNotIn("seed", self.words("out.png"))
        self.assertRegex(err, self.SAID[:-2] + r"\n\Z")
        self.assertIn(self.words("out.png").split(", candidate")[0], err)
        self.good(self.weights, self.images[0], "-k", "5", "-o", "k.png")
        self.assertIn("top-k 5", self.words("k.png"))

    def test_json_and_best(self):
        run = (self.weights, *self.images[:2], "-c", "4", "-n", "2", "-j", "1")
        told = json.loads(self.good(*run, "--json"))
        self.assertEqual([c["outputs"] for c in told["candidates"]],
                         [["out-1%s.png" % c, "out-2%s.png" % c] for c in "abcd"])
        means = [c["log_likelihood"] for c in told["candidates"]]
        self.assertTrue(all(-20 < m < 0 for m in means) and len(set(means)) == 4)
        self.assertEqual(told["seed"], 1)
        self.assertEqual(sorted(told["seconds"]), ["decode", "generate", "prompt"])
        for i, c in enumerate("abcd"):                   # the ids are those of the images
            ids = told["candidates"][i]["ids"]
            self.assertEqual(len(ids), 2 * T)
            self.put("ids", " ".join(map(str, ids)).encode())
            self.good("decode", self.weights, "ids", "-o", "again.png")
            for n in "12":
                self.assertEqual(pixels(read(self.path("again-%s.png" % n))),
                                 pixels(read(self.path("out-%s%s.png" % (n, c)))))
        best = means.index(max(means))
        kept = json.loads(self.good(*run, "--json", "--best", "-o", "best.png"))
        self.assertEqual([c["outputs"] for c in kept["candidates"]],
                         [["best-1.png", "best-2.png"] if i == best else [] for i in range(4)])
        self.assertEqual([c["ids"] for c in kept["candidates"]],
                         [c["ids"] for c in told["candidates"]])
        self.assertEqual(read(self.path("best-2.png")),
                         read(self.path("out-2%s.png" % "abcd"[best])))
        self.bad(1, "standard output", *run[:3], "--json", "-o", "-")

    def test_likelihood_is_eval_s(self):
        """The mean of a candidate's log-likelihoods is what eval finds of its image."""
        told = json.loads(self.good(self.weights, *self.images[:2], "--json", "-j", "1"))
        line = {"input": self.images[:2], "target_tokens": told["candidates"][0]["ids"]}
        self.put("set.jsonl", json.dumps(line).encode())
        found = json.loads(self.lines("eval", self.weights, "set.jsonl", "--json")[0])
        self.assertAlmostEqual(math.log(found["perplexity"]),
                               -told["candidates"][0]["log_likelihood"], places=5)

    def test_truth_on_the_sheet(self):
        run = (self.weights, *self.images[:2], "-c", "2", "-j", "1", "--sheet", "s.png")
        self.good(*run)
        plain = pixels(read(self.path("s.png")))
        self.assertEqual(self.good(*run, "--truth", self.images[2]).splitlines()[-1], b"s.png")
        rows = pixels(read(self.path("s.png")))
        self.assertEqual((len(plain[0]), len(plain)), (3 * (3 * 40 + 8), 2 * 40 + 8))
        self.assertEqual((len(rows[0]), len(rows)), (3 * (4 * 40 + 8), 2 * 40 + 8))
        green = bytes((48, 160, 80))
        self.assertEqual(rows[5][3 * (3 * 40 + 5):3 * (3 * 40 + 8)], green * 3)
        self.bad(2, ["--truth", "--sheet"], *run[:3], "--truth", self.images[2])
        self.bad(1, ["none.png"], *run, "--truth", "none.png")

    def test_animation(self):
        out = self.good(self.weights, self.images[0], "-n", "3", "--apng", "a", "-j", "1")
        self.assertEqual(out.split(), [b"out-1.png", b"out-2.png", b"out-3.png", b"a.png"])
        data = read(self.path("a.png"))
        for kind, n in ((b"acTL", 1), (b"fcTL", 3), (b"IDAT", 1), (b"fdAT", 2), (b"IEND", 1)):
            self.assertEqual(data.count(kind), n, kind)
        self.assertEqual(pixels(re.sub(rb"(?s)....acTL.{12}", b"", re.sub(
            rb"(?s)....fcTL.{30}", b"", data[:data.index(b"fdAT") - 4 - 38] + chunk(b"IEND", b"")))),
            pixels(read(self.path("out-1.png"))))
        self.bad(2, ["x.gif"], self.weights, self.images[0], "--apng", "x.gif")

    def test_images_on_standard_input(self):
        """PNG and PNM one behind the other, as a video decoder pipes them in."""
        whole = b"".join(read(p) for p in self.images)
        grey = b"P5 4 4 255 " + bytes(range(16))
        self.assertEqual(self.good("encode", self.weights, "-", data=whole),
                         self.good("encode", self.weights, *self.images))
        self.put("grey.pgm", grey)
        self.assertEqual(
            self.good("encode", self.weights, self.images[3], "-", data=whole + grey),
            self.good("encode", self.weights, self.images[3], *self.images, "grey.pgm"))
        self.assertEqual(self.good(self.weights, "-", "-j", "1", "-q", "-o", "-", data=whole),
                         self.predict(*self.images, "-q"))
        self.bad(1, ["standard input is empty"], "encode", self.weights, "-", data=b"")
        self.bad(1, ["standard input, image 5"], "encode", self.weights, "-", data=whole + b"P6 4")
        self.bad(1, ["named twice"], "encode", self.weights, "-", "-", data=whole)

    def test_folder_in_natural_order(self):
        os.mkdir(self.path("f"))
        for name, i in (("f/2.png", 1), ("f/10.png", 2), ("f/1.png", 0), ("f/11.PNG", 3)):
            self.put(name, image(i))
        self.put("f/notes.txt", b"not an image")
        os.mkdir(self.path("f/truth"))
        ids = self.good("encode", self.weights, *self.images)
        self.assertEqual(self.good("encode", self.weights, "f", "-q"), ids)
        self.assertEqual(self.good("encode", self.weights, "f/", "-q"), ids)
        self.assertEqual(self.good("encode", self.weights, self.images[3], "f", "-q"),
                         ids.splitlines(True)[3] + ids)
        self.assertEqual(self.predict("f/1.png", "f", "-q"), self.predict("-q", *self.images))

    def test_more_images_than_the_window(self):
        many = [self.images[i % 4] for i in range(40)]
        code, out, err = self.run_lvm(self.weights, *many)
        self.assertEqual((code, out), (0, b"out.png\n"))
        self.assertRegex(err, r"\Alvm: note: 40 images given, the last 3 count .*4\)\n" + self.SAID[2:])
        self.assertEqual(self.predict(*(many + ["--quiet"])), read(self.path("out.png")))
        self.assertEqual(self.predict(*many[-3:]), read(self.path("out.png")))

    def test_bench(self):
        out = self.lines("bench", self.weights, "--json", "--prompt", "70", "--new", "6", "-j", "1")
        first, *stages, sums = [json.loads(line) for line in out]
        self.assertEqual([s["stage"] for s in stages], ["encode", "prefill", "generate", "candidates", "decode"])
        for s in stages:
            self.assertGreater(s["seconds"], 0)
            self.assertGreater(s["floor_seconds"], 0)
        self.assertGreater(min(first["gflops"], first["integer_gops"], first["read_gbs"]), 0)
        self.assertGreater(first.get("bf16_gflops", 1), 0)
        if os.path.exists("/proc/cpuinfo"):
            able = first["kernels"] == "avx512" and b"avx512_bf16" in read("/proc/cpuinfo")
            self.assertEqual("bf16_gflops" in first, able)
        took = {s["stage"]: s["seconds"] for s in stages}
        self.assertEqual(sums["prompt_images"], 2)            # 70 tokens reach into the second
        self.assertAlmostEqual(sums["answer_seconds"], 2 * took["encode"] + took["prefill"] +
                               took["generate"] * T / 6 + took["decode"], delta=1e-3 * sums["answer_seconds"])
        self.assertEqual(sums["file_bytes"], os.path.getsize(self.weights))
        types = re.findall(rb"values +(\d+) bytes\n", self.good("info", self.weights))
        self.assertEqual(sums["weights_bytes"], sum(int(n) for n in types))
        self.assertEqual(sums["cache_bytes"], 76 * 2 * 2 * 2 * 32 * 2)   # tokens, layers, K and V, heads, d, f16
        if sys.platform.startswith("linux"):
            self.assertGreater(sums["resident_bytes"], sums["weights_bytes"])
        shape = (self.weights,) if SANITIZED else ("--config", "100m", "--type", "q4_0")    # 1e8 numbers to draw
        table = self.lines("bench", *shape, "--prompt", "8", "--new", "1", "--stage", "prefill", "-j", "1")
        self.assertRegex(table[-1], r"^prefill .* tokens/s .* %$")
        self.bad(2, "--config", "bench")
        self.bad(2, "--config", "bench", self.weights, "--config", "100m")
        self.bad(1, "the context holds", "bench", self.weights, "--prompt", "1000000")

    def test_manual_page(self):
        page = self.good("help", "--man").decode()
        for command in ("predict", "encode", "decode", "rank", "eval", "batch", "bench", "info", "quantize"):
            self.assertRegex(page, r"(?m)^\.SS \[?%s\b" % command)
            self.assertIn("lvm ", self.good("help", command).decode())

    def test_sliding_window(self):
        args = [self.weights, "-j1", "--greedy"] + self.images[:3]
        self.lines(*(args + ["-n", "6", "-o", "s.png"]))
        self.lines(*(args + ["-n", "2", "-o", "t.png"]))
        for i in "12":
            self.assertEqual(read(self.path("s-%s.png" % i)), read(self.path("t-%s.png" % i)))


class Repeatable(Case):
    def test_greedy(self):
        greedy = self.predict(self.images[0], "--greedy")
        self.assertEqual(self.predict(self.images[0], "--greedy", "-s", "7", "-t", "5"), greedy)
        self.assertEqual(pixels(self.predict(self.images[0], "-k", "1")), pixels(greedy))

    def test_seed(self):
        default = self.predict(self.images[0])
        self.assertEqual(self.predict(self.images[0]), default)
        self.assertEqual(self.predict(self.images[0], "-s", "1"), default)
        others = {self.predict(self.images[0], "-s", s)
                  for s in ("0", "2", "18446744073709551615")}
        self.assertEqual(len(others | {default}), 4, "seeds that give the same image")

    def test_sampling_options_matter(self):
        def of(*args):
            return self.predict(self.images[0], *args)
        images = [of(), of("-t", "3"), of("-p", "0.3"), of("-k", "3"), of("--greedy")]
        self.assertEqual(len(set(images)), len(images))
        self.assertEqual(of("-t1", "-p0.9", "-k0"), images[0])

    def test_threads_and_candidates(self):
        args = self.images[:2] + ["-n", "3"]
        self.lines(self.weights, *(args + ["-j", "1", "-o", "r.png"]))
        want = [read(self.path("r-%d.png" % i)) for i in (1, 2, 3)]
        for threads in ("3",) if SANITIZED else ("2", "3", "5"):
            for candidates in ("1", "3"):
                self.lines(self.weights, *(args + ["-j", threads, "-c", candidates, "-o", "x.png"]))
                letter = "a" if candidates == "3" else ""
                got = [read(self.path("x-%d%s.png" % (i, letter))) for i in (1, 2, 3)]
                self.assertEqual(got, want, "%s threads, %s candidates" % (threads, candidates))
        self.assertNotEqual(read(self.path("x-1b.png")), want[0])
        ids = {self.good("encode", self.weights, "-j", n, *self.images) for n in "1235"}
        self.assertEqual(len(ids), 1)

    def test_reading_and_exact(self):
        self.good("quantize", self.weights, "q.bin", "--type", "q8_0", "--vq-type", "q8_0", "--encoder-type", "q8_0")
        for weights in (self.weights, "q.bin"):
            def of(*args):
                self.lines(weights, self.images[0], self.images[1], "-o", "x.png", *args)
                return read(self.path("x.png"))
            self.assertEqual(of("--no-mmap"), of())
            self.assertEqual(of("--exact", "--no-mmap"), of("--exact"))
        for kv in ("f32", "f16", "q8_0"):
            self.assertEqual(self.predict(self.images[0], "--kv", kv),
                             self.predict(self.images[0], "--kv", kv, "-j", "3"))

    def test_instruction_sets(self):
        err = self.bad(1, ["LVM_ISA", "bogus"], "--version", env={"LVM_ISA": "bogus"})
        isas = re.search(r"runs (.+)\n", err).group(1).split(", ")
        self.assertIn("scalar", isas)
        self.bad(1, ["LVM_ISA", "bogus"], self.weights, self.images[0], env={"LVM_ISA": "bogus"})
        self.bad(1, ["LVM_ISA", "bogus"], "info", self.weights, env={"LVM_ISA": "bogus"})
        for isa in isas:
            env = {"LVM_ISA": isa}
            self.assertIn(isa.encode(), self.good("--version", env=env))
            one = self.predict(self.images[0], "--greedy", "-j", "1", env=env)
            self.assertEqual(self.predict(self.images[0], "--greedy", "-j", "3", env=env), one)


class Quantize(Case):
    def types(self, name):
        return {line.split()[0]: line.split()[1] for line in
                self.lines("info", name, "--tensors") if re.match(r"\S+\.(weight|bias) ", line)}

    def test_types(self):
        before = self.types(self.weights)
        for kind in ("q8_0", "q4_0", "f16", "bf16", "f32"):
            name = kind + ".bin"
            self.assertEqual(self.lines("quantize", self.weights, name, "--type", kind), [name])
            after = self.types(name)
            for t, was in before.items():
                matrix = not t.startswith("vq.") and was != "f32"
                logits = t == "output.weight" and kind == "q4_0"     # kept finer
                self.assertEqual(after[t], "q8_0" if logits else kind if matrix else was, t)
            self.predict_with(name)
        self.good("quantize", self.weights, "v.bin", "--vq-type", "q8_0")
        after = self.types("v.bin")
        self.assertIn("q8_0", after.values())
        for t in ("vq.quantize.embedding.weight", "vq.quant_conv.weight", "token_embd.weight",
                  "vq.encoder.conv_in.weight", "vq.post_quant_conv.weight"):
            self.assertEqual(after[t], before[t])
        self.predict_with("v.bin")

    def test_encoder_type(self):
        """The encoder becomes F16 where the tokenizer is to be quantised; what was quantised stays so."""
        half = {"en": ("vq.encoder.", "vq.quant_conv."), "de": ("vq.decoder.", "vq.post_quant_conv.")}
        exact = ("vq.encoder.conv_in.weight", "vq.quant_conv.weight")

        def of(name, which, *args):
            """Types of one half's convolutions after quantising with args."""
            self.good("quantize", self.weights, name, "--force", *args)
            return {kind for t, kind in self.types(name).items()
                    if t.startswith(half[which]) and before[t] != "f32" and (args[1] != "q8_0" or t not in exact)}

        before = self.types(self.weights)
        self.assertEqual({before[t] for t in exact}, {"bf16"})
        self.assertEqual(of("a.bin", "en", "--vq-type", "q8_0"), {"f16"})
        self.assertEqual({self.types("a.bin")[t] for t in exact}, {"bf16"})
        self.assertIn("q8_0", of("a.bin", "de", "--vq-type", "q8_0"))
        self.assertIn("q8_0", of("b.bin", "en", "--vq-type", "q8_0", "--encoder-type", "q8_0"))
        self.assertEqual({self.types("b.bin")[t] for t in exact}, {"bf16"})
        for kind in ("f32", "f16"):
            self.assertEqual(of("c.bin", "en", "--vq-type", kind), {kind})
            self.assertEqual(of("c.bin", "en", "--encoder-type", kind), {kind})
            self.assertEqual(of("c.bin", "de", "--encoder-type", kind), {"bf16"})
            self.assertEqual(of("c.bin", "en", "--encoder-type", kind, "--vq-type", "q8_0"), {kind})
        self.good("quantize", "b.bin", "d.bin", "--vq-type", "q8_0")
        self.assertEqual(read(self.path("d.bin")), read(self.path("b.bin")))
        self.predict_with("a.bin")

    def predict_with(self, weights):
        self.assertEqual(self.lines(weights, self.images[0], "-j1", "-o", "q.png"), ["q.png"])
        self.assertEqual(png_size(read(self.path("q.png"))), (32, 32))

    def test_nothing_to_do(self):
        self.good("quantize", self.weights, "same.bin")
        self.assertEqual(read(self.path("same.bin")), read(self.weights))

    def test_force(self):
        self.put("q.bin", b"precious")
        self.bad(1, ["q.bin", "exists", "--force"], "quantize", self.weights, "q.bin")
        self.assertEqual(read(self.path("q.bin")), b"precious")
        self.assertEqual(self.lines("quantize", self.weights, "q.bin", "--force"), ["q.bin"])
        self.good("info", "q.bin")

    def test_refusals(self):
        shutil.copy(self.weights, self.path("w.bin"))
        os.symlink("w.bin", self.path("link.bin"))
        for name in ("w.bin", "./w.bin", "link.bin"):
            self.bad(1, [name, "input"], "quantize", "w.bin", name, "--force")
        self.bad(1, ["none.bin", "No such file"], "quantize", "none.bin", "x.bin")
        self.bad(1, "none/x.bin", "quantize", "w.bin", "none/x.bin")
        self.bad(2, "q9", "quantize", "w.bin", "x.bin", "--type", "q9")
        for option in ("--vq-type", "--encoder-type"):
            self.bad(2, [option, "q4_0"], "quantize", "w.bin", "x.bin", option, "q4_0")
        self.bad(2, "help quantize", "quantize", "w.bin")
        self.bad(2, "help quantize", "quantize", "w.bin", "x.bin", "y.bin")
        self.assertEqual(read(self.path("w.bin")), read(self.weights))

    def test_full_disk(self):
        self.put("q.bin", b"precious")
        for size in (0, 5000, 300000):
            self.bad(1, ["q.bin", "cannot be written"], "quantize", self.weights, "q.bin",
                     "--force", preexec_fn=lambda: ignore_file_limit(size))
            self.assertEqual(read(self.path("q.bin")), b"precious")

    def test_a_pipe_is_written_to(self):
        self.good("quantize", self.weights, "q.bin", "--type", "q8_0")
        os.mkfifo(self.path("pipe"))
        p = self.start("quantize", self.weights, "pipe", "--type", "q8_0")
        with open(self.path("pipe"), "rb") as pipe:
            self.assertEqual(pipe.read(), read(self.path("q.bin")))
        self.assertEqual(self.finish(p), (0, b"", ""))
        self.assertTrue(stat.S_ISFIFO(os.stat(self.path("pipe")).st_mode))


# ---- wrong usage ---------------------------------------------------------------------------------

# Of the small model: 64 wide everywhere.
ADAPTED = ["self_attn.%s_proj" % name for name in "qkvo"] + ["mlp.gate_proj", "mlp.down_proj"]


def lora_folder(folder, rank=2, alpha=4, width=64, seed=5):
    """Adapters as PEFT saves them, on both layers of the small model; its path."""
    rng = random.Random(seed)
    os.mkdir(folder)
    header, data = {}, b""
    for layer in range(2):
        for matrix in ADAPTED:
            for half, shape in (("A", [rank, width]), ("B", [width, rank])):
                bytes_ = struct.pack("<%df" % (rank * width),
                                     *[rng.uniform(-0.3, 0.3) for _ in range(rank * width)])
                name = "base_model.model.model.layers.%d.%s.lora_%s.weight" % (layer, matrix, half)
                header[name] = {"dtype": "F32", "shape": shape,
                                "data_offsets": [len(data), len(data) + len(bytes_)]}
                data += bytes_
    text = json.dumps(header).encode()
    write(os.path.join(folder, "adapter_model.safetensors"),
          struct.pack("<Q", len(text)) + text + data)
    write(os.path.join(folder, "adapter_config.json"),
          json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}).encode())
    return folder


class Adapters(Case):
    """--lora and merge."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.lora = os.path.join(cls.shared, "style.adapters")
        cls.convert(cls.lora, "--lora", lora_folder(os.path.join(cls.shared, "lora")), "--name",
                    "a style")

    def answer(self, *args):
        return json.loads(self.good(*args, self.images[0], "--json", "--force", "-j1", "-o", "a.png"))

    def test_merged_is_applied(self):
        """What --lora computes is what the merged file does, and not what the model does."""
        self.assertEqual(self.lines("merge", self.weights, self.lora, "-o", "m.bin"), ["m.bin"])
        plain, lora = self.answer(self.weights), self.answer(self.weights, "--lora", self.lora)
        merged = self.answer("m.bin")
        self.assertEqual(lora["candidates"], merged["candidates"])
        self.assertNotEqual(lora["candidates"][0]["ids"], plain["candidates"][0]["ids"])
        size = os.path.getsize(self.lora)
        self.assertIn(") + a style (%d bytes), seed 1" % size, lora["parameters"])
        self.assertIn("lvm + a style (", merged["parameters"])
        self.put("set.jsonl", json.dumps({"input": [self.images[0]],
                                          "target": [self.images[1]]}).encode())
        for command in (["eval", "W", "set.jsonl"], ["rank", "W", self.images[0], "--", self.images[1],
                                                     self.images[2]]):
            def run(weights, *more):
                words = [weights if w == "W" else w for w in command]
                return self.good(*words[:2], "-j1", *more, *words[2:])
            self.assertEqual(run("m.bin"), run(self.weights, "--lora", self.lora))
            self.assertNotEqual(run("m.bin"), run(self.weights))

    def test_batch(self):
        self.put("set.jsonl", json.dumps({"input": [self.images[0]], "output": "b.png"}).encode())
        self.good("merge", self.weights, self.lora, "-o", "m.bin")
        made = []
        for args in (["m.bin"], [self.weights, "--lora", self.lora], [self.weights]):
            self.good("batch", args[0], "set.jsonl", *args[1:], "-j1", "--quiet")
            made.append(pixels(read(self.path("b.png"))))
            os.remove(self.path("b.png"))
        self.assertEqual(made[0], made[1])
        self.assertNotEqual(made[0], made[2])

    def test_info(self):
        text = self.good("info", self.lora).decode()
        self.assertIn("adapters      LoRA on 12 matrices, rank 2, alpha 4;", text)
        self.assertIn("name          a style\n", text)
        text = self.good("info", self.lora, "--tensors").decode()
        self.assertRegex(text, r"(?m)^blk\.1\.attn_q\.weight\.lora_a +f32 +2 64$")
        shutil.copy(self.lora, self.path("cut.bin"))
        with open(self.path("cut.bin"), "r+b") as f:
            f.truncate(os.path.getsize(self.lora) - 100)
        self.bad(1, "cut.bin: tensor", "info", "cut.bin")

    def test_cache(self):
        """What was computed without adapters is not taken for what they would have given."""
        args = (self.images[0], self.images[1], "--cache", "c", "-j1", "--force")
        self.good(self.weights, *args, "-o", "a.png")
        code, _, err = self.run_lvm(self.weights, *args, "--lora", self.lora, "-o", "a.png")
        self.assertEqual(code, 0)
        self.assertIn("c: belongs to other weights; it is made anew", err)
        with_cache = read(self.path("a.png"))
        self.good(self.weights, self.images[0], self.images[1], "--lora", self.lora, "-j1", "-o", "b.png")
        self.assertEqual(with_cache, read(self.path("b.png")))

    def test_refusals(self):
        p = self.images[0]
        self.bad(1, "holds adapters, no model", self.lora, p)
        self.bad(1, "both.bin: holds no adapters", self.weights, p, "--lora", self.weights)
        self.bad(1, "none.bin", self.weights, p, "--lora", "none.bin")
        self.bad(2, "belongs to predict, rank, eval, batch", "encode", self.weights, p, "--lora",
                 self.lora)
        shutil.copy(self.lora, self.path("l.png"))
        self.bad(1, ["l.png", "is --lora too"], self.weights, p, "--lora", "l.png", "-o", "l.png",
                 "--force")
        self.convert(self.path("wide.bin"), "--lora", lora_folder(self.path("wide"), width=96))
        self.bad(1, "wide.bin: is for blk.0.attn_q.weight of 96 x 96; in %s it is 64 x 64"
                 % self.weights, self.weights, p, "--lora", "wide.bin")

    def test_merge(self):
        self.bad(2, "help merge", "merge", self.weights, self.lora)
        self.bad(2, "help merge", "merge", self.weights, "-o", "m.bin")
        self.bad(1, "holds adapters, no model", "merge", self.lora, self.weights, "-o", "m.bin")
        self.put("m.bin", b"precious")
        self.bad(1, ["m.bin", "exists", "--force"], "merge", self.weights, self.lora, "-o", "m.bin")
        for size in (0, 5000, 300000):
            self.bad(1, ["m.bin", "cannot be written"], "merge", self.weights, self.lora, "-o", "m.bin",
                     "--force", preexec_fn=lambda: ignore_file_limit(size))
        self.assertEqual(read(self.path("m.bin")), b"precious")
        self.good("merge", self.weights, self.lora, "-o", "m.bin", "--force")
        shutil.copy(self.lora, self.path("l.bin"))
        for name in ("m.bin", "l.bin"):
            self.bad(1, [name, "input"], "merge", "m.bin", "l.bin", "-o", name, "--force")
        self.bad(2, "/dev/stdout", "merge", self.weights, self.lora, "-o", "-")
        for kind in ("q8_0", "q4_0", "bf16", "f32"):
            self.good("merge", self.weights, self.lora, "-o", "t.bin", "--type", kind, "--force")
            self.assertRegex(self.good("info", "t.bin", "--tensors").decode(),
                             r"(?m)^blk\.0\.attn_q\.weight +%s " % kind)


class Usage(Case):
    def test_missing_words(self):
        self.bad(2, "no such command or file: frobnicate", "frobnicate")
        self.bad(2, ["WEIGHTS", "IMAGE"], self.weights)
        self.bad(2, ["WEIGHTS", "IMAGE"], "predict")
        self.bad(2, "help encode", "encode", self.weights)
        self.bad(2, "help decode", "decode", self.weights)
        self.bad(2, "help decode", "decode", self.weights, "a", "b")
        self.bad(2, "help info", "info")
        self.bad(2, "help info", "info", self.weights, "more")

    def test_unknown_options(self):
        p = self.images[0]
        for args, word in (((self.weights, p, "--nope"), "--nope"), ((self.weights, p, "-x"), "-x"),
                           ((self.weights, p, "--greedyx"), "--greedyx"),
                           ((self.weights, p, "--gree"), "--gree"),
                           ((self.weights, p, "---"), "---"),
                           ((self.weights, p, "--type", "f16"), "--type"),
                           ((self.weights, p, "--" + 200 * "seed" + "=1"), "--" + 200 * "seed" + " ("),
                           (("encode", self.weights, p, "--greedy"), "--greedy"),
                           (("decode", self.weights, p, "-n", "2"), "-n"),
                           (("info", self.weights, "--force"), "--force"),
                           (("info", self.weights, "-o", "x"), "-o"),
                           (("quantize", self.weights, "x.bin", "-j", "2"), "-j"),
                           (("help", "--nope"), "--nope")):
            self.bad(2, ["no such option: " + word], *args)

    def test_values(self):
        wrong = {
            "-n": ("0", "-1", "99999", "1.5", "two", "", "99999999999999999999", "0x"),
            "-c": ("0", "65", "-3", "x", "1e1"),
            "-t": ("0", "-1", "101", "nan", "inf", "hot", "", "1,5"),
            "-p": ("0", "1.01", "-0.5", "nan", "all"),
            "-k": ("-1", "1048577", "many", "2.5"),
            "-s": ("-1", "18446744073709551616", "1.5", "", "seed", "+1", " 1"),
            "-j": ("0", "1025", "-2", "all", ""),
            "--kv": ("q4_0", "bf16", "f64", "", "F16"),
            "--images": ("0",), "--candidates": ("0",), "--temperature": ("0",), "--top-p": ("2",),
            "--top-k": ("-1",), "--seed": ("x",), "--threads": ("0",)}
        for option, values in wrong.items():
            for value in values:
                args = [self.weights, self.images[0], option, value]
                if option.startswith("--"):
                    self.bad(2, [option], *(args[:2] + [option + "=" + value]))
                self.bad(2, [option, '"%s"' % value if option != "--kv" else option], *args)
        for option, value in (("--type", "q9"), ("--vq-type", "f64"), ("--vq-type", "")):
            self.bad(2, [option, value], "quantize", self.weights, "x.bin", option, value)

    def test_limits_work(self):
        for args in (("-t", "0.001"), ("-t", "100"), ("-p", "1"), ("-p", "0.000001"),
                     ("-k", "1048576"), ("-k", "1"), ("-c", "64"), ("-n", "30")):
            self.lines(self.weights, self.images[0], "-j", "1", *args)
        self.good("encode", self.weights, self.images[0], "-j", "64")

    def test_values_missing_or_too_many(self):
        for option in ("-o", "-n", "-c", "-t", "-p", "-k", "-s", "-j", "--kv", "--output"):
            self.bad(2, [option, "needs a value"], self.weights, self.images[0], option)
        for option in ("--greedy=1", "--quiet=0", "--exact=", "-qq", "--no-mmap=yes"):
            self.bad(2, [option, "takes no value"], self.weights, self.images[0], option)


# ---- help, mistakes and the bar --------------------------------------------------------------------

COMMANDS = ("predict", "encode", "decode", "rank", "eval", "batch", "bench", "info", "quantize", "pack",
            "unpack", "merge", "train", "plot", "sentences", "score", "help", "version")


class Help(Case):
    def table(self):
        """Names and arguments of the options as lvm.c's table has them, by its first command."""
        source = read(os.path.join(TOP, "lvm.c")).decode()
        source = source[source.index("option_table[] = {"):source.index("N_OPTIONS =")]
        rows = re.findall(r'\{(0|\'.\'), "([a-z0-9-]+)", (NULL|"[^"]*"), ([A-Z |]+),', source)
        self.assertGreater(len(rows), 30)
        return rows

    def test_asked_for_anywhere(self):
        p = self.images[0]
        for command in COMMANDS:
            text = self.good("help", command)
            self.assertTrue(text.startswith(b"lvm "), command)
            self.assertEqual(self.good("version", "--help"), self.good("help", "version"))
            for args in (("--help",), ("-h",), (self.weights, p, "--help"), ("-j", "2", "-h"),
                         ("--nope", "-h"), ("-n", "0", "--help"), ("nowhere.bin", "--help", p)):
                self.assertEqual(self.good(command, *args), text, args)
            self.assertEqual(self.good("-j", "2", "--greedy", command, "--help"), text)
        for args in (("-h",), ("--help",), (self.weights, p, "--help"), ("-j", "2", "--help")):
            self.assertEqual(self.good(*args), self.good("help"), args)
        self.lines("encode", self.weights, p, "-o", "--help")       # a value, and behind -- a name
        self.assertEqual(sorted(os.listdir(self.folder)), ["--help"])
        self.bad(1, "-h", "encode", self.weights, "--", "-h")

    def test_columns(self):
        """Everything fits 79 columns, every option stands there whole, every command has an example."""
        letters = {"PREDICT": "predict", "SAMPLES": "predict batch", "BENCH": "bench", "HELP": "help",
                   "READS": "predict rank eval batch", "INFO": "info", "QUANTIZE": "quantize",
                   "RUNS": "predict rank eval batch encode decode", "ENCODE": "encode",
                   "DECODE": "decode", "RANK": "rank", "EVAL": "eval", "BATCH": "batch", "PACK": "pack",
                   "UNPACK": "unpack", "MERGE": "merge", "TRAIN": "train", "PLOT": "plot",
                   "SENTENCES": "sentences", "SCORE": "score"}
        texts = {command: self.good("help", command).decode() for command in COMMANDS}
        for name, text in list(texts.items()) + [("", self.good("help").decode())]:
            for line in text.splitlines():
                self.assertLess(len(line), 80, line)
            self.assertTrue(text.isascii(), name)
            self.assertRegex(text, r"(?m)^ +lvm .*" + name.replace("predict", "weights.bin"))
        for letter, name, argument, commands in self.table():
            shown = "--%s %s" % (name, "" if argument == "NULL" else argument.strip('"'))
            shown = ("" if letter == "0" else "-%s, " % letter[1]) + shown.strip()
            for command in " ".join(letters[c.strip()] for c in commands.split("|")).split():
                self.assertIn(" %s " % shown, texts[command].replace("\n", " "), command)

    def test_manual_page(self):
        page = self.good("help", "--man")
        for part in ("NAME", "SYNOPSIS", "COMMANDS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES",
                     "SEE ALSO"):
            self.assertIn(b"\n.SH %s\n" % part.encode(), page)
        for word in (b"LVM_ISA", b"LVM_DEVICE", b"COLUMNS", b"130", b"weights.bin"):
            self.assertIn(word, page[page.index(b".SH EXIT STATUS"):])
        for _, name, _, _ in self.table():
            self.assertIn(b"\\-\\-" + name.replace("-", "\\-").encode(), page)
        for line in page.decode("ascii").splitlines():
            self.assertFalse(line.endswith(" ") or line == "", line)
            self.assertRegex(line, r"^[^.']|^\.(TH|SH|SS|TP|PP|B|I|br|nf|fi|RS|RE|nh|ad)\b")

    def test_manual_page_as_it_is_shown(self):
        page, ran = self.put("lvm.1", self.good("help", "--man")), 0
        for command in (["groff", "-man", "-Tutf8", "-ww", "-rLL=80n", page], ["mandoc", "-Tlint", page],
                        ["mandoc", "-Tutf8", "-O", "width=80", page]):
            if shutil.which(command[0]) is None:
                continue
            shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual((shown.returncode, shown.stderr), (0, b""), shown.stdout[:2000])
            text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", shown.stdout.decode())
            if command[1] == "-Tlint":
                self.assertEqual(text, "")
                continue
            for line in text.splitlines():
                self.assertLess(len(line), 81, line)
            for example in ("lvm rank weights.bin puzzle/ -- a.png b.png c.png", '"answer": 1}'):
                self.assertIn(example, text)
            ran += 1
        if ran == 0:
            self.skipTest("neither groff nor mandoc is here")

    def test_commit(self):
        """make tells the program its commit, where there is one, and needs no git to build."""
        for name in ("Makefile", "lvm.c"):
            shutil.copy(os.path.join(TOP, name), self.folder)
        env = dict(os.environ, HOME=self.folder, GIT_CEILING_DIRECTORIES=self.shared)

        def told(target):
            out = subprocess.run(["make", "-n", "-W", "lvm.c", target], cwd=self.folder, env=env, check=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual(out.stderr, b"")
            return re.findall(rb'-DLVM_COMMIT=\\"([^"]*)\\"', out.stdout)

        def git(*args):
            who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
            return subprocess.run(["git"] + who + list(args), cwd=self.folder, env=env, check=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout.strip()

        self.assertEqual(told("lvm"), [])
        if shutil.which("git") is None:
            self.skipTest("git is not here")
        git("init")
        git("add", "lvm.c")
        git("commit", "-m", "a")
        commit = git("rev-parse", "--short", "HEAD")
        for target in ("lvm", "lvm-static", "lvm.exe"):
            self.assertEqual(told(target), [commit])
        with open(self.path("lvm.c"), "a") as f:
            f.write("\n")
        self.assertEqual(told("lvm"), [commit + b"-dirty"])
        os.utime(self.put("lvm", b""))
        out = subprocess.run(["make", "lvm"], cwd=self.folder, env=env, check=True, stdout=subprocess.PIPE)
        self.assertIn(b"up to date", out.stdout)

    def test_commit_is_shown(self):
        if SANITIZED:
            self.skipTest("builds a program of its own")
        program = self.path("other")
        subprocess.run([os.environ.get("CC", "cc"), "-std=c11", "-O0", "-ffp-contract=off",
                        '-DLVM_COMMIT="abc-dirty"', "-o", program, os.path.join(TOP, "lvm.c"), "-lm",
                        "-lpthread"], check=True)
        out = subprocess.run([program, "--version"], check=True, stdout=subprocess.PIPE).stdout
        self.assertRegex(out, rb"\Alvm [\d.]+ \(abc-dirty, ")


class Mistakes(Case):
    def test_commands(self):
        for word, meant in (("generate", "did you mean predict?"), ("run", "did you mean predict?"),
                            ("infer", "did you mean predict?"), ("tokenize", "did you mean encode?"),
                            ("detokenize", "did you mean decode?"), ("evaluate", "did you mean eval?"),
                            ("serve", "no server"), ("convert", "convert.py"), ("finetune", "did you mean train?"),
                            ("predcit", "did you mean predict?"), ("Encode", "did you mean encode?"),
                            ("decoed", "did you mean decode?"), ("quant", "did you mean quantize?"),
                            ("quantise", "did you mean quantize?"), ("benchmark", "did you mean bench?"),
                            ("rnak", "did you mean rank?"), ("hlep", "did you mean help?")):
            for args in ((word,), (word, self.weights, self.images[0]), ("-j", "1", word, "x"),
                         (word, "--nope"), ("help", word)):
                self.bad(2, ["no such command: " + word + " (", meant], *args)
        for word in ("frobnicate", "x", "weights", 300 * "w"):
            for args in ((word,), (word, "a.png", "--greedy"), ("help", word)):
                self.bad(2, ["no such command or file: " + word, "lvm help"], *args)
        self.bad(1, "nowhere.bin", "nowhere.bin", self.images[0])
        self.bad(2, "one command at a time", "help", "rank", "eval")
        shutil.copy(self.weights, self.path("generate"))             # a file is a file
        self.assertEqual(self.lines("generate", self.images[0]), ["out.png"])

    def test_options(self):
        for option, meant in (("--sead", "seed"), ("--Seed=5", "seed"), ("--top_p", "top-p"),
                              ("--temp", "temperature"), ("--tempreature=1", "temperature"),
                              ("--gredy", "greedy"), ("--jobs", "threads"), ("--outfile", "output"),
                              ("--samples", "candidates"), ("--hlep", "help"), ("--vresion", "version"),
                              ("-seed", "seed"), ("-kv", "kv")):
            name = option.split("=")[0]
            self.bad(2, "no such option: %s (did you mean --%s?)" % (name, meant),
                     self.weights, self.images[0], option, "5")
        for args, owners in ((("encode", "--json"), "--json belongs to predict, rank, eval, batch, bench, score)"),
                             (("--tensors",), "--tensors belongs to info)"),
                             (("info", "-j2"), "-j belongs to predict, encode, decode, rank, eval, batch, bench, train, sentences)"),
                             (("help", "--type=q8_0"), "--type belongs to bench, quantize, merge, train)")):
            self.bad(2, ["no such option: ", owners], *args)
        for option in ("---", "-x", "--y", "--frobnicate"):
            self.bad(2, ["no such option: " + option, "(lvm help predict lists them)"], self.weights, option)
        self.bad(2, "-o: needs a value, and --greedy is an option", self.weights, self.images[0], "-o", "--greedy")

    def test_options_in_front(self):
        once = self.good("encode", self.weights, self.images[0], "--fit", "crop")
        for args in (("-j", "2", "encode", self.weights, self.images[0], "--fit", "crop"),
                     ("--fit", "crop", "-j1", "encode", self.weights, self.images[0]),
                     ("--fit=crop", "--exact", "encode", "-q", self.weights, self.images[0])):
            self.assertEqual(self.good(*args), once)
        for args in (("-j", "2", "predict", self.weights), ("--greedy", self.weights),
                     ("-o", "out.png", "predict", "-q", self.weights), ("-o", "out.png", self.weights)):
            self.assertEqual(self.lines(*args, self.images[0]), ["out.png"])
        self.bad(2, "-n", "-n", "0", "predict", self.weights, self.images[0])
        self.bad(2, "needs a value", "-j")

    def test_forms_and_repeats(self):
        want = self.predict(self.images[0], "-s", "5")
        self.assertNotEqual(self.predict(self.images[0], "-s", "6"), want)
        for args in (("-s5",), ("--seed=5",), ("--seed", "5"), ("-s", "6", "-s", "5"),
                     ("--seed=7", "-s6", "--seed", "5")):
            self.assertEqual(self.predict(self.images[0], *args), want, args)

    def test_order(self):
        p, tokens = self.images[0], self.put("t.txt", b"1 2 3")
        os.mkdir(self.path("folder"))
        for args in ((p, self.weights), ("predict", p, p, self.weights), ("encode", p, self.weights),
                     ("decode", tokens, self.weights), ("rank", p, self.weights, "--", p),
                     ("eval", tokens, self.weights), ("batch", tokens, self.weights),
                     ("folder", self.weights), ("nowhere.png", self.weights)):
            self.bad(2, ["the weights come first, before ", self.weights], *args)
        os.mkfifo(self.path("fifo"))
        self.bad(2, "the weights come first", p, "fifo", self.weights)   # is not opened to find out
        self.bad(2, "--json: options stand before --", "rank", self.weights, p, "--", p, "--json")
        self.bad(2, "-j2: options stand before --", "rank", self.weights, p, "--", "-j2", p)
        shutil.copy(p, self.path("-q"))
        self.good("encode", self.weights, "--", "-q")


# ---- files that are not what they should be ------------------------------------------------------

class Pack(Case):
    """.tok files: what pack writes, read by chapter 8's drawing; what unpack gives back; bad lines."""

    def parts(self, data):
        """Sentences, their weights (or None) and image_tokens of a .tok file."""
        self.assertEqual(data[:12] + data[-8:], b"LVM.tok\n\1\0\0\0LVM.tok\n")
        sentences, n, bound, image, flags = struct.unpack("<QQIII", data[-64:-36])
        ids = struct.unpack("<%dH" % n, data[64:64 + 2 * n])
        at = (64 + 2 * n + 63) // 64 * 64
        weights = data[at:at + n] if flags else None
        at += (n + 63) // 64 * 64 if flags else 0
        starts = struct.unpack("<%dQ" % (sentences + 1), data[at:at + 8 * sentences + 8])
        self.assertEqual(len(data), (at + 8 * sentences + 8 + 63) // 64 * 64 + 64)
        self.assertEqual((starts[0], starts[-1], bound), (0, n, max(ids) + 1))
        cut = [slice(a, b) for a, b in zip(starts, starts[1:])]
        return [list(ids[c]) for c in cut], weights and [list(weights[c]) for c in cut], image

    def pack(self, text, *args, words=(), **how):
        self.put("in.jsonl", text.encode())
        code, out, err = self.run_lvm("pack", "in.jsonl", "-o", "out.tok", *args, **how)
        self.assertEqual((code, out), (0, b"out.tok\n"), err)
        self.assertRegex(err, r"\Alvm: note: out.tok: \d+ sentences, \d+ tokens[^\n]*\n\Z")
        for word in words:
            self.assertIn(word, err)
        return self.parts(read(self.path("out.tok")))

    def b64(self, ids):
        return base64.b64encode(struct.pack("<%di" % len(ids), *ids)).decode()

    def test_forms(self):
        rng = random.Random(3)
        want = [[rng.randrange(8192) for _ in range(256 * n)] for n in (1, 3, 2, 1, 2)]
        nested = [want[4][:256], want[4][256:]]
        text = "\ufeff" + "\n".join((
            json.dumps({"tokens": want[0]}), json.dumps({"tokens": self.b64(want[1])}), "  ",
            json.dumps({"id": {"a": [1]}, "tokens": [8192] + want[2] + [8193]}) + "\r",
            json.dumps({"tokens": self.b64([8192] + want[3] + [8193]).replace("/", "\\/")}).replace("\\\\", "\\"),
            json.dumps({"input_tokens": nested[0], "output": [nested[1]], "weights": None})))
        self.assertEqual(self.pack(text, words=["5 sentences, 2304 tokens, 9 images of 256"]), (want, None, 256))
        self.put("b.jsonl", b'{"tokens": [1]}\n')
        code, out, err = self.run_lvm("pack", "in.jsonl", "-", "b.jsonl", "-o", "all.tok", "-q",
                                      data=b'{"tokens": [7, 8]}')
        self.assertEqual((code, out, err), (0, b"all.tok\n", ""))
        self.assertEqual(self.parts(read(self.path("all.tok"))), (want + [[7, 8], [1]], None, 0))

    def test_weights(self):
        lines = ('{"input": [1, 2], "target": [[3], [4]]}\n{"input_tokens": [], "target_tokens": [5]}\n',
                 '{"weights": [9, 0, 255, 9], "tokens": [8192, 6, 7, 8193]}\n',
                 '{"input": [1], "output": [2], "weights": "AQI="}\n')
        ids = [[1, 2, 3, 4], [5], [6, 7], [1, 2]]
        self.assertEqual(self.pack(lines[0]), (ids[:2], None, 0))
        self.assertEqual(self.pack("".join(lines)), (ids, [[16] * 4, [16], [0, 255], [1, 2]], 0))
        self.assertEqual(self.pack("".join(lines), "--loss", "answers"),
                         (ids, [[0, 0, 16, 16], [16], [0, 255], [1, 2]], 0))
        self.put("in.jsonl", b'{"tokens": [1]}\n')
        self.bad(1, ["in.jsonl: line 1: --loss answers takes lines with"], "pack", "in.jsonl", "-o", "x.tok",
                 "--loss", "answers")

    def test_special_ids(self):
        line = json.dumps({"tokens": [8192, 1, 9, 8193]})
        self.assertEqual(self.pack(line)[0], [[1, 9]])
        self.assertEqual(self.pack(line, "--bos", "none")[0], [[8192, 1, 9]])
        self.assertEqual(self.pack(line, "--bos", "none", "--eos=none")[0], [[8192, 1, 9, 8193]])
        self.assertEqual(self.pack('{"tokens": [50, 9, 51]}', "--bos", "50", "--eos", "51")[0], [[9]])
        self.assertEqual(self.pack('{"tokens": [9, 65535]}')[0], [[9, 65535]])
        for option in ("--bos", "--eos"):
            for value in ("", "x", "-1", "1.5", "99999999999", "8192x"):
                self.bad(2, [option, "no id and not none"], "pack", "in.jsonl", "-o", "x.tok", option, value)

    def test_image_tokens(self):
        for lines, want in (([(512, None), (256, None)], 256), ([(512, None), (255, None)], 0),
                            ([(512, 0), (256, 0)], 0), ([(128, 64), (64, None)], 64),
                            ([(512, None), (256, 128)], 128)):
            text = "\n".join(json.dumps(dict({"tokens": [1] * n}, **({} if t is None else {"image_tokens": t})))
                             for n, t in lines)
            self.assertEqual(self.pack(text)[2], want)
        for text, words in (('{"tokens": [1, 2, 3], "image_tokens": 2}', "line 1: 3 tokens are no whole images of 2"),
                            ('{"tokens": [1, 2], "image_tokens": 2}\n{"tokens": [1], "image_tokens": 1}',
                             'line 2: "image_tokens" is 1, but 2 in a line above'),
                            ('{"tokens": [1, 2]}\n{"tokens": [1, 2, 3], "image_tokens": 3}', "no multiple")):
            self.put("in.jsonl", text.encode())
            self.bad(1, words, "pack", "in.jsonl", "-o", "x.tok")

    def test_round_trip(self):
        """pack(unpack(x)) is x, byte for byte."""
        rng = random.Random(4)
        for k in range(12):
            size = (256, 256, 64, 1)[k % 4]
            lines = []
            for _ in range(rng.randrange(1, 20)):
                n = size * rng.randrange(1, 4) + (1 if k == 1 else 0)
                line = {"tokens": [rng.randrange(8192) for _ in range(n)]}
                if k % 3 == 0:
                    line["weights"] = [rng.randrange(256) for _ in range(n)]
                if k % 4 == 2:
                    line["image_tokens"] = 64
                lines.append(json.dumps(line))
            parts = self.pack("\n".join(lines))
            tok = read(self.path("out.tok"))
            for options in ((), ("--integers",)):
                code, out, err = self.run_lvm("unpack", "out.tok", "-o", "back.jsonl", *options)
                self.assertEqual((code, out), (0, b"back.jsonl\n"), err)
                text = read(self.path("back.jsonl"))
                self.assertEqual(self.good("unpack", "out.tok", *options), text)
                for line, ids in zip(text.splitlines(), parts[0]):
                    got = json.loads(line)["tokens"]
                    if not options:
                        got = list(struct.unpack("<%di" % len(ids), base64.b64decode(got, validate=True)))
                    self.assertEqual(got, ids)
                self.good("pack", "-q", "back.jsonl", "-o", "again.tok")
                self.assertEqual(read(self.path("again.tok")), tok)
        self.assertEqual(self.good("pack", "-", "-q", "-o", "-", data=text), tok)

    def test_bad_lines(self):
        for line, words in (
                ('{"tokens": [1, 65536]}', ["an id is no image token", "at byte 16"]),
                ('{"tokens": [1, -1]}', ["an id is no image token", "at byte 16"]),
                ('{"tokens": [1, 1.5]}', ["an id is no image token", "at byte 16"]),
                ('{"tokens": "AAAAAAAAAAAAAAEA"}', ["an id is no image token", "at byte 23"]),
                ('{"tokens": "AAAA"}', ["no base64 of whole int32"]), ('{"tokens": "A?=="}', ["no base64"]),
                ('{"tokens": "AAAAAA==="}', ["no base64"]), ('{"tokens": 5}', ["an array of ids or base64"]),
                ('{"tokens": [[[1]]]}', ["an id should stand here"]), ('{"tokens": [1,]}', ["comma"]),
                ('{"tokens": [true]}', ["an id should stand here"]), ('{"tokens": [1', ["lacks", "end of the line"]),
                ('{"input": "a.png", "output": "b.png"}', ["base64"]),
                ('{"input": ["a.png"], "output": ["b.png"]}', ["a picture's name", "lvm encode"]),
                ('{"tokens": [], "x": 1}', ["a sentence without tokens"]),
                ('{"tokens": [8192, 8193]}', ["a sentence without tokens"]),
                ('{"tokens": [8193]}', ["a sentence without tokens"]),
                ('{"tokens": [1, 8193, 2]}', ["token 2 is eos (8193)"]),
                ('{"tokens": [8192, 8192, 2]}', ["token 2 is bos (8192)"]),
                ('{"tokens": [1], "input": [2]}', ['"tokens" and "input" say the same thing']),
                ('{"tokens": [1], "target": [2]}', ['"tokens" and "target" say the same thing']),
                ('{"tokens": [1], "tokens": [2]}', ['"tokens" and "tokens" say the same thing']),
                ('{"output": [1], "target": [2]}', ['"output" and "target" say the same thing']),
                ('{"input": [1]}', ['"input_tokens" and "output_tokens"']), ('{}', ['a line holds "tokens"']),
                ('{"tokens": null}', ['a line holds "tokens"']),
                ('{"tokens": [1], "weights": [1, 2]}', ["2 weights for 1 tokens"]),
                ('{"tokens": [1], "weights": []}', ["0 weights for 1 tokens"]),
                ('{"tokens": [1], "weights": [256]}', ["from 0 to 255"]),
                ('{"tokens": [1], "weights": "A"}', ["0 weights for 1 tokens"]),
                ('{"tokens": [1], "weights": 16}', ["weights should stand here"]),
                ('{"tokens": [1], "weight": [16]}', ['did you mean "weights"?']),
                ('{"Tokens": [1]}', ['did you mean "tokens"?']),
                ('{"tokens": [1], "image_tokens": "x"}', ['"image_tokens" is no number']),
                ("[1, 2]", ["a line is an object"]), ('{"tokens": [1]} x', ["behind the object"]),
                ('{"tokens" [1]}', ["lacks its :"])):
            self.put("in.jsonl", b'{"tokens": [3]}\n\n' + line.encode())
            self.bad(1, ["in.jsonl: line 3: "] + words, "pack", "in.jsonl", "-o", "x.tok")
        self.put("in.jsonl", b'{"tokens": [1\0]}')
        self.bad(1, ["in.jsonl: line 1: zero bytes"], "pack", "in.jsonl", "-o", "x.tok")
        self.put("in.jsonl", '{"tokens": [1]}'.encode("utf-16"))
        self.bad(1, ["in.jsonl", "UTF-16"], "pack", "in.jsonl", "-o", "x.tok")
        self.put("in.jsonl", b'{"tokens": [1], "x": "' + b"y" * (1 << 24) + b'"}')
        self.bad(1, ["in.jsonl: line 1: is longer than"], "pack", "in.jsonl", "-o", "x.tok")
        self.put("in.jsonl", b" \n\n")
        self.bad(1, ["no lines to learn from"], "pack", "in.jsonl", "-o", "x.tok")

    def test_words_and_outputs(self):
        self.put("in.jsonl", b'{"tokens": [3, 1, 2]}\n')
        self.bad(2, "lvm help pack", "pack", "in.jsonl")
        self.bad(2, "lvm help pack", "pack", "-o", "x.tok")
        self.bad(2, "lvm help unpack", "unpack")
        self.bad(2, "lvm help unpack", "unpack", "in.jsonl", "in.jsonl")
        self.bad(1, "nowhere.jsonl", "pack", "nowhere.jsonl", "-o", "x.tok")
        self.bad(1, "is a folder", "pack", ".", "-o", "x.tok")
        for name in ("in.jsonl", "./in.jsonl", os.path.join(self.folder, "in.jsonl")):
            self.bad(1, [name, "is an input too"], "pack", "in.jsonl", "-o", name)
        self.bad(1, "is an input too", "pack", "nowhere.jsonl", "in.jsonl", "-o", "in.jsonl")
        self.put("w.bin", read(self.weights))
        self.bad(1, ["w.bin", "is a weights file"], "pack", "in.jsonl", "-o", "w.bin")
        self.good("pack", "in.jsonl", "-o", "a.tok", "-q")
        self.good("pack", "a.tok", "-o", "x.tok", "-q")
        self.assertEqual(read(self.path("x.tok")), read(self.path("a.tok")))
        self.put("cut.tok", read(self.path("a.tok"))[:-9])
        self.bad(1, ["cut.tok", "its end is missing"], "pack", "cut.tok", "-o", "y.tok")
        self.bad(1, ["a.tok", "is an input too"], "unpack", "a.tok", "-o", "a.tok")
        self.bad(1, ["in.jsonl", "is no .tok file"], "unpack", "in.jsonl")
        self.bad(1, ["nowhere.tok"], "unpack", "nowhere.tok")
        self.bad(1, ["nowhere/x.tok"], "pack", "in.jsonl", "-o", "nowhere/x.tok")
        self.assertEqual(self.good("unpack", "a.tok", "--integers"),
                         b'{"tokens": [3, 1, 2], "image_tokens": 0}\n')
        good = read(self.path("a.tok"))
        self.put("bad.tok", good[:-48] + struct.pack("<I", 3) + good[-44:])
        self.bad(1, ["bad.tok: sentence 1, token 1: id 3"], "unpack", "bad.tok", "-o", "x.jsonl")
        self.put("bad.tok", good[:-1])
        self.bad(1, ["bad.tok", "end is missing"], "unpack", "bad.tok")

    def test_full_disk(self):
        lines = "".join(json.dumps({"tokens": [k] * 999}) + "\n" for k in range(200))
        self.pack(lines)
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
        ignore = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), limit())
        self.bad(1, ["x.tok", "cannot be written"], "pack", "in.jsonl", "-o", "x.tok", preexec_fn=ignore)
        self.bad(1, ["x.jsonl", "cannot be written"], "unpack", "out.tok", "-o", "x.jsonl", preexec_fn=ignore)
        if os.path.exists("/dev/full"):
            self.bad(1, "cannot be written", "pack", "in.jsonl", "-o", "/dev/full")
            self.bad(1, "cannot be written", "unpack", "out.tok", "-o", "/dev/full")


class Images(Case):
    def refuse(self, words, *images):
        self.bad(1, words, "encode", self.weights, *images)
        self.bad(1, words, self.weights, *images)

    def test_missing_empty_and_foreign(self):
        self.refuse(["none.png", "No such file"], "none.png")
        self.refuse(["none.png", "No such file"], self.images[0], "none.png", self.images[1])
        self.put("empty.png", b"")
        self.refuse(["empty.png", "empty"], "empty.png")
        self.put("text.png", b"This is only text.\n" * 9)
        self.refuse(["text.png", "no image"], "text.png")
        self.refuse(["both.bin", "no image"], self.weights)
        os.mkdir(self.path("folder"))
        self.refuse(["folder", "no images"], "folder")
        self.put("folder/bad.png", b"bad")
        self.refuse(["folder/bad.png"], "folder")
        self.refuse(["/dev/null", "regular file"], "/dev/null")
        os.symlink("loop.png", self.path("loop.png"))
        self.refuse(["loop.png", "symbolic link"], "loop.png")

    @unittest.skipIf(SANITIZED, "test_images reads them all")
    def test_vectors(self):
        """Every damaged image of tests/images, by the words that its index asks for."""
        folder, count = os.path.join(TESTS, "images"), 0
        with open(os.path.join(folder, "index.txt"), encoding="utf-8") as f:
            for line in f:
                if line.startswith("bad "):
                    _, name, _, words = line.rstrip("\n").split(" ", 3)
                    self.bad(1, [name, words], "encode", self.weights, os.path.join(folder, name))
                    count += 1
        self.assertGreater(count, 50)

    def test_jpeg(self):
        """Read by its bytes, whatever its name, also out of a folder; cut or empty ones refused."""
        with open(os.path.join(TESTS, "images", "s420_prog.jpg"), "rb") as f:
            data = f.read()
        names = ("p.jpg", "p.png", "photos/1.JPG", "photos/2.jpeg")
        os.mkdir(self.path("photos"))
        for name in names:
            self.put(name, data)
        first = self.good("encode", self.weights, names[0])
        self.assertEqual(len(first.split()), T)
        self.assertEqual(self.good("encode", self.weights, names[1]), first)
        self.assertEqual(self.good("encode", self.weights, "photos"), first * 2)
        self.put("p.jpg", data[:-2])   # all pixels
        self.assertEqual(self.good("encode", self.weights, "p.jpg"), first)
        self.put("p.jpg", data[:-40])
        self.bad(1, ["p.jpg", "cut off"], "encode", self.weights, "p.jpg")
        self.put("p.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(64))
        self.bad(1, ["p.jpg", "cut off"], "encode", self.weights, "p.jpg")

    def test_other_formats_are_named(self):
        for name, start in (("GIF", b"GIF89a"),
                            ("WebP", b"RIFF\x24\0\0\0WEBPVP8 "), ("BMP", b"BM"), ("TIFF", b"II*\0"),
                            ("HEIC", b"\0\0\0\x18ftypheic"), ("AVIF", b"\0\0\0\x1cftypavif"),
                            ("JPEG XL", b"\xff\x0a"), ("Photoshop", b"8BPS"), ("PDF", b"%PDF-1.4")):
            self.put("p.png", start + bytes(64))
            self.refuse(["p.png", name, "PNG"], "p.png")

    def test_truncated(self):
        """A file without some of its pixels is refused; one without its end is not."""
        whole = image(9, 60, 50)
        for i in range(50):
            self.put("cut.png", whole[:i * (len(whole) - 40) // 49])
            self.bad(1, "cut.png", "encode", self.weights, "cut.png")
        self.put("whole.png", whole)
        self.put("cut.png", whole[:-16])
        self.assertEqual(self.good("encode", self.weights, "cut.png"),
                         self.good("encode", self.weights, "whole.png"))

    def test_bombs(self):
        zeros = chunk(b"IDAT", zlib.compress(bytes(100000))) + chunk(b"IEND", b"")
        for w, h, words in ((16384, 16384, "cannot hold"), (20000, 20000, "pixels"),
                            (0x7fffffff, 0x7fffffff, "pixels"), (0xffffffff, 1, "pixels"),
                            (0, 5, "pixels"), (65536, 65536, "pixels"),
                            (1 << 28, 1, "cannot hold")):
            self.put("bomb.png", png_header(w, h) + zeros)
            self.bad(1, ["bomb.png", words], "encode", self.weights, "bomb.png",
                     preexec_fn=limit_memory)
        for name, size in (("more.png", 50 << 20), ("exact.png", 310)):   # the rest is not read
            self.put(name, png(10, 10, bytes(size)))
        self.assertEqual(self.good("encode", self.weights, "more.png"),
                         self.good("encode", self.weights, "exact.png"))

    def test_odd_sizes(self):
        for w, h in ((1, 1), (1, 500), (500, 1), (31, 33)):
            self.put("odd.png", image(1, w, h))
            self.assertEqual(len(self.good("encode", self.weights, "odd.png").split()), T)

    def test_exif(self):
        """A rotation is left alone with a note, or applied with --exif."""
        def rows(w, h, pixel):
            return b"".join(b"\0" + b"".join(pixel(x, y) for x in range(w)) for y in range(h))

        def pixel(x, y):
            return bytes((36 * x, 60 * y, 7 * x * y))

        flat = png(7, 5, rows(7, 5, pixel))
        tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHxxI", 1, 0x112, 3, 1, 6, 0)
        self.put("flat.png", flat)
        self.put("turned.png", flat[:33] + chunk(b"eXIf", tiff) + flat[33:])
        self.put("upright.png", png(5, 7, rows(5, 7, lambda x, y: pixel(y, 4 - x))))
        for command in (("encode", self.weights), ("predict", self.weights, "-o", "-")):
            left, right = (self.good(*command + (name,)) for name in ("flat.png", "upright.png"))
            self.assertNotEqual(left, right)
            code, out, err = self.run_lvm(*command + ("turned.png",))
            self.assertEqual((code, out), (0, left))
            self.assertRegex(err, r"\Alvm: note: turned.png: [ -~]*--exif[ -~]*\n(" + self.SAID[2:] + r")?\Z")
            self.assertEqual(self.good(*command + ("turned.png", "-q")), left)
            self.assertEqual(self.good(*command + ("turned.png", "--exif")), right)
            self.assertEqual(self.good(*command + ("upright.png", "--exif")), right)
            err = self.run_lvm(*command + ("turned.png", "flat.png", "turned.png"))[2]
            self.assertEqual(err.count("EXIF rotation"), 2)


class Tokens(Case):
    def test_bad_tokens(self):
        ids = " ".join(str(i) for i in range(T))
        for text, words in (("", ["0 token ids", "takes 64"]),
                            ("1 2 3", ["3 token ids", "takes 64"]),
                            (ids + " 7", ["65 token ids"]), (ids[:-2] + "x9", ["line 1", "x9"]),
                            (ids[:-2] + "-1", ["line 1", "-1"]), (ids + "\n\n4a", ["line 3", "4a"]),
                            (ids[:-2] + "256", ["256", "255"]), (ids + "\nx\ny", ["line 2", "x"]),
                            (ids[:-2] + "4294967296", ["4294967296"]), (ids + " \x00", ["line 1"]),
                            (ids[:-2] + "1.5", ["1.5"]), ("\x1b[2J" + ids, ["line 1"])):
            self.put("ids", text.encode())
            self.bad(1, ["ids"] + words, "decode", self.weights, "ids")
            self.bad(1, words, "decode", self.weights, "-", data=text.encode())
        self.bad(1, ["none", "No such file"], "decode", self.weights, "none")
        self.bad(1, [".", "regular file"], "decode", self.weights, ".")

    def test_random_bytes(self):
        rng = random.Random(5)
        for _ in range(20):
            self.put("ids", bytes(rng.randrange(256) for _ in range(rng.randrange(1, 600))))
            self.bad(1, "ids", "decode", self.weights, "ids")


class Weights(Case):
    def refuse(self, data, words, *options):
        self.put("w.bin", data)
        self.bad(1, ["w.bin"] + ([words] if isinstance(words, str) else words), "encode", "w.bin",
                 self.images[0], *options, preexec_fn=limit_memory)

    def changed(self, words, change):
        """change(g) spoils the small model; the message must hold words and the file's name."""
        g = Gguf(read(self.weights))
        data = change(g)
        self.refuse(data if isinstance(data, bytes) else g.bytes(), words)

    def test_info_tells_what_is_missing(self):
        g = Gguf(read(self.weights))
        names = [b"blk.0.ffn_up.weight", b"vq.quantize.embedding.weight"]
        g.tensors = [tensor for tensor in g.tensors if tensor[0] not in names]
        self.put("w.bin", g.bytes())
        code, out, err = self.run_lvm("info", "w.bin")
        self.assertEqual((code, err), (1, "lvm: w.bin: 2 tensors are missing\n"))
        self.assertEqual(re.findall(r"(?m)^missing +(.*)$", out.decode()), [n.decode() for n in names])

    def test_builder(self):
        self.assertEqual(Gguf(read(self.weights)).bytes(), read(self.weights))

    def test_missing_empty_and_foreign(self):
        for command in ("info", "encode", "predict"):
            rest = [] if command == "info" else self.images[:1]
            self.bad(1, ["none.bin", "No such file"], command, "none.bin", *rest)
            self.bad(1, [".", "regular file"], command, ".", *rest)
            self.bad(1, ["/dev/null", "regular file"], command, "/dev/null", *rest)
            self.bad(1, ["p0.png", "not a weights file"], command, self.images[0], *rest)
        for options in ((), ("--no-mmap",)):
            self.refuse(b"", "empty", *options)
            self.refuse(b"GGU", "not a weights file", *options)
            self.refuse(b"#!/bin/sh\n" * 10, "not a weights file", *options)
        self.bad(1, ["w.bin", "not a weights file"], "quantize", "w.bin", "x.bin")

    def test_truncated(self):
        whole = read(self.weights)
        head = Gguf(whole).head
        places = [0, 1, 3, 4, 5, 8, 15, 16, 23, 24]
        places += [24 + (head - 24) * i // 24 for i in range(1, 24)]
        places += [head + (len(whole) - 64 - head) * i // 16 for i in range(17)]
        self.assertEqual(len(set(places)), 50)
        for n in places:
            words = "empty" if n == 0 else "not a weights" if n < 4 else ""
            self.refuse(whole[:n], words)
            self.refuse(whole[:n], "truncated" if n > head else words, "--no-mmap")
        self.put("w.bin", whole[:-64])
        self.bad(1, "w.bin", "w.bin", self.images[0])
        self.bad(1, "w.bin", "quantize", "w.bin", "x.bin")

    def test_counts(self):
        for n in (1 << 64) - 1, 1 << 63, 1 << 32, 1 << 24, 763264 // 13:
            self.changed("claims more", lambda g: g.bytes(n_tensors=n))
            self.changed("claims more", lambda g: g.bytes(n_keys=n))
        self.changed("damaged", lambda g: g.bytes(n_keys=len(g.keys) + 1))
        self.changed("damaged", lambda g: g.bytes(n_keys=len(g.keys) - 1))
        self.changed("damaged", lambda g: g.bytes(n_tensors=len(g.tensors) + 1))
        self.changed("GGUF version 2", lambda g: b"GGUF" + u32(2) + g.bytes()[8:])
        self.changed("GGUF version", lambda g: b"GGUF" + b"\0\0\0\x03" + g.bytes()[8:])

    def test_keys(self):
        def add(kind, value, name=b"x"):
            return lambda g: g.keys.insert(0, [name, kind, value])
        damaged = "damaged or truncated at key"
        for kind in (13, 255, 0xffffffff):
            self.changed(damaged, add(kind, b""))
        for n in ((1 << 64) - 1, 1 << 63, 1 << 40):
            self.changed(damaged, add(TEXT, struct.pack("<Q", n)))
            for of in (0, 10, 12, TEXT, ARRAY):
                self.changed(damaged, add(ARRAY, struct.pack("<IQ", of, n)))
            raw = read(self.weights)
            self.refuse(raw[:24] + struct.pack("<Q", n) + raw[32:], damaged + " 1")
        self.changed(damaged, add(ARRAY, struct.pack("<IQ", 10, (1 << 61) + 1)))
        self.changed(damaged, add(ARRAY, struct.pack("<IQ", 13, 1)))
        nested = struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", 0, 0)
        self.changed(damaged, add(ARRAY, nested))
        self.changed(["lvm.vocab_size", "twice"], add(U32, u32(5), b"lvm.vocab_size"))

    def test_many_keys(self):
        """Many keys must not take a time that grows with their square."""
        n = 50000 if SANITIZED else 300000
        keys = b"".join(struct.pack("<Q", 3) + i.to_bytes(3, "little") + u32(0) + b"\0"
                        for i in range(n))
        before = processor_time()
        self.refuse(b"GGUF" + struct.pack("<IQQ", 3, 0, n) + keys, "architecture")
        self.assertLess(processor_time() - before, 2)

    def test_alignment(self):
        for kind, value in ((U32, u32(0)), (U32, u32(3)), (U32, u32(12)), (U32, u32(1 << 31)),
                            (U32, u32(0xffffffff)), (TEXT, gguf_text(b"64")), (FLOAT, f32(64)),
                            (10, struct.pack("<Q", 64))):
            self.changed("general.alignment", lambda g: g.key(b"general.alignment", kind, value))

    def test_tensors(self):
        name = b"blk.0.attn_q.weight"

        def put(index, value):
            def change(g):
                g.tensor(name)[index] = value
            return change
        shown = name.decode()
        for ne in ([], [64, 64, 1, 1, 1], [1] * 300):
            self.changed("damaged list of tensors", put(1, ne))
        for ne in ([0, 64], [64, 0], [1 << 63, 64], [1 << 32, 1 << 32], [(1 << 64) - 1],
                   [1 << 31, 1 << 31, 4, 1], [1 << 16] * 4, [1 << 21, 1 << 21, 1 << 22]):
            self.changed([shown, "impossible shape"], put(1, ne))
        for ne in ([64, 63], [64], [32, 128], [1, 64, 64]):
            self.changed([shown, "wrong shape"], put(1, ne))
        self.changed([shown, "overlaps tensor"], put(1, [64, 64, 2]))
        for ne in ([1 << 30], [64, 1 << 30], [1 << 15] * 3):
            self.changed([shown, "outside the file"], put(1, ne))
        for kind in (3, 7, 10, 29, 31, 999, 1 << 31, 0xffffffff):
            self.changed([shown, "type %d" % kind, "Q8_0"], put(2, kind))
        self.changed([shown, "blocks of 32"], lambda g: (put(2, Q8_0)(g), put(1, [33, 64])(g)))
        size = len(read(self.weights))
        for offset in ((1 << 64) - 64, (1 << 64) - 8192, 1 << 63, size // 64 * 64, size - 8000, 1,
                       32):
            self.changed([shown], put(3, offset))
        self.changed([shown, "is missing"], put(0, b"blk.0.attn_z.weight"))
        self.changed(["token_embd.weight", "twice"], put(0, b"token_embd.weight"))
        self.changed("damaged list of tensors", put(0, b"n" * 300))
        self.changed("outside the file", lambda g: setattr(g, "data", b""))

    def test_norms_must_be_f32(self):
        def change(g):
            g.tensor(b"output_norm.weight")[2] = F16
        self.changed(["output_norm.weight", "F32"], change)

    def test_architecture(self):
        def arch(value, kind=TEXT):
            return lambda g: g.key(b"general.architecture", kind, value)
        self.changed("architecture", arch(gguf_text(b"llama")))
        self.changed("architecture", arch(gguf_text(b"lvm\0")))
        self.changed("architecture", arch(u32(1), U32))
        self.changed("architecture", arch(None))
        self.changed("lvm.format_version", lambda g: g.key(b"lvm.format_version", U32, u32(2)))
        self.changed("lvm.format_version", lambda g: g.key(b"lvm.format_version", U32, None))
        self.changed("neither a transformer nor a tokenizer", lambda g: (
            g.key(b"lvm.block_count", U32, None), g.key(b"lvm.vq.resolution", U32, None)))

    def test_transformer_keys(self):
        keys = ("context_length", "embedding_length", "feed_forward_length", "vocab_size",
                "attention.head_count", "attention.head_count_kv", "block_count")
        for key in keys:
            name = "lvm." + key
            for n in (0, 0x7fffffff, 0xffffffff):
                self.changed(name, lambda g: g.key(name.encode(), U32, u32(n)))
            self.changed(name, lambda g: g.key(name.encode(), I32, struct.pack("<i", -1)))
            self.changed(name, lambda g: g.key(name.encode(), TEXT, gguf_text(b"2")))
            if key != "block_count":
                self.changed([name, "missing"], lambda g: g.key(name.encode(), U32, None))
        for key, low in (("attention.layer_norm_rms_epsilon", -1.0), ("rope.freq_base", 0.0)):
            name = "lvm." + key
            for value in (low, float("nan"), float("inf"), 1e30):
                self.changed(name, lambda g: g.key(name.encode(), FLOAT, f32(value)))
            self.changed(name, lambda g: g.key(name.encode(), U32, u32(1)))
            self.changed(name, lambda g: g.key(name.encode(), U32, None))
        shape = "wrong shape"
        for key, n, words in (("attention.head_count", 3, "heads"), ("vocab_size", 255, shape),
                              ("attention.head_count", 64, "heads"), ("block_count", 3, "missing"),
                              ("attention.head_count_kv", 1, shape), ("bos_token_id", 260, "bos"),
                              ("embedding_length", 128, shape), ("eos_token_id", 999, "eos"),
                              ("attention.head_count_kv", 3, "heads")):
            self.changed(words, lambda g: g.key(("lvm." + key).encode(), U32, u32(n)))

    def test_tokenizer_keys(self):
        def ints(*values):
            return struct.pack("<IQ", I32, len(values)) + struct.pack("<%di" % len(values), *values)
        shape = "wrong shape"
        for key, n, words in (("resolution", 0, "resolution"), ("resolution", 33, "does not halve"),
                              ("resolution", 1 << 20, "resolution"), ("hidden_channels", 48, "32"),
                              ("hidden_channels", 64, shape), ("num_res_blocks", 0, "num_res"),
                              ("num_res_blocks", 2, "missing"), ("num_res_blocks", 99, "num_res"),
                              ("z_channels", 0, "z_channels"), ("z_channels", 17, shape),
                              ("num_embeddings", 257, shape), ("no_attn_mid_block", 2, "no_attn"),
                              ("quantized_embed_dim", 8, shape),
                              ("resample_with_conv", 1, "missing"),
                              ("resample_with_conv", 5, "resample")):
            self.changed(words, lambda g: g.key(("lvm.vq." + key).encode(), U32, u32(n)))
        mult = b"lvm.vq.channel_mult"
        text = struct.pack("<IQ", TEXT, 1) + gguf_text(b"1")
        for value, words in ((ints(), "halve"), (ints(*[1] * 9), "9 entries"),
                             (ints(0, 1, 1), "holds 0; each must be a whole number from 1 to 64"),
                             (ints(1, -1, 1), "holds -1"), (ints(1, 1, 1 << 30), "channel_mult"),
                             (ints(1, 2, 1), "wrong shape"), (ints(*[1] * 8), "halve"),
                             (text, "no array of integers")):
            self.changed(words, lambda g: g.key(mult, ARRAY, value))
        self.changed("channel_mult", lambda g: g.key(mult, U32, u32(1)))
        self.changed("channel_mult", lambda g: g.key(mult, U32, None))
        attn = b"lvm.vq.attn_resolutions"
        self.changed("17 entries", lambda g: g.key(attn, ARRAY, ints(*[8] * 17)))

    def test_context_of_a_million(self):
        """The context's length alone explains no memory that is never used: 512 MiB of cache here."""
        g = Gguf(read(self.weights))
        g.key(b"lvm.context_length", U32, u32(1 << 20))
        self.put("w.bin", g.bytes())
        self.lines("w.bin", self.images[0], "-j", "1", preexec_fn=lambda: limit_memory(256 << 20))

    def test_contexts_too_short(self):
        """A prompt's image and its answer take 128 tokens."""
        for n in (1, 63, 64, 127, 128):
            g = Gguf(read(self.weights))
            g.key(b"lvm.context_length", U32, u32(n))
            self.put("w.bin", g.bytes())
            if n < 128:
                self.bad(1, ["w.bin", "context of %d tokens holds no prompt image" % n], "w.bin",
                         self.images[0])
            else:
                self.assertEqual(self.lines("w.bin", self.images[0]), ["out.png"])

    def test_flipped_bits(self):
        rng, whole = random.Random(11), read(self.weights)
        head = Gguf(whole).head
        for i in range(60 if SANITIZED else 300):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(head)] ^= 1 << rng.randrange(8)
            self.put("w.bin", bytes(data))
            code, out, err = self.run_lvm("info", "w.bin", "--tensors", preexec_fn=limit_memory)
            self.assertIn(code, (0, 1), "flip %d: %s" % (i, err))
            if code == 1:
                self.assertIn("w.bin", err)

    def test_any_numbers_as_weights(self):
        """NaN, infinity and noise in every tensor: some image or an error, never a crash."""
        rng, whole = random.Random(3), read(self.weights)
        start = (Gguf(whole).head + 63) // 64 * 64
        n = len(whole) - start
        noise = bytes(rng.getrandbits(8) for _ in range(n))
        for fill in (b"\xff" * n, b"\0" * n, b"\x7f\x80" * (n // 2), noise):
            self.put("w.bin", whole[:start] + fill)
            for args in ((), ("--greedy",), ("--kv", "q8_0"), ("-k", "5", "-c", "2")):
                code, _, err = self.run_lvm("w.bin", self.images[0], "-j", "1", *args)
                self.assertIn(code, (0, 1), err)


# ---- outputs -------------------------------------------------------------------------------------

class Outputs(Case):
    def test_an_output_that_is_an_input(self):
        shutil.copy(self.weights, self.path("w.bin"))
        shutil.copy(self.images[0], self.path("a.png"))
        os.link(self.path("a.png"), self.path("hard.png"))
        before = read(self.path("a.png"))
        for name in ("a.png", "./a.png", "hard.png"):
            self.bad(1, [name, "input"], "w.bin", "a.png", "-o", name)
            self.bad(1, [name, "input"], "encode", "w.bin", "a.png", "-o", name)
        self.bad(2, ["w.bin", "PNG"], "w.bin", "a.png", "-o", "w.bin")
        self.bad(1, ["w.bin", "weights"], "encode", "w.bin", "a.png", "-o", "w.bin")
        os.link(self.path("w.bin"), self.path("w.png"))
        self.bad(1, ["w.png", "weights"], "w.bin", "a.png", "-o", "w.png")
        self.put("ids.png", self.good("encode", "w.bin", "a.png"))
        self.bad(1, ["ids.png", "input"], "decode", "w.bin", "ids.png", "-o", "ids")
        shutil.copy(self.images[1], self.path("out-2.png"))
        self.bad(1, ["out-2.png", "input"], "w.bin", "out-2.png", "-n", "3")
        self.assertEqual(read(self.path("a.png")), before)
        self.assertEqual(read(self.path("w.bin")), read(self.weights))

    def test_unwritable(self):
        self.put("file", b"")
        places = ["none/x.png", "file/x.png", "/proc/x.png"]
        if os.geteuid() != 0:
            os.mkdir(self.path("locked"), 0o555)
            places.append("locked/x.png")
        self.put("ids", self.good("encode", self.weights, self.images[0]))
        for place in places:
            words = [place, "cannot be written"]
            self.bad(1, words, self.weights, self.images[0], "-o", place)
            self.bad(1, words, "encode", self.weights, self.images[0], "-o", place)
            self.bad(1, words, "decode", self.weights, "ids", "-o", place)

    def test_full_disk(self):
        self.put("x.png", b"precious")
        limit = {"preexec_fn": lambda: ignore_file_limit(16)}
        self.put("ids", self.good("encode", self.weights, self.images[0]))
        for command in ([self.weights, self.images[0]], ["decode", self.weights, "ids"],
                        ["encode", self.weights, self.images[0]]):
            self.bad(1, ["x.png", "cannot be written"], *(command + ["-o", "x.png"]), **limit)
            self.assertEqual(read(self.path("x.png")), b"precious")

    def test_full_device(self):
        os.symlink("/dev/full", self.path("full.png"))     # should it be replaced, only the link is
        for command in ("predict", "encode"):
            self.bad(1, ["full.png", "cannot be written"], command, self.weights, self.images[0],
                     "-o", "full.png")
            self.assertTrue(os.path.islink(self.path("full.png")))

    def test_full_standard_output(self):
        commands = (["encode", self.weights, self.images[0]], ["info", self.weights],
                    ["info", self.weights, "--tensors"], ["help"], ["help", "encode"],
                    ["--version"], ["--help"], [self.weights, self.images[0], "-o", "x.png"],
                    ["quantize", self.weights, "q.bin", "--force"])
        for args in commands:
            with open("/dev/full", "wb") as full:
                code, _, err = self.run_lvm(*args, stdout=full)
            refused = r"\Alvm: standard output: cannot be written[^\n]*\n\Z"
            self.assertEqual(code, 1, args)
            self.assertRegex(re.sub(self.SAID, "", err), refused, args)
            code, _, err = self.run_lvm(*args, stdout=None, preexec_fn=lambda: os.close(1))
            self.assertEqual(code, 1, args)
            self.assertRegex(re.sub(self.SAID, "", err), refused, args)
        self.assertEqual(png_size(read(self.path("x.png"))), (32, 32))

    def test_closed_pipe(self):
        for args in (["encode", self.weights] + self.images, ["info", self.weights, "--tensors"]):
            reader, writer = os.pipe()
            os.close(reader)
            code, _, _ = self.run_lvm(*args, stdout=writer)
            os.close(writer)
            self.assertIn(code, (1, -signal.SIGPIPE))

    def test_other_closed_streams(self):
        whole = self.predict(self.images[0])
        code, out, _ = self.run_lvm(self.weights, self.images[0], stdin=None, stderr=None,
                                    preexec_fn=lambda: (os.close(0), os.close(2)))
        self.assertEqual((code, out), (0, b"out.png\n"))
        self.assertEqual(read(self.path("out.png")), whole)


    def test_devices_are_written_to(self):
        """Whatever they are called; the names of two standard streams too."""
        whole = self.predict(self.images[0])
        run = (self.weights, self.images[0], "-j", "1", "-o")
        for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "-"):
            self.assertEqual(self.good(*run, name), whole, name)
            self.assertTrue(os.path.islink("/dev/stdout"))
            with open(self.path("caught"), "wb") as caught:       # a file that is standard output
                caught.write(b"before")
                caught.flush()
                code, _, err = self.run_lvm(*run, name, stdout=caught)
            self.assertEqual((code, re.sub(self.SAID, "", err)), (0, ""))
            self.assertEqual(read(self.path("caught")), b"before" + whole, name)
        code, out, err = self.finish(self.start(*run, "/dev/stderr", "-q", stderr=subprocess.STDOUT))
        self.assertEqual((code, out), (0, whole))
        self.assertEqual(self.good(*run, "/dev/null"), b"")
        self.bad(2, ["/dev/null", "one image"], *run, "/dev/null", "-n", "2")
        self.assertTrue(stat.S_ISCHR(os.stat("/dev/null").st_mode))

    def test_standard_output_takes_one_thing(self):
        """No path line, JSON or second image beside an image there."""
        run = (self.weights, self.images[0], "-j", "1", "-q")
        for option in ("--sheet", "--apng"):
            data = self.good(*run, option, "-", "-o", "x.png")
            self.assertEqual((data[:8], data[-8:-4]), (b"\x89PNG\r\n\x1a\n", b"IEND"))
            self.bad(1, "standard output", *run, option, "-", "-o", "/dev/stdout")
            self.bad(1, "standard output", *run, option, "-", "-o", "y.png", "--json")
            self.bad(1, "standard output", *run, "-o", "/dev/fd/1", "--json")
        self.put("-", read(self.weights))                  # no file of that name is meant
        whole = self.predict(self.images[0])
        self.assertEqual(self.good(*run, "-o", "-"), whole)
        self.bad(1, "-: is a pipe", *run, "-o", "y.png", "--cache", "-")
        self.bad(2, "name a folder", "batch", self.weights, "set.jsonl", "-o", "-")
        self.bad(2, "name a folder", "batch", self.weights, "set.jsonl", "-o", "")
        self.bad(2, "-: quantize writes a file", "quantize", self.weights, "-")
        self.assertEqual(self.good("quantize", self.weights, "q.bin", "--type", "q8_0"), b"q.bin\n")
        for name in ("/dev/stdout", "/dev/fd/1"):
            with open(self.path("caught"), "wb") as caught:
                code, _, err = self.run_lvm("quantize", self.weights, name, "--type", "q8_0", stdout=caught)
            self.assertEqual((code, err), (0, ""))
            self.assertEqual(read(self.path("caught")), read(self.path("q.bin")))
            self.assertEqual(self.good("quantize", self.weights, name, "--type", "q8_0"),
                             read(self.path("q.bin")))

    def test_pipes_are_written_to(self):
        whole = self.predict(self.images[0])
        os.mkfifo(self.path("pipe"))
        for command in ((self.weights, self.images[0], "-j", "1"),
                        ("encode", self.weights, self.images[0])):
            p = self.start(*command, "-o", "pipe", "-q")
            with open(self.path("pipe"), "rb") as pipe:
                got = pipe.read()
            self.assertEqual(self.finish(p), (0, b"", ""))
            want = whole if command[0] == self.weights else self.good(*command)
            self.assertEqual(got, want)
            self.assertTrue(stat.S_ISFIFO(os.stat(self.path("pipe")).st_mode))

    def test_pipes_are_refused_as_input(self):
        """At once, though nobody will ever write to them."""
        os.mkfifo(self.path("pipe"))
        for args in (("pipe", self.images[0]), (self.weights, "pipe"), ("info", "pipe"),
                     ("encode", self.weights, "pipe"), ("decode", self.weights, "pipe"),
                     ("quantize", "pipe", "q.bin"), ("bench", "pipe"),
                     (self.weights, self.images[0], "--cache", "pipe"),
                     ("rank", self.weights, "pipe", "--", self.images[0]),
                     ("rank", self.weights, self.images[0], "--", "pipe")):
            self.bad(1, ["pipe"], *args, limit=20)

    def test_links(self):
        """-o through a link writes its target, which keeps its mode; a link to nothing makes one."""
        whole = self.predict(self.images[0])
        os.mkdir(self.path("there"))
        os.symlink("there/real.png", self.path("a.png"))
        os.symlink("a.png", self.path("b.png"))
        for old in (None, b"old"):
            if old is not None:
                os.chmod(self.put("there/real.png", old), 0o640)
            self.assertEqual(self.good(self.weights, self.images[0], "-j", "1", "-o", "b.png"),
                             b"b.png\n")
            self.assertEqual(read(self.path("there/real.png")), whole)
            self.assertTrue(os.path.islink(self.path("a.png")) and
                            os.path.islink(self.path("b.png")))
        self.assertEqual(stat.S_IMODE(os.stat(self.path("there/real.png")).st_mode), 0o640)
        self.assertEqual(os.listdir(self.path("there")), ["real.png"])
        os.symlink("self.png", self.path("self.png"))
        self.bad(1, ["self.png", "symbolic links"], self.weights, self.images[0], "-o", "self.png")

    def test_endings(self):
        whole = self.predict(self.images[0])
        self.assertEqual(self.good(self.weights, self.images[0], "-j", "1", "-o", "answer",
                                   "--sheet", "./sheet"), b"answer.png\n./sheet.png\n")
        self.assertEqual(read(self.path("answer.png")), whole)
        os.mkdir(self.path("folder"))
        self.put("ids", self.good("encode", self.weights, self.images[0]))
        for name in ("x.jpg", "x.001", "x.", "folder", "folder/", "none/", ".", "..", ""):
            for option in ("-o", "--sheet"):
                self.bad(2, [name], self.weights, self.images[0], option, name)
            self.bad(2, [name], "decode", self.weights, "ids", "-o", name)
        self.bad(1, ["empty"], self.weights, "")
        self.bad(1, ["empty"], "encode", self.weights, self.images[0], "-o", "")

    def test_outputs_that_meet(self):
        self.put("old.png", b"old")
        os.symlink("old.png", self.path("link.png"))
        for a, b in (("a.png", "a.png"), ("a.png", "./a"), ("old.png", "link.png"),
                     ("new.png", self.path("new.png"))):
            self.bad(1, "two outputs", self.weights, self.images[0], "-o", a, "--sheet", b)
            self.bad(1, ["--cache"], self.weights, self.images[0], self.images[1], "-o",
                     a if a.endswith(".png") else a + ".png", "--cache",
                     b if b.endswith(".png") else b + ".png")
        self.bad(1, ["x-2.png", "two outputs"], self.weights, self.images[0], "-o", "x.png", "-n",
                 "3", "--sheet", "x-2.png")
        self.assertEqual(read(self.path("old.png")), b"old")

    def test_before_the_work(self):
        """A run of minutes is refused in no time."""
        long = (self.weights, self.images[0], "-n", "2000", "-c", "8")
        for option in ("-o", "--sheet", "--cache"):
            before = processor_time()
            self.bad(1, ["none/x", "cannot be written"], *long, option, "none/x.png")
            self.assertLess(processor_time() - before, 5)
        self.bad(1, ["/dev/full"], self.weights, self.images[0], "-o", "/dev/full")

    def test_long_names(self):
        """NAME_MAX is 255 bytes: the temporary name does not outgrow it."""
        name = "x" * 251 + ".png"
        self.assertEqual(self.lines(self.weights, self.images[0], "-o", name), [name])
        os.remove(self.path(name))
        self.bad(1, ["cannot be written: File name too long", "y...y"], self.weights,
                 self.images[0], "-o", "y" * 252 + ".png")
        before = processor_time()                          # "-1" makes it too long: seen before the work
        self.bad(1, ["cannot be written: File name too long", "y...y"], self.weights,
                 self.images[0], "-o", "y" * 251 + ".png", "-n", "2000", "-c", "8")
        self.assertLess(processor_time() - before, 5)
        deep = "/".join(["z" * 200] * 10)
        for args in ((self.weights, deep), ("info", deep), ("decode", self.weights, deep)):
            self.bad(1, ["No such file", "z...z"], *args)

    def test_names_that_do_not_print(self):
        for name, shown in (("a\nb.png", r"a\nb.png"), ("a\x1b[31mb", r"a\x1b[31mb"),
                            ("a\x9bb".encode("latin-1").decode("utf-8", "surrogateescape"),
                             r"a\x9bb"), ("a\x85b", r"a\xc2\x85b")):
            self.bad(1, [shown, "No such file"], self.weights, name)
            self.bad(2, [shown, "no such option"], self.weights, "--" + name)
        code, _, err = self.run_lvm(self.weights, "B\u00e4ume.png")
        self.assertEqual((code, err), (1, "lvm: B\u00e4ume.png: No such file or directory\n"))

    def test_names_on_a_terminal(self):
        """A pipe gets a name as it is, a terminal escaped: of a choice, of what was written."""
        name = "a\x1b[31mb.png"
        shutil.copy(self.images[0], self.path(name))
        for args in (("rank", self.weights, self.images[0], "--", name),
                     (self.weights, self.images[0], "-o", name),
                     ("quantize", self.weights, name, "--force")):
            self.assertIn(name.encode(), self.good(*args))
            ours, theirs = pty.openpty()
            code = self.run_lvm(*args, stdout=theirs)[0]
            os.close(theirs)
            seen = os.read(ours, 1 << 16)
            os.close(ours)
            self.assertEqual(code, 0)
            self.assertIn(rb"a\x1b[31mb.png", seen)
            self.assertNotIn(b"\x1b", seen)

    def test_folders(self):
        os.mkdir(self.path("f"))
        for name in ("1.png", "2.JPE", "3.jfif", "4.pnm"):
            self.put("f/" + name, image(int(name[0])))
        plain = self.good("encode", self.weights, "f")
        self.assertEqual(plain, self.good("encode", self.weights, *(
            "f/" + name for name in ("1.png", "2.JPE", "3.jfif", "4.pnm"))))
        for name in (".hidden.png", "._1.png"):
            self.put("f/" + name, b"no image")
        os.mkdir(self.path("f/truth"))
        self.assertEqual(self.good("encode", self.weights, "f"), plain)
        self.put("f/note.txt", b"")
        code, out, err = self.run_lvm("encode", self.weights, "f")
        self.assertEqual((code, out, err), (0, plain, "lvm: note: f: 4 images; 1 file of another "
                                            "kind left out (note.txt)\n"))
        self.assertEqual(self.good("encode", self.weights, "f", "-q"), plain)
        for make, words in ((lambda path: os.mkdir(path), "a folder"),
                            (lambda path: os.mkfifo(path), "a pipe"),
                            (lambda path: os.symlink("none", path), "a link to nothing")):
            make(self.path("f/2b.png"))
            self.bad(1, ["f/2b.png", "name of an image", words], "encode", self.weights, "f", "-q")
            (os.rmdir if words == "a folder" else os.remove)(self.path("f/2b.png"))

    def test_a_read_only_file(self):
        if os.geteuid() == 0:
            self.skipTest("root may write everything")
        os.chmod(self.put("x.png", b"precious"), 0o444)
        self.bad(1, ["x.png", "cannot be written"], self.weights, self.images[0], "-o", "x.png")
        self.assertEqual(read(self.path("x.png")), b"precious")


# ---- interruption and progress -------------------------------------------------------------------

class Interruption(Case):
    LONG = ("-n", "2000", "-c", "8", "-o", "long.png", "-q")

    def stopped(self, number, message, *args, moment=1, **how):
        """A run that a signal ends: that signal is seen, and no file is left."""
        before = sorted(os.listdir(self.folder))
        p = self.start(*args, **how)
        time.sleep(moment * (4 if SANITIZED else 1))
        if number is not None:
            p.send_signal(number)
        code, out, err = self.finish(p)
        self.assertEqual(sorted(os.listdir(self.folder)), before)
        self.assertEqual(out, b"")
        if moment > 0:                     # else the program may not have begun
            self.assertRegex(err, r"\Alvm: %s; nothing was left behind\n\Z" % message)
        return code

    def test_signals(self):
        run = (self.weights, self.images[0]) + self.LONG
        for moment in (0, 0.05, 1):
            code = self.stopped(signal.SIGINT, "interrupted", *run, moment=moment if moment == 1 else 0,
                                preexec_fn=heed_interrupts)
            self.assertEqual(code, -signal.SIGINT)
        for number, message in ((signal.SIGTERM, r"told to stop \(SIGTERM\)"),
                                (signal.SIGHUP, "the terminal is gone"),
                                (signal.SIGQUIT, "told to quit")):
            self.assertEqual(self.stopped(number, message, *run), -number)

    def test_ignored_signals(self):
        """As under nohup."""
        p = self.start(self.weights, self.images[0], "-q",
                       preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        for _ in range(20):
            p.send_signal(signal.SIGHUP)
            time.sleep(0.01)
        self.assertEqual(self.finish(p), (0, b"out.png\n", ""))

    def test_file_size_limit(self):
        """Before the work: the run would take minutes."""
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        code = self.stopped(None, r"a file grew beyond [^\n]*", self.weights, self.images[0],
                            *self.LONG, preexec_fn=limit)
        self.assertEqual(code, -signal.SIGXFSZ)

    def test_signals_while_quantising(self):
        """Its output is made long before it is whole: the pipe that it is renamed over is not read."""
        big = self.path("big.bin")
        shutil.copy(self.weights, big)
        stops = runs = 0
        while runs < 20 or (stops == 0 and runs < 500): # a run takes some milliseconds
            p = self.start("quantize", big, "q.bin", "--force", preexec_fn=heed_interrupts)
            time.sleep(random.random() * 0.03)
            p.send_signal(signal.SIGINT)
            code, _, _ = self.finish(p)
            self.assertIn(code, (0, -signal.SIGINT))
            stops += code != 0
            runs += 1
            self.assertTrue(set(os.listdir(self.folder)) <= {"big.bin", "q.bin"})
        self.assertGreater(stops, 0)

    def test_the_bar_is_cleared(self):
        ours, theirs = pty.openpty()
        p = self.start(self.weights, self.images[0], *self.LONG[:-1], stderr=theirs,
                       preexec_fn=heed_interrupts)
        os.close(theirs)
        time.sleep(4 if SANITIZED else 1)
        p.send_signal(signal.SIGINT)
        code, _, _ = self.finish(p)
        seen = os.read(ours, 1 << 20)
        os.close(ours)
        self.assertEqual(code, -signal.SIGINT)
        self.assertTrue(seen.endswith(b"\r\x1b[Klvm: interrupted; nothing was left behind\r\n"), seen)

    def on_terminal(self, *args, columns=0, **how):
        """Standard error of a run that has a terminal of so many columns there; 0: it tells none."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        p = self.start(self.weights, self.images[0], *args, stderr=theirs, **how)
        os.close(theirs)
        seen = b""
        try:
            while True:
                piece = os.read(ours, 4096)
                if not piece:
                    break
                seen += piece
        except OSError:                    # the other end is closed
            pass
        os.close(ours)
        self.assertEqual(self.finish(p)[0], 0)
        return seen

    def test_progress_only_on_a_terminal(self):
        seen = self.on_terminal("-j", "1", "-n", "150", "-c", "4")
        for word in (b"encoding images", b"reading the prompt", b"predicting", b"decoding images",
                     b"%", b"#", b"tokens/s"):
            self.assertIn(word, seen)
        counted = re.findall(rb"predicting [^\r]* image (\d+) of 150", seen)
        self.assertGreater(len(set(counted)), 1)
        self.assertEqual([int(n) for n in counted], sorted(int(n) for n in counted))
        last = seen.split(b"\r\x1b[K")[-1]                # the bar is gone, and the note stands
        self.assertRegex(last.replace(b"\r", b"").decode(), self.SAID)
        self.assertEqual(self.on_terminal("-j", "1", "-n", "8", "-q"), b"")

    def test_progress_fits_the_terminal(self):
        args = ("-j", "1", "-n", "30")
        terminals = ((0, "40", 39), (24, "", 5), (1, "", 0), (0, "", 79), (50, "40", 49), (80, "", 79), (6, "", 5),
                     (5, "", 0))
        for columns, told, longest in terminals[:3] if SANITIZED else terminals:
            seen = self.on_terminal(*args, columns=columns, env={"COLUMNS": told}).decode()
            seen = re.sub(self.SAID[2:-2] + r"\r\n", "", seen.replace("\x1b[K", ""))
            widths = [len(line) for line in seen.split("\r")]
            self.assertLessEqual(max(widths), longest, columns)
            self.assertGreaterEqual(max(widths), longest * 3 // 4, columns)


# ---- the shipped model ---------------------------------------------------------------------------

class Shipped(Case):
    def test_readme(self):
        """What the README shows of help and info is what they print."""
        if os.path.basename(WEIGHTS) != "weights.bin":
            self.skipTest("other weights")
        readme = read(os.path.join(TOP, "README.md")).decode()
        for command in ("help quantize", "info weights.bin"):
            shown = readme.split("    $ ./lvm %s\n" % command)[1]
            shown = re.match(r"(?:    (?!\$ ).*\n)+", shown).group()
            out = self.good(*command.replace("weights.bin", WEIGHTS).split()).decode()
            out = out.replace(WEIGHTS, "weights.bin")
            self.assertEqual("".join(line[4:] for line in shown.splitlines(True)), out)

    def test_bench_counts(self):
        """Operations of the shipped tokenizer, counted by hooks on PyTorch's modules: 34.7 and 63.4 billion."""
        for stage, billions in (("encode", 34.7), ("decode", 63.4)):
            line = json.loads(self.lines("bench", WEIGHTS, "--json", "--stage", stage)[-1])
            self.assertAlmostEqual(line["amount"] * line["seconds"], billions, delta=0.1)

    PROMPT = sorted(os.path.join(TOP, "prompt", n) for n in os.listdir(os.path.join(TOP, "prompt"))
                    if n.endswith(".png"))

    def test_info(self):
        text = self.good("info", WEIGHTS).decode()
        for word in ("256 x 256 pixels -> 16 x 16 of 8192 codes", "= 16 images"):
            self.assertIn(word, text)

    def test_encode(self):
        """PyTorch's ids of the first two images, but where two codes are equally near."""
        if os.path.basename(WEIGHTS) != "weights.bin":
            self.skipTest("other weights")
        golden = os.path.join(TESTS, "golden", "weights")
        want = npy(os.path.join(golden, "ids.npy"), "i")[:512]
        gap = npy(os.path.join(golden, "gap.npy"), "f")[:512]
        images = read(os.path.join(golden, "images.txt")).decode().split()[:2]
        got = self.good("encode", WEIGHTS, *(os.path.join(TOP, name) for name in images)).split()
        self.assertEqual(len(got), 512)
        self.assertGreater(sum(g > 1e-3 for g in gap), 500)
        for i in range(512):
            self.assertTrue(gap[i] <= 1e-3 or int(got[i]) == want[i], "token %d" % i)

    def test_quick_start(self):
        """The second command of the README: an answer within a minute of two processors."""
        if SANITIZED:
            self.skipTest("minutes under a sanitizer")
        self.assertGreater(len(self.PROMPT), 2)
        before = processor_time()
        self.assertEqual(self.lines(WEIGHTS, *self.PROMPT, limit=300), ["out.png"])
        self.assertLess(processor_time() - before, 120)
        if os.path.basename(WEIGHTS) != "weights.bin":
            return
        answer, truth = (b"".join(pixels(read(p))) for p in (
            self.path("out.png"), os.path.join(TOP, "prompt", "truth", "12.png")))
        self.assertEqual(len(answer), 256 * 256 * 3)
        error = sum((a - b) ** 2 for a, b in zip(answer, truth)) / len(truth)
        self.assertLess(error, 255 ** 2 / 100, "20 dB; the last image of the prompt has 10")


if __name__ == "__main__":
    unittest.main()
