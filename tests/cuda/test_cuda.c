/* lvm_cuda.cu on a GPU: the conformance test of the seam; shapes that its kernels must not stumble
   over, beside the CPU's exact arithmetic; rows that come alone and together, byte for byte.

       test_cuda FILE                  a file that may be written
           --small                     one small model once, for compute-sanitizer
       test_cuda FILE --seam           the conformance test alone
       test_cuda --times [300m]        what a token costs, for 1 to 8 sequences, by forwards alone and
                                       by lvm_generate
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
    {"one key head of 16", {.context = 700, .L = 1, .D = 512, .F = 96, .H = 16, .G = 1, .d = 32}}};
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
            int kv = t == 0 ? LVM_F32 : t < 3 ? LVM_F16 : LVM_Q8_0;
            test_shape(&shape_cases[c], types[t], 0, kv);
            if (t > 0 && c < 3) test_shape(&shape_cases[c], types[t], 1, LVM_F32);
        }
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

/* Milliseconds of a forward of n rows, one each of n sequences, behind a prompt of 3840. */
static double time_forward(lvm_ctx *ctx, int n) {
    enum { STEPS = 60 };
    int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    int rows[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct batch b = {.n = n, .tokens = tokens, .seqs = rows, .n_out = n, .out = rows,
                      .logits = ctx->logits};
    for (int i = 1; i < n; i++) ctx->b->kv_copy(ctx->state, 0, i, 3840, NULL);
    double start = 0;
    for (int i = 0; i < STEPS + 10; i++) {
        if (i == 10) start = seconds();
        check(ctx->b->forward(ctx->state, &b, NULL) == LVM_OK, "a forward fails");
    }
    double took = (seconds() - start) / STEPS * 1000;
    for (int i = 0; i < n; i++) ctx->b->kv_trim(ctx->state, i, i == 0 ? 3840 : 0);
    return took;
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
        const struct shape *x = &shape_table[shapes[s]];
        struct llama a = {.context = 4352, .bos = -1, .eos = -1, .L = x->L, .D = x->D, .F = x->F,
                          .H = x->H, .G = x->H, .d = x->D / x->H, .V = 8292, .eps = 1e-6f,
                          .theta = 10000};
        const struct wanted_types types = {LVM_Q8_0, LVM_F16, LVM_AUTO};
        lvm_error error = {0, ""};
        lvm_model *m = must(random_model(&a, &shipped_vq, &types, &error));
        for (int kv = LVM_F16; kv <= LVM_Q8_0; kv += LVM_Q8_0 - LVM_F16) {
            lvm_ctx *ctx = context_on(m, "cuda", 0, kv);
            int32_t *ids = must(calloc(3840, sizeof *ids));
            random_ids(ids, 3840, 8192);
            lvm_prompt(ctx, ids, 3840, NULL, NULL);
            double start = seconds();
            lvm_prompt(ctx, ids + 1, 3839, NULL, NULL);
            printf("%-5s cache %-4s prefill %6.1f ms; ms a token of 1, 2, 4, 8 sequences:", shapes[s] == 1 ? "300m" : "1b",
                   type_info(kv)->name, (seconds() - start) * 1000);
            for (int n = 1; n <= 8; n *= 2) printf(" %.3f", time_forward(ctx, n));
            printf("; generated:");
            for (int n = 1; n <= 8; n *= 2) printf(" %.3f", time_generate(ctx, ids, n));
            printf("\n");
            lvm_ctx_free(ctx);
            free(ids);
        }
        lvm_close(m);
    }
    return 0;
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
    int seam = argc > 2 && strcmp(argv[2], "--seam") == 0;
    const char *path = argc > 1 ? argv[1] : "test_cuda.cache";
    const struct backend *b = lvm_cuda_backend();
    lvm_error error = {0, ""};
    if (b->count(&error) == 0) {
        printf("skipped: %s\ncuda: 0 passed, 0 failed, 1 skipped\n", error.text);
        return 0;
    }
    if (!seam) test_choice(), test_shapes();
    static const struct { int type, kv; double off; } runs[] = {
        {LVM_F32, LVM_F32, 1e-4}, {LVM_F16, LVM_F16, 2e-2}, {LVM_BF16, LVM_F16, 2e-2},
        {LVM_Q8_0, LVM_Q8_0, 1e-1}, {LVM_Q4_0, LVM_F16, 1e-1}};
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        where("conformance, %s", type_info(runs[i].type)->name);
        check_backend(b, "cuda", runs[i].type, runs[i].kv, runs[i].off, path);
    }
    return checked("cuda");
}
