#!/usr/bin/env python3
"""Measures lvm beside other programs on the same work, in turn, and prints the ratios:

    python3 tests/bench/compare.py --lvm ./lvm --ik PATH/llama-bench --llama PATH/llama-bench
        --python PATH/python --open-muse DIR --config 300m --type q8_0 --json FILE

Every peer is optional; one that is missing or fails is named in the table and left out. Stages:

    encode   256 x 256 pixels to 256 codes: PyTorch, onnxruntime and openvino on open-muse's class
    prefill  3840 tokens at once: ik_llama.cpp and llama.cpp
    generate 256 tokens one by one at that depth: the same two, also with a q8_0 cache
    start    256 tokens one by one behind a prompt of one: the same
    decode   256 codes to pixels: as encode
    whole    15 encodes, prefill, generate and one decode, from the medians: the best peers' sum

Weights are random, of the shape that `lvm bench --config` makes. A first turn warms up: every
setting of every peer runs once, and the slow ones of a program (SLOW times its fastest, in that
stage) are not run again: their rows keep this one figure. Then follow, stage by stage, --runs turns,
in each of which lvm and every setting left run once; figures are medians. Every figure goes to
standard error when it is taken, a stage's table to standard output when the stage ends. A run of
encode or decode is the fastest of three, for lvm as for the others. bf16 settings are shown but count
for no ratio of float32: they lose codes, of which their rows tell. The first of the new tokens comes
out of the prompt, so 256 of them are 255 steps; lvm's time to choose among their scores is counted,
the llama-benches choose nothing. The machine must be quiet: threads of the llama-benches wait
busily, and a third process makes them many times slower.

The peers, built for the machine that they run on:

    git clone https://github.com/ikawrakow/ik_llama.cpp
    cmake -S ik_llama.cpp -B ik -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build ik --target llama-bench
    git clone https://github.com/ggml-org/llama.cpp
    cmake -S llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build llama --target llama-bench
    python3 -m venv venv
    venv/bin/pip install torch transformers safetensors numpy requests
    venv/bin/pip install onnx onnxscript onnxruntime openvino
    git clone https://github.com/huggingface/open-muse

With --avx2 every program is held to AVX2: lvm, PyTorch and openvino by environment variables, the
llama-benches by being built so (-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON;
-DGGML_BMI2=ON for llama.cpp); onnxruntime has no such switch and is left out.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
STAGES = ("encode", "prefill", "generate", "start", "decode")
SLOW = 1.25
AVX2 = {"LVM_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2"}
# glibc gives large blocks back to the system at once, and every page of the next one is a fault:
# PyTorch is faster without that.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}

CACHES = ("-fa 0", "-fa 1", "-fa 0 -ctk q8_0", "-fa 1 -ctk q8_0 -ctv q8_0")
IK_SETTINGS = {
    "prefill": ["-fa %d -rtr %d -ub 512" % (fa, rtr) for rtr in (0, 1) for fa in (0, 1)]
    + ["-fa 1 -rtr 1 -ub 2048", "-fa 1 -rtr 1 -ub 512 -thp 1"],
    "generate": ["%s -rtr %d" % (cache, rtr) for rtr in (0, 1) for cache in CACHES],
    "start": ["-fa %d -rtr %d" % (fa, rtr) for rtr in (0, 1) for fa in (0, 1)]}
LLAMA_SETTINGS = {
    "prefill": ["-fa %d --repack %d -ub 512" % (fa, pack) for pack in (0, 1) for fa in (0, 1)]
    + ["-fa 1 --repack 1 -ub 2048"],
    "generate": list(CACHES),
    "start": ["-fa 0", "-fa 1"]}
VQGAN_SETTINGS = (
    ("PyTorch", "f32"), ("PyTorch", "f32 channels_last"), ("PyTorch", "f32 compiled"),
    ("PyTorch", "f32 compiled channels_last"), ("PyTorch", "bf16 channels_last"),
    ("PyTorch", "bf16 compiled channels_last"), ("onnxruntime", "f32"), ("openvino", "f32"),
    ("openvino", "bf16"))


class Failed(Exception):
    pass


def note(text):
    """Progress, for a person who waits."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" + text[:100])
        sys.stderr.flush()


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def output_of(command, env, timeout):
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout,
                              check=False)
    except OSError as fault:
        raise Failed("%s: %s" % (command[0], fault.strerror)) from None
    except subprocess.TimeoutExpired:
        raise Failed("%s: no end within %d s" % (command[0], timeout)) from None
    if done.returncode != 0:
        raise Failed("%s: exit status %d: %s"
                     % (command[0], done.returncode, last_line(done.stderr)))
    return done.stdout


