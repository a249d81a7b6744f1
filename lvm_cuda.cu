/* lvm_cuda.cu - lvm's tokenizer and transformer on one NVIDIA GPU, behind the seam of lvm.c.

   `make cuda` compiles it with nvcc and links it to lvm.c, which finds it by one function,
   lvm_cuda_backend (at the end). It needs the CUDA toolkit to be built and nothing but a driver to
   run: the runtime is linked in, and where there is no driver the program starts all the same.

   CONTENTS
     1  Errors, memory: every call and every launch is checked
     2  Weights on the device: planes of integers and of scales
     3  Products in f16 on tensor cores: GEMV for a few rows, GEMM for many, one order of sums
     4  Products in f32: linear layers of F32 weights and of --exact, and convolutions
     5  Rows: embedding, RMSNorm, SwiGLU, RoPE, likelihoods
     6  Attention on a paged cache, block by block
     7  The transformer: one forward
     8  Sampling, and the loop that generates
     9  The tokenizer: GroupNorm, attention over pixels, the quantiser
    10  The seam

   SUMS HAVE ONE ORDER here too: a row's result depends on nothing but its own numbers, never on how
   many rows came with it, so that a prompt in pieces, a candidate among others and a reused prefix
   give the same bytes. It costs this: GEMV takes tensor cores (as GEMM does, with the same
   instruction, the same order of k and the same eight segments of k), although a few rows need none
   of their speed; attention merges blocks of 256 keys in ascending order, also where one pass over
   all keys would do. The same card gives the same bytes run to run: no atomics add anything.

   ARITHMETIC. F32 weights, and all weights with --exact: f32 products, fma after fma in ascending
   k. Otherwise weights become f16 as they are read (a quantised one is q d, rounded once),
   activations become f16 with a power of two for each row (so that nothing overflows), and tensor
   cores add in f32. Attention and the tokenizer compute in f32 from whatever is stored.

   LEFT OUT, so far: attention and convolutions on tensor cores; reading a shared prompt's keys once
   for all candidates; fused epilogues and programmatic dependent launch; weights copied while
   others are used; more than one GPU for a model. */
#define LVM_INTERNAL
#include "lvm.c"
#include <stdlib.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* =================================================================================================
   1.  Errors, memory */

enum { THREADS = 256, WARPS = THREADS / 32, ROW_THREADS = 1024 /* of a row's block */,
       ROW_VALUES = 16 /* elements of a row that a thread holds */ };

/* Work that runs in order, and the first thing that went wrong in it. */
struct queue {
    int device;
    cudaStream_t stream;
    cudaError_t error;
    const char *what;
};

static void note(struct queue *q, cudaError_t error, const char *what) {
    if (error == cudaSuccess || q->error != cudaSuccess) return;
    q->error = error;
    q->what = what;
}

/* Behind every launch. */
static void launched(struct queue *q, const char *kernel) { note(q, cudaGetLastError(), kernel); }

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
    note(q, cudaStreamSynchronize(q->stream), "cudaStreamSynchronize");
    return settle(q, error);
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

   A thread takes 16 elements at a time, which lie side by side and share a scale. */

enum { SPAN = 64 /* columns that a quarter-warp of tensor-core operands covers: 4 threads x 16 */ };

struct matrix {
    int type, rows, cols, ld;
    uint8_t *q;
    __half *d;
};

static size_t plane_bytes(int type, size_t elements) {
    return type == LVM_F32 ? elements * 4
           : type == LVM_Q8_0 ? elements
           : type == LVM_Q4_0 ? elements / 2 : elements * 2;
}

/* raw[rows][row_bytes], blocks as they lie in the file -> planes from row `first` on; a thread a
   block. Floor: bytes in + bytes out. */
__global__ void split_q8_0(const uint8_t *raw, int64_t row_bytes, int first, int rows,
                           struct matrix m) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int blocks = m.ld / QK, b = (int)(i % blocks), inside = b < m.cols / QK;
    int64_t row = i / blocks;
    if (row >= rows) return;
    const uint8_t *from = raw + row * row_bytes + b * 34;
    uint8_t *to = m.q + (first + row) * m.ld + b * QK;
    uint16_t d = inside ? from[0] | from[1] << 8 : 0;
    m.d[(first + row) * blocks + b] = __ushort_as_half(d);
    for (int k = 0; k < QK; k++) to[k] = inside ? from[2 + k] ^ 0x80 : 0x80;
}

__global__ void split_q4_0(const uint8_t *raw, int64_t row_bytes, int first, int rows,
                           struct matrix m) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int blocks = m.ld / QK, b = (int)(i % blocks), inside = b < m.cols / QK;
    int64_t row = i / blocks;
    if (row >= rows) return;
    const uint8_t *from = raw + row * row_bytes + b * 18;
    uint32_t *to = (uint32_t *)(m.q + ((first + row) * m.ld + b * QK) / 2);
    uint16_t d = inside ? from[0] | from[1] << 8 : 0;
    m.d[(first + row) * blocks + b] = __ushort_as_half(d);
    for (int w = 0; w < 4; w++) {
        uint32_t word = 0;
        for (int k = 0; k < 8; k++) {
            int e = 8 * w + k;
            uint32_t q = inside ? from[2 + e % 16] >> e / 16 * 4 & 15 : 8;
            word |= q << (k / 2 + k % 2 * 4) * 4;
        }
        to[w] = word;
    }
}

static __device__ __half2 as_half2(uint32_t u) {
    __half2_raw r;
    r.x = (unsigned short)u;
    r.y = (unsigned short)(u >> 16);
    return __half2(r);
}

static __device__ uint32_t as_word(__half2 h) {
    __half2_raw r = h;
    return r.x | (uint32_t)r.y << 16;
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
   Apart from what is done with them, so that several loads are under way before one is used. */
template <int TYPE> struct raw16 {
    uint4 v[TYPE == LVM_F16 || TYPE == LVM_BF16 ? 2 : 1];
    __half d;
};

template <int TYPE>
static __device__ void fetch16(const struct matrix &m, int64_t row, int k,
                               struct raw16<TYPE> *raw) {
    int64_t at = row * m.ld + k;
    if (TYPE == LVM_Q4_0) {
        uint2 v = *(const uint2 *)(m.q + at / 2);
        raw->v[0].x = v.x, raw->v[0].y = v.y;
    } else if (TYPE == LVM_Q8_0) raw->v[0] = *(const uint4 *)(m.q + at);
    else
        for (int i = 0; i < (int)(sizeof raw->v / 16); i++)
            raw->v[i] = ((const uint4 *)(m.q + at * 2))[i];
    if (TYPE == LVM_Q8_0 || TYPE == LVM_Q4_0) raw->d = m.d[at / QK];
}

/* The same as f16. */
template <int TYPE>
static __device__ void expand16(const struct raw16<TYPE> &raw, __half2 *out) {
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
    int64_t at = row * m.ld + k;
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

/* f(constant) with the type as something that a template takes. */
template <int T> struct constant {
    static const int value = T;
};

template <class F> static void with_type(int type, F f) {
    switch (type) {
    case LVM_F32: f(constant<LVM_F32>()); break;
    case LVM_F16: f(constant<LVM_F16>()); break;
    case LVM_BF16: f(constant<LVM_BF16>()); break;
    case LVM_Q8_0: f(constant<LVM_Q8_0>()); break;
    default: f(constant<LVM_Q4_0>());
    }
}

/* A model's copy: matrix i belongs to tensor i of its description. */
struct gpu_layer {
    const float *attn_norm, *ffn_norm, *q_bias, *k_bias, *v_bias, *o_bias;
    struct matrix q, k, v, o, gate, up, down;
};

struct gpu_op {
    const float *scale[2], *shift[2], *bias[4];
    struct matrix conv[4];
};

struct gpu_model {
    struct queue q;
    const lvm_model *m;
    struct matrix *map;           /* [m->n_specs] */
    struct gpu_layer *layers;     /* [L] */
    struct gpu_op *ops;           /* [n_ops] */
    struct matrix embed, output, codebook;
    const float *norm;
    float *code_norms;            /* [codes] on the device: |e|^2 */
    int bad_codebook;             /* 1: some of them are not finite */
    char *memory;
    size_t bytes;
};

static struct matrix on_device(const struct gpu_model *g, const struct tensor *t) {
    for (int i = 0; t->data != NULL && i < g->m->n_specs; i++)
        if (g->m->specs[i].tensor->data == t->data) return g->map[i];
    return matrix();
}

static const float *vector_on_device(const struct gpu_model *g, const struct tensor *t) {
    return (const float *)on_device(g, t).q;
}

/* Vectors lie as one row. */
static struct matrix shape_on_device(const struct tensor *t, enum tensor_kind kind) {
    struct matrix m = {t->type, t->rows, t->cols, 0, NULL, NULL};
    if (kind == T_VECTOR) m.rows = 1, m.cols = t->rows * t->cols;
    m.ld = round_up(m.cols, SPAN);
    return m;
}

static void place_weights(struct gpu_model *g, struct arena *a) {
    for (int i = 0; i < g->m->n_specs; i++) {
        const struct tensor *t = g->m->specs[i].tensor;
        struct matrix *m = &g->map[i];
        *m = shape_on_device(t, g->m->specs[i].kind);
        if (t->data == NULL) continue;
        size_t n = (size_t)m->rows * (size_t)m->ld;
        take(a, &m->q, (int64_t)plane_bytes(t->type, n));
        if (type_is_quantised(t->type)) take(a, &m->d, (int64_t)n / QK);
    }
    take(a, &g->code_norms, g->m->vq != NULL ? g->m->vq->codes : 0);
}

enum { STAGING = 64 << 20 }; /* bytes of quantised rows that go over at a time */

static void upload_quantised(struct queue *q, const struct tensor *t, struct matrix m,
                             uint8_t *staging) {
    int step = (int)max64(1, STAGING / t->row_bytes);
    for (int first = 0; first < m.rows; first += step) {
        int rows = (int)min64(step, m.rows - first);
        int grid = (int)(((int64_t)rows * (m.ld / QK) + THREADS - 1) / THREADS);
        note(q, cudaMemcpyAsync(staging, tensor_row(t, first), (size_t)(rows * t->row_bytes),
                                cudaMemcpyHostToDevice, q->stream), "copying weights");
        if (t->type == LVM_Q8_0)
            split_q8_0<<<grid, THREADS, 0, q->stream>>>(staging, t->row_bytes, first, rows, m);
        else split_q4_0<<<grid, THREADS, 0, q->stream>>>(staging, t->row_bytes, first, rows, m);
        launched(q, "split_q8_0, split_q4_0");
    }
}

static void upload(struct queue *q, const struct tensor *t, struct matrix m, uint8_t *staging) {
    size_t size = plane_bytes(m.type, 1), ld = (size_t)m.ld * size, cols = (size_t)m.cols * size;
    if (t->data == NULL) return;
    if (type_is_quantised(t->type)) {
        upload_quantised(q, t, m, staging);
        return;
    }
    note(q, cudaMemsetAsync(m.q, 0, ld * (size_t)m.rows, q->stream), "cudaMemset");
    note(q, cudaMemcpy2DAsync(m.q, ld, t->data, cols, cols, (size_t)m.rows, cudaMemcpyHostToDevice,
                              q->stream), "copying weights");
}

/* norms[i] = |e_i|^2, in doubles; a thread a code. */
template <int TYPE> __global__ void code_norms_kernel(struct matrix codebook, float *norms) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    double sum = 0;
    if (i >= codebook.rows) return;
    for (int k = 0; k < codebook.cols; k += 4) { /* zeros behind the last */
        float4 e = load4<TYPE>(codebook, i, k);
        sum += (double)e.x * e.x;
        sum += (double)e.y * e.y;
        sum += (double)e.z * e.z;
        sum += (double)e.w * e.w;
    }
    norms[i] = (float)sum;
}

static void name_layers(struct gpu_model *g) {
    const struct llama *a = &g->m->llama;
    for (int i = 0; i < a->L; i++) {
        const struct layer *l = &a->layers[i];
        struct gpu_layer *to = &g->layers[i];
        struct { const struct tensor *from; struct matrix *to; } all[] = {
            {&l->q, &to->q}, {&l->k, &to->k}, {&l->v, &to->v}, {&l->o, &to->o},
            {&l->gate, &to->gate}, {&l->up, &to->up}, {&l->down, &to->down}};
        for (const auto &one : all) *one.to = on_device(g, one.from);
        to->attn_norm = vector_on_device(g, &l->attn_norm);
        to->ffn_norm = vector_on_device(g, &l->ffn_norm);
        to->q_bias = vector_on_device(g, &l->q_bias);
        to->k_bias = vector_on_device(g, &l->k_bias);
        to->v_bias = vector_on_device(g, &l->v_bias);
        to->o_bias = vector_on_device(g, &l->o_bias);
    }
    if (a->L == 0) return;
    g->embed = on_device(g, &a->embed);
    g->output = on_device(g, &a->output);
    g->norm = vector_on_device(g, &a->norm);
}

static void name_ops(struct gpu_model *g) {
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
    struct arena a = {NULL, 0};
    place_weights(g, &a);
    g->bytes = a.used;
    note(&g->q, cudaStreamCreate(&g->q.stream), "cudaStreamCreate");
    note(&g->q, cudaMalloc((void **)&g->memory, g->bytes + 256), "cudaMalloc of the weights");
    if (settle(&g->q, error) != LVM_OK) return error != NULL ? error->code : LVM_MEMORY;
    a.base = g->memory;
    a.used = 0;
    place_weights(g, &a);
    name_layers(g);
    name_ops(g);
    return LVM_OK;
}

/* A codebook that is not finite is remembered for gpu_encode to refuse. */
static int look_at_codebook(struct gpu_model *g, lvm_error *error) {
    size_t n = (size_t)g->m->vq->codes;
    float *norms = (float *)malloc(n * sizeof *norms);
    if (norms == NULL) return fail(error, LVM_MEMORY, "out of memory");
    note(&g->q, cudaMemcpy(norms, g->code_norms, n * sizeof *norms, cudaMemcpyDeviceToHost),
         "copying the codebook's norms");
    int code = wait_for(&g->q, error);
    g->bad_codebook = code == LVM_OK && check_finite(norms, (int64_t)n, "norms", 0, NULL) != LVM_OK;
    free(norms);
    return code;
}

static int gpu_model_fill(struct gpu_model *g, lvm_error *error) {
    struct queue *q = &g->q;
    uint8_t *staging = NULL;
    note(q, cudaMalloc((void **)&staging, STAGING + (1 << 20)), "cudaMalloc of a staging buffer");
    for (int i = 0; q->error == cudaSuccess && i < g->m->n_specs; i++)
        upload(q, g->m->specs[i].tensor, g->map[i], staging);
    if (q->error == cudaSuccess && g->m->vq != NULL)
        with_type(g->codebook.type, [&](auto type) {
            int grid = (g->codebook.rows + THREADS - 1) / THREADS;
            code_norms_kernel<type.value><<<grid, THREADS, 0, q->stream>>>(g->codebook,
                                                                           g->code_norms);
            launched(q, "code_norms_kernel");
        });
    int code = wait_for(q, error);
    cudaFree(staging);
    return code == LVM_OK && g->m->vq != NULL ? look_at_codebook(g, error) : code;
}

/* "cuda" is the first device, "cuda:1" the second. */
static int device_number(const char *name, int *number, lvm_error *error) {
    int count = 0, used = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    *number = 0;
    if (e != cudaSuccess || count == 0)
        return cuda_fail(e != cudaSuccess ? e : cudaErrorNoDevice, "looking for a GPU", error);
    if (name[4] == ':' && (sscanf(name + 4, ":%d%n", number, &used) != 1 || name[4 + used] != 0))
        return fail(error, LVM_INVALID, "device %s: the GPUs are cuda:0, cuda:1 and so on", name);
    if (*number < 0 || *number >= count)
        return fail(error, LVM_INVALID, "device %s: there is cuda:0 to cuda:%d", name, count - 1);
    return LVM_OK;
}

static int check_chip(int device, lvm_error *error) {
    int major = 0;
    cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e != cudaSuccess) return cuda_fail(e, "cudaDeviceGetAttribute", error);
    if (major >= 8) return LVM_OK;
    return fail(error, LVM_UNSUPPORTED, "cuda:%d: has compute capability %d.x; lvm needs 8.0",
                device, major);
}

