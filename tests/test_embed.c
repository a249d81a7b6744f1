/* What a program that embeds lvm relies on: several models, contexts and threads at once; a run
   that is cancelled at any moment; memory or threads that run out at any call; arguments that
   cannot be right. Each time the answer must be an error code with words, nothing may leak, and
   the same objects must then give the same bytes as ever.

       test_embed BOTH LLAMA IMAGES    weights of tests/golden (both, llama_tied); tests/images
           --quick                     fewer moments of cancelling, for sanitizer runs
           --threads-only              the threaded part, for -fsanitize=thread */
#include <stddef.h>
void *counted_calloc(size_t count, size_t size);
void counted_free(void *p);
#define LVM_NO_MAIN
#define LVM_CALLOC counted_calloc
#define LVM_FREE counted_free
#define pthread_create counted_pthread_create
#include "../lvm.c"
#undef pthread_create
#include "check.h"
int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *), void *arg);
#ifndef _WIN32
#include <sys/wait.h>
#endif
#ifdef _WIN32
static char *mkdtemp(char *name) { return _mktemp(name) && _mkdir(name) == 0 ? name : NULL; }
#endif

enum { T = 64, CODES = 256, SIDE = 32, BOS = 256, MANY = 300 }; /* of BOTH; MANY: ids for LLAMA */

static int step = 1; /* every so many moments of a run are tried */

/* ---- Memory and threads that run out ---- */

/* Call number fail_at fails, and all after it when `all` is set; -1: none. */
static atomic_llong live_bytes; /* asked for, only added to */
static atomic_int calls, fail_at = -1, fail_all, live, thread_calls, fail_thread_at = -1;

static void fail_from(int at, int all) {
    atomic_store(&calls, 0);
    atomic_store(&fail_all, all);
    atomic_store(&fail_at, at);
}

void *counted_calloc(size_t count, size_t size) {
    int at = atomic_load(&fail_at), call = atomic_fetch_add(&calls, 1);
    if (at >= 0 && (call == at || (call > at && atomic_load(&fail_all)))) return NULL;
    void *p = calloc(count, size);
    if (p == NULL) abort();
    atomic_fetch_add(&live, 1);
    atomic_fetch_add(&live_bytes, (long long)(count * size));
    return p;
}

void counted_free(void *p) {
    if (p != NULL) atomic_fetch_sub(&live, 1);
    free(p);
}

int counted_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
                           void *arg) {
    if (atomic_fetch_add(&thread_calls, 1) == atomic_load(&fail_thread_at)) return EAGAIN;
    return pthread_create(thread, attr, run, arg);
}

/* The lowest free descriptor: it rises when a file stays open. */
static int free_descriptor(void) {
    int fd = dup(0);
    close(fd);
    return fd;
}

/* ---- The work whose failures are looked at ---- */

/* What the jobs work with. Each writes what it computed into hash. */
struct world {
    const char *both, *llama, *images; /* paths */
    char folder[128];         /* for what is written */
    lvm_model *m, *lm;
    lvm_ctx *ctx;
    uint8_t rgb[2][3 * 40 * 36];
    lvm_image image[2];
    void *file;               /* BOTH in memory */
    size_t file_size;
    uint8_t tok[1024];        /* a .tok file */
    size_t tok_size;
    uint64_t hash;
};

/* FNV-1a */
static uint64_t hash_of(uint64_t hash, const void *data, size_t n) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    return hash;
}

static void note(struct world *w, const void *data, size_t n) {
    w->hash = hash_of(w->hash, data, n);
}

static void note_image(struct world *w, lvm_image *image) {
    note(w, &image->width, sizeof image->width);
    note(w, image->rgb, 3 * (size_t)image->width * (size_t)image->height);
    lvm_image_free(image);
}

/* What was made of images; a call that failed must have left them empty. */
static int note_images(struct world *w, lvm_image *out, int n, int code) {
    int made = 0;
    for (int i = 0; i < n; i++) {
        made += out[i].rgb != NULL;
        note_image(w, &out[i]);
    }
    return made == (code == LVM_OK ? n : 0) ? code : -1;
}

static void fill_ids(int32_t *ids, int n) {
    struct rng rng = rng_new(5, 0);
    for (int i = 0; i < n; i++) ids[i] = (int32_t)(rng_next(&rng) % CODES);
}

static const char *in_folder(const struct world *w, const char *name) {
    static _Thread_local char path[160];
    snprintf(path, sizeof path, "%s/%s", w->folder, name);
    return path;
}

static lvm_ctx *new_context(const lvm_model *m, int threads, lvm_error *error) {
    lvm_options o = lvm_default_options();
    o.threads = threads;
    return lvm_ctx_new(m, &o, error);
}

/* Calls that return NULL have their code in error alone. */
static int code_of(const void *made, const lvm_error *error) {
    return made != NULL ? LVM_OK : error != NULL ? error->code : LVM_MEMORY;
}

static int note_model(struct world *w, lvm_model *m, const lvm_error *error) {
    lvm_info info = lvm_model_info(m);
    note(w, &info.parameters, sizeof info.parameters);
    lvm_close(m);
    return code_of(m, error);
}

static int job_open(struct world *w, lvm_error *error) {
    return note_model(w, lvm_open(w->both, 0, error), error);
}

static int job_open_read(struct world *w, lvm_error *error) {
    return note_model(w, lvm_open(w->both, LVM_NO_MMAP, error), error);
}

static int job_open_memory(struct world *w, lvm_error *error) {
    return note_model(w, lvm_open_memory(w->file, w->file_size, error), error);
}

static int job_new(struct world *w, lvm_error *error) {
    lvm_ctx *ctx = new_context(w->m, 3, error);
    lvm_ctx_free(ctx);
    return code_of(ctx, error);
}

static int job_encode(struct world *w, lvm_error *error) {
    int32_t ids[2 * T];
    int code = lvm_encode(w->ctx, w->image, 2, ids, error);
    if (code == LVM_OK) note(w, ids, sizeof ids);
    return code;
}

static int job_decode(struct world *w, lvm_error *error) {
    int32_t ids[2 * T];
    lvm_image out[2];
    fill_ids(ids, 2 * T);
    return note_images(w, out, 2, lvm_decode(w->ctx, ids, 2, out, error));
}

/* The context is a fresh one of LLAMA in the next three; its prompt takes two pages. */
static int job_prompt(struct world *w, lvm_error *error) {
    int32_t ids[MANY];
    float logits[1024];
    fill_ids(ids, MANY);
    int code = lvm_prompt(w->ctx, ids, MANY, logits, error);
    if (code == LVM_OK) note(w, logits, (size_t)w->lm->llama.V * sizeof *logits);
    return code;
}

static int job_score(struct world *w, lvm_error *error) {
    int32_t ids[MANY];
    float nll[MANY];
    fill_ids(ids, MANY);
    int code = lvm_prompt(w->ctx, ids, 250, NULL, error);
    if (code == LVM_OK) code = lvm_score(w->ctx, ids + 250, MANY - 250, nll, error);
    if (code == LVM_OK) note(w, nll, (MANY - 250) * sizeof *nll);
    return code;
}

static int job_generate(struct world *w, lvm_error *error) {
    int32_t ids[MANY], out[3][20];
    fill_ids(ids, MANY);
    int code = lvm_prompt(w->ctx, ids, 250, NULL, error);
    if (code == LVM_OK) code = lvm_generate(w->ctx, NULL, 3, 20, out[0], error);
    if (code == LVM_OK) note(w, out, sizeof out);
    return code;
}

static int job_predict(struct world *w, lvm_error *error) {
    lvm_image out[2];
    return note_images(w, out, 2, lvm_predict(w->ctx, w->image, 2, NULL, 2, 1, out, error));
}

