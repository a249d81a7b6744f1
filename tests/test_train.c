/* Training: gradients and steps of the optimiser.

       test_train GOLDENS BLOBS [--quick]

   GOLDENS is tests/golden_training (tests/golden/README.md says what PyTorch put there), BLOBS
   holds its checkpoints as weights files: NAME_llama.bin, NAME_gradients.bin. Every instruction set
   of this machine is tried, with --quick only the one that lvm would choose. Proven are:

       every tensor's gradient is PyTorch's, as |a - b| / max|b| and by L2 norms within 1e-4, and
       the loss within 1e-5: grouped queries, biases, tied embeddings, isolated sentences, adapters
       the same by differences of a forward in double precision that stands in this file
       the same bits with any number of threads, from what is kept and from what is computed again,
       and where other tensors are frozen
       ten steps of AdamW are PyTorch's, and its updates those of a few lines in double
       the trainer's calls: a model learns, threads and stopped steps change no bit, steps whose
       loss is no number change nothing */
#define main lvm_main
#include "../lvm.c"
#undef main
#include "check.h"
#include "gguf.h"
#include "npy.h"

static const double GRADIENT_BOUND = 1e-4, LOSS_BOUND = 1e-5, STEP_BOUND = 1e-4;
static const char *const modules[] = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate",
                                      "ffn_up", "ffn_down"};
enum { MODULES = sizeof modules / sizeof *modules, ADAPTER_RANK = 4, ALPHA = 8, STEPS = 10 };

static double worst_of_goldens, worst_of_differences, worst_of_steps;

/* What nothing can be compared without. */
static void succeed(int code, const lvm_error *error, const char *what) {
    check(code == LVM_OK, "%s: %s", what, error->text);
    if (code != LVM_OK) exit(checked("train"));
}

static void set_variable(const char *name, const char *value) {
#ifdef _WIN32
    _putenv_s(name, value);
#else
    setenv(name, value, 1);
#endif
}

/* ---- Trainers and their parameters ---- */

static lvm_train_options options_for(const lvm_model *init, int context, int batch) {
    lvm_train_options o = lvm_default_train_options();
    o.init = init;
    o.context = context;
    o.batch = batch;
    o.threads = 1;
    return o;
}

/* Without data: these tests hand it rows of their own. */
static struct lvm_trainer *open_trainer(lvm_train_options o) {
    lvm_error error = {0, ""};
    struct lvm_trainer *t = lvm_trainer_new(&o, &error);
    succeed(t != NULL ? LVM_OK : error.code, &error, "lvm_trainer_new");
    return t;
}

static lvm_model *open_weights(const char *folder, const char *name, const char *part) {
    char path[1024];
    lvm_error error = {0, ""};
    snprintf(path, sizeof path, "%s/%s_%s.bin", folder, name, part);
    lvm_model *m = lvm_open(path, 0, &error);
    succeed(m != NULL ? LVM_OK : error.code, &error, path);
    return m;
}

/* An adapter's parameter, "blk.LAYER.MODULE.weight.lora_a" or _b. */
static struct param *find_adapter(struct lvm_trainer *t, int layer, int module, char which) {
    char name[80];
    snprintf(name, sizeof name, "blk.%d.%s.weight.lora_%c", layer, modules[module], which);
    struct param *p = find_param(&t->net, -1, name);
    check(p != NULL, "there is no parameter %s", name);
    return must(p);
}

/* ---- Rows ---- */

/* Loss and gradients of all rows, as many contexts at a time as `most` and the trainer allow. */
static double accumulate(struct lvm_trainer *t, const struct rows *all, int context, int most) {
    double loss = 0, weight = 0;
    lvm_error error = {0, ""};
    int step = context * (int)min64(most, t->net.max_rows / context), p = 0;
    for (int i = 0; i < all->n; i++) weight += (double)all->weights[i];
    for (int at = 0; at < all->n; at += step) {
        struct rows r = *all;
        r.n = (int)min64(step, all->n - at);
        r.ids += at;
        r.targets += at;
        r.weights += at;
        struct piece pieces[16];
        r.pieces = pieces;
        for (r.n_pieces = 0; p < all->n_pieces && all->pieces[p].first < at + r.n; p++)
            pieces[r.n_pieces++] = (struct piece){all->pieces[p].first - at, all->pieces[p].n};
        succeed(net_accumulate(t, &r, weight, &loss, &error), &error, "net_accumulate");
    }
    return loss / weight;
}

/* ---- The same model once more, in double and as plainly as can be ----

   It knows the weights by their names and nothing of chapter 8's structs. Rows that attend to each
   other go through it as one sequence x[n][...]. */

struct plain {
    const struct llama *a;
    struct lvm_trainer *t;
    double **w;               /* [n_params]: every parameter's numbers */
    double lora_scale;
};

/* A parameter's numbers by name; NULL where there is none. layer -1: the model's own. Without an
   output matrix it is the embedding. */
static const double *plain_weight(const struct plain *p, int layer, const char *name) {
    const struct param *found = find_param(&p->t->net, layer, name);
    if (found == NULL && strcmp(name, "output.weight") == 0)
        found = find_param(&p->t->net, layer, "token_embd.weight");
    return found == NULL ? NULL : p->w[found - p->t->net.params];
}

static double *plain_rows(int64_t n) { return must(calloc((size_t)n, sizeof(double))); }

/* y[n][rows] += factor x[n][cols] w^T */
static void plain_matmul(const double *x, const double *w, double factor, int n, int rows, int cols,
                         double *y) {
    for (int i = 0; i < n; i++)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
                y[i * rows + r] += factor * x[i * cols + c] * w[r * cols + c];
}

