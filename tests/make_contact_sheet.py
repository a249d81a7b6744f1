#!/usr/bin/env python3
"""Lay prompts, predictions and true answers out in one image; Python's standard library alone.

    python3 tests/make_contact_sheet.py -o sheet.png \\
        --row prompt/depth out-depth.png prompt/depth/truth/12.png \\
        --row prompt/edges out-edges.png prompt/edges/truth/12.png

docs/model.md holds the commands that made docs/sheet.png. One line of the sheet for every --row
FOLDER PREDICTION... TRUTH: the last K images of the folder in the order of their names (-k, 5
unless told; fewer leave the front empty), the predictions in orange frames, the truth. FOLDER may
be one image. Every image must be a PNG of 256 x 256, 8-bit RGB or palette, not interlaced, as `lvm`
and `scenes` write them and as prompt/ holds them; it is shown at 128 x 128, each pixel the mean of
four.
"""
import argparse
import os
import struct
import sys
import zlib

SIDE = 256                       # of the images read
CELL = SIDE // 2                 # of their thumbnails
GAP = 6                          # white around every thumbnail
FRAME = 3                        # thickness of the prediction's frame, inside the gap
FRAME_COLOUR = bytes((235, 110, 0))
SIGNATURE = b"\x89PNG\r\n\x1a\n"


class PngError(Exception):
    """What is wrong with a PNG file, without the file's name."""


def chunks(data):
    """Yield (type, content) of a PNG's chunks up to IEND, with lengths and checksums verified."""
    if data[:8] != SIGNATURE:
        raise PngError("not a PNG file")
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise PngError("cut short")
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        end = at + 12 + length
        if end > len(data):
            raise PngError("cut short inside a chunk")
        content = data[at + 8:end - 4]
        if zlib.crc32(kind + content) != struct.unpack(">I", data[end - 4:end])[0]:
            raise PngError("wrong checksum of chunk %r" % kind)
        yield kind, content
        at = end


def paeth(left, above, corner):
    """The PNG predictor: whichever neighbour is nearest to left + above - corner."""
    estimate = left + above - corner
    to_left, to_above = abs(estimate - left), abs(estimate - above)
    to_corner = abs(estimate - corner)
    if to_left <= to_above and to_left <= to_corner:
        return left
    return above if to_above <= to_corner else corner


def undo_filter(kind, line, previous, step):
    """One row of bytes, `step` a pixel, from its filtered form and the row above it."""
    row = bytearray(line)
    if kind == 1:
        for i in range(step, len(row)):
            row[i] = (row[i] + row[i - step]) & 255
    elif kind == 2:
        row = bytearray((a + b) & 255 for a, b in zip(row, previous))
    elif kind == 3:
        for i in range(len(row)):
            left = row[i - step] if i >= step else 0
            row[i] = (row[i] + (left + previous[i]) // 2) & 255
    elif kind == 4:
        for i in range(len(row)):
            left, corner = (row[i - step], previous[i - step]) if i >= step else (0, 0)
            row[i] = (row[i] + paeth(left, previous[i], corner)) & 255
    elif kind != 0:
        raise PngError("unknown row filter %d" % kind)
    return bytes(row)


def decode_png(data):
    """The rows, SIDE of them with 3 * SIDE bytes each, of an 8-bit PNG held in memory."""
    header, palette, packed = b"", b"", b""
    for kind, content in chunks(data):
        if kind == b"IHDR":
            header = content
        elif kind == b"PLTE":
            palette = content
        elif kind == b"IDAT":
            packed += content
    if len(header) != 13:
        raise PngError("no header")
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header)
    if (width, height) != (SIDE, SIDE):
        raise PngError("%d x %d pixels, but %d x %d are needed" % (width, height, SIDE, SIDE))
    if (depth, interlace) != (8, 0) or colour not in (2, 3):
        raise PngError("neither 8-bit RGB nor 8-bit palette, without interlacing")
    step = 3 if colour == 2 else 1
    stride = 1 + step * SIDE
    try:
        # One byte more than is right would show that there is too much, without inflating it all.
        raw = zlib.decompressobj().decompress(packed, SIDE * stride + 1)
    except zlib.error as fault:
        raise PngError("damaged pixel data (%s)" % fault)
    if len(raw) != SIDE * stride:
        raise PngError("pixel data of the wrong length")
    rows, previous = [], bytes(stride - 1)
    for at in range(0, len(raw), stride):
        previous = undo_filter(raw[at], raw[at + 1:at + stride], previous, step)
        rows.append(previous)
    return rows if colour == 2 else [coloured(row, palette) for row in rows]


