/* Reads .npy files (format 1.0, little-endian, C order) for the test drivers. */
#ifndef NPY_H
#define NPY_H

struct npy {
    char type;      /* 'f' float32, 'i' int32, 'u' uint8 */
    int n_dims, dim[4];
    int64_t n;      /* elements */
    void *data;     /* NULL when the file is absent */
};

static const float *npy_f32(const struct npy *a) { return a->data; }
static const int32_t *npy_i32(const struct npy *a) { return a->data; }

static void npy_free(struct npy *a) {
    free(a->data);
    memset(a, 0, sizeof *a);
}

static void npy_fault(const char *path) {
    fprintf(stderr, "%s: not a .npy file that the tests can read\n", path);
    exit(2);
}

/* Loads folder/name.npy; an absent file leaves data NULL, a strange one ends the test. */
static struct npy npy_load(const char *folder, const char *name) {
    struct npy a = {0};
    char path[1024], header[4096] = {0};
    unsigned char head[10];
    snprintf(path, sizeof path, "%s/%s.npy", folder, name);
    FILE *f = fopen(path, "rb");
    if (f == NULL) return a;
    if (fread(head, 1, 10, f) != 10 || memcmp(head, "\x93NUMPY\x01", 7) != 0) npy_fault(path);
    size_t n = head[8] | (size_t)head[9] << 8;
    if (n >= sizeof header || fread(header, 1, n, f) != n) npy_fault(path);
    if (strstr(header, "'fortran_order': False") == NULL) npy_fault(path);
    a.type = strstr(header, "'<f4'") ? 'f' : strstr(header, "'<i4'") ? 'i' : strstr(header, "'|u1'") ? 'u' : 0;
    const char *p = strstr(header, "'shape': (");
    if (a.type == 0 || p == NULL) npy_fault(path);
    a.n = 1;
    for (p += 10; *p != ')' && *p != 0;) {
        if (*p >= '0' && *p <= '9') {
            if (a.n_dims == 4) npy_fault(path);
            a.dim[a.n_dims] = (int)strtol(p, (char **)&p, 10);
            a.n *= a.dim[a.n_dims++];
        } else {
            p++;
        }
    }
    size_t bytes = (size_t)a.n * (a.type == 'u' ? 1 : 4);
    a.data = malloc(bytes + 1);
    if (a.data == NULL || fread(a.data, 1, bytes, f) != bytes) npy_fault(path);
    fclose(f);
    return a;
}
#endif
