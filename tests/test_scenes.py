#!/usr/bin/env python3
"""Tests of examples/scenes.c: python3 tests/test_scenes.py. Standard library, cc, make.

Every kind at a small size: the same bytes with any number of threads, held-out items apart from all
others, and annotations that agree with the pictures: depths and normals with planes and balls in
closed form, boxes and key points with masks, moves with a search of their own, matrices with rules
found anew. PNG files are read by a decoder here, by zlib, and by lvm.

SCENES names the program (made by make where it is not given), LVM lvm.
"""

import glob
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib

TESTS = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(TESTS)
LVM = os.path.abspath(os.environ.get("LVM", os.path.join(TOP, "lvm")))
SCENES = os.path.abspath(os.environ.get("SCENES", os.path.join(TOP, "build", "scenes")))
BOTH = os.path.join(TESTS, "golden", "both")
TIMEOUT = 300
ANNOTATIONS = ["depth", "normals", "segmentation", "edges", "lines"]
BALL, FIGURE, GROUND, SKY = 1, 5, 6, 0
LAYOUT = {                     # folders and lists of each kind
    "single": ["images"], "category": ["ball", "box", "cylinder", "cone", "figure"],
    "video": ["videos"], "views": ["views", "cameras.jsonl"],
    "depth": ["images", "depth", "cameras.jsonl"],
    "normals": ["images", "normals", "cameras.jsonl"],
    "segmentation": ["images", "segmentation"], "edges": ["images", "edges"],
    "lines": ["images", "lines"], "tuples": ["images", "cameras.jsonl"] + ANNOTATIONS,
    "annotated": ["images", "cameras.jsonl"] + ANNOTATIONS,
    "boxes": ["images", "boxes", "instances.json"],
    "keypoints": ["images", "poses", "keypoints.json"], "puzzle": ["images", "layout.txt"],
    "counting": ["images", "layout.txt"], "raven": ["panels", "layout.txt", "choices.jsonl"],
    "maze": ["images", "layout.txt", "boards.txt"], "lake": ["images", "layout.txt", "boards.txt"]}
PAIRS = ["depth", "normals", "segmentation", "edges", "lines"]
PUZZLES = ["puzzle", "counting", "raven", "maze", "lake"]


def setUpModule():
    global PLACE
    if "SCENES" not in os.environ:
        subprocess.run(["make", "-s", "build/scenes"], cwd=TOP, check=True, timeout=TIMEOUT)
    PLACE = tempfile.TemporaryDirectory(prefix="test_scenes.")


def tearDownModule():
    PLACE.cleanup()


def run(*args, **kwargs):
    """(status, stdout, stderr) of the program."""
    done = subprocess.run([SCENES] + [str(a) for a in args], timeout=TIMEOUT, cwd=PLACE.name,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, **kwargs)
    return done.returncode, done.stdout, done.stderr


def world(kind, count, *options):
    """The folder that the program made; each is made once."""
    words = [kind, str(count)] + [str(o) for o in options]
    out = os.path.join(PLACE.name, "_".join(words).replace("--", ""))
    if not os.path.exists(out):
        status, said, error = run(out, "--kind", kind, "--count", count, "-q", *options)
        assert (status, said, error) == (0, out + "\n", ""), (words, status, said, error)
    return out


def small(kind):
    """Five items that many tests look at."""
    return world(kind, 5, "--size", 48, "--frames", 8, "-j", 1)


def read(*names):
    with open(os.path.join(*names), "rb") as f:
        return f.read()


def lines_of(*names):
    return read(*names).decode().splitlines()


