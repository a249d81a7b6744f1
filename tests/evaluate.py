#!/usr/bin/env python3
"""Measure a model on prompt/ and write docs/evaluation.md: `make evaluate`. Standard library only.

    python3 tests/evaluate.py [--lvm ./lvm] [--weights weights.bin] [--queries N] [--set FOLDER]
                              [--work build/evaluate] [-o docs/evaluation.md]

Every folder of prompt/ is a task. Of a task of pairs (five shown, a query) each of the six pairs is
the query once, the other five shown before it (--queries 1: as the folder has it). Of a sequence it
is the last image behind all others. An answer is sampled as `lvm batch` does it by itself, seed 1.
Beside each metric stand the floor, the last input taken for the answer, and the ceiling, the true
answer through the tokenizer and back. --set names the reference's evaluation set (eval/*.jsonl,
rank.jsonl) instead: more queries, and the 24 puzzles."""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys

METRICS = {                               # of a task: the metric, its arguments, the column
    "boxes": [("boxes", [], "iou"), ("boxes", [], "ap50")],
    "keypoints": [("pck", [], "pck_0.1"), ("pck", [], "pck_0.2")],
    "edges": [("edges", [], "f")], "depth": [("depth", [], "abs_rel"), ("depth", [], "delta_1.25")],
    "segmentation": [("miou", [], "classes")], "colorize": [("mse", [], "mse_x3")],
    "puzzle": [("cells", ["--grid", "3,3"], "cells")], "raven": [("cells", ["--grid", "3,3"], "cells")]}
ALL = [("psnr", [], "psnr"), ("ssim", [], "ssim")]
SEQUENCES = ("video", "rotation", "puzzle", "raven", "annotated_video", "video_photo")


def images(folder):
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".png"))


def prompt_lines(task, folder, queries):
    """[(inputs, target)]."""
    shown, truth = images(folder), images(os.path.join(folder, "truth"))[0]
    if task in SEQUENCES:
        return [(shown, truth)]
    whole = shown + [truth]
    pairs = [whole[i:i + 2] for i in range(0, len(whole), 2)]
    lines = []
    for i in range(len(pairs) - 1, -1, -1)[:queries]:
        others = pairs[:i] + pairs[i + 1:]
        lines.append((sum(others, []) + pairs[i][:1], pairs[i][1]))
    return lines


def set_lines(folder, task):
    with open(os.path.join(folder, "eval", task + ".jsonl")) as f:
        lines = [json.loads(line) for line in f]
    return [([os.path.join(folder, name) for name in line["input"]], os.path.join(folder, line["target"][0]))
            for line in lines]


