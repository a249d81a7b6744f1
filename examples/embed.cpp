// embed.cpp - lvm inside a C++11 program: lvm.c is compiled as C, its first part is the header.
//
//     cc -O2 -ffp-contract=off -DLVM_NO_MAIN -c lvm.c
//     c++ -std=c++11 -O2 -o embed_cpp examples/embed.cpp lvm.o -lm -lpthread
//     ./embed_cpp weights.bin prompt/01.png prompt/02.png prompt/03.png
//
// Predicts the next image, two candidates of it: out-1a.png and out-1b.png.
#define LVM_API_ONLY
#include "../lvm.c"
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <vector>

struct Closer {
    void operator()(lvm_model *model) const { lvm_close(model); }
    void operator()(lvm_ctx *ctx) const { lvm_ctx_free(ctx); }
};
using Model = std::unique_ptr<lvm_model, Closer>;
using Context = std::unique_ptr<lvm_ctx, Closer>;

// Images that lvm filled, empty ones included.
struct Images {
    std::vector<lvm_image> all;
    explicit Images(size_t n) : all(n) {}
    Images(const Images &) = delete;
    Images &operator=(const Images &) = delete;
    ~Images() {
        for (lvm_image &image : all) lvm_image_free(&image);
    }
    int size() const { return static_cast<int>(all.size()); }
};

static void check(bool good, const lvm_error &error) {
    if (!good) throw std::runtime_error(error.text);
}

static void run(const char *weights, const std::vector<const char *> &files) {
    lvm_error error;
    Model model(lvm_open(weights, 0, &error));
    check(model != nullptr, error);
    Context ctx(lvm_ctx_new(model.get(), nullptr, &error)); // is freed before its model
    check(ctx != nullptr, error);

    Images prompt(files.size()), answers(2);
    for (size_t i = 0; i < files.size(); i++)
        check(lvm_image_load(files[i], &prompt.all[i], &error) == LVM_OK, error);

    lvm_sampling sampling = lvm_default_sampling();
    sampling.top_p = 0.9f;
    check(lvm_predict(ctx.get(), prompt.all.data(), prompt.size(), &sampling, answers.size(), 1,
                      answers.all.data(), &error) == LVM_OK, error);

    const char *const names[] = {"out-1a.png", "out-1b.png"};
    for (size_t i = 0; i < answers.all.size(); i++) {
        check(lvm_image_save(names[i], &answers.all[i], &error) == LVM_OK, error);
        std::cout << names[i] << '\n';
    }
}

int main(int argc, char **argv) {
    if (argc < 3) {
        std::cerr << "usage: embed_cpp WEIGHTS IMAGE...\n";
        return 2;
    }
    try {
        run(argv[1], std::vector<const char *>(argv + 2, argv + argc));
    } catch (const std::exception &fault) {
        std::cerr << "embed_cpp: " << fault.what() << '\n';
        return 1;
    }
}