/* x w^T + bias + scale (x a^T) b^T, in memory of its own. */
static double *plain_linear(const struct plain *p, const double *x, int n, int layer,
                            const char *module, int rows, int cols) {
    char name[64];
    double *y = plain_rows((int64_t)n * rows);
    snprintf(name, sizeof name, "%s.weight", module);
    plain_matmul(x, plain_weight(p, layer, name), 1, n, rows, cols, y);
    snprintf(name, sizeof name, "%s.bias", module);
    const double *bias = plain_weight(p, layer, name);
    for (int i = 0; bias != NULL && i < n * rows; i++) y[i] += bias[i % rows];
    snprintf(name, sizeof name, "%s.weight.lora_a", module);
    const double *a = plain_weight(p, layer, name);
    if (a == NULL) return y;
    double *low = plain_rows((int64_t)n * ADAPTER_RANK);
    snprintf(name, sizeof name, "%s.weight.lora_b", module);
    plain_matmul(x, a, 1, n, ADAPTER_RANK, cols, low);
    plain_matmul(low, plain_weight(p, layer, name), p->lora_scale, n, rows, ADAPTER_RANK, y);
    free(low);
    return y;
}

static double *plain_norm(const struct plain *p, const double *x, int n, int layer,
                          const char *name) {
    int D = p->a->D;
    const double *scale = plain_weight(p, layer, name);
    double *y = plain_rows((int64_t)n * D);
    for (int i = 0; i < n; i++) {
        double squares = 0;
        for (int c = 0; c < D; c++) squares += x[i * D + c] * x[i * D + c];
        double by = 1 / sqrt(squares / D + (double)p->a->eps);
        for (int c = 0; c < D; c++) y[i * D + c] = x[i * D + c] * by * scale[c];
    }
    return y;
}

/* Turns the pairs (c, c + d/2) of every head by position theta^(-2c/d); that angle is a float, as
   it is in transformers. */
static void plain_rope(const struct plain *p, double *x, int n, int heads) {
    int d = p->a->d;
    for (int i = 0; i < n * heads; i++)
        for (int c = 0; c < d / 2; c++) {
            float frequency = (float)pow((double)p->a->theta, -2.0 * c / d);
            double angle = (double)((float)(i / heads) * frequency);
            double *u = x + i * d + c, *v = u + d / 2, old = *u;
            *u = old * cos(angle) - *v * sin(angle);
            *v = *v * cos(angle) + old * sin(angle);
        }
}

/* One query's answer o[d] from the keys and values of its group up to and with its own. */
static void plain_attend(const struct plain *p, const double *q, const double *k, const double *v,
                         int n_keys, double *score, double *o) {
    int d = p->a->d, stride = p->a->G * d;
    double sum = 0, most = -1e300;
    for (int j = 0; j < n_keys; j++) {
        score[j] = 0;
        for (int c = 0; c < d; c++) score[j] += q[c] * k[j * stride + c] / sqrt(d);
        most = fmax(most, score[j]);
    }
    for (int j = 0; j < n_keys; j++) sum += score[j] = exp(score[j] - most);
    for (int j = 0; j < n_keys; j++)
        for (int c = 0; c < d; c++) o[c] += score[j] / sum * v[j * stride + c];
}

static void add_to(double *x, double *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
    free(y);
}

