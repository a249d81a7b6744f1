/* lvm_cuda.cu on a GPU: the conformance test of the seam; shapes that its kernels must not stumble
   over, beside the CPU's exact arithmetic; rows that come alone and together, byte for byte.

       test_cuda FILE                  a file that may be written
           --small                     one small model once, for compute-sanitizer
           --failing                   one allocation after the other fails, for the same
           --seam                      the conformance test alone
       test_cuda --memory              what a model of 1b takes, beside what lvm says it does
       test_cuda --times [300m]        what a token costs, for 1 to 8 sequences, by forwards alone and
                                       by lvm_generate
       test_cuda --open FILE [WEIGHTS...]   what bringing weights to the GPU costs: a 1b model, in
                                       memory and written to FILE, and others
       test_cuda --beside WEIGHTS IMAGE...   tokens, pixels and next-token distributions of a real
                                       model beside the CPU's --exact */
#define main lvm_main
#include "../../lvm.c"
#undef main
#include "check.h"
#include "gguf.h"
#include "conformance.h"

/* ---- Shapes ---- */

struct shape_case {
    const char *name;
    struct llama a;
};

static const struct shape_case shape_cases[] = {
    {"two heads share", {.context = 700, .L = 2, .D = 256, .F = 320, .H = 8, .G = 4, .d = 32}},
    {"head_dim 100", {.context = 700, .L = 2, .D = 400, .F = 352, .H = 4, .G = 4, .d = 100}},
    {"300m's width", {.context = 700, .L = 2, .D = 1024, .F = 2688, .H = 8, .G = 8, .d = 128}},
    {"one key head of 16", {.context = 700, .L = 1, .D = 512, .F = 96, .H = 16, .G = 1, .d = 32}},
    {"context 512k", {.context = 1 << 19, .L = 1, .D = 2048, .F = 96, .H = 128, .G = 8, .d = 16}}};
enum { N_CASES = sizeof shape_cases / sizeof *shape_cases, SC_N = 600, SC_V = 500 };

static struct model_file shape_model(const struct llama *shape, int type) {
    struct llama a = *shape;
    a.V = SC_V;
    a.bos = a.eos = -1;
    a.eps = 1e-6f;
    a.theta = 10000;
    return make_model(&a, NULL, type, LVM_F16);
}

static lvm_ctx *context_on(const lvm_model *m, const char *device, int exact, int kv) {
    lvm_error error = {0, ""};
    lvm_options o = lvm_default_options();
    o.device = device;
    o.exact = exact;
    o.kv_type = kv;
    lvm_ctx *ctx = lvm_ctx_new(m, &o, &error);
    if (ctx == NULL) printf("no context on %s: %s\n", device, error.text);
    return must(ctx);
}

static void random_ids(int32_t *ids, int n, int below) {
    struct rng rng = rng_new(3, 1);
    for (int i = 0; i < n; i++) ids[i] = (int32_t)(rng_next(&rng) % (uint32_t)below);
}

/* Logits behind each of ids[1 ..], `piece` rows at a time. */
static float *logits_of(lvm_ctx *ctx, const int32_t *ids, int n, int piece) {
    int V = ctx->m->llama.V;
    float *out = must(calloc((size_t)n * (size_t)V, sizeof *out));
    lvm_error error = {0, ""};
    ctx_reset(ctx);
    int *rows = must(calloc((size_t)n, sizeof *rows));
    int *seqs = must(calloc((size_t)n, sizeof *seqs));
    for (int i = 0; i < n; i++) rows[i] = i;
    for (int at = 0; at < n; at += piece) {
        struct batch b = {.n = n - at < piece ? n - at : piece, .tokens = ids + at, .seqs = seqs,
                          .out = rows, .logits = out + (int64_t)at * V};
        b.n_out = b.n;
        check(ctx->b->forward(ctx->state, &b, &error) == LVM_OK, "rows %d: %s", at, error.text);
    }
    free(rows);
    free(seqs);
    return out;
}

/* Mean KL of softmax(got) from softmax(want), and the largest difference of logits. */
static double divergence(const float *want, const float *got, int n, int V, double *most) {
    double sum = 0;
    *most = 0;
    for (int r = 0; r < n; r++, want += V, got += V) {
        double zw = 0, zg = 0, kl = 0;
        for (int i = 0; i < V; i++) {
            zw += exp((double)want[i]);
            zg += exp((double)got[i]);
            if (!(fabs((double)want[i] - (double)got[i]) <= *most))
                *most = fabs((double)want[i] - (double)got[i]);
        }
        for (int i = 0; i < V; i++)
            kl += exp((double)want[i]) / zw *
                  ((double)want[i] - log(zw) - (double)got[i] + log(zg));
        sum += kl;
    }
    return sum / n;
}

/* Cheaper than memcmp to look at: how many rows differ, and the first. */
static void same_rows(const float *a, const float *b, int n, int V, const char *what) {
    int differ = 0, first = -1;
    for (int r = 0; r < n; r++)
        if (memcmp(a + (int64_t)r * V, b + (int64_t)r * V, (size_t)V * sizeof *a) != 0) {
            if (differ++ == 0) first = r;
        }
    check(differ == 0, "%s: %d of %d rows differ, the first is %d", what, differ, n, first);
}