static int job_load(struct world *w, lvm_error *error) {
    lvm_image image;
    return note_images(w, &image, 1, lvm_image_load(in_folder(w, "a.png"), &image, error));
}

/* Every reader of images. */
static int job_load_kinds(struct world *w, lvm_error *error) {
    static const char *const names[] = {"interlaced.png", "palette_mixed.png", "cmyk.jpg",
                                        "cmyk_prog.jpg", "s420_17x9.jpg", "raw_100.ppm"};
    int code = LVM_OK;
    for (size_t i = 0; code == LVM_OK && i < sizeof names / sizeof *names; i++) {
        char path[256];
        lvm_image image;
        snprintf(path, sizeof path, "%s/%s", w->images, names[i]);
        code = lvm_image_load(path, &image, error);
        code = note_images(w, &image, 1, code);
    }
    return code;
}

static int job_save(struct world *w, lvm_error *error) {
    int code = lvm_image_save(in_folder(w, "b.png"), &w->image[0], error);
    if (code == LVM_OK) remove(in_folder(w, "b.png"));
    return code;
}

static int job_save_memory(struct world *w, lvm_error *error) {
    uint8_t *png = NULL;
    size_t size = 0;
    int code = lvm_image_save_memory(&w->image[0], &png, &size, error);
    if (code == LVM_OK) note(w, png, size);
    lvm_memory_free(png);
    return code;
}

static int job_resize(struct world *w, lvm_error *error) {
    static const int side[4][2] = {{50, 20}, {60, 36}, {40, 72}, {40, 36}}; /* both, one, none */
    lvm_image out;
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && i < 4; i++) {
        code = lvm_image_resize(&w->image[0], side[i][0], side[i][1], &out, error);
        code = note_images(w, &out, 1, code);
    }
    return code;
}

/* Turned on its side, from an image of its own. */
static int job_upright(struct world *w, lvm_error *error) {
    lvm_image image = {0};
    int code = lvm_image_resize(&w->image[0], 20, 10, &image, error);
    image.orientation = 6;
    if (code == LVM_OK) code = lvm_image_upright(&image, error);
    note_image(w, &image);
    return code;
}

/* A context's state into a file and back. */
static int job_cache(struct world *w, lvm_error *error) {
    int32_t ids[MANY];
    float logits[1024];
    const char *path = in_folder(w, "cache");
    fill_ids(ids, MANY);
    int code = lvm_prompt(w->ctx, ids, MANY, NULL, error);
    if (code == LVM_OK) code = lvm_cache_save(w->ctx, path, MANY, error);
    if (code == LVM_OK) code = lvm_cache_load(w->ctx, path, error);
    if (code == LVM_OK) code = lvm_prompt(w->ctx, ids, MANY, logits, error);
    if (code == LVM_OK) note(w, logits, (size_t)w->lm->llama.V * sizeof *logits);
    remove(path);
    return code;
}

static int job_quantize(struct world *w, lvm_error *error) {
    int code = lvm_quantize(w->both, in_folder(w, "q.bin"), LVM_Q8_0, LVM_Q8_0, LVM_AUTO, 0, error);
    if (code == LVM_OK) remove(in_folder(w, "q.bin"));
    return code;
}

/* ---- Training ---- */

enum { SENTENCES = 4, SENTENCE = 21 };

/* Sentences of ids below 40, as chapter 8 describes the file. */
static void make_tok(struct world *w) {
    struct tok_foot foot = {.n_sentences = SENTENCES, .n_tokens = SENTENCES * SENTENCE, .bound = 40};
    struct rng rng = rng_new(8, 0);
    uint32_t version = TOK_VERSION;
    size_t at = TOK_ALIGN;
    memcpy(w->tok, tok_magic, TOK_MAGIC);
    memcpy(w->tok + TOK_MAGIC, &version, sizeof version);
    memcpy(foot.magic, tok_magic, TOK_MAGIC);
    for (int i = 0; i < SENTENCES * SENTENCE; i++, at += 2)
        w->tok[at] = (uint8_t)(rng_next(&rng) % 40);
    at = (size_t)round_up((int)at, TOK_ALIGN);
    for (uint64_t i = 0; i <= SENTENCES; i++, at += 8)
        memcpy(w->tok + at, &(uint64_t){i * SENTENCE}, 8);
    at = (size_t)round_up((int)at, TOK_ALIGN);
    memcpy(w->tok + at, &foot, sizeof foot);
    w->tok_size = at + sizeof foot;
    must(w->tok_size <= sizeof w->tok ? w : NULL);
}

static lvm_train_options small_training(const lvm_tokens *const *tokens) {
    lvm_train_options o = lvm_default_train_options();
    o.layers = 1, o.width = 16, o.heads = 2, o.kv_heads = 1, o.feed_forward = 24;
    o.vocab = 300, o.bos = 256, o.eos = 257;
    o.context = 8, o.batch = 2, o.steps = 4, o.warmup = 1, o.threads = 1;
    o.data = tokens, o.n_data = 1;
    return o;
}

/* Two steps, and what other data lose. */
static int train_a_little(struct world *w, lvm_trainer *t, const lvm_tokens *tokens,
                          lvm_error *error) {
    lvm_train_report report;
    double loss = 0;
    int64_t n = 0;
    int code = t == NULL ? code_of(t, error) : LVM_OK;
    for (int i = 0; code == LVM_OK && i < 2; i++) {
        code = lvm_trainer_step(t, &report, error);
        if (code == LVM_OK) note(w, &report, sizeof report);
    }
    if (code == LVM_OK) code = lvm_trainer_eval(t, tokens, 0, &loss, &n, error);
    if (code == LVM_OK) note(w, &loss, sizeof loss);
    return code;
}

/* A model from nothing; its checkpoint goes into another trainer, its weights into a file. */
static int job_train(struct world *w, lvm_error *error) {
    lvm_error own = {0, ""};
    if (error == NULL) error = &own;
    const char *path = in_folder(w, "t.ckpt");
    lvm_tokens *tokens = lvm_tokens_open_memory(w->tok, w->tok_size, "t.tok", error);
    if (tokens == NULL) return error->code;
    lvm_train_options o = small_training((const lvm_tokens *const *)&tokens);
    lvm_trainer *t = lvm_trainer_new(&o, error), *other = NULL;
    int code = train_a_little(w, t, tokens, error);
    if (code == LVM_OK) code = lvm_trainer_save(t, path, "a note", error);
    if (code == LVM_OK && (other = lvm_trainer_new(&o, error)) == NULL) code = error->code;
    if (code == LVM_OK) code = lvm_trainer_load(other, path, error);
    if (code == LVM_OK) code = train_a_little(w, other, tokens, error);
    if (code == LVM_OK) code = lvm_trainer_export(t, path, LVM_AUTO, w->m, error);
    lvm_trainer_free(t);
    lvm_trainer_free(other);
    lvm_tokens_close(tokens);
    remove(path);
    return code;
}

/* Adapters of LLAMA, into a file and onto the model. */
static int job_adapters(struct world *w, lvm_error *error) {
    lvm_error own = {0, ""};
    if (error == NULL) error = &own;
    const char *path = in_folder(w, "t.bin");
    lvm_tokens *tokens = lvm_tokens_open_memory(w->tok, w->tok_size, NULL, error);
    lvm_model *m = tokens != NULL ? lvm_open(w->llama, 0, error) : NULL;
    int code = m == NULL ? error->code : LVM_OK;
    lvm_train_options o = small_training((const lvm_tokens *const *)&tokens);
    o.init = m;
    o.lora_rank = 2;
    lvm_trainer *t = m != NULL ? lvm_trainer_new(&o, error) : NULL;
    if (code == LVM_OK) code = train_a_little(w, t, tokens, error);
    if (code == LVM_OK) code = lvm_trainer_export(t, path, LVM_AUTO, NULL, error);
    lvm_trainer_free(t);
    if (code == LVM_OK) code = lvm_apply_lora(m, path, error);
    if (code == LVM_OK) note(w, m->llama.layers[0].q.data, 64);
    lvm_close(m);
    lvm_tokens_close(tokens);
    remove(path);
    return code;
}