static int gpu_model_open(const lvm_model *m, const char *device, void **copy, lvm_error *error) {
    int number, code = device_number(device, &number, error);
    if (code == LVM_OK) code = check_chip(number, error);
    if (code != LVM_OK) return code;
    struct gpu_model *g = (struct gpu_model *)calloc(1, sizeof *g);
    if (g == NULL) return fail(error, LVM_MEMORY, "out of memory");
    lvm_error own = {0, ""};
    g->m = m;
    g->q.device = number;
    g->map = (struct matrix *)calloc((size_t)m->n_specs + 1, sizeof *g->map);
    g->layers = (struct gpu_layer *)calloc((size_t)m->llama.L + 1, sizeof *g->layers);
    size_t ops = m->vq != NULL ? (size_t)m->vq->n_ops : 0;
    g->ops = (struct gpu_op *)calloc(ops + 1, sizeof *g->ops);
    if (g->map == NULL || g->layers == NULL || g->ops == NULL)
        code = fail(&own, LVM_MEMORY, "out of memory");
    if (code == LVM_OK) code = use_device(&g->q, &own);
    if (code == LVM_OK) code = gpu_model_alloc(g, &own);
    if (code == LVM_OK) code = gpu_model_fill(g, &own);
    if (code == LVM_OK) *copy = g;
    else gpu_model_close(g);
    return code == LVM_OK ? LVM_OK : fail(error, code, "%s: %s", m->path, own.text);
}

/* =================================================================================================
   3.  Products in f16 on tensor cores

       y[r][o] = (sum_k w[o][k] x[r][k]) scale[r] + bias[o]        x, w: f16, sums: f32

   One instruction multiplies 16 rows of w by 8 rows of x over 16 columns (mma.m16n8k16). Which
   columns those are is free, as long as both operands agree: of a span of 64 columns, thread t of
   four takes 16 t .. 16 t + 15, which lie side by side in memory, and step s of four multiplies
   columns 16 t + 4 s .. + 3. Columns are cut into SEGMENTS parts of whole spans; each has a sum of
   its own, and these are added in ascending order. GEMV gives a segment to each of its warps; GEMM
   runs through them one after the other. */

enum { SEGMENTS = WARPS, GEMV_MOST = 32 /* rows for which GEMV is taken */ };

static __device__ void mma(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Up to three matrices that multiply the same rows. */
struct part {
    struct matrix w;
    const float *bias; /* [w.rows] or NULL */
    float *y;          /* [rows][w.rows] */
};
struct parts {
    struct part p[3];
};

/* Activations on their way into a product: f[rows][cols] and, where a product in f16 follows,
   h[rows][ld], zeros behind the columns, with x = h scale[row]. */
struct activations {
    float *f;
    __half *h;
    float *scale;
};

/* Four steps: rows g and g + 8 of w (a, b) by row g of x. */
static __device__ void multiply_few(float *c, const __half2 *a, const __half2 *b, const uint4 *x) {
    const uint32_t xs[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
#pragma unroll
    for (int s = 0; s < 8; s += 2)
        mma(c, as_word(a[s]), as_word(b[s]), as_word(a[s + 1]), as_word(b[s + 1]), xs[s],
            xs[s + 1]);
}

/* Reads w once: [16 rows][ld] a block, blockIdx.y is the matrix; x[rows][ld] from the L2 cache.
   Writes y[rows][w.rows]. Floor: the bytes of w over the memory's bandwidth. */
template <int TYPE, int TILES>
__global__ void __launch_bounds__(THREADS, 2)
    gemv_kernel(struct parts parts, const __half *x, const float *scale, int rows) {
    const struct part &p = parts.p[blockIdx.y];
    const int o0 = (int)blockIdx.x * 16, N = p.w.rows, ld = p.w.ld, spans = ld / SPAN;
    if (o0 >= N) return;
    __shared__ float sums[WARPS][TILES * 8][17];
    constexpr int AHEAD = TILES == 1 ? 4 : TILES == 2 ? 2 : 1; /* spans that are under way */
    const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    const int each = (spans + SEGMENTS - 1) / SEGMENTS;
    const int last = min(spans, (warp + 1) * each), up = min(o0 + g, N - 1),
              low = min(o0 + g + 8, N - 1);
    float c[TILES][4] = {};
    int64_t row[TILES];
    for (int n = 0; n < TILES; n++) row[n] = (int64_t)min(n * 8 + g, rows - 1) * ld;
    for (int span = warp * each; span < last; span += AHEAD) {
        struct raw16<TYPE> a[AHEAD] = {}, b[AHEAD] = {};
        uint4 xs[AHEAD][TILES][2];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int k = min(span + i, last - 1) * SPAN + 16 * t;
            fetch16<TYPE>(p.w, up, k, &a[i]);
            fetch16<TYPE>(p.w, low, k, &b[i]);
#pragma unroll
            for (int n = 0; n < TILES; n++)
#pragma unroll
                for (int v = 0; v < 2; v++)
                    xs[i][n][v] = span + i < last ? ((const uint4 *)(x + row[n] + k))[v]
                                                  : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            __half2 wa[8], wb[8];
            expand16<TYPE>(a[i], wa);
            expand16<TYPE>(b[i], wb);
#pragma unroll
            for (int n = 0; n < TILES; n++)
                multiply_few(c[n], wa, wb, xs[i][n]);
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[warp][n * 8 + 2 * t + i % 2][g + i / 2 * 8] = c[n][i];
    __syncthreads();
    for (int i = (int)threadIdx.x; i < 16 * rows; i += THREADS) {
        int r = i / 16, o = i % 16;
        float sum = 0;
        for (int s = 0; s < SEGMENTS; s++) sum += sums[s][r][o];
        if (o0 + o < N)
            p.y[(int64_t)r * N + o0 + o] =
                fmaf(sum, scale[r], p.bias != NULL ? p.bias[o0 + o] : 0);
    }
}

/* w in f16, [rows][ld], for GEMM: once a chunk of rows. Floor: bytes in + bytes out. */
template <int TYPE> __global__ void dequantize_kernel(struct matrix w, __half2 *out) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, pieces = w.ld / 16;
    if (i >= w.rows * pieces) return;
    struct raw16<TYPE> raw = {};
    __half2 v[8];
    fetch16<TYPE>(w, i / pieces, (int)(i % pieces) * 16, &raw);
    expand16<TYPE>(raw, v);
    uint4 *to = (uint4 *)(out + i * 8);
    to[0] = make_uint4(as_word(v[0]), as_word(v[1]), as_word(v[2]), as_word(v[3]));
    to[1] = make_uint4(as_word(v[4]), as_word(v[5]), as_word(v[6]), as_word(v[7]));
}

enum { GEMM_TILE = 128, GEMM_STAGES = 3, TILE_BYTES = GEMM_TILE * SPAN * 2,
       GEMM_SHARED = GEMM_STAGES * 2 * TILE_BYTES };

/* 16 bytes from global to shared memory, while other work goes on. */
static __device__ void copy_async(void *shared, const void *global) {
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
}

/* What a thread copies of a tile of 128 rows, of which the last is repeated beyond `rows`: piece
   c (8 columns) of four rows. Piece c of row r lies at c ^ (r & 7), so that neither writing nor
   reading meets a bank twice. */
struct copied {
    const __half *from[4];
};

static __device__ struct copied copied_pieces(const __half *x, int ld, int first, int rows) {
    struct copied p;
#pragma unroll
    for (int i = 0; i < 4; i++)
        p.from[i] = x + (int64_t)min(first + (int)threadIdx.x / 8 + 32 * i, rows - 1) * ld +
                    threadIdx.x % 8 * 8;
    return p;
}

static __device__ void load_tile(char *tile, const struct copied &p, int span) {
    int r = (int)threadIdx.x / 8, c = (int)threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < 4; i++)
        copy_async(tile + (r + 32 * i) * SPAN * 2 + (c ^ (r & 7)) * 16, p.from[i] + span * SPAN);
}

static __device__ uint4 tile_piece(const char *tile, int r, int c) {
    return *(const uint4 *)(tile + r * SPAN * 2 + (c ^ (r & 7)) * 16);
}

/* A warp's 64 rows of w by 32 rows of x, over one span: in each half two steps, all sums of the
   first before those of the second, for an instruction's sum is late for the next one. */
static __device__ void multiply_span(const char *w, const char *x, int g, int t,
                                     float (*c)[4][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 b[4], up[4], low[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            b[n] = tile_piece(x, n * 8 + g, 2 * t + half);
            up[n] = tile_piece(w, n * 16 + g, 2 * t + half);
            low[n] = tile_piece(w, n * 16 + 8 + g, 2 * t + half);
        }
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                mma(c[m][n], up[m].x, low[m].x, up[m].y, low[m].y, b[n].x, b[n].y);
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                mma(c[m][n], up[m].z, low[m].z, up[m].w, low[m].w, b[n].z, b[n].w);
    }
}

/* Adds a segment's sums to what there is, and empties them. */
static __device__ void end_segment(float (*c)[4][4], float (*total)[4][4]) {
#pragma unroll
    for (int i = 0; i < 64; i++) {
        (&total[0][0][0])[i] += (&c[0][0][0])[i];
        (&c[0][0][0])[i] = 0;
    }
}

/* Reads w[N][ld] and x[rows][ld], tiles of 128 x 128 through shared memory, writes y[rows][N].
   Floor: 2 N ld rows operations over the tensor cores' rate. */
__global__ void __launch_bounds__(THREADS, 1)
    gemm_kernel(const __half *w, int N, int ld, const __half *x, const float *scale, int rows,
                const float *bias, float *y) {
    extern __shared__ __align__(128) char shared[];
    const int o0 = (int)blockIdx.x * GEMM_TILE, r0 = (int)blockIdx.y * GEMM_TILE, spans = ld / SPAN;
    const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    const int wo = warp / 4 * 64, wr = warp % 4 * 32, each = (spans + SEGMENTS - 1) / SEGMENTS;
    const struct copied pw = copied_pieces(w, ld, o0, N), px = copied_pieces(x, ld, r0, rows);
    float c[4][4][4] = {}, total[4][4][4] = {};
    for (int s = 0; s < GEMM_STAGES - 1; s++) {
        char *stage = shared + s * 2 * TILE_BYTES;
        if (s < spans) load_tile(stage, pw, s);
        if (s < spans) load_tile(stage + TILE_BYTES, px, s);
        asm volatile("cp.async.commit_group;");
    }
    for (int span = 0; span < spans; span++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(GEMM_STAGES - 2));
        __syncthreads();
        int next = span + GEMM_STAGES - 1;
        char *to = shared + next % GEMM_STAGES * 2 * TILE_BYTES;
        if (next < spans) load_tile(to, pw, next);
        if (next < spans) load_tile(to + TILE_BYTES, px, next);
        asm volatile("cp.async.commit_group;");
        const char *stage = shared + span % GEMM_STAGES * 2 * TILE_BYTES;
        multiply_span(stage + wo * SPAN * 2, stage + TILE_BYTES + wr * SPAN * 2, g, t, c);
        if ((span + 1) % each == 0 || span + 1 == spans) end_segment(c, total);
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
        int o = o0 + wo + i / 16 * 16 + g + i % 4 / 2 * 8;
        int r = r0 + wr + i / 4 % 4 * 8 + 2 * t + i % 2;
        if (o < N && r < rows)
            y[(int64_t)r * N + o] =
                fmaf((&total[0][0][0])[i], scale[r], bias != NULL ? bias[o] : 0);
    }
}

template <int TYPE>
static void launch_gemv(struct queue *q, const struct part *p, int n, const struct activations *x,
                        int rows) {
    struct parts parts = {};
    int most = 0;
    for (int i = 0; i < n; i++) {
        parts.p[i] = p[i];
        most = (int)max64(most, p[i].w.rows);
    }
    dim3 grid((unsigned)(most + 15) / 16, (unsigned)n);
    if (rows <= 8)
        gemv_kernel<TYPE, 1><<<grid, THREADS, 0, q->stream>>>(parts, x->h, x->scale, rows);
    else if (rows <= 16)
        gemv_kernel<TYPE, 2><<<grid, THREADS, 0, q->stream>>>(parts, x->h, x->scale, rows);
    else gemv_kernel<TYPE, 4><<<grid, THREADS, 0, q->stream>>>(parts, x->h, x->scale, rows);
    launched(q, "gemv_kernel");
}

template <int TYPE>
static void launch_gemm(struct queue *q, const struct part *p, const struct activations *x,
                        int rows, __half *scratch) {
    const __half *w = TYPE == LVM_F16 ? (const __half *)p->w.q : scratch;
    int64_t pieces = (int64_t)p->w.rows * (p->w.ld / 16);
    if (TYPE != LVM_F16) {
        dequantize_kernel<TYPE><<<(unsigned)((pieces + THREADS - 1) / THREADS), THREADS, 0,
                                  q->stream>>>(p->w, (__half2 *)scratch);
        launched(q, "dequantize_kernel");
    }
    dim3 grid((unsigned)(p->w.rows + GEMM_TILE - 1) / GEMM_TILE,
              (unsigned)(rows + GEMM_TILE - 1) / GEMM_TILE);
    gemm_kernel<<<grid, THREADS, GEMM_SHARED, q->stream>>>(w, p->w.rows, p->w.ld, x->h, x->scale,
                                                           rows, p->bias, p->y);
    launched(q, "gemm_kernel");
}

/* n matrices of one type, which is not F32. */
static void matmul_f16(struct queue *q, const struct part *p, int n, const struct activations *x,
                       int rows, __half *scratch) {
    with_type(p->w.type, [&](auto type) {
        constexpr int T = decltype(type)::value == LVM_F32 ? LVM_F16 : decltype(type)::value;
        if (rows <= GEMV_MOST) launch_gemv<T>(q, p, n, x, rows);
        for (int i = 0; rows > GEMV_MOST && i < n; i++) launch_gemm<T>(q, &p[i], x, rows, scratch);
    });
}

/* =================================================================================================
   4.  Products in f32

       out[p][o] = sum_k in[k of p] w[o][k] + bias[o] + residual[p][o]

   with k ascending, fma after fma. For a linear layer p is a row and k its columns. For a
   convolution p is an output pixel of one of several images [image][side_out][side_out], and k runs
   over taps and channels [size][size][c_in] of the pixels that it reads: an implicit GEMM, whose
   left operand is never in memory. */

struct product {
    const float *in;       /* [images][side_in][side_in][c_in]; [rows][c_in] */
    struct matrix w;
    const float *bias, *residual; /* or NULL */
    float *out;            /* [images][side_out][side_out][w.rows] */
    int pixels;            /* of all images; rows */
    int c_in, size, side_in, side_out, stride, up, pad;
};

/* Where output pixel p reads: its image and the place of tap (0, 0). */
struct place {
    const float *image;
    int y, x;
};

static __device__ struct place find_pixel(const struct product &j, int p) {
    int area = j.side_out * j.side_out, at = p % area;
    struct place l = {j.in + (int64_t)(p / area) * j.side_in * j.side_in * j.c_in,
                      at / j.side_out * j.stride - j.pad, at % j.side_out * j.stride - j.pad};
    return l;
}