static void test_shape(const struct shape_case *c, int type, int exact, int kv) {
    struct model_file f = shape_model(&c->a, type);
    lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
    lvm_ctx *cpu = context_on(m, "cpu", 1, LVM_F32), *gpu = context_on(m, "cuda", exact, kv);
    int32_t ids[SC_N];
    double most;
    random_ids(ids, SC_N, SC_V);
    where("%s, %s, %s, cache %s", c->name, type_info(type)->name, exact ? "exact" : "fast",
          type_info(kv)->name);
    float *want = logits_of(cpu, ids, SC_N, 256), *all = logits_of(gpu, ids, SC_N, SC_N);
    double kl = divergence(want, all, SC_N, SC_V, &most);
    int strict = (exact || type == LVM_F32) && kv == LVM_F32;
    printf("%-70s KL %.2e, logits off by %.2e\n", checks.where, kl, most);
    check(strict ? most < 5e-4 : kl < 1e-3 && kl >= -1e-9, "KL %g, logits off by %g", kl, most);
    float *again = logits_of(gpu, ids, SC_N, SC_N);
    same_rows(all, again, SC_N, SC_V, "run to run");
    free(again);
    static const int pieces[] = {1, 2, 3, 5, 7, 8, 11, 16, 31, 32, 33, 64, 65, 130, 300};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        char what[32];
        float *some = logits_of(gpu, ids, SC_N, pieces[i]);
        snprintf(what, sizeof what, "%d rows at a time", pieces[i]);
        same_rows(all, some, SC_N, SC_V, what);
        free(some);
    }
    free(want);
    free(all);
    lvm_ctx_free(cpu);
    lvm_ctx_free(gpu);
    lvm_close(m);
    free(f.data);
    where("%s", "");
}

static void test_shapes(void) {
    static const int types[] = {LVM_F32, LVM_F16, LVM_BF16, LVM_Q8_0, LVM_Q4_0};
    for (int c = 0; c < N_CASES; c++)
        for (int t = 0; t < 5; t++) {
            if (shape_cases[c].a.context > 1 << 18 && types[t] != LVM_Q8_0) continue;
            int kv = t == 0 ? LVM_F32 : t < 3 ? LVM_F16 : LVM_Q8_0;
            test_shape(&shape_cases[c], types[t], 0, kv);
            if (t > 0 && c < 3) test_shape(&shape_cases[c], types[t], 1, LVM_F32);
        }
}

/* ---- Sampling from many choices ---- */

enum { SA_ROWS = 32, SA_SPECIAL = 100, SA_MOST = 16384, SA_WAYS = 12, SA_KINDS = 3 };

/* A model whose vocabulary is some choices and SA_SPECIAL more, for its context's sampler. */
static struct model_file sampled_model(int codes) {
    struct llama a = {.context = CF_CONTEXT, .L = 1, .D = 64, .F = 96, .H = 4, .G = 2, .d = 16,
                      .V = codes + SA_SPECIAL, .bos = -1, .eos = -1, .eps = 1e-6f, .theta = 10000};
    struct vqgan vq = {.R = CF_R, .hidden = 32, .z = 32, .codes = codes, .code_dim = 16,
                       .n_res_blocks = 1, .resample_conv = 1, .n_levels = 2, .mult = {1, 2}};
    return make_model(&a, &vq, LVM_F16, LVM_F16);
}

/* Bell-shaped; in steps, so that many are equal; almost flat but for one of 512. */
static void random_logits(float *x, int64_t n, int kind) {
    struct rng rng = rng_new(19, (uint64_t)kind);
    for (int64_t i = 0; i < n; i++) {
        float sum = uniform_of(&rng) + uniform_of(&rng) + uniform_of(&rng) + uniform_of(&rng);
        x[i] = kind == 0 ? 3 * sum : kind == 1 ? floorf(4 * sum) / 2
               : rng_next(&rng) % 512 == 0 ? 4 * sum : sum / 1000;
    }
}

/* One token each of SA_ROWS sequences, by the device and by lvm.c's sample. */
static void sample_beside(lvm_ctx *ctx, lvm_sampling s, float *logits, uint64_t seed) {
    static struct choice choices[SA_MOST];
    const int V = ctx->m->llama.V, codes = ctx->m->codes;
    struct rng rng[2][SA_ROWS];
    int32_t ids[2][SA_ROWS];
    double likely[2][SA_ROWS] = {{0}};
    lvm_error error = {0, ""};
    struct continuation c = {&s, SA_ROWS, 1, codes, logits, rng[0], ids[0], 1, 0, 1};
    s.log_likelihood = likely[0];
    for (int i = 0; i < SA_ROWS; i++) {
        const float *row = logits + (int64_t)i * V;
        rng[0][i] = rng[1][i] = rng_new(seed, (uint64_t)i);
        ids[1][i] = sample(row, codes, &s, &rng[1][i], choices);
        likely[1][i] -= (double)negative_log_likelihood(row, V, ids[1][i]);
    }
    check(ctx->b->generate(ctx->state, &c, &error) == LVM_OK, "%s", error.text);
    check(memcmp(ids[0], ids[1], sizeof ids[0]) == 0, "not the host's ids");
    check(memcmp(likely[0], likely[1], sizeof likely[0]) == 0, "not the host's likelihoods");
    check(memcmp(rng[0], rng[1], sizeof rng[0]) == 0, "not the host's random numbers");
}

/* A kernel has 8 choices a thread, 8192 in all, another 16. */
static void test_sampler(void) {
    static const struct { float temperature, top_p; int top_k, greedy; } by[SA_WAYS] = {
        {1, 0.9f, 0, 0}, {1, 1, 0, 0}, {0.1f, 0.75f, 0, 0}, {1, 1, 50, 0}, {5, 0.5f, 3000, 0},
        {100, 1, 8191, 0}, {1, 1e-4f, 0, 0}, {1e-3f, 1, 0, 0}, {1, 1, 1, 0}, {0.7f, 0.99f, 200, 0},
        {30, 0.999f, 9000, 0}, {1, 1, 0, 1}};
    static const int codes[] = {8192, 8193, 10000, SA_MOST};
    const int64_t n = (int64_t)SA_ROWS * (SA_MOST + SA_SPECIAL);
    float *logits = must(calloc((size_t)n, sizeof *logits));
    for (int v = 0; v < 4; v++) {
        struct model_file f = sampled_model(codes[v]);
        lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
        lvm_ctx *ctx = context_on(m, "cuda", 0, LVM_F16);
        for (int i = 0; i < SA_WAYS * SA_KINDS; i++) {
            lvm_sampling s = lvm_default_sampling();
            s.temperature = by[i % SA_WAYS].temperature;
            s.top_p = by[i % SA_WAYS].top_p;
            s.top_k = by[i % SA_WAYS].top_k;
            s.greedy = by[i % SA_WAYS].greedy;
            if (i % SA_WAYS == 0) random_logits(logits, n, i / SA_WAYS);
            for (int k = 0; i == 2 * SA_WAYS && k < SA_ROWS * SA_SPECIAL; k++) /* far above all */
                logits[(int64_t)(k / SA_SPECIAL + 1) * m->llama.V - 1 - k % SA_SPECIAL] += 100;
            where("%d choices, way %d, logits %d", codes[v], i % SA_WAYS, i / SA_WAYS);
            sample_beside(ctx, s, logits, (uint64_t)(v * 100 + i));
        }
        lvm_ctx_free(ctx);
        lvm_close(m);
        free(f.data);
    }
    where("%s", "");
    free(logits);
}

