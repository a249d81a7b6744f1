#!/usr/bin/env python3
"""Tests of lvm score: python3 tests/test_score.py. Standard library only; the environment is that of
test_cli.py, from which the tools come.

golden_scores holds what scikit-image, SciPy, pycocotools, OpenCV and Pillow measure
(make_score_vectors.py). Boxes and figures are judged by what was drawn, which lvm must read back."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import unittest

from test_cli import TESTS, TOP, WEIGHTS, Case, chunk, image, png, read

GOLDEN = os.path.join(TESTS, "golden_scores")
EXACT = 1e-8                              # nine digits are printed


def flat(color, width=40, height=36):
    return png(width, height, (b"\0" + bytes(color) * width) * height)


class Score(Case):
    def score(self, *args, code=0, err=None):
        """The lines of --json --per-image; where err is given, its words stand on stderr."""
        got, out, said = self.run_lvm("score", *args, "--json", "--per-image")
        self.assertEqual(got, code, said)
        for word in err or ():
            self.assertIn(word, said)
        if err is None:
            self.assertEqual(said, "")
        return [json.loads(line) for line in out.decode().splitlines()]


class Golden(Score):
    def agree(self, name, metric, key, names, totals, *args):
        folder = os.path.join(GOLDEN, name)
        with open(os.path.join(folder, "expected.json")) as f:
            expected = json.load(f)
        lines = self.score(metric, os.path.join(folder, "predictions"), os.path.join(folder, "truths"), *args)
        self.assertEqual(sorted(line["image"] for line in lines[:-1]), sorted(set(expected) - {""}))
        self.assertEqual((lines[-1]["images"], lines[-1]["failed"]), (len(expected) - 1, 0))
        for line in lines:
            wanted = expected[line.get("image", "")].get(key, ())
            for value, column in zip(wanted, names if "image" in line else totals):
                where = "%s of %s" % (column, line.get("image", "all"))
                if value is None or value == "inf":
                    self.assertEqual(line[column], None if value is None else math.inf, where)
                else:
                    self.assertAlmostEqual(line[column], value, delta=EXACT * max(1, abs(value)), msg=where)
        for column in names:              # the means are those of what is printed above
            values = [line[column] for line in lines[:-1] if line[column] is not None]
            if math.inf not in values:
                self.assertAlmostEqual(lines[-1][column], sum(values) / len(values), delta=1e-6 * max(values))

    def test_pixels(self):
        self.agree("pixels", "psnr", "psnr", ["psnr"], ["psnr_of_mean_mse"])
        self.agree("pixels", "ssim", "ssim", ["ssim"], [])
        self.agree("pixels", "mse", "mse", ["mse", "mse_x3", "mse_imagenet"], [])
        self.agree("pixels", "depth", "depth", ["abs_rel", "delta_1.25"], [])
        self.agree("pixels", "edges", "edges", ["precision", "recall", "f"], ["f_all"])
        self.put("palette", b"#000000\n255, 255 255 white\n")
        self.agree("pixels", "miou", "miou_foreground", ["foreground"], [], "--palette", "palette")

    def test_flat_colors(self):
        self.agree("flat", "miou", "miou_classes", ["classes"], ["classes_all"])
        self.agree("flat", "cells", "cells", ["cells", "exact"], [], "--grid", "5,4")

    def test_boxes(self):
        self.agree("boxes", "boxes", "boxes", ["iou"], ["iou_all", "ap50"])

    def test_figures(self):
        names, totals = ["pck_0.1", "pck_0.2"], ["pck_0.1_all", "pck_0.2_all"]
        self.agree("figures", "pck", "pck", names, totals)
        self.agree("openpose", "pck", "pck", names, totals, "--skeleton", "18")
        self.agree("dots", "pck", "pck", names, totals, "--skeleton", "18")

    def test_protocols(self):
        folder = os.path.join(GOLDEN, "protocols")
        with open(os.path.join(folder, "expected.json")) as f:
            expected = json.load(f)
        for name, base, names in (("segmentation", "voc", ["iou", "accuracy", "iou_in_bytes"]),
                                  ("detection", "voc", ["iou", "accuracy", "iou_in_bytes"]),
                                  ("colorization", "imagenet", ["mse_imagenet", "mse_x3"])):
            lines = self.score("protocol", "vp-" + name, os.path.join(folder, "answers_" + name),
                               os.path.join(folder, name + ".txt"), "--base", os.path.join(folder, base))
            wanted = expected["vp-" + name]
            self.assertEqual(len(lines), len(wanted) + 1)
            for n, (line, values) in enumerate(zip(lines, wanted)):
                self.assertEqual(line["image"], str(n))
                for column, value in zip(names, values):
                    self.assertAlmostEqual(line[column], value, delta=EXACT)
            for k, column in enumerate(names):
                self.assertAlmostEqual(lines[-1][column], sum(v[k] for v in wanted) / len(wanted), delta=EXACT)


class Degenerate(Score):
    """What has nothing to measure, or hardly anything: each metric by itself, beside what the
    goldens have (black, white, one pixel, alpha, other flat colours)."""

    METRICS = (("psnr",), ("ssim",), ("mse",), ("miou",), ("boxes",), ("pck",), ("edges",), ("depth",),
               ("cells", "--grid", "2,2"))
    BLACK, WHITE = (0, 0, 0), (255, 255, 255)

    def values(self, metric, p, t, code=0, err=None):
        self.put("p.png", p), self.put("t.png", t)
        got = self.score(metric[0], "p.png", "t.png", *metric[1:], code=code, err=err)
        return [value for name, value in got[0].items() if name != "image"]

    def test_flat(self):
        """Black and white for black and white: what is predicted of a true picture."""
        inf, none = math.inf, None
        want = {"psnr": ([inf], [0], [0], [inf]), "mse": ([0, 0, 0], [1, 3], [1, 3], [0, 0, 0]),
                "ssim": ([1], [1e-4], [1e-4], [1]), "miou": ([1, 1], [0, 1], [0, 1], [1, 1]),
                "boxes": ([none],) * 4, "pck": ([none, none],) * 4,
                "edges": ([1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]),
                "depth": ([none, none], [none, none], [1, 0], [0, 1]), "cells": ([1, 1],) * 4}
        cases = ((self.BLACK, self.BLACK), (self.WHITE, self.BLACK), (self.BLACK, self.WHITE), (self.WHITE, self.WHITE))
        for metric in self.METRICS:
            for (p, t), values in zip(cases, want[metric[0]]):
                got = self.values(metric, flat(p), flat(t))
                for a, b in zip(got, values):
                    where = "%s of %s for %s: %s" % (metric[0], p, t, got)
                    self.assertEqual(a is None, b is None, where)
                    if b is not None:
                        self.assertTrue(a == b or abs(a - b) < 2e-5, where)

    def test_one_pixel(self):
        for metric in self.METRICS:
            small = metric[0] in ("ssim", "cells")
            got = self.values(metric, flat(self.WHITE, 1, 1), flat(self.WHITE, 1, 1), code=int(small),
                              err=["pixels are less than"] if small else None)
            self.assertEqual(small, isinstance(got[0], str))

    def test_other_sizes(self):
        """Refused, or scaled; alpha changes nothing; a missing partner is one for every metric."""
        for folder in ("p", "t", "q"):
            os.mkdir(self.path(folder))
        alpha = png(40, 36, (b"\0" + bytes((200, 90, 30, 7)) * 40) * 36)
        alpha = alpha[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 36, 8, 6, 0, 0, 0)) + alpha[33:]
        for metric in self.METRICS:
            self.values(metric, flat(self.BLACK, 20, 18), flat(self.BLACK), code=1, err=["20 x 18 pixels"])
            self.score(metric[0], "p.png", "t.png", *metric[1:], "--scale")
            self.assertEqual(self.values(metric, alpha, flat((200, 90, 31))),
                             self.values(metric, flat((200, 90, 30)), flat((200, 90, 31))), metric)
            for name in ("p/1.png", "t/1.png", "t/2.png"):
                self.put(name, flat(self.BLACK))
            self.score(metric[0], "p", "t", *metric[1:], code=1, err=["t/2.png has no predicted image"])
            self.score(metric[0], "q", "t", *metric[1:], code=1, err=["q: "])

    def test_half_a_box(self):
        """Boxes that overlap by a third hit nothing at 0.5; by three quarters they do."""
        def box(x0):
            rows = [bytearray(3 * 96) for _ in range(64)]
            for y in range(10, 51):
                for x in range(x0, x0 + 46):
                    if y < 13 or y > 47 or x < x0 + 3 or x > x0 + 42:
                        rows[y][3 * x:3 * x + 3] = b"\xff\0\0"
            return png(96, 64, b"".join(b"\0" + row for row in rows))
        for move, iou, ap in ((20, 1 / 3, 0), (5, 35 / 45, 1), (0, 1, 1)):
            self.put("p.png", box(10 + move)), self.put("t.png", box(10))
            got = self.score("boxes", "p.png", "t.png")
            self.assertAlmostEqual(got[0]["iou"], iou, delta=EXACT)
            self.assertAlmostEqual(got[-1]["ap50"], ap, delta=EXACT)


class Rendered(Score):
    """Figures of examples/scenes.c, which have dots on their joints, against those that stand in its
    keypoints.json, drawn as limbs: moved by 1.5 pixels less than what counts nearly all points are
    right, by 1.5 more nearly none."""

    def limbs(self, side, points):
        rows = [bytearray(3 * side) for _ in range(side)]
        for (a, b), color in zip(OPENPOSE, COLORS):
            if points[a] is None or points[b] is None:
                continue
            (ax, ay), (bx, by) = points[a], points[b]
            dx, dy = bx - ax, by - ay
            for y in range(max(0, int(min(ay, by)) - 4), min(side, int(max(ay, by)) + 5)):
                for x in range(max(0, int(min(ax, bx)) - 4), min(side, int(max(ax, bx)) + 5)):
                    along = ((x + .5 - ax) * dx + (y + .5 - ay) * dy) / (dx * dx + dy * dy + 1e-9)
                    along = min(max(along, 0), 1)
                    if math.hypot(x + .5 - ax - along * dx, y + .5 - ay - along * dy) <= 3.2:
                        rows[y][3 * x:3 * x + 3] = bytes(color)
        return png(side, side, b"".join(b"\0" + row for row in rows))

    def test_figures(self):
        scenes = os.path.abspath(os.environ.get("SCENES", os.path.join(TOP, "build", "scenes")))
        if "SCENES" not in os.environ:
            subprocess.run(["make", "-s", "build/scenes"], cwd=TOP, check=True)
        subprocess.run([scenes, self.path("world"), "--kind", "keypoints", "--count", "12", "-q"], check=True,
                       stdout=subprocess.DEVNULL)
        with open(self.path("world/keypoints.json")) as f:
            world = json.load(f)
        names = {image["id"]: os.path.basename(image["file_name"]) for image in world["images"]}
        for folder in ("near", "far"):
            os.mkdir(self.path(folder))
        for figure in world["annotations"]:
            coco = [figure["keypoints"][i:i + 3] for i in range(0, 51, 3)]
            points = [tuple(coco[i][:2]) if coco[i][2] > 0 else None for i in OPENPOSE_OF_COCO]
            points[1] = tuple((u + v) / 2 for u, v in zip(points[2], points[5])) if points[2] and points[5] else None
            seen = [point for point in points if point is not None]
            side = max(max(p[k] for p in seen) - min(p[k] for p in seen) for k in (0, 1))
            way = 1 if sum(p[0] for p in seen) < 128 * len(seen) else -1
            for folder, more in (("near", -1.5), ("far", 1.5)):
                moved = [p and (p[0] + way * (0.1 * side + more), p[1]) for p in points]
                self.put("%s/%s" % (folder, names[figure["image_id"]]), self.limbs(256, moved))
        share = lambda folder: self.score("pck", folder, "world/poses", "--skeleton", "18")[-1]["pck_0.1_all"]
        self.assertGreater(share("near"), 0.85)
        self.assertLess(share("far"), 0.1)


class Partners(Score):
    def setUp(self):
        super().setUp()
        for folder in ("p", "t"):
            os.mkdir(self.path(folder))
        for name in ("1", "2", "10"):
            self.put("p/%s.png" % name, image(int(name)))
            self.put("t/%s.png" % name, image(int(name) + 1))

    def test_natural_order_and_text(self):
        lines = self.score("mse", "p", "t")
        self.assertEqual([line.get("image") for line in lines], ["1", "2", "10", None])
        text = self.lines("score", "mse", "p", "t", "--per-image")
        self.assertEqual([line.split()[0] for line in text], ["image", "1", "2", "10", "mse", "mse_x3", "mse_imagenet"])
        self.assertIn("mean of 3 images", text[-1])
        self.assertEqual(len(self.lines("score", "psnr", "p", "t")), 2)

    def test_missing_partner(self):
        os.remove(self.path("p/2.png"))
        self.put("p/x.png", image(5))
        lines = self.score("mse", "p", "t", code=1, err=["t/2.png has no predicted image", "p/x.png has no true image"])
        self.assertEqual([("error" in line) for line in lines], [False, True, False, True, False])
        self.assertEqual((lines[-1]["images"], lines[-1]["failed"]), (2, 2))

    def test_other_size(self):
        self.put("p/2.png", flat((9, 9, 9), 20, 18))
        self.put("t/2.png", flat((9, 9, 9)))
        lines = self.score("psnr", "p", "t", code=1, err=["p/2.png has 20 x 18 pixels, t/2.png 40 x 36", "--scale"])
        self.assertEqual(lines[-1]["failed"], 1)
        self.assertEqual(self.score("psnr", "p", "t", "--scale")[1]["psnr"], math.inf)

    def test_damaged(self):
        self.put("p/2.png", b"no image")
        lines = self.score("psnr", "p", "t", code=1, err=["p/2.png is text, no image"])
        self.assertEqual(lines[-1]["images"], 2)
        self.put("p/1.png", b""), self.put("p/10.png", b"")
        self.score("psnr", "p", "t", code=1, err=["nothing was measured"])

    def test_one_name_twice(self):
        shutil.copy(self.path("p/1.png"), self.path("p/1.jpg"))
        self.bad(1, "two images of one name", "score", "psnr", "p", "t")

    def test_two_images(self):
        lines = self.score("mse", "p/1.png", "t/1.png")
        self.assertEqual(lines[0]["mse"], self.score("mse", "p", "t")[0]["mse"])
        self.bad(1, "nowhere.png", "score", "mse", "nowhere.png", "t/1.png")
        self.bad(1, "is a folder", "score", "mse", "p/1.png", "t")
        self.bad(1, "nowhere: ", "score", "mse", "p", "nowhere")
        self.bad(1, "nowhere: No such file", "score", "psnr", "nowhere", "t")

    def test_set(self):
        """Lines as batch reads them, outputs below the folder of predictions."""
        lines = [{"input": [], "output": "1.jpg", "target": ["t/1.png"]},
                 {"input": [], "output": "2.png", "target": "t/2.png"},
                 {"output": "nowhere.png", "target": ["t/1.png"]}, {"target": ["t/1.png"]},
                 {"output": "1.png", "target": ["t/1.png", "t/2.png"]}, {"output": "../1.png", "target": ["t/1.png"]}]
        self.put("set.jsonl", ("\n".join(map(json.dumps, lines)) + "\n{\n").encode())
        got = self.score("mse", "p", "set.jsonl", code=1, err=[
            "line 3: p/nowhere.png", "line 4: has no \"output\"", "line 5: has not one image", "line 6: output \"../1.png\"",
            "line 7: "])
        want = self.score("mse", "p", "t")
        self.assertEqual([line.get("mse") for line in got[:2]], [line["mse"] for line in want[:2]])
        self.assertEqual((got[-1]["images"], got[-1]["failed"]), (2, 5))

    def test_metrics_and_options(self):
        for args, words in ((("psnr", "p"), "give a metric"), (("pnsr", "p", "t"), "no such metric: pnsr"),
                            (("cells", "p", "t"), "--grid W,H"), (("psnr", "p", "t", "--grid", "3,3"), "belongs to cells"),
                            (("cells", "p", "t", "--grid", "0,3"), "--grid"), (("cells", "p", "t", "--grid", "3"), "--grid"),
                            (("pck", "p", "t", "--skeleton", "16"), "15|18"), (("psnr", "p", "t", "-o", "x"), "-o"),
                            (("protocol", "vp-segmentation", "p"), "give a protocol"),
                            (("protocol", "vp", "p", "t"), "no such protocol")):
            self.bad(2, words, "score", *args)

    def test_palette(self):
        for text, words in (("", "no colour stands there"), ("1 2\n", "line 1: no colour"), ("\n1 2 256\n", "line 2"),
                            ("1 2 3\0\n", "zero byte"),
                            ("#12345g\n", "line 1"), ("#12345\n", "line 1"), ("1 2 3x\n", "line 1"),
                            ("1 2 3\n#010203\n", "line 2: the colour stands twice"),
                            ("".join("%d 0 1\n%d 1 1\n" % (i, i) for i in range(129)), "more than 256 colours")):
            self.put("palette", text.encode())
            self.bad(1, words, "score", "miou", "p", "t", "--palette", "palette")
        self.bad(1, "nowhere", "score", "miou", "p", "t", "--palette", "nowhere")
        self.score("miou", "p", "t", code=1, err=["no flat colours"])

    def test_too_small(self):
        for folder in ("p", "t"):
            self.put("%s/1.png" % folder, flat((1, 2, 3), 10, 30))
        self.score("ssim", "p", "t", code=1, err=["t/1.png: 10 x 30 pixels are less than a window"])
        self.score("cells", "p/1.png", "t/1.png", "--grid", "11,3", code=1, err=["11 x 3 cells"])

    def test_depth_ramp(self):
        """A ramp of colours is depth from 1 on, whatever their luma."""
        self.put("palette", b"0 0 255\n255 0 0\n0 255 0\n")
        half = lambda a, b: png(8, 2, (b"\0" + bytes(a) * 4 + bytes(b) * 4) * 2)
        self.put("a.png", half((255, 0, 0), (255, 0, 0)))
        self.put("b.png", half((0, 0, 255), (0, 255, 0)))
        got = self.score("depth", "a.png", "b.png", "--palette", "palette")[0]
        self.assertAlmostEqual(got["abs_rel"], (1 + 1 / 3) / 2, delta=EXACT)       # 2 for 1 and for 3
        self.assertEqual(got["delta_1.25"], 0)


class Protocols(Score):
    def setUp(self):
        super().setUp()
        self.data = os.path.join(GOLDEN, "protocols")

    def run_list(self, text, protocol="vp-detection", code=1, words=()):
        self.put("list", text)
        if not os.path.isdir(self.path("answers")):
            os.mkdir(self.path("answers"))
        return self.score("protocol", protocol, "answers", "list", "--base", os.path.join(self.data, "voc"),
                          code=code, err=words)

    def test_lists(self):
        for text, words in ((b"q s 1 9 9 0 0 3 3 9 9 0 0 3 3\n", "does not begin with"), (b"# vp-segmentation\n", "does not begin"),
                            (b"# vp-detection\nq\n", "line 2: the names"), (b"# vp-detection\nq s 1 9 9 0 0 3 3 9 9 0 0 3\n", "missing"),
                            (b"# vp-detection\nq s 1 9 9 0 0 3 3 9 9 0 0 3 3 4\n", "more stands"),
                            (b"# vp-detection\nq s 1 9 9 0 0 3 -3 9 9 0 0 3 3\n", "a number should"),
                            (b"# vp-detection\nq s 1 9 9 0 0 10 3 9 9 0 0 3 3\n", "a box is empty"),
                            (b"# vp-detection\nq s 21 9 9 0 0 3 3 9 9 0 0 3 3\n", "a class is"),
                            (b"# vp-detection\nq s\0 1 9 9 0 0 3 3 9 9 0 0 3 3\n", "zero byte"), (b"# vp-detection\n\n", "nothing was measured")):
            self.run_list(text, words=[words])

    def test_missing_answer(self):
        line = b"q s 1 20 10 2 2 9 9 9 9 0 0 3 3\n"
        self.put("answers.txt", b"")
        os.mkdir(self.path("answers"))
        self.put("answers/1.png", flat((255, 255, 255), 111, 111))
        got = self.run_list(b"# vp-detection\n" + line * 2, words=["0.png", "1 of 2 episodes"])
        self.assertEqual((got[-1]["images"], got[-1]["failed"]), (1, 1))
        self.assertAlmostEqual(got[-1]["iou"], 49 / 200, delta=0.02)

    def test_prompts(self):
        """-o writes what a model is asked; the written true answer of a support is that of a query."""
        for kind, base in (("segmentation", "voc"), ("colorization", "imagenet")):
            self.lines("score", "protocol", "vp-" + kind, os.path.join(self.data, kind + ".txt"), "-o", kind,
                       "--base", os.path.join(self.data, base))
            names = sorted(os.listdir(self.path(kind)))
            with open(self.path(kind + "/prompts.jsonl")) as f:
                lines = [json.loads(line) for line in f]
            self.assertEqual(lines[1], {"input": ["1-1.png", "1-2.png", "1-3.png"], "output": "1.png"})
            self.assertEqual(len(names), 3 * len(lines) + 1)
        os.mkdir(self.path("own"))
        shutil.copy(self.path("colorization/1-2.png"), self.path("own/0.png"))     # episode 0's own answer
        with open(os.path.join(self.data, "colorization.txt")) as f:
            head = "".join(f.readlines()[:2])
        self.put("list", head.encode())
        got = self.score("protocol", "vp-colorization", "own", "list", "--base", os.path.join(self.data, "imagenet"))
        self.assertEqual(got[0]["mse_x3"], 0)
        self.assertLess(got[0]["mse_imagenet"], 3e-4)         # the published program cuts true values


class Lists(Case):
    """examples/protocol_lists.py; that it draws as NumPy does was checked when it was written."""

    def draw(self, *args, code=0):
        run = subprocess.run([sys.executable, os.path.join(TOP, "examples/protocol_lists.py"), *args],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        self.assertEqual(run.returncode, code, run.stderr)
        return run.stdout.decode().splitlines()

    def test_generator(self):
        """numpy.random.RandomState(5): permutation(10), choice(1000) three times; RandomState(0): permutation(7)."""
        sys.path.insert(0, os.path.join(TOP, "examples"))
        sys.dont_write_bytecode = True
        from protocol_lists import Legacy
        five = Legacy(5)
        self.assertEqual(five.permutation(10), PERMUTATION_5)
        self.assertEqual([five.below(1000) for _ in range(3)], CHOICES_5)
        self.assertEqual(Legacy(0).permutation(7), PERMUTATION_0)

    def test_segmentation(self):
        os.makedirs(self.path("code/evaluate/splits/pascal/val"))
        names = ["2007_%06d__%02d" % (i, 1 + i % 3) for i in range(12)]
        self.put("code/evaluate/splits/pascal/val/fold2.txt", ("\n".join(names) + "\n").encode())
        lines = self.draw("vp-segmentation", "--program", self.path("code"), "--fold", "2")
        self.assertEqual((lines[0], len(lines)), ("# vp-segmentation", 1001))
        for i, line in enumerate(lines[1:]):
            query, support, number = line.split()
            self.assertEqual(query + "__%02d" % int(number), names[i % 12])
            self.assertIn("%s__%02d" % (support, int(number)), names)
            self.assertNotEqual(query, support)
        self.draw("vp-segmentation", code=2)
        self.draw("vp-segmentation", "--program", self.path("nowhere"), code=1)


class Report(Case):
    """docs/evaluation.md holds what is measured: all floors, which need no model, and a ceiling."""

    def test_report(self):
        sys.path.insert(0, TESTS)
        sys.dont_write_bytecode = True
        import evaluate
        with open(os.path.join(TOP, "docs/evaluation.md")) as f:
            rows = [evaluate.read_row(line) for line in f if " / **" in line and line.startswith("| ")]
        folders = {entry.name for entry in os.scandir(os.path.join(TOP, "prompt")) if entry.is_dir()}
        self.assertEqual({row[0] for row in rows}, folders - {"truth"})
        for task, queries, values in rows:
            lines = evaluate.prompt_lines(task, queries)
            metrics = [metric[:3] for metric in evaluate.ALL + evaluate.OWN.get(task, [])]
            self.assertEqual((len(lines), sorted(values)), (queries, sorted(value for _, _, value in metrics)), task)
            for name, at in (("floor", lambda line: line[0][-1]), ("truth", lambda line: line[1])):
                os.makedirs(self.path("%s/%s" % (task, name)))
                for i, line in enumerate(lines):
                    shutil.copy(at(line), self.path("%s/%s/%d.png" % (task, name, i)))
            for metric, options, value in metrics:
                floor, _, ceiling = values[value]
                got = self.measure(task, "floor", metric, options, value)
                self.assertEqual(floor, evaluate.shown(got), (task, value))
                if task == "depth":            # its last digits depend on the instruction set
                    self.through_the_tokenizer()
                    got = self.measure(task, "ceiling", metric, options, value)
                    self.assertAlmostEqual(float(ceiling), got, delta=0.01 * abs(got))

    def measure(self, task, folder, metric, options, value):
        lines = self.lines("score", metric, "%s/%s" % (task, folder), task + "/truth", "--json", *options)
        return json.loads(lines[-1])[value]

    def through_the_tokenizer(self):
        if not os.path.isdir(self.path("depth/ceiling")):
            os.mkdir(self.path("depth/ceiling"))
            for name in os.listdir(self.path("depth/truth")):
                self.lines("encode", WEIGHTS, "depth/truth/" + name, "-o", "tokens")
                self.lines("decode", WEIGHTS, "tokens", "-o", "depth/ceiling/" + name)

    def test_what_is_asked(self):
        """evaluation.xz: 24 puzzles, eight pairs a task with those of prompt/, each image whole."""
        sys.path.insert(0, TESTS)
        import evaluate
        with open(evaluate.write_puzzles(self.path("puzzles"))) as f:
            lines = [json.loads(line) for line in f]
        self.assertEqual([(len(line["input"]), len(line["choices"])) for line in lines], [(8, 8)] * 24)
        for line in lines:
            self.assertEqual(len({read(self.path("puzzles/" + name)) for name in line["choices"]}), 8)
        _, _, tokens = evaluate.read_extra()
        for task, more in tokens.items():
            self.assertTrue(all(len(ids) == 256 and max(ids) < 8192 for ids in more))
            if task:
                self.assertIn(len(more), (16, 16 - len(evaluate.whole_prompt(task))))


OPENPOSE = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
            (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)]
COLORS = [(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
          (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
          (170, 0, 255), (255, 0, 255), (255, 0, 170)]
OPENPOSE_OF_COCO = [0, 0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]     # the neck is replaced
PERMUTATION_5, CHOICES_5, PERMUTATION_0 = [9, 5, 2, 4, 7, 1, 0, 8, 6, 3], [624, 670, 720], [6, 2, 1, 3, 0, 5, 4]

if __name__ == "__main__":
    unittest.main()
