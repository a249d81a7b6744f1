/* lvm_cuda.cu - lvm's tokenizer and transformer on one NVIDIA GPU, behind the seam of lvm.c.

   `make cuda` compiles it with nvcc and links it to lvm.c, which finds it by one function,
   lvm_cuda_backend (at the end). It needs the CUDA toolkit to be built and nothing but a driver to
   run: the runtime is linked in, and where there is no driver the program starts all the same.

   CONTENTS
     1  Errors, launches, memory: every call and every launch is checked
     2  Weights on the device: planes of integers and of scales, tiles of 8 rows; their upload
     3  Products in f16: one order of sums; activations, RMSNorm, barriers, tensor cores
     4  GEMV: a few rows, weights streamed through rings in shared memory
     5  GEMM: many rows, by wgmma or mma.sync
     6  Products in f32, for F32 weights and --exact
     7  Convolutions on tensor cores
     8  Rows: embedding, RMSNorm, SwiGLU, likelihoods
     9  Attention on a paged cache: RoPE, softmax block by block, one order of sums
    10  Attention of a few rows
    11  Attention of many rows: flash attention; launches; attention in f32
    12  The transformer: one forward, one chain of kernels, recorded as a graph
    13  Sampling, and the loop that generates
    14  The tokenizer: GroupNorm, attention over pixels, the quantiser
    15  The seam: a context's memory, the calls of the backend, ceilings for `lvm bench`

   SUMS HAVE ONE ORDER here too: a row's result depends on nothing but its own numbers, never on how
   many rows came with it, so that a prompt in pieces, a candidate among others and a reused prefix
   give the same bytes. Tensor cores make that easy: mma.sync and wgmma add 16 products at a time,
   and a chain of either gives the same bits. It costs this: GEMV takes tensor cores as GEMM does,
   although a few rows need none of their speed, and GEMM keeps four sums of each element, because
   GEMV needs four chains to be quick (some 5 % of a prompt); attention adds blocks of 64 keys one
   after the other, also where one pass over all keys would do. The same card gives the same bytes
   run to run: nothing is added in an order that may change. (The one atomic addition, GEMM's to the
   residual stream, is the only one that its element gets.)

   ARITHMETIC. F32 weights, and all weights with --exact: f32 products, fma after fma in ascending
   k, and attention in f32. Otherwise weights become f16 as they are read (a quantised one is q d,
   rounded once), activations become f16 times a power of two that is fixed for a layer (so that
   nothing overflows), keys, values and probabilities are f16, and tensor cores add in f32. The
   tokenizer's activations are two f16 numbers each, a high and a low part, which keeps every token
   of f32 but those at a tie.

   WORDS
     row          a token's vector of activations; a step takes some of them through the layers
     few, many    up to 64 rows go by GEMV (generating), more by GEMM (a prompt's prefill)
     span         64 columns: the K tile of all products in f16
     chain        sums that one accumulator adds, product after product, in ascending k
     tile         some rows of one span, side by side in memory: 8 of weights as they are kept, 256
                  of weights in f16 for GEMM, 128 of activations
     panels       a matrix as tiles in f16, swizzled as tensor cores read them from shared memory
     page, block  256 and 64 positions of the KV cache
     lane g, t    lane / 4 and lane % 4: which rows and columns of mma's operands a thread holds

   FLOORS. A kernel's comment ends with its floor: the time that no kernel for the same work can be
   under, bytes over the memory's bandwidth or operations over the arithmetic's rate, whichever is
   more. An H200 copies 4.2 TB/s and its tensor cores do 780 TFLOP/s, so that a Q8_0 weight
   (8.5 bits) takes as long to read as to multiply by 100 rows: a few rows wait for memory, many for
   tensor cores. `lvm bench` measures both on the card at hand.

   WHERE TO BEGIN. struct matrix in chapter 2, gemv_kernel in 4, split_kernel in 10, run_layer in 12
   and gpu_generate in 13 are the path of a token. The plain version of every kernel is lvm.c's.

   LEFT OUT: training, which runs on the CPU; more than one GPU for a model; attention and its merge
   in one kernel, which was slower. docs/performance.md tells what else was tried. */
#define LVM_INTERNAL
#include "lvm.c"
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <mutex>
#include <type_traits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* =================================================================================================
   1.  Errors, launches, memory

   A launch returns before its kernel has run, and an error may show at any later call. So functions
   that queue work return nothing: the queue keeps its first error and the call that met it, and
   whoever needs the results waits (wait_for) and gets both as an lvm error. */

enum { THREADS = 256, WARPS = THREADS / 32 };

/* Work that runs in order, and the first thing that went wrong in it. */
struct queue {
    int device;
    int early;               /* 1: kernels may start before the one in front ends, see launch */
    int sms;                 /* multiprocessors */
    int shared;              /* bytes of shared memory that a block may have */
    int wgmma;               /* blocks of gemm_wgmma_kernel at a time, 0: it cannot run here */
    cudaStream_t stream;
    cudaError_t error;
    const char *what;
};

/* Keeps the first error, and what met it. */
static void note(struct queue *q, cudaError_t error, const char *what) {
    if (error == cudaSuccess || q->error != cudaSuccess) return;
    q->error = error;
    q->what = what;
}

/* A call of CUDA; the error names it. */
#define CALL(q, function, ...) note(q, function(__VA_ARGS__), #function)

/* Behind every launch by <<< >>>. */
static void launched(struct queue *q, const char *kernel) { note(q, cudaGetLastError(), kernel); }

/* A launch in a chain of short kernels: where the chip can (compute capability 9), blocks start
   while the kernel before still runs (programmatic dependent launch), read what it does not write,
   weights above all, and call wait_for_inputs before they read the rest. */
template <class... P, class... A>
static void launch(struct queue *q, const char *name, void (*kernel)(P...), dim3 grid, int threads,
                   size_t shared, A... args) {
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    c.gridDim = grid;
    c.blockDim = dim3((unsigned)threads);
    c.dynamicSmemBytes = shared;
    c.stream = q->stream;
    c.attrs = &early;
    c.numAttrs = (unsigned)q->early;
    note(q, cudaLaunchKernelEx(&c, kernel, P(args)...), name);
}

/* Waits until all that earlier kernels wrote is there, and lets the next kernel's blocks start. */
static __device__ void wait_for_inputs() {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Lets them start earlier still, in front of wait_for_inputs, where the next kernel has much to
   fetch: its own wait is for the end of this one, and so of all before it, but what it reads in
   front of that must be older than the kernel before this one. */
static __device__ void let_next_start() {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

static int cuda_fail(cudaError_t e, const char *what, lvm_error *error) {
    cudaGetLastError(); /* or the next launch would be blamed */
    int code = e == cudaErrorMemoryAllocation ? LVM_MEMORY : LVM_UNSUPPORTED;
    return fail(error, code, "CUDA: %s: %s", what, cudaGetErrorString(e));
}

/* What the queue met since it was last asked. */
static int settle(struct queue *q, lvm_error *error) {
    cudaError_t e = q->error;
    q->error = cudaSuccess;
    return e == cudaSuccess ? LVM_OK : cuda_fail(e, q->what, error);
}

static int wait_for(struct queue *q, lvm_error *error) {
    CALL(q, cudaStreamSynchronize, q->stream);
    return settle(q, error);
}

/* Between host and device, either way, or inside one; where host memory is not pinned, the call
   returns when it has been read or written. */
static void copy(struct queue *q, void *to, const void *from, size_t bytes, const char *what) {
    note(q, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, q->stream), what);
}

/* A host thread's calls go to the device that it chose last. */
static int use_device(const struct queue *q, lvm_error *error) {
    cudaError_t e = cudaSetDevice(q->device);
    return e == cudaSuccess ? LVM_OK : cuda_fail(e, "cudaSetDevice", error);
}

/* One allocation, cut into pieces: laid out twice, first to count and then in memory. */
struct arena {
    char *base;
    size_t used;
};

template <class T> static void take(struct arena *a, T **p, int64_t count) {
    *p = a->base != NULL ? (T *)(a->base + a->used) : NULL;
    a->used += ((size_t)count * sizeof(T) + 255) / 256 * 256;
}

/* =================================================================================================
   2.  Weights on the device

   A matrix has rows of ld elements, its columns padded to a multiple of 64 by zeros:

       F32, F16, BF16   as they are
       Q8_0   q[rows][ld] bytes, value + 128             d[rows][ld / 32] f16
       Q4_0   q[rows][ld / 2]: nibble i (0 .. 3) of a 32-bit word is its element 2 i, nibble i + 4
              element 2 i + 1, so that a shift and a mask give a pair; value + 8     d: the same

   Integers and scales are planes of their own, because a block of the file, 18 or 34 bytes, would
   allow loads of two bytes only. The transformer's matrices, but for F32, are cut into tiles of 8
   rows by 64 columns, the rows padded to a multiple of 8:

       [rows / 8][ld / 64][8][64]     and their scales [rows / 8][ld / 64][8][2]

   Two tiles are the 16 rows that tensor cores multiply at a time: lane i of a warp takes 16 columns
   of row i / 4 of each, which lie side by side and share a scale, and all lanes together read 512
   bytes of Q8_0 in one run. The next 64 columns of the 8 rows follow in memory. */

enum { SPAN = 64 /* columns of a tile: 4 lanes x 16 */ };

struct matrix {
    int type, rows, cols;
    int ld;     /* cols, padded */
    int tiled;  /* 1: in tiles */
    uint8_t *q; /* numbers, or the integers of a quantised type */
    __half *d;  /* scales */
};

/* Where an element lies, in elements: 16 from a multiple of 16 on are neighbours. */
static __device__ int64_t element_at(const struct matrix &m, int64_t row, int k) {
    if (!m.tiled) return row * m.ld + k;
    return ((row / 8 * (m.ld / SPAN) + k / SPAN) * 8 + row % 8) * SPAN + k % SPAN;
}

static __device__ __half2 as_half2(uint32_t u) {
    __half2 h;
    memcpy(&h, &u, sizeof h);
    return h;
}

static __device__ uint32_t as_word(__half2 h) {
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}

/* 1024 + u is an f16 whose lowest bits are u: bytes and nibbles become numbers without a
   conversion. w: four bytes, value + 128. */
static __device__ void pairs_of_bytes(uint32_t w, __half2 d, __half2 *out) {
    const __half2 zero = __float2half2_rn(1024 + 128);
    out[0] = __hmul2(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4140)), zero), d);
    out[1] = __hmul2(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4342)), zero), d);
}

static __device__ void pairs_of_nibbles(uint32_t w, __half2 d, __half2 *out) {
    const __half2 zero = __float2half2_rn(1024 + 8);
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = __hmul2(__hsub2(as_half2((w >> 4 * i & 0x000f000f) | 0x64006400), zero), d);
}

/* 16 elements from column k on (a multiple of 16), as they lie in memory; for types other than F32.
   They are loaded apart from their dequantisation, so that several loads are under way before the
   first is used. */
template <int TYPE> struct raw16 {
    uint4 v[TYPE == LVM_F16 || TYPE == LVM_BF16 ? 2 : 1];
    __half d;
};

/* Bytes of n elements, which are a multiple of 16. */
template <int TYPE> static __device__ int64_t bytes_of(int64_t n) {
    return TYPE == LVM_Q4_0 ? n / 2 : TYPE == LVM_Q8_0 ? n : n * 2;
}

template <int TYPE>
static __device__ void fetch16(const struct matrix &m, int64_t row, int k,
                               struct raw16<TYPE> *raw) {
    const int64_t at = element_at(m, row, k);
    const uint8_t *q = m.q + bytes_of<TYPE>(at);
    if (TYPE == LVM_Q4_0) {
        uint2 v = *(const uint2 *)q;
        raw->v[0].x = v.x, raw->v[0].y = v.y;
    } else
        for (int i = 0; i < (int)(sizeof raw->v / 16); i++) raw->v[i] = ((const uint4 *)q)[i];
    if (TYPE == LVM_Q8_0 || TYPE == LVM_Q4_0) raw->d = m.d[at / QK];
}

/* Dequantised to f16: q d, rounded once. */
template <int TYPE>
static __device__ void dequantise16(const struct raw16<TYPE> &raw, __half2 *out) {
    const uint4 v = raw.v[0], u = raw.v[sizeof raw.v / 16 - 1];
    const uint32_t w[8] = {v.x, v.y, v.z, v.w, u.x, u.y, u.z, u.w};
    const __half2 d = __half2half2(raw.d);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (TYPE == LVM_F16) out[i] = as_half2(w[i]);
        if (TYPE == LVM_BF16)
            out[i] = __floats2half2_rn(__uint_as_float(w[i] << 16),
                                       __uint_as_float(w[i] & 0xffff0000));
        if (TYPE == LVM_Q8_0 && i < 4) pairs_of_bytes(w[i], d, out + 2 * i);
        if (TYPE == LVM_Q4_0 && i < 2) pairs_of_nibbles(w[i], d, out + 4 * i);
    }
}

/* Four elements from column k on (a multiple of 4), exactly. */
template <int TYPE>
static __device__ float4 load4(const struct matrix &m, int64_t row, int k) {
    const int64_t at = element_at(m, row, k);
    if (TYPE == LVM_F32) return *(const float4 *)(m.q + at * 4);
    if (TYPE == LVM_Q8_0) {
        uchar4 v = *(const uchar4 *)(m.q + at);
        float d = __half2float(m.d[at / QK]);
        return make_float4(((int)v.x - 128) * d, ((int)v.y - 128) * d, ((int)v.z - 128) * d,
                           ((int)v.w - 128) * d);
    }
    if (TYPE == LVM_Q4_0) {
        uint32_t w = *(const uint32_t *)(m.q + at / 8 * 4) >> at % 8 * 2;
        float d = __half2float(m.d[at / QK]);
        return make_float4(((int)(w & 15) - 8) * d, ((int)(w >> 16 & 15) - 8) * d,
                           ((int)(w >> 4 & 15) - 8) * d, ((int)(w >> 20 & 15) - 8) * d);
    }
    uint2 v = *(const uint2 *)(m.q + at * 2);
    if (TYPE == LVM_BF16)
        return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000),
                           __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000));
    float2 a = __half22float2(as_half2(v.x)), b = __half22float2(as_half2(v.y));
    return make_float4(a.x, a.y, b.x, b.y);
}

/* f(type), the type as a constant that a template takes. */
template <class F> static void with_type(int type, F f) {
    switch (type) {
    case LVM_F32: f(std::integral_constant<int, LVM_F32>()); break;
    case LVM_F16: f(std::integral_constant<int, LVM_F16>()); break;
    case LVM_BF16: f(std::integral_constant<int, LVM_BF16>()); break;
    case LVM_Q8_0: f(std::integral_constant<int, LVM_Q8_0>()); break;
    default: f(std::integral_constant<int, LVM_Q4_0>());
    }
}

/* Powers of two that activations are multiplied by to become f16, see chapter 3: what attention's
   norm gives, heads, what the second norm gives, and silu(gate) up. */
struct ups {
    float attn, heads, ffn, hidden;
};

/* A model's copy on the device. */
struct gpu_layer {
    const float *attn_norm, *ffn_norm, *q_bias, *k_bias, *v_bias, *o_bias;
    struct matrix q, k, v, o, gate, up, down;
    struct ups ups;
    int f16; /* 1: its matrices have one type, which is not F32 */
};

struct gpu_op {
    const float *scale[2], *shift[2], *bias[4];
    struct matrix conv[4];
};

struct gpu_model {
    struct queue q;
    const lvm_model *m;
    struct matrix *map;           /* [m->n_specs]: of tensor i of the model's description */
    struct gpu_layer *layers;     /* [L] */
    struct gpu_op *ops;           /* [n_ops] */
    struct matrix embed, output, codebook;
    const float *norm;
    float head_up;                /* as in struct ups, of rows in front of the output */
    int *bounds;                  /* [L][3] and the codebook's, bits of floats; see find_bounds */
    float *code_norms;            /* [codes] on the device: |e|^2 */
    int bad_codebook;             /* 1: some of them are not finite: gpu_encode refuses */
    char *memory;                 /* all of the above that is on the device */
    size_t bytes;
};

/* The first tensor with t's bytes, which embedding and output share where they are tied; n_specs
   where it has none. */
static int number_of(const lvm_model *m, const struct tensor *t) {
    int i = t->data != NULL ? 0 : m->n_specs;
    while (i < m->n_specs && m->specs[i].tensor->data != t->data) i++;
    return i;
}

static struct matrix on_device(const struct gpu_model *g, const struct tensor *t) {
    const int i = number_of(g->m, t);
    return i < g->m->n_specs ? g->map[i] : matrix();
}

static const float *vector_on_device(const struct gpu_model *g, const struct tensor *t) {
    return (const float *)on_device(g, t).q;
}

/* Lays out all weights: vectors as one row, matrices of the transformer in tiles. */
static void place_weights(struct gpu_model *g, struct arena *a) {
    for (int i = 0; i < g->m->n_specs; i++) {
        const struct tensor *t = g->m->specs[i].tensor;
        const enum tensor_kind kind = g->m->specs[i].kind;
        struct matrix m = {t->type, t->rows, t->cols, 0, 0, NULL, NULL};
        if (kind == T_VECTOR) m.rows = 1, m.cols = t->rows * t->cols;
        m.ld = round_up(m.cols, SPAN);
        m.tiled = t->type != LVM_F32 && (kind == T_MATRIX || kind == T_OUTPUT || kind == T_EMBED);
        const int64_t n = (int64_t)(m.tiled ? round_up(m.rows, 8) : m.rows) * m.ld,
                      scales = type_is_quantised(t->type) ? n / QK : 0;
        const int first = number_of(g->m, t) == i;
        if (first) take(a, &m.q, type_bytes(t->type, n) - 2 * scales);
        if (first && scales > 0) take(a, &m.d, scales);
        g->map[i] = m;
    }
    take(a, &g->code_norms, g->m->vq != NULL ? g->m->vq->codes : 0);
    take(a, &g->bounds, 3 * (int64_t)g->m->llama.L + 1);
}

/* ---- Upload ----

   The tensors' bytes go over in pieces of a megabyte: a list of parts of tensors, and their bytes.
   Each of some CPU threads takes the next piece, copies it from the (mapped) file to pinned memory
   of its own and sends it, and a kernel on the device puts its units where they belong: a unit is a
   quantised block or one number. So copying, PCIe and the kernel work side by side. One stream has
   all copies, another all kernels: copies that change streams cost 20 us more each. To pin memory
   of 4 KiB pages costs half a millisecond a megabyte, of huge pages an eighth. */

enum {
    PIECE = 1 << 20,
    PARTS = 128,    /* of a piece at most */
    UPLOADERS = 8,  /* threads at most */
    BUFFERS = 2,    /* of a thread: one is filled while the other is sent */
    PIECES = UPLOADERS * BUFFERS
};

struct part_of_piece {
    struct matrix m;
    int elements, unit;  /* elements and bytes of a unit */
    int n, at;           /* how many there are, from byte `at` of the piece on */
    int64_t first;       /* in the tensor */
    const uint8_t *from; /* on the host */
};

struct upload {
    const struct gpu_model *g;
    std::mutex mutex;           /* of what comes next: */
    int started, tensor;        /* threads so far */
    int64_t unit;
    struct queue q;             /* an error of any thread, which ends all of them */
    uint8_t *host, *device;     /* [PIECES][PIECE] */
    int pinned;
    cudaStream_t copies, kernels;
    cudaEvent_t event[PIECES];  /* a piece was copied; then: it was placed */
};

/* Lists the next piece and returns the number of its parts, 0 at the end. */
static int list_piece(struct upload *u, struct part_of_piece *list) {
    const lvm_model *m = u->g->m;
    int n = 0, used = PARTS * (int)sizeof *list;
    std::lock_guard<std::mutex> lock(u->mutex);
    while (u->q.error == cudaSuccess && u->tensor < m->n_specs && n < PARTS && used + 64 <= PIECE) {
        const struct tensor *t = m->specs[u->tensor].tensor;
        const int elements = type_is_quantised(t->type) ? QK : 1,
                  unit = (int)type_bytes(t->type, elements);
        const int first = number_of(m, t) == u->tensor;
        int64_t left = first ? t->rows * t->row_bytes / unit - u->unit : 0,
                k = min64(left, (PIECE - used) / unit);
        if (k > 0)
            list[n++] = {u->g->map[u->tensor], elements, unit, (int)k, used, u->unit,
                         t->data + u->unit * unit};
        used += round_up((int)k * unit, 16);
        u->unit = k < left ? u->unit + k : 0;
        u->tensor += k == left;
    }
    return n;
}

/* Reads a piece, its list in front; writes planes of matrices, in tiles or rows; what lies behind a
   row's last column is zero already. A thread takes a unit at a time. Grid: [any][parts]. Floor:
   bytes in + bytes out, far less than PCIe takes. */
__global__ void place_kernel(const uint8_t *piece) {
    const struct part_of_piece p = ((const struct part_of_piece *)piece)[blockIdx.y];
    const int units = p.m.cols / p.elements, step = (int)gridDim.x * THREADS;
    for (int i = (int)(blockIdx.x * THREADS + threadIdx.x); i < p.n; i += step) {
        const uint8_t *from = piece + p.at + (int64_t)i * p.unit;
        const uint16_t *halves = (const uint16_t *)from;
        const int64_t row = (p.first + i) / units,
                      at = element_at(p.m, row, (int)(p.first + i - row * units) * p.elements);
        if (p.m.type == LVM_F32) ((uint32_t *)p.m.q)[at] = *(const uint32_t *)from;
        else if (p.elements == 1) ((uint16_t *)p.m.q)[at] = *halves;
        else p.m.d[at / QK] = __ushort_as_half(*halves);
        uint32_t *words = (uint32_t *)(p.m.q + (p.m.type == LVM_Q8_0 ? at : at / 2));
        for (int w = 0; p.m.type == LVM_Q8_0 && w < 8; w++)
            words[w] = (halves[1 + 2 * w] | (uint32_t)halves[2 + 2 * w] << 16) ^ 0x80808080;
        for (int w = 0; p.m.type == LVM_Q4_0 && w < 4; w++) {
            uint32_t word = 0;
            for (int k = 0; k < 8; k++)
                word |= (from[2 + (8 * w + k) % 16] >> w / 2 * 4 & 15u) << (k / 2 + k % 2 * 4) * 4;
            words[w] = word;
        }
    }
}

/* Piece `number`, whose n parts are listed: copied to pinned memory, to the device, and placed. */
static void send_piece(struct upload *u, struct queue *q, int number, int n) {
    const int64_t at = (int64_t)number * PIECE;
    uint8_t *host = u->host + at, *device = u->device + at;
    const struct part_of_piece *list = (const struct part_of_piece *)host, *end = list + n - 1;
    int most = 0;
    for (int i = 0; i < n; i++) {
        memcpy(host + list[i].at, list[i].from, (size_t)list[i].n * (size_t)list[i].unit);
        most = std::max(most, list[i].n);
    }
    note(q, cudaMemcpyAsync(device, host, (size_t)(end->at + end->n * end->unit),
                            cudaMemcpyHostToDevice, u->copies), "copying weights");
    CALL(q, cudaEventRecord, u->event[number], u->copies);
    CALL(q, cudaStreamWaitEvent, u->kernels, u->event[number], 0);
    dim3 grid((unsigned)min64(256, (most + THREADS - 1) / THREADS), (unsigned)n);
    place_kernel<<<grid, THREADS, 0, u->kernels>>>(device);
    launched(q, "place_kernel");
    CALL(q, cudaEventRecord, u->event[number], u->kernels);
}

/* Piece after piece, by turns in each of its buffers, until none is left. */
static void *upload_thread(void *arg) {
    struct upload *u = (struct upload *)arg;
    struct queue q = u->g->q;
    u->mutex.lock();
    const int own = BUFFERS * u->started++;
    u->mutex.unlock();
    CALL(&q, cudaSetDevice, q.device);
    for (int i = 0, n = 1; n > 0 && q.error == cudaSuccess; i = (i + 1) % BUFFERS) {
        CALL(&q, cudaEventSynchronize, u->event[own + i]);
        n = list_piece(u, (struct part_of_piece *)(u->host + (int64_t)(own + i) * PIECE));
        if (n > 0) send_piece(u, &q, own + i, n);
    }
    std::lock_guard<std::mutex> lock(u->mutex);
    note(&u->q, q.error, q.what);
    return NULL;
}

/* The calling thread is the first of n; where no further one can be started those there are do all.
   Signals are left to the program's own threads. */
static void upload_by(struct upload *u, int n) {
    pthread_t thread[UPLOADERS];
    int started = 1;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started < n && pthread_create(&thread[started], NULL, upload_thread, u) == 0) started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    upload_thread(u);
    for (int i = 1; i < started; i++) pthread_join(thread[i], NULL);
}

/* Memory that cannot be pinned will do too, at a third of the speed. */
static void upload_alloc(struct upload *u, size_t bytes) {
    u->host = (uint8_t *)aligned_alloc(2 << 20 /* a huge page */, bytes);
    if (u->host == NULL) note(&u->q, cudaErrorMemoryAllocation, "malloc of staging memory");
    else {
        (void)madvise(u->host, bytes, MADV_HUGEPAGE);
        memset(u->host, 0, bytes);
        u->pinned = cudaHostRegister(u->host, bytes, cudaHostRegisterDefault) == cudaSuccess;
        cudaGetLastError();
    }
    note(&u->q, cudaMalloc((void **)&u->device, bytes), "cudaMalloc for weights");
    for (cudaStream_t *stream : {&u->copies, &u->kernels})
        CALL(&u->q, cudaStreamCreateWithFlags, stream, cudaStreamNonBlocking);
    for (size_t i = 0; i < bytes / PIECE; i++)
        CALL(&u->q, cudaEventCreateWithFlags, &u->event[i], cudaEventDisableTiming);
}

/* All weights; g->q gets the error. */
static void upload_weights(struct gpu_model *g) {
    struct upload u = {};
    int n = (int)min64(max64(2, min64(UPLOADERS, sysconf(_SC_NPROCESSORS_ONLN))),
                       (int64_t)g->bytes / PIECE + 1);
    u.g = g;
    upload_alloc(&u, (size_t)n * BUFFERS * PIECE);
    if (u.q.error == cudaSuccess) {
        CALL(&u.q, cudaMemsetAsync, g->memory, 0, g->bytes, u.kernels);
        upload_by(&u, n);
    }
    for (cudaStream_t stream : {u.copies, u.kernels}) {
        if (stream == NULL) continue;
        CALL(&u.q, cudaStreamSynchronize, stream);
        cudaStreamDestroy(stream);
    }
    for (cudaEvent_t event : u.event)
        if (event != NULL) cudaEventDestroy(event);
    cudaFree(u.device);
    if (u.pinned) cudaHostUnregister(u.host);
    free(u.host);
    cudaGetLastError();
    note(&g->q, u.q.error, u.q.what);
}

/* ---- The model's copy ---- */

/* Layers by name, from tensors that lie as the description lists them. */
static void bind_layers(struct gpu_model *g) {
    const struct llama *a = &g->m->llama;
    for (int i = 0; i < a->L; i++) {
        const struct layer *l = &a->layers[i];
        struct gpu_layer *to = &g->layers[i];
        struct { const struct tensor *from; struct matrix *to; } matrices[] = {
            {&l->q, &to->q}, {&l->k, &to->k}, {&l->v, &to->v}, {&l->o, &to->o},
            {&l->gate, &to->gate}, {&l->up, &to->up}, {&l->down, &to->down}};
        struct { const struct tensor *from; const float **to; } vectors[] = {
            {&l->attn_norm, &to->attn_norm}, {&l->ffn_norm, &to->ffn_norm},
            {&l->q_bias, &to->q_bias}, {&l->k_bias, &to->k_bias}, {&l->v_bias, &to->v_bias},
            {&l->o_bias, &to->o_bias}};
        to->f16 = l->q.type != LVM_F32 && a->D % 4 == 0;
        for (const auto &one : matrices) {
            *one.to = on_device(g, one.from);
            to->f16 &= one.from->type == l->q.type;
        }
        for (const auto &one : vectors) *one.to = vector_on_device(g, one.from);
    }
    if (a->L == 0) return;
    g->embed = on_device(g, &a->embed);
    g->output = on_device(g, &a->output);
    g->norm = vector_on_device(g, &a->norm);
}

static void bind_ops(struct gpu_model *g) {
    const struct vqgan *vq = g->m->vq;
    for (int i = 0; vq != NULL && i < vq->n_ops; i++) {
        const struct vq_op *op = &vq->ops[i];
        for (int n = 0; n < 2; n++) {
            g->ops[i].scale[n] = vector_on_device(g, &op->norm[n].scale);
            g->ops[i].shift[n] = vector_on_device(g, &op->norm[n].shift);
        }
        for (int n = 0; n < 4; n++) {
            g->ops[i].conv[n] = on_device(g, &op->conv[n].w);
            g->ops[i].bias[n] = vector_on_device(g, &op->conv[n].bias);
        }
    }
    if (vq != NULL) g->codebook = on_device(g, &vq->codebook);
}

static void gpu_model_close(void *copy) {
    struct gpu_model *g = (struct gpu_model *)copy;
    if (g == NULL) return;
    if (use_device(&g->q, NULL) == LVM_OK) {
        if (g->q.stream != NULL) cudaStreamDestroy(g->q.stream);
        cudaFree(g->memory);
        cudaGetLastError();
    }
    free(g->map);
    free(g->layers);
    free(g->ops);
    free(g);
}

/* Room for all weights, or an error before any of them is copied. */
static int gpu_model_alloc(struct gpu_model *g, lvm_error *error) {
    const lvm_model *m = g->m;
    struct arena a = {NULL, 0};
    size_t ops = m->vq != NULL ? (size_t)m->vq->n_ops : 0;
    g->map = (struct matrix *)calloc((size_t)m->n_specs + 1, sizeof *g->map);
    g->layers = (struct gpu_layer *)calloc((size_t)m->llama.L + 1, sizeof *g->layers);
    g->ops = (struct gpu_op *)calloc(ops + 1, sizeof *g->ops);
    if (g->map == NULL || g->layers == NULL || g->ops == NULL)
        return fail(error, LVM_MEMORY, "out of memory");
    place_weights(g, &a);
    g->bytes = a.used;
    CALL(&g->q, cudaStreamCreateWithFlags, &g->q.stream, cudaStreamNonBlocking);
    note(&g->q, cudaMalloc((void **)&g->memory, g->bytes + 256), "cudaMalloc of the weights");
    int code = settle(&g->q, error);
    if (code != LVM_OK) return code;
    a = {g->memory, 0};
    place_weights(g, &a);
    bind_layers(g);
    bind_ops(g);
    return LVM_OK;
}

/* ---- Bounds of activations, from weights ----

   Activations are multiplied by a power of two before they become f16, so that none overflows and
   few are lost below; it is found once, from bounds that hold for every input (see chapter 3). */

/* Reads w, a warp a row. norms[row] = |w|^2, or NULL. largest[0] = the bits of the largest of
   root |w norm| + |bias|, where norm and bias are not NULL: with root = sqrt(D) no row of w gives
   more for any rmsnorm(x) with that norm. Bits of floats above zero have their order. Floor: the
   bytes of w. */
template <int TYPE>
__global__ void row_norms_kernel(struct matrix w, const float *norm, const float *bias, float root,
                                 float *norms, int *largest) {
    const int row = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    double sum = 0;
    if (row >= w.rows) return;
    for (int k = 4 * lane; k < w.ld; k += 128) { /* zeros behind the last */
        const float4 v = load4<TYPE>(w, row, k);
        const float4 n = norm != NULL ? *(const float4 *)(norm + k) : make_float4(1, 1, 1, 1);
        const double a = (double)v.x * n.x, b = (double)v.y * n.y, c = (double)v.z * n.z,
                     d = (double)v.w * n.w;
        sum += a * a + b * b + c * c + d * d;
    }
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
    if (lane > 0) return;
    if (norms != NULL) norms[row] = (float)sum;
    const float most = root * sqrtf((float)sum) + (bias != NULL ? fabsf(bias[row]) : 0);
    atomicMax(largest, __float_as_int(most));
}

/* The largest power of two that brings `most` under 2^15. */
static __host__ __device__ float power_for(float most) {
    int e = most > 0 && most < HUGE_VALF ? 14 - ilogbf(most) : 0;
    return exp2f((float)(e > 100 ? 100 : e < -100 ? -100 : e));
}

/* For a bound, which roundings may exceed by a little. */
static float power_for_bound(double bound) { return power_for((float)(1.01 * bound)); }

/* For rmsnorm with this norm. */
static float power_for_norm(const struct tensor *norm, double root) {
    double most = 0;
    for (int64_t k = 0; k < (int64_t)norm->rows * norm->cols; k++)
        most = fmax(most, fabs((double)((const float *)norm->data)[k]));
    return power_for_bound(root * most);
}

/* Queues what fills g->bounds, which begins as zeros: of each layer the bounds of v, gate and up;
   then the largest squared norm of a code. */
static void find_bounds(struct gpu_model *g) {
    const float root = sqrtf((float)g->m->llama.D);
    int *bound = g->bounds;
    auto rows = [&](const struct matrix &w, const float *norm, const float *bias, float *norms) {
        const unsigned grid = (unsigned)(w.rows + WARPS - 1) / WARPS;
        with_type(w.type, [&](auto type) {
            row_norms_kernel<type.value><<<grid, THREADS, 0, g->q.stream>>>(w, norm, bias, root,
                                                                            norms, bound++);
        });
    };
    for (int i = 0; i < g->m->llama.L; i++) {
        const struct gpu_layer *l = &g->layers[i];
        rows(l->v, l->attn_norm, l->v_bias, NULL);
        rows(l->gate, l->ffn_norm, NULL, NULL);
        rows(l->up, l->ffn_norm, NULL, NULL);
    }
    if (g->m->vq != NULL) rows(g->codebook, NULL, NULL, g->code_norms);
    launched(&g->q, "row_norms_kernel");
}

/* The powers of two that follow. Attention's heads are means of rows of v, and silu(gate) up is no
   larger than |gate| |up|. */
static int use_bounds(struct gpu_model *g, lvm_error *error) {
    const struct llama *a = &g->m->llama;
    const double root = sqrt((double)a->D);
    const size_t n = 3 * (size_t)a->L + 1;
    float *bounds = (float *)malloc(n * sizeof *bounds);
    if (bounds == NULL) return fail(error, LVM_MEMORY, "out of memory");
    copy(&g->q, bounds, g->bounds, n * sizeof *bounds, "copying bounds");
    int code = wait_for(&g->q, error);
    for (int i = 0; code == LVM_OK && i < a->L; i++) {
        const float *b = bounds + 3 * i;
        g->layers[i].ups = {power_for_norm(&a->layers[i].attn_norm, root), power_for_bound(b[0]),
                            power_for_norm(&a->layers[i].ffn_norm, root),
                            power_for_bound((double)b[1] * b[2])};
    }
    if (code == LVM_OK && a->L > 0) g->head_up = power_for_norm(&a->norm, root);
    if (code == LVM_OK && g->m->vq != NULL) g->bad_codebook = !isfinite(bounds[n - 1]);
    free(bounds);
    return code;
}

/* ---- Opening a device ---- */

static int gpu_count(lvm_error *error) {
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaSuccess && count > 0) return count;
    cuda_fail(e != cudaSuccess ? e : cudaErrorNoDevice, "looking for a GPU", error);
    return 0;
}

/* "cuda" is the first device, "cuda:1" the second. */
static int device_number(const char *name, int *number, lvm_error *error) {
    int count = gpu_count(error), used = 0;
    *number = 0;
    if (count == 0) return LVM_UNSUPPORTED;
    if (name[4] == ':' && (sscanf(name + 4, ":%d%n", number, &used) != 1 || name[4 + used] != 0))
        return fail(error, LVM_INVALID, "device %s: the GPUs are cuda:0, cuda:1 and so on", name);
    if (*number < 0 || *number >= count)
        return fail(error, LVM_INVALID, "device %s: there is cuda:0 to cuda:%d", name, count - 1);
    return LVM_OK;
}

static int has_wgmma(void); /* chapter 5 */

/* A queue's description of its device. */
static int look_at_chip(struct queue *q, lvm_error *error) {
    int major = 0;
    struct { enum cudaDeviceAttr what; int *to; } all[] = {
        {cudaDevAttrComputeCapabilityMajor, &major}, {cudaDevAttrMultiProcessorCount, &q->sms},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &q->shared}};
    for (const auto &one : all) CALL(q, cudaDeviceGetAttribute, one.to, one.what, q->device);
    int code = settle(q, error);
    if (code == LVM_OK && major < 8)
        code = fail(error, LVM_UNSUPPORTED, "cuda:%d: has compute capability %d.x; lvm needs 8.0",
                    q->device, major);
    if (code == LVM_OK) code = use_device(q, error);
    q->early = major >= 9;
    if (code == LVM_OK) q->wgmma = has_wgmma() ? q->sms : 0;
    return code;
}

static int gpu_model_open(const lvm_model *m, const char *device, void **copy, lvm_error *error) {
    lvm_error own = {0, ""};
    struct queue q = {};
    int code = device_number(device, &q.device, error);
    if (code == LVM_OK) code = look_at_chip(&q, error);
    if (code != LVM_OK) return code;
    struct gpu_model *g = (struct gpu_model *)calloc(1, sizeof *g);
    if (g == NULL) return fail(error, LVM_MEMORY, "out of memory");
    g->m = m;
    g->q = q;
    code = gpu_model_alloc(g, &own);
    if (code == LVM_OK) {
        upload_weights(g);
        find_bounds(g);
        code = use_bounds(g, &own);
    }
    if (code == LVM_OK) *copy = g;
    else gpu_model_close(g);
    return code == LVM_OK ? LVM_OK : fail(error, code, "%s: %s", m->path, own.text);
}

/* =================================================================================================
   3.  Products in f16: what GEMV and GEMM share

       y[r][o] = sum_k w[o][k] x[r][k] + bias[o]        x, w: f16, sums: f32

   One instruction multiplies 16 rows of x by 8 rows of w over 16 columns (mma.m16n8k16). Which
   columns those are is free, as long as both operands agree: of a span of 64 columns, thread t of
   four takes 16 t .. 16 t + 15, which lie side by side in memory, and step s of four multiplies
   columns 16 t + 4 s .. + 3. The spans are cut into four parts; the steps of each are one chain,
   and the four sums are added in order. GEMV, for a few rows, gives each chain a warp (a step of a
   chain waits 25 clocks for the one before, so that one chain alone would be slow); GEMM runs
   through them one after the other. Both give the same bits.

   What stands around a product is done by it, so that it costs no pass over memory: in front the
   rows' RMSNorm, rmsnorm(x)[k] = norm[k] x[k] / sqrt(mean of x^2 + eps), and behind, as its
   epilogue, SwiGLU, which is silu(gate) up, or the sum with the residual stream.

   Activations are f16, times a power of two, `up`, that is constant for a layer and that the
   product takes out again. It comes from a bound that no input exceeds, so that nothing overflows:
   RMSNorm gives no more than sqrt(D) max |norm|, and a row w of the next matrix, by Cauchy and
   Schwarz, no more than sqrt(D) |w norm|. */

enum {
    FEW_ROWS = 64,                 /* GEMV up to here */
    CHAIN_ROWS = 8,                /* up to so many rows come to a GEMV block's shared memory, */
    STAGED_MOST = 96 << 10,        /* all of them if they take no more, */
    RINGS_BESIDE = 103 << 10,      /* or with the weights, in rings that leave the next one room */
    CHAINS = 4,                    /* of a product */
    TEAMS = 3,                     /* of a GEMV block: a warp for each chain */
    TALL_TEAMS = 2,                /* the same where rows are more than CHAIN_ROWS */
    GEMV_WARPS = TEAMS * CHAINS,
    GEMV_THREADS = 32 * GEMV_WARPS,
    ROW_SUMS = 8,                  /* sums of a row's squares: one order for a warp and a block */
    ROW_THREADS = 32 * ROW_SUMS,
    BARRIERS = 64,                 /* slots of all rings of a GEMV block, at most */
    REGISTER_ROW = 4,              /* float4s of a thread where a block holds one row, */
    ROW_MOST = ROW_THREADS * REGISTER_ROW * 4 /* of so many columns at most */
};

/* ---- Activations in f16, and RMSNorm ---- */

/* Activations in f16, columns from the last on to ld zeros, as rows or as panels.
       rows     up to CHAIN_ROWS span by span, [span][row][64], so that one copy brings spans of all
                of them to shared memory; more one after the other. In odd rows chunk c of 16 bytes
                lies at c ^ 1: so eight rows are read without a bank conflict
       panels   for GEMM: tiles of 128 rows x 64 columns, 16 KiB side by side. In a tile a row has
                128 bytes, of which chunk c lies at c ^ (row & 7) (wgmma's 128-byte swizzle: eight
                rows' chunks c use all banks), and a step's 16 columns are neighbours, in the order
                of the instruction */
struct packed {
    __half *h;
    int ld, panels; /* panels: 0: rows */
    float up;       /* they are times this power of two */
    int row, span;  /* of rows: elements from one to the next, from a span to the next */
};

/* Where column k of a row lies, in elements. */
static __device__ int64_t row_at(const struct packed &p, int row, int k) {
    const unsigned c = (unsigned)k;
    return (int64_t)row * p.row + (int64_t)(c / SPAN) * p.span + (c % SPAN ^ row % 2 * 8);
}

static __device__ int64_t packed_at(const struct packed &p, int row, int k) {
    if (!p.panels) return row_at(p, row, k);
    int t = k % 64 / 16, s = k % 16 / 4, j = k % 4, r = row % 128;
    int at = 16 * s + 2 * t + (j & 1) + 8 * (j >> 1);
    int64_t tile = (int64_t)(row / 128) * (p.ld / 64) + k / 64;
    return (tile * 128 + r) * 64 + ((at / 8 ^ (r & 7)) * 8 + at % 8);
}

/* Columns k .. k + 3 of a row, k a multiple of 4. */
static __device__ void store4(const struct packed &p, int row, int k, float4 v) {
    __half2 low = __floats2half2_rn(v.x * p.up, v.y * p.up),
            high = __floats2half2_rn(v.z * p.up, v.w * p.up);
    if (p.panels) {
        *(__half2 *)(p.h + packed_at(p, row, k)) = low;
        *(__half2 *)(p.h + packed_at(p, row, k + 2)) = high;
    } else *(uint2 *)(p.h + row_at(p, row, k)) = make_uint2(as_word(low), as_word(high));
}

/* float4 number i of n, zeros beyond; not through the L1 cache, which may hold an older one. */
static __device__ float4 load_float4(const float *x, int i, int n) {
    return i < n ? __ldcg((const float4 *)x + i) : make_float4(0, 0, 0, 0);
}

static __device__ float4 add_squares(float4 sum, float4 v) {
    return make_float4(fmaf(v.x, v.x, sum.x), fmaf(v.y, v.y, sum.y), fmaf(v.z, v.z, sum.z),
                       fmaf(v.w, v.w, sum.w));
}

/* The sum of a warp's float4s, the same for all lanes. */
static __device__ float over_warp(float4 v) {
    float sum = (v.x + v.y) + (v.z + v.w);
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
    return sum;
}

/* RMSNorm's factor of a row, 1 / sqrt(mean of x^2 + eps), from each lane's eight sums. */
static __device__ float scale_of_sums(const float4 *sum, int D, float eps) {
    float all = over_warp(sum[0]);
#pragma unroll
    for (int i = 1; i < ROW_SUMS; i++) all += over_warp(sum[i]);
    return rsqrtf(all / (float)D + eps);
}

/* The same from the row, by a warp. Sum i has the float4s whose number / 32 % 8 is i, so that eight
   warps may as well have one sum each, see norm_row. */
static __device__ float rms_scale(const float *x, int D, float eps) {
    float4 sum[ROW_SUMS] = {};
    const int lane = (int)threadIdx.x % 32, n = D % 4 == 0 ? D / 4 : 0; /* float4s */
    for (int i = lane; n == 0 && i < D; i += 32) sum[0].x = fmaf(x[i], x[i], sum[0].x);
    for (int i = lane; i < n; i += 32 * 16) {
        float4 v[16]; /* all under way together */
#pragma unroll
        for (int u = 0; u < 16; u++) v[u] = load_float4(x, i + 32 * u, n);
#pragma unroll
        for (int u = 0; u < 16; u++) sum[u % ROW_SUMS] = add_squares(sum[u % ROW_SUMS], v[u]);
    }
    return scale_of_sums(sum, D, eps);
}

static __device__ float4 normed(float4 v, float4 norm, float scale) {
    return make_float4(norm.x * (v.x * scale), norm.y * (v.y * scale), norm.z * (v.z * scale),
                       norm.w * (v.w * scale));
}

/* Of four lanes, `step` from each other: v[i] of lane number t becomes v[t] of lane number i. */
static __device__ void transpose4(uint32_t *v, int t, int step) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            uint32_t got = __shfl_xor_sync(0xffffffff, t & bit ? v[i] : v[i | bit], bit * step);
            if (t & bit) v[i] = got;
            else v[i | bit] = got;
        }
}

/* Writes rmsnorm(x) to a panel; a warp a row, of up to 2048 columns, which it keeps in registers. A
   lane's float4s are columns 4 lane + 128 u on; four lanes have what makes 16 bytes of a panel. */
static __device__ void norm_to_panel(const struct packed &out, int row, const float *x,
                                     const float *norm, float eps, int D) {
    float4 v[16], sum[ROW_SUMS] = {};
    const int lane = (int)threadIdx.x % 32, t = lane % 16 / 4, n = D / 4;
#pragma unroll
    for (int u = 0; u < 16; u++) v[u] = load_float4(x, lane + 32 * u, n);
#pragma unroll
    for (int u = 0; u < 16; u++) sum[u % ROW_SUMS] = add_squares(sum[u % ROW_SUMS], v[u]);
    const float scale = scale_of_sums(sum, D, eps);
#pragma unroll
    for (int u = 0; u < 16; u += 2) {
        uint32_t h[4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int i = lane + 32 * (u + k);
            const float4 w = i < n ? ((const float4 *)norm)[i] : make_float4(0, 0, 0, 0);
            const float4 y = normed(v[u + k], w, scale);
            h[2 * k] = as_word(__floats2half2_rn(y.x * out.up, y.y * out.up));
            h[2 * k + 1] = as_word(__floats2half2_rn(y.z * out.up, y.w * out.up));
        }
        transpose4(h, t, 4);
        /* now of float4 u + t / 2, half t % 2 */
        const int k = (u + t / 2) * 128 + lane / 16 * 64 + lane % 4 * 4 + t % 2 * 2;
        if (k < out.ld)
            *(uint4 *)(out.h + packed_at(out, row, k)) = make_uint4(h[0], h[1], h[2], h[3]);
    }
}

/* Writes rmsnorm(x), of which rms_scale gave the scale, zeros behind the last; a warp a row. */
static __device__ void write_normed(const struct packed &out, int row, const float *x,
                                    const float *norm, float scale, int D) {
    for (int i = (int)threadIdx.x % 32; i < out.ld / 4; i += 32 * 8) {
        float4 v[8], w[8] = {};
#pragma unroll
        for (int u = 0; u < 8; u++) {
            v[u] = load_float4(x, i + 32 * u, D / 4);
            if (i + 32 * u < D / 4) w[u] = ((const float4 *)norm)[i + 32 * u];
        }
#pragma unroll
        for (int u = 0; u < 8; u++)
            if (i + 32 * u < out.ld / 4)
                store4(out, row, 4 * (i + 32 * u), normed(v[u], w[u], scale));
    }
}

/* A thread's part of a vector of up to ROW_MOST floats, of which a block has all. */
struct row_part {
    float4 v[REGISTER_ROW];
};

static __device__ struct row_part load_part(const float *x, int D) {
    const int tid = (int)threadIdx.x, n = tid < ROW_THREADS ? D / 4 : 0;
    struct row_part p;
#pragma unroll
    for (int u = 0; u < REGISTER_ROW; u++) {
        if (ROW_THREADS * u >= n) break;
        p.v[u] = load_float4(x, tid + ROW_THREADS * u, n);
    }
    return p;
}

/* Writes rmsnorm(x), zeros behind the last; a block a row, its first ROW_THREADS threads. The order
   of sums is rms_scale's. */
static __device__ void norm_row(const struct packed &out, int row, const struct row_part &x,
                                const struct row_part &norm, float eps, int D) {
    __shared__ float sums[ROW_SUMS];
    const int tid = (int)threadIdx.x, n = tid < ROW_THREADS ? D / 4 : 0;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < REGISTER_ROW; u++) {
        if (ROW_THREADS * u >= n) break;
        sum = add_squares(sum, x.v[u]);
    }
    sum.x = over_warp(sum);
    if (tid < ROW_THREADS) sums[tid / 32] = sum.x;
    __syncthreads();
    float all = sums[0];
#pragma unroll
    for (int i = 1; i < ROW_SUMS; i++) all += sums[i];
    const float scale = rsqrtf(all / (float)D + eps);
#pragma unroll
    for (int u = 0; u < REGISTER_ROW; u++) {
        if (ROW_THREADS * u >= n) break;
        if (tid + ROW_THREADS * u < n)
            store4(out, row, 4 * (tid + ROW_THREADS * u), normed(x.v[u], norm.v[u], scale));
    }
    for (int i = D / 4 + tid; i < out.ld / 4; i += (int)blockDim.x)
        store4(out, row, 4 * i, make_float4(0, 0, 0, 0));
}

/* v / (1 + e^-v), to some 1e-6. */
static __device__ float silu(float v) { return __fdividef(v, 1 + __expf(-v)); }

/* ---- What a product is told ---- */

/* What a product does with its sums: STORE: y = sums + bias; ADD, to the residual stream: y += sums
   + bias; SWIGLU: out = silu(sums of p[0]) times sums of p[1]. */
enum epilogue { STORE, ADD, SWIGLU };

/* One matrix, and where its sums go. */
struct part {
    struct matrix w;
    const float *bias; /* [w.rows] or NULL */
    float *y;          /* [rows][w.rows] */
};

/* Up to three matrices that multiply the same rows. */
struct product_f16 {
    struct part p[3];
    int n, rows;
    const float *x, *norm; /* norm: the rows are rmsnorm(x[rows][D]), and `in` says where they */
    float eps;             /* may lie; NULL: they lie in `in` */
    struct packed in, out; /* out: SWIGLU's */
    const int *which;      /* rows of x, or NULL: 0, 1 ... */
};

/* ---- Copies to shared memory, barriers ---- */

/* BYTES from global to shared memory, while the thread does other things; `there` is 0: zeros
   instead. */
template <int BYTES>
static __device__ void copy_async(uint32_t to, const void *from, int there) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                     "r"(there ? 16 : 0));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from),
                     "n"(BYTES), "r"(there ? BYTES : 0));
}

/* The copies since the last call are a group. */
static __device__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* All groups but the last GROUPS are there. */
template <int GROUPS> static __device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

static __device__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Barriers in shared memory (mbarrier), by which warps tell each other how far they are: of a ring
   buffer's slots, whether they are full or empty. One lets go, and begins its next round, when
   `count` have arrived and all bytes that it was told of have come. */
static __device__ void barrier_init(uint64_t *b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count)
                 : "memory");
}

/* Barriers are initialised, also for those who copy in the background (the async proxy). */
static __device__ void barriers_made(void) {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

static __device__ void barrier_arrive(uint64_t *b) {
    asm volatile("{ .reg .b64 state;\n"
                 "mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(b))
                 : "memory");
}

#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
#define BARRIER_WAIT "mbarrier.try_wait" /* sleeps for a while */
#else
#define BARRIER_WAIT "mbarrier.test_wait"
#endif

/* Waits until the round of this parity is over. */
static __device__ void barrier_wait(uint64_t *b, uint32_t parity) {
    asm volatile("{ .reg .pred done;\n"
                 "again: " BARRIER_WAIT ".parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(shared_address(b)), "r"(parity) : "memory");
}

/* Contiguous bytes to shared memory. */
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
#define BULK 1 /* one thread asks; the chip's copy engine (TMA) copies them and tells a barrier */

/* Arrives, and says how many bytes are to come. */
static __device__ void barrier_expect(uint64_t *b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(bytes) : "memory");
}

/* Contiguous bytes from global to shared memory, in the background; `done` is told of them. */
static __device__ void copy_bulk(void *to, const void *from, int bytes, uint64_t *done) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from), "r"(bytes),
                 "r"(shared_address(done)) : "memory");
}

/* 1 for one lane of a warp; the compiler knows that it is one, and makes no loop over lanes. */
static __device__ uint32_t elected(void) {
    uint32_t is;
    asm volatile("{ .reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, p; }" : "=r"(is));
    return is;
}
#else
#define BULK 0

/* Arrives as soon as the thread's copies so far have come. */
static __device__ void barrier_arrive_later(uint64_t *b) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b))
                 : "memory");
}

static __device__ uint32_t elected(void) { return 1; } /* all lanes copy */

/* copy_bulk by a warp, which waits for its copies by itself. */
static __device__ void copy_bulk(void *to, const void *from, int bytes, uint64_t *) {
    for (int i = (int)threadIdx.x % 32 * 16; i < bytes; i += 32 * 16)
        copy_async<16>(shared_address(to) + (uint32_t)i, (const char *)from + i, 1);
}
#endif

/* ---- Tensor cores: mma.sync everywhere, wgmma on sm_90a ---- */

/* c[16 rows of a][8 rows of b] += over 16 columns. A lane holds of a the rows g (a0, a2) and g + 8
   (a1, a3), of b row g, of c rows g (c[0], c[1]) and g + 8 by b's rows 2 t and 2 t + 1. */
static __device__ void mma(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Four matrices of 8 rows of 16 bytes: lane i brings the place of row i % 8 of matrix i / 8. */
static __device__ void load_matrices(uint32_t *v, uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row) : "memory");
}

/* Products by wgmma are a warp group's (four warps). They go on in the background, in groups, and
   read shared memory by themselves; on chips without it what is here does nothing. */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA 1
#define WGMMA_ONLY(code) asm volatile(code ::: "memory")
#else
#define WGMMA 0
#define WGMMA_ONLY(code)
#endif

static __device__ void products_begin(void) { WGMMA_ONLY("wgmma.fence.sync.aligned;"); }
static __device__ void products_end(void) { WGMMA_ONLY("wgmma.commit_group.sync.aligned;"); }

/* All groups but the last LEFT are done. */
template <int LEFT> static __device__ void products_wait(void) {
#if WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}

/* The same, and c[n] is what they left. */
template <int LEFT> static __device__ void products_done(float *c, int n) {
    products_wait<LEFT>();
#pragma unroll
    for (int i = 0; WGMMA && i < n; i++) asm volatile("" : "+f"(c[i])::"memory");
}

/* What threads wrote to shared memory is there for wgmma. */
static __device__ void tiles_written(void) { WGMMA_ONLY("fence.proxy.async.shared::cta;"); }

#if WGMMA
/* How wgmma finds a tile of rows of 128 bytes: address / 16; 1024 / 16 to the next eight rows; the
   128-byte swizzle. (The distance along a row, bit 16, is not used with it.) */
static __device__ uint64_t tile_descriptor(const void *tile) {
    return (uint64_t)(shared_address(tile) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 |
           (uint64_t)1 << 62;
}

#define SUMS4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS64(i) SUMS16(i), SUMS16(i + 16), SUMS16(i + 32), SUMS16(i + 48)
#define NAMES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
                "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES64 NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48," \
                "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES128 NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80," \
                 "%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99," \
                 "%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114," \
                 "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_CODE(n, names, a, b, add, end) \
    "{ .reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
    "k16.f32.f16.f16 {" names "}, " a ", " b ", p, 1, 1, " end "; }"

/* c = a b^T (+ c, if `add`): 64 rows of a, N of b, 16 columns. */
template <int N> static __device__ void wgmma(float *c, uint64_t a, uint64_t b, int add) {
    if (N == 64)
        asm volatile(WGMMA_CODE("64", NAMES32, "%32", "%33", "%34", "0, 0")
                     : SUMS16(0), SUMS16(16) : "l"(a), "l"(b), "r"(add));
    if (N == 128)
        asm volatile(WGMMA_CODE("128", NAMES64, "%64", "%65", "%66", "0, 0")
                     : SUMS64(0) : "l"(a), "l"(b), "r"(add));
    if (N == 256)
        asm volatile(WGMMA_CODE("256", NAMES128, "%128", "%129", "%130", "0, 0")
                     : SUMS64(0), SUMS64(64) : "l"(a), "l"(b), "r"(add));
}
#endif

/* =================================================================================================
   4.  GEMV: a few rows

   A block first asks for its first weights, then waits for the kernel in front of it, brings the
   rows to shared memory, and from then on streams weights: each warp has a ring buffer in shared
   memory of its own, which it fills, reads, dequantises and multiplies. Four warps share K, one for
   each chain (split-K inside a block), and add their sums through shared memory.

   Up to CHAIN_ROWS rows of x come to shared memory. A single one the block norms itself; several,
   of which each block would have to norm all, are normed before (norm_row_kernel), and four copies,
   one for a chain, bring them. Where there is no norm (ADD, with one or two groups for a block)
   they do not stay: a span of them comes with that of the weights, to the same slot of the ring. */

static __device__ const float *row_of_x(const struct product_f16 &j, int r) {
    return j.x + (int64_t)(j.which != NULL ? j.which[r] : r) * j.p[0].w.cols;
}

/* The rows to shared memory: one that is still to be normed, by the block; else those that lie in
   f16, as they lie, of each chain the spans begin .. begin + own - 1; its barrier tells of them. */
static __device__ void stage_rows(const struct product_f16 &j, char *shared, uint64_t *ready,
                                  int begin, int own, int first_team) {
    const int D = j.p[0].w.cols, span = 2 * j.in.span;
    if (j.norm != NULL) {
        const struct packed out = {(__half *)shared, j.in.ld, 0, j.in.up, SPAN, SPAN};
        const struct row_part x = load_part(row_of_x(j, 0), D), norm = load_part(j.norm, D);
        norm_row(out, 0, x, norm, j.eps, D);
        __syncthreads();
        return;
    }
    char *to = shared + begin * span;
    const char *from = (const char *)j.in.h + (int64_t)begin * span;
#if BULK
    if (own > 0 && first_team && elected()) {
        barrier_expect(ready, own * span);
        copy_bulk(to, from, own * span, ready);
    }
    if (own > 0) barrier_wait(ready, 0);
#else
    if (own > 0 && first_team) copy_bulk(to, from, own * span, ready);
    end_copies();
    wait_for_copies<0>();
    __syncthreads();
#endif
}

/* Of all products, also GEMM's: the order of the four. */
static __device__ float sum_of_chains(const float *c, int step) {
    return ((c[0] + c[step]) + c[2 * step]) + c[3 * step];
}

/* The norm, which is a weight, comes to the L2 cache before the rows are there. */
static __device__ void prefetch_norm(const struct product_f16 &j) {
    const int i = (int)threadIdx.x * 32; /* a line of 128 bytes */
    if (j.norm != NULL && i < j.p[0].w.cols)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(j.norm + i));
}

/* A span's four steps: rows g (w0) and g + 8 (w1) of w by row g of x. */
static __device__ void multiply_span(float *c, const __half2 *w0, const __half2 *w1,
                                     const uint4 *x) {
    const uint32_t u[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
#pragma unroll
    for (int s = 0; s < 8; s += 2)
        mma(c, as_word(w0[s]), as_word(w1[s]), as_word(w0[s + 1]), as_word(w1[s + 1]), u[s],
            u[s + 1]);
}

/* The epilogue of one sum: y or out at row r of x, row o of the matrix. other: SWIGLU's second sum;
   what y was. */
template <int KIND>
static __device__ void epilogue_one(const struct product_f16 &j, const struct part &p, int r, int o,
                                    float sum, float other) {
    const float down = 1 / j.in.up;
    const int N = p.w.rows;
    if (r >= j.rows || o >= (KIND == SWIGLU ? j.out.ld : N)) return;
    const int64_t at = (int64_t)r * N + o;
    const float bias = p.bias != NULL && o < N ? p.bias[o] : 0;
    if (KIND == STORE) p.y[at] = fmaf(sum, down, bias);
    if (KIND == ADD) p.y[at] = fmaf(sum, down, other) + (p.bias != NULL ? bias : -0.0f);
    if (KIND == SWIGLU)
        j.out.h[row_at(j.out, r, o)] =
            __float2half_rn(o < N ? silu(sum * down) * (other * down) * j.out.up : 0);
}

/* Weights come through a ring buffer in shared memory. Of a group of 16 rows a warp reads two tiles
   of 8 rows, of each some spans that follow each other: one run of elements, one of scales. A slot
   of the ring has CHUNK spans of both tiles, elements before scales, and behind them those of x if
   they come with the weights; `full` tells when they are there. */
template <int TYPE> struct ring {
    enum {
        SCALED = TYPE == LVM_Q8_0 || TYPE == LVM_Q4_0,
        CHUNK = 2,         /* spans of a slot */
        PAIRS = CHUNK * 2, /* its tiles */
        TILE = TYPE == LVM_Q4_0 ? 256 : TYPE == LVM_Q8_0 ? 512 : 1024, /* bytes of a tile, */
        SCALES = SCALED * 32,                                          /* of its scales, */
        SLOT = PAIRS * (TILE + SCALES),                                /* of a slot's weights */
        SLOTS = SCALED ? 3 : 2,
        BYTES = SLOTS * SLOT
    };
};

/* 16 columns of a row of each of the two tiles, from a slot; span: of the chunk. */
template <int TYPE>
static __device__ void load_raw(const char *slot, int span, struct raw16<TYPE> *raw) {
    typedef struct ring<TYPE> R;
    const int lane = (int)threadIdx.x % 32;
    for (int i = 0; i < 2; i++) {
        const int tile = i * R::CHUNK + span;
        const char *from = slot + tile * R::TILE + lane * (R::TILE / 32);
        if (TYPE == LVM_Q4_0) {
            uint2 v = *(const uint2 *)from;
            raw[i].v[0].x = v.x, raw[i].v[0].y = v.y;
        } else
            for (int k = 0; k < R::TILE / 512; k++) raw[i].v[k] = ((const uint4 *)from)[k];
        from = slot + R::PAIRS * R::TILE + tile * R::SCALES; /* [row][32 columns] */
        if (R::SCALED) raw[i].d = ((const __half *)from)[lane / 2];
    }
}

/* Groups of 16 rows of w (SWIGLU: 8 of each matrix), of all matrices of a product. */
template <int KIND>
static __host__ __device__ int groups_of(const struct product_f16 &j, int part) {
    return KIND == SWIGLU ? j.out.ld / 8 : (j.p[part].w.rows + 15) / 16;
}

template <int KIND> static __host__ __device__ int all_groups(const struct product_f16 &j) {
    int n = groups_of<KIND>(j, 0);
    for (int i = 1; KIND != SWIGLU && i < j.n; i++) n += groups_of<KIND>(j, i);
    return n;
}

/* The matrix of a group, and its number there. */
template <int KIND> static __device__ int part_of(const struct product_f16 &j, int *group) {
    int part = 0;
    while (KIND != SWIGLU && part + 1 < j.n && *group >= groups_of<KIND>(j, part))
        *group -= groups_of<KIND>(j, part++);
    return part;
}

/* What a warp fetches: its chain's spans of each of its team's groups, one after the other. */
template <int TYPE, int KIND> struct weight_stream {
    const uint8_t *q[2];     /* of both tiles: what is fetched next */
    const __half *d[2];
    int group, groups, step; /* the group that is fetched; how many there are; to the team's next */
    int begin, own, left;    /* of a group's spans the first and the number; those still to fetch */
    char *ring;
    uint64_t *full;          /* a barrier a slot */
    uint32_t slots, to, at;  /* of the ring; next to fill; next to read */
    uint32_t round;          /* 0 and 1 in turn: the parity of `full` */
    int slot;                /* bytes of a slot */
    const char *x;           /* the spans of x that are fetched next, if they are, */
    int span;                /* bytes of each, else 0 */
};

/* To the first of the warp's spans of the group that comes next. */
template <int TYPE, int KIND>
static __device__ void point_stream(const struct product_f16 &j,
                                    struct weight_stream<TYPE, KIND> *s) {
    int group = s->group, part;
    s->left = s->own;
    s->x = (const char *)j.in.h + (int64_t)s->begin * s->span;
    if (group >= s->groups) return;
    part = part_of<KIND>(j, &group);
    for (int i = 0; i < 2; i++) {
        const struct matrix &w = j.p[KIND == SWIGLU ? i : part].w;
        const int tile = min(KIND == SWIGLU ? group : 2 * group + i, (w.rows - 1) / 8);
        const int64_t at = ((int64_t)tile * (w.ld / SPAN) + s->begin) * 8 * SPAN;
        s->q[i] = w.q + bytes_of<TYPE>(at);
        s->d[i] = w.d + at / QK;
    }
}

/* n spans of both tiles, and of x unless that is not there yet, set out for a slot. */
template <int TYPE, int KIND>
static __device__ void copy_chunk(const struct weight_stream<TYPE, KIND> &s, int n, int inputs) {
    typedef struct ring<TYPE> R;
    char *to = s.ring + s.to * s.slot, *scales = to + R::PAIRS * R::TILE;
    uint64_t *full = s.full + s.to;
#if BULK
    if (!elected()) return;
    barrier_expect(full, n * (2 * (R::TILE + R::SCALES) + s.span));
#endif
    for (int i = 0; i < 2; i++) {
        copy_bulk(to + i * R::CHUNK * R::TILE, s.q[i], n * R::TILE, full);
        if (R::SCALED) copy_bulk(scales + i * R::CHUNK * R::SCALES, s.d[i], n * R::SCALES, full);
    }
    if (inputs && s.span > 0) copy_bulk(to + R::SLOT, s.x, n * s.span, full);
}

/* Sets out for the next chunk, if there is one. */
template <int TYPE, int KIND>
static __device__ void fetch_chunk(const struct product_f16 &j,
                                   struct weight_stream<TYPE, KIND> *s, int inputs) {
    typedef struct ring<TYPE> R;
    if (s->group < s->groups) {
        const int n = min((int)R::CHUNK, s->left);
        copy_chunk(*s, n, inputs);
        for (int i = 0; i < 2; i++) {
            s->q[i] += n * R::TILE;
            s->d[i] += n * R::SCALES / 2;
        }
        s->x += n * s->span;
        if ((s->left -= n) == 0) {
            s->group += s->step;
            point_stream(j, s);
        }
    }
    s->to = s->to + 1 < s->slots ? s->to + 1 : 0;
    if (!BULK) end_copies();
}

/* The spans of x for the slots that are being filled, from a warp's first group and x on. */
template <int TYPE, int KIND>
static __device__ void fetch_inputs(const struct weight_stream<TYPE, KIND> &s, int group,
                                    const char *x) {
    typedef struct ring<TYPE> R;
    if (elected())
#pragma unroll 1
        for (uint32_t i = 0, at = 0; i < s.slots && group < s.groups; i++) {
            const uint32_t n = min((uint32_t)R::CHUNK, s.own - at);
            copy_bulk(s.ring + i * s.slot + R::SLOT, x + at * s.span, n * s.span, s.full + i);
            if ((at += n) == s.own) at = 0, group += s.step;
        }
    if (BULK) return;
    end_copies();
    wait_for_copies<0>();
}

/* Waits for the warp's next chunk. The slot of the chunk before has not been filled again, so that
   of all groups of copies the last slots - 2 may still be under way. */
template <int TYPE, int KIND>
static __device__ const char *wait_for_chunk(struct weight_stream<TYPE, KIND> *s) {
    const char *slot = s->ring + s->at * s->slot;
#if BULK
    barrier_wait(s->full + s->at, s->round);
#else
    if (s->slots >= 6) wait_for_copies<4>();
    else if (s->slots >= 3) wait_for_copies<1>();
    else wait_for_copies<0>();
    __syncwarp();
#endif
    s->at = s->at + 1 < s->slots ? s->at + 1 : 0;
    s->round ^= s->at == 0;
    return slot;
}

/* A warp's own barriers. */
static __device__ void start_barriers(uint64_t *b, uint32_t n) {
#if BULK
    if (threadIdx.x % 32 < n) barrier_init(b + threadIdx.x % 32, 1);
    barriers_made();
    __syncwarp();
#endif
}

/* Where a thread's 16 columns of each span of x lie: in shared memory, by themselves (see
   stage_rows) or with the weights, or as f16 in memory. Distances are bytes. */
struct inputs {
    const char *x; /* its first span, of a single tile's row or else of row 0; */
    int at;        /* or the same in a slot of the ring */
    int second;    /* from the first 8 columns to the others */
    int row, span; /* to the next row, to the next span */
    int last;      /* row; those behind give sums that nobody looks at */
};

/* Row g, or where there is none another in which the same columns have changed places. */
static __device__ int row_there(int g, int last) {
    return g <= last ? g : last > 0 ? g & 1 : 0;
}

/* from: where x lies, of which the warp's first span is number `begin`; at: where in a slot. */
static __device__ struct inputs inputs_of(const struct product_f16 &j, const char *from, int begin,
                                          int at, int tiles) {
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4, last = j.rows - 1;
    struct inputs in = {NULL, at, g % 2 ? -16 : 16, 2 * j.in.row, 2 * j.in.span, last};
    in.at += 32 * t + g % 2 * 16 + (tiles == 1 ? row_there(g, last) * in.row : 0);
    in.x = from + (int64_t)begin * in.span + (in.at - at);
    return in;
}

template <int TILES>
static __device__ void load_inputs(const struct inputs &in, const char *at, uint4 (*x)[2]) {
    const int g = (int)threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const char *from = at + (TILES > 1 ? row_there(n * 8 + g, in.last) * in.row : 0);
        x[n][0] = *(const uint4 *)from;
        x[n][1] = *(const uint4 *)(from + in.second);
    }
}

/* Lets the compiler compute these before what follows. */
static __device__ void keep(const __half2 *w) {
    for (int i = 0; i < 8; i++) asm volatile("" ::"r"(as_word(w[i])));
}

/* A warp's spans of a group, c += its part of the sums, two in turn: while tensor cores work at one
   the next becomes f16, and a further one is on its way from shared memory. */
template <int TYPE, int KIND, int TILES, int STREAMED>
static __device__ void multiply_group(const struct product_f16 &j,
                                      struct weight_stream<TYPE, KIND> *s,
                                      const struct inputs &in, float (*c)[4]) {
    enum { AHEAD = TILES == 1 /* of x too */ };
    struct raw16<TYPE> raw[2] = {};
    __half2 w[2][8], v[2][8];
    uint4 x[TILES][2], y[TILES][2];
    auto expand = [&](__half2 (*to)[8]) {
        dequantise16<TYPE>(raw[0], to[0]);
        dequantise16<TYPE>(raw[1], to[1]);
    };
    auto multiply = [&](int span, __half2 (*w16)[8], uint4 (*x16)[2]) {
        if (!AHEAD) load_inputs<TILES>(in, in.x + span * in.span, x16);
#pragma unroll
        for (int n = 0; n < TILES; n++) multiply_span(c[n], w16[0], w16[1], x16[n]);
    };
    const int last = s->own - 1;
    const char *slot = wait_for_chunk(s);
    auto ahead = [&](int span, int of_chunk, uint4 (*to)[2]) { /* where there is none, as of w */
        if (STREAMED) load_inputs<TILES>(in, slot + in.at + of_chunk * in.span, to);
        else if (AHEAD) load_inputs<TILES>(in, in.x + min(span, last) * in.span, to);
    };
    load_raw(slot, 0, raw);
    ahead(0, 0, x);
    expand(w);
#pragma unroll 1
    for (int k = 0;; k += 2) {
        load_raw(slot, 1, raw); /* where there is none, something else that is there */
        ahead(k + 1, 1, y);
        multiply(k, w, x);
        expand(v);
        if (k < last) {
            if (k + 2 <= last) slot = wait_for_chunk(s);
            load_raw(slot, 0, raw);
            ahead(k + 2, 0, x);
            multiply(k + 1, v, y);
            expand(w);
            keep(w[0]);
            keep(w[1]);
        }
        __syncwarp();
        fetch_chunk(j, s, 1);
        if (k + 2 > last) return;
    }
}

/* What a sum is added to. */
static __device__ float residual(const struct product_f16 &j, const struct part &p, int r, int o) {
    return r < j.rows && o < p.w.rows ? __ldcg(p.y + (int64_t)r * p.w.rows + o) : 0;
}

/* The sums of a team's group, c[16 rows of w][8 TILES rows of x] of each chain, to their place. */
template <int KIND, int TILES>
static __device__ void epilogue_group(const struct product_f16 &j, int group, float (*c)[4],
                                      float (*sums)[TILES * 4][32], int team, int chain,
                                      float before) {
    const int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const struct part &p = j.p[part_of<KIND>(j, &group)];
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) sums[chain][i][lane] = c[i / 4][i % 4];
    asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(32 * (int)CHAINS) : "memory");
#pragma unroll 1
    for (int i = chain; i < TILES * 4; i += CHAINS) {
        const int r = i / 4 * 8 + 2 * t + i % 2,
                  o = KIND == SWIGLU ? group * 8 + g : group * 16 + g + i % 4 / 2 * 8;
        if (KIND == SWIGLU && i % 4 >= 2) break;
        const float sum = sum_of_chains(&sums[0][i][lane], TILES * 4 * 32);
        float other = 0;
        if (KIND == SWIGLU) other = sum_of_chains(&sums[0][i + 2][lane], TILES * 4 * 32);
        if (KIND == ADD) other = TILES == 1 ? before : residual(j, p, r, o);
        epilogue_one<KIND>(j, p, r, o, sum, other);
    }
    asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(32 * (int)CHAINS) : "memory");
}

/* y or out for up to 8 TILES rows of x. A block a multiprocessor. A team of four warps takes one
   group of 16 rows of w after the other, a warp one of their four chains; where there are no more
   groups than blocks, one team has the memory of all. Reads w, in tiles, once, the first spans
   before the kernel in front has ended, and x, f16 or a single row of f32 with a norm, from shared
   memory (SHARED: up to CHAIN_ROWS rows; ADD: span by span) or as f16 from the L2 cache; writes y
   in f32 rows, or out. Loops are not unrolled: instructions that run for the first time take longer
   than others. Floor: the bytes of w over the memory's bandwidth. */
template <int TYPE, int KIND, int TILES, int SHARED>
__global__ void __launch_bounds__(32 * CHAINS * (SHARED ? TEAMS : TALL_TEAMS), TILES > 4 ? 1 : 2)
    gemv_kernel(struct product_f16 j, int slots) {
    extern __shared__ __align__(128) char shared[];
    typedef struct ring<TYPE> R;
    enum { N = SHARED ? TEAMS : TALL_TEAMS, STREAMED = SHARED && KIND == ADD,
           STAGED = SHARED && !STREAMED };
    __shared__ float sums[N][CHAINS][TILES * 4][32];
    __shared__ uint64_t full[BARRIERS], ready[CHAINS];
    const int warp = __shfl_sync(0xffffffff, (int)threadIdx.x / 32, 0), /* known to be uniform */
              team = warp / CHAINS, chain = warp % CHAINS, lane = (int)threadIdx.x % 32,
              spans = j.p[0].w.ld / SPAN, each = (spans + CHAINS - 1) / CHAINS;
    struct weight_stream<TYPE, KIND> s = {};
    s.groups = all_groups<KIND>(j);
    s.step = (int)gridDim.x * N;
    s.group = (int)(blockIdx.x + gridDim.x * team);
    s.begin = min(spans, chain * each);
    s.own = min(spans - s.begin, each);
    s.span = STREAMED ? 2 * j.in.span : 0;
    s.slot = R::SLOT + R::CHUNK * s.span;
    s.slots = (uint32_t)slots;
    const int alone = s.groups <= (int)gridDim.x, /* the first team, which has all of the ring */
              place = (alone ? chain : warp) * slots;
    const char *x = STAGED ? shared + (alone ? 1 : N) * CHAINS * slots * s.slot
                           : (const char *)j.in.h;
    s.ring = shared + place * s.slot;
    s.full = full + place;
    const int first_group = s.group, last_group = s.groups;
    if (s.own == 0) s.groups = 0; /* nothing to fetch */
    if (s.group < s.groups) start_barriers(s.full, s.slots);
    if (STAGED && j.norm == NULL) {
        if (warp == 0) start_barriers(ready, CHAINS);
        __syncthreads();
    }
    point_stream(j, &s);
    const char *first_x = s.x;
#pragma unroll 1
    for (int i = 0; i < slots; i++) fetch_chunk(j, &s, 0);
    prefetch_norm(j);
    const struct inputs in = inputs_of(j, x, s.begin, R::SLOT, TILES);
    if (KIND == STORE && j.rows == 1) let_next_start(); /* attention, which has much to fetch */
    wait_for_inputs();
    if (STREAMED) fetch_inputs(s, first_group, first_x);
    if (STAGED) stage_rows(j, (char *)x, ready + chain, s.begin, s.own, team == 0);
#pragma unroll 1
    for (int group = first_group; group < last_group; group += s.step) {
        float c[TILES][4] = {}, before = 0;
        if (KIND == ADD && TILES == 1) /* of what epilogue_group lets this thread write */
            before = residual(j, j.p[0], lane % 4 * 2 + chain % 2,
                              group * 16 + lane / 4 + chain / 2 * 8);
        if (s.own > 0) multiply_group<TYPE, KIND, TILES, STREAMED>(j, &s, in, c);
        epilogue_group<KIND, TILES>(j, group, c, sums[team], team, chain, before);
    }
    if (!BULK) wait_for_copies<0>();
}

/* Shared memory. */
enum {
    RINGS_MOST = TALL_TEAMS * CHAINS * ring<LVM_F16>::BYTES, /* the largest for many rows of x */
    SUMS_BYTES = 8 << 10,                                    /* what gemv_kernel declares beside, */
    TALL_BYTES = 40 << 10                                    /* with tiles for 64 rows of x */
};

/* Bytes of shared memory for a product's rows, 0 where these are read as f16 from memory. */
static int staged_bytes(const struct queue *q, const struct product_f16 *j) {
    const int type = j->p[0].w.type;
    const int ring_bytes = type == LVM_Q8_0 ? (int)ring<LVM_Q8_0>::BYTES
                           : type == LVM_Q4_0 ? (int)ring<LVM_Q4_0>::BYTES : ring<LVM_F16>::BYTES;
    int64_t bytes = (int64_t)j->rows * 2 * j->in.ld;
    int64_t room = min64(STAGED_MOST, q->shared - GEMV_WARPS * ring_bytes - SUMS_BYTES);
    return j->rows <= CHAIN_ROWS && bytes <= room ? (int)bytes : 0;
}

/* How a GEMV has its rows in shared memory: slots of each ring, bytes of all. 0: it has not. */
struct gemv_shared {
    int slots, bytes;
};

/* Rings take what leaves room for the next kernel's block: beside the rows half of the memory, and
   of a product whose rows come with the weights RINGS_BESIDE. */
template <int TYPE, int KIND>
static struct gemv_shared shared_of(const struct queue *q, const struct product_f16 *j, int alone) {
    typedef struct ring<TYPE> R;
    const int least = alone ? TEAMS * R::SLOTS : R::SLOTS, rings = alone ? CHAINS : GEMV_WARPS,
              all = rings * (R::SLOT + (KIND == ADD ? R::CHUNK * 2 * j->in.span : 0)),
              staged = KIND == ADD ? 0 : staged_bytes(q, j),
              slots = KIND == ADD
                  ? (int)max64(2, min64(least, RINGS_BESIDE / all))
                  : (int)min64(BARRIERS / rings, max64(least, (q->shared / 2 - staged) / all)),
              bytes = all * slots + staged;
    if (j->rows > CHAIN_ROWS || bytes > q->shared - SUMS_BYTES || (KIND != ADD && staged == 0))
        return {0, 0};
    return {slots, bytes};
}

/* A block of a kernel and one of the next shall stand on a multiprocessor side by side, so that the
   second has its first weights when the first ends; two of one kernel must not, or it has other
   multiprocessors idle. So every other kernel of a chain (q, k, v, before attention and o; gate and
   up, before down) takes half of the shared memory, whether it needs as much or not. */
template <int TYPE, int KIND>
static void launch_gemv(struct queue *q, const struct product_f16 *product) {
    struct product_f16 j = *product;
    typedef struct ring<TYPE> R;
    const int least = KIND == ADD ? 0 : q->shared / 2 - (6 << 10),
              tall = TALL_TEAMS * CHAINS * R::BYTES, threads = 32 * TALL_TEAMS * CHAINS;
    const int most = q->shared >= RINGS_MOST + TALL_BYTES ? FEW_ROWS : FEW_ROWS / 2;
    dim3 grid((unsigned)min64(q->sms, all_groups<KIND>(j)));
    const int alone = all_groups<KIND>(j) <= (int)grid.x;
    const struct gemv_shared s = shared_of<TYPE, KIND>(q, &j, alone);
    if (s.slots > 0) {
        launch(q, "gemv_kernel", gemv_kernel<TYPE, KIND, 1, 1>, grid, GEMV_THREADS,
               (size_t)max64(s.bytes, least), j, s.slots);
        return;
    }
    const int slots = alone ? TALL_TEAMS * R::SLOTS : R::SLOTS;
    for (int left = j.rows; left > 0; left -= most) {
        j.rows = (int)min64(most, left);
        (j.rows <= 32 ? gemv_kernel<TYPE, KIND, 4, 0> : gemv_kernel<TYPE, KIND, 8, 0>)
            <<<grid, threads, tall, q->stream>>>(j, slots);
        launched(q, "gemv_kernel");
        for (int i = 0; j.p[0].y != NULL && i < j.n; i++)
            j.p[i].y += (int64_t)most * j.p[i].w.rows;
        j.in.h += (int64_t)most * j.in.ld;
        j.out.h += (int64_t)most * j.out.ld;
    }
}

/* The same as norm_pack_kernel for a few rows, not panels, of up to ROW_MOST columns. The product
   may start at once, for it brings weights before it waits. Grid: [rows]. Floor: a launch. */
__global__ void __launch_bounds__(ROW_THREADS)
    norm_row_kernel(const float *x, const float *norm, float eps, int D, const int *which,
                    struct packed out) {
    const int i = (int)blockIdx.x;
    const struct row_part w = load_part(norm, D);
    let_next_start();
    wait_for_inputs();
    out.panels = 0; /* the compiler knows it now */
    x += (int64_t)(which != NULL ? which[i] : i) * D;
    norm_row(out, i, load_part(x, D), w, eps, D);
}

/* out = rmsnorm(x), whose row i is row which[i] of x, or i. Reads f32 rows, writes f16, in rows or
   panels, a warp a row. Grid: [rows / 8]. Floor: bytes in + bytes out. */
__global__ void norm_pack_kernel(const float *x, const float *norm, float eps, int D,
                                 const int *which, int rows, struct packed out) {
    const int i = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32;
    wait_for_inputs();
    if (i >= rows) return;
    const float *row = x + (int64_t)(which != NULL ? which[i] : i) * D;
    if (out.panels && D <= 2048) norm_to_panel(out, i, row, norm, eps, D);
    else write_normed(out, i, row, norm, rms_scale(row, D, eps), D);
}

/* =================================================================================================
   5.  GEMM: many rows

   Weights become f16 once for all rows, not once for each tile of them, while tensor cores are busy
   with the product before. Both operands lie in panels: tiles of 64 columns whose rows take 128
   bytes, so that a tile is one contiguous piece of memory, swizzled as tensor cores read it from
   shared memory (see struct packed): 128 rows of x are 16 KiB, 256 rows of w 32 KiB. The rows of w
   stand in an order that suits the epilogue: a thread of the tensor cores' layout holds sums
   8 n + 2 t and 8 n + 2 t + 1 of a tile's 256 (n: 0 .. 31, t: 0 .. 3), and

       alone      these are rows 16 (n / 2) + 4 t + 2 (n % 2) + (0, 1) of w: of two n, four
                  neighbours of y, 16 bytes
       gate, up   n % 16 < 8 is the gate's, n % 16 >= 8 the same rows of up; of four n a thread
                  holds what makes 16 bytes of a panel of the next product */

enum {
    X_ROWS = 128, W_ROWS = 256, /* of a tile */
    ROW_BYTES = SPAN * 2,
    X_BYTES = X_ROWS * ROW_BYTES, W_BYTES = W_ROWS * ROW_BYTES
};

/* Which of 64 rows of w is row i of 64 in a tile: of a matrix alone; of gate or up. */
static __device__ int row_alone(int i) {
    return i / 16 * 16 + i % 8 / 2 * 4 + i / 8 % 2 * 2 + i % 2;
}

static __device__ int row_of_pair(int i) {
    return i / 8 % 4 * 16 + i / 32 * 8 + i % 8;
}

/* Up to three matrices of one type that are dequantised into panels at h, one after the other; or
   gate and up, together (pair). first: the matrix's first tile, behind the last matrix INT_MAX. */
struct unpacked {
    struct matrix w[3];
    int first[3], tiles, pair;
    __half *h;
};

/* A warp's unit of work, number `unit` of all: 16 rows of a panel's tile; zeros behind a matrix's
   last row. Lanes take 16 columns of two rows, a warp so two tiles of 8 rows. */
template <int TYPE>
static __device__ void dequantise_unit(const struct unpacked &p, unsigned unit, unsigned spans) {
    const int lane = (int)threadIdx.x % 32, t = lane % 4, row = (int)(unit % 16) * 16 + lane / 4;
    const unsigned tile = unit / 16 / spans, span = unit / 16 % spans;
    const int m = p.pair ? row / 64 % 2
                         : ((int)tile >= p.first[1]) + ((int)tile >= p.first[2]);
    const struct matrix &w = p.w[m];
    uint4 *h = (uint4 *)p.h + ((int64_t)(tile * spans + span) * W_ROWS + row) * 8;
    struct raw16<TYPE> raw[2] = {};
    int there[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = row + 8 * i, from =
            p.pair ? (int)tile * 128 + r / 128 * 64 + row_of_pair(r % 64)
                   : ((int)tile - p.first[m]) * W_ROWS + r / 64 * 64 + row_alone(r % 64);
        there[i] = from < w.rows;
        if (there[i]) fetch16<TYPE>(w, from, (int)span * SPAN + 16 * t, &raw[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        __half2 v[8];
        uint32_t u[8];
        dequantise16<TYPE>(raw[i], v);
#pragma unroll
        for (int k = 0; k < 8; k++) u[k] = there[i] ? as_word(v[k]) : 0;
        transpose4(u, t, 1);
        transpose4(u + 4, t, 1);
        /* used much later, by when it has left the L2 cache in any case */
        __stcs(h + 64 * i + (t ^ (row & 7)), make_uint4(u[0], u[1], u[2], u[3]));
        __stcs(h + 64 * i + ((t + 4) ^ (row & 7)), make_uint4(u[4], u[5], u[6], u[7]));
    }
}

/* Warp number `warp` of so many: its share of all units. */
template <int TYPE>
static __device__ void dequantise_units(const struct unpacked &p, int warp, int warps) {
    const unsigned spans = (unsigned)p.w[0].ld / SPAN, units = (unsigned)p.tiles * spans * 16;
    for (unsigned i = (unsigned)warp; i < units; i += (unsigned)warps)
        dequantise_unit<TYPE>(p, i, spans);
}

static __device__ void dequantise_panels(const struct unpacked &p, int warp, int warps) {
    switch (p.w[0].type) {
    case LVM_F16: dequantise_units<LVM_F16>(p, warp, warps); break;
    case LVM_BF16: dequantise_units<LVM_BF16>(p, warp, warps); break;
    case LVM_Q8_0: dequantise_units<LVM_Q8_0>(p, warp, warps); break;
    case LVM_Q4_0: dequantise_units<LVM_Q4_0>(p, warp, warps);
    }
}

/* Reads matrices in tiles of 8 rows, writes them in f16 as panels, a warp a unit at a time. Floor:
   bytes in + bytes out. */
__global__ void __launch_bounds__(THREADS)
    panels_kernel(const __grid_constant__ struct unpacked p) {
    wait_for_inputs();
    dequantise_panels(p, (int)(blockIdx.x * WARPS + threadIdx.x / 32), (int)gridDim.x * WARPS);
}

enum { LATER = 3 };

/* y = x w^T of many rows, with its epilogue. */
struct gemm {
    const __half *x, *w; /* panels */
    int rows, ld;        /* of x */
    int tiles;           /* of w: of all matrices, which follow each other */
    int group;           /* pairs along the rows of x that run together, see output_tile_of */
    float down;          /* takes x's power of two out again */
    struct {
        float *y;          /* [rows][N] */
        const float *bias; /* [N] or NULL */
        int N, first;      /* first: its first tile; behind the last matrix: INT_MAX */
    } out[3];
    struct packed h;              /* SWIGLU's result */
    struct unpacked later[LATER]; /* weights of the products to come, for idle warps */
};

/* Epilogues. A thread brings sums of B blocks of 8 columns of rows `row` and row + 8, [B][2][2]; of
   a tile's blocks these are n0 on, 16 or (B = 8) four and the four that come 8 later. Four
   neighbours of y come from two blocks: number j of these begins at column epilogue_column. The
   work has B / 4 parts, so that tensor cores can work between them. */
static __device__ int epilogue_column(int B, int j) {
    return B == 16 ? 16 * j : j / 2 * 64 + j % 2 * 16;
}

/* y += v. Each element has this one addition, so that nothing depends on an order. */
static __device__ void add_float4(float *y, float4 v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(y), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w) : "memory");
#else
    float4 u = *(const float4 *)y;
    *(float4 *)y = make_float4(u.x + v.x, u.y + v.y, u.z + v.z, u.w + v.w);
#endif
}

/* Four columns of a row, of two blocks: y = sum down + bias, or y += sum down, which is exact. */
template <int KIND>
static __device__ void epilogue_float4(const float (*c)[4], int i, float down, const float *bias,
                                       float *y) {
    float4 v = bias != NULL ? *(const float4 *)bias : make_float4(0, 0, 0, 0);
    v = make_float4(fmaf(c[0][2 * i], down, v.x), fmaf(c[0][2 * i + 1], down, v.y),
                    fmaf(c[1][2 * i], down, v.z), fmaf(c[1][2 * i + 1], down, v.w));
    if (KIND == ADD) add_float4(y, v);
    else *(float4 *)y = v;
}

/* The same, one by one: of `left` columns. ADD: y = (sum down + y) + bias. */
template <int KIND>
static __device__ void epilogue_edge(const float (*c)[4], int i, float down, const float *bias,
                                     float *y, int left) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k >= left) continue;
        const float b = bias != NULL ? bias[k] : 0;
        const float s = fmaf(c[k / 2][2 * i + k % 2], down, KIND == ADD ? y[k] : b);
        y[k] = KIND == ADD && bias != NULL ? s + b : s;
    }
}

/* STORE and ADD, part `part`: four of a row's B / 2 float4s. */
template <int KIND, int B>
static __device__ void epilogue_sums(const struct gemm &p, int part, int tile, int row, int n0,
                                     const float (*c)[4]) {
    const auto &o = p.out[(tile >= p.out[1].first) + (tile >= p.out[2].first)];
    const int first = (tile - o.first) * W_ROWS + n0 * 8, col = first + (int)threadIdx.x % 4 * 4;
    const int i = part % 2, r = row + 8 * i;
    float *y = o.y + (int64_t)r * o.N + col;
    const float *bias = o.bias != NULL ? o.bias + col : NULL;
    const int whole = o.N % 4 == 0 && first + 64 + 4 * B <= o.N && (KIND == STORE || bias == NULL);
    if (r >= p.rows) return;
    if (whole) {
#pragma unroll
        for (int j = part / 2 * 4; j < part / 2 * 4 + 4; j++)
            epilogue_float4<KIND>(c + 2 * j, i, p.down,
                                  bias != NULL ? bias + epilogue_column(B, j) : NULL,
                                  y + epilogue_column(B, j));
    } else {
#pragma unroll
        for (int j = part / 2 * 4; j < part / 2 * 4 + 4; j++)
            epilogue_edge<KIND>(c + 2 * j, i, p.down,
                                bias != NULL ? bias + epilogue_column(B, j) : NULL,
                                y + epilogue_column(B, j), o.N - col - epilogue_column(B, j));
    }
}

/* The gate's sums are in the first half of the blocks, up's in the second; four of each make 16
   bytes of a panel, a chunk: columns 16 n + 2 chunk + (0, 1). */
template <int B>
static __device__ void epilogue_swiglu(const struct gemm &p, int part, int tile, int row, int n0,
                                       const float (*c)[4]) {
    const int i = part % 2, r = row + i * 8, chunk = (int)threadIdx.x % 4 + n0 % 8 + part / 2 * 4;
    const int span = tile * 2 + n0 / 16, spans = p.h.ld / SPAN;
    const float(*gate)[4] = c + part / 2 * 4, (*up)[4] = gate + B / 2;
    uint32_t v[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const float *g = gate[n] + i * 2, *u = up[n] + i * 2;
        v[n] = as_word(__floats2half2_rn(silu(g[0] * p.down) * (u[0] * p.down) * p.h.up,
                                         silu(g[1] * p.down) * (u[1] * p.down) * p.h.up));
    }
    const int64_t at = ((int64_t)(r / X_ROWS) * spans + span) * X_ROWS + r % X_ROWS;
    if (r < p.rows && span < spans)
        ((uint4 *)p.h.h)[at * 8 + (chunk ^ (r & 7))] = make_uint4(v[0], v[1], v[2], v[3]);
}

template <int KIND, int B>
static __device__ void epilogue_part(const struct gemm &p, int part, int tile, int row, int n0,
                                     const float (*c)[4]) {
    if (KIND == SWIGLU) epilogue_swiglu<B>(p, part, tile, row, n0, c);
    else epilogue_sums<KIND, B>(p, part, tile, row, n0, c);
}

/* The first span of one of the four parts, each of which is a chain. */
static __device__ int part_start(int spans, int part) {
    return min(spans, (spans + CHAINS - 1) / CHAINS * part);
}

/* ---- GEMM by wgmma (sm_90a) ----

   A block stays on its multiprocessor and computes output tiles of 128 x 256, from 128 rows of x
   and a tile of w: the larger they are, the less of shared memory is read for each product, and
   that is what limits it. Its warps are specialised. One thread, the producer, fills a ring buffer
   of stages in shared memory, a span each, output tile after output tile. Two warp groups, the
   consumers, multiply 64 rows of x each: the chain that goes on takes half of their registers, so
   that of the sums of those before one half is in registers and one in shared memory. The epilogue
   of an output tile runs while tensor cores work on the first stages of the next one. Three warps
   that are left dequantise the weights of products to come. Two blocks make a cluster; they take
   the same rows of w, of which each loads one half for both (multicast). */

enum {
    CLUSTER = 2,
    GEMM_RING = 3,                       /* stages */
    GEMM_RING_BYTES = X_BYTES + W_BYTES, /* of a stage */
    WARP_GROUP = 128,                    /* threads; of two warp groups: */
    CONSUMERS = 2 * WARP_GROUP,
    WGMMA_THREADS = CONSUMERS + WARP_GROUP,
    HELPERS = 3,                         /* warps that dequantise */
    REST_BYTES = CONSUMERS * 64 * 4,     /* the consumers' sums in shared memory */
    WGMMA_SHARED = GEMM_RING * GEMM_RING_BYTES + REST_BYTES,
    EPILOGUE_PARTS = 4
};

/* Pairs of output tiles, one for each block of a cluster: along the rows of x; all. */
static __host__ __device__ int gemm_row_pairs(const struct gemm &p) {
    return (p.rows + X_ROWS * CLUSTER - 1) / (X_ROWS * CLUSTER);
}

static __host__ __device__ int gemm_pairs(const struct gemm &p) {
    return gemm_row_pairs(p) * p.tiles;
}

#if WGMMA

/* Arrives at this barrier of block `rank` of the cluster. */
static __device__ void barrier_arrive_at(uint64_t *b, int rank) {
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(b)),
                 "r"(rank) : "memory");
}

/* copy_bulk to both blocks of a cluster. */
static __device__ void copy_to_both(void *to, const void *from, int bytes, uint64_t *done) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(done)), "h"((uint16_t)3) : "memory");
}

static __device__ void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/* Tile x of x by tile w of w. */
struct output_tile {
    int x, w;
};

/* A block's output tile number n. Those that all blocks compute at a time share the rows of x of
   `group` pairs, which stay in the L2 cache. */
static __device__ struct output_tile output_tile_of(const struct gemm &p, int n) {
    const int i = (int)blockIdx.x / CLUSTER + n * ((int)gridDim.x / CLUSTER);
    const int all = gemm_row_pairs(p);
    const int each = p.group * p.tiles, first = i / each * p.group;
    const int size = min(p.group, all - first), in = i % each;
    struct output_tile q = {(first + in % size) * CLUSTER + (int)blockIdx.x % CLUSTER, in / size};
    return q;
}

/* How many output tiles a block has. */
static __device__ int output_tiles_of(const struct gemm &p) {
    const int clusters = (int)gridDim.x / CLUSTER;
    return (gemm_pairs(p) - (int)blockIdx.x / CLUSTER + clusters - 1) / clusters;
}

/* The producer, one thread: the stages of all output tiles; `at` counts them. */
static __device__ void fill_stages(const struct gemm &p, char *ring, uint64_t *full,
                                   uint64_t *empty) {
    const int spans = p.ld / SPAN, tiles = output_tiles_of(p), part = (int)blockIdx.x % CLUSTER;
    const int x_tiles = (p.rows + X_ROWS - 1) / X_ROWS, own = W_BYTES / CLUSTER * part;
    uint32_t at = 0;
    for (int n = 0; n < tiles; n++) {
        const struct output_tile q = output_tile_of(p, n);
        const char *x = (const char *)p.x + (int64_t)min(q.x, x_tiles - 1) * spans * X_BYTES;
        const char *w = (const char *)p.w + (int64_t)q.w * spans * W_BYTES + own;
        for (int span = 0; span < spans; span++, at++) {
            const uint32_t stage = at % GEMM_RING;
            char *to = ring + stage * GEMM_RING_BYTES;
            barrier_wait(&empty[stage], at / GEMM_RING % 2 ^ 1);
            barrier_expect(&full[stage], GEMM_RING_BYTES);
            copy_bulk(to, x + (int64_t)span * X_BYTES, X_BYTES, &full[stage]);
            copy_to_both(to + X_BYTES + own, w + (int64_t)span * W_BYTES, W_BYTES / CLUSTER,
                         &full[stage]);
        }
    }
}

/* A warp no longer needs a stage: tells both blocks. */
static __device__ void release_stage(uint64_t *empty) {
    if (threadIdx.x % 32 < CLUSTER) barrier_arrive_at(empty, (int)threadIdx.x % 32);
}

/* A consumer warp group's place in the ring: stage number `at` of all; x0: where its rows of x
   begin, in bytes. */
struct consumer {
    const char *ring;
    uint64_t *full, *empty;
    uint32_t at;
    int x0;
};

/* 64 rows of x by 256 of w over a stage's span, in the background: c[8 columns], a new chain or
   not. */
static __device__ void multiply_stage(const struct consumer &r, int add, float (*c)[4]) {
    const uint32_t stage = r.at % GEMM_RING;
    const char *tiles = r.ring + stage * GEMM_RING_BYTES;
    const uint64_t x = tile_descriptor(tiles + r.x0), w = tile_descriptor(tiles + X_BYTES);
    barrier_wait(&r.full[stage], r.at / GEMM_RING % 2);
    products_begin();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma<256>(c[0], x + s * 2, w + s * 2, add || s > 0);
    products_end();
}

/* The stage is done. (It may be waited for at once: meanwhile the other warp group multiplies.) */
static __device__ void end_stage(struct consumer *r) {
    products_wait<0>();
    release_stage(&r->empty[r->at++ % GEMM_RING]);
}

/* Stages first .. n - 1 of a chain. */
static __device__ void multiply_chain(struct consumer *r, int first, int n, float (*c)[4]) {
    for (int i = first; i < n; i++) {
        multiply_stage(*r, i > 0, c);
        end_stage(r);
    }
}

/* A thread's sums of an output tile: of columns 0 .. 127 in registers, of the others in shared
   memory, where a float4 is what epilogue_float4 takes: number 8 i + j of row 8 i, blocks 2 j and
   2 j + 1. */
struct accumulators {
    float kept[16][4];
    float4 *rest; /* the thread's first; the next is WARP_GROUP further */
};

/* sums += a chain's, or become those of the first. */
static __device__ void add_chain(struct accumulators *s, const float (*c)[4], int first) {
#pragma unroll
    for (int k = 0; k < 64; k++)
        s->kept[k / 4][k % 4] = first ? c[k / 4][k % 4] : s->kept[k / 4][k % 4] + c[k / 4][k % 4];
#pragma unroll
    for (int k = 0; k < 16; k++) {
        const float *u = c[16 + k % 8 * 2] + k / 8 * 2, *v = c[17 + k % 8 * 2] + k / 8 * 2;
        float4 sum = first ? make_float4(0, 0, 0, 0) : s->rest[k * WARP_GROUP];
        if (first) sum = make_float4(u[0], u[1], v[0], v[1]);
        else sum = make_float4(sum.x + u[0], sum.y + u[1], sum.z + v[0], sum.w + v[1]);
        s->rest[k * WARP_GROUP] = sum;
    }
}

/* The epilogue of a quarter of a warp's 16 rows of an output tile. */
template <int KIND>
static __device__ void epilogue_quarter(const struct gemm &p, int part, struct output_tile q,
                                        const struct accumulators &s) {
    const int row = q.x * X_ROWS + (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4;
    const int i = part % 2, h = part / 2;
    float rest[16][4]; /* those that this part takes */
    epilogue_part<KIND, 16>(p, part, q.w, row, 0, s.kept);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int j = KIND == SWIGLU ? k / 2 * 4 + h * 2 + k % 2 : h * 4 + k;
        const float4 v = s.rest[(8 * i + j) * WARP_GROUP];
        rest[2 * j][2 * i] = v.x, rest[2 * j][2 * i + 1] = v.y;
        rest[2 * j + 1][2 * i] = v.z, rest[2 * j + 1][2 * i + 1] = v.w;
    }
    epilogue_part<KIND, 16>(p, part, q.w, row, 16, rest);
}

/* The first chain of an output tile, and meanwhile the epilogue of the one before. */
template <int KIND>
static __device__ void multiply_with_epilogue(const struct gemm &p, struct consumer *r, int n,
                                              struct output_tile before, float (*c)[4],
                                              const struct accumulators &s) {
    if (n >= EPILOGUE_PARTS) {
#pragma unroll
        for (int part = 0; part < EPILOGUE_PARTS; part++) {
            multiply_stage(*r, part > 0, c);
            epilogue_quarter<KIND>(p, part, before, s);
            end_stage(r);
        }
        multiply_chain(r, EPILOGUE_PARTS, n, c);
    } else {
#pragma unroll
        for (int part = 0; part < EPILOGUE_PARTS; part++)
            epilogue_quarter<KIND>(p, part, before, s);
        multiply_chain(r, 0, n, c);
    }
}

/* A consumer warp group: its half of all output tiles; behind the last only an epilogue is left. */
template <int KIND>
static __device__ void multiply_output_tiles(const struct gemm &p, char *ring, uint64_t *full,
                                             uint64_t *empty) {
    const int spans = p.ld / SPAN, tiles = output_tiles_of(p);
    const int group = __shfl_sync(0xffffffff, (int)threadIdx.x / 128, 0);
    struct consumer r = {ring, full, empty, 0, group * (X_BYTES / 2)};
    struct output_tile q = {0, 0};
    float c[32][4];
    struct accumulators s;
    s.rest = (float4 *)(ring + GEMM_RING * GEMM_RING_BYTES + group * (REST_BYTES / 2)) +
             threadIdx.x % WARP_GROUP;
    for (int n = 0; n <= tiles; n++) {
        const int count = n < tiles ? part_start(spans, 1) : 0;
        if (n == 0) multiply_chain(&r, 0, count, c);
        else multiply_with_epilogue<KIND>(p, &r, count, q, c, s);
        if (n == tiles) break;
        q = output_tile_of(p, n);
        add_chain(&s, c, 1);
        for (int part = 1; part < CHAINS; part++) {
            const int more = part_start(spans, part + 1) - part_start(spans, part);
            if (more == 0) break;
            multiply_chain(&r, 0, more, c);
            add_chain(&s, c, 0);
        }
    }
}

#endif

/* y = x w^T. Reads x and w in panels, writes y in f32, [rows][N], or h in panels. Grid: clusters,
   as many as fit; without weights to dequantise no more than there are pairs of output tiles.
   Floor: 2 N ld rows operations over the tensor cores' rate. */
template <int KIND>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
    gemm_wgmma_kernel(const __grid_constant__ struct gemm p) {
#if WGMMA
    extern __shared__ __align__(1024) char tiles[];
    __shared__ uint64_t full[GEMM_RING], empty[GEMM_RING];
    if (threadIdx.x == 0) {
        for (int i = 0; i < GEMM_RING; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], CONSUMERS / 32 * CLUSTER);
        }
    }
    barriers_made();
    cluster_sync();
    wait_for_inputs();
    if (threadIdx.x < CONSUMERS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); /* registers change hands */
        multiply_output_tiles<KIND>(p, tiles, full, empty);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        const int helper = (int)threadIdx.x / 32 - (CONSUMERS / 32 + 1);
        if (threadIdx.x == CONSUMERS) fill_stages(p, tiles, full, empty);
        for (int i = 0; helper >= 0 && i < LATER; i++)
            dequantise_panels(p.later[i], (int)blockIdx.x * HELPERS + helper,
                              (int)gridDim.x * HELPERS);
    }
    __syncwarp();
    cluster_sync();
#endif
}

/* ---- GEMM by mma.sync (chips without wgmma) ----

   The same sums from the same panels: a block computes 128 x 128, its eight warps 32 x 64
   each. All threads load, two stages ahead. */

enum { GEMM_STAGES = 3, STAGE_BYTES = 2 * X_BYTES, GEMM_SHARED = GEMM_STAGES * STAGE_BYTES };

/* 128 rows of x, and as many of w; they lie as they will lie in shared memory. */
static __device__ void load_stage(char *stage, const char *x, const char *w) {
    const uint32_t to = shared_address(stage);
#pragma unroll
    for (int i = (int)threadIdx.x * 16; i < X_BYTES; i += THREADS * 16) {
        copy_async<16>(to + i, x + i, 1);
        copy_async<16>(to + X_BYTES + i, w + i, 1);
    }
}

/* A warp's 32 rows of x by 64 of w, over one span: eight blocks of 8 columns, n0 .. n0 + 3 and
   n0 + 8 .. n0 + 11. */
static __device__ void multiply_tiles(const char *stage, int row, int n0, float (*c)[8][4]) {
    const int lane = (int)threadIdx.x % 32, r = row + lane % 16;
    const int o = n0 * 8 + lane / 16 * 8 + lane % 8;
    const uint32_t at = shared_address(stage);
#pragma unroll
    for (int s = 0; s < 4; s++) {
        uint32_t a[2][4], b[4][4];
        const int pa = 2 * s + lane / 16, pb = 2 * s + lane / 8 % 2;
#pragma unroll
        for (int m = 0; m < 2; m++)
            load_matrices(a[m], at + (r + m * 16) * ROW_BYTES + (pa ^ (r & 7)) * 16);
#pragma unroll
        for (int n = 0; n < 4; n++)
            load_matrices(b[n], at + X_BYTES + (o + n / 2 * 64 + n % 2 * 16) * ROW_BYTES +
                                    (pb ^ (o & 7)) * 16);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < 8; n++)
                mma(c[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b[n / 2][n % 2 * 2],
                    b[n / 2][n % 2 * 2 + 1]);
    }
}

/* Reads, writes and floor: as gemm_wgmma_kernel. Grid: [128 rows of x][128 rows of w]. */
template <int KIND>
__global__ void __launch_bounds__(THREADS, 1) gemm_kernel(const __grid_constant__ struct gemm p) {
    extern __shared__ __align__(1024) char tiles[];
    const int half = (int)blockIdx.y, warp = (int)threadIdx.x / 32, spans = p.ld / SPAN;
    const int row = warp / 2 * 32, n0 = warp % 2 * 4, each = part_start(spans, 1);
    const int first = (int)blockIdx.x * X_ROWS + row + (int)threadIdx.x % 32 / 4;
    const char *x = (const char *)p.x + (int64_t)blockIdx.x * spans * X_BYTES;
    const char *w = (const char *)p.w + (int64_t)(half / 2) * spans * W_BYTES + half % 2 * X_BYTES;
    float c[2][8][4] = {}, total[2][8][4];
#pragma unroll
    for (int i = 0; i < 64; i++) total[0][0][i] = -0.0f; /* to which anything may be added */
    for (int span = 0; span < spans + GEMM_STAGES - 1; span++) {
        const int now = span - (GEMM_STAGES - 1);
        wait_for_copies<GEMM_STAGES - 2>();
        __syncthreads();
        if (span < spans)
            load_stage(tiles + span % GEMM_STAGES * STAGE_BYTES, x + (int64_t)span * X_BYTES,
                       w + (int64_t)span * W_BYTES);
        end_copies();
        if (now < 0) continue;
        multiply_tiles(tiles + now % GEMM_STAGES * STAGE_BYTES, row, n0, c);
        if ((now + 1) % each != 0 && now + 1 != spans) continue;
#pragma unroll
        for (int i = 0; i < 64; i++) total[0][0][i] += c[0][0][i], c[0][0][i] = 0;
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int part = 0; part < 2; part++)
            epilogue_part<KIND, 8>(p, part, half / 2, first + m * 16, half % 2 * 16 + n0, total[m]);
}

/* ---- Launches of products ---- */

/* 1: this device runs gemm_wgmma_kernel. (Elsewhere its body is empty and shares no memory.) */
static int has_wgmma(void) {
    cudaFuncAttributes a = {};
    cudaError_t e = cudaFuncGetAttributes(&a, gemm_wgmma_kernel<STORE>);
    if (e != cudaSuccess) cudaGetLastError(); /* or the next launch would be blamed */
    return e == cudaSuccess && a.sharedSizeBytes > 0;
}

/* Lets the kernels have the shared memory that they need. */
static cudaError_t allow_gemm(void) {
    struct { const void *kernel; int bytes; } all[] = {
        {(const void *)gemm_kernel<STORE>, GEMM_SHARED},
        {(const void *)gemm_kernel<ADD>, GEMM_SHARED},
        {(const void *)gemm_kernel<SWIGLU>, GEMM_SHARED},
        {(const void *)gemm_wgmma_kernel<STORE>, WGMMA_SHARED},
        {(const void *)gemm_wgmma_kernel<ADD>, WGMMA_SHARED},
        {(const void *)gemm_wgmma_kernel<SWIGLU>, WGMMA_SHARED}};
    for (int i = 0; i < (has_wgmma() ? 6 : 3); i++) {
        cudaError_t e = cudaFuncSetAttribute(
            all[i].kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, all[i].bytes);
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}

/* Tiles of a matrix of so many rows; of gate and up, of which each has so many. */
static int panel_tiles(int rows, int pair) {
    return pair ? (rows + W_ROWS / 2 - 1) / (W_ROWS / 2) : (rows + W_ROWS - 1) / W_ROWS;
}

/* n matrices of one type (not F32) and width, which have room for all their tiles at h. */
static struct unpacked unpacked_at(const struct matrix *w, int n, int pair, __half *h) {
    struct unpacked p = {{}, {0, INT_MAX, INT_MAX}, 0, pair, h};
    for (int i = 0; i < n; i++) {
        p.w[i] = w[i];
        if (!pair) p.first[i] = p.tiles;
        p.tiles = pair ? panel_tiles(w[0].rows, 1) : p.tiles + panel_tiles(w[i].rows, 0);
    }
    return p;
}

/* Dequantises p's matrices now, by a kernel of its own. */
static void launch_panels(struct queue *q, const struct unpacked *p) {
    const int64_t units = (int64_t)p->tiles * (p->w[0].ld / SPAN) * 16;
    const unsigned grid = (unsigned)min64((units + WARPS - 1) / WARPS, 8 * q->sms);
    if (grid > 0) launch(q, "panels_kernel", panels_kernel, dim3(grid), THREADS, 0, *p);
}

/* Products of rows of x (in panels) by panels of w, of no matrix so far. */
static struct gemm gemm_of(const struct packed *x, int rows, const __half *w) {
    struct gemm p = {};
    p.x = x->h;
    p.w = w;
    p.rows = rows;
    p.ld = x->ld;
    p.down = 1 / x->up;
    for (auto &o : p.out) o.first = INT_MAX;
    return p;
}

/* The next matrix that the panels hold: N rows, sums go to y[rows][N]. */
static void gemm_into(struct gemm *p, int N, const float *bias, float *y) {
    int i = 0;
    while (p->out[i].first != INT_MAX) i++;
    p->out[i].y = y;
    p->out[i].bias = bias;
    p->out[i].N = N;
    p->out[i].first = p->tiles;
    p->tiles += panel_tiles(N, 0);
}

/* The panels hold gate and up, of F rows each; h: the panels of what they make. */
static void gemm_swiglu(struct gemm *p, int F, const struct packed *h) {
    p->h = *h;
    p->tiles = panel_tiles(F, 1);
}

enum { GROUP_BYTES = 20 << 20 /* of x, which the L2 cache keeps */ };

/* blocks: how many of gemm_wgmma_kernel run at a time, or 0 where it cannot. Rows of x are cut into
   groups of even size that stay in the L2 cache while all tiles of w pass. */
template <int KIND> static void launch_gemm(struct queue *q, struct gemm p, int blocks) {
    int tiles = (p.rows + X_ROWS - 1) / X_ROWS, across = gemm_row_pairs(p);
    int most = (int)max64(1, GROUP_BYTES / (CLUSTER * X_BYTES * (p.ld / SPAN)));
    int groups = (across + most - 1) / most;
    p.group = (across + groups - 1) / groups;
    if (blocks == 0)
        gemm_kernel<KIND><<<dim3((unsigned)tiles, (unsigned)p.tiles * 2), THREADS, GEMM_SHARED,
                           q->stream>>>(p);
    else {
        cudaLaunchConfig_t c = {};
        cudaLaunchAttribute how[2] = {};
        how[0].id = cudaLaunchAttributeClusterDimension;
        how[0].val.clusterDim = {CLUSTER, 1, 1};
        how[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        how[1].val.programmaticStreamSerializationAllowed = 1;
        const int pairs = p.later[0].tiles > 0 ? INT_MAX : gemm_pairs(p); /* all blocks help */
        c.gridDim = dim3((unsigned)(CLUSTER * min64(pairs, blocks / CLUSTER)));
        c.blockDim = dim3(WGMMA_THREADS);
        c.dynamicSmemBytes = WGMMA_SHARED;
        c.stream = q->stream;
        c.attrs = how;
        c.numAttrs = 2;
        note(q, cudaLaunchKernelEx(&c, gemm_wgmma_kernel<KIND>, p), "gemm_wgmma_kernel");
    }
    launched(q, "gemm_kernel");
}

static void launch_norm_pack(struct queue *q, const struct product_f16 *j) {
    const int D = j->p[0].w.cols;
    if (!j->in.panels && D <= ROW_MOST)
        launch(q, "norm_row_kernel", norm_row_kernel, dim3((unsigned)j->rows), ROW_THREADS, 0,
               j->x, j->norm, j->eps, D, j->which, j->in);
    else
        launch(q, "norm_pack_kernel", norm_pack_kernel,
               dim3((unsigned)(j->rows + WARPS - 1) / WARPS), THREADS, 0, j->x, j->norm, j->eps, D,
               j->which, j->rows, j->in);
}

/* For many rows: where a product's matrices lie as panels, and which weights become panels while it
   is computed. */
struct prepared {
    const __half *panels;
    struct unpacked later[LATER];
};

/* A product of many rows. The weights of later ones are dequantised meanwhile or, where there is no
   gemm_wgmma_kernel to do it, afterwards. */
static void multiply_many(struct queue *q, enum epilogue kind, const struct product_f16 *j,
                          const struct prepared *w) {
    struct gemm g = gemm_of(&j->in, j->rows, w->panels);
    if (j->norm != NULL) launch_norm_pack(q, j);
    for (int i = 0; kind != SWIGLU && i < j->n; i++)
        gemm_into(&g, j->p[i].w.rows, j->p[i].bias, j->p[i].y);
    if (kind == SWIGLU) gemm_swiglu(&g, j->p[0].w.rows, &j->out);
    for (int i = 0; q->wgmma > 0 && i < LATER; i++) g.later[i] = w->later[i];
    if (kind == STORE) launch_gemm<STORE>(q, g, q->wgmma);
    else if (kind == ADD) launch_gemm<ADD>(q, g, q->wgmma);
    else launch_gemm<SWIGLU>(q, g, q->wgmma);
    for (int i = 0; q->wgmma == 0 && i < LATER; i++) launch_panels(q, &w->later[i]);
}

/* A product, by GEMM where its rows lie in panels, else by GEMV. Its matrices have one type, which
   is not F32. */
static void multiply(struct queue *q, enum epilogue kind, const struct product_f16 *product,
                     const struct prepared *w) {
    struct product_f16 j = *product;
    if (j.in.panels) {
        multiply_many(q, kind, product, w);
        return;
    }
    const int own_norm = j.rows == 1 && j.p[0].w.cols <= ROW_MOST && staged_bytes(q, &j) > 0;
    if (j.norm != NULL && !own_norm) {
        launch_norm_pack(q, &j);
        j.norm = NULL;
    }
    with_type(j.p[0].w.type, [&](auto type) {
        constexpr int T = decltype(type)::value == LVM_F32 ? LVM_F16 : decltype(type)::value;
        if (kind == STORE) launch_gemv<T, STORE>(q, &j);
        else if (kind == ADD) launch_gemv<T, ADD>(q, &j);
        else launch_gemv<T, SWIGLU>(q, &j);
    });
}

/* =================================================================================================
   6.  Products in f32

       out[p][o] = sum_k in[k of p] w[o][k] + bias[o] + residual[p][o]

   with k ascending, fma after fma. For a linear layer p is a row and k its columns. For a
   convolution p is an output pixel of one of several images [image][side_out][side_out], and k runs
   over taps and channels [size][size][c_in] of the pixels that it reads: an implicit GEMM, whose
   left operand is never in memory.

   That is how F32 weights, --exact and attention over pixels are computed. A convolution's other
   weights are f16, and tensor cores multiply: see chapter 7. */

struct product {
    const float *in;       /* [images][side_in][side_in][c_in]; [rows][c_in] */
    struct matrix w;
    const float *bias, *residual; /* or NULL; residual: like out */
    float *out;            /* [images][side_out][side_out][w.rows] */
    int pixels;            /* of all images; rows */
    int c_in, size, side_in, side_out, stride;
    int up;                /* 1: the map is read at twice its side, each pixel four times */
    int pad;
    const float *norms;    /* where w is a codebook whose nearest rows are wanted: |e|^2, and */
    struct nearest *found; /* [pixels][codes / NEAREST_CODES], the nearest of so many; or NULL */
    int batch;             /* so many such products, if more than one, whose operands lie */
    int64_t in_step, w_step, out_step; /* so many floats further each */
};

enum { NEAREST_CODES = 128 };

struct nearest {
    float distance; /* |e|^2 - 2 x.e */
    int code;
};

/* Where output pixel p reads: its image and the place of tap (0, 0). */
struct tap_origin {
    const float *image;
    int y, x;
};

static __device__ struct tap_origin find_tap_origin(const struct product &j, int p) {
    int area = j.side_out * j.side_out, at = p % area;
    struct tap_origin l = {j.in + (int64_t)(p / area) * j.side_in * j.side_in * j.c_in,
                           at / j.side_out * j.stride - j.pad, at % j.side_out * j.stride - j.pad};
    return l;
}

/* Four terms k .. k + 3 of a pixel; zeros outside the map. */
static __device__ float4 gather4(const struct product &j, const struct tap_origin &l, int k) {
    float v[4] = {0, 0, 0, 0};
    int step = j.c_in % 4 == 0 ? 4 : 1;
    for (int i = 0; i < 4 && k + i < j.w.cols; i += step) {
        int tap = (k + i) / j.c_in, c = (k + i) % j.c_in;
        int ty = l.y + tap / j.size, tx = l.x + tap % j.size;
        if (ty < 0 || tx < 0 || ty >> j.up >= j.side_in || tx >> j.up >= j.side_in) continue;
        const float *from = l.image + ((ty >> j.up) * j.side_in + (tx >> j.up)) * j.c_in + c;
        if (step == 4) return *(const float4 *)from;
        v[i] = *from;
    }
    return make_float4(v[0], v[1], v[2], v[3]);
}

enum { DEPTH = 16 /* columns of a stage in shared memory */ };

/* The nearest of what LANES neighbouring lanes found; of equally near ones the lowest code. */
template <int LANES> static __device__ struct nearest nearer_of(struct nearest best) {
    for (int i = LANES / 2; i > 0; i /= 2) {
        float d = __shfl_xor_sync(0xffffffff, best.distance, i);
        int code = __shfl_xor_sync(0xffffffff, best.code, i);
        if (d < best.distance || (d == best.distance && code < best.code))
            best.distance = d, best.code = code;
    }
    return best;
}

/* An epilogue of product_kernel: of the codes o0 .. o0 + TN - 1 of each thread and its neighbours
   the nearest to each of TM vectors. A NaN never is. */
template <int BN, int TM, int TN>
static __device__ void find_nearest(const struct product &j, float (*sum)[TN], int p0, int o0) {
    const int tiles = (j.w.rows + BN - 1) / BN, tile = o0 / BN;
#pragma unroll
    for (int m = 0; m < TM; m++) {
        struct nearest best = {HUGE_VALF, 0};
#pragma unroll
        for (int n = 0; n < TN; n++) {
            float d = o0 + n < j.w.rows ? fmaf(-2.0f, sum[m][n], j.norms[o0 + n]) : HUGE_VALF;
            if (d < best.distance) best.distance = d, best.code = o0 + n;
        }
        best = nearer_of<BN / TN>(best);
        if (threadIdx.x % (BN / TN) == 0 && p0 + m < j.pixels)
            j.found[(int64_t)(p0 + m) * tiles + tile] = best;
    }
}

/* Grid: [rows of w / BN, pixels / BM][batch]. Reads BM pixels by BN rows of w, 16 columns at a
   time, into two stages of shared memory, where they lie transposed; each thread has TM x TN sums
   and writes them to out, or the nearest codes to found. Floor: 2 pixels w.rows w.cols operations
   over the f32 rate, with a few rows the bytes of w. */
template <int TYPE, int BM, int BN, int TM, int TN>
__global__ void __launch_bounds__(THREADS) product_kernel(struct product j) {
    __shared__ __align__(16) float a[2][DEPTH][BM + 4], b[2][DEPTH][BN + 4];
    const int A = (BM * DEPTH / 4 + THREADS - 1) / THREADS,
              B = (BN * DEPTH / 4 + THREADS - 1) / THREADS;
    const int tid = (int)threadIdx.x, N = j.w.rows, across = (N + BN - 1) / BN;
    const int o0 = (int)blockIdx.x % across * BN, p0 = (int)blockIdx.x / across * BM;
    if (j.batch > 1) {
        j.in += blockIdx.y * j.in_step;
        j.w.q += blockIdx.y * j.w_step * 4;
        j.out += blockIdx.y * j.out_step;
    }
    const int px = tid / (BN / TN) * TM, ox = tid % (BN / TN) * TN;
    float sum[TM][TN] = {};
    struct tap_origin places[A];
#pragma unroll
    for (int i = 0; i < A; i++)
        places[i] = find_tap_origin(j, min(p0 + (tid + i * THREADS) / 4, j.pixels - 1));
    for (int k0 = 0, stage = 0; k0 < j.w.cols; k0 += DEPTH, stage ^= 1) {
#pragma unroll
        for (int i = 0; i < A; i++) {
            int at = tid + i * THREADS, p = at / 4, k = at % 4 * 4;
            if (p >= BM) break;
            float4 v = gather4(j, places[i], k0 + k);
            a[stage][k][p] = v.x, a[stage][k + 1][p] = v.y;
            a[stage][k + 2][p] = v.z, a[stage][k + 3][p] = v.w;
        }
#pragma unroll
        for (int i = 0; i < B; i++) {
            int at = tid + i * THREADS, o = at / 4, k = at % 4 * 4;
            if (o >= BN) break;
            float4 v = load4<TYPE>(j.w, min(o0 + o, N - 1), k0 + k);
            b[stage][k][o] = v.x, b[stage][k + 1][o] = v.y;
            b[stage][k + 2][o] = v.z, b[stage][k + 3][o] = v.w;
        }
        __syncthreads(); /* one is enough: the next stage fills the other half */
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            float x[TM], w[TN];
#pragma unroll
            for (int m = 0; m < TM; m++) x[m] = a[stage][k][px + m];
#pragma unroll
            for (int n = 0; n < TN; n++) w[n] = b[stage][k][ox + n];
#pragma unroll
            for (int m = 0; m < TM; m++)
#pragma unroll
                for (int n = 0; n < TN; n++) sum[m][n] = fmaf(x[m], w[n], sum[m][n]);
        }
    }
    if (j.found != NULL) {
        find_nearest<BN, TM, TN>(j, sum, p0 + px, o0 + ox);
        return;
    }
#pragma unroll
    for (int m = 0; m < TM; m++)
#pragma unroll
        for (int n = 0; n < TN; n++) {
            int p = p0 + px + m;
            int o = o0 + ox + n;
            if (p >= j.pixels || o >= N) continue;
            float y = sum[m][n] + (j.bias != NULL ? j.bias[o] : 0);
            int64_t at = (int64_t)p * N + o;
            j.out[at] = j.residual != NULL ? y + j.residual[at] : y;
        }
}

template <int TYPE, int BM, int BN, int TM, int TN>
static void launch_product(struct queue *q, const struct product *j) {
    static_assert(BM / TM * (BN / TN) == THREADS, "a thread has TM x TN sums");
    dim3 grid((unsigned)((j->w.rows + BN - 1) / BN * ((j->pixels + BM - 1) / BM)),
              (unsigned)(j->batch > 1 ? j->batch : 1));
    product_kernel<TYPE, BM, BN, TM, TN><<<grid, THREADS, 0, q->stream>>>(*j);
    launched(q, "product_kernel");
}

enum { FEW_COLUMNS = 32, FEW_OUTPUTS = 128, FEW_PIXELS = 64 };

/* For products with few columns (a convolution of 3 channels). Grid: [rows of w / 128][pixels /
   64]. Reads all columns of 64 pixels and of 128 rows of w into shared memory, where both lie
   transposed; a thread has 4 rows and 8 pixels, the same chain as in product_kernel. Floor: the
   bytes of out. */
template <int TYPE>
__global__ void __launch_bounds__(THREADS) few_columns_kernel(struct product j) {
    __shared__ __align__(16) float w[FEW_COLUMNS][FEW_OUTPUTS + 4], x[FEW_COLUMNS][FEW_PIXELS + 4];
    const int tid = (int)threadIdx.x, o0 = (int)blockIdx.x * FEW_OUTPUTS, N = j.w.rows;
    const int p0 = (int)blockIdx.y * FEW_PIXELS, ox = tid % 32 * 4, px = tid / 32 * 8;
    for (int i = tid; i < FEW_OUTPUTS * FEW_COLUMNS / 4; i += THREADS) {
        int o = i % FEW_OUTPUTS, k = i / FEW_OUTPUTS * 4;
        float4 v = load4<TYPE>(j.w, min(o0 + o, N - 1), k);
        w[k][o] = v.x, w[k + 1][o] = v.y, w[k + 2][o] = v.z, w[k + 3][o] = v.w;
    }
    const struct tap_origin l = find_tap_origin(j, min(p0 + tid % FEW_PIXELS, j.pixels - 1));
    for (int k = tid / FEW_PIXELS * 4; k < FEW_COLUMNS; k += THREADS / FEW_PIXELS * 4) {
        float4 v = gather4(j, l, k);
        int p = tid % FEW_PIXELS;
        x[k][p] = v.x, x[k + 1][p] = v.y, x[k + 2][p] = v.z, x[k + 3][p] = v.w;
    }
    __syncthreads();
    float sum[8][4] = {};
    for (int k = 0; k < j.w.cols; k++) {
        float4 b = *(const float4 *)&w[k][ox], u = *(const float4 *)&x[k][px],
               v = *(const float4 *)&x[k][px + 4];
        const float a[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
#pragma unroll
        for (int m = 0; m < 8; m++) {
            sum[m][0] = fmaf(a[m], b.x, sum[m][0]), sum[m][1] = fmaf(a[m], b.y, sum[m][1]);
            sum[m][2] = fmaf(a[m], b.z, sum[m][2]), sum[m][3] = fmaf(a[m], b.w, sum[m][3]);
        }
    }
    if (o0 + ox >= N) return;
    float4 bias = *(const float4 *)(j.bias + o0 + ox);
    for (int m = 0; m < 8 && p0 + px + m < j.pixels; m++)
        *(float4 *)(j.out + (int64_t)(p0 + px + m) * N + o0 + ox) =
            make_float4(sum[m][0] + bias.x, sum[m][1] + bias.y, sum[m][2] + bias.z,
                        sum[m][3] + bias.w);
}

/* By the kernel and tile that are quickest for such a shape; all have the same chains. */
static void run_product(struct queue *q, const struct product *j) {
    with_type(j->w.type, [&](auto type) {
        constexpr int T = decltype(type)::value;
        int64_t large = ((int64_t)j->pixels + 127) / 128 * ((j->w.rows + 127) / 128);
        dim3 grid((unsigned)(j->w.rows + FEW_OUTPUTS - 1) / FEW_OUTPUTS,
                  (unsigned)(j->pixels + FEW_PIXELS - 1) / FEW_PIXELS);
        if (j->w.cols <= FEW_COLUMNS && j->w.rows % 4 == 0 && j->bias != NULL &&
            j->residual == NULL && j->found == NULL && grid.y < 65536) {
            few_columns_kernel<T><<<grid, THREADS, 0, q->stream>>>(*j);
            launched(q, "few_columns_kernel");
        } else if (j->found != NULL) launch_product<T, 128, NEAREST_CODES, 8, 8>(q, j);
        else if (j->pixels <= 8) launch_product<T, 8, 64, 1, 2>(q, j);
        else if (large < 256) launch_product<T, 64, 64, 4, 4>(q, j); /* or much would be idle */
        else launch_product<T, 128, 128, 8, 8>(q, j);
    });
}

/* out[rows][w.rows] = in[rows][w.cols] w^T, as a convolution of images of one pixel. */
static struct product linear(const float *in, const struct matrix &w, float *out, int rows) {
    struct product j = {};
    j.in = in;
    j.w = w;
    j.out = out;
    j.pixels = rows;
    j.c_in = w.cols;
    j.size = j.side_in = j.side_out = j.stride = 1;
    return j;
}

/* A linear layer: y = x w^T + bias [+ residual]. */
static void matmul_f32(struct queue *q, const struct part *p, const float *x, int rows,
                       const float *residual) {
    struct product j = linear(x, p->w, p->y, rows);
    j.bias = p->bias;
    j.residual = residual;
    run_product(q, &j);
}

/* =================================================================================================
   7.  Convolutions on tensor cores

   Weights in f16, activations as two of them: x up = high + low, high = f16(x up), low = f16(x up -
   high), 22 bits in all; up is a power of two such that nothing overflows. Products high w + low w,
   sums in f32. A map lies as [images][side][side][c / 32][2][32]: of each 32 channels the high
   parts, then the low ones, 128 bytes.

   A block takes a tile of 8 columns of pixels by 8, 16 or 32 rows and 64 channels for each of its
   warp groups. For each 32 channels of the input it has the tile with its border in shared memory,
   once for all nine taps: a tap is the same operand from another pixel on, whose rows of 8 pixels
   stand at one distance (so tiles are 8 wide). In shared memory 8 channels of all pixels lie
   together, 16 bytes a pixel: no bank is met twice and a tap's operand may begin at any pixel.
   Weights lie as rows of 32 channels, swizzled; in the pixels' layout wgmma would read its first
   operand at a fifth of the speed.

       acc[channel][pixel] += w[channel][16] x[pixel][16]

   for each 32 channels, tap, 16 of the channels, high and low, in this order whatever the tile is:
   an output's sum is the same chain everywhere. With sm_90a by wgmma, else by mma.sync, which gives
   the same bits. Floor: 4 pixels c_out c_in taps operations over the tensor cores' rate. */

enum { CONV_C = 32 /* channels that lie together */, CONV_W = 8 /* columns of a tile of pixels */,
       STAGE_PITCH = 68 /* floats of a pixel's 64 channels, padded */,
       STAGE_FLOATS = 64 * STAGE_PITCH + 512 /* a warp group's, in the epilogue */ };

struct conv_job {
    const __half *in;             /* [images][side_in][side_in][c_in / 32][2][32] */
    const __half *w;              /* [c_out][ld], columns [size][size][c_in] */
    const float *bias, *residual; /* residual: like out, or NULL */
    const float *image_down;      /* 1 / up of each image, or NULL: down is everybody's */
    float *out;                   /* [images][side_out][side_out][c_out] */
    float *sums;                  /* [images][blocks of 8 x 8][c_out][2], or NULL */
    float down;
    int images, c_in, c_out, ld, side_in, side_out;
    int up, pad;                  /* as in struct product */
};

/* What a block has in shared memory: BUFFERS for the tile of the input (PATCH), so that the next 32
   channels come while these are multiplied, and a ring of STAGES for the weights of a step, of
   which AHEAD are on their way; in the end the sums, on their way out. With stride 2 a row of
   pixels has its even columns first, then its odd ones, so that a tap's 8 pixels are neighbours
   there too. */
template <int SIZE, int STRIDE, int ROWS, int PIXELS> struct conv_tile {
    static const int BLOCK = ROWS * 2; /* threads */
    static const int TALL = PIXELS / CONV_W, TAPS = SIZE * SIZE; /* TALL: rows of pixels */
    static const int PITCH = STRIDE == 1 ? CONV_W - 1 + SIZE : 2 * (CONV_W + 1); /* a patch's row */
    static const int PATCH = (((TALL - 1) * STRIDE + SIZE) * PITCH + 7) / 8 * 8; /* its pixels */
    static const int PASSES = (PATCH + BLOCK / 4 - 1) / (BLOCK / 4); /* a thread's copies of it */
    static const int STEP = SIZE == 3 && STRIDE == 1 && PIXELS == 64 ? 3 : 1; /* taps of a step */
    static const int STEPS = TAPS / STEP; /* of 32 channels */
    static const int AHEAD = 2, STAGES = AHEAD + 2, SPREAD = STEPS - AHEAD; /* steps */
    static const int BUFFERS = SIZE == 1 ? STAGES : 2;
    static const int PLANE = PATCH * 16, PATCH_BYTES = 8 * PLANE; /* PLANE: 8 channels, one part */
    static const int TAP_BYTES = ROWS * 64, W_BYTES = STEP * TAP_BYTES;
    static const int LOOP_BYTES = BUFFERS * PATCH_BYTES + STAGES * W_BYTES;
    static const int STORE_BYTES = ROWS / 64 * STAGE_FLOATS * 4;
    static const int BYTES = LOOP_BYTES > STORE_BYTES ? LOOP_BYTES : STORE_BYTES;
    /* The first pixel that a tap reads, in the patch. */
    static __device__ int tap_at(int tap) {
        int y = tap / SIZE, x = tap % SIZE;
        return y * PITCH + (STRIDE == 1 ? x : x % 2 * (CONV_W + 1) + x / 2);
    }
};

/* copy_async of 16 bytes without its hint to the L2 cache to fetch 128. */
static __device__ void copy_or_zero(uint32_t shared, const void *global, int inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(inside ? 16 : 0));
}

/* A block's tile: its first output pixel and channel. */
struct conv_place {
    int image, y, x, o;
};

template <class T, int ROWS>
static __device__ struct conv_place conv_place_of(const struct conv_job &j) {
    int rows = (j.c_out + ROWS - 1) / ROWS, tile = (int)blockIdx.x / rows;
    int across = (j.side_out + CONV_W - 1) / CONV_W, tall = (j.side_out + T::TALL - 1) / T::TALL;
    struct conv_place p = {tile / (across * tall), tile / across % tall * T::TALL,
                           tile % across * CONV_W, (int)blockIdx.x % rows * ROWS};
    return p;
}

/* What a thread copies of a tile's input: 16 bytes, number lane / 8, of the high and low parts of
   every (threads / 4)th pixel. at: the pixels' numbers in the image, -1 outside. */
template <class T> struct conv_patch {
    const __half *image;
    int at[T::PASSES];
};

/* The pixel (or row of weights) of a pass that a thread copies a part of: four lanes share it. */
static __device__ int conv_lane_row() {
    return (int)threadIdx.x / 32 * 8 + (int)threadIdx.x % 8;
}

template <class T, int STRIDE>
static __device__ struct conv_patch<T> find_patch(const struct conv_job &j,
                                                  const struct conv_place &l) {
    struct conv_patch<T> p;
    p.image = j.in + (int64_t)l.image * j.side_in * j.side_in * j.c_in * 2 +
              threadIdx.x % 32 / 8 * 8;
#pragma unroll
    for (int i = 0; i < T::PASSES; i++) {
        int n = conv_lane_row() + i * (T::BLOCK / 4), q = n % T::PITCH;
        if (STRIDE == 2) q = q <= CONV_W ? 2 * q : 2 * (q - CONV_W - 1) + 1;
        int y = l.y * STRIDE - j.pad + n / T::PITCH, x = l.x * STRIDE - j.pad + q;
        int inside = y >= 0 && x >= 0 && y >> j.up < j.side_in && x >> j.up < j.side_in;
        p.at[i] = inside ? (y >> j.up) * j.side_in + (x >> j.up) : -1;
    }
    return p;
}

/* Pass i of 32 channels of the tile's input, into a buffer of shared memory. */
template <class T>
static __device__ void load_patch(const struct conv_job &j, const struct conv_patch<T> &p,
                                  int chunk, uint32_t buffer, int i) {
    int n = conv_lane_row() + i * (T::BLOCK / 4), inside = p.at[i] >= 0;
    if (n >= T::PATCH) return;
    const __half *from = p.image + ((int64_t)max(p.at[i], 0) * (j.c_in / CONV_C) + chunk) * 64;
    uint32_t to = buffer + threadIdx.x % 32 / 8 * T::PLANE + n * 16;
    copy_or_zero(to, from, inside);
    copy_or_zero(to + 4 * T::PLANE, from + CONV_C, inside);
}

/* The weights of 32 channels under a step's taps. */
template <class T>
static __device__ void load_weights(const struct conv_job &j, int o, int chunk, int step,
                                    uint32_t buffer) {
    int piece = (int)threadIdx.x % 32 / 8;
#pragma unroll
    for (int i = 0; i < T::TAP_BYTES / 64 / (T::BLOCK / 4); i++) {
        int row = conv_lane_row() + i * (T::BLOCK / 4), inside = o + row < j.c_out;
        const __half *from = j.w + (int64_t)(inside ? o + row : 0) * j.ld +
                             step * T::STEP * j.c_in + chunk * CONV_C + piece * 8;
#pragma unroll
        for (int tap = 0; tap < T::STEP; tap++)
            copy_or_zero(buffer + tap * T::TAP_BYTES + row * 64 + (piece ^ (row / 2 & 3)) * 16,
                         from + tap * j.c_in, inside);
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Descriptors of wgmma's operands in shared memory. Pixels: groups of 8 rows by 16 bytes, `along`
   bytes apart along the columns and `down` along the rows. Weights: rows of 64 bytes, swizzled. */
static __device__ uint64_t wgmma_descriptor(uint32_t at, uint32_t along, uint32_t down) {
    return at >> 4 | (uint64_t)(along >> 4) << 16 | (uint64_t)(down >> 4) << 32;
}

static __device__ uint64_t swizzled_descriptor(uint32_t at) {
    return at >> 4 | (uint64_t)1 << 16 | (uint64_t)(512 >> 4) << 32 | (uint64_t)2 << 62;
}

/* A step: 32 channels under its taps; what the step before it multiplied is complete afterwards. */
template <class T, int STRIDE, int PIXELS>
static __device__ void conv_step(float *c, uint32_t w, uint32_t patch, int step) {
    w += threadIdx.x / 128 * 4096;
    products_begin();
#pragma unroll
    for (int i = 0; i < 4 * T::STEP; i++) {
        int tap = i / 4, k = i / 2 % 2, low = i % 2;
        uint32_t at = patch + T::tap_at(step * T::STEP + tap) * 16 + (low * 4 + k * 2) * T::PLANE;
        wgmma<PIXELS>(c, swizzled_descriptor(w + tap * T::TAP_BYTES + k * 32),
                      wgmma_descriptor(at, T::PLANE, STRIDE * T::PITCH * 16), 1);
    }
    products_end();
    products_wait<1>();
}
#else
/* Where a lane finds its 8 columns of 16, number k of a row of weights: piece p of row r lies at
   p ^ (r / 2 & 3), as wgmma's swizzle of 64 bytes wants it. */
static __device__ int weights_piece(int lane, int k) {
    return (2 * k + lane / 16 ^ (lane / 2 & 3)) * 16;
}

/* The same with mma.sync: a warp has 16 of the 64 channels, sums where wgmma has them. */
template <class T, int STRIDE, int PIXELS>
static __device__ void conv_step(float *c, uint32_t w, uint32_t patch, int step) {
    int lane = (int)threadIdx.x % 32;
    w += (threadIdx.x / 32 * 16 + lane % 16) * 64;
    patch += (lane / 16 * STRIDE * T::PITCH + lane % 8) * 16 + lane / 8 % 2 * T::PLANE;
#pragma unroll
    for (int i = 0; i < 4 * T::STEP; i++) {
        int tap = i / 4, k = i / 2 % 2, low = i % 2, at = T::tap_at(step * T::STEP + tap) * 16;
        uint32_t a[4], b[4];
        load_matrices(a, w + tap * T::TAP_BYTES + weights_piece(lane, k));
#pragma unroll
        for (int n = 0; n < PIXELS / 8; n += 2) {
            load_matrices(b, patch + at + (low * 4 + k * 2) * T::PLANE +
                                 n * STRIDE * T::PITCH * 16);
            mma(c + n * 4, a[0], a[1], a[2], a[3], b[0], b[1]);
            mma(c + n * 4 + 4, a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}
#endif

/* Sums of 4 channels over a column of a block of 8 x 8 pixels, on the way to the block's: thread
   16 x + i of 128 has column x and channels 4 i .. 4 i + 3, four sums and four sums of squares.
   parts: 512 floats. */
static __device__ void store_block_sums(const float *sum, float *parts, float *to, int o,
                                        int c_out) {
    const int thread = (int)threadIdx.x % 128, channel = o + thread / 8 * 4 + thread % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float v = sum[i] + __shfl_xor_sync(0xffffffff, sum[i], 16);
        if (thread % 32 < 16) parts[thread / 32 * 128 + thread % 16 * 8 + i] = v;
    }
    __syncthreads();
    float v = parts[thread] + parts[128 + thread] + parts[256 + thread] + parts[384 + thread];
    if (channel < c_out) to[channel * 2 + thread % 8 / 4] = v;
}

/* Four channels of a pixel to a thread's sums and sums of squares. */
static __device__ void add_to_sums(float *sum, const float *v) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] += v[i];
        sum[4 + i] = fmaf(v[i], v[i], sum[4 + i]);
    }
}

/* 4 channels of the residual at a pixel, from o on; zeros where there is none. */
static __device__ float4 load_residual(const struct conv_job &j, int64_t pixel, int o) {
    int64_t at = pixel * j.c_out + o;
    if (j.residual == NULL) return make_float4(0, 0, 0, 0);
    if (j.c_out % 4 == 0) return *(const float4 *)(j.residual + at);
    return make_float4(j.residual[at], o + 1 < j.c_out ? j.residual[at + 1] : 0,
                       o + 2 < j.c_out ? j.residual[at + 2] : 0,
                       o + 3 < j.c_out ? j.residual[at + 3] : 0);
}

/* The same of the output. */
static __device__ void store_output(const struct conv_job &j, const float *v, int64_t pixel,
                                    int o) {
    float *to = j.out + pixel * j.c_out + o;
    if (j.c_out % 4 == 0) *(float4 *)to = make_float4(v[0], v[1], v[2], v[3]);
    else
        for (int i = 0; i < 4 && o + i < j.c_out; i++) to[i] = v[i];
}

/* 64 pixels of a tile of sums to [pixel][channel] in shared memory, part q of it. */
static __device__ void stage_sums(const float *c, int q, float *stage) {
    const int thread = (int)threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int n = i / 4 * 8 + thread % 4 * 2 + i % 2;
        int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
        stage[n * STAGE_PITCH + row] = c[q * 32 + i];
    }
}

/* out = down acc + bias + residual, 64 pixels at a time, through shared memory: a thread has four
   channels of a column of 8 pixels. */
template <int PIXELS>
static __device__ void store_tile(const struct conv_job &j, const struct conv_place &l,
                                  const float *c, float *shared) {
    const int thread = (int)threadIdx.x % 128, group = (int)threadIdx.x / 128;
    const int o = l.o + group * 64 + thread % 16 * 4, x = l.x + thread / 16;
    const int inside = o < j.c_out && x < j.side_out, across = (j.side_out + 7) / 8;
    const float down = j.image_down != NULL ? j.image_down[l.image] : j.down;
    float *stage = shared + group * STAGE_FLOATS, bias[4];
    for (int i = 0; i < 4; i++) bias[i] = o + i < j.c_out ? j.bias[o + i] : 0;
#pragma unroll
    for (int q = 0; q < PIXELS / 64; q++) {
        const int y = l.y + q * 8, rows = inside ? min(8, j.side_out - y) : 0;
        const int block = (l.image * across + y / 8) * across + l.x / 8;
        const int64_t pixel = ((int64_t)l.image * j.side_out + y) * j.side_out + x;
        float4 rest[8];
        float sum[8] = {};
        if (y >= j.side_out) break;
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k < rows) rest[k] = load_residual(j, pixel + k * j.side_out, o);
        __syncthreads();
        stage_sums(c, q, stage);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (k >= rows) break;
            float4 s = *(const float4 *)(stage + (k * 8 + thread / 16) * STAGE_PITCH +
                                         thread % 16 * 4);
            const float v[4] = {fmaf(s.x, down, bias[0]) + rest[k].x,
                                fmaf(s.y, down, bias[1]) + rest[k].y,
                                fmaf(s.z, down, bias[2]) + rest[k].z,
                                fmaf(s.w, down, bias[3]) + rest[k].w};
            store_output(j, v, pixel + k * j.side_out, o);
            add_to_sums(sum, v);
        }
        if (j.sums != NULL)
            store_block_sums(sum, stage + 64 * STAGE_PITCH, j.sums + (int64_t)block * j.c_out * 2,
                             l.o + group * 64, j.c_out);
    }
}

/* Grid: tiles of pixels x tiles of channels, the latter first, so that those who read the same
   pixels run side by side. Reads in and w, bias and residual; writes out, and sums where they are
   wanted; layouts: struct conv_job; floor: the section's opening. A step is 32 channels of the
   input under STEP taps: while it is multiplied, the weights of the step after the next and a share
   of the next 32 channels' patch are copied. */
template <int SIZE, int STRIDE, int ROWS, int PIXELS, int BLOCKS>
__global__ void __launch_bounds__(ROWS * 2, BLOCKS) conv_kernel(const struct conv_job j) {
    typedef struct conv_tile<SIZE, STRIDE, ROWS, PIXELS> T;
    extern __shared__ __align__(1024) char tiles[];
    const uint32_t base = shared_address(tiles),
                   weights = base + T::BUFFERS * T::PATCH_BYTES;
    const struct conv_place l = conv_place_of<T, ROWS>(j);
    const struct conv_patch<T> patch = find_patch<T, STRIDE>(j, l);
    const int chunks = j.c_in / CONV_C, steps = chunks * T::STEPS;
    float c[PIXELS / 2] = {};
    for (int s = 0; s < T::AHEAD; s++) {
#pragma unroll
        for (int i = 0; i < T::PASSES; i++)
            if (s == 0 || (SIZE == 1 && s < chunks))
                load_patch<T>(j, patch, s, base + s * T::PATCH_BYTES, i);
        if (s < steps)
            load_weights<T>(j, l.o, s / T::STEPS, s % T::STEPS, weights + s * T::W_BYTES);
        end_copies();
    }
    for (int chunk = 0, s = 0; chunk < chunks; chunk++)
#pragma unroll
        for (int i = 0; i < T::STEPS; i++, s++) {
            wait_for_copies<T::AHEAD - 1>();
            tiles_written();
            __syncthreads();
            conv_step<T, STRIDE, PIXELS>(c, weights + s % T::STAGES * T::W_BYTES,
                                         base + chunk % T::BUFFERS * T::PATCH_BYTES, i);
            const int next = s + T::AHEAD, after = SIZE == 1 ? next : chunk + 1;
            if (next < steps)
                load_weights<T>(j, l.o, chunk + (i + T::AHEAD) / T::STEPS,
                                (i + T::AHEAD) % T::STEPS,
                                weights + next % T::STAGES * T::W_BYTES);
#pragma unroll
            for (int k = 0; k < T::PASSES; k++)
                if ((SIZE == 1 || (i > 0 && i <= T::SPREAD && k % T::SPREAD == i - 1)) &&
                    after < chunks)
                    load_patch<T>(j, patch, after, base + after % T::BUFFERS * T::PATCH_BYTES, k);
            end_copies();
        }
    products_done<0>(c, PIXELS / 2);
    wait_for_copies<0>();
    store_tile<PIXELS>(j, l, c, (float *)tiles);
}

/* A convolution's weights to f16, [rows][ld] as they are. Floor: bytes in + bytes out. */
template <int TYPE> __global__ void weights_f16_kernel(struct matrix w, __half2 *out) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= (int64_t)w.rows * w.ld) return;
    float4 v = load4<TYPE>(w, i / w.ld, (int)(i % w.ld));
    out[i / 2] = __floats2half2_rn(v.x, v.y);
    out[i / 2 + 1] = __floats2half2_rn(v.z, v.w);
}

/* A kernel for convolutions of a size and a stride: its tile of rows (channels) x pixels, its bytes
   of shared memory, and the part of the largest one's rate that it reaches, as measured. */
struct conv_variant {
    int size, stride, rows, pixels, bytes;
    void (*kernel)(struct conv_job);
    double rate;
};

template <int SIZE, int STRIDE, int ROWS, int PIXELS, int BLOCKS>
static struct conv_variant conv_variant_of(double rate) {
    return {SIZE, STRIDE, ROWS, PIXELS, conv_tile<SIZE, STRIDE, ROWS, PIXELS>::BYTES,
            conv_kernel<SIZE, STRIDE, ROWS, PIXELS, BLOCKS>, rate};
}

/* Blocks of the grid. */
static int64_t conv_blocks(const struct conv_job *j, const struct conv_variant *w) {
    const int tall = w->pixels / CONV_W, side = j->side_out;
    return (int64_t)j->images * ((side + CONV_W - 1) / CONV_W) * ((side + tall - 1) / tall) *
           ((j->c_out + w->rows - 1) / w->rows);
}

/* By the tile that is done first: tiles differ in nothing but time, and the multiprocessor with the
   most of them tells how much that is. */
static void run_conv(struct queue *q, const struct conv_job *j, int size, int stride) {
    const struct conv_variant ways[] = {
        conv_variant_of<1, 1, 64, 64, 3>(0.7), conv_variant_of<1, 1, 128, 128, 2>(1),
        conv_variant_of<3, 2, 64, 64, 2>(0.7), conv_variant_of<3, 2, 128, 128, 1>(0.8),
        conv_variant_of<3, 1, 64, 64, 3>(0.7), conv_variant_of<3, 1, 64, 128, 3>(0.9),
        conv_variant_of<3, 1, 64, 256, 2>(0.93), conv_variant_of<3, 1, 128, 128, 2>(1),
        conv_variant_of<3, 1, 128, 256, 1>(j->residual != NULL ? 0.99 : 1)};
    const struct conv_variant *best = NULL;
    double least = HUGE_VAL;
    for (const struct conv_variant &w : ways) {
        if (w.size != size || w.stride != stride) continue;
        const int64_t rounds = (conv_blocks(j, &w) + q->sms - 1) / q->sms;
        const double cost = w.bytes <= q->shared ? (double)rounds * w.rows * w.pixels / w.rate
                                                 : HUGE_VAL;
        if (best != NULL && cost > least) continue;
        best = &w;
        least = cost;
    }
    note(q, cudaFuncSetAttribute((const void *)best->kernel,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, best->bytes),
         "cudaFuncSetAttribute");
    best->kernel<<<(unsigned)conv_blocks(j, best), best->rows * 2, (size_t)best->bytes,
                   q->stream>>>(*j);
    launched(q, "conv_kernel");
}

/* =================================================================================================
   8.  Rows

       rmsnorm(x)_i = g_i x_i / sqrt(mean of x^2 + eps)        silu(x) = x / (1 + e^-x)
       nll = ln(sum over i of e^(x_i)) - x_target              swiglu(a, b) = silu(a) b

   Rows lie as [rows][columns], one behind the other. With f16 weights SwiGLU is no
   kernel of its own but the epilogue of a product, and the norm of a single row its prologue. Floor
   of each: its bytes over the memory's bandwidth, in generating the time that a launch takes. */

/* For a thread an element. */
static unsigned blocks_of(int64_t n) { return (unsigned)((n + THREADS - 1) / THREADS); }

/* The sum or, LARGEST, the maximum of a block's values, for all its threads. */
template <int LARGEST, class T> static __device__ T reduce_block(T v) {
    __shared__ T parts[32];
    auto join = [](T a, T b) { return LARGEST ? fmax(a, b) : a + b; };
    for (int i = 16; i > 0; i /= 2) v = join(v, __shfl_xor_sync(0xffffffff, v, i));
    __syncthreads(); /* all have read what an earlier call left */
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = parts[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) v = join(v, parts[i]);
    return v;
}

/* Grid: [rows]. x[row][D] = the token's row of the embedding, or of the codebook. */
template <int TYPE>
__global__ void embed_kernel(struct matrix embed, const int32_t *tokens, float *x) {
    int row = (int)blockIdx.x, D = embed.cols;
    wait_for_inputs();
    for (int k = 4 * (int)threadIdx.x; k < D; k += 4 * THREADS) {
        float4 v = load4<TYPE>(embed, tokens[row], k);
        float *to = x + (int64_t)row * D + k;
        to[0] = v.x;
        if (k + 1 < D) to[1] = v.y;
        if (k + 2 < D) to[2] = v.z;
        if (k + 3 < D) to[3] = v.w;
    }
}

/* out[rows][D] = rmsnorm(x) in f32, a warp a row; row number i is row which[i], or i, of x. */
__global__ void norm_kernel(const float *x, const float *norm, float eps, int D, const int *which,
                            int rows, float *out) {
    const int i = (int)blockIdx.x * WARPS + (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    if (i >= rows) return;
    const float *row = x + (int64_t)(which != NULL ? which[i] : i) * D;
    const float scale = rms_scale(row, D, eps);
    for (int k = lane; k < D; k += 32) out[(int64_t)i * D + k] = norm[k] * (row[k] * scale);
}

/* gate = swiglu(gate, up), n elements, a thread each. */
__global__ void swiglu_kernel(float *gate, const float *up, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

/* lvm.c's exp_f32 of x <= 0, log_f64 of x >= 1 and summand: the same bits, for nvcc fuses no
   product that is an intrinsic's. */
static __device__ float exp_as_host(float x) {
    const float c[8] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    const float whole = 12582912; /* added to n it leaves n in the lowest bits */
    float up = __fmul_rn(x, 1.44269504f) + whole, n = up - whole, p = c[0];
    float r = (x - __fmul_rn(n, 0.693359375f)) - __fmul_rn(n, -2.12194440e-4f);
#pragma unroll
    for (int i = 1; i < 8; i++) p = __fmul_rn(p, r) + c[i];
    p = __fmul_rn(p, __uint_as_float((__float_as_uint(up) + 127) << 23));
    return x <= -87.0f ? 0 : p; /* NaN stays NaN */
}

static __device__ double log_as_host(double x) {
    int e = 0;
    double m = frexp(x, &e), sum = 0;
    if (m < 0.70710678118654752) m *= 2, e--;
    double s = (m - 1) / (m + 1), s2 = __dmul_rn(s, s);
#pragma unroll
    for (int i = 21; i > 0; i -= 2) sum = __dmul_rn(sum, s2) + 1.0 / i;
    return __dmul_rn(2 * s, sum) + __dmul_rn(e, 6.93147180369123816490e-01) +
           __dmul_rn(e, 1.90821492927058770002e-10);
}

static __device__ float summand_as_host(float p) {
    return p < 0x1p-14f ? p + 0x1p-14f - 0x1p-14f : p;
}

/* Grid: [rows]. nll[row] = -ln softmax(logits[row][V])[targets[row]], in nats: the bits of lvm.c's
   negative_log_likelihood, for sums are exact. */
__global__ void nll_kernel(const float *logits, int V, const int32_t *targets, float *nll) {
    const float *row = logits + (int64_t)blockIdx.x * V;
    float most = -HUGE_VALF;
    double sum = 0;
    for (int i = (int)threadIdx.x; i < V; i += THREADS) most = fmaxf(most, row[i]);
    most = reduce_block<1>(most);
    for (int i = (int)threadIdx.x; i < V; i += THREADS)
        sum += (double)summand_as_host(exp_as_host(row[i] - most));
    sum = reduce_block<0>(sum);
    if (threadIdx.x == 0)
        nll[blockIdx.x] = (float)(log_as_host(sum) - ((double)row[targets[blockIdx.x]] - most));
}

/* =================================================================================================
   9.  Attention on a paged cache, block by block

       o = sum over keys j <= pos of p_j v_j / sum of p_j,     p_j = e^(q . k_j / sqrt(d) - m)

   Online softmax: keys are taken block by block, with m the largest score so far; what was summed
   before is scaled when m grows (FlashAttention, Dao et al. 2022). Three ways of it:

       a few rows   split_kernel, then merge_blocks_kernel: blocks of keys side by side, so that one
                    row keeps all multiprocessors busy; RoPE and the store of a single row inside
       many rows    store_many_kernel, expand_kernel, flash_kernel: a tile of queries goes through
                    its keys, dequantised once a layer
       f32          attention_kernel: an f32 cache, or --exact; the end of chapter 11

   THE CACHE. A page holds 256 positions of all layers and key/value heads, [L][G] of keys and then
   values, each head_bytes long; dp is d rounded up, zeros behind. In q8_0 a byte is value + 128.

       k, v       [256][dp], for q8_0 with f16 scales [256][dp / 32]

   So they lie where sums are in f32. Else tensor cores multiply, and dp is 64, 128 or 256. (Not for
   f16 with more than 128 dimensions, nor where a block may have too little shared memory.) Then
   values lie transposed, BLOCK keys at a time:

       v          [256 / 64][dp][64], for q8_0 with f16 scales [256 / 64][dp / 32][64]

   and inside a row (of a key, of a dimension of values), and among a block's scales of values, the
   order is that of stored_place: 16 bytes hold what one lane feeds to mma. Behind its own bytes
   such a page has room for one layer's keys and values as f16, see tiles_of.

   THE ORDER OF SUMS on tensor cores is one for a step of a few rows (split_kernel,
   merge_blocks_kernel) and of many (flash_kernel). Keys are taken in blocks of 64 positions. In
   each block scores s are a chain of mma over 16 dimensions at a time, c is log2(e) / sqrt(d) (see
   struct query_scale), p = 2^(c s - m') with m' the block's own largest c s, rounded up to an
   integer, l' is the sum of p (a lane's 16, then the four lanes'), o' a chain of mma over 16 keys
   at a time, p in f16. Blocks are added in ascending order, o = o + o' 2^(m' - m): as the factors
   are powers of two, it does not matter when o is brought to a larger m. A key that a query does
   not see has p = 0, which changes no sum. */

enum { KEYS = 256 /* of a page */, BLOCK = 64 /* keys of a block */,
       SEQUENCES = 64 /* of a context, at most */,
       SPLIT_ROWS = 64 /* steps of so many rows go by split_kernel */, SPLIT_THREADS = 128,
       SLOTS = 16 /* queries that share a read there */,
       FLASH_QUERIES = 128 /* of a tile of flash_kernel: 16 a warp */ };

struct kv_layout {
    int type, dp, tensor; /* tensor: 1: for tensor cores */
    int64_t head_bytes;   /* of a head's keys in a page, and of its values */
};

/* d: dimensions of a head; tensor: see takes_tensor_cores. */
static struct kv_layout kv_layout_of(int type, int d, int tensor) {
    int64_t dp = !tensor ? round_up(d, QK) : d <= 64 ? 64 : d <= 128 ? 128 : 256;
    struct kv_layout l = {type, (int)dp, tensor,
                          KEYS * (type == LVM_F32 ? 4 * dp : type == LVM_F16 ? 2 * dp
                                                           : dp + dp / QK * 2)};
    return l;
}

/* Rows first .. first + n - 1 of a forward, all of one sequence; the position of the last of them;
   blocks of the sequence, `block` to end - 1, that are expanded with them. */
struct tile {
    int first, n, last, block, end;
};

/* Rows of a step of a few rows that read the same page, however many sequences they belong to. */
struct key_group {
    const uint8_t *data; /* the page */
    int page, n;         /* its number in the sequences; rows */
    int last, fresh;     /* last position that one of them sees; first that this step writes */
    uint8_t row[SLOTS];  /* [n] */
};

/* A batch as the device sees it, and where its cache is: the page table. */
struct batch_view {
    uint8_t **table;            /* [sequences][max_pages] */
    int32_t *tokens, *targets;  /* [n] [n_out] */
    int *pos, *seq, *out;       /* [n] [n] [n_out] */
    struct tile *tiles;         /* in steps of many rows */
    struct key_group *groups;   /* [*n_groups], in steps of a few rows */
    int *n_groups, *planned;    /* planned: pos[0] when the groups were made; all rows advance
                                   together */
    int max_pages;
};

/* Keys of a head in a page of a sequence; its values are head_bytes further. */
static __device__ uint8_t *head_of(const struct batch_view &b, const struct kv_layout &l, int seq,
                                   int page, int64_t head) {
    return b.table[seq * b.max_pages + page] + head * 2 * l.head_bytes;
}

/* mma takes k = 16 elements at a time; lane t of four has elements 2 t, 2 t + 1, 2 t + 8, 2 t + 9
   of them. n values (16 bytes) that lie together are one lane's for n / 4 steps. */
static __host__ __device__ int stored_place(int i, int n) {
    const unsigned u = (unsigned)i, m = (unsigned)n; /* without signs divisions are shifts */
    const unsigned s = u % (4 * m) / 16, p = u % 16, t = p % 8 / 2, j = p % 2 + p / 8 * 2;
    return (int)(u / (4 * m) * (4 * m) + m * t + 4 * s + j);
}

/* Where dimension i of the key or value at `at` of a page lies, in elements. */
static __device__ int kv_place(const struct kv_layout &l, int is_value, int at, int i) {
    const int n = l.type == LVM_F16 ? 8 : 16;
    if (!l.tensor) return at * l.dp + i;
    if (!is_value) return at * l.dp + stored_place(i, n);
    return (at / BLOCK * l.dp + i) * BLOCK + stored_place(at % BLOCK, n);
}

/* The same for the scale of dimensions i .. i + 31. */
static __device__ int scale_place(const struct kv_layout &l, int is_value, int at, int i) {
    const int parts = l.dp / QK;
    if (!l.tensor || !is_value) return at * parts + i / QK;
    return (at / BLOCK * parts + i / QK) * BLOCK + stored_place(at % BLOCK, 16);
}

/* A lane's value of 32 that share a scale, as value + 128 of q8_0; returns the scale. */
static __device__ float quantize_lane(float v, int *code) {
    const float most = /* NaN is more than all others */
        __uint_as_float(__reduce_max_sync(0xffffffff, __float_as_uint(fabsf(v))));
    float d = most / 127, inverse = d > 0 ? 1 / d : 0;
    *code = (int)rintf(v * inverse) + 128;
    return d;
}

/* A lane's value as f16 or as quantize_lane gives it; returns the scale. */
static __device__ float code_of(const struct kv_layout &l, float v, int *code) {
    *code = __half_as_ushort(__float2half_rn(v));
    return l.type == LVM_Q8_0 ? quantize_lane(v, code) : 0;
}

/* The codes of 32 lanes, dimensions i0 .. i0 + 31 of the key or value at `at` of a page. */
static __device__ void store_codes(const struct kv_layout &l, uint8_t *to, int is_value, int at,
                                   int i0, int code, float d) {
    const int place = kv_place(l, is_value, at, i0 + (int)(threadIdx.x % 32));
    if (l.type == LVM_F16) ((uint16_t *)to)[place] = (uint16_t)code;
    if (l.type != LVM_Q8_0) return;
    to[place] = (uint8_t)code;
    __half *scales = (__half *)(to + (int64_t)KEYS * l.dp);
    if (threadIdx.x % 32 == 0) scales[scale_place(l, is_value, at, i0)] = __float2half_rn(d);
}

/* The same of values. */
static __device__ void store_kv(const struct kv_layout &l, uint8_t *to, int is_value, int at,
                                int i0, float v) {
    int code;
    const float d = code_of(l, v, &code);
    if (l.type != LVM_F32) store_codes(l, to, is_value, at, i0, code, d);
    else ((float *)to)[kv_place(l, is_value, at, i0 + (int)(threadIdx.x % 32))] = v;
}

/* Dimensions j and j + d / 2 of a query or key, rotated by an angle (cosine, sine). */
static __device__ float2 rotated(float2 v, float2 angle) {
    return make_float2(fmaf(v.x, angle.x, -__fmul_rn(v.y, angle.y)),
                       fmaf(v.y, angle.x, __fmul_rn(v.x, angle.y)));
}

/* Grid: [rows][H + 2 G], a query, a key or a value a block. Rotates q[rows][H][d] by their angles,
   in place, and stores k, rotated, and v[rows][G][d] in the cache. rope: [context][2][d / 2],
   cosines and sines. KV, DP: the layout, if the compiler knows it (else DP is 0). The next kernel
   may start at once: before it waits it reads no keys and values but those of earlier steps.
   Floor: a launch. */
template <int KV, int DP>
__global__ void rope_store_kernel(const struct batch_view b, const struct kv_layout layout,
                                  float *q, const float *k, const float *v, const float *rope,
                                  int layer, int H, int G, int d) {
    const struct kv_layout l = {DP > 0 ? KV : layout.type, DP > 0 ? DP : layout.dp,
                                DP > 0 ? 1 : layout.tensor, layout.head_bytes};
    const int row = (int)blockIdx.x, i = (int)blockIdx.y, pos = b.pos[row], half = d / 2,
              threads = DP > 0 ? DP : (int)blockDim.x, is_value = i >= H + G,
              g = i - H - is_value * G; /* the head, of a key or value */
    const float *angles = rope + (int64_t)pos * d;
    uint8_t *to = head_of(b, l, b.seq[row], pos / KEYS, (int64_t)layer * G + g);
    float *query = q + ((int64_t)row * H + i) * d;
    const float *from = i < H ? query : (is_value ? v : k) + ((int64_t)row * G + g) * d;
    auto rotate = [&](int j) {
        return rotated(make_float2(__ldcg(from + j), __ldcg(from + j + half)),
                       make_float2(angles[j], angles[j + half]));
    };
    let_next_start();
    wait_for_inputs();
    for (int j = (int)threadIdx.x; i < H && j < half; j += threads) {
        const float2 x = rotate(j);
        query[j] = x.x, query[j + half] = x.y;
    }
    for (int dim = (int)threadIdx.x; i >= H && dim < l.dp; dim += threads) {
        float x = 0;
        if (is_value && dim < d) x = __ldcg(from + dim);
        else if (dim < d) x = dim < half ? rotate(dim).x : rotate(dim - half).y;
        store_kv(l, to + is_value * l.head_bytes, is_value, pos % KEYS, dim / QK * QK, x);
    }
}

struct attention {
    struct batch_view b;
    struct kv_layout l;
    const float *q;        /* [rows][H][d], rotated */
    const float *k, *v;    /* [G][d]: of a single row, which split_kernel rotates and stores */
    const float *rope;     /* the angles it does that by; NULL: it has been done */
    const __half *q16;     /* of many rows: q in f16, [rows][H][dp], */
    const float *c;        /* and its scores' factors [rows][H], see struct query_scale */
    float *o;              /* [rows][H][d], or NULL */
    struct packed h;       /* the same in f16, row `from` first; h.h: NULL where it is not wanted */
    float *partial;        /* [rows][H]: o' [blocks][dp], m' and l' [blocks][2] */
    int64_t tiles_at;      /* where a page has its room for tiles, see tiles_of */
    int layer, H, G, d;
    int heads, head_items; /* query heads of an item of work or a tile; such of a key/value head */
    int one_over_heads;    /* 65536 / heads, rounded up */
    int blocks, from;      /* rows before `from` are not wanted */
    float scale;
};

/* ---- What these ways share: arithmetic, and where results go ---- */

/* 2^x as the chip approximates it: p, which becomes f16. */
static __device__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 2^d exactly, for integers d <= 0; 0 where that is too small, also for -infinity. */
static __device__ float exp2_exact(float d) {
    return d >= -126 ? __int_as_float(((int)d + 127) << 23) : 0;
}

/* A query's power of two, which brings its largest element near 2^14, and c, by which scores are
   multiplied: log2(e) / sqrt(d), without that power. */
struct query_scale {
    float up, c;
};

static __device__ struct query_scale query_scale_of(float most, float scale) {
    int bits = (int)(__float_as_uint(most) >> 23), fine = most > 0 && most < HUGE_VALF;
    int e = fine ? max(-100, min(100, 14 + 127 - bits)) : 0;
    struct query_scale r = {__uint_as_float((uint32_t)(127 + e) << 23),
                            scale * 1.44269504f * __uint_as_float((uint32_t)(127 - e) << 23)};
    return r;
}

/* Of a lane's 16 of a query's 64 scores, for one or two queries (c[.][0, 1] and c[.][2, 3]): keys
   8 n + 2 t and 8 n + 2 t + 1; three more lanes have the others. valid: how many keys the query
   sees; the scores of others become -infinity. */
template <int ROWS>
static __device__ void block_max(float (*c)[4], const float *scale, const int *valid, float *m) {
    const int t = (int)(threadIdx.x % 4);
    float most[ROWS][4];
    if (min(valid[0], valid[ROWS - 1]) < BLOCK) {
#pragma unroll
        for (int i = 0; i < ROWS * 16; i++) {
            const int r = i % ROWS, k = i / ROWS;
            if (k / 2 * 8 + 2 * t + k % 2 >= valid[r]) c[k / 2][r * 2 + k % 2] = -HUGE_VALF;
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS * 16; i++) {
        const int r = i % ROWS, k = i / ROWS;
        const float s = c[k / 2][r * 2 + k % 2];
        most[r][k % 4] = k < 4 ? s : fmaxf(most[r][k % 4], s);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        m[r] = fmaxf(fmaxf(most[r][0], most[r][1]), fmaxf(most[r][2], most[r][3]));
#pragma unroll
    for (int i = 0; i < ROWS * 2; i++)
        m[i % ROWS] = fmaxf(m[i % ROWS], __shfl_xor_sync(0xffffffff, m[i % ROWS], 1 + i / ROWS));
#pragma unroll
    for (int r = 0; r < ROWS; r++) m[r] = ceilf(__fmul_rn(m[r], scale[r]));
}

/* Then p of the lane's 16 scores in f16, in pairs, and their sum l. */
template <int ROWS>
static __device__ void block_exp(const float (*c)[4], const float *scale, const int *valid,
                                 const float *m, uint32_t (*p)[8], float *l) {
    float s[ROWS][16], sum[ROWS][4];
#pragma unroll
    for (int i = 0; i < ROWS * 16; i++) {
        const int r = i % ROWS, k = i / ROWS;
        s[r][k] = exp2_approx(fmaf(c[k / 2][r * 2 + k % 2], scale[r], valid[r] > 0 ? -m[r] : 0));
        sum[r][k % 4] = k < 4 ? s[r][k] : sum[r][k % 4] + s[r][k];
        if (k % 2 == 1) p[r][k / 2] = as_word(__floats2half2_rn(s[r][k - 1], s[r][k]));
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) l[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
}

/* The sums of four lanes, which have the 64 scores of a query. */
template <int ROWS> static __device__ void sum_of_quad(float *l) {
#pragma unroll
    for (int i = 0; i < ROWS * 2; i++)
        l[i % ROWS] += __shfl_xor_sync(0xffffffff, l[i % ROWS], 1 + i / ROWS);
}

/* Dimensions i and i + 1 of row `row`'s result of head h; i is even. */
static __device__ void write_pair(const struct attention &a, int row, int h, int i, float v,
                                  float w) {
    const int k = h * a.d + i;
    if (a.o != NULL) *(float2 *)(a.o + (int64_t)row * a.H * a.d + k) = make_float2(v, w);
    if (a.h.h != NULL)
        *(__half2 *)(a.h.h + packed_at(a.h, row - a.from, k)) =
            __floats2half2_rn(v * a.h.up, w * a.h.up);
}

/* Columns behind the last are zeros: n threads of a row's, number i of them. */
static __device__ void write_end(const struct attention &a, int row, int i, int n) {
    if (a.h.h == NULL) return;
    for (int k = a.H * a.d + i; k < a.h.ld; k += n)
        a.h.h[packed_at(a.h, row - a.from, k)] = __half(0);
}

/* ---- A block's bytes in shared memory, and as f16 ---- */

/* Bytes of a key, of a dimension of values, and of all of a block's keys and values without scales:
   [64][dp] and [dp][64]. */
template <int KV, int DP> struct block_of {
    static constexpr int SIZE = KV == LVM_Q8_0 ? 1 : 2, KEY = DP * SIZE, VALUE = BLOCK * SIZE,
                         CODES = BLOCK * KEY;
};

/* Piece c of 16 bytes of row r: 4 lanes by 2 rows meet each bank once. */
template <int ROW> static __device__ int piece_at(int r, int c) {
    return r * ROW + (ROW % 128 == 0 ? c ^ (r & 1) * 4 : c) * 16;
}

/* 16 bytes to shared memory, in the background. */
static __device__ void copy_16(void *to, const void *from) {
    copy_async<16>(shared_address(to), from, 1);
}

/* The first `rows` of ROWS rows, by N threads; thread: this one's number. */
template <int ROW, int ROWS, int N>
static __device__ void copy_rows(char *to, const uint8_t *from, int rows, unsigned thread) {
    constexpr int C = ROW / 16, STEP = N / C; /* rows at a time; even, so piece_at's swap stays */
    const int r = (int)(thread / C), c = (int)(thread % C);
    to += piece_at<ROW>(r, c);
    from += r * ROW + c * 16;
#pragma unroll
    for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++)
        if (r + i * STEP < rows) copy_16(to + i * STEP * ROW, from + i * STEP * ROW);
}

/* The inverse of stored_place. */
static __device__ int key_of_place(int place, int n) {
    const int t = place % (4 * n) / n, s = place % n / 4, j = place % 4;
    return place / (4 * n) * (4 * n) + 16 * s + 2 * t + j % 2 + j / 2 * 8;
}

/* Of a block of which only `there` keys are there, values of the others become zeros (for q8_0
   their scales do): whatever lies there times p = 0 could be NaN. rows: of values (of scales), by N
   threads. */
template <int KV, int N>
static __device__ void zero_missing_values(char *rows_at, int rows, int there, int thread) {
    constexpr int n = KV == LVM_Q8_0 ? 16 : 8;
#pragma unroll 1
    for (int i = thread; i < rows * BLOCK; i += N) {
        const int place = i % BLOCK, r = i / BLOCK;
        if (key_of_place(place, n) < there) continue;
        if (KV == LVM_Q8_0) ((__half *)rows_at)[i] = __half(0);
        else *(__half *)(rows_at + piece_at<BLOCK * 2>(r, place / 8) + place % 8 * 2) = __half(0);
    }
}

static __device__ void copies_arrive(void) {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* All of the warp's copies but the last group. */
static __device__ void wait_for_older_copies(void) {
    wait_for_copies<1>();
    __syncwarp();
}

/* Four bytes, value + 128, as f16: see pairs_of_bytes; each pair has its scales. */
static __device__ void scaled_bytes(uint32_t w, __half2 d0, __half2 d1, uint32_t *out) {
    const __half2 zero = __float2half2_rn(1024 + 128);
    out[0] = as_word(__hmul2(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4140)), zero), d0));
    out[1] = as_word(__hmul2(__hsub2(as_half2(__byte_perm(w, 0x64646464, 0x4342)), zero), d1));
}

template <int KV> struct piece {
    static constexpr int STEPS = KV == LVM_Q8_0 ? 4 : 2; /* of mma */
    uint32_t w[2 * STEPS];                               /* pairs of f16, two a step */
};

/* 16 bytes of a key; scales: its two. */
template <int KV>
static __device__ struct piece<KV> key_at(const char *bytes, const char *scales) {
    const uint4 v = *(const uint4 *)bytes;
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    struct piece<KV> p;
    if (KV == LVM_F16) {
#pragma unroll
        for (int i = 0; i < 4; i++) p.w[i] = w[i];
        return p;
    }
    const __half2 d = *(const __half2 *)scales;
    const __half2 low = __low2half2(d), high = __high2half2(d);
#pragma unroll
    for (int s = 0; s < piece<KV>::STEPS; s++)
        scaled_bytes(w[s], s < 2 ? low : high, s < 2 ? low : high, p.w + 2 * s);
    return p;
}

/* Piece c = 4 u + t of key number `key`; scales: [key][dp / 32]. */
template <int KV, int DP>
static __device__ struct piece<KV> key_piece(const char *keys, const char *scales, int key, int u,
                                             int t) {
    return key_at<KV>(keys + piece_at<block_of<KV, DP>::KEY>(key, 4 * u + t),
                      scales + (key * (DP / QK) + 2 * u) * 2);
}

/* 16 bytes of a dimension of values, by lane t of four; scales: the dimension's 64. */
template <int KV>
static __device__ struct piece<KV> value_at(const char *bytes, const char *scales, int t) {
    const uint4 v = *(const uint4 *)bytes;
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    struct piece<KV> p;
    if (KV == LVM_F16) {
#pragma unroll
        for (int k = 0; k < 4; k++) p.w[k] = w[k];
        return p;
    }
    const uint4 a = ((const uint4 *)scales)[2 * t], b = ((const uint4 *)scales)[2 * t + 1];
    const uint32_t d[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int s = 0; s < piece<KV>::STEPS; s++)
        scaled_bytes(w[s], as_half2(d[2 * s % 8]), as_half2(d[2 * s % 8 + 1]), p.w + 2 * s);
    return p;
}

/* Piece c = 4 u + t of dimension i of values; scales: its 64. */
template <int KV>
static __device__ struct piece<KV> value_piece(const char *values, const char *scales, int i, int u,
                                               int t) {
    return value_at<KV>(values + piece_at<block_of<KV, 64>::VALUE>(i, 4 * u + t), scales, t);
}

/* =================================================================================================
   10.  Attention of a few rows

   Blocks of keys side by side (split_kernel), then merged in ascending order (merge_blocks_kernel).
   An item of work is a block of keys and the queries that share it, of one row or, where sequences
   begin with the same pages, of several. */

/* A query of an item of work: where its part of the sums goes (-1: it sees nothing of the block),
   what its scores are multiplied by, how many of the block's keys it sees. */
struct slot {
    int to, ml; /* o' and m', l' in `partial` */
    float c;
    int valid;
};

/* How many items of work a step has, pos[0], and by how many positions rows are further than when
   groups were made: a recorded step is planned once. */
struct plan {
    int end, pos, ahead;
};

/* An item of work, block item % 4 of group item / 4: 64 keys and the queries of a group. */
struct work {
    const uint8_t *page;
    int item, block, there; /* block of the sequence; keys of it that are there, < 1: none */
    int old, row;           /* 1: this step writes nothing of it; of the lane's query, slot
                               lane % 16, -1: there is none */
};

/* i / heads for i < 256, without a division. */
static __device__ int over_heads(const struct attention &a, int i) {
    return (int)((uint32_t)i * (uint32_t)a.one_over_heads >> 16);
}

/* All loads at once: each takes some 1,000 clocks while the kernel before uses the memory. */
static __device__ struct work find_work(const struct attention &a, const struct plan &plan,
                                        int item) {
    const struct key_group *g = a.b.groups + (unsigned)item / (KEYS / BLOCK);
    const int i = over_heads(a, (int)(threadIdx.x % SLOTS)), row = g->row[i], fresh = g->fresh;
    const int block = g->page * (KEYS / BLOCK) + (int)((unsigned)item % (KEYS / BLOCK));
    return {g->data, item, block, g->last + plan.ahead + 1 - block * BLOCK,
            (block + 1) * BLOCK <= fresh + plan.ahead, i < g->n ? row : -1};
}

/* The first item that has keys, from w on; item is at least `end` where there is none. */
static __device__ struct work skip_empty(const struct attention &a, const struct plan &plan,
                                         struct work w) {
    while (w.item < plan.end && w.there < 1)
        if ((w.item += (int)gridDim.y) < plan.end) w = find_work(a, plan, w.item);
    return w;
}

/* A lane's query of an item. */
struct query {
    int at; /* number row H + head, -1: there is none */
    int pos;
};

static __device__ struct query find_query(const struct attention &a, const struct plan &plan,
                                          const struct work &w) {
    const int r = (int)(threadIdx.x % SLOTS), i = over_heads(a, r);
    struct query x = {-1, 0};
    if (w.row < 0) return x;
    x.at = w.row * a.H + (int)blockIdx.x * a.heads + r - i * a.heads;
    x.pos = a.rope != NULL ? plan.pos : a.b.pos[w.row];
    return x;
}

/* Each warp has every fourth slot of N: on their way from memory, of each 64 dimensions the lane's
   j and j + d / 2 and, where queries are still to be rotated, their cosine and sine. */
template <int DP, int N> struct fetched_queries {
    float2 v[N / 4][DP / 64], angle[N / 4][DP / 64];
};

template <int DP, int N>
static __device__ void fetch_queries(const struct attention &a, const struct query &x,
                                     struct fetched_queries<DP, N> *f) {
    const int warp = (int)(threadIdx.x / 32), lane = (int)(threadIdx.x % 32), half = a.d / 2;
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const int at = __shfl_sync(0xffffffff, x.at, 4 * i + warp),
                  pos = __shfl_sync(0xffffffff, x.pos, 4 * i + warp);
        const float *from = a.q + (unsigned)(at * a.d), *angles = a.rope + (unsigned)(pos * a.d);
#pragma unroll
        for (int k = 0; k < DP / 64; k++) {
            const int j = 32 * k + lane;
            f->v[i][k] = f->angle[i][k] = make_float2(0, 0);
            if (at < 0 || j >= half) continue;
            f->v[i][k] = make_float2(__ldcg(from + j), __ldcg(from + half + j));
            if (a.rope != NULL) f->angle[i][k] = make_float2(angles[j], angles[half + j]);
        }
    }
}

/* Queries in f16, [slot][dp] in stored_place's order. */
template <int DP, int N>
static __device__ void store_queries(const struct attention &a, const struct query &x,
                                     const struct fetched_queries<DP, N> &f, char *q,
                                     struct slot *slots, int block) {
    const int warp = (int)(threadIdx.x / 32), lane = (int)(threadIdx.x % 32), half = a.d / 2;
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const int r = 4 * i + warp, at = __shfl_sync(0xffffffff, x.at, r);
        float2 v[DP / 64];
        float most = 0;
        struct query_scale s = {1, 0};
        if (at >= 0) {
#pragma unroll
            for (int k = 0; k < DP / 64; k++) {
                const float2 from = f.v[i][k], angle = f.angle[i][k];
                v[k] = a.rope == NULL ? from : rotated(from, angle);
                most = fmaxf(most, fmaxf(fabsf(v[k].x), fabsf(v[k].y)));
            }
            most = __uint_as_float(__reduce_max_sync(0xffffffff, __float_as_uint(most)));
            s = query_scale_of(most, a.scale);
            auto store = [&](int k, int place) {
                *(__half *)(q + piece_at<DP * 2>(r, place / 8) + place % 8 * 2) =
                    __float2half_rn((k % 2 ? v[k / 2].y : v[k / 2].x) * s.up);
            };
#pragma unroll
            for (int k = 0; k < 2 * (DP / 64) && a.d == DP; k++)
                store(k, 32 * (k / 2) + k % 2 * (DP / 2) + stored_place(lane, 8));
#pragma unroll
            for (int k = 0; k < 2 * (DP / 64) && a.d < DP; k++) { /* behind the last one zeros */
                const int j = 32 * (k / 2) + lane, beyond = 2 * j + k % 2;
                store(k, stored_place(j < half ? j + k % 2 * half : beyond, 8));
            }
        }
        const int valid = x.at >= 0 ? x.pos + 1 - block * BLOCK : BLOCK;
        if (lane == r)
            slots[r] = {at >= 0 && valid > 0 ? at * a.blocks * (DP + 2) + block * DP : -1,
                        at * a.blocks * (DP + 2) + a.blocks * DP + block * 2, s.c, valid};
    }
}

enum { SCORE_ROW = 72 /* floats from one query's scores to the next one's */ };

/* What one of the four warps has of a block: 16 keys and dp / 4 dimensions of values, in shared
   memory: codes of keys, of values, scales of keys [16][dp / 32], of values [1 or dp / 128][64]. */
template <int KV, int DP> struct share_of {
    static constexpr int Q8 = KV == LVM_Q8_0, SIZE = Q8 ? 1 : 2, KEY = DP * SIZE,
                         VALUE = BLOCK * SIZE, DIMS = DP / 4, PARTS = DP < 128 ? 1 : DP / 128,
                         VALUES = 16 * KEY, KEY_SCALES = VALUES + DIMS * VALUE,
                         VALUE_SCALES = KEY_SCALES + Q8 * 16 * (DP / QK) * 2,
                         BYTES = VALUE_SCALES + Q8 * PARTS * BLOCK * 2;
};

/* Copies the warp's share of the keys of block `block` (of four). */
template <int KV, int DP>
static __device__ void copy_keys16(char *to, const uint8_t *keys, int block) {
    using S = share_of<KV, DP>;
    const unsigned lane = threadIdx.x % 32;
    const int key = block * BLOCK + (int)(threadIdx.x / 32) * 16;
    copy_rows<S::KEY, 16, 32>(to, keys + key * S::KEY, 16, lane);
    if (S::Q8)
        copy_rows<16, DP / QK * 2, 32>(to + S::KEY_SCALES, keys + KEYS * DP + key * (DP / QK) * 2,
                                       DP / QK * 2, lane);
}

/* The same of its values. */
template <int KV, int DP>
static __device__ void copy_dims(char *to, const uint8_t *values, int block, int d) {
    using S = share_of<KV, DP>;
    const unsigned lane = threadIdx.x % 32;
    const int first = (int)(threadIdx.x / 32) * S::DIMS, dim = block * DP + first;
    copy_rows<S::VALUE, S::DIMS, 32>(to + S::VALUES, values + dim * S::VALUE,
                                     (d + 15) / 16 * 16 - first, lane);
    if (S::Q8)
        copy_rows<16, S::PARTS * 8, 32>(to + S::VALUE_SCALES,
                                        values + KEYS * DP + dim / QK * BLOCK * 2, S::PARTS * 8,
                                        lane);
}

/* Where byte or f16 number `place` (of a key, of a dimension's 64 values) lies in a row. */
template <int ROW, int SIZE> static __device__ int stored_at(int r, int place) {
    return piece_at<ROW>(r, place * SIZE / 16) + place * SIZE % 16;
}

/* The codes of 32 lanes, dimensions i0 .. i0 + 31 of key or value `at` of a block: to the shares of
   all warps, where copies would bring them. */
template <int KV, int DP>
static __device__ void store_in_shares(char *shares, int is_value, int at, int i0, int code,
                                       float d) {
    using S = share_of<KV, DP>;
    constexpr int n = S::Q8 ? 16 : 8;
    const int i = i0 + (int)(threadIdx.x % 32), r = is_value ? i % S::DIMS : at % 16;
    char *share = shares + (is_value ? i / S::DIMS : at / 16) * S::BYTES;
    char *to = is_value ? share + S::VALUES + stored_at<S::VALUE, S::SIZE>(r, stored_place(at, n))
                        : share + stored_at<S::KEY, S::SIZE>(r, stored_place(i, n));
    __half *scale = is_value ? (__half *)(share + S::VALUE_SCALES) + r / QK * BLOCK +
                                   stored_place(at, n)
                             : (__half *)(share + S::KEY_SCALES) + r * (DP / QK) + i0 / QK;
    if (!S::Q8) *(uint16_t *)to = (uint16_t)code;
    else *to = (char)code;
    if (S::Q8 && i % S::DIMS % QK == 0) *scale = __float2half_rn(d);
}

/* A single row's key and value of head g: to the cache, and to shared memory, where copies have
   brought what lay there before. */
template <int KV, int DP>
static __device__ void store_new(const struct attention &a, uint8_t *head, int g, int pos,
                                 char *shares) {
    const struct kv_layout l = {KV, DP, 1, a.l.head_bytes}; /* known to the compiler */
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread), "+r"(pos)); /* or all blocks compute what follows from these */
    const int warp = (int)(thread / 32), lane = (int)(thread % 32), half = a.d / 2;
    constexpr int PARTS = DP / QK, N = PARTS / 2; /* a warp's of the key and the value */
    const float *angles = a.rope + pos * a.d, *key = a.k + g * a.d, *value = a.v + g * a.d;
    float x[N] = {};
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int part = warp + 4 * n, dim = part % PARTS * QK + lane;
        const int j = dim < half ? dim : dim - half;
        if (dim >= a.d) continue;
        const float2 angle = make_float2(angles[j], angles[j + half]),
                     v = rotated(make_float2(__ldcg(key + j), __ldcg(key + j + half)), angle);
        x[n] = part >= PARTS ? __ldcg(value + dim) : dim < half ? v.x : v.y;
    }
    copies_arrive();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int part = warp + 4 * n, is_value = part >= PARTS, i0 = part % PARTS * QK;
        int code;
        const float d = code_of(l, x[n], &code);
        store_in_shares<KV, DP>(shares, is_value, pos % BLOCK, i0, code, d);
        store_codes(l, head + is_value * l.head_bytes, is_value, pos % KEYS, i0, code, d);
    }
}

/* s[query][key] of the warp's 16 keys. */
template <int KV, int DP, int NT>
static __device__ void score_keys16(const char *share, const char *q, float *s) {
    const int warp = (int)(threadIdx.x / 32), g = (int)(threadIdx.x % 32 / 4),
              t = (int)(threadIdx.x % 4);
    constexpr int STEPS = piece<KV>::STEPS;
    const char *scales = share + share_of<KV, DP>::KEY_SCALES;
    float c[NT][4] = {};
#pragma unroll
    for (int u = 0; u < DP / 16 / STEPS; u++) {
        const struct piece<KV> up = key_piece<KV, DP>(share, scales, g, u, t),
                               low = key_piece<KV, DP>(share, scales, g + 8, u, t);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < STEPS; i += 2) {
                const int span = (u * STEPS + i) / 2;
                const uint4 x = *(const uint4 *)(q + piece_at<DP * 2>(n * 8 + g, 4 * span + t));
                const uint32_t *a = up.w + 2 * i, *b = low.w + 2 * i;
                mma(c[n], a[0], b[0], a[1], b[1], x.x, x.y);
                mma(c[n], a[2], b[2], a[3], b[3], x.z, x.w);
            }
    }
    s += warp * 16 + g;
#pragma unroll
    for (int i = 0; i < NT * 4; i++)
        s[(i / 4 * 8 + 2 * t + i % 2) * SCORE_ROW + i % 4 / 2 * 8] = c[i / 4][i % 4];
}

/* Of the scores of all keys: o' of the warp's dimensions, m' and l', to `partial`. */
template <int KV, int DP, int NT>
static __device__ void multiply_values(const char *share, const float *s, const struct slot *slots,
                                       const struct attention &a) {
    using S = share_of<KV, DP>;
    const int warp = (int)(threadIdx.x / 32), g = (int)(threadIdx.x % 32 / 4),
              t = (int)(threadIdx.x % 4);
    constexpr int STEPS = piece<KV>::STEPS;
    uint32_t p[NT][8];
    float *to[NT * 2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const struct slot at = slots[n * 8 + g];
        float c[8][4], m, l;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float2 v = *(const float2 *)(s + (n * 8 + g) * SCORE_ROW + 8 * i + 2 * t);
            c[i][0] = v.x, c[i][1] = v.y;
        }
        block_max<1>(c, &at.c, &at.valid, &m);
        block_exp<1>(c, &at.c, &at.valid, &m, p + n, &l);
        sum_of_quad<1>(&l);
        if (warp == 0 && t == 0 && at.to >= 0)
            *(float2 *)(a.partial + at.ml) = make_float2(m, l);
    }
#pragma unroll
    for (int n = 0; n < NT * 2; n++) {
        const int at = slots[n / 2 * 8 + 2 * t + n % 2].to;
        to[n] = at >= 0 ? a.partial + at + warp * S::DIMS + g : NULL;
    }
#pragma unroll
    for (int i = 0; i < S::DIMS / 16; i++) {
        float c[NT][4] = {};
        if (warp * S::DIMS + i * 16 >= a.d) break;
#pragma unroll
        for (int u = 0; u < 4 / STEPS; u++) {
            const char *scales = share + S::VALUE_SCALES + i / 2 * BLOCK * 2;
            const char *values = share + S::VALUES;
            const struct piece<KV> up = value_piece<KV>(values, scales, i * 16 + g, u, t),
                                   low = value_piece<KV>(values, scales, i * 16 + g + 8, u, t);
#pragma unroll
            for (int k = 0; k < STEPS; k++)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    mma(c[n], up.w[2 * k], low.w[2 * k], up.w[2 * k + 1], low.w[2 * k + 1],
                        p[n][2 * (u * STEPS + k)], p[n][2 * (u * STEPS + k) + 1]);
        }
#pragma unroll
        for (int n = 0; n < NT * 2; n++) {
            if (to[n] == NULL) continue;
            to[n][i * 16] = c[n / 2][n % 2];
            to[n][i * 16 + 8] = c[n / 2][2 + n % 2];
        }
    }
}

/* Shared memory of split_kernel: a block, queries, scores, slots. */
template <int KV, int DP, int NT> static constexpr int split_shared(void) {
    return 4 * share_of<KV, DP>::BYTES +
           NT * 8 * (DP * 2 + SCORE_ROW * 4 + (int)sizeof(struct slot));
}

/* Grid: [H / heads][any]. Blocks of the grid take items of work in turns: 64 keys of a head and up
   to 8 NT queries of rows that share them. Reads q and the keys and values once a group; writes
   `partial`, and a single row's own key and value. The first item's bytes are copied before the
   kernel before this one has ended, where that did not write them; the next one's keys and values
   as soon as there is room. (Flash decoding: Dao et al. 2023, but with one order of sums.) Floor:
   the bytes of the cache over the bandwidth. */
template <int KV, int DP, int NT>
__global__ void __launch_bounds__(SPLIT_THREADS, DP * NT <= 128 ? 8 : 4)
    split_kernel(const struct attention a) {
    extern __shared__ __align__(128) char shared[];
    using S = share_of<KV, DP>;
    char *share = shared + (int)(threadIdx.x / 32) * S::BYTES, *q = shared + 4 * S::BYTES;
    float *s = (float *)(q + NT * 8 * DP * 2);
    struct slot *slots = (struct slot *)(s + NT * 8 * SCORE_ROW);
    const int pos = a.b.pos[0], g = a.head_items == 1 ? (int)blockIdx.x
                                                      : (int)blockIdx.x / a.head_items;
    const struct plan plan = {*a.b.n_groups * (KEYS / BLOCK), pos, pos - *a.b.planned};
    const int64_t head = ((int64_t)a.layer * a.G + g) * 2 * a.l.head_bytes;
    struct work w = skip_empty(a, plan, find_work(a, plan, (int)blockIdx.y));
    if (w.item >= plan.end) return;
    auto copy = [&](int keys) {
        const uint8_t *at = w.page + head;
        const int block = (unsigned)w.block % (KEYS / BLOCK);
        if (keys) copy_keys16<KV, DP>(share, at, block);
        else copy_dims<KV, DP>(share, at + a.l.head_bytes, block, a.d);
        end_copies();
    };
    const int early = a.rope != NULL || w.old;
    if (early) copy(1);
    if (early) copy(0);
    struct query x = find_query(a, plan, w);
    struct fetched_queries<DP, NT * 8> f;
    wait_for_inputs();
    fetch_queries<DP, NT * 8>(a, x, &f);
    if (!early) copy(1);
    if (!early) copy(0);
    for (;;) {
        const int there = w.there;
        if (a.rope != NULL && pos / BLOCK == w.block)
            store_new<KV, DP>(a, (uint8_t *)w.page + head, g, pos, shared);
        store_queries<DP, NT * 8>(a, x, f, q, slots, w.block);
        wait_for_older_copies(); /* values are on their way */
        __syncthreads();
        score_keys16<KV, DP, NT>(share, q, s);
        w.item += (int)gridDim.y;
        if (w.item < plan.end) w = skip_empty(a, plan, find_work(a, plan, w.item));
        if (w.item < plan.end) x = find_query(a, plan, w);
        __syncthreads();
        if (w.item < plan.end) copy(1);
        else end_copies();
        wait_for_older_copies();
        if (there < BLOCK)
            zero_missing_values<KV, 32>(share + (S::Q8 ? S::VALUE_SCALES : S::VALUES),
                                        S::Q8 ? S::PARTS : S::DIMS, there, (int)(threadIdx.x % 32));
        __syncwarp();
        multiply_values<KV, DP, NT>(share, s, slots, a);
        if (w.item >= plan.end) return;
        fetch_queries<DP, NT * 8>(a, x, &f);
        __syncwarp();
        copy(0);
        __syncthreads();
    }
}

enum { MERGE_THREADS = 128, MERGED_BLOCKS = 64 /* that are in shared memory at once */ };

/* Grid: [dp / 32][H][rows]: adds the blocks' sums in `partial` in ascending order, for 32 elements,
   a lane each; writes o, or h. All threads copy; one warp adds. Floor: a launch. */
template <int DP>
__global__ void __launch_bounds__(MERGE_THREADS) merge_blocks_kernel(const struct attention a) {
    __shared__ float v[MERGED_BLOCKS][32];
    __shared__ float2 parts[MERGED_BLOCKS]; /* m' and l', then factor and l' */
    const int row = (int)blockIdx.z, h = (int)blockIdx.y, warp = (int)(threadIdx.x / 32),
              lane = (int)(threadIdx.x % 32), i = (int)blockIdx.x * 32 + lane;
    const int n = a.b.pos[row] / BLOCK + 1;
    const float *p = a.partial + (int64_t)(row * a.H + h) * (a.blocks * (DP + 2));
    const float2 *ml = (const float2 *)(p + a.blocks * DP) + lane;
    float m = -HUGE_VALF, l = 0, o = 0;
    p += warp * DP + i;
    wait_for_inputs();
    if (row < a.from) return;
#pragma unroll 1
    for (int block = MERGED_BLOCKS; block + lane < n; block += 32)
        m = fmaxf(m, __ldcg(&ml[block].x));
    for (int first = 0; first < n;
         first += MERGED_BLOCKS, p += MERGED_BLOCKS * DP, ml += MERGED_BLOCKS) {
        float x[MERGED_BLOCKS / 4];
        float2 part[2];
#pragma unroll
        for (int k = 0; k < MERGED_BLOCKS / 4; k++)
            x[k] = first + k * 4 + warp < n ? __ldcg(p + k * 4 * DP) : -0.f;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            part[k] = make_float2(-HUGE_VALF, -0.f);
            if (first + k * 32 + lane < n) part[k] = __ldcg(ml + k * 32);
            m = fmaxf(m, part[k].x);
        }
#pragma unroll
        for (int k = 16; k > 0 && first == 0; k /= 2)
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, k));
        if (first > 0) __syncthreads();
        for (int k = 0; k < 2 && warp == 0; k++)
            parts[k * 32 + lane] = make_float2(exp2_exact(part[k].x - m), part[k].y);
#pragma unroll
        for (int k = 0; k < MERGED_BLOCKS / 4; k++) v[k * 4 + warp][lane] = x[k];
        __syncthreads();
        for (int k0 = 0; k0 < min(MERGED_BLOCKS, n - first) && warp == 0; k0 += 16)
#pragma unroll
            for (int k = k0; k < k0 + 16; k++) { /* behind the last -0 times 0: changes nothing */
                o = fmaf(v[k][lane], parts[k].x, o);
                l = fmaf(parts[k].y, parts[k].x, l);
            }
    }
    if (warp > 0) return;
    o *= 1 / l;
    l = __shfl_down_sync(0xffffffff, o, 1);
    if (i < a.d && i % 2 == 0) write_pair(a, row, h, i, o, l);
    if (h == a.H - 1) write_end(a, row, i, DP);
}

/* =================================================================================================
   11.  Attention of many rows

   store_many_kernel rotates queries and keys and fills the cache, expand_kernel dequantises every
   block of it that a forward sees to tiles of f16, once a layer, and flash_kernel multiplies: each
   of its blocks has a tile of 128 queries and goes through the keys and values that these see. A
   warp brings them, two warp groups multiply, and barriers tell them how far the others are (see
   flash_shared). While the tensor cores work for one warp group the other one has its softmax. */

/* q, k and v of many rows as products left them, and where their queries go. */
struct projected {
    const float *q, *k, *v; /* [rows][H or G][d] */
    const float *rope;      /* [context][2][d / 2], cosines and sines */
    __half *q16;            /* [rows][H][dp], rotated, times a power of two */
    float *c;               /* [rows][H]: see struct query_scale */
    int rows, layer, H, G, d;
    float scale;
};

enum { STORED_ROWS = 32 /* of a block of store_many_kernel, a lane each */ };

/* A lane's elements j and j + half of a row (or cosines and sines), j = lane, lane + 32 .. */
template <int DP> struct pairs {
    float x[DP / 64], y[DP / 64];
};

template <int DP> static __device__ struct pairs<DP> load_pairs(const float *row, int half) {
    struct pairs<DP> p;
#pragma unroll
    for (int i = 0; i < DP / 64; i++) {
        const int j = (int)threadIdx.x % 32 + 32 * i;
        p.x[i] = j < half ? row[j] : 0;
        p.y[i] = j < half ? row[j + half] : 0;
    }
    return p;
}

/* A warp's row of d elements, rotated, to `to`, zeros behind the last; returns the largest without
   its sign. */
template <int DP>
static __device__ float rotate_row(const struct pairs<DP> &row, const struct pairs<DP> &angles,
                                   int d, float *to) {
    const int half = d / 2, lane = (int)threadIdx.x % 32;
    float most = 0;
#pragma unroll
    for (int i = 0; i < DP / 64; i++) {
        const float2 v = rotated(make_float2(row.x[i], row.y[i]),
                                 make_float2(angles.x[i], angles.y[i]));
        if (lane + 32 * i < half) to[lane + 32 * i] = v.x, to[lane + 32 * i + half] = v.y;
        most = fmaxf(most, fmaxf(fabsf(v.x), fabsf(v.y)));
    }
    for (int j = d + lane; j < DP; j += 32) to[j] = 0;
    for (int s = 16; s > 0; s /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, s));
    __syncwarp();
    return most;
}

/* Four of 32 values that share a scale, of which eight lanes have four each, as quantize_lane
   makes them. */
static __device__ float quantize_four(const float *v, uint32_t *codes) {
    float most = fabsf(v[0]);
#pragma unroll
    for (int k = 1; k < 6; k++) { /* NaN stays */
        const float other = k < 4 ? fabsf(v[k])
                                  : __shfl_xor_sync(0xffffffff, most, k == 4 ? 1 : 2);
        most = other > most || other != other ? other : most;
    }
    const float other = __shfl_xor_sync(0xffffffff, most, 4);
    most = other > most || other != other ? other : most;
    const float d = most / 127, inverse = d > 0 ? 1 / d : 0;
#pragma unroll
    for (int k = 0; k < 4; k++) codes[k] = (uint32_t)((int)rintf(v[k] * inverse) + 128);
    return d;
}

/* Four elements of a row as the cache has them; returns the scale of 32, or 0. */
template <int KV> static __device__ float codes_of(const float *v, uint32_t *codes) {
    float scale = 0;
    if (KV == LVM_Q8_0) scale = quantize_four(v, codes);
    else
        for (int k = 0; k < 4; k++) codes[k] = __half_as_ushort(__float2half_rn(v[k]));
    return scale;
}

/* A warp's key, rotated, to position `at` of a page. */
template <int KV, int DP>
static __device__ void store_key(uint8_t *keys, int at, const float *row) {
    constexpr int n = KV == LVM_Q8_0 ? 16 : 8;
#pragma unroll
    for (int i = 4 * (int)(threadIdx.x % 32); i < (DP + 127) / 128 * 128; i += 128) {
        uint32_t c[4];
        const float4 v = i < DP ? *(const float4 *)(row + i) : make_float4(0, 0, 0, 0);
        const float x[4] = {v.x, v.y, v.z, v.w}, d = codes_of<KV>(x, c);
        if (i >= DP) continue;
#pragma unroll
        for (int k = 0; k < 4; k += 2) { /* two that are neighbours in the cache too */
            const int place = at * DP + stored_place(i + k, n);
            if (KV == LVM_Q8_0) *(uint16_t *)(keys + place) = (uint16_t)(c[k] | c[k + 1] << 8);
            else ((uint32_t *)keys)[place / 2] = c[k] | c[k + 1] << 16;
        }
        if (KV == LVM_Q8_0 && i % QK == 0)
            ((__half *)(keys + KEYS * DP))[at * (DP / QK) + i / QK] = __float2half_rn(d);
    }
}

/* A head of 32 rows in shared memory, on its way to the cache. */
template <int DP> struct stored {
    float row[WARPS][DP];                   /* a warp's */
    uint16_t codes[DP][STORED_ROWS + 2];    /* values [dimension][row] */
    __half scales[DP / QK][STORED_ROWS];
};

/* A warp's row of d values to column r of what waits there to be stored. */
template <int KV, int DP>
static __device__ void stage_values(struct stored<DP> *s, int r, const float *v, int d) {
#pragma unroll
    for (int i = 4 * (int)(threadIdx.x % 32); i < (DP + 127) / 128 * 128; i += 128) {
        uint32_t c[4];
        float x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = i + k < d ? v[i + k] : 0;
        const float scale = codes_of<KV>(x, c);
        if (i >= DP) continue;
#pragma unroll
        for (int k = 0; k < 4; k++) s->codes[i + k][r] = (uint16_t)c[k];
        if (i % QK == 0) s->scales[i / QK][r] = __float2half_rn(scale);
    }
}

/* A query of a head, rotated, in f16. */
template <int DP>
static __device__ void store_query(const struct projected &p, int64_t at,
                                   const struct pairs<DP> &q, const struct pairs<DP> &angles,
                                   float *row) {
    const float most = rotate_row<DP>(q, angles, p.d, row);
    const struct query_scale s = query_scale_of(most, p.scale);
#pragma unroll
    for (int i = 2 * (int)(threadIdx.x % 32); i < DP; i += 64)
        *(__half2 *)(p.q16 + at * DP + i) = __floats2half2_rn(row[i] * s.up, row[i + 1] * s.up);
    if (threadIdx.x % 32 == 0) p.c[at] = s.c;
    __syncwarp();
}

/* Grid: [rows / 32][G]: a key/value head of 32 rows and its queries. Rotates queries and keys by
   their angles; queries become f16, keys and values go to the cache, values through shared memory,
   for neighbouring rows' values lie side by side. Floor: bytes in + bytes out. */
template <int KV, int DP>
__global__ void __launch_bounds__(THREADS)
    store_many_kernel(const struct batch_view b, int64_t head_bytes, const struct projected p) {
    __shared__ __align__(16) struct stored<DP> s;
    constexpr int n = KV == LVM_Q8_0 ? 16 : 8;
    const int warp = (int)(threadIdx.x / 32), lane = (int)(threadIdx.x % 32), g = (int)blockIdx.y;
    const int first = (int)blockIdx.x * STORED_ROWS, rows = min(STORED_ROWS, p.rows - first);
    const int64_t head = ((int64_t)p.layer * p.G + g) * 2 * head_bytes;
    float *row = s.row[warp];
    wait_for_inputs();
    const int own = first + min(lane, rows - 1), own_pos = b.pos[own]; /* of row number `lane` */
    uint8_t *own_page = b.table[b.seq[own] * b.max_pages + own_pos / KEYS] + head;
    for (int r = warp; r < rows; r += WARPS) {
        const int pos = __shfl_sync(0xffffffff, own_pos, r), group = p.H / p.G, half = p.d / 2;
        const int64_t at = (int64_t)(first + r) * p.G + g;
        uint8_t *page = (uint8_t *)__shfl_sync(0xffffffff, (unsigned long long)own_page, r);
        struct pairs<DP> q = load_pairs<DP>(p.q + at * group * p.d, half),
                         k = load_pairs<DP>(p.k + at * p.d, half),
                         angles = load_pairs<DP>(p.rope + (int64_t)pos * p.d, half);
        stage_values<KV, DP>(&s, r, p.v + at * p.d, p.d);
        for (int h = 0; h < group; h++) {
            store_query<DP>(p, at * group + h, q, angles, row);
            if (h + 1 < group) q = load_pairs<DP>(p.q + (at * group + h + 1) * p.d, half);
        }
        rotate_row<DP>(k, angles, p.d, row);
        store_key<KV, DP>(page, pos % KEYS, row);
        __syncwarp();
    }
    __syncthreads();
    if (lane >= rows) return;
    const int at = own_pos % KEYS, block = at / BLOCK * DP, in = stored_place(at % BLOCK, n);
    uint8_t *to = own_page + head_bytes;
#pragma unroll 4
    for (int i = warp; i < DP; i += WARPS)
        if (KV == LVM_Q8_0) to[(block + i) * BLOCK + in] = (uint8_t)s.codes[i][lane];
        else ((uint16_t *)to)[(block + i) * BLOCK + in] = s.codes[i][lane];
    if (KV == LVM_Q8_0 && warp < DP / QK)
        ((__half *)(to + KEYS * DP))[(block / QK + warp) * BLOCK + in] = s.scales[warp][lane];
}

/* A tile of 64 x 64 f16 for tensor cores: rows of 128 bytes; piece c (of 8, 16 bytes each) of row r
   lies at c ^ (r & 7), wgmma's swizzle of 128 bytes. */
enum { TILE = 64 * 64 * 2 };

/* Where the tiles of a block lie, those of a layer, behind a page's bytes: [G][256 / 64] times
   dp / 64 of keys, [64 keys][64 dimensions], and dp / 64 of values, [64 dimensions][64 keys]. */
static __device__ char *tiles_of(const struct attention &a, int seq, int block, int g) {
    constexpr int each = KEYS / BLOCK;
    return (char *)a.b.table[seq * a.b.max_pages + (unsigned)block / each] + a.tiles_at +
           (int64_t)(g * each + (unsigned)block % each) * 2 * BLOCK * a.l.dp * 2;
}

/* A piece's steps to row r: pair w[0] of step s has elements 16 s + 2 t and the next, w[1] those 8
   further; of four lanes each writes 16 bytes. */
template <int KV>
static __device__ void store_piece(char *tiles, int r, int u, int t, struct piece<KV> p) {
#pragma unroll
    for (int i = 0; i < piece<KV>::STEPS / 2; i++) {
        const int c = (u * piece<KV>::STEPS / 2 + i) * 4 + t;
        uint32_t *w = p.w + 4 * i;
        transpose4(w, t, 1);
        *(uint4 *)(tiles + c / 8 * TILE + r * 128 + ((c % 8) ^ (r & 7)) * 16) =
            make_uint4(w[0], w[1], w[2], w[3]);
    }
}

/* Zeros for keys of which only `there` are: whatever lies there times p = 0 could be NaN. */
template <int KV>
static __device__ struct piece<KV> zero_missing(struct piece<KV> p, int u, int t, int there) {
#pragma unroll
    for (int i = 0; i < piece<KV>::STEPS * 2; i++) {
        const int key = (u * piece<KV>::STEPS * 2 + i) * 8 + 2 * t;
        if (key + 1 >= there) p.w[i] = key < there ? p.w[i] & 0xffff : 0;
    }
    return p;
}

/* Grid: [G][tiles][any]. Reads blocks of a layer's keys and values from the cache, those that a
   tile of queries has to see to, dequantises them and writes them as f16, see tiles_of. Floor:
   bytes in + bytes out. */
template <int KV, int DP>
__global__ void __launch_bounds__(THREADS) expand_kernel(const struct attention a) {
    using B = block_of<KV, DP>;
    constexpr int KEY = B::KEY / 16, VALUE = B::VALUE / 16;
    const struct tile tile = a.b.tiles[blockIdx.y];
    const int seq = a.b.seq[tile.first], g = (int)blockIdx.x, t = (int)threadIdx.x % 4;
    wait_for_inputs();
    for (int block = tile.block + (int)blockIdx.z; block < tile.end; block += (int)gridDim.z) {
        const int in = block % (KEYS / BLOCK), there = tile.last + 1 - block * BLOCK;
        const char *keys = (const char *)head_of(a.b, a.l, seq, block / (KEYS / BLOCK),
                                                 (int64_t)a.layer * a.G + g);
        const char *values = keys + a.l.head_bytes, *key_scales = keys + KEYS * DP,
                   *value_scales = values + KEYS * DP + in * DP / QK * BLOCK * 2;
        char *to = tiles_of(a, seq, block, g);
#pragma unroll
        for (int i = (int)threadIdx.x; i < BLOCK * KEY; i += THREADS) {
            const int r = i / KEY, u = i % KEY / 4, key = in * BLOCK + r;
            store_piece<KV>(to, r, u, t, key_at<KV>(keys + in * B::CODES + i * 16, key_scales +
                                                    (key * (DP / QK) + 2 * u) * 2));
        }
        to += DP / 64 * TILE;
#pragma unroll
        for (int i = (int)threadIdx.x; i < DP * VALUE; i += THREADS) {
            const int r = i / VALUE, u = i % VALUE / 4;
            struct piece<KV> p = value_at<KV>(values + in * B::CODES + i * 16,
                                              value_scales + r / QK * BLOCK * 2, t);
            if (there < BLOCK) p = zero_missing<KV>(p, u, t, there);
            store_piece<KV>(to + r / 64 * TILE, r % 64, u, t, p);
        }
    }
}

enum { GROUP = 128 /* threads of a warp group */, FLASH_GROUPS = 2 /* that multiply */,
       FLASH_THREADS = (FLASH_GROUPS + 1) * GROUP };

/* Begins c = a tile^T (+ c, if `more`): 64 queries by N rows of a tile, four steps of 16 columns in
   a chain; a: a lane's operands of each. c and a may not be touched before products_done. */
template <int N>
static __device__ void multiply_tile(float (*sums)[4], const uint32_t (*a)[4], const char *tile,
                                     int more) {
#if WGMMA
    float *c = sums[0];
    const uint64_t b = tile_descriptor(tile);
#pragma unroll
    for (int s = 0; s < 4; s++)
        if (N == 64)
            asm volatile(WGMMA_CODE("64", NAMES32, "{%32,%33,%34,%35}", "%36", "%37", "0")
                         : SUMS16(0), SUMS16(16)
                         : "r"(a[s][0]), "r"(a[s][1]), "r"(a[s][2]), "r"(a[s][3]), "l"(b + 2 * s),
                           "r"(more | s));
        else
            asm volatile(WGMMA_CODE("128", NAMES64, "{%64,%65,%66,%67}", "%68", "%69", "0")
                         : SUMS64(0)
                         : "r"(a[s][0]), "r"(a[s][1]), "r"(a[s][2]), "r"(a[s][3]), "l"(b + 2 * s),
                           "r"(more | s));
#else
    const int lane = (int)(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < N / 2 && !more; i++) sums[i / 4][i % 4] = 0;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int s = 0; s < 4; s += 2) {
            const int r = n * 8 + lane % 8, c = 2 * s + lane / 8;
            uint32_t b[4];
            load_matrices(b, shared_address(tile + r * 128 + (c ^ (r & 7)) * 16));
            mma(sums[n], a[s][0], a[s][1], a[s][2], a[s][3], b[0], b[1]);
            mma(sums[n], a[s + 1][0], a[s + 1][1], a[s + 1][2], a[s + 1][3], b[2], b[3]);
        }
#endif
}

/* The shared memory of flash_kernel, of which a block has M dimensions of values: a ring of blocks
   of keys and values; block b of the sequence has place b % RING. `full` says that it is there,
   `empty` that nobody needs it any longer. */
template <int DP> struct flash_shared {
    static constexpr int M = DP == 128 ? 128 : 64, KEY_TILES = DP / 64 * TILE,
                         VALUE_TILES = M / 64 * TILE, RING = 4;
    struct {
        char keys[KEY_TILES], values[VALUE_TILES];
    } ring[RING];
    uint64_t full[RING], empty[RING];
};

/* A lane's two queries, numbers r and r + 8 of the warp's 16, as operands; M dimensions of their
   result. p, block_l, f: of the block whose softmax was last; f: the factor of its o' and l', which
   o and l are still without. */
template <int DP> struct query_pair {
    static constexpr int M = flash_shared<DP>::M;
    uint32_t q[DP / 16][4], p[4][4];
    float c[2], m[2], l[2], block_l[2], f[2], o[M / 8][4];
    int pos[2];
};

/* A lane's query i of a tile: row and head; of the last query where there is none. */
static __device__ int query_of(const struct attention &a, const struct tile &tile, int i,
                               int *head, int *there) {
    const int number = (int)(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) + 8 * i;
    const int at = min(number, tile.n * a.heads - 1), n = over_heads(a, at);
    *head = (int)blockIdx.x * a.heads + at - n * a.heads;
    *there = at == number;
    return tile.first + n;
}

/* A lane's two queries of a tile. */
template <int DP>
static __device__ void load_queries(const struct attention &a, const struct tile &tile,
                                    struct query_pair<DP> *x) {
    const int t = (int)(threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int head, there;
        const int row = query_of(a, tile, i, &head, &there);
        const int64_t at = (int64_t)row * a.H + head;
        const uint32_t *q = (const uint32_t *)(a.q16 + at * DP);
#pragma unroll
        for (int s = 0; s < DP / 16; s++)
            x->q[s][i] = __ldcg(q + 8 * s + t), x->q[s][i + 2] = __ldcg(q + 8 * s + t + 4);
        x->c[i] = a.c[at];
        x->pos[i] = a.b.pos[row];
        x->l[i] = x->block_l[i] = x->f[i] = 0;
        x->m[i] = -HUGE_VALF;
    }
#pragma unroll
    for (int k = 0; k < x->M / 2; k++) x->o[k / 4][k % 4] = 0;
}

/* Of a block for a lane's two queries: m', and the factor that o' and l' have beside the new m. */
struct block_scale {
    float m[2], f[2];
};

/* The first half of a block's softmax: its largest scores. o, l and what is still to be added are
   brought to the new m. */
template <int DP>
static __device__ struct block_scale softmax_max(struct query_pair<DP> *x, float (*c)[4],
                                                 int block) {
    const int valid[2] = {x->pos[0] + 1 - block * BLOCK, x->pos[1] + 1 - block * BLOCK};
    struct block_scale b;
    float old[2];
    block_max<2>(c, x->c, valid, b.m);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float most = fmaxf(x->m[i], b.m[i]);
        old[i] = exp2_exact(x->m[i] - most);
        b.f[i] = exp2_exact(b.m[i] - most);
        x->m[i] = most;
    }
    if (__any_sync(0xffffffff, old[0] != 1 || old[1] != 1)) {
#pragma unroll
        for (int k = 0; k < x->M / 2; k++) x->o[k / 4][k % 4] *= old[k % 4 / 2];
#pragma unroll
        for (int i = 0; i < 2; i++) x->f[i] *= old[i], x->l[i] *= old[i];
    }
    return b;
}

/* The second half: p, as operands, and l'. */
template <int DP>
static __device__ void softmax_exp(struct query_pair<DP> *x, const float (*c)[4], int block,
                                   const struct block_scale &b) {
    const int valid[2] = {x->pos[0] + 1 - block * BLOCK, x->pos[1] + 1 - block * BLOCK};
    uint32_t w[2][8];
    block_exp<2>(c, x->c, valid, b.m, w, x->block_l);
#pragma unroll
    for (int k = 0; k < 16; k++) x->p[k / 4][k % 4] = w[k % 2][k / 4 * 2 + k % 4 / 2];
    x->f[0] = b.f[0], x->f[1] = b.f[1];
}

/* The producer: one warp copies blocks of keys and values to the ring. */
template <int DP>
static __device__ void load_blocks(const struct attention &a, struct flash_shared<DP> *s, int seq,
                                   int blocks, int v0) {
    using F = flash_shared<DP>;
    const int g = (int)blockIdx.x / a.head_items;
    if (BULK && threadIdx.x % 32 > 0) return;
    for (int block = 0; block < blocks; block++) {
        const unsigned place = (unsigned)block % F::RING;
        const char *keys = tiles_of(a, seq, block, g), *values = keys + F::KEY_TILES + v0 * 128;
        barrier_wait(&s->empty[place], (unsigned)block / F::RING % 2 ^ 1);
#if BULK
        barrier_expect(&s->full[place], sizeof s->ring[0]);
#endif
        copy_bulk(s->ring[place].keys, keys, F::KEY_TILES, &s->full[place]);
        copy_bulk(s->ring[place].values, values, F::VALUE_TILES, &s->full[place]);
#if !BULK
        barrier_arrive_later(&s->full[place]);
#endif
    }
}

/* Until block `block` is in the ring. */
template <int DP> static __device__ void wait_full(struct flash_shared<DP> *s, int block) {
    constexpr unsigned n = flash_shared<DP>::RING;
    barrier_wait(&s->full[(unsigned)block % n], (unsigned)block / n % 2);
}

/* This warp needs it no longer. */
template <int DP> static __device__ void release(struct flash_shared<DP> *s, int block) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(&s->empty[(unsigned)block % flash_shared<DP>::RING]);
}

/* Begins c = scores of a block. */
template <int DP>
static __device__ void score_block(const struct flash_shared<DP> *s, int block,
                                   const struct query_pair<DP> &x, float (*c)[4]) {
    const char *keys = s->ring[(unsigned)block % s->RING].keys;
#pragma unroll
    for (int n = 0; n < DP / 64; n++) multiply_tile<64>(c, x.q + 4 * n, keys + n * TILE, n > 0);
    products_end();
}

/* Adds o' and l' of a block. The tensor cores multiply keys of the next one, where there is one
   (NEXT), and then this one's values by p. Beside the products of values goes the first half of the
   next one's softmax; the second half, with the sums of o, is left to go beside the other warp
   group's products. */
template <int DP, int NEXT>
static __device__ void accumulate_block(struct flash_shared<DP> *s, int block,
                                        struct query_pair<DP> *x) {
    float part[x->M / 8][4], c[8][4];
    struct block_scale next = {};
    if (NEXT) wait_full<DP>(s, block + 1);
    products_begin();
    if (NEXT) score_block<DP>(s, block + 1, *x, c);
    multiply_tile<x->M>(part, x->p, s->ring[(unsigned)block % s->RING].values, 0);
    products_end();
    sum_of_quad<2>(x->block_l);
    for (int i = 0; i < 2; i++) x->l[i] = fmaf(x->block_l[i], x->f[i], x->l[i]);
    if (NEXT) products_done<1>(c[0], 32);
    if (NEXT) next = softmax_max<DP>(x, c, block + 1);
    products_done<0>(part[0], x->M / 2);
#pragma unroll
    for (int k = 0; k < 16; k++) asm volatile("" : "+r"(x->p[k / 4][k % 4])); /* read until here */
    release<DP>(s, block);
#pragma unroll
    for (int k = 0; k < x->M / 2; k++)
        x->o[k / 4][k % 4] = fmaf(part[k / 4][k % 4], x->f[k % 4 / 2], x->o[k / 4][k % 4]);
    if (NEXT) softmax_exp<DP>(x, c, block + 1, next);
}

/* A lane's two queries to where attention's result goes: M dimensions from v0 on. */
template <int M>
static __device__ void write_pairs(const struct attention &a, const int *row, const int *head,
                                   int v0, const float *scale, const float (*o)[4]) {
#pragma unroll
    for (int k = 0; k < M / 4; k++) {
        const int i = k % 2, n = k / 2, dim = v0 + n * 8 + 2 * (int)(threadIdx.x % 4);
        const float *v = o[n] + 2 * i;
        if (row[i] >= a.from && dim < a.d)
            write_pair(a, row[i], head[i], dim, v[0] * scale[i], v[1] * scale[i]);
    }
}

/* The same to panels, where a head's dimensions begin a span: a lane has what makes 16 bytes. */
template <int M>
static __device__ void write_pieces(const struct attention &a, const int *row, const int *head,
                                    int v0, const float *scale, const float (*o)[4]) {
#pragma unroll
    for (int k = 0; k < M / 16; k++) {
        const int i = k % 2, odd = k / 2 % 2, g = k / 4;
        const int dim = v0 + g * SPAN + 8 * odd + 2 * (int)(threadIdx.x % 4);
        uint32_t w[4];
        if (row[i] < a.from || dim >= a.d) continue;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float *v = o[8 * g + 2 * n + odd] + 2 * i;
            w[n] = as_word(__floats2half2_rn(v[0] * scale[i] * a.h.up, v[1] * scale[i] * a.h.up));
        }
        *(uint4 *)(a.h.h + packed_at(a.h, row[i] - a.from, head[i] * a.d + dim)) =
            make_uint4(w[0], w[1], w[2], w[3]);
    }
}

/* A lane's queries o / l. */
template <int DP>
static __device__ void write_queries(const struct attention &a, const struct tile &tile, int v0,
                                     const struct query_pair<DP> &x) {
    int row[2], head[2], there;
    const float scale[2] = {1 / x.l[0], 1 / x.l[1]};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row[i] = query_of(a, tile, i, &head[i], &there);
        if (!there) row[i] = -1;
    }
    if (a.h.h != NULL && a.h.panels && a.d % SPAN == 0)
        write_pieces<x.M>(a, row, head, v0, scale, x.o);
    else write_pairs<x.M>(a, row, head, v0, scale, x.o);
    if (blockIdx.x == 0 && blockIdx.z == 0)
        for (int r = max(tile.first, a.from); r < tile.first + tile.n; r++)
            write_end(a, r, (int)threadIdx.x, FLASH_GROUPS * GROUP);
}

/* A consumer, one of two warp groups: its 64 queries, of `blocks` blocks. */
template <int DP>
static __device__ void attend_queries(const struct attention &a, const struct tile &tile,
                                      struct flash_shared<DP> *s, int wg, int blocks, int v0) {
    struct query_pair<DP> x;
    /* blocks of which one of them sees something */
    const int row = tile.first + min(tile.n - 1, over_heads(a, wg * 64 + 63));
    const int seen = __shfl_sync(0xffffffff,
                                 wg * 64 < tile.n * a.heads ? a.b.pos[row] / BLOCK + 1 : 0, 0);
    load_queries<DP>(a, tile, &x);
    if (seen > 0) {
        float c[8][4];
        wait_full<DP>(s, 0);
        products_begin();
        score_block<DP>(s, 0, x, c);
        products_done<0>(c[0], 32);
        const struct block_scale b = softmax_max<DP>(&x, c, 0);
        softmax_exp<DP>(&x, c, 0, b);
    }
    for (int block = 0; block < seen - 1; block++) accumulate_block<DP, 1>(s, block, &x);
    if (seen > 0) accumulate_block<DP, 0>(s, seen - 1, &x);
    for (int block = seen; block < blocks; block++) { /* which only the other warp group sees */
        wait_full<DP>(s, block);
        release<DP>(s, block);
    }
    write_queries<DP>(a, tile, v0, x);
}

/* Grid: [H / heads][tiles][dp / M]. Reads q, and the tiles of expand_kernel once a tile of queries;
   writes o, or h. Two warp groups have 64 queries each; a warp of the third copies blocks of keys
   and values to a ring in shared memory (as in FlashAttention-3, Shah et al. 2024). Floor: 4 d
   operations for each query and key that it sees, over the tensor cores' rate. */
template <int DP>
__global__ void __launch_bounds__(FLASH_THREADS, 1) flash_kernel(const struct attention a) {
    extern __shared__ __align__(1024) char unaligned[];
    using F = flash_shared<DP>;
    F *s = (F *)(unaligned + (1024 - shared_address(unaligned) % 1024) % 1024);
    const struct tile tile = a.b.tiles[blockIdx.y];
    const int v0 = (int)blockIdx.z * F::M, blocks = tile.last / BLOCK + 1;
    const int wg = __shfl_sync(0xffffffff, (int)(threadIdx.x / GROUP), 0);
    if (threadIdx.x < (unsigned)F::RING) {
        barrier_init(&s->full[threadIdx.x], BULK ? 1 : 32);
        barrier_init(&s->empty[threadIdx.x], FLASH_GROUPS * GROUP / 32);
    }
    barriers_made();
    wait_for_inputs();
    if (tile.first + tile.n <= a.from) return;
    __syncthreads();
    if (wg == FLASH_GROUPS) {
        WGMMA_ONLY("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < FLASH_GROUPS * GROUP + 32)
            load_blocks<DP>(a, s, a.b.seq[tile.first], blocks, v0);
    } else {
        WGMMA_ONLY("setmaxnreg.inc.sync.aligned.u32 240;");
        attend_queries<DP>(a, tile, s, wg, blocks, v0);
    }
}

/* ---- Launches, and what the host tells the kernels ---- */

/* How many query heads of a key/value head go together: the largest divisor that SLOTS holds. */
static int heads_together(int H, int G) {
    int group = H / G, heads = group < SLOTS ? group : SLOTS;
    while (group % heads != 0) heads--;
    return heads;
}

static void cut_heads(struct attention *a) {
    a->heads = heads_together(a->H, a->G);
    a->head_items = a->H / a->G / a->heads;
    a->one_over_heads = (65536 + a->heads - 1) / a->heads;
}

/* f(type, dp) as constants, where the layout is for tensor cores. */
template <int V> struct number {
    static constexpr int value = V;
};

template <class F> static void with_layout(const struct kv_layout &l, F f) {
    auto with_dp = [&](auto type) {
        if (l.dp == 64) f(type, number<64>());
        else if (l.dp == 128) f(type, number<128>());
        else if (decltype(type)::value == LVM_Q8_0) f(type, number<256>());
    };
    if (l.type == LVM_F16) with_dp(number<LVM_F16>());
    else with_dp(number<LVM_Q8_0>());
}

/* Shared memory of flash_kernel: it begins at a multiple of 1024. */
template <int DP> static constexpr int flash_bytes(void) {
    return (int)sizeof(struct flash_shared<DP>) + 1024;
}

/* Whether there are kernels for tensor cores for such a cache; shared: the bytes that a block of
   the grid may have on this device. */
static int takes_tensor_cores(int type, int d, int shared) {
    int bytes = 0;
    if (type == LVM_F32 || d > 256 || (type == LVM_F16 && d > 128)) return 0;
    with_layout(kv_layout_of(type, d, 1), [&](auto, auto dp) {
        bytes = flash_bytes<decltype(dp)::value>();
    });
    return bytes <= shared;
}

template <int KV, int DP, int NT>
static cudaError_t prepare_split(int *resident) {
    constexpr int shared = split_shared<KV, DP, NT>();
    cudaError_t e = cudaFuncSetAttribute(split_kernel<KV, DP, NT>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(split_kernel<KV, DP, NT>,
                                 cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (e == cudaSuccess)
        e = cudaFuncSetAttribute(merge_blocks_kernel<DP>,
                                 cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (e != cudaSuccess) return e;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(resident, split_kernel<KV, DP, NT>,
                                                         SPLIT_THREADS, shared);
}

/* When a context is opened. resident[NT - 1]: blocks of split_kernel that the device holds. */
static cudaError_t prepare_attention(const struct kv_layout &l, int device, int *resident) {
    int sms = 0;
    cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    with_layout(l, [&](auto type, auto dp) {
        constexpr int KV = decltype(type)::value, DP = decltype(dp)::value;
        if (e == cudaSuccess) e = prepare_split<KV, DP, 1>(&resident[0]);
        if (e == cudaSuccess) e = prepare_split<KV, DP, 2>(&resident[1]);
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute(flash_kernel<DP>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     flash_bytes<DP>());
    });
    resident[0] *= sms;
    resident[1] *= sms;
    return e;
}

/* The most rows of a group. NT depends on a step's number of rows alone, for steps are recorded. */
static int rows_of_group(int heads) { return SLOTS / heads; }

/* n rows of a step; resident: see prepare_attention. */
static void attend_few(struct queue *q, const struct attention *a, int n, const int *resident) {
    int queries = (int)min64(n, rows_of_group(a->heads)) * a->heads, nt = queries <= 8 ? 1 : 2;
    int64_t items = (int64_t)n * a->b.max_pages * (KEYS / BLOCK), per = a->H / a->heads;
    dim3 grid((unsigned)per, (unsigned)max64(1, min64(items, resident[nt - 1] / per)));
    with_layout(a->l, [&](auto type, auto dp) {
        constexpr int KV = decltype(type)::value, DP = decltype(dp)::value;
        launch(q, "split_kernel", nt == 1 ? split_kernel<KV, DP, 1> : split_kernel<KV, DP, 2>,
               grid, SPLIT_THREADS,
               nt == 1 ? split_shared<KV, DP, 1>() : split_shared<KV, DP, 2>(), *a);
        launch(q, "merge_blocks_kernel", merge_blocks_kernel<DP>,
               dim3(DP / 32, (unsigned)a->H, (unsigned)n), MERGE_THREADS, 0, *a);
    });
}

static void attend_many(struct queue *q, const struct attention *a, int tiles) {
    with_layout(a->l, [&](auto type, auto dp) {
        constexpr int KV = decltype(type)::value, DP = decltype(dp)::value;
        const dim3 grid((unsigned)a->G, (unsigned)tiles, (unsigned)max64(4, 128 / tiles));
        launch(q, "expand_kernel", expand_kernel<KV, DP>, grid, THREADS, 0, *a);
        launch(q, "flash_kernel", flash_kernel<DP>,
               dim3((unsigned)(a->H / a->heads), (unsigned)tiles, DP / flash_shared<DP>::M),
               FLASH_THREADS, flash_bytes<DP>(), *a);
    });
}

/* The groups of a step of a few rows, and of as many further ones as `further`, each a position on;
   pos, seqs: [n], table: [sequences][max_pages] of the device. There are at most n max_pages. */
static int plan_groups(int n, const int *pos, const int *seqs, uint8_t *const *table, int max_pages,
                       int heads, int further, struct key_group *groups) {
    int most = rows_of_group(heads), count = 0, last = 0;
    for (int r = 0; r < n; r++) last = pos[r] > last ? pos[r] : last;
    for (int page = 0; page <= (last + further) / KEYS; page++) {
        uint64_t left = 0; /* rows that see the page, by bits */
        for (int r = 0; r < n; r++) left |= (uint64_t)(pos[r] + further >= page * KEYS) << r;
        for (int r = 0; r < n; r++) {
            if ((left >> r & 1) == 0) continue;
            struct key_group g = {table[seqs[r] * max_pages + page], page, 0, -1, pos[r], {0}};
            for (int i = 0; i < n; i++) {
                if (pos[i] + further < page * KEYS) continue;
                if (table[seqs[i] * max_pages + page] != g.data) continue;
                g.fresh = pos[i] < g.fresh ? pos[i] : g.fresh;
                if ((left >> i & 1) == 0 || g.n == most) continue;
                left &= ~((uint64_t)1 << i);
                g.last = pos[i] > g.last ? pos[i] : g.last;
                g.row[g.n++] = (uint8_t)i;
            }
            groups[count++] = g;
        }
    }
    return count;
}

static int longer_tile(const void *x, const void *y) {
    const struct tile *a = (const struct tile *)x, *b = (const struct tile *)y;
    return a->last != b->last ? b->last - a->last : a->first - b->first;
}

/* Cuts n rows into tiles of up to `rows` neighbours of one sequence; the longest come first, so
   that the last to end are short. Each block is expanded with the first row that sees all of it, or
   with the sequence's last. Returns their number, at most n. */
static int plan_tiles(int n, const int *pos, const int *seqs, int rows, struct tile *tiles) {
    int count = 0, most[SEQUENCES] = {}, done[SEQUENCES] = {};
    for (int r = 0; r < n; r++) most[seqs[r]] = pos[r];
    for (int r = 0; r < n; count++) {
        int end = r + 1, s = seqs[r];
        while (end < n && end - r < rows && seqs[end] == s) end++;
        int last = pos[end - 1], blocks = (last + (last == most[s] ? BLOCK : 1)) / BLOCK;
        tiles[count] = {r, end - r, last, done[s], blocks};
        done[s] = blocks;
        r = end;
    }
    qsort(tiles, (size_t)count, sizeof *tiles, longer_tile);
    return count;
}

/* ---- The same in f32: an f32 cache, or --exact ----

   Online softmax (Milakov and Gimelshein, 2018). A block of the grid has a query of one head. Its
   warps take 32 keys in turn, and each keeps the largest score s so far, m, and the sums l of
   e^(s - m) and o of e^(s - m) v; in the end the warps' parts are added in ascending order. */

enum { QUERY_WARPS = 32, QUERY_THREADS = 32 * QUERY_WARPS };

/* Keys or values of a page as a matrix, whose rows load4 reads in every type. */
static __device__ struct matrix rows_of(const struct kv_layout &l, const uint8_t *at) {
    return {l.type, KEYS, l.dp, l.dp, 0, (uint8_t *)at, (__half *)(at + KEYS * l.dp)};
}

/* q . k for the lane's key, row `first` + lane. Eight lanes share the dimensions of eight keys,
   which are these lanes' own. */
template <int KV>
static __device__ float score_key(const struct matrix &keys, int first, const float *q) {
    const int lane = (int)threadIdx.x % 32;
    float sum[8] = {}, score = 0;
    for (int i = lane % 8 * 4; i < keys.ld; i += 32) {
        const float4 x = *(const float4 *)(q + i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float4 k = load4<KV>(keys, first + lane / 8 * 8 + j, i);
            sum[j] = fmaf(x.x, k.x, fmaf(x.y, k.y, fmaf(x.z, k.z, fmaf(x.w, k.w, sum[j]))));
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        for (int d = 1; d < 8; d *= 2) sum[j] += __shfl_xor_sync(0xffffffff, sum[j], d);
        if (lane % 8 == j) score = sum[j];
    }
    return score;
}

/* o[dp] = o old + the sum of p v, p of the lane's key, 0 beyond n, where anything may lie. */
template <int KV>
static __device__ void add_values(const struct matrix &values, int first, int n, float p, float old,
                                  float *o) {
    const int lane = (int)threadIdx.x % 32;
    for (int i = lane % 8 * 4; i < values.ld; i += 32) {
        float sum[4] = {};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int key = lane / 8 * 8 + j;
            const float4 v = load4<KV>(values, first + min(key, n - 1), i);
            const float w = __shfl_sync(0xffffffff, p, key), x[4] = {v.x, v.y, v.z, v.w};
            for (int k = 0; k < 4; k++) sum[k] = fmaf(w, x[k], sum[k]);
        }
        for (int k = 0; k < 4; k++) {
            for (int d = 8; d < 32; d *= 2) sum[k] += __shfl_xor_sync(0xffffffff, sum[k], d);
            if (lane < 8) o[i + k] = fmaf(o[i + k], old, sum[k]);
        }
    }
}

/* Grid: [rows][H]. Reads q, and for each row its keys and values; writes o. Floor: these bytes over
   the L2 cache's bandwidth. */
template <int KV>
__global__ void __launch_bounds__(QUERY_THREADS) attention_kernel(const struct attention a) {
    extern __shared__ __align__(16) float q[]; /* [dp], behind it o[QUERY_WARPS][dp] */
    __shared__ float2 ml[QUERY_WARPS];
    const int h = (int)blockIdx.y, row = a.from + (int)blockIdx.x, pos = a.b.pos[row],
              dp = a.l.dp, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    float *o = q + dp, m = -HUGE_VALF, l = 0;
    for (int i = (int)threadIdx.x; i < (1 + QUERY_WARPS) * dp; i += QUERY_THREADS)
        q[i] = i < a.d ? a.q[((int64_t)row * a.H + h) * a.d + i] : 0;
    __syncthreads();
    for (int first = 32 * warp; first <= pos; first += QUERY_THREADS) {
        const int n = min(32, pos + 1 - first), at = first % KEYS;
        const uint8_t *keys = head_of(a.b, a.l, a.b.seq[row], first / KEYS,
                                      (int64_t)a.layer * a.G + h / (a.H / a.G));
        const float s = score_key<KV>(rows_of(a.l, keys), at, q) * a.scale, before = m;
        m = fmaxf(m, lane < n ? s : -HUGE_VALF);
        for (int d = 16; d > 0; d /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, d));
        const float p = lane < n ? expf(s - m) : 0, old = expf(before - m);
        l = fmaf(l, old, over_warp(make_float4(p, 0, 0, 0)));
        add_values<KV>(rows_of(a.l, keys + a.l.head_bytes), at, n, p, old, o + warp * dp);
    }
    if (lane == 0) ml[warp] = make_float2(m, l);
    __syncthreads();
    for (int i = 2 * (int)threadIdx.x; i < a.d; i += 2 * QUERY_THREADS) {
        float most = -HUGE_VALF, sum = 0, v[2] = {};
        for (int w = 0; w < QUERY_WARPS; w++) most = fmaxf(most, ml[w].x);
        for (int w = 0; w < QUERY_WARPS; w++) {
            const float part = expf(ml[w].x - most);
            sum = fmaf(ml[w].y, part, sum);
            for (int k = 0; k < 2; k++) v[k] = fmaf(o[w * dp + i + k], part, v[k]);
        }
        write_pair(a, row, h, i, v[0] / sum, v[1] / sum);
    }
    if (h == 0) write_end(a, row, (int)threadIdx.x, QUERY_THREADS);
}

static auto *attention_kernel_for(int type) {
    return type == LVM_F32 ? attention_kernel<LVM_F32>
           : type == LVM_F16 ? attention_kernel<LVM_F16> : attention_kernel<LVM_Q8_0>;
}

static int attention_shared(int dp) { return (1 + QUERY_WARPS) * dp * (int)sizeof(float); }

static void attend_in_f32(struct queue *q, const struct attention *a, int rows) {
    const dim3 grid((unsigned)(rows - a->from), (unsigned)a->H);
    attention_kernel_for(a->l.type)<<<grid, QUERY_THREADS, (size_t)attention_shared(a->l.dp),
                                      q->stream>>>(*a);
    launched(q, "attention_kernel");
}

/* =================================================================================================
   12.  The transformer

       x = embedding of the token
       for each layer:  x += Wo attention(rope(Wq n), rope(Wk n), Wv n),   n = rmsnorm(x)
                        x += Wdown swiglu(Wgate n, Wup n),                 n = rmsnorm(x)
       logits = Wout rmsnorm(x)

   With f16 weights one token's layer is six kernels: gemv_kernel for q, k and v (with the norm in
   front), split_kernel, merge_blocks_kernel, gemv_kernel for o (which adds to x), for gate and up
   (norm in front, SwiGLU behind) and for down. That of a few tokens has norm_row_kernel in front of
   the products with a norm and rope_store_kernel in front of attention. A prompt's layer is a GEMM
   each for q, k and v, for o, for gate and up and for down, which dequantise the weights of the
   next ones on the side, and store_many_kernel, expand_kernel and flash_kernel.

   A context's work memory is one allocation, made when it is opened; the cache grows by pages,
   which sequences share and copy when they write, as on the CPU. A forward's inputs (tokens,
   positions, the page table) go over as one copy from pinned memory, and kernels find them at the
   same place; so the work for one token is the same launches every time, recorded once as a CUDA
   graph for each number of rows. */

enum { MAX_ROWS_GPU = 4096 /* of a forward */, LOGIT_ROWS = 256 /* whose logits fit at a time */,
       GRAPH_ROWS = 8 /* steps of so many are recorded */, IMAGES = 16 /* encoded together */,
       PARTIAL_FLOATS = 128 << 20 /* of split_kernel's sums, more where GRAPH_ROWS need it */ };

struct gpu_page {
    int refs;
    uint8_t *data;
    struct gpu_page *next; /* among those that nobody uses */
};

struct gpu_sequence {
    int n;
    struct gpu_page **pages; /* [max_pages] */
};

/* Chapter 14's; maps and how they are cut into groups of images. */
struct vq_memory {
    float *x, *t, *u;             /* maps [images][side][side][c] */
    float *n;                     /* what a convolution reads: normalised, or chapter 7's f16 */
    float *whole;                 /* a map of all images between those of large sides */
    float *q, *k, *v, *s;         /* of an attention: [images][pixels][c]; scores */
    float *scale, *shift;         /* [images][c] */
    float *blocks;                /* [images][blocks of 8 x 8][c][2]: sums of the map `summed` */
    const float *summed, *prepared; /* prepared: the map of which n is, and in which way */
    int prepared_way;
    float *squares, *down;        /* [images][VQ_GROUPS], [images]: see high_low_kernel */
    float up;                     /* of what was normalised last */
    __half *w16;                  /* a convolution's weights in f16 */
    struct nearest *found;        /* [images T][codes / NEAREST_CODES] */
    uint8_t *rgb, *host_rgb;      /* [images][R][R][3]; host_rgb: pinned, of an encode */
    int32_t *ids;                 /* [images][T] */
    int *bad;                     /* [images]: 1 where something is not finite */
    int side, c, images;
    int few[2], cut[2];           /* images at a time before cut[0] and from cut[1] on */
    const char *stage;            /* for the progress; operations so far and in all */
    int64_t done, all;
};

enum { QKV, O, GATE_UP, DOWN }; /* matrices of a layer that have panels together */

struct gpu {
    struct queue q;
    const struct gpu_model *g;
    const lvm_options *o;
    int exact, rows, max_pages, images; /* rows, images: of a call, at most */
    int split_rows;               /* steps of so many go by split_kernel; so many sequences */
    struct kv_layout kv;
    size_t page_bytes, page_tiles, bytes; /* page_tiles: of a layer's keys and values in f16 */
    struct gpu_sequence seq[SEQUENCES];
    struct gpu_page *spare;
    char *memory, *pinned;
    float *x, *qb, *kb, *vb, *rope, *partial, *logits, *nll;
    float *f, *heads, *gate, *up; /* f32: a product's normed rows; attention's result; hidden */
    int resident[2];              /* blocks of split_kernel that the device holds */
    __half *q16;                  /* queries of many rows, see struct projected */
    float *query_c;
    __half *h, *hidden;           /* f16: a product's rows, attention's result too; swiglu */
    __half *w16[4];               /* a layer's panels, for GEMM; the output's take their place */
    uint8_t *in, *host_in;        /* a forward's inputs, see lay_out: here, in pinned memory */
    float *host_logits;           /* [GRAPH_ROWS][V], pinned */
    cudaGraphExec_t graph[2][GRAPH_ROWS + 1]; /* of logits_step, of next_step; by rows */
    unsigned seen[2][GRAPH_ROWS + 1];         /* how often there were so many */
    struct sampler *sampler;
    struct told *told;            /* what the sampler tells the host; pinned */
    struct vq_memory vq;
};

/* ---- Pages ---- */

/* A page for one owner: a spare one, with whatever it held, or new memory, all zeros. */
static int page_new_gpu(struct gpu *c, struct gpu_page **out, lvm_error *error) {
    struct gpu_page *p = c->spare;
    if (p != NULL) c->spare = p->next;
    else p = (struct gpu_page *)calloc(1, sizeof *p);
    if (p == NULL) return fail(error, LVM_MEMORY, "out of memory");
    cudaError_t e = cudaSuccess;
    if (p->data == NULL) {
        e = cudaMalloc((void **)&p->data, c->page_bytes + c->page_tiles);
        if (e == cudaSuccess) e = cudaMemsetAsync(p->data, 0, c->page_bytes, c->q.stream);
    }
    if (e != cudaSuccess) {
        cudaFree(p->data);
        free(p);
        return cuda_fail(e, "cudaMalloc of a page of the key/value cache", error);
    }
    p->refs = 1;
    *out = p;
    return LVM_OK;
}

/* One owner less; a page without any is kept for the next who asks. */
static void page_release_gpu(struct gpu *c, struct gpu_page **slot) {
    struct gpu_page *p = *slot;
    *slot = NULL;
    if (p == NULL || --p->refs > 0) return;
    p->next = c->spare;
    c->spare = p;
}

/* Makes the page of position pos present and private to the sequence. */
static int page_for_writing(struct gpu *c, struct gpu_sequence *s, int pos, lvm_error *error) {
    struct gpu_page **slot = &s->pages[pos / KEYS], *fresh = NULL;
    if (*slot != NULL && (*slot)->refs == 1) return LVM_OK;
    int code = page_new_gpu(c, &fresh, error);
    if (code != LVM_OK) return code;
    if (*slot != NULL)
        note(&c->q, cudaMemcpyAsync(fresh->data, (*slot)->data, c->page_bytes,
                                    cudaMemcpyDeviceToDevice, c->q.stream), "copying a page");
    page_release_gpu(c, slot);
    *slot = fresh;
    return LVM_OK;
}

/* The sequence becomes n positions long, where it is longer. */
static void gpu_kv_trim(void *state, int seq, int n) {
    struct gpu *c = (struct gpu *)state;
    struct gpu_sequence *s = &c->seq[seq];
    if (n >= s->n) return;
    s->n = n;
    for (int i = (n + KEYS - 1) / KEYS; i < c->max_pages; i++) page_release_gpu(c, &s->pages[i]);
}

/* ---- A forward's inputs ---- */

/* One forward: rows, and how its attention is cut. */
struct step {
    int n, from;                /* from: the first row of which something is wanted */
    int all;                    /* 1: something is of all of them */
    int split, tiles;           /* split: few rows, by groups that share a page; else by tiles */
    size_t bytes;               /* of the view */
    struct batch_view view;
};

/* The pieces of the inputs of a forward of up to `room` rows; returns their bytes. */
static size_t lay_out(const struct gpu *c, uint8_t *base, int room, struct batch_view *v) {
    struct arena a = {(char *)base, 0};
    v->max_pages = c->max_pages;
    take(&a, &v->table, (int64_t)SEQUENCES * c->max_pages);
    take(&a, &v->groups, (int64_t)SPLIT_ROWS * c->max_pages);
    take(&a, &v->tiles, room);
    for (int32_t **p : {&v->tokens, &v->targets, &v->pos, &v->seq, &v->out}) take(&a, p, room);
    for (int32_t **p : {&v->n_groups, &v->planned}) take(&a, p, 1);
    return a.used;
}

static size_t told_bytes(const struct gpu *c, int room) {
    struct batch_view v;
    return lay_out(c, NULL, room, &v);
}

/* Fills the pinned inputs of a forward of rows at positions pos. further: so many steps like it
   follow, each a position on, without inputs of their own. */
static struct step plan_step(const struct gpu *c, const struct batch *b, const int *pos,
                             int further) {
    const int heads = heads_together(c->g->m->llama.H, c->g->m->llama.G);
    const size_t bytes = (size_t)b->n * 4, out = (size_t)b->n_out * 4;
    struct step s = {b->n, b->n_out > 0 ? b->out[0] : b->n, b->n_out == b->n,
                     b->n <= c->split_rows, 0, 0, {}};
    struct batch_view v;
    s.bytes = lay_out(c, c->in, s.split ? SPLIT_ROWS : c->rows, &s.view);
    lay_out(c, c->host_in, s.split ? SPLIT_ROWS : c->rows, &v);
    memcpy(v.tokens, b->tokens, bytes);
    memcpy(v.seq, b->seqs, bytes);
    memcpy(v.pos, pos, bytes);
    if (b->n_out > 0) memcpy(v.out, b->out, out);
    if (b->n_out > 0 && b->logits == NULL) memcpy(v.targets, b->targets, out);
    for (int i = 0; i < SEQUENCES * c->max_pages; i++) {
        const struct gpu_page *p = c->seq[i / c->max_pages].pages[i % c->max_pages];
        v.table[i] = p != NULL ? p->data : NULL;
    }
    *v.planned = pos[0];
    *v.n_groups = 0;
    if (c->kv.tensor && s.split)
        *v.n_groups = plan_groups(s.n, pos, b->seqs, v.table, c->max_pages, heads, further,
                                  v.groups);
    else if (c->kv.tensor)
        s.tiles = plan_tiles(s.n, pos, b->seqs, FLASH_QUERIES / heads, v.tiles);
    return s;
}

/* ---- Layers ---- */

/* Where so many rows and columns of activations go as f16: GEMM's panels, or GEMV's rows. */
static struct packed packed_into(__half *h, int rows, int cols, float up) {
    const int ld = round_up(cols, SPAN), by_span = rows <= CHAIN_ROWS;
    struct packed p = {h, ld, rows > FEW_ROWS, up, by_span ? SPAN : ld,
                       by_span ? SPAN * rows : SPAN};
    return p;
}

/* 1: products with this layer's matrices go to tensor cores. */
static int in_f16(const struct gpu *c, const struct gpu_layer *l) { return l->f16 && !c->exact; }

static int head_in_f16(const struct gpu *c) {
    return c->g->output.type != LVM_F32 && c->g->m->llama.D % 4 == 0 && !c->exact;
}

/* What attention gives, rows from `from` on: to h or, where that is NULL, to c->heads. */
static void attention_rows(struct gpu *c, const struct step *s, int layer, int from,
                           const struct packed *h) {
    const struct llama *a = &c->g->m->llama;
    struct attention job = {};
    job.b = s->view;
    job.l = c->kv;
    job.q = c->qb;
    job.q16 = c->q16;
    job.c = c->query_c;
    if (h != NULL) job.h = *h;
    else job.o = c->heads;
    job.partial = c->partial;
    job.tiles_at = (int64_t)c->page_bytes;
    job.layer = layer;
    job.H = a->H;
    job.G = a->G;
    job.d = a->d;
    if (s->n == 1 && c->kv.tensor) job.k = c->kb, job.v = c->vb, job.rope = c->rope;
    job.blocks = c->max_pages * (KEYS / BLOCK);
    job.from = from;
    job.scale = 1 / sqrtf((float)a->d);
    cut_heads(&job);
    if (!c->kv.tensor) attend_in_f32(&c->q, &job, s->n);
    else if (s->split) attend_few(&c->q, &job, s->n, c->resident);
    else attend_many(&c->q, &job, s->tiles);
}

/* A product in f16 (chapters 3 to 5) or else in f32, where norm and epilogue are kernels of their
   own; in: the rows of the latter where it has no norm. */
static void multiply_rows(struct gpu *c, int f16, enum epilogue kind, const struct product_f16 *j,
                          const struct prepared &w, const float *in) {
    const int64_t hidden = (int64_t)j->rows * j->p[0].w.rows;
    if (f16) {
        multiply(&c->q, kind, j, &w);
        return;
    }
    if (j->norm != NULL) {
        norm_kernel<<<(unsigned)(j->rows + WARPS - 1) / WARPS, THREADS, 0, c->q.stream>>>(
            j->x, j->norm, j->eps, j->p[0].w.cols, j->which, j->rows, c->f);
        launched(&c->q, "norm_kernel");
        in = c->f;
    }
    for (int i = 0; i < j->n; i++)
        matmul_f32(&c->q, &j->p[i], in, j->rows, kind == ADD ? j->p[i].y : NULL);
    if (kind != SWIGLU) return;
    swiglu_kernel<<<blocks_of(hidden), THREADS, 0, c->q.stream>>>(j->p[0].y, j->p[1].y, hidden);
    launched(&c->q, "swiglu_kernel");
}

/* A layer's matrices number i, to be dequantised into their panels. While tensor cores multiply by
   q, k and v, those of gate and up come; while they multiply by these, down's and the next layer's
   others. */
static struct unpacked panels_of(const struct gpu *c, const struct gpu_layer *l, int i) {
    const struct matrix w[4][3] = {{l->k, l->v, l->q}, {l->o}, {l->gate, l->up}, {l->down}};
    return unpacked_at(w[i], i == QKV ? 3 : i == GATE_UP ? 2 : 1, i == GATE_UP, c->w16[i]);
}

/* q, k and v of the rows; of rows before `from` no q is wanted. */
static void project_rows(struct gpu *c, const struct step *s, int layer, int from) {
    const struct llama *a = &c->g->m->llama;
    const struct gpu_layer *l = &c->g->layers[layer];
    const int f16 = in_f16(c, l), n = s->n - from;
    const struct part q = {l->q, l->q_bias, c->qb + (int64_t)from * a->H * a->d},
                      k = {l->k, l->k_bias, c->kb}, v = {l->v, l->v_bias, c->vb};
    const struct product_f16 j = {{k, v, q}, from > 0 ? 2 : 3, s->n, c->x, l->attn_norm, a->eps,
                                  packed_into(c->h, s->n, a->D, l->ups.attn), {}, NULL};
    const struct product_f16 last = {{q}, 1, n, c->x + (int64_t)from * a->D, l->attn_norm, a->eps,
                                     packed_into(c->h, n, a->D, l->ups.attn), {}, NULL};
    const struct unpacked qkvo[2] = {panels_of(c, l, QKV), panels_of(c, l, O)};
    struct prepared w = {c->w16[QKV], {}};
    if (f16 && j.in.panels && (layer == 0 || !in_f16(c, l - 1))) /* none brought them */
        for (const auto &p : qkvo) launch_panels(&c->q, &p);
    if (last.in.panels) w.later[0] = panels_of(c, l, GATE_UP);
    multiply_rows(c, f16, STORE, &j, w, NULL);
    w = {c->w16[QKV] + (int64_t)qkvo[0].first[2] * W_ROWS * l->q.ld, {}};
    if (from > 0 && n > 0) multiply_rows(c, f16, STORE, &last, w, NULL);
}

/* RoPE; keys and values into the cache. A single row's are left to split_kernel. */
static void store_rows(struct gpu *c, const struct step *s, int layer) {
    const struct llama *a = &c->g->m->llama;
    const struct projected p = {c->qb, c->kb, c->vb, c->rope, c->q16, c->query_c, s->n, layer,
                                a->H, a->G, a->d, 1 / sqrtf((float)a->d)};
    auto few = [&](auto kernel, int threads) {
        launch(&c->q, "rope_store_kernel", kernel,
               dim3((unsigned)s->n, (unsigned)(a->H + 2 * a->G)), threads, 0, s->view, c->kv,
               c->qb, c->kb, c->vb, c->rope, layer, a->H, a->G, a->d);
    };
    if (!c->kv.tensor) few(rope_store_kernel<LVM_F32, 0>, THREADS);
    else
        with_layout(c->kv, [&](auto type, auto dp) {
            constexpr int KV = decltype(type)::value, DP = decltype(dp)::value;
            if (s->split) few(rope_store_kernel<KV, DP>, DP);
            else
                launch(&c->q, "store_many_kernel", store_many_kernel<KV, DP>,
                       dim3((unsigned)(s->n + STORED_ROWS - 1) / STORED_ROWS, (unsigned)a->G),
                       THREADS, 0, s->view, c->kv.head_bytes, p);
        });
}

/* x += Wo heads; x += Wdown (silu(Wgate rmsnorm(x)) Wup rmsnorm(x)), rows from `from` on. */
static void finish_rows(struct gpu *c, const struct step *s, int layer, int from) {
    const struct llama *a = &c->g->m->llama;
    const struct gpu_layer *l = &c->g->layers[layer];
    const int Q = a->H * a->d, n = s->n - from, f16 = in_f16(c, l);
    float *x = c->x + (int64_t)from * a->D;
    const struct product_f16 o = {{{l->o, l->o_bias, x}}, 1, n, NULL, NULL, 0,
                                  packed_into(c->h, n, Q, l->ups.heads), {}, NULL};
    const struct product_f16 ffn = {
        {{l->gate, NULL, c->gate}, {l->up, NULL, c->up}}, 2, n, x, l->ffn_norm, a->eps,
        packed_into(c->h, n, a->D, l->ups.ffn), packed_into(c->hidden, n, a->F, l->ups.hidden),
        NULL};
    const struct product_f16 down = {{{l->down, NULL, x}}, 1, n, NULL, NULL, 0, ffn.out, {}, NULL};
    struct prepared w = {c->w16[GATE_UP], {panels_of(c, l, DOWN)}};
    for (int i : {QKV, O})
        if (layer + 1 < a->L && in_f16(c, l + 1)) w.later[1 + i] = panels_of(c, l + 1, i);
    attention_rows(c, s, layer, from, f16 ? &o.in : NULL);
    multiply_rows(c, f16, ADD, &o, {c->w16[O], {}}, c->heads + (int64_t)from * Q);
    multiply_rows(c, f16, SWIGLU, &ffn, w, NULL);
    multiply_rows(c, f16, ADD, &down, {c->w16[DOWN], {}}, c->gate);
}

/* One layer; see run_layer in lvm.c, whose steps these are. In the last one only rows from s->from
   on are wanted. */
static void run_layer(struct gpu *c, const struct step *s, int layer) {
    const int from = layer + 1 < c->g->m->llama.L ? 0 : s->from;
    project_rows(c, s, layer, from);
    if (s->n > 1 || from > 0 || !c->kv.tensor) store_rows(c, s, layer); /* else split_kernel does */
    if (from < s->n) finish_rows(c, s, layer, from);
}

static void embed_rows(struct gpu *c, const struct step *s) {
    with_type(c->g->embed.type, [&](auto type) {
        launch(&c->q, "embed_kernel", embed_kernel<decltype(type)::value>, dim3((unsigned)s->n),
               THREADS, 0, c->g->embed, s->view.tokens, c->x);
    });
}

/* Logits of up to LOGIT_ROWS of the rows that are wanted, number `at` and the following. */
static void run_head(struct gpu *c, const struct step *s, int at, int n) {
    const struct llama *a = &c->g->m->llama;
    const struct matrix *w = &c->g->output;
    const int f16 = head_in_f16(c);
    const struct product_f16 j = {{{*w, NULL, c->logits}}, 1, n,
                                  s->all ? c->x + (int64_t)at * a->D : c->x, c->g->norm, a->eps,
                                  packed_into(c->h, n, a->D, c->g->head_up), {},
                                  s->all ? NULL : s->view.out + at};
    const struct unpacked panels = unpacked_at(w, 1, 0, c->w16[QKV]);
    if (f16 && j.in.panels) launch_panels(&c->q, &panels);
    multiply_rows(c, f16, STORE, &j, {c->w16[QKV], {}}, NULL);
}

/* plan_step's inputs to the device. */
static void upload_inputs(struct gpu *c, const struct step *s) {
    note(&c->q, cudaMemcpyAsync(c->in, c->host_in, s->bytes, cudaMemcpyHostToDevice, c->q.stream),
         "copying a batch");
}

static void copy_out(struct gpu *c, float *to, const float *from, int64_t n) {
    note(&c->q, cudaMemcpyAsync(to, from, (size_t)n * 4, cudaMemcpyDeviceToHost, c->q.stream),
         "copying results");
}

/* All of a step of a few rows whose logits are wanted; they end in host_logits. It reads nothing of
   the host's but the pinned inputs, so it may be recorded. */
static void logits_step(struct gpu *c, const struct step *s) {
    upload_inputs(c, s);
    embed_rows(c, s);
    for (int i = 0; i < c->g->m->llama.L; i++) run_layer(c, s, i);
    run_head(c, s, 0, s->n);
    copy_out(c, c->host_logits, c->logits, (int64_t)s->n * c->g->m->llama.V);
}

/* Work for a few rows, which is recorded where it is seen for the second time (the first has loaded
   all kernels); kind: 0: logits_step, 1: next_step. Of s it may depend on n alone: what else a step
   says is the same for all of so many rows, or lies in the inputs. */
static void run_recorded(struct gpu *c, const struct step *s, int kind,
                         void (*work)(struct gpu *, const struct step *)) {
    cudaGraph_t graph = NULL;
    if (s->n > GRAPH_ROWS || c->seen[kind][s->n]++ == 0) {
        work(c, s);
        return;
    }
    cudaGraphExec_t *exec = &c->graph[kind][s->n];
    if (*exec == NULL) {
        note(&c->q, cudaStreamBeginCapture(c->q.stream, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
        work(c, s);
        note(&c->q, cudaStreamEndCapture(c->q.stream, &graph), "cudaStreamEndCapture");
        if (graph == NULL) return;
        note(&c->q, cudaGraphInstantiate(exec, graph, 0), "cudaGraphInstantiate");
        note(&c->q, cudaGraphDestroy(graph), "cudaGraphDestroy");
    }
    if (*exec != NULL) note(&c->q, cudaGraphLaunch(*exec, c->q.stream), "cudaGraphLaunch");
}

/* By logits_step, with its progress told beforehand. */
static int forward_few(struct gpu *c, const struct step *s, lvm_error *error) {
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && s->n > 1 && i < c->g->m->llama.L; i++)
        code = report(c->o, "layers", i + 1, c->g->m->llama.L, error);
    if (code == LVM_OK) run_recorded(c, s, 0, logits_step);
    return code;
}

/* Layer by layer, then logits or likelihoods, LOGIT_ROWS rows at a time. */
static int forward_many(struct gpu *c, const struct step *s, const struct batch *b,
                        lvm_error *error) {
    const struct llama *a = &c->g->m->llama;
    int code = LVM_OK;
    upload_inputs(c, s);
    embed_rows(c, s);
    for (int i = 0; code == LVM_OK && i < a->L; i++) {
        run_layer(c, s, i);
        if (b->n > 1) code = report(c->o, "layers", i + 1, a->L, error);
    }
    for (int at = 0, n; code == LVM_OK && at < b->n_out; at += n) {
        n = (int)min64(LOGIT_ROWS, b->n_out - at);
        run_head(c, s, at, n);
        if (b->logits == NULL) {
            nll_kernel<<<(unsigned)n, THREADS, 0, c->q.stream>>>(c->logits, a->V,
                                                                 s->view.targets + at, c->nll);
            launched(&c->q, "nll_kernel");
            copy_out(c, b->nll + at, c->nll, n);
        } else copy_out(c, b->logits + (int64_t)at * a->V, c->logits, (int64_t)n * a->V);
    }
    return code;
}

/* The seam's forward: a place in the cache for each row, the inputs, the work. What fails or is
   cancelled leaves the sequences as they were. */
static int gpu_forward(void *state, const struct batch *b, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int code = use_device(&c->q, error), done = 0;
    int *pos = (int *)malloc((size_t)b->n * sizeof *pos);
    if (pos == NULL) return fail(error, LVM_MEMORY, "out of memory");
    for (; code == LVM_OK && done < b->n; done++) {
        pos[done] = c->seq[b->seqs[done]].n++;
        code = page_for_writing(c, &c->seq[b->seqs[done]], pos[done], error);
    }
    if (code == LVM_OK) {
        struct step s = plan_step(c, b, pos, 0);
        const int few = b->n <= GRAPH_ROWS && s.all && b->logits != NULL;
        code = few ? forward_few(c, &s, error) : forward_many(c, &s, b, error);
        const int ended = wait_for(&c->q, code == LVM_OK ? error : NULL); /* also when cancelled */
        if (code == LVM_OK) code = ended;
        if (code == LVM_OK && few)
            memcpy(b->logits, c->host_logits, (size_t)b->n * (size_t)c->g->m->llama.V * 4);
    }
    if (code != LVM_OK)
        for (int i = done - 1; i >= 0; i--) gpu_kv_trim(c, b->seqs[i], pos[i]);
    free(pos);
    return code;
}

/* =================================================================================================
   13.  Sampling

       p_i = e^((x_i - max x) / temperature)    for the ids i below `codes`

   Of the top_k largest p, those of the nucleus (the fewest of them, largest first, whose sum
   reaches top_p of theirs) are drawn from by their p. That is what sample and settle_token of lvm.c
   do, and this does it to the bit, a block a sequence. The id is the next forward's token, so that
   the device never waits for the host, which puts several steps into the queue and watches a word
   of its own memory for each id.

   Top-k, nucleus and draw each ask for the choice at which a count or a sum is reached, likeliest
   first. Sums are exact in any order (lvm.c, summand), so nothing need be sorted: keys ascend where
   p falls, and of equal ones where the id rises; by the first bits in which keys differ choices
   fall into 1024 bins, and what the bins before hold tells in which of them the goal is reached.
   That bin's keys fall into bins in turn, until there is one choice (a radix select).

   Floor: bytes do not count, for logits are in the L2 cache; it is the latency of that read and of
   some twenty barriers. */

enum { BIN_BITS = 10, BINS = 1 << BIN_BITS /* and threads */, CODE_BITS = 14,
       CODES = 1 << CODE_BITS /* ids to sample from, at most */,
       IN_FLIGHT = 8 /* tokens in the queue */, RING = 2 * IN_FLIGHT };

/* How to sample; what is kept of each sequence from token to token. */
struct sampler {
    lvm_sampling by; /* log_likelihood: not NULL where it is wanted */
    struct {
        struct rng rng;
        double log_likelihood;
        int done;
    } of[SEQUENCES];
};

/* Pinned memory that the device writes and the host watches: a ring buffer of ids,
   ring[token % RING][sequence]: the token's number + 1 in the upper half, the id in the lower. */
struct told {
    volatile uint64_t ring[RING][SEQUENCES];
    struct sampler sampler;
};

/* lvm.c's rng_next. */
static __device__ uint32_t rng_next_as_host(struct rng *r) {
    uint64_t old = r->state;
    r->state = old * 6364136223846793005u + r->increment;
    uint32_t x = (uint32_t)((old >> 18 ^ old) >> 27), turn = (uint32_t)(old >> 59);
    return x >> turn | x << (-turn & 31);
}

/* An integer that is ordered as floats are, and back; -0 becomes 0. */
static __device__ uint32_t ordered(float x) {
    uint32_t u = x == 0 ? 0 : __float_as_uint(x);
    return u >> 31 ? ~u : u | 0x80000000;
}

static __device__ float from_ordered(uint32_t u) {
    return __uint_as_float(u >> 31 ? u & 0x7fffffff : ~u);
}

/* How many choices, and the sum of their p; as a goal: so many or so large a sum, one at least. */
static __device__ double2 plus(double2 a, double2 b) { return {a.x + b.x, a.y + b.y}; }

static __device__ int reached(double2 goal, double2 v) {
    return v.x > 0 && (v.x >= goal.x || v.y >= goal.y);
}

/* Choices that follow each other in the order: their keys are low .. low + 2^bits - 1; those before
   them, and they themselves. */
struct slice {
    uint64_t low;
    int bits;
    double2 before, own;
};

/* A block's shared memory. */
struct sampling {
    /* A bin's sum in units of 2^-37, the least summand: of their lowest 18 bits, of the next, and
       of the rest, below which is the number of choices. */
    uint32_t low[BINS], middle[BINS], rest[BINS];
    double2 sums[32];
    uint32_t most[3][32];
    struct slice found;
    int id;
};

/* A key's upper bits, ascending where p falls; 0 follows 2^-37. */
static __device__ uint32_t upper_key(float p) {
    return min(0x3f800000 - __float_as_uint(p), (37u << 23) + 1);
}

static __device__ uint64_t key_of(float p, int id) {
    return (uint64_t)upper_key(p) << CODE_BITS | (uint32_t)id;
}

/* The sum of v over the threads before this one. */
static __device__ double2 sum_before(struct sampling *m, double2 v) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const unsigned lanes = 0xffffffff;
    double2 sum = v, all = {0, 0};
    for (int i = 1; i < 32; i *= 2) {
        double2 other = {__shfl_up_sync(lanes, sum.x, i), __shfl_up_sync(lanes, sum.y, i)};
        if (lane >= i) sum = plus(sum, other);
    }
    if (lane == 31) m->sums[warp] = sum;
    __syncthreads();
    if (lane < warp) all = m->sums[lane];
    for (int i = 16; i > 0; i /= 2)
        all = plus(all, {__shfl_xor_sync(lanes, all.x, i), __shfl_xor_sync(lanes, all.y, i)});
    return {all.x + (sum.x - v.x), all.y + (sum.y - v.y)};
}

/* The thread's bin of a slice. p: of the choices t, t + 1024 ..; below zero: there is none. */
template <int N>
static __device__ struct slice bin_of(struct sampling *m, const struct slice &s, const float *p) {
    const int t = (int)threadIdx.x, bits = max(0, s.bits - BIN_BITS);
    m->low[t] = m->middle[t] = m->rest[t] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        const uint64_t bin = (key_of(p[i], t + i * BINS) - s.low) >> bits;
        if (p[i] < 0 || bin >= BINS) continue;
        const uint64_t units = (uint64_t)(p[i] * 0x1p37f);
        atomicAdd(&m->low[bin], (uint32_t)units & 0x3ffff);
        atomicAdd(&m->middle[bin], (uint32_t)(units >> 18) & 0x3ffff);
        atomicAdd(&m->rest[bin], (uint32_t)(units >> 36) << 16 | 1);
    }
    __syncthreads();
    const uint64_t units = m->low[t] + ((uint64_t)m->middle[t] << 18) +
                           ((uint64_t)(m->rest[t] >> 16) << 36);
    const double2 own = {(double)(m->rest[t] & 0xffff), (double)units * 0x1p-37};
    return {s.low + ((uint64_t)t << bits), bits, plus(s.before, sum_before(m, own)), own};
}

/* Of the threads' bins the one in which the goal is reached. */
static __device__ struct slice find(struct sampling *m, double2 goal, const struct slice &bin) {
    if (!reached(goal, bin.before) && reached(goal, plus(bin.before, bin.own))) m->found = bin;
    __syncthreads();
    return m->found;
}

/* v[i] becomes the largest of all threads'. */
static __device__ void largest_of_block(uint32_t *v, uint32_t (*parts)[32]) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    for (int i = 0; i < 3; i++) {
        v[i] = __reduce_max_sync(0xffffffff, v[i]);
        if (lane == 0) parts[i][warp] = v[i];
    }
    __syncthreads();
    for (int i = 0; i < 3; i++) v[i] = __reduce_max_sync(0xffffffff, parts[i][lane]);
}

/* The lowest id of the largest logit, `most`. */
template <int N>
static __device__ int argmax(struct sampling *m, const float *x, int codes, float most) {
    m->id = CODES;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++)
        if (x[i] == most) atomicMin(&m->id, min((int)threadIdx.x + i * BINS, codes - 1));
    __syncthreads();
    return m->id;
}

static __device__ float probability(float below, float temperature) {
    return summand_as_host(exp_as_host(temperature == 1 ? below : __fdiv_rn(below, temperature)));
}

/* One of the codes by their logits x, which become probabilities. */
template <int N>
static __device__ int draw(struct sampling *m, const lvm_sampling &by, struct rng *rng, float *x,
                           int codes, float most, float least) {
    const int t = (int)threadIdx.x;
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = t + i * BINS < codes ? probability(x[i] - most, by.temperature) : -1;
    /* A lower logit may, by a rounding, have a p that is larger: hence the 64. */
    uint64_t last = key_of(probability(least - most, by.temperature), CODES - 1) +
                    (64 << CODE_BITS);
    const struct slice bin = bin_of<N>(m, {0, 64 - __clzll(last), {0, 0}, {0, 0}}, x);
    struct slice s = find(m, {(double)codes, HUGE_VAL}, bin);
    const double random = rng_next_as_host(rng) * 0x1p-32;
#pragma unroll 1
    for (int step = by.top_k > 0 && by.top_k < codes ? 0 : 1; step < 3; step++) {
        const double mass = s.before.y + s.own.y; /* of the choices that are left */
        double2 goal = {(double)codes, mass * random};
        if (step == 0) goal = {(double)by.top_k, HUGE_VAL};
        if (step == 1) goal.y = mass * (double)by.top_p;
        if (step == 1 && by.top_p == 1) continue; /* for all are in the nucleus */
        __syncthreads(); /* m->found has been read */
        s = find(m, goal, bin);
        while (s.own.x > 1) s = find(m, goal, bin_of<N>(m, s, x));
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (x[i] >= 0 && (key_of(x[i], t + i * BINS) - s.low) >> s.bits == 0)
            m->id = t + i * BINS;
    __syncthreads();
    return m->id;
}

/* The last thread's sum is -ln softmax(logits[V])[id]. */
static __device__ float nll_of(struct sampling *m, const float *logits, int V, float most, int id) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < V; i += BINS)
        sum += (double)summand_as_host(exp_as_host(logits[i] - most));
    __syncthreads(); /* m->sums has been read */
    sum += sum_before(m, {0, sum}).y;
    return (float)(log_as_host(sum) - ((double)logits[id] - most));
}

/* Grid: [sequences]; a thread has N codes. Reads logits[sequences][V], keeps by->of; writes the id
   to tokens, where the next forward reads it, and to the host's ring, and moves pos on. -1: the
   logits are not finite. Floor: see the chapter's opening. */
template <int N>
__global__ void __launch_bounds__(BINS, 1)
    sample_kernel(const float *logits, int V, int codes, struct sampler *by, int32_t *tokens,
                  int *pos, volatile uint64_t (*ring)[SEQUENCES]) {
    __shared__ struct sampling m;
    const int row = (int)blockIdx.x, t = (int)threadIdx.x;
    wait_for_inputs();
    struct rng rng = by->of[row].rng;
    float x[N];
    uint32_t most[3] = {}; /* the largest of codes, of all; the least's complement */
    logits += (int64_t)row * V;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = logits[min(t + i * BINS, codes - 1)];
#pragma unroll
    for (int i = 0; i < N; i++) {
        most[0] = max(most[0], ordered(x[i]));
        most[2] = max(most[2], ~ordered(x[i]));
    }
    most[1] = most[0];
    for (int i = codes + t; i < V; i += BINS) {
        most[1] = max(most[1], ordered(logits[i]));
        most[2] = max(most[2], ~ordered(logits[i]));
    }
    largest_of_block(most, m.most);
    const float top = from_ordered(most[0]), top_of_all = from_ordered(most[1]),
                least = from_ordered(~most[2]);
    int id = -1;
    if (isfinite(top_of_all) && isfinite(least))
        id = by->by.greedy ? argmax<N>(&m, x, codes, top)
                           : draw<N>(&m, by->by, &rng, x, codes, top, least);
    float nll = 0;
    if (id >= 0 && by->by.log_likelihood != NULL) nll = nll_of(&m, logits, V, top_of_all, id);
    if (t < BINS - 1) return;
    int done = by->of[row].done++;
    ring[done % RING][row] = (uint64_t)(done + 1) << 32 | (uint32_t)id;
    by->of[row].log_likelihood -= (double)nll;
    by->of[row].rng = rng;
    tokens[row] = max(id, 0);
    pos[row]++;
}

/* ---- The loop ---- */

/* By the choices of a thread. */
static auto *sample_kernel_for(int codes) {
    return codes <= 8 * BINS ? sample_kernel<8> : sample_kernel<CODES / BINS>;
}

static void sample_rows(struct gpu *c, const struct step *s) {
    const lvm_model *m = c->g->m;
    launch(&c->q, "sample_kernel", sample_kernel_for(m->codes), dim3((unsigned)s->n), BINS, 0,
           c->logits, m->llama.V, m->codes, c->sampler, (int32_t *)s->view.tokens,
           (int *)s->view.pos, c->told->ring);
}

/* Feeds the tokens that were sampled and samples the next ones. */
static void next_step(struct gpu *c, const struct step *s) {
    embed_rows(c, s);
    for (int i = 0; i < c->g->m->llama.L; i++) run_layer(c, s, i);
    run_head(c, s, 0, s->n);
    sample_rows(c, s);
}

/* Token i of each sequence, which the device tells, to the caller. */
static int receive_token(struct gpu *c, struct continuation *k, int i, lvm_error *error) {
    const float nan = NAN;
    int code = settle(&c->q, error);
    for (int s = 0; code == LVM_OK && s < k->n_seqs; s++) {
        const volatile uint64_t *word = &c->told->ring[i % RING][s];
        for (int turn = 1; *word >> 32 != (uint64_t)i + 1; turn++) {
            cudaError_t e = turn % 256 != 0 ? cudaErrorNotReady : cudaStreamQuery(c->q.stream);
            if (e == cudaErrorNotReady || *word >> 32 == (uint64_t)i + 1) continue;
            code = cuda_fail(e != cudaSuccess ? e : cudaErrorUnknown, "waiting for a token", error);
            break;
        }
        int32_t id = (int32_t)(uint32_t)*word;
        if (code == LVM_OK && id < 0)
            code = check_finite(&nan, 1, "the logits behind generated token", k->done + i, error);
        if (code == LVM_OK) k->ids[s * k->ld + i] = id;
    }
    cudaGetLastError(); /* that the queue is not done yet is no error */
    return code;
}

/* The pages of all tokens that will be fed; the sequences are as long as they will be. */
static int pages_ahead(struct gpu *c, const struct continuation *k, lvm_error *error) {
    int code = LVM_OK;
    for (int s = 0; code == LVM_OK && s < k->n_seqs; s++) {
        int pos = c->seq[s].n, end = pos + k->n - 1;
        c->seq[s].n = end;
        for (; code == LVM_OK && pos < end; pos = (pos / KEYS + 1) * KEYS)
            code = page_for_writing(c, &c->seq[s], pos, error);
    }
    return code;
}

/* What the device needs for all tokens. start: how long the sequences are; the kernel adds 1 to a
   row's position for each token that it samples, so inputs begin one before. All but the last of
   k->n are fed. */
static struct step begin_sampling(struct gpu *c, const struct continuation *k, const int *start) {
    const size_t V = (size_t)c->g->m->llama.V;
    const double *judged = k->sampling->log_likelihood;
    struct sampler *to = &c->told->sampler;
    int32_t tokens[SEQUENCES] = {0};
    int rows[SEQUENCES], before[SEQUENCES];
    struct batch b = {k->n_seqs, tokens, rows, k->n_seqs, rows, k->logits, NULL, NULL};
    memset((void *)c->told->ring, 0, sizeof c->told->ring);
    to->by = *k->sampling;
    for (int s = 0; s < k->n_seqs; s++) {
        rows[s] = s;
        before[s] = start[s] - 1;
        to->of[s] = {k->rng[s], judged != NULL ? judged[s] : 0, 0};
    }
    struct step s = plan_step(c, &b, before, k->n - 1);
    upload_inputs(c, &s);
    copy(&c->q, c->sampler, to, sizeof *to, "copying what to sample by");
    copy(&c->q, c->logits, k->logits, (size_t)k->n_seqs * V * sizeof(float), "copying logits");
    return s;
}

/* Takes back what the sampler kept. */
static int end_sampling(struct gpu *c, struct continuation *k, lvm_error *error) {
    struct sampler *to = &c->told->sampler;
    copy(&c->q, to, c->sampler, sizeof *to, "copying the sampler");
    int code = wait_for(&c->q, error);
    for (int s = 0; code == LVM_OK && s < k->n_seqs; s++) {
        k->rng[s] = to->of[s].rng;
        if (to->by.log_likelihood != NULL) to->by.log_likelihood[s] = to->of[s].log_likelihood;
    }
    return code;
}

/* Up to IN_FLIGHT tokens' work is in the queue while the host waits for the first of them. */
static int gpu_generate(void *state, struct continuation *k, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int start[SEQUENCES], sent = 1, code = use_device(&c->q, error);
    for (int s = 0; s < k->n_seqs; s++) start[s] = c->seq[s].n;
    if (code == LVM_OK) code = pages_ahead(c, k, error);
    if (code == LVM_OK) {
        struct step step = begin_sampling(c, k, start);
        for (int i = 0; code == LVM_OK && i < k->n; i++) {
            if (i == 0) sample_rows(c, &step);
            for (; sent < k->n && sent < i + IN_FLIGHT; sent++)
                run_recorded(c, &step, 1, next_step);
            code = report(c->o, "generate", k->done + i, k->all, error);
            if (code == LVM_OK) code = receive_token(c, k, i, error);
        }
    }
    if (code == LVM_OK) code = end_sampling(c, k, error);
    if (code == LVM_OK) return LVM_OK;
    wait_for(&c->q, NULL); /* for what is in the queue still writes into pages */
    for (int s = 0; s < k->n_seqs; s++) gpu_kv_trim(c, s, start[s]);
    return code;
}

/* =================================================================================================
   14.  The tokenizer

       groupnorm(x) = g (x - mean) / sqrt(variance + 1e-6) + b    over pixels and a group's channels
       the id of a latent x = argmin over the codebook's e of |e|^2 - 2 x . e

   Maps are NHWC, [images][side][side][c], in f32; convolutions are chapter 7's, images side by
   side. What stands in front of each, GroupNorm and SiLU, is a pass over the map: x scale + shift
   and x / (1 + e^-x), in f32 or in the two f16 parts that tensor cores take. Its scales come from
   sums over blocks of 8 x 8 pixels in a fixed order. Convolutions on tensor cores leave these with
   their outputs; behind anything else they are a pass of their own.

   Images come in groups of up to IMAGES. The maps of a few of them fill the GPU where sides are
   large, and take much memory: these operations are run for `few` images at a time, those of small
   sides for all. A kernel whose floor is not named has its bytes over the bandwidth. */

enum { VQ_GROUPS = 32, SCORES = 1 << 22 /* floats of an attention's scores at a time */,
       HIGH_LOW_PIXELS = 4 /* of a thread of high_low_kernel */,
       VQ_FLOATS = 100 << 20 >> 2 /* of a buffer for maps, more where one image needs it */ };

/* What a convolution leaves of its output, of a map that came otherwise: a block has `length`
   neighbouring pixels, 64 at most. Grid: [blocks][images]. Floor: the map's bytes. */
__global__ void channel_sums_kernel(const float *x, int pixels, int length, int c, float2 *sums) {
    const int first = (int)blockIdx.x * length, n = min(length, pixels - first);
    const int64_t image = blockIdx.y;
    for (int k = (int)threadIdx.x; k < c; k += (int)blockDim.x) {
        float sum = 0, square = 0;
#pragma unroll 8
        for (int p = 0; p < n; p++) {
            float v = x[(image * pixels + first + p) * c + k];
            sum += v;
            square = fmaf(v, v, square);
        }
        sums[(image * gridDim.x + blockIdx.x) * c + k] = make_float2(sum, square);
    }
}

/* Grid: [groups][images]. From sums[images][blocks][c][2]: scale and shift such that norm(x) = x
   scale + shift, where they are wanted, [images][c] each, and squares[image][group], the group's
   sum of squares. Sums are in double: a variance is a small difference of large ones. Floor: a
   launch. */
__global__ void block_scales_kernel(const float *sums, int blocks, int pixels, int c,
                                    const float *scale, const float *shift, float *to_scale,
                                    float *to_shift, float *squares) {
    __shared__ double parts[2][THREADS];
    const int width = c / VQ_GROUPS, first = (int)blockIdx.x * width, tid = (int)threadIdx.x;
    double sum = 0, square = 0, count = (double)pixels * width;
    for (int i0 = tid; i0 < blocks * width; i0 += THREADS * 8) {
        float2 v[8] = {};
#pragma unroll
        for (int k = 0; k < 8; k++) {
            int i = i0 + k * THREADS;
            int64_t block = (int64_t)blockIdx.y * blocks + i / width;
            if (i < blocks * width)
                v[k] = *(const float2 *)(sums + (block * c + first + i % width) * 2);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) sum += v[k].x, square += v[k].y;
    }
    parts[0][tid] = sum;
    parts[1][tid] = square;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (tid >= half) continue;
        parts[0][tid] += parts[0][tid + half];
        parts[1][tid] += parts[1][tid + half];
    }
    __syncthreads();
    double mean = parts[0][0] / count, variance = parts[1][0] / count - mean * mean;
    double r = 1 / sqrt((variance > 0 || variance != variance ? variance : 0) + 1e-6);
    if (tid == 0) squares[blockIdx.y * VQ_GROUPS + blockIdx.x] = (float)parts[1][0];
    for (int i = tid; scale != NULL && i < width; i += THREADS) {
        to_scale[blockIdx.y * c + first + i] = (float)(scale[first + i] * r);
        to_shift[blockIdx.y * c + first + i] =
            (float)(shift[first + i] - mean * scale[first + i] * r);
    }
}

/* GroupNorm's last step, and SiLU where it follows. */
static __device__ float group_normed(float x, float scale, float shift, int silu) {
    float v = fmaf(x, scale, shift);
    return silu ? v / (1 + expf(-v)) : v;
}

/* y = f(x scale + shift) in f32, [images][pixels][c], four channels a thread; area: floats of an
   image's map, all: of all. */
__global__ void apply_norm_kernel(const float *x, const float *scale, const float *shift, int silu,
                                  int64_t area, int c, int64_t all, float *y) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= all) return;
    int64_t at = i / area * c + i % c;
    float4 v = *(const float4 *)(x + i), a = *(const float4 *)(scale + at),
           b = *(const float4 *)(shift + at);
    *(float4 *)(y + i) =
        make_float4(group_normed(v.x, a.x, b.x, silu), group_normed(v.y, a.y, b.y, silu),
                    group_normed(v.z, a.z, b.z, silu), group_normed(v.w, a.w, b.w, silu));
}

/* What high_low_kernel reads and writes. */
struct high_low {
    const float *x, *scale, *shift; /* [images][pixels][c]; [images][c] */
    const float *squares;           /* [images][VQ_GROUPS] */
    float *down;                    /* [images] */
    __half *out;                    /* [images][pixels][c / 32][2][32] */
    float up;
    int pixels, c;
};

/* As group_normed; an error of some 1e-7 is nothing beside that of the f16 parts. */
static __device__ float normed_fast(float x, float scale, float shift, int silu) {
    float v = fmaf(x, scale, shift);
    return silu ? __fdividef(v, 1 + __expf(-v)) : v;
}

/* v up as high and low parts, eight of each. */
static __device__ void split8(const float *v, float up, __half *out) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float a = v[2 * i] * up, b = v[2 * i + 1] * up;
        __half2 h = __floats2half2_rn(a, b);
        float2 f = __half22float2(h);
        high[i] = as_word(h);
        low[i] = as_word(__floats2half2_rn(a - f.x, b - f.y));
    }
    *(uint4 *)out = make_uint4(high[0], high[1], high[2], high[3]);
    *(uint4 *)(out + CONV_C) = make_uint4(low[0], low[1], low[2], low[3]);
}

enum { HIGH_LOW_NORM, HIGH_LOW_SILU, HIGH_LOW_RAW };

/* out = the two parts of norm(x) up, of silu(norm(x)) up, or of x as it is, up for each image from
   its sum of squares, which no element exceeds. Grid: [pixels][images]; a thread has 8 channels of
   HIGH_LOW_PIXELS pixels. Floor: bytes in + bytes out. */
template <int WAY> __global__ void high_low_kernel(const struct high_low s) {
    const int octets = s.c / 8, octet = (int)threadIdx.x % octets, step = (int)blockDim.x / octets;
    const int first = (int)blockIdx.x * step * HIGH_LOW_PIXELS + (int)threadIdx.x / octets;
    const int64_t image = blockIdx.y, at = image * s.c + octet * 8;
    float up = s.up, scale[8], shift[8];
    float4 x[HIGH_LOW_PIXELS][2];
#pragma unroll
    for (int i = 0; i < HIGH_LOW_PIXELS * 2; i++) {
        int64_t p = image * s.pixels + min(first + i / 2 * step, s.pixels - 1);
        x[i / 2][i % 2] = *(const float4 *)(s.x + p * s.c + octet * 8 + i % 2 * 4);
    }
    if (WAY == HIGH_LOW_RAW) {
        float sum = 0;
        for (int i = 0; i < VQ_GROUPS; i++) sum += s.squares[image * VQ_GROUPS + i];
        up = power_for(sqrtf(sum));
        if (blockIdx.x == 0 && threadIdx.x == 0) s.down[image] = 1 / up;
    } else
        for (int i = 0; i < 8; i++) scale[i] = s.scale[at + i], shift[i] = s.shift[at + i];
#pragma unroll
    for (int i = 0; i < HIGH_LOW_PIXELS; i++) {
        int p = first + i * step;
        if (p >= s.pixels) break;
        float v[8] = {x[i][0].x, x[i][0].y, x[i][0].z, x[i][0].w,
                      x[i][1].x, x[i][1].y, x[i][1].z, x[i][1].w};
        for (int k = 0; WAY != HIGH_LOW_RAW && k < 8; k++)
            v[k] = normed_fast(v[k], scale[k], shift[k], WAY == HIGH_LOW_SILU);
        split8(v, up, s.out + (image * s.pixels + p) * s.c * 2 + octet / 4 * 64 + octet % 4 * 8);
    }
}

/* 8-bit images to maps of values from 0 to 1; a thread an element. */
__global__ void from_bytes_kernel(const uint8_t *rgb, int64_t n, float *x) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) x[i] = (float)rgb[i] / 255;
}

/* Pixels to bytes, as lvm.c's to_byte; bad[image] where one is not finite. */
__global__ void to_bytes_kernel(const float *x, int64_t area, int64_t n, uint8_t *rgb, int *bad) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    float v = x[i];
    if (!isfinite(v)) bad[i / area] = 1;
    rgb[i] = (uint8_t)rintf(255 * (v > 0 ? (v < 1 ? v : 1) : 0));
}

/* bad[i / area] = 1 where one of n is not finite. */
__global__ void finite_kernel(const float *x, int64_t area, int64_t n, int *bad) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n && !isfinite(x[i])) bad[i / area] = 1;
}

/* side_out < side_in: the mean of four pixels; else each pixel four times. Grid: [a row of y][rows]
   [images]. */
__global__ void resize_kernel(const float *x, int side_in, int side_out, int c, float *y) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x), px = i / c, line = side_in * c;
    const int64_t py = blockIdx.y, image = blockIdx.z;
    if (px >= side_out) return;
    x += (image * side_in + (side_out < side_in ? 2 * py : py / 2)) * line + i % c;
    float *to = y + (image * side_out + py) * side_out * c + i;
    if (side_out > side_in) *to = x[px / 2 * c];
    else {
        x += 2 * px * c;
        *to = (x[0] + x[c] + x[line] + x[line + c]) * 0.25f;
    }
}

/* Grid: [rows]. s[rows][n] = softmax(scale s), in place. */
__global__ void softmax_kernel(float *s, int n, float scale) {
    float *row = s + (int64_t)blockIdx.x * n, most = -HUGE_VALF, sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) most = fmaxf(most, row[i] * scale);
    most = reduce_block<1>(most);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        row[i] = expf(__fmul_rn(row[i], scale) - most);
        sum += row[i];
    }
    sum = reduce_block<0>(sum);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) row[i] /= sum;
}

/* y[c][ld] = x[n][c] transposed, zeros behind n, of each image. Grid: [blocks][images]. */
__global__ void transpose_kernel(const float *x, int n, int c, int ld, float *y) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, image = blockIdx.y;
    if (i >= (int64_t)c * ld) return;
    int64_t k = i / ld, row = i % ld;
    y[image * c * ld + i] = row < n ? x[(image * n + row) * c + k] : 0;
}

/* ids[vector] = the nearest of the nearest codes of each part of the codebook; a warp a vector. */
__global__ void nearest_kernel(const struct nearest *found, int vectors, int parts, int32_t *ids) {
    int i = (int)(blockIdx.x * WARPS + threadIdx.x / 32);
    struct nearest best = {HUGE_VALF, 0};
    if (i >= vectors) return;
    for (int k = (int)threadIdx.x % 32; k < parts; k += 32) {
        struct nearest n = found[(int64_t)i * parts + k];
        if (n.distance < best.distance) best = n;
    }
    best = nearer_of<32>(best);
    if (threadIdx.x % 32 == 0) ids[i] = best.code;
}

/* ---- Convolutions, and what stands in front of them; `number` is an operation's ---- */

/* Of n normalised values none is further than sqrt(n) deviations from their mean. */
static float largest_normed(const struct groupnorm *norm, int side) {
    const float *scale = floats(&norm->scale), *shift = floats(&norm->shift);
    const int channels = norm->scale.rows;
    float far = (float)side * sqrtf((float)(channels / VQ_GROUPS)), most = 0;
    for (int i = 0; i < channels; i++) most = fmaxf(most, fabsf(scale[i]) * far + fabsf(shift[i]));
    return most;
}

/* Scales of a map, and its squares, from sums of blocks. */
static void find_scales(struct gpu *c, const float *map, int channels, const float *scale,
                        const float *shift) {
    struct vq_memory *v = &c->vq;
    const int pixels = v->side * v->side, across = (v->side + 7) / 8, blocks = across * across;
    const unsigned images = (unsigned)v->images;
    if (v->summed != map) {
        channel_sums_kernel<<<dim3((unsigned)blocks, images), 128, 0, c->q.stream>>>(
            map, pixels, (pixels + blocks - 1) / blocks, channels, (float2 *)v->blocks);
        launched(&c->q, "channel_sums_kernel");
        v->summed = map;
    }
    block_scales_kernel<<<dim3(VQ_GROUPS, images), THREADS, 0, c->q.stream>>>(
        v->blocks, blocks, pixels, channels, scale, shift, v->scale, v->shift, v->squares);
    launched(&c->q, "block_scales_kernel");
}

/* v->n = a convolution's input, f16 parts or f32, unless the convolution before had the same, as
   in an attention. norm: see conv2d. */
static void prepare_input(struct gpu *c, int number, const float *map, int norm, int channels,
                          int f16) {
    struct vq_memory *v = &c->vq;
    const struct gpu_op *w = &c->g->ops[number];
    const struct vq_op *op = &c->g->m->vq->ops[number];
    const int pixels = v->side * v->side, silu = op->kind != VQ_ATTENTION, octets = channels / 8;
    const int way = 2 * norm + f16;
    if (v->prepared == map && v->prepared_way == way) return;
    v->prepared = map;
    v->prepared_way = way;
    if (norm < 0) find_scales(c, map, channels, NULL, NULL);
    else find_scales(c, map, channels, w->scale[norm], w->shift[norm]);
    if (!f16) {
        const int64_t area = (int64_t)pixels * channels, all = area * v->images;
        apply_norm_kernel<<<blocks_of(all / 4), THREADS, 0, c->q.stream>>>(
            map, v->scale, v->shift, silu, area, channels, all, v->n);
        launched(&c->q, "apply_norm_kernel");
        return;
    }
    if (norm >= 0) v->up = power_for(largest_normed(&op->norm[norm], v->side));
    const struct high_low s = {map, v->scale, v->shift, v->squares, v->down, (__half *)v->n, v->up,
                               pixels, channels};
    const int threads = octets * (octets < THREADS ? THREADS / octets : 1),
              step = threads / octets * HIGH_LOW_PIXELS;
    auto *kernel = norm < 0 ? high_low_kernel<HIGH_LOW_RAW>
                   : silu ? high_low_kernel<HIGH_LOW_SILU> : high_low_kernel<HIGH_LOW_NORM>;
    kernel<<<dim3((unsigned)((pixels + step - 1) / step), (unsigned)v->images), threads, 0,
             c->q.stream>>>(s);
    launched(&c->q, "high_low_kernel");
}

/* A convolution's weights in f16, [rows][ld]. */
static const __half *conv_weights(struct gpu *c, const struct matrix *w) {
    if (w->type == LVM_F16) return (const __half *)w->q;
    with_type(w->type, [&](auto type) {
        weights_f16_kernel<decltype(type)::value>
            <<<blocks_of((int64_t)w->rows * w->ld / 4), THREADS, 0, c->q.stream>>>(
                *w, (__half2 *)c->vq.w16);
        launched(&c->q, "weights_f16_kernel");
    });
    return c->vq.w16;
}

/* out = conv(map) + residual; in front GroupNorm number `norm` and, but for an attention, SiLU, or,
   -1, nothing. summed: sums of out's blocks are wanted, if tensor cores leave any. */
static void conv2d(struct gpu *c, int number, int i, const float *map, int norm,
                   const float *residual, float *out, int summed) {
    struct vq_memory *v = &c->vq;
    const struct vq_op *op = &c->g->m->vq->ops[number];
    const struct matrix *w = &c->g->ops[number].conv[i];
    const int size = op->conv[i].size, c_in = w->cols / (size * size), down = op->kind == VQ_DOWN;
    const int stride = down ? 2 : 1, up = op->kind == VQ_UP, pad = down ? 0 : size / 2;
    const int f16 = w->type != LVM_F32 && !c->exact && c_in % CONV_C == 0 && c_in <= 8192;
    const float *bias = c->g->ops[number].bias[i];
    summed &= f16 && w->rows % CONV_C == 0;
    if (f16 || norm >= 0) prepare_input(c, number, map, norm, c_in, f16);
    if (f16) {
        const struct conv_job j = {(const __half *)v->n, conv_weights(c, w), bias, residual,
                                   norm < 0 ? v->down : NULL, out, summed ? v->blocks : NULL,
                                   1 / v->up, v->images, c_in, w->rows, w->ld, v->side,
                                   op->side_out, up, pad};
        run_conv(&c->q, &j, size, stride);
    } else {
        struct product j = linear(norm < 0 ? map : v->n, *w, out,
                                  v->images * op->side_out * op->side_out);
        j.bias = bias;
        j.residual = residual;
        j.c_in = c_in;
        j.size = size;
        j.side_in = v->side;
        j.side_out = op->side_out;
        j.stride = stride;
        j.up = up;
        j.pad = pad;
        run_product(&c->q, &j);
    }
    if (summed) v->summed = out;
    else if (v->summed == out) v->summed = NULL;
}

/* ---- The operations; each turns the current map, x, into the next ---- */

/* x = x + conv2(silu(norm2(conv1(silu(norm1(x)))))) */
static void run_residual(struct gpu *c, int op) {
    struct vq_memory *v = &c->vq;
    const int shortcut = c->g->ops[op].conv[2].q != NULL;
    if (shortcut) conv2d(c, op, 2, v->x, -1, NULL, v->u, 0);
    conv2d(c, op, 0, v->x, 0, NULL, v->t, 1);
    if (shortcut) std::swap(v->x, v->u);
    conv2d(c, op, 1, v->t, 1, v->x, v->x, 1);
}

static struct matrix as_matrix(const float *x, int rows, int cols, int ld) {
    return {LVM_F32, rows, cols, ld, 0, (uint8_t *)x, NULL};
}

/* t = softmax(q k^T / sqrt(c)) v over the pixels of each image, for `rows` of them from `first` on;
   u is v, transposed. */
static void attend_pixels(struct gpu *c, int first, int rows) {
    struct vq_memory *v = &c->vq;
    const int n = v->side * v->side, ch = v->c, ld = round_up(n, SPAN);
    const int64_t map = (int64_t)n * ch, scores = (int64_t)rows * n, from = (int64_t)first * ch;
    struct product by_keys = linear(v->q + from, as_matrix(v->k, n, ch, ch), v->s, rows),
                   by_values = linear(v->s, as_matrix(v->u, ch, n, ld), v->t + from, rows);
    by_keys.batch = by_values.batch = v->images;
    by_keys.in_step = by_keys.w_step = by_values.out_step = map;
    by_keys.out_step = by_values.in_step = scores;
    by_values.w_step = (int64_t)ch * ld;
    run_product(&c->q, &by_keys);
    softmax_kernel<<<(unsigned)(rows * v->images), THREADS, 0, c->q.stream>>>(
        v->s, n, 1 / sqrtf((float)ch));
    launched(&c->q, "softmax_kernel");
    run_product(&c->q, &by_values);
}

/* x = x + proj(attention(q, k, v)), as many rows at a time as there is room for their scores. */
static void run_attention(struct gpu *c, int op) {
    struct vq_memory *v = &c->vq;
    float *to[3] = {v->q, v->k, v->v};
    const int n = v->side * v->side, rows = (int)max64(1, min64(n, SCORES / n / v->images));
    for (int i = 0; i < 3; i++) conv2d(c, op, i, v->x, 0, NULL, to[i], 0);
    const int ld = round_up(n, SPAN);
    transpose_kernel<<<dim3(blocks_of((int64_t)v->c * ld), (unsigned)v->images), THREADS, 0,
                       c->q.stream>>>(v->v, n, v->c, ld, v->u);
    launched(&c->q, "transpose_kernel");
    for (int first = 0; first < n; first += rows)
        attend_pixels(c, first, (int)min64(rows, n - first));
    if (v->summed == v->t || v->summed == v->u) v->summed = NULL;
    conv2d(c, op, 3, v->t, -1, v->x, v->x, 1);
}

/* t = x of half or twice the side, without a convolution. */
static void resize_map(struct gpu *c, int side_out) {
    struct vq_memory *v = &c->vq;
    dim3 grid(blocks_of((int64_t)side_out * v->c), (unsigned)side_out, (unsigned)v->images);
    resize_kernel<<<grid, THREADS, 0, c->q.stream>>>(v->x, v->side, side_out, v->c, v->t);
    launched(&c->q, "resize_kernel");
    v->summed = NULL;
}

static void run_op(struct gpu *c, int number) {
    struct vq_memory *v = &c->vq;
    const struct vq_op *op = &c->g->m->vq->ops[number];
    v->prepared = NULL;
    if (op->kind == VQ_RESIDUAL) run_residual(c, number);
    else if (op->kind == VQ_ATTENTION) run_attention(c, number);
    else {
        if (c->g->ops[number].conv[0].q == NULL) resize_map(c, op->side_out);
        else conv2d(c, number, 0, v->x, op->kind == VQ_HEAD ? 0 : -1, NULL, v->t, 1);
        std::swap(v->x, v->t);
    }
    v->side = op->side_out;
    v->c = op->c_out;
}

/* A group's operations count as those of so many images one after the other would. */
static int run_ops(struct gpu *c, int begin, int end, lvm_error *error) {
    struct vq_memory *v = &c->vq;
    int code = LVM_OK;
    for (int i = begin; code == LVM_OK && i < end; i++, v->done += v->images) {
        code = report(c->o, v->stage, v->done, v->all, error);
        if (code == LVM_OK) run_op(c, i);
    }
    return code;
}

/* ---- Images to tokens, and back ---- */

static void begin_maps(struct gpu *c, int n, int side, int channels) {
    c->vq.images = n;
    c->vq.side = side;
    c->vq.c = channels;
    c->vq.summed = NULL;
}

/* The maps that are worked on, to or from those of all images. */
static void copy_maps(struct gpu *c, float *to, const float *from) {
    const struct vq_memory *v = &c->vq;
    copy(&c->q, to, from, (size_t)v->images * v->side * v->side * v->c * 4, "copying maps");
}

static void begin_stage(struct gpu *c, const char *stage, int64_t done, int64_t all, int bad) {
    c->vq.stage = stage;
    c->vq.done = done;
    c->vq.all = all;
    note(&c->q, cudaMemsetAsync(c->vq.bad, bad, IMAGES * sizeof(int), c->q.stream), "cudaMemset");
}

/* Waits for a call's end. What is not finite is an error, which names the first image. */
static int end_images(struct gpu *c, int code, int n, int first, const char *what,
                      lvm_error *error) {
    const float nan = NAN;
    int bad[IMAGES] = {0};
    if (code == LVM_OK) copy(&c->q, bad, c->vq.bad, sizeof bad, "copying results");
    int ended = wait_for(&c->q, code == LVM_OK ? error : NULL);
    if (code == LVM_OK) code = ended;
    for (int i = 0; code == LVM_OK && i < n; i++)
        if (bad[i]) code = check_finite(&nan, 1, what, first + i + 1, error);
    return code;
}

/* ids of n images from the current map. */
static void quantize_images(struct gpu *c, int n) {
    struct vq_memory *v = &c->vq;
    const struct vqgan *vq = c->g->m->vq;
    const int area = vq->S * vq->S, vectors = n * area, dim = vq->code_dim;
    const int parts = (vq->codes + NEAREST_CODES - 1) / NEAREST_CODES;
    const int64_t all = (int64_t)vectors * dim;
    struct product j = linear(v->x, c->g->codebook, NULL, vectors);
    j.norms = c->g->code_norms;
    j.found = v->found;
    finite_kernel<<<blocks_of(all), THREADS, 0, c->q.stream>>>(v->x, (int64_t)area * dim, all,
                                                               v->bad);
    launched(&c->q, "finite_kernel");
    run_product(&c->q, &j);
    nearest_kernel<<<(unsigned)(vectors + WARPS - 1) / WARPS, THREADS, 0, c->q.stream>>>(
        v->found, vectors, parts, v->ids);
    launched(&c->q, "nearest_kernel");
}

static int gpu_encode(void *state, const uint8_t *rgb, int n, int first, int all, int32_t *ids,
                      float *latent, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    struct vq_memory *v = &c->vq;
    const struct vqgan *vq = c->g->m->vq;
    const struct vq_op *op = &vq->ops[v->cut[0]];
    const int64_t pixels = (int64_t)vq->R * vq->R * 3, steps = vq->n_encoder, T = c->g->m->T,
                  map = (int64_t)op->side_in * op->side_in * op->c_in;
    int code = use_device(&c->q, error);
    if (code != LVM_OK) return code;
    begin_stage(c, "encode", first * steps, all * steps, c->g->bad_codebook);
    for (int i = 0, few; code == LVM_OK && i < n; i += few) {
        few = (int)min64(v->few[0], n - i);
        memcpy(v->host_rgb + i * pixels, rgb + i * pixels, few * pixels);
        copy(&c->q, v->rgb + i * pixels, v->host_rgb + i * pixels, few * pixels, "copying images");
        begin_maps(c, few, vq->R, 3);
        from_bytes_kernel<<<blocks_of(few * pixels), THREADS, 0, c->q.stream>>>(
            v->rgb + i * pixels, few * pixels, v->x);
        launched(&c->q, "from_bytes_kernel");
        code = run_ops(c, 0, v->cut[0], error);
        if (code == LVM_OK && few < n) copy_maps(c, v->whole + i * map, v->x);
    }
    begin_maps(c, n, op->side_in, op->c_in);
    if (code == LVM_OK && n > v->few[0]) copy_maps(c, v->x, v->whole);
    if (code == LVM_OK) code = run_ops(c, v->cut[0], vq->n_encoder, error);
    if (code == LVM_OK) {
        quantize_images(c, n);
        copy(&c->q, ids, v->ids, n * T * 4, "copying tokens");
        if (latent != NULL) copy(&c->q, latent, v->x, n * T * vq->code_dim * 4, "copying latents");
    }
    return end_images(c, code, n, first, c->g->bad_codebook ? "the codebook's norms for image"
                                                            : "the latents of image", error);
}

/* pixels: where they are wanted in f32 too. */
static int gpu_decode(void *state, const int32_t *ids, int n, int first, int all, uint8_t *rgb,
                      float *pixels, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    struct vq_memory *v = &c->vq;
    const struct vqgan *vq = c->g->m->vq;
    const struct vq_op *op = &vq->ops[v->cut[1]];
    const int64_t area = (int64_t)vq->R * vq->R * 3, T = c->g->m->T,
                  steps = vq->n_ops - vq->n_encoder,
                  map = (int64_t)op->side_in * op->side_in * op->c_in;
    int code = use_device(&c->q, error);
    if (code != LVM_OK) return code;
    begin_stage(c, "decode", first * steps, all * steps, 0);
    copy(&c->q, v->ids, ids, n * T * 4, "copying tokens");
    begin_maps(c, n, vq->S, vq->code_dim);
    with_type(c->g->codebook.type, [&](auto type) {
        embed_kernel<decltype(type)::value><<<(unsigned)(n * T), THREADS, 0, c->q.stream>>>(
            c->g->codebook, v->ids, v->x);
        launched(&c->q, "embed_kernel");
    });
    code = run_ops(c, vq->n_encoder, v->cut[1], error);
    if (code == LVM_OK && n > v->few[1]) copy_maps(c, v->whole, v->x);
    for (int i = 0, few; code == LVM_OK && i < n; i += few) {
        few = (int)min64(v->few[1], n - i);
        begin_maps(c, few, op->side_in, op->c_in);
        if (few < n) copy_maps(c, v->x, v->whole + i * map);
        code = run_ops(c, v->cut[1], vq->n_ops, error);
        if (code != LVM_OK) break;
        to_bytes_kernel<<<blocks_of(few * area), THREADS, 0, c->q.stream>>>(
            v->x, area, few * area, v->rgb + i * area, v->bad + i);
        launched(&c->q, "to_bytes_kernel");
        if (pixels != NULL) copy(&c->q, pixels + i * area, v->x, few * area * 4, "copying pixels");
    }
    if (code == LVM_OK) copy(&c->q, rgb, v->rgb, n * area, "copying images");
    return end_images(c, code, n, first, "the pixels of image", error);
}

/* =================================================================================================
   15.  The seam

   What lvm.c calls: struct backend at the end of this file, whose contract is chapter 7 of lvm.c. A
   context's memory is one allocation, laid out before anything runs, so that what does not fit is
   an error at once; only pages of the KV cache come later, when positions are reached. */

/* ---- A context's memory ---- */

/* How many of the layers and the output go by products in f16; the others go by f32. */
static int products_in_f16(const struct gpu *c) {
    int n = head_in_f16(c);
    for (int i = 0; i < c->g->m->llama.L; i++) n += in_f16(c, &c->g->layers[i]);
    return n;
}

/* Floats that split_kernel may write for a row. */
static int64_t row_sums(const struct gpu *c) {
    return (int64_t)c->g->m->llama.H * c->max_pages * (KEYS / BLOCK) * (c->kv.dp + 2);
}

/* The transformer's part. */
static void place_lm(struct gpu *c, struct arena *a) {
    const struct llama *l = &c->g->m->llama;
    int64_t N = c->rows, Q = (int64_t)l->H * l->d, K = (int64_t)l->G * l->d, V = l->V;
    if (l->L == 0) return;
    const int products = products_in_f16(c), f32 = products <= l->L, f16 = products > 0;
    int64_t hidden = l->F * f32, front = max64(l->D * f32, LOGIT_ROWS);
    struct { float **p; int64_t n; } all[] = {
        {&c->x, N * l->D}, {&c->qb, N * Q}, {&c->kb, N * K}, {&c->vb, N * K},
        {&c->heads, N * Q * f32}, {&c->f, N * front},
        {&c->gate, N * hidden}, {&c->up, N * hidden},
        {&c->partial, c->kv.tensor ? c->split_rows * row_sums(c) : 0},
        {&c->logits, LOGIT_ROWS * V}, {&c->nll, LOGIT_ROWS}};
    for (const auto &one : all) take(a, one.p, one.n);
    const int64_t D = round_up(l->D, SPAN), F = round_up(l->F, SPAN);
    const int64_t heads = round_up((int)Q, SPAN);
    N = round_up((int)N, X_ROWS);
    take(a, &c->h, f16 * N * max64(D, heads));
    take(a, &c->hidden, f16 * N * F);
    take(a, &c->q16, N * l->H * c->kv.dp * c->kv.tensor);
    take(a, &c->query_c, N * l->H * c->kv.tensor);
    const int64_t tile = f16 * W_ROWS;
    const size_t output = a->used + (size_t)(panel_tiles(l->V, 0) * tile * D) * sizeof(__half);
    take(a, &c->w16[QKV], (panel_tiles((int)Q, 0) + 2 * panel_tiles((int)K, 0)) * tile * D);
    take(a, &c->w16[O], panel_tiles(l->D, 0) * tile * heads);
    take(a, &c->w16[GATE_UP], panel_tiles(l->F, 1) * tile * D);
    take(a, &c->w16[DOWN], panel_tiles(l->D, 0) * tile * F);
    a->used = std::max(a->used, output); /* the output's panels take the place of a layer's */
    take(a, &c->sampler, 1);
    take(a, &c->in, (int64_t)told_bytes(c, (int)max64(N, SPLIT_ROWS)));
}

/* Floats of an operation's largest map; an attention transposes its values, with padding. */
static int64_t map_floats(const struct vq_op *op) {
    int64_t in = (int64_t)op->side_in * op->side_in, out = (int64_t)op->side_out * op->side_out;
    return max64((op->kind == VQ_ATTENTION ? in + SPAN : in) * op->c_in, out * op->c_out);
}

/* How many images at a time the operations of large sides take, and where these end and begin: one
   place for every number of images. Returns the floats of a buffer for maps. */
static int64_t cut_ops(struct gpu *c) {
    const struct vqgan *vq = c->g->m->vq;
    struct vq_memory *v = &c->vq;
    int64_t most[2] = {0, 0}; /* of the encoder, of the decoder */
    auto floats = [&](int i) { return map_floats(&vq->ops[i]); };
    for (int i = 0; i < vq->n_ops; i++)
        most[i >= vq->n_encoder] = max64(most[i >= vq->n_encoder], floats(i));
    const int64_t many = min64(max64(1, VQ_FLOATS / most[0]), IMAGES) * most[0],
                  room = max64(many, most[1]);
    for (int i = 0; i < 2; i++) v->few[i] = (int)min64(IMAGES, room / most[i]);
    v->cut[0] = vq->n_encoder - 1;
    v->cut[1] = vq->n_encoder + 1;
    const int64_t least = max64(floats(v->cut[0]), floats(v->cut[1] - 1));
    c->images = (int)max64(1, min64(IMAGES, room / least));
    while (v->cut[0] > 0 && c->images * floats(v->cut[0] - 1) <= room) v->cut[0]--;
    while (v->cut[1] < vq->n_ops - 1 && c->images * floats(v->cut[1]) <= room) v->cut[1]++;
    return room;
}

/* Images that run through operation i together. */
static int64_t images_at(const struct gpu *c, int i) {
    const struct vq_memory *v = &c->vq;
    int few = i < v->cut[0] ? v->few[0] : i >= v->cut[1] ? v->few[1] : c->images;
    return min64(few, c->images);
}

/* The tokenizer's part: what the operations that need most of each kind take. */
static void place_vq(struct gpu *c, struct arena *a) {
    const struct vqgan *vq = c->g->m->vq;
    struct vq_memory *v = &c->vq;
    int64_t attn = 0, pixels = 0, channels = 0, blocks = 0, halves = 0, whole = 0;
    if (vq == NULL) return;
    const int64_t map = cut_ops(c), n = c->images, all = (int64_t)vq->R * vq->R,
                  T = (int64_t)vq->S * vq->S;
    for (int i = 0; i < vq->n_ops; i++) {
        const struct vq_op *op = &vq->ops[i];
        const int64_t in = (int64_t)op->side_in * op->side_in, most = std::max(op->c_in, op->c_out),
                      side = (std::max(op->side_in, op->side_out) + 7) / 8;
        channels = max64(channels, most);
        blocks = max64(blocks, images_at(c, i) * 2 * most * side * side);
        if (i == v->cut[0] || i == v->cut[1]) whole = max64(whole, in * op->c_in);
        if (op->kind != VQ_ATTENTION) continue;
        attn = max64(attn, images_at(c, i) * in * op->c_in);
        pixels = max64(pixels, images_at(c, i) * in);
    }
    for (int i = 0; i < c->g->m->n_specs; i++) { /* convolutions and the codebook */
        const struct matrix *m = &c->g->map[i];
        if (!m->tiled && m->type != LVM_F32 && m->type != LVM_F16)
            halves = max64(halves, (int64_t)m->rows * m->ld);
    }
    struct { float **p; int64_t n; } maps[] = {
        {&v->x, map}, {&v->t, map}, {&v->u, map}, {&v->n, map}, {&v->whole, n * whole},
        {&v->q, attn}, {&v->k, attn}, {&v->v, attn},
        {&v->s, pixels > 0 ? max64(SCORES, pixels) : 0},
        {&v->scale, n * channels}, {&v->shift, n * channels}, {&v->blocks, blocks},
        {&v->squares, n * VQ_GROUPS}, {&v->down, n}};
    for (const auto &one : maps) take(a, one.p, one.n);
    take(a, &v->w16, halves);
    take(a, &v->found, n * T * ((vq->codes + NEAREST_CODES - 1) / NEAREST_CODES));
    take(a, &v->rgb, n * all * 3);
    take(a, &v->ids, n * T);
    take(a, &v->bad, IMAGES);
}

/* Cosines and sines stay from call to call. Images and tokens are never worked on together: their
   memory lies at the same place. */
static void place_work(struct gpu *c, struct arena *a) {
    const struct llama *l = &c->g->m->llama;
    take(a, &c->rope, l->L > 0 ? (int64_t)l->context * l->d : 0);
    struct arena images = *a;
    place_vq(c, &images);
    place_lm(c, a);
    a->used = std::max(a->used, images.used);
}

/* What the device and the host tell each other, in pinned memory. */
static void place_pinned(struct gpu *c, struct arena *a) {
    const struct vqgan *vq = c->g->m->vq;
    take(a, &c->host_in, (int64_t)told_bytes(c, std::max(c->rows, (int)SPLIT_ROWS)));
    take(a, &c->host_logits, GRAPH_ROWS * (int64_t)c->g->m->llama.V);
    take(a, &c->told, 1);
    if (vq != NULL) take(a, &c->vq.host_rgb, (int64_t)c->images * vq->R * vq->R * 3);
}

/* Writes rope[context][2][d / 2]: cosines and sines of all positions, angles in f32 as in lvm.c's
   embed_task; a thread an angle. Floor: bytes out; it runs once for a context. */
__global__ void rope_kernel(float *rope, int context, int d, float theta) {
    const int at = (int)(blockIdx.x * THREADS + threadIdx.x), pos = at / (d / 2), i = at % (d / 2);
    if (pos >= context) return;
    const float power = (float)(2 * i) / (float)d;
    const float frequency = 1 / (float)exp((double)power * log((double)theta));
    const double angle = (double)((float)pos * frequency);
    rope[(int64_t)pos * d + i] = (float)cos(angle);
    rope[(int64_t)pos * d + d / 2 + i] = (float)sin(angle);
}

/* ---- Contexts: made and freed ---- */

/* Also of a context that gpu_open could not finish. */
static void gpu_close(void *state) {
    struct gpu *c = (struct gpu *)state;
    if (c == NULL) return;
    use_device(&c->q, NULL);
    if (c->q.stream != NULL) cudaStreamSynchronize(c->q.stream);
    for (struct gpu_sequence &s : c->seq) {
        for (int p = 0; s.pages != NULL && p < c->max_pages; p++)
            page_release_gpu(c, &s.pages[p]);
        free(s.pages);
    }
    for (struct gpu_page *p = c->spare, *next; p != NULL; p = next) {
        next = p->next;
        cudaFree(p->data);
        free(p);
    }
    for (const auto &graphs : c->graph)
        for (cudaGraphExec_t graph : graphs)
            if (graph != NULL) cudaGraphExecDestroy(graph);
    cudaFree(c->memory);
    cudaFreeHost(c->pinned);
    if (c->q.stream != NULL) cudaStreamDestroy(c->q.stream);
    cudaGetLastError();
    free(c);
}

/* A kernel of a generated token's chain may have so much shared memory, or all that it does not
   declare itself, if that is less. As much of a multiprocessor's L1 cache as can be becomes shared
   memory, for all of them: kernels run beside each other only where it is cut alike. */
static void allow(struct queue *q, const void *kernel, int64_t bytes) {
    cudaFuncAttributes own = {};
    CALL(q, cudaFuncGetAttributes, &own, kernel);
    bytes = min64(bytes, q->shared - (int64_t)own.sharedSizeBytes);
    CALL(q, cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    CALL(q, cudaFuncSetAttribute, kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
}

template <int TYPE, int KIND> static void allow_gemv(struct queue *q) {
    const int64_t most = max64(STAGED_MOST + GEMV_WARPS * ring<TYPE>::BYTES, q->shared / 2);
    allow(q, (const void *)gemv_kernel<TYPE, KIND, 1, 1>, most);
    allow(q, (const void *)gemv_kernel<TYPE, KIND, 4, 0>, most);
    allow(q, (const void *)gemv_kernel<TYPE, KIND, 8, 0>, most);
}

static void allow_kernels(struct gpu *c) {
    struct queue *q = &c->q;
    const struct kv_layout *kv = &c->kv;
    note(q, allow_gemm(), "cudaFuncSetAttribute");
    for (int type : {LVM_F16, LVM_BF16, LVM_Q8_0, LVM_Q4_0})
        with_type(type, [&](auto t) {
            constexpr int T = t.value == LVM_F32 ? LVM_F16 : t.value;
            allow_gemv<T, STORE>(q);
            allow_gemv<T, ADD>(q);
            allow_gemv<T, SWIGLU>(q);
        });
    for (const void *kernel : {(const void *)embed_kernel<LVM_F16>,
                               (const void *)embed_kernel<LVM_Q8_0>, (const void *)norm_row_kernel,
                               (const void *)sample_kernel_for(c->g->m->codes)})
        allow(q, kernel, 0);
    if (kv->tensor)
        with_layout(*kv, [&](auto type, auto dp) {
            constexpr int KV = decltype(type)::value, DP = decltype(dp)::value;
            allow(q, (const void *)rope_store_kernel<KV, DP>, 0);
        });
    if (kv->tensor) note(q, prepare_attention(*kv, q->device, c->resident), "cudaFuncSetAttribute");
    else allow(q, (const void *)attention_kernel_for(kv->type), attention_shared(kv->dp));
}

/* All memory but the pages of the KV cache, and what lies in it from the start. */
static int gpu_alloc(struct gpu *c, lvm_error *error) {
    const struct llama *l = &c->g->m->llama;
    struct arena a = {}, pinned = {};
    place_work(c, &a);
    place_pinned(c, &pinned);
    c->bytes = a.used;
    for (struct gpu_sequence &s : c->seq) {
        s.pages = (struct gpu_page **)calloc((size_t)c->max_pages + 1, sizeof(void *));
        if (s.pages == NULL) return fail(error, LVM_MEMORY, "out of memory");
    }
    CALL(&c->q, cudaStreamCreateWithFlags, &c->q.stream, cudaStreamNonBlocking);
    note(&c->q, cudaMalloc((void **)&c->memory, a.used + 256), "cudaMalloc of work memory");
    CALL(&c->q, cudaMallocHost, (void **)&c->pinned, pinned.used);
    if (l->L > 0) allow_kernels(c);
    int code = settle(&c->q, error);
    if (code != LVM_OK) return code;
    memset(c->pinned, 0, pinned.used);
    a = {c->memory, 0};
    pinned = {c->pinned, 0};
    place_work(c, &a);
    place_pinned(c, &pinned);
    const int angles = l->L > 0 ? l->context * (l->d / 2) : 0;
    if (angles == 0) return LVM_OK;
    rope_kernel<<<(unsigned)(angles + THREADS - 1) / THREADS, THREADS, 0, c->q.stream>>>(
        c->rope, l->context, l->d, l->theta);
    launched(&c->q, "rope_kernel");
    return wait_for(&c->q, error);
}

static int gpu_open(void *copy, const lvm_options *o, void **state, struct limits *limits,
                    lvm_error *error) {
    const struct gpu_model *g = (const struct gpu_model *)copy;
    const struct llama *a = &g->m->llama;
    struct gpu *c = (struct gpu *)calloc(1, sizeof *c);
    if (c == NULL) return fail(error, LVM_MEMORY, "out of memory");
    c->g = g;
    c->o = o;
    c->q = g->q;
    c->q.stream = NULL;
    c->exact = o->exact;
    c->images = 1;
    c->split_rows = SPLIT_ROWS;
    c->rows = (int)max64(SEQUENCES, min64(MAX_ROWS_GPU, a->context));
    if (a->L > 0) {
        c->max_pages = (a->context + KEYS - 1) / KEYS;
        c->kv = kv_layout_of(o->kv_type, a->d,
                             !o->exact && takes_tensor_cores(o->kv_type, a->d, c->q.shared));
        c->page_bytes = (size_t)a->L * (size_t)a->G * 2 * (size_t)c->kv.head_bytes;
        c->page_tiles = c->kv.tensor ? (size_t)a->G * KEYS * (size_t)c->kv.dp * 2 * 2 : 0;
        if (c->kv.tensor)
            c->split_rows = (int)min64(SPLIT_ROWS, max64(GRAPH_ROWS, PARTIAL_FLOATS / row_sums(c)));
    }
    int code = use_device(&c->q, error);
    if (code == LVM_OK && c->kv.tensor && c->split_rows * row_sums(c) > INT_MAX)
        code = fail(error, LVM_UNSUPPORTED, "%s: a context of %d tokens is too long for a GPU",
                    g->m->path, a->context);
    if (code == LVM_OK) code = gpu_alloc(c, error);
    if (code == LVM_OK) {
        *limits = {c->images, c->rows, c->split_rows, KEYS, CODES};
        *state = c;
    } else gpu_close(c);
    return code;
}

/* ---- The KV cache, as lvm.c sees it ---- */

/* Sequence `to` becomes the first n positions of `from`. Pages are shared; page_for_writing copies
   one when it is written. */
static int gpu_kv_copy(void *state, int from, int to, int n, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    (void)error;
    if (from != to) gpu_kv_trim(c, to, 0);
    for (int i = 0; from != to && i < (n + KEYS - 1) / KEYS; i++) {
        c->seq[to].pages[i] = c->seq[from].pages[i];
        c->seq[to].pages[i]->refs++;
    }
    if (from != to) c->seq[to].n = n;
    gpu_kv_trim(c, to, n);
    return LVM_OK;
}

/* Bytes of a page in a file. There a page of the layout for tensor cores has a byte more than in
   memory, of the other one two, so that neither is taken for the other. */
static size_t gpu_kv_size(void *state) {
    const struct gpu *c = (const struct gpu *)state;
    return c->page_bytes + (c->kv.tensor ? 1 : 2);
}

static int gpu_kv_get(void *state, int seq, int block, void *data, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int code = use_device(&c->q, error);
    if (code != LVM_OK) return code;
    memset((uint8_t *)data + c->page_bytes, 1, gpu_kv_size(c) - c->page_bytes);
    copy(&c->q, data, c->seq[seq].pages[block]->data, c->page_bytes, "copying a page");
    return wait_for(&c->q, error);
}

static int gpu_kv_set(void *state, int seq, int block, const void *data, int n, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int code = use_device(&c->q, error);
    if (code == LVM_OK) code = page_for_writing(c, &c->seq[seq], block * KEYS, error);
    if (code != LVM_OK) return code;
    copy(&c->q, c->seq[seq].pages[block]->data, data, c->page_bytes, "copying a page");
    code = wait_for(&c->q, error);
    if (code == LVM_OK) c->seq[seq].n = n;
    return code;
}

/* Pages that sequences share count once; spare ones are the context's too. */
static void gpu_usage(void *state, lvm_usage *usage) {
    const struct gpu *c = (const struct gpu *)state;
    const int64_t bytes = (int64_t)(c->page_bytes + c->page_tiles);
    int64_t own = (int64_t)c->bytes;
    double pages = 0;
    for (const struct gpu_page *p = c->spare; p != NULL; p = p->next) own += bytes;
    for (int i = 0; i < SEQUENCES; i++)
        for (int p = 0; p < c->max_pages; p++)
            if (c->seq[i].pages[p] != NULL) pages += 1.0 / c->seq[i].pages[p]->refs;
    int64_t cache = (int64_t)(pages + 0.5) * bytes;
    usage->cache += cache;
    usage->context += cache + own;
    usage->device += cache + own + (int64_t)c->g->bytes;
}

/* ---- Ceilings, for `lvm bench` ----

   What kernels are compared with, measured on the card itself: medians of a few runs each, by
   events. Buffers of a gigabyte fit no cache. */

enum { GEMM_SIDE = 8192, FMA_ROUNDS = 4096, FMA_CHAINS = 8 };
static const size_t CEILING_BYTES = (size_t)1 << 30, PINNED_BYTES = 64 << 20;

/* Reads from[n], 16 bytes a thread at a time, and writes nothing. Floor: its bytes over the
   bandwidth, which is what it measures. */
__global__ void read_kernel(const uint4 *from, int64_t n, uint32_t *out) {
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    uint32_t sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = from[min(i + k * step, n - 1)];
#pragma unroll
        for (int k = 0; k < 4; k++) sum |= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 0x12345678) *out = sum; /* or nothing would be read */
}

/* FMA_CHAINS times FMA_ROUNDS multiply-adds a thread, in registers. Floor: the rate it measures. */
__global__ void fma_kernel(float *out, float a, float b) {
    float x[FMA_CHAINS];
    for (int c = 0; c < FMA_CHAINS; c++) x[c] = a * (float)((int)threadIdx.x + c);
    for (int i = 0; i < FMA_ROUNDS; i++)
#pragma unroll
        for (int c = 0; c < FMA_CHAINS; c++) x[c] = fmaf(x[c], a, b);
    float sum = 0;
    for (int c = 0; c < FMA_CHAINS; c++) sum += x[c];
    if (sum == 12345) *out = sum;
}

/* Writes out[n], about normal numbers, as f16 or bf16: power, and with it the clock of tensor
   cores, depends on what they multiply. Floor: bytes out; it is not timed. */
__global__ void random_kernel(uint16_t *out, int64_t n, int bf16) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint64_t h = (uint64_t)i * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
    h ^= h >> 32;
    float x = 0;
    for (int k = 0; k < 4; k++) x += (float)(h >> 16 * k & 0xffff) / 32768 - 1;
    out[i] = bf16 ? __bfloat16_as_ushort(__float2bfloat16(x)) : __half_as_ushort(__float2half(x));
}

/* Seconds that work() takes on the device: the median of RUNS. */
template <class F> static double median_seconds(struct queue *q, F work) {
    enum { WARM = 3, RUNS = 15 };
    cudaEvent_t event[2] = {};
    float ms[RUNS] = {0};
    for (cudaEvent_t &e : event) CALL(q, cudaEventCreate, &e);
    for (int i = -WARM; q->error == cudaSuccess && i < RUNS; i++) {
        CALL(q, cudaEventRecord, event[0], q->stream);
        work();
        CALL(q, cudaEventRecord, event[1], q->stream);
        CALL(q, cudaEventSynchronize, event[1]);
        if (i >= 0) CALL(q, cudaEventElapsedTime, &ms[i], event[0], event[1]);
    }
    for (cudaEvent_t e : event)
        if (e != NULL) cudaEventDestroy(e);
    std::sort(ms, ms + RUNS);
    return q->error == cudaSuccess ? ms[RUNS / 2] / 1000 : HUGE_VAL;
}

/* Operations a second of a square product of 16-bit numbers with f32 sums, by cuBLAS, which is
   opened where it is there (nothing else needs it): the better type. 0: there is none. memory: room
   for three matrices. */
static double gemm_peak(struct queue *q, uint16_t *memory) {
    enum { N = GEMM_SIDE, COMPUTE_32F = 68, DEFAULT = -1, NORMAL = 0 };
    void *library = NULL, *blas = NULL;
    for (const char *name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11",
                             "libcublas.so"})
        if (library == NULL) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return 0;
    auto create = (int (*)(void **))dlsym(library, "cublasCreate_v2");
    auto destroy = (int (*)(void *))dlsym(library, "cublasDestroy_v2");
    auto set_stream = (int (*)(void *, cudaStream_t))dlsym(library, "cublasSetStream_v2");
    auto gemm = (int (*)(void *, int, int, int, int, int, const void *, const void *, cudaDataType,
                         int, const void *, cudaDataType, int, const void *, void *, cudaDataType,
                         int, int, int))dlsym(library, "cublasGemmEx");
    int bad = create == NULL || destroy == NULL || set_stream == NULL || gemm == NULL ||
              create(&blas) != 0 || set_stream(blas, q->stream) != 0;
    const int64_t n = (int64_t)N * N;
    const float one = 1, zero = 0;
    double best = 0;
    for (cudaDataType type : {CUDA_R_16F, CUDA_R_16BF}) {
        if (bad) break;
        random_kernel<<<blocks_of(2 * n), THREADS, 0, q->stream>>>(memory, 2 * n,
                                                                   type == CUDA_R_16BF);
        launched(q, "random_kernel");
        double took = median_seconds(q, [&]() {
            bad |= gemm(blas, NORMAL, NORMAL, N, N, N, &one, memory, type, N, memory + n, type, N,
                        &zero, memory + 2 * n, type, N, COMPUTE_32F, DEFAULT);
        });
        best = fmax(best, 2.0 * N * N * N / took);
    }
    if (blas != NULL) destroy(blas);
    dlclose(library);
    return bad ? 0 : best;
}

static int gpu_ceilings(void *state, struct ceilings *c, lvm_error *error) {
    struct queue *q = &((struct gpu *)state)->q;
    const int64_t n = (int64_t)(CEILING_BYTES / sizeof(uint4));
    const unsigned blocks = (unsigned)(n / (4 * THREADS)), many = 32 * (unsigned)q->sms;
    uint4 *from = NULL, *pinned = NULL;
    int code = use_device(q, error);
    if (code != LVM_OK) return code;
    *c = {};
    note(q, cudaMalloc((void **)&from, 2 * CEILING_BYTES), "cudaMalloc for measuring");
    note(q, cudaMallocHost((void **)&pinned, PINNED_BYTES), "cudaMallocHost for measuring");
    if (q->error == cudaSuccess) {
        uint4 *to = from + n;
        CALL(q, cudaMemsetAsync, from, 1, 2 * CEILING_BYTES, q->stream);
        double both = median_seconds(
            q, [&]() { copy(q, to, from, CEILING_BYTES, "copying memory"); });
        double read = median_seconds(q, [&]() {
            read_kernel<<<blocks, THREADS, 0, q->stream>>>(from, n, (uint32_t *)to);
        });
        double upload = median_seconds(
            q, [&]() { copy(q, from, pinned, PINNED_BYTES, "copying from pinned memory"); });
        double fma = median_seconds(q, [&]() {
            fma_kernel<<<many, THREADS, 0, q->stream>>>((float *)from, 1.0001f, 1e-3f);
        });
        const double bytes = (double)CEILING_BYTES;
        *c = {2 * bytes / both, bytes / read, (double)PINNED_BYTES / upload,
              gemm_peak(q, (uint16_t *)from), 2.0 * FMA_ROUNDS * FMA_CHAINS * THREADS * many / fma};
        launched(q, "read_kernel, fma_kernel");
    }
    code = wait_for(q, error);
    cudaFree(from);
    cudaFreeHost(pinned);
    return code;
}

static const struct backend cuda_backend = {
    sizeof(struct backend), BACKEND_VERSION, "cuda", gpu_model_open, gpu_model_close, gpu_open,
    gpu_close, gpu_encode, gpu_decode, gpu_forward, gpu_generate, gpu_kv_copy, gpu_kv_trim,
    gpu_kv_size, gpu_kv_get, gpu_kv_set, gpu_usage, gpu_count, gpu_ceilings};

extern "C" const struct backend *lvm_cuda_backend(void);
extern "C" const struct backend *lvm_cuda_backend(void) { return &cuda_backend; }