/* ---- To the end of the window ---- */

/* As many candidates as there can be, with pages of their own, until the context is full; the last
   token, number context + 1, is not fed. */
static void test_full_window(int context) {
    enum { PROMPT = 100 };
    struct model_file f = cf_model_of(LVM_Q8_0, context);
    lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
    struct backend on_host = *lvm_cuda_backend();
    lvm_options o = lvm_default_options();
    const int n = context + 1 - PROMPT;
    int32_t prompt[PROMPT], *ids[2];
    o.device = "cuda";
    o.kv_type = LVM_Q8_0;
    on_host.generate = NULL;
    cf_ids(prompt, PROMPT, 9);
    where("a context of %d", context);
    for (int k = 0; k < 2; k++) {
        lvm_error error = {0, ""};
        lvm_ctx *ctx = cf_context(m, k == 0 ? lvm_cuda_backend() : &on_host, &o);
        const int many = ctx->limits.sequences;
        ids[k] = must(calloc((size_t)many * (size_t)n, sizeof **ids));
        check(lvm_prompt(ctx, prompt, PROMPT, NULL, &error) == LVM_OK, "%s", error.text);
        check(lvm_generate(ctx, NULL, many, n, ids[k], &error) == LVM_OK, "%s", error.text);
        check(k == 0 || memcmp(ids[0], ids[1], (size_t)many * (size_t)n * sizeof **ids) == 0,
              "%d candidates: not the host's ids", many);
        lvm_ctx_free(ctx);
    }
    free(ids[0]);
    free(ids[1]);
    lvm_close(m);
    free(f.data);
    where("%s", "");
}

/* ---- Choosing the GPU ---- */

static void test_choice(void) {
    struct model_file f = cf_model(LVM_F32);
    lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
    static const struct { const char *name, *want; } cases[] = {
        {NULL, "cuda"}, {"cuda", "cuda"}, {"cuda:0", "cuda:0"}, {"cpu", "cpu"}, {"cuda:99", NULL},
        {"cuda:x", NULL}, {"cuda:", NULL}, {"cuda:-1", NULL}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        lvm_error error = {0, ""};
        lvm_options o = lvm_default_options();
        o.device = cases[i].name;
        lvm_ctx *ctx = lvm_ctx_new(m, &o, &error);
        check((ctx != NULL) == (cases[i].want != NULL), "device %s: %s", cases[i].name, error.text);
        if (ctx != NULL)
            check(strcmp(lvm_ctx_info(ctx).device, cases[i].want) == 0, "device %s is %s",
                  cases[i].name, lvm_ctx_info(ctx).device);
        lvm_ctx_free(ctx);
    }
    check(strcmp(lvm_model_info(m).device, "cuda") == 0, "a model's device is not cuda");
    int copies = 0; /* one on the CPU, one for both names of the first GPU */
    for (const struct device *d = m->devices->first; d != NULL; d = d->next) copies++;
    check(copies == 2, "%d copies of the weights", copies);
    lvm_close(m);
    free(f.data);
}

/* ---- A real model ---- */

static int32_t *encode_on(lvm_ctx *ctx, const lvm_image *images, int n) {
    lvm_error error = {0, ""};
    int32_t *ids = must(calloc((size_t)n * (size_t)ctx->m->T, sizeof *ids));
    check(lvm_encode(ctx, images, n, ids, &error) == LVM_OK, "encoding: %s", error.text);
    return ids;
}

static void decode_beside(lvm_ctx *cpu, lvm_ctx *gpu, const int32_t *ids) {
    lvm_image a, b;
    int most = 0;
    lvm_decode(cpu, ids, 1, &a, NULL);
    lvm_decode(gpu, ids, 1, &b, NULL);
    for (int i = 0; a.rgb != NULL && b.rgb != NULL && i < a.width * a.height * 3; i++)
        most = abs(a.rgb[i] - b.rgb[i]) > most ? abs(a.rgb[i] - b.rgb[i]) : most;
    check(a.rgb != NULL && b.rgb != NULL && most <= 1, "pixels off by %d", most);
    printf("pixels off by at most %d of 255\n", most);
    lvm_image_free(&a);
    lvm_image_free(&b);
}

/* Distributions at up to `most` positions, the fast path beside the CPU's exact one. */
static void distributions_beside(const lvm_model *m, const int32_t *ids, int n) {
    lvm_ctx *exact = context_on(m, "cpu", 1, LVM_F32);
    float *want = logits_of(exact, ids, n, 256);
    for (int way = 0; way < 3; way++) {
        lvm_ctx *gpu = context_on(m, "cuda", way == 0, way == 0 ? LVM_F32 : way == 1 ? LVM_F16
                                                                                    : LVM_Q8_0);
        float *got = logits_of(gpu, ids, n, n);
        double most, kl = divergence(want, got, n, m->llama.V, &most);
        printf("%d positions, %s: KL %.2e, logits off by %.2e\n", n,
               way == 0 ? "exact" : way == 1 ? "cache f16" : "cache q8_0", kl, most);
        check(way == 0 ? most < 5e-4 : kl < 1e-3, "way %d: KL %g, logits off by %g", way, kl, most);
        free(got);
        lvm_ctx_free(gpu);
    }
    free(want);
    lvm_ctx_free(exact);
}

