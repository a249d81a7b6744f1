/* What any backend must do for a context, whatever its limits: a device's tests include this file and
   call check_backend. Include behind lvm.c (with its main renamed), check() and gguf.h.

   A backend is compared with itself, byte for byte (a prompt at once and in pieces, with a reused
   prefix, after a cancelled or failed call, saved and loaded; a candidate alone and among others), and
   with the CPU's, whose results it must reach within `off` in logits and nats (0: the same bytes). */
#ifndef CONFORMANCE_H
#define CONFORMANCE_H

enum { CF_V = 80, CF_CODES = 64, CF_BOS = 64, CF_T = 64, CF_R = 16, CF_CONTEXT = 300,
       CF_PROMPT = 280, CF_SCORED = 20, CF_SHORT = 1 + 3 * CF_T, CF_NEW = 70, CF_MANY = 3,
       CF_IMAGES = 5 };

/* What a context computes: a prompt longer than a block of keys, scores behind it, candidates whose
   window slides (at 257 tokens), images in and out. */
struct cf_outcome {
    float logits[CF_V], nll[CF_SCORED];
    int32_t ids[CF_MANY][CF_NEW], tokens[CF_IMAGES][CF_T];
    uint8_t pixels[CF_IMAGES][CF_R * CF_R * 3];
};

enum cf_action { CF_ENCODE, CF_DECODE, CF_PREFILL, CF_SCORE, CF_GENERATE, CF_ACTIONS };
static const char *const cf_names[CF_ACTIONS] = {"encode", "decode", "prefill", "score",
                                                 "generate"};

static struct model_file cf_model_of(int type, int context) {
    struct llama a = {.context = context, .L = 2, .D = 64, .F = 96, .H = 4, .G = 2, .d = 16,
                      .V = CF_V, .bos = CF_BOS, .eos = -1, .eps = 1e-6f, .theta = 10000};
    struct vqgan vq = {.R = CF_R, .hidden = 32, .z = 32, .codes = CF_CODES, .code_dim = 16,
                       .n_res_blocks = 1, .resample_conv = 1, .n_levels = 2, .mult = {1, 2}};
    return make_model(&a, &vq, type, LVM_F16);
}

static struct model_file cf_model(int type) { return cf_model_of(type, CF_CONTEXT); }

static void cf_ids(int32_t *ids, int n, uint64_t stream) {
    struct rng rng = rng_new(11, stream);
    for (int i = 0; i < n; i++) ids[i] = (int32_t)(rng_next(&rng) % CF_CODES);
    ids[0] = CF_BOS;
}

/* Image 3 is image 0 again, so that a batch meets one that it holds already. */
static int cf_encode(lvm_ctx *ctx, struct cf_outcome *o, lvm_error *error) {
    static uint8_t rgb[CF_IMAGES][19 * 23 * 3];
    lvm_image images[CF_IMAGES];
    for (int i = 0; i < CF_IMAGES; i++) {
        struct rng rng = rng_new(13, (uint64_t)(i == 3 ? 0 : i));
        for (size_t p = 0; p < sizeof rgb[i]; p++) rgb[i][p] = (uint8_t)rng_next(&rng);
        images[i] = (lvm_image){19, 23, rgb[i], 0};
    }
    return lvm_encode(ctx, images, CF_IMAGES, o->tokens[0], error);
}

static int cf_decode(lvm_ctx *ctx, struct cf_outcome *o, lvm_error *error) {
    lvm_image images[CF_IMAGES];
    int32_t ids[CF_IMAGES * CF_T];
    struct rng rng = rng_new(17, 0);
    for (int i = 0; i < CF_IMAGES * CF_T; i++) ids[i] = (int32_t)(rng_next(&rng) % CF_CODES);
    int code = lvm_decode(ctx, ids, CF_IMAGES, images, error);
    for (int i = 0; i < CF_IMAGES; i++) {
        if (code == LVM_OK) memcpy(o->pixels[i], images[i].rgb, sizeof o->pixels[i]);
        lvm_image_free(&images[i]);
    }
    return code;
}

/* One call with its result in *o; what it needs before it is done with no interference. */
static int cf_act(lvm_ctx *ctx, enum cf_action action, struct cf_outcome *o, int before,
                  lvm_error *error) {
    int32_t ids[CF_PROMPT + CF_SCORED];
    lvm_sampling s = lvm_default_sampling();
    int code = LVM_OK;
    s.seed = 5;
    cf_ids(ids, CF_PROMPT + CF_SCORED, 1);
    if (before && action == CF_ENCODE) ctx_reset(ctx); /* or it would know the images */
    if (before && action == CF_PREFILL) code = lvm_prompt(ctx, &(int32_t){1}, 1, NULL, error);
    if (before && action == CF_SCORE) code = lvm_prompt(ctx, ids, CF_PROMPT, NULL, error);
    if (before && action == CF_GENERATE) code = lvm_prompt(ctx, ids, CF_SHORT, NULL, error);
    if (before) return code;
    if (action == CF_ENCODE) return cf_encode(ctx, o, error);
    if (action == CF_DECODE) return cf_decode(ctx, o, error);
    if (action == CF_PREFILL) return lvm_prompt(ctx, ids, CF_PROMPT, o->logits, error);
    if (action == CF_SCORE) return lvm_score(ctx, ids + CF_PROMPT, CF_SCORED, o->nll, error);
    return lvm_generate(ctx, &s, CF_MANY, CF_NEW, o->ids[0], error);
}

