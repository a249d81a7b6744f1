/* Properties of chapters 4 to 7 on small random models that this file builds in memory: what must
   not change anything (threads, candidates, batches, reused prefixes, other contexts, a cancelled
   call) changes no byte; the sliding window equals reading afresh; sampling follows its
   distribution; damaged files and wrong arguments are errors and never crashes.

       test_properties                  everything; non-zero when a check fails
       test_properties --quick          two weight types instead of five, for sanitizer runs
       test_properties --threads-only   contexts in several threads, for -fsanitize=thread */
#define main lvm_main
#include "../lvm.c"
#undef main
#include "check.h"
#include "gguf.h"

enum {
    D = 64, LAYERS = 2, HEADS = 4, KV_HEADS = 2, F = 96, V = 80, CODES = 64, BOS = 64,
    HIDDEN = 32, Z = 32, E = 16
};

static struct rng chance; /* seeded once: where a prompt is cut, which bytes are damaged */

static int below(struct rng *r, int n) { return (int)(rng_next(r) % (uint32_t)n); }

/* ---- Models in memory ---- */

/* What a model is made of. */
struct spec {
    const char *name;
    int type;                 /* of the transformer's matrices */
    int vq_type;              /* of the tokenizer's convolutions */
    int context, bos;         /* bos 0: none */
    int resolution, levels;   /* tokens an image: (resolution >> (levels - 1)) squared */
    int has_llama, has_vq;
};

static struct model_file build(const struct spec *spec) {
    struct llama a = {.context = spec->context, .L = LAYERS, .D = D, .F = F, .H = HEADS,
                      .G = KV_HEADS, .d = D / HEADS, .V = V, .bos = spec->bos ? BOS : -1, .eos = -1,
                      .eps = 1e-6f, .theta = 10000};
    struct vqgan vq = {.R = spec->resolution, .hidden = HIDDEN, .z = Z, .codes = CODES, .code_dim = E,
                       .n_res_blocks = 1, .resample_conv = 1, .n_levels = spec->levels,
                       .mult = {1, 2}, .n_attn_at = 2,
                       .attn_at = {spec->resolution, spec->resolution / 2}};
    if (!spec->has_llama) a = (struct llama){.bos = -1, .eos = -1};
    return make_model(&a, spec->has_vq ? &vq : NULL, spec->type, spec->vq_type);
}

static lvm_model *open_spec(const struct spec *spec, struct model_file *f) {
    lvm_error error = {0, ""};
    *f = build(spec);
    lvm_model *m = lvm_open_memory(f->data, f->size, &error);
    where("%s", spec->name);
    check(m != NULL, "does not open: %s", error.text);
    return must(m);
}

/* ---- What a context computes ---- */

enum { PROMPT = 280, SCORED = 20, FEW_IDS = 1 + 3 * 64, GENERATED = 70, MANY = 3, PIXELS = 16 };

/* For a model of 64 tokens an image and a context of 300: a prompt beyond a block of 256 keys,
   scores behind it, three candidates whose window slides (at 257 tokens), an image in and out. */
struct outcome {
    float logits[V], nll[SCORED];
    int32_t ids[MANY][GENERATED], tokens[64];
    uint8_t pixels[PIXELS * PIXELS * 3];
};

static lvm_sampling sampling_of(uint64_t seed) {
    lvm_sampling s = lvm_default_sampling();
    s.seed = seed;
    return s;
}

/* bos, then codes. */
static void fill_ids(int32_t *ids, int n, uint64_t stream) {
    struct rng rng = rng_new(11, stream);
    for (int i = 0; i < n; i++) ids[i] = below(&rng, CODES);
    ids[0] = BOS;
}

static void fill_image(uint8_t *rgb, int n) {
    struct rng rng = rng_new(13, 0);
    for (int i = 0; i < n; i++) rgb[i] = (uint8_t)below(&rng, 256);
}

static int encode_noise(lvm_ctx *ctx, int32_t *tokens) {
    uint8_t rgb[23 * 17 * 3];
    lvm_image image = {23, 17, rgb, 0};
    fill_image(rgb, (int)sizeof rgb);
    return lvm_encode(ctx, &image, 1, tokens, NULL);
}

static int decode_ids(lvm_ctx *ctx, const int32_t *tokens, uint8_t *pixels) {
    lvm_image image = {0, 0, NULL, 0};
    int code = lvm_decode(ctx, tokens, 1, &image, NULL);
    if (code == LVM_OK) memcpy(pixels, image.rgb, PIXELS * PIXELS * 3);
    lvm_image_free(&image);
    return code;
}

static int compute(lvm_ctx *ctx, struct outcome *o) {
    int32_t ids[PROMPT + SCORED];
    lvm_sampling s = sampling_of(5);
    memset(o, 0, sizeof *o);
    fill_ids(ids, PROMPT + SCORED, 1);
    int code = lvm_prompt(ctx, ids, PROMPT, o->logits, NULL);
    if (code == LVM_OK) code = lvm_score(ctx, ids + PROMPT, SCORED, o->nll, NULL);
    if (code == LVM_OK) code = lvm_prompt(ctx, ids, FEW_IDS, NULL, NULL);
    if (code == LVM_OK) code = lvm_generate(ctx, &s, MANY, GENERATED, o->ids[0], NULL);
    if (code == LVM_OK) code = encode_noise(ctx, o->tokens);
    if (code == LVM_OK) code = decode_ids(ctx, o->tokens, o->pixels);
    return code;
}

static lvm_options options_of(int threads, int kv_type, int exact) {
    lvm_options o = lvm_default_options();
    o.threads = threads;
    o.kv_type = kv_type;
    o.exact = exact;
    return o;
}

static lvm_ctx *context(const lvm_model *m, const lvm_options *o) {
    return must(lvm_ctx_new(m, o, NULL));
}

/* Calls whose results are compared: they must succeed. */
static void read_ids(lvm_ctx *ctx, const int32_t *ids, int n, float *logits) {
    int code = lvm_prompt(ctx, ids, n, logits, NULL);
    check(code == LVM_OK, "a prompt of %d tokens: code %d", n, code);
}

static void score_ids(lvm_ctx *ctx, const int32_t *ids, int n, float *nll) {
    int code = lvm_score(ctx, ids, n, nll, NULL);
    check(code == LVM_OK, "%d scores: code %d", n, code);
}

