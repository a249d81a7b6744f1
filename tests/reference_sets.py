"""Compares `lvm eval` with the likelihoods that PyTorch gives a reference model: standard library only.

    python3 reference_sets.py REFERENCE LVM WEIGHTS TEST_GOLDEN [--full | LINES]

REFERENCE is a folder with rank.jsonl, eval/*.jsonl and golden/answers.json (see its own REPORT.md), LVM the
program, WEIGHTS what convert.py made of the reference in its own types. On every puzzle the choice must be
PyTorch's; likelihoods must agree within 1e-3 nats a token. An image one of whose tokens lies between two
equally near codes may differ, if TEST_GOLDEN --nll finds that token, takes the other code and has PyTorch's
likelihood then; and among all images (--full) no more than one in forty. LINES (2) puzzles and lines of as
many sets, or with --full all.
"""
import json
import math
import os
import subprocess
import sys
import tempfile

reference, lvm, weights, test_golden = sys.argv[1:5]
most = (sys.argv[5:] or ["2"])[0]
full = most == "--full"
most = None if full else int(most)
passed = failed = compared = 0
ties = []
answers = json.load(open(os.path.join(reference, "golden", "answers.json")))


def check(good, what):
    global passed, failed
    passed += bool(good)
    failed += not good
    if not good:
        print("FAILED:", what)


def run(name):
    command = [lvm, "eval", weights, os.path.join(reference, name), "--json", "--base", reference]
    done = subprocess.run(command + ([] if full else ["--lines", str(most)]), stdout=subprocess.PIPE, timeout=7200)
    check(done.returncode == 0, "%s: exit status %d" % (name, done.returncode))
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    return lines[:-1], lines[-1]


def expected(lines):
    return len(lines) if full else min(most, len(lines))


def compare(name, got, want, images):
    """Mean negative log-likelihoods of the last image behind the others."""
    global compared
    compared += 1
    if abs(got - want) > 1e-3:
        print("differs: %s: %.5f nats a token, not %.5f" % (name, got, want))
        ties.append(" ".join([repr(want)] + [os.path.join(reference, p) for p in images]))
    else:
        check(True, name)


lines, sums = run("rank.jsonl")
puzzles = [json.loads(line) for line in open(os.path.join(reference, "rank.jsonl"))]
check(len(lines) == expected(puzzles), "every puzzle has its line")
for line, want, puzzle in zip(lines, answers["rank"], puzzles):
    best = want.index(min(want))
    check(line["answer"] == best, "puzzle %d: answer %d, not %d" % (line["line"], line["answer"], best))
    check(line["right"] == (best == puzzle["answer"]), "puzzle %d: right or not" % line["line"])
    for image, p, nll in zip(puzzle["choices"], line["perplexities"], want):
        compare("puzzle %d, %s" % (line["line"], image), math.log(p), nll, puzzle["input"] + [image])
print("right answers: %d of %d" % (sums["right"], sums["of"]))
if full:
    check(sums["right"] == answers["rank_right"], "as many right answers as PyTorch's")
for task in sorted(answers["eval"])[:most]:
    lines, sums = run("eval/%s.jsonl" % task)
    check(len(lines) == expected(answers["eval"][task]), "every line of " + task)
    examples = [json.loads(line) for line in open(os.path.join(reference, "eval", task + ".jsonl"))]
    for line, nll, example in zip(lines, answers["eval"][task], examples):
        compare("%s %d" % (task, line["line"]), math.log(line["perplexity"]), nll, example["input"] + example["target"])
    mean = sum(line["perplexity"] for line in lines) / len(lines)
    check(abs(mean - sums["perplexity"]) < 1e-6 * mean, "the mean of " + task)
if ties:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as proof:
        proof.write("\n".join(ties) + "\n")
        proof.flush()
        done = subprocess.run([test_golden, "--nll", proof.name, weights], stdout=subprocess.PIPE, timeout=7200)
    print(done.stdout.decode(), end="")
    check(done.returncode == 0, "what differs is no tie between two codes")
    other = done.stdout.decode().count("the reference took the other")
    print("%d of %d tokens are not PyTorch's" % (other, 256 * compared))
    check(other <= max(1, 256 * compared // 1000), "less than 99.9 % of the tokens are PyTorch's")
if full:
    check(len(ties) * 40 <= compared, "%d of %d likelihoods differ" % (len(ties), compared))
print("sets: %d passed, %d failed" % (passed, failed))
sys.exit(failed != 0)