static int cf_all(lvm_ctx *ctx, struct cf_outcome *o) {
    lvm_error error = {0, ""};
    int code = LVM_OK;
    memset(o, 0, sizeof *o);
    for (int i = 0; code == LVM_OK && i < CF_ACTIONS; i++) {
        code = cf_act(ctx, i, o, 1, &error);
        if (code == LVM_OK) code = cf_act(ctx, i, o, 0, &error);
        check(code == LVM_OK, "%s fails: %s", cf_names[i], error.text);
    }
    return code;
}

static void cf_same(const struct cf_outcome *a, const struct cf_outcome *b, const char *what) {
    check(memcmp(a->logits, b->logits, sizeof a->logits) == 0, "%s: logits differ", what);
    check(memcmp(a->nll, b->nll, sizeof a->nll) == 0, "%s: likelihoods differ", what);
    check(memcmp(a->ids, b->ids, sizeof a->ids) == 0, "%s: generated ids differ", what);
    check(memcmp(a->tokens, b->tokens, sizeof a->tokens) == 0, "%s: tokens differ", what);
    check(memcmp(a->pixels, b->pixels, sizeof a->pixels) == 0, "%s: pixels differ", what);
}

/* Near enough to the CPU's: generated ids are not compared, for one near tie changes all that follow. */
static void cf_near(const struct cf_outcome *a, const struct cf_outcome *b, double off) {
    double logits = 0, nll = 0;
    int tokens = 0, pixels = 0;
    for (int i = 0; i < CF_V; i++)
        logits = fmax(logits, fabs((double)a->logits[i] - b->logits[i]));
    for (int i = 0; i < CF_SCORED; i++) nll = fmax(nll, fabs((double)a->nll[i] - b->nll[i]));
    for (int i = 0; i < CF_IMAGES; i++) {
        for (int t = 0; t < CF_T; t++) tokens += a->tokens[i][t] != b->tokens[i][t];
        for (int p = 0; p < CF_R * CF_R * 3; p++) {
            int d = abs(a->pixels[i][p] - b->pixels[i][p]);
            pixels = d > pixels ? d : pixels;
        }
    }
    check(logits <= off && nll <= off, "logits %g and likelihoods %g off the CPU's", logits, nll);
    check(tokens <= 1 && pixels <= 1, "%d tokens are not the CPU's, pixels %d off", tokens, pixels);
}

static lvm_ctx *cf_context(const lvm_model *m, const struct backend *b, const lvm_options *o) {
    lvm_error error = {0, ""};
    lvm_ctx *ctx = ctx_new(m, b, o, &error);
    check(ctx != NULL, "no context: %s", error.text);
    if (ctx == NULL) abort();
    return ctx;
}

/* A prompt in pieces, after another one with the same beginning, and back. */
static void cf_prefixes(const lvm_model *m, const struct backend *b, const lvm_options *o) {
    int32_t ids[CF_PROMPT], other[CF_PROMPT];
    float want[CF_V], got[CF_V];
    lvm_ctx *at_once = cf_context(m, b, o), *pieces = cf_context(m, b, o);
    cf_ids(ids, CF_PROMPT, 2);
    cf_ids(other, CF_PROMPT, 3);
    check(lvm_prompt(at_once, ids, CF_PROMPT, want, NULL) == LVM_OK, "a prompt fails");
    for (int n = 1; n < CF_PROMPT; n += 1 + n / 3) lvm_prompt(pieces, ids, n, got, NULL);
    lvm_prompt(pieces, ids, CF_PROMPT, got, NULL);
    check(memcmp(want, got, sizeof want) == 0, "a prompt in pieces is not the prompt at once");
    for (int same = 0; same < CF_PROMPT; same += 93) {
        memcpy(other, ids, (size_t)same * sizeof *ids);
        lvm_prompt(pieces, other, CF_PROMPT - 7, NULL, NULL);
        lvm_prompt(pieces, ids, CF_PROMPT, got, NULL);
        check(memcmp(want, got, sizeof want) == 0, "with %d tokens reused a prompt differs", same);
    }
    lvm_ctx_free(at_once);
    lvm_ctx_free(pieces);
}

/* Chooses as lvm did, or as it is told, and keeps the logits of candidate 0. */
struct cf_chooser {
    int calls, greedy, stop_at, bad_at, keep, candidates;
    int32_t bad;
    float *seen; /* [keep][V] */
};

