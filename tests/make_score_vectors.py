#!/usr/bin/env python3
"""Make tests/golden_scores: pairs of small images and what other people's programs measure of them.

    python3 tests/make_score_vectors.py tests/golden_scores

Needs numpy, scipy, scikit-image, pycocotools, opencv and Pillow (made with 2.4.6, 1.17.1, 0.26.0,
2.0.10, 4.12 and 13.0: versions.txt says it anew); the tests need none of them. Every set is a folder
with predictions/, truths/ and expected.json: by image what each metric's values are, and under ""
those of all images. Values that need no judge but a drawing of known content (boxes, figures) are
computed from that content, never read back from pixels.
"""
import contextlib
import io
import json
import math
import os
import sys

import cv2
import numpy as np
import PIL
import pycocotools
import scipy
import skimage
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from skimage.morphology import thin

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
BOX_COLORS = [(255, 0, 0), (0, 204, 0), (26, 77, 255), (255, 255, 0), (255, 0, 255)]
BONES = [(1, 0), (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (10, 11),
         (8, 12), (12, 13), (13, 14)]
BONE_COLORS = [(255, 0, 85), (255, 60, 0), (255, 130, 0), (255, 200, 0), (190, 255, 0), (110, 255, 0),
               (0, 255, 40), (0, 255, 140), (0, 230, 255), (0, 150, 255), (0, 70, 255), (90, 0, 255),
               (170, 0, 255), (255, 0, 230)]
OPENPOSE = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
            (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)]
