#!/usr/bin/env python3
"""Measure a model and write docs/evaluation.md: `make evaluate`. Python's standard library alone.

    python3 tests/evaluate.py [--lvm ./lvm] [--weights weights.bin] [--queries N] [--set FOLDER]
                              [--tasks NAME,...] [--work build/evaluate] [-o docs/evaluation.md]

Every folder of prompt/ is a task. Of pairs each is the query once, all others shown before it; of a
sequence the last images are asked for, each behind all before it. An answer is sampled as `lvm
batch` does it by itself, seed 1. Beside it stand the floor, the last input taken for the answer, and
the ceiling, the true answer through the tokenizer and back.

Perplexity is measured behind 1 to 7 pairs, or 1 to 15 frames. prompt/ has no eight pairs of a task:
evaluation.xz (make_evaluation_set.py) adds what is missing, and has 24 Raven puzzles. --set takes
the reference's evaluation set (eval/*.jsonl, rank.jsonl) instead of both.

What a task gave is kept in the folder --work: a run that was stopped goes on, and one with another
model, program or set begins anew."""
import argparse
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import struct
import subprocess
import sys

TESTS = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(TESTS)
GRID = ["--grid", "3,3"]
ALL = [("psnr", [], "psnr"), ("ssim", [], "ssim")]
OWN = {                          # of a task: the metric, its arguments, its value; what the table calls it
    "boxes": [("boxes", [], "iou", "IoU"), ("boxes", [], "ap50", "AP 0.5")],
    "keypoints": [("pck", [], "pck_0.1", "PCK 0.1"), ("pck", [], "pck_0.2", "PCK 0.2")],
    "edges": [("edges", [], "f", "F")],
    "depth": [("depth", [], "abs_rel", "abs rel"), ("depth", [], "delta_1.25", "delta 1.25")],
    "segmentation": [("miou", [], "classes", "mIoU")], "colorize": [("mse", [], "mse_x3", "MSE x 3")],
    "puzzle": [("cells", GRID, "cells", "cells")], "raven": [("cells", GRID, "cells", "cells")]}
# Sequences: which images are asked for, counted from 1. Those that are left out nobody could know,
# as the first of a puzzle's second progression or of a matrix's row.
SEQUENCES = {name: (16, 15, 14, 13, 12, 11) for name in ("video", "rotation", "annotated_video", "video_photo")}
SEQUENCES.update(puzzle=(12, 11, 10, 8, 7, 6), raven=(9, 6))
FRAMES = (1, 3, 5, 7, 9, 11, 13, 15)
SHOTS = (1, 2, 3, 4, 5, 6, 7)
PAINTED = 65536                  # pixels of a panel, 256 x 256


# ---- What is asked --------------------------------------------------------------------------------

def images(folder):
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".png"))


def whole_prompt(task):
    """All images of a task in prompt/, the true answer the last."""
    folder = os.path.join(TOP, "prompt", task)
    return images(folder) + images(os.path.join(folder, "truth"))[:1]


def queries_of(task, whole, most):
    """[(inputs, target)]: pairs in turn, from the last on, or the images of a sequence."""
    if task in SEQUENCES:
        return [(whole[:n - 1], whole[n - 1]) for n in SEQUENCES[task] if n <= len(whole)][:most]
    pairs = [whole[i:i + 2] for i in range(0, len(whole), 2)]
    return [(sum(pairs[:i] + pairs[i + 1:], []) + pairs[i][:1], pairs[i][1])
            for i in range(len(pairs) - 1, -1, -1)][:most]


def prompt_lines(task, most):
    return queries_of(task, whole_prompt(task), most)


def set_lines(folder, task, most):
    with open(os.path.join(folder, "eval", task + ".jsonl")) as f:
        lines = [json.loads(line) for line in f]
    path = lambda name: os.path.abspath(os.path.join(folder, name))
    return [([path(name) for name in line["input"]], path(line["target"][0])) for line in lines][:most]


def sentences_of(lines):
    """The sentences that a set's lines are cut from: the pairs that its lines share, then theirs."""
    found = {}
    for inputs, target in lines:
        found.setdefault(tuple(inputs[:-1]), []).extend([inputs[-1], target])
    return [list(shown) + asked for shown, asked in found.items()]