static void generate_ids(lvm_ctx *ctx, const lvm_sampling *s, int candidates, int n, int32_t *ids) {
    int code = lvm_generate(ctx, s, candidates, n, ids, NULL);
    check(code == LVM_OK, "%d tokens of %d candidates: code %d", n, candidates, code);
}

/* Names the difference, so that a failure says where to look. */
static const char *difference(const struct outcome *a, const struct outcome *b) {
    if (memcmp(a->logits, b->logits, sizeof a->logits) != 0) return "logits differ";
    if (memcmp(a->nll, b->nll, sizeof a->nll) != 0) return "likelihoods differ";
    if (memcmp(a->ids, b->ids, sizeof a->ids) != 0) return "generated ids differ";
    if (memcmp(a->tokens, b->tokens, sizeof a->tokens) != 0) return "tokens differ";
    return memcmp(a->pixels, b->pixels, sizeof a->pixels) != 0 ? "pixels differ" : NULL;
}

static void check_same(const struct outcome *a, const struct outcome *b, const char *what) {
    const char *text = difference(a, b);
    check(text == NULL, "%s: %s", what, text != NULL ? text : "");
}

static void compute_with(const lvm_model *m, lvm_options o, struct outcome *result) {
    lvm_ctx *ctx = context(m, &o);
    int code = compute(ctx, result);
    check(code == LVM_OK, "%d threads, kv %d, exact %d: code %d", o.threads, o.kv_type, o.exact,
          code);
    lvm_ctx_free(ctx);
}

/* counts: numbers of threads, ended by 0, each of which must give the bytes of one thread. */
static void test_thread_counts(const lvm_model *m, lvm_options o, const int *counts) {
    struct outcome one, many;
    char what[80];
    o.threads = 1;
    compute_with(m, o, &one);
    for (; *counts != 0; counts++) {
        o.threads = *counts;
        compute_with(m, o, &many);
        snprintf(what, sizeof what, "%d threads, kv %d, exact %d", o.threads, o.kv_type, o.exact);
        check_same(&one, &many, what);
    }
}

/* ---- Batches, prefixes, scores ---- */

static int same_logits(const float *a, const float *b) { return memcmp(a, b, V * sizeof *a) == 0; }

/* One prompt of 280 against token by token, against pieces, and against what other prompts left. */
static void test_prefixes(const lvm_model *m, const lvm_options *o) {
    int32_t ids[PROMPT], other[PROMPT];
    float want[V], got[V], fresh[V];
    lvm_ctx *a = context(m, o), *b = context(m, o), *c = context(m, o);
    fill_ids(ids, PROMPT, 2);
    fill_ids(other, PROMPT, 3);
    read_ids(a, ids, PROMPT, want);
    for (int n = 1; n <= PROMPT; n++) read_ids(b, ids, n, got);
    check(same_logits(want, got), "a prompt token by token is not the prompt at once");
    for (int n = 0; n < PROMPT;) {
        n = n + 1 + below(&chance, 90);
        read_ids(c, ids, n < PROMPT ? n : PROMPT, got);
    }
    check(same_logits(want, got), "a prompt in pieces is not the prompt at once");
    lvm_ctx_free(c);
    for (int same = 0; same < PROMPT; same += 1 + below(&chance, 60)) {
        int n = same + 1 + below(&chance, PROMPT - same);
        memcpy(other, ids, (size_t)same * sizeof *ids);
        read_ids(b, other, n, got);
        c = context(m, o);
        read_ids(c, other, n, fresh);
        check(same_logits(got, fresh), "%d tokens, %d of them reused, are not as fresh", n, same);
        lvm_ctx_free(c);
        read_ids(b, ids, PROMPT, got);
        check(same_logits(want, got), "back at the first prompt, %d tokens reused: differs", same);
    }
    read_ids(b, ids, 100, NULL);
    read_ids(a, ids, 100, NULL);
    read_ids(b, ids, PROMPT, got);
    check(same_logits(want, got), "a prompt, its beginning, the prompt again: differs");
    lvm_ctx_free(a);
    lvm_ctx_free(b);
}

static void test_score(const lvm_model *m, const lvm_options *o) {
    int32_t ids[PROMPT + SCORED];
    float nll[SCORED], again[SCORED], logits[V], before[V];
    lvm_ctx *a = context(m, o), *b = context(m, o);
    int same = 1;
    fill_ids(ids, PROMPT + SCORED, 4);
    read_ids(a, ids, PROMPT - 30, before);
    score_ids(a, ids + PROMPT - 30, SCORED, nll);
    for (int i = 0; i < SCORED; i++) {
        read_ids(b, ids, PROMPT - 30 + i, logits);
        float alone = negative_log_likelihood(logits, V, ids[PROMPT - 30 + i]);
        same &= f32_to_bits(alone) == f32_to_bits(nll[i]);
    }
    check(same, "lvm_score is not the likelihoods of lvm_prompt");
    score_ids(a, ids + 7, 1, again);
    score_ids(a, ids + PROMPT - 30, SCORED, again);
    check(memcmp(nll, again, sizeof nll) == 0, "lvm_score twice differs");
    read_ids(a, ids, PROMPT - 30, logits);
    check(same_logits(before, logits), "lvm_score does not leave the context at the prompt");
    lvm_ctx_free(a);
    lvm_ctx_free(b);
}

/* ---- Generation ---- */

/* The naive way: when the window is full, a new context reads bos and the last images, of which
   an unfinished one is none. */
static void generate_naively(const lvm_model *m, const lvm_options *o, const lvm_sampling *s,
                             int stream, const int32_t *prompt, int n, int32_t *out) {
    lvm_info info = lvm_model_info(m);
    int T = info.tokens_per_image, bos = prompt[0] == info.bos, length = n;
    int full = bos + info.window_images * T;
    int32_t *ids = must(malloc((size_t)(info.context_length + 1) * sizeof *ids));
    struct choice choices[CODES];
    struct rng rng = rng_new(s->seed, (uint64_t)stream);
    float logits[V];
    lvm_ctx *ctx = context(m, o);
    memcpy(ids, prompt, (size_t)n * sizeof *ids);
    for (int i = 0; i < GENERATED; i++) {
        if (length >= full) {
            int keep = (info.window_images - 1) * T + (length - bos) % T;
            memmove(ids + bos, ids + length - keep, (size_t)keep * sizeof *ids);
            length = bos + keep;
            lvm_ctx_free(ctx);
            ctx = context(m, o);
        }
        read_ids(ctx, ids, length, logits);
        out[i] = ids[length++] = sample(logits, CODES, s, &rng, choices);
    }
    lvm_ctx_free(ctx);
    free(ids);
}