static void plain_layer(const struct plain *p, double *x, int n, int layer) {
    int D = p->a->D, F = p->a->F, H = p->a->H, G = p->a->G, d = p->a->d;
    double *h = plain_norm(p, x, n, layer, "attn_norm.weight");
    double *q = plain_linear(p, h, n, layer, "attn_q", H * d, D);
    double *k = plain_linear(p, h, n, layer, "attn_k", G * d, D);
    double *v = plain_linear(p, h, n, layer, "attn_v", G * d, D);
    double *o = plain_rows((int64_t)n * H * d), *score = plain_rows(n);
    plain_rope(p, q, n, H);
    plain_rope(p, k, n, G);
    for (int i = 0; i < n; i++)
        for (int head = 0; head < H; head++) {
            int group = head / (H / G), at = (i * H + head) * d;
            plain_attend(p, q + at, k + group * d, v + group * d, i + 1, score, o + at);
        }
    add_to(x, plain_linear(p, o, n, layer, "attn_output", D, H * d), (int64_t)n * D);
    free(h);
    h = plain_norm(p, x, n, layer, "ffn_norm.weight");
    double *gate = plain_linear(p, h, n, layer, "ffn_gate", F, D);
    double *up = plain_linear(p, h, n, layer, "ffn_up", F, D);
    for (int64_t i = 0; i < (int64_t)n * F; i++) up[i] *= gate[i] / (1 + exp(-gate[i]));
    add_to(x, plain_linear(p, up, n, layer, "ffn_down", D, F), (int64_t)n * D);
    double *all[] = {h, q, k, v, o, score, gate, up};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* The sum of weight (-ln p) over one piece's n tokens; nll[n]: -ln p of each. */
static double plain_piece(const struct plain *p, const int32_t *ids, const int32_t *targets,
                          const float *weights, int n, double *nll) {
    int D = p->a->D, V = p->a->V;
    const double *embed = plain_weight(p, -1, "token_embd.weight");
    double *x = plain_rows((int64_t)n * D), loss = 0;
    for (int i = 0; i < n * D; i++) x[i] = embed[ids[i / D] * D + i % D];
    for (int layer = 0; layer < p->a->L; layer++) plain_layer(p, x, n, layer);
    double *h = plain_norm(p, x, n, -1, "output_norm.weight");
    double *logits = plain_linear(p, h, n, -1, "output", V, D);
    for (int i = 0; i < n; i++) {
        double sum = 0;
        for (int c = 0; c < V; c++) sum += exp(logits[i * V + c]);
        nll[i] = log(sum) - logits[i * V + targets[i]];
        loss += (double)weights[i] * nll[i];
    }
    free(x);
    free(h);
    free(logits);
    return loss;
}

/* The loss; nll[r->n] stays as it is where padding is. */
static double plain_loss(const struct plain *p, const struct rows *r, double *nll) {
    double loss = 0, weight = 0;
    for (int i = 0; i < r->n; i++) weight += (double)r->weights[i];
    for (int i = 0; i < r->n_pieces; i++) {
        int at = r->pieces[i].first;
        loss += plain_piece(p, r->ids + at, r->targets + at, r->weights + at, r->pieces[i].n,
                            nll + at);
    }
    return loss / weight;
}

/* Every parameter of the trainer, of any type, as doubles. */
static struct plain plain_of(struct lvm_trainer *t) {
    struct plain p = {t->net.a, t, must(calloc((size_t)t->net.n_params, sizeof *p.w)),
                      (double)ALPHA / ADAPTER_RANK};
    for (int i = 0; i < t->net.n_params; i++) {
        const struct tensor *w = &t->net.params[i].w;
        float *row = must(calloc((size_t)w->cols, sizeof *row));
        p.w[i] = plain_rows((int64_t)w->rows * w->cols);
        for (int r = 0; r < w->rows; r++) {
            row_floats(&kernels_plain, w, r, 0, w->cols, row);
            for (int c = 0; c < w->cols; c++) p.w[i][(int64_t)r * w->cols + c] = (double)row[c];
        }
        free(row);
    }
    return p;
}

static void plain_free(struct plain *p) {
    for (int i = 0; i < p->t->net.n_params; i++) free(p->w[i]);
    free(p->w);
}

/* ---- Against PyTorch ---- */

struct golden {
    const char *name, *model; /* the case, and the folder with its weights */
    int adapters;
    struct npy ids, targets, weights, pieces, loss;
    int context;
    struct rows rows;         /* the same; its pieces are owned */
};

static void load_golden(struct golden *c, const char *goldens) {
    char folder[1024];
    snprintf(folder, sizeof folder, "%s/%s", goldens, c->name);
    c->ids = npy_load(folder, "ids");
    c->targets = npy_load(folder, "targets");
    c->weights = npy_load(folder, "weights");
    c->pieces = npy_load(folder, "pieces");
    c->loss = npy_load(folder, "loss");
    must(c->loss.data);
    c->context = c->ids.dim[1];
    c->rows = (struct rows){.n = (int)c->ids.n, .ids = must(c->ids.data),
                            .targets = must(c->targets.data), .weights = must(c->weights.data),
                            .n_pieces = c->pieces.dim[0]};
    c->rows.pieces = must(calloc((size_t)c->rows.n_pieces, sizeof *c->rows.pieces));
    for (int i = 0; i < c->rows.n_pieces; i++)
        c->rows.pieces[i] =
            (struct piece){npy_i32(&c->pieces)[2 * i], npy_i32(&c->pieces)[2 * i + 1]};
}

static void free_golden(struct golden *c) {
    npy_free(&c->ids);
    npy_free(&c->targets);
    npy_free(&c->weights);
    npy_free(&c->pieces);
    npy_free(&c->loss);
    free(c->rows.pieces);
}

/* a[n] against the right b[n]: by the largest of b and by L2 norms. */
static void check_near(const char *name, const float *a, const float *b, int64_t n) {
    double largest = 0, apart = 0, norm = 0, distance = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= apart)) apart = d; /* a NaN counts */
        largest = fmax(largest, fabs((double)b[i]));
        distance += d * d;
        norm += (double)b[i] * (double)b[i];
    }
    check(largest > 0, "%s: all zeros prove nothing", name);
    check(apart <= GRADIENT_BOUND * largest, "%s: differs by %g of its largest", name,
          apart / largest);
    check(sqrt(distance) <= GRADIENT_BOUND * sqrt(norm), "%s: differs by %g of its norm", name,
          sqrt(distance / norm));
    worst_of_goldens = fmax(worst_of_goldens, apart / largest);
}

/* Every tensor of the right gradients, which came as a model. */
static void check_gradients(struct lvm_trainer *t, const lvm_model *right) {
    int compared = 0;
    for (int i = 0; i < right->n_specs; i++) {
        const struct tensor_spec *s = &right->specs[i];
        const struct tensor *g = s->tensor;
        int tied = g == &right->llama.output && g->data == right->llama.embed.data;
        if (g->data == NULL || tied) continue;
        struct param *p = find_param(&t->net, -1, s->name);
        check(p != NULL && p->g != NULL, "%s does not learn", s->name);
        if (p == NULL || p->g == NULL) continue;
        int rows = s->n_dims == 1 ? 1 : g->rows, cols = s->dims[s->n_dims - 1];
        check(p->w.rows == rows && p->w.cols == cols, "%s: is %d x %d, not %d x %d", s->name,
              p->w.rows, p->w.cols, rows, cols);
        check_near(s->name, p->g, floats(g), elements(p));
        compared++;
    }
    check(compared == t->net.n_params, "%d of %d tensors have a right gradient", compared,
          t->net.n_params);
}

/* Adapters lie one behind the other: see tests/golden/README.md. */
static void set_adapters(struct lvm_trainer *t, const struct npy *values) {
    const float *from = must(values->data);
    for (int i = 0; i < t->net.a->L * MODULES * 2; i++) {
        struct param *p = find_adapter(t, i / 2 / MODULES, i / 2 % MODULES, i % 2 ? 'b' : 'a');
        memcpy(must(p->values), from, (size_t)elements(p) * sizeof *from);
        from += elements(p);
    }
    check(from - npy_f32(values) == values->n, "adapters have %d numbers, not %d",
          (int)(from - npy_f32(values)), (int)values->n);
}

static void check_adapters(struct lvm_trainer *t, const struct npy *right) {
    const float *from = must(right->data);
    for (int i = 0; i < t->net.n_params; i++)
        check((strstr(t->net.params[i].name, "lora_") != NULL) == (t->net.params[i].g != NULL),
              "%s: adapters alone learn", t->net.params[i].name);
    for (int i = 0; i < t->net.a->L * MODULES * 2; i++) {
        struct param *p = find_adapter(t, i / 2 / MODULES, i / 2 % MODULES, i % 2 ? 'b' : 'a');
        check_near(p->name, must(p->g), from, elements(p));
        from += elements(p);
    }
}