struct job {
    const char *name;
    int (*run)(struct world *w, lvm_error *error);
    int uses;           /* 'b', 'l': a context of BOTH or LLAMA; 0: none */
    int least;          /* allocations that it makes at least, from a fresh context on */
};

static const struct job jobs[] = {
    {"open", job_open, 0, 8},         {"open without mapping", job_open_read, 0, 8},
    {"open in memory", job_open_memory, 0, 8}, {"new", job_new, 0, 50},
    {"encode", job_encode, 'b', 4},   {"decode", job_decode, 'b', 2},
    {"prefill", job_prompt, 'l', 4},   {"score", job_score, 'l', 4},
    {"generate", job_generate, 'l', 8}, {"predict", job_predict, 'b', 10},
    {"image load", job_load, 0, 4},   {"images load", job_load_kinds, 0, 25},
    {"image save", job_save, 0, 5},
    {"image save to memory", job_save_memory, 0, 5},
    {"resize", job_resize, 0, 10},    {"upright", job_upright, 0, 6},
    {"cache", job_cache, 'l', 10},    {"quantize", job_quantize, 0, 10},
    {"train", job_train, 0, 100},     {"adapters", job_adapters, 0, 60}};
enum { N_JOBS = sizeof jobs / sizeof *jobs };

static void prepare(struct world *w, const struct job *job) {
    if (job->uses == 0) return;
    lvm_ctx_free(w->ctx);
    w->ctx = must(new_context(job->uses == 'b' ? w->m : w->lm, 1, NULL));
}

/* Runs a job and gives its hash; *code is what it returned. */
static uint64_t run_job(struct world *w, const struct job *job, int *code, lvm_error *error) {
    w->hash = 14695981039346656037u;
    *code = job->run(w, error);
    return w->hash;
}

/* One allocation fails, or all from it on; then the same objects do the job again. Jobs that take
   longer are tried both ways by turns. */
static void fail_job_at(struct world *w, const struct job *job, int at, int all, uint64_t want) {
    lvm_error error = {0, ""};
    int code = LVM_OK, before = 0, fd = free_descriptor();
    prepare(w, job);
    before = atomic_load(&live);
    fail_from(at, all);
    run_job(w, job, &code, all ? NULL : &error);
    fail_from(-1, 0);
    check(code == LVM_MEMORY, "%s, allocation %d fails: code %d", job->name, at, code);
    check(all || (error.code == LVM_MEMORY && error.text[0] != 0),
          "%s, allocation %d fails: error %d \"%s\"", job->name, at, error.code, error.text);
    check(job->uses != 0 || atomic_load(&live) == before,
          "%s, allocation %d fails: %d blocks are left", job->name, at,
          atomic_load(&live) - before);
    check(free_descriptor() == fd, "%s, allocation %d fails: a file stays open", job->name, at);
    uint64_t got = run_job(w, job, &code, &error);
    check(code == LVM_OK && got == want, "%s after a failed allocation %d: code %d, %s",
          job->name, at, code, got == want ? "the same" : "another result");
}

enum { LONG_JOB = 100 }; /* allocations */

static void test_allocations(struct world *w) {
    for (int i = 0; i < N_JOBS; i++) {
        const struct job *job = &jobs[i];
        int code = LVM_OK;
        prepare(w, job);
        fail_from(-1, 0);
        uint64_t want = run_job(w, job, &code, NULL);
        int n = atomic_load(&calls);
        check(code == LVM_OK && n >= job->least, "%s: code %d, %d allocations", job->name, code, n);
        int long_one = n > LONG_JOB, every = long_one ? step : 1; /* with --quick not every place */
        for (int at = 0; at < n; at += every)
            for (int all = 0; all < 2; all++)
                if ((job->uses == 0 && (!long_one || step == 1)) || at % 2 == all)
                    fail_job_at(w, job, at, all, want);
    }
}

static void test_thread_starts(struct world *w) {
    enum { THREADS = 5 };
    for (int at = 0; at < THREADS; at++) {
        lvm_error error = {0, ""};
        int before = atomic_load(&live);
        atomic_store(&thread_calls, 0);
        atomic_store(&fail_thread_at, at);
        lvm_ctx *ctx = new_context(w->m, THREADS, at % 2 ? NULL : &error);
        atomic_store(&fail_thread_at, -1);
        if (at == THREADS - 1) { /* the caller is one of five, so four are started */
            check(ctx != NULL && atomic_load(&thread_calls) == at, "five threads do not start");
            lvm_ctx_free(ctx);
            continue;
        }
        check(ctx == NULL, "thread %d does not start, the context does", at);
        check(at % 2 || (error.code == LVM_MEMORY && error.text[0] != 0),
              "thread %d does not start: %d \"%s\"", at, error.code, error.text);
        check(atomic_load(&live) == before, "thread %d does not start: a leak", at);
    }
}

/* ---- Cancelling ---- */

struct canceller {
    atomic_int calls, at; /* says stop from call number `at` on; -1: never */
    int stages;           /* bits of the stages that were seen */
};

static const char *const stage_names[] = {"encode", "prefill", "generate", "score", "decode",
                                          "layers"};
enum { N_STAGES = sizeof stage_names / sizeof *stage_names };

static int on_step(void *user, const char *stage, int64_t done, int64_t all) {
    struct canceller *c = user;
    int at = atomic_load(&c->at), call = atomic_fetch_add(&c->calls, 1);
    for (int i = 0; i < N_STAGES; i++)
        if (strcmp(stage, stage_names[i]) == 0 && done >= 0 && done <= all) c->stages |= 1 << i;
    return at >= 0 && call >= at;
}

static void cancel_at(struct canceller *c, int at) {
    atomic_store(&c->calls, 0);
    atomic_store(&c->at, at);
}

static lvm_ctx *cancellable(const lvm_model *m, struct canceller *c) {
    lvm_options o = lvm_default_options();
    o.threads = 1;
    o.user = c;
    o.progress = on_step;
    return must(lvm_ctx_new(m, &o, NULL));
}

/* Everything at once, so that each stage is met: images to images, then likelihoods. */
static int job_all(struct world *w, lvm_error *error) {
    int32_t ids[T];
    float nll[T];
    lvm_image out;
    fill_ids(ids, T);
    int code = lvm_predict(w->ctx, w->image, 2, NULL, 1, 1, &out, error);
    code = note_images(w, &out, 1, code);
    if (code == LVM_OK) code = lvm_score(w->ctx, ids, T, nll, error);
    if (code == LVM_OK) note(w, nll, sizeof nll);
    return code;
}