static int cf_choose(void *user, int candidate, int index, const float *logits, int32_t *id) {
    struct cf_chooser *c = user;
    int many = c->candidates > 0 ? c->candidates : 1;
    if (candidate != c->calls % many || index != c->calls / many || *id < 0 || *id >= CF_CODES)
        check(0, "choice %d: candidate %d, token %d, id %d", c->calls, candidate, index, (int)*id);
    c->calls++;
    if (index < c->keep && candidate == 0)
        memcpy(c->seen + index * CF_V, logits, CF_V * sizeof *logits);
    if (index < c->greedy) *id = argmax(logits, CF_CODES);
    if (c->bad_at > 0 && c->calls == c->bad_at) *id = c->bad;
    return c->stop_at > 0 && c->calls == c->stop_at;
}

/* A candidate alone is the first of several; in one call or in several. */
static void cf_candidates(lvm_ctx *ctx, const struct cf_outcome *want) {
    int32_t prompt[CF_SHORT], ids[CF_NEW], pieces[CF_NEW], most[64];
    lvm_sampling s = lvm_default_sampling();
    lvm_error error = {0, ""};
    s.seed = 5;
    cf_ids(prompt, CF_SHORT, 1);
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    check(lvm_generate(ctx, &s, 1, CF_NEW, ids, NULL) == LVM_OK, "one candidate fails");
    check(memcmp(ids, want->ids[0], sizeof ids) == 0, "a candidate alone is not the first of %d",
          CF_MANY);
    s.greedy = 1;
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    lvm_generate(ctx, &s, 1, CF_NEW, ids, NULL);
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    for (int i = 0; i < CF_NEW; i += 14) lvm_generate(ctx, &s, 1, 14, pieces + i, NULL);
    check(memcmp(ids, pieces, sizeof ids) == 0, "generating in pieces is not generating at once");
    int sequences = ctx->limits.sequences < 64 ? ctx->limits.sequences : 64;
    check(lvm_generate(ctx, &s, sequences, 1, most, &error) == LVM_OK,
          "%d candidates, as many as the limit: %s", sequences, error.text);
    check(lvm_generate(ctx, &s, ctx->limits.sequences + 1, 1, most, &error) == LVM_INVALID,
          "more candidates than the limit: %s", error.text);
}

/* A device that samples by itself does as the host does from its logits: ids and likelihoods, byte for
   byte, while the window slides; for as many candidates as a device may treat in one way or another. */
static void cf_sampling(const struct backend *b, const lvm_options *o, int type) {
    enum { MOST = 11 };
    static const struct { float temperature, top_p; int top_k, greedy; } by[] = {
        {1, 0.9f, 0, 0}, {1, 1, 0, 0}, {0.1f, 0.75f, 0, 0}, {1, 1, 20, 0}, {5, 0.5f, 30, 0},
        {100, 1, CF_CODES - 1, 0}, {1, 1e-4f, 0, 0}, {1e-3f, 1, 0, 0}, {1, 1, 1, 0}, {1, 1, 0, 1}};
    static const int many[] = {1, 2, 3, 8, MOST};
    static int32_t ids[2][MOST * CF_NEW];
    struct backend on_host = *b;
    struct model_file f = cf_model(type);
    lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
    int32_t prompt[CF_SHORT];
    on_host.generate = NULL;
    lvm_ctx *ctx[2] = {cf_context(m, b, o), cf_context(m, &on_host, o)};
    cf_ids(prompt, CF_SHORT, 8);
    for (int i = 0; i < 10 * 5 && b->generate != NULL; i++) {
        double likely[2][MOST] = {{0}};
        int n = many[i % 5] < ctx[0]->limits.sequences ? many[i % 5] : ctx[0]->limits.sequences;
        for (int k = 0; k < 2; k++) {
            lvm_error error = {0, ""};
            lvm_sampling s = lvm_default_sampling();
            s.seed = (uint64_t)i;
            s.temperature = by[i / 5].temperature;
            s.top_p = by[i / 5].top_p;
            s.top_k = by[i / 5].top_k;
            s.greedy = by[i / 5].greedy;
            s.log_likelihood = i % 2 == 0 ? likely[k] : NULL;
            lvm_prompt(ctx[k], prompt, CF_SHORT, NULL, NULL);
            check(lvm_generate(ctx[k], &s, n, CF_NEW, ids[k], &error) == LVM_OK, "%s", error.text);
        }
        check(memcmp(ids[0], ids[1], (size_t)(n * CF_NEW) * sizeof **ids) == 0,
              "%d candidates, way %d of sampling: not the host's ids", n, i / 5);
        check(memcmp(likely[0], likely[1], sizeof likely[0]) == 0,
              "%d candidates, way %d of sampling: not the host's likelihoods", n, i / 5);
    }
    lvm_ctx_free(ctx[0]);
    lvm_ctx_free(ctx[1]);
    lvm_close(m);
    free(f.data);
}

/* A token's random number depends on seed, candidate and the tokens since the prompt alone: one call of
   256, sixteen of 16 and 256 of 1 are the same, while the window slides three times; and what was
   greedy in between moves nothing. */