static int beside(const char *weights, char **paths, int n) {
    lvm_error error = {0, ""};
    lvm_model *m = lvm_open(weights, 0, &error);
    lvm_image *images = must(calloc((size_t)n, sizeof *images));
    if (m == NULL) return printf("%s\n", error.text);
    for (int i = 0; i < n; i++)
        check(lvm_image_load(paths[i], &images[i], &error) == LVM_OK, "%s", error.text);
    lvm_ctx *cpu = context_on(m, "cpu", 0, LVM_AUTO), *gpu = context_on(m, "cuda", 0, LVM_AUTO);
    int32_t *a = encode_on(cpu, images, n), *b = encode_on(gpu, images, n);
    int T = m->T, differ = 0;
    for (int i = 0; i < n * T; i++) differ += a[i] != b[i];
    printf("%d images, %d tokens: %d differ\n", n, n * T, differ);
    check(differ * 1000 <= n * T, "%d of %d tokens differ", differ, n * T);
    decode_beside(cpu, gpu, a);
    int most = m->llama.context < n * T ? m->llama.context : n * T;
    if (m->llama.L > 0) distributions_beside(m, a, most < 2000 ? most : 2000);
    lvm_ctx_free(cpu);
    lvm_ctx_free(gpu);
    for (int i = 0; i < n; i++) lvm_image_free(&images[i]);
    free(images);
    free(a);
    free(b);
    lvm_close(m);
    return checked("cuda_beside");
}

/* ---- Time ---- */

/* A shape of bench with the published tokenizer. */
static lvm_model *bench_like(int shape, int type) {
    const struct shape *x = &shape_table[shape];
    struct llama a = {.context = 4352, .bos = -1, .eos = -1, .L = x->L, .D = x->D, .F = x->F,
                      .H = x->H, .G = x->H, .d = x->D / x->H, .V = 8292, .eps = 1e-6f,
                      .theta = 10000};
    const struct wanted_types types = {type, LVM_F16, LVM_AUTO};
    lvm_error error = {0, ""};
    return must(random_model(&a, &published_vq, &types, &error));
}

/* Milliseconds of a forward of n rows, one each of n sequences, behind a prompt of 3840 that they
   share, or that each has for itself. */