/* Four terms k .. k + 3 of a pixel; zeros outside the map. */
static __device__ float4 gather4(const struct product &j, const struct place &l, int k) {
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

enum { DEPTH = 16 /* columns that a tile in shared memory holds */ };

/* Reads BM pixels by BN rows of w, 16 columns at a time, into shared memory, where they lie
   transposed; each thread has TM x TN sums. Floor: 2 pixels w.rows w.cols operations over the f32
   rate, with a few rows the bytes of w. */
template <int TYPE, int BM, int BN, int TM, int TN>
__global__ void __launch_bounds__(THREADS) product_kernel(struct product j) {
    __shared__ __align__(16) float a[2][DEPTH][BM + 4], b[2][DEPTH][BN + 4];
    const int A = (BM * DEPTH / 4 + THREADS - 1) / THREADS,
              B = (BN * DEPTH / 4 + THREADS - 1) / THREADS;
    const int tid = (int)threadIdx.x, o0 = (int)blockIdx.x * BN, N = j.w.rows;
    const int p0 = (int)blockIdx.y * BM;
    const int px = tid / (BN / TN) * TM, ox = tid % (BN / TN) * TN;
    float sum[TM][TN] = {};
    struct place places[A];
#pragma unroll
    for (int i = 0; i < A; i++)
        places[i] = find_pixel(j, min(p0 + (tid + i * THREADS) / 4, j.pixels - 1));
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
    dim3 grid((unsigned)(j->w.rows + BN - 1) / BN, (unsigned)((j->pixels + BM - 1) / BM));
    product_kernel<TYPE, BM, BN, TM, TN><<<grid, THREADS, 0, q->stream>>>(*j);
    launched(q, "product_kernel");
}

static void run_product(struct queue *q, const struct product *j) {
    with_type(j->w.type, [&](auto type) {
        constexpr int T = decltype(type)::value;
        int64_t large = ((int64_t)j->pixels + 127) / 128 * ((j->w.rows + 127) / 128);
        if (j->pixels <= 8) launch_product<T, 8, 64, 1, 2>(q, j);
        else if (large < 256) launch_product<T, 64, 64, 4, 4>(q, j); /* or much would be idle */
        else if (j->w.rows <= 64) launch_product<T, 128, 64, 8, 4>(q, j);
        else launch_product<T, 128, 128, 8, 8>(q, j);
    });
}

/* A linear layer: y[rows][w.rows] = x[rows][w.cols] w^T + bias. */
static void matmul_f32(struct queue *q, const struct part *p, const float *x, int rows) {
    struct product j = {x, p->w, p->bias, NULL, p->y, rows, p->w.cols, 1, 1, 1, 1, 0, 0};
    run_product(q, &j);
}

/* =================================================================================================
   5.  Rows

   A block a row; sums over a row have a fixed tree. Floor of each: its bytes over the memory's
   bandwidth, in generating the time that a launch takes. */

/* The sum or the largest of a block's values, the same for all its threads. */
template <int LARGEST> static __device__ float over_block(float v) {
    __shared__ float parts[32];
    for (int i = 16; i > 0; i /= 2) {
        float other = __shfl_xor_sync(0xffffffff, v, i);
        v = LARGEST ? fmaxf(v, other) : v + other;
    }
    __syncthreads(); /* of an earlier call all have read */
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = parts[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) v = LARGEST ? fmaxf(v, parts[i]) : v + parts[i];
    return v;
}

/* A row in the registers of its block: element threadIdx.x + 1024 i is v[i]. Writes f[n], where it
   is wanted, and h[ld] in f16, with the power of two that brings the largest near 2^14. */
static __device__ void write_row(const float *v, int n, float *f, __half *h, float *scale, int ld) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < ROW_VALUES; i++) {
        int k = (int)threadIdx.x + i * ROW_THREADS;
        if (i * ROW_THREADS >= n) break;
        if (k < n && f != NULL) f[k] = v[i];
        if (k < n) most = fmaxf(most, fabsf(v[i]));
    }
    if (ld == 0) return;
    most = over_block<1>(most);
    int e = most > 0 && isfinite(most) ? max(-100, min(100, 14 - ilogbf(most))) : 0;
    float up = exp2f((float)e);
#pragma unroll
    for (int i = 0; i < ROW_VALUES; i++) {
        int k = (int)threadIdx.x + i * ROW_THREADS;
        if (i * ROW_THREADS >= ld) break;
        if (k < ld) h[k] = k < n ? __float2half_rn(v[i] * up) : __half(0);
    }
    if (threadIdx.x == 0) *scale = exp2f((float)-e);
}

/* x[row] = the token's row of the embedding. */
template <int TYPE>
__global__ void embed_kernel(struct matrix embed, const int32_t *tokens, float *x) {
    int row = (int)blockIdx.x, D = embed.cols;
    for (int k = 4 * (int)threadIdx.x; k < D; k += 4 * THREADS) {
        float4 v = load4<TYPE>(embed, tokens[row], k);
        float *to = x + (int64_t)row * D + k;
        to[0] = v.x;
        if (k + 1 < D) to[1] = v.y;
        if (k + 2 < D) to[2] = v.z;
        if (k + 3 < D) to[3] = v.w;
    }
}

/* x += delta (where there is one), out = rmsnorm(x). Block i takes row which[i], or i, of x and
   writes row i. out.f: NULL where no product in f32 follows; ld: 0 where none in f16 does. */
__global__ void __launch_bounds__(ROW_THREADS)
    norm_kernel(float *x, const float *delta, const float *weight, float eps, int D,
                const int *which, struct activations out, int ld) {
    int64_t number = blockIdx.x, row = which != NULL ? which[number] : number;
    float *from = x + row * D, v[ROW_VALUES] = {}, w[ROW_VALUES] = {}, sum = 0;
#pragma unroll
    for (int i = 0; i < ROW_VALUES; i++) {
        int k = (int)threadIdx.x + i * ROW_THREADS;
        if (i * ROW_THREADS >= D) break;
        if (k >= D) continue;
        v[i] = delta != NULL ? from[k] + delta[row * D + k] : from[k];
        w[i] = weight[k];
        from[k] = v[i];
        sum = fmaf(v[i], v[i], sum);
    }
    float scale = 1 / sqrtf(over_block<0>(sum) / (float)D + eps);
#pragma unroll
    for (int i = 0; i < ROW_VALUES; i++) v[i] = w[i] * (v[i] * scale);
    write_row(v, D, out.f != NULL ? out.f + number * D : NULL, out.h + number * ld,
              out.scale + number, ld);
}

/* out = silu(gate) up; gate, up [rows][F] */
__global__ void __launch_bounds__(ROW_THREADS)
    swiglu_kernel(const float *gate, const float *up, int F, struct activations out, int ld) {
    int64_t row = blockIdx.x, at = row * F;
    float v[ROW_VALUES] = {}, u[ROW_VALUES] = {};
#pragma unroll
    for (int i = 0; i < ROW_VALUES; i++) {
        int k = (int)threadIdx.x + i * ROW_THREADS;
        if (i * ROW_THREADS >= F) break;
        if (k < F) v[i] = gate[at + k], u[i] = up[at + k];
    }
#pragma unroll
    for (int i = 0; i < ROW_VALUES; i++) v[i] = v[i] / (1 + expf(-v[i])) * u[i];
    write_row(v, F, out.f != NULL ? out.f + at : NULL, out.h + row * ld, out.scale + row, ld);
}

/* What attention left in out.f[rows][n], for a product in f16. */
__global__ void __launch_bounds__(ROW_THREADS)
    pack_kernel(int n, struct activations out, int ld) {
    int64_t row = blockIdx.x;
    float v[ROW_VALUES] = {};
#pragma unroll
    for (int i = 0; i < ROW_VALUES; i++) {
        int k = (int)threadIdx.x + i * ROW_THREADS;
        if (k < n) v[i] = out.f[row * n + k];
    }
    write_row(v, n, NULL, out.h + row * ld, out.scale + row, ld);
}

/* nll[row] = -ln softmax(logits[row][V])[targets[row]], in nats */
__global__ void nll_kernel(const float *logits, int V, const int32_t *targets, float *nll) {
    __shared__ double parts[THREADS];
    const float *row = logits + (int64_t)blockIdx.x * V;
    float most = -HUGE_VALF;
    double sum = 0;
    for (int i = (int)threadIdx.x; i < V; i += THREADS) most = fmaxf(most, row[i]);
    most = over_block<1>(most);
    for (int i = (int)threadIdx.x; i < V; i += THREADS) sum += expf(row[i] - most);
    parts[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        nll[blockIdx.x] = (float)(log(parts[0]) - ((double)row[targets[blockIdx.x]] - most));
}

/* =================================================================================================
   6.  Attention on a paged cache

   A page holds 256 positions of all layers and key/value heads, [L][G] of keys and then values,
   each head_bytes long. dp is d rounded up to 32, zeros behind. Keys lie so that neighbouring
   threads, one a key, read neighbouring pieces of 16 bytes; values lie row by row:

       f32, f16   k[dp / n][256 keys][n], n = 4, 8                  v[256][dp]
       q8_0       k[dp / 16][256][16] bytes, f16 scales [dp / 32][256]
                  v[256][dp] bytes, f16 scales [256][dp / 32]

   A block of the grid takes up to QUERIES queries that share a key/value head and a sequence: nr
   rows by the heads of a group. For each block of 256 keys it computes scores (a thread a key),
   softmax (a warp a query) and values (a warp 32 keys, a lane 4 dimensions), and merges them as
   lvm.c's online_softmax_merge does. With few rows each block of keys has a block of the grid and a
   second kernel merges, in the same order with the same arithmetic. */

enum { KEYS = 256 /* of a page */, QUERIES = 8, SPLIT_ROWS = 64 /* rows that go by splitting */ };

struct kv_layout {
    int type, dp;
    int64_t head_bytes;
};

static struct kv_layout kv_layout_of(int type, int d) {
    int64_t dp = round_up(d, QK);
    struct kv_layout l = {type, (int)dp, KEYS * (type == LVM_F32 ? 4 * dp : type == LVM_F16 ? 2 * dp
                                                              : dp + dp / QK * 2)};
    return l;
}

/* Rows first .. first + n - 1, of one sequence. */
struct tile {
    int first, n;
};

/* A batch as the device sees it, and where its cache is. */
struct batch_view {
    uint8_t *const *table; /* [sequences][max_pages] */
    const int32_t *tokens, *targets;
    const int *pos, *seq, *out; /* [n] [n] [n_out] */
    const struct tile *tiles;
    int max_pages;
};

static __device__ uint8_t *head_of(const struct batch_view &b, const struct kv_layout &l, int seq,
                                   int page, int64_t head) {
    return b.table[seq * b.max_pages + page] + head * 2 * l.head_bytes;
}

/* One lane's value of 32 dimensions, i0 .. i0 + 31, of the key or value at `at` of a page. */
static __device__ void store_kv(const struct kv_layout &l, uint8_t *to, int is_value, int at,
                                int i0, float v) {
    int i = i0 + (int)threadIdx.x % 32, n = l.type == LVM_F32 ? 4 : l.type == LVM_F16 ? 8 : 16;
    int64_t place = is_value ? (int64_t)at * l.dp + i
                             : ((int64_t)(i / n) * KEYS + at) * n + i % n;
    if (l.type == LVM_F32) ((float *)to)[place] = v;
    if (l.type == LVM_F16) ((__half *)to)[place] = __float2half_rn(v);
    if (l.type != LVM_Q8_0) return;
    float most = fabsf(v);
    for (int s = 16; s > 0; s /= 2) { /* NaN stays */
        float other = __shfl_xor_sync(0xffffffff, most, s);
        most = other > most || other != other ? other : most;
    }
    float d = most / 127, inverse = d > 0 ? 1 / d : 0;
    ((int8_t *)to)[place] = (int8_t)rintf(v * inverse);
    __half *scales = (__half *)(to + (int64_t)KEYS * l.dp);
    if (threadIdx.x % 32 == 0)
        scales[is_value ? at * (l.dp / QK) + i0 / QK : i0 / QK * KEYS + at] = __float2half_rn(d);
}

/* Grid: [rows][G], a key/value head and its queries: turns queries and keys by their angles, in
   place, and stores keys and values in the cache. rope: [context][2][d / 2], cosines and sines. */
__global__ void rope_store_kernel(struct batch_view b, struct kv_layout l, float *q, float *k,
                                  const float *v, const float *rope, int layer, int H, int G,
                                  int d) {
    int row = (int)blockIdx.x, g = (int)blockIdx.y, pos = b.pos[row], half = d / 2, group = H / G;
    const float *cosines = rope + (int64_t)pos * d, *sines = cosines + half;
    float *queries = q + ((int64_t)row * H + g * group) * d, *key = k + ((int64_t)row * G + g) * d;
    for (int i = (int)threadIdx.x; i < (group + 1) * half; i += (int)blockDim.x) {
        int h = i / half, j = i % half;
        float *x = h < group ? queries + h * d : key;
        float x0 = x[j], x1 = x[j + half];
        x[j] = x0 * cosines[j] - x1 * sines[j];
        x[j + half] = x1 * cosines[j] + x0 * sines[j];
    }
    __syncthreads();
    uint8_t *head = head_of(b, l, b.seq[row], pos / KEYS, (int64_t)layer * G + g);
    int pieces = l.dp / QK, lane = (int)threadIdx.x % 32;
    for (int i = (int)threadIdx.x / 32; i < 2 * pieces; i += (int)blockDim.x / 32) {
        int value = i / pieces, i0 = i % pieces * QK, dim = i0 + lane;
        const float *from = value ? v + ((int64_t)row * G + g) * d : key;
        store_kv(l, head + value * l.head_bytes, value, pos % KEYS, i0, dim < d ? from[dim] : 0);
    }
}

/* Signed byte k of a word as a float: 2^23 + u is a float whose lowest bits are u. */
static __device__ float byte_of(uint32_t w, int k) {
    uint32_t u = __byte_perm(w ^ 0x80808080, 0x4b000000, 0x7440 | k);
    return __uint_as_float(u) - (8388608.0f + 128);
}

/* The piece of 16 bytes number c of key `key`, as floats: 4, 8 or 16 of them; what to multiply them
   by is returned. */
template <int KV>
static __device__ float load_key(const uint8_t *keys, const struct kv_layout &l, int key, int c,
                                 float *out) {
    uint4 v = ((const uint4 *)keys)[c * KEYS + key];
    const uint32_t w[4] = {v.x, v.y, v.z, v.w};
    const __half *scales = (const __half *)(keys + (int64_t)KEYS * l.dp);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 f = __half22float2(as_half2(w[i]));
        if (KV == LVM_F32) out[i] = __uint_as_float(w[i]);
        if (KV == LVM_F16) out[2 * i] = f.x, out[2 * i + 1] = f.y;
        for (int k = 0; KV == LVM_Q8_0 && k < 4; k++) out[4 * i + k] = byte_of(w[i], k);
    }
    return KV == LVM_Q8_0 ? __half2float(scales[c / 2 * KEYS + key]) : 1;
}

/* Four dimensions of a value. */
template <int KV>
static __device__ float4 load_value(const uint8_t *values, const struct kv_layout &l, int key,
                                    int i) {
    int64_t at = (int64_t)key * l.dp + i;
    if (KV == LVM_F32) return *(const float4 *)(values + at * 4);
    if (KV == LVM_F16) {
        uint2 v = *(const uint2 *)(values + at * 2);
        float2 a = __half22float2(as_half2(v.x)), b = __half22float2(as_half2(v.y));
        return make_float4(a.x, a.y, b.x, b.y);
    }
    uint32_t v = *(const uint32_t *)(values + at);
    float d = __half2float(((const __half *)(values + (int64_t)KEYS * l.dp))[at / QK]);
    return make_float4(byte_of(v, 0) * d, byte_of(v, 1) * d, byte_of(v, 2) * d, byte_of(v, 3) * d);
}

/* Merges a block's m', l' and o' into m, l and o: see lvm.c, "Attention over one block of keys". */
struct merge {
    float m, old_part, new_part;
};

static __device__ struct merge merge_of(float m, float m_block) {
    float most = fmaxf(m, m_block);
    struct merge r = {most, expf(m - most), expf(m_block - most)};
    return r;
}

static __device__ float merged(const struct merge &r, float old_value, float new_value) {
    return fmaf(old_value, r.old_part, __fmul_rn(new_value, r.new_part));
}

struct attention {
    struct batch_view b;
    struct kv_layout l;
    const float *q;        /* [rows][H][d], rotated */
    float *o;              /* [rows][H][d] */
    float *partial;        /* [rows][H][max_pages][dp + 2]: o', m', l' */
    int layer, H, G, d, heads; /* heads: of a tile */
    int from;              /* rows before it are not wanted */
    float scale;
};