static void test_cancel(struct world *w) {
    static const struct job job = {"predict and score", job_all, 'b', 0};
    struct canceller c = {.at = -1};
    lvm_error error = {0, ""};
    lvm_ctx *kept = w->ctx;
    int code = LVM_OK;
    w->ctx = cancellable(w->m, &c);
    uint64_t want = run_job(w, &job, &code, NULL);
    int n = atomic_load(&c.calls);
    check(code == LVM_OK && n > T, "%s: code %d, %d progress calls", job.name, code, n);
    check(c.stages == (1 << N_STAGES) - 1, "%s: stages seen: %x", job.name, (unsigned)c.stages);
    for (int at = 0; at < n; at += step) {
        lvm_ctx_free(w->ctx); /* a fresh one, which remembers no images */
        w->ctx = cancellable(w->m, &c);
        cancel_at(&c, at);
        run_job(w, &job, &code, at % 2 ? NULL : &error);
        check(code == LVM_CANCELLED, "%s cancelled at call %d: code %d", job.name, at, code);
        check(at % 2 || (error.code == LVM_CANCELLED && strstr(error.text, "cancelled") != NULL),
              "%s cancelled at call %d: \"%s\"", job.name, at, error.text);
        cancel_at(&c, -1);
        uint64_t got = run_job(w, &job, &code, NULL);
        check(code == LVM_OK && got == want, "%s after being cancelled at call %d: code %d, %s",
              job.name, at, code, got == want ? "the same" : "another result");
    }
    lvm_ctx_free(w->ctx);
    w->ctx = kept;
}

static int on_train(void *user, const char *stage, int64_t done, int64_t all) {
    struct canceller *c = user;
    int at = atomic_load(&c->at), call = atomic_fetch_add(&c->calls, 1);
    check((strcmp(stage, "train") == 0 || strcmp(stage, "eval") == 0) && done >= 0 && done <= all,
          "training is at %s, %lld of %lld", stage, (long long)done, (long long)all);
    return at >= 0 && call >= at;
}

/* A step or an evaluation that was stopped has not been: the next ones are what they would be. */
static void test_cancel_training(struct world *w) {
    enum { STEP_CALLS = 3 }; /* a step of one layer has two, so the last of them is the next call's */
    struct canceller c = {.at = -1};
    lvm_tokens *tokens = must(lvm_tokens_open_memory(w->tok, w->tok_size, NULL, NULL));
    lvm_train_options o = small_training((const lvm_tokens *const *)&tokens);
    lvm_train_report report;
    double loss = 0;
    int64_t n_tokens = 0;
    o.user = &c;
    o.progress = on_train;
    lvm_trainer *t = must(lvm_trainer_new(&o, NULL));
    w->hash = 0;
    check(train_a_little(w, t, tokens, NULL) == LVM_OK, "training fails");
    uint64_t want = w->hash;
    lvm_trainer_free(t);
    int n = atomic_load(&c.calls);
    check(n > 8, "training reports %d times", n);
    for (int at = 0; at < n; at++) {
        t = must(lvm_trainer_new(&o, NULL));
        cancel_at(&c, at % STEP_CALLS);
        int step_code = lvm_trainer_step(t, &report, NULL);
        cancel_at(&c, at % 2);
        int code = lvm_trainer_eval(t, tokens, 0, &loss, &n_tokens, NULL);
        cancel_at(&c, -1);
        check(code == LVM_CANCELLED, "an evaluation cancelled at call %d: code %d", at % 2, code);
        check(step_code == LVM_CANCELLED || at % STEP_CALLS == STEP_CALLS - 1, "a step cancelled at call %d: code %d",
              at % STEP_CALLS, step_code);
        w->hash = 0;
        if (step_code == LVM_CANCELLED)
            check(train_a_little(w, t, tokens, NULL) == LVM_OK && w->hash == want,
                  "a step after one that was cancelled at call %d is another", at % STEP_CALLS);
        lvm_trainer_free(t);
    }
    lvm_tokens_close(tokens);
}

/* A prompt that was cancelled is the context's prompt all the same: the rest of it is read when it
   is needed. */
static void test_prompt_again(struct world *w) {
    struct canceller c = {.at = -1};
    int32_t ids[MANY];
    float want[2], got[2];
    lvm_ctx *ctx = cancellable(w->lm, &c);
    fill_ids(ids, MANY);
    int read = lvm_prompt(ctx, ids, MANY, NULL, NULL), n = atomic_load(&c.calls);
    check(read == LVM_OK && n > 2 && lvm_score(ctx, ids, 2, want, NULL) == LVM_OK,
          "a prompt and its scores: code %d, %d progress calls", read, n);
    for (int at = 0; at < n; at++) {
        lvm_prompt(ctx, ids + 1, 20, NULL, NULL);
        cancel_at(&c, at);
        int code = lvm_prompt(ctx, ids, MANY, NULL, NULL);
        cancel_at(&c, -1);
        check(code == LVM_CANCELLED && lvm_score(ctx, ids, 2, got, NULL) == LVM_OK &&
                     memcmp(want, got, sizeof want) == 0,
              "a prompt cancelled at call %d: code %d, or other scores behind it", at, code);
    }
    lvm_ctx_free(ctx);
}

/* A generation that was cancelled, or had no memory, left the context at its prompt: it may simply
   be asked for again. The second prompt is so long that the window slides. */
static void test_generate_again(struct world *w) {
    struct canceller c = {.at = -1};
    int32_t ids[1 + 4 * T], want[2][T], got[2][T];
    float likely[2], again[2];
    lvm_ctx *ctx = cancellable(w->m, &c);
    fill_ids(ids, 1 + 4 * T);
    ids[0] = BOS;
    for (int n = 1 + T; n < 1 + 4 * T; n += 3 * T - 10) {
        lvm_prompt(ctx, ids, n, NULL, NULL);
        lvm_score(ctx, ids + 1, 2, likely, NULL);
        lvm_prompt(ctx, ids, n, NULL, NULL);
        cancel_at(&c, -1);
        check(lvm_generate(ctx, NULL, 2, T, want[0], NULL) == LVM_OK, "generating fails");
        int steps = atomic_load(&c.calls);
        for (int at = 0; at < steps + 4;
             at += at < steps ? (int)min64(3 * step, steps - at) : 1) {
            cancel_at(&c, -1);
            lvm_prompt(ctx, ids, n, NULL, NULL);
            cancel_at(&c, at);
            if (at >= steps) fail_from(at - steps, 0);
            int code = lvm_generate(ctx, NULL, 2, T, got[0], NULL);
            fail_from(-1, 0);
            cancel_at(&c, -1);
            check(code == (at < steps ? LVM_CANCELLED : LVM_MEMORY), "step %d: %d", at, code);
            memset(got, 0, sizeof got);
            check(lvm_score(ctx, ids + 1, 2, again, NULL) == LVM_OK &&
                         memcmp(likely, again, sizeof likely) == 0,
                  "prompt of %d, stopped at step %d: other scores", n, at);
            check(lvm_generate(ctx, NULL, 2, T, got[0], NULL) == LVM_OK &&
                         memcmp(want, got, sizeof want) == 0,
                  "prompt of %d, stopped at step %d: other tokens", n, at);
        }
    }
    lvm_ctx_free(ctx);
}

/* ---- Several models, contexts and threads ---- */

struct user {
    struct world w;
    const struct job *job;
    lvm_model *m;
    int threads, code;
    uint64_t hash;
};

static void *use(void *arg) {
    struct user *u = arg;
    u->w.ctx = must(new_context(u->m, u->threads, NULL));
    u->hash = run_job(&u->w, u->job, &u->code, NULL);
    lvm_ctx_free(u->w.ctx);
    return NULL;
}