def tree(folder):
    """Name -> digest of every file."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            full = os.path.join(path, name)
            found[os.path.relpath(full, folder)] = hashlib.sha256(read(full)).hexdigest()
    return found


class Png:
    """An 8-bit PNG of the colour types 0, 2 and 3: rows of samples, the palette."""

    def __init__(self, *names):
        data, at, packed, self.palette = read(*names), 8, b"", None
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        while at < len(data):
            size, kind = struct.unpack(">I4s", data[at:at + 8])
            body = data[at + 8:at + 8 + size]
            assert struct.unpack(">I", data[at + 8 + size:at + 12 + size])[0] == \
                zlib.crc32(kind + body), (names, kind)
            if kind == b"IHDR":
                self.side, height, depth, self.type, *rest = struct.unpack(">IIBBBBB", body)
                assert height == self.side and depth == 8 and rest == [0, 0, 0]
            elif kind == b"PLTE":
                self.palette = [tuple(body[i:i + 3]) for i in range(0, size, 3)]
            elif kind == b"IDAT":
                packed += body
            at += 12 + size
        assert kind == b"IEND" and at == len(data)
        self.channels = {0: 1, 2: 3, 3: 1}[self.type]
        self.rows = self.unfilter(zlib.decompress(packed))

    def unfilter(self, raw):
        n, rows = self.side * self.channels, [bytes(self.side * self.channels)]
        assert len(raw) == self.side * (n + 1)
        for y in range(self.side):
            kind, row = raw[y * (n + 1)], bytearray(raw[y * (n + 1) + 1:(y + 1) * (n + 1)])
            assert kind in (1, 2)
            for i in range(n):
                left = row[i - self.channels] if i >= self.channels else 0
                row[i] = (row[i] + (left if kind == 1 else rows[-1][i])) & 255
            rows.append(bytes(row))
        return rows[1:]

    def __getitem__(self, place):
        """The sample or colour at (x, y); of a palette its number."""
        x, y = place
        if self.channels == 1:
            return self.rows[y][x]
        return tuple(self.rows[y][3 * x:3 * x + 3])

    def pixels(self):
        return ((x, y) for y in range(self.side) for x in range(self.side))

    def colour(self, place):
        value = self[place]
        return self.palette[value] if self.type == 3 else value


def neighbours(place, side):
    x, y = place
    near = ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1))
    return [(u, v) for u, v in near if 0 <= u < side and 0 <= v < side]


def components(places, side):
    """Sets of neighbouring places."""
    left, found = set(places), []
    while left:
        todo, part = [left.pop()], set()
        while todo:
            place = todo.pop()
            part.add(place)
            for near in neighbours(place, side):
                if near in left:
                    left.remove(near)
                    todo.append(near)
        found.append(part)
    return found


class Kinds(unittest.TestCase):
    def test_table(self):
        """--help names every kind that is tested here, and no other."""
        status, out, err = run("--help")
        self.assertEqual((status, err), (0, ""))
        table = out.split("is in OUT:\n\n")[1].split("\n\n")[0].splitlines()
        self.assertEqual([line.split()[0] for line in table], list(LAYOUT))
        self.assertLessEqual(max(map(len, out.splitlines())), 100)

    def test_any_threads_same_bytes(self):
        for kind, names in LAYOUT.items():
            with self.subTest(kind):
                one = small(kind)
                many = world(kind, 5, "--size", 48, "--frames", 8, "-j", 3)
                self.assertEqual(sorted(os.listdir(one)), sorted(names))
                self.assertEqual(tree(one), tree(many))

    def test_batches_are_no_matter(self):
        """More items than a batch holds: the first are those of a short run, lists in order."""
        long = world("keypoints", 600, "--size", 32)
        short = tree(world("keypoints", 3, "--size", 32) + "/images")
        self.assertEqual(len(os.listdir(long + "/poses")), 600)
        self.assertEqual({n: d for n, d in tree(long + "/images").items() if n in short}, short)
        coco = json.loads(read(long, "keypoints.json").decode())
        self.assertEqual([a["image_id"] for a in coco["annotations"]], list(range(600)))

    def test_every_picture_decodes(self):
        for kind in LAYOUT:
            folder = small(kind)
            files = glob.glob(folder + "/**/*.png", recursive=True)
            for path in sorted(files)[::max(1, len(files) // 40)]:
                with self.subTest(path):
                    png = Png(path)
                    self.assertEqual(png.side, 48)
                    self.assertGreaterEqual(len({png[p] for p in png.pixels()}), 2)

    def test_large_and_odd_sizes(self):
        for size in (33, 257, 600):
            folder = world("single", 1, "--size", size)
            self.assertEqual(Png(folder, "images/000000.png").side, size)

    def test_layouts(self):
        """Annotations have the names of their pictures, videos and objects all their frames."""
        for kind in PAIRS + ["tuples", "annotated", "boxes", "keypoints"]:
            folder = small(kind)
            names = {name: sorted(os.path.relpath(p, os.path.join(folder, name)) for p in glob.glob(
                os.path.join(folder, name, "**/*.png"), recursive=True))
                for name in LAYOUT[kind] if "." not in name}
            for name in names.values():
                self.assertEqual(name, names["images"])
            self.assertEqual(len(names["images"]), 40 if kind == "annotated" else 5)
        videos = world("video", 2, "--size", 32, "--frames", 30)
        self.assertEqual(sorted(os.listdir(videos + "/videos/000001")),
                         ["%03d.png" % i for i in range(30)])
        views = small("views")
        self.assertEqual(sorted(os.listdir(views + "/views/000004")),
                         ["%03d.png" % i for i in range(24)])
        classes = small("category")
        for i, name in enumerate(LAYOUT["category"]):
            self.assertEqual(os.listdir(os.path.join(classes, name)), ["%06d.png" % i])

    def test_lvm_reads_them(self):
        """lvm's own reader takes the three colour types; a palette gives its colours."""
        if not os.path.exists(LVM):
            self.skipTest("there is no lvm")
        model = os.path.join(PLACE.name, "both.bin")
        subprocess.run([sys.executable, os.path.join(TOP, "convert.py"), "-o", model, "--llama",
                        BOTH + "/llama", "--vqgan", BOTH + "/vqgan"], check=True, timeout=TIMEOUT,
                       stdout=subprocess.DEVNULL)
        folder = small("tuples")
        copies = []
        for name in ["images"] + ANNOTATIONS:
            png = Png(folder, name, "000000.png")
            copies.append(os.path.join(PLACE.name, name + ".ppm"))
            with open(copies[-1], "wb") as f:
                f.write(b"P6\n48 48\n255\n")
                for place in png.pixels():
                    colour = png.colour(place)
                    f.write(bytes(colour if isinstance(colour, tuple) else (colour,) * 3))
        files = [os.path.join(folder, name, "000000.png") for name in ["images"] + ANNOTATIONS]
        ids = [subprocess.run([LVM, "encode", model] + these, check=True, timeout=TIMEOUT,
                              stdout=subprocess.PIPE).stdout for these in (files, copies)]
        self.assertEqual(len(ids[0].split(b"\n")), 1 + len(files))
        self.assertEqual(ids[0], ids[1])