static void cf_streams(lvm_ctx *ctx) {
    enum { N = 256 };
    int32_t prompt[CF_SHORT], want[N], got[N], likely[CF_V];
    lvm_sampling s = lvm_default_sampling();
    lvm_error error = {0, ""};
    s.seed = 23;
    cf_ids(prompt, CF_SHORT, 1);
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    check(lvm_generate(ctx, &s, 1, N, want, &error) == LVM_OK, "256 tokens: %s", error.text);
    for (int piece = 16; piece > 0; piece -= 15) {
        lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
        for (int i = 0; i < N; i += piece) lvm_generate(ctx, &s, 1, piece, got + i, NULL);
        check(memcmp(want, got, sizeof want) == 0, "calls of %d tokens are not one of 256", piece);
    }
    /* Behind several candidates the first goes on, and each draws as far on in its own stream. */
    int32_t pair[2 * 16], next[2];
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    check(lvm_generate(ctx, &s, 2, 16, pair, NULL) == LVM_OK &&
              lvm_generate(ctx, &s, 2, 1, next, NULL) == LVM_OK, "two candidates fail");
    check(memcmp(pair, want, 16 * sizeof *pair) == 0 && next[0] == want[16],
          "the first of two candidates does not go on");
    float logits[CF_V];
    struct choice room[CF_CODES];
    struct rng rng = rng_new(s.seed, 1);
    int32_t all[CF_SHORT + 16];
    memcpy(all, prompt, sizeof prompt);
    memcpy(all + CF_SHORT, want, 16 * sizeof *want);
    lvm_prompt(ctx, all, CF_SHORT + 16, logits, NULL);
    for (int i = 0; i < 16; i++) rng_next(&rng);
    check(next[1] == sample(logits, CF_CODES, &s, &rng, room), "the second candidate's stream began anew");
    struct cf_chooser c = {.greedy = 40};
    s.user = &c;
    s.choose = cf_choose;
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    check(lvm_generate(ctx, &s, 1, 90, want, NULL) == LVM_OK && c.calls == 90, "choosing fails");
    s = lvm_default_sampling();
    s.seed = 23;
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    s.greedy = 1;
    lvm_generate(ctx, &s, 1, 40, got, NULL);
    s.greedy = 0;
    lvm_generate(ctx, &s, 1, 50, got + 40, NULL);
    check(memcmp(want, got, 90 * sizeof *want) == 0, "behind 40 greedy tokens draws are others");
    memcpy(likely, got, sizeof likely);
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    lvm_generate(ctx, &s, 2, 40, got, NULL);
    check(memcmp(likely, got, 40 * sizeof *got) != 0, "greedy tokens are sampled ones");
}

/* A caller that chooses as lvm would changes nothing; its logits are those that lvm_logits tells of the
   same tokens; and log_likelihood is what lvm_score gives them. */
static void cf_choices(lvm_ctx *ctx, const struct cf_outcome *want) {
    enum { N = 30 };
    int32_t prompt[CF_SHORT], ids[CF_MANY][CF_NEW], few[CF_MANY][N];
    static float seen[N][CF_V], told[N][CF_V];
    float nll[N], first[CF_V];
    double sums[CF_MANY] = {1, 2, 3}, likely = 0;
    struct cf_chooser c = {.seen = seen[0], .keep = N, .candidates = CF_MANY};
    lvm_sampling s = lvm_default_sampling();
    lvm_error error = {0, ""};
    s.seed = 5;
    s.user = &c;
    s.choose = cf_choose;
    s.log_likelihood = sums;
    cf_ids(prompt, CF_SHORT, 1);
    lvm_prompt(ctx, prompt, CF_SHORT, first, NULL);
    check(lvm_generate(ctx, &s, CF_MANY, CF_NEW, ids[0], &error) == LVM_OK &&
              memcmp(ids, want->ids, sizeof ids) == 0 && c.calls == CF_MANY * CF_NEW,
          "who looks at each token changes them: %s", error.text);
    s.choose = NULL;
    double own[CF_MANY];
    s.log_likelihood = own;
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    lvm_generate(ctx, &s, CF_MANY, CF_NEW, ids[0], NULL);
    check(memcmp(own, sums, sizeof own) == 0, "likelihoods depend on who chooses");
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    lvm_generate(ctx, &s, CF_MANY, N, few[0], NULL);
    for (int k = 0; k < CF_MANY; k++, likely = 0) {
        lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
        check(lvm_score(ctx, few[k], N, nll, NULL) == LVM_OK, "a candidate's score fails");
        for (int i = 0; i < N; i++) likely -= (double)nll[i];
        check(fabs(likely - own[k]) < 1e-3, "candidate %d: ln p is %.9g, lvm_score says %.9g", k,
              own[k], likely);
    }
    check(lvm_logits(ctx, few[0], N, told[0], &error) == LVM_OK, "logits: %s", error.text);
    check(memcmp(first, seen[0], sizeof first) == 0 &&
              memcmp(told[0], seen[1], (N - 1) * sizeof *told) == 0,
          "the logits of a choice are not those of lvm_logits");
    check(lvm_score(ctx, few[CF_MANY - 1], N, nll, NULL) == LVM_OK, "no score behind lvm_logits");
    check(fabsf(negative_log_likelihood(told[3], CF_V, few[0][4]) -
                negative_log_likelihood(seen[4], CF_V, few[0][4])) <= 0, "row 3 is not behind token 3");
}

