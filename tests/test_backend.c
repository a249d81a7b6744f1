/* The seam for devices (chapter 7): the conformance test of tests/conformance.h, run on the CPU's
   backend and on a deliberately awkward one, which takes 7 rows, 3 sequences and 3 images at a time,
   keeps keys and values in blocks of 512 positions, and samples by itself or leaves that to the host.
   Then every call that it can refuse is refused once, and every allocation fails once: the context
   must be as good as before. Also how a device is chosen, and what older option structs give.

       test_backend FILE      a file that may be written; non-zero when a check fails
           --quick            one type of weights, fewer failures, for sanitizer runs
       test_backend --model FILE    writes a small model, for convert.py to read */
#include <stddef.h>
void *counted_calloc(size_t count, size_t size);
void counted_free(void *p);
#define LVM_CALLOC counted_calloc
#define LVM_FREE counted_free
#define main lvm_main
#include "../lvm.c"
#undef main
#include "check.h"
#include "gguf.h"
#include "conformance.h"

/* ---- Allocations and calls that fail ---- */

static atomic_int alloc_calls, alloc_fails = -1; /* number of the one that fails; -1: none */

void *counted_calloc(size_t count, size_t size) {
    return atomic_fetch_add(&alloc_calls, 1) == atomic_load(&alloc_fails) ? NULL
                                                                         : calloc(count, size);
}

void counted_free(void *p) { free(p); }

static int device_calls, device_fails = -1, copies;

/* 1: this call is refused. */
static int refuse(lvm_error *error) {
    if (device_calls++ != device_fails) return 0;
    fail(error, LVM_MEMORY, "the device is out of memory");
    return 1;
}

/* What the host may not ask of a device. */
static void demand(int ok, const char *what) {
    if (!ok) check(0, "the host asks for what is out of the device's limits: %s", what);
}

/* ---- The awkward backend: the CPU's behind other limits ---- */

enum { AW_ROWS = 7, AW_SEQUENCES = 3, AW_IMAGES = 3, AW_PAGES = 2 /* of a block */ };

struct awkward {
    void *cpu;
    const lvm_model *m;
    const lvm_options *o;
};

struct awkward_copy {
    const lvm_model *m;
    void *cpu;
};

static int aw_model_open(const lvm_model *m, const char *device, void **copy, lvm_error *error) {
    if (strncmp(device, "cpu", 3) != 0 || refuse(error)) return LVM_MEMORY;
    struct awkward_copy *c = calloc(1, sizeof *c);
    c->m = m;
    int code = cpu_backend.model_open(m, "cpu", &c->cpu, error);
    copies += code == LVM_OK;
    *copy = c;
    if (code != LVM_OK) free(c);
    return code;
}

static void aw_model_close(void *copy) {
    struct awkward_copy *c = copy;
    cpu_backend.model_close(c->cpu);
    copies--;
    free(c);
}

static int aw_open(void *copy, const lvm_options *o, void **state, struct limits *limits,
                   lvm_error *error) {
    const struct awkward_copy *c = copy;
    struct awkward *a = calloc(1, sizeof *a);
    if (refuse(error)) {
        free(a);
        return LVM_MEMORY;
    }
    int code = cpu_backend.open(c->cpu, o, &a->cpu, limits, error);
    a->m = c->m;
    a->o = o;
    *limits = (struct limits){AW_IMAGES, AW_ROWS, AW_SEQUENCES, AW_PAGES * KV_BLOCK, CF_CODES};
    *state = a;
    if (code != LVM_OK) *state = NULL, free(a);
    return code;
}

static void aw_close(void *state) {
    struct awkward *a = state;
    cpu_backend.close(a->cpu);
    free(a);
}

static int aw_encode(void *state, const uint8_t *rgb, int n, int first, int all, int32_t *ids,
                     float *latent, lvm_error *error) {
    struct awkward *a = state;
    demand(n >= 1 && n <= AW_IMAGES && first >= 0 && first + n <= all, "images to encode");
    if (refuse(error)) return LVM_MEMORY;
    return cpu_backend.encode(a->cpu, rgb, n, first, all, ids, latent, error);
}

static int aw_decode(void *state, const int32_t *ids, int n, int first, int all, uint8_t *rgb,
                     float *pixels, lvm_error *error) {
    struct awkward *a = state;
    demand(n >= 1 && n <= AW_IMAGES && first >= 0 && first + n <= all, "images to decode");
    if (refuse(error)) return LVM_MEMORY;
    return cpu_backend.decode(a->cpu, ids, n, first, all, rgb, pixels, error);
}