OPENPOSE_COLORS = [(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
                   (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
                   (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170)]


def flat(color, w=40, h=36):
    return np.tile(np.array(color, np.uint8), (h, w, 1))


def number(x):
    x = float(x)
    return None if math.isnan(x) else "inf" if math.isinf(x) else x


def write_set(folder, name, pairs, expected):
    """pairs: {name: (prediction, truth)}; an array of four channels keeps its alpha."""
    for i, half in enumerate(("predictions", "truths")):
        os.makedirs(os.path.join(folder, name, half), exist_ok=True)
        for key, pair in pairs.items():
            Image.fromarray(pair[i]).save(os.path.join(folder, name, half, key + ".png"), optimize=True)
    with open(os.path.join(folder, name, "expected.json"), "w") as f:
        json.dump(expected, f, indent=0, sort_keys=True)


# ---- any pixels: psnr, ssim, mse, foreground, depth, edges ---------------------------------------

def edge_counts(p, t):
    white = 2 * (t.sum(2, dtype=int) > 382).sum() <= t.shape[0] * t.shape[1]
    a, b = (thin((x.sum(2, dtype=int) > 382) == white) for x in (p, t))
    pa, pb = np.argwhere(a), np.argwhere(b)
    if not len(pa) or not len(pb):
        return 0, len(pa), len(pb)
    near = cdist(pa, pb) <= 0.0075 * math.hypot(*t.shape[:2])
    rows, columns = linear_sum_assignment(-near.astype(float))
    return int(near[rows, columns].sum()), len(pa), len(pb)


def edge_values(pairs, n, m):
    precision = pairs / n if n else float(not m)
    recall = pairs / m if m else float(not n)
    return [precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0]


def luma(x):
    return np.array(Image.fromarray(x).convert("L"), float)


def depth_values(p, t):
    p, t = luma(p), luma(t)
    valid = t > 0
    if not valid.any():
        return [math.nan, math.nan]
    p, t = p[valid], t[valid]
    scale = np.linalg.lstsq(p[:, None], t, rcond=None)[0][0]
    q = scale * p
    with np.errstate(divide="ignore"):
        return [np.mean(abs(q - t) / t), np.mean(np.maximum(q / t, t / q) < 1.25)]


def pixel_values(pairs):
    expected = {"": {}}
    counts, errors = np.zeros(3), []
    for name, (p, t) in pairs.items():
        p, t = p[..., :3], t[..., :3]
        normal = [(x / 255. - MEAN) / DEVIATION for x in (p, t)]
        with np.errstate(divide="ignore"):
            psnr = peak_signal_noise_ratio(t, p, data_range=255)
        a, b = (x.sum(2, dtype=int) > 382 for x in (p, t))
        found = edge_counts(p, t)
        counts += found
        errors.append(mean_squared_error(p, t))
        expected[name] = {
            "psnr": [psnr],
            "ssim": [structural_similarity(t, p, gaussian_weights=True, sigma=1.5, data_range=255,
                                           use_sample_covariance=False, channel_axis=2)],
            "mse": [mean_squared_error(p / 255., t / 255.), 3 * mean_squared_error(p / 255., t / 255.),
                    mean_squared_error(*normal)],
            "miou_foreground": [(a & b).sum() / (a | b).sum() if (a | b).any() else 1],
            "depth": depth_values(p, t), "edges": edge_values(*found)}
    expected[""] = {"psnr": [10 * math.log10(255 ** 2 / np.mean(errors))],
                    "edges": [edge_values(*counts)[2]]}
    return {k: {m: [number(x) for x in v] for m, v in e.items()} for k, e in expected.items()}


def pixel_pairs(rng):
    noise = lambda w=40, h=36: rng.integers(0, 256, (h, w, 3), np.uint8)
    y, x = np.mgrid[:36, :40]
    ramp = np.stack([6 * x, 7 * y, 3 * (x + y)], -1).astype(np.uint8)
    near = np.clip(ramp.astype(int) + rng.integers(-25, 26, ramp.shape), 0, 255).astype(np.uint8)
    spot = flat(BLACK)
    spot[17, 23] = 255
    alpha = np.concatenate([noise(), rng.integers(0, 256, (36, 40, 1), np.uint8)], -1)
    pairs = {"noise": (noise(), noise()), "ramp": (near, ramp), "same": (ramp, ramp),
             "black_black": (flat(BLACK), flat(BLACK)), "white_white": (flat(WHITE), flat(WHITE)),
             "black_white": (flat(BLACK), flat(WHITE)), "white_black": (flat(WHITE), flat(BLACK)),
             "one_pixel": (np.roll(spot, 1, 1), spot), "no_pixel": (flat(BLACK), spot),
             "alpha": (np.concatenate([alpha[..., :3], alpha[..., :1]], -1), alpha[::-1]),
             "smallest": (noise(11, 11), noise(11, 11)), "wide": (noise(61, 12), noise(61, 12))}
    for i in range(4):                                    # drawings: white on black, black on white
        t, p = flat(BLACK, 120, 96), flat(BLACK, 120, 96)
        for _ in range(5):
            a, b = (tuple(int(v) for v in rng.integers(5, 90, 2)) for _ in range(2))
            move = rng.integers(-2, 3, 4)
            shape = int(rng.integers(0, 3))
            for image, d in ((t, move * 0), (p, move)):
                c, e = (a[0] + int(d[0]), a[1] + int(d[1])), (b[0] + int(d[2]), b[1] + int(d[3]))
                if shape == 0:
                    cv2.line(image, c, e, WHITE, 3)
                elif shape == 1:
                    cv2.circle(image, c, 8 + abs(a[0] - b[0]) // 3, WHITE, 2)
                else:
                    cv2.rectangle(image, c, e, WHITE, 1)
        pairs["drawing_%d" % i] = (p, t) if i % 2 == 0 else (255 - p, 255 - t)
    return pairs


# ---- flat colours: classes of miou, cells --------------------------------------------------------

GRID = (5, 4)


def flat_values(pairs):
    """By the palette of each truth: colours that fill a 200th of it."""
    expected, sums = {"": {}}, {}
    for name, (p, t) in pairs.items():
        colors, count = np.unique(t.reshape(-1, 3), axis=0, return_counts=True)
        colors = colors[count * 200 >= t.shape[0] * t.shape[1]].astype(int)
        a, b = (((x[:, :, None].astype(int) - colors) ** 2).sum(-1).argmin(-1) for x in (p, t))
        ious = []
        for k, color in enumerate(map(tuple, colors)):
            both, either = ((a == k) & (b == k)).sum(), ((a == k) | (b == k)).sum()
            sums[color] = sums.get(color, np.zeros(2)) + (both, either)
            if either:
                ious.append(both / either)
        right = []
        for r in range(GRID[1]):
            for c in range(GRID[0]):
                h, w = t.shape[:2]
                cut = np.s_[(4 * r + 1) * h // (4 * GRID[1]):(4 * r + 3) * h // (4 * GRID[1]),
                            (4 * c + 1) * w // (4 * GRID[0]):(4 * c + 3) * w // (4 * GRID[0])]
                right.append(np.bincount(a[cut].ravel(), minlength=len(colors)).argmax() ==
                             np.bincount(b[cut].ravel(), minlength=len(colors)).argmax())
        expected[name] = {"miou_classes": [float(np.mean(ious))],
                          "cells": [float(np.mean(right)), float(all(right))]}
    expected[""] = {"miou_classes": [float(np.mean([a / b for a, b in sums.values() if b]))]}
    return expected


def flat_pairs(rng):
    palette = np.array([(0, 0, 0), (230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 225, 25)], np.uint8)
    pairs = {}
    for i in range(4):
        cells = rng.integers(0, 5, GRID[::-1])
        t = palette[np.kron(cells, np.ones((14, 16), int))]
        other = cells.copy()
        if i != 1:
            other[rng.integers(0, 4), rng.integers(0, 5)] = 0
            other[rng.integers(0, 4), rng.integers(0, 5)] = 3
        p = palette[np.kron(other, np.ones((14, 16), int))]
        p = np.clip(p.astype(int) + rng.integers(-70, 71, p.shape) * (i > 1), 0, 255).astype(np.uint8)
        pairs["cells_%d" % i] = (p, cv2.blur(t, (2, 2)) if i == 3 else t)
    pairs["one_color"] = (pairs["cells_0"][0], flat(palette[1], 80, 56))
    return pairs


# ---- boxes: drawn outlines of known boxes --------------------------------------------------------

def draw_boxes(image, boxes):
    """Outlines of 3 pixels around (color, x0, y0, x1, y1), as the training data has them."""
    image = image.copy()
    for color, x0, y0, x1, y1 in boxes:
        inside = image[y0:y1 + 1, x0:x1 + 1].copy()
        image[max(y0 - 3, 0):y1 + 4, max(x0 - 3, 0):x1 + 4] = BOX_COLORS[color]
        image[y0:y1 + 1, x0:x1 + 1] = inside
    return image


def box_iou(a, b):
    w = min(a[3], b[3]) - max(a[1], b[1]) + 1
    h = min(a[4], b[4]) - max(a[2], b[2]) + 1
    area = lambda c: (c[3] - c[1] + 1) * (c[4] - c[2] + 1)
    return w * h / (area(a) + area(b) - w * h) if w > 0 and h > 0 else 0


def overlaps(found, truth):
    """One to one, of each colour the greatest overlap first."""
    pairs = sorted(((box_iou(a, b), i, k) for i, a in enumerate(found) for k, b in enumerate(truth)
                    if a[0] == b[0]), key=lambda x: (-x[0], x[1], x[2]))
    used, sum_ = set(), 0
    for iou, i, k in pairs:
        if iou > 0 and ("p", i) not in used and ("t", k) not in used:
            used |= {("p", i), ("t", k)}
            sum_ += iou
    return sum_


def coco_ap(found, truth):
    """pycocotools' AP at 0.5 with equal scores; lists by image."""
    box = lambda b: [b[1], b[2], b[3] - b[1] + 1, b[4] - b[2] + 1]
    entries = lambda lists: [(i, b) for i, boxes in enumerate(lists) for b in boxes]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i + 1} for i in range(len(truth))], "info": {},
            "categories": [{"id": i + 1} for i in range(len(BOX_COLORS))],
            "annotations": [{"id": n + 1, "image_id": i + 1, "category_id": b[0] + 1, "bbox": box(b),
                             "area": box(b)[2] * box(b)[3], "iscrowd": 0}
                            for n, (i, b) in enumerate(entries(truth))]}
        coco.createIndex()
        results = coco.loadRes([{"image_id": i + 1, "category_id": b[0] + 1, "bbox": box(b), "score": 1}
                                for i, b in entries(found)])
        run = COCOeval(coco, results, "bbox")
        run.params.iouThrs = np.array([0.5])
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][0, :, :, 0, -1]
    return float(precision[precision > -1].mean())


