#!/usr/bin/env python3
"""How much of the tokenizer's speed `lvm sentences` keeps, on a CPU or a GPU:

    make lvm scenes && python3 tests/bench/sentences_rate.py [--device cuda] [-j 16]

`lvm bench --stage encode` says what encoding alone reaches; `lvm sentences` reads, crops, resizes,
encodes and writes images that examples/scenes.c has rendered, with a fresh file of tokens each time.
Both run in turn, --turns times; figures are medians. A command of a few images comes first in each
turn: what is printed as `net` leaves out what both commands take to begin (opening the weights, a
GPU's context), `whole` is images by the command's own seconds. Each image is cropped anew, so that
--images files last for any number of them. The goal is 90 % of bench; with a GPU and 16 cores, 2,500
images a second of the shipped tokenizer. The machine must be quiet.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run(words):
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("%s: %s" % (" ".join(words), done.stderr.decode("utf-8", "replace").strip()))
    return done


def bench(options, common):
    """Images a second of encoding alone."""
    lines = run([options.lvm, "bench", options.weights, "--stage", "encode", "--json", "-q"] + common)
    for line in lines.stdout.decode().splitlines():
        if json.loads(line).get("stage") == "encode":
            return json.loads(line)["rate"]
    sys.exit("lvm bench said nothing of encoding")


def sentences(options, common, folder, n, out):
    """Seconds that n images take."""
    done = run([options.lvm, "sentences", "single", folder, "--tokenizer", options.weights, "--crop", "0.8",
                "--count", str(n), "-o", out, "--force"] + common)
    said = done.stderr.decode()
    seen = re.search(r"; (\d+) images, .*; ([\d.]+) s", said)
    if seen is None or int(seen.group(1)) != n or "known" in said:
        sys.exit("not %d new images: %s" % (n, said))
    return float(seen.group(2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lvm", default=os.path.join(TOP, "lvm"))
    parser.add_argument("--scenes", default=os.path.join(TOP, "scenes"))
    parser.add_argument("--weights", default=os.path.join(TOP, "weights.bin"))
    parser.add_argument("--device", help="as lvm takes it (the CPU)")
    parser.add_argument("-j", "--threads", help="of lvm (all)")
    parser.add_argument("--images", type=int, default=300, help="files to render (300)")
    parser.add_argument("--seconds", type=float, default=20, help="that a run should take (20)")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    common = ["--device", options.device or "cpu"] + (["-j", options.threads] if options.threads else [])
    place, rows = tempfile.mkdtemp(prefix="sentences_rate."), []
    try:
        world = os.path.join(place, "world")
        run([options.scenes, world, "--kind", "single", "--count", str(options.images), "-q"])
        folder, out = os.path.join(world, "images"), os.path.join(place, "out.tok")
        for turn in range(options.turns):
            alone = bench(options, common)
            few = 32
            many = few + max(64, int(alone * options.seconds))
            short, long = (sentences(options, common, folder, n, out) for n in (few, many))
            rows.append((alone, (many - few) / max(long - short, 1e-3), many / long))
            print("turn %d: bench %.2f, net %.2f, whole %.2f images/s (%d images)"
                  % ((turn + 1,) + rows[-1] + (many,)), flush=True)
    finally:
        shutil.rmtree(place)
    alone, net, whole = (statistics.median(column) for column in zip(*rows))
    print("medians: bench %.2f, net %.2f, whole %.2f images/s; net is %.1f %% of bench"
          % (alone, net, whole, 100 * statistics.median(row[1] / row[0] for row in rows)))


if __name__ == "__main__":
    main()