class HeldOut(unittest.TestCase):
    def test_pictures_apart(self):
        """No picture of the held-out world is one of the other, under the same seeds or others."""
        for kind in LAYOUT:
            if kind in PUZZLES:
                continue
            sides = []
            for side in ([], ["--held-out"]):
                pictures = set()
                for seed in (1, 2):
                    found = tree(world(kind, 5, "--size", 32, "--frames", 3, "--seed", seed,
                                       *side))
                    pictures |= {d for name, d in found.items() if name.startswith(
                        (LAYOUT[kind][0], "box/", "cone/", "cylinder/", "figure/"))}
                self.assertGreaterEqual(len(pictures), 9, kind)
                sides.append(pictures)
            self.assertFalse(sides[0] & sides[1], kind)

    def sentences(self, kind, count, seed, *side):
        """What tells each sentence from others: where its first two pictures and its last one
        differ from the paper, and the darkest colour."""
        folder = world(kind, count, "--size", 32, "--seed", seed, *side)
        found = []
        for line in lines_of(folder, "layout.txt"):
            names = line.replace("*", "").split()
            pictures = [Png(folder, name) for name in names[:2] + names[-1:]]
            found.append(tuple((tuple(p[q] != p[0, 0] for q in p.pixels()),
                                min(p[q] for q in p.pixels())) for p in pictures))
        return set(found)

    def test_counting_apart(self):
        """There are only some thousand puzzles of counting: seeds meet, but only on one side."""
        a, b = (self.sentences("counting", 120, seed) for seed in (1, 2))
        held = self.sentences("counting", 120, 1, "--held-out")
        self.assertFalse((a | b) & held)
        self.assertGreater(len(held), 60)

    def test_matrices_apart(self):
        a, b = (set(lines_of(world("raven", 4000, "--size", 32, *side), "layout.txt"))
                for side in ([], ["--held-out"]))
        self.assertFalse(a & b)
        self.assertGreater(len(b), 3900)

    def test_boards_apart(self):
        for kind in ("maze", "lake"):
            boards = []
            for side in ([], ["--held-out"]):
                lines = lines_of(world(kind, 80, "--size", 32, *side), "boards.txt")
                boards.append({line.split("\t")[0].replace("S", ".") for line in lines})
            self.assertFalse(boards[0] & boards[1], kind)
            self.assertGreater(len(boards[1]), 70)


