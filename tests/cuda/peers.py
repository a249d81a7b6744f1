"""What check.sh's `ours` and `peers` measured, side by side:

    python3 peers.py PEERS.json FOLDER

FOLDER holds ours_SHAPE_CACHE.json (lvm bench --json) and ours_times.txt (test_cuda --times).
A ratio is how many times as fast as the peer lvm is; a share is of the ceiling that lvm measured.
llama.cpp's figures are of October 2026, measured before on one H200 (Q8_0, flash attention).
"""
import json
import re
import sys
from pathlib import Path

LLAMA = {("300m", "prompt"): 68, ("1b", "prompt"): 121, ("300m", "f16"): 974, ("1b", "f16"): 640,
         ("1b", "q8_0"): 543, ("1b", "8"): 2195, ("3b", "f16"): 9.7}


def load(folder):
    """{(shape, cache): {"ceilings": {...}, stage: {...}}}"""
    all_runs = {}
    for path in sorted(folder.glob("ours_*_*.json")):
        _, shape, cache = path.stem.split("_", 2)
        run = all_runs[shape, cache] = {"ceilings": {}}
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if "stage" in entry:
                run[entry["stage"]] = entry
            elif "device" in entry:
                run["ceilings"] = entry
    return all_runs


def row(what, ours, unit, peer, llama, faster, share=None):
    """faster: 1 where more is better, -1 where less is."""
    cells = [f"{what:34}", f"{ours:10.2f} {unit:9}"]
    for other in (peer, llama):
        ratio = (ours / other) ** faster if other and ours else 0
        cells.append(f"{other:10.2f} {ratio:6.2f} x" if ratio else f"{'-':>19}")
    cells.append("" if share is None else f"{100 * share:5.0f} %")
    print(" ".join(cells).rstrip())


def best(peers, pattern, key=None, pick=min):
    found = [v[key] if key else v for k, v in peers.items() if re.fullmatch(pattern, k)]
    return pick(found) if found else None


def ceilings(ours, peers):
    first = next((run["ceilings"] for run in ours.values() if run["ceilings"]), {})
    for what, mine, theirs in (("copy, TB/s", "copy_gbs", "copy TB/s"),
                               ("products of 16 bits, TFLOP/s", "f16_gflops", "bf16 gemm TFLOP/s")):
        row(what, first.get(mine, 0) / 1000, "", peers.get(theirs), None, 1)


def transformer(ours, peers, shape, together):
    for cache in ("q8_0", "f16"):
        run = ours.get((shape, cache))
        if not run:
            continue
        prompt, new = run["prefill"], run["generate"]
        if cache == "q8_0":
            row(f"{shape} prompt of 3840", prompt["seconds"] * 1000, "ms",
                best(peers, rf"{shape} bf16 B=1 prompt 3840 (compiled|eager) ms"),
                LLAMA.get((shape, "prompt")), -1, prompt["floor_seconds"] / prompt["seconds"])
        row(f"{shape} tokens behind it, cache {cache}", new["rate"], "tokens/s",
            best(peers, rf"{shape} \w+ B=1 decode@3840", "tok_s", max),
            LLAMA.get((shape, cache)), 1, new["floor_seconds"] / new["seconds"])
        if (shape, cache) in together:
            row(f"{shape} 8 prompts, cache {cache}", together[shape, cache], "tokens/s",
                best(peers, rf"{shape} \w+ B=8 decode@3840", "tok_s", max),
                LLAMA.get((shape, "8")), 1)


def tokenizer(ours, peers):
    run = next((r for r in ours.values() if "encode" in r and "decode" in r), None)
    if not run:
        return
    encode, decode = run["encode"], run["decode"]
    modes = [(k.split()[2], v["agree"]) for k, v in peers.items()
             if re.fullmatch(r"vq encode \w+ n=15", k)]
    for mode, agree in modes:
        row(f"15 images encoded; {mode}, {100 * agree:.2f} %", encode["seconds"] * 15e3, "ms",
            peers[f"vq encode {mode} n=15"]["ms"], None, -1,
            encode["floor_seconds"] / encode["seconds"])
        row(f"one image decoded; {mode}", decode["seconds"] * 1e3, "ms",
            best(peers, rf"vq decode {mode} n=1( graph)?"), None, -1,
            decode["floor_seconds"] / decode["seconds"])


def main(peers_path, folder):
    ours, together = load(folder), {}
    peers = json.loads(peers_path.read_text()) if peers_path.exists() else {}
    times = folder / "ours_times.txt"
    for line in times.read_text().splitlines() if times.exists() else []:
        if match := re.match(r"(\w+) +cache (\w+) .*; 8 prompts .* (\d+) tokens/s", line):
            together[match[1], match[2]] = float(match[3])
    print(f"{'':34} {'lvm':>10} {'':9} {'PyTorch':>10} {'ratio':>8} {'llama.cpp':>10} {'ratio':>8}"
          f" {'share':>7}")
    ceilings(ours, peers)
    for shape in ("300m", "1b", "3b"):
        transformer(ours, peers, shape, together)
    tokenizer(ours, peers)
    return 0 if ours and peers else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