def random_boxes(rng, n):
    boxes = []
    while len(boxes) < n:
        x0, y0 = (int(v) for v in rng.integers(0, 100, 2))
        new = (int(rng.integers(0, 5)), x0, y0, x0 + int(rng.integers(8, 60)), y0 + int(rng.integers(8, 50)))
        edges = lambda b: [(b[1], b[3]), (b[2], b[4])]
        apart = all(min(abs(u - v) for a, b in zip(edges(new), edges(old)) for u in a for v in b) > 8
                    for old in boxes)            # no two sides along each other
        if new[3] < 124 and new[4] < 124 and apart:
            boxes.append(new)
    return boxes


def order(boxes):
    return sorted(boxes, key=lambda b: (b[0], -(b[3] - b[1] + 1) * (b[4] - b[2] + 1), b[2], b[1]))


def box_set(rng):
    pairs, found, truth = {}, [], []
    y, x = np.mgrid[:128, :128]
    ground = np.stack([90 + x // 3, 100 + y // 4, 120 - x // 4], -1).astype(np.uint8)
    for i in range(8):
        t = [] if i == 6 else random_boxes(rng, 1 + i % 4)
        p = [(b[0] if rng.random() < .85 else (b[0] + 1) % 5,
              *(int(v) for v in np.clip(np.array(b[1:]) + rng.integers(-4, 5, 4), 0, 127)))
             for b in t if rng.random() < .9]
        if i in (2, 6):
            p += random_boxes(rng, 1)
        if i == 7:                                # cut by the image's borders; crossing; one colour
            t = [(2, 0, 30, 40, 80), (2, 20, 60, 90, 127), (3, 70, 0, 127, 25)]
            p = [(2, 0, 33, 42, 84), (2, 22, 60, 88, 127), (3, 70, 0, 127, 25)]
        t, p = order(t), order(p)
        truth.append(t)
        found.append(p)
        pairs["boxes_%d" % i] = (draw_boxes(ground, p), draw_boxes(ground, t))
    expected = {name: {"boxes": [number(overlaps(p, t) / len(t) if t else math.nan)]}
                for name, p, t in zip(pairs, found, truth)}
    expected[""] = {"boxes": [sum(map(overlaps, found, truth)) / sum(map(len, truth)), coco_ap(found, truth)]}
    return pairs, expected


# ---- figures: drawn limbs between known points ---------------------------------------------------

def draw_figure(points, bones, colors, radius=3.2, side=160):
    """Limbs with round ends, in order, smooth at their borders; points that are None are not there."""
    image = np.zeros((side, side, 3))
    y, x = np.mgrid[:side, :side] + .5
    for (a, b), color in zip(bones, colors):
        if points[a] is None or points[b] is None:
            continue
        p, q = np.array(points[a], float), np.array(points[b], float)
        d = q - p
        h = (((x - p[0]) * d[0] + (y - p[1]) * d[1]) / (d @ d + 1e-6)).clip(0, 1)
        distance = np.hypot(x - p[0] - h * d[0], y - p[1] - h * d[1])
        m = (radius - distance + .5).clip(0, 1)[..., None]
        image = image * (1 - m) + np.array(color) * m
    return image.round().astype(np.uint8)


def figure_set(rng, stand, bones, colors):
    pairs, expected, sums = {}, {"": {}}, np.zeros(3)
    for i in range(5):
        t = [tuple(np.array(p) + rng.uniform(-3, 3, 2)) for p in stand]
        box = max(np.ptp(np.array(t), axis=0))
        p = []
        for k, point in enumerate(t):  # of hands and feet between 0.1 and 0.2, or beyond
            leaf = sum(k in bone for bone in bones) == 1
            far = box * rng.choice([0, .04, .15, .28] if leaf else [0, .03]) if i != 1 else 0
            while True:                # inside of the picture, where it can be seen
                angle = rng.uniform(0, 2 * math.pi)
                moved = (point[0] + far * math.cos(angle), point[1] + far * math.sin(angle))
                if 4 < min(moved) and max(moved) < 156:
                    break
            p.append(moved)
        if i == 2:
            p[4] = None                # a missing hand
        if i == 3:
            p = [None] * len(t)
        distance = np.array([math.inf if a is None else math.dist(a, b) for a, b in zip(p, t)])
        right = [(distance <= share * box).sum() for share in (.1, .2)]
        sums += right + [len(t)]
        pairs["figure_%d" % i] = (draw_figure(p, bones, colors), draw_figure(t, bones, colors))
        expected["figure_%d" % i] = {"pck": [float(n / len(t)) for n in right]}
    pairs["nobody"] = (pairs["figure_0"][0], flat(BLACK, 160, 160))
    expected["nobody"] = {"pck": [None, None]}
    expected[""] = {"pck": [float(n / sums[2]) for n in sums[:2]]}
    return pairs, expected


def draw_dots(image, points, radius=3.2):
    """OpenPose's dots, in their order, above a figure's limbs; those of the face are smaller."""
    image = image.astype(float)
    y, x = np.mgrid[:image.shape[0], :image.shape[1]] + .5
    for k, point in enumerate(points):
        distance = np.hypot(x - point[0], y - point[1])
        m = (radius * (.8 if k == 0 or k >= 14 else 1.1) - distance + .5).clip(0, 1)[..., None]
        image = image * (1 - m) + np.array((OPENPOSE_COLORS + [(255, 0, 85)])[k]) * m
    return image.round().astype(np.uint8)


def dot_set(rng):
    """Figures with dots on their points, or without (truths in turn). Points are moved by 2 pixels
    more or less than what counts: what is read back farther off than that has another value."""
    pairs, expected, sums = {}, {"": {}}, np.zeros(3)
    draw = lambda points, dots: (draw_dots if dots else lambda image, _: image)(
        draw_figure(points, OPENPOSE, OPENPOSE_COLORS, side=200), points)
    for i in range(3):
        t = [tuple(np.array(p) * 1.2 + rng.uniform(-3, 3, 2)) for p in OPENPOSE_STAND]
        box = max(np.ptp(np.array(t), axis=0))
        p, right = [], np.zeros(2)
        for point in t:
            share = rng.choice([.1, .2]) if i > 0 else .1
            far = share * box + rng.choice([-2, 2])
            while True:                # inside of the picture, on no other point
                angle = rng.uniform(0, 2 * math.pi)
                moved = (point[0] + far * math.cos(angle), point[1] + far * math.sin(angle))
                if 4 < min(moved) and max(moved) < 196 and all(math.dist(moved, q) > 12 for q in p):
                    break
            p.append(moved)
            right += [far <= .1 * box, far <= .2 * box]
        sums += [*right, len(t)]
        pairs["dots_%d" % i] = draw(p, True), draw(t, i % 2)
        expected["dots_%d" % i] = {"pck": [float(n / len(t)) for n in right]}
    expected[""] = {"pck": [float(n / sums[2]) for n in sums[:2]]}
    return pairs, expected


STAND = [(80, 14), (80, 38), (60, 42), (44, 64), (30, 84), (101, 40), (118, 62), (133, 80), (80, 84), (66, 86),
         (58, 112), (50, 142), (95, 85), (103, 113), (112, 144)]
OPENPOSE_STAND = [(80, 30), (80, 50), (60, 52), (46, 74), (32, 92), (100, 50), (116, 72), (131, 90), (66, 94),
                  (58, 122), (50, 150), (95, 94), (103, 123), (112, 151), (70, 18), (90, 17), (54, 22), (106, 23)]


# ---- published protocols, on a made-up data set --------------------------------------------------

def published(tile, single):
    """A true tile on its way through the program: normalised, turned back, cut to whole numbers."""
    x = tile.astype(np.float32) / np.float32(255)
    if single:
        normal = ((x - MEAN.astype(np.float32)) / DEVIATION.astype(np.float32)).astype(float)
    else:
        normal = (x.astype(float) - MEAN) / DEVIATION
    return np.clip((normal * DEVIATION + MEAN) * 255, 0, 255).astype(int)


def nearest_white(x):
    x = x.astype(int)
    return ((255 - x) ** 2).sum(2) < (x ** 2).sum(2)


def white_in_bytes(x):
    """The same as the program's code does it, in bytes that wrap around; a tie is white."""
    x = x.astype(np.uint8)
    with np.errstate(over="ignore"):
        return ((x - np.uint8(255)) ** 2).sum(2, dtype=int) <= (x ** 2).sum(2, dtype=int)


def rectangle(mask):
    n, labels = cv2.connectedComponents(mask.astype(np.uint8))
    out = np.zeros_like(mask)
    for i in np.argsort([(labels == i).sum() for i in range(n)], kind="stable")[::-1]:
        y, x = np.where(labels == i)
        if mask[y[0], x[0]]:
            out[y.min():y.max() + 1, x.min():x.max() + 1] = True
            break
    return out


def blob(rng, w, h, n):
    labels = np.zeros((h, w), np.uint8)
    for _ in range(n):
        center = tuple(int(v) for v in rng.uniform(.25, .75, 2) * (w, h))
        cv2.ellipse(labels, center, tuple(int(v) for v in rng.integers(8, 30, 2)), float(rng.uniform(0, 90)), 0, 360,
                    int(rng.integers(1, 21)), -1)
        cv2.ellipse(labels, center, (32, 32), 0, 0, 40, 255, 2)
    return labels


def protocol_sets(folder, rng):
    voc = os.path.join(folder, "voc/VOCdevkit/VOC2012")
    for name in ("JPEGImages", "SegmentationClassAug"):
        os.makedirs(os.path.join(voc, name), exist_ok=True)
    colormap = [((i & 1) << 7 | (i & 8) << 3 | (i & 64) >> 1, (i & 2) << 6 | (i & 16) << 2 | (i & 128) >> 2,
                 (i & 4) << 5 | (i & 32) << 1) for i in range(256)]
    photo = lambda w, h: cv2.resize(rng.integers(0, 256, (12, 14, 3), np.uint8), (w, h), interpolation=cv2.INTER_NEAREST)
    names, lines, expected = ["2007_%06d" % i for i in range(4)], ["# vp-segmentation"], {}
    label = {}
    for i, name in enumerate(names):
        w, h = (int(v) for v in rng.integers(90, 160, 2))
        label[name] = blob(rng, w, h, 3)
        image = Image.fromarray(label[name])
        if i % 2:                                         # VOC's own have a palette
            image = Image.frombytes("P", image.size, image.tobytes())
            image.putpalette([v for color in colormap for v in color])
        image.save(os.path.join(voc, "SegmentationClassAug", name + ".png"), optimize=True)
        Image.fromarray(photo(w, h)).save(os.path.join(voc, "JPEGImages", name + ".jpg"), quality=80)
    for kind in ("segmentation", "detection", "colorization"):
        os.makedirs(os.path.join(folder, "answers_" + kind), exist_ok=True)
    answer = lambda kind, n, x: Image.fromarray(x).save(os.path.join(folder, "answers_" + kind, "%d.png" % n), optimize=True)
    values = []
    for n, name in enumerate(names):
        number_ = int(np.bincount(label[name].ravel(), minlength=256)[1:21].argmax()) + 1
        lines.append("%s %s %d" % (name, names[n - 1], number_))
        mask = Image.fromarray(np.where(label[name] == number_, 255, 0).astype(np.uint8)).resize((111, 111), Image.BICUBIC)
        tile = published(np.stack([np.array(mask)] * 3, -1), False)
        truth = nearest_white(tile)
        p = np.roll(np.where(truth[..., None], 200, 40), (n * 5, 3), (0, 1))
        p = p + np.kron(rng.integers(-90, 91, (14, 14, 3)), np.ones((8, 8, 1), int))[:111, :111]
        p = p.clip(0, 255).astype(np.uint8)
        answer("segmentation", n, p)
        ours = nearest_white(p)
        a, b = white_in_bytes(p), white_in_bytes(tile)
        values.append([(ours & truth).sum() / (ours | truth).sum(), (ours == truth).mean(), (a & b).sum() / (a | b).sum()])
    expected["vp-segmentation"] = values
    with open(os.path.join(folder, "segmentation.txt"), "w") as f:
        f.write("\n".join(lines) + "\n")
    lines, values = ["# vp-detection"], []
    for n in range(6):
        w, h = (int(v) for v in rng.integers(90, 500, 2))
        x0, y0 = int(rng.integers(0, w // 2)), int(rng.integers(0, h // 2))
        x1, y1 = int(rng.integers(x0 + 9, w + 1)), int(rng.integers(y0 + 9, h + 1))
        lines.append("q%d s%d 7 %d %d %d %d %d %d 99 98 1 2 30 40" % (n, n, w, h, x0, y0, x1, y1))
        mask = np.zeros((h, w, 3), np.uint8)
        mask[y0:y1, x0:x1] = 255
        tile = np.array(Image.fromarray(mask).resize((111, 111), Image.BILINEAR))
        tile = published(tile, True)
        truth = nearest_white(tile)
        p = np.roll(np.where(truth[..., None], 255, 0) * np.ones(3, int), (3, n), (0, 1)).astype(np.uint8)
        p = np.where(rng.random((111, 111, 1)) < .03, 255 - p, p).astype(np.uint8) if n else np.zeros_like(p)
        answer("detection", n, p)
        ours = rectangle(nearest_white(p))
        a, b = rectangle(white_in_bytes(p)), white_in_bytes(tile)
        values.append([(ours & truth).sum() / (ours | truth).sum(), (ours == truth).mean(), (a & b).sum() / (a | b).sum()])
    expected["vp-detection"] = values
    with open(os.path.join(folder, "detection.txt"), "w") as f:
        f.write("\n".join(lines) + "\n")
    lines, values = ["# vp-colorization"], []
    os.makedirs(os.path.join(folder, "imagenet/val/n01"), exist_ok=True)
    for n, (w, h) in enumerate([(130, 113), (113, 120), (111, 111), (90, 140)]):
        name = "n01/ILSVRC2012_val_%08d.png" % n
        Image.fromarray(photo(w, h)).save(os.path.join(folder, "imagenet/val", name), optimize=True)
        lines.append("%s n01/ILSVRC2012_val_00000000.png" % name)
        image = np.array(Image.open(os.path.join(folder, "imagenet/val", name)).convert("RGB"))
        left, right = max(0, (111 - w) // 2), max(0, (111 - w + 1) // 2)
        image = np.pad(image, ((0, 0), (left, right), (0, 0)))
        top, side = int(round((image.shape[0] - 111) / 2.)), int(round((image.shape[1] - 111) / 2.))
        tile = image[top:top + 111, side:side + 111]
        p = cv2.blur(tile, (3, 5)) if n else tile // 2
        answer("colorization", n, p)
        a, b = (((x / 255.) - MEAN) / DEVIATION for x in (p, published(tile, False)))
        values.append([((a - b) ** 2).mean(), 3 * ((p / 255. - tile / 255.) ** 2).mean()])
    expected["vp-colorization"] = values
    with open(os.path.join(folder, "colorization.txt"), "w") as f:
        f.write("\n".join(lines) + "\n")
    with open(os.path.join(folder, "expected.json"), "w") as f:
        json.dump({k: [[float(x) for x in v] for v in e] for k, e in expected.items()}, f, indent=0)


def main(folder):
    rng = np.random.default_rng(22)    # with 21 a foot hides its leg, and nobody could tell
    pairs = pixel_pairs(rng)
    write_set(folder, "pixels", pairs, pixel_values(pairs))
    pairs = flat_pairs(rng)
    write_set(folder, "flat", pairs, flat_values(pairs))
    write_set(folder, "boxes", *box_set(rng))
    write_set(folder, "figures", *figure_set(rng, STAND, BONES, BONE_COLORS))
    write_set(folder, "openpose", *figure_set(rng, OPENPOSE_STAND, OPENPOSE, OPENPOSE_COLORS))
    write_set(folder, "dots", *dot_set(np.random.default_rng(7)))
    protocol_sets(os.path.join(folder, "protocols"), rng)
    with open(os.path.join(folder, "versions.txt"), "w") as f:
        for module in (np, scipy, skimage, cv2, PIL):
            f.write("%s %s\n" % (module.__name__, module.__version__))
        f.write("pycocotools %s\n" % getattr(pycocotools, "__version__", "?"))


if __name__ == "__main__":
    main(*sys.argv[1:2])