/* Two users of BOTH and two of LLAMA, one after the other and then all at once. */
static void test_threads(const struct world *w) {
    static const struct job predict = {"predict", job_predict, 'b', 0},
                            generate = {"generate", job_generate, 'l', 0};
    enum { USERS = 4 };
    static struct user alone[USERS], together[USERS];
    pthread_t thread[USERS];
    for (int i = 0; i < USERS; i++) {
        alone[i] = (struct user){.w = *w, .job = i < 2 ? &predict : &generate,
                                 .m = i < 2 ? w->m : w->lm, .threads = 1 + i % 2};
        together[i] = alone[i];
        use(&alone[i]);
    }
    for (int i = 0; i < USERS; i++)
        if (pthread_create(&thread[i], NULL, use, &together[i]) != 0) abort();
    for (int i = 0; i < USERS; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < USERS; i++)
        check(alone[i].code == LVM_OK && together[i].code == LVM_OK &&
                     alone[i].hash == together[i].hash && alone[i].hash == alone[i / 2 * 2].hash,
              "%s in thread %d: codes %d and %d, other results than alone", alone[i].job->name, i,
              alone[i].code, together[i].code);
}

/* Two models and their contexts in one thread, by turns. */
static void test_two_models(struct world *w) {
    static const struct job predict = {"predict", job_predict, 'b', 0},
                            generate = {"generate", job_generate, 'l', 0};
    const struct job *job[2] = {&predict, &generate};
    lvm_model *twin = lvm_open(w->both, 0, NULL), *model[2] = {twin, w->lm};
    lvm_ctx *ctx[2], *kept = w->ctx;
    uint64_t hash[2][3];
    int codes = 0, code = 0;
    for (int i = 0; i < 2; i++) ctx[i] = new_context(model[i], 2, NULL);
    for (int round = 0; round < 3; round++)
        for (int i = 0; i < 2; i++) {
            w->ctx = ctx[i];
            hash[i][round] = run_job(w, job[i], &code, NULL);
            codes |= code;
        }
    for (int i = 0; i < 2; i++) lvm_ctx_free(ctx[i]);
    w->ctx = new_context(w->m, 1, NULL);
    uint64_t want = run_job(w, &predict, &code, NULL);
    check(codes == LVM_OK && code == LVM_OK, "two models by turns fail");
    check(hash[0][0] == hash[0][1] && hash[0][1] == hash[0][2] && hash[0][0] == want &&
                 hash[1][0] == hash[1][1] && hash[1][1] == hash[1][2],
          "two models by turns: other results");
    lvm_ctx_free(w->ctx);
    w->ctx = kept;
    lvm_close(twin);
}

static void *cancel_soon(void *arg) {
    struct canceller *c = arg;
    while (atomic_load(&c->calls) < 20) sched_yield();
    atomic_store(&c->at, 0);
    return NULL;
}

/* A thread stops a prediction that runs in another. */
static void test_cancel_from_thread(struct world *w) {
    struct canceller c = {.at = -1};
    pthread_t thread;
    int code = LVM_OK, n = 0;
    lvm_ctx *kept = w->ctx;
    lvm_image out[40];
    w->ctx = cancellable(w->m, &c);
    if (pthread_create(&thread, NULL, cancel_soon, &c) != 0) abort();
    code = lvm_predict(w->ctx, w->image, 2, NULL, 1, 40, out, NULL);
    pthread_join(thread, NULL);
    n = atomic_load(&c.calls);
    check(code == LVM_CANCELLED && n >= 20, "cancelled from a thread: code %d, call %d", code, n);
    cancel_at(&c, -1);
    check(job_all(w, NULL) == LVM_OK, "the context fails after a thread cancelled it");
    lvm_ctx_free(w->ctx);
    w->ctx = kept;
}

/* ---- Arguments that cannot be right ---- */

static void test_wrong_pointers(struct world *w) {
    int32_t ids[2 * T] = {0};
    float nll[2];
    lvm_image *in = w->image, out[2], none = {.width = 4, .height = 4};
    lvm_ctx *ctx = new_context(w->m, 1, NULL);
    INVALID(lvm_encode(NULL, in, 1, ids, e));
    INVALID(lvm_encode(ctx, NULL, 1, ids, e));
    INVALID(lvm_encode(ctx, in, 1, NULL, e));
    INVALID(lvm_encode(ctx, in, -1, ids, e));
    INVALID(lvm_encode(ctx, &none, 1, ids, e));
    INVALID(lvm_decode(NULL, ids, 1, out, e));
    INVALID(lvm_decode(ctx, NULL, 1, out, e));
    INVALID(lvm_decode(ctx, ids, 1, NULL, e));
    INVALID(lvm_decode(ctx, ids, -1, out, e));
    INVALID(lvm_prompt(NULL, ids, 1, NULL, e));
    INVALID(lvm_prompt(ctx, NULL, 1, NULL, e));
    INVALID(lvm_generate(NULL, NULL, 1, 1, ids, e));
    INVALID(lvm_generate(ctx, NULL, 1, 1, NULL, e));
    INVALID(lvm_logits(NULL, ids, 1, nll, e));
    INVALID(lvm_logits(ctx, NULL, 1, nll, e));
    INVALID(lvm_logits(ctx, ids, 1, NULL, e));
    INVALID(lvm_score(NULL, ids, 1, nll, e));
    INVALID(lvm_score(ctx, NULL, 1, nll, e));
    INVALID(lvm_score(ctx, ids, 1, NULL, e));
    INVALID(lvm_prompt_images(NULL, in, 1, e));
    INVALID(lvm_prompt_images(ctx, NULL, 1, e));
    INVALID(lvm_prompt_images(ctx, in, -1, e));
    INVALID(lvm_generate_images(NULL, NULL, 1, 1, out, e));
    INVALID(lvm_generate_images(ctx, NULL, 1, 1, NULL, e));
    INVALID(lvm_generate_images(ctx, NULL, 1, 0, out, e));
    INVALID(lvm_cache_save(NULL, "x", 1, e));
    INVALID(lvm_cache_save(ctx, NULL, 1, e));
    INVALID(lvm_cache_save(ctx, "x", 0, e));
    INVALID(lvm_cache_load(NULL, "x", e));
    INVALID(lvm_cache_load(ctx, NULL, e));
    INVALID(lvm_predict(NULL, in, 1, NULL, 1, 1, out, e));
    INVALID(lvm_predict(ctx, NULL, 1, NULL, 1, 1, out, e));
    INVALID(lvm_predict(ctx, in, 1, NULL, 1, 1, NULL, e));
    INVALID(lvm_predict(ctx, &none, 1, NULL, 1, 1, out, e));
    check(out[0].rgb == NULL && out[0].width == 0, "a refused prediction leaves an image");
    check(lvm_encode(ctx, NULL, 0, NULL, NULL) == LVM_OK, "no images to encode fail");
    check(lvm_decode(ctx, NULL, 0, NULL, NULL) == LVM_OK, "no images to decode fail");
    check(lvm_predict(ctx, NULL, 0, NULL, 1, 1, out, NULL) == LVM_OK, "no prompt but bos fails");
    lvm_image_free(&out[0]);
    lvm_ctx_free(ctx);
}