class Model:
    def __init__(self, args):
        self.lvm, self.weights, self.work = os.path.abspath(args.lvm), os.path.abspath(args.weights), args.work

    def run(self, *words, code=(0,)):
        run = subprocess.run([self.lvm, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if run.returncode not in code:
            sys.exit("lvm %s: %s" % (" ".join(words[:2]), run.stderr.decode()))
        return run.stdout.decode()

    def put_set(self, name, lines):
        path = os.path.join(self.work, name)
        with open(path, "w") as f:
            for line in lines:
                f.write(json.dumps(line) + "\n")
        return path

    def perplexity(self, lines):
        """The mean of the lines' perplexities, as the published program counts, and exp of the mean."""
        path = self.put_set("eval.jsonl", [{"input": a, "target": [b]} for a, b in lines])
        got = [json.loads(line) for line in self.run("eval", self.weights, path, "--json", "-q").splitlines()]
        return math.exp(sum(math.log(line["perplexity"]) for line in got[:len(lines)]) / len(lines))

    def answers(self, lines, folder):
        path = self.put_set("batch.jsonl", [{"input": a, "output": "%d.png" % i} for i, (a, _) in enumerate(lines)])
        self.run("batch", self.weights, path, "-o", folder, "-q")

    def ceiling(self, lines, folder):
        for i, (_, target) in enumerate(lines):
            tokens = os.path.join(self.work, "tokens")
            self.run("encode", self.weights, target, "-o", tokens, "-q")
            self.run("decode", self.weights, tokens, "-o", os.path.join(folder, "%d.png" % i), "-q")

    def score(self, metric, options, column, predictions, truths):
        lines = self.run("score", metric, predictions, truths, "--json", *options).splitlines()
        return json.loads(lines[-1])[column]


def measure(model, task, lines):
    """Rows (metric, floor, answer, ceiling) of a task."""
    folders = {name: os.path.join(model.work, task, name) for name in ("floor", "answer", "ceiling", "truth")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    for i, (inputs, target) in enumerate(lines):
        shutil.copy(inputs[-1], os.path.join(folders["floor"], "%d.png" % i))
        shutil.copy(target, os.path.join(folders["truth"], "%d.png" % i))
    model.answers(lines, folders["answer"])
    model.ceiling(lines, folders["ceiling"])
    return [(column, [model.score(metric, options, column, folders[name], folders["truth"])
                      for name in ("floor", "answer", "ceiling")])
            for metric, options, column in ALL + METRICS.get(task, [])]


def shown(value):
    return "-" if value is None else "inf" if math.isinf(value) else "%.4g" % value


def lengths(lines, task):
    """The same targets behind fewer images: {shots or frames: lines}."""
    inputs, target = lines[0]
    if task in SEQUENCES:
        return {n: [(inputs[-n:], target)] for n in (1, 3, 7, 11, 15) if n <= len(inputs)}
    most = (len(inputs) - 1) // 2
    return {n: [(a[len(a) - 1 - 2 * n:], b) for a, b in lines] for n in range(1, most + 1)}


def puzzles(model, folder):
    lines = model.run("rank", model.weights, os.path.join(folder, "rank.jsonl"), "--json", "-q").splitlines()
    last = json.loads(lines[-1])
    return last["right"], last["of"]


def draw_sheet(work, tasks, path):
    """The first query of each task that has a metric of its own: the query, the answer, the truth."""
    rows = []
    for task in filter(METRICS.get, tasks):
        rows += ["--row", os.path.join("prompt", task), os.path.join(work, task, "answer/0.png"),
                 os.path.join(work, task, "truth/0.png")]
    subprocess.run([sys.executable, "tests/make_contact_sheet.py", "-o", path, "-k", "1", *rows], check=True)


HEAD = """# How well the shipped model does

Written by `python3 tests/evaluate.py%s`, which says what is asked; evaluation.png shows the query, the answer and the
truth of the tasks that have a metric of their own. Each figure of an answer stands between its floor, the last input
taken for the answer, and its ceiling, the true answer through the tokenizer and back: no model behind this tokenizer can
draw better than that. `lvm help score` defines the metrics.

| task | queries | metric | floor | answer | ceiling |
|---|---|---|---|---|---|
"""

TAIL = """
## Published figures, and why they are none to compare with

| | task | published | what differs |
|---|---|---|---|
| Bai et al. 2023 (LVM) | foreground segmentation, Pascal-5i | mIoU 48.94, 51.29, 47.66, 50.82 by fold | photos of 20 classes; here rendered scenes in flat colours, of five kinds of things |
| the same | single object detection | mIoU 48.25 of a filled box (split 1) | a filled box on black; here outlines over the picture, of several things |
| the same | colourisation, ImageNet | MSE 0.51 | photos of all kinds; here held-out crops and scenes |
| the same | perplexity of keypoints, depth and so on | by model size | another tokenizer: a token's perplexity depends on its 8192 codes |

What to read out of it: with weights.bin the tokenizer loses outlines of three pixels, so that no answer of it can have
readable boxes; the figure is drawn well but mirrored, its left for its right; a second shot changes little, a second and
third frame do. One query a task is an example, no average.

`lvm score protocol` measures the first three as they were published, on data that cannot ship with the project.
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
    model = Model(args)
    os.makedirs(model.work, exist_ok=True)
    tasks = sorted(entry.name for entry in os.scandir("prompt") if entry.is_dir() and entry.name != "truth")
    if args.tasks:
        tasks = [task for task in tasks if task in args.tasks.split(",")]
    asked = "".join(" --%s %s" % (name, getattr(args, name)) for name in ("queries", "set", "tasks")
                    if getattr(args, name) != parser.get_default(name))
    text, curve = HEAD % asked, []
    for task in tasks:
        print(task, file=sys.stderr, flush=True)
        lines = set_lines(args.set, task) if args.set else \
            [(list(map(os.path.abspath, a)), os.path.abspath(b)) for a, b in
             prompt_lines(task, os.path.join("prompt", task), args.queries)]
        for column, values in measure(model, task, lines):
            text += "| %s | %d | %s | %s |\n" % (task, len(lines), column, " | ".join(map(shown, values)))
        curve.append((task, [(n, model.perplexity(some)) for n, some in lengths(lines, task).items()]))
    text += "\n## Perplexity against what is shown\n\nexp of the mean nats a token, of the true answer; shots of pairs,"
    text += " frames of sequences.\n\n| task | behind so many |\n|---|---|\n"
    for task, values in curve:
        text += "| %s | %s |\n" % (task, ", ".join("%d: %.3f" % pair for pair in values))
    if args.set:
        text += "\nPuzzles right, the likeliest of eight choices: %d of %d.\n" % puzzles(model, args.set)
    with open(args.output, "w") as f:
        f.write(text + TAIL)
    draw_sheet(model.work, tasks, os.path.splitext(args.output)[0] + ".png")


if __name__ == "__main__":
    main()