static double time_forward(lvm_ctx *ctx, int n, int shared) {
    enum { STEPS = 60 };
    int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    int rows[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct batch b = {.n = n, .tokens = tokens, .seqs = rows, .n_out = n, .out = rows,
                      .logits = ctx->logits};
    for (int i = 1; shared && i < n; i++) ctx->b->kv_copy(ctx->state, 0, i, 3840, NULL);
    double start = 0;
    for (int i = 0; i < STEPS + 10; i++) {
        if (i == 10) start = seconds();
        check(ctx->b->forward(ctx->state, &b, NULL) == LVM_OK, "a forward fails");
    }
    double took = (seconds() - start) / STEPS * 1000;
    for (int i = 0; i < n; i++) ctx->b->kv_trim(ctx->state, i, i == 0 || !shared ? 3840 : 0);
    return took;
}

/* Prompts of 3840 for sequences 1 to n - 1. */
static void feed_others(lvm_ctx *ctx, const int32_t *ids, int n) {
    int *seqs = must(calloc(3840, sizeof *seqs));
    for (int s = 1; s < n; s++) {
        struct batch b = {.n = 3840, .tokens = ids, .seqs = seqs};
        for (int i = 0; i < 3840; i++) seqs[i] = s;
        check(ctx->b->forward(ctx->state, &b, NULL) == LVM_OK, "a prompt fails");
    }
    free(seqs);
}

/* Milliseconds a token of n candidates behind it, sampling included. */
static double time_generate(lvm_ctx *ctx, const int32_t *prompt, int n) {
    enum { STEPS = 100 };
    static int32_t ids[8 * STEPS];
    lvm_error error = {0, ""};
    double start = 0;
    for (int i = 0; i < 3; i++) { /* the first records */
        lvm_prompt(ctx, prompt, 3840, NULL, NULL);
        start = seconds();
        check(lvm_generate(ctx, NULL, n, STEPS, ids, &error) == LVM_OK, "%s", error.text);
    }
    return (seconds() - start) / STEPS * 1000;
}

/* What a token costs without sampling, and with it, for 1 to 8 rows. */
static int times(int most) {
    static const int shapes[] = {1, 3};
    for (int s = 0; s < most; s++) {
        lvm_model *m = bench_like(shapes[s], LVM_Q8_0);
        for (int kv = LVM_F16; kv <= LVM_Q8_0; kv += LVM_Q8_0 - LVM_F16) {
            lvm_ctx *ctx = context_on(m, "cuda", 0, kv);
            int32_t *ids = must(calloc(3840, sizeof *ids));
            random_ids(ids, 3840, 8192);
            lvm_prompt(ctx, ids, 3840, NULL, NULL);
            double start = seconds();
            lvm_prompt(ctx, ids + 1, 3839, NULL, NULL);
            printf("%-5s cache %-4s prefill %6.1f ms; ms a token of 1, 2, 4, 8 sequences:",
                   shapes[s] == 1 ? "300m" : "1b", type_info(kv)->name,
                   (seconds() - start) * 1000);
            for (int n = 1; n <= 8; n *= 2) printf(" %.3f", time_forward(ctx, n, 1));
            printf("; generated:");
            for (int n = 1; n <= 8; n *= 2) printf(" %.3f", time_generate(ctx, ids, n));
            feed_others(ctx, ids, 8);
            double ms = time_forward(ctx, 8, 0);
            printf("; 8 prompts %.3f: %.0f tokens/s\n", ms, 8000 / ms);
            lvm_ctx_free(ctx);
            free(ids);
        }
        lvm_close(m);
    }
    return 0;
}

/* ---- Allocations that fail ----

   The linker sends lvm_cuda.cu's calls here (--wrap, see the Makefile). One that is to fail asks
   for more than there can be, so that CUDA remembers an error as it would. */

enum { OUT_OF_MEMORY = 2 /* cudaErrorMemoryAllocation */ };

static struct {
    int calls, at;   /* so far; the one that fails, 0: none */
    const char *failed;
} allocations;

int __real_cudaMalloc(void **p, size_t size);

static int fails(const char *call) {
    void *p = NULL;
    if (++allocations.calls != allocations.at) return 0;
    allocations.failed = call;
    check(__real_cudaMalloc(&p, (size_t)1 << 60) == OUT_OF_MEMORY, "2^60 bytes are there");
    return 1;
}

#define WRAP(call, parameters, arguments)                                                          \
    int __real_##call parameters;                                                                  \
    int __wrap_##call parameters;                                                                  \
    int __wrap_##call parameters {                                                                 \
        return fails(#call) ? OUT_OF_MEMORY : __real_##call arguments;                             \
    }
WRAP(cudaMalloc, (void **p, size_t size), (p, size))
WRAP(cudaMallocHost, (void **p, size_t size), (p, size))
WRAP(cudaHostAlloc, (void **p, size_t size, unsigned flags), (p, size, flags))
WRAP(cudaHostRegister, (void *p, size_t size, unsigned flags), (p, size, flags))
WRAP(cudaStreamCreate, (void **stream), (stream))
WRAP(cudaStreamCreateWithFlags, (void **stream, unsigned flags), (stream, flags))
WRAP(cudaStreamCreateWithPriority, (void **stream, unsigned flags, int priority),
     (stream, flags, priority))
WRAP(cudaEventCreate, (void **event), (event))
WRAP(cudaEventCreateWithFlags, (void **event, unsigned flags), (event, flags))
WRAP(cudaStreamBeginCapture, (void *stream, int mode), (stream, mode))
WRAP(cudaGraphInstantiate, (void **exec, void *graph, unsigned long long flags),
     (exec, graph, flags))

enum { CHIP_MAJOR = 75, CHIP_SHARED = 97, /* cudaDevAttrComputeCapabilityMajor and ...Optin, */
       DYNAMIC_SHARED = 8 /* cudaFuncAttributeMaxDynamicSharedMemorySize */ };

/* What the device is taken for; 0: what it is. */
static struct {
    int major, shared;
} chip;

int __real_cudaFuncSetAttribute(const void *function, int attribute, int value);
int __wrap_cudaFuncSetAttribute(const void *function, int attribute, int value);
int __wrap_cudaFuncSetAttribute(const void *function, int attribute, int value) {
    check(attribute != DYNAMIC_SHARED || chip.shared == 0 || value <= chip.shared,
          "a block shall have %d bytes of shared memory, where there are %d", value, chip.shared);
    return fails("cudaFuncSetAttribute") ? OUT_OF_MEMORY
                                         : __real_cudaFuncSetAttribute(function, attribute, value);
}

int cudaDeviceReset(void);
int cudaMemGetInfo(size_t *, size_t *);

/* What a context computes: rows many and few, candidates that share pages, images. */
struct short_outcome {
    float logits[CF_V], nll[8];
    int32_t ids[3 * 5], more[4], tokens[CF_IMAGES * CF_T];
    uint8_t pixels[CF_R * CF_R * 3];
};
enum { SHORT_ACTIONS = 6 };

static int short_act(lvm_ctx *ctx, int action, struct short_outcome *o, lvm_error *error) {
    int32_t ids[CF_PROMPT + 8];
    struct cf_outcome images;
    lvm_image out;
    int code = LVM_OK;
    cf_ids(ids, CF_PROMPT + 8, 1);
    switch (action) {
    case 0:
        ctx_reset(ctx); /* or it would know the images */
        code = cf_encode(ctx, &images, error);
        if (code == LVM_OK) memcpy(o->tokens, images.tokens, sizeof o->tokens);
        return code;
    case 1:
        code = lvm_decode(ctx, ids + 1, 1, &out, error);
        if (code == LVM_OK) memcpy(o->pixels, out.rgb, sizeof o->pixels);
        if (code == LVM_OK) lvm_image_free(&out);
        return code;
    case 2: return lvm_prompt(ctx, ids, CF_PROMPT, o->logits, error);
    case 3:
        code = lvm_prompt(ctx, ids, CF_PROMPT, NULL, error);
        return code == LVM_OK ? lvm_score(ctx, ids + CF_PROMPT, 8, o->nll, error) : code;
    case 4:
        code = lvm_prompt(ctx, ids, 100, NULL, error);
        return code == LVM_OK ? lvm_generate(ctx, NULL, 3, 5, o->ids, error) : code;
    default:
        code = lvm_prompt(ctx, ids, 101, NULL, error);
        return code == LVM_OK ? lvm_generate(ctx, NULL, 1, 4, o->more, error) : code;
    }
}

static void check_refused(const lvm_error *error, const char *what) {
    check(error->code == LVM_MEMORY && allocations.failed != NULL &&
              strstr(error->text, allocations.failed) != NULL,
          "%s gives %d: %s", what, error->code, error->text);
}

/* Everything once; where an action fails, once more. */
static void short_all(lvm_ctx *ctx, struct short_outcome *o, int *failures) {
    memset(o, 0, sizeof *o);
    for (int i = 0; i < SHORT_ACTIONS; i++) {
        lvm_error error = {0, ""};
        int code = short_act(ctx, i, o, &error);
        if (code == LVM_OK) continue;
        ++*failures;
        check_refused(&error, "an action");
        check(short_act(ctx, i, o, &error) == LVM_OK, "action %d once more: %s", i, error.text);
    }
}

static lvm_ctx *open_failing(const lvm_model *m, const char *device, int at, lvm_error *error) {
    lvm_options o = lvm_default_options();
    o.threads = 1;
    o.device = device;
    allocations.calls = 0;
    allocations.at = at;
    allocations.failed = NULL;
    return lvm_ctx_new(m, &o, error);
}

/* Opens and uses a model with allocation `at` failing: an error that names the call, and the same
   bytes behind it. Where nobody chose a device the CPU is taken. Returns 1 where nothing failed. */
static int fail_at(const struct model_file *f, int at, const struct short_outcome *want) {
    lvm_model *m = must(lvm_open_memory(f->data, f->size, NULL));
    lvm_error error = {0, ""};
    struct short_outcome got;
    int failures = 0;
    where("allocation %d fails", at);
    lvm_ctx *ctx = open_failing(m, NULL, at, &error);
    check(ctx != NULL, "no context: %s", error.text);
    if (ctx != NULL && ctx->passed_over.code != LVM_OK) {
        lvm_model *other = must(lvm_open_memory(f->data, f->size, NULL));
        check_refused(&ctx->passed_over, "opening");
        check(strcmp(lvm_ctx_info(ctx).device, "cpu") == 0, "that leads to %s",
              lvm_ctx_info(ctx).device);
        lvm_ctx_free(ctx);
        ctx = open_failing(other, "cuda", at, &error); /* chosen, it is an error */
        check(ctx == NULL, "a context all the same");
        check_refused(&error, "opening on a chosen device");
        lvm_ctx_free(ctx);
        lvm_close(other);
        ctx = open_failing(m, "cuda", 0, &error);
        check(ctx != NULL, "no context behind that: %s", error.text);
        allocations.failed = "one of opening";
    }
    if (ctx != NULL) short_all(ctx, &got, &failures);
    if (ctx != NULL && want != NULL)
        check(memcmp(&got, want, sizeof got) == 0, "%s failed, then other bytes",
              allocations.failed);
    check(failures <= 1, "%d failures", failures);
    lvm_ctx_free(ctx);
    lvm_close(m);
    return allocations.failed == NULL;
}

static void test_failing(void) {
    struct model_file f = cf_model(LVM_Q8_0);
    lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
    lvm_ctx *ctx = context_on(m, "cuda", 0, LVM_AUTO);
    struct short_outcome want;
    int failures = 0, at = 1;
    allocations.at = 0;
    short_all(ctx, &want, &failures);
    lvm_ctx_free(ctx);
    lvm_close(m);
    while (at < 1000 && !fail_at(&f, at, &want)) at++;
    allocations.at = 0;
    where("%s", "");
    printf("%d allocations failed, one after the other\n", at - 1);
    check(at > 10 && at < 1000, "%d allocations", at);
    free(f.data);
}

/* ---- Cancelling between groups of images ---- */

/* Copies that were asked for behind the word of a progress function that cancels. */
static struct {
    int cancelled, copies;
} watched;

int __real_cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream);
int __wrap_cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream);
int __wrap_cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
    if (watched.cancelled) watched.copies++;
    return __real_cudaMemcpyAsync(to, from, n, kind, stream);
}