/* Options that a trainer refuses, each with its name. */
static void test_wrong_training(struct world *w) {
    enum { WRONG = 18 };
    lvm_tokens *tokens = must(lvm_tokens_open_memory(w->tok, w->tok_size, NULL, NULL));
    const lvm_train_options good = small_training((const lvm_tokens *const *)&tokens);
    lvm_train_options o[WRONG];
    const char *const names[WRONG] = {
        "layers", "width", "heads", "share", "feed_forward", "vocab", "bos", "context", "batch",
        "steps", "beta2", "epsilon", "lora_on", "packing", "schedule", "nothing of the model learns",
        "free", "vocabulary"};
    for (int i = 0; i < WRONG; i++) o[i] = good;
    o[0].layers = 0, o[1].width = 18, o[2].heads = 0, o[3].heads = 4, o[3].kv_heads = 3;
    o[4].feed_forward = 0, o[5].vocab = 1, o[5].bos = o[5].eos = -1, o[6].bos = 300, o[7].context = 1, o[8].batch = 0;
    o[9].steps = 0, o[10].beta2 = 1, o[11].epsilon = 0, o[12].lora_rank = 2, o[12].lora_on = "q,z";
    o[13].packing = 2, o[14].schedule = -1, o[15].freeze = "*", o[16].memory = 1000;
    o[17].vocab = 30, o[17].bos = o[17].eos = -1;
    for (int i = 0; i < WRONG; i++) {
        lvm_error error = {0, ""};
        check(lvm_trainer_new(&o[i], &error) == NULL && strstr(error.text, names[i]) != NULL &&
                  error.code == (i == 16 ? LVM_MEMORY : LVM_INVALID),
              "a trainer with a wrong %s: code %d, \"%s\"", names[i], error.code, error.text);
    }
    lvm_train_report report;
    lvm_train_memory memory;
    double loss;
    int64_t n;
    lvm_trainer *t = must(lvm_trainer_new(&good, NULL));
    INVALID(lvm_trainer_memory(NULL, &memory, e));
    INVALID(lvm_trainer_memory(&good, NULL, e));
    INVALID(lvm_trainer_step(NULL, &report, e));
    INVALID(lvm_trainer_step(t, NULL, e));
    INVALID(lvm_trainer_eval(NULL, tokens, 0, &loss, &n, e));
    INVALID(lvm_trainer_eval(t, NULL, 0, &loss, &n, e));
    INVALID(lvm_trainer_save(NULL, "x", "", e));
    INVALID(lvm_trainer_save(t, NULL, "", e));
    INVALID(lvm_trainer_load(NULL, "x", e));
    INVALID(lvm_trainer_load(t, NULL, e));
    INVALID(lvm_trainer_export(NULL, "x", LVM_F32, NULL, e));
    INVALID(lvm_trainer_export(t, NULL, LVM_F32, NULL, e));
    INVALID(lvm_apply_lora(NULL, "x", e));
    INVALID(lvm_apply_lora(w->lm, NULL, e));
    INVALID(lvm_merge(NULL, "x", "y", LVM_AUTO, 0, e));
    check(lvm_trainer_new(NULL, NULL) == NULL, "a trainer without options");
    lvm_trainer_free(NULL);
    lvm_trainer_free(t);
    lvm_tokens_close(NULL);
    lvm_tokens_close(tokens);
}

static void test_wrong_image_calls(struct world *w) {
    lvm_image *in = w->image, out = {.width = 9}, none = {.width = 4, .height = 4};
    const char *path = in_folder(w, "a.png");
    uint8_t *png = NULL;
    size_t size = 9;
    INVALID(lvm_image_load(NULL, &out, e));
    INVALID(lvm_image_load(path, NULL, e));
    INVALID(lvm_image_load_memory(NULL, 9, "x", &out, e));
    INVALID(lvm_image_load_memory("abc", 3, "x", NULL, e));
    check(lvm_image_load_memory("abc", 3, NULL, &out, NULL) == LVM_FORMAT, "without a name");
    INVALID(lvm_image_save(NULL, in, e));
    INVALID(lvm_image_save(path, NULL, e));
    INVALID(lvm_image_save(path, &none, e));
    INVALID(lvm_image_save_memory(NULL, &png, &size, e));
    INVALID(lvm_image_save_memory(in, NULL, &size, e));
    INVALID(lvm_image_save_memory(in, &png, NULL, e));
    png = w->rgb[0];
    INVALID(lvm_image_save_memory(&none, &png, &size, e));
    check(png == NULL && size == 0, "a refused PNG leaves its place");
    INVALID(lvm_image_upright(NULL, e));
    INVALID(lvm_image_upright(&none, e));
    INVALID(lvm_image_resize(NULL, 4, 4, &out, e));
    INVALID(lvm_image_resize(in, 4, 4, NULL, e));
    INVALID(lvm_image_resize(in, 4, 4, in, e));
    INVALID(lvm_image_resize(in, 0, 4, &out, e));
    INVALID(lvm_image_resize(in, 4, -4, &out, e));
    INVALID(lvm_image_resize(&none, 4, 4, &out, e));
    check(out.rgb == NULL && out.width == 0, "a refused resize leaves an image");
    lvm_image_free(NULL);
    lvm_memory_free(NULL);
}

/* An image without width or height, to a context that crops. */
static void test_flat_images(struct world *w) {
    lvm_options o = lvm_default_options();
    lvm_image flat[2] = {{.width = 0, .height = 4}, {.width = 4, .height = 0}};
    int32_t ids[T];
    o.fit = LVM_CROP;
    lvm_ctx *ctx = must(lvm_ctx_new(w->m, &o, NULL));
    for (int i = 0; i < 2; i++) {
        flat[i].rgb = w->rgb[0];
        INVALID(lvm_encode(ctx, &flat[i], 1, ids, e));
        INVALID(lvm_prompt_images(ctx, &flat[i], 1, e));
    }
    lvm_ctx_free(ctx);
}

static void test_wrong_models(struct world *w) {
    lvm_options small = lvm_default_options(), large = small;
    lvm_sampling s = lvm_default_sampling();
    int32_t ids[2] = {0};
    small.size = 4;
    large.size += 8;
    s.size = 0;
    REFUSES(lvm_open(NULL, 0, e));
    REFUSES(lvm_open(w->both, 1 << 20, e));
    REFUSES(lvm_open_memory(NULL, 100, e));
    REFUSES(lvm_ctx_new(NULL, NULL, e));
    REFUSES(lvm_ctx_new(w->m, &small, e));
    REFUSES(lvm_ctx_new(w->m, &large, e));
    INVALID(lvm_generate(w->ctx, &s, 1, 1, ids, e));
    INVALID(lvm_sampling_preset(NULL, &s, e));
    INVALID(lvm_sampling_preset("lvm", NULL, e));
    INVALID(lvm_sampling_preset("other", &s, e));
    INVALID(lvm_quantize(NULL, "x", LVM_Q8_0, LVM_AUTO, LVM_AUTO, 0, e));
    INVALID(lvm_quantize(w->both, NULL, LVM_Q8_0, LVM_AUTO, LVM_AUTO, 0, e));
    INVALID(lvm_quantize(w->both, in_folder(w, "q"), 77, LVM_AUTO, LVM_AUTO, 0, e));
    INVALID(lvm_quantize(w->both, in_folder(w, "q"), LVM_AUTO, 77, LVM_AUTO, 0, e));
    INVALID(lvm_quantize(w->both, in_folder(w, "q"), LVM_AUTO, LVM_AUTO, 77, 0, e));
    INVALID(lvm_quantize(w->both, w->both, LVM_Q8_0, LVM_AUTO, LVM_AUTO, 1, e));
    lvm_info info = lvm_model_info(NULL);
    check(!info.has_transformer && !info.has_tokenizer && info.bos == -1 && info.name != NULL,
          "lvm_model_info(NULL)");
    lvm_ctx_free(NULL);
    lvm_close(NULL);
}

/* What is no misuse but fails all the same keeps its code without an error struct too. */
static void test_codes_without_error(struct world *w) {
    lvm_image out;
    char none[192], deep[192];
    snprintf(none, sizeof none, "%s/none", w->folder);
    snprintf(deep, sizeof deep, "%s/none/x.png", w->folder);
    check(lvm_open(none, 0, NULL) == NULL && lvm_open(none, LVM_NO_MMAP, NULL) == NULL,
          "a file that is not there opens");
    check(lvm_image_load(none, &out, NULL) == LVM_IO && out.rgb == NULL, "loading nothing");
    check(lvm_image_save(deep, &w->image[0], NULL) == LVM_IO, "saving to nowhere");
    check(lvm_quantize(none, deep, LVM_F16, LVM_F16, LVM_AUTO, 0, NULL) == LVM_IO, "from nothing");
    check(lvm_quantize(in_folder(w, "a.png"), deep, LVM_F16, LVM_F16, LVM_AUTO, 0, NULL) ==
                 LVM_FORMAT, "from an image");
    check(lvm_quantize(w->both, deep, LVM_F16, LVM_F16, LVM_AUTO, 0, NULL) == LVM_IO, "to nowhere");
}