/* sum + q . k, n terms in ascending order. */
static __device__ float add_products(float sum, const float *q, const float *k, int n) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
        float4 x = *(const float4 *)(q + i);
        sum = fmaf(x.x, k[i], sum);
        sum = fmaf(x.y, k[i + 1], sum);
        sum = fmaf(x.z, k[i + 2], sum);
        sum = fmaf(x.w, k[i + 3], sum);
    }
    return sum;
}

/* s[query][key] for the thread's key; beyond `keys` stands something, which softmax skips. Of a
   quantised key the sum of 16 integers is scaled at once. */
template <int KV, int NQ>
static __device__ void score_keys(const struct attention &a, const uint8_t *page, int keys,
                                  const float *q, float *s) {
    constexpr int n = KV == LVM_F32 ? 4 : KV == LVM_F16 ? 8 : 16;
    int at = (int)threadIdx.x, key = min(at, keys - 1), dp = a.l.dp;
    float sum[NQ] = {}, k[n];
#pragma unroll 4
    for (int c = 0; c < dp / n; c++) {
        float d = load_key<KV>(page, a.l, key, c, k);
#pragma unroll
        for (int r = 0; r < NQ; r++) {
            const float *x = q + r * dp + c * n;
            if (KV == LVM_Q8_0) sum[r] = fmaf(add_products(0, x, k, n), d, sum[r]);
            else sum[r] = add_products(sum[r], x, k, n);
        }
    }
#pragma unroll
    for (int r = 0; r < NQ; r++) s[r * KEYS + at] = sum[r];
}

/* A warp's query: s becomes probabilities before they are normalised; largest score and sum. */
static __device__ void softmax_query(float *s, int valid, float scale, float *m, float *l) {
    int lane = (int)threadIdx.x % 32;
    float most = -HUGE_VALF, sum = 0;
    for (int i = lane; i < valid; i += 32) most = fmaxf(most, s[i] * scale);
    for (int i = 16; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, i));
    for (int i = lane; i < KEYS; i += 32) {
        float p = i < valid ? expf(__fmul_rn(s[i], scale) - most) : 0;
        s[i] = p;
        sum += p;
    }
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
    *m = most;
    *l = sum;
}

/* red[warp][query][dp]: what the warp's 32 keys give, four at a time; the last is repeated, for
   keys beyond it have no weight. */