/* Who chooses can cancel, and nothing but image tokens; the context stays at its prompt. */
static void cf_bad_choices(lvm_ctx *ctx, const struct cf_outcome *want) {
    int32_t prompt[CF_SHORT], ids[CF_NEW];
    lvm_sampling s = lvm_default_sampling();
    cf_ids(prompt, CF_SHORT, 1);
    s.seed = 5;
    lvm_prompt(ctx, prompt, CF_SHORT, NULL, NULL);
    for (int i = 0; i < 4; i++) {
        struct cf_chooser c = {.stop_at = i == 0 ? 66 : 0, .bad_at = i > 0 ? 66 : 0,
                               .bad = i == 1 ? -1 : i == 2 ? CF_CODES : INT32_MAX};
        lvm_error error = {0, ""};
        s.user = &c;
        s.choose = cf_choose;
        int code = lvm_generate(ctx, &s, 1, CF_NEW, ids, &error); /* slid before the 66th */
        check(code == (i == 0 ? LVM_CANCELLED : LVM_INVALID) && strstr(error.text, "choose") != NULL,
              "a bad choice gives %d: %s", code, error.text);
        s.choose = NULL;
    }
    check(lvm_generate(ctx, &s, 1, CF_NEW, ids, NULL) == LVM_OK &&
              memcmp(ids, want->ids[0], sizeof ids) == 0,
          "behind choices that were refused other tokens come");
}

/* Saved behind n tokens, loaded by another context: the same numbers, with nothing computed twice. */
static void cf_cache(const lvm_model *m, const struct backend *b, const lvm_options *o, int n,
                     const char *path) {
    int32_t ids[CF_PROMPT], next[2][5];
    float want[CF_V], got[CF_V];
    lvm_error error = {0, ""};
    lvm_ctx *from = cf_context(m, b, o), *to = cf_context(m, b, o);
    cf_ids(ids, CF_PROMPT, 4);
    lvm_prompt(from, ids, CF_PROMPT, want, NULL);
    check(lvm_cache_save(from, path, n, &error) == LVM_OK, "saving %d tokens: %s", n, error.text);
    lvm_prompt(to, ids + 1, 9, NULL, NULL);
    lvm_generate(to, NULL, 1, 3, next[0], NULL);
    check(lvm_cache_load(to, path, &error) == LVM_OK, "loading %d tokens: %s", n, error.text);
    check(to->n_fed == n, "%d tokens were loaded, not %d", to->n_fed, n);
    lvm_prompt(from, ids, n, NULL, NULL); /* a loaded prompt begins its random stream, as any */
    check(lvm_generate(from, NULL, 1, 5, next[0], NULL) == LVM_OK &&
              lvm_generate(to, NULL, 1, 5, next[1], NULL) == LVM_OK &&
              memcmp(next[0], next[1], sizeof next[0]) == 0, "behind %d loaded tokens others follow", n);
    lvm_prompt(to, ids, CF_PROMPT, got, NULL);
    check(memcmp(want, got, sizeof want) == 0, "behind a cache of %d tokens logits differ", n);
    remove(path);
    lvm_ctx_free(from);
    lvm_ctx_free(to);
}

/* Scores and logits of the same tokens, many rows and one. */
static void cf_rows(const lvm_model *m, const struct backend *b, const lvm_options *o) {
    enum { N = 3 };
    int32_t ids[N + 1];
    float logits[N * CF_V], alone[CF_V], nll[N];
    lvm_ctx *ctx = cf_context(m, b, o);
    int seqs[N] = {0}, rows[N] = {0, 1, 2}, last = N - 1;
    cf_ids(ids, N + 1, 6);
    struct batch all = {.n = N, .tokens = ids, .seqs = seqs, .n_out = N, .out = rows,
                        .logits = logits};
    check(ctx->b->forward(ctx->state, &all, NULL) == LVM_OK, "a batch of rows fails");
    ctx->b->kv_trim(ctx->state, 0, 0);
    struct batch scored = all;
    scored.logits = NULL;
    scored.targets = ids + 1;
    scored.nll = nll;
    check(ctx->b->forward(ctx->state, &scored, NULL) == LVM_OK, "a batch with targets fails");
    ctx->b->kv_trim(ctx->state, 0, 0);
    struct batch one = {.n = N, .tokens = ids, .seqs = seqs, .n_out = 1, .out = &last,
                        .logits = alone};
    check(ctx->b->forward(ctx->state, &one, NULL) == LVM_OK, "a batch for its last row fails");
    check(memcmp(alone, logits + last * CF_V, sizeof alone) == 0,
          "a row's logits depend on what is wanted of others");
    for (int r = 0; r < N; r++)
        check(fabsf(negative_log_likelihood(logits + r * CF_V, CF_V, ids[r + 1]) - nll[r]) < 1e-5f,
              "row %d: likelihood of its target is not its logits'", r);
    lvm_ctx_free(ctx);
}