/* Whatever lay in them before: images that a refused call should have made are empty. */
static int emptied(lvm_image *out, int n) {
    int empty = 1;
    for (int i = 0; i < n; i++) {
        empty &= out[i].rgb == NULL && out[i].width == 0 && out[i].height == 0;
        out[i] = (lvm_image){7, 7, (uint8_t *)(uintptr_t)16, 3};
    }
    return empty;
}

#define EMPTIES(n, call) do { \
        int code = (call); \
        int empty = emptied(out, n); \
        check(code != LVM_OK && empty, "%s gives %d, images are %s", #call, code, \
              empty ? "empty" : "left as they were"); \
    } while (0)

static void test_outputs(struct world *w) {
    enum { MOST = 65 * 2 };
    static lvm_image out[MOST];
    lvm_image *in = w->image, none = {.width = 4, .height = 4};
    lvm_ctx *ctx = new_context(w->m, 1, NULL);
    lvm_sampling bad = lvm_default_sampling();
    int32_t ids[2 * T] = {-1};
    bad.top_p = 2;
    emptied(out, MOST);
    EMPTIES(65, lvm_predict(ctx, in, 1, NULL, 65, 1, out, NULL));
    EMPTIES(MOST, lvm_predict(ctx, in, 1, NULL, 65, 2, out, NULL));
    EMPTIES(0, lvm_predict(ctx, in, 1, NULL, -65, -2, out, NULL));
    EMPTIES(2, lvm_predict(NULL, in, 1, NULL, 1, 2, out, NULL));
    EMPTIES(2, lvm_predict(ctx, NULL, 1, NULL, 1, 2, out, NULL));
    EMPTIES(2, lvm_predict(ctx, in, -1, NULL, 2, 1, out, NULL));
    EMPTIES(2, lvm_predict(ctx, &none, 1, NULL, 2, 1, out, NULL));
    EMPTIES(2, lvm_predict(ctx, in, 1, &bad, 2, 1, out, NULL));
    EMPTIES(65, lvm_generate_images(ctx, NULL, 65, 1, out, NULL));
    EMPTIES(4, lvm_generate_images(NULL, NULL, 2, 2, out, NULL));
    EMPTIES(4, lvm_generate_images(ctx, &bad, 2, 2, out, NULL));
    EMPTIES(2, lvm_decode(NULL, ids, 2, out, NULL));
    EMPTIES(2, lvm_decode(ctx, NULL, 2, out, NULL));
    EMPTIES(2, lvm_decode(ctx, ids, 2, out, NULL));
    EMPTIES(1, lvm_image_load(NULL, out, NULL));
    EMPTIES(1, lvm_image_load(w->folder, out, NULL));
    EMPTIES(1, lvm_image_load_memory(NULL, 1, NULL, out, NULL));
    EMPTIES(1, lvm_image_load_memory("abc", 3, NULL, out, NULL));
    EMPTIES(1, lvm_image_resize(NULL, 4, 4, out, NULL));
    EMPTIES(1, lvm_image_resize(&none, 4, 4, out, NULL));
    EMPTIES(1, lvm_image_resize(in, 4, 0, out, NULL));
    lvm_ctx_free(ctx);
}

/* A call that succeeds leaves LVM_OK and no words, whatever the struct held. */
#define CLEARS(call) do { \
        lvm_error error = {LVM_IO, "an old fault"}, *e = &error; \
        int good = (call); \
        check(good && error.code == LVM_OK && error.text[0] == 0, "%s: %d, error %d \"%s\"", #call, \
              good, error.code, error.text); \
    } while (0)

static void test_errors_cleared(struct world *w) {
    lvm_model *m = NULL, *copy = NULL;
    lvm_ctx *ctx = NULL;
    lvm_image out = {0}, more[2];
    lvm_sampling s = lvm_default_sampling();
    int32_t ids[T], more_ids[T];
    static float logits[1024];
    char cache[160], quantised[160];
    snprintf(cache, sizeof cache, "%s/cleared", w->folder);
    snprintf(quantised, sizeof quantised, "%s/cleared.bin", w->folder);
    fill_ids(ids, T);
    CLEARS((m = lvm_open(w->both, 0, e)) != NULL);
    CLEARS((copy = lvm_open_memory(w->file, w->file_size, e)) != NULL);
    CLEARS((ctx = lvm_ctx_new(m, NULL, e)) != NULL);
    CLEARS(lvm_sampling_preset("lvm", &s, e) == LVM_OK);
    CLEARS(lvm_encode(ctx, w->image, 1, more_ids, e) == LVM_OK);
    CLEARS(lvm_decode(ctx, ids, 1, more, e) == LVM_OK);
    lvm_image_free(&more[0]);
    CLEARS(lvm_prompt(ctx, ids, T, logits, e) == LVM_OK);
    CLEARS(lvm_score(ctx, ids, 3, logits, e) == LVM_OK);
    CLEARS(lvm_logits(ctx, ids, 1, logits, e) == LVM_OK);
    CLEARS(lvm_generate(ctx, &s, 1, 3, more_ids, e) == LVM_OK);
    CLEARS(lvm_cache_save(ctx, cache, 3, e) == LVM_OK);
    CLEARS(lvm_cache_load(ctx, cache, e) == LVM_OK);
    CLEARS(lvm_prompt_images(ctx, w->image, 1, e) == LVM_OK);
    CLEARS(lvm_generate_images(ctx, &s, 1, 1, more, e) == LVM_OK);
    lvm_image_free(&more[0]);
    CLEARS(lvm_predict(ctx, w->image, 1, &s, 1, 1, more, e) == LVM_OK);
    CLEARS(lvm_image_save(cache, &more[0], e) == LVM_OK);
    lvm_image_free(&more[0]);
    CLEARS(lvm_image_load(cache, &out, e) == LVM_OK);
    CLEARS(lvm_image_resize(&out, 5, 4, &more[0], e) == LVM_OK);
    CLEARS(lvm_image_upright(&out, e) == LVM_OK);
    CLEARS(lvm_quantize(w->both, quantised, LVM_F16, LVM_AUTO, LVM_AUTO, 0, e) == LVM_OK);
    lvm_image_free(&out);
    lvm_image_free(&more[0]);
    lvm_ctx_free(ctx);
    lvm_close(m);
    lvm_close(copy);
    remove(cache);
    remove(quantised);
}

/* ---- Other processes, signals ---- */

#ifndef _WIN32
static atomic_int taken, taken_elsewhere;
static pthread_t home;

static void on_signal(int number) {
    (void)number;
    atomic_fetch_add(&taken, 1);
    if (!pthread_equal(pthread_self(), home)) atomic_fetch_add(&taken_elsewhere, 1);
}