class Entry:
    """One setting of a program in one stage, and what it took so far. The owner runs it."""

    def __init__(self, owner, program, setting, exact=True):
        self.owner, self.program, self.setting, self.exact = owner, program, setting, exact
        self.seconds, self.fault, self.slow, self.remark = [], None, False, ""

    def turn(self, stage, name):
        what = "%s, %s: %s" % (stage, name, (self.program + " " + self.setting).strip())
        note(what)
        try:
            self.seconds.append(self.owner.run(stage, self.setting))
            self.remark = self.owner.remark
            note("")
            print("%s: %.3f s" % (what, self.seconds[-1]), file=sys.stderr, flush=True)
        except Failed as fault:
            self.fault = str(fault)
            note("")
            print("%s: %s" % (what, fault), file=sys.stderr, flush=True)

    def is_left(self):
        return self.fault is None and not self.slow

    def median(self):
        return statistics.median(self.seconds)


# ---- The programs --------------------------------------------------------------------------------


class Program:
    """Something that runs a stage with a setting and answers with the seconds it took."""
    version, remark = None, ""

    def close(self):
        pass


class Lvm(Program):
    def __init__(self, args, env):
        self.program, self.args, self.env = "lvm", args, env
        self.ceilings = []
        self.version = output_of([args.lvm, "--version"], env, 60).strip()[len("lvm "):]

    def entry(self):
        return Entry(self, "lvm", "")

    def run(self, stage, _):
        args = self.args
        command = [args.lvm, "bench", "--json", "-q", "-j", str(args.threads), "--new",
                   str(args.new), "--prompt", str(1 if stage == "start" else args.prompt),
                   "--stage", "generate" if stage == "start" else stage]
        if args.weights:
            command += [args.weights]
        else:
            command += ["--vq", "published"]
            if stage not in ("encode", "decode"):
                command += ["--config", args.config, "--type", args.type]
        lines = output_of(command, self.env, args.timeout).splitlines()
        self.ceilings.append(json.loads(lines[0]))
        return json.loads(lines[-1])["seconds"]


class LlamaBench(Program):
    """One of the two: they differ in how decoding at a depth is asked for."""

    def __init__(self, program, path, gguf, args, env):
        self.program, self.path, self.gguf, self.args, self.env = program, path, gguf, args, env

    def entry(self, setting):
        return Entry(self, self.program, setting)

    def run(self, stage, setting):
        prompt, new = str(self.args.prompt), str(self.args.new - 1)
        work = ["-p", prompt, "-n", "0"]
        if stage == "start":
            work = ["-p", "0", "-n", new]
        elif stage == "generate" and self.program == "ik_llama.cpp":
            work = ["-p", "0", "-n", "0", "-gp", prompt + "," + new]
        elif stage == "generate":
            work = ["-p", "0", "-n", new, "-d", prompt]
        command = [self.path, "-m", self.gguf, "-t", str(self.args.threads), "-r", "1", "-o",
                   "json"] + work + setting.split()
        out = output_of(command, self.env, self.args.timeout)
        try:
            tests = json.loads(out[out.index("["):])
            self.version = tests[-1]["build_commit"]
            return tests[-1]["samples_ns"][0] / 1e9
        except (ValueError, LookupError) as fault:
            raise Failed("%s: its output is not understood (%s)" % (self.path, fault)) from None


class Tokenizer(Program):
    """A vqgan_torch.py that has prepared one setting and waits to be asked for stages."""

    def __init__(self, program, setting, args, env):
        self.program, self.setting, self.timeout = program, setting, args.timeout
        self.command = [args.python, os.path.join(HERE, "vqgan_torch.py"), "--open-muse",
                        args.open_muse, "--setting", program + " " + setting, "--threads",
                        str(args.threads), "--shape", "shipped" if args.weights else "published"]
        self.env = dict(env, OMP_NUM_THREADS=str(args.threads), **KEEP_MEMORY)
        self.child, self.fault = None, None

    def entry(self):
        return Entry(self, self.program, self.setting, "bf16" not in self.setting)

    def start(self):
        self.errors = tempfile.TemporaryFile("w+")
        try:
            self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE,
                                          stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                          env=self.env)
        except OSError as fault:
            raise self.failed("%s: %s" % (self.command[0], fault.strerror)) from None
        hello = self.answer()
        self.version, self.remark = hello["version"], "%d of 256 codes" % hello["same_codes"]

    def failed(self, text):
        """What failed once is not tried again."""
        self.fault = text
        self.close()
        return Failed(text)

    def answer(self):
        timer = threading.Timer(self.timeout, self.child.kill)
        timer.start()
        line = self.child.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        self.child.wait()
        self.errors.seek(0)
        raise self.failed(last_line(self.errors.read()))

    def run(self, stage, _):
        if self.fault:
            raise Failed(self.fault)
        if self.child is None:
            self.start()
        try:
            self.child.stdin.write(stage + "\n")
            self.child.stdin.flush()
        except OSError:
            pass                            # its end is noticed next
        return self.answer()["seconds"]

    def close(self):
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None
            self.errors.close()