struct cf_canceller {
    int calls, at; /* cancels at call number `at`; -1: never */
};

/* What the progress of one call has told: each stage once, "slide" and "layers" as often as they end;
   while a stage lasts all stays and done never falls. */
struct cf_stages {
    struct { const char *name; int64_t done, all, runs; } stage[7];
};

static int cf_record(void *user, const char *stage, int64_t done, int64_t all) {
    static const char *const names[7] = {"encode", "prefill", "generate", "score", "decode", "slide",
                                         "layers"};
    struct cf_stages *r = user;
    int i = 0;
    while (i < 7 && strcmp(names[i], stage) != 0) i++;
    check(i < 7 && done >= 0 && done <= all && all > 0, "%s: %lld of %lld", stage, (long long)done,
          (long long)all);
    if (i == 7) return 0;
    int64_t was = r->stage[i].done, of = r->stage[i].all, again = i >= 5 && was == of;
    if (r->stage[i].name != NULL && !(again && done <= 1) && (done < was || all != of))
        check(0, "%s: %lld of %lld behind %lld of %lld", stage, (long long)done, (long long)all,
              (long long)was, (long long)of);
    r->stage[i].runs += r->stage[i].name == NULL || (again && done <= 1 && was > 1);
    r->stage[i].name = names[i];
    r->stage[i].done = done;
    r->stage[i].all = all;
    return 0;
}

static void cf_ended(struct cf_stages *r, const char *what, int slides) {
    for (int i = 0; i < 7; i++)
        check(r->stage[i].done == r->stage[i].all, "%s: %s ends at %lld of %lld", what,
              r->stage[i].name, (long long)r->stage[i].done, (long long)r->stage[i].all);
    check(r->stage[5].runs == slides, "%s: the window slides %lld times, not %d", what,
          (long long)r->stage[5].runs, slides);
    memset(r, 0, sizeof *r);
}

/* All calls, with images that are known already and the window sliding. */
static void cf_totals(lvm_ctx *ctx) {
    struct cf_stages r;
    struct cf_outcome o;
    int32_t ids[CF_MANY][200];
    memset(&r, 0, sizeof r);
    lvm_set_progress(ctx, cf_record, &r);
    for (int i = 0; i < CF_ACTIONS; i++) {
        cf_act(ctx, i, &o, 1, NULL);
        memset(&r, 0, sizeof r);
        check(cf_act(ctx, i, &o, 0, NULL) == LVM_OK, "%s fails", cf_names[i]);
        check(r.stage[i == CF_DECODE ? 4 : i == CF_ENCODE ? 0 : i == CF_PREFILL ? 1
                        : i == CF_SCORE ? 3 : 2].all > 1, "%s tells nothing", cf_names[i]);
        cf_ended(&r, cf_names[i], i == CF_GENERATE);
    }
    cf_encode(ctx, &o, NULL);
    cf_ended(&r, "encoding known images", 0);
    cf_act(ctx, CF_GENERATE, &o, 1, NULL);
    memset(&r, 0, sizeof r);
    lvm_generate(ctx, NULL, CF_MANY, 200, ids[0], NULL);
    cf_ended(&r, "200 tokens", 3);
    lvm_generate(ctx, NULL, 1, 30, ids[0], NULL);
    cf_ended(&r, "30 more", 0);
    uint8_t rgb[CF_R * CF_R * 3] = {1};
    lvm_image images[2] = {{CF_R, CF_R, rgb, 0}, {CF_R, CF_R, rgb, 0}}, out[6];
    check(lvm_predict(ctx, images, 2, NULL, 2, 3, out, NULL) == LVM_OK, "predicting fails");
    cf_ended(&r, "predicting", 1);
    for (int i = 0; i < 6; i++) lvm_image_free(&out[i]);
    lvm_set_progress(ctx, NULL, NULL);
    memset(&r, 0, sizeof r);
    cf_encode(ctx, &o, NULL);
    check(r.stage[0].name == NULL, "progress goes on without a function");
}

static int cf_progress(void *user, const char *stage, int64_t done, int64_t all) {
    struct cf_canceller *c = user;
    if (*stage == 0 || done < 0 || done > all) check(0, "progress: %s", stage);
    return c->calls++ == c->at;
}

/* Every action cancelled at its first moments and at later ones ever further apart, then done: as if
   nothing had happened. */
