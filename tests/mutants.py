#!/usr/bin/env python3
"""A test of the tests: python3 tests/mutants.py. Standard library, cc and the golden vectors.

Each mutant is lvm.c with one line made wrong in a way that a tired programmer might. The test that
guards the line is built from the mutant and must go red; the same test built from lvm.c as it is
must be green, so that a mutant dies of its fault and of nothing else. A mutant whose text no longer
stands in lvm.c exactly once is a failure: choose the line's new words.
"""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time

TESTS = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(TESTS)
CC = os.environ.get("CC", "cc")

# The test, the golden folders that it reads, what is wrong, the line, the wrong line.
MUTANTS = [
    ("golden", ["llama_gqa"], "a flipped sign in RoPE",
     "y[i] = x[i] * cosines[i] - x[i + half] * sines[i];",
     "y[i] = x[i] * cosines[i] + x[i + half] * sines[i];"),
    ("golden", ["llama_gqa"], "attention sees one key of the future",
     "keys = job->pos[r] + 1 - b * KV_BLOCK;", "keys = job->pos[r] + 2 - b * KV_BLOCK;"),
    ("golden", ["llama_hd100"], "attention scales by the padded width of a head",
     "scale = 1 / sqrtf((float)job->a->d);", "scale = 1 / sqrtf((float)kv->dp);"),
    ("golden", ["quant"], "Q8_0 rounds halves to even",
     "y[b].q[i] = (int8_t)clamp_int(roundf(x[i] * id), -127, 127);",
     "y[b].q[i] = (int8_t)clamp_int(rintf(x[i] * id), -127, 127);"),
    ("golden", ["vqgan_idle_attention"], "convolutions behind upsampling are not padded",
     "(struct conv_geometry){s->side, side, 1, 1, 1}",
     "(struct conv_geometry){s->side, side, 1, 1, 0}"),
    ("golden", ["vqgan_idle_attention"], "Winograd's patches lack the column on their left",
     "x0 = tile % job->across * 4 - 1;",
     "x0 = tile % job->across * 4;"),
    ("golden", ["vqgan_one_level"], "GroupNorm's eps is 1e-5",
     "double r = 1 / sqrt((variance > 0 ? variance : 0) + 1e-6);",
     "double r = 1 / sqrt((variance > 0 ? variance : 0) + 1e-5);"),
    ("golden", ["both"], "the sliding window keeps one image too few",
     "keep = g->full - g->has_bos - g->T + part", "keep = g->full - g->has_bos - 2 * g->T + part"),
    ("images", [], "resizing cuts instead of rounding",
     "RESIZE_HALF = 1 << (RESIZE_BITS - 1)", "RESIZE_HALF = 0"),
    ("images", [], "PNG's Paeth filter breaks a tie the other way",
     "return to_b <= to_c ? b : c;", "return to_b < to_c ? b : c;"),
    ("images", [], "JPEG's fancy upsampling rounds both neighbours alike",
     "else jpeg_upsample_h2(sums + 1, n, 2, 1, 2, out);",
     "else jpeg_upsample_h2(sums + 1, n, 2, 2, 2, out);"),
    ("images", [], "an EOB run in a progressive JPEG is one block short",
     "return (1 << n) + jpeg_bits(in, n);", "return (1 << n) - 1 + jpeg_bits(in, n);"),
    ("kernels", [], "exp reduces its argument downwards instead of to the nearest",
     "float n = rintf(x * 1.44269504f);", "float n = floorf(x * 1.44269504f);"),
]


class Bench:
    """A folder with lvm.c's copies, the tests and the small models."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(TOP, "lvm.c"), encoding="utf-8") as f:
            self.source = f.read()
        for name in sorted({n for m in MUTANTS for n in m[1]}):
            golden = os.path.join(TESTS, "golden", name)
            parts = [a for part in ("llama", "vqgan") if os.path.isdir(os.path.join(golden, part))
                     for a in ("--" + part, os.path.join(golden, part))]
            if parts:
                command = [sys.executable, os.path.join(TOP, "convert.py"), "-o",
                           os.path.join(folder, name + ".bin")]
                subprocess.run(command + parts, check=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)

    def arguments(self, test, goldens, place):
        if test == "images":
            return [os.path.join(TESTS, "images")]
        if test == "kernels":
            return []
        chosen = os.path.join(place, "golden")
        os.mkdir(chosen)
        for name in goldens + ["quant"]:
            if not os.path.exists(os.path.join(chosen, name)):
                os.symlink(os.path.join(TESTS, "golden", name), os.path.join(chosen, name))
        return [chosen, self.folder]

    def verdict(self, test, goldens, source):
        """Builds the test from a source and runs it: (done, it was red, last line or message)."""
        place = tempfile.mkdtemp(dir=self.folder)
        os.mkdir(os.path.join(place, "tests"))
        with open(os.path.join(place, "lvm.c"), "w", encoding="utf-8") as f:
            f.write(source)
        for name in ["test_%s.c" % test] + [n for n in os.listdir(TESTS) if n.endswith(".h")]:
            shutil.copy(os.path.join(TESTS, name), os.path.join(place, "tests"))
        program = os.path.join(place, "test")
        build = [CC, "-std=c11", "-ffp-contract=off", "-O1", "-o", program,
                 os.path.join(place, "tests", "test_%s.c" % test), "-lm", "-lpthread"]
        built = subprocess.run(build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if built.returncode != 0:
            return False, False, "does not compile: " + built.stdout.decode()[-500:]
        try:
            ran = subprocess.run([program] + self.arguments(test, goldens, place), timeout=120,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired:
            return True, True, "did not end"
        lines = ran.stdout.decode("utf-8", "replace").splitlines()
        return True, ran.returncode != 0, lines[-1] if lines else "status %d" % ran.returncode

    def mutant(self, m):
        """(passed, a line to print)"""
        test, goldens, what, right, wrong = m
        if self.source.count(right) != 1:
            return False, "%s: found %d times: %s" % (what, self.source.count(right), right)
        done, red, last = self.verdict(test, goldens, self.source.replace(right, wrong))
        return done and red, "%s: test_%s %s (%s)" % (
            what, test, "saw it" if done and red else "DID NOT SEE IT", last)

    def original(self, test, goldens):
        done, red, last = self.verdict(test, goldens, self.source)
        return done and not red, "as it is: test_%s %s (%s)" % (
            test, "is green" if done and not red else "IS RED", last)


def main():
    started, folder, passed, failed = time.time(), tempfile.mkdtemp(prefix="mutants."), 0, 0
    try:
        bench = Bench(folder)
        with concurrent.futures.ThreadPoolExecutor(2) as two:
            jobs = []
            for test in sorted({m[0] for m in MUTANTS}):
                goldens = sorted({n for m in MUTANTS if m[0] == test for n in m[1]})
                jobs.append(two.submit(bench.original, test, goldens))
            jobs += [two.submit(bench.mutant, m) for m in MUTANTS]
            for job in jobs:
                good, line = job.result()
                passed, failed = passed + good, failed + (not good)
                print(line if good else "FAILED: " + line, flush=True)
    finally:
        shutil.rmtree(folder)
    print("(%.0f seconds)" % (time.time() - started))
    print("mutants: %d passed, %d failed" % (passed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