static void test_generation(const lvm_model *m, const lvm_options *o, int greedy) {
    int32_t prompt[FEW_IDS], ids[MANY][GENERATED], naive[GENERATED], alone[GENERATED];
    lvm_sampling s = sampling_of(17);
    lvm_ctx *ctx = context(m, o);
    int in_range = 1;
    s.greedy = greedy;
    fill_ids(prompt, FEW_IDS, 5);
    read_ids(ctx, prompt, FEW_IDS, NULL);
    generate_ids(ctx, &s, MANY, GENERATED, ids[0]);
    for (int c = 0; c < MANY; c++) {
        generate_naively(m, o, &s, c, prompt, FEW_IDS, naive);
        check(memcmp(naive, ids[c], sizeof naive) == 0,
              "candidate %d, greedy %d: not the naive way", c, greedy);
        for (int i = 0; i < GENERATED; i++) in_range &= ids[c][i] >= 0 && ids[c][i] < CODES;
    }
    check(in_range, "a generated id is no image token");
    read_ids(ctx, prompt, FEW_IDS, NULL);
    generate_ids(ctx, &s, 1, GENERATED, alone);
    check(memcmp(alone, ids[0], sizeof alone) == 0, "one candidate is not the first of %d", MANY);
    lvm_ctx_free(ctx);
}

/* A prompt longer than the window that ends within an image: the oldest whole images leave. */
static void test_partial_image(void) {
    static const struct spec spec = {"partial image", LVM_F32, LVM_F16, 300, 1, 8, 2, 1, 1};
    struct model_file f;
    lvm_model *m = open_spec(&spec, &f);
    lvm_options o = options_of(1, LVM_AUTO, 0);
    lvm_sampling s = sampling_of(17);
    int32_t prompt[1 + 17 * 16 + 5], ids[GENERATED], naive[GENERATED];
    int n = (int)(sizeof prompt / sizeof *prompt);
    lvm_ctx *ctx = context(m, &o);
    fill_ids(prompt, n, 10);
    generate_naively(m, &o, &s, 0, prompt, n, naive);
    read_ids(ctx, prompt, n, NULL);
    generate_ids(ctx, &s, 1, GENERATED, ids);
    check(memcmp(naive, ids, sizeof ids) == 0,
          "a long prompt's window does not begin with an image");
    lvm_ctx_free(ctx);
    lvm_close(m);
    free(f.data);
}

/* In one call or in several: greedy, so that each call's fresh stream does not matter. */
static void test_continued(const lvm_model *m, const lvm_options *o) {
    int32_t prompt[FEW_IDS], ids[GENERATED], pieces[GENERATED];
    lvm_sampling s = sampling_of(1);
    lvm_ctx *ctx = context(m, o);
    s.greedy = 1;
    fill_ids(prompt, FEW_IDS, 6);
    read_ids(ctx, prompt, FEW_IDS, NULL);
    generate_ids(ctx, &s, 1, GENERATED, ids);
    read_ids(ctx, prompt, FEW_IDS, NULL);
    for (int i = 0; i < GENERATED;) {
        int n = 1 + below(&chance, 64);
        if (n > GENERATED - i) n = GENERATED - i;
        generate_ids(ctx, &s, 1, n, pieces + i);
        i += n;
    }
    check(memcmp(ids, pieces, sizeof ids) == 0, "generation in pieces is not generation at once");
    lvm_ctx_free(ctx);
}

static void generate_with(lvm_ctx *ctx, const lvm_sampling *s, int32_t *ids) {
    int32_t prompt[FEW_IDS];
    fill_ids(prompt, FEW_IDS, 5);
    read_ids(ctx, prompt, FEW_IDS, NULL);
    generate_ids(ctx, s, 1, GENERATED, ids);
}

static void test_seeds(const lvm_model *m, const lvm_options *o) {
    int32_t first[GENERATED], second[GENERATED], greedy[GENERATED];
    lvm_ctx *ctx = context(m, o);
    lvm_sampling s = sampling_of(3);
    generate_with(ctx, &s, first);
    generate_with(ctx, &s, second);
    check(memcmp(first, second, sizeof first) == 0, "the same seed gives other ids");
    s.seed = 4;
    generate_with(ctx, &s, second);
    check(memcmp(first, second, sizeof first) != 0, "another seed gives the same ids");
    s.greedy = 1;
    generate_with(ctx, &s, greedy);
    s.greedy = 0;
    s.top_k = 1;
    generate_with(ctx, &s, second);
    check(memcmp(greedy, second, sizeof greedy) == 0, "top-k 1 is not greedy");
    s.top_k = 0;
    s.top_p = 1e-6f;
    generate_with(ctx, &s, second);
    check(memcmp(greedy, second, sizeof greedy) == 0, "a tiny top-p is not greedy");
    lvm_ctx_free(ctx);
}

/* ---- The distribution of sample() ---- */

/* Probabilities after temperature, top-k, top-p, computed plainly: sorted by insertion. */
static void expected_distribution(const float *logits, int n, const lvm_sampling *s, double *p) {
    int order[CODES], kept = s->top_k > 0 && s->top_k < n ? s->top_k : n, last = 0;
    double sum = 0, mass = 0;
    for (int i = 0; i < n; i++) {
        int at = i;
        for (; at > 0 && logits[order[at - 1]] < logits[i]; at--) order[at] = order[at - 1];
        order[at] = i;
        p[i] = exp((double)logits[i] / (double)s->temperature);
    }
    for (int i = 0; i < kept; i++) sum += p[order[i]];
    while (last < kept && mass < (double)s->top_p * sum) mass += p[order[last++]];
    for (int i = 0; i < n; i++) p[order[i]] = i < last ? p[order[i]] / mass : 0;
}