template <int KV, int NQ>
static __device__ void sum_values(const struct attention &a, const uint8_t *values, int keys,
                                  const float *s, float *red) {
    int warp = (int)threadIdx.x / 32, dp = a.l.dp, last = min(keys, warp * 32 + 32);
    for (int i = (int)threadIdx.x % 32 * 4; i < dp; i += 128) {
        float sum[NQ][4] = {};
#pragma unroll 2
        for (int key = warp * 32; key < last; key += 4) {
            float4 v[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                v[k] = load_value<KV>(values, a.l, min(key + k, last - 1), i);
#pragma unroll
            for (int r = 0; r < NQ; r++) {
                float4 p = *(const float4 *)(s + r * KEYS + key);
                const float weight[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    sum[r][0] = fmaf(weight[k], v[k].x, sum[r][0]);
                    sum[r][1] = fmaf(weight[k], v[k].y, sum[r][1]);
                    sum[r][2] = fmaf(weight[k], v[k].z, sum[r][2]);
                    sum[r][3] = fmaf(weight[k], v[k].w, sum[r][3]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < NQ; r++)
            *(float4 *)(red + (warp * NQ + r) * dp + i) =
                make_float4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
}

/* Floats of shared memory: q, o [NQ][dp], s [NQ][KEYS], red [WARPS][NQ][dp], m and l twice. */
static int attention_shared(int queries, int dp) {
    return (int)sizeof(float) * queries * (dp * (2 + WARPS) + KEYS + 4);
}

/* Grid: [max_pages or 1][H / heads][tiles]. Reads q, and keys and values once a tile; writes o, or
   `partial` where each block of keys has a block of the grid. Floor: while generating, the cache's
   bytes over the bandwidth. */
template <int KV, int NQ>
__global__ void __launch_bounds__(THREADS, 2) attention_kernel(struct attention a, int split) {
    extern __shared__ __align__(16) float memory[];
    const struct tile tile = a.b.tiles[blockIdx.z];
    const int dp = a.l.dp, n = tile.n * a.heads, h0 = (int)blockIdx.y * a.heads;
    const int tid = (int)threadIdx.x, warp = tid / 32, seq = a.b.seq[tile.first];
    const int last = a.b.pos[tile.first + tile.n - 1];
    const int page0 = split ? (int)blockIdx.x : 0, pages = split ? page0 + 1 : last / KEYS + 1;
    if (page0 > last / KEYS || tile.first + tile.n <= a.from) return;
    float *q = memory, *o = q + NQ * dp, *s = o + NQ * dp, *red = s + NQ * KEYS,
          *m = red + WARPS * NQ * dp, *l = m + NQ, *m_block = l + NQ, *l_block = m_block + NQ;
    for (int i = tid; i < NQ * dp; i += THREADS) {
        int r = i / dp, k = i % dp;
        int64_t at = ((int64_t)(tile.first + r / a.heads) * a.H + h0 + r % a.heads) * a.d + k;
        q[i] = r < n && k < a.d ? a.q[at] : 0;
        o[i] = 0;
    }
    if (tid < NQ) m[tid] = -HUGE_VALF, l[tid] = 0;
    __syncthreads();
    for (int page = page0; page < pages; page++) {
        const uint8_t *head = head_of(a.b, a.l, seq, page,
                                      (int64_t)a.layer * a.G + h0 / (a.H / a.G));
        score_keys<KV, NQ>(a, head, min(KEYS, last + 1 - page * KEYS), q, s);
        __syncthreads();
        for (int r = warp; r < NQ; r += WARPS) {
            int row = tile.first + min(r, n - 1) / a.heads;
            int valid = min(KEYS, a.b.pos[row] + 1 - page * KEYS);
            softmax_query(s + r * KEYS, valid, a.scale, &m_block[r], &l_block[r]);
        }
        __syncthreads();
        sum_values<KV, NQ>(a, head + a.l.head_bytes, min(KEYS, last + 1 - page * KEYS), s, red);
        __syncthreads();
        for (int i = tid; i < n * dp; i += THREADS) {
            int r = i / dp, row = tile.first + r / a.heads;
            float sum = 0;
            for (int w = 0; w < WARPS; w++) sum += red[w * NQ * dp + i];
            if (a.b.pos[row] < page * KEYS) continue; /* sees nothing of this block */
            o[i] = split ? sum : merged(merge_of(m[r], m_block[r]), o[i], sum);
        }
        __syncthreads();
        if (tid < n && a.b.pos[tile.first + tid / a.heads] >= page * KEYS) {
            struct merge r = merge_of(m[tid], m_block[tid]);
            l[tid] = split ? l_block[tid] : merged(r, l[tid], l_block[tid]);
            m[tid] = split ? m_block[tid] : r.m;
        }
        __syncthreads();
    }
    for (int i = tid; i < n * (dp + 2); i += THREADS) {
        int r = i / (dp + 2), k = i % (dp + 2);
        int64_t row = tile.first + r / a.heads, at = row * a.H + h0 + r % a.heads;
        float v = k < dp ? o[r * dp + k] : k == dp ? m[r] : l[r];
        if (split) a.partial[(at * a.b.max_pages + page0) * (dp + 2) + k] = v;
        else if (k < a.d) a.o[at * a.d + k] = v / l[r];
    }
}

enum { MERGED = 16 /* blocks of keys whose parts are loaded together */ };

/* The factors of each merge of one head, parts[pages][2]; returns the whole sum l. p:
   [pages][step], m and l at 0 and 1. */
static __device__ float merge_factors(const float *p, int step, int pages, float *parts) {
    float m = -HUGE_VALF, l = 0;
    for (int first = 0; first < pages; first += MERGED) {
        float ms[MERGED], ls[MERGED];
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
            const float *at = p + min(first + i, pages - 1) * step;
            ms[i] = at[0], ls[i] = at[1];
        }
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
            if (first + i >= pages) break;
            struct merge r = merge_of(m, ms[i]);
            l = merged(r, l, ls[i]);
            m = r.m;
            parts[(first + i) * 2] = r.old_part;
            parts[(first + i) * 2 + 1] = r.new_part;
        }
    }
    return l;
}

/* One element of o, by those factors. */
static __device__ float merge_element(const float *p, int step, int pages, const float *parts) {
    float o = 0;
    for (int first = 0; first < pages; first += MERGED) {
        float v[MERGED];
#pragma unroll
        for (int i = 0; i < MERGED; i++) v[i] = p[min(first + i, pages - 1) * step];
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
            if (first + i >= pages) break;
            struct merge r = {0, parts[(first + i) * 2], parts[(first + i) * 2 + 1]};
            o = merged(r, o, v[i]);
        }
    }
    return o;
}

/* Floats of shared memory of merge_kernel: whole groups of parts, for they are read together. */
static __host__ __device__ int merge_floats(int max_pages) {
    return (max_pages + MERGED - 1) / MERGED * MERGED * 2 + 1;
}

/* Grid: [H][rows], a thread an element: a head's o from its blocks of keys, in ascending order; one
   thread finds the factors of the merges first. */
__global__ void merge_kernel(struct attention a) {
    extern __shared__ __align__(16) float memory[];
    int64_t row = blockIdx.y, head = row * a.H + blockIdx.x;
    int step = a.l.dp + 2, pages = a.b.pos[row] / KEYS + 1;
    const float *partial = a.partial + head * a.b.max_pages * step;
    float *parts = memory, *sum = memory + merge_floats(a.b.max_pages) - 1; /* [max_pages][2] */
    if (row < a.from) return;
    if (threadIdx.x == 0) *sum = merge_factors(partial + a.l.dp, step, pages, parts);
    __syncthreads();
    for (int k = (int)threadIdx.x; k < a.d; k += (int)blockDim.x)
        a.o[head * a.d + k] = merge_element(partial + k, step, pages, parts) / *sum;
}

template <int KV, int NQ>
static void launch_attention(struct queue *q, const struct attention *a, int tiles, int split) {
    dim3 grid(split ? (unsigned)a->b.max_pages : 1, (unsigned)(a->H / a->heads), (unsigned)tiles);
    size_t shared = (size_t)attention_shared(NQ, a->l.dp);
    attention_kernel<KV, NQ><<<grid, THREADS, shared, q->stream>>>(*a, split);
    launched(q, "attention_kernel");
}

template <int KV> static cudaError_t allow_shared(int dp) {
    cudaError_t e = cudaSuccess, all[] = {
        cudaFuncSetAttribute(attention_kernel<KV, 1>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attention_shared(1, dp)),
        cudaFuncSetAttribute(attention_kernel<KV, 4>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attention_shared(4, dp)),
        cudaFuncSetAttribute(attention_kernel<KV, QUERIES>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attention_shared(QUERIES, dp))};
    for (cudaError_t one : all) e = e == cudaSuccess ? one : e;
    return e;
}

template <int KV>
static void attend(struct queue *q, const struct attention *a, int tiles, int most, int split) {
    if (most == 1) launch_attention<KV, 1>(q, a, tiles, split);
    else if (most <= 4) launch_attention<KV, 4>(q, a, tiles, split);
    else launch_attention<KV, QUERIES>(q, a, tiles, split);
}

/* =================================================================================================
   7.  The transformer

   A context's work memory is one allocation, made when it is opened; the cache grows by pages,
   which sequences share and copy when they write, as on the CPU. What a forward is told (tokens,
   places, pages) goes over in one piece of pinned memory, and kernels read it there; so the work
   for one token is the same launches every time, recorded once as a CUDA graph for each number of
   rows. */

enum { MAX_ROWS_GPU = 4096, SEQUENCES = 64, LOGIT_ROWS = 256, GRAPH_ROWS = 8, IMAGES = 8 };

struct gpu_page {
    int refs;
    uint8_t *data;
    struct gpu_page *next; /* among those that nobody uses */
};

struct gpu_sequence {
    int n;
    struct gpu_page **pages; /* [max_pages] */
};

struct vq_memory {
    float *x, *t, *u, *n;         /* maps [images][side][side][c]; n: what was normalised */
    float *q, *k, *v, *s;         /* of an attention: [images][pixels][c]; scores */
    float *scale, *shift, *dots;  /* [images][c]; [T][codes] */
    double *sums;                 /* [images][chunks][GROUPS][2] */
    uint8_t *rgb;                 /* [images][R][R][3] */
    int32_t *ids;                 /* [images][T] */
    int *bad;                     /* [images]: 1 where something is not finite */
    int side, c, images;
};

struct gpu {
    struct queue q;
    const struct gpu_model *g;
    const lvm_options *o;
    int exact, rows, max_pages, images;
    struct kv_layout kv;
    size_t page_bytes, bytes;
    struct gpu_sequence seq[SEQUENCES];
    struct gpu_page *spare;
    char *memory;
    float *x, *delta, *qb, *kb, *vb, *gate, *up, *rope, *partial, *logits, *nll;
    struct activations act;
    __half *w16;                  /* a matrix in f16, for GEMM */
    uint8_t *in, *host_in;        /* what a forward is told: here and in pinned memory */
    float *host_logits;           /* [GRAPH_ROWS][V], pinned */
    cudaGraphExec_t graph[GRAPH_ROWS + 1];
    int seen[GRAPH_ROWS + 1];     /* how often there were so many rows */
    struct sampler *sampler;
    struct told *told;            /* pinned */
    cudaGraphExec_t next_graph[GRAPH_ROWS + 1];
    int next_seen[GRAPH_ROWS + 1], samples; /* samples: 1: from so many codes */
    struct vq_memory vq;
};

/* ---- Pages ---- */

static int page_new_gpu(struct gpu *c, struct gpu_page **out, lvm_error *error) {
    struct gpu_page *p = c->spare;
    *out = NULL;
    if (p != NULL) c->spare = p->next;
    else {
        p = (struct gpu_page *)calloc(1, sizeof *p);
        if (p == NULL) return fail(error, LVM_MEMORY, "out of memory");
        cudaError_t e = cudaMalloc((void **)&p->data, c->page_bytes);
        if (e == cudaSuccess) e = cudaMemsetAsync(p->data, 0, c->page_bytes, c->q.stream);
        if (e != cudaSuccess) {
            cudaFree(p->data);
            free(p);
            return cuda_fail(e, "cudaMalloc of a page of the key/value cache", error);
        }
    }
    p->refs = 1;
    *out = p;
    return LVM_OK;
}

static void page_release_gpu(struct gpu *c, struct gpu_page **slot) {
    struct gpu_page *p = *slot;
    *slot = NULL;
    if (p == NULL || --p->refs > 0) return;
    p->next = c->spare;
    c->spare = p;
}

/* Makes the page of position pos present and private to the sequence. */
static int page_for_writing(struct gpu *c, struct gpu_sequence *s, int pos, lvm_error *error) {
    struct gpu_page **slot = &s->pages[pos / KEYS], *fresh;
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

static void gpu_kv_trim(void *state, int seq, int n) {
    struct gpu *c = (struct gpu *)state;
    struct gpu_sequence *s = &c->seq[seq];
    if (n >= s->n) return;
    s->n = n;
    for (int i = (n + KEYS - 1) / KEYS; i < c->max_pages; i++) page_release_gpu(c, &s->pages[i]);
}

/* ---- What a forward is told ---- */

/* One forward: rows, and how its attention is cut. */
struct step {
    int n, n_out, from;         /* from: the first row of which something is wanted */
    int tiles, heads, most;     /* most: queries of a tile */
    int split, room;            /* room: rows that the pieces of `in` are laid out for */
    struct batch_view view;
};

static size_t told_bytes(const struct gpu *c, int room) {
    return (size_t)SEQUENCES * (size_t)c->max_pages * 8 + (size_t)room * 7 * 4;
}

/* The pieces of a block of told_bytes. */
static struct batch_view view_of(const struct gpu *c, uint8_t *base, int room) {
    struct batch_view v = {};
    int32_t *p = (int32_t *)(base + (size_t)SEQUENCES * (size_t)c->max_pages * 8);
    v.table = (uint8_t *const *)base;
    v.max_pages = c->max_pages;
    v.tokens = p;
    v.targets = p + room;
    v.pos = p + 2 * (int64_t)room;
    v.seq = p + 3 * (int64_t)room;
    v.out = p + 4 * (int64_t)room;
    v.tiles = (struct tile *)(p + 5 * (int64_t)room);
    return v;
}

/* Cuts rows into tiles: neighbours of one sequence, as many as their heads leave room for. */
static void cut_tiles(const struct gpu *c, struct step *s, const int *seqs, struct tile *tiles) {
    const struct llama *a = &c->g->m->llama;
    int group = a->H / a->G, rows = 1;
    s->heads = group;
    while (s->heads > QUERIES || group % s->heads != 0) s->heads--;
    if (!s->split) rows = QUERIES / s->heads;
    for (int r = 0; r < s->n; s->tiles++) {
        int end = r + 1;
        while (end < s->n && end - r < rows && seqs[end] == seqs[r]) end++;
        struct tile t = {r, end - r};
        tiles[s->tiles] = t;
        r = end;
    }
    s->most = rows * s->heads;
}

static struct step plan_step(const struct gpu *c, const struct batch *b, const int *pos) {
    struct step s = {};
    s.n = b->n;
    s.n_out = b->n_out;
    s.from = b->n_out > 0 ? b->out[0] : b->n;
    s.split = b->n <= SPLIT_ROWS;
    s.room = s.split ? SPLIT_ROWS : c->rows;
    struct batch_view v = view_of(c, c->host_in, s.room);
    size_t bytes = (size_t)b->n * 4, out = (size_t)b->n_out * 4;
    memcpy((void *)v.tokens, b->tokens, bytes);
    memcpy((void *)v.seq, b->seqs, bytes);
    memcpy((void *)v.pos, pos, bytes);
    if (b->n_out > 0) memcpy((void *)v.out, b->out, out);
    if (b->n_out > 0 && b->logits == NULL) memcpy((void *)v.targets, b->targets, out);
    uint8_t **table = (uint8_t **)c->host_in;
    for (int i = 0; i < SEQUENCES; i++)
        for (int p = 0; p < c->max_pages; p++, table++)
            *table = c->seq[i].pages[p] != NULL ? c->seq[i].pages[p]->data : NULL;
    cut_tiles(c, &s, b->seqs, (struct tile *)v.tiles);
    s.view = view_of(c, c->in, s.room);
    return s;
}

/* ---- Layers ---- */

static int takes_f16(const struct gpu *c, const struct matrix *w) {
    return w->type != LVM_F32 && !c->exact;
}

/* Columns of activations in f16 for these matrices, or 0 where none takes them. */
static int packed_columns(const struct gpu *c, const struct part *p, int n) {
    int ld = 0;
    for (int i = 0; i < n; i++) ld = takes_f16(c, &p[i].w) ? p[i].w.ld : ld;
    return ld;
}

static int takes_f32(const struct gpu *c, const struct part *p, int n) {
    int wanted = 0;
    for (int i = 0; i < n; i++) wanted |= !takes_f16(c, &p[i].w);
    return wanted;
}

/* Where activations for these matrices go. */
static struct activations room_for(const struct gpu *c, const struct part *p, int n) {
    struct activations out = c->act;
    if (!takes_f32(c, p, n)) out.f = NULL;
    return out;
}

/* n matrices that multiply the same rows, in one launch where their types are alike. */
static void matmul(struct gpu *c, const struct part *p, int n, const struct activations *x,
                   int rows) {
    int alike = 1;
    for (int i = 1; i < n; i++) alike &= p[i].w.type == p[0].w.type;
    int step = alike ? n : 1;
    for (int i = 0; rows > 0 && i < n; i += step) {
        if (takes_f16(c, &p[i].w)) matmul_f16(&c->q, p + i, step, x, rows, c->w16);
        else for (int k = i; k < i + step; k++) matmul_f32(&c->q, p + k, x->f, rows);
    }
}

/* Rows from `first` on, of activations with so many columns. */
static struct activations rows_from(struct activations x, int first, int cols, int ld) {
    struct activations y = {x.f + (int64_t)first * cols, x.h + (int64_t)first * ld,
                            x.scale + first};
    return y;
}

/* act = rmsnorm(x += delta), rows from `first` on, for the matrices p. */
static void norm_rows(struct gpu *c, const float *weight, int first, int rows, int has_delta,
                      const int *which, const struct part *p, int n) {
    const struct llama *a = &c->g->m->llama;
    int64_t at = (int64_t)first * a->D;
    norm_kernel<<<(unsigned)rows, ROW_THREADS, 0, c->q.stream>>>(
        c->x + at, has_delta ? c->delta + at : NULL, weight, a->eps, a->D, which, room_for(c, p, n),
        packed_columns(c, p, n));
    launched(&c->q, "norm_kernel");
}

/* act = attention of rows from `from` on; ld: for a product in f16, or 0. */
static void attention_rows(struct gpu *c, const struct step *s, int layer, int from, int ld) {
    const struct llama *a = &c->g->m->llama;
    int n = a->H * a->d;
    struct attention job = {s->view, c->kv, c->qb, c->act.f, c->partial, layer, a->H, a->G, a->d,
                            s->heads, from, 1 / sqrtf((float)a->d)};
    if (c->kv.type == LVM_F32) attend<LVM_F32>(&c->q, &job, s->tiles, s->most, s->split);
    else if (c->kv.type == LVM_F16) attend<LVM_F16>(&c->q, &job, s->tiles, s->most, s->split);
    else attend<LVM_Q8_0>(&c->q, &job, s->tiles, s->most, s->split);
    if (s->split)
        merge_kernel<<<dim3((unsigned)a->H, (unsigned)s->n), 128,
                       sizeof(float) * (size_t)merge_floats(c->max_pages), c->q.stream>>>(job);
    launched(&c->q, "merge_kernel");
    if (ld == 0) return;
    pack_kernel<<<(unsigned)(s->n - from), ROW_THREADS, 0, c->q.stream>>>(
        n, rows_from(c->act, from, n, ld), ld);
    launched(&c->q, "pack_kernel");
}

/* q, k and v of the rows, k and v into the cache; of rows before `from` no q is wanted. */
static void project_and_store(struct gpu *c, const struct step *s, int layer, int from) {
    const struct llama *a = &c->g->m->llama;
    const struct gpu_layer *l = &c->g->layers[layer];
    int64_t Q = (int64_t)a->H * a->d;
    const struct part qkv[3] = {{l->q, l->q_bias, c->qb + from * Q},
                                {l->k, l->k_bias, c->kb}, {l->v, l->v_bias, c->vb}};
    int apart = from > 0;
    norm_rows(c, l->attn_norm, 0, s->n, layer > 0, NULL, qkv, 3);
    matmul(c, qkv + apart, 3 - apart, &c->act, s->n);
    struct activations wanted = rows_from(c->act, from, a->D, l->q.ld);
    if (apart) matmul(c, qkv, 1, &wanted, s->n - from);
    rope_store_kernel<<<dim3((unsigned)s->n, (unsigned)a->G), 128, 0, c->q.stream>>>(
        s->view, c->kv, c->qb, c->kb, c->vb, c->rope, layer, a->H, a->G, a->d);
    launched(&c->q, "rope_store_kernel");
}

/* One layer; see run_layer in lvm.c, whose steps these are. */
static void run_layer(struct gpu *c, const struct step *s, int layer) {
    const struct llama *a = &c->g->m->llama;
    const struct gpu_layer *l = &c->g->layers[layer];
    int from = layer + 1 < a->L ? 0 : s->from, n = s->n - from;
    int64_t D = a->D;
    project_and_store(c, s, layer, from);
    if (n == 0) return;
    const struct part o = {l->o, l->o_bias, c->delta + from * D};
    int ld = packed_columns(c, &o, 1);
    attention_rows(c, s, layer, from, ld);
    struct activations rows = rows_from(c->act, from, a->H * a->d, ld);
    matmul(c, &o, 1, &rows, n);
    const struct part gate_up[2] = {{l->gate, NULL, c->gate}, {l->up, NULL, c->up}};
    norm_rows(c, l->ffn_norm, from, n, 1, NULL, gate_up, 2);
    matmul(c, gate_up, 2, &c->act, n);
    const struct part down = {l->down, NULL, c->delta + from * D};
    swiglu_kernel<<<(unsigned)n, ROW_THREADS, 0, c->q.stream>>>(
        c->gate, c->up, a->F, room_for(c, &down, 1), packed_columns(c, &down, 1));
    launched(&c->q, "swiglu_kernel");
    matmul(c, &down, 1, &c->act, n);
}

static void embed_rows(struct gpu *c, const struct step *s) {
    with_type(c->g->embed.type, [&](auto type) {
        embed_kernel<decltype(type)::value><<<(unsigned)s->n, THREADS, 0, c->q.stream>>>(
            c->g->embed, s->view.tokens, c->x);
        launched(&c->q, "embed_kernel");
    });
}

/* Logits of up to LOGIT_ROWS of the rows that are wanted, number `at` and the following. */
static void run_head(struct gpu *c, const struct step *s, int at, int n) {
    const struct part output = {c->g->output, NULL, c->logits};
    norm_rows(c, c->g->norm, 0, n, 1, s->view.out + at, &output, 1);
    matmul(c, &output, 1, &c->act, n);
}

static void tell(struct gpu *c, const struct step *s) {
    note(&c->q, cudaMemcpyAsync(c->in, c->host_in, told_bytes(c, s->room), cudaMemcpyHostToDevice,
                                c->q.stream), "copying a batch");
}

/* All of a step of a few rows whose logits are wanted; they end in host_logits. */
static void generate_step(struct gpu *c, const struct step *s) {
    const struct llama *a = &c->g->m->llama;
    tell(c, s);
    embed_rows(c, s);
    for (int i = 0; i < a->L; i++) run_layer(c, s, i);
    run_head(c, s, 0, s->n);
    note(&c->q, cudaMemcpyAsync(c->host_logits, c->logits, (size_t)s->n * (size_t)a->V * 4,
                                cudaMemcpyDeviceToHost, c->q.stream), "copying logits");
}

/* Records work where it is seen for the second time (the first has loaded all kernels). */
static void record_step(struct gpu *c, const struct step *s,
                        void (*work)(struct gpu *, const struct step *), cudaGraphExec_t *exec) {
    cudaGraph_t graph = NULL;
    note(&c->q, cudaStreamBeginCapture(c->q.stream, cudaStreamCaptureModeThreadLocal),
         "cudaStreamBeginCapture");
    work(c, s);
    note(&c->q, cudaStreamEndCapture(c->q.stream, &graph), "cudaStreamEndCapture");
    if (graph == NULL) return;
    note(&c->q, cudaGraphInstantiate(exec, graph, 0), "cudaGraphInstantiate");
    note(&c->q, cudaGraphDestroy(graph), "cudaGraphDestroy");
}

static int forward_few(struct gpu *c, const struct step *s, float *logits, lvm_error *error) {
    const struct llama *a = &c->g->m->llama;
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && s->n > 1 && i < a->L; i++)
        code = report(c->o, "layers", i + 1, a->L, error);
    if (code != LVM_OK) return code;
    if (c->graph[s->n] == NULL && c->seen[s->n]++ > 0)
        record_step(c, s, generate_step, &c->graph[s->n]);
    if (c->graph[s->n] == NULL) generate_step(c, s);
    else note(&c->q, cudaGraphLaunch(c->graph[s->n], c->q.stream), "cudaGraphLaunch");
    code = wait_for(&c->q, error);
    if (code == LVM_OK) memcpy(logits, c->host_logits, (size_t)s->n * (size_t)a->V * 4);
    return code;
}

static int forward_many(struct gpu *c, const struct step *s, const struct batch *b,
                        lvm_error *error) {
    const struct llama *a = &c->g->m->llama;
    int code = LVM_OK;
    tell(c, s);
    embed_rows(c, s);
    for (int i = 0; code == LVM_OK && i < a->L; i++) {
        run_layer(c, s, i);
        if (b->n > 1) code = report(c->o, "layers", i + 1, a->L, error);
    }
    for (int at = 0, n; code == LVM_OK && at < b->n_out; at += n) {
        n = (int)min64(LOGIT_ROWS, b->n_out - at);
        size_t V = (size_t)a->V, bytes = (size_t)n * 4;
        run_head(c, s, at, n);
        if (b->logits == NULL) {
            nll_kernel<<<(unsigned)n, THREADS, 0, c->q.stream>>>(c->logits, a->V,
                                                                 s->view.targets + at, c->nll);
            launched(&c->q, "nll_kernel");
        }
        note(&c->q, b->logits != NULL
                        ? cudaMemcpyAsync(b->logits + at * V, c->logits, bytes * V,
                                          cudaMemcpyDeviceToHost, c->q.stream)
                        : cudaMemcpyAsync(b->nll + at, c->nll, bytes, cudaMemcpyDeviceToHost,
                                          c->q.stream), "copying results");
    }
    int ended = wait_for(&c->q, code == LVM_OK ? error : NULL); /* also when cancelled */
    return code == LVM_OK ? ended : code;
}

static int gpu_forward(void *state, const struct batch *b, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int code = use_device(&c->q, error), done = 0;
    int *pos = (int *)malloc((size_t)b->n * sizeof *pos);
    if (pos == NULL) return fail(error, LVM_MEMORY, "out of memory");
    for (; code == LVM_OK && done < b->n; done++) {
        struct gpu_sequence *seq = &c->seq[b->seqs[done]];
        pos[done] = seq->n++;
        code = page_for_writing(c, seq, pos[done], error);
    }
    if (code == LVM_OK) {
        struct step s = plan_step(c, b, pos);
        int few = b->n <= GRAPH_ROWS && b->n_out == b->n && b->logits != NULL;
        code = few ? forward_few(c, &s, b->logits, error) : forward_many(c, &s, b, error);
    }
    if (code != LVM_OK)
        for (int i = done - 1; i >= 0; i--) gpu_kv_trim(c, b->seqs[i], pos[i]);
    free(pos);
    return code;
}

/* =================================================================================================
   8.  Sampling

   What sample and settle_token of lvm.c do, to the bit, a block a sequence. The id is the next
   forward's token, so that the device never waits for the host, which puts several steps into the
   queue and watches a word of its own memory for each id.

   Top-k, nucleus and draw each ask for the choice at which a count or a sum is reached, likeliest
   first. Sums are exact in any order (lvm.c, summand), so nothing need be sorted to its end: keys
   ascend where p falls, and of equal ones where the id rises; choices go to 1024 bins by the first
   bits in which keys differ (a radix sort's first pass), sums before each bin tell which bin it is,
   and only its choices are compared with each other. A bin with many is split like the whole.

   Floor: bytes do not count, for logits are in the L2 cache; it is the latency of that read and of
   some twenty barriers. */

enum { BIN_BITS = 10, BINS = 1 << BIN_BITS /* and threads */, CODE_BITS = 14,
       CODES = 1 << CODE_BITS /* ids to sample from, at most */,
       FEW = 96 /* choices that are compared one by one */,
       IN_FLIGHT = 8 /* tokens in the queue */, RING = 2 * IN_FLIGHT };

/* How to sample; what is kept of each sequence. */
struct sampler {
    float temperature, top_p;
    int top_k, greedy, judge; /* judge: log_likelihood is wanted */
    struct {
        struct rng rng;
        double log_likelihood;
        int done;
    } of[SEQUENCES];
};

/* In pinned memory; ring[token % RING][sequence]: the token's number + 1, and below it the id. */
struct told {
    volatile uint64_t ring[RING][SEQUENCES];
    struct sampler sampler;
};

/* lvm.c's exp_f32 of x <= 0, log_f64 of x >= 1, summand and rng_next: the same bits, for nvcc fuses
   no product that is an intrinsic's. */
static __device__ float exp_as_host(float x) {
    const float c[8] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    const float whole = 12582912; /* added to n it leaves n in the lowest bits */
    float up = __fmul_rn(x, 1.44269504f) + whole, n = up - whole, p = c[0];
    float r = (x - __fmul_rn(n, 0.693359375f)) - __fmul_rn(n, -2.12194440e-4f);
#pragma unroll
    for (int i = 1; i < 8; i++) p = __fmul_rn(p, r) + c[i];
    p = __fmul_rn(p, __uint_as_float((__float_as_uint(up) + 127) << 23));
    return x > -87.0f ? p : 0;
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

/* Choices that follow each other in the order, of which those before them have this sum; their keys
   are low .. low + 2^bits - 1. */
struct slice {
    int first, n;
    double before;
    uint64_t low;
    int bits;
};

/* A block's shared memory: choice i has p[padded(i)] and id[i]. */
struct sampling {
    float *p;
    uint16_t *id;
    struct sampling_memory {
        uint32_t most[4][32];
        int counts[32], bin[BINS];           /* how many choices, then where they begin */
        double sums[32], before[BINS + 1];
        struct slice found;
        struct {
            int id, count;                   /* count and mass: up to it and with it */
            double mass;
        } choice;
    } *m;
};

/* One float in 33 is left out, so that threads that each read 2, 4, 8 or 16 meet no bank twice. */
static __host__ __device__ int padded(int i) { return i + i / 32; }

static size_t sampling_shared(int codes) {
    return (size_t)padded(codes + 31) * sizeof(float) + (size_t)codes * sizeof(uint16_t);
}

/* A key's upper bits, ascending where p falls; 0 follows 2^-37, the least summand. */
static __device__ uint32_t upper_key(float p) {
    return min(0x3f800000 - __float_as_uint(p), (37u << 23) + 1);
}

static __device__ uint64_t key_of(float p, int id) {
    return (uint64_t)upper_key(p) << CODE_BITS | (uint32_t)id;
}

/* Bins of 2^width keys. */
static __device__ int bin_of(const struct slice &s, int width, float p, int id) {
    uint32_t bin = width >= CODE_BITS ? upper_key(p) >> (width - CODE_BITS)
                                      : (uint32_t)(key_of(p, id) >> width);
    return (int)min(bin - (uint32_t)(s.low >> width), BINS - 1u);
}

/* The sum of v over the threads before this one. parts: shared. */
template <class T> static __device__ T sum_before(T v, T *parts) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    T sum = v;
    for (int i = 1; i < 32; i *= 2) {
        T other = __shfl_up_sync(0xffffffff, sum, i);
        if (lane >= i) sum += other;
    }
    if (lane == 31) parts[warp] = sum;
    __syncthreads();
    T all = lane < warp ? parts[lane] : 0;
    for (int i = 16; i > 0; i /= 2) all += __shfl_xor_sync(0xffffffff, all, i);
    return all + sum - v;
}

/* Sorts a slice by bins: p and id, of which thread t has number t + 1024 i, go to where they belong
   in shared memory; the thread's bin is returned. */
template <int N>
static __device__ struct slice split(const struct sampling &m, const struct slice &s,
                                     const float *p, const int *id) {
    const int t = (int)threadIdx.x, width = max(0, s.bits - BIN_BITS);
    uint32_t place[N]; /* the bin, and below it the number among its choices */
    m.m->bin[t] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i * BINS >= s.n) break;
        int bin = bin_of(s, width, p[i], id[i]);
        if (t + i * BINS < s.n) place[i] = (uint32_t)(bin << 16 | atomicAdd(&m.m->bin[bin], 1));
    }
    __syncthreads();
    int n = m.m->bin[t], first = s.first + sum_before(n, m.m->counts);
    m.m->bin[t] = first;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i * BINS >= s.n) break;
        if (t + i * BINS >= s.n) continue;
        int to = m.m->bin[place[i] >> 16] + (int)(place[i] & 0xffff);
        m.p[padded(to)] = p[i];
        m.id[to] = (uint16_t)id[i];
    }
    __syncthreads();
    const int up = s.n > BINS ? 32 - __clz((s.n - 1) / BINS) : 0; /* 2^up choices a thread */
    double sum = 0;
    for (int i = t << up; i < min(s.n, (t + 1) << up); i++) sum += (double)m.p[padded(s.first + i)];
    m.m->before[t] = s.before + sum_before(sum, m.m->sums);
    if (t == BINS - 1) m.m->before[BINS] = m.m->before[t] + sum;
    __syncthreads();
    const int at = first - s.first;
    double before = m.m->before[at >> up];
    for (int i = at >> up << up; i < at; i++) before += (double)m.p[padded(s.first + i)];
    return {first, n, before, s.low + ((uint64_t)t << width), width};
}

