#!/usr/bin/env python3
"""embed.py - lvm from Python: ctypes on the shared library, the standard library alone.

    make liblvm.so
    python3 examples/embed.py weights.bin prompt/01.png prompt/02.png prompt/03.png

Turns images into token ids, continues them by the tokens of one more image, shows these and
writes the image they stand for: out.png.
"""
import ctypes
import os
import sys

LIBRARY = os.environ.get("LVM_LIBRARY") or os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "liblvm.so")


# The structs of lvm.h, field by field.
class Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("text", ctypes.c_char * 240)]


class Image(ctypes.Structure):
    _fields_ = [("width", ctypes.c_int), ("height", ctypes.c_int),
                ("rgb", ctypes.POINTER(ctypes.c_uint8)), ("orientation", ctypes.c_int)]


class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in (
        "has_transformer has_tokenizer context_length vocab_size codes bos eos layers width "
        "feed_forward heads kv_heads resolution tokens_per_image window_images").split()] + [
        ("parameters", ctypes.c_int64), ("name", ctypes.c_char_p), ("isa", ctypes.c_char_p),
        ("device", ctypes.c_char_p)]


class Sampling(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint32), ("temperature", ctypes.c_float),
                ("top_p", ctypes.c_float), ("top_k", ctypes.c_int), ("greedy", ctypes.c_int),
                ("seed", ctypes.c_uint64), ("user", ctypes.c_void_p),
                ("choose", ctypes.c_void_p), ("log_likelihood", ctypes.POINTER(ctypes.c_double))]


def load_library(path):
    lvm = ctypes.CDLL(path)
    p, n, error = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Error)
    ids, image, sampling = (ctypes.POINTER(t) for t in (ctypes.c_int32, Image, Sampling))
    for name, result, arguments in (
            ("lvm_open", p, [ctypes.c_char_p, n, error]),
            ("lvm_close", None, [p]),
            ("lvm_model_info", Info, [p]),
            ("lvm_ctx_new", p, [p, p, error]),
            ("lvm_ctx_free", None, [p]),
            ("lvm_default_sampling", Sampling, []),
            ("lvm_encode", n, [p, image, n, ids, error]),
            ("lvm_prompt", n, [p, ids, n, p, error]),
            ("lvm_generate", n, [p, sampling, n, n, ids, error]),
            ("lvm_decode", n, [p, ids, n, image, error]),
            ("lvm_image_load", n, [ctypes.c_char_p, image, error]),
            ("lvm_image_save", n, [ctypes.c_char_p, image, error]),
            ("lvm_image_free", None, [image])):
        function = getattr(lvm, name)
        function.restype, function.argtypes = result, arguments
    return lvm


class Lvm:
    """A model and a context; a call that fails raises RuntimeError with lvm's own words."""

    def __init__(self, weights):
        self.lvm, self.error, self.model, self.ctx = load_library(LIBRARY), Error(), None, None
        self.model = self.made(self.lvm.lvm_open(os.fsencode(weights), 0, self.error))
        self.info = self.lvm.lvm_model_info(self.model)
        self.ctx = self.made(self.lvm.lvm_ctx_new(self.model, None, self.error))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.lvm.lvm_ctx_free(self.ctx)
        self.lvm.lvm_close(self.model)
        self.model = self.ctx = None

    def made(self, pointer):
        if not pointer:
            self.close()
            raise RuntimeError(self.error.text.decode("utf-8", "replace"))
        return pointer

    def check(self, code):
        if code:
            raise RuntimeError(self.error.text.decode("utf-8", "replace"))

    def encode(self, path):
        """The token ids of an image file."""
        image, ids = Image(), (ctypes.c_int32 * self.info.tokens_per_image)()
        self.check(self.lvm.lvm_image_load(os.fsencode(path), image, self.error))
        try:
            self.check(self.lvm.lvm_encode(self.ctx, image, 1, ids, self.error))
        finally:
            self.lvm.lvm_image_free(image)
        return list(ids)

    def predict(self, images, seed=1):
        """The token ids of the image that follows these, the last of which count."""
        prompt = [self.info.bos] if self.info.bos >= 0 else []
        for ids in images[-(self.info.window_images - 1):]:
            prompt += ids
        sampling, n = self.lvm.lvm_default_sampling(), self.info.tokens_per_image
        sampling.seed = seed
        answer, given = (ctypes.c_int32 * n)(), (ctypes.c_int32 * len(prompt))(*prompt)
        self.check(self.lvm.lvm_prompt(self.ctx, given, len(prompt), None, self.error))
        self.check(self.lvm.lvm_generate(self.ctx, sampling, 1, n, answer, self.error))
        return list(answer)

    def decode(self, ids, path):
        """Writes the image that the ids stand for."""
        image = Image()
        given = (ctypes.c_int32 * len(ids))(*ids)
        self.check(self.lvm.lvm_decode(self.ctx, given, 1, image, self.error))
        try:
            self.check(self.lvm.lvm_image_save(os.fsencode(path), image, self.error))
        finally:
            self.lvm.lvm_image_free(image)


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: embed.py WEIGHTS IMAGE...")
    try:
        with Lvm(sys.argv[1]) as lvm:
            ids = lvm.predict([lvm.encode(path) for path in sys.argv[2:]])
            print(*ids)
            lvm.decode(ids, "out.png")
            print("out.png")
    except (OSError, RuntimeError) as fault:
        sys.exit("embed.py: %s" % fault)


if __name__ == "__main__":
    main()