/* A trainer on a case's model, with its adapters in it. */
static struct lvm_trainer *open_case(const struct golden *c, const char *goldens,
                                     const lvm_model *init, int threads, int recompute) {
    lvm_train_options o = options_for(init, c->context, c->ids.dim[0]);
    o.threads = threads;
    o.recompute = recompute;
    if (c->adapters) {
        o.lora_rank = ADAPTER_RANK;
        o.lora_alpha = ALPHA;
    }
    struct lvm_trainer *t = open_trainer(o);
    if (c->adapters) {
        char folder[1024];
        snprintf(folder, sizeof folder, "%s/%s", goldens, c->name);
        struct npy adapters = npy_load(folder, "adapters");
        set_adapters(t, &adapters);
        npy_free(&adapters);
    }
    return t;
}

static void check_against_pytorch(const struct golden *c, struct lvm_trainer *t,
                                  const char *goldens, const char *blobs, double loss) {
    double right = (double)npy_f32(&c->loss)[0];
    check(fabs(loss - right) <= LOSS_BOUND, "the loss is %.7f, not %.7f", loss, right);
    if (c->adapters) {
        char folder[1024];
        snprintf(folder, sizeof folder, "%s/%s", goldens, c->name);
        struct npy gradients = npy_load(folder, "adapter_gradients");
        check_adapters(t, &gradients);
        npy_free(&gradients);
    } else {
        lvm_model *gradients = open_weights(blobs, c->name, "gradients");
        check_gradients(t, gradients);
        lvm_close(gradients);
    }
}

/* ---- What changes no bit ---- */

/* Gradients that two trainers of one model both have. */
static void check_same(struct lvm_trainer *t, struct lvm_trainer *other) {
    int compared = 0;
    check(t->net.n_params == other->net.n_params, "%d parameters", t->net.n_params);
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i], *q = &other->net.params[i];
        if (p->g == NULL || q->g == NULL) continue;
        check(memcmp(p->g, q->g, (size_t)elements(p) * sizeof *p->g) == 0,
              "the gradient of %s has other bits", p->name);
        compared++;
    }
    check(compared > 0, "no gradient was compared");
}

static void check_invariance(const struct golden *c, const char *goldens, const lvm_model *init,
                             struct lvm_trainer *t, double loss) {
    static const struct { int threads, recompute; } ways[] = {
        {2, LVM_RECOMPUTE_NONE}, {3, LVM_RECOMPUTE_ALL}, {1, LVM_RECOMPUTE_ALL},
        {3, LVM_RECOMPUTE_AUTO}};
    for (int i = 0; i < (int)(sizeof ways / sizeof *ways); i++) {
        where("%s, %s: %d threads, recompute %d", c->name, t->e.kern->name, ways[i].threads,
              ways[i].recompute);
        struct lvm_trainer *u =
            open_case(c, goldens, init, ways[i].threads, ways[i].recompute);
        double again = accumulate(u, &c->rows, c->context, c->ids.dim[0]);
        check(memcmp(&loss, &again, sizeof loss) == 0, "the loss is %.17g, not %.17g", again, loss);
        check_same(u, t);
        lvm_trainer_free(u);
    }
}

/* Frozen tensors have no gradient, and the others' do not change. */
static void check_freezing(const struct golden *c, const lvm_model *init, struct lvm_trainer *t) {
    lvm_train_options o = options_for(init, c->context, c->ids.dim[0]);
    o.freeze = "token_embd.weight,*attn_k.*,blk.1.*norm.weight,blk.0.ffn_up.weight";
    where("%s, %s: some are frozen", c->name, t->e.kern->name);
    struct lvm_trainer *u = open_trainer(o);
    accumulate(u, &c->rows, c->context, c->ids.dim[0]);
    check_same(u, t);
    for (int i = 0; i < u->net.n_params; i++) {
        const char *name = u->net.params[i].name;
        int frozen = strcmp(name, "token_embd.weight") == 0 || strstr(name, "attn_k.") != NULL ||
                     strcmp(name, "blk.0.ffn_up.weight") == 0 ||
                     (strncmp(name, "blk.1.", 6) == 0 && strstr(name, "norm.weight") != NULL);
        check((u->net.params[i].g == NULL) == frozen, "%s is%s frozen", name, frozen ? " not" : "");
    }
    lvm_trainer_free(u);
}

/* The forward in double gives PyTorch's loss too. */
static void check_plain(const struct golden *c, struct lvm_trainer *t) {
    struct plain p = plain_of(t);
    double *nll = plain_rows(c->rows.n), right = (double)npy_f32(&c->loss)[0];
    double loss = plain_loss(&p, &c->rows, nll);
    check(fabs(loss - right) <= LOSS_BOUND, "the plain forward gives %.7f, not %.7f", loss, right);
    free(nll);
    plain_free(&p);
}

static void test_golden(struct golden c, const char *goldens, const char *blobs) {
    load_golden(&c, goldens);
    lvm_model *init = open_weights(blobs, c.model, "llama");
    struct lvm_trainer *t = open_case(&c, goldens, init, 1, LVM_RECOMPUTE_NONE);
    where("%s, %s", c.name, t->e.kern->name);
    double loss = accumulate(t, &c.rows, c.context, c.ids.dim[0]);
    check_against_pytorch(&c, t, goldens, blobs, loss);
    if (t->m->kern == simd_kernels[simd_level()]) check_plain(&c, t);
    check_invariance(&c, goldens, init, t, loss);
    if (strcmp(c.name, "gqa") == 0) check_freezing(&c, init, t);
    where("%s, %s: row by row", c.name, t->e.kern->name);
    zero_gradients(t);
    loss = accumulate(t, &c.rows, c.context, 1);
    check_against_pytorch(&c, t, goldens, blobs, loss);
    lvm_trainer_free(t);
    lvm_close(init);
    free_golden(&c);
}

/* ---- Ten steps ---- */