static int aw_forward(void *state, const struct batch *b, lvm_error *error) {
    struct awkward *a = state;
    int ascending = 1, in_range = 1;
    for (int i = 0; i < b->n_out; i++) ascending &= b->out[i] > (i > 0 ? b->out[i - 1] : -1);
    for (int i = 0; i < b->n; i++) in_range &= b->seqs[i] >= 0 && b->seqs[i] < AW_SEQUENCES;
    demand(b->n >= 1 && b->n <= AW_ROWS && b->n_out >= 0 && b->n_out <= b->n, "rows of a batch");
    demand(ascending && (b->n_out == 0 || b->out[b->n_out - 1] < b->n), "rows that are wanted");
    demand(in_range, "sequences of a batch");
    demand(b->n_out == 0 || (b->logits != NULL) != (b->nll != NULL && b->targets != NULL),
           "what is wanted of a batch");
    if (refuse(error)) return LVM_MEMORY;
    return cpu_backend.forward(a->cpu, b, error);
}

/* One sequence after the other, each to its end: not the order of the host's loop. */
static int aw_generate(void *state, struct continuation *c, lvm_error *error) {
    struct awkward *a = state;
    struct choice choices[CF_CODES];
    int V = a->m->llama.V, code = LVM_OK, row = 0;
    demand(c->n >= 1 && c->n_seqs >= 1 && c->n_seqs <= AW_SEQUENCES && c->done + c->n <= c->all,
           "tokens to generate");
    demand(c->sampling->choose == NULL, "tokens that the caller chooses");
    if (refuse(error)) return LVM_MEMORY;
    for (int s = 0; s < c->n_seqs; s++)
        for (int i = 0; code == LVM_OK && i < c->n; i++) {
            int32_t *id = c->ids + s * c->ld + i;
            struct batch b = {.n = 1, .tokens = id - 1, .seqs = &s, .n_out = 1, .out = &row,
                              .logits = c->logits + (int64_t)s * V};
            if (i > 0) code = cpu_backend.forward(a->cpu, &b, error);
            if (code == LVM_OK && s == 0)
                code = report(a->o, "generate", c->done + i, c->all, error);
            if (code == LVM_OK)
                code = check_finite(b.logits, V, "the logits behind generated token", c->done + i,
                                    error);
            if (code != LVM_OK) return code;
            *id = sample(b.logits, c->codes, c->sampling, &c->rng[s], choices);
            if (c->sampling->log_likelihood != NULL)
                c->sampling->log_likelihood[s] -= (double)negative_log_likelihood(b.logits, V, *id);
        }
    return code;
}

static int aw_kv_copy(void *state, int from, int to, int n, lvm_error *error) {
    if (refuse(error)) return LVM_MEMORY;
    return cpu_backend.kv_copy(((struct awkward *)state)->cpu, from, to, n, error);
}

static void aw_kv_trim(void *state, int seq, int n) {
    cpu_backend.kv_trim(((struct awkward *)state)->cpu, seq, n);
}

static size_t aw_kv_size(void *state) {
    return AW_PAGES * cpu_backend.kv_size(((struct awkward *)state)->cpu);
}

static struct kv_cache *aw_cache(void *state) {
    return &((struct cpu *)((struct awkward *)state)->cpu)->lm.kv;
}

static int aw_kv_get(void *state, int seq, int block, void *data, lvm_error *error) {
    struct awkward *a = state;
    size_t size = cpu_backend.kv_size(a->cpu);
    if (refuse(error)) return LVM_MEMORY;
    memset(data, 0, AW_PAGES * size);
    for (int i = 0; i < AW_PAGES; i++) {
        int page = block * AW_PAGES + i;
        if (page < aw_cache(state)->max_pages && aw_cache(state)->seq[seq].pages[page] != NULL)
            cpu_backend.kv_get(a->cpu, seq, page, (uint8_t *)data + (size_t)i * size, error);
    }
    return LVM_OK;
}

static int aw_kv_set(void *state, int seq, int block, const void *data, int n, lvm_error *error) {
    struct awkward *a = state;
    size_t size = cpu_backend.kv_size(a->cpu);
    int code = LVM_OK;
    if (refuse(error)) return LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < AW_PAGES; i++) {
        int page = block * AW_PAGES + i, end = (page + 1) * KV_BLOCK;
        if (page * KV_BLOCK >= n) break;
        code = cpu_backend.kv_set(a->cpu, seq, page, (const uint8_t *)data + (size_t)i * size,
                                  n < end ? n : end, error);
    }
    return code;
}

