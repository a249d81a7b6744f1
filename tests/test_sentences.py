#!/usr/bin/env python3
"""Tests of `lvm sentences`: which images make which sentence, what the images look like, and that
nothing else decides the bytes: no thread, no shard, no run that was killed.

    python3 tests/test_sentences.py [-v] [Class.test ...]

What the program draws by chance is drawn here once more, from the definitions in chapters 8 and 9.
Images that it makes are made here again, pixel for pixel, and must become the same tokens. The
tokenizer is the small random one of tests/golden/both.
"""

import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest

from test_cli import (CODES, SANITIZED, T, TOP, Case, heed_interrupts, ignore_file_limit, image,
                      pixels, png, read, write)

R = 32                                   # side of the small tokenizer's images
M64 = (1 << 64) - 1


# ---- chance, as chapter 8 defines it ---------------------------------------------------------------

def mix64(x):
    x = (x + 0x9e3779b97f4a7c15) & M64
    x = ((x ^ x >> 30) * 0xbf58476d1ce4e5b9) & M64
    x = ((x ^ x >> 27) * 0x94d049bb133111eb) & M64
    return x ^ x >> 31


def shuffled(seed, epoch, n, i):
    half = 1
    while half < 31 and 1 << 2 * half < n:
        half += 1
    mask, key, x = (1 << half) - 1, mix64(mix64(seed) ^ epoch), i
    while True:
        for turn in range(8):
            right = x & mask
            x = right << half | (x >> half ^ (mix64(mix64((key + turn) & M64) ^ right) & mask))
        if x < n:
            return x


def below(seed, place, n):
    return (mix64((mix64(seed) + place) & M64) >> 32) * n >> 32


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def within(seed, place, low, high):
    low, high = f32(low), f32(high)
    share = f32((mix64((mix64(seed) + place) & M64) >> 40) * 2.0 ** -24)
    return f32(low + f32(f32(high - low) * share))


def part_seed(number=0, seed=1):
    return mix64((mix64(seed) + number) & M64)


def style(i, side=0, number=0, seed=1):
    return mix64((mix64((part_seed(number, seed) + side + 1) & M64) + i) & M64)


def in_order(n, turn=0, number=0):
    """A pass over n things."""
    return [shuffled(part_seed(number), turn, n, i) for i in range(n)]


# ---- images ------------------------------------------------------------------------------------