def read_extra():
    """(header, shapes, tokens) of evaluation.xz: make_evaluation_set.py describes it."""
    with lzma.open(os.path.join(TESTS, "evaluation.xz")) as f:
        head = json.loads(f.readline())
        shapes = [f.read(PAINTED) for _ in range(head["shapes"])]
        tokens = {task: [list(struct.unpack("<256H", f.read(512))) for _ in range(n)]
                  for task, n in sorted(head["pairs"].items())}
    return head, shapes, tokens


def write_puzzles(folder):
    """The 24 puzzles of evaluation.xz as PPM images and a set for rank."""
    head, shapes, _ = read_extra()
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)

    def panel(shape, ink):
        name = "%d-%d.ppm" % (shape, ink)
        if not os.path.exists(os.path.join(folder, name)):
            pixels = bytearray(3 * PAINTED)
            for channel in range(3):
                values = bytes(color[channel] for color in head["inks"][ink])
                pixels[channel::3] = shapes[shape].translate(values + bytes(256 - len(values)))
            with open(os.path.join(folder, name), "wb") as f:
                f.write(b"P6 256 256 255\n" + pixels)
        return name

    with open(os.path.join(folder, "rank.jsonl"), "w") as f:
        for answer, matrix, choices in head["puzzles"]:
            f.write(json.dumps({"input": [panel(*p) for p in matrix], "choices": [panel(*p) for p in choices],
                                "answer": answer}) + "\n")
    return os.path.join(folder, "rank.jsonl")


# ---- Measuring ------------------------------------------------------------------------------------

