#!/usr/bin/env python3
"""Tests of the way from nothing to a model: the README's page of that name, whose commands are read
from it and run as they stand there, but smaller and with the small model of tests/golden/both; and
examples/train_demo.sh, which `make train-demo` runs.

    python3 tests/test_demo.py [-v] [Class.test ...]

LVM names the program (./lvm), SCENES examples/scenes.c's (./scenes).
"""

import json
import os
import re
import struct
import subprocess
import unittest

from test_cli import Case, LVM, TIMEOUT, TOP, pixels, read

SCENES = os.path.abspath(os.environ.get("SCENES", os.path.join(TOP, "scenes")))
README = os.path.join(TOP, "README.md")
SCRIPT = os.path.join(TOP, "examples", "train_demo.sh")
# A number of the page, and what it is here: a sentence of the small model has 2 x 64 + 2 tokens.
SMALL = {"--count 160": "--count 5", "--count 8": "--count 4", "--steps 200": "--steps 3",
         "--context 514": "--context 130"}
CELL = 128 + 12                               # of a sheet's thumbnail, its frame and gap


def page():
    return read(README).decode().split("\n## From nothing to a model\n")[1].split("\n## ")[0]


def page_commands():
    """The page's commands, each with the lines of output that are printed below it."""
    commands = []
    for line in page().replace("\\\n", "").splitlines():
        if line.startswith("    $ "):
            commands.append((re.sub(r"\s+# .*", "", line[6:]), []))
        elif line.startswith("    "):
            commands[-1][1].append(line[4:])
    return commands


def size_of(png):
    return struct.unpack(">II", png[16:24])


class Page(Case):
    def setUp(self):
        super().setUp()
        for name, path in (("lvm", LVM), ("scenes", SCENES), ("weights.bin", self.weights)):
            os.symlink(path, self.path(name))

    def run_command(self, command):
        done = subprocess.run(["sh", "-c", command], cwd=self.folder, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, "%s\n%s" % (command, done.stderr.decode()))
        return done.stdout.decode().splitlines()

    def test_every_command(self):
        commands, printed = page_commands(), {}
        self.assertEqual(commands.pop(0), ("make lvm scenes", []))
        subprocess.run(["make", "-n", "lvm", "scenes", "train-demo"], cwd=TOP, check=True,
                       stdout=subprocess.DEVNULL)
        words = " ".join(command + " " for command, _ in commands)
        for number in SMALL:
            self.assertIn(number + " ", words)
        for name in ("./scenes", "./lvm sentences pairs", "./lvm sentences show", "./lvm train",
                     "./lvm plot", "./lvm weights.bin", "./lvm eval", "./lvm batch", "./lvm score"):
            self.assertIn(name + " ", words)
        for command, shown in commands:
            small = command
            for number, less in SMALL.items():
                small = re.sub(number + r"(?!\d)", less, small)
            printed[command] = lines = self.run_command(small)
            names = [line for line in shown if re.fullmatch(r"[\w/-]+(\.\w+)?", line)]
            self.assertEqual([line for line in lines if line in names], names, command)
        self.outcome(printed)

    def outcome(self, printed):
        """What the commands have made and said."""
        said = {command.split()[1]: lines for command, lines in printed.items()}
        self.assertEqual(len(said["eval"]), 5)
        self.assertRegex(said["eval"][-1], r"\Aperplexity [\d.]+, the mean of 4 lines\Z")
        self.assertRegex(said["score"][0], r"\Apsnr +[\d.]+ +mean of 4 images\Z")
        for folder, n in (("world/depth", 5), ("exam/depth", 4)):
            self.assertEqual(len(os.listdir(self.path(folder))), n)
        for i in range(4):
            self.assertEqual(size_of(read(self.path("answers/%d.png" % i))), (256, 256))
        self.assertEqual(len(read(self.path("rainbow.csv")).splitlines()), 1 + 3)
        for name in ("pairs.png", "loss.png", "again.png", "depth.png", "sheet.png"):
            pixels(read(self.path(name)))

    def test_named_files(self):
        """What the page links to is there, and make train-demo runs what it says."""
        links = re.findall(r"\]\(([^)]+)\)", page())
        self.assertIn("docs/train-demo.png", links)
        for link in links:
            self.assertTrue(os.path.exists(os.path.join(TOP, link)), link)
        plan = subprocess.run(["make", "-n", "train-demo"], cwd=TOP, check=True,
                              stdout=subprocess.PIPE)
        self.assertEqual(plan.stdout.decode().splitlines()[-1], "examples/train_demo.sh")