static void check_end(struct lvm_trainer *t, const char *folder, const char *file,
                      const char *name) {
    struct npy right = npy_load(folder, file);
    struct param *p = must(find_param(&t->net, -1, name));
    check(elements(p) == right.n, "%s has %d numbers", name, (int)right.n);
    check_near(name, floats(&p->w), must(right.data), right.n);
    npy_free(&right);
}

/* One of the ten, step 0 the first: the loss before it, the norm of its gradient, its rate. */
static void check_step(struct lvm_trainer *t, const struct golden *c, const char *folder,
                       int step) {
    struct npy rates = npy_load(folder, "lr"), norms = npy_load(folder, "norms");
    struct npy losses = npy_load(folder, "losses");
    struct piece pieces[2] = {{0, c->context}, {c->context, c->context}};
    int n = 2 * c->context, at = step * n;
    struct rows r = {.n = n, .ids = c->rows.ids + at, .targets = c->rows.targets + at,
                     .weights = c->rows.weights + at, .pieces = pieces, .n_pieces = 2};
    zero_gradients(t);
    double loss = accumulate(t, &r, c->context, 2), right = (double)npy_f32(&losses)[step];
    double norm = gradient_norm(t), right_norm = (double)npy_f32(&norms)[step];
    double rate = learning_rate(&t->o, step + 1), right_rate = (double)npy_f32(&rates)[step];
    where("steps, %s: step %d", t->e.kern->name, step + 1);
    check(fabs(loss - right) <= STEP_BOUND, "the loss is %.6f, not %.6f", loss, right);
    check(fabs(norm - right_norm) <= STEP_BOUND * right_norm, "the norm is %.6f, not %.6f", norm,
          right_norm);
    check(fabs(rate - right_rate) <= 1e-6 * right_rate, "the rate is %g, not %g", rate, right_rate);
    update_params(t, rate, norm, step + 1);
    worst_of_steps = fmax(worst_of_steps, fabs(loss - right));
    npy_free(&rates);
    npy_free(&norms);
    npy_free(&losses);
}

static void test_steps(const char *goldens, const char *blobs) {
    char folder[1024];
    snprintf(folder, sizeof folder, "%s/steps", goldens);
    struct golden c = {.name = "steps", .ids = npy_load(folder, "ids"),
                       .targets = npy_load(folder, "targets"),
                       .weights = npy_load(folder, "weights")};
    c.context = c.ids.dim[1];
    c.rows = (struct rows){.ids = must(c.ids.data), .targets = must(c.targets.data),
                           .weights = must(c.weights.data)};
    lvm_model *init = open_weights(blobs, "plain", "llama");
    lvm_train_options o = options_for(init, c.context, 2);
    o.steps = STEPS;
    o.warmup = 3;
    o.lr = 4e-3f;
    o.min_lr = 4e-4f;
    o.clip = 6;
    struct lvm_trainer *t = open_trainer(o);
    for (int step = 0; step < STEPS; step++) check_step(t, &c, folder, step);
    where("steps, %s: weights in the end", t->e.kern->name);
    check_end(t, folder, "ffn_down", "blk.1.ffn_down.weight");
    check_end(t, folder, "attn_norm", "blk.0.attn_norm.weight");
    lvm_trainer_free(t);
    lvm_close(init);
    free_golden(&c);
}

/* ---- Against its differences ---- */

/* Gradients of a parameter at some places, fewer where rows are many. */
static void check_differences(const struct plain *p, int index, const struct rows *r,
                              struct rng *rng) {
    const struct param *param = &p->t->net.params[index];
    int64_t n = elements(param), tries = min64(n, r->n < 100 ? 8 : 2);
    double largest = 0, step = 1e-4, *nll = plain_rows(r->n);
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, fabs((double)param->g[i]));
    check(largest > 0, "%s: all zeros prove nothing", param->name);
    for (int64_t i = 0; i < tries; i++) {
        int64_t at = n <= tries ? i : rng_next(rng) % n;
        double *w = &p->w[index][at], kept = *w;
        *w = kept + step;
        double above = plain_loss(p, r, nll);
        *w = kept - step;
        double right = (above - plain_loss(p, r, nll)) / (2 * step);
        *w = kept;
        double apart = fabs((double)param->g[at] - right);
        check(apart <= GRADIENT_BOUND * largest, "%s: at %d the gradient is %g, not %g; largest %g",
              param->name, (int)at, (double)param->g[at], right, largest);
        worst_of_differences = fmax(worst_of_differences, apart / largest);
    }
    free(nll);
}

/* The losses alone, and that of each token that counts. */
static void check_losses(const struct plain *p, const struct rows *r) {
    double right = 0, loss = 0, *want = plain_rows(r->n);
    lvm_error error = {0, ""};
    const float *nll = p->t->net.work.nll;
    double mean = plain_loss(p, r, want);
    succeed(net_loss(p->t, r, &loss, &error), &error, "net_loss");
    for (int i = 0; i < r->n_pieces; i++)
        for (int k = r->pieces[i].first; k < r->pieces[i].first + r->pieces[i].n; k++) {
            right += (double)r->weights[k];
            if (r->weights[k] == 0) continue;
            check(fabs((double)nll[k] - want[k]) <= LOSS_BOUND * 10,
                  "-ln p of row %d is %g, not %g", k, (double)nll[k], want[k]);
        }
    check(fabs(loss - mean * right) <= LOSS_BOUND * right, "net_loss gives %g, not %g", loss,
          mean * right);
    free(want);
}

/* Random rows. Of long ones the first 256 do not learn, for the loss looks at so many at a time,
   and one piece has more than DQ_PARTS blocks of keys. */