# ---- Taking turns --------------------------------------------------------------------------------


def drop_slow(entries):
    """Ends what its own program beats by far, in the same precision."""
    for entry in entries:
        rivals = [e.seconds[0] for e in entries if e.seconds
                  and (e.program, e.exact) == (entry.program, entry.exact)]
        if entry.seconds and entry.seconds[0] > SLOW * min(rivals):
            entry.slow = True


def warm_up(table, programs):
    """One program after the other, and an end to those that are of no more use: a tokenizer that
    waits holds 2 GB."""
    for program in programs:
        for stage, entries in table.items():
            for entry in entries:
                if entry.owner is program:
                    entry.turn(stage, "warm-up")
            drop_slow(entries)
        used = {entry.owner for entries in table.values() for entry in entries if entry.is_left()}
        for other in programs:
            if other not in used:
                other.close()


def take_turns(stage, entries, runs):
    left = [entry for entry in entries if entry.is_left()]
    for entry in left:
        entry.seconds = []
    for turn in range(runs):
        for entry in left:
            if entry.is_left():
                entry.turn(stage, "turn %d of %d" % (turn + 1, runs))


def fastest(entries, exact):
    """The best peer's entry, or None; one run counts too, where it was the best after all."""
    peers = [e for e in entries[1:] if e.fault is None and e.seconds and e.exact == exact]
    return min(peers, key=Entry.median, default=None)


# ---- The tables ----------------------------------------------------------------------------------


def units(stage, args):
    amount = {"prefill": args.prompt, "generate": args.new, "start": args.new}.get(stage, 1)
    return amount, "tokens/s" if stage in ("prefill", "generate", "start") else "images/s"


def print_stage(stage, entries, args):
    amount, unit = units(stage, args)
    lvm, faults = entries[0], {}
    for entry in entries:
        if entry.fault is not None:
            faults.setdefault((entry.program, entry.fault), []).append(entry.setting)
            continue
        name = (entry.program + " " + entry.setting).strip()
        took = entry.median()
        ratio, remarks = "", [entry.remark] if entry.remark else []
        if entry is not lvm and lvm.fault is None:
            ratio = "%.2fx" % (took / lvm.median())
        if entry.slow:
            remarks.append("one run")
        if entry is fastest(entries, entry.exact):
            remarks.append("best" if entry.exact else "best bf16")
        print(("%-8s %-48s %8.3f s %9.2f %-10s %6s  %s"
               % (stage, name, took, amount / took, unit, ratio, ", ".join(remarks))).rstrip())
    for (program, fault), settings in faults.items():
        name = program if len(settings) > 1 else (program + " " + settings[0]).strip()
        print("%-8s %-48s left out: %s" % (stage, name, fault))
    print(flush=True)


def summary(table, args):
    """Rows (stage, lvm's seconds, the best peer's, its name), the whole prompt last."""
    rows = []
    for stage, entries in table.items():
        best = fastest(entries, True)
        if best is not None and entries[0].fault is None:
            rows.append((stage, entries[0].median(), best.median(),
                         (best.program + " " + best.setting).strip()))
    times = {row[0]: row[1:3] for row in rows}
    images = -(-args.prompt // 256)
    if all(stage in times for stage in ("encode", "prefill", "generate", "decode")):
        lvm, peers = (images * times["encode"][i] + times["prefill"][i] + times["generate"][i]
                      + times["decode"][i] for i in (0, 1))
        rows.append(("whole", lvm, peers, "the best peers together, %d encodes" % images))
    return rows


def print_summary(rows):
    if not rows:
        return
    print("%-8s %10s %12s %7s" % ("stage", "lvm", "best peer", "ratio"))
    for stage, lvm, peer, name in rows:
        print("%-8s %8.3f s %10.3f s %6.2fx  %s" % (stage, lvm, peer, peer / lvm, name))


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return names[0]
    except (OSError, LookupError):
        return platform.processor() or platform.machine()


def save_json(path, head, table, rows, ceilings):
    stages = {stage: [{"program": e.program, "setting": e.setting, "seconds": e.seconds,
                       "slow": e.slow, "fault": e.fault, "remark": e.remark} for e in entries]
              for stage, entries in table.items()}
    ratios = {stage: {"lvm": lvm, "peer": peer, "ratio": peer / lvm, "best": name}
              for stage, lvm, peer, name in rows}
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"head": head, "ceilings": ceilings, "stages": stages, "ratios": ratios}, f,
                  indent=1)
        f.write("\n")