class Script(Case):
    def demonstrate(self, **variables):
        """The script at small size: its status, what it printed and the commands that it showed."""
        env = dict(os.environ, LVM=LVM, SCENES=SCENES, WEIGHTS=self.weights, OUT=self.path("demo"),
                   PAIRS="4", QUESTIONS="3", STEPS="3", CONTEXT="130", **variables)
        done = subprocess.run(["sh", SCRIPT], env=env, stdin=subprocess.DEVNULL, cwd=self.folder,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
        err = done.stderr.decode()
        shown = [line[2:].split()[:2] for line in err.splitlines() if line.startswith("$ ")]
        return done.returncode, done.stdout.decode(), err, shown

    def test_all_of_it(self):
        """Before, after, sheet and table; with a bound that cannot be met it fails in the end."""
        status, out, err, shown = self.demonstrate(BOUND="1e-9")
        self.assertEqual(status, 1, err)
        ends = [os.path.basename(program) + " " + word for program, word in shown if word != SCRIPT]
        made = self.path("demo")
        judged = ["lvm eval", "lvm batch", "lvm score"]
        sheet = "python3 " + os.path.join(os.path.dirname(SCRIPT), "../tests/make_contact_sheet.py")
        self.assertEqual(ends, ["scenes %s/train" % made, "scenes %s/test" % made] +
                         ["lvm sentences"] * 2 + judged + ["lvm train"] + judged + [sheet])
        table = re.search(r"(?s)\n3 held-out questions +perplexity +PSNR\n"
                          r"the model as it was, 3 examples each +([\d.]+) +[\d.]+\n"
                          r"with the adapters, no examples +([\d.]+) +[\d.]+\n"
                          r"\d+ s in all, \d+ of them training\n"
                          r"perplexity is ([\d.]+) of what it was; at most 0.00 was asked for\n",
                          out)
        self.assertIsNotNone(table, out)
        before, after, share = map(float, table.groups())
        self.assertAlmostEqual(after / before, share, delta=0.006)
        means = [float(x) for x in re.findall(r"\nperplexity ([\d.]+), the mean of 3 lines\n", out)]
        self.assertEqual(len(means), 2)
        for mean, said in zip(means, (before, after)):
            self.assertAlmostEqual(mean / said, 1, delta=1e-4)
        self.assertEqual(size_of(read(os.path.join(made, "sheet.png"))), (4 * CELL, 3 * CELL))
        pixels(read(os.path.join(made, "loss.png")))

    def test_questions(self):
        """Held-out scenes, an example in one question only; a second run begins anew."""
        os.makedirs(self.path("demo/before"))
        status, out, err, _ = self.demonstrate(BOUND="")
        self.assertEqual(status, 0, err)
        self.assertNotIn("asked for", out)
        sets = [json.loads(line)
                for line in read(self.path("demo/test/before.jsonl")).splitlines()]
        used = [name for s in sets for name in s["input"] + s["target"]]
        self.assertEqual((len(used), len(set(used))), (3 * 8, 3 * 8))
        for s in sets:
            self.assertEqual(s["input"][-1].replace("images", "depth"), s["target"][0])
        alone = [json.loads(line)
                 for line in read(self.path("demo/test/after.jsonl")).splitlines()]
        self.assertEqual([(s["input"], s["target"], s["output"]) for s in alone],
                         [(s["input"][-1:], s["target"], s["output"]) for s in sets])
        train, test = ({read(self.path("demo/%s/images/%s" % (part, name)))
                        for name in os.listdir(self.path("demo/%s/images" % part))}
                       for part in ("train", "test"))
        self.assertEqual((len(train), len(test), len(train & test)), (4, 12, 0))


if __name__ == "__main__":
    unittest.main()