static struct rows some_rows(int context, int V, struct rng *rng) {
    int n = 2 * context;
    struct rows r = {.n = n, .ids = must(calloc((size_t)n, sizeof(int32_t))),
                     .targets = must(calloc((size_t)n, sizeof(int32_t))),
                     .weights = must(calloc((size_t)n, sizeof(float))),
                     .pieces = must(calloc(4, sizeof(struct piece))), .n_pieces = 4};
    int first = context > 256 ? 60 : context / 3, second = context / 2;
    r.pieces[0] = (struct piece){0, first};
    r.pieces[1] = (struct piece){first, context - first};
    r.pieces[2] = (struct piece){context, second};
    r.pieces[3] = (struct piece){context + second, context - second - 2}; /* two of padding */
    for (int i = 0; i < n; i++) {
        r.ids[i] = (int32_t)(rng_next(rng) % (uint32_t)V);
        r.targets[i] = (int32_t)(rng_next(rng) % (uint32_t)V);
        int none = i >= n - 2 || (context > 256 && i < 256);
        r.weights[i] = none ? 0 : (float)(rng_next(rng) % 4) / 2;
    }
    return r;
}

static void fill_adapters(struct lvm_trainer *t, struct rng *rng) {
    for (int i = 0; i < t->net.n_params; i++) {
        struct param *p = &t->net.params[i];
        if (strstr(p->name, "lora_") == NULL) continue;
        for (int64_t k = 0; k < elements(p); k++) p->values[k] = 0.3f * uniform_of(rng);
    }
}

static void test_differences(const struct llama *a, int adapters) {
    struct rng rng = rng_new(19, (uint64_t)a->D);
    lvm_error error = {0, ""};
    struct model_file f = make_model(a, NULL, LVM_F32, LVM_F32);
    lvm_model *init = lvm_open_memory(f.data, f.size, &error);
    succeed(init != NULL ? LVM_OK : error.code, &error, "lvm_open_memory");
    lvm_train_options o = options_for(init, a->context, 2);
    o.lora_rank = adapters ? ADAPTER_RANK : 0;
    o.lora_alpha = ALPHA;
    o.recompute = LVM_RECOMPUTE_NONE;
    struct lvm_trainer *t = open_trainer(o);
    fill_adapters(t, &rng);
    struct plain p = plain_of(t);
    struct rows r = some_rows(a->context, a->V, &rng);
    double *nll = plain_rows(r.n);
    where("differences, D %d, F %d, %s%s", a->D, a->F, t->e.kern->name,
          adapters ? ", adapters" : "");
    double loss = accumulate(t, &r, a->context, 2), right = plain_loss(&p, &r, nll);
    check(fabs(loss - right) <= LOSS_BOUND, "the loss is %.7f, not %.7f", loss, right);
    check_losses(&p, &r);
    for (int i = 0; i < t->net.n_params; i++)
        if (t->net.params[i].g != NULL) check_differences(&p, i, &r, &rng);
    plain_free(&p);
    void *all[] = {nll, r.ids, r.targets, r.weights, r.pieces};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    lvm_trainer_free(t);
    lvm_close(init);
    free(f.data);
}

/* ---- AdamW once more, in double; and the rates ---- */

/* A number and its averages. */
struct plain_adamw {
    double w, m, v;
};

static void plain_update(struct plain_adamw *p, const lvm_train_options *o, double g, double lr,
                         int decays, int step) {
    double b1 = (double)o->beta1, b2 = (double)o->beta2;
    p->m = b1 * p->m + (1 - b1) * g;
    p->v = b2 * p->v + (1 - b2) * g * g;
    p->w -= decays ? lr * (double)o->weight_decay * p->w : 0;
    p->w -= lr * (p->m / (1 - pow(b1, step))) /
            (sqrt(p->v / (1 - pow(b2, step))) + (double)o->epsilon);
}

static struct plain_adamw *plain_numbers(const struct lvm_trainer *t) {
    int64_t n = 0;
    for (int i = 0; i < t->net.n_params; i++) n += elements(&t->net.params[i]);
    struct plain_adamw *all = must(calloc((size_t)n, sizeof *all)), *at = all;
    for (int i = 0; i < t->net.n_params; i++)
        for (int64_t k = 0; k < elements(&t->net.params[i]); k++)
            (at++)->w = (double)floats(&t->net.params[i].w)[k];
    return all;
}

/* Every number of a trainer, on gradients out of the blue. */
static void check_update(struct lvm_trainer *t, struct lvm_trainer *threaded,
                         struct plain_adamw *at, int step, struct rng *rng) {
    double squares = 0, lr = 0.01 / step, worst = 0;
    for (int i = 0; i < t->net.n_params; i++) {
        struct param *p = &t->net.params[i], *q = &threaded->net.params[i];
        check((p->g == NULL) == (i == 1), "%s learns or does not", p->name);
        for (int64_t k = 0; p->g != NULL && k < elements(p); k++) {
            p->g[k] = q->g[k] = uniform_of(rng) / 100;
            squares += (double)p->g[k] * (double)p->g[k];
        }
    }
    double norm = gradient_norm(t), same = gradient_norm(threaded);
    double clip = (double)t->o.clip, scale = clip > 0 && norm > clip ? clip / norm : 1;
    check(fabs(norm - sqrt(squares)) <= 1e-9 * norm, "the norm is %g, not %g", norm, sqrt(squares));
    check(memcmp(&norm, &same, sizeof norm) == 0, "threads change the norm");
    update_params(t, lr, norm, step);
    update_params(threaded, lr, norm, step);
    for (int i = 0; i < t->net.n_params; i++) {
        struct param *p = &t->net.params[i];
        const float *w = floats(&p->w);
        for (int64_t k = 0; k < elements(p); k++, at++) {
            double g = p->g != NULL ? (double)p->g[k] * scale : 0;
            if (p->g != NULL) plain_update(at, &t->o, g, lr, p->w.rows > 1, step);
            worst = fmax(worst, fabs((double)w[k] - at->w));
        }
        check(memcmp(w, floats(&threaded->net.params[i].w), (size_t)elements(p) * sizeof *w) == 0,
              "%s: threads change the update", p->name);
    }
    check(worst <= 1e-6, "a number differs by %g after update %d", worst, step);
}