static void cf_cancel(const lvm_model *m, const struct backend *b, const lvm_options *usual,
                      const struct cf_outcome *want) {
    struct cf_canceller c = {0, -1};
    lvm_options o = *usual;
    o.user = &c;
    o.progress = cf_progress;
    lvm_ctx *ctx = cf_context(m, b, &o);
    for (int i = 0; i < CF_ACTIONS; i++)
        for (int at = 0, calls = 1; at < calls; at += 1 + at / 4) {
            struct cf_outcome got = *want;
            cf_act(ctx, i, &got, 1, NULL);
            c = (struct cf_canceller){0, at};
            int code = cf_act(ctx, i, &got, 0, NULL);
            check(code == LVM_CANCELLED, "%s cancelled at call %d gives %d", cf_names[i], at, code);
            cf_act(ctx, i, &got, 1, NULL);
            c = (struct cf_canceller){0, -1};
            check(cf_act(ctx, i, &got, 0, NULL) == LVM_OK, "%s fails after a cancelled one",
                  cf_names[i]);
            calls = c.calls;
            cf_same(want, &got, cf_names[i]);
        }
    lvm_ctx_free(ctx);
}

/* A call that meets numbers that are not finite names the tensor they come from. */
static void cf_blamed(int code, const lvm_error *error, const char *tensor, const char *what) {
    check(code == LVM_FORMAT && strstr(error->text, "not finite") != NULL &&
              strstr(error->text, tensor) != NULL && strstr(error->text, "holds NaN") != NULL,
          "%s with NaN in %s gives %d: %s", what, tensor, code, error->text);
}

static const int32_t cf_bad_ids[3] = {CF_BOS, 1, CF_V / 2};

static int cf_choose_bad(void *user, int candidate, int index, const float *logits, int32_t *id) {
    (void)user, (void)candidate, (void)index, (void)logits;
    *id = CF_V / 2;
    return 0;
}

/* Behind a prompt that is sound the bad token comes second: what follows it is judged too. So it is
   where nobody chooses and the bad token is drawn sooner or later. */
static void cf_spoiled_later(lvm_ctx *ctx, const char *tensor) {
    int32_t whole[2] = {CF_BOS, 1}, later[3] = {1, CF_V / 2, 1}, drawn[CF_MANY * 250];
    float nll[3];
    lvm_sampling s = lvm_default_sampling();
    lvm_error error = {0, ""};
    s.choose = cf_choose_bad;
    check(lvm_prompt(ctx, whole, 2, NULL, &error) == LVM_OK, "%s", error.text);
    cf_blamed(lvm_score(ctx, later, 3, nll, &error), &error, tensor, "a later likelihood");
    check(lvm_prompt(ctx, whole, 2, NULL, &error) == LVM_OK, "%s", error.text);
    cf_blamed(lvm_generate(ctx, &s, 1, 2, later, &error), &error, tensor, "a later token");
    s = lvm_default_sampling();
    s.temperature = 100;
    check(lvm_prompt(ctx, whole, 2, NULL, &error) == LVM_OK, "%s", error.text);
    cf_blamed(lvm_generate(ctx, &s, CF_MANY, 250, drawn, &error), &error, tensor, "a drawn token");
}

/* Leaves the context at a prompt that could not be read. */
static void cf_spoiled_transformer(lvm_ctx *ctx, const char *tensor, int embedding) {
    int32_t ids[3] = {CF_BOS, 1, CF_V / 2}, whole[2] = {CF_BOS, 1};
    float nll[3], logits[CF_V];
    lvm_error error = {0, ""};
    ctx_reset(ctx);
    cf_blamed(lvm_prompt(ctx, ids, 3, logits, &error), &error, tensor, "a prompt");
    cf_blamed(lvm_score(ctx, ids, 3, nll, &error), &error, tensor, "a likelihood");
    cf_blamed(lvm_generate(ctx, NULL, 1, 1, ids, &error), &error, tensor, "a token");
    int code = lvm_prompt(ctx, whole, 2, logits, &error);
    if (embedding) check(code == LVM_OK, "a prompt without the bad token fails: %s", error.text);
    else cf_blamed(code, &error, tensor, "a shorter prompt");
    if (embedding) cf_spoiled_later(ctx, tensor);
    cf_blamed(lvm_prompt(ctx, cf_bad_ids, 3, NULL, &error), &error, tensor, "the prompt again");
}

static void cf_spoiled_tokenizer(lvm_ctx *ctx, const char *tensor, int both) {
    uint8_t rgb[CF_R * CF_R * 3] = {0};
    int32_t ids[CF_T], codes[CF_T] = {CF_CODES / 2};
    lvm_image image = {CF_R, CF_R, rgb, 0}, out;
    lvm_error error = {0, ""};
    ctx_reset(ctx);
    int encoded = lvm_encode(ctx, &image, 1, ids, &error);
    if (encoded != LVM_OK) cf_blamed(encoded, &error, tensor, "an image");
    int decoded = lvm_decode(ctx, codes, 1, &out, &error);
    if (decoded != LVM_OK) cf_blamed(decoded, &error, tensor, "pixels");
    check((encoded != LVM_OK) + (decoded != LVM_OK) == 1 + both, "NaN in %s: encoding gives %d, decoding %d",
          tensor, encoded, decoded);
    check((decoded == LVM_OK) == (out.rgb != NULL), "an image of NaN is left");
    lvm_image_free(&out);
}

