/* lvm.c - run, embed and understand Large Vision Models, in one C file.

   A Large Vision Model (Bai et al., "Sequential Modeling Enables Scalable Learning for Large Vision
   Models", arXiv 2312.00785) never saw a word. A VQGAN turns every picture into 256 tokens, up to
   16 pictures become one sequence, a LLaMA-style transformer predicts the next token, and a task is
   given by showing examples of it as pictures: photo, depth, photo, depth, ..., photo, and the
   model answers with the depth.

   As a program:       cc -O2 -ffp-contract=off lvm.c -o lvm -lm -lpthread
                       ./lvm weights.bin prompt/01.png prompt/02.png prompt/03.png
   In your program:    compile this file with -DLVM_NO_MAIN, and where you call it
                           #define LVM_API_ONLY
                           #include "lvm.c"
                       Or make `#include "lvm.c"` the first include of one C file of yours, with
                       LVM_NO_MAIN defined above it.

   Three surprises, first:
   1. Sums have one order. The same weights, input, seed, options and instruction set give the same
      bytes, whatever the number of threads, candidates, batched rows or reused prefixes. Whoever
      adds a faster kernel keeps the order that the plain C of chapter 3 documents.
   2. Nothing here exits, prints or keeps mutable global state; only chapter 12, the command line,
      does.
   3. A picture is a row of tokens in the tokenizer's raster order, and a context holds whole
      pictures: when a sequence outgrows it, the oldest pictures leave and positions start again at
      zero.

   CONTENTS
     Part one: how a Large Vision Model works
       0  What this is; the public API
       1  Errors, memory, files, threads
       2  Numbers: f16, bf16, the quantised blocks, exp and friends
       3  Kernels in plain C, the table they are called through, and what drives them
       4  weights.bin: GGUF reader and writer, the model in memory
       5  The tokenizer: VQGAN encoder, quantiser, decoder
       6  The transformer: RMSNorm, RoPE, attention with a KV cache, SwiGLU
       7  Generation and scoring
     Part three: the machine room (part two, how one learns, comes with training)
      10  Images: PNG in and out, Pillow's resizing
      11  Fast kernels: AVX2, AVX-512, NEON
      12  The command line

   Letters used in shapes throughout:
       T tokens or rows     D model width (embedding_length)     F feed-forward width   V vocabulary
       H attention heads    G key/value heads                    d width of one head    L layers
       R picture side in pixels    S side of the token grid (R/16)    C channels    K terms a sum

   Licence: MIT, see the LICENSE file. */

/* =================================================================================================
   Chapter 0.  The public API

   Objects. An lvm_model is the weights: immutable, memory-mapped, shared by any number of threads
   and contexts. An lvm_ctx is one conversation with a model: key/value cache, scratch memory and a
   pool of threads; one thread at a time may use it. Close contexts before their model.

   Errors. Every call that can fail returns LVM_OK (0) or one of the codes below and fills *error,
   whose text names the file or the argument and the fault. error may be NULL. A call that fails
   leaves its objects usable.

   Ownership. You own what you pass in; lvm_image.rgb that lvm filled is released by lvm_image_free.

   Versions. Option structs carry their own size: fill them with lvm_default_options() or
   lvm_default_sampling(), then change what you need. */

#if defined(__STDC__) || defined(__cplusplus)
#if !defined(LVM_API_ONLY) && !defined(__cplusplus)
#if defined(_STDIO_H) || defined(_STDLIB_H) || defined(_STRING_H) || defined(_UNISTD_H)
#error "lvm.c: include it before any other header (it asks for POSIX), or define LVM_API_ONLY first"
#endif
#ifdef __FAST_MATH__
#error "lvm.c: -ffast-math breaks exact numbers; compile this file without it"
#endif
#define _POSIX_C_SOURCE 200809L
#define _DARWIN_C_SOURCE
#define _DEFAULT_SOURCE
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#endif
#endif

#ifndef LVM_H
#define LVM_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

#define LVM_VERSION "0.1.0"

enum lvm_code {
    LVM_OK = 0,
    LVM_INVALID,      /* an argument is wrong */
    LVM_IO,           /* a file could not be read or written */
    LVM_FORMAT,       /* a file is damaged or not what it should be */
    LVM_MEMORY,       /* no memory */
    LVM_UNSUPPORTED,  /* valid, but beyond this program */
    LVM_CANCELLED     /* the progress function asked to stop */
};

/* Value types of weights and caches; the numbers are GGUF's. */
enum lvm_type {
    LVM_F32 = 0,
    LVM_F16 = 1,
    LVM_Q4_0 = 2,
    LVM_Q8_0 = 8,
    LVM_BF16 = 30,
    LVM_AUTO = -1
};

typedef struct lvm_model lvm_model;
typedef struct lvm_ctx lvm_ctx;

typedef struct lvm_error {
    int code;       /* enum lvm_code */
    char text[240]; /* one line, no full stop, no newline */
} lvm_error;

typedef struct lvm_image {
    int width, height;
    uint8_t *rgb; /* [height][width][3], rows from the top */
} lvm_image;

/* What a model is. Fields of an absent part are 0. */
typedef struct lvm_info {
    int has_transformer, has_tokenizer;
    int context_length;   /* tokens that the transformer was made for */
    int vocab_size;       /* V: picture codes and special ids */
    int codes;            /* picture codes are 0 .. codes-1; ids from there on are never sampled */
    int bos, eos;         /* ids, or -1: bos stands in front of every sequence where it exists */
    int layers, width, feed_forward, heads, kv_heads;
    int resolution;       /* R: pictures are squashed to R x R */
    int tokens_per_image; /* S*S, 256 in the published models */
    int window_images;    /* pictures that fit the context, the predicted one included */
    int64_t parameters;
    const char *name;     /* general.name of the file, or "" */
    const char *isa;      /* the kernels in use: "scalar", "avx2", "avx512", "neon", "neon-dot" */
} lvm_info;

/* progress is called often, with the stage ("encode", "prompt", "generate", "score", "decode", and
   "layers" inside a step of prompt and score) and done of all units of work; returning non-zero
   cancels: the call returns LVM_CANCELLED and the context stays usable. It may look at a flag that
   another thread sets. */
typedef struct lvm_options {
    uint32_t size;
    int threads; /* 0: one a processor that this process may use */
    int kv_type; /* LVM_F32, LVM_F16, LVM_Q8_0 or LVM_AUTO: by the weights' type */
    int exact;   /* 1: f32 arithmetic from quantised weights too (integer dot products otherwise) */
    void *user;
    int (*progress)(void *user, const char *stage, int64_t done, int64_t all);
} lvm_options;

typedef struct lvm_sampling {
    uint32_t size;
    float temperature; /* 1e-3 .. 100; 1 leaves the distribution as it is */
    float top_p; /* 0 < p <= 1: the likeliest ids that hold p of the probability; 1 keeps all */
    int top_k;         /* >= 0: the k likeliest ids; 0 keeps all */
    int greedy;        /* 1: the likeliest id; of equal ones the lowest; the rest is ignored */
    uint64_t seed;
} lvm_sampling;

/* flags of lvm_open */
enum { LVM_NO_MMAP = 1 }; /* read the file instead of mapping it: for files that others may cut */

const char *lvm_version(void);
lvm_options lvm_default_options(void);
lvm_sampling lvm_default_sampling(void); /* temperature 1, top_p 0.9, top_k 0, seed 1 */

/* Opens a weights file (GGUF, see chapter 4), or one that lies in memory, which must outlive the
   model. Returns NULL and fills error on failure. lvm_close(NULL) is allowed. */
lvm_model *lvm_open(const char *path, int flags, lvm_error *error);
lvm_model *lvm_open_memory(const void *data, size_t size, lvm_error *error);
void lvm_close(lvm_model *model);
lvm_info lvm_model_info(const lvm_model *model);

/* A context; options may be NULL. Returns NULL and fills error on failure. */
lvm_ctx *lvm_new(const lvm_model *model, const lvm_options *options, lvm_error *error);
void lvm_free(lvm_ctx *ctx);

/* Pictures of any size -> ids[n][tokens_per_image]. Each is squashed to R x R first. */
int lvm_encode(lvm_ctx *ctx, const lvm_image *images, int n, int32_t *ids, lvm_error *error);

/* ids[n][tokens_per_image], each 0 .. codes-1 -> n pictures of R x R, which lvm allocates. */
int lvm_decode(lvm_ctx *ctx, const int32_t *ids, int n, lvm_image *images, lvm_error *error);

/* Reads the sequence ids[n] exactly as given (put bos in front where the model has one). What the
   context already holds of its beginning is not computed again. logits: NULL, or V floats, the
   scores of the next token. 1 <= n <= context_length. */
int lvm_prompt(lvm_ctx *ctx, const int32_t *ids, int n, float *logits, lvm_error *error);

/* Continues the prompt by n tokens, in `candidates` independent ways that share its cache:
   ids[candidates][n]. The window slides by whole pictures when the context is full, as the
   published program does. Candidate c draws from stream c of the seed. Afterwards the context
   stands behind candidate 0. */
int lvm_generate(lvm_ctx *ctx, const lvm_sampling *sampling, int candidates, int n, int32_t *ids,
                 lvm_error *error);

/* nll[i] = -ln p(ids[i] | prompt, ids[..i-1]) over the whole vocabulary, in nats. The context stays
   at the prompt, so that many continuations can be compared. */
int lvm_score(lvm_ctx *ctx, const int32_t *ids, int n, float *nll, lvm_error *error);

/* All at once: the next n pictures after images[count], `candidates` of each:
   out[candidates][n], which lvm allocates. Of the images the last window_images - 1 count. */
int lvm_predict(lvm_ctx *ctx, const lvm_image *images, int count, const lvm_sampling *sampling,
                int candidates, int n, lvm_image *out, lvm_error *error);

/* Pictures. load: PNG files or their bytes in memory (name is for messages). save: PNG, written
   beside and renamed. resize: the same bytes as Pillow's Image.resize with BICUBIC. */
int lvm_image_load(const char *path, lvm_image *image, lvm_error *error);
int lvm_image_load_memory(const void *data, size_t size, const char *name, lvm_image *image,
                          lvm_error *error);
int lvm_image_save(const char *path, const lvm_image *image, lvm_error *error);
int lvm_image_resize(const lvm_image *in, int width, int height, lvm_image *out, lvm_error *error);
void lvm_image_free(lvm_image *image);

/* Rewrites a weights file with other types: type for the transformer's matrices, vq_type for the
   tokenizer's convolutions (LVM_AUTO keeps). rules: NULL, or "PATTERN=TYPE,..." tried first for
   each tensor name, PATTERN with * for anything. Norms and biases stay F32; rows that are no
   multiple of 32 become F16 instead of a quantised type. Existing files are replaced only when
   force is 1. */
int lvm_quantize(const char *in, const char *out, int type, int vq_type, const char *rules,
                 int force, lvm_error *error);

#ifdef __cplusplus
}
#endif
#endif /* LVM_H */

#ifndef LVM_API_ONLY

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <dirent.h>
#include <time.h>
#include <unistd.h>

/* =================================================================================================
   Chapter 1.  Errors, memory, files, threads

   An error is a code and a sentence. Memory is asked for by count and size, so that the product is
   checked in one place. A file is written beside its final name, flushed to the disk, then renamed:
   whoever looks sees the old file or the whole new one. A pool of threads runs numbered tasks. */

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lvm.c: weights files are little-endian and are used where they lie; this machine is not"
#endif

#ifdef __GNUC__
#define LVM_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define LVM_PRINTF(a, b)
#endif

const char *lvm_version(void) { return LVM_VERSION; }

/* Fills error (which may be NULL) and returns code, so that `return fail(...)` reads well. */
LVM_PRINTF(3, 4) static int fail(lvm_error *error, int code, const char *format, ...) {
    if (error != NULL) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
        error->code = code;
    }
    return code;
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int round_up(int n, int to) { return (n + to - 1) / to * to; }

/* *out = a * b; 0 when the product does not fit. */
static int mul_fits(size_t a, size_t b, size_t *out) {
    if (b != 0 && a > SIZE_MAX / b) return 0;
    *out = a * b;
    return 1;
}

/* Zeroed memory for count elements of size bytes, aligned to 64; NULL and an error when there is
   none or the product overflows. Released by mem_free. The pointer that malloc gave stands right in
   front. */
static void *mem_alloc(size_t count, size_t size, lvm_error *error) {
    size_t bytes = 0;
    if (!mul_fits(count, size, &bytes) || bytes > SIZE_MAX - 128) {
        fail(error, LVM_MEMORY, "out of memory: %zu x %zu bytes", count, size);
        return NULL;
    }
    char *raw = calloc(1, bytes + 128);
    if (raw == NULL) {
        fail(error, LVM_MEMORY, "out of memory: %zu bytes", bytes);
        return NULL;
    }
    char *p = raw + sizeof(void *);
    p += (64 - (uintptr_t)p % 64) % 64;
    memcpy(p - sizeof(void *), &raw, sizeof raw);
    return p;
}

static void mem_free(void *p) {
    if (p == NULL) return;
    char *raw;
    memcpy(&raw, (char *)p - sizeof(void *), sizeof raw);
    free(raw);
}

static char *copy_string(const char *s, lvm_error *error) {
    size_t n = strlen(s) + 1;
    char *copy = mem_alloc(n, 1, error);
    if (copy != NULL) memcpy(copy, s, n);
    return copy;
}

/* ---- Files ---- */

/* Opens a regular file for reading and tells its size. Returns the descriptor or -1. */
static int open_file(const char *path, int64_t *size, lvm_error *error) {
    int fd = open(path, O_RDONLY);
    struct stat st;
    if (fd < 0) {
        fail(error, LVM_IO, "%s: %s", path, strerror(errno));
        return -1;
    }
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        fail(error, LVM_IO, "%s: not a regular file", path);
        close(fd);
        return -1;
    }
    *size = (int64_t)st.st_size;
    return fd;
}

static int read_exactly(int fd, const char *path, void *data, size_t size, lvm_error *error) {
    char *p = data;
    while (size > 0) {
        ssize_t got = read(fd, p, size < (1u << 30) ? size : (1u << 30));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(error, LVM_IO, "%s: %s", path, strerror(errno));
        if (got == 0) return fail(error, LVM_IO, "%s: became shorter while it was read", path);
        p += got;
        size -= (size_t)got;
    }
    return LVM_OK;
}

/* The whole file in memory; the caller mem_frees it. An empty file gives a valid pointer. */
static int read_file(const char *path, uint8_t **data, size_t *size, lvm_error *error) {
    int64_t bytes = 0;
    int fd = open_file(path, &bytes, error);
    if (fd < 0) return LVM_IO;
    int code = LVM_MEMORY;
    *data = mem_alloc((size_t)bytes + 1, 1, error);
    if (*data != NULL) code = read_exactly(fd, path, *data, (size_t)bytes, error);
    close(fd);
    if (code != LVM_OK) {
        mem_free(*data);
        *data = NULL;
    }
    *size = (size_t)bytes;
    return code;
}

/* A file being written under a temporary name beside its own. */
struct outfile {
    char *path, *temp;
    FILE *file;
};

static int outfile_open(struct outfile *out, const char *path, lvm_error *error) {
    memset(out, 0, sizeof *out);
    size_t n = strlen(path) + 32;
    out->path = copy_string(path, error);
    out->temp = mem_alloc(n, 1, error);
    if (out->path != NULL && out->temp != NULL) {
        snprintf(out->temp, n, "%s.%ld.tmp", path, (long)getpid());
        out->file = fopen(out->temp, "wb");
        if (out->file != NULL) return LVM_OK;
        fail(error, LVM_IO, "%s: cannot be written: %s", path, strerror(errno));
    }
    mem_free(out->path);
    mem_free(out->temp);
    return error != NULL && error->code == LVM_MEMORY ? LVM_MEMORY : LVM_IO;
}

static int outfile_write(struct outfile *out, const void *data, size_t size, lvm_error *error) {
    if (size == 0 || fwrite(data, 1, size, out->file) == size) return LVM_OK;
    return fail(error, LVM_IO, "%s: cannot be written: %s", out->path, strerror(errno));
}

/* Finishes the file: with code LVM_OK it gets its name, else it is removed. Returns what happened.
   */
static int outfile_close(struct outfile *out, int code, lvm_error *error) {
    int bad = fflush(out->file) != 0 || (code == LVM_OK && fsync(fileno(out->file)) != 0 &&
                                         errno != EINVAL && errno != EROFS);
    if (code == LVM_OK && bad)
        code = fail(error, LVM_IO, "%s: cannot be written: %s", out->path, strerror(errno));
    if (fclose(out->file) != 0 && code == LVM_OK)
        code = fail(error, LVM_IO, "%s: cannot be written: %s", out->path, strerror(errno));
    if (code == LVM_OK && rename(out->temp, out->path) != 0)
        code = fail(error, LVM_IO, "%s: cannot be written: %s", out->path, strerror(errno));
    if (code != LVM_OK) remove(out->temp);
    mem_free(out->path);
    mem_free(out->temp);
    return code;
}

/* Devices and pipes (/dev/stdout) have no name to rename to: they are written directly. */
static int write_device(const char *path, const void *data, size_t size, lvm_error *error) {
    FILE *f = fopen(path, "wb");
    if (f == NULL) return fail(error, LVM_IO, "%s: cannot be written: %s", path, strerror(errno));
    int bad = fwrite(data, 1, size, f) != size;
    bad |= fclose(f) != 0;
    return bad ? fail(error, LVM_IO, "%s: cannot be written: %s", path, strerror(errno)) : LVM_OK;
}

static int write_file(const char *path, const void *data, size_t size, lvm_error *error) {
    struct stat st;
    struct outfile out;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode))
        return write_device(path, data, size, error);
    int code = outfile_open(&out, path, error);
    if (code != LVM_OK) return code;
    return outfile_close(&out, outfile_write(&out, data, size, error), error);
}

/* ---- Threads ----

   A pool of n threads, the caller being one of them, runs tasks 0 .. count-1; whoever is free takes
   the next number. What a task computes must not depend on who runs it. Whoever waits spins for
   some microseconds, because the transformer asks for thousands of short runs a second, then offers
   the processor to others, who may be the very thread that is waited for, and sleeps in the end. */

typedef void task_fn(void *arg, int task, int thread);

struct pool {
    int n; /* threads, the caller included */
    pthread_t *threads;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    atomic_int round;   /* counts runs; workers start when it changes */
    atomic_int next;    /* next task to take */
    atomic_int working; /* workers that have not finished this run */
    atomic_int sleeping;        /* workers that wait for a run asleep */
    atomic_int caller_sleeping; /* the caller waits for their end asleep */
    atomic_int quit;
    task_fn *fn;
    void *arg;
    int count;
};

enum { SPINS = 1500, YIELDS = 50 }; /* turns of waiting: a few ten microseconds each */

struct worker {
    struct pool *pool;
    int thread;
};

static void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void pool_take_tasks(struct pool *p, int thread) {
    for (;;) {
        int task = atomic_fetch_add(&p->next, 1);
        if (task >= p->count) return;
        p->fn(p->arg, task, thread);
    }
}

/* One turn of waiting. */
static void wait_turn(int turn) {
    if (turn < SPINS)
        spin_pause();
    else
        sched_yield();
}

static void pool_wait_for_round(struct pool *p, int seen) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (atomic_load(&p->round) != seen) return;
        wait_turn(i);
    }
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleeping, 1);
    while (atomic_load(&p->round) == seen) pthread_cond_wait(&p->wake, &p->mutex);
    atomic_fetch_sub(&p->sleeping, 1);
    pthread_mutex_unlock(&p->mutex);
}

static void *pool_worker(void *arg) {
    struct worker w = *(struct worker *)arg;
    free(arg);
    int seen = 0;
    for (;;) {
        pool_wait_for_round(w.pool, seen);
        seen++;
        if (atomic_load(&w.pool->quit)) return NULL;
        pool_take_tasks(w.pool, w.thread);
        if (atomic_fetch_sub(&w.pool->working, 1) != 1 || !atomic_load(&w.pool->caller_sleeping))
            continue;
        pthread_mutex_lock(&w.pool->mutex);
        pthread_cond_signal(&w.pool->done);
        pthread_mutex_unlock(&w.pool->mutex);
    }
}

static void pool_start_round(struct pool *p) {
    atomic_fetch_add(&p->round, 1);
    if (atomic_load(&p->sleeping) == 0) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

static void pool_wait_for_workers(struct pool *p) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (atomic_load(&p->working) == 0) return;
        wait_turn(i);
    }
    pthread_mutex_lock(&p->mutex);
    atomic_exchange(&p->caller_sleeping, 1); /* QEMU's AArch64 lets a store pass the load below */
    while (atomic_load(&p->working) != 0) pthread_cond_wait(&p->done, &p->mutex);
    atomic_store(&p->caller_sleeping, 0);
    pthread_mutex_unlock(&p->mutex);
}

/* Runs fn(arg, task, thread) for every task below count and returns when all are done. */
static void pool_run(struct pool *p, int count, task_fn *fn, void *arg) {
    if (p->n == 1 || count <= 1) {
        for (int task = 0; task < count; task++) fn(arg, task, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->count = count;
    atomic_store(&p->next, 0);
    atomic_store(&p->working, p->n - 1);
    pool_start_round(p);
    pool_take_tasks(p, 0);
    pool_wait_for_workers(p);
}

static void pool_free(struct pool *p) {
    if (p == NULL) return;
    atomic_store(&p->quit, 1);
    pool_start_round(p);
    for (int i = 1; i < p->n; i++) pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
    pthread_mutex_destroy(&p->mutex);
    mem_free(p->threads);
    mem_free(p);
}

static int pool_start_worker(struct pool *p, int thread) {
    pthread_attr_t attr;
    struct worker *w = malloc(sizeof *w);
    if (w == NULL) return -1;
    *w = (struct worker){p, thread};
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 1 << 20); /* musl gives 128 KiB, macOS 512 KiB */
    int bad = pthread_create(&p->threads[thread], &attr, pool_worker, w);
    pthread_attr_destroy(&attr);
    if (bad) free(w);
    return bad;
}

/* Processors that this process may use: affinity, then the quota of its control group (Linux). */
static int processors(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) < n) n = CPU_COUNT(&set);
    long quota = 0, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (f != NULL) {
        if (fscanf(f, "%ld %ld", &quota, &period) == 2 && quota > 0 && period > 0)
            n = (long)min64(n, max64(1, (quota + period - 1) / period));
        fclose(f);
    }
#endif
    return n < 1 ? 1 : n > 1024 ? 1024 : (int)n;
}

static struct pool *pool_new(int n, lvm_error *error) {
    struct pool *p = mem_alloc(1, sizeof *p, error);
    if (p == NULL) return NULL;
    p->threads = mem_alloc((size_t)n, sizeof *p->threads, error);
    if (p->threads == NULL) {
        mem_free(p);
        return NULL;
    }
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    for (p->n = 1; p->n < n; p->n++) {
        if (pool_start_worker(p, p->n) == 0) continue;
        fail(error, LVM_MEMORY, "cannot start thread %d of %d", p->n + 1, n);
        pool_free(p);
        return NULL;
    }
    return p;
}

/* =================================================================================================
   Chapter 2.  Numbers

   Weights come as 32-bit floats, two kinds of 16-bit floats, and blocks of 32 small integers that
   share a scale. The layouts and the rounding are ggml's, byte for byte, so that standard tools can
   read the files. The second half holds exp, log, sine and cosine: the C library's differ between
   systems in their last bits, and sampled pictures must not.

       f16    seeeeemm mmmmmmmm            IEEE 754 binary16
       bf16   seeeeeee emmmmmmm            the upper half of a binary32
       q8_0   f16 d, int8 q[32]            x = d q                       34 bytes, 8.5 bits a weight
       q4_0   f16 d, uint8 q[16]           x = d (q - 8)                 18 bytes, 4.5 bits a weight
              the low nibble of q[i] is element i, the high nibble element i + 16 */

enum { QK = 32 }; /* elements of a quantised block */

struct q8_0 {
    uint16_t d;
    int8_t q[QK];
};
struct q4_0 {
    uint16_t d;
    uint8_t q[QK / 2];
};
_Static_assert(sizeof(struct q8_0) == 34 && sizeof(struct q4_0) == 18, "ggml's block layouts");

static float bits_to_f32(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
static uint32_t f32_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* Exact. Normal numbers: move the exponent by 127 - 15; subnormals are mantissa * 2^-24. */
static float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_f32(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400) return bits_to_f32(sign | ((magnitude << 13) + (112u << 23)));
    float f = (float)magnitude * 0x1p-24f;
    return sign ? -f : f;
}

/* Round to nearest, ties to even; beyond 65504 infinity; NaN stays NaN. */
static uint16_t f32_to_f16(float f) {
    uint32_t u = f32_to_bits(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
    if (u < 0x38800000)                                     /* subnormal: let the adder round */
        return (uint16_t)(sign | (f32_to_bits(bits_to_f32(u) + 0.5f) - 0x3f000000));
    u += 0xfff + (u >> 13 & 1);
    return (uint16_t)(sign | (u - (112u << 23)) >> 13);
}

static float bf16_to_f32(uint16_t h) { return bits_to_f32((uint32_t)h << 16); }

static uint16_t f32_to_bf16(float f) {
    uint32_t u = f32_to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* ---- Types: bytes, names, conversion of rows ---- */

static const struct type_info {
    int type, block, bytes; /* a block of `block` elements takes `bytes` bytes */
    const char *name;
} type_table[] = {{LVM_F32, 1, 4, "f32"},
                  {LVM_F16, 1, 2, "f16"},
                  {LVM_BF16, 1, 2, "bf16"},
                  {LVM_Q8_0, QK, 34, "q8_0"},
                  {LVM_Q4_0, QK, 18, "q4_0"}};
enum { N_TYPES = sizeof type_table / sizeof *type_table };

static const struct type_info *type_info(int type) {
    for (int i = 0; i < N_TYPES; i++)
        if (type_table[i].type == type) return &type_table[i];
    return NULL;
}

static int type_is_quantised(int type) { return type == LVM_Q8_0 || type == LVM_Q4_0; }

/* Bytes of k elements, k a multiple of the type's block. */
static int64_t type_bytes(int type, int64_t k) {
    const struct type_info *t = type_info(type);
    return k / t->block * t->bytes;
}

/* 1 / d, or 0 where d is 0 or too small for it (its f16 is 0 then). */
static float inverse(float d) {
    float id = 1 / (d != 0 ? d : 1);
    return d != 0 && fabsf(id) < HUGE_VALF ? id : 0;
}

/* v as an integer in [low, high]; NaN gives low. */
static int clamp_int(float v, int low, int high) {
    return v > (float)low ? (v < (float)high ? (int)v : high) : low;
}

/* Q8_0: d = largest magnitude / 127, q = x / d to the nearest integer, halves away from zero. */
static void quantize_q8_0(const float *x, void *out, int64_t k) {
    struct q8_0 *y = out;
    for (int64_t b = 0; b < k / QK; b++, x += QK) {
        float amax = 0;
        for (int i = 0; i < QK; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        float d = amax / 127, id = inverse(d);
        y[b].d = f32_to_f16(d);
        for (int i = 0; i < QK; i++) y[b].q[i] = (int8_t)clamp_int(roundf(x[i] * id), -127, 127);
    }
}

/* Q4_0: the element of largest magnitude becomes -8, so d = that element / -8. */
static void quantize_q4_0(const float *x, void *out, int64_t k) {
    struct q4_0 *y = out;
    for (int64_t b = 0; b < k / QK; b++, x += QK) {
        float amax = 0, extreme = 0;
        for (int i = 0; i < QK; i++)
            if (fabsf(x[i]) > amax) amax = fabsf(x[i]), extreme = x[i];
        float d = extreme / -8, id = inverse(d);
        y[b].d = f32_to_f16(d);
        for (int i = 0; i < QK / 2; i++) {
            int low = clamp_int(x[i] * id + 8.5f, 0, 15),
                high = clamp_int(x[i + QK / 2] * id + 8.5f, 0, 15);
            y[b].q[i] = (uint8_t)(low | high << 4);
        }
    }
}

/* k floats to any type; the inverse of row_to_f32. */
static void row_from_f32(int type, const float *x, void *out, int64_t k) {
    if (type == LVM_Q8_0) quantize_q8_0(x, out, k);
    if (type == LVM_Q4_0) quantize_q4_0(x, out, k);
    if (type == LVM_F32) memcpy(out, x, (size_t)k * sizeof *x);
    uint16_t *h = out;
    if (type == LVM_F16)
        for (int64_t i = 0; i < k; i++) h[i] = f32_to_f16(x[i]);
    if (type == LVM_BF16)
        for (int64_t i = 0; i < k; i++) h[i] = f32_to_bf16(x[i]);
}

/* k elements of any type to floats, exactly. */
static void row_to_f32(int type, const void *in, float *y, int64_t k) {
    const uint16_t *h = in;
    const struct q8_0 *q8 = in;
    const struct q4_0 *q4 = in;
    if (type == LVM_F32) memcpy(y, in, (size_t)k * sizeof *y);
    if (type == LVM_F16)
        for (int64_t i = 0; i < k; i++) y[i] = f16_to_f32(h[i]);
    if (type == LVM_BF16)
        for (int64_t i = 0; i < k; i++) y[i] = bf16_to_f32(h[i]);
    if (type == LVM_Q8_0)
        for (int64_t i = 0; i < k; i++) y[i] = f16_to_f32(q8[i / QK].d) * q8[i / QK].q[i % QK];
    if (type == LVM_Q4_0)
        for (int64_t i = 0; i < k; i++) {
            int j = (int)(i % QK), byte = q4[i / QK].q[j % 16], q = j < 16 ? byte & 15 : byte >> 4;
            y[i] = f16_to_f32(q4[i / QK].d) * (float)(q - 8);
        }
}

/* ---- exp, log, sine, cosine ----

   exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2, where what a short Taylor
   polynomial leaves out is less than the format's last bit. ln 2 is split in two, so that x - n ln
   2 does not cancel. */

static float exp_f32(float x) {
    if (!(x > -87.0f)) return x != x ? x : 0.0f;
    if (x > 88.0f) x = 88.0f;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bits_to_f32((uint32_t)((int)n + 127) << 23);
}

static double pow2_f64(int n) {
    uint64_t u = (uint64_t)(n + 1023) << 52;
    double d;
    memcpy(&d, &u, sizeof d);
    return d;
}

static double exp_f64(double x) {
    if (!(x > -700)) return x != x ? x : 0;
    if (x > 700) x = 700;
    double n = rint(x * 1.4426950408889634074);
    double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10, p = 1;
    for (int i = 14; i > 0; i--) p = 1 + p * r / i;
    return p * pow2_f64((int)n);
}

/* x = 2^e m with m near 1; ln m = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 ...), s = (m - 1) / (m + 1).
   */
static double log_f64(double x) {
    if (!(x > 0)) return x == 0 ? -HUGE_VAL : (double)NAN;
    if (x > 1.7e308) return x;
    int e = 0;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752) m *= 2, e--;
    double s = (m - 1) / (m + 1), s2 = s * s, sum = 0;
    for (int i = 21; i > 0; i -= 2) sum = sum * s2 + 1.0 / i;
    return 2 * s * sum + e * 6.93147180369123816490e-01 + e * 1.90821492927058770002e-10;
}

/* Sine and cosine of x >= 0 (up to about 1e6): the nearest multiple n of pi/2 goes, Taylor series
   do the rest, and n mod 4 says which is which. */
static void sincos_f64(double x, double *sine, double *cosine) {
    double n = rint(x * 0.63661977236758134308);
    double r = (x - n * 1.57079632673412561417e+00) - n * 6.07710050650619224932e-11, r2 = r * r;
    double s = 0, c = 0;
    for (int i = 17; i > 1; i -= 2) s = (1 + s) * -r2 / (i * (i - 1));
    for (int i = 16; i > 0; i -= 2) c = (1 + c) * -r2 / (i * (i - 1));
    s = r * (1 + s);
    c = 1 + c;
    int quadrant = (int)((int64_t)n & 3);
    *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
    *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}

/* =================================================================================================
   Chapter 3.  Kernels in plain C, the table they are called through, and what drives them

   Nearly all time goes into sums of products. Six kernels compute them, each defined here in plain
   C and again, faster, in chapter 11 for every instruction set. A model holds the table that fits
   the machine (struct kernels). Blocking, edges and threads are written once, below the kernels.

   Dot products, both operands contiguous along k: linear layers.
       dot_row    c[j] = sum_k a[k] b[j][k]               one row of activations, n rows of weights
       dot_tile   the same for dot_rows x dot_cols of them at once
       int_row    c[j] = sum_blocks (sum_k qa[k] qb[j][k]) da db[j]      quantised weights
       int_tile   the same for int_rows rows of activations and STRIP packed rows of weights
   Outer products, one operand packed in strips of 16 columns, b[k][16]: convolution and attention.
       outer_tile c[r][0..15] (+)= sum_k a[r][k] b[k][0..15]  for outer_rows rows
       outer_row  the same for one row and several strips

   The order of the sums, which every version of a kernel keeps for its instruction set:
       dot    element k belongs to partial sum k mod W (W = 8 floats; 16 with AVX-512); then halves
              are added: sum i += sum i + W/2, ... until one is left. No splitting of k elsewhere.
              NEON takes two vectors for its 8, and so gives the same bits as AVX2.
       int    inside a block of 32 the sum is an exact int32, so that order does not matter; the
              blocks follow in ascending order, c = fma((float)sum, db * da, c).
       outer  ascending k, one product added at a time.
   So a row's result does not depend on how many rows came with it: one row equals many rows. */

enum {
    STRIP = 16,     /* columns of a packed strip */
    KEYS = 256,     /* keys of an attention block, and of a page of the KV cache */
    MAX_TILE = 16,  /* no tile has more rows or columns */
    K8_BYTES = STRIP * (2 + QK) /* 32 dimensions of 16 keys, quantised */
};

/* 32 activations, quantised on the fly: x = d q. AVX-512's VNNI multiplies unsigned by signed bytes
   and keeps q + 128 in u8; NEON keeps q in s8, the others in s16. */
struct xblock {
    float d;
    union {
        int16_t s16[QK];
        uint8_t u8[QK];
        int8_t s8[QK];
    } q;
};

/* Shapes: a panel or strip is 16 columns; see each plain version below for what it computes. */
struct kernels {
    const char *name;
    int dot_rows, dot_cols, int_rows, outer_rows; /* shapes of the tiles */
    int pack_bytes;                               /* of a packed block of STRIP rows */

    void (*dot_row)(int k, const float *a, const float *b, int64_t ldb, int n, float *c);
    void (*dot_tile)(int k, const float *const *a, const float *const *b, float *c, int ldc);
    void (*quantize_x)(const float *x, struct xblock *y, int k);
    void (*int_row)(int type, int blocks, const struct xblock *x, const uint8_t *w,
                    int64_t row_bytes, int n, float *c);
    void (*int_pack)(int type, int blocks, const uint8_t *const *w, uint8_t *packed);
    void (*int_tile)(int blocks, const struct xblock *const *x, const uint8_t *packed, float *c,
                     int ldc);
    void (*outer_row)(int k, const float *a, const float *b, int64_t strip, int strips, float *c,
                      int accumulate);
    void (*outer_tile)(int k, const float *const *a, const float *b, float *c, int ldc,
                       int accumulate);

    void (*to_f32)(int type, const void *in, float *y, int64_t k);
    void (*k8_to_f32)(const uint8_t *in, int n, float *out);
    void (*v8_to_f32)(const struct q8_0 *in, int keys, float *out);
    void (*rmsnorm)(const float *x, const float *weight, float eps, int n, float *y);
    float (*softmax)(float *s, int n, int valid, float scale, float *max);
    void (*silu_mul)(float *gate, const float *up, int64_t n);
    void (*norm_rows)(const float *x, const float *scale, const float *shift, int silu,
                      int64_t pixels, int c, float *y);
    void (*channel_sums)(const float *x, int64_t pixels, int c, float *sum, float *square);
};

/* Adds w partial sums, halves first. */
static float sum_tree(float *partial, int w) {
    for (int half = w / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) partial[i] += partial[i + half];
    return partial[0];
}

static float dot_plain(int k, const float *a, const float *b) {
    float partial[8] = {0};
    int i = 0;
    for (; i + 8 <= k; i += 8)
        for (int lane = 0; lane < 8; lane++) partial[lane] += a[i + lane] * b[i + lane];
    for (; i < k; i++) partial[i % 8] += a[i] * b[i];
    return sum_tree(partial, 8);
}

static void dot_row_plain(int k, const float *a, const float *b, int64_t ldb, int n, float *c) {
    for (int j = 0; j < n; j++) c[j] = dot_plain(k, a, b + j * ldb);
}

enum { PLAIN_ROWS = 2, PLAIN_COLS = 2, PLAIN_OUTER = 4 };

static void dot_tile_plain(int k, const float *const *a, const float *const *b, float *c, int ldc) {
    for (int r = 0; r < PLAIN_ROWS; r++)
        for (int j = 0; j < PLAIN_COLS; j++) c[r * ldc + j] = dot_plain(k, a[r], b[j]);
}

/* Blocks of activations without a larger magnitude count as zeros: 127 / x must stay finite. */
#define LEAST_X 1e-36f

/* d = largest magnitude / 127, q = x / d to the nearest integer, ties to even. */
static void quantize_x_plain(const float *x, struct xblock *y, int k) {
    for (int b = 0; b < k / QK; b++, x += QK) {
        float amax = 0;
        for (int i = 0; i < QK; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        float id = amax > LEAST_X ? 127 / amax : 0;
        y[b].d = amax > LEAST_X ? amax / 127 : 0;
        for (int i = 0; i < QK; i++) y[b].q.s16[i] = (int16_t)rintf(x[i] * id);
    }
}

/* One block of quantised weights as integers; returns its scale. */
static float unpack_block(int type, const uint8_t *w, int b, int8_t *q) {
    if (type == LVM_Q8_0) {
        const struct q8_0 *block = (const struct q8_0 *)(const void *)w + b;
        memcpy(q, block->q, QK);
        return f16_to_f32(block->d);
    }
    const struct q4_0 *block = (const struct q4_0 *)(const void *)w + b;
    for (int i = 0; i < QK / 2; i++) {
        q[i] = (int8_t)((block->q[i] & 15) - 8);
        q[i + QK / 2] = (int8_t)((block->q[i] >> 4) - 8);
    }
    return f16_to_f32(block->d);
}

static void int_row_plain(int type, int blocks, const struct xblock *x, const uint8_t *w,
                          int64_t row_bytes, int n, float *c) {
    for (int j = 0; j < n; j++, w += row_bytes) {
        float sum = 0;
        for (int b = 0; b < blocks; b++) {
            int8_t q[QK];
            float d = unpack_block(type, w, b, q);
            int32_t products = 0;
            for (int i = 0; i < QK; i++) products += q[i] * x[b].q.s16[i];
            sum = fmaf((float)products, d * x[b].d, sum);
        }
        c[j] = sum;
    }
}

/* The plain packed form: for each block, STRIP scales, then STRIP rows of 32 bytes. */
enum { PLAIN_PACK = STRIP * (4 + QK) };

static void int_pack_plain(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    for (int b = 0; b < blocks; b++, packed += PLAIN_PACK)
        for (int j = 0; j < STRIP; j++) {
            int8_t q[QK];
            float d = unpack_block(type, w[j], b, q);
            memcpy(packed + 4 * j, &d, sizeof d);
            memcpy(packed + 4 * STRIP + QK * j, q, QK);
        }
}

static void int_tile_plain(int blocks, const struct xblock *const *x, const uint8_t *packed,
                           float *c, int ldc) {
    for (int r = 0; r < PLAIN_ROWS; r++)
        for (int j = 0; j < STRIP; j++) {
            float sum = 0;
            for (int b = 0; b < blocks; b++) {
                const uint8_t *p = packed + (int64_t)b * PLAIN_PACK;
                const int8_t *q = (const int8_t *)p + 4 * STRIP + QK * j;
                float d = 0;
                int32_t products = 0;
                memcpy(&d, p + 4 * j, sizeof d);
                for (int i = 0; i < QK; i++) products += q[i] * x[r][b].q.s16[i];
                sum = fmaf((float)products, d * x[r][b].d, sum);
            }
            c[r * ldc + j] = sum;
        }
}

static void outer_row_plain(int k, const float *a, const float *b, int64_t strip, int strips,
                            float *c, int accumulate) {
    for (int s = 0; s < strips; s++, b += strip, c += STRIP) {
        float sum[STRIP] = {0};
        if (accumulate) memcpy(sum, c, sizeof sum);
        for (int i = 0; i < k; i++)
            for (int j = 0; j < STRIP; j++) sum[j] += a[i] * b[i * STRIP + j];
        memcpy(c, sum, sizeof sum);
    }
}

static void outer_tile_plain(int k, const float *const *a, const float *b, float *c, int ldc,
                             int accumulate) {
    for (int r = 0; r < PLAIN_OUTER; r++)
        outer_row_plain(k, a[r], b, 0, 1, c + r * ldc, accumulate);
}

/* n groups of a q8_0 key panel (chapter 6): 16 scales, then 32 dimensions of 16 keys. */
static void k8_to_f32_plain(const uint8_t *in, int n, float *out) {
    for (; n > 0; n--, in += K8_BYTES, out += QK * STRIP)
        for (int key = 0; key < STRIP; key++) {
            uint16_t d = 0;
            memcpy(&d, in + 2 * key, 2);
            for (int i = 0; i < QK; i++)
                out[i * STRIP + key] = f16_to_f32(d) * (int8_t)in[2 * STRIP + i * STRIP + key];
        }
}

/* 32 dimensions of `keys` values to two strips. */
static void v8_to_f32_plain(const struct q8_0 *in, int keys, float *out) {
    for (int key = 0; key < keys; key++)
        for (int i = 0; i < QK; i++)
            out[(i / STRIP * KEYS + key) * STRIP + i % STRIP] =
                f16_to_f32(in[key].d) * in[key].q[i];
}

/* y = weight * x / sqrt(mean(x^2) + eps)      (Zhang and Sennrich 2019) */
static void rmsnorm_plain(const float *x, const float *weight, float eps, int n, float *y) {
    float scale = 1 / sqrtf(dot_plain(n, x, x) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* s[i] = exp(scale s[i] - *max) for i < valid, *max being the largest scale s[i]; 0 for the rest up
   to n. Returns their sum; valid >= 1. Sums in the order of dot. */
static float softmax_plain(float *s, int n, int valid, float scale, float *max) {
    float partial[8] = {0}, m = s[0] * scale;
    for (int i = 1; i < valid; i++) m = s[i] * scale > m ? s[i] * scale : m;
    for (int i = 0; i < valid; i++) {
        s[i] = exp_f32(s[i] * scale - m);
        partial[i % 8] += s[i];
    }
    for (int i = valid; i < n; i++) s[i] = 0;
    *max = m;
    return sum_tree(partial, 8);
}

static float silu(float x) { return x / (1 + exp_f32(-x)); }

static void silu_mul_plain(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) gate[i] = silu(gate[i]) * up[i];
}

/* y[p][i] = f(x[p][i] * scale[i] + shift[i]), f = SiLU or nothing: what is left of a GroupNorm once
   its means and variances are known. */
static void norm_rows_plain(const float *x, const float *scale, const float *shift, int use_silu,
                            int64_t pixels, int c, float *y) {
    for (int64_t p = 0; p < pixels; p++, x += c, y += c)
        for (int i = 0; i < c; i++) {
            float v = x[i] * scale[i] + shift[i];
            y[i] = use_silu ? silu(v) : v;
        }
}

/* Sums and sums of squares of each channel over a few pixels. */
static void channel_sums_plain(const float *x, int64_t pixels, int c, float *sum, float *square) {
    memset(sum, 0, (size_t)c * sizeof *sum);
    memset(square, 0, (size_t)c * sizeof *square);
    for (int64_t p = 0; p < pixels; p++, x += c)
        for (int i = 0; i < c; i++) sum[i] += x[i], square[i] += x[i] * x[i];
}

static const struct kernels kernels_plain = {
    "scalar",        PLAIN_ROWS,        PLAIN_COLS,      PLAIN_ROWS,       PLAIN_OUTER,
    PLAIN_PACK,      dot_row_plain,     dot_tile_plain,  quantize_x_plain, int_row_plain,
    int_pack_plain,  int_tile_plain,    outer_row_plain, outer_tile_plain, row_to_f32,
    k8_to_f32_plain, v8_to_f32_plain,   rmsnorm_plain,   softmax_plain,    silu_mul_plain,
    norm_rows_plain, channel_sums_plain};

/* The best table for this machine, or the one that LVM_ISA names; chapter 11. */
static const struct kernels *choose_kernels(lvm_error *error);

/* ---- Drivers ----

   struct exec carries what every driver needs: the kernels, the threads, and scratch memory that
   was sized when the context was made, so that nothing is allocated while work is done. */

struct exec {
    const struct kernels *k;
    struct pool *pool;
    int exact;            /* f32 arithmetic from quantised weights too */
    float *scratch;       /* [threads][scratch_floats] */
    int64_t scratch_floats;
    struct xblock *xq;    /* [xq_rows][xq_blocks]: quantised activations */
    int xq_rows, xq_blocks;
    void *user;
    int (*progress)(void *user, const char *stage, int64_t done, int64_t all);
};

static float *exec_scratch(const struct exec *e, int thread) {
    return e->scratch + thread * e->scratch_floats;
}

static int report(const struct exec *e, const char *stage, int64_t done, int64_t all,
                  lvm_error *error) {
    if (e->progress == NULL || e->progress(e->user, stage, done, all) == 0) return LVM_OK;
    return fail(error, LVM_CANCELLED, "cancelled while at work on: %s", stage);
}

/* A matrix of weights: rows x cols, each row contiguous in `type`. */
struct tensor {
    const uint8_t *data;
    int64_t row_bytes;
    int type, rows, cols;
};

static const uint8_t *tensor_row(const struct tensor *w, int64_t row) {
    return w->data + row * w->row_bytes;
}

/* Rows of weights that a task of linear() takes: enough to reuse activations, few enough that their
   floats stay in the second-level cache. A multiple of every tile's columns (2, 3 and 4). */
static int panel_rows(int cols) { return cols <= 4096 ? 24 : 12; }

struct linear_job {
    const struct exec *e;
    const struct tensor *w;
    const float *bias, *x;
    float *y;
    int rows;
};

/* Copies the valid part of a tile to y and adds the bias. */
static void store_tile(const struct linear_job *job, const float *tile, int ld, int r0, int rows,
                       int j0, int cols) {
    for (int r = 0; r < rows; r++) {
        float *y = job->y + (int64_t)(r0 + r) * job->w->rows + j0;
        memcpy(y, tile + r * ld, (size_t)cols * sizeof *y);
        for (int j = 0; job->bias != NULL && j < cols; j++) y[j] += job->bias[j0 + j];
    }
}

/* One panel of weights as floats against all rows of x. */
static void linear_f32_task(void *arg, int task, int thread) {
    const struct linear_job *job = arg;
    const struct tensor *w = job->w;
    const struct kernels *k = job->e->k;
    int panel = panel_rows(w->cols), j0 = task * panel,
        cols = w->rows - j0 < panel ? w->rows - j0 : panel;
    const float *b = (const float *)(const void *)tensor_row(w, j0);
    float tile[MAX_TILE * MAX_TILE];
    if (w->type != LVM_F32) {
        float *floats = exec_scratch(job->e, thread);
        for (int j = 0; j < cols; j++)
            k->to_f32(w->type, tensor_row(w, j0 + j), floats + (int64_t)j * w->cols, w->cols);
        b = floats;
    }
    for (int r0 = 0; r0 < job->rows; r0 += k->dot_rows) {
        int rows = job->rows - r0 < k->dot_rows ? job->rows - r0 : k->dot_rows;
        const float *pa[MAX_TILE], *pb[MAX_TILE];
        for (int r = 0; r < k->dot_rows; r++)
            pa[r] = job->x + (int64_t)(r0 + (r < rows ? r : rows - 1)) * w->cols;
        if (rows == 1) {
            float *y = job->y + (int64_t)r0 * w->rows + j0;
            k->dot_row(w->cols, pa[0], b, w->cols, cols, y);
            for (int j = 0; job->bias != NULL && j < cols; j++) y[j] += job->bias[j0 + j];
            continue;
        }
        for (int j = 0; j < cols; j += k->dot_cols) {
            int n = cols - j < k->dot_cols ? cols - j : k->dot_cols;
            for (int i = 0; i < k->dot_cols; i++)
                pb[i] = b + (int64_t)(j + (i < n ? i : n - 1)) * w->cols;
            k->dot_tile(w->cols, pa, pb, tile, k->dot_cols);
            store_tile(job, tile, k->dot_cols, r0, rows, j0 + j, n);
        }
    }
}

enum { INT_ROW_TASK = 64 }; /* outputs of a task with few rows */

static void linear_int_row_task(void *arg, int task, int thread) {
    const struct linear_job *job = arg;
    const struct tensor *w = job->w;
    int j0 = task * INT_ROW_TASK, n = w->rows - j0 < INT_ROW_TASK ? w->rows - j0 : INT_ROW_TASK;
    (void)thread;
    for (int r = 0; r < job->rows; r++) {
        float *y = job->y + (int64_t)r * w->rows + j0;
        job->e->k->int_row(w->type, w->cols / QK, job->e->xq + (int64_t)r * (w->cols / QK),
                           tensor_row(w, j0), w->row_bytes, n, y);
        for (int j = 0; job->bias != NULL && j < n; j++) y[j] += job->bias[j0 + j];
    }
}

/* Packs STRIP rows of weights, then multiplies all rows of x by them. */
static void linear_int_task(void *arg, int task, int thread) {
    const struct linear_job *job = arg;
    const struct tensor *w = job->w;
    const struct kernels *k = job->e->k;
    int j0 = task * STRIP, cols = w->rows - j0 < STRIP ? w->rows - j0 : STRIP,
        blocks = w->cols / QK;
    const uint8_t *rows_of_w[STRIP];
    uint8_t *packed = (uint8_t *)exec_scratch(job->e, thread);
    float tile[MAX_TILE * STRIP];
    for (int j = 0; j < STRIP; j++) rows_of_w[j] = tensor_row(w, j0 + (j < cols ? j : cols - 1));
    k->int_pack(w->type, blocks, rows_of_w, packed);
    for (int r0 = 0; r0 < job->rows; r0 += k->int_rows) {
        int rows = job->rows - r0 < k->int_rows ? job->rows - r0 : k->int_rows;
        const struct xblock *px[MAX_TILE];
        for (int r = 0; r < k->int_rows; r++)
            px[r] = job->e->xq + (int64_t)(r0 + (r < rows ? r : rows - 1)) * blocks;
        k->int_tile(blocks, px, packed, tile, STRIP);
        store_tile(job, tile, STRIP, r0, rows, j0, cols);
    }
}

static void quantize_task(void *arg, int task, int thread) {
    const struct linear_job *job = arg;
    int64_t cols = job->w->cols;
    (void)thread;
    job->e->k->quantize_x(job->x + task * cols, job->e->xq + task * (cols / QK), (int)cols);
}

/* y[rows][w->rows] = x[rows][w->cols] w^T + bias; bias may be NULL. */
static void linear(const struct exec *e, const struct tensor *w, const float *bias, const float *x,
                   int rows, float *y) {
    struct linear_job job = {e, w, bias, x, y, rows};
    int integer = type_is_quantised(w->type) && !e->exact && e->xq != NULL;
    if (!integer) {
        int panel = panel_rows(w->cols);
        pool_run(e->pool, (w->rows + panel - 1) / panel, linear_f32_task, &job);
        return;
    }
    pool_run(e->pool, rows, quantize_task, &job);
    if (rows < e->k->int_rows)
        pool_run(e->pool, (w->rows + INT_ROW_TASK - 1) / INT_ROW_TASK, linear_int_row_task, &job);
    else
        pool_run(e->pool, (w->rows + STRIP - 1) / STRIP, linear_int_task, &job);
}

/* Scratch floats that a thread needs for a matrix with so many columns. */
static int64_t linear_scratch(const struct kernels *k, int cols) {
    int64_t panel = (int64_t)panel_rows(cols) * cols;
    return max64(panel, (int64_t)(cols / QK) * k->pack_bytes / 4);
}

/* c[r][..16 strips] (+)= a[r][k] b for any number of rows; a row's pointer is a[r]. */
static void outer_rows(const struct kernels *k, int rows, int n, const float *const *a,
                       const float *b, int64_t strip, int strips, float *c, int ldc,
                       int accumulate) {
    float tile[MAX_TILE * STRIP];
    const float *pa[MAX_TILE];
    for (int r0 = 0; r0 < rows; r0 += k->outer_rows) {
        int count = rows - r0 < k->outer_rows ? rows - r0 : k->outer_rows;
        if (count < 3) {
            for (int r = r0; r < r0 + count; r++)
                k->outer_row(n, a[r], b, strip, strips, c + (int64_t)r * ldc, accumulate);
            continue;
        }
        for (int r = 0; r < k->outer_rows; r++) pa[r] = a[r0 + (r < count ? r : count - 1)];
        for (int s = 0; s < strips; s++) {
            float *out = c + (int64_t)r0 * ldc + s * STRIP;
            if (count == k->outer_rows) {
                k->outer_tile(n, pa, b + s * strip, out, ldc, accumulate);
                continue;
            }
            for (int r = 0; accumulate && r < count; r++)
                memcpy(tile + r * STRIP, out + (int64_t)r * ldc, STRIP * sizeof *tile);
            k->outer_tile(n, pa, b + s * strip, tile, STRIP, accumulate);
            for (int r = 0; r < count; r++)
                memcpy(out + (int64_t)r * ldc, tile + r * STRIP, STRIP * sizeof *tile);
        }
    }
}

/* ---- Attention over one block of keys ----

   softmax(q K^T / sqrt(d)) V, computed block by block (Milakov and Gimelshein 2018; Dao et al.
   2022): each query row carries the largest score m so far, the sum l of exp(score - m), and the
   weighted sum o of values. A block of up to 256 keys gives its own m', l', o', and
       M = max(m, m'),   l = l e^(m-M) + l' e^(m'-M),   o = o e^(m-M) + o' e^(m'-M);
   after the last block the answer is o / l. Blocks come in ascending order, so a row's result
   depends on nothing but its own keys. Keys lie in panels of 16, k[16 keys / 16][d][16], values in
   strips of 16 dimensions, v[d / 16][256 keys][16]: both are strips for the outer tile. */

struct query {
    const float *q; /* [d] */
    float *o;       /* [d] */
    float m, l;
    int keys;       /* of this block, how many this row sees: 1 .. KEYS */
};

enum { QUERY_ROWS = 48 }; /* rows that go through a block together */

/* Floats of scratch that attend_block needs for a head of width d. */
static int64_t attend_scratch(int d) { return (int64_t)QUERY_ROWS * (KEYS + d); }

static void merge_block(struct query *row, const float *o, float m, float l, int d) {
    float top = m > row->m ? m : row->m;
    float old = row->l > 0 ? exp_f32(row->m - top) : 0, new = exp_f32(m - top);
    for (int i = 0; i < d; i++) row->o[i] = row->o[i] * old + o[i] * new;
    row->l = row->l * old + l * new;
    row->m = top;
}

/* n <= QUERY_ROWS rows against one block; d is a multiple of 16. */
static void attend_block(const struct kernels *kern, struct query *rows, int n, int d,
                         const float *k, const float *v, float scale, float *scratch) {
    float *s = scratch, *o = scratch + (int64_t)QUERY_ROWS * KEYS, m[QUERY_ROWS], l[QUERY_ROWS];
    const float *q[QUERY_ROWS] = {NULL}, *p[QUERY_ROWS] = {NULL};
    int keys = 0;
    for (int r = 0; r < n; r++) {
        q[r] = rows[r].q;
        p[r] = s + r * KEYS;
        keys = rows[r].keys > keys ? rows[r].keys : keys;
    }
    int panels = (keys + STRIP - 1) / STRIP;
    outer_rows(kern, n, d, q, k, (int64_t)d * STRIP, panels, s, KEYS, 0);
    for (int r = 0; r < n; r++)
        l[r] = kern->softmax(s + r * KEYS, panels * STRIP, rows[r].keys, scale, &m[r]);
    outer_rows(kern, n, keys, p, v, (int64_t)KEYS * STRIP, d / STRIP, o, d, 0);
    for (int r = 0; r < n; r++) merge_block(&rows[r], o + (int64_t)r * d, m[r], l[r], d);
}

/* =================================================================================================
   Chapter 4.  weights.bin: GGUF reader and writer, the model in memory

   A weights file is GGUF version 3 (the format of ggml's model files), little-endian:

       "GGUF"  u32 version  u64 tensors  u64 keys
       keys:     string name, u32 type, value          string = u64 length, bytes
       tensors:  string name, u32 n_dims, u64 ne[n_dims] (fastest first), u32 type, u64 offset
       padding to general.alignment, then the tensors' data at their offsets

   Everything is read through one cursor that knows where the file ends; counts are believed only as
   far as the bytes that are left could hold them. Tensor data is used where it lies.

   Keys of this format: general.architecture = "lvm", lvm.format_version = 1; the transformer's
   under lvm. (context_length, embedding_length, block_count, feed_forward_length, vocab_size,
   attention.head_count, attention.head_count_kv, attention.layer_norm_rms_epsilon, rope.freq_base,
   bos_token_id and eos_token_id where sequences were trained with them), the tokenizer's under
   lvm.vq. (the published VQGAN configuration, one to one). A file may hold only one of the two. */

struct cursor {
    const uint8_t *data;
    size_t size, at;
    int failed; /* set by the first read beyond the end; reads after that give zeros */
};

static const uint8_t *cursor_take(struct cursor *c, uint64_t n) {
    if (c->failed || n > c->size - c->at) {
        c->failed = 1;
        return NULL;
    }
    c->at += (size_t)n;
    return c->data + c->at - n;
}

static uint64_t cursor_number(struct cursor *c, int bytes) {
    uint64_t v = 0;
    const uint8_t *p = cursor_take(c, (uint64_t)bytes);
    for (int i = 0; p != NULL && i < bytes; i++) v |= (uint64_t)p[i] << 8 * i;
    return v;
}

struct text {
    const char *s; /* not terminated */
    uint64_t n;
};

static struct text cursor_text(struct cursor *c) {
    struct text t = {NULL, cursor_number(c, 8)};
    t.s = (const char *)cursor_take(c, t.n);
    if (t.s == NULL) t.n = 0;
    return t;
}

static int text_is(struct text t, const char *s) {
    return t.n == strlen(s) && memcmp(t.s, s, (size_t)t.n) == 0;
}

enum gguf_type {
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING,
    GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64, GGUF_TYPES
};
static const uint8_t gguf_bytes[GGUF_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

struct gguf_key {
    struct text name;
    uint32_t type;
    const uint8_t *value; /* raw, size bytes */
    size_t size;
};

struct gguf_tensor {
    struct text name;
    int n_dims, type;
    int64_t ne[4]; /* fastest first; 1 beyond n_dims */
    uint64_t offset;
    int64_t bytes;
};

struct gguf {
    const char *path;
    const uint8_t *data;
    size_t size, data_start;
    uint32_t alignment;
    int64_t n_keys, n_tensors;
    struct gguf_key *keys;        /* in the file's order */
    struct gguf_tensor *tensors;  /* in the file's order */
    int64_t *by_name;             /* [n_tensors] indices, sorted by name */
};

static int text_compare(struct text a, struct text b) {
    int order = memcmp(a.s, b.s, (size_t)(a.n < b.n ? a.n : b.n));
    return order != 0 ? order : (a.n > b.n) - (a.n < b.n);
}

/* How a message prints a name from a file: at most 64 bytes. */
#define TEXT_ARG(t) (int)((t).n < 64 ? (t).n : 64), (t).s

static void skip_value(struct cursor *c, uint32_t type, int depth) {
    if (type == GGUF_STRING) {
        cursor_text(c);
    } else if (type == GGUF_ARRAY) {
        uint32_t of = (uint32_t)cursor_number(c, 4);
        uint64_t n = cursor_number(c, 8);
        if (of < GGUF_TYPES && gguf_bytes[of] != 0) {
            if (n > c->size) c->failed = 1;
            else cursor_take(c, n * gguf_bytes[of]);
        } else {
            if (of >= GGUF_TYPES || depth == 0) c->failed = 1;
            for (uint64_t i = 0; i < n && !c->failed; i++) skip_value(c, of, depth - 1);
        }
    } else if (type < GGUF_TYPES) {
        cursor_take(c, gguf_bytes[type]);
    } else {
        c->failed = 1;
    }
}

static const struct gguf_key *gguf_key(const struct gguf *g, const char *name) {
    for (int64_t i = 0; i < g->n_keys; i++)
        if (text_is(g->keys[i].name, name)) return &g->keys[i];
    return NULL;
}

static const struct gguf_tensor *gguf_tensor(const struct gguf *g, const char *name) {
    struct text wanted = {name, strlen(name)};
    int64_t low = 0, high = g->n_tensors;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        const struct gguf_tensor *t = &g->tensors[g->by_name[middle]];
        int order = text_compare(wanted, t->name);
        if (order == 0) return t;
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

/* qsort has no argument for context: sorts pairs that carry their names. */
struct named_index {
    struct text name;
    int64_t index;
};

static int compare_named(const void *a, const void *b) {
    const struct named_index *x = a, *y = b;
    return text_compare(x->name, y->name);
}

/* Sorts by name and refuses a name that comes twice. */
static int sort_names(const struct gguf *g, struct named_index *pairs, int64_t n, const char *what,
                      lvm_error *error) {
    qsort(pairs, (size_t)n, sizeof *pairs, compare_named);
    for (int64_t i = 1; i < n; i++)
        if (text_compare(pairs[i - 1].name, pairs[i].name) == 0)
            return fail(error, LVM_FORMAT, "%s: %s %.*s appears twice", g->path, what,
                        TEXT_ARG(pairs[i].name));
    return LVM_OK;
}

static int check_key_names(const struct gguf *g, lvm_error *error) {
    struct named_index *pairs = mem_alloc((size_t)g->n_keys, sizeof *pairs, error);
    if (pairs == NULL) return LVM_MEMORY;
    for (int64_t i = 0; i < g->n_keys; i++) pairs[i] = (struct named_index){g->keys[i].name, i};
    int code = sort_names(g, pairs, g->n_keys, "key", error);
    mem_free(pairs);
    return code;
}

static int parse_keys(struct gguf *g, struct cursor *c, lvm_error *error) {
    for (int64_t i = 0; i < g->n_keys; i++) {
        struct gguf_key *key = &g->keys[i];
        key->name = cursor_text(c);
        key->type = (uint32_t)cursor_number(c, 4);
        size_t start = c->at;
        skip_value(c, key->type, 4);
        key->value = c->data + start;
        key->size = c->at - start;
        if (c->failed)
            return fail(error, LVM_FORMAT, "%s: damaged or truncated at key %lld of %lld", g->path,
                        (long long)i + 1, (long long)g->n_keys);
    }
    int code = check_key_names(g, error);
    if (code != LVM_OK) return code;
    const struct gguf_key *a = gguf_key(g, "general.alignment");
    g->alignment = 32;
    if (a != NULL && a->type == GGUF_U32) memcpy(&g->alignment, a->value, 4);
    if ((a != NULL && a->type != GGUF_U32) || g->alignment % 8 != 0 || g->alignment == 0 ||
        g->alignment > 1 << 20)
        return fail(error, LVM_FORMAT, "%s: general.alignment is not a usable number", g->path);
    return LVM_OK;
}

/* Shape and size of one tensor; its offset is checked when the start of the data is known. */
static int parse_tensor(struct gguf *g, struct gguf_tensor *t, struct cursor *c, lvm_error *error) {
    t->name = cursor_text(c);
    uint32_t n_dims = (uint32_t)cursor_number(c, 4);
    if (c->failed || n_dims < 1 || n_dims > 4 || t->name.n > 256) {
        c->failed = 1;
        return fail(error, LVM_FORMAT, "%s: damaged list of tensors", g->path);
    }
    t->n_dims = (int)n_dims;
    int64_t elements = 1;
    for (int i = 0; i < 4; i++) {
        uint64_t n = i < t->n_dims ? cursor_number(c, 8) : 1;
        if (n == 0 || n > INT32_MAX || elements > INT64_MAX / 8 / (int64_t)n)
            return fail(error, LVM_FORMAT, "%s: tensor %.*s has an impossible shape", g->path,
                        TEXT_ARG(t->name));
        t->ne[i] = (int64_t)n;
        elements *= (int64_t)n;
    }
    uint32_t type = (uint32_t)cursor_number(c, 4);
    t->offset = cursor_number(c, 8);
    t->type = (int)type;
    const struct type_info *info = type < 1000 ? type_info((int)type) : NULL;
    if (info == NULL)
        return fail(error, LVM_UNSUPPORTED,
                    "%s: tensor %.*s has GGUF type %u; known are F32, F16, BF16, Q8_0 and Q4_0",
                    g->path, TEXT_ARG(t->name), type);
    if (t->ne[0] % info->block != 0)
        return fail(error, LVM_FORMAT,
                    "%s: tensor %.*s: rows of %lld do not divide into blocks of %d", g->path,
                    TEXT_ARG(t->name), (long long)t->ne[0], info->block);
    t->bytes = elements / info->block * info->bytes;
    return LVM_OK;
}

static int sort_tensors(struct gguf *g, lvm_error *error) {
    struct named_index *pairs = mem_alloc((size_t)g->n_tensors, sizeof *pairs, error);
    g->by_name = mem_alloc((size_t)g->n_tensors, sizeof *g->by_name, error);
    int code = pairs == NULL || g->by_name == NULL ? LVM_MEMORY : LVM_OK;
    for (int64_t i = 0; code == LVM_OK && i < g->n_tensors; i++)
        pairs[i] = (struct named_index){g->tensors[i].name, i};
    if (code == LVM_OK) code = sort_names(g, pairs, g->n_tensors, "tensor", error);
    for (int64_t i = 0; code == LVM_OK && i < g->n_tensors; i++) g->by_name[i] = pairs[i].index;
    mem_free(pairs);
    return code;
}

static int parse_tensors(struct gguf *g, struct cursor *c, lvm_error *error) {
    for (int64_t i = 0; i < g->n_tensors; i++) {
        int code = parse_tensor(g, &g->tensors[i], c, error);
        if (c->failed) return fail(error, LVM_FORMAT, "%s: damaged list of tensors", g->path);
        if (code != LVM_OK) return code;
    }
    g->data_start = (c->at + g->alignment - 1) / g->alignment * g->alignment;
    for (int64_t i = 0; i < g->n_tensors; i++) {
        const struct gguf_tensor *t = &g->tensors[i];
        uint64_t room = g->data_start <= g->size ? g->size - g->data_start : 0;
        if (t->offset % g->alignment != 0 || t->offset > room ||
            (uint64_t)t->bytes > room - t->offset)
            return fail(error, LVM_FORMAT, "%s: tensor %.*s lies outside the file (truncated?)",
                        g->path, TEXT_ARG(t->name));
    }
    return sort_tensors(g, error);
}

static void gguf_free(struct gguf *g) {
    mem_free(g->keys);
    mem_free(g->tensors);
    mem_free(g->by_name);
    memset(g, 0, sizeof *g);
}

/* Parses a file that lies in memory. path is for messages; both must outlive g. */
static int gguf_parse(struct gguf *g, const char *path, const void *data, size_t size,
                      lvm_error *error) {
    struct cursor c = {data, size, 0, 0};
    memset(g, 0, sizeof *g);
    g->path = path;
    g->data = data;
    g->size = size;
    if (size == 0) return fail(error, LVM_FORMAT, "%s: the file is empty", path);
    const uint8_t *magic = cursor_take(&c, 4);
    if (magic == NULL || memcmp(magic, "GGUF", 4) != 0)
        return fail(error, LVM_FORMAT,
                    "%s: not a weights file (no GGUF at its start); convert.py makes one", path);
    uint32_t version = (uint32_t)cursor_number(&c, 4);
    uint64_t n_tensors = cursor_number(&c, 8), n_keys = cursor_number(&c, 8);
    if (c.failed) return fail(error, LVM_FORMAT, "%s: truncated: only %zu bytes", path, size);
    if (version != 3)
        return fail(error, LVM_UNSUPPORTED, "%s: GGUF version %u, not 3", path, version);
    if (n_keys > (size - c.at) / 13 ||
        n_tensors > (size - c.at) / 33) /* the least that one takes */
        return fail(error, LVM_FORMAT,
                    "%s: claims more keys or tensors than its %zu bytes can hold", path, size);
    g->n_keys = (int64_t)n_keys;
    g->n_tensors = (int64_t)n_tensors;
    g->keys = mem_alloc((size_t)n_keys, sizeof *g->keys, error);
    g->tensors = mem_alloc((size_t)n_tensors, sizeof *g->tensors, error);
    int code = g->keys == NULL || g->tensors == NULL ? LVM_MEMORY : parse_keys(g, &c, error);
    if (code == LVM_OK) code = parse_tensors(g, &c, error);
    if (code != LVM_OK) gguf_free(g);
    return code;
}

/* ---- Keys by name and type ---- */

/* Reads a whole number in [low, high]; a missing key gives `missing`, or an error when that is out
   of range itself. */
static int key_int(const struct gguf *g, const char *name, int low, int high, int missing, int *out,
                   lvm_error *error) {
    const struct gguf_key *k = gguf_key(g, name);
    int64_t v = missing;
    if (k != NULL) {
        struct cursor c = {k->value, k->size, 0, 0};
        if (k->type == GGUF_U32) v = (int64_t)cursor_number(&c, 4);
        else if (k->type == GGUF_I32) v = (int32_t)cursor_number(&c, 4);
        else if (k->type == GGUF_BOOL) v = (int64_t)cursor_number(&c, 1);
        else return fail(error, LVM_FORMAT, "%s: key %s is not a whole number", g->path, name);
    } else if (missing < low || missing > high) {
        return fail(error, LVM_FORMAT, "%s: key %s is missing", g->path, name);
    }
    if (v < low || v > high)
        return fail(error, LVM_FORMAT, "%s: key %s is %lld; lvm takes %d to %d", g->path, name,
                    (long long)v, low, high);
    *out = (int)v;
    return LVM_OK;
}

static int key_float(const struct gguf *g, const char *name, float low, float high, float *out,
                     lvm_error *error) {
    const struct gguf_key *k = gguf_key(g, name);
    if (k == NULL || k->type != GGUF_F32)
        return fail(error, LVM_FORMAT, "%s: key %s is missing or no 32-bit float", g->path, name);
    memcpy(out, k->value, 4);
    if (!(*out >= low && *out <= high))
        return fail(error, LVM_FORMAT, "%s: key %s is %g; lvm takes %g to %g", g->path, name,
                    (double)*out, (double)low, (double)high);
    return LVM_OK;
}

/* An array of at most max 32-bit integers, each in [0, 2^20]; *n is its length. */
static int key_ints(const struct gguf *g, const char *name, int max, int *out, int *n,
                    lvm_error *error) {
    const struct gguf_key *k = gguf_key(g, name);
    struct cursor c = {k != NULL ? k->value : NULL, k != NULL ? k->size : 0, 0, 0};
    uint32_t of = (uint32_t)cursor_number(&c, 4);
    uint64_t count = cursor_number(&c, 8);
    if (k == NULL || k->type != GGUF_ARRAY || (count > 0 && of != GGUF_I32 && of != GGUF_U32))
        return fail(error, LVM_FORMAT, "%s: key %s is missing or no array of integers", g->path,
                    name);
    if (count > (uint64_t)max)
        return fail(error, LVM_UNSUPPORTED, "%s: key %s has %llu entries; lvm takes %d", g->path,
                    name, (unsigned long long)count, max);
    *n = (int)count;
    for (int i = 0; i < *n; i++) {
        out[i] = (int)cursor_number(&c, 4);
        if (out[i] < 0 || out[i] > 1 << 20)
            return fail(error, LVM_FORMAT, "%s: key %s holds %d", g->path, name, out[i]);
    }
    return LVM_OK;
}

static int key_is_text(const struct gguf *g, const char *name, const char *value) {
    const struct gguf_key *k = gguf_key(g, name);
    if (k == NULL || k->type != GGUF_STRING) return 0;
    struct cursor c = {k->value, k->size, 0, 0};
    return text_is(cursor_text(&c), value);
}

/* ---- The model in memory: shapes behind every pointer ---- */

struct layer {
    const float *attn_norm;           /* [D] */
    struct tensor q, k, v, o;         /* [H d][D]  [G d][D]  [G d][D]  [D][H d] */
    const float *q_bias, *k_bias, *v_bias, *o_bias; /* NULL where the checkpoint has none */
    const float *ffn_norm;            /* [D] */
    struct tensor gate, up, down;     /* [F][D]  [F][D]  [D][F] */
};

struct llama {
    int context, n_layers, D, F, H, G, d, V;
    float eps, theta;
    struct tensor embed;              /* [V][D] */
    struct layer *layers;             /* [L] */
    const float *norm;                /* [D] */
    struct tensor output;             /* [V][D]; the same as embed when tied */
};

struct norm {
    const float *weight, *bias;       /* [c] */
    int c;
};

struct conv {
    struct tensor w;                  /* [c_out][size][size][c_in] */
    const float *bias;                /* [c_out] */
    int c_in, c_out, size;            /* size 3 or 1; c_out 0: absent */
};

struct res_block {
    struct norm norm1, norm2;
    struct conv conv1, conv2, shortcut; /* shortcut: 1 x 1, only where the channels change */
};

struct attn_block {
    struct norm norm;
    struct conv q, k, v, proj;        /* 1 x 1, c -> c */
};

enum { MAX_LEVELS = 8, MAX_BLOCKS = 9 };

struct level {
    int n_blocks, c, has_attn,
        resample; /* resample: 1 where the level ends with a change of size */
    struct res_block block[MAX_BLOCKS];
    struct attn_block attn[MAX_BLOCKS];
    struct conv conv;                 /* of the resampling; absent when it is plain */
};

/* One half of the VQGAN; levels in the order of the checkpoint, finest first, in both halves. */
struct half {
    struct conv conv_in, conv_out;
    struct level level[MAX_LEVELS];
    struct res_block mid1, mid2;
    struct attn_block mid_attn;
    int has_mid_attn;
    struct norm norm_out;
};

struct vqgan {
    int R, S, n_levels, n_res_blocks, hidden, z, codes, e; /* e: width of a codebook vector */
    int mult[MAX_LEVELS], attn_at[16], n_attn_at, no_mid_attn, resample_conv;
    struct half encoder, decoder;
    struct conv quant, post_quant;    /* 1 x 1, z -> e and e -> z */
    struct tensor codebook;           /* [codes][e] */
};

struct lvm_model {
    char *path, *name;
    uint8_t *owned;                   /* the file in memory, or NULL when it is mapped or foreign */
    void *mapped;
    size_t mapped_size;
    struct gguf file;
    const struct kernels *k;
    lvm_info info;
    struct llama llama;
    struct vqgan *vq;                 /* NULL when the file has no tokenizer */
};

/* Asks for a tensor by name and shape: a matrix of any type. dims are given slowest first. */
static int want_tensor(const lvm_model *m, const char *name, int n_dims, const int *dims,
                       struct tensor *out, lvm_error *error) {
    const struct gguf_tensor *t = gguf_tensor(&m->file, name);
    if (t == NULL) return fail(error, LVM_FORMAT, "%s: tensor %s is missing", m->path, name);
    int same = t->n_dims == n_dims;
    for (int i = 0; i < n_dims; i++) same &= t->ne[i] == dims[n_dims - 1 - i];
    if (!same)
        return fail(error, LVM_FORMAT,
                    "%s: tensor %s has the wrong shape (%lld x %lld x %lld x %lld)", m->path, name,
                    (long long)t->ne[3], (long long)t->ne[2], (long long)t->ne[1],
                    (long long)t->ne[0]);
    int64_t cols = 1;
    for (int i = 1; i < n_dims; i++) cols *= dims[i];
    if (cols > INT32_MAX / 64)
        return fail(error, LVM_UNSUPPORTED, "%s: tensor %s has rows of %lld", m->path, name,
                    (long long)cols);
    out->data = m->file.data + m->file.data_start + t->offset;
    out->type = t->type;
    out->rows = dims[0];
    out->cols = (int)cols;
    out->row_bytes = type_bytes(t->type, cols);
    return LVM_OK;
}

static int want_matrix(const lvm_model *m, const char *name, int rows, int cols, struct tensor *out,
                       lvm_error *error) {
    int dims[2] = {rows, cols};
    return want_tensor(m, name, 2, dims, out, error);
}

/* A vector of n floats; *out stays NULL when an optional one is absent. */
static int want_vector(const lvm_model *m, const char *name, int n, int optional, const float **out,
                       lvm_error *error) {
    struct tensor t = {0};
    *out = NULL;
    if (optional && gguf_tensor(&m->file, name) == NULL) return LVM_OK;
    int code = want_tensor(m, name, 1, &n, &t, error);
    if (code == LVM_OK && t.type != LVM_F32)
        code = fail(error, LVM_FORMAT, "%s: tensor %s must be F32", m->path, name);
    if (code == LVM_OK) *out = (const float *)(const void *)t.data;
    return code;
}

static int load_layer(const lvm_model *m, int n, struct layer *l, lvm_error *error) {
    const struct llama *a = &m->llama;
    int q_rows = a->H * a->d, kv_rows = a->G * a->d, code = LVM_OK;
    char name[64];
    struct { const char *name; int rows, cols; struct tensor *w; const float **bias;
    } linear[] = {{"attn_q", q_rows, a->D, &l->q, &l->q_bias},
                  {"attn_k", kv_rows, a->D, &l->k, &l->k_bias},
                  {"attn_v", kv_rows, a->D, &l->v, &l->v_bias},
                  {"attn_output", a->D, q_rows, &l->o, &l->o_bias},
                  {"ffn_gate", a->F, a->D, &l->gate, NULL},
                  {"ffn_up", a->F, a->D, &l->up, NULL},
                  {"ffn_down", a->D, a->F, &l->down, NULL}};
    for (size_t i = 0; code == LVM_OK && i < sizeof linear / sizeof *linear; i++) {
        snprintf(name, sizeof name, "blk.%d.%s.weight", n, linear[i].name);
        code = want_matrix(m, name, linear[i].rows, linear[i].cols, linear[i].w, error);
        if (code != LVM_OK || linear[i].bias == NULL) continue;
        snprintf(name, sizeof name, "blk.%d.%s.bias", n, linear[i].name);
        code = want_vector(m, name, linear[i].rows, 1, linear[i].bias, error);
    }
    snprintf(name, sizeof name, "blk.%d.attn_norm.weight", n);
    if (code == LVM_OK) code = want_vector(m, name, a->D, 0, &l->attn_norm, error);
    snprintf(name, sizeof name, "blk.%d.ffn_norm.weight", n);
    if (code == LVM_OK) code = want_vector(m, name, a->D, 0, &l->ffn_norm, error);
    return code;
}

static int load_llama_keys(lvm_model *m, lvm_error *error) {
    struct llama *a = &m->llama;
    struct { const char *name; int high; int *out; } ints[] = {
        {"lvm.context_length", 1 << 20, &a->context}, {"lvm.embedding_length", 1 << 16, &a->D},
        {"lvm.block_count", 1024, &a->n_layers},      {"lvm.feed_forward_length", 1 << 18, &a->F},
        {"lvm.vocab_size", 1 << 20, &a->V},           {"lvm.attention.head_count", 1024, &a->H},
        {"lvm.attention.head_count_kv", 1024, &a->G}};
    int code = LVM_OK;
    for (size_t i = 0; code == LVM_OK && i < sizeof ints / sizeof *ints; i++)
        code = key_int(&m->file, ints[i].name, 1, ints[i].high, 0, ints[i].out, error);
    if (code == LVM_OK)
        code = key_float(&m->file, "lvm.attention.layer_norm_rms_epsilon", 0, 1, &a->eps, error);
    if (code == LVM_OK)
        code = key_float(&m->file, "lvm.rope.freq_base", 1, 1e12f, &a->theta, error);
    if (code != LVM_OK) return code;
    if (a->H % a->G != 0)
        return fail(error, LVM_FORMAT,
                    "%s: %d attention heads do not share %d key/value heads evenly", m->path, a->H,
                    a->G);
    if (a->D % a->H != 0 || a->D / a->H % 2 != 0)
        return fail(error, LVM_FORMAT, "%s: width %d does not divide into %d heads of even width",
                    m->path, a->D, a->H);
    a->d = a->D / a->H;
    return LVM_OK;
}

static int load_llama(lvm_model *m, lvm_error *error) {
    struct llama *a = &m->llama;
    int code = load_llama_keys(m, error);
    if (code == LVM_OK) {
        a->layers = mem_alloc((size_t)a->n_layers, sizeof *a->layers, error);
        if (a->layers == NULL) return LVM_MEMORY;
        code = want_matrix(m, "token_embd.weight", a->V, a->D, &a->embed, error);
    }
    for (int i = 0; code == LVM_OK && i < a->n_layers; i++)
        code = load_layer(m, i, &a->layers[i], error);
    if (code == LVM_OK) code = want_vector(m, "output_norm.weight", a->D, 0, &a->norm, error);
    if (code != LVM_OK) return code;
    a->output = a->embed;
    if (gguf_tensor(&m->file, "output.weight") != NULL)
        code = want_matrix(m, "output.weight", a->V, a->D, &a->output, error);
    return code;
}

/* ---- The tokenizer's tensors, by the names of the published checkpoint behind "vq." ---- */

struct vq_loader {
    const lvm_model *m;
    lvm_error *error;
    int code; /* the first failure; later requests do nothing */
};

static const float *vq_vector(struct vq_loader *l, const char *prefix, const char *name, int n) {
    char full[256];
    const float *v = NULL;
    snprintf(full, sizeof full, "vq.%s%s", prefix, name);
    if (l->code == LVM_OK) l->code = want_vector(l->m, full, n, 0, &v, l->error);
    return v;
}

static void vq_conv(struct vq_loader *l, const char *prefix, const char *name, int c_in, int c_out,
                    int size, struct conv *out) {
    char full[128];
    int dims[4] = {c_out, size, size, c_in};
    snprintf(full, sizeof full, "vq.%s%s.weight", prefix, name);
    if (l->code == LVM_OK) l->code = want_tensor(l->m, full, 4, dims, &out->w, l->error);
    snprintf(full, sizeof full, "%s.bias", name);
    out->bias = vq_vector(l, prefix, full, c_out);
    out->c_in = c_in;
    out->c_out = c_out;
    out->size = size;
}

static void vq_norm(struct vq_loader *l, const char *prefix, const char *name, int c,
                    struct norm *out) {
    char full[128];
    snprintf(full, sizeof full, "%s.weight", name);
    out->weight = vq_vector(l, prefix, full, c);
    snprintf(full, sizeof full, "%s.bias", name);
    out->bias = vq_vector(l, prefix, full, c);
    out->c = c;
}

static void vq_res_block(struct vq_loader *l, const char *prefix, int c_in, int c_out,
                         struct res_block *out) {
    vq_norm(l, prefix, "norm1", c_in, &out->norm1);
    vq_conv(l, prefix, "conv1", c_in, c_out, 3, &out->conv1);
    vq_norm(l, prefix, "norm2", c_out, &out->norm2);
    vq_conv(l, prefix, "conv2", c_out, c_out, 3, &out->conv2);
    if (c_in != c_out) vq_conv(l, prefix, "nin_shortcut", c_in, c_out, 1, &out->shortcut);
}

static void vq_attn_block(struct vq_loader *l, const char *prefix, int c, struct attn_block *out) {
    vq_norm(l, prefix, "norm", c, &out->norm);
    vq_conv(l, prefix, "q", c, c, 1, &out->q);
    vq_conv(l, prefix, "k", c, c, 1, &out->k);
    vq_conv(l, prefix, "v", c, c, 1, &out->v);
    vq_conv(l, prefix, "proj_out", c, c, 1, &out->proj);
}

/* One level of either half. As in the published class, a level runs its attention blocks only where
   it has more than one, so a lone one is not loaded. */
static void vq_level(struct vq_loader *l, const char *half, int i, int c_in, int n_blocks,
                     const char *resample, struct level *out) {
    const struct vqgan *vq = l->m->vq;
    char prefix[64];
    out->n_blocks = n_blocks;
    out->c = vq->hidden * vq->mult[i];
    out->resample = resample != NULL;
    for (int r = 0; r < vq->n_attn_at; r++)
        if (vq->attn_at[r] == vq->R >> i && n_blocks > 1) out->has_attn = 1;
    for (int b = 0; b < n_blocks; b++) {
        snprintf(prefix, sizeof prefix, "%s.%d.block.%d.", half, i, b);
        vq_res_block(l, prefix, b == 0 ? c_in : out->c, out->c, &out->block[b]);
        snprintf(prefix, sizeof prefix, "%s.%d.attn.%d.", half, i, b);
        if (out->has_attn) vq_attn_block(l, prefix, out->c, &out->attn[b]);
    }
    snprintf(prefix, sizeof prefix, "%s.%d.", half, i);
    if (resample != NULL && vq->resample_conv)
        vq_conv(l, prefix, resample, out->c, out->c, 3, &out->conv);
}

static void vq_half(struct vq_loader *l, const char *name, int c_in, int c_out, int c_mid,
                    struct half *out) {
    char prefix[64];
    snprintf(prefix, sizeof prefix, "%s.mid.block_1.", name);
    vq_res_block(l, prefix, c_mid, c_mid, &out->mid1);
    snprintf(prefix, sizeof prefix, "%s.mid.block_2.", name);
    vq_res_block(l, prefix, c_mid, c_mid, &out->mid2);
    out->has_mid_attn = !l->m->vq->no_mid_attn;
    snprintf(prefix, sizeof prefix, "%s.mid.attn_1.", name);
    if (out->has_mid_attn) vq_attn_block(l, prefix, c_mid, &out->mid_attn);
    snprintf(prefix, sizeof prefix, "%s.", name);
    int first = strcmp(name, "encoder") == 0 ? l->m->vq->hidden : c_mid;
    int last = strcmp(name, "encoder") == 0 ? c_mid : l->m->vq->hidden * l->m->vq->mult[0];
    vq_conv(l, prefix, "conv_in", c_in, first, 3, &out->conv_in);
    vq_norm(l, prefix, "norm_out", last, &out->norm_out);
    vq_conv(l, prefix, "conv_out", last, c_out, 3, &out->conv_out);
}

static int load_vq_keys(const struct gguf *g, struct vqgan *vq, lvm_error *error) {
    struct { const char *name; int low, high, missing; int *out; } ints[] = {
        {"lvm.vq.resolution", 1, 4096, 0, &vq->R},
        {"lvm.vq.hidden_channels", 1, 4096, 0, &vq->hidden},
        {"lvm.vq.num_res_blocks", 1, MAX_BLOCKS - 1, 0, &vq->n_res_blocks},
        {"lvm.vq.z_channels", 1, 4096, 0, &vq->z},
        {"lvm.vq.num_embeddings", 1, 1 << 20, 0, &vq->codes},
        {"lvm.vq.quantized_embed_dim", 1, 4096, 0, &vq->e},
        {"lvm.vq.no_attn_mid_block", 0, 1, 0, &vq->no_mid_attn},
        {"lvm.vq.resample_with_conv", 0, 1, 1, &vq->resample_conv}};
    int code = LVM_OK;
    for (size_t i = 0; code == LVM_OK && i < sizeof ints / sizeof *ints; i++)
        code = key_int(g, ints[i].name, ints[i].low, ints[i].high, ints[i].missing, ints[i].out,
                       error);
    if (code == LVM_OK)
        code = key_ints(g, "lvm.vq.channel_mult", MAX_LEVELS, vq->mult, &vq->n_levels, error);
    if (code == LVM_OK)
        code = key_ints(g, "lvm.vq.attn_resolutions", 16, vq->attn_at, &vq->n_attn_at, error);
    if (code != LVM_OK) return code;
    if (vq->n_levels < 1 || vq->R % (1 << (vq->n_levels - 1)) != 0)
        return fail(error, LVM_FORMAT, "%s: resolution %d does not halve %d times", g->path, vq->R,
                    vq->n_levels - 1);
    for (int i = 0; i < vq->n_levels; i++)
        if (vq->mult[i] < 1 || vq->mult[i] > 64 || vq->hidden * vq->mult[i] % 32 != 0 ||
            vq->hidden % 32 != 0)
            return fail(error, LVM_FORMAT, "%s: channels of level %d are no multiple of 32",
                        g->path, i);
    vq->S = vq->R >> (vq->n_levels - 1);
    return LVM_OK;
}

static int load_vq(lvm_model *m, lvm_error *error) {
    struct vqgan *vq = m->vq = mem_alloc(1, sizeof *m->vq, error);
    if (vq == NULL) return LVM_MEMORY;
    int code = load_vq_keys(&m->file, vq, error);
    if (code != LVM_OK) return code;
    struct vq_loader l = {m, error, LVM_OK};
    int last = vq->n_levels - 1, c_mid = vq->hidden * vq->mult[last];
    vq_half(&l, "encoder", 3, vq->z, c_mid, &vq->encoder);
    vq_half(&l, "decoder", vq->z, 3, c_mid, &vq->decoder);
    for (int i = 0; i <= last; i++) {
        int down_in = vq->hidden * (i == 0 ? 1 : vq->mult[i - 1]);
        int up_in = vq->hidden * vq->mult[i == last ? last : i + 1];
        vq_level(&l, "encoder.down", i, down_in, vq->n_res_blocks,
                 i < last ? "downsample.conv" : NULL, &vq->encoder.level[i]);
        vq_level(&l, "decoder.up", i, up_in, vq->n_res_blocks + 1, i > 0 ? "upsample.conv" : NULL,
                 &vq->decoder.level[i]);
    }
    vq_conv(&l, "", "quant_conv", vq->z, vq->e, 1, &vq->quant);
    vq_conv(&l, "", "post_quant_conv", vq->e, vq->z, 1, &vq->post_quant);
    if (l.code == LVM_OK)
        l.code =
            want_matrix(m, "vq.quantize.embedding.weight", vq->codes, vq->e, &vq->codebook, error);
    return l.code;
}

/* ---- Opening ---- */

static int fill_info(lvm_model *m, lvm_error *error) {
    const struct llama *a = &m->llama;
    lvm_info *i = &m->info;
    const struct vqgan *vq = m->vq;
    i->tokens_per_image = vq != NULL ? vq->S * vq->S : 256;
    i->resolution = vq != NULL ? vq->R : 0;
    i->codes = vq != NULL ? vq->codes : (int)min64(a->V, 8192);
    i->bos = i->eos = -1;
    i->isa = m->k->name;
    for (int64_t t = 0; t < m->file.n_tensors; t++) {
        const int64_t *ne = m->file.tensors[t].ne;
        i->parameters += ne[0] * ne[1] * ne[2] * ne[3];
    }
    if (!i->has_transformer) return LVM_OK;
    if (i->codes > a->V)
        return fail(error, LVM_FORMAT,
                    "%s: the tokenizer has %d codes, the transformer's vocabulary %d", m->path,
                    i->codes, a->V);
    i->context_length = a->context;
    i->vocab_size = a->V;
    i->layers = a->n_layers;
    i->width = a->D;
    i->feed_forward = a->F;
    i->heads = a->H;
    i->kv_heads = a->G;
    int code = key_int(&m->file, "lvm.bos_token_id", -1, a->V - 1, -1, &i->bos, error);
    if (code == LVM_OK)
        code = key_int(&m->file, "lvm.eos_token_id", -1, a->V - 1, -1, &i->eos, error);
    i->window_images = (int)min64(16, (a->context + 1 - (i->bos >= 0)) / i->tokens_per_image);
    return code;
}

static int load_name(lvm_model *m, lvm_error *error) {
    const struct gguf_key *k = gguf_key(&m->file, "general.name");
    struct cursor c = {k != NULL ? k->value : NULL, k != NULL ? k->size : 0, 0, 0};
    struct text t = k != NULL && k->type == GGUF_STRING ? cursor_text(&c) : (struct text){NULL, 0};
    m->name = mem_alloc((size_t)t.n + 1, 1, error);
    if (m->name == NULL) return LVM_MEMORY;
    if (t.n > 0) memcpy(m->name, t.s, (size_t)t.n);
    m->info.name = m->name;
    return LVM_OK;
}

static int load_model(lvm_model *m, const void *data, size_t size, lvm_error *error) {
    m->k = choose_kernels(error);
    if (m->k == NULL) return LVM_INVALID;
    if ((uintptr_t)data % 8 != 0)
        return fail(error, LVM_INVALID, "%s: the weights in memory must be aligned to 8 bytes",
                    m->path);
    int code = gguf_parse(&m->file, m->path, data, size, error);
    if (code != LVM_OK) return code;
    if (!key_is_text(&m->file, "general.architecture", "lvm"))
        return fail(error, LVM_FORMAT, "%s: a GGUF file of another architecture than lvm", m->path);
    int version = 0;
    code = key_int(&m->file, "lvm.format_version", 1, 1, 0, &version, error);
    if (code == LVM_OK) code = load_name(m, error);
    m->info.has_transformer = gguf_key(&m->file, "lvm.block_count") != NULL;
    m->info.has_tokenizer = gguf_key(&m->file, "lvm.vq.resolution") != NULL;
    if (code == LVM_OK && !m->info.has_transformer && !m->info.has_tokenizer)
        code = fail(error, LVM_FORMAT, "%s: holds neither a transformer nor a tokenizer", m->path);
    if (code == LVM_OK && m->info.has_transformer) code = load_llama(m, error);
    if (code == LVM_OK && m->info.has_tokenizer) code = load_vq(m, error);
    if (code == LVM_OK) code = fill_info(m, error);
    return code;
}

static lvm_model *model_new(const char *path, lvm_error *error) {
    lvm_model *m = mem_alloc(1, sizeof *m, error);
    if (m == NULL) return NULL;
    m->path = copy_string(path, error);
    if (m->path != NULL) return m;
    mem_free(m);
    return NULL;
}

static lvm_model *model_or_null(lvm_model *m, int code) {
    if (code == LVM_OK) return m;
    lvm_close(m);
    return NULL;
}

lvm_model *lvm_open_memory(const void *data, size_t size, lvm_error *error) {
    lvm_model *m = model_new("(memory)", error);
    return m == NULL ? NULL : model_or_null(m, load_model(m, data, size, error));
}

static int map_file(lvm_model *m, lvm_error *error) {
    int64_t size = 0;
    int fd = open_file(m->path, &size, error);
    if (fd < 0) return LVM_IO;
    if (size > 0) {
        m->mapped = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (m->mapped == MAP_FAILED) m->mapped = NULL;
        if (m->mapped != NULL) m->mapped_size = (size_t)size;
    }
    close(fd);
    if (size > 0 && m->mapped == NULL)
        return fail(error, LVM_IO, "%s: cannot be mapped: %s (try --no-mmap)", m->path,
                    strerror(errno));
    return load_model(m, m->mapped, m->mapped_size, error);
}

lvm_model *lvm_open(const char *path, int flags, lvm_error *error) {
    lvm_model *m = model_new(path, error);
    if (m == NULL) return NULL;
    if ((flags & LVM_NO_MMAP) == 0) return model_or_null(m, map_file(m, error));
    size_t size = 0;
    int code = read_file(path, &m->owned, &size, error);
    if (code == LVM_OK) code = load_model(m, m->owned, size, error);
    return model_or_null(m, code);
}

void lvm_close(lvm_model *m) {
    if (m == NULL) return;
    gguf_free(&m->file);
    mem_free(m->llama.layers);
    mem_free(m->vq);
    mem_free(m->owned);
    if (m->mapped != NULL) munmap(m->mapped, m->mapped_size);
    mem_free(m->path);
    mem_free(m->name);
    mem_free(m);
}

lvm_info lvm_model_info(const lvm_model *model) { return model->info; }

/* ---- Writing: the same file with other types ---- */

/* Matches name against a pattern in which * stands for anything. */
static int matches(const char *pattern, size_t pattern_n, struct text name) {
    if (pattern_n == 0) return name.n == 0;
    if (*pattern == '*') {
        for (uint64_t skip = 0; skip <= name.n; skip++)
            if (matches(pattern + 1, pattern_n - 1, (struct text){name.s + skip, name.n - skip}))
                return 1;
        return 0;
    }
    return name.n > 0 && *pattern == *name.s &&
           matches(pattern + 1, pattern_n - 1, (struct text){name.s + 1, name.n - 1});
}

static int parse_type(const char *s, size_t n) {
    for (int i = 0; i < N_TYPES; i++)
        if (strlen(type_table[i].name) == n && memcmp(type_table[i].name, s, n) == 0)
            return type_table[i].type;
    return LVM_AUTO;
}

/* The type that "PATTERN=TYPE,..." gives a tensor, LVM_AUTO for none; faults are reported once with
   name NULL, before anything is written. */
static int rule_type(const char *rules, struct text name, int *type, lvm_error *error) {
    *type = LVM_AUTO;
    while (rules != NULL && *rules != 0) {
        size_t n = strcspn(rules, ","), pattern = strcspn(rules, "=,");
        int t = pattern < n ? parse_type(rules + pattern + 1, n - pattern - 1) : LVM_AUTO;
        if (t == LVM_AUTO)
            return fail(error, LVM_INVALID, "rule \"%.*s\" is not PATTERN=f32|f16|bf16|q8_0|q4_0",
                        (int)n, rules);
        if (name.s != NULL && *type == LVM_AUTO && matches(rules, pattern, name)) *type = t;
        rules += n + (rules[n] == ',');
    }
    return LVM_OK;
}

/* What a tensor becomes. Vectors stay as they are; of the tokenizer the first convolutions, those
   at the codebook and the codebook itself are never quantised, because tokens hang on them. Q4_0
   leaves the matrix of the logits at Q8_0: it costs little and is worth half a percent of
   perplexity. */
static int target_type(const struct gguf *g, const struct gguf_tensor *t, int type, int vq_type,
                       int ruled) {
    int in_vq = t->name.n > 3 && memcmp(t->name.s, "vq.", 3) == 0;
    int wanted = ruled != LVM_AUTO ? ruled : in_vq ? vq_type : type;
    if (t->n_dims == 1 || wanted == LVM_AUTO) return t->type;
    int fixed = text_is(t->name, "vq.quantize.embedding.weight") ||
                text_is(t->name, "vq.quant_conv.weight") ||
                text_is(t->name, "vq.post_quant_conv.weight") ||
                text_is(t->name, "vq.encoder.conv_in.weight") ||
                text_is(t->name, "vq.decoder.conv_in.weight");
    if (fixed && type_is_quantised(wanted)) return t->type;
    int tied = gguf_tensor(g, "output.weight") == NULL;
    int is_output = text_is(t->name, tied ? "token_embd.weight" : "output.weight");
    if (wanted == LVM_Q4_0 && (in_vq || (is_output && ruled == LVM_AUTO))) wanted = LVM_Q8_0;
    if (t->ne[0] % type_info(wanted)->block != 0) return LVM_F16;
    return wanted;
}

static int write_number(struct outfile *out, uint64_t v, int bytes, lvm_error *error) {
    uint8_t b[8];
    for (int i = 0; i < bytes; i++) b[i] = (uint8_t)(v >> 8 * i);
    return outfile_write(out, b, (size_t)bytes, error);
}

static int write_text(struct outfile *out, struct text t, lvm_error *error) {
    int code = write_number(out, t.n, 8, error);
    return code == LVM_OK ? outfile_write(out, t.s, (size_t)t.n, error) : code;
}

static int write_padding(struct outfile *out, uint64_t written, uint32_t alignment,
                         lvm_error *error) {
    static const uint8_t zeros[64];
    uint64_t n = (alignment - written % alignment) % alignment;
    int code = LVM_OK;
    for (; n > 0 && code == LVM_OK; n -= (uint64_t)min64(64, (int64_t)n))
        code = outfile_write(out, zeros, (size_t)min64(64, (int64_t)n), error);
    return code;
}

/* Everything in front of the data: keys as they are, tensors with their new types. */
static int write_head(struct outfile *out, const struct gguf *g, const int *types,
                      lvm_error *error) {
    int code = outfile_write(out, "GGUF", 4, error);
    if (code == LVM_OK) code = write_number(out, 3, 4, error);
    if (code == LVM_OK) code = write_number(out, (uint64_t)g->n_tensors, 8, error);
    if (code == LVM_OK) code = write_number(out, (uint64_t)g->n_keys, 8, error);
    for (int64_t i = 0; code == LVM_OK && i < g->n_keys; i++) {
        code = write_text(out, g->keys[i].name, error);
        if (code == LVM_OK) code = write_number(out, g->keys[i].type, 4, error);
        if (code == LVM_OK) code = outfile_write(out, g->keys[i].value, g->keys[i].size, error);
    }
    uint64_t offset = 0;
    for (int64_t i = 0; code == LVM_OK && i < g->n_tensors; i++) {
        const struct gguf_tensor *t = &g->tensors[i];
        code = write_text(out, t->name, error);
        if (code == LVM_OK) code = write_number(out, (uint64_t)t->n_dims, 4, error);
        for (int d = 0; code == LVM_OK && d < t->n_dims; d++)
            code = write_number(out, (uint64_t)t->ne[d], 8, error);
        if (code == LVM_OK) code = write_number(out, (uint64_t)types[i], 4, error);
        if (code == LVM_OK) code = write_number(out, offset, 8, error);
        offset +=
            (uint64_t)type_bytes(types[i], t->ne[0]) * (uint64_t)(t->ne[1] * t->ne[2] * t->ne[3]);
        offset = (offset + g->alignment - 1) / g->alignment * g->alignment;
    }
    if (code == LVM_OK) code = write_padding(out, (uint64_t)ftello(out->file), g->alignment, error);
    return code;
}

static int write_tensor(struct outfile *out, const struct gguf *g, const struct gguf_tensor *t,
                        int type, float *row, uint8_t *packed, lvm_error *error) {
    const uint8_t *in = g->data + g->data_start + t->offset;
    int64_t rows = t->ne[1] * t->ne[2] * t->ne[3], in_bytes = type_bytes(t->type, t->ne[0]);
    int64_t out_bytes = type_bytes(type, t->ne[0]);
    int code = LVM_OK;
    if (type == t->type) {
        code = outfile_write(out, in, (size_t)t->bytes, error);
    } else {
        for (int64_t r = 0; code == LVM_OK && r < rows; r++, in += in_bytes) {
            row_to_f32(t->type, in, row, t->ne[0]);
            row_from_f32(type, row, packed, t->ne[0]);
            code = outfile_write(out, packed, (size_t)out_bytes, error);
        }
    }
    if (code == LVM_OK)
        code = write_padding(out, (uint64_t)(out_bytes * rows), g->alignment, error);
    return code;
}

static int quantize_file(const struct gguf *g, const char *path, int type, int vq_type,
                         const char *rules, lvm_error *error) {
    struct outfile out;
    int64_t widest = 1;
    for (int64_t i = 0; i < g->n_tensors; i++) widest = max64(widest, g->tensors[i].ne[0]);
    int *types = mem_alloc((size_t)g->n_tensors, sizeof *types, error);
    float *row = mem_alloc((size_t)widest, sizeof *row, error);
    uint8_t *packed = mem_alloc((size_t)widest, 4, error);
    int code = types == NULL || row == NULL || packed == NULL ? LVM_MEMORY : LVM_OK;
    for (int64_t i = 0; code == LVM_OK && i < g->n_tensors; i++) {
        int ruled = LVM_AUTO;
        code = rule_type(rules, g->tensors[i].name, &ruled, error);
        types[i] = target_type(g, &g->tensors[i], type, vq_type, ruled);
    }
    if (code == LVM_OK) code = outfile_open(&out, path, error);
    if (code == LVM_OK) {
        code = write_head(&out, g, types, error);
        for (int64_t i = 0; code == LVM_OK && i < g->n_tensors; i++)
            code = write_tensor(&out, g, &g->tensors[i], types[i], row, packed, error);
        code = outfile_close(&out, code, error);
    }
    mem_free(types);
    mem_free(row);
    mem_free(packed);
    return code;
}

/* 1 when both paths name the same existing file. */
static int same_file(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

int lvm_quantize(const char *in, const char *out, int type, int vq_type, const char *rules,
                 int force, lvm_error *error) {
    struct stat st;
    int ruled = LVM_AUTO;
    if (same_file(in, out))
        return fail(error, LVM_INVALID, "%s: is the input too; choose another", out);
    int exists = stat(out, &st) == 0;
    if (exists && !S_ISREG(st.st_mode))
        return fail(error, LVM_INVALID, "%s: is no regular file; choose another output", out);
    if (exists && !force) return fail(error, LVM_INVALID, "%s: exists; --force replaces it", out);
    if ((type != LVM_AUTO && type_info(type) == NULL) ||
        (vq_type != LVM_AUTO && type_info(vq_type) == NULL))
        return fail(error, LVM_INVALID, "unknown type %d or %d", type, vq_type);
    int code = rule_type(rules, (struct text){NULL, 0}, &ruled, error);
    if (code != LVM_OK) return code;
    lvm_model *m = lvm_open(in, 0, error);
    if (m == NULL) return error != NULL ? error->code : LVM_FORMAT;
    code = quantize_file(&m->file, out, type, vq_type, rules, error);
    lvm_close(m);
    return code;
}

/* =================================================================================================
   Chapter 5.  The tokenizer: VQGAN encoder, quantiser, decoder

   A VQGAN (Esser, Rombach and Ommer 2021, arXiv 2012.09841) turns R x R pixels into S x S codes and
   back. Configuration, parameter names and behaviour are those of the published class (open-muse's
   VQGANModel, itself after taming-transformers):

       encoder   conv_in, then levels of residual blocks, each level but the last ending at half the
                 size; a middle of two residual blocks around an attention; norm, SiLU, conv_out
       quantiser every S x S vector becomes the index of the nearest row of the codebook
       decoder   the mirror image, with one residual block more a level, doubling the size

       residual  y = x + conv2(silu(norm2(conv1(silu(norm1(x))))));  x by a 1 x 1 conv if needed
       norm      GroupNorm: 32 groups of channels share mean and variance over all pixels, eps 1e-6
       attention one head over all pixels, as wide as the channels

   Maps of activations are NHWC: map[y][x][c], so a pixel's channels are contiguous and a
   convolution is a sum of products over contiguous pieces,

       out[p][o] = bias[o] + sum over taps t, channels i of  in[p + t][i] * w[o][t][i],

   nine outer products of a pixel strip with packed weights. No patch matrix is built: a tap is a
   row of pointers, those that fall outside point to zeros, and nearest-neighbour doubling before a
   convolution is only another way to compute the pointers. */

enum {
    CONV_PIXELS = 48,      /* output pixels of a task: a multiple of every outer_rows */
    CONV_PIECE = 48 << 10, /* floats of packed weights worked on at a time: less than an L2 cache */
    NORM_PIXELS = 1024,    /* pixels of a task that sums channels */
    GROUPS = 32
};

/* Where the sum for an output pixel takes its inputs. */
struct sampling_grid {
    int h_in, w_in, h, w; /* sizes of input and output */
    int stride, up, pad;  /* input row of tap t: (y * stride + t - pad) >> up */
};

struct vq_work {
    float *x, *t1, *t2;         /* maps, each as large as the largest one */
    int h, w, c;                /* shape of x */
    float *packed, *zeros;      /* a piece of packed weights; channels of a pixel outside */
    double *sums;               /* [tasks][2][c] of a GroupNorm */
    float *scale, *shift;       /* [c] */
    float *q, *k, *v, *kp, *vp; /* maps of an attention, keys in panels, values in strips */
    float *scores, *norms;      /* [64][codes] and [codes] of the quantiser */
    int64_t done, all;          /* progress */
    const char *stage;
};

struct conv_job {
    const struct exec *e;
    const struct conv *conv;
    const struct vq_work *work;
    struct sampling_grid g;
    const float *in, *residual;
    float *out;
    int strip0, strips; /* of the piece at hand */
};

/* Packs 16 output channels: strip[t * c_in + i][16]. Channels beyond c_out get zeros. */
static void pack_conv_task(void *arg, int task, int thread) {
    const struct conv_job *job = arg;
    const struct tensor *w = &job->conv->w;
    int j0 = (job->strip0 + task) * STRIP, n = w->rows - j0 < STRIP ? w->rows - j0 : STRIP;
    float *rows = exec_scratch(job->e, thread),
          *out = job->work->packed + (int64_t)task * w->cols * STRIP;
    memset(rows, 0, (size_t)w->cols * STRIP * sizeof *rows);
    for (int j = 0; j < n; j++)
        job->e->k->to_f32(w->type, tensor_row(w, j0 + j), rows + (int64_t)j * w->cols, w->cols);
    for (int k = 0; k < w->cols; k++)
        for (int j = 0; j < STRIP; j++) out[k * STRIP + j] = rows[(int64_t)j * w->cols + k];
}

/* a[t][i]: the input channels under tap t of output pixel p0 + i. */
static void tap_pointers(const struct conv_job *job, int p0, int n,
                         const float *a[9][CONV_PIXELS]) {
    const struct sampling_grid *g = &job->g;
    int size = job->conv->size, c = job->conv->c_in;
    for (int i = 0; i < n; i++) {
        int y = (p0 + i) / g->w * g->stride - g->pad, x = (p0 + i) % g->w * g->stride - g->pad;
        for (int t = 0; t < size * size; t++) {
            int ty = y + t / size, tx = x + t % size;
            int inside = ty >= 0 && tx >= 0 && ty >> g->up < g->h_in && tx >> g->up < g->w_in;
            a[t][i] = inside ? job->in + ((int64_t)(ty >> g->up) * g->w_in + (tx >> g->up)) * c
                             : job->work->zeros;
        }
    }
}

static void conv_task(void *arg, int task, int thread) {
    const struct conv_job *job = arg;
    const struct conv *conv = job->conv;
    int p0 = task * CONV_PIXELS, n = job->g.h * job->g.w - p0, taps = conv->size * conv->size;
    const float *a[9][CONV_PIXELS];
    float sum[CONV_PIXELS * STRIP];
    (void)thread;
    if (n > CONV_PIXELS) n = CONV_PIXELS;
    tap_pointers(job, p0, n, a);
    for (int s = 0; s < job->strips; s++) {
        const float *w = job->work->packed + (int64_t)s * conv->w.cols * STRIP;
        for (int t = 0; t < taps; t++, w += conv->c_in * STRIP)
            outer_rows(job->e->k, n, conv->c_in, a[t], w, 0, 1, sum, STRIP, t > 0);
        int j0 = (job->strip0 + s) * STRIP,
            cols = conv->c_out - j0 < STRIP ? conv->c_out - j0 : STRIP;
        for (int i = 0; i < n; i++) {
            int64_t at = (int64_t)(p0 + i) * conv->c_out + j0;
            for (int j = 0; j < cols; j++) {
                float v = sum[i * STRIP + j] + conv->bias[j0 + j];
                job->out[at + j] = job->residual != NULL ? v + job->residual[at + j] : v;
            }
        }
    }
}

/* out = conv(in) + residual; residual may be NULL or out itself. */
static void run_conv(const struct exec *e, const struct vq_work *work, const struct conv *conv,
                     struct sampling_grid g, const float *in, const float *residual, float *out) {
    struct conv_job job = {e, conv, work, g, in, residual, out, 0, 0};
    int strips = (conv->c_out + STRIP - 1) / STRIP;
    int piece = (int)max64(1, CONV_PIECE / ((int64_t)conv->w.cols * STRIP));
    for (; job.strip0 < strips; job.strip0 += piece) {
        job.strips = strips - job.strip0 < piece ? strips - job.strip0 : piece;
        pool_run(e->pool, job.strips, pack_conv_task, &job);
        pool_run(e->pool, (g.h * g.w + CONV_PIXELS - 1) / CONV_PIXELS, conv_task, &job);
    }
}

static struct sampling_grid same_grid(const struct vq_work *w, int size) {
    return (struct sampling_grid){w->h, w->w, w->h, w->w, 1, 0, size / 2};
}

/* x = conv(x) on a given grid. */
static void conv_x(const struct exec *e, struct vq_work *w, const struct conv *conv,
                   struct sampling_grid g) {
    run_conv(e, w, conv, g, w->x, NULL, w->t2);
    float *swap = w->x;
    w->x = w->t2;
    w->t2 = swap;
    w->h = g.h;
    w->w = g.w;
    w->c = conv->c_out;
}

/* ---- GroupNorm ---- */

struct norm_job {
    const struct exec *e;
    const struct vq_work *work;
    const float *in;
    float *out;
    int64_t pixels;
    int c, silu;
};

/* Sums and sums of squares of each channel over NORM_PIXELS pixels: floats over 64 pixels, doubles
   from there on. */
static void norm_sum_task(void *arg, int task, int thread) {
    const struct norm_job *job = arg;
    int64_t first = (int64_t)task * NORM_PIXELS, last = min64(job->pixels, first + NORM_PIXELS);
    double *sum = job->work->sums + (int64_t)task * 2 * job->c, *square = sum + job->c;
    float *s = exec_scratch(job->e, thread), *q = s + job->c;
    memset(sum, 0, 2 * (size_t)job->c * sizeof *sum);
    for (; first < last; first += 64) {
        job->e->k->channel_sums(job->in + first * job->c, min64(64, last - first), job->c, s, q);
        for (int i = 0; i < job->c; i++) sum[i] += s[i], square[i] += q[i];
    }
}

static void norm_apply_task(void *arg, int task, int thread) {
    const struct norm_job *job = arg;
    int64_t first = (int64_t)task * NORM_PIXELS, n = min64(NORM_PIXELS, job->pixels - first);
    (void)thread;
    job->e->k->norm_rows(job->in + first * job->c, job->work->scale, job->work->shift, job->silu, n,
                         job->c, job->out + first * job->c);
}

/* out = norm(in), then SiLU if asked. The normalisation is one multiply-add a channel:
   (x - mean) / sqrt(var + eps) * weight + bias = x * scale + shift. */
static void group_norm(const struct exec *e, const struct vq_work *w, const struct norm *norm,
                       const float *in, int silu, float *out) {
    int64_t pixels = (int64_t)w->h * w->w;
    struct norm_job job = {e, w, in, out, pixels, norm->c, silu};
    int tasks = (int)((pixels + NORM_PIXELS - 1) / NORM_PIXELS), width = norm->c / GROUPS;
    pool_run(e->pool, tasks, norm_sum_task, &job);
    for (int g = 0; g < GROUPS; g++) {
        double sum = 0, square = 0, count = (double)pixels * width;
        for (int t = 0; t < tasks; t++)
            for (int i = g * width; i < (g + 1) * width; i++) {
                sum += w->sums[(int64_t)t * 2 * norm->c + i];
                square += w->sums[((int64_t)t * 2 + 1) * norm->c + i];
            }
        double mean = sum / count, variance = square / count - mean * mean;
        double r = 1 / sqrt((variance > 0 ? variance : 0) + 1e-6);
        for (int i = g * width; i < (g + 1) * width; i++) {
            w->scale[i] = (float)(norm->weight[i] * r);
            w->shift[i] = (float)(norm->bias[i] - mean * norm->weight[i] * r);
        }
    }
    pool_run(e->pool, tasks, norm_apply_task, &job);
}

/* ---- Blocks ---- */

static void run_res_block(const struct exec *e, struct vq_work *w, const struct res_block *b) {
    struct sampling_grid grid = same_grid(w, 3);
    group_norm(e, w, &b->norm1, w->x, 1, w->t1);
    run_conv(e, w, &b->conv1, grid, w->t1, NULL, w->t2);
    group_norm(e, w, &b->norm2, w->t2, 1, w->t1);
    const float *residual = w->x;
    if (b->shortcut.c_out != 0) {
        run_conv(e, w, &b->shortcut, same_grid(w, 1), w->x, NULL, w->t2);
        residual = w->t2;
    }
    run_conv(e, w, &b->conv2, grid, w->t1, residual, w->t2);
    float *swap = w->x;
    w->x = w->t2;
    w->t2 = swap;
    w->c = b->conv2.c_out;
}

struct spatial_job {
    const struct exec *e;
    const struct vq_work *w;
    int n, c;
};

/* Lays 256 keys and values out as attend_block wants them; keys beyond n are zeros. */
static void pack_keys_task(void *arg, int block, int thread) {
    const struct spatial_job *job = arg;
    const struct vq_work *w = job->w;
    int64_t c = job->c, first = (int64_t)block * KEYS;
    float *kp = w->kp + first * c, *vp = w->vp + first * c;
    (void)thread;
    for (int key = 0; key < KEYS; key++)
        for (int i = 0; i < c; i++) {
            int inside = first + key < job->n;
            int64_t from = (first + key) * c + i;
            kp[((key / STRIP) * c + i) * STRIP + key % STRIP] = inside ? w->k[from] : 0;
            vp[((i / STRIP) * KEYS + key) * STRIP + i % STRIP] = inside ? w->v[from] : 0;
        }
}

static void spatial_task(void *arg, int task, int thread) {
    const struct spatial_job *job = arg;
    int64_t c = job->c;
    int r0 = task * QUERY_ROWS, n = job->n - r0 < QUERY_ROWS ? job->n - r0 : QUERY_ROWS;
    struct query rows[QUERY_ROWS];
    for (int r = 0; r < n; r++) {
        float *o = job->w->t1 + (r0 + r) * c;
        memset(o, 0, (size_t)c * sizeof *o);
        rows[r] = (struct query){job->w->q + (r0 + r) * c, o, -HUGE_VALF, 0, 0};
    }
    for (int first = 0; first < job->n; first += KEYS) {
        for (int r = 0; r < n; r++) rows[r].keys = job->n - first < KEYS ? job->n - first : KEYS;
        attend_block(job->e->k, rows, n, job->c, job->w->kp + first * c, job->w->vp + first * c,
                     1 / sqrtf((float)c), exec_scratch(job->e, thread));
    }
    for (int r = 0; r < n; r++)
        for (int i = 0; i < c; i++) rows[r].o[i] /= rows[r].l;
}

static void run_attn_block(const struct exec *e, struct vq_work *w, const struct attn_block *b) {
    struct sampling_grid grid = same_grid(w, 1);
    struct spatial_job job = {e, w, w->h * w->w, w->c};
    group_norm(e, w, &b->norm, w->x, 0, w->t1);
    run_conv(e, w, &b->q, grid, w->t1, NULL, w->q);
    run_conv(e, w, &b->k, grid, w->t1, NULL, w->k);
    run_conv(e, w, &b->v, grid, w->t1, NULL, w->v);
    pool_run(e->pool, (job.n + KEYS - 1) / KEYS, pack_keys_task, &job);
    pool_run(e->pool, (job.n + QUERY_ROWS - 1) / QUERY_ROWS, spatial_task, &job);
    run_conv(e, w, &b->proj, grid, w->t1, w->x, w->x);
}

/* Halves the size: a convolution of stride 2 over the map with a row and a column of zeros behind
   it, or the mean of four pixels. */
static void run_downsample(const struct exec *e, struct vq_work *w, const struct level *l) {
    int h = w->h / 2, width = w->w / 2, c = w->c;
    if (l->conv.c_out != 0) {
        conv_x(e, w, &l->conv, (struct sampling_grid){w->h, w->w, h, width, 2, 0, 0});
        return;
    }
    for (int y = 0; y < h; y++)
        for (int x = 0; x < width; x++)
            for (int i = 0; i < c; i++) {
                const float *p = w->x + ((int64_t)2 * y * w->w + 2 * x) * c + i;
                float sum = p[0] + p[c] + p[(int64_t)w->w * c] + p[(int64_t)(w->w + 1) * c];
                w->t1[((int64_t)y * width + x) * c + i] = sum * 0.25f;
            }
    float *swap = w->x;
    w->x = w->t1;
    w->t1 = swap;
    w->h = h;
    w->w = width;
}

/* Doubles the size: each pixel four times, then a convolution or nothing. */
static void run_upsample(const struct exec *e, struct vq_work *w, const struct level *l) {
    int h = w->h * 2, width = w->w * 2;
    if (l->conv.c_out != 0) {
        conv_x(e, w, &l->conv, (struct sampling_grid){w->h, w->w, h, width, 1, 1, 1});
        return;
    }
    for (int y = 0; y < h; y++)
        for (int x = 0; x < width; x++)
            memcpy(w->t1 + ((int64_t)y * width + x) * w->c,
                   w->x + ((int64_t)(y / 2) * w->w + x / 2) * w->c, (size_t)w->c * sizeof *w->x);
    float *swap = w->x;
    w->x = w->t1;
    w->t1 = swap;
    w->h = h;
    w->w = width;
}

static int vq_step(const struct exec *e, struct vq_work *w, lvm_error *error) {
    return report(e, w->stage, w->done++, w->all, error);
}

static int run_level(const struct exec *e, struct vq_work *w, const struct level *l,
                     lvm_error *error) {
    for (int b = 0; b < l->n_blocks; b++) {
        int code = vq_step(e, w, error);
        if (code != LVM_OK) return code;
        run_res_block(e, w, &l->block[b]);
        if (l->has_attn) run_attn_block(e, w, &l->attn[b]);
    }
    return LVM_OK;
}

static int run_middle(const struct exec *e, struct vq_work *w, const struct half *half,
                      lvm_error *error) {
    int code = vq_step(e, w, error);
    if (code != LVM_OK) return code;
    run_res_block(e, w, &half->mid1);
    if (half->has_mid_attn) run_attn_block(e, w, &half->mid_attn);
    run_res_block(e, w, &half->mid2);
    return LVM_OK;
}

/* x = conv_out(silu(norm_out(x))) */
static void run_tail(const struct exec *e, struct vq_work *w, const struct half *half) {
    group_norm(e, w, &half->norm_out, w->x, 1, w->t1);
    float *swap = w->x;
    w->x = w->t1;
    w->t1 = swap;
    conv_x(e, w, &half->conv_out, same_grid(w, 3));
}

/* ---- The quantiser ---- */

/* ids[n]: for each vector the nearest row of the codebook, |e|^2 - 2 x e being smallest; of equal
   ones the first. */
static void nearest_codes(const struct exec *e, const struct vqgan *vq, const struct vq_work *w,
                          const float *x, int n, int32_t *ids) {
    struct exec exact = *e;
    exact.exact = 1;
    for (int r0 = 0; r0 < n; r0 += 64) {
        int rows = n - r0 < 64 ? n - r0 : 64;
        linear(&exact, &vq->codebook, NULL, x + (int64_t)r0 * vq->e, rows, w->scores);
        for (int r = 0; r < rows; r++) {
            const float *s = w->scores + (int64_t)r * vq->codes;
            float best = HUGE_VALF;
            ids[r0 + r] = 0;
            for (int i = 0; i < vq->codes; i++) {
                float distance = w->norms[i] - 2 * s[i];
                if (distance < best) best = distance, ids[r0 + r] = i;
            }
        }
    }
}

/* ---- The two directions ---- */

/* rgb[R][R][3] in [0,1] -> latent vectors in w->x [S*S][e]. */
static int vq_latent(const struct exec *e, const struct vqgan *vq, struct vq_work *w,
                     const float *rgb, lvm_error *error) {
    w->h = w->w = vq->R;
    w->c = 3;
    memcpy(w->x, rgb, (size_t)vq->R * (size_t)vq->R * 3 * sizeof *rgb);
    conv_x(e, w, &vq->encoder.conv_in, same_grid(w, 3));
    for (int i = 0; i < vq->n_levels; i++) {
        int code = run_level(e, w, &vq->encoder.level[i], error);
        if (code != LVM_OK) return code;
        if (vq->encoder.level[i].resample) run_downsample(e, w, &vq->encoder.level[i]);
    }
    int code = run_middle(e, w, &vq->encoder, error);
    if (code != LVM_OK) return code;
    run_tail(e, w, &vq->encoder);
    conv_x(e, w, &vq->quant, same_grid(w, 1));
    return LVM_OK;
}

/* ids[S*S] -> pixels in w->x [R][R][3], not clamped. */
static int vq_pixels(const struct exec *e, const struct vqgan *vq, struct vq_work *w,
                     const int32_t *ids, lvm_error *error) {
    w->h = w->w = vq->S;
    w->c = vq->e;
    for (int p = 0; p < vq->S * vq->S; p++)
        e->k->to_f32(vq->codebook.type, tensor_row(&vq->codebook, ids[p]),
                     w->x + (int64_t)p * vq->e, vq->e);
    conv_x(e, w, &vq->post_quant, same_grid(w, 1));
    conv_x(e, w, &vq->decoder.conv_in, same_grid(w, 3));
    int code = run_middle(e, w, &vq->decoder, error);
    for (int i = vq->n_levels - 1; code == LVM_OK && i >= 0; i--) {
        code = run_level(e, w, &vq->decoder.level[i], error);
        if (code == LVM_OK && vq->decoder.level[i].resample)
            run_upsample(e, w, &vq->decoder.level[i]);
    }
    if (code == LVM_OK) run_tail(e, w, &vq->decoder);
    return code;
}

/* ---- Memory ---- */

static void vq_work_free(struct vq_work *w) {
    float *all[] = {w->x,     w->t1, w->t2, w->packed, w->zeros, w->scale,  w->shift,
                    w->q,     w->k,  w->v,  w->kp,     w->vp,    w->scores, w->norms};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) mem_free(all[i]);
    mem_free(w->sums);
    memset(w, 0, sizeof *w);
}

/* The largest numbers that the walk through a VQGAN meets. */
struct vq_sizes {
    int64_t map, attn, cols;
    int c;
};

static void vq_sizes_add(struct vq_sizes *s, int64_t side, int c, int has_attn) {
    s->map = max64(s->map, side * side * c);
    s->c = (int)max64(s->c, c);
    s->cols = max64(s->cols, 9 * (int64_t)c);
    if (has_attn) s->attn = max64(s->attn, (side * side + KEYS - 1) / KEYS * KEYS * c);
}

static struct vq_sizes vq_sizes(const struct vqgan *vq) {
    struct vq_sizes s = {0};
    int c = vq->hidden * vq->mult[vq->n_levels - 1];
    vq_sizes_add(&s, vq->R, 3, 0);
    vq_sizes_add(&s, vq->R, vq->hidden, 0);
    vq_sizes_add(&s, vq->S, vq->z, 0);
    vq_sizes_add(&s, vq->S, vq->e, 0);
    vq_sizes_add(&s, vq->S, c, !vq->no_mid_attn);
    for (int i = 0; i < vq->n_levels; i++) {
        const struct level *down = &vq->encoder.level[i], *up = &vq->decoder.level[i];
        vq_sizes_add(&s, vq->R >> i, down->c, down->has_attn || up->has_attn);
        if (i > 0) vq_sizes_add(&s, vq->R >> (i - 1), down->c, 0); /* what a doubling leaves */
    }
    return s;
}

/* Scratch floats a thread needs for the tokenizer. */
static int64_t vq_scratch(const struct vqgan *vq, const struct kernels *k) {
    struct vq_sizes s = vq_sizes(vq);
    int64_t floats = max64(s.cols * STRIP, linear_scratch(k, vq->e));
    return max64(floats, attend_scratch(s.c));
}

static int vq_work_alloc(struct vq_work *w, const struct exec *e, const struct vqgan *vq,
                         lvm_error *error) {
    struct vq_sizes s = vq_sizes(vq);
    int64_t tasks = ((int64_t)vq->R * vq->R + NORM_PIXELS - 1) / NORM_PIXELS;
    struct { float **p; int64_t n;
    } want[] = {{&w->x, s.map},
                {&w->t1, s.map},
                {&w->t2, s.map},
                {&w->packed, max64(CONV_PIECE, s.cols * STRIP)},
                {&w->zeros, s.c},
                {&w->scale, s.c},
                {&w->shift, s.c},
                {&w->q, s.attn},
                {&w->k, s.attn},
                {&w->v, s.attn},
                {&w->kp, s.attn},
                {&w->vp, s.attn},
                {&w->scores, 64 * (int64_t)vq->codes},
                {&w->norms, vq->codes}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        *want[i].p = mem_alloc((size_t)want[i].n, sizeof(float), error);
        if (*want[i].p == NULL) return LVM_MEMORY;
    }
    w->sums = mem_alloc((size_t)(tasks * 2 * s.c), sizeof *w->sums, error);
    if (w->sums == NULL) return LVM_MEMORY;
    for (int i = 0; i < vq->codes; i++) {
        double sum = 0;
        e->k->to_f32(vq->codebook.type, tensor_row(&vq->codebook, i), e->scratch, vq->e);
        for (int j = 0; j < vq->e; j++) sum += (double)e->scratch[j] * e->scratch[j];
        w->norms[i] = (float)sum;
    }
    return LVM_OK;
}

/* =================================================================================================
   Chapter 6.  The transformer: RMSNorm, RoPE, attention with a KV cache, SwiGLU

   LLaMA's decoder (Touvron et al. 2023, arXiv 2302.13971), as Hugging Face's LlamaForCausalLM
   computes it. For each layer and each row x, one token at position p:

       h = rmsnorm(x);  q, k, v = Wq h, Wk h, Wv h  (+ biases)
       rotate q and k by RoPE (Su et al. 2021): dimensions i and i + d/2 of a head turn as a pair by
           the angle p * theta^(-2i/d), computed in float32 as the checkpoints' authors did
       x += Wo attention(q, keys 0..p, values 0..p)    query head j reads key/value head j G / H
       h = rmsnorm(x);  x += Wdown (silu(Wgate h) * (Wup h))
   and at the end  logits = Wout rmsnorm(x).

   The KV cache is made of pages of 256 positions, the same 256 that attention merges as a block. A
   sequence is a list of pages; sequences that begin alike share them, and a shared page is copied
   before it is written (candidates of one prompt differ only behind it). In a page, for each layer
   and key/value head, keys lie in panels and values in strips (see attend_block), in one of three
   types:

       f32, f16   k[16 panels][d][16 keys]              v[d / 16][256 keys][16]
       q8_0       k[16 panels][d / 32] of {f16 scale[16 keys], int8 [32][16 keys]}
                  v[d / 32][256 keys] of q8_0 blocks
   with d rounded up to a multiple of 32, zeros beyond. */

enum {
    ROWS = 512,          /* rows that pass the layers together */
    MAX_SEQUENCES = 64   /* candidates that decode together */
};

struct page {
    int refs; /* sequences that use it */
    uint8_t *data;
};

struct sequence {
    int n;               /* tokens in the cache */
    struct page **pages; /* [max_pages]; NULL where not yet needed */
};

struct kv_cache {
    int type, dp, max_pages;      /* dp: width of a head, padded */
    int64_t head_bytes;           /* keys (or values) of one head of one layer in a page */
    size_t page_bytes;
    struct sequence seq[MAX_SEQUENCES];
};

struct lm_work {
    float *x, *h, *delta;         /* [ROWS][D] */
    float *q, *k, *v;             /* [ROWS][H d]  [ROWS][G d]  [ROWS][G d] */
    float *qp, *op;               /* [ROWS][H][dp]: padded queries, attention's answers */
    float *o;                     /* [ROWS][H d] */
    float *gate, *up;             /* [ROWS][F] */
    float *rope;                  /* [ROWS][2][d / 2]: cosines, sines */
    float *inv_freq;              /* [d / 2] */
    struct kv_cache kv;
};

/* ---- The cache ---- */

static void page_release(struct page **slot) {
    struct page *p = *slot;
    *slot = NULL;
    if (p == NULL || --p->refs > 0) return;
    mem_free(p->data);
    mem_free(p);
}

static struct page *page_new(const struct kv_cache *kv, lvm_error *error) {
    struct page *p = mem_alloc(1, sizeof *p, error);
    if (p == NULL) return NULL;
    p->refs = 1;
    p->data = mem_alloc(1, kv->page_bytes, error);
    if (p->data != NULL) return p;
    mem_free(p);
    return NULL;
}

/* Makes the page of position pos present and private to the sequence. */
static int page_for_writing(const struct kv_cache *kv, struct sequence *s, int pos,
                            lvm_error *error) {
    struct page **slot = &s->pages[pos / KEYS];
    if (*slot != NULL && (*slot)->refs == 1) return LVM_OK;
    struct page *fresh = page_new(kv, error);
    if (fresh == NULL) return LVM_MEMORY;
    if (*slot != NULL) memcpy(fresh->data, (*slot)->data, kv->page_bytes);
    page_release(slot);
    *slot = fresh;
    return LVM_OK;
}

static void sequence_trim(const struct kv_cache *kv, struct sequence *s, int n) {
    if (n >= s->n) return;
    s->n = n;
    for (int i = (n + KEYS - 1) / KEYS; i < kv->max_pages; i++) page_release(&s->pages[i]);
}

static uint8_t *page_head(const struct kv_cache *kv, const struct page *p, const struct llama *a,
                          int layer, int g, int values) {
    return p->data + (((int64_t)layer * a->G + g) * 2 + values) * kv->head_bytes;
}

/* Writes one key of dp floats into slot `at` of a page's head. */
static void store_key(const struct kv_cache *kv, uint8_t *head, int at, const float *k) {
    int panel = at / STRIP, column = at % STRIP;
    if (kv->type == LVM_Q8_0) {
        uint8_t *p = head + (int64_t)panel * (kv->dp / QK) * K8_BYTES;
        for (int b = 0; b < kv->dp / QK; b++, p += K8_BYTES) {
            struct q8_0 block;
            quantize_q8_0(k + b * QK, &block, QK);
            memcpy(p + 2 * column, &block.d, 2);
            for (int i = 0; i < QK; i++) p[2 * STRIP + i * STRIP + column] = (uint8_t)block.q[i];
        }
        return;
    }
    int64_t start = (int64_t)panel * kv->dp * STRIP + column;
    for (int i = 0; i < kv->dp; i++) {
        if (kv->type == LVM_F32) ((float *)(void *)head)[start + i * STRIP] = k[i];
        else ((uint16_t *)(void *)head)[start + i * STRIP] = f32_to_f16(k[i]);
    }
}

static void store_value(const struct kv_cache *kv, uint8_t *head, int at, const float *v) {
    if (kv->type == LVM_Q8_0) {
        struct q8_0 *blocks = (struct q8_0 *)(void *)head;
        for (int b = 0; b < kv->dp / QK; b++) quantize_q8_0(v + b * QK, blocks + b * KEYS + at, QK);
        return;
    }
    for (int s = 0; s < kv->dp / STRIP; s++) {
        int64_t to = ((int64_t)s * KEYS + at) * STRIP;
        row_from_f32(kv->type, v + s * STRIP, head + to * (kv->type == LVM_F32 ? 4 : 2), STRIP);
    }
}

/* The first `keys` keys of a page's head as floats in panels: where they lie, or unpacked to out.
   */
static const float *load_keys(const struct kernels *k, const struct kv_cache *kv,
                              const uint8_t *head, int keys, float *out) {
    int panels = (keys + STRIP - 1) / STRIP;
    if (kv->type == LVM_F32) return (const float *)(const void *)head;
    if (kv->type == LVM_Q8_0) k->k8_to_f32(head, panels * (kv->dp / QK), out);
    else k->to_f32(LVM_F16, head, out, (int64_t)panels * STRIP * kv->dp);
    return out;
}

static const float *load_values(const struct kernels *k, const struct kv_cache *kv,
                                const uint8_t *head, int keys, float *out) {
    if (kv->type == LVM_F32) return (const float *)(const void *)head;
    if (kv->type == LVM_Q8_0) {
        for (int b = 0; b < kv->dp / QK; b++)
            k->v8_to_f32((const struct q8_0 *)(const void *)head + b * KEYS, keys,
                         out + (int64_t)b * 2 * KEYS * STRIP);
        return out;
    }
    for (int s = 0; s < kv->dp / STRIP; s++)
        k->to_f32(LVM_F16, head + (int64_t)s * KEYS * STRIP * 2, out + (int64_t)s * KEYS * STRIP,
                  (int64_t)keys * STRIP);
    return out;
}

/* ---- One pass of rows through the layers ---- */

struct lm_job {
    const struct exec *e;
    const struct llama *a;
    struct lm_work *w;
    const struct layer *layer;
    int layer_index, rows, first;    /* first: of the rows at hand */
    const float *norm;               /* weights of the RMSNorm at hand */
    int has_delta;
    const int32_t *tokens;
    int seq[ROWS], pos[ROWS];
};

static void embed_task(void *arg, int r, int thread) {
    struct lm_job *job = arg;
    const struct llama *a = job->a;
    float *cosines = job->w->rope + (int64_t)r * a->d, *sines = cosines + a->d / 2;
    (void)thread;
    job->e->k->to_f32(a->embed.type, tensor_row(&a->embed, job->tokens[r]),
                      job->w->x + (int64_t)r * a->D, a->D);
    for (int i = 0; i < a->d / 2; i++) {
        double s, c;
        float angle = (float)job->pos[r] * job->w->inv_freq[i];
        sincos_f64(angle, &s, &c);
        cosines[i] = (float)c;
        sines[i] = (float)s;
    }
}

/* x += delta; h = rmsnorm(x) */
static void norm_task(void *arg, int task, int thread) {
    struct lm_job *job = arg;
    int64_t D = job->a->D, at = (job->first + task) * D;
    float *x = job->w->x + at;
    (void)thread;
    for (int64_t i = 0; job->has_delta && i < D; i++) x[i] += job->w->delta[at + i];
    job->e->k->rmsnorm(x, job->norm, job->a->eps, (int)D, job->w->h + at);
}

static void rotate(const float *x, const float *cosines, const float *sines, int d, float *y) {
    int half = d / 2;
    for (int i = 0; i < half; i++) {
        y[i] = x[i] * cosines[i] - x[i + half] * sines[i];
        y[i + half] = x[i + half] * cosines[i] + x[i] * sines[i];
    }
}

/* Rotates a row's queries into their padded place, its key and value into the cache. */
static void rope_store_task(void *arg, int r, int thread) {
    struct lm_job *job = arg;
    const struct llama *a = job->a;
    struct lm_work *w = job->w;
    const struct kv_cache *kv = &w->kv;
    const float *cosines = w->rope + (int64_t)r * a->d, *sines = cosines + a->d / 2;
    float *key = exec_scratch(job->e, thread), *value = key + kv->dp;
    const struct page *page = kv->seq[job->seq[r]].pages[job->pos[r] / KEYS];
    memset(key, 0, 2 * (size_t)kv->dp * sizeof *key);
    for (int h = 0; h < a->H; h++)
        rotate(w->q + ((int64_t)r * a->H + h) * a->d, cosines, sines, a->d,
               w->qp + ((int64_t)r * a->H + h) * kv->dp);
    for (int g = 0; g < a->G; g++) {
        int64_t at = ((int64_t)r * a->G + g) * a->d;
        rotate(w->k + at, cosines, sines, a->d, key);
        memcpy(value, w->v + at, (size_t)a->d * sizeof *value);
        store_key(kv, page_head(kv, page, a, job->layer_index, g, 0), job->pos[r] % KEYS, key);
        store_value(kv, page_head(kv, page, a, job->layer_index, g, 1), job->pos[r] % KEYS, value);
    }
}

/* Rows first..last-1 of a task, all of which read the same page, against that page. */
static void attend_page(struct lm_job *job, const struct page *page, int g, struct query *rows,
                        int n, float *scratch) {
    const struct kv_cache *kv = &job->w->kv;
    const struct kernels *k = job->e->k;
    float *kf = scratch + attend_scratch(kv->dp), *vf = kf + (int64_t)KEYS * kv->dp;
    int keys = 0;
    for (int r = 0; r < n; r++) keys = rows[r].keys > keys ? rows[r].keys : keys;
    const float *kp =
        load_keys(k, kv, page_head(kv, page, job->a, job->layer_index, g, 0), keys, kf);
    const float *vp =
        load_values(k, kv, page_head(kv, page, job->a, job->layer_index, g, 1), keys, vf);
    attend_block(k, rows, n, kv->dp, kp, vp, 1 / sqrtf((float)job->a->d), scratch);
}

/* Query rows of one key/value head: row i of the head is token i / (H/G), query head i % (H/G).
   Each block of keys is read once for all neighbouring rows that share its page. */
static void attention_task(void *arg, int task, int thread) {
    struct lm_job *job = arg;
    const struct llama *a = job->a;
    const struct kv_cache *kv = &job->w->kv;
    int group = a->H / a->G, all = job->rows * group, chunks = (all + QUERY_ROWS - 1) / QUERY_ROWS;
    int g = task / chunks, i0 = task % chunks * QUERY_ROWS, last = 0;
    int n = all - i0 < QUERY_ROWS ? all - i0 : QUERY_ROWS;
    struct query rows[QUERY_ROWS];
    for (int i = 0; i < n; i++) {
        int r = (i0 + i) / group, h = g * group + (i0 + i) % group;
        int64_t at = ((int64_t)r * a->H + h) * kv->dp;
        memset(job->w->op + at, 0, (size_t)kv->dp * sizeof(float));
        rows[i] = (struct query){job->w->qp + at, job->w->op + at, -HUGE_VALF, 0, 0};
        last = job->pos[r] > last ? job->pos[r] : last;
    }
    for (int b = 0; b <= last / KEYS; b++)
        for (int i = 0; i < n;) {
            const struct page *page = kv->seq[job->seq[(i0 + i) / group]].pages[b];
            int j = i;
            for (; j < n; j++) {
                int r = (i0 + j) / group, keys = job->pos[r] + 1 - b * KEYS;
                if (keys <= 0 || kv->seq[job->seq[r]].pages[b] != page) break;
                rows[j].keys = keys < KEYS ? keys : KEYS;
            }
            if (j > i) attend_page(job, page, g, rows + i, j - i, exec_scratch(job->e, thread));
            i = j > i ? j : i + 1;
        }
    for (int i = 0; i < n; i++) {
        int r = (i0 + i) / group, h = g * group + (i0 + i) % group;
        float *o = job->w->o + ((int64_t)r * a->H + h) * a->d;
        for (int k = 0; k < a->d; k++) o[k] = rows[i].o[k] / rows[i].l;
    }
}

static void swiglu_task(void *arg, int r, int thread) {
    struct lm_job *job = arg;
    int64_t F = job->a->F;
    (void)thread;
    job->e->k->silu_mul(job->w->gate + r * F, job->w->up + r * F, F);
}

static void norm_all(struct lm_job *job, const float *weights, int first, int has_delta) {
    job->norm = weights;
    job->first = first;
    job->has_delta = has_delta;
    pool_run(job->e->pool, job->rows - first, norm_task, job);
}

static void run_layer(struct lm_job *job) {
    const struct exec *e = job->e;
    const struct llama *a = job->a;
    const struct layer *l = job->layer;
    struct lm_work *w = job->w;
    int rows = job->rows, group = a->H / a->G;
    norm_all(job, l->attn_norm, 0, job->layer_index > 0);
    linear(e, &l->q, l->q_bias, w->h, rows, w->q);
    linear(e, &l->k, l->k_bias, w->h, rows, w->k);
    linear(e, &l->v, l->v_bias, w->h, rows, w->v);
    pool_run(e->pool, rows, rope_store_task, job);
    pool_run(e->pool, a->G * ((rows * group + QUERY_ROWS - 1) / QUERY_ROWS), attention_task, job);
    linear(e, &l->o, l->o_bias, w->o, rows, w->delta);
    norm_all(job, l->ffn_norm, 0, 1);
    linear(e, &l->gate, NULL, w->h, rows, w->gate);
    linear(e, &l->up, NULL, w->h, rows, w->up);
    pool_run(e->pool, rows, swiglu_task, job);
    linear(e, &l->down, NULL, w->gate, rows, w->delta);
}

/* Appends n <= ROWS tokens, token i to sequence seqs[i], and writes the logits of rows first .. n-1
   to logits[n - first][V]. After a failure the sequences are as they were. */
static int run_layers(const struct exec *e, const struct llama *a, struct lm_work *w, int n,
                      const int32_t *tokens, const int *seqs, int first, float *logits,
                      lvm_error *error) {
    struct lm_job job = {.e = e, .a = a, .w = w, .rows = n, .tokens = tokens};
    int code = LVM_OK, done = 0;
    for (; code == LVM_OK && done < n; done++) {
        struct sequence *s = &w->kv.seq[seqs[done]];
        code = page_for_writing(&w->kv, s, s->n, error);
        job.seq[done] = seqs[done];
        job.pos[done] = s->n++;
    }
    if (code == LVM_OK) pool_run(e->pool, n, embed_task, &job);
    for (int i = 0; code == LVM_OK && i < a->n_layers; i++) {
        job.layer = &a->layers[i];
        job.layer_index = i;
        run_layer(&job);
        if (n > 1) code = report(e, "layers", i + 1, a->n_layers, error);
    }
    if (code != LVM_OK)
        for (int i = done - 1; i >= 0; i--) sequence_trim(&w->kv, &w->kv.seq[seqs[i]], job.pos[i]);
    if (code != LVM_OK || first >= n) return code;
    norm_all(&job, a->norm, first, 1);
    linear(e, &a->output, NULL, w->h + (int64_t)first * a->D, n - first, logits);
    return LVM_OK;
}

/* ---- Memory ---- */

static void lm_work_free(struct lm_work *w) {
    float *all[] = {w->x,  w->h, w->delta, w->q,  w->k,    w->v,       w->qp,
                    w->op, w->o, w->gate,  w->up, w->rope, w->inv_freq};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) mem_free(all[i]);
    for (int s = 0; s < MAX_SEQUENCES; s++) {
        for (int i = 0; w->kv.seq[s].pages != NULL && i < w->kv.max_pages; i++)
            page_release(&w->kv.seq[s].pages[i]);
        mem_free(w->kv.seq[s].pages);
    }
    memset(w, 0, sizeof *w);
}

static int kv_setup(struct kv_cache *kv, const struct llama *a, int type, lvm_error *error) {
    kv->type = type;
    kv->dp = round_up(a->d, QK);
    kv->max_pages = (a->context + KEYS - 1) / KEYS;
    kv->head_bytes = type_bytes(type, (int64_t)kv->dp * KEYS);
    if (!mul_fits((size_t)kv->head_bytes, (size_t)a->G * 2 * (size_t)a->n_layers, &kv->page_bytes))
        return fail(error, LVM_MEMORY, "the key/value cache does not fit memory");
    for (int s = 0; s < MAX_SEQUENCES; s++) {
        kv->seq[s].pages = mem_alloc((size_t)kv->max_pages, sizeof *kv->seq[s].pages, error);
        if (kv->seq[s].pages == NULL) return LVM_MEMORY;
    }
    return LVM_OK;
}

static int64_t lm_scratch(const struct llama *a, const struct kernels *k) {
    int dp = round_up(a->d, QK);
    int64_t widest = max64(linear_scratch(k, a->D), linear_scratch(k, a->F));
    return max64(widest, attend_scratch(dp) + 2 * (int64_t)KEYS * dp);
}

static int lm_work_alloc(struct lm_work *w, const struct llama *a, int kv_type, lvm_error *error) {
    int64_t q = (int64_t)a->H * a->d, kv = (int64_t)a->G * a->d,
            dp = (int64_t)a->H * round_up(a->d, QK);
    struct { float **p; int64_t n;
    } want[] = {{&w->x, a->D}, {&w->h, a->D},    {&w->delta, a->D}, {&w->q, q},
                {&w->k, kv},   {&w->v, kv},      {&w->qp, dp},      {&w->op, dp},
                {&w->o, q},    {&w->gate, a->F}, {&w->up, a->F},    {&w->rope, a->d}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        *want[i].p = mem_alloc((size_t)want[i].n * ROWS, sizeof(float), error);
        if (*want[i].p == NULL) return LVM_MEMORY;
    }
    w->inv_freq = mem_alloc((size_t)a->d, sizeof(float), error);
    if (w->inv_freq == NULL) return LVM_MEMORY;
    for (int i = 0; i < a->d / 2; i++) {
        float power = (float)(2 * i) / (float)a->d;
        w->inv_freq[i] = 1 / (float)exp_f64((double)power * log_f64(a->theta));
    }
    return kv_setup(&w->kv, a, kv_type, error);
}

/* ---- Backends ----

   What a device does for a context. The public functions of chapter 7 call only this; a backend
   keeps its state behind a pointer. Sequences are numbered 0 .. MAX_SEQUENCES - 1 and start empty.
   */

struct backend {
    const char *name;
    int (*open)(const lvm_model *m, const lvm_options *o, void **state, lvm_error *error);
    void (*close)(void *state);
    /* rgb[R][R][3] in [0,1] -> ids[S*S], and back (not clamped); unit i of n for the progress.
       latent: NULL, or the vectors in front of the quantiser, [S*S][e]. */
    int (*encode)(void *state, const float *rgb, int i, int n, int32_t *ids, float *latent,
                  lvm_error *error);
    int (*decode)(void *state, const int32_t *ids, int i, int n, float *rgb, lvm_error *error);
    /* See run_layers. */
    int (*forward)(void *state, int n, const int32_t *tokens, const int *seqs, int first,
                   float *logits, lvm_error *error);
    void (*kv_copy)(void *state, int from, int to, int n); /* sequence `to` = first n of `from` */
    void (*kv_trim)(void *state, int seq, int n);
};

struct cpu {
    const lvm_model *m;
    struct exec e;
    struct vq_work vq;
    struct lm_work lm;
};

static void cpu_close(void *state) {
    struct cpu *c = state;
    if (c == NULL) return;
    vq_work_free(&c->vq);
    lm_work_free(&c->lm);
    mem_free(c->e.scratch);
    mem_free(c->e.xq);
    pool_free(c->e.pool);
    mem_free(c);
}

static int cpu_alloc(struct cpu *c, const lvm_options *o, int kv_type, lvm_error *error) {
    const lvm_model *m = c->m;
    const struct llama *a = &m->llama;
    struct exec *e = &c->e;
    e->scratch_floats = 1024;
    if (m->vq != NULL) e->scratch_floats = max64(e->scratch_floats, vq_scratch(m->vq, m->k));
    if (m->info.has_transformer) e->scratch_floats = max64(e->scratch_floats, lm_scratch(a, m->k));
    e->scratch_floats = (e->scratch_floats + 1023) / 1024 * 1024;
    e->pool = pool_new(o->threads, error);
    if (e->pool == NULL) return LVM_MEMORY;
    e->scratch = mem_alloc((size_t)o->threads * (size_t)e->scratch_floats, sizeof(float), error);
    if (e->scratch == NULL) return LVM_MEMORY;
    if (m->info.has_transformer) {
        int blocks = (int)max64(max64(a->D, (int64_t)a->H * a->d), a->F) / QK + 1;
        e->xq = mem_alloc((size_t)blocks * ROWS, sizeof *e->xq, error);
        if (e->xq == NULL) return LVM_MEMORY;
        int code = lm_work_alloc(&c->lm, a, kv_type, error);
        if (code != LVM_OK) return code;
    }
    return m->vq != NULL ? vq_work_alloc(&c->vq, e, m->vq, error) : LVM_OK;
}

static int cpu_open(const lvm_model *m, const lvm_options *o, void **state, lvm_error *error) {
    struct cpu *c = mem_alloc(1, sizeof *c, error);
    if (c == NULL) return LVM_MEMORY;
    c->m = m;
    c->e.k = m->k;
    c->e.exact = o->exact;
    c->e.user = o->user;
    c->e.progress = o->progress;
    int code = cpu_alloc(c, o, o->kv_type, error);
    if (code != LVM_OK) {
        cpu_close(c);
        return code;
    }
    *state = c;
    return LVM_OK;
}

/* Blocks of one half, for the progress: levels and the middle. */
static int64_t half_steps(const struct vqgan *vq, const struct half *half) {
    int64_t steps = 1;
    for (int i = 0; i < vq->n_levels; i++) steps += half->level[i].n_blocks;
    return steps;
}

static int cpu_encode(void *state, const float *rgb, int i, int n, int32_t *ids, float *latent,
                      lvm_error *error) {
    struct cpu *c = state;
    const struct vqgan *vq = c->m->vq;
    int64_t steps = half_steps(vq, &vq->encoder);
    c->vq.stage = "encode";
    c->vq.done = i * steps;
    c->vq.all = n * steps;
    int code = vq_latent(&c->e, vq, &c->vq, rgb, error);
    if (code != LVM_OK) return code;
    if (latent != NULL)
        memcpy(latent, c->vq.x, (size_t)(vq->S * vq->S) * (size_t)vq->e * sizeof *latent);
    nearest_codes(&c->e, vq, &c->vq, c->vq.x, vq->S * vq->S, ids);
    return LVM_OK;
}

static int cpu_decode(void *state, const int32_t *ids, int i, int n, float *rgb, lvm_error *error) {
    struct cpu *c = state;
    const struct vqgan *vq = c->m->vq;
    int64_t steps = half_steps(vq, &vq->decoder);
    c->vq.stage = "decode";
    c->vq.done = i * steps;
    c->vq.all = n * steps;
    int code = vq_pixels(&c->e, vq, &c->vq, ids, error);
    if (code == LVM_OK) memcpy(rgb, c->vq.x, (size_t)vq->R * (size_t)vq->R * 3 * sizeof *rgb);
    return code;
}

static int cpu_forward(void *state, int n, const int32_t *tokens, const int *seqs, int first,
                       float *logits, lvm_error *error) {
    struct cpu *c = state;
    return run_layers(&c->e, &c->m->llama, &c->lm, n, tokens, seqs, first, logits, error);
}

static void cpu_kv_trim(void *state, int seq, int n) {
    struct cpu *c = state;
    sequence_trim(&c->lm.kv, &c->lm.kv.seq[seq], n);
}

static void cpu_kv_copy(void *state, int from, int to, int n) {
    struct cpu *c = state;
    struct kv_cache *kv = &c->lm.kv;
    if (from == to) {
        cpu_kv_trim(state, to, n);
        return;
    }
    sequence_trim(kv, &kv->seq[to], 0);
    for (int i = 0; i < (n + KEYS - 1) / KEYS; i++) {
        kv->seq[to].pages[i] = kv->seq[from].pages[i];
        kv->seq[to].pages[i]->refs++;
    }
    kv->seq[to].n = n;
}

static const struct backend cpu_backend = {"cpu",      cpu_open,    cpu_close,   cpu_encode,
                                           cpu_decode, cpu_forward, cpu_kv_copy, cpu_kv_trim};

/* =================================================================================================
   Chapter 7.  Generation and scoring

   A context holds one sequence: the tokens that were given or generated (ids), of which the first
   n_fed lie in the cache of sequence 0, and the scores of the token that follows them (logits). The
   last sampled token is never fed before it is needed, so a window of W pictures of T tokens behind
   bos needs W T - 1 + bos positions.

   When a sequence is full, the oldest pictures leave: bos and the last W - 1 pictures are read
   again from position zero, as the published program does for every further picture.

   Sampling (Holtzman et al. 2019 for top-p): logits are divided by the temperature; the k likeliest
   ids stay; of these, the fewest likeliest that together hold at least p of the probability stay;
   one is drawn. Ids that are not picture codes do not take part. */

enum { SCORE_ROWS = 256 };

struct lvm_ctx {
    const lvm_model *m;
    lvm_options o;
    const struct backend *b;
    void *state;
    int32_t *ids;      /* [context + 1] */
    int n_ids, n_fed;  /* n_fed <= n_ids */
    int has_logits;    /* logits[0] belongs to ids[n_fed - 1] */
    float *logits;     /* [SCORE_ROWS][V]; row c is candidate c's while generating */
    float *rgb;        /* [R][R][3] */
};

lvm_options lvm_default_options(void) {
    lvm_options o = {sizeof(lvm_options), 0, LVM_AUTO, 0, NULL, NULL};
    return o;
}

lvm_sampling lvm_default_sampling(void) {
    lvm_sampling s = {sizeof(lvm_sampling), 1.0f, 0.9f, 0, 0, 1};
    return s;
}

/* ---- Contexts ---- */

void lvm_free(lvm_ctx *ctx) {
    if (ctx == NULL) return;
    if (ctx->state != NULL) ctx->b->close(ctx->state);
    mem_free(ctx->ids);
    mem_free(ctx->logits);
    mem_free(ctx->rgb);
    mem_free(ctx);
}

/* Fills what was left to lvm and checks the rest. */
static int settle_options(const lvm_model *m, lvm_options *o, lvm_error *error) {
    if (o->size != sizeof *o)
        return fail(error, LVM_INVALID,
                    "lvm_options.size is %u, not %zu: use lvm_default_options()", o->size,
                    sizeof *o);
    if (o->threads == 0) o->threads = processors();
    if (o->threads < 1 || o->threads > 1024)
        return fail(error, LVM_INVALID, "%d threads: lvm takes 1 to 1024", o->threads);
    int weights = m->info.has_transformer ? m->llama.layers[0].q.type : LVM_F32;
    if (o->kv_type == LVM_AUTO)
        o->kv_type = weights == LVM_F32 || o->exact        ? LVM_F32
                     : type_is_quantised(weights) ? LVM_Q8_0
                                                  : LVM_F16;
    if (o->kv_type != LVM_F32 && o->kv_type != LVM_F16 && o->kv_type != LVM_Q8_0)
        return fail(error, LVM_INVALID, "the key/value cache can be f32, f16 or q8_0");
    return LVM_OK;
}

lvm_ctx *lvm_new(const lvm_model *m, const lvm_options *options, lvm_error *error) {
    lvm_ctx *ctx = mem_alloc(1, sizeof *ctx, error);
    if (ctx == NULL) return NULL;
    const lvm_info *i = &m->info;
    ctx->m = m;
    ctx->o = options != NULL ? *options : lvm_default_options();
    ctx->b = &cpu_backend;
    int code = settle_options(m, &ctx->o, error);
    if (code == LVM_OK) {
        ctx->ids = mem_alloc((size_t)i->context_length + 1, sizeof *ctx->ids, error);
        ctx->logits = mem_alloc((size_t)i->vocab_size * SCORE_ROWS + 1, sizeof *ctx->logits, error);
        ctx->rgb = mem_alloc((size_t)i->resolution * (size_t)i->resolution * 3 + 1,
                             sizeof *ctx->rgb, error);
        code = ctx->ids == NULL || ctx->logits == NULL || ctx->rgb == NULL
                   ? LVM_MEMORY
                   : ctx->b->open(m, &ctx->o, &ctx->state, error);
    }
    if (code == LVM_OK) return ctx;
    lvm_free(ctx);
    return NULL;
}

static int need(const lvm_ctx *ctx, int part, const char *what, lvm_error *error) {
    if (part) return LVM_OK;
    return fail(error, LVM_INVALID, "%s: holds no %s, which this needs", ctx->m->path, what);
}

static int check_ids(const int32_t *ids, int64_t n, int below, lvm_error *error) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= below)
            return fail(error, LVM_INVALID, "token %lld is %d, not in 0 .. %d", (long long)i + 1,
                        (int)ids[i], below - 1);
    return LVM_OK;
}

static int progress(const lvm_ctx *ctx, const char *stage, int64_t done, int64_t all,
                    lvm_error *error) {
    if (ctx->o.progress == NULL || ctx->o.progress(ctx->o.user, stage, done, all) == 0)
        return LVM_OK;
    return fail(error, LVM_CANCELLED, "cancelled while at work on: %s", stage);
}

/* ---- Pictures to tokens and back ---- */

static int encode_image(lvm_ctx *ctx, const lvm_image *image, int i, int n, int32_t *ids,
                        lvm_error *error) {
    int R = ctx->m->info.resolution;
    lvm_image squashed = {0, 0, NULL};
    int code = lvm_image_resize(image, R, R, &squashed, error);
    if (code != LVM_OK) return code;
    for (int p = 0; p < R * R * 3; p++) ctx->rgb[p] = (float)squashed.rgb[p] / 255;
    lvm_image_free(&squashed);
    return ctx->b->encode(ctx->state, ctx->rgb, i, n, ids, NULL, error);
}

int lvm_encode(lvm_ctx *ctx, const lvm_image *images, int n, int32_t *ids, lvm_error *error) {
    int code = need(ctx, ctx->m->info.has_tokenizer, "tokenizer", error);
    int64_t T = ctx->m->info.tokens_per_image;
    if (code == LVM_OK && n < 0) code = fail(error, LVM_INVALID, "%d pictures to encode", n);
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = encode_image(ctx, &images[i], i, n, ids + i * T, error);
    return code == LVM_OK ? progress(ctx, "encode", 1, 1, error) : code;
}

static uint8_t to_byte(float x) {
    return (uint8_t)rintf(255 * (x > 0 ? (x < 1 ? x : 1) : 0));
}

static int decode_image(lvm_ctx *ctx, const int32_t *ids, int i, int n, lvm_image *image,
                        lvm_error *error) {
    int R = ctx->m->info.resolution;
    int code = ctx->b->decode(ctx->state, ids, i, n, ctx->rgb, error);
    if (code != LVM_OK) return code;
    image->rgb = mem_alloc((size_t)R * (size_t)R, 3, error);
    if (image->rgb == NULL) return LVM_MEMORY;
    image->width = image->height = R;
    for (int p = 0; p < R * R * 3; p++) image->rgb[p] = to_byte(ctx->rgb[p]);
    return LVM_OK;
}

int lvm_decode(lvm_ctx *ctx, const int32_t *ids, int n, lvm_image *images, lvm_error *error) {
    int64_t T = ctx->m->info.tokens_per_image;
    if (n < 0) return fail(error, LVM_INVALID, "%d pictures to decode", n);
    memset(images, 0, (size_t)n * sizeof *images);
    int code = need(ctx, ctx->m->info.has_tokenizer, "tokenizer", error);
    if (code == LVM_OK) code = check_ids(ids, n * T, ctx->m->info.codes, error);
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = decode_image(ctx, ids + i * T, i, n, &images[i], error);
    if (code == LVM_OK) code = progress(ctx, "decode", 1, 1, error);
    for (int i = 0; code != LVM_OK && i < n; i++) lvm_image_free(&images[i]);
    return code;
}

/* ---- Sequences ---- */

/* Appends ids[n] to a sequence of the cache; logits: NULL or V floats for the token behind them.
   *fed counts what went in. */
static int feed(lvm_ctx *ctx, int seq, const int32_t *ids, int n, const char *stage, float *logits,
                int *fed, lvm_error *error) {
    int seqs[ROWS];
    for (int i = 0; i < ROWS; i++) seqs[i] = seq;
    for (int at = 0; at < n; at += ROWS) {
        int rows = n - at < ROWS ? n - at : ROWS, last = at + rows == n && logits != NULL;
        int code = progress(ctx, stage, at, n, error);
        if (code == LVM_OK)
            code = ctx->b->forward(ctx->state, rows, ids + at, seqs, last ? rows - 1 : rows, logits,
                                   error);
        if (code != LVM_OK) return code;
        *fed += rows;
    }
    return progress(ctx, stage, n, n, error);
}

int lvm_prompt(lvm_ctx *ctx, const int32_t *ids, int n, float *logits, lvm_error *error) {
    const lvm_info *i = &ctx->m->info;
    int code = need(ctx, i->has_transformer, "transformer", error);
    if (code != LVM_OK) return code;
    if (n < 1 || n > i->context_length)
        return fail(error, LVM_INVALID, "a prompt of %d tokens; the context holds 1 to %d", n,
                    i->context_length);
    code = check_ids(ids, n, i->vocab_size, error);
    if (code != LVM_OK) return code;
    int same = 0;
    while (same < n && same < ctx->n_fed && ids[same] == ctx->ids[same]) same++;
    if (same == n && !(ctx->n_fed == n && ctx->has_logits)) same = n - 1;
    ctx->b->kv_trim(ctx->state, 0, same);
    memcpy(ctx->ids, ids, (size_t)n * sizeof *ids);
    ctx->n_ids = n;
    ctx->n_fed = same;
    if (same < n) {
        ctx->has_logits = 0;
        code = feed(ctx, 0, ids + same, n - same, "prompt", ctx->logits, &ctx->n_fed, error);
        if (code != LVM_OK) return code;
        ctx->has_logits = 1;
    }
    if (logits != NULL) memcpy(logits, ctx->logits, (size_t)i->vocab_size * sizeof *logits);
    return LVM_OK;
}

/* Feeds what is pending, so that logits[0] are those behind the whole sequence. */
static int settle_sequence(lvm_ctx *ctx, lvm_error *error) {
    int code = need(ctx, ctx->m->info.has_transformer, "transformer", error);
    if (code != LVM_OK) return code;
    if (ctx->n_ids == 0)
        return fail(error, LVM_INVALID, "there is no prompt yet: call lvm_prompt first");
    if (ctx->has_logits && ctx->n_fed == ctx->n_ids) return LVM_OK;
    if (ctx->n_ids > ctx->m->info.context_length)
        return fail(error, LVM_INVALID, "the context is full");
    if (ctx->n_fed == ctx->n_ids) ctx->b->kv_trim(ctx->state, 0, --ctx->n_fed);
    ctx->has_logits = 0;
    code = feed(ctx, 0, ctx->ids + ctx->n_fed, ctx->n_ids - ctx->n_fed, "prompt", ctx->logits,
                &ctx->n_fed, error);
    ctx->has_logits = code == LVM_OK;
    return code;
}

/* ---- Scoring ---- */

/* -ln softmax(logits)[id] */
static float negative_log_likelihood(const float *logits, int n, int32_t id) {
    float max = logits[0];
    double sum = 0;
    for (int i = 1; i < n; i++) max = logits[i] > max ? logits[i] : max;
    for (int i = 0; i < n; i++) sum += exp_f32(logits[i] - max);
    return (float)(log_f64(sum) - ((double)logits[id] - max));
}

int lvm_score(lvm_ctx *ctx, const int32_t *ids, int n, float *nll, lvm_error *error) {
    const lvm_info *info = &ctx->m->info;
    int code = settle_sequence(ctx, error);
    if (code != LVM_OK) return code;
    int start = ctx->n_fed, V = info->vocab_size, seqs[SCORE_ROWS] = {0};
    if (n < 1 || n > info->context_length + 1 - start)
        return fail(error, LVM_INVALID,
                    "%d tokens to score; behind the prompt the context holds 1 to %d", n,
                    info->context_length + 1 - start);
    code = check_ids(ids, n, info->vocab_size, error);
    if (code != LVM_OK) return code;
    nll[0] = negative_log_likelihood(ctx->logits, V, ids[0]);
    ctx->has_logits = n == 1;
    for (int at = 0; code == LVM_OK && at < n - 1; at += SCORE_ROWS) {
        int rows = n - 1 - at < SCORE_ROWS ? n - 1 - at : SCORE_ROWS;
        code = progress(ctx, "score", at, n, error);
        if (code == LVM_OK)
            code = ctx->b->forward(ctx->state, rows, ids + at, seqs, 0, ctx->logits, error);
        for (int r = 0; code == LVM_OK && r < rows; r++)
            nll[at + r + 1] =
                negative_log_likelihood(ctx->logits + (int64_t)r * V, V, ids[at + r + 1]);
    }
    ctx->b->kv_trim(ctx->state, 0, start);
    return code == LVM_OK ? progress(ctx, "score", n, n, error) : code;
}

/* ---- Sampling ---- */

/* PCG-XSH-RR 64/32 (O'Neill 2014): a 64-bit linear congruential generator whose high bits, folded
   and rotated, are the output; the odd increment chooses one of 2^63 streams. */
struct rng {
    uint64_t state, increment;
};

static uint32_t rng_next(struct rng *r) {
    uint64_t old = r->state;
    r->state = old * 6364136223846793005u + r->increment;
    uint32_t x = (uint32_t)((old >> 18 ^ old) >> 27), turn = (uint32_t)(old >> 59);
    return x >> turn | x << (-turn & 31);
}

static struct rng rng_new(uint64_t seed, uint64_t stream) {
    struct rng r = {0, stream << 1 | 1};
    rng_next(&r);
    r.state += seed;
    rng_next(&r);
    return r;
}

struct choice {
    float p;
    int32_t id;
};

static int likelier(struct choice a, struct choice b) {
    return a.p > b.p || (a.p == b.p && a.id < b.id);
}

/* Restores the heap (likeliest on top) below element i. */
static void sift_down(struct choice *heap, int n, int i) {
    for (;;) {
        int child = 2 * i + 1;
        if (child >= n) return;
        if (child + 1 < n && likelier(heap[child + 1], heap[child])) child++;
        if (!likelier(heap[child], heap[i])) return;
        struct choice swap = heap[i];
        heap[i] = heap[child];
        heap[child] = swap;
        i = child;
    }
}

/* Takes the likeliest off the heap of n and puts it behind its end. */
static struct choice pop_likeliest(struct choice *heap, int n) {
    struct choice top = heap[0];
    heap[0] = heap[n - 1];
    heap[n - 1] = top;
    sift_down(heap, n - 1, 0);
    return top;
}

static int32_t argmax(const float *logits, int n) {
    int32_t best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* Draws one of the first n ids. heap: room for n choices. */
static int32_t sample(const float *logits, int n, const lvm_sampling *s, struct rng *rng,
                      struct choice *heap) {
    if (s->greedy) return argmax(logits, n);
    float max = logits[argmax(logits, n)];
    double mass = 0, kept = 0;
    int k = s->top_k > 0 && s->top_k < n ? s->top_k : n, size = n, count = 0;
    for (int i = 0; i < n; i++)
        heap[i] = (struct choice){exp_f32((logits[i] - max) / s->temperature), i};
    for (int i = 0; k == n && i < n; i++) mass += heap[i].p;
    for (int i = n / 2 - 1; i >= 0; i--) sift_down(heap, n, i);
    if (k < n) { /* the k likeliest are the whole; they stand at heap[n-1], heap[n-2], ... */
        for (; count < k; count++) mass += pop_likeliest(heap, size--).p;
        int all = count;
        for (count = 0; count < all && kept < s->top_p * mass; count++)
            kept += heap[n - 1 - count].p;
    } else {
        for (; count < n && kept < s->top_p * mass; count++) kept += pop_likeliest(heap, size--).p;
    }
    double left = kept * (rng_next(rng) * 0x1p-32);
    for (int i = 0; i < count - 1; i++) {
        left -= heap[n - 1 - i].p;
        if (left < 0) return heap[n - 1 - i].id;
    }
    return heap[n - (count > 0 ? count : 1)].id;
}

static int check_sampling(const lvm_sampling *s, lvm_error *error) {
    if (s->size != sizeof *s)
        return fail(error, LVM_INVALID,
                    "lvm_sampling.size is %u, not %zu: use lvm_default_sampling()", s->size,
                    sizeof *s);
    if (!(s->temperature >= 1e-3f && s->temperature <= 100))
        return fail(error, LVM_INVALID, "temperature %g is not between 0.001 and 100",
                    (double)s->temperature);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return fail(error, LVM_INVALID, "top-p %g is not above 0 and up to 1", (double)s->top_p);
    if (s->top_k < 0) return fail(error, LVM_INVALID, "top-k %d is negative", s->top_k);
    return LVM_OK;
}

/* ---- Generation ---- */

/* What a call of lvm_generate works with; candidate c is sequence c of the cache. */
struct generation {
    lvm_ctx *ctx;
    const lvm_sampling *s;
    int candidates, n, has_bos, T, full; /* full: tokens at which a sequence must slide */
    int length; /* of every candidate's sequence, the pending token included */
    int32_t *ids;                        /* [candidates][context + 1] */
    struct rng rng[MAX_SEQUENCES];
    struct choice *heap;
};

static int32_t *candidate_ids(const struct generation *g, int c) {
    return g->ids + (int64_t)c * (g->ctx->m->info.context_length + 1);
}

/* Drops the oldest pictures of every candidate and reads the rest again. Candidates share what
   their windows have in common. */
static int slide_window(struct generation *g, lvm_error *error) {
    lvm_ctx *ctx = g->ctx;
    int part = (g->length - g->has_bos) % g->T; /* of a picture that is still being drawn */
    int keep = g->full - g->has_bos - g->T + part, V = ctx->m->info.vocab_size, code = LVM_OK;
    for (int c = 0; c < g->candidates; c++) {
        int32_t *ids = candidate_ids(g, c);
        memmove(ids + g->has_bos, ids + g->length - keep, (size_t)keep * sizeof *ids);
    }
    g->length = g->has_bos + keep;
    if (g->length == 0)
        return fail(error, LVM_INVALID,
                    "the context of %d tokens holds no picture to continue from",
                    ctx->m->info.context_length);
    for (int c = 0; code == LVM_OK && c < g->candidates; c++) {
        int same = 0, fed = 0;
        const int32_t *ids = candidate_ids(g, c), *first = candidate_ids(g, 0);
        while (c > 0 && same < g->length - 1 && ids[same] == first[same]) same++;
        ctx->b->kv_copy(ctx->state, 0, c, same);
        code = feed(ctx, c, ids + same, g->length - same, "prompt", ctx->logits + (int64_t)c * V,
                    &fed, error);
    }
    return code;
}

/* One more token for every candidate: scores, then a draw. */
static int generate_token(struct generation *g, int i, lvm_error *error) {
    lvm_ctx *ctx = g->ctx;
    int V = ctx->m->info.vocab_size, code = LVM_OK, seqs[MAX_SEQUENCES];
    int32_t last[MAX_SEQUENCES];
    if (g->length >= g->full) {
        code = slide_window(g, error);
    } else if (i > 0) {
        for (int c = 0; c < g->candidates; c++) {
            seqs[c] = c;
            last[c] = candidate_ids(g, c)[g->length - 1];
        }
        code = ctx->b->forward(ctx->state, g->candidates, last, seqs, 0, ctx->logits, error);
    }
    if (code == LVM_OK) code = progress(ctx, "generate", i, g->n, error);
    for (int c = 0; code == LVM_OK && c < g->candidates; c++)
        candidate_ids(g, c)[g->length] =
            sample(ctx->logits + (int64_t)c * V, ctx->m->info.codes, g->s, &g->rng[c], g->heap);
    if (code == LVM_OK) g->length++;
    return code;
}

/* Gives every candidate the prompt's ids, cache and logits. */
static void share_prompt(struct generation *g) {
    lvm_ctx *ctx = g->ctx;
    int V = ctx->m->info.vocab_size;
    for (int c = 0; c < g->candidates; c++) {
        memcpy(candidate_ids(g, c), ctx->ids, (size_t)ctx->n_ids * sizeof *ctx->ids);
        g->rng[c] = rng_new(g->s->seed, (uint64_t)c);
        if (c == 0) continue;
        ctx->b->kv_copy(ctx->state, 0, c, ctx->n_fed);
        memcpy(ctx->logits + (int64_t)c * V, ctx->logits, (size_t)V * sizeof *ctx->logits);
    }
    g->length = ctx->n_ids;
}

/* Leaves the context behind candidate 0, with its last token pending. */
static void keep_first_candidate(struct generation *g, int code) {
    lvm_ctx *ctx = g->ctx;
    for (int c = 1; c < g->candidates; c++) ctx->b->kv_trim(ctx->state, c, 0);
    ctx->has_logits = 0;
    if (code == LVM_OK) {
        memcpy(ctx->ids, candidate_ids(g, 0), (size_t)g->length * sizeof *ctx->ids);
        ctx->n_ids = g->length;
        ctx->n_fed = g->length - 1;
    } else { /* start afresh: what the cache holds is not certain */
        ctx->n_ids = ctx->n_fed = 0;
        ctx->b->kv_trim(ctx->state, 0, 0);
    }
}

static int run_generation(struct generation *g, int32_t *ids, lvm_error *error) {
    int code = LVM_OK;
    share_prompt(g);
    for (int i = 0; code == LVM_OK && i < g->n; i++) {
        code = generate_token(g, i, error);
        for (int c = 0; code == LVM_OK && c < g->candidates; c++)
            ids[(int64_t)c * g->n + i] = candidate_ids(g, c)[g->length - 1];
    }
    if (code == LVM_OK) code = progress(g->ctx, "generate", g->n, g->n, error);
    keep_first_candidate(g, code);
    return code;
}

int lvm_generate(lvm_ctx *ctx, const lvm_sampling *sampling, int candidates, int n, int32_t *ids,
                 lvm_error *error) {
    const lvm_info *info = &ctx->m->info;
    lvm_sampling chosen = sampling != NULL ? *sampling : lvm_default_sampling();
    int code = check_sampling(&chosen, error);
    if (code != LVM_OK) return code;
    if (candidates < 1 || candidates > MAX_SEQUENCES)
        return fail(error, LVM_INVALID, "%d candidates: lvm takes 1 to %d", candidates,
                    MAX_SEQUENCES);
    if (n < 1) return fail(error, LVM_INVALID, "%d tokens to generate", n);
    struct generation g = {.ctx = ctx, .s = &chosen, .candidates = candidates, .n = n};
    g.has_bos = info->bos >= 0 && ctx->n_ids > 0 && ctx->ids[0] == info->bos;
    g.T = info->tokens_per_image;
    g.full = g.has_bos + (int)min64(16, (info->context_length + 1 - g.has_bos) / g.T) * g.T;
    if (g.full < g.has_bos + g.T)
        return fail(error, LVM_INVALID, "%s: its context of %d tokens holds no picture of %d",
                    ctx->m->path, info->context_length, g.T);
    if (ctx->n_ids < g.full) code = settle_sequence(ctx, error);
    if (code == LVM_OK && ctx->n_ids == 0)
        code = fail(error, LVM_INVALID, "there is no prompt yet: call lvm_prompt first");
    if (code != LVM_OK) return code;
    g.ids =
        mem_alloc((size_t)candidates * ((size_t)info->context_length + 1), sizeof *g.ids, error);
    g.heap = mem_alloc((size_t)info->codes, sizeof *g.heap, error);
    code = g.ids == NULL || g.heap == NULL ? LVM_MEMORY : run_generation(&g, ids, error);
    mem_free(g.ids);
    mem_free(g.heap);
    return code;
}

/* ---- All at once ---- */

/* Tokens of the last window - 1 images, behind bos. */
static int prompt_images(lvm_ctx *ctx, const lvm_image *images, int count, lvm_error *error) {
    const lvm_info *info = &ctx->m->info;
    int most = (int)max64(0, info->window_images - 1), skip = count > most ? count - most : 0,
        bos = info->bos >= 0;
    int n = bos + (count - skip) * info->tokens_per_image;
    if (count - skip < 1 && !bos)
        return fail(error, LVM_INVALID, "%s: its context of %d tokens holds no prompt picture",
                    ctx->m->path, info->context_length);
    int32_t *ids = mem_alloc((size_t)n + 1, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    if (bos) ids[0] = info->bos;
    int code = lvm_encode(ctx, images + skip, count - skip, ids + bos, error);
    if (code == LVM_OK) code = lvm_prompt(ctx, ids, n, NULL, error);
    mem_free(ids);
    return code;
}

int lvm_predict(lvm_ctx *ctx, const lvm_image *images, int count, const lvm_sampling *sampling,
                int candidates, int n, lvm_image *out, lvm_error *error) {
    const lvm_info *info = &ctx->m->info;
    int code = need(ctx, info->has_tokenizer, "tokenizer", error);
    if (code == LVM_OK) code = need(ctx, info->has_transformer, "transformer", error);
    if (code == LVM_OK &&
        (count < 0 || n < 1 || n > 1 << 11 || candidates < 1 || candidates > MAX_SEQUENCES))
        code = fail(error, LVM_INVALID, "%d images, %d candidates of %d: out of range", count,
                    candidates, n);
    if (code == LVM_OK) code = prompt_images(ctx, images, count, error);
    if (code != LVM_OK) return code;
    if (info->tokens_per_image > INT32_MAX / n)
        return fail(error, LVM_INVALID, "%d pictures of %d tokens are too many", n,
                    info->tokens_per_image);
    int tokens = n * info->tokens_per_image;
    int32_t *ids = mem_alloc((size_t)candidates * (size_t)tokens, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    code = lvm_generate(ctx, sampling, candidates, tokens, ids, error);
    if (code == LVM_OK) code = lvm_decode(ctx, ids, candidates * n, out, error);
    mem_free(ids);
    return code;
}
/* =================================================================================================
   Chapter 10.  Images

   Pictures come in as PNG files, go through Pillow's bicubic resizing on their way to the
   tokenizer, and leave as PNG files. Everything works on memory: a reader gets all bytes of a
   file and touches them through one checked cursor, so that a damaged or hostile file is an error
   message and never a crash.

   Formats followed:
     PNG                  Portable Network Graphics, third edition (W3C)
     zlib, deflate        RFC 1950 (the wrapper: two bytes, data, Adler-32) and RFC 1951
     resizing             Pillow's Image.resize(size, BICUBIC) on 8-bit RGB, byte for byte, as its
                          releases up to 12 compute it: the width first, then the height. (Release
                          13 turns that round where the height shrinks much more than the width.)

   Read first, the surprises:
     - Alpha is dropped, not blended: an RGBA pixel keeps its R, G, B, whatever A says. This is
       Pillow's convert('RGB'), hence what the published checkpoints saw. tRNS is ignored likewise.
     - gAMA, iCCP, sRGB and cHRM are ignored, as by Pillow: the bytes are the values.
     - Deflate sends Huffman codes from their top bit and everything else from the lowest bit.
       Codes are therefore kept reversed, and all bits come from one little-endian stream.
     - A filtered row depends on the row above *after* that one was unfiltered.

   The bicubic kernel (Keys 1981, a = -1/2) gives a sample at distance x the weight

       w(x) = (a+2)|x|^3 - (a+3)|x|^2 + 1        for |x| < 1
            = a|x|^3 - 5a|x|^2 + 8a|x| - 4a      for 1 <= |x| < 2,   else 0.

   Output pixel i of n_out lies at c = (i + 1/2) s in the input, s = n_in / n_out. When the picture
   shrinks (s > 1) the kernel is stretched by s and so averages instead of skipping; it spans
   c +- 2 max(s, 1), cut at the borders, and its weights are divided by their sum:

       out[i] = sum_j w((j + 1/2 - c) / max(s, 1)) in[j]  /  sum_j w((j + 1/2 - c) / max(s, 1)) */

enum {
    IMAGE_MAX_PIXELS = 1 << 28,  /* 800 MB of RGB: larger is a mistake or an attack */
    RGB = 3                      /* bytes of a pixel in lvm_image */
};

/* A black image; the caller checked the sides. */
static int image_new(lvm_image *image, int width, int height, lvm_error *error) {
    image->rgb = mem_alloc((size_t)width * (size_t)height, RGB, error);
    if (!image->rgb) return LVM_MEMORY;
    image->width = width;
    image->height = height;
    return LVM_OK;
}

static int image_sides_ok(int64_t width, int64_t height) {
    return width > 0 && height > 0 && width <= IMAGE_MAX_PIXELS && height <= IMAGE_MAX_PIXELS &&
           width * height <= IMAGE_MAX_PIXELS;
}

void lvm_image_free(lvm_image *image) {
    if (!image) return;
    mem_free(image->rgb);
    *image = (lvm_image){0, 0, NULL};
}

/* ---- Checksums ----

   CRC-32 guards every PNG chunk, Adler-32 the decompressed data. The CRC takes four bytes a step:
   table[k][b] is the effect of byte b with k zero bytes behind it. The tables take microseconds to
   make, so each file makes its own and nothing is shared between threads. */

struct crc32 {
    uint32_t table[4][256];
};

static void crc32_init(struct crc32 *crc) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t c = byte;
        for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0xEDB88320u ^ c >> 1 : c >> 1;
        crc->table[0][byte] = c;
    }
    for (int k = 1; k < 4; k++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t c = crc->table[k - 1][byte];
            crc->table[k][byte] = c >> 8 ^ crc->table[0][c & 255];
        }
}

static uint32_t crc32_of(const struct crc32 *crc, const uint8_t *data, size_t size) {
    uint32_t c = 0xFFFFFFFFu;
    for (; size >= 4; size -= 4, data += 4) {
        c ^= data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24;
        c = crc->table[3][c & 255] ^ crc->table[2][c >> 8 & 255] ^
            crc->table[1][c >> 16 & 255] ^ crc->table[0][c >> 24];
    }
    while (size--) c = c >> 8 ^ crc->table[0][(c ^ *data++) & 255];
    return ~c;
}

static uint32_t adler32_of(const uint8_t *data, size_t size) {
    uint32_t a = 1, b = 0;
    while (size) {
        size_t n = size < 5552 ? size : 5552;   /* the most additions before b could overflow */
        size -= n;
        while (n--) {
            a += *data++;
            b += a;
        }
        a %= 65521;
        b %= 65521;
    }
    return b << 16 | a;
}

/* A fuzzer cannot guess checksums: built with -DLVM_FUZZING every checksum passes, so that its
   mutations reach the code behind them. Nothing else depends on LVM_FUZZING. */
static int checksum_wrong(uint32_t stored, uint32_t computed) {
#ifdef LVM_FUZZING
    (void)stored;
    (void)computed;
    return 0;
#else
    return stored != computed;
#endif
}

/* ---- What inflate and deflate share ----

   Deflate data are literals (symbols 0..255), an end mark (256) and matches: "copy `length` bytes
   from `distance` back". Lengths and distances are coded as small floating-point numbers: a class
   (exponent and leading mantissa bits, Huffman coded) and the rest of the mantissa as plain bits.
   With v = length - 3 and 2 mantissa bits in the class, or v = distance - 1 and 1 bit:

       v < 2^(bits+1):  class = v, no further bits
       otherwise:       class = (n << bits) + (v >> n), then the n low bits of v

   so no table of bases is needed. One exception: length 258 has a class of its own, 28, while the
   formula's last code (v = 255 in class 27) stays unused. */

enum {
    DEFLATE_END = 256, DEFLATE_MATCH = 257,
    DEFLATE_LITERALS = 286, DEFLATE_DISTANCES = 30,   /* symbols with a meaning */
    DEFLATE_MIN_LENGTH = 3, DEFLATE_MAX_LENGTH = 258, DEFLATE_WINDOW = 32768,
    DEFLATE_LONGEST_CLASS = 28,
    LENGTH_BITS = 2, DISTANCE_BITS = 1,               /* mantissa bits inside the class */
    HUFFMAN_MAX_BITS = 15, HUFFMAN_MAX_SYMBOLS = 288
};

/* The order in which a block's header lists the lengths of the code for code lengths. */
static const uint8_t deflate_header_order[19] =
    {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

static int class_extra_bits(int class, int bits) {
    return class < 2 << bits ? 0 : (class >> bits) - 1;
}

static int class_base(int class, int bits) {
    int n = class_extra_bits(class, bits);
    return (class - (n << bits)) << n;
}

static int class_of(unsigned value, int bits) {
    int n = 0;
    while (value >> (n + bits + 1)) n++;
    return (n << bits) + (int)(value >> n);
}

static int length_class(int length) {
    if (length == DEFLATE_MAX_LENGTH) return DEFLATE_LONGEST_CLASS;
    return class_of((unsigned)(length - DEFLATE_MIN_LENGTH), LENGTH_BITS);
}

static int length_extra_bits(int class) {
    return class == DEFLATE_LONGEST_CLASS ? 0 : class_extra_bits(class, LENGTH_BITS);
}

static int length_base(int class) {
    if (class == DEFLATE_LONGEST_CLASS) return DEFLATE_MAX_LENGTH;
    return DEFLATE_MIN_LENGTH + class_base(class, LENGTH_BITS);
}

static uint32_t reverse_bits(uint32_t value, int n) {
    uint32_t out = 0;
    while (n--) {
        out = out << 1 | (value & 1);
        value >>= 1;
    }
    return out;
}

/* Canonical codes, reversed, from code lengths: shorter codes first, equal ones by symbol. */
static void huffman_codes(const uint8_t *length, int n, uint16_t *code) {
    uint32_t next[HUFFMAN_MAX_BITS + 2] = {0};
    for (int i = 0; i < n; i++) next[length[i] + 1]++;
    next[1] = 0;   /* symbols of length 0 have no code */
    for (int bits = 1; bits <= HUFFMAN_MAX_BITS; bits++)
        next[bits + 1] = (next[bits] + next[bits + 1]) << 1;
    for (int i = 0; i < n; i++)
        if (length[i]) code[i] = (uint16_t)reverse_bits(next[length[i]]++, length[i]);
}

/* The lengths that RFC 1951 gives to blocks with fixed codes. */
static void deflate_fixed_lengths(uint8_t *literal, uint8_t *distance) {
    memset(literal, 8, 144);
    memset(literal + 144, 9, 112);
    memset(literal + 256, 7, 24);
    memset(literal + 280, 8, 8);
    memset(distance, 5, 30);
}

/* ---- Inflate ----

   The output's size is known beforehand (from the picture's header), so the caller gives a buffer
   of exactly that size and any other amount of data is a fault. Each function returns NULL or the
   fault in words; the caller adds the file's name.

   Bits are held in a 64-bit word that is topped up once per literal or match: 56 bits are enough
   for the longest match (15 + 5 + 15 + 13). Past the end of input the word fills with zeros while
   `count` tells how many bits are real; taking more than that is "ends early". */

struct bit_reader {
    const uint8_t *at, *end;
    uint64_t hold;   /* the next bits, lowest first */
    int count;       /* how many of them there are */
};

static void bits_fill(struct bit_reader *b) {
    while (b->count <= 56 && b->at < b->end) {
        b->hold |= (uint64_t)*b->at++ << b->count;
        b->count += 8;
    }
}

static unsigned bits_peek(const struct bit_reader *b, int n) {
    return (unsigned)(b->hold & ((1u << n) - 1));
}

static void bits_skip(struct bit_reader *b, int n) {
    b->hold >>= n;
    b->count -= n;   /* negative: the input ended */
}

static unsigned bits_take(struct bit_reader *b, int n) {
    unsigned value = bits_peek(b, n);
    bits_skip(b, n);
    return value;
}

/* A Huffman decoder. Codes up to HUFFMAN_FAST_BITS are looked up by the next bits; for the rare
   longer ones, limit[l] is the first code above those of length l, left-aligned in 15 bits. */
enum { HUFFMAN_FAST_BITS = 10 };

struct huffman {
    uint16_t fast[1 << HUFFMAN_FAST_BITS];    /* symbol << 4 | length, 0 where no code starts so */
    uint32_t limit[HUFFMAN_MAX_BITS + 1];
    int offset[HUFFMAN_MAX_BITS + 1];         /* code of length l + offset[l] = index in sorted */
    uint16_t sorted[HUFFMAN_MAX_SYMBOLS];     /* symbols in the order of their codes */
};

/* False if the lengths are no prefix code. A code may be incomplete only if it is empty or one
   code of one bit, which is how a block says that it uses no distance or only one. */
static int huffman_build(struct huffman *h, const uint8_t *length, int n) {
    int count[HUFFMAN_MAX_BITS + 1] = {0}, place[HUFFMAN_MAX_BITS + 1];
    uint16_t code[HUFFMAN_MAX_SYMBOLS];
    uint32_t first = 0;
    int used = 0;

    for (int i = 0; i < n; i++) count[length[i]]++;
    for (int bits = 1; bits <= HUFFMAN_MAX_BITS; bits++) {
        place[bits] = used;
        h->offset[bits] = used - (int)(first >> (HUFFMAN_MAX_BITS - bits));
        first += (uint32_t)count[bits] << (HUFFMAN_MAX_BITS - bits);
        h->limit[bits] = first;
        if (first > 1u << HUFFMAN_MAX_BITS) return 0;
        used += count[bits];
    }
    if (first != 1u << HUFFMAN_MAX_BITS && used > count[1]) return 0;

    memset(h->fast, 0, sizeof h->fast);
    huffman_codes(length, n, code);
    for (int i = 0; i < n; i++) {
        if (!length[i]) continue;
        h->sorted[place[length[i]]++] = (uint16_t)i;
        if (length[i] > HUFFMAN_FAST_BITS) continue;
        for (int j = code[i]; j < 1 << HUFFMAN_FAST_BITS; j += 1 << length[i])
            h->fast[j] = (uint16_t)(i << 4 | length[i]);
    }
    return 1;
}

/* The next symbol, or -1 where the bits are no code. */
static int huffman_next(const struct huffman *h, struct bit_reader *b) {
    int entry = h->fast[bits_peek(b, HUFFMAN_FAST_BITS)];
    if (entry) {
        bits_skip(b, entry & 15);
        return entry >> 4;
    }
    uint32_t code = reverse_bits(bits_peek(b, HUFFMAN_MAX_BITS), HUFFMAN_MAX_BITS);
    for (int bits = HUFFMAN_FAST_BITS + 1; bits <= HUFFMAN_MAX_BITS; bits++)
        if (code < h->limit[bits]) {
            bits_skip(b, bits);
            return h->sorted[(int)(code >> (HUFFMAN_MAX_BITS - bits)) + h->offset[bits]];
        }
    return -1;
}

struct inflate {
    struct bit_reader bits;
    uint8_t *out, *at, *end;
    struct huffman literals, distances, lengths;
};

static const char *const inflate_short = "the compressed data end early";
static const char *const inflate_long = "the compressed data hold more than the picture";
static const char *const inflate_damaged = "the compressed data are damaged";

static const char *inflate_stored(struct inflate *z) {
    struct bit_reader *b = &z->bits;
    bits_skip(b, b->count & 7);
    bits_fill(b);
    unsigned size = bits_take(b, 16), check = bits_take(b, 16);
    if (b->count < 0) return inflate_short;
    if (size != (check ^ 0xFFFF)) return inflate_damaged;
    b->at -= b->count / 8;   /* whole bytes read ahead go back */
    b->hold = 0;
    b->count = 0;
    if (size > (size_t)(b->end - b->at)) return inflate_short;
    if (size > (size_t)(z->end - z->at)) return inflate_long;
    memcpy(z->at, b->at, size);
    z->at += size;
    b->at += size;
    return NULL;
}

/* Code lengths are themselves run-length and Huffman coded: 16 repeats the last, 17 and 18 zero. */
static const char *inflate_lengths(struct inflate *z, uint8_t *length, int n) {
    struct bit_reader *b = &z->bits;
    for (int i = 0; i < n;) {
        bits_fill(b);
        int symbol = huffman_next(&z->lengths, b), repeat = 1;
        uint8_t value = (uint8_t)symbol;
        if (symbol < 0 || (symbol == 16 && i == 0))
            return b->count <= 0 ? inflate_short : inflate_damaged;
        if (symbol == 16) {
            value = length[i - 1];
            repeat = 3 + (int)bits_take(b, 2);
        } else if (symbol >= 17) {
            value = 0;
            repeat = symbol == 17 ? 3 + (int)bits_take(b, 3) : 11 + (int)bits_take(b, 7);
        }
        if (b->count < 0) return inflate_short;
        if (repeat > n - i) return inflate_damaged;
        while (repeat--) length[i++] = value;
    }
    return NULL;
}

static const char *inflate_header(struct inflate *z) {
    struct bit_reader *b = &z->bits;
    uint8_t length[HUFFMAN_MAX_SYMBOLS + 32] = {0};
    bits_fill(b);
    int literals = 257 + (int)bits_take(b, 5), distances = 1 + (int)bits_take(b, 5);
    int listed = 4 + (int)bits_take(b, 4);
    if (literals > DEFLATE_LITERALS || distances > DEFLATE_DISTANCES) return inflate_damaged;
    for (int i = 0; i < listed; i++) {
        bits_fill(b);
        length[deflate_header_order[i]] = (uint8_t)bits_take(b, 3);
    }
    if (b->count < 0) return inflate_short;
    if (!huffman_build(&z->lengths, length, 19)) return inflate_damaged;
    const char *fault = inflate_lengths(z, length, literals + distances);
    if (fault) return fault;
    if (!length[DEFLATE_END] || !huffman_build(&z->literals, length, literals) ||
        !huffman_build(&z->distances, length + literals, distances))
        return inflate_damaged;
    return NULL;
}

static void inflate_fixed(struct inflate *z) {
    uint8_t literal[HUFFMAN_MAX_SYMBOLS], distance[32] = {0};
    deflate_fixed_lengths(literal, distance);
    distance[30] = distance[31] = 5;   /* they complete the code and are refused when met */
    huffman_build(&z->literals, literal, HUFFMAN_MAX_SYMBOLS);
    huffman_build(&z->distances, distance, 32);
}

/* A match whose literal/length symbol was just read. */
static const char *inflate_match(struct inflate *z, int class) {
    struct bit_reader *b = &z->bits;
    if (class > DEFLATE_LONGEST_CLASS) return inflate_damaged;
    size_t length = (size_t)length_base(class) + bits_take(b, length_extra_bits(class));
    class = huffman_next(&z->distances, b);
    if (class < 0 || class >= DEFLATE_DISTANCES)
        return b->count <= 0 ? inflate_short : inflate_damaged;
    size_t distance = 1 + (size_t)class_base(class, DISTANCE_BITS);
    distance += bits_take(b, class_extra_bits(class, DISTANCE_BITS));
    if (b->count < 0) return inflate_short;
    if (distance > (size_t)(z->at - z->out)) return inflate_damaged;
    if (length > (size_t)(z->end - z->at)) return inflate_long;
    const uint8_t *from = z->at - distance;
    if (distance >= length) {
        memcpy(z->at, from, length);
        z->at += length;
    } else {
        while (length--) *z->at++ = *from++;   /* overlapping: the copy feeds itself */
    }
    return NULL;
}

static const char *inflate_codes(struct inflate *z) {
    struct bit_reader *b = &z->bits;
    for (;;) {
        bits_fill(b);
        int symbol = huffman_next(&z->literals, b);
        if (b->count < 0) return inflate_short;
        if (symbol < 0) return b->count < HUFFMAN_MAX_BITS ? inflate_short : inflate_damaged;
        if (symbol == DEFLATE_END) return NULL;
        if (symbol < DEFLATE_END) {
            if (z->at == z->end) return inflate_long;
            *z->at++ = (uint8_t)symbol;
            continue;
        }
        const char *fault = inflate_match(z, symbol - DEFLATE_MATCH);
        if (fault) return fault;
    }
}

static const char *inflate_block(struct inflate *z, unsigned kind) {
    if (kind == 0) return inflate_stored(z);
    if (kind == 3) return inflate_damaged;
    if (kind == 1) {
        inflate_fixed(z);
    } else {
        const char *fault = inflate_header(z);
        if (fault) return fault;
    }
    return inflate_codes(z);
}

/* Decompresses a zlib stream into exactly out_size bytes. Bytes behind the stream are ignored. */
static const char *inflate_zlib(struct inflate *z, const uint8_t *data, size_t size,
                                uint8_t *out, size_t out_size) {
    if (size < 2) return inflate_short;
    if ((data[0] & 15) != 8 || data[0] >> 4 > 7 || (data[0] << 8 | data[1]) % 31 || data[1] & 32)
        return "the compressed data have no valid zlib header";
    z->bits = (struct bit_reader){data + 2, data + size, 0, 0};
    z->out = z->at = out;
    z->end = out + out_size;
    for (unsigned last = 0; !last;) {
        bits_fill(&z->bits);
        last = bits_take(&z->bits, 1);
        unsigned kind = bits_take(&z->bits, 2);
        if (z->bits.count < 0) return inflate_short;
        const char *fault = inflate_block(z, kind);
        if (fault) return fault;
    }
    if (z->at != z->end) return "the compressed data hold less than the picture";
    bits_skip(&z->bits, z->bits.count & 7);
    bits_fill(&z->bits);
    uint32_t adler = 0;
    for (int i = 0; i < 4; i++) adler = adler << 8 | bits_take(&z->bits, 8);
    if (z->bits.count < 0) return inflate_short;
    if (checksum_wrong(adler, adler32_of(out, out_size)))
        return "the decompressed data have a wrong checksum";
    return NULL;
}

/* ---- PNG in ----

       file:   8 bytes of signature, then chunks
       chunk:  length (4 bytes, big-endian) | type (4 letters) | data | CRC-32 of type and data

   IHDR comes first and tells the shape; PLTE holds a palette; all IDAT chunks together hold one
   zlib stream of rows, each a filter byte and its pixels; IEND ends the picture. A lower-case
   first letter marks a chunk that may be ignored; an unknown upper-case one may not. Bytes behind
   IEND are ignored.

   Memory is asked for only when the file explains it: deflate turns 2 bits into 258 bytes at best,
   a ratio of 1032, so a small file that claims a huge picture is refused first. */

enum {
    PNG_GREY = 0, PNG_RGB = 2, PNG_PALETTE = 3, PNG_GREY_ALPHA = 4, PNG_RGB_ALPHA = 6,
    PNG_HEADER_SIZE = 13, PNG_SIGNATURE_SIZE = 8, PNG_CHUNK_FRAME = 12,
    DEFLATE_MAX_RATIO = 1032
};

static const uint8_t png_signature[PNG_SIGNATURE_SIZE] = {137, 'P', 'N', 'G', 13, 10, 26, 10};

struct png_cursor {
    const uint8_t *at;
    size_t left;
};

struct png_chunk {
    char type[5];
    const uint8_t *data;
    uint32_t size;
};

struct png_reader {
    const char *name;              /* of the file, for messages */
    lvm_error *error;
    struct png_cursor file;
    struct crc32 crc;
    int width, height, colour, channels;
    const uint8_t *palette;        /* [n_colours][RGB], inside the file's bytes */
    int n_colours;
    uint8_t *idat;                 /* the data of all IDAT chunks [idat_size] */
    size_t idat_size;
    int idat_ended;
};

static uint32_t png_u32(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* The next n bytes, or NULL where the file has fewer. */
static const uint8_t *png_take(struct png_cursor *c, size_t n) {
    if (n > c->left) return NULL;
    const uint8_t *p = c->at;
    c->at += n;
    c->left -= n;
    return p;
}

static int png_next_chunk(struct png_reader *png, struct png_chunk *chunk) {
    const uint8_t *head = png_take(&png->file, 8);
    if (!head)
        return fail(png->error, LVM_FORMAT, "%s: the PNG file is cut off before its end (IEND)",
                    png->name);
    for (int i = 0; i < 4; i++) {
        int letter = head[4 + i];
        if (!((letter >= 'A' && letter <= 'Z') || (letter >= 'a' && letter <= 'z')))
            return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: a chunk has no name",
                        png->name);
        chunk->type[i] = (char)letter;
    }
    chunk->type[4] = 0;
    chunk->size = png_u32(head);
    chunk->data = png_take(&png->file, chunk->size);
    const uint8_t *crc = chunk->data ? png_take(&png->file, 4) : NULL;
    if (!crc)
        return fail(png->error, LVM_FORMAT, "%s: the PNG file is cut off inside its %s chunk",
                    png->name, chunk->type);
    if (checksum_wrong(png_u32(crc), crc32_of(&png->crc, head + 4, (size_t)chunk->size + 4)))
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: wrong checksum in its %s chunk", png->name, chunk->type);
    return LVM_OK;
}

/* Bit d of the result: depth d is legal for this colour type. 0: no colour type. */
static uint32_t png_legal_depths(int colour) {
    switch (colour) {
    case PNG_GREY: return 1u << 1 | 1u << 2 | 1u << 4 | 1u << 8 | 1u << 16;
    case PNG_PALETTE: return 1u << 1 | 1u << 2 | 1u << 4 | 1u << 8;
    case PNG_RGB: case PNG_GREY_ALPHA: case PNG_RGB_ALPHA: return 1u << 8 | 1u << 16;
    default: return 0;
    }
}

static const char *png_colour_name(int colour) {
    switch (colour) {
    case PNG_GREY: return "greyscale";
    case PNG_PALETTE: return "palette";
    case PNG_RGB: return "RGB";
    case PNG_GREY_ALPHA: return "greyscale and alpha";
    default: return "RGB and alpha";
    }
}

static int png_header(struct png_reader *png, const struct png_chunk *chunk) {
    const uint8_t *d = chunk->data;
    if (strcmp(chunk->type, "IHDR") != 0 || chunk->size != PNG_HEADER_SIZE)
        return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: no header (IHDR) in front",
                    png->name);
    uint32_t width = png_u32(d), height = png_u32(d + 4);
    int depth = d[8], interlace = d[12];
    png->colour = d[9];
    if (!image_sides_ok(width, height))
        return fail(png->error, LVM_FORMAT,
                    "%s: a PNG picture of %lu x %lu pixels: must be 1 to 2^28 pixels", png->name,
                    (unsigned long)width, (unsigned long)height);
    if (depth > 16 || !(png_legal_depths(png->colour) >> depth & 1))
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: colour type %d with %d bits does not exist", png->name,
                    png->colour, depth);
    if (d[10] || d[11] || interlace > 1)
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: unknown method (compression %d, filter %d, "
                    "interlace %d)", png->name, d[10], d[11], interlace);
    if (depth != 8 || interlace)
        return fail(png->error, LVM_UNSUPPORTED,
                    "%s: %s %d-bit %s PNG; lvm reads plain 8-bit PNG: convert it first",
                    png->name, interlace ? "an interlaced" : "a", depth,
                    png_colour_name(png->colour));
    png->width = (int)width;
    png->height = (int)height;
    png->channels = png->colour == PNG_RGB ? 3 : png->colour == PNG_RGB_ALPHA ? 4 :
                    png->colour == PNG_GREY_ALPHA ? 2 : 1;
    return LVM_OK;
}

static int png_palette(struct png_reader *png, const struct png_chunk *chunk) {
    if (png->colour != PNG_PALETTE) return LVM_OK;   /* only a suggestion there */
    if (png->palette || png->idat_size)
        return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: %s", png->name,
                    png->palette ? "two palettes (PLTE)" : "its palette comes after the pixels");
    if (chunk->size == 0 || chunk->size % RGB || chunk->size > 256 * RGB)
        return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: a palette of %lu bytes",
                    png->name, (unsigned long)chunk->size);
    png->palette = chunk->data;
    png->n_colours = (int)(chunk->size / RGB);
    return LVM_OK;
}

static int png_idat(struct png_reader *png, const struct png_chunk *chunk) {
    if (png->idat_ended)
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: other chunks between its IDAT chunks", png->name);
    if (!png->idat) {   /* all that the file still holds is the most that can come */
        png->idat = mem_alloc(png->file.left + chunk->size, 1, png->error);
        if (!png->idat) return LVM_MEMORY;
    }
    memcpy(png->idat + png->idat_size, chunk->data, chunk->size);
    png->idat_size += chunk->size;
    return LVM_OK;
}

/* Walks over all chunks and collects what the pixels need. */
static int png_chunks(struct png_reader *png) {
    struct png_chunk chunk;
    int code = png_next_chunk(png, &chunk);
    if (!code) code = png_header(png, &chunk);
    while (!code) {
        code = png_next_chunk(png, &chunk);
        if (code) break;
        int is_idat = strcmp(chunk.type, "IDAT") == 0;
        if (png->idat && !is_idat) png->idat_ended = 1;
        if (strcmp(chunk.type, "IEND") == 0) break;
        if (is_idat)
            code = png_idat(png, &chunk);
        else if (strcmp(chunk.type, "PLTE") == 0)
            code = png_palette(png, &chunk);
        else if (chunk.type[0] < 'a')
            code = fail(png->error, LVM_FORMAT, "%s: a PNG file with %s chunk %s where none may be",
                        png->name, strcmp(chunk.type, "IHDR") ? "an unknown" : "a second",
                        chunk.type);
    }
    if (code) return code;
    if (!png->idat_size)
        return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: no pixels (IDAT)", png->name);
    if (png->colour == PNG_PALETTE && !png->palette)
        return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: no palette (PLTE)", png->name);
    return LVM_OK;
}

/* Of left a, above b and above-left c, the one nearest to a + b - c; ties in this order. */
static inline int png_paeth(int a, int b, int c) {
    int to_a = b > c ? b - c : c - b;
    int to_b = a > c ? a - c : c - a;
    int to_c = a + b - 2 * c;
    if (to_c < 0) to_c = -to_c;
    if (to_a <= to_b && to_a <= to_c) return a;
    return to_b <= to_c ? b : c;
}

/* Undoes a row's filter in place; above is the row above, unfiltered. False: no such filter. */
static int png_unfilter(int filter, uint8_t *row, const uint8_t *above, size_t n, size_t pixel) {
    switch (filter) {
    case 0:
        return 1;
    case 1:
        for (size_t i = pixel; i < n; i++) row[i] = (uint8_t)(row[i] + row[i - pixel]);
        return 1;
    case 2:
        for (size_t i = 0; i < n; i++) row[i] = (uint8_t)(row[i] + above[i]);
        return 1;
    case 3:
        for (size_t i = 0; i < pixel; i++) row[i] = (uint8_t)(row[i] + above[i] / 2);
        for (size_t i = pixel; i < n; i++)
            row[i] = (uint8_t)(row[i] + (row[i - pixel] + above[i]) / 2);
        return 1;
    case 4:
        for (size_t i = 0; i < pixel; i++) row[i] = (uint8_t)(row[i] + above[i]);
        for (size_t i = pixel; i < n; i++)
            row[i] = (uint8_t)(row[i] + png_paeth(row[i - pixel], above[i], above[i - pixel]));
        return 1;
    default:
        return 0;
    }
}

/* One row of any colour type to RGB. False: a pixel names a colour beyond the palette. */
static int png_row_to_rgb(const struct png_reader *png, const uint8_t *row, uint8_t *rgb) {
    size_t n = (size_t)png->width, step = (size_t)png->channels;
    switch (png->colour) {
    case PNG_RGB:
        memcpy(rgb, row, n * RGB);
        return 1;
    case PNG_RGB_ALPHA:
        for (size_t i = 0; i < n; i++) memcpy(rgb + RGB * i, row + step * i, RGB);
        return 1;
    case PNG_PALETTE:
        for (size_t i = 0; i < n; i++) {
            if (row[i] >= png->n_colours) return 0;
            memcpy(rgb + RGB * i, png->palette + RGB * row[i], RGB);
        }
        return 1;
    default:
        for (size_t i = 0; i < n; i++) memset(rgb + RGB * i, row[step * i], RGB);
        return 1;
    }
}

/* raw: [height][1 + width * channels], the filter byte in front of each row. */
static int png_pixels(struct png_reader *png, uint8_t *raw, lvm_image *image) {
    size_t n = (size_t)png->width * (size_t)png->channels;
    uint8_t *zero = mem_alloc(n, 1, png->error);   /* the row above the first */
    if (!zero) return LVM_MEMORY;
    const uint8_t *above = zero;
    int code = image_new(image, png->width, png->height, png->error);
    for (int y = 0; y < png->height && !code; y++) {
        uint8_t *row = raw + (size_t)y * (n + 1);
        if (!png_unfilter(row[0], row + 1, above, n, (size_t)png->channels))
            code = fail(png->error, LVM_FORMAT, "%s: damaged PNG file: row %d has filter %d",
                        png->name, y, row[0]);
        else if (!png_row_to_rgb(png, row + 1, image->rgb + (size_t)y * (size_t)png->width * RGB))
            code = fail(png->error, LVM_FORMAT,
                        "%s: damaged PNG file: row %d uses a colour beyond its palette of %d",
                        png->name, y, png->n_colours);
        above = row + 1;
    }
    mem_free(zero);
    if (code) lvm_image_free(image);
    return code;
}

static int png_decompress(struct png_reader *png, lvm_image *image) {
    size_t row = 1 + (size_t)png->width * (size_t)png->channels, height = (size_t)png->height;
    if (row * height / DEFLATE_MAX_RATIO > png->idat_size)
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: %lu bytes of data cannot hold %d x %d pixels",
                    png->name, (unsigned long)png->idat_size, png->width, png->height);
    uint8_t *raw = mem_alloc(height, row, png->error);
    struct inflate *z = mem_alloc(1, sizeof *z, png->error);
    int code = raw && z ? LVM_OK : LVM_MEMORY;
    if (!code) {
        const char *fault = inflate_zlib(z, png->idat, png->idat_size, raw, height * row);
        if (fault)
            code = fail(png->error, LVM_FORMAT, "%s: damaged PNG file: %s", png->name, fault);
    }
    if (!code) code = png_pixels(png, raw, image);
    mem_free(z);
    mem_free(raw);
    return code;
}

static int png_load(const uint8_t *data, size_t size, const char *name, lvm_image *image,
                    lvm_error *error) {
    struct png_reader png = {.name = name, .error = error, .file = {data, size}};
    crc32_init(&png.crc);
    png_take(&png.file, PNG_SIGNATURE_SIZE);   /* the caller recognised it */
    int code = png_chunks(&png);
    if (!code) code = png_decompress(&png, image);
    mem_free(png.idat);
    return code;
}

/* ---- Recognising what a file is ----

   By its first bytes, never by its name. Pictures in formats that lvm does not read are named, so
   that their owner knows what to convert. */

struct picture_kind {
    int offset, size;
    const char *bytes, *name;
};

static const struct picture_kind picture_kinds[] = {
    {0, 3, "\xFF\xD8\xFF", "JPEG"},     {0, 4, "GIF8", "GIF"},
    {8, 4, "WEBP", "WebP"},             {0, 2, "BM", "BMP"},
    {4, 8, "ftypheic", "HEIC"},         {4, 8, "ftypheix", "HEIC"},
    {4, 8, "ftyphevc", "HEIC"},         {4, 8, "ftypmif1", "HEIC"},
    {4, 8, "ftypmsf1", "HEIC"},         {4, 8, "ftypavif", "AVIF"},
    {4, 8, "ftypavis", "AVIF"},         {0, 4, "II*\0", "TIFF"},
    {0, 4, "MM\0*", "TIFF"},            {4, 4, "JXL ", "JPEG XL"},
    {0, 2, "\xFF\x0A", "JPEG XL"},      {4, 4, "jP  ", "JPEG 2000"},
};

static const char *picture_name(const uint8_t *data, size_t size) {
    for (size_t i = 0; i < sizeof picture_kinds / sizeof *picture_kinds; i++) {
        const struct picture_kind *kind = &picture_kinds[i];
        size_t end = (size_t)(kind->offset + kind->size);
        if (size >= end && !memcmp(data + kind->offset, kind->bytes, (size_t)kind->size))
            return kind->name;
    }
    if (size > 2 && data[0] == 'P' && data[1] >= '1' && data[1] <= '7' &&
        (data[2] == '\n' || data[2] == ' ' || data[2] == '\t' || data[2] == '\r'))
        return "PNM";
    return NULL;
}

int lvm_image_load_memory(const void *data, size_t size, const char *name, lvm_image *image,
                          lvm_error *error) {
    const uint8_t *bytes = data;
    *image = (lvm_image){0, 0, NULL};
    if (size == 0) return fail(error, LVM_FORMAT, "%s is empty", name);
    if (size >= PNG_SIGNATURE_SIZE && !memcmp(bytes, png_signature, PNG_SIGNATURE_SIZE))
        return png_load(bytes, size, name, image, error);
    const char *kind = picture_name(bytes, size);
    if (kind)
        return fail(error, LVM_UNSUPPORTED, "%s is a %s picture; lvm reads PNG: convert it first",
                    name, kind);
    if (size >= 4 && !memcmp(bytes, png_signature, 4))
        return fail(error, LVM_FORMAT, "%s: damaged PNG file: its first %d bytes were changed "
                    "(copied as text?) or are missing", name, PNG_SIGNATURE_SIZE);
    return fail(error, LVM_FORMAT, "%s is no picture that lvm knows: it reads PNG", name);
}

int lvm_image_load(const char *path, lvm_image *image, lvm_error *error) {
    uint8_t *data = NULL;
    size_t size = 0;
    *image = (lvm_image){0, 0, NULL};
    int code = read_file(path, &data, &size, error);
    if (code) return code;
    code = lvm_image_load_memory(data, size, path, image, error);
    mem_free(data);
    return code;
}

/* ---- Deflate ----

   Matches are found through hash chains: head[h] is the latest position whose next four bytes
   hash to h, prev[p mod window] the one before p with the same hash. A match is taken lazily: if
   the next byte starts a longer one, this byte goes out as a literal instead. Symbols gather into
   blocks; a block is written with its own Huffman codes, with the fixed ones or stored, whichever
   is shortest. The stored form bounds the output, so its buffer is allocated once. */

enum {
    DEFLATE_HASH_BITS = 15, DEFLATE_HASH_BYTES = 4,
    DEFLATE_SHORTEST = 6,            /* filtered rows are noisy: shorter matches cost more */
    DEFLATE_CHAIN = 64,              /* positions tried for a match */
    DEFLATE_LAZY_LENGTH = 64,        /* a match this long is taken at once */
    DEFLATE_NICE_LENGTH = 130,       /* a match this long ends the search */
    DEFLATE_BLOCK_SYMBOLS = 16384,
    DEFLATE_STORED_MAX = 65535
};

struct bit_writer {
    uint8_t *at;
    uint64_t hold;
    int count;
};

struct deflate_codes {
    uint8_t literal_length[HUFFMAN_MAX_SYMBOLS], distance_length[32];
    uint16_t literal_code[HUFFMAN_MAX_SYMBOLS], distance_code[32];
};

/* A block's header: the code lengths of both codes as runs, and the code that those use. */
struct deflate_header {
    int n_literals, n_distances, n_listed, n_runs;
    uint8_t run_symbol[DEFLATE_LITERALS + DEFLATE_DISTANCES];
    uint8_t run_extra[DEFLATE_LITERALS + DEFLATE_DISTANCES];
    uint8_t length[19];
    uint16_t code[19];
    uint64_t bits;   /* what all this takes */
};

struct deflate {
    const uint8_t *in;
    size_t size, hashed;                        /* positions below `hashed` are in the chains */
    int32_t head[1 << DEFLATE_HASH_BITS], prev[DEFLATE_WINDOW];   /* -1: none */
    size_t block_start;
    int n_symbols;
    uint32_t symbols[DEFLATE_BLOCK_SYMBOLS];    /* literal, or distance << 16 | length */
    uint32_t literal_count[DEFLATE_LITERALS], distance_count[DEFLATE_DISTANCES];
    struct bit_writer bits;
    struct deflate_codes own, fixed;
    struct deflate_header header;
};

static void bits_put(struct bit_writer *b, uint32_t value, int n) {
    b->hold |= (uint64_t)value << b->count;
    b->count += n;
    for (; b->count >= 8; b->count -= 8, b->hold >>= 8) *b->at++ = (uint8_t)b->hold;
}

static void bits_align(struct bit_writer *b) {
    bits_put(b, 0, -b->count & 7);
}

/* Sorted leaf weights to depths, by Huffman's two queues: the leaves, and the inner nodes in the
   order they arise, which is ascending too. Returns the greatest depth. */
static int huffman_depths(const uint32_t *weight, int n, uint8_t *depth) {
    uint32_t inner[HUFFMAN_MAX_SYMBOLS];
    int parent[2 * HUFFMAN_MAX_SYMBOLS], leaf = 0, node = 0, deepest = 0;
    int level[2 * HUFFMAN_MAX_SYMBOLS];
    for (int made = 0; made < n - 1; made++) {
        inner[made] = 0;
        for (int k = 0; k < 2; k++) {
            if (leaf < n && (node == made || weight[leaf] <= inner[node])) {
                inner[made] += weight[leaf];
                parent[leaf++] = n + made;
            } else {
                inner[made] += inner[node];
                parent[n + node++] = n + made;
            }
        }
    }
    level[2 * n - 2] = 0;   /* the root; parents have higher numbers than their children */
    for (int i = 2 * n - 3; i >= 0; i--) {
        level[i] = level[parent[i]] + 1;
        if (i >= n) continue;
        depth[i] = (uint8_t)level[i];
        if (level[i] > deepest) deepest = level[i];
    }
    return deepest;
}

/* Code lengths of at most max_bits for symbols seen count[] times. Where Huffman's tree is too
   deep, the weights are halved, rounding up, until it fits: close to the best, and rare. */
static void huffman_lengths(const uint32_t *count, int n, int max_bits, uint8_t *length) {
    uint16_t symbol[HUFFMAN_MAX_SYMBOLS];
    uint32_t weight[HUFFMAN_MAX_SYMBOLS];
    uint8_t depth[HUFFMAN_MAX_SYMBOLS];
    int used = 0;
    memset(length, 0, (size_t)n);
    for (int i = 0; i < n; i++) {
        if (!count[i]) continue;
        int j = used++;
        for (; j > 0 && weight[j - 1] > count[i]; j--) {
            weight[j] = weight[j - 1];
            symbol[j] = symbol[j - 1];
        }
        weight[j] = count[i];
        symbol[j] = (uint16_t)i;
    }
    if (used < 2) {   /* one code of one bit, though nothing may use it */
        length[used ? symbol[0] : 0] = 1;
        return;
    }
    while (huffman_depths(weight, used, depth) > max_bits)
        for (int i = 0; i < used; i++) weight[i] = (weight[i] + 1) / 2;
    for (int i = 0; i < used; i++) length[symbol[i]] = depth[i];
}

/* Splits the code lengths into runs: a length, 16: the last again 3..6 times, 17 and 18: zeros. */
static void deflate_runs(struct deflate_header *h, const uint8_t *length, int n) {
    h->n_runs = 0;
    for (int i = 0; i < n;) {
        int run = 1, symbol = length[i], extra = 0;
        while (i + run < n && length[i + run] == length[i]) run++;
        if (length[i] == 0 && run >= 3) {
            if (run > 138) run = 138;
            symbol = run <= 10 ? 17 : 18;
            extra = run - (run <= 10 ? 3 : 11);
        } else if (i > 0 && length[i] == length[i - 1] && run >= 3) {
            if (run > 6) run = 6;
            symbol = 16;
            extra = run - 3;
        } else {
            run = 1;
        }
        h->run_symbol[h->n_runs] = (uint8_t)symbol;
        h->run_extra[h->n_runs++] = (uint8_t)extra;
        i += run;
    }
}

static int run_extra_bits(int symbol) {
    return symbol == 16 ? 2 : symbol == 17 ? 3 : symbol == 18 ? 7 : 0;
}

static void deflate_plan_header(struct deflate *d) {
    struct deflate_header *h = &d->header;
    uint8_t all[DEFLATE_LITERALS + DEFLATE_DISTANCES];
    uint32_t count[19] = {0};
    h->n_literals = DEFLATE_LITERALS;
    h->n_distances = DEFLATE_DISTANCES;
    while (h->n_literals > 257 && !d->own.literal_length[h->n_literals - 1]) h->n_literals--;
    while (h->n_distances > 1 && !d->own.distance_length[h->n_distances - 1]) h->n_distances--;
    memcpy(all, d->own.literal_length, (size_t)h->n_literals);
    memcpy(all + h->n_literals, d->own.distance_length, (size_t)h->n_distances);
    deflate_runs(h, all, h->n_literals + h->n_distances);

    for (int i = 0; i < h->n_runs; i++) count[h->run_symbol[i]]++;
    huffman_lengths(count, 19, 7, h->length);
    huffman_codes(h->length, 19, h->code);
    h->n_listed = 19;
    while (h->n_listed > 4 && !h->length[deflate_header_order[h->n_listed - 1]]) h->n_listed--;
    h->bits = 14 + 3 * (uint64_t)h->n_listed;
    for (int i = 0; i < 19; i++)
        h->bits += (uint64_t)count[i] * (uint64_t)(h->length[i] + run_extra_bits(i));
}

static void deflate_put_header(struct deflate *d) {
    const struct deflate_header *h = &d->header;
    bits_put(&d->bits, (uint32_t)(h->n_literals - 257), 5);
    bits_put(&d->bits, (uint32_t)(h->n_distances - 1), 5);
    bits_put(&d->bits, (uint32_t)(h->n_listed - 4), 4);
    for (int i = 0; i < h->n_listed; i++)
        bits_put(&d->bits, h->length[deflate_header_order[i]], 3);
    for (int i = 0; i < h->n_runs; i++) {
        int symbol = h->run_symbol[i];
        bits_put(&d->bits, h->code[symbol], h->length[symbol]);
        bits_put(&d->bits, h->run_extra[i], run_extra_bits(symbol));
    }
}

static void deflate_put_symbols(struct deflate *d, const struct deflate_codes *c) {
    struct bit_writer *b = &d->bits;
    for (int i = 0; i < d->n_symbols; i++) {
        int low = (int)(d->symbols[i] & 0xFFFF), distance = (int)(d->symbols[i] >> 16);
        if (!distance) {
            bits_put(b, c->literal_code[low], c->literal_length[low]);
            continue;
        }
        int class = length_class(low), symbol = DEFLATE_MATCH + class;
        bits_put(b, c->literal_code[symbol], c->literal_length[symbol]);
        bits_put(b, (uint32_t)(low - length_base(class)), length_extra_bits(class));
        class = class_of((unsigned)distance - 1, DISTANCE_BITS);
        bits_put(b, c->distance_code[class], c->distance_length[class]);
        bits_put(b, (uint32_t)(distance - 1 - class_base(class, DISTANCE_BITS)),
                 class_extra_bits(class, DISTANCE_BITS));
    }
    bits_put(b, c->literal_code[DEFLATE_END], c->literal_length[DEFLATE_END]);
}

static void deflate_put_stored(struct deflate *d, const uint8_t *data, size_t size, int last) {
    do {
        size_t n = size < DEFLATE_STORED_MAX ? size : DEFLATE_STORED_MAX;
        bits_put(&d->bits, last && n == size, 3);   /* kind 0 */
        bits_align(&d->bits);
        bits_put(&d->bits, (uint32_t)n, 16);
        bits_put(&d->bits, (uint32_t)~n & 0xFFFF, 16);
        memcpy(d->bits.at, data, n);
        d->bits.at += n;
        data += n;
        size -= n;
    } while (size);
}

/* The bits that the block's symbols take in these codes, without header. */
static uint64_t deflate_cost(const struct deflate *d, const struct deflate_codes *c) {
    uint64_t bits = 0;
    for (int i = 0; i < DEFLATE_LITERALS; i++) {
        int extra = i < DEFLATE_MATCH ? 0 : length_extra_bits(i - DEFLATE_MATCH);
        bits += (uint64_t)d->literal_count[i] * (uint64_t)(c->literal_length[i] + extra);
    }
    for (int i = 0; i < DEFLATE_DISTANCES; i++)
        bits += (uint64_t)d->distance_count[i] *
                (uint64_t)(c->distance_length[i] + class_extra_bits(i, DISTANCE_BITS));
    return bits;
}

static void deflate_assign_codes(struct deflate_codes *c) {
    huffman_codes(c->literal_length, HUFFMAN_MAX_SYMBOLS, c->literal_code);
    huffman_codes(c->distance_length, DEFLATE_DISTANCES, c->distance_code);
}

/* Writes the gathered symbols, which stand for the input from block_start up to `end`. */
static void deflate_block(struct deflate *d, size_t end) {
    size_t size = end - d->block_start;
    int last = end == d->size;
    d->literal_count[DEFLATE_END] = 1;
    huffman_lengths(d->literal_count, DEFLATE_LITERALS, HUFFMAN_MAX_BITS, d->own.literal_length);
    huffman_lengths(d->distance_count, DEFLATE_DISTANCES, HUFFMAN_MAX_BITS,
                    d->own.distance_length);
    deflate_assign_codes(&d->own);
    deflate_plan_header(d);

    uint64_t own = d->header.bits + deflate_cost(d, &d->own);
    uint64_t fixed = deflate_cost(d, &d->fixed);
    uint64_t stored = 8 * (uint64_t)size + 40 * (uint64_t)(size / DEFLATE_STORED_MAX + 1);
    if (stored <= own && stored <= fixed) {
        deflate_put_stored(d, d->in + d->block_start, size, last);
    } else if (fixed <= own) {
        bits_put(&d->bits, (uint32_t)(last | 1 << 1), 3);
        deflate_put_symbols(d, &d->fixed);
    } else {
        bits_put(&d->bits, (uint32_t)(last | 2 << 1), 3);
        deflate_put_header(d);
        deflate_put_symbols(d, &d->own);
    }
    d->block_start = end;
    d->n_symbols = 0;
    memset(d->literal_count, 0, sizeof d->literal_count);
    memset(d->distance_count, 0, sizeof d->distance_count);
}

/* One symbol more; `end` is where the input goes on behind it. */
static void deflate_symbol(struct deflate *d, int value, int distance, size_t end) {
    d->symbols[d->n_symbols++] = (uint32_t)distance << 16 | (uint32_t)value;
    if (distance) {
        d->literal_count[DEFLATE_MATCH + length_class(value)]++;
        d->distance_count[class_of((unsigned)distance - 1, DISTANCE_BITS)]++;
    } else {
        d->literal_count[value]++;
    }
    if (d->n_symbols == DEFLATE_BLOCK_SYMBOLS || end == d->size) deflate_block(d, end);
}

static uint32_t deflate_hash(const uint8_t *p) {
    uint32_t four = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    return four * 0x9E3779B1u >> (32 - DEFLATE_HASH_BITS);
}

/* Puts all positions below `end` into the chains. */
static void deflate_hash_until(struct deflate *d, size_t end) {
    for (; d->hashed < end && d->size - d->hashed >= DEFLATE_HASH_BYTES; d->hashed++) {
        int32_t *head = &d->head[deflate_hash(d->in + d->hashed)];
        d->prev[d->hashed % DEFLATE_WINDOW] = *head;
        *head = (int32_t)d->hashed;
    }
}

static int match_length(const uint8_t *a, const uint8_t *b, int most) {
    int n = 0;
    while (n < most && a[n] == b[n]) n++;
    return n;
}

/* The longest match at `at` that is longer than `beat`; 0 if there is none. */
static int deflate_longest(struct deflate *d, size_t at, int beat, int *distance) {
    if (d->size - at < DEFLATE_SHORTEST) return 0;
    int most = d->size - at < DEFLATE_MAX_LENGTH ? (int)(d->size - at) : DEFLATE_MAX_LENGTH;
    int best = beat < DEFLATE_SHORTEST ? DEFLATE_SHORTEST - 1 : beat, found = 0;
    int tries = DEFLATE_CHAIN;
    const uint8_t *here = d->in + at;
    deflate_hash_until(d, at);
    int32_t from = d->head[deflate_hash(here)];
    while (from >= 0 && at - (size_t)from <= DEFLATE_WINDOW && tries-- && best < most) {
        const uint8_t *there = d->in + from;
        if (there[best] == here[best] && there[best - 1] == here[best - 1]) {
            int length = match_length(here, there, most);
            if (length > best) {
                best = found = length;
                *distance = (int)(at - (size_t)from);
                if (length >= DEFLATE_NICE_LENGTH) break;
            }
        }
        int32_t before = d->prev[(size_t)from % DEFLATE_WINDOW];
        if (before >= from) break;   /* overwritten: the chain left the window */
        from = before;
    }
    return found;
}

static void deflate_all(struct deflate *d) {
    for (size_t at = 0; at < d->size;) {
        int distance = 0, length = deflate_longest(d, at, 0, &distance);
        while (length && length < DEFLATE_LAZY_LENGTH) {
            int later_distance = 0;
            int later = deflate_longest(d, at + 1, length, &later_distance);
            if (!later) break;
            deflate_symbol(d, d->in[at], 0, at + 1);
            at++;
            length = later;
            distance = later_distance;
        }
        if (length) {
            at += (size_t)length;
            deflate_symbol(d, length, distance, at);
        } else {
            at++;
            deflate_symbol(d, d->in[at - 1], 0, at);
        }
    }
}

/* No block is longer than its stored form: 5 bytes and a few bits around up to 65535 bytes, and
   blocks end at 16384 symbols (a byte or more each), at the end, or where stored data split. */
static size_t deflate_bound(size_t size) {
    return size + 6 * (size / DEFLATE_BLOCK_SYMBOLS + size / DEFLATE_STORED_MAX + 2) + 16;
}

/* Compresses to a zlib stream at out, which has room for deflate_bound(size). size > 0 and below
   2^31. Returns the stream's size, or 0 where memory ran out. */
static size_t deflate_zlib(const uint8_t *data, size_t size, uint8_t *out, lvm_error *error) {
    struct deflate *d = mem_alloc(1, sizeof *d, error);
    if (!d) return 0;
    d->in = data;
    d->size = size;
    memset(d->head, 0xFF, sizeof d->head);
    deflate_fixed_lengths(d->fixed.literal_length, d->fixed.distance_length);
    deflate_assign_codes(&d->fixed);
    d->bits.at = out;
    bits_put(&d->bits, 0x78, 8);   /* deflate, 32 KB window */
    bits_put(&d->bits, 0x9C, 8);   /* default effort; makes the pair a multiple of 31 */
    deflate_all(d);
    bits_align(&d->bits);
    uint32_t adler = adler32_of(data, size);
    for (int shift = 24; shift >= 0; shift -= 8) bits_put(&d->bits, adler >> shift & 255, 8);
    size_t written = (size_t)(d->bits.at - out);
    mem_free(d);
    return written;
}

/* ---- PNG out ----

   8-bit RGB, one IDAT. Each row takes the filter whose output, read as signed bytes, has the
   smallest sum of absolute values: the standard's own rule of thumb. Filter 3, the average, is not
   tried: it gains nothing on photos and breaks up the repetitions of drawings. */

/* Filters a row of n bytes; both rows have a zero pixel in front. Returns the sum of |output|.
   Inlined once for each constant filter, which takes the choice out of the loop. */
static inline uint64_t png_filter_as(int filter, const uint8_t *row, const uint8_t *above,
                                     size_t n, uint8_t *out) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        int a = row[i - RGB], b = above[i], c = above[i - RGB];
        int guess = filter == 0 ? 0 : filter == 1 ? a : filter == 2 ? b : png_paeth(a, b, c);
        uint8_t rest = (uint8_t)(row[i] - guess);
        out[i] = rest;
        sum += rest < 128 ? rest : 256u - rest;
    }
    return sum;
}

static uint64_t png_filter(int filter, const uint8_t *row, const uint8_t *above, size_t n,
                           uint8_t *out) {
    switch (filter) {
    case 0: return png_filter_as(0, row, above, n, out);
    case 1: return png_filter_as(1, row, above, n, out);
    case 2: return png_filter_as(2, row, above, n, out);
    default: return png_filter_as(4, row, above, n, out);
    }
}

/* out: [height][1 + width * RGB], the filter byte in front of each row. */
static int png_filter_rows(const lvm_image *image, uint8_t *out, lvm_error *error) {
    static const uint8_t tried[3] = {1, 2, 4};
    size_t n = (size_t)image->width * RGB;
    uint8_t *scratch = mem_alloc(3, n + RGB, error);   /* two padded rows and a trial */
    if (!scratch) return LVM_MEMORY;
    uint8_t *row = scratch + RGB, *above = row + n + RGB, *trial = above + n;
    for (int y = 0; y < image->height; y++, out += 1 + n) {
        memcpy(row, image->rgb + (size_t)y * n, n);
        out[0] = 0;
        uint64_t least = png_filter(0, row, above, n, out + 1);
        for (int i = 0; i < 3 && least; i++) {
            uint64_t sum = png_filter(tried[i], row, above, n, trial);
            if (sum >= least) continue;
            least = sum;
            out[0] = tried[i];
            memcpy(out + 1, trial, n);
        }
        uint8_t *swap = above;
        above = row;
        row = swap;
    }
    mem_free(scratch);
    return LVM_OK;
}

static uint8_t *png_put_u32(uint8_t *at, uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8) *at++ = (uint8_t)(value >> shift);
    return at;
}

/* Completes a chunk whose data already lie at at + 8; returns the place behind it. */
static uint8_t *png_put_chunk(uint8_t *at, const char *type, size_t size, const struct crc32 *crc) {
    png_put_u32(at, (uint32_t)size);
    memcpy(at + 4, type, 4);
    return png_put_u32(at + 8 + size, crc32_of(crc, at + 4, size + 4));
}

/* The whole PNG file in *png (mem_free it). */
static int png_encode(const lvm_image *image, uint8_t **png, size_t *size, lvm_error *error) {
    size_t row = 1 + (size_t)image->width * RGB, raw_size = row * (size_t)image->height;
    uint8_t *raw = mem_alloc((size_t)image->height, row, error);
    if (!raw) return LVM_MEMORY;
    int code = png_filter_rows(image, raw, error);
    size_t frame = PNG_SIGNATURE_SIZE + 3 * PNG_CHUNK_FRAME + PNG_HEADER_SIZE;
    *png = code ? NULL : mem_alloc(deflate_bound(raw_size) + frame, 1, error);
    if (*png) {
        struct crc32 crc;
        crc32_init(&crc);
        memcpy(*png, png_signature, PNG_SIGNATURE_SIZE);
        uint8_t *at = *png + PNG_SIGNATURE_SIZE;
        png_put_u32(at + 8, (uint32_t)image->width);
        png_put_u32(at + 12, (uint32_t)image->height);
        memcpy(at + 16, (const uint8_t[5]){8, PNG_RGB, 0, 0, 0}, 5);
        at = png_put_chunk(at, "IHDR", PNG_HEADER_SIZE, &crc);
        size_t packed = deflate_zlib(raw, raw_size, at + 8, error);
        if (packed) {
            at = png_put_chunk(at, "IDAT", packed, &crc);
            at = png_put_chunk(at, "IEND", 0, &crc);
            *size = (size_t)(at - *png);
        } else {
            mem_free(*png);
            *png = NULL;
        }
    }
    mem_free(raw);
    return *png ? LVM_OK : LVM_MEMORY;
}

int lvm_image_save(const char *path, const lvm_image *image, lvm_error *error) {
    uint8_t *png = NULL;
    size_t size = 0;
    if (!image->rgb || !image_sides_ok(image->width, image->height))
        return fail(error, LVM_INVALID, "%s: cannot write a picture of %d x %d pixels", path,
                    image->width, image->height);
    int code = png_encode(image, &png, &size, error);
    if (code) return code;
    code = write_file(path, png, size, error);
    mem_free(png);
    return code;
}

/* ---- Resizing ----

   Two passes, along rows, then along columns, each only where that side changes, with bytes in
   between. Weights are computed in double and rounded to integers in units of 2^-22: sums of
   weight times byte overshoot by less than a factor of two either way and so fit in 32 bits. */

enum { RESIZE_BITS = 32 - 8 - 2, RESIZE_HALF = 1 << (RESIZE_BITS - 1) };

/* For one side: output i is the sum over k < count[i] of weight[i][k] * input[first[i] + k]. */
struct resize_taps {
    int n, longest;      /* outputs; room for weights of each */
    int *first, *count;  /* [n] */
    int32_t *weight;     /* [n][longest] */
};

static double bicubic(double x) {
    const double a = -0.5;
    if (x < 0) x = -x;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

static int resize_clip(int32_t sum) {
    if (sum < 0) return 0;
    return sum >> RESIZE_BITS > 255 ? 255 : sum >> RESIZE_BITS;
}

static void resize_taps_free(struct resize_taps *t) {
    mem_free(t->first);
    mem_free(t->count);
    mem_free(t->weight);
}

/* The window and the weights of output i; w is scratch for `longest` numbers. */
static void resize_tap(struct resize_taps *t, int i, int n_in, double *w) {
    double scale = (double)n_in / t->n, stretch = scale < 1 ? 1 : scale;
    double support = 2 * stretch, center = (i + 0.5) * scale, sum = 0, inverse = 1 / stretch;
    int32_t *weight = t->weight + (size_t)i * (size_t)t->longest;
    int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
    if (first < 0) first = 0;
    if (end > n_in) end = n_in;
    for (int k = 0; k < end - first; k++) {
        w[k] = bicubic((k + first - center + 0.5) * inverse);
        sum += w[k];
    }
    for (int k = 0; k < end - first; k++) {
        double share = sum != 0 ? w[k] / sum : w[k];
        weight[k] = (int32_t)(share * (1 << RESIZE_BITS) + (share < 0 ? -0.5 : 0.5));
    }
    t->first[i] = first;
    t->count[i] = end - first;
}

static int resize_taps_make(struct resize_taps *t, int n_in, int n_out, lvm_error *error) {
    double support = 2 * (n_in > n_out ? (double)n_in / n_out : 1);
    int whole = (int)support;
    *t = (struct resize_taps){.n = n_out, .longest = 2 * (whole + (whole < support)) + 1};
    double *w = mem_alloc((size_t)t->longest, sizeof *w, error);
    if (w) t->first = mem_alloc((size_t)n_out, sizeof *t->first, error);
    if (t->first) t->count = mem_alloc((size_t)n_out, sizeof *t->count, error);
    if (t->count)
        t->weight = mem_alloc((size_t)n_out, (size_t)t->longest * sizeof *t->weight, error);
    if (t->weight)
        for (int i = 0; i < n_out; i++) resize_tap(t, i, n_in, w);
    mem_free(w);
    if (t->weight) return LVM_OK;
    resize_taps_free(t);
    return LVM_MEMORY;
}

static void resize_row(const struct resize_taps *t, const uint8_t *in, uint8_t *out) {
    for (int x = 0; x < t->n; x++, out += RGB) {
        const int32_t *weight = t->weight + (size_t)x * (size_t)t->longest;
        const uint8_t *p = in + (size_t)t->first[x] * RGB;
        int32_t r = RESIZE_HALF, g = RESIZE_HALF, b = RESIZE_HALF;
        for (int k = 0; k < t->count[x]; k++, p += RGB) {
            r += p[0] * weight[k];
            g += p[1] * weight[k];
            b += p[2] * weight[k];
        }
        out[0] = (uint8_t)resize_clip(r);
        out[1] = (uint8_t)resize_clip(g);
        out[2] = (uint8_t)resize_clip(b);
    }
}

/* The rows first_row .. first_row + rows of `in`, each resized to `width`. */
static int resize_rows(const lvm_image *in, int first_row, int rows, int width, lvm_image *out,
                       lvm_error *error) {
    struct resize_taps taps;
    if (!image_sides_ok(width, rows))
        return fail(error, LVM_MEMORY, "resizing %d x %d pixels to a width of %d: too large",
                    in->width, in->height, width);
    int code = resize_taps_make(&taps, in->width, width, error);
    if (code) return code;
    code = image_new(out, width, rows, error);
    for (int y = 0; y < rows && !code; y++)
        resize_row(&taps, in->rgb + (size_t)(first_row + y) * (size_t)in->width * RGB,
                   out->rgb + (size_t)y * (size_t)width * RGB);
    resize_taps_free(&taps);
    return code;
}

/* Row first_row of the picture that t was made for is row 0 of `in`. */
static int resize_columns(const struct resize_taps *t, const lvm_image *in, int first_row,
                          lvm_image *out, lvm_error *error) {
    size_t n = (size_t)in->width * RGB;
    int32_t *sum = mem_alloc(n, sizeof *sum, error);
    int code = sum ? image_new(out, in->width, t->n, error) : LVM_MEMORY;
    for (int y = 0; y < t->n && !code; y++) {
        const int32_t *weight = t->weight + (size_t)y * (size_t)t->longest;
        uint8_t *to = out->rgb + (size_t)y * n;
        for (size_t i = 0; i < n; i++) sum[i] = RESIZE_HALF;
        for (int k = 0; k < t->count[y]; k++) {
            const uint8_t *row = in->rgb + (size_t)(t->first[y] - first_row + k) * n;
            for (size_t i = 0; i < n; i++) sum[i] += row[i] * weight[k];
        }
        for (size_t i = 0; i < n; i++) to[i] = (uint8_t)resize_clip(sum[i]);
    }
    mem_free(sum);
    return code;
}

/* Both passes; the first makes only the rows that the second reads. */
static int resize_both(const lvm_image *in, int width, int height, lvm_image *out,
                       lvm_error *error) {
    struct resize_taps taps;
    lvm_image narrow = {0, 0, NULL};
    int code = resize_taps_make(&taps, in->height, height, error);
    if (code) return code;
    int first = taps.first[0], end = taps.first[height - 1] + taps.count[height - 1];
    if (width == in->width) {
        code = resize_columns(&taps, in, 0, out, error);
    } else {
        code = resize_rows(in, first, end - first, width, &narrow, error);
        if (!code) code = resize_columns(&taps, &narrow, first, out, error);
    }
    lvm_image_free(&narrow);
    resize_taps_free(&taps);
    return code;
}

int lvm_image_resize(const lvm_image *in, int width, int height, lvm_image *out, lvm_error *error) {
    lvm_image result = {0, 0, NULL};
    int code;
    if (!in->rgb || !image_sides_ok(in->width, in->height) || !image_sides_ok(width, height))
        return fail(error, LVM_INVALID, "cannot resize a picture of %d x %d to %d x %d pixels",
                    in->width, in->height, width, height);
    if (height != in->height) {
        code = resize_both(in, width, height, &result, error);
    } else if (width != in->width) {
        code = resize_rows(in, 0, in->height, width, &result, error);
    } else {
        code = image_new(&result, width, height, error);
        if (!code) memcpy(result.rgb, in->rgb, (size_t)width * (size_t)height * RGB);
    }
    if (!code) *out = result;
    return code;
}

/* =================================================================================================
   Chapter 11.  Fast kernels: AVX2, AVX-512, NEON

   Each kernel of chapter 3 again, for processors that multiply 4 to 16 floats at a time. What makes
   them fast is only this: enough independent accumulators that a multiply-add can start every half
   cycle (two units, four cycles of latency: eight or more), and as few loads as possible for each
   of them, because a tile of r x c sums reads r + c vectors for r c multiply-adds.

       dot tile    4 rows x 3 rows (AVX2, NEON), 5 x 4 (AVX-512): 7 loads for 12, 9 for 20
       outer tile  6 rows x 16 columns (AVX2), 12 x 16 (AVX-512), 4 x 16 (NEON): a packed strip and
                   broadcast rows
       int tile    AVX2 has no product of signed bytes that cannot overflow, so bytes are widened
                   to 16 bits while packing, two neighbours to a 32-bit lane, 16 rows of weights
                   side by side: one vpmaddwd is 16 products, and lane j is row j. AVX-512 VNNI
                   does four products a lane from bytes, one side unsigned: activations are stored
                   as q + 128, and sum (q + 128) w = sum q w + 128 sum w is put right by packing
                   -128 sum w. NEON multiplies signed bytes as they are.
       int row     eight rows of weights at a time (NEON: four); eight vectors of partial sums
                   become one vector of eight sums by a tree of horizontal additions.

   Compilers keep an array of accumulators in registers only when its loops are unrolled: UNROLL. */

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

static int32_t load_s32(const void *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* ---- AVX2: floats ---- */

enum { A2_ROWS = 4, A2_COLS = 3, A2_OUTER = 6, A2_PACK = STRIP * (4 + 2 * QK) };

/* A mask for the first n < 8 lanes. */
AVX2 static __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Halves first: lane i + lane i+4, then i+2, then i+1. */
AVX2 static float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

AVX2 static void dot_tile_avx2(int k, const float *const *a, const float *const *b, float *c,
                               int ldc) {
    __m256 sum[A2_ROWS][A2_COLS], vb[A2_COLS];
    UNROLL for (int r = 0; r < A2_ROWS; r++)
        UNROLL for (int j = 0; j < A2_COLS; j++) sum[r][j] = _mm256_setzero_ps();
    int i = 0;
    for (; i + 8 <= k; i += 8) {
        UNROLL for (int j = 0; j < A2_COLS; j++) vb[j] = _mm256_loadu_ps(b[j] + i);
        UNROLL for (int r = 0; r < A2_ROWS; r++) {
            __m256 va = _mm256_loadu_ps(a[r] + i);
            UNROLL
            for (int j = 0; j < A2_COLS; j++) sum[r][j] = _mm256_fmadd_ps(va, vb[j], sum[r][j]);
        }
    }
    if (i < k) {
        __m256i mask = first_lanes(k - i);
        UNROLL for (int j = 0; j < A2_COLS; j++) vb[j] = _mm256_maskload_ps(b[j] + i, mask);
        UNROLL for (int r = 0; r < A2_ROWS; r++) {
            __m256 va = _mm256_maskload_ps(a[r] + i, mask);
            UNROLL
            for (int j = 0; j < A2_COLS; j++) sum[r][j] = _mm256_fmadd_ps(va, vb[j], sum[r][j]);
        }
    }
    UNROLL for (int r = 0; r < A2_ROWS; r++)
        UNROLL for (int j = 0; j < A2_COLS; j++) c[r * ldc + j] = sum8(sum[r][j]);
}

/* Eight rows of b, the last repeated when there are fewer. */
AVX2 static void dot_8_avx2(int k, const float *a, const float *b, int64_t ldb, int n, float *c) {
    const float *rows[8];
    __m256 sum[8];
    UNROLL for (int j = 0; j < 8; j++) {
        rows[j] = b + (j < n ? j : n - 1) * ldb;
        sum[j] = _mm256_setzero_ps();
    }
    int i = 0;
    for (; i + 8 <= k; i += 8) {
        __m256 va = _mm256_loadu_ps(a + i);
        UNROLL for (int j = 0; j < 8; j++)
            sum[j] = _mm256_fmadd_ps(va, _mm256_loadu_ps(rows[j] + i), sum[j]);
    }
    if (i < k) {
        __m256i mask = first_lanes(k - i);
        __m256 va = _mm256_maskload_ps(a + i, mask);
        UNROLL for (int j = 0; j < 8; j++)
            sum[j] = _mm256_fmadd_ps(va, _mm256_maskload_ps(rows[j] + i, mask), sum[j]);
    }
    float out[8];
    UNROLL for (int j = 0; j < 8; j++) out[j] = sum8(sum[j]);
    memcpy(c, out, (size_t)n * sizeof *c);
}

AVX2 static void dot_row_avx2(int k, const float *a, const float *b, int64_t ldb, int n, float *c) {
    for (int j = 0; j < n; j += 8) dot_8_avx2(k, a, b + j * ldb, ldb, n - j < 8 ? n - j : 8, c + j);
}

AVX2 static void outer_tile_avx2(int k, const float *const *a, const float *b, float *c, int ldc,
                                 int accumulate) {
    __m256 sum[A2_OUTER][2];
    const float *rows[A2_OUTER];
    UNROLL for (int r = 0; r < A2_OUTER; r++) {
        rows[r] = a[r];
        sum[r][0] = accumulate ? _mm256_loadu_ps(c + r * ldc) : _mm256_setzero_ps();
        sum[r][1] = accumulate ? _mm256_loadu_ps(c + r * ldc + 8) : _mm256_setzero_ps();
    }
    for (int i = 0; i < k; i++, b += STRIP) {
        __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
        UNROLL for (int r = 0; r < A2_OUTER; r++) {
            __m256 va = _mm256_broadcast_ss(rows[r] + i);
            sum[r][0] = _mm256_fmadd_ps(va, b0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(va, b1, sum[r][1]);
        }
    }
    UNROLL for (int r = 0; r < A2_OUTER; r++) {
        _mm256_storeu_ps(c + r * ldc, sum[r][0]);
        _mm256_storeu_ps(c + r * ldc + 8, sum[r][1]);
    }
}

/* One row, four strips: eight independent sums. */
AVX2 static void outer_4_strips_avx2(int k, const float *a, const float *b, int64_t strip, float *c,
                                     int accumulate) {
    __m256 sum[8];
    UNROLL for (int s = 0; s < 8; s++)
        sum[s] = accumulate ? _mm256_loadu_ps(c + s * 8) : _mm256_setzero_ps();
    for (int i = 0; i < k; i++, b += STRIP) {
        __m256 va = _mm256_broadcast_ss(a + i);
        UNROLL for (int s = 0; s < 4; s++) {
            sum[2 * s] = _mm256_fmadd_ps(va, _mm256_loadu_ps(b + s * strip), sum[2 * s]);
            sum[2 * s + 1] =
                _mm256_fmadd_ps(va, _mm256_loadu_ps(b + s * strip + 8), sum[2 * s + 1]);
        }
    }
    UNROLL for (int s = 0; s < 8; s++) _mm256_storeu_ps(c + s * 8, sum[s]);
}

AVX2 static void outer_row_avx2(int k, const float *a, const float *b, int64_t strip, int strips,
                                float *c, int accumulate) {
    for (; strips >= 4; strips -= 4, b += 4 * strip, c += 4 * STRIP)
        outer_4_strips_avx2(k, a, b, strip, c, accumulate);
    for (; strips > 0; strips--, b += strip, c += STRIP) {
        __m256 s0 = accumulate ? _mm256_loadu_ps(c) : _mm256_setzero_ps();
        __m256 s1 = accumulate ? _mm256_loadu_ps(c + 8) : _mm256_setzero_ps();
        for (int i = 0; i < k; i++) {
            __m256 va = _mm256_broadcast_ss(a + i);
            s0 = _mm256_fmadd_ps(va, _mm256_loadu_ps(b + i * STRIP), s0);
            s1 = _mm256_fmadd_ps(va, _mm256_loadu_ps(b + i * STRIP + 8), s1);
        }
        _mm256_storeu_ps(c, s0);
        _mm256_storeu_ps(c + 8, s1);
    }
}

/* ---- AVX2: quantised blocks ---- */

/* A block of weights as 16-bit integers: elements 0..15 in q[0], 16..31 in q[1]. */
AVX2 static void unpack_block_avx2(int type, const uint8_t *w, int b, __m256i *q) {
    if (type == LVM_Q8_0) {
        const int8_t *p = (const int8_t *)w + (int64_t)b * 34 + 2;
        q[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
        q[1] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(p + 16)));
        return;
    }
    __m128i nibbles = _mm_loadu_si128((const __m128i *)(const void *)(w + (int64_t)b * 18 + 2));
    __m128i low = _mm_and_si128(nibbles, _mm_set1_epi8(15));
    __m128i high = _mm_and_si128(_mm_srli_epi16(nibbles, 4), _mm_set1_epi8(15));
    q[0] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(low), _mm256_set1_epi16(8));
    q[1] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(high), _mm256_set1_epi16(8));
}

/* The f16 scales of block b of eight rows. */
AVX2 static __m256 block_scales(const uint8_t *const *rows, int64_t at) {
    uint16_t d[8];
    UNROLL for (int j = 0; j < 8; j++) memcpy(&d[j], rows[j] + at, 2);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)d));
}

/* Eight vectors of eight partial sums to one vector of eight sums. */
AVX2 static __m256i sum_rows(const __m256i *p) {
    __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(p[0], p[1]), _mm256_hadd_epi32(p[2], p[3]));
    __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(p[4], p[5]), _mm256_hadd_epi32(p[6], p[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                            _mm256_permute2x128_si256(a, b, 0x31));
}

/* Asks for a block's share of the eight rows that follow these in memory: eight streams a few
   hundred bytes apart are more than the processor's own prefetching follows. */
AVX2 static void prefetch_share(const uint8_t *next, int b, int bytes) {
    for (int i = 0; i < 8 * bytes; i += 64)
        _mm_prefetch((const char *)next + (int64_t)b * 8 * bytes + i, _MM_HINT_T0);
}

AVX2 static void int_8_rows_avx2(int type, int blocks, const struct xblock *x,
                                 const uint8_t *const *rows, const uint8_t *next, float *c) {
    __m256 sum = _mm256_setzero_ps();
    int bytes = type == LVM_Q8_0 ? 34 : 18;
    for (int b = 0; b < blocks; b++) {
        prefetch_share(next, b, bytes);
        __m256i x0 = _mm256_loadu_si256((const __m256i *)(const void *)x[b].q.s16);
        __m256i x1 = _mm256_loadu_si256((const __m256i *)(const void *)(x[b].q.s16 + 16));
        __m256i p[8];
        UNROLL for (int j = 0; j < 8; j++) {
            __m256i q[2];
            unpack_block_avx2(type, rows[j], b, q);
            p[j] = _mm256_add_epi32(_mm256_madd_epi16(q[0], x0), _mm256_madd_epi16(q[1], x1));
        }
        __m256 scale =
            _mm256_mul_ps(block_scales(rows, (int64_t)b * bytes), _mm256_set1_ps(x[b].d));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum_rows(p)), scale, sum);
    }
    _mm256_storeu_ps(c, sum);
}

AVX2 static void int_row_avx2(int type, int blocks, const struct xblock *x, const uint8_t *w,
                              int64_t row_bytes, int n, float *c) {
    for (int j0 = 0; j0 < n; j0 += 8) {
        const uint8_t *rows[8];
        float out[8];
        int count = n - j0 < 8 ? n - j0 : 8;
        for (int j = 0; j < 8; j++) rows[j] = w + (j0 + (j < count ? j : count - 1)) * row_bytes;
        const uint8_t *next = w + (j0 + 8) * row_bytes;
        if (type == LVM_Q8_0) int_8_rows_avx2(LVM_Q8_0, blocks, x, rows, next, out);
        else int_8_rows_avx2(LVM_Q4_0, blocks, x, rows, next, out);
        memcpy(c + j0, out, (size_t)count * sizeof *c);
    }
}

/* Transposes 8 x 8 lanes of 32 bits in place. */
AVX2 static void transpose_8x8(__m256i *v) {
    __m256i t[8], u[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

/* Packed block: 16 scales, then for each pair of elements 16 rows of two 16-bit integers. */
AVX2 static void int_pack_avx2(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    int bytes = type == LVM_Q8_0 ? 34 : 18;
    for (int b = 0; b < blocks; b++, packed += A2_PACK)
        for (int half = 0; half < 2; half++) {
            const uint8_t *const *rows = w + 8 * half;
            __m256i low[8], high[8];
            for (int j = 0; j < 8; j++) {
                __m256i q[2];
                unpack_block_avx2(type, rows[j], b, q);
                low[j] = q[0];
                high[j] = q[1];
            }
            transpose_8x8(low);
            transpose_8x8(high);
            _mm256_storeu_ps((float *)(void *)packed + 8 * half,
                             block_scales(rows, (int64_t)b * bytes));
            for (int i = 0; i < 8; i++) {
                uint8_t *to = packed + 4 * STRIP + 64 * i + 32 * half;
                _mm256_storeu_si256((__m256i *)(void *)to, low[i]);
                _mm256_storeu_si256((__m256i *)(void *)(to + 64 * 8), high[i]);
            }
        }
}

AVX2 static void int_tile_avx2(int blocks, const struct xblock *const *x, const uint8_t *packed,
                               float *c, int ldc) {
    __m256 sum[A2_ROWS][2];
    UNROLL for (int r = 0; r < A2_ROWS; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++, packed += A2_PACK) {
        __m256i acc[A2_ROWS][2];
        UNROLL for (int r = 0; r < A2_ROWS; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        const __m256i *q = (const __m256i *)(const void *)(packed + 4 * STRIP);
        for (int i = 0; i < QK / 2; i++) {
            __m256i w0 = _mm256_loadu_si256(q + 2 * i), w1 = _mm256_loadu_si256(q + 2 * i + 1);
            UNROLL for (int r = 0; r < A2_ROWS; r++) {
                __m256i pair = _mm256_set1_epi32(load_s32(x[r][b].q.s16 + 2 * i));
                acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(pair, w0));
                acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(pair, w1));
            }
        }
        __m256 d0 = _mm256_loadu_ps((const float *)(const void *)packed);
        __m256 d1 = _mm256_loadu_ps((const float *)(const void *)packed + 8);
        UNROLL for (int r = 0; r < A2_ROWS; r++) {
            __m256 dx = _mm256_set1_ps(x[r][b].d);
            sum[r][0] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][0]), _mm256_mul_ps(d0, dx), sum[r][0]);
            sum[r][1] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][1]), _mm256_mul_ps(d1, dx), sum[r][1]);
        }
    }
    UNROLL for (int r = 0; r < A2_ROWS; r++) {
        _mm256_storeu_ps(c + r * ldc, sum[r][0]);
        _mm256_storeu_ps(c + r * ldc + 8, sum[r][1]);
    }
}

/* The largest magnitude of 32 floats. */
AVX2 static float max_magnitude(const float *x) {
    __m256 sign = _mm256_set1_ps(-0.0f), m = _mm256_setzero_ps();
    UNROLL for (int i = 0; i < QK; i += 8)
        m = _mm256_max_ps(m, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}

AVX2 static void quantize_x_avx2(const float *x, struct xblock *y, int k) {
    for (int b = 0; b < k / QK; b++, x += QK) {
        float amax = max_magnitude(x);
        __m256 id = _mm256_set1_ps(amax > LEAST_X ? 127 / amax : 0);
        y[b].d = amax > LEAST_X ? amax / 127 : 0;
        UNROLL for (int i = 0; i < QK; i += 16) {
            __m256i q0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), id));
            __m256i q1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), id));
            __m256i q = _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8);
            _mm256_storeu_si256((__m256i *)(void *)(y[b].q.s16 + i), q);
        }
    }
}

/* ---- AVX2: conversions ---- */

AVX2 static __m256 s8_to_f32(const void *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
}

/* An f16 scale in all lanes. */
AVX2 static __m256 scale8(uint16_t d) { return _mm256_cvtph_ps(_mm_set1_epi16((short)d)); }

AVX2 static void q4_to_f32_avx2(const struct q4_0 *in, float *y, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++, y += QK) {
        __m256 d = scale8(in[b].d);
        __m128i nibbles = _mm_loadu_si128((const __m128i *)(const void *)in[b].q);
        __m128i half[2] = {_mm_and_si128(nibbles, _mm_set1_epi8(15)),
                           _mm_and_si128(_mm_srli_epi16(nibbles, 4), _mm_set1_epi8(15))};
        UNROLL for (int i = 0; i < 2; i++) {
            __m128i q = _mm_sub_epi8(half[i], _mm_set1_epi8(8));
            __m256 lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
            __m256 hi = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)));
            _mm256_storeu_ps(y + 16 * i, _mm256_mul_ps(d, lo));
            _mm256_storeu_ps(y + 16 * i + 8, _mm256_mul_ps(d, hi));
        }
    }
}

AVX2 static void to_f32_avx2(int type, const void *in, float *y, int64_t k) {
    const uint16_t *h = in;
    const struct q8_0 *q8 = in;
    int64_t i = 0;
    if (type == LVM_F16)
        for (; i + 8 <= k; i += 8)
            _mm256_storeu_ps(
                y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(h + i))));
    if (type == LVM_BF16)
        for (; i + 8 <= k; i += 8) {
            __m256i u =
                _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(h + i)));
            _mm256_storeu_ps(y + i, _mm256_castsi256_ps(_mm256_slli_epi32(u, 16)));
        }
    if (type == LVM_Q8_0)
        for (; i < k; i += QK) {
            __m256 d = scale8(q8[i / QK].d);
            UNROLL for (int j = 0; j < QK; j += 8)
                _mm256_storeu_ps(y + i + j, _mm256_mul_ps(d, s8_to_f32(q8[i / QK].q + j)));
        }
    if (type == LVM_Q4_0) {
        q4_to_f32_avx2(in, y, k / QK);
        return;
    }
    if (type == LVM_F32) row_to_f32(type, in, y, k);
    else if (i < k) row_to_f32(type, h + i, y + i, k - i);
}

AVX2 static void k8_to_f32_avx2(const uint8_t *in, int n, float *out) {
    for (; n > 0; n--, in += K8_BYTES, out += QK * STRIP) {
        __m256 d0 = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)in));
        __m256 d1 = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(in + 16)));
        for (int i = 0; i < QK; i++) {
            const uint8_t *q = in + 2 * STRIP + i * STRIP;
            _mm256_storeu_ps(out + i * STRIP, _mm256_mul_ps(d0, s8_to_f32(q)));
            _mm256_storeu_ps(out + i * STRIP + 8, _mm256_mul_ps(d1, s8_to_f32(q + 8)));
        }
    }
}

AVX2 static void v8_to_f32_avx2(const struct q8_0 *in, int keys, float *out) {
    for (int i = 0; i < keys; i++, out += STRIP) {
        __m256 d = scale8(in[i].d);
        _mm256_storeu_ps(out, _mm256_mul_ps(d, s8_to_f32(in[i].q)));
        _mm256_storeu_ps(out + 8, _mm256_mul_ps(d, s8_to_f32(in[i].q + 8)));
        _mm256_storeu_ps(out + KEYS * STRIP, _mm256_mul_ps(d, s8_to_f32(in[i].q + 16)));
        _mm256_storeu_ps(out + KEYS * STRIP + 8, _mm256_mul_ps(d, s8_to_f32(in[i].q + 24)));
    }
}

/* ---- AVX2: elementwise ---- */

/* exp_f32, eight at a time. */
AVX2 static __m256 exp8(__m256 x) {
    __m256 small = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LE_OQ);
    x = _mm256_max_ps(_mm256_set1_ps(-88.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i power =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(small, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

AVX2 static __m256 silu8(__m256 x) {
    __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), x));
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1), e));
}

AVX2 static void rmsnorm_avx2(const float *x, const float *weight, float eps, int n, float *y) {
    float square = 0;
    dot_8_avx2(n, x, x, 0, 1, &square);
    float scale = 1 / sqrtf(square / (float)n + eps);
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(
            y + i, _mm256_mul_ps(_mm256_loadu_ps(weight + i),
                                 _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(scale))));
    for (; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* n is a multiple of 16. */
AVX2 static float softmax_avx2(float *s, int n, int valid, float scale, float *max) {
    __m256 vs = _mm256_set1_ps(scale), vm = _mm256_set1_ps(-HUGE_VALF), sum = _mm256_setzero_ps();
    float lanes[8], m;
    for (int i = 0; i < n; i += 8) {
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(s + i), vs);
        x = _mm256_blendv_ps(_mm256_set1_ps(-HUGE_VALF), x,
                             _mm256_castsi256_ps(first_lanes(valid - i)));
        _mm256_storeu_ps(s + i, x);
        vm = _mm256_max_ps(x, vm);
    }
    _mm256_storeu_ps(lanes, vm);
    m = lanes[0];
    for (int i = 1; i < 8; i++) m = lanes[i] > m ? lanes[i] : m;
    for (int i = 0; i < n; i += 8) {
        __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + i), _mm256_set1_ps(m)));
        e = _mm256_and_ps(e, _mm256_castsi256_ps(first_lanes(valid - i)));
        _mm256_storeu_ps(s + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    *max = m;
    return sum8(sum);
}

AVX2 static void silu_mul_avx2(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(gate + i,
                         _mm256_mul_ps(silu8(_mm256_loadu_ps(gate + i)), _mm256_loadu_ps(up + i)));
    if (i == n) return;
    __m256i mask = first_lanes((int)(n - i));
    __m256 y =
        _mm256_mul_ps(silu8(_mm256_maskload_ps(gate + i, mask)), _mm256_maskload_ps(up + i, mask));
    _mm256_maskstore_ps(gate + i, mask, y);
}

/* c is a multiple of 32. */
AVX2 static void norm_rows_avx2(const float *x, const float *scale, const float *shift,
                                int use_silu, int64_t pixels, int c, float *y) {
    for (int64_t p = 0; p < pixels; p++, x += c, y += c)
        for (int i = 0; i < c; i += 8) {
            __m256 v = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(scale + i),
                                       _mm256_loadu_ps(shift + i));
            _mm256_storeu_ps(y + i, use_silu ? silu8(v) : v);
        }
}

AVX2 static void channel_sums_avx2(const float *x, int64_t pixels, int c, float *sum,
                                   float *square) {
    for (int i = 0; i < c; i += 16) {
        __m256 s0 = _mm256_setzero_ps(), s1 = s0, q0 = s0, q1 = s0;
        for (int64_t p = 0; p < pixels; p++) {
            __m256 x0 = _mm256_loadu_ps(x + p * c + i), x1 = _mm256_loadu_ps(x + p * c + i + 8);
            s0 = _mm256_add_ps(s0, x0);
            s1 = _mm256_add_ps(s1, x1);
            q0 = _mm256_fmadd_ps(x0, x0, q0);
            q1 = _mm256_fmadd_ps(x1, x1, q1);
        }
        _mm256_storeu_ps(sum + i, s0);
        _mm256_storeu_ps(sum + i + 8, s1);
        _mm256_storeu_ps(square + i, q0);
        _mm256_storeu_ps(square + i + 8, q1);
    }
}

static const struct kernels kernels_avx2 = {
    "avx2",         A2_ROWS,         A2_COLS,         A2_ROWS,        A2_OUTER,      A2_PACK,
    dot_row_avx2,   dot_tile_avx2,   quantize_x_avx2, int_row_avx2,   int_pack_avx2, int_tile_avx2,
    outer_row_avx2, outer_tile_avx2, to_f32_avx2,     k8_to_f32_avx2, v8_to_f32_avx2,
    rmsnorm_avx2,   softmax_avx2,    silu_mul_avx2,   norm_rows_avx2, channel_sums_avx2};

/* ---- AVX-512: the tiles; what is elementwise stays at eight lanes ---- */

enum { A5_ROWS = 5, A5_COLS = 4, A5_OUTER = 12, A5_INT = 12, A5_PACK = STRIP * (4 + 4 + QK) };

/* Halves first: lane i + lane i+8, then as eight lanes. */
AVX512 static float sum16(__m512 v) {
    return sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

AVX512 static void dot_tile_avx512(int k, const float *const *a, const float *const *b, float *c,
                                   int ldc) {
    __m512 sum[A5_ROWS][A5_COLS], vb[A5_COLS];
    UNROLL for (int r = 0; r < A5_ROWS; r++)
        UNROLL for (int j = 0; j < A5_COLS; j++) sum[r][j] = _mm512_setzero_ps();
    for (int i = 0; i < k; i += 16) {
        __mmask16 mask = k - i >= 16 ? 0xffff : (__mmask16)((1u << (k - i)) - 1);
        UNROLL for (int j = 0; j < A5_COLS; j++) vb[j] = _mm512_maskz_loadu_ps(mask, b[j] + i);
        UNROLL for (int r = 0; r < A5_ROWS; r++) {
            __m512 va = _mm512_maskz_loadu_ps(mask, a[r] + i);
            UNROLL
            for (int j = 0; j < A5_COLS; j++) sum[r][j] = _mm512_fmadd_ps(va, vb[j], sum[r][j]);
        }
    }
    UNROLL for (int r = 0; r < A5_ROWS; r++)
        UNROLL for (int j = 0; j < A5_COLS; j++) c[r * ldc + j] = sum16(sum[r][j]);
}

AVX512 static void dot_8_avx512(int k, const float *a, const float *b, int64_t ldb, int n,
                                float *c) {
    const float *rows[8];
    __m512 sum[8];
    UNROLL for (int j = 0; j < 8; j++) {
        rows[j] = b + (j < n ? j : n - 1) * ldb;
        sum[j] = _mm512_setzero_ps();
    }
    for (int i = 0; i < k; i += 16) {
        __mmask16 mask = k - i >= 16 ? 0xffff : (__mmask16)((1u << (k - i)) - 1);
        __m512 va = _mm512_maskz_loadu_ps(mask, a + i);
        UNROLL for (int j = 0; j < 8; j++)
            sum[j] = _mm512_fmadd_ps(va, _mm512_maskz_loadu_ps(mask, rows[j] + i), sum[j]);
    }
    float out[8];
    UNROLL for (int j = 0; j < 8; j++) out[j] = sum16(sum[j]);
    memcpy(c, out, (size_t)n * sizeof *c);
}

AVX512 static void dot_row_avx512(int k, const float *a, const float *b, int64_t ldb, int n,
                                  float *c) {
    for (int j = 0; j < n; j += 8)
        dot_8_avx512(k, a, b + j * ldb, ldb, n - j < 8 ? n - j : 8, c + j);
}

AVX512 static void outer_tile_avx512(int k, const float *const *a, const float *b, float *c,
                                     int ldc, int accumulate) {
    __m512 sum[A5_OUTER];
    const float *rows[A5_OUTER];
    UNROLL for (int r = 0; r < A5_OUTER; r++) {
        rows[r] = a[r];
        sum[r] = accumulate ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
    }
    for (int i = 0; i < k; i++, b += STRIP) {
        __m512 vb = _mm512_loadu_ps(b);
        UNROLL for (int r = 0; r < A5_OUTER; r++)
            sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(rows[r][i]), vb, sum[r]);
    }
    UNROLL for (int r = 0; r < A5_OUTER; r++) _mm512_storeu_ps(c + r * ldc, sum[r]);
}

AVX512 static void outer_8_strips_avx512(int k, const float *a, const float *b, int64_t strip,
                                         float *c, int accumulate) {
    __m512 sum[8];
    UNROLL for (int s = 0; s < 8; s++)
        sum[s] = accumulate ? _mm512_loadu_ps(c + s * STRIP) : _mm512_setzero_ps();
    for (int i = 0; i < k; i++, b += STRIP) {
        __m512 va = _mm512_set1_ps(a[i]);
        UNROLL for (int s = 0; s < 8; s++)
            sum[s] = _mm512_fmadd_ps(va, _mm512_loadu_ps(b + s * strip), sum[s]);
    }
    UNROLL for (int s = 0; s < 8; s++) _mm512_storeu_ps(c + s * STRIP, sum[s]);
}

AVX512 static void outer_row_avx512(int k, const float *a, const float *b, int64_t strip,
                                    int strips, float *c, int accumulate) {
    for (; strips >= 8; strips -= 8, b += 8 * strip, c += 8 * STRIP)
        outer_8_strips_avx512(k, a, b, strip, c, accumulate);
    for (; strips > 0; strips--, b += strip, c += STRIP) {
        __m512 sum = accumulate ? _mm512_loadu_ps(c) : _mm512_setzero_ps();
        for (int i = 0; i < k; i++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), _mm512_loadu_ps(b + i * STRIP), sum);
        _mm512_storeu_ps(c, sum);
    }
}

/* A block of weights as signed bytes. */
AVX512 static __m256i block_bytes(int type, const uint8_t *w, int b) {
    if (type == LVM_Q8_0)
        return _mm256_loadu_si256((const __m256i *)(const void *)(w + (int64_t)b * 34 + 2));
    __m128i nibbles = _mm_loadu_si128((const __m128i *)(const void *)(w + (int64_t)b * 18 + 2));
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(nibbles, 4), nibbles);
    return _mm256_sub_epi8(_mm256_and_si256(both, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}

AVX512 static void int_8_rows_avx512(int type, int blocks, const struct xblock *x,
                                     const uint8_t *const *rows, const uint8_t *next, float *c) {
    __m256 sum = _mm256_setzero_ps();
    __m256i zero = _mm256_setzero_si256(), offset = _mm256_set1_epi8((char)128);
    int bytes = type == LVM_Q8_0 ? 34 : 18;
    for (int b = 0; b < blocks; b++) {
        prefetch_share(next, b, bytes);
        __m256i vx = _mm256_loadu_si256((const __m256i *)(const void *)x[b].q.u8), p[8];
        UNROLL for (int j = 0; j < 8; j++) {
            __m256i w = block_bytes(type, rows[j], b);
            p[j] = _mm256_sub_epi32(_mm256_dpbusd_epi32(zero, vx, w),
                                    _mm256_dpbusd_epi32(zero, offset, w));
        }
        __m256 scale =
            _mm256_mul_ps(block_scales(rows, (int64_t)b * bytes), _mm256_set1_ps(x[b].d));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum_rows(p)), scale, sum);
    }
    _mm256_storeu_ps(c, sum);
}

AVX512 static void int_row_avx512(int type, int blocks, const struct xblock *x, const uint8_t *w,
                                  int64_t row_bytes, int n, float *c) {
    for (int j0 = 0; j0 < n; j0 += 8) {
        const uint8_t *rows[8];
        float out[8];
        int count = n - j0 < 8 ? n - j0 : 8;
        for (int j = 0; j < 8; j++) rows[j] = w + (j0 + (j < count ? j : count - 1)) * row_bytes;
        int_8_rows_avx512(type, blocks, x, rows, w + (j0 + 8) * row_bytes, out);
        memcpy(c + j0, out, (size_t)count * sizeof *c);
    }
}

/* Packed block: 16 scales, 16 times -128 sum q, then for each four elements 16 rows of four bytes.
   */
AVX512 static void int_pack_avx512(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    int bytes = type == LVM_Q8_0 ? 34 : 18;
    __m256i zero = _mm256_setzero_si256(), offset = _mm256_set1_epi8((char)128);
    for (int b = 0; b < blocks; b++, packed += A5_PACK)
        for (int half = 0; half < 2; half++) {
            const uint8_t *const *rows = w + 8 * half;
            __m256i q[8], sums[8];
            for (int j = 0; j < 8; j++) {
                q[j] = block_bytes(type, rows[j], b);
                sums[j] = _mm256_dpbusd_epi32(zero, offset, q[j]);
            }
            transpose_8x8(q);
            _mm256_storeu_ps((float *)(void *)packed + 8 * half,
                             block_scales(rows, (int64_t)b * bytes));
            _mm256_storeu_si256((__m256i *)(void *)(packed + 4 * STRIP + 32 * half),
                                _mm256_sub_epi32(zero, sum_rows(sums)));
            for (int i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(void *)(packed + 8 * STRIP + 64 * i + 32 * half),
                                    q[i]);
        }
}

AVX512 static void int_tile_avx512(int blocks, const struct xblock *const *x, const uint8_t *packed,
                                   float *c, int ldc) {
    __m512 sum[A5_INT];
    UNROLL for (int r = 0; r < A5_INT; r++) sum[r] = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++, packed += A5_PACK) {
        __m512i acc[A5_INT], correction = _mm512_loadu_si512(packed + 4 * STRIP);
        UNROLL for (int r = 0; r < A5_INT; r++) acc[r] = correction;
        for (int i = 0; i < QK / 4; i++) {
            __m512i w = _mm512_loadu_si512(packed + 8 * STRIP + 64 * i);
            UNROLL for (int r = 0; r < A5_INT; r++)
                acc[r] = _mm512_dpbusd_epi32(acc[r],
                                             _mm512_set1_epi32(load_s32(x[r][b].q.u8 + 4 * i)), w);
        }
        __m512 d = _mm512_loadu_ps(packed);
        UNROLL for (int r = 0; r < A5_INT; r++)
            sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r]),
                                     _mm512_mul_ps(d, _mm512_set1_ps(x[r][b].d)), sum[r]);
    }
    UNROLL for (int r = 0; r < A5_INT; r++) _mm512_storeu_ps(c + r * ldc, sum[r]);
}

AVX512 static void quantize_x_avx512(const float *x, struct xblock *y, int k) {
    for (int b = 0; b < k / QK; b++, x += QK) {
        float amax = max_magnitude(x);
        __m512 id = _mm512_set1_ps(amax > LEAST_X ? 127 / amax : 0);
        y[b].d = amax > LEAST_X ? amax / 127 : 0;
        UNROLL for (int i = 0; i < QK; i += 16) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), id));
            q = _mm512_add_epi32(q, _mm512_set1_epi32(128));
            _mm_storeu_si128((__m128i *)(void *)(y[b].q.u8 + i), _mm512_cvtepi32_epi8(q));
        }
    }
}

AVX512 static void rmsnorm_avx512(const float *x, const float *weight, float eps, int n, float *y) {
    float square = 0;
    dot_8_avx512(n, x, x, 0, 1, &square);
    float scale = 1 / sqrtf(square / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

static const struct kernels kernels_avx512 = {
    "avx512",          A5_ROWS,           A5_COLS,         A5_INT,
    A5_OUTER,          A5_PACK,           dot_row_avx512,  dot_tile_avx512,
    quantize_x_avx512, int_row_avx512,    int_pack_avx512, int_tile_avx512,
    outer_row_avx512,  outer_tile_avx512, to_f32_avx2,     k8_to_f32_avx2,
    v8_to_f32_avx2,    rmsnorm_avx512,    softmax_avx2,    silu_mul_avx2,
    norm_rows_avx2,    channel_sums_avx2};

/* ---- Which of them this machine can run: the processor must have it and the system save it ----
   */

/* Bits of XCR0: the registers that the operating system saves. */
static uint64_t saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* 2 for AVX-512 with VNNI, 1 for AVX2 with FMA, 0 for neither. */
static int simd_level(void) {
    unsigned a, b, c, d, b7, c7;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    int avx_fma_f16c = (c & 1u << 28) && (c & 1u << 12) && (c & 1u << 29);
    if (!(c & 1u << 27) || !avx_fma_f16c || (saved_state() & 6) != 6) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d) || !(b7 & 1u << 5)) return 0;
    unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    int has_512 =
        (b7 & f_dq_bw_vl) == f_dq_bw_vl && (c7 & 1u << 11) && (saved_state() & 0xe6) == 0xe6;
    return has_512 ? 2 : 1;
}
static const struct kernels *const simd_kernels[] = {&kernels_plain, &kernels_avx2,
                                                     &kernels_avx512};
#elif defined(__aarch64__)
/* ---- NEON: what lies in the 32 registers of four floats or sixteen bytes ----

   Registers, and all instructions of the inner loop, as gcc 12 makes them at -O2 and -O3 (clang 14
   to 19: a few fewer or more):

                   sums            operands              registers   instructions
       dot tile    4 x 3 x 2 = 24  3 of b, 1 to 4 of a   28 to 31    42 for 24 fmla        1.8
       dot row     4 x 2 = 8       2 of a, 1 to 8 of b   11 to 18    22 for 8 fmla         2.8
       outer tile  4 x 4 = 16      4 of a, 1 to 4 of b   21 to 24    84 for 64 fmla        1.3
       outer row   16              1 of a, 1 to 4 of b   18 to 21    34 for 16 fmla        2.1
       int row     1, and 4 of     2 to 8 of w, 2 of x   up to 19    55 for 16 smull and
                   a block                               with sdot   smlal: 128 products   0.4
                                                                     43 for 8 sdot         0.3
       int tile    4, and 4 of     8 of w, 2 of x,       22          155 for 64 smull and
                   a block         2 products, 2 scales              smlal: 512 products   0.3
       with sdot   8, and 8 of     2 to 8 of w, 4 of x   22 to 28    138 for 64 sdot: 1024
                   a block                                           products              0.1

   fmla in the outer tile and sdot take one operand "by element": nothing is broadcast. Four partial
   sums a dot product would let a tile of 5 x 4 do with 9 loads for 20 fmla, eight need 14 for 24;
   both are fewer than a processor does beside the fmla, and eight round as AVX2 does. */

#include <arm_neon.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

#define INLINE inline __attribute__((always_inline))

/* What follows is loaded after *sum is known. Without it compilers fetch so many operands ahead
   that accumulators have to leave their registers. */
static INLINE void load_later(float32x4_t *sum) { __asm__ volatile("" : "+w"(*sum) : : "memory"); }

enum {
    NEON_ROWS = 4,
    NEON_COLS = 3,
    NEON_OUTER = 4,
    NEON_INT = 4,
    NEON_QUAD = 4 * (4 + QK), /* bytes of a packed block of four rows */
    NEON_PACK = STRIP / 4 * NEON_QUAD
};

/* ---- NEON: floats ---- */

/* Four sums, each of eight lanes in two vectors; halves first: lane i + lane i+4, then i+2, i+1. */
static INLINE float32x4_t sum8_neon(float32x4_t (*s)[2]) {
    float32x4_t h[4], pair[2];
    UNROLL for (int j = 0; j < 4; j++) h[j] = vaddq_f32(s[j][0], s[j][1]);
    UNROLL for (int j = 0; j < 2; j++) {
        float32x4_t v = h[2 * j], w = h[2 * j + 1];
        pair[j] = vaddq_f32(vcombine_f32(vget_low_f32(v), vget_low_f32(w)),
                            vcombine_f32(vget_high_f32(v), vget_high_f32(w)));
    }
    return vpaddq_f32(pair[0], pair[1]);
}

/* The last n < 8 elements of a row, then zeros. */
static const float *last_lanes(const float *p, int n, float *lanes) {
    memset(lanes, 0, 8 * sizeof *lanes);
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return lanes;
}

/* Eight elements of every row, from element i on. */
static INLINE void dot_step_neon(const float *const *a, const float *const *b, int i,
                                 float32x4_t (*sum)[2]) {
    UNROLL for (int half = 0; half < 2; half++) {
        float32x4_t vb[NEON_COLS];
        UNROLL for (int j = 0; j < NEON_COLS; j++) vb[j] = vld1q_f32(b[j] + i + 4 * half);
        UNROLL for (int r = 0; r < NEON_ROWS; r++) {
            float32x4_t va = vld1q_f32(a[r] + i + 4 * half);
            UNROLL for (int j = 0; j < NEON_COLS; j++) {
                float32x4_t *s = &sum[r * NEON_COLS + j][half];
                *s = vfmaq_f32(*s, va, vb[j]);
            }
        }
        load_later(&sum[NEON_ROWS * NEON_COLS - 1][half]);
    }
}

static void dot_tile_neon(int k, const float *const *a, const float *const *b, float *c, int ldc) {
    enum { SUMS = NEON_ROWS * NEON_COLS };
    float32x4_t sum[SUMS][2];
    float out[SUMS];
    const float *pa[NEON_ROWS], *pb[NEON_COLS];
    UNROLL for (int r = 0; r < NEON_ROWS; r++) pa[r] = a[r];
    UNROLL for (int j = 0; j < NEON_COLS; j++) pb[j] = b[j];
    UNROLL for (int s = 0; s < SUMS; s++) sum[s][0] = sum[s][1] = vdupq_n_f32(0);
    int i = 0;
    for (; i + 8 <= k; i += 8) dot_step_neon(pa, pb, i, sum);
    if (i < k) {
        float lanes[NEON_ROWS + NEON_COLS][8];
        UNROLL for (int r = 0; r < NEON_ROWS; r++) pa[r] = last_lanes(a[r] + i, k - i, lanes[r]);
        UNROLL for (int j = 0; j < NEON_COLS; j++)
            pb[j] = last_lanes(b[j] + i, k - i, lanes[NEON_ROWS + j]);
        dot_step_neon(pa, pb, 0, sum);
    }
    UNROLL for (int s = 0; s < SUMS; s += 4) vst1q_f32(out + s, sum8_neon(sum + s));
    for (int r = 0; r < NEON_ROWS; r++)
        memcpy(c + r * ldc, out + r * NEON_COLS, NEON_COLS * sizeof *c);
}

static INLINE void dot_row_step_neon(const float *a, const float *const *rows, int i,
                                     float32x4_t (*sum)[2]) {
    float32x4_t a0 = vld1q_f32(a), a1 = vld1q_f32(a + 4);
    UNROLL for (int j = 0; j < 4; j++) {
        sum[j][0] = vfmaq_f32(sum[j][0], a0, vld1q_f32(rows[j] + i));
        sum[j][1] = vfmaq_f32(sum[j][1], a1, vld1q_f32(rows[j] + i + 4));
    }
}

/* Four rows of b, the last repeated when there are fewer. */
static void dot_4_neon(int k, const float *a, const float *b, int64_t ldb, int n, float *c) {
    const float *rows[4];
    float32x4_t sum[4][2];
    float out[4];
    UNROLL for (int j = 0; j < 4; j++) {
        rows[j] = b + (j < n ? j : n - 1) * ldb;
        sum[j][0] = sum[j][1] = vdupq_n_f32(0);
    }
    int i = 0;
    for (; i + 8 <= k; i += 8) dot_row_step_neon(a + i, rows, i, sum);
    if (i < k) {
        float lanes[5][8];
        const float *last[4];
        for (int j = 0; j < 4; j++) last[j] = last_lanes(rows[j] + i, k - i, lanes[j]);
        dot_row_step_neon(last_lanes(a + i, k - i, lanes[4]), last, 0, sum);
    }
    vst1q_f32(out, sum8_neon(sum));
    memcpy(c, out, (size_t)n * sizeof *c);
}

static void dot_row_neon(int k, const float *a, const float *b, int64_t ldb, int n, float *c) {
    for (int j = 0; j < n; j += 4) dot_4_neon(k, a, b + j * ldb, ldb, n - j < 4 ? n - j : 4, c + j);
}

/* sum + b times one lane of a. */
static INLINE float32x4_t fma_lane(float32x4_t sum, float32x4_t b, float32x4_t a, int lane) {
    if (lane == 0) return vfmaq_laneq_f32(sum, b, a, 0);
    if (lane == 1) return vfmaq_laneq_f32(sum, b, a, 1);
    return lane == 2 ? vfmaq_laneq_f32(sum, b, a, 2) : vfmaq_laneq_f32(sum, b, a, 3);
}

static void outer_tile_neon(int k, const float *const *a, const float *b, float *c, int ldc,
                            int accumulate) {
    float32x4_t sum[NEON_OUTER][4], va[NEON_OUTER];
    const float *rows[NEON_OUTER];
    UNROLL for (int r = 0; r < NEON_OUTER; r++) {
        rows[r] = a[r];
        UNROLL for (int j = 0; j < 4; j++)
            sum[r][j] = accumulate ? vld1q_f32(c + r * ldc + 4 * j) : vdupq_n_f32(0);
    }
    int i = 0;
    for (; i + 4 <= k; i += 4) {
        UNROLL for (int r = 0; r < NEON_OUTER; r++) va[r] = vld1q_f32(rows[r] + i);
        UNROLL for (int lane = 0; lane < 4; lane++, b += STRIP) {
            UNROLL for (int j = 0; j < 4; j++) {
                float32x4_t vb = vld1q_f32(b + 4 * j);
                UNROLL for (int r = 0; r < NEON_OUTER; r++)
                    sum[r][j] = fma_lane(sum[r][j], vb, va[r], lane);
            }
            load_later(&sum[NEON_OUTER - 1][3]);
        }
    }
    for (; i < k; i++, b += STRIP)
        UNROLL for (int j = 0; j < 4; j++) {
            float32x4_t vb = vld1q_f32(b + 4 * j);
            UNROLL for (int r = 0; r < NEON_OUTER; r++)
                sum[r][j] = vfmaq_n_f32(sum[r][j], vb, rows[r][i]);
        }
    UNROLL for (int r = 0; r < NEON_OUTER; r++)
        UNROLL for (int j = 0; j < 4; j++) vst1q_f32(c + r * ldc + 4 * j, sum[r][j]);
}

/* One row, four strips: sixteen independent sums. */
static void outer_4_strips_neon(int k, const float *a, const float *b, int64_t strip, float *c,
                                int accumulate) {
    float32x4_t sum[16];
    UNROLL for (int s = 0; s < 16; s++)
        sum[s] = accumulate ? vld1q_f32(c + s * 4) : vdupq_n_f32(0);
    for (int i = 0; i < k; i++, b += STRIP) {
        float32_t ai = a[i];
        UNROLL for (int s = 0; s < 4; s++) {
            UNROLL for (int j = 0; j < 4; j++)
                sum[4 * s + j] = vfmaq_n_f32(sum[4 * s + j], vld1q_f32(b + s * strip + 4 * j), ai);
            load_later(&sum[4 * s]);
        }
    }
    UNROLL for (int s = 0; s < 16; s++) vst1q_f32(c + s * 4, sum[s]);
}

static void outer_row_neon(int k, const float *a, const float *b, int64_t strip, int strips,
                           float *c, int accumulate) {
    for (; strips >= 4; strips -= 4, b += 4 * strip, c += 4 * STRIP)
        outer_4_strips_neon(k, a, b, strip, c, accumulate);
    for (; strips > 0; strips--, b += strip, c += STRIP) {
        float32x4_t sum[4];
        UNROLL for (int j = 0; j < 4; j++)
            sum[j] = accumulate ? vld1q_f32(c + 4 * j) : vdupq_n_f32(0);
        for (int i = 0; i < k; i++)
            UNROLL for (int j = 0; j < 4; j++)
                sum[j] = vfmaq_n_f32(sum[j], vld1q_f32(b + i * STRIP + 4 * j), a[i]);
        UNROLL for (int j = 0; j < 4; j++) vst1q_f32(c + 4 * j, sum[j]);
    }
}

/* ---- NEON: quantised blocks ---- */

static int block_bytes_neon(int type) { return type == LVM_Q8_0 ? 34 : 18; }

/* A block of weights as signed bytes: elements 0..15 in q[0], 16..31 in q[1]. */
static INLINE void unpack_block_neon(int type, const uint8_t *block, int8x16_t *q) {
    if (type == LVM_Q8_0) {
        q[0] = vld1q_s8((const int8_t *)block + 2);
        q[1] = vld1q_s8((const int8_t *)block + 18);
        return;
    }
    uint8x16_t nibbles = vld1q_u8(block + 2);
    int8x16_t eight = vdupq_n_s8(8);
    q[0] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(nibbles, vdupq_n_u8(15))), eight);
    q[1] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(nibbles, 4)), eight);
}

/* The f16 scales of four blocks. */
static INLINE float32x4_t block_scales_neon(const uint8_t *const *rows, int64_t at) {
    uint16x4_t d = vld1_dup_u16((const uint16_t *)(const void *)(rows[0] + at));
    d = vld1_lane_u16((const uint16_t *)(const void *)(rows[1] + at), d, 1);
    d = vld1_lane_u16((const uint16_t *)(const void *)(rows[2] + at), d, 2);
    d = vld1_lane_u16((const uint16_t *)(const void *)(rows[3] + at), d, 3);
    return vcvt_f32_f16(vreinterpret_f16_u16(d));
}

/* Four vectors of partial sums to one vector of four sums. */
static INLINE int32x4_t sum_quad(const int32x4_t *p) {
    return vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3]));
}

/* 32 products, eight to a lane. |x| <= 127, so that two of them, 2 * 128 * 127 at most, fit the 16
   bits in which they meet first. */
static INLINE int32x4_t products_neon(const int8x16_t *w, const int8x16_t *x) {
    int16x8_t low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0]));
    int16x8_t high = vmull_high_s8(w[0], x[0]);
    low = vmlal_s8(low, vget_low_s8(w[1]), vget_low_s8(x[1]));
    high = vmlal_high_s8(high, w[1], x[1]);
    return vpadalq_s16(vpaddlq_s16(low), high);
}

static INLINE void load_x_neon(const struct xblock *x, int8x16_t *q) {
    q[0] = vld1q_s8(x->q.s8);
    q[1] = vld1q_s8(x->q.s8 + 16);
}

static INLINE void int_4_rows_neon(int type, int blocks, const struct xblock *x,
                                   const uint8_t *const *rows, float *c) {
    float32x4_t sum = vdupq_n_f32(0);
    for (int b = 0; b < blocks; b++) {
        int64_t at = (int64_t)b * block_bytes_neon(type);
        int8x16_t vx[2], w[2];
        int32x4_t p[4];
        load_x_neon(x + b, vx);
        UNROLL for (int j = 0; j < 4; j++) {
            unpack_block_neon(type, rows[j] + at, w);
            p[j] = products_neon(w, vx);
        }
        sum = vfmaq_f32(sum, vcvtq_f32_s32(sum_quad(p)),
                        vmulq_n_f32(block_scales_neon(rows, at), x[b].d));
    }
    vst1q_f32(c, sum);
}

/* Four rows of weights from w on, the last repeated when there are fewer. */
static void quad_of_rows(const uint8_t *w, int64_t row_bytes, int n, const uint8_t **rows) {
    for (int j = 0; j < 4; j++) rows[j] = w + (j < n ? j : n - 1) * row_bytes;
}

static void int_row_neon(int type, int blocks, const struct xblock *x, const uint8_t *w,
                         int64_t row_bytes, int n, float *c) {
    for (int j = 0; j < n; j += 4) {
        const uint8_t *rows[4];
        float out[4];
        quad_of_rows(w + j * row_bytes, row_bytes, n - j, rows);
        if (type == LVM_Q8_0) int_4_rows_neon(LVM_Q8_0, blocks, x, rows, out);
        else int_4_rows_neon(LVM_Q4_0, blocks, x, rows, out);
        memcpy(c + j, out, (size_t)(n - j < 4 ? n - j : 4) * sizeof *c);
    }
}

/* Packed: four rows after four rows; of each block 4 scales, then 4 rows of 32 bytes. */
static void int_pack_neon(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    for (int j0 = 0; j0 < STRIP; j0 += 4)
        for (int b = 0; b < blocks; b++, packed += NEON_QUAD) {
            int64_t at = (int64_t)b * block_bytes_neon(type);
            vst1q_f32((float *)(void *)packed, block_scales_neon(w + j0, at));
            for (int j = 0; j < 4; j++) {
                int8x16_t q[2];
                unpack_block_neon(type, w[j0 + j] + at, q);
                vst1q_s8((int8_t *)packed + 16 + QK * j, q[0]);
                vst1q_s8((int8_t *)packed + 32 + QK * j, q[1]);
            }
        }
}

static void int_tile_4_neon(int blocks, const struct xblock *const *x, const uint8_t *packed,
                            float *c, int ldc) {
    float32x4_t sum[NEON_INT];
    UNROLL for (int r = 0; r < NEON_INT; r++) sum[r] = vdupq_n_f32(0);
    for (int b = 0; b < blocks; b++, packed += NEON_QUAD) {
        int8x16_t w[4][2];
        float32x4_t d = vld1q_f32((const float *)(const void *)packed);
        UNROLL for (int j = 0; j < 4; j++) {
            w[j][0] = vld1q_s8((const int8_t *)packed + 16 + QK * j);
            w[j][1] = vld1q_s8((const int8_t *)packed + 32 + QK * j);
        }
        UNROLL for (int r = 0; r < NEON_INT; r++) {
            int8x16_t vx[2];
            int32x4_t p[4];
            load_x_neon(x[r] + b, vx);
            UNROLL for (int j = 0; j < 4; j++) p[j] = products_neon(w[j], vx);
            sum[r] = vfmaq_f32(sum[r], vcvtq_f32_s32(sum_quad(p)), vmulq_n_f32(d, x[r][b].d));
            load_later(&sum[r]);
        }
    }
    UNROLL for (int r = 0; r < NEON_INT; r++) vst1q_f32(c + r * ldc, sum[r]);
}

static void int_tile_neon(int blocks, const struct xblock *const *x, const uint8_t *packed,
                          float *c, int ldc) {
    for (int j = 0; j < STRIP; j += 4)
        int_tile_4_neon(blocks, x, packed + (int64_t)j / 4 * blocks * NEON_QUAD, c + j, ldc);
}

static void quantize_x_neon(const float *x, struct xblock *y, int k) {
    for (int b = 0; b < k / QK; b++, x += QK) {
        float32x4_t m = vdupq_n_f32(0);
        UNROLL for (int i = 0; i < QK; i += 4) m = vmaxnmq_f32(m, vabsq_f32(vld1q_f32(x + i)));
        float amax = vmaxnmvq_f32(m), id = amax > LEAST_X ? 127 / amax : 0;
        y[b].d = amax > LEAST_X ? amax / 127 : 0;
        UNROLL for (int i = 0; i < QK; i += 8) {
            int32x4_t q0 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), id));
            int32x4_t q1 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), id));
            vst1_s8(y[b].q.s8 + i, vmovn_s16(vcombine_s16(vmovn_s32(q0), vmovn_s32(q1))));
        }
    }
}

/* ---- NEON: quantised blocks with the dot product instruction ----

   One sdot adds four products of bytes to each lane. In the tile a lane is a row of weights. */

#if defined(__ARM_FEATURE_DOTPROD)
#define NEON_DOT
#elif defined(__clang__)
#define NEON_DOT __attribute__((target("dotprod")))
#else
#define NEON_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

#if defined(__clang__) && !defined(vdotq_laneq_s32)
/* Older clangs keep these to files that are compiled for them as a whole. */
#define vdotq_s32(sum, a, b) ((int32x4_t)__builtin_neon_vdotq_v((int8x16_t)(sum), a, b, 34))
#define vdotq_laneq_s32(sum, a, b, lane)                                                           \
    vdotq_s32(sum, a, vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(b), lane)))
#endif

NEON_DOT static INLINE void int_4_rows_dot(int type, int blocks, const struct xblock *x,
                                           const uint8_t *const *rows, float *c) {
    float32x4_t sum = vdupq_n_f32(0);
    for (int b = 0; b < blocks; b++) {
        int64_t at = (int64_t)b * block_bytes_neon(type);
        int8x16_t vx[2], w[2];
        int32x4_t p[4];
        load_x_neon(x + b, vx);
        UNROLL for (int j = 0; j < 4; j++) {
            unpack_block_neon(type, rows[j] + at, w);
            p[j] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), w[0], vx[0]), w[1], vx[1]);
        }
        sum = vfmaq_f32(sum, vcvtq_f32_s32(sum_quad(p)),
                        vmulq_n_f32(block_scales_neon(rows, at), x[b].d));
    }
    vst1q_f32(c, sum);
}

NEON_DOT static void int_row_dot(int type, int blocks, const struct xblock *x, const uint8_t *w,
                                 int64_t row_bytes, int n, float *c) {
    for (int j = 0; j < n; j += 4) {
        const uint8_t *rows[4];
        float out[4];
        quad_of_rows(w + j * row_bytes, row_bytes, n - j, rows);
        if (type == LVM_Q8_0) int_4_rows_dot(LVM_Q8_0, blocks, x, rows, out);
        else int_4_rows_dot(LVM_Q4_0, blocks, x, rows, out);
        memcpy(c + j, out, (size_t)(n - j < 4 ? n - j : 4) * sizeof *c);
    }
}

/* Packed: four rows after four rows; of each block 4 scales, then for each four elements 4 rows of
   four bytes. */
static void int_pack_dot(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    for (int j0 = 0; j0 < STRIP; j0 += 4)
        for (int b = 0; b < blocks; b++, packed += NEON_QUAD) {
            int64_t at = (int64_t)b * block_bytes_neon(type);
            int32x4x4_t low, high;
            UNROLL for (int j = 0; j < 4; j++) {
                int8x16_t q[2];
                unpack_block_neon(type, w[j0 + j] + at, q);
                low.val[j] = vreinterpretq_s32_s8(q[0]);
                high.val[j] = vreinterpretq_s32_s8(q[1]);
            }
            vst1q_f32((float *)(void *)packed, block_scales_neon(w + j0, at));
            vst4q_s32((int32_t *)(void *)(packed + 16), low);
            vst4q_s32((int32_t *)(void *)(packed + 80), high);
        }
}

/* Four elements of one row of activations, which lie in lane, with four rows of weights. */
NEON_DOT static INLINE int32x4_t dot_lane(int32x4_t sum, int8x16_t w, int8x16_t x, int lane) {
    if (lane == 0) return vdotq_laneq_s32(sum, w, x, 0);
    if (lane == 1) return vdotq_laneq_s32(sum, w, x, 1);
    return lane == 2 ? vdotq_laneq_s32(sum, w, x, 2) : vdotq_laneq_s32(sum, w, x, 3);
}

/* Eight rows of weights: two packed fours. */
NEON_DOT static void int_tile_8_dot(int blocks, const struct xblock *const *x,
                                    const uint8_t *packed, float *c, int ldc) {
    const uint8_t *quad[2] = {packed, packed + (int64_t)blocks * NEON_QUAD};
    float32x4_t sum[NEON_INT][2];
    UNROLL for (int r = 0; r < NEON_INT; r++) sum[r][0] = sum[r][1] = vdupq_n_f32(0);
    for (int b = 0; b < blocks; b++) {
        int64_t at = (int64_t)b * NEON_QUAD;
        int32x4_t acc[NEON_INT][2];
        UNROLL for (int r = 0; r < NEON_INT; r++) acc[r][0] = acc[r][1] = vdupq_n_s32(0);
        UNROLL for (int half = 0; half < 2; half++) {
            int8x16_t vx[NEON_INT];
            UNROLL for (int r = 0; r < NEON_INT; r++) vx[r] = vld1q_s8(x[r][b].q.s8 + 16 * half);
            UNROLL for (int i = 0; i < 4; i++) {
                int8x16_t w0 = vld1q_s8((const int8_t *)quad[0] + at + 16 + 64 * half + 16 * i);
                int8x16_t w1 = vld1q_s8((const int8_t *)quad[1] + at + 16 + 64 * half + 16 * i);
                UNROLL for (int r = 0; r < NEON_INT; r++) {
                    acc[r][0] = dot_lane(acc[r][0], w0, vx[r], i);
                    acc[r][1] = dot_lane(acc[r][1], w1, vx[r], i);
                }
            }
            load_later(&sum[0][0]);
        }
        UNROLL for (int q = 0; q < 2; q++) {
            float32x4_t d = vld1q_f32((const float *)(const void *)(quad[q] + at));
            UNROLL for (int r = 0; r < NEON_INT; r++)
                sum[r][q] =
                    vfmaq_f32(sum[r][q], vcvtq_f32_s32(acc[r][q]), vmulq_n_f32(d, x[r][b].d));
        }
    }
    UNROLL for (int r = 0; r < NEON_INT; r++) {
        vst1q_f32(c + r * ldc, sum[r][0]);
        vst1q_f32(c + r * ldc + 4, sum[r][1]);
    }
}

NEON_DOT static void int_tile_dot(int blocks, const struct xblock *const *x, const uint8_t *packed,
                                  float *c, int ldc) {
    for (int j = 0; j < STRIP; j += 8)
        int_tile_8_dot(blocks, x, packed + (int64_t)j / 4 * blocks * NEON_QUAD, c + j, ldc);
}

/* ---- NEON: conversions ---- */

/* y = 16 bytes times their scales, one vector of scales for each four. */
static INLINE void store_16_neon(int8x16_t q, const float32x4_t *d, float *y) {
    int16x8_t low = vmovl_s8(vget_low_s8(q)), high = vmovl_high_s8(q);
    vst1q_f32(y, vmulq_f32(d[0], vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)))));
    vst1q_f32(y + 4, vmulq_f32(d[1], vcvtq_f32_s32(vmovl_high_s16(low))));
    vst1q_f32(y + 8, vmulq_f32(d[2], vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)))));
    vst1q_f32(y + 12, vmulq_f32(d[3], vcvtq_f32_s32(vmovl_high_s16(high))));
}

static float32x4_t halves_to_f32(const void *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

/* The f16 scale of a block, for store_16_neon. */
static INLINE void scale_16_neon(const void *block, float32x4_t *d) {
    d[0] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(block)));
    d[1] = d[2] = d[3] = d[0];
}

static INLINE void blocks_to_f32_neon(int type, const uint8_t *in, float *y, int64_t blocks) {
    for (; blocks > 0; blocks--, in += block_bytes_neon(type), y += QK) {
        float32x4_t d[4];
        int8x16_t q[2];
        scale_16_neon(in, d);
        unpack_block_neon(type, in, q);
        store_16_neon(q[0], d, y);
        store_16_neon(q[1], d, y + 16);
    }
}

static void to_f32_neon(int type, const void *in, float *y, int64_t k) {
    const uint16_t *h = in;
    int64_t i = 0;
    if (type == LVM_F16)
        for (; i + 4 <= k; i += 4) vst1q_f32(y + i, halves_to_f32(h + i));
    if (type == LVM_BF16)
        for (; i + 4 <= k; i += 4)
            vst1q_f32(y + i, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(h + i), 16)));
    if (type == LVM_Q8_0) blocks_to_f32_neon(LVM_Q8_0, in, y, k / QK);
    else if (type == LVM_Q4_0) blocks_to_f32_neon(LVM_Q4_0, in, y, k / QK);
    else if (type == LVM_F32) row_to_f32(type, in, y, k);
    else if (i < k) row_to_f32(type, h + i, y + i, k - i);
}

static void k8_to_f32_neon(const uint8_t *in, int n, float *out) {
    for (; n > 0; n--, in += K8_BYTES, out += QK * STRIP) {
        float32x4_t d[4];
        UNROLL for (int j = 0; j < 4; j++) d[j] = halves_to_f32(in + 8 * j);
        for (int i = 0; i < QK; i++)
            store_16_neon(vld1q_s8((const int8_t *)in + (2 + i) * STRIP), d, out + i * STRIP);
    }
}

static void v8_to_f32_neon(const struct q8_0 *in, int keys, float *out) {
    for (int i = 0; i < keys; i++, out += STRIP) {
        float32x4_t d[4];
        scale_16_neon(&in[i].d, d);
        store_16_neon(vld1q_s8(in[i].q), d, out);
        store_16_neon(vld1q_s8(in[i].q + 16), d, out + KEYS * STRIP);
    }
}

/* ---- NEON: elementwise ---- */

/* exp_f32, four at a time. */
static INLINE float32x4_t exp4(float32x4_t x) {
    uint32x4_t tiny = vcleq_f32(x, vdupq_n_f32(-87.0f));
    x = vmaxq_f32(vdupq_n_f32(-88.0f), vminq_f32(vdupq_n_f32(88.0f), x));
    float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504f)));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
    r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
    float32x4_t p = vdupq_n_f32(1.0f / 5040);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 720), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    p = vmulq_f32(p, vreinterpretq_f32_s32(power));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p), tiny));
}

static INLINE float32x4_t silu4(float32x4_t x) {
    return vdivq_f32(x, vaddq_f32(vdupq_n_f32(1), exp4(vnegq_f32(x))));
}

static void rmsnorm_neon(const float *x, const float *weight, float eps, int n, float *y) {
    float square = 0;
    dot_4_neon(n, x, x, 0, 1, &square);
    float scale = 1 / sqrtf(square / (float)n + eps);
    int i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(y + i, vmulq_f32(vld1q_f32(weight + i), vmulq_n_f32(vld1q_f32(x + i), scale)));
    for (; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* A mask for the first n lanes of four. */
static INLINE uint32x4_t first_4_lanes(int n) {
    static const int32_t lanes[4] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n));
}

/* n is a multiple of 16. */
static float softmax_neon(float *s, int n, int valid, float scale, float *max) {
    float32x4_t least = vdupq_n_f32(-HUGE_VALF), vm = least, sum[2];
    for (int i = 0; i < n; i += 4) {
        float32x4_t x = vmulq_n_f32(vld1q_f32(s + i), scale);
        x = vbslq_f32(first_4_lanes(valid - i), x, least);
        vst1q_f32(s + i, x);
        vm = vmaxnmq_f32(vm, x);
    }
    float m = vmaxnmvq_f32(vm);
    sum[0] = sum[1] = vdupq_n_f32(0);
    for (int i = 0; i < n; i += 8)
        UNROLL for (int half = 0; half < 2; half++) {
            float *p = s + i + 4 * half;
            float32x4_t e = exp4(vsubq_f32(vld1q_f32(p), vdupq_n_f32(m)));
            e = vbslq_f32(first_4_lanes(valid - i - 4 * half), e, vdupq_n_f32(0));
            vst1q_f32(p, e);
            sum[half] = vaddq_f32(sum[half], e);
        }
    float lanes[8];
    vst1q_f32(lanes, sum[0]);
    vst1q_f32(lanes + 4, sum[1]);
    *max = m;
    return sum_tree(lanes, 8);
}

static void silu_mul_neon(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(gate + i, vmulq_f32(silu4(vld1q_f32(gate + i)), vld1q_f32(up + i)));
    if (i == n) return;
    float g[8], u[8];
    last_lanes(gate + i, (int)(n - i), g);
    last_lanes(up + i, (int)(n - i), u);
    vst1q_f32(g, vmulq_f32(silu4(vld1q_f32(g)), vld1q_f32(u)));
    memcpy(gate + i, g, (size_t)(n - i) * sizeof *g);
}

/* c is a multiple of 32. */
static void norm_rows_neon(const float *x, const float *scale, const float *shift, int use_silu,
                           int64_t pixels, int c, float *y) {
    for (int64_t p = 0; p < pixels; p++, x += c, y += c)
        for (int i = 0; i < c; i += 4) {
            float32x4_t v =
                vfmaq_f32(vld1q_f32(shift + i), vld1q_f32(x + i), vld1q_f32(scale + i));
            vst1q_f32(y + i, use_silu ? silu4(v) : v);
        }
}

static void channel_sums_neon(const float *x, int64_t pixels, int c, float *sum, float *square) {
    for (int i = 0; i < c; i += 16) {
        float32x4_t s[4], q[4];
        UNROLL for (int j = 0; j < 4; j++) s[j] = q[j] = vdupq_n_f32(0);
        for (int64_t p = 0; p < pixels; p++)
            UNROLL for (int j = 0; j < 4; j++) {
                float32x4_t v = vld1q_f32(x + p * c + i + 4 * j);
                s[j] = vaddq_f32(s[j], v);
                q[j] = vfmaq_f32(q[j], v, v);
            }
        UNROLL for (int j = 0; j < 4; j++) {
            vst1q_f32(sum + i + 4 * j, s[j]);
            vst1q_f32(square + i + 4 * j, q[j]);
        }
    }
}

static const struct kernels kernels_neon = {
    "neon",         NEON_ROWS,       NEON_COLS,       NEON_INT,       NEON_OUTER,    NEON_PACK,
    dot_row_neon,   dot_tile_neon,   quantize_x_neon, int_row_neon,   int_pack_neon, int_tile_neon,
    outer_row_neon, outer_tile_neon, to_f32_neon,     k8_to_f32_neon, v8_to_f32_neon,
    rmsnorm_neon,   softmax_neon,    silu_mul_neon,   norm_rows_neon, channel_sums_neon};

static const struct kernels kernels_neon_dot = {
    "neon-dot",     NEON_ROWS,       NEON_COLS,       NEON_INT,       NEON_OUTER,    NEON_PACK,
    dot_row_neon,   dot_tile_neon,   quantize_x_neon, int_row_dot,    int_pack_dot,  int_tile_dot,
    outer_row_neon, outer_tile_neon, to_f32_neon,     k8_to_f32_neon, v8_to_f32_neon,
    rmsnorm_neon,   softmax_neon,    silu_mul_neon,   norm_rows_neon, channel_sums_neon};

/* 1 for NEON, which every AArch64 has; 2 where the system tells of the dot product instruction. */
static int simd_level(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return 2; /* compiled for machines that have it */
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has ? 2 : 1;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) & 1ul << 20 ? 2 : 1; /* HWCAP_ASIMDDP */
#elif defined(_WIN32)
    return IsProcessorFeaturePresent(43) ? 2 : 1; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */
#else
    return 1;
#endif
}
static const struct kernels *const simd_kernels[] = {&kernels_plain, &kernels_neon,
                                                     &kernels_neon_dot};
#else
static int simd_level(void) { return 0; }
static const struct kernels *const simd_kernels[] = {&kernels_plain};
#endif

static const struct kernels *choose_kernels(lvm_error *error) {
    const char *wanted = getenv("LVM_ISA");
    int level = simd_level();
    if (wanted == NULL || *wanted == 0) return simd_kernels[level];
    char names[64] = "";
    for (int i = 0; i <= level; i++) {
        const char *name = simd_kernels[i]->name;
        if (strcmp(wanted, name) == 0) return simd_kernels[i];
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "", name);
    }
    fail(error, LVM_INVALID, "LVM_ISA=%s: this machine runs %s", wanted, names);
    return NULL;
}

/* =================================================================================================
   Chapter 12.  The command line

   One table names the commands, one the options with the commands that take them; help is printed
   from the same tables. What was written goes to stdout, one path a line; everything else to
   stderr. Exit status: 0 done, 1 the work failed, 2 wrong usage. */

#ifndef LVM_NO_MAIN

enum command_bit {
    PREDICT = 1,
    ENCODE = 2,
    DECODE = 4,
    INFO = 8,
    QUANTIZE = 16,
    HELP = 32,
    RUNS = PREDICT | ENCODE | DECODE
};

struct cli {
    const char **words; /* arguments that are no options */
    int n_words;
    const char *out, *rules;
    int images, candidates, flags, force, quiet, list, type, vq_type;
    lvm_sampling sampling;
    lvm_options options;
};

enum option_kind { FLAG, TEXT, INTEGER, NUMBER, SEED, TYPE };

/* where: offset of the value in struct cli. low, high: bounds of a number; of a TYPE high is the
   set of those allowed, bit i for entry i of type_table. */
struct option {
    char letter;
    const char *name, *argument;
    int commands;
    enum option_kind kind;
    size_t where;
    double low, high;
    const char *help;
};

#define AT(field) offsetof(struct cli, field)
static const struct option option_table[] = {
    {'o', "output", "FILE", RUNS, TEXT, AT(out), 0, 0, "where to write (out.png; encode: stdout)"},
    {'n', "images", "N", PREDICT, INTEGER, AT(images), 1, 1 << 11,
     "pictures to predict, one after the other (1)"},
    {'c', "candidates", "N", PREDICT, INTEGER, AT(candidates), 1, MAX_SEQUENCES,
     "different answers (1)"},
    {'t', "temperature", "T", PREDICT, NUMBER, AT(sampling.temperature), 1e-3, 100,
     "0.001 to 100 (1)"},
    {'p', "top-p", "P", PREDICT, NUMBER, AT(sampling.top_p), 1e-6, 1,
     "keep the likeliest that hold P (0.9)"},
    {'k', "top-k", "K", PREDICT, INTEGER, AT(sampling.top_k), 0, 1 << 20,
     "keep the K likeliest (0: all)"},
    {'s', "seed", "N", PREDICT, SEED, AT(sampling.seed), 0, 0,
     "the same seed gives the same picture (1)"},
    {0, "greedy", NULL, PREDICT, FLAG, AT(sampling.greedy), 0, 0, "always the likeliest token"},
    {'j', "threads", "N", RUNS, INTEGER, AT(options.threads), 1, 1024,
     "threads (the processors allowed)"},
    {0, "exact", NULL, RUNS, FLAG, AT(options.exact), 0, 0,
     "f32 arithmetic from quantised weights too"},
    {0, "kv", "TYPE", PREDICT, TYPE, AT(options.kv_type), 0, 11,
     "cache: f32, f16 or q8_0 (by the weights)"},
    {0, "no-mmap", NULL, RUNS | INFO, FLAG, AT(flags), 0, 0,
     "read the weights instead of mapping them"},
    {0, "type", "TYPE", QUANTIZE, TYPE, AT(type), 0, 31,
     "of the transformer: q8_0 q4_0 f16 bf16 f32 (kept)"},
    {0, "vq-type", "TYPE", QUANTIZE, TYPE, AT(vq_type), 0, 15,
     "of the tokenizer: q8_0 f16 bf16 f32 (kept)"},
    {0, "rules", "P=T,...", QUANTIZE, TEXT, AT(rules), 0, 0,
     "types by tensor name, * for anything, first match"},
    {0, "tensors", NULL, INFO, FLAG, AT(list), 0, 0, "list every tensor"},
    {0, "force", NULL, QUANTIZE, FLAG, AT(force), 0, 0, "replace an existing file"},
    {'q', "quiet", NULL, RUNS, FLAG, AT(quiet), 0, 0, "no progress, no notes"}};
enum { N_OPTIONS = sizeof option_table / sizeof *option_table };

struct command {
    const char *name;
    int bit;
    int (*run)(struct cli *cli);
    const char *usage, *help;
};

static int run_predict(struct cli *cli);
static int run_encode(struct cli *cli);
static int run_decode(struct cli *cli);
static int run_info(struct cli *cli);
static int run_quantize(struct cli *cli);
static int run_help(struct cli *cli);

static const struct command command_table[] = {
    {"predict", PREDICT, run_predict, "[predict] WEIGHTS IMAGE|FOLDER...",
     "predict the next picture(s) of a visual sentence"},
    {"encode", ENCODE, run_encode, "encode WEIGHTS IMAGE|FOLDER...",
     "pictures to token ids, one line a picture"},
    {"decode", DECODE, run_decode, "decode WEIGHTS TOKENS",
     "token ids (a file, or - for stdin) to pictures"},
    {"info", INFO, run_info, "info WEIGHTS", "what is in a weights file"},
    {"quantize", QUANTIZE, run_quantize, "quantize IN OUT",
     "rewrite a weights file with other types"},
    {"help", HELP, run_help, "help [COMMAND]", "this text, or a command's options"}};
enum { N_COMMANDS = sizeof command_table / sizeof *command_table };

static const struct command *find_command(const char *name) {
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(command_table[i].name, name) == 0) return &command_table[i];
    return NULL;
}

LVM_PRINTF(1, 2) static int complain(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("lvm: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return 1;
}

/* ---- Options ---- */

static int set_type(void *to, int allowed, const char *shown, const char *value) {
    char names[64] = "";
    for (int i = 0; i < N_TYPES; i++) {
        if ((allowed & 1 << i) == 0) continue;
        if (strcmp(type_table[i].name, value) == 0) {
            *(int *)to = type_table[i].type;
            return 0;
        }
        snprintf(names + strlen(names), 8, " %s", type_table[i].name);
    }
    return complain("%s: \"%s\" is none of the types it takes:%s", shown, value, names) + 1;
}

/* Stores an option's value; 0, or a message and 2. */
static int set_option(struct cli *cli, const struct option *o, const char *shown,
                      const char *value) {
    char *to = (char *)cli + o->where, *end = NULL;
    errno = 0;
    if (o->kind == FLAG) {
        *(int *)(void *)to = 1;
    } else if (o->kind == TEXT) {
        *(const char **)(void *)to = value;
    } else if (o->kind == TYPE) {
        return set_type(to, (int)o->high, shown, value);
    } else if (o->kind == SEED) {
        *(uint64_t *)(void *)to = strtoull(value, &end, 10);
        if (end == value || *end != 0 || errno != 0 || !isdigit((unsigned char)*value))
            return complain("%s: \"%s\" is no whole number from 0 to 2^64 - 1", shown, value) + 1;
    } else {
        double v = o->kind == INTEGER ? (double)strtoll(value, &end, 10) : strtod(value, &end);
        if (end == value || *end != 0 || !(v >= o->low && v <= o->high))
            return complain("%s: \"%s\" is not a %snumber from %g to %g", shown, value,
                            o->kind == INTEGER ? "whole " : "", o->low, o->high) + 1;
        if (o->kind == INTEGER) *(int *)(void *)to = (int)v;
        else *(float *)(void *)to = (float)v;
    }
    return 0;
}

/* Finds the option that an argument names; *value points behind "=" or a letter, or is NULL. */
static const struct option *match_option(const char *arg, const char **value) {
    *value = NULL;
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        size_t n = strlen(o->name);
        if (arg[1] == '-' && strncmp(arg + 2, o->name, n) == 0 &&
            (arg[2 + n] == 0 || arg[2 + n] == '=')) {
            if (arg[2 + n] == '=') *value = arg + 3 + n;
            return o;
        }
        if (arg[1] != '-' && o->letter != 0 && arg[1] == o->letter) {
            if (arg[2] != 0) *value = arg + 2;
            return o;
        }
    }
    return NULL;
}

/* Splits argv[first..] into options and words; 0, or a message and 2. */
static int parse_arguments(struct cli *cli, const struct command *c, int argc, char **argv,
                           int first) {
    int only_words = 0;
    for (int i = first; i < argc; i++) {
        const char *arg = argv[i], *value;
        if (only_words || arg[0] != '-' || arg[1] == 0) {
            cli->words[cli->n_words++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            only_words = 1;
            continue;
        }
        const struct option *o = match_option(arg, &value);
        if (o == NULL || (o->commands & c->bit) == 0)
            return complain("%s: unknown option %s (lvm help %s lists them)", c->name, arg,
                            c->name) +
                   1;
        if (o->kind == FLAG && value != NULL) return complain("%s: takes no value", arg) + 1;
        if (o->kind != FLAG && value == NULL) {
            if (i + 1 == argc) return complain("%s: needs a value", arg) + 1;
            value = argv[++i];
        }
        int code = set_option(cli, o, arg, value);
        if (code != 0) return code;
    }
    return 0;
}

/* ---- Help ---- */

static void print_options(FILE *f, int bits) {
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        char left[40];
        if ((o->commands & bits) == 0) continue;
        snprintf(left, sizeof left, "%c%c%s --%s %s", o->letter ? '-' : ' ',
                 o->letter ? o->letter : ' ', o->letter ? "," : " ", o->name,
                 o->argument != NULL ? o->argument : "");
        fprintf(f, "  %-24s %s\n", left, o->help);
    }
}

static int print_help(FILE *f, const struct command *c) {
    if (c != NULL) {
        fprintf(f, "lvm %s\n  %s\n", c->usage, c->help);
        print_options(f, c->bit);
        return 0;
    }
    fprintf(f, "lvm %s - Large Vision Models: prompts are pictures, answers are pictures\n\n",
            LVM_VERSION);
    for (int i = 0; i < N_COMMANDS; i++)
        fprintf(f, "  lvm %-36s %s\n", command_table[i].usage, command_table[i].help);
    fprintf(f, "  lvm %-36s %s\n\nOptions of predict:\n", "--version", "version and kernels");
    print_options(f, PREDICT);
    return 0;
}

static int run_help(struct cli *cli) {
    const struct command *c = cli->n_words > 0 ? find_command(cli->words[0]) : NULL;
    if (cli->n_words > 0 && c == NULL)
        return complain("there is no command \"%s\"", cli->words[0]) + 1;
    return print_help(stdout, c);
}

/* ---- Progress: a bar with rate and time left, only on a terminal; and Ctrl-C ---- */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    interrupted = 1;
    signal(signal_number, SIG_DFL); /* a second one ends the program at once */
}

struct bar {
    int shown;
    double started, drawn;
    char stage[16];
};

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void draw_bar(struct bar *b, const char *stage, int64_t done, int64_t all) {
    double now = seconds();
    if (strcmp(b->stage, stage) != 0 || done == 0) {
        snprintf(b->stage, sizeof b->stage, "%s", stage);
        b->started = now;
    }
    if (done < all && now - b->drawn < 0.1) return;
    b->drawn = now;
    double took = now - b->started, rate = took > 0 ? (double)done / took : 0;
    int width = 24, full = (int)((double)width * (double)done / (double)(all > 0 ? all : 1));
    fprintf(stderr, "\r%-9s [%.*s%*s] %3d %%  ", stage, full, "########################",
            width - full, "", (int)(100 * done / (all > 0 ? all : 1)));
    if (strcmp(stage, "prompt") == 0 || strcmp(stage, "generate") == 0 ||
        strcmp(stage, "score") == 0)
        fprintf(stderr, "%.0f tokens/s  ", rate);
    if (done < all && rate > 0) fprintf(stderr, "%.0f s left ", (double)(all - done) / rate);
    fputs("\033[K", stderr);
    if (done >= all) fputs("\r\033[K", stderr);
    fflush(stderr);
}

static int on_progress(void *user, const char *stage, int64_t done, int64_t all) {
    struct bar *b = user;
    if (b->shown && strcmp(stage, "layers") != 0) draw_bar(b, stage, done, all);
    return interrupted;
}

/* ---- Pictures named on the command line ---- */

struct paths {
    char **path;
    int n, room;
};

static void paths_free(struct paths *p) {
    for (int i = 0; i < p->n; i++) mem_free(p->path[i]);
    mem_free(p->path);
    memset(p, 0, sizeof *p);
}

static int paths_add(struct paths *p, const char *folder, const char *name, lvm_error *error) {
    if (p->n == p->room) {
        int room = p->room * 2 + 16;
        char **more = mem_alloc((size_t)room, sizeof *more, error);
        if (more == NULL) return LVM_MEMORY;
        if (p->n > 0) memcpy(more, p->path, (size_t)p->n * sizeof *more);
        mem_free(p->path);
        p->path = more;
        p->room = room;
    }
    size_t bytes = strlen(folder) + strlen(name) + 2;
    char *path = mem_alloc(bytes, 1, error);
    if (path == NULL) return LVM_MEMORY;
    snprintf(path, bytes, "%s%s%s", folder, *folder != 0 ? "/" : "", name);
    p->path[p->n++] = path;
    return LVM_OK;
}

/* Natural order: runs of digits compare as numbers, so 2.png stands before 10.png. */
static int compare_natural(const char *a, const char *b) {
    while (*a != 0 && *b != 0) {
        if (isdigit((unsigned char)*a) && isdigit((unsigned char)*b)) {
            while (*a == '0') a++;
            while (*b == '0') b++;
            size_t na = strspn(a, "0123456789"), nb = strspn(b, "0123456789");
            if (na != nb) return na < nb ? -1 : 1;
            int order = strncmp(a, b, na);
            if (order != 0) return order;
            a += na;
            b += nb;
        } else {
            if (*a != *b) return (unsigned char)*a < (unsigned char)*b ? -1 : 1;
            a++, b++;
        }
    }
    return (*a != 0) - (*b != 0);
}

static int compare_paths(const void *a, const void *b) {
    const char *x = *(char *const *)a, *y = *(char *const *)b;
    int order = compare_natural(x, y);
    return order != 0 ? order : strcmp(x, y);
}

static int ends_with_png(const char *name) {
    size_t n = strlen(name);
    return n > 4 && (strcmp(name + n - 4, ".png") == 0 || strcmp(name + n - 4, ".PNG") == 0);
}

/* The PNG files of a folder in natural order; folders inside it are not entered. */
static int add_folder(struct paths *p, const char *folder, lvm_error *error) {
    DIR *dir = opendir(folder);
    int code = LVM_OK, first = p->n;
    if (dir == NULL) return fail(error, LVM_IO, "%s: %s", folder, strerror(errno));
    for (struct dirent *entry; code == LVM_OK && (entry = readdir(dir)) != NULL;)
        if (ends_with_png(entry->d_name)) code = paths_add(p, folder, entry->d_name, error);
    closedir(dir);
    if (code == LVM_OK && p->n == first)
        code = fail(error, LVM_INVALID, "%s: this folder holds no PNG pictures", folder);
    if (code == LVM_OK)
        qsort(p->path + first, (size_t)(p->n - first), sizeof *p->path, compare_paths);
    return code;
}

static int is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static int collect_paths(struct paths *p, const char **words, int n, lvm_error *error) {
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = is_folder(words[i]) ? add_folder(p, words[i], error)
                                   : paths_add(p, "", words[i], error);
    return code;
}

static void free_images(lvm_image *images, int n) {
    for (int i = 0; images != NULL && i < n; i++) lvm_image_free(&images[i]);
    mem_free(images);
}

static lvm_image *load_images(const struct paths *p, int first, lvm_error *error) {
    lvm_image *images = mem_alloc((size_t)(p->n - first) + 1, sizeof *images, error);
    for (int i = first; images != NULL && i < p->n; i++)
        if (lvm_image_load(p->path[i], &images[i - first], error) != LVM_OK) {
            free_images(images, i - first);
            return NULL;
        }
    return images;
}

/* ---- Names of outputs ---- */

/* "out.png" for one; out-1.png, out-2.png for several; out-1a.png, out-1b.png with candidates. */
static char *output_name(const char *base, int image, int images, int candidate, int candidates,
                         lvm_error *error) {
    size_t n = strlen(base);
    char tag[32] = "", *name = mem_alloc(n + 48, 1, error);
    const char *dot = strrchr(base, '.'), *slash = strrchr(base, '/');
    int stem = dot != NULL && (slash == NULL || dot > slash) ? (int)(dot - base) : (int)n;
    if (name == NULL) return NULL;
    if (images > 1 || candidates > 1) snprintf(tag, sizeof tag, "-%d", image + 1);
    if (candidates > 26) snprintf(tag + strlen(tag), 12, "-%d", candidate + 1);
    else if (candidates > 1) snprintf(tag + strlen(tag), 12, "%c", 'a' + candidate);
    snprintf(name, n + 48, "%.*s%s%s", stem, base, tag, base + stem);
    return name;
}

/* Refuses an output that is one of the inputs. */
static int check_output(const char *name, const char *weights, const struct paths *p,
                        lvm_error *error) {
    if (same_file(name, weights))
        return fail(error, LVM_INVALID, "%s: is the weights file; choose another output with -o",
                    name);
    for (int i = 0; i < p->n; i++)
        if (same_file(name, p->path[i]))
            return fail(error, LVM_INVALID, "%s: is an input too; choose another output with -o",
                        name);
    return LVM_OK;
}

/* "-o -" asks for standard output. */
static int to_stdout(const struct cli *cli) {
    return cli->out != NULL && strcmp(cli->out, "-") == 0;
}

static int print_image(const lvm_image *image, int n, lvm_error *error) {
    uint8_t *png = NULL;
    size_t size = 0;
    if (n > 1) return fail(error, LVM_INVALID, "-o -: takes one picture, not %d", n);
    int code = png_encode(image, &png, &size, error);
    if (code == LVM_OK) fwrite(png, 1, size, stdout);
    mem_free(png);
    return code;
}

/* Writes pictures [candidate][image] under their names and prints the names. */
static int save_images(const struct cli *cli, const lvm_image *images, int n, int candidates,
                       const struct paths *inputs, lvm_error *error) {
    const char *base = cli->out != NULL ? cli->out : "out.png";
    int code = LVM_OK;
    if (to_stdout(cli)) return print_image(images, n * candidates, error);
    for (int pass = 0; pass < 2; pass++) /* first look, then write */
        for (int i = 0; code == LVM_OK && i < n; i++)
            for (int c = 0; code == LVM_OK && c < candidates; c++) {
                char *name = output_name(base, i, n, c, candidates, error);
                if (name == NULL) return LVM_MEMORY;
                if (pass == 0) code = check_output(name, cli->words[0], inputs, error);
                if (pass == 1) code = lvm_image_save(name, &images[c * n + i], error);
                if (pass == 1 && code == LVM_OK) printf("%s\n", name);
                mem_free(name);
            }
    return code;
}

/* ---- Commands ---- */

struct session {
    lvm_model *model;
    lvm_ctx *ctx;
    struct bar bar;
};

static void session_close(struct session *s) {
    lvm_free(s->ctx);
    lvm_close(s->model);
}

static int session_open(struct session *s, struct cli *cli, lvm_error *error) {
    memset(s, 0, sizeof *s);
    s->model = lvm_open(cli->words[0], cli->flags ? LVM_NO_MMAP : 0, error);
    if (s->model == NULL) return error->code;
    s->bar.shown = !cli->quiet && isatty(2);
    cli->options.user = &s->bar;
    cli->options.progress = on_progress;
    s->ctx = lvm_new(s->model, &cli->options, error);
    return s->ctx == NULL ? error->code : LVM_OK;
}

/* Reports a failure, if it was one, and gives the exit status. */
static int finish(const lvm_error *error, int code) {
    return code == LVM_OK ? 0 : complain("%s", error->text);
}

static int predict_images(struct cli *cli, struct session *s, const struct paths *p,
                          lvm_error *error) {
    lvm_info info = lvm_model_info(s->model);
    int most = info.window_images - 1, first = p->n > most ? p->n - most : 0;
    int code = need(s->ctx, info.has_tokenizer, "tokenizer", error);
    if (code == LVM_OK) code = need(s->ctx, info.has_transformer, "transformer", error);
    if (code == LVM_OK && most < 1)
        code = fail(error, LVM_INVALID, "%s: its context of %d tokens holds no prompt picture",
                    cli->words[0], info.context_length);
    if (code != LVM_OK) return code;
    if (!cli->quiet && first > 0)
        fprintf(stderr, "lvm: note: %d pictures given, the last %d count (the context holds %d)\n",
                p->n, most, most + 1);
    char *name = output_name(cli->out != NULL ? cli->out : "out.png", 0, cli->images, 0,
                             cli->candidates, error);
    code = name == NULL ? LVM_MEMORY : check_output(name, cli->words[0], p, error);
    mem_free(name);
    if (code != LVM_OK) return code;
    lvm_image *images = load_images(p, first, error);
    lvm_image *out = mem_alloc((size_t)cli->images * (size_t)cli->candidates, sizeof *out, error);
    code = images == NULL || out == NULL ? error->code
                                         : lvm_predict(s->ctx, images, p->n - first, &cli->sampling,
                                                       cli->candidates, cli->images, out, error);
    if (code == LVM_OK) code = save_images(cli, out, cli->images, cli->candidates, p, error);
    free_images(images, p->n - first);
    free_images(out, cli->images * cli->candidates);
    return code;
}

static int run_predict(struct cli *cli) {
    if (cli->n_words < 2)
        return complain("give a weights file and prompt pictures: lvm WEIGHTS IMAGE|FOLDER... (lvm "
                        "help)") +
               1;
    if (to_stdout(cli) && cli->images * cli->candidates > 1)
        return complain("-o -: standard output takes one picture") + 1;
    lvm_error error = {0, ""};
    struct session s = {NULL, NULL, {0}};
    struct paths p = {0};
    int code = collect_paths(&p, cli->words + 1, cli->n_words - 1, &error);
    if (code == LVM_OK) code = session_open(&s, cli, &error);
    if (code == LVM_OK) code = predict_images(cli, &s, &p, &error);
    session_close(&s);
    paths_free(&p);
    return finish(&error, code);
}

/* A growing text. */
struct buffer {
    char *data;
    size_t n, room;
};

static int buffer_add(struct buffer *b, const char *data, size_t n, lvm_error *error) {
    if (b->room - b->n < n + 1) {
        size_t room = b->room * 2 + n + 4096;
        char *more = mem_alloc(room, 1, error);
        if (more == NULL) return LVM_MEMORY;
        if (b->n > 0) memcpy(more, b->data, b->n);
        mem_free(b->data);
        b->data = more;
        b->room = room;
    }
    memcpy(b->data + b->n, data, n);
    b->n += n;
    b->data[b->n] = 0;
    return LVM_OK;
}

/* Ids of one picture after the other, a line each. */
static int encode_paths(struct session *s, const struct paths *p, struct buffer *text,
                        lvm_error *error) {
    int T = lvm_model_info(s->model).tokens_per_image, code = LVM_OK;
    int32_t *ids = mem_alloc((size_t)T, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < p->n; i++) {
        lvm_image image = {0, 0, NULL};
        code = lvm_image_load(p->path[i], &image, error);
        if (code == LVM_OK) code = lvm_encode(s->ctx, &image, 1, ids, error);
        for (int t = 0; code == LVM_OK && t < T; t++) {
            char number[16];
            int n = snprintf(number, sizeof number, "%d%c", (int)ids[t], t + 1 < T ? ' ' : '\n');
            code = buffer_add(text, number, (size_t)n, error);
        }
        lvm_image_free(&image);
    }
    mem_free(ids);
    return code;
}

static int run_encode(struct cli *cli) {
    if (cli->n_words < 2) return complain("give a weights file and pictures (lvm help encode)") + 1;
    lvm_error error = {0, ""};
    struct session s = {NULL, NULL, {0}};
    struct paths p = {0};
    struct buffer text = {0};
    const char *out = to_stdout(cli) ? NULL : cli->out;
    int code = collect_paths(&p, cli->words + 1, cli->n_words - 1, &error);
    if (code == LVM_OK && out != NULL) code = check_output(out, cli->words[0], &p, &error);
    if (code == LVM_OK) code = session_open(&s, cli, &error);
    if (code == LVM_OK) code = encode_paths(&s, &p, &text, &error);
    if (code == LVM_OK && out != NULL) code = write_file(out, text.data, text.n, &error);
    if (code == LVM_OK && out != NULL) printf("%s\n", out);
    if (code == LVM_OK && out == NULL) fwrite(text.data, 1, text.n, stdout);
    mem_free(text.data);
    session_close(&s);
    paths_free(&p);
    return finish(&error, code);
}

static int read_stdin(struct buffer *text, lvm_error *error) {
    char piece[4096];
    int code = buffer_add(text, "", 0, error);
    for (size_t n; code == LVM_OK && (n = fread(piece, 1, sizeof piece, stdin)) > 0;)
        code = buffer_add(text, piece, n, error);
    return code;
}

/* Names the word of a token file that is none; what does not print shows as ?. */
static int no_token(const char *name, int line, const char *word, size_t n, lvm_error *error) {
    char shown[13] = "";
    for (size_t i = 0; i < n && i < 12 && !isspace((unsigned char)word[i]); i++)
        shown[i] = word[i];
    for (char *c = shown; *c != 0; c++)
        if (!isprint((unsigned char)*c)) *c = '?';
    return fail(error, LVM_FORMAT, "%s: line %d: \"%s\" is no token id", name, line, shown);
}

/* Whole numbers separated by blanks and newlines. *ids is allocated, *n their count. */
static int parse_tokens(const char *name, const char *text, size_t size, int32_t **ids, int *n,
                        lvm_error *error) {
    int line = 1;
    *n = 0;
    *ids = mem_alloc(size / 2 + 1, sizeof **ids, error);
    if (*ids == NULL) return LVM_MEMORY;
    for (size_t i = 0; i < size;) {
        if (text[i] == '\n') line++;
        if (isspace((unsigned char)text[i])) {
            i++;
            continue;
        }
        size_t digits = strspn(text + i, "0123456789");
        int after = (unsigned char)text[i + digits];
        if (digits == 0 || digits > 9 || (after != 0 && !isspace(after)))
            return no_token(name, line, text + i, size - i, error);
        (*ids)[(*n)++] = (int32_t)strtol(text + i, NULL, 10);
        i += digits;
    }
    return LVM_OK;
}

static int decode_tokens(struct cli *cli, struct session *s, const int32_t *ids, int n,
                         lvm_error *error) {
    int T = lvm_model_info(s->model).tokens_per_image;
    struct paths inputs = {0};
    lvm_error fault = {0, ""};
    int code = need(s->ctx, s->model->vq != NULL, "tokenizer", error);
    if (code != LVM_OK) return code;
    if (n == 0 || n % T != 0)
        return fail(error, LVM_FORMAT, "%s: %d token ids; a picture takes %d", cli->words[1], n, T);
    if (check_ids(ids, n, lvm_model_info(s->model).codes, &fault) != LVM_OK)
        return fail(error, LVM_FORMAT, "%s: %s", cli->words[1], fault.text);
    lvm_image *images = mem_alloc((size_t)(n / T), sizeof *images, error);
    if (images == NULL) return LVM_MEMORY;
    code = paths_add(&inputs, "", cli->words[1], error);
    if (code == LVM_OK) code = lvm_decode(s->ctx, ids, n / T, images, error);
    if (code == LVM_OK) code = save_images(cli, images, n / T, 1, &inputs, error);
    free_images(images, n / T);
    paths_free(&inputs);
    return code;
}

static int run_decode(struct cli *cli) {
    if (cli->n_words != 2)
        return complain("give a weights file and a file of token ids (lvm help decode)") + 1;
    lvm_error error = {0, ""};
    struct session s = {NULL, NULL, {0}};
    struct buffer text = {0};
    uint8_t *data = NULL;
    size_t size = 0;
    int32_t *ids = NULL;
    int n = 0, from_stdin = strcmp(cli->words[1], "-") == 0;
    int code =
        from_stdin ? read_stdin(&text, &error) : read_file(cli->words[1], &data, &size, &error);
    if (code == LVM_OK && from_stdin) size = text.n;
    if (code == LVM_OK)
        code = parse_tokens(cli->words[1], from_stdin ? text.data : (const char *)data, size, &ids,
                            &n, &error);
    if (code == LVM_OK) code = session_open(&s, cli, &error);
    if (code == LVM_OK) code = decode_tokens(cli, &s, ids, n, &error);
    mem_free(text.data);
    mem_free(data);
    mem_free(ids);
    session_close(&s);
    return finish(&error, code);
}

static void print_key(const struct gguf *g, const char *key, const char *label) {
    const struct gguf_key *k = gguf_key(g, key);
    if (k == NULL || k->type != GGUF_STRING) return;
    struct cursor c = {k->value, k->size, 0, 0};
    struct text t = cursor_text(&c);
    printf("%-13s ", label);
    for (uint64_t i = 0; i < t.n && i < 2000; i++)
        putchar(iscntrl((unsigned char)t.s[i]) ? ' ' : t.s[i]);
    putchar('\n');
}

/* Tensors, elements and bytes of each type in one part of the file. */
static void print_types(const struct gguf *g, int vq) {
    for (int i = 0; i < N_TYPES; i++) {
        int64_t n = 0, elements = 0, bytes = 0;
        for (int64_t t = 0; t < g->n_tensors; t++) {
            const struct gguf_tensor *x = &g->tensors[t];
            if ((x->name.n > 3 && memcmp(x->name.s, "vq.", 3) == 0) != vq) continue;
            if (x->type != type_table[i].type) continue;
            n++;
            elements += x->ne[0] * x->ne[1] * x->ne[2] * x->ne[3];
            bytes += x->bytes;
        }
        if (n > 0)
            printf("              %-5s %5lld tensors %13lld values %13lld bytes\n",
                   type_table[i].name, (long long)n, (long long)elements, (long long)bytes);
    }
}

static void print_tensors(const struct gguf *g) {
    for (int64_t i = 0; i < g->n_tensors; i++) {
        const struct gguf_tensor *t = &g->tensors[i];
        printf("%-48.*s %-5s", TEXT_ARG(t->name), type_info(t->type)->name);
        for (int d = t->n_dims - 1; d >= 0; d--) printf(" %lld", (long long)t->ne[d]);
        putchar('\n');
    }
}

static void print_tokenizer(const struct vqgan *vq) {
    printf("tokenizer     %d x %d pixels -> %d x %d of %d codes; %d channels x (", vq->R, vq->R,
           vq->S, vq->S, vq->codes, vq->hidden);
    for (int i = 0; i < vq->n_levels; i++) printf("%s%d", i > 0 ? "," : "", vq->mult[i]);
    printf("), %d residual blocks, attention at ", vq->n_res_blocks);
    for (int i = 0; i < vq->n_attn_at; i++) printf("%s%d", i > 0 ? "," : "", vq->attn_at[i]);
    printf("%s%s, z %d, code width %d\n", vq->n_attn_at == 0 ? "no resolution" : "",
           vq->no_mid_attn ? "" : " and in the middle", vq->z, vq->e);
}

static int run_info(struct cli *cli) {
    if (cli->n_words != 1) return complain("give one weights file (lvm help info)") + 1;
    lvm_error error = {0, ""};
    lvm_model *m = lvm_open(cli->words[0], cli->flags ? LVM_NO_MMAP : 0, &error);
    if (m == NULL) return finish(&error, error.code);
    const struct gguf *g = &m->file;
    lvm_info i = lvm_model_info(m);
    printf("%-13s %s, %zu bytes\n", "file", cli->words[0], g->size);
    print_key(g, "general.name", "name");
    print_key(g, "general.license", "license");
    print_key(g, "general.description", "description");
    printf("%-13s %.1f million\n", "parameters", (double)i.parameters / 1e6);
    if (m->vq != NULL) print_tokenizer(m->vq);
    else printf("tokenizer     none\n");
    print_types(g, 1);
    if (i.has_transformer)
        printf("transformer   %d layers, width %d, feed-forward %d, %d heads (%d key/value), "
               "vocabulary %d,\n"
               "              context %d tokens = %d pictures, rope %g, bos %d, eos %d%s\n",
               i.layers, i.width, i.feed_forward, i.heads, i.kv_heads, i.vocab_size,
               i.context_length, i.window_images, (double)m->llama.theta, i.bos, i.eos,
               i.bos < 0 ? " (none)" : "");
    else printf("transformer   none\n");
    print_types(g, 0);
    if (cli->list) print_tensors(g);
    lvm_close(m);
    return finish(&error, LVM_OK);
}

static int run_quantize(struct cli *cli) {
    if (cli->n_words != 2) return complain("give an input and an output (lvm help quantize)") + 1;
    lvm_error error = {0, ""};
    int ruled = LVM_AUTO;
    if (rule_type(cli->rules, (struct text){NULL, 0}, &ruled, &error) != LVM_OK)
        return complain("--rules: %s", error.text) + 1;
    int code = lvm_quantize(cli->words[0], cli->words[1], cli->type, cli->vq_type, cli->rules,
                            cli->force, &error);
    if (code == LVM_OK) printf("%s\n", cli->words[1]);
    return finish(&error, code);
}

/* The exit status once everything is said: what was printed must have arrived. */
static int flush_output(int status) {
    int bad = fflush(stdout) != 0 || ferror(stdout);
    return status == 0 && bad ? complain("standard output: cannot be written") : status;
}

static int print_version(void) {
    lvm_error error = {0, ""};
    const struct kernels *k = choose_kernels(&error);
    if (k == NULL) return complain("%s", error.text);
    printf("lvm %s (%s, %d processors)\n", LVM_VERSION, k->name, processors());
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_help(stderr, NULL);
        return 2;
    }
    if (strcmp(argv[1], "--version") == 0) return flush_output(print_version());
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)
        return flush_output(print_help(stdout, NULL));
    const struct command *c = find_command(argv[1]);
    struct cli cli = {.images = 1, .candidates = 1, .type = LVM_AUTO, .vq_type = LVM_AUTO};
    cli.sampling = lvm_default_sampling();
    cli.options = lvm_default_options();
    cli.words = calloc((size_t)argc, sizeof *cli.words);
    if (cli.words == NULL) return complain("out of memory");
    signal(SIGINT, on_interrupt);
    int status =
        parse_arguments(&cli, c != NULL ? c : &command_table[0], argc, argv, c != NULL ? 2 : 1);
    if (status == 0) status = (c != NULL ? c : &command_table[0])->run(&cli);
    free(cli.words);
    return flush_output(status);
}

#endif /* LVM_NO_MAIN */
#endif /* LVM_API_ONLY */
