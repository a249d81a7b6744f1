/* lvm.c - run, embed and understand Large Vision Models, in one C file.

   A Large Vision Model (Bai et al., "Sequential Modeling Enables Scalable Learning for Large Vision
   Models", arXiv 2312.00785) never saw a word. A VQGAN turns every image into 256 tokens, up to 16
   images become one sequence (a visual sentence), a LLaMA-style transformer predicts the next
   token, and a task is given by showing examples of it as images: photo, depth, photo, depth, ...,
   photo, and the model answers with the depth.

   As a program:       cc -O2 -ffp-contract=off lvm.c -o lvm -lm -lpthread
                       (for Windows: x86_64-w64-mingw32-gcc, and -static)
                       ./lvm weights.bin prompt/01.png prompt/02.png prompt/03.png
   In your program:    compile this file with -DLVM_NO_MAIN, and where you call it
                           #define LVM_API_ONLY
                           #include "lvm.c"
                       Or make `#include "lvm.c"` the first include of one C file of yours, with
                       LVM_NO_MAIN defined above it.
   For another device: a file of its own, in C or C++17, that defines LVM_INTERNAL and includes this
                       one gets what both sides of the seam share (chapter 7).

   Three surprises, first:
   1. Sums have one order. The same weights, input, seed, options and instruction set give the same
      bytes, whatever the number of threads, candidates, batched rows or reused prefixes. Whoever
      adds a faster kernel keeps the order that the plain C of chapter 3 documents.
   2. Nothing here exits, prints or keeps mutable global state; only chapter 15, the command line,
      does.
   3. An image is a row of tokens in the tokenizer's raster order, and a context holds whole images:
      when a sequence outgrows it, the oldest images leave and positions start again at zero.

   THE SHORTEST PATH, some 300 lines in reading order, from images to an image:

       vq_encode          5   pixels to tokens: run_residual, whose heart is conv2d_plain_task,
       vector_quantize    5   and the nearest row of the codebook
       rmsnorm_plain      3   of a row of activations
       rotate             6   RoPE: what tells a query how far away a key is
       softmax_plain      3   scores to probabilities,
       attend_block       3   and what is done with them: attention
       run_layer          6   one layer, all shapes in sight; run_layers: all of them
       sample             7   logits to a token
       generate_on_host   7   the loop that predicts an image
       vq_decode          5   tokens to pixels

   CONTENTS
     Part one: how a Large Vision Model works
       0  What this is; the public API
       1  Errors, memory, threads; what the system gives
       2  Numbers: f16, bf16, the quantised blocks, exp and friends
       3  Kernels in plain C, the tables they are called through, matmul and attention
       4  The model: one description of its tensors and operations, read from GGUF
       5  The tokenizer: VQGAN encoder, vector quantiser, decoder
       6  The transformer: RMSNorm, RoPE, attention with a KV cache, SwiGLU
       7  The seam for devices and the CPU behind it; generation and scoring
     Part two: how one learns
       8  Training: backward beside forward, AdamW, LoRA, data, checkpoints
       9  Visual sentences: prompts by the line
     Part three: the machine room
      10  Systems: files, mapping, folders, threads, Windows
      11  Images: PNG, JPEG and PNM in, PNG out, EXIF rotation, Pillow's resizing
      12  Packing, fast convolution (Winograd), attention on quantised caches
      13  Fast kernels: AVX2, AVX-512, NEON
      14  Tools: GGUF, quantise, random weights, contexts, the cache file
      15  The command line, bench

   WORDS, as they are used here
     image token   the number of a row of the VQGAN's codebook (a code); one stands for a patch of
                   16 x 16 pixels. id: any entry of the vocabulary: image tokens, bos, eos
     prompt        what is given: examples of a task (two or three: shots), then the query image
     prefill       the forward over the whole prompt; generate: one forward a token; decode: tokens
                   to pixels
     causal mask   token i attends to tokens 0 .. i, so what was computed for them stays right, and
                   keys and values are kept: the KV cache
     nat           the unit of -ln p, an id's negative log-likelihood; perplexity: exp of its mean

   LETTERS in shapes, and in code where a name would be longer than what it says:
       N rows (tokens) at once   T tokens of an image (S S)   V vocabulary   D model width
       F feed-forward width      H attention heads            G key/value heads   d width of a head
       L layers                  R image side in pixels       S side of the token grid (R/16)
       C channels                K, in kernels k: terms of a sum; next to q and v, k is a key
       e struct exec: how to compute     s activations and scratch ("state")     w weights
       a struct llama                    m a model; of an online softmax, the largest score

   Licence: MIT, see the LICENSE file. */

/* =================================================================================================
   Chapter 0.  The public API

   Objects. An lvm_model is the weights: immutable, memory-mapped, shared by any number of threads
   and contexts. An lvm_ctx is one conversation with a model: key/value cache, scratch memory and a
   pool of threads; one thread at a time may use it. Close contexts before their model.

   Errors. Every call that can fail returns LVM_OK (0) or one of the codes below and fills *error,
   whose text names the file or the argument and the fault; after a success it holds LVM_OK and "".
   error may be NULL; any other pointer may be only where its call says so. A call that fails or is
   cancelled leaves its objects usable: the context stays at its prompt (after lvm_prompt at the new
   one), and what is missing of it in the cache is read again when it is needed. Images that it
   should have made are empty, also where an argument is refused, so that lvm_image_free is right in
   any case (of out[candidates][n], where both are at least 1, up to 64 x 2048); what lies in other
   outputs then means nothing.
   Weights that lead to NaN or infinity are such a failure too (LVM_FORMAT), which names them.

   Processes. After fork() the child may use a context on the CPU, in one thread, or free it; one
   that another thread was using then, it may only free. A context's own threads take no signals.

   Ownership. You own what you pass in; lvm_image.rgb that lvm filled is released by lvm_image_free,
   the bytes of a PNG that lvm_image_save_memory made by lvm_memory_free.

   Memory comes from calloc and goes to free, or to the two functions that LVM_CALLOC(count, size)
   and LVM_FREE(pointer) name where lvm.c is compiled. Threads of a context call LVM_FREE too.

   Versions. Option structs carry their own size: fill them with lvm_default_options() or
   lvm_default_sampling(), then change what you need. */

#if defined(__STDC__) || defined(__cplusplus)
#if !defined(LVM_API_ONLY) && !defined(__cplusplus)
#if defined(_STDIO_H) || defined(_STDLIB_H) || defined(_STRING_H) || defined(_UNISTD_H) ||        \
    defined(_STDIO_H_) || defined(_STDLIB_H_) || defined(_INC_STDIO) || defined(_INC_STDLIB)
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

#define LVM_VERSION "0.2.0"

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

/* Images become R x R by resizing both sides at once, as the published program does, or by
   resizing the short side and cutting the middle out of the long one. */
enum lvm_fit { LVM_SQUASH = 0, LVM_CROP = 1 };

typedef struct lvm_model lvm_model;
typedef struct lvm_ctx lvm_ctx;

typedef struct lvm_error {
    int code;       /* enum lvm_code */
    char text[240]; /* one line, no full stop, no newline */
} lvm_error;

typedef struct lvm_image {
    int width, height;
    uint8_t *rgb; /* [height][width][3], rows from the top */
    int orientation; /* EXIF's 1..8 as the file states it, 0 or 1: upright; lvm_image_load fills
                        it, only lvm_image_upright applies it */
} lvm_image;

/* What a model is. Fields of an absent part are 0. */
typedef struct lvm_info {
    int has_transformer, has_tokenizer;
    int context_length;   /* tokens that the transformer was made for */
    int vocab_size;       /* V: image tokens and special ids */
    int codes;            /* image tokens are 0 .. codes-1; ids from there on are never sampled */
    int bos, eos;         /* ids, or -1: bos stands in front of every sequence where it exists */
    int layers, width, feed_forward, heads, kv_heads;
    int resolution;       /* R: images are squashed to R x R */
    int tokens_per_image; /* S*S, 256 in the published models */
    int window_images;    /* images that fit the context, the predicted one included */
    int64_t parameters;
    const char *name;     /* general.name of the file, or "" */
    const char *isa;      /* the kernels in use: "scalar", "avx2", "avx512", "neon", "neon-dot" */
    const char *device;   /* a context's; of a model: what a context without a choice would take */
} lvm_info;

/* progress is called often, with the stage and done of all units of work; returning non-zero
   cancels: the call returns LVM_CANCELLED and the context stays usable. It may look at a flag that
   another thread sets. The stages of a call, each once, are "encode" and "decode" (operations of
   the tokenizer), "prefill", "generate" and "score" (tokens); inside them, as often as it happens,
   "slide" (tokens read again because the window slid, while "generate" stands still) and "layers"
   (of one step). While a stage lasts all stays and done never falls. */
typedef int lvm_progress(void *user, const char *stage, int64_t done, int64_t all);

typedef struct lvm_options {
    uint32_t size;
    int threads; /* 0: one a processor that this process may use */
    int kv_type; /* LVM_F32, LVM_F16, LVM_Q8_0 or LVM_AUTO: by the weights' type */
    int exact;   /* 1: f32 arithmetic from quantised weights too (integer dot products otherwise) */
    int window;  /* images of the context, the predicted one included; 0: info.window_images */
    int fit;     /* how an image becomes R x R: LVM_SQUASH or LVM_CROP */
    void *user;
    lvm_progress *progress;
    const char *device; /* "cpu"; NULL: what the environment's LVM_DEVICE names, else the best */
} lvm_options;

/* choose, if there is one, is called for each token when lvm has drawn it: for candidate after
   candidate, then for the next token; index counts from 0 in each call of lvm_generate. logits[V]
   are the scores that it was drawn by. choose may set *id to any image token (0 .. codes-1)
   instead; returning non-zero cancels. It may use other contexts, but not this one. */
typedef struct lvm_sampling {
    uint32_t size;
    float temperature; /* 1e-3 .. 100; 1 leaves the distribution as it is */
    float top_p; /* 0 < p <= 1: the likeliest ids that hold p of the probability; 1 keeps all */
    int top_k;         /* >= 0: the k likeliest ids; 0 keeps all */
    int greedy;        /* 1: the likeliest id; of equal ones the lowest; the rest is ignored */
    uint64_t seed;
    void *user;
    int (*choose)(void *user, int candidate, int index, const float *logits, int32_t *id);
    double *log_likelihood; /* NULL, or [candidates]: the sum of ln p, in nats, of each candidate's
                               tokens of the call, as lvm_score judges them: temperature 1, all V */
} lvm_sampling;

/* What a context holds, in bytes of memory. */
typedef struct lvm_usage {
    int64_t context; /* all that is the context's own, the cache included */
    int64_t cache;   /* keys and values of the sequence, by blocks of 256 tokens */
    int64_t weights; /* the model's file in memory or mapped; its contexts share it */
    int64_t device;  /* of all this on another device, and the weights' copy there; CPU: 0 */
    int tokens;      /* of the sequence, given and generated */
    int tokens_free; /* that may follow before the context is full; a window may slide sooner */
} lvm_usage;

/* flags of lvm_open */
enum { LVM_NO_MMAP = 1 }; /* read the file instead of mapping it: for files that others may cut */

const char *lvm_version(void);
lvm_options lvm_default_options(void);
lvm_sampling lvm_default_sampling(void); /* temperature 1, top_p 0.9, top_k 0, seed 1 */

/* What a published program samples with; greedy and seed stay. "lvm": temperature 1, top_p 1,
   top_k 50 (which the library that it generates with applies silently); "delvm": temperature 0.1,
   top_p 0.75. */
int lvm_sampling_preset(const char *name, lvm_sampling *sampling, lvm_error *error);

/* Opens a weights file (GGUF, see chapter 4), or one that lies in memory, which must outlive the
   model. Returns NULL and fills error on failure. lvm_close(NULL) is allowed; lvm_model_info(NULL)
   tells of a model without parts. */
lvm_model *lvm_open(const char *path, int flags, lvm_error *error);
lvm_model *lvm_open_memory(const void *data, size_t size, lvm_error *error);
void lvm_close(lvm_model *model);
lvm_info lvm_model_info(const lvm_model *model);

/* A context; options may be NULL. Returns NULL and fills error on failure. lvm_ctx_free(NULL) is
   allowed. */
lvm_ctx *lvm_ctx_new(const lvm_model *model, const lvm_options *options, lvm_error *error);
void lvm_ctx_free(lvm_ctx *ctx);
lvm_info lvm_ctx_info(const lvm_ctx *ctx); /* of its model, and its device */
lvm_usage lvm_ctx_usage(const lvm_ctx *ctx); /* of NULL: zeros */

/* The progress function (NULL: none) and its user data from the next call on, in place of those of
   the options. ctx may be NULL. */
void lvm_set_progress(lvm_ctx *ctx, lvm_progress *progress, void *user);

/* Images of any size -> ids[n][tokens_per_image]. Each is made R x R first (options.fit). A
   context remembers the last 32 images that it encoded and does not compute the same pixels
   twice. n may be 0, here and in lvm_decode. */
int lvm_encode(lvm_ctx *ctx, const lvm_image *images, int n, int32_t *ids, lvm_error *error);

/* ids[n][tokens_per_image], each 0 .. codes-1 -> n images of R x R, which lvm allocates. */
int lvm_decode(lvm_ctx *ctx, const int32_t *ids, int n, lvm_image *images, lvm_error *error);

/* Reads the sequence ids[n] exactly as given (put bos in front where the model has one). What the
   context already holds of its beginning is not computed again. logits: NULL, or V floats, the
   scores of the next token. 1 <= n <= context_length. */
int lvm_prompt(lvm_ctx *ctx, const int32_t *ids, int n, float *logits, lvm_error *error);

/* Encodes images and reads them as the prompt, behind bos where the model has one; count may be 0
   there. Of the images the last window - 1 count (options.window). */
int lvm_prompt_images(lvm_ctx *ctx, const lvm_image *images, int count, lvm_error *error);

/* Continues the prompt by n >= 1 tokens, in `candidates` (1 .. 64) independent ways that share its
   cache: ids[candidates][n]. sampling may be NULL. The window slides by whole images when the
   context is full, as the published program does. Candidate c draws from stream c of the seed, the
   i-th token since the prompt by its i-th number, so that several calls give what one would.
   Afterwards the context stands behind candidate 0. */
int lvm_generate(lvm_ctx *ctx, const lvm_sampling *sampling, int candidates, int n, int32_t *ids,
                 lvm_error *error);

/* The next n (1 .. 2048) images, `candidates` of each: lvm_generate and lvm_decode.
   out[candidates][n], which lvm allocates. */
int lvm_generate_images(lvm_ctx *ctx, const lvm_sampling *sampling, int candidates, int n,
                        lvm_image *out, lvm_error *error);

/* nll[i] = -ln p(ids[i] | prompt, ids[..i-1]) over the whole vocabulary, in nats. The context stays
   at the prompt, so that many continuations can be compared. */
int lvm_score(lvm_ctx *ctx, const int32_t *ids, int n, float *nll, lvm_error *error);

/* logits[n][V]: row i holds the scores of the token behind ids[i], where ids[n] follow the prompt;
   of those behind the prompt itself lvm_prompt tells. 1 <= n <= context_length - tokens of the
   prompt, at which the context stays. */
int lvm_logits(lvm_ctx *ctx, const int32_t *ids, int n, float *logits, lvm_error *error);

/* All at once: the next n images after images[count], `candidates` of each:
   out[candidates][n], which lvm allocates: lvm_prompt_images, then lvm_generate_images. */
int lvm_predict(lvm_ctx *ctx, const lvm_image *images, int count, const lvm_sampling *sampling,
                int candidates, int n, lvm_image *out, lvm_error *error);

/* Keeps what a context has computed in a file, for prompts that begin alike. save: the first n
   tokens of the sequence, 1 <= n <= tokens read, and the remembered images. load: fills a context
   whose weights, kernels and options (kv_type, exact) are the same; else, or when the file is
   damaged, an error, and the context is empty. Afterwards lvm_prompt and lvm_encode find what they
   need. */
int lvm_cache_save(lvm_ctx *ctx, const char *path, int n, lvm_error *error);
int lvm_cache_load(lvm_ctx *ctx, const char *path, lvm_error *error);

/* Images. load: PNG, JPEG or PNM files or their bytes in memory (name is for messages and may be
   NULL). upright: turns and mirrors the pixels as the orientation says (a camera held sideways) and
   sets it to 1; what the published checkpoints saw was never turned. save: PNG, written beside and
   renamed; save_memory: the same bytes in *png, which lvm allocates (on failure NULL, and *size 0).
   resize: the same bytes as Pillow's Image.resize with BICUBIC, up to its release 12.1 (chapter
   11); the result has orientation 0. An image has at most 2^28 pixels. */
int lvm_image_load(const char *path, lvm_image *image, lvm_error *error);
int lvm_image_load_memory(const void *data, size_t size, const char *name, lvm_image *image,
                          lvm_error *error);
int lvm_image_upright(lvm_image *image, lvm_error *error);
int lvm_image_save(const char *path, const lvm_image *image, lvm_error *error);
int lvm_image_save_memory(const lvm_image *image, uint8_t **png, size_t *size, lvm_error *error);
void lvm_memory_free(void *memory); /* NULL is allowed */
int lvm_image_resize(const lvm_image *in, int width, int height, lvm_image *out, lvm_error *error);
void lvm_image_free(lvm_image *image);

/* Rewrites a weights file with other types: type for the transformer's matrices, vq_type for the
   tokenizer's convolutions (LVM_AUTO keeps), encoder_type for those of its encoder (LVM_AUTO: F16
   where vq_type is a quantised one, else vq_type). Norms and biases stay F32; rows that are no
   multiple of 32 become F16 instead of a quantised type. Existing files are replaced only when
   force is 1. */
int lvm_quantize(const char *in, const char *out, int type, int vq_type, int encoder_type,
                 int force, lvm_error *error);

/* ---- Training (chapter 8) ---- */

/* Sentences of image tokens to learn from: a .tok file, as `lvm pack` writes it (chapter 8 has its
   layout), mapped until it is closed; or one that lies in memory, which must outlive it (name is
   for messages and may be NULL). Returns NULL and fills error on failure; close(NULL) is allowed.
   Trainers share them; they must outlive their trainers. */
typedef struct lvm_tokens lvm_tokens;
lvm_tokens *lvm_tokens_open(const char *path, lvm_error *error);
lvm_tokens *lvm_tokens_open_memory(const void *data, size_t size, const char *name,
                                   lvm_error *error);
void lvm_tokens_close(lvm_tokens *tokens);

/* How sentences become rows of `context` tokens: bos, tokens, eos one behind the other and cut
   wherever a row is full, as the paper does; or whole sentences, as many as fit, then padding that
   is not learnt. */
enum lvm_packing { LVM_CUT = 0, LVM_WHOLE = 1 };
/* The learning rate behind the warm-up: half a cosine down to min_lr; or constant, and linearly
   down to min_lr over the last tenth of the steps (warm-up, stable, decay). */
enum lvm_schedule { LVM_COSINE = 0, LVM_WSD = 1 };
/* Of what the backward needs of a layer: keep it all, or only the layer's input and compute the
   rest again; auto keeps it for as many layers as fit the memory. */
enum lvm_recompute { LVM_RECOMPUTE_AUTO = 0, LVM_RECOMPUTE_NONE = 1, LVM_RECOMPUTE_ALL = 2 };

typedef struct lvm_train_options {
    uint32_t size;
    int threads; /* 0: one a processor that this process may use */

    /* The model: init's transformer, which must outlive the trainer, or (NULL) these sizes with
       random weights. kv_heads 0: heads. bos, eos: ids or -1. tied: one matrix is embedding and
       output. */
    const lvm_model *init;
    int layers, width, heads, kv_heads, feed_forward, vocab, bos, eos, tied;
    float norm_eps, rope_theta;
    /* Adapters of this rank instead of the weights themselves (LoRA: Hu et al. 2021), on those of
       "q,k,v,o,gate,up,down" that lora_on names (NULL: all). 0: no adapters. */
    int lora_rank;
    float lora_alpha;
    const char *lora_on;
    const char *freeze; /* names of tensors that do not learn, with commas; * stands for any text */

    /* What it reads: n_data files, all their sentences in an order drawn anew each time round. A
       step is `batch` rows of `context` tokens. isolate: attention never crosses sentences. */
    const lvm_tokens *const *data;
    int n_data, context, batch, packing, isolate;

    /* AdamW (Loshchilov and Hutter 2019). clip: of the gradient's norm; 0: none. */
    int64_t steps, warmup; /* of all, and of those over which lr rises from 0 */
    int schedule;
    float lr, min_lr, beta1, beta2, epsilon, weight_decay, clip;
    uint64_t seed;

    int recompute;
    int64_t memory; /* bytes that it may take; 0: what the machine has free */
    void *user;
    lvm_progress *progress; /* stages "train" and "eval" (tokens of a call) */
} lvm_train_options;

/* After a step. A step whose loss or gradient is not finite, or whose gradient is more than 20
   times what was usual, changes nothing and counts as skipped. */
typedef struct lvm_train_report {
    int64_t step, tokens;      /* taken, and read, since the beginning */
    int64_t skipped, in_a_row; /* steps so far; and those right before and with this one */
    double loss;               /* mean of -ln p over the batch's tokens, by their weights, in nats */
    double grad_norm;          /* before clipping */
    double lr;
    double epoch;              /* passes over the data */
    int was_skipped;
} lvm_train_report;

/* What a trainer holds or would hold, in bytes. */
typedef struct lvm_train_memory {
    int64_t weights, gradients, optimiser, activations, scratch, all;
    int64_t parameters, trained; /* numbers: all, and those that learn */
    int kept_layers;             /* of which nothing is computed twice */
} lvm_train_memory;

typedef struct lvm_trainer lvm_trainer;

lvm_train_options lvm_default_train_options(void);

/* A trainer; NULL and an error on failure. memory tells what it would hold, before anything is
   taken. Training starts at step 0, or where load finds a checkpoint of the same configuration and
   the same data: what it continues is what it would have been, bit for bit, with any number of
   threads. A call that fails or is cancelled leaves the trainer as it was before. */
int lvm_trainer_memory(const lvm_train_options *options, lvm_train_memory *memory,
                       lvm_error *error);
lvm_trainer *lvm_trainer_new(const lvm_train_options *options, lvm_error *error);
void lvm_trainer_free(lvm_trainer *trainer);
int lvm_trainer_step(lvm_trainer *trainer, lvm_train_report *report, lvm_error *error);

/* Mean of -ln p over at most max_rows rows of other data, packed as the trainer's own (0: all of
   it), by the tokens' weights, and how many tokens that were. */
int lvm_trainer_eval(lvm_trainer *trainer, const lvm_tokens *data, int64_t max_rows, double *loss,
                     int64_t *tokens, lvm_error *error);

/* save: a checkpoint, written beside, flushed and renamed; note is the caller's text, which
   lvm_checkpoint_note gives back (lvm_memory_free). export: a weights file in `type` (LVM_F32 ...;
   LVM_AUTO: init's, else F16) with the tokenizer of a model, or NULL: init's; of adapters, an
   adapter file. Existing files are replaced. */
int lvm_trainer_save(lvm_trainer *trainer, const char *path, const char *note, lvm_error *error);
int lvm_trainer_load(lvm_trainer *trainer, const char *path, lvm_error *error);
char *lvm_checkpoint_note(const char *path, lvm_error *error);
int lvm_trainer_export(lvm_trainer *trainer, const char *path, int type,
                       const lvm_model *tokenizer, lvm_error *error);

/* Adds adapters to a model that no context uses yet: matrices that they are on are merged with them
   in memory, quantised ones as Q8_0. merge writes that into a file instead (type as above). */
int lvm_apply_lora(lvm_model *model, const char *path, lvm_error *error);
int lvm_merge(const char *base, const char *adapters, const char *out, int type, int force,
              lvm_error *error);

#ifdef __cplusplus
}
#endif
#endif /* LVM_H */

#ifndef LVM_API_ONLY

/* A device's own file takes of what follows only the parts that LVM_INTERNAL leaves in: errors and
   progress (chapter 1), types and tensors (2), the model in memory (4), batches (6), the seam (7),
   text that is shown (10). They are C11 and C++17. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lvm.c: weights files are little-endian and are used where they lie; this machine is not"
#endif
#if SIZE_MAX < UINT64_MAX
#error "lvm.c: weights are mapped whole and outgrow 32-bit addresses; compile for a 64-bit machine"
#endif
#if defined(_WIN32) && !defined(__MINGW32__) && !defined(LVM_INTERNAL)
#error "lvm.c: on Windows compile it with mingw-w64, by gcc or clang (C11 atomics, POSIX threads)"
#endif

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#ifndef LVM_INTERNAL
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOGDI
#include <windows.h>
#include <shellapi.h>
#include <direct.h>
#include <io.h>
#include <psapi.h>
#undef near
#undef far
#else
#include <dirent.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#endif
#endif /* LVM_INTERNAL */

/* =================================================================================================
   Chapter 1.  Errors, memory, threads; what the system gives

   An error is a code and a sentence. Memory is asked for by count and size, so that the product is
   checked in one place. Bytes of a file are read through one cursor that knows where they end.
   Threads, files and what differs between systems stand in chapter 10. A pool of threads runs
   numbered tasks:

       pool_run(pool, count, fn, arg)   -->   fn(arg, task, thread) for each task 0 .. count-1

   Nearly all parallel work is such a loop; what a task computes never depends on who runs it. */

#ifdef __MINGW32__ /* where "printf" means Microsoft's formats */
#define LVM_PRINTF(a, b) __attribute__((format(__MINGW_PRINTF_FORMAT, a, b)))
#elif defined(__GNUC__)
#define LVM_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define LVM_PRINTF(a, b)
#endif

/* text as a message shows it, in out[room] (chapter 10): what would move a terminal's cursor and
   what is no UTF-8 is escaped; of one that is too long the middle is left out, for messages begin
   with a name and end with the reason. */
static inline void show_text(const char *text, char *out, size_t room);

/* Fills error (which may be NULL) and returns code, so that `return fail(...)` reads well. */
LVM_PRINTF(3, 4)
static inline int fail(lvm_error *error, int code, const char *format, ...) {
    if (error != NULL) {
        char text[1 << 13]; /* a path has 4096 bytes at most */
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        show_text(text, error->text, sizeof error->text);
        error->code = code;
    }
    return code;
}

/* Tells the caller's progress function how far a stage is; it may cancel. */
static inline int report(const lvm_options *o, const char *stage, int64_t done, int64_t all,
                         lvm_error *error) {
    if (o->progress == NULL || o->progress(o->user, stage, done, all) == 0) return LVM_OK;
    return fail(error, LVM_CANCELLED, "cancelled while at work on: %s", stage);
}

/* Refuses numbers that are no numbers: "the logits behind token 5 are not finite". */
static inline int check_finite(const float *x, int64_t n, const char *what, int64_t number,
                               lvm_error *error) {
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return fail(error, LVM_FORMAT, "%s %lld are not finite", what, (long long)number);
    return LVM_OK;
}

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

#ifndef LVM_INTERNAL

#if defined(LVM_CALLOC) != defined(LVM_FREE)
#error "lvm.c: define both LVM_CALLOC and LVM_FREE, or neither"
#endif
#ifndef LVM_CALLOC
#define LVM_CALLOC calloc
#define LVM_FREE free
#endif

const char *lvm_version(void) { return LVM_VERSION; }

/* What every public call begins with. */
static void clear_error(lvm_error *error) {
    if (error != NULL) *error = (lvm_error){.code = LVM_OK};
}

/* What a public call says of a pointer that it needs. */
static int null_argument(lvm_error *error, const char *call, const char *name) {
    return fail(error, LVM_INVALID, "%s: %s is NULL", call, name);
}

/* ---- Memory ---- */

/* *out = a * b; 0 when the product does not fit. */
static int mul_fits(size_t a, size_t b, size_t *out) {
    if (b != 0 && a > SIZE_MAX / b) return 0;
    *out = a * b;
    return 1;
}

/* What the system gives (chapter 10): a hint that memory of some megabytes is read faster in huge
   pages; a whole file to be read only, mapped until unmap_file, or in memory of its own until
   mem_free. */
static void os_huge_pages(void *p, size_t size);
static int map_file(const char *path, void **data, size_t *size, lvm_error *error);
static void unmap_file(void *data, size_t size);
static int read_file(const char *path, uint8_t **data, size_t *size, lvm_error *error);

/* A file being written, under another name beside its own, which it gets when it is closed with
   code LVM_OK and everything is on the disk; else it is removed (chapter 10). */
struct outfile {
    char *path;          /* as messages name it */
    char *target, *temp; /* where it will be and is; NULL: a device or a pipe, written directly */
    FILE *file;
};
static int outfile_open(struct outfile *out, const char *path, lvm_error *error);
static int outfile_write(struct outfile *out, const void *data, size_t size, lvm_error *error);
static int outfile_close(struct outfile *out, int code, lvm_error *error);

/* Zeroed memory for count elements of size bytes, aligned to 64; NULL and an error when there is
   none or the product overflows. Released by mem_free. The pointer that calloc gave stands right in
   front. */
static void *mem_alloc(size_t count, size_t size, lvm_error *error) {
    size_t bytes = 0;
    if (!mul_fits(count, size, &bytes) || bytes > SIZE_MAX - 128) {
        fail(error, LVM_MEMORY, "out of memory: %zu x %zu bytes", count, size);
        return NULL;
    }
    char *raw = LVM_CALLOC(1, bytes + 128);
    if (raw == NULL) {
        fail(error, LVM_MEMORY, "out of memory: %zu bytes", bytes);
        return NULL;
    }
    char *p = raw + sizeof(void *);
    p += (64 - (uintptr_t)p % 64) % 64;
    memcpy(p - sizeof(void *), &raw, sizeof raw);
    os_huge_pages(p, bytes);
    return p;
}

static void mem_free(void *p) {
    if (p == NULL) return;
    char *raw;
    memcpy(&raw, (char *)p - sizeof(void *), sizeof raw);
    LVM_FREE(raw);
}

static char *copy_string(const char *s, lvm_error *error) {
    size_t n = strlen(s) + 1;
    char *copy = mem_alloc(n, 1, error);
    if (copy != NULL) memcpy(copy, s, n);
    return copy;
}

/* An array that grows: room for n + more elements of size bytes, of which the first n are kept.
   Returns where it lies from now on; NULL and an error when there is no memory, and then as it
   was. */
static void *array_grow(void *array, size_t n, size_t more, size_t size, size_t *room,
                        lvm_error *error) {
    if (*room - n >= more) return array;
    size_t wanted = *room * 2 + more + 16;
    void *larger = mem_alloc(wanted, size, error);
    if (larger == NULL) return NULL;
    if (n > 0) memcpy(larger, array, n * size);
    mem_free(array);
    *room = wanted;
    return larger;
}

/* Bytes that grow; a zero stands behind them. */
struct buffer {
    char *data;
    size_t n, room;
};

static int buffer_add(struct buffer *b, const void *data, size_t n, lvm_error *error) {
    char *larger = array_grow(b->data, b->n, n + 1, 1, &b->room, error);
    if (larger == NULL) return LVM_MEMORY;
    b->data = larger;
    if (n > 0) memcpy(b->data + b->n, data, n);
    b->n += n;
    b->data[b->n] = 0;
    return LVM_OK;
}

/* ---- The cursor: bytes that somebody else wrote ---- */

struct cursor {
    const uint8_t *data;
    size_t size, at;
    int failed; /* set by the first read beyond the end; reads after that give zeros */
};

/* The next n bytes, or NULL where there are not so many. */
static const uint8_t *cursor_take(struct cursor *c, uint64_t n) {
    if (c->failed || n > c->size - c->at) {
        c->failed = 1;
        return NULL;
    }
    c->at += (size_t)n;
    return c->data + c->at - n;
}

/* A little-endian number of 1 to 8 bytes. */
static uint64_t cursor_number(struct cursor *c, int bytes) {
    uint64_t v = 0;
    const uint8_t *p = cursor_take(c, (uint64_t)bytes);
    for (int i = 0; p != NULL && i < bytes; i++) v |= (uint64_t)p[i] << 8 * i;
    return v;
}

/* ---- Threads ---- */

typedef void task_fn(void *arg, int task, int thread);

/* n threads, the caller being one: a context's (chapter 10). pool_run runs fn(arg, task, thread)
   for every task 0 .. count-1, each once, thread being 0 .. n-1 and nobody else's meanwhile, and
   returns when all are done. In a forked child the caller is alone. */
struct pool;
static struct pool *pool_new(int n, lvm_error *error);
static void pool_free(struct pool *p);
static int pool_threads(const struct pool *p);
static void pool_run(struct pool *p, int count, task_fn *fn, void *arg);

#endif /* LVM_INTERNAL */

/* =================================================================================================
   Chapter 2.  Numbers

   Weights come as 32-bit floats, two kinds of 16-bit floats, and blocks of 32 small integers that
   share a scale. The layouts and the rounding are ggml's, byte for byte, so that standard tools can
   read the files. The last part holds exp, log, sine and cosine: the C library's differ between
   systems in their last bits, and sampled images must not.

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

static inline float bits_to_f32(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
static inline uint32_t f32_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* Exact. Normal numbers: move the exponent by 127 - 15; subnormals are mantissa * 2^-24. */
static inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_f32(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400) return bits_to_f32(sign | ((magnitude << 13) + (112u << 23)));
    float f = (float)magnitude * 0x1p-24f;
    return sign ? -f : f;
}

/* Round to nearest, ties to even; beyond 65504 infinity; NaN stays NaN. */
static inline uint16_t f32_to_f16(float f) {
    uint32_t u = f32_to_bits(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
    if (u < 0x38800000)                                     /* subnormal: let the adder round */
        return (uint16_t)(sign | (f32_to_bits(bits_to_f32(u) + 0.5f) - 0x3f000000));
    u += 0xfff + (u >> 13 & 1);
    return (uint16_t)(sign | (u - (112u << 23)) >> 13);
}

static inline float bf16_to_f32(uint16_t h) { return bits_to_f32((uint32_t)h << 16); }

static inline uint16_t f32_to_bf16(float f) {
    uint32_t u = f32_to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* ---- Types: bytes, names; a tensor ---- */

static const struct type_entry {
    int type, block, bytes; /* a block of `block` elements takes `bytes` bytes */
    const char *name;
} type_table[] = {{LVM_F32, 1, 4, "f32"},
                  {LVM_F16, 1, 2, "f16"},
                  {LVM_BF16, 1, 2, "bf16"},
                  {LVM_Q8_0, QK, 34, "q8_0"},
                  {LVM_Q4_0, QK, 18, "q4_0"}};
enum { N_TYPES = sizeof type_table / sizeof *type_table };

static inline const struct type_entry *type_info(int type) {
    for (int i = 0; i < N_TYPES; i++)
        if (type_table[i].type == type) return &type_table[i];
    return NULL;
}

static inline int type_is_quantised(int type) { return type == LVM_Q8_0 || type == LVM_Q4_0; }

/* Bytes of k elements, k a multiple of the type's block. */
static inline int64_t type_bytes(int type, int64_t k) {
    const struct type_entry *t = type_info(type);
    return k / t->block * t->bytes;
}

/* A tensor where it lies in a file or in memory: rows x cols, each row contiguous in its type. */
struct tensor {
    const uint8_t *data; /* NULL: absent */
    int64_t row_bytes;
    int type, rows, cols;
};

static inline const uint8_t *tensor_row(const struct tensor *w, int64_t row) {
    return w->data + row * w->row_bytes;
}

/* A vector's values (its type is F32), or NULL. */
static inline const float *floats(const struct tensor *v) {
    return (const float *)(const void *)v->data;
}

#ifndef LVM_INTERNAL

_Static_assert(sizeof(struct q8_0) == 34 && sizeof(struct q4_0) == 18, "ggml's block layouts");

/* ---- Conversion of rows ---- */

/* 1 / d, or 0 where d is 0 or too small for it (its f16 is 0 then). */
static float inverse(float d) {
    float id = 1 / (d != 0 ? d : 1);
    return d != 0 && fabsf(id) < HUGE_VALF ? id : 0;
}

/* |x| or amax; once one was NaN, NaN: so it is not lost in a block's scale. */
static float larger_magnitude(float x, float amax) {
    return fabsf(x) > amax || isnan(x) ? fabsf(x) : amax;
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
        for (int i = 0; i < QK; i++) amax = larger_magnitude(x[i], amax);
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

/* ---- a * b + c, exp, log, sine, cosine ----

   a * b + c is rounded once, as a processor's own instruction does it; not every C library's fmaf
   is (mingw-w64's rounds the product too). A double holds the product exactly. Their sum it rounds,
   and a second rounding could then err at a tie: so the sum's last bit is made odd whenever
   something was lost (Boldo and Melquiond 2008, "Emulation of FMA"), which keeps it off the ties.

   exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2, where what a short Taylor
   polynomial leaves out is less than the format's last bit. ln 2 is split in two, so that x - n ln
   2 does not cancel. */

static float fma_f32(float a, float b, float c) {
    double p = (double)a * b, s = p + c, part = s - p, lost = (p - (s - part)) + (c - part);
    uint64_t u;
    memcpy(&u, &s, sizeof u);
    if ((lost > 0 || lost < 0) && (u & 1) == 0) u += (lost > 0) == (s > 0) ? 1 : UINT64_MAX;
    memcpy(&s, &u, sizeof s);
    return (float)s;
}

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

/* x = 2^e m with m near 1; ln m = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 ...), s = (m - 1) / (m +
   1). */
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
   Chapter 3.  Kernels in plain C, the tables they are called through, matmul and attention

   Nearly all time goes into sums of products. Each kernel is defined here or in chapter 12 in plain
   C, which is what LVM_ISA=scalar runs, and again, faster, in chapter 13 for every instruction set.
   A model holds the table that fits the machine (struct kernels); blocking, edges and threads are
   written once, around the tables.

   matmul       dot_row, dot_tile      c[r][j] = sum_k a[r][k] b[j][k]: both contiguous along k
                int_row, int_tile      the same from quantised weights and activations of 8 bits:
                                       c[r][j] = sum over blocks of (sum_k qa[k] qb[k]) da db
                outer_row, outer_tile  c[r][0..15] (+)= sum_k a[r][k] b[k][0..15]: b is a packed
                                       panel, 16 columns of a matrix side by side, k after k
                quantize_act           activations to 8 bits;  int_pack: weights to panels
   conv         pack_panel             16 rows of a matrix, transposed, become a panel
                winograd_filter, winograd_input, winograd_output     (chapter 12)
                scale_shift            what is left of GroupNorm: x scale + shift, then SiLU
                channel_sums           sums and sums of squares of each channel
   attention    softmax                exp(scale s - max) and the sum, of one row
                quantize_query, k8_scores, v8_sums, to_q8_0: on a quantised cache (chapter 12)
   elementwise  rmsnorm, silu_mul, to_f32

   The order of the sums, which every version of a kernel keeps for its instruction set:

       dot    element k belongs to partial sum k mod W (W = 8 floats; 16 with AVX-512); then halves
              are added: sum i += sum i + W/2, ... until one is left. No splitting of k elsewhere.
              NEON takes two vectors for its 8, and so gives the same bits as AVX2.
       int    inside a block of 32 the sum is an exact int32, so that order does not matter; the
              blocks follow in ascending order, c = fma((float)sum, db * da, c).
       outer  ascending k, one product added at a time.

   So a row's result does not depend on how many rows came with it: GEMV equals GEMM bit for bit. */

enum {
    PANEL = 16,      /* columns of a packed panel */
    KV_BLOCK = 256,  /* keys of an attention block, and of a page of the KV cache */
    MAX_TILE = 16,   /* no tile has more rows or columns */
    MAX_PANELS = 2,  /* nor more panels */
    GEMV_ROWS = 4,   /* rows for which weights, keys and values are loaded once */
    KV8_PANEL = PANEL * (2 + QK) /* bytes of 32 dimensions of 16 keys or values, quantised */
};

/* 32 activations, quantised on the fly: x = d q, |q| <= 127. Machines that multiply unsigned by
   signed bytes take weights w as w + 128, a zero point of 128, and so begin a sum at -128 sum q. */
struct act_block {
    float d;
    int32_t zero_point; /* -128 sum q; plain C and NEON leave it alone */
    int8_t q[QK];
};

/* 32 dimensions of a query against quantised keys: q = d x, where x has 16 bits. AVX-512 keeps
   x = 256 hi + lo as signed bytes, of each four hi and then lo; the others keep x. */
struct query_block {
    float d;
    int32_t zero_point; /* -128 sum x */
    union {
        int16_t s16[QK];
        int8_t s8[QK / 4][2][4];
    } x;
};

/* What each computes and asks of its arguments stands at its plain version. ld*: floats between two
   rows or panels; a tile's rows are pointers, so that an edge can repeat its last row. */
struct kernels {
    const char *name;
    struct {
        int dot_rows, dot_cols, int_rows, int_panels, outer_rows, outer_panels; /* of the tiles */
        int pack_bytes; /* of a packed block of PANEL rows of weights */
        void (*dot_row)(int k, const float *a, const float *b, int64_t ldb, int n, float *c);
        void (*dot_tile)(int k, const float *const *a, const float *const *b, float *c, int ldc);
        void (*quantize_act)(const float *x, struct act_block *y, int k);
        void (*int_row)(int type, int blocks, const struct act_block *x, int rows, const uint8_t *w,
                        int64_t row_bytes, int n, float *c, int64_t ldc);
        void (*int_pack)(int type, int blocks, const uint8_t *const *w, uint8_t *packed);
        void (*int_tile)(int blocks, const struct act_block *const *x, const uint8_t *packed,
                         int panels, float *c, int ldc);
        void (*outer_row)(int k, const float *a, const float *b, int64_t ldp, int panels, float *c,
                          int accumulate);
        void (*outer_tile)(int k, const float *const *a, const float *b, int64_t ldp, int panels,
                           float *c, int ldc, int accumulate);
    } matmul;
    struct {
        int tiled; /* 0: convolutions that Winograd does not serve go by their definition */
        void (*pack_panel)(const float *rows, int64_t ld, int k, float *panel);
        void (*winograd_filter)(const float *w, int n, int64_t tap, float *u);
        void (*winograd_input)(const float *patch, int64_t line, int c, float *v, int64_t tap);
        void (*winograd_output)(const float *m, int64_t tap, const float *bias,
                                const float *const *residual, float *const *out);
        void (*scale_shift)(const float *x, const float *scale, const float *shift, int silu,
                            int64_t pixels, int c, float *y);
        void (*channel_sums)(const float *x, int64_t pixels, int c, float *sum, float *square);
    } conv;
    struct {
        float (*softmax)(float *s, int n, int valid, float scale, float *max);
        void (*quantize_query)(const float *q, struct query_block *x, int k);
        void (*k8_scores)(const uint8_t *keys, int groups, int panels, const struct query_block *q,
                          int rows, float *s, int lds);
        void (*v8_sums)(const uint8_t *values, int groups, int panels, const float *const *p,
                        int rows, const uint8_t *next, float *o, int ldo);
        void (*to_q8_0)(const float *x, void *out, int64_t k);
    } attention;
    struct {
        void (*rmsnorm)(const float *x, const float *weight, float eps, int n, float *y);
        void (*silu_mul)(float *gate, const float *up, int64_t n);
        void (*to_f32)(int type, const void *in, float *y, int64_t k);
    } elementwise;
};

/* The best table for this machine, or the one that LVM_ISA names; chapter 13. */
static const struct kernels *choose_kernels(lvm_error *error);

/* ---- Dot products ---- */

enum { PLAIN_ROWS = 2, PLAIN_COLS = 2, PLAIN_OUTER = 4, PLAIN_PANELS = 2 };

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

/* c[j] = a . b[j]: one row a[k] against n rows b[n][k], ldb apart. Any k and n. */
static void dot_row_plain(int k, const float *a, const float *b, int64_t ldb, int n, float *c) {
    for (int j = 0; j < n; j++) c[j] = dot_plain(k, a, b + j * ldb);
}

/* c[r][j] = a[r] . b[j] for dot_rows x dot_cols rows, which may repeat. */
static void dot_tile_plain(int k, const float *const *a, const float *const *b, float *c, int ldc) {
    for (int r = 0; r < PLAIN_ROWS; r++)
        for (int j = 0; j < PLAIN_COLS; j++) c[r * ldc + j] = dot_plain(k, a[r], b[j]);
}

/* ---- Dot products of integers ---- */

/* Blocks of activations without a larger magnitude count as zeros: 127 / x must stay finite. */
#define MIN_AMAX 1e-36f

/* d = largest magnitude / 127, q = x / d to the nearest integer, ties to even. k is a multiple of
   QK; what a NaN becomes is some number, and d NaN. */
static void quantize_act_plain(const float *x, struct act_block *y, int k) {
    for (int b = 0; b < k / QK; b++, x += QK) {
        float amax = 0;
        for (int i = 0; i < QK; i++) amax = larger_magnitude(x[i], amax);
        float id = amax <= MIN_AMAX ? 0 : 127 / amax;
        y[b].d = amax <= MIN_AMAX ? 0 : amax / 127;
        for (int i = 0; i < QK; i++) y[b].q[i] = (int8_t)rintf(x[i] * id);
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

/* c[r][j]: rows x[rows][blocks] of activations against n rows of weights, row_bytes apart, of type
   Q8_0 or Q4_0. Any number of rows; memory may be read ahead, but nothing is written beyond c. */
static void int_row_plain(int type, int blocks, const struct act_block *x, int rows,
                          const uint8_t *w, int64_t row_bytes, int n, float *c, int64_t ldc) {
    for (int r = 0; r < rows; r++, x += blocks)
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int b = 0; b < blocks; b++) {
                int8_t q[QK];
                float d = unpack_block(type, w + j * row_bytes, b, q);
                int32_t products = 0;
                for (int i = 0; i < QK; i++) products += q[i] * x[b].q[i];
                sum = fma_f32((float)products, d * x[b].d, sum);
            }
            c[r * ldc + j] = sum;
        }
}

/* ---- Outer products ---- */

/* c[0 .. 16 panels) = sum over i < k of a[i] b[i], on top of what c holds with accumulate. b:
   panels of b[k][PANEL], ldp floats apart. */
static void outer_row_plain(int k, const float *a, const float *b, int64_t ldp, int panels,
                            float *c, int accumulate) {
    for (int s = 0; s < panels; s++, b += ldp, c += PANEL) {
        float sum[PANEL] = {0};
        if (accumulate) memcpy(sum, c, sizeof sum);
        for (int i = 0; i < k; i++)
            for (int j = 0; j < PANEL; j++) sum[j] += a[i] * b[i * PANEL + j];
        memcpy(c, sum, sizeof sum);
    }
}

/* The same for outer_rows rows and 1 .. outer_panels panels. */
static void outer_tile_plain(int k, const float *const *a, const float *b, int64_t ldp, int panels,
                             float *c, int ldc, int accumulate) {
    for (int r = 0; r < PLAIN_OUTER; r++)
        outer_row_plain(k, a[r], b, ldp, panels, c + r * ldc, accumulate);
}

/* ---- Row by row ---- */

/* y = weight * x / sqrt(mean(x^2) + eps)      (Zhang and Sennrich 2019); y may be x */
static void rmsnorm_plain(const float *x, const float *weight, float eps, int n, float *y) {
    float scale = 1 / sqrtf(dot_plain(n, x, x) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* s[i] = exp(scale s[i] - *max) for i < valid, *max being the largest scale s[i]; 0 for the rest up
   to n, whatever stood there. Returns the sum, in the order of dot with W = 8 everywhere. valid >=
   1, scale > 0; n is a multiple of PANEL. */
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

/* silu(x) = x sigmoid(x)      (Ramachandran, Zoph and Le 2017, as "swish") */
static float silu(float x) { return x / (1 + exp_f32(-x)); }

/* gate = silu(gate) * up      (SwiGLU: Shazeer 2020) */
static void silu_mul_plain(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) gate[i] = silu(gate[i]) * up[i];
}

/* y[p][i] = f(x[p][i] * scale[i] + shift[i]), f = SiLU or nothing; c is a multiple of 32. */
static void scale_shift_plain(const float *x, const float *scale, const float *shift, int use_silu,
                              int64_t pixels, int c, float *y) {
    for (int64_t p = 0; p < pixels; p++, x += c, y += c)
        for (int i = 0; i < c; i++) {
            float v = x[i] * scale[i] + shift[i];
            y[i] = use_silu ? silu(v) : v;
        }
}

/* Of each channel over a few pixels; c is a multiple of 32. */
static void channel_sums_plain(const float *x, int64_t pixels, int c, float *sum, float *square) {
    memset(sum, 0, (size_t)c * sizeof *sum);
    memset(square, 0, (size_t)c * sizeof *square);
    for (int64_t p = 0; p < pixels; p++, x += c)
        for (int i = 0; i < c; i++) sum[i] += x[i], square[i] += x[i] * x[i];
}

/* ---- Matmul ----

   struct exec carries what computing needs: the kernels, the threads, and scratch memory that was
   sized when the context was made, so that nothing is allocated while work is done. */

struct exec {
    const struct kernels *kern;
    struct pool *pool;
    const lvm_options *o;
    int exact;              /* f32 arithmetic from quantised weights too */
    float *scratch;         /* [threads][scratch_floats] */
    int64_t scratch_floats;
    struct act_block *act;  /* activations of 8 bits, rows of as many blocks as x has; or NULL */
};

static float *exec_scratch(const struct exec *e, int thread) {
    return e->scratch + thread * e->scratch_floats;
}

/* What is wanted of activations x[rows][w->cols]: y[rows][w->rows] = x w^T + bias; bias may be
   NULL. */
struct matmul_output {
    const struct tensor *w;
    const float *bias;
    float *y;
};

struct matmul_job {
    const struct exec *e;
    const struct tensor *w;
    const float *bias, *x;
    float *y;
    int rows, tasks, size;  /* rows of x; tasks of `size` outputs */
    task_fn *run;
};

/* Rows of weights that a task takes: enough to reuse activations, few enough that their floats stay
   in the L2 cache. A multiple of every tile's columns (2, 3 and 4). */
static int weight_rows(int cols) { return cols <= 4096 ? 24 : 12; }

/* Copies the valid part of a tile to y and adds the bias. */
static void store_tile(const struct matmul_job *job, const float *tile, int ld, int r0, int rows,
                       int j0, int cols) {
    for (int r = 0; r < rows; r++) {
        float *y = job->y + (int64_t)(r0 + r) * job->w->rows + j0;
        memcpy(y, tile + r * ld, (size_t)cols * sizeof *y);
        for (int j = 0; job->bias != NULL && j < cols; j++) y[j] += job->bias[j0 + j];
    }
}

/* A few rows of weights, as floats, against all rows of x. */
static void matmul_f32_task(void *arg, int task, int thread) {
    const struct matmul_job *job = arg;
    const struct tensor *w = job->w;
    const struct kernels *kern = job->e->kern;
    int tile_rows = kern->matmul.dot_rows, tile_cols = kern->matmul.dot_cols;
    int j0 = task * job->size, cols = w->rows - j0 < job->size ? w->rows - j0 : job->size;
    const float *b = (const float *)(const void *)tensor_row(w, j0);
    float tile[MAX_TILE * MAX_TILE], *scratch = exec_scratch(job->e, thread);
    for (int j = 0; w->type != LVM_F32 && j < cols; j++, b = scratch)
        kern->elementwise.to_f32(w->type, tensor_row(w, j0 + j), scratch + (int64_t)j * w->cols,
                                 w->cols);
    for (int r0 = 0; r0 < job->rows; r0 += tile_rows) {
        int rows = job->rows - r0 < tile_rows ? job->rows - r0 : tile_rows;
        const float *pa[MAX_TILE], *pb[MAX_TILE];
        for (int r = 0; r < tile_rows; r++)
            pa[r] = job->x + (int64_t)(r0 + (r < rows ? r : rows - 1)) * w->cols;
        if (rows == 1) kern->matmul.dot_row(w->cols, pa[0], b, w->cols, cols, tile);
        if (rows == 1) store_tile(job, tile, 0, r0, 1, j0, cols);
        for (int j = 0; rows > 1 && j < cols; j += tile_cols) {
            int n = cols - j < tile_cols ? cols - j : tile_cols;
            for (int i = 0; i < tile_cols; i++)
                pb[i] = b + (int64_t)(j + (i < n ? i : n - 1)) * w->cols;
            kern->matmul.dot_tile(w->cols, pa, pb, tile, tile_cols);
            store_tile(job, tile, tile_cols, r0, rows, j0 + j, n);
        }
    }
}

/* With few rows, memory is what counts: a thread reads long stretches of weights, about GEMV_TASKS
   in all, but no task is smaller than MIN_GEMV_COLS outputs. */
enum { GEMV_TASKS = 4, MIN_GEMV_COLS = 64 };

static void matmul_int_row_task(void *arg, int task, int thread) {
    const struct matmul_job *job = arg;
    const struct tensor *w = job->w;
    int j0 = task * job->size, n = w->rows - j0 < job->size ? w->rows - j0 : job->size;
    float *y = job->y + j0;
    (void)thread;
    job->e->kern->matmul.int_row(w->type, w->cols / QK, job->e->act, job->rows, tensor_row(w, j0),
                                 w->row_bytes, n, y, w->rows);
    for (int r = 0; job->bias != NULL && r < job->rows; r++, y += w->rows)
        for (int j = 0; j < n; j++) y[j] += job->bias[j0 + j];
}

/* The same for many rows: packs panels of weights, then multiplies all rows by them (chapter
   12). */
static void matmul_int_tile_task(void *arg, int task, int thread);

static void quantize_task(void *arg, int r, int thread) {
    const struct matmul_job *job = arg;
    int64_t cols = job->w->cols;
    (void)thread;
    job->e->kern->matmul.quantize_act(job->x + r * cols, job->e->act + r * (cols / QK), (int)cols);
}

static int is_integer(const struct exec *e, const struct tensor *w) {
    return type_is_quantised(w->type) && !e->exact && e->act != NULL;
}

/* Which task a matmul takes, and how many of them. */
static void matmul_plan(struct matmul_job *job) {
    const struct kernels *kern = job->e->kern;
    job->run = matmul_f32_task;
    job->size = weight_rows(job->w->cols);
    if (is_integer(job->e, job->w) && job->rows < kern->matmul.int_rows) {
        int size = round_up(job->w->rows / (GEMV_TASKS * pool_threads(job->e->pool)), 8);
        job->run = matmul_int_row_task;
        job->size = size > MIN_GEMV_COLS ? size : MIN_GEMV_COLS;
    } else if (is_integer(job->e, job->w)) {
        job->run = matmul_int_tile_task;
        job->size = kern->matmul.int_panels * PANEL;
    }
    job->tasks = (job->w->rows + job->size - 1) / job->size;
}

enum { MAX_MATMULS = 3 };

static void matmul_task(void *arg, int task, int thread) {
    struct matmul_job *job = arg;
    for (; task >= job->tasks; job++) task -= job->tasks;
    job->run(job, task, thread);
}

/* Up to MAX_MATMULS matmuls of the same x, whose threads meet once and not after each. */
static void matmul_all(const struct exec *e, const struct matmul_output *outputs, int n,
                       const float *x, int rows) {
    struct matmul_job jobs[MAX_MATMULS];
    int integer = -1, tasks = 0;
    for (int i = 0; i < n; i++) {
        jobs[i] = (struct matmul_job){.e = e, .w = outputs[i].w, .bias = outputs[i].bias, .x = x,
                                      .y = outputs[i].y, .rows = rows};
        matmul_plan(&jobs[i]);
        tasks += jobs[i].tasks;
        if (is_integer(e, outputs[i].w)) integer = i;
    }
    if (integer >= 0) pool_run(e->pool, rows, quantize_task, &jobs[integer]);
    pool_run(e->pool, tasks, matmul_task, jobs);
}

/* y[rows][w->rows] = x[rows][w->cols] w^T + bias, on all threads; bias may be NULL. */
static void matmul(const struct exec *e, const struct tensor *w, const float *bias, const float *x,
                   int rows, float *y) {
    matmul_all(e, &(struct matmul_output){w, bias, y}, 1, x, rows);
}

/* Scratch floats that a thread needs for a matrix with so many columns. */
static int64_t matmul_scratch(const struct kernels *kern, int cols) {
    int64_t block = (int64_t)weight_rows(cols) * cols;
    return max64(block,
                 (int64_t)(cols / QK) * kern->matmul.int_panels * kern->matmul.pack_bytes / 4);
}

/* c[r][0 .. 16 panels) (+)= a[r] b for any number of rows and panels, on the calling thread: the
   outer products above, cut into tiles (chapter 12). a[r]: [k]; b: panels of [k][PANEL], ldp
   apart. */
static void matmul_panels(const struct kernels *kern, int rows, int k, const float *const *a,
                          const float *b, int64_t ldp, int panels, float *c, int ldc,
                          int accumulate);

/* ---- Attention over one block of keys ----

   softmax(q K^T / sqrt(d)) V without the whole row of scores: online softmax, block by block
   (Milakov and Gimelshein 2018; Dao et al. 2022). Each query row carries the largest score m so
   far, the sum l of exp(score - m), and the weighted sum o of values. A block of up to 256 keys
   gives its own m', l', o', and

       M = max(m, m'),   l = l e^(m-M) + l' e^(m'-M),   o = o e^(m-M) + o' e^(m'-M);

   after the last block the answer is o / l. Blocks come in ascending order, so that a row's result
   depends on nothing but its own keys. Keys and values lie in panels, k[256 / 16][d][16 keys] and
   v[d / 16][256 keys][16]: right operands of outer products over d and over keys. */

struct query {
    const float *q;              /* [d] */
    float *o;                    /* [d] */
    float m, l;
    int keys;                    /* of this block, how many this row sees: 1 .. KV_BLOCK */
    const struct query_block *x; /* q in integers, for a quantised cache */
};

enum { QUERY_ROWS = 48 }; /* rows that go through a block together */

/* Floats of scratch that attend_block needs for a head of width d. */
static int64_t attend_scratch(int d) { return (int64_t)QUERY_ROWS * (KV_BLOCK + d); }

/* Merges a block's o[d], m and l into a row's. The factors of the two parts, e^(m-M) and e^(m'-M),
   are what a softmax makes of their maxima. */
static void online_softmax_merge(const struct kernels *kern, struct query *row, const float *o,
                                 float m, float l, int d) {
    float part[PANEL] = {row->m, m}, *sum = row->o;
    kern->attention.softmax(part, PANEL, 2, 1, &row->m);
    float old = part[0], new = part[1];
    for (int i = 0; i < d; i++) sum[i] = sum[i] * old + o[i] * new;
    row->l = row->l * old + l * new;
}

/* n <= QUERY_ROWS rows against one block of keys and values; d is a multiple of 16. */
static void attend_block(const struct kernels *kern, struct query *rows, int n, int d,
                         const float *k, const float *v, float scale, float *scratch) {
    float *s = scratch, *o = scratch + (int64_t)QUERY_ROWS * KV_BLOCK; /* [n][KV_BLOCK]  [n][d] */
    float m[QUERY_ROWS], l[QUERY_ROWS];
    const float *q[QUERY_ROWS] = {NULL}, *p[QUERY_ROWS] = {NULL};
    int keys = 0;
    for (int r = 0; r < n; r++) {
        q[r] = rows[r].q;
        p[r] = s + r * KV_BLOCK;
        keys = rows[r].keys > keys ? rows[r].keys : keys;
    }
    int panels = (keys + PANEL - 1) / PANEL;
    matmul_panels(kern, n, d, q, k, (int64_t)d * PANEL, panels, s, KV_BLOCK, 0); /* s = q K^T */
    for (int r = 0; r < n; r++) /* the causal mask: a row's keys end at its own position */
        l[r] =
            kern->attention.softmax(s + r * KV_BLOCK, panels * PANEL, rows[r].keys, scale, &m[r]);
    matmul_panels(kern, n, keys, p, v, (int64_t)KV_BLOCK * PANEL, d / PANEL, o, d, 0); /* o = p V */
    for (int r = 0; r < n; r++)
        online_softmax_merge(kern, &rows[r], o + (int64_t)r * d, m[r], l[r], d);
}

#endif /* LVM_INTERNAL */

/* =================================================================================================
   Chapter 4.  The model: one description of its tensors and operations, read from GGUF

   A weights file is GGUF version 3 (the format of ggml's model files): keys with values, then
   tensors with names, types and shapes, then their data, used where it lies (chapter 14 reads and
   writes it). The keys say what the model is. From them the model is described once, as a list of
   tensors (name, kind, shape, where its pointer lives) and, for the tokenizer, a list of
   operations:

       keys --> struct llama, struct vqgan (sizes) --> vqgan.ops[]  what the tokenizer runs
                                                  \--> model.specs[] every tensor by name and shape
                                                          |
            GGUF's tensors, by name  ---------------------+--> struct tensor: data, type, shape

   Whatever needs to know the tensors walks that list: opening a file, messages about what is
   missing, the choice of types when a file is quantised, random weights, `info`, the counts of
   `bench`, and devices that keep a copy.

   Keys: general.architecture = "lvm", lvm.format_version = 1; the transformer's under lvm. and the
   tokenizer's under lvm.vq. stand in the tables below. A file may hold only one of the two. */

/* ---- The model in memory: the shape behind every pointer ---- */

/* A piece of the file, not terminated. */
struct text {
    const char *s;
    uint64_t n;
};

struct gguf_key {
    struct text name;
    uint32_t type;
    const uint8_t *value; /* as the file holds it, size bytes */
    size_t size;
};

struct gguf_tensor {
    struct text name;
    int n_dims, type;
    int64_t ne[4];        /* fastest first; 1 beyond n_dims */
    uint64_t offset;      /* behind data_start */
    int64_t bytes;
};

struct named_index; /* for finding keys and tensors by name: chapter 14 */

struct gguf {
    const char *path;             /* for messages */
    const uint8_t *data;          /* [size]: the whole file */
    size_t size, data_start;
    uint32_t alignment;           /* of the tensors' data */
    int64_t n_keys, n_tensors;
    struct gguf_key *keys;        /* [n_keys] in the file's order */
    struct gguf_tensor *tensors;  /* [n_tensors] in the file's order */
    struct named_index *key_by_name, *tensor_by_name; /* the same, sorted */
};

/* One layer of the transformer (chapter 6). */
struct layer {
    struct tensor attn_norm;                      /* [D] */
    struct tensor q, k, v, o;                     /* [H d][D]  [G d][D]  [G d][D]  [D][H d] */
    struct tensor q_bias, k_bias, v_bias, o_bias; /* [H d]  [G d]  [G d]  [D]; most have none */
    struct tensor ffn_norm;                       /* [D] */
    struct tensor gate, up, down;                 /* [F][D]  [F][D]  [D][F] */
};

struct llama {
    int context, L, D, F, H, G, d, V;  /* tokens that it was made for; the rest: see the letters */
    int bos, eos;                      /* ids, or -1 */
    float eps, theta;                  /* of RMSNorm and of RoPE */
    struct tensor embed;               /* [V][D] */
    struct layer *layers;              /* [L]; L 0: the file has no transformer */
    struct tensor norm;                /* [D] */
    struct tensor output;              /* [V][D]; the same as embed where they are tied */
};

/* A VQGAN's encoder and decoder are chains of operations on square maps of channels; each reads
   what the one before it left (chapter 5 says what they compute):

       conv       a convolution, 3 x 3 or 1 x 1
       residual   norm1, conv1, norm2, conv2, and nin_shortcut (1 x 1) where the channels change
       attention  norm, q, k, v, proj_out (1 x 1): one head as wide as the channels
       down, up   half and twice the side, with a 3 x 3 convolution or without
       head       norm_out, SiLU, conv_out: the end of either chain */
enum vq_kind { VQ_CONV_3X3, VQ_CONV_1X1, VQ_RESIDUAL, VQ_ATTENTION, VQ_DOWN, VQ_UP, VQ_HEAD };

struct conv {
    struct tensor w;             /* [C_out][k][k][C_in]: rows C_out, columns k k C_in; or absent */
    struct tensor bias;          /* [C_out] */
    int size;                    /* k: 3 or 1 */
};

struct groupnorm {
    struct tensor scale, shift;  /* [C] */
};

struct vq_op {
    enum vq_kind kind;
    char name[40];               /* such as encoder.down.0.block.1 */
    int side_in, c_in;           /* reads a map [side_in][side_in][c_in] */
    int side_out, c_out;         /* and leaves one [side_out][side_out][c_out] */
    struct groupnorm norm[2];
    struct conv conv[4];
};

enum { MAX_LEVELS = 8, MAX_RES_BLOCKS = 8, MAX_ATTN_AT = 16,
       MAX_VQ_OPS = 2 * (MAX_LEVELS * (2 * (MAX_RES_BLOCKS + 1) + 1) + 7) };

struct vqgan {
    int R, S;                    /* sides of the image and of the token grid */
    int hidden, z, codes, code_dim, n_res_blocks, no_mid_attn, resample_conv;
    int n_levels, mult[MAX_LEVELS], n_attn_at, attn_at[MAX_ATTN_AT];
    struct tensor codebook;      /* [codes][code_dim] */
    struct vq_op *ops;           /* [MAX_VQ_OPS] */
    int n_encoder, n_ops;        /* the encoder's come first */
};

/* What a tensor is for. */
enum tensor_kind {
    T_VECTOR, /* scales, shifts and biases: always F32 */
    T_EMBED,  /* a row a token */
    T_MATRIX, /* of a linear layer */
    T_OUTPUT, /* the matrix of the logits */
    T_CONV,   /* of a convolution, [C_out][k][k][C_in] */
    T_EXACT   /* the codebook, and convolutions at it or at the pixels: tokens hang on them */
};

/* A tensor of the description: what a file must hold, and where the model keeps it. */
struct tensor_spec {
    char name[80];
    enum tensor_kind kind;
    int optional, n_dims, dims[4]; /* dims: slowest first */
    struct tensor *tensor;         /* data NULL where an optional one is absent */
    uint8_t *merged;               /* memory of its own behind data, with adapters in it, or NULL */
};

struct lvm_model {
    char *path, *name;
    uint8_t *owned;                /* the file in memory, or NULL when it is mapped or foreign */
    void *mapped;
    size_t mapped_size;
    struct gguf file;
    const struct kernels *kern;    /* of this machine */
    int T, codes;                  /* tokens of an image; ids below codes are image tokens */
    struct llama llama;
    struct vqgan *vq;              /* NULL when the file has no tokenizer */
    struct tensor_spec *specs;     /* [n_specs] */
    int n_specs;
    uint64_t adapters;             /* hash of those that are merged into it; 0: none */
    struct devices *devices;       /* copies of the model on devices: chapter 7 */
};

#ifndef LVM_INTERNAL

/* ---- Keys by name and type ---- */

/* Parses a file that lies in memory (chapter 14). path is for messages; both must outlive g. The
   key or tensor of a name, NULL where there is none. */
static int gguf_parse(struct gguf *g, const char *path, const void *data, size_t size,
                      lvm_error *error);
static void gguf_free(struct gguf *g);
static const struct gguf_key *gguf_key(const struct gguf *g, const char *name);
static const struct gguf_tensor *gguf_tensor(const struct gguf *g, const char *name);

static int text_is(struct text t, const char *s) {
    return t.n == strlen(s) && memcmp(t.s, s, (size_t)t.n) == 0;
}

/* A key as a description names it: a whole number in [low, high]; a missing one gives `missing`, or
   is an error when that is out of range itself. where: of the int in struct llama or vqgan. */
struct int_key {
    const char *name;
    int low, high, missing;
    size_t where;
};

struct float_key {
    const char *name;
    float low, high;
};

static int read_int(const struct gguf *g, const struct int_key *key, int *out, lvm_error *error);
static int read_float(const struct gguf *g, const struct float_key *key, float *out,
                      lvm_error *error);

/* An array of at most max integers in the key's bounds; *n is its length. The text of a key, or
   nothing. */
static int read_ints(const struct gguf *g, const struct int_key *key, int max, int *out, int *n,
                     lvm_error *error);
static struct text read_text(const struct gguf *g, const char *name);

/* Refuses a file that holds tensors beside those of the description, and names them (chapter 14):
   they would be weights that never take part. */
static int refuse_unknown(const lvm_model *m, lvm_error *error);

/* ---- The transformer's description; the bounds of all keys stand in convert.py too ---- */

#define LLAMA(field) offsetof(struct llama, field)
#define LAYER(field) offsetof(struct layer, field)

static const struct int_key llama_keys[] = {
    {"lvm.context_length", 1, 1 << 20, 0, LLAMA(context)},
    {"lvm.embedding_length", 1, 1 << 16, 0, LLAMA(D)},
    {"lvm.block_count", 1, 1024, 0, LLAMA(L)},
    {"lvm.feed_forward_length", 1, 1 << 18, 0, LLAMA(F)},
    {"lvm.vocab_size", 1, 1 << 20, 0, LLAMA(V)},
    {"lvm.attention.head_count", 1, 1024, 0, LLAMA(H)},
    {"lvm.attention.head_count_kv", 1, 1024, 0, LLAMA(G)},
    {"lvm.bos_token_id", -1, 1 << 20, -1, LLAMA(bos)},
    {"lvm.eos_token_id", -1, 1 << 20, -1, LLAMA(eos)}};
static const struct float_key llama_floats[] = {
    {"lvm.attention.layer_norm_rms_epsilon", 1e-30f, 1},
    {"lvm.rope.freq_base", 1, 1e12f}};

/* rows, cols: letters of the shape, Q = H d and K = G d; no cols: a vector. Names with a layer
   stand behind "blk.N." */
static const struct llama_tensor {
    const char *name;
    enum tensor_kind kind;
    char rows, cols;
    int in_layer, optional;
    size_t where;
} llama_tensors[] = {
    {"token_embd.weight", T_EMBED, 'V', 'D', 0, 1, LLAMA(embed)},
    {"attn_norm.weight", T_VECTOR, 'D', 0, 1, 0, LAYER(attn_norm)},
    {"attn_q.weight", T_MATRIX, 'Q', 'D', 1, 0, LAYER(q)},
    {"attn_k.weight", T_MATRIX, 'K', 'D', 1, 0, LAYER(k)},
    {"attn_v.weight", T_MATRIX, 'K', 'D', 1, 0, LAYER(v)},
    {"attn_output.weight", T_MATRIX, 'D', 'Q', 1, 0, LAYER(o)},
    {"attn_q.bias", T_VECTOR, 'Q', 0, 1, 1, LAYER(q_bias)},
    {"attn_k.bias", T_VECTOR, 'K', 0, 1, 1, LAYER(k_bias)},
    {"attn_v.bias", T_VECTOR, 'K', 0, 1, 1, LAYER(v_bias)},
    {"attn_output.bias", T_VECTOR, 'D', 0, 1, 1, LAYER(o_bias)},
    {"ffn_norm.weight", T_VECTOR, 'D', 0, 1, 0, LAYER(ffn_norm)},
    {"ffn_gate.weight", T_MATRIX, 'F', 'D', 1, 0, LAYER(gate)},
    {"ffn_up.weight", T_MATRIX, 'F', 'D', 1, 0, LAYER(up)},
    {"ffn_down.weight", T_MATRIX, 'D', 'F', 1, 0, LAYER(down)},
    {"output_norm.weight", T_VECTOR, 'D', 0, 0, 0, LLAMA(norm)},
    {"output.weight", T_OUTPUT, 'V', 'D', 0, 1, LLAMA(output)}};
enum { LLAMA_TENSORS = sizeof llama_tensors / sizeof *llama_tensors };

/* ---- The tokenizer's description; names are the published checkpoint's behind "vq." ---- */

#define VQGAN(field) offsetof(struct vqgan, field)

static const struct int_key vq_keys[] = {
    {"lvm.vq.resolution", 1, 4096, 0, VQGAN(R)},
    {"lvm.vq.hidden_channels", 1, 4096, 0, VQGAN(hidden)},
    {"lvm.vq.num_res_blocks", 1, MAX_RES_BLOCKS, 0, VQGAN(n_res_blocks)},
    {"lvm.vq.z_channels", 1, 4096, 0, VQGAN(z)},
    {"lvm.vq.num_embeddings", 1, 1 << 20, 0, VQGAN(codes)},
    {"lvm.vq.quantized_embed_dim", 1, 4096, 0, VQGAN(code_dim)},
    {"lvm.vq.no_attn_mid_block", 0, 1, 0, VQGAN(no_mid_attn)},
    {"lvm.vq.resample_with_conv", 0, 1, 1, VQGAN(resample_conv)}};
static const struct int_key vq_mult_key = {"lvm.vq.channel_mult", 1, 64, 0, VQGAN(mult)},
    vq_attn_key = {"lvm.vq.attn_resolutions", 0, 1 << 20, 0, VQGAN(attn_at)};

/* What each kind of operation is made of: norm[index] of c_in ('i') or c_out ('o') channels, or
   conv[index], k x k, from so many to c_out channels. */
static const struct vq_part {
    enum vq_kind kind;
    const char *name;            /* behind the operation's own */
    int index, k;                /* k 0: a norm */
    char channels;
} vq_parts[] = {
    {VQ_CONV_3X3, "", 0, 3, 'i'},       {VQ_CONV_1X1, "", 0, 1, 'i'},
    {VQ_RESIDUAL, ".norm1", 0, 0, 'i'}, {VQ_RESIDUAL, ".conv1", 0, 3, 'i'},
    {VQ_RESIDUAL, ".norm2", 1, 0, 'o'}, {VQ_RESIDUAL, ".conv2", 1, 3, 'o'},
    {VQ_RESIDUAL, ".nin_shortcut", 2, 1, 'i'},
    {VQ_ATTENTION, ".norm", 0, 0, 'i'}, {VQ_ATTENTION, ".q", 0, 1, 'i'},
    {VQ_ATTENTION, ".k", 1, 1, 'i'},    {VQ_ATTENTION, ".v", 2, 1, 'i'},
    {VQ_ATTENTION, ".proj_out", 3, 1, 'i'},
    {VQ_DOWN, "", 0, 3, 'i'},           {VQ_UP, "", 0, 3, 'i'},
    {VQ_HEAD, ".norm_out", 0, 0, 'i'},  {VQ_HEAD, ".conv_out", 0, 3, 'i'}};
enum { VQ_PARTS = sizeof vq_parts / sizeof *vq_parts, MAX_PARTS_OF_OP = 5 };

/* A chain of operations being built, and the map that its last one leaves. */
struct vq_chain {
    struct vqgan *vq;
    int side, c;
};

/* Appends an operation that leaves c_out channels; its side follows from its kind. */
LVM_PRINTF(4, 5) static void vq_add(struct vq_chain *chain, enum vq_kind kind, int c_out,
                                    const char *format, ...) {
    struct vq_op *op = &chain->vq->ops[chain->vq->n_ops++];
    va_list args;
    va_start(args, format);
    vsnprintf(op->name, sizeof op->name, format, args);
    va_end(args);
    op->kind = kind;
    op->side_in = chain->side;
    op->c_in = chain->c;
    op->side_out = chain->side =
        kind == VQ_DOWN ? chain->side / 2 : kind == VQ_UP ? 2 * chain->side : chain->side;
    op->c_out = chain->c = c_out;
}

/* n blocks of level i. As in the published class, a level runs its attention blocks only where it
   has more than one. */
static void vq_add_level(struct vq_chain *chain, const char *name, int i, int n) {
    const struct vqgan *vq = chain->vq;
    int c = vq->hidden * vq->mult[i], attention = 0;
    for (int a = 0; a < vq->n_attn_at; a++) attention |= vq->attn_at[a] == vq->R >> i && n > 1;
    for (int b = 0; b < n; b++) {
        vq_add(chain, VQ_RESIDUAL, c, "%s.%d.block.%d", name, i, b);
        if (attention) vq_add(chain, VQ_ATTENTION, c, "%s.%d.attn.%d", name, i, b);
    }
}

/* The narrowest part of either chain, where every pixel may attend to every other. */
static void vq_add_middle(struct vq_chain *chain, const char *name) {
    vq_add(chain, VQ_RESIDUAL, chain->c, "%s.mid.block_1", name);
    if (!chain->vq->no_mid_attn) vq_add(chain, VQ_ATTENTION, chain->c, "%s.mid.attn_1", name);
    vq_add(chain, VQ_RESIDUAL, chain->c, "%s.mid.block_2", name);
}

/* R x R x 3 pixels -> S x S x code_dim, the vectors in front of the quantiser. */
static void vq_build_encoder(struct vqgan *vq) {
    struct vq_chain chain = {vq, vq->R, 3};
    vq_add(&chain, VQ_CONV_3X3, vq->hidden, "encoder.conv_in");
    for (int i = 0; i < vq->n_levels; i++) {
        vq_add_level(&chain, "encoder.down", i, vq->n_res_blocks);
        if (i + 1 < vq->n_levels)
            vq_add(&chain, VQ_DOWN, chain.c, "encoder.down.%d.downsample.conv", i);
    }
    vq_add_middle(&chain, "encoder");
    vq_add(&chain, VQ_HEAD, vq->z, "encoder");
    vq_add(&chain, VQ_CONV_1X1, vq->code_dim, "quant_conv");
    vq->n_encoder = vq->n_ops;
}

/* And back: the mirror image, with one residual block more a level. */
static void vq_build_decoder(struct vqgan *vq) {
    struct vq_chain chain = {vq, vq->S, vq->code_dim};
    vq_add(&chain, VQ_CONV_1X1, vq->z, "post_quant_conv");
    vq_add(&chain, VQ_CONV_3X3, vq->hidden * vq->mult[vq->n_levels - 1], "decoder.conv_in");
    vq_add_middle(&chain, "decoder");
    for (int i = vq->n_levels - 1; i >= 0; i--) {
        vq_add_level(&chain, "decoder.up", i, vq->n_res_blocks + 1);
        if (i > 0) vq_add(&chain, VQ_UP, chain.c, "decoder.up.%d.upsample.conv", i);
    }
    vq_add(&chain, VQ_HEAD, 3, "decoder");
}

/* ---- From the descriptions to one list ---- */

/* Adds a tensor to the list; the caller names it. */
static struct tensor_spec *describe(lvm_model *m, enum tensor_kind kind, int optional,
                                    struct tensor *tensor, int n_dims, const int *dims) {
    struct tensor_spec *s = &m->specs[m->n_specs++];
    s->kind = kind;
    s->optional = optional;
    s->tensor = tensor;
    s->n_dims = n_dims;
    memcpy(s->dims, dims, (size_t)n_dims * sizeof *dims);
    return s;
}

/* The size that a letter of llama_tensors stands for. */
static int llama_size(const struct llama *a, char letter) {
    switch (letter) {
    case 'V': return a->V;
    case 'F': return a->F;
    case 'K': return a->G * a->d;
    default: return a->D; /* Q too: H d is D */
    }
}

/* A model's own tensors once, those of a layer for each of them. */
static void describe_llama(lvm_model *m) {
    struct llama *a = &m->llama;
    for (int layer = 0; layer < a->L; layer++)
        for (int i = 0; i < LLAMA_TENSORS; i++) {
            const struct llama_tensor *t = &llama_tensors[i];
            char *base = t->in_layer ? (char *)&a->layers[layer] : (char *)a;
            int dims[2] = {llama_size(a, t->rows), llama_size(a, t->cols)};
            if (!t->in_layer && layer > 0) continue;
            struct tensor_spec *s =
                describe(m, t->kind, t->optional, (struct tensor *)(void *)(base + t->where),
                         t->cols != 0 ? 2 : 1, dims);
            if (t->in_layer) snprintf(s->name, sizeof s->name, "blk.%d.%s", layer, t->name);
            else snprintf(s->name, sizeof s->name, "%s", t->name);
        }
}

/* Some parts are there only where they are needed. */
static int vq_has_part(const struct vqgan *vq, const struct vq_op *op, const struct vq_part *p) {
    if (p->kind != op->kind) return 0;
    if (p->kind == VQ_RESIDUAL && p->k == 1) return op->c_in != op->c_out;
    return (p->kind != VQ_DOWN && p->kind != VQ_UP) || vq->resample_conv;
}

/* The tensors of one operation. A convolution that stands alone is one at the pixels or at the
   codebook, and exact. */
static void describe_op(lvm_model *m, struct vq_op *op) {
    int exact = op->kind == VQ_CONV_3X3 || op->kind == VQ_CONV_1X1;
    for (int i = 0; i < VQ_PARTS; i++) {
        const struct vq_part *p = &vq_parts[i];
        struct tensor_spec *s[2];
        if (!vq_has_part(m->vq, op, p)) continue;
        int c_in = p->channels == 'i' ? op->c_in : op->c_out;
        if (p->k == 0) {
            struct groupnorm *norm = &op->norm[p->index];
            s[0] = describe(m, T_VECTOR, 0, &norm->scale, 1, &c_in);
            s[1] = describe(m, T_VECTOR, 0, &norm->shift, 1, &c_in);
        } else {
            struct conv *conv = &op->conv[p->index];
            conv->size = p->k;
            s[0] = describe(m, exact ? T_EXACT : T_CONV, 0, &conv->w, 4,
                            (const int[]){op->c_out, p->k, p->k, c_in});
            s[1] = describe(m, T_VECTOR, 0, &conv->bias, 1, &op->c_out);
        }
        snprintf(s[0]->name, sizeof s[0]->name, "vq.%s%s.weight", op->name, p->name);
        snprintf(s[1]->name, sizeof s[1]->name, "vq.%s%s.bias", op->name, p->name);
    }
}

/* All operations, then the codebook between encoder and decoder. */
static void describe_vqgan(lvm_model *m) {
    struct vqgan *vq = m->vq;
    for (int i = 0; i < vq->n_ops; i++) describe_op(m, &vq->ops[i]);
    struct tensor_spec *s =
        describe(m, T_EXACT, 0, &vq->codebook, 2, (const int[]){vq->codes, vq->code_dim});
    snprintf(s->name, sizeof s->name, "vq.quantize.embedding.weight");
}

/* From sizes to lists: llama's and vq's sizes are set, nothing else. */
static int describe_model(lvm_model *m, lvm_error *error) {
    struct llama *a = &m->llama;
    struct vqgan *vq = m->vq;
    int most = (a->L + 1) * LLAMA_TENSORS;
    if (vq != NULL) {
        vq->ops = mem_alloc(MAX_VQ_OPS, sizeof *vq->ops, error);
        if (vq->ops == NULL) return LVM_MEMORY;
        vq->S = vq->R >> (vq->n_levels - 1);
        vq_build_encoder(vq);
        vq_build_decoder(vq);
        most += vq->n_ops * 2 * MAX_PARTS_OF_OP + 1;
    }
    m->T = vq != NULL ? vq->S * vq->S : 256;
    m->codes = vq != NULL ? vq->codes : (int)min64(a->V, 8192);
    m->specs = mem_alloc((size_t)most, sizeof *m->specs, error);
    a->layers = mem_alloc((size_t)a->L, sizeof *a->layers, error);
    if (m->specs == NULL || a->layers == NULL) return LVM_MEMORY;
    if (a->L > 0) describe_llama(m);
    if (vq != NULL) describe_vqgan(m);
    return LVM_OK;
}

/* ---- Opening ---- */

/* The transformer's sizes, and whether they fit each other. */
static int read_llama_keys(const struct gguf *g, struct llama *a, lvm_error *error) {
    int code = LVM_OK;
    for (size_t i = 0; code == LVM_OK && i < sizeof llama_keys / sizeof *llama_keys; i++)
        code = read_int(g, &llama_keys[i], (int *)(void *)((char *)a + llama_keys[i].where), error);
    if (code == LVM_OK) code = read_float(g, &llama_floats[0], &a->eps, error);
    if (code == LVM_OK) code = read_float(g, &llama_floats[1], &a->theta, error);
    if (code != LVM_OK) return code;
    if (a->H % a->G != 0)
        return fail(error, LVM_FORMAT,
                    "%s: %d attention heads do not share %d key/value heads evenly", g->path, a->H,
                    a->G);
    if (a->D % a->H != 0 || a->D / a->H % 2 != 0)
        return fail(error, LVM_FORMAT, "%s: width %d does not divide into %d heads of even width",
                    g->path, a->D, a->H);
    a->d = a->D / a->H;
    return LVM_OK;
}

/* The tokenizer's configuration: sides must halve, channels divide into GroupNorm's groups. */
static int read_vq_keys(const struct gguf *g, struct vqgan *vq, lvm_error *error) {
    int code = LVM_OK;
    for (size_t i = 0; code == LVM_OK && i < sizeof vq_keys / sizeof *vq_keys; i++)
        code = read_int(g, &vq_keys[i], (int *)(void *)((char *)vq + vq_keys[i].where), error);
    if (code == LVM_OK)
        code = read_ints(g, &vq_mult_key, MAX_LEVELS, vq->mult, &vq->n_levels, error);
    if (code == LVM_OK)
        code = read_ints(g, &vq_attn_key, MAX_ATTN_AT, vq->attn_at, &vq->n_attn_at, error);
    if (code != LVM_OK) return code;
    if (vq->n_levels < 1 || vq->R % (1 << (vq->n_levels - 1)) != 0)
        return fail(error, LVM_FORMAT, "%s: resolution %d does not halve %d times", g->path, vq->R,
                    vq->n_levels - 1);
    if (vq->hidden % 32 != 0)
        return fail(error, LVM_FORMAT, "%s: hidden_channels %d is no multiple of 32", g->path,
                    vq->hidden);
    return LVM_OK;
}

/* Whether a file holds adapters of a model (chapter 8) instead of one. */
static int is_adapter_file(const struct gguf *g) {
    return text_is(read_text(g, "general.type"), "adapter");
}

/* Reads what the file says the model is, and describes it. */
static int read_description(lvm_model *m, lvm_error *error) {
    const struct gguf *g = &m->file;
    int version = 0, code = LVM_OK;
    if (!text_is(read_text(g, "general.architecture"), "lvm"))
        return fail(error, LVM_FORMAT, "%s: a GGUF file of another architecture than lvm", m->path);
    code = read_int(g, &(struct int_key){"lvm.format_version", 1, 1, 0, 0}, &version, error);
    if (code != LVM_OK) return code;
    if (is_adapter_file(g))
        return fail(error, LVM_FORMAT,
                    "%s: holds adapters, no model; give the model that they belong to, and these "
                    "with --lora", m->path);
    int has_llama = gguf_key(g, "lvm.block_count") != NULL;
    int has_vq = gguf_key(g, "lvm.vq.resolution") != NULL;
    if (!has_llama && !has_vq)
        return fail(error, LVM_FORMAT, "%s: holds neither a transformer nor a tokenizer", m->path);
    if (has_llama) code = read_llama_keys(g, &m->llama, error);
    if (code == LVM_OK && has_vq) {
        m->vq = mem_alloc(1, sizeof *m->vq, error);
        code = m->vq == NULL ? LVM_MEMORY : read_vq_keys(g, m->vq, error);
    }
    return code == LVM_OK ? describe_model(m, error) : code;
}

/* Finds a tensor of the description in the file: rows of any type, vectors in F32. */
static int get_tensor(const lvm_model *m, const struct tensor_spec *s, lvm_error *error) {
    const struct gguf_tensor *t = gguf_tensor(&m->file, s->name);
    if (t == NULL && s->optional) return LVM_OK;
    if (t == NULL) return fail(error, LVM_FORMAT, "%s: tensor %s is missing", m->path, s->name);
    int same = t->n_dims == s->n_dims;
    int64_t cols = 1;
    for (int i = 0; i < s->n_dims; i++) same &= t->ne[i] == s->dims[s->n_dims - 1 - i];
    for (int i = 1; i < s->n_dims; i++) cols *= s->dims[i];
    if (!same)
        return fail(error, LVM_FORMAT,
                    "%s: tensor %s has the wrong shape (%lld x %lld x %lld x %lld)", m->path,
                    s->name, (long long)t->ne[3], (long long)t->ne[2], (long long)t->ne[1],
                    (long long)t->ne[0]);
    if (cols > INT32_MAX / 64)
        return fail(error, LVM_UNSUPPORTED, "%s: tensor %s has rows of %lld", m->path, s->name,
                    (long long)cols);
    if (s->kind == T_VECTOR && t->type != LVM_F32)
        return fail(error, LVM_FORMAT, "%s: tensor %s must be F32", m->path, s->name);
    int64_t row_bytes = s->n_dims == 1 ? 4 : type_bytes(t->type, cols);
    *s->tensor = (struct tensor){m->file.data + m->file.data_start + t->offset, row_bytes, t->type,
                                 s->dims[0], (int)cols};
    return LVM_OK;
}

/* general.name as a string that ends. */
static int copy_name(lvm_model *m, lvm_error *error) {
    struct text t = read_text(&m->file, "general.name");
    m->name = mem_alloc((size_t)t.n + 1, 1, error);
    if (m->name == NULL) return LVM_MEMORY;
    memcpy(m->name, t.s, (size_t)t.n);
    return LVM_OK;
}

/* Everything up to the tensors' data, which `info` shows even of a file that lacks some. */
static int load_description(lvm_model *m, const void *data, size_t size, lvm_error *error) {
    m->kern = choose_kernels(error);
    if (m->kern == NULL) return LVM_INVALID;
    if ((uintptr_t)data % 8 != 0)
        return fail(error, LVM_INVALID, "%s: the weights in memory must be aligned to 8 bytes",
                    m->path);
    int code = gguf_parse(&m->file, m->path, data, size, error);
    if (code == LVM_OK) code = read_description(m, error);
    return code == LVM_OK ? copy_name(m, error) : code;
}

/* Every tensor of the description; then what only tensors and keys together can show. */
static int load_tensors(lvm_model *m, lvm_error *error) {
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && i < m->n_specs; i++)
        code = get_tensor(m, &m->specs[i], error);
    if (code == LVM_OK) code = refuse_unknown(m, error);
    if (code != LVM_OK) return code;
    struct llama *a = &m->llama;
    if (a->output.data == NULL) a->output = a->embed; /* tied, whichever of the two was kept */
    if (a->embed.data == NULL) a->embed = a->output;
    if (a->L > 0 && a->embed.data == NULL)
        return fail(error, LVM_FORMAT, "%s: tensor token_embd.weight is missing", m->path);
    if (a->L > 0 && m->codes > a->V)
        return fail(error, LVM_FORMAT,
                    "%s: the tokenizer has %d codes, the transformer's vocabulary %d", m->path,
                    m->codes, a->V);
    if (a->L > 0 && (a->bos >= a->V || a->eos >= a->V))
        return fail(error, LVM_FORMAT, "%s: bos %d or eos %d lies outside the vocabulary of %d",
                    m->path, a->bos, a->eos, a->V);
    return LVM_OK;
}

/* Copies of a model on devices, made when a context first asks for one, freed with the model
   (chapter 14). */
static struct devices *devices_new(lvm_error *error);
static void devices_free(struct devices *d);
static int devices_are_open(struct devices *d);

/* A model without contents, which lvm_close takes back at any later step. */
static lvm_model *model_new(const char *path, lvm_error *error) {
    lvm_model *m = mem_alloc(1, sizeof *m, error);
    if (m == NULL) return NULL;
    m->path = copy_string(path, error);
    m->llama.bos = m->llama.eos = -1;
    m->devices = devices_new(error);
    if (m->path != NULL && m->devices != NULL) return m;
    lvm_close(m);
    return NULL;
}

/* The file at m's path, mapped or read, and its description. */
static int load_file(lvm_model *m, int flags, lvm_error *error) {
    int code = flags & LVM_NO_MMAP ? read_file(m->path, &m->owned, &m->mapped_size, error)
                                   : map_file(m->path, &m->mapped, &m->mapped_size, error);
    const void *data = m->owned != NULL ? m->owned : m->mapped;
    return code == LVM_OK ? load_description(m, data, m->mapped_size, error) : code;
}

/* The last step of opening, where the ones before it gave `code`; NULL after a failure. */
static lvm_model *open_model(lvm_model *m, int code, lvm_error *error) {
    if (code == LVM_OK) code = load_tensors(m, error);
    if (code == LVM_OK) return m;
    lvm_close(m);
    return NULL;
}

lvm_model *lvm_open_memory(const void *data, size_t size, lvm_error *error) {
    clear_error(error);
    if (data == NULL) {
        null_argument(error, "lvm_open_memory", "data");
        return NULL;
    }
    lvm_model *m = model_new("(memory)", error);
    return m == NULL ? NULL : open_model(m, load_description(m, data, size, error), error);
}

lvm_model *lvm_open(const char *path, int flags, lvm_error *error) {
    clear_error(error);
    if (path == NULL || (flags & ~LVM_NO_MMAP) != 0) {
        if (path == NULL) null_argument(error, "lvm_open", "path");
        else fail(error, LVM_INVALID, "%s: lvm_open knows no flags %d", path, flags);
        return NULL;
    }
    lvm_model *m = model_new(path, error);
    return m == NULL ? NULL : open_model(m, load_file(m, flags, error), error);
}

void lvm_close(lvm_model *m) {
    if (m == NULL) return;
    devices_free(m->devices);
    gguf_free(&m->file);
    for (int i = 0; i < m->n_specs; i++) mem_free(m->specs[i].merged);
    mem_free(m->specs);
    mem_free(m->llama.layers);
    if (m->vq != NULL) mem_free(m->vq->ops);
    mem_free(m->vq);
    mem_free(m->owned);
    if (m->mapped != NULL) unmap_file(m->mapped, m->mapped_size);
    mem_free(m->path);
    mem_free(m->name);
    mem_free(m);
}

/* Images that the context holds, the predicted one included: the last sampled token is never
   fed. */
static int images_that_fit(const lvm_model *m, int has_bos) {
    return (m->llama.context + 1 - has_bos) / m->T;
}

/* The best device there is (chapter 14). */
static const char *best_device(void);

/* What LVM_DEVICE names, or "": the best that can be opened. */
static const char *default_device(void) {
    const char *forced = getenv("LVM_DEVICE");
    return forced != NULL ? forced : "";
}

lvm_info lvm_model_info(const lvm_model *m) {
    lvm_info i = {.bos = -1, .eos = -1, .name = "", .isa = "", .device = ""};
    if (m == NULL) return i;
    const struct llama *a = &m->llama;
    i = (lvm_info){.has_transformer = a->L > 0, .has_tokenizer = m->vq != NULL,
                   .context_length = a->context, .vocab_size = a->V, .codes = m->codes,
                   .bos = a->bos, .eos = a->eos, .layers = a->L, .width = a->D,
                   .feed_forward = a->F, .heads = a->H, .kv_heads = a->G,
                   .resolution = m->vq != NULL ? m->vq->R : 0, .tokens_per_image = m->T,
                   .name = m->name, .isa = m->kern->name,
                   .device = *default_device() != 0 ? default_device() : best_device()};
    if (a->L > 0) i.window_images = (int)min64(16, images_that_fit(m, a->bos >= 0));
    for (int64_t t = 0; t < m->file.n_tensors; t++) { /* also of tensors that nobody here needs */
        const int64_t *ne = m->file.tensors[t].ne;
        i.parameters += ne[0] * ne[1] * ne[2] * ne[3];
    }
    return i;
}

/* =================================================================================================
   Chapter 5.  The tokenizer: VQGAN encoder, vector quantiser, decoder

   A VQGAN (Esser, Rombach and Ommer 2021, arXiv 2012.09841) is an autoencoder whose code is
   discrete: an encoder and a decoder of convolutions, and between them a codebook, a table of
   vectors that was learnt with them. "GAN" is how it was trained: an adversary, a second network
   that judged whether an image looked real, kept the decoder's images sharp. Nothing of the
   adversary is left here.

       image [R][R][3]  --encoder-->  z [S][S][code_dim]  --nearest rows-->  tokens [S][S]
       tokens [S][S]  --rows of the codebook-->  z [S][S][code_dim]  --decoder-->  image [R][R][3]

   In the published models R is 256 and S 16: an image is 256 tokens of 8192 codes. Configuration,
   parameter names and behaviour are those of the published class (open-muse's VQGANModel, itself
   after taming-transformers). The encoder halves the side a few times while channels grow, the
   decoder doubles it; chapter 4 builds both as lists of operations:

       residual   y = x + conv2(silu(norm2(conv1(silu(norm1(x))))));  x by a 1 x 1 convolution where
                  the channels change
       norm       GroupNorm (Wu and He 2018): 32 groups of channels share mean and variance over all
                  pixels, eps 1e-6:  norm(x) = (x - mean) / sqrt(var + eps) * scale + shift
       silu       x / (1 + e^-x)
       attention  y = x + proj(softmax(q k^T / sqrt(c)) v): one head, as wide as the channels, over
                  all pixels

   Maps of activations are NHWC: map[y][x][c], so that a pixel's channels lie side by side. All of
   it is computed in f32, whatever type the weights are stored in: tokens hang on the last bits. */

enum { GROUPS = 32, NORM_PIXELS = 1024 /* pixels of a task of GroupNorm */,
       VQ_ROWS = 64 /* vectors quantised at a time */ };

struct vq_state {
    float *x;                      /* the current feature map, [side][side][c] */
    float *t, *u;                  /* maps to work in; all three as large as the largest */
    int side, c;
    double *sums;                  /* [tasks][2][c]: of a GroupNorm */
    float *scale, *shift;          /* [c]: what it comes to */
    float *q, *k, *v;              /* [side * side][c]: of an attention */
    float *k_panels, *v_panels;    /* its keys and values as attend_block reads them */
    float *packed, *zeros;         /* convolution: what its tasks share; a pixel outside, [c] */
    float *dots, *code_norms;      /* [VQ_ROWS][codes] and [codes]: of the quantiser */
    int64_t bytes;                 /* of all this */
};

/* ---- Convolution ---- */

/* The filter's tap (i, j) over output pixel (y, x) reads input pixel ((y stride + i - pad) >> up,
   (x stride + j - pad) >> up): nearest-neighbour doubling before a convolution (up 1) is only
   another way to find the pixel. What falls outside counts as zeros. */
struct conv_geometry {
    int side_in, side_out, stride, up, pad;
};

/* What the tasks of a convolution work on; the last two lines are chapter 12's. */
struct conv_job {
    const struct exec *e;
    const struct vq_state *s;
    const struct conv *conv;
    struct conv_geometry g;
    int c_in, c_out;
    const float *in, *residual; /* [side_in][side_in][c_in]  NULL or [side_out][side_out][c_out] */
    float *out;                    /* [side_out][side_out][c_out]; may be residual */
    int normed;                    /* `in` goes through s->scale and shift, then SiLU, first */
    int panel0, panels;            /* packed panels of weights: the current ones */
    int across, tile0, tiles;      /* Winograd: tiles side by side; the current ones */
};

/* The channels [c_in] under tap (i, j) of output pixel (y, x). */
static const float *conv_input(const struct conv_job *job, int y, int x, int i, int j) {
    const struct conv_geometry *g = &job->g;
    int ty = y * g->stride + i - g->pad, tx = x * g->stride + j - g->pad;
    if (ty < 0 || tx < 0 || ty >> g->up >= g->side_in || tx >> g->up >= g->side_in)
        return job->s->zeros;
    return job->in + ((int64_t)(ty >> g->up) * g->side_in + (tx >> g->up)) * job->c_in;
}

/* The definition, for output channel o of every pixel: with taps and channels in ascending order,

       out[y][x][o] = bias[o] + residual[y][x][o] + sum over i, j, c of in[tap (i, j)][c]
   w[o][i][j][c] */
static void conv2d_plain_task(void *arg, int o, int thread) {
    const struct conv_job *job = arg;
    const struct conv *conv = job->conv;
    int k = conv->size, c_in = job->c_in, side = job->g.side_out;
    float *w = exec_scratch(job->e, thread), bias = floats(&conv->bias)[o];
    job->e->kern->elementwise.to_f32(conv->w.type, tensor_row(&conv->w, o), w, conv->w.cols);
    for (int64_t p = 0; p < (int64_t)side * side; p++) {
        float sum = 0;
        for (int t = 0; t < k * k; t++) {
            const float *in = conv_input(job, (int)p / side, (int)p % side, t / k, t % k);
            for (int c = 0; c < c_in; c++) sum += in[c] * w[t * c_in + c];
        }
        sum += bias;
        int64_t at = p * job->c_out + o;
        job->out[at] = job->residual != NULL ? sum + job->residual[at] : sum;
    }
}

/* The same by matrix tiles, or by Winograd's transforms with a quarter of the products; 0 where
   only the definition serves. Scratch floats of a thread and floats of s->packed that
   convolutions from or to at most c channels need. All three: chapter 12. */
static int conv2d_fast(struct conv_job *job);
static int64_t conv2d_scratch(int c);
static int64_t conv2d_packed(int c);

/* out = conv(in) + residual on all threads; residual may be NULL or out. With `normed`, for which
   conv must be 3 x 3 of stride 1, conv(silu(in * scale + shift)). */
static void conv2d(const struct exec *e, const struct vq_state *s, const struct conv *conv,
                   struct conv_geometry g, int normed, const float *in, const float *residual,
                   float *out) {
    struct conv_job job = {.e = e, .s = s, .conv = conv, .g = g, .in = in, .residual = residual,
                           .out = out, .normed = normed, .c_out = conv->w.rows,
                           .c_in = conv->w.cols / (conv->size * conv->size)};
    if (!conv2d_fast(&job)) pool_run(e->pool, job.c_out, conv2d_plain_task, &job);
}

static struct conv_geometry same_size(const struct vq_state *s, const struct conv *conv) {
    return (struct conv_geometry){s->side, s->side, 1, 0, conv->size / 2};
}

/* What was left in *map becomes the current one. */
static void take_map(struct vq_state *s, float **map, int side, int c) {
    float *x = s->x;
    s->x = *map;
    *map = x;
    s->side = side;
    s->c = c;
}

/* x = conv(x), or conv(silu(x * scale + shift)) */
static void conv2d_x(const struct exec *e, struct vq_state *s, const struct conv *conv,
                     struct conv_geometry g, int normed) {
    conv2d(e, s, conv, g, normed, s->x, NULL, s->t);
    take_map(s, &s->t, g.side_out, conv->w.rows);
}

/* ---- GroupNorm ---- */

struct groupnorm_job {
    const struct exec *e;
    const struct vq_state *s;
    const float *in;               /* [pixels][c] */
    float *out;
    int64_t pixels;
    int c;
};

/* Sums and sums of squares of each channel over NORM_PIXELS pixels: floats over 64 pixels, doubles
   from there on. */
static void groupnorm_sum_task(void *arg, int task, int thread) {
    const struct groupnorm_job *job = arg;
    int64_t first = (int64_t)task * NORM_PIXELS, last = min64(job->pixels, first + NORM_PIXELS);
    double *sum = job->s->sums + (int64_t)task * 2 * job->c, *square = sum + job->c;
    float *sum64 = exec_scratch(job->e, thread), *square64 = sum64 + job->c;
    memset(sum, 0, 2 * (size_t)job->c * sizeof *sum);
    for (; first < last; first += 64) {
        job->e->kern->conv.channel_sums(job->in + first * job->c, min64(64, last - first), job->c,
                                        sum64, square64);
        for (int i = 0; i < job->c; i++) sum[i] += sum64[i], square[i] += square64[i];
    }
}

static void groupnorm_apply_task(void *arg, int task, int thread) {
    const struct groupnorm_job *job = arg;
    int64_t first = (int64_t)task * NORM_PIXELS, n = min64(NORM_PIXELS, job->pixels - first);
    (void)thread;
    job->e->kern->conv.scale_shift(job->in + first * job->c, job->s->scale, job->s->shift, 0, n,
                                   job->c, job->out + first * job->c);
}

/* s->scale and shift such that norm(in) = in * scale + shift: once mean and variance of a group are
   known, all of it is one multiply-add a channel. in: a map of s->side. */
static void groupnorm_scales(const struct exec *e, const struct vq_state *s,
                             const struct groupnorm *norm, const float *in) {
    int64_t pixels = (int64_t)s->side * s->side;
    int c = norm->scale.rows, width = c / GROUPS;
    int tasks = (int)((pixels + NORM_PIXELS - 1) / NORM_PIXELS);
    struct groupnorm_job job = {e, s, in, NULL, pixels, c};
    pool_run(e->pool, tasks, groupnorm_sum_task, &job);
    for (int g = 0; g < GROUPS; g++) {
        double sum = 0, square = 0, count = (double)pixels * width;
        for (int t = 0; t < tasks; t++)
            for (int i = g * width; i < (g + 1) * width; i++) {
                sum += s->sums[(int64_t)t * 2 * c + i];
                square += s->sums[((int64_t)t * 2 + 1) * c + i];
            }
        double mean = sum / count, variance = square / count - mean * mean;
        double r = 1 / sqrt((variance > 0 ? variance : 0) + 1e-6);
        for (int i = g * width; i < (g + 1) * width; i++) {
            float scale = floats(&norm->scale)[i], shift = floats(&norm->shift)[i];
            s->scale[i] = (float)(scale * r);
            s->shift[i] = (float)(shift - mean * scale * r);
        }
    }
}

/* out = norm(x), for an attention; convolutions normalise what they read themselves. */
static void groupnorm(const struct exec *e, const struct vq_state *s, const struct groupnorm *norm,
                      float *out) {
    int64_t pixels = (int64_t)s->side * s->side;
    struct groupnorm_job job = {e, s, s->x, out, pixels, s->c};
    groupnorm_scales(e, s, norm, s->x);
    pool_run(e->pool, (int)((pixels + NORM_PIXELS - 1) / NORM_PIXELS), groupnorm_apply_task, &job);
}

/* ---- The operations; each turns the current feature map into the next ---- */

/* x = x + conv2(silu(norm2(conv1(silu(norm1(x)))))) */
static void run_residual(const struct exec *e, struct vq_state *s, const struct vq_op *op) {
    const struct conv *conv1 = &op->conv[0], *conv2 = &op->conv[1], *shortcut = &op->conv[2];
    groupnorm_scales(e, s, &op->norm[0], s->x);
    conv2d(e, s, conv1, same_size(s, conv1), 1, s->x, NULL, s->t);
    groupnorm_scales(e, s, &op->norm[1], s->t);
    if (shortcut->w.data == NULL) {
        conv2d(e, s, conv2, same_size(s, conv2), 1, s->t, s->x, s->x);
        return;
    }
    conv2d(e, s, shortcut, same_size(s, shortcut), 0, s->x, NULL, s->u);
    conv2d(e, s, conv2, same_size(s, conv2), 1, s->t, s->u, s->u);
    take_map(s, &s->u, s->side, op->c_out);
}

struct vq_attention_job {
    const struct exec *e;
    const struct vq_state *s;
    int n, c;                      /* pixels, channels */
};

/* Packs a block of keys and values as attend_block reads them; keys beyond n are zeros. */
static void vq_pack_keys_task(void *arg, int block, int thread) {
    const struct vq_attention_job *job = arg;
    const struct vq_state *s = job->s;
    int64_t c = job->c, first = (int64_t)block * KV_BLOCK;
    float *k = s->k_panels + first * c, *v = s->v_panels + first * c;
    (void)thread;
    for (int key = 0; key < KV_BLOCK; key++)
        for (int i = 0; i < c; i++) {
            int inside = first + key < job->n;
            int64_t from = (first + key) * c + i;
            k[((key / PANEL) * c + i) * PANEL + key % PANEL] = inside ? s->k[from] : 0;
            v[((i / PANEL) * KV_BLOCK + key) * PANEL + i % PANEL] = inside ? s->v[from] : 0;
        }
}

/* t = softmax(q k^T / sqrt(c)) v for QUERY_ROWS pixels. */
static void vq_attention_task(void *arg, int task, int thread) {
    const struct vq_attention_job *job = arg;
    const struct vq_state *s = job->s;
    int64_t c = job->c;
    int r0 = task * QUERY_ROWS, n = job->n - r0 < QUERY_ROWS ? job->n - r0 : QUERY_ROWS;
    struct query rows[QUERY_ROWS];
    for (int r = 0; r < n; r++) {
        float *o = s->t + (r0 + r) * c;
        memset(o, 0, (size_t)c * sizeof *o);
        rows[r] = (struct query){s->q + (r0 + r) * c, o, -HUGE_VALF, 0, 0, NULL};
    }
    for (int first = 0; first < job->n; first += KV_BLOCK) {
        for (int r = 0; r < n; r++)
            rows[r].keys = job->n - first < KV_BLOCK ? job->n - first : KV_BLOCK;
        attend_block(job->e->kern, rows, n, job->c, s->k_panels + first * c,
                     s->v_panels + first * c, 1 / sqrtf((float)c), exec_scratch(job->e, thread));
    }
    for (int r = 0; r < n; r++)
        for (int i = 0; i < c; i++) rows[r].o[i] /= rows[r].l;
}

/* x = x + proj(attention(q, k, v)), each of them a 1 x 1 convolution of norm(x) */
static void run_vq_attention(const struct exec *e, struct vq_state *s, const struct vq_op *op) {
    struct conv_geometry g = same_size(s, &op->conv[0]);
    struct vq_attention_job job = {e, s, s->side * s->side, s->c};
    float *out[] = {s->q, s->k, s->v};
    groupnorm(e, s, &op->norm[0], s->t);
    for (int i = 0; i < 3; i++) conv2d(e, s, &op->conv[i], g, 0, s->t, NULL, out[i]);
    pool_run(e->pool, (job.n + KV_BLOCK - 1) / KV_BLOCK, vq_pack_keys_task, &job);
    pool_run(e->pool, (job.n + QUERY_ROWS - 1) / QUERY_ROWS, vq_attention_task, &job);
    conv2d(e, s, &op->conv[3], g, 0, s->t, s->x, s->x);
}

/* Half the side: a convolution of stride 2 over the map with a row and a column of zeros behind it,
   or the mean of four pixels. */
static void run_down(const struct exec *e, struct vq_state *s, const struct vq_op *op) {
    int side = op->side_out, c = s->c;
    if (op->conv[0].w.data != NULL) {
        conv2d_x(e, s, &op->conv[0], (struct conv_geometry){s->side, side, 2, 0, 0}, 0);
        return;
    }
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++)
            for (int i = 0; i < c; i++) {
                const float *p = s->x + ((int64_t)2 * y * s->side + 2 * x) * c + i;
                float sum = p[0] + p[c] + p[(int64_t)s->side * c] + p[(int64_t)(s->side + 1) * c];
                s->t[((int64_t)y * side + x) * c + i] = sum * 0.25f;
            }
    take_map(s, &s->t, side, c);
}

/* Twice the side: each pixel four times, then a convolution or nothing. */
static void run_up(const struct exec *e, struct vq_state *s, const struct vq_op *op) {
    int side = op->side_out, c = s->c;
    if (op->conv[0].w.data != NULL) {
        conv2d_x(e, s, &op->conv[0], (struct conv_geometry){s->side, side, 1, 1, 1}, 0);
        return;
    }
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++)
            memcpy(s->t + ((int64_t)y * side + x) * c,
                   s->x + ((int64_t)(y / 2) * s->side + x / 2) * c, (size_t)c * sizeof *s->x);
    take_map(s, &s->t, side, c);
}

static void run_op(const struct exec *e, struct vq_state *s, const struct vq_op *op) {
    const struct conv *conv = &op->conv[0];
    switch (op->kind) {
    case VQ_CONV_3X3:
    case VQ_CONV_1X1: conv2d_x(e, s, conv, same_size(s, conv), 0); break;
    case VQ_RESIDUAL: run_residual(e, s, op); break;
    case VQ_ATTENTION: run_vq_attention(e, s, op); break;
    case VQ_DOWN: run_down(e, s, op); break;
    case VQ_UP: run_up(e, s, op); break;
    case VQ_HEAD: /* x = conv_out(silu(norm_out(x))) */
        groupnorm_scales(e, s, &op->norm[0], s->x);
        conv2d_x(e, s, conv, same_size(s, conv), 1);
    }
}

/* ---- The vector quantiser ---- */

/* ids[n]: for each x[n][code_dim] the row of the codebook nearest to it. |x - e|^2 is |x|^2 - 2 x.e
   + |e|^2, of which |x|^2 is the same for all rows; of equally near ones the first. */
static void vector_quantize(const struct exec *e, const struct vqgan *vq, const struct vq_state *s,
                            const float *x, int n, int32_t *ids) {
    struct exec exact = *e;
    exact.exact = 1;
    for (int r0 = 0; r0 < n; r0 += VQ_ROWS) {
        int rows = n - r0 < VQ_ROWS ? n - r0 : VQ_ROWS;
        matmul(&exact, &vq->codebook, NULL, x + (int64_t)r0 * vq->code_dim, rows, s->dots);
        for (int r = 0; r < rows; r++) {
            const float *dot = s->dots + (int64_t)r * vq->codes;
            float best = HUGE_VALF;
            ids[r0 + r] = 0;
            for (int i = 0; i < vq->codes; i++) {
                float distance = s->code_norms[i] - 2 * dot[i];
                if (distance < best) best = distance, ids[r0 + r] = i;
            }
        }
    }
}

/* ---- The two directions ---- */

/* rgb[R][R][3] -> ids[S * S]; latent: NULL, or the vectors in front of the quantiser,
   [S * S][code_dim]. at: where the progress of this image begins, of all. */
static int vq_encode(const struct exec *e, const struct vqgan *vq, struct vq_state *s,
                     const uint8_t *rgb, int64_t at, int64_t all, int32_t *ids, float *latent,
                     lvm_error *error) {
    int n = vq->S * vq->S, code = LVM_OK;
    for (int p = 0; p < vq->R * vq->R * 3; p++) s->x[p] = (float)rgb[p] / 255;
    s->side = vq->R;
    s->c = 3;
    for (int i = 0; code == LVM_OK && i < vq->n_encoder; i++) {
        code = report(e->o, "encode", at + i, all, error);
        if (code == LVM_OK) run_op(e, s, &vq->ops[i]);
    }
    if (code != LVM_OK) return code;
    if (latent != NULL) memcpy(latent, s->x, (size_t)n * (size_t)vq->code_dim * sizeof *latent);
    vector_quantize(e, vq, s, s->x, n, ids);
    return LVM_OK;
}

/* ids[S * S] -> the current map, [R][R][3], about 0 to 1 but not clamped. */
static int vq_decode(const struct exec *e, const struct vqgan *vq, struct vq_state *s,
                     const int32_t *ids, int64_t at, int64_t all, lvm_error *error) {
    int code = LVM_OK;
    for (int p = 0; p < vq->S * vq->S; p++)
        e->kern->elementwise.to_f32(vq->codebook.type, tensor_row(&vq->codebook, ids[p]),
                                    s->x + (int64_t)p * vq->code_dim, vq->code_dim);
    s->side = vq->S;
    s->c = vq->code_dim;
    for (int i = vq->n_encoder; code == LVM_OK && i < vq->n_ops; i++) {
        code = report(e->o, "decode", at + i - vq->n_encoder, all, error);
        if (code == LVM_OK) run_op(e, s, &vq->ops[i]);
    }
    return code;
}

/* ---- Memory ---- */

static void vq_state_free(struct vq_state *s) {
    float *all[] = {s->x, s->t, s->u,        s->scale,    s->shift,  s->q,     s->k,
                    s->v, s->k_panels, s->v_panels, s->packed, s->zeros, s->dots, s->code_norms};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) mem_free(all[i]);
    mem_free(s->sums);
    memset(s, 0, sizeof *s);
}

/* The largest numbers of the list of operations: floats of a map, floats of an attention's queries
   rounded up to whole blocks of keys, channels. */
static void vq_largest(const struct vqgan *vq, int64_t *map, int64_t *attention, int *c) {
    *map = *attention = *c = 0;
    for (int i = 0; i < vq->n_ops; i++) {
        const struct vq_op *op = &vq->ops[i];
        int64_t in = (int64_t)op->side_in * op->side_in, out = (int64_t)op->side_out * op->side_out;
        *map = max64(*map, max64(in * op->c_in, out * op->c_out));
        *c = (int)max64(*c, max64(op->c_in, op->c_out));
        if (op->kind == VQ_ATTENTION)
            *attention = max64(*attention, (in + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK * op->c_in);
    }
}

/* Scratch floats that a thread needs for the tokenizer. */
static int64_t vq_scratch(const struct vqgan *vq, const struct kernels *kern) {
    int64_t map, attention;
    int c;
    vq_largest(vq, &map, &attention, &c);
    return max64(max64(conv2d_scratch(c), attend_scratch(c)), matmul_scratch(kern, vq->code_dim));
}

static int vq_state_alloc(struct vq_state *s, const struct exec *e, const struct vqgan *vq,
                          lvm_error *error) {
    int64_t map, attn, tasks = ((int64_t)vq->R * vq->R + NORM_PIXELS - 1) / NORM_PIXELS;
    int c;
    vq_largest(vq, &map, &attn, &c);
    struct { float **p; int64_t n; } want[] = {
        {&s->x, map}, {&s->t, map}, {&s->u, map}, {&s->scale, c}, {&s->shift, c}, {&s->zeros, c},
        {&s->q, attn}, {&s->k, attn}, {&s->v, attn}, {&s->k_panels, attn}, {&s->v_panels, attn},
        {&s->packed, conv2d_packed(c)}, {&s->dots, VQ_ROWS * (int64_t)vq->codes},
        {&s->code_norms, vq->codes}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        *want[i].p = mem_alloc((size_t)want[i].n, sizeof(float), error);
        if (*want[i].p == NULL) return LVM_MEMORY;
        s->bytes += want[i].n * (int64_t)sizeof(float);
    }
    s->sums = mem_alloc((size_t)(tasks * 2 * c), sizeof *s->sums, error);
    if (s->sums == NULL) return LVM_MEMORY;
    s->bytes += tasks * 2 * c * (int64_t)sizeof *s->sums;
    for (int i = 0; i < vq->codes; i++) {
        double sum = 0;
        e->kern->elementwise.to_f32(vq->codebook.type, tensor_row(&vq->codebook, i), e->scratch,
                                    vq->code_dim);
        for (int j = 0; j < vq->code_dim; j++) sum += (double)e->scratch[j] * e->scratch[j];
        s->code_norms[i] = (float)sum;
    }
    return LVM_OK;
}

#endif /* LVM_INTERNAL */

/* =================================================================================================
   Chapter 6.  The transformer: RMSNorm, RoPE, attention with a KV cache, SwiGLU

   LLaMA's decoder (Touvron et al. 2023, arXiv 2302.13971), as Hugging Face's LlamaForCausalLM
   computes it. For each layer and each row x[D], one token at position p:

       h = rmsnorm(x);  q, k, v = Wq h, Wk h, Wv h  (+ biases)
       rotate q and k by RoPE (Su et al. 2021, arXiv 2104.09864): dimensions i and i + d/2 of a head
           turn as a pair by the angle p * theta^(-2i/d), in float32 as the checkpoints' authors did
       x += Wo attention(q, keys 0..p, values 0..p)    query head j reads key/value head j G / H
       h = rmsnorm(x);  x += Wdown (silu(Wgate h) * (Wup h))

   and at the end  logits = Wout rmsnorm(x). That a row sees keys 0..p alone is the causal mask: a
   token never looks at those behind it, so that all rows of a prompt can be computed at once
   (prefill), and the next token needs nothing of them but their keys and values, kept in the KV
   cache (generate).

       sequence 0   [page 0] [page 1] [page 2]
                        |        |                a page: 256 positions of all layers and heads, the
       sequence 1   ....+........+....[page 3]    same 256 that attention merges as a block

   The cache is paged (as in Kwon et al. 2023, arXiv 2309.06180): a sequence is a list of pages;
   sequences that begin alike share them, and a shared page is copied on write (candidates of one
   prompt differ only behind it). In a page, for each layer and key/value head, keys and values lie
   in panels (see attend_block), in one of three types:

       f32, f16   k[16 panels][dp][16 keys]             v[dp / 16][256 keys][16]
       q8_0       quantised panels: chapter 12

   with dp = d rounded up to a multiple of 32, zeros beyond. */

/* Rows for a forward pass, and what is wanted of them. Row i appends tokens[i] to sequence seqs[i];
   several rows of one sequence follow each other in it. */
struct batch {
    int n;                   /* 1 .. limits.rows */
    const int32_t *tokens;   /* [n] */
    const int *seqs;         /* [n] */
    int n_out;               /* rows of which something is wanted, ascending; 0 .. n */
    const int *out;          /* [n_out] */
    float *logits; /* [n_out][V]: the scores of the token behind each; or NULL, and then */
    const int32_t *targets;  /* [n_out]: the tokens behind them, */
    float *nll;              /* [n_out]: -ln of their probabilities, in nats */
};

#ifndef LVM_INTERNAL

enum {
    MAX_ROWS = 512,      /* rows that pass the layers together */
    MAX_SEQUENCES = 64,  /* candidates that generate together */
    TASK_ROWS = 128,     /* query rows that share a page's keys and values once loaded */
    NLL_ROWS = 64        /* rows of logits at a time where only likelihoods are wanted */
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
    size_t page_bytes;            /* [L][G][2: keys, values][head_bytes] */
    struct sequence seq[MAX_SEQUENCES];
};

struct lm_state {
    float *x, *h, *delta; /* [N][D]: the residual stream; normed; what is added to it next */
    float *q, *k, *v;             /* [N][H d]  [N][G d]  [N][G d] */
    float *qp, *op;               /* [N][H][dp]: rotated queries and attention's answers, padded */
    float *o;                     /* [N][H d] */
    float *gate, *up;             /* [N][F] */
    float *rope;                  /* [N][2][d / 2]: cosines, sines */
    float *inv_freq;              /* [d / 2] */
    float *logits;                /* [NLL_ROWS][V] */
    int64_t bytes;                /* of these; the cache grows */
    struct kv_cache kv;
};

/* ---- The paged cache ---- */

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
    if (p->data == NULL) {
        mem_free(p);
        return NULL;
    }
    return p;
}

/* Copy on write: makes the page of position pos present and private to the sequence. */
static int page_make_private(const struct kv_cache *kv, struct sequence *s, int pos,
                             lvm_error *error) {
    struct page **slot = &s->pages[pos / KV_BLOCK];
    if (*slot != NULL && (*slot)->refs == 1) return LVM_OK;
    struct page *fresh = page_new(kv, error);
    if (fresh == NULL) return LVM_MEMORY;
    if (*slot != NULL) memcpy(fresh->data, (*slot)->data, kv->page_bytes);
    page_release(slot);
    *slot = fresh;
    return LVM_OK;
}

/* Keeps the first n tokens. */
static void sequence_trim(const struct kv_cache *kv, struct sequence *s, int n) {
    if (n >= s->n) return;
    s->n = n;
    for (int i = (n + KV_BLOCK - 1) / KV_BLOCK; i < kv->max_pages; i++) page_release(&s->pages[i]);
}

/* Keys of key/value head g in a page; its values lie kv->head_bytes behind them. */
static uint8_t *page_head(const struct kv_cache *kv, const struct page *p, const struct llama *a,
                          int layer, int g) {
    return p->data + ((int64_t)layer * a->G + g) * 2 * kv->head_bytes;
}

/* On a quantised cache (chapter 12): stores one key and value, k[dp] and v[dp], at position `at` of
   a page; and attend_block on such a page, before what lies at `next` is read. */
static void store_kv8(const struct kernels *kern, const struct kv_cache *kv, uint8_t *head, int at,
                      const float *k, const float *v);
static void attend_block_kv8(const struct kernels *kern, const struct kv_cache *kv,
                             const uint8_t *head, const uint8_t *next, struct query *rows, int n,
                             float scale, float *scratch);

/* The same on a cache of floats: the key becomes a column of its panel, k[dp][16 keys], the value a
   row of each of its panels, v[256 keys][16]. */
static void store_kv(const struct kv_cache *kv, uint8_t *head, int at, const float *k,
                     const float *v) {
    int64_t column = (int64_t)at / PANEL * kv->dp * PANEL + at % PANEL,
            bytes = type_bytes(kv->type, 1);
    for (int i = 0; i < kv->dp; i++) {
        if (kv->type == LVM_F32) ((float *)(void *)head)[column + i * PANEL] = k[i];
        else ((uint16_t *)(void *)head)[column + i * PANEL] = f32_to_f16(k[i]);
    }
    for (int i = 0; i < kv->dp; i += PANEL)
        row_from_f32(kv->type, v + i,
                     head + kv->head_bytes + ((int64_t)i * KV_BLOCK + at * PANEL) * bytes, PANEL);
}

/* ---- One forward pass ---- */

struct lm_job {
    const struct exec *e;
    const struct llama *a;
    struct lm_state *s;
    const struct layer *l;
    int layer, rows, first;          /* the current step is for rows first .. rows - 1 */
    const int *which;                /* rows of a norm; NULL: all from first on */
    const float *norm;               /* weights of the current RMSNorm */
    int has_delta;
    const int32_t *tokens;
    int seq[MAX_ROWS], pos[MAX_ROWS];
};

/* theta^(-2i/d), how fast pair i turns from position to position. */
static float rope_frequency(const struct llama *a, int i) {
    float power = (float)(2 * i) / (float)a->d;
    return 1 / (float)exp_f64((double)power * log_f64(a->theta));
}

/* x = the token's row of the embedding; and the cosines and sines of its position. */
static void embed_task(void *arg, int r, int thread) {
    struct lm_job *job = arg;
    const struct llama *a = job->a;
    float *cosines = job->s->rope + (int64_t)r * a->d, *sines = cosines + a->d / 2;
    (void)thread;
    job->e->kern->elementwise.to_f32(a->embed.type, tensor_row(&a->embed, job->tokens[r]),
                                     job->s->x + (int64_t)r * a->D, a->D);
    for (int i = 0; i < a->d / 2; i++) {
        double sine, cosine;
        float angle = (float)job->pos[r] * job->s->inv_freq[i];
        sincos_f64(angle, &sine, &cosine);
        cosines[i] = (float)cosine;
        sines[i] = (float)sine;
    }
}

/* x += delta; h = rmsnorm(x). With `which`, row which[task] of x to row `task` of h. */
static void norm_task(void *arg, int task, int thread) {
    struct lm_job *job = arg;
    int64_t D = job->a->D, row = job->which != NULL ? job->which[task] : job->first + task;
    float *x = job->s->x + row * D, *h = job->s->h + (job->which != NULL ? task : row) * D;
    (void)thread;
    for (int64_t i = 0; job->has_delta && i < D; i++) x[i] += job->s->delta[row * D + i];
    job->e->kern->elementwise.rmsnorm(x, job->norm, job->a->eps, (int)D, h);
}

/* RoPE on one head: pairs (i, i + d/2) turn by their angle. */
static void rotate(const float *x, const float *cosines, const float *sines, int d, float *y) {
    int half = d / 2;
    for (int i = 0; i < half; i++) {
        y[i] = x[i] * cosines[i] - x[i + half] * sines[i];
        y[i + half] = x[i + half] * cosines[i] + x[i] * sines[i];
    }
}

/* Rotates a row's queries into their padded place, its keys and values into the cache. */
static void rope_store_task(void *arg, int r, int thread) {
    struct lm_job *job = arg;
    const struct llama *a = job->a;
    struct lm_state *s = job->s;
    const struct kv_cache *kv = &s->kv;
    const float *cosines = s->rope + (int64_t)r * a->d, *sines = cosines + a->d / 2;
    float *key = exec_scratch(job->e, thread), *value = key + kv->dp;
    const struct page *page = kv->seq[job->seq[r]].pages[job->pos[r] / KV_BLOCK];
    memset(key, 0, 2 * (size_t)kv->dp * sizeof *key);
    for (int h = 0; h < a->H && r >= job->first; h++)
        rotate(s->q + ((int64_t)r * a->H + h) * a->d, cosines, sines, a->d,
               s->qp + ((int64_t)r * a->H + h) * kv->dp);
    for (int g = 0; g < a->G; g++) {
        int64_t from = ((int64_t)r * a->G + g) * a->d;
        uint8_t *head = page_head(kv, page, a, job->layer, g);
        rotate(s->k + from, cosines, sines, a->d, key);
        memcpy(value, s->v + from, (size_t)a->d * sizeof *value);
        if (kv->type == LVM_Q8_0)
            store_kv8(job->e->kern, kv, head, job->pos[r] % KV_BLOCK, key, value);
        else store_kv(kv, head, job->pos[r] % KV_BLOCK, key, value);
    }
}

/* n query rows, all of which read the same page, against key/value head g of that page. */
static void attend_page(struct lm_job *job, const struct page *page, int g, const uint8_t *next,
                        struct query *rows, int n, float *scratch) {
    const struct kv_cache *kv = &job->s->kv;
    const struct kernels *kern = job->e->kern;
    const uint8_t *head = page_head(kv, page, job->a, job->layer, g),
                  *values = head + kv->head_bytes;
    float *kf = scratch + attend_scratch(kv->dp), *vf = kf + (int64_t)KV_BLOCK * kv->dp;
    float scale = 1 / sqrtf((float)job->a->d);
    int keys = 0;
    for (int r = 0; r < n; r++) keys = rows[r].keys > keys ? rows[r].keys : keys;
    const float *k = (const float *)(const void *)head, *v = (const float *)(const void *)values;
    if (kv->type == LVM_F16) { /* panels of keys as far as they go; of values the first keys */
        kern->elementwise.to_f32(LVM_F16, head, kf, (int64_t)round_up(keys, PANEL) * kv->dp);
        for (int64_t at = 0; at < (int64_t)KV_BLOCK * kv->dp; at += KV_BLOCK * PANEL)
            kern->elementwise.to_f32(LVM_F16, values + at * 2, vf + at, (int64_t)keys * PANEL);
        k = kf;
        v = vf;
    }
    for (int r = 0; r < n; r += QUERY_ROWS) {
        int count = n - r < QUERY_ROWS ? n - r : QUERY_ROWS;
        if (kv->type == LVM_Q8_0)
            attend_block_kv8(kern, kv, head, next, rows + r, count, scale, scratch);
        else attend_block(kern, rows + r, count, kv->dp, k, v, scale, scratch);
    }
}

/* What a task reads when it is done with head g of a sequence's page b: the same head of the next
   page, or the thread's next task, the next head from the first page on. */
static const uint8_t *next_head(const struct lm_job *job, struct page *const *pages, int b,
                                int last, int g) {
    int again = b == last;
    return page_head(&job->s->kv, pages[again ? 0 : b + 1], job->a, job->layer, g + again);
}

/* Tasks of one key/value head. Its query rows are numbered i: token i / (H/G), the i % (H/G)th of
   the H/G query heads that share it. */
static int attention_chunks(const struct lm_job *job) {
    int queries = (job->rows - job->first) * (job->a->H / job->a->G);
    return (queries + TASK_ROWS - 1) / TASK_ROWS;
}

/* Query rows i0 .. i0 + n - 1 of head g against block b: each page is read once for all
   neighbouring rows that share it. */
static void attend_rows(struct lm_job *job, int g, int i0, int n, int b, struct query *rows,
                        float *scratch) {
    const struct sequence *seq = job->s->kv.seq;
    int group = job->a->H / job->a->G;
    for (int i = 0; i < n;) {
        struct page *const *pages = seq[job->seq[(i0 + i) / group]].pages;
        int j = i, last = job->pos[(i0 + i) / group] / KV_BLOCK;
        for (; j < n; j++) {
            int r = (i0 + j) / group, keys = job->pos[r] + 1 - b * KV_BLOCK;
            if (keys <= 0 || seq[job->seq[r]].pages[b] != pages[b]) break;
            rows[j].keys = keys < KV_BLOCK ? keys : KV_BLOCK;
        }
        if (j > i)
            attend_page(job, pages[b], g, next_head(job, pages, b, last, g), rows + i, j - i,
                        scratch);
        i = j > i ? j : i + 1;
    }
}

/* o = softmax(q K^T / sqrt(d)) V for up to TASK_ROWS query rows of one key/value head. */
static void attention_task(void *arg, int task, int thread) {
    struct lm_job *job = arg;
    const struct llama *a = job->a;
    const struct kv_cache *kv = &job->s->kv;
    int group = a->H / a->G, all = job->rows * group, chunks = attention_chunks(job);
    int g = task / chunks, i0 = job->first * group + task % chunks * TASK_ROWS, last = 0;
    int n = all - i0 < TASK_ROWS ? all - i0 : TASK_ROWS;
    float *scratch = exec_scratch(job->e, thread);
    struct query_block *x = (struct query_block *)(void *)(scratch + attend_scratch(kv->dp));
    struct query rows[TASK_ROWS];
    for (int i = 0; i < n; i++, x += kv->dp / QK) {
        int r = (i0 + i) / group, h = g * group + (i0 + i) % group;
        int64_t at = ((int64_t)r * a->H + h) * kv->dp;
        memset(job->s->op + at, 0, (size_t)kv->dp * sizeof(float));
        rows[i] = (struct query){job->s->qp + at, job->s->op + at, -HUGE_VALF, 0, 0, x};
        if (kv->type == LVM_Q8_0) job->e->kern->attention.quantize_query(rows[i].q, x, kv->dp);
        last = job->pos[r] > last ? job->pos[r] : last;
    }
    for (int b = 0; b <= last / KV_BLOCK; b++) attend_rows(job, g, i0, n, b, rows, scratch);
    for (int i = 0; i < n; i++) {
        int r = (i0 + i) / group, h = g * group + (i0 + i) % group;
        float *o = job->s->o + ((int64_t)r * a->H + h) * a->d;
        for (int k = 0; k < a->d; k++) o[k] = rows[i].o[k] / rows[i].l;
    }
}

static void swiglu_task(void *arg, int task, int thread) {
    struct lm_job *job = arg;
    int64_t F = job->a->F, at = (job->first + task) * F;
    (void)thread;
    job->e->kern->elementwise.silu_mul(job->s->gate + at, job->s->up + at, F);
}

/* x += delta, h = rmsnorm(x), for rows from `first` on. */
static void norm_rows(struct lm_job *job, const struct tensor *norm, int first, int has_delta) {
    job->norm = floats(norm);
    job->first = first;
    job->has_delta = has_delta;
    pool_run(job->e->pool, job->rows - first, norm_task, job);
}

/* One layer, for N rows. Rows before `from` only leave their keys and values: of the last layer
   nobody asks more of rows of which nothing is wanted. What the layer adds to x is left in
   delta. */
static void run_layer(struct lm_job *job, int from) {
    const struct exec *e = job->e;
    const struct llama *a = job->a;
    const struct layer *l = job->l;
    struct lm_state *s = job->s;
    int N = job->rows, n = N - from, apart = from > 0; /* apart: queries of fewer rows than keys */
    int64_t D = a->D, Q = (int64_t)a->H * a->d, F = a->F;
    float *h = s->h + from * D, *delta = s->delta + from * D, *q = s->q + from * Q,
          *o = s->o + from * Q, *gate = s->gate + from * F, *up = s->up + from * F;
    const struct matmul_output qkv[] = {{&l->q, floats(&l->q_bias), q},
                                        {&l->k, floats(&l->k_bias), s->k},
                                        {&l->v, floats(&l->v_bias), s->v}};
    const struct matmul_output gate_up[] = {{&l->gate, NULL, gate}, {&l->up, NULL, up}};

    norm_rows(job, &l->attn_norm, 0, job->layer > 0);           /* h[N][D] = rmsnorm(x += delta) */
    matmul_all(e, qkv + apart, 3 - apart, s->h, N);             /* q[N][H d], k and v[N][G d] */
    if (apart && n > 0) matmul(e, &l->q, floats(&l->q_bias), h, n, q);
    job->first = from;
    pool_run(e->pool, N, rope_store_task, job); /* qp[n][H][dp]; k, v to the cache */
    if (n == 0) return;
    pool_run(e->pool, a->G * attention_chunks(job), attention_task, job);          /* o[n][H d] */
    matmul(e, &l->o, floats(&l->o_bias), o, n, delta);          /* delta[n][D] = Wo o */

    norm_rows(job, &l->ffn_norm, from, 1);                      /* h[n][D] = rmsnorm(x += delta) */
    matmul_all(e, gate_up, 2, h, n);                            /* gate, up[n][F] */
    pool_run(e->pool, n, swiglu_task, job);                     /* gate = silu(gate) * up */
    matmul(e, &l->down, NULL, gate, n, delta);                  /* delta[n][D] = Wdown gate */
}

/* p, 0 to 1, to a multiple of 2^-37: in doubles sums of up to 65536 such are exact, so that a
   device may add in any order. */
static float summand(float p) { return p < 0x1p-14f ? p + 0x1p-14f - 0x1p-14f : p; }

/* -ln softmax(logits[n])[id], in nats */
static float negative_log_likelihood(const float *logits, int n, int32_t id) {
    float max = logits[0];
    double sum = 0;
    for (int i = 1; i < n; i++) max = logits[i] > max ? logits[i] : max;
    for (int i = 0; i < n; i++) sum += summand(exp_f32(logits[i] - max));
    return (float)(log_f64(sum) - ((double)logits[id] - max));
}

struct nll_job {
    const float *logits;     /* [n][V] */
    int V;
    const int32_t *targets;  /* [n] */
    float *nll;              /* [n] */
};

static void nll_task(void *arg, int r, int thread) {
    const struct nll_job *job = arg;
    (void)thread;
    job->nll[r] = negative_log_likelihood(job->logits + (int64_t)r * job->V, job->V,
                                          job->targets[r]);
}

/* What is wanted of the rows, once they have passed all layers. */
static void run_head(struct lm_job *job, const struct batch *b) {
    const struct llama *a = job->a;
    const float *h = job->s->h;
    job->which = b->out;
    job->rows = b->n_out;
    norm_rows(job, &a->norm, 0, 1); /* h[n_out][D] */
    if (b->logits != NULL) matmul(job->e, &a->output, NULL, h, b->n_out, b->logits);
    for (int at = 0; b->logits == NULL && at < b->n_out; at += NLL_ROWS) {
        int n = b->n_out - at < NLL_ROWS ? b->n_out - at : NLL_ROWS;
        struct nll_job nll = {job->s->logits, a->V, b->targets + at, b->nll + at};
        matmul(job->e, &a->output, NULL, h + (int64_t)at * a->D, n, job->s->logits);
        pool_run(job->e->pool, n, nll_task, &nll);
    }
}

/* Appends a batch to its sequences and computes what is wanted of it. After a failure the sequences
   are as they were. */
static int run_layers(const struct exec *e, const struct llama *a, struct lm_state *s,
                      const struct batch *b, lvm_error *error) {
    struct lm_job job = {.e = e, .a = a, .s = s, .rows = b->n, .tokens = b->tokens};
    int code = LVM_OK, done = 0, from = b->n_out > 0 ? b->out[0] : b->n;
    for (; code == LVM_OK && done < b->n; done++) {
        struct sequence *seq = &s->kv.seq[b->seqs[done]];
        code = page_make_private(&s->kv, seq, seq->n, error);
        job.seq[done] = b->seqs[done];
        job.pos[done] = seq->n++;
    }
    if (code == LVM_OK) pool_run(e->pool, b->n, embed_task, &job);
    for (int i = 0; code == LVM_OK && i < a->L; i++) {
        job.l = &a->layers[i];
        job.layer = i;
        run_layer(&job, i + 1 < a->L ? 0 : from);
        if (b->n > 1) code = report(e->o, "layers", i + 1, a->L, error);
    }
    if (code == LVM_OK && b->n_out > 0) run_head(&job, b);
    if (code != LVM_OK)
        for (int i = done - 1; i >= 0; i--)
            sequence_trim(&s->kv, &s->kv.seq[b->seqs[i]], job.pos[i]);
    return code;
}

/* ---- Memory ---- */

static void lm_state_free(struct lm_state *s) {
    float *all[] = {s->x,  s->h, s->delta, s->q,  s->k,    s->v,        s->qp,
                    s->op, s->o, s->gate,  s->up, s->rope, s->inv_freq, s->logits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) mem_free(all[i]);
    for (int i = 0; i < MAX_SEQUENCES; i++) {
        for (int p = 0; s->kv.seq[i].pages != NULL && p < s->kv.max_pages; p++)
            page_release(&s->kv.seq[i].pages[p]);
        mem_free(s->kv.seq[i].pages);
    }
    memset(s, 0, sizeof *s);
}

static int kv_setup(struct kv_cache *kv, const struct llama *a, int type, lvm_error *error) {
    kv->type = type;
    kv->dp = round_up(a->d, QK);
    kv->max_pages = (a->context + KV_BLOCK - 1) / KV_BLOCK;
    kv->head_bytes = type_bytes(type, (int64_t)kv->dp * KV_BLOCK);
    if (!mul_fits((size_t)kv->head_bytes, (size_t)a->G * 2 * (size_t)a->L, &kv->page_bytes))
        return fail(error, LVM_MEMORY, "the key/value cache does not fit memory");
    for (int s = 0; s < MAX_SEQUENCES; s++) {
        kv->seq[s].pages = mem_alloc((size_t)kv->max_pages, sizeof *kv->seq[s].pages, error);
        if (kv->seq[s].pages == NULL) return LVM_MEMORY;
    }
    return LVM_OK;
}

_Static_assert(TASK_ROWS * sizeof(struct query_block) / QK <= 2 * KV_BLOCK * sizeof(float),
               "queries in integers take no more room than keys and values in floats");

/* Scratch floats that a thread needs for the transformer. */
static int64_t lm_scratch(const struct llama *a, const struct kernels *kern) {
    int dp = round_up(a->d, QK);
    int64_t widest = max64(matmul_scratch(kern, a->D), matmul_scratch(kern, a->F));
    return max64(widest, attend_scratch(dp) + 2 * (int64_t)KV_BLOCK * dp);
}

static int lm_state_alloc(struct lm_state *s, const struct llama *a, int kv_type,
                          lvm_error *error) {
    int64_t q = (int64_t)a->H * a->d, kv = (int64_t)a->G * a->d,
            dp = (int64_t)a->H * round_up(a->d, QK), N = MAX_ROWS;
    struct { float **p; int64_t n; } want[] = {
        {&s->x, N * a->D}, {&s->h, N * a->D}, {&s->delta, N * a->D}, {&s->q, N * q},
        {&s->k, N * kv}, {&s->v, N * kv}, {&s->qp, N * dp}, {&s->op, N * dp}, {&s->o, N * q},
        {&s->gate, N * a->F}, {&s->up, N * a->F}, {&s->rope, N * a->d}, {&s->inv_freq, a->d},
        {&s->logits, NLL_ROWS * (int64_t)a->V}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        *want[i].p = mem_alloc((size_t)want[i].n, sizeof(float), error);
        if (*want[i].p == NULL) return LVM_MEMORY;
        s->bytes += want[i].n * (int64_t)sizeof(float);
    }
    for (int i = 0; i < a->d / 2; i++) s->inv_freq[i] = rope_frequency(a, i);
    return kv_setup(&s->kv, a, kv_type, error);
}

#endif /* LVM_INTERNAL */

/* =================================================================================================
   Chapter 7.  The seam for devices and the CPU behind it; generation and scoring

       lvm_encode, lvm_prompt, lvm_generate, lvm_score, ...        one sequence of tokens a context
              |  images, tokens, logits: always in host memory
       struct backend            encode   decode   forward   [generate]   kv_copy ... kv_set
              |                                                        |
       the CPU (chapters 5 and 6)                    another device (its own file)

   A device keeps its copy of a model, which contexts share, and for each context its work memory
   and key/value cache. Everything above the seam is the same for all of them.

   A context holds one sequence: the tokens that were given or generated (ids), of which the first
   n_fed lie in the cache of sequence 0, and the scores of the token that follows them (logits). The
   last sampled token is not fed before it is needed, so a window of W images of T tokens behind bos
   needs W T - 1 + bos positions. When a sequence is full the oldest images leave: bos and the last
   W - 1 images are read again from position zero, as the published program does for every image.

   Images repeat: the examples ("shots") of a task stand before every query. So a context remembers
   the pixels and tokens of the last images it encoded, and both, with the cache of keys and values,
   can be kept in a file (chapter 14). */

/* ---- The seam ---- */

enum { MAX_ENCODED = 32 /* images that a context remembers: two windows */ };

/* What a device takes at once. */
struct limits {
    int images;     /* of encode and decode; no more than MAX_ENCODED will come */
    int rows;       /* of forward; at least as many as sequences */
    int sequences;  /* numbered from 0: candidates that generate together */
    int kv_block;   /* positions of a block of kv_get and kv_set */
    int codes;      /* ids that generate can sample from: the host samples where there are more */
};

/* PCG-XSH-RR 64/32 (O'Neill 2014): a 64-bit linear congruential generator whose high bits, folded
   and rotated, are the output; the odd increment chooses one of 2^63 streams. */
struct rng {
    uint64_t state, increment;
};

/* n further tokens for sequences 0 .. n_seqs - 1. */
struct continuation {
    const lvm_sampling *sampling; /* log_likelihood: to add to; choose: no device is asked then */
    int n_seqs, n;
    int codes;             /* only ids below are sampled */
    float *logits;         /* [n_seqs][V]: the scores of each sequence's next token; used up */
    struct rng *rng;       /* [n_seqs]: one draw a token, none when greedy */
    int32_t *ids;          /* [n_seqs][ld]: what was sampled; the last of each is not fed */
    int64_t ld;
    int64_t done, all;     /* progress: tokens before these, and of all calls */
};

/* Bytes a second: copying memory (read and written), reading it, from the host; and operations. 0:
   unknown. */
struct ceilings {
    double copy, read, upload, f16, f32;
};

/* What a device does for a context. The functions return LVM_OK or a code with the error filled;
   calls that fail or are cancelled leave sequences as they were. report(o, ...) is theirs to call;
   it never needs the device to be waited for. Of encode and decode it counts the model's list of
   operations, n_encoder an image and the rest. Latents, the codebook's norms, pixels and rows of
   logits before they are sampled from go through check_finite; who reads its LVM_FORMAT looks for
   the weights to blame. */
struct backend {
    uint32_t size, version;  /* of this struct: sizeof and BACKEND_VERSION when it was compiled */
    const char *name;        /* "cpu", "cuda" */

    /* The device's copy of a model, made once and shared by contexts; device: "cuda:1", say. */
    int (*model_open)(const lvm_model *m, const char *device, void **copy, lvm_error *error);
    void (*model_close)(void *copy);

    /* A context's state; o outlives it. Its sequences start empty. */
    int (*open)(void *copy, const lvm_options *o, void **state, struct limits *limits,
                lvm_error *error);
    void (*close)(void *state);

    /* n <= limits.images images, rgb[n][R][R][3], -> ids[n][T]; and back. They are number `first`
       and the following of `all` for the progress. latent: NULL, or the vectors in front of the
       quantiser, [n][T][code_dim]; pixels: NULL, or the image in floats, about 0 to 1 but not
       clamped. */
    int (*encode)(void *state, const uint8_t *rgb, int n, int first, int all, int32_t *ids,
                  float *latent, lvm_error *error);
    int (*decode)(void *state, const int32_t *ids, int n, int first, int all, uint8_t *rgb,
                  float *pixels, lvm_error *error);

    int (*forward)(void *state, const struct batch *b, lvm_error *error);
    /* NULL: the host samples from logits, see generate_on_host, with the same result. */
    int (*generate)(void *state, struct continuation *c, lvm_error *error);

    /* Sequence `to` becomes the first n tokens of `from`; keeps the first n. */
    int (*kv_copy)(void *state, int from, int to, int n, lvm_error *error);
    void (*kv_trim)(void *state, int seq, int n);
    /* A block of limits.kv_block positions as kv_size bytes that only this device understands;
       kv_set leaves the sequence n tokens long. */
    size_t (*kv_size)(void *state);
    int (*kv_get)(void *state, int seq, int block, void *data, lvm_error *error);
    int (*kv_set)(void *state, int seq, int block, const void *data, int n, lvm_error *error);

    /* Adds memory to context, cache and device; NULL: unknown. */
    void (*usage)(void *state, lvm_usage *usage);
    /* How many such devices there are; 0 and an error where none can be used. NULL: one. */
    int (*count)(lvm_error *error);
    /* What the device can do at most, measured now, for bench. NULL: unknown. */
    int (*ceilings)(void *state, struct ceilings *ceilings, lvm_error *error);

    /* Training's functions will follow here; size and version tell which there are. */
};
enum { BACKEND_VERSION = 4 };

#ifndef LVM_INTERNAL

/* ---- The CPU: chapters 5 and 6 behind the seam ---- */

struct cpu {
    const lvm_model *m;
    struct exec e;         /* kernels, threads, scratch */
    struct vq_state vq;    /* of the tokenizer, where there is one */
    struct lm_state lm;    /* of the transformer, with its KV cache */
};

/* The model lies in memory, where all contexts read it. */
static int cpu_model_open(const lvm_model *m, const char *device, void **copy, lvm_error *error) {
    if (strcmp(device, "cpu") != 0)
        return fail(error, LVM_INVALID, "device %s: the CPU is \"cpu\"", device);
    *copy = mem_alloc(1, sizeof(lvm_model *), error);
    if (*copy == NULL) return LVM_MEMORY;
    *(const lvm_model **)*copy = m;
    return LVM_OK;
}

/* Also of one that cpu_open could not finish. */
static void cpu_close(void *state) {
    struct cpu *c = state;
    if (c == NULL) return;
    vq_state_free(&c->vq);
    lm_state_free(&c->lm);
    mem_free(c->e.scratch);
    mem_free(c->e.act);
    pool_free(c->e.pool);
    mem_free(c);
}

/* All memory that a context will ever need but the pages of its cache, so that nothing can run out
   in the middle of work. */
static int cpu_alloc(struct cpu *c, lvm_error *error) {
    const lvm_model *m = c->m;
    const struct llama *a = &m->llama;
    struct exec *e = &c->e;
    int code = LVM_OK;
    e->scratch_floats = 1024;
    if (m->vq != NULL) e->scratch_floats = max64(e->scratch_floats, vq_scratch(m->vq, m->kern));
    if (a->L > 0) e->scratch_floats = max64(e->scratch_floats, lm_scratch(a, m->kern));
    e->scratch_floats = (e->scratch_floats + 1023) / 1024 * 1024;
    e->pool = pool_new(e->o->threads, error);
    if (e->pool == NULL) return LVM_MEMORY;
    e->scratch = mem_alloc((size_t)pool_threads(e->pool) * (size_t)e->scratch_floats,
                           sizeof(float), error);
    if (e->scratch == NULL) return LVM_MEMORY;
    if (a->L > 0) {
        int blocks = (int)max64(a->D, a->F) / QK + 1;
        e->act = mem_alloc((size_t)blocks * MAX_ROWS, sizeof *e->act, error);
        if (e->act == NULL) return LVM_MEMORY;
        code = lm_state_alloc(&c->lm, a, e->o->kv_type, error);
    }
    if (code == LVM_OK && m->vq != NULL) code = vq_state_alloc(&c->vq, e, m->vq, error);
    return code;
}

/* One image at a time: its convolutions fill all threads. Threads and memory are the context's
   own, so that contexts may compute side by side. */
static int cpu_open(void *copy, const lvm_options *o, void **state, struct limits *limits,
                    lvm_error *error) {
    struct cpu *c = mem_alloc(1, sizeof *c, error);
    if (c == NULL) return LVM_MEMORY;
    c->m = *(const lvm_model **)copy;
    c->e.kern = c->m->kern;
    c->e.o = o;
    c->e.exact = o->exact;
    *limits = (struct limits){1, MAX_ROWS, MAX_SEQUENCES, KV_BLOCK, 0};
    int code = cpu_alloc(c, error);
    if (code == LVM_OK) *state = c;
    else cpu_close(c);
    return code;
}

/* A channel of a pixel, 0 to 1 in floats, to 0 .. 255; halves to even, as NumPy rounds. */
static uint8_t to_byte(float x) { return (uint8_t)rintf(255 * (x > 0 ? (x < 1 ? x : 1) : 0)); }

/* Image by image. */
static int cpu_encode(void *state, const uint8_t *rgb, int n, int first, int all, int32_t *ids,
                      float *latent, lvm_error *error) {
    struct cpu *c = state;
    const struct vqgan *vq = c->m->vq;
    int64_t steps = vq->n_encoder, T = c->m->T, size = (int64_t)vq->R * vq->R * 3;
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && i < n; i++) {
        code = vq_encode(&c->e, vq, &c->vq, rgb + i * size, (first + i) * steps, all * steps,
                         ids + i * T, latent != NULL ? latent + i * T * vq->code_dim : NULL, error);
        if (code == LVM_OK) /* they are the current map still */
            code = check_finite(c->vq.code_norms, vq->codes, "the codebook's norms for image",
                                first + i + 1, error);
        if (code == LVM_OK)
            code = check_finite(c->vq.x, T * vq->code_dim, "the latents of image", first + i + 1,
                                error);
    }
    return code;
}

/* The same backwards, with rounding to bytes at the end. */
static int cpu_decode(void *state, const int32_t *ids, int n, int first, int all, uint8_t *rgb,
                      float *pixels, lvm_error *error) {
    struct cpu *c = state;
    const struct vqgan *vq = c->m->vq;
    int64_t steps = vq->n_ops - vq->n_encoder, size = (int64_t)vq->R * vq->R * 3;
    for (int i = 0; i < n; i++, rgb += size) {
        int code = vq_decode(&c->e, vq, &c->vq, ids + (int64_t)i * c->m->T, (first + i) * steps,
                             all * steps, error);
        if (code == LVM_OK)
            code = check_finite(c->vq.x, size, "the pixels of image", first + i + 1, error);
        if (code != LVM_OK) return code;
        for (int64_t p = 0; p < size; p++) rgb[p] = to_byte(c->vq.x[p]);
        if (pixels != NULL) memcpy(pixels + i * size, c->vq.x, (size_t)size * sizeof *pixels);
    }
    return LVM_OK;
}

static int cpu_forward(void *state, const struct batch *b, lvm_error *error) {
    struct cpu *c = state;
    return run_layers(&c->e, &c->m->llama, &c->lm, b, error);
}

/* Pages that are no longer needed go back; the last one may keep positions beyond n, which nobody
   reads before they are written again. */
static void cpu_kv_trim(void *state, int seq, int n) {
    struct cpu *c = state;
    sequence_trim(&c->lm.kv, &c->lm.kv.seq[seq], n);
}

/* Shares the pages: whoever writes into one first copies it. */
static int cpu_kv_copy(void *state, int from, int to, int n, lvm_error *error) {
    struct kv_cache *kv = &((struct cpu *)state)->lm.kv;
    (void)error;
    if (from != to) sequence_trim(kv, &kv->seq[to], 0);
    for (int i = 0; from != to && i < (n + KV_BLOCK - 1) / KV_BLOCK; i++) {
        kv->seq[to].pages[i] = kv->seq[from].pages[i];
        kv->seq[to].pages[i]->refs++;
    }
    if (from != to) kv->seq[to].n = n;
    sequence_trim(kv, &kv->seq[to], n);
    return LVM_OK;
}

/* The cache's pages as bytes, and what a context uses (chapter 14). */
static size_t cpu_kv_size(void *state);
static int cpu_kv_get(void *state, int seq, int block, void *data, lvm_error *error);
static int cpu_kv_set(void *state, int seq, int block, const void *data, int n, lvm_error *error);
static void cpu_usage(void *state, lvm_usage *usage);

static const struct backend cpu_backend = {
    .size = sizeof cpu_backend, .version = BACKEND_VERSION, .name = "cpu",
    .model_open = cpu_model_open, .model_close = mem_free, .open = cpu_open, .close = cpu_close,
    .encode = cpu_encode, .decode = cpu_decode, .forward = cpu_forward, .kv_copy = cpu_kv_copy,
    .kv_trim = cpu_kv_trim, .kv_size = cpu_kv_size, .kv_get = cpu_kv_get, .kv_set = cpu_kv_set,
    .usage = cpu_usage};

/* ---- Contexts, which chapter 14 makes and frees ---- */

/* An image as the tokenizer saw it and what it became. */
struct encoded {
    uint8_t *rgb; /* [R][R][3] */
    int32_t *ids; /* [T] */
};

struct lvm_ctx {
    const lvm_model *m;
    lvm_options o;      /* settled: no field is left open */
    char device[32];    /* its name; o.device points here */
    lvm_error passed_over; /* why a better device is not used, where nobody chose one */
    const struct backend *b;
    void *state;        /* what the backend made for this context */
    struct limits limits;
    int32_t *ids;       /* [context + 1] */
    int n_ids, n_fed;   /* n_fed <= n_ids */
    int64_t n_generated; /* tokens since the prompt, dropped ones included */
    int has_logits;     /* logits[0] belongs to ids[n_fed - 1] */
    float *logits;      /* [sequences][V]; row c is candidate c's while generating */
    int *seqs, *rows;   /* [rows]: a batch's sequences; 0, 1, 2, ... */
    uint8_t *rgb;       /* [images][R][R][3]: on their way to the tokenizer or back */
    int32_t *tokens;    /* [images][T] */
    int64_t n_encoded;  /* images encoded so far; the last ones are remembered */
    struct encoded encoded[MAX_ENCODED]; /* image i at i % MAX_ENCODED */
};

/* Sampling as the caller chose it (NULL: nothing), with what was left to lvm filled in and the rest
   checked (chapter 14). */
static int settle_sampling(const lvm_sampling *chosen, lvm_sampling *s, lvm_error *error);

/* Completes what check_finite says (LVM_FORMAT; other codes pass through) by the model's name and
   by the first tensor that holds such a number; and empties the cache, of which even tokens before
   a NaN may have got it (chapter 14). */
static int blame_weights(lvm_ctx *ctx, int code, lvm_error *error);

/* A file may hold only one part of a model: what needs the other says so. */
static int need(const lvm_ctx *ctx, int part, const char *what, lvm_error *error) {
    if (part) return LVM_OK;
    return fail(error, LVM_INVALID, "%s: holds no %s, which this needs", ctx->m->path, what);
}

static int need_tokenizer(const lvm_ctx *ctx, lvm_error *error) {
    return need(ctx, ctx->m->vq != NULL, "tokenizer", error);
}

static int need_transformer(const lvm_ctx *ctx, lvm_error *error) {
    return need(ctx, ctx->m->llama.L > 0, "transformer", error);
}

/* Every id is 0 .. below - 1. */
static int check_ids(const int32_t *ids, int64_t n, int below, lvm_error *error) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= below)
            return fail(error, LVM_INVALID, "token %lld is %d, not in 0 .. %d", (long long)i + 1,
                        (int)ids[i], below - 1);
    return LVM_OK;
}

/* ---- Images to tokens and back ---- */

/* An image as R x R pixels, squashed or cropped to its middle (chapter 11); the caller frees it. */
static int fit_image(const lvm_image *image, int R, int fit, lvm_image *out, lvm_error *error);

/* Of an image as the tokenizer takes it, [R][R][3]. */
static size_t image_bytes(const lvm_ctx *ctx) {
    size_t R = (size_t)ctx->m->vq->R;
    return R * R * 3;
}

/* What the context knows of these pixels, or NULL. Comparing 32 images costs microseconds, encoding
   one a good part of a second. */
static const struct encoded *find_encoded(const lvm_ctx *ctx, const uint8_t *rgb) {
    for (int i = 0; i < MAX_ENCODED && i < ctx->n_encoded; i++)
        if (memcmp(ctx->encoded[i].rgb, rgb, image_bytes(ctx)) == 0) return &ctx->encoded[i];
    return NULL;
}

/* Remembers an image, rgb[R][R][3] and ids[T]; the oldest makes room. */
static int remember_encoded(lvm_ctx *ctx, const uint8_t *rgb, const int32_t *ids,
                            lvm_error *error) {
    struct encoded *e = &ctx->encoded[ctx->n_encoded % MAX_ENCODED];
    size_t T = (size_t)ctx->m->T;
    if (e->rgb == NULL) e->rgb = mem_alloc(1, image_bytes(ctx), error);
    if (e->ids == NULL) e->ids = mem_alloc(T, sizeof *e->ids, error);
    if (e->rgb == NULL || e->ids == NULL) return LVM_MEMORY;
    memcpy(e->rgb, rgb, image_bytes(ctx));
    memcpy(e->ids, ids, T * sizeof *ids);
    ctx->n_encoded++;
    return LVM_OK;
}

/* Images of a call that wait in ctx->rgb to be encoded together. */
struct encode_group {
    int n, done, all;     /* waiting; before them; of the call */
    int32_t *to[MAX_ENCODED]; /* where their tokens go */
};

/* Encodes the images that wait and remembers them. */
static int encode_waiting(lvm_ctx *ctx, struct encode_group *g, lvm_error *error) {
    size_t T = (size_t)ctx->m->T;
    if (g->n == 0) return LVM_OK;
    int code = blame_weights(ctx, ctx->b->encode(ctx->state, ctx->rgb, g->n, g->done, g->all,
                                                 ctx->tokens, NULL, error), error);
    for (int i = 0; code == LVM_OK && i < g->n; i++) {
        const int32_t *ids = ctx->tokens + (size_t)i * T;
        memcpy(g->to[i], ids, T * sizeof *ids);
        code = remember_encoded(ctx, ctx->rgb + (size_t)i * image_bytes(ctx), ids, error);
    }
    g->done += g->n;
    g->n = 0;
    return code;
}

/* Images that are encoded or decoded, in operations as the backend counts them. */
static int report_images(const lvm_ctx *ctx, int decoded, int64_t done, int64_t all,
                         lvm_error *error) {
    int n = ctx->m->vq->n_encoder, steps = decoded ? ctx->m->vq->n_ops - n : n;
    return report(&ctx->o, decoded ? "decode" : "encode", done * steps, all * steps, error);
}

/* An image is known already, or it joins those that wait; one that waits twice is encoded first and
   then known. */
static int encode_image(lvm_ctx *ctx, const lvm_image *image, struct encode_group *g, int32_t *ids,
                        lvm_error *error) {
    size_t size = image_bytes(ctx);
    lvm_image fitted = {.rgb = NULL};
    int code = fit_image(image, ctx->m->vq->R, ctx->o.fit, &fitted, error), twice = 0;
    for (int i = 0; code == LVM_OK && i < g->n; i++)
        twice |= memcmp(ctx->rgb + (size_t)i * size, fitted.rgb, size) == 0;
    if (twice) code = encode_waiting(ctx, g, error);
    const struct encoded *known = code == LVM_OK ? find_encoded(ctx, fitted.rgb) : NULL;
    if (known != NULL) {
        memcpy(ids, known->ids, (size_t)ctx->m->T * sizeof *ids);
        code = report_images(ctx, 0, ++g->done, g->all, error);
    } else if (code == LVM_OK) {
        memcpy(ctx->rgb + (size_t)g->n * size, fitted.rgb, size);
        g->to[g->n++] = ids;
        if (g->n == ctx->limits.images) code = encode_waiting(ctx, g, error);
    }
    lvm_image_free(&fitted);
    return code;
}

/* As many images at a time as the device takes; what the context knows already costs nothing. */
int lvm_encode(lvm_ctx *ctx, const lvm_image *images, int n, int32_t *ids, lvm_error *error) {
    clear_error(error);
    if (ctx == NULL) return null_argument(error, "lvm_encode", "ctx");
    if (n > 0 && (images == NULL || ids == NULL))
        return null_argument(error, "lvm_encode", images == NULL ? "images" : "ids");
    struct encode_group g = {.all = n};
    int code = need_tokenizer(ctx, error);
    if (code == LVM_OK && n < 0) code = fail(error, LVM_INVALID, "%d images to encode", n);
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = encode_image(ctx, &images[i], &g, ids + (int64_t)i * ctx->m->T, error);
    if (code == LVM_OK) code = encode_waiting(ctx, &g, error);
    return code == LVM_OK && n > 0 ? report_images(ctx, 0, n, n, error) : code;
}

/* Images first .. first + count - 1 of a call. */
static int decode_images(lvm_ctx *ctx, const int32_t *ids, int first, int count, int n,
                         lvm_image *images, lvm_error *error) {
    int R = ctx->m->vq->R;
    int code = ctx->b->decode(ctx->state, ids + (int64_t)first * ctx->m->T, count, first, n,
                              ctx->rgb, NULL, error);
    code = blame_weights(ctx, code, error);
    for (int i = 0; code == LVM_OK && i < count; i++) {
        lvm_image *image = &images[first + i];
        image->rgb = mem_alloc(1, image_bytes(ctx), error);
        if (image->rgb == NULL) return LVM_MEMORY;
        memcpy(image->rgb, ctx->rgb + (size_t)i * image_bytes(ctx), image_bytes(ctx));
        image->width = image->height = R;
    }
    return code;
}

/* Likewise. After a failure none of the images is left. */
int lvm_decode(lvm_ctx *ctx, const int32_t *ids, int n, lvm_image *images, lvm_error *error) {
    clear_error(error);
    for (int i = 0; images != NULL && i < n; i++) images[i] = (lvm_image){.rgb = NULL};
    if (ctx == NULL) return null_argument(error, "lvm_decode", "ctx");
    if (n > 0 && (ids == NULL || images == NULL))
        return null_argument(error, "lvm_decode", ids == NULL ? "ids" : "images");
    if (n < 0) return fail(error, LVM_INVALID, "%d images to decode", n);
    int code = need_tokenizer(ctx, error), count = ctx->limits.images;
    if (code == LVM_OK) code = check_ids(ids, (int64_t)n * ctx->m->T, ctx->m->codes, error);
    for (int i = 0; code == LVM_OK && i < n; i += count)
        code = decode_images(ctx, ids, i, n - i < count ? n - i : count, n, images, error);
    if (code == LVM_OK && n > 0) code = report_images(ctx, 1, n, n, error);
    for (int i = 0; code != LVM_OK && i < n; i++) lvm_image_free(&images[i]);
    return code;
}

/* ---- Prefill ---- */

/* What the progress calls a prefill; done of all its tokens lie before the ones at hand. */
struct stage {
    const char *name;
    int64_t done, all;
};

/* Appends ids[n] to a sequence of the cache; logits: V floats for the token behind them. *fed, the
   sequence's length, counts what went in. */
static int prefill(lvm_ctx *ctx, int seq, const int32_t *ids, int n, float *logits, int *fed,
                   struct stage stage, lvm_error *error) {
    int most = ctx->limits.rows, V = ctx->m->llama.V;
    for (int i = 0; i < most; i++) ctx->seqs[i] = seq;
    for (int at = 0; at < n; at += most) {
        int rows = n - at < most ? n - at : most, last = rows - 1;
        struct batch b = {.n = rows, .tokens = ids + at, .seqs = ctx->seqs, .out = &last,
                          .n_out = at + rows == n, .logits = logits};
        int code = report(&ctx->o, stage.name, stage.done + at, stage.all, error);
        if (code == LVM_OK) code = ctx->b->forward(ctx->state, &b, error);
        if (code != LVM_OK) return code;
        *fed += rows;
    }
    int code = check_finite(logits, V, "the logits behind token", *fed, error);
    return code != LVM_OK ? blame_weights(ctx, code, error)
                          : report(&ctx->o, stage.name, stage.done + n, stage.all, error);
}

/* Keys and values depend on nothing but the tokens up to theirs, so that what two prompts begin
   with alike is read once (prefix reuse). */
int lvm_prompt(lvm_ctx *ctx, const int32_t *ids, int n, float *logits, lvm_error *error) {
    clear_error(error);
    if (ctx == NULL || ids == NULL)
        return null_argument(error, "lvm_prompt", ctx == NULL ? "ctx" : "ids");
    const struct llama *a = &ctx->m->llama;
    int code = need_transformer(ctx, error);
    if (code != LVM_OK) return code;
    if (n < 1 || n > a->context)
        return fail(error, LVM_INVALID, "a prompt of %d tokens; the context holds 1 to %d", n,
                    a->context);
    code = check_ids(ids, n, a->V, error);
    if (code != LVM_OK) return code;
    int same = 0; /* tokens of the beginning that are in the cache already */
    while (same < n && same < ctx->n_fed && ids[same] == ctx->ids[same]) same++;
    if (same == n && !(ctx->n_fed == n && ctx->has_logits)) same = n - 1;
    ctx->b->kv_trim(ctx->state, 0, same);
    memcpy(ctx->ids, ids, (size_t)n * sizeof *ids);
    ctx->n_ids = n;
    ctx->n_fed = same;
    ctx->n_generated = 0;
    if (same < n) {
        ctx->has_logits = 0;
        code = prefill(ctx, 0, ids + same, n - same, ctx->logits, &ctx->n_fed,
                       (struct stage){"prefill", 0, n - same}, error);
        if (code != LVM_OK) return code;
        ctx->has_logits = 1;
    }
    if (logits != NULL) memcpy(logits, ctx->logits, (size_t)a->V * sizeof *logits);
    return LVM_OK;
}

/* Feeds what is pending, so that logits[0] are those behind the whole sequence. */
static int prefill_pending(lvm_ctx *ctx, lvm_error *error) {
    int code = need_transformer(ctx, error);
    if (code != LVM_OK) return code;
    if (ctx->n_ids == 0)
        return fail(error, LVM_INVALID, "there is no prompt yet: call lvm_prompt first");
    if (ctx->has_logits && ctx->n_fed == ctx->n_ids) return LVM_OK;
    if (ctx->n_ids > ctx->m->llama.context)
        return fail(error, LVM_INVALID, "the context is full");
    if (ctx->n_fed == ctx->n_ids) ctx->b->kv_trim(ctx->state, 0, --ctx->n_fed);
    ctx->has_logits = 0;
    int n = ctx->n_ids - ctx->n_fed;
    code = prefill(ctx, 0, ctx->ids + ctx->n_fed, n, ctx->logits, &ctx->n_fed,
                   (struct stage){"prefill", 0, n}, error);
    ctx->has_logits = code == LVM_OK;
    return code;
}

/* ---- Scoring ----

   How likely a continuation is: the negative log-likelihood (nll) of each of its tokens, in nats,
   that is -ln p. Its mean's exponential is the perplexity, the number of equally likely tokens that
   the model was as unsure between. */

/* Reads ids[n] behind the prompt, many rows at a time: logits[n][V] behind each of them; or, where
   that is NULL, nll[i] of ids[i], which the logits behind the one before it tell. The last of these
   need not be read. Then the sequence is cut back to the prompt. */
static int read_behind(lvm_ctx *ctx, const char *call, const int32_t *ids, int n, float *logits,
                       float *nll, lvm_error *error) {
    clear_error(error);
    if (ctx == NULL || ids == NULL || (logits == NULL && nll == NULL))
        return null_argument(error, call, ctx == NULL ? "ctx" : ids == NULL ? "ids" : "the result");
    const struct llama *a = &ctx->m->llama;
    int code = prefill_pending(ctx, error);
    if (code != LVM_OK) return code;
    int start = ctx->n_fed, most = ctx->limits.rows, judge = logits == NULL;
    if (n < 1 || n > a->context + judge - start)
        return fail(error, LVM_INVALID, "%d tokens; behind the prompt the context holds 1 to %d",
                    n, a->context + judge - start);
    code = check_ids(ids, n, a->V, error);
    if (code == LVM_OK && judge) nll[0] = negative_log_likelihood(ctx->logits, a->V, ids[0]);
    memset(ctx->seqs, 0, (size_t)most * sizeof *ctx->seqs);
    for (int at = 0; code == LVM_OK && at < n - judge; at += most) {
        int rows = n - judge - at < most ? n - judge - at : most;
        struct batch b = {.n = rows, .tokens = ids + at, .seqs = ctx->seqs, .n_out = rows,
                          .out = ctx->rows};
        if (judge) b.targets = ids + at + 1, b.nll = nll + at + 1;
        else b.logits = logits + (int64_t)at * a->V;
        code = report(&ctx->o, "score", at, n, error);
        if (code == LVM_OK) code = ctx->b->forward(ctx->state, &b, error);
    }
    ctx->b->kv_trim(ctx->state, 0, start);
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = judge ? check_finite(nll + i, 1, "the likelihoods from token", i + 1, error)
                     : check_finite(logits + (int64_t)i * a->V, a->V, "the logits behind token",
                                    i + 1, error);
    code = blame_weights(ctx, code, error);
    return code == LVM_OK ? report(&ctx->o, "score", n, n, error) : code;
}

int lvm_score(lvm_ctx *ctx, const int32_t *ids, int n, float *nll, lvm_error *error) {
    return read_behind(ctx, "lvm_score", ids, n, NULL, nll, error);
}

int lvm_logits(lvm_ctx *ctx, const int32_t *ids, int n, float *logits, lvm_error *error) {
    return read_behind(ctx, "lvm_logits", ids, n, logits, NULL, error);
}

/* ---- Sampling ----

   p(id) is e^(logit / temperature) over their sum. Of the ids that are image tokens the top_k
   likeliest stay (Fan et al. 2018), of these the nucleus, the fewest likeliest that together hold
   at least top_p of the probability (Holtzman et al. 2020), and one of them is drawn: with the
   likeliest first, the cumulative sum is walked until it reaches a uniform random number times the
   whole sum. Sorting 8192 choices for each token would be slow; each of the three asks for no more
   than "the fewest likeliest that reach this mass", which quickselect finds. */

/* The next 32 random bits. */
static uint32_t rng_next(struct rng *r) {
    uint64_t old = r->state;
    r->state = old * 6364136223846793005u + r->increment;
    uint32_t x = (uint32_t)((old >> 18 ^ old) >> 27), turn = (uint32_t)(old >> 59);
    return x >> turn | x << (-turn & 31);
}

/* A generator's start; streams of one seed are independent. */
static struct rng rng_new(uint64_t seed, uint64_t stream) {
    struct rng r = {0, stream << 1 | 1};
    rng_next(&r);
    r.state += seed;
    rng_next(&r);
    return r;
}

/* n numbers further, in log n steps (chapter 14). */
static void rng_skip(struct rng *r, uint64_t n);

struct choice {
    float p; /* e^((logit - largest) / temperature): a probability before it is normalised */
    int32_t id;
};

/* Of equally likely ids the lower comes first, so that the order is one. */
static int likelier(struct choice a, struct choice b) {
    return a.p > b.p || (a.p == b.p && a.id < b.id);
}

/* Puts the likeliest of c[0 .. n-1] in front, the least of them last: as few as have this mass
   together, but no more than `count` and at least one. Returns how many, and in *sum their mass.
   Quickselect (Hoare 1961): what lies before a pivot is sorted out no further than the end
   needs. */
static int select_likeliest(struct choice *c, int n, int count, double mass, double *sum) {
    int from = 0, to = n; /* the last one to take is one of c[from .. to-1] */
    *sum = 0;             /* of those before it */
    while (from < to) {
        int middle = from + (to - from) / 2, i = from;
        struct choice pivot = c[middle];
        double before = *sum;
        c[middle] = c[to - 1];
        for (int j = from; j < to - 1; j++) {
            struct choice one = c[j];
            if (!likelier(one, pivot)) continue;
            c[j] = c[i];
            c[i++] = one;
            before += one.p;
        }
        c[to - 1] = c[i];
        c[i] = pivot;
        if (i > from && (i >= count || before >= mass)) {
            to = i;
            continue;
        }
        *sum = before + pivot.p;
        from = i + 1;
        if (from >= count || *sum >= mass) return from;
    }
    return from;
}

/* The id of the largest; of equal ones the lowest. */
static int32_t argmax(const float *logits, int n) {
    int32_t best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* One of the first n ids. c: room for n choices. */
static int32_t sample(const float *logits, int n, const lvm_sampling *s, struct rng *rng,
                      struct choice *c) {
    if (s->greedy) return argmax(logits, n);
    float max = logits[argmax(logits, n)];
    double mass = 0, drawn;
    for (int i = 0; i < n; i++) {
        c[i] = (struct choice){summand(exp_f32((logits[i] - max) / s->temperature)), i};
        mass += c[i].p;
    }
    if (s->top_k > 0 && s->top_k < n) n = select_likeliest(c, n, s->top_k, HUGE_VAL, &mass);
    n = select_likeliest(c, n, n, s->top_p * mass, &mass); /* the nucleus */
    n = select_likeliest(c, n, n, mass * (rng_next(rng) * 0x1p-32), &drawn); /* the draw */
    return c[n - 1].id;
}

/* ---- Generation ---- */

/* What a call of lvm_generate works with; candidate c is sequence c of the cache. */
struct generation {
    lvm_ctx *ctx;
    lvm_sampling s;
    int candidates, n;    /* n: tokens wanted of each */
    int has_bos, T, full; /* full: tokens at which a sequence must slide */
    int slid;             /* 1: the cache no longer begins as the context's own sequence */
    int length;           /* of every candidate's sequence, the pending token included */
    int32_t *ids;         /* [candidates][context + 1] */
    struct rng *rng;      /* [candidates] */
};

/* The sequence of candidate c, as long as a context and the token behind it. */
static int32_t *candidate_ids(const struct generation *g, int c) {
    return g->ids + (int64_t)c * (g->ctx->m->llama.context + 1);
}

/* Token i of sequence s was sampled: asks sampling->choose and adds to log_likelihood
   (chapter 14). */
static int settle_token(const lvm_ctx *ctx, const struct continuation *c, int s, int i,
                        lvm_error *error);

/* The loop of generating: sample a token of each sequence, feed it, sample the next. Sequences are
   one batch: weights and the keys of a shared prompt are read once for all of them. */
static int generate_on_host(lvm_ctx *ctx, struct continuation *c, lvm_error *error) {
    int V = ctx->m->llama.V, code = LVM_OK;
    struct choice *choices = mem_alloc((size_t)c->codes, sizeof *choices, error);
    int32_t *last = mem_alloc((size_t)c->n_seqs, sizeof *last, error);
    struct batch b = {.n = c->n_seqs, .tokens = last, .seqs = ctx->rows, .n_out = c->n_seqs,
                      .out = ctx->rows, .logits = c->logits};
    if (choices == NULL || last == NULL) code = LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < c->n; i++) {
        if (i > 0) code = ctx->b->forward(ctx->state, &b, error);
        if (code == LVM_OK) code = report(&ctx->o, "generate", c->done + i, c->all, error);
        for (int s = 0; code == LVM_OK && s < c->n_seqs; s++) {
            const float *logits = c->logits + (int64_t)s * V;
            int32_t *id = &c->ids[s * c->ld + i];
            code = check_finite(logits, V, "the logits behind generated token", c->done + i, error);
            if (code != LVM_OK) break;
            *id = sample(logits, c->codes, c->sampling, &c->rng[s], choices);
            code = settle_token(ctx, c, s, i, error);
            last[s] = *id;
        }
    }
    mem_free(choices);
    mem_free(last);
    return code;
}

/* On the device where it can, which gives the same. */
static int generate_tokens(lvm_ctx *ctx, struct continuation *c, lvm_error *error) {
    int on_device = ctx->b->generate != NULL && c->sampling->choose == NULL &&
                    c->codes <= ctx->limits.codes;
    return blame_weights(ctx, on_device ? ctx->b->generate(ctx->state, c, error)
                                        : generate_on_host(ctx, c, error), error);
}

/* Drops the oldest images of every candidate and reads the rest again. Candidates share what their
   windows have in common. */
static int slide_window(struct generation *g, lvm_error *error) {
    lvm_ctx *ctx = g->ctx;
    int part = (g->length - g->has_bos) % g->T; /* of an image that is still being generated */
    int keep = g->full - g->has_bos - g->T + part, code = LVM_OK;
    for (int c = 0; c < g->candidates; c++) {
        int32_t *ids = candidate_ids(g, c);
        memmove(ids + g->has_bos, ids + g->length - keep, (size_t)keep * sizeof *ids);
    }
    g->length = g->has_bos + keep;
    g->slid = 1;
    if (g->length == 0)
        return fail(error, LVM_INVALID,
                    "the context of %d tokens holds no image to continue from",
                    ctx->m->llama.context);
    for (int c = 0; code == LVM_OK && c < g->candidates; c++) {
        int fed = 0;
        const int32_t *ids = candidate_ids(g, c), *first = candidate_ids(g, 0);
        while (c > 0 && fed < g->length - 1 && ids[fed] == first[fed]) fed++;
        struct stage slide = {"slide", (int64_t)c * g->length + fed,
                              (int64_t)g->candidates * g->length};
        code = ctx->b->kv_copy(ctx->state, 0, c, fed, error);
        if (code == LVM_OK)
            code = prefill(ctx, c, ids + fed, g->length - fed,
                           ctx->logits + (int64_t)c * ctx->m->llama.V, &fed, slide, error);
    }
    return code;
}

/* Gives every candidate the prompt's ids, cache and logits. */
static int fork_prompt(struct generation *g, lvm_error *error) {
    lvm_ctx *ctx = g->ctx;
    size_t V = (size_t)ctx->m->llama.V;
    int code = LVM_OK;
    for (int c = 0; code == LVM_OK && c < g->candidates; c++) {
        memcpy(candidate_ids(g, c), ctx->ids, (size_t)ctx->n_ids * sizeof *ctx->ids);
        g->rng[c] = rng_new(g->s.seed, (uint64_t)c);
        rng_skip(&g->rng[c], (uint64_t)ctx->n_generated);
        if (c == 0) continue;
        code = ctx->b->kv_copy(ctx->state, 0, c, ctx->n_fed, error);
        memcpy(ctx->logits + (size_t)c * V, ctx->logits, V * sizeof *ctx->logits);
    }
    g->length = ctx->n_ids;
    return code;
}

/* Leaves the context behind candidate 0, with its last token pending; after a failure, where it was
   before. */
static void keep_first_candidate(struct generation *g, int code) {
    lvm_ctx *ctx = g->ctx;
    for (int c = 1; c < g->candidates; c++) ctx->b->kv_trim(ctx->state, c, 0);
    ctx->has_logits = 0;
    if (code == LVM_OK) {
        memcpy(ctx->ids, candidate_ids(g, 0), (size_t)g->length * sizeof *ctx->ids);
        ctx->n_ids = g->length;
        ctx->n_fed = g->length - 1;
        ctx->n_generated += g->n;
    } else {
        if (g->slid) ctx->n_fed = 0;
        ctx->b->kv_trim(ctx->state, 0, ctx->n_fed);
    }
}

/* Generates to the end of the window, slides it, and goes on. */
static int run_generation(struct generation *g, int32_t *ids, lvm_error *error) {
    lvm_ctx *ctx = g->ctx;
    int code = fork_prompt(g, error);
    for (int c = 0; g->s.log_likelihood != NULL && c < g->candidates; c++)
        g->s.log_likelihood[c] = 0;
    for (int done = 0, n; code == LVM_OK && done < g->n; done += n) {
        if (g->length >= g->full) code = slide_window(g, error);
        n = g->n - done < g->full - g->length ? g->n - done : g->full - g->length;
        struct continuation c = {&g->s, g->candidates, n, ctx->m->codes, ctx->logits, g->rng,
                                 g->ids + g->length, ctx->m->llama.context + 1, done, g->n};
        if (code == LVM_OK) code = generate_tokens(ctx, &c, error);
        for (int i = 0; code == LVM_OK && i < g->candidates; i++)
            memcpy(ids + (int64_t)i * g->n + done, candidate_ids(g, i) + g->length,
                   (size_t)n * sizeof *ids);
        if (code == LVM_OK) g->length += n;
    }
    if (code == LVM_OK) code = report(&ctx->o, "generate", g->n, g->n, error);
    keep_first_candidate(g, code);
    return code;
}

/* A window that is full already slides before it is fed: what would be computed for it is not
   needed. */
int lvm_generate(lvm_ctx *ctx, const lvm_sampling *sampling, int candidates, int n, int32_t *ids,
                 lvm_error *error) {
    clear_error(error);
    if (ctx == NULL || ids == NULL)
        return null_argument(error, "lvm_generate", ctx == NULL ? "ctx" : "ids");
    const struct llama *a = &ctx->m->llama;
    struct generation g = {.ctx = ctx, .candidates = candidates, .n = n, .T = ctx->m->T};
    int code = settle_sampling(sampling, &g.s, error);
    if (code != LVM_OK) return code;
    if (candidates < 1 || candidates > ctx->limits.sequences)
        return fail(error, LVM_INVALID, "%d candidates: lvm takes 1 to %d", candidates,
                    ctx->limits.sequences);
    if (n < 1) return fail(error, LVM_INVALID, "%d tokens to generate", n);
    g.has_bos = a->bos >= 0 && ctx->n_ids > 0 && ctx->ids[0] == a->bos;
    g.full = g.has_bos + (int)min64(ctx->o.window, images_that_fit(ctx->m, g.has_bos)) * g.T;
    if (g.full < g.has_bos + g.T)
        return fail(error, LVM_INVALID, "%s: its context of %d tokens holds no image of %d",
                    ctx->m->path, a->context, g.T);
    if (ctx->n_ids < g.full) code = prefill_pending(ctx, error);
    if (code != LVM_OK) return code;
    g.ids = mem_alloc((size_t)candidates * ((size_t)a->context + 1), sizeof *g.ids, error);
    g.rng = mem_alloc((size_t)candidates, sizeof *g.rng, error);
    code = g.ids == NULL || g.rng == NULL ? LVM_MEMORY : run_generation(&g, ids, error);
    mem_free(g.ids);
    mem_free(g.rng);
    return code;
}

/* ---- All at once ---- */

/* bos, then the tokens of the last images that leave room for the next one. */
int lvm_prompt_images(lvm_ctx *ctx, const lvm_image *images, int count, lvm_error *error) {
    clear_error(error);
    if (ctx == NULL || (images == NULL && count > 0))
        return null_argument(error, "lvm_prompt_images", ctx == NULL ? "ctx" : "images");
    const struct llama *a = &ctx->m->llama;
    if (count < 0) return fail(error, LVM_INVALID, "%d prompt images", count);
    int most = (int)max64(0, ctx->o.window - 1), skip = count > most ? count - most : 0,
        bos = a->bos >= 0, n = bos + (count - skip) * ctx->m->T;
    int code = need_transformer(ctx, error);
    if (code == LVM_OK && n < 1)
        code = fail(error, LVM_INVALID, "%s: its context of %d tokens holds no prompt image",
                    ctx->m->path, a->context);
    if (code != LVM_OK) return code;
    int32_t *ids = mem_alloc((size_t)n + 1, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    if (bos) ids[0] = a->bos;
    if (skip > 0) images += skip;
    code = lvm_encode(ctx, images, count - skip, ids + bos, error);
    if (code == LVM_OK) code = lvm_prompt(ctx, ids, n, NULL, error);
    mem_free(ids);
    return code;
}

/* Empties the images that a call is to make and refuses what it cannot do. */
static int ready_images(const lvm_ctx *ctx, int candidates, int n, lvm_image *out,
                        const char *call, lvm_error *error) {
    clear_error(error);
    const int most = 1 << 11;
    int64_t all = candidates < 1 || n < 1 ? 0 : (int64_t)candidates * n;
    for (int64_t i = 0; out != NULL && i < all && all <= MAX_SEQUENCES * most; i++)
        out[i] = (lvm_image){.rgb = NULL};
    if (all == 0 || n > most || candidates > MAX_SEQUENCES)
        return fail(error, LVM_INVALID, "%d candidates of %d images: out of range", candidates,
                    n);
    if (ctx == NULL || out == NULL) return null_argument(error, call, ctx == NULL ? "ctx" : "out");
    if (ctx->m->T > INT32_MAX / n)
        return fail(error, LVM_INVALID, "%d images of %d tokens are too many", n, ctx->m->T);
    return need_tokenizer(ctx, error);
}

/* Tokens first, for all images; then pixels. */
int lvm_generate_images(lvm_ctx *ctx, const lvm_sampling *sampling, int candidates, int n,
                        lvm_image *out, lvm_error *error) {
    int code = ready_images(ctx, candidates, n, out, "lvm_generate_images", error);
    if (code != LVM_OK) return code;
    int tokens = n * ctx->m->T;
    int32_t *ids = mem_alloc((size_t)candidates * (size_t)tokens, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    code = lvm_generate(ctx, sampling, candidates, tokens, ids, error);
    if (code == LVM_OK) code = lvm_decode(ctx, ids, candidates * n, out, error);
    mem_free(ids);
    return code;
}

int lvm_predict(lvm_ctx *ctx, const lvm_image *images, int count, const lvm_sampling *sampling,
                int candidates, int n, lvm_image *out, lvm_error *error) {
    int code = ready_images(ctx, candidates, n, out, "lvm_predict", error);
    if (code == LVM_OK) code = lvm_prompt_images(ctx, images, count, error);
    return code == LVM_OK ? lvm_generate_images(ctx, sampling, candidates, n, out, error) : code;
}

/* =================================================================================================
   Chapter 8.  Training: backward beside forward, AdamW, LoRA, data, checkpoints

       .tok files --fill_rows-->  rows of ids, targets, loss weights
                  --net_forward-->  loss  --net_backward-->  gradients        of each layer, in plain
                  --update_params-->  weights                                 floats, kept or again
                  --lvm_trainer_save-->  .ckpt       --lvm_trainer_export-->  weights.bin

   The transformer is chapter 6's, with all rows at once and no cache: next-token cross-entropy

       loss = sum_i w_i (-ln softmax(logits_i)[target_i]) / sum_i w_i

   and its gradient by the chain rule, operation by operation, last one first (backpropagation:
   Rumelhart, Hinton and Williams 1986). An operation y = f(x) has a backward beside it that gets dy,
   the gradient of the loss by y, and gives or adds dx; each quotes the line of its forward. What a
   layer's backward needs of its forward (struct kept) is kept, or, where memory is short, computed
   again from the layer's input (Chen et al. 2016, arXiv 1604.06174).

   Sums have one order here too: a step does not depend on the number of threads, so that a run that
   was stopped and resumed is the run that was not. A weight's gradient adds rows in ascending order;
   rows are never split over threads. */

/* What a public call takes of an option struct, which may be an older one (chapter 14); bytes of
   memory and processors that are there to be used (chapter 10). */
static int copy_options(void *to, size_t size, size_t oldest, const void *from, const char *name,
                        lvm_error *error);
static int64_t os_memory_available(void);
static int processors(void);

/* ---- What learns ---- */

/* A tensor of the description while it learns, or stays. */
struct param {
    char name[96];       /* as in the weights file */
    struct tensor w;     /* [rows][cols], a vector [1][cols]: values, or where init has them */
    float *values;       /* as w, where it learns or is new; else NULL */
    float *g, *m, *v;    /* as w: gradient; AdamW's averages of it and of its square. NULL: frozen */
    int learns, decays;  /* matrices decay, vectors do not */
    const struct tensor_spec *spec; /* of the description; NULL: an adapter */
};

/* y = x w^T + bias + scale (x a^T) b^T: a linear layer, with an adapter where there is one. */
struct linear {
    struct param *w, *bias; /* [out][in]  [out], or NULL */
    struct param *a, *b;    /* [rank][in]  [out][rank], or both NULL */
};

struct block {
    struct param *attn_norm, *ffn_norm;          /* [D] */
    struct linear q, k, v, o, gate, up, down;    /* as struct layer */
};

/* What is kept of a layer's forward for its backward; N rows. */
struct kept {
    float *x;                 /* [N][D]: its input */
    float *q, *k, *v;         /* [N][H d]  [N][G d]  [N][G d]: q and k rotated */
    float *o, *lse;           /* [N][H d]: attention's answer;  [N][H]: ln of its sums of exp */
    float *mid;               /* [N][D]: x + Wo o */
    float *gate, *up;         /* [N][F] */
};

/* Rows that attend to each other: `n` of them from row `first` on, at positions 0 .. n-1. */
struct piece {
    int first, n;
};

/* Rows that go through the model together. */
struct rows {
    int n;                    /* a multiple of the context's length */
    int32_t *ids, *targets;   /* [n]; the token behind each */
    float *weights;           /* [n]: of its loss; 0: none */
    struct piece *pieces;     /* [n_pieces], ascending, apart; padding is in none */
    int n_pieces;
};

enum { DQ_PARTS = 4, PASS_TOKENS = 4096 };

/* Memory that a pass works in; N rows. What the backward leaves has a d in front. */
struct work {
    float *h, *dx, *dh;       /* [N][D]: normed; gradients by the residual stream and by h */
    float *act, *dact;        /* [N][F]: silu(gate) up, later by up; its gradient, later by gate */
    float *dq, *dk, *dv;      /* [DQ_PARTS][N][H d]  [N][G d]  [N][G d] */
    float *d_o, *delta;       /* [N][H d];  [N][H]: do . o of each head */
    float *rms, *nll;         /* [N]: 1 / rms of a row;  -ln p(target) */
    float *turned;            /* a matrix, transposed */
    float *u;                 /* [N][rank] */
    float *logits;            /* [LOGIT_ROWS][V rounded up to 16] */
    int *positions;           /* [N]: of a row in its piece; -1: padding */
    double *squares;          /* of each chunk of gradients */
};

struct net {
    const struct llama *a;    /* sizes */
    struct param *params;     /* [n_params]: the description's in its order, then adapters */
    int n_params;
    struct param *embed, *norm, *output; /* [V][D]  [D]  [V][D], which may be embed */
    struct block *blocks;     /* [L] */
    int lowest;               /* layers below it learn nothing */
    float lora_scale;         /* alpha / rank */
    int max_rows;             /* N at most */
    struct kept *kept;        /* [L + 1]: of the last and before first_kept the input alone */
    struct kept again;        /* of one layer at a time, computed again */
    int first_kept;
    float *rope;              /* [context][2][d / 2]: cosines, sines */
    struct work work;
};

/* ---- Data ---- */

/* A .tok file, see below. */
struct lvm_tokens {
    char *name;
    void *mapped;             /* the file; or NULL: data is owned, or foreign memory */
    uint8_t *owned;           /* or NULL */
    const uint8_t *data;      /* [size] */
    size_t size;
    int64_t n_sentences, n_tokens;
    int bound;                /* ids are below */
    int image_tokens;         /* of an image; 0: unknown */
    const uint8_t *ids;       /* [n_tokens] u16 */
    const uint8_t *weights;   /* [n_tokens], 16: weight 1; NULL: all 16 */
    const uint8_t *starts;    /* [n_sentences + 1] u64, ascending: where a sentence begins in ids */
    uint64_t fingerprint;
};

/* All sentences that a trainer reads, and how they become rows. */
struct stream {
    const lvm_tokens *const *files; /* [n_files] */
    int n_files;
    int64_t n_sentences;
    int context, packing, isolate, bos, eos, shuffle;
    uint64_t seed;
};

/* Where a stream is: the token `token` (bos and eos counted) of the sentence that comes as number
   `sentence` in this pass's order. */
struct data_position {
    int64_t epoch, sentence, token;
};

/* ---- A trainer ---- */

struct lvm_trainer {
    lvm_train_options o;      /* settled; its texts are copies */
    lvm_model *m;             /* described; its transformer's tensors are the parameters' */
    struct exec e;
    struct net net;
    struct stream stream;
    struct data_position at;
    struct rows rows;         /* of a step */
    int rows_at_once;         /* rows of context tokens that go through the model together */
    struct piece *pass_pieces; /* [max_rows] */
    int64_t step, tokens, skipped, in_a_row;
    int64_t units, all_units; /* of progress: before this pass, and of the call */
    double usual_norm;        /* a running mean of gradient norms */
};

/* ---- Products: y = x w^T, dx = dy w, dw = dy^T x ----

   All three are c[i][j] (+)= sum over k of a[i][k] b(k, j) with rows of a contiguous along k, on the
   outer tiles of chapter 3. A task has 32 columns of c: it packs b's part for 256 k at a time and
   sends all its rows of a past it. k ascends. */

enum {
    PRODUCT_K = 256,         /* of a packed part: what stays in the first two caches */
    PRODUCT_COLS = 2 * PANEL,
    PRODUCT_ROWS = 192,      /* rows of a that pass the panels together */
    MIN_PRODUCT_ROWS = 512   /* of a task, where there are so many: packing must pay */
};

struct product {
    const struct exec *e;
    int m, n, k;
    const float *a;          /* [m][k] */
    const struct tensor *b;  /* [n][k], of any type; or, with b_is_k_by_n, [k][n] */
    float *c;                /* [m][n] */
    int64_t lda, ldc;        /* floats between two rows of a and of c */
    int b_is_k_by_n, accumulate, row_blocks;
};

/* Columns k0 .. of a row of any type as floats. */
static void row_floats(const struct kernels *kern, const struct tensor *w, int row, int k0, int n,
                       float *y) {
    kern->elementwise.to_f32(w->type, tensor_row(w, row) + type_bytes(w->type, k0), y, n);
}

/* Panels of b for k0 .. k0 + k and `cols` columns from j0 on, zeros beyond. buffer: [16][k]. */
static void pack_product(const struct product *p, int j0, int cols, int k0, int k, float *panels,
                         float *buffer) {
    const struct kernels *kern = p->e->kern;
    float row[PRODUCT_COLS] = {0};
    for (int i = 0; p->b_is_k_by_n && i < k; i++) {
        row_floats(kern, p->b, k0 + i, j0, cols, row);
        memcpy(panels + (int64_t)i * PANEL, row, PANEL * sizeof *row);
        if (cols > PANEL)
            memcpy(panels + (int64_t)(PRODUCT_K + i) * PANEL, row + PANEL, PANEL * sizeof *row);
    }
    for (int s = 0; !p->b_is_k_by_n && s < cols; s += PANEL) {
        for (int j = 0; j < PANEL; j++) {
            if (s + j < cols) row_floats(kern, p->b, j0 + s + j, k0, k, buffer + j * k);
            else memset(buffer + j * k, 0, (size_t)k * sizeof *buffer);
        }
        kern->conv.pack_panel(buffer, k, k, panels + (int64_t)s * PRODUCT_K);
    }
}

/* Rows i0 .. i0 + rows of c against packed panels; columns that fill no panel go by way of `edge`,
   [rows][32]. */
static void multiply_product(const struct product *p, int i0, int rows, int j0, int cols, int k0,
                             int k, const float *panels, float *edge) {
    const float *a[PRODUCT_ROWS] = {NULL};
    float *c = p->c + i0 * p->ldc + j0;
    int n_panels = (cols + PANEL - 1) / PANEL, add = p->accumulate || k0 > 0;
    for (int r = 0; r < rows; r++) a[r] = p->a + (i0 + r) * p->lda + k0;
    if (cols % PANEL == 0) {
        matmul_panels(p->e->kern, rows, k, a, panels, PRODUCT_K * PANEL, n_panels, c, p->ldc, add);
        return;
    }
    size_t bytes = (size_t)cols * sizeof *c;
    for (int r = 0; add && r < rows; r++)
        memcpy(edge + r * PRODUCT_COLS, c + r * p->ldc, bytes);
    matmul_panels(p->e->kern, rows, k, a, panels, PRODUCT_K * PANEL, n_panels, edge, PRODUCT_COLS,
                  add);
    for (int r = 0; r < rows; r++)
        memcpy(c + r * p->ldc, edge + r * PRODUCT_COLS, bytes);
}

static int64_t product_scratch(void) {
    return PRODUCT_K * PRODUCT_COLS + PRODUCT_K * PANEL + PRODUCT_ROWS * PRODUCT_COLS;
}

static void product_task(void *arg, int task, int thread) {
    const struct product *p = arg;
    int j0 = task / p->row_blocks * PRODUCT_COLS, block = task % p->row_blocks;
    int cols = p->n - j0 < PRODUCT_COLS ? p->n - j0 : PRODUCT_COLS;
    int first = (int)((int64_t)p->m * block / p->row_blocks),
        end = (int)((int64_t)p->m * (block + 1) / p->row_blocks);
    float *panels = exec_scratch(p->e, thread), *buffer = panels + PRODUCT_K * PRODUCT_COLS,
          *edge = buffer + PRODUCT_K * PANEL;
    for (int k0 = 0; k0 < p->k; k0 += PRODUCT_K) {
        int k = p->k - k0 < PRODUCT_K ? p->k - k0 : PRODUCT_K;
        pack_product(p, j0, cols, k0, k, panels, buffer);
        for (int i = first; i < end; i += PRODUCT_ROWS)
            multiply_product(p, i, end - i < PRODUCT_ROWS ? end - i : PRODUCT_ROWS, j0, cols, k0,
                             k, panels, edge);
    }
}

static void run_product(struct product p) {
    int col_blocks = (p.n + PRODUCT_COLS - 1) / PRODUCT_COLS,
        wanted = (4 * pool_threads(p.e->pool) + col_blocks - 1) / col_blocks;
    p.row_blocks = (int)max64(1, min64(wanted, p.m / MIN_PRODUCT_ROWS));
    pool_run(p.e->pool, col_blocks * p.row_blocks, product_task, &p);
}

/* y[n][w->rows] (+)= x[n][w->cols] w^T; rows of y are ld apart. */
static void product_forward(const struct exec *e, const struct tensor *w, const float *x, int n,
                            float *y, int64_t ld, int accumulate) {
    run_product((struct product){.e = e, .m = n, .n = w->rows, .k = w->cols, .a = x, .b = w, .c = y,
                                 .lda = w->cols, .ldc = ld, .accumulate = accumulate});
}

/* dx[n][w->cols] (+)= dy[n][w->rows] w; rows of dy are ld apart. */
static void product_input(const struct exec *e, const struct tensor *w, const float *dy, int64_t ld,
                          int n, float *dx, int accumulate) {
    run_product((struct product){.e = e, .m = n, .n = w->cols, .k = w->rows, .a = dy, .b = w,
                                 .c = dx, .lda = ld, .ldc = w->cols, .b_is_k_by_n = 1,
                                 .accumulate = accumulate});
}

struct transpose_job {
    const struct kernels *kern;
    const float *from; /* [rows][cols] */
    float *to;         /* [cols][rows] */
    int64_t ld_from, ld_to;
    int rows, cols;
};

/* to[cols][rows] = from[rows][cols], ld floats apart: 16 rows at a time by way of a panel. */
static void transpose(const struct kernels *kern, const float *from, int64_t ld_from, int rows,
                      int cols, float *to, int64_t ld_to) {
    float panel[PRODUCT_COLS * PANEL];
    int whole = rows / PANEL * PANEL;
    for (int c0 = 0; c0 < cols; c0 += PRODUCT_COLS) {
        int n = cols - c0 < PRODUCT_COLS ? cols - c0 : PRODUCT_COLS;
        for (int r = 0; r < whole; r += PANEL) {
            kern->conv.pack_panel(from + r * ld_from + c0, ld_from, n, panel);
            for (int c = 0; c < n; c++)
                memcpy(to + (c0 + c) * ld_to + r, panel + c * PANEL, PANEL * sizeof *panel);
        }
        for (int r = whole; r < rows; r++)
            for (int c = c0; c < c0 + n; c++) to[c * ld_to + r] = from[r * ld_from + c];
    }
}

static void transpose_task(void *arg, int task, int thread) {
    const struct transpose_job *job = arg;
    int c0 = task * PRODUCT_COLS, cols = job->cols - c0;
    (void)thread;
    transpose(job->kern, job->from + c0, job->ld_from, job->rows,
              cols < PRODUCT_COLS ? cols : PRODUCT_COLS, job->to + c0 * job->ld_to, job->ld_to);
}

/* Rows of a transposed matrix lie so far apart that they do not share the sets of a cache. */
static int64_t transposed_ld(int rows) { return (int64_t)round_up(rows, PANEL) + PANEL; }

/* dw[out][in] += dy[n][out]^T x[n][in]; rows of dy are ld apart; turned: [out][transposed_ld(n)] */
static void product_weights(const struct exec *e, const float *dy, int64_t ld, const float *x,
                            int n, int out, int in, float *turned, float *dw) {
    struct transpose_job t = {e->kern, dy, turned, ld, transposed_ld(n), n, out};
    const struct tensor b = {(const uint8_t *)x, (int64_t)in * 4, LVM_F32, n, in};
    pool_run(e->pool, (out + PRODUCT_COLS - 1) / PRODUCT_COLS, transpose_task, &t);
    run_product((struct product){.e = e, .m = out, .n = in, .k = n, .a = turned, .b = &b, .c = dw,
                                 .lda = t.ld_to, .ldc = in, .b_is_k_by_n = 1, .accumulate = 1});
}


/* ---- Operations, forward and backward ----

   Each works on rows (tokens) or on columns (of a weight, whose gradient adds rows in ascending
   order), OP_ROWS or OP_COLS a task. */

enum { OP_ROWS = 32, OP_COLS = 32 };

/* What the tasks of an operation read and write; which fields, its own lines say. */
struct op {
    struct lvm_trainer *t;
    int n, cols;               /* rows, and columns of each */
    const float *x, *w, *y, *dy;
    float *out, *dx, *dw, *rms;
    const struct kept *kept;
    const struct rows *r;
};

static void for_rows(struct op *op, task_fn *fn) {
    pool_run(op->t->e.pool, (op->n + OP_ROWS - 1) / OP_ROWS, fn, op);
}

static void for_columns(struct op *op, task_fn *fn) {
    pool_run(op->t->e.pool, (op->cols + OP_COLS - 1) / OP_COLS, fn, op);
}

static int end_row(const struct op *op, int task) {
    return (int)min64(op->n, ((int64_t)task + 1) * OP_ROWS);
}

static int end_column(const struct op *op, int task) {
    return (int)min64(op->cols, ((int64_t)task + 1) * OP_COLS);
}

/* out = w x / rms, rms = sqrt(mean(x^2) + eps) */
static void rmsnorm_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    (void)thread;
    for (int r = task * OP_ROWS; r < end_row(op, task); r++)
        op->t->e.kern->elementwise.rmsnorm(op->x + (int64_t)r * op->cols, op->w,
                                           op->t->net.a->eps, op->cols,
                                           op->out + (int64_t)r * op->cols);
}

/* out = w x / rms:   dx += (w dy - x mean(w dy x) / rms^2) / rms,   and 1 / rms of each row */
static void rmsnorm_backward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    (void)thread;
    for (int r = task * OP_ROWS; r < end_row(op, task); r++) {
        const float *x = op->x + (int64_t)r * op->cols, *dy = op->dy + (int64_t)r * op->cols;
        float *dx = op->dx + (int64_t)r * op->cols;
        double squares = 0, products = 0;
        for (int i = 0; i < op->cols; i++) {
            squares += (double)x[i] * x[i];
            products += (double)(op->w[i] * dy[i]) * x[i];
        }
        double inv = 1 / sqrt(squares / op->cols + op->t->net.a->eps);
        float scale = (float)inv, back = (float)(inv * inv * inv * products / op->cols);
        for (int i = 0; i < op->cols; i++) dx[i] += scale * op->w[i] * dy[i] - back * x[i];
        op->rms[r] = scale;
    }
}

/* out = w x / rms:   dw += sum over rows of dy x / rms */
static void rmsnorm_weight_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    int c0 = task * OP_COLS, n = end_column(op, task) - c0;
    float sum[OP_COLS] = {0};
    (void)thread;
    for (int r = 0; r < op->n; r++) {
        const float *x = op->x + (int64_t)r * op->cols + c0,
                    *dy = op->dy + (int64_t)r * op->cols + c0;
        for (int c = 0; c < n; c++) sum[c] += dy[c] * x[c] * op->rms[r];
    }
    for (int c = 0; c < n; c++) op->dw[c0 + c] += sum[c];
}

/* y = x w^T + bias:   dbias += sum over rows of dy */
static void bias_backward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    int c0 = task * OP_COLS, n = end_column(op, task) - c0;
    float sum[OP_COLS] = {0};
    (void)thread;
    for (int r = 0; r < op->n; r++)
        for (int c = 0; c < n; c++) sum[c] += op->dy[(int64_t)r * op->cols + c0 + c];
    for (int c = 0; c < n; c++) op->dw[c0 + c] += sum[c];
}

static void add_bias_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    (void)thread;
    for (int r = task * OP_ROWS; r < end_row(op, task); r++)
        for (int c = 0; c < op->cols; c++) op->out[(int64_t)r * op->cols + c] += op->w[c];
}

/* u[n][rank] = scale x a^T: the narrow middle of an adapter */
static void adapter_middle(struct lvm_trainer *t, const struct linear *l, const float *x, int n) {
    float *u = t->net.work.u;
    product_forward(&t->e, &l->a->w, x, n, u, l->a->w.rows, 0);
    for (int64_t i = 0; i < (int64_t)n * l->a->w.rows; i++) u[i] *= t->net.lora_scale;
}

/* y (+)= x w^T + bias + scale (x a^T) b^T; x[n][in], y[n][out] */
static void linear_forward(struct lvm_trainer *t, const struct linear *l, const float *x, int n,
                           float *y, int accumulate) {
    int out = l->w->w.rows;
    product_forward(&t->e, &l->w->w, x, n, y, out, accumulate);
    if (l->bias != NULL)
        for_rows(&(struct op){.t = t, .n = n, .cols = out, .w = floats(&l->bias->w), .out = y},
                 add_bias_task);
    if (l->a == NULL) return;
    adapter_middle(t, l, x, n);
    product_forward(&t->e, &l->b->w, t->net.work.u, n, y, out, 1);
}

/* y = ... + u b^T, u = scale x a^T:   db += dy^T u,  du = scale dy b,  da += du^T x,  dx += du a */
static void adapter_backward(struct lvm_trainer *t, const struct linear *l, const float *x,
                             const float *dy, int n, float *dx) {
    struct work *k = &t->net.work;
    int out = l->b->w.rows, in = l->a->w.cols, rank = l->a->w.rows;
    adapter_middle(t, l, x, n);
    product_weights(&t->e, dy, out, k->u, n, out, rank, k->turned, l->b->g);
    product_input(&t->e, &l->b->w, dy, out, n, k->u, 0);
    for (int64_t i = 0; i < (int64_t)n * rank; i++) k->u[i] *= t->net.lora_scale;
    product_weights(&t->e, k->u, rank, x, n, rank, in, k->turned, l->a->g);
    if (dx != NULL) product_input(&t->e, &l->a->w, k->u, rank, n, dx, 1);
}

/* y = x w^T + bias + adapter:   dx (+)= dy w,  dw += dy^T x,  dbias += sum of dy.   dx NULL: not
   wanted. */
static void linear_backward(struct lvm_trainer *t, const struct linear *l, const float *x,
                            const float *dy, int n, float *dx, int accumulate) {
    int out = l->w->w.rows, in = l->w->w.cols;
    if (dx != NULL) product_input(&t->e, &l->w->w, dy, out, n, dx, accumulate);
    if (l->w->g != NULL)
        product_weights(&t->e, dy, out, x, n, out, in, t->net.work.turned, l->w->g);
    if (l->bias != NULL && l->bias->g != NULL)
        for_columns(&(struct op){.t = t, .n = n, .cols = out, .dy = dy, .dw = l->bias->g},
                    bias_backward_task);
    if (l->a != NULL) adapter_backward(t, l, x, dy, n, dx);
}

static void norm_forward(struct lvm_trainer *t, const struct param *w, const float *x, int n,
                         float *y) {
    for_rows(&(struct op){.t = t, .n = n, .cols = w->w.cols, .x = x, .w = floats(&w->w), .out = y},
             rmsnorm_task);
}

static void norm_backward(struct lvm_trainer *t, const struct param *w, const float *x,
                          const float *dy, int n, float *dx) {
    struct op op = {.t = t, .n = n, .cols = w->w.cols, .x = x, .w = floats(&w->w), .dy = dy,
                    .dx = dx, .dw = w->g, .rms = t->net.work.rms};
    for_rows(&op, rmsnorm_backward_task);
    if (w->g != NULL) for_columns(&op, rmsnorm_weight_task);
}

/* out = silu(x) y, x the gate and y what it lets through */
static void swiglu_forward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    (void)thread;
    for (int r = task * OP_ROWS; r < end_row(op, task); r++) {
        int64_t at = (int64_t)r * op->cols;
        memcpy(op->out + at, op->x + at, (size_t)op->cols * sizeof(float));
        op->t->e.kern->elementwise.silu_mul(op->out + at, op->y + at, op->cols);
    }
}

/* out = silu(x) y, silu(x) = x s, s = 1 / (1 + e^-x):   dx = dy y (s + x s (1 - s)),  dout = dy x s.
   dx may be dy; a row of silu(x) goes to scratch. */
static void swiglu_backward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    float *silus = exec_scratch(&op->t->e, thread), *ones = silus + op->cols;
    for (int i = 0; i < op->cols; i++) ones[i] = 1;
    for (int r = task * OP_ROWS; r < end_row(op, task); r++) {
        int64_t at = (int64_t)r * op->cols;
        const float *x = op->x + at, *y = op->y + at, *dy = op->dy + at;
        memcpy(silus, x, (size_t)op->cols * sizeof *silus);
        op->t->e.kern->elementwise.silu_mul(silus, ones, op->cols);
        for (int i = 0; i < op->cols; i++) {
            float silu_x = silus[i], s = x[i] != 0 ? silu_x / x[i] : 0.5f, d = dy[i];
            op->dx[at + i] = d * y[i] * (s + silu_x * (1 - s));
            op->out[at + i] = d * silu_x;
        }
    }
}

/* RoPE's backward: a rotation by the same angle the other way. */
static void rotate_backward(const float *dy, const float *cosines, const float *sines, int d,
                            float *dx) {
    int half = d / 2;
    for (int i = 0; i < half; i++) {
        dx[i] = dy[i] * cosines[i] + dy[i + half] * sines[i];
        dx[i + half] = dy[i + half] * cosines[i] - dy[i] * sines[i];
    }
}

/* Queries and keys turn by the angles of their positions; rows of padding get an answer of 0. */
static void rope_forward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    const struct net *net = &op->t->net;
    int H = net->a->H, G = net->a->G, d = net->a->d;
    float *turned = exec_scratch(&op->t->e, thread);
    for (int r = task * OP_ROWS; r < end_row(op, task); r++) {
        float *q = op->kept->q + (int64_t)r * H * d, *k = op->kept->k + (int64_t)r * G * d;
        int at = net->work.positions[r];
        if (at < 0) memset(op->kept->o + (int64_t)r * H * d, 0, (size_t)(H * d) * sizeof *q);
        const float *cosines = net->rope + (int64_t)at * d, *sines = cosines + d / 2;
        for (int h = 0; at >= 0 && h < H + G; h++) {
            float *x = h < H ? q + h * d : k + (h - H) * d;
            rotate(x, cosines, sines, d, turned);
            memcpy(x, turned, (size_t)d * sizeof *x);
        }
    }
}

/* The same backwards; dq's parts are added up first. Rows of padding get nothing. */
static void rope_backward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    const struct net *net = &op->t->net;
    const struct work *w = &net->work;
    int H = net->a->H, G = net->a->G, d = net->a->d;
    int64_t part = (int64_t)net->max_rows * H * d;
    float *turned = exec_scratch(&op->t->e, thread);
    for (int r = task * OP_ROWS; r < end_row(op, task); r++) {
        float *dq = w->dq + (int64_t)r * H * d, *dk = w->dk + (int64_t)r * G * d;
        int at = w->positions[r];
        const float *cosines = net->rope + (int64_t)at * d, *sines = cosines + d / 2;
        for (int p = 1; at >= 0 && p < DQ_PARTS; p++)
            for (int i = 0; i < H * d; i++) dq[i] += dq[p * part + i];
        for (int h = 0; h < H + G; h++) {
            float *x = h < H ? dq + h * d : dk + (h - H) * d;
            if (at < 0) memset(turned, 0, (size_t)d * sizeof *x);
            else rotate_backward(x, cosines, sines, d, turned);
            memcpy(x, turned, (size_t)d * sizeof *x);
        }
        if (at < 0) memset(w->dv + (int64_t)r * G * d, 0, (size_t)(G * d) * sizeof *dk);
    }
}

/* ---- Attention, forward and backward ----

   Forward, a row i of queries with keys 0 .. i of its piece, in blocks of 256 keys as in chapter 3:

       s_j = scale q . k_j,   lse = ln sum_j e^(s_j),   p_j = e^(s_j - lse),   o = sum_j p_j v_j

   Backward, by the same blocks, with p computed again from lse (Dao et al. 2022, arXiv 2205.14135):

       dv_j += p_j do,   dp_j = do . v_j,   ds_j = p_j (dp_j - do . o) scale,
       dq += sum_j ds_j k_j,   dk_j += ds_j q

   A task has a key/value head and every DQ_PARTS-th block of keys of a piece, and adds to a part of
   dq of its own: as many parts whatever the threads, added up by rope_backward_task. */

enum { ATTEND_ROWS = 256, BACK_ROWS = 72 }; /* query rows of a task; that pass a block together */

/* The next n floats of scratch memory. */
static float *take(float **at, int64_t n) {
    float *p = *at;
    *at += (n + PANEL - 1) / PANEL * PANEL;
    return p;
}

/* n rows of a head, from[n][d], ld apart, as [n rounded up to 16][dp] with zeros beyond. */
static void head_rows(const float *from, int64_t ld, int n, int d, int dp, float *rows) {
    memset(rows, 0, (size_t)round_up(n, PANEL) * (size_t)dp * sizeof *rows);
    for (int r = 0; r < n; r++)
        memcpy(rows + (int64_t)r * dp, from + r * ld, (size_t)d * sizeof *rows);
}

/* Right operands of outer products: rows[n][dp] as panels[n / 16][dp][16], for sums over dp; */
static void pack_heads(const struct kernels *kern, const float *rows, int n, int dp,
                       float *panels) {
    for (int r = 0; r < n; r += PANEL)
        kern->conv.pack_panel(rows + (int64_t)r * dp, dp, dp, panels + (int64_t)r * dp);
}

/* and as strips[dp / 16][KV_BLOCK][16], for sums over rows. */
static void strip_heads(const float *rows, int n, int dp, float *strips) {
    for (int c = 0; c < dp; c += PANEL)
        for (int r = 0; r < n; r++)
            memcpy(strips + (int64_t)c * KV_BLOCK + r * PANEL, rows + (int64_t)r * dp + c,
                   PANEL * sizeof *strips);
}

struct attention {
    struct lvm_trainer *t;
    const struct rows *r;
    const struct kept *kept;
};

static int attend_chunks(const struct piece *p) { return (p->n + ATTEND_ROWS - 1) / ATTEND_ROWS; }

/* o and lse of up to ATTEND_ROWS rows of one query head: chunks of all heads of all pieces. */
static void attention_forward_task(void *arg, int task, int thread) {
    const struct attention *job = arg;
    const struct llama *a = job->t->net.a;
    const struct kernels *kern = job->t->e.kern;
    const struct piece *p = job->r->pieces;
    for (; task >= a->H * attend_chunks(p); p++) task -= a->H * attend_chunks(p);
    int H = a->H, G = a->G, d = a->d, dp = round_up(d, PANEL), h = task % H, g = h / (H / G);
    int first = task / H * ATTEND_ROWS, n = p->n - first < ATTEND_ROWS ? p->n - first : ATTEND_ROWS;
    float *at = exec_scratch(&job->t->e, thread), *rows = take(&at, KV_BLOCK * dp),
          *keys = take(&at, KV_BLOCK * dp), *values = take(&at, KV_BLOCK * dp),
          *q = take(&at, ATTEND_ROWS * dp), *o = take(&at, ATTEND_ROWS * dp);
    struct query queries[ATTEND_ROWS];
    head_rows(job->kept->q + ((int64_t)(p->first + first) * H + h) * d, (int64_t)H * d, n, d, dp, q);
    memset(o, 0, (size_t)n * (size_t)dp * sizeof *o);
    for (int r = 0; r < n; r++)
        queries[r] = (struct query){q + r * dp, o + r * dp, -HUGE_VALF, 0, 0, NULL};
    for (int k0 = 0; k0 < first + n; k0 += KV_BLOCK) {
        int count = (int)min64(KV_BLOCK, first + n - k0);
        int64_t from = ((int64_t)(p->first + k0) * G + g) * d;
        head_rows(job->kept->k + from, (int64_t)G * d, count, d, dp, rows);
        pack_heads(kern, rows, count, dp, keys);
        head_rows(job->kept->v + from, (int64_t)G * d, count, d, dp, rows);
        strip_heads(rows, count, dp, values);
        for (int r = 0; r < n; r++) queries[r].keys = (int)min64(count, first + r + 1 - k0);
        for (int r = 0; r < n; r += QUERY_ROWS)
            attend_block(kern, queries + r, n - r < QUERY_ROWS ? n - r : QUERY_ROWS, dp, keys,
                         values, 1 / sqrtf((float)d), at);
    }
    for (int r = 0; r < n; r++) {
        int64_t row = (int64_t)(p->first + first + r) * H + h;
        for (int i = 0; i < d; i++) job->kept->o[row * d + i] = queries[r].o[i] / queries[r].l;
        job->kept->lse[row] = queries[r].m + (float)log_f64(queries[r].l);
    }
}

static void attention_forward(struct lvm_trainer *t, const struct rows *r,
                              const struct kept *kept) {
    struct attention job = {t, r, kept};
    int tasks = 0;
    for (int i = 0; i < r->n_pieces; i++) tasks += t->net.a->H * attend_chunks(&r->pieces[i]);
    pool_run(t->e.pool, tasks, attention_forward_task, &job);
}

/* Scratch of a backward task: one block of keys and a few rows of queries. */
struct attend_back {
    float *rows;                          /* [KV_BLOCK][dp] */
    float *k_panels, *v_panels, *k_strips; /* [KV_BLOCK][dp] */
    float *dk, *dv;                       /* [dp][KV_BLOCK] */
    float *q, *d_o, *q_turned, *o_turned; /* [80][dp]  [80][dp]  [dp][80]  [dp][80] */
    float *s, *ds;                        /* [72][KV_BLOCK]: scores, later p; dp, later ds */
    float *p_strips, *ds_strips;          /* [KV_BLOCK / 16][72][16] */
    float *dq;                            /* [72][dp] */
    int d, dp, keys, rows_n, rows_from;   /* of this block; rows_from: behind its first key */
    float scale;
};

enum { BACK_LD = (BACK_ROWS + PANEL - 1) / PANEL * PANEL };

/* Floats of scratch of a backward task, and where each array lies in it. */
static int64_t attend_back_scratch(int dp) {
    return (6 * KV_BLOCK + 5 * BACK_LD) * (int64_t)dp + 4 * BACK_ROWS * KV_BLOCK;
}

static void attend_back_take(struct attend_back *b, float *at, int dp) {
    float **block[] = {&b->rows, &b->k_panels, &b->v_panels, &b->k_strips, &b->dk,
                                    &b->dv};
    float **turned[] = {&b->q, &b->d_o, &b->q_turned, &b->o_turned, &b->dq};
    float **square[] = {&b->s, &b->ds, &b->p_strips, &b->ds_strips};
    for (int i = 0; i < 6; i++) *block[i] = take(&at, (int64_t)KV_BLOCK * dp);
    for (int i = 0; i < 5; i++) *turned[i] = take(&at, (int64_t)BACK_LD * dp);
    for (int i = 0; i < 4; i++) *square[i] = take(&at, (int64_t)BACK_ROWS * KV_BLOCK);
}

/* p and ds of the rows from s = q k^T and ds = do v^T; both as strips, ds as rows too. */
static void attention_probabilities(const struct kernels *kern, const struct attend_back *b,
                                    const float *lse, const float *delta, int64_t ld, int panels) {
    for (int r = 0; r < b->rows_n; r++) {
        float *s = b->s + r * KV_BLOCK, *ds = b->ds + r * KV_BLOCK, max = 0;
        int keys = (int)min64(b->keys, b->rows_from + r + 1);
        kern->attention.softmax(s, panels * PANEL, keys, b->scale, &max); /* e^(scale s - max) */
        float factor = exp_f32(max - lse[r * ld]), dot = delta[r * ld];
        for (int j = 0; j < panels * PANEL; j++) {
            s[j] *= factor;                                       /* p = e^(scale s - lse) */
            ds[j] = s[j] * (ds[j] - dot) * b->scale;              /* p (dp - do . o) scale */
        }
        for (int c = 0; c < panels; c++) {
            int64_t to = ((int64_t)c * BACK_ROWS + r) * PANEL;
            memcpy(b->p_strips + to, s + c * PANEL, PANEL * sizeof *s);
            memcpy(b->ds_strips + to, ds + c * PANEL, PANEL * sizeof *s);
        }
    }
}

/* Row pointers into a matrix, ld apart. */
static void point(const float **rows, const float *matrix, int n, int64_t ld) {
    for (int r = 0; r < n; r++) rows[r] = matrix + r * ld;
}

/* A few query rows of one head against a block of keys: dk and dv grow, dq[rows][d] is added to. */
static void attention_backward_rows(const struct attention *job, struct attend_back *b, int row,
                                    int h, float *dq) {
    const struct kernels *kern = job->t->e.kern;
    const struct work *w = &job->t->net.work;
    int H = job->t->net.a->H, d = b->d, dp = b->dp, n = b->rows_n;
    int keys = (int)min64(b->keys, b->rows_from + n), panels = (keys + PANEL - 1) / PANEL;
    int64_t at = (int64_t)row * H + h;
    const float *a[KV_BLOCK];
    head_rows(job->kept->q + at * d, (int64_t)H * d, n, d, dp, b->q);
    head_rows(w->d_o + at * d, (int64_t)H * d, n, d, dp, b->d_o);
    point(a, b->q, n, dp);
    matmul_panels(kern, n, dp, a, b->k_panels, dp * PANEL, panels, b->s, KV_BLOCK, 0);
    point(a, b->d_o, n, dp);
    matmul_panels(kern, n, dp, a, b->v_panels, dp * PANEL, panels, b->ds, KV_BLOCK, 0);
    attention_probabilities(kern, b, job->kept->lse + at, w->delta + at, H, panels);
    point(a, b->ds, n, KV_BLOCK);                                         /* dq += ds k */
    matmul_panels(kern, n, keys, a, b->k_strips, KV_BLOCK * PANEL, dp / PANEL, b->dq, dp, 0);
    for (int r = 0; r < n; r++)
        for (int i = 0; i < d; i++) dq[(int64_t)r * H * d + i] += b->dq[r * dp + i];
    transpose(kern, b->d_o, dp, n, dp, b->o_turned, BACK_LD);
    point(a, b->o_turned, dp, BACK_LD);                                   /* dv^T += do^T p */
    matmul_panels(kern, dp, n, a, b->p_strips, BACK_ROWS * PANEL, panels, b->dv, KV_BLOCK, 1);
    transpose(kern, b->q, dp, n, dp, b->q_turned, BACK_LD);
    point(a, b->q_turned, dp, BACK_LD);                                   /* dk^T += q^T ds */
    matmul_panels(kern, dp, n, a, b->ds_strips, BACK_ROWS * PANEL, panels, b->dk, KV_BLOCK, 1);
}

/* All rows of a piece that see the block of keys from k0 on, of all query heads that share it. */
static void attention_backward_block(const struct attention *job, struct attend_back *b,
                                     const struct piece *p, int g, int k0, float *dq) {
    const struct llama *a = job->t->net.a;
    const struct work *w = &job->t->net.work;
    const struct kernels *kern = job->t->e.kern;
    int d = b->d, dp = b->dp, group = a->H / a->G;
    int64_t from = ((int64_t)(p->first + k0) * a->G + g) * d, ld = (int64_t)a->G * d;
    size_t bytes = (size_t)KV_BLOCK * (size_t)dp * sizeof(float);
    b->keys = (int)min64(KV_BLOCK, p->n - k0);
    head_rows(job->kept->v + from, ld, b->keys, d, dp, b->rows);
    pack_heads(kern, b->rows, b->keys, dp, b->v_panels);
    head_rows(job->kept->k + from, ld, b->keys, d, dp, b->rows);
    pack_heads(kern, b->rows, b->keys, dp, b->k_panels);
    strip_heads(b->rows, b->keys, dp, b->k_strips);
    memset(b->dk, 0, bytes);
    memset(b->dv, 0, bytes);
    for (int h = g * group; h < (g + 1) * group; h++)
        for (int i = k0; i < p->n; i += BACK_ROWS) {
            int row = p->first + i;
            b->rows_n = (int)min64(BACK_ROWS, p->n - i);
            b->rows_from = i - k0;
            attention_backward_rows(job, b, row, h, dq + ((int64_t)row * a->H + h) * d);
        }
    transpose(kern, b->dk, KV_BLOCK, d, b->keys, w->dk + from, ld);
    transpose(kern, b->dv, KV_BLOCK, d, b->keys, w->dv + from, ld);
}

static void attention_backward_task(void *arg, int task, int thread) {
    const struct attention *job = arg;
    const struct llama *a = job->t->net.a;
    const struct piece *p = job->r->pieces + task / (a->G * DQ_PARTS);
    int g = task % a->G, part = task / a->G % DQ_PARTS, group = a->H / a->G;
    struct attend_back b = {.d = a->d, .dp = round_up(a->d, PANEL),
                            .scale = 1 / sqrtf((float)a->d)};
    float *dq = job->t->net.work.dq + (int64_t)part * job->t->net.max_rows * a->D;
    attend_back_take(&b, exec_scratch(&job->t->e, thread), b.dp);
    for (int r = p->first; r < p->first + p->n; r++)
        memset(dq + ((int64_t)r * a->H + g * group) * a->d, 0,
               (size_t)(group * a->d) * sizeof *dq);
    for (int k0 = part * KV_BLOCK; k0 < p->n; k0 += DQ_PARTS * KV_BLOCK)
        attention_backward_block(job, &b, p, g, k0, dq);
}

/* delta = do . o of each head, which is sum_j p_j dp_j */
static void attention_delta_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    const struct net *net = &op->t->net;
    int H = net->a->H, d = net->a->d;
    (void)thread;
    for (int r = task * OP_ROWS; r < end_row(op, task); r++)
        for (int h = 0; h < H; h++) {
            int64_t at = (int64_t)r * H + h;
            op->t->e.kern->matmul.dot_row(d, op->kept->o + at * d, op->dy + at * d, 0, 1,
                                          net->work.delta + at);
        }
}

static void attention_backward(struct lvm_trainer *t, const struct rows *r,
                               const struct kept *kept) {
    struct attention job = {t, r, kept};
    for_rows(&(struct op){.t = t, .n = r->n, .kept = kept, .dy = t->net.work.d_o},
             attention_delta_task);
    pool_run(t->e.pool, r->n_pieces * t->net.a->G * DQ_PARTS, attention_backward_task, &job);
}

/* ---- A layer, forward and backward ---- */

/* What is kept of layer i; of those before first_kept only the input has a place of its own. */
static struct kept kept_of(const struct net *net, int i) {
    struct kept k = i < net->first_kept ? net->again : net->kept[i];
    k.x = net->kept[i].x;
    return k;
}

static void activate(struct lvm_trainer *t, const struct kept *k, int n) {
    for_rows(&(struct op){.t = t, .n = n, .cols = t->net.a->F, .x = k->gate, .y = k->up,
                          .out = t->net.work.act}, swiglu_forward_task);
}

/* y = layer(k->x), keeping the rest of *k; y NULL: only that. As in run_layer of chapter 6. */
static void layer_forward(struct lvm_trainer *t, const struct block *l, const struct rows *r,
                          const struct kept *k, float *y) {
    float *h = t->net.work.h;
    size_t bytes = (size_t)r->n * (size_t)t->net.a->D * sizeof *h;
    int n = r->n;
    norm_forward(t, l->attn_norm, k->x, n, h);          /* h = rmsnorm(x) */
    linear_forward(t, &l->q, h, n, k->q, 0);            /* q, k, v = Wq h, Wk h, Wv h */
    linear_forward(t, &l->k, h, n, k->k, 0);
    linear_forward(t, &l->v, h, n, k->v, 0);
    for_rows(&(struct op){.t = t, .n = n, .kept = k}, rope_forward_task);
    attention_forward(t, r, k);                         /* o = attention(q, k, v) */
    memcpy(k->mid, k->x, bytes);
    linear_forward(t, &l->o, k->o, n, k->mid, 1);       /* mid = x + Wo o */
    norm_forward(t, l->ffn_norm, k->mid, n, h);         /* h = rmsnorm(mid) */
    linear_forward(t, &l->gate, h, n, k->gate, 0);      /* gate, up = Wgate h, Wup h */
    linear_forward(t, &l->up, h, n, k->up, 0);
    if (y == NULL) return;
    activate(t, k, n);                                  /* act = silu(gate) * up */
    memcpy(y, k->mid, bytes);
    linear_forward(t, &l->down, t->net.work.act, n, y, 1); /* y = mid + Wdown act */
}

/* dx, the gradient by the layer's output, becomes that by its input. */
static void layer_backward(struct lvm_trainer *t, const struct block *l, const struct rows *r,
                           const struct kept *k) {
    struct work *w = &t->net.work;
    int n = r->n;
    activate(t, k, n);
    linear_backward(t, &l->down, w->act, w->dx, n, w->dact, 0); /* y = mid + Wdown act */
    for_rows(&(struct op){.t = t, .n = n, .cols = t->net.a->F, .x = k->gate, .y = k->up,
                          .dy = w->dact, .dx = w->dact, .out = w->act}, swiglu_backward_task);
    norm_forward(t, l->ffn_norm, k->mid, n, w->h);
    linear_backward(t, &l->gate, w->h, w->dact, n, w->dh, 0);   /* gate, up = Wgate h, Wup h */
    linear_backward(t, &l->up, w->h, w->act, n, w->dh, 1);
    norm_backward(t, l->ffn_norm, k->mid, w->dh, n, w->dx);     /* h = rmsnorm(mid) */

    linear_backward(t, &l->o, k->o, w->dx, n, w->d_o, 0);       /* mid = x + Wo o */
    attention_backward(t, r, k);                                /* o = attention(q, k, v) */
    for_rows(&(struct op){.t = t, .n = n}, rope_backward_task);
    norm_forward(t, l->attn_norm, k->x, n, w->h);
    linear_backward(t, &l->q, w->h, w->dq, n, w->dh, 0);        /* q, k, v = Wq h, Wk h, Wv h */
    linear_backward(t, &l->k, w->h, w->dk, n, w->dh, 1);
    linear_backward(t, &l->v, w->h, w->dv, n, w->dh, 1);
    norm_backward(t, l->attn_norm, k->x, w->dh, n, w->dx);      /* h = rmsnorm(x) */
}

/* ---- The whole model: loss and gradients ---- */

enum { LOGIT_ROWS = 256 }; /* rows of logits at a time */

/* x = the token's row of the embedding */
static void embed_forward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    (void)thread;
    for (int r = task * OP_ROWS; r < end_row(op, task); r++)
        row_floats(op->t->e.kern, &op->t->net.embed->w, op->r->ids[r], 0, op->cols,
                      op->out + (int64_t)r * op->cols);
}

/* dw of the token's row += dx */
static void embed_backward_task(void *arg, int task, int thread) {
    const struct op *op = arg;
    int c0 = task * OP_COLS;
    (void)thread;
    for (int r = 0; r < op->n; r++) {
        float *dw = op->dw + (int64_t)op->r->ids[r] * op->cols;
        for (int c = c0; c < end_column(op, task); c++) dw[c] += op->dy[(int64_t)r * op->cols + c];
    }
}

/* Rows of logits, ld apart, at which -ln softmax(logits)[target] is wanted and its gradient:
   dlogits = weight (softmax(logits) - onehot(target)), in their place. */
struct loss_job {
    struct lvm_trainer *t;
    float *logits;
    int64_t ld;
    const int32_t *targets;
    const float *weights;
    float *nll;
    double all;              /* by which weights are divided */
    int backward;
};

static void loss_task(void *arg, int r, int thread) {
    const struct loss_job *job = arg;
    int V = job->t->net.a->V;
    float *p = job->logits + r * job->ld, max = 0, target = p[job->targets[r]];
    (void)thread;
    float sum = job->t->e.kern->attention.softmax(p, (int)job->ld, V, 1, &max);
    job->nll[r] = (float)(log_f64(sum) + max - target);
    if (!job->backward) return;
    float weight = (float)(job->weights[r] / job->all), scale = weight / sum;
    for (int i = 0; i < V; i++) p[i] *= scale;
    p[job->targets[r]] -= weight;
}

static int any_weight(const float *weights, int n) {
    for (int i = 0; i < n; i++)
        if (weights[i] != 0) return 1;
    return 0;
}

/* nll of all rows from x[n][D], the last layer's output; with backward, dx and the gradients of the
   last norm and the output matrix too. */
static void head(struct lvm_trainer *t, const struct rows *r, const float *x, double all,
                 int backward) {
    struct work *w = &t->net.work;
    const struct tensor *out = &t->net.output->w;
    int D = out->cols, V = out->rows, ld = round_up(V, PANEL);
    norm_forward(t, t->net.norm, x, r->n, w->h);                    /* h = rmsnorm(x) */
    for (int i = 0; i < r->n; i += LOGIT_ROWS) {
        int n = r->n - i < LOGIT_ROWS ? r->n - i : LOGIT_ROWS;
        float *h = w->h + (int64_t)i * D, *dh = w->dh + (int64_t)i * D;
        struct loss_job job = {t, w->logits, ld, r->targets + i, r->weights + i, w->nll + i, all,
                               backward};
        if (!any_weight(r->weights + i, n)) {
            memset(w->nll + i, 0, (size_t)n * sizeof *w->nll);
            memset(dh, 0, (size_t)n * (size_t)D * sizeof *dh);
            continue;
        }
        product_forward(&t->e, out, h, n, w->logits, ld, 0);        /* logits = Wout h */
        pool_run(t->e.pool, n, loss_task, &job);
        if (!backward) continue;
        product_input(&t->e, out, w->logits, ld, n, dh, 0);
        if (t->net.output->g != NULL)
            product_weights(&t->e, w->logits, ld, h, n, V, D, w->turned, t->net.output->g);
    }
    if (!backward) return;
    memset(w->dx, 0, (size_t)r->n * (size_t)D * sizeof *w->dx);
    norm_backward(t, t->net.norm, x, w->dh, r->n, w->dx);
}

static void set_positions(struct net *net, const struct rows *r) {
    for (int i = 0; i < r->n; i++) net->work.positions[i] = -1;
    for (int p = 0; p < r->n_pieces; p++)
        for (int i = 0; i < r->pieces[p].n; i++) net->work.positions[r->pieces[p].first + i] = i;
}

/* Both ways of a pass are 3 L units of progress: a layer backward is two forward. */
static int report_pass(struct lvm_trainer *t, const char *stage, int done, lvm_error *error) {
    const lvm_options o = {.user = t->o.user, .progress = t->o.progress};
    return report(&o, stage, t->units + done, t->all_units, error);
}

/* x of the last layer: all forward. */
static int forward_layers(struct lvm_trainer *t, const struct rows *r, const char *stage,
                          lvm_error *error) {
    struct net *net = &t->net;
    int code = LVM_OK;
    set_positions(net, r);
    for_rows(&(struct op){.t = t, .r = r, .n = r->n, .cols = net->a->D, .out = net->kept[0].x},
             embed_forward_task);
    for (int i = 0; code == LVM_OK && i < net->a->L; i++) {
        struct kept k = kept_of(net, i);
        layer_forward(t, &net->blocks[i], r, &k, net->kept[i + 1].x);
        code = report_pass(t, stage, i + 1, error);
    }
    return code;
}

static double weighted_sum(const float *weights, const float *nll, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)weights[i] * nll[i];
    return sum;
}

/* Adds to every g the gradient of sum over rows of weight / all (-ln p(target)), and to *loss that
   sum times `all`. r->n <= net->max_rows. */
static int net_accumulate(struct lvm_trainer *t, const struct rows *r, double all, double *loss,
                          lvm_error *error) {
    struct net *net = &t->net;
    int L = net->a->L, code = forward_layers(t, r, "train", error);
    if (code != LVM_OK) return code;
    head(t, r, net->kept[L].x, all, 1);
    *loss += weighted_sum(r->weights, net->work.nll, r->n);
    for (int i = L - 1; code == LVM_OK && i >= net->lowest; i--) {
        struct kept k = kept_of(net, i);
        if (i < net->first_kept) layer_forward(t, &net->blocks[i], r, &k, NULL);
        layer_backward(t, &net->blocks[i], r, &k);
        code = report_pass(t, "train", L + 2 * (L - i), error);
    }
    if (code == LVM_OK && net->embed->g != NULL)
        for_columns(&(struct op){.t = t, .r = r, .n = r->n, .cols = net->a->D, .dy = net->work.dx,
                                 .dw = net->embed->g}, embed_backward_task);
    return code;
}

/* The loss alone, as above. */
static int net_loss(struct lvm_trainer *t, const struct rows *r, double *loss, lvm_error *error) {
    int code = forward_layers(t, r, "eval", error);
    if (code != LVM_OK) return code;
    head(t, r, t->net.kept[t->net.a->L].x, 1, 0);
    *loss += weighted_sum(r->weights, t->net.work.nll, r->n);
    return LVM_OK;
}

/* ---- AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) ----

       g *= min(1, clip / |g|),   m += (1 - b1)(g - m),   v += (1 - b2)(g^2 - v)
       w -= lr decay w,   w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

   |g| is the norm of all gradients together, t counts updates, matrices alone decay. Work is cut
   into pieces of CHUNK elements of a parameter, so that sums of squares have one order. */

enum { CHUNK = 1 << 16 };

static int64_t elements(const struct param *p) { return (int64_t)p->w.rows * p->w.cols; }

static int64_t chunks(const struct param *p) {
    return p->g == NULL ? 0 : (elements(p) + CHUNK - 1) / CHUNK;
}

static int64_t all_chunks(const struct net *net) {
    int64_t n = 0;
    for (int i = 0; i < net->n_params; i++) n += chunks(&net->params[i]);
    return n;
}

/* An update of all parameters; scale: of the gradients; 1 - b^t of m and of v. */
struct update {
    struct lvm_trainer *t;
    float lr, scale, debias_m, debias_v;
};

/* The parameter that a chunk belongs to; its elements first .. first + *n - 1. */
static struct param *find_chunk(struct net *net, int64_t chunk, int64_t *first, int *n) {
    struct param *p = net->params;
    for (; chunk >= chunks(p); p++) chunk -= chunks(p);
    *first = chunk * CHUNK;
    *n = (int)min64(CHUNK, elements(p) - *first);
    return p;
}

static void zero_gradients_task(void *arg, int task, int thread) {
    struct lvm_trainer *t = arg;
    int64_t first = 0;
    int n = 0;
    struct param *p = find_chunk(&t->net, task, &first, &n);
    (void)thread;
    memset(p->g + first, 0, (size_t)n * sizeof *p->g);
}

static void squares_task(void *arg, int task, int thread) {
    struct lvm_trainer *t = arg;
    int64_t first = 0;
    int n = 0;
    struct param *p = find_chunk(&t->net, task, &first, &n);
    const float *g = p->g + first;
    double sum[4] = {0};
    (void)thread;
    for (int i = 0; i < n; i++) sum[i % 4] += (double)g[i] * g[i];
    t->net.work.squares[task] = sum[0] + sum[1] + sum[2] + sum[3];
}

static void update_task(void *arg, int task, int thread) {
    const struct update *u = arg;
    const lvm_train_options *o = &u->t->o;
    int64_t first = 0;
    int n = 0;
    struct param *p = find_chunk(&u->t->net, task, &first, &n);
    float *w = p->values + first, *m = p->m + first, *v = p->v + first;
    const float *gradient = p->g + first;
    float keep = 1 - (p->decays ? u->lr * o->weight_decay : 0), step = u->lr / u->debias_m,
          root = 1 / sqrtf(u->debias_v);
    (void)thread;
    for (int i = 0; i < n; i++) {
        float g = gradient[i] * u->scale;
        m[i] += (1 - o->beta1) * (g - m[i]);
        v[i] += (1 - o->beta2) * (g * g - v[i]);
        w[i] = w[i] * keep - step * m[i] / (sqrtf(v[i]) * root + o->epsilon);
    }
}

static void zero_gradients(struct lvm_trainer *t) {
    pool_run(t->e.pool, (int)all_chunks(&t->net), zero_gradients_task, t);
}

/* The norm of all gradients together. */
static double gradient_norm(struct lvm_trainer *t) {
    int64_t n = all_chunks(&t->net);
    double sum = 0;
    pool_run(t->e.pool, (int)n, squares_task, t);
    for (int64_t i = 0; i < n; i++) sum += t->net.work.squares[i];
    return sqrt(sum);
}

/* 1 - b^n */
static float debias(float b, int64_t n) {
    return (float)(1 - exp_f64((double)n * log_f64(b)));
}

/* Update number `updates`, counted from 1, by gradients of that norm. */
static void update_params(struct lvm_trainer *t, double lr, double norm, int64_t updates) {
    const lvm_train_options *o = &t->o;
    struct update u = {t, (float)lr, 1, debias(o->beta1, updates), debias(o->beta2, updates)};
    if (o->clip > 0 && norm > o->clip) u.scale = (float)(o->clip / norm);
    pool_run(t->e.pool, (int)all_chunks(&t->net), update_task, &u);
}

/* Of step `step`, counted from 1: up to lr over the warm-up, then down to min_lr by half a cosine
   (Loshchilov and Hutter 2017, arXiv 1608.03983), or over the last tenth by a line (Hu et al. 2024,
   arXiv 2404.06395). */
static double learning_rate(const lvm_train_options *o, int64_t step) {
    if (step <= o->warmup) return (double)o->lr * (double)step / (double)o->warmup;
    double past = (double)(step - o->warmup) / (double)max64(1, o->steps - o->warmup), left = 0;
    if (past > 1) past = 1;
    if (o->schedule == LVM_COSINE) {
        double sine = 0, cosine = 0;
        sincos_f64(past * 3.14159265358979323846, &sine, &cosine);
        left = (1 + cosine) / 2;
    } else {
        int64_t down = max64(1, o->steps / 10);
        left = min64(down, max64(0, o->steps - step)) / (double)down;
    }
    return o->min_lr + ((double)o->lr - o->min_lr) * left;
}

/* ---- Data: .tok files ----

   Sentences of image tokens, without bos and eos. Numbers are little-endian, every part begins at a
   multiple of 64 bytes and is filled up with zeros:

       0          "LVM.tok\n"  u32 version
       64         u16 ids[n_tokens]              sentence behind sentence
       ...        u8 weights[n_tokens]           of their loss: 16 is weight 1, 0 none, 255 most;
                                                 only where flags has bit 0
       ...        u64 starts[n_sentences + 1]    where each begins in ids: 0, ascending, n_tokens
       size - 64  u64 n_sentences  u64 n_tokens  u32 bound  u32 image_tokens  u32 flags
                  28 zeros  "LVM.tok\n"

   All ids are below bound. No sentence is empty; image_tokens, if it is not 0, are an image, and
   each sentence is whole images. The counts stand at the end, so that a file is written as its
   sentences come, however many: only starts and weights are held in memory.

   Who opens a file checks its size and starts. Ids are checked where they are read, for a file may
   have billions. */

enum { TOK_ALIGN = 64, TOK_VERSION = 1, TOK_WEIGHTS = 1 /* a flag */, TOK_MAGIC = 8 };
enum { WEIGHT_ONE = 16, MAX_IDS = 1 << 16 };

static const char tok_magic[] = "LVM.tok\n";

struct tok_foot {
    uint64_t n_sentences, n_tokens;
    uint32_t bound, image_tokens, flags;
    uint8_t zeros[28];
    char magic[TOK_MAGIC];
};
_Static_assert(sizeof(struct tok_foot) == TOK_ALIGN, "no padding");

/* Mixes n bytes into a 64-bit hash (chapter 14). */
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n);

/* The id at place i of all. */
static int32_t token_at(const lvm_tokens *t, int64_t i) {
    uint16_t id;
    memcpy(&id, t->ids + 2 * i, sizeof id);
    return id;
}

/* Where sentence i begins; those from a file that is not checked yet may be anything. */
static int64_t sentence_start(const lvm_tokens *t, int64_t i) {
    int64_t at;
    memcpy(&at, t->starts + 8 * i, sizeof at);
    return at;
}

/* What is said of an id that is not below bound; people count from 1. */
static int bad_token(const lvm_tokens *t, int64_t sentence, int64_t i, lvm_error *error) {
    return fail(error, LVM_FORMAT, "%s: sentence %lld, token %lld: id %d, but all should be below "
                "%d; pack the file again", t->name, (long long)sentence + 1, (long long)i + 1,
                token_at(t, sentence_start(t, sentence) + i), t->bound);
}

static int check_starts(const lvm_tokens *t, lvm_error *error) {
    int64_t last = sentence_start(t, 0);
    for (int64_t i = 0; i < t->n_sentences; i++) {
        int64_t next = sentence_start(t, i + 1);
        if (next <= last || next > t->n_tokens)
            return fail(error, LVM_FORMAT, "%s: damaged: sentence %lld ends where it cannot",
                        t->name, (long long)i + 1);
        if (t->image_tokens > 0 && (next - last) % t->image_tokens != 0)
            return fail(error, LVM_FORMAT, "%s: damaged: sentence %lld has %lld tokens, no whole "
                        "images of %d", t->name, (long long)i + 1, (long long)(next - last),
                        t->image_tokens);
        last = next;
    }
    if (sentence_start(t, 0) == 0 && last == t->n_tokens) return LVM_OK;
    return fail(error, LVM_FORMAT, "%s: damaged: its sentences are not all of its tokens", t->name);
}

/* Mixes in 64 bytes at 256 places each, or all where that is less. */
static uint64_t hash_sample(uint64_t h, const uint8_t *data, size_t n) {
    enum { PLACES = 256, BYTES = 64 };
    if (n <= PLACES * BYTES) return hash_bytes(h, data, n);
    for (size_t i = 0; i < PLACES; i++)
        h = hash_bytes(h, data + (n - BYTES) / (PLACES - 1) * i, BYTES);
    return hash_bytes(h, data + n - BYTES, BYTES);
}

/* What tells data apart without reading all of it: the counts and starts, and a sample of ids and
   weights. */
static uint64_t tokens_fingerprint(const lvm_tokens *t) {
    size_t n = (size_t)t->n_tokens;
    uint64_t h = hash_bytes(t->size, t->data + t->size - TOK_ALIGN, TOK_ALIGN);
    h = hash_bytes(h, t->starts, 8 * ((size_t)t->n_sentences + 1));
    h = hash_sample(h, t->ids, 2 * n);
    return t->weights != NULL ? hash_sample(h, t->weights, n) : h;
}

/* Both ends of a file and its version; *foot is filled. */
static int check_tok_ends(const lvm_tokens *t, struct tok_foot *foot, lvm_error *error) {
    static const uint8_t zeros[sizeof foot->zeros];
    struct cursor c = {.data = t->data, .size = t->size, .at = TOK_MAGIC};
    if (t->size < 2 * TOK_ALIGN || memcmp(t->data, tok_magic, TOK_MAGIC) != 0)
        return fail(error, LVM_FORMAT, "%s: is no .tok file (lvm pack makes one of JSON lines)",
                    t->name);
    unsigned version = (unsigned)cursor_number(&c, 4);
    memcpy(foot, t->data + t->size - sizeof *foot, sizeof *foot);
    if (version != TOK_VERSION)
        return fail(error, LVM_UNSUPPORTED, "%s: is of version %u; this program reads version %d",
                    t->name, version, TOK_VERSION);
    if (memcmp(foot->magic, tok_magic, TOK_MAGIC) != 0)
        return fail(error, LVM_FORMAT, "%s: its end is missing; copy or pack it again", t->name);
    if ((foot->flags & ~(uint32_t)TOK_WEIGHTS) != 0 ||
        memcmp(foot->zeros, zeros, sizeof zeros) != 0)
        return fail(error, LVM_UNSUPPORTED, "%s: has parts that this program does not know",
                    t->name);
    return LVM_OK;
}

/* The next part, of count numbers of size bytes. */
static const uint8_t *tok_part(struct cursor *c, uint64_t count, int size) {
    uint64_t bytes = count * (uint64_t)size;
    return cursor_take(c, (bytes + TOK_ALIGN - 1) / TOK_ALIGN * TOK_ALIGN);
}

/* Finds the parts of data[size]. A count is believed as far as there are bytes for it. */
static int parse_tok(lvm_tokens *t, lvm_error *error) {
    struct tok_foot foot;
    struct cursor c = {.data = t->data, .size = t->size, .at = TOK_ALIGN};
    int code = check_tok_ends(t, &foot, error);
    if (code != LVM_OK) return code;
    if (foot.n_tokens > t->size || foot.n_sentences > t->size || foot.bound > MAX_IDS ||
        foot.image_tokens >= MAX_IDS)
        return fail(error, LVM_FORMAT, "%s: damaged: impossible counts at its end", t->name);
    t->n_tokens = (int64_t)foot.n_tokens;
    t->n_sentences = (int64_t)foot.n_sentences;
    t->bound = (int)foot.bound;
    t->image_tokens = (int)foot.image_tokens;
    t->ids = tok_part(&c, foot.n_tokens, 2);
    t->weights = foot.flags & TOK_WEIGHTS ? tok_part(&c, foot.n_tokens, 1) : NULL;
    t->starts = tok_part(&c, foot.n_sentences + 1, 8);
    if (c.failed || c.at != t->size - TOK_ALIGN)
        return fail(error, LVM_FORMAT, "%s: damaged: %lld sentences of %lld tokens are not what "
                    "its %lld bytes hold", t->name, (long long)t->n_sentences,
                    (long long)t->n_tokens, (long long)t->size);
    code = check_starts(t, error);
    if (code == LVM_OK) t->fingerprint = tokens_fingerprint(t);
    return code;
}

static lvm_tokens *tokens_new(const char *name, lvm_error *error) {
    lvm_tokens *t = mem_alloc(1, sizeof *t, error);
    if (t != NULL) t->name = copy_string(name, error);
    if (t != NULL && t->name != NULL) return t;
    mem_free(t);
    return NULL;
}

/* The last step of opening, where the one before it gave `code`; NULL after a failure. */
static lvm_tokens *tokens_opened(lvm_tokens *t, int code, lvm_error *error) {
    if (code == LVM_OK) code = parse_tok(t, error);
    if (code == LVM_OK) return t;
    lvm_tokens_close(t);
    return NULL;
}

lvm_tokens *lvm_tokens_open(const char *path, lvm_error *error) {
    clear_error(error);
    if (path == NULL) {
        null_argument(error, "lvm_tokens_open", "path");
        return NULL;
    }
    lvm_tokens *t = tokens_new(path, error);
    if (t == NULL) return NULL;
    int code = map_file(path, &t->mapped, &t->size, error);
    t->data = t->mapped;
    return tokens_opened(t, code, error);
}

lvm_tokens *lvm_tokens_open_memory(const void *data, size_t size, const char *name,
                                   lvm_error *error) {
    clear_error(error);
    if (data == NULL) {
        null_argument(error, "lvm_tokens_open_memory", "data");
        return NULL;
    }
    lvm_tokens *t = tokens_new(name != NULL ? name : "(memory)", error);
    if (t == NULL) return NULL;
    t->data = data;
    t->size = size;
    return tokens_opened(t, LVM_OK, error);
}

void lvm_tokens_close(lvm_tokens *t) {
    if (t == NULL) return;
    if (t->mapped != NULL) unmap_file(t->mapped, t->size);
    mem_free(t->owned);
    mem_free(t->name);
    mem_free(t);
}

#ifndef LVM_NO_MAIN /* only the command line writes them */

struct outfile;
static int outfile_write(struct outfile *out, const void *data, size_t size, lvm_error *error);

/* A .tok file while it is written: to a file, or (NULL) to memory. image_tokens may be set until
   close. */
struct token_writer {
    struct outfile *file;
    struct buffer memory;
    struct buffer starts, weights;  /* u64; u8, none before a sentence has some */
    uint64_t at;                    /* bytes so far */
    uint64_t n_sentences, n_tokens;
    uint32_t bound, image_tokens;
};

static int token_writer_put(struct token_writer *w, const void *data, size_t n, lvm_error *error) {
    w->at += n;
    return w->file != NULL ? outfile_write(w->file, data, n, error)
                           : buffer_add(&w->memory, data, n, error);
}

/* Zeros up to where the next part begins. */
static int token_writer_pad(struct token_writer *w, lvm_error *error) {
    static const char zeros[TOK_ALIGN];
    return token_writer_put(w, zeros, (size_t)(-w->at % TOK_ALIGN), error);
}

static int token_writer_open(struct token_writer *w, struct outfile *file, lvm_error *error) {
    const uint32_t version = TOK_VERSION;
    const uint64_t start = 0;
    *w = (struct token_writer){.file = file};
    int code = token_writer_put(w, tok_magic, TOK_MAGIC, error);
    if (code == LVM_OK) code = token_writer_put(w, &version, sizeof version, error);
    if (code == LVM_OK) code = token_writer_pad(w, error);
    return code == LVM_OK ? buffer_add(&w->starts, &start, sizeof start, error) : code;
}

/* So many more tokens have the weight 1. */
static int token_writer_weigh(struct token_writer *w, uint64_t n, lvm_error *error) {
    uint8_t ones[256];
    int code = LVM_OK;
    memset(ones, WEIGHT_ONE, sizeof ones);
    for (uint64_t part; code == LVM_OK && n > 0; n -= part) {
        part = n < sizeof ones ? n : sizeof ones;
        code = buffer_add(&w->weights, ones, (size_t)part, error);
    }
    return code;
}

/* One more sentence, ids[n]; weights: [n], or NULL: 16 each. */
static int token_writer_add(struct token_writer *w, const int32_t *ids, const uint8_t *weights,
                            size_t n, lvm_error *error) {
    uint16_t part[512];
    int code = n > 0 ? LVM_OK : fail(error, LVM_INVALID, "a sentence without tokens");
    for (size_t at = 0, room = sizeof part / sizeof *part; code == LVM_OK && at < n; at += room) {
        size_t here = n - at < room ? n - at : room;
        for (size_t i = 0; i < here; i++) {
            int32_t id = ids[at + i];
            if (id < 0 || id >= MAX_IDS)
                return fail(error, LVM_INVALID, "id %d is none of 0 to %d", id, MAX_IDS - 1);
            if ((uint32_t)id >= w->bound) w->bound = (uint32_t)id + 1;
            part[i] = (uint16_t)id;
        }
        code = token_writer_put(w, part, here * sizeof *part, error);
    }
    if (code == LVM_OK && weights != NULL && w->weights.n == 0)
        code = token_writer_weigh(w, w->n_tokens, error);
    if (code == LVM_OK && weights != NULL) code = buffer_add(&w->weights, weights, n, error);
    else if (code == LVM_OK && w->weights.n > 0) code = token_writer_weigh(w, n, error);
    w->n_tokens += n;
    w->n_sentences++;
    return code == LVM_OK ? buffer_add(&w->starts, &w->n_tokens, sizeof w->n_tokens, error) : code;
}

/* Writes what stands behind the ids, unless code is a failure already, and frees all but memory,
   which holds the whole file then. */
static int token_writer_close(struct token_writer *w, int code, lvm_error *error) {
    struct tok_foot foot = {.n_sentences = w->n_sentences, .n_tokens = w->n_tokens,
                            .bound = w->bound, .image_tokens = w->image_tokens,
                            .flags = w->weights.n > 0 ? TOK_WEIGHTS : 0};
    memcpy(foot.magic, tok_magic, TOK_MAGIC);
    if (code == LVM_OK) code = token_writer_pad(w, error);
    if (code == LVM_OK) code = token_writer_put(w, w->weights.data, w->weights.n, error);
    if (code == LVM_OK) code = token_writer_pad(w, error);
    if (code == LVM_OK) code = token_writer_put(w, w->starts.data, w->starts.n, error);
    if (code == LVM_OK) code = token_writer_pad(w, error);
    if (code == LVM_OK) code = token_writer_put(w, &foot, sizeof foot, error);
    mem_free(w->starts.data);
    mem_free(w->weights.data);
    w->starts = w->weights = (struct buffer){0};
    return code;
}

#endif

/* ---- Data: sentences in random order, cut into rows ----

   A row is `context` inputs and, as targets, the tokens behind them. Where rows are cut, the next
   one begins with the last target:

       sentences     bos a a a eos  bos b b b b b eos  bos c c eos ...
       LVM_CUT       bos a a a eos bos b | b b b b eos bos c | ...        rows of 7 inputs
                     a a a eos bos b b   | b b b eos bos c c | ...        and their targets
       LVM_WHOLE     bos a a a . . .     | bos b b b b b .   | bos c c . . . .
                     a a a eos . . .     | b b b b b eos .   | c c eos . . . .

   Of every token the loss is weighed as its file says; bos and eos count 1, but bos 0 where the
   file has weights. A row is one piece (tokens that see each other). With isolate each sentence in
   it is one, and its first token counts 0: what stands before it says nothing about it. */

static uint64_t mix64(uint64_t x) { /* SplitMix64's (Steele, Lea and Flood 2014) */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Which of 0 .. n-1 comes as number i when they are shuffled for pass `epoch`, without a list of
   them: rounds that turn (left, right) into (right, left ^ f(right)) permute numbers of 2 `half`
   bits, whatever f is (Feistel; Luby and Rackoff 1988), and one that falls beyond n goes through
   them again until it does not (cycle walking: Black and Rogaway 2002), four times at most on
   average. */
static int64_t shuffled(uint64_t seed, int64_t epoch, int64_t n, int64_t i) {
    enum { ROUNDS = 8 };
    int half = 1;
    while (half < 31 && (int64_t)1 << 2 * half < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1, key = mix64(mix64(seed) ^ (uint64_t)epoch);
    uint64_t x = (uint64_t)i;
    do {
        for (uint64_t round = 0; round < ROUNDS; round++) {
            uint64_t right = x & mask, f = mix64(mix64(key + round) ^ right);
            x = right << half | (x >> half ^ (f & mask));
        }
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

/* A sentence of a stream. */
struct found {
    const lvm_tokens *file;
    int64_t number;    /* in its file */
    int64_t first, n;  /* where it begins in the file's ids; its tokens, without bos and eos */
};

static struct found find_sentence(const struct stream *s, const struct data_position *at) {
    int64_t i = s->shuffle ? shuffled(s->seed, at->epoch, s->n_sentences, at->sentence)
                           : at->sentence;
    const lvm_tokens *const *file = s->files;
    for (; i >= (*file)->n_sentences; file++) i -= (*file)->n_sentences;
    int64_t first = sentence_start(*file, i);
    return (struct found){*file, i, first, sentence_start(*file, i + 1) - first};
}

/* Tokens of a sentence with bos and eos. */
static int64_t length_in_rows(const struct stream *s, int64_t n) {
    return n + (s->bos >= 0) + (s->eos >= 0);
}

/* Whether every sentence fits a row of LVM_WHOLE, and teaches something there. */
static int check_lengths(const struct stream *s, const lvm_tokens *t, lvm_error *error) {
    for (int64_t i = 0; i < t->n_sentences; i++) {
        int64_t n = length_in_rows(s, sentence_start(t, i + 1) - sentence_start(t, i));
        if (n > (int64_t)s->context + 1)
            return fail(error, LVM_INVALID, "%s: sentence %lld has %lld tokens, bos and eos "
                        "counted; rows of whole sentences take a context of %lld", t->name,
                        (long long)i + 1, (long long)n, (long long)n - 1);
        if (n < 2)
            return fail(error, LVM_INVALID, "%s: sentence %lld is one token, of which nothing is "
                        "learnt in a row of whole sentences", t->name, (long long)i + 1);
    }
    return LVM_OK;
}

static int stream_add(struct stream *s, const lvm_tokens *t, int vocab, lvm_error *error) {
    if (t == NULL) return fail(error, LVM_INVALID, "the data: a file is NULL");
    if (t->bound > vocab)
        return fail(error, LVM_INVALID, "%s: has ids up to %d; the model's vocabulary ends at %d",
                    t->name, t->bound - 1, vocab - 1);
    s->n_sentences += t->n_sentences;
    return s->packing == LVM_WHOLE ? check_lengths(s, t, error) : LVM_OK;
}

/* The data of o, for a model of so many ids; bos and eos: -1 where there is none. It shuffles; who
   wants one pass in the files' order sets shuffle to 0. */
static int stream_open(struct stream *s, const lvm_train_options *o, int bos, int eos, int vocab,
                       lvm_error *error) {
    *s = (struct stream){.files = o->data, .n_files = o->n_data, .context = o->context,
                         .packing = o->packing, .isolate = o->isolate, .bos = bos, .eos = eos,
                         .shuffle = 1, .seed = o->seed};
    if (o->n_data < 1 || o->data == NULL) return fail(error, LVM_INVALID, "there are no data");
    if (o->context < 1 || o->context > 1 << 24)
        return fail(error, LVM_INVALID, "a context of %d tokens is out of range", o->context);
    if (o->packing != LVM_CUT && o->packing != LVM_WHOLE)
        return fail(error, LVM_INVALID, "there is no packing %d", o->packing);
    if (bos >= vocab || eos >= vocab)
        return fail(error, LVM_INVALID, "bos %d, eos %d: the model's vocabulary ends at %d", bos,
                    eos, vocab - 1);
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && i < o->n_data; i++)
        code = stream_add(s, o->data[i], vocab, error);
    if (code == LVM_OK && s->n_sentences == 0)
        code = fail(error, LVM_INVALID, "%s: holds no sentences", o->data[0]->name);
    return code;
}

/* A row while it is filled: its n tokens so far, of context + 1; the first is no target and the
   last no input. */
struct row {
    int32_t *ids, *targets; /* [context] */
    float *weights;         /* [context] */
    int n;
};

/* Adds tokens from .. from + count - 1, bos and eos counted, of a sentence. */
static int row_add(const struct stream *s, const struct found *f, int64_t from, int count,
                   struct row *w, lvm_error *error) {
    const lvm_tokens *t = f->file;
    for (int k = 0; k < count; k++, w->n++) {
        int64_t i = from + k - (s->bos >= 0);
        int32_t id = i < 0 ? s->bos : s->eos;
        float weight = i < 0 && t->weights != NULL ? 0 : 1;
        if (i >= 0 && i < f->n) {
            id = token_at(t, f->first + i);
            if (id >= t->bound) return bad_token(t, f->number, i, error);
            if (t->weights != NULL) weight = (float)t->weights[f->first + i] / WEIGHT_ONE;
        }
        if (w->n < s->context) w->ids[w->n] = id;
        if (w->n == 0) continue;
        w->targets[w->n - 1] = id;
        w->weights[w->n - 1] = s->isolate && from + k == 0 ? 0 : weight;
    }
    return LVM_OK;
}

/* Ends a row that is not full: its last token becomes padding too, for no target stands behind it,
   and leaves its piece. */
static void row_pad(const struct stream *s, struct row *w, struct rows *r) {
    for (int i = w->n > 0 ? w->n - 1 : 0; i < s->context; i++) {
        w->ids[i] = w->targets[i] = 0;
        w->weights[i] = 0;
    }
    if (w->n > 0 && --r->pieces[r->n_pieces - 1].n == 0) r->n_pieces--;
}

static int stream_ended(const struct stream *s, const struct data_position *at) {
    return !s->shuffle && at->epoch > 0;
}

/* The place behind so many more tokens of a sentence. */
static struct data_position step_on(const struct stream *s, struct data_position at,
                                    const struct found *f, int count) {
    at.token += count;
    if (at.token < length_in_rows(s, f->n)) return at;
    if (at.sentence + 1 < s->n_sentences)
        return (struct data_position){at.epoch, at.sentence + 1, 0};
    return (struct data_position){at.epoch + 1, 0, 0};
}

/* The row that begins at r->n, without counting it, and its pieces; *at is moved to the next
   row. */
static int fill_row(const struct stream *s, struct data_position *at, struct row *w,
                    struct rows *r, lvm_error *error) {
    struct data_position p = *at;
    int first_piece = r->n_pieces, code = LVM_OK, all = s->context + 1;
    while (code == LVM_OK && w->n < all && !stream_ended(s, &p)) {
        struct found f = find_sentence(s, &p);
        int64_t left = length_in_rows(s, f.n) - p.token;
        int count = (int)min64(left, all - w->n), inputs = (int)min64(count, s->context - w->n);
        if (s->packing == LVM_WHOLE && count < left) break;
        if (inputs > 0 && (s->isolate || r->n_pieces == first_piece))
            r->pieces[r->n_pieces++] = (struct piece){r->n + w->n, 0};
        r->pieces[r->n_pieces - 1].n += inputs;
        code = row_add(s, &f, p.token, count, w, error);
        *at = p; /* of the last token that was added, with which the next row begins */
        at->token += count - 1;
        p = step_on(s, p, &f, count);
    }
    if (s->packing == LVM_WHOLE || w->n < all) *at = p;
    if (w->n < all) row_pad(s, w, r);
    return code;
}

/* Fills r with the next count rows of context tokens and moves *at behind them; r's arrays have
   room for count * context elements each. Where s does not shuffle it makes one pass: fewer rows,
   the last one of LVM_CUT filled up with padding, then none, when the data end (r->n says). After a
   failure *at is what it was. */
static int fill_rows(const struct stream *s, struct data_position *at, int count, struct rows *r,
                     lvm_error *error) {
    struct data_position p = *at;
    r->n = r->n_pieces = 0;
    if (p.epoch < 0 || p.sentence < 0 || p.sentence >= s->n_sentences || p.token < 0 ||
        (!stream_ended(s, &p) && p.token >= length_in_rows(s, find_sentence(s, &p).n)))
        return fail(error, LVM_FORMAT, "pass %lld, sentence %lld, token %lld is no place in the "
                    "data", (long long)p.epoch, (long long)p.sentence, (long long)p.token);
    for (int i = 0; i < count; i++, r->n += s->context) {
        struct row w = {r->ids + r->n, r->targets + r->n, r->weights + r->n, 0};
        int code = fill_row(s, &p, &w, r, error);
        if (code != LVM_OK) return code;
        if (w.n < 2) break; /* the end; one token alone has no target */
    }
    *at = p;
    return LVM_OK;
}

/* ---- Checkpoints ----

   All that a run needs to go on as if it had never stopped: what was asked for, how far it is, and
   of each tensor that learns its values and AdamW's two averages. What follows from the rest is not
   there: gradients, frozen tensors, the order of the data. Init's weights and the data themselves
   are not either; their fingerprints are.

       "LVMTRAIN"  u64 version                                            all little-endian
       u64 number[N_SAVED]       configuration and state: integers, or doubles' bits
       string lora_on, freeze                            string = u64 length, bytes
       u64 init                  fingerprint of the weights that it began from, 0: random ones
       u64 n_files, each:        string name, u64 fingerprint             of the data
       string note               the caller's
       u64 n_params, each:       string name, u64 rows, u64 cols          of those that learn
       u64 hash                  of all that
       of each of them w, m, v   f32[rows][cols]
       u64 hash                  of that hash, then of each of these arrays

   It is written beside and renamed, so that whatever ends a run while it writes leaves the
   checkpoint before. Nothing of a trainer changes until both hashes are found right and
   configuration and data are known to be its own. */

static uint64_t hash_bytes(uint64_t h, const void *data, size_t n); /* chapter 14 */
static uint64_t weights_hash(const struct gguf *g);
static struct text cursor_text(struct cursor *c);
static int checksum_wrong(uint64_t stored, uint64_t computed);

enum { CHECKPOINT_VERSION = 1, CHECKPOINT_ARRAYS = 3 };

/* A number of a checkpoint: where it is in struct llama (a size of the model) or struct lvm_trainer
   (an option, or the state that a run begins with at 0), and how it is called. words: the names of
   its values 0 and 1. */
#define TRAINER(field) offsetof(struct lvm_trainer, field)
enum saved_kind { SAVED_INT, SAVED_INT64, SAVED_FLOAT, SAVED_DOUBLE };
static const struct saved_number {
    const char *name;
    enum { OF_MODEL, OF_OPTIONS, OF_STATE } of;
    enum saved_kind kind;
    size_t where;
    const char *words[2];
} saved_numbers[] = {
    {"layers", OF_MODEL, SAVED_INT, LLAMA(L), {0}},
    {"width", OF_MODEL, SAVED_INT, LLAMA(D), {0}},
    {"attention heads", OF_MODEL, SAVED_INT, LLAMA(H), {0}},
    {"key/value heads", OF_MODEL, SAVED_INT, LLAMA(G), {0}},
    {"feed-forward width", OF_MODEL, SAVED_INT, LLAMA(F), {0}},
    {"vocabulary", OF_MODEL, SAVED_INT, LLAMA(V), {0}},
    {"bos", OF_MODEL, SAVED_INT, LLAMA(bos), {0}},
    {"eos", OF_MODEL, SAVED_INT, LLAMA(eos), {0}},
    {"norm epsilon", OF_MODEL, SAVED_FLOAT, LLAMA(eps), {0}},
    {"rope theta", OF_MODEL, SAVED_FLOAT, LLAMA(theta), {0}},
    {"adapters of rank", OF_OPTIONS, SAVED_INT, TRAINER(o.lora_rank), {0}},
    {"adapters' alpha", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.lora_alpha), {0}},
    {"context", OF_OPTIONS, SAVED_INT, TRAINER(o.context), {0}},
    {"batch", OF_OPTIONS, SAVED_INT, TRAINER(o.batch), {0}},
    {"packing", OF_OPTIONS, SAVED_INT, TRAINER(o.packing), {"cut", "whole"}},
    {"isolate", OF_OPTIONS, SAVED_INT, TRAINER(o.isolate), {"off", "on"}},
    {"steps", OF_OPTIONS, SAVED_INT64, TRAINER(o.steps), {0}},
    {"warm-up", OF_OPTIONS, SAVED_INT64, TRAINER(o.warmup), {0}},
    {"schedule", OF_OPTIONS, SAVED_INT, TRAINER(o.schedule), {"cosine", "wsd"}},
    {"learning rate", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.lr), {0}},
    {"least learning rate", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.min_lr), {0}},
    {"beta1", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.beta1), {0}},
    {"beta2", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.beta2), {0}},
    {"epsilon", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.epsilon), {0}},
    {"weight decay", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.weight_decay), {0}},
    {"clipping at", OF_OPTIONS, SAVED_FLOAT, TRAINER(o.clip), {0}},
    {"seed", OF_OPTIONS, SAVED_INT64, TRAINER(o.seed), {0}},
    {"step", OF_STATE, SAVED_INT64, TRAINER(step), {0}},
    {"tokens", OF_STATE, SAVED_INT64, TRAINER(tokens), {0}},
    {"skipped", OF_STATE, SAVED_INT64, TRAINER(skipped), {0}},
    {"skipped in a row", OF_STATE, SAVED_INT64, TRAINER(in_a_row), {0}},
    {"epoch", OF_STATE, SAVED_INT64, TRAINER(at.epoch), {0}},
    {"sentence", OF_STATE, SAVED_INT64, TRAINER(at.sentence), {0}},
    {"token", OF_STATE, SAVED_INT64, TRAINER(at.token), {0}},
    {"usual norm", OF_STATE, SAVED_DOUBLE, TRAINER(usual_norm), {0}}};
enum { N_SAVED = sizeof saved_numbers / sizeof *saved_numbers };

/* A number as a checkpoint holds it: floats as doubles. */
static uint64_t saved_bits(const struct lvm_trainer *t, const struct saved_number *n) {
    const char *at = (n->of == OF_MODEL ? (const char *)t->net.a : (const char *)t) + n->where;
    const void *p = at;
    uint64_t bits;
    if (n->kind == SAVED_INT) return (uint64_t)*(const int *)p;
    double real = n->kind == SAVED_FLOAT ? (double)*(const float *)p : 0;
    memcpy(&bits, n->kind == SAVED_FLOAT ? (const void *)&real : p, sizeof bits);
    return bits;
}

static int learns(const struct param *p) { return p->m != NULL; }

static int64_t param_size(const struct param *p) { return (int64_t)p->w.rows * p->w.cols; }

/* Bytes that grow, until there is no memory. */
struct head {
    struct buffer bytes;
    int code;
    lvm_error *error;
};

static void head_add(struct head *h, const void *data, size_t n) {
    if (h->code == LVM_OK) h->code = buffer_add(&h->bytes, data, n, h->error);
}

static void head_number(struct head *h, uint64_t v) { head_add(h, &v, sizeof v); }

static void head_string(struct head *h, const char *s) {
    if (s == NULL) s = "";
    head_number(h, strlen(s));
    head_add(h, s, strlen(s));
}

/* Everything in front of the first hash. */
static void checkpoint_head(const struct lvm_trainer *t, const char *note, struct head *h) {
    const lvm_train_options *o = &t->o;
    uint64_t n = 0;
    head_add(h, "LVMTRAIN", 8);
    head_number(h, CHECKPOINT_VERSION);
    for (int i = 0; i < N_SAVED; i++) head_number(h, saved_bits(t, &saved_numbers[i]));
    head_string(h, o->lora_on);
    head_string(h, o->freeze);
    head_number(h, o->init != NULL ? weights_hash(&o->init->file) : 0);
    head_number(h, (uint64_t)o->n_data);
    for (int i = 0; i < o->n_data; i++) {
        head_string(h, o->data[i]->name);
        head_number(h, o->data[i]->fingerprint);
    }
    head_string(h, note);
    for (int i = 0; i < t->net.n_params; i++) n += (uint64_t)learns(&t->net.params[i]);
    head_number(h, n);
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i];
        if (!learns(p)) continue;
        head_string(h, p->name);
        head_number(h, (uint64_t)p->w.rows);
        head_number(h, (uint64_t)p->w.cols);
    }
}

/* What a checkpoint keeps of a tensor, in its order. */
static void saved_arrays(const struct param *p, void *arrays[CHECKPOINT_ARRAYS]) {
    arrays[0] = (void *)(uintptr_t)p->w.data; /* of its own where it learns */
    arrays[1] = p->m;
    arrays[2] = p->v;
}

static int write_checkpoint(struct outfile *out, const struct lvm_trainer *t,
                            const struct buffer *head, lvm_error *error) {
    uint64_t hash = hash_bytes(0, head->data, head->n);
    int code = outfile_write(out, head->data, head->n, error);
    if (code == LVM_OK) code = outfile_write(out, &hash, sizeof hash, error);
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i];
        void *arrays[CHECKPOINT_ARRAYS];
        if (!learns(p)) continue;
        saved_arrays(p, arrays);
        for (int a = 0; code == LVM_OK && a < CHECKPOINT_ARRAYS; a++) {
            hash = hash_bytes(hash, arrays[a], (size_t)param_size(p) * sizeof(float));
            code = outfile_write(out, arrays[a], (size_t)param_size(p) * sizeof(float), error);
        }
    }
    return code == LVM_OK ? outfile_write(out, &hash, sizeof hash, error) : code;
}

int lvm_trainer_save(lvm_trainer *trainer, const char *path, const char *note, lvm_error *error) {
    clear_error(error);
    struct outfile out;
    struct head head = {.error = error};
    if (trainer == NULL || path == NULL)
        return null_argument(error, "lvm_trainer_save", trainer == NULL ? "trainer" : "path");
    checkpoint_head(trainer, note, &head);
    int code = head.code;
    if (code == LVM_OK) code = outfile_open(&out, path, error);
    if (code == LVM_OK)
        code = outfile_close(&out, write_checkpoint(&out, trainer, &head.bytes, error), error);
    mem_free(head.bytes.data);
    return code;
}

/* A checkpoint that lies in memory. Lists are kept as cursors at their first entry. */
struct checkpoint {
    const char *path;
    const uint8_t *data; /* [size] */
    size_t size;
    uint64_t numbers[N_SAVED];
    struct text lora_on, freeze, note;
    uint64_t init, n_files, n_params, hash;
    struct cursor files, params;
    size_t arrays;       /* where the first array begins */
};

static int bad_checkpoint(const struct checkpoint *k, lvm_error *error) {
    return fail(error, LVM_FORMAT, "%s: is damaged or was cut short", k->path);
}

/* Steps over the tensors' names and shapes; their arrays must fill the file up to the last hash.
   0 where they do not. */
static int skip_params(struct checkpoint *k, struct cursor *c) {
    uint64_t bytes = 0;
    k->params = *c;
    for (uint64_t i = 0; i < k->n_params && !c->failed; i++) {
        cursor_text(c);
        uint64_t rows = cursor_number(c, 8), cols = cursor_number(c, 8);
        if (rows > INT32_MAX || cols > INT32_MAX || bytes > k->size) return 0;
        uint64_t one = rows * cols; /* below 2^62 */
        if (one > k->size) return 0;
        bytes += one * CHECKPOINT_ARRAYS * sizeof(float);
    }
    k->hash = cursor_number(c, 8);
    k->arrays = c->at;
    return !c->failed && k->size - c->at >= 8 && k->size - c->at - 8 == bytes;
}

/* Takes the head apart: k's path, data and size are given. */
static int parse_checkpoint(struct checkpoint *k, lvm_error *error) {
    struct cursor c = {k->data, k->size, 0, 0};
    const uint8_t *magic = cursor_take(&c, 8);
    if (magic == NULL || memcmp(magic, "LVMTRAIN", 8) != 0)
        return fail(error, LVM_FORMAT, "%s: is no checkpoint of lvm train", k->path);
    uint64_t version = cursor_number(&c, 8);
    if (!c.failed && version != CHECKPOINT_VERSION)
        return fail(error, LVM_UNSUPPORTED, "%s: is a checkpoint of version %llu, not %d", k->path,
                    (unsigned long long)version, CHECKPOINT_VERSION);
    for (int i = 0; i < N_SAVED; i++) k->numbers[i] = cursor_number(&c, 8);
    k->lora_on = cursor_text(&c);
    k->freeze = cursor_text(&c);
    k->init = cursor_number(&c, 8);
    k->n_files = cursor_number(&c, 8);
    k->files = c;
    for (uint64_t i = 0; i < k->n_files && !c.failed; i++) {
        cursor_text(&c);
        cursor_number(&c, 8);
    }
    k->note = cursor_text(&c);
    k->n_params = cursor_number(&c, 8);
    if (!skip_params(k, &c) || checksum_wrong(k->hash, hash_bytes(0, k->data, k->arrays - 8)))
        return bad_checkpoint(k, error);
    return LVM_OK;
}

/* A number as messages show it. */
static void show_saved(const struct saved_number *n, uint64_t bits, char *text, size_t room) {
    double real;
    memcpy(&real, &bits, sizeof real);
    if (n->words[0] != NULL && bits < 2) snprintf(text, room, "%s", n->words[bits]);
    else if (n->kind == SAVED_FLOAT) snprintf(text, room, "%.9g", real);
    else snprintf(text, room, "%lld", (long long)bits);
}

static int same_text(const struct checkpoint *k, const char *name, struct text saved,
                     const char *own, lvm_error *error) {
    if (own == NULL) own = "";
    if (text_is(saved, own)) return LVM_OK;
    return fail(error, LVM_INVALID, "%s: was trained with %s \"%.*s\", not \"%s\"", k->path, name,
                (int)min64((int64_t)saved.n, 64), saved.s, own);
}

/* All of the configuration must be as it was: another number of steps, say, would have been another
   learning rate from the first step on. */
static int check_configuration(const struct lvm_trainer *t, const struct checkpoint *k,
                               lvm_error *error) {
    for (int i = 0; i < N_SAVED; i++) {
        const struct saved_number *n = &saved_numbers[i];
        uint64_t own = saved_bits(t, n);
        char was[32], is[32];
        if (n->of == OF_STATE || own == k->numbers[i]) continue;
        show_saved(n, k->numbers[i], was, sizeof was);
        show_saved(n, own, is, sizeof is);
        return fail(error, LVM_INVALID, "%s: was trained with %s %s, not %s", k->path, n->name, was,
                    is);
    }
    int code = same_text(k, "adapters on", k->lora_on, t->o.lora_on, error);
    return code == LVM_OK ? same_text(k, "frozen", k->freeze, t->o.freeze, error) : code;
}

static int check_sources(const struct lvm_trainer *t, const struct checkpoint *k,
                         lvm_error *error) {
    const lvm_model *init = t->o.init;
    struct cursor c = k->files;
    if ((init != NULL) != (k->init != 0))
        return fail(error, LVM_INVALID, "%s: began from %s, not from %s", k->path,
                    init != NULL ? "random weights" : "a weights file",
                    init != NULL ? init->path : "random weights");
    if (init != NULL && weights_hash(&init->file) != k->init)
        return fail(error, LVM_INVALID, "%s: began from other weights than those of %s", k->path,
                    init->path);
    if (k->n_files != (uint64_t)t->o.n_data)
        return fail(error, LVM_INVALID, "%s: was trained on %llu files, not on %d", k->path,
                    (unsigned long long)k->n_files, t->o.n_data);
    for (int i = 0; i < t->o.n_data; i++) {
        const lvm_tokens *own = t->o.data[i];
        struct text name = cursor_text(&c);
        if (cursor_number(&c, 8) != own->fingerprint)
            return fail(error, LVM_INVALID, "%s: %s is not what was %.*s when it was trained",
                        k->path, own->name != NULL ? own->name : "(memory)",
                        (int)min64((int64_t)name.n, 100), name.s);
    }
    return LVM_OK;
}

/* The tensors that learn must be the same. */
static int check_params(const struct lvm_trainer *t, const struct checkpoint *k,
                        lvm_error *error) {
    struct cursor c = k->params;
    uint64_t left = k->n_params;
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i];
        if (!learns(p)) continue;
        if (left-- == 0)
            return fail(error, LVM_INVALID, "%s: lacks tensor %s, which learns", k->path, p->name);
        struct text name = cursor_text(&c);
        uint64_t rows = cursor_number(&c, 8), cols = cursor_number(&c, 8);
        if (!text_is(name, p->name) || rows != (uint64_t)p->w.rows || cols != (uint64_t)p->w.cols)
            return fail(error, LVM_INVALID,
                        "%s: holds tensor %.*s of %llu x %llu instead of %s of %d x %d", k->path,
                        (int)min64((int64_t)name.n, 64), name.s, (unsigned long long)rows,
                        (unsigned long long)cols, p->name, p->w.rows, p->w.cols);
    }
    return left == 0 ? LVM_OK : fail(error, LVM_INVALID, "%s: has %llu more tensors that learn",
                                     k->path, (unsigned long long)left);
}

/* Whether the arrays are what was written; as the hash goes, array by array. */
static int check_arrays(const struct lvm_trainer *t, const struct checkpoint *k,
                        lvm_error *error) {
    struct cursor c = {k->data, k->size, k->arrays, 0};
    uint64_t hash = k->hash;
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i];
        size_t bytes = (size_t)param_size(p) * sizeof(float);
        for (int a = 0; learns(p) && a < CHECKPOINT_ARRAYS; a++)
            hash = hash_bytes(hash, cursor_take(&c, bytes), bytes);
    }
    return checksum_wrong(cursor_number(&c, 8), hash) ? bad_checkpoint(k, error) : LVM_OK;
}

/* Numbers that no run has could only come from a file that was made to deceive. */
static int check_state(const struct lvm_trainer *t, const struct checkpoint *k, lvm_error *error) {
    for (int i = 0; i < N_SAVED; i++) {
        const struct saved_number *n = &saved_numbers[i];
        int64_t most = n->where == TRAINER(step)          ? t->o.steps
                       : n->where == TRAINER(at.sentence) ? t->stream.n_sentences
                                                          : INT64_MAX;
        double real;
        memcpy(&real, &k->numbers[i], sizeof real);
        int ok = n->kind == SAVED_DOUBLE ? isfinite(real) && real >= 0
                                         : k->numbers[i] <= (uint64_t)most;
        if (n->of == OF_STATE && !ok) return bad_checkpoint(k, error);
    }
    return LVM_OK;
}

/* What was checked becomes the trainer's; gradients are 0 between steps. */
static void take_checkpoint(struct lvm_trainer *t, const struct checkpoint *k) {
    struct cursor c = {k->data, k->size, k->arrays, 0};
    for (int i = 0; i < N_SAVED; i++) /* 8 bytes each: integers and a double */
        if (saved_numbers[i].of == OF_STATE)
            memcpy((char *)t + saved_numbers[i].where, &k->numbers[i], 8);
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i];
        size_t bytes = (size_t)param_size(p) * sizeof(float);
        void *arrays[CHECKPOINT_ARRAYS];
        if (!learns(p)) continue;
        saved_arrays(p, arrays);
        for (int a = 0; a < CHECKPOINT_ARRAYS; a++)
            memcpy(arrays[a], cursor_take(&c, bytes), bytes);
        memset(p->g, 0, bytes);
    }
}

static int load_checkpoint(struct lvm_trainer *t, struct checkpoint *k, lvm_error *error) {
    int code = parse_checkpoint(k, error);
    if (code == LVM_OK) code = check_configuration(t, k, error);
    if (code == LVM_OK) code = check_sources(t, k, error);
    if (code == LVM_OK) code = check_params(t, k, error);
    if (code == LVM_OK) code = check_state(t, k, error);
    if (code == LVM_OK) code = check_arrays(t, k, error);
    if (code == LVM_OK) take_checkpoint(t, k);
    return code;
}

int lvm_trainer_load(lvm_trainer *trainer, const char *path, lvm_error *error) {
    clear_error(error);
    struct checkpoint k = {.path = path};
    void *mapped = NULL;
    if (trainer == NULL || path == NULL)
        return null_argument(error, "lvm_trainer_load", trainer == NULL ? "trainer" : "path");
    int code = map_file(path, &mapped, &k.size, error);
    k.data = mapped;
    if (code == LVM_OK) code = load_checkpoint(trainer, &k, error);
    if (mapped != NULL) unmap_file(mapped, k.size);
    return code;
}

char *lvm_checkpoint_note(const char *path, lvm_error *error) {
    clear_error(error);
    struct checkpoint k = {.path = path};
    void *mapped = NULL;
    char *note = NULL;
    if (path == NULL) {
        null_argument(error, "lvm_checkpoint_note", "path");
        return NULL;
    }
    int code = map_file(path, &mapped, &k.size, error);
    k.data = mapped;
    if (code == LVM_OK) code = parse_checkpoint(&k, error);
    if (code == LVM_OK) note = mem_alloc((size_t)k.note.n + 1, 1, error);
    if (note != NULL) memcpy(note, k.note.s, (size_t)k.note.n);
    if (mapped != NULL) unmap_file(mapped, k.size);
    return note;
}

/* ---- Adapters ----

   LoRA (Hu et al. 2021, arXiv 2106.09685) leaves a matrix as it is and learns a difference of low
   rank beside it:

       y = x W^T + scale (x A^T) B^T = x (W + scale B A)^T                  scale = alpha / rank
       W [rows][cols]   A [rank][cols]   B [rows][rank]

   A file of adapters is a GGUF file of its own, with the keys that ggml gives its adapters:
   general.type "adapter", adapter.type "lora", adapter.lora.alpha; and of each matrix two tensors,
   such as blk.0.attn_q.weight.lora_a and .lora_b, in F32, F16 or BF16. A model takes them before it
   runs: matrices that have one are merged with it, in memory or into a new file (chapter 14, which
   also writes what a trainer learnt). */

struct adapter {
    struct text matrix;       /* name of W */
    struct tensor a, b;       /* [rank][cols]  [rows][rank] */
    struct tensor_spec *spec; /* of W, in the model that they are matched with */
};

struct adapters {
    const char *path;
    void *mapped;             /* [size], or NULL: foreign memory */
    size_t size;
    struct gguf file;
    float alpha;
    struct adapter *list;     /* [n] in the file's order */
    int n;
};

static int processors(void); /* chapter 10 */
static float not_finite(const struct tensor *t); /* chapter 14 */

static int ends(struct text t, const char *s) {
    size_t n = strlen(s);
    return t.n >= n && memcmp(t.s + t.n - n, s, n) == 0;
}

/* A matrix of a file. */
static struct tensor matrix_of(const struct gguf *g, const struct gguf_tensor *t) {
    return (struct tensor){g->data + g->data_start + t->offset, type_bytes(t->type, t->ne[0]),
                           t->type, (int)t->ne[1], (int)t->ne[0]};
}

/* The adapter whose A this tensor is, with B of the same name and rank. */
static int read_adapter(const struct adapters *ad, const struct gguf_tensor *a, struct adapter *x,
                        lvm_error *error) {
    const struct gguf *g = &ad->file;
    char name[272]; /* a name has 256 bytes at most */
    int n = (int)a->name.n - 1;
    snprintf(name, sizeof name, "%.*sb", n, a->name.s);
    const struct gguf_tensor *b = gguf_tensor(g, name);
    if (b == NULL) return fail(error, LVM_FORMAT, "%s: tensor %s is missing", ad->path, name);
    if (a->n_dims != 2 || b->n_dims != 2 || type_is_quantised(a->type) ||
        type_is_quantised(b->type) || a->ne[1] != b->ne[0])
        return fail(error, LVM_FORMAT,
                    "%s: tensors %.*s and %s are no two matrices of floats and one rank", ad->path,
                    (int)a->name.n, a->name.s, name);
    *x = (struct adapter){{a->name.s, a->name.n - strlen(".lora_a")}, matrix_of(g, a),
                          matrix_of(g, b), NULL};
    if (isfinite(not_finite(&x->a)) && isfinite(not_finite(&x->b))) return LVM_OK;
    return fail(error, LVM_FORMAT, "%s: the adapter of %.*s holds NaN or infinity", ad->path,
                (int)x->matrix.n, x->matrix.s);
}

static int read_adapters(struct adapters *ad, lvm_error *error) {
    const struct gguf *g = &ad->file;
    int code = LVM_OK;
    ad->list = mem_alloc((size_t)g->n_tensors, sizeof *ad->list, error);
    if (ad->list == NULL) return LVM_MEMORY;
    for (int64_t i = 0; code == LVM_OK && i < g->n_tensors; i++) {
        struct text name = g->tensors[i].name;
        if (ends(name, ".lora_a"))
            code = read_adapter(ad, &g->tensors[i], &ad->list[ad->n++], error);
        else if (!ends(name, ".lora_b"))
            code = fail(error, LVM_FORMAT, "%s: tensor %.*s is no half of an adapter", ad->path,
                        (int)name.n, name.s);
    }
    if (code == LVM_OK && (ad->n == 0 || 2 * (int64_t)ad->n != g->n_tensors))
        code = fail(error, LVM_FORMAT, "%s: holds %d adapters in %lld tensors", ad->path, ad->n,
                    (long long)g->n_tensors);
    return code;
}

/* Of a file that lies in memory; path is for messages. */
static int adapters_parse(struct adapters *ad, const char *path, const void *data, size_t size,
                          lvm_error *error) {
    const struct gguf *g = &ad->file;
    int version = 0;
    ad->path = path;
    int code = gguf_parse(&ad->file, path, data, size, error);
    if (code != LVM_OK) return code;
    if (!text_is(read_text(g, "general.architecture"), "lvm"))
        return fail(error, LVM_FORMAT, "%s: a GGUF file of another architecture than lvm", path);
    if (!is_adapter_file(g) || !text_is(read_text(g, "adapter.type"), "lora"))
        return fail(error, LVM_FORMAT, "%s: holds no adapters (LoRA); convert.py --lora makes such "
                    "a file of a folder of them", path);
    code = read_int(g, &(struct int_key){"lvm.format_version", 1, 1, 0, 0}, &version, error);
    if (code == LVM_OK)
        code = read_float(g, &(struct float_key){"adapter.lora.alpha", 1e-30f, 1e30f}, &ad->alpha,
                          error);
    return code == LVM_OK ? read_adapters(ad, error) : code;
}

/* Also of those that could not be opened. */
static void adapters_close(struct adapters *ad) {
    gguf_free(&ad->file);
    mem_free(ad->list);
    if (ad->mapped != NULL) unmap_file(ad->mapped, ad->size);
    memset(ad, 0, sizeof *ad);
}

/* Finds the matrices of a model that adapters are for. */
static int adapters_match(struct adapters *ad, const lvm_model *m, lvm_error *error) {
    for (int i = 0; i < ad->n; i++) {
        struct adapter *x = &ad->list[i];
        for (int s = 0; s < m->n_specs && x->spec == NULL; s++)
            if (m->specs[s].kind == T_MATRIX && text_is(x->matrix, m->specs[s].name))
                x->spec = &m->specs[s];
        if (x->spec == NULL)
            return fail(error, LVM_INVALID, "%s: has an adapter for %.*s, which is no matrix of %s",
                        ad->path, (int)x->matrix.n, x->matrix.s, m->path);
        const int *dims = x->spec->dims;
        if (dims[0] != x->b.rows || dims[1] != x->a.cols)
            return fail(error, LVM_INVALID, "%s: is for %s of %d x %d; in %s it is %d x %d",
                        ad->path, x->spec->name, x->b.rows, x->a.cols, m->path, dims[0], dims[1]);
    }
    return LVM_OK;
}

static int adapters_open(struct adapters *ad, const char *path, const lvm_model *m,
                         lvm_error *error) {
    memset(ad, 0, sizeof *ad);
    int code = map_file(path, &ad->mapped, &ad->size, error);
    if (code == LVM_OK) code = adapters_parse(ad, path, ad->mapped, ad->size, error);
    if (code == LVM_OK && m != NULL) code = adapters_match(ad, m, error);
    if (code != LVM_OK) adapters_close(ad);
    return code;
}

/* A matrix with its adapter in floats. */
struct merger {
    struct tensor w;     /* [rows][cols], of any type */
    float *a, *b;        /* [rank][cols]  [rows][rank] */
    int rank;
    float scale;
};

static float *tensor_floats(const struct tensor *t, lvm_error *error) {
    float *x = mem_alloc((size_t)t->rows * (size_t)t->cols, sizeof *x, error);
    for (int r = 0; x != NULL && r < t->rows; r++)
        row_to_f32(t->type, tensor_row(t, r), x + (int64_t)r * t->cols, t->cols);
    return x;
}

static int merger_open(struct merger *d, const struct tensor *w, const struct adapter *x,
                       float alpha, lvm_error *error) {
    *d = (struct merger){*w, tensor_floats(&x->a, error), tensor_floats(&x->b, error), x->a.rows,
                         alpha / (float)x->a.rows};
    return d->a != NULL && d->b != NULL ? LVM_OK : LVM_MEMORY;
}

static void merger_free(struct merger *d) {
    mem_free(d->a);
    mem_free(d->b);
}

/* Row r of W + scale B A: products in ascending order of the rank, then one addition to W. */
static void merge_row(const struct merger *d, int r, float *row) {
    enum { PART = 256 };
    const float *b = d->b + (int64_t)r * d->rank;
    int cols = d->w.cols;
    row_to_f32(d->w.type, tensor_row(&d->w, r), row, cols);
    for (int at = 0; at < cols; at += PART) {
        int n = cols - at < PART ? cols - at : PART;
        float sum[PART] = {0};
        for (int k = 0; k < d->rank; k++) {
            const float *a = d->a + (int64_t)k * cols + at;
            for (int i = 0; i < n; i++) sum[i] += b[k] * a[i];
        }
        for (int i = 0; i < n; i++) row[at + i] += d->scale * sum[i];
    }
}

enum { MERGE_ROWS = 16 }; /* of a task */

struct merge_tasks {
    struct merger d;
    struct tensor out;
    uint8_t *data;       /* out's */
    float *rows;         /* [threads][cols] */
};

static void merge_task(void *arg, int task, int thread) {
    const struct merge_tasks *t = arg;
    float *row = t->rows + (int64_t)thread * t->out.cols;
    int end = (int)min64(t->out.rows, (int64_t)(task + 1) * MERGE_ROWS);
    for (int r = task * MERGE_ROWS; r < end; r++) {
        merge_row(&t->d, r, row);
        row_from_f32(t->out.type, row, t->data + r * t->out.row_bytes, t->out.cols);
    }
}

/* *out = w with x, in memory of its own: floats of its type, or Q8_0. What lay on the grid of Q4_0
   before does not with something added, and would lose more than it gained. */
static int merge_matrix(struct pool *pool, const struct tensor *w, const struct adapter *x,
                        float alpha, struct tensor *out, lvm_error *error) {
    struct merge_tasks t = {.out = *w};
    if (type_is_quantised(w->type)) t.out.type = LVM_Q8_0;
    t.out.row_bytes = type_bytes(t.out.type, w->cols);
    int code = merger_open(&t.d, w, x, alpha, error);
    if (code == LVM_OK) {
        t.data = mem_alloc((size_t)w->rows, (size_t)t.out.row_bytes, error);
        t.rows = mem_alloc((size_t)pool_threads(pool) * (size_t)w->cols, sizeof *t.rows, error);
        if (t.data == NULL || t.rows == NULL) code = LVM_MEMORY;
    }
    if (code == LVM_OK)
        pool_run(pool, (w->rows + MERGE_ROWS - 1) / MERGE_ROWS, merge_task, &t);
    else mem_free(t.data);
    merger_free(&t.d);
    mem_free(t.rows);
    t.out.data = t.data;
    if (code == LVM_OK) *out = t.out;
    return code;
}

/* All of them, or nothing: list[n] are the merged matrices. */
static int merge_adapters(lvm_model *m, const struct adapters *ad, struct tensor *list,
                          lvm_error *error) {
    struct pool *pool = pool_new(processors(), error);
    int code = pool == NULL ? LVM_MEMORY : LVM_OK, done = 0;
    for (; code == LVM_OK && done < ad->n; done += code == LVM_OK)
        code = merge_matrix(pool, ad->list[done].spec->tensor, &ad->list[done], ad->alpha,
                            &list[done], error);
    for (int i = 0; i < done; i++) {
        struct tensor_spec *s = ad->list[i].spec;
        uint8_t *data = (uint8_t *)(uintptr_t)list[i].data;
        if (code == LVM_OK) {
            mem_free(s->merged);
            *s->tensor = list[i];
            s->merged = data;
        } else {
            mem_free(data);
        }
    }
    pool_free(pool);
    uint64_t hash = weights_hash(&ad->file);
    if (code == LVM_OK) m->adapters = hash_bytes(m->adapters, &hash, sizeof hash);
    return code;
}

int lvm_apply_lora(lvm_model *model, const char *path, lvm_error *error) {
    clear_error(error);
    struct adapters ad;
    if (model == NULL || path == NULL)
        return null_argument(error, "lvm_apply_lora", model == NULL ? "model" : "path");
    if (devices_are_open(model->devices))
        return fail(error, LVM_INVALID, "%s: has contexts already; adapters come before them",
                    model->path);
    int code = adapters_open(&ad, path, model, error);
    if (code != LVM_OK) return code;
    struct tensor *list = mem_alloc((size_t)ad.n, sizeof *list, error);
    code = list == NULL ? LVM_MEMORY : merge_adapters(model, &ad, list, error);
    mem_free(list);
    adapters_close(&ad);
    return code;
}

/* ---- The trainer: its parameters ---- */

/* Whether a name is one of list's, with commas between; * stands for any text. */
static int matches(const char *pattern, size_t n, const char *name) {
    if (n == 0) return *name == 0;
    if (*pattern == '*')
        return matches(pattern + 1, n - 1, name) || (*name != 0 && matches(pattern, n, name + 1));
    return *pattern == *name && matches(pattern + 1, n - 1, name + 1);
}

static int is_listed(const char *list, const char *name) {
    while (list != NULL && *list != 0) {
        size_t n = strcspn(list, ",");
        if (matches(list, n, name)) return 1;
        list += n + (list[n] == ',');
    }
    return 0;
}

/* A linear layer's names: in the file, and in lists. */
static const struct linear_name {
    const char *in_file, *in_lists;
    size_t where; /* in struct block */
} linear_names[] = {{"attn_q", "q", offsetof(struct block, q)},
                    {"attn_k", "k", offsetof(struct block, k)},
                    {"attn_v", "v", offsetof(struct block, v)},
                    {"attn_output", "o", offsetof(struct block, o)},
                    {"ffn_gate", "gate", offsetof(struct block, gate)},
                    {"ffn_up", "up", offsetof(struct block, up)},
                    {"ffn_down", "down", offsetof(struct block, down)}};
enum { LINEARS = sizeof linear_names / sizeof *linear_names };

/* What a new model has: everything that is not optional, and the embedding; the output matrix where
   it is not tied. init's model: what it holds. */
static int is_present(const lvm_train_options *o, const struct tensor_spec *s, int i) {
    int is_output = strcmp(s->name, "output.weight") == 0;
    if (o->init != NULL) {
        const struct llama *a = &o->init->llama;
        return o->init->specs[i].tensor->data != NULL &&
               !(is_output && a->output.data == a->embed.data);
    }
    return !s->optional || strcmp(s->name, "token_embd.weight") == 0 || (is_output && !o->tied);
}

/* The parameter of the description's tensor of this name, in layer `layer` where it is not -1. */
static struct param *find_param(const struct net *net, int layer, const char *format_name) {
    char name[80];
    if (layer < 0) snprintf(name, sizeof name, "%s", format_name);
    else snprintf(name, sizeof name, "blk.%d.%s", layer, format_name);
    for (int i = 0; i < net->n_params; i++)
        if (strcmp(net->params[i].name, name) == 0) return &net->params[i];
    return NULL;
}

static struct linear *block_linear(struct block *b, int i) {
    return (struct linear *)(void *)((char *)b + linear_names[i].where);
}

/* Parameters of the description, with shapes; where they lie is not settled yet. */
static void list_params(struct lvm_trainer *t) {
    for (int i = 0; i < t->m->n_specs; i++) {
        const struct tensor_spec *s = &t->m->specs[i];
        if (!is_present(&t->o, s, i)) continue;
        int vector = s->n_dims == 1, rows = vector ? 1 : s->dims[0],
            cols = vector ? s->dims[0] : s->dims[1];
        struct param *p = &t->net.params[t->net.n_params++];
        snprintf(p->name, sizeof p->name, "%s", s->name);
        p->w = t->o.init != NULL ? *t->o.init->specs[i].tensor
                                 : (struct tensor){NULL, (int64_t)cols * 4, LVM_F32, rows, cols};
        if (vector) p->w.rows = 1, p->w.cols = cols, p->w.row_bytes = (int64_t)cols * 4;
        p->learns = t->o.lora_rank == 0 && !is_listed(t->o.freeze, s->name);
        p->decays = !vector;
        p->spec = s;
    }
}

/* An adapter's half, NAME.lora_a [rank][in] or NAME.lora_b [out][rank], as another parameter. */
static struct param *add_adapter(struct lvm_trainer *t, const struct param *w, char half, int rows,
                                 int cols) {
    struct param *p = &t->net.params[t->net.n_params++];
    snprintf(p->name, sizeof p->name, "%.80s.lora_%c", w->name, half);
    p->w = (struct tensor){NULL, (int64_t)cols * 4, LVM_F32, rows, cols};
    p->learns = !is_listed(t->o.freeze, w->name);
    p->decays = 1;
    return p;
}

static void connect_block(struct lvm_trainer *t, int layer) {
    struct block *b = &t->net.blocks[layer];
    b->attn_norm = find_param(&t->net, layer, "attn_norm.weight");
    b->ffn_norm = find_param(&t->net, layer, "ffn_norm.weight");
    for (int i = 0; i < LINEARS; i++) {
        struct linear *l = block_linear(b, i);
        char name[32];
        snprintf(name, sizeof name, "%s.weight", linear_names[i].in_file);
        l->w = find_param(&t->net, layer, name);
        snprintf(name, sizeof name, "%s.bias", linear_names[i].in_file);
        l->bias = find_param(&t->net, layer, name);
        if (t->o.lora_rank == 0 ||
            (t->o.lora_on != NULL && !is_listed(t->o.lora_on, linear_names[i].in_lists)))
            continue;
        l->a = add_adapter(t, l->w, 'a', t->o.lora_rank, l->w->w.cols);
        l->b = add_adapter(t, l->w, 'b', l->w->w.rows, t->o.lora_rank);
    }
}

/* The first layer that a gradient must reach: below it nothing learns. */
static int lowest_layer(const struct net *net) {
    if (net->embed->learns) return 0;
    for (int layer = 0; layer < net->a->L; layer++) {
        const struct block *b = &net->blocks[layer];
        int any = b->attn_norm->learns || b->ffn_norm->learns;
        for (int i = 0; i < LINEARS; i++) {
            const struct linear *l =
                (const struct linear *)(const void *)((const char *)b + linear_names[i].where);
            any |= l->w->learns || (l->bias != NULL && l->bias->learns) ||
                   (l->a != NULL && l->a->learns);
        }
        if (any) return layer;
    }
    return net->a->L;
}

/* The description of the model, the list of its parameters, and who uses which. */
static int describe_net(struct lvm_trainer *t, lvm_error *error) {
    const lvm_train_options *o = &t->o;
    struct net *net = &t->net;
    t->m = model_new(o->init != NULL ? o->init->path : "(new model)", error);
    if (t->m == NULL) return LVM_MEMORY;
    struct llama *a = &t->m->llama;
    if (o->init != NULL) *a = o->init->llama;
    else
        *a = (struct llama){.context = o->context, .L = o->layers, .D = o->width,
                            .F = o->feed_forward, .H = o->heads,
                            .G = o->kv_heads != 0 ? o->kv_heads : o->heads,
                            .d = o->width / o->heads, .V = o->vocab, .bos = o->bos, .eos = o->eos,
                            .eps = o->norm_eps, .theta = o->rope_theta};
    a->layers = NULL;
    t->m->kern = choose_kernels(error);
    if (t->m->kern == NULL) return LVM_INVALID;
    int code = describe_model(t->m, error);
    net->a = a;
    net->params = mem_alloc((size_t)(t->m->n_specs + 2 * LINEARS * a->L), sizeof *net->params,
                            error);
    net->blocks = mem_alloc((size_t)a->L, sizeof *net->blocks, error);
    if (code != LVM_OK || net->params == NULL || net->blocks == NULL) return LVM_MEMORY;
    list_params(t);
    for (int i = 0; i < a->L; i++) connect_block(t, i);
    net->embed = find_param(net, -1, "token_embd.weight");
    net->norm = find_param(net, -1, "output_norm.weight");
    net->output = find_param(net, -1, "output.weight");
    if (net->embed == NULL) net->embed = net->output; /* tied, whichever of the two was kept */
    if (net->output == NULL) net->output = net->embed;
    net->lora_scale = o->lora_rank > 0 ? o->lora_alpha / (float)o->lora_rank : 0;
    net->lowest = lowest_layer(net);
    return LVM_OK;
}

/* ---- The trainer: its memory ---- */

/* Floats of what is kept of a layer, its input aside, and of its parts. */
static int64_t kept_floats(const struct llama *a, int64_t N) {
    return N * (2 * (int64_t)a->H * a->d + 2 * (int64_t)a->G * a->d + a->H + a->D +
                2 * (int64_t)a->F);
}

static int kept_alloc(struct kept *k, const struct llama *a, int64_t N, lvm_error *error) {
    struct { float **p; int64_t n; } want[] = {
        {&k->q, (int64_t)a->H * a->d}, {&k->k, (int64_t)a->G * a->d}, {&k->v, (int64_t)a->G * a->d},
        {&k->o, (int64_t)a->H * a->d}, {&k->lse, a->H}, {&k->mid, a->D}, {&k->gate, a->F},
        {&k->up, a->F}};
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        *want[i].p = mem_alloc((size_t)(N * want[i].n), sizeof(float), error);
        if (*want[i].p == NULL) return LVM_MEMORY;
    }
    return LVM_OK;
}

static void kept_free(struct kept *k) {
    float *all[] = {k->q, k->k, k->v, k->o, k->lse, k->mid, k->gate, k->up};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) mem_free(all[i]);
}

/* The work memory's arrays and how many floats each has. */
struct work_array {
    float **p;
    int64_t n;
};
enum { WORK_ARRAYS = 15 };

static void list_work(struct lvm_trainer *t, struct work_array list[WORK_ARRAYS]) {
    struct work *w = &t->net.work;
    const struct llama *a = t->net.a;
    int64_t N = t->net.max_rows, D = a->D, Q = (int64_t)a->H * a->d, K = (int64_t)a->G * a->d,
            F = a->F, V = round_up(a->V, PANEL), logit_rows = min64(N, LOGIT_ROWS);
    int64_t turned = max64(max64(max64(D, Q), F) * transposed_ld((int)N),
                           V * transposed_ld((int)logit_rows));
    const struct work_array all[WORK_ARRAYS] = {
        {&w->h, N * D}, {&w->dx, N * D}, {&w->dh, N * D}, {&w->act, N * F}, {&w->dact, N * F},
        {&w->dq, DQ_PARTS * N * Q}, {&w->dk, N * K}, {&w->dv, N * K}, {&w->d_o, N * Q},
        {&w->delta, N * a->H}, {&w->rms, N}, {&w->nll, N}, {&w->turned, turned},
        {&w->u, N * t->o.lora_rank}, {&w->logits, logit_rows * V}};
    memcpy(list, all, sizeof all);
}

static int64_t train_scratch(const struct llama *a) {
    int dp = round_up(a->d, PANEL);
    int64_t forward = 3 * (int64_t)KV_BLOCK * dp + 2 * (int64_t)ATTEND_ROWS * dp +
                      attend_scratch(dp) + PANEL;
    return max64(max64(product_scratch(), 2 * (int64_t)a->F),
                 max64(forward, attend_back_scratch(dp)));
}

/* What it all takes, with as many layers kept as fit into what may be used. */
static void plan_memory(struct lvm_trainer *t, int64_t available, lvm_train_memory *m) {
    const struct net *net = &t->net;
    struct work_array work[WORK_ARRAYS];
    int64_t N = net->max_rows, layer = 4 * kept_floats(net->a, N), L = net->a->L;
    *m = (lvm_train_memory){0};
    for (int i = 0; i < net->n_params; i++) {
        const struct param *p = &net->params[i];
        m->parameters += elements(p);
        if (p->learns) m->trained += elements(p);
        m->weights += p->learns ? 4 * elements(p) : p->w.row_bytes * p->w.rows;
    }
    m->gradients = 4 * m->trained;
    m->optimiser = 8 * m->trained;
    m->activations = 4 * N * net->a->D * (L + 1);
    list_work(t, work);
    for (int i = 0; i < WORK_ARRAYS; i++) m->scratch += 4 * work[i].n;
    m->scratch += 4 * t->o.threads * train_scratch(net->a);
    m->all = m->weights + m->gradients + m->optimiser + m->activations + m->scratch;
    m->kept_layers = t->o.recompute == LVM_RECOMPUTE_ALL
                         ? 0
                         : (int)max64(0, min64(L, (available - m->all) / layer));
    if (t->o.recompute == LVM_RECOMPUTE_NONE) m->kept_layers = (int)L;
    int64_t places = m->kept_layers + (m->kept_layers < L);
    m->activations += places * layer;
    m->all += places * layer;
}

static int net_alloc(struct lvm_trainer *t, const lvm_train_memory *plan, lvm_error *error) {
    struct net *net = &t->net;
    struct work *w = &net->work;
    struct work_array work[WORK_ARRAYS];
    int64_t N = net->max_rows, L = net->a->L;
    int code = LVM_OK;
    net->first_kept = (int)L - plan->kept_layers;
    net->kept = mem_alloc((size_t)L + 1, sizeof *net->kept, error);
    if (net->kept == NULL) return LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i <= L; i++) {
        net->kept[i].x = mem_alloc((size_t)(N * net->a->D), sizeof(float), error);
        if (net->kept[i].x == NULL) code = LVM_MEMORY;
        if (code == LVM_OK && i < L && i >= net->first_kept)
            code = kept_alloc(&net->kept[i], net->a, N, error);
    }
    if (code == LVM_OK && net->first_kept > 0) code = kept_alloc(&net->again, net->a, N, error);
    list_work(t, work);
    for (int i = 0; code == LVM_OK && i < WORK_ARRAYS; i++) {
        *work[i].p = mem_alloc((size_t)work[i].n, sizeof(float), error);
        if (*work[i].p == NULL) code = LVM_MEMORY;
    }
    if (code != LVM_OK) return code;
    w->positions = mem_alloc((size_t)N, sizeof *w->positions, error);
    w->squares = mem_alloc((size_t)all_chunks(net), sizeof *w->squares, error);
    return w->positions == NULL || w->squares == NULL ? LVM_MEMORY : LVM_OK;
}

static void net_free(struct lvm_trainer *t) {
    struct net *net = &t->net;
    for (int i = 0; net->kept != NULL && i <= net->a->L; i++) {
        mem_free(net->kept[i].x);
        kept_free(&net->kept[i]);
    }
    kept_free(&net->again);
    for (int i = 0; i < net->n_params; i++) {
        struct param *p = &net->params[i];
        float *all[] = {p->values, p->g, p->m, p->v};
        for (int k = 0; k < 4; k++) mem_free(all[k]);
    }
    struct work_array work[WORK_ARRAYS];
    if (net->a != NULL) {
        list_work(t, work);
        for (int i = 0; i < WORK_ARRAYS; i++) mem_free(*work[i].p);
    }
    mem_free(net->work.positions);
    mem_free(net->work.squares);
    mem_free(net->kept);
    mem_free(net->rope);
    mem_free(net->params);
    mem_free(net->blocks);
}

/* ---- The trainer: where it begins ---- */

/* Normally distributed, by pairs (Box and Muller 1958). */
static void fill_normal(struct rng *r, float deviation, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 2) {
        double u = (rng_next(r) + 0.5) * 0x1p-32, angle = rng_next(r) * 0x1p-32, sine = 0, cosine = 0;
        double radius = deviation * sqrt(-2 * log_f64(u));
        sincos_f64(angle * 6.28318530717958647692, &sine, &cosine);
        x[i] = (float)(radius * cosine);
        if (i + 1 < n) x[i + 1] = (float)(radius * sine);
    }
}

static int ends_with(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* A parameter's first values. Of a new model: norms 1, biases 0, matrices normal with deviation
   0.02, those that add to the residual stream 0.02 / sqrt(2 L) (Radford et al. 2019). Of init: its
   own. Of an adapter: a is uniform within 1 / sqrt(in), b is 0, so that it begins as nothing. */
static void begin_param(struct lvm_trainer *t, struct param *p, struct rng *r) {
    int64_t n = elements(p);
    const struct tensor *w = &p->w;
    int residual = ends_with(p->name, "attn_output.weight") || ends_with(p->name, "ffn_down.weight");
    if (ends_with(p->name, ".lora_b")) {
        memset(p->values, 0, (size_t)n * sizeof *p->values);
    } else if (ends_with(p->name, ".lora_a")) {
        float bound = 1 / sqrtf((float)w->cols);
        for (int64_t i = 0; i < n; i++)
            p->values[i] = bound * (float)((rng_next(r) + 0.5) * 0x1p-31 - 1);
    } else if (w->data != NULL) {
        for (int row = 0; row < w->rows; row++)
            row_to_f32(w->type, tensor_row(w, row), p->values + (int64_t)row * w->cols, w->cols);
    } else if (!p->decays) {
        for (int64_t i = 0; i < n; i++) p->values[i] = 1;
    } else {
        float scale = residual ? 1 / sqrtf(2 * (float)t->net.a->L) : 1;
        fill_normal(r, 0.02f * scale, p->values, n);
    }
}

/* Each parameter has a stream of random numbers of its own. */
static void begin_task(void *arg, int i, int thread) {
    struct lvm_trainer *t = arg;
    struct param *p = &t->net.params[i];
    struct rng r = rng_new(t->o.seed, (uint64_t)i + 1);
    (void)thread;
    if (p->values != NULL) begin_param(t, p, &r);
}

/* Memory of what learns, or is new; first values; and the model's tensors become the parameters. */
static int params_alloc(struct lvm_trainer *t, lvm_error *error) {
    struct net *net = &t->net;
    for (int i = 0; i < net->n_params; i++) {
        struct param *p = &net->params[i];
        size_t n = (size_t)elements(p);
        float **want[] = {&p->values, &p->g, &p->m, &p->v};
        for (int k = 0; k < (p->learns ? 4 : p->w.data == NULL ? 1 : 0); k++) {
            *want[k] = mem_alloc(n, sizeof(float), error);
            if (*want[k] == NULL) return LVM_MEMORY;
        }
    }
    pool_run(t->e.pool, net->n_params, begin_task, t);
    for (int i = 0; i < net->n_params; i++) {
        struct param *p = &net->params[i];
        if (p->values != NULL)
            p->w = (struct tensor){(const uint8_t *)p->values, (int64_t)p->w.cols * 4, LVM_F32,
                                   p->w.rows, p->w.cols};
        if (p->spec != NULL) *p->spec->tensor = p->w;
    }
    return LVM_OK;
}

/* Cosines and sines of every position, as chapter 6 has them. */
static int rope_alloc(struct net *net, int context, lvm_error *error) {
    int d = net->a->d;
    net->rope = mem_alloc((size_t)context * (size_t)d, sizeof *net->rope, error);
    for (int at = 0; net->rope != NULL && at < context; at++)
        for (int i = 0; i < d / 2; i++) {
            double sine = 0, cosine = 0;
            sincos_f64((float)at * rope_frequency(net->a, i), &sine, &cosine);
            net->rope[(int64_t)at * d + i] = (float)cosine;
            net->rope[(int64_t)at * d + d / 2 + i] = (float)sine;
        }
    return net->rope != NULL ? LVM_OK : LVM_MEMORY;
}

static int rows_alloc(struct rows *r, int n, lvm_error *error) {
    r->ids = mem_alloc((size_t)n, sizeof *r->ids, error);
    r->targets = mem_alloc((size_t)n, sizeof *r->targets, error);
    r->weights = mem_alloc((size_t)n, sizeof *r->weights, error);
    r->pieces = mem_alloc((size_t)n, sizeof *r->pieces, error);
    return r->ids && r->targets && r->weights && r->pieces ? LVM_OK : LVM_MEMORY;
}

static void rows_free(struct rows *r) {
    mem_free(r->ids);
    mem_free(r->targets);
    mem_free(r->weights);
    mem_free(r->pieces);
}

/* ---- The trainer: its calls ---- */

lvm_train_options lvm_default_train_options(void) {
    return (lvm_train_options){
        .size = sizeof(lvm_train_options), .vocab = 8194, .bos = 8192, .eos = 8193,
        .norm_eps = 1e-6f, .rope_theta = 10000, .lora_alpha = 16, .context = 4096, .batch = 1,
        .steps = 1000, .warmup = 100, .lr = 3e-4f, .min_lr = 3e-5f, .beta1 = 0.9f, .beta2 = 0.95f,
        .epsilon = 1e-8f, .weight_decay = 0.1f, .clip = 1, .seed = 1};
}

/* A number of the options and what it may be. */
static int check_option(const char *name, double value, double low, double high,
                        lvm_error *error) {
    if (value >= low && value <= high) return LVM_OK;
    return fail(error, LVM_INVALID, "%s is %g: it must be %g to %g", name, value, low, high);
}

static int check_train_options(const lvm_train_options *o, lvm_error *error) {
    const struct { const char *name; double value, low, high; } all[] = {
        {"threads", o->threads, 1, 1024}, {"context", o->context, 2, 1 << 20},
        {"batch", o->batch, 1, 1 << 20}, {"steps", (double)o->steps, 1, 1e15},
        {"warmup", (double)o->warmup, 0, 1e15}, {"lr", o->lr, 0, 1e3}, {"min_lr", o->min_lr, 0, 1e3},
        {"beta1", o->beta1, 1e-6, 1 - 1e-6}, {"beta2", o->beta2, 1e-6, 1 - 1e-7},
        {"epsilon", o->epsilon, 1e-30, 1}, {"weight_decay", o->weight_decay, 0, 100},
        {"clip", o->clip, 0, 1e9}, {"lora_rank", o->lora_rank, 0, 4096},
        {"lora_alpha", o->lora_alpha, 1e-6, 1e6}, {"packing", o->packing, LVM_CUT, LVM_WHOLE},
        {"schedule", o->schedule, LVM_COSINE, LVM_WSD},
        {"recompute", o->recompute, LVM_RECOMPUTE_AUTO, LVM_RECOMPUTE_ALL},
        {"batch x context", (double)o->batch * o->context, 1, 1 << 30}};
    int code = LVM_OK;
    for (size_t i = 0; code == LVM_OK && i < sizeof all / sizeof *all; i++)
        code = check_option(all[i].name, all[i].value, all[i].low, all[i].high, error);
    return code;
}

/* Every word of the list names a linear layer. */
static int check_lora_on(const char *list, lvm_error *error) {
    while (list != NULL && *list != 0) {
        size_t n = strcspn(list, ",");
        int known = 0;
        for (int i = 0; i < LINEARS; i++) known |= matches(list, n, linear_names[i].in_lists);
        if (!known)
            return fail(error, LVM_INVALID, "lora_on: \"%.*s\" is none of q, k, v, o, gate, up, "
                        "down", (int)min64((int64_t)n, 40), list);
        list += n + (list[n] == ',');
    }
    return LVM_OK;
}

/* Of a model that begins from nothing. */
static int check_sizes(const lvm_train_options *o, lvm_error *error) {
    const struct { const char *name; int value, low, high; } all[] = {
        {"layers", o->layers, 1, 1024}, {"width", o->width, 2, 1 << 16},
        {"heads", o->heads, 1, 1024}, {"feed_forward", o->feed_forward, 1, 1 << 18},
        {"vocab", o->vocab, 2, 1 << 16}, {"kv_heads", o->kv_heads, 0, 1024},
        {"bos", o->bos, -1, o->vocab - 1}, {"eos", o->eos, -1, o->vocab - 1}};
    int code = LVM_OK;
    for (size_t i = 0; code == LVM_OK && i < sizeof all / sizeof *all; i++)
        code = check_option(all[i].name, all[i].value, all[i].low, all[i].high, error);
    if (code == LVM_OK) code = check_option("norm_eps", o->norm_eps, 1e-30, 1, error);
    if (code == LVM_OK) code = check_option("rope_theta", o->rope_theta, 1, 1e12, error);
    if (code != LVM_OK) return code;
    if (o->width % o->heads != 0 || o->width / o->heads % 2 != 0)
        return fail(error, LVM_INVALID, "width %d does not divide into %d heads of even width",
                    o->width, o->heads);
    if (o->kv_heads != 0 && o->heads % o->kv_heads != 0)
        return fail(error, LVM_INVALID, "%d attention heads do not share %d key/value heads evenly",
                    o->heads, o->kv_heads);
    return LVM_OK;
}

/* The options with copies of their texts, checked. */
static int settle_train_options(struct lvm_trainer *t, const lvm_train_options *options,
                                lvm_error *error) {
    lvm_train_options *o = &t->o;
    *o = lvm_default_train_options();
    int code = copy_options(o, sizeof *o, sizeof *o, options, "lvm_train_options", error);
    const char *lora_on = o->lora_on, *freeze = o->freeze;
    o->lora_on = o->freeze = NULL;
    if (code != LVM_OK) return code;
    if (o->threads == 0) o->threads = processors();
    if (lora_on != NULL && (o->lora_on = copy_string(lora_on, error)) == NULL) return LVM_MEMORY;
    if (freeze != NULL && (o->freeze = copy_string(freeze, error)) == NULL) return LVM_MEMORY;
    code = check_train_options(o, error);
    if (code == LVM_OK && o->init == NULL) code = check_sizes(o, error);
    if (code == LVM_OK && o->init != NULL && o->init->llama.L == 0)
        code = fail(error, LVM_INVALID, "%s: holds no transformer, which this needs",
                    o->init->path);
    if (code == LVM_OK && o->init != NULL && o->init->llama.context < o->context)
        code = fail(error, LVM_INVALID, "%s: was made for %d tokens, not for a context of %d",
                    o->init->path, o->init->llama.context, o->context);
    return code == LVM_OK ? check_lora_on(lora_on, error) : code;
}

/* What a trainer is before anything large is taken, and how much that will be. */
static int trainer_plan(struct lvm_trainer *t, const lvm_train_options *options,
                        lvm_train_memory *plan, lvm_error *error) {
    int code = settle_train_options(t, options, error);
    if (code == LVM_OK) code = describe_net(t, error);
    if (code != LVM_OK) return code;
    t->rows_at_once = (int)max64(1, min64(t->o.batch, PASS_TOKENS / t->o.context));
    t->net.max_rows = t->rows_at_once * t->o.context;
    int64_t available = t->o.memory > 0 ? t->o.memory : os_memory_available();
    plan_memory(t, available, plan);
    if (plan->trained == 0) return fail(error, LVM_INVALID, "nothing of the model learns");
    if (plan->all <= available) return LVM_OK;
    return fail(error, LVM_MEMORY, "training needs %.2f GB, of which %.2f are free: a smaller "
                "model or context, adapters (LoRA) or recomputing need less",
                (double)plan->all * 1e-9, (double)available * 1e-9);
}

int lvm_trainer_memory(const lvm_train_options *options, lvm_train_memory *memory,
                       lvm_error *error) {
    clear_error(error);
    if (options == NULL || memory == NULL)
        return null_argument(error, "lvm_trainer_memory", options == NULL ? "options" : "memory");
    *memory = (lvm_train_memory){0};
    struct lvm_trainer *t = mem_alloc(1, sizeof *t, error);
    if (t == NULL) return LVM_MEMORY;
    int code = trainer_plan(t, options, memory, error);
    lvm_trainer_free(t);
    return code;
}

static int trainer_open(struct lvm_trainer *t, const lvm_train_options *options,
                        lvm_error *error) {
    lvm_train_memory plan;
    int code = trainer_plan(t, options, &plan, error);
    if (code != LVM_OK) return code;
    const struct llama *a = t->net.a;
    lvm_train_options *o = &t->o;
    if (o->n_data > 0) code = stream_open(&t->stream, o, a->bos, a->eos, a->V, error);
    if (code != LVM_OK) return code;
    t->e = (struct exec){.kern = t->m->kern, .exact = 1, .pool = pool_new(o->threads, error)};
    if (t->e.pool == NULL) return LVM_MEMORY;
    t->e.scratch_floats = (train_scratch(a) + 1023) / 1024 * 1024;
    t->e.scratch = mem_alloc((size_t)o->threads * (size_t)t->e.scratch_floats, sizeof(float),
                             error);
    if (t->e.scratch == NULL) return LVM_MEMORY;
    code = params_alloc(t, error);
    if (code == LVM_OK) code = net_alloc(t, &plan, error);
    if (code == LVM_OK) code = rope_alloc(&t->net, o->context, error);
    if (code == LVM_OK) code = rows_alloc(&t->rows, o->batch * o->context, error);
    t->pass_pieces = mem_alloc((size_t)t->net.max_rows, sizeof *t->pass_pieces, error);
    return code == LVM_OK && t->pass_pieces == NULL ? LVM_MEMORY : code;
}

lvm_trainer *lvm_trainer_new(const lvm_train_options *options, lvm_error *error) {
    clear_error(error);
    if (options == NULL) {
        null_argument(error, "lvm_trainer_new", "options");
        return NULL;
    }
    struct lvm_trainer *t = mem_alloc(1, sizeof *t, error);
    if (t == NULL) return NULL;
    if (trainer_open(t, options, error) == LVM_OK) return t;
    lvm_trainer_free(t);
    return NULL;
}

void lvm_trainer_free(lvm_trainer *t) {
    if (t == NULL) return;
    net_free(t);
    rows_free(&t->rows);
    mem_free(t->pass_pieces);
    mem_free(t->e.scratch);
    pool_free(t->e.pool);
    lvm_close(t->m);
    mem_free((char *)t->o.lora_on);
    mem_free((char *)t->o.freeze);
    mem_free(t);
}

/* The rows of a pass: up to max_rows of r from `first` on. */
static struct rows pass_rows(struct lvm_trainer *t, const struct rows *r, int first) {
    struct rows p = {(int)min64(t->net.max_rows, r->n - first), r->ids + first, r->targets + first,
                     r->weights + first, t->pass_pieces, 0};
    for (int i = 0; i < r->n_pieces; i++) {
        struct piece piece = r->pieces[i];
        if (piece.first < first || piece.first >= first + p.n) continue;
        p.pieces[p.n_pieces++] = (struct piece){piece.first - first, piece.n};
    }
    return p;
}

static double sum_of(const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum;
}

/* Sets the units of progress of a call to come: so many passes of so many units. */
static void begin_progress(struct lvm_trainer *t, int64_t rows, int units) {
    t->units = 0;
    t->all_units = (rows + t->net.max_rows - 1) / t->net.max_rows * units;
}

/* The gradients of a step, as several passes; the mean loss in *loss. */
static int accumulate_step(struct lvm_trainer *t, double *loss, lvm_error *error) {
    double all = sum_of(t->rows.weights, t->rows.n), sum = 0;
    int code = LVM_OK, units = 3 * t->net.a->L;
    zero_gradients(t);
    begin_progress(t, t->rows.n, units);
    for (int at = 0; code == LVM_OK && all > 0 && at < t->rows.n; at += t->net.max_rows) {
        struct rows r = pass_rows(t, &t->rows, at);
        code = net_accumulate(t, &r, all, &sum, error);
        t->units += units;
    }
    *loss = all > 0 ? sum / all : 0;
    return code;
}

/* Steps that no update may be made of: SPIKE times the usual norm, or no number at all. */
enum { SPIKE = 20 };

static int is_spike(const struct lvm_trainer *t, double loss, double norm) {
    if (!isfinite(loss) || !isfinite(norm)) return 1;
    return norm == 0 || (t->usual_norm > 0 && norm > SPIKE * t->usual_norm);
}

int lvm_trainer_step(lvm_trainer *t, lvm_train_report *report, lvm_error *error) {
    clear_error(error);
    if (t == NULL || report == NULL)
        return null_argument(error, "lvm_trainer_step", t == NULL ? "trainer" : "report");
    *report = (lvm_train_report){0};
    if (t->o.n_data == 0) return fail(error, LVM_INVALID, "the trainer has no data to learn from");
    struct data_position at = t->at;
    double loss = 0;
    int code = fill_rows(&t->stream, &at, t->o.batch, &t->rows, error);
    if (code == LVM_OK) code = accumulate_step(t, &loss, error);
    if (code != LVM_OK) return code;
    double norm = gradient_norm(t), lr = learning_rate(&t->o, t->step + 1);
    int skip = is_spike(t, loss, norm);
    if (!skip) {
        update_params(t, lr, norm, t->step - t->skipped + 1);
        t->usual_norm = t->usual_norm > 0 ? 0.95 * t->usual_norm + 0.05 * norm : norm;
    }
    t->at = at;
    t->step++;
    t->tokens += (int64_t)t->rows.n;
    t->skipped += skip;
    t->in_a_row = skip ? t->in_a_row + 1 : 0;
    *report = (lvm_train_report){.step = t->step, .tokens = t->tokens, .skipped = t->skipped,
                                 .in_a_row = t->in_a_row, .loss = loss, .grad_norm = norm,
                                 .lr = lr, .was_skipped = skip,
                                 .epoch = (double)at.epoch + (double)at.sentence /
                                                                 (double)t->stream.n_sentences};
    return LVM_OK;
}

/* One pass over other data, in its order. */
static int eval_stream(struct lvm_trainer *t, const struct stream *s, int64_t max_rows,
                       struct rows *r, double *sum, double *all, int64_t *tokens,
                       lvm_error *error) {
    struct data_position at = {0, 0, 0};
    int code = LVM_OK;
    for (int64_t done = 0; code == LVM_OK && (max_rows == 0 || done < max_rows);) {
        int count = max_rows == 0 ? t->rows_at_once
                                  : (int)min64(t->rows_at_once, max_rows - done);
        code = fill_rows(s, &at, count, r, error);
        if (code != LVM_OK || r->n == 0) break;
        begin_progress(t, r->n, t->net.a->L);
        code = net_loss(t, r, sum, error);
        *all += sum_of(r->weights, r->n);
        for (int i = 0; i < r->n; i++) *tokens += r->weights[i] != 0;
        done += count;
    }
    return code;
}

int lvm_trainer_eval(lvm_trainer *t, const lvm_tokens *data, int64_t max_rows, double *loss,
                     int64_t *tokens, lvm_error *error) {
    clear_error(error);
    if (t == NULL || data == NULL || loss == NULL || tokens == NULL)
        return null_argument(error, "lvm_trainer_eval", t == NULL      ? "trainer"
                                                        : data == NULL ? "data"
                                                        : loss == NULL ? "loss"
                                                                       : "tokens");
    const struct llama *a = t->net.a;
    lvm_train_options o = t->o;
    struct stream s;
    struct rows r = {0};
    double sum = 0, all = 0;
    *loss = 0;
    *tokens = 0;
    o.data = &data;
    o.n_data = 1;
    int code = stream_open(&s, &o, a->bos, a->eos, a->V, error);
    s.shuffle = 0;
    if (code == LVM_OK) code = rows_alloc(&r, t->net.max_rows, error);
    if (code == LVM_OK) code = eval_stream(t, &s, max_rows, &r, &sum, &all, tokens, error);
    rows_free(&r);
    if (code != LVM_OK) return code;
    if (all <= 0) return fail(error, LVM_INVALID, "%s: no token has a weight", data->name);
    *loss = sum / all;
    return check_finite(&(float){(float)*loss}, 1, "the losses of file", 1, error);
}

/* =================================================================================================
   Chapter 9.  Visual sentences: prompts by the line

   A set of prompts is a file of JSON lines (RFC 8259: one object a line, UTF-8), as the published
   evaluation reads them:

       line  --parse_sentence-->  struct sentence: lists of images, each a path or tokens
             --chapter 15: eval, rank, batch-->  tokens, a prompt, likelihoods or new images

       {"input": [images], "target": [images]}               perplexity of the targets
       {"input": [images], "output": "name"}                 what to predict, where to put it
       {"input": [images], "choices": [images], "answer": n} a puzzle, choices counted from 0

   Images. An image is a path or the array of its tokens, and a list of one image may be that path
   alone. "input_tokens", "target_tokens", "output_tokens" and "choices_tokens" hold tokens alone:
   numbers, arrays of numbers or base64 (RFC 4648) of little-endian int32, any number of whole
   images. A path is relative to --base, else to the set's folder, else to the working directory; a
   set that comes from standard input lies in the working directory.

   Output. A string names the file that batch writes, below the folder that -o names: without an
   ending it gets .png; in place of another image's ending (jpg, jpeg, jpe, jfif, webp, bmp, gif,
   tif, tiff, ppm, pgm, pnm) stands .png, for published sets name the true image there; any other
   ending, a folder and an empty name are refused. eval takes the name for the target where there is
   no other. A list under "output" is the target.

   Rules. "input" must be there, were it empty; a line with choices is a puzzle, whatever target it
   has. null is as good as no key. A key that stands twice and two forms of one thing (input and
   input_tokens, target and a list under output) are a fault. Whole numbers may be written as 1.0 or
   1e0. A key without a meaning is passed over with any value that Python writes, NaN and Infinity
   too, and in silence unless it is nearly a key with one ("inputs", "Target", "anwser"): no more
   than two letters to insert, remove, replace or swap with their neighbour, fewer than half of its
   own, be they capital or small. Such a one is noted on stderr, once a set for each key that may be
   meant. Blank lines are only counted, a byte order mark in front of the first is passed over. A
   line with a fault is reported and the next one taken; the exit status is 1 then.

   Streams. A set is read line by line; from standard input (-) or a FIFO each line is answered
   before the next is waited for. Two lines of a batch must not write one file, under whatever names
   and links, nor one an image that any line reads: a file is looked through and refused before any
   work, in a stream the line that comes second is a fault.

   Lines to learn from (lvm pack) hold tokens alone, in the same forms, of images of any size:

       {"tokens": ids}                                       a sentence
       {"input_tokens": ids, "output_tokens": ids}           the same of two parts, so that the loss
                                                             can be of the second one alone
       "weights": numbers                                    0 .. 255, of the loss of each token; 16
                                                             is 1; or base64 of bytes
       "image_tokens": n                                     an image's; else 256 if that may be

   Limits. A line has at most 16 MiB, a list at most 65536 images, values lie in each other 32 deep.
   Memory is in proportion to the longest line, where a short path takes some 50 times its length,
   and batch keeps the names of its outputs. */

#ifndef LVM_NO_MAIN /* only the command line reads sets */

enum { LINE_BYTES = 1 << 24, LIST_IMAGES = 1 << 16, JSON_DEPTH = 32 }; /* the limits */

/* What a key gives. A line may give each once. */
enum thing { GIVES_INPUT, GIVES_TARGET, GIVES_CHOICES, GIVES_OUTPUT, GIVES_ANSWER, N_THINGS };

/* The keys with a meaning. A list under "output" is the target. */
static const struct sentence_key {
    const char *name;
    enum thing gives;
    int only_tokens;
} key_table[] = {{"input", GIVES_INPUT, 0},     {"input_tokens", GIVES_INPUT, 1},
                 {"target", GIVES_TARGET, 0},   {"target_tokens", GIVES_TARGET, 1},
                 {"output", GIVES_OUTPUT, 0},   {"output_tokens", GIVES_TARGET, 1},
                 {"choices", GIVES_CHOICES, 0}, {"choices_tokens", GIVES_CHOICES, 1},
                 {"answer", GIVES_ANSWER, 0}};
enum { N_KEYS = sizeof key_table / sizeof *key_table, KEY_ROOM = 24 };

/* An image as a line names it. */
struct image_ref {
    char *path;   /* NULL where the line gives tokens */
    int32_t *ids; /* [T], or NULL */
};

/* Images in the order of the line. */
struct image_list {
    struct image_ref *list; /* [n] */
    int n;
    size_t room;
};

/* One line: a prompt and what belongs to it. */
struct sentence {
    struct image_list input, target, choices;
    char *output;                  /* NULL: none */
    int answer;                    /* -1: unknown */
    unsigned keys;                 /* bit i: key_table[i] stands in the line, were it null */
    const char *by[N_THINGS];      /* the key that gave it, or NULL */
    char stray[N_KEYS][KEY_ROOM];  /* a key without a meaning that is nearly key_table[i], or "" */
};

/* A recursive descent reader of one line of JSON (RFC 8259). Each json_ function below reads what
   its name says and moves `at` behind it. The first fault is kept in code and error, and from then
   on nothing is read: loops end by asking for code, and no caller has to look at each call. */
struct json {
    const char *s;
    size_t n, at;
    int T, codes; /* tokens an image; image tokens */
    int code;     /* of the first fault, which stands in error */
    lvm_error *error;
};

/* Says what is wrong and where; who reads the file adds its name and the line. */
LVM_PRINTF(2, 3) static void json_fail(struct json *j, const char *format, ...) {
    char fault[160];
    va_list args;
    if (j->code != LVM_OK) return;
    va_start(args, format);
    vsnprintf(fault, sizeof fault, format, args);
    va_end(args);
    j->code = fail(j->error, LVM_FORMAT, "%s (at byte %zu%s)", fault, j->at + 1,
                   j->at < j->n ? "" : ", the end of the line");
}

/* The next character behind blanks; 0 at the end and after a fault. */
static int json_peek(struct json *j) {
    while (j->at < j->n && strchr(" \t\r", j->s[j->at]) != NULL && j->s[j->at] != 0) j->at++;
    return j->code == LVM_OK && j->at < j->n ? (unsigned char)j->s[j->at] : 0;
}

/* Takes a character if it is the next one. */
static int json_take(struct json *j, int c) {
    if (json_peek(j) != c) return 0;
    j->at++;
    return 1;
}

/* Takes a character that must be the next one. */
static void json_want(struct json *j, int c, const char *fault) {
    if (!json_take(j, c)) json_fail(j, "%s", fault);
}

/* After an element of an array or object: 1 when another follows, 0 at its end. */
static int json_more(struct json *j, int end) {
    if (json_take(j, ',')) {
        if (json_peek(j) == end) json_fail(j, "a comma stands in front of the %c", end);
        return 1;
    }
    json_want(j, end, end == ']' ? "an array lacks , or ]" : "an object lacks , or }");
    return 0;
}

/* The four digits behind \u. */
static uint32_t json_hex4(struct json *j) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++, j->at++) {
        int c = j->at < j->n ? (unsigned char)j->s[j->at] : 0;
        if (!isxdigit(c)) {
            json_fail(j, "\\u takes four hexadecimal digits");
            return '?';
        }
        v = v << 4 | (uint32_t)(isdigit(c) ? c - '0' : (c | 32) - 'a' + 10);
    }
    return v;
}

/* What stands behind a backslash, as UTF-8; returns its bytes. A character above U+FFFF is written
   as two units of UTF-16, a high surrogate D800..DBFF with its upper ten bits, then a low one
   DC00..DFFF; one without the other is no character. UTF-8 gives the first byte a length, 110xxxxx,
   1110xxxx or 11110xxx, and each further byte six bits, 10xxxxxx. */
static int json_escape(struct json *j, char *out) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    int c = j->at < j->n ? j->s[j->at++] : 0;
    const char *simple = c != 0 ? strchr(from, c) : NULL;
    if (simple != NULL) {
        *out = to[simple - from];
        return 1;
    }
    if (c != 'u') {
        json_fail(j, "an unknown \\ in a string");
        return 0;
    }
    uint32_t u = json_hex4(j);
    /* 0x36 << 10 is D800, the first high surrogate; 0x37 << 10 is DC00, the first low one */
    if (u >> 10 == 0x36 && j->n - j->at >= 6 && memcmp(j->s + j->at, "\\u", 2) == 0) {
        j->at += 2;
        uint32_t low = json_hex4(j);
        u = low >> 10 == 0x37 ? 0x10000 + ((u & 0x3ff) << 10 | (low & 0x3ff)) : 0;
    }
    if (u == 0 || u >> 11 == 0x1b) json_fail(j, "a string holds half a character or a zero");
    int more = u < 0x80 ? 0 : u < 0x800 ? 1 : u < 0x10000 ? 2 : 3;
    /* the first byte's marks by the number of bytes behind it */
    static const uint8_t lead[4] = {0, 0xc0, 0xe0, 0xf0};
    out[0] = (char)(lead[more] | u >> 6 * more);
    for (int i = 1; i <= more; i++) out[i] = (char)(0x80 | (u >> 6 * (more - i) & 0x3f));
    return more + 1;
}

/* A string as allocated text, which the caller frees; NULL after a fault. No escape stands for
   more bytes than it has, so what lies between the quotes is room enough. */
static char *json_string(struct json *j) {
    json_want(j, '"', json_peek(j) == '\'' ? "strings stand between \", not between '"
                                           : "a string should stand here");
    size_t end = j->at, n = 0;
    while (end < j->n && j->s[end] != '"') end += j->s[end] == '\\' ? 2 : 1;
    if (end >= j->n) json_fail(j, "a string does not end");
    if (j->code != LVM_OK) return NULL;
    char *text = mem_alloc(end - j->at + 1, 1, j->error);
    if (text == NULL) j->code = LVM_MEMORY;
    while (j->code == LVM_OK && j->at < end) {
        char c = j->s[j->at++];
        if (c == '\\') n += (size_t)json_escape(j, text + n);
        else text[n++] = c;
    }
    json_want(j, '"', "a string does not end");
    if (j->code == LVM_OK) return text;
    mem_free(text);
    return NULL;
}

static size_t digits_end(const struct json *j, size_t at) {
    while (at < j->n && isdigit((unsigned char)j->s[at])) at++;
    return at;
}

/* Where a number ends that begins at `at`: [-] digits [. digits] [e [+-] digits], and no zero in
   front of other digits. `at` itself where there is none. */
static size_t number_end(const struct json *j, size_t at) {
    size_t start = at + (at < j->n && j->s[at] == '-'), end = digits_end(j, start);
    if (end == start || (j->s[start] == '0' && end > start + 1)) return at;
    if (end < j->n && j->s[end] == '.' && digits_end(j, end + 1) > end + 1)
        end = digits_end(j, end + 1);
    if (end < j->n && (j->s[end] | 32) == 'e') {
        size_t power = end + 1;
        power += power < j->n && (j->s[power] == '-' || j->s[power] == '+');
        if (digits_end(j, power) > power) end = digits_end(j, power);
    }
    return end;
}

/* A whole number in [0, below), also as 1.0 or 1e0: some programs know no whole numbers. */
static int json_int(struct json *j, int below, const char *fault) {
    char text[48] = "";
    json_peek(j);
    size_t n = number_end(j, j->at) - j->at;
    if (n > 0 && n < sizeof text) memcpy(text, j->s + j->at, n);
    double v = text[0] != 0 ? strtod(text, NULL) : -1;
    if (!(v >= 0 && v < below) || v > (int)v) json_fail(j, "%s", fault);
    if (j->code != LVM_OK) return 0;
    j->at += n;
    return (int)v;
}

/* Takes a word of letters if it is the next thing. */
static int json_word(struct json *j, const char *word) {
    size_t n = strlen(word);
    json_peek(j);
    if (j->n - j->at < n || memcmp(j->s + j->at, word, n) != 0) return 0;
    if (j->at + n < j->n && isalnum((unsigned char)j->s[j->at + n])) return 0;
    j->at += n;
    return 1;
}

/* A number or a word; Python writes NaN and Infinity, for which JSON has none. */
static void json_scalar(struct json *j) {
    static const char *const words[] = {"true", "false", "null", "NaN", "Infinity", "-Infinity"};
    for (int i = 0; i < 6; i++)
        if (json_word(j, words[i])) return;
    size_t number = number_end(j, j->at), end = number;
    while (end < j->n && (isalnum((unsigned char)j->s[end]) || strchr("+-.", j->s[end]) != NULL))
        end++;
    int shown = end - j->at < 20 ? (int)(end - j->at) : 20;
    if (shown == 0) json_fail(j, "a value should stand here");
    else if (end > number) json_fail(j, "%.*s is no value of JSON", shown, j->s + j->at);
    j->at = end;
}

/* Steps over a value whose key has no meaning here: a string, an array, an object or a scalar. The
   depth that is left bounds the recursion, whatever the file holds. */
static void json_skip(struct json *j, int depth) {
    int c = json_peek(j);
    if (depth == 0) json_fail(j, "values lie in each other too deeply");
    if (c == '"') {
        mem_free(json_string(j));
    } else if (c == '[' || c == '{') {
        int end = c == '[' ? ']' : '}';
        j->at++;
        if (json_take(j, end)) return;
        do {
            if (c == '{') {
                mem_free(json_string(j));
                json_want(j, ':', "a key lacks its :");
            }
            json_skip(j, depth - 1);
        } while (j->code == LVM_OK && json_more(j, end));
    } else {
        json_scalar(j);
    }
}

/* Also of a list that is empty or was given up half-way. */
static void image_list_free(struct image_list *p) {
    for (int i = 0; i < p->n; i++) {
        mem_free(p->list[i].path);
        mem_free(p->list[i].ids);
    }
    mem_free(p->list);
    memset(p, 0, sizeof *p);
}

/* Also of one that was never filled but is zero. */
static void sentence_free(struct sentence *s) {
    image_list_free(&s->input);
    image_list_free(&s->target);
    image_list_free(&s->choices);
    mem_free(s->output);
    memset(s, 0, sizeof *s);
}

/* Adds an image, whose path or ids the list owns from now on, also after a failure. */
static int image_list_add(struct image_list *p, char *path, int32_t *ids, lvm_error *error) {
    struct image_ref *list = array_grow(p->list, (size_t)p->n, 1, sizeof *list, &p->room, error);
    if (list == NULL) {
        mem_free(path);
        mem_free(ids);
        return LVM_MEMORY;
    }
    p->list = list;
    p->list[p->n++] = (struct image_ref){path, ids};
    return LVM_OK;
}

/* The same for what a line says, within its limit; what is NULL was a fault. */
static void json_add(struct json *j, struct image_list *out, char *path, int32_t *ids) {
    if (path == NULL && ids == NULL) return;
    if (out->n == LIST_IMAGES) json_fail(j, "a list of more than %d images", LIST_IMAGES);
    if (j->code == LVM_OK) {
        j->code = image_list_add(out, path, ids, j->error);
    } else {
        mem_free(path);
        mem_free(ids);
    }
}

/* Tokens of whole images, gathered in a buffer, become images of T tokens each; the buffer is empty
   afterwards and keeps its memory. */
static void add_tokens(struct json *j, struct buffer *tokens, struct image_list *out) {
    size_t T = (size_t)j->T, n = tokens->n / sizeof(int32_t);
    if (n % T != 0) json_fail(j, "%zu tokens are no whole images of %zu", n, T);
    for (size_t at = 0; j->code == LVM_OK && at < n; at += T) {
        int32_t *ids = mem_alloc(T, sizeof *ids, j->error);
        if (ids == NULL) j->code = LVM_MEMORY;
        else memcpy(ids, tokens->data + at * sizeof *ids, T * sizeof *ids);
        json_add(j, out, NULL, ids);
    }
    tokens->n = 0;
}

/* One id of an array of numbers; special ids (bos, eos) are no part of an image. */
static void take_token(struct json *j, struct buffer *tokens) {
    int c = json_peek(j);
    if (c != '-' && !isdigit(c)) json_fail(j, "an image's path or tokens should stand here");
    int32_t id = json_int(j, j->codes, "an id is no image token");
    if (j->code == LVM_OK) j->code = buffer_add(tokens, &id, sizeof id, j->error);
}

/* The 6 bits of a digit, or -1. */
static int base64_digit(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* The *n bytes of a base64 string, which the caller frees; NULL after a fault. Each character
   brings six bits, highest first, each eight of them make a byte, which has room where its
   characters stood. At the end no more than two = may pad. */
static uint8_t *json_base64(struct json *j, size_t *n) {
    char *text = json_string(j);
    uint8_t *bytes = (uint8_t *)text;
    uint32_t bits = 0;
    int held = 0;
    size_t size = text != NULL ? strlen(text) : 0, i = 0;
    *n = 0;
    for (; i < size && base64_digit(text[i]) >= 0; i++) {
        bits = bits << 6 | (uint32_t)base64_digit(text[i]);
        held += 6;
        if (held < 8) continue;
        held -= 8;
        bytes[(*n)++] = (uint8_t)(bits >> held);
    }
    if (text != NULL && (size - i > 2 || strspn(text + i, "=") != size - i))
        json_fail(j, "a string is no base64");
    if (j->code == LVM_OK) return bytes;
    mem_free(text);
    return NULL;
}

/* Base64 of little-endian int32. */
static void take_base64(struct json *j, struct buffer *tokens) {
    json_peek(j);
    size_t n = 0, start = j->at;
    uint8_t *bytes = json_base64(j, &n);
    if (n % sizeof(int32_t) != 0) json_fail(j, "tokens are no base64 of whole int32");
    for (size_t i = 0; j->code == LVM_OK && i < n; i += sizeof(int32_t)) {
        uint32_t id;
        memcpy(&id, bytes + i, sizeof id);
        if (id < (uint32_t)j->codes) continue;
        if (memchr(j->s + start, '\\', j->at - start) == NULL) j->at = start + 1 + i / 3 * 4;
        json_fail(j, "an id is no image token");
    }
    if (j->code == LVM_OK) j->code = buffer_add(tokens, bytes, n, j->error);
    mem_free(bytes);
}

/* An element that is a string: a path, or, behind a key that takes tokens alone, base64. */
static void take_string_image(struct json *j, int only_tokens, struct buffer *tokens,
                              struct image_list *out) {
    if (only_tokens) {
        take_base64(j, tokens);
        return;
    }
    char *path = json_string(j);
    if (path != NULL && path[0] == 0) json_fail(j, "the path of an image is empty");
    json_add(j, out, path, NULL);
}

/* An image, or an array of images and tokens. Single ids are gathered until a path, an inner array
   or the end comes, so [1, 2, ... 512] is two images of 256, and so is [[1 ... 256], [257 ...
   512]]. */
static void json_images(struct json *j, int only_tokens, struct image_list *out) {
    struct buffer tokens = {0};
    if (json_peek(j) == '"') {
        take_string_image(j, only_tokens, &tokens, out);
    } else {
        json_want(j, '[', "a list of images should stand here");
        int more = j->code == LVM_OK && !json_take(j, ']');
        for (; more && j->code == LVM_OK; more = j->code == LVM_OK && json_more(j, ']')) {
            int c = json_peek(j);
            if (c == '"') {
                add_tokens(j, &tokens, out);
                take_string_image(j, only_tokens, &tokens, out);
            } else if (json_take(j, '[')) {
                if (json_take(j, ']')) continue;
                do take_token(j, &tokens);
                while (j->code == LVM_OK && json_more(j, ']'));
                add_tokens(j, &tokens, out);
            } else {
                take_token(j, &tokens);
            }
        }
    }
    add_tokens(j, &tokens, out);
    mem_free(tokens.data);
}

/* Letters to put in, leave out, change or swap with their neighbour so that a becomes b: the
   distance of optimal string alignment, by its table of all their beginnings. */
static int word_distance(const char *a, const char *b) {
    enum { MOST = 24 };
    int d[MOST + 1][MOST + 1], n = (int)strlen(a), m = (int)strlen(b);
    if (n > MOST || m > MOST) return INT_MAX;
    for (int i = 0; i <= n; i++)
        for (int j = 0; j <= m; j++) {
            d[i][j] = i + j;
            if (i == 0 || j == 0) continue;
            int x = tolower((unsigned char)a[i - 1]), y = tolower((unsigned char)b[j - 1]);
            int change = d[i - 1][j - 1] + (x != y);
            int gap = (d[i - 1][j] < d[i][j - 1] ? d[i - 1][j] : d[i][j - 1]) + 1;
            d[i][j] = change < gap ? change : gap;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                d[i - 2][j - 2] + 1 < d[i][j])
                d[i][j] = d[i - 2][j - 2] + 1;
        }
    return d[n][m];
}

/* The key of that name, or -1. */
static int find_key(const char *name) {
    for (int i = 0; i < N_KEYS; i++)
        if (strcmp(name, key_table[i].name) == 0) return i;
    return -1;
}

/* The key that a name nearly is: at most two letters apart, and fewer than half of its own; -1:
   none. */
static int find_near_key(const char *name) {
    int near = -1, least = 3, n = (int)strlen(name);
    for (int i = 0; i < N_KEYS && n < KEY_ROOM; i++) {
        int d = word_distance(name, key_table[i].name);
        if (d < least && 2 * d < n) near = i, least = d;
    }
    return near;
}

/* The value of a key with a meaning. */
static void json_value(struct json *j, const struct sentence_key *key, struct sentence *s) {
    enum thing gives = key->gives;
    if (gives == GIVES_OUTPUT && json_peek(j) != '"') gives = GIVES_TARGET;
    if (s->by[gives] != NULL)
        json_fail(j, "\"%s\" and \"%s\" say the same thing twice; leave one out", s->by[gives],
                  key->name);
    s->by[gives] = key->name;
    if (gives == GIVES_OUTPUT) s->output = j->code == LVM_OK ? json_string(j) : NULL;
    if (gives == GIVES_ANSWER)
        s->answer = json_int(j, LIST_IMAGES, "\"answer\" is no number of a choice, from 0 on");
    if (gives == GIVES_INPUT) json_images(j, key->only_tokens, &s->input);
    if (gives == GIVES_TARGET) json_images(j, key->only_tokens, &s->target);
    if (gives == GIVES_CHOICES) json_images(j, key->only_tokens, &s->choices);
}

/* A key, its : and its value. */
static void json_member(struct json *j, void *arg) {
    struct sentence *s = arg;
    char *name = json_string(j);
    int key = name != NULL ? find_key(name) : -1;
    int near = name != NULL && key < 0 ? find_near_key(name) : -1;
    if (key >= 0 && (s->keys & 1u << key)) json_fail(j, "the key \"%s\" stands twice", name);
    if (near >= 0 && s->stray[near][0] == 0)
        snprintf(s->stray[near], sizeof s->stray[near], "%s", name);
    mem_free(name);
    json_want(j, ':', "a key lacks its :");
    if (key >= 0) s->keys |= 1u << key;
    if (key < 0) json_skip(j, JSON_DEPTH);
    else if (!json_word(j, "null")) json_value(j, &key_table[key], s);
}

/* A whole line, an object whose members `member` reads; form shows what it looks like. Nothing may
   stand behind it. */
static void json_line(struct json *j, const char *form,
                      void (*member)(struct json *j, void *arg), void *arg) {
    if (j->n > 0 && memchr(j->s, 0, j->n) != NULL)
        json_fail(j, "zero bytes in the line: a set is UTF-8 text, not UTF-16");
    if (!json_take(j, '{')) json_fail(j, "a line is an object: %s", form);
    int more = j->code == LVM_OK && !json_take(j, '}');
    while (more) {
        member(j, arg);
        more = j->code == LVM_OK && json_more(j, '}');
    }
    if (json_peek(j) != 0 || (j->code == LVM_OK && j->at < j->n))
        json_fail(j, "something stands behind the object");
}

/* Reads one line, in which every key may be missing; an answer must be one of the choices. s is
   freed by sentence_free, also after a failure. */
static int parse_sentence(struct json *j, struct sentence *s) {
    memset(s, 0, sizeof *s);
    s->answer = -1;
    json_line(j, "{\"input\": [...], ...}", json_member, s);
    if (j->code == LVM_OK && s->answer >= s->choices.n && s->answer >= 0)
        json_fail(j, "\"answer\" is none of the choices");
    return j->code;
}

/* ---- Lines to learn from ---- */

enum train_part { PART_TOKENS, PART_INPUT, PART_OUTPUT, PART_WEIGHTS, PART_IMAGE, N_PARTS };

static const struct train_key {
    const char *name;
    enum train_part gives;
} train_keys[] = {{"tokens", PART_TOKENS},        {"input_tokens", PART_INPUT},
                  {"input", PART_INPUT},          {"output_tokens", PART_OUTPUT},
                  {"output", PART_OUTPUT},        {"target_tokens", PART_OUTPUT},
                  {"target", PART_OUTPUT},        {"weights", PART_WEIGHTS},
                  {"image_tokens", PART_IMAGE}};
enum { N_TRAIN_KEYS = sizeof train_keys / sizeof *train_keys };

struct train_line {
    const char *by[N_PARTS];        /* the key that gave a part, or NULL */
    struct buffer ids[PART_OUTPUT + 1]; /* int32: tokens, input, output */
    struct buffer weights;          /* u8 */
    int image_tokens;               /* 0: unknown */
};

/* Also of one that was never filled but is zero. */
static void train_line_free(struct train_line *line) {
    for (int i = 0; i <= PART_OUTPUT; i++) mem_free(line->ids[i].data);
    mem_free(line->weights.data);
    memset(line, 0, sizeof *line);
}

/* An array of ids, or of arrays of them, one an image. */
static void json_id_array(struct json *j, int depth, struct buffer *ids) {
    json_want(j, '[', "tokens should stand here, an array of ids or base64");
    if (j->code != LVM_OK || json_take(j, ']')) return;
    do {
        int c = json_peek(j);
        if (c == '[' && depth > 0)
            json_id_array(j, depth - 1, ids);
        else if (c != '-' && !isdigit(c))
            json_fail(j, c == '"' ? "a picture's name stands among tokens; lvm encode makes some"
                                  : "an id should stand here");
        else
            take_token(j, ids);
    } while (j->code == LVM_OK && json_more(j, ']'));
}

/* Loss weights: an array of whole numbers, or base64 of bytes. */
static void json_weights(struct json *j, struct buffer *weights) {
    size_t n = 0;
    if (json_peek(j) == '"') {
        uint8_t *bytes = json_base64(j, &n);
        if (j->code == LVM_OK) j->code = buffer_add(weights, bytes, n, j->error);
        mem_free(bytes);
        return;
    }
    json_want(j, '[', "weights should stand here, an array of numbers or base64");
    if (j->code != LVM_OK || json_take(j, ']')) return;
    do {
        uint8_t weight = (uint8_t)json_int(j, 256, "a weight is no whole number from 0 to 255");
        if (j->code == LVM_OK) j->code = buffer_add(weights, &weight, 1, j->error);
    } while (j->code == LVM_OK && json_more(j, ']'));
}

/* The key of that name, or NULL; a name that nearly is one is a fault. */
static const struct train_key *find_train_key(struct json *j, const char *name) {
    int n = (int)strlen(name);
    for (int i = 0; i < N_TRAIN_KEYS; i++)
        if (strcmp(name, train_keys[i].name) == 0) return &train_keys[i];
    for (int i = 0; i < N_TRAIN_KEYS && n < KEY_ROOM; i++) {
        int d = word_distance(name, train_keys[i].name);
        if (d > 2 || 2 * d >= n) continue;
        json_fail(j, "the key \"%s\" has no meaning (did you mean \"%s\"?)", name,
                  train_keys[i].name);
    }
    return NULL;
}

static void json_train_member(struct json *j, void *arg) {
    struct train_line *line = arg;
    char *name = json_string(j);
    const struct train_key *key = name != NULL ? find_train_key(j, name) : NULL;
    mem_free(name);
    json_want(j, ':', "a key lacks its :");
    if (key == NULL) {
        json_skip(j, JSON_DEPTH);
        return;
    }
    if (json_word(j, "null")) return;
    if (line->by[key->gives] != NULL)
        json_fail(j, "\"%s\" and \"%s\" say the same thing twice; leave one out",
                  line->by[key->gives], key->name);
    line->by[key->gives] = key->name;
    if (key->gives == PART_WEIGHTS)
        json_weights(j, &line->weights);
    else if (key->gives == PART_IMAGE)
        line->image_tokens = json_int(j, MAX_IDS, "\"image_tokens\" is no number of tokens");
    else if (json_peek(j) == '"')
        take_base64(j, &line->ids[key->gives]);
    else
        json_id_array(j, 1, &line->ids[key->gives]);
}

/* Reads one line; afterwards ids[PART_TOKENS] holds all of its tokens, also of one in two parts,
   and weights, if there are any, are as many. line is freed by train_line_free, also after a
   failure. */
static int parse_train_line(struct json *j, struct train_line *line) {
    struct buffer *all = &line->ids[PART_TOKENS];
    memset(line, 0, sizeof *line);
    j->codes = MAX_IDS;
    json_line(j, "{\"tokens\": [...]}", json_train_member, line);
    const char *const *by = line->by;
    if (by[PART_TOKENS] != NULL && (by[PART_INPUT] != NULL || by[PART_OUTPUT] != NULL))
        json_fail(j, "\"tokens\" and \"%s\" say the same thing twice; leave one out",
                  by[by[PART_INPUT] != NULL ? PART_INPUT : PART_OUTPUT]);
    if (by[PART_TOKENS] == NULL && (by[PART_INPUT] == NULL || by[PART_OUTPUT] == NULL))
        json_fail(j, "a line holds \"tokens\", or \"input_tokens\" and \"output_tokens\"");
    for (int i = PART_INPUT; j->code == LVM_OK && i <= PART_OUTPUT; i++)
        j->code = buffer_add(all, line->ids[i].data, line->ids[i].n, j->error);
    if (by[PART_WEIGHTS] != NULL && line->weights.n != all->n / sizeof(int32_t))
        json_fail(j, "%zu weights for %zu tokens", line->weights.n, all->n / sizeof(int32_t));
    return j->code;
}

#endif

/* =================================================================================================
   Chapter 10.  Systems: files, mapping, folders, threads, Windows

   What chapter 1 declares and the command line needs, for POSIX and for Windows:

       map_file, read_file    path  -->  all bytes of a file, mapped or in memory
       outfile, write_file    bytes  -->  .lvm-PID-N.tmp beside the file, flushed to the disk, then
                              renamed: whoever looks sees the old file or the whole new one, also
                              when the machine stops in between. A symbolic link's target is
                              replaced, not the link; devices and pipes are written to
       pool_run               numbered tasks  -->  threads, each with a queue; an idle one steals
       os_...                 all that the two systems do differently; the rest of the file calls
                              only these
       show_text              what others wrote  -->  what a terminal may show */

#endif /* LVM_INTERNAL */

/* ---- Text that is shown ---- */

/* Bytes of the UTF-8 character (RFC 3629) at the beginning of s, 1 to 4, or 0 where there is none:
   no surrogates, nothing longer than it must be, nothing beyond U+10FFFF. */
static inline int utf8_bytes(const char *s) {
    uint8_t a = (uint8_t)s[0], b = a != 0 ? (uint8_t)s[1] : 0;
    int n = a < 0x80 ? 1 : a < 0xc2 ? 0 : a < 0xe0 ? 2 : a < 0xf0 ? 3 : a < 0xf5 ? 4 : 0;
    if ((a == 0xe0 && b < 0xa0) || (a == 0xed && b > 0x9f)) return 0;
    if ((a == 0xf0 && b < 0x90) || (a == 0xf4 && b > 0x8f)) return 0;
    for (int i = 1; i < n; i++)
        if (((uint8_t)s[i] & 0xc0) != 0x80) return 0;
    return n;
}

/* The character at the beginning of s as it is shown; control characters, those of 8 bits (U+0080
   to U+009F) too, and stray bytes become \n, \t, \r or \x1b. Returns its length, in *n that in
   s. */
static inline int show_character(const char *s, char shown[8], int *n) {
    static const char from[] = "\n\t\r", to[] = "ntr";
    uint8_t c = (uint8_t)s[0];
    *n = utf8_bytes(s);
    if (*n > 0 && c >= 32 && c != 127 && !(c == 0xc2 && (uint8_t)s[1] < 0xa0)) {
        memcpy(shown, s, (size_t)*n);
        return *n;
    }
    const char *simple = strchr(from, c);
    *n = 1;
    return simple != NULL && c != 0 ? snprintf(shown, 8, "\\%c", to[simple - from])
                                    : snprintf(shown, 8, "\\x%02x", c);
}

/* A third of the room is for the beginning. */
static inline void show_text(const char *text, char *out, size_t room) {
    char shown[8];
    size_t whole = 0, at = 0, used = 0, head = (room - 4) / 3, tail = room - 4 - head;
    int n = 0, cut = 0;
    for (const char *s = text; *s != 0; s += n) whole += (size_t)show_character(s, shown, &n);
    for (const char *s = text; *s != 0; s += n) {
        size_t bytes = (size_t)show_character(s, shown, &n);
        if (whole < room || at + bytes <= head || whole - at <= tail) {
            memcpy(out + used, shown, bytes);
            used += bytes;
        } else if (!cut) {
            memcpy(out + used, "...", 3);
            used += 3;
            cut = 1;
        }
        at += bytes;
    }
    out[used] = 0;
}

#ifndef LVM_INTERNAL

/* A hint: memory of some megabytes is read faster in huge pages, for which prefetches find their
   addresses translated. Linux gives them to memory that is not in use yet, and to what is read of
   a file from now on. */
static void os_huge_pages(void *p, size_t size) {
#ifdef MADV_HUGEPAGE
    const uintptr_t large = 2 << 20, at = (uintptr_t)p;
    uintptr_t first = (at + large - 1) / large * large, end = (at + size) / large * large;
    if (first < end) (void)madvise((char *)p + (first - at), end - first, MADV_HUGEPAGE);
#else
    (void)p, (void)size;
#endif
}

/* ---- The operating system ----

   A path is UTF-8 everywhere; Windows' calls take UTF-16, so a path is converted at the last
   moment. What fails returns -1 or NULL and leaves the reason in errno. */

enum os_kind { OS_NOTHING, OS_FILE, OS_FOLDER, OS_DEVICE };

/* What a path or a descriptor stands for. All names of one file share device and number. */
struct os_info {
    enum os_kind kind;
    int64_t size;
    uint64_t device, number;
};

#ifndef _WIN32

/* For reading; a pipe that nobody writes to is not waited for. */
static int os_open(const char *path) {
    return open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

static FILE *os_fopen(const char *path, const char *mode) { return fopen(path, mode); }
static int os_rename(const char *from, const char *to) { return rename(from, to); }
static int os_remove(const char *path) { return unlink(path); }
static int os_truncate(FILE *file, int64_t size) { return ftruncate(fileno(file), (off_t)size); }
static int os_may_write(const char *path) { return access(path, W_OK) == 0; }

/* A new file for writing; EEXIST where there is one of that name. */
static FILE *os_create(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    return fd < 0 ? NULL : fdopen(fd, "wb");
}

/* An open descriptor's file a second time, for writing. */
static FILE *os_duplicate(int fd) {
    int copy = dup(fd);
    FILE *file = copy < 0 ? NULL : fdopen(copy, "wb");
    if (copy >= 0 && file == NULL) close(copy);
    return file;
}

/* A new file gets owner, as far as that is allowed, and mode of the one that it replaces. */
static void os_copy_mode(FILE *file, const char *path) {
    struct stat st;
    if (stat(path, &st) != 0) return;
    int owner = fchown(fileno(file), st.st_uid, st.st_gid) == 0;
    (void)fchmod(fileno(file), st.st_mode & (owner ? 07777 : 0777));
}

static int os_is_separator(char c) { return c == '/'; }

/* How many characters of a path name its root: none if it is relative. */
static size_t os_root(const char *path) { return os_is_separator(path[0]); }

/* The file that a path leads to through symbolic links; it need not exist. *target is allocated. */
static int os_target(const char *path, char **target, lvm_error *error) {
    char link[4097];
    *target = copy_string(path, error);
    for (int i = 0; *target != NULL && i < 40; i++) {
        char *at = *target;
        ssize_t n = readlink(at, link, sizeof link - 1);
        if (n < 0) return LVM_OK; /* no link */
        link[n] = 0;
        const char *slash = link[0] == '/' ? NULL : strrchr(at, '/');
        size_t folder = slash != NULL ? (size_t)(slash - at) + 1 : 0;
        *target = mem_alloc(folder + (size_t)n + 1, 1, error);
        if (*target != NULL) {
            memcpy(*target, at, folder);
            memcpy(*target + folder, link, (size_t)n + 1);
        }
        mem_free(at);
    }
    if (*target == NULL) return LVM_MEMORY;
    mem_free(*target);
    *target = NULL;
    return fail(error, LVM_IO, "%s: cannot be written: %s", path, strerror(ELOOP));
}

static struct os_info os_describe(int failed, const struct stat *st) {
    if (failed) return (struct os_info){OS_NOTHING, 0, 0, 0};
    return (struct os_info){S_ISREG(st->st_mode)   ? OS_FILE
                            : S_ISDIR(st->st_mode) ? OS_FOLDER
                                                   : OS_DEVICE,
                            (int64_t)st->st_size, (uint64_t)st->st_dev, (uint64_t)st->st_ino};
}

static struct os_info os_stat(const char *path) {
    struct stat st;
    int failed = stat(path, &st);
    return os_describe(failed, &st);
}

static struct os_info os_fstat(int fd) {
    struct stat st;
    int failed = fstat(fd, &st);
    return os_describe(failed, &st);
}

/* Until the data is on the disk. */
static int os_sync(FILE *file) {
#ifdef F_FULLFSYNC /* macOS, whose fsync stops at the drive's cache; not every volume has it */
    if (fcntl(fileno(file), F_FULLFSYNC) == 0) return 0;
#endif
    return fsync(fileno(file));
}

/* The first size > 0 bytes of a file, to be read only. */
static void *os_map(int fd, size_t size) {
    void *p = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) return NULL;
    os_huge_pages(p, size);
    return p;
}

static void os_unmap(void *p, size_t size) { munmap(p, size); }

typedef sigset_t os_signals;

/* Signals, but those of a fault of the thread's own, wait until os_restore_signals; threads that
   start meanwhile never take them and leave them to the program's threads. */
static os_signals os_block_signals(void) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
    os_signals all, before;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    return before;
}

static void os_restore_signals(os_signals before) { pthread_sigmask(SIG_SETMASK, &before, NULL); }

#ifdef __linux__
/* n, or fewer processors where a control group's folder grants less time. Version 2 keeps quota and
   period in one file ("max" is none), version 1 in two (-1 is none). */
static int64_t cgroup_limit(const char *folder, int64_t n) {
    static const char *const names[3] = {"cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"};
    long long value[4] = {0, 0, 0, 0}; /* version 2: quota, period; version 1: quota, period */
    for (int i = 0; i < 3; i++) {
        char path[4400];
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        FILE *f = fopen(path, "r");
        if (f == NULL) continue;
        if (i == 0 && fscanf(f, "%lld %lld", &value[0], &value[1]) != 2) value[0] = 0;
        if (i > 0 && fscanf(f, "%lld", &value[i + 1]) != 1) value[i + 1] = 0;
        fclose(f);
    }
    for (int i = 0; i < 4; i += 2)
        if (value[i] > 0 && value[i + 1] > 0)
            n = min64(n, max64(1, (value[i] - 1) / value[i + 1] + 1));
    return n;
}

/* The same for every group of version 2 that this process is in and those above them: list is
   /proc/self/cgroup, whose line "0::PATH" names its own. A group that a container does not see is
   passed over; its own is then the root of mount. Of version 1, which is on its way out, only that
   root is looked at. */
static int64_t cgroup_least(const char *list, const char *mount,
                            int64_t (*limit)(const char *folder, int64_t n), int64_t n) {
    char line[4096], folder[4200];
    FILE *f = fopen(list, "r");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        char *path = line + 3;
        if (strncmp(line, "0::", 3) != 0) continue;
        path[strcspn(path, "\n")] = 0;
        for (char *end = path + strlen(path); end != NULL; end = strrchr(path, '/')) {
            *end = 0;
            snprintf(folder, sizeof folder, "%s%s", mount, path);
            n = limit(folder, n);
        }
    }
    if (f != NULL) fclose(f);
    return n;
}

static int64_t cgroup_processors(const char *list, const char *mount, int64_t n) {
    char folder[4200];
    snprintf(folder, sizeof folder, "%s/cpu", mount);
    return cgroup_limit(folder, cgroup_least(list, mount, cgroup_limit, n));
}

/* The number behind a word that stands first in a line of a file, or first of all (word ""); -1
   where there is none. */
static int64_t number_in_file(const char *folder, const char *name, const char *word) {
    char path[4400], line[256];
    long long value = -1;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    while (f != NULL && value < 0 && fgets(line, sizeof line, f) != NULL)
        if (strncmp(line, word, strlen(word)) != 0 ||
            sscanf(line + strlen(word), "%lld", &value) != 1)
            value = -1;
    if (f != NULL) fclose(f);
    return value;
}

/* Bytes that a group of version 2 may still take: what it holds of files can go. */
static int64_t cgroup_memory(const char *folder, int64_t n) {
    int64_t most = number_in_file(folder, "memory.max", ""),
            now = number_in_file(folder, "memory.current", ""),
            files = number_in_file(folder, "memory.stat", "inactive_file ");
    if (most < 0 || now < 0) return n;
    return min64(n, max64(0, most - now + max64(0, files)));
}
#endif

/* Bytes of memory that this process can take without swapping, or INT64_MAX where nothing tells. */
static int64_t os_memory_available(void) {
    int64_t n = INT64_MAX;
#ifdef __linux__
    int64_t kib = number_in_file("/proc", "meminfo", "MemAvailable:");
    if (kib >= 0) n = kib * 1024;
    n = cgroup_least("/proc/self/cgroup", "/sys/fs/cgroup", cgroup_memory, n);
#endif
    return n;
}

/* Processors that this process may use: on Linux by affinity and by its control groups' quota. */
static int64_t os_processors(void) {
    int64_t n = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = min64(n, CPU_COUNT(&set));
    n = cgroup_processors("/proc/self/cgroup", "/sys/fs/cgroup", n);
#endif
    return n;
}

#ifndef LVM_NO_MAIN

/* Called first by main. A standard stream that is closed gets something that fails, or the next
   file to be opened would take its place. */
static int os_begin(int *argc, char ***argv) {
    (void)argc, (void)argv;
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd > 0 ? O_RDONLY : O_WRONLY) < 0)
            return -1;
    return 0;
}

static int os_is_terminal(int fd) { return isatty(fd); }

/* Until read() has something to tell. */
static void os_wait_input(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    (void)poll(&p, 1, -1);
}

/* Characters of a terminal's line, or 0 where nothing tells. */
static int os_columns(int fd) {
    struct winsize size;
    return ioctl(fd, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

/* Bytes of memory that this process holds now, or 0. */
static int64_t os_resident(void) {
    long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r"); /* Linux */
    if (f != NULL && fscanf(f, "%*s %lld", &pages) != 1) pages = 0;
    if (f != NULL) fclose(f);
    return pages * sysconf(_SC_PAGESIZE);
}

struct os_folder {
    DIR *dir;
};

static int os_folder_open(struct os_folder *f, const char *path) {
    f->dir = opendir(path);
    return f->dir == NULL ? -1 : 0;
}

static const char *os_folder_next(struct os_folder *f) {
    struct dirent *entry = readdir(f->dir);
    return entry == NULL ? NULL : entry->d_name;
}

static void os_folder_close(struct os_folder *f) { closedir(f->dir); }
static int os_make_folder(const char *path) { return mkdir(path, 0777); }
#endif

#else /* Windows */

/* errno from Windows' own error; returns -1. */
static int os_fault(void) {
    switch (GetLastError()) {
    case ERROR_FILE_NOT_FOUND:
    case ERROR_PATH_NOT_FOUND:
    case ERROR_INVALID_NAME: errno = ENOENT; break;
    case ERROR_ACCESS_DENIED:
    case ERROR_SHARING_VIOLATION:
    case ERROR_USER_MAPPED_FILE: errno = EACCES; break;
    case ERROR_FILE_EXISTS:
    case ERROR_ALREADY_EXISTS: errno = EEXIST; break;
    case ERROR_DISK_FULL: errno = ENOSPC; break;
    case ERROR_NOT_ENOUGH_MEMORY: errno = ENOMEM; break;
    default: errno = EIO;
    }
    return -1;
}

/* UTF-16, to be freed. Windows takes only some 260 characters of a path unless it is absolute and
   opens with \\?\, which a long one therefore becomes. */
static wchar_t *os_wide(const char *path) {
    int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, NULL, 0);
    wchar_t *wide = LVM_CALLOC((size_t)n + 1, sizeof *wide);
    if (n == 0) errno = EILSEQ;
    if (n == 0 || wide == NULL) {
        LVM_FREE(wide);
        return NULL;
    }
    MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, n);
    if (n < 240 || wcsncmp(wide, L"\\\\", 2) == 0) return wide;
    DWORD room = GetFullPathNameW(wide, 0, NULL, NULL) + 4;
    wchar_t *full = LVM_CALLOC(room, sizeof *full);
    if (full != NULL) {
        wcscpy(full, L"\\\\?\\");
        GetFullPathNameW(wide, room - 4, full + 4, NULL);
    }
    LVM_FREE(wide);
    return full;
}

static int os_open(const char *path) {
    wchar_t *wide = os_wide(path);
    int fd = wide == NULL ? -1 : _wopen(wide, _O_RDONLY | _O_BINARY | _O_NOINHERIT);
    LVM_FREE(wide);
    return fd;
}

static FILE *os_fopen(const char *path, const char *mode) {
    wchar_t *wide = os_wide(path), *wide_mode = os_wide(mode);
    FILE *f = wide == NULL || wide_mode == NULL ? NULL : _wfopen(wide, wide_mode);
    LVM_FREE(wide);
    LVM_FREE(wide_mode);
    return f;
}

static int os_rename(const char *from, const char *to) {
    wchar_t *a = os_wide(from), *b = os_wide(to);
    int code = a == NULL || b == NULL ? -1 : 0;
    if (code == 0 && !MoveFileExW(a, b, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH))
        code = os_fault();
    LVM_FREE(a);
    LVM_FREE(b);
    return code;
}

static int os_remove(const char *path) {
    wchar_t *wide = os_wide(path);
    int code = wide == NULL ? -1 : _wremove(wide);
    LVM_FREE(wide);
    return code;
}

static int os_truncate(FILE *file, int64_t size) { return _chsize_s(_fileno(file), size); }

static int os_may_write(const char *path) {
    wchar_t *wide = os_wide(path);
    int may = wide != NULL && _waccess(wide, 2) == 0;
    LVM_FREE(wide);
    return may;
}

/* Shared for deletion, so that a file can be removed while it is open, as elsewhere. */
static FILE *os_create(const char *path) {
    wchar_t *wide = os_wide(path);
    if (wide == NULL) return NULL;
    HANDLE h = CreateFileW(wide, GENERIC_WRITE, FILE_SHARE_READ | FILE_SHARE_DELETE, NULL,
                           CREATE_NEW, FILE_ATTRIBUTE_NORMAL, NULL);
    LVM_FREE(wide);
    if (h == INVALID_HANDLE_VALUE) {
        os_fault();
        return NULL;
    }
    int fd = _open_osfhandle((intptr_t)h, _O_BINARY);
    return fd < 0 ? NULL : _fdopen(fd, "wb");
}

static FILE *os_duplicate(int fd) {
    int copy = _dup(fd);
    return copy < 0 ? NULL : _fdopen(copy, "wb");
}

static void os_copy_mode(FILE *file, const char *path) { (void)file, (void)path; }

static int os_target(const char *path, char **target, lvm_error *error) {
    *target = copy_string(path, error);
    return *target != NULL ? LVM_OK : LVM_MEMORY;
}

static int os_is_separator(char c) { return c == '/' || c == '\\'; }

/* "C:", "C:\", "\" and "\\server\share\". */
static size_t os_root(const char *path) {
    size_t n = isalpha((unsigned char)path[0]) && path[1] == ':' ? 2 : 0;
    if (os_is_separator(path[0]) && os_is_separator(path[1])) {
        n = 2 + strcspn(path + 2, "/\\");
        if (path[n] != 0) n += 1 + strcspn(path + n + 1, "/\\");
    }
    return n + (size_t)os_is_separator(path[n]);
}

static struct os_info os_describe(HANDLE h) {
    struct os_info info = {OS_NOTHING, 0, 0, 0};
    BY_HANDLE_FILE_INFORMATION i;
    if (GetFileType(h) != FILE_TYPE_DISK) {
        info.kind = OS_DEVICE;
    } else if (!GetFileInformationByHandle(h, &i)) {
        os_fault();
    } else {
        info.kind = i.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY ? OS_FOLDER : OS_FILE;
        info.size = (int64_t)i.nFileSizeHigh << 32 | i.nFileSizeLow;
        info.device = i.dwVolumeSerialNumber;
        info.number = (uint64_t)i.nFileIndexHigh << 32 | i.nFileIndexLow;
    }
    return info;
}

static struct os_info os_fstat(int fd) { return os_describe((HANDLE)_get_osfhandle(fd)); }

static struct os_info os_stat(const char *path) {
    struct os_info info = {OS_NOTHING, 0, 0, 0};
    wchar_t *wide = os_wide(path);
    if (wide == NULL) return info;
    HANDLE h = CreateFileW(wide, FILE_READ_ATTRIBUTES,
                           FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, NULL,
                           OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS, NULL);
    if (h == INVALID_HANDLE_VALUE) {
        os_fault();
    } else {
        info = os_describe(h);
        CloseHandle(h);
    }
    LVM_FREE(wide);
    return info;
}

static int os_sync(FILE *file) { return _commit(_fileno(file)); }

static void *os_map(int fd, size_t size) {
    HANDLE h = CreateFileMappingW((HANDLE)_get_osfhandle(fd), NULL, PAGE_READONLY, 0, 0, NULL);
    void *p = h == NULL ? NULL : MapViewOfFile(h, FILE_MAP_READ, 0, 0, size);
    if (p == NULL) os_fault();
    if (h != NULL) CloseHandle(h);
    return p;
}

static void os_unmap(void *p, size_t size) {
    (void)size;
    UnmapViewOfFile(p);
}

/* Signals come in a thread of their own. */
typedef int os_signals;
static os_signals os_block_signals(void) { return 0; }
static void os_restore_signals(os_signals before) { (void)before; }

static int64_t os_processors(void) {
    DWORD_PTR ours = 0, all = 0;
    int64_t n = 0;
    GetProcessAffinityMask(GetCurrentProcess(), &ours, &all);
    for (; ours != 0; ours &= ours - 1) n++;
    return n > 0 ? n : (int64_t)GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
}

static int64_t os_memory_available(void) {
    MEMORYSTATUSEX status = {.dwLength = sizeof status};
    return GlobalMemoryStatusEx(&status) ? (int64_t)status.ullAvailPhys : INT64_MAX;
}

#ifndef LVM_NO_MAIN

static UINT os_old_code_page;

static void os_end(void) { SetConsoleOutputCP(os_old_code_page); }

/* head[0..n) and tail as UTF-8, allocated. */
static char *os_utf8(const wchar_t *head, size_t n, const wchar_t *tail) {
    size_t room = 3 * (n + wcslen(tail)) + 1; /* UTF-16's units take at most 3 bytes each */
    char *text = calloc(room, 1);
    if (text == NULL) return NULL;
    int used = n == 0 ? 0
                      : WideCharToMultiByte(CP_UTF8, 0, head, (int)n, text, (int)room, NULL, NULL);
    WideCharToMultiByte(CP_UTF8, 0, tail, -1, text + used, (int)room - used, NULL, NULL);
    return text;
}

static int os_add_word(int *argc, char ***argv, char *word) {
    char **more = word == NULL ? NULL : realloc(*argv, ((size_t)*argc + 2) * sizeof *more);
    if (more == NULL) return -1;
    *argv = more;
    more[(*argc)++] = word;
    more[*argc] = NULL;
    return 0;
}

/* A word, or the files that it stands for: Windows' shells leave * and ? to programs. */
static int os_add_words(int *argc, char ***argv, const wchar_t *word) {
    WIN32_FIND_DATAW entry;
    size_t folder = wcslen(word);
    int code = 0, n = *argc;
    HANDLE find = INVALID_HANDLE_VALUE;
    while (folder > 0 && wcschr(L"/\\:", word[folder - 1]) == NULL) folder--;
    if (wcspbrk(word + folder, L"*?") != NULL) find = FindFirstFileW(word, &entry);
    if (find != INVALID_HANDLE_VALUE) {
        do {
            if (entry.cFileName[0] == L'.') continue;
            code = os_add_word(argc, argv, os_utf8(word, folder, entry.cFileName));
        } while (code == 0 && FindNextFileW(find, &entry));
        FindClose(find);
    }
    return code == 0 && *argc == n ? os_add_word(argc, argv, os_utf8(word, 0, word)) : code;
}

/* Arguments become UTF-8, the console shows it, standard input and output are bytes. */
static int os_begin(int *argc, char ***argv) {
    int n = 0, code = 0;
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), &n);
    if (wide == NULL) return os_fault();
    *argc = 0;
    *argv = NULL;
    for (int i = 0; code == 0 && i < n; i++) code = os_add_words(argc, argv, wide[i]);
    LocalFree(wide);
    _setmode(0, _O_BINARY);
    _setmode(1, _O_BINARY);
    os_old_code_page = GetConsoleOutputCP();
    SetConsoleOutputCP(CP_UTF8);
    atexit(os_end);
    return code;
}

static void os_wait_input(int fd) { (void)fd; } /* read() waits by itself */

/* NUL is a character device too, but no console; a console is told to obey the bar's escapes. */
static int os_is_terminal(int fd) {
    HANDLE h = (HANDLE)_get_osfhandle(fd);
    DWORD mode = 0;
    return GetConsoleMode(h, &mode) && SetConsoleMode(h, mode | 4 /* virtual terminal */);
}

static int os_columns(int fd) {
    CONSOLE_SCREEN_BUFFER_INFO info;
    HANDLE h = (HANDLE)_get_osfhandle(fd);
    return GetConsoleScreenBufferInfo(h, &info) ? info.srWindow.Right - info.srWindow.Left + 1 : 0;
}

static int64_t os_resident(void) {
    PROCESS_MEMORY_COUNTERS counters;
    int known = K32GetProcessMemoryInfo(GetCurrentProcess(), &counters, sizeof counters);
    return known ? (int64_t)counters.WorkingSetSize : 0;
}

struct os_folder {
    HANDLE find;
    int first;
    WIN32_FIND_DATAW entry;
    char name[3 * MAX_PATH + 1];
};

static int os_folder_open(struct os_folder *f, const char *path) {
    size_t n = strlen(path) + 3;
    char *pattern = LVM_CALLOC(n, 1);
    wchar_t *wide = NULL;
    if (pattern != NULL) {
        snprintf(pattern, n, "%s/*", path);
        wide = os_wide(pattern);
    }
    f->first = 1;
    f->find = wide == NULL ? INVALID_HANDLE_VALUE : FindFirstFileW(wide, &f->entry);
    int code = f->find != INVALID_HANDLE_VALUE ? 0 : wide == NULL ? -1 : os_fault();
    LVM_FREE(pattern);
    LVM_FREE(wide);
    return code;
}

static const char *os_folder_next(struct os_folder *f) {
    if (!f->first && !FindNextFileW(f->find, &f->entry)) return NULL;
    f->first = 0;
    WideCharToMultiByte(CP_UTF8, 0, f->entry.cFileName, -1, f->name, sizeof f->name, NULL, NULL);
    return f->name;
}

static void os_folder_close(struct os_folder *f) { FindClose(f->find); }

static int os_make_folder(const char *path) {
    wchar_t *wide = os_wide(path);
    int code = wide == NULL ? -1 : _wmkdir(wide);
    LVM_FREE(wide);
    return code;
}
#endif
#endif /* Windows */

/* The part of a path behind its last separator. */
static const char *os_file_name(const char *path) {
    const char *name = path += os_root(path);
    for (; *path != 0; path++)
        if (os_is_separator(*path)) name = path + 1;
    return name;
}

/* A device has no number on Windows. */
static int is_one_file(struct os_info a, struct os_info b) {
    return a.number != 0 && a.device == b.device && a.number == b.number;
}

/* 1 when both paths name the same existing file. */
static int same_file(const char *a, const char *b) { return is_one_file(os_stat(a), os_stat(b)); }

static int processors(void) { return (int)min64(max64(os_processors(), 1), 1024); }

/* ---- Threads ----

   A pool of n threads, the caller being one, runs tasks 0 .. count-1. Each thread begins with a
   queue of its own, a range of neighbouring tasks, so that the weights it reads lie behind each
   other, and when that is empty steals from the others' queues. A run ends when its tasks are done:
   a worker that comes late, because another program has its processor, finds the queues empty and
   is not waited for. Whoever waits spins for some microseconds, for the transformer starts
   thousands of short runs a second, then yields the processor, perhaps to the very thread it waits
   for, and sleeps in the end.

   In a forked child only the caller is left, who steals all tasks. Mutex and conditions, which
   workers may have held or waited at when the process was forked, are not touched there. */

struct queue {
    atomic_int left; /* tasks not yet taken; 0 or less: none */
    char line[60];   /* each in a cache line of its own */
};

struct pool {
    int n;                /* threads, the caller included */
    struct queue *queues; /* [n] */
    pthread_t *threads;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    atomic_int round;           /* counts runs; workers start when it changes */
    atomic_int unfinished;      /* tasks not yet done */
    atomic_int sleeping;        /* workers that wait for a run asleep */
    atomic_int caller_sleeping; /* the caller waits for their end asleep */
    atomic_int quit;
    task_fn *fn;
    void *arg;
    int count;
    long process;               /* that the threads live in; a forked child has none of them */
};

enum { SPINS = 1500, YIELDS = 50 }; /* turns of waiting: a few ten microseconds each */

struct worker {
    struct pool *pool;
    int thread;
};

static void spin_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The first task of queue i; queue n begins behind the last. */
static int first_task(const struct pool *p, int i) { return (int)((int64_t)p->count * i / p->n); }

/* Who gets a number above 0 has taken a task, and the run cannot end before it is done: only then
   are fn, arg and count sure to be this run's. */
static void pool_run_queue(struct pool *p, int i, int thread) {
    atomic_int *tasks = &p->queues[i].left;
    int left;
    while (atomic_load(tasks) > 0 && (left = atomic_fetch_sub(tasks, 1)) > 0) {
        p->fn(p->arg, first_task(p, i + 1) - left, thread);
        if (atomic_fetch_sub(&p->unfinished, 1) != 1 || !atomic_load(&p->caller_sleeping)) continue;
        pthread_mutex_lock(&p->mutex);
        pthread_cond_signal(&p->done);
        pthread_mutex_unlock(&p->mutex);
    }
}

static void pool_run_tasks(struct pool *p, int thread) {
    for (int i = 0; i < p->n; i++) pool_run_queue(p, (thread + i) % p->n, thread);
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
    mem_free(arg);
    int seen = 0;
    for (;;) {
        pool_wait_for_round(w.pool, seen);
        seen = atomic_load(&w.pool->round);
        if (atomic_load(&w.pool->quit)) return NULL;
        pool_run_tasks(w.pool, w.thread);
    }
}

static int pool_is_forked(const struct pool *p) { return (long)getpid() != p->process; }

static void pool_start_round(struct pool *p) {
    atomic_fetch_add(&p->round, 1);
    if (atomic_load(&p->sleeping) == 0 || pool_is_forked(p)) return;
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

static void pool_wait_for_tasks(struct pool *p) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (atomic_load(&p->unfinished) == 0) return;
        wait_turn(i);
    }
    pthread_mutex_lock(&p->mutex);
    atomic_exchange(&p->caller_sleeping, 1); /* QEMU's AArch64 lets a store pass the load below */
    while (atomic_load(&p->unfinished) != 0) pthread_cond_wait(&p->done, &p->mutex);
    atomic_store(&p->caller_sleeping, 0);
    pthread_mutex_unlock(&p->mutex);
}

static void pool_run(struct pool *p, int count, task_fn *fn, void *arg) {
    if (p->n == 1 || count <= 1) {
        for (int task = 0; task < count; task++) fn(arg, task, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->count = count;
    atomic_store(&p->unfinished, count);
    for (int i = 0; i < p->n; i++)
        atomic_store(&p->queues[i].left, first_task(p, i + 1) - first_task(p, i));
    pool_start_round(p);
    pool_run_tasks(p, 0);
    pool_wait_for_tasks(p);
}

static void pool_free(struct pool *p) {
    if (p == NULL) return;
    if (!pool_is_forked(p)) {
        atomic_store(&p->quit, 1);
        pool_start_round(p);
        for (int i = 1; i < p->n; i++) pthread_join(p->threads[i], NULL);
        pthread_cond_destroy(&p->wake);
        pthread_cond_destroy(&p->done);
        pthread_mutex_destroy(&p->mutex);
    }
    mem_free(p->threads);
    mem_free(p->queues);
    mem_free(p);
}

static int thread_start(pthread_t *thread, void *(*fn)(void *), void *arg) {
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 1 << 20); /* musl gives 128 KiB, macOS 512 KiB */
    int bad = pthread_create(thread, &attr, fn, arg);
    pthread_attr_destroy(&attr);
    return bad;
}

static int pool_start_worker(struct pool *p, int thread) {
    struct worker *w = mem_alloc(1, sizeof *w, NULL);
    if (w == NULL) return -1;
    *w = (struct worker){p, thread};
    int bad = thread_start(&p->threads[thread], pool_worker, w);
    if (bad) mem_free(w);
    return bad;
}

static struct pool *pool_new(int n, lvm_error *error) {
    struct pool *p = mem_alloc(1, sizeof *p, error);
    if (p == NULL) return NULL;
    p->threads = mem_alloc((size_t)n, sizeof *p->threads, error);
    p->queues = mem_alloc((size_t)n, sizeof *p->queues, error);
    if (p->threads == NULL || p->queues == NULL) {
        mem_free(p->threads);
        mem_free(p->queues);
        mem_free(p);
        return NULL;
    }
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    p->process = (long)getpid();
    os_signals before = os_block_signals();
    for (p->n = 1; p->n < n && pool_start_worker(p, p->n) == 0;) p->n++;
    os_restore_signals(before);
    if (p->n >= n) return p;
    fail(error, LVM_MEMORY, "cannot start thread %d of %d", p->n + 1, n);
    pool_free(p);
    return NULL;
}

static int pool_threads(const struct pool *p) { return p->n; }

/* ---- Files ---- */

/* Opens a regular file for reading and tells its size. Returns the descriptor or -1. */
static int open_file(const char *path, int64_t *size, lvm_error *error) {
    int fd = os_open(path);
    if (fd < 0) {
        fail(error, LVM_IO, "%s: %s", *path != 0 ? path : "an empty name", strerror(errno));
        return -1;
    }
    struct os_info info = os_fstat(fd);
    if (info.kind != OS_FILE) {
        fail(error, LVM_IO, "%s: not a regular file", path);
        close(fd);
        return -1;
    }
    *size = info.size;
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

static int map_file(const char *path, void **data, size_t *size, lvm_error *error) {
    int64_t bytes = 0;
    int fd = open_file(path, &bytes, error);
    if (fd < 0) return LVM_IO;
    *data = bytes > 0 ? os_map(fd, (size_t)bytes) : NULL;
    *size = *data != NULL ? (size_t)bytes : 0;
    int reason = errno;
    close(fd);
    if (bytes == 0 || *data != NULL) return LVM_OK;
    return fail(error, LVM_IO, "%s: cannot be mapped: %s (try --no-mmap)", path, strerror(reason));
}

static void unmap_file(void *data, size_t size) { os_unmap(data, size); }

/* While a file has only its temporary name the command line knows of it, to remove it when a signal
   ends the program (chapter 15); a library leaves signals to its program. */
#ifndef LVM_NO_MAIN
static FILE *create_temporary(const char *path);
static void forget_temporary(const char *path);
#else
static FILE *create_temporary(const char *path) { return os_create(path); }
static void forget_temporary(const char *path) { (void)path; }
#endif

static int write_failed(const char *path, lvm_error *error) {
    return fail(error, LVM_IO, "%s: cannot be written: %s", path, strerror(errno));
}

static void outfile_free(struct outfile *out) {
    mem_free(out->path);
    mem_free(out->target);
    mem_free(out->temp);
    memset(out, 0, sizeof *out);
}

/* The descriptor, standard output or error, that a path is another name of ("/dev/stdout", say), or
   -1. */
static int standard_stream(const char *path) {
    for (int fd = 1; fd <= 2; fd++)
        if (is_one_file(os_stat(path), os_fstat(fd))) return fd;
    return -1;
}

/* A name that no other file, process or thread has, and that fits where the file's own does. */
static int create_beside(struct outfile *out, lvm_error *error) {
    int folder = (int)(os_file_name(out->target) - out->target);
    size_t room = (size_t)folder + 48;
    out->temp = mem_alloc(room, 1, error);
    if (out->temp == NULL) return LVM_MEMORY;
    for (int i = 0; i < INT_MAX; i++) {
        snprintf(out->temp, room, "%.*s.lvm-%ld-%d.tmp", folder, out->target, (long)getpid(), i);
        out->file = create_temporary(out->temp);
        if (out->file != NULL || errno != EEXIST) break;
    }
    if (out->file == NULL) return write_failed(out->path, error);
    os_copy_mode(out->file, out->target);
    return LVM_OK;
}

static int open_target(struct outfile *out, lvm_error *error) {
    int code = os_target(out->path, &out->target, error);
    if (code != LVM_OK) return code;
    enum os_kind kind = os_stat(out->target).kind;
    if (kind == OS_NOTHING ? errno == ENAMETOOLONG : !os_may_write(out->target))
        return write_failed(out->path, error);
    return create_beside(out, error);
}

/* Checks that path can be written and holds its place until outfile_close. */
static int outfile_open(struct outfile *out, const char *path, lvm_error *error) {
    memset(out, 0, sizeof *out);
    enum os_kind kind = os_stat(path).kind;
    int stream = standard_stream(path), code = LVM_OK;
    if (*path == 0) return fail(error, LVM_INVALID, "the name of an output is empty");
    if (kind == OS_FOLDER || *os_file_name(path) == 0)
        return fail(error, LVM_IO, "%s: cannot be written: is a folder", path);
    out->path = copy_string(path, error);
    if (out->path == NULL) return LVM_MEMORY;
    if (kind == OS_DEVICE || stream >= 0) {
        out->file = stream >= 0 ? os_duplicate(stream) : os_fopen(path, "wb");
        if (out->file == NULL) code = write_failed(path, error);
    } else {
        code = open_target(out, error);
    }
    if (code != LVM_OK) outfile_free(out);
    return code;
}

static int outfile_write(struct outfile *out, const void *data, size_t size, lvm_error *error) {
    if (size == 0 || fwrite(data, 1, size, out->file) == size) return LVM_OK;
    return write_failed(out->path, error);
}

/* Everything that was written is on the disk; 0, or -1 and errno. */
static int outfile_flush(struct outfile *out) {
    if (fflush(out->file) != 0) return -1;
    if (out->temp == NULL) return 0;
    if (os_truncate(out->file, ftello(out->file)) != 0) return -1;
    return os_sync(out->file) != 0 && errno != EINVAL && errno != EROFS ? -1 : 0;
}

/* Finishes the file: with code LVM_OK it gets its name, else it is removed. Returns what
   happened. */
static int outfile_close(struct outfile *out, int code, lvm_error *error) {
    if (code == LVM_OK && outfile_flush(out) != 0) code = write_failed(out->path, error);
    if (fclose(out->file) != 0 && code == LVM_OK) code = write_failed(out->path, error);
    if (out->temp != NULL && code == LVM_OK && os_rename(out->temp, out->target) != 0)
        code = write_failed(out->path, error);
    if (out->temp != NULL && code != LVM_OK) os_remove(out->temp);
    if (out->temp != NULL) forget_temporary(out->temp);
    outfile_free(out);
    return code;
}

static int write_file(const char *path, const void *data, size_t size, lvm_error *error) {
    struct outfile out;
    int code = outfile_open(&out, path, error);
    if (code != LVM_OK) return code;
    return outfile_close(&out, outfile_write(&out, data, size, error), error);
}

/* A fuzzer cannot guess checksums: built with -DLVM_FUZZING every checksum passes, so that its
   mutations reach the code behind them. Nothing else depends on LVM_FUZZING. */
static int checksum_wrong(uint64_t stored, uint64_t computed) {
#ifdef LVM_FUZZING
    (void)stored;
    (void)computed;
    return 0;
#else
    return stored != computed;
#endif
}

/* =================================================================================================
   Chapter 11.  Images

   Images come in as PNG, JPEG or PNM files, go through Pillow's bicubic resizing on their way to
   the tokenizer, and leave as PNG files. Everything works on memory: a reader gets all bytes of a
   file and touches them through one checked cursor, so that a damaged or hostile file is an error
   message and never a crash.

   Formats followed:
     PNG                  Portable Network Graphics, third edition (W3C)
     JPEG                 ITU-T T.81, decoded to the bytes of libjpeg-turbo's default decoder
     zlib, deflate        RFC 1950 (the wrapper: two bytes, data, Adler-32) and RFC 1951
     PNM                  netpbm's pbm(5), pgm(5) and ppm(5), plain and raw
     EXIF                 one tag of it, the orientation: Exif 2.32 (CIPA DC-008), TIFF 6.0
     pixel values         Pillow's Image.open(file).convert('RGB'), byte for byte, as its releases
                          9.4 to 13.0 compute it alike
     resizing             Pillow's Image.resize(size, BICUBIC) on 8-bit RGB, byte for byte, as its
                          releases up to 12.1 compute it: the width first, then the height. (12.2
                          turns that round for images more than 100 times as tall as wide, 13.0
                          wherever the height shrinks much more than the width.)

   Read first, the surprises:
     - Alpha is dropped, not blended: an RGBA pixel keeps its R, G, B, whatever A says. This is
       Pillow's convert('RGB'), hence what the published checkpoints saw. tRNS is ignored likewise.
     - 16-bit colour keeps its high byte, but 16-bit grey is cut at 255, so that nearly all of it
       becomes white: Pillow holds such grey as integers, and its convert('RGB') clips integers.
       Scale such images (depth maps, say) to 8 bits before they are shown to a model.
     - A photo's EXIF orientation is left alone, as by Pillow, unless lvm_image_upright is called.
     - gAMA, iCCP, sRGB and cHRM are ignored, as by Pillow: the bytes are the values.
     - Deflate sends Huffman codes from their top bit and everything else from the lowest bit.
       Codes are therefore kept reversed, and all bits come from one little-endian stream.
     - A filtered row depends on the row above after that one was unfiltered. */

/* Larger is a mistake or an attack: 768 MiB of RGB, and 1 GiB for what a decoder makes of a file on
   the way there (a PNG's rows, a JPEG's coefficients or planes), where a pixel may take many. */
enum {
    IMAGE_MAX_PIXELS = 1 << 28,
    IMAGE_MAX_BYTES = 1 << 30,
    RGB = 3                      /* bytes of a pixel in lvm_image */
};

/* A black image; the caller checked the sides. */
static int image_new(lvm_image *image, int width, int height, lvm_error *error) {
    image->rgb = mem_alloc((size_t)width * (size_t)height, RGB, error);
    if (!image->rgb) return LVM_MEMORY;
    image->width = width;
    image->height = height;
    image->orientation = 0;
    return LVM_OK;
}

static int image_sides_ok(int64_t width, int64_t height) {
    return width > 0 && height > 0 && width <= IMAGE_MAX_PIXELS && height <= IMAGE_MAX_PIXELS &&
           width * height <= IMAGE_MAX_PIXELS;
}

static int image_has_pixels(const lvm_image *image) {
    return image->rgb && image_sides_ok(image->width, image->height);
}

/* Every reader comes here with its header's sides before it allocates memory. */
static int image_check_sides(const char *name, const char *kind, int64_t width, int64_t height,
                             lvm_error *error) {
    if (image_sides_ok(width, height)) return LVM_OK;
    return fail(error, LVM_FORMAT, "%s: a %s image of %lld x %lld pixels: must be 1 to 2^28 "
                "pixels", name, kind, (long long)width, (long long)height);
}

/* And here before it allocates what it decodes to. */
static int image_check_bytes(const char *name, const char *kind, int width, int height,
                             size_t bytes, lvm_error *error) {
    if (bytes <= IMAGE_MAX_BYTES) return LVM_OK;
    return fail(error, LVM_FORMAT, "%s: a %s image of %d x %d pixels takes %zu MiB to decode: must "
                "be at most 1024", name, kind, width, height, bytes >> 20);
}

void lvm_image_free(lvm_image *image) {
    if (!image) return;
    mem_free(image->rgb);
    *image = (lvm_image){0, 0, NULL, 0};
}

/* ---- Bytes ----

   All readers take their bytes through chapter 1's cursor. PNG and JPEG are big-endian. */

static uint32_t cursor_big(struct cursor *c, int bytes) {
    uint32_t v = 0;
    const uint8_t *p = cursor_take(c, (uint64_t)bytes);
    for (int i = 0; p != NULL && i < bytes; i++) v = v << 8 | p[i];
    return v;
}

/* The next byte, or -1 at the end, which is no failure. */
static inline int cursor_byte(struct cursor *c) {
    return c->at < c->size ? c->data[c->at++] : -1;
}

/* ---- Checksums ----

   CRC-32 guards every PNG chunk (PNG, 5.5), Adler-32 the decompressed data (RFC 1950). CRC takes
   four bytes a step: table[k][b] is the effect of byte b with k zero bytes behind it. The tables
   take microseconds to make, so each file makes its own and nothing is shared between threads. */

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

/* ---- What inflate and deflate share ----

   Deflate data (RFC 1951, 3.2) are literals (symbols 0..255), end-of-block (256) and matches: "copy
   `length` bytes from `distance` back". Lengths and distances are written as small floating-point
   numbers: a length code or distance code (exponent and leading mantissa bits, Huffman coded) and
   extra bits (the rest of the mantissa). With v = length - 3 and 2 mantissa bits in the code, or
   v = distance - 1 and 1 bit:

       v < 2^(bits+1):  code = v, no extra bits
       otherwise:       code = (n << bits) + (v >> n), then the n low bits of v

   so no table of bases is needed. One exception: length 258 has a code of its own, 28, while the
   formula's last value (v = 255 in code 27) stays unused. */

enum {
    DEFLATE_END = 256, DEFLATE_MATCH = 257,
    DEFLATE_LITERALS = 286, DEFLATE_DISTANCES = 30,   /* symbols with a meaning */
    DEFLATE_MIN_LENGTH = 3, DEFLATE_MAX_LENGTH = 258, DEFLATE_WINDOW = 32768,
    DEFLATE_LONGEST_CODE = 28,
    LENGTH_BITS = 2, DISTANCE_BITS = 1,               /* mantissa bits inside the code */
    HUFFMAN_MAX_BITS = 15, HUFFMAN_MAX_SYMBOLS = 288
};

/* The order in which the header of a dynamic block lists the lengths of the code length code. */
static const uint8_t deflate_header_order[19] =
    {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

static int code_extra_bits(int code, int bits) {
    return code < 2 << bits ? 0 : (code >> bits) - 1;
}

static int code_base(int code, int bits) {
    int n = code_extra_bits(code, bits);
    return (code - (n << bits)) << n;
}

static int deflate_code(unsigned value, int bits) {
    int n = 0;
    while (value >> (n + bits + 1)) n++;
    return (n << bits) + (int)(value >> n);
}

static int length_code(int length) {
    if (length == DEFLATE_MAX_LENGTH) return DEFLATE_LONGEST_CODE;
    return deflate_code((unsigned)(length - DEFLATE_MIN_LENGTH), LENGTH_BITS);
}

static int length_extra_bits(int code) {
    return code == DEFLATE_LONGEST_CODE ? 0 : code_extra_bits(code, LENGTH_BITS);
}

static int length_base(int code) {
    if (code == DEFLATE_LONGEST_CODE) return DEFLATE_MAX_LENGTH;
    return DEFLATE_MIN_LENGTH + code_base(code, LENGTH_BITS);
}

/* Code lengths are themselves run-length and Huffman coded: symbol 16 repeats the last one 3..6
   times, 17 zero 3..10 times, 18 zero 11..138 times. */
static int run_base(int symbol) { return symbol == 18 ? 11 : 3; }
static int run_extra_bits(int symbol) {
    return symbol == 16 ? 2 : symbol == 17 ? 3 : symbol == 18 ? 7 : 0;
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
    memset(distance, 5, 32);   /* the last two complete the code and are refused when met */
}

/* ---- Inflate ----

   A zlib stream (RFC 1950) of deflate blocks. The output's size is known beforehand (from the
   image's header), so the caller gives a buffer of exactly that size. Less data are a fault; once
   it is full nothing is read any more, be it data too many, a broken end or a wrong Adler-32 (PNG
   has a checksum of its own around the data). Each function returns NULL or the fault in words; the
   caller adds the file's name.

   Bits are held in a 64-bit word that is topped up once per literal or match: 56 bits are enough
   for the longest match (15 + 5 + 15 + 13). Past the end of input the word fills with zeros while
   `count` tells how many bits are real; taking more than that is "ends early". */

struct bit_reader {
    struct cursor bytes;
    uint64_t hold;   /* the next bits, lowest first (JPEG: highest first); zeros behind them */
    int count;       /* how many of them there are; negative: more were taken */
};

static void bits_fill(struct bit_reader *b) {
    for (int byte; b->count <= 56 && (byte = cursor_byte(&b->bytes)) >= 0; b->count += 8)
        b->hold |= (uint64_t)byte << b->count;
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

/* Drops the rest of a byte that was begun; whole bytes read ahead go back to the cursor. */
static struct cursor *bits_to_bytes(struct bit_reader *b) {
    b->bytes.at -= (size_t)b->count / 8;
    b->hold = 0;
    b->count = 0;
    return &b->bytes;
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
static const char *const inflate_damaged = "the compressed data are damaged";

static const char *inflate_stored(struct inflate *z) {
    struct cursor *c = bits_to_bytes(&z->bits);
    size_t size = (size_t)cursor_number(c, 2), check = (size_t)cursor_number(c, 2);
    if (c->failed) return inflate_short;
    if (size != (check ^ 0xFFFF)) return inflate_damaged;
    size_t room = (size_t)(z->end - z->at), left = c->size - c->at, n = size < left ? size : left;
    if (n > room) n = room;
    memcpy(z->at, cursor_take(c, n), n);
    z->at += n;
    return n < size && n < room ? inflate_short : NULL;
}

static const char *inflate_lengths(struct inflate *z, uint8_t *length, int n) {
    struct bit_reader *b = &z->bits;
    for (int i = 0; i < n;) {
        bits_fill(b);
        int symbol = huffman_next(&z->lengths, b), repeat = 1;
        uint8_t value = (uint8_t)symbol;
        if (symbol < 0 || (symbol == 16 && i == 0))
            return b->count <= 0 ? inflate_short : inflate_damaged;
        if (symbol >= 16) {
            value = symbol == 16 ? length[i - 1] : 0;
            repeat = run_base(symbol) + (int)bits_take(b, run_extra_bits(symbol));
        }
        if (b->count < 0) return inflate_short;
        if (repeat > n - i) return inflate_damaged;
        while (repeat--) length[i++] = value;
    }
    return NULL;
}

static const char *inflate_dynamic(struct inflate *z) {
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
    uint8_t literal[HUFFMAN_MAX_SYMBOLS], distance[32];
    deflate_fixed_lengths(literal, distance);
    huffman_build(&z->literals, literal, HUFFMAN_MAX_SYMBOLS);
    huffman_build(&z->distances, distance, 32);
}

/* A match whose literal/length symbol was just read. */
static const char *inflate_match(struct inflate *z, int code) {
    struct bit_reader *b = &z->bits;
    if (code > DEFLATE_LONGEST_CODE) return inflate_damaged;
    size_t length = (size_t)length_base(code) + bits_take(b, length_extra_bits(code));
    code = huffman_next(&z->distances, b);
    if (code < 0 || code >= DEFLATE_DISTANCES)
        return b->count <= 0 ? inflate_short : inflate_damaged;
    size_t distance = 1 + (size_t)code_base(code, DISTANCE_BITS);
    distance += bits_take(b, code_extra_bits(code, DISTANCE_BITS));
    if (b->count < 0) return inflate_short;
    if (distance > (size_t)(z->at - z->out)) return inflate_damaged;
    if (length > (size_t)(z->end - z->at)) length = (size_t)(z->end - z->at);
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
    while (z->at != z->end) {
        bits_fill(b);
        int symbol = huffman_next(&z->literals, b);
        if (b->count < 0) return inflate_short;
        if (symbol < 0) return b->count < HUFFMAN_MAX_BITS ? inflate_short : inflate_damaged;
        if (symbol == DEFLATE_END) return NULL;
        if (symbol < DEFLATE_END) {
            *z->at++ = (uint8_t)symbol;
            continue;
        }
        const char *fault = inflate_match(z, symbol - DEFLATE_MATCH);
        if (fault) return fault;
    }
    return NULL;
}

static const char *inflate_block(struct inflate *z, unsigned type) {
    if (type == 0) return inflate_stored(z);
    if (type == 3) return inflate_damaged;
    const char *fault = NULL;
    if (type == 1) inflate_fixed(z);
    else fault = inflate_dynamic(z);
    return fault ? fault : inflate_codes(z);
}

/* Decompresses a zlib stream until out is full. */
static const char *inflate_zlib(struct inflate *z, const uint8_t *data, size_t size,
                                uint8_t *out, size_t out_size) {
    struct cursor *c = &z->bits.bytes;
    z->bits = (struct bit_reader){{data, size, 0, 0}, 0, 0};
    uint32_t header = cursor_big(c, 2);
    if (c->failed) return inflate_short;
    if ((header >> 8 & 15) != 8 || header >> 12 > 7 || header % 31 || header & 32)
        return "the compressed data have no valid zlib header";
    z->out = z->at = out;
    z->end = out + out_size;
    for (unsigned last = 0; !last && z->at != z->end;) {
        bits_fill(&z->bits);
        last = bits_take(&z->bits, 1);
        unsigned type = bits_take(&z->bits, 2);
        if (z->bits.count < 0) return inflate_short;
        const char *fault = inflate_block(z, type);
        if (fault) return fault;
    }
    return z->at == z->end ? NULL : "the compressed data hold less than the image";
}

/* ---- EXIF orientation ----

   A camera held sideways writes the pixels as its sensor lay and how to make them upright as one
   number, Exif's tag Orientation. It stands in a TIFF file inside a JPEG's APP1 segment or a PNG's
   eXIf chunk:

       TIFF:   "II" or "MM" (its byte order) | 42 | offset of a directory (IFD)
       there:  number of entries (2 bytes), then each: tag 2 | type 2 | count 4 | value 4

   Readers find 1 to 8, or 0 where nothing or nonsense stands; bad offsets are no error, for the
   pixels do not depend on them. */

enum { EXIF_ORIENTATION = 0x0112, EXIF_SHORT = 3, EXIF_LONG = 4, EXIF_ENTRY_SIZE = 12 };

static uint32_t exif_number(struct cursor *c, int bytes, int big_endian) {
    return big_endian ? cursor_big(c, bytes) : (uint32_t)cursor_number(c, bytes);
}

/* data: a TIFF file, with or without the "Exif\0\0" that JPEG puts in front. */
static int exif_orientation(const uint8_t *data, size_t size) {
    size_t prefix = size >= 6 && memcmp(data, "Exif\0\0", 6) == 0 ? 6 : 0;
    struct cursor head = {data + prefix, size - prefix, 0, 0}, directory = head;
    const uint8_t *magic = cursor_take(&head, 4);
    if (!magic || (memcmp(magic, "II*\0", 4) != 0 && memcmp(magic, "MM\0*", 4) != 0)) return 0;
    int big = magic[0] == 'M';
    cursor_take(&directory, exif_number(&head, 4, big));
    for (uint32_t n = exif_number(&directory, 2, big); n > 0; n--) {
        struct cursor entry = {cursor_take(&directory, EXIF_ENTRY_SIZE), EXIF_ENTRY_SIZE, 0, 0};
        if (directory.failed) return 0;
        uint32_t tag = exif_number(&entry, 2, big), type = exif_number(&entry, 2, big);
        if (exif_number(&entry, 4, big) != 1 || tag != EXIF_ORIENTATION) continue;
        if (type != EXIF_SHORT && type != EXIF_LONG) continue;
        uint32_t value = exif_number(&entry, type == EXIF_SHORT ? 2 : 4, big);
        return value >= 1 && value <= 8 ? (int)value : 0;
    }
    return 0;
}

/* How each orientation finds the input pixel of an output pixel: by exchanging x and y, then
   counting x from the right, y from the bottom. */
static const struct exif_transform {
    int transpose, flip_x, flip_y;
} exif_transforms[9] = {{0, 0, 0}, {0, 0, 0}, {0, 1, 0}, {0, 1, 1}, {0, 0, 1},
                        {1, 0, 0}, {1, 0, 1}, {1, 1, 1}, {1, 1, 0}};

int lvm_image_upright(lvm_image *image, lvm_error *error) {
    clear_error(error);
    lvm_image out = {0, 0, NULL, 0};
    if (image == NULL) return null_argument(error, "lvm_image_upright", "image");
    if (!image_has_pixels(image))
        return fail(error, LVM_INVALID, "turning upright: the image has no pixels");
    if (image->orientation < 0 || image->orientation > 8)
        return fail(error, LVM_INVALID, "turning upright: orientation %d: EXIF has 1 to 8",
                    image->orientation);
    const struct exif_transform *t = &exif_transforms[image->orientation];
    int w = image->width, h = image->height;
    if (image->orientation > 1) {
        int code = image_new(&out, t->transpose ? h : w, t->transpose ? w : h, error);
        if (code) return code;
        uint8_t *to = out.rgb;
        for (int y = 0; y < out.height; y++)
            for (int x = 0; x < out.width; x++, to += RGB) {
                int from_x = t->transpose ? y : x, from_y = t->transpose ? x : y;
                if (t->flip_x) from_x = w - 1 - from_x;
                if (t->flip_y) from_y = h - 1 - from_y;
                memcpy(to, image->rgb + ((size_t)from_y * (size_t)w + (size_t)from_x) * RGB, RGB);
            }
        lvm_image_free(image);
        *image = out;
    }
    image->orientation = 1;
    return LVM_OK;
}

/* ---- PNG in ----

   PNG, sections 5 (chunks), 7 to 9 (rows, filters) and 11 (what the chunks hold).

       file:   8 bytes of signature, then chunks
       chunk:  length (4 bytes, big-endian) | type (4 letters) | data | CRC-32 of type and data

   IHDR comes first and tells the shape; PLTE holds a palette; all IDAT chunks together hold one
   zlib stream of rows, each a filter type and its pixels; IEND ends the image. A lower-case first
   letter marks an ancillary chunk, which may be ignored; an unknown critical one, upper-case, may
   not.

   All pixels there means an image, as with a JPEG. From the first IDAT on a fault (the file is cut
   off, an IDAT's CRC is wrong, a chunk stands where it may not) ends only the walk over the chunks,
   and is the error where the data up to it do not fill all rows. Other chunks behind the first IDAT
   are taken whatever their CRC says; bytes behind IEND are ignored. An index beyond the palette is
   black, as Pillow has it.

   A row is packed: pixels of 1, 2 or 4 bits fill bytes from the top bit, and each row starts a new
   byte. Samples of 16 bits are big-endian.

   An interlaced image (Adam7) comes as seven smaller ones, each complete with its own rows and
   filters; a pass without pixels has no bytes. Which pass brings which pixel of each 8 x 8 square:

       1 6 4 6 2 6 4 6
       7 7 7 7 7 7 7 7
       5 6 5 6 5 6 5 6
       7 7 7 7 7 7 7 7
       3 6 4 6 3 6 4 6
       7 7 7 7 7 7 7 7
       5 6 5 6 5 6 5 6
       7 7 7 7 7 7 7 7

   Memory is allocated only when the file explains it: deflate makes 258 bytes of 2 bits at best, a
   ratio of 1032, so a small file that claims a huge image is refused first. */

enum {
    PNG_GREY = 0, PNG_RGB = 2, PNG_PALETTE = 3, PNG_GREY_ALPHA = 4, PNG_RGB_ALPHA = 6,
    PNG_NONE = 0, PNG_SUB = 1, PNG_UP = 2, PNG_AVERAGE = 3, PNG_PAETH = 4,   /* filter types */
    PNG_HEADER_SIZE = 13, PNG_SIGNATURE_SIZE = 8, PNG_CHUNK_FRAME = 12,
    DEFLATE_MAX_RATIO = 1032
};

static const uint8_t png_signature[PNG_SIGNATURE_SIZE] = {137, 'P', 'N', 'G', 13, 10, 26, 10};

/* By colour type: samples a pixel, and in bit d whether it may have d bits a sample. */
static const struct png_colour_type {
    int channels, depths;
} png_colour_types[PNG_RGB_ALPHA + 1] = {
    [PNG_GREY] = {1, 0x10116}, [PNG_RGB] = {3, 0x10100}, [PNG_PALETTE] = {1, 0x116},
    [PNG_GREY_ALPHA] = {2, 0x10100}, [PNG_RGB_ALPHA] = {4, 0x10100}};

struct png_chunk {
    char type[5];
    const uint8_t *data;
    uint32_t size;
};

struct png_reader {
    const char *name;              /* of the file, for messages */
    lvm_error *error;
    struct cursor file;
    struct crc32 crc;
    int width, height, colour_type, channels, depth;
    int first_pass, last_pass;     /* of png_passes: 0 alone, or 1 to 7 */
    uint8_t palette[256 * RGB];    /* black where the file has no colour */
    int palette_size, orientation;
    uint8_t *idat;                 /* the data of all IDAT chunks [idat_size] */
    size_t idat_size;
    int idat_ended;
    int tail;                      /* LVM_OK or what ended the walk behind the first IDAT; its
                                      words stand in error */
};

static int png_damaged(const struct png_reader *png, const char *fault) {
    return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: %s", png->name, fault);
}

static int png_idat(struct png_reader *png, const struct png_chunk *chunk) {
    if (png->idat_ended) return png_damaged(png, "other chunks between its IDAT chunks");
    if (!png->idat) {   /* all that the file still holds is the most that can come */
        png->idat = mem_alloc(png->file.size - png->file.at + chunk->size, 1, png->error);
        if (!png->idat) return LVM_MEMORY;
    }
    memcpy(png->idat + png->idat_size, chunk->data, chunk->size);
    png->idat_size += chunk->size;
    return LVM_OK;
}

/* Four letters of ASCII. */
static int png_is_name(const uint8_t *type) {
    for (int i = 0; i < 4; i++)
        if ((type[i] | 32) < 'a' || (type[i] | 32) > 'z') return 0;
    return 1;
}

/* The next chunk. Of an IDAT that is cut off, what there is is kept. */
static int png_next_chunk(struct png_reader *png, struct png_chunk *chunk) {
    struct cursor *c = &png->file;
    chunk->size = cursor_big(c, 4);
    const uint8_t *type = cursor_take(c, 4);
    if (!type)
        return fail(png->error, LVM_FORMAT, "%s: the PNG file is cut off before its end (IEND)",
                    png->name);
    if (!png_is_name(type)) {
        c->at -= 8;   /* may be the next file */
        return png_damaged(png, "a chunk has no name");
    }
    snprintf(chunk->type, sizeof chunk->type, "%.4s", (const char *)type);
    int is_idat = strcmp(chunk->type, "IDAT") == 0;
    size_t left = c->size - c->at;
    chunk->data = c->data + c->at;
    cursor_take(c, chunk->size);
    uint32_t crc = cursor_big(c, 4);
    if (c->failed && is_idat) {
        if (chunk->size > left) chunk->size = (uint32_t)left;
        int code = png_idat(png, chunk);
        if (code) return code;
    }
    if (c->failed)
        return fail(png->error, LVM_FORMAT, "%s: the PNG file is cut off inside its %s chunk",
                    png->name, chunk->type);
    if ((!png->idat || is_idat) &&
        checksum_wrong(crc, crc32_of(&png->crc, type, (size_t)chunk->size + 4)))
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: wrong checksum in its %s chunk", png->name, chunk->type);
    return LVM_OK;
}

static int png_header(struct png_reader *png, const struct png_chunk *chunk) {
    struct cursor c = {chunk->data, chunk->size, 0, 0};
    if (strcmp(chunk->type, "IHDR") != 0 || chunk->size != PNG_HEADER_SIZE)
        return png_damaged(png, "no header (IHDR) in front");
    uint32_t width = cursor_big(&c, 4), height = cursor_big(&c, 4);
    int depth = cursor_byte(&c), colour = cursor_byte(&c), compression = cursor_byte(&c);
    int filter = cursor_byte(&c), interlace = cursor_byte(&c);
    int code = image_check_sides(png->name, "PNG", width, height, png->error);
    if (code) return code;
    if (colour > PNG_RGB_ALPHA || depth > 16 || !(png_colour_types[colour].depths >> depth & 1))
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: colour type %d with %d bits does not exist", png->name,
                    colour, depth);
    if (compression || filter || interlace > 1)
        return fail(png->error, LVM_FORMAT,
                    "%s: damaged PNG file: unknown method (compression %d, filter %d, "
                    "interlace %d)", png->name, compression, filter, interlace);
    png->width = (int)width;
    png->height = (int)height;
    png->depth = depth;
    png->colour_type = colour;
    png->channels = png_colour_types[colour].channels;
    png->first_pass = interlace;
    png->last_pass = 7 * interlace;
    return LVM_OK;
}

static int png_palette(struct png_reader *png, const struct png_chunk *chunk) {
    if (png->colour_type != PNG_PALETTE) return LVM_OK;   /* only a suggestion there */
    if (png->palette_size) return png_damaged(png, "two palettes (PLTE)");
    if (png->idat_size) return png_damaged(png, "its palette comes after the pixels");
    if (chunk->size == 0 || chunk->size % RGB || chunk->size > 256 * RGB)
        return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: a palette of %lu bytes",
                    png->name, (unsigned long)chunk->size);
    memcpy(png->palette, chunk->data, chunk->size);
    png->palette_size = (int)(chunk->size / RGB);
    return LVM_OK;
}

/* What a chunk behind IHDR, IEND excepted, has for the pixels. */
static int png_chunk(struct png_reader *png, const struct png_chunk *chunk) {
    if (strcmp(chunk->type, "IDAT") == 0) return png_idat(png, chunk);
    if (png->idat) png->idat_ended = 1;
    if (strcmp(chunk->type, "PLTE") == 0) return png_palette(png, chunk);
    if (strcmp(chunk->type, "eXIf") == 0)
        png->orientation = exif_orientation(chunk->data, chunk->size);
    if (chunk->type[0] >= 'a') return LVM_OK;
    return fail(png->error, LVM_FORMAT, "%s: a PNG file with %s chunk %s where none may be",
                png->name, strcmp(chunk->type, "IHDR") ? "an unknown" : "a second", chunk->type);
}

/* Walks over the chunks and collects what the pixels need. */
static int png_chunks(struct png_reader *png) {
    struct png_chunk chunk;
    int code = png_next_chunk(png, &chunk);
    if (!code) code = png_header(png, &chunk);
    if (code) return code;
    while (!code) {
        code = png_next_chunk(png, &chunk);
        if (code || strcmp(chunk.type, "IEND") == 0) break;
        code = png_chunk(png, &chunk);
    }
    png->tail = code;
    if (!png->idat_size) return code ? code : png_damaged(png, "no pixels (IDAT)");
    if (png->colour_type != PNG_PALETTE || png->palette_size) return LVM_OK;
    return code ? code : png_damaged(png, "no palette (PLTE)");
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
    if (filter == PNG_SUB) {
        for (size_t i = pixel; i < n; i++) row[i] = (uint8_t)(row[i] + row[i - pixel]);
    } else if (filter == PNG_UP) {
        for (size_t i = 0; i < n; i++) row[i] = (uint8_t)(row[i] + above[i]);
    } else if (filter == PNG_AVERAGE) {
        for (size_t i = 0; i < pixel; i++) row[i] = (uint8_t)(row[i] + above[i] / 2);
        for (size_t i = pixel; i < n; i++)
            row[i] = (uint8_t)(row[i] + (row[i - pixel] + above[i]) / 2);
    } else if (filter == PNG_PAETH) {
        for (size_t i = 0; i < pixel; i++) row[i] = (uint8_t)(row[i] + above[i]);
        for (size_t i = pixel; i < n; i++)
            row[i] = (uint8_t)(row[i] + png_paeth(row[i - pixel], above[i], above[i - pixel]));
    }
    return filter <= PNG_PAETH;
}

/* Where the pixels of a pass lie: every dx-th from column x, in every dy-th row from row y. First
   the whole image, then Adam7's seven passes. */
static const struct png_pass {
    int x, y, dx, dy;
} png_passes[8] = {
    {0, 0, 1, 1},
    {0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4}, {0, 2, 2, 4}, {1, 0, 2, 2}, {0, 1, 1, 2}
};

/* Of n columns or rows, those that a pass holds. */
static int png_pass_count(int n, int from, int step) {
    return n > from ? (n - from - 1) / step + 1 : 0;
}

/* Bytes of a row of n pixels, without its filter type. */
static size_t png_row_bytes(const struct png_reader *png, int n) {
    return ((size_t)n * (size_t)png->channels * (size_t)png->depth + 7) / 8;
}

/* Bytes that the compressed data must hold. */
static size_t png_raw_size(const struct png_reader *png) {
    size_t sum = 0;
    for (int i = png->first_pass; i <= png->last_pass; i++) {
        const struct png_pass *pass = &png_passes[i];
        int width = png_pass_count(png->width, pass->x, pass->dx);
        int height = png_pass_count(png->height, pass->y, pass->dy);
        if (width > 0) sum += (size_t)height * (1 + png_row_bytes(png, width));
    }
    return sum;
}

/* A row's n samples as a byte each: the row itself, or out. Palette indices are not scaled. */
static const uint8_t *png_samples(const struct png_reader *png, const uint8_t *row, size_t n,
                                  uint8_t *out) {
    unsigned depth = (unsigned)png->depth, most = (1u << depth) - 1;
    if (depth == 8) return row;
    if (depth == 16 && png->colour_type == PNG_GREY)
        for (size_t i = 0; i < n; i++) out[i] = row[2 * i] ? 255 : row[2 * i + 1];
    else if (depth == 16)
        for (size_t i = 0; i < n; i++) out[i] = row[2 * i];
    else
        for (size_t i = 0; i < n; i++) {
            size_t bit = i * depth;
            unsigned v = (unsigned)row[bit / 8] >> (8 - depth - bit % 8) & most;
            out[i] = (uint8_t)(png->colour_type == PNG_GREY ? v * (255 / most) : v);
        }
    return out;
}

/* The samples of n pixels to RGB, one every stride bytes. */
static void png_row_to_rgb(const struct png_reader *png, const uint8_t *samples, size_t n,
                           uint8_t *rgb, size_t stride) {
    size_t step = (size_t)png->channels;
    switch (png->colour_type) {
    case PNG_RGB: case PNG_RGB_ALPHA:
        for (size_t i = 0; i < n; i++) memcpy(rgb + stride * i, samples + step * i, RGB);
        return;
    case PNG_PALETTE:
        for (size_t i = 0; i < n; i++)
            memcpy(rgb + stride * i, png->palette + RGB * samples[i], RGB);
        return;
    default:
        for (size_t i = 0; i < n; i++) memset(rgb + stride * i, samples[step * i], RGB);
    }
}

/* One pass into the image. *raw moves behind its rows; zero is the row above the first; samples
   has room for those of a row. */
static int png_pass_pixels(struct png_reader *png, const struct png_pass *pass, uint8_t **raw,
                           const uint8_t *zero, uint8_t *samples, lvm_image *image) {
    int width = png_pass_count(png->width, pass->x, pass->dx);
    size_t n = png_row_bytes(png, width), bits = (size_t)png->channels * (size_t)png->depth;
    size_t stride = RGB * (size_t)pass->dx;
    const uint8_t *above = zero;
    for (int y = pass->y; y < png->height && width > 0; y += pass->dy) {
        uint8_t *row = *raw + 1;
        uint8_t *rgb = image->rgb + ((size_t)y * (size_t)png->width + (size_t)pass->x) * RGB;
        if (!png_unfilter(row[-1], row, above, n, (bits + 7) / 8))
            return fail(png->error, LVM_FORMAT, "%s: damaged PNG file: row %d has filter %d",
                        png->name, y, row[-1]);
        const uint8_t *s = png_samples(png, row, (size_t)width * (size_t)png->channels, samples);
        png_row_to_rgb(png, s, (size_t)width, rgb, stride);
        *raw += n + 1;
        above = row;
    }
    return LVM_OK;
}

/* raw: the rows of all passes, [pass][row][1 + row's bytes], each behind its filter type. */
static int png_pixels(struct png_reader *png, uint8_t *raw, lvm_image *image) {
    uint8_t *zero = mem_alloc(png_row_bytes(png, png->width), 1, png->error);
    uint8_t *samples = mem_alloc((size_t)png->width, (size_t)png->channels, png->error);
    int code = zero && samples ? image_new(image, png->width, png->height, png->error) : LVM_MEMORY;
    for (int i = png->first_pass; i <= png->last_pass && !code; i++)
        code = png_pass_pixels(png, &png_passes[i], &raw, zero, samples, image);
    mem_free(samples);
    mem_free(zero);
    if (code) lvm_image_free(image);
    else image->orientation = png->orientation;
    return code;
}

static int png_decompress(struct png_reader *png, lvm_image *image) {
    size_t raw_size = png_raw_size(png);
    int code = image_check_bytes(png->name, "PNG", png->width, png->height, raw_size, png->error);
    if (code) return code;
    if (raw_size / DEFLATE_MAX_RATIO > png->idat_size)
        return png->tail ? png->tail : fail(png->error, LVM_FORMAT, "%s: damaged PNG file: %zu "
                    "bytes of data cannot hold %d x %d pixels", png->name, png->idat_size,
                    png->width, png->height);
    uint8_t *raw = mem_alloc(raw_size, 1, png->error);
    struct inflate *z = mem_alloc(1, sizeof *z, png->error);
    if (!raw || !z) code = LVM_MEMORY;
    if (!code) {
        const char *fault = inflate_zlib(z, png->idat, png->idat_size, raw, raw_size);
        if (fault) code = fault == inflate_short && png->tail ? png->tail : png_damaged(png, fault);
    }
    if (!code) code = png_pixels(png, raw, image);
    mem_free(z);
    mem_free(raw);
    return code;
}

static int png_load(const uint8_t *data, size_t size, const char *name, size_t *used,
                    lvm_image *image, lvm_error *error) {
    struct png_reader png = {.name = name, .error = error,   /* the caller saw the signature */
                             .file = {data, size, PNG_SIGNATURE_SIZE, 0}};
    crc32_init(&png.crc);
    int code = png_chunks(&png);
    if (!code) code = png_decompress(&png, image);
    if (!code) clear_error(error);   /* of what ended the walk and did not matter */
    *used = png.file.failed ? size : png.file.at;
    mem_free(png.idat);
    return code;
}

/* ---- JPEG in ----

   ITU-T T.81 (ISO/IEC 10918-1) with JFIF's and Adobe's ways to name the colour space. A file is a
   row of segments (annex B). Each begins with a marker, a byte FF and one not 00 or FF:

       FF D8                                     SOI, the file begins
       FF marker | length, 2 bytes | data        in any order, but before they are needed:
           FF DB  DQT   quantisation tables          FF C4  DHT   Huffman tables
           FF DD  DRI   the restart interval, MCUs   FF Ex  APPx  JFIF, Adobe, Exif, ...
           FF C0..C2  SOF   sides, precision, components; C2: the scans are progressive
           FF DA  SOS   a scan: which components, which coefficients; behind it, without a length,
                        entropy-coded segments, in which a byte FF is written FF 00; markers
                        FF D0 .. FF D7 (RSTn) part them, one every restart interval
       FF D9                                     EOI

   What an encoder does, and a decoder undoes from the last step to the first:

     1. Colour. R, G, B become luma Y and chroma Cb and Cr.
     2. Subsampling. The eye sees chroma coarsely: of the H x V samples that the finest component
        has in some place, another keeps h x v. 2x2,1x1,1x1 is 4:2:0; 2x1,1x1,1x1 is 4:2:2.
     3. DCT. Each component's plane is cut into blocks of 8 x 8 samples, each made 64 coefficients
        by the discrete cosine transform. The smallest piece with whole blocks of all components is
        the MCU, minimum coded unit, here one of 4:2:0, 16 x 16 pixels:      Y0 Y1  Cb  Cr
                                                                             Y2 Y3
     4. Quantisation. Each coefficient is divided by its table's entry and rounded: the loss.
     5. Zigzag. Coefficient 0 (DC) is the block's mean; the others (AC) follow, low frequencies
        first, so that zeros gather at the end:

             0  1  5  6 14 15 27 28
             2  4  7 13 16 26 29 42
             3  8 12 17 25 30 41 43
             9 11 18 24 31 40 44 53
            10 19 23 32 39 45 52 54
            20 22 33 38 46 51 55 60
            21 34 37 47 50 56 59 61
            35 36 48 49 57 58 62 63

     6. Entropy coding. DC goes as the difference to the last block's DC of the same component: a
        Huffman code for its number of bits, then the bits. AC goes as symbols (zeros to skip << 4 |
        number of bits), each with its bits behind it; 00 is EOB, the end of the block, F0 skips
        sixteen zeros. A value of n bits with a leading 0 is negative: v - 2^n + 1.

   A progressive file (annex G) sends the same coefficients in several scans. Spectral selection: a
   scan holds the band Ss..Se of the zigzag, of one component except for DC. Successive
   approximation: of their bits it holds those from Al up; a later scan with Ah = Al + 1 refines
   them by one bit. There n0, n < 15, is EOBn, which ends the band for a whole run of blocks, and
   refining puts a correction bit for each coefficient that is not zero any more between its codes.

   The pixels are those of libjpeg-turbo as Pillow calls it, byte for byte: its accurate integer
   IDCT, its fancy upsampling, its integer colour conversion, and, where a progressive file ends
   before it has sent all bits, its block smoothing (the last as its releases from 3.0.1 on do it,
   all else as since 2.1). Stricter than libjpeg, which warns and paints grey: data that end early,
   codes that mean nothing and missing restart markers are errors. As with libjpeg, bytes between
   segments that are no marker are skipped. What follows the last bit that the pixels can need does
   not matter: a progressive file must have its EOI only where some bits were not sent.

   The orientation is what the first APP1 that begins with "Exif\0\0" holds, be it nonsense. An APP1
   counts only where segments alone lead to it: not behind a scan, TEM, RSTn or stray bytes.

   Memory is allocated only when the file explains it: a block takes a bit at least. Time is bounded
   too, although a few bytes can make a scan of nothing over all blocks: no bit of a coefficient is
   sent twice, and all scans together have at most JPEG_MAX_BLOCKS blocks, which is 32 scans of a
   grey image of 2^28 pixels, and of a smaller one as many more. */

enum {
    JPEG_SOF0 = 0xC0, JPEG_SOF1 = 0xC1, JPEG_SOF2 = 0xC2, JPEG_DHT = 0xC4, JPEG_RESERVED = 0xC8,
    JPEG_DAC = 0xCC, JPEG_SOF15 = 0xCF, JPEG_RST0 = 0xD0, JPEG_RST7 = 0xD7, JPEG_SOI = 0xD8,
    JPEG_EOI = 0xD9, JPEG_SOS = 0xDA, JPEG_DQT = 0xDB, JPEG_DRI = 0xDD, JPEG_DHP = 0xDE,
    JPEG_APP0 = 0xE0, JPEG_APP1 = 0xE1, JPEG_APP14 = 0xEE, JPEG_TEM = 0x01,   /* markers */
    JPEG_SIDE = 8, JPEG_BLOCK = 64,           /* of a block, in samples and in coefficients */
    JPEG_MAX_COMPONENTS = 4, JPEG_MCU_BLOCKS = 10, JPEG_MAX_BLOCKS = 1 << 27,
    JPEG_CODE_BITS = 16, JPEG_FAST_BITS = 9,  /* the longest Huffman code; those in the table */
    JPEG_MAX_AL = 13                          /* the highest bit that a scan may leave to others */
};

/* Where the k-th coefficient of the zigzag lies in a block, row by row. */
static const uint8_t jpeg_zigzag[JPEG_BLOCK] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

struct jpeg_huffman {
    int defined, standard;                /* standard: not from the file, see jpeg_standard */
    uint16_t fast[1 << JPEG_FAST_BITS];   /* symbol << 8 | length by the next bits, 0: longer */
    uint32_t limit[JPEG_CODE_BITS + 1];   /* the first 16 bits above all codes of a length */
    int offset[JPEG_CODE_BITS + 1];       /* code of a length + offset = index in symbol */
    uint8_t symbol[256];                  /* in the order of their codes */
};

struct jpeg_component {
    int id, h, v, table;              /* sampling factors and DQT table, from the frame header */
    int upsample_x, upsample_y;       /* H / h, V / v: pixels that one sample covers */
    int width, height;                /* samples that the image needs */
    int blocks_x, blocks_y;           /* blocks that hold them: what a scan of its own holds */
    int padded_x, padded_y;           /* blocks of whole MCUs: what an interleaved scan holds */
    int dc, ac;                       /* Huffman tables of this scan */
    int dc_pred;                      /* the last block's DC */
    int scanned;
    uint16_t quant[JPEG_BLOCK];       /* as it was when the first scan began */
    int8_t coef_bits[JPEG_BLOCK];     /* progressive: Al of the last scan, -1 none; in zigzag */
    int16_t *coefs;                   /* progressive: [padded_y][padded_x][JPEG_BLOCK] */
    uint8_t *plane;                   /* [padded_y * 8][padded_x * 8] samples */
};

struct jpeg_reader;
typedef const char *jpeg_decode_fn(struct jpeg_reader *j, struct jpeg_component *c, int16_t *block);

struct jpeg_reader {
    const char *name;                 /* of the file, for messages */
    lvm_error *error;
    struct bit_reader in;             /* the file; its bits are those of the current scan */
    uint16_t quant[4][JPEG_BLOCK];
    int quant_defined[4];
    struct jpeg_huffman huffman[2][4];          /* [DC, AC][table] */
    int progressive, width, height, n;          /* n components; 0: no frame header yet */
    int max_h, max_v, mcus_x, mcus_y;
    struct jpeg_component component[JPEG_MAX_COMPONENTS];
    int jfif, adobe;                            /* adobe: its transform number, -1 none */
    int orientation, exif_over;                 /* exif_over: no further APP1 counts */
    int restart_interval, scans;
    int64_t scanned_blocks;                     /* of all scans so far */
    int scan_n, ss, se, ah, al, eob_run;        /* the current scan: T.81's Ns, Ss, Se, Ah, Al */
    struct jpeg_component *scan[JPEG_MAX_COMPONENTS];
    jpeg_decode_fn *decode_block;
};

static int jpeg_damaged(const struct jpeg_reader *j, const char *fault) {
    return fail(j->error, LVM_FORMAT, "%s: damaged JPEG file: %s", j->name, fault);
}

static int jpeg_truncated(const struct jpeg_reader *j) {
    return fail(j->error, LVM_FORMAT, "%s: the JPEG file is cut off before its end", j->name);
}

/* The next marker, 0 at the end of the file. Any number of bytes FF may pad it; whatever else
   stands in front of it is skipped. */
static int jpeg_next_marker(struct jpeg_reader *j) {
    for (int last = 0, byte; (byte = cursor_byte(&j->in.bytes)) >= 0; last = byte) {
        if (last == 0xFF && byte != 0xFF && byte != 0) return byte;
        if (byte != 0xFF) j->exif_over = 1;
    }
    return 0;
}

/* Tops the bits up. At a marker the entropy-coded segment ends: the cursor stays in front of it. */
static void jpeg_fill(struct bit_reader *in) {
    struct cursor *c = &in->bytes;
    for (int byte; in->count <= 56 && (byte = cursor_byte(c)) >= 0; in->count += 8) {
        int next = 0;
        while (byte == 0xFF && (next = cursor_byte(c)) == 0xFF) continue;
        if (next != 0) {   /* a marker, or the end of the file */
            c->at -= next < 0 ? 1 : 2;
            return;
        }
        in->hold |= (uint64_t)byte << (56 - in->count);
    }
}

/* The next n <= 16 bits; jpeg_symbol or jpeg_bit topped up before. */
static inline int jpeg_bits(struct bit_reader *in, int n) {
    int value = (int)(in->hold >> 1 >> (63 - n));
    in->hold <<= n;
    in->count -= n;
    return value;
}

static inline int jpeg_bit(struct bit_reader *in) {
    if (in->count < 1) jpeg_fill(in);
    return jpeg_bits(in, 1);
}

/* T.81's RECEIVE and EXTEND: the value of n bits behind a symbol. */
static inline int jpeg_receive_extend(struct bit_reader *in, int n) {
    int value = jpeg_bits(in, n);
    return value < 1 << n >> 1 ? value - (1 << n) + 1 : value;
}

/* The next symbol, or -1 where the bits are no code; at least 16 bits stand ready behind it. */
static inline int jpeg_symbol(const struct jpeg_huffman *h, struct bit_reader *in) {
    if (in->count < 2 * JPEG_CODE_BITS) jpeg_fill(in);
    uint32_t code = (uint32_t)(in->hold >> (64 - JPEG_CODE_BITS));
    int entry = h->fast[code >> (JPEG_CODE_BITS - JPEG_FAST_BITS)];
    if (entry) {
        jpeg_bits(in, entry & 255);
        return entry >> 8;
    }
    for (int bits = JPEG_FAST_BITS + 1; bits <= JPEG_CODE_BITS; bits++)
        if (code < h->limit[bits]) {
            jpeg_bits(in, bits);
            return h->symbol[(int)(code >> (JPEG_CODE_BITS - bits)) + h->offset[bits]];
        }
    return -1;
}

/* ---- JPEG: tables ----

   Segments DHT and DQT (T.81, B.2.4.1 and B.2.4.2) define tables, which hold until others of the
   same number replace them. Huffman codes are listed by length and canonical (annex C). */

/* count[i]: the codes of i + 1 bits. False if they do not fit; a code of ones only is not used. */
static int jpeg_huffman_build(struct jpeg_huffman *h, const uint8_t *count) {
    uint32_t code = 0;   /* << 16 - bits */
    int used = 0;
    memset(h->fast, 0, sizeof h->fast);
    for (int bits = 1; bits <= JPEG_CODE_BITS; bits++) {
        uint32_t step = 1u << (JPEG_CODE_BITS - bits);
        h->offset[bits] = used - (int)(code / step);
        for (int i = 0; i < count[bits - 1]; i++, used++) {
            uint32_t first = code >> (JPEG_CODE_BITS - JPEG_FAST_BITS);
            for (int j = 0; bits <= JPEG_FAST_BITS && j < 1 << (JPEG_FAST_BITS - bits); j++)
                h->fast[first + (uint32_t)j] = (uint16_t)(h->symbol[used] << 8 | bits);
            code += step;
            if (code >= 1u << JPEG_CODE_BITS) return 0;
        }
        h->limit[bits] = code;
    }
    return 1;
}

/* DHT: Tc (0: DC, 1: AC) << 4 | number, 16 counts, the symbols; then the next table. */
static int jpeg_huffman_tables(struct jpeg_reader *j, struct cursor *s, int standard) {
    while (s->at < s->size) {
        int head = cursor_byte(s), ac = head >> 4, number = head & 15;
        const uint8_t *count = cursor_take(s, JPEG_CODE_BITS);
        size_t n = 0;
        for (int i = 0; count && i < JPEG_CODE_BITS; i++) n += count[i];
        const uint8_t *symbols = cursor_take(s, n);
        if (!symbols || ac > 1 || number > 3 || n > 256)
            return jpeg_damaged(j, "a Huffman table (DHT) of a wrong size or number");
        struct jpeg_huffman *h = &j->huffman[ac][number];
        memset(h->symbol, 0, sizeof h->symbol);
        memcpy(h->symbol, symbols, n);
        int ok = jpeg_huffman_build(h, count);
        for (size_t i = 0; i < n; i++)
            if (!ac && symbols[i] > 15) ok = 0;   /* a DC of more than 15 bits */
        if (!ok) return jpeg_damaged(j, "a Huffman table (DHT) that is no code");
        h->defined = 1;
        h->standard = standard;
    }
    return LVM_OK;
}

/* DQT: Pq << 4 | number, 64 entries of one byte or, where Pq is not 0, two, in zigzag. */
static int jpeg_quant_tables(struct jpeg_reader *j, struct cursor *s) {
    while (s->at < s->size) {
        int head = cursor_byte(s), number = head & 15;
        uint16_t table[JPEG_BLOCK];
        for (int k = 0; k < JPEG_BLOCK; k++)
            table[jpeg_zigzag[k]] = (uint16_t)cursor_big(s, head >> 4 ? 2 : 1);
        if (s->failed || number > 3)
            return jpeg_damaged(j, "a quantisation table (DQT) of a wrong size or number");
        memcpy(j->quant[number], table, sizeof table);
        j->quant_defined[number] = 1;
    }
    return LVM_OK;
}

/* The tables of T.81's annex K.3, as a DHT segment. Frames cut from a Motion JPEG film come without
   tables and mean these. */
static const uint8_t jpeg_standard[] = {
    0x00, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
    0x01, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
    0x10, 0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125,
    0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07,
    0x22, 0x71, 0x14, 0x32, 0x81, 0x91, 0xA1, 0x08, 0x23, 0x42, 0xB1, 0xC1, 0x15, 0x52, 0xD1, 0xF0,
    0x24, 0x33, 0x62, 0x72, 0x82, 0x09, 0x0A, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x25, 0x26, 0x27, 0x28,
    0x29, 0x2A, 0x34, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49,
    0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69,
    0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89,
    0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0xA2, 0xA3, 0xA4, 0xA5, 0xA6, 0xA7,
    0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3, 0xC4, 0xC5,
    0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xE1, 0xE2,
    0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF1, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8,
    0xF9, 0xFA,
    0x11, 0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119,
    0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71,
    0x13, 0x22, 0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xA1, 0xB1, 0xC1, 0x09, 0x23, 0x33, 0x52, 0xF0,
    0x15, 0x62, 0x72, 0xD1, 0x0A, 0x16, 0x24, 0x34, 0xE1, 0x25, 0xF1, 0x17, 0x18, 0x19, 0x1A, 0x26,
    0x27, 0x28, 0x29, 0x2A, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48,
    0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68,
    0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87,
    0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0xA2, 0xA3, 0xA4, 0xA5,
    0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3,
    0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA,
    0xE2, 0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8,
    0xF9, 0xFA};

/* ---- JPEG: the frame ----

   The frame header (T.81, B.2.2) names the process, the sides and the components; how many samples,
   blocks and MCUs there are follows from its sampling factors (A.1 and A.2). */

/* The processes that lvm does not read, by their SOF marker; NULL: no frame header. */
static const char *jpeg_other_process(int marker) {
    if (marker == JPEG_DHP) return "hierarchical";
    if (marker <= JPEG_SOF2 || marker > JPEG_SOF15 || marker == JPEG_DHT ||
        marker == JPEG_RESERVED || marker == JPEG_DAC)
        return NULL;
    switch (marker & 7) {
    case 1: case 2: return "arithmetic coding";
    case 3: return "lossless";
    default: return "hierarchical";
    }
}

/* Derives all sizes in samples, blocks and MCUs from the sampling factors. */
static int jpeg_frame_sizes(struct jpeg_reader *j) {
    j->mcus_x = (j->width + JPEG_SIDE * j->max_h - 1) / (JPEG_SIDE * j->max_h);
    j->mcus_y = (j->height + JPEG_SIDE * j->max_v - 1) / (JPEG_SIDE * j->max_v);
    for (int i = 0; i < j->n; i++) {
        struct jpeg_component *c = &j->component[i];
        if (j->max_h % c->h || j->max_v % c->v)
            return fail(j->error, LVM_UNSUPPORTED, "%s: a JPEG whose components have %d x %d and "
                        "%d x %d samples in one place; lvm reads whole ratios: convert it first",
                        j->name, j->max_h, j->max_v, c->h, c->v);
        c->upsample_x = j->max_h / c->h;
        c->upsample_y = j->max_v / c->v;
        c->width = (j->width + c->upsample_x - 1) / c->upsample_x;
        c->height = (j->height + c->upsample_y - 1) / c->upsample_y;
        c->blocks_x = (c->width + JPEG_SIDE - 1) / JPEG_SIDE;
        c->blocks_y = (c->height + JPEG_SIDE - 1) / JPEG_SIDE;
        c->padded_x = j->mcus_x * c->h;
        c->padded_y = j->mcus_y * c->v;
        memset(c->coef_bits, -1, sizeof c->coef_bits);
    }
    return LVM_OK;
}

/* SOF: precision, height, width, n; for each component its id, h << 4 | v and DQT table. */
static int jpeg_frame(struct jpeg_reader *j, int marker, struct cursor *s) {
    if (j->n) return jpeg_damaged(j, "a second frame header (SOF)");
    int precision = cursor_byte(s);
    j->height = (int)cursor_big(s, 2);
    j->width = (int)cursor_big(s, 2);
    int n = cursor_byte(s);
    if (n < 1 || s->size - s->at != 3 * (size_t)n)
        return jpeg_damaged(j, "a frame header (SOF) of a wrong size");
    if (precision != 8)
        return fail(j->error, precision == 12 ? LVM_UNSUPPORTED : LVM_FORMAT,
                    "%s: a JPEG with %d bits a sample; lvm reads 8: convert it first", j->name,
                    precision);
    if (j->height == 0 && j->width > 0)
        return fail(j->error, LVM_UNSUPPORTED, "%s: a JPEG that tells its height only behind its "
                    "pixels (DNL); lvm does not read such: convert it first", j->name);
    int code = image_check_sides(j->name, "JPEG", j->width, j->height, j->error);
    if (code) return code;
    if (n == 2 || n > JPEG_MAX_COMPONENTS)
        return fail(j->error, LVM_UNSUPPORTED, "%s: a JPEG with %d components; lvm reads 1 (grey), "
                    "3 (colour) and 4 (CMYK): convert it first", j->name, n);
    j->progressive = marker == JPEG_SOF2;
    j->n = n;
    for (int i = 0; i < n; i++) {
        struct jpeg_component *c = &j->component[i];
        c->id = cursor_byte(s);
        int factors = cursor_byte(s);
        c->h = factors >> 4;
        c->v = factors & 15;
        c->table = cursor_byte(s);
        if (c->h < 1 || c->h > 4 || c->v < 1 || c->v > 4 || c->table > 3)
            return jpeg_damaged(j, "a component with sampling factors or a table beyond 4");
        if (c->h > j->max_h) j->max_h = c->h;
        if (c->v > j->max_v) j->max_v = c->v;
    }
    return jpeg_frame_sizes(j);
}

/* ---- JPEG: decoding one block ----

   T.81's procedures for sequential scans (F.2.2), and for progressive ones (G.2) of DC or AC, first
   or refining. A block's coefficients begin as zeros. A fault comes back in words. */

static const char *const jpeg_short = "the data of a scan end early";
static const char *const jpeg_no_code = "the data of a scan are no Huffman code";
static const char *const jpeg_too_many = "a block has more than 64 coefficients";

/* DC is what it was in the component's last block and a difference. */
static const char *jpeg_dc_first(struct jpeg_reader *j, struct jpeg_component *c, int16_t *block) {
    int bits = jpeg_symbol(&j->huffman[0][c->dc], &j->in);
    if (bits < 0) return jpeg_no_code;
    c->dc_pred += jpeg_receive_extend(&j->in, bits);
    if (c->dc_pred != (int16_t)c->dc_pred) return "a DC coefficient of more than 16 bits";
    block[0] = (int16_t)(c->dc_pred * (1 << j->al));
    return NULL;
}

static const char *jpeg_dc_refine(struct jpeg_reader *j, struct jpeg_component *c,
                                  int16_t *block) {
    (void)c;
    block[0] = (int16_t)(block[0] | jpeg_bit(&j->in) << j->al);
    return NULL;
}

/* EOBRUN of symbol EOBn: the blocks, this one included, whose bands end here. */
static int jpeg_eob_run(struct bit_reader *in, int n) {
    return (1 << n) + jpeg_bits(in, n);
}

static const char *jpeg_ac_first(struct jpeg_reader *j, struct jpeg_component *c, int16_t *block) {
    const struct jpeg_huffman *ac = &j->huffman[1][c->ac];
    for (int k = j->ss; k <= j->se && !j->eob_run; k++) {
        int symbol = jpeg_symbol(ac, &j->in), bits = symbol & 15;
        if (symbol < 0) return jpeg_no_code;
        if (bits == 0 && symbol < 0xF0) {
            j->eob_run = j->progressive ? jpeg_eob_run(&j->in, symbol >> 4) : 1;
            break;
        }
        k += symbol >> 4;
        if (bits == 0) continue;
        if (k > j->se) return jpeg_too_many;
        block[jpeg_zigzag[k]] = (int16_t)(jpeg_receive_extend(&j->in, bits) * (1 << j->al));
    }
    if (j->eob_run) j->eob_run--;
    return NULL;
}

static const char *jpeg_sequential(struct jpeg_reader *j, struct jpeg_component *c,
                                   int16_t *block) {
    const char *fault = jpeg_dc_first(j, c, block);
    return fault ? fault : jpeg_ac_first(j, c, block);
}

/* Goes from k over so many zeros to the next one, or to the end of the band; each coefficient on
   the way that is not zero takes a correction bit, which, if set, moves it away from zero. */
static int jpeg_refine_until(struct jpeg_reader *j, int16_t *block, int k, int zeros) {
    for (; k <= j->se; k++) {
        int16_t *coef = &block[jpeg_zigzag[k]];
        if (*coef == 0 && zeros-- == 0) break;
        if (*coef != 0 && jpeg_bit(&j->in))
            *coef = (int16_t)(*coef + (*coef > 0 ? 1 << j->al : -(1 << j->al)));
    }
    return k;
}

static const char *jpeg_ac_refine(struct jpeg_reader *j, struct jpeg_component *c,
                                  int16_t *block) {
    const struct jpeg_huffman *ac = &j->huffman[1][c->ac];
    int k = j->ss;
    for (; k <= j->se && !j->eob_run; k++) {
        int symbol = jpeg_symbol(ac, &j->in), value = 0;
        if (symbol < 0 || (symbol & 15) > 1) return jpeg_no_code;
        if (symbol & 15) {
            value = jpeg_bit(&j->in) ? 1 << j->al : -(1 << j->al);
        } else if (symbol < 0xF0) {
            j->eob_run = jpeg_eob_run(&j->in, symbol >> 4);
            break;
        }
        k = jpeg_refine_until(j, block, k, symbol >> 4);
        if (value && k > j->se) return jpeg_too_many;
        if (value) block[jpeg_zigzag[k]] = (int16_t)value;
    }
    if (j->eob_run) {
        jpeg_refine_until(j, block, k, JPEG_BLOCK);
        j->eob_run--;
    }
    return NULL;
}

/* ---- JPEG: dequantisation and inverse DCT ----

   T.81's IDCT (A.3.3) as Loeffler, Ligtenberg and Moschytz compute it ("Practical fast 1-D DCT
   algorithms with 11 multiplications", ICASSP 1989), in integers: columns first, with two more bits
   kept, then rows. With c(i) = sqrt(2) cos(i pi / 16), the constants below are sums of c(i), times
   2^13. x[0] and x[4] meet in a butterfly, x[2] and x[6] in a rotation by 6 pi / 16, the odd ones
   in the rotations that the paper draws; even part and odd part then give y[i] and y[7 - i] as sum
   and difference.

   All inputs are held to 16 bits, which no image needs more of: so no sum leaves 32 bits,
   whatever the file says. */

enum { IDCT_BITS = 13, IDCT_KEPT = 2 };

static inline void jpeg_idct_1d(const int16_t *x, int step, int round, int32_t *y) {
    int x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step];
    int x4 = x[4 * step], x5 = x[5 * step], x6 = x[6 * step], x7 = x[7 * step];

    int sum = (int16_t)(x0 + x4) * (1 << IDCT_BITS) + round;
    int difference = (int16_t)(x0 - x4) * (1 << IDCT_BITS) + round;
    int low = x2 * 10703 + x6 * 4433, high = x2 * 4433 - x6 * 10704;
    int e0 = sum + low, e3 = sum - low, e1 = difference + high, e2 = difference - high;

    int a = (int16_t)(x7 + x3), b = (int16_t)(x5 + x1);
    int a2 = b * 9633 - a * 6436, b2 = a * 9633 + b * 6437;
    int o0 = x1 * 4926 - x7 * 7373 + b2, o1 = x3 * 4177 - x5 * 20995 + a2;
    int o2 = -x5 * 4176 - x3 * 20995 + b2, o3 = -x7 * 4927 - x1 * 7373 + a2;

    y[0] = e0 + o0;
    y[7] = e0 - o0;
    y[1] = e1 + o1;
    y[6] = e1 - o1;
    y[2] = e2 + o2;
    y[5] = e2 - o2;
    y[3] = e3 + o3;
    y[4] = e3 - o3;
}

static inline int jpeg_clamp(int v, int low, int high) {
    return v < low ? low : v > high ? high : v;
}

static int jpeg_any(const int16_t *coefs, int n) {
    int any = 0;
    for (int i = 0; i < n; i++) any |= coefs[i];
    return any != 0;
}

enum { COLUMN_SHIFT = IDCT_BITS - IDCT_KEPT, ROW_SHIFT = IDCT_BITS + IDCT_KEPT + 3 };

static inline void jpeg_idct_row(const int16_t *x, uint8_t *out) {
    int32_t y[JPEG_SIDE];
    jpeg_idct_1d(x, 1, 1 << (ROW_SHIFT - 1), y);
    for (int k = 0; k < JPEG_SIDE; k++)
        out[k] = (uint8_t)jpeg_clamp(128 + (y[k] >> ROW_SHIFT), 0, 255);
}

/* A block of which only the first row is not zero: all rows of samples are the same. The columns'
   pass would but shift that row up. libjpeg-turbo does just this, and loses the bits that leave 16,
   where the pass itself would hold its results to them. */
static void jpeg_idct_one_row(const int16_t *coefs, const uint16_t *quant, uint8_t *out,
                              size_t stride) {
    int16_t x[JPEG_SIDE];
    uint8_t row[JPEG_SIDE];
    for (int i = 0; i < JPEG_SIDE; i++)
        x[i] = (int16_t)((int16_t)(coefs[i] * quant[i]) * (1 << IDCT_KEPT));
    if (jpeg_any(coefs + 1, JPEG_SIDE - 1)) jpeg_idct_row(x, row);
    else memset(row, jpeg_clamp(128 + ((x[0] + 16) >> 5), 0, 255), JPEG_SIDE);   /* the same */
    for (int i = 0; i < JPEG_SIDE; i++) memcpy(out + (size_t)i * stride, row, JPEG_SIDE);
}

/* Dequantises one block of coefficients and makes them 8 x 8 samples. */
static void jpeg_idct(const int16_t *coefs, const uint16_t *quant, uint8_t *out, size_t stride) {
    int16_t x[JPEG_BLOCK], column[JPEG_BLOCK];
    int32_t y[JPEG_SIDE];
    if (!jpeg_any(coefs + JPEG_SIDE, JPEG_BLOCK - JPEG_SIDE)) {
        jpeg_idct_one_row(coefs, quant, out, stride);
        return;
    }
    for (int i = 0; i < JPEG_BLOCK; i++) x[i] = (int16_t)(coefs[i] * quant[i]);
    for (int i = 0; i < JPEG_SIDE; i++) {
        jpeg_idct_1d(x + i, JPEG_SIDE, 1 << (COLUMN_SHIFT - 1), y);
        for (int k = 0; k < JPEG_SIDE; k++)
            column[JPEG_SIDE * k + i] = (int16_t)jpeg_clamp(y[k] >> COLUMN_SHIFT, -32768, 32767);
    }
    for (int i = 0; i < JPEG_SIDE; i++)
        jpeg_idct_row(column + JPEG_SIDE * i, out + (size_t)i * stride);
}

/* ---- JPEG: scans ----

   A scan header (T.81, B.2.3) chooses components, Huffman tables and, in a progressive file, band
   and bits (G.1.1.1). The MCUs (A.2) follow in entropy-coded segments of one restart interval each.
   A scan of several components is interleaved; of one component, each block is an MCU. */

/* A progressive scan must send what was not sent yet; notes what it sends. */
static int jpeg_progression(struct jpeg_reader *j) {
    int band_ok = j->ss == 0 ? j->se == 0
                             : j->ss <= j->se && j->se < JPEG_BLOCK && j->scan_n == 1;
    if (!band_ok || j->al > JPEG_MAX_AL || (j->ah && j->ah != j->al + 1))
        return fail(j->error, LVM_FORMAT, "%s: damaged JPEG file: a scan of coefficients %d to %d, "
                    "bits %d down to %d", j->name, j->ss, j->se, j->ah, j->al);
    for (int i = 0; i < j->scan_n; i++)
        for (int k = j->ss; k <= j->se; k++) {
            int8_t *bits = &j->scan[i]->coef_bits[k];
            if (j->ah ? *bits != j->ah : *bits >= 0)
                return jpeg_damaged(j, "a scan repeats or leaves out bits of a coefficient");
            *bits = (int8_t)j->al;
        }
    if (j->ss == 0) j->decode_block = j->ah ? jpeg_dc_refine : jpeg_dc_first;
    else j->decode_block = j->ah ? jpeg_ac_refine : jpeg_ac_first;
    return LVM_OK;
}

/* A component's tables for the scan; its quantisation table is that of its first scan. */
static int jpeg_scan_tables(struct jpeg_reader *j, struct jpeg_component *c) {
    const struct jpeg_huffman *dc = &j->huffman[0][c->dc], *ac = &j->huffman[1][c->ac];
    int needs_dc = j->decode_block == jpeg_sequential || j->decode_block == jpeg_dc_first;
    int needs_ac = j->decode_block != jpeg_dc_first && j->decode_block != jpeg_dc_refine;
    if ((needs_dc && (!dc->defined || (dc->standard && j->progressive))) ||
        (needs_ac && (!ac->defined || (ac->standard && j->progressive))))
        return jpeg_damaged(j, "a scan whose Huffman table (DHT) is missing");
    if (c->scanned && !j->progressive) return jpeg_damaged(j, "a component comes in two scans");
    if (!c->scanned && !j->quant_defined[c->table])
        return jpeg_damaged(j, "a scan whose quantisation table (DQT) is missing");
    if (!c->scanned) memcpy(c->quant, j->quant[c->table], sizeof c->quant);
    c->scanned = 1;
    return LVM_OK;
}

/* SOS: n; for each component its id and DC << 4 | AC tables; Ss, Se, Ah << 4 | Al. */
static int jpeg_scan_header(struct jpeg_reader *j, struct cursor *s) {
    int n = cursor_byte(s), blocks = 0, next = 0;
    if (n < 1 || n > JPEG_MAX_COMPONENTS || s->size - s->at != 2 * (size_t)n + 3)
        return jpeg_damaged(j, "a scan header (SOS) of a wrong size");
    j->scan_n = n;
    for (int i = 0; i < n; i++, next++) {   /* in the order of the frame header */
        int id = cursor_byte(s), tables = cursor_byte(s);
        while (next < j->n && j->component[next].id != id) next++;
        if (next == j->n)
            return jpeg_damaged(j, "a scan of components that the frame does not have, or twice");
        struct jpeg_component *c = j->scan[i] = &j->component[next];
        c->dc = tables >> 4;
        c->ac = tables & 15;
        if (c->dc > 3 || c->ac > 3) return jpeg_damaged(j, "a Huffman table number beyond 3");
        blocks += c->h * c->v;
    }
    if (n > 1 && blocks > JPEG_MCU_BLOCKS)
        return jpeg_damaged(j, "a scan with more than 10 blocks in an MCU");
    j->ss = cursor_byte(s);
    j->se = cursor_byte(s);
    int bits = cursor_byte(s);
    j->ah = bits >> 4;
    j->al = bits & 15;
    int code = LVM_OK;
    if (j->progressive) {
        code = jpeg_progression(j);
    } else {   /* whatever the header says */
        j->decode_block = jpeg_sequential;
        j->ss = 1;
        j->se = JPEG_BLOCK - 1;
        j->al = 0;
    }
    for (int i = 0; i < n && !code; i++) code = jpeg_scan_tables(j, j->scan[i]);
    return code;
}

/* Before the first scan: memory for the coefficients or the planes. */
static int jpeg_allocate(struct jpeg_reader *j) {
    int64_t bits = 0;
    for (int i = 0; i < j->n; i++)
        bits += (int64_t)j->component[i].blocks_x * j->component[i].blocks_y;
    if (!j->progressive) bits *= 2;   /* a code for DC and one for the end of the block */
    size_t left = j->in.bytes.size - j->in.bytes.at, bytes = 0;
    if ((uint64_t)bits / 8 > left)
        return fail(j->error, LVM_FORMAT, "%s: damaged JPEG file: %zu bytes of data cannot hold "
                    "%d x %d pixels", j->name, left, j->width, j->height);
    size_t block = JPEG_BLOCK * (j->progressive ? sizeof *j->component->coefs : 1);
    for (int i = 0; i < j->n; i++)
        bytes += (size_t)j->component[i].padded_x * (size_t)j->component[i].padded_y * block;
    int code = image_check_bytes(j->name, "JPEG", j->width, j->height, bytes, j->error);
    for (int i = 0; i < j->n && !code; i++) {
        struct jpeg_component *c = &j->component[i];
        void *memory = mem_alloc((size_t)c->padded_x * (size_t)c->padded_y, block, j->error);
        if (j->progressive) c->coefs = memory;
        else c->plane = memory;
        if (!memory) code = LVM_MEMORY;
    }
    return code;
}

static uint8_t *jpeg_samples(const struct jpeg_component *c, int x, int y) {
    return c->plane + ((size_t)y * JPEG_SIDE * (size_t)c->padded_x + (size_t)x) * JPEG_SIDE;
}

static int16_t *jpeg_coefs(const struct jpeg_component *c, int x, int y) {
    return c->coefs + ((size_t)y * (size_t)c->padded_x + (size_t)x) * JPEG_BLOCK;
}

static const char *jpeg_mcu(struct jpeg_reader *j, int mcu_x, int mcu_y) {
    const char *fault = NULL;
    for (int i = 0; i < j->scan_n && !fault; i++) {
        struct jpeg_component *c = j->scan[i];
        int h = j->scan_n > 1 ? c->h : 1, v = j->scan_n > 1 ? c->v : 1;
        for (int y = mcu_y * v; y < (mcu_y + 1) * v; y++)
            for (int x = mcu_x * h; x < (mcu_x + 1) * h && !fault; x++) {
                if (j->progressive) {
                    fault = j->decode_block(j, c, jpeg_coefs(c, x, y));
                    continue;
                }
                int16_t block[JPEG_BLOCK] = {0};
                fault = j->decode_block(j, c, block);
                jpeg_idct(block, c->quant, jpeg_samples(c, x, y), (size_t)c->padded_x * JPEG_SIDE);
            }
    }
    return fault;
}

/* Forgets what blocks leave to the next ones: the state at the start of a restart interval. */
static void jpeg_reset(struct jpeg_reader *j) {
    j->in.hold = 0;
    j->in.count = 0;
    j->eob_run = 0;
    for (int i = 0; i < j->scan_n; i++) j->scan[i]->dc_pred = 0;
}

static const char *jpeg_scan_data(struct jpeg_reader *j) {
    const struct jpeg_component *only = j->scan_n == 1 ? j->scan[0] : NULL;
    int columns = only ? only->blocks_x : j->mcus_x, rows = only ? only->blocks_y : j->mcus_y;
    int left = j->restart_interval, restarts = 0;
    for (int i = 0; i < j->scan_n; i++)
        j->scanned_blocks += (int64_t)columns * rows * (only ? 1 : j->scan[i]->h * j->scan[i]->v);
    if (j->scanned_blocks > JPEG_MAX_BLOCKS) return "more scans than an image of its size can need";
    jpeg_reset(j);
    for (int y = 0; y < rows; y++)
        for (int x = 0; x < columns; x++) {
            if (j->restart_interval && left-- == 0) {
                int marker = jpeg_next_marker(j);
                if (marker == 0) return jpeg_short;
                if (marker != JPEG_RST0 + restarts++ % 8) return "a restart marker is missing";
                jpeg_reset(j);
                left = j->restart_interval - 1;
            }
            const char *fault = jpeg_mcu(j, x, y);
            if (j->in.count < (fault ? JPEG_CODE_BITS : 0)) return jpeg_short;
            if (fault) return fault;
        }
    jpeg_reset(j);
    return NULL;
}

static int jpeg_scan(struct jpeg_reader *j, struct cursor *s) {
    if (!j->n) return jpeg_damaged(j, "a scan (SOS) in front of the frame header (SOF)");
    int code = j->scans++ ? LVM_OK : jpeg_allocate(j);
    if (!code) code = jpeg_scan_header(j, s);
    if (code) return code;
    const char *fault = jpeg_scan_data(j);
    if (fault == jpeg_short && jpeg_next_marker(j) == 0) return jpeg_truncated(j);
    return fault ? jpeg_damaged(j, fault) : LVM_OK;
}

/* ---- JPEG: segments ----

   The order of segments is free (T.81, B.2 and B.2.4), but for what needs another first. */

/* A marker without a segment. */
static int jpeg_is_lone(int marker) {
    return marker == JPEG_TEM || (marker >= JPEG_RST0 && marker <= JPEG_RST7);
}

static int jpeg_segment(struct jpeg_reader *j, int marker) {
    struct cursor *file = &j->in.bytes;
    uint32_t size = cursor_big(file, 2);
    if (size < 2 && !file->failed) return jpeg_damaged(j, "a segment shorter than its own length");
    const uint8_t *d = cursor_take(file, size - 2);
    if (!d) return jpeg_truncated(j);
    struct cursor s = {d, size - 2, 0, 0};
    switch (marker) {
    case JPEG_SOF0: case JPEG_SOF1: case JPEG_SOF2: return jpeg_frame(j, marker, &s);
    case JPEG_SOS: return jpeg_scan(j, &s);
    case JPEG_DHT: return jpeg_huffman_tables(j, &s, 0);
    case JPEG_DQT: return jpeg_quant_tables(j, &s);
    case JPEG_DRI:
        if (size != 4) return jpeg_damaged(j, "a restart interval (DRI) of a wrong size");
        j->restart_interval = (int)cursor_big(&s, 2);
        return LVM_OK;
    case JPEG_APP0:
        if (size >= 16 && memcmp(d, "JFIF", 5) == 0) j->jfif = 1;
        return LVM_OK;
    case JPEG_APP1:
        if (j->scans || j->exif_over || size < 8 || memcmp(d, "Exif\0\0", 6) != 0) return LVM_OK;
        j->orientation = exif_orientation(d, size - 2);
        j->exif_over = 1;
        return LVM_OK;
    case JPEG_APP14:
        if (size >= 14 && memcmp(d, "Adobe", 5) == 0) j->adobe = d[11];
        return LVM_OK;
    default:
        return LVM_OK;
    }
}

/* True when all components came and, in a progressive file, at least their DC. */
static int jpeg_all_scanned(const struct jpeg_reader *j) {
    for (int i = 0; i < j->n; i++) {
        const struct jpeg_component *c = &j->component[i];
        if (!c->scanned || (j->progressive && c->coef_bits[0] < 0)) return 0;
    }
    return j->n > 0;
}

/* True when nothing more can come: all components, and in a progressive file every bit. */
static int jpeg_all_sent(const struct jpeg_reader *j) {
    for (int i = 0; i < j->n && j->progressive; i++)
        for (int k = 0; k < JPEG_BLOCK; k++)
            if (j->component[i].coef_bits[k] != 0) return 0;
    return jpeg_all_scanned(j);
}

/* Reads up to the last scan, which is known without EOI where all was sent. */
static int jpeg_segments(struct jpeg_reader *j) {
    int code = LVM_OK;
    while (!code && !jpeg_all_sent(j)) {
        int marker = jpeg_next_marker(j);
        if (marker == 0) return jpeg_truncated(j);
        if (marker == JPEG_EOI) {
            j->in.bytes.at -= 2;   /* for jpeg_end */
            break;
        }
        if (jpeg_is_lone(marker)) {
            j->exif_over = 1;
            continue;
        }
        if (marker == JPEG_SOI) return jpeg_damaged(j, "it begins a second time (SOI)");
        const char *process = jpeg_other_process(marker);
        if (process)
            return fail(j->error, LVM_UNSUPPORTED, "%s: a JPEG of a rare kind (%s); lvm reads "
                        "baseline and progressive ones: convert it first", j->name, process);
        code = jpeg_segment(j, marker);
    }
    if (!code && !j->n) return jpeg_damaged(j, "no frame header (SOF)");
    if (!code && !jpeg_all_scanned(j)) return jpeg_damaged(j, "a component without its data");
    return code;
}

/* Where the file ends whose pixels end here: behind its EOI or, without one, at the next file's SOI
   or the end of all. */
static size_t jpeg_end(struct jpeg_reader *j) {
    struct cursor *file = &j->in.bytes;
    for (int marker; (marker = jpeg_next_marker(j)) != JPEG_EOI;) {
        if (marker == JPEG_SOI) return file->at - 2;
        if (marker == 0) return file->size;
        if (jpeg_is_lone(marker)) continue;
        uint32_t size = cursor_big(file, 2);
        if (size < 2 || !cursor_take(file, size - 2)) return file->size;
    }
    return file->at;
}

/* ---- JPEG: block smoothing ----

   A progressive file may end when only DC, or only the upper bits of some AC, were sent. As T.81's
   K.8 suggests, libjpeg then predicts the first AC coefficients that are still zero from the DC of
   the 5 x 5 blocks around: where DC falls from left to right, coefficient 1 is not zero, and so on.
   A prediction is a weighted sum of DC, / 256, held below the first bit that was not sent. Where no
   AC came at all nine of them are predicted, and DC is smoothed too. A finished file needs none of
   this. */

enum { JPEG_WINDOW = 5, JPEG_PREDICTED = 9, JPEG_PREDICTED_OF_MORE = 5 };

/* For rising horizontal frequency 1, 2, 3; for 1 x 1; for 2 x 1 and DC; then the first two and
   1 x 1 where some AC is known. Vertical frequencies use them transposed. */
static const int16_t jpeg_kernels[9][JPEG_WINDOW * JPEG_WINDOW] = {
    {-1, -1, 0, 1, 1,  -3, 13, 0, -13, 3,  -3, 38, 0, -38, 3,  -3, 13, 0, -13, 3,
     -1, -1, 0, 1, 1},
    {0, 0, 0, 0, 0,  0, 2, -5, 2, 0,  1, 7, -14, 7, 1,  0, 2, -5, 2, 0,  0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0,  0, 1, 0, -1, 0,  0, 2, 0, -2, 0,  0, 1, 0, -1, 0,  0, 0, 0, 0, 0},
    {-1, 0, 0, 0, 1,  0, 9, 0, -9, 0,  0, 0, 0, 0, 0,  0, -9, 0, 9, 0,  1, 0, 0, 0, -1},
    {0, 0, 0, 0, 0,  0, 1, -3, 1, 0,  0, 0, 0, 0, 0,  0, -1, 3, -1, 0,  0, 0, 0, 0, 0},
    {-2, -6, -8, -6, -2,  -6, 6, 42, 6, -6,  -8, 42, 152, 42, -8,  -6, 6, 42, 6, -6,
     -2, -6, -8, -6, -2},
    {0, 0, 0, 0, 0,  0, 0, 0, 0, 0,  -7, 50, 0, -50, 7,  0, 0, 0, 0, 0,  0, 0, 0, 0, 0},
    {0, 0, 0, 0, 0,  0, 0, 0, 0, 0,  -1, 13, -24, 13, -1,  0, 0, 0, 0, 0,  0, 0, 0, 0, 0},
    {0, -1, 0, 1, 0,  -1, 10, 0, -10, 1,  0, 0, 0, 0, 0,  1, -10, 0, 10, -1,  0, 1, 0, -1, 0}};

/* By zigzag: the kernel where only DC is known, where more is, and whether to transpose it. */
static const uint8_t jpeg_kernel_of[1 + JPEG_PREDICTED][3] = {
    {5, 5, 0}, {0, 6, 0}, {0, 6, 1}, {1, 7, 1}, {3, 8, 0}, {1, 7, 0}, {2, 0, 0}, {4, 0, 0},
    {4, 0, 1}, {2, 0, 1}};

/* Whether libjpeg would smooth: some of the first AC lack bits, and no divisor is zero. */
static int jpeg_needs_smoothing(const struct jpeg_reader *j) {
    int lacking = 0;
    for (int i = 0; i < j->n; i++)
        for (int k = 0; k <= JPEG_PREDICTED; k++) {
            if (j->component[i].quant[jpeg_zigzag[k]] == 0) return 0;
            if (k > 0 && j->component[i].coef_bits[k] != 0) lacking = 1;
        }
    return lacking;
}

/* The DC around block x, y; blocks beyond the image are the nearest inside. libjpeg counts the
   block rows of a last, lower row of MCUs as if all rows of MCUs were that low, hence `row`. */
static void jpeg_window(const struct jpeg_reader *j, const struct jpeg_component *c, int x, int y,
                        int *dc) {
    int mcu_y = y / c->v;
    int rows = mcu_y < j->mcus_y - 1 ? c->v : c->blocks_y - mcu_y * c->v;
    int row = mcu_y * rows + y % c->v, end = rows * j->mcus_y;
    for (int i = 0; i < JPEG_WINDOW; i++)
        for (int k = 0; k < JPEG_WINDOW; k++) {
            int at_y = y + jpeg_clamp(row + i - JPEG_WINDOW / 2, 0, end - 1) - row;
            int at_x = jpeg_clamp(x + k - JPEG_WINDOW / 2, 0, c->blocks_x - 1);
            dc[i * JPEG_WINDOW + k] = jpeg_coefs(c, at_x, at_y)[0];
        }
}

static void jpeg_smooth(const struct jpeg_component *c, const int *dc, int16_t *block) {
    int more = 0;
    for (int k = 1; k <= JPEG_PREDICTED; k++)
        if (c->coef_bits[k] >= 0) more = 1;
    for (int k = more; k <= (more ? JPEG_PREDICTED_OF_MORE : JPEG_PREDICTED); k++) {
        int at = jpeg_zigzag[k], al = c->coef_bits[k];
        if (k > 0 && (al == 0 || block[at] != 0)) continue;
        const int16_t *kernel = jpeg_kernels[jpeg_kernel_of[k][more]];
        int64_t sum = 0, q = c->quant[at];
        for (int y = 0; y < JPEG_WINDOW; y++)
            for (int x = 0; x < JPEG_WINDOW; x++)
                sum += dc[y * JPEG_WINDOW + x] *
                       kernel[jpeg_kernel_of[k][2] ? x * JPEG_WINDOW + y : y * JPEG_WINDOW + x];
        sum *= c->quant[0];
        int64_t pred = ((sum < 0 ? -sum : sum) + q * 128) / (q * 256);
        if (k > 0 && al > 0) pred = min64(pred, (1 << al) - 1);
        block[at] = (int16_t)(sum < 0 ? -pred : pred);
    }
}

/* The plane of a progressive component, whose coefficients are then no longer needed. */
static int jpeg_finish_component(struct jpeg_reader *j, struct jpeg_component *c, int smooth) {
    c->plane = mem_alloc((size_t)c->padded_x * (size_t)c->padded_y, JPEG_BLOCK, j->error);
    if (!c->plane) return LVM_MEMORY;
    for (int y = 0; y < c->blocks_y; y++)
        for (int x = 0; x < c->blocks_x; x++) {
            int16_t block[JPEG_BLOCK];
            int dc[JPEG_WINDOW * JPEG_WINDOW];
            memcpy(block, jpeg_coefs(c, x, y), sizeof block);
            if (smooth) {
                jpeg_window(j, c, x, y, dc);
                jpeg_smooth(c, dc, block);
            }
            jpeg_idct(block, c->quant, jpeg_samples(c, x, y), (size_t)c->padded_x * JPEG_SIDE);
        }
    mem_free(c->coefs);
    c->coefs = NULL;
    return LVM_OK;
}

/* ---- JPEG: from planes to pixels ----

   Chroma of every other column, row or both (h2v1, h1v2, h2v2) goes through libjpeg's fancy
   upsampling, a triangle filter: a new sample is 3/4 of the one that it lies in and 1/4 of the next
   one on its side, in both directions for h2v2; at the borders the nearest sample stands for the
   missing one. Ties of the rounding go up for one neighbour and down for the other. Other ratios,
   and components of at most two columns, repeat their samples. Then the colour space of JFIF
   (ITU-T T.871) or of Adobe's APP14 becomes RGB. */

/* h2: out[2 i], out[2 i + 1] from s[i] and its neighbours; s[-1] and s[n] can be read. */
static void jpeg_upsample_h2(const uint16_t *s, int n, int shift, int left, int right,
                             uint8_t *out) {
    for (int i = 0; i < n; i++) {
        out[2 * i] = (uint8_t)((3 * s[i] + s[i - 1] + left) >> shift);
        out[2 * i + 1] = (uint8_t)((3 * s[i] + s[i + 1] + right) >> shift);
    }
}

/* Row y of the image from one component. sums: room for width + 2. */
static const uint8_t *jpeg_upsample_row(const struct jpeg_component *c, int y, uint16_t *sums,
                                        uint8_t *out) {
    size_t stride = (size_t)c->padded_x * JPEG_SIDE;
    int at = y / c->upsample_y, n = c->width, h = c->upsample_x, v2 = c->upsample_y == 2;
    int next = jpeg_clamp(y % 2 ? at + 1 : at - 1, 0, c->height - 1);
    const uint8_t *near = c->plane + (size_t)at * stride, *far = c->plane + (size_t)next * stride;
    if (h == 1 && !v2) return near;
    if (h == 1) {
        for (int i = 0; i < n; i++) out[i] = (uint8_t)((3 * near[i] + far[i] + 1 + y % 2) >> 2);
    } else if (h == 2 && c->upsample_y <= 2 && n > 2) {
        for (int i = 0; i < n; i++)
            sums[1 + i] = (uint16_t)(v2 ? 3 * near[i] + far[i] : near[i]);
        sums[0] = sums[1];
        sums[1 + n] = sums[n];
        if (v2) jpeg_upsample_h2(sums + 1, n, 4, 8, 7, out);
        else jpeg_upsample_h2(sums + 1, n, 2, 1, 2, out);
    } else {
        for (int i = 0; i < n; i++) memset(out + i * h, near[i], (size_t)h);
    }
    return out;
}

enum jpeg_colour_space { JPEG_GREY, JPEG_YCC, JPEG_RGB, JPEG_YCCK, JPEG_CMYK };

/* JFIF allows YCbCr only; Adobe's APP14 names its transform; else RGB is known by its ids. */
static enum jpeg_colour_space jpeg_colour_space_of(const struct jpeg_reader *j) {
    const struct jpeg_component *c = j->component;
    if (j->n == 1) return JPEG_GREY;
    if (j->n == 4) return j->adobe > 0 ? JPEG_YCCK : JPEG_CMYK;
    if (j->jfif) return JPEG_YCC;
    if (j->adobe >= 0) return j->adobe == 0 ? JPEG_RGB : JPEG_YCC;
    return c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B' ? JPEG_RGB : JPEG_YCC;
}

/* R = Y + 1.402 Cr, G = Y - 0.34414 Cb - 0.71414 Cr, B = Y + 1.772 Cb, times 2^16. */
static inline void jpeg_ycc_to_rgb(int y, int cb, int cr, uint8_t *rgb) {
    cb -= 128;
    cr -= 128;
    rgb[0] = (uint8_t)jpeg_clamp(y + ((91881 * cr + 32768) >> 16), 0, 255);
    rgb[1] = (uint8_t)jpeg_clamp(y + ((-22554 * cb - 46802 * cr + 32768) >> 16), 0, 255);
    rgb[2] = (uint8_t)jpeg_clamp(y + ((116130 * cb + 32768) >> 16), 0, 255);
}

/* R from C, G from M or B from Y, and K. CMYK is inverted, 255 being no ink, as Adobe's programs
   write it and Pillow takes for granted: k c / 255, rounded as on 255 - c and 255 - k by Pillow. */
static inline uint8_t jpeg_cmyk_to_rgb(int c, int k) {
    int x = (255 - c) * k + 128;
    return (uint8_t)(k - ((x + (x >> 8)) >> 8));
}

static void jpeg_row_to_rgb(enum jpeg_colour_space space, const uint8_t *const *row, int n,
                            uint8_t *rgb) {
    for (int i = 0; i < n; i++, rgb += RGB) {
        if (space == JPEG_YCC || space == JPEG_YCCK)
            jpeg_ycc_to_rgb(row[0][i], row[1][i], row[2][i], rgb);
        else
            for (int c = 0; c < RGB; c++) rgb[c] = row[c][i];
        if (space == JPEG_YCCK)   /* by its definition C is 255 - R, M 255 - G, Y 255 - B */
            for (int c = 0; c < RGB; c++) rgb[c] = (uint8_t)(255 - rgb[c]);
        if (space >= JPEG_YCCK)
            for (int c = 0; c < RGB; c++) rgb[c] = jpeg_cmyk_to_rgb(rgb[c], row[3][i]);
    }
}

static int jpeg_pixels(struct jpeg_reader *j, lvm_image *image) {
    enum jpeg_colour_space space = jpeg_colour_space_of(j);
    size_t n = (size_t)j->mcus_x * (size_t)j->max_h * JPEG_SIDE;   /* a row, whole MCUs of it */
    uint8_t *rows = mem_alloc((size_t)j->n, n, j->error);
    uint16_t *sums = rows ? mem_alloc(n + 2, sizeof *sums, j->error) : NULL;
    int code = sums ? image_new(image, j->width, j->height, j->error) : LVM_MEMORY;
    for (int y = 0; y < j->height && !code; y++) {
        const uint8_t *row[JPEG_MAX_COMPONENTS];
        for (int i = 0; i < j->n; i++)
            row[i] = jpeg_upsample_row(&j->component[i], y, sums, rows + (size_t)i * n);
        if (space == JPEG_GREY) row[1] = row[2] = row[0];
        jpeg_row_to_rgb(space, row, j->width, image->rgb + (size_t)y * (size_t)j->width * RGB);
    }
    if (!code) image->orientation = j->orientation;
    mem_free(sums);
    mem_free(rows);
    return code;
}

static int jpeg_load(const uint8_t *data, size_t size, const char *name, size_t *used,
                     lvm_image *image, lvm_error *error) {
    struct jpeg_reader *j = mem_alloc(1, sizeof *j, error);
    if (!j) return LVM_MEMORY;
    struct cursor standard = {jpeg_standard, sizeof jpeg_standard, 0, 0};
    j->name = name;
    j->error = error;
    j->adobe = -1;
    j->in.bytes = (struct cursor){data, size, 2, 0};   /* the caller recognised the SOI */
    int code = jpeg_huffman_tables(j, &standard, 1);
    if (!code) code = jpeg_segments(j);
    int smooth = !code && j->progressive && jpeg_needs_smoothing(j);
    for (int i = 0; i < j->n && !code && j->progressive; i++)
        code = jpeg_finish_component(j, &j->component[i], smooth);
    if (!code) code = jpeg_pixels(j, image);
    if (!code) *used = jpeg_end(j);
    for (int i = 0; i < JPEG_MAX_COMPONENTS; i++) {
        mem_free(j->component[i].coefs);
        mem_free(j->component[i].plane);
    }
    mem_free(j);
    return code;
}

/* ---- PNM in ----

   netpbm's pbm(5), pgm(5) and ppm(5), as Pillow reads them.

       "P1" to "P6" | width | height | maxval (not for bitmaps) | samples, rows from the top

   P1 and P4 are bitmaps (1 is black), P2 and P5 grey, P3 and P6 RGB. In the plain formats P1, P2
   and P3 samples are decimal numbers (bitmaps: digits); in the raw ones they are bytes behind
   exactly one whitespace byte: two, the high one first, where maxval is above 255; bits from the
   top in rows of whole bytes for P4. A comment goes from # to the end of its line, and is as if it
   were not there: it may stand inside a number, and its newline does not end one. Bytes behind the
   image are ignored; in a row of images the next begins right behind raw samples, or behind the
   whitespace that follows plain ones.

   Samples become bytes as Pillow makes them: v / maxval * 255, rounded, ties to even; grey with a
   maxval above 255 becomes a 16-bit integer likewise, which is then cut at 255. A raw sample above
   maxval counts as white, a plain one is an error. */

enum { PNM_DIGITS = 10, PNM_MAXVAL = 65535 };

struct pnm_reader {
    const char *name;      /* of the file, for messages */
    lvm_error *error;
    struct cursor file;
    int kind;              /* '1' .. '6' */
    int width, height, channels, maxval;
    uint8_t *scale;        /* [sample] -> byte */
};

static int pnm_is_space(int c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* The next byte that is in no comment, or -1. */
static inline int pnm_byte(struct pnm_reader *pnm) {
    int c;
    while ((c = cursor_byte(&pnm->file)) == '#')
        do c = cursor_byte(&pnm->file);
        while (c >= 0 && c != '\n' && c != '\r');
    return c;
}

/* A number and the whitespace byte behind it. Returns NULL or the fault in words. */
static const char *pnm_number(struct pnm_reader *pnm, int64_t *value) {
    int c, digits = 0;
    do c = pnm_byte(pnm);
    while (pnm_is_space(c));
    if (c < 0) return "the file ends early";
    for (*value = 0; c >= 0 && !pnm_is_space(c); c = pnm_byte(pnm)) {
        if (c < '0' || c > '9') return "not a number";
        if (++digits > PNM_DIGITS) return "a number too long";
        *value = *value * 10 + (c - '0');
    }
    return NULL;
}

static int pnm_header(struct pnm_reader *pnm) {
    static const char *const names[3] = {"width", "height", "maximum"};
    int64_t value[3] = {0, 0, 1};
    int bitmap = pnm->kind == '1' || pnm->kind == '4';
    for (int i = 0; i < (bitmap ? 2 : 3); i++) {
        const char *fault = pnm_number(pnm, &value[i]);
        if (fault)
            return fail(pnm->error, LVM_FORMAT, "%s: damaged PNM file: its %s: %s", pnm->name,
                        names[i], fault);
    }
    int code = image_check_sides(pnm->name, "PNM", value[0], value[1], pnm->error);
    if (code) return code;
    if (value[2] < 1 || value[2] > PNM_MAXVAL)
        return fail(pnm->error, LVM_FORMAT, "%s: damaged PNM file: its maximum is %lld: must be 1 "
                    "to %d", pnm->name, (long long)value[2], PNM_MAXVAL);
    pnm->width = (int)value[0];
    pnm->height = (int)value[1];
    pnm->maxval = (int)value[2];
    pnm->channels = pnm->kind == '3' || pnm->kind == '6' ? 3 : 1;
    return LVM_OK;
}

/* The fewest bytes that hold a row: a digit and a space are the least that a plain number takes. */
static size_t pnm_row_bytes(const struct pnm_reader *pnm) {
    size_t n = (size_t)pnm->width * (size_t)pnm->channels;
    if (pnm->kind == '4') return (n + 7) / 8;
    return pnm->kind == '2' || pnm->kind == '3' || pnm->maxval > 255 ? 2 * n : n;
}

/* Memory is allocated only when the file explains it. */
static int pnm_check_size(const struct pnm_reader *pnm) {
    size_t left = pnm->file.size - pnm->file.at;
    size_t bytes = pnm_row_bytes(pnm) * (size_t)pnm->height;
    if (pnm->kind == '2' || pnm->kind == '3') bytes--;   /* no space behind the last number */
    if (bytes <= left) return LVM_OK;
    return fail(pnm->error, LVM_FORMAT, "%s: the PNM file is cut off: %zu bytes of data cannot "
                "hold %d x %d pixels", pnm->name, left, pnm->width, pnm->height);
}

static int pnm_make_scale(struct pnm_reader *pnm) {
    int n = pnm->maxval > 255 ? PNM_MAXVAL + 1 : 256;
    double white = pnm->maxval > 255 && pnm->channels == 1 ? 65535 : 255;
    pnm->scale = mem_alloc((size_t)n, 1, pnm->error);
    if (!pnm->scale) return LVM_MEMORY;
    for (int v = 0; v < n; v++) {
        double byte = rint((double)v / pnm->maxval * white);
        pnm->scale[v] = (uint8_t)(byte < 255 ? byte : 255);
    }
    if (pnm->kind == '1' || pnm->kind == '4') {
        pnm->scale[0] = 255;
        pnm->scale[1] = 0;
    }
    return LVM_OK;
}

static const char *pnm_plain_sample(struct pnm_reader *pnm, uint8_t *out) {
    int64_t value = 0;
    if (pnm->kind != '1') {
        const char *fault = pnm_number(pnm, &value);
        if (fault) return fault;
        if (value > pnm->maxval) return "a sample above the maximum";
    } else {
        int c;
        do c = pnm_byte(pnm);
        while (pnm_is_space(c));
        if (c < 0) return "the file ends early";
        if (c != '0' && c != '1') return "neither 0 nor 1";
        value = c - '0';
    }
    *out = pnm->scale[value];
    return NULL;
}

/* One row to out [width * channels]. Returns NULL or the fault in words. */
static const char *pnm_row(struct pnm_reader *pnm, uint8_t *out) {
    int n = pnm->width * pnm->channels;
    const uint8_t *scale = pnm->scale, *raw = NULL;
    const char *fault = NULL;
    if (pnm->kind > '3') raw = cursor_take(&pnm->file, pnm_row_bytes(pnm));
    if (!raw)
        for (int i = 0; i < n && !fault; i++) fault = pnm_plain_sample(pnm, out + i);
    else if (pnm->kind == '4')
        for (int i = 0; i < n; i++) out[i] = scale[raw[i / 8] >> (7 - i % 8) & 1];
    else if (pnm->maxval > 255)
        for (int i = 0; i < n; i++) out[i] = scale[raw[2 * i] << 8 | raw[2 * i + 1]];
    else
        for (int i = 0; i < n; i++) out[i] = scale[raw[i]];
    return fault;
}

static int pnm_pixels(struct pnm_reader *pnm, lvm_image *image) {
    size_t row = (size_t)pnm->width * RGB;
    for (int y = 0; y < pnm->height; y++) {
        uint8_t *rgb = image->rgb + (size_t)y * row;
        const char *fault = pnm_row(pnm, rgb);
        if (fault)
            return fail(pnm->error, LVM_FORMAT, "%s: damaged PNM file: row %d: %s", pnm->name, y,
                        fault);
        if (pnm->channels == 1)   /* spread from the right, where nothing is waiting */
            for (int x = pnm->width - 1; x >= 0; x--) memset(rgb + RGB * (size_t)x, rgb[x], RGB);
    }
    return LVM_OK;
}

static int pnm_load(const uint8_t *data, size_t size, const char *name, size_t *used,
                    lvm_image *image, lvm_error *error) {
    struct pnm_reader pnm = {.name = name, .error = error, .file = {data, size, 3, 0},
                             .kind = data[1]};   /* the caller recognised three bytes */
    int code = pnm_header(&pnm);
    if (!code) code = pnm_check_size(&pnm);
    if (!code) code = pnm_make_scale(&pnm);
    if (!code) code = image_new(image, pnm.width, pnm.height, error);
    if (!code) code = pnm_pixels(&pnm, image);
    if (code) lvm_image_free(image);
    *used = pnm.file.at;
    while (pnm.kind <= '3' && *used < size && pnm_is_space(data[*used])) ++*used;
    mem_free(pnm.scale);
    return code;
}

/* ---- Recognising what a file is ----

   By its first bytes, never by its name. Images in formats that lvm does not read are named, so
   that their owner knows what to convert. */

static const struct image_kind {
    int offset, size;
    const char *bytes, *name;
} image_kinds[] = {
    {0, 4, "GIF8", "GIF"},              {8, 4, "WEBP", "WebP"},
    {0, 2, "BM", "BMP"},
    {4, 8, "ftypheic", "HEIC"},         {4, 8, "ftypheix", "HEIC"},
    {4, 8, "ftyphevc", "HEIC"},         {4, 8, "ftyphevx", "HEIC"},
    {4, 8, "ftypheim", "HEIC"},         {4, 8, "ftypheis", "HEIC"},
    {4, 8, "ftypmif1", "HEIC"},         {4, 8, "ftypmsf1", "HEIC"},
    {4, 8, "ftypavif", "AVIF"},         {4, 8, "ftypavis", "AVIF"},
    {0, 4, "II*\0", "TIFF"},            {0, 4, "MM\0*", "TIFF"},
    {0, 4, "II+\0", "TIFF"},            {0, 4, "MM\0+", "TIFF"},
    {4, 4, "JXL ", "JPEG XL"},          {0, 2, "\xFF\x0A", "JPEG XL"},
    {4, 4, "jP  ", "JPEG 2000"},        {0, 4, "\xFF\x4F\xFF\x51", "JPEG 2000"},
    {0, 4, "8BPS", "Photoshop"},        {0, 5, "%PDF-", "PDF"},
    {0, 3, "P7\n", "PAM"},              {0, 3, "PF\n", "PFM"},
    {0, 3, "Pf\n", "PFM"},              {0, 4, "<svg", "SVG"},
};

static const char *image_name(const uint8_t *data, size_t size) {
    for (size_t i = 0; i < sizeof image_kinds / sizeof *image_kinds; i++) {
        const struct image_kind *kind = &image_kinds[i];
        size_t end = (size_t)(kind->offset + kind->size);
        if (size >= end && !memcmp(data + kind->offset, kind->bytes, (size_t)kind->size))
            return kind->name;
    }
    return NULL;
}

static int is_pnm(const uint8_t *data, size_t size) {
    return size >= 3 && data[0] == 'P' && data[1] >= '1' && data[1] <= '6' && pnm_is_space(data[2]);
}

/* Nothing but text at the beginning: bytes above 127 may be letters of any language. */
static int is_text(const uint8_t *data, size_t size) {
    for (size_t i = 0; i < size && i < 512; i++)
        if ((data[i] < ' ' && !pnm_is_space(data[i])) || data[i] == 127) return 0;
    return 1;
}

/* The message for a file that is none of the formats which lvm reads. */
static int no_image(const uint8_t *data, size_t size, const char *name, lvm_error *error) {
    const char *kind = image_name(data, size);
    if (kind)
        return fail(error, LVM_UNSUPPORTED, "%s is a %s file, which lvm does not read: convert it "
                    "to PNG or JPEG first", name, kind);
    if (size >= 4 && !memcmp(data, png_signature, 4))
        return fail(error, LVM_FORMAT, "%s: damaged PNG file: its first %d bytes were changed "
                    "(copied as text?) or are missing", name, PNG_SIGNATURE_SIZE);
    return fail(error, LVM_FORMAT, "%s is %s: lvm reads PNG, JPEG and PNM", name,
                is_text(data, size) ? "text, no image" : "no image that lvm knows");
}

/* The first of the images that stand one behind the other in data, and how many bytes of it that
   took: the next one begins there. */
static int image_load_next(const uint8_t *data, size_t size, const char *name, size_t *used,
                           lvm_image *image, lvm_error *error) {
    *image = (lvm_image){0, 0, NULL, 0};
    *used = 0;
    if (size == 0) return fail(error, LVM_FORMAT, "%s is empty", name);
    if (size >= PNG_SIGNATURE_SIZE && !memcmp(data, png_signature, PNG_SIGNATURE_SIZE))
        return png_load(data, size, name, used, image, error);
    if (size >= 3 && !memcmp(data, "\xFF\xD8\xFF", 3))
        return jpeg_load(data, size, name, used, image, error);
    if (is_pnm(data, size)) return pnm_load(data, size, name, used, image, error);
    return no_image(data, size, name, error);
}

int lvm_image_load_memory(const void *data, size_t size, const char *name, lvm_image *image,
                          lvm_error *error) {
    clear_error(error);
    size_t used = 0;
    if (image == NULL) return null_argument(error, "lvm_image_load_memory", "image");
    *image = (lvm_image){0, 0, NULL, 0};
    if (data == NULL) return null_argument(error, "lvm_image_load_memory", "data");
    return image_load_next(data, size, name != NULL ? name : "(memory)", &used, image, error);
}

int lvm_image_load(const char *path, lvm_image *image, lvm_error *error) {
    clear_error(error);
    uint8_t *data = NULL;
    size_t size = 0;
    if (image == NULL) return null_argument(error, "lvm_image_load", "image");
    *image = (lvm_image){0, 0, NULL, 0};
    if (path == NULL) return null_argument(error, "lvm_image_load", "path");
    int code = read_file(path, &data, &size, error);
    if (code) return code;
    code = lvm_image_load_memory(data, size, path, image, error);
    mem_free(data);
    return code;
}

/* ---- Deflate ----

   Matches are found through hash chains, as RFC 1951 (4) advises: head[h] is the latest position
   whose next four bytes hash to h, prev[p mod window] the one before p with the same hash. Lazy
   matching: if the next byte starts a longer match, this byte goes out as a literal instead.
   Symbols gather into blocks; a block is written with dynamic Huffman codes, with the fixed ones or
   stored, whichever is shortest, so that the output's buffer can be allocated once. */

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

/* The header of a dynamic block: the code lengths of both codes as runs, and the code length code
   that those use. */
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
    struct deflate_codes dynamic, fixed;
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
    int parent[2 * HUFFMAN_MAX_SYMBOLS], leaf = 0, node = 0, deepest = 0, *level = parent;
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

/* Splits the code lengths into runs. */
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

static void deflate_plan_header(struct deflate *d) {
    struct deflate_header *h = &d->header;
    uint8_t all[DEFLATE_LITERALS + DEFLATE_DISTANCES];
    uint32_t count[19] = {0};
    h->n_literals = DEFLATE_LITERALS;
    h->n_distances = DEFLATE_DISTANCES;
    while (h->n_literals > 257 && !d->dynamic.literal_length[h->n_literals - 1]) h->n_literals--;
    while (h->n_distances > 1 && !d->dynamic.distance_length[h->n_distances - 1]) h->n_distances--;
    memcpy(all, d->dynamic.literal_length, (size_t)h->n_literals);
    memcpy(all + h->n_literals, d->dynamic.distance_length, (size_t)h->n_distances);
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
        int code = length_code(low), symbol = DEFLATE_MATCH + code;
        bits_put(b, c->literal_code[symbol], c->literal_length[symbol]);
        bits_put(b, (uint32_t)(low - length_base(code)), length_extra_bits(code));
        code = deflate_code((unsigned)distance - 1, DISTANCE_BITS);
        bits_put(b, c->distance_code[code], c->distance_length[code]);
        bits_put(b, (uint32_t)(distance - 1 - code_base(code, DISTANCE_BITS)),
                 code_extra_bits(code, DISTANCE_BITS));
    }
    bits_put(b, c->literal_code[DEFLATE_END], c->literal_length[DEFLATE_END]);
}

static void deflate_put_stored(struct deflate *d, const uint8_t *data, size_t size, int last) {
    do {
        size_t n = size < DEFLATE_STORED_MAX ? size : DEFLATE_STORED_MAX;
        bits_put(&d->bits, last && n == size, 3);   /* type 0 */
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
                (uint64_t)(c->distance_length[i] + code_extra_bits(i, DISTANCE_BITS));
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
    struct deflate_codes *c = &d->dynamic;
    huffman_lengths(d->literal_count, DEFLATE_LITERALS, HUFFMAN_MAX_BITS, c->literal_length);
    huffman_lengths(d->distance_count, DEFLATE_DISTANCES, HUFFMAN_MAX_BITS, c->distance_length);
    deflate_assign_codes(c);
    deflate_plan_header(d);

    uint64_t dynamic = d->header.bits + deflate_cost(d, c);
    uint64_t fixed = deflate_cost(d, &d->fixed);
    uint64_t stored = 8 * (uint64_t)size + 40 * (uint64_t)(size / DEFLATE_STORED_MAX + 1);
    if (stored <= dynamic && stored <= fixed) {
        deflate_put_stored(d, d->in + d->block_start, size, last);
    } else if (fixed <= dynamic) {
        bits_put(&d->bits, (uint32_t)(last | 1 << 1), 3);
        deflate_put_symbols(d, &d->fixed);
    } else {
        bits_put(&d->bits, (uint32_t)(last | 2 << 1), 3);
        deflate_put_header(d);
        deflate_put_symbols(d, c);
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
        d->literal_count[DEFLATE_MATCH + length_code(value)]++;
        d->distance_count[deflate_code((unsigned)distance - 1, DISTANCE_BITS)]++;
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
        int value = length ? length : d->in[at];
        at += length ? (size_t)length : 1;
        deflate_symbol(d, value, distance, at);
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
   smallest sum of absolute values, the heuristic that PNG's section 12 advises. Average is not
   tried: it gains nothing on photos and breaks up the repetitions of drawings. */

/* Filters a row of n bytes; both rows have a zero pixel in front. Returns the sum of |output|.
   Inlined once for each constant filter, which takes the choice out of the loop. */
static inline uint64_t png_filter_as(int filter, const uint8_t *row, const uint8_t *above,
                                     size_t n, uint8_t *out) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        int a = row[(ptrdiff_t)i - RGB], b = above[i], c = above[(ptrdiff_t)i - RGB];
        int predictor = filter == PNG_PAETH ? png_paeth(a, b, c)
                                            : filter == PNG_UP ? b : filter == PNG_SUB ? a : 0;
        uint8_t residual = (uint8_t)(row[i] - predictor);
        out[i] = residual;
        sum += residual < 128 ? residual : 256u - residual;
    }
    return sum;
}

static uint64_t png_filter(int filter, const uint8_t *row, const uint8_t *above, size_t n,
                           uint8_t *out) {
    switch (filter) {
    case PNG_NONE: return png_filter_as(PNG_NONE, row, above, n, out);
    case PNG_SUB: return png_filter_as(PNG_SUB, row, above, n, out);
    case PNG_UP: return png_filter_as(PNG_UP, row, above, n, out);
    default: return png_filter_as(PNG_PAETH, row, above, n, out);
    }
}

/* out: [height][1 + width * RGB], the filter type in front of each row. */
static int png_filter_rows(const lvm_image *image, uint8_t *out, lvm_error *error) {
    static const uint8_t tried[3] = {PNG_SUB, PNG_UP, PNG_PAETH};
    size_t n = (size_t)image->width * RGB;
    uint8_t *scratch = mem_alloc(3, n + RGB, error);   /* two padded rows and a trial */
    if (!scratch) return LVM_MEMORY;
    uint8_t *row = scratch + RGB, *above = row + n + RGB, *trial = above + n;
    for (int y = 0; y < image->height; y++, out += 1 + n) {
        memcpy(row, image->rgb + (size_t)y * n, n);
        out[0] = PNG_NONE;
        uint64_t least = png_filter(PNG_NONE, row, above, n, out + 1);
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

static int png_add_chunk(struct buffer *png, const char *type, const void *data, size_t size,
                         const struct crc32 *crc, lvm_error *error) {
    uint8_t head[8], check[4];
    size_t type_at = png->n + 4;
    png_put_u32(head, (uint32_t)size);
    memcpy(head + 4, type, 4);
    int code = buffer_add(png, head, sizeof head, error);
    if (!code) code = buffer_add(png, data, size, error);
    if (code) return code;
    png_put_u32(check, crc32_of(crc, (const uint8_t *)png->data + type_at, size + 4));
    return buffer_add(png, check, sizeof check, error);
}

/* An iTXt chunk (PNG, 11.3.3.4): keyword, no compression, no language, the text in UTF-8. The
   keyword is the one under which most programs that make images say how. */
static int png_add_text(struct buffer *png, const char *text, const struct crc32 *crc,
                        lvm_error *error) {
    static const char head[] = "parameters\0\0\0\0";   /* and a zero: its end */
    struct buffer all = {NULL, 0, 0};
    int code = buffer_add(&all, head, sizeof head, error);
    if (!code) code = buffer_add(&all, text, strlen(text), error);
    if (!code) code = png_add_chunk(png, "iTXt", all.data, all.n, crc, error);
    mem_free(all.data);
    return code;
}

/* An image's rows, filtered and compressed: *size bytes behind four free ones. */
static int png_pack(const lvm_image *image, uint8_t **packed, size_t *size, lvm_error *error) {
    size_t row = 1 + (size_t)image->width * RGB, raw_size = row * (size_t)image->height;
    uint8_t *raw = mem_alloc((size_t)image->height, row, error);
    *size = 0;
    *packed = raw ? mem_alloc(4 + deflate_bound(raw_size), 1, error) : NULL;
    if (*packed && png_filter_rows(image, raw, error) == LVM_OK)
        *size = deflate_zlib(raw, raw_size, *packed + 4, error);
    mem_free(raw);
    return *size > 0 ? LVM_OK : LVM_MEMORY;
}

/* Image i of an animation, or the only one (delay_ms 0): fcTL says how long it stands (and that it
   covers all), then its rows, from the second image on in fdAT, behind a number; fcTL and fdAT
   count together. */
static int png_add_frame(struct buffer *png, const lvm_image *image, int i, int delay_ms,
                         const struct crc32 *crc, lvm_error *error) {
    uint8_t control[26] = {0}, *packed = NULL;
    size_t size = 0;
    uint8_t *at = png_put_u32(control, i > 0 ? 2 * (uint32_t)i - 1 : 0);
    at = png_put_u32(at, (uint32_t)image->width);
    at = png_put_u32(at, (uint32_t)image->height) + 8;   /* at x = 0, y = 0 */
    png_put_u32(at, (uint32_t)delay_ms << 16 | 1000);    /* two numbers: their ratio is seconds */
    int code = png_pack(image, &packed, &size, error);
    if (!code && delay_ms) code = png_add_chunk(png, "fcTL", control, 26, crc, error);
    if (!code && i == 0) code = png_add_chunk(png, "IDAT", packed + 4, size, crc, error);
    if (!code && i > 0) {
        png_put_u32(packed, 2 * (uint32_t)i);
        code = png_add_chunk(png, "fdAT", packed, size + 4, crc, error);
    }
    mem_free(packed);
    return code;
}

/* n images of one size as an animation without end: *png of *size bytes (mem_free it). An animated
   PNG (PNG, third edition, 4.9) is a PNG of its first image to whom does not know it; where n is 1
   it is only that. text: NULL or words for an iTXt chunk. */
static int apng_encode(const lvm_image *images, int n, int delay_ms, const char *text,
                       uint8_t **png, size_t *size, lvm_error *error) {
    struct buffer out = {NULL, 0, 0};
    struct crc32 crc;
    uint8_t header[PNG_HEADER_SIZE] = {0}, control[8] = {0};   /* plays: 0, without end */
    *png = NULL;
    if (n > 1 && (delay_ms < 1 || delay_ms > 65535))
        return fail(error, LVM_INVALID, "a delay of %d ms: must be 1 to 65535", delay_ms);
    for (int i = 1; i < n; i++)
        if (images[i].width != images->width || images[i].height != images->height)
            return fail(error, LVM_INVALID, "the images of an animation must have one size");
    crc32_init(&crc);
    memcpy(png_put_u32(png_put_u32(header, (uint32_t)images->width), (uint32_t)images->height),
           (const uint8_t[2]){8, PNG_RGB}, 2);
    png_put_u32(control, (uint32_t)n);
    int code = buffer_add(&out, png_signature, PNG_SIGNATURE_SIZE, error);
    if (!code) code = png_add_chunk(&out, "IHDR", header, PNG_HEADER_SIZE, &crc, error);
    if (!code && text) code = png_add_text(&out, text, &crc, error);
    if (!code && n > 1) code = png_add_chunk(&out, "acTL", control, 8, &crc, error);
    for (int i = 0; i < n && !code; i++)
        code = png_add_frame(&out, &images[i], i, n > 1 ? delay_ms : 0, &crc, error);
    if (!code) code = png_add_chunk(&out, "IEND", NULL, 0, &crc, error);
    if (code) mem_free(out.data);
    else *png = (uint8_t *)out.data;
    *size = code ? 0 : out.n;
    return code;
}

/* The whole PNG file in *png (mem_free it). */
static int png_encode(const lvm_image *image, const char *text, uint8_t **png, size_t *size,
                      lvm_error *error) {
    return apng_encode(image, 1, 0, text, png, size, error);
}

int lvm_image_save_memory(const lvm_image *image, uint8_t **png, size_t *size, lvm_error *error) {
    clear_error(error);
    if (png != NULL) *png = NULL;
    if (size != NULL) *size = 0;
    if (image == NULL || png == NULL || size == NULL)
        return null_argument(error, "lvm_image_save_memory",
                             image == NULL ? "image" : png == NULL ? "png" : "size");
    if (!image_has_pixels(image))
        return fail(error, LVM_INVALID, "lvm_image_save_memory: an image of %d x %d pixels",
                    image->width, image->height);
    return png_encode(image, NULL, png, size, error);
}

void lvm_memory_free(void *memory) { mem_free(memory); }

/* lvm_image_save, with words in the file or NULL. */
static int image_save_text(const char *path, const lvm_image *image, const char *text,
                           lvm_error *error) {
    uint8_t *png = NULL;
    size_t size = 0;
    if (!image_has_pixels(image))
        return fail(error, LVM_INVALID, "%s: cannot write an image of %d x %d pixels", path,
                    image->width, image->height);
    int code = png_encode(image, text, &png, &size, error);
    if (!code) code = write_file(path, png, size, error);
    mem_free(png);
    return code;
}

int lvm_image_save(const char *path, const lvm_image *image, lvm_error *error) {
    clear_error(error);
    if (path == NULL || image == NULL)
        return null_argument(error, "lvm_image_save", path == NULL ? "path" : "image");
    return image_save_text(path, image, NULL, error);
}

/* ---- Resizing ----

   The bicubic kernel (Keys 1981, a = -1/2) gives a sample at distance x the weight

       w(x) = (a+2)|x|^3 - (a+3)|x|^2 + 1        for |x| < 1
            = a|x|^3 - 5a|x|^2 + 8a|x| - 4a      for 1 <= |x| < 2,   else 0.

   Output pixel i of n_out lies at c = (i + 1/2) s in the input, s = n_in / n_out. When the image
   shrinks (s > 1) the kernel is stretched by s and so averages instead of skipping; its support is
   c +- 2 max(s, 1), cut at the borders, and its weights are divided by their sum:

       out[i] = sum_j w((j + 1/2 - c) / max(s, 1)) in[j]  /  sum_j w((j + 1/2 - c) / max(s, 1))

   As in Pillow there are two passes, along rows, then along columns, with bytes in between; a side
   that keeps its length is copied. Weights are computed in double and rounded to integers in units
   of 2^-22: sums of weight times byte overshoot by less than a factor of two either way and so fit
   in 32 bits.

   Of the output any rectangle can be made alone (LVM_CROP), which costs what it needs of the input.
   Memory is in proportion to it too: columns are made in strips as wide as the weights for them and
   as many resized rows as one row of output needs take some megabytes. */

enum { RESIZE_BITS = 32 - 8 - 2, RESIZE_HALF = 1 << (RESIZE_BITS - 1) };

enum { RESIZE_STRIP_BYTES = 1 << 22 };

/* One side: n_in samples become n_out, of which those from `from` to from + n - 1 are made. */
struct resize_side {
    int n_in;
    int64_t n_out, from;
    int n;
};

/* An output: the sum over k < count of weight[k] * input[first + k]. */
struct resize_tap {
    int first, count;
    int32_t *weight;
};

struct resize {
    const lvm_image *in;
    struct resize_side x, y;
    int longest_x, longest_y;   /* the most weights of an output */
    int columns;                /* of a strip */
    struct resize_tap *taps;    /* [columns] */
    int32_t *weights;           /* [columns][longest_x], then [longest_y]: of one output row */
    double *w;                  /* scratch for one tap */
    uint8_t *rows;              /* [longest_y][columns][RGB]: input row r, resized, in r mod that */
    int32_t *sums;              /* [columns][RGB] */
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

/* The inputs that output i looks at: *first up to below the number returned. */
static int resize_window(const struct resize_side *s, int64_t i, int *first) {
    double scale = (double)s->n_in / (double)s->n_out, support = 2 * (scale < 1 ? 1 : scale);
    double center = ((double)i + 0.5) * scale;
    int end = (int)(center + support + 0.5);
    *first = (int)(center - support + 0.5);
    if (*first < 0) *first = 0;
    return end < s->n_in ? end : s->n_in;
}

static int resize_longest(const struct resize_side *s) {
    double scale = (double)s->n_in / (double)s->n_out;
    double most = 2 * ceil(2 * (scale < 1 ? 1 : scale)) + 1;
    return most < s->n_in ? (int)most : s->n_in;
}

/* The window and the weights of output i; w is scratch for as many. */
static void resize_tap(const struct resize_side *s, int64_t i, struct resize_tap *t, double *w) {
    double scale = (double)s->n_in / (double)s->n_out, center = ((double)i + 0.5) * scale;
    double inverse = 1 / (scale < 1 ? 1 : scale), sum = 0;
    if (s->n_in == s->n_out) {
        t->first = (int)i;
        t->count = 1;
        t->weight[0] = 1 << RESIZE_BITS;
        return;
    }
    t->count = resize_window(s, i, &t->first) - t->first;
    for (int k = 0; k < t->count; k++) {
        w[k] = bicubic((k + t->first - center + 0.5) * inverse);
        sum += w[k];
    }
    for (int k = 0; k < t->count; k++) {
        double share = sum != 0 ? w[k] / sum : w[k];
        t->weight[k] = (int32_t)(share * (1 << RESIZE_BITS) + (share < 0 ? -0.5 : 0.5));
    }
}

/* Columns 0 .. n-1 of the strip from one row of the input. */
static void resize_row(const struct resize *r, int n, const uint8_t *in, uint8_t *out) {
    for (int x = 0; x < n; x++, out += RGB) {
        const struct resize_tap *t = &r->taps[x];
        const uint8_t *p = in + (size_t)t->first * RGB;
        int32_t red = RESIZE_HALF, green = RESIZE_HALF, blue = RESIZE_HALF;
        for (int k = 0; k < t->count; k++, p += RGB) {
            red += p[0] * t->weight[k];
            green += p[1] * t->weight[k];
            blue += p[2] * t->weight[k];
        }
        out[0] = (uint8_t)resize_clip(red);
        out[1] = (uint8_t)resize_clip(green);
        out[2] = (uint8_t)resize_clip(blue);
    }
}

/* One row of the strip, n columns, from the resized rows that tap y names. */
static void resize_column(const struct resize *r, const struct resize_tap *y, int n, uint8_t *out) {
    int bytes = n * RGB;
    int32_t *sum = r->sums;
    for (int i = 0; i < bytes; i++) sum[i] = RESIZE_HALF;
    for (int k = 0; k < y->count; k++) {
        int slot = (y->first + k) % r->longest_y, weight = y->weight[k];
        const uint8_t *row = r->rows + (size_t)slot * (size_t)r->columns * RGB;
        for (int i = 0; i < bytes; i++) sum[i] += row[i] * weight;
    }
    for (int i = 0; i < bytes; i++) out[i] = (uint8_t)resize_clip(sum[i]);
}

/* Columns x .. x + n - 1 of out. Windows move down: a row that was resized stays in its slot as
   long as a later output needs it. */
static void resize_strip(struct resize *r, int x, int n, lvm_image *out) {
    struct resize_tap y = {0, 0, r->weights + (size_t)r->columns * (size_t)r->longest_x};
    for (int i = 0; i < n; i++) {
        r->taps[i].weight = r->weights + (size_t)i * (size_t)r->longest_x;
        resize_tap(&r->x, r->x.from + x + i, &r->taps[i], r->w);
    }
    for (int row = 0, next = 0; row < out->height; row++) {
        resize_tap(&r->y, r->y.from + row, &y, r->w);
        if (next < y.first) next = y.first;
        for (; next < y.first + y.count; next++)
            resize_row(r, n, r->in->rgb + (size_t)next * (size_t)r->in->width * RGB,
                       r->rows + (size_t)(next % r->longest_y) * (size_t)r->columns * RGB);
        resize_column(r, &y, n, out->rgb + ((size_t)row * (size_t)out->width + (size_t)x) * RGB);
    }
}

/* Memory for strips, at least a column wide. */
static int resize_allocate(struct resize *r, lvm_error *error) {
    size_t x = (size_t)r->longest_x, y = (size_t)r->longest_y;
    size_t columns = RESIZE_STRIP_BYTES / (x * sizeof *r->weights + y * RGB);
    r->columns = columns < 1 ? 1 : (int)min64((int64_t)columns, r->x.n);
    columns = (size_t)r->columns;
    r->taps = mem_alloc(columns, sizeof *r->taps, error);
    if (r->taps) r->weights = mem_alloc(columns * x + y, sizeof *r->weights, error);
    if (r->weights) r->w = mem_alloc(x > y ? x : y, sizeof *r->w, error);
    if (r->w) r->rows = mem_alloc(columns * y, RGB, error);
    if (r->rows) r->sums = mem_alloc(columns, RGB * sizeof *r->sums, error);
    return r->sums ? LVM_OK : LVM_MEMORY;
}

/* The part of a resized image that the two sides say; the caller checked `in`. */
static int resize_part(const lvm_image *in, struct resize_side x, struct resize_side y,
                       lvm_image *out, lvm_error *error) {
    struct resize r = {.in = in, .x = x, .y = y, .longest_x = resize_longest(&x),
                       .longest_y = resize_longest(&y)};
    int first = 0, last = 0, end = resize_window(&y, y.from + y.n - 1, &last);
    resize_window(&y, y.from, &first);
    if (!image_sides_ok(x.n, end - first))
        return fail(error, LVM_MEMORY, "resizing %d x %d pixels to a width of %d: too large",
                    in->width, in->height, x.n);
    int code = resize_allocate(&r, error);
    if (!code) code = image_new(out, x.n, y.n, error);
    for (int from = 0; from < x.n && !code; from += r.columns)
        resize_strip(&r, from, (int)min64(r.columns, x.n - from), out);
    mem_free(r.taps);
    mem_free(r.weights);
    mem_free(r.w);
    mem_free(r.rows);
    mem_free(r.sums);
    return code;
}

int lvm_image_resize(const lvm_image *in, int width, int height, lvm_image *out, lvm_error *error) {
    clear_error(error);
    if (out != NULL && in != out) *out = (lvm_image){0, 0, NULL, 0};
    if (in == NULL || out == NULL)
        return null_argument(error, "lvm_image_resize", in == NULL ? "in" : "out");
    if (in == out) return fail(error, LVM_INVALID, "lvm_image_resize: in and out are the same");
    if (!image_has_pixels(in) || !image_sides_ok(width, height))
        return fail(error, LVM_INVALID, "cannot resize an image of %d x %d to %d x %d pixels",
                    in->width, in->height, width, height);
    return resize_part(in, (struct resize_side){in->width, width, 0, width},
                       (struct resize_side){in->height, height, 0, height}, out, error);
}

/* n / 2, halves to the even side as Python rounds them, so that a crop is torchvision's. */
static int64_t half_even(int64_t n) { return n / 2 + (n & n >> 1 & 1); }

/* image as R x R pixels. LVM_CROP: the short side becomes R, of the long one the middle stays. One
   that fits is what resizing would leave of it. */
static int fit_image(const lvm_image *image, int R, int fit, lvm_image *out, lvm_error *error) {
    int w = image->width, h = image->height;
    if (w == R && h == R && image_has_pixels(image)) {
        *out = (lvm_image){R, R, mem_alloc((size_t)R * (size_t)R, RGB, error), 0};
        if (out->rgb != NULL) memcpy(out->rgb, image->rgb, (size_t)R * (size_t)R * RGB);
        return out->rgb != NULL ? LVM_OK : LVM_MEMORY;
    }
    if (fit == LVM_SQUASH || w == h || !image_has_pixels(image))
        return lvm_image_resize(image, R, R, out, error);
    int64_t width = w < h ? R : (int64_t)R * w / h, height = w < h ? (int64_t)R * h / w : R;
    *out = (lvm_image){0, 0, NULL, 0};
    return resize_part(image, (struct resize_side){w, width, half_even(width - R), R},
                       (struct resize_side){h, height, half_even(height - R), R}, out, error);
}

/* =================================================================================================
   Chapter 12.  Packing, fast convolution (Winograd), attention on quantised caches

   What chapters 3, 5 and 6 declare and need not know, with the plain C of their kernels:

       matmul_int_tile_task, matmul_panels    operands packed into panels, and cut into tiles
       conv2d_fast                            direct convolution by panels, and Winograd's
       store_kv8, attend_block_kv8            keys and values of eight bits

   A packed panel is what 16 rows of a matrix have in common with a vector register: element i of
   all of them side by side, so that one load gives a step of 16 sums and no lane has to be moved.

       rows                      packed panel
       a0 a1 a2 ...              a0 b0 c0 ... p0
       b0 b1 b2 ...      -->     a1 b1 c1 ... p1
       ... 16 rows               ...

   A tile is the block of sums that stays in registers while k runs: some rows of one operand by one
   or more panels of the other. */

/* ---- Packing for the integer tile ---- */

/* The plain packed form: for each block, PANEL scales, then PANEL rows of 32 bytes. */
enum { PLAIN_PACK = PANEL * (4 + QK) };

/* Packs PANEL rows of `blocks` blocks of Q8_0 or Q4_0 into blocks * pack_bytes; each instruction
   set has a form of its own, which only its int_tile reads. */
static void int_pack_plain(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    for (int b = 0; b < blocks; b++, packed += PLAIN_PACK)
        for (int j = 0; j < PANEL; j++) {
            int8_t q[QK];
            float d = unpack_block(type, w[j], b, q);
            memcpy(packed + 4 * j, &d, sizeof d);
            memcpy(packed + 4 * PANEL + QK * j, q, QK);
        }
}

/* c[r][16 j ..] = row r of x times panel j, for int_rows rows, which may repeat, and up to
   int_panels panels. Inside a block all sums are exact integers; blocks are added in order by
   multiply-adds. */
static void int_tile_plain(int blocks, const struct act_block *const *x, const uint8_t *packed,
                           int panels, float *c, int ldc) {
    (void)panels;
    for (int r = 0; r < PLAIN_ROWS; r++)
        for (int j = 0; j < PANEL; j++) {
            float sum = 0;
            for (int b = 0; b < blocks; b++) {
                const uint8_t *p = packed + (int64_t)b * PLAIN_PACK;
                const int8_t *q = (const int8_t *)p + 4 * PANEL + QK * j;
                float d = 0;
                int32_t products = 0;
                memcpy(&d, p + 4 * j, sizeof d);
                for (int i = 0; i < QK; i++) products += q[i] * x[r][b].q[i];
                sum = fma_f32((float)products, d * x[r][b].d, sum);
            }
            c[r * ldc + j] = sum;
        }
}

/* Packs the rows of weights from j0 on, PANEL to a panel. */
static void pack_panels(const struct matmul_job *job, int j0, int panels, uint8_t *packed) {
    const struct tensor *w = job->w;
    int blocks = w->cols / QK;
    const uint8_t *rows[PANEL];
    for (int s = 0; s < panels; s++, j0 += PANEL) {
        for (int j = 0; j < PANEL; j++)
            rows[j] = tensor_row(w, j0 + j < w->rows ? j0 + j : w->rows - 1);
        job->e->kern->matmul.int_pack(w->type, blocks, rows,
                            packed + (int64_t)s * blocks * job->e->kern->matmul.pack_bytes);
    }
}

/* Prefetches what the next task packs, the weights from row j0 on, in pieces while n rows from r0
   on are multiplied: packing cannot wait for memory. Before the first piece a byte of each page is
   read, because prefetches do not wait for an address to be translated. */
static void prefetch_next_panels(const struct matmul_job *job, int j0, int r0, int n) {
    enum { PAGE = 4096 };
    const struct tensor *w = job->w;
    int left = w->rows - j0 < job->size ? w->rows - j0 : job->size;
    int64_t bytes = left > 0 ? left * w->row_bytes : 0;
    for (int64_t i = 0; r0 == 0 && i < bytes; i += PAGE)
        (void)*(const volatile uint8_t *)(tensor_row(w, j0) + i);
    for (int64_t i = bytes * r0 / job->rows; i < bytes * (r0 + n) / job->rows; i += 64)
        __builtin_prefetch(tensor_row(w, j0) + i);
}

/* Packs int_panels panels of weights, then multiplies all rows of x by them. */
static void matmul_int_tile_task(void *arg, int task, int thread) {
    const struct matmul_job *job = arg;
    const struct tensor *w = job->w;
    const struct kernels *kern = job->e->kern;
    int tile_rows = kern->matmul.int_rows;
    int wide = kern->matmul.int_panels * PANEL, j0 = task * wide, blocks = w->cols / QK,
        cols = w->rows - j0 < wide ? w->rows - j0 : wide, panels = (cols + PANEL - 1) / PANEL;
    uint8_t *packed = (uint8_t *)exec_scratch(job->e, thread);
    float tile[MAX_TILE * MAX_PANELS * PANEL];
    pack_panels(job, j0, panels, packed);
    for (int r0 = 0; r0 < job->rows; r0 += tile_rows) {
        int rows = job->rows - r0 < tile_rows ? job->rows - r0 : tile_rows;
        const struct act_block *px[MAX_TILE];
        for (int r = 0; r < tile_rows; r++)
            px[r] = job->e->act + (int64_t)(r0 + (r < rows ? r : rows - 1)) * blocks;
        prefetch_next_panels(job, j0 + wide, r0, rows);
        if (rows == tile_rows && cols == panels * PANEL && job->bias == NULL) {
            kern->matmul.int_tile(blocks, px, packed, panels, job->y + (int64_t)r0 * w->rows + j0,
                                  w->rows);
            continue;
        }
        kern->matmul.int_tile(blocks, px, packed, panels, tile, wide);
        store_tile(job, tile, wide, r0, rows, j0, cols);
    }
}

/* ---- Outer products, cut into tiles ---- */

/* panel[i][j] = row j's element i, for PANEL rows of k >= 1 elements that lie ld >= k apart. All 16
   rows are read: a matrix of fewer is filled up by the caller. */
static void pack_panel_plain(const float *rows, int64_t ld, int k, float *panel) {
    for (int i = 0; i < k; i++)
        for (int j = 0; j < PANEL; j++) panel[i * PANEL + j] = rows[j * ld + i];
}

/* One tile for count rows, of which there may be fewer than the kernel's. */
static void matmul_panels_edge(const struct kernels *kern, int count, int n, const float *const *a,
                       const float *b, int64_t ldp, int panels, float *c, int ldc,
                       int accumulate) {
    float tile[MAX_TILE * MAX_PANELS * PANEL];
    const float *pa[MAX_TILE];
    int cols = panels * PANEL;
    if (count == kern->matmul.outer_rows) {
        kern->matmul.outer_tile(n, a, b, ldp, panels, c, ldc, accumulate);
        return;
    }
    for (int r = 0; r < kern->matmul.outer_rows; r++) pa[r] = a[r < count ? r : count - 1];
    for (int r = 0; accumulate && r < count; r++)
        memcpy(tile + r * cols, c + (int64_t)r * ldc, (size_t)cols * sizeof *tile);
    kern->matmul.outer_tile(n, pa, b, ldp, panels, tile, cols, accumulate);
    for (int r = 0; r < count; r++)
        memcpy(c + (int64_t)r * ldc, tile + r * cols, (size_t)cols * sizeof *tile);
}

/* c[r][..16 panels] (+)= a[r][k] b for any number of rows; a row's pointer is a[r]. All rows pass
   a tile's panels while these are in the first-level cache. */
static void matmul_panels(const struct kernels *kern, int rows, int n, const float *const *a,
                       const float *b, int64_t ldp, int panels, float *c, int ldc,
                       int accumulate) {
    int left = rows % kern->matmul.outer_rows, tiled = left < 3 ? rows - left : rows;
    for (int s = 0; s < panels; s += kern->matmul.outer_panels)
        for (int r = 0; r < tiled; r += kern->matmul.outer_rows)
            matmul_panels_edge(
                kern, rows - r < kern->matmul.outer_rows ? rows - r : kern->matmul.outer_rows, n,
                a + r, b + s * ldp, ldp,
                panels - s < kern->matmul.outer_panels ? panels - s : kern->matmul.outer_panels,
                c + (int64_t)r * ldc + s * PANEL, ldc, accumulate);
    for (int r = tiled; r < rows; r++)
        kern->matmul.outer_row(n, a[r], b, ldp, panels, c + (int64_t)r * ldc, accumulate);
}

/* ---- Winograd's transforms, F(4 x 4, 3 x 3) (Lavin and Gray 2015, arXiv 1509.09308) ----

   Polynomials can be multiplied by multiplying their values at enough points; transposed, that is a
   filter: four outputs of three taps from six products, for the points 0, +-a, +-b and infinity.

           aabb   0   -aa-bb   0    1  0          1/aabb   0    0
             0  -abb   -bb     a    1  0            p     ap   aap            1  1  1   1   1  0
     B^T =   0   abb   -bb    -a    1  0      G =   p    -ap   aap     A^T =  0  a -a   b  -b  0
             0  -aab   -aa     b    1  0            q     bq   bbq            0 aa aa  bb  bb  0
             0   aab   -aa    -b    1  0            q    -bq   bbq            0 a3 -a3 b3 -b3  1
             0   aabb   0   -aa-bb  0  1            0      0    1

   p = 1 / 2aa(aa - bb) and q = 1 / 2bb(bb - aa). With the usual a = 1 and b = 2 fewer
   multiplications would do, but rounding errors grow with the powers in A^T: a = 5/8 and b = 3/2,
   exact in all of these products, halve them (on such choices: Barabasz and others, arXiv
   1803.10986).

   Each comes as one dimension, then as both: U = G g G^T, V = B^T d B, out = A^T M A. */

#define WINO_A 0.625f
#define WINO_B 1.5f
#define WINO_AA (WINO_A * WINO_A)
#define WINO_BB (WINO_B * WINO_B)
#define WINO_P (0.5f / (WINO_AA * (WINO_AA - WINO_BB)))
#define WINO_Q (0.5f / (WINO_BB * (WINO_BB - WINO_AA)))

/* v[0..5] = B^T d; elements lie `from` and `to` apart. */
static void winograd_input_1d(const float *d, int from, float *v, int to) {
    float p = d[4 * from] - WINO_BB * d[2 * from], q = WINO_A * (d[3 * from] - WINO_BB * d[from]);
    float r = d[4 * from] - WINO_AA * d[2 * from], s = WINO_B * (d[3 * from] - WINO_AA * d[from]);
    v[0] = WINO_AA * WINO_BB * d[0] - (WINO_AA + WINO_BB) * d[2 * from] + d[4 * from];
    v[to] = p + q;
    v[2 * to] = p - q;
    v[3 * to] = r + s;
    v[4 * to] = r - s;
    v[5 * to] = WINO_AA * WINO_BB * d[from] - (WINO_AA + WINO_BB) * d[3 * from] + d[5 * from];
}

/* y[0..3] = A^T m */
static void winograd_output_1d(const float *m, int from, float *y, int to) {
    float p = m[from] + m[2 * from], q = WINO_A * (m[from] - m[2 * from]);
    float r = m[3 * from] + m[4 * from], s = WINO_B * (m[3 * from] - m[4 * from]);
    y[0] = m[0] + p + r;
    y[to] = q + s;
    y[2 * to] = WINO_AA * p + WINO_BB * r;
    y[3 * to] = WINO_AA * q + WINO_BB * s + m[5 * from];
}

/* u[0..5] = G g */
static void winograd_filter_1d(const float *g, int from, float *u, int to) {
    float p = WINO_P * g[0] + WINO_AA * WINO_P * g[2 * from], q = WINO_A * WINO_P * g[from];
    float r = WINO_Q * g[0] + WINO_BB * WINO_Q * g[2 * from], s = WINO_B * WINO_Q * g[from];
    u[0] = g[0] * (1 / (WINO_AA * WINO_BB));
    u[to] = p + q;
    u[2 * to] = p - q;
    u[3 * to] = r + s;
    u[4 * to] = r - s;
    u[5 * to] = g[2 * from];
}

/* U of n filters at once: u[36][n] from w[3 x 3][n], elements `tap` apart; n is a multiple of
   16. */
static void winograd_filter_plain(const float *w, int n, int64_t tap, float *u) {
    for (int i = 0; i < n; i++) {
        float g[9], t[18], all[36];
        for (int p = 0; p < 9; p++) g[p] = w[p * tap + i];
        for (int x = 0; x < 3; x++) winograd_filter_1d(g + x, 3, t + x, 3);
        for (int y = 0; y < 6; y++) winograd_filter_1d(t + 3 * y, 1, all + 6 * y, 1);
        for (int p = 0; p < 36; p++) u[p * tap + i] = all[p];
    }
}

/* v[36][c], `tap` apart, from a patch of 6 lines, `line` apart, of 6 pixels of c channels; c is a
   multiple of 8. */
static void winograd_input_plain(const float *patch, int64_t line, int c, float *v, int64_t tap) {
    for (int i = 0; i < c; i++) {
        float d[36], t[36];
        for (int p = 0; p < 36; p++) d[p] = patch[p / 6 * line + p % 6 * c + i];
        for (int x = 0; x < 6; x++) winograd_input_1d(d + x, 6, t + x, 6);
        for (int y = 0; y < 6; y++) winograd_input_1d(t + 6 * y, 1, d + 6 * y, 1);
        for (int p = 0; p < 36; p++) v[p * tap + i] = d[p];
    }
}

/* out[4 x 4][PANEL] = A^T m A + bias + residual, m[36] being `tap` apart; residual may be NULL. */
static void winograd_output_plain(const float *m, int64_t tap, const float *bias,
                              const float *const *residual, float *const *out) {
    for (int j = 0; j < PANEL; j++) {
        float d[36], t[24], y[16];
        for (int p = 0; p < 36; p++) d[p] = m[p * tap + j];
        for (int x = 0; x < 6; x++) winograd_output_1d(d + x, 6, t + x, 6);
        for (int i = 0; i < 4; i++) winograd_output_1d(t + 6 * i, 1, y + 4 * i, 1);
        for (int p = 0; p < 16; p++) {
            float v = y[p] + bias[j];
            out[p][j] = residual != NULL ? v + residual[p][j] : v;
        }
    }
}

/* ---- Convolution ---- */

enum {
    CONV_PIXELS = 48,      /* output pixels of a task: a multiple of every outer_rows */
    CONV_PIECE = 48 << 10, /* floats of packed weights worked on at a time: less than an L2 cache */
    WINO_POINTS = 36,             /* of a transformed filter: 6 x 6 */
    WINO_TILES = 72,            /* Winograd: tiles of a task, at most */
    PATCH_TILES = 8,             /* tiles whose inputs are gathered together */
    PANEL_2 = 2 * PANEL,      /* output channels worked on together */
    CHANNEL_CHUNK = 128,           /* input channels whose filters are transformed together */
    WINO_V = 256 << 10,    /* floats of a task's transformed inputs: half of an L2 cache */
    WINO_U = 2560 << 10    /* floats of transformed filters kept for all tasks: of an L3 cache */
};

/* Packs n input channels from c0 on of 16 output channels: for each tap out[n][16], `tap` apart.
   Channels beyond c_out get zeros. rows is room for 16 x n floats. */
static void pack_conv(const struct conv_job *job, int panel, int c0, int n, float *rows,
                      int64_t tap, float *out) {
    const struct tensor *w = &job->conv->w;
    int j0 = panel * PANEL, cols = w->rows - j0 < PANEL ? w->rows - j0 : PANEL;
    memset(rows, 0, (size_t)n * PANEL * sizeof *rows);
    for (int at = c0; at < w->cols; at += job->c_in, out += tap) {
        for (int j = 0; j < cols; j++)
            job->e->kern->elementwise.to_f32(
                w->type, tensor_row(w, j0 + j) + type_bytes(w->type, at), rows + (int64_t)j * n, n);
        job->e->kern->conv.pack_panel(rows, n, n, out);
    }
}

static void pack_conv_task(void *arg, int task, int thread) {
    const struct conv_job *job = arg;
    const struct conv *conv = job->conv;
    pack_conv(job, job->panel0 + task, 0, job->c_in, exec_scratch(job->e, thread),
              job->c_in * PANEL, job->s->packed + (int64_t)task * conv->w.cols * PANEL);
}

/* n output pixels from p0 on, the channels of one or two panels. */
static void store_pixels(const struct conv_job *job, int p0, int n, int panel, const float *sum) {
    const float *bias = floats(&job->conv->bias);
    int j0 = panel * PANEL, cols = job->c_out - j0 < PANEL_2 ? job->c_out - j0 : PANEL_2;
    for (int i = 0; i < n; i++) {
        int64_t at = (int64_t)(p0 + i) * job->c_out + j0;
        for (int j = 0; j < cols; j++) {
            float v = sum[i * PANEL_2 + j] + bias[j0 + j];
            job->out[at + j] = job->residual != NULL ? v + job->residual[at + j] : v;
        }
    }
}

/* CONV_PIXELS output pixels: for each tap an outer product of its inputs, a row of pointers, with
   the tap's packed weights. No patch matrix is built. */
static void conv_task(void *arg, int task, int thread) {
    const struct conv_job *job = arg;
    const struct conv *conv = job->conv;
    int k = conv->size, taps = k * k, side = job->g.side_out;
    int p0 = task * CONV_PIXELS, n = side * side - p0;
    int64_t ldp = (int64_t)conv->w.cols * PANEL;
    const float *a[9][CONV_PIXELS];
    float sum[CONV_PIXELS * PANEL_2];
    (void)thread;
    if (n > CONV_PIXELS) n = CONV_PIXELS;
    for (int i = 0; i < n; i++) {
        int y = (p0 + i) / side, x = (p0 + i) % side;
        for (int t = 0; t < taps; t++) a[t][i] = conv_input(job, y, x, t / k, t % k);
    }
    for (int s = 0; s < job->panels; s += 2) {
        const float *w = job->s->packed + s * ldp;
        int panels = job->panels - s < 2 ? 1 : 2;
        for (int t = 0; t < taps; t++, w += job->c_in * PANEL)
            matmul_panels(job->e->kern, n, job->c_in, a[t], w, ldp, panels, sum, PANEL_2, t > 0);
        store_pixels(job, p0, n, job->panel0 + s, sum);
    }
}

static int panels_of(const struct conv_job *job) { return (job->c_out + PANEL - 1) / PANEL; }

static void run_direct(struct conv_job *job) {
    int panels = panels_of(job), pixels = job->g.side_out * job->g.side_out;
    int piece = (int)max64(2, CONV_PIECE / ((int64_t)job->conv->w.cols * PANEL) / 2 * 2);
    for (; job->panel0 < panels; job->panel0 += piece) {
        job->panels = panels - job->panel0 < piece ? panels - job->panel0 : piece;
        pool_run(job->e->pool, job->panels, pack_conv_task, job);
        pool_run(job->e->pool, (pixels + CONV_PIXELS - 1) / CONV_PIXELS, conv_task, job);
    }
}

/* ---- Winograd ----

   Four by four output pixels, a tile, come from 6 x 6 inputs d and 3 x 3 filters g (chapter 3) as

       out = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A      with * element by element,

   so for each of the 36 elements the sum over channels is a product of matrices, M = V U, with
   V [tiles][c_in] the transformed inputs and U [c_in][c_out] the transformed filters: 36 products
   for 16 pixels, where nine taps take 144. What it costs is three transforms, so each of them is
   done where its result is used at once and V, U and M need not leave the caches:

       many tiles   a task takes a block of tiles, computes its V, and multiplies all of U, which
                    was computed once before and is shared
       few tiles    where c_in c_out is large: all of V is computed first and shared; a task takes
                    two panels of output channels and computes their U, CHANNEL_CHUNK inputs at a
                    time

   Inputs are gathered into patches of a few tiles first. There padding becomes zeros, doubled
   pixels are copied, and GroupNorm and SiLU in front of the convolution happen in passing. */

/* Floats between the elements of V, M, U or filters; the odd line keeps them out of the same cache
   sets. */
static int64_t winograd_stride(int tiles, int width) { return (int64_t)tiles * width + PANEL; }

static int uses_winograd(const struct conv_job *job) {
    return job->conv->size == 3 && job->g.stride == 1 && job->g.pad == 1 && job->c_in % 8 == 0;
}

/* Tiles of a task when there are many: a multiple of every tile's rows. */
static int winograd_block(int c_in) {
    int n = WINO_V / (WINO_POINTS * c_in) / 24 * 24;
    return n < 24 ? 24 : n > WINO_TILES ? WINO_TILES : n;
}

/* Scratch floats of a thread for any convolution from up to c channels. */
static int64_t winograd_scratch(int c) {
    int64_t v = max64(WINO_V, WINO_POINTS * 24 * (int64_t)c) + WINO_POINTS * PANEL;
    int64_t many = v + 6 * (4 * PATCH_TILES + 2) * (int64_t)c;
    int64_t few = (9 + 2 * WINO_POINTS) * winograd_stride(CHANNEL_CHUNK, PANEL);
    int64_t filters = 2 * 9 * winograd_stride(c, PANEL);
    return max64(filters, max64(many, few) + WINO_POINTS * winograd_stride(WINO_TILES, PANEL_2));
}

/* The inputs of n tiles side by side: patch[6][4 n + 2][c_in]. */
static void fill_patch(const struct conv_job *job, int tile, int n, float *patch) {
    const struct conv_geometry *g = &job->g;
    int c = job->c_in, y0 = tile / job->across * 4 - 1, x0 = tile % job->across * 4 - 1;
    int first = x0 < 0 ? 0 : x0, last = x0 + 4 * n + 2 < g->side_out ? x0 + 4 * n + 2 : g->side_out;
    for (int y = y0; y < y0 + 6; y++, patch += (int64_t)(4 * n + 2) * c) {
        const float *line = job->in + (int64_t)(y >> g->up) * g->side_in * c;
        float *to = patch + (int64_t)(first - x0) * c;
        if (y < 0 || y >= g->side_out || first > x0 || last < x0 + 4 * n + 2)
            memset(patch, 0, (size_t)(4 * n + 2) * (size_t)c * sizeof *patch);
        if (y < 0 || y >= g->side_out) continue;
        if (job->normed)
            job->e->kern->conv.scale_shift(line + (int64_t)first * c, job->s->scale, job->s->shift,
                                           1, last - first, c, to);
        else if (!g->up)
            memcpy(to, line + (int64_t)first * c, (size_t)(last - first) * (size_t)c * sizeof *to);
        else
            for (int x = first; x < last; x++, to += c)
                memcpy(to, line + (int64_t)(x >> 1) * c, (size_t)c * sizeof *to);
    }
}

/* V of n tiles, one row of tiles after the other. */
static void winograd_inputs(const struct conv_job *job, int tile, int n, float *v, int64_t tap,
                        float *patch) {
    int64_t c = job->c_in;
    while (n > 0) {
        int run = job->across - tile % job->across;
        if (run > PATCH_TILES) run = PATCH_TILES;
        if (run > n) run = n;
        fill_patch(job, tile, run, patch);
        for (int i = 0; i < run; i++)
            job->e->kern->conv.winograd_input(patch + 4 * i * c, (4 * run + 2) * c, (int)c,
                                              v + i * c, tap);
        tile += run;
        n -= run;
        v += run * c;
    }
}

/* M = V U over channels c0 .. c0 + c - 1; M += V U where c0 > 0. */
struct winograd_product {
    const float *v, *u;     /* v[36][tiles][c_in], u[panels][36][c][16] */
    float *m;               /* [36][tiles][PANEL_2] */
    int64_t v_tap, u_panel; /* floats between elements of v, panels of u */
    int tiles, panels, c0, c;
};

static void winograd_products(const struct conv_job *job, const struct winograd_product *p) {
    int64_t m_tap = winograd_stride(p->tiles, PANEL_2);
    const float *a[WINO_TILES], *u = p->u;
    for (int t = 0; t < WINO_POINTS; t++, u += winograd_stride(p->c, PANEL)) {
        for (int i = 0; i < p->tiles; i++)
            a[i] = p->v + t * p->v_tap + (int64_t)i * job->c_in + p->c0;
        matmul_panels(job->e->kern, p->tiles, p->c, a, u, p->u_panel, p->panels, p->m + t * m_tap,
                      PANEL_2, p->c0 > 0);
    }
}

/* The pixels of one tile, one panel of channels, from M. */
static void winograd_pixels(const struct conv_job *job, int tile, int panel, const float *m,
                        int64_t tap) {
    int side = job->g.side_out, y0 = tile / job->across * 4, x0 = tile % job->across * 4,
        j0 = panel * PANEL;
    int h = side - y0, w = side - x0, cols = job->c_out - j0;
    int whole = h >= 4 && w >= 4 && cols >= PANEL;
    float edge[16 * PANEL] = {0}, bias[PANEL] = {0}, *out[16];
    const float *old[16];
    size_t bytes = (size_t)(cols < PANEL ? cols : PANEL) * sizeof *edge;
    memcpy(bias, floats(&job->conv->bias) + j0, bytes);
    for (int p = 0; p < 16; p++) {
        int64_t at = ((int64_t)(y0 + p / 4) * side + x0 + p % 4) * job->c_out + j0;
        out[p] = whole ? job->out + at : edge + p * PANEL;
        old[p] = whole && job->residual != NULL ? job->residual + at : edge + p * PANEL;
        if (!whole && p / 4 < h && p % 4 < w && job->residual != NULL)
            memcpy(edge + p * PANEL, job->residual + at, bytes);
    }
    job->e->kern->conv.winograd_output(m, tap, bias, job->residual != NULL ? old : NULL, out);
    for (int p = 0; !whole && p < 16; p++)
        if (p / 4 < h && p % 4 < w)
            memcpy(job->out + ((int64_t)(y0 + p / 4) * side + x0 + p % 4) * job->c_out + j0,
                   edge + p * PANEL, bytes);
}

static void winograd_outputs(const struct conv_job *job, int tile, int n, int panel, int panels,
                         const float *m) {
    for (int i = 0; i < n; i++)
        for (int s = 0; s < panels; s++)
            winograd_pixels(job, tile + i, panel + s, m + i * PANEL_2 + s * PANEL,
                            winograd_stride(n, PANEL_2));
}

/* Many tiles: all of U ... */
static void winograd_filters_task(void *arg, int panel, int thread) {
    const struct conv_job *job = arg;
    int64_t tap = winograd_stride(job->c_in, PANEL);
    float *w = exec_scratch(job->e, thread), *u = job->s->packed + panel * WINO_POINTS * tap;
    pack_conv(job, panel, 0, job->c_in, w + 9 * tap, tap, w);
    job->e->kern->conv.winograd_filter(w, job->c_in * PANEL, tap, u);
}

/* ... then each block of tiles. */
static void winograd_tiles_task(void *arg, int task, int thread) {
    const struct conv_job *job = arg;
    int c = job->c_in, panels = panels_of(job), block = winograd_block(c);
    int tile = task * block, n = job->tiles - tile < block ? job->tiles - tile : block;
    int64_t v_tap = winograd_stride(n, c), panel = WINO_POINTS * winograd_stride(c, PANEL);
    float *v = exec_scratch(job->e, thread), *m = v + WINO_POINTS * v_tap,
          *patch = m + WINO_POINTS * winograd_stride(n, PANEL_2);
    winograd_inputs(job, tile, n, v, v_tap, patch);
    for (int s = 0; s < panels; s += 2) {
        struct winograd_product p = {v,     job->s->packed + s * panel,  m, v_tap,
                                 panel, n, panels - s < 2 ? 1 : 2, 0, c};
        winograd_products(job, &p);
        winograd_outputs(job, tile, n, s, p.panels, m);
    }
}

/* Few tiles: all of V ... */
static void winograd_inputs_task(void *arg, int task, int thread) {
    const struct conv_job *job = arg;
    int first = task * PATCH_TILES,
        n = job->tiles - first < PATCH_TILES ? job->tiles - first : PATCH_TILES;
    winograd_inputs(job, job->tile0 + first, n,
                    job->s->packed + (int64_t)first * job->c_in,
                    winograd_stride(job->tiles, job->c_in), exec_scratch(job->e, thread));
}

/* ... then two panels of output channels at a time, and of them CHANNEL_CHUNK input channels. */
static void winograd_panels_task(void *arg, int task, int thread) {
    const struct conv_job *job = arg;
    int c = job->c_in, first = 2 * task, most = c < CHANNEL_CHUNK ? c : CHANNEL_CHUNK;
    int64_t room = winograd_stride(most, PANEL);
    float *w = exec_scratch(job->e, thread), *u = w + 9 * room, *m = u + 2 * WINO_POINTS * room;
    struct winograd_product p = {.v = job->s->packed, .u = u, .m = m, .tiles = job->tiles};
    p.v_tap = winograd_stride(job->tiles, c);
    p.panels = panels_of(job) - first < 2 ? 1 : 2;
    for (; p.c0 < c; p.c0 += CHANNEL_CHUNK) {
        p.c = c - p.c0 < CHANNEL_CHUNK ? c - p.c0 : CHANNEL_CHUNK;
        int64_t tap = winograd_stride(p.c, PANEL);
        p.u_panel = WINO_POINTS * tap;
        for (int s = 0; s < p.panels; s++) {
            pack_conv(job, first + s, p.c0, p.c, u + s * p.u_panel, tap, w);
            job->e->kern->conv.winograd_filter(w, p.c * PANEL, tap, u + s * p.u_panel);
        }
        winograd_products(job, &p);
    }
    winograd_outputs(job, job->tile0, job->tiles, first, p.panels, m);
}

static void run_winograd(struct conv_job *job) {
    struct pool *pool = job->e->pool;
    int panels = panels_of(job), block = winograd_block(job->c_in),
        all;
    job->across = (job->g.side_out + 3) / 4;
    job->tiles = all = job->across * job->across;
    if (all > WINO_TILES && panels * WINO_POINTS * winograd_stride(job->c_in, PANEL) <= WINO_U) {
        pool_run(pool, panels, winograd_filters_task, job);
        pool_run(pool, (all + block - 1) / block, winograd_tiles_task, job);
        return;
    }
    for (; job->tile0 < all; job->tile0 += WINO_TILES) {
        job->tiles = all - job->tile0 < WINO_TILES ? all - job->tile0 : WINO_TILES;
        pool_run(pool, (job->tiles + PATCH_TILES - 1) / PATCH_TILES, winograd_inputs_task, job);
        pool_run(pool, (panels + 1) / 2, winograd_panels_task, job);
    }
}

/* ---- Which way ---- */

static int conv2d_fast(struct conv_job *job) {
    if (uses_winograd(job)) run_winograd(job);
    else if (job->e->kern->conv.tiled) run_direct(job);
    else return 0;
    return 1;
}

/* Packing a panel takes 16 rows of c floats, the definition all taps of one channel. */
static int64_t conv2d_scratch(int c) { return max64(winograd_scratch(c), (int64_t)PANEL * c); }

static int64_t conv2d_packed(int c) {
    return max64(WINO_U, WINO_POINTS * winograd_stride(WINO_TILES, c));
}

/* ---- Attention on a quantised cache ----

   There keys and values are bytes with a scale for each 32 dimensions, in panels of 16 as in
   chapter 6; four bytes that meet in one sum lie side by side, and keys are stored as k + 128:

       k[16 panels][dp / 32] of {f16 scale[16 keys], uint8 [32 / 4][16 keys][4]}
       v[dp / 32][16 panels] of {f16 scale[16 values], int8 [16 / 4][32][4 values]}

   So queries and probabilities become integers too, and inside a block all sums are exact:

       q = dq x, |x| <= 127 * 256                score = sum over blocks of (dk dq) (k . x)
       p dv = dw w, 0 <= w < 2^15                o = dw (sum of w v over a page's keys)

   where dq belongs to 32 dimensions, dw to a page's 256 keys of 32 dimensions. What is rounded
   there is 2^-16 of the largest, 256 times less than in the cache. Machines that multiply bytes
   take x = 256 hi + lo with hi and lo signed, w = 256 hi + lo with both unsigned, and keys with
   their zero point of 128, so that one side of each product is unsigned. */

#define MAX_Q16 32512.0f /* 127 * 256: hi and lo stay signed bytes */
#define MAX_P15 32767.0f /* 256 w v fit 32 bits */

/* k is a multiple of QK. */
static void quantize_query_plain(const float *q, struct query_block *x, int k) {
    for (; k > 0; k -= QK, q += QK, x++) {
        float amax = 0;
        int32_t sum = 0;
        for (int i = 0; i < QK; i++) amax = larger_magnitude(q[i], amax);
        float id = amax <= MIN_AMAX ? 0 : MAX_Q16 / amax;
        for (int i = 0; i < QK; i++) {
            x->x.s16[i] = (int16_t)rintf(q[i] * id);
            sum += x->x.s16[i];
        }
        x->d = amax <= MIN_AMAX ? 0 : amax / MAX_Q16;
        x->zero_point = -128 * sum;
    }
}

/* The f16 scale of key or value i in front of its panel's bytes. */
static float kv8_scale(const uint8_t *panel, int i) {
    uint16_t d = 0;
    memcpy(&d, panel + 2 * i, sizeof d);
    return f16_to_f32(d);
}

/* s[r][16 panels], lds apart: rows of queries against panels of keys of 32 groups dimensions. */
static void k8_scores_plain(const uint8_t *keys, int groups, int panels,
                            const struct query_block *q, int rows, float *s, int lds) {
    for (int p = 0; p < panels * PANEL; p++)
        for (int r = 0; r < rows; r++) {
            float score = 0;
            for (int g = 0; g < groups; g++) {
                const uint8_t *panel = keys + ((int64_t)p / PANEL * groups + g) * KV8_PANEL;
                const uint8_t *k = panel + 2 * PANEL + p % PANEL * 4;
                const struct query_block *x = q + r * groups + g;
                int32_t sum = x->zero_point;
                for (int i = 0; i < QK; i++) sum += k[i / 4 * 4 * PANEL + i % 4] * x->x.s16[i];
                score = fma_f32((float)sum, kv8_scale(panel, p % PANEL) * x->d, score);
            }
            s[(int64_t)r * lds + p] = score;
        }
}

/* w for 32 dimensions of a page; returns dw. Probabilities and scales are not negative. */
static float quantize_p_plain(const float *p, const uint8_t *values, int panels, int32_t *w) {
    float weighted[KV_BLOCK], most = 0;
    for (int i = 0; i < panels * PANEL; i++) {
        weighted[i] = p[i] * kv8_scale(values + (int64_t)i / PANEL * KV8_PANEL, i % PANEL);
        most = weighted[i] > most ? weighted[i] : most;
    }
    float id = most > MIN_AMAX ? MAX_P15 / most : 0;
    for (int i = 0; i < panels * PANEL; i++) {
        float x = rintf(weighted[i] * id);
        w[i] = x > 0 ? (int32_t)x : 0; /* NaN counts as 0 */
    }
    return most > MIN_AMAX ? most / MAX_P15 : 0;
}

/* o[r][32 groups], ldo apart: a page's values weighted by each row's probabilities, which are 0
   behind its last key. A group's panels lie KV_BLOCK / PANEL panels behind those of the one before.
   What lies at next will be read behind the values. */
static void v8_sums_plain(const uint8_t *values, int groups, int panels, const float *const *p,
                          int rows, const uint8_t *next, float *o, int ldo) {
    (void)next;
    for (int g = 0; g < groups; g++, values += KV_BLOCK / PANEL * KV8_PANEL, o += QK)
        for (int r = 0; r < rows; r++) {
            int32_t w[KV_BLOCK], sum[QK] = {0};
            float d = quantize_p_plain(p[r], values, panels, w);
            for (int key = 0; key < panels * PANEL; key++) {
                const uint8_t *panel = values + (int64_t)key / PANEL * KV8_PANEL + 2 * PANEL;
                const int8_t *v = (const int8_t *)panel + key % PANEL / 4 * 4 * QK + key % 4;
                for (int i = 0; i < QK; i++) sum[i] += w[key] * v[4 * i];
            }
            for (int i = 0; i < QK; i++) o[(int64_t)r * ldo + i] = (float)sum[i] * d;
        }
}

static void store_kv8(const struct kernels *kern, const struct kv_cache *kv, uint8_t *head, int at,
                      const float *k, const float *v) {
    int groups = kv->dp / QK, column = at % PANEL;
    uint8_t *keys = head + (int64_t)at / PANEL * groups * KV8_PANEL;
    uint8_t *values = head + kv->head_bytes + (int64_t)at / PANEL * KV8_PANEL;
    for (int g = 0; g < groups; g++, keys += KV8_PANEL, values += KV_BLOCK / PANEL * KV8_PANEL) {
        struct q8_0 block;
        kern->attention.to_q8_0(k + g * QK, &block, QK);
        memcpy(keys + 2 * column, &block.d, 2);
        for (int i = 0; i < QK; i += 4) {
            uint32_t four = 0;
            memcpy(&four, block.q + i, sizeof four);
            four ^= 0x80808080; /* each + 128 */
            memcpy(keys + 2 * PANEL + i * PANEL + 4 * column, &four, sizeof four);
        }
        kern->attention.to_q8_0(v + g * QK, &block, QK);
        memcpy(values + 2 * column, &block.d, 2);
        if ((block.d & 0x7c00) == 0x7c00) /* not finite: only k8_scores keeps it */
            memcpy(keys + 2 * column, &block.d, 2);
        uint8_t *to = values + 2 * PANEL + column / 4 * 4 * QK + column % 4;
        for (int i = 0; i < QK; i++) to[4 * i] = (uint8_t)block.q[i];
    }
}

/* Step by step attend_block (chapter 3), with integers for the two products. */
static void attend_block_kv8(const struct kernels *kern, const struct kv_cache *kv,
                             const uint8_t *head, const uint8_t *next, struct query *rows, int n,
                             float scale, float *scratch) {
    float *s = scratch, *o = scratch + QUERY_ROWS * KV_BLOCK, m[QUERY_ROWS], l[QUERY_ROWS];
    const float *p[QUERY_ROWS] = {NULL};
    int groups = kv->dp / QK, keys = 0;
    for (int r = 0; r < n; r++) {
        p[r] = s + r * KV_BLOCK;
        keys = rows[r].keys > keys ? rows[r].keys : keys;
    }
    int panels = (keys + PANEL - 1) / PANEL;
    kern->attention.k8_scores(head, groups, panels, rows[0].x, n, s, KV_BLOCK);
    for (int r = 0; r < n; r++)
        l[r] =
            kern->attention.softmax(s + r * KV_BLOCK, panels * PANEL, rows[r].keys, scale, &m[r]);
    kern->attention.v8_sums(head + kv->head_bytes, groups, panels, p, n, next, o, kv->dp);
    for (int r = 0; r < n; r++)
        online_softmax_merge(kern, &rows[r], o + (int64_t)r * kv->dp, m[r], l[r], kv->dp);
}

/* =================================================================================================
   Chapter 13.  Fast kernels: AVX2, AVX-512, NEON

   Each kernel of chapters 3 and 12 again, for processors that multiply 4 to 16 floats at a time.
   What makes them fast is only this: enough independent accumulators that a multiply-add can start
   every half cycle (two units, four cycles of latency: eight or more), and as few loads as possible
   for each of them, because a tile of r x c sums reads r + c vectors for r c multiply-adds.

       dot tile    4 rows x 3 rows (AVX2, NEON), 5 x 4 (AVX-512): 7 loads for 12, 9 for 20
       outer tile  6 rows x 16 columns (AVX2), 8 x 32 (AVX-512), 4 x 16 (NEON): packed panels and
                   broadcast rows
       int tile    four bytes of a row to a 32-bit lane, 16 rows of weights interleaved, so that
                   lane j is row j. AVX-512 VNNI does four products a lane, one side unsigned:
                   weights are packed as w + 128, and sum q (w + 128) = sum q w + 128 sum q is put
                   right by beginning at the zero point, -128 sum q. AVX2 adds products of bytes in
                   pairs of 16 bits, one side unsigned too, where 255 x 127 would overflow: |w|
                   times x with w's sign does not. NEON multiplies signed bytes as they are. 8 rows
                   x 2 panels (AVX-512): 10 loads for 16 products; 4 x 1 (AVX2, NEON).
       int row     eight rows of weights at a time, interleaved on the way so that lane j is row j,
                   and multiplied by up to four rows of activations. NEON takes four rows and adds
                   across lanes by a tree of horizontal additions.
       k8, v8      attention on a quantised cache multiplies integers of 16 and 8 bits (chapter 12).
                   AVX-512 takes two byte products for one, four dimensions of 16 keys to a vector,
                   four rows x two panels of sums; AVX2 and NEON widen the bytes to 16 bits.

   What each stage costs at least, and where the rest of its time goes (a transformer of 22 layers,
   width 1024; the published tokenizer; `lvm bench --config 300m` measures it, docs/performance.md
   has figures):

       generate    a token behind 3840 others reads all weights and the cache once: 300 + 184 MB
                   over the read bandwidth. Nothing else counts until the products wait for no
                   memory, hence the prefetches, without which the same products take twice as long.
       prefill     0.55 GOP of integer products and 0.17 GOP of attention a token, the latter twice
                   because its numbers have two bytes. A block of 32 products costs AVX-512 eight
                   instructions and its scaling three more (convert, product of scales,
                   multiply-add), so 8/11 of the peak is all there is, or 8/10 where conversions
                   have a pipe of their own.
       an image    216 GFLOP to encode and 477 to decode as direct convolutions, 65 and 124 with
                   Winograd's transforms (chapter 12). More than half of the time is the products,
                   at 60 to 80 % of the peak, for U comes from the L3 cache; the rest is GroupNorm
                   and SiLU, which normalise 1.6 pixels for each one because patches overlap, the
                   transforms, and convolutions of stride 2.

   Compilers keep an array of accumulators in registers only when its loops are unrolled: UNROLL. */

static const struct kernels kernels_plain = {
    .name = "scalar",
    .matmul = {.dot_rows = PLAIN_ROWS,
               .dot_cols = PLAIN_COLS,
               .int_rows = PLAIN_ROWS,
               .int_panels = 1,
               .outer_rows = PLAIN_OUTER,
               .outer_panels = PLAIN_PANELS,
               .pack_bytes = PLAIN_PACK,
               .dot_row = dot_row_plain,
               .dot_tile = dot_tile_plain,
               .quantize_act = quantize_act_plain,
               .int_row = int_row_plain,
               .int_pack = int_pack_plain,
               .int_tile = int_tile_plain,
               .outer_row = outer_row_plain,
               .outer_tile = outer_tile_plain},
    .conv = {.tiled = 0,
             .pack_panel = pack_panel_plain,
             .winograd_filter = winograd_filter_plain,
             .winograd_input = winograd_input_plain,
             .winograd_output = winograd_output_plain,
             .scale_shift = scale_shift_plain,
             .channel_sums = channel_sums_plain},
    .attention = {.softmax = softmax_plain,
                  .quantize_query = quantize_query_plain,
                  .k8_scores = k8_scores_plain,
                  .v8_sums = v8_sums_plain,
                  .to_q8_0 = quantize_q8_0},
    .elementwise = {.rmsnorm = rmsnorm_plain, .silu_mul = silu_mul_plain, .to_f32 = row_to_f32}};

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE inline __attribute__((always_inline))

/* ---- Winograd's transforms, eight channels at a time ----

   The operations of chapter 12 on vectors that compilers know themselves: each instruction set's
   kernels below are these, compiled for it. */

typedef float vec8 __attribute__((vector_size(32))); /* and where memory is not aligned: */
typedef float vec8u __attribute__((vector_size(32), aligned(4), may_alias));

static INLINE void winograd_input_8(const vec8 *d, int from, vec8 *v, int to) {
    vec8 p = d[4 * from] - WINO_BB * d[2 * from], q = WINO_A * (d[3 * from] - WINO_BB * d[from]);
    vec8 r = d[4 * from] - WINO_AA * d[2 * from], s = WINO_B * (d[3 * from] - WINO_AA * d[from]);
    v[0] = WINO_AA * WINO_BB * d[0] - (WINO_AA + WINO_BB) * d[2 * from] + d[4 * from];
    v[to] = p + q;
    v[2 * to] = p - q;
    v[3 * to] = r + s;
    v[4 * to] = r - s;
    v[5 * to] = WINO_AA * WINO_BB * d[from] - (WINO_AA + WINO_BB) * d[3 * from] + d[5 * from];
}

static INLINE void winograd_output_8(const vec8 *m, int from, vec8 *y, int to) {
    vec8 p = m[from] + m[2 * from], q = WINO_A * (m[from] - m[2 * from]);
    vec8 r = m[3 * from] + m[4 * from], s = WINO_B * (m[3 * from] - m[4 * from]);
    y[0] = m[0] + p + r;
    y[to] = q + s;
    y[2 * to] = WINO_AA * p + WINO_BB * r;
    y[3 * to] = WINO_AA * q + WINO_BB * s + m[5 * from];
}

static INLINE void winograd_filter_8(const vec8 *g, vec8 *u, int to) {
    vec8 p = WINO_P * g[0] + WINO_AA * WINO_P * g[2], q = WINO_A * WINO_P * g[1];
    vec8 r = WINO_Q * g[0] + WINO_BB * WINO_Q * g[2], s = WINO_B * WINO_Q * g[1];
    u[0] = g[0] * (1 / (WINO_AA * WINO_BB));
    u[to] = p + q;
    u[2 * to] = p - q;
    u[3 * to] = r + s;
    u[4 * to] = r - s;
    u[5 * to] = g[2];
}

static INLINE void winograd_filter_vec(const float *w, int n, int64_t tap, float *u) {
    for (int i = 0; i < n; i += 8) {
        vec8 t[18], g[3], all[6];
        UNROLL for (int x = 0; x < 3; x++) {
            UNROLL for (int y = 0; y < 3; y++)
                g[y] = *(const vec8u *)(w + (3 * y + x) * tap + i);
            winograd_filter_8(g, t + x, 3);
        }
        UNROLL for (int y = 0; y < 6; y++) {
            winograd_filter_8(t + 3 * y, all, 1);
            UNROLL for (int x = 0; x < 6; x++) *(vec8u *)(u + (6 * y + x) * tap + i) = all[x];
        }
    }
}

static INLINE void winograd_input_vec(const float *patch, int64_t line, int c, float *v,
                                      int64_t tap) {
    for (int i = 0; i < c; i += 8) {
        vec8 t[36], d[6];
        UNROLL for (int x = 0; x < 6; x++) {
            UNROLL for (int y = 0; y < 6; y++)
                d[y] = *(const vec8u *)(patch + y * line + x * c + i);
            winograd_input_8(d, 1, t + x, 6);
        }
        UNROLL for (int y = 0; y < 6; y++) {
            winograd_input_8(t + 6 * y, 1, d, 1);
            UNROLL for (int x = 0; x < 6; x++) *(vec8u *)(v + (6 * y + x) * tap + i) = d[x];
        }
    }
}

static INLINE void winograd_output_vec(const float *m, int64_t tap, const float *bias,
                                   const float *const *residual, float *const *out) {
    for (int j = 0; j < PANEL; j += 8) {
        vec8 t[24], d[6];
        UNROLL for (int x = 0; x < 6; x++) {
            UNROLL for (int y = 0; y < 6; y++) d[y] = *(const vec8u *)(m + (6 * y + x) * tap + j);
            winograd_output_8(d, 1, t + x, 6);
        }
        UNROLL for (int y = 0; y < 4; y++) {
            winograd_output_8(t + 6 * y, 1, d, 1);
            UNROLL for (int x = 0; x < 4; x++) {
                vec8 sum = d[x] + *(const vec8u *)(bias + j);
                if (residual != NULL) sum += *(const vec8u *)(residual[4 * y + x] + j);
                *(vec8u *)(out[4 * y + x] + j) = sum;
            }
        }
    }
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c,prfchw")))
#define AVX512                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prfchw")))

#if defined(_WIN32) && !defined(__clang__)
/* GCC takes Windows' stack to be aligned to 32 bytes where it is to 16 (its bug 54412, mended in
   some builds), so the assembler makes of moves that insist on alignment those that do not. */
__asm__(".macro vmovaps args:vararg\n\tvmovups \\args\n.endm\n"
        ".macro vmovapd args:vararg\n\tvmovupd \\args\n.endm\n"
        ".macro vmovdqa args:vararg\n\tvmovdqu \\args\n.endm\n"
        ".macro vmovdqa32 args:vararg\n\tvmovdqu32 \\args\n.endm\n"
        ".macro vmovdqa64 args:vararg\n\tvmovdqu64 \\args\n.endm\n");
#endif

static int32_t load_s32(const void *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* ---- AVX2: floats ---- */

enum { A2_ROWS = 4, A2_COLS = 3, A2_OUTER = 6, A2_PANELS = 1, A2_PACK = PANEL * (4 + QK) };

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

AVX2 static void outer_tile_avx2(int k, const float *const *a, const float *b, int64_t ldp,
                                 int panels, float *c, int ldc, int accumulate) {
    (void)ldp, (void)panels;
    __m256 sum[A2_OUTER][2];
    const float *rows[A2_OUTER];
    UNROLL for (int r = 0; r < A2_OUTER; r++) {
        rows[r] = a[r];
        sum[r][0] = accumulate ? _mm256_loadu_ps(c + r * ldc) : _mm256_setzero_ps();
        sum[r][1] = accumulate ? _mm256_loadu_ps(c + r * ldc + 8) : _mm256_setzero_ps();
    }
    for (int i = 0; i < k; i++, b += PANEL) {
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

/* One row, four panels: eight independent sums. */
AVX2 static void outer_4_panels_avx2(int k, const float *a, const float *b, int64_t ldp, float *c,
                                     int accumulate) {
    __m256 sum[8];
    UNROLL for (int s = 0; s < 8; s++)
        sum[s] = accumulate ? _mm256_loadu_ps(c + s * 8) : _mm256_setzero_ps();
    for (int i = 0; i < k; i++, b += PANEL) {
        __m256 va = _mm256_broadcast_ss(a + i);
        UNROLL for (int s = 0; s < 4; s++) {
            sum[2 * s] = _mm256_fmadd_ps(va, _mm256_loadu_ps(b + s * ldp), sum[2 * s]);
            sum[2 * s + 1] =
                _mm256_fmadd_ps(va, _mm256_loadu_ps(b + s * ldp + 8), sum[2 * s + 1]);
        }
    }
    UNROLL for (int s = 0; s < 8; s++) _mm256_storeu_ps(c + s * 8, sum[s]);
}

AVX2 static void outer_row_avx2(int k, const float *a, const float *b, int64_t ldp, int panels,
                                float *c, int accumulate) {
    for (; panels >= 4; panels -= 4, b += 4 * ldp, c += 4 * PANEL)
        outer_4_panels_avx2(k, a, b, ldp, c, accumulate);
    for (; panels > 0; panels--, b += ldp, c += PANEL) {
        __m256 s0 = accumulate ? _mm256_loadu_ps(c) : _mm256_setzero_ps();
        __m256 s1 = accumulate ? _mm256_loadu_ps(c + 8) : _mm256_setzero_ps();
        for (int i = 0; i < k; i++) {
            __m256 va = _mm256_broadcast_ss(a + i);
            s0 = _mm256_fmadd_ps(va, _mm256_loadu_ps(b + i * PANEL), s0);
            s1 = _mm256_fmadd_ps(va, _mm256_loadu_ps(b + i * PANEL + 8), s1);
        }
        _mm256_storeu_ps(c, s0);
        _mm256_storeu_ps(c + 8, s1);
    }
}

/* ---- AVX2: quantised blocks ---- */

/* 16 bytes of each of eight rows, interleaved: v[i] is four bytes of row 0, four of row 1, ... */
AVX2 static INLINE void interleave_rows(const uint8_t *const *rows, int64_t at, __m256i *v) {
    __m256i r[4], t[4];
    UNROLL for (int j = 0; j < 4; j++)
        r[j] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(rows[j] + at))),
            _mm_loadu_si128((const __m128i *)(const void *)(rows[j + 4] + at)), 1);
    UNROLL for (int j = 0; j < 2; j++) {
        t[j] = _mm256_unpacklo_epi32(r[2 * j], r[2 * j + 1]);
        t[j + 2] = _mm256_unpackhi_epi32(r[2 * j], r[2 * j + 1]);
    }
    UNROLL for (int j = 0; j < 2; j++) {
        v[2 * j] = _mm256_unpacklo_epi64(t[2 * j], t[2 * j + 1]);
        v[2 * j + 1] = _mm256_unpackhi_epi64(t[2 * j], t[2 * j + 1]);
    }
}

/* A block of eight rows interleaved, as the bytes that they are: Q8_0's signed, Q4_0's from 0 to
   15. */
AVX2 static INLINE void interleave_block(int type, const uint8_t *const *rows, int64_t b,
                                         __m256i *v) {
    if (type == LVM_Q8_0) {
        interleave_rows(rows, b * 34 + 2, v);
        interleave_rows(rows, b * 34 + 18, v + 4);
        return;
    }
    interleave_rows(rows, b * 18 + 2, v);
    UNROLL for (int i = 0; i < 4; i++) {
        v[i + 4] = _mm256_and_si256(_mm256_srli_epi16(v[i], 4), _mm256_set1_epi8(15));
        v[i] = _mm256_and_si256(v[i], _mm256_set1_epi8(15));
    }
}

/* The f16 scales of block b of eight rows. */
AVX2 static __m256 block_scales(const uint8_t *const *rows, int64_t at) {
    uint16_t d[8];
    UNROLL for (int j = 0; j < 8; j++) memcpy(&d[j], rows[j] + at, 2);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)d));
}

/* What is read once comes from memory faster when it is prefetched in time: processors' own
   prefetchers stop at each page, and do not follow eight rows a few hundred bytes apart.
   PREFETCH_L2 is how many bytes ahead the L2 cache is filled. Always inlined: gcc drops calls of a
   function that does nothing else. */
enum { PREFETCH_L2 = 8192 };

AVX2 static INLINE void prefetch_l2(const uint8_t *at, int bytes) {
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)at + PREFETCH_L2 + i, _MM_HINT_T1);
}

/* The same for keys and values, into L1 and, further ahead, L2: */
enum { KV_PREFETCH_L1 = 4096, KV_PREFETCH_L2 = 12288 };

AVX2 static INLINE void prefetch_l1_l2(const uint8_t *l1, const uint8_t *l2, int bytes) {
    for (int i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)l1 + i, _MM_HINT_T0);
        _mm_prefetch((const char *)l2 + i, _MM_HINT_T1);
    }
}

/* Behind the end of a page's values comes next. */
AVX2 static INLINE void prefetch_values(const uint8_t *at, int bytes, const uint8_t *end,
                                        const uint8_t *next) {
    const uint8_t *l1 = at + KV_PREFETCH_L1, *l2 = at + KV_PREFETCH_L2;
    prefetch_l1_l2(l1 < end ? l1 : next + (l1 - end), l2 < end ? l2 : next + (l2 - end), bytes);
}

/* What will be read behind block b of eight rows of weights. Into L1: block b of the eight rows
   that follow these; where so many would fill more than half of L1, what lies ROW_PREFETCH_L1 bytes
   further in each row (behind its end, eight rows further), about once a cache line of 64 bytes.
   Into L2: what lies PREFETCH_L2 bytes behind that block. */
enum { ROW_PREFETCH_L1 = 768, HALF_L1 = 16384 };

AVX2 static INLINE void prefetch_weights(const uint8_t *const *rows, int b, int blocks, int bytes) {
    int64_t row = (int64_t)blocks * bytes, to = (int64_t)b * bytes + ROW_PREFETCH_L1;
    const uint8_t *following = rows[0] + 8 * (row + (int64_t)b * bytes);
    if (8 * row <= HALF_L1) {
        for (int i = 0; i < 8 * bytes; i += 64)
            _mm_prefetch((const char *)following + i, _MM_HINT_T0);
    } else if (b % (64 / bytes + 1) == 0) {
        if (to >= row) to += 7 * row;
        UNROLL for (int j = 0; j < 8; j++) _mm_prefetch((const char *)rows[j] + to, _MM_HINT_T0);
    }
    prefetch_l2(following, 8 * bytes);
}

/* Byte products in pairs, |w| times x with w's sign, which keeps them below 2^15, then fours. */
AVX2 static INLINE __m256i add_products(__m256i sum, __m256i x, __m256i w) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* A block of activations times eight rows of Q8_0, interleaved, or of Q4_0, 8 more than they are:
   there all eight products fit 16 bits. */
AVX2 static INLINE __m256i products_avx2(int type, const struct act_block *x, const __m256i *w) {
    __m256i sum = _mm256_setzero_si256(), pairs = sum;
    if (type == LVM_Q8_0) {
        UNROLL for (int i = 0; i < 8; i++)
            sum = add_products(sum, _mm256_set1_epi32(load_s32(x->q + 4 * i)), w[i]);
        return sum;
    }
    UNROLL for (int i = 0; i < 8; i++)
        pairs = _mm256_add_epi16(
            pairs, _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(load_s32(x->q + 4 * i))));
    return _mm256_add_epi32(_mm256_set1_epi32(x->zero_point / 16),
                            _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* Eight rows of weights, each loaded once for all n rows of activations. Interleaved so that a lane
   is a row of weights, they need no additions across lanes. */
AVX2 static INLINE void int_gemv_8_avx2(int type, int blocks, const struct act_block *x, int n,
                                        const uint8_t *const *rows, float (*c)[8]) {
    __m256 sum[GEMV_ROWS];
    int bytes = type == LVM_Q8_0 ? 34 : 18;
    UNROLL for (int r = 0; r < n; r++) sum[r] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        __m256i w[8];
        prefetch_weights(rows, b, blocks, bytes);
        interleave_block(type, rows, b, w);
        __m256 scales = block_scales(rows, (int64_t)b * bytes);
        UNROLL for (int r = 0; r < n; r++) {
            const struct act_block *xb = x + (int64_t)r * blocks + b;
            __m256 dot = _mm256_cvtepi32_ps(products_avx2(type, xb, w));
            sum[r] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scales, _mm256_set1_ps(xb->d)), sum[r]);
        }
    }
    UNROLL for (int r = 0; r < n; r++) _mm256_storeu_ps(c[r], sum[r]);
}

/* The arguments of the function around it for f, compiled for this type and each number of rows. */
#define FOR_EACH_GEMV_ROWS(f, type)                                                                \
    (n == 4   ? f(type, blocks, x, 4, rows, c)                                                     \
     : n == 3 ? f(type, blocks, x, 3, rows, c)                                                     \
     : n == 2 ? f(type, blocks, x, 2, rows, c)                                                     \
              : f(type, blocks, x, 1, rows, c))

AVX2 static void int_gemv_avx2(int type, int blocks, const struct act_block *x, int n,
                              const uint8_t *const *rows, float (*c)[8]) {
    if (type == LVM_Q8_0) FOR_EACH_GEMV_ROWS(int_gemv_8_avx2, LVM_Q8_0);
    else FOR_EACH_GEMV_ROWS(int_gemv_8_avx2, LVM_Q4_0);
}

/* c[n][8]: up to GEMV_ROWS rows of activations times eight rows of weights. */
typedef void int_gemv(int type, int blocks, const struct act_block *x, int n,
                     const uint8_t *const *rows, float (*c)[8]);

/* All rows of activations, GEMV_ROWS at a time, times n rows of weights, eight at a time. */
static INLINE void int_row_by_8(int_gemv *few, int type, int blocks, const struct act_block *x,
                                 int x_rows, const uint8_t *w, int64_t row_bytes, int n, float *c,
                                 int64_t ldc) {
    for (int j0 = 0; j0 < n; j0 += 8) {
        const uint8_t *rows[8];
        float out[GEMV_ROWS][8];
        int count = n - j0 < 8 ? n - j0 : 8;
        for (int j = 0; j < 8; j++) rows[j] = w + (j0 + (j < count ? j : count - 1)) * row_bytes;
        for (int r0 = 0; r0 < x_rows; r0 += GEMV_ROWS) {
            int at_once = x_rows - r0 < GEMV_ROWS ? x_rows - r0 : GEMV_ROWS;
            few(type, blocks, x + (int64_t)r0 * blocks, at_once, rows, out);
            for (int r = 0; r < at_once; r++)
                memcpy(c + (r0 + r) * ldc + j0, out[r], (size_t)count * sizeof *c);
        }
    }
}

AVX2 static void int_row_avx2(int type, int blocks, const struct act_block *x, int x_rows,
                              const uint8_t *w, int64_t row_bytes, int n, float *c, int64_t ldc) {
    int_row_by_8(int_gemv_avx2, type, blocks, x, x_rows, w, row_bytes, n, c, ldc);
}

/* Packed block: 16 scales, then for each four elements 16 rows of four bytes. */
AVX2 static void int_pack_avx2(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    int bytes = type == LVM_Q8_0 ? 34 : 18;
    for (int b = 0; b < blocks; b++, packed += A2_PACK)
        for (int half = 0; half < 2; half++) {
            const uint8_t *const *rows = w + 8 * half;
            __m256i q[8];
            interleave_block(type, rows, b, q);
            for (int i = 0; i < 8; i++) {
                if (type == LVM_Q4_0) q[i] = _mm256_sub_epi8(q[i], _mm256_set1_epi8(8));
                _mm256_storeu_si256((__m256i *)(void *)(packed + 4 * PANEL + 64 * i + 32 * half),
                                    q[i]);
            }
            _mm256_storeu_ps((float *)(void *)packed + 8 * half,
                             block_scales(rows, (int64_t)b * bytes));
        }
}

AVX2 static void int_tile_avx2(int blocks, const struct act_block *const *x, const uint8_t *packed,
                               int panels, float *c, int ldc) {
    (void)panels;
    __m256 sum[A2_ROWS][2];
    UNROLL for (int r = 0; r < A2_ROWS; r++) {
        sum[r][0] = sum[r][1] = _mm256_setzero_ps();
        __builtin_prefetch(c + r * ldc, 1);
    }
    for (int b = 0; b < blocks; b++, packed += A2_PACK) {
        __m256i acc[A2_ROWS][2];
        UNROLL for (int r = 0; r < A2_ROWS; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        const __m256i *q = (const __m256i *)(const void *)(packed + 4 * PANEL);
        for (int i = 0; i < QK / 4; i++) {
            __m256i w0 = _mm256_loadu_si256(q + 2 * i), w1 = _mm256_loadu_si256(q + 2 * i + 1);
            UNROLL for (int r = 0; r < A2_ROWS; r++) {
                __m256i four = _mm256_set1_epi32(load_s32(x[r][b].q + 4 * i));
                acc[r][0] = add_products(acc[r][0], four, w0);
                acc[r][1] = add_products(acc[r][1], four, w1);
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

AVX2 static float max8(__m256 x) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}

/* The largest magnitude of 32 floats, or NaN if one is: as integers they have the same order, and
   NaN lies above infinity. */
AVX2 static float max_magnitude(const float *x) {
    __m256i m = _mm256_setzero_si256(), magnitude = _mm256_set1_epi32(INT32_MAX);
    UNROLL for (int i = 0; i < QK; i += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)(x + i));
        m = _mm256_max_epi32(m, _mm256_and_si256(bits, magnitude));
    }
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(h));
}

/* 16 floats times id, rounded to numbers of 16 bits. */
AVX2 static __m256i scaled_s16(const float *x, __m256 id) {
    __m256i q0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), id));
    __m256i q1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), id));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8);
}

AVX2 static int32_t sum_s32(__m256i x) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

AVX2 static void quantize_act_avx2(const float *x, struct act_block *y, int k) {
    __m256i ones = _mm256_set1_epi16(1);
    for (int b = 0; b < k / QK; b++, x += QK) {
        float amax = max_magnitude(x);
        __m256 id = _mm256_set1_ps(amax <= MIN_AMAX ? 0 : 127 / amax);
        __m256i q0 = scaled_s16(x, id), q1 = scaled_s16(x + 16, id);
        y[b].d = amax <= MIN_AMAX ? 0 : amax / 127;
        y[b].zero_point = -128 * sum_s32(_mm256_add_epi32(_mm256_madd_epi16(q0, ones),
                                                     _mm256_madd_epi16(q1, ones)));
        _mm256_storeu_si256((__m256i *)(void *)y[b].q,
                            _mm256_permute4x64_epi64(_mm256_packs_epi16(q0, q1), 0xd8));
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

/* x rounded to the nearest integer, halves away from zero, within -127 .. 127. */
AVX2 static __m256i nearest8(__m256 x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __m256 rest = _mm256_andnot_ps(sign, _mm256_sub_ps(x, whole));
    __m256 one = _mm256_or_ps(_mm256_set1_ps(1), _mm256_and_ps(sign, x));
    __m256 up = _mm256_cmp_ps(rest, _mm256_set1_ps(0.5f), _CMP_GE_OQ);
    whole = _mm256_add_ps(whole, _mm256_and_ps(up, one));
    whole = _mm256_min_ps(_mm256_max_ps(whole, _mm256_set1_ps(-127)), _mm256_set1_ps(127));
    return _mm256_cvtps_epi32(whole);
}

AVX2 static void to_q8_0_avx2(const float *x, void *out, int64_t k) {
    struct q8_0 *y = out;
    for (int64_t b = 0; b < k / QK; b++, x += QK) {
        float d = max_magnitude(x) / 127;
        __m256 id = _mm256_set1_ps(inverse(d));
        __m256i q[4];
        UNROLL for (int i = 0; i < 4; i++)
            q[i] = nearest8(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), id));
        __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        y[b].d = f32_to_f16(d);
        _mm256_storeu_si256((__m256i *)(void *)y[b].q, bytes);
    }
}

/* ---- AVX2: attention on a quantised cache ----

   A vector holds four keys' four dimensions as 16-bit numbers, or four dimensions' four values;
   one instruction multiplies them and adds neighbours, which leaves two sums to add at the end. */

AVX2 static void quantize_query_avx2(const float *q, struct query_block *x, int k) {
    for (; k > 0; k -= QK, q += QK, x++) {
        float amax = max_magnitude(q);
        __m256 id = _mm256_set1_ps(amax <= MIN_AMAX ? 0 : MAX_Q16 / amax);
        __m256i low = scaled_s16(q, id), high = scaled_s16(q + 16, id);
        __m256i one = _mm256_set1_epi16(1);
        _mm256_storeu_si256((__m256i *)(void *)x->x.s16, low);
        _mm256_storeu_si256((__m256i *)(void *)(x->x.s16 + 16), high);
        x->d = amax <= MIN_AMAX ? 0 : amax / MAX_Q16;
        x->zero_point = -128 * sum_s32(_mm256_add_epi32(_mm256_madd_epi16(low, one),
                                                   _mm256_madd_epi16(high, one)));
    }
}

/* Sums of neighbours of two vectors, in their order. */
AVX2 static __m256i add_neighbours(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
}

/* Four numbers of 16 bits, four times. */
AVX2 static __m256i four_s16(const void *p) {
    int64_t four = 0;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi64x(four);
}

/* Eight scales. */
AVX2 static __m256 halves_to_f32(const void *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

/* Scores of n rows and 8 wide keys of a panel, of which the first is `first`. */
AVX2 static INLINE void k8_part_avx2(const uint8_t *panel, int groups, int first, int wide,
                                     const struct query_block *q, int n, float *s, int lds) {
    __m256 sum[GEMV_ROWS][2];
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int j = 0; j < wide; j++) sum[r][j] = _mm256_setzero_ps();
    for (int g = 0; g < groups; g++, panel += KV8_PANEL) {
        __m256i acc[GEMV_ROWS][4], k[4];
        UNROLL for (int r = 0; r < n; r++)
            UNROLL for (int j = 0; j < 2 * wide; j++) acc[r][j] = _mm256_setzero_si256();
        for (int i = 0; i < QK / 4; i++) {
            const uint8_t *at = panel + 2 * PANEL + 4 * (i * PANEL + first);
            UNROLL for (int j = 0; j < 2 * wide; j++)
                k[j] = _mm256_cvtepu8_epi16(
                    _mm_loadu_si128((const __m128i *)(const void *)(at + 16 * j)));
            UNROLL for (int r = 0; r < n; r++) {
                __m256i x = four_s16(q[r * groups + g].x.s16 + 4 * i);
                UNROLL for (int j = 0; j < 2 * wide; j++)
                    acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(k[j], x));
            }
        }
        UNROLL for (int j = 0; j < wide; j++) {
            __m256 d = halves_to_f32(panel + 2 * (first + 8 * j));
            UNROLL for (int r = 0; r < n; r++) {
                const struct query_block *x = q + r * groups + g;
                __m256i products = add_neighbours(acc[r][2 * j], acc[r][2 * j + 1]);
                products = _mm256_add_epi32(products, _mm256_set1_epi32(x->zero_point));
                sum[r][j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products),
                                            _mm256_mul_ps(d, _mm256_set1_ps(x->d)), sum[r][j]);
            }
        }
    }
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int j = 0; j < wide; j++)
            _mm256_storeu_ps(s + (int64_t)r * lds + first + 8 * j, sum[r][j]);
}

AVX2 static void k8_scores_avx2(const uint8_t *keys, int groups, int panels,
                                const struct query_block *q, int rows, float *s, int lds) {
    for (int p = 0; p < panels; p++, keys += (int64_t)groups * KV8_PANEL, s += PANEL) {
        int r = 0;
        if (rows <= GEMV_ROWS)
            prefetch_l1_l2(keys + KV_PREFETCH_L1, keys + KV_PREFETCH_L2, groups * KV8_PANEL);
        for (; r + GEMV_ROWS <= rows; r += GEMV_ROWS) {
            const struct query_block *x = q + r * groups;
            k8_part_avx2(keys, groups, 0, 1, x, GEMV_ROWS, s + (int64_t)r * lds, lds);
            k8_part_avx2(keys, groups, 8, 1, x, GEMV_ROWS, s + (int64_t)r * lds, lds);
        }
        for (; r < rows; r++)
            k8_part_avx2(keys, groups, 0, 2, q + r * groups, 1, s + (int64_t)r * lds, lds);
    }
}

AVX2 static float quantize_p_avx2(const float *p, const uint8_t *values, int panels, int16_t *w) {
    float weighted[KV_BLOCK];
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < panels * PANEL; i += 8) {
        __m256 d = halves_to_f32(values + (int64_t)i / PANEL * KV8_PANEL + 2 * (i % PANEL));
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(p + i), d);
        _mm256_storeu_ps(weighted + i, x);
        most = _mm256_max_ps(x, most);
    }
    float all = max8(most);
    __m256 id = _mm256_set1_ps(all > MIN_AMAX ? MAX_P15 / all : 0);
    for (int i = 0; i < panels * PANEL; i += 16) /* NaN came out as the least number */
        _mm256_storeu_si256((__m256i *)(void *)(w + i),
                            _mm256_max_epi16(scaled_s16(weighted + i, id),
                                             _mm256_setzero_si256()));
    return all > MIN_AMAX ? all / MAX_P15 : 0;
}

/* Sums of n rows and 8 wide dimensions of a group. */
AVX2 static INLINE void v8_part_avx2(const uint8_t *values, int panels, int first, int wide,
                                     int16_t (*w)[KV_BLOCK], const float *d, int n, float *o,
                                     int ldo) {
    __m256i acc[GEMV_ROWS][8], v[8];
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int j = 0; j < 2 * wide; j++) acc[r][j] = _mm256_setzero_si256();
    for (int i = 0; i < panels * PANEL / 4; i++) {
        const uint8_t *panel = values + (int64_t)i / 4 * KV8_PANEL;
        const uint8_t *at = panel + 2 * PANEL + i % 4 * 4 * QK + 4 * first;
        UNROLL for (int j = 0; j < 2 * wide; j++)
            v[j] = _mm256_cvtepi8_epi16(
                _mm_loadu_si128((const __m128i *)(const void *)(at + 16 * j)));
        UNROLL for (int r = 0; r < n; r++) {
            __m256i vw = four_s16(w[r] + 4 * i);
            UNROLL for (int j = 0; j < 2 * wide; j++)
                acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(v[j], vw));
        }
    }
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int j = 0; j < wide; j++) {
            __m256 sum = _mm256_cvtepi32_ps(add_neighbours(acc[r][2 * j], acc[r][2 * j + 1]));
            _mm256_storeu_ps(o + (int64_t)r * ldo + first + 8 * j,
                             _mm256_mul_ps(sum, _mm256_set1_ps(d[r])));
        }
}

AVX2 static void v8_sums_avx2(const uint8_t *values, int groups, int panels, const float *const *p,
                              int rows, const uint8_t *next, float *o, int ldo) {
    int16_t w[GEMV_ROWS][KV_BLOCK];
    float d[GEMV_ROWS];
    const uint8_t *end = values + (int64_t)groups * (KV_BLOCK / PANEL) * KV8_PANEL;
    for (int g = 0; g < groups; g++, values += KV_BLOCK / PANEL * KV8_PANEL, o += QK)
        for (int r = 0, n = 1; r < rows; r += n) {
            float *to = o + (int64_t)r * ldo;
            n = rows - r < GEMV_ROWS ? 1 : GEMV_ROWS;
            if (rows <= GEMV_ROWS && r == 0) prefetch_values(values, panels * KV8_PANEL, end, next);
            for (int i = 0; i < n; i++) d[i] = quantize_p_avx2(p[r + i], values, panels, w[i]);
            if (n == 1) v8_part_avx2(values, panels, 0, 4, w, d, 1, to, ldo);
            else
                for (int first = 0; first < QK; first += 8)
                    v8_part_avx2(values, panels, first, 1, w, d, GEMV_ROWS, to, ldo);
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

/* x . x, in dot's order. */
AVX2 static float squares_avx2(const float *x, int n) {
    __m256 sum = _mm256_setzero_ps(), v;
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        v = _mm256_loadu_ps(x + i);
        sum = _mm256_fmadd_ps(v, v, sum);
    }
    v = _mm256_maskload_ps(x + i, first_lanes(n - i));
    return sum8(_mm256_fmadd_ps(v, v, sum));
}

AVX2 static void rmsnorm_avx2(const float *x, const float *weight, float eps, int n, float *y) {
    float scale = 1 / sqrtf(squares_avx2(x, n) / (float)n + eps);
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
AVX2 static void scale_shift_avx2(const float *x, const float *scale, const float *shift,
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

/* Transposes 8 x 8 lanes of 32 bits in place. */
AVX2 static INLINE void transpose_8x8(__m256i *v) {
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

AVX2 static void pack_panel_avx2(const float *rows, int64_t ld, int k, float *panel) {
    int i = 0;
    for (; i + 8 <= k; i += 8)
        for (int half = 0; half < PANEL; half += 8) {
            __m256i v[8];
            UNROLL for (int j = 0; j < 8; j++)
                v[j] = _mm256_castps_si256(_mm256_loadu_ps(rows + (half + j) * ld + i));
            transpose_8x8(v);
            UNROLL for (int j = 0; j < 8; j++)
                _mm256_storeu_si256((__m256i *)(void *)(panel + (i + j) * PANEL + half), v[j]);
        }
    if (i < k) pack_panel_plain(rows + i, ld, k - i, panel + i * PANEL);
}

AVX2 static void winograd_filter_avx2(const float *w, int n, int64_t tap, float *u) {
    winograd_filter_vec(w, n, tap, u);
}

AVX2 static void winograd_input_avx2(const float *patch, int64_t line, int c, float *v,
                                 int64_t tap) {
    winograd_input_vec(patch, line, c, v, tap);
}

AVX2 static void winograd_output_avx2(const float *m, int64_t tap, const float *bias,
                                  const float *const *residual, float *const *out) {
    winograd_output_vec(m, tap, bias, residual, out);
}

static const struct kernels kernels_avx2 = {
    .name = "avx2",
    .matmul = {.dot_rows = A2_ROWS,
               .dot_cols = A2_COLS,
               .int_rows = A2_ROWS,
               .int_panels = 1,
               .outer_rows = A2_OUTER,
               .outer_panels = A2_PANELS,
               .pack_bytes = A2_PACK,
               .dot_row = dot_row_avx2,
               .dot_tile = dot_tile_avx2,
               .quantize_act = quantize_act_avx2,
               .int_row = int_row_avx2,
               .int_pack = int_pack_avx2,
               .int_tile = int_tile_avx2,
               .outer_row = outer_row_avx2,
               .outer_tile = outer_tile_avx2},
    .conv = {.tiled = 1,
             .pack_panel = pack_panel_avx2,
             .winograd_filter = winograd_filter_avx2,
             .winograd_input = winograd_input_avx2,
             .winograd_output = winograd_output_avx2,
             .scale_shift = scale_shift_avx2,
             .channel_sums = channel_sums_avx2},
    .attention = {.softmax = softmax_avx2,
                  .quantize_query = quantize_query_avx2,
                  .k8_scores = k8_scores_avx2,
                  .v8_sums = v8_sums_avx2,
                  .to_q8_0 = to_q8_0_avx2},
    .elementwise = {.rmsnorm = rmsnorm_avx2, .silu_mul = silu_mul_avx2, .to_f32 = to_f32_avx2}};

/* ---- AVX-512 ----

   Sums that are defined over eight lanes, and what is waiting for memory, stay AVX2's. */

enum { A5_ROWS = 5, A5_COLS = 4, A5_OUTER = 8, A5_PANELS = 2, A5_INT = 8 };
enum { A5_PACK = PANEL * (4 + QK) };

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

AVX512 static INLINE void outer_panels_avx512(int k, const float *const *a, const float *b,
                                              int64_t ldp, int panels, float *c, int ldc,
                                              int accumulate) {
    __m512 sum[A5_OUTER][A5_PANELS], vb[A5_PANELS];
    const float *rows[A5_OUTER];
    UNROLL for (int r = 0; r < A5_OUTER; r++) {
        rows[r] = a[r];
        UNROLL for (int s = 0; s < panels; s++)
            sum[r][s] = accumulate ? _mm512_loadu_ps(c + r * ldc + s * PANEL) : _mm512_setzero_ps();
    }
    for (int i = 0; i < k; i++, b += PANEL) {
        UNROLL for (int s = 0; s < panels; s++) vb[s] = _mm512_loadu_ps(b + s * ldp);
        UNROLL for (int r = 0; r < A5_OUTER; r++) {
            __m512 va = _mm512_set1_ps(rows[r][i]);
            UNROLL for (int s = 0; s < panels; s++)
                sum[r][s] = _mm512_fmadd_ps(va, vb[s], sum[r][s]);
        }
    }
    UNROLL for (int r = 0; r < A5_OUTER; r++)
        UNROLL for (int s = 0; s < panels; s++)
            _mm512_storeu_ps(c + r * ldc + s * PANEL, sum[r][s]);
}

AVX512 static void outer_tile_avx512(int k, const float *const *a, const float *b, int64_t ldp,
                                     int panels, float *c, int ldc, int accumulate) {
    if (panels == 2) outer_panels_avx512(k, a, b, ldp, 2, c, ldc, accumulate);
    else outer_panels_avx512(k, a, b, ldp, 1, c, ldc, accumulate);
}

AVX512 static void outer_8_panels_avx512(int k, const float *a, const float *b, int64_t ldp,
                                         float *c, int accumulate) {
    __m512 sum[8];
    UNROLL for (int s = 0; s < 8; s++)
        sum[s] = accumulate ? _mm512_loadu_ps(c + s * PANEL) : _mm512_setzero_ps();
    for (int i = 0; i < k; i++, b += PANEL) {
        __m512 va = _mm512_set1_ps(a[i]);
        UNROLL for (int s = 0; s < 8; s++)
            sum[s] = _mm512_fmadd_ps(va, _mm512_loadu_ps(b + s * ldp), sum[s]);
    }
    UNROLL for (int s = 0; s < 8; s++) _mm512_storeu_ps(c + s * PANEL, sum[s]);
}

AVX512 static void outer_row_avx512(int k, const float *a, const float *b, int64_t ldp,
                                    int panels, float *c, int accumulate) {
    for (; panels >= 8; panels -= 8, b += 8 * ldp, c += 8 * PANEL)
        outer_8_panels_avx512(k, a, b, ldp, c, accumulate);
    for (; panels > 0; panels--, b += ldp, c += PANEL) {
        __m512 sum = accumulate ? _mm512_loadu_ps(c) : _mm512_setzero_ps();
        for (int i = 0; i < k; i++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), _mm512_loadu_ps(b + i * PANEL), sum);
        _mm512_storeu_ps(c, sum);
    }
}

/* A block of eight rows interleaved, as unsigned bytes: Q8_0's plus 128; Q4_0's plus 8, of which
   those of the second half stay where they lie in their bytes, 16 times as large. */
AVX512 static INLINE void interleave_unsigned(int type, const uint8_t *const *rows, int64_t b,
                                        __m256i *w) {
    if (type == LVM_Q8_0) {
        interleave_block(type, rows, b, w);
        UNROLL for (int i = 0; i < 8; i++)
            w[i] = _mm256_xor_si256(w[i], _mm256_set1_epi8((char)128));
        return;
    }
    interleave_rows(rows, b * 18 + 2, w);
    UNROLL for (int i = 0; i < 4; i++) {
        w[i + 4] = _mm256_and_si256(w[i], _mm256_set1_epi8((char)0xf0));
        w[i] = _mm256_and_si256(w[i], _mm256_set1_epi8(15));
    }
}

/* Eight rows of weights, each loaded once for all n rows of activations. What unsigned weights add
   to a sum is taken away first. Four sums, because fewer would wait for themselves. */
AVX512 static INLINE void int_gemv_8_avx512(int type, int blocks, const struct act_block *x, int n,
                                            const uint8_t *const *rows, float (*c)[8]) {
    __m256 sum[GEMV_ROWS];
    int q8 = type == LVM_Q8_0, bytes = q8 ? 34 : 18;
    UNROLL for (int r = 0; r < n; r++) sum[r] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        __m256i w[8];
        prefetch_weights(rows, b, blocks, bytes);
        interleave_unsigned(type, rows, b, w);
        __m256 scales = block_scales(rows, (int64_t)b * bytes);
        UNROLL for (int r = 0; r < n; r++) {
            const struct act_block *xb = x + (int64_t)r * blocks + b;
            __m256i zero = _mm256_setzero_si256(), start = _mm256_set1_epi32(xb->zero_point),
                    p[4] = {zero, zero, start, zero}; /* two of each half */
            UNROLL for (int i = 0; i < 8; i++)
                p[i / 4 * 2 + i % 2] = _mm256_dpbusd_epi32(
                    p[i / 4 * 2 + i % 2], w[i], _mm256_set1_epi32(load_s32(xb->q + 4 * i)));
            __m256i half = _mm256_add_epi32(p[0], p[1]), other = _mm256_add_epi32(p[2], p[3]);
            __m256i products = _mm256_add_epi32(half, q8 ? other : _mm256_srai_epi32(other, 4));
            __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(xb->d));
            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, sum[r]);
        }
    }
    UNROLL for (int r = 0; r < n; r++) _mm256_storeu_ps(c[r], sum[r]);
}

AVX512 static void int_gemv_avx512(int type, int blocks, const struct act_block *x, int n,
                                  const uint8_t *const *rows, float (*c)[8]) {
    if (type == LVM_Q8_0) FOR_EACH_GEMV_ROWS(int_gemv_8_avx512, LVM_Q8_0);
    else FOR_EACH_GEMV_ROWS(int_gemv_8_avx512, LVM_Q4_0);
}

AVX512 static void int_row_avx512(int type, int blocks, const struct act_block *x, int x_rows,
                                  const uint8_t *w, int64_t row_bytes, int n, float *c,
                                  int64_t ldc) {
    int_row_by_8(int_gemv_avx512, type, blocks, x, x_rows, w, row_bytes, n, c, ldc);
}

/* Packed block: 16 scales, then for each four elements 16 rows of four bytes, 128 more than the
   weights. */
AVX512 static void int_pack_avx512(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    int bytes = type == LVM_Q8_0 ? 34 : 18;
    __m256i offset = _mm256_set1_epi8((char)(type == LVM_Q8_0 ? 128 : 128 - 8));
    for (int b = 0; b < blocks; b++, packed += A5_PACK)
        for (int half = 0; half < 2; half++) {
            const uint8_t *const *rows = w + 8 * half;
            __m256i q[8];
            interleave_block(type, rows, b, q);
            UNROLL for (int i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(void *)(packed + 4 * PANEL + 64 * i + 32 * half),
                                    _mm256_add_epi8(q[i], offset));
            _mm256_storeu_ps((float *)(void *)packed + 8 * half,
                             block_scales(rows, (int64_t)b * bytes));
        }
}

/* For each block and row, eight products, a conversion and two multiplications: 8/10 of the ceiling
   is what there is to reach where conversions have a pipe of their own, as on Zen 4, else 8/11. A
   weight is read once for 8 rows, an activation once for two panels, and the lines that the sums go
   to are prefetched for writing; loops over i must be unrolled, or the rows' pointers move through
   memory. */
AVX512 static INLINE void int_panels_avx512(int blocks, const struct act_block *const *x,
                                            const uint8_t *packed, int panels, float *c, int ldc) {
    __m512 sum[A5_INT][A5_PANELS];
    int64_t ldp = (int64_t)blocks * A5_PACK;
    UNROLL for (int r = 0; r < A5_INT; r++)
        UNROLL for (int s = 0; s < panels; s++) {
            sum[r][s] = _mm512_setzero_ps();
            __builtin_prefetch(c + r * ldc + s * PANEL, 1);
        }
    for (int b = 0; b < blocks; b++, packed += A5_PACK) {
        __m512i acc[A5_INT][A5_PANELS], w[A5_PANELS];
        UNROLL
        for (int s = 0; s < panels; s++) UNROLL
        for (int r = 0; r < A5_INT; r++) acc[r][s] = _mm512_set1_epi32(x[r][b].zero_point);
        UNROLL for (int i = 0; i < QK / 4; i++) {
            UNROLL for (int s = 0; s < panels; s++)
                w[s] = _mm512_loadu_si512(packed + s * ldp + 4 * PANEL + 64 * i);
            UNROLL for (int r = 0; r < A5_INT; r++) {
                __m512i four = _mm512_set1_epi32(load_s32(x[r][b].q + 4 * i));
                UNROLL for (int s = 0; s < panels; s++)
                    acc[r][s] = _mm512_dpbusd_epi32(acc[r][s], w[s], four);
            }
        }
        UNROLL for (int s = 0; s < panels; s++)
            UNROLL for (int r = 0; r < A5_INT; r++) {
                __m512 d = _mm512_mul_ps(_mm512_loadu_ps(packed + s * ldp),
                                         _mm512_set1_ps(x[r][b].d));
                sum[r][s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][s]), d, sum[r][s]);
            }
    }
    UNROLL for (int r = 0; r < A5_INT; r++)
        UNROLL for (int s = 0; s < panels; s++)
            _mm512_storeu_ps(c + r * ldc + s * PANEL, sum[r][s]);
}

AVX512 static void int_tile_avx512(int blocks, const struct act_block *const *x,
                                   const uint8_t *packed, int panels, float *c, int ldc) {
    if (panels == 2) int_panels_avx512(blocks, x, packed, 2, c, ldc);
    else int_panels_avx512(blocks, x, packed, 1, c, ldc);
}

/* Sums of neighbours of 16 numbers of 16 bits; what a NaN became is cut to those. */
AVX512 static __m256i pair_sums(__m512i x) {
    return _mm256_madd_epi16(_mm512_cvtsepi32_epi16(x), _mm256_set1_epi16(1));
}

AVX512 static void quantize_act_avx512(const float *x, struct act_block *y, int k) {
    for (int b = 0; b < k / QK; b++, x += QK) {
        float amax = max_magnitude(x);
        __m512 id = _mm512_set1_ps(amax <= MIN_AMAX ? 0 : 127 / amax);
        __m256i sum = _mm256_setzero_si256();
        y[b].d = amax <= MIN_AMAX ? 0 : amax / 127;
        UNROLL for (int i = 0; i < QK; i += 16) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), id));
            _mm_storeu_si128((__m128i *)(void *)(y[b].q + i), _mm512_cvtepi32_epi8(q));
            sum = _mm256_add_epi32(sum, pair_sums(q));
        }
        y[b].zero_point = -128 * sum_s32(sum);
    }
}

/* ---- AVX-512: attention on a quantised cache ----

   Two byte products, of hi and lo, make one of 16 bits; a vector is four dimensions of a panel's
   keys, or 16 dimensions of four values. */

enum { V8_W_BYTES = 2 * 2 * PANEL }; /* w of two panels' keys, two bytes each */

/* The two lower bytes of 16 numbers, hi of each four in front of their lo. */
AVX512 static void store_hi_lo(void *to, __m512i hi, __m512i x) {
    __m128i h = _mm512_cvtepi32_epi8(_mm512_srai_epi32(hi, 8)), lo = _mm512_cvtepi32_epi8(x);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi32(h, lo));
    _mm_storeu_si128((__m128i *)to + 1, _mm_unpackhi_epi32(h, lo));
}

AVX512 static __m512 add_hi_lo(__m512i hi, __m512i lo) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo));
}

AVX512 static void quantize_query_avx512(const float *q, struct query_block *x, int k) {
    for (; k > 0; k -= QK, q += QK, x++) {
        float amax = max_magnitude(q);
        __m512 id = _mm512_set1_ps(amax <= MIN_AMAX ? 0 : MAX_Q16 / amax);
        __m256i sum = _mm256_setzero_si256();
        UNROLL for (int i = 0; i < 2; i++) {
            __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(q + 16 * i), id));
            store_hi_lo(x->x.s8[4 * i], _mm512_add_epi32(n, _mm512_set1_epi32(128)), n);
            sum = _mm256_add_epi32(sum, pair_sums(n));
        }
        x->d = amax <= MIN_AMAX ? 0 : amax / MAX_Q16;
        x->zero_point = -128 * sum_s32(sum);
    }
}

/* n rows against `wide` panels; `once`: no other rows will read these, and what
   follows is prefetched. */
AVX512 static INLINE void k8_panels_avx512(const uint8_t *keys, int groups, int wide,
                                           const struct query_block *q, int n, int once, float *s,
                                           int lds) {
    int64_t panel = (int64_t)groups * KV8_PANEL;
    const uint8_t *next = keys + wide * panel;
    __m512 sum[GEMV_ROWS][4];
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int j = 0; j < wide; j++) sum[r][j] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++, keys += KV8_PANEL) {
        __m512i hi[GEMV_ROWS][4], lo[GEMV_ROWS][4], k[4];
        const uint8_t *following = next + (int64_t)g * wide * KV8_PANEL;
        if (once)
            prefetch_l1_l2(following + KV_PREFETCH_L1, following + KV_PREFETCH_L2,
                           wide * KV8_PANEL);
        UNROLL for (int r = 0; r < n; r++)
            UNROLL for (int j = 0; j < wide; j++) {
                hi[r][j] = _mm512_setzero_si512();
                lo[r][j] = _mm512_set1_epi32(q[r * groups + g].zero_point);
            }
        UNROLL for (int i = 0; i < QK / 4; i++) {
            UNROLL for (int j = 0; j < wide; j++)
                k[j] = _mm512_loadu_si512(keys + j * panel + 2 * PANEL + 4 * PANEL * i);
            UNROLL for (int r = 0; r < n; r++) {
                const int8_t (*x)[4] = q[r * groups + g].x.s8[i];
                __m512i xh = _mm512_set1_epi32(load_s32(x[0]));
                __m512i xl = _mm512_set1_epi32(load_s32(x[1]));
                UNROLL for (int j = 0; j < wide; j++) {
                    hi[r][j] = _mm512_dpbusd_epi32(hi[r][j], k[j], xh);
                    lo[r][j] = _mm512_dpbusd_epi32(lo[r][j], k[j], xl);
                }
            }
        }
        UNROLL for (int j = 0; j < wide; j++) {
            __m512 d = _mm512_cvtph_ps(
                _mm256_loadu_si256((const __m256i *)(const void *)(keys + j * panel)));
            UNROLL for (int r = 0; r < n; r++) {
                __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(q[r * groups + g].d));
                sum[r][j] = _mm512_fmadd_ps(add_hi_lo(hi[r][j], lo[r][j]), scale, sum[r][j]);
            }
        }
    }
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int j = 0; j < wide; j++)
            _mm512_storeu_ps(s + (int64_t)r * lds + PANEL * j, sum[r][j]);
}

/* Two panels and GEMV_ROWS rows, or four panels and one row, keep enough sums going. */
AVX512 static void k8_scores_avx512(const uint8_t *keys, int groups, int panels,
                                    const struct query_block *q, int rows, float *s, int lds) {
    int64_t panel = (int64_t)groups * KV8_PANEL;
    int once = rows <= GEMV_ROWS;
    for (int p = 0, wide = 1; p < panels; p += wide) {
        const uint8_t *at = keys + p * panel;
        int left = panels - p, r = 0;
        wide = left >= 4 && rows < GEMV_ROWS ? 4 : left >= 2 ? 2 : 1;
        for (; r + GEMV_ROWS <= rows; r += GEMV_ROWS) {
            float *to = s + (int64_t)r * lds + p * PANEL;
            if (wide == 2)
                k8_panels_avx512(at, groups, 2, q + r * groups, GEMV_ROWS, once, to, lds);
            else k8_panels_avx512(at, groups, 1, q + r * groups, GEMV_ROWS, once, to, lds);
        }
        for (; r < rows; r++) {
            float *to = s + (int64_t)r * lds + p * PANEL;
            if (wide == 4) k8_panels_avx512(at, groups, 4, q + r * groups, 1, once, to, lds);
            else if (wide == 2) k8_panels_avx512(at, groups, 2, q + r * groups, 1, once, to, lds);
            else k8_panels_avx512(at, groups, 1, q + r * groups, 1, once, to, lds);
        }
    }
}

/* A group's scales, which all rows share. */
AVX512 static void v8_scales_avx512(const uint8_t *values, int panels, float *scale) {
    for (int i = 0; i < panels; i++, values += KV8_PANEL)
        _mm512_storeu_ps(scale + i * PANEL, _mm512_cvtph_ps(_mm256_loadu_si256(
                                                (const __m256i *)(const void *)values)));
}

/* w of 16 keys; what is below 0, as NaN is here, becomes 0 when it is packed. */
AVX512 static INLINE __m512i scaled_p(const float *p, const float *scale, __m512 id) {
    __m512 weighted = _mm512_mul_ps(_mm512_loadu_ps(p), _mm512_loadu_ps(scale));
    return _mm512_cvtps_epi32(_mm512_mul_ps(weighted, id));
}

/* w as bytes: of each two panels in turn four keys, hi in front of lo (V8_W_BYTES a pair). */
AVX512 static float quantize_p_avx512(const float *p, const float *scale, int panels, uint8_t *w) {
    const __m512i order = _mm512_broadcast_i32x4(
        _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
    __m512 most = _mm512_setzero_ps();
    int n = panels * PANEL;
    for (int i = 0; i < n; i += PANEL)
        most = _mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(p + i), _mm512_loadu_ps(scale + i)),
                             most);
    float all = _mm512_reduce_max_ps(most);
    __m512 id = _mm512_set1_ps(all > MIN_AMAX ? MAX_P15 / all : 0);
    for (int i = 0; i < n; i += 2 * PANEL, w += V8_W_BYTES) {
        int j = i + PANEL < n ? i + PANEL : i; /* a last panel without a neighbour goes twice */
        __m512i words = _mm512_packus_epi32(scaled_p(p + i, scale + i, id),
                                            scaled_p(p + j, scale + j, id));
        _mm512_storeu_si512(w, _mm512_shuffle_epi8(words, order));
    }
    return all > MIN_AMAX ? all / MAX_P15 : 0;
}

/* n rows against a group's values; `apart` sums of neighbouring fours of keys are kept apart. With
   next, what follows is prefetched: values up to end, then that. */
AVX512 static INLINE void v8_group_avx512(const uint8_t *values, int panels,
                                          uint8_t (*w)[2 * KV_BLOCK], const float *d, int n,
                                          int apart, const uint8_t *end, const uint8_t *next,
                                          float *o, int ldo) {
    __m512i hi[GEMV_ROWS][2], lo[GEMV_ROWS][2]; /* of [row or place][16 dimensions] */
    UNROLL for (int r = 0; r < n * apart; r++)
        UNROLL for (int j = 0; j < 2; j++) hi[r][j] = lo[r][j] = _mm512_setzero_si512();
    for (int i = 0; i < panels; i++, values += KV8_PANEL) {
        if (next != NULL) prefetch_values(values, KV8_PANEL, end, next);
        UNROLL for (int four = 0; four < PANEL / 4; four++) {
            const uint8_t *at = values + 2 * PANEL + four * 4 * QK;
            __m512i v0 = _mm512_loadu_si512(at), v1 = _mm512_loadu_si512(at + 4 * PANEL);
            UNROLL for (int r = 0; r < n; r++) {
                const uint8_t *x = w[r] + i / 2 * V8_W_BYTES + i % 2 * 8 + 16 * four;
                __m512i wh = _mm512_set1_epi32(load_s32(x));
                __m512i wl = _mm512_set1_epi32(load_s32(x + 4));
                int to = r * apart + four % apart;
                hi[to][0] = _mm512_dpbusd_epi32(hi[to][0], wh, v0);
                lo[to][0] = _mm512_dpbusd_epi32(lo[to][0], wl, v0);
                hi[to][1] = _mm512_dpbusd_epi32(hi[to][1], wh, v1);
                lo[to][1] = _mm512_dpbusd_epi32(lo[to][1], wl, v1);
            }
        }
    }
    UNROLL for (int r = 0; r < n; r++)
        UNROLL for (int j = 0; j < 2; j++) {
            __m512i h = hi[r * apart][j], l = lo[r * apart][j];
            UNROLL for (int i = 1; i < apart; i++) {
                h = _mm512_add_epi32(h, hi[r * apart + i][j]);
                l = _mm512_add_epi32(l, lo[r * apart + i][j]);
            }
            _mm512_storeu_ps(o + (int64_t)r * ldo + PANEL * j,
                             _mm512_mul_ps(add_hi_lo(h, l), _mm512_set1_ps(d[r])));
        }
}

AVX512 static void v8_sums_avx512(const uint8_t *values, int groups, int panels,
                                  const float *const *p, int rows, const uint8_t *next, float *o,
                                  int ldo) {
    uint8_t w[GEMV_ROWS][2 * KV_BLOCK];
    float d[GEMV_ROWS], scale[KV_BLOCK];
    const uint8_t *end = values + (int64_t)groups * (KV_BLOCK / PANEL) * KV8_PANEL;
    if (rows > GEMV_ROWS) next = NULL;
    for (int g = 0; g < groups; g++, values += KV_BLOCK / PANEL * KV8_PANEL, o += QK) {
        v8_scales_avx512(values, panels, scale);
        for (int r = 0, n = 1; r < rows; r += n) {
            n = rows - r < GEMV_ROWS ? 1 : GEMV_ROWS;
            for (int i = 0; i < n; i++) d[i] = quantize_p_avx512(p[r + i], scale, panels, w[i]);
            float *to = o + (int64_t)r * ldo;
            if (n == 1) v8_group_avx512(values, panels, w, d, 1, 4, end, next, to, ldo);
            else v8_group_avx512(values, panels, w, d, GEMV_ROWS, 1, end, next, to, ldo);
        }
    }
}

AVX512 static void rmsnorm_avx512(const float *x, const float *weight, float eps, int n, float *y) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    float scale = 1 / sqrtf(sum16(sum) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* exp8 and silu8, sixteen at a time, to the same bits. */
AVX512 static __m512 exp16(__m512 x) {
    __mmask16 small = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LE_OQ);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps((__mmask16)~small, p, n);
}

AVX512 static __m512 silu16(__m512 x) {
    __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), e));
}

/* exp(scale s - m) of 16, which go back into s; adds them to softmax_avx2's eight sums. */
AVX512 static INLINE __m256 exp_and_sum(float *s, __mmask16 mask, __m512 scale, __m512 m,
                                        __m256 sum) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s), scale);
    __m512 e = _mm512_maskz_mov_ps(mask, exp16(_mm512_sub_ps(x, m)));
    _mm512_storeu_ps(s, e);
    sum = _mm256_add_ps(sum, _mm512_castps512_ps256(e));
    return _mm256_add_ps(sum, _mm512_extractf32x8_ps(e, 1));
}

/* The largest is scaled once: rounding keeps an order. */
AVX512 static float softmax_avx512(float *s, int n, int valid, float scale, float *max) {
    int whole = valid / 16 * 16;
    __mmask16 rest = (__mmask16)((1u << (valid - whole)) - 1);
    __m512 vm = _mm512_set1_ps(-HUGE_VALF), vs = _mm512_set1_ps(scale);
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < whole; i += 16) vm = _mm512_max_ps(_mm512_loadu_ps(s + i), vm);
    if (rest) vm = _mm512_mask_max_ps(vm, rest, _mm512_loadu_ps(s + whole), vm);
    *max = _mm512_reduce_max_ps(vm) * scale;
    vm = _mm512_set1_ps(*max);
    for (int i = 0; i < whole; i += 16) sum = exp_and_sum(s + i, 0xffff, vs, vm, sum);
    for (int i = whole; i < n; i += 16, rest = 0) sum = exp_and_sum(s + i, rest, vs, vm, sum);
    return sum8(sum);
}

AVX512 static void silu_mul_avx512(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m512 y = silu16(_mm512_maskz_loadu_ps(mask, gate + i));
        y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(gate + i, mask, y);
    }
}

AVX512 static void scale_shift_avx512(const float *x, const float *scale, const float *shift,
                                    int use_silu, int64_t pixels, int c, float *y) {
    for (int64_t p = 0; p < pixels; p++, x += c, y += c)
        for (int i = 0; i < c; i += 16) {
            __m512 v = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(scale + i),
                                       _mm512_loadu_ps(shift + i));
            _mm512_storeu_ps(y + i, use_silu ? silu16(v) : v);
        }
}

AVX512 static void winograd_filter_avx512(const float *w, int n, int64_t tap, float *u) {
    winograd_filter_vec(w, n, tap, u);
}

AVX512 static void winograd_input_avx512(const float *patch, int64_t line, int c, float *v,
                                     int64_t tap) {
    winograd_input_vec(patch, line, c, v, tap);
}

AVX512 static void winograd_output_avx512(const float *m, int64_t tap, const float *bias,
                                      const float *const *residual, float *const *out) {
    winograd_output_vec(m, tap, bias, residual, out);
}

static const struct kernels kernels_avx512 = {
    .name = "avx512",
    .matmul = {.dot_rows = A5_ROWS,
               .dot_cols = A5_COLS,
               .int_rows = A5_INT,
               .int_panels = A5_PANELS,
               .outer_rows = A5_OUTER,
               .outer_panels = A5_PANELS,
               .pack_bytes = A5_PACK,
               .dot_row = dot_row_avx512,
               .dot_tile = dot_tile_avx512,
               .quantize_act = quantize_act_avx512,
               .int_row = int_row_avx512,
               .int_pack = int_pack_avx512,
               .int_tile = int_tile_avx512,
               .outer_row = outer_row_avx512,
               .outer_tile = outer_tile_avx512},
    .conv = {.tiled = 1,
             .pack_panel = pack_panel_avx2,
             .winograd_filter = winograd_filter_avx512,
             .winograd_input = winograd_input_avx512,
             .winograd_output = winograd_output_avx512,
             .scale_shift = scale_shift_avx512,
             .channel_sums = channel_sums_avx2},
    .attention = {.softmax = softmax_avx512,
                  .quantize_query = quantize_query_avx512,
                  .k8_scores = k8_scores_avx512,
                  .v8_sums = v8_sums_avx512,
                  .to_q8_0 = to_q8_0_avx2},
    .elementwise = {.rmsnorm = rmsnorm_avx512, .silu_mul = silu_mul_avx512, .to_f32 = to_f32_avx2}};

/* ---- Peaks: what `lvm bench` calls 100 % ----

   Independent accumulators and nothing to load. The barrier after each round keeps compilers from
   folding the sums into one. */

#ifndef LVM_NO_MAIN
AVX2 static void peak_fma_avx2(int64_t rounds) {
    __m256 a[12], x = _mm256_set1_ps(0.5f);
    UNROLL for (int i = 0; i < 12; i++) a[i] = _mm256_set1_ps(1);
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 12; i++) a[i] = _mm256_fmadd_ps(a[i], x, x);
        UNROLL for (int i = 0; i < 12; i++) __asm__ volatile("" : "+x"(a[i]));
    }
}

AVX2 static void peak_int_avx2(int64_t rounds) {
    __m256i a[12], x = _mm256_set1_epi16(3);
    UNROLL for (int i = 0; i < 12; i++) a[i] = x;
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 12; i++)
            a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(a[i], x));
        UNROLL for (int i = 0; i < 12; i++) __asm__ volatile("" : "+x"(a[i]));
    }
}

AVX512 static void peak_fma_avx512(int64_t rounds) {
    __m512 a[12], x = _mm512_set1_ps(0.5f);
    UNROLL for (int i = 0; i < 12; i++) a[i] = _mm512_set1_ps(1);
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 12; i++) a[i] = _mm512_fmadd_ps(a[i], x, x);
        UNROLL for (int i = 0; i < 12; i++) __asm__ volatile("" : "+v"(a[i]));
    }
}

AVX512 static void peak_int_avx512(int64_t rounds) {
    __m512i a[12], x = _mm512_set1_epi8(3);
    UNROLL for (int i = 0; i < 12; i++) a[i] = x;
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 12; i++) a[i] = _mm512_dpbusd_epi32(a[i], x, x);
        UNROLL for (int i = 0; i < 12; i++) __asm__ volatile("" : "+v"(a[i]));
    }
}

/* Products of bfloat16, which keep too few bits for anything here: measured for comparison. */
#if defined(__clang__) || __GNUC__ >= 10
__attribute__((target("avx512f,avx512bf16"))) static void peak_bf16_avx512(int64_t rounds) {
    __m512 a[12];
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00); /* 0.5 */
    UNROLL for (int i = 0; i < 12; i++) a[i] = _mm512_set1_ps(1);
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 12; i++) a[i] = _mm512_dpbf16_ps(a[i], x, x);
        UNROLL for (int i = 0; i < 12; i++) __asm__ volatile("" : "+v"(a[i]));
    }
}
#else /* older compilers do not know them */
#define peak_bf16_avx512 NULL
#endif

static int has_bf16(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
#endif

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

/* What follows is loaded after *sum is known. Without it compilers fetch so many operands ahead
   that accumulators have to leave their registers. */
static INLINE void load_later(float32x4_t *sum) { __asm__ volatile("" : "+w"(*sum) : : "memory"); }

enum {
    NEON_ROWS = 4,
    NEON_COLS = 3,
    NEON_OUTER = 4,
    NEON_PANELS = 1,
    NEON_INT = 4,
    NEON_QUAD = 4 * (4 + QK), /* bytes of a packed block of four rows */
    NEON_PACK = PANEL / 4 * NEON_QUAD
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

static void outer_tile_neon(int k, const float *const *a, const float *b, int64_t ldp,
                            int panels, float *c, int ldc, int accumulate) {
    (void)ldp, (void)panels;
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
        UNROLL for (int lane = 0; lane < 4; lane++, b += PANEL) {
            UNROLL for (int j = 0; j < 4; j++) {
                float32x4_t vb = vld1q_f32(b + 4 * j);
                UNROLL for (int r = 0; r < NEON_OUTER; r++)
                    sum[r][j] = fma_lane(sum[r][j], vb, va[r], lane);
            }
            load_later(&sum[NEON_OUTER - 1][3]);
        }
    }
    for (; i < k; i++, b += PANEL)
        UNROLL for (int j = 0; j < 4; j++) {
            float32x4_t vb = vld1q_f32(b + 4 * j);
            UNROLL for (int r = 0; r < NEON_OUTER; r++)
                sum[r][j] = vfmaq_n_f32(sum[r][j], vb, rows[r][i]);
        }
    UNROLL for (int r = 0; r < NEON_OUTER; r++)
        UNROLL for (int j = 0; j < 4; j++) vst1q_f32(c + r * ldc + 4 * j, sum[r][j]);
}

/* One row, four panels: sixteen independent sums. */
static void outer_4_panels_neon(int k, const float *a, const float *b, int64_t ldp, float *c,
                                int accumulate) {
    float32x4_t sum[16];
    UNROLL for (int s = 0; s < 16; s++)
        sum[s] = accumulate ? vld1q_f32(c + s * 4) : vdupq_n_f32(0);
    for (int i = 0; i < k; i++, b += PANEL) {
        float32_t ai = a[i];
        UNROLL for (int s = 0; s < 4; s++) {
            UNROLL for (int j = 0; j < 4; j++)
                sum[4 * s + j] = vfmaq_n_f32(sum[4 * s + j], vld1q_f32(b + s * ldp + 4 * j), ai);
            load_later(&sum[4 * s]);
        }
    }
    UNROLL for (int s = 0; s < 16; s++) vst1q_f32(c + s * 4, sum[s]);
}

static void outer_row_neon(int k, const float *a, const float *b, int64_t ldp, int panels,
                           float *c, int accumulate) {
    for (; panels >= 4; panels -= 4, b += 4 * ldp, c += 4 * PANEL)
        outer_4_panels_neon(k, a, b, ldp, c, accumulate);
    for (; panels > 0; panels--, b += ldp, c += PANEL) {
        float32x4_t sum[4];
        UNROLL for (int j = 0; j < 4; j++)
            sum[j] = accumulate ? vld1q_f32(c + 4 * j) : vdupq_n_f32(0);
        for (int i = 0; i < k; i++)
            UNROLL for (int j = 0; j < 4; j++)
                sum[j] = vfmaq_n_f32(sum[j], vld1q_f32(b + i * PANEL + 4 * j), a[i]);
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

static INLINE void load_x_neon(const struct act_block *x, int8x16_t *q) {
    q[0] = vld1q_s8(x->q);
    q[1] = vld1q_s8(x->q + 16);
}

/* The 32 products of a block, some to a lane: one of two instruction sets' way. */
typedef int32x4_t block_products(const int8x16_t *w, const int8x16_t *x);

static INLINE void int_4_rows_neon(block_products *products, int type, int blocks,
                                   const struct act_block *x, const uint8_t *const *rows,
                                   float *c) {
    float32x4_t sum = vdupq_n_f32(0);
    for (int b = 0; b < blocks; b++) {
        int64_t at = (int64_t)b * block_bytes_neon(type);
        int8x16_t vx[2], w[2];
        int32x4_t p[4];
        load_x_neon(x + b, vx);
        UNROLL for (int j = 0; j < 4; j++) {
            unpack_block_neon(type, rows[j] + at, w);
            p[j] = products(w, vx);
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

static INLINE void int_rows_neon(block_products *products, int type, int blocks,
                                 const struct act_block *x, int x_rows, const uint8_t *w,
                                 int64_t row_bytes, int n, float *c, int64_t ldc) {
    for (int j = 0; j < n; j += 4) {
        const uint8_t *rows[4];
        float out[4];
        quad_of_rows(w + j * row_bytes, row_bytes, n - j, rows);
        for (int r = 0; r < x_rows; r++) {
            const struct act_block *row = x + (int64_t)r * blocks;
            if (type == LVM_Q8_0) int_4_rows_neon(products, LVM_Q8_0, blocks, row, rows, out);
            else int_4_rows_neon(products, LVM_Q4_0, blocks, row, rows, out);
            memcpy(c + r * ldc + j, out, (size_t)(n - j < 4 ? n - j : 4) * sizeof *c);
        }
    }
}

static void int_row_neon(int type, int blocks, const struct act_block *x, int x_rows,
                         const uint8_t *w, int64_t row_bytes, int n, float *c, int64_t ldc) {
    int_rows_neon(products_neon, type, blocks, x, x_rows, w, row_bytes, n, c, ldc);
}

/* Packed: four rows after four rows; of each block 4 scales, then 4 rows of 32 bytes. */
static void int_pack_neon(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    for (int j0 = 0; j0 < PANEL; j0 += 4)
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

static void int_tile_4_neon(int blocks, const struct act_block *const *x, const uint8_t *packed,
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

static void int_tile_neon(int blocks, const struct act_block *const *x, const uint8_t *packed,
                          int panels, float *c, int ldc) {
    (void)panels;
    for (int j = 0; j < PANEL; j += 4)
        int_tile_4_neon(blocks, x, packed + (int64_t)j / 4 * blocks * NEON_QUAD, c + j, ldc);
}

static void quantize_act_neon(const float *x, struct act_block *y, int k) {
    for (int b = 0; b < k / QK; b++, x += QK) {
        float32x4_t m = vdupq_n_f32(0);
        UNROLL for (int i = 0; i < QK; i += 4) m = vmaxq_f32(m, vabsq_f32(vld1q_f32(x + i)));
        float amax = vmaxvq_f32(m), id = amax <= MIN_AMAX ? 0 : 127 / amax;
        y[b].d = amax <= MIN_AMAX ? 0 : amax / 127;
        UNROLL for (int i = 0; i < QK; i += 8) {
            int32x4_t q0 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), id));
            int32x4_t q1 = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), id));
            vst1_s8(y[b].q + i, vmovn_s16(vcombine_s16(vmovn_s32(q0), vmovn_s32(q1))));
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

NEON_DOT static INLINE int32x4_t products_dot(const int8x16_t *w, const int8x16_t *x) {
    return vdotq_s32(vdotq_s32(vdupq_n_s32(0), w[0], x[0]), w[1], x[1]);
}

NEON_DOT static void int_row_dot(int type, int blocks, const struct act_block *x, int x_rows,
                                 const uint8_t *w, int64_t row_bytes, int n, float *c,
                                 int64_t ldc) {
    int_rows_neon(products_dot, type, blocks, x, x_rows, w, row_bytes, n, c, ldc);
}

/* Packed: four rows after four rows; of each block 4 scales, then for each four elements 4 rows of
   four bytes. */
static void int_pack_dot(int type, int blocks, const uint8_t *const *w, uint8_t *packed) {
    for (int j0 = 0; j0 < PANEL; j0 += 4)
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
NEON_DOT static void int_tile_8_dot(int blocks, const struct act_block *const *x,
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
            UNROLL for (int r = 0; r < NEON_INT; r++) vx[r] = vld1q_s8(x[r][b].q + 16 * half);
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

NEON_DOT static void int_tile_dot(int blocks, const struct act_block *const *x,
                                  const uint8_t *packed, int panels, float *c, int ldc) {
    (void)panels;
    for (int j = 0; j < PANEL; j += 8)
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

/* ---- NEON: attention on a quantised cache ----

   Loads that take every fourth byte give one dimension of a panel's 16 keys, or 16 dimensions of
   one value, which are multiplied by a number of 16 bits. */

static void quantize_query_neon(const float *q, struct query_block *x, int k) {
    for (; k > 0; k -= QK, q += QK, x++) {
        float32x4_t m = vdupq_n_f32(0);
        int32x4_t sum = vdupq_n_s32(0);
        UNROLL for (int i = 0; i < QK; i += 4) m = vmaxq_f32(m, vabsq_f32(vld1q_f32(q + i)));
        float amax = vmaxvq_f32(m), id = amax <= MIN_AMAX ? 0 : MAX_Q16 / amax;
        UNROLL for (int i = 0; i < QK; i += 4) {
            int32x4_t n = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(q + i), id));
            vst1_s16(x->x.s16 + i, vmovn_s32(n));
            sum = vaddq_s32(sum, n);
        }
        x->d = amax <= MIN_AMAX ? 0 : amax / MAX_Q16;
        x->zero_point = -128 * vaddvq_s32(sum);
    }
}

/* sum[16] += a[16] x */
static INLINE void add_products_16(int32x4_t *sum, int16x8_t low, int16x8_t high, int16_t x) {
    sum[0] = vmlal_n_s16(sum[0], vget_low_s16(low), x);
    sum[1] = vmlal_n_s16(sum[1], vget_high_s16(low), x);
    sum[2] = vmlal_n_s16(sum[2], vget_low_s16(high), x);
    sum[3] = vmlal_n_s16(sum[3], vget_high_s16(high), x);
}

static void k8_scores_neon(const uint8_t *keys, int groups, int panels,
                           const struct query_block *q, int rows, float *s, int lds) {
    for (int p = 0; p < panels; p++, keys += (int64_t)groups * KV8_PANEL, s += PANEL)
        for (int r = 0; r < rows; r++) {
            float32x4_t score[4];
            UNROLL for (int j = 0; j < 4; j++) score[j] = vdupq_n_f32(0);
            for (int g = 0; g < groups; g++) {
                const uint8_t *panel = keys + (int64_t)g * KV8_PANEL;
                const struct query_block *x = q + r * groups + g;
                int32x4_t sum[4];
                UNROLL for (int j = 0; j < 4; j++) sum[j] = vdupq_n_s32(x->zero_point);
                for (int i = 0; i < QK; i += 4) {
                    uint8x16x4_t k = vld4q_u8(panel + 2 * PANEL + i * PANEL);
                    UNROLL for (int t = 0; t < 4; t++)
                        add_products_16(sum, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(k.val[t]))),
                                        vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(k.val[t]))),
                                        x->x.s16[i + t]);
                }
                UNROLL for (int j = 0; j < 4; j++) {
                    float32x4_t d = vmulq_n_f32(halves_to_f32(panel + 8 * j), x->d);
                    score[j] = vfmaq_f32(score[j], vcvtq_f32_s32(sum[j]), d);
                }
            }
            UNROLL for (int j = 0; j < 4; j++) vst1q_f32(s + (int64_t)r * lds + 4 * j, score[j]);
        }
}

static float quantize_p_neon(const float *p, const uint8_t *values, int panels, int16_t *w) {
    float weighted[KV_BLOCK];
    float32x4_t most = vdupq_n_f32(0);
    for (int i = 0; i < panels * PANEL; i += 4) {
        const uint8_t *d = values + (int64_t)i / PANEL * KV8_PANEL + 2 * (i % PANEL);
        float32x4_t x = vmulq_f32(vld1q_f32(p + i), halves_to_f32(d));
        vst1q_f32(weighted + i, x);
        most = vmaxnmq_f32(most, x);
    }
    float all = vmaxnmvq_f32(most), id = all > MIN_AMAX ? MAX_P15 / all : 0;
    for (int i = 0; i < panels * PANEL; i += 4)
        vst1_s16(w + i, vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(weighted + i), id))));
    return all > MIN_AMAX ? all / MAX_P15 : 0;
}

static void v8_sums_neon(const uint8_t *values, int groups, int panels, const float *const *p,
                         int rows, const uint8_t *next, float *o, int ldo) {
    (void)next;
    int16_t w[KV_BLOCK];
    for (int g = 0; g < groups; g++, values += KV_BLOCK / PANEL * KV8_PANEL, o += QK)
        for (int r = 0; r < rows; r++) {
            float d = quantize_p_neon(p[r], values, panels, w);
            int32x4_t sum[8];
            UNROLL for (int j = 0; j < 8; j++) sum[j] = vdupq_n_s32(0);
            for (int i = 0; i < panels * PANEL; i += 4) {
                const uint8_t *panel = values + (int64_t)i / PANEL * KV8_PANEL;
                const uint8_t *at = panel + 2 * PANEL + i % PANEL * QK;
                UNROLL for (int half = 0; half < 2; half++) {
                    int8x16x4_t v = vld4q_s8((const int8_t *)at + half * 4 * PANEL);
                    UNROLL for (int t = 0; t < 4; t++)
                        add_products_16(sum + 4 * half, vmovl_s8(vget_low_s8(v.val[t])),
                                        vmovl_s8(vget_high_s8(v.val[t])), w[i + t]);
                }
            }
            UNROLL for (int j = 0; j < 8; j++)
                vst1q_f32(o + (int64_t)r * ldo + 4 * j, vmulq_n_f32(vcvtq_f32_s32(sum[j]), d));
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
    float32x4_t sum[4][2];
    int k = 0;
    UNROLL for (int j = 0; j < 4; j++) sum[j][0] = sum[j][1] = vdupq_n_f32(0);
    for (; k + 8 <= n; k += 8)
        UNROLL for (int half = 0; half < 2; half++) {
            float32x4_t v = vld1q_f32(x + k + 4 * half);
            sum[0][half] = vfmaq_f32(sum[0][half], v, v);
        }
    float lanes[8];
    last_lanes(x + k, n - k, lanes);
    UNROLL for (int half = 0; half < 2; half++) {
        float32x4_t v = vld1q_f32(lanes + 4 * half);
        sum[0][half] = vfmaq_f32(sum[0][half], v, v);
    }
    float scale = 1 / sqrtf(vgetq_lane_f32(sum8_neon(sum), 0) / (float)n + eps);
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
static void scale_shift_neon(const float *x, const float *scale, const float *shift, int use_silu,
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

static void pack_panel_neon(const float *rows, int64_t ld, int k, float *panel) {
    int i = 0;
    for (; i + 4 <= k; i += 4)
        for (int j = 0; j < PANEL; j += 4) {
            const float *r = rows + j * ld + i;
            float32x4x2_t low = vtrnq_f32(vld1q_f32(r), vld1q_f32(r + ld)),
                          high = vtrnq_f32(vld1q_f32(r + 2 * ld), vld1q_f32(r + 3 * ld));
            UNROLL for (int odd = 0; odd < 2; odd++) {
                float32x4_t a = low.val[odd], b = high.val[odd];
                vst1q_f32(panel + (i + odd) * PANEL + j,
                          vcombine_f32(vget_low_f32(a), vget_low_f32(b)));
                vst1q_f32(panel + (i + 2 + odd) * PANEL + j,
                          vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
            }
        }
    if (i < k) pack_panel_plain(rows + i, ld, k - i, panel + i * PANEL);
}

static void winograd_filter_neon(const float *w, int n, int64_t tap, float *u) {
    winograd_filter_vec(w, n, tap, u);
}

static void winograd_input_neon(const float *patch, int64_t line, int c, float *v,
                                 int64_t tap) {
    winograd_input_vec(patch, line, c, v, tap);
}

static void winograd_output_neon(const float *m, int64_t tap, const float *bias,
                                  const float *const *residual, float *const *out) {
    winograd_output_vec(m, tap, bias, residual, out);
}

/* Processors with dot products of bytes differ in the integer kernels alone. */
#define NEON_KERNELS(title, suffix)                                                               \
    {                                                                                             \
        .name = title,                                                                            \
        .matmul = {.dot_rows = NEON_ROWS,                                                         \
                   .dot_cols = NEON_COLS,                                                         \
                   .int_rows = NEON_INT,                                                          \
                   .int_panels = 1,                                                               \
                   .outer_rows = NEON_OUTER,                                                      \
                   .outer_panels = NEON_PANELS,                                                   \
                   .pack_bytes = NEON_PACK,                                                       \
                   .dot_row = dot_row_neon,                                                       \
                   .dot_tile = dot_tile_neon,                                                     \
                   .quantize_act = quantize_act_neon,                                             \
                   .int_row = int_row_##suffix,                                                   \
                   .int_pack = int_pack_##suffix,                                                 \
                   .int_tile = int_tile_##suffix,                                                 \
                   .outer_row = outer_row_neon,                                                   \
                   .outer_tile = outer_tile_neon},                                                \
        .conv = {.tiled = 1,                                                                      \
                 .pack_panel = pack_panel_neon,                                                   \
                 .winograd_filter = winograd_filter_neon,                                         \
                 .winograd_input = winograd_input_neon,                                           \
                 .winograd_output = winograd_output_neon,                                         \
                 .scale_shift = scale_shift_neon,                                                 \
                 .channel_sums = channel_sums_neon},                                              \
        .attention = {.softmax = softmax_neon,                                                    \
                      .quantize_query = quantize_query_neon,                                      \
                      .k8_scores = k8_scores_neon,                                                \
                      .v8_sums = v8_sums_neon,                                                    \
                      .to_q8_0 = quantize_q8_0},                                                  \
        .elementwise = {.rmsnorm = rmsnorm_neon, .silu_mul = silu_mul_neon, .to_f32 = to_f32_neon}}

static const struct kernels kernels_neon = NEON_KERNELS("neon", neon);
static const struct kernels kernels_neon_dot = NEON_KERNELS("neon-dot", dot);

#ifndef LVM_NO_MAIN
static void peak_fma_neon(int64_t rounds) {
    float32x4_t a[16], x = vdupq_n_f32(0.5f);
    UNROLL for (int i = 0; i < 16; i++) a[i] = vdupq_n_f32(1);
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 16; i++) a[i] = vfmaq_f32(x, a[i], x);
        UNROLL for (int i = 0; i < 16; i++) __asm__ volatile("" : "+w"(a[i]));
    }
}

static void peak_int_neon(int64_t rounds) {
    int32x4_t a[16];
    int8x8_t x = vdup_n_s8(3);
    UNROLL for (int i = 0; i < 16; i++) a[i] = vdupq_n_s32(1);
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 16; i++) {
            a[i] = vpadalq_s16(a[i], vmull_s8(x, x));
            __asm__ volatile("" : "+w"(a[i]), "+w"(x));
        }
    }
}

NEON_DOT static void peak_int_dot(int64_t rounds) {
    int32x4_t a[16];
    int8x16_t x = vdupq_n_s8(3);
    UNROLL for (int i = 0; i < 16; i++) a[i] = vdupq_n_s32(1);
    for (int64_t n = 0; n < rounds; n++) {
        UNROLL for (int i = 0; i < 16; i++) a[i] = vdotq_s32(a[i], x, x);
        UNROLL for (int i = 0; i < 16; i++) __asm__ volatile("" : "+w"(a[i]));
    }
}
#endif

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

#ifndef LVM_NO_MAIN
#if !defined(__x86_64__)
static int has_bf16(void) { return 0; }
#endif

/* Operations a round of loops that do nothing else; bf16 may be NULL. */
struct peak {
    const char *isa;
    void (*fma)(int64_t rounds), (*integer)(int64_t rounds), (*bf16)(int64_t rounds);
    int64_t fma_ops, integer_ops, bf16_ops;
};

static void peak_fma_plain(int64_t rounds) {
    volatile float result;
    float a[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int64_t n = 0; n < rounds; n++)
        for (int i = 0; i < 8; i++) a[i] = a[i] * 0.5f + 0.5f;
    for (int i = 0; i < 8; i++) result = a[i];
    (void)result;
}

static void peak_int_plain(int64_t rounds) {
    volatile uint32_t result;
    uint32_t a[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int64_t n = 0; n < rounds; n++)
        for (int i = 0; i < 8; i++) a[i] = a[i] * 3 + 1;
    for (int i = 0; i < 8; i++) result = a[i];
    (void)result;
}

static const struct peak peak_table[] = {
#if defined(__x86_64__)
    {"avx2", peak_fma_avx2, peak_int_avx2, NULL, 12 * 8 * 2, 12 * 16 * 2, 0},
    {"avx512", peak_fma_avx512, peak_int_avx512, peak_bf16_avx512, 12 * 16 * 2, 12 * 64 * 2,
     12 * 32 * 2},
#elif defined(__aarch64__)
    {"neon", peak_fma_neon, peak_int_neon, NULL, 16 * 4 * 2, 16 * 8 * 2, 0},
    {"neon-dot", peak_fma_neon, peak_int_dot, NULL, 16 * 4 * 2, 16 * 16 * 2, 0},
#endif
    {"scalar", peak_fma_plain, peak_int_plain, NULL, 16, 16, 0}};

static const struct peak *find_peak(const char *isa) {
    const struct peak *p = peak_table;
    while (strcmp(p->isa, isa) != 0 && strcmp(p->isa, "scalar") != 0) p++;
    return p;
}
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
   Chapter 14.  Tools: GGUF, quantise, random weights, contexts, the cache file

   What stands around a model: its file format, files with other types, models without a file. And
   around a context: its options, how it is made on a device, what it uses, its state in a file. */

/* ---- GGUF: reading ----

       "GGUF"  u32 version  u64 tensors  u64 keys                         all little-endian
       keys:     string name, u32 type, value          string = u64 length, bytes
       tensors:  string name, u32 n_dims, u64 ne[n_dims] (fastest first), u32 type, u64 offset
       padding to general.alignment, then the tensors' data at their offsets

   Everything is read through one cursor that knows where the file ends; counts are believed only as
   far as the bytes that are left could hold them. */

/* How a message prints a name from a file: at most 64 bytes. */
#define TEXT_ARG(t) (int)((t).n < 64 ? (t).n : 64), (t).s

enum gguf_type {
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING,
    GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64, GGUF_TYPES
};

static const uint8_t gguf_bytes[GGUF_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static struct text cursor_text(struct cursor *c) {
    struct text t = {NULL, cursor_number(c, 8)};
    t.s = (const char *)cursor_take(c, t.n);
    if (t.s == NULL) t.n = 0;
    return t;
}

static int text_compare(struct text a, struct text b) {
    int order = memcmp(a.s, b.s, (size_t)(a.n < b.n ? a.n : b.n));
    return order != 0 ? order : (a.n > b.n) - (a.n < b.n);
}

/* An entry of a list that is sorted by name (qsort has no argument for context). */
struct named_index {
    struct text name;
    int64_t index;
};

/* Steps over a value; arrays may lie in arrays `depth` deep. */
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

static int compare_named(const void *a, const void *b) {
    const struct named_index *x = a, *y = b;
    return text_compare(x->name, y->name);
}

/* Sorts a list by name and refuses a name that comes twice. */
static int sort_names(const struct gguf *g, struct named_index *list, int64_t n, const char *what,
                      lvm_error *error) {
    qsort(list, (size_t)n, sizeof *list, compare_named);
    for (int64_t i = 1; i < n; i++)
        if (text_compare(list[i - 1].name, list[i].name) == 0)
            return fail(error, LVM_FORMAT, "%s: %s %.*s appears twice", g->path, what,
                        TEXT_ARG(list[i].name));
    return LVM_OK;
}

/* The entry of a name by binary search, or -1. */
static int64_t find_name(const struct named_index *list, int64_t n, const char *name) {
    const struct named_index wanted = {{name, strlen(name)}, 0}, *found = NULL;
    if (n > 0) found = bsearch(&wanted, list, (size_t)n, sizeof *list, compare_named);
    return found != NULL ? found->index : -1;
}

static const struct gguf_key *gguf_key(const struct gguf *g, const char *name) {
    int64_t i = find_name(g->key_by_name, g->n_keys, name);
    return i >= 0 ? &g->keys[i] : NULL;
}

static const struct gguf_tensor *gguf_tensor(const struct gguf *g, const char *name) {
    int64_t i = find_name(g->tensor_by_name, g->n_tensors, name);
    return i >= 0 ? &g->tensors[i] : NULL;
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
        g->key_by_name[i] = (struct named_index){key->name, i};
    }
    int code = sort_names(g, g->key_by_name, g->n_keys, "key", error);
    if (code != LVM_OK) return code;
    const struct gguf_key *a = gguf_key(g, "general.alignment");
    g->alignment = 32;
    if (a != NULL && a->type == GGUF_U32) memcpy(&g->alignment, a->value, 4);
    if ((a != NULL && a->type != GGUF_U32) || (g->alignment & (g->alignment - 1)) != 0 ||
        g->alignment < 8 || g->alignment > 1 << 16)
        return fail(error, LVM_FORMAT,
                    "%s: general.alignment is not a usable number; it must be a power of two from "
                    "8 to 65536", g->path);
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
    const struct type_entry *info = type < 1000 ? type_info((int)type) : NULL;
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

static int compare_offsets(const void *a, const void *b) {
    const struct gguf_tensor *const *x = a, *const *y = b;
    return ((*x)->offset > (*y)->offset) - ((*x)->offset < (*y)->offset);
}

/* Refuses tensors that share bytes: one of them would be read as what it is not. */
static int refuse_overlap(const struct gguf *g, lvm_error *error) {
    int code = LVM_OK;
    const struct gguf_tensor **t = mem_alloc((size_t)g->n_tensors, sizeof *t, error);
    if (t == NULL) return LVM_MEMORY;
    for (int64_t i = 0; i < g->n_tensors; i++) t[i] = &g->tensors[i];
    qsort(t, (size_t)g->n_tensors, sizeof *t, compare_offsets);
    for (int64_t i = 1; code == LVM_OK && i < g->n_tensors; i++)
        if (t[i]->offset < t[i - 1]->offset + (uint64_t)t[i - 1]->bytes)
            code = fail(error, LVM_FORMAT,
                        "%s: tensor %.*s overlaps tensor %.*s; copy the file again", g->path,
                        TEXT_ARG(t[i]->name), TEXT_ARG(t[i - 1]->name));
    mem_free(t);
    return code;
}

static int parse_tensors(struct gguf *g, struct cursor *c, lvm_error *error) {
    for (int64_t i = 0; i < g->n_tensors; i++) {
        int code = parse_tensor(g, &g->tensors[i], c, error);
        if (c->failed) return fail(error, LVM_FORMAT, "%s: damaged list of tensors", g->path);
        if (code != LVM_OK) return code;
        g->tensor_by_name[i] = (struct named_index){g->tensors[i].name, i};
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
    int code = sort_names(g, g->tensor_by_name, g->n_tensors, "tensor", error);
    return code == LVM_OK ? refuse_overlap(g, error) : code;
}

static void gguf_free(struct gguf *g) {
    mem_free(g->keys);
    mem_free(g->tensors);
    mem_free(g->key_by_name);
    mem_free(g->tensor_by_name);
    memset(g, 0, sizeof *g);
}

static int gguf_alloc(struct gguf *g, lvm_error *error) {
    g->keys = mem_alloc((size_t)g->n_keys, sizeof *g->keys, error);
    g->key_by_name = mem_alloc((size_t)g->n_keys, sizeof *g->key_by_name, error);
    g->tensors = mem_alloc((size_t)g->n_tensors, sizeof *g->tensors, error);
    g->tensor_by_name = mem_alloc((size_t)g->n_tensors, sizeof *g->tensor_by_name, error);
    return g->keys == NULL || g->key_by_name == NULL || g->tensors == NULL ||
                   g->tensor_by_name == NULL ? LVM_MEMORY : LVM_OK;
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
    int code = gguf_alloc(g, error);
    if (code == LVM_OK) code = parse_keys(g, &c, error);
    if (code == LVM_OK) code = parse_tensors(g, &c, error);
    if (code != LVM_OK) gguf_free(g);
    return code;
}

/* ---- GGUF: keys by name and type ---- */

static int read_int(const struct gguf *g, const struct int_key *key, int *out, lvm_error *error) {
    const struct gguf_key *k = gguf_key(g, key->name);
    int64_t v = key->missing;
    if (k != NULL) {
        struct cursor c = {k->value, k->size, 0, 0};
        if (k->type == GGUF_U32) v = (int64_t)cursor_number(&c, 4);
        else if (k->type == GGUF_I32) v = (int32_t)cursor_number(&c, 4);
        else if (k->type == GGUF_BOOL) v = (int64_t)cursor_number(&c, 1);
        else return fail(error, LVM_FORMAT, "%s: key %s is not a whole number", g->path, key->name);
    } else if (v < key->low || v > key->high) {
        return fail(error, LVM_FORMAT, "%s: key %s is missing", g->path, key->name);
    }
    if (v < key->low || v > key->high)
        return fail(error, LVM_FORMAT,
                    "%s: key %s is %lld; it must be a whole number from %d to %d", g->path,
                    key->name, (long long)v, key->low, key->high);
    *out = (int)v;
    return LVM_OK;
}

static int read_float(const struct gguf *g, const struct float_key *key, float *out,
                      lvm_error *error) {
    const struct gguf_key *k = gguf_key(g, key->name);
    if (k == NULL || k->type != GGUF_F32)
        return fail(error, LVM_FORMAT, "%s: key %s is missing or no 32-bit float", g->path,
                    key->name);
    memcpy(out, k->value, 4);
    if (!(*out >= key->low && *out <= key->high))
        return fail(error, LVM_FORMAT, "%s: key %s is %g; it must be a number from %g to %g",
                    g->path, key->name, (double)*out, (double)key->low, (double)key->high);
    return LVM_OK;
}

/* An array of at most max 32-bit integers in the key's bounds; *n is its length. */
static int read_ints(const struct gguf *g, const struct int_key *key, int max, int *out, int *n,
                     lvm_error *error) {
    const char *name = key->name;
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
        if (out[i] < key->low || out[i] > key->high)
            return fail(error, LVM_FORMAT,
                        "%s: key %s holds %d; each must be a whole number from %d to %d", g->path,
                        name, out[i], key->low, key->high);
    }
    return LVM_OK;
}

/* The text of a key, or nothing. */
static struct text read_text(const struct gguf *g, const char *name) {
    const struct gguf_key *k = gguf_key(g, name);
    struct cursor c = {k != NULL ? k->value : NULL, k != NULL ? k->size : 0, 0, 0};
    return k != NULL && k->type == GGUF_STRING ? cursor_text(&c) : (struct text){"", 0};
}

/* ---- GGUF: what nobody asked for ---- */

static int begins(struct text t, const char *s) {
    return t.n >= strlen(s) && memcmp(t.s, s, strlen(s)) == 0;
}

/* The class of the tokenizer owns attention blocks that it never runs: those of encoder levels of
   one residual block (chapter 4). Checkpoints hold them, and convert.py carries them along. */
static int is_carried(const lvm_model *m, struct text name) {
    static const char start[] = "vq.encoder.down.", *const ends[] = {"weight", "bias"};
    const struct vqgan *vq = m->vq;
    char wanted[80];
    if (vq == NULL || vq->n_res_blocks > 1 || name.n < sizeof start || !begins(name, start))
        return 0;
    int level = name.s[sizeof start - 1] - '0', attention = 0;
    for (int a = 0; a < vq->n_attn_at && level >= 0 && level < vq->n_levels; a++)
        attention |= vq->attn_at[a] == vq->R >> level;
    for (int i = 0; attention && i < 2 * VQ_PARTS; i++) {
        const struct vq_part *p = &vq_parts[i / 2];
        snprintf(wanted, sizeof wanted, "%s%d.attn.0%s.%s", start, level, p->name, ends[i % 2]);
        if (p->kind == VQ_ATTENTION && text_is(name, wanted)) return 1;
    }
    return 0;
}

static int refuse_unknown(const lvm_model *m, lvm_error *error) {
    const struct gguf *g = &m->file;
    char list[160] = ""; /* the first three */
    int64_t n = 0;
    size_t at = 0;
    uint8_t *known = mem_alloc((size_t)g->n_tensors, 1, error);
    if (known == NULL) return LVM_MEMORY;
    for (int i = 0; i < m->n_specs; i++) {
        int64_t tensor = find_name(g->tensor_by_name, g->n_tensors, m->specs[i].name);
        if (tensor >= 0) known[tensor] = 1;
    }
    for (int64_t i = 0; i < g->n_tensors; i++) {
        struct text name = g->tensors[i].name;
        if (known[i] || is_carried(m, name) || ++n > 3) continue;
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%.*s", n > 1 ? ", " : "",
                               (int)min64((int64_t)name.n, 40), name.s);
    }
    mem_free(known);
    if (n == 0) return LVM_OK;
    return fail(error, LVM_FORMAT, "%s: holds %lld tensor%s that lvm does not know: %s%s", m->path,
                (long long)n, n > 1 ? "s" : "", list, n > 3 ? ", ..." : "");
}

/* ---- GGUF: writing ----

   A head, which may begin from nothing or take keys of another file, then the tensors' data in the
   order in which they were named, each padded to the alignment. The first failure ends it. */

struct gguf_writer {
    struct buffer keys, tensors; /* as the file will hold them */
    uint64_t n_keys, n_tensors;
    size_t data_bytes;           /* of the tensors so far, padded */
    uint32_t alignment;
    int code;
    lvm_error *error;
};

static void put_bytes(struct gguf_writer *w, struct buffer *b, const void *data, size_t n) {
    if (w->code == LVM_OK) w->code = buffer_add(b, data, n, w->error);
}

/* The low bytes of a number: machines that are not little-endian do not compile this file. */
static void put_number(struct gguf_writer *w, struct buffer *b, uint64_t v, size_t bytes) {
    put_bytes(w, b, &v, bytes);
}

static void put_text(struct gguf_writer *w, struct buffer *b, struct text t) {
    put_number(w, b, t.n, 8);
    put_bytes(w, b, t.s, (size_t)t.n);
}

/* A key with a value as the file holds it. */
static void put_key(struct gguf_writer *w, struct text name, uint32_t type, const void *value,
                    size_t size) {
    put_text(w, &w->keys, name);
    put_number(w, &w->keys, type, 4);
    put_bytes(w, &w->keys, value, size);
    w->n_keys++;
}

/* ne: fastest first. Returns where the tensor's data begin, behind the head. */
static size_t put_tensor(struct gguf_writer *w, struct text name, int n_dims, const int64_t *ne,
                         int type) {
    size_t at = w->data_bytes, bytes = (size_t)type_bytes(type, ne[0]);
    put_text(w, &w->tensors, name);
    put_number(w, &w->tensors, (uint64_t)n_dims, 4);
    for (int i = 0; i < n_dims; i++) put_number(w, &w->tensors, (uint64_t)ne[i], 8);
    put_number(w, &w->tensors, (uint64_t)type, 4);
    put_number(w, &w->tensors, at, 8);
    for (int i = 1; i < n_dims; i++) bytes *= (size_t)ne[i];
    w->data_bytes = (at + bytes + w->alignment - 1) / w->alignment * w->alignment;
    w->n_tensors++;
    return at;
}

/* The whole head with its padding; the writer is empty afterwards. */
static int finish_head(struct gguf_writer *w, struct buffer *head) {
    put_bytes(w, head, "GGUF", 4);
    put_number(w, head, 3, 4);
    put_number(w, head, w->n_tensors, 8);
    put_number(w, head, w->n_keys, 8);
    put_bytes(w, head, w->keys.data, w->keys.n);
    put_bytes(w, head, w->tensors.data, w->tensors.n);
    while (w->code == LVM_OK && head->n % w->alignment != 0) put_number(w, head, 0, 1);
    mem_free(w->keys.data);
    mem_free(w->tensors.data);
    return w->code;
}

static struct text text_of(const char *s) { return (struct text){s, strlen(s)}; }

static void put_int_key(struct gguf_writer *w, const char *name, int v) {
    put_key(w, text_of(name), GGUF_U32, &v, 4);
}

static void put_bool_key(struct gguf_writer *w, const char *name, int v) {
    put_key(w, text_of(name), GGUF_BOOL, &(uint8_t){v != 0}, 1);
}

static void put_float_key(struct gguf_writer *w, const char *name, float v) {
    put_key(w, text_of(name), GGUF_F32, &v, 4);
}

static void put_text_key(struct gguf_writer *w, const char *name, const char *v) {
    put_key(w, text_of(name), GGUF_STRING, NULL, 0);
    put_text(w, &w->keys, text_of(v));
}

static void put_ints_key(struct gguf_writer *w, const char *name, const int *v, int n) {
    put_key(w, text_of(name), GGUF_ARRAY, NULL, 0);
    put_number(w, &w->keys, GGUF_I32, 4);
    put_number(w, &w->keys, (uint64_t)n, 8);
    put_bytes(w, &w->keys, v, (size_t)n * sizeof *v);
}

/* Sizes as keys, from the tables that read them: switches as booleans, as convert.py writes them;
   an id of -1 is none. */
static void put_int_keys(struct gguf_writer *w, const struct int_key *keys, size_t n,
                         const void *sizes) {
    for (size_t i = 0; i < n; i++) {
        int v = *(const int *)(const void *)((const char *)sizes + keys[i].where);
        if (keys[i].low == 0 && keys[i].high == 1) put_bool_key(w, keys[i].name, v);
        else if (v >= 0) put_int_key(w, keys[i].name, v);
    }
}

/* All that chapter 4 reads of a model. */
static void put_model_keys(struct gguf_writer *w, const lvm_model *m) {
    const struct llama *a = &m->llama;
    put_text_key(w, "general.architecture", "lvm");
    put_int_key(w, "general.alignment", (int)w->alignment);
    put_int_key(w, "lvm.format_version", 1);
    if (a->L > 0) {
        put_int_keys(w, llama_keys, sizeof llama_keys / sizeof *llama_keys, a);
        put_float_key(w, "lvm.attention.layer_norm_rms_epsilon", a->eps);
        put_float_key(w, "lvm.rope.freq_base", a->theta);
    }
    if (m->vq != NULL) {
        put_int_keys(w, vq_keys, sizeof vq_keys / sizeof *vq_keys, m->vq);
        put_ints_key(w, "lvm.vq.channel_mult", m->vq->mult, m->vq->n_levels);
        put_ints_key(w, "lvm.vq.attn_resolutions", m->vq->attn_at, m->vq->n_attn_at);
    }
}

/* ---- Types: what a tensor is stored as ---- */

/* What is asked for: LVM_AUTO keeps a type. */
struct wanted_types {
    int transformer, vq, encoder;
};

/* Of the tensor of this name, now of type `now`. Where convolutions are to be quantised the
   encoder's become F16, unless another type is asked for or they are quantised already: it is the
   smaller half, and a token that flips is a wrong word in the transformer's prompt. Encoder levels
   at Q8_0 lost the first file that shipped 5 of 13 puzzles (docs/model.md). */
static int wanted_type(const struct wanted_types *t, struct text name, enum tensor_kind kind,
                       int now) {
    if (!begins(name, "vq.")) return t->transformer;
    if (!begins(name, "vq.encoder.") && !begins(name, "vq.quant_conv.")) return t->vq;
    if (t->encoder != LVM_AUTO) return t->encoder;
    int spared = kind == T_CONV && type_is_quantised(t->vq) && !type_is_quantised(now);
    return spared ? LVM_F16 : t->vq;
}

/* What a tensor with rows of k elements, now of type `now`, becomes where `wanted` is asked for
   (LVM_AUTO: nothing). Vectors stay as they are; so does what tokens hang on where it would be
   quantised. Q4_0 leaves convolutions and the matrix of the logits at Q8_0: for the latter it costs
   little and is worth half a percent of perplexity. */
static int stored_type(enum tensor_kind kind, int64_t k, int now, int wanted) {
    if (kind == T_VECTOR || wanted == LVM_AUTO) return now;
    if (kind == T_EXACT && type_is_quantised(wanted)) return now;
    if (wanted == LVM_Q4_0 && (kind == T_OUTPUT || kind == T_CONV)) wanted = LVM_Q8_0;
    return k % type_info(wanted)->block != 0 ? LVM_F16 : wanted;
}

/* Of a tensor of the file, which may hold some that the description does not know. Tied embeddings
   are the matrix of the logits too. */
static enum tensor_kind kind_of(const lvm_model *m, const struct gguf_tensor *t) {
    for (int i = 0; i < m->n_specs; i++)
        if (text_is(t->name, m->specs[i].name)) {
            int tied = m->specs[i].kind == T_EMBED && m->llama.output.data == m->llama.embed.data;
            return tied ? T_OUTPUT : m->specs[i].kind;
        }
    return t->n_dims == 1 ? T_VECTOR : begins(t->name, "vq.") ? T_CONV : T_MATRIX;
}

/* ---- Writing a weights file from tensors that lie elsewhere ---- */

/* A tensor to be written. */
struct written {
    struct text name;
    int n_dims, now, type;         /* its type now and in the file */
    int64_t ne[4];                 /* fastest first; 1 beyond n_dims */
    const uint8_t *data;
    const struct adapter *adapter; /* to be merged with it, or NULL */
};

/* One row at a time: room for a row in floats, and in any type. */
struct row_writer {
    struct outfile *out;
    uint32_t alignment;
    float alpha;                   /* of adapters */
    float *row;
    uint8_t *packed;
};

static int write_padding(struct outfile *out, uint64_t written, uint32_t alignment,
                         lvm_error *error) {
    static const uint8_t zeros[64];
    uint64_t n = (alignment - written % alignment) % alignment;
    int code = LVM_OK;
    for (; n > 0 && code == LVM_OK; n -= (uint64_t)min64(64, (int64_t)n))
        code = outfile_write(out, zeros, (size_t)min64(64, (int64_t)n), error);
    return code;
}

/* A matrix and its adapter. */
static int write_merged(const struct row_writer *w, const struct written *t, lvm_error *error) {
    struct merger d;
    const struct tensor own = {t->data, type_bytes(t->now, t->ne[0]), t->now, (int)t->ne[1],
                               (int)t->ne[0]};
    int code = merger_open(&d, &own, t->adapter, w->alpha, error);
    for (int r = 0; code == LVM_OK && r < own.rows; r++) {
        merge_row(&d, r, w->row);
        row_from_f32(t->type, w->row, w->packed, own.cols);
        code = outfile_write(w->out, w->packed, (size_t)type_bytes(t->type, own.cols), error);
    }
    merger_free(&d);
    return code;
}

static int write_tensor(const struct row_writer *w, const struct written *t, lvm_error *error) {
    int64_t rows = t->ne[1] * t->ne[2] * t->ne[3], in_bytes = type_bytes(t->now, t->ne[0]);
    int64_t out_bytes = type_bytes(t->type, t->ne[0]);
    const uint8_t *in = t->data;
    int code = LVM_OK;
    if (t->adapter != NULL) {
        code = write_merged(w, t, error);
    } else if (t->type == t->now) {
        code = outfile_write(w->out, in, (size_t)(in_bytes * rows), error);
    } else {
        for (int64_t r = 0; code == LVM_OK && r < rows; r++, in += in_bytes) {
            row_to_f32(t->now, in, w->row, t->ne[0]);
            row_from_f32(t->type, w->row, w->packed, t->ne[0]);
            code = outfile_write(w->out, w->packed, (size_t)out_bytes, error);
        }
    }
    return code == LVM_OK
               ? write_padding(w->out, (uint64_t)(out_bytes * rows), w->alignment, error) : code;
}

/* The file of these keys, which are used up, and tensors. */
static int write_weights(const char *path, struct gguf_writer *keys, const struct written *list,
                         int64_t n, float alpha, lvm_error *error) {
    struct outfile out;
    struct buffer head = {0};
    int64_t widest = 1;
    for (int64_t i = 0; i < n; i++) {
        put_tensor(keys, list[i].name, list[i].n_dims, list[i].ne, list[i].type);
        widest = max64(widest, list[i].ne[0]);
    }
    struct row_writer w = {&out, keys->alignment, alpha,
                           mem_alloc((size_t)widest, sizeof *w.row, error),
                           mem_alloc((size_t)widest, 4, error)};
    int code = finish_head(keys, &head);
    if (code == LVM_OK && (w.row == NULL || w.packed == NULL)) code = LVM_MEMORY;
    if (code == LVM_OK) code = outfile_open(&out, path, error);
    if (code == LVM_OK) {
        code = outfile_write(&out, head.data, head.n, error);
        for (int64_t i = 0; code == LVM_OK && i < n; i++) code = write_tensor(&w, &list[i], error);
        code = outfile_close(&out, code, error);
    }
    mem_free(w.row);
    mem_free(w.packed);
    mem_free(head.data);
    return code;
}

/* A tensor of a file as it is. */
static struct written same_tensor(const struct gguf *g, const struct gguf_tensor *t) {
    struct written x = {t->name, t->n_dims, t->type, t->type, {1, 1, 1, 1},
                        g->data + g->data_start + t->offset, NULL};
    memcpy(x.ne, t->ne, sizeof x.ne);
    return x;
}

/* ---- Quantise and merge: the same file with other types, or with adapters in it ---- */

static const struct adapter *adapter_of(const struct adapters *ad, struct text matrix) {
    for (int i = 0; ad != NULL && i < ad->n; i++)
        if (text_compare(ad->list[i].matrix, matrix) == 0) return &ad->list[i];
    return NULL;
}

/* Keys as they are; the name tells of adapters. */
static void put_keys_of(struct gguf_writer *w, const lvm_model *m, const struct adapters *ad) {
    const struct gguf *g = &m->file;
    for (int64_t i = 0; i < g->n_keys; i++) {
        const struct gguf_key *key = &g->keys[i];
        if (ad == NULL || !text_is(key->name, "general.name"))
            put_key(w, key->name, key->type, key->value, key->size);
    }
    if (ad == NULL) return;
    struct text name = read_text(&ad->file, "general.name");
    char both[300];
    snprintf(both, sizeof both, "%.140s + %.*s", *m->name != 0 ? m->name : "lvm",
             name.n > 0 ? (int)min64((int64_t)name.n, 140) : 4, name.n > 0 ? name.s : "LoRA");
    put_text_key(w, "general.name", both);
}

/* Tensors in the file's order with their new types, and with adapters (NULL: none). */
static int rewrite_model(const lvm_model *m, const char *path, const struct wanted_types *wanted,
                         const struct adapters *ad, lvm_error *error) {
    const struct gguf *g = &m->file;
    struct gguf_writer keys = {.alignment = g->alignment, .error = error};
    struct written *list = mem_alloc((size_t)g->n_tensors, sizeof *list, error);
    if (list == NULL) return LVM_MEMORY;
    put_keys_of(&keys, m, ad);
    for (int64_t i = 0; i < g->n_tensors; i++) {
        const struct gguf_tensor *t = &g->tensors[i];
        enum tensor_kind kind = kind_of(m, t);
        list[i] = same_tensor(g, t);
        list[i].type = stored_type(kind, t->ne[0], t->type,
                                   wanted_type(wanted, t->name, kind, t->type));
        list[i].adapter = adapter_of(ad, t->name);
    }
    int code = write_weights(path, &keys, list, g->n_tensors, ad != NULL ? ad->alpha : 0, error);
    mem_free(list);
    return code;
}

static int is_type(int type) { return type == LVM_AUTO || type_info(type) != NULL; }

/* Refuses to write over an input, or over what is there already. */
static int check_rewrite(const char *in, const char *out, int force, lvm_error *error) {
    if (same_file(in, out))
        return fail(error, LVM_INVALID, "%s: is the input too; choose another", out);
    if (os_stat(out).kind == OS_FILE && standard_stream(out) < 0 && !force)
        return fail(error, LVM_INVALID, "%s: exists; --force replaces it", out);
    return LVM_OK;
}

int lvm_quantize(const char *in, const char *out, int type, int vq_type, int encoder_type,
                 int force, lvm_error *error) {
    clear_error(error);
    const struct wanted_types wanted = {type, vq_type, encoder_type};
    lvm_error own = {LVM_OK, ""};
    if (error == NULL) error = &own;
    if (in == NULL || out == NULL)
        return null_argument(error, "lvm_quantize", in == NULL ? "in" : "out");
    int code = check_rewrite(in, out, force, error);
    if (code != LVM_OK) return code;
    if (!is_type(type) || !is_type(vq_type) || !is_type(encoder_type))
        return fail(error, LVM_INVALID, "unknown type %d, %d or %d", type, vq_type, encoder_type);
    lvm_model *m = lvm_open(in, 0, error);
    if (m == NULL) return error->code;
    code = rewrite_model(m, out, &wanted, NULL, error);
    lvm_close(m);
    return code;
}

int lvm_merge(const char *base, const char *adapters, const char *out, int type, int force,
              lvm_error *error) {
    clear_error(error);
    const struct wanted_types wanted = {type, LVM_AUTO, LVM_AUTO};
    struct adapters ad;
    lvm_error own = {LVM_OK, ""};
    if (error == NULL) error = &own;
    if (base == NULL || adapters == NULL || out == NULL)
        return null_argument(error, "lvm_merge",
                             base == NULL ? "base" : adapters == NULL ? "adapters" : "out");
    if (!is_type(type)) return fail(error, LVM_INVALID, "unknown type %d", type);
    int code = check_rewrite(base, out, force, error);
    if (code == LVM_OK) code = check_rewrite(adapters, out, force, error);
    if (code != LVM_OK) return code;
    lvm_model *m = lvm_open(base, 0, error);
    if (m == NULL) return error->code;
    code = adapters_open(&ad, adapters, m, error);
    if (code == LVM_OK) {
        code = rewrite_model(m, out, &wanted, &ad, error);
        adapters_close(&ad);
    }
    lvm_close(m);
    return code;
}

/* ---- Export: what a trainer learnt ---- */

/* A trainer's tensor as `type`, LVM_AUTO: as init has it, else F16. */
static struct written trained_tensor(const struct lvm_trainer *t, const struct param *p,
                                     const struct tensor_spec *s, int type) {
    const lvm_model *init = t->o.init;
    const struct gguf_tensor *before = init != NULL ? gguf_tensor(&init->file, p->name) : NULL;
    int now = before != NULL ? before->type : LVM_F16;
    int tied = s->kind == T_EMBED && t->net.output == p;
    struct written x = {text_of(p->name), s->n_dims, p->w.type, LVM_F32,
                        {s->dims[s->n_dims - 1], s->n_dims > 1 ? s->dims[0] : 1, 1, 1}, p->w.data,
                        NULL};
    if (s->kind != T_VECTOR) x.type = stored_type(tied ? T_OUTPUT : s->kind, x.ne[0], now, type);
    return x;
}

/* Half of an adapter; floats of any kind. */
static struct written trained_adapter(const struct param *p, int type) {
    return (struct written){text_of(p->name), 2, p->w.type, type == LVM_AUTO ? LVM_F32 : type,
                            {p->w.cols, p->w.rows, 1, 1}, p->w.data, NULL};
}

/* The file's name without its ending is the model's. */
static void put_name_key(struct gguf_writer *w, const char *path) {
    const char *name = os_file_name(path), *dot = strrchr(name, '.');
    size_t n = dot != NULL && dot > name ? (size_t)(dot - name) : strlen(name);
    put_key(w, text_of("general.name"), GGUF_STRING, NULL, 0);
    put_text(w, &w->keys, (struct text){name, n});
}

static int export_adapters(const struct lvm_trainer *t, const char *path, int type,
                           struct written *list, lvm_error *error) {
    struct gguf_writer w = {.alignment = 64, .error = error};
    int64_t n = 0;
    put_text_key(&w, "general.architecture", "lvm");
    put_text_key(&w, "general.type", "adapter");
    put_name_key(&w, path);
    put_int_key(&w, "general.alignment", (int)w.alignment);
    put_int_key(&w, "lvm.format_version", 1);
    put_text_key(&w, "adapter.type", "lora");
    put_float_key(&w, "adapter.lora.alpha", t->o.lora_alpha);
    for (int i = 0; i < t->net.n_params; i++)
        if (t->net.params[i].spec == NULL)
            list[n++] = trained_adapter(&t->net.params[i], type);
    return write_weights(path, &w, list, n, 0, error);
}

/* Keys and tensors of the tokenizer as its file has them, from list[n] on; returns the new n. */
static int64_t take_tokenizer(const lvm_model *m, struct gguf_writer *w, struct written *list,
                              int64_t n) {
    const struct gguf *g = &m->file;
    for (int64_t i = 0; i < g->n_keys; i++)
        if (begins(g->keys[i].name, "lvm.vq."))
            put_key(w, g->keys[i].name, g->keys[i].type, g->keys[i].value, g->keys[i].size);
    for (int64_t i = 0; i < g->n_tensors; i++)
        if (begins(g->tensors[i].name, "vq.")) list[n++] = same_tensor(g, &g->tensors[i]);
    return n;
}

static int export_model(const struct lvm_trainer *t, const char *path, int type,
                        const lvm_model *tokenizer, struct written *list, lvm_error *error) {
    struct gguf_writer w = {.alignment = 64, .error = error};
    const lvm_model sizes = {.llama = *t->net.a};
    int64_t n = 0;
    put_model_keys(&w, &sizes);
    put_name_key(&w, path);
    const struct gguf_key *license =
        t->o.init != NULL ? gguf_key(&t->o.init->file, "general.license") : NULL;
    if (license != NULL) put_key(&w, license->name, license->type, license->value, license->size);
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i];
        const struct tensor_spec *s = p->spec;
        if (s != NULL) list[n++] = trained_tensor(t, p, s, type);
    }
    if (tokenizer != NULL) n = take_tokenizer(tokenizer, &w, list, n);
    return write_weights(path, &w, list, n, 0, error);
}

int lvm_trainer_export(lvm_trainer *trainer, const char *path, int type,
                       const lvm_model *tokenizer, lvm_error *error) {
    clear_error(error);
    const struct lvm_trainer *t = trainer;
    if (t == NULL || path == NULL)
        return null_argument(error, "lvm_trainer_export", t == NULL ? "trainer" : "path");
    if (!is_type(type)) return fail(error, LVM_INVALID, "unknown type %d", type);
    if (t->o.lora_rank > 0 && type_is_quantised(type))
        return fail(error, LVM_INVALID, "%s: adapters are f32, f16 or bf16", path);
    if (tokenizer != NULL && tokenizer->vq == NULL)
        return fail(error, LVM_INVALID, "%s: holds no tokenizer", tokenizer->path);
    if (tokenizer == NULL && t->o.init != NULL && t->o.init->vq != NULL) tokenizer = t->o.init;
    if (tokenizer != NULL && tokenizer->codes > t->net.a->V)
        return fail(error, LVM_INVALID, "%s: has %d codes, the transformer a vocabulary of %d",
                    tokenizer->path, tokenizer->codes, t->net.a->V);
    int64_t most = t->net.n_params + (tokenizer != NULL ? tokenizer->file.n_tensors : 0);
    struct written *list = mem_alloc((size_t)most, sizeof *list, error);
    if (list == NULL) return LVM_MEMORY;
    int code = t->o.lora_rank > 0 ? export_adapters(t, path, type, list, error)
                                  : export_model(t, path, type, tokenizer, list, error);
    mem_free(list);
    return code;
}

/* ---- Random weights: a model of given sizes, to measure with ---- */

#ifndef LVM_NO_MAIN

/* Random signs and fractions of numbers just above 2^-7: halves, and the scales of quantised
   blocks, are ready with that. What is much smaller becomes denormal on its way, which processors
   are slow at. */
static void fill_random(int type, uint8_t *data, size_t size) {
    uint64_t state = size, random = 0x83ff83ff83ff83ffu, exponents = 0x2000200020002000u;
    if (type == LVM_F32) random = 0x807fffff807fffffu, exponents = 0x3c0000003c000000u;
    if (type == LVM_BF16) random = 0x807f807f807f807fu, exponents = 0x3c003c003c003c00u;
    for (size_t i = 0; i + 8 <= size; i += 8) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint64_t word = (state >> 7 & random) | exponents;
        memcpy(data + i, &word, 8);
    }
}

/* The head of a file of such a model, and of each tensor of the description its type (-1: left out)
   and where its data begin. Optional vectors are left out. */
static int random_head(const lvm_model *m, const struct wanted_types *wanted, int *types,
                       size_t *at, struct buffer *head, size_t *data_bytes, lvm_error *error) {
    struct gguf_writer w = {.alignment = 64, .error = error};
    put_model_keys(&w, m);
    for (int i = 0; i < m->n_specs; i++) {
        const struct tensor_spec *s = &m->specs[i];
        int64_t ne[4];
        for (int d = 0; d < s->n_dims; d++) ne[d] = s->dims[s->n_dims - 1 - d];
        int asked = wanted_type(wanted, text_of(s->name), s->kind, LVM_F16);
        types[i] = s->kind == T_VECTOR ? LVM_F32 : stored_type(s->kind, ne[0], LVM_F16, asked);
        if (s->kind == T_VECTOR && s->optional) types[i] = -1;
        else at[i] = put_tensor(&w, text_of(s->name), s->n_dims, ne, types[i]);
    }
    *data_bytes = w.data_bytes;
    return finish_head(&w, head);
}

/* Writes the file of a described model into memory that is m's from then on. */
static int write_random(lvm_model *m, const lvm_model *shape, const struct wanted_types *wanted,
                        size_t *size, lvm_error *error) {
    struct buffer head = {0};
    int *types = mem_alloc((size_t)shape->n_specs, sizeof *types, error);
    size_t *at = mem_alloc((size_t)shape->n_specs, sizeof *at, error), bytes = 0;
    int code = types == NULL || at == NULL
                   ? LVM_MEMORY
                   : random_head(shape, wanted, types, at, &head, &bytes, error);
    if (code == LVM_OK) m->owned = mem_alloc(1, head.n + bytes, error);
    if (m->owned == NULL) code = LVM_MEMORY;
    if (code == LVM_OK) memcpy(m->owned, head.data, head.n);
    for (int i = 0; code == LVM_OK && i < shape->n_specs; i++) {
        const struct tensor_spec *s = &shape->specs[i];
        int64_t elements = 1;
        for (int d = 0; d < s->n_dims; d++) elements *= s->dims[d];
        if (types[i] >= 0)
            fill_random(types[i], m->owned + head.n + at[i],
                        (size_t)type_bytes(types[i], elements));
    }
    *size = head.n + bytes;
    mem_free(types);
    mem_free(at);
    mem_free(head.data);
    return code;
}

/* llama's sizes and vq's configuration are given; either may be NULL. */
static lvm_model *random_model(const struct llama *llama, const struct vqgan *vq,
                               const struct wanted_types *wanted, lvm_error *error) {
    lvm_model *shape = model_new("(random weights)", error);
    lvm_model *m = model_new("(random weights)", error);
    size_t size = 0;
    int code = shape == NULL || m == NULL ? LVM_MEMORY : LVM_OK;
    if (code == LVM_OK && llama != NULL) shape->llama = *llama;
    if (code == LVM_OK && vq != NULL) {
        shape->vq = mem_alloc(1, sizeof *vq, error);
        if (shape->vq == NULL) code = LVM_MEMORY;
        else *shape->vq = *vq;
    }
    if (code == LVM_OK) code = describe_model(shape, error);
    if (code == LVM_OK) code = write_random(m, shape, wanted, &size, error);
    if (code == LVM_OK) code = load_description(m, m->owned, size, error);
    lvm_close(shape);
    return open_model(m, code, error);
}

#endif

/* ---- Options: defaults, presets, checks ---- */

lvm_options lvm_default_options(void) {
    lvm_options o = {.size = sizeof o, .kv_type = LVM_AUTO};
    return o;
}

lvm_sampling lvm_default_sampling(void) {
    lvm_sampling s = {.size = sizeof s, .temperature = 1, .top_p = 0.9f, .seed = 1};
    return s;
}

int lvm_sampling_preset(const char *name, lvm_sampling *sampling, lvm_error *error) {
    clear_error(error);
    static const struct { const char *name; float temperature, top_p; int top_k;
    } presets[2] = {{"lvm", 1, 1, 50}, {"delvm", 0.1f, 0.75f, 0}};
    if (name == NULL || sampling == NULL)
        return null_argument(error, "lvm_sampling_preset", name == NULL ? "name" : "sampling");
    for (int i = 0; i < 2; i++)
        if (strcmp(presets[i].name, name) == 0) {
            sampling->temperature = presets[i].temperature;
            sampling->top_p = presets[i].top_p;
            sampling->top_k = presets[i].top_k;
            return LVM_OK;
        }
    return fail(error, LVM_INVALID, "the presets are lvm and delvm");
}

/* Copies an option struct, which begins with its size: an older program's is smaller, and what it
   does not have keeps its default. oldest: the size of version 0.1's. */
static int copy_options(void *to, size_t size, size_t oldest, const void *from, const char *name,
                        lvm_error *error) {
    uint32_t given;
    memcpy(&given, from, sizeof given);
    if (given < oldest || given > size)
        return fail(error, LVM_INVALID, "%s.size is %u; this lvm takes %zu to %zu: fill it with "
                    "its default function", name, given, oldest, size);
    memcpy(to, from, given);
    return LVM_OK;
}

static int settle_window(const lvm_model *m, lvm_options *o, lvm_error *error) {
    int most = images_that_fit(m, m->llama.bos >= 0);
    if (m->llama.L == 0) return LVM_OK;
    if (o->window == 0) o->window = (int)min64(16, most);
    else if (o->window < 2 || o->window > most)
        return fail(error, LVM_INVALID, "a window of %d images: %s takes 2 to %d", o->window,
                    m->path, most);
    return LVM_OK;
}

/* Takes what the caller chose (NULL: nothing), fills what was left to lvm and checks the rest. */
static int settle_options(const lvm_model *m, const lvm_options *chosen, lvm_options *o,
                          lvm_error *error) {
    *o = lvm_default_options();
    int code = LVM_OK, weights = m->llama.L > 0 ? m->llama.layers[0].q.type : LVM_F32;
    if (chosen != NULL)
        code = copy_options(o, sizeof *o, offsetof(lvm_options, device), chosen, "lvm_options",
                            error);
    if (code != LVM_OK) return code;
    o->size = sizeof *o;
    if (o->threads == 0) o->threads = processors();
    if (o->threads < 1 || o->threads > 1024)
        return fail(error, LVM_INVALID, "%d threads: lvm takes 1 to 1024", o->threads);
    if (o->kv_type == LVM_AUTO)
        o->kv_type = weights == LVM_F32 || o->exact ? LVM_F32
                     : type_is_quantised(weights)   ? LVM_Q8_0
                                                    : LVM_F16;
    if (o->kv_type != LVM_F32 && o->kv_type != LVM_F16 && o->kv_type != LVM_Q8_0)
        return fail(error, LVM_INVALID, "the key/value cache can be f32, f16 or q8_0");
    if (o->fit != LVM_SQUASH && o->fit != LVM_CROP)
        return fail(error, LVM_INVALID, "fit is %d, neither LVM_SQUASH nor LVM_CROP", o->fit);
    if (o->device == NULL || *o->device == 0) o->device = default_device();
    if (strlen(o->device) >= sizeof((lvm_ctx *)0)->device)
        return fail(error, LVM_INVALID, "device \"%.40s...\": no device has so long a name",
                    o->device);
    return settle_window(m, o, error);
}

/* The caller's sampling (NULL: the default), checked. */
static int settle_sampling(const lvm_sampling *chosen, lvm_sampling *s, lvm_error *error) {
    *s = lvm_default_sampling();
    int code = LVM_OK;
    if (chosen != NULL)
        code = copy_options(s, sizeof *s, offsetof(lvm_sampling, user), chosen, "lvm_sampling",
                            error);
    if (code != LVM_OK) return code;
    s->size = sizeof *s;
    if (!(s->temperature >= 1e-3f && s->temperature <= 100))
        return fail(error, LVM_INVALID, "temperature %g is not between 0.001 and 100",
                    (double)s->temperature);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return fail(error, LVM_INVALID, "top-p %g is not above 0 and up to 1", (double)s->top_p);
    if (s->top_k < 0) return fail(error, LVM_INVALID, "top-k %d is negative", s->top_k);
    return LVM_OK;
}

void lvm_set_progress(lvm_ctx *ctx, lvm_progress *progress, void *user) {
    if (ctx == NULL) return;
    ctx->o.progress = progress;
    ctx->o.user = user;
}

/* Brown 1994, "Random number generation with arbitrary strides": a step is a state + c, and two,
   four, ... together are of that form too. */
static void rng_skip(struct rng *r, uint64_t n) {
    uint64_t a = 6364136223846793005u, c = r->increment;
    for (; n > 0; n >>= 1, c *= a + 1, a *= a)
        if (n & 1) r->state = r->state * a + c;
}

static int settle_token(const lvm_ctx *ctx, const struct continuation *c, int s, int i,
                        lvm_error *error) {
    const lvm_sampling *by = c->sampling;
    const float *logits = c->logits + (int64_t)s * ctx->m->llama.V;
    int32_t *id = &c->ids[s * c->ld + i];
    if (by->choose != NULL && by->choose(by->user, s, (int)c->done + i, logits, id) != 0)
        return fail(error, LVM_CANCELLED, "cancelled by lvm_sampling.choose");
    if (check_ids(id, 1, c->codes, NULL) != LVM_OK)
        return fail(error, LVM_INVALID, "lvm_sampling.choose gave %d, not 0 .. %d", (int)*id,
                    c->codes - 1);
    if (by->log_likelihood != NULL)
        by->log_likelihood[s] -= (double)negative_log_likelihood(logits, ctx->m->llama.V, *id);
    return LVM_OK;
}

/* ---- Devices: which there are, and a model's copies on them ---- */

#ifdef LVM_CUDA
const struct backend *lvm_cuda_backend(void); /* lvm_cuda.cu */
#define DEVICES "cpu, cuda and cuda:N"
#else
#define DEVICES "cpu"
#endif

/* A copy of a model: one a device that a context was ever opened on. */
struct device {
    const struct backend *b;
    char name[32];
    void *copy;
    struct device *next;
};

struct devices {
    pthread_mutex_t mutex; /* for contexts that are made at the same time */
    struct device *first;
};

static struct devices *devices_new(lvm_error *error) {
    struct devices *d = mem_alloc(1, sizeof *d, error);
    if (d != NULL) pthread_mutex_init(&d->mutex, NULL);
    return d;
}

static void devices_free(struct devices *d) {
    struct device *next;
    if (d == NULL) return;
    for (struct device *i = d->first; i != NULL; i = next) {
        next = i->next;
        i->b->model_close(i->copy);
        mem_free(i);
    }
    pthread_mutex_destroy(&d->mutex);
    mem_free(d);
}

/* Whether a context was ever opened. */
static int devices_are_open(struct devices *d) {
    pthread_mutex_lock(&d->mutex);
    int open = d->first != NULL;
    pthread_mutex_unlock(&d->mutex);
    return open;
}

/* The backend that a device's name asks for. */
static const struct backend *find_backend(const char *device, lvm_error *error) {
    size_t n = strcspn(device, ":");
#ifdef LVM_CUDA
    if (n == 4 && memcmp(device, "cuda", n) == 0) return lvm_cuda_backend();
#endif
    if (n == 3 && memcmp(device, "cpu", n) == 0) return &cpu_backend;
    fail(error, LVM_INVALID, "device \"%.40s\": this lvm was built for " DEVICES, device);
    return NULL;
}

static const char *best_device(void) {
#ifdef LVM_CUDA
    if (lvm_cuda_backend()->count(NULL) > 0) return "cuda";
#endif
    return "cpu";
}

/* The model's copy on a device, made when the first context needs it. */
static int open_device(const lvm_model *m, const struct backend *b, const char *name, void **copy,
                       lvm_error *error) {
    struct devices *all = m->devices;
    int code = LVM_OK;
    pthread_mutex_lock(&all->mutex);
    struct device *d = all->first;
    while (d != NULL && (d->b != b || strcmp(d->name, name) != 0)) d = d->next;
    if (d == NULL) {
        d = mem_alloc(1, sizeof *d, error);
        code = d == NULL ? LVM_MEMORY : b->model_open(m, name, &d->copy, error);
        if (code == LVM_OK) {
            d->b = b;
            snprintf(d->name, sizeof d->name, "%s", name);
            d->next = all->first;
            all->first = d;
        } else {
            mem_free(d);
        }
    }
    if (code == LVM_OK) *copy = d->copy;
    pthread_mutex_unlock(&all->mutex);
    return code;
}

/* A context's state on a device, by a given backend or by the name's where b is NULL. */
static int ctx_open(lvm_ctx *ctx, const struct backend *b, const char *device, lvm_error *error) {
    void *copy = NULL;
    snprintf(ctx->device, sizeof ctx->device, "%s", device);
    ctx->o.device = ctx->device;
    ctx->b = b != NULL ? b : find_backend(ctx->device, error);
    if (ctx->b == NULL) return LVM_INVALID;
    int code = open_device(ctx->m, ctx->b, ctx->device, &copy, error);
    return code == LVM_OK ? ctx->b->open(copy, &ctx->o, &ctx->state, &ctx->limits, error) : code;
}

/* The CPU where no GPU is, or where it has no room for the model. */
static int ctx_open_best(lvm_ctx *ctx, lvm_error *error) {
#ifdef LVM_CUDA
    if (ctx_open(ctx, NULL, "cuda", &ctx->passed_over) == LVM_OK) return LVM_OK;
#endif
    return ctx_open(ctx, NULL, "cpu", error);
}

/* ---- Contexts: made and freed ---- */

/* Also of a context that ctx_new could not finish. */
void lvm_ctx_free(lvm_ctx *ctx) {
    if (ctx == NULL) return;
    if (ctx->state != NULL) ctx->b->close(ctx->state);
    for (int i = 0; i < MAX_ENCODED; i++) {
        mem_free(ctx->encoded[i].rgb);
        mem_free(ctx->encoded[i].ids);
    }
    void *all[] = {ctx->ids, ctx->logits, ctx->seqs, ctx->rows, ctx->rgb, ctx->tokens};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) mem_free(all[i]);
    mem_free(ctx);
}

/* Buffers on the host, as large as the device's limits ask for. */
static int ctx_alloc(lvm_ctx *ctx, lvm_error *error) {
    const lvm_model *m = ctx->m;
    ctx->limits.images = (int)min64(ctx->limits.images, MAX_ENCODED);
    size_t R = m->vq != NULL ? (size_t)m->vq->R : 0, images = (size_t)ctx->limits.images,
           rows = (size_t)ctx->limits.rows;
    ctx->ids = mem_alloc((size_t)m->llama.context + 1, sizeof *ctx->ids, error);
    ctx->logits = mem_alloc((size_t)ctx->limits.sequences * (size_t)m->llama.V,
                            sizeof *ctx->logits, error);
    ctx->seqs = mem_alloc(rows, sizeof *ctx->seqs, error);
    ctx->rows = mem_alloc(rows, sizeof *ctx->rows, error);
    ctx->rgb = mem_alloc(images, R * R * 3, error);
    ctx->tokens = mem_alloc(images, (size_t)m->T * sizeof *ctx->tokens, error);
    if (ctx->ids == NULL || ctx->logits == NULL || ctx->seqs == NULL || ctx->rows == NULL ||
        ctx->rgb == NULL || ctx->tokens == NULL)
        return LVM_MEMORY;
    for (int i = 0; i < ctx->limits.rows; i++) ctx->rows[i] = i;
    return LVM_OK;
}

/* A context on a given backend, or where b is NULL on options.device. */
static lvm_ctx *ctx_new(const lvm_model *m, const struct backend *b, const lvm_options *options,
                        lvm_error *error) {
    lvm_ctx *ctx = mem_alloc(1, sizeof *ctx, error);
    if (ctx == NULL) return NULL;
    ctx->m = m;
    int code = settle_options(m, options, &ctx->o, error), chosen = 0;
    if (code == LVM_OK) chosen = *ctx->o.device != 0;
    if (code == LVM_OK && !chosen && b == NULL) code = ctx_open_best(ctx, error);
    else if (code == LVM_OK) code = ctx_open(ctx, b, chosen ? ctx->o.device : "cpu", error);
    if (code == LVM_OK) code = ctx_alloc(ctx, error);
    if (code == LVM_OK) return ctx;
    lvm_ctx_free(ctx);
    return NULL;
}

lvm_ctx *lvm_ctx_new(const lvm_model *model, const lvm_options *options, lvm_error *error) {
    clear_error(error);
    if (model != NULL) return ctx_new(model, NULL, options, error);
    null_argument(error, "lvm_ctx_new", "model");
    return NULL;
}

lvm_info lvm_ctx_info(const lvm_ctx *ctx) {
    lvm_info i = lvm_model_info(ctx != NULL ? ctx->m : NULL);
    if (ctx != NULL) i.device = ctx->device;
    return i;
}

/* ---- Weights that are no numbers ---- */

/* The first number of a tensor that is not finite, or 0. */
static float not_finite(const struct tensor *t) {
    enum { PART = 32 * QK };
    float part[PART];
    int64_t n = (int64_t)t->rows * t->cols;
    for (int64_t at = 0; t->data != NULL && at < n; at += PART) {
        int64_t k = min64(PART, n - at);
        row_to_f32(t->type, t->data + type_bytes(t->type, at), part, k);
        for (int64_t i = 0; i < k; i++)
            if (!isfinite(part[i])) return part[i];
    }
    return 0;
}

static int blame_weights(lvm_ctx *ctx, int code, lvm_error *error) {
    const lvm_model *m = ctx->m;
    if (code != LVM_FORMAT) return code;
    ctx->n_fed = ctx->has_logits = 0;
    if (m->llama.L > 0) ctx->b->kv_trim(ctx->state, 0, 0);
    if (error == NULL) return code;
    lvm_error what = *error;
    for (int i = 0; i < m->n_specs; i++) {
        float bad = not_finite(m->specs[i].tensor);
        if (!isfinite(bad))
            return fail(error, code, "%s: %s: %s holds %s", m->path, what.text, m->specs[i].name,
                        isnan(bad) ? "NaN" : "infinity");
    }
    return fail(error, code, "%s: %s, though all weights are", m->path, what.text);
}

/* ---- What a context uses ---- */

/* Of the pages, which sequences share, each once: in all of them it has the same place. */
static int64_t pages_in_use(const struct kv_cache *kv) {
    int64_t n = 0;
    for (int s = 0; s < MAX_SEQUENCES; s++)
        for (int i = 0; i < kv->max_pages; i++) {
            int seen = kv->seq[s].pages[i] == NULL;
            for (int before = 0; !seen && before < s; before++)
                seen = kv->seq[before].pages[i] == kv->seq[s].pages[i];
            n += !seen;
        }
    return n;
}

static void cpu_usage(void *state, lvm_usage *usage) {
    const struct cpu *c = state;
    const struct llama *a = &c->m->llama;
    int64_t cache = pages_in_use(&c->lm.kv) * (int64_t)c->lm.kv.page_bytes,
            blocks = c->e.act != NULL ? (max64(a->D, a->F) / QK + 1) * MAX_ROWS : 0;
    usage->cache += cache;
    usage->context += cache + c->lm.bytes + c->vq.bytes + blocks * (int64_t)sizeof *c->e.act +
                      pool_threads(c->e.pool) * c->e.scratch_floats * (int64_t)sizeof(float);
}

lvm_usage lvm_ctx_usage(const lvm_ctx *ctx) {
    lvm_usage usage = {0};
    if (ctx == NULL) return usage;
    const lvm_model *m = ctx->m;
    int64_t image = 4 * (int64_t)m->T + (m->vq != NULL ? (int64_t)image_bytes(ctx) : 0),
            images = ctx->limits.images + min64(ctx->n_encoded, MAX_ENCODED);
    usage.context = (int64_t)sizeof *ctx + images * image + 4 * ((int64_t)m->llama.context + 1) +
                    8 * (int64_t)ctx->limits.rows +
                    4 * (int64_t)ctx->limits.sequences * m->llama.V;
    usage.weights = (int64_t)m->file.size;
    for (int i = 0; i < m->n_specs; i++)
        if (m->specs[i].merged != NULL)
            usage.weights += m->specs[i].tensor->rows * m->specs[i].tensor->row_bytes;
    usage.tokens = ctx->n_ids;
    usage.tokens_free = (int)max64(0, m->llama.context - ctx->n_ids);
    if (ctx->b->usage != NULL) ctx->b->usage(ctx->state, &usage);
    return usage;
}

/* ---- A context's state in a file ----

   head, ids i32[n_tokens], then of each remembered image ids i32[T] and rgb[R][R][3], then the
   pages of the key/value cache, then a hash of all of that. A file belongs to the weights, kernels
   and options that made it, because other ones would have computed other numbers. */

struct cache_head {
    char magic[8]; /* "LVMCACHE" */
    uint32_t version, kv_type, exact, resolution, tokens_per_image, n_tokens, n_images, n_pages;
    uint64_t page_bytes, weights;
    char isa[16];
};
_Static_assert(sizeof(struct cache_head) == 72, "no padding");

/* Mixes n bytes into a 64-bit hash, eight at a time: it finds damage, not malice. */
static uint64_t hash_bytes(uint64_t h, const void *data, size_t n) {
    const uint8_t *p = data;
    for (; n > 0; p += n < 8 ? n : 8, n -= n < 8 ? n : 8) {
        uint64_t word = n;
        memcpy(&word, p, n < 8 ? n : 8);
        h = (h ^ word) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return h;
}

/* What tells weights apart without reading all of them: keys, names, shapes and a few bytes of
   every tensor. */
static uint64_t weights_hash(const struct gguf *g) {
    uint64_t h = hash_bytes(g->size, g->data, g->data_start);
    for (int64_t i = 0; i < g->n_tensors; i++) {
        const uint8_t *data = g->data + g->data_start + g->tensors[i].offset;
        int64_t bytes = g->tensors[i].bytes, n = min64(64, bytes);
        h = hash_bytes(h, data, (size_t)n);
        h = hash_bytes(h, data + (bytes - n) / 2, (size_t)n);
        h = hash_bytes(h, data + bytes - n, (size_t)n);
    }
    return h;
}

/* The same of a model, with the adapters that are merged into it. */
static uint64_t model_hash(const lvm_model *m) {
    uint64_t h = weights_hash(&m->file);
    return m->adapters == 0 ? h : hash_bytes(h, &m->adapters, sizeof m->adapters);
}

/* A block is a page, as it lies in memory. */
static size_t cpu_kv_size(void *state) { return ((struct cpu *)state)->lm.kv.page_bytes; }

static int cpu_kv_get(void *state, int seq, int block, void *data, lvm_error *error) {
    const struct kv_cache *kv = &((struct cpu *)state)->lm.kv;
    (void)error;
    memcpy(data, kv->seq[seq].pages[block]->data, kv->page_bytes);
    return LVM_OK;
}

/* Blocks come in ascending order; each leaves the sequence as long as is known by then. */
static int cpu_kv_set(void *state, int seq, int block, const void *data, int n, lvm_error *error) {
    struct kv_cache *kv = &((struct cpu *)state)->lm.kv;
    int code = page_make_private(kv, &kv->seq[seq], block * KV_BLOCK, error);
    if (code != LVM_OK) return code;
    memcpy(kv->seq[seq].pages[block]->data, data, kv->page_bytes);
    kv->seq[seq].n = n;
    return LVM_OK;
}

static struct cache_head cache_head(const lvm_ctx *ctx, int n) {
    const lvm_model *m = ctx->m;
    int block = ctx->limits.kv_block;
    struct cache_head h = {.version = 2,
                           .kv_type = (uint32_t)ctx->o.kv_type,
                           .exact = ctx->o.exact != 0,
                           .resolution = m->vq != NULL ? (uint32_t)m->vq->R : 0,
                           .tokens_per_image = (uint32_t)m->T,
                           .n_tokens = (uint32_t)n,
                           .n_images = (uint32_t)min64(ctx->n_encoded, MAX_ENCODED),
                           .n_pages = (uint32_t)((n + block - 1) / block),
                           .page_bytes = ctx->b->kv_size(ctx->state),
                           .weights = model_hash(m)};
    memcpy(h.magic, "LVMCACHE", sizeof h.magic);
    snprintf(h.isa, sizeof h.isa, "%s", ctx->b == &cpu_backend ? m->kern->name : ctx->b->name);
    return h;
}

static int64_t cache_file_bytes(const struct cache_head *h) {
    int64_t image_ref = 4 * (int64_t)h->tokens_per_image +
                        3 * (int64_t)h->resolution * h->resolution;
    return (int64_t)sizeof *h + 4 * (int64_t)h->n_tokens + h->n_images * image_ref +
           h->n_pages * (int64_t)h->page_bytes + 8;
}

static int cache_write(struct outfile *out, const void *data, size_t n, uint64_t *hash,
                       lvm_error *error) {
    *hash = hash_bytes(*hash, data, n);
    return outfile_write(out, data, n, error);
}

static int write_cache(struct outfile *out, const lvm_ctx *ctx, int n, uint8_t *page,
                       lvm_error *error) {
    struct cache_head h = cache_head(ctx, n);
    size_t R = h.resolution, T = h.tokens_per_image;
    uint64_t hash = 0;
    int code = cache_write(out, &h, sizeof h, &hash, error);
    if (code == LVM_OK) code = cache_write(out, ctx->ids, (size_t)n * 4, &hash, error);
    for (uint32_t i = 0; code == LVM_OK && i < h.n_images; i++) {
        const struct encoded *e =
            &ctx->encoded[(ctx->n_encoded - h.n_images + i) % MAX_ENCODED];
        code = cache_write(out, e->ids, T * 4, &hash, error);
        if (code == LVM_OK) code = cache_write(out, e->rgb, R * R * 3, &hash, error);
    }
    for (uint32_t i = 0; code == LVM_OK && i < h.n_pages; i++) {
        code = ctx->b->kv_get(ctx->state, 0, (int)i, page, error);
        if (code == LVM_OK) code = cache_write(out, page, h.page_bytes, &hash, error);
    }
    return code == LVM_OK ? outfile_write(out, &hash, sizeof hash, error) : code;
}

int lvm_cache_save(lvm_ctx *ctx, const char *path, int n, lvm_error *error) {
    clear_error(error);
    struct outfile out;
    if (ctx == NULL || path == NULL)
        return null_argument(error, "lvm_cache_save", ctx == NULL ? "ctx" : "path");
    int code = need_transformer(ctx, error);
    if (code != LVM_OK) return code;
    if (n < 1 || n > ctx->n_fed)
        return fail(error, LVM_INVALID, "%d tokens to keep; the context has read %d", n,
                    ctx->n_fed);
    uint8_t *page = mem_alloc(1, ctx->b->kv_size(ctx->state), error);
    if (page == NULL) return LVM_MEMORY;
    code = outfile_open(&out, path, error);
    if (code == LVM_OK)
        code = outfile_close(&out, write_cache(&out, ctx, n, page, error), error);
    mem_free(page);
    return code;
}

struct cache_reader {
    const char *path;
    int fd;
    uint64_t hash;
};

static int cache_read(struct cache_reader *r, void *data, size_t n, lvm_error *error) {
    int code = read_exactly(r->fd, r->path, data, n, error);
    if (code == LVM_OK) r->hash = hash_bytes(r->hash, data, n);
    return code;
}

static int check_cache_head(const lvm_ctx *ctx, const struct cache_head *h, const char *path,
                            int64_t size, lvm_error *error) {
    struct cache_head own = cache_head(ctx, (int)min64(h->n_tokens, ctx->m->llama.context));
    if (memcmp(h->magic, own.magic, sizeof h->magic) != 0)
        return fail(error, LVM_FORMAT, "%s: is no cache of lvm", path);
    if (h->version != own.version || h->weights != own.weights)
        return fail(error, LVM_INVALID, "%s: belongs to other weights", path);
    if (h->kv_type != own.kv_type || h->exact != own.exact ||
        memcmp(h->isa, own.isa, sizeof h->isa) != 0)
        return fail(error, LVM_INVALID, "%s: was made with other options or kernels", path);
    if (h->resolution != own.resolution || h->tokens_per_image != own.tokens_per_image ||
        h->page_bytes != own.page_bytes || h->n_tokens < 1 ||
        h->n_tokens > (uint32_t)ctx->m->llama.context || h->n_images > MAX_ENCODED ||
        h->n_pages != own.n_pages || cache_file_bytes(h) != size)
        return fail(error, LVM_FORMAT, "%s: is damaged", path);
    return LVM_OK;
}

static int read_cached_image(lvm_ctx *ctx, struct cache_reader *r, lvm_error *error) {
    size_t T = (size_t)ctx->m->T, size = ctx->m->vq != NULL ? image_bytes(ctx) : 0;
    uint8_t *rgb = mem_alloc(1, size, error);
    int32_t *ids = mem_alloc(T, sizeof *ids, error);
    int code = rgb == NULL || ids == NULL ? LVM_MEMORY : cache_read(r, ids, T * 4, error);
    if (code == LVM_OK) code = cache_read(r, rgb, size, error);
    if (code == LVM_OK && check_ids(ids, (int64_t)T, ctx->m->codes, NULL) != LVM_OK)
        code = fail(error, LVM_FORMAT, "%s: is damaged", r->path);
    if (code == LVM_OK) code = remember_encoded(ctx, rgb, ids, error);
    mem_free(rgb);
    mem_free(ids);
    return code;
}

/* Everything behind the head; the context is used only when the hash is right too. */
static int read_cache(lvm_ctx *ctx, struct cache_reader *r, const struct cache_head *h,
                      uint8_t *page, lvm_error *error) {
    int n = (int)h->n_tokens;
    uint64_t hash = 0;
    int code = cache_read(r, ctx->ids, (size_t)n * 4, error);
    if (code == LVM_OK && check_ids(ctx->ids, n, ctx->m->llama.V, NULL) != LVM_OK)
        code = fail(error, LVM_FORMAT, "%s: is damaged", r->path);
    for (uint32_t i = 0; code == LVM_OK && i < h->n_images; i++)
        code = read_cached_image(ctx, r, error);
    for (uint32_t i = 0; code == LVM_OK && i < h->n_pages; i++) {
        code = cache_read(r, page, h->page_bytes, error);
        if (code == LVM_OK)
            code = ctx->b->kv_set(ctx->state, 0, (int)i, page,
                                  (int)min64(n, (int64_t)(i + 1) * ctx->limits.kv_block), error);
    }
    if (code == LVM_OK) code = read_exactly(r->fd, r->path, &hash, sizeof hash, error);
    if (code == LVM_OK && checksum_wrong(hash, r->hash))
        code = fail(error, LVM_FORMAT, "%s: is damaged", r->path);
    return code;
}

static void ctx_reset(lvm_ctx *ctx) {
    ctx->n_ids = ctx->n_fed = ctx->has_logits = 0;
    ctx->n_generated = 0;
    ctx->n_encoded = 0;
    ctx->b->kv_trim(ctx->state, 0, 0);
}

int lvm_cache_load(lvm_ctx *ctx, const char *path, lvm_error *error) {
    clear_error(error);
    struct cache_head h = {.version = 0};
    int64_t size = 0;
    if (ctx == NULL || path == NULL)
        return null_argument(error, "lvm_cache_load", ctx == NULL ? "ctx" : "path");
    int code = need_transformer(ctx, error);
    if (code != LVM_OK) return code;
    ctx_reset(ctx);
    struct cache_reader r = {path, open_file(path, &size, error), 0};
    if (r.fd < 0) return LVM_IO;
    if (size < (int64_t)sizeof h) code = fail(error, LVM_FORMAT, "%s: is no cache of lvm", path);
    if (code == LVM_OK) code = cache_read(&r, &h, sizeof h, error);
    if (code == LVM_OK) code = check_cache_head(ctx, &h, path, size, error);
    if (code == LVM_OK) {
        uint8_t *page = mem_alloc(1, h.page_bytes, error);
        code = page == NULL ? LVM_MEMORY : read_cache(ctx, &r, &h, page, error);
        mem_free(page);
    }
    close(r.fd);
    if (code == LVM_OK) ctx->n_ids = ctx->n_fed = (int)h.n_tokens;
    else ctx_reset(ctx);
    return code;
}

/* =================================================================================================
   Chapter 15.  The command line

   One table names the commands, one the options with the commands that take them; arguments are
   read, mistakes answered, help and manual page printed from both. Then come signals and the
   progress bar; the images that a call names and the outputs that it holds open; and the commands:
   on one prompt, on choices, on sets of prompts (chapter 9), on weights files, bench.

   What was written (its path, one a line) or asked for goes to stdout, everything else to stderr.
   Exit status: 0 done, 1 the work failed, 2 wrong usage. */

#ifndef LVM_NO_MAIN

enum command_bit {
    PREDICT = 1,
    ENCODE = 2,
    DECODE = 4,
    INFO = 8,
    QUANTIZE = 16,
    HELP = 32,
    RANK = 64,
    EVAL = 128,
    BATCH = 256,
    BENCH = 512,
    VERSION = 1024,
    PACK = 2048,
    UNPACK = 4096,
    MERGE = 1 << 15,
    SAMPLES = PREDICT | BATCH,
    READS = PREDICT | RANK | EVAL | BATCH, /* images as a prompt */
    RUNS = READS | ENCODE | DECODE
};

struct cli {
    const char **words; /* arguments that are no options */
    int n_words, split; /* split: words in front of a lone --, or -1 */
    const char *out, *base, *sheet, *truth, *apng, *cache, *resize, *lora;
    int images, candidates, flags, force, quiet, list, exif, type, vq_type, encoder_type, preset;
    int lines, grid, json, best, man, skip_existing, together;
    int config, vq, stage, prompt, new_tokens;
    const char *bos, *eos;
    int loss, integers;
    lvm_sampling sampling;
    lvm_options options;
};

enum option_kind { FLAG, TEXT, INTEGER, NUMBER, SEED, TYPE, ONE_OF };

/* where: offset of the value in struct cli. low, high: bounds of a number; of a TYPE high is the
   set of those allowed, bit i for entry i of type_table; of a ONE_OF the argument lists those
   allowed, and the value is the number of the one that is given. */
struct option {
    char letter;
    const char *name, *argument;
    int commands;
    enum option_kind kind;
    size_t where;
    double low, high;
    const char *help;
};

/* The value of --stage and of --config is a place in these lists. */
static const char bench_stages[] = "encode|prefill|generate|candidates|decode",
                  bench_shapes[] = "100m|300m|600m|1b|3b|7b";

#define AT(field) offsetof(struct cli, field)
static const struct option option_table[] = {
    {'o', "output", "FILE", PREDICT | ENCODE | DECODE, TEXT, AT(out), 0, 0,
     "where to write (out.png; encode: stdout)"},
    {'o', "output", "FOLDER", BATCH, TEXT, AT(out), 0, 0,
     "where outputs go (the working directory)"},
    {'o', "output", "FILE", PACK | UNPACK, TEXT, AT(out), 0, 0,
     "what to write (unpack: stdout)"},
    {'o', "output", "FILE", MERGE, TEXT, AT(out), 0, 0, "the weights file to write"},
    {'n', "images", "N", SAMPLES, INTEGER, AT(images), 1, 1 << 11,
     "images to predict, one after the other (1)"},
    {'c', "candidates", "N", SAMPLES, INTEGER, AT(candidates), 1, MAX_SEQUENCES,
     "answers to choose from (1)"},
    {'t', "temperature", "T", SAMPLES, NUMBER, AT(sampling.temperature), 1e-3, 100,
     "how freely to choose: 0.001 to 100 (1)"},
    {'p', "top-p", "P", SAMPLES, NUMBER, AT(sampling.top_p), 1e-6, 1,
     "keep the likeliest that hold P (0.9)"},
    {'k', "top-k", "K", SAMPLES, INTEGER, AT(sampling.top_k), 0, 1 << 20,
     "keep the K likeliest (0: all)"},
    {'s', "seed", "N", SAMPLES, SEED, AT(sampling.seed), 0, 0,
     "same seed and instruction set: same image (1)"},
    {0, "best", NULL, PREDICT, FLAG, AT(best), 0, 0, "keep the likeliest of the candidates"},
    {0, "greedy", NULL, SAMPLES, FLAG, AT(sampling.greedy), 0, 0, "always the likeliest token"},
    {0, "preset", "lvm|delvm", SAMPLES, ONE_OF, AT(preset), 0, 0,
     "the published programs' temperature, top-p and top-k"},
    {0, "window", "N", READS, INTEGER, AT(options.window), 2, 1 << 16,
     "images in the context (all that fit, at most 16)"},
    {0, "fit", "squash|crop", READS | ENCODE, ONE_OF, AT(options.fit), 0, 0,
     "how images become square (squash)"},
    {0, "sheet", "FILE", PREDICT, TEXT, AT(sheet), 0, 0, "prompt and answers in one image too"},
    {0, "truth", "FILE", PREDICT, TEXT, AT(truth), 0, 0, "the true answer, on the sheet too"},
    {0, "apng", "FILE", PREDICT, TEXT, AT(apng), 0, 0,
     "the images of -n as one animated PNG too"},
    {0, "cache", "FILE", PREDICT | RANK, TEXT, AT(cache), 0, 0,
     "keep the work on all but the last image here"},
    {0, "base", "FOLDER", RANK | EVAL | BATCH, TEXT, AT(base), 0, 0,
     "where the images of the set are (beside it)"},
    {0, "lora", "FILE", READS, TEXT, AT(lora), 0, 0, "adapters to add to the weights"},
    {0, "lines", "N", RANK | EVAL | BATCH, INTEGER, AT(lines), 1, INT32_MAX,
     "only the first N lines of the set"},
    {0, "skip-existing", NULL, BATCH, FLAG, AT(skip_existing), 0, 0,
     "skip lines whose output exists, to go on"},
    {0, "together", "N", BATCH, INTEGER, AT(together), 1, MAX_SEQUENCES,
     "lines answered at the same time (GPU: 8, CPU: 1)"},
    {0, "grid", NULL, BATCH, FLAG, AT(grid), 0, 0,
     "inputs in front of the answers, in one image"},
    {0, "resize", "W,H", BATCH, TEXT, AT(resize), 0, 0,
     "size of an answer, or \"original\": the last input's"},
    {0, "json", NULL, READS | BENCH, FLAG, AT(json), 0, 0, "one JSON object a line"},
    {0, "config", bench_shapes, BENCH, ONE_OF, AT(config), 0, 0, "shape of the transformer"},
    {0, "vq", "published|shipped", BENCH, ONE_OF, AT(vq), 0, 0,
     "shape of the tokenizer (published)"},
    {0, "prompt", "N", BENCH, INTEGER, AT(prompt), 1, 1 << 20, "tokens of the prompt (3840)"},
    {0, "new", "N", BENCH, INTEGER, AT(new_tokens), 1, 1 << 20, "tokens to generate (256)"},
    {0, "stage", bench_stages, BENCH, ONE_OF, AT(stage), 0, 0, "only this one"},
    {'j', "threads", "N", RUNS | BENCH, INTEGER, AT(options.threads), 1, 1024,
     "threads (the processors allowed)"},
    {0, "device", "NAME", RUNS | BENCH, TEXT, AT(options.device), 0, 0,
     DEVICES " (the best there is)"},
    {0, "exact", NULL, RUNS | BENCH, FLAG, AT(options.exact), 0, 0,
     "f32 arithmetic from quantised weights too"},
    {0, "kv", "TYPE", READS | BENCH, TYPE, AT(options.kv_type), 0, 11,
     "cache: f32, f16 or q8_0 (by the weights)"},
    {0, "exif", NULL, READS | ENCODE, FLAG, AT(exif), 0, 0,
     "rotate images as their EXIF orientation says"},
    {0, "no-mmap", NULL, RUNS | INFO, FLAG, AT(flags), 0, 0,
     "read the weights instead of mapping them"},
    {0, "type", "TYPE", QUANTIZE | MERGE | BENCH, TYPE, AT(type), 0, 31,
     "of the transformer: q8_0 q4_0 f16 bf16 f32 (kept)"},
    {0, "vq-type", "TYPE", QUANTIZE, TYPE, AT(vq_type), 0, 15,
     "of the tokenizer: q8_0 f16 bf16 f32 (kept)"},
    {0, "encoder-type", "TYPE", QUANTIZE, TYPE, AT(encoder_type), 0, 15,
     "of its encoder (f16 with --vq-type q8_0)"},
    {0, "loss", "all|answers", PACK, ONE_OF, AT(loss), 0, 0,
     "of which tokens something is learnt (all)"},
    {0, "bos", "ID|none", PACK, TEXT, AT(bos), 0, 0, "dropped in front of a sentence (8192)"},
    {0, "eos", "ID|none", PACK, TEXT, AT(eos), 0, 0, "dropped at the end of a sentence (8193)"},
    {0, "integers", NULL, UNPACK, FLAG, AT(integers), 0, 0, "arrays of numbers, not base64"},
    {0, "tensors", NULL, INFO, FLAG, AT(list), 0, 0, "list every tensor"},
    {0, "force", NULL, QUANTIZE | MERGE | PREDICT | ENCODE | DECODE | BATCH, FLAG, AT(force), 0, 0,
     "replace an existing weights file"},
    {'q', "quiet", NULL, RUNS | BENCH | PACK | UNPACK, FLAG, AT(quiet), 0, 0,
     "no progress, no notes"},
    {0, "man", NULL, HELP, FLAG, AT(man), 0, 0, "all of it as a manual page"}};
enum { N_OPTIONS = sizeof option_table / sizeof *option_table };

/* details: sentences for help COMMAND and the manual page; a line that begins with a blank is shown
   as it stands, as every command's example is. */
struct command {
    const char *name;
    int bit;
    int (*run)(struct cli *cli);
    const char *usage, *help, *details;
};

static int run_predict(struct cli *cli);
static int run_encode(struct cli *cli);
static int run_decode(struct cli *cli);
static int run_rank(struct cli *cli);
static int run_eval(struct cli *cli);
static int run_batch(struct cli *cli);
static int run_bench(struct cli *cli);
static int run_info(struct cli *cli);
static int run_quantize(struct cli *cli);
static int run_pack(struct cli *cli);
static int run_unpack(struct cli *cli);
static int run_merge(struct cli *cli);
static int run_help(struct cli *cli);
static int run_version(struct cli *cli);

static const struct command command_table[] = {
    {"predict", PREDICT, run_predict, "[predict] WEIGHTS IMAGE|FOLDER...",
     "predict the next image(s) of a visual sentence",
     "A prompt is a row of images: input, output, input, output, ..., input.\n"
     "PNG, JPEG and PNM of any size are read; a folder stands for its images in\n"
     "natural order, - for those that stand one behind the other on stdin. Several\n"
     "answers are numbered: out-1.png, out-2.png for -n 2, out-1a.png, out-1b.png\n"
     "for -c 2; -o - writes one image to stdout. An answer's file and a line on\n"
     "stderr say what decided its pixels; --json says it with ids and likelihoods.\n"
     "With --cache the next prompt that begins with the same images computes only\n"
     "the rest.\n"
     "  lvm weights.bin prompt/depth -o depth.png --sheet sheet.png\n"},
    {"encode", ENCODE, run_encode, "encode WEIGHTS IMAGE|FOLDER...",
     "images to token ids, one line an image",
     "- stands for images one behind the other on stdin, as a video decoder pipes\n"
     "them.\n"
     "  lvm encode weights.bin a.png > tokens.txt\n"},
    {"decode", DECODE, run_decode, "decode WEIGHTS TOKENS",
     "token ids (a file, or - for stdin) to images",
     "  lvm encode weights.bin a.png | lvm decode weights.bin - -o copy.png\n"},
    {"rank", RANK, run_rank, "rank WEIGHTS IMAGE|FOLDER... -- CHOICE...",
     "which choice continues a visual sentence best",
     "For each choice the perplexity of its tokens behind the prompt, and the\n"
     "probability that softmax gives it among the choices. Options stand before\n"
     "the lone --. A set in place of images (SET.jsonl, or - for stdin, as eval\n"
     "reads them) ranks the choices of each line.\n"
     "  lvm rank weights.bin puzzle/ -- a.png b.png c.png\n"},
    {"eval", EVAL, run_eval, "eval WEIGHTS SET.jsonl|-",
     "perplexity of target images, answers of puzzles",
     "A set has a JSON object a line:\n"
     "  {\"input\": [\"a.png\", \"b.png\"], \"target\": [\"c.png\"]}\n"
     "  {\"input\": [\"a.png\"], \"choices\": [\"b.png\", \"c.png\"], \"answer\": 1}\n"
     "Paths are relative to --base, else to the set's folder, else to the working\n"
     "directory; \"input_tokens\" and so on give token ids instead. The last line is\n"
     "the mean over the lines. A bad line is reported and skipped; the exit status\n"
     "is 1 then. From stdin (-) each line is answered before the next is awaited.\n"
     "  lvm eval weights.bin depth.jsonl --lines 20\n"},
    {"batch", BATCH, run_batch, "batch WEIGHTS SET.jsonl|-", "predictions for many prompts",
     "A set has a JSON object a line, with the name of what to write:\n"
     "  {\"input\": [\"a.png\", \"b.png\", \"c.png\"], \"output\": \"answer.png\"}\n"
     "One image a line is written below the output folder: candidates are its rows.\n"
     "Lines that have a \"target\" too report the mean squared error, of each\n"
     "candidate and their mean. Lines that would write one file are refused before\n"
     "any work. From stdin (-) each line is answered before the next is awaited.\n"
     "  lvm batch weights.bin prompts.jsonl -o answers\n"},
    {"bench", BENCH, run_bench, "bench [WEIGHTS]",
     "speed of every stage beside this machine's limits",
     "With --config and --vq instead of a weights file: random weights of that\n"
     "shape, so that you see what a model costs before you have it. The floor is\n"
     "the time at the limit: floats for the tokenizer, integer products for\n"
     "quantised prompts, memory bandwidth for new tokens; on a GPU f16 products\n"
     "and copying memory. The last line tells how long one image takes behind a\n"
     "prompt of images that long (all encoded, nothing cached), and the memory in\n"
     "use.\n"
     "  lvm bench --config 300m --vq published --type q8_0\n"},
    {"info", INFO, run_info, "info WEIGHTS", "what is in a weights file",
     "  lvm info weights.bin\n"},
    {"quantize", QUANTIZE, run_quantize, "quantize IN OUT",
     "rewrite a weights file with other types",
     "The tokenizer is never q4_0, its codebook and first convolutions are never\n"
     "quantised, and --type q4_0 leaves the output matrix at q8_0. With\n"
     "--vq-type q8_0 the encoder becomes f16: a quantised one finds other tokens.\n"
     "  lvm quantize big.bin small.bin --type q8_0 --vq-type q8_0\n"},
    {"pack", PACK, run_pack, "pack SET.jsonl|-... -o OUT.tok", "sentences of tokens to a .tok file",
     "What a model is trained on: small, read where it lies, in any order. A line is a\n"
     "sentence, as the published training data have it, or has two parts:\n"
     "  {\"tokens\": \"base64 of little-endian int32\"}\n"
     "  {\"tokens\": [17, 4, 8191, ...], \"weights\": [16, 0, 16, ...]}\n"
     "  {\"input_tokens\": [...], \"output_tokens\": [...]}\n"
     "\"weights\" are of each token's loss: 16 is weight 1, 0 none, 255 the most.\n"
     "With --loss answers the input has none. A .tok file holds image tokens alone:\n"
     "bos in front and eos at the end are dropped, training puts the model's own\n"
     "there. An image has 256 tokens where all sentences are whole images of 256,\n"
     "or as many as \"image_tokens\" says. A bad line ends the work.\n"
     "  lvm pack a.jsonl b.jsonl -o train.tok\n"},
    {"unpack", UNPACK, run_unpack, "unpack IN.tok", "a .tok file to lines that pack reads",
     "  lvm unpack train.tok --integers | head -n 1\n"},
    {"merge", MERGE, run_merge, "merge WEIGHTS ADAPTERS -o OUT",
     "adapters (LoRA) and their model as one weights file",
     "Adapters are files that lvm train --lora writes, or convert.py --lora. Matrices\n"
     "keep their types; where those are q4_0, --lora of predict, which takes q8_0 for\n"
     "what it merges in memory, or --type q8_0 here, loses less.\n"
     "  lvm merge weights.bin style.bin -o styled.bin\n"},
    {"help", HELP, run_help, "help [COMMAND]", "this text, or a command's",
     "COMMAND --help and COMMAND -h show it too.\n"
     "  lvm help rank\n"},
    {"version", VERSION, run_version, "version", "version, compiler, kernels, processors",
     "--version and -V show it too: what a report of a fault should quote.\n"
     "  lvm version\n"}};
enum { N_COMMANDS = sizeof command_table / sizeof *command_table };

static const struct command *find_command(const char *name) {
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(command_table[i].name, name) == 0) return &command_table[i];
    return NULL;
}

/* One line on stderr, with names made safe to show. */
static void print_message(const char *head, const char *format, va_list args) {
    char text[1 << 13], shown[1 << 11];
    vsnprintf(text, sizeof text, format, args);
    show_text(text, shown, sizeof shown);
    fprintf(stderr, "lvm: %s%s\n", head, shown);
}

LVM_PRINTF(1, 2) static int complain(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_message("", format, args);
    va_end(args);
    return 1;
}

/* What a user should know though the work goes on; not with --quiet. */
LVM_PRINTF(2, 3) static void note(const struct cli *cli, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (!cli->quiet) print_message("note: ", format, args);
    va_end(args);
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

/* The number of value in "first|second|...", or -1. */
static int word_index(const char *list, const char *value) {
    size_t n = strlen(value);
    for (int i = 0; n > 0; i++) {
        size_t word = strcspn(list, "|");
        if (word == n && memcmp(list, value, n) == 0) return i;
        if (list[word] == 0) break;
        list += word + 1;
    }
    return -1;
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
    } else if (o->kind == ONE_OF) {
        int i = word_index(o->argument, value);
        if (i < 0) return complain("%s: \"%s\" is not %s", shown, value, o->argument) + 1;
        *(int *)(void *)to = i;
    } else if (o->kind == SEED) {
        *(uint64_t *)(void *)to = strtoull(value, &end, 10);
        if (end == value || *end != 0 || errno != 0 || !isdigit((unsigned char)*value))
            return complain("%s: \"%s\" is no whole number from 0 to 2^64 - 1", shown, value) + 1;
    } else {
        double v = o->kind == INTEGER ? (double)strtoll(value, &end, 10) : strtod(value, &end);
        if (end == value || *end != 0 || !(v >= o->low && v <= o->high))
            return complain("%s: \"%s\" is not a %snumber from %.10g to %.10g", shown, value,
                            o->kind == INTEGER ? "whole " : "", o->low, o->high) + 1;
        if (o->kind == INTEGER) *(int *)(void *)to = (int)v;
        else *(float *)(void *)to = (float)v;
    }
    return 0;
}

/* ---- Mistakes: what was probably meant ---- */

/* Words of other programs, and the command or option that is meant; or what to say of a command. */
static const struct synonym {
    const char *words, *meant;
} synonyms[] = {
    {"generate|run|infer|inference|sample|complete|continue", "predict"},
    {"tokenize|tokenise", "encode"},
    {"detokenize|detokenise", "decode"},
    {"evaluate|validate|test|perplexity|ppl", "eval"},
    {"choose|classify|compare", "rank"},
    {"benchmark|speed|time|perf", "bench"},
    {"show|inspect|list|ls|describe", "info"},
    {"compress", "quantize"},
    {"man|manual|usage", "help"},
    {"serve|server|api|daemon", "lvm is no server; batch answers many prompts in one run"},
    {"convert|import|export", "convert.py does that: python3 convert.py --help"},
    {"train|finetune|finetuning", "lvm does not train yet"},
    {"num|number|count|frames", "images"},
    {"samples|variations|num-samples", "candidates"},
    {"outfile|save|destination", "output"},
    {"random-seed|rng", "seed"},
    {"argmax|deterministic", "greedy"},
    {"gpu|cuda|backend", "device"},
    {"jobs|workers|cores|nproc", "threads"},
    {"dtype|precision", "type"},
    {"ctx|context|ctx-size|n-ctx", "window"},
    {"cache-type|kv-type|kv-cache", "kv"},
    {"silent|no-progress", "quiet"},
    {"overwrite|replace", "force"}};

static const char *find_synonym(const char *word) {
    for (size_t i = 0; i < sizeof synonyms / sizeof *synonyms; i++)
        if (word_index(synonyms[i].words, word) >= 0) return synonyms[i].meant;
    return NULL;
}

/* Takes a name for the nearest one so far to a word that was mistyped or cut short; of three
   letters one may be wrong. */
static void take_nearer(const char *word, const char *name, const char **nearest, int *least) {
    int n = (int)strlen(word), distance = word_distance(word, name);
    if (n >= 2 && strncmp(word, name, (size_t)n) == 0) distance = 0;
    if (distance > n / 3 || distance >= *least) return;
    *nearest = name;
    *least = distance;
}

/* Says that there is no such command, and what may have been meant; 2. */
static int no_command(const char *word) {
    const char *nearest = NULL, *meant = find_synonym(word);
    int least = INT_MAX;
    for (int i = 0; i < N_COMMANDS; i++)
        take_nearer(word, command_table[i].name, &nearest, &least);
    if (meant != NULL && find_command(meant) != NULL) nearest = meant;
    else if (meant != NULL && strchr(meant, ' ') != NULL)
        return complain("no such command: %s (%s)", word, meant) + 1;
    if (nearest != NULL)
        return complain("no such command: %s (did you mean %s?)", word, nearest) + 1;
    return complain("no such command or file: %s (lvm help lists the commands)", word) + 1;
}

/* ---- Arguments ---- */

/* The option that an argument names among those of some commands; *value points behind "=" or a
   letter, or is NULL. */
static const struct option *match_option(int commands, const char *arg, const char **value) {
    *value = NULL;
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        size_t n = strlen(o->name);
        if ((o->commands & commands) == 0) continue;
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

static int is_option(const char *arg) { return arg[0] == '-' && arg[1] != 0; }

/* The commands of an option, as "rank, eval, batch". */
static void list_owners(const char *arg, char *text, size_t room) {
    const char *value;
    text[0] = 0;
    for (int i = 0; i < N_COMMANDS; i++) {
        size_t n = strlen(text);
        if (match_option(command_table[i].bit, arg, &value) != NULL)
            snprintf(text + n, room - n, "%s%s", n > 0 ? ", " : "", command_table[i].name);
    }
}

/* The option of a command that the name of another probably means, or NULL. */
static const char *meant_option(const struct command *c, const char *name) {
    const char *nearest = NULL, *same = find_synonym(name);
    int least = INT_MAX;
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        if ((o->commands & c->bit) == 0) continue;
        if (same != NULL && strcmp(o->name, same) == 0) return same;
        take_nearer(name, o->name, &nearest, &least);
    }
    take_nearer(name, "help", &nearest, &least);
    take_nearer(name, "version", &nearest, &least);
    return nearest;
}

/* Says that a command has no such option, and what may have been meant; 2. */
static int no_option(const struct command *c, const char *arg) {
    char owners[96], name[64];
    int dashes = arg[1] == '-' ? 2 : 1, shown = (int)strcspn(arg, "=");
    snprintf(name, sizeof name, "%.*s", shown - dashes, arg + dashes);
    list_owners(arg, owners, sizeof owners);
    const char *meant = name[0] != 0 && name[1] != 0 ? meant_option(c, name) : NULL;
    if (owners[0] != 0)
        return complain("%s: no such option: %.*s (%.*s belongs to %s)", c->name, shown, arg,
                        dashes == 2 ? shown : 2, arg, owners) + 1;
    if (meant != NULL)
        return complain("%s: no such option: %.*s (did you mean --%s?)", c->name, shown, arg,
                        meant) + 1;
    return complain("%s: no such option: %.*s (lvm help %s lists them)", c->name, shown, arg,
                    c->name) + 1;
}

/* 1 for -seed and the like: an option's long name behind one dash. */
static int lacks_a_dash(const char *arg) {
    char name[64];
    const char *value;
    if (arg[1] == '-' || arg[2] == 0) return 0;
    snprintf(name, sizeof name, "-%s", arg);
    return match_option(-1, name, &value) != NULL;
}

/* Stores the option that argv[*at] begins, and steps over its value; 0, or a message and 2. */
static int parse_option(struct cli *cli, const struct command *c, char **argv, int *at) {
    const char *arg = argv[*at], *value, *inner;
    const struct option *o = match_option(c->bit, arg, &value);
    if (lacks_a_dash(arg))
        return complain("%s: no such option: %s (did you mean -%s?)", c->name, arg, arg) + 1;
    if (o == NULL) return no_option(c, arg);
    if (o->kind == FLAG && value != NULL) return complain("%s: takes no value", arg) + 1;
    if (o->kind != FLAG && value == NULL) {
        value = argv[*at + 1];
        if (value == NULL) return complain("%s: needs a value", arg) + 1;
        if (is_option(value) && match_option(c->bit, value, &inner) != NULL)
            return complain("%s: needs a value, and %s is an option", arg, value) + 1;
        ++*at;
    }
    return set_option(cli, o, arg, value);
}

/* Splits argv[1..] into options and words; of an option that is repeated the last one counts. 0, or
   a message and 2. */
static int parse_arguments(struct cli *cli, const struct command *c, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *value;
        int code = 0, behind = cli->split >= 0;
        if (behind && is_option(arg) && match_option(c->bit, arg, &value) != NULL &&
            os_stat(arg).kind == OS_NOTHING)
            return complain("%s: options stand before --", arg) + 1;
        if (behind || !is_option(arg)) cli->words[cli->n_words++] = arg;
        else if (strcmp(arg, "--") == 0) cli->split = cli->n_words;
        else code = parse_option(cli, c, argv, &i);
        if (code != 0) return code;
    }
    return 0;
}

/* 1 for an option of any command whose value is the next argument. */
static int takes_next(const char *arg) {
    const char *value;
    const struct option *o = is_option(arg) ? match_option(-1, arg, &value) : NULL;
    return o != NULL && o->kind != FLAG && value == NULL;
}

/* The place of the first word among options and their values, 0 where there is none: options may
   stand before the command. */
static int first_word(int argc, char **argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i += 1 + takes_next(argv[i]))
        if (!is_option(argv[i])) return i;
    return 0;
}

/* 1 where -h or --help, say, stands among the options. */
static int asks_for(const char *letter, const char *name, int argc, char **argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i += 1 + takes_next(argv[i]))
        if (strcmp(argv[i], letter) == 0 || strcmp(argv[i], name) == 0) return 1;
    return 0;
}

/* ---- Help ---- */

enum { OPTION_COLUMN = 24, COMMAND_COLUMN = 10 };

/* Two columns within 79; what is too long for the left one gets a line of its own. */
static void print_row(FILE *f, int width, const char *left, const char *right) {
    if ((int)strlen(left) <= width) fprintf(f, "  %-*s %s\n", width, left, right);
    else fprintf(f, "  %s\n  %*s %s\n", left, width, "", right);
}

static void print_options(FILE *f, int bits) {
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        char left[80];
        if ((o->commands & bits) == 0) continue;
        snprintf(left, sizeof left, "%c%c%s --%s %s", o->letter ? '-' : ' ',
                 o->letter ? o->letter : ' ', o->letter ? "," : " ", o->name,
                 o->argument != NULL ? o->argument : "");
        print_row(f, OPTION_COLUMN, left, o->help);
    }
}

static int print_command_help(FILE *f, const struct command *c) {
    fprintf(f, "lvm %s\n  %s\n", c->usage, c->help);
    for (const char *line = c->details; *line != 0; line += strcspn(line, "\n") + 1)
        fprintf(f, "  %.*s\n", (int)strcspn(line, "\n"), line);
    print_options(f, c->bit);
    return 0;
}

/* Of a command, or of all of them. */
static int print_help(FILE *f, const struct command *c) {
    if (c != NULL) return print_command_help(f, c);
    fprintf(f, "lvm %s - Large Vision Models: prompts are images, answers are images\n\n"
            "  lvm WEIGHTS IMAGE|FOLDER... [OPTION...]   predict the next image\n"
            "  lvm COMMAND ... [OPTION...]\n\nCommands:\n", LVM_VERSION);
    for (int i = 0; i < N_COMMANDS; i++)
        print_row(f, COMMAND_COLUMN, command_table[i].name, command_table[i].help);
    fputs("\nOptions of predict:\n", f);
    print_options(f, PREDICT);
    fputs("\nOptions of all commands:\n", f);
    print_row(f, OPTION_COLUMN, "-h, --help", "this text; with a command, that command's");
    print_row(f, OPTION_COLUMN, "-V, --version", "version, compiler, kernels, processors");
    fputs("\nA value may stand as -s 5, -s5, --seed 5 or --seed=5, options anywhere before\n"
          "a lone --; of an option that is repeated the last one counts.\n"
          "\n  lvm weights.bin prompt/depth -o depth.png\n", f);
    return 0;
}

/* Text for roff: a hyphen is what one types, and no line begins as a request does. */
static void man_text(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        int starts = i == 0 || text[i - 1] == '\n';
        if (starts && (text[i] == '.' || text[i] == '\'')) fputs("\\&", stdout);
        if (text[i] == '-') fputs("\\-", stdout);
        else if (text[i] == '\\') fputs("\\e", stdout);
        else putchar(text[i]);
    }
}

/* A line as it is typed. */
static void man_literal(const char *line, size_t n) {
    printf(".PP\n.nf\n.RS 2\n");
    man_text(line, n);
    printf("\n.RE\n.fi\n");
}

/* Lines that begin with a blank keep their form, the others are filled. */
static void man_details(const char *line) {
    int filled = 0;
    for (size_t n; *line != 0; line += n + 1) {
        n = strcspn(line, "\n");
        if (line[0] == ' ') {
            man_literal(line + 2, n - 2);
        } else {
            if (!filled) printf(".PP\n");
            man_text(line, n);
            putchar('\n');
        }
        filled = line[0] != ' ';
    }
}

static void man_options(int bits) {
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &option_table[i];
        if ((o->commands & bits) == 0) continue;
        printf(".TP\n");
        if (o->letter != 0) printf("\\fB\\-%c\\fR, ", o->letter);
        printf("\\fB\\-\\-");
        man_text(o->name, strlen(o->name));
        printf("\\fR");
        if (o->argument != NULL) printf(" %s", o->argument);
        putchar('\n');
        man_text(o->help, strlen(o->help));
        putchar('\n');
    }
}

static void man_command(const struct command *c) {
    printf(".SS %s\n.B lvm\n", c->name);
    man_text(c->usage, strlen(c->usage));
    printf("\n.PP\n%c", toupper((unsigned char)c->help[0]));
    man_text(c->help + 1, strlen(c->help + 1));
    printf(".\n");
    man_details(c->details);
    man_options(c->bit);
}

static const char man_head[] =
    ".TH LVM 1 2026-11-29 \"lvm " LVM_VERSION "\"\n.nh\n.ad l\n"
    ".SH NAME\nlvm \\- run Large Vision Models\n"
    ".SH SYNOPSIS\n"
    ".B lvm\n[\\fBpredict\\fR] WEIGHTS IMAGE|FOLDER... [OPTION...]\n.br\n"
    ".B lvm\nCOMMAND ... [OPTION...]\n"
    ".SH DESCRIPTION\n"
    "Prompts are images, answers are images: a VQGAN turns images into tokens and a\n"
    "transformer predicts the next ones.\nA task is given by examples.\n.PP\n"
    "What was written goes to standard output, one path a line; notes, progress and\n"
    "errors go to standard error.\n.PP\n"
    "Options may stand anywhere before a lone \\-\\-, a value as \\-s 5, \\-s5,\n"
    "\\-\\-seed 5 or \\-\\-seed=5; of an option that is repeated the last one counts.\n"
    "\\fB\\-h\\fR or \\fB\\-\\-help\\fR behind a command shows its options,\n"
    "\\fB\\-V\\fR or \\fB\\-\\-version\\fR what this program is.\n"
    ".SH COMMANDS\n";

static const char man_tail[] =
    ".SH EXIT STATUS\n"
    ".TP\n0\nDone.\n"
    ".TP\n1\nThe work failed; a message says why.\n"
    ".TP\n2\nWrong usage: nothing was done.\n"
    ".TP\n128 + N, as shells show it\nSignal N ended the program: 130 after Ctrl\\-C.\n"
    ".SH ENVIRONMENT\n"
    ".TP\n.B LVM_ISA\nForces the kernels of one instruction set: scalar (plain C), avx2,\n"
    "avx512, neon or neon\\-dot.\nWithout it the fastest that the processor knows are taken.\n"
    ".TP\n.B LVM_DEVICE\nThe device where \\fB\\-\\-device\\fR names none.\n"
    ".TP\n.B COLUMNS\nThe width of the progress bar's line where the terminal does not tell\n"
    "its own.\n"
    ".SH FILES\n"
    ".TP\n.I weights.bin\nA model, under any name: a GGUF file with the architecture\n"
    "\"lvm\", as convert.py and \\fBlvm quantize\\fR write it.\n"
    ".TP\n.I out.png\nWhat \\fBpredict\\fR and \\fBdecode\\fR write where \\fB\\-o\\fR\n"
    "names nothing else.\n"
    ".TP\n.I .lvm-PID-N.tmp\nAn output until it is complete and takes its name.\n"
    ".PP\nThere is no configuration file.\n";

/* What for, and how. */
static const char *const man_examples[][2] = {
    {"The answer to a folder of examples and a query, and all of it in one image:",
     "lvm weights.bin prompt/depth -o depth.png --sheet sheet.png"},
    {"Four answers to choose from, always the same four:",
     "lvm weights.bin a.png b.png c.png -c 4 -s 7 -o answer.png"},
    {"An image through the tokenizer and back, in a pipe:",
     "lvm encode weights.bin a.png | lvm decode weights.bin - -o copy.png"},
    {"Which of three images goes on best:",
     "lvm rank weights.bin puzzle -- a.png b.png c.png"},
    {"What a model of 7 billion parameters would cost on this machine:",
     "lvm bench --config 7b --type q4_0"}};

static const char man_end[] =
    ".SH SEE ALSO\n"
    "convert.py and README.md in the source of lvm;\n"
    "Bai et al., Sequential Modeling Enables Scalable Learning for Large Vision\n"
    "Models, arXiv 2312.00785\n";

/* The manual page, from the same tables as the help. */
static int print_man(void) {
    fputs(man_head, stdout);
    for (int i = 0; i < N_COMMANDS; i++) man_command(&command_table[i]);
    fputs(man_tail, stdout);
    for (size_t i = 0; i < sizeof man_examples / sizeof *man_examples; i++) {
        printf("%s%s\n", i > 0 ? ".PP\n" : ".SH EXAMPLES\n", man_examples[i][0]);
        man_literal(man_examples[i][1], strlen(man_examples[i][1]));
    }
    fputs(man_end, stdout);
    return 0;
}

static int run_help(struct cli *cli) {
    if (cli->man) return print_man();
    const struct command *c = cli->n_words > 0 ? find_command(cli->words[0]) : NULL;
    if (cli->n_words > 1) return complain("help: one command at a time") + 1;
    return cli->n_words > 0 && c == NULL ? no_command(cli->words[0]) : print_help(stdout, c);
}

/* ---- Signals ----

   Whatever ends the program, no temporary file stays: the handler removes those that are known,
   says so, and raises the signal again with its default action, so that a shell sees what happened.
   Only the main thread takes signals (a pool's threads block them) and only it makes files. */

enum { MAX_TEMPORARIES = 256 };
static const char *volatile temporaries[MAX_TEMPORARIES];

static const struct stop {
    int number;
    const char *text;
} stop_table[] = {
    {SIGINT, "interrupted"},
    {SIGTERM, "told to stop (SIGTERM)"},
#ifndef _WIN32
    {SIGHUP, "the terminal is gone"},
    {SIGQUIT, "told to quit"},
    {SIGXCPU, "the time that the shell grants is over (ulimit -t)"},
    {SIGPIPE, NULL}, /* whoever read the output has enough */
    {SIGXFSZ, "a file grew beyond the limit that the shell sets (ulimit -f)"},
#endif
};
enum { N_STOPS = sizeof stop_table / sizeof *stop_table };

static void on_stop(int number) {
    static const char clear[] = "\r\033[K", head[] = "lvm: ",
                      tail[] = "; nothing was left behind\n";
    ssize_t written = 0;
    for (int i = 0; i < MAX_TEMPORARIES; i++)
        if (temporaries[i] != NULL) os_remove(temporaries[i]);
    for (int i = 0; i < N_STOPS; i++) {
        const char *text = stop_table[i].text;
        if (stop_table[i].number != number || text == NULL) continue;
        if (os_is_terminal(2)) written += write(2, clear, sizeof clear - 1);
        written += write(2, head, sizeof head - 1) + write(2, text, (unsigned)strlen(text)) +
                   write(2, tail, sizeof tail - 1);
    }
    (void)written;
    signal(number, SIG_DFL);
    raise(number);
}

/* A signal that was to be ignored (nohup) still is. */
static void watch_signals(void) {
    for (int i = 0; i < N_STOPS; i++)
        if (signal(stop_table[i].number, on_stop) == SIG_IGN) signal(stop_table[i].number, SIG_IGN);
}

/* No signal comes between a file's creation and its place in the list. */
static FILE *create_temporary(const char *path) {
    int slot = 0;
    while (slot < MAX_TEMPORARIES && temporaries[slot] != NULL) slot++;
    if (slot == MAX_TEMPORARIES) {
        errno = EMFILE;
        return NULL;
    }
    os_signals before = os_block_signals();
    FILE *file = os_create(path);
    if (file != NULL) temporaries[slot] = path;
    os_restore_signals(before);
    return file;
}

static void forget_temporary(const char *path) {
    for (int i = 0; i < MAX_TEMPORARIES; i++)
        if (temporaries[i] == path) temporaries[i] = NULL;
}

/* ---- Progress: a bar with rate and time left, only on a terminal ---- */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* What a line of the bar says; of numbers that are unknown, 0 images, a rate of 0, a negative time
   left, it says nothing. */
struct bar_view {
    const char *words, *noun, *unit; /* noun: of what is counted; unit: of the rate */
    double part, rate, left;         /* part: 0 to 1; left: seconds */
    int64_t item, items;
};

/* "3 s left", "2:05 left", "1:02:05 left" */
static void time_left(char *text, size_t room, double left) {
    long long s = left < 1e9 ? (long long)left : 1000000000;
    if (s < 60) snprintf(text, room, "  %lld s left", s);
    else if (s < 3600) snprintf(text, room, "  %lld:%02lld left", s / 60, s % 60);
    else snprintf(text, room, "  %lld:%02lld:%02lld left", s / 3600, s / 60 % 60, s % 60);
}

/* The line for a terminal of so many columns, whose last one stays free: the percentage, then as
   much of the rest, the most telling first, as there is room for; a bar takes what is left. */
static void bar_line(const struct bar_view *v, int columns, char *line, size_t size) {
    enum { WORDS, PERCENT, COUNT, RATE, LEFT, PIECES, TEXT_ROOM = 64, MOST = 24, LEAST = 6 };
    static const int order[PIECES] = {PERCENT, WORDS, COUNT, LEFT, RATE};
    char piece[PIECES][TEXT_ROOM] = {"", "", "", "", ""}, bar[MOST + 4] = "";
    int room = columns - 1, fits = 1;
    double part = v->part < 0 ? 0 : v->part > 1 ? 1 : v->part;
    snprintf(piece[PERCENT], TEXT_ROOM, "%3d %%", (int)(100 * part));
    snprintf(piece[WORDS], TEXT_ROOM, "%-18s ", v->words);
    if (v->items > 1)
        snprintf(piece[COUNT], TEXT_ROOM, "  %s %lld of %lld", v->noun, (long long)v->item,
                 (long long)v->items);
    if (v->left >= 0) time_left(piece[LEFT], TEXT_ROOM, v->left);
    if (v->rate > 0) snprintf(piece[RATE], TEXT_ROOM, "  %.*f %s", v->rate < 10, v->rate, v->unit);
    for (int i = 0; i < PIECES; i++) {
        int n = (int)strlen(piece[order[i]]);
        fits &= n <= room;
        if (fits) room -= n;
        else piece[order[i]][0] = 0;
    }
    int width = room - 3 < MOST ? room - 3 : MOST, full = (int)(width * part);
    if (width >= LEAST && piece[WORDS][0] != 0) {
        memset(bar, ' ', (size_t)width + 3);
        memset(bar + 1, '#', (size_t)full);
        bar[0] = '[', bar[width + 1] = ']';
    }
    snprintf(line, size, "%s%s%s%s%s%s", piece[WORDS], bar, piece[PERCENT], piece[COUNT],
             piece[RATE], piece[LEFT]);
}

enum { BAR_SAMPLES = 12 };

/* The bar of one command: what the command says in advance, then how its stage went lately. A
   window that slides interrupts the stage "generate": its prompt is read again. */
struct bar {
    int shown, whole;       /* whole: of a set, whose lines count and not their stages, */
    int lines;              /* so many, or 0: not known */
    int reads, writes;      /* images to encode; to generate or decode; 0: not known */
    int candidates;         /* of each image to generate */
    int call, calls;        /* where several calls make one stage: the current one, of all */
    double drawn;           /* when */
    char stage[32];
    double part, all;       /* of the stage so far, 0 to 1; its units in all calls */
    double at[BAR_SAMPLES], parts[BAR_SAMPLES]; /* moments of the last seconds, oldest first */
    int n;
    double slide_began, slide_took, pace; /* pace: of generating so far, parts a second */
};

/* A stage's words and the unit of its rate, "" for none. */
static const struct stage_words {
    const char *stage, *words, *noun, *unit;
} stage_table[] = {{"encode", "encoding images", "image", ""},
                   {"prefill", "reading the prompt", "image", "tokens/s"},
                   {"slide", "sliding the window", "image", "tokens/s"},
                   {"generate", "predicting", "image", "tokens/s"},
                   {"score", "scoring", "choice", "tokens/s"},
                   {"decode", "decoding images", "image", ""},
                   {"eval", "evaluating", "line", ""},
                   {"batch", "predicting", "line", ""},
                   {"pack", "packing", "", ""},
                   {"unpack", "unpacking", "", ""}};
enum { N_STAGES = sizeof stage_table / sizeof *stage_table };

static int is_stage(const char *a, const char *b) { return strcmp(a, b) == 0; }

/* Notes every third of a second how far a stage is. Another one, or one that begins again, starts
   afresh, and but for a slide it is drawn at once. */
static void bar_sample(struct bar *b, const char *stage, double part, double now) {
    int last = b->n - 1;
    if (!is_stage(b->stage, stage) || part < b->part) {
        if (!is_stage(b->stage, "slide") && !is_stage(stage, "slide")) b->drawn = b->pace = 0;
        snprintf(b->stage, sizeof b->stage, "%s", stage);
        b->n = 0;
    } else if (last >= 0 && now - b->at[last] < 0.3) {
        b->part = part;
        return;
    }
    if (b->n == BAR_SAMPLES) {
        memmove(b->at, b->at + 1, (BAR_SAMPLES - 1) * sizeof *b->at);
        memmove(b->parts, b->parts + 1, (BAR_SAMPLES - 1) * sizeof *b->parts);
        b->n--;
    }
    b->at[b->n] = now;
    b->parts[b->n++] = b->part = part;
}

/* The image, choice or line that is at work, and how many there are. */
static void bar_count(const struct bar *b, const char *stage, double part, struct bar_view *v) {
    int decodes = b->writes * (b->candidates > 1 ? b->candidates : 1);
    v->items = is_stage(stage, "encode")     ? b->reads
               : is_stage(stage, "generate") ? b->writes
               : is_stage(stage, "decode")   ? decodes
               : is_stage(stage, "score")    ? b->calls
               : b->whole                    ? b->lines
                                             : 0;
    v->item = min64((int64_t)(part * (double)v->items + 1e-9) + 1, v->items);
}

/* What to show when a stage has done so much of all; now: in seconds. Rates are those of the last
   seconds. Time left counts a slide for every image to come, once there was one. */
static struct bar_view bar_update(struct bar *b, const char *stage, int64_t done, int64_t all,
                                  double now) {
    int calls = b->calls > 1 ? b->calls : 1, i = 0;
    double part = (b->call + (double)done / (double)(all > 0 ? all : 1)) / calls, rate;
    int generates = is_stage(stage, "generate"), slides = is_stage(stage, "slide");
    if (slides && !is_stage(b->stage, "slide")) b->slide_began = now;
    if (generates && is_stage(b->stage, "slide")) b->slide_took = now - b->slide_began;
    if (done < all) b->all = (double)all * calls;
    bar_sample(b, stage, part, now);
    while (i + 1 < N_STAGES && !is_stage(stage_table[i].stage, stage)) i++;
    const struct stage_words *w = &stage_table[i];
    struct bar_view v = {is_stage(w->stage, stage) ? w->words : stage, w->noun, w->unit, part, 0,
                         -1, 0, 0};
    bar_count(b, stage, part, &v);
    rate = now > b->at[0] ? (part - b->parts[0]) / (now - b->at[0]) : 0;
    if (generates && rate > 0) b->pace = rate;
    if (generates) rate = b->pace;
    if (rate > 0 && !slides) v.left = (1 - part) / rate;
    if (v.left >= 0 && generates) v.left += (double)(v.items - v.item) * b->slide_took;
    if (w->unit[0] != 0)
        v.rate = rate * b->all * (generates && b->candidates > 1 ? b->candidates : 1);
    return v;
}

/* Columns of the terminal; what it does not tell, COLUMNS may. */
static int terminal_columns(void) {
    int columns = os_columns(2);
    const char *told = getenv("COLUMNS");
    if (columns <= 0 && told != NULL) columns = (int)strtol(told, NULL, 10);
    return columns > 0 ? columns : 80;
}

static void draw_bar(struct bar *b, const char *stage, int64_t done, int64_t all) {
    char line[400] = "";
    double now = seconds();
    struct bar_view v = bar_update(b, stage, done, all, now);
    int over = done >= all && b->call + 1 >= b->calls && !is_stage(b->stage, "slide");
    if (!over && now - b->drawn < 0.1) return;
    b->drawn = now;
    if (!over) bar_line(&v, terminal_columns(), line, sizeof line);
    fprintf(stderr, "\r%s\033[K", line);
    fflush(stderr);
}

static int on_progress(void *user, const char *stage, int64_t done, int64_t all) {
    struct bar *b = user;
    if (b->shown && !b->whole && strcmp(stage, "layers") != 0) draw_bar(b, stage, done, all);
    return 0;
}

/* Clears the line for what is printed next. */
static void hide_bar(const struct bar *b) {
    if (b->shown) fputs("\r\033[K", stderr);
}

/* ---- Images named on the command line ---- */

/* Images in order. Those that come one behind the other on standard input ("-") are entries
   first_part .. first_part + n_parts - 1; part i ends at ends[i] of the input. */
struct paths {
    char **path; /* [n] */
    int n, first_part, n_parts;
    size_t room, parts_room, *ends;
    struct buffer input;
};

static void paths_free(struct paths *p) {
    for (int i = 0; i < p->n; i++) mem_free(p->path[i]);
    mem_free(p->path);
    mem_free(p->ends);
    mem_free(p->input.data);
    memset(p, 0, sizeof *p);
}

/* folder/name, allocated; the name alone where folder is empty. */
static char *join_path(const char *folder, const char *name, lvm_error *error) {
    size_t n = strlen(folder), bytes = n + strlen(name) + 2;
    char *path = mem_alloc(bytes, 1, error);
    if (path != NULL)
        snprintf(path, bytes, "%s%s%s", folder,
                 n > 0 && !os_is_separator(folder[n - 1]) ? "/" : "", name);
    return path;
}

static int paths_add(struct paths *p, const char *folder, const char *name, lvm_error *error) {
    char **larger = array_grow(p->path, (size_t)p->n, 1, sizeof *larger, &p->room, error);
    if (larger == NULL) return LVM_MEMORY;
    p->path = larger;
    p->path[p->n] = join_path(folder, name, error);
    return p->path[p->n] != NULL ? (p->n++, LVM_OK) : LVM_MEMORY;
}

static int read_stdin(struct buffer *text, lvm_error *error) {
    char piece[1 << 14];
    int code = buffer_add(text, "", 0, error);
    for (size_t n; code == LVM_OK && (n = fread(piece, 1, sizeof piece, stdin)) > 0;)
        code = buffer_add(text, piece, n, error);
    return code == LVM_OK && ferror(stdin)
               ? fail(error, LVM_IO, "standard input: %s", strerror(errno)) : code;
}

/* All of a file, or of standard input ("-"). */
static int read_input(const char *path, struct buffer *text, lvm_error *error) {
    uint8_t *data = NULL;
    if (strcmp(path, "-") == 0) return read_stdin(text, error);
    int code = read_file(path, &data, &text->n, error);
    text->data = (char *)data;
    return code;
}

/* The images on standard input, as a video decoder pipes them in: each is decoded once to find its
   end, and kept as it came. */
static int add_standard_input(struct paths *p, lvm_error *error) {
    lvm_image image = {.rgb = NULL};
    char name[48];
    size_t used = 0;
    if (p->n_parts > 0) return fail(error, LVM_INVALID, "standard input (-) is named twice");
    int code = read_stdin(&p->input, error);
    if (code == LVM_OK && p->input.n == 0)
        code = fail(error, LVM_FORMAT, "standard input is empty");
    p->first_part = p->n;
    for (size_t at = 0; code == LVM_OK && at < p->input.n; at += used) {
        const uint8_t *data = (const uint8_t *)p->input.data + at;
        snprintf(name, sizeof name, "standard input, image %d", p->n_parts + 1);
        code = image_load_next(data, p->input.n - at, name, &used, &image, error);
        lvm_image_free(&image);
        size_t *ends = code != LVM_OK ? NULL : array_grow(p->ends, (size_t)p->n_parts, 1,
                                                          sizeof *ends, &p->parts_room, error);
        if (ends == NULL) return code != LVM_OK ? code : LVM_MEMORY;
        p->ends = ends;
        p->ends[p->n_parts++] = at + used;
        code = paths_add(p, "", name, error);
    }
    return code;
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

static const char image_endings[] = "png|jpg|jpeg|jpe|jfif|ppm|pgm|pnm|pbm";

/* What follows the last dot of a file name, or "". */
static const char *extension(const char *name) {
    const char *dot = strrchr(name, '.');
    return dot != NULL && dot >= os_file_name(name) ? dot + 1 : "";
}

/* 1 when a file name ends in one of "first|second|...", in small or capital letters. */
static int has_extension(const char *name, const char *list) {
    char small[8] = "";
    const char *e = extension(name);
    for (int i = 0; i < 7 && e[i] != 0; i++) small[i] = (char)tolower((unsigned char)e[i]);
    return strlen(e) < sizeof small && word_index(list, small) >= 0;
}

/* One name of a folder: an image joins the others, another file is counted, and its first name kept
   for the note; hidden ones and folders are passed over. */
static int add_entry(struct paths *p, const char *folder, const char *name, int *others,
                     char first_other[64], lvm_error *error) {
    int named = has_extension(name, image_endings);
    if (name[0] == '.') return LVM_OK;
    char *path = join_path(folder, name, error);
    if (path == NULL) return LVM_MEMORY;
    enum os_kind kind = os_stat(path).kind;
    int code = LVM_OK;
    if (named && kind != OS_FILE)
        code = fail(error, LVM_INVALID, "%s: has the name of an image but is %s", path,
                    kind == OS_FOLDER ? "a folder" : kind == OS_DEVICE ? "a pipe or device"
                                                                       : "a link to nothing");
    else if (named)
        code = paths_add(p, folder, name, error);
    else if (kind != OS_FOLDER && (*others)++ == 0)
        snprintf(first_other, 64, "%.63s", name);
    mem_free(path);
    return code;
}

/* The images of a folder in natural order. What has an image's name must be one: nothing is left
   out silently, or the pairs of a prompt would slip. */
static int add_folder(const struct cli *cli, struct paths *p, const char *folder,
                      lvm_error *error) {
    struct os_folder dir;
    char other[64] = "";
    int code = LVM_OK, first = p->n, others = 0;
    if (os_folder_open(&dir, folder) != 0)
        return fail(error, LVM_IO, "%s: %s", folder, strerror(errno));
    for (const char *name; code == LVM_OK && (name = os_folder_next(&dir)) != NULL;)
        code = add_entry(p, folder, name, &others, other, error);
    os_folder_close(&dir);
    if (code == LVM_OK && p->n == first)
        code = fail(error, LVM_INVALID, "%s: this folder holds no images (png, jpg, ppm)",
                    folder);
    if (code != LVM_OK) return code;
    qsort(p->path + first, (size_t)(p->n - first), sizeof *p->path, compare_paths);
    if (others > 0)
        note(cli, "%s: %d image%s; %d file%s of another kind left out (%s%s)", folder,
             p->n - first, p->n - first > 1 ? "s" : "", others, others > 1 ? "s" : "", other,
             others > 1 ? ", ..." : "");
    return LVM_OK;
}

static int is_folder(const char *path) { return os_stat(path).kind == OS_FOLDER; }

/* Says so where names stand in the order 1, 10, 2, as a shell sorts them. */
static void note_order(const struct cli *cli, const char **words, int n) {
    int lexical = n > 2, natural = 1;
    for (int i = 1; i < n; i++) {
        lexical &= strcmp(words[i - 1], words[i]) <= 0;
        natural &= compare_natural(words[i - 1], words[i]) <= 0;
    }
    if (lexical && !natural)
        note(cli, "the images stand in the order 1, 10, 2; their folder, named instead of them, "
                  "gives 1, 2, 10");
}

static int collect_paths(const struct cli *cli, struct paths *p, int first, int last,
                         lvm_error *error) {
    const char **words = cli->words + first;
    int n = last - first, code = LVM_OK;
    note_order(cli, words, n);
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = words[i][0] == 0 ? fail(error, LVM_INVALID, "the name of an image is empty")
               : strcmp(words[i], "-") == 0 ? add_standard_input(p, error)
               : is_folder(words[i]) ? add_folder(cli, p, words[i], error)
                                     : paths_add(p, "", words[i], error);
    return code;
}

static void free_images(lvm_image *images, int n) {
    for (int i = 0; images != NULL && i < n; i++) lvm_image_free(&images[i]);
    mem_free(images);
}

/* The EXIF rotation of an image that was loaded is applied with --exif, else noted. */
static void note_rotation(const struct cli *cli, const char *path, int orientation) {
    if (orientation >= 2 && !cli->exif)
        note(cli, "%s: carries an EXIF rotation, left alone as the published program does; --exif "
                  "applies it", path);
}

static int rotate_image(const struct cli *cli, lvm_image *image, lvm_error *error) {
    int code = image->orientation >= 2 && cli->exif ? lvm_image_upright(image, error) : LVM_OK;
    if (code != LVM_OK) lvm_image_free(image);
    return code;
}

static int load_image(const struct cli *cli, const char *path, lvm_image *image,
                      lvm_error *error) {
    int code = lvm_image_load(path, image, error);
    if (code == LVM_OK) note_rotation(cli, path, image->orientation);
    return code == LVM_OK ? rotate_image(cli, image, error) : code;
}

/* Image i of those that a call names. */
static int load_named(const struct cli *cli, const struct paths *p, int i, lvm_image *image,
                      lvm_error *error) {
    int part = i - p->first_part;
    if (part < 0 || part >= p->n_parts) return load_image(cli, p->path[i], image, error);
    size_t at = part > 0 ? p->ends[part - 1] : 0;
    int code = lvm_image_load_memory(p->input.data + at, p->ends[part] - at, p->path[i], image,
                                     error);
    if (code == LVM_OK) note_rotation(cli, p->path[i], image->orientation);
    return code == LVM_OK ? rotate_image(cli, image, error) : code;
}

static lvm_image *load_images(const struct cli *cli, const struct paths *p, int first,
                              lvm_error *error) {
    lvm_image *images = mem_alloc((size_t)(p->n - first) + 1, sizeof *images, error);
    for (int i = first; images != NULL && i < p->n; i++)
        if (load_named(cli, p, i, &images[i - first], error) != LVM_OK) {
            free_images(images, i - first);
            return NULL;
        }
    return images;
}

/* ---- Outputs ----

   What a call will write is compared with what it reads and with its other outputs, and is opened,
   before the work begins: a wrong ending, a missing folder or a full disk shows at once. */

/* "out.png" for one; out-1.png, out-2.png for several; out-1a.png, out-1b.png with candidates; with
   zeros in front, so that the names sort as numbers do. */
static char *output_name(const char *base, int image, int images, int candidate, int candidates,
                         lvm_error *error) {
    size_t n = strlen(base);
    char tag[32] = "", *name = mem_alloc(n + 48, 1, error);
    const char *dot = strrchr(base, '.');
    int stem = dot != NULL && dot >= os_file_name(base) ? (int)(dot - base) : (int)n;
    if (name == NULL) return NULL;
    int digits = snprintf(NULL, 0, "%d", images), letters = snprintf(NULL, 0, "%d", candidates);
    if (images > 1 || candidates > 1) snprintf(tag, sizeof tag, "-%0*d", digits, image + 1);
    if (candidates > 26)
        snprintf(tag + strlen(tag), 16, "-%0*d", letters, candidate + 1);
    else if (candidates > 1)
        snprintf(tag + strlen(tag), 16, "%c", 'a' + candidate);
    snprintf(name, n + 48, "%.*s%s%s", stem, base, tag, base + stem);
    return name;
}

static int begins_with(const char *path, const char *magic) {
    char start[8] = "";
    FILE *f = os_stat(path).kind == OS_FILE ? os_fopen(path, "rb") : NULL;
    if (f == NULL) return 0;
    size_t n = fread(start, 1, sizeof start, f);
    fclose(f);
    return n >= strlen(magic) && memcmp(start, magic, strlen(magic)) == 0;
}

/* 1 when two names stand for one file, or would if it were there: the same name in the same
   folder. */
static int same_place(const char *a, const char *b) {
    char *x = NULL, *y = NULL;
    int known = os_target(a, &x, NULL) == LVM_OK && os_target(b, &y, NULL) == LVM_OK;
    int same = known && same_file(x, y);
    if (known && !same && strcmp(os_file_name(x), os_file_name(y)) == 0) {
        size_t n = (size_t)(os_file_name(x) - x), m = (size_t)(os_file_name(y) - y);
        x[n] = 0; /* what is left names the folders; none: the working directory */
        y[m] = 0;
        same = same_file(n > 0 ? x : ".", m > 0 ? y : ".");
    }
    mem_free(x);
    mem_free(y);
    return same;
}

/* Refuses an output that is one of the inputs, or a weights file. */
static int check_output(const struct cli *cli, const char *name, const struct paths *p,
                        lvm_error *error) {
    if (os_stat(name).kind == OS_DEVICE) return LVM_OK;
    if (begins_with(cli->words[0], "GGUF") && same_file(name, cli->words[0]))
        return fail(error, LVM_INVALID, "%s: is the weights file; choose another output with -o",
                    name);
    if (cli->lora != NULL && same_file(name, cli->lora))
        return fail(error, LVM_INVALID, "%s: is --lora too; choose another output with -o", name);
    if (!cli->force && begins_with(name, "GGUF"))
        return fail(error, LVM_INVALID, "%s: is a weights file; --force replaces it", name);
    for (int i = 0; i < p->n; i++)
        if (same_file(name, p->path[i]))
            return fail(error, LVM_INVALID, "%s: is an input too; choose another output with -o",
                        name);
    return LVM_OK;
}

static int is_stdout(const char *name) {
    return strcmp(name, "-") == 0 || standard_stream(name) == 1;
}

/* What takes one image and has no name to be numbered: "-", a device, a pipe. */
static int is_stream(const char *name) {
    return is_stdout(name) || os_stat(name).kind == OS_DEVICE || standard_stream(name) >= 0;
}

/* Gives an image's name its ending where it has none, in *owned, and refuses another one than those
   of the list; "-", devices and pipes need none. 0, or a message and 2. */
static int settle_png_name(const char **name, const char *endings, char **owned) {
    if (*name == NULL || is_stream(*name) || has_extension(*name, endings)) return 0;
    const char *file = os_file_name(*name);
    if (**name == 0) return complain("the name of an output is empty") + 1;
    if (*file == 0 || is_folder(*name))
        return complain("%s: is a folder, not the name of an image", *name) + 1;
    if (*extension(*name) != 0 || file[strlen(file) - 1] == '.')
        return complain("%s: lvm writes PNG images; choose a name that ends in .png", *name) + 1;
    *owned = mem_alloc(strlen(*name) + 5, 1, NULL);
    if (*owned == NULL) return complain("out of memory");
    sprintf(*owned, "%s.png", *name);
    *name = *owned;
    return 0;
}

/* A name on standard output; a terminal gets no control characters. */
static void print_name(const char *name, const char *behind) {
    char shown[1 << 13];
    show_text(name, shown, sizeof shown);
    printf("%s%s\n", os_is_terminal(1) ? shown : name, behind);
}

struct output {
    char *name;
    struct outfile file;
    int open;
};

/* All that a call writes, in the order in which it is printed. */
struct outputs {
    struct output *list; /* [n] */
    int n;
    int silent; /* 1: names are not printed, with --json or where an output is standard output */
    size_t room;
};

/* As many are open during the work; the others lie in the first one's folder. */
enum { MAX_OPEN_OUTPUTS = 64, OUTPUT_RESERVE = 1 << 14 };

/* Takes so many bytes of the disk, so that a full one shows before the work; outfile_close gives
   back what was not used. */
static int outfile_reserve(struct outfile *out, int bytes, lvm_error *error) {
    static const char zeros[4096];
    int code = LVM_OK;
    if (out->temp == NULL) return LVM_OK;
    for (int n = 0; code == LVM_OK && n < bytes; n += (int)sizeof zeros)
        code = outfile_write(out, zeros, sizeof zeros, error);
    if (code == LVM_OK && fflush(out->file) != 0) code = write_failed(out->path, error);
    rewind(out->file);
    return code;
}

/* "-" is standard output. */
static int open_output(struct output *o, lvm_error *error) {
    int code = LVM_OK;
    if (strcmp(o->name, "-") == 0) {
        o->file = (struct outfile){.path = copy_string("standard output", error)};
        o->file.file = o->file.path != NULL ? os_duplicate(1) : NULL;
        if (o->file.file == NULL) {
            code = write_failed("standard output", error);
            outfile_free(&o->file);
        }
    } else {
        code = outfile_open(&o->file, o->name, error);
    }
    o->open = code == LVM_OK;
    return code == LVM_OK ? outfile_reserve(&o->file, OUTPUT_RESERVE, error) : code;
}

/* name is the list's from now on; NULL where there was no memory for it. Whatever is not numbered
   comes first, so that each name is compared with those few; numbered names differ. */
static int outputs_add(struct outputs *o, const struct cli *cli, char *name,
                       const struct paths *inputs, lvm_error *error) {
    if (name == NULL) return LVM_MEMORY;
    int code = is_stdout(name) ? LVM_OK : check_output(cli, name, inputs, error);
    if (code == LVM_OK && is_stdout(name)) {
        if (o->silent)
            code = fail(error, LVM_INVALID, "%s: two outputs would go to standard output", name);
        o->silent = 1;
    }
    for (int i = 0; code == LVM_OK && i < o->n && i < 8; i++)
        if (same_place(o->list[i].name, name))
            code = fail(error, LVM_INVALID, "%s: two outputs would go there", name);
    struct output *list = code == LVM_OK ? array_grow(o->list, (size_t)o->n, 1, sizeof *list,
                                                      &o->room, error) : NULL;
    if (list == NULL) {
        mem_free(name);
        return code == LVM_OK ? LVM_MEMORY : code;
    }
    o->list = list;
    o->list[o->n] = (struct output){.name = name};
    return o->n++ < MAX_OPEN_OUTPUTS ? open_output(&list[o->n - 1], error) : LVM_OK;
}

/* Finishes output i, if it is open, and prints its name, unless it is a device or a pipe; with
   another code than LVM_OK it is removed. */
static int outputs_close(struct outputs *o, int i, int code, lvm_error *error) {
    struct output *out = &o->list[i];
    int named = out->file.temp != NULL;
    fflush(stdout);
    if (out->open) code = outfile_close(&out->file, code, error);
    out->open = 0;
    if (code == LVM_OK && named && !o->silent) print_name(out->name, "");
    return code;
}

/* Writes output i whole. */
static int outputs_write(struct outputs *o, int i, const void *data, size_t size,
                         lvm_error *error) {
    struct output *out = &o->list[i];
    int code = out->open ? LVM_OK : open_output(out, error);
    fflush(stdout);
    if (code == LVM_OK) code = outfile_write(&out->file, data, size, error);
    return outputs_close(o, i, code, error);
}

/* text: NULL, or what the file says of the image. */
static int outputs_write_png(struct outputs *o, int i, const lvm_image *image, const char *text,
                             lvm_error *error) {
    uint8_t *png = NULL;
    size_t size = 0;
    int code = png_encode(image, text, &png, &size, error);
    if (code == LVM_OK) code = outputs_write(o, i, png, size, error);
    mem_free(png);
    return code;
}

/* What was not written leaves nothing behind. */
static void outputs_free(struct outputs *o) {
    for (int i = 0; i < o->n; i++) {
        if (o->list[i].open) outfile_close(&o->list[i].file, LVM_CANCELLED, NULL);
        mem_free(o->list[i].name);
    }
    mem_free(o->list);
    memset(o, 0, sizeof *o);
}

/* The images of predict and decode in the order of their names, which base gives them. */
static int add_image_outputs(struct outputs *o, const struct cli *cli, int n, int candidates,
                             const struct paths *inputs, lvm_error *error) {
    const char *base = cli->out != NULL ? cli->out : "out.png";
    int code = LVM_OK;
    if (is_stream(base) && n * candidates > 1)
        return fail(error, LVM_INVALID, "-o %s: takes one image, not %d", base, n * candidates);
    for (int i = 0; code == LVM_OK && i < n; i++)
        for (int c = 0; code == LVM_OK && c < candidates; c++)
            code = outputs_add(o, cli, output_name(base, i, n, c, candidates, error), inputs,
                               error);
    return code;
}

/* ---- Several images in one ---- */

enum { SHEET_COLUMNS = 8, SHEET_GAP = 8, SHEET_FRAME = 5 };

static void fill_rectangle(lvm_image *image, int x, int y, int width, int height,
                           const uint8_t *color) {
    for (int row = y; row < y + height; row++)
        for (int column = x; column < x + width; column++)
            memcpy(image->rgb + ((size_t)row * (size_t)image->width + (size_t)column) * RGB, color,
                   RGB);
}

/* tiles[n], all of one size or empty, in rows of so many columns, on white, with a gap around each
   and a frame in it where frames says so: 1 orange, 2 green (NULL: nowhere). */
static int compose(const lvm_image *tiles, int n, int columns, int gap, const uint8_t *frames,
                   lvm_image *out, lvm_error *error) {
    static const uint8_t white[RGB] = {255, 255, 255},
                         color[2][RGB] = {{240, 128, 32}, {48, 160, 80}};
    int w = tiles[0].width, h = tiles[0].height, rows = (n + columns - 1) / columns;
    int64_t width = columns * ((int64_t)w + gap) + gap, height = rows * ((int64_t)h + gap) + gap;
    if (!image_sides_ok(width, height))
        return fail(error, LVM_UNSUPPORTED, "an image of %lld x %lld is too large",
                    (long long)width, (long long)height);
    int code = image_new(out, (int)width, (int)height, error);
    if (code != LVM_OK) return code;
    fill_rectangle(out, 0, 0, out->width, out->height, white);
    for (int i = 0; i < n; i++) {
        int x = gap + i % columns * (w + gap), y = gap + i / columns * (h + gap), f = SHEET_FRAME;
        if (tiles[i].rgb == NULL) continue;
        if (frames != NULL && frames[i] > 0)
            fill_rectangle(out, x - f, y - f, w + 2 * f, h + 2 * f, color[frames[i] - 1]);
        for (int row = 0; row < h; row++)
            memcpy(out->rgb + ((size_t)(y + row) * (size_t)width + (size_t)x) * RGB,
                   tiles[i].rgb + (size_t)row * (size_t)w * RGB, (size_t)w * RGB);
    }
    return LVM_OK;
}

/* ---- Commands ---- */

struct session {
    lvm_model *model;
    lvm_ctx *ctx;
    struct bar bar;
    char adapters[112]; /* what --lora is, or "" */
};

static void session_close(struct session *s) {
    lvm_ctx_free(s->ctx);
    lvm_close(s->model);
}

/* Says which device is used where it is a GPU, or should have been. */
static void tell_device(const lvm_ctx *ctx, int quiet) {
    if (ctx == NULL || quiet) return;
    if (ctx->passed_over.code != LVM_OK)
        complain("works on the CPU, not on a GPU: %s", ctx->passed_over.text);
    else if (ctx->b != &cpu_backend && os_is_terminal(2)) complain("works on %s", ctx->device);
}

/* Merges what --lora names with the model, and takes its name and size. */
static int session_adapt(struct session *s, const char *path, lvm_error *error) {
    struct adapters ad;
    int code = lvm_apply_lora(s->model, path, error);
    if (code == LVM_OK) code = adapters_open(&ad, path, NULL, error);
    if (code != LVM_OK) return code;
    struct text t = read_text(&ad.file, "general.name");
    char name[80] = "adapters", shown[80];
    if (t.n > 0) snprintf(name, sizeof name, "%.*s", (int)min64((int64_t)t.n, 79), t.s);
    show_text(name, shown, sizeof shown);
    snprintf(s->adapters, sizeof s->adapters, " + %s (%zu bytes)", shown, ad.size);
    adapters_close(&ad);
    return LVM_OK;
}

static int session_open(struct session *s, struct cli *cli, lvm_error *error) {
    memset(s, 0, sizeof *s);
    s->model = lvm_open(cli->words[0], cli->flags ? LVM_NO_MMAP : 0, error);
    if (s->model == NULL) return error->code;
    if (cli->lora != NULL && session_adapt(s, cli->lora, error) != LVM_OK) return error->code;
    s->bar.shown = !cli->quiet && os_is_terminal(2);
    cli->options.user = &s->bar;
    cli->options.progress = on_progress;
    s->ctx = lvm_ctx_new(s->model, &cli->options, error);
    tell_device(s->ctx, cli->quiet);
    return s->ctx == NULL ? error->code : LVM_OK;
}

/* Reports a failure, if it was one, and gives the exit status. */
static int finish(const lvm_error *error, int code) {
    return code == LVM_OK ? 0 : complain("%s", error->text);
}

/* Both parts, and room for a prompt. */
static int need_all(const struct cli *cli, const struct session *s, lvm_error *error) {
    int code = need_tokenizer(s->ctx, error);
    if (code == LVM_OK) code = need_transformer(s->ctx, error);
    if (code == LVM_OK && s->ctx->o.window < 2)
        code = fail(error, LVM_INVALID, "%s: its context of %d tokens holds no prompt image",
                    cli->words[0], s->model->llama.context);
    return code;
}

/* Whether --cache, if it is given, is a file apart that can be written. */
static int check_cache(const struct cli *cli, const struct outputs *o, lvm_error *error) {
    struct outfile probe;
    if (cli->cache == NULL) return LVM_OK;
    if (is_stream(cli->cache))
        return fail(error, LVM_INVALID, "%s: is a pipe or device; a cache is a file", cli->cache);
    for (int i = 0; i < o->n; i++)
        if (same_place(o->list[i].name, cli->cache))
            return fail(error, LVM_INVALID, "%s: is an output and --cache", cli->cache);
    int code = outfile_open(&probe, cli->cache, error);
    if (code == LVM_OK) outfile_close(&probe, LVM_CANCELLED, NULL);
    return code;
}

/* The state that an earlier call kept; one that does not fit is made anew. */
static int load_cache(const struct cli *cli, struct session *s, lvm_error *error) {
    lvm_error fault = {0, ""};
    if (os_stat(cli->cache).kind == OS_NOTHING) return LVM_OK;
    if (!begins_with(cli->cache, "LVMCACHE"))
        return fail(error, LVM_INVALID, "%s: exists and is no cache of lvm; choose another file",
                    cli->cache);
    int code = lvm_cache_load(s->ctx, cli->cache, &fault);
    if (code == LVM_IO || code == LVM_MEMORY) return fail(error, code, "%s", fault.text);
    if (code != LVM_OK) note(cli, "%s; it is made anew", fault.text);
    return LVM_OK;
}

/* Reads the prompt; with --cache all but its last image from there, or into there. */
static int prompt_images(const struct cli *cli, struct session *s, const lvm_image *images, int n,
                         lvm_error *error) {
    lvm_ctx *ctx = s->ctx;
    if (cli->cache == NULL) return lvm_prompt_images(ctx, images, n, error);
    int code = load_cache(cli, s, error);
    if (code != LVM_OK) return code;
    int32_t *kept = mem_alloc((size_t)ctx->n_ids + 1, sizeof *kept, error);
    if (kept == NULL) return LVM_MEMORY;
    int n_kept = ctx->n_ids,
        shots = (s->model->llama.bos >= 0) + (n - 1) * s->model->T;
    memcpy(kept, ctx->ids, (size_t)n_kept * sizeof *kept);
    code = lvm_prompt_images(ctx, images, n, error);
    int same = code == LVM_OK && n_kept >= shots &&
               memcmp(kept, ctx->ids, (size_t)shots * sizeof *kept) == 0;
    if (code == LVM_OK && shots > 0 && !same) code = lvm_cache_save(ctx, cli->cache, shots, error);
    mem_free(kept);
    return code;
}

/* The images of a prompt that count, the last ones, loaded. */
static lvm_image *load_prompt(const struct cli *cli, const struct session *s, const struct paths *p,
                              int *n, lvm_error *error) {
    int most = s->ctx->o.window - 1, first = p->n > most ? p->n - most : 0;
    if (first > 0)
        note(cli, "%d images given, the last %d count (the context holds %d)", p->n, most,
             most + 1);
    *n = p->n - first;
    return load_images(cli, p, first, error);
}

/* A string of JSON, valid whatever bytes a name has: what is no UTF-8 shows as U+FFFD. */
static void print_json_text(const char *s) {
    putchar('"');
    while (*s != 0) {
        int n = utf8_bytes(s), c = (unsigned char)*s;
        if (c == '"' || c == '\\') printf("\\%c", c);
        else if (c < 32 || c == 127) printf("\\u%04x", (unsigned)c);
        else if (n == 0) printf("\\ufffd");
        else fwrite(s, 1, (size_t)n, stdout);
        s += n > 0 ? n : 1;
    }
    putchar('"');
}

/* A prompt and what comes of it. With --best one candidate of several is kept. */
struct prediction {
    const struct cli *cli;
    struct session s;
    struct paths paths;
    struct outputs outputs; /* a sheet and an animation, if wanted, then the images */
    lvm_image *prompt, truth;
    int n_prompt, candidates, first, kept; /* kept candidates, from first on, become images */
    int32_t *ids;           /* [candidates][images][T] */
    double *log_likelihood; /* [candidates], of all their tokens */
    lvm_image *images;      /* [kept][images] */
    double seconds[3];      /* that prompt, tokens and images took */
    char text[400];         /* what decides the pixels: see describe_run */
};

static void prediction_free(struct prediction *p) {
    outputs_free(&p->outputs);
    session_close(&p->s);
    paths_free(&p->paths);
    free_images(p->prompt, p->n_prompt);
    free_images(p->images, p->kept * p->cli->images);
    lvm_image_free(&p->truth);
    mem_free(p->ids);
    mem_free(p->log_likelihood);
}

static int open_predict_outputs(struct prediction *p, lvm_error *error) {
    const struct cli *cli = p->cli;
    int code = LVM_OK;
    p->outputs.silent = cli->json;
    if (cli->sheet != NULL)
        code = outputs_add(&p->outputs, cli, copy_string(cli->sheet, error), &p->paths, error);
    if (code == LVM_OK && cli->apng != NULL)
        code = outputs_add(&p->outputs, cli, copy_string(cli->apng, error), &p->paths, error);
    if (code == LVM_OK)
        code = add_image_outputs(&p->outputs, cli, cli->images, p->kept, &p->paths, error);
    return code == LVM_OK ? check_cache(cli, &p->outputs, error) : code;
}

/* What decides an image's pixels, as its file and a line on stderr say it: not threads, paths or
   time, so that equal images are equal files. */
static void describe_run(const struct cli *cli, const struct session *s, char *text, size_t room) {
    const lvm_model *m = s->model;
    const lvm_sampling *how = &cli->sampling;
    const lvm_options *o = &s->ctx->o;
    char name[80], sampler[96] = "greedy", top_k[24] = "";
    show_text(lvm_model_info(m).name, name, sizeof name);
    if (how->top_k > 0) snprintf(top_k, sizeof top_k, ", top-k %d", how->top_k);
    if (!how->greedy)
        snprintf(sampler, sizeof sampler, "seed %llu, temperature %g, top-p %g%s",
                 (unsigned long long)how->seed, (double)how->temperature, (double)how->top_p,
                 top_k);
    snprintf(text, room, "%s (%zu bytes)%s, %s, window %d, %s, kv %s%s",
             *name != 0 ? name : "weights", m->file.size, s->adapters, sampler, o->window,
             o->fit == LVM_CROP ? "crop" : "squash", type_info(o->kv_type)->name,
             o->exact ? ", exact" : "");
}

static int read_prompt(struct prediction *p, lvm_error *error) {
    double start = seconds();
    p->prompt = load_prompt(p->cli, &p->s, &p->paths, &p->n_prompt, error);
    if (p->prompt == NULL) return error->code;
    p->s.bar.reads = p->n_prompt, p->s.bar.writes = p->cli->images;
    p->s.bar.candidates = p->candidates;
    int code = LVM_OK;
    if (p->cli->truth != NULL) code = load_image(p->cli, p->cli->truth, &p->truth, error);
    if (code == LVM_OK) code = prompt_images(p->cli, &p->s, p->prompt, p->n_prompt, error);
    p->seconds[0] = seconds() - start;
    return code;
}

/* Tokens of all candidates, then the pixels of those that are kept. */
static int generate_images(struct prediction *p, lvm_error *error) {
    const struct cli *cli = p->cli;
    int n = cli->images * p->s.model->T;
    lvm_sampling sampling = cli->sampling;
    double start = seconds();
    p->ids = mem_alloc((size_t)p->candidates * (size_t)n, sizeof *p->ids, error);
    p->log_likelihood = mem_alloc((size_t)p->candidates, sizeof *p->log_likelihood, error);
    p->images = mem_alloc((size_t)p->kept * (size_t)cli->images, sizeof *p->images, error);
    if (p->ids == NULL || p->log_likelihood == NULL || p->images == NULL) return LVM_MEMORY;
    sampling.log_likelihood = p->log_likelihood;
    int code = lvm_generate(p->s.ctx, &sampling, p->candidates, n, p->ids, error);
    p->seconds[1] = seconds() - start;
    if (code != LVM_OK) return code;
    for (int c = 1; cli->best && c < p->candidates; c++)
        if (p->log_likelihood[c] > p->log_likelihood[p->first]) p->first = c;
    start = seconds();
    p->s.bar.candidates = p->kept;
    code = lvm_decode(p->s.ctx, p->ids + (int64_t)p->first * n, p->kept * cli->images, p->images,
                      error);
    p->seconds[2] = seconds() - start;
    return code;
}

/* The prompt, then the answers in frames, each candidate but the first in rows of its own; the
   truth, if it is given, in a green frame behind the first. The tiles borrow the answers' pixels
   and own the others'. */
static int make_sheet(const struct prediction *p, lvm_image *sheet, lvm_error *error) {
    int n = p->cli->images, extra = p->cli->truth != NULL, all = p->n_prompt + n + extra;
    int columns = all < SHEET_COLUMNS ? all : SHEET_COLUMNS, used = p->n_prompt, code = LVM_OK;
    int most = used + extra + p->kept * round_up(n, columns) + columns;
    int R = p->s.model->vq->R, fit = p->s.ctx->o.fit;
    lvm_image *tiles = mem_alloc((size_t)most, sizeof *tiles, error);
    uint8_t *frames = mem_alloc((size_t)most, 1, error);
    if (tiles == NULL || frames == NULL) code = LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < p->n_prompt; i++)
        code = fit_image(&p->prompt[i], R, fit, &tiles[i], error);
    for (int c = 0; code == LVM_OK && c < p->kept; c++) {
        if (c > 0) used = round_up(used, columns);
        memcpy(tiles + used, p->images + c * n, (size_t)n * sizeof *tiles);
        memset(frames + used, 1, (size_t)n);
        used += n;
        if (c > 0 || !extra) continue;
        frames[used] = 2;
        code = fit_image(&p->truth, R, fit, &tiles[used++], error);
    }
    if (code == LVM_OK) code = compose(tiles, used, columns, SHEET_GAP, frames, sheet, error);
    for (int i = 0; tiles != NULL && i < most; i++)
        if (i < p->n_prompt || frames[i] == 2) lvm_image_free(&tiles[i]);
    mem_free(tiles);
    mem_free(frames);
    return code;
}

enum { APNG_DELAY_MS = 200 };

/* The sheet and the animation, of the first candidate that is kept. */
static int write_extras(struct prediction *p, const char *text, lvm_error *error) {
    lvm_image sheet = {.rgb = NULL};
    uint8_t *png = NULL;
    size_t size = 0;
    int code = LVM_OK, i = 0;
    if (p->cli->sheet != NULL) {
        code = make_sheet(p, &sheet, error);
        if (code == LVM_OK) code = outputs_write_png(&p->outputs, i++, &sheet, NULL, error);
    }
    if (code == LVM_OK && p->cli->apng != NULL) {
        code = apng_encode(p->images, p->cli->images, APNG_DELAY_MS, text, &png, &size, error);
        if (code == LVM_OK) code = outputs_write(&p->outputs, i, png, size, error);
    }
    lvm_image_free(&sheet);
    mem_free(png);
    return code;
}

/* [candidate][image] in the order of their names: out-1a.png, out-1b.png, out-2a.png, ... */
static int write_images(struct prediction *p, lvm_error *error) {
    int n = p->cli->images, code = LVM_OK;
    int first = (p->cli->sheet != NULL) + (p->cli->apng != NULL);
    char text[sizeof p->text + 80];
    for (int i = 0; code == LVM_OK && i < n; i++)
        for (int c = 0; code == LVM_OK && c < p->kept; c++) {
            snprintf(text, sizeof text, "%s, candidate %d, image %d", p->text, p->first + c + 1,
                     i + 1);
            code = outputs_write_png(&p->outputs, first + i * p->kept + c, &p->images[c * n + i],
                                     text, error);
        }
    snprintf(text, sizeof text, "%s, candidate %d", p->text, p->first + 1);
    return code == LVM_OK ? write_extras(p, text, error) : code;
}

/* One object: what decides the answer, its names, each candidate's ids and their mean
   log-likelihood a token in nats. */
static void print_prediction_json(const struct prediction *p) {
    const struct cli *cli = p->cli;
    int n = cli->images * p->s.model->T, names = p->outputs.n - cli->images * p->kept;
    printf("{\"parameters\": ");
    print_json_text(p->text);
    printf(", \"seed\": %llu, \"seconds\": {\"prompt\": %.3f, \"generate\": %.3f, "
           "\"decode\": %.3f}", (unsigned long long)cli->sampling.seed, p->seconds[0],
           p->seconds[1], p->seconds[2]);
    for (int i = 0; i < names; i++) {
        printf(", \"%s\": ", i == 0 && cli->sheet != NULL ? "sheet" : "apng");
        print_json_text(p->outputs.list[i].name);
    }
    printf(", \"candidates\": [");
    for (int c = 0; c < p->candidates; c++) {
        int kept = c >= p->first && c < p->first + p->kept;
        printf("%s{\"log_likelihood\": %.9g, \"outputs\": [", c > 0 ? ", " : "",
               p->log_likelihood[c] / n);
        for (int i = 0; kept && i < cli->images; i++) {
            if (i > 0) printf(", ");
            print_json_text(p->outputs.list[names + i * p->kept + c - p->first].name);
        }
        printf("], \"ids\": [");
        for (int i = 0; i < n; i++)
            printf("%s%d", i > 0 ? ", " : "", (int)p->ids[(int64_t)c * n + i]);
        printf("]}");
    }
    printf("]}\n");
}

static int predict_images(struct prediction *p, lvm_error *error) {
    describe_run(p->cli, &p->s, p->text, sizeof p->text);
    int code = need_all(p->cli, &p->s, error);
    if (code == LVM_OK) code = read_prompt(p, error);
    if (code == LVM_OK) code = generate_images(p, error);
    if (code == LVM_OK) code = write_images(p, error);
    if (code != LVM_OK) return code;
    if (p->cli->json) print_prediction_json(p);
    const double *took = p->seconds;
    note(p->cli, "%s: %.2f s (prompt %.2f, tokens %.2f, images %.2f)", p->text,
         took[0] + took[1] + took[2], took[0], took[1], took[2]);
    return LVM_OK;
}

/* Which options do not go together; 0, or a message and 2. */
static int check_predict(const struct cli *cli) {
    int several = cli->images * (cli->best ? 1 : cli->candidates);
    if (cli->n_words == 1 && os_stat(cli->words[0]).kind == OS_NOTHING)
        return complain("there is no command and no file \"%s\" (lvm help)", cli->words[0]) + 1;
    if (cli->n_words < 2)
        return complain("give a weights file and prompt images: lvm WEIGHTS IMAGE|FOLDER... "
                        "(lvm help)") + 1;
    if (cli->out != NULL && is_stream(cli->out) && several > 1)
        return complain("-o %s: takes one image, not %d", cli->out, several) + 1;
    if (cli->truth != NULL && cli->sheet == NULL)
        return complain("--truth stands on a sheet: give --sheet too") + 1;
    return 0;
}

static int run_predict(struct cli *cli) {
    char *names[3] = {NULL, NULL, NULL};
    lvm_error error = {0, ""};
    struct prediction p = {.cli = cli, .candidates = cli->candidates,
                           .kept = cli->best ? 1 : cli->candidates};
    int status = check_predict(cli);
    if (status == 0) status = settle_png_name(&cli->out, "png", &names[0]);
    if (status == 0) status = settle_png_name(&cli->sheet, "png", &names[1]);
    if (status == 0) status = settle_png_name(&cli->apng, "png|apng", &names[2]);
    if (status == 0) {
        int code = collect_paths(cli, &p.paths, 1, cli->n_words, &error);
        if (code == LVM_OK) code = open_predict_outputs(&p, &error);
        if (code == LVM_OK) code = session_open(&p.s, cli, &error);
        if (code == LVM_OK) code = predict_images(&p, &error);
        status = finish(&error, code);
    }
    prediction_free(&p);
    for (int i = 0; i < 3; i++) mem_free(names[i]);
    return status;
}

/* Ids of one image after the other, a line each. */
static int encode_paths(const struct cli *cli, struct session *s, const struct paths *p,
                        struct buffer *text, lvm_error *error) {
    int T = s->model->T, code = LVM_OK;
    int32_t *ids = mem_alloc((size_t)T, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < p->n; i++) {
        lvm_image image = {0, 0, NULL, 0};
        s->bar.call = i, s->bar.calls = s->bar.reads = p->n;
        code = load_named(cli, p, i, &image, error);
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
    if (cli->n_words < 2) return complain("give a weights file and images (lvm help encode)") + 1;
    lvm_error error = {0, ""};
    struct session s = {.model = NULL};
    struct paths p = {0};
    struct buffer text = {0};
    struct outputs o = {0};
    const char *out = cli->out != NULL ? cli->out : "-";
    int code = collect_paths(cli, &p, 1, cli->n_words, &error);
    if (code == LVM_OK) code = outputs_add(&o, cli, copy_string(out, &error), &p, &error);
    if (code == LVM_OK) code = session_open(&s, cli, &error);
    if (code == LVM_OK) code = encode_paths(cli, &s, &p, &text, &error);
    if (code == LVM_OK) code = outputs_write(&o, 0, text.data, text.n, &error);
    mem_free(text.data);
    outputs_free(&o);
    session_close(&s);
    paths_free(&p);
    return finish(&error, code);
}

/* Names the word of a token file that is none; what does not print shows as ?. */
static int no_token(const char *name, int line, const char *word, size_t n, lvm_error *error) {
    char shown[13] = "";
    for (size_t i = 0; i < n && i < 12 && !isspace((unsigned char)word[i]); i++)
        shown[i] = isprint((unsigned char)word[i]) || word[i] == 0 ? word[i] : '?';
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
    int T = s->model->T;
    struct paths inputs = {0};
    struct outputs o = {0};
    lvm_error fault = {0, ""};
    int code = need_tokenizer(s->ctx, error);
    if (code != LVM_OK) return code;
    if (n == 0 || n % T != 0)
        return fail(error, LVM_FORMAT, "%s: %d token ids; an image takes %d", cli->words[1], n, T);
    if (check_ids(ids, n, s->model->codes, &fault) != LVM_OK)
        return fail(error, LVM_FORMAT, "%s: %s", cli->words[1], fault.text);
    lvm_image *images = mem_alloc((size_t)(n / T), sizeof *images, error);
    if (images == NULL) return LVM_MEMORY;
    s->bar.writes = n / T;
    code = paths_add(&inputs, "", cli->words[1], error);
    if (code == LVM_OK) code = add_image_outputs(&o, cli, n / T, 1, &inputs, error);
    if (code == LVM_OK) code = lvm_decode(s->ctx, ids, n / T, images, error);
    for (int i = 0; code == LVM_OK && i < n / T; i++)
        code = outputs_write_png(&o, i, &images[i], NULL, error);
    outputs_free(&o);
    free_images(images, n / T);
    paths_free(&inputs);
    return code;
}

static int run_decode(struct cli *cli) {
    if (cli->n_words != 2)
        return complain("give a weights file and a file of token ids (lvm help decode)") + 1;
    char *out = NULL;
    if (settle_png_name(&cli->out, "png", &out) != 0) return 2;
    lvm_error error = {0, ""};
    struct session s = {.model = NULL};
    struct buffer text = {0};
    int32_t *ids = NULL;
    int n = 0, code = read_input(cli->words[1], &text, &error);
    if (code == LVM_OK) code = parse_tokens(cli->words[1], text.data, text.n, &ids, &n, &error);
    if (code == LVM_OK) code = session_open(&s, cli, &error);
    if (code == LVM_OK) code = decode_tokens(cli, &s, ids, n, &error);
    mem_free(text.data);
    mem_free(ids);
    mem_free(out);
    session_close(&s);
    return finish(&error, code);
}

/* ---- Ranking ---- */

/* A negative log-likelihood of n tokens, of which a perplexity can be told: beyond exp(600) a token
   a mean of them may be no number any more, and NaN is no answer. */
static int check_likelihood(double nll, int64_t n, lvm_error *error) {
    if (nll / (double)n < 600) return LVM_OK;
    return fail(error, LVM_UNSUPPORTED, "its perplexity is no finite number (%g nats a token); "
                "are these weights sound?", nll / (double)n);
}

/* Choices that a device reads together, as sequences that share the prompt. */
static int choices_together(const lvm_ctx *ctx, int n) {
    int rows = ctx->m->T - 1;
    return (int)min64(min64(n, ctx->limits.sequences), rows > 0 ? ctx->limits.rows / rows : 1);
}

/* each[n][T] of ids[n][T], of n choices that are read together behind a prompt that is fed; see
   read_behind. */
static int read_choices(lvm_ctx *ctx, const int32_t *ids, int n, float *each, lvm_error *error) {
    int T = ctx->m->T, rows = T - 1, code = LVM_OK;
    size_t all = (size_t)n * (size_t)T;
    int32_t *tokens = mem_alloc(2 * all, sizeof *tokens, error);
    float *nll = mem_alloc(all, sizeof *nll, error);
    struct batch b = {.n = n * rows, .tokens = tokens, .seqs = ctx->seqs, .n_out = n * rows,
                      .out = ctx->rows, .targets = tokens + all, .nll = nll};
    if (tokens == NULL || nll == NULL) code = LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < n; i++) {
        memcpy(tokens + i * rows, ids + i * T, (size_t)rows * sizeof *ids);
        memcpy(tokens + all + i * rows, ids + i * T + 1, (size_t)rows * sizeof *ids);
        for (int t = 0; t < rows; t++) ctx->seqs[i * rows + t] = i;
        if (i > 0) code = ctx->b->kv_copy(ctx->state, 0, i, ctx->n_fed, error);
    }
    if (code == LVM_OK) code = ctx->b->forward(ctx->state, &b, error);
    for (int i = 0; i < n; i++) ctx->b->kv_trim(ctx->state, i, i == 0 ? ctx->n_fed : 0);
    for (int i = 0; code == LVM_OK && i < n; i++) {
        each[i * T] = negative_log_likelihood(ctx->logits, ctx->m->llama.V, ids[i * T]);
        memcpy(each + i * T + 1, nll + i * rows, (size_t)rows * sizeof *nll);
        for (int t = 0; code == LVM_OK && t < T; t++)
            code = check_finite(each + i * T + t, 1, "the likelihoods from token", t + 1, error);
    }
    mem_free(tokens);
    mem_free(nll);
    return blame_weights(ctx, code, error);
}

/* nll[i]: of all tokens of choice i, ids[n][T], behind the prompt. */
static int score_choices(lvm_ctx *ctx, const int32_t *ids, int n, double *nll, lvm_error *error) {
    int T = ctx->m->T, most = choices_together(ctx, n), code = prefill_pending(ctx, error);
    float *each = mem_alloc((size_t)max64(1, most) * (size_t)T, sizeof *each, error);
    if (each == NULL) code = LVM_MEMORY;
    for (int i = 0, some; code == LVM_OK && i < n; i += some) {
        const int32_t *from = ids + (int64_t)i * T;
        some = ctx->n_fed + T > ctx->m->llama.context + 1 ? 1 : (int)min64(most, n - i);
        code = some > 1 ? read_choices(ctx, from, some, each, error)
                        : lvm_score(ctx, from, T, each, error);
        for (int c = 0; code == LVM_OK && c < max64(1, some); c++) {
            nll[i + c] = 0;
            for (int t = 0; t < T; t++) nll[i + c] += each[c * T + t];
            code = check_likelihood(nll[i + c], T, error);
        }
        if (code == LVM_OK && some > 1)
            code = report(&ctx->o, "score", (i + some) * (int64_t)T, n * (int64_t)T, error);
    }
    mem_free(each);
    return code;
}

static int likeliest(const double *nll, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (nll[i] < nll[best]) best = i;
    return best;
}

/* What softmax makes of the choices' log-likelihoods: the probability of choice i. */
static double choice_probability(const double *nll, int n, int i) {
    double sum = 0, least = nll[likeliest(nll, n)];
    for (int j = 0; j < n; j++) sum += exp_f64(least - nll[j]);
    return exp_f64(least - nll[i]) / sum;
}

/* Members of a JSON object that tell of choices: their names, where there are such (NULL: the line
   gives tokens), likelihoods in nats, perplexities of a token, probabilities, the best one. */
static void print_json_choices(char *const *names, const double *nll, int n, int T) {
    static const char *const lists[] = {"choices", "likelihoods", "perplexities", "probabilities"};
    for (int k = names == NULL; k < 4; k++) {
        printf("\"%s\": [", lists[k]);
        for (int i = 0; i < n; i++) {
            if (i > 0) printf(", ");
            if (k == 0 && names[i] != NULL) print_json_text(names[i]);
            else if (k == 0) printf("null");
            else printf("%.9g", k == 1   ? -nll[i]
                                : k == 2 ? exp_f64(nll[i] / T)
                                         : choice_probability(nll, n, i));
        }
        printf("], ");
    }
    printf("\"answer\": %d", likeliest(nll, n));
}

/* The same as a table. */
static void print_choices(char *const *names, const double *nll, int n, int T) {
    printf("perplexity  probability\n");
    for (int i = 0; i < n; i++) {
        printf("%10.4f  %11.4f  ", exp_f64(nll[i] / T), choice_probability(nll, n, i));
        print_name(names[i] != NULL ? names[i] : "(tokens)",
                   i == likeliest(nll, n) ? "  <- best" : "");
    }
}

static int rank_choices(const struct cli *cli, struct session *s, const struct paths *prompt,
                        const struct paths *choices, lvm_error *error) {
    int T = s->model->T, n = 0, code = need_all(cli, s, error);
    if (code != LVM_OK) return code;
    lvm_image *shots = load_prompt(cli, s, prompt, &n, error);
    lvm_image *images = shots != NULL ? load_images(cli, choices, 0, error) : NULL;
    int32_t *ids = mem_alloc((size_t)choices->n * (size_t)T, sizeof *ids, error);
    double *nll = mem_alloc((size_t)choices->n, sizeof *nll, error);
    code = shots == NULL || images == NULL || ids == NULL || nll == NULL
               ? error->code
               : prompt_images(cli, s, shots, n, error);
    if (code == LVM_OK) code = lvm_encode(s->ctx, images, choices->n, ids, error);
    if (code == LVM_OK) code = score_choices(s->ctx, ids, choices->n, nll, error);
    if (code == LVM_OK && cli->json) {
        putchar('{');
        print_json_choices(choices->path, nll, choices->n, T);
        puts("}");
    } else if (code == LVM_OK) {
        print_choices(choices->path, nll, choices->n, T);
    }
    free_images(shots, n);
    free_images(images, choices->n);
    mem_free(ids);
    mem_free(nll);
    return code;
}

/* ---- Sets of prompts ---- */

/* Lines of a file or a stream, each read when it is asked for, so that memory holds one. */
struct lines {
    const char *name; /* as messages say it */
    FILE *file;
    int number, too_long;
    int64_t size, done; /* bytes: of a regular file, else 0; of the lines taken */
    struct buffer text; /* the current line without its end */
};

static int lines_open(struct lines *l, const char *path, lvm_error *error) {
    int from_stdin = strcmp(path, "-") == 0;
    l->name = from_stdin ? "standard input" : path;
    if (path[0] == 0) return fail(error, LVM_INVALID, "the name of the set is empty");
    l->file = from_stdin ? stdin : os_fopen(path, "rb");
    if (l->file == NULL) return fail(error, LVM_IO, "%s: %s", path, strerror(errno));
    struct os_info info = os_fstat(fileno(l->file));
    if (info.kind == OS_FOLDER) return fail(error, LVM_IO, "%s: is a folder, no set", path);
    if (!from_stdin && info.kind == OS_FILE) l->size = info.size;
    return LVM_OK;
}

static void lines_close(struct lines *l) {
    if (l->file != NULL && l->file != stdin) fclose(l->file);
    mem_free(l->text.data);
}

/* From the first line again, of a regular file. */
static int lines_rewind(struct lines *l, lvm_error *error) {
    l->number = 0;
    l->done = 0;
    if (fseek(l->file, 0, SEEK_SET) == 0) return LVM_OK;
    return fail(error, LVM_IO, "%s: %s", l->name, strerror(errno));
}

/* The next byte, or EOF. A pipe may have been opened by others so that reading does not wait. */
static int lines_byte(struct lines *l) {
    int c = getc(l->file);
    while (c == EOF && ferror(l->file) && errno == EAGAIN) {
        os_wait_input(fileno(l->file));
        clearerr(l->file);
        c = getc(l->file);
    }
    l->done += c != EOF;
    return c;
}

/* The next line: 1, 0 at the end, -1 and an error. Of one that is too long only that is known. */
static int lines_next(struct lines *l, lvm_error *error) {
    int64_t before = l->done;
    l->text.n = 0;
    l->too_long = 0;
    for (int c; (c = lines_byte(l)) != EOF && c != '\n';) {
        char byte = (char)c;
        if (l->text.n == LINE_BYTES) l->too_long = 1;
        else if (buffer_add(&l->text, &byte, 1, error) != LVM_OK) return -1;
    }
    l->number += l->done > before;
    if (!ferror(l->file)) return l->done > before;
    fail(error, LVM_IO, "%s: %s", l->name, strerror(errno));
    return -1;
}

/* Outputs that must differ. A file is known by its device and number, one that is to be made by
   those of the deepest folder on its way and the rest of its name. */
struct destination {
    uint64_t device, number;
    char *name;       /* NULL: an image that the set reads */
    const char *rest; /* of the name */
    int line;
};

struct destinations {
    struct destination *list;
    int n;
    size_t room;
};

static void destinations_free(struct destinations *o) {
    for (int i = 0; i < o->n; i++) mem_free(o->list[i].name);
    mem_free(o->list);
    memset(o, 0, sizeof *o);
}

/* A set at work: its lines, and the sums for the end. */
struct set {
    struct cli *cli;
    struct session s;
    struct pool *pool;       /* to read images by; made with the first */
    struct ahead *ahead;     /* NULL: no images are read ahead */
    struct lines lines;
    char *folder;            /* of the set, with its slash; "" of a stream */
    int32_t *ids;            /* [bos + window T], of the prompt */
    int n_ids;
    unsigned noted;          /* bit i: a note on a key that is nearly key_table[i] was given */
    struct destinations written;  /* by batch, or left as they are */
    struct together {        /* batch: lines that wait for their answers */
        int most, n, joined; /* joined: the line at hand did */
        struct awaited *of;  /* [most] */
        float *logits;       /* [most][V] */
    } group;
    int cut;                 /* a note on the window was given */
    int good, bad, puzzles, answered, right, errors, skipped;
    double perplexity, error; /* sums: of good lines; squared errors of answers with targets */
};

static void ahead_close(struct ahead *a);

static void set_close(struct set *set) {
    ahead_close(set->ahead);
    session_close(&set->s);
    pool_free(set->pool);
    lines_close(&set->lines);
    destinations_free(&set->written);
    mem_free(set->group.of);
    mem_free(set->group.logits);
    mem_free(set->folder);
    mem_free(set->ids);
}

static int set_open(struct set *set, struct cli *cli, lvm_error *error) {
    const char *path = cli->words[1];
    size_t n = (size_t)(os_file_name(path) - path);
    set->cli = cli;
    int code = lines_open(&set->lines, path, error);
    if (code == LVM_OK) code = session_open(&set->s, cli, error);
    if (code == LVM_OK) code = need_transformer(set->s.ctx, error);
    if (code != LVM_OK) return code;
    set->s.bar.whole = 1;
    set->s.bar.lines = cli->lines;
    set->folder = mem_alloc(n + 1, 1, error);
    set->ids = mem_alloc((size_t)set->s.ctx->o.window * (size_t)set->s.model->T + 1,
                         sizeof *set->ids, error);
    if (set->folder == NULL || set->ids == NULL) return LVM_MEMORY;
    memcpy(set->folder, path, n);
    return LVM_OK;
}

/* Refuses UTF-16, which Windows' tools write, and passes over the mark in front of UTF-8. */
static int check_encoding(struct lines *l, lvm_error *error) {
    const char *s = l->text.data;
    size_t n = l->text.n;
    if (n >= 3 && memcmp(s, "\xef\xbb\xbf", 3) == 0) memset(l->text.data, ' ', 3);
    if (n < 2 || (memcmp(s, "\xff\xfe", 2) != 0 && memcmp(s, "\xfe\xff", 2) != 0 &&
                  s[0] != 0 && s[1] != 0))
        return LVM_OK;
    return fail(error, LVM_FORMAT, "%s: is text in UTF-16; a set is UTF-8", l->name);
}

static int is_blank(const struct buffer *text) {
    for (size_t i = 0; i < text->n; i++)
        if (!isspace((unsigned char)text->data[i])) return 0;
    return 1;
}

/* The next line that is not blank: 1, 0 at the end, -1 and an error. No more is read than --lines
   asks for. */
static int set_next(struct set *set, lvm_error *error) {
    struct lines *l = &set->lines;
    for (;;) {
        if (set->cli->lines > 0 && l->number >= set->cli->lines) return 0;
        int more = lines_next(l, error);
        if (more <= 0) return more;
        if (l->number == 1 && check_encoding(l, error) != LVM_OK) return -1;
        if (!is_blank(&l->text)) return 1;
    }
}

static int set_parse(struct set *set, struct sentence *line, lvm_error *error) {
    const lvm_model *m = set->s.model;
    struct json j = {.s = set->lines.text.data, .n = set->lines.text.n, .T = m->T,
                     .codes = m->codes, .error = error};
    memset(line, 0, sizeof *line);
    if (set->lines.too_long)
        return fail(error, LVM_FORMAT, "is longer than %d bytes", LINE_BYTES);
    return parse_sentence(&j, line);
}

/* Notes keys that are passed over but look misspelt, each once a set. */
static void note_keys(struct set *set, const struct sentence *line) {
    for (int i = 0; i < N_KEYS && !set->cli->quiet; i++) {
        if (line->stray[i][0] == 0 || set->noted & 1u << i) continue;
        set->noted |= 1u << i;
        hide_bar(&set->s.bar);
        note(set->cli, "%s: line %d: the key \"%s\" has no meaning (did you mean \"%s\"?)",
             set->lines.name, set->lines.number, line->stray[i], key_table[i].name);
    }
}

/* How far a set is: by its lines where --lines says how many, by its bytes where it is a file. */
static void draw_set_bar(struct set *set, const char *stage) {
    const struct lines *l = &set->lines;
    if (!set->s.bar.shown) return;
    if (set->cli->lines > 0) draw_bar(&set->s.bar, stage, l->number, set->cli->lines);
    else if (l->size > 0) draw_bar(&set->s.bar, stage, min64(l->done, l->size), l->size);
    else fprintf(stderr, "\r%s, lines done: %d\033[K", stage, l->number);
}

/* Where an image of a set lies: below --base, or beside the set, or else where the name says. */
static char *find_image(const struct set *set, const char *path, lvm_error *error) {
    const char *base = set->cli->base;
    const char *folder = os_root(path) > 0 ? "" : base != NULL ? base : set->folder;
    char *found = join_path(folder, path, error);
    if (found == NULL || base != NULL || os_stat(found).kind != OS_NOTHING) return found;
    mem_free(found);
    return join_path("", path, error);
}

/* Of all images that a line names. */
static int line_paths(const struct set *set, const struct sentence *line, struct paths *p,
                      lvm_error *error) {
    const struct image_list *const lists[] = {&line->input, &line->target, &line->choices};
    int code = LVM_OK;
    for (int k = 0; k < 3; k++)
        for (int i = 0; code == LVM_OK && i < lists[k]->n; i++) {
            if (lists[k]->list[i].path == NULL) continue;
            char *path = find_image(set, lists[k]->list[i].path, error);
            code = path != NULL ? paths_add(p, "", path, error) : LVM_MEMORY;
            mem_free(path);
        }
    return code;
}

/* *orientation: the file's; where it is NULL a note says at once if it is left alone. */
static int load_set_image(const struct set *set, const struct image_ref *p, lvm_image *image,
                          int *orientation, lvm_error *error) {
    char *path = find_image(set, p->path, error);
    int code = path != NULL ? lvm_image_load(path, image, error) : LVM_MEMORY;
    if (code == LVM_IO && strcmp(path, p->path) == 0 && os_root(path) == 0 &&
        set->folder[0] != 0 && os_stat(path).kind == OS_NOTHING)
        fail(error, LVM_IO, "%s: is neither in %s nor in the working directory", path,
             set->folder);
    if (code == LVM_OK && orientation != NULL) *orientation = image->orientation;
    else if (code == LVM_OK) note_rotation(set->cli, path, image->orientation);
    mem_free(path);
    return code == LVM_OK ? rotate_image(set->cli, image, error) : code;
}

/* Images of a line that are read together, each by a thread. */
enum { READ_TOGETHER = 16, READ_AHEAD = 64 };

struct one_read {
    lvm_image square; /* as the tokenizer takes it */
    int orientation, code;
    lvm_error error;
};

struct reading {
    const struct set *set;
    const struct image_ref *list;
    struct one_read *of; /* [n] */
};

/* It is not there yet, and no tokens stand in its place. */
static int is_missing(const struct reading *r, int i) {
    return r->list[i].ids == NULL && r->of[i].square.rgb == NULL;
}

static void read_one_task(void *arg, int task, int thread) {
    struct reading *r = arg;
    struct one_read *one = &r->of[task];
    const lvm_ctx *ctx = r->set->s.ctx;
    lvm_image image = {.rgb = NULL};
    (void)thread;
    if (!is_missing(r, task)) return;
    one->code = load_set_image(r->set, &r->list[task], &image, &one->orientation, &one->error);
    if (one->code == LVM_OK) one->code = need_tokenizer(ctx, &one->error);
    if (one->code == LVM_OK)
        one->code = fit_image(&image, ctx->m->vq->R, ctx->o.fit, &one->square, &one->error);
    lvm_image_free(&image);
}

static void read_together(struct set *set, struct reading *r, int n) {
    int most = (int)min64(set->s.ctx->o.threads, READ_TOGETHER), missing = 0;
    for (int i = 0; i < n; i++) missing += is_missing(r, i);
    if (set->pool == NULL && missing > 1) set->pool = pool_new(most, NULL);
    if (set->pool != NULL && missing > 1) pool_run(set->pool, n, read_one_task, r);
    else
        for (int i = 0; i < n; i++) read_one_task(r, i, 0);
}

/* ---- Sets: the next line's images, read while the device works on this one's ----

   A thread goes through the file by itself, a line ahead; what it cannot read, or nobody asks for,
   is left to the line's own turn. */

struct line_read {
    struct sentence line;                /* of which the list are copies */
    int number, n;
    struct image_ref list[READ_AHEAD];
    struct one_read of[READ_AHEAD];
};

struct ahead {
    struct set own;             /* the same set at a line of its own */
    pthread_t thread;
    pthread_mutex_t mutex;      /* of what follows */
    pthread_cond_t changed;
    int wanted, full, ended, quit; /* wanted: no line before it; full: `next` waits to be taken */
    struct line_read next, now; /* now: the line at hand, its user's alone */
};

static void line_read_free(struct line_read *l) {
    for (int i = 0; i < l->n; i++) lvm_image_free(&l->of[i].square);
    sentence_free(&l->line);
    memset(l, 0, sizeof *l);
}

/* The images of a line that its window can hold. */
static void list_line(const struct ahead *a, struct line_read *l) {
    const struct image_list *const lists[] = {&l->line.input, &l->line.target, &l->line.choices};
    int window = a->own.s.ctx->o.window;
    for (int k = 0; k < 3; k++)
        for (int i = k == 0 ? (int)max64(0, lists[k]->n - window) : 0; i < lists[k]->n; i++)
            if (lists[k]->list[i].ids == NULL && l->n < READ_AHEAD)
                l->list[l->n++] = lists[k]->list[i];
}

static void *ahead_thread(void *arg) {
    struct ahead *a = arg;
    int more = 1;
    pthread_mutex_lock(&a->mutex);
    while (more > 0) {
        while (a->full && !a->quit) pthread_cond_wait(&a->changed, &a->mutex);
        if (a->quit) break;
        int wanted = a->wanted;
        pthread_mutex_unlock(&a->mutex);
        line_read_free(&a->next);
        struct reading r = {&a->own, a->next.list, a->next.of};
        lvm_error error;
        more = set_next(&a->own, &error);
        a->next.number = a->own.lines.number;
        if (more > 0 && a->next.number >= wanted &&
            set_parse(&a->own, &a->next.line, &error) == LVM_OK) {
            list_line(a, &a->next);
            read_together(&a->own, &r, a->next.n);
        }
        pthread_mutex_lock(&a->mutex);
        a->full = more > 0 && a->next.number >= wanted;
        a->ended = more <= 0;
        pthread_cond_broadcast(&a->changed);
    }
    pthread_mutex_unlock(&a->mutex);
    return NULL;
}

/* Without memory or a thread nothing is read ahead. */
static void ahead_open(struct set *set) {
    struct ahead *a = set->lines.size > 0 ? mem_alloc(1, sizeof *a, NULL) : NULL;
    lvm_error error;
    if (a == NULL) return;
    a->own.cli = set->cli;
    a->own.s = set->s;
    a->own.folder = set->folder;
    pthread_mutex_init(&a->mutex, NULL);
    pthread_cond_init(&a->changed, NULL);
    os_signals before = os_block_signals();
    if (lines_open(&a->own.lines, set->cli->words[1], &error) == LVM_OK &&
        thread_start(&a->thread, ahead_thread, a) == 0)
        set->ahead = a;
    os_restore_signals(before);
    if (set->ahead != NULL) return;
    lines_close(&a->own.lines);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->mutex);
    mem_free(a);
}

static void ahead_close(struct ahead *a) {
    if (a == NULL) return;
    pthread_mutex_lock(&a->mutex);
    a->quit = 1;
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->mutex);
    pthread_join(a->thread, NULL);
    line_read_free(&a->next);
    line_read_free(&a->now);
    lines_close(&a->own.lines);
    pool_free(a->own.pool);
    pthread_cond_destroy(&a->changed);
    pthread_mutex_destroy(&a->mutex);
    mem_free(a);
}

/* Waits for the images of the line at hand and lets those of the next be read. */
static void ahead_take(struct ahead *a, int number) {
    if (number <= a->now.number) return;
    line_read_free(&a->now);
    pthread_mutex_lock(&a->mutex);
    a->wanted = number;
    while (!a->ended && !(a->full && a->next.number >= number)) {
        a->full = 0; /* a line that was passed over */
        pthread_cond_broadcast(&a->changed);
        pthread_cond_wait(&a->changed, &a->mutex);
    }
    if (a->full && a->next.number == number) {
        a->now = a->next;
        memset(&a->next, 0, sizeof a->next);
        a->full = 0;
    }
    pthread_cond_broadcast(&a->changed);
    pthread_mutex_unlock(&a->mutex);
    a->now.number = number;
}

/* Moves images that were read ahead to where they are wanted, each once. */
static void take_read(struct set *set, struct reading *r, int n) {
    if (set->ahead == NULL) return;
    ahead_take(set->ahead, set->lines.number);
    struct line_read *now = &set->ahead->now;
    for (int i = 0; now->number == set->lines.number && i < n; i++)
        for (int k = 0; r->list[i].ids == NULL && k < now->n; k++)
            if (now->of[k].square.rgb != NULL && strcmp(now->list[k].path, r->list[i].path) == 0) {
                r->of[i] = now->of[k];
                now->of[k].square.rgb = NULL;
                break;
            }
}

/* The note on a rotation that is left alone. */
static void note_read(const struct set *set, const struct image_ref *p, int orientation) {
    char *path = orientation >= 2 ? find_image(set, p->path, NULL) : NULL;
    if (path != NULL) note_rotation(set->cli, path, orientation);
    mem_free(path);
}

/* Tokens of list[0..n-1], no more than READ_TOGETHER, to ids[n][T]: those that are given, and of
   images, which the device encodes together. Those before a faulty one are encoded all the same, so
   that its fault is the first. */
static int encode_together(struct set *set, const struct image_ref *list, int n, int32_t *ids,
                           lvm_error *error) {
    struct one_read of[READ_TOGETHER] = {{.code = LVM_OK}};
    struct reading r = {set, list, of};
    size_t T = (size_t)set->s.model->T, size = T * sizeof *ids;
    lvm_image squares[READ_TOGETHER];
    int to[READ_TOGETHER], images = 0, good = 0;
    int32_t *tokens = mem_alloc((size_t)n, size, error);
    if (tokens == NULL) return LVM_MEMORY;
    take_read(set, &r, n);
    read_together(set, &r, n);
    for (; good < n && r.of[good].code == LVM_OK; good++) {
        if (list[good].ids != NULL) memcpy(ids + (size_t)good * T, list[good].ids, size);
        else {
            note_read(set, &list[good], r.of[good].orientation);
            to[images] = good;
            squares[images++] = r.of[good].square;
        }
    }
    int code = images > 0 ? lvm_encode(set->s.ctx, squares, images, tokens, error) : LVM_OK;
    for (int i = 0; code == LVM_OK && i < images; i++)
        memcpy(ids + (size_t)to[i] * T, tokens + (size_t)i * T, size);
    if (code == LVM_OK && good < n)
        code = fail(error, r.of[good].code, "%s", r.of[good].error.text);
    for (int i = 0; i < n; i++) lvm_image_free(&r.of[i].square);
    mem_free(tokens);
    return code;
}

static int encode_set_images(struct set *set, const struct image_ref *list, int n, int32_t *ids,
                             lvm_error *error) {
    int code = LVM_OK;
    for (int at = 0; code == LVM_OK && at < n; at += READ_TOGETHER)
        code = encode_together(set, list + at, (int)min64(READ_TOGETHER, n - at),
                               ids + (int64_t)at * set->s.model->T, error);
    return code;
}

/* Says so, once, where a context holds less than what lines give. */
static void note_window(struct set *set, int given, int used) {
    if (used == given || set->cut || set->cli->quiet) return;
    set->cut = 1;
    hide_bar(&set->s.bar);
    note(set->cli, "%s: line %d: %d images of input, the last %d count (the context holds %d)",
         set->lines.name, set->lines.number, given, used, set->s.ctx->o.window);
}

/* Reads the last images of a line's input that leave room for so many more; *used is their
   number. What the line before began with too is not computed again. */
static int prompt_line(struct set *set, const struct sentence *line, int room, int *used,
                       lvm_error *error) {
    const lvm_model *m = set->s.model;
    int most = set->s.ctx->o.window - room, bos = m->llama.bos >= 0;
    if (most < 0)
        return fail(error, LVM_INVALID, "%d images do not fit a context of %d", room,
                    most + room);
    int n = line->input.n < most ? line->input.n : most;
    if (n == 0 && !bos) return fail(error, LVM_INVALID, "no image fits in front of the targets");
    if (bos) set->ids[0] = m->llama.bos;
    set->n_ids = bos + n * m->T;
    if (line->by[GIVES_INPUT] == NULL)
        return fail(error, LVM_FORMAT, "has no \"input\" (an empty list is one)");
    note_window(set, line->input.n, n);
    *used = n;
    const struct image_ref *first = line->input.list + line->input.n - n;
    int code = encode_set_images(set, first, n, set->ids + bos, error);
    return code == LVM_OK ? lvm_prompt(set->s.ctx, set->ids, set->n_ids, NULL, error) : code;
}

typedef int line_fn(struct set *set, struct sentence *line, lvm_error *error);

/* Answers the lines that wait, if any do; 0 as of run_line. */
static int answer_together(struct set *set);

/* A line is done: counts it and reports a fault. Returns 0 when nobody takes answers any more. */
static int end_line(struct set *set, int code, const lvm_error *error) {
    hide_bar(&set->s.bar);
    set->good += code == LVM_OK;
    set->bad += code != LVM_OK;
    if (code != LVM_OK)
        complain("%s: line %d: %s", set->lines.name, set->lines.number, error->text);
    if (code != LVM_OK && set->cli->json) {
        printf("{\"line\": %d, \"error\": ", set->lines.number);
        print_json_text(error->text);
        printf("}\n");
    }
    return fflush(stdout) == 0;
}

/* One line; its answer is on its way before the next is waited for, unless it joined a group. */
static int run_line(struct set *set, line_fn *run) {
    struct sentence line;
    lvm_error error = {0, ""};
    struct together *g = &set->group;
    int code = set_parse(set, &line, &error);
    note_keys(set, &line);
    g->joined = 0;
    if (code == LVM_OK) code = run(set, &line, &error);
    sentence_free(&line);
    if (g->joined) return g->n < g->most || answer_together(set);
    return answer_together(set) && end_line(set, code, &error);
}

/* Runs every line of a set through run; a bad line is reported and the next one taken. */
static int run_set(struct set *set, const char *stage, line_fn *run) {
    lvm_error error = {0, ""};
    int more = 0;
    ahead_open(set);
    draw_set_bar(set, stage);
    while ((more = set_next(set, &error)) > 0) {
        if (!run_line(set, run)) return 0; /* main says so */
        draw_set_bar(set, stage);
    }
    if (!answer_together(set)) return 0;
    hide_bar(&set->s.bar);
    if (more < 0) return complain("%s", error.text);
    if (set->good + set->bad == 0) complain("%s: holds no lines", set->lines.name);
    return set->bad > 0 || set->good == 0;
}

/* What eval says of a puzzle; rank, which brings names, says it of each choice. */
static void print_puzzle(struct set *set, const struct sentence *line, char *const *names,
                         const double *nll) {
    int n = line->choices.n, T = set->s.model->T, best = likeliest(nll, n);
    hide_bar(&set->s.bar);
    if (set->cli->json) {
        printf("{\"line\": %d, ", set->lines.number);
        print_json_choices(names, nll, n, T);
        if (line->answer >= 0)
            printf(", \"right\": %s", best == line->answer ? "true" : "false");
        printf("}\n");
        return;
    }
    printf("%d: answer %d", set->lines.number, best);
    if (line->answer >= 0) printf(" (%s)", best == line->answer ? "right" : "wrong");
    printf(", probability %.4f\n", choice_probability(nll, n, best));
    if (names != NULL) print_choices(names, nll, n, T);
}

/* nll[i] of each choice, of which memory holds a few at a time. */
static int score_line(struct set *set, const struct sentence *line, double *nll,
                      lvm_error *error) {
    int used = 0, code = prompt_line(set, line, 1, &used, error);
    int32_t *ids = mem_alloc(READ_TOGETHER * (size_t)set->s.model->T, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    for (int i = 0, n; code == LVM_OK && i < line->choices.n; i += n) {
        n = (int)min64(READ_TOGETHER, line->choices.n - i);
        code = encode_set_images(set, line->choices.list + i, n, ids, error);
        if (code == LVM_OK) code = score_choices(set->s.ctx, ids, n, nll + i, error);
    }
    mem_free(ids);
    return code;
}

static int run_puzzle(struct set *set, const struct sentence *line, char *const *names,
                      lvm_error *error) {
    double *nll = mem_alloc((size_t)line->choices.n, sizeof *nll, error);
    int code = nll != NULL ? score_line(set, line, nll, error) : LVM_MEMORY;
    if (code == LVM_OK) {
        print_puzzle(set, line, names, nll);
        set->puzzles++;
        set->answered += line->answer >= 0;
        set->right += likeliest(nll, line->choices.n) == line->answer;
    }
    mem_free(nll);
    return code;
}

/* exp of the mean negative log-likelihood over all tokens of all targets. */
static int eval_targets(struct set *set, struct sentence *line, lvm_error *error) {
    int used = 0, code = prompt_line(set, line, line->target.n, &used, error);
    if (code != LVM_OK) return code;
    int n = line->target.n * set->s.model->T; /* no more than a window holds */
    int32_t *ids = mem_alloc((size_t)n, sizeof *ids, error);
    float *nll = mem_alloc((size_t)n, sizeof *nll, error);
    double sum = 0;
    if (ids == NULL || nll == NULL) code = LVM_MEMORY;
    if (code == LVM_OK)
        code = encode_set_images(set, line->target.list, line->target.n, ids, error);
    if (code == LVM_OK) code = lvm_score(set->s.ctx, ids, n, nll, error);
    for (int i = 0; code == LVM_OK && i < n; i++) sum += nll[i];
    if (code == LVM_OK) code = check_likelihood(sum, n, error);
    if (code == LVM_OK) {
        double perplexity = exp_f64(sum / n);
        set->perplexity += perplexity;
        hide_bar(&set->s.bar);
        printf(set->cli->json ? "{\"line\": %d, \"perplexity\": %.9g}\n"
                              : "%d: perplexity %.6f\n",
               set->lines.number, perplexity);
    }
    mem_free(ids);
    mem_free(nll);
    return code;
}

static int eval_line(struct set *set, struct sentence *line, lvm_error *error) {
    if (line->choices.n > 0) return run_puzzle(set, line, NULL, error);
    if (line->target.n == 0 && line->output != NULL) {
        int code = image_list_add(&line->target, line->output, NULL, error);
        line->output = NULL;
        if (code != LVM_OK) return code;
    }
    if (line->target.n == 0)
        return fail(error, LVM_FORMAT, "has neither \"target\" nor \"choices\"");
    return eval_targets(set, line, error);
}

static int rank_line(struct set *set, struct sentence *line, lvm_error *error) {
    int n = line->choices.n;
    if (n == 0) return fail(error, LVM_FORMAT, "has no \"choices\"");
    char **names = mem_alloc((size_t)n, sizeof *names, error);
    if (names == NULL) return LVM_MEMORY;
    for (int i = 0; i < n; i++) names[i] = line->choices.list[i].path;
    int code = run_puzzle(set, line, names, error);
    mem_free(names);
    return code;
}

static void print_eval_sums(const struct set *set) {
    int targets = set->good - set->puzzles;
    double mean = targets > 0 ? set->perplexity / targets : 0;
    if (set->cli->json) {
        printf("{\"lines\": %d, \"bad\": %d", set->good, set->bad);
        if (targets > 0) printf(", \"perplexity\": %.9g", mean);
        if (set->answered > 0) printf(", \"right\": %d, \"of\": %d", set->right, set->answered);
        printf("}\n");
        return;
    }
    if (targets > 0)
        printf("perplexity %.6f, the mean of %d line%s\n", mean, targets, targets > 1 ? "s" : "");
    if (set->answered > 0) printf("right answers: %d of %d\n", set->right, set->answered);
}

/* eval and rank of a set. */
static int score_set(struct cli *cli, const char *stage, line_fn *run) {
    lvm_error error = {0, ""};
    struct set set = {.cli = cli};
    int code = set_open(&set, cli, &error), status = finish(&error, code);
    if (code == LVM_OK) status = run_set(&set, stage, run);
    if (code == LVM_OK && set.good > 0) print_eval_sums(&set);
    set_close(&set);
    return status;
}

static int rank_set(struct cli *cli) {
    if (cli->cache != NULL)
        return complain("--cache goes with images, not with a set (lvm help rank)") + 1;
    return score_set(cli, "rank", rank_line);
}

/* Whether rank is given a set: one word behind the weights, and no image. */
static int names_set(const struct cli *cli) {
    return cli->n_words == 2 && cli->split < 0 && !is_folder(cli->words[1]) &&
           !has_extension(cli->words[1], image_endings);
}

static int run_rank(struct cli *cli) {
    if (names_set(cli)) return rank_set(cli);
    if (cli->base != NULL || cli->lines > 0)
        return complain("--base and --lines go with a set (lvm help rank)") + 1;
    if (cli->n_words < 3 || cli->split < 2 || cli->split == cli->n_words)
        return complain("give weights, images, -- and choices, or a set (lvm help rank)") + 1;
    lvm_error error = {0, ""};
    struct session s = {.model = NULL};
    struct paths prompt = {0}, choices = {0};
    int code = collect_paths(cli, &prompt, 1, cli->split, &error);
    if (code == LVM_OK) code = check_cache(cli, &(struct outputs){0}, &error);
    if (code == LVM_OK) code = collect_paths(cli, &choices, cli->split, cli->n_words, &error);
    if (code == LVM_OK) code = session_open(&s, cli, &error);
    if (code == LVM_OK) code = rank_choices(cli, &s, &prompt, &choices, &error);
    session_close(&s);
    paths_free(&prompt);
    paths_free(&choices);
    return finish(&error, code);
}

static int run_eval(struct cli *cli) {
    if (cli->n_words != 2) return complain("give weights and a set (lvm help eval)") + 1;
    return score_set(cli, "eval", eval_line);
}

/* ---- Batch: answers ---- */

/* "W,H" or "original"; 0, or a message and 2. */
static int parse_resize(const char *text, int *width, int *height) {
    char *end = NULL;
    *width = *height = 0;
    if (text == NULL || strcmp(text, "original") == 0) return 0;
    long w = strtol(text, &end, 10), h = *end == ',' ? strtol(end + 1, &end, 10) : 0;
    *width = (int)w;
    *height = (int)h;
    if (*end == 0 && w > 0 && h > 0 && w <= 1 << 15 && h <= 1 << 15) return 0;
    return complain("--resize: \"%s\" is neither W,H nor original", text) + 1;
}

/* The size of an answer: what --resize says, else R x R. */
static int answer_size(const struct set *set, const struct sentence *line, int *width, int *height,
                       lvm_error *error) {
    int R = set->s.model->vq->R, n = line->input.n;
    parse_resize(set->cli->resize, width, height);
    if (*width > 0) return LVM_OK;
    *width = *height = R;
    if (set->cli->resize == NULL || n == 0 || line->input.list[n - 1].path == NULL) return LVM_OK;
    lvm_image last = {.rgb = NULL};
    int code = load_set_image(set, &line->input.list[n - 1], &last, NULL, error);
    *width = last.width;
    *height = last.height;
    lvm_image_free(&last);
    return code;
}

/* An image of a line as the tokenizer sees it, or what its tokens decode to. */
static int load_square(const struct set *set, const struct image_ref *p, lvm_image *out,
                       lvm_error *error) {
    lvm_image image = {.rgb = NULL};
    if (p->ids != NULL) return lvm_decode(set->s.ctx, p->ids, 1, out, error);
    int code = load_set_image(set, p, &image, NULL, error);
    if (code == LVM_OK)
        code = fit_image(&image, set->s.model->vq->R, set->s.ctx->o.fit, out, error);
    lvm_image_free(&image);
    return code;
}

/* Candidates below each other, each a row of the inputs (with --grid) and the answers. */
static int compose_answers(struct set *set, const struct sentence *line, const lvm_image *inputs,
                           int n, const lvm_image *answers, lvm_image *out, lvm_error *error) {
    int rows = set->cli->candidates, columns = n + set->cli->images, width = 0, height = 0;
    int tiles = rows * columns, code = answer_size(set, line, &width, &height, error);
    lvm_image *resized = mem_alloc((size_t)tiles, sizeof *resized, error);
    if (resized == NULL) return LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < tiles; i++) {
        int row = i / columns, column = i % columns;
        const lvm_image *from =
            column < n ? &inputs[column] : &answers[row * set->cli->images + column - n];
        code = lvm_image_resize(from, width, height, &resized[i], error);
    }
    if (code == LVM_OK) code = compose(resized, tiles, columns, 0, NULL, out, error);
    free_images(resized, tiles);
    return code;
}

/* The sum of the squared differences of values in [0,1]. */
static double squared_differences(const lvm_image *a, const lvm_image *b) {
    size_t n = (size_t)a->width * (size_t)a->height * RGB;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (a->rgb[i] - b->rgb[i]) / 255.0;
        sum += d * d;
    }
    return sum;
}

/* mse[c] of each candidate, as the published program counts it: the mean of the squared differences
   of values in [0,1], times three channels, over the targets. Its number is the mean over the
   candidates. */
static int squared_errors(struct set *set, const struct sentence *line, const lvm_image *answers,
                          double *mse, lvm_error *error) {
    int R = set->s.model->vq->R, n = set->cli->images, code = LVM_OK;
    for (int c = 0; c < set->cli->candidates; c++) mse[c] = 0;
    for (int t = 0; code == LVM_OK && t < n; t++) {
        lvm_image truth = {.rgb = NULL};
        code = load_square(set, &line->target.list[t], &truth, error);
        for (int c = 0; code == LVM_OK && c < set->cli->candidates; c++)
            mse[c] += squared_differences(&answers[c * n + t], &truth) / ((double)R * R * n);
        lvm_image_free(&truth);
    }
    return code;
}

/* Why an output is none that could be written, or NULL. The file's own name is what stands behind
   the last separator; *stem becomes the length of what stands before its ending. */
static const char *output_fault(const char *output, size_t *stem) {
    const char *name = os_file_name(output), *dot = strrchr(name, '.');
    int leaves = os_root(output) > 0;
    *stem = dot != NULL ? (size_t)(dot - output) : strlen(output);
    for (const char *p = output; *p != 0; p++) {
        const char *end = p + strspn(p, ". "); /* Windows drops dots and blanks that end a name */
        leaves |= (p == output || os_is_separator(p[-1])) && strncmp(p, "..", 2) == 0 &&
                  (*end == 0 || os_is_separator(*end));
    }
    if (output[0] == 0) return "is empty; name a file below the output folder (-o)";
    if (leaves) return "must be a name below the output folder (-o)";
    if (*name == 0) return "names a folder; name a file below the output folder (-o)";
    if (output + *stem == name) return "has nothing in front of its ending; name a file below "
                                       "the output folder (-o)";
    if (dot == NULL || has_extension(name, "png|jpg|jpeg|jpe|jfif|webp|bmp|gif|tif|tiff"
                                           "|ppm|pgm|pnm"))
        return NULL;
    return "has an ending that is no image's; lvm writes PNG, so let it end in .png";
}

/* The name of a line's answer: below the output folder and nowhere else, without the parts that
   name no folder ("./a//b" is a/b), and with the ending .png. */
static char *batch_name(const struct set *set, const char *output, lvm_error *error) {
    size_t stem = 0, n = 0;
    const char *fault = output_fault(output, &stem);
    if (fault != NULL) {
        fail(error, LVM_INVALID, "output \"%s\" %s", output, fault);
        return NULL;
    }
    char *png = mem_alloc(strlen(output) + 8, 1, error);
    if (png == NULL) return NULL;
    for (size_t at = 0; at < stem;) {
        size_t part = 0;
        while (at + part < stem && !os_is_separator(output[at + part])) part++;
        int last = at + part == stem;
        if (last || (part > 0 && !(part == 1 && output[at] == '.'))) {
            memcpy(png + n, output + at, part);
            n += part;
            if (!last) png[n++] = '/';
        }
        at += part + 1;
    }
    int is_png = has_extension(output, "png");
    memcpy(png + n, is_png ? output + stem : ".png", 5);
    char *name = join_path(set->cli->out != NULL ? set->cli->out : "", png, error);
    mem_free(png);
    return name;
}

/* ---- Batch: outputs, which must differ ---- */

/* Adds a file that is written, whose name the list owns from now on, also after a failure, or one
   that is read (NULL, and path is looked at). */
static int destinations_add(struct destinations *o, char *name, const char *path, int line,
                       lvm_error *error) {
    struct destination *list = array_grow(o->list, (size_t)o->n, 1, sizeof *list, &o->room, error);
    char *way = list != NULL ? copy_string(path, error) : NULL;
    if (list != NULL) o->list = list;
    if (way == NULL) {
        mem_free(name);
        return LVM_MEMORY;
    }
    size_t root = os_root(path), end = strlen(path);
    struct os_info at = os_stat(path);
    while (at.kind == OS_NOTHING && end > root) { /* one part less */
        while (end > root && !os_is_separator(way[end - 1])) end--;
        while (end > root && os_is_separator(way[end - 1])) end--;
        way[end] = 0;
        at = os_stat(end > 0 ? way : ".");
    }
    mem_free(way);
    const char *rest = name != NULL ? name + end : "";
    while (os_is_separator(*rest)) rest++;
    o->list[o->n++] = (struct destination){at.device, at.number, name, rest, line};
    return LVM_OK;
}

/* By file, those that are written first, then by line. */
static int compare_outputs(const void *a, const void *b) {
    const struct destination *x = a, *y = b;
    if (x->device != y->device) return x->device < y->device ? -1 : 1;
    if (x->number != y->number) return x->number < y->number ? -1 : 1;
    int order = strcmp(x->rest, y->rest);
    if (order == 0) order = (x->name == NULL) - (y->name == NULL);
    return order != 0 ? order : x->line - y->line;
}

/* Finds the first line that would write what another line writes or reads. */
static int compare_lines(const struct set *set, struct destinations *o, lvm_error *error) {
    const struct destination *other = NULL, *found = NULL;
    if (o->n > 0) qsort(o->list, (size_t)o->n, sizeof *o->list, compare_outputs);
    for (int i = 1, first = 0; i < o->n; i++) {
        const struct destination *x = &o->list[first], *y = &o->list[i];
        if (x->device != y->device || x->number != y->number || strcmp(x->rest, y->rest) != 0)
            first = i;
        else if (x->name != NULL && (found == NULL || y->line < found->line))
            other = x, found = y;
    }
    if (found == NULL) return LVM_OK;
    if (found->name == NULL)
        return fail(error, LVM_INVALID, "%s: line %d would write %s, which is an input too (of "
                    "line %d); choose another output folder with -o", set->lines.name,
                    other->line, other->name, found->line);
    return fail(error, LVM_INVALID, "%s: lines %d and %d would write the same file: %s, %s",
                set->lines.name, other->line, found->line, other->name, found->name);
}

/* What one line will write. A name at fault is told when the line's turn comes. */
static int plan_write(struct set *set, const struct sentence *line, struct destinations *o,
                      lvm_error *error) {
    lvm_error fault;
    char *name = line->output != NULL ? batch_name(set, line->output, &fault) : NULL;
    return name != NULL ? destinations_add(o, name, name, set->lines.number, error) : LVM_OK;
}

/* What one line reads. */
static int plan_reads(struct set *set, const struct sentence *line, struct destinations *o,
                      lvm_error *error) {
    struct paths p = {0};
    int code = line_paths(set, line, &p, error);
    for (int i = 0; code == LVM_OK && i < p.n; i++)
        if (os_stat(p.path[i]).kind != OS_NOTHING)
            code = destinations_add(o, NULL, p.path[i], set->lines.number, error);
    paths_free(&p);
    return code;
}

/* Asks all lines of a file for what they write or read, and goes back to the first. */
static int plan_set(struct set *set, int reads, struct destinations *o, lvm_error *error) {
    int code = LVM_OK, more = 1;
    while (code == LVM_OK && (more = set_next(set, error)) > 0) {
        struct sentence line;
        lvm_error fault;
        if (set_parse(set, &line, &fault) == LVM_OK)
            code = reads ? plan_reads(set, &line, o, error) : plan_write(set, &line, o, error);
        sentence_free(&line);
    }
    if (code == LVM_OK && more < 0) code = error->code;
    return code == LVM_OK ? lines_rewind(&set->lines, error) : code;
}

/* Looks through a file before any work: no two lines may write one file, and none an image that the
   set reads. The latter takes an output that exists and will not stay as it is. */
static int check_set_outputs(struct set *set, lvm_error *error) {
    struct destinations all = {0};
    int replaces = 0, code = plan_set(set, 0, &all, error);
    for (int i = 0; i < all.n && !set->cli->skip_existing; i++) replaces |= *all.list[i].rest == 0;
    if (code == LVM_OK && replaces) code = plan_set(set, 1, &all, error);
    if (code == LVM_OK) code = compare_lines(set, &all, error);
    destinations_free(&all);
    return code;
}

/* Refuses what an earlier line of this run has written; links and spelling do not hide it. */
static int check_written(const struct set *set, const char *name, lvm_error *error) {
    struct os_info now = os_stat(name);
    for (int i = 0; now.kind != OS_NOTHING && i < set->written.n; i++) {
        const struct destination *w = &set->written.list[i];
        if (w->device == now.device && w->number == now.number && same_file(w->name, name))
            return fail(error, LVM_INVALID, "%s: is the output of line %d", name, w->line);
    }
    return LVM_OK;
}

/* An answer that an earlier run left. */
static int is_answer(const char *name) {
    return os_stat(name).kind == OS_FILE && begins_with(name, "\x89PNG");
}

/* Makes the folders in front of a file's name. */
static int make_folders(const char *name, lvm_error *error) {
    char *path = copy_string(name, error);
    if (path == NULL) return LVM_MEMORY;
    int code = LVM_OK;
    for (char *p = path + os_root(path); code == LVM_OK && *p != 0; p++) {
        char separator = *p;
        if (!os_is_separator(separator)) continue;
        *p = 0;
        if (!is_folder(path) && os_make_folder(path) != 0)
            code = fail(error, LVM_IO, "%s: cannot be made: %s", path, strerror(errno));
        *p = separator;
    }
    mem_free(path);
    return code;
}

/* Before the work on an answer: it may be written where it should go. */
static int ready_output(struct set *set, const struct sentence *line, const char *name,
                        lvm_error *error) {
    struct paths inputs = {0};
    int code = line_paths(set, line, &inputs, error);
    if (code == LVM_OK) code = check_output(set->cli, name, &inputs, error);
    if (code == LVM_OK) code = make_folders(name, error);
    paths_free(&inputs);
    return code;
}

static void print_answer_json(const struct set *set, const char *name, const double *mse,
                              double mean) {
    printf("{\"line\": %d, \"output\": ", set->lines.number);
    print_json_text(name);
    for (int c = 0; mse != NULL && c < set->cli->candidates; c++)
        printf("%s%.9g", c > 0 ? ", " : ", \"mse\": [", mse[c]);
    if (mse != NULL) printf("], \"mean_mse\": %.9g", mean);
    printf("}\n");
}

static void print_answer_text(const struct set *set, const char *name, const double *mse,
                              double mean) {
    print_name(name, "");
    if (mse == NULL) return;
    printf("%d: mean squared error %.6g", set->lines.number, mean);
    for (int c = 0; set->cli->candidates > 1 && c < set->cli->candidates; c++)
        printf("%s%.6g", c > 0 ? ", " : ", of the candidates ", mse[c]);
    printf("\n");
}

/* mse: of each candidate, or NULL. */
static void print_answer(struct set *set, const char *name, const double *mse) {
    int n = set->cli->candidates;
    double mean = 0;
    for (int c = 0; mse != NULL && c < n; c++) mean += mse[c] / n;
    set->errors += mse != NULL;
    set->error += mean;
    hide_bar(&set->s.bar);
    if (set->cli->json) print_answer_json(set, name, mse, mean);
    else print_answer_text(set, name, mse, mean);
}

/* With what decided its pixels, as predict writes it. */
static int save_answer(const struct set *set, const char *name, const lvm_image *image,
                       lvm_error *error) {
    char text[400], all[480];
    describe_run(set->cli, &set->s, text, sizeof text);
    if (set->cli->candidates * set->cli->images == 1)
        snprintf(all, sizeof all, "%s, candidate 1, image 1", text);
    else
        snprintf(all, sizeof all, "%s, %d candidates, %d images", text, set->cli->candidates,
                 set->cli->images);
    return image_save_text(name, image, all, error);
}

/* Writes and prints a line's answers; `used` images of its input counted. */
static int finish_answer(struct set *set, const struct sentence *line, const char *name, int used,
                         const lvm_image *answers, lvm_error *error) {
    const struct cli *cli = set->cli;
    int has_truth = line->target.n >= cli->images, shown = cli->grid ? used : 0, code = LVM_OK;
    double mse[MAX_SEQUENCES];
    lvm_image all = {.rgb = NULL};
    lvm_image *inputs = mem_alloc((size_t)shown + 1, sizeof *inputs, error);
    if (inputs == NULL) return LVM_MEMORY;
    if (has_truth) code = squared_errors(set, line, answers, mse, error);
    for (int i = 0; code == LVM_OK && i < shown; i++)
        code = load_square(set, &line->input.list[line->input.n - shown + i], &inputs[i], error);
    if (code == LVM_OK) code = compose_answers(set, line, inputs, shown, answers, &all, error);
    if (code == LVM_OK) code = save_answer(set, name, &all, error);
    if (code == LVM_OK) print_answer(set, name, has_truth ? mse : NULL);
    lvm_image_free(&all);
    free_images(inputs, shown);
    return code;
}

static int answer_line(struct set *set, const struct sentence *line, const char *name,
                       lvm_error *error) {
    const struct cli *cli = set->cli;
    int used = 0, n = cli->images * cli->candidates, code = prompt_line(set, line, 1, &used, error);
    if (code == LVM_OK) code = ready_output(set, line, name, error);
    lvm_image *answers = mem_alloc((size_t)n, sizeof *answers, error);
    if (answers == NULL) code = LVM_MEMORY;
    if (code == LVM_OK)
        code = lvm_generate_images(set->s.ctx, &cli->sampling, cli->candidates, cli->images,
                                   answers, error);
    if (code == LVM_OK) code = finish_answer(set, line, name, used, answers, error);
    free_images(answers, n);
    return code;
}

/* ---- Batch: lines that are answered together ----

   Each line is read as ever; then its keys and values become a sequence of their own, and it waits.
   When enough wait, or a line comes that does not, the tokens of all are generated as one batch,
   which reads the weights once, and the lines are finished in their order. What fails for a group
   is done again line by line, so that faults are those of lines. A line may read what one before it
   writes: what cannot be read is tried again when nothing waits any more. */

struct awaited {
    struct sentence line;
    char *name;
    int number, used, n_ids; /* n_ids: of the prompt */
    int32_t *ids;
};

/* Not of a stream, where the next line may wait for this one's answer; more memory is taken on the
   CPU only for who asks for it. */
static int group_open(struct set *set, lvm_error *error) {
    const lvm_ctx *ctx = set->s.ctx;
    struct together *g = &set->group;
    int asked = set->cli->together > 0 ? set->cli->together : ctx->b == &cpu_backend ? 1 : 8;
    g->most = (int)min64(asked, ctx->limits.sequences - 1);
    if (set->lines.size == 0 || set->cli->candidates > 1 || g->most < 2) g->most = 0;
    g->of = mem_alloc((size_t)g->most + 1, sizeof *g->of, error);
    g->logits = mem_alloc((size_t)g->most * (size_t)ctx->m->llama.V + 1, sizeof *g->logits, error);
    return g->of == NULL || g->logits == NULL ? LVM_MEMORY : LVM_OK;
}

/* Whether a line's answer fits its window: one that slides is on its own. */
static int may_join(const struct set *set, const struct sentence *line) {
    const lvm_model *m = set->s.model;
    int window = (int)min64(set->s.ctx->o.window, images_that_fit(m, m->llama.bos >= 0));
    return set->group.most > 0 &&
           min64(line->input.n, set->s.ctx->o.window - 1) + set->cli->images <= window;
}

/* Waiting line i becomes sequence i + 1. On success line and name are the group's. */
static int join_line(struct set *set, struct sentence *line, char *name, lvm_error *error) {
    lvm_ctx *ctx = set->s.ctx;
    struct together *g = &set->group;
    struct awaited a = {.name = name, .number = set->lines.number};
    size_t V = (size_t)ctx->m->llama.V;
    int code = prompt_line(set, line, 1, &a.used, error);
    if (code == LVM_OK) code = ready_output(set, line, name, error);
    if (code == LVM_OK) code = ctx->b->kv_copy(ctx->state, 0, g->n + 1, ctx->n_fed, error);
    a.n_ids = ctx->n_ids;
    a.ids = code == LVM_OK ? mem_alloc((size_t)a.n_ids, sizeof *a.ids, error) : NULL;
    if (a.ids == NULL) {
        ctx->b->kv_trim(ctx->state, g->n + 1, 0);
        return code != LVM_OK ? code : LVM_MEMORY;
    }
    memcpy(a.ids, ctx->ids, (size_t)a.n_ids * sizeof *a.ids);
    memcpy(g->logits + (size_t)g->n * V, ctx->logits, V * sizeof *g->logits);
    a.line = *line;
    memset(line, 0, sizeof *line);
    g->of[g->n++] = a;
    g->joined = 1;
    return LVM_OK;
}

/* Sequence 0 becomes the last line's and the context as if that had been prompted. */
static int prompt_as_last(const struct together *g, lvm_ctx *ctx, lvm_error *error) {
    const struct awaited *last = &g->of[g->n - 1];
    int code = ctx->b->kv_copy(ctx->state, g->n, 0, last->n_ids, error);
    ctx->b->kv_trim(ctx->state, g->n, 0);
    memcpy(ctx->ids, last->ids, (size_t)last->n_ids * sizeof *ctx->ids);
    ctx->n_ids = ctx->n_fed = code == LVM_OK ? last->n_ids : 0;
    ctx->has_logits = 0;
    ctx->n_generated = 0;
    return code;
}

/* The tokens of all that wait, ids[n][tokens]. Sequences are numbered from 0: line i, counted from
   0, has sequence i + 1, but the last one sequence 0. */
static int generate_together(struct set *set, int tokens, int32_t *ids, lvm_error *error) {
    lvm_ctx *ctx = set->s.ctx;
    struct together *g = &set->group;
    size_t V = (size_t)ctx->m->llama.V;
    struct rng rng[MAX_SEQUENCES];
    lvm_sampling s;
    int code = prompt_as_last(g, ctx, error);
    if (code == LVM_OK) code = settle_sampling(&set->cli->sampling, &s, error);
    int32_t *out = mem_alloc((size_t)g->n * (size_t)tokens, sizeof *out, error);
    if (out == NULL) return LVM_MEMORY;
    for (int i = 0; i < g->n; i++) {
        int at = (i + 1) % g->n;
        rng[at] = rng_new(s.seed, 0);
        memcpy(ctx->logits + (size_t)at * V, g->logits + (size_t)i * V, V * sizeof *g->logits);
    }
    struct continuation c = {&s, g->n, tokens, ctx->m->codes, ctx->logits, rng, out, tokens, 0,
                             tokens};
    if (code == LVM_OK) code = generate_tokens(ctx, &c, error);
    for (int i = 0; i < g->n; i++) {
        int at = (i + 1) % g->n;
        memcpy(ids + (size_t)i * (size_t)tokens, out + (size_t)at * (size_t)tokens,
               (size_t)tokens * sizeof *ids);
        ctx->b->kv_trim(ctx->state, at, at == 0 ? ctx->n_fed : 0);
    }
    mem_free(out);
    return code;
}

/* Line a, whose answers are there or (NULL) are made now. */
static int end_awaited(struct set *set, struct awaited *a, const lvm_image *answers) {
    lvm_error error = {0, ""};
    int number = set->lines.number;
    set->lines.number = a->number;
    int code = answers != NULL ? finish_answer(set, &a->line, a->name, a->used, answers, &error)
                               : answer_line(set, &a->line, a->name, &error);
    if (code == LVM_OK)
        code = destinations_add(&set->written, a->name, a->name, a->number, &error);
    else mem_free(a->name);
    int taken = end_line(set, code, &error);
    set->lines.number = number;
    sentence_free(&a->line);
    mem_free(a->ids);
    return taken;
}

static int answer_together(struct set *set) {
    struct together *g = &set->group;
    int n = g->n, images = set->cli->images, tokens = images * set->s.model->T, taken = 1;
    if (n == 0) return 1;
    int32_t *ids = mem_alloc((size_t)n * (size_t)tokens, sizeof *ids, NULL);
    lvm_image *answers = mem_alloc((size_t)n * (size_t)images, sizeof *answers, NULL);
    int code = ids != NULL && answers != NULL ? generate_together(set, tokens, ids, NULL)
                                              : LVM_MEMORY;
    if (code == LVM_OK) code = lvm_decode(set->s.ctx, ids, n * images, answers, NULL);
    for (int i = 0; i < n; i++) set->s.ctx->b->kv_trim(set->s.ctx->state, i + 1, 0);
    g->n = 0;
    for (int i = 0; i < n; i++)
        taken &= end_awaited(set, &g->of[i], code == LVM_OK ? answers + i * images : NULL);
    mem_free(ids);
    free_images(answers, n * images);
    return taken;
}

/* A line whose answer exists. */
static void skip_line(struct set *set, const char *name) {
    set->skipped++;
    if (!set->cli->json) return;
    hide_bar(&set->s.bar);
    printf("{\"line\": %d, \"output\": ", set->lines.number);
    print_json_text(name);
    printf(", \"skipped\": true}\n");
}

static int batch_line(struct set *set, struct sentence *line, lvm_error *error) {
    if (line->output == NULL) return fail(error, LVM_FORMAT, "has no \"output\" name");
    char *name = batch_name(set, line->output, error);
    int code = name != NULL ? check_written(set, name, error) : error->code;
    int joins = may_join(set, line), skips = 0;
    if (code == LVM_OK) skips = set->cli->skip_existing && is_answer(name);
    if (code == LVM_OK && (skips || !joins)) answer_together(set);
    if (code == LVM_OK && skips) skip_line(set, name);
    else if (code == LVM_OK && !joins) code = answer_line(set, line, name, error);
    else if (code == LVM_OK) {
        code = join_line(set, line, name, error);
        if (code != LVM_OK && set->group.n > 0) {
            answer_together(set);
            code = join_line(set, line, name, error);
        }
        if (code == LVM_OK) return code;
    }
    if (code == LVM_OK)
        return destinations_add(&set->written, name, name, set->lines.number, error);
    mem_free(name);
    return code;
}

static void print_batch_sums(const struct set *set) {
    double mean = set->errors > 0 ? set->error / set->errors : 0;
    if (set->cli->json) {
        printf("{\"lines\": %d, \"bad\": %d", set->good, set->bad);
        if (set->cli->skip_existing) printf(", \"skipped\": %d", set->skipped);
        if (set->errors > 0) printf(", \"mean_mse\": %.9g", mean);
        printf("}\n");
        return;
    }
    if (set->errors > 0)
        printf("mean squared error %.6g, the mean of %d line%s\n", mean, set->errors,
               set->errors > 1 ? "s" : "");
    if (set->skipped > 0)
        note(set->cli, "%s: %d line%s skipped, the output exists", set->lines.name, set->skipped,
             set->skipped > 1 ? "s" : "");
}

static int run_batch(struct cli *cli) {
    int width = 0, height = 0;
    if (cli->n_words != 2) return complain("give weights and a set (lvm help batch)") + 1;
    if (cli->out != NULL && (cli->out[0] == 0 || is_stream(cli->out)))
        return complain("-o \"%s\": batch writes files; name a folder", cli->out) + 1;
    if (parse_resize(cli->resize, &width, &height) != 0) return 2;
    lvm_error error = {0, ""};
    struct set set = {.cli = cli};
    int code = set_open(&set, cli, &error);
    if (code == LVM_OK) code = need_all(cli, &set.s, &error);
    if (code == LVM_OK && set.lines.size > 0) code = check_set_outputs(&set, &error);
    if (code == LVM_OK) code = group_open(&set, &error);
    int status = finish(&error, code);
    if (code == LVM_OK) status = run_set(&set, "batch", batch_line);
    if (code == LVM_OK && set.good > 0) print_batch_sums(&set);
    set_close(&set);
    return status;
}

/* ---- Weights files ---- */

static void print_key(const struct gguf *g, const char *key, const char *label) {
    struct text t = read_text(g, key);
    if (gguf_key(g, key) == NULL) return;
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
            if (begins(x->name, "vq.") != vq || x->type != type_table[i].type) continue;
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
           vq->no_mid_attn ? "" : " and in the middle", vq->z, vq->code_dim);
}

/* Names the tensors that the description asks for and the file lacks, and does without them;
   returns how many. */
static int print_missing(lvm_model *m) {
    int n = 0;
    for (int i = 0; i < m->n_specs; i++)
        if (!m->specs[i].optional && gguf_tensor(&m->file, m->specs[i].name) == NULL) {
            printf("%-13s %s\n", "missing", m->specs[i].name);
            m->specs[i].optional = 1;
            n++;
        }
    return n;
}

static void print_model(const lvm_model *m) {
    const struct gguf *g = &m->file;
    lvm_info i = lvm_model_info(m);
    printf("%-13s %s, %zu bytes\n", "file", m->path, g->size);
    print_key(g, "general.name", "name");
    print_key(g, "general.license", "license");
    print_key(g, "general.description", "description");
    printf("%-13s %.1f million\n", "parameters", (double)i.parameters / 1e6);
    if (m->vq != NULL) print_tokenizer(m->vq);
    else printf("tokenizer     none: tokens in, tokens out (convert.py --vqgan adds it)\n");
    print_types(g, 1);
    if (i.has_transformer)
        printf("transformer   %d layers, width %d, feed-forward %d, %d heads (%d key/value), "
               "vocabulary %d,\n"
               "              context %d tokens = %d images, rope %g, bos %d, eos %d%s\n",
               i.layers, i.width, i.feed_forward, i.heads, i.kv_heads, i.vocab_size,
               i.context_length, i.window_images, (double)m->llama.theta, i.bos, i.eos,
               i.bos < 0 ? " (none)" : "");
    else printf("transformer   none: encode and decode only (convert.py --llama adds it)\n");
    print_types(g, 0);
}

/* A file of adapters: of which rank, on which matrices. */
static int print_adapters(const struct cli *cli, const struct gguf *g, lvm_error *error) {
    struct adapters ad = {.n = 0};
    int code = adapters_parse(&ad, g->path, g->data, g->size, error), least = INT_MAX, most = 0;
    for (int i = 0; code == LVM_OK && i < ad.n; i++) {
        least = (int)min64(least, ad.list[i].a.rows);
        most = (int)max64(most, ad.list[i].a.rows);
    }
    if (code == LVM_OK) {
        printf("%-13s %s, %zu bytes\n", "file", g->path, g->size);
        print_key(g, "general.name", "name");
        printf("%-13s LoRA on %d matrices, rank %d", "adapters", ad.n, least);
        if (most > least) printf(" to %d", most);
        printf(", alpha %g; give a model --lora with them, or lvm merge\n", (double)ad.alpha);
        print_types(g, 0);
        if (cli->list) print_tensors(g);
    }
    adapters_close(&ad);
    return code;
}

/* A file that lacks tensors is shown too, with what it lacks. */
static int run_info(struct cli *cli) {
    if (cli->n_words != 1) return complain("give one weights file (lvm help info)") + 1;
    lvm_error error = {0, ""};
    lvm_model *m = model_new(cli->words[0], &error);
    int code = m == NULL ? error.code : load_file(m, cli->flags ? LVM_NO_MMAP : 0, &error);
    if (code != LVM_OK && m != NULL && is_adapter_file(&m->file)) {
        code = print_adapters(cli, &m->file, &error);
        lvm_close(m);
        return finish(&error, code);
    }
    int missing = code == LVM_OK ? print_missing(m) : 0;
    if (code == LVM_OK) code = load_tensors(m, &error);
    if (code == LVM_OK) print_model(m);
    if (code == LVM_OK && cli->list) print_tensors(&m->file);
    lvm_close(m);
    if (code == LVM_OK && missing > 0)
        return complain("%s: %d tensors are missing", cli->words[0], missing);
    return finish(&error, code);
}

static int run_quantize(struct cli *cli) {
    if (cli->n_words != 2) return complain("give an input and an output (lvm help quantize)") + 1;
    lvm_error error = {0, ""};
    const char *out = cli->words[1];
    if (strcmp(out, "-") == 0)
        return complain("-: quantize writes a file; /dev/stdout is standard output's name") + 1;
    int named = !is_stream(out), code = lvm_quantize(cli->words[0], out, cli->type, cli->vq_type,
                                                     cli->encoder_type, cli->force, &error);
    if (code == LVM_OK && named) print_name(out, "");
    return finish(&error, code);
}

/* ---- Token files (chapter 8) ---- */

/* Lines on their way into a .tok file. */
struct packing {
    int bos, eos;      /* dropped at the ends of a sentence; -1: none */
    int answers;       /* the loss is of the output alone */
    int image_tokens;  /* that lines name; -1: none so far */
    size_t divisor;    /* the greatest common one of the sentences' lengths */
    struct token_writer w;
};

enum { USUAL_IMAGE = 256, USUAL_BOS = 8192, USUAL_EOS = 8193 };

/* Notes what a line of n tokens says of its images, and refuses what contradicts it. */
static int pack_images(struct packing *p, const struct train_line *line, size_t n,
                       lvm_error *error) {
    int told = line->by[PART_IMAGE] != NULL ? line->image_tokens : p->image_tokens;
    if (p->image_tokens >= 0 && told != p->image_tokens)
        return fail(error, LVM_FORMAT, "\"image_tokens\" is %d, but %d in a line above", told,
                    p->image_tokens);
    if (told > 0 && n % (size_t)told != 0)
        return fail(error, LVM_FORMAT, "%zu tokens are no whole images of %d", n, told);
    p->image_tokens = told;
    while (n > 0) { /* Euclid */
        size_t rest = p->divisor % n;
        p->divisor = n;
        n = rest;
    }
    return LVM_OK;
}

/* Adds the sentence of a line without bos and eos. The weights of --loss answers stand in for those
   that a line does not have itself. */
static int pack_sentence(struct packing *p, struct train_line *line, lvm_error *error) {
    const struct buffer *all = &line->ids[PART_TOKENS];
    const int32_t *ids = (const int32_t *)(const void *)all->data;
    size_t n = all->n / sizeof *ids, inputs = line->ids[PART_INPUT].n / sizeof *ids;
    int own = line->by[PART_WEIGHTS] != NULL, code = LVM_OK;
    if (p->answers && !own && line->by[PART_OUTPUT] == NULL)
        return fail(error, LVM_FORMAT, "--loss answers takes lines with \"input_tokens\" and "
                    "\"output_tokens\", or \"weights\"");
    for (size_t i = 0; code == LVM_OK && p->answers && !own && i < n; i++)
        code = buffer_add(&line->weights, &(uint8_t){i < inputs ? 0 : WEIGHT_ONE}, 1, error);
    if (code != LVM_OK) return code;
    size_t first = n > 0 && ids[0] == p->bos, end = n - (n > first && ids[n - 1] == p->eos);
    for (size_t i = first; i < end; i++)
        if (ids[i] == p->bos || ids[i] == p->eos)
            return fail(error, LVM_FORMAT, "token %zu is %s (%d), which may only stand at an end",
                        i + 1, ids[i] == p->bos ? "bos" : "eos", ids[i]);
    if (end == first) return fail(error, LVM_FORMAT, "a sentence without tokens");
    code = pack_images(p, line, end - first, error);
    const uint8_t *weights = (const uint8_t *)line->weights.data;
    if (code != LVM_OK) return code;
    return token_writer_add(&p->w, ids + first, weights != NULL ? weights + first : NULL,
                            end - first, error);
}

static int pack_line(struct packing *p, const struct lines *l, lvm_error *error) {
    struct train_line line = {.image_tokens = 0};
    lvm_error fault = {0, ""};
    struct json j = {.s = l->text.data, .n = l->text.n, .error = &fault};
    int code = l->too_long ? fail(&fault, LVM_FORMAT, "is longer than %d bytes", LINE_BYTES)
                           : parse_train_line(&j, &line);
    if (code == LVM_OK) code = pack_sentence(p, &line, &fault);
    train_line_free(&line);
    if (code == LVM_OK) return LVM_OK;
    return fail(error, code, "%s: line %d: %s", l->name, l->number, fault.text);
}

/* All lines of a file or of standard input; bar may be NULL. */
static int pack_lines(struct packing *p, const char *path, struct bar *bar, lvm_error *error) {
    struct lines l = {.name = path};
    int code = lines_open(&l, path, error), more = 1;
    if (code == LVM_OK && begins_with(path, tok_magic))
        code = fail(error, LVM_INVALID, "%s: is a .tok file already", path);
    while (code == LVM_OK && (more = lines_next(&l, error)) > 0) {
        if (l.number == 1) code = check_encoding(&l, error);
        if (code == LVM_OK && !is_blank(&l.text)) code = pack_line(p, &l, error);
        if (bar != NULL && bar->shown && l.size > 0)
            draw_bar(bar, "pack", min64(l.done, l.size), l.size);
    }
    lines_close(&l);
    return more < 0 ? LVM_IO : code;
}

/* Ends what pack_lines filled. */
static int pack_close(struct packing *p, int code, lvm_error *error) {
    if (p->image_tokens < 0) p->image_tokens = p->divisor % USUAL_IMAGE == 0 ? USUAL_IMAGE : 0;
    p->w.image_tokens = (uint32_t)p->image_tokens;
    if (code == LVM_OK && p->w.n_sentences == 0)
        code = fail(error, LVM_FORMAT, "there are no lines to learn from");
    if (code == LVM_OK && p->image_tokens > 0 && p->divisor % (size_t)p->image_tokens != 0)
        code = fail(error, LVM_FORMAT, "\"image_tokens\" is %d, of which a sentence without that "
                    "key is no multiple", p->image_tokens);
    return token_writer_close(&p->w, code, error);
}

/* What lines hold, as lvm pack would write it, for training on them directly; answers: the loss is
   of outputs alone. NULL and an error on failure. */
static lvm_tokens *read_token_lines(const char *path, int answers, lvm_error *error) {
    struct packing p = {.bos = USUAL_BOS, .eos = USUAL_EOS, .answers = answers,
                        .image_tokens = -1};
    lvm_tokens *t = NULL;
    int code = token_writer_open(&p.w, NULL, error);
    if (code == LVM_OK) code = pack_lines(&p, path, NULL, error);
    code = pack_close(&p, code, error);
    if (code == LVM_OK) t = lvm_tokens_open_memory(p.w.memory.data, p.w.memory.n, path, error);
    if (t != NULL) t->owned = (uint8_t *)p.w.memory.data;
    else mem_free(p.w.memory.data);
    return t;
}

/* The value of --bos or --eos; 0, or a message and 2. */
static int special_id(const char *option, const char *value, int usual, int *id) {
    char *end = NULL;
    *id = value == NULL ? usual : -1;
    if (value == NULL || strcmp(value, "none") == 0) return 0;
    long v = strtol(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end != 0 || v >= INT32_MAX)
        return complain("%s: \"%s\" is no id and not none", option, value) + 1;
    *id = (int)v;
    return 0;
}

/* "1 sentence, 4096 tokens, 16 images" */
static void note_tokens(const struct cli *cli, const char *name, uint64_t sentences,
                        uint64_t tokens, uint64_t image_tokens) {
    char images[48] = "";
    if (image_tokens > 0)
        snprintf(images, sizeof images, ", %llu images of %llu",
                 (unsigned long long)(tokens / image_tokens), (unsigned long long)image_tokens);
    note(cli, "%s: %llu sentences, %llu tokens%s", name, (unsigned long long)sentences,
         (unsigned long long)tokens, images);
}

/* The one output of a command on token files, which is none of its inputs. */
static int add_token_output(struct outputs *o, const struct cli *cli, const char *name,
                            lvm_error *error) {
    struct paths inputs = {0};
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && i < cli->n_words; i++)
        if (strcmp(cli->words[i], "-") != 0) code = paths_add(&inputs, "", cli->words[i], error);
    if (code == LVM_OK) code = outputs_add(o, cli, copy_string(name, error), &inputs, error);
    paths_free(&inputs);
    return code;
}

static int run_pack(struct cli *cli) {
    struct packing p = {.answers = cli->loss, .image_tokens = -1};
    struct outputs o = {0};
    struct bar bar = {.shown = !cli->quiet && os_is_terminal(2)};
    lvm_error error = {0, ""};
    if (cli->n_words == 0 || cli->out == NULL)
        return complain("give lines to learn from, and -o OUT.tok (lvm help pack)") + 1;
    if (special_id("--bos", cli->bos, USUAL_BOS, &p.bos) != 0 ||
        special_id("--eos", cli->eos, USUAL_EOS, &p.eos) != 0)
        return 2;
    int code = add_token_output(&o, cli, cli->out, &error);
    if (code == LVM_OK) code = token_writer_open(&p.w, &o.list[0].file, &error);
    for (int i = 0; code == LVM_OK && i < cli->n_words; i++)
        code = pack_lines(&p, cli->words[i], &bar, &error);
    hide_bar(&bar);
    code = pack_close(&p, code, &error);
    if (code == LVM_OK) code = outputs_close(&o, 0, code, &error);
    if (code == LVM_OK)
        note_tokens(cli, is_stdout(cli->out) ? "standard output" : cli->out, p.w.n_sentences,
                    p.w.n_tokens, p.w.image_tokens);
    outputs_free(&o);
    return finish(&error, code);
}

/* Adds base64 of n bytes, in quotes. */
static int add_base64(struct buffer *text, const uint8_t *data, size_t n, lvm_error *error) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    int code = buffer_add(text, "\"", 1, error);
    for (size_t i = 0; code == LVM_OK && i < n; i += 3) {
        uint32_t bits = (uint32_t)data[i] << 16;
        if (i + 1 < n) bits |= (uint32_t)data[i + 1] << 8;
        if (i + 2 < n) bits |= data[i + 2];
        char out[4] = {digits[bits >> 18], digits[bits >> 12 & 63], digits[bits >> 6 & 63],
                       digits[bits & 63]};
        if (i + 1 >= n) out[2] = '=';
        if (i + 2 >= n) out[3] = '=';
        code = buffer_add(text, out, 4, error);
    }
    return code == LVM_OK ? buffer_add(text, "\"", 1, error) : code;
}

/* Adds [n, n, ...]: numbers of `size` bytes, 1 or 4. */
static int add_integers(struct buffer *text, const uint8_t *data, size_t n, size_t size,
                        lvm_error *error) {
    char number[16];
    int code = buffer_add(text, "[", 1, error);
    for (size_t i = 0; code == LVM_OK && i < n; i += size) {
        int32_t v = data[i];
        if (size > 1) memcpy(&v, data + i, sizeof v);
        int length = snprintf(number, sizeof number, i > 0 ? ", %d" : "%d", v);
        code = buffer_add(text, number, (size_t)length, error);
    }
    return code == LVM_OK ? buffer_add(text, "]", 1, error) : code;
}

static int add_numbers(struct buffer *text, int integers, const void *data, size_t n, size_t size,
                       lvm_error *error) {
    return integers ? add_integers(text, data, n, size, error) : add_base64(text, data, n, error);
}

/* A sentence as a line that parse_train_line reads: the text is replaced. */
static int sentence_text(const lvm_tokens *t, int64_t sentence, int integers, struct buffer *text,
                         lvm_error *error) {
    int64_t first = sentence_start(t, sentence), n = sentence_start(t, sentence + 1) - first;
    int32_t *ids = mem_alloc((size_t)n, sizeof *ids, error);
    char images[48];
    if (ids == NULL) return LVM_MEMORY;
    text->n = 0;
    int code = buffer_add(text, "{\"tokens\": ", 11, error);
    for (int64_t i = 0; code == LVM_OK && i < n; i++)
        if ((ids[i] = token_at(t, first + i)) >= t->bound) code = bad_token(t, sentence, i, error);
    if (code == LVM_OK)
        code = add_numbers(text, integers, ids, (size_t)n * sizeof *ids, sizeof *ids, error);
    if (code == LVM_OK && t->weights != NULL) code = buffer_add(text, ", \"weights\": ", 13, error);
    if (code == LVM_OK && t->weights != NULL)
        code = add_numbers(text, integers, t->weights + first, (size_t)n, 1, error);
    int length = snprintf(images, sizeof images, ", \"image_tokens\": %d", t->image_tokens);
    if (code == LVM_OK && t->image_tokens != USUAL_IMAGE)
        code = buffer_add(text, images, (size_t)length, error);
    mem_free(ids);
    return code == LVM_OK ? buffer_add(text, "}\n", 2, error) : code;
}

static int run_unpack(struct cli *cli) {
    const char *out = cli->out != NULL ? cli->out : "-";
    struct outputs o = {0};
    struct bar bar = {.shown = !cli->quiet && os_is_terminal(2) && !is_stdout(out)};
    struct buffer text = {0};
    lvm_error error = {0, ""};
    if (cli->n_words != 1) return complain("give one .tok file (lvm help unpack)") + 1;
    lvm_tokens *t = lvm_tokens_open(cli->words[0], &error);
    int code = t == NULL ? error.code : LVM_OK;
    if (code == LVM_OK) code = add_token_output(&o, cli, out, &error);
    for (int64_t i = 0; code == LVM_OK && i < t->n_sentences; i++) {
        code = sentence_text(t, i, cli->integers, &text, &error);
        if (code == LVM_OK)
            code = outfile_write(&o.list[0].file, text.data, text.n, &error);
        if (bar.shown) draw_bar(&bar, "unpack", i + 1, t->n_sentences);
    }
    hide_bar(&bar);
    if (code == LVM_OK) code = outputs_close(&o, 0, code, &error);
    if (code == LVM_OK && !is_stdout(out))
        note_tokens(cli, out, (uint64_t)t->n_sentences, (uint64_t)t->n_tokens,
                    (uint64_t)t->image_tokens);
    mem_free(text.data);
    outputs_free(&o);
    lvm_tokens_close(t);
    return finish(&error, code);
}

static int run_merge(struct cli *cli) {
    if (cli->n_words != 2 || cli->out == NULL)
        return complain("give weights, adapters and -o OUT (lvm help merge)") + 1;
    lvm_error error = {0, ""};
    if (strcmp(cli->out, "-") == 0)
        return complain("-: merge writes a file; /dev/stdout is standard output's name") + 1;
    int named = !is_stream(cli->out), code = lvm_merge(cli->words[0], cli->words[1], cli->out,
                                                       cli->type, cli->force, &error);
    if (code == LVM_OK && named) print_name(cli->out, "");
    return finish(&error, code);
}

/* ---- Bench ----

   What a model costs on this machine, stage by stage, beside the ceilings that are measured in the
   same process: products of floats (the tokenizer, attention), integer products (quantised linear
   layers), and reading memory (decoding, where every weight and every cached key and value is read
   once a token). A GPU's are products in f16, or in f32 where weights are F32 or --exact is given,
   and copying memory. Products of bfloat16 are measured where there are such, for who wants to
   compare; no stage uses them. The time that a stage would take at the ceiling is its floor; the
   last column is floor / time. Convolutions count as direct ones. */

/* Transformers, in the order of bench_shapes. */
static const struct shape {
    int L, D, F, H;
} shape_table[] = {{22, 640, 1664, 10},  {22, 1024, 2688, 8},  {22, 1536, 4096, 16},
                   {22, 2048, 5504, 16}, {26, 3200, 8640, 32}, {32, 4096, 11008, 32}};

/* The published checkpoint's tokenizer and the one that ships with lvm. */
static const struct vqgan published_vq = {.R = 256, .S = 16, .n_levels = 5, .n_res_blocks = 2,
    .hidden = 128, .z = 64, .codes = 8192, .code_dim = 64, .mult = {1, 2, 2, 4, 6},
    .no_mid_attn = 1, .resample_conv = 1};
static const struct vqgan shipped_vq = {.R = 256, .S = 16, .n_levels = 5, .n_res_blocks = 2,
    .hidden = 64, .z = 64, .codes = 8192, .code_dim = 64, .mult = {1, 1, 2, 2, 4}, .attn_at = {16},
    .n_attn_at = 1, .resample_conv = 1};

struct bench {
    const struct cli *cli;
    lvm_model *m;
    lvm_ctx *ctx;
    struct pool *pool;              /* for the ceilings, as many threads as the context's */
    double fma, integer, bandwidth; /* ceilings: operations and bytes a second, all threads */
    struct ceilings device;         /* of another device than the CPU */
    int shown;                      /* stages so far */
    double took[5];                 /* seconds of each of bench_stages */
};

static int on_cpu(const struct bench *b) { return b->ctx->b == &cpu_backend; }

struct peak_job {
    void (*run)(int64_t rounds);
    int64_t rounds;
    const uint64_t *data;
    int64_t words; /* of each task */
    uint64_t sink[1024];
};

static void peak_task(void *arg, int task, int thread) {
    struct peak_job *job = arg;
    (void)task, (void)thread;
    job->run(job->rounds);
}

/* Operations a second of all threads: the best of five runs of some ten milliseconds. */
static double measure_peak(const struct bench *b, void (*run)(int64_t), int64_t ops) {
    struct peak_job job = {.run = run, .rounds = 1 << 23};
    double best = 0;
    for (int i = 0; i < 5; i++) {
        double start = seconds();
        pool_run(b->pool, pool_threads(b->pool), peak_task, &job);
        double rate = (double)ops * (double)job.rounds * pool_threads(b->pool) /
                      (seconds() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

static void read_task(void *arg, int task, int thread) {
    struct peak_job *job = arg;
    const uint64_t *p = job->data + task * job->words;
    uint64_t sum[8] = {0};
    (void)thread;
    for (int64_t i = 0; i + 8 <= job->words; i += 8) {
        __builtin_prefetch(p + i + 1024); /* 8 KiB, as the products do */
        for (int j = 0; j < 8; j++) sum[j] += p[i + j];
    }
    for (int j = 0; j < 8; j++) job->sink[task & 1023] += sum[j];
}

/* Bytes a second that all threads read together from memory that fits no cache: the median of
   five. */
static double measure_bandwidth(const struct bench *b) {
    enum { TASKS = 64, WORDS = 1 << 20 }; /* 512 MiB */
    struct peak_job job = {.words = WORDS};
    if (!on_cpu(b)) return b->bandwidth;
    uint64_t *data = mem_alloc(TASKS * (size_t)WORDS, sizeof *data, NULL);
    double rate[5] = {0};
    if (data == NULL) return 0;
    memset(data, 1, TASKS * (size_t)WORDS * sizeof *data);
    job.data = data;
    for (int i = 0; i < 5; i++) {
        double start = seconds();
        pool_run(b->pool, TASKS, read_task, &job);
        rate[i] = TASKS * 8.0 * WORDS / (seconds() - start);
        for (int j = i; j > 0 && rate[j] < rate[j - 1]; j--) {
            double swap = rate[j];
            rate[j] = rate[j - 1];
            rate[j - 1] = swap;
        }
    }
    mem_free(data);
    return rate[2];
}

/* ---- What a stage has to do ---- */

/* The ceiling of products with weights of this type; on the CPU integers are left to the caller. */
static double product_peak(const struct bench *b, int type) {
    double peak = type == LVM_F32 || b->ctx->o.exact ? b->device.f32 : b->device.f16;
    return on_cpu(b) ? b->fma : peak > 0 ? peak : HUGE_VAL;
}

/* Multiplications and additions of an operation of the tokenizer, convolutions counted as
   direct. */
static double op_cost(const struct vq_op *op) {
    double pixels = (double)op->side_out * op->side_out, cost = 0;
    for (int i = 0; i < 4; i++) cost += 2 * pixels * op->conv[i].w.rows * op->conv[i].w.cols;
    return op->kind == VQ_ATTENTION ? cost + 4 * pixels * pixels * op->c_in : cost;
}

/* Values and bytes of the transformer's matrices; the embedding only where it is the output too. */
static void matrix_sizes(const lvm_model *m, double *values, double *bytes) {
    *values = *bytes = 0;
    for (int i = 0; i < m->n_specs; i++) {
        const struct tensor *t = m->specs[i].tensor;
        if (m->specs[i].kind != T_MATRIX && t != &m->llama.output) continue;
        *values += (double)t->rows * t->cols;
        *bytes += (double)t->rows * (double)t->row_bytes;
    }
}

static double cache_bytes(const struct bench *b, double tokens) {
    return tokens * (double)b->ctx->b->kv_size(b->ctx->state) / b->ctx->limits.kv_block;
}

/* ---- Stages ---- */

/* One line: units done in `took` seconds, and the floor's. */
static void print_stage(struct bench *b, const char *name, double units, const char *unit,
                        double took, double floor, double amount, const char *amount_unit) {
    hide_bar(b->cli->options.user);
    if (b->cli->json) {
        printf("{\"stage\": \"%s\", \"seconds\": %.6g, \"rate\": %.6g, \"unit\": \"%s/s\", "
               "\"amount\": %.6g, \"amount_unit\": \"%s/s\", \"floor_seconds\": %.6g}\n",
               name, took, units / took, unit, amount / took / 1e9, amount_unit, floor);
    } else {
        if (b->shown == 0)
            printf("%-11s %10s %20s %18s %10s %6s\n", "stage", "time", "rate", "", "floor", "");
        printf("%-11s %8.3f s %11.2f %s/s %*.1f %s/s %8.3f s %4.0f %%\n", name, took, units / took,
               unit, (int)(20 - strlen(unit) - strlen(amount_unit)), amount / took / 1e9,
               amount_unit, floor, 100 * floor / took);
    }
    b->shown++;
    b->took[word_index(bench_stages, name)] = took;
    fflush(stdout);
}

static int wanted(const struct bench *b, const char *stage) {
    return b->cli->stage < 0 || word_index(bench_stages, stage) == b->cli->stage;
}

/* Seconds an image of the fastest of three runs, or of one that takes longer than two; as many
   images as the device takes at once. */
static int time_vq(struct bench *b, int encode, double *best, lvm_error *error) {
    const struct vqgan *vq = b->m->vq;
    int n = b->ctx->limits.images, T = n * b->m->T, size = n * vq->R * vq->R * 3;
    int32_t *ids = mem_alloc((size_t)T, sizeof *ids, error);
    uint8_t *rgb = mem_alloc((size_t)size, 1, error);
    int code = ids == NULL || rgb == NULL ? LVM_MEMORY : LVM_OK;
    for (int t = 0; code == LVM_OK && t < T; t++) ids[t] = t * 37 % vq->codes;
    for (int i = 0; code == LVM_OK && i < size; i++) rgb[i] = (uint8_t)(i % 255);
    *best = HUGE_VAL;
    for (int run = 0; code == LVM_OK && run < 3; run++) {
        double start = seconds();
        code = encode ? b->ctx->b->encode(b->ctx->state, rgb, n, 0, n, ids, NULL, error)
                      : b->ctx->b->decode(b->ctx->state, ids, n, 0, n, rgb, NULL, error);
        double took = (seconds() - start) / n;
        *best = took < *best ? took : *best;
        if (took > 2 && run > 0) break;
    }
    mem_free(ids);
    mem_free(rgb);
    return code;
}

static int bench_vq(struct bench *b, int encode, lvm_error *error) {
    const struct vqgan *vq = b->m->vq;
    double took = 0, ops = 0;
    for (int i = encode ? 0 : vq->n_encoder; i < (encode ? vq->n_encoder : vq->n_ops); i++)
        ops += op_cost(&vq->ops[i]);
    int code = time_vq(b, encode, &took, error);
    if (code == LVM_OK)
        print_stage(b, encode ? "encode" : "decode", 1, "images", took,
                    ops / product_peak(b, vq->ops[0].conv[0].w.type), ops, "GFLOP");
    return code;
}

static int bench_prefill(struct bench *b, lvm_error *error) {
    const struct llama *a = &b->m->llama;
    int n = b->cli->prompt, code = LVM_OK;
    double values = 0, bytes = 0;
    matrix_sizes(b->m, &values, &bytes);
    /* Only the last token needs what lies behind the last layer's keys and values. */
    const struct layer *l = &a->layers[a->L - 1];
    const struct tensor *once[] = {&a->output, &l->q, &l->o, &l->gate, &l->up, &l->down};
    for (size_t i = 0; i < sizeof once / sizeof *once; i++)
        values -= (double)once[i]->rows * once[i]->cols;
    int32_t *ids = mem_alloc((size_t)n, sizeof *ids, error);
    if (ids == NULL) return LVM_MEMORY;
    for (int i = 0; i < n; i++) ids[i] = (int32_t)((int64_t)i * 7919 % b->m->codes);
    double start = seconds(), took = HUGE_VAL;
    for (int run = on_cpu(b) ? 2 : 0; code == LVM_OK && run < 3; run++, start = seconds()) {
        ctx_reset(b->ctx);
        code = lvm_prompt(b->ctx, ids, n, NULL, error);
        took = seconds() - start < took ? seconds() - start : took;
    }
    double products = 2 * values * n;
    /* four of each pair of query and key, half of the pairs: */
    double attention = 2.0 * n * n * a->H * a->d * (a->L - 1);
    int type = a->layers[0].q.type, integer = type_is_quantised(type) && !b->ctx->o.exact;
    double floor = products / (integer ? b->integer : b->fma); /* a q8_0 cache: see k8_scores */
    floor += b->ctx->o.kv_type == LVM_Q8_0 ? 2 * attention / b->integer : attention / b->fma;
    if (!on_cpu(b)) floor = (products + attention) / product_peak(b, type);
    mem_free(ids);
    if (code == LVM_OK && wanted(b, "prefill"))
        print_stage(b, "prefill", n, "tokens", took, floor, products + attention, "GOP");
    return code;
}

/* The prompt stays as it is: a failure or a cancel forgets it. */
static int bench_generate(struct bench *b, const char *name, int candidates, lvm_error *error) {
    int n = b->cli->new_tokens, prompt = b->cli->prompt;
    double values = 0, bytes = 0;
    int32_t *ids = mem_alloc((size_t)candidates * (size_t)n, sizeof *ids, error);
    int32_t *all = mem_alloc((size_t)prompt, sizeof *all, error);
    int code = ids == NULL || all == NULL ? LVM_MEMORY : LVM_OK;
    if (code == LVM_OK) memcpy(all, b->ctx->ids, (size_t)prompt * sizeof *all);
    if (code == LVM_OK && !on_cpu(b)) { /* once before, so that all is loaded */
        code = lvm_generate(b->ctx, &b->cli->sampling, candidates, n, ids, error);
        if (code == LVM_OK) code = lvm_prompt(b->ctx, all, prompt, NULL, error);
    }
    double before = measure_bandwidth(b), start = seconds();
    if (code == LVM_OK)
        code = lvm_generate(b->ctx, &b->cli->sampling, candidates, n, ids, error);
    double took = seconds() - start, after = measure_bandwidth(b);
    matrix_sizes(b->m, &values, &bytes);
    double depth = prompt + n / 2.0;
    double read = n * (bytes + cache_bytes(b, depth) +
                       (candidates - 1) * cache_bytes(b, depth - prompt));
    if (code == LVM_OK)
        print_stage(b, name, (double)n * candidates, "tokens", took,
                    read / ((before + after) / 2), read, "GB");
    if (code == LVM_OK) code = lvm_prompt(b->ctx, all, prompt, NULL, error);
    mem_free(ids);
    mem_free(all);
    return code;
}

static int run_stages(struct bench *b, lvm_error *error) {
    int code = LVM_OK, has_vq = b->m->vq != NULL, has_lm = b->m->llama.L > 0;
    int decodes = wanted(b, "generate") || wanted(b, "candidates");
    if (has_vq && wanted(b, "encode")) code = bench_vq(b, 1, error);
    if (code == LVM_OK && has_lm && (decodes || wanted(b, "prefill")))
        code = bench_prefill(b, error);
    if (code == LVM_OK && has_lm && wanted(b, "generate"))
        code = bench_generate(b, "generate", 1, error);
    if (code == LVM_OK && has_lm && wanted(b, "candidates"))
        code = bench_generate(b, "candidates", 4, error);
    if (code == LVM_OK && has_vq && wanted(b, "decode")) code = bench_vq(b, 0, error);
    return code;
}

/* Bytes of all tensors in their types. */
static double weights_bytes(const lvm_model *m) {
    double bytes = 0;
    for (int64_t i = 0; i < m->file.n_tensors; i++) bytes += (double)m->file.tensors[i].bytes;
    return bytes;
}

/* What it all comes to: the file, memory with the cache behind the last new token (resident: the
   whole process, activations and scratch too, where the system tells), and one image behind a
   prompt of images that are all new: encode, prefill, generate, decode. */
static void print_sums(const struct bench *b) {
    double file = (double)b->m->file.size, weights = weights_bytes(b->m), cache = 0;
    int T = b->m->T, images = 0, json = b->cli->json;
    double resident = (double)os_resident(), answer = 0, unit = json ? 1 : 1e6;
    if (b->m->llama.L > 0) cache = cache_bytes(b, b->cli->prompt + b->cli->new_tokens);
    if (b->m->llama.L > 0 && b->m->vq != NULL) {
        images = (b->cli->prompt + T - 1) / T;
        answer = images * b->took[0] + b->took[1] + b->took[2] * T / b->cli->new_tokens +
                 b->took[4];
    }
    printf(json ? "{" : "\n");
    if (images > 0)
        printf(json ? "\"prompt_images\": %d, \"answer_seconds\": %.6g, "
                    : "answer to %d images %.2f s; ", images, answer);
    if (resident > 0)
        printf(json ? "\"resident_bytes\": %.0f, " : "memory %.1f MB, of it ", resident / unit);
    printf(json ? "\"weights_bytes\": %.0f, \"cache_bytes\": %.0f, \"file_bytes\": %.0f}\n"
                : "weights %.1f MB, cache %.1f MB; file %.1f MB\n",
           weights / unit, cache / unit, file / unit);
}

/* Another device's ceilings; where they are unknown its stages have no floors. */
static void print_device_ceilings(struct bench *b) {
    struct ceilings *d = &b->device;
    lvm_error error = {0, "unknown"};
    int json = b->cli->json;
    if (b->ctx->b->ceilings == NULL ||
        b->ctx->b->ceilings(b->ctx->state, d, &error) != LVM_OK) {
        *d = (struct ceilings){0};
        if (!json) printf("%s; ceilings: %s, so that floors are 0\n\n", b->ctx->device, error.text);
    }
    if (d->copy > 0) b->bandwidth = d->copy;
    if (json)
        printf("{\"device\": \"%s\", \"f16_gflops\": %.4g, \"f32_gflops\": %.4g, "
               "\"copy_gbs\": %.4g, \"read_gbs\": %.4g, \"upload_gbs\": %.4g}\n",
               b->ctx->device, d->f16 / 1e9, d->f32 / 1e9, d->copy / 1e9, d->read / 1e9,
               d->upload / 1e9);
    else if (d->copy > 0)
        printf("%s; ceilings: %.0f TFLOP/s in f16%s, %.1f in f32; GB/s: %.0f copied (read and "
               "written), %.0f read, %.1f from the host\n\n",
               b->ctx->device, d->f16 / 1e12, d->f16 > 0 ? "" : " (no cuBLAS to ask)",
               d->f32 / 1e12, d->copy / 1e9, d->read / 1e9, d->upload / 1e9);
}

static void print_ceilings(struct bench *b) {
    const struct peak *p = find_peak(b->m->kern->name);
    char bf16[32] = "";
    b->fma = b->integer = b->bandwidth = HUGE_VAL;
    if (!on_cpu(b)) {
        print_device_ceilings(b);
        return;
    }
    b->fma = measure_peak(b, p->fma, p->fma_ops);
    b->integer = measure_peak(b, p->integer, p->integer_ops);
    if (p->bf16 != NULL && has_bf16())
        snprintf(bf16, sizeof bf16, b->cli->json ? "\"bf16_gflops\": %.4g, " : "%.0f in bfloat16, ",
                 measure_peak(b, p->bf16, p->bf16_ops) / 1e9);
    b->bandwidth = measure_bandwidth(b);
    printf(b->cli->json ? "{\"kernels\": \"%s\", \"threads\": %d, \"gflops\": %.4g, %s"
                          "\"integer_gops\": %.4g, \"read_gbs\": %.4g}\n"
                        : "%s, %d threads; ceilings: %.0f GFLOP/s, %s%.0f integer GOP/s, %.1f GB/s "
                          "read\n\n",
           b->m->kern->name, b->ctx->o.threads, b->fma / 1e9, bf16, b->integer / 1e9,
           b->bandwidth / 1e9);
}

/* The model that --config and --vq ask for. */
static lvm_model *bench_model(const struct cli *cli, lvm_error *error) {
    const struct shape *s = &shape_table[cli->config < 0 ? 0 : cli->config];
    struct llama a = {.context = 16 * 256 + 256, .bos = -1, .eos = -1, .V = 8292, .eps = 1e-6f,
                      .theta = 10000, .L = s->L, .D = s->D, .F = s->F, .H = s->H, .G = s->H,
                      .d = s->D / s->H};
    int type = cli->type == LVM_AUTO ? LVM_Q8_0 : cli->type;
    const struct wanted_types wanted = {type, type_is_quantised(type) ? LVM_F16 : type, LVM_AUTO};
    return random_model(cli->config < 0 ? NULL : &a, cli->vq == 1 ? &shipped_vq : &published_vq,
                        &wanted, error);
}

static int run_bench(struct cli *cli) {
    lvm_error error = {0, ""};
    struct bench b = {.cli = cli};
    struct bar bar = {.shown = !cli->quiet && os_is_terminal(2)};
    if (cli->n_words > 1 || (cli->n_words == 1) == (cli->config >= 0 || cli->vq >= 0))
        return complain("give a weights file, or --config and --vq (lvm help bench)") + 1;
    b.m = cli->n_words == 1 ? lvm_open(cli->words[0], 0, &error) : bench_model(cli, &error);
    cli->options.user = &bar;
    cli->options.progress = on_progress;
    if (b.m != NULL) b.ctx = lvm_ctx_new(b.m, &cli->options, &error);
    tell_device(b.ctx, cli->quiet);
    if (b.ctx != NULL) b.pool = pool_new(b.ctx->o.threads, &error);
    int code = b.pool != NULL ? LVM_OK : error.code;
    if (code == LVM_OK && b.m->llama.L > 0 &&
        cli->prompt + cli->new_tokens > b.m->llama.context + 1)
        code = fail(&error, LVM_INVALID, "a prompt of %d and %d new tokens: the context holds %d",
                    cli->prompt, cli->new_tokens, b.m->llama.context + 1);
    if (code == LVM_OK) print_ceilings(&b);
    if (code == LVM_OK) code = run_stages(&b, &error);
    if (code == LVM_OK && cli->stage < 0) print_sums(&b);
    pool_free(b.pool);
    lvm_ctx_free(b.ctx);
    lvm_close(b.m);
    return finish(&error, code);
}

/* ---- The program ---- */

/* The exit status once everything is said: what was printed must have arrived. */
static int flush_output(int status) {
    int bad = fflush(stdout) != 0 || ferror(stdout);
    return status == 0 && bad ? complain("standard output: cannot be written") : status;
}

#ifndef LVM_COMMIT
#define LVM_COMMIT "" /* the Makefile knows it where the source lies in git */
#endif

static void compiler_name(char *text, size_t room) {
#ifdef __clang__
    snprintf(text, room, "clang %d.%d.%d", __clang_major__, __clang_minor__, __clang_patchlevel__);
#elif defined(__GNUC__)
    snprintf(text, room, "gcc %d.%d.%d", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#else
    snprintf(text, room, "unknown compiler");
#endif
}

static int print_version(void) {
    char compiler[64];
    lvm_error error = {0, ""};
    const struct kernels *k = choose_kernels(&error);
    if (k == NULL) return complain("%s", error.text);
    compiler_name(compiler, sizeof compiler);
    printf("lvm %s (%s%s%s, %s, %d processors)\n", LVM_VERSION, LVM_COMMIT,
           LVM_COMMIT[0] != 0 ? ", " : "", compiler, k->name, processors());
    return 0;
}

static int run_version(struct cli *cli) {
    return cli->n_words > 0 ? complain("version: takes no words") + 1 : print_version();
}

static int is_weights(const char *path) {
    return os_stat(path).kind == OS_FILE && begins_with(path, "GGUF");
}

/* Refuses weights that do not come first; 0, or a message and 2. */
static int check_order(const struct cli *cli, const struct command *c) {
    if ((c->bit & RUNS) == 0 || cli->n_words < 2 || is_weights(cli->words[0])) return 0;
    for (int i = 1; i < cli->n_words; i++)
        if (is_weights(cli->words[i]))
            return complain("%s: the weights come first, before %s: lvm %s", cli->words[i],
                            cli->words[0], c->usage) + 1;
    return 0;
}

/* Parses twice: a preset comes before every other option, wherever it stands. */
static int run_command(struct cli *cli, const struct command *c, int argc, char **argv) {
    static const char *const presets[] = {"lvm", "delvm"};
    struct cli probe = *cli;
    int status = parse_arguments(&probe, c, argc, argv);
    if (status != 0) return status;
    if (probe.preset >= 0) lvm_sampling_preset(presets[probe.preset], &cli->sampling, NULL);
    parse_arguments(cli, c, argc, argv);
    status = check_order(cli, c);
    return status != 0 ? status : c->run(cli);
}

/* 1 for a first word that is meant as a command: no file, and no name or path of one. */
static int meant_as_command(const char *word) {
    return word[0] != 0 && strpbrk(word, "./\\") == NULL && os_stat(word).kind == OS_NOTHING;
}

/* Takes the command out of argv; predict where none is named, NULL and a message where one is that
   does not exist. */
static const struct command *take_command(int *argc, char **argv) {
    int at = first_word(*argc, argv);
    const struct command *c = at > 0 ? find_command(argv[at]) : NULL;
    if (at > 0 && c == NULL && meant_as_command(argv[at])) return no_command(argv[at]), NULL;
    if (c == NULL) return &command_table[0];
    memmove(argv + at, argv + at + 1, (size_t)(*argc - at) * sizeof *argv);
    --*argc;
    return c;
}

int main(int argc, char **argv) {
    if (os_begin(&argc, &argv) != 0) return complain("%s", strerror(errno));
    if (argc < 2) {
        print_help(stderr, NULL);
        return 2;
    }
    int all = argc;
    const struct command *c = take_command(&argc, argv);
    if (c == NULL) return 2;
    if (asks_for("-V", "--version", argc, argv)) return flush_output(print_version());
    if (asks_for("-h", "--help", argc, argv))
        return flush_output(print_help(stdout, argc < all ? c : NULL));
    struct cli cli = {.images = 1, .candidates = 1, .type = LVM_AUTO, .vq_type = LVM_AUTO,
                      .encoder_type = LVM_AUTO, .split = -1, .preset = -1, .config = -1, .vq = -1,
                      .stage = -1, .prompt = 3840, .new_tokens = 256};
    cli.sampling = lvm_default_sampling();
    cli.options = lvm_default_options();
    cli.words = calloc((size_t)argc, sizeof *cli.words);
    if (cli.words == NULL) return complain("out of memory");
    watch_signals();
    int status = run_command(&cli, c, argc, argv);
    free(cli.words);
    return flush_output(status);
}

#endif /* LVM_NO_MAIN */
#endif /* LVM_INTERNAL */
#endif /* LVM_API_ONLY */