struct cf_opened {
    lvm_model *m;
    lvm_ctx *ctx;
};

static void cf_close(struct cf_opened *x) {
    lvm_ctx_free(x->ctx);
    lvm_close(x->m);
}

static void cf_open(struct cf_opened *x, const struct model_file *f, const struct backend *b,
                    const lvm_options *o) {
    x->m = must(lvm_open_memory(f->data, f->size, NULL));
    x->ctx = cf_context(x->m, b, o);
}

/* NaN in one tensor after the other: encoding, decoding or a prompt fails where it uses it, and only
   there; the codebook, whose norms a context takes at its beginning, serves both. What that leaves in
   memory spoils nothing once the weights are whole again; a device with a copy of its own (any but
   the CPU) gets them as another model. The middle rows of codebook and embedding are those of token
   CF_CODES / 2 and CF_V / 2. */
static void cf_not_finite(const struct backend *b, const lvm_options *o, int type) {
    struct model_file f = cf_model(type);
    struct cf_opened x;
    int copies_weights = strcmp(o->device, "cpu") != 0;
    cf_open(&x, &f, b, o);
    float want[3], got[3];
    lvm_prompt(x.ctx, cf_bad_ids, 3, NULL, NULL);
    check(lvm_score(x.ctx, cf_bad_ids, 3, want, NULL) == LVM_OK, "a score fails");
    for (int i = 0; i < x.m->n_specs; i++) {
        if (x.m->specs[i].tensor->data == NULL) continue;
        int vq = strncmp(x.m->specs[i].name, "vq.", 3) == 0;
        uint16_t whole = spoil(&f, x.m->specs[i].tensor, 0x7fff);
        int codebook = x.m->specs[i].tensor == &x.m->vq->codebook;
        if (copies_weights || codebook) cf_close(&x), cf_open(&x, &f, b, o);
        const struct tensor_spec *s = &x.m->specs[i];
        if (vq) cf_spoiled_tokenizer(x.ctx, s->name, codebook);
        else cf_spoiled_transformer(x.ctx, s->name, s->kind == T_EMBED);
        spoil(&f, s->tensor, whole);
        if (codebook) cf_close(&x), cf_open(&x, &f, b, o);
        if (vq) continue;
        if (copies_weights) cf_close(&x), cf_open(&x, &f, b, o);
        if (copies_weights) lvm_prompt(x.ctx, cf_bad_ids, 3, NULL, NULL);
        check(lvm_score(x.ctx, cf_bad_ids, 3, got, NULL) == LVM_OK &&
                  memcmp(want, got, sizeof want) == 0,
              "%s is whole again, the scores are not", x.m->specs[i].name);
    }
    cf_close(&x);
    free(f.data);
}

/* path: a file that may be written. off: see above. */
static void check_backend(const struct backend *b, const char *device, int type, int kv_type,
                          double off, const char *path) {
    struct cf_outcome cpu, got, again;
    struct model_file f = cf_model(type);
    lvm_error error = {0, ""};
    lvm_model *m = lvm_open_memory(f.data, f.size, &error);
    lvm_options o = lvm_default_options(), here;
    if (m == NULL) abort();
    o.threads = 2;
    o.kv_type = kv_type;
    here = o;
    here.device = device;
    o.device = "cpu";
    lvm_ctx *reference = cf_context(m, &cpu_backend, &o), *ctx = cf_context(m, b, &here);
    if (cf_all(reference, &cpu) == LVM_OK && cf_all(ctx, &got) == LVM_OK) {
        if (off > 0) cf_near(&cpu, &got, off);
        else cf_same(&cpu, &got, "beside the CPU");
        cf_all(ctx, &again);
        cf_same(&got, &again, "again");
        cf_candidates(ctx, &got);
        cf_sampling(b, &here, type);
        cf_streams(ctx);
        cf_choices(ctx, &got);
        cf_bad_choices(ctx, &got);
        cf_totals(ctx);
        cf_prefixes(m, b, &here);
        cf_rows(m, b, &here);
        for (int n = 1; n <= CF_PROMPT; n += 93) cf_cache(m, b, &here, n, path);
        cf_cache(m, b, &here, KV_BLOCK, path);
        cf_cancel(m, b, &here, &got);
        cf_not_finite(b, &here, type);
        cf_all(ctx, &again);
        cf_same(&got, &again, "behind all that");
    }
    check(strcmp(lvm_ctx_info(ctx).device, device) == 0, "the device is %s",
          lvm_ctx_info(ctx).device);
    lvm_ctx_free(reference);
    lvm_ctx_free(ctx);
    lvm_close(m);
    free(f.data);
}

#endif