class Model:
    def __init__(self, args):
        self.lvm, self.weights, self.work = os.path.abspath(args.lvm), os.path.abspath(args.weights), args.work
        self.tokens = {}

    def run(self, *words):
        run = subprocess.run([self.lvm, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if run.returncode != 0:
            sys.exit("lvm %s: %s" % (" ".join(words[:2]), run.stderr.decode()))
        return run.stdout.decode()

    def put_set(self, name, lines):
        path = os.path.join(self.work, name)
        with open(path, "w") as f:
            for line in lines:
                f.write(json.dumps(line) + "\n")
        return path

    def encode(self, paths):
        """Tokens of images, each asked for once."""
        new = sorted(set(paths) - set(self.tokens))
        if new:
            text = self.run("encode", self.weights, *new, "-o", "-", "-q").splitlines()
            self.tokens.update((path, [int(word) for word in line.split()]) for path, line in zip(new, text))
        return [self.tokens[path] for path in paths]

    def nats(self, lines):
        """Mean nats a token of the targets of lines of tokens."""
        path = self.put_set("eval.jsonl", [{"input_tokens": a, "target_tokens": [b]} for a, b in lines])
        got = [json.loads(line) for line in self.run("eval", self.weights, path, "--json", "-q").splitlines()]
        return [math.log(line["perplexity"]) for line in got[:len(lines)]]

    def answers(self, lines, folder):
        path = self.put_set("batch.jsonl", [{"input": a, "output": "%d.png" % i} for i, (a, _) in enumerate(lines)])
        self.run("batch", self.weights, path, "-o", folder, "-q")

    def ceiling(self, lines, folder):
        for i, ids in enumerate(self.encode([target for _, target in lines])):
            path = os.path.join(self.work, "tokens")
            with open(path, "w") as f:
                f.write(" ".join(map(str, ids)) + "\n")
            self.run("decode", self.weights, path, "-o", os.path.join(folder, "%d.png" % i), "-q")

    def score(self, metric, options, predictions, truths):
        return json.loads(self.run("score", metric, predictions, truths, "--json", *options).splitlines()[-1])


def measure(model, task, lines):
    """{value: (floor, answer, ceiling)} of a task."""
    folders = {name: os.path.join(model.work, task, name) for name in ("floor", "answer", "ceiling", "truth")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    for i, (inputs, target) in enumerate(lines):
        shutil.copy(inputs[-1], os.path.join(folders["floor"], "%d.png" % i))
        shutil.copy(target, os.path.join(folders["truth"], "%d.png" % i))
    model.answers(lines, folders["answer"])
    model.ceiling(lines, folders["ceiling"])
    return {value: [model.score(metric, options, folders[name], folders["truth"])[value]
                    for name in ("floor", "answer", "ceiling")]
            for metric, options, value, *_ in ALL + OWN.get(task, [])}


def is_tokenizer_of(model, tokens):
    """Whether evaluation.xz's tokens are this model's: those of a pair that prompt/ shows too."""
    ids = model.encode([os.path.join(TOP, "prompt/depth/01.png")])[0]
    return sum(a == b for a, b in zip(ids, tokens[""][0])) > 230


def pair_curve(model, sentences):
    """[(shots, perplexity)]. A sentence's pairs stand in a circle: from each as the first, the second
    is asked behind one, the third behind two. So all counts have the same answers, and of the long
    prompts only what is new is computed."""
    nats = {}
    for whole in sentences:
        circle = 2 * whole
        lines = [(circle[at:at + 2 * n + 1], circle[at + 2 * n + 1])
                 for at in range(0, len(whole), 2) for n in SHOTS if 2 * n < len(whole)]
        for (inputs, _), one in zip(lines, model.nats(lines)):
            nats.setdefault(len(inputs) // 2, []).append(one)
    return [(n, math.exp(sum(all_) / len(all_))) for n, all_ in sorted(nats.items())]


def frame_curve(model, sentences):
    """[(frames, perplexity)] of the last images."""
    most = min(len(whole) - 1 for whole in sentences)
    nats = {n: model.nats([(whole[-n - 1:-1], whole[-1]) for whole in sentences]) for n in FRAMES if n <= most}
    return [(n, math.exp(sum(all_) / len(all_))) for n, all_ in nats.items()]


def sentences(model, task, lines, extra, args):
    """The whole sentences of a task, as tokens."""
    if args.set:
        longest = max(len(inputs) for inputs, _ in lines)
        return [model.encode(whole) for whole in (sentences_of(lines) if task not in SEQUENCES else [
            inputs + [target] for inputs, target in lines if len(inputs) == longest])]
    more = extra.get(task, [])
    return [more if len(more) == 16 else model.encode(whole_prompt(task)) + more]


def puzzles(model, folder):
    path = os.path.join(folder, "rank.jsonl") if folder else write_puzzles(os.path.join(model.work, "puzzles"))
    last = json.loads(model.run("rank", model.weights, path, "--json", "-q").splitlines()[-1])
    return [last["right"], last["of"]]


def protocol_seconds(model):
    """{protocol: [seconds of prompts, answers, scores]}: processor time an episode, on the made-up
    folders of the tests, so that it counts little what else runs."""
    data, seconds = os.path.join(TESTS, "golden_scores/protocols"), {}
    for name, base in (("segmentation", "voc"), ("colorization", "imagenet")):
        prompts, answers = (os.path.join(model.work, "protocol", name, part) for part in ("prompts", "answers"))
        shutil.rmtree(os.path.dirname(prompts), ignore_errors=True)
        listed = os.path.join(data, name + ".txt")
        with open(listed) as f:
            episodes = len(f.readlines()) - 1
        options = [listed, "--base", os.path.join(data, base)]
        seconds["vp-" + name] = []
        for words in (("score", "protocol", "vp-" + name, *options, "-o", prompts),
                      ("batch", model.weights, os.path.join(prompts, "prompts.jsonl"), "-o", answers, "-q"),
                      ("score", "protocol", "vp-" + name, answers, *options)):
            before = os.times()
            model.run(*words)
            after = os.times()
            seconds["vp-" + name].append((after.children_user + after.children_system - before.children_user -
                                          before.children_system) / episodes)
    return seconds


class Kept:
    """What was measured, by name, in a file of the working folder."""

    def __init__(self, model, args):
        with open(model.weights, "rb") as f:
            weights = hashlib.sha256(f.read()).hexdigest()
        stamp = [weights, model.run("--version"), args.queries, args.set, 1]
        self.path, self.all = os.path.join(model.work, "measured.json"), {"stamp": stamp}
        if os.path.exists(self.path):
            with open(self.path) as f:
                old = json.load(f)
            self.all = old if old["stamp"] == stamp else self.all

    def get(self, name, measured):
        if name not in self.all:
            print(name, file=sys.stderr, flush=True)
            self.all[name] = measured()
            with open(self.path + ".part", "w") as f:
                json.dump(self.all, f, indent=0)
            os.replace(self.path + ".part", self.path)
        return self.all[name]


# ---- The page -------------------------------------------------------------------------------------

def shown(value):
    return "-" if value is None else "inf" if math.isinf(value) else "%.3g" % value


def cell(values):
    return "%s / **%s** / %s" % tuple(map(shown, values))


def row(task, n, values):
    own = ["%s: %s" % (name, cell(values[value])) for _, _, value, name in OWN.get(task, [])]
    return "| %s | %d | %s | %s | %s |\n" % (task, n, cell(values["psnr"]), cell(values["ssim"]), ", ".join(own))


def read_row(line):
    """What `row` wrote: (task, queries, {value: [floor, answer, ceiling] as they are shown})."""
    task, n, *cells = [part.strip() for part in line.split("|")[1:-1]]
    triples = [list(found) for part in cells for found in re.findall(r"(\S+) / \*\*(\S+)\*\* / ([^\s,]+)", part)]
    return task, int(n), dict(zip([m[2] for m in ALL + OWN.get(task, [])], triples))


def curve_table(what, counts, curves):
    lines = ["| %s | %s |" % (what, " | ".join(map(str, counts))), "|---" * (len(counts) + 1) + "|"]
    for task, values in curves:
        found = dict(values)
        lines.append("| %s | %s |" % (task, " | ".join("%.2f" % found[n] if n in found else "" for n in counts)))
    return "\n".join(lines) + "\n"


def cost_table(seconds):
    lines = ["| protocol | episodes | prompt, answer, score of one | all |", "|---|---|---|---|"]
    for name, episodes in (("vp-segmentation", 4000), ("vp-colorization", 1000)):
        each = sum(seconds[name])
        parts = " + ".join("%.2f" % part for part in seconds[name])
        lines.append("| %s | %d | %s s | %d x %.2f s = %.1f h |" % (
            name, episodes, parts, episodes, each, episodes * each / 3600))
    return "\n".join(lines) + "\n"


def draw_sheet(work, tasks, path):
    """The first query of each task that has a metric of its own: the query, the answer, the truth."""
    rows = []
    for task in filter(OWN.get, tasks):
        asked = os.path.join(work, task, "asked")
        os.makedirs(asked, exist_ok=True)
        shutil.copy(os.path.join(work, task, "floor/0.png"), asked)
        rows += ["--row", asked, os.path.join(work, task, "answer/0.png"),
                 os.path.join(work, task, "truth/0.png")]
    program = os.path.join(TESTS, "make_contact_sheet.py")
    subprocess.run([sys.executable, program, "-o", path, "-k", "1", *rows], check=True)


HEAD = """# How well the shipped model does

Written by `make evaluate` (tests/evaluate.py%s), which says what is asked and how. Each cell is
floor / **answer** / ceiling: the last input taken for the answer; the model's answer, of seed 1; the true answer
through the tokenizer and back, better than which no model behind this tokenizer can draw. `lvm help score` defines
the metrics; evaluation.png shows the first query of the tasks that have one of their own, its answer and the truth.

| task | queries | PSNR, dB | SSIM | the task's own |
|---|---|---|---|---|
"""

ASKED = """
Queries are %s.
So few of so few scenes are examples, no benchmark.
"""
OF_PROMPT = """those of prompt/: of pairs each is the query once, behind all others, so that the queries of a task
share their images; of a sequence the last images are asked for, each behind all before it"""
OF_SET = "the reference's evaluation set, six a task from two sentences"

CURVES = """
## Perplexity against what is shown

exp of the mean nats a token of the true answer. %s

%s
%s"""
CURVES_OF_PROMPT = """Eight pairs of a task stand in a circle: from each as the first
the second pair is asked behind one, the third behind two and so on, so that every count has the same eight answers.
prompt/ has six pairs a task (colorize five, dark four); tests/evaluation.xz adds two of the same sentence, for those
two tasks, whose photos have licences of their own, eight rendered pairs instead. Frames are followed by the last image
of the sequence alone."""
CURVES_OF_SET = "All are of the set's sentences, of eight pairs or up to sixteen images."

PUZZLES = """
## Puzzles

Raven matrices, the likeliest of eight panels (`lvm rank`): **%d of %d** right; guessing gives 3.
They are %s.
"""

TAIL = """
## What the published protocols would cost

`lvm score protocol` follows them to the letter, on data that cannot ship with the project. An episode shows three
images and asks for one; on the small made-up folders of the tests that takes, in seconds of one processor (two halve
the hours):

%s
Segmentation has 1000 episodes for each of four folds; an episode of vp-detection costs as much as one of those.

## Published figures, and why they are none to compare with

| | task | published | what differs |
|---|---|---|---|
| Bai et al. 2023 (LVM, 3B; arXiv 2312.00785) | foreground segmentation, Pascal-5i | mIoU 48.94, 51.29, 47.66, 50.82 by split | photos of 20 classes, masks in black and white; above rendered scenes in flat colours |
| the same | single object detection | mIoU 48.25, first split | one filled box on black; above outlines over the picture, of several things |
| the same | colourisation, ImageNet | MSE 0.51 | 1000 photos of all kinds; above five crops of four photos, and the error of plain values times 3 |
| Bar et al. 2022 (MAE-VQGAN; arXiv 2209.00647) | foreground segmentation, Pascal-5i | mIoU 30.44, its best split | as above |
| the same | single object detection | mIoU 25.36, its best split | as above |

LVM's paper shows perplexities behind five pairs only as curves; they depend on the tokenizer, whose 8192 codes are
others. These figures come from a list of both papers' published results, not from the papers' own tables.

## What to read out of it

A second pair changes little and a seventh nothing: the model knows its tasks from training and takes from the prompt
which one is meant. A second and third frame help much, the fifteenth no more. Denoising and inpainting come nearest
to their ceilings, then depth and areas; of a puzzle the next image has every cell right. Figures and edges lie where they
should be, with limbs turned and outlines bent; of joints the tokenizer itself loses a third within a tenth of the
figure, and of outlines of three pixels so much that no box can be read back: floor, answer and ceiling are 0. Colours
are invented and mostly wrong, so that the grey input scores better. A next frame is hardly nearer to the truth than
the last one, but for objects that turn.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lvm", default="./lvm")
    parser.add_argument("--weights", default="weights.bin")
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--set")
    parser.add_argument("--tasks", help="only these, with commas")
    parser.add_argument("--work", default="build/evaluate")
    parser.add_argument("-o", "--output", default="docs/evaluation.md")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    model = Model(args)
    kept = Kept(model, args)
    folder = os.path.join(args.set, "eval") if args.set else os.path.join(TOP, "prompt")
    tasks = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name != "truth")
    if args.tasks:
        tasks = [task for task in tasks if task in args.tasks.split(",")]
    asked = "".join(" --%s %s" % (name, getattr(args, name)) for name in ("queries", "set", "tasks")
                    if getattr(args, name) != parser.get_default(name))
    _, _, extra = read_extra()
    extra = extra if is_tokenizer_of(model, extra) else {}
    rows, pairs, sequences = "", [], []
    for task in tasks:
        lines = set_lines(args.set, task, args.queries) if args.set else prompt_lines(task, args.queries)
        rows += row(task, len(lines), kept.get(task, lambda: measure(model, task, lines)))
        values = kept.get("perplexity of " + task, lambda: (frame_curve if task in SEQUENCES else pair_curve)(
            model, sentences(model, task, lines, extra, args)))
        (sequences if task in SEQUENCES else pairs).append((task, values))
    text = HEAD % asked + rows + ASKED % (OF_SET if args.set else OF_PROMPT)
    text += CURVES % (CURVES_OF_SET if args.set else CURVES_OF_PROMPT, curve_table("shots", SHOTS, pairs),
                      curve_table("frames", FRAMES, sequences))
    right = kept.get("puzzles", lambda: puzzles(model, args.set))
    text += PUZZLES % (*right, "the set's" if args.set else "kept in tests/evaluation.xz")
    seconds = kept.get("protocols", lambda: protocol_seconds(model))
    with open(args.output, "w") as f:
        f.write(text + TAIL % cost_table(seconds))
    draw_sheet(model.work, tasks, os.path.splitext(args.output)[0] + ".png")


if __name__ == "__main__":
    main()