static int cancel_at(void *user, const char *stage, int64_t done, int64_t all) {
    return watched.cancelled = cf_progress(user, stage, done, all);
}

/* n images to tokens and latents or, decoding, tokens to bytes and pixels, one behind the other in
   out; cancelled at call `at` of the progress function. Returns how often that was called. */
static int run_images(lvm_ctx *ctx, int n, int decode, void *in, uint8_t *out, int at, int want) {
    const size_t size = (size_t)n * (decode ? image_bytes(ctx) : (size_t)ctx->m->T * 4);
    float *floats = (float *)(void *)(out + size);
    struct cf_canceller c = {0, at};
    lvm_error error = {0, ""};
    watched.copies = 0;
    lvm_set_progress(ctx, cancel_at, &c);
    int code = decode ? ctx->b->decode(ctx->state, in, n, 0, n, out, floats, &error)
                      : ctx->b->encode(ctx->state, in, n, 0, n, (void *)out, floats, &error);
    watched.cancelled = 0;
    check(code == want, "cancelled at call %d it gives %d: %s", at, code, error.text);
    check(watched.copies == 0, "cancelled at call %d it copies %d maps", at, watched.copies);
    return c.calls;
}

static void cancel_images(lvm_ctx *ctx, int decode) {
    const struct vqgan *vq = ctx->m->vq;
    const int n = ctx->limits.images, steps = decode ? vq->n_ops - vq->n_encoder : vq->n_encoder;
    const size_t pixels = (size_t)n * image_bytes(ctx), tokens = (size_t)n * (size_t)ctx->m->T,
                 size = decode ? 5 * pixels : 4 * tokens * (size_t)(1 + vq->code_dim);
    uint8_t *want = must(calloc(1, size)), *got = must(calloc(1, size));
    uint8_t *in = must(calloc(1, pixels));
    struct rng rng = rng_new(29, 0);
    for (size_t i = 0; i < pixels; i++) in[i] = (uint8_t)rng_next(&rng);
    for (size_t i = 0; decode && i < tokens; i++)
        ((int32_t *)(void *)in)[i] = (int32_t)(rng_next(&rng) % CF_CODES);
    where("%d images, %s", n, decode ? "decoding" : "encoding");
    int calls = run_images(ctx, n, decode, in, want, -1, LVM_OK);
    check(calls > steps, "they are one group");
    for (int at = 0; at < calls; at++) {
        run_images(ctx, n, decode, in, got, at, LVM_CANCELLED);
        memset(got, 0, size);
        run_images(ctx, n, decode, in, got, -1, LVM_OK);
        check(memcmp(want, got, size) == 0, "behind a cancelled call others come");
    }
    where("%s", "");
    free(want);
    free(got);
    free(in);
}

/* Maps so large that not all images have room at once. */
static void test_cancel(void) {
    struct llama none = {.L = 0};
    struct vqgan vq = {.R = 256, .S = 16, .hidden = 64, .z = 32, .codes = CF_CODES, .code_dim = 32,
                       .n_res_blocks = 1, .resample_conv = 1, .n_levels = 5,
                       .mult = {1, 1, 1, 1, 1}};
    struct model_file f = make_model(&none, &vq, LVM_F16, LVM_F16);
    lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
    lvm_ctx *ctx = context_on(m, "cuda", 0, LVM_AUTO);
    cancel_images(ctx, 0);
    cancel_images(ctx, 1);
    lvm_ctx_free(ctx);
    lvm_close(m);
    free(f.data);
}