def coloured(row, palette):
    """The RGB bytes of a row of numbers of a palette's colours."""
    if 3 * max(row) + 3 > len(palette):
        raise PngError("a colour that the palette does not have")
    return b"".join(palette[3 * i:3 * i + 3] for i in row)


def cost(filtered):
    """How far a filtered row is from zeros: small values compress well."""
    return sum(min(value, 256 - value) for value in filtered)


def apply_filter(row, previous):
    """The row's filter byte and filtered bytes: of none, left and above the one of least cost."""
    left = bytes(3) + row[:-3]
    forms = [row] + [bytes((a - b) & 255 for a, b in zip(row, other)) for other in (left, previous)]
    kind = min(range(3), key=lambda i: cost(forms[i]))
    return bytes((kind,)) + forms[kind]


def encode_png(rows):
    """An 8-bit RGB PNG of equally long rows of RGB bytes."""
    above = [bytes(len(rows[0]))] + rows[:-1]
    packed = zlib.compress(b"".join(apply_filter(r, a) for r, a in zip(rows, above)), 9)
    out = SIGNATURE
    header = struct.pack(">IIBBBBB", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        checksum = zlib.crc32(kind + content)
        out += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return out


def halve(rows):
    """Rows of half the width and height, every byte the rounded mean of a 2 x 2 block."""
    out = []
    for upper, lower in zip(rows[::2], rows[1::2]):
        sums = [a + b for a, b in zip(upper, lower)]
        small = bytearray(len(sums) // 2)
        for c in range(3):
            small[c::3] = bytes((a + b + 2) >> 2 for a, b in zip(sums[c::6], sums[c + 3::6]))
        out.append(bytes(small))
    return out


def thumbnail(path):
    """The rows of the image in file `path` at half its size."""
    try:
        with open(path, "rb") as f:
            return halve(decode_png(f.read()))
    except PngError as fault:
        raise PngError("%s: %s" % (path, fault))


def padded(rows, colour):
    """A thumbnail's rows within its gap, whose inner FRAME pixels have the given colour."""
    white = b"\xff" * 3
    edge, side = white * (GAP - FRAME), colour * FRAME
    blank = [white * (CELL + 2 * GAP)] * (GAP - FRAME)
    bar = [edge + colour * (CELL + 2 * FRAME) + edge] * FRAME
    return blank + bar + [edge + side + row + side + edge for row in rows] + bar + blank


def images_of(folder):
    """The PNG files of a folder in the order of their names, or the one file that is named."""
    if not os.path.isdir(folder):
        return [folder]
    names = sorted(n for n in os.listdir(folder) if n.lower().endswith(".png"))
    if not names:
        raise PngError("%s: no PNG file in this folder" % folder)
    return [os.path.join(folder, n) for n in names]


def sheet_line(folder, predictions, truth, k):
    """The rows of one line of the sheet."""
    white = b"\xff" * 3
    shown = images_of(folder)[-k:]
    cells = [padded([white * CELL] * CELL, white)] * (k - len(shown))
    cells += [padded(thumbnail(path), white) for path in shown]
    cells += [padded(thumbnail(path), FRAME_COLOUR) for path in predictions]
    cells += [padded(thumbnail(truth), white)]
    return [b"".join(parts) for parts in zip(*cells)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", required=True, metavar="SHEET.png")
    parser.add_argument("-k", type=int, default=5, help="prompt images a line (5)")
    parser.add_argument("--row", nargs="+", action="append", required=True, metavar="IMAGE",
                        help="FOLDER PREDICTION... TRUTH")
    args = parser.parse_args()
    if args.k < 1:
        parser.error("-k must be at least 1")
    if any(len(row) < 3 or len(row) != len(args.row[0]) for row in args.row):
        parser.error("--row takes a folder, one prediction or more and the truth, each as many")
    rows = []
    try:
        for folder, *predictions, truth in args.row:
            rows += sheet_line(folder, predictions, truth, args.k)
        with open(args.out, "wb") as f:
            f.write(encode_png(rows))
    except (PngError, OSError) as fault:
        sys.exit("make_contact_sheet.py: %s" % fault)
    print(args.out)


if __name__ == "__main__":
    main()
