#!/usr/bin/env python3
"""Tests of `lvm train` and `lvm plot`: what they refuse, what they write, and that a run that was
stopped in any way goes on as if it had not been.

    python3 tests/test_train_cli.py [-v] [Class.test ...]

The models are tiny and their vocabulary is the small tokenizer's of tests/golden/both (256 codes).
"""

import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest

import test_cli
from test_cli import Case, SANITIZED, heed_interrupts, ignore_file_limit, pixels, read, write

CODES = 256                                   # of the small tokenizer; its bos is 256, its eos 257
HEAD = "step,tokens,epoch,loss,smoothed,lr,grad_norm,skipped,tok_s"
WHITE = (255, 255, 255)


def sentence(rng, n=48):
    """Tokens that a model can learn to foretell."""
    start, step = rng.randrange(32), rng.choice((1, 3))
    return [(start + step * i) % 32 for i in range(n)]


def lines(seed, n):
    rng = random.Random(seed)
    return "".join(json.dumps({"tokens": sentence(rng)}) + "\n" for _ in range(n)).encode()


def rows(path):
    """A log's rows as dictionaries, of which the speed is left out: it differs from run to run."""
    head, *rest = read(path).decode().splitlines()
    names = head.split(",")
    return [{k: v for k, v in zip(names, line.split(",")) if k != "tok_s"} for line in rest]