static void test_update(float clip) {
    struct rng rng = rng_new(5, 0);
    lvm_train_options o = options_for(NULL, 8, 1);
    o.layers = 1;
    o.width = 72;
    o.heads = 2;
    o.feed_forward = 30;
    o.vocab = 1000;
    o.bos = o.eos = -1;
    o.clip = clip;
    o.freeze = "blk.0.attn_norm.weight";
    struct lvm_trainer *t = open_trainer(o);
    o.threads = 3;
    struct lvm_trainer *threaded = open_trainer(o);
    struct plain_adamw *all = plain_numbers(t);
    where("updates, clip %g", (double)clip);
    check(elements(&t->net.params[0]) > CHUNK, "a parameter has several chunks");
    for (int step = 1; step <= 4; step++) check_update(t, threaded, all, step, &rng);
    free(all);
    lvm_trainer_free(t);
    lvm_trainer_free(threaded);
}

static void check_rate(const lvm_train_options *o, int64_t step, double right) {
    double rate = learning_rate(o, step);
    check(fabs(rate - right) <= 1e-6, "the rate of step %d of schedule %d is %g, not %g", (int)step,
          o->schedule, rate, right);
}

static void test_rates(void) {
    lvm_train_options o = lvm_default_train_options();
    o.lr = 1;
    o.min_lr = 0.2f;
    o.steps = 100;
    o.warmup = 10;
    where("rates");
    check_rate(&o, 1, 0.1);
    check_rate(&o, 10, 1);
    check_rate(&o, 55, 0.6);
    check_rate(&o, 100, 0.2);
    check_rate(&o, 1000, 0.2);
    o.schedule = LVM_WSD;
    check_rate(&o, 5, 0.5);
    check_rate(&o, 90, 1);
    check_rate(&o, 95, 0.6);
    check_rate(&o, 100, 0.2);
    check_rate(&o, 101, 0.2);
    o.warmup = 0;
    check_rate(&o, 1, 1);
}

/* ---- The trainer's calls ---- */

enum { CALLED_STEPS = 24 };

/* Sentences that can be learnt: one id follows another. */
static lvm_tokens *chain_of_ids(int n_sentences, struct buffer *memory) {
    struct rng rng = rng_new(11, 0);
    struct token_writer w;
    lvm_error error = {0, ""};
    int code = token_writer_open(&w, NULL, &error);
    for (int s = 0; s < n_sentences && code == LVM_OK; s++) {
        int32_t ids[60];
        int n = 20 + (int)(rng_next(&rng) % 40);
        ids[0] = (int32_t)(rng_next(&rng) % 38);
        for (int i = 1; i < n; i++) ids[i] = (ids[i - 1] * 5 + 7) % 38;
        code = token_writer_add(&w, ids, NULL, (size_t)n, &error);
    }
    code = token_writer_close(&w, code, &error);
    *memory = w.memory;
    lvm_tokens *tokens =
        code == LVM_OK ? lvm_tokens_open_memory(memory->data, memory->n, "chain", &error) : NULL;
    succeed(tokens != NULL ? LVM_OK : error.code, &error, "token_writer");
    return tokens;
}

static lvm_train_options options_from_nothing(const lvm_tokens *const *data) {
    lvm_train_options o = options_for(NULL, 40, 6);
    o.layers = 2;
    o.width = 32;
    o.heads = 2;
    o.feed_forward = 48;
    o.vocab = 40;
    o.bos = 38;
    o.eos = 39;
    o.data = data;
    o.n_data = 1;
    o.steps = CALLED_STEPS;
    o.warmup = 4;
    o.lr = 0.01f;
    return o;
}

static void check_same_weights(struct lvm_trainer *t, struct lvm_trainer *other) {
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i], *q = &other->net.params[i];
        check(memcmp(p->values, q->values, (size_t)elements(p) * sizeof *p->values) == 0,
              "%s has other bits", p->name);
    }
}

static lvm_train_report one_step(struct lvm_trainer *t) {
    lvm_train_report r;
    lvm_error error = {0, ""};
    succeed(lvm_trainer_step(t, &r, &error), &error, "lvm_trainer_step");
    return r;
}

static double eval_all(struct lvm_trainer *t, const lvm_tokens *data) {
    double loss = 0;
    int64_t tokens = 0;
    lvm_error error = {0, ""};
    succeed(lvm_trainer_eval(t, data, 0, &loss, &tokens, &error), &error, "lvm_trainer_eval");
    check(tokens == data->n_tokens + 2 * data->n_sentences - 1, "it reads %d tokens", (int)tokens);
    return loss;
}

/* Stops at the call that *user counts down to. */
static int stop_later(void *user, const char *stage, int64_t done, int64_t total) {
    int *calls = user;
    check(strcmp(stage, "train") == 0 && done >= 0 && done <= total, "%s %d of %d", stage,
          (int)done, (int)total);
    return --*calls == 0;
}

/* A run in which every step is stopped once before it is taken is the run that was not. */
static void check_stops(const lvm_tokens *const *data, struct lvm_trainer *right) {
    int calls = 0;
    lvm_train_options o = options_from_nothing(data);
    o.user = &calls;
    o.progress = stop_later;
    o.threads = 2;
    struct lvm_trainer *t = open_trainer(o);
    where("every step is stopped once");
    for (int step = 0; step < CALLED_STEPS; step++) {
        lvm_train_report r;
        lvm_error error = {0, ""};
        calls = step % 4 + 1; /* two layers, forward and backward */
        check(lvm_trainer_step(t, &r, &error) == LVM_CANCELLED, "step %d is not stopped", step);
        check(t->step == step, "a stopped step counts");
        calls = 0;
        one_step(t);
    }
    check_same_weights(t, right);
    lvm_trainer_free(t);
}