/* The draw as one would do it by hand: all choices sorted, then walked along. */
static int32_t draw_sorted(const float *logits, int n, const lvm_sampling *s, struct rng *rng) {
    struct choice c[CODES];
    double all = 0, kept = 0, mass = 0;
    float max = logits[argmax(logits, n)];
    int last = 0, k = s->top_k > 0 && s->top_k < n ? s->top_k : n;
    for (int i = 0; i < n; i++) {
        struct choice one = {summand(exp_f32((logits[i] - max) / s->temperature)), i};
        int at = i;
        for (; at > 0 && likelier(one, c[at - 1]); at--) c[at] = c[at - 1];
        c[at] = one;
    }
    for (int i = 0; i < k; i++) all += c[i].p;
    while (last < k && kept < s->top_p * all) kept += c[last++].p;
    double at = kept * (rng_next(rng) * 0x1p-32);
    for (int i = 0; i < last; i++)
        if ((mass += c[i].p) >= at) return c[i].id;
    return c[last - 1].id;
}

/* Chi-square of 20000 draws. Its mean is the degrees of freedom k, its deviation sqrt(2 k): six of
   them are beyond chance. Cells that expect fewer than 5 draws count together. */
static void test_distribution(float temperature, int top_k, float top_p) {
    enum { DRAWS = 20000 };
    float logits[CODES];
    double p[CODES], chi = 0, rest_seen = 0, rest = 0;
    int seen[CODES] = {0}, impossible = 0, cells = 0, same = 1;
    struct choice choices[CODES];
    struct rng rng = rng_new(23, 1), rng_again = rng_new(24, 1);
    lvm_sampling s = sampling_of(1);
    s.temperature = temperature;
    s.top_k = top_k;
    s.top_p = top_p;
    for (int i = 0; i < CODES; i++) logits[i] = 2.5f * uniform_of(&rng);
    expected_distribution(logits, CODES, &s, p);
    for (int i = 0; i < DRAWS; i++) seen[sample(logits, CODES, &s, &rng, choices)]++;
    for (int i = 0; i < DRAWS / 40; i++) {
        int n = 1 + below(&rng_again, CODES), few = 1 + below(&rng_again, 9);
        struct rng before = rng;
        for (int j = 0; j < n; j++) /* with many alike */
            logits[j] = (float)below(&rng_again, few) + uniform_of(&rng_again) * (float)(i % 2);
        same &= sample(logits, n, &s, &rng, choices) == draw_sorted(logits, n, &s, &before);
    }
    for (int i = 0; i < CODES; i++) {
        double expected = p[i] * DRAWS, off = seen[i] - expected;
        impossible += p[i] == 0 && seen[i] > 0;
        if (expected >= 5) chi += off * off / expected, cells++;
        else rest += expected, rest_seen += seen[i];
    }
    if (rest >= 5) chi += (rest_seen - rest) * (rest_seen - rest) / rest, cells++;
    check(same, "sample(), top-k %d, top-p %g: not what sorting and walking gives", top_k,
          (double)top_p);
    check(impossible == 0, "sample() draws what top-k %d, top-p %g exclude", top_k, (double)top_p);
    check(chi <= cells - 1 + 6 * sqrt(2.0 * cells),
          "sample(), temperature %g, top-k %d, top-p %g: chi-square %g of %d cells",
          (double)temperature, top_k, (double)top_p, chi, cells);
}

static void test_distributions(void) {
    where("sampling");
    test_distribution(1, 0, 1);
    test_distribution(0.5f, 0, 1);
    test_distribution(1, 10, 1);
    test_distribution(1, 0, 0.8f);
    test_distribution(2, 30, 0.7f);
    test_distribution(1, CODES, 0.9f);
    test_distribution(1, 1, 0.5f);
}

/* ---- Cancelling ---- */

struct canceller {
    int calls, at; /* cancels at call number `at`; -1: never */
};

static int cancel_progress(void *user, const char *stage, int64_t done, int64_t all) {
    struct canceller *c = user;
    (void)stage, (void)done, (void)all;
    return c->calls++ == c->at;
}

enum action { DO_ENCODE, DO_DECODE, DO_PREFILL, DO_SCORE, DO_GENERATE, ACTIONS };
static const char *const action_names[ACTIONS] = {"encode", "decode", "prefill", "score",
                                                  "generate"};

/* One call with its result in *o; the prompt of score and generate is read before, uncancelled. */
static int act(lvm_ctx *ctx, enum action action, struct canceller *c, int at, struct outcome *o) {
    int32_t ids[PROMPT + SCORED];
    lvm_sampling s = sampling_of(9);
    int code = LVM_OK;
    memset(o, 0, sizeof *o);
    fill_ids(ids, PROMPT + SCORED, 8);
    c->at = -1;
    if (action == DO_PREFILL)
        read_ids(ctx, &(int32_t){1}, 1, NULL); /* so that nothing is reused */
    if (action == DO_SCORE) read_ids(ctx, ids, PROMPT, NULL);
    if (action == DO_GENERATE) read_ids(ctx, ids, 250, NULL); /* slides after 7 tokens */
    for (int i = 0; i < 64; i++) o->tokens[i] = ids[i + 1];
    c->calls = 0;
    c->at = at;
    if (action == DO_ENCODE) ctx_reset(ctx); /* or it would know the image */
    if (action == DO_ENCODE) code = encode_noise(ctx, o->tokens);
    if (action == DO_DECODE) code = decode_ids(ctx, o->tokens, o->pixels);
    if (action == DO_PREFILL) code = lvm_prompt(ctx, ids, PROMPT, o->logits, NULL);
    if (action == DO_SCORE) code = lvm_score(ctx, ids + PROMPT, SCORED, o->nll, NULL);
    if (action == DO_GENERATE) code = lvm_generate(ctx, &s, 2, 10, o->ids[0], NULL);
    return code;
}

static void test_cancel(const lvm_model *m, int kv_type) {
    struct canceller c = {0, -1};
    struct outcome want[ACTIONS], got;
    lvm_options o = options_of(1, kv_type, 0);
    o.user = &c;
    o.progress = cancel_progress;
    for (int i = 0; i < ACTIONS; i++) {
        lvm_ctx *ctx = context(m, &o);
        check(act(ctx, i, &c, -1, &want[i]) == LVM_OK, "%s fails", action_names[i]);
        int calls = c.calls;
        check(calls >= 2, "%s calls progress only %d times", action_names[i], calls);
        for (int at = 0; at < calls; at++) {
            lvm_ctx_free(ctx); /* a fresh one, which remembers no images */
            ctx = context(m, &o);
            int code = act(ctx, i, &c, at, &got);
            check(code == LVM_CANCELLED, "%s cancelled at call %d gives %d", action_names[i], at,
                  code);
            check(act(ctx, i, &c, -1, &got) == LVM_OK, "%s fails after a cancelled one",
                  action_names[i]);
            check_same(&want[i], &got, action_names[i]);
        }
        lvm_ctx_free(ctx);
    }
    lvm_ctx *ctx = context(m, &o); /* each cancelled call, then every other one */
    for (int i = 0; i < ACTIONS * ACTIONS; i++) {
        act(ctx, i / ACTIONS, &c, 1, &got);
        act(ctx, i % ACTIONS, &c, -1, &got);
        check_same(&want[i % ACTIONS], &got, "after another call was cancelled");
    }
    lvm_ctx_free(ctx);
}

