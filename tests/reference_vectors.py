"""Lays the vectors of a reference model out for test_golden: standard library only.

    python3 reference_vectors.py REFERENCE OUT [--full | LINES]
    python3 reference_vectors.py REFERENCE --prompts LIST

REFERENCE is a folder with golden/golden.json, golden/answers.json, eval/*.jsonl and rank.jsonl, as its
own REPORT.md describes. OUT gets one folder a prompt (ids, gap, positions, logits, greedy, ... as .npy,
images.txt) and two lists, a line "expected-nll image image ... target" each: targets.txt for LINES (2)
lines of each evaluation set, choices.txt for as many choices of as many puzzles; or with --full for all
of them. LIST gets such lines for folders of prompt/ whose images and truth are a line of an evaluation
set too: tests/golden/weights/likelihoods.txt.
"""
import array
import glob
import json
import os
import shutil
import sys

PROMPTS = ("", "denoise", "depth", "inpaint", "puzzle", "raven")


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


def write_list(path, reference, lines):
    """lines: (likelihood, images, of which the last is the target)."""
    with open(path, "w") as out:
        for nll, images in lines:
            out.write(" ".join([repr(nll)] + [os.path.join(reference, p) for p in images]) + "\n")


def read_set(reference, name):
    with open(os.path.join(reference, name)) as f:
        return [json.loads(line) for line in f if line.strip()]


def read_answers(reference):
    with open(os.path.join(reference, "golden", "answers.json")) as f:
        return json.load(f)


def targets(reference, answers, most):
    """Of the evaluation sets; neighbours share prompts."""
    for task in sorted(answers["eval"]):
        examples = read_set(reference, os.path.join("eval", task + ".jsonl"))
        for example, nll in list(zip(examples, answers["eval"][task]))[:most]:
            yield nll, example["input"] + example["target"]


def choices(reference, answers, most):
    for puzzle, nlls in list(zip(read_set(reference, "rank.jsonl"), answers["rank"]))[:most]:
        for choice, nll in list(zip(puzzle["choices"], nlls))[:most]:
            yield nll, puzzle["input"] + [choice]


def bytes_of(paths):
    return tuple(open(path, "rb").read() for path in paths)


def prompts(reference, answers):
    """Of folders of prompt/, as paths from the folder above tests/; an error where one is no line."""
    known = {bytes_of(os.path.join(reference, p) for p in images): nll
             for nll, images in targets(reference, answers, None)}
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in PROMPTS:
        folder = os.path.join(top, "prompt", name)
        images = sorted(glob.glob(os.path.join(folder, "*.png")))
        images += glob.glob(os.path.join(folder, "truth", "*.png"))
        yield known[bytes_of(images)], [os.path.relpath(p, top) for p in images]


def main():
    if sys.argv[2] == "--prompts":
        write_list(sys.argv[3], "", prompts(sys.argv[1], read_answers(sys.argv[1])))
        return
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
    answers = read_answers(reference)
    write_list(os.path.join(out, "targets.txt"), reference, targets(reference, answers, most))
    write_list(os.path.join(out, "choices.txt"), reference, choices(reference, answers, most))


if __name__ == "__main__":
    main()