class TrainCase(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.train = write(os.path.join(cls.shared, "train.jsonl"), lines(1, 60))
        cls.val = write(os.path.join(cls.shared, "val.jsonl"), lines(2, 6))

    def words(self, *args, out="run.bin", steps=12):
        """A command that trains a tiny new model."""
        return ("train", "--config", "16,2,2,32", "--tokenizer", self.weights, "--data", self.train,
                "-o", out, "--steps", str(steps), "--batch", "2", "--context", "32", "--lr", "3e-3",
                "-j", "1") + args

    def names(self):
        return sorted(os.listdir(self.folder))


# ---- train: what it refuses ------------------------------------------------------------------------

class Refusals(TrainCase):
    def test_help(self):
        text = " ".join(self.good("help", "train").decode().split())
        for word in ("--config", "--resume RUN.ckpt", "1.5e-4", "8000 steps", "2 million",
                     "6 L D T"):
            self.assertIn(word, text)
        self.assertIn("--x steps|tokens", self.good("help", "plot").decode())
        for word in ("finetune", "pretrain"):
            self.bad(2, "did you mean train?", word, "--data", "x")

    def test_usage(self):
        data = ("train", "--data", self.train)
        new = data + ("-o", "r.bin", "--config", "16,2,2,32")
        for words, args in (
                ("--data and -o", ("train",)), ("--data and -o", data),
                ("--data and -o", ("train", "-o", "r.bin")), ("takes no words", ("train", self.train)),
                ("--config or a model to go on from", data + ("-o", "r.bin")),
                ("--config or a model to go on from", new + ("--init", self.weights)),
                ("give --init", new + ("--lora", "4,8")),
                ("goes with --lora", new + ("--lora-on", "q,v")),
                ("--tied", data + ("-o", "r.bin", "--init", self.weights, "--tied")),
                ("give one", new + ("--steps", "5", "--tokens", "5")),
                ("give one", new + ("--epochs", "5", "--minutes", "5")),
                ("train writes files", data + ("-o", "-", "--config", "100m")),
                ("train writes files", data + ("-o", ".", "--config", "100m")),
                (".ckpt and .csv come beside", data + ("-o", "r.ckpt", "--config", "100m")),
                (".ckpt and .csv come beside", data + ("-o", "r.csv", "--config", "100m")),
                (".png", new + ("--plot", "x.jpg"))):
            self.bad(2, words, *args)

    def test_values(self):
        new = ("train", "--data", self.train, "-o", "r.bin")
        for option, values in {
                "--config": ("1,2,3", "2m", "0,1,1,1", "16,2,2,32,", "16,2,2,x", "", "100M"),
                "--memory": ("0", "6q", "g", "", "1e30", "6gg"),
                "--save-every": ("0", "1.5", "m", "x", "-1m", "5s", ""),
                "--steps": ("0", "1.5", "x", "-1", "nan", "1e16", ""), "--tokens": ("0", "inf"),
                "--epochs": ("0", "-1", "nan"), "--minutes": ("0",), "--batch": ("0", "1e3"),
                "--context": ("1",), "--lr": ("0", "11", "fast"), "--beta1": ("1", "0"),
                "--loss": ("some",), "--pack": ("tight",), "--schedule": ("linear",),
                "--recompute": ("no",), "--type": ("q9",)}.items():
            for value in values:
                model = () if option == "--config" else ("--config", "16,2,2,32")
                self.bad(2, [option, value], *new, *model, option, value)
        for value in ("0,1", "4,", "x", "4,0", "4,x", "4;8", "-1"):
            self.bad(2, ["--lora", value], *new, "--init", self.weights, "--lora=" + value)

    def test_inputs(self):
        self.bad(1, "nowhere.tok", *self.words("--data", "nowhere.tok"))
        self.bad(1, "the name of a file is empty", *self.words("--data", self.train + ","))
        self.bad(1, "nowhere.bin", *self.words("--tokenizer", "nowhere.bin"))
        self.put("bad.jsonl", b'{"tokens": [1, 2]}\n{"tokens": [1, -2]}\n')
        self.bad(1, ["bad.jsonl", "line 2"], *self.words("--data", "bad.jsonl"))
        self.put("large.jsonl", b'{"tokens": [1, 300]}\n')
        self.bad(1, ["large.jsonl"], *self.words("--data", "large.jsonl", "-q"))
        self.bad(1, ["large.jsonl"], *self.words("--val", "large.jsonl", "-q"))
        golden = os.path.join(test_cli.TESTS, "golden", "both")
        self.convert(self.path("v.bin"), "--vqgan", os.path.join(golden, "vqgan"))
        self.convert(self.path("t.bin"), "--llama", os.path.join(golden, "llama"))
        self.bad(1, ["t.bin", "no tokenizer"], *self.words("--tokenizer", "t.bin"))
        self.bad(1, ["v.bin", "no transformer"], "train", "--init", "v.bin", "--data", self.train, "-o", "r.bin")
        self.good("pack", self.train, "-o", "t.tok", "-q")
        self.bad(1, ["t.tok", "--loss answers"], *self.words("--data", "t.tok", "--loss", "answers"))

    def test_outputs(self):
        """Nothing is overwritten that is an input or an earlier run's."""
        shutil.copy(self.train, self.path("own.jsonl"))
        self.bad(1, ["own.jsonl", "is an input too"], *self.words("--data", "own.jsonl", out="own.jsonl"))
        shutil.copy(self.weights, self.path("own.bin"))
        self.bad(1, ["own.bin", "is an input too"], *self.words("--tokenizer", "own.bin", out="own.bin"))
        self.bad(1, ["own.bin", "is an input too"], *self.words("--tokenizer", "own.bin", "--force", out="own.bin"))
        self.bad(1, ["nowhere/r.bin", "cannot be written"], *self.words(out="nowhere/r.bin"))
        for name in ("r.bin", "r.ckpt", "r.csv"):
            self.put(name, b"x")
            self.bad(1, [name, "--force begins anew", "--resume r.ckpt"], *self.words(out="r.bin"))
            os.remove(self.path(name))
        self.put("r-best.bin", b"x")
        self.bad(1, ["r-best.bin", "--force"], *self.words("--val", self.val, out="r.bin"))

    def test_memory(self):
        """What a run needs is told, and refused where it does not fit."""
        code, out, err = self.run_lvm(*self.words("--memory", "100k"))
        self.assertEqual((code, out, self.names()), (1, b"", []))
        self.assertRegex(err, r"\Alvm: 0\.\d{3} million parameters, 0\.\d{3} million learn; 12 steps of 2 x 32 tokens, "
                              r"lr 0\.003 to 0\.0006\n"
                              r"(  [a-z]+( \(\d of \d\))? +\d+\.\d MB\n){6}lvm: [^\n]*needs [^\n]*\n\Z")
        told = dict(re.findall(r"(?m)^  ([a-z]+).* (\d+\.\d) MB$", err))
        parts = [float(told[k]) for k in ("weights", "gradients", "optimiser", "activations", "scratch")]
        self.assertAlmostEqual(float(told["all"]), sum(parts), delta=0.4)
        self.bad(1, "needs", *self.words("--memory", "100k", "-q"))
        self.bad(1, "needs", "train", "--config", "7b", "--data", self.train, "-o", "r.bin", "-q", "--memory", "6g")


# ---- train: what it does ---------------------------------------------------------------------------

class Runs(TrainCase):
    def test_learns(self):
        self.assertEqual(self.lines(*self.words("-q", "--val", self.val, "--plot", "p", steps=120)),
                         ["run.bin", "run-best.bin"])
        self.assertEqual(self.names(), ["p.png", "run-best.bin", "run.bin", "run.ckpt", "run.csv"])
        log = rows(self.path("run.csv"))
        self.assertEqual([int(r["step"]) for r in log], list(range(1, 121)))
        self.assertEqual([int(r["tokens"]) for r in log], list(range(64, 121 * 64, 64)))
        losses = [float(r["loss"]) for r in log]
        self.assertAlmostEqual(losses[0], 5.55, delta=0.25)                # ln 258 of a model that knows nothing
        self.assertLess(sum(losses[-10:]) / 10, 3.2)
        vals = [(int(r["step"]), float(r["val"])) for r in log if r["val"]]
        self.assertEqual([s for s, _ in vals], list(range(6, 121, 6)))     # a twentieth
        self.assertLess(vals[-1][1], 3.2)
        rates = [float(r["lr"]) for r in log]
        self.assertAlmostEqual(max(rates), 3e-3, delta=1e-9)
        self.assertAlmostEqual(rates[-1], 6e-4, delta=1e-9)                # a fifth
        self.assertEqual(rates.index(max(rates)) + 1, 6)                   # a twentieth of the steps
        info = self.good("info", "run.bin").decode()
        for word in ("2 layers, width 16", "vocabulary 258", "bos 256, eos 257", "256 codes", "context 32"):
            self.assertIn(word, info)
        self.assertEqual(test_cli.png_size(read(self.path("p.png"))), (900, 560))

    def test_new_model_predicts(self):
        """The tokenizer is inside: weights of a run are ready for images."""
        self.good(*self.words("-q", "--context", "200", "--batch", "1", steps=2))
        self.assertEqual(self.lines("run.bin", self.images[0], "-q", "-j", "1"), ["out.png"])
        self.assertEqual(self.good("encode", "run.bin", self.images[0]),
                         self.good("encode", self.weights, self.images[0]))

    def test_what_it_tells(self):
        code, out, err = self.run_lvm(*self.words("--val", self.val + "," + self.train))
        self.assertEqual((code, out), (0, b"run.bin\nrun-best.bin\n"))
        for name in (self.val, self.train):
            self.assertRegex(err, r"(?m)^lvm: step 12: \S*%s: loss \d\.\d{4}, perplexity \d+\.\d{3}$"
                             % os.path.basename(name))
        self.assertRegex(err, r"(?m)^lvm: 100 %  step 12 of 12  loss \d\.\d{4}  \(mean \d\.\d{4}\)  lr 6\.00e-04  "
                              r"norm \d+\.\d\d  \d+ tokens/s  \d+ % of peak$")
        self.assertEqual(read(self.path("run.csv")).decode().splitlines()[0], HEAD + ",val,val_1,val_2")
        last = rows(self.path("run.csv"))[-1]
        low, high = sorted((float(last["val_1"]), float(last["val_2"])))
        self.assertTrue(low <= float(last["val"]) <= high)

    def test_progress_on_a_terminal(self):
        ours, theirs = pty.openpty()
        p = self.start(*self.words(steps=200), stderr=theirs)
        os.close(theirs)
        seen = b""
        try:
            while True:
                seen += os.read(ours, 4096)
        except OSError:
            pass
        os.close(ours)
        self.assertEqual(self.finish(p)[0], 0)
        self.assertIn(b"\r100 %  step 200 of 200  loss ", seen)
        drawn = re.findall(r"\r([^\r\n]*?)\x1b\[K", seen.decode())
        self.assertGreater(len(drawn), 1)
        self.assertLess(max(len(line) for line in drawn), 80)

    def test_lengths(self):
        """Steps by tokens, by epochs: 60 sentences of 48 tokens with bos and eos in rows of 32."""
        for args, steps in ((("--tokens", "640"), 10), (("--tokens", "641"), 11), (("--epochs", "0.5"), 24),
                            (("--epochs", "1", "--batch", "8"), 12)):
            words = self.words("-q", "--force", *args)
            at = words.index("--steps")
            self.good(*(words[:at] + words[at + 2:]))
            self.assertEqual(len(rows(self.path("run.csv"))), steps, args)

    def test_minutes(self):
        """As many steps as fit; the schedule ends with them, and a resumed run keeps their number."""
        words = self.words("--minutes", "0.03")
        at = words.index("--steps")
        start = time.time()
        code, _, err = self.run_lvm(*(words[:at] + words[at + 2:]))
        self.assertEqual(code, 0)
        told = int(re.search(r"note: a step takes \S+ s: (\d+) steps in 0.03 minutes", err).group(1))
        log = rows(self.path("run.csv"))
        self.assertEqual(int(log[-1]["step"]), told)
        self.assertAlmostEqual(float(log[-1]["lr"]), 6e-4, delta=1e-9)
        if not SANITIZED:
            self.assertLess(time.time() - start, 30)
        os.remove(self.path("run.bin"))
        self.assertEqual(self.lines("train", "--resume", "run.ckpt", "-q"), ["run.bin"])

    def test_threads(self):
        """Any number of them: the same bytes."""
        self.good(*self.words("-q", out="one.bin"))
        for threads in ("2", "3"):
            self.good(*self.words("-q", "-j", threads, "--recompute", "all", out="more.bin"), "--force")
            self.assertEqual(rows(self.path("more.csv")), rows(self.path("one.csv")))
            self.assertEqual(Weights(read(self.path("more.bin"))), Weights(read(self.path("one.bin"))))

    def test_options_matter(self):
        """Each changes the losses, but not the first one where it acts on updates alone."""
        self.good(*self.words("-q"))
        plain = [r["loss"] for r in rows(self.path("run.csv"))]
        for first, args in ((1, ("--seed", "5")), (1, ("--pack", "whole", "--context", "50")), (1, ("--isolate",)),
                            (1, ("--tied",)), (0, ("--beta1", "0.5")), (0, ("--beta2", "0.9")), (0, ("--clip", "0.1")),
                            (0, ("--weight-decay", "3")), (0, ("--warmup", "3")), (0, ("--schedule", "wsd")),
                            (0, ("--min-lr", "1e-3")), (0, ("--freeze", "blk.*"))):
            self.good(*self.words("-q", "--force"), *args)
            losses = [r["loss"] for r in rows(self.path("run.csv"))]
            self.assertNotEqual(losses, plain, args)
            self.assertEqual(losses[0] != plain[0], bool(first), args)

    def test_init_and_adapters(self):
        """A model goes on from its weights; adapters are files of their own, smaller than it."""
        self.good(*self.words("-q", steps=60, out="base.bin"), "--type", "f32")
        trained = float(rows(self.path("base.csv"))[-1]["smoothed"])
        more = ("train", "-q", "--init", "base.bin", "--data", self.train, "--steps", "20", "--batch", "2", "-j", "1")
        self.good(*more, "-o", "more.bin", "--val", self.val)
        self.assertLess(float(rows(self.path("more.csv"))[0]["loss"]), trained + 0.5)
        self.assertEqual(float(rows(self.path("more.csv"))[0]["tokens"]), 64)          # base.bin's context
        self.assertIn("256 codes", self.good("info", "more.bin").decode())
        self.good(*more, "-o", "lora.bin", "--lora", "4,8", "--lora-on", "q,v", "--lr", "1e-2")
        log = rows(self.path("lora.csv"))
        self.assertLess(float(log[-1]["smoothed"]), float(log[0]["loss"]))
        self.assertLess(os.path.getsize(self.path("lora.bin")), os.path.getsize(self.path("base.bin")) // 8)
        self.assertEqual(self.lines("merge", "base.bin", "lora.bin", "-o", "merged.bin"), ["merged.bin"])

    def test_loss_of_answers(self):
        rng = random.Random(3)
        self.put("pairs.jsonl", "".join(
            json.dumps({"input_tokens": [rng.randrange(256) for _ in range(24)], "output_tokens": sentence(rng, 24)})
            + "\n" for _ in range(40)).encode())
        last = {}
        for loss in ("all", "answers"):
            self.good(*self.words("-q", "--force", "--data", "pairs.jsonl", "--pack", "whole", "--context", "64",
                                  "--loss", loss, steps=80))
            last[loss] = float(rows(self.path("run.csv"))[-1]["smoothed"])
        self.assertLess(last["answers"], last["all"] - 0.5)       # noise cannot be learnt

    def test_force(self):
        self.good(*self.words("-q", "--val", self.val))
        first = read(self.path("run.csv"))
        self.good(*self.words("-q", "--force", "--seed", "9", steps=3))
        self.assertEqual(len(rows(self.path("run.csv"))), 3)
        self.assertNotEqual(read(self.path("run.csv"))[:200], first[:200])

    def test_diverges(self):
        """A rate that leads to numbers that are none: steps are skipped, ten in a row end the run."""
        code, out, err = self.run_lvm(*self.words("--lr", "10", "--warmup", "0", "--clip", "0", "--save-every", "1",
                                                  "--weight-decay", "10", "--min-lr", "10", steps=400))
        if code == 0:
            self.skipTest("this model bears anything")
        self.assertEqual((code, out), (1, b""))
        self.assertRegex(err, r"(?m)^lvm: note: step \d+ was skipped: its loss is \S+, the gradient's norm \S+ \(1 so far\)$")
        self.assertRegex(err, r"lvm: stopped: 10 steps in a row were skipped; run\.ckpt is that of step \d+; [^\n]*--lr\n\Z")
        self.assertTrue({"run.ckpt", "run.csv"} <= set(self.names()) and "run.bin" not in self.names())


class Weights:
    """The tensors of a weights file: two that have them alike are equal, whatever they are called."""

    def __init__(self, data):
        g = test_cli.Gguf(data)
        self.parts = ([t[:3] for t in g.tensors], g.data)

    def __eq__(self, other):
        return self.parts == other.parts


# ---- train: stopped and resumed --------------------------------------------------------------------

class Resume(TrainCase):
    STEPS = 40

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.whole = os.path.join(cls.shared, "whole")
        os.mkdir(cls.whole)
        subprocess.run([test_cli.LVM, *cls.command()], cwd=cls.whole, check=True, stdout=subprocess.DEVNULL)

    @classmethod
    def command(cls, *args):
        return ("train", "--config", "16,2,2,32", "--tokenizer", cls.weights, "--data", cls.train, "--val", cls.val,
                "-o", "run.bin", "--steps", str(cls.STEPS), "--batch", "2", "--context", "32", "--lr", "3e-3", "-q",
                "-j", "1") + args

    def same_as_whole(self, whole=None):
        whole = whole or self.whole
        self.assertEqual(rows(self.path("run.csv")), rows(os.path.join(whole, "run.csv")))
        for name in ("run.bin", "run-best.bin"):
            self.assertEqual(read(self.path(name)), read(os.path.join(whole, name)), name)

    def wait_for_step(self, process, step, limit=60):
        end = time.time() + limit
        while time.time() < end and process.poll() is None:
            try:
                if read(self.path("run.csv")).count(b"\n") > step:
                    return
            except FileNotFoundError:
                pass
            time.sleep(0.002)

    def stop(self, number, step, *args):
        """A run that a signal ends around a step; its exit code and what it said."""
        p = self.start(*self.command(*args), preexec_fn=heed_interrupts)
        self.wait_for_step(p, step)
        p.send_signal(number)
        return self.finish(p)

    def test_signals(self):
        for number, words in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, r"told to stop \(SIGTERM\)"),
                              (signal.SIGHUP, "the terminal is gone")):
            for name in self.names():
                os.remove(self.path(name))
            code, out, err = self.stop(number, 5)
            self.assertEqual((code, out), (-number, b""), err)
            found = re.fullmatch(r"lvm: %s; lvm train --resume run\.ckpt goes on behind step (\d+)\n" % words, err)
            self.assertTrue(found, err)
            step = int(found.group(1))                    # its row may wait for a validation that was cut off
            self.assertIn(len(rows(self.path("run.csv"))), (step - 1, step))
            self.assertEqual(self.lines("train", "--resume", "run.ckpt", "-q"), ["run.bin", "run-best.bin"])
            self.same_as_whole()

    def test_resumed_with_other_threads(self):
        self.assertEqual(self.stop(signal.SIGINT, 10)[0], -signal.SIGINT)
        code, out, err = self.run_lvm("train", "--resume", "run.ckpt", "-j", "3", "--recompute", "all", "--plot", "p")
        self.assertEqual((code, out), (0, b"run.bin\nrun-best.bin\n"))
        self.assertRegex(err, r"(?m)^lvm: note: goes on behind step \d+ of 40$")
        self.same_as_whole()

    def test_killed(self):
        """At any moment, with -9: the next run goes on from the last checkpoint, and ends with the numbers of
        the one that nobody stopped."""
        os.mkdir(self.path("whole"))
        new = self.command("--save-every", "7", "--steps", "600")
        subprocess.run([test_cli.LVM, *new], cwd=self.path("whole"), check=True, stdout=subprocess.DEVNULL)
        rng, kills, steps, words = random.Random(11), 0, set(), new
        while kills < (4 if SANITIZED else 20):
            p = self.start(*words)
            time.sleep(rng.random() * (3 if SANITIZED else 0.3))
            kills += p.poll() is None
            p.kill()
            p.communicate()
            for name in self.names():                     # no signal handler could remove it
                if name.endswith(".tmp"):
                    os.remove(self.path(name))
            begun = "run.ckpt" in self.names()
            steps.add(len(rows(self.path("run.csv"))) if begun else 0)
            words = ("train", "--resume", "run.ckpt", "-q", "-j", "2") if begun and p.returncode != 0 else \
                new + ("--force",)
        self.assertGreater(len(steps), 2)
        self.good(*words)
        self.same_as_whole(whole=self.path("whole"))

    def test_from_another_folder(self):
        """Inputs are found under relative names too, outputs lie beside the checkpoint."""
        shutil.copy(self.train, self.path("t.jsonl"))
        words = [w if w != self.train else "t.jsonl" for w in self.command("--save-every", "5")]
        p = self.start(*words)
        self.wait_for_step(p, 12)
        p.kill()
        p.communicate()
        os.mkdir(self.path("sub"))
        for name in ("run.ckpt", "run.csv"):
            shutil.move(self.path(name), self.path("sub"))
        out = subprocess.run([test_cli.LVM, "train", "--resume", "sub/run.ckpt", "-q"], cwd=self.folder, check=True,
                             stdout=subprocess.PIPE).stdout
        self.assertEqual(out, b"sub/run.bin\nsub/run-best.bin\n")
        for name in ("run.ckpt", "run.csv"):
            os.remove(self.path("sub/" + name)) if name == "run.csv" else None
        out = subprocess.run([test_cli.LVM, "train", "--resume", "run.ckpt", "-q"], cwd=self.path("sub"), check=True,
                             stdout=subprocess.PIPE).stdout
        self.assertEqual(out, b"run.bin\nrun-best.bin\n")
        self.assertEqual(read(self.path("sub/run.bin")), read(os.path.join(self.whole, "run.bin")))
        for name in self.names():
            if name.endswith(".tmp"):
                os.remove(self.path(name))

    def test_names_with_odd_characters(self):
        name = "a\\n b\nc,d.jsonl"
        shutil.copy(self.train, self.path(name))
        words = [w if w != self.train else name for w in self.command()]
        p = self.start(*words, preexec_fn=heed_interrupts)
        self.wait_for_step(p, 5)
        p.send_signal(signal.SIGINT)
        self.assertEqual(self.finish(p)[0], -signal.SIGINT)
        self.good("train", "--resume", "run.ckpt", "-q")
        self.same_as_whole()

    def test_log(self):
        """Rows behind the checkpoint are dropped, a torn last one too; a log that is gone begins anew."""
        self.assertEqual(self.stop(signal.SIGINT, 8)[0], -signal.SIGINT)
        n = len(rows(self.path("run.csv")))
        with open(self.path("run.csv"), "ab") as f:
            f.write(b"%d,1,1,1,1,1,1,1,1,\n%d,1,1,1" % (n + 1, n + 2))
        shutil.copytree(self.folder, self.path("again"))
        self.good("train", "--resume", "run.ckpt", "-q")
        self.same_as_whole()
        os.remove(self.path("again/run.csv"))
        self.good("train", "--resume", "again/run.ckpt", "-q")
        self.assertEqual([int(r["step"]) for r in rows(self.path("again/run.csv"))], list(range(n + 1, self.STEPS + 1)))

    def test_finished_run(self):
        """Its checkpoint writes the weights again."""
        for name in ("run.ckpt", "run.csv"):
            shutil.copy(os.path.join(self.whole, name), self.folder)
        self.good("train", "--resume", "run.ckpt", "-q")
        self.assertEqual(read(self.path("run.bin")), read(os.path.join(self.whole, "run.bin")))

    def test_options(self):
        shutil.copy(os.path.join(self.whole, "run.ckpt"), self.folder)
        for args in (("--lr", "1e-3"), ("--steps=50"), ("--data", "x"), ("-o", "x.bin"), ("--seed", "1"), ("-s1",),
                     ("--force",), ("--val", self.val)):
            args = (args,) if isinstance(args, str) else args
            self.bad(2, ["a resumed run keeps what its checkpoint says"], "train", "--resume", "run.ckpt", *args)
        self.bad(2, "--save-every", "train", "--resume", "run.ckpt", "--save-every", "often")

    def test_changed_data(self):
        shutil.copy(self.train, self.path("t.jsonl"))
        words = [w if w != self.train else "t.jsonl" for w in self.command()]
        p = self.start(*words, preexec_fn=heed_interrupts)
        self.wait_for_step(p, 5)
        p.send_signal(signal.SIGINT)
        self.finish(p)
        data = read(self.path("t.jsonl"))
        self.put("t.jsonl", data.replace(b" 5,", b" 6,", 1))
        self.bad(1, ["t.jsonl", "run.ckpt"], "train", "--resume", "run.ckpt", "-q")
        self.put("t.jsonl", data[:data.index(b"\n") + 1])
        self.bad(1, ["t.jsonl", "run.ckpt"], "train", "--resume", "run.ckpt", "-q")
        os.remove(self.path("t.jsonl"))
        self.bad(1, ["t.jsonl", "No such file"], "train", "--resume", "run.ckpt", "-q")
        self.put("t.jsonl", data)
        self.good("train", "--resume", "run.ckpt", "-q")
        self.same_as_whole()

    def test_damaged_data(self):
        """An id that is none is found when its sentence's turn comes; what was learnt until then is kept."""
        self.good("pack", self.train, "-o", "t.tok", "-q")
        data, ids = read(self.path("t.tok")), json.loads(read(self.train).splitlines()[30])["tokens"]
        at = data.index(struct.pack("<48H", *ids)) + 20
        self.put("t.tok", data[:at] + b"\xff\xff" + data[at + 2:])
        words = [w if w != self.train else "t.tok" for w in self.command("--steps", "80")]
        code, out, err = self.run_lvm(*words)
        self.assertEqual((code, out), (1, b""))
        self.assertRegex(err, r"\Alvm: t\.tok: sentence 31, token 11[^\n]*\n\Z")
        done = len(rows(self.path("run.csv")))
        self.assertGreater(done, 0)
        again = self.run_lvm("train", "--resume", "run.ckpt")
        self.assertIn("goes on behind step %d of 80" % done, again[2])
        self.assertTrue(again[2].endswith(err))
        self.assertEqual(len(rows(self.path("run.csv"))), done)

    def test_damaged_checkpoint(self):
        data = read(os.path.join(self.whole, "run.ckpt"))
        for damaged in (b"", b"x", data[:100], data[:len(data) // 2], data[:-1],
                        data[:-50] + bytes((data[-50] ^ 1,)) + data[-49:],
                        data[:300] + bytes((data[300] ^ 1,)) + data[301:]):
            self.put("run.ckpt", damaged)
            self.bad(1, "run.ckpt", "train", "--resume", "run.ckpt", "-q")
        self.bad(1, ["none.ckpt", "No such file"], "train", "--resume", "none.ckpt")
        self.bad(1, "both.bin", "train", "--resume", self.weights)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "limits of a running program are Linux's")
    def test_disk_full(self):
        """A disk that holds no checkpoint shows before the work; one that fills up later loses nothing beyond
        the last checkpoint, and each file says so."""
        whole = os.path.getsize(os.path.join(self.whole, "run.ckpt"))
        code, out, err = self.run_lvm(*self.command(), preexec_fn=lambda: ignore_file_limit(whole // 2))
        self.assertEqual((code, out), (1, b""))
        self.assertRegex(err, r"\Alvm: run\.ckpt: cannot be written: [^\n]+\n\Z")
        self.assertEqual(self.names(), ["run.csv"])
        p = self.start(*self.command("--force", "--save-every", "5"))
        self.wait_for_step(p, 7)
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (0, 0))
        p.communicate()
        self.assertNotEqual(p.returncode, 0)
        for name in self.names():
            self.assertFalse(name.endswith(".tmp"), name)
        self.good("train", "--resume", "run.ckpt", "-q")
        self.same_as_whole()

    @unittest.skipUnless(hasattr(resource, "prlimit"), "limits of a running program are Linux's")
    def test_disk_full_goes_on(self):
        """Where a write fails, as on a full disk: messages, and training goes on."""
        words = ("train", "--config", "16,2,2,32", "--data", self.train, "-o", "run.bin", "--steps", "24", "--batch",
                 "2", "--context", "32", "-q", "-j", "1", "--save-every", "4")
        self.good(*words)
        want, limit = rows(self.path("run.csv")), os.path.getsize(self.path("run.ckpt")) - 1
        self.assertLess(os.path.getsize(self.path("run.bin")), limit)
        p = self.start(*words, "--force", preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        self.wait_for_step(p, 5)
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code, out, err = self.finish(p)
        self.assertEqual((code, out), (0, b"run.bin\n"), err)
        self.assertRegex(err, r"(?m)^lvm: run\.ckpt: cannot be written: [^\n]+; the checkpoint of step \d+ stays$")
        self.assertEqual(rows(self.path("run.csv")), want)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "limits of a running program are Linux's")
    def test_log_that_cannot_grow(self):
        """A row that does not fit is missing, and whole rows stand before and after it."""
        p = self.start(*self.command("--steps", "400"), preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        self.wait_for_step(p, 20)
        size = os.path.getsize(self.path("run.csv")) + 150
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        end = time.time() + 60
        while time.time() < end and p.poll() is None and os.path.getsize(self.path("run.csv")) < size - 150:
            time.sleep(0.01)
        time.sleep(0.1)
        resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        code, out, err = self.finish(p)
        self.assertEqual(code, 0, err)
        self.assertRegex(err, r"(?m)^lvm: run\.csv: cannot be written: [^\n]+; it lacks rows from step \d+ on$")
        self.assertTrue(all(len(r) == 9 for r in rows(self.path("run.csv"))))
        self.assertEqual(self.lines("plot", "run.csv"), ["plot.png"])


# ---- plot ------------------------------------------------------------------------------------------

class Plot(TrainCase):
    BLUE, ORANGE, GREEN = (20, 100, 180), (214, 90, 10), (20, 140, 90)

    def log(self, name, losses, val=(), head="step,tokens,loss,val\n"):
        vals = dict(val)
        return self.put(name, (head + "".join("%d,%d,%g,%s\n" % (i, 100 * i, loss, vals.get(i, ""))
                                              for i, loss in enumerate(losses, 1))).encode())

    def picture(self, *args):
        self.assertEqual(self.lines("plot", *args, "-o", "p.png"), ["p.png"])
        data = read(self.path("p.png"))
        self.assertEqual(test_cli.png_size(data), (900, 560))
        return [[tuple(row[3 * x:3 * x + 3]) for x in range(900)] for row in pixels(data)]

    def height(self, picture, color, x):
        """The middle of what is of this color in a column between the axes, below the legend."""
        ys = [y for y in range(46 if x < 600 else 120, 500) if picture[y][x] == color]
        return sum(ys) / len(ys) if ys else None

    def test_lines(self):
        """A constant run is a level line; the higher loss lies higher; a shorter run ends earlier."""
        self.log("a.csv", [2.0] * 100)
        self.log("b.csv", [4.0] * 50)
        picture = self.picture("a.csv", "b.csv")
        low = [self.height(picture, self.BLUE, x) for x in range(100, 860, 20)]
        high = [self.height(picture, self.ORANGE, x) for x in range(100, 460, 20)]
        self.assertNotIn(None, low)
        self.assertEqual(len(set(low)), 1)
        self.assertEqual(len(set(high)), 1)
        self.assertLess(high[0], low[0])
        self.assertIsNone(self.height(picture, self.ORANGE, 520))
        self.assertEqual(sum(p == self.GREEN for row in picture for p in row), 0)

    def test_axes(self):
        """Tokens below: runs of equal steps and other batches differ in length. Ticks stand at round numbers."""
        self.log("a.csv", [2 + 0.01 * i for i in range(100)])
        self.put("b.csv", re.sub(rb"(?m)^(\d+),(\d+)", lambda m: b"%s,%d" % (m.group(1), 2 * int(m.group(2))),
                                 read(self.path("a.csv"))))
        steps, tokens = self.picture("a.csv", "b.csv"), self.picture("a.csv", "b.csv", "--x", "tokens")
        self.assertIsNone(self.height(tokens, self.BLUE, 700))
        self.assertIsNotNone(self.height(tokens, self.ORANGE, 700))
        self.assertIsNotNone(self.height(steps, self.ORANGE, 700))
        grid = [x for x in range(90, 900) if steps[480][x] == (226, 226, 226)]
        self.assertEqual([round((x - 78) / 794 * 100) for x in grid], [20, 40, 60, 80, 100])

    def test_validation(self):
        self.log("a.csv", [3.0] * 100)
        before = self.picture("a.csv")
        self.log("a.csv", [3.0] * 100, {50: 3.4})
        after = self.picture("a.csv")
        def count(picture):
            return sum(p == self.BLUE for row in picture[46:500] for p in row[440:510])
        self.assertGreater(count(after), count(before) + 30)

    def test_other_logs(self):
        """Columns are found by name; what is no number is left out; one row is enough."""
        self.put("a.csv", b"step,seconds,tokens,lr,loss,grad_norm\r\n1,0.1,10,1,9.5,1\r\n2,0.1,20,1,nan,inf\r\n"
                          b"3,0.2,30,1,8.5,1\r\n4,0.3,40,1,8")
        self.picture("a.csv")
        self.put("one.csv", b"step,tokens,loss\n0,0,5\n")
        self.picture("one.csv")
        self.put("none.csv", b"step,tokens,loss\n1,1,nan\n2,2,\n")
        self.picture("none.csv")
        self.log("long.csv", [9 / (1 + i) for i in range(20000)])
        self.picture("long.csv", *["one.csv"] * 30)
        self.assertEqual(self.lines("plot", "one.csv"), ["plot.png"])
        self.assertEqual(self.good("plot", "one.csv", "-o", "-"), read(self.path("plot.png")))
        self.assertEqual(self.good("plot", "-", "-o", "-", data=b"step,tokens,loss\n0,0,5\n")[:4], b"\x89PNG")

    def test_faults(self):
        good = b"step,tokens,loss,val\n1,10,5.5,\n2,20,5.25,5.1\n"
        self.put("good.csv", good)
        for text, words in ((b"", "holds no rows"), (b"step,tokens,loss\n", "holds no rows"),
                            (b"a,b\n1,2\n", "line 1: names no columns"), (good + b"3,30\n", "line 4: has 2 fields, not 4"),
                            (good + b"3,30,x,\n", 'line 4: "x" is no number'), (good + b"\n", "line 4: has 1 fields"),
                            (good + b"3,,1,\n", "line 4: lacks its step"), (good + b"-3,30,1,\n", "line 4: lacks"),
                            (good + b"1e30,30,1,\n", "line 4: lacks"), (good + b"3,30,1\0,\n", "line 4: is no line"),
                            (good + b"9" * 9000 + b"\n", "line 4: is no line"), (read(self.weights)[:5000], "line ")):
            self.put("bad.csv", text)
            self.bad(1, ["bad.csv: ", words], "plot", "good.csv", "bad.csv")
        self.put("torn.csv", good + b"3,30,")
        self.assertEqual(self.lines("plot", "torn.csv"), ["plot.png"])
        self.bad(1, "nowhere.csv", "plot", "nowhere.csv")
        self.bad(2, "give logs", "plot")
        self.bad(2, "x.jpg", "plot", "good.csv", "-o", "x.jpg")
        shutil.copy(self.path("good.csv"), self.path("log.png"))
        self.bad(1, ["log.png", "input"], "plot", "good.csv", "log.png", "-o", "log.png")

    def test_fuzzed(self):
        """Bytes changed at random: a picture or a message, never a crash."""
        rng, good = random.Random(4), b"step,tokens,loss,val\n" + b"".join(b"%d,%d,%g,\n" % (i, i, 9 / i) for i in range(1, 9))
        for _ in range(60):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.choice(b"0123456789,.-e\n\r\x00\xffnif")
            self.put("f.csv", bytes(data))
            code, _, err = self.run_lvm("plot", "f.csv")
            self.assertIn(code, (0, 1))
            self.assertEqual(code == 1, err != "", err)


if __name__ == "__main__":
    unittest.main()