/* So many choices, or so large a sum; one at least. */
struct goal {
    int count;
    double mass;
};

static __device__ int reached(const struct goal &g, int count, double mass) {
    return count > 0 && (count >= g.count || mass >= g.mass);
}

/* Of the threads' bins the one in which the goal is reached: the last before which it is not. */
static __device__ struct slice find(const struct sampling &m, const struct goal &g,
                                    const struct slice &own) {
    int bin = __syncthreads_count(!reached(g, own.first, own.before)) - 1;
    if ((int)threadIdx.x == bin) m.m->found = own;
    __syncthreads();
    return m.m->found;
}

/* The choice with which the goal is reached, to m.m->choice. own: the thread's bin of all. */
template <int N>
static __device__ void choose(const struct sampling &m, const struct goal &g,
                              const struct slice &own) {
    struct slice s = find(m, g, own);
    while (s.n > FEW) {
        float p[N];
        int id[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            int at = s.first + (int)threadIdx.x + i * BINS;
            if (i * BINS >= s.n) break;
            if (at < s.first + s.n) p[i] = m.p[padded(at)], id[i] = m.id[at];
        }
        s = find(m, g, split<N>(m, s, p, id));
    }
    const int lane = (int)threadIdx.x % 32;
    for (int i = (int)threadIdx.x / 32; i < s.n; i += 32) { /* a warp a choice */
        float p = m.p[padded(s.first + i)];
        int id = m.id[s.first + i], count = 0;
        double before = 0;
        for (int k = lane; k < s.n; k += 32) {
            float other = m.p[padded(s.first + k)];
            if (other < p || (other == p && m.id[s.first + k] >= id)) continue;
            count++;
            before += (double)other;
        }
        for (int k = 16; k > 0; k /= 2) before += __shfl_xor_sync(0xffffffff, before, k);
        count = s.first + __reduce_add_sync(0xffffffff, count);
        before += s.before;
        if (lane == 0 && !reached(g, count, before) && reached(g, count + 1, before + (double)p))
            m.m->choice = {id, count + 1, before + (double)p};
    }
    __syncthreads();
}

/* v[i] becomes the largest of all threads'. */
static __device__ void largest_of_block(uint32_t *v, uint32_t (*parts)[32]) {
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    for (int i = 0; i < 4; i++) {
        v[i] = __reduce_max_sync(0xffffffff, v[i]);
        if (lane == 0) parts[i][warp] = v[i];
    }
    __syncthreads();
    for (int i = 0; i < 4; i++) v[i] = __reduce_max_sync(0xffffffff, parts[i][lane]);
}

/* The lowest id of the largest logit. */
template <int N>
static __device__ int likeliest(const struct sampling &m, const float *x, int codes, float most) {
    uint32_t v[4] = {};
#pragma unroll
    for (int i = N - 1; i >= 0; i--) {
        int id = (int)threadIdx.x + i * BINS;
        if (id < codes && x[i] == most) v[0] = ~(uint32_t)id;
    }
    __syncthreads(); /* m.m->most has been read */
    largest_of_block(v, m.m->most);
    return (int)~v[0];
}

static __device__ float divided(float x, float by) { return by == 1 ? x : __fdiv_rn(x, by); }

/* One of the codes by their logits x, which become probabilities. */
template <int N>
static __device__ int draw(const struct sampling &m, const struct sampler &by, struct rng *rng,
                           float *x, int codes, float most, float least) {
    int id[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i * BINS >= codes) break;
        id[i] = (int)threadIdx.x + i * BINS;
        x[i] = summand_as_host(exp_as_host(divided(x[i] - most, by.temperature)));
    }
    /* A lower logit may, by a rounding, have a p that is larger: hence the 64. */
    float low = summand_as_host(exp_as_host(divided(least - most, by.temperature)));
    struct slice all = {0, codes, 0, 0, 64 - __clzll(key_of(low, CODES - 1) + (64 << CODE_BITS))};
    struct slice own = split<N>(m, all, x, id);
    const double random = rng_next_as_host(rng) * 0x1p-32;
    double mass = m.m->before[BINS];
#pragma unroll 1
    for (int step = by.top_k > 0 && by.top_k < codes ? 0 : 1; step < 3; step++) {
        struct goal g = {codes, mass * random};
        if (step == 0) g = {by.top_k, HUGE_VAL};
        if (step == 1) g.mass = mass * (double)by.top_p;
        if (step == 1 && by.top_p == 1) continue; /* for all are in the nucleus */
        choose<N>(m, g, own);
        mass = m.m->choice.mass;
    }
    return m.m->choice.id;
}

/* The last thread's sum is -ln softmax(logits[V])[id]. */
static __device__ float judge(const struct sampling &m, const float *logits, int V, float most,
                              int id) {
    double sum = 0;
    for (int i = (int)threadIdx.x; i < V; i += BINS)
        sum += (double)summand_as_host(exp_as_host(logits[i] - most));
    __syncthreads(); /* m.m->sums has been read */
    sum += sum_before(sum, m.m->sums);
    return (float)(log_as_host(sum) - ((double)logits[id] - most));
}

/* Grid: [sequences]. Reads logits[sequences][V], keeps by->of; writes the id to tokens, where the
   next forward reads it, and to the host's ring. -1: the logits are not finite. */
template <int N>
__global__ void __launch_bounds__(BINS, 1)
    sample_kernel(const float *logits, int V, int codes, struct sampler *by, int32_t *tokens,
                  int *pos, volatile uint64_t (*ring)[SEQUENCES]) {
    extern __shared__ __align__(16) float memory[];
    __shared__ struct sampling::sampling_memory own;
    const struct sampling m = {memory, (uint16_t *)(memory + padded(codes + 31)), &own};
    const int row = (int)blockIdx.x, t = (int)threadIdx.x;
    struct rng rng = by->of[row].rng;
    float x[N];
    uint32_t most[4] = {}; /* largest and least of codes, of all; of the least the complement */
    logits += (int64_t)row * V;
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i * BINS >= codes) break;
        x[i] = logits[min(t + i * BINS, codes - 1)];
    }
    for (int i = codes + t; i < V; i += BINS) {
        most[2] = max(most[2], ordered(logits[i]));
        most[3] = max(most[3], ~ordered(logits[i]));
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i * BINS >= codes) break;
        most[0] = max(most[0], ordered(x[i]));
        most[1] = max(most[1], ~ordered(x[i]));
    }
    most[2] = max(most[2], most[0]);
    most[3] = max(most[3], most[1]);
    largest_of_block(most, own.most);
    const float top = from_ordered(most[0]), least = from_ordered(~most[1]);
    int id = -1;
    if (isfinite(from_ordered(most[2])) && isfinite(from_ordered(~most[3])))
        id = by->greedy ? likeliest<N>(m, x, codes, top)
                        : draw<N>(m, *by, &rng, x, codes, top, least);
    float nll = id >= 0 && by->judge ? judge(m, logits, V, from_ordered(most[2]), id) : 0;
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
    auto *kernel = sample_kernel_for(m->codes);
    kernel<<<(unsigned)s->n, BINS, sampling_shared(m->codes), c->q.stream>>>(
        c->logits, m->llama.V, m->codes, c->sampler, (int32_t *)s->view.tokens,
        (int *)s->view.pos, c->told->ring);
    launched(&c->q, "sample_kernel");
}

/* Feeds the tokens that were sampled and samples the next ones. */
static void next_step(struct gpu *c, const struct step *s) {
    embed_rows(c, s);
    for (int i = 0; i < c->g->m->llama.L; i++) run_layer(c, s, i);
    run_head(c, s, 0, s->n);
    sample_rows(c, s);
}

/* Puts a token of each sequence into the queue. */
static void send_token(struct gpu *c, const struct step *s, int first) {
    if (first) {
        sample_rows(c, s);
        return;
    }
    cudaGraphExec_t *graph = s->n <= GRAPH_ROWS ? &c->next_graph[s->n] : NULL;
    if (graph != NULL && *graph == NULL && c->next_seen[s->n]++ > 0)
        record_step(c, s, next_step, graph);
    if (graph == NULL || *graph == NULL) next_step(c, s);
    else note(&c->q, cudaGraphLaunch(*graph, c->q.stream), "cudaGraphLaunch");
}

/* Waits until the device tells the id of token i of a sequence. */
static int32_t watch_token(struct gpu *c, int i, int row) {
    const volatile uint64_t *word = &c->told->ring[i % RING][row];
    uint64_t told = *word;
    for (int turn = 1; told >> 32 != (uint64_t)i + 1; told = *word, turn++) {
        cudaError_t e = turn % 256 != 0 ? cudaErrorNotReady : cudaStreamQuery(c->q.stream);
        if (e == cudaErrorNotReady) continue;
        told = *word;
        if (told >> 32 == (uint64_t)i + 1) break;
        note(&c->q, e != cudaSuccess ? e : cudaErrorUnknown, "waiting for a token");
        return 0;
    }
    return (int32_t)(uint32_t)told;
}