/* A gradient that is no number changes nothing and is counted. */
static void check_skips(struct lvm_trainer *t) {
    float *w = t->net.embed->values, kept = w[0];
    struct param *watched = t->net.norm;
    float before = watched->values[0];
    where("a loss that is no number");
    for (int i = 1; i <= 3; i++) {
        t->net.norm->values[1] = i < 3 ? NAN : 1;
        lvm_train_report r = one_step(t);
        check(r.was_skipped == (i < 3) && r.in_a_row == (i < 3 ? i : 0), "step %d: skipped %d, %d",
              i, r.was_skipped, (int)r.in_a_row);
        check(r.skipped == (i < 3 ? i : 2), "%d steps are skipped", (int)r.skipped);
        check((w[0] == kept && watched->values[0] == before) == (i < 3), "step %d %s weights", i,
              i < 3 ? "changes" : "leaves");
    }
}

/* A gradient 20 times the usual one changes nothing either. */
static void check_spike(struct lvm_trainer *t) {
    double kept = t->usual_norm;
    where("a spike");
    for (int factor = 15; factor <= 25; factor += 10) {
        struct data_position at = t->at;
        t->usual_norm = 1e9;
        double norm = one_step(t).grad_norm;
        t->at = at;
        t->usual_norm = norm / factor;
        lvm_train_report r = one_step(t);
        check(r.was_skipped == (r.grad_norm > norm / factor * 20), "%g times the usual norm: %d",
              r.grad_norm / norm * factor, r.was_skipped);
        check(r.was_skipped == (factor > 20), "about %d times the usual norm: %d", factor,
              r.was_skipped);
    }
    t->usual_norm = kept;
}

/* A step of more rows than pass through the model together. */
static void test_passes(const lvm_tokens *const *data) {
    lvm_train_options o = options_from_nothing(data);
    o.batch = PASS_TOKENS / o.context + 20;
    o.isolate = 1;
    where("a step of several passes");
    struct lvm_trainer *t = open_trainer(o), *u = open_trainer(o);
    lvm_train_report r = one_step(t);
    double loss = accumulate(u, &t->rows, o.context, 1);
    check(t->rows.n_pieces > o.batch, "%d pieces", t->rows.n_pieces);
    check(fabs(loss - r.loss) <= LOSS_BOUND, "the loss is %g, not %g", r.loss, loss);
    for (int i = 0; i < t->net.n_params; i++)
        check_near(t->net.params[i].name, t->net.params[i].g, u->net.params[i].g,
                   elements(&t->net.params[i]));
    lvm_trainer_free(t);
    lvm_trainer_free(u);
}

static void test_trainer(void) {
    struct buffer memory;
    const lvm_tokens *data = chain_of_ids(300, &memory);
    lvm_train_options o = options_from_nothing(&data);
    struct lvm_trainer *t = open_trainer(o);
    o.threads = 3;
    o.recompute = LVM_RECOMPUTE_ALL;
    struct lvm_trainer *other = open_trainer(o);
    where("calls");
    double begin = eval_all(t, data);
    check(fabs(begin - log(40)) < 0.2, "an untaught model's loss is %g", begin);
    for (int step = 1; step <= CALLED_STEPS; step++) {
        lvm_train_report r = one_step(t), q = one_step(other);
        check(memcmp(&r.loss, &q.loss, sizeof r.loss) == 0 && r.grad_norm == q.grad_norm,
              "step %d: threads change the loss", step);
        check(r.step == step && r.tokens == 240 * step && !r.was_skipped, "step %d counts %d, %d",
              step, (int)r.step, (int)r.tokens);
    }
    check_same_weights(t, other);
    double end = eval_all(t, data);
    check(end < 0.6 * begin, "the loss falls from %g to %g", begin, end);
    check_stops(&data, t);
    check_skips(t);
    check_spike(t);
    test_passes(&data);
    lvm_trainer_free(t);
    lvm_trainer_free(other);
    lvm_tokens_close((lvm_tokens *)(uintptr_t)data);
    mem_free(memory.data);
}

/* ---- All ---- */

static void test_kernels(const char *goldens, const char *blobs) {
    static const struct golden cases[] = {
        {.name = "plain", .model = "plain"}, {.name = "gqa", .model = "gqa"},
        {.name = "tied", .model = "tied"}, {.name = "isolate", .model = "tied"},
        {.name = "lora", .model = "gqa", .adapters = 1}};
    static const struct llama shapes[] = { /* the third one's products add in several parts */
        {.context = 14, .L = 2, .D = 12, .F = 10, .H = 2, .G = 1, .d = 6, .V = 11},
        {.context = 9, .L = 1, .D = 40, .F = 35, .H = 4, .G = 2, .d = 10, .V = 33},
        {.context = 9, .L = 1, .D = 12, .F = 300, .H = 2, .G = 2, .d = 6, .V = 270},
        {.context = 1200, .L = 1, .D = 4, .F = 5, .H = 2, .G = 2, .d = 2, .V = 7}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct llama a = shapes[i];
        a.bos = a.eos = -1;
        a.eps = 1e-5f;
        a.theta = 1000;
        test_differences(&a, 0);
        test_differences(&a, 1);
    }
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        test_golden(cases[i], goldens, blobs);
    test_steps(goldens, blobs);
    test_update(0);
    test_update(0.5f);
    test_trainer();
}

int main(int argc, char **argv) {
    int quick = argc == 4 && strcmp(argv[3], "--quick") == 0;
    if (argc != 3 && !quick) {
        fprintf(stderr, "use: test_train GOLDENS BLOBS [--quick]\n");
        return 2;
    }
    for (int i = 0; !quick && i <= simd_level(); i++) {
        set_variable("LVM_ISA", simd_kernels[i]->name);
        test_kernels(argv[1], argv[2]);
    }
    if (quick) test_kernels(argv[1], argv[2]);
    test_rates();
    printf("gradients are within %.1e of PyTorch's and %.1e of differences, losses of ten steps "
           "within %.1e\n", worst_of_goldens, worst_of_differences, worst_of_steps);
    return checked("train");
}