/* A prompt of more than the 512 rows that pass the layers together, cancelled at every call, and in
   pieces, of which each asks for logits. */
static void test_cancel_long(void) {
    static const struct spec spec = {"long context", LVM_F32, LVM_F16, 700, 1, 16, 2, 1, 0};
    struct model_file f;
    lvm_model *m = open_spec(&spec, &f);
    struct canceller c = {0, -1};
    lvm_options o = options_of(1, LVM_AUTO, 0);
    int32_t ids[600];
    float want[V], got[V];
    o.user = &c;
    o.progress = cancel_progress;
    fill_ids(ids, 600, 9);
    for (int at = -1, calls = 0; at < calls; at++) {
        lvm_ctx *ctx = context(m, &o);
        c = (struct canceller){0, at};
        int code = lvm_prompt(ctx, ids, 600, at < 0 ? want : got, NULL);
        if (at < 0) calls = c.calls;
        check(calls > 2, "a long prompt calls progress only %d times", calls);
        check(code == (at < 0 ? LVM_OK : LVM_CANCELLED), "a long prompt at call %d: %d", at, code);
        c.at = -1;
        read_ids(ctx, ids, 600, got);
        check(same_logits(want, got), "a long prompt cancelled at call %d does not recover", at);
        lvm_ctx_free(ctx);
    }
    lvm_ctx *ctx = context(m, &o);
    for (int n = 150; n <= 600; n += 150) read_ids(ctx, ids, n, got);
    check(same_logits(want, got), "a long prompt in pieces is not the prompt at once");
    lvm_ctx_free(ctx);
    lvm_close(m);
    free(f.data);
}

/* Scratch memory must do for rows of both widths, whichever needs more. */
static void test_scratch(void) {
    where("scratch");
    for (int i = 0; i <= simd_level(); i++) {
        const struct kernels *k = simd_kernels[i];
        int bad_width = 0, bad_wide = 0;
        for (int width = 1024; width <= 8192; width += 256)
            for (int wide = 1024; wide <= 16384; wide += 256) {
                struct llama a = {.D = width, .F = wide, .d = 32};
                int64_t want = max64(matmul_scratch(k, width), matmul_scratch(k, wide));
                if (lm_scratch(&a, k) < want) bad_width = width, bad_wide = wide;
            }
        check(bad_width == 0, "%s: too small for D %d, F %d", k->name, bad_width, bad_wide);
    }
}

/* ---- Several contexts at once ---- */

struct user {
    const lvm_model *m;
    lvm_options o;
    struct outcome outcome;
    int code;
};

static void *use(void *arg) {
    struct user *u = arg;
    lvm_ctx *ctx = lvm_ctx_new(u->m, &u->o, NULL);
    u->code = ctx != NULL ? compute(ctx, &u->outcome) : LVM_MEMORY;
    lvm_ctx_free(ctx);
    return NULL;
}

/* Two contexts of a first model and one of a second, each alone and all at once. */
static void test_concurrency(void) {
    static const struct spec spec[2] = {{"f32, at once", LVM_F32, LVM_F16, 300, 1, 16, 2, 1, 1},
                                        {"q8_0, at once", LVM_Q8_0, LVM_Q8_0, 300, 1, 16, 2, 1, 1}};
    enum { USERS = 3 };
    struct model_file f[2];
    lvm_model *m[2] = {open_spec(&spec[0], &f[0]), open_spec(&spec[1], &f[1])};
    static struct user alone[USERS], together[USERS];
    pthread_t thread[USERS];
    for (int i = 0; i < USERS; i++) {
        alone[i] = together[i] = (struct user){.m = m[i / 2], .o = options_of(1 + i, LVM_AUTO, 0)};
        use(&alone[i]);
    }
    for (int i = 0; i < USERS; i++)
        if (pthread_create(&thread[i], NULL, use, &together[i]) != 0) abort();
    for (int i = 0; i < USERS; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < USERS; i++) {
        check(alone[i].code == LVM_OK && together[i].code == LVM_OK, "user %d: codes %d, %d", i,
              alone[i].code, together[i].code);
        check_same(&alone[i].outcome, &together[i].outcome, "alone and beside others");
    }
    check_same(&alone[0].outcome, &alone[1].outcome, "two contexts of a model");
    for (int i = 0; i < 2; i++) {
        lvm_close(m[i]);
        free(f[i].data);
    }
}

/* ---- Damaged files ---- */

/* What opens must also run. Sizes that no tensor vouches for may have grown: then opening
   is enough. */
static void run_damaged(const lvm_model *m) {
    lvm_info info = lvm_model_info(m);
    lvm_options o = options_of(1, LVM_AUTO, 0);
    if (info.resolution > 64 || info.context_length > 1 << 16) return;
    lvm_ctx *ctx = lvm_ctx_new(m, &o, NULL);
    if (ctx == NULL) return;
    int32_t *tokens = must(calloc((size_t)info.tokens_per_image + 8, sizeof *tokens));
    float logits[V];
    if (info.has_transformer && info.vocab_size <= V) {
        lvm_prompt(ctx, tokens, 5, logits, NULL);
        lvm_generate(ctx, NULL, 2, 3, tokens, NULL);
    }
    if (info.has_tokenizer && encode_noise(ctx, tokens) == LVM_OK) {
        lvm_image image = {0, 0, NULL, 0};
        lvm_decode(ctx, tokens, 1, &image, NULL);
        lvm_image_free(&image);
    }
    free(tokens);
    lvm_ctx_free(ctx);
}

/* Memory of exactly the file's size, so that a sanitizer sees every read beyond it. */
static int open_and_run(const uint8_t *data, size_t size) {
    lvm_error error = {0, ""};
    uint8_t *copy = must(malloc(size > 0 ? size : 1));
    memcpy(copy, data, size);
    lvm_model *m = lvm_open_memory(copy, size, &error);
    int ok = m != NULL || (error.code != LVM_OK && error.text[0] != 0);
    if (m != NULL) run_damaged(m);
    lvm_close(m);
    free(copy);
    return ok;
}