/* Token i of each sequence, from the device to the caller. */
static int receive_token(struct gpu *c, struct continuation *k, int i, lvm_error *error) {
    const float nan = NAN;
    int code = LVM_OK;
    for (int s = 0; code == LVM_OK && s < k->n_seqs; s++) {
        int32_t id = watch_token(c, i, s);
        code = settle(&c->q, error);
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
   row's place for each token that it samples. */
static struct step tell_sampler(struct gpu *c, const struct continuation *k, const int *start) {
    const lvm_sampling *by = k->sampling;
    struct sampler *to = &c->told->sampler;
    int32_t tokens[SEQUENCES] = {0};
    int rows[SEQUENCES], before[SEQUENCES];
    struct batch b = {k->n_seqs, tokens, rows, k->n_seqs, rows, k->logits, NULL, NULL};
    to->temperature = by->temperature;
    to->top_p = by->top_p;
    to->top_k = by->top_k;
    to->greedy = by->greedy;
    to->judge = by->log_likelihood != NULL;
    for (int s = 0; s < k->n_seqs; s++) {
        rows[s] = s;
        before[s] = start[s] - 1;
        to->of[s] = {k->rng[s], to->judge ? by->log_likelihood[s] : 0, 0};
    }
    for (int i = 0; i < RING; i++)
        for (int s = 0; s < SEQUENCES; s++) c->told->ring[i][s] = 0;
    struct step s = plan_step(c, &b, before);
    tell(c, &s);
    note(&c->q, cudaMemcpyAsync(c->sampler, to, sizeof *to, cudaMemcpyHostToDevice, c->q.stream),
         "copying what to sample by");
    note(&c->q, cudaMemcpyAsync(c->logits, k->logits,
                                (size_t)k->n_seqs * (size_t)c->g->m->llama.V * sizeof(float),
                                cudaMemcpyHostToDevice, c->q.stream), "copying logits");
    return s;
}

/* Takes back what the sampler kept. */
static int end_sampling(struct gpu *c, struct continuation *k, lvm_error *error) {
    const struct sampler *from = &c->told->sampler;
    note(&c->q, cudaMemcpyAsync(&c->told->sampler, c->sampler, sizeof *from,
                                cudaMemcpyDeviceToHost, c->q.stream), "copying the sampler");
    int code = wait_for(&c->q, error);
    for (int s = 0; code == LVM_OK && s < k->n_seqs; s++) {
        k->rng[s] = from->of[s].rng;
        if (from->judge) k->sampling->log_likelihood[s] = from->of[s].log_likelihood;
    }
    return code;
}

static int gpu_generate(void *state, struct continuation *k, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int start[SEQUENCES], sent = 0, code = use_device(&c->q, error);
    for (int s = 0; s < k->n_seqs; s++) start[s] = c->seq[s].n;
    if (code == LVM_OK) code = pages_ahead(c, k, error);
    if (code == LVM_OK) {
        struct step step = tell_sampler(c, k, start);
        for (int i = 0; code == LVM_OK && i < k->n; i++) {
            for (; sent < k->n && sent < i + IN_FLIGHT; sent++) send_token(c, &step, sent == 0);
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
   9.  The tokenizer

   Maps are NHWC, [images][side][side][c], in f32; convolutions are chapter 4's products, images
   side by side. What stands in front of each, GroupNorm and SiLU, is one pass over the map: sums
   of each group, in doubles and in a fixed order, then x scale + shift and x / (1 + e^-x). Fusing
   that pass into the convolution would do it nine times. */

enum { VQ_GROUPS = 32, CHUNK = 2048 /* pixels of a block of group_sums */,
       SCORES = 1 << 22 /* floats of an attention's scores at a time */ };

/* Grid: [groups][chunks][images]. sums[image][chunk][group] = sum, sum of squares. */
__global__ void group_sums_kernel(const float *x, int pixels, int c, double *sums) {
    __shared__ double parts[2][THREADS];
    int width = c / VQ_GROUPS, first = (int)blockIdx.y * CHUNK, n = min(CHUNK, pixels - first);
    const float *from = x + ((int64_t)blockIdx.z * pixels + first) * c + blockIdx.x * width;
    double sum = 0, square = 0;
    for (int i = (int)threadIdx.x; i < n * width; i += THREADS) {
        double v = from[(int64_t)(i / width) * c + i % width];
        sum += v;
        square += v * v;
    }
    parts[0][threadIdx.x] = sum;
    parts[1][threadIdx.x] = square;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) {
            parts[0][threadIdx.x] += parts[0][threadIdx.x + half];
            parts[1][threadIdx.x] += parts[1][threadIdx.x + half];
        }
    }
    if (threadIdx.x > 0) return;
    int64_t chunk = (int64_t)blockIdx.z * gridDim.y + blockIdx.y;
    double *to = sums + (chunk * VQ_GROUPS + blockIdx.x) * 2;
    to[0] = parts[0][0];
    to[1] = parts[1][0];
}

/* A block an image: scale and shift such that norm(x) = x scale + shift. */
__global__ void group_scales_kernel(const double *sums, int chunks, int pixels, int c,
                                    const float *scale, const float *shift, float *to_scale,
                                    float *to_shift) {
    int width = c / VQ_GROUPS;
    for (int i = (int)threadIdx.x; i < c; i += THREADS) {
        double sum = 0, square = 0, count = (double)pixels * width;
        for (int k = 0; k < chunks; k++) {
            int64_t chunk = (int64_t)blockIdx.x * chunks + k;
            const double *p = sums + (chunk * VQ_GROUPS + i / width) * 2;
            sum += p[0];
            square += p[1];
        }
        double mean = sum / count, variance = square / count - mean * mean;
        double r = 1 / sqrt((variance > 0 || variance != variance ? variance : 0) + 1e-6);
        to_scale[blockIdx.x * c + i] = (float)(scale[i] * r);
        to_shift[blockIdx.x * c + i] = (float)(shift[i] - mean * scale[i] * r);
    }
}

static __device__ float normed(float x, float scale, float shift, int silu) {
    float v = fmaf(x, scale, shift);
    return silu ? v / (1 + expf(-v)) : v;
}

/* y = f(x scale + shift), four channels a thread; area: floats of an image's map. */
__global__ void apply_norm_kernel(const float *x, const float *scale, const float *shift, int silu,
                                  int64_t area, int c, int64_t all, float *y) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= all) return;
    int64_t at = i / area * c + i % c;
    float4 v = *(const float4 *)(x + i), a = *(const float4 *)(scale + at),
           b = *(const float4 *)(shift + at);
    *(float4 *)(y + i) = make_float4(normed(v.x, a.x, b.x, silu), normed(v.y, a.y, b.y, silu),
                                     normed(v.z, a.z, b.z, silu), normed(v.w, a.w, b.w, silu));
}

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

/* side_out < side_in: the mean of four pixels; else each pixel four times. */
__global__ void resize_kernel(const float *x, int side_in, int side_out, int c, int64_t n,
                              float *y) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    int64_t pixel = i / c, area = (int64_t)side_out * side_out, image = pixel / area,
            at = pixel % area;
    int64_t py = at / side_out, px = at % side_out, k = i % c, line = (int64_t)side_in * c;
    const float *from = x + image * side_in * line + k;
    if (side_out < side_in) {
        const float *p = from + 2 * py * line + 2 * px * c;
        y[i] = (p[0] + p[c] + p[line] + p[line + c]) * 0.25f;
    } else y[i] = from[py / 2 * line + px / 2 * c];
}

/* A block a row: s = softmax(scale s) over n. */
__global__ void softmax_kernel(float *s, int n, float scale) {
    float *row = s + (int64_t)blockIdx.x * n, most = -HUGE_VALF, sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) most = fmaxf(most, row[i] * scale);
    most = over_block<1>(most);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        row[i] = expf(__fmul_rn(row[i], scale) - most);
        sum += row[i];
    }
    sum = over_block<0>(sum);
    for (int i = (int)threadIdx.x; i < n; i += THREADS) row[i] /= sum;
}

/* y[c][ld] = x[n][c] transposed, zeros behind n. */
__global__ void transpose_kernel(const float *x, int n, int c, int ld, float *y) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (int64_t)c * ld) return;
    int64_t k = i / ld, row = i % ld;
    y[i] = row < n ? x[row * c + k] : 0;
}

/* A block a vector: the first of the nearest codes, |e|^2 - 2 x.e; NaN is never nearest. */
__global__ void nearest_kernel(const float *dots, const float *norms, int codes, int32_t *ids) {
    __shared__ float distance[THREADS];
    __shared__ int nearest[THREADS];
    const float *dot = dots + (int64_t)blockIdx.x * codes;
    float best = HUGE_VALF;
    int at = 0, tid = (int)threadIdx.x;
    for (int i = tid; i < codes; i += THREADS) {
        float d = fmaf(-2.0f, dot[i], norms[i]);
        if (d < best) best = d, at = i;
    }
    distance[tid] = best;
    nearest[tid] = at;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (tid >= half) continue;
        float d = distance[tid + half];
        int i = nearest[tid + half];
        if (d < distance[tid] || (d == distance[tid] && i < nearest[tid]))
            distance[tid] = d, nearest[tid] = i;
    }
    if (tid == 0) ids[blockIdx.x] = nearest[0];
}

static unsigned blocks_of(int64_t n) { return (unsigned)((n + THREADS - 1) / THREADS); }

static void take_map(struct vq_memory *v, float **map, int side, int c) {
    float *x = v->x;
    v->x = *map;
    *map = x;
    v->side = side;
    v->c = c;
}

/* out = norm(in), or silu(norm(in)); in and out: maps of v->side with c channels. */
static void groupnorm(struct gpu *c, const struct gpu_op *op, int number, int silu, const float *in,
                      int channels, float *out) {
    struct vq_memory *v = &c->vq;
    int pixels = v->side * v->side, chunks = (pixels + CHUNK - 1) / CHUNK;
    int64_t area = (int64_t)pixels * channels, all = area * v->images;
    group_sums_kernel<<<dim3(VQ_GROUPS, (unsigned)chunks, (unsigned)v->images), THREADS, 0,
                        c->q.stream>>>(in, pixels, channels, v->sums);
    launched(&c->q, "group_sums_kernel");
    group_scales_kernel<<<(unsigned)v->images, THREADS, 0, c->q.stream>>>(
        v->sums, chunks, pixels, channels, op->scale[number], op->shift[number], v->scale,
        v->shift);
    launched(&c->q, "group_scales_kernel");
    apply_norm_kernel<<<blocks_of(all / 4), THREADS, 0, c->q.stream>>>(in, v->scale, v->shift, silu,
                                                                       area, channels, all, out);
    launched(&c->q, "apply_norm_kernel");
}

/* out = conv(in) + residual; side_out by stride (2: half) and up (1: twice). */
static void conv2d(struct gpu *c, const struct conv *conv, const struct gpu_op *op, int number,
                   int side_out, int stride, int up, const float *in, const float *residual,
                   float *out) {
    struct vq_memory *v = &c->vq;
    const struct matrix *w = &op->conv[number];
    struct product j = {in, *w, op->bias[number], residual, out, v->images * side_out * side_out,
                        w->cols / (conv->size * conv->size), conv->size, v->side, side_out, stride,
                        up, stride == 2 ? 0 : conv->size / 2};
    run_product(&c->q, &j);
}

/* x = x + conv2(silu(norm2(conv1(silu(norm1(x)))))) */
static void run_residual(struct gpu *c, const struct vq_op *op, const struct gpu_op *w) {
    struct vq_memory *v = &c->vq;
    int side = v->side, shortcut = w->conv[2].q != NULL;
    groupnorm(c, w, 0, 1, v->x, v->c, v->n);
    conv2d(c, &op->conv[0], w, 0, side, 1, 0, v->n, NULL, v->t);
    groupnorm(c, w, 1, 1, v->t, op->c_out, v->n);
    if (shortcut) conv2d(c, &op->conv[2], w, 2, side, 1, 0, v->x, NULL, v->u);
    conv2d(c, &op->conv[1], w, 1, side, 1, 0, v->n, shortcut ? v->u : v->x,
           shortcut ? v->u : v->x);
    if (shortcut) take_map(v, &v->u, side, op->c_out);
}

static struct matrix as_matrix(const float *x, int rows, int cols, int ld) {
    struct matrix m = {LVM_F32, rows, cols, ld, (uint8_t *)x, NULL};
    return m;
}

/* t = softmax(q k^T / sqrt(c)) v over the pixels of one image, some rows of scores at a time. */
static void attend_image(struct gpu *c, int image) {
    struct vq_memory *v = &c->vq;
    int n = v->side * v->side, ch = v->c, ld = round_up(n, SPAN), step = (int)(SCORES / n);
    int64_t at = (int64_t)image * n * ch;
    transpose_kernel<<<blocks_of((int64_t)ch * ld), THREADS, 0, c->q.stream>>>(v->v + at, n, ch, ld,
                                                                               v->u);
    launched(&c->q, "transpose_kernel");
    for (int first = 0; first < n; first += step) {
        int rows = (int)min64(step, n - first);
        struct part scores = {as_matrix(v->k + at, n, ch, ch), NULL, v->s};
        matmul_f32(&c->q, &scores, v->q + at + (int64_t)first * ch, rows);
        softmax_kernel<<<(unsigned)rows, THREADS, 0, c->q.stream>>>(v->s, n,
                                                                    1 / sqrtf((float)ch));
        launched(&c->q, "softmax_kernel");
        struct part values = {as_matrix(v->u, ch, n, ld), NULL, v->t + at + (int64_t)first * ch};
        matmul_f32(&c->q, &values, v->s, rows);
    }
}

/* x = x + proj(attention(q, k, v)) */
static void run_attention(struct gpu *c, const struct vq_op *op, const struct gpu_op *w) {
    struct vq_memory *v = &c->vq;
    float *to[3] = {v->q, v->k, v->v};
    groupnorm(c, w, 0, 0, v->x, v->c, v->n);
    for (int i = 0; i < 3; i++) conv2d(c, &op->conv[i], w, i, v->side, 1, 0, v->n, NULL, to[i]);
    for (int i = 0; i < v->images; i++) attend_image(c, i);
    conv2d(c, &op->conv[3], w, 3, v->side, 1, 0, v->t, v->x, v->x);
}

/* Half or twice the side, by a convolution or without one. */
static void run_resize(struct gpu *c, const struct vq_op *op, const struct gpu_op *w) {
    struct vq_memory *v = &c->vq;
    int64_t n = (int64_t)v->images * op->side_out * op->side_out * v->c;
    int down = op->kind == VQ_DOWN;
    if (w->conv[0].q != NULL)
        conv2d(c, &op->conv[0], w, 0, op->side_out, down ? 2 : 1, !down, v->x, NULL, v->t);
    else {
        resize_kernel<<<blocks_of(n), THREADS, 0, c->q.stream>>>(v->x, v->side, op->side_out, v->c,
                                                                 n, v->t);
        launched(&c->q, "resize_kernel");
    }
    take_map(v, &v->t, op->side_out, op->c_out);
}

static void run_op(struct gpu *c, const struct vq_op *op, const struct gpu_op *w) {
    struct vq_memory *v = &c->vq;
    switch (op->kind) {
    case VQ_RESIDUAL: run_residual(c, op, w); return;
    case VQ_ATTENTION: run_attention(c, op, w); return;
    case VQ_DOWN:
    case VQ_UP: run_resize(c, op, w); return;
    case VQ_HEAD: groupnorm(c, w, 0, 1, v->x, v->c, v->n); break;
    default: break;
    }
    conv2d(c, &op->conv[0], w, 0, v->side, 1, 0, op->kind == VQ_HEAD ? v->n : v->x, NULL, v->t);
    take_map(v, &v->t, op->side_out, op->c_out);
}

/* A group's progress counts as so many images one after the other would. */
static int run_ops(struct gpu *c, int begin, int end, const char *stage, int n, int first, int all,
                   lvm_error *error) {
    const struct vqgan *vq = c->g->m->vq;
    int64_t steps = end - begin;
    int code = LVM_OK;
    for (int i = begin; code == LVM_OK && i < end; i++) {
        code = report(c->o, stage, first * steps + (int64_t)(i - begin) * n, all * steps, error);
        if (code == LVM_OK) run_op(c, &vq->ops[i], &c->g->ops[i]);
    }
    return code;
}

static void begin_maps(struct gpu *c, int n, int side, int channels) {
    c->vq.images = n;
    c->vq.side = side;
    c->vq.c = channels;
}

/* ids of n images from the current map, image by image. */
static void quantize_images(struct gpu *c, int n) {
    const struct vqgan *vq = c->g->m->vq;
    int T = vq->S * vq->S;
    for (int i = 0; i < n; i++) {
        struct part dots = {c->g->codebook, NULL, c->vq.dots};
        matmul_f32(&c->q, &dots, c->vq.x + (int64_t)i * T * vq->code_dim, T);
        nearest_kernel<<<(unsigned)T, THREADS, 0, c->q.stream>>>(c->vq.dots, c->g->code_norms,
                                                                 vq->codes, c->vq.ids + i * T);
        launched(&c->q, "nearest_kernel");
    }
}

static int gpu_encode(void *state, const uint8_t *rgb, int n, int first, int all, int32_t *ids,
                      float *latent, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    const struct vqgan *vq = c->g->m->vq;
    int64_t pixels = (int64_t)n * vq->R * vq->R * 3, T = c->g->m->T, width = T * vq->code_dim;
    int code = use_device(&c->q, error);
    float *own = code == LVM_OK ? (float *)malloc((size_t)(n * width) * sizeof *own) : NULL;
    if (code == LVM_OK && own == NULL) code = fail(error, LVM_MEMORY, "out of memory");
    if (code != LVM_OK) return code;
    begin_maps(c, n, vq->R, 3);
    note(&c->q, cudaMemcpyAsync(c->vq.rgb, rgb, (size_t)pixels, cudaMemcpyHostToDevice,
                                c->q.stream), "copying images");
    from_bytes_kernel<<<blocks_of(pixels), THREADS, 0, c->q.stream>>>(c->vq.rgb, pixels, c->vq.x);
    launched(&c->q, "from_bytes_kernel");
    code = run_ops(c, 0, vq->n_encoder, "encode", n, first, all, error);
    if (code == LVM_OK) quantize_images(c, n);
    note(&c->q, cudaMemcpyAsync(own, c->vq.x, (size_t)(n * width) * sizeof *own,
                                cudaMemcpyDeviceToHost, c->q.stream), "copying latents");
    note(&c->q, cudaMemcpyAsync(ids, c->vq.ids, (size_t)(n * T) * sizeof *ids,
                                cudaMemcpyDeviceToHost, c->q.stream), "copying tokens");
    int ended = wait_for(&c->q, code == LVM_OK ? error : NULL);
    if (code == LVM_OK) code = ended;
    const float nan = NAN;
    if (code == LVM_OK && c->g->bad_codebook)
        code = check_finite(&nan, 1, "the codebook's norms for image", first + 1, error);
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = check_finite(own + i * width, width, "the latents of image", first + i + 1, error);
    if (code == LVM_OK && latent != NULL) memcpy(latent, own, (size_t)(n * width) * sizeof *own);
    free(own);
    return code;
}