/* ---- A chip with little shared memory ---- */

int __real_cudaDeviceGetAttribute(int *value, int attribute, int device);
int __wrap_cudaDeviceGetAttribute(int *value, int attribute, int device);
int __wrap_cudaDeviceGetAttribute(int *value, int attribute, int device) {
    int code = __real_cudaDeviceGetAttribute(value, attribute, device);
    if (chip.major > 0 && attribute == CHIP_MAJOR) *value = chip.major;
    if (chip.shared > 0 && attribute == CHIP_SHARED) *value = chip.shared;
    return code;
}

/* The first member tells how much shared memory a kernel declares: none, so that those for wgmma
   seem not to be there. */
int __real_cudaFuncGetAttributes(size_t *shared, const void *function);
int __wrap_cudaFuncGetAttributes(size_t *shared, const void *function);
int __wrap_cudaFuncGetAttributes(size_t *shared, const void *function) {
    int code = __real_cudaFuncGetAttributes(shared, function);
    if (chip.shared > 0) *shared = 0;
    return code;
}

/* Compute capability 8.6: flash attention has no room, so attention is in f32, and GEMM is without
   wgmma. */
static void test_chip(const char *path) {
    chip.major = 8;
    chip.shared = 99 << 10;
    test_shape(&shape_cases[2], LVM_Q8_0, 0, LVM_Q8_0);
    test_shape(&shape_cases[1], LVM_F16, 0, LVM_F16);
    where("a small chip");
    check_backend(lvm_cuda_backend(), "cuda", LVM_Q4_0, LVM_F16, 1e-1, path);
    chip.major = chip.shared = 0;
    where("%s", "");
}

/* ---- Memory ---- */

/* Pages that no sequence has any longer are the context's all the same. */
static void test_usage(void) {
    struct model_file f = cf_model(LVM_Q8_0);
    lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
    lvm_ctx *ctx = context_on(m, "cuda", 0, LVM_Q8_0);
    int32_t ids[CF_PROMPT], out[8 * 2];
    cf_ids(ids, CF_PROMPT, 1);
    lvm_prompt(ctx, ids, CF_PROMPT, NULL, NULL);
    lvm_usage one = lvm_ctx_usage(ctx);
    lvm_generate(ctx, NULL, 8, 2, out, NULL);
    lvm_usage many = lvm_ctx_usage(ctx);
    ctx_reset(ctx);
    lvm_usage none = lvm_ctx_usage(ctx);
    check(one.device < many.device && many.device == none.device && none.cache == 0,
          "%lld bytes on the device, for 8 candidates %lld, behind them %lld, of the cache %lld",
          (long long)one.device, (long long)many.device, (long long)none.device,
          (long long)none.cache);
    lvm_ctx_free(ctx);
    lvm_close(m);
    free(f.data);
}

static double taken(size_t before) {
    size_t now = 0, all = 0;
    check(cudaMemGetInfo(&now, &all) == 0, "cudaMemGetInfo fails");
    return ((double)before - (double)now) / 1e6;
}

/* The device's memory that a context of 1b takes, full, behind images of every number: weights and
   keys and values, and at most a gigabyte. What the driver keeps (code, stacks) comes once. */
static void memory_with(const lvm_model *m, int kv, size_t before) {
    int32_t *ids = must(calloc(4352, sizeof *ids)), out[256 * 2];
    lvm_error error = {0, ""};
    lvm_ctx *ctx = context_on(m, "cuda", 0, kv);
    double opened = taken(before);
    random_ids(ids, 4352, 8192);
    uint8_t *rgb = must(calloc((size_t)ctx->limits.images, image_bytes(ctx)));
    int n = ctx->limits.images;
    check(ctx->b->encode(ctx->state, rgb, n, 0, n, ids, NULL, &error) == LVM_OK, "%s", error.text);
    check(ctx->b->decode(ctx->state, ids, n, 0, n, rgb, NULL, &error) == LVM_OK, "%s", error.text);
    check(lvm_prompt(ctx, ids, 4096, NULL, &error) == LVM_OK, "%s", error.text);
    check(lvm_generate(ctx, NULL, 1, 256, out, &error) == LVM_OK, "%s", error.text);
    lvm_usage u = lvm_ctx_usage(ctx);
    double cache = (double)u.cache / 1e6, weights = (double)u.weights / 1e6,
           device = (double)u.device / 1e6, all = taken(before);
    printf("cache %-4s: weights %.0f MB, cache %.0f; on the device %.0f says lvm; CUDA says %.0f "
           "opened, %.0f full: %.0f beside weights and cache\n", type_info(kv)->name, weights,
           cache, device, opened, all, all - weights - cache);
    check(device - weights - cache <= 1000, "%.0f MB beside weights and cache",
          device - weights - cache);
    check(all <= device + 200, "%.0f MB are taken, lvm says %.0f", all, device);
    lvm_ctx_free(ctx);
    free(ids);
    free(rgb);
}

static int memory(void) {
    struct model_file f = cf_model(LVM_F32);
    lvm_model *tiny = must(lvm_open_memory(f.data, f.size, NULL)), *m = bench_like(3, LVM_Q8_0);
    size_t before = 0, all = 0;
    lvm_ctx *ctx = context_on(tiny, "cuda", 0, LVM_F32); /* so that CUDA's own context is there */
    lvm_ctx_free(ctx);
    lvm_close(tiny);
    check(cudaMemGetInfo(&before, &all) == 0, "cudaMemGetInfo fails");
    memory_with(m, LVM_F16, before);
    memory_with(m, LVM_Q8_0, before);
    lvm_close(m);
    printf("%.0f MB are left behind\n", taken(before));
    check(taken(before) < 200, "closing leaves %.0f MB", taken(before));
    free(f.data);
    return checked("cuda_memory");
}

/* ---- Opening ---- */

