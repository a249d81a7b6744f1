/* What a device's own file gets of lvm.c: compiled by CI as C++17 and, where nvcc is, as CUDA, never
   run. It uses every helper of LVM_INTERNAL, so that none can stop being C++. */
#define LVM_INTERNAL
#include "../lvm.c"

static int my_open(const lvm_model *m, const char *device, void **copy, lvm_error *error) {
    const struct tensor *t = m->specs[0].tensor;
    struct batch b = {};
    struct continuation c = {};
    lvm_options o = lvm_default_options();
    *copy = nullptr;
    if (floats(t) == nullptr || tensor_row(t, 1) == nullptr || type_is_quantised(t->type) ||
        f16_to_f32(f32_to_f16(1)) < bf16_to_f32(f32_to_bf16(1)) || m->llama.layers == nullptr)
        return fail(error, LVM_UNSUPPORTED, "%s: %s", device, type_info(t->type)->name);
    if (check_finite(&m->llama.eps, 1, device, 1, error) != LVM_OK) return LVM_FORMAT;
    return report(&o, "open", min64(b.n, 1), max64(round_up((int)type_bytes(1, 2), 2), c.n), error);
}

const struct backend *my_backend(void);
const struct backend *my_backend(void) {
    static struct backend b;
    b.size = sizeof b;
    b.version = BACKEND_VERSION;
    b.model_open = my_open;
    return &b;
}