class Geometry(unittest.TestCase):
    SIDE = 64

    def setUp(self):
        self.folder = world("tuples", 12, "--size", self.SIDE)
        self.cameras = [json.loads(line) for line in lines_of(self.folder, "cameras.jsonl")]
        self.assertEqual([c["image"] for c in self.cameras], ["%06d.png" % i for i in range(12)])

    def open(self, i):
        return {name: Png(self.folder, name, "%06d.png" % i) for name in ANNOTATIONS}

    def ray(self, camera, place):
        """The ray of a pixel's centre; its length along the view is 1."""
        import math
        slope = math.tan(camera["field"] / 2)
        x, y = (2 * (p + .5) / self.SIDE - 1 for p in place)
        return [f + slope * (x * r - y * u) for f, r, u in
                zip(camera["forward"], camera["right"], camera["up"])]

    def test_ground_and_sky(self):
        """The ground is the plane y = 0: depth and normals in closed form, at every pixel."""
        checked = 0
        for i, camera in enumerate(self.cameras):
            png = self.open(i)
            near, far = 1 / camera["near"], 1 / camera["far"]
            normal = [camera["right"][1], camera["up"][1], -camera["forward"][1]]
            for place in png["depth"].pixels():
                kind, depth = png["segmentation"][place], png["depth"][place]
                down = -self.ray(camera, place)[1]
                if kind == SKY:
                    self.assertEqual((depth, png["normals"][place]), (0, (128, 128, 128)))
                    self.assertLess(down, 1e-6 + camera["eye"][1] / 39)
                if kind != GROUND:
                    continue
                value = 255 * (down / camera["eye"][1] - far) / (near - far)
                self.assertAlmostEqual(depth, min(max(value, 0), 255), delta=.51)
                for a, b in zip(png["normals"][place], normal):
                    self.assertAlmostEqual(a, 127.5 + 127.5 * b, delta=.51)
                checked += 1
        self.assertGreater(checked, 10000)

    def test_balls(self):
        """A ball's points are centre + radius * normal: one centre and radius fit all pixels."""
        checked = 0
        for i, camera in enumerate(self.cameras):
            png = self.open(i)
            balls = [p for p in png["depth"].pixels() if png["segmentation"][p] == BALL
                     and not png["edges"][p]]
            for part in components(balls, self.SIDE):
                if len(part) < 60:
                    continue
                self.fit_ball(camera, png, part)
                checked += 1
        self.assertGreater(checked, 3)

    def fit_ball(self, camera, png, part):
        near, far = 1 / camera["near"], 1 / camera["far"]
        points, normals = [], []
        for place in part:
            z = 1 / (far + png["depth"][place] / 255 * (near - far))
            points.append([e + z * d for e, d in zip(camera["eye"], self.ray(camera, place))])
            seen = [v / 127.5 - 1 for v in png["normals"][place]]
            normals.append([seen[0] * r + seen[1] * u - seen[2] * f for r, u, f in
                            zip(camera["right"], camera["up"], camera["forward"])])
        n = len(points)
        mean = [[sum(v[k] for v in of) / n for k in range(3)] for of in (points, normals)]
        cross = square = 0
        for p, m in zip(points, normals):
            for k in range(3):
                cross += (p[k] - mean[0][k]) * (m[k] - mean[1][k])
                square += (m[k] - mean[1][k]) ** 2
        radius = cross / square
        self.assertTrue(.24 < radius < .5, radius)
        self.assertAlmostEqual(mean[0][1] - radius * mean[1][1], radius, delta=.03)  # it stands
        for p, m in zip(points, normals):
            for k in range(3):
                self.assertAlmostEqual(p[k], mean[0][k] + radius * (m[k] - mean[1][k]), delta=.045)

    def test_edges(self):
        """Every border of classes is an edge; at every edge something changes."""
        for i in range(6):
            png = self.open(i)
            for place in png["edges"].pixels():
                changes = {"class": 0, "other": 0}
                for near in neighbours(place, self.SIDE):
                    changes["class"] |= png["segmentation"][near] != png["segmentation"][place]
                    steps = [abs(a - b) for a, b in zip(png["normals"][near],
                                                        png["normals"][place])]
                    changes["other"] |= max(steps) > 3 or \
                        abs(png["depth"][near] - png["depth"][place]) > 2
                self.assertIn(png["edges"][place], (0, 255))
                if changes["class"]:
                    self.assertEqual(png["edges"][place], 255, place)
                if png["edges"][place]:
                    self.assertTrue(changes["class"] or changes["other"], (i, place))

    def test_styles(self):
        """A style is another palette: what a picture says is the same."""
        for kind, n in (("depth", 5), ("segmentation", 4), ("edges", 2)):
            pictures = [Png(world(kind, 2, "--size", 48, "--style", s), kind, "000001.png")
                        for s in range(n)]
            looks = {tuple(p.colour(q) for q in p.pixels()) for p in pictures}
            self.assertEqual(len(looks), n)
            turned = kind == "edges"
            self.assertEqual(pictures[1].rows, [bytes(255 - v for v in row) if turned else row
                                                for row in pictures[0].rows])
        self.assertEqual(pictures[0].palette, None)
        classes = Png(world("segmentation", 2, "--size", 48, "--style", 0), "segmentation",
                      "000000.png")
        self.assertEqual((classes.type, len(classes.palette)), (3, 7))

    def test_views(self):
        """24 steps of 15 degrees, radius 1.5 to 2.2, the same height."""
        import math
        lines = lines_of(small("views"), "cameras.jsonl")
        self.assertEqual(len(lines), 5 * 24)
        for i in range(0, len(lines), 24):
            eyes = [json.loads(line)["eye"] for line in lines[i:i + 24]]
            for (x, y, z), (u, v, w) in zip(eyes, eyes[1:] + eyes[:1]):
                self.assertTrue(1.4999 <= math.sqrt(x * x + y * y + z * z) <= 2.2001)
                turn = math.atan2(u, w) - math.atan2(x, z)
                self.assertAlmostEqual(turn % (2 * math.pi), math.pi / 12, delta=1e-4)
                self.assertAlmostEqual(y, v, delta=1e-6)


