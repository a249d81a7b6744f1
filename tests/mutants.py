#!/usr/bin/env python3
"""A test of the tests: python3 tests/mutants.py [WORD...]. Standard library, cc and the golden
vectors. With words, only mutants whose description holds one of them. With MUTANTS=N in the
environment every Nth: which, the number of commits says, so that N commits see them all.

Each mutant is lvm.c with one place made wrong in a way that a tired programmer might. The test that
guards the place is built from the mutant and must go red; the same test built from lvm.c as it is
must be green, so that a mutant dies of its fault and of nothing else.

A place is a function and a pattern of C in which [[right => wrong]] stands for what is changed.
Between its tokens the source may have any blanks and line breaks, @ is any name (a member's too:
job->a->d), and a function of another name is looked for in the whole file. The pattern must fit
once; a mutant that fits nowhere, or in two places, is a failure: describe the place anew.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

TESTS = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(TESTS)
CC = os.environ.get("CC", "cc")
WHOLE = ["-fwhole-program"] if b"Free Software" in subprocess.run(      # as in the Makefile
    [CC, "--version"], stdout=subprocess.PIPE).stdout else []

# Tests that are scripts and run the program, and what of them every mutant of theirs needs.
SCRIPTS = {"sentences": [], "score": ["-f", "Golden", "Degenerate", "Partners", "Protocols"]}

# The test, the golden folders that it reads (of sentences: the methods that guard the place), what is
# wrong, the function, the place.
MUTANTS = [
    ("golden", ["llama_gqa"], "a flipped sign in RoPE", "rotate",
     "y[i] = @[i] * @[i] [[- => +]] @[i + half]"),
    ("golden", ["llama_gqa"], "attention sees one key of the future", "attend_rows",
     "= @[r] + [[1 => 2]] - b * KV_BLOCK"),
    ("golden", ["llama_hd100"], "attention scales by the padded width of a head", "attend_page",
     "1 / sqrtf((float)[[@ => kv->dp]])"),
    ("golden", ["llama_gqa"], "scores are of the token before", "read_behind",
     "b.targets = ids + at [[+ 1 => ]],"),
    ("golden", ["llama_gqa"], "after some rows scores are of the first rows' tokens again",
     "run_head", "@, @, b->targets [[+ at => ]],"),
    ("golden", ["quant"], "Q8_0 rounds halves to even", "quantize_q8_0",
     "clamp_int([[roundf => rintf]](x[i] * @), -127, 127)"),
    ("golden", ["quant"], "Q4_0 scales by the magnitude, not by the extreme with its sign",
     "quantize_q4_0", "= [[extreme => amax]] / -8"),
    ("golden", ["vqgan_widths"], "convolutions behind upsampling are not padded",
     "run_up", "{@, @, 1, 1, [[1 => 0]]}"),
    ("golden", ["vqgan_widths"], "Winograd's patches lack the column on their left",
     "fill_patch", "tile % @ * 4 [[- 1 => ]];"),
    ("golden", ["vqgan_one_level"], "GroupNorm's eps is 1e-5", "groupnorm_scales",
     "0) + [[1e-6 => 1e-5]])"),
    ("golden", ["vqgan_widths"], "the nearest code is sought without the codes' own lengths",
     "vector_quantize", "= [[@[i] => 0]] - 2 * @[i];"),
    ("golden", ["both"], "the sliding window keeps one image too few", "slide_window",
     "- @ - [[@ => 2 * g->T]] + part"),
    ("properties", [], "a page of the cache that sequences share is not copied on write",
     "page_make_private", "->refs [[== => >=]] 1"),
    ("properties", [], "a page's copy begins empty", "page_make_private",
     "[[memcpy => memcmp]](@, (*slot)->data, @)"),
    ("properties", [], "candidates draw from one stream", "fork_prompt",
     "rng_new(@, [[(uint64_t)c => 0]])"),
    ("images", [], "resizing cuts instead of rounding", "",
     "RESIZE_HALF = [[1 << (RESIZE_BITS - 1) => 0]]"),
    ("images", [], "PNG's Paeth filter breaks a tie the other way", "png_paeth",
     "return @ [[<= => <]] @ ? b : c;"),
    ("images", [], "JPEG's fancy upsampling rounds both neighbours alike", "jpeg_upsample_row",
     "else jpeg_upsample_h2(@ + 1, @, 2, [[1 => 2]], 2, @);"),
    ("images", [], "an EOB run in a progressive JPEG is one block short",
     "jpeg_eob_run", "return (1 << n) [[ => - 1]] + @(@, n);"),
    ("images", [], "JPEG's IDCT holds a block of one row to 16 bits instead of wrapping",
     "jpeg_idct_one_row", "= [[(int16_t)((int16_t)(coefs[i] * quant[i]) * (1 << IDCT_KEPT)) => "
     "(int16_t)jpeg_clamp((int16_t)(coefs[i] * quant[i]) * 4, -32768, 32767)]];"),
    ("images", [], "a PNG is refused for a fault behind its pixels", "png_chunks",
     "if (![[png->idat_size => (!code)]]) return code"),
    ("images", [], "data that end early are zeros", "inflate_codes",
     "if (b->count < [[0 => -9]]) return inflate_short;"),
    ("images", [], "a crop begins one row too low", "resize_strip",
     "resize_tap(&r->y, r->y.from [[ => + 1]] + row, &y, r->w);"),
    ("images", [], "a row that is still needed loses its slot", "resize_reach",
     "(s->linear ? 1 : [[2 => 1]]) * (scale < 1 ? 1 : scale)"),
    ("images", [], "an animation's chunks are numbered apart", "png_add_frame",
     "png_put_u32(packed, [[2 * => ]] (uint32_t)i);"),
    ("kernels", [], "exp reduces its argument downwards instead of to the nearest", "exp_f32",
     "= [[rintf => floorf]](x * @)"),
    ("kernels", [], "Winograd's output is written before its residual is read",
     "winograd_output_plain", "? [[ => out[p][j] = v,]] v + residual[p][j] : v;"),
    ("data", [], "rows: the next row begins behind the last target", "fill_row",
     "at->token += count [[- 1 => ]];"),
    ("data", [], "rows: a weight belongs to the input, not to the target", "row_add",
     "w->weights[w->n [[- 1 => % s->context]]] = "),
    ("data", [], "rows: the first token behind another sentence is learnt with isolate", "row_add",
     "s->isolate && from + k == [[0 => -1]] ? 0"),
    ("data", [], "rows: bos counts where the file has weights", "row_add",
     "i < 0 && t->weights != NULL ? [[0 => 1]] : 1;"),
    ("data", [], "rows: a whole sentence that just fits goes to the next row", "fill_row",
     "LVM_WHOLE && count [[< => <=]] left"),
    ("data", [], "rows: the last token of a row that is not full is an input", "row_pad",
     "w->n > 0 ? w->n [[- 1 => ]] : 0;"),
    ("data", [], "rows: every pass has the same order", "shuffled",
     "mix64(@) ^ [[(uint64_t)epoch => 0]])"),
    ("data", [], "rows: the permutation has no cycle walking", "shuffled",
     "while (x >= [[(uint64_t)n => UINT64_MAX]]);"),
    ("data", [], "tok: an id is not compared with the bound", "row_add",
     "if (id >= [[t->bound => 65536]]) return bad_token"),
    ("data", [], "tok: sentences may be empty", "check_starts", "if (next [[<= => <]] last ||"),
    ("data", [], "tok: what lies behind the last sentence is passed over", "check_starts",
     "&& last [[== => <=]] t->n_tokens"),
    ("data", [], "tok: weights that come late are of the first tokens", "token_writer_add",
     "code = token_writer_weigh(w, [[w->n_tokens => 0]], error);"),
    ("train", [], "RMSNorm's backward divides by the root once too little", "rmsnorm_backward_row",
     "(float)(inv * inv [[* inv => ]] * products / op->cols)"),
    ("train", [], "a norm's scale learns from rows that are not normed", "rmsnorm_weight_columns",
     "dy[c] * x[c] [[* op->rms[r] => ]];"),
    ("train", [], "a bias learns from the last row alone", "bias_backward_columns",
     "sum[c] [[+ => ]]= op->dy["),
    ("train", [], "SiLU's slope is its gate", "swiglu_backward_row",
     "(s [[+ silu_x * (1 - s) => ]]);"),
    ("train", [], "gradients of RoPE turn forwards", "rotate_backward",
     "dx[i] = dy[i] * cosines[i] [[+ => -]] dy[i + half] * sines[i];"),
    ("train", [], "queries learn from the first keys alone", "rope_backward_row",
     "at >= 0 && p < [[DQ_PARTS => 1]]"),
    ("train", [], "padding's values keep what was in memory", "rope_backward_row",
     "if (at < 0) [[memset => memcmp]](w->dv"),
    ("train", [], "softmax's backward forgets that probabilities sum to one",
     "attention_probabilities", "(ds[j] [[- dot => ]])"),
    ("train", [], "scores' gradients are not scaled", "attention_probabilities",
     "(ds[j] - dot) [[* b->scale => ]];"),
    ("train", [], "backwards a row sees one key of the future", "attention_probabilities",
     "b->rows_from + r + [[1 => 2]]"),
    ("train", [], "of the heads that share a key only the first teaches it",
     "attention_backward_block", "h < [[(g + 1) * group => g * group + 1]];"),
    ("train", [], "every part's later keys learn nothing", "attention_backward_task",
     "k0 += [[ => 8 *]] DQ_PARTS * KV_BLOCK"),
    ("train", [], "a row's sum of exp is not kept", "attention_forward_task",
     "= queries[r].m [[+ (float)log_f64(queries[r].l) => ]];"),
    ("train", [], "of q, k and v only the last reaches the input", "linear_backward",
     "product_input(&t->e, &l->w->w, dy, out, n, dx, [[accumulate => 0]]);"),
    ("train", [], "an adapter's A learns without its scale", "adapter_backward",
     "k->u[i] *= [[t->net.lora_scale => 1]];"),
    ("train", [], "the input learns nothing through an adapter", "adapter_backward",
     "if (dx [[!= => ==]] NULL) product_input"),
    ("train", [], "gate learns what up should", "layer_backward",
     "&l->gate, w->h, [[w->dact => w->act]], n"),
    ("train", [], "the feed-forward's input is normed by attention's scale", "layer_backward",
     "norm_forward(t, l->[[ffn_norm => attn_norm]], k->mid"),
    ("train", [], "a row's weight is not in its gradient", "loss_task",
     "(float)([[job->weights[r] => 1]] / job->all)"),
    ("train", [], "later logits learn from the first rows", "head",
     "product_weights(&t->e, w->logits, ld, [[h => w->h]], n"),
    ("train", [], "a token that comes twice learns once", "embed_backward_columns",
     "dw[c] [[+ => ]]= op->dy"),
    ("train", [], "products forget the sum so far", "multiply_product",
     "add = p->accumulate [[|| k0 > 0 => ]];"),
    ("train", [], "vectors decay", "update_task", "([[c.p->decays => 1]] ? u->lr"),
    ("train", [], "AdamW's second average is not corrected", "update_task",
     "root = 1 / [[sqrtf(u->debias_v) => 1]];"),
    ("train", [], "small gradients are scaled up to the clip", "update_params",
     "o->clip > 0 [[&& norm > o->clip => ]])"),
    ("train", [], "the warm-up begins one step late", "learning_rate",
     "(double)[[step => (step - 1)]] / (double)o->warmup;"),
    ("train", [], "every pass sees the first pass's places", "pass_rows",
     "{piece.first [[- first => ]], piece.n};"),
    ("train", [], "a step that is skipped moves the weights", "lvm_trainer_step",
     "if ([[!skip => 1]]) {"),
    ("sentences", ["Plans.test_pairs"], "pairs: the annotation stands in the image's place too",
     "draw_pairs", "draft_add(d, spoilt ? other : [[image => other]]);"),
    ("sentences", ["Plans.test_spoilt"], "colorize: the colours come first", "draw_pairs",
     "t->p->kind->how [[>= => >]] GREY"),
    ("sentences", ["Plans.test_video"], "video: the last frame of a window is one stride too far",
     "find_window", "span = (int64_t)(n [[- 1 => ]]) * stride + 1"),
    ("sentences", ["Plans.test_val"], "--val parts the frames of one video", "unit_hash",
     '= [[p->kind->by_folder ? "" : => ]] listing_stem(l, i);'),
    ("sentences", ["Plans.test_single"], "every pass has the order of the first", "dealt",
     "shuffled(t->p->seed, [[t->i / sentences => 0]], n, at)"),
    ("sentences", ["Plans.test_views"], "all sentences are drawn by the same chance", "plan_draw",
     "draw_word(p->seed + (uint64_t)side + 1, [[(uint64_t)number => 0]])"),
    ("sentences", ["Plans.test_flip_and_crop"], "an annotation is mirrored apart from its image",
     "vary", "(uint64_t)(j / [[step => 1]])"),
    ("sentences", ["Plans.test_shards"], "a sentence between two shards is in neither",
     "settle_range", "part * (i + 1) + rest * [[(i + 1) => i]] / t->shards"),
    ("sentences", ["Images.test_fit_of_annotations"], "a mask's runs go along the rows",
     "fill_mask", "first = column * (uint64_t)c->[[height => width]];"),
    ("sentences", ["Images.test_segmentation"],
     "a mask's text: the third number is a difference too", "read_run_text",
     "if (runs [[> => >=]] 2)"),
    ("sentences", ["Images.test_deciding_tokens"], "--decide: the token behind the branch weighs more",
     "mark_decisions", "weights[p [[- 1 => ]]] = weight;"),
    ("sentences", ["Runs.test_cache"], "tokens of an image stand for what is made of it too",
     "image_key", "[[h = hash_bytes(h, &known, sizeof known); => ]]"),
    ("sentences", ["Runs.test_two_at_once"], "a locked file of tokens is written to",
     "token_cache_claim", "os_lock(file) [[== => <=]] 0"),
    ("sentences", ["Runs.test_two_at_once"], "half a record stays in front of those that follow",
     "token_cache_scan", "[[code == LVM_OK => 0]] && os_truncate("),
    ("score", [], "ssim: C2 is C1", "ssim_window", "c2 = ([[0.03 => 0.01]] * 255) *"),
    ("score", [], "miou: a class's union lacks what was taken for another", "score_miou",
     "either[b] += a [[!= => ==]] b;"),
    ("score", [], "AP: precision is not made falling from behind", "average_precision",
     "if (precision [[> @[k] => > 0]])"),
    ("score", [], "AP: a box hits whatever it touches", "keep_hits", "best = [[0.5 => 0.01]];"),
    ("score", [], "pck: points count within 0.2 as within 0.1", "score_pck",
     "distance <= [[0.1 => 0.2]] * side"),
    ("score", [], "pck: the middle of a limb looks like a dot", "find_dot",
     "d.inside [[- => + 0 *]] (double)d.own"),
    ("score", [], "pck: no figure has dots", "find_dots", "return sure >= [[2 => 99]];"),
    ("score", [], "edges: the tolerance is a 200th of the diagonal", "score_edges",
     "[[0.0075 => 0.005]] * sqrt("),
    ("score", [], "edges: what one search asked for no other may", "match_point",
     "m->right[m->queue[--n]] = [[1 => 2]];"),
    ("score", [], "depth: predictions are not scaled", "score_depth",
     "pp > 0 ? [[pt / pp => 1]] : 0;"),
    ("score", [], "cells: columns are rows", "score_cells",
     "&palette, p, [[column, row => row, column]])"),
    ("score", [], "protocols: what is nearer to black is white", "is_white",
     "> [[3 * 255 / 2 => 3 * 255 / 3]];"),
    ("score", [], "protocols: true bytes are rounded, not cut", "published_byte",
     "(int)[[back => (back + 0.5)]];"),
    ("score", [], "protocols: the smallest part is boxed", "box_of_largest",
     "if (n [[>= most => <= most || most == 0]])"),
]

TOKEN = re.compile(r"\d[\w.]*e-\d+|\w+|->|<<|>>|[<>=!]=|&&|\|\||\S")
NAME = r"(?:\d[\w.]*|[A-Za-z_]\w*(?:(?:->|\.)[A-Za-z_]\w*)*)"     # or a number


def pattern_of(text):
    """A regular expression for C tokens, however they are spaced."""
    out, last = "", ""
    for token in TOKEN.findall(text):
        if last:
            out += r"\s+" if re.search(r"\w$", last) and re.match(r"\w", token) else r"\s*"
        out += NAME if token == "@" else re.escape(token)
        last = token
    return out


def body(source, name):
    """Where the function of that name begins and ends; all of the source if there is none."""
    head = r"(?m)^[A-Za-z_][^;{}]*?\b%s\s*\([^;{}]*\)\s*\{" % re.escape(name)
    found = re.search(head, source) if name else None
    return (found.start(), source.index("\n}", found.end())) if found else (0, len(source))


def mutate(source, name, place):
    """(how often the place was found, the source with it made wrong)"""
    before, right, wrong, after = re.match(r"(.*)\[\[(.*?) => (.*?)\]\](.*)", place).groups()
    parts = [pattern_of(text) for text in (before, right, after)]
    pattern = r"(%s\s*)(%s)(?=\s*%s)" % tuple(parts)
    start, end = body(source, name)
    mutant, n = re.subn(pattern, lambda m: m.group(1) + wrong, source[start:end])
    return n, source[:start] + mutant + source[end:]


class Bench:
    """A folder with lvm.c's copies, the tests and the small models."""

    def __init__(self, folder, mutants):
        self.folder = folder
        with open(os.path.join(TOP, "lvm.c"), encoding="utf-8") as f:
            self.source = f.read()
        for name in sorted({n for m in mutants for n in m[1]}):
            golden = os.path.join(TESTS, "golden", name)
            parts = [a for part in ("llama", "vqgan") if os.path.isdir(os.path.join(golden, part))
                     for a in ("--" + part, os.path.join(golden, part))]
            if parts:
                self.convert(name + ".bin", parts)

        if any(m[0] == "train" for m in mutants):
            training = os.path.join(TESTS, "golden_training")
            for name in sorted(os.listdir(training)):
                for part in ("llama", "gradients"):
                    self.convert("%s_%s.bin" % (name, part),
                                 ["--llama", os.path.join(training, name, part)])

    def convert(self, name, parts):
        if all(os.path.isdir(path) for path in parts[1::2]):
            subprocess.run([sys.executable, os.path.join(TOP, "convert.py"), "-o",
                            os.path.join(self.folder, name)] + parts, check=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def arguments(self, test, goldens, place):
        if test == "images":
            return [os.path.join(TESTS, "images")]
        if test == "data":
            return [os.path.join(place, "data")]
        if test == "train":
            return [os.path.join(TESTS, "golden_training"), self.folder, "--quick"]
        if test != "golden":
            return ["--quick"]
        chosen = os.path.join(place, "golden")
        os.mkdir(chosen)
        for name in goldens + ["quant"]:
            if not os.path.exists(os.path.join(chosen, name)):
                os.symlink(os.path.join(TESTS, "golden", name), os.path.join(chosen, name))
        return [chosen, self.folder]

    def verdict(self, test, goldens, source):
        """Builds the test from a source and runs it: (done, it was red, last line or message)."""
        place = tempfile.mkdtemp(dir=self.folder)
        program, env = os.path.join(place, "test"), dict(os.environ, CHECK_FIRST="1")
        os.mkdir(os.path.join(place, "tests"))
        with open(os.path.join(place, "lvm.c"), "w", encoding="utf-8") as f:
            f.write(source)
        if test in SCRIPTS:
            main = "lvm.c"
            command = [sys.executable, os.path.join(TESTS, "test_%s.py" % test)] + SCRIPTS[test] + goldens
            env["LVM"] = program
        else:
            for name in ["test_%s.c" % test] + [n for n in os.listdir(TESTS) if n.endswith(".h")]:
                shutil.copy(os.path.join(TESTS, name), os.path.join(place, "tests"))
            main, command = "tests/test_%s.c" % test, [program] + self.arguments(test, goldens, place)
        build = [CC, "-std=c11", "-ffp-contract=off", "-O1", *WHOLE, "-w", "-o", program,
                 os.path.join(place, main), "-lm", "-lpthread"]
        built = subprocess.run(build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if built.returncode != 0:
            return False, False, "does not compile: " + built.stdout.decode()[-500:]
        try:
            ran = subprocess.run(command, timeout=300, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, env=env)
        except subprocess.TimeoutExpired:
            return True, True, "did not end"
        lines = ran.stdout.decode("utf-8", "replace").splitlines()
        return True, ran.returncode != 0, lines[-1] if lines else "status %d" % ran.returncode

    def mutant(self, m):
        """(passed, a line to print)"""
        test, goldens, what, function, place = m
        found, source = mutate(self.source, function, place)
        if found != 1:
            return False, "%s: found %d times: %s: %s" % (what, found, function, place)
        done, red, last = self.verdict(test, goldens, source)
        return done and red, "%s: test_%s %s (%s)" % (
            what, test, "saw it" if done and red else "DID NOT SEE IT", last)

    def original(self, test, goldens):
        done, red, last = self.verdict(test, goldens, self.source)
        return done and not red, "as it is: test_%s %s (%s)" % (
            test, "is green" if done and not red else "IS RED", last)


def share(mutants):
    """Those whose turn it is."""
    every = int(os.environ.get("MUTANTS") or 1)
    count = subprocess.run(["git", "-C", TOP, "rev-list", "--count", "HEAD"], stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)
    return mutants[int(count.stdout or 0) % every::every]


def main():
    started, folder, passed, failed = time.time(), tempfile.mkdtemp(prefix="mutants."), 0, 0
    words = sys.argv[1:] or [""]
    mutants = [m for m in MUTANTS if any(word in m[2] for word in words)]
    if words == [""]:
        mutants = share(mutants)
    try:
        bench = Bench(folder, mutants)
        with concurrent.futures.ThreadPoolExecutor(2) as two:
            jobs = []
            for test in sorted({m[0] for m in mutants}):
                goldens = sorted({n for m in mutants if m[0] == test for n in m[1]})
                jobs.append(two.submit(bench.original, test, goldens))
            jobs += [two.submit(bench.mutant, m) for m in mutants]
            for job in jobs:
                good, line = job.result()
                passed, failed = passed + good, failed + (not good)
                print(line if good else "FAILED: " + line, flush=True)
    finally:
        shutil.rmtree(folder)
    print("(%.0f seconds)" % (time.time() - started))
    print("mutants: %d passed, %d failed" % (passed, failed))
    return failed > 0 or passed == 0


if __name__ == "__main__":
    sys.exit(main())