static void test_damage(void) {
    static const struct spec spec = {"damaged file", LVM_Q4_0, LVM_F16, 300, 1, 4, 1, 1, 1};
    enum { CUTS = 50, FLIPS = 2000 };
    struct model_file f;
    lvm_close(open_spec(&spec, &f));
    for (int i = 0; i < CUTS; i++) { /* half of the cuts before the tensors' data, half in it */
        size_t part = (size_t)i % (CUTS / 2), body = f.size - f.data_start;
        size_t size = i < CUTS / 2 ? f.data_start * part / (CUTS / 2)
                                   : f.data_start + body * part / (CUTS / 2);
        lvm_error error = {0, ""};
        lvm_model *m = lvm_open_memory(f.data, size, &error);
        check(m == NULL && error.code == LVM_FORMAT, "cut to %zu bytes: %s", size,
              m != NULL ? "opens" : error.text);
        lvm_close(m);
        check(open_and_run(f.data, size), "cut to %zu bytes: an error without words", size);
    }
    for (int i = 0; i < FLIPS; i++) {
        int flips = 1 + below(&chance, 3), head = i % 8 != 0;
        size_t at[3];
        uint8_t old[3];
        for (int k = 0; k < flips; k++) {
            at[k] = rng_next(&chance) % (head ? f.data_start : f.size);
            old[k] = f.data[at[k]];
            f.data[at[k]] = (uint8_t)(i % 2 ? old[k] ^ 1 << below(&chance, 8)
                                            : below(&chance, 256));
        }
        check(open_and_run(f.data, f.size), "flipped bytes: an error without words");
        for (int k = flips - 1; k >= 0; k--) f.data[at[k]] = old[k];
    }
    free(f.data);
}

/* ---- Wrong arguments ---- */

static void test_wrong_options(const lvm_model *m) {
    lvm_options o = lvm_default_options();
    o.size = 4;
    REFUSES(lvm_ctx_new(m, &o, e));
    o = options_of(-1, LVM_AUTO, 0);
    REFUSES(lvm_ctx_new(m, &o, e));
    o = options_of(1025, LVM_AUTO, 0);
    REFUSES(lvm_ctx_new(m, &o, e));
    o = options_of(1, LVM_Q4_0, 0);
    REFUSES(lvm_ctx_new(m, &o, e));
    o = options_of(1, 77, 0);
    REFUSES(lvm_ctx_new(m, &o, e));
}

static void test_wrong_sampling(lvm_ctx *ctx) {
    int32_t out[8];
    static const float temperatures[] = {0, 1e-4f, -1, 101, HUGE_VALF, NAN},
                       ps[] = {0, -1, 1.001f, NAN};
    for (size_t i = 0; i < sizeof temperatures / sizeof *temperatures; i++) {
        lvm_sampling s = lvm_default_sampling();
        s.temperature = temperatures[i];
        INVALID(lvm_generate(ctx, &s, 1, 1, out, e));
    }
    for (size_t i = 0; i < sizeof ps / sizeof *ps; i++) {
        lvm_sampling s = lvm_default_sampling();
        s.top_p = ps[i];
        INVALID(lvm_generate(ctx, &s, 1, 1, out, e));
    }
    lvm_sampling s = lvm_default_sampling();
    s.top_k = -1;
    INVALID(lvm_generate(ctx, &s, 1, 1, out, e));
    s = lvm_default_sampling();
    s.size = 0;
    INVALID(lvm_generate(ctx, &s, 1, 1, out, e));
    INVALID(lvm_generate(ctx, NULL, 0, 1, out, e));
    INVALID(lvm_generate(ctx, NULL, 65, 1, out, e));
    INVALID(lvm_generate(ctx, NULL, 1, 0, out, e));
    INVALID(lvm_generate(ctx, NULL, 1, -5, out, e));
}

static void test_wrong_ids(lvm_ctx *ctx) {
    int32_t ids[400] = {0}, bad[64] = {0};
    float nll[64];
    lvm_image images[2];
    lvm_error error;
    INVALID(lvm_generate(ctx, NULL, 1, 1, ids, e)); /* no prompt yet */
    INVALID(lvm_score(ctx, ids, 1, nll, e));
    INVALID(lvm_prompt(ctx, ids, 0, NULL, e));
    INVALID(lvm_prompt(ctx, ids, -1, NULL, e));
    INVALID(lvm_prompt(ctx, ids, 301, NULL, e));
    check(lvm_prompt(ctx, ids, 300, NULL, &error) == LVM_OK, "a prompt of 300 fails");
    INVALID(lvm_score(ctx, ids, 2, nll, e));
    check(lvm_score(ctx, ids, 1, nll, &error) == LVM_OK, "one score behind 300 tokens fails");
    INVALID(lvm_score(ctx, ids, 0, nll, e));
    INVALID(lvm_score(ctx, ids, -1, nll, e));
    for (int i = 0; i < 3; i++) {
        bad[1] = i == 0 ? -1 : i == 1 ? V : INT32_MAX;
        INVALID(lvm_prompt(ctx, bad, 2, NULL, e));
        INVALID(lvm_decode(ctx, bad, 1, images, e));
    }
    bad[1] = CODES; /* the transformer may read it, the tokenizer has no image for it */
    check(lvm_prompt(ctx, bad, 2, NULL, &error) == LVM_OK, "a prompt with a special id fails");
    INVALID(lvm_decode(ctx, bad, 1, images, e));
    bad[0] = V;
    INVALID(lvm_score(ctx, bad, 1, nll, e));
}

static void test_wrong_images(lvm_ctx *ctx) {
    uint8_t rgb[3 * 4] = {0};
    lvm_image good = {2, 2, rgb, 0}, none = {0, 2, rgb, 0}, out[65];
    int32_t ids[64];
    lvm_sampling s = lvm_default_sampling();
    INVALID(lvm_encode(ctx, &none, 1, ids, e));
    INVALID(lvm_encode(ctx, &good, -1, ids, e));
    INVALID(lvm_decode(ctx, ids, -1, out, e));
    INVALID(lvm_predict(ctx, &good, -1, &s, 1, 1, out, e));
    INVALID(lvm_predict(ctx, &good, 1, &s, 0, 1, out, e));
    INVALID(lvm_predict(ctx, &good, 1, &s, 65, 1, out, e));
    INVALID(lvm_predict(ctx, &good, 1, &s, 1, 0, out, e));
    s.top_p = 2;
    INVALID(lvm_predict(ctx, &good, 1, &s, 1, 1, out, e));
}