static void aw_usage(void *state, lvm_usage *usage) {
    cpu_backend.usage(((struct awkward *)state)->cpu, usage);
    usage->device += 12345;
}

static struct backend awkward_backend(int generates) {
    return (struct backend){
        .size = sizeof(struct backend), .version = BACKEND_VERSION, .name = "awkward",
        .model_open = aw_model_open, .model_close = aw_model_close, .open = aw_open,
        .close = aw_close, .encode = aw_encode, .decode = aw_decode, .forward = aw_forward,
        .generate = generates ? aw_generate : NULL, .kv_copy = aw_kv_copy, .kv_trim = aw_kv_trim,
        .kv_size = aw_kv_size, .kv_get = aw_kv_get, .kv_set = aw_kv_set,
        .usage = generates ? aw_usage : NULL};
}

/* ---- Failures ---- */

/* Everything once, with call or allocation number `at` failing; then everything as ever. Returns 1
   when there was no such number any more. */
static int fail_once(const lvm_model *m, const struct backend *b, const char *path, int at,
                     int allocation, const struct cf_outcome *want) {
    struct cf_outcome got;
    lvm_options o = lvm_default_options();
    lvm_error error = {0, ""};
    int code = LVM_OK;
    o.threads = 1;
    device_calls = 0;
    atomic_store(&alloc_calls, 0);
    *(allocation ? &device_calls : &device_fails) = allocation ? 0 : at;
    if (allocation) atomic_store(&alloc_fails, at);
    lvm_ctx *ctx = ctx_new(m, b, &o, &error);
    memset(&got, 0, sizeof got);
    if (ctx == NULL) code = error.code;
    for (int i = 0; code == LVM_OK && i < CF_ACTIONS; i++) {
        code = cf_act(ctx, i, &got, 1, &error);
        if (code == LVM_OK) code = cf_act(ctx, i, &got, 0, &error);
        if (code == LVM_OK && i == CF_PREFILL) code = lvm_cache_save(ctx, path, 270, &error);
        if (code == LVM_OK && i == CF_PREFILL) code = lvm_cache_load(ctx, path, &error);
    }
    int done = code == LVM_OK, made = ctx != NULL;
    device_fails = -1;
    atomic_store(&alloc_fails, -1);
    check(done || (code == LVM_MEMORY && error.code == LVM_MEMORY && error.text[0] != 0),
          "failure %d gives %d: %s", at, code, error.text);
    if (made && cf_all(ctx, &got) == LVM_OK) cf_same(want, &got, "after a failure");
    lvm_ctx_free(ctx);
    remove(path);
    return done;
}

static void test_failures(const struct backend *b, const char *path, int quick) {
    struct cf_outcome want;
    struct model_file f = cf_model(LVM_Q8_0);
    lvm_model *m = lvm_open_memory(f.data, f.size, NULL);
    lvm_options o = lvm_default_options();
    o.threads = 1;
    lvm_ctx *ctx = cf_context(m, &cpu_backend, &o);
    cf_all(ctx, &want);
    lvm_ctx_free(ctx);
    int at = 0;
    while (!fail_once(m, b, path, at, 0, &want)) at += 1 + at / (quick ? 3 : 16);
    check(at > 60, "only %d calls of the device could fail", at);
    for (at = 0; !fail_once(m, b, path, at, 1, &want);) at += 1 + at / (quick ? 4 : 64);
    check(at > 40, "only %d allocations could fail", at);
    lvm_close(m);
    free(f.data);
    check(copies == 0, "%d copies of a model were left on the device", copies);
}

/* ---- Choosing a device; older option structs ---- */

static void test_sharing(const struct backend *b) {
    struct model_file f = cf_model(LVM_F32);
    lvm_model *m = lvm_open_memory(f.data, f.size, NULL);
    lvm_options o = lvm_default_options();
    o.threads = 1;
    lvm_ctx *one = cf_context(m, b, &o), *two = cf_context(m, b, &o);
    check(copies == 1, "two contexts on one device made %d copies", copies);
    o.device = "cpu:1";
    lvm_ctx *other = cf_context(m, b, &o);
    check(copies == 2, "a context on another device did not get its own copy");
    lvm_ctx_free(one);
    lvm_ctx_free(two);
    lvm_ctx_free(other);
    check(copies == 2, "copies went with their contexts");
    lvm_close(m);
    check(copies == 0, "%d copies outlived their model", copies);
    free(f.data);
}

