"""Lays the vectors of a reference model out for test_golden: standard library only.

    python3 reference_vectors.py REFERENCE OUT [--full | LINES]

REFERENCE is a folder with golden/golden.json, golden/answers.json, eval/*.jsonl and rank.jsonl, as its
own REPORT.md describes. OUT gets one folder a prompt (ids, gap, positions, logits, greedy, ... as .npy,
images.txt) and answers.txt: a line "expected-nll image image ... target" for LINES (2) lines of
each evaluation set and as many choices of as many puzzles, or with --full for all of them.
"""
import array
import json
import os
import shutil
import sys


def save(path, values, kind, shape):
    """Writes a .npy file, format 1.0."""
    descr, code = {"f": ("<f4", "f"), "i": ("<i4", "i")}[kind]
    header = repr({"descr": descr, "fortran_order": False, "shape": tuple(shape)})
    header += " " * (-(len(header) + 11) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
        f.write(array.array(code, values).tobytes())


def flat(rows):
    return [value for row in rows for value in row]


def write_case(folder, reference, images, ids, gap, entry=None, greedy=None, pixels=None):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "images.txt"), "w") as f:
        f.writelines(os.path.join(reference, p) + "\n" for p in images)
    shape = (len(ids), len(ids[0]))
    save(os.path.join(folder, "ids.npy"), flat(ids), "i", shape)
    save(os.path.join(folder, "gap.npy"), flat(gap), "f", shape)
    golden = os.path.join(reference, "golden")
    if entry:
        save(os.path.join(folder, "bos.npy"), [int(entry["bos"])], "i", (1,))
        save(os.path.join(folder, "positions.npy"), entry["positions"], "i", (len(entry["positions"]),))
        shutil.copy(os.path.join(golden, entry["logits"]), os.path.join(folder, "logits.npy"))
    if greedy:
        save(os.path.join(folder, "greedy.npy"), greedy["ids"], "i", (len(greedy["ids"]),))
        save(os.path.join(folder, "greedy_gap.npy"), greedy["top2_gap"], "f", (len(greedy["ids"]),))
    if pixels:
        shutil.copy(os.path.join(golden, pixels), os.path.join(folder, "greedy_pixels.npy"))


def write_answers(path, reference, most):
    """Likelihoods of evaluation targets and puzzle choices; neighbours share prompts."""
    answers = json.load(open(os.path.join(reference, "golden", "answers.json")))
    with open(path, "w") as out:
        def line(nll, images):
            out.write(" ".join([repr(nll)] + [os.path.join(reference, p) for p in images]) + "\n")

        for task in sorted(answers["eval"]):
            lines = open(os.path.join(reference, "eval", task + ".jsonl")).read().split("\n")
            for text, nll in list(zip(lines, answers["eval"][task]))[:most]:
                example = json.loads(text)
                line(nll, example["input"] + example["target"])
        puzzles = [json.loads(text) for text in open(os.path.join(reference, "rank.jsonl"))]
        for puzzle, nlls in list(zip(puzzles, answers["rank"]))[:most]:
            for choice, nll in list(zip(puzzle["choices"], nlls))[:most]:
                line(nll, puzzle["input"] + [choice])


def main():
    reference, out, most = os.path.abspath(sys.argv[1]), sys.argv[2], (sys.argv[3:] or ["2"])[0]
    most = None if most == "--full" else int(most)
    golden = json.load(open(os.path.join(reference, "golden", "golden.json")))
    for name, entry in golden["prompts"].items():
        greedy = golden["greedy"].get(name)
        write_case(os.path.join(out, name), reference, entry["pictures"], entry["ids"],
                   entry["distance_gap"], entry, greedy, greedy and "greedy_%s.npy" % name)
    for name, entry in golden["reconstructions"].items():
        write_case(os.path.join(out, name), reference, [entry["source"]], [entry["ids"]],
                   [entry["distance_gap"]], pixels=name + ".npy")
    write_answers(os.path.join(out, "answers.txt"), reference, most)


if __name__ == "__main__":
    main()
