#!/usr/bin/env python3
"""Makes tests/images: small PNG, JPEG and PNM files, and in index.txt what a correct reader, writer
and resizer gives for them. The reference is Pillow 12.1 with libjpeg-turbo 3.0.1 or later inside,
the last release that resizes tall images in the order of all older ones; cjpeg is needed too. Made
with Pillow 12.1.1, its libjpeg-turbo 3.1.3, and cjpeg of libjpeg-turbo 2.1.5. The files are
committed, so running the tests needs none of them.

    pip install "pillow==12.1.*"
    python3 tests/make_image_vectors.py

Lines of index.txt:
    load FILE WIDTH HEIGHT HASH          HASH: FNV-1a 64 of the RGB bytes after convert('RGB')
    upright FILE N WIDTH HEIGHT HASH     EXIF orientation N; the image after exif_transpose
    turn FILE N                          a JPEG whose segments tell orientation N (0: none)
    bad FILE CODE TEXT                   loading fails with this code and TEXT in the message
    resize KIND W H NEW_W NEW_H HASH     formula image, resized with BICUBIC
    crop KIND W H R HASH                 formula image, short side resized to R, the middle cut out
    size KIND W H BYTES                  formula image, saved by Pillow at compress_level 6

The formula images (tests/test_images.c has the same in C), where lcg() steps the generator
s = s * 1664525 + 1013904223 mod 2^32 from s = 65537 w + h and gives s >> 24:
    noise      every byte lcg()
    gradient   255 x / max(w - 1, 1), 255 y / max(h - 1, 1), 255 (x + y) / max(w + h - 2, 1)
    grain      gradient + (lcg() & 7), at most 255
    blocks     16 x 16 pixels of one colour: with v = (x/16 * 73856093 xor y/16 * 19349663)
               * 2654435761 mod 2^32, the bytes v >> 24, v >> 16, v >> 8
    flat       200, 100, 50
"""
import io
import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib

import PIL
from PIL import Image, ImageOps, features

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "images")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16),
          RGBA: (8, 16)}
NAMES = {GREY: "grey", RGB: "rgb", PALETTE: "palette", GREY_ALPHA: "grey_alpha", RGBA: "rgba"}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))
index = []


