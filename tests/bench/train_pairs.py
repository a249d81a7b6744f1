#!/usr/bin/env python3
"""`lvm train` beside PyTorch on the same step (train_peer.py has its sizes), in turn:

    python3 tests/bench/train_pairs.py --lvm ./lvm --python VENV/bin/python --context 1024
        --setting transformers lean --rounds 5 --steps 3

In every round lvm and each setting take --steps steps of 4096 tokens, lvm behind one that warms it
up; a round's figure is the median step. Printed are the medians over the rounds, the ratio to lvm of
each round by itself, and the share of the multiply-add peak that lvm measured at that time.
"""
import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL, BATCH = "448,7,7,1280", 4096


def write_data(lvm, folder):
    """Random sentences: what is learnt does not matter to the time."""
    lines, data = os.path.join(folder, "data.jsonl"), os.path.join(folder, "data.tok")
    draw = random.Random(1)
    with open(lines, "w", encoding="utf-8") as f:
        for _ in range(64):
            f.write(json.dumps({"tokens": [draw.randrange(8192) for _ in range(4096)]}) + "\n")
    subprocess.run([lvm, "pack", lines, "-o", data, "-q"], check=True, stdout=subprocess.DEVNULL)
    return data


def lvm_seconds(lvm, folder, data, context, steps, threads):
    out = os.path.join(folder, "run.bin")
    words = [lvm, "train", "--config", MODEL, "--data", data, "-o", out, "--context", str(context),
             "--batch", str(BATCH // context), "--steps", str(steps + 1), "-j", str(threads),
             "--save-every", "1000", "--force"]
    run = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with open(os.path.join(folder, "run.csv"), newline="", encoding="utf-8") as f:
        rates = [float(row["tok_s"]) for row in csv.DictReader(f)][1:]
    share = run.stderr.decode().split(" % of peak")[-2].split()[-1]
    return BATCH / statistics.median(rates), float(share)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lvm", default="./lvm")
    parser.add_argument("--python", required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--setting", nargs="+", default=["transformers", "lean"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    peers = {}
    for setting in args.setting:
        peers[setting] = subprocess.Popen(
            [args.python, os.path.join(HERE, "train_peer.py"), "--turns", "--setting", setting,
             "--context", str(args.context), "--steps", str(args.steps), "--threads",
             str(args.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    times = {name: [] for name in ["lvm"] + args.setting}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(args.lvm, folder)
        for peer in peers.values(): # one turn without lvm: until all have warmed up
            peer.stdin.write("\n")
            peer.stdin.flush()
            peer.stdout.readline()
        for _ in range(args.rounds):
            seconds, share = lvm_seconds(args.lvm, folder, data, args.context, args.steps,
                                         args.threads)
            times["lvm"].append(seconds)
            for setting, peer in peers.items():
                peer.stdin.write("\n")
                peer.stdin.flush()
                times[setting].append(float(peer.stdout.readline()))
            print("  ".join(f"{name} {t[-1]:.2f} s" for name, t in times.items()),
                  f" lvm at {share:.0f} % of the peak", file=sys.stderr, flush=True)
    for name, t in times.items():
        ratios = [a / b for a, b in zip(t, times["lvm"])]
        print(f"context {args.context}: {name:22} {statistics.median(t):6.2f} s a step, "
              f"{BATCH / statistics.median(t):5.0f} tok/s, {statistics.median(ratios):.2f} x lvm's "
              f"time ({min(ratios):.2f} to {max(ratios):.2f})")
    for peer in peers.values():
        peer.stdin.close()
        peer.wait()


if __name__ == "__main__":
    main()