# ---- The command line ----------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lvm", required=True, metavar="PATH", help="the program")
    parser.add_argument("--ik", metavar="PATH", help="llama-bench of ik_llama.cpp")
    parser.add_argument("--llama", metavar="PATH", help="llama-bench of llama.cpp")
    parser.add_argument("--python", metavar="PATH", help="a Python with torch")
    parser.add_argument("--open-muse", metavar="DIR", help="holds muse/; for --python")
    parser.add_argument("--config", default="300m", help="shape of the transformer (300m)")
    parser.add_argument("--type", default="q8_0", choices=("q8_0", "q4_0"), help="(q8_0)")
    parser.add_argument("--weights", metavar="FILE",
                        help="lvm's own model instead: its weights, its tokenizer's shape")
    parser.add_argument("--stage", metavar="NAME,...", default=",".join(STAGES),
                        help="only these (%s)" % ",".join(STAGES))
    parser.add_argument("--setting", metavar="TEXT", default="",
                        help="only settings of peers whose name holds this")
    parser.add_argument("--prompt", type=int, default=3840, help="tokens (3840)")
    parser.add_argument("--new", type=int, default=256, help="tokens (256)")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--runs", type=int, default=5, help="turns after the warm-up (5)")
    parser.add_argument("--avx2", action="store_true", help="hold every program to AVX2")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a run may take (1800)")
    parser.add_argument("--json", metavar="FILE", help="every figure")
    args = parser.parse_args(argv)
    args.stages = args.stage.split(",")
    for stage in args.stages:
        if stage not in STAGES:
            parser.error("--stage: %s is none of %s" % (stage, ", ".join(STAGES)))
    if args.python and not args.open_muse:
        parser.error("--python needs --open-muse")
    if min(args.prompt, args.new - 1, args.threads, args.runs) < 1:
        parser.error("--prompt, --threads and --runs are at least 1, --new 2")
    return args


def make_gguf(args, folder):
    path = os.path.join(folder, "llama.gguf")
    what = [args.weights] if args.weights else ["--config", args.config, "--type", args.type]
    output_of([sys.executable, os.path.join(HERE, "make_gguf.py")] + what + [path], None, 600)
    return path


def llama_benches(args, env, folder):
    """The programs asked for, each with its settings by stage."""
    asked = [("ik_llama.cpp", args.ik, IK_SETTINGS), ("llama.cpp", args.llama, LLAMA_SETTINGS)]
    if not (args.ik or args.llama) or not set(IK_SETTINGS) & set(args.stages):
        return []
    gguf = make_gguf(args, folder)
    return [(LlamaBench(program, path, gguf, args, env), settings)
            for program, path, settings in asked if path]


def tokenizers(args, env):
    if not args.python or not {"encode", "decode"} & set(args.stages):
        return []
    return [Tokenizer(program, setting, args, env) for program, setting in VQGAN_SETTINGS
            if args.setting in setting and not (args.avx2 and program == "onnxruntime")]


def make_table(args, lvm, benches, workers):
    """A list of entries for every stage, lvm's first."""
    table = {}
    for stage in args.stages:
        table[stage] = [lvm.entry()]
        if stage in IK_SETTINGS:
            table[stage] += [bench.entry(setting) for bench, settings in benches
                             for setting in settings[stage] if args.setting in setting]
        else:
            table[stage] += [worker.entry() for worker in workers]
    return table


def compare(args, env, folder, programs):
    lvm = Lvm(args, env)
    benches = llama_benches(args, env, folder)
    workers = tokenizers(args, env)
    programs += [lvm] + [bench for bench, _ in benches] + workers
    table = make_table(args, lvm, benches, workers)
    warm_up(table, programs)
    head = {"date": datetime.date.today().isoformat(), "processor": processor(),
            "threads": args.threads, "runs": args.runs,
            "model": args.weights or "%s %s" % (args.config, args.type), "prompt": args.prompt,
            "new": args.new, "avx2": args.avx2,
            "versions": {p.program: p.version for p in programs if p.version}}
    print("%(date)s, %(processor)s, %(threads)d threads, median of %(runs)d; %(model)s" % head)
    print(", ".join("%s: %s" % pair for pair in head["versions"].items()) + "\n")
    for stage, entries in table.items():
        take_turns(stage, entries, args.runs)
        print_stage(stage, entries, args)
        if args.json:
            save_json(args.json, head, table, summary(table, args), lvm.ceilings)
    print_summary(summary(table, args))


def main(argv):
    args = parse_arguments(argv)
    env = dict(os.environ, **(AVX2 if args.avx2 else {}))
    programs = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            compare(args, env, folder, programs)
    except (Failed, OSError) as fault:
        print("compare.py: %s" % fault, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for program in programs:
            program.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