def rows_of(data):
    """An image of test_cli.image as lists of (r, g, b)."""
    return [[tuple(row[3 * x:3 * x + 3]) for x in range(len(row) // 3)] for row in pixels(data)]


def to_png(rows):
    return png(len(rows[0]), len(rows), b"".join(b"\0" + bytes(v for p in row for v in p) for row in rows))


class Sentences(Case):
    def folder_of(self, name, n, seed=0, first=1, size=R):
        """n images 1.png ... in a folder."""
        os.makedirs(self.path(name), exist_ok=True)
        for i in range(n):
            self.put("%s/%d.png" % (name, first + i), image(seed + i, size, size))
        return name

    def plan(self, *args):
        """The sentences as lists of names."""
        return [line.split("\t") for line in self.lines("sentences", *args, "--dry-run")]

    def make(self, *args, out="out.tok", **how):
        """Runs a command that must work; the bytes of its output and what it said."""
        words = ("sentences",) + args + ("--tokenizer", self.weights, "-o", out)
        code, _, err = self.run_lvm(*words + (() if "-j" in args else ("-j", "1")), **how)
        self.assertEqual(code, 0, err)
        return read(self.path(out)), err

    def tokens(self, name="out.tok", weights=False):
        """The sentences of a .tok file as lists of ids, or of weights."""
        lines = [json.loads(line) for line in self.lines("unpack", name, "--integers")]
        return [line["weights" if weights else "tokens"] for line in lines]

    def ids(self, *names):
        """What lvm encode makes of images."""
        return [[int(word) for word in line.split()]
                for line in self.lines("encode", self.weights, *names)]

    def refused(self, words, *args, status=1):
        """A run that fails, but may leave a log and tokens."""
        code, out, err = self.run_lvm("sentences", *args, "--tokenizer", self.weights, "-o", "out.tok")
        self.assertEqual((code, out), (status, b""), err)
        for word in [words] if isinstance(words, str) else words:
            self.assertIn(word, err)
        self.assertFalse(os.path.exists(self.path("out.tok")))
        return err


# ---- which images, in which order ------------------------------------------------------------------

class Plans(Sentences):
    def test_single(self):
        self.folder_of("a", 11)
        self.folder_of("a/below", 2)
        natural = ["a/%d.png" % i for i in range(1, 12)] + ["a/below/1.png", "a/below/2.png"]
        want = [natural[i] for i in in_order(13)]
        self.assertEqual(self.plan("single", "a"), [[name] for name in want])
        again = [natural[i] for i in in_order(13, 1)]
        self.assertEqual(self.plan("single", "a", "--count", "26"), [[name] for name in want + again])
        self.assertNotEqual(want, again)
        self.assertNotEqual(self.plan("single", "a", "--seed", "2"), [[name] for name in want])

    def test_pairs(self):
        self.folder_of("a", 19)
        self.folder_of("b", 19)
        order = in_order(19)
        want = [["%s/%d.png" % (side, i + 1) for i in order[at:at + 8] for side in "ab"] for at in (0, 8, 16)]
        self.assertEqual([len(s) for s in want], [16, 16, 6])
        self.assertEqual(self.plan("pairs", "a", "b"), want)
        self.assertEqual([len(s) for s in self.plan("pairs", "a", "b", "--length", "5")], [4] * 9 + [2])

    def test_partners(self):
        """By name without its ending, below the same folders; the ones without are left out."""
        for name in ("a/x", "a/y", "b/x", "b/y", "a/z"):
            self.folder_of(name, 3)
        shutil.move(self.path("b/y/2.png"), self.path("b/y/2.JPEG"))
        os.remove(self.path("a/x/3.png"))
        got = sorted(zip(*[iter(self.plan("pairs", "a", "b")[0])] * 2))
        self.assertEqual(got, [("a/x/1.png", "b/x/1.png"), ("a/x/2.png", "b/x/2.png"), ("a/y/1.png", "b/y/1.png"),
                               ("a/y/2.png", "b/y/2.JPEG"), ("a/y/3.png", "b/y/3.png")])

    def windows(self, frames, strides, hop=None, length=16):
        out = []
        for name, n in frames:
            for s in strides:
                start = 1
                while start + (length - 1) * s <= n:
                    out.append(["%s/%d.png" % (name, start + k * s) for k in range(length)])
                    start += hop or length * s
        return out

    def test_video(self):
        frames = [("v/c2", 40), ("v/c10", 65)]
        for name, n in frames:
            self.folder_of(name, n, size=4)
        want = self.windows(frames, (1, 2))
        self.assertEqual(len(want), 2 + 1 + 4 + 2)
        self.assertEqual(self.plan("video", "v", "--strides", "1,2"), [want[i] for i in in_order(9)])
        hop = self.windows(frames, (2,), 3)
        self.assertEqual(self.plan("video", "v", "--strides", "2", "--hop", "3"),
                         [hop[i] for i in in_order(len(hop))])
        short = self.plan("video", "v")                      # 151 frames would be needed
        self.assertEqual(sorted(short), [["v/c10/%d.png" % (1 + 10 * k) for k in range(7)],
                                         ["v/c2/%d.png" % (1 + 10 * k) for k in range(4)]])
        self.folder_of("w", 30, size=4)
        self.assertIn("makes no sentence", self.bad(1, "w", "sentences", "video", "w", "--dry-run"))

    def test_views(self):
        for i in range(1, 4):
            self.folder_of("o/%d" % i, 24, size=4)
        got = self.plan("views", "o", "--count", "6")
        for i, sentence in enumerate(got):
            turn, at = divmod(i, 3)
            start = below(style(i), 0, 24)
            way = 1 if below(style(i), 1, 2) else -1
            self.assertEqual(sentence, ["o/%d/%d.png" % (in_order(3, turn)[at] + 1, (start + k * way) % 24 + 1)
                                        for k in range(16)])
        self.assertEqual(len({tuple(s) for s in got}), 6)

    def test_category(self):
        sizes = {"1": 20, "2": 9, "3": 30}
        for name, n in sizes.items():
            self.folder_of("k/" + name, n, size=4)
        seen = set()
        for i, sentence in enumerate(self.plan("category", "k", "--count", "30")):
            run, want = 2 << below(style(i), 0, 4), []
            seen.add(run)
            for block in range(16 // run):
                number = shuffled(style(i), 1, 3, block % 3)
                n = sizes[str(number + 1)]
                want += ["k/%d/%d.png" % (number + 1, 1 + shuffled(style(i) ^ number, 2, n, (block // 3 * run + k) % n))
                         for k in range(min(run, n))]
            self.assertEqual(sentence, want)
        self.assertEqual(seen, {2, 4, 8, 16})

    def test_tuples(self):
        for name in "abcd":
            self.folder_of(name, 20, size=4)
        seen = set()
        got = self.plan("tuples", "a", "b", "c", "d")
        self.assertEqual(len(got), 5)
        for i, sentence in enumerate(got + self.plan("tuples", "a", "b", "c", "d", "--count", "20")[5:]):
            m = 2 + below(style(i), 0, 3)
            seen.add(m)
            kinds = ["abcd"[shuffled(style(i), 2, 4, c)] for c in range(m)]
            self.assertEqual(sentence, ["%s/%d.png" % (kind, 1 + shuffled(style(i), 1, 20, j))
                                        for j in range(16 // m) for kind in kinds])
        self.assertEqual(seen, {2, 3, 4})

    def test_annotated(self):
        self.folder_of("f/one", 17, size=4)
        self.folder_of("a/one", 17, size=4)
        alone = {w: ["%s/one/%d.png" % (side, k) for k in range(1 + 8 * w, 9 + 8 * w) for side in "fa"] for w in (0, 1)}
        grouped = {w: ["%s/one/%d.png" % (side, k) for side in "fa" for k in range(1 + 8 * w, 9 + 8 * w)] for w in (0, 1)}
        order = in_order(2)
        names = ("annotated", "f", "a")
        self.assertEqual(self.plan(*names, "--order", "interleaved"), [alone[w] for w in order])
        self.assertEqual(self.plan(*names, "--order", "grouped"), [grouped[w] for w in order])
        self.assertEqual(self.plan(*names), [alone[order[0]], grouped[order[1]]])

    def test_spoilt(self):
        self.folder_of("a", 9, size=4)
        order = in_order(9)
        for kind, tag in (("colorize", "grey"), ("inpaint", "holes"), ("denoise", "noise"), ("derain", "rain"),
                          ("lowlight", "dark")):
            self.assertEqual(self.plan(kind, "a"), [["a/%d.png%s" % (i + 1, what) for i in part for what in (":" + tag, "")]
                                                    for part in (order[:8], order[8:])])

    def test_layout(self):
        self.folder_of("p", 6, size=4)
        self.put("lines.txt", b'# a comment\n1.png 2.png *3.png\n\n  "4.png"\t5.png 6\r\n9.png 1.png\n2 *3 4\n2 *3 *4')
        want = [["p/1.png", "p/2.png", "p/3.png:answer"], ["p/4.png", "p/5.png", "p/6.png"],
                ["p/2.png", "p/3.png:answer", "p/4.png:answer"]]
        self.assertEqual(self.plan("layout", "lines.txt", "p", "--decide", "8"), [want[i] for i in in_order(3)])
        shutil.move(self.path("lines.txt"), self.path("p/lines.txt"))
        self.assertEqual(sorted(self.plan("layout", "p/lines.txt")),
                         sorted([name.replace(":answer", "") for name in line] for line in want))

    def test_mix(self):
        self.folder_of("a", 6, size=4)
        self.folder_of("b", 6, seed=3, size=4)
        self.folder_of("v/one", 8, size=4)
        self.put("all.mix", b"# weights\n3 single a\n1 pairs a b\n\n0.5 video v --strides 1 --length 4\n")
        got = self.plan("mix", "all.mix", "--count", "20000")
        n = [sum(len(s) == k for s in got) for k in (1, 12, 4)]
        self.assertEqual(n, [2 * round(10000 * w / 4.5) for w in (3, 1, .5)])
        singles = [s[0] for s in got if len(s) == 1]
        for turn in (0, 1, 2):                # each image once a pass, in the part's own order
            part = sorted(singles[:6667])
            self.assertAlmostEqual(part.count("a/1.png"), 6667 / 6, delta=2)
        self.bad(1, ["line 1", "weight kind sources"], "sentences", "mix", self.put("bad.mix", b"single a\n"), "--dry-run")
        self.bad(1, ["line 2", "nowhere"], "sentences", "mix", self.put("bad.mix", b"\n1 single nowhere\n"), "--dry-run")
        self.bad(1, ["line 1", "the whole command's"], "sentences", "mix", self.put("bad.mix", b"1 single a --seed 3\n"),
                 "--dry-run")
        os.remove(self.path("bad.mix"))

    def test_flip_and_crop(self):
        """What belongs together is mirrored and cropped alike."""
        self.folder_of("a", 16, size=4)
        self.folder_of("b", 16, size=4)
        tags = lambda name: name.partition(".png")[2]
        flips, crops = 0, set()
        for sentence in self.plan("pairs", "a", "b", "--flip", "--crop", "0.5"):
            for x, y in zip(sentence[::2], sentence[1::2]):
                self.assertEqual(tags(x), tags(y))
                flips += ":flip" in x
                crops.add(float(x.partition(":crop")[2]))
        self.assertTrue(2 <= flips <= 14 and len(crops) == 16)
        self.assertTrue(all(.5 <= c <= 1 for c in crops))
        self.folder_of("v/one", 32, size=4)
        for sentence in self.plan("video", "v", "--strides", "1", "--flip", "--crop", "0.5"):
            self.assertEqual(len({tags(name) for name in sentence}), 1)

    def test_val(self):
        """No source is on both sides, whatever the kind and the seed."""
        for name in "ab":
            self.folder_of(name, 60, size=4)
        side = {}
        for args in (("pairs", "a", "b"), ("single", "a"), ("single", "b", "--seed", "5"), ("colorize", "a"),
                     ("tuples", "b", "a"), ("category", "a")):
            seen = 0
            for sentence in self.plan(*args, "--val", "0.2"):
                val = sentence[0] == "val:"
                for name in sentence[val:]:
                    number = name.split("/")[1].split(".")[0]
                    self.assertEqual(side.setdefault(number, val), val, (args, name))
                    seen += val
            self.assertGreater(seen, 0)
        self.assertTrue(4 <= sum(side.values()) <= 22, side)
        for i in range(1, 11):
            self.folder_of("v/%d" % i, 16, size=4)
        got = self.plan("video", "v", "--strides", "1", "--val", "0.3")
        self.assertEqual(len(got), 10)
        self.assertTrue(1 <= sum(s[0] == "val:" for s in got) <= 6)

    def test_shards(self):
        self.folder_of("a", 57, size=4)
        self.folder_of("b", 57, size=4)
        for args in (("pairs", "a", "b"), ("single", "a", "b"), ("category", "a", "--count", "10")):
            whole = self.plan(*args)
            parts = [self.plan(*args, "--shard", "%d/3" % i) for i in (1, 2, 3)]
            self.assertEqual(sum(parts, []), whole)
            self.assertLessEqual(max(map(len, parts)) - min(map(len, parts)), 1)

    def test_usage(self):
        self.folder_of("a", 2, size=4)
        for words, args in (("no kind", ()), ("no kind", ("films", "a")), ("takes IMAGES ANNOTATIONS", ("pairs", "a")),
                            ("takes FRAMES", ("video", "a", "a")), ("takes SPEC", ("mix",)),
                            ("--tokenizer", ("single", "a")), ("--tokenizer", ("single", "a", "-o", "x.tok")),
                            ("OUT.tok or OUT.jsonl", ("single", "a", "-o", "x.txt", "--tokenizer", "w")),
                            ("OUT.tok or OUT.jsonl", ("single", "a", "-o", "-", "--tokenizer", "w")),
                            ("--strides", ("video", "a", "--strides", "0", "--dry-run")),
                            ("--strides", ("video", "a", "--strides", "1,x", "--dry-run")),
                            ("--shard", ("single", "a", "--shard", "0/2", "--dry-run")),
                            ("--shard", ("single", "a", "--shard", "3/2", "--dry-run")),
                            ("--noise", ("denoise", "a", "--noise", "2,1", "--dry-run")),
                            ("--hole", ("inpaint", "a", "--hole", "x", "--dry-run"))):
            self.bad(2, words, "sentences", *args)
        self.bad(1, "no such folder", "sentences", "single", "nowhere", "--dry-run")
        os.mkdir(self.path("empty"))
        self.bad(1, "holds no images", "sentences", "single", "empty", "--dry-run")
        self.assertIn("annotated FRAMES", self.good("help", "sentences").decode())


# ---- the images themselves ---------------------------------------------------------------------------

class Images(Sentences):
    def check_images(self, args, want):
        """Images that are made here must become what the program wrote, in its order."""
        self.make(*args)
        got = [ids[at:at + T] for ids in self.tokens() for at in range(0, len(ids), T)]
        names = []
        for i, rows in enumerate(want):
            names.append(self.put("want%d.png" % i, to_png(rows)))
        self.assertEqual(got, self.ids(*names))

    def one(self, seed=3, size=R):
        os.makedirs(self.path("a"), exist_ok=True)
        return rows_of(read(self.put("a/1.png", image(seed, size, size))))

    def test_as_it_is(self):
        """A sentence is its images' tokens, one behind the other."""
        self.folder_of("a", 5, size=40)
        self.folder_of("b", 5, size=36, seed=9)
        self.make("pairs", "a", "b")
        names = self.plan("pairs", "a", "b")[0]
        self.assertEqual(self.tokens(), [sum(self.ids(*names), [])])
        self.make("pairs", "a", "b", out="out.jsonl")
        self.assertEqual(self.good("pack", "out.jsonl", "-o", "two.tok", "-q"), b"two.tok\n")
        self.assertEqual(read(self.path("two.tok")), read(self.path("out.tok")))

    def test_fit(self):
        self.put_wide = write(os.path.join(self.folder, "w.png"), image(1, 60, 40))
        os.mkdir(self.path("a"))
        shutil.move(self.path("w.png"), self.path("a/w.png"))
        for fit in ("squash", "crop"):
            self.make("single", "a", "--fit", fit)
            want = [[int(w) for w in line.split()] for line in
                    self.lines("encode", self.weights, "a/w.png", "--fit", fit)]
            self.assertEqual(self.tokens(), want)

    def test_colorize(self):
        rows = self.one()
        grey = [[((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16,) * 3 for r, g, b in row] for row in rows]
        self.check_images(("colorize", "a"), [grey, rows])

    def test_inpaint(self):
        rows = self.one()
        w, h = (int(f32(f32(within(style(0), k, .22, .43) * R) + .5)) for k in (1, 2))
        holes = [list(row) for row in rows]
        for hole in range(2):
            x = 2 + below((style(0) + 3) & M64, hole, R - 4 - w + 1)
            y = 2 + below((style(0) + 4) & M64, hole, R - 4 - h + 1)
            for row in holes[y:y + h]:
                row[x:x + w] = [(0, 0, 0)] * w
        self.check_images(("inpaint", "a", "--holes", "2"), [holes, rows])

    def byte(self, v):
        return 0 if v <= 0 else 255 if v >= 255 else int(f32(v + .5))

    def bell(self, word):
        return f32((sum(word >> i & 255 for i in range(0, 64, 8)) - 1020) * f32(1 / f32(209.0207)))

    def test_denoise(self):
        rows = self.one()
        key = mix64(mix64((style(0) + 1) & M64))
        scale, flat = f32(255 * within(style(0), 1, .2, .25)), [v for row in rows for p in row for v in p]
        noisy = [self.byte(f32(v + f32(scale * self.bell(mix64((key + i) & M64))))) for i, v in enumerate(flat)]
        spoilt = [[tuple(noisy[3 * (y * R + x):][:3]) for x in range(R)] for y in range(R)]
        self.check_images(("denoise", "a", "--noise", "0.2,0.25"), [spoilt, rows])
        self.assertLess(abs(sum(map(lambda a, b: a - b, noisy, flat)) / len(flat)), 6)

    def test_lowlight_and_rain(self):
        """Darker by about what was asked for; rain brightens dark images, by as much as it covers."""
        rows = self.one()
        for args, low, high in ((("lowlight", "a", "--dark", "0.3,0.3"), 0, .4),
                                (("derain", "a", "--rain", "0.05,0.05"), 0, 3)):
            self.make(*args)
            pair = self.tokens()[0]
            self.assertEqual(pair[T:], self.ids("a/1.png")[0])
            self.assertNotEqual(pair[:T], pair[T:])
        black = [[(0, 0, 0)] * R] * R
        os.remove(self.path("a/1.png"))
        self.put("a/1.png", to_png(black))
        key = mix64((mix64((style(0) + 3) & M64) + 0) & M64)
        share, slant = within(style(0), 1, .05, .05), within(style(0), 2, -.48, .48)
        streaks = [[0] * R for _ in range(R)]
        for y in range(R):
            for x in range(R):
                if mix64((key + y * R + x) & M64) >> 32 >= int(share * 2 ** 32):
                    continue
                for dy in (-1, 0, 1):
                    row, column = y + dy, x + math.floor(f32(f32(dy * slant) + .5))
                    if 0 <= row < R and 0 <= column < R:
                        streaks[row][column] = min(2, streaks[row][column] + 1)
        rain = [[(self.byte(f32(f32(f32(.95) * 255) * f32((0, .55, .8)[s]))),) * 3 for s in row] for row in streaks]
        self.check_images(("derain", "a", "--rain", "0.05"), [rain, black])

    def test_flip(self):
        rows = self.one()
        self.folder_of("a", 8)
        names = self.plan("single", "a", "--flip")
        want = []
        for name, in names:
            source = rows_of(read(self.path(name.split(":")[0])))
            want.append([row[::-1] for row in source] if ":flip" in name else source)
        self.assertNotEqual(want, [rows_of(read(self.path(name.split(":")[0]))) for name, in names])
        self.check_images(("single", "a", "--flip"), want)

    def test_crop(self):
        self.one(size=64)
        cut = int(within(style(0), 101, .5, 1) * 65535), below(style(0), 102, 65536), below(style(0), 103, 65536)
        side = (64 * cut[0] + 32767) // 65535
        x, y = (64 - side) * cut[1] // 65535, (64 - side) * cut[2] // 65535
        rows = rows_of(read(self.path("a/1.png")))
        self.put("part.png", to_png([row[x:x + side] for row in rows[y:y + side]]))
        self.make("single", "a", "--crop", "0.5")
        self.assertEqual(self.tokens(), self.ids("part.png"))

    def coco(self, *annotations, width=R, height=R):
        data = {"info": {"x": [1, {"y": None}]}, "annotations": list(annotations),
                "images": [{"id": 7, "file_name": "somewhere/1.png", "width": width, "height": height}],
                "categories": [{"id": 9, "name": "b"}, {"id": 4, "name": "a"}]}
        return self.put("coco.json", json.dumps(data, indent=1).encode())

    def test_boxes(self):
        rows = self.one()
        drawn = [list(row) for row in rows]
        for x0, y0, x1, y1, colour in ((5, 6, 14, 25, (0, 204, 0)), (10, 3, 19, 12, (255, 0, 0))):
            for y in range(R):
                for x in range(R):
                    if x0 - 1 <= x <= x1 + 1 and y0 - 1 <= y <= y1 + 1 and not (x0 <= x <= x1 and y0 <= y <= y1):
                        drawn[y][x] = colour
        self.coco({"image_id": 7, "category_id": 9, "bbox": [5, 6.2, 10, 19.5]},
                  {"image_id": 7, "category_id": 4, "bbox": [10, 3, 10, 10]},
                  {"image_id": 7, "category_id": 4, "bbox": [0, 0, 30, 30], "iscrowd": 1})
        self.check_images(("boxes", "a", "coco.json"), [rows, drawn])

    def person(self, *known):
        points = [0] * 51
        for i, x, y in known:
            points[3 * i:3 * i + 3] = x, y, 2
        return {"image_id": 7, "category_id": 4, "keypoints": points}

    def limb(self, rows, a, b, colour):
        radius, dx, dy = 3.2 * R / 256, b[0] - a[0], b[1] - a[1]
        for y in range(R):
            for x in range(R):
                px, py = x + .5 - a[0], y + .5 - a[1]
                along = min(1, max(0, (px * dx + py * dy) / (dx * dx + dy * dy + 1e-6)))
                cover = min(1, radius - math.hypot(px - along * dx, py - along * dy) + .5)
                if cover > 0:
                    rows[y][x] = tuple(self.byte(f32(old * (1 - cover) + new * cover)) for old, new in zip(rows[y][x], colour))

    def test_keypoints(self):
        """Neck between the shoulders, limbs in OpenPose's colours; in a mirrored image left is right."""
        rows = self.one()
        self.coco(self.person((0, 16, 4), (5, 22, 10), (6, 10, 10), (7, 26, 18)))
        drawn = [[(0, 0, 0)] * R for _ in range(R)]
        neck = (16, 10)
        for a, b, colour in ((neck, (16, 4), (255, 0, 85)), (neck, (10, 10), (255, 60, 0)),
                             (neck, (22, 10), (190, 255, 0)), ((22, 10), (26, 18), (110, 255, 0))):
            self.limb(drawn, a, b, colour)
        self.check_images(("keypoints", "a", "coco.json"), [rows, drawn])
        drawn = [[(0, 0, 0)] * R for _ in range(R)]
        for a, b, colour in ((neck, (10, 10), (255, 0, 0)), (neck, (22, 10), (255, 85, 0)),
                             ((22, 10), (26, 18), (170, 255, 0)), (neck, (16, 4), (0, 0, 255))):
            self.limb(drawn, a, b, colour)
        self.check_images(("keypoints", "a", "coco.json", "--skeleton", "18"), [rows, drawn])
        seed = next(s for s in range(1, 99) if below(style(0, seed=s), 100, 2))
        drawn = [[(0, 0, 0)] * R for _ in range(R)]
        for a, b, colour in ((neck, (16, 4), (255, 0, 85)), (neck, (10, 10), (255, 60, 0)),
                             ((10, 10), (6, 18), (255, 130, 0)), (neck, (22, 10), (190, 255, 0))):
            self.limb(drawn, a, b, colour)
        self.check_images(("keypoints", "a", "coco.json", "--flip", "--seed", str(seed)), [[row[::-1] for row in rows], drawn])

    def runs(self, mask):
        counts, last, n = [], 0, 0
        for x in range(R):
            for y in range(R):
                if mask(x, y) != last:
                    counts.append(n)
                    last, n = 1 - last, 0
                n += 1
        return counts + [n]

    def compressed(self, counts):
        text = ""
        for i, v in enumerate(counts):
            v -= counts[i - 2] if i > 2 else 0
            more = True
            while more:
                digit, v = v & 31, v >> 5
                more = v != (-1 if digit & 16 else 0)
                text += chr(48 + (digit | 32 if more else digit))
        return text

    def test_segmentation(self):
        """Polygons, runs as numbers and as text; crowds below."""
        rows = self.one()
        disc = lambda x, y: int((x - 20) ** 2 + (y - 20) ** 2 < 60)
        crowd = lambda x, y: int(y < 16)
        drawn = [[(230, 25, 75) if disc(x, y) else (60, 180, 75) if 2 <= x < 12 and 4 <= y < 9 else
                  (60, 180, 75) if crowd(x, y) else (0, 0, 0) for x in range(R)] for y in range(R)]
        for counts in (self.runs(disc), self.compressed(self.runs(disc))):
            self.coco({"image_id": 7, "category_id": 9, "segmentation": [[2, 4, 12, 4, 12, 9, 2, 9]]},
                      {"image_id": 7, "category_id": 4, "segmentation": {"size": [R, R], "counts": counts}},
                      {"image_id": 7, "category_id": 9, "iscrowd": 1,
                       "segmentation": {"counts": self.runs(crowd), "size": [R, R]}})
            self.check_images(("segmentation", "a", "coco.json"), [rows, drawn])

    def test_half_pixels(self):
        """A pixel that is half covered has half of the colour."""
        rows = self.one()
        self.coco({"image_id": 7, "category_id": 4, "segmentation": [[3.5, 2, 8, 2, 8, 6, 3.5, 6]]})
        drawn = [[(0, 0, 0) if not (2 <= y < 6 and 3 <= x < 8) else (115, 13, 38) if x == 3 else (230, 25, 75)
                  for x in range(R)] for y in range(R)]
        self.check_images(("segmentation", "a", "coco.json"), [rows, drawn])

    def test_fit_of_annotations(self):
        """An image that is not square is squashed or cropped together with what is drawn of it."""
        os.mkdir(self.path("a"))
        self.put("a/1.png", image(1, 64, R))
        for fit, (x0, x1) in (("squash", (8, 16)), ("crop", (0, 16))):
            self.coco({"image_id": 7, "category_id": 4, "segmentation": [[16, 0, 32, 0, 32, R, 16, R]]}, width=64)
            self.make("segmentation", "a", "coco.json", "--fit", fit)
            self.put("want.png", to_png([[(230, 25, 75) if x0 <= x < x1 else (0, 0, 0) for x in range(R)]] * R))
            self.assertEqual(self.tokens()[0][T:], self.ids("want.png")[0], fit)
            self.coco({"image_id": 7, "category_id": 4, "segmentation":   # the same, run by run down the columns
                       {"size": [R, 64], "counts": [16 * R, 16 * R, 32 * R]}}, width=64)
            self.make("segmentation", "a", "coco.json", "--fit", fit)
            self.assertEqual(self.tokens()[0][T:], self.ids("want.png")[0], fit)

    def test_labels(self):
        """Label images keep their colours, grey ones get VOC's; no pixel is mixed."""
        os.mkdir(self.path("l"))
        rows = self.one()
        for value, colour in (((15, 15, 15), (192, 128, 128)), ((7, 99, 200), (7, 99, 200))):
            small = [[value if x < 5 else (0, 0, 0) for x in range(8)] for _ in range(8)]
            self.put("l/1.png", to_png(small))
            drawn = [[colour if x < 20 else (0, 0, 0) for x in range(R)] for _ in range(R)]
            self.check_images(("segmentation", "a", "l"), [rows, drawn])

    def test_deciding_tokens(self):
        """In an answer those tokens weigh more where other images begin alike and go on otherwise."""
        self.folder_of("p", 9)
        for i in range(4):                   # that share a beginning with 1.png
            rows = rows_of(read(self.path("p/1.png")))
            for y in range(8 * i, R):
                rows[y] = [((40 * i + y) % 256, 9 * x % 256, 17 * i) for x in range(R)]
            self.put("p/like%d.png" % i, to_png(rows))
        self.put("l.txt", b"2.png 3.png *1.png\n1.png 2.png 3.png\n1.png *4.png *like2.png\n")
        self.make("layout", "l.txt", "p", "--decide", "8")
        plan = self.plan("layout", "l.txt", "p", "--decide", "8")
        names = sorted(os.listdir(self.path("p")))
        table = dict(zip(names, self.ids(*("p/" + name for name in names))))
        for sentence, weights in zip(plan, self.tokens(weights=True)):
            want = []
            for name in sentence:
                ids = table[name.split("/")[1].split(":")[0]]
                branch = {next(p for p in range(T) if other[p] != ids[p]) for other in table.values() if other != ids}
                want += [128 if ":answer" in name and p in branch else 16 for p in range(T)]
            self.assertEqual(weights, want)
        self.assertIn(128, sum(self.tokens(weights=True), []))

    def test_deciding_tokens_of_mirrored_answers(self):
        """An answer that is mirrored is none of the folder's images, and weighs by its own tokens."""
        self.folder_of("p", 9)
        self.put("l.txt", b"2.png *1.png\n3.png *4.png\n5.png *6.png\n7.png *8.png\n")
        args = ("layout", "l.txt", "p", "--decide", "8", "--flip")
        self.make(*args)
        table = self.ids(*("p/%d.png" % i for i in range(1, 10)))
        flipped = 0
        for sentence, ids, weights in zip(self.plan(*args), self.tokens(), self.tokens(weights=True)):
            ids, weights, flipped = ids[T:], weights[T:], flipped + (":flip" in sentence[1])
            branch = {next(p for p in range(T) if other[p] != ids[p]) for other in table if other != ids}
            self.assertEqual(weights, [128 if p in branch else 16 for p in range(T)])
        self.assertGreater(flipped, 0)

    def test_show(self):
        self.folder_of("a", 3)
        self.make("single", "a")
        self.assertEqual(self.lines("sentences", "show", "out.tok", "2", "--tokenizer", self.weights, "-j", "1"), ["sheet.png"])
        sheet = pixels(read(self.path("sheet.png")))
        self.assertEqual((len(sheet), len(sheet[0]) // 3), (2 * (R + 8) + 8, R + 16))
        self.good("encode", self.weights, "a/%d.png" % (in_order(3)[0] + 1), "-o", "ids.txt")
        self.good("decode", self.weights, "ids.txt", "-o", "tile.png")
        tile = pixels(read(self.path("tile.png")))
        self.assertEqual([row[24:24 + 3 * R] for row in sheet[8:8 + R]], tile)
        self.bad(2, "show FILE.tok", "sentences", "show", "out.tok", "0", "--tokenizer", self.weights)
        self.bad(1, "no .tok file", "sentences", "show", "a/1.png", "--tokenizer", self.weights)


# ---- the same bytes, and faults ----------------------------------------------------------------------

class Runs(Sentences):
    def put_mix(self):
        self.folder_of("a", 24, size=20)
        self.folder_of("b", 24, seed=50, size=24)
        self.folder_of("v/1", 40, seed=90, size=16)
        return self.put("all.mix", b"2 pairs a b --flip --crop 0.7\n1 video v --strides 1,2\n1 denoise a b\n1 tuples a b\n")

    def test_threads_and_shards(self):
        """The same bytes by any number of threads; shards, packed, are the whole."""
        self.put_mix()
        args = ("mix", "all.mix", "--count", "25", "--val", "0.2")
        want, _ = self.make(*args, "-j", "1")
        val = read(self.path("out-val.tok"))
        for threads in ("2", "3"):
            self.assertEqual(self.make(*args, "-j", threads)[0], want)
            self.assertEqual(read(self.path("out-val.tok")), val)
        for i in (1, 2, 3):
            self.make(*args, "--shard", "%d/3" % i, out="s%d.tok" % i)
        for tag, whole in (("", want), ("-val", val)):
            names = [n for n in ("s%d%s.tok" % (i, tag) for i in (1, 2, 3)) if os.path.exists(self.path(n))]
            self.good("pack", *names, "-o", "packed.tok", "-q")
            self.assertEqual(read(self.path("packed.tok")), whole)
        self.assertFalse([n for n in os.listdir(self.folder) if n.endswith((".cache", ".log"))])

    def test_killed(self):
        """A run that was killed goes on where it was and writes the same bytes."""
        self.folder_of("a", 300)
        want, _ = self.make("single", "a")
        process = self.start("sentences", "single", "a", "--tokenizer", self.weights, "-o", "k.tok", "-j", "1")
        cache = self.path("k.cache")
        for _ in range(4000):
            if os.path.exists(cache) and os.path.getsize(cache) > 24 + 40 * (24 + 2 * T):
                break
            time.sleep(.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        self.assertFalse(os.path.exists(self.path("k.tok")))
        with open(cache, "ab") as f:
            f.write(b"half a record")
        for name in os.listdir(self.folder):
            if name.endswith(".tmp"):
                os.remove(self.path(name))
        got, err = self.make("single", "a", out="k.tok")
        self.assertEqual(got, want)
        self.assertRegex(err, r" ([4-9]\d|[12]\d\d) of them known")

    def test_interrupted(self):
        self.folder_of("a", 300)
        process = self.start("sentences", "single", "a", "--tokenizer", self.weights, "-o", "k.tok", "-j", "1",
                             preexec_fn=heed_interrupts)
        while not os.path.exists(self.path("k.cache")) and process.poll() is None:
            time.sleep(.002)
        process.send_signal(signal.SIGINT)
        code, _, err = self.finish(process)
        self.assertEqual(code, -signal.SIGINT, err)
        self.assertIn("the same command goes on from here", err)

    def test_cache(self):
        """--cache keeps tokens for other commands; a changed file, another recipe or damage counts."""
        self.folder_of("a", 6)
        _, err = self.make("single", "a", "--cache", "t.cache")
        self.assertNotIn("known", err)
        _, err = self.make("colorize", "a", "--cache", "t.cache")
        self.assertIn("6 of them known", err)
        fresh = self.tokens()
        self.make("colorize", "a")
        self.assertEqual(self.tokens(), fresh)
        for args in (("single", "a", "--flip"), ("denoise", "a"), ("denoise", "a", "--seed", "2"),
                     ("denoise", "a", "--noise", "0.5")):
            kept, _ = self.make(*args, "--cache", "t.cache")
            self.assertEqual(kept, self.make(*args)[0], args)
        self.put("a/1.png", image(77, 40, 40))
        _, err = self.make("single", "a", "--cache", "t.cache")
        self.assertIn("5 of them known", err)
        data = bytearray(read(self.path("t.cache")))
        data[24 + 2 * (24 + 2 * T) + 30] ^= 1                 # of the third record
        self.put("t.cache", bytes(data))
        got, err = self.make("single", "a", "--cache", "t.cache")
        self.assertRegex(err, " [12] of them known")
        self.assertEqual(got, self.make("single", "a")[0])
        self.put("u.cache", b"something else, of somebody")
        self.bad(1, "no file of tokens", "sentences", "single", "a", "--cache", "u.cache", "-o", "x.tok",
                 "--tokenizer", self.weights)

    def test_two_at_once(self):
        """A file of tokens that another run is adding to is left alone; one that a killed run left is taken."""
        self.folder_of("a", 600)
        words = ("sentences", "single", "a", "--tokenizer", self.weights, "-j", "1", "--cache", "t.cache")
        first = self.start(*words, "-o", "1.tok")
        try:
            while not (os.path.exists(self.path("t.cache")) and os.path.getsize(self.path("t.cache")) > 24):
                self.assertIsNone(first.poll(), "the first run is over")
                time.sleep(.002)
            first.send_signal(signal.SIGSTOP)
            before = read(self.path("t.cache"))
            code, out, err = self.run_lvm(*words, "-o", "2.tok")
            self.assertEqual((code, out), (1, b""), err)
            self.assertIn("t.cache: another lvm is adding tokens to it", err)
            self.assertEqual(read(self.path("t.cache")), before)
            self.assertFalse(os.path.exists(self.path("2.tok")))
            os.mkdir(self.path("b"))
            for i in (1, 2):
                shutil.copy(self.path("a/%d.png" % i), self.path("b"))
            self.make("single", "b", "--cache", "other.cache")       # which hinders nobody else
        finally:
            first.kill()
            first.communicate()
        for name in os.listdir(self.folder):
            if name.endswith(".tmp"):
                os.remove(self.path(name))
        self.make("single", "b", "--cache", "t.cache")
        with open(self.path("t.cache"), "ab") as f:
            f.write(b"half a record")
        _, err = self.make("single", "b", "--cache", "t.cache")      # the tail is cut off and
        self.assertIn("2 of them known", err)
        self.put("b/3.png", image(4321, R, R))
        self.make("single", "b", "--cache", "t.cache")               # what is added lies behind the rest
        _, err = self.make("single", "b", "--cache", "t.cache")
        self.assertIn("3 of them known", err)

    def test_duplicates(self):
        self.folder_of("a", 5)
        shutil.copy(self.path("a/2.png"), self.path("a/9.png"))
        _, err = self.make("single", "a")
        self.assertIn("1 duplicate", err)
        got = dict(zip((s[0] for s in self.plan("single", "a")), self.tokens()))
        self.assertEqual(got["a/9.png"], got["a/2.png"])

    def test_bad_images(self):
        """What is faulty is left out with what belongs to it, and listed; too much ends the work."""
        self.folder_of("a", 20)
        self.folder_of("b", 19)
        self.put("a/7.png", b"no image")
        self.put("b/11.png", read(self.path("b/11.png"))[:99])
        err = self.refused("--max-bad", "pairs", "a", "b")
        plan = self.plan("pairs", "a", "b")
        _, err = self.make("pairs", "a", "b", "--max-bad", "0.2")
        log = read(self.path("out.log")).decode().splitlines()
        self.assertEqual(log[0], "a/20: has no partner in b")
        self.assertEqual(sorted(line.split(".png")[0] + ".png" for line in log[1:]), ["a/7.png", "b/11.png"])
        self.assertIn("3 faults in out.log", err)
        want = []
        for sentence in plan:
            good = [name for name in sentence if name.split("/")[1] not in ("7.png", "11.png")]
            want.append(sum(self.ids(*good), []))
        self.assertEqual(self.tokens(), want)
        self.folder_of("v/1", 16)
        self.folder_of("v/2", 16, seed=40)
        self.put("v/2/3.png", b"")
        self.make("video", "v", "--strides", "1", "--max-bad", "0.2")
        self.assertEqual(len(self.tokens()), 1)

    def test_outputs(self):
        self.folder_of("a", 3)
        self.bad(1, "nowhere/out.tok", "sentences", "single", "a", "-o", "nowhere/out.tok", "--tokenizer", self.weights)
        self.bad(1, "nowhere.bin", "sentences", "single", "a", "-o", "x.tok", "--tokenizer", "nowhere.bin")
        os.mkdir(self.path("x.tok"))
        self.bad(1, "is a folder", "sentences", "single", "a", "-o", "x.tok", "--tokenizer", self.weights)
        os.rmdir(self.path("x.tok"))
        self.put("l.tok", b"1.png\n")
        self.bad(1, "input too", "sentences", "layout", "l.tok", "a", "-o", "l.tok", "--tokenizer", self.weights)
        self.put("l.log", b"1.png\n")
        self.bad(1, "is an input", "sentences", "layout", "l.log", "a", "-o", "l.tok", "--tokenizer", self.weights, "--force")
        self.assertEqual(read(self.path("l.log")), b"1.png\n")

    @unittest.skipIf(SANITIZED, "the program's own memory counts")
    def test_full(self):
        """A disk that is full ends the work with words; it goes on when there is room."""
        self.folder_of("a", 200)
        code, _, err = self.run_lvm("sentences", "single", "a", "--tokenizer", self.weights, "-o", "out.tok", "-j", "1",
                                    preexec_fn=lambda: ignore_file_limit(20000))
        self.assertEqual(code, 1)
        self.assertIn("out.cache: cannot be written", err)
        self.assertFalse(os.path.exists(self.path("out.tok")))
        got, err = self.make("single", "a")
        self.assertIn("known", err)
        self.assertEqual(got, self.make("single", "a")[0])

    def test_hostile_json(self):
        self.folder_of("a", 3)
        image_line = b'"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, '
        for words, text in (("", b""), ("an object", b"[]"), ("deeply", b'{"x": ' + b"[" * 5000),
                            ("too large", b'{"images": [{"id": 1e999, "file_name": "1.png"}]}'),
                            ("a number", b'{"images": [{"id": "1", "file_name": "1.png"}]}'),
                            ("lacks", b'{"images": [{"id": 1}]}'), ("lacks", b'{"annotations": [{}]}'),
                            ("string", b'{"images": [{"id": 1, "file_name": 2}]}'),
                            ("an array", b'{"images": {}}'), ("behind", b"{} {}"),
                            ("four numbers", b"{" + image_line + b'"bbox": [1, 2, 3]}]}'),
                            ("number", b"{" + image_line + b'"bbox": [1, 2, NaN, 4]}]}'),
                            ("no sentence", b'{"images": []}'), ("", b"{" + image_line), ("", b"\xff\xfe{}")):
            self.put("bad.json", text)
            self.refused(words, "boxes", "a", "bad.json")
        for words, segmentation in (
                ("pairs", [[1, 2, 3]]), ("number", [["a"]]), ("array", [1, 2]), ("mask of", {"size": [9, 9], "counts": [81]}),
                ("not its", {"size": [R, R], "counts": [5]}), ("not its", {"size": [R, R], "counts": [2 ** 31 - 2] * 9}),
                ("whole", {"size": [R, R], "counts": [-1]}), ("text of runs", {"size": [R, R], "counts": "\x01"}),
                ("text of runs", {"size": [R, R], "counts": "o" * 99}), ("not its", {"size": [R, R]}),
                ("object", "x"), ("too large", [[1e308 * 10, 1, 2, 3]] and {"size": [1e99, R], "counts": []})):
            data = {"images": [{"id": 1, "file_name": "1.png"}],
                    "annotations": [{"image_id": 1, "segmentation": segmentation}], "categories": []}
            self.put("bad.json", json.dumps(data).encode())
            self.refused([] if words == "too large" else words, "segmentation", "a", "bad.json")
        self.put("bad.json", b"{" + image_line + b'"keypoints": [1, 2, 3]}]}')
        self.refused("17 key points", "keypoints", "a", "bad.json")

    def test_unknown_images(self):
        self.folder_of("a", 2)
        data = {"images": [{"id": i, "file_name": "%d.png" % i} for i in (1, 2, 3)],
                "annotations": [{"image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in (1, 2, 3, 8)],
                "categories": [{"id": 1}]}
        self.put("c.json", json.dumps(data).encode())
        self.make("boxes", "a", "c.json", "--max-bad", "0.9")
        log = read(self.path("out.log")).decode()
        self.assertIn('image "3.png" is not in a', log)
        self.assertIn("unknown image, 8", log)
        self.assertEqual([len(s) for s in self.tokens()], [4 * T])


class World(Sentences):
    """What examples/scenes.c writes is read as it is, and drawn as it draws."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.scenes = os.path.abspath(os.environ.get("SCENES", os.path.join(TOP, "build", "scenes")))
        if "SCENES" not in os.environ:
            subprocess.run(["make", "-s", "build/scenes"], cwd=TOP, check=True)

    def world(self, kind, count=6):
        subprocess.run([self.scenes, "w", "--kind", kind, "--count", str(count), "--size", "64"], cwd=self.folder,
                       check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_kinds(self):
        for kind, args, images in (("single", ("single", "w/images"), 6), ("category", ("category", "w"), 10),
                                   ("video", ("video", "w/videos", "--strides", "1"), 96),
                                   ("views", ("views", "w/views"), 96), ("depth", ("pairs", "w/images", "w/depth"), 12),
                                   ("tuples", ("tuples", "w/images", "w/depth", "w/normals", "w/edges"), 0),
                                   ("annotated", ("annotated", "w/images", "w/depth"), 0),
                                   ("keypoints", ("keypoints", "w/images", "w/keypoints.json"), 12),
                                   ("boxes", ("segmentation", "w/images", "w/instances.json"), 12),
                                   ("puzzle", ("layout", "w/layout.txt"), 0), ("maze", ("layout", "w/layout.txt"), 0)):
            self.world(kind)
            _, err = self.make(*args)
            self.assertNotIn("fault", err)
            n = sum(map(len, self.tokens())) // T
            self.assertTrue(n == images or (images == 0 and n > 12) or kind == "category", (kind, n))
            shutil.rmtree(self.path("w"))

    def test_boxes(self):
        """The boxes that scenes.c draws itself, on images of the tokenizer's size."""
        subprocess.run([self.scenes, "w", "--kind", "boxes", "--count", "12", "--size", str(R)], cwd=self.folder, check=True,
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.make("boxes", "w/images", "w/instances.json")
        drawn = self.tokens()
        self.make("pairs", "w/images", "w/boxes", out="pairs.tok")
        self.assertEqual(drawn, self.tokens("pairs.tok"))
        self.assertNotEqual([s[:T] for s in drawn], [s[T:2 * T] for s in drawn])


class Examples(Sentences):
    def test_voc_to_coco(self):
        os.mkdir(self.path("xml"))
        for name, objects in (("2008_1", (("dog", 3, 4, 12, 22), ("cat", 1, 1, 5, 5))), ("2008_2", (("cat", 2, 3, 9, 9),))):
            body = "".join("<object><name>%s</name><difficult>0</difficult><bndbox><xmin>%g</xmin><ymin>%g</ymin>"
                           "<xmax>%g</xmax><ymax>%g</ymax></bndbox></object>" % o for o in objects)
            self.put("xml/%s.xml" % name, ("<annotation><filename>%s.jpg</filename><size><width>32</width><height>32</height>"
                                           "<depth>3</depth></size>%s</annotation>" % (name, body)).encode())
        script = os.path.join(TOP, "examples", "voc_to_coco.py")
        subprocess.run([sys.executable, script, "xml", "-o", "voc.json"], cwd=self.folder, check=True)
        data = json.loads(read(self.path("voc.json")))
        self.assertEqual([c["name"] for c in data["categories"]], ["cat", "dog"])
        self.assertEqual([i["file_name"] for i in data["images"]], ["2008_1.jpg", "2008_2.jpg"])
        self.assertEqual(data["annotations"][0]["bbox"], [2, 3, 10, 19])    # VOC counts from 1, both ends
        os.mkdir(self.path("a"))
        for name in ("2008_1", "2008_2"):
            self.put("a/%s.png" % name, image(1, R, R))
        self.assertEqual(len(self.plan("boxes", "a", "voc.json")[0]), 4)
        self.put("xml/bad.xml", b"<annotation>")
        bad = subprocess.run([sys.executable, script, "xml", "-o", "voc.json"], cwd=self.folder, stderr=subprocess.PIPE)
        self.assertEqual(bad.returncode, 1)
        self.assertIn(b"bad.xml", bad.stderr)

    def test_slurm(self):
        """The array script, run as Slurm would run its tasks, makes the whole."""
        self.folder_of("a", 10)
        script = os.path.join(TOP, "examples", "sentences.slurm")
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", script], check=True)
        env = dict(os.environ, LVM=os.environ.get("LVM", os.path.join(TOP, "lvm")), WEIGHTS=self.weights, SLURM_ARRAY_TASK_COUNT="3",
                   SLURM_ARRAY_TASK_MIN="1", SLURM_CPUS_PER_TASK="1")
        env["LVM"] = os.path.abspath(env["LVM"])
        for i in ("1", "2", "3"):
            subprocess.run(["sh", script, "train", "single", "a"], cwd=self.folder, check=True, stderr=subprocess.PIPE,
                           stdout=subprocess.PIPE, env=dict(env, SLURM_ARRAY_TASK_ID=i))
        want, _ = self.make("single", "a")
        self.good("pack", *("train-%d.tok" % i for i in (1, 2, 3)), "-o", "all.tok", "-q")
        self.assertEqual(read(self.path("all.tok")), want)


if __name__ == "__main__":
    unittest.main()