/* Files with one part only: what needs the other says so. */
static void test_parts(void) {
    static const struct spec specs[2] = {
        {"tokenizer alone", LVM_F32, LVM_F32, 300, 0, 16, 2, 0, 1},
        {"transformer alone", LVM_F32, LVM_F32, 300, 1, 16, 2, 1, 0}};
    int32_t ids[64] = {0};
    float nll[4];
    uint8_t rgb[3] = {0};
    lvm_image image = {1, 1, rgb, 0}, out;
    for (int i = 0; i < 2; i++) {
        struct model_file f;
        lvm_model *m = open_spec(&specs[i], &f);
        lvm_ctx *ctx = context(m, NULL);
        if (i == 0) {
            INVALID(lvm_prompt(ctx, ids, 1, NULL, e));
            INVALID(lvm_score(ctx, ids, 1, nll, e));
            INVALID(lvm_generate(ctx, NULL, 1, 1, ids, e));
        } else {
            INVALID(lvm_encode(ctx, &image, 1, ids, e));
            INVALID(lvm_decode(ctx, ids, 1, &out, e));
        }
        INVALID(lvm_predict(ctx, &image, 1, NULL, 1, 1, &out, e));
        lvm_ctx_free(ctx);
        lvm_close(m);
        free(f.data);
    }
}

static void set_variable(const char *name, const char *value) {
#ifdef _WIN32
    _putenv_s(name, value);
#else
    setenv(name, value, 1);
#endif
}

static void test_wrong_arguments(void) {
    static const struct spec spec = {"wrong arguments", LVM_F32, LVM_F16, 300, 1, 16, 2, 1, 1};
    struct model_file f;
    lvm_model *m = open_spec(&spec, &f);
    lvm_ctx *ctx = context(m, NULL);
    test_wrong_options(m);
    test_wrong_ids(ctx);
    test_wrong_sampling(ctx);
    test_wrong_images(ctx);
    uint8_t *moved = must(malloc(f.size + 1));
    memcpy(moved + 1, f.data, f.size);
    REFUSES(lvm_open_memory(moved + 1, f.size, e));
    free(moved);
    char *isa = getenv("LVM_ISA"), *kept = isa != NULL ? must(strdup(isa)) : NULL;
    set_variable("LVM_ISA", "abacus");
    REFUSES(lvm_open_memory(f.data, f.size, e));
    set_variable("LVM_ISA", kept != NULL ? kept : ""); /* to lvm an empty one is none */
    free(kept);
    lvm_ctx_free(NULL);
    lvm_close(NULL);
    lvm_ctx_free(ctx);
    lvm_close(m);
    free(f.data);
}

/* ---- All ---- */

static void test_type(int type) {
    static const int kv_types[] = {LVM_F32, LVM_F16, LVM_Q8_0};
    const char *name = type_info(type)->name;
    struct spec spec = {name, type, type == LVM_Q8_0 ? LVM_Q8_0 : LVM_F16, 300, 1, 16, 2, 1, 1};
    struct model_file f;
    lvm_model *m = open_spec(&spec, &f);
    lvm_options usual = options_of(1, LVM_AUTO, 0);
    for (int exact = 0; exact <= type_is_quantised(type); exact++)
        for (int k = 0; k < 3; k++) {
            lvm_options o = options_of(1, kv_types[k], exact);
            test_thread_counts(m, o, (const int[]){3, 0});
            test_prefixes(m, &o);
            test_score(m, &o);
            test_generation(m, &o, 0);
            test_generation(m, &o, 1);
        }
    test_thread_counts(m, usual, (const int[]){2, 5, 0});
    test_continued(m, &usual);
    test_seeds(m, &usual);
    test_cancel(m, LVM_AUTO);
    lvm_close(m);
    free(f.data);
}

/* ---- The pool ---- */

struct draws {
    atomic_int runs[1000], ended, bad; /* bad: a thread's number out of range, or no help in time */
    int count, threads, held;          /* held: task 0 ends when all others have */
};