def fnv(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return "%016x" % h


# ---- Formula images

def lcg_bytes(w, h):
    s = (65537 * w + h) & 0xFFFFFFFF
    out = bytearray(w * h * 3)
    for i in range(len(out)):
        s = (s * 1664525 + 1013904223) & 0xFFFFFFFF
        out[i] = s >> 24
    return out


def gradient(w, h):
    return bytes(v for y in range(h) for x in range(w)
                 for v in (255 * x // max(w - 1, 1), 255 * y // max(h - 1, 1),
                           255 * (x + y) // max(w + h - 2, 1)))


def blocks(w, h):
    out = bytearray()
    for y in range(h):
        for x in range(w):
            v = ((x // 16 * 73856093) ^ (y // 16 * 19349663)) * 2654435761 & 0xFFFFFFFF
            out += bytes((v >> 24, v >> 16 & 255, v >> 8 & 255))
    return bytes(out)


def grain(w, h):
    return bytes(min(255, a + (b & 7)) for a, b in zip(gradient(w, h), lcg_bytes(w, h)))


FORMULAS = {"noise": lambda w, h: bytes(lcg_bytes(w, h)), "gradient": gradient, "grain": grain,
            "blocks": blocks, "flat": lambda w, h: bytes((200, 100, 50)) * (w * h)}


def formula(kind, w, h):
    return Image.frombytes("RGB", (w, h), FORMULAS[kind](w, h))


# ---- PNG files by hand

def chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def header(w, h, colour, depth=8, compression=0, filtering=0, interlace=0):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, compression, filtering,
                                      interlace))


END = chunk(b"IEND", b"")


def paeth(a, b, c):
    p = a + b - c
    return min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]


def filter_rows(w, h, colour, pixels, choose, depth=8):
    """Rows with their filter byte; choose(y) is the filter of row y."""
    n, step = (w * CHANNELS[colour] * depth + 7) // 8, max(1, CHANNELS[colour] * depth // 8)
    above, out = bytes(n), bytearray()
    for y in range(h):
        row, kind = pixels[y * n:(y + 1) * n], choose(y)
        out.append(kind)
        for i in range(n):
            a = row[i - step] if i >= step else 0
            b = above[i]
            c = above[i - step] if i >= step else 0
            guess = (0, a, b, (a + b) // 2, paeth(a, b, c))[kind]
            out.append(row[i] - guess & 255)
        above = row
    return bytes(out)


def deflate(raw, level=6, window=15, strategy=zlib.Z_DEFAULT_STRATEGY):
    z = zlib.compressobj(level, zlib.DEFLATED, window, 9, strategy)
    return z.compress(raw) + z.flush()


def png(w, h, colour, packed, before=b"", after=b""):
    return SIGNATURE + header(w, h, colour) + before + chunk(b"IDAT", packed) + after + END


def sample(rng, w, h, colour, colours=256):
    """Pixels with some order in them, so that every filter and match length occurs."""
    n = w * h * CHANNELS[colour]
    if colour == PALETTE:
        return bytes((i // 7 + rng.randrange(3)) % colours for i in range(n))
    return bytes((i * 5 // 3 + (i // (w + 1)) * 9 + rng.randrange(5)) & 255 for i in range(n))


def good(name, data):
    with open(os.path.join(HERE, name), "wb") as f:
        f.write(data)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    index.append("load %s %d %d %s" % (name, image.width, image.height, fnv(image.tobytes())))


def whole(name, data, like):
    """All pixels of the file `like` are there, so it is the same image, also where Pillow is
    stricter."""
    with open(os.path.join(HERE, name), "wb") as f:
        f.write(data)
    line = next(line for line in index if line.startswith("load %s " % like))
    index.append(line.replace(like, name))
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError):
        return
    assert line.endswith(" " + fnv(image.tobytes()))


def bad(name, data, code, text):
    with open(os.path.join(HERE, name), "wb") as f:
        f.write(data)
    index.append("bad %s %s %s" % (name, code, text))


def make_good():
    rng = random.Random(7)
    colours = bytes(rng.randrange(256) for _ in range(768))
    plte, plte5 = chunk(b"PLTE", colours), chunk(b"PLTE", colours[:15])
    for colour, name in NAMES.items():
        before = plte if colour == PALETTE else b""
        for filtering in range(5):
            raw = filter_rows(13, 9, colour, sample(rng, 13, 9, colour), lambda y: filtering)
            good("%s_filter%d.png" % (name, filtering), png(13, 9, colour, deflate(raw), before))
        raw = filter_rows(31, 23, colour, sample(rng, 31, 23, colour), lambda y: y * 3 % 5)
        good("%s_mixed.png" % name, png(31, 23, colour, deflate(raw), before))

    def one(colour, w=19, h=11, colours=256):
        return filter_rows(w, h, colour, sample(rng, w, h, colour, colours), lambda y: y % 5)

    good("palette_short.png", png(19, 11, PALETTE, deflate(one(PALETTE, colours=5)), plte5))
    good("palette_trns.png", png(19, 11, PALETTE, deflate(one(PALETTE)),
                                 plte + chunk(b"tRNS", bytes(range(0, 250, 5)))))
    good("palette_trns_one.png", png(19, 11, PALETTE, deflate(one(PALETTE)),
                                     plte + chunk(b"tRNS", b"\xff\xff\x00")))
    good("grey_trns.png", png(19, 11, GREY, deflate(one(GREY)), chunk(b"tRNS", b"\0\x21")))
    good("rgb_trns.png", png(19, 11, RGB, deflate(one(RGB)), chunk(b"tRNS", b"\0\1\0\2\0\3")))
    good("rgb_plte.png", png(19, 11, RGB, deflate(one(RGB)), plte))
    good("pixel.png", png(1, 1, RGB, deflate(b"\0\1\2\3")))
    good("tall.png", png(1, 300, GREY, deflate(one(GREY, 1, 300))))
    good("wide.png", png(300, 1, RGBA, deflate(one(RGBA, 300, 1))))
    make_streams(rng, one)


def make_streams(rng, one):
    """Legal ways to cut and compress the data."""
    raw = one(RGB)
    packed = deflate(raw)
    cut = b"".join(chunk(b"IDAT", packed[i:i + 1]) for i in range(len(packed)))
    good("idat_bytes.png", SIGNATURE + header(19, 11, RGB) + cut + END)
    cut = chunk(b"IDAT", b"") + chunk(b"IDAT", packed[:99]) + chunk(b"IDAT", b"")
    cut += chunk(b"IDAT", packed[99:])
    good("idat_empty.png", SIGNATURE + header(19, 11, RGB) + cut + END)
    good("idat_tail.png", png(19, 11, RGB, packed + b"behind the stream"))
    good("file_tail.png", png(19, 11, RGB, packed) + b"behind the end")
    good("other_chunks.png", png(19, 11, RGB, packed, chunk(b"gAMA", b"\0\0\xb1\x8f") +
                                 chunk(b"tEXt", b"Title\0x") + chunk(b"prVt", b"123"),
                                 chunk(b"tEXt", b"Comment\0y")))
    good("deflate_stored.png", png(19, 11, RGB, deflate(raw, 0)))
    good("deflate_fixed.png", png(19, 11, RGB, deflate(raw, 6, 15, zlib.Z_FIXED)))
    good("deflate_huffman.png", png(19, 11, RGB, deflate(raw, 6, 15, zlib.Z_HUFFMAN_ONLY)))
    good("deflate_rle.png", png(19, 11, RGB, deflate(raw, 6, 15, zlib.Z_RLE)))
    good("deflate_window.png", png(19, 11, RGB, deflate(raw, 9, 9)))
    raw = b"\0" + bytes(600)
    good("deflate_flat.png", png(200, 3, RGB, deflate(raw * 3)))
    steep = bytes(b for i in range(1, 15) for b in bytes([i]) * max(1, 5000 >> i))
    steep = bytes(rng.sample(steep, len(steep)))[:4900]
    raw = b"".join(b"\0" + steep[i * 70:i * 70 + 70] for i in range(70))
    good("deflate_long_codes.png", png(70, 70, GREY, deflate(raw, 6, 15, zlib.Z_HUFFMAN_ONLY)))
    z = zlib.compressobj(6)
    parts = b"".join(z.compress(raw[i:i + 500]) + z.flush(zlib.Z_FULL_FLUSH)
                     for i in range(0, len(raw), 500))
    good("deflate_blocks.png", png(70, 70, GREY, parts + z.flush()))
    for kind in ("grain", "blocks"):
        out = io.BytesIO()
        formula(kind, 64, 48).save(out, "PNG", optimize=True)
        good("pillow_%s.png" % kind, out.getvalue())


# ---- Other depths, interlacing

def pack(w, h, colour, depth, samples):
    """Rows of samples [h][w][channels] as PNG stores them; spare bits are ones."""
    n, out = w * CHANNELS[colour], bytearray()
    for y in range(h):
        bits = "".join(format(v, "0%db" % depth) for v in samples[y * n:(y + 1) * n])
        bits += "1" * (-len(bits) % 8)
        out += bytes(int(bits[i:i + 8], 2) for i in range(0, len(bits), 8))
    return bytes(out)


def rows_of(w, h, colour, depth, samples, interlaced):
    """All rows with their filters, in the order of the file."""
    step, out = CHANNELS[colour], b""
    for x, y, dx, dy in ADAM7 if interlaced else ((0, 0, 1, 1),):
        xs, ys = range(x, w, dx), range(y, h, dy)
        part = [v for j in ys for i in xs for v in samples[(j * w + i) * step:][:step]]
        if part:
            packed = pack(len(xs), len(ys), colour, depth, part)
            out += filter_rows(len(xs), len(ys), colour, packed, lambda j: (j + x) % 5, depth)
    return out


def any_png(rng, w, h, colour, depth, interlaced, before=b"", after=b""):
    most = (1 << depth) - 1
    n = w * h * CHANNELS[colour]
    samples = [(i * most // n + rng.randrange(most // 4 + 2)) & most for i in range(n)]
    if colour == GREY and depth == 16:   # Pillow cuts at 255: most of the values below that
        samples = [v >> 7 if i % 9 else v for i, v in enumerate(samples)]
    if colour == PALETTE:
        plte = chunk(b"PLTE", bytes(rng.randrange(256) for _ in range(3 * (most + 1))))
        before = plte + before
    raw = rows_of(w, h, colour, depth, samples, interlaced)
    return (SIGNATURE + header(w, h, colour, depth, interlace=interlaced) + before +
            chunk(b"IDAT", deflate(raw)) + after + END)


def make_depths():
    rng = random.Random(13)
    kinds = [(colour, depth) for colour in DEPTHS for depth in DEPTHS[colour]]
    for colour, depth in kinds:
        name = "%s%d" % (NAMES[colour], depth)
        if depth != 8:
            good(name + ".png", any_png(rng, 19, 11, colour, depth, 0))
        good(name + "_adam7.png", any_png(rng, 21, 18, colour, depth, 1))
    for w in range(1, 10):
        for h in range(1, 10):
            colour, depth = kinds[(w * 4 + h) % len(kinds)]
            if colour == PALETTE and depth == 8:
                colour = RGB
            good("adam7_%d_%d.png" % (w, h), any_png(rng, w, h, colour, depth, 1))
    good("interlaced.png", any_png(rng, 3, 2, GREY, 8, 1))
    good("one_bit.png", any_png(rng, 3, 2, GREY, 1, 0))
    good("sixteen_bit.png", any_png(rng, 3, 2, RGB, 16, 0))
    for colour, depth, clear in ((GREY, 1, 1), (GREY, 2, 1), (GREY, 4, 1), (GREY, 16, 200)):
        good("grey%d_trns.png" % depth, any_png(rng, 9, 7, colour, depth, 0,
                                                chunk(b"tRNS", struct.pack(">H", clear))))
    good("palette2_trns.png", any_png(rng, 9, 7, PALETTE, 2, 1, chunk(b"tRNS", b"\0\x80\xff")))
    good("rgb16_trns.png", any_png(rng, 9, 7, RGB, 16, 1, chunk(b"tRNS", bytes(6))))
    good("gamma.png", any_png(rng, 9, 7, RGB, 8, 0, chunk(b"gAMA", struct.pack(">I", 100000)) +
                              chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000,
                                                         60000, 15000, 6000)) +
                              chunk(b"sBIT", b"\5\6\5") + chunk(b"bKGD", bytes(6))))


# ---- PNM

def make_pnm():
    rng = random.Random(17)

    def some(n, most):
        return [rng.choice((0, most, rng.randint(0, most), rng.randint(0, min(most, 300))))
                for _ in range(n - 1)] + [min(most, 7)]   # no beginning of the last digit is left

    def plain(name, kind, w, h, most):
        values = some(w * h * (3 if kind == 3 else 1), most)
        text = " ".join(map(str, values)) if kind > 1 else "".join(map(str, values))
        head = "P%d\n%d %d\n" % (kind, w, h) + ("%d\n" % most if kind > 1 else "")
        good(name, (head + text).encode())

    def raw(name, kind, w, h, most, head=None):
        values = some(w * h * (3 if kind == 6 else 1), most)
        data = b"".join(struct.pack(">H" if most > 255 else ">B", v) for v in values)
        good(name, (head or b"P%d\n%d %d\n%d\n" % (kind, w, h, most)) + data)

    plain("plain.pbm", 1, 13, 5, 1)
    good("plain_comments.pbm", b"P1 #c 1 0\n3 2 1 0\t1\n#1 1\r0 0#0\n1")
    good("raw.pbm", b"P4\n13 5\n" + bytes(rng.randrange(256) for _ in range(10)))
    for most in (1, 3, 100, 255, 510, 65535):
        plain("plain_%d.pgm" % most, 2, 7, 5, most)
        plain("plain_%d.ppm" % most, 3, 5, 4, most)
        raw("raw_%d.pgm" % most, 5, 7, 5, most)
        raw("raw_%d.ppm" % most, 6, 5, 4, most)
    good("plain_halves.ppm", b"P3 171 1 510\n" + b" ".join(b"%d" % v for v in range(505)) +
         b" 505 506 507 508 509 510 0 7")
    good("plain_halves.pgm", b"P2 31 1 30\n" + b" ".join(b"%d" % v for v in range(30)) + b" 7")
    good("raw_above.pgm", b"P5 5 1 100 " + bytes((0, 100, 101, 200, 255)))
    good("raw_above.ppm", b"P6 1 1 1000 " + struct.pack(">3H", 1000, 1001, 65535))
    good("raw_blank.pgm", b"P5\n3 2\n255\n" + b"\n# 1\t\r")
    raw("raw_comments.ppm", 6, 12, 3, 255,
        b"P6 # width\n#\r1#in a number\n2\v3#height\n\f# most\n00255#\n ")
    good("plain_comments.ppm", b"P3 #x\n1\n1#\n 255#\n\n1#2\n2 # 3\r4\t\n#\n7")
    good("kind.ppm", b"P6\n2 2\n255\n" + bytes(range(12)))
    make_bad_pnm()


def make_bad_pnm():
    def pnm(name, data, text):
        bad(name, data, "FORMAT", text)

    pnm("no_width.ppm", b"P6\n", "its width: the file ends early")
    pnm("no_maximum.pgm", b"P5 3 2 #", "its maximum: the file ends early")
    pnm("width_word.ppm", b"P6\nwide 2\n255\n", "its width: not a number")
    pnm("height_minus.ppm", b"P6\n3 -2\n255\n" + bytes(18), "its height: not a number")
    pnm("width_long.pgm", b"P5 00000000003 2 255\n" + bytes(6), "its width: a number too long")
    pnm("maximum_zero.ppm", b"P6 3 2 0\n" + bytes(18), "its maximum is 0: must be 1 to 65535")
    pnm("maximum_over.ppm", b"P6 3 2 65536\n" + bytes(36), "its maximum is 65536")
    pnm("zero_width.pgm", b"P5 0 2 255\n", "a PNM image of 0 x 2 pixels")
    pnm("zero_height.pbm", b"P1 2 0\n", "a PNM image of 2 x 0 pixels")
    pnm("large.ppm", b"P6 16384 16385 255\n", "16384 x 16385 pixels: must be 1 to 2^28")
    pnm("huge.pbm", b"P4 9999999999 9999999999\n", "9999999999 x 9999999999 pixels")
    pnm("bomb.pgm", b"P2 16384 16384 255\n0 0", "3 bytes of data cannot hold 16384 x 16384")
    pnm("short.pbm", b"P4 9 2\n123", "is cut off: 3 bytes of data cannot hold 9 x 2 pixels")
    pnm("short.pgm", b"P5 3 2 256\n" + bytes(11), "11 bytes of data cannot hold 3 x 2 pixels")
    pnm("short.ppm", b"P6 3 2 255\n" + bytes(17), "17 bytes of data cannot hold 3 x 2 pixels")
    pnm("plain_short.pbm", b"P1 2 2\n1 0 1 ", "row 1: the file ends early")
    pnm("plain_short.pgm", b"P2 2 2 99\n11 10 11 ", "row 1: the file ends early")
    pnm("plain_two.pbm", b"P1 2 2\n1021", "row 1: neither 0 nor 1")
    pnm("plain_over.pgm", b"P2 2 2 99\n0 99 100 0\n", "row 1: a sample above the maximum")
    pnm("plain_word.ppm", b"P3 1 1 99\n1 x 3", "row 0: not a number")


# ---- EXIF orientation

def tiff(value, order="<", kind=3, count=1, offset=None, entries=None, front=0, tag=0x112):
    """A TIFF file whose directory names the orientation behind `front` other entries."""
    packed = struct.pack(order + "HHI", tag, kind, count)
    packed += struct.pack(order + ("H2x" if kind == 3 else "I"), value)
    other = struct.pack(order + "HHIHxx", 0x128, 3, 1, 2) * front
    n = 1 + front if entries is None else entries
    return ((b"II*\0" if order == "<" else b"MM\0*") +
            struct.pack(order + "I", 8 if offset is None else offset) +
            struct.pack(order + "H", n) + other + packed + bytes(4))


def make_exif():
    rng = random.Random(19)

    def upright(name, n, exif, late=False):
        part = chunk(b"eXIf", exif)
        data = any_png(rng, 5, 3, RGB, 8, 0, b"" if late else part, part if late else b"")
        with open(os.path.join(HERE, name), "wb") as f:
            f.write(data)
        image = Image.open(io.BytesIO(data))
        image.load()
        if n:
            assert image.getexif()[0x112] == n
            image = ImageOps.exif_transpose(image)
        index.append("upright %s %d %d %d %s" % (name, n, image.width, image.height,
                                                 fnv(image.convert("RGB").tobytes())))

    for n in range(1, 9):
        upright("exif_%d.png" % n, n, tiff(n, "<>"[n % 2], front=n % 3), n > 4)
    upright("exif_long.png", 6, tiff(6, ">", 4))
    for name, exif in (("nine", tiff(9)), ("zero", tiff(0)), ("text", tiff(6, kind=2)),
                       ("pair", tiff(6, count=2)), ("other", tiff(6, tag=0x113)),
                       ("far", tiff(6, offset=0xFFFFFFFF)), ("edge", tiff(6, offset=25)),
                       ("none", tiff(6, entries=0)), ("cut", tiff(6, entries=65535)[:21]),
                       ("behind", tiff(6, ">", front=1, entries=1)), ("short", tiff(6)[:7]),
                       ("magic", b"II+\0" + tiff(6)[4:])):
        upright("exif_%s.png" % name, 0, exif)

    def turn(name, n, segments):
        out = io.BytesIO()
        formula("flat", 1, 1).save(out, "JPEG")
        data = out.getvalue()[:2] + segments + out.getvalue()[2:]
        with open(os.path.join(HERE, name), "wb") as f:
            f.write(data)
        if n:
            assert Image.open(io.BytesIO(data)).getexif()[0x112] == n
        index.append("turn %s %d" % (name, n))

    def segment(marker, data, size=None):
        return b"\xff" + bytes([marker]) + struct.pack(">H", size or len(data) + 2) + data

    exif, xmp = b"Exif\0\0", segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0")
    turn("turn_little.jpg", 6, segment(0xE1, exif + tiff(6)))
    turn("turn_big.jpg", 8, segment(0xE1, exif + tiff(8, ">", front=2)))
    turn("turn_behind.jpg", 3, segment(0xFE, b"hello") + xmp + b"\xff\xff" +
         segment(0xE1, exif + tiff(3, ">", 4)))
    turn("turn_none.jpg", 0, xmp)
    turn("turn_nine.jpg", 0, segment(0xE1, exif + tiff(9)))
    turn("turn_length.jpg", 0, segment(0xE1, exif + tiff(6), 1))
    turn("turn_beyond.jpg", 0, segment(0xE1, exif + tiff(6), 65535))
    turn("turn_scan.jpg", 0, segment(0xDA, b"") + segment(0xE1, exif + tiff(6)))
    turn("turn_short.jpg", 0, segment(0xE1, b"Exif"))


def make_bad():
    raw = bytes((0, 10, 20, 30)) * 2
    packed = deflate(raw)
    idat, head = chunk(b"IDAT", packed), SIGNATURE + header(3, 2, GREY)
    plte = chunk(b"PLTE", bytes(range(9)))
    indexed = SIGNATURE + header(3, 2, PALETTE)
    low = deflate(bytes((0, 0, 1, 2)) * 2)
    f = "FORMAT"

    bad("empty.png", b"", f, "is empty")
    bad("text.png", b"hello, world\n", f, "is text, no image")
    bad("noise.png", b"\0\1\2\3", f, "is no image that lvm knows")
    bad("as_text.png", b"\x89PNG\n\x1a\n" + head[8:] + idat + END, f, "copied as text")
    bad("signature_only.png", SIGNATURE, f, "cut off before its end")
    bad("no_header.png", SIGNATURE + idat + END, f, "no header (IHDR)")
    bad("no_header_cut.png", SIGNATURE + idat[:-6], f, "cut off inside its IDAT")
    bad("short_header.png", SIGNATURE + chunk(b"IHDR", bytes(12)) + idat + END, f, "no header")
    bad("two_headers.png", head + header(3, 2, GREY) + idat + END, f, "a second chunk IHDR")
    bad("zero_width.png", SIGNATURE + header(0, 2, GREY) + idat + END, f, "0 x 2 pixels")
    bad("zero_height.png", SIGNATURE + header(3, 0, GREY) + idat + END, f, "3 x 0 pixels")
    bad("huge.png", SIGNATURE + header(1 << 31, 1 << 31, GREY) + idat + END, f, "1 to 2^28 pixels")
    bad("large.png", SIGNATURE + header(16385, 16384, GREY) + idat + END, f, "1 to 2^28 pixels")
    bad("bomb_most.png", SIGNATURE + header(16384, 16384, GREY) + idat + END, f, "cannot hold")
    bad("bomb_adam7.png", SIGNATURE + header(16384, 16384, GREY, 1, interlace=1) + idat + END, f,
        "cannot hold")
    bad("bomb.png", SIGNATURE + header(16000, 16000, RGB) + idat + END, f, "cannot hold")
    bad("colour_type.png", SIGNATURE + header(3, 2, 5) + idat + END, f, "colour type 5 with 8")
    bad("depth.png", SIGNATURE + header(3, 2, RGB, 4) + idat + END, f, "colour type 2 with 4 bits")
    bad("depth_255.png", SIGNATURE + header(3, 2, RGB, 255) + idat + END, f, "with 255 bits")
    bad("compression.png", SIGNATURE + header(3, 2, GREY, 8, 1) + idat + END, f, "compression 1")
    bad("filter_method.png", SIGNATURE + header(3, 2, GREY, 8, 0, 1) + idat + END, f, "filter 1")
    bad("interlace_9.png", SIGNATURE + header(3, 2, GREY, interlace=9) + idat + END, f,
        "interlace 9")
    bad("no_idat.png", head + END, f, "no pixels (IDAT)")
    bad("empty_idat.png", head + chunk(b"IDAT", b"") + END, f, "no pixels (IDAT)")
    bad("no_end.png", head + chunk(b"IDAT", packed[:6]), f, "cut off before its end (IEND)")
    bad("idat_gap.png", head + chunk(b"IDAT", packed[:5]) + chunk(b"tEXt", b"a\0b") +
        chunk(b"IDAT", packed[5:]) + END, f, "between its IDAT chunks")
    bad("idat_cut.png", head + idat[:-10], f, "cut off inside its IDAT")
    bad("idat_crc.png", head + chunk(b"IDAT", packed, 1) + END, f, "wrong checksum in its IDAT")
    bad("text_crc.png", head + chunk(b"tEXt", b"a\0b", 1) + idat + END, f, "checksum in its tEXt")
    bad("idat_crc_second.png", head + chunk(b"IDAT", packed[:5]) + chunk(b"IDAT", packed[5:], 1) +
        END, f, "wrong checksum in its IDAT")
    bad("chunk_length.png", head + b"\xff\xff\xff\xffIDAT" + packed[:6], f,
        "cut off inside its IDAT")
    bad("chunk_name.png", head + chunk(b"ID\0T", packed) + END, f, "a chunk has no name")
    bad("unknown.png", head + chunk(b"ABCD", b"") + idat + END, f, "an unknown chunk ABCD")
    bad("no_palette.png", indexed + chunk(b"IDAT", low) + END, f, "no palette (PLTE)")
    bad("late_palette.png", indexed + chunk(b"IDAT", low) + plte + END, f, "after the pixels")
    bad("two_palettes.png", indexed + plte + plte + chunk(b"IDAT", low) + END, f, "two palettes")
    bad("odd_palette.png", indexed + chunk(b"PLTE", b"1234") + chunk(b"IDAT", low) + END, f,
        "a palette of 4 bytes")
    bad("long_palette.png", indexed + chunk(b"PLTE", bytes(771)) + chunk(b"IDAT", low) + END, f,
        "a palette of 771 bytes")
    good("palette_beyond.png", indexed + plte + idat + END)   # black, by Pillow
    bad("row_filter.png", png(3, 2, GREY, deflate(raw[:4] + b"\5abc")), f, "row 1 has filter 5")
    adam7 = SIGNATURE + header(3, 2, GREY, interlace=1)   # rows of 1, 1, 1 and 3 pixels
    bad("adam7_filter.png", adam7 + chunk(b"IDAT", deflate(b"\0a\0b\0c\7def")) + END, f,
        "row 1 has filter 7")
    bad("adam7_less.png", adam7 + chunk(b"IDAT", deflate(b"\0a\0b\0c\0de")) + END, f,
        "hold less than the image")
    good("palette1_beyond.png", SIGNATURE + header(3, 2, PALETTE, 1) + chunk(b"PLTE", b"rgb") +
         chunk(b"IDAT", deflate(b"\0\x1f\0\x20")) + END)
    good("palette4_beyond.png", SIGNATURE + header(3, 2, PALETTE, 4, interlace=1) + plte +
         chunk(b"IDAT", deflate(b"\0\x10\0\x20\0\x30\0\x2f\xf0")) + END)
    # 300 MB of pixels or less, but more than 1 GiB on the way there
    bad("decoded.png", SIGNATURE + header(10000, 14000, RGBA, 16) + idat + END, f,
        "takes 1068 MiB to decode: must be at most 1024")
    make_tails(raw, packed)
    make_bad_streams(raw, packed)


def make_tails(raw, packed):
    """What may be wrong behind the last pixel."""
    idat, head = chunk(b"IDAT", packed), SIGNATURE + header(3, 2, GREY)

    def tail(name, data):
        whole("tail_%s.png" % name, data, "tail_none.png")

    def stream(name, data):
        tail(name, head + chunk(b"IDAT", data) + END)

    good("tail_none.png", head + idat + END)
    tail("no_iend", head + idat)
    tail("cut_iend", head + idat + END[:6])
    tail("iend_no_crc", head + idat + END[:-4])
    tail("iend_crc", head + idat + chunk(b"IEND", b"", 1))
    tail("idat_no_crc", head + idat[:-4])
    tail("idat_half", head + idat[:-7])
    tail("idat_no_adler", head + idat[:-8])
    tail("idat_longer", head + b"\xff\xff\xff\xffIDAT" + packed)
    tail("idat_more", head + idat + chunk(b"IDAT", b"abc", 1) + END)
    tail("idat_apart", head + idat + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", b"abc") + END)
    tail("text_crc", head + idat + chunk(b"tEXt", b"a\0b", 1) + END)
    tail("text_cut", head + idat + chunk(b"tEXt", b"a\0b")[:10])
    tail("no_name", head + idat + bytes(30))
    tail("unknown", head + idat + chunk(b"ABCD", b"") + END)
    tail("header", head + idat + header(3, 2, GREY) + END)
    stream("no_adler", packed[:-4])
    stream("half_adler", packed[:-2])
    stream("adler", packed[:-1] + bytes([packed[-1] ^ 1]))
    stream("more", deflate(raw + b"x"))
    stream("more_rows", deflate(raw * 40))
    stream("more_stored", deflate(raw + b"x", 0))
    stream("more_match", deflate(raw + bytes(400)))
    stream("stored_longer", b"\x78\x01\x01\xff\0\0\xff" + raw)
    stream("another_block", b"\x78\x01\x00\x08\x00\xf7\xff" + raw + b"\7\7\7")
    more = b"\0\x0a\0\x1e\0\x14\0\x0a\x14\x1e" + b"gx"
    whole("tail_adam7.png", SIGNATURE + header(3, 2, GREY, interlace=1) +
          chunk(b"IDAT", deflate(more)) + END, "tail_none.png")
    plte = chunk(b"PLTE", bytes(range(9)))
    low = SIGNATURE + header(3, 2, PALETTE) + plte + chunk(b"IDAT", deflate(b"\0\0\1\2" * 2))
    good("tail_palette_none.png", low + END)
    whole("tail_palette.png", low + plte + END, "tail_palette_none.png")


def make_bad_streams(raw, packed):
    def stream(name, data, text):
        bad(name, png(3, 2, GREY, data), "FORMAT", text)

    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = body.compress(raw) + body.flush()
    adler = struct.pack(">I", zlib.adler32(raw))
    stored = b"\x78\x01\x01\x08\x00\xf7\xff" + raw + adler
    damaged, early = "the compressed data are damaged", "the compressed data end early"
    stream("zlib_header.png", b"\x78\x9d" + packed[2:], "no valid zlib header")
    stream("zlib_method.png", b"\x77\x85" + packed[2:], "no valid zlib header")
    stream("zlib_dictionary.png", b"\x78\xbb" + packed[2:], "no valid zlib header")
    stream("zlib_one_byte.png", packed[:1], early)
    stream("zlib_early.png", packed[:5], early)
    stream("zlib_no_end.png", packed[:6], early)
    stream("zlib_less.png", deflate(raw[:-1]), "hold less than the image")
    stream("stored_check.png", stored[:5] + b"\0" + stored[6:], damaged)
    stream("stored_early.png", stored[:9], early)
    stream("block_kind.png", b"\x78\x9c\x07" + body, damaged)
    stream("distance_far.png", b"\x78\x9c" + bits("1 10", "00110000", "0000001", "00001"), damaged)
    stream("distance_30.png", b"\x78\x9c" + bits("1 10", "00110000", "0000001", "11110"), damaged)
    stream("length_286.png", b"\x78\x9c" + bits("1 10", "00110000", "11000110", "00000"), damaged)
    stream("header_counts.png", b"\x78\x9c" + bits("1 01", "11111 00000 0000"), damaged)
    stream("header_over.png", b"\x78\x9c" + bits("1 01", "00000 00000 0000", "100 100 100 100"),
           damaged)
    stream("header_repeat.png", b"\x78\x9c" + bits("1 01", "00000 00000 0000", "100 000 000 100",
                                                   "1"), damaged)


def bits(*groups):
    """Bits in the order in which deflate reads them, and bytes of ones behind."""
    text = "".join(groups).replace(" ", "")
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i:i + 8][::-1], 2) for i in range(0, len(text), 8)) + b"\xff" * 12


def make_kinds():
    def kind(name, data, text):
        bad(name, data + bytes(32), "UNSUPPORTED",
            "is a %s file, which lvm does not read: convert it to PNG or JPEG first" % text)

    kind("kind.gif", b"GIF89a", "GIF")
    kind("kind.webp", b"RIFF\x20\0\0\0WEBPVP8 ", "WebP")
    kind("kind.heic", b"\0\0\0\x18ftypheic", "HEIC")
    kind("kind.avif", b"\0\0\0\x1cftypavif", "AVIF")
    kind("kind.bmp", b"BM\x46\0\0\0", "BMP")
    kind("kind_le.tiff", b"II*\0\x08\0\0\0", "TIFF")
    kind("kind_be.tiff", b"MM\0*\0\0\0\x08", "TIFF")
    kind("kind_big.tiff", b"II+\0\x08\0\0\0", "TIFF")
    kind("kind.jxl", b"\xff\x0a\xfa\x7f", "JPEG XL")
    kind("kind_boxed.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL")
    kind("kind.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000")
    kind("kind.psd", b"8BPS\0\1", "Photoshop")
    kind("kind.pdf", b"%PDF-1.7\n", "PDF")
    kind("kind.pam", b"P7\nWIDTH 2\n", "PAM")
    kind("kind.pfm", b"Pf\n2 2\n-1\n", "PFM")
    kind("kind.svg", b"<svg xmlns=\"\">\n", "SVG")
    bad("kind.txt", "\u00c4pfel\tund Birnen\r\n".encode(), "FORMAT", "is text, no image")


def make_resizes():
    rng = random.Random(11)
    cases = [("noise", 4000, 3000, 256, 256), ("noise", 1, 1, 1, 1), ("noise", 1, 1, 7, 5),
             ("noise", 1, 5000, 256, 256), ("noise", 5000, 1, 256, 256), ("noise", 1, 5000, 1, 1),
             ("noise", 5000, 1, 1, 1), ("noise", 1, 5000, 3, 6000), ("noise", 2, 2, 1, 1),
             ("noise", 64, 64, 64, 64), ("noise", 64, 48, 64, 20), ("noise", 64, 48, 20, 48),
             ("noise", 48, 64, 48, 200), ("noise", 48, 64, 200, 64), ("noise", 640, 480, 256, 256),
             ("noise", 100, 75, 256, 256), ("grain", 257, 255, 256, 256),
             ("gradient", 33, 17, 256, 256), ("blocks", 300, 200, 256, 256)]
    while len(cases) < 60:
        most, new = rng.choice((8, 60, 250)), rng.choice((8, 60, 250))
        cases.append((rng.choice(("noise", "noise", "blocks")), rng.randint(1, most),
                      rng.randint(1, most), rng.randint(1, new), rng.randint(1, new)))
    # Tall ones that Pillow 12.2 turns (more than 100 times as tall as wide), and 13.0 only.
    cases += [("noise", 2, 470, 64, 64), ("noise", 14, 421, 32, 32)]
    for kind, w, h, new_w, new_h in cases:
        out = formula(kind, w, h).resize((new_w, new_h), Image.BICUBIC)
        index.append("resize %s %d %d %d %d %s" % (kind, w, h, new_w, new_h, fnv(out.tobytes())))


def make_crops():
    """torchvision's Resize(R) and CenterCrop(R): the long side cut down to a whole number, the offset
    rounded as Python rounds."""
    for kind, w, h, r in (("noise", 97, 61, 32), ("noise", 61, 97, 32), ("noise", 640, 480, 256),
                          ("noise", 33, 500, 32), ("noise", 7, 5, 32), ("blocks", 300, 299, 256),
                          ("noise", 1, 9, 16), ("gradient", 35, 32, 32), ("noise", 32, 37, 32)):
        long = int(r * max(w, h) / min(w, h))
        size = (long, r) if w > h else (r, long)
        left, top = (int(round((side - r) / 2)) for side in size)
        out = formula(kind, w, h).resize(size, Image.BICUBIC).crop((left, top, left + r, top + r))
        index.append("crop %s %d %d %d %s" % (kind, w, h, r, fnv(out.tobytes())))


def make_sizes():
    for kind in FORMULAS:
        for w, h in ((256, 256), (1, 1), (1, 5000), (5000, 1), (67, 131)):
            out = io.BytesIO()
            formula(kind, w, h).save(out, "PNG", compress_level=6)
            index.append("size %s %d %d %d" % (kind, w, h, len(out.getvalue())))


# ---- JPEG files

def scene(w, h):
    return Image.blend(formula("grain", w, h), formula("blocks", w, h), 0.5)


def cjpeg(image, *options, scans=None):
    data = ("P6 %d %d 255\n" % image.size).encode() + image.convert("RGB").tobytes()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as script:
        if scans:
            script.write("".join(scan + ";\n" for scan in scans))
            script.flush()
            options += ("-scans", script.name)
        return subprocess.run(("cjpeg",) + options, input=data, check=True,
                              stdout=subprocess.PIPE).stdout


def pillow_jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def without(jpeg, marker):
    """The file less the segments with this marker in front of the scan."""
    i = 2
    while jpeg[i + 1] != 0xDA:
        n = 2 + struct.unpack(">H", jpeg[i + 2:i + 4])[0]
        jpeg, i = (jpeg[:i] + jpeg[i + n:], i) if jpeg[i + 1] == marker else (jpeg, i + n)
    return jpeg


def make_jpegs():
    samplings = {"444": "1x1", "422": "2x1", "440": "1x2", "420": "2x2", "411": "4x1",
                 "441": "1x4", "410": "4x2", "311": "3x1", "mixed": "2x2,1x2,2x1",
                 "chroma": "1x1,2x2,1x2"}
    for name, sampling in samplings.items():
        good("s%s.jpg" % name, cjpeg(scene(35, 21), "-sample", sampling))
        good("s%s_prog.jpg" % name, cjpeg(scene(35, 21), "-sample", sampling, "-progressive"))
    for name in ("422", "440", "420"):
        for w, h in ((1, 1), (4, 3), (17, 9)) + ((5, 5), (16, 16), (3, 40)) * (name == "420"):
            good("s%s_%dx%d.jpg" % (name, w, h),
                 cjpeg(scene(w, h), "-sample", samplings[name], "-optimize"))
    for quality in ("1", "5", "100"):   # 1: tables of 16 bits
        good("quality_%s.jpg" % quality, cjpeg(formula("noise", 17, 9), "-quality", quality,
                                               "-optimize"))
    good("grey.jpg", cjpeg(scene(35, 21), "-grayscale", "-sample", "1x1"))
    good("grey_2x2.jpg", cjpeg(scene(35, 21), "-grayscale", "-sample", "2x2", "-optimize"))
    good("grey_prog.jpg", cjpeg(scene(35, 21), "-grayscale", "-progressive"))
    good("restart_1.jpg", cjpeg(scene(70, 35), "-restart", "1B", "-optimize"))
    good("restart_row.jpg", cjpeg(scene(35, 21), "-restart", "1", "-sample", "1x2", "-optimize"))
    good("restart_prog.jpg", cjpeg(scene(35, 21), "-restart", "2B", "-progressive"))
    make_jpeg_colours()
    make_jpeg_scans()
    make_jpeg_wraps()
    make_jpeg_oddities()
    make_bad_jpegs()


def make_jpeg_colours():
    adobe_at = 11
    rgb = cjpeg(scene(35, 21), "-rgb", "-optimize")
    cmyk = pillow_jpeg(scene(35, 21).convert("CMYK"), quality=80, subsampling=2, optimize=True)
    at = cmyk.index(b"Adobe") + adobe_at
    ycck = cmyk[:at] + b"\2" + cmyk[at + 1:]
    good("rgb.jpg", rgb)
    good("rgb_names.jpg", without(rgb, 0xEE))
    good("rgb_coarse.jpg", cjpeg(scene(35, 21), "-rgb", "-optimize", "-sample", "2x2,1x1,2x1"))
    good("cmyk.jpg", cmyk)
    good("cmyk_plain.jpg", without(cmyk, 0xEE))
    good("cmyk_prog.jpg", pillow_jpeg(scene(35, 21).convert("CMYK"), progressive=True))
    good("ycck.jpg", ycck)
    ycc = cjpeg(scene(17, 9), "-optimize")
    for transform in (0, 1, 9):   # JFIF's segment wins over Adobe's
        segment = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
        good("adobe_%d.jpg" % transform, b"\xff\xd8" + segment + without(ycc, 0xE0)[2:])
        good("jfif_adobe_%d.jpg" % transform, b"\xff\xd8" + segment + ycc[2:])
    good("no_jfif.jpg", without(ycc, 0xE0))


def make_jpeg_scans():
    image = scene(40, 35)
    good("scans_sequential.jpg", cjpeg(image, "-optimize", scans=["0", "1", "2"]))
    good("scans_pair.jpg", cjpeg(image, "-optimize", "-sample", "1x2", scans=["0,1", "2"]))
    good("scans_bands.jpg", cjpeg(image, scans=[
        "0: 0-0, 0, 0", "1,2: 0-0, 0, 0", "0: 1-2, 0, 0", "0: 3-63, 0, 0", "2: 1-63, 0, 0",
        "1: 1-8, 0, 0", "1: 9-9, 0, 0", "1: 10-63, 0, 0"]))
    good("scans_bits.jpg", cjpeg(image, "-restart", "3B", "-quality", "95", scans=[
        "0,1,2: 0-0, 0, 3", "0: 1-63, 0, 4", "1: 1-63, 0, 1", "0: 1-63, 4, 3", "0,1,2: 0-0, 3, 2",
        "2: 1-63, 0, 0", "0: 1-63, 3, 2", "0,1,2: 0-0, 2, 1", "0,1,2: 0-0, 1, 0",
        "0: 1-63, 2, 1", "1: 1-63, 1, 0", "0: 1-63, 1, 0"]))
    # Unfinished files, which libjpeg smooths.
    few = ["0,1,2: 0-0, 0, 1", "0: 1-3, 0, 2", "1: 1-63, 0, 0"]
    for name, w, h, sampling, scans in (
            ("dc", 40, 35, "2x2", ["0,1,2: 0-0, 0, 0"]), ("dc_coarse", 9, 70, "1x2", few[:1]),
            ("dc_apart", 33, 40, "2x2", ["0: 0-0, 0, 0", "1: 0-0, 0, 0", "2: 0-0, 0, 0"]),
            ("dc_tall", 16, 100, "1x4", ["0,1,2: 0-0, 0, 0"]), ("some", 40, 35, "1x1", few),
            ("more", 64, 30, "2x2", few + ["0: 1-3, 2, 1", "0: 4-63, 0, 3", "2: 1-6, 0, 1"])):
        good("unfinished_%s.jpg" % name, cjpeg(scene(w, h), "-sample", sampling, scans=scans))


def make_jpeg_wraps():
    """Coefficients beyond what pixels need, by a quantisation table many times as coarse as the
    encoder's: blocks of one row of them (stripes), of one column, of all. Last, a table with zeros:
    coefficients that are not zero before it, and are behind it."""
    stripes = formula("noise", 64, 1).resize((64, 32), Image.NEAREST)
    noise = formula("noise", 64, 32)
    for name, image in (("row", stripes), ("all", Image.blend(stripes, noise, .1)),
                        ("column", formula("noise", 1, 64).resize((32, 64), Image.NEAREST)),
                        ("flat", formula("blocks", 64, 32)), ("zeros", noise)):
        for kind, options in (("", ("-optimize",)), ("_prog", ("-progressive",))):
            data = bytearray(cjpeg(image, "-quality", "90", "-sample", "1x1", *options))
            for table in (0, 1):
                at = data.index(b"\xff\xdb\0\x43" + bytes([table])) + 5
                data[at:at + 64] = bytes(255 - 9 * (i % 7) for i in range(64))
                if name == "zeros":
                    data[at + 2:at + 64:2] = bytes(31)
                    data[at + 35:at + 64] = bytes(29)
            good("wrap_%s%s.jpg" % (name, kind), bytes(data))


def make_jpeg_oddities():
    """What a decoder may find in files that others read without complaint."""
    plain = cjpeg(scene(17, 9))
    frame, data = plain.index(b"\xff\xc0"), plain.index(b"\xff\xda")
    good("exif.jpg", pillow_jpeg(scene(17, 9), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0",
                                 comment=b"a comment", optimize=True))
    good("no_tables.jpg", without(plain, 0xC4))   # a frame of Motion JPEG
    good("junk.jpg", plain[:frame] + b"ab\xff\0c" + plain[frame:-2] + b"d" + plain[-2:])
    # A progressive file whose scans have sent all is whole without its end, whatever stands there.
    sent = cjpeg(scene(17, 9), scans=["0,1,2: 0-0, 0, 0", "0: 1-63, 0, 0", "1: 1-63, 0, 0",
                                      "2: 1-63, 0, 0"])
    good("sent.jpg", sent)
    whole("sent_no_eoi.jpg", sent[:-2], "sent.jpg")
    whole("sent_segment.jpg", sent[:-2] + b"\xff\xfe\xff\xffcut", "sent.jpg")
    whole("sent_soi.jpg", sent[:-2] + sent, "sent.jpg")
    good("padded.jpg", plain[:frame] + b"\xff\xff" + plain[frame:-2] + b"\xff\xff" + plain[-2:])
    good("file_tail.jpg", plain + b"behind the end")
    good("lone_marker.jpg", plain[:frame] + b"\xff\xd3" + plain[frame:])
    same = bytearray(plain)
    for at in (frame + 10, frame + 13, frame + 16, data + 5, data + 7, data + 9):
        same[at] = 7
    good("same_ids.jpg", bytes(same))
    good("band_ignored.jpg", plain[:data + 11] + b"\5\4\x21" + plain[data + 14:])
    restart = cjpeg(scene(35, 21), "-restart", "1B", "-optimize")
    at = restart.index(b"\xff\xd1")
    good("restart_junk.jpg", restart[:at] + b"ab\xff" + restart[at:])
    good("restart_last.jpg", restart[:-2] + b"\xff\xd6" + restart[-2:])


# ---- Damaged JPEG files: 16 x 16 pixels, grey, with two Huffman codes: 0 (symbol 0) and 10

def segment(marker, data=b""):
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def sof(marker=0xC0, bits=8, h=16, w=16, components=((1, 0x11, 0),)):
    return segment(marker, struct.pack(">BHHB", bits, h, w, len(components)) +
                   b"".join(map(bytes, components)))


def dht(kind, symbols=(0, 1), counts=(1, 1)):
    return segment(0xC4, bytes((kind,) + tuple(counts)) + bytes(16 - len(counts)) + bytes(symbols))


def sos(band=(0, 63, 0), components=((1, 0),)):
    return segment(0xDA, bytes((len(components),)) + b"".join(map(bytes, components)) + bytes(band))


def scan_bits(*groups):
    text = "".join(groups).replace(" ", "")
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")


def make_bad_jpegs():
    f, u = "FORMAT", "UNSUPPORTED"
    dqt = segment(0xDB, b"\0" + b"\1" * 64)
    soi, eoi, tables = b"\xff\xd8", b"\xff\xd9", dqt + dht(0) + dht(0x10)
    grey = b"\0"   # 4 blocks: DC 0, end of block
    three = ((1, 0x11, 0), (2, 0x11, 0), (3, 0x11, 0))

    def one(name, text, code=f, before=tables, frame=sof(), scan=sos(), data=grey, end=eoi):
        bad(name + ".jpg", soi + before + frame + scan + data + end, code, text)

    def progressive(name, text, *scans):
        bad(name + ".jpg", soi + tables + sof(0xC2) + b"".join(scans) + eoi, f, text)

    whole = soi + tables + sof() + sos() + grey
    good("tiny.jpg", whole + eoi)
    good("no_eoi_tail.jpg", whole + b"behind the pixels")
    with open(os.path.join(HERE, "no_eoi.jpg"), "wb") as out:   # Pillow wants the marker
        out.write(whole)
    index.append("load no_eoi.jpg" + index[-1][len("load no_eoi_tail.jpg"):])
    good("tiny_prog.jpg", soi + tables + sof(0xC2) + sos((0, 0, 0)) + b"\0" + eoi)
    bad("cut_soi.jpg", b"\xff\xd8\xff", f, "cut off before its end")
    bad("cut_segment.jpg", whole[:20], f, "cut off before its end")
    bad("cut_scan.jpg", soi + tables + sof(h=24) + sos() + grey, f, "cut off before its end")
    progressive("cut_prog", "cut off before its end", sos((0, 0, 0)), b"\0", b"\xff\xfe\xff\xff")
    one("two_soi", "begins a second time", before=soi + tables)
    one("two_frames", "a second frame header", frame=sof() + sof())
    one("no_frame", "in front of the frame header", frame=b"")
    bad("no_scan.jpg", soi + tables + sof() + eoi, f, "a component without its data")
    bad("only_eoi.jpg", soi + tables + eoi, f, "no frame header")
    one("short_length", "shorter than its own length", before=b"\xff\xe3\0\1")
    one("frame_size", "a frame header (SOF) of a wrong size", frame=segment(0xC0, b"\x08\0\1\0\1"))
    one("frame_longer", "a frame header (SOF) of a wrong size",
        frame=segment(0xC0, b"\x08\0\1\0\1\1\1\x11\0\0"))
    one("no_component", "a frame header (SOF) of a wrong size", frame=sof(components=()))
    one("bits_12", "12 bits a sample", u, frame=sof(0xC1, 12))
    one("bits_7", "7 bits a sample", frame=sof(bits=7))
    one("dnl", "its height only behind its pixels (DNL)", u, frame=sof(h=0))
    one("zero_width", "0 x 16 pixels", frame=sof(w=0))
    one("huge", "65535 x 65535 pixels: must be 1 to 2^28", frame=sof(h=65535, w=65535))
    one("bomb", "cannot hold 16000 x 16000", frame=sof(h=16000, w=16000))
    one("bomb_prog", "cannot hold 16000 x 16000", frame=sof(0xC2, h=16000, w=16000))
    one("components_2", "with 2 components", u, frame=sof(components=three[:2]))
    one("components_5", "with 5 components", u, frame=sof(components=three + three[:2]))
    for marker, kind in ((0xC3, "lossless"), (0xC5, "hierarchical"), (0xC9, "arithmetic coding"),
                         (0xCA, "arithmetic coding"), (0xDE, "hierarchical")):
        one("frame_%02x" % marker, "of a rare kind (%s)" % kind, u, frame=sof(marker))
    for h_v in (0x01, 0x10, 0x15, 0x51):
        one("factors_%02x" % h_v, "sampling factors", frame=sof(components=((1, h_v, 0),)))
    one("fraction", "3 x 1 and 2 x 1 samples", u,
        frame=sof(components=((1, 0x31, 0), (2, 0x21, 0), (3, 0x11, 0))))
    one("table_4", "or a table beyond 4", frame=sof(components=((1, 0x11, 4),)))
    make_bad_jpeg_tables(one, dqt)
    make_bad_jpeg_scans(one, progressive, three)


def make_bad_jpeg_tables(one, dqt):
    size, code = "of a wrong size or number", "that is no code"
    one("dqt_short", size, before=segment(0xDB, b"\0" + bytes(63)))
    one("dqt_16_short", size, before=segment(0xDB, b"\x10" + bytes(127)))
    one("dqt_number", size, before=segment(0xDB, b"\4" + bytes(64)))
    one("dqt_missing", "table (DQT) is missing", before=dht(0) + dht(0x10))
    one("dht_short", size, before=segment(0xC4, bytes(16)))
    one("dht_symbols", size, before=dht(0, (0, 1), (1, 2)))
    one("dht_number", size, before=dht(4))
    one("dht_class", size, before=dht(0x20))
    one("dht_257", size, before=dht(0, bytes(257), (0,) * 14 + (2, 255)))
    one("dht_over", code, before=dht(0, (0, 1, 2), (1, 2)))
    one("dht_ones", code, before=dht(0, (0, 1), (2,)))
    one("dht_long", code, before=dht(0, bytes(255), (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                    255)) + dht(0x10, (0, 1, 2, 3), (1, 3)))
    one("dht_dc_16", code, before=dht(0, (0, 16)))
    one("dht_missing", "table (DHT) is missing", before=dqt, scan=sos(components=((1, 0x23),)))
    one("dht_none", "table (DHT) is missing", before=dqt, frame=sof(0xC2), scan=sos((0, 0, 0)))
    one("dri_size", "a restart interval (DRI) of a wrong size", before=segment(0xDD, b"\1"))


def make_bad_jpeg_scans(one, progressive, three):
    size, band = "a scan header (SOS) of a wrong size", "a scan of coefficients "
    dc, data = sos((0, 0, 0)), b"\0"
    one("sos_short", size, scan=segment(0xDA, b"\1\1\0\0"))
    one("sos_empty", size, scan=segment(0xDA))
    one("sos_none", size, scan=sos(components=()))
    one("sos_longer", size, scan=segment(0xDA, b"\1\1\0\0\x3f\0\0"))
    one("sos_five", size, scan=sos(components=((1, 0),) * 5))
    one("sos_unknown", "that the frame does not have, or twice", scan=sos(components=((2, 0),)))
    for name, ids in (("twice", (1, 1, 2)), ("order", (2, 1, 3)), ("more", (1, 2, 3, 4))):
        one("sos_" + name, "that the frame does not have, or twice", frame=sof(components=three),
            scan=sos(components=[(i, 0) for i in ids]))
    one("sos_table", "a Huffman table number beyond 3", scan=sos(components=((1, 0x40),)))
    one("sos_blocks", "more than 10 blocks in an MCU",
        frame=sof(components=((1, 0x33, 0), (2, 0x11, 0), (3, 0x11, 0))),
        scan=sos(components=((1, 0), (2, 0), (3, 0))))
    one("sos_again", "a component comes in two scans", frame=sof(components=three),
        scan=sos() + bytes(2) + sos())
    one("sos_missing", "a component without its data", frame=sof(components=three), data=bytes(2))
    progressive("band_mixed", band + "0 to 5", sos((0, 5, 0)))
    progressive("band_turned", band + "5 to 3", sos((5, 3, 0)))
    progressive("band_64", band + "1 to 64", sos((1, 64, 0)))
    progressive("band_bits", "bits 3 down to 1", sos((0, 0, 0x31)))
    progressive("band_low", "bits 0 down to 14", sos((0, 0, 14)))
    one("band_shared", band + "1 to 5", frame=sof(0xC2, components=three),
        scan=sos((1, 5, 0), ((1, 0), (2, 0))))
    repeats = "repeats or leaves out bits"
    progressive("bits_repeated", repeats, dc, data, dc, data)
    progressive("bits_refined", repeats, sos((0, 0, 1)), data, sos((0, 0, 0x10)), data,
                sos((0, 0, 0x10)), data)
    progressive("bits_unsent", repeats, dc, data, sos((1, 5, 0x10)), data)
    progressive("bits_skipped", repeats, sos((0, 0, 2)), data, sos((0, 0, 0x10)), data)
    progressive("no_dc", "a component without its data", sos((1, 63, 0)), data)
    make_bad_jpeg_data(one, progressive)


def make_bad_jpeg_data(one, progressive):
    early, dqt = "data of a scan end early", segment(0xDB, b"\0" + b"\1" * 64)
    dri = segment(0xDD, b"\0\1")

    def ac(*symbols):
        return dqt + dht(0, (0, 15)) + dht(0x10, symbols)

    one("data_none", early, data=b"")
    one("data_short", early, frame=sof(h=24))
    one("data_early_rst", early, frame=sof(h=24), data=b"\0\xff\xd0\0")
    one("data_code", "are no Huffman code", data=b"\xe0\0\0\0\0")
    one("data_ac_code", "are no Huffman code", data=b"\x70\0\0\0\0")
    one("data_many", "more than 64 coefficients", before=ac(0xF1, 0), data=b"\x2a" * 20)
    one("data_wide_dc", "a DC coefficient of more than 16 bits", before=ac(0, 1),
        data=scan_bits("10", "1" * 15, "0", "10", "1" * 15, "0" * 30))
    one("rst_missing", "a restart marker is missing", before=dri + ac(0, 1))
    one("rst_other", "a restart marker is missing", before=dri + ac(0, 1), data=b"\0\xff\xd1\0")
    one("rst_order", "a restart marker is missing", before=dri + ac(0, 1),
        data=b"\0\xff\xd0\0\xff\xd0\0\xff\xd2\0")
    dc = sos((0, 0, 0)) + b"\0"
    progressive("prog_early", early, sos((0, 0, 0)))
    progressive("prog_code", "are no Huffman code", dc, sos((1, 63, 0)), b"\xe0\0\0\0\0")
    progressive("prog_many", "more than 64 coefficients", dc, dht(0x10, (0x21, 0x30)),
                sos((1, 2, 0)), bytes(5))
    empty = sos((1, 2, 1)) + scan_bits("10 1", "10 0")   # bands end in 3 blocks, in 2 blocks
    progressive("refine_size", "are no Huffman code", dc, dht(0x10, (0x02, 0x10)), empty,
                sos((1, 2, 0x10)), bytes(9))
    progressive("refine_many", "more than 64 coefficients", dc, dht(0x10, (0x01, 0x10)), empty,
                dht(0x10, (0x31, 0x30)), sos((1, 2, 0x10)), bytes(9))


def main():
    version = features.version("libjpeg_turbo") or "0"
    if [int(n) for n in version.split(".")[:3]] < [3, 0, 1]:
        sys.exit("make_image_vectors.py: needs libjpeg-turbo 3.0.1 or later, this is " + version)
    if PIL.__version__.split(".")[:2] != ["12", "1"]:
        sys.exit("make_image_vectors.py: needs Pillow 12.1, this is " + PIL.__version__)
    os.makedirs(HERE, exist_ok=True)
    for make in (make_good, make_depths, make_pnm, make_exif, make_bad, make_kinds, make_resizes,
                 make_crops, make_sizes, make_jpegs):
        make()
    with open(os.path.join(HERE, "index.txt"), "w") as f:
        f.write("# made by tests/make_image_vectors.py\n" + "\n".join(index) + "\n")
    print("%d lines in tests/images/index.txt" % len(index))


if __name__ == "__main__":
    main()