static void expect_device(const lvm_model *m, const char *device, const char *want) {
    lvm_options o = lvm_default_options();
    lvm_error error = {0, ""};
    o.threads = 1;
    o.device = device;
    lvm_ctx *ctx = lvm_ctx_new(m, &o, &error);
    if (want == NULL)
        check(ctx == NULL && error.code == LVM_INVALID && strstr(error.text, "device") != NULL,
              "device %s: %s", device, ctx != NULL ? "a context" : error.text);
    else
        check(ctx != NULL && strcmp(lvm_ctx_info(ctx).device, want) == 0, "device %s: %s",
              device != NULL ? device : "NULL", ctx != NULL ? lvm_ctx_info(ctx).device : error.text);
    lvm_ctx_free(ctx);
}

static void set_device(const char *value) {
#ifdef _WIN32
    _putenv_s("LVM_DEVICE", value);
#else
    setenv("LVM_DEVICE", value, 1);
#endif
}

static void test_devices(void) {
    struct model_file f = cf_model(LVM_F32);
    lvm_model *m = lvm_open_memory(f.data, f.size, NULL);
    set_device("");
    expect_device(m, NULL, "cpu");
    expect_device(m, "", "cpu");
    expect_device(m, "cpu", "cpu");
    expect_device(m, "cpu:7", NULL);
    expect_device(m, "abacus", NULL);
    expect_device(m, "cp", NULL);
    expect_device(m, "a name that is longer than any device's is", NULL);
    set_device("abacus");
    expect_device(m, NULL, NULL);
    expect_device(m, "cpu", "cpu");
    check(strcmp(lvm_model_info(m).device, "abacus") == 0, "a model's device is LVM_DEVICE's");
    set_device("");
    expect_device(m, NULL, "cpu");
    check(strcmp(lvm_model_info(m).device, "cpu") == 0, "a model's device is the best there is");
    lvm_close(m);
    free(f.data);
}

/* Version 0.1's struct ended before `device`; one that is larger than ours is of a newer library. */
static void test_old_options(void) {
    struct model_file f = cf_model(LVM_F32);
    lvm_model *m = lvm_open_memory(f.data, f.size, NULL);
    union {
        lvm_options o;
        char bytes[sizeof(lvm_options) + 16];
    } u;
    const uint32_t old = (uint32_t)offsetof(lvm_options, device);
    const uint32_t sizes[] = {old, (uint32_t)sizeof u.o, old - 1, 4, 0, (uint32_t)sizeof u.o + 8};
    for (int i = 0; i < 6; i++) {
        lvm_error error = {0, ""};
        memset(&u, 0x55, sizeof u); /* what lies behind an older struct must not be looked at */
        u.o = lvm_default_options();
        u.o.size = sizes[i];
        u.o.threads = 1;
        u.o.window = 3;
        if (i == 0) u.o.device = (const char *)(uintptr_t)1;
        lvm_ctx *ctx = lvm_ctx_new(m, &u.o, &error);
        check((ctx != NULL) == (i < 2), "options of %u bytes: %s", sizes[i], error.text);
        if (ctx != NULL)
            check(ctx->o.window == 3 && ctx->o.size == sizeof(lvm_options) &&
                      strcmp(ctx->o.device, "cpu") == 0,
                  "options of %u bytes were not taken as they are", sizes[i]);
        else check(strstr(error.text, "lvm_options.size") != NULL, "%s", error.text);
        lvm_ctx_free(ctx);
    }
    lvm_close(m);
    free(f.data);
}

static int write_model(const char *path) {
    struct model_file f = cf_model(LVM_F32);
    int code = write_file(path, f.data, f.size, NULL);
    free(f.data);
    return code != LVM_OK;
}

int main(int argc, char **argv) {
    if (argc > 2 && strcmp(argv[1], "--model") == 0) return write_model(argv[2]);
    const char *path = argc > 1 ? argv[1] : "test_backend.cache";
    int quick = argc > 2 && strcmp(argv[2], "--quick") == 0;
    static const int types[] = {LVM_F32, LVM_BF16, LVM_Q8_0},
                     kv_types[] = {LVM_F32, LVM_F16, LVM_Q8_0};
    struct backend host = awkward_backend(0), own = awkward_backend(1);
    for (int i = quick ? 2 : 0; i < 3; i++) {
        check_backend(&cpu_backend, "cpu", types[i], kv_types[i], 0, path);
        check_backend(&host, "cpu", types[i], kv_types[i], 0, path);
        check_backend(&own, "cpu", types[i], kv_types[i], 0, path);
    }
    test_failures(&host, path, quick);
    test_failures(&own, path, quick);
    test_sharing(&host);
    test_devices();
    test_old_options();
    return checked("backend");
}