class Coco(unittest.TestCase):
    SIDE = 96

    def load(self, kind, name):
        folder = world(kind, 16, "--size", self.SIDE)
        coco = json.loads(read(folder, name).decode())
        self.assertEqual([i["file_name"] for i in coco["images"]],
                         sorted(os.listdir(folder + "/images")))
        ids = [a["id"] for a in coco["annotations"]]
        self.assertEqual(len(set(ids)), len(ids))
        for image in coco["images"]:
            self.assertEqual((image["width"], image["height"]), (self.SIDE, self.SIDE))
        self.assertEqual({a["image_id"] for a in coco["annotations"]},
                         {i["id"] for i in coco["images"]})
        return folder, coco

    def mask(self, annotation):
        """The places of a mask: run lengths column by column, 0s first."""
        counts, places, at, inside = annotation["segmentation"]["counts"], set(), 0, False
        self.assertEqual(annotation["segmentation"]["size"], [self.SIDE, self.SIDE])
        for count in counts:
            if inside:
                places |= {divmod(i, self.SIDE) for i in range(at, at + count)}
            at, inside = at + count, not inside
        self.assertEqual(at, self.SIDE ** 2)
        self.assertTrue(all(counts[1:]))
        return places

    def check_instance(self, annotation, mask):
        x, y, w, h = annotation["bbox"]
        self.assertEqual((x, y, x + w, y + h), (
            min(u for u, _ in mask), min(v for _, v in mask),
            max(u for u, _ in mask) + 1, max(v for _, v in mask) + 1))
        self.assertEqual(annotation["area"], len(mask))
        self.assertEqual(annotation["iscrowd"], 0)

    def test_boxes(self):
        folder, coco = self.load("boxes", "instances.json")
        names = {c["id"]: c["name"] for c in coco["categories"]}
        self.assertEqual(names, {1: "ball", 2: "box", 3: "cylinder", 4: "cone", 5: "figure"})
        self.assertEqual({a["category_id"] for a in coco["annotations"]}, set(names))
        for image in coco["images"]:
            found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            masks = [self.mask(a) for a in found]
            self.assertEqual(len(set().union(*masks)), sum(map(len, masks)))
            for annotation, mask in zip(found, masks):
                self.check_instance(annotation, mask)
            self.check_drawing(folder, image["file_name"], found)

    def check_drawing(self, folder, name, found):
        """The drawing is the picture, but for frames of one pixel around the boxes."""
        colours = {1: (255, 0, 0), 2: (0, 204, 0), 3: (26, 77, 255), 4: (255, 255, 0),
                   5: (255, 0, 255)}
        picture, drawn = Png(folder, "images", name), Png(folder, "boxes", name)
        frames = {}
        for a in found:
            x, y, w, h = a["bbox"]
            for place in [(u, v) for u in range(x - 1, x + w + 1) for v in (y - 1, y + h)] + \
                         [(u, v) for v in range(y - 1, y + h + 1) for u in (x - 1, x + w)]:
                frames[place] = colours[a["category_id"]]
        for place in picture.pixels():
            self.assertEqual(drawn[place], frames.get(place, picture[place]))

    COLOURS = {  # of OpenPose's points, by COCO's names
        "nose": (255, 0, 0), "right_shoulder": (255, 170, 0), "right_elbow": (255, 255, 0),
        "right_wrist": (170, 255, 0), "left_shoulder": (85, 255, 0), "left_elbow": (0, 255, 0),
        "left_wrist": (0, 255, 85), "right_hip": (0, 255, 170), "right_knee": (0, 255, 255),
        "right_ankle": (0, 170, 255), "left_hip": (0, 85, 255), "left_knee": (0, 0, 255),
        "left_ankle": (85, 0, 255), "right_eye": (170, 0, 255), "left_eye": (255, 0, 255),
        "right_ear": (255, 0, 170), "left_ear": (255, 0, 85)}

    def test_keypoints(self):
        folder, coco = self.load("keypoints", "keypoints.json")
        names = coco["categories"][0]["keypoints"]
        self.assertEqual(len(names), 17)
        seen = hidden = absent = 0
        for annotation in coco["annotations"]:
            mask = self.mask(annotation)
            self.check_instance(annotation, mask)
            name = "%06d.png" % annotation["image_id"]
            drawn, points = Png(folder, "poses", name), annotation["keypoints"]
            points = [tuple(points[i:i + 3]) for i in range(0, 51, 3)]
            self.assertEqual(sum(v > 0 for _, _, v in points), annotation["num_keypoints"])
            for (x, y, v), what in zip(points, names):
                if v == 0:
                    self.assertEqual((x, y), (0, 0))
                    absent += 1
                    continue
                place = int(x), int(y)
                crowded = any(w and 0 < abs(x - u) + abs(y - t) < 6 for u, t, w in points)
                if not crowded:
                    away = sum(abs(a - b) for a, b in zip(drawn[place], self.COLOURS[what]))
                    self.assertLess(away, 100, (name, what))
                hidden += v == 1
                seen += v == 2
                near = {(place[0] + i, place[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
                if v == 2:
                    self.assertTrue(near & mask, (name, what))
            left, right = points[names.index("left_eye")], points[names.index("right_eye")]
            if left[2] and right[2]:       # it looks at us: its left is on our right
                self.assertGreater(left[0], right[0])
            # Faces that look away have no nose; bodies are labelled all the same.
            self.assertTrue(all(p[2] for p in points[5:]) or min(mask)[0] == 0 or
                            max(mask)[0] == self.SIDE - 1 or
                            max(v for _, v in mask) == self.SIDE - 1, name)
        self.assertTrue(seen > 100 and hidden > 10 and absent > 10, (seen, hidden, absent))


class Puzzles(unittest.TestCase):
    def layout(self, kind, count, *options):
        folder = world(kind, count, *options)
        sentences = [line.split() for line in lines_of(folder, "layout.txt")]
        self.assertEqual(len(sentences), count)
        for sentence in sentences[:200]:
            for name in sentence:
                self.assertTrue(os.path.exists(os.path.join(folder, name.lstrip("*"))), name)
        return folder, sentences

    def test_counting(self):
        """The things in eight pictures: one or two more each time, or fewer."""
        folder, sentences = self.layout("counting", 8, "--size", 96)
        steps = set()
        for sentence in sentences:
            counts = []
            for name in sentence:
                png = Png(folder, name.lstrip("*"))
                paper = png[0, 0]
                dark = [p for p in png.pixels() if sum(map(lambda a, b: abs(a - b), png[p],
                                                           paper)) > 100]
                counts.append(len(components(dark, 96)))
            steps |= {b - a for a, b in zip(counts, counts[1:])}
            self.assertEqual(len({b - a for a, b in zip(counts, counts[1:])}), 1, counts)
            self.assertEqual([n[0] == "*" for n in sentence], [False] * 7 + [True])
        self.assertTrue(steps <= {-2, -1, 1, 2} and len(steps) > 2, steps)

    def test_progressions(self):
        """Two rows of eight; within each something changes at every step."""
        folder, sentences = self.layout("puzzle", 12, "--size", 48)
        for sentence in sentences:
            self.assertEqual([n[0] == "*" for n in sentence], [False] * 15 + [True])
            rows = [read(folder, n.lstrip("*")) for n in sentence]
            for i in list(range(7)) + list(range(8, 15)):
                self.assertNotEqual(rows[i], rows[i + 1])

    def read_board(self, line):
        rows, moves = line.split("\t")
        rows = rows.split(" ")
        self.assertEqual({len(row) for row in rows}, {len(rows)})
        cells = {(x, y): c for y, row in enumerate(rows) for x, c in enumerate(row)}
        start, = (p for p, c in cells.items() if c == "S")
        goal, = (p for p, c in cells.items() if c == "G")
        return cells, start, goal, moves

    def test_boards(self):
        """The moves lead to the goal, none is shorter, no other way is as short; each picture is
        the one before with the walker moved."""
        for kind in ("maze", "lake"):
            folder, sentences = self.layout(kind, 12, "--size", 90)
            for sentence, line in zip(sentences, lines_of(folder, "boards.txt")):
                cells, start, goal, moves = self.read_board(line)
                way = [start]
                for move in moves:
                    dx, dy = {"R": (1, 0), "L": (-1, 0), "D": (0, 1), "U": (0, -1)}[move]
                    way.append((way[-1][0] + dx, way[-1][1] + dy))
                    self.assertIn(cells[way[-1]], ".G")
                self.assertEqual(way[-1], goal)
                self.assertEqual(self.shortest(cells, start, goal), (len(moves), 1))
                self.assertEqual([n[0] == "*" for n in sentence], [False] + [True] * len(moves))
                self.check_states(folder, sentence, cells, way)

    def shortest(self, cells, start, goal):
        """Moves of the shortest way, and how many there are."""
        side = int(len(cells) ** .5)
        layer, seen, steps = {start: 1}, {start}, 0
        while goal not in layer:
            following = {}
            for place, ways in layer.items():
                for near in neighbours(place, side):
                    if near not in seen and cells[near] in ".G":
                        following[near] = following.get(near, 0) + ways
            self.assertTrue(following, "no way")
            seen |= set(following)
            layer, steps = following, steps + 1
        return steps, layer[goal]

    def check_states(self, folder, sentence, cells, way):
        n, png = int(len(cells) ** .5), [Png(folder, name.lstrip("*")) for name in sentence]

        def at(i):  # the middle of the cells in a row
            return int((i + .5) * 90 / n)
        plain = {}
        for (x, y), c in cells.items():
            if c in ".#O" and (x, y) not in way:
                plain.setdefault(c, set()).add(png[0][at(x), at(y)])
        for c, colours in plain.items():
            self.assertEqual(len(colours), 1, (sentence[0], c))
        self.assertEqual(len(set().union(*plain.values())), len(plain))
        for a, b, old, new in zip(png, png[1:], way, way[1:]):
            changed = {(int((x + .5) * n / 90), int((y + .5) * n / 90)) for x, y in a.pixels()
                       if a[x, y] != b[x, y]}
            self.assertEqual(changed, {old, new}, sentence[0])

    def panel(self, name):
        colour, shape, count, size = os.path.basename(name).split(".")[0].split("-")
        return colour, shape, int(count), int(size[4:])

    ORDER = ["red", "green", "blue", "yellow", "orange", "purple", "cyan", "black"]

    def answers(self, values):
        """All values of a ninth cell that a rule allows which holds in the first two rows."""
        rows, found = [values[:3], values[3:6], values[6:]], set()
        if all(len(set(row)) == 1 for row in rows[:2]) and rows[2][0] == rows[2][1]:
            found.add(rows[2][0])
        if set(rows[0]) == set(rows[1]) and len(set(rows[0])) == 3 and rows[0] != rows[1]:
            found |= set(rows[0]) - set(rows[2])
        if all(isinstance(v, int) for v in values):
            if all(row[1] - row[0] == 1 and row[2] - row[1] == 1 for row in rows[:2]) and \
                    rows[2][1] - rows[2][0] == 1:
                found.add(rows[2][1] + 1)
        return found

    def test_matrices(self):
        """Rules found anew give one answer, the one that is there, and one of eight choices."""
        folder, sentences = self.layout("raven", 4000, "--size", 32)
        self.assertEqual(len(os.listdir(folder + "/panels")), 1440)
        self.assertEqual(len(set(tree(folder + "/panels").values())), 1440)
        puzzles = [json.loads(line) for line in lines_of(folder, "choices.jsonl")]
        places = set()
        for sentence, puzzle in list(zip(sentences, puzzles))[::10]:
            self.assertEqual([n[0] == "*" for n in sentence], [False] * 8 + [True])
            self.assertEqual(puzzle["input"], sentence[:8])
            panels = [self.panel(name) for name in sentence]
            allowed = []
            for k in range(4):
                values = [self.ORDER.index(p[0]) if k == 0 else p[k] for p in panels]
                allowed.append(self.answers(values[:8]))
                self.assertEqual(allowed[-1], {values[8]}, sentence)
            right = [name for name in puzzle["choices"] if all(
                (self.ORDER.index(v) if k == 0 else v) in allowed[k]
                for k, v in enumerate(self.panel(name)))]
            self.assertEqual(right, [sentence[8][1:]])
            self.assertEqual(puzzle["choices"][puzzle["answer"]], right[0])
            self.assertEqual(len(set(puzzle["choices"])), 8)
            places.add(puzzle["answer"])
        self.assertEqual(places, set(range(8)))


class Failures(unittest.TestCase):
    def fails(self, status, words, *args, **kwargs):
        code, out, err = run(*args, **kwargs)
        self.assertEqual((code, out), (status, ""), err)
        self.assertIn(words, err)
        self.assertEqual(err.count("\n"), 1)
        self.assertTrue(err.startswith("scenes: "))

    def test_usage(self):
        for words, *args in (
                ("no folder", "--kind", "depth"), ("no --kind", "x"),
                ("there is no such kind", "x", "--kind", "deep"), ("needs a name", "x", "--kind"),
                ("one folder is enough", "x", "y"), ("no option --what", "x", "--what"),
                ("needs a number", "x", "--count"), ("--size 31", "x", "--size", "31"),
                ("--count 0", "x", "--count", "0"), ("--count 5x", "x", "--count", "5x"),
                ("--seed -1", "x", "--seed", "-1"), ("-j 257", "x", "-j", "257"),
                ("--count 99999999999999999999", "x", "--count", "99999999999999999999"),
                ("has no such style", "x", "--kind", "edges", "--style", "2"),
                ("has no such style", "x", "--kind", "maze", "--style", "1"),
                ("has no such style", "x", "--kind", "tuples", "--style", "4"),
                ("too long", "x" * 4050, "--kind", "maze")):
            self.fails(2, words, *args)
        self.assertFalse(os.path.exists(os.path.join(PLACE.name, "x")))

    def test_existing(self):
        folder = small("single")
        before = tree(folder)
        self.fails(1, "exists", folder, "--kind", "single")
        self.assertEqual(tree(folder), before)
        os.mkdir(os.path.join(PLACE.name, "left.part"))
        self.fails(1, "left.part: left by a run", "left", "--kind", "single")
        with open(os.path.join(PLACE.name, "file"), "w"):
            pass
        self.fails(1, "Not a directory", "file/x", "--kind", "single", "--count", "1")

    def test_full_disk(self):
        """What could not be written whole never gets its name."""
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        self.fails(1, "cannot write it", "full", "--kind", "single", "--count", "9",
                   preexec_fn=limit)
        self.fails(1, "cannot write it", "full2", "--kind", "boxes", "--count", "90", "--size",
                   "32", preexec_fn=limit)
        self.assertFalse({"full", "full2"} & set(os.listdir(PLACE.name)))

    def test_names(self):
        """Folders above OUT are made; slashes at its end do not matter; the summary counts."""
        code, out, err = run("a/b/c//", "--kind", "depth", "--count", "3", "--size", "32")
        self.assertEqual((code, out), (0, "a/b/c//\n"))
        self.assertTrue(err.startswith("3 of kind depth, 6 pictures of 32 x 32 in "), err)
        self.assertEqual(sorted(os.listdir(os.path.join(PLACE.name, "a/b"))), ["c"])


if __name__ == "__main__":
    unittest.main()