static void time_open(const lvm_model *m, const char *name, double upload) {
    const struct backend *b = lvm_cuda_backend();
    lvm_error error = {0, ""};
    printf("%-28s %7.1f MB in", name, (double)m->file.size / 1e6);
    for (int i = 0; i < 4; i++) {
        void *copy = NULL;
        double start = seconds();
        check(b->model_open(m, "cuda", &copy, &error) == LVM_OK, "%s", error.text);
        double took = seconds() - start, rate = (double)m->file.size / took;
        b->model_close(copy);
        printf("%s %.1f ms", i > 0 ? "," : "", took * 1000);
        if (i == 3) printf(": %.1f GB/s, %.0f %% of pinned", rate / 1e9, 100 * rate / upload);
        if (i == 3 && m->file.size > 500000000)
            check(rate > .6 * upload, "%s: %.1f GB/s", name, rate / 1e9);
    }
    printf("\n");
}

/* Files are read once before, so that the page cache holds them, and mapped anew each time. */
static void time_open_file(const char *path, double upload) {
    for (int i = 0; i < 3; i++) {
        lvm_error error = {0, ""};
        lvm_model *m = lvm_open(path, 0, &error);
        check(m != NULL, "%s", error.text);
        if (m != NULL) time_open(m, strrchr(path, '/') != NULL ? strrchr(path, '/') + 1 : path,
                                 upload);
        lvm_close(m);
    }
}

static int open_times(char **paths, int n) {
    lvm_error error = {0, ""};
    struct ceilings peak = {0};
    lvm_model *m = bench_like(3, LVM_Q8_0);
    lvm_ctx *ctx = context_on(m, "cuda", 0, LVM_AUTO);
    double start = seconds();
    check(ctx->b->ceilings(ctx->state, &peak, &error) == LVM_OK, "%s", error.text);
    printf("ceilings in %.2f s: copy %.3f TB/s, read %.3f, pinned copy %.1f GB/s, "
           "f16 %.0f TFLOP/s, f32 %.1f\n", seconds() - start, peak.copy / 1e12, peak.read / 1e12,
           peak.upload / 1e9, peak.f16 / 1e12, peak.f32 / 1e12);
    lvm_ctx_free(ctx);
    time_open(m, "1b in memory", peak.upload);
    FILE *file = fopen(paths[0], "wb");
    check(file != NULL && fwrite(m->file.data, 1, m->file.size, file) == m->file.size,
          "%s cannot be written", paths[0]);
    if (file != NULL) fclose(file);
    lvm_close(m);
    for (int i = 0; i < n; i++) time_open_file(paths[i], peak.upload);
    remove(paths[0]);
    return checked("cuda_open");
}

/* Every call once, in each arithmetic, short. */
static int small(void) {
    static const int types[] = {LVM_F32, LVM_Q8_0, LVM_Q4_0};
    for (int i = 0; i < 3; i++) {
        struct model_file f = cf_model(types[i]);
        lvm_model *m = must(lvm_open_memory(f.data, f.size, NULL));
        lvm_ctx *ctx = context_on(m, "cuda", 0, i == 0 ? LVM_F32 : i == 1 ? LVM_Q8_0 : LVM_F16);
        int32_t ids[CF_PROMPT + 8], out[3 * 5];
        struct cf_outcome o;
        float nll[8];
        lvm_error error = {0, ""};
        cf_ids(ids, CF_PROMPT + 8, 1);
        check(cf_encode(ctx, &o, &error) == LVM_OK, "encode: %s", error.text);
        check(cf_decode(ctx, &o, &error) == LVM_OK, "decode: %s", error.text);
        check(lvm_prompt(ctx, ids, CF_PROMPT, NULL, &error) == LVM_OK, "prompt: %s", error.text);
        check(lvm_score(ctx, ids + CF_PROMPT, 8, nll, &error) == LVM_OK, "score: %s", error.text);
        check(lvm_prompt(ctx, ids, 100, NULL, &error) == LVM_OK, "prompt: %s", error.text);
        check(lvm_generate(ctx, NULL, 3, 5, out, &error) == LVM_OK, "generate: %s", error.text);
        lvm_ctx_free(ctx);
        lvm_close(m);
        free(f.data);
    }
    return checked("cuda_small");
}

int main(int argc, char **argv) {
    if (argc > 3 && strcmp(argv[1], "--beside") == 0) return beside(argv[2], argv + 3, argc - 3);
    if (argc > 1 && strcmp(argv[1], "--small") == 0) return small();
    if (argc > 1 && strcmp(argv[1], "--times") == 0) return times(argc > 2 ? 1 : 2);
    if (argc > 1 && strcmp(argv[1], "--memory") == 0) return memory();
    if (argc > 2 && strcmp(argv[1], "--open") == 0) return open_times(argv + 2, argc - 2);
    int seam = argc > 2 && strcmp(argv[2], "--seam") == 0;
    const char *path = argc > 1 ? argv[1] : "test_cuda.cache";
    const struct backend *b = lvm_cuda_backend();
    lvm_error error = {0, ""};
    if (b->count(&error) == 0) {
        printf("skipped: %s\ncuda: 0 passed, 0 failed, 1 skipped\n", error.text);
        return 0;
    }
    if (!seam) test_failing();
    if (strcmp(path, "--failing") == 0) {
        cudaDeviceReset(); /* or compute-sanitizer does not look for leaks */
        return checked("cuda_failing");
    }
    if (!seam) {
        test_choice();
        test_sampler();
        test_full_window(256);
        test_full_window(512);
        test_cancel();
        test_chip(path);
        test_usage();
        test_shapes();
    }
    static const struct { int type, kv; double off; } runs[] = {
        {LVM_F32, LVM_F32, 1e-4}, {LVM_F16, LVM_F16, 2e-2}, {LVM_BF16, LVM_F16, 2e-2},
        {LVM_Q8_0, LVM_Q8_0, 1e-1}, {LVM_Q4_0, LVM_F16, 1e-1}};
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        where("conformance, %s", type_info(runs[i].type)->name);
        check_backend(b, "cuda", runs[i].type, runs[i].kv, runs[i].off, path);
    }
    return checked("cuda");
}