template <int TYPE>
__global__ void codes_kernel(struct matrix codebook, const int32_t *ids, float *x) {
    int64_t at = (int64_t)blockIdx.x * codebook.cols;
    for (int k = (int)threadIdx.x; k < codebook.cols; k += (int)blockDim.x) {
        float4 v = load4<TYPE>(codebook, ids[blockIdx.x], k / 4 * 4);
        x[at + k] = k % 4 == 0 ? v.x : k % 4 == 1 ? v.y : k % 4 == 2 ? v.z : v.w;
    }
}

static int gpu_decode(void *state, const int32_t *ids, int n, int first, int all, uint8_t *rgb,
                      float *pixels, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    const struct vqgan *vq = c->g->m->vq;
    int64_t area = (int64_t)vq->R * vq->R * 3, T = c->g->m->T;
    int bad[IMAGES] = {0}, code = use_device(&c->q, error);
    if (code != LVM_OK) return code;
    begin_maps(c, n, vq->S, vq->code_dim);
    note(&c->q, cudaMemcpyAsync(c->vq.ids, ids, (size_t)(n * T) * sizeof *ids,
                                cudaMemcpyHostToDevice, c->q.stream), "copying tokens");
    note(&c->q, cudaMemsetAsync(c->vq.bad, 0, sizeof bad, c->q.stream), "cudaMemset");
    with_type(c->g->codebook.type, [&](auto type) {
        codes_kernel<decltype(type)::value><<<(unsigned)(n * T), 64, 0, c->q.stream>>>(
            c->g->codebook, c->vq.ids, c->vq.x);
        launched(&c->q, "codes_kernel");
    });
    code = run_ops(c, vq->n_encoder, vq->n_ops, "decode", n, first, all, error);
    if (code == LVM_OK) {
        to_bytes_kernel<<<blocks_of(n * area), THREADS, 0, c->q.stream>>>(c->vq.x, area, n * area,
                                                                          c->vq.rgb, c->vq.bad);
        launched(&c->q, "to_bytes_kernel");
        note(&c->q, cudaMemcpyAsync(rgb, c->vq.rgb, (size_t)(n * area), cudaMemcpyDeviceToHost,
                                    c->q.stream), "copying images");
        note(&c->q, cudaMemcpyAsync(bad, c->vq.bad, sizeof bad, cudaMemcpyDeviceToHost,
                                    c->q.stream), "copying results");
        if (pixels != NULL)
            note(&c->q, cudaMemcpyAsync(pixels, c->vq.x, (size_t)(n * area) * sizeof *pixels,
                                        cudaMemcpyDeviceToHost, c->q.stream), "copying pixels");
    }
    int ended = wait_for(&c->q, code == LVM_OK ? error : NULL);
    if (code == LVM_OK) code = ended;
    const float nan = bits_to_f32(0x7fc00000);
    for (int i = 0; code == LVM_OK && i < n; i++)
        if (bad[i]) code = check_finite(&nan, 1, "the pixels of image", first + i + 1, error);
    return code;
}

/* =================================================================================================
   10.  The seam */

static void place_lm(struct gpu *c, struct arena *a) {
    const struct gpu_model *g = c->g;
    const struct llama *l = &g->m->llama;
    int64_t N = c->rows, Q = (int64_t)l->H * l->d, K = (int64_t)l->G * l->d, V = l->V,
            widest = max64(max64(l->D, l->F), Q), w16 = 0;
    if (l->L == 0) return;
    for (int i = 0; i < g->m->n_specs; i++)
        if (g->m->specs[i].kind == T_MATRIX || g->m->specs[i].kind == T_OUTPUT ||
            g->m->specs[i].kind == T_EMBED)
            w16 = max64(w16, (int64_t)g->map[i].rows * g->map[i].ld);
    struct { float **p; int64_t n; } all[] = {
        {&c->x, N * l->D}, {&c->delta, N * l->D}, {&c->qb, N * Q}, {&c->kb, N * K}, {&c->vb, N * K},
        {&c->gate, N * l->F}, {&c->up, N * l->F}, {&c->rope, (int64_t)l->context * l->d},
        {&c->partial, min64(N, SPLIT_ROWS) * l->H * c->max_pages * (c->kv.dp + 2)},
        {&c->logits, LOGIT_ROWS * V}, {&c->nll, LOGIT_ROWS}, {&c->act.f, N * widest},
        {&c->act.scale, N}};
    for (const auto &one : all) take(a, one.p, one.n);
    take(a, &c->act.h, N * ((widest + SPAN - 1) / SPAN * SPAN));
    take(a, &c->w16, w16);
    take(a, &c->sampler, 1);
    take(a, &c->in, (int64_t)told_bytes(c, (int)max64(N, SPLIT_ROWS)));
}

/* Floats of the largest map and of the largest attention's, pixels of the latter; channels. */
static void vq_largest(const struct vqgan *vq, int64_t *map, int64_t *attn, int64_t *pixels,
                       int64_t *c) {
    *map = *attn = *pixels = *c = 0;
    for (int i = 0; i < vq->n_ops; i++) {
        const struct vq_op *op = &vq->ops[i];
        int64_t in = (int64_t)op->side_in * op->side_in, out = (int64_t)op->side_out * op->side_out;
        *map = max64(*map, max64(in * op->c_in, out * op->c_out));
        *c = max64(*c, max64(op->c_in, op->c_out));
        if (op->kind != VQ_ATTENTION) continue;
        *attn = max64(*attn, in * op->c_in);
        *pixels = max64(*pixels, in);
        *map = max64(*map, (in + SPAN) * op->c_in); /* values transposed */
    }
}

static void place_vq(struct gpu *c, struct arena *a) {
    const struct vqgan *vq = c->g->m->vq;
    struct vq_memory *v = &c->vq;
    int64_t map, attn, pixels, channels, all = 0;
    if (vq == NULL) return;
    vq_largest(vq, &map, &attn, &pixels, &channels);
    all = (int64_t)vq->R * vq->R;
    c->images = (int)max64(1, min64(IMAGES, ((int64_t)1 << 30) / (16 * map)));
    int64_t n = c->images;
    struct { float **p; int64_t n; } maps[] = {
        {&v->x, n * map}, {&v->t, n * map}, {&v->u, n * map}, {&v->n, n * map}, {&v->q, n * attn},
        {&v->k, n * attn}, {&v->v, n * attn}, {&v->s, pixels > 0 ? max64(SCORES, pixels) : 0},
        {&v->scale, n * channels}, {&v->shift, n * channels},
        {&v->dots, (int64_t)vq->S * vq->S * vq->codes}};
    for (const auto &one : maps) take(a, one.p, one.n);
    take(a, &v->sums, n * ((all + CHUNK - 1) / CHUNK) * VQ_GROUPS * 2);
    take(a, &v->rgb, n * all * 3);
    take(a, &v->ids, n * vq->S * vq->S);
    take(a, &v->bad, IMAGES);
}

/* Cosines and sines of all positions, angles in f32 as in lvm.c's embed_task. */
static int fill_rope(struct gpu *c, lvm_error *error) {
    const struct llama *a = &c->g->m->llama;
    size_t n = (size_t)a->context * (size_t)a->d;
    float *rope = (float *)malloc(n * sizeof *rope);
    if (rope == NULL) return fail(error, LVM_MEMORY, "out of memory");
    for (int i = 0; i < a->d / 2; i++) {
        float power = (float)(2 * i) / (float)a->d;
        float frequency = 1 / (float)exp((double)power * log((double)a->theta));
        for (int pos = 0; pos < a->context; pos++) {
            float angle = (float)pos * frequency, *row = rope + (size_t)pos * (size_t)a->d;
            row[i] = (float)cos((double)angle);
            row[a->d / 2 + i] = (float)sin((double)angle);
        }
    }
    note(&c->q, cudaMemcpyAsync(c->rope, rope, n * sizeof *rope, cudaMemcpyHostToDevice,
                                c->q.stream), "copying angles");
    int code = wait_for(&c->q, error);
    free(rope);
    return code;
}

static void gpu_close(void *state) {
    struct gpu *c = (struct gpu *)state;
    if (c == NULL) return;
    use_device(&c->q, NULL);
    if (c->q.stream != NULL) cudaStreamSynchronize(c->q.stream);
    for (int i = 0; i < SEQUENCES; i++) {
        for (int p = 0; c->seq[i].pages != NULL && p < c->max_pages; p++)
            page_release_gpu(c, &c->seq[i].pages[p]);
        free(c->seq[i].pages);
    }
    for (struct gpu_page *p = c->spare, *next; p != NULL; p = next) {
        next = p->next;
        cudaFree(p->data);
        free(p);
    }
    for (cudaGraphExec_t graph : c->graph)
        if (graph != NULL) cudaGraphExecDestroy(graph);
    for (cudaGraphExec_t graph : c->next_graph)
        if (graph != NULL) cudaGraphExecDestroy(graph);
    cudaFree(c->memory);
    cudaFreeHost(c->host_in);
    cudaFreeHost(c->host_logits);
    cudaFreeHost(c->told);
    if (c->q.stream != NULL) cudaStreamDestroy(c->q.stream);
    cudaGetLastError();
    free(c);
}

static cudaError_t allow_kernels(const struct gpu *c) {
    cudaError_t e = cudaFuncSetAttribute(gemm_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         GEMM_SHARED);
    if (e != cudaSuccess || c->g->m->llama.L == 0) return e;
    return c->kv.type == LVM_F32   ? allow_shared<LVM_F32>(c->kv.dp)
           : c->kv.type == LVM_F16 ? allow_shared<LVM_F16>(c->kv.dp)
                                   : allow_shared<LVM_Q8_0>(c->kv.dp);
}

/* Where a block's shared memory is too small for the codes, the host samples. */
static cudaError_t allow_sampling(struct gpu *c) {
    struct cudaFuncAttributes own = {};
    int most = 0, codes = c->g->m->codes;
    auto *kernel = sample_kernel_for(codes);
    cudaError_t e = cudaFuncGetAttributes(&own, kernel);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, c->q.device);
    if (e != cudaSuccess) return e;
    most -= (int)own.sharedSizeBytes;
    c->samples = codes <= CODES && (int64_t)sampling_shared(codes) <= most;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

/* All memory but the pages of the cache. */
static int gpu_alloc(struct gpu *c, lvm_error *error) {
    struct arena a = {NULL, 0};
    const struct llama *l = &c->g->m->llama;
    place_lm(c, &a);
    place_vq(c, &a);
    c->bytes = a.used;
    for (int i = 0; i < SEQUENCES; i++) {
        c->seq[i].pages = (struct gpu_page **)calloc((size_t)c->max_pages + 1, sizeof(void *));
        if (c->seq[i].pages == NULL) return fail(error, LVM_MEMORY, "out of memory");
    }
    note(&c->q, cudaStreamCreateWithFlags(&c->q.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    note(&c->q, cudaMalloc((void **)&c->memory, c->bytes + 256), "cudaMalloc of work memory");
    note(&c->q, cudaMallocHost((void **)&c->host_in,
                               told_bytes(c, (int)max64(c->rows, SPLIT_ROWS)) + 256),
         "cudaMallocHost");
    note(&c->q, cudaMallocHost((void **)&c->host_logits, GRAPH_ROWS * (size_t)l->V * 4 + 256),
         "cudaMallocHost");
    note(&c->q, cudaMallocHost((void **)&c->told, sizeof *c->told), "cudaMallocHost");
    note(&c->q, allow_kernels(c), "cudaFuncSetAttribute");
    note(&c->q, allow_sampling(c), "cudaFuncSetAttribute");
    int code = settle(&c->q, error);
    if (code != LVM_OK) return code;
    memset(c->host_in, 0, told_bytes(c, (int)max64(c->rows, SPLIT_ROWS)));
    a.base = c->memory;
    a.used = 0;
    place_lm(c, &a);
    place_vq(c, &a);
    return l->L > 0 ? fill_rope(c, error) : LVM_OK;
}

static int gpu_open(void *copy, const lvm_options *o, void **state, struct limits *limits,
                    lvm_error *error) {
    const struct gpu_model *g = (const struct gpu_model *)copy;
    const struct llama *a = &g->m->llama;
    struct gpu *c = (struct gpu *)calloc(1, sizeof *c);
    if (c == NULL) return fail(error, LVM_MEMORY, "out of memory");
    c->g = g;
    c->o = o;
    c->q.device = g->q.device;
    c->exact = o->exact;
    c->images = 1;
    c->rows = (int)max64(SEQUENCES, min64(MAX_ROWS_GPU, a->context));
    if (a->L > 0) {
        c->max_pages = (a->context + KEYS - 1) / KEYS;
        c->kv = kv_layout_of(o->kv_type, a->d);
        c->page_bytes = (size_t)a->L * (size_t)a->G * 2 * (size_t)c->kv.head_bytes;
    }
    int code = max64(max64(a->D, a->F), (int64_t)a->H * a->d) <= ROW_VALUES * ROW_THREADS
                   ? use_device(&c->q, error)
                   : fail(error, LVM_UNSUPPORTED, "%s: rows are wider than %d, the most on a GPU",
                          g->m->path, ROW_VALUES * ROW_THREADS);
    if (code == LVM_OK) code = gpu_alloc(c, error);
    if (code == LVM_OK) {
        *limits = {c->images, c->rows, SEQUENCES, KEYS, c->samples ? CODES : 0};
        *state = c;
    } else gpu_close(c);
    return code;
}

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

static size_t gpu_kv_size(void *state) { return ((struct gpu *)state)->page_bytes; }

static int gpu_kv_get(void *state, int seq, int block, void *data, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int code = use_device(&c->q, error);
    if (code != LVM_OK) return code;
    note(&c->q, cudaMemcpyAsync(data, c->seq[seq].pages[block]->data, c->page_bytes,
                                cudaMemcpyDeviceToHost, c->q.stream), "copying a page");
    return wait_for(&c->q, error);
}

static int gpu_kv_set(void *state, int seq, int block, const void *data, int n, lvm_error *error) {
    struct gpu *c = (struct gpu *)state;
    int code = use_device(&c->q, error);
    if (code == LVM_OK) code = page_for_writing(c, &c->seq[seq], block * KEYS, error);
    if (code != LVM_OK) return code;
    note(&c->q, cudaMemcpyAsync(c->seq[seq].pages[block]->data, data, c->page_bytes,
                                cudaMemcpyHostToDevice, c->q.stream), "copying a page");
    code = wait_for(&c->q, error);
    if (code == LVM_OK) c->seq[seq].n = n;
    return code;
}

/* Pages that sequences share count once. */
static void gpu_usage(void *state, lvm_usage *usage) {
    const struct gpu *c = (const struct gpu *)state;
    double pages = 0;
    for (int i = 0; i < SEQUENCES; i++)
        for (int p = 0; p < c->max_pages; p++)
            if (c->seq[i].pages[p] != NULL) pages += 1.0 / c->seq[i].pages[p]->refs;
    int64_t cache = (int64_t)(pages + 0.5) * (int64_t)c->page_bytes;
    usage->cache += cache;
    usage->context += cache + (int64_t)c->bytes;
    usage->device += cache + (int64_t)c->bytes + (int64_t)c->g->bytes;
}

static int gpu_count(lvm_error *error) {
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaSuccess && count > 0) return count;
    cuda_fail(e != cudaSuccess ? e : cudaErrorNoDevice, "looking for a GPU", error);
    return 0;
}

static const struct backend cuda_backend = {
    sizeof(struct backend), BACKEND_VERSION, "cuda", gpu_model_open, gpu_model_close, gpu_open,
    gpu_close, gpu_encode, gpu_decode, gpu_forward, gpu_generate, gpu_kv_copy, gpu_kv_trim,
    gpu_kv_size, gpu_kv_get, gpu_kv_set, gpu_usage, gpu_count};

extern "C" const struct backend *lvm_cuda_backend(void);
extern "C" const struct backend *lvm_cuda_backend(void) { return &cuda_backend; }