static void tally_task(void *arg, int task, int thread) {
    struct draws *t = arg;
    atomic_fetch_add(&t->runs[task], 1);
    if (thread < 0 || thread >= t->threads) atomic_fetch_add(&t->bad, 1);
    for (int turns = 0; t->held && task == 0 && atomic_load(&t->ended) < t->count - 1; turns++) {
        if (turns == 20000) { /* 20 s */
            atomic_fetch_add(&t->bad, 1);
            break;
        }
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    atomic_fetch_add(&t->ended, 1);
}

/* Every task runs once, whatever a thread's share, and who waits in one leaves the rest of its
   share to the others. */
static void test_pool(void) {
    static const int counts[] = {0, 1, 2, 3, 4, 5, 7, 64, 1000};
    where("pool");
    for (int threads = 1; threads <= 5; threads++) {
        struct pool *pool = must(pool_new(threads, NULL));
        for (size_t i = 0, bad = 0; !bad && i < 2 * sizeof counts / sizeof *counts; i++) {
            struct draws *tally = must(calloc(1, sizeof *tally));
            int once = 1;
            tally->count = counts[i / 2];
            tally->threads = threads;
            tally->held = i % 2 == 1 && threads > 1 && tally->count > 1;
            pool_run(pool, tally->count, tally_task, tally);
            check(atomic_load(&tally->ended) == tally->count,
                  "a run of %d tasks ends before them", tally->count);
            for (int k = 0; k < tally->count; k++) once &= atomic_load(&tally->runs[k]) == 1;
            check(once, "%d threads: not every one of %d tasks ran once", threads, tally->count);
            bad = atomic_load(&tally->bad) != 0;
            check(!bad, "%d threads do not help one that waits", threads);
            free(tally);
        }
        pool_free(pool);
    }
}

/* ---- The progress bar ---- */

static void check_line(const struct bar_view *v, int columns, const char *want) {
    char line[300];
    bar_line(v, columns, line, sizeof line);
    check(strcmp(line, want) == 0, "%d columns: \"%s\", not \"%s\"", columns, line, want);
}

/* What gives way first where a terminal is narrow. */
static void test_bar_line(void) {
    struct bar_view v = {"predicting", "image", "tokens/s", 0.5, 342.4, 125, 5, 8};
    where("bar");
    check_line(&v, 80, "predicting         [######       ]  50 %  image 5 of 8  342 tokens/s  2:05 left");
    check_line(&v, 66, "predicting          50 %  image 5 of 8  342 tokens/s  2:05 left");
    check_line(&v, 62, "predicting         [####     ]  50 %  image 5 of 8  2:05 left");
    check_line(&v, 49, "predicting         [###    ]  50 %  image 5 of 8");
    check_line(&v, 46, "predicting          50 %  image 5 of 8");
    check_line(&v, 25, "predicting          50 %");
    check_line(&v, 24, " 50 %");
    check_line(&v, 6, " 50 %");
    check_line(&v, 5, "");
    check_line(&v, 0, "");
    check_line(&v, -3, "");
    v = (struct bar_view){"scoring", "choice", "tokens/s", 1.7, 3.44, 7322, 1, 1};
    check_line(&v, 200, "scoring            [########################] 100 %  3.4 tokens/s  2:02:02 left");
    v = (struct bar_view){"encoding images", "image", "", -1, 0, -1, 0, 0};
    check_line(&v, 80, "encoding images    [                        ]   0 %");
    v.left = HUGE_VAL;
    v.words = "a stage of some other device whose name is long";
    for (int columns = 0; columns < 120; columns++) {
        char line[300];
        bar_line(&v, columns, line, sizeof line);
        check((int)strlen(line) < columns || line[0] == 0, "%d columns hold \"%s\"", columns, line);
    }
}

static int near_to(double x, double want) { return fabs(x - want) <= 0.02 * fabs(want) + 1e-9; }

/* A generation of 8 images of 256 tokens at 100 tokens a second, whose window slides after the
   third, for four seconds each time, beside a clock of the test's own. */
static void test_bar_rates(void) {
    struct bar b = {.reads = 3, .writes = 8, .candidates = 2};
    struct bar_view v;
    double now = 50;
    where("bar, rates");
    for (int i = 0; i < 30; i++, now += 0.1) v = bar_update(&b, "encode", i, 30, now);
    check(strcmp(v.words, "encoding images") == 0 && v.item == 3 && v.items == 3 &&
          near_to(v.left, 0.1) && v.rate == 0, "encode: image %d, %g s left", (int)v.item, v.left);
    for (int i = 0; i < 768; i += 16, now += 0.5) v = bar_update(&b, "prefill", i, 768, now);
    check(near_to(v.rate, 32) && strcmp(v.words, "reading the prompt") == 0, "prefill: %g", v.rate);
    for (int t = 0; t < 8 * 256; t++, now += 0.01) {
        for (int i = 0; t >= 3 * 256 && t % 256 == 0 && i < 40; i++, now += 0.1) {
            v = bar_update(&b, "slide", i, 40, now);
            check(strcmp(v.words, "sliding the window") == 0, "at %d: %s", t, v.words);
        }
        v = bar_update(&b, "generate", t, 8 * 256, now);
        int slides = t >= 3 * 256 ? 7 - t / 256 : 0;
        double left = (8 * 256 - t) * 0.01 + 4 * slides;
        check(v.items == 8 && v.item == t / 256 + 1, "token %d: image %d", t, (int)v.item);
        if (t < 2) continue; /* nothing to take a rate of */
        check(near_to(v.rate, 200), "token %d: %g tokens/s", t, v.rate);
        check(near_to(v.left, left), "token %d: %g s left, not %g", t, v.left, left);
    }
    v = bar_update(&b, "decode", 17, 32, now);
    check(v.items == 16 && v.item == 9, "decode: image %d of %d", (int)v.item, (int)v.items);
}

/* A rate follows what happens now; calls that make one stage count through. */
static void test_bar_changes(void) {
    struct bar b = {.shown = 0};
    struct bar_view v;
    double now = 7;
    where("bar, changes");
    for (int t = 0; t < 1000; t++, now += t < 500 ? 0.01 : 0.1)
        v = bar_update(&b, "score", t, 1000, now);
    check(near_to(v.rate, 10) && v.items == 0, "%g tokens/s", v.rate);
    v = bar_update(&b, "score", 0, 1000, now);
    check(v.rate == 0 && v.left < 0, "begun again: %g tokens/s", v.rate);
    b = (struct bar){.calls = 4, .reads = 4};
    for (b.call = 0; b.call < 4; b.call++)
        for (int t = 0; t < 10; t++, now += 1) {
            v = bar_update(&b, "encode", t, 10, now);
            check(near_to(v.part, (10 * b.call + t) / 40.0) && v.item == b.call + 1 && v.items == 4,
                  "call %d, %d of 10: %g", b.call, t, v.part);
            check(10 * b.call + t == 0 || near_to(v.left, 40 - 10 * b.call - t), "%g s", v.left);
        }
    b = (struct bar){.whole = 1};
    v = bar_update(&b, "eval", 4, 80, now);
    check(v.items == 0 && near_to(v.part, 0.05), "bytes counted as %d lines", (int)v.items);
    b = (struct bar){.whole = 1, .lines = 80};
    v = bar_update(&b, "eval", 4, 80, now);
    check(strcmp(v.words, "evaluating") == 0 && v.item == 5 && v.items == 80, "line %d", (int)v.item);
    v = bar_update(&b, "a device's own", 1, 2, now);
    check(strcmp(v.words, "a device's own") == 0 && v.rate == 0, "another stage: %s", v.words);
}

int main(int argc, char **argv) {
    chance = rng_new(20240608, 0);
    int quick = argc > 1 &&
                strcmp(argv[1], "--quick") == 0; /* under sanitizers: two types will do */
    test_pool();
    test_concurrency();
    if (argc < 2 || strcmp(argv[1], "--threads-only") != 0) {
        for (int i = 0; i < N_TYPES; i++)
            if (!quick || type_table[i].type == LVM_F16 || type_table[i].type == LVM_Q4_0)
                test_type(type_table[i].type);
        test_distributions();
        test_cancel_long();
        test_partial_image();
        test_scratch();
        test_damage();
        test_wrong_arguments();
        test_parts();
        test_bar_line();
        test_bar_rates();
        test_bar_changes();
    }
    return checked("properties");
}