/* A signal that the program's own threads do not take waits for them, also while lvm works. */
static void test_signals(struct world *w) {
    struct sigaction action = {.sa_handler = on_signal}, old;
    sigset_t only, before, now, waiting;
    home = pthread_self();
    sigemptyset(&only);
    sigaddset(&only, SIGUSR1);
    sigaction(SIGUSR1, &action, &old);
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    lvm_ctx *kept = w->ctx;
    w->ctx = must(new_context(w->m, 4, NULL));
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    int same = 1;
    for (int i = 1; i < 32; i++) same &= sigismember(&before, i) == sigismember(&now, i);
    check(same, "lvm_ctx_new changes which signals its caller takes");
    pthread_sigmask(SIG_BLOCK, &only, NULL);
    kill(getpid(), SIGUSR1);
    job_all(w, NULL);
    sigpending(&waiting);
    check(atomic_load(&taken) == 0 && sigismember(&waiting, SIGUSR1),
          "a thread of lvm took the program's signal");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    check(atomic_load(&taken) == 1 && atomic_load(&taken_elsewhere) == 0, "the signal is lost");
    sigaction(SIGUSR1, &old, NULL);
    lvm_ctx_free(w->ctx);
    w->ctx = kept;
}

/* What a child does: uses the context or not, frees it, closes the model; 0 if all went well. */
static int in_child(struct world *w, const struct job *job, uint64_t want, int uses) {
    int code = LVM_OK;
    alarm(60); /* hanging is a failure */
    for (int i = 0; i < uses; i++)
        if (run_job(w, job, &code, NULL) != want || code != LVM_OK) return 2;
    lvm_ctx_free(w->ctx);
    w->ctx = new_context(w->m, 2, NULL);
    if (w->ctx == NULL || run_job(w, job, &code, NULL) != want) return 3;
    lvm_ctx_free(w->ctx);
    lvm_close(w->m);
    return 0;
}

/* Workers that spin, and workers that sleep: both are gone in the child. */
static void test_fork(struct world *w) {
    static const struct job job = {"predict and score", job_all, 'b', 0};
    lvm_ctx *kept = w->ctx;
    int code = LVM_OK;
    w->ctx = must(new_context(w->m, 4, NULL));
    uint64_t want = run_job(w, &job, &code, NULL);
    for (int i = 0; i < 4; i++) {
        int status = -1;
        if (i >= 2) usleep(200000); /* until they sleep */
        else run_job(w, &job, &code, NULL);
        pid_t child = fork();
        if (child == 0) _exit(in_child(w, &job, want, i % 2 * 3));
        if (child > 0) waitpid(child, &status, 0);
        check(child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0,
              "a forked child's context, %s: status %x", i % 2 ? "used and freed" : "freed",
              (unsigned)status);
    }
    check(run_job(w, &job, &code, NULL) == want, "other results behind fork");
    lvm_ctx_free(w->ctx);
    w->ctx = kept;
}
#endif

/* ---- What a context uses ---- */

/* All memory of a context is told of, nearly to the byte: what it frees is counted by the allocator. */
static void test_usage(struct world *w) {
    int32_t ids[MANY], out[3][20];
    fill_ids(ids, MANY);
    lvm_ctx *ctx = must(new_context(w->lm, 2, NULL));
    lvm_usage fresh = lvm_ctx_usage(ctx), two, three;
    lvm_info info = lvm_ctx_info(ctx);
    check(fresh.cache == 0 && fresh.tokens == 0 && fresh.tokens_free == info.context_length &&
              fresh.device == 0 && fresh.context > 0 && fresh.weights > info.parameters,
          "a fresh context uses %lld of cache, %lld in all", (long long)fresh.cache,
          (long long)fresh.context);
    lvm_prompt(ctx, ids, 250, NULL, NULL);
    lvm_usage one = lvm_ctx_usage(ctx);
    int64_t page = (int64_t)ctx->b->kv_size(ctx->state);
    lvm_prompt(ctx, ids, MANY, NULL, NULL);
    two = lvm_ctx_usage(ctx);
    check(one.cache == page && two.cache == 2 * page && two.context - fresh.context == two.cache &&
              two.tokens == MANY && two.tokens_free == info.context_length - MANY,
          "%d tokens: %lld of cache, %d free", MANY, (long long)two.cache, two.tokens_free);
    lvm_generate(ctx, NULL, 3, 20, out[0], NULL);
    three = lvm_ctx_usage(ctx);
    check(three.tokens == MANY + 20 && three.cache == 2 * page, "behind candidates: %lld of cache",
          (long long)three.cache);
    lvm_ctx_free(ctx);
    lvm_usage none = lvm_ctx_usage(NULL);
    check(none.context == 0 && none.tokens_free == 0, "the usage of no context");
    lvm_set_progress(NULL, NULL, NULL);
    for (int threads = 1; threads < 4; threads += 2) {
        atomic_store(&live_bytes, 0);
        w->hash = 0;
        lvm_ctx *both = must(new_context(w->m, threads, NULL));
        int32_t got[2 * T];
        lvm_encode(both, w->image, 2, got, NULL);
        lvm_prompt(both, got, 2 * T, NULL, NULL);
        long long told = lvm_ctx_usage(both).context, real = atomic_load(&live_bytes);
        check(told > real * 95 / 100 && told <= real, "%lld bytes are in use, %lld are told of", real,
              told);
        lvm_ctx_free(both);
    }
}

/* ---- All ---- */

static void world_open(struct world *w, char **argv) {
    uint8_t *data = NULL;
    memset(w, 0, sizeof *w);
    make_tok(w);
    w->both = argv[1];
    w->llama = argv[2];
    w->images = argv[3];
    const char *tmp = getenv("TMPDIR");
    snprintf(w->folder, sizeof w->folder, "%s/test_embed.XXXXXX", tmp != NULL ? tmp : "/tmp");
    must(mkdtemp(w->folder));
    w->m = must(lvm_open(w->both, 0, NULL));
    w->lm = must(lvm_open(w->llama, 0, NULL));
    if (read_file(w->both, &data, &w->file_size, NULL) != LVM_OK) abort();
    w->file = data;
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < 3 * 40 * 36; k++) w->rgb[i][k] = (uint8_t)(k * (i + 3) / 7 + k % 11);
        w->image[i] = (lvm_image){.width = 40, .height = 36, .rgb = w->rgb[i]};
    }
    w->ctx = must(new_context(w->m, 1, NULL));
    if (lvm_image_save(in_folder(w, "a.png"), &w->image[0], NULL) != LVM_OK) abort();
}

/* Nothing may be left: no memory, no file. */
static void world_close(struct world *w) {
    lvm_ctx_free(w->ctx);
    lvm_close(w->m);
    lvm_close(w->lm);
    mem_free(w->file);
    check(atomic_load(&live) == 0, "%d blocks of memory are left", atomic_load(&live));
    remove(in_folder(w, "a.png"));
    check(rmdir(w->folder) == 0, "files are left in %s", w->folder);
}

int main(int argc, char **argv) {
    static struct world w;
    if (argc < 4) return printf("test_embed BOTH LLAMA IMAGES [--quick | --threads-only]\n"), 2;
    if (argc > 4 && strcmp(argv[4], "--quick") == 0) step = 5;
    world_open(&w, argv);
    test_threads(&w);
    test_cancel_from_thread(&w);
    if (argc < 5 || strcmp(argv[4], "--threads-only") != 0) {
        test_two_models(&w);
        test_allocations(&w);
        test_thread_starts(&w);
        test_cancel(&w);
        test_cancel_training(&w);
        test_prompt_again(&w);
        test_generate_again(&w);
        test_wrong_pointers(&w);
        test_wrong_training(&w);
        test_wrong_image_calls(&w);
        test_flat_images(&w);
        test_wrong_models(&w);
        test_codes_without_error(&w);
        test_outputs(&w);
        test_errors_cleared(&w);
        test_usage(&w);
#ifndef _WIN32
        test_signals(&w);
        test_fork(&w);
#endif
    }
    world_close(&w);
    return checked("embed");
}
