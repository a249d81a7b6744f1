#!/usr/bin/env python3
"""Make tests/evaluation.xz, what `make evaluate` asks beside prompt/: 24 Raven puzzles with eight
choices each, and pairs of the tasks of prompt/ until there are eight of each.

    python3 tests/make_evaluation_set.py REFERENCE [--lvm ./lvm] [--weights weights.bin]

REFERENCE is the reference model's folder, with rank.jsonl and eval/*.jsonl. Needs numpy and Pillow;
evaluate.py, which reads the file, needs neither. The file is one line of JSON, then bytes, all in xz:

    "puzzles"  [[answer, panels of the matrix, panels to choose from], ...]; a panel is
               [shape, ink]
    "inks"     of each seven colours, from white to its own: borders of shapes are mixed
    "shapes"   how many follow, of 256 x 256 bytes, each the number of one of the seven
    "pairs"    {task: images}: images of 256 little-endian u16 follow, the tokens that the shipped
               model's tokenizer gives; their PNGs would take 2 MB

Photos have licences of their own, so colorize and dark get eight rendered pairs, the others two more
than prompt/ has.
"""
import argparse
import hashlib
import json
import lzma
import os
import subprocess

import numpy as np
from PIL import Image

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PHOTOS = ("colorize", "dark")


def lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def read(paths):
    """{path: (pixels, ink)}: a panel's ink is its most frequent colour beside white."""
    panels = {}
    for path in paths:
        image = np.array(Image.open(path).convert("RGB"))
        inked = image[(image < 255).any(2)]
        colors, count = np.unique(inked, axis=0, return_counts=True)
        panels[path] = image, tuple(map(int, colors[count.argmax()]))
    return panels


def mixtures(panels, ink):
    """The seven colours of panels of one ink: white, a quarter, a half (two that differ by
    rounding), three quarters (two), the ink."""
    slots = [{(255, 255, 255)}, set(), set(), set(), {ink}]
    k = int(np.argmin(ink))
    for image, color in panels.values():
        for mixed in np.unique(image.reshape(-1, 3), axis=0) if color == ink else ():
            slots[round((255 - int(mixed[k])) / (255 - ink[k]) * 4)].add(tuple(map(int, mixed)))
    assert [len(s) <= n for s, n in zip(slots, (1, 1, 2, 2, 1))] == [True] * 5, slots
    slots = [sorted(s) or [ink] for s in slots]
    return [slots[0][0], slots[1][0], slots[2][0], slots[2][-1], slots[3][0], slots[3][-1], slots[4][0]]


def plane(image, colors):
    """The number of each pixel's colour, the least of two that are equal."""
    out = np.full(image.shape[:2], 255, np.uint8)
    for i in range(6, -1, -1):
        out[(image == colors[i]).all(2)] = i
    assert out.max() < 7
    return out.tobytes()


def missing_pairs(reference, task):
    """The images of a sentence of eight pairs that prompt/ lacks: [path, ...]."""
    digest = lambda path: hashlib.sha1(open(path, "rb").read()).digest()
    folder = os.path.join(TOP, "prompt", task)
    known = {digest(os.path.join(where, name)) for where in (folder, folder + "/truth")
             for name in os.listdir(where) if name.endswith(".png")}
    for sentence in "BA":
        paths = [os.path.join(reference, "eval", task, "%s_%02d.png" % (sentence, i + 1)) for i in range(16)]
        new = [path for path in paths if digest(path) not in known]
        if len(new) == 4 or (task in PHOTOS and sentence == "B"):
            return new
    raise SystemExit("%s: no sentence is that of prompt/" % task)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("reference")
    parser.add_argument("--lvm", default="./lvm")
    parser.add_argument("--weights", default="weights.bin")
    args = parser.parse_args()
    puzzles = lines(os.path.join(args.reference, "rank.jsonl"))
    panels = read({os.path.join(args.reference, name) for line in puzzles for name in line["input"] + line["choices"]})
    inks = sorted({ink for _, ink in panels.values()})
    shapes, head = {}, {"puzzles": [], "inks": [mixtures(panels, ink) for ink in inks], "pairs": {}}

    def numbers(names):
        out = []
        for name in names:
            image, ink = panels[os.path.join(args.reference, name)]
            shape = plane(image, head["inks"][inks.index(ink)])
            out.append([shapes.setdefault(shape, len(shapes)), inks.index(ink)])
        return out

    for line in puzzles:
        head["puzzles"].append([line["answer"], numbers(line["input"]), numbers(line["choices"])])
    head["shapes"] = len(shapes)
    tokens = b""
    for task in ("", "boxes", "colorize", "dark", "denoise", "depth", "derain", "edges", "inpaint", "keypoints",
                 "segmentation"):
        paths = missing_pairs(args.reference, task) if task else [os.path.join(TOP, "prompt/depth/01.png")]
        text = subprocess.run([args.lvm, "encode", args.weights, *paths, "-q", "-o", "-"], check=True,
                              stdout=subprocess.PIPE).stdout.decode()
        ids = np.array([line.split() for line in text.splitlines()], "<u2")
        assert ids.shape == (len(paths), 256)
        head["pairs"][task] = len(paths)
        tokens += ids.tobytes()
        print(task, len(paths))
    data = json.dumps(head, separators=(",", ":")).encode() + b"\n" + b"".join(shapes) + tokens
    with open(os.path.join(TOP, "tests/evaluation.xz"), "wb") as f:
        f.write(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(len(shapes), "shapes,", os.path.getsize(os.path.join(TOP, "tests/evaluation.xz")), "bytes")


if __name__ == "__main__":
    main()
