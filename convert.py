#!/usr/bin/env python3
"""convert.py: checkpoints to weights files for lvm, and back. Python 3.8+, standard library only.

    python3 convert.py -o mine.bin --llama DIR --vqgan DIR      either part may be left out
    python3 convert.py -o mine.bin --llama DIR --type q8_0      then quantised by `lvm quantize`
    python3 convert.py -o style.bin --lora DIR                  adapters, for `lvm --lora`
    python3 convert.py mine.bin --to-hf DIR                     writes DIR/llama and DIR/vqgan
    python3 convert.py style.bin --to-hf DIR                    writes DIR itself

--llama is a folder of Hugging Face's LlamaForCausalLM (or of DeLVM's InternLMForCausalLM), --vqgan
one of open-muse's VQGANModel: config.json beside model.safetensors or pytorch_model.bin (or shards
and their index). A file of weights with config.json beside it may be named instead of its folder.
--lora is a folder of PEFT's LoRA adapters: adapter_config.json beside adapter_model.safetensors or
adapter_model.bin.
PyTorch's files are pickles, which can run programs; here they can build tensors and nothing else.
A checkpoint with NaN or infinite weights is refused unless --allow-nonfinite is given.
The output, which - sends to standard output, is one GGUF v3 file:

    "GGUF", u32 3, u64 tensors, u64 keys | keys | tensor names, shapes, types, offsets | pad | data

everything little-endian, the data section and every tensor in it aligned to 64 bytes. What changes:

    names       model.layers.3.mlp.up_proj.weight: blk.3.ffn_up.weight; the tokenizer's get "vq."
    vectors     norms and biases become F32, exactly; every matrix keeps its type and its bits
    convolution [out, in, h, w] becomes [out, h, w, in]: a row of input channels can be quantised
    Q and K     rows keep the checkpoint's order (halves rotate together): nothing is permuted
    BOS, EOS    kept only when no image token: num_embeddings <= id < vocab_size

--to-hf undoes each of these. A vector goes back to its part's own type when that loses nothing, and
Q8_0 and Q4_0 become F32. Matrices pass through in pieces; only a convolution is held as a whole.
"""

import argparse
import array
import collections
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zlib

ALIGN = 64
PIECE = 1 << 19             # elements moved at a time
MAX_HEADER = 1 << 24        # bytes of JSON, of GGUF keys, of a pickle, of an archive's directory
MAX_STEPS = 1 << 19         # operations of a pickle: a tensor takes some 35
MAX_NAMED = 20              # faulty tensors named in one message

# name: (ggml's number, elements a block, bytes a block)
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2),
         "Q8_0": (8, 32, 34), "Q4_0": (2, 32, 18)}
FLOATS = ("F32", "F16", "BF16")

# A tensor in a file; shape has the slowest dimension first, pos counts from the start of the file.
# Where view is not None, the elements are not side by side in the file, or are packed (see View).
Tensor = collections.namedtuple("Tensor", "path name dtype shape pos nbytes view", defaults=(None,))
# A tensor that a configuration calls for: both names, the checkpoint's shape. Tensors that share an
# optional group may be left out, all of them together.
Spec = collections.namedtuple("Spec", "hf gguf shape group")
# A tensor to write: swap is None or (rows, a, b), which turns every row from [a, b] into [b, a];
# limit is None or what all values must stay below.
Job = collections.namedtuple("Job", "name dtype shape source swap limit", defaults=(None,))


class Bad(Exception):
    """A fault in what the user gave: the file, what is wrong with it, what to do."""

    def __init__(self, path, text):
        super().__init__("%s: %s" % (shown_path(path), text))


def shown(name):
    """A name out of an untrusted file, fit for a terminal."""
    return shortened(name if name.isprintable() else ascii(name), 100)


def shown_path(path):
    """A path, fit for a terminal, and short enough that the reason behind it is seen."""
    path = path if path.isprintable() else ascii(path)[1:-1]
    return shortened(path, 200) if path else '""'


def shortened(text, room):
    """Text without its middle where it is too long: both ends of a name tell what it is."""
    half = room // 2
    return text if len(text) <= room else text[:half - 2] + "..." + text[1 - half:]


def spelt(value):
    """A value out of an untrusted configuration, as JSON spells it."""
    try:
        return shown(json.dumps(value))
    except RecursionError:
        return "nested too deeply"


def nbytes(dtype, shape):
    _, elements, size = TYPES[dtype]
    return math.prod(shape) // elements * size


def padding(n):
    return bytes(-n % ALIGN)


def input_size(path, missing="there is no such file"):
    """The size of a file to read. What else a path may be is found out before it is opened: a pipe
    could wait for ever."""
    if not path:
        raise Bad(path, "the name is empty; give the path of a file or folder")
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Bad(path, missing) from None
    if stat.S_ISDIR(found.st_mode):
        raise Bad(path, "is a folder where a file is expected")
    if not stat.S_ISREG(found.st_mode):
        raise Bad(path, "is a pipe or a device, which cannot be read here; copy it into a file")
    return found.st_size


# ---- safetensors in ------------------------------------------------------------------------------

# Bytes an element, for checking sizes; other types are only ever refused by name.
ELEMENT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4,
           "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


def parse_json(path, data, what):
    """A JSON object. Python's parser takes the last of two equal keys; here they are a fault."""
    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands there twice")
        return result
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Bad(path, "%s is UTF-16; save it as UTF-8" % what)
    try:                                    # a byte order mark in front is no fault
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as fault:
        raise Bad(path, "%s is not valid JSON (%s)" % (what, shown(str(fault)))) from None
    if not isinstance(value, dict):
        raise Bad(path, "%s is not a JSON object" % what)
    return value


def read_json(path):
    input_size(path, "there is no such file; give a checkpoint folder that holds it")
    with open(path, "rb") as f:
        data = f.read(MAX_HEADER + 1)
    if len(data) > MAX_HEADER:
        raise Bad(path, "is far too long for a JSON file")
    return parse_json(path, data, "the file")


def are_sizes(values):
    """Whether this came out of JSON as a list of whole numbers that 63 bits hold."""
    return isinstance(values, list) and len(values) <= 8 and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values)


def check_entry(path, name, entry, data_pos, room):
    """One tensor of a safetensors header, checked against the file's bytes."""
    def bad(text):
        return Bad(path, "tensor %s %s; the file is damaged, copy it again" % (shown(name), text))
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise bad("has no proper description")
    dtype, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if not are_sizes(shape) or not are_sizes(offsets) or len(offsets) != 2:
        raise bad("has no proper shape or data_offsets")
    begin, end = offsets
    if not begin <= end <= room:
        raise bad("lies at bytes %d to %d of %d" % (begin, end, room))
    if dtype in ELEMENT and math.prod(shape) * ELEMENT[dtype] != end - begin:
        raise bad("is %s %s but has %d bytes" % (dtype, shape, end - begin))
    return Tensor(path, name, dtype, tuple(shape), data_pos + begin, end - begin)


def read_safetensors(path):
    """{name: Tensor} of one file, which is a u64 length, that much JSON, then data without gaps."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        first = f.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, MAX_HEADER):
            raise Bad(path, "is no safetensors file, or cut short (%d bytes); copy it again" % size)
        header = parse_json(path, f.read(length), "the header")
    header.pop("__metadata__", None)
    pos = 8 + length
    tensors = {name: check_entry(path, name, e, pos, size - pos) for name, e in header.items()}
    for t in sorted(tensors.values(), key=lambda t: (t.pos, t.nbytes)):
        if t.pos != pos:
            raise Bad(path, "tensor %s overlaps another or follows a gap; copy the file again"
                      % shown(t.name))
        pos += t.nbytes
    if pos != size:
        raise Bad(path, "has %d bytes more than its header explains; copy it again" % (size - pos))
    return tensors


# ---- zip archives in -----------------------------------------------------------------------------

# A piece of a file: its place, its bytes, and None or, if they are deflated, how many are stored.
Piece = collections.namedtuple("Piece", "pos size packed")


def read_at(f, pos, n):
    f.seek(pos)
    return f.read(n)


def bad_zip(path, text):
    return Bad(path, "is a zip archive %s; copy it again" % text)


def find_directory(path, f, size):
    """(place, bytes, entries) of an archive's directory, from the record at the end of the file."""
    start = max(0, size - 22 - (1 << 16))
    tail = read_at(f, start, size - start)
    at = tail.rfind(b"PK\5\6")
    if not 0 <= at <= len(tail) - 22:
        raise bad_zip(path, "without an end, so cut short")
    count, length, pos = struct.unpack_from("<10xHII", tail, at)
    end = start + at
    if at >= 20 and tail[at - 20:at - 16] == b"PK\6\7":         # 64-bit numbers are elsewhere
        end = struct.unpack_from("<Q", tail, at - 12)[0]
        record = read_at(f, end, 56) if end <= size - 56 else b""
        if record[:4] != b"PK\6\6":
            raise bad_zip(path, "whose end is damaged")
        count, length, pos = struct.unpack_from("<QQQ", record, 32)
    if pos + length > end or length > MAX_HEADER or count * 46 > length:
        raise bad_zip(path, "whose directory of %d entries cannot fit" % count)
    return pos, length, count


def directory_entry(path, directory, at):
    """(name, method, packed bytes, bytes, place of the header, place of the next entry)."""
    if directory[at:at + 4] != b"PK\1\2" or len(directory) - at < 46:
        raise bad_zip(path, "whose directory is damaged")
    numbers = struct.unpack_from("<8xHH8xIIHHH8xI", directory, at)
    flags, method, packed, size, *lengths, pos = numbers
    end_name = at + 46 + lengths[0]
    name = directory[at + 46:end_name].decode("latin-1")
    extra = directory[end_name:end_name + lengths[1]]
    if flags & 0x61:
        raise bad_zip(path, "with an encrypted or patched entry, %s" % shown(name))
    size, packed, pos = wide_numbers([size, packed, pos], extra)
    return name, method, packed, size, pos, at + 46 + sum(lengths)


def wide_numbers(numbers, extra):
    """The numbers, those of all ones replaced by what the extra field says: u16 kind, u16 bytes,
    the bytes, and so on; kind 1 has the 64-bit numbers."""
    wide, at = [i for i in range(3) if numbers[i] == 0xFFFFFFFF], 0
    while wide and at + 4 + 8 * len(wide) <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, at)
        if kind == 1 and 8 * len(wide) <= n:
            for i, value in zip(wide, struct.unpack_from("<%dQ" % len(wide), extra, at + 4)):
                numbers[i] = value
            break
        at += 4 + n
    return numbers


def data_place(path, f, name, method, pos, end):
    """Where the data of the entry begins whose own header is at pos."""
    header = read_at(f, pos, 30 + len(name)) if pos <= end - 30 else b""
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise bad_zip(path, "whose entry %s is damaged" % shown(name))
    own_method, name_length, extra_length = struct.unpack_from("<8xH16xHH", header)
    if own_method != method or header[30:30 + name_length].decode("latin-1") != name:
        raise bad_zip(path, "whose entry %s is another in its own header" % shown(name))
    return pos + 30 + name_length + extra_length


def read_zip(path, f, size):
    """{name: Piece} of an archive whose entries are stored or deflated, and apart."""
    end, length, count = find_directory(path, f, size)
    directory, at, entries, places = read_at(f, end, length), 0, {}, []
    for _ in range(count):
        name, method, packed, unpacked_size, pos, at = directory_entry(path, directory, at)
        if name in entries:
            raise bad_zip(path, "that holds %s twice" % shown(name))
        if method not in (0, 8) or method == 0 and packed != unpacked_size:
            raise bad_zip(path, "whose entry %s is packed in an unknown way" % shown(name))
        start = data_place(path, f, name, method, pos, end)
        places.append((pos, start + packed, name))
        entries[name] = Piece(start, unpacked_size, packed if method else None)
    last = 0
    for pos, stop, name in sorted(places):
        if pos < last or stop > end:
            raise bad_zip(path, "whose entry %s overlaps another" % shown(name))
        last = stop
    return entries


def piece_bytes(path, piece):
    """All bytes of a piece that must be short."""
    if piece.size > MAX_HEADER:
        raise Bad(path, "holds %d bytes where a short record is expected" % piece.size)
    if piece.packed is None:
        return b"".join(file_bytes(path, piece.pos, piece.size, PIECE))
    return b"".join(inflate(path, piece.pos, piece.packed, 0, piece.size))


# ---- PyTorch's pickles in ------------------------------------------------------------------------

# What a pickle makes: the name of something in Python; a storage, which is a row of numbers in the
# file; a tensor, which is some of them: element (i, j, ...) is number offset + i * strides[0] + ...
Global = collections.namedtuple("Global", "name")
Storage = collections.namedtuple("Storage", "dtype key numel")
# of the storage, and where negative the opposite of it.
Stub = collections.namedtuple("Stub", "storage offset shape strides negative")
# How a Tensor lies in a storage: the bytes before its first element, the strides of its dimensions,
# as in Piece whether the storage is deflated, and as in Stub. The Tensor's pos is the storage's.
View = collections.namedtuple("View", "start strides packed negative")

STORAGES = {"torch.%sStorage" % name: dtype for name, dtype in (
    ("Double", "F64"), ("Float", "F32"), ("Half", "F16"), ("BFloat16", "BF16"), ("Long", "I64"),
    ("Int", "I32"), ("Short", "I16"), ("Char", "I8"), ("Byte", "U8"), ("Bool", "BOOL"))}
STORAGES["torch.storage.UntypedStorage"] = "U8"
DTYPES = {"torch." + name: dtype for name, dtype in (
    ("float64", "F64"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"),
    ("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"), ("uint64", "U64"), ("uint32", "U32"),
    ("uint16", "U16"))}
# What may be called, by arguments: all of torch.load's own safe list that makes plain tensors.
ORDERED = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"          # storage, offset, shape, strides, 2 more, or 3
OLD_TENSOR = "torch._utils._rebuild_tensor"         # storage, offset, shape, strides
TYPED_TENSOR = "torch._utils._rebuild_tensor_v3"    # as TENSOR, with a type in front of the last
PARAMETER = "torch._utils._rebuild_parameter"                   # tensor, 2 more
PARAMETER_STATE = "torch._utils._rebuild_parameter_with_state"  # tensor, 2 more, attributes
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"   # one of these, a class, arguments, attributes
CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
GLOBALS = ({ORDERED, TENSOR, OLD_TENSOR, TYPED_TENSOR, PARAMETER, PARAMETER_STATE, FROM_TYPE}
           | CLASSES | set(STORAGES) | set(DTYPES))


class Pickle:
    """A machine for pickles that can make numbers, strings, lists, dictionaries and Stubs of
    tensors. A pickle is a program: each operation is one byte and its operand, works on a stack,
    and may keep things in a memo. What Python's machine would import and call is looked up here in
    a short list; all else is refused."""

    def __init__(self, path, data):
        self.path, self.data, self.pos = path, data, 0
        self.stack, self.marks, self.memo, self.storages = [], [], {}, {}

    def bad(self, text):
        return Bad(self.path, "its pickle %s (near byte %d); the file is damaged or no plain "
                   "dictionary of tensors" % (text, self.pos))

    def load(self):
        """The object that the next pickle makes."""
        self.stack, self.marks, self.memo = [], [], {}
        for _ in range(MAX_STEPS):
            code = self.take(1)
            if code == b".":
                return self.pop()
            if code not in OPERATIONS:
                raise self.bad("has the operation %s, which no checkpoint needs" % ascii(code)[1:])
            operation, *argument = OPERATIONS[code]
            operation(self, *argument)
        raise self.bad("has more than %d operations" % MAX_STEPS)

    # operands

    def take(self, n):
        data = self.data[self.pos:self.pos + n]
        if len(data) < n:
            raise self.bad("ends too early")
        self.pos += n
        return data

    def number(self, code):
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, data):
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("has a string that is not UTF-8") from None

    def line(self):
        end = self.data.find(b"\n", self.pos, self.pos + 256)
        if end < 0:
            raise self.bad("ends too early")
        text = self.text(self.data[self.pos:end])
        self.pos = end + 1
        return text

    # the stack; a mark hides what is below it until its operation takes all that is above

    def push(self, value):
        self.stack.append(value)

    def pops(self, n):
        """The topmost n values, or with None all above the topmost mark, which goes too."""
        if n is None and not self.marks:
            raise self.bad("takes from an empty stack")
        at = len(self.stack) - n if n is not None else self.marks.pop()
        if at < (self.marks[-1] if self.marks else 0):
            raise self.bad("takes from an empty stack")
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def pop(self):
        return self.pops(1)[0]

    def top(self, kind):
        value = self.pop()
        if not isinstance(value, kind):
            raise self.bad("takes %s for %s" % (type(value).__name__, kind.__name__))
        self.push(value)
        return value

    def mark(self):
        self.marks.append(len(self.stack))

    # operations

    def protocol(self):
        if self.number("<B") > 5:
            raise self.bad("is of an unknown protocol")

    def frame(self):
        self.number("<Q")

    def push_number(self, code):
        self.push(self.number(code))

    def push_long(self):
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def push_text(self, code):
        self.push(self.text(self.take(self.number(code))))

    def push_bytes(self, code):
        self.push(self.take(self.number(code)))

    def push_tuple(self, n):
        self.push(tuple(self.pops(n)))

    def push_new(self, kind):
        self.push(kind())

    def put(self, code):
        at = len(self.memo) if code is None else self.number(code)
        self.memo[at] = self.top(object)

    def get(self, code):
        at = self.number(code)
        if at not in self.memo:
            raise self.bad("recalls what it never kept")
        self.push(self.memo[at])

    def append(self, n):
        values = self.pops(n)
        self.top(list).extend(values)

    def set_items(self, n):
        values = self.pops(n)
        target = self.top(dict)
        if len(values) % 2:
            raise self.bad("has a key without a value")
        for key, value in zip(values[::2], values[1::2]):
            if not (isinstance(key, str) or isinstance(key, int) and abs(key) < 1 << 31):
                raise self.bad("has a key that is neither a name nor a small number")
            if key in target:
                raise self.bad("has %s twice" % shown(str(key)))
            target[key] = value

    def build(self):
        """Attributes of a dictionary: state_dict() has some. Nothing needs them."""
        self.pop()
        self.top(dict)

    def name_lines(self):
        self.push_global(self.line(), self.line())

    def name_words(self):
        self.push_global(*self.pops(2))

    def push_global(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.bad("names something by no string")
        name = "%s.%s" % (module, name)
        if name not in GLOBALS:
            raise Bad(self.path, "its pickle asks for %s; only tensors are read, for safety: save "
                      "the dictionary of tensors alone, with torch.save(model.state_dict(), ...)"
                      % shown(name))
        self.push(Global(name))

    def call(self):
        function, args = self.pops(2)
        name = function.name if isinstance(function, Global) else None
        count = len(args) if isinstance(args, tuple) else None
        if name == ORDERED and count == 0:
            self.push({})
        elif name == ORDERED and count == 1 and isinstance(args[0], list) and all(
                isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in args[0]):
            self.push({})                   # as Python 2 spells it: a list of pairs
            self.mark()
            self.stack.extend(word for pair in args[0] for word in pair)
            self.set_items(None)
        elif name == TENSOR and count in (6, 7) or name == OLD_TENSOR and count == 4:
            self.push(self.tensor(*args[:4], *args[6:]))
        elif name == TYPED_TENSOR and count in (7, 8):
            self.push(self.tensor(self.retyped(args[0], args[6]), *args[1:4], *args[7:]))
        elif (name, count) in ((PARAMETER, 3), (PARAMETER_STATE, 4)) and isinstance(args[0], Stub):
            self.push(args[0])
        elif name == FROM_TYPE and count == 4 and args[0] != function and (
                args[1] in map(Global, CLASSES)):
            self.push(args[0])              # an attribute or a class changes no number
            self.push(args[2])
            self.call()
        else:
            raise self.bad("makes a call that no checkpoint needs")

    def retyped(self, storage, dtype):
        """A storage of bytes as one of another type."""
        if not (isinstance(storage, Storage) and storage.dtype == "U8"
                and isinstance(dtype, Global) and dtype.name in DTYPES):
            raise self.bad("describes a tensor wrongly")
        dtype = DTYPES[dtype.name]
        if storage.numel % ELEMENT[dtype]:
            raise self.bad("describes a storage wrongly")
        return Storage(dtype, storage.key, storage.numel // ELEMENT[dtype])

    def tensor(self, storage, offset, shape, strides, bits=None):
        """bits: None, or {"neg": True} of a tensor whose numbers are stored with the other sign,
        which PyTorch turns only when they are next used."""
        if not (isinstance(storage, Storage) and isinstance(shape, tuple)
                and isinstance(strides, tuple) and len(shape) == len(strides)
                and are_sizes([offset, *shape]) and are_sizes(list(strides))):
            raise self.bad("describes a tensor wrongly")
        if offset + span_of(shape, strides) > storage.numel:
            raise self.bad("has a tensor %s outside its storage" % list(shape))
        bits = {} if bits is None else bits
        if not isinstance(bits, dict) or any(
                key != "neg" or not isinstance(value, bool) for key, value in bits.items()):
            raise self.bad("has a tensor with properties other than a sign")
        return Stub(storage, offset, shape, strides, bits.get("neg", False))

    def persistent(self):
        """A storage: ("storage", its type, its key, the device, how many numbers)."""
        words = self.pop()
        if not isinstance(words, tuple) or len(words) not in (5, 6) or words[0] != "storage" or (
                words[5:] not in ((), (None,))):
            raise self.bad("refers to something other than a storage")
        kind, key, numel = words[1], words[2], words[4]
        if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(
                key, str) or not are_sizes([numel]):
            raise self.bad("describes a storage wrongly")
        storage = Storage(STORAGES[kind.name], key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise self.bad("describes storage %s in two ways" % shown(key))
        self.push(storage)


# What to call for an operation, and with what.
OPERATIONS = {
    b"\x80": (Pickle.protocol,), b"\x95": (Pickle.frame,), b"(": (Pickle.mark,),
    b"J": (Pickle.push_number, "<i"), b"K": (Pickle.push_number, "<B"),
    b"M": (Pickle.push_number, "<H"), b"G": (Pickle.push_number, ">d"),
    b"X": (Pickle.push_text, "<I"), b"\x8c": (Pickle.push_text, "<B"),
    b"\x8d": (Pickle.push_text, "<Q"), b"T": (Pickle.push_text, "<I"),
    b"U": (Pickle.push_text, "<B"), b"B": (Pickle.push_bytes, "<I"),
    b"C": (Pickle.push_bytes, "<B"), b"\x8e": (Pickle.push_bytes, "<Q"),
    b"N": (Pickle.push, None), b"\x88": (Pickle.push, True), b"\x89": (Pickle.push, False),
    b"\x8a": (Pickle.push_long,), b"]": (Pickle.push_new, list), b"}": (Pickle.push_new, dict),
    b")": (Pickle.push, ()), b"\x85": (Pickle.push_tuple, 1), b"\x86": (Pickle.push_tuple, 2),
    b"\x87": (Pickle.push_tuple, 3), b"t": (Pickle.push_tuple, None),
    b"a": (Pickle.append, 1), b"e": (Pickle.append, None),
    b"s": (Pickle.set_items, 2), b"u": (Pickle.set_items, None),
    b"q": (Pickle.put, "<B"), b"r": (Pickle.put, "<I"), b"\x94": (Pickle.put, None),
    b"h": (Pickle.get, "<B"), b"j": (Pickle.get, "<I"),
    b"c": (Pickle.name_lines,), b"\x93": (Pickle.name_words,),
    b"R": (Pickle.call,), b"b": (Pickle.build,), b"Q": (Pickle.persistent,),
}


def span_of(shape, strides):
    """Elements from a tensor's first to its last in the storage, both included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, strides))


def is_dense(shape, strides):
    """Whether the elements lie side by side in the usual order."""
    wanted = 1
    for n, step in zip(reversed(shape), reversed(strides)):
        if n != 1 and step != wanted:
            return 0 in shape
        wanted *= n
    return True


def tensor_dict(path, value):
    """{name: Stub} of a checkpoint, which may lie in a dictionary of several things."""
    for key in ("state_dict", "model_state_dict", "model", "module") * 2:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict):
        raise Bad(path, "holds no dictionary of tensors")
    others = [k for k, v in value.items() if not isinstance(v, Stub) or not isinstance(k, str)]
    if others:
        raise Bad(path, "holds %s, which is no tensor with a name; save the dictionary of tensors "
                  "alone, with torch.save(model.state_dict(), ...)" % shown(str(others[0])))
    return value


def locate(path, name, stub, piece):
    """The Tensor of a Stub whose storage is a piece of the file."""
    (dtype, key, numel), offset, shape, strides, negative = stub
    size = ELEMENT[dtype]
    if piece is None or piece.size != numel * size:
        raise Bad(path, "tensor %s needs %d bytes as storage %s, but there are %s; the file is "
                  "damaged, copy it again" % (shown(name), numel * size, shown(key),
                                              piece.size if piece else "none"))
    total, start, dense = math.prod(shape) * size, offset * size, is_dense(shape, strides)
    passed = span_of(shape, strides) * size + (start if piece.packed is not None else 0)
    if passed > 16 * total + (1 << 16):
        raise Bad(path, "tensor %s is a small part of a large storage; save a copy of it alone, "
                  "made by .clone()" % shown(name))
    if dense and piece.packed is None and not negative:
        return Tensor(path, name, dtype, shape, piece.pos + start, total)
    return Tensor(path, name, dtype, shape, piece.pos, total,
                  View(start, strides, piece.packed, negative))


def read_archive(path, f, size):
    """(value, {key: Piece}) of torch.save's format since PyTorch 1.6: a zip archive in which
    X/data.pkl is the pickle and X/data/KEY a storage."""
    entries = read_zip(path, f, size)
    tops = [name[:-len("data.pkl")] for name in entries if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(tops) != 1:
        raise Bad(path, "is a zip archive, but none that torch.save wrote; unpack it first")
    top = tops[0]
    if top + "byteorder" in entries and piece_bytes(path, entries[top + "byteorder"]) != b"little":
        raise Bad(path, "was saved on a big-endian machine; save it again on another")
    value = Pickle(path, piece_bytes(path, entries[top + "data.pkl"])).load()
    data = top + "data/"
    return value, {name[len(data):]: e for name, e in entries.items() if name.startswith(data)}


def read_legacy(path, f, size):
    """(value, {key: Piece}) of torch.save's format before PyTorch 1.6: pickles of a magic number, a
    version, the machine's properties, the value and a list of keys; then for each of these a u64
    count and the numbers."""
    pickle = Pickle(path, read_at(f, 0, MAX_HEADER))
    if pickle.load() != 0x1950A86A20F9469CFC6C or pickle.load() != 1001:
        raise Bad(path, "is a pickle, but none that torch.save wrote")
    machine = pickle.load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Bad(path, "was saved on a big-endian machine; save it again on another")
    value, keys, places = pickle.load(), pickle.load(), {}
    pos = pickle.pos
    for key in keys if isinstance(keys, list) else []:
        storage = pickle.storages.get(key) if isinstance(key, str) else None
        count = read_at(f, pos, 8) if pos < size else b""
        if storage is None or key in places or count != struct.pack("<Q", storage.numel):
            raise Bad(path, "its storages are not those that its pickle tells of; copy it again")
        places[key] = Piece(pos + 8, storage.numel * ELEMENT[storage.dtype], None)
        pos += 8 + places[key].size
    if pos != size:
        raise Bad(path, "has %d bytes where its pickle tells of %d; copy it again" % (size, pos))
    return value, places


def read_pickled(path):
    """The tensors of a file of torch.save, either format."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        first = f.read(4)
        if first == b"PK\3\4":
            value, places = read_archive(path, f, size)
        elif first[:1] == b"\x80":
            value, places = read_legacy(path, f, size)
        else:
            raise Bad(path, "is no checkpoint of PyTorch 0.4 or later, or cut short (%d bytes); "
                      "copy it again, or load it there and torch.save it" % size)
    tensors = tensor_dict(path, value)
    return {name: locate(path, name, t, places.get(t.storage.key)) for name, t in tensors.items()}


# ---- checkpoint folders --------------------------------------------------------------------------

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.safetensors",
           "pytorch_model.bin", "diffusion_pytorch_model.bin")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
# What training leaves beside weights.
TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?|"
                      r"random_states_\d+|.*optim_states)\.(bin|pt|pth|pkl)")
# A tensor by which each part's names show what stands in front of them all, such as "module.", and
# tensors that take no part in what the model computes: angles and positions that follow from the
# configuration, masks; of training, the losses' networks, averaged copies, counts.
ANCHOR = {"llama": "model.norm.weight", "vqgan": "encoder.conv_in.weight"}
HARMLESS = {
    "llama": re.compile(r"model\.(layers\.\d+\.self_attn\.)?(rotary_emb\.((original_)?inv_freq|"
                        r"(cos|sin)_cached)|masked_bias|position_ids)"),
    "vqgan": re.compile(r"(loss|discriminator|perceptual_loss|lpips|ema|model_ema|ema_model)\..+|"
                        r"quantize\.(cluster_size|embed_avg|embedding\.(cluster_size|embed_avg)|"
                        r"codebook_used|usage|used|initted)|colorize")}


def read_weights(path):
    """The tensors of one file, which is what its first bytes say, whatever it is called."""
    size = input_size(path)
    with open(path, "rb") as f:
        first = f.read(64)
    if first.startswith(b"version https://git-lfs"):
        raise Bad(path, "only stands for a file of Git LFS; fetch that with git lfs pull")
    if first.startswith(b"GGUF"):
        raise Bad(path, "is a GGUF file, no checkpoint; a weights file of lvm is used as it is, "
                  "and --to-hf makes a checkpoint of one")
    if first.lstrip()[:1] == b"<":
        raise Bad(path, "is a web page, no weights: a download failed; fetch the file again")
    length = int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and length <= size - 8:
        return read_safetensors(path)
    if first[:1] == b"{":
        raise Bad(path, "is a JSON file, no weights; give its folder")
    named = path.endswith(".safetensors") and not first.startswith((b"PK\3\4", b"\x80\2"))
    return read_safetensors(path) if named else read_pickled(path)


def merge(paths):
    """The tensors of several files, none in two of them."""
    tensors = {}
    for path in paths:
        for name, tensor in read_weights(path).items():
            if name in tensors:
                raise Bad(path, "holds tensor %s, as another shard does" % shown(name))
            tensors[name] = tensor
    return tensors


def read_shards(index):
    """The tensors of all files that an index lists."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise Bad(index, "has no weight_map of tensor names to file names")
    paths = []
    for shard in sorted(set(where.values())):
        paths.append(os.path.join(os.path.dirname(index), shard))
        if os.path.basename(shard) != shard or "\0" in shard or not os.path.isfile(paths[-1]):
            raise Bad(index, "lists %s, which is no file beside it; copy it there" % shown(shard))
    tensors = merge(paths)
    for name, shard in where.items():
        if name not in tensors or os.path.basename(tensors[name].path) != shard:
            raise Bad(index, "says that tensor %s is in %s, where it is not; copy both again"
                      % (shown(name), shown(shard)))
    return tensors


def find_shards(folder, files):
    """The names of all shards of a checkpoint whose index is gone: they count themselves."""
    sets = {}
    for found in filter(None, map(SHARD.fullmatch, files)):
        stem, number, count, ending = found.groups()
        sets.setdefault((ending != "safetensors", stem, int(count), ending), set()).add(int(number))
    if not sets:
        return []
    (_, stem, count, ending), have = min(sets.items())
    names = ["%s-%05d-of-%05d.%s" % (stem, n + 1, count, ending) for n in range(min(count, 9999))]
    missing = [name for name in names if name not in files]
    if missing or len(have) != count:
        raise Bad(folder, "holds %d of %d shards; %s%s missing: copy the rest there"
                  % (len(have), count, shown((missing or names)[0]),
                     " and %d more are" % (len(missing) - 1) if len(missing) > 1 else " is"))
    return names


def read_checkpoint(folder, part):
    """(path of config.json, its keys, tensors) of a checkpoint: a folder, or one file in it."""
    if os.path.isdir(folder):
        return read_folder(folder, part)
    input_size(folder, "is no folder; give the one that holds config.json and model.safetensors")
    tensors = read_weights(folder)
    check_strangers(folder, part, tensors)
    config = os.path.join(os.path.dirname(folder), "config.json")
    raw = read_json(config)
    check_part(config, raw, part)
    return config, raw, tensors


def read_folder(folder, part):
    config = os.path.join(folder, "config.json")
    files = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    check_folder(folder, files)
    raw = None
    if "config.json" in files:
        raw = read_json(config)
        check_part(config, raw, part)
    tensors = folder_tensors(folder, files, raw)
    check_strangers(folder, part, tensors)
    return config, read_json(config) if raw is None else raw, tensors


def folder_tensors(folder, files, raw):
    """The tensors of a folder, sought where transformers and diffusers put them first."""
    for stem in WEIGHTS:
        path = os.path.join(folder, stem)
        if stem in files:
            return read_weights(path)
        if stem + ".index.json" in files:
            return read_shards(path + ".index.json")
    shards = find_shards(folder, files)
    if shards:
        return merge(os.path.join(folder, name) for name in shards)
    found = [name for name in files
             if name.endswith((".safetensors",) + PICKLED) and not TRAINING.fullmatch(name)]
    if not found:
        raise Bad(folder, without_weights(folder, files))
    if len(found) > 1 and raw is None:      # which, is not the first thing that is wrong
        read_json(os.path.join(folder, "config.json"))
    if len(found) > 1:
        raise Bad(folder, "holds %s and more, but no pytorch_model.bin and no index of several "
                  "files; name the right file" % shown(found[0]))
    return read_weights(os.path.join(folder, found[0]))


# ---- what a wrong folder is ----------------------------------------------------------------------

ORIGINAL = "give the checkpoint that it was made from, in F32, F16 or BF16: --type quantises it"


def check_folder(folder, files):
    """Refuses folders that their files' names show to be no checkpoint of either part."""
    if not files:
        raise Bad(folder, "is empty; give the folder of a downloaded checkpoint")
    if "adapter_config.json" in files:
        whole = any(name in files or name + ".index.json" in files for name in WEIGHTS)
        raise adapter(folder, folder, "beside a whole model, whose file can be named alone" if whole
                      else "no whole model")
    if "model_index.json" in files:
        raise Bad(folder, "is a pipeline of diffusers, several models; give the folder of one of "
                  "them: open-muse's VQGANModel, as --vqgan")
    for mark, text in (
            ("model_config.pt", "is a checkpoint of InternLM's training; convert it with DeLVM's "
             "tools/convert2hf.py first"),
            ("params.json", "is a checkpoint in Meta's layout; convert it with transformers' "
             "convert_llama_weights_to_hf.py first")):
        if mark in files and "config.json" not in files:
            raise Bad(folder, text)
    inner = [name for name in files if os.path.isfile(os.path.join(folder, name, "config.json"))]
    if inner and "config.json" not in files:
        raise Bad(folder, "holds no config.json itself, but its folder %s does%s; give that folder"
                  % (shown(inner[-1]), ", as %d more do" % (len(inner) - 1) if inner[1:] else ""))


def adapter(where, folder, text):
    """The fault of a folder or file that is an adapter."""
    raw = read_json(os.path.join(folder, "adapter_config.json"))
    return Bad(where, "is a %s adapter of the model %s, %s; give it as --lora, in a run of its "
               "own, and that model as --llama"
               % (shown(str(raw.get("peft_type", "LORA"))).replace("LORA", "LoRA"),
                  spelt(raw.get("base_model_name_or_path")), text))


def without_weights(folder, files):
    """What a folder without weights is, and what to do."""
    training = [name for name in files if TRAINING.fullmatch(name)]
    for pattern, text in (
            (r"global_step.*|zero_to_fp32\.py", "is a checkpoint of DeepSpeed, %s; run its "
             "zero_to_fp32.py first"),
            (r".*\.distcp", "is a checkpoint of several processes, %s; join it with PyTorch's "
             "torch.distributed.checkpoint.format_utils first"),
            (r"streaming_.*|.*\.msgpack", "is a checkpoint of JAX, %s; export it to PyTorch first "
             "(EasyLM: convert_easylm_to_hf)"),
            (r".*\.h5", "is a checkpoint of TensorFlow, %s; export it to PyTorch first"),
            (r".*\.gguf", "holds a GGUF file, %s, no checkpoint; give the one it was made from")):
        for name in files:
            if re.fullmatch(pattern, name):
                return text % shown(name)
    if training:
        return ("holds what training leaves (%s), but no weights; give the folder that holds "
                "model.safetensors or pytorch_model.bin" % shown(training[0]))
    if "config.json" not in files:
        return "holds no config.json and no weights; give the folder of a downloaded checkpoint"
    return ("holds no model.safetensors or pytorch_model.bin; give the folder of a downloaded "
            "checkpoint")


def check_part(path, raw, part):
    """Refuses a configuration of something else than this part."""
    quantised = raw.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise Bad(path, "quantization_config is there: the checkpoint is quantised (%s); %s"
                  % (spelt(method), ORIGINAL))
    llama = any(key in raw for key in ("model_type", "hidden_size", "num_attention_heads"))
    vqgan = any(key in raw for key in ("_class_name", "hidden_channels", "z_channels"))
    if part == "llama" and vqgan and not llama:
        raise Bad(path, "describes a tokenizer (%s); give it as --vqgan, and the transformer as "
                  "--llama" % spelt(raw.get("_class_name", "VQGANModel")))
    if part == "vqgan" and llama and not vqgan:
        raise Bad(path, "describes a transformer (%s); give it as --llama, and the tokenizer as "
                  "--vqgan" % spelt(raw.get("model_type", "llama")))
    for key in ("text_config", "llm_config", "llama_config", "language_config"):
        if part == "llama" and isinstance(raw.get(key), dict) and "hidden_size" not in raw:
            raise Bad(path, "keeps the transformer under %s, so it describes a model of several "
                      "parts; save the LlamaForCausalLM in it alone" % key)


# Names that only a checkpoint of another kind has, for which part, and what it is.
STRANGERS = (
    (r".*\.(qweight|qzeros|weight_packed|SCB|absmax|quant_map)", "llama",
     "is quantised (GPTQ, AWQ or the like: tensor %s); " + ORIGINAL),
    (r".*\.lora_(A|B|embedding_[AB])\..*", "llama", "is a LoRA adapter (tensor %s), no whole "
     "model; give its folder as --lora, in a run of its own, and its model as --llama"),
    (r"(.*\.)?tok_embeddings\.weight", "llama", "is a checkpoint in Meta's layout (tensor %s); "
     "convert it with transformers' convert_llama_weights_to_hf.py first"),
    (r"(.*\.)?encoder\.conv_in\.weight", "llama", "is a tokenizer (tensor %s); give it as --vqgan, "
     "and the transformer as --llama"),
    (r"(.*\.)?layers\.\d+\.self_attn\.q_proj\.weight", "vqgan", "is a transformer (tensor %s); "
     "give it as --llama, and the tokenizer as --vqgan"),
    (r"(.*\.)?encoder\.conv_blocks\..*", "vqgan", "is a tokenizer of LlamaGen (tensor %s); only "
     "open-muse's VQGANModel can be converted: give the tokenizer that the transformer was trained "
     "with"),
    (r"(.*\.)?encoder\.down_blocks\..*", "vqgan", "is a tokenizer of diffusers (tensor %s); only "
     "open-muse's VQGANModel can be converted: give the tokenizer that the transformer was trained "
     "with"),
)
TAMING = ("is a tokenizer of taming-transformers (tensor %s), and has no config.json; only "
          "open-muse's VQGANModel can be converted: give the tokenizer that the transformer was "
          "trained with")


def check_strangers(where, part, tensors):
    """Refuses a checkpoint that its tensors' names show to be of another kind."""
    folder = where if os.path.isdir(where) else os.path.dirname(where)
    for pattern, wrong_part, text in STRANGERS:
        for name in tensors if part == wrong_part else ():
            if re.fullmatch(pattern, name):
                if ".lora_" in name and os.path.isfile(os.path.join(folder, "adapter_config.json")):
                    raise adapter(where, folder, "no whole model")
                raise Bad(where, text % shown(name))
    if part == "vqgan" and not os.path.isfile(os.path.join(folder, "config.json")):
        for name in tensors:
            if re.fullmatch(r"loss\..*|(.*\.)?encoder\.down\.\d+\.block\..*", name):
                raise Bad(where, TAMING % shown(name))


def own_tensors(where, tensors, part, notes):
    """The part's own tensors, without the words that stand before all their names and without what
    is harmless, of which a note tells."""
    anchor, harmless = ANCHOR[part], HARMLESS[part]
    found = [name[:-len(anchor)] for name in tensors if name.endswith("." + anchor)]
    found.sort(key=len)
    prefix = found[0] if found and anchor not in tensors else ""
    if any(not harmless.fullmatch(other[len(prefix):] + anchor) for other in found[1:]):
        prefix = ""                         # several models: their names will be told
    own, passed = {}, []
    for name, tensor in tensors.items():
        short = name[len(prefix):] if name.startswith(prefix) else name
        if harmless.fullmatch(short):
            passed.append(name)
        elif name.startswith(prefix):
            own[short] = tensor
        else:
            raise Bad(where, "tensor %s does not begin with %s as others do; remove what does not "
                      "belong to this part" % (shown(name), shown(prefix)))
    if passed:
        notes.append("%s: passed over, as the model does not compute with them: %s%s"
                     % (shown_path(where), shown(passed[0]),
                        " and %d more" % (len(passed) - 1) if passed[1:] else ""))
    return own


# ---- configurations ------------------------------------------------------------------------------

GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY = 4, 5, 6, 7, 8, 9

# A key: its name in config.json and in the weights file, its type there, config.json's default
# (None: it must be given), bounds, and how many an array may hold. The bounds are lvm.c's, whose
# tables of chapter 4 hold the same numbers: what is written here can be opened there.
Key = collections.namedtuple("Key", "hf gguf kind default low high most", defaults=(None,))


def whole_key(hf, gguf, default=None, low=1, high=1 << 20):
    return Key(hf, "lvm." + gguf, GGUF_U32, default, low, high)


LLAMA_KEYS = (
    whole_key("max_position_embeddings", "context_length", 2048),
    whole_key("hidden_size", "embedding_length", high=1 << 16),
    whole_key("num_hidden_layers", "block_count", high=1024),
    whole_key("intermediate_size", "feed_forward_length", high=1 << 18),
    whole_key("vocab_size", "vocab_size"),
    whole_key("num_attention_heads", "attention.head_count", high=1024),
    whole_key("num_key_value_heads", "attention.head_count_kv", high=1024),
    Key("rms_norm_eps", "lvm.attention.layer_norm_rms_epsilon", GGUF_F32, 1e-6, 1e-30, 1),
    Key("rope_theta", "lvm.rope.freq_base", GGUF_F32, 10000.0, 1, 1e12),
)
TOKEN_KEYS = (                              # -1: none
    whole_key("bos_token_id", "bos_token_id", low=-1),
    whole_key("eos_token_id", "eos_token_id", low=-1),
)
VQGAN_KEYS = (
    whole_key("resolution", "vq.resolution", 256, high=4096),
    whole_key("hidden_channels", "vq.hidden_channels", 128, high=4096),
    Key("channel_mult", "lvm.vq.channel_mult", GGUF_ARRAY, [1, 1, 2, 2, 4], 1, 64, 8),
    whole_key("num_res_blocks", "vq.num_res_blocks", 2, high=8),
    Key("attn_resolutions", "lvm.vq.attn_resolutions", GGUF_ARRAY, [16], 0, 1 << 20, 16),
    Key("no_attn_mid_block", "lvm.vq.no_attn_mid_block", GGUF_BOOL, False, 0, 1),
    whole_key("z_channels", "vq.z_channels", 256, high=4096),
    whole_key("num_embeddings", "vq.num_embeddings", 1024),
    whole_key("quantized_embed_dim", "vq.quantized_embed_dim", 256, high=4096),
    Key("resample_with_conv", "lvm.vq.resample_with_conv", GGUF_BOOL, True, 0, 1),
)


def fits(key, value):
    """Whether this is what the key must be. Python's True is an int too, which no file means."""
    if key.kind == GGUF_BOOL or isinstance(value, bool):
        return key.kind == GGUF_BOOL and isinstance(value, bool)
    if key.kind == GGUF_ARRAY:
        number = key._replace(kind=GGUF_U32)
        return isinstance(value, list) and len(value) <= key.most and (
            all(fits(number, v) for v in value))
    if key.kind == GGUF_F32:                # bounds hold for what the weights file will say
        return isinstance(value, (int, float)) and abs(value) < 3e38 and (
            key.low <= shortest(value) <= key.high)
    return isinstance(value, int) and key.low <= value <= key.high


def shortest(value):
    """A number as the weights file's float32 holds it, in the fewest digits: 1e-06 again, say."""
    single = struct.pack("<f", value)
    spellings = (float("%.*g" % (digits, value)) for digits in range(1, 18))
    return next(v for v in spellings if struct.pack("<f", v) == single)


def read_config(path, raw, keys, side):
    """The checked values of keys, under config.json's names; side is raw's: "hf" or "gguf"."""
    config = {}
    for key in keys:
        name = getattr(key, side)
        value = raw.get(name)
        if value is None and side == "hf":
            value = key.default
        if not fits(key, value):
            wanted = {GGUF_BOOL: "true or false", GGUF_F32: "a number",
                      GGUF_U32: "a whole number",
                      GGUF_ARRAY: "a list of at most %s whole numbers" % key.most}
            form = " from %g to %g" if key.kind == GGUF_F32 else " from %d to %d"
            bounds = "" if key.kind == GGUF_BOOL else form % (key.low, key.high)
            raise Bad(path, "%s is %s; it must be %s%s" % (
                name, "missing" if value is None else spelt(value), wanted[key.kind], bounds))
        config[key.hf] = shortest(value) if key.kind == GGUF_F32 else value
    return config


def find_rope_theta(path, raw):
    """The base of the rotary angles: at the top level, or where transformers 5 puts it."""
    found = [raw.get("rope_theta")]
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict) or "factor" in rope or (
                any(isinstance(value, dict) for value in rope.values())) or (
                rope.get("rope_type", rope.get("type", "default")) != "default"
                or rope.get("partial_rotary_factor", 1.0) != 1.0):
            raise Bad(path, "%s is %s; only the default rotary embedding is supported"
                      % (key, spelt(rope)))
        found.append(rope.get("rope_theta"))
    found = [theta for theta in found if theta is not None]
    if any(theta != found[0] for theta in found):
        raise Bad(path, "gives two values for rope_theta; remove the wrong one")
    return found[0] if found else None


def only(path, raw, key, wanted):
    return Bad(path, "%s is %s; only %s is supported" % (key, spelt(raw.get(key)), spelt(wanted)))


# Keys of LLaMA's relatives that change what is computed, and the value with which they do not. What
# LlamaForCausalLM itself would pass over is refused too: whoever wrote it meant another model.
LLAMA_ONLY = (
    ("mlp_bias", False), ("partial_rotary_factor", 1.0), ("rotary_pct", 1.0), ("rope_pct", 1.0),
    ("rope_interleaved", False), ("rope_interleave", False), ("alibi", False),
    ("attention_chunk_size", None), ("clip_qkv", None), ("qk_layernorm", False),
    ("use_qk_norm", False), ("qk_norm", False), ("parallel_attn", False),
    ("use_parallel_residual", False), ("attention_multiplier", None), ("residual_multiplier", 1.0),
    ("embedding_multiplier", 1.0), ("logits_scaling", 1.0), ("logit_scale", 1.0),
    ("scale_emb", 1.0), ("scale_depth", None), ("attn_logit_softcapping", None),
    ("final_logit_softcapping", None), ("query_pre_attn_scalar", None), ("no_rope_layers", None),
    ("num_local_experts", None), ("num_experts", None), ("n_routed_experts", None),
)
VQGAN_ONLY = (
    ("_class_name", "VQGANModel"), ("num_channels", 3), ("double_z", False), ("act_fn", "silu"),
    ("norm_num_groups", 32), ("l2_norm", False), ("codebook_l2_norm", False),
)


def check_window(path, raw):
    """Attention to the last few keys alone is another model, where the context is longer."""
    window, context = raw.get("sliding_window"), raw.get("max_position_embeddings") or 2048
    if raw.get("use_sliding_window") is False or window is None:
        return
    if not isinstance(window, int) or not isinstance(context, int) or window < context:
        raise only(path, raw, "sliding_window", None)


def check_family(path, raw):
    """config.json of a class that computes as LlamaForCausalLM does, in that class's terms."""
    names, kind = raw.get("architectures"), raw.get("model_type")
    for wanted, family in (("LlamaForCausalLM", "llama"), ("InternLMForCausalLM", "internlm")):
        if (names or [wanted]) == [wanted] and kind in ((None, family) if names else (family,)):
            break
    else:
        raise Bad(path, "describes %s of type %s; only LlamaForCausalLM of type llama and "
                  "InternLMForCausalLM of type internlm can be converted"
                  % (spelt(names), spelt(kind)))
    if family == "internlm":        # DeLVM's exports: biases by another name, angles of base 10000
        for key, wanted in (("rotary", None), ("rope_theta", 10000.0)):
            if raw.get(key) not in (wanted, None):
                raise only(path, raw, key, wanted)
        raw = dict(raw, attention_bias=raw.get("bias", True))
    return raw


def check_llama_json(path, raw):
    """A config.json with later spellings as the usual ones; arithmetic unlike lvm's is refused."""
    raw = check_family(path, raw)
    if raw.get("hidden_act") not in ("silu", "swish", None):    # two names of one function
        raise only(path, raw, "hidden_act", "silu")
    for key, wanted in LLAMA_ONLY:
        if raw.get(key) not in (wanted, None):
            raise only(path, raw, key, wanted)
    check_window(path, raw)
    for key in ("tie_word_embeddings", "attention_bias"):
        if raw.get(key) not in (True, False, None):
            raise Bad(path, "%s is %s; it must be true or false" % (key, spelt(raw[key])))
    raw = dict(raw, rope_theta=find_rope_theta(path, raw))
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = raw.get("num_attention_heads")
    return raw


def llama_config(path, raw, side):
    """The transformer's sizes."""
    config = read_config(path, raw, LLAMA_KEYS, side)
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    if config["hidden_size"] % (2 * heads):
        raise Bad(path, "%d attention heads cannot share hidden size %d; each needs a whole, even "
                  "number" % (heads, config["hidden_size"]))
    if heads % config["num_key_value_heads"]:
        raise Bad(path, "%d key-value heads do not divide %d attention heads"
                  % (config["num_key_value_heads"], heads))
    if side == "hf" and raw.get("head_dim") not in (None, head_dim):
        raise only(path, raw, "head_dim", head_dim)
    return config


def vqgan_config(path, raw, side):
    """The tokenizer's configuration."""
    if side == "hf":
        for key, wanted in VQGAN_ONLY:
            if raw.get(key, wanted) != wanted:
                raise only(path, raw, key, wanted)
        if isinstance(raw.get("attn_resolutions"), int):
            raw = dict(raw, attn_resolutions=[raw["attn_resolutions"]])
    config = read_config(path, raw, VQGAN_KEYS, side)
    if not config["channel_mult"]:
        raise Bad(path, "channel_mult is empty; it must have a number for each resolution")
    halvings = len(config["channel_mult"]) - 1
    if config["resolution"] % (1 << halvings):
        raise Bad(path, "resolution %d does not halve %d times" % (config["resolution"], halvings))
    if config["hidden_channels"] % 32:
        raise Bad(path, "hidden_channels %d is no multiple of 32, the number of normalised groups"
                  % config["hidden_channels"])
    return config


# ---- the two name maps ---------------------------------------------------------------------------

# Checkpoint name, weights file name, shape. The letters: v vocabulary, d hidden size, f width of
# the feed-forward part, q all query heads, k all key (or value) heads. Biases are optional.
LLAMA_TOP = (
    ("model.embed_tokens.weight", "token_embd.weight", "vd"),
    ("model.norm.weight", "output_norm.weight", "d"),
    ("lm_head.weight", "output.weight", "vd"),
)
LLAMA_LAYER = (
    ("input_layernorm.weight", "attn_norm.weight", "d"),
    ("self_attn.q_proj.weight", "attn_q.weight", "qd"),
    ("self_attn.k_proj.weight", "attn_k.weight", "kd"),
    ("self_attn.v_proj.weight", "attn_v.weight", "kd"),
    ("self_attn.o_proj.weight", "attn_output.weight", "dq"),
    ("self_attn.q_proj.bias", "attn_q.bias", "q"),
    ("self_attn.k_proj.bias", "attn_k.bias", "k"),
    ("self_attn.v_proj.bias", "attn_v.bias", "k"),
    ("self_attn.o_proj.bias", "attn_output.bias", "d"),
    ("post_attention_layernorm.weight", "ffn_norm.weight", "d"),
    ("mlp.gate_proj.weight", "ffn_gate.weight", "fd"),
    ("mlp.up_proj.weight", "ffn_up.weight", "fd"),
    ("mlp.down_proj.weight", "ffn_down.weight", "df"),
)


def llama_specs(config, tied):
    """Every tensor of the transformer; with tied embeddings there is no output.weight."""
    hidden = config["hidden_size"]
    head_dim = hidden // config["num_attention_heads"]
    sizes = {"v": config["vocab_size"], "d": hidden, "f": config["intermediate_size"], "q": hidden,
             "k": head_dim * config["num_key_value_heads"]}

    def spec(row, hf, gguf):
        group = row[1] if row[1].endswith(".bias") else None
        return Spec(hf + row[0], gguf + row[1], tuple(sizes[letter] for letter in row[2]), group)
    specs = [spec(row, "", "") for row in LLAMA_TOP if not (tied and row[1] == "output.weight")]
    for n in range(config["num_hidden_layers"]):
        specs += [spec(row, "model.layers.%d." % n, "blk.%d." % n) for row in LLAMA_LAYER]
    return specs


def conv(name, inputs, outputs, kernel):
    return [(name + ".weight", (outputs, inputs, kernel, kernel)), (name + ".bias", (outputs,))]


def group_norm(name, channels):
    return [(name + ".weight", (channels,)), (name + ".bias", (channels,))]


def res_block(name, inputs, outputs):
    shortcut = conv(name + ".nin_shortcut", inputs, outputs, 1) if inputs != outputs else []
    return (group_norm(name + ".norm1", inputs) + conv(name + ".conv1", inputs, outputs, 3)
            + group_norm(name + ".norm2", outputs) + conv(name + ".conv2", outputs, outputs, 3)
            + shortcut)


def attention(name, channels):
    params = group_norm(name + ".norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        params += conv(name + "." + part, channels, channels, 1)
    return params


def level(name, inputs, outputs, blocks, attends, resample):
    """One resolution: residual blocks, attention after each, a convolution to resample, if asked.
    The class never runs the attention of a level that has just one, but it has the parameters."""
    params = []
    for i in range(blocks):
        params += res_block("%s.block.%d" % (name, i), inputs, outputs)
        params += attention("%s.attn.%d" % (name, i), outputs) if attends else []
        inputs = outputs
    if resample:
        params += conv("%s.%s.conv" % (name, resample), inputs, inputs, 3)
    return params


def middle(name, channels, attends):
    return (res_block(name + ".block_1", channels, channels)
            + (attention(name + ".attn_1", channels) if attends else [])
            + res_block(name + ".block_2", channels, channels))


def vqgan_specs(config):
    """Every parameter of the class for this configuration; the weights file's names add "vq."."""
    width = [config["hidden_channels"] * mult for mult in config["channel_mult"]]
    first, last, resolution = config["hidden_channels"], len(width) - 1, config["resolution"]
    z, code, blocks = (config[k] for k in ("z_channels", "quantized_embed_dim", "num_res_blocks"))
    attends, with_conv = not config["no_attn_mid_block"], config["resample_with_conv"]

    params = conv("encoder.conv_in", 3, first, 3)
    for i, here in enumerate(width):
        params += level("encoder.down.%d" % i, width[i - 1] if i else first, here, blocks,
                        (resolution >> i) in config["attn_resolutions"],
                        "downsample" if with_conv and i < last else None)
    params += middle("encoder.mid", width[last], attends)
    params += group_norm("encoder.norm_out", width[last])
    params += conv("encoder.conv_out", width[last], z, 3) + conv("quant_conv", z, code, 1)
    params += [("quantize.embedding.weight", (config["num_embeddings"], code))]
    params += conv("post_quant_conv", code, z, 1) + conv("decoder.conv_in", z, width[last], 3)
    params += middle("decoder.mid", width[last], attends)
    for i, here in enumerate(width):
        params += level("decoder.up.%d" % i, width[min(i + 1, last)], here, blocks + 1,
                        (resolution >> i) in config["attn_resolutions"],
                        "upsample" if with_conv and i else None)
    params += group_norm("decoder.norm_out", width[0]) + conv("decoder.conv_out", width[0], 3, 3)
    return [Spec(name, "vq." + name, shape, None) for name, shape in params]


def channels_last(shape):
    """The shape in the weights file of a tensor of the checkpoint."""
    return (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape


TIED = ("lm_head.weight", "model.embed_tokens.weight")
UNTIED = " (where both are one matrix, config.json says so: tie_word_embeddings true)"


def match(where, specs, tensors, side, allowed):
    """Pairs (spec, tensor) if the tensors are just what specs ask for; else names all faults."""
    groups = {spec.group for spec in specs if spec.group and getattr(spec, side) in tensors}
    pairs, faults, known = [], [], set()
    for spec in specs:
        name = getattr(spec, side)
        wanted = list(channels_last(spec.shape) if side == "gguf" else spec.shape)
        tensor = tensors.get(name)
        known.add(name)
        if tensor is not None:
            pairs.append((spec, tensor))
            if list(tensor.shape) != wanted:
                faults.append("%s is %s instead of %s" % (name, list(tensor.shape), wanted))
            elif tensor.dtype not in allowed:
                faults.append("%s has type %s, not %s"
                              % (name, shown(tensor.dtype), ", ".join(allowed)))
        elif spec.group is None or spec.group in groups:
            faults.append("%s %s is missing%s" % (name, wanted, UNTIED if name in TIED else ""))
    faults += ["%s is unexpected" % shown(name) for name in tensors if name not in known]
    if faults:
        named = faults[:MAX_NAMED] + ["and %d more" % n for n in [len(faults) - MAX_NAMED] if n > 0]
        raise Bad(where, "its tensors are not those that its configuration calls for:\n  "
                  + "\n  ".join(named))
    return pairs


# ---- adapters ------------------------------------------------------------------------------------

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Keys of adapter_config.json that name LoRA's form, and those that do not matter once it is trained.
# By any other that is neither empty nor false more is learnt than two matrices, or otherwise.
LORA_ONLY = (("peft_type", "LORA"), ("bias", "none"))
LORA_HARMLESS = {
    "r", "lora_alpha", "use_rslora", "init_lora_weights", "peft_type", "bias", "peft_version",
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config",
    "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying", "unsloth_fixed",
}
# Beginnings that change the model's own weights too, so that its adapter belongs to no model.
LORA_BEGINNINGS = ("pissa", "olora", "loftq", "corda", "lora_ga")
LORA_KEYS = (
    Key("r", "", GGUF_U32, None, 1, 1 << 16),
    Key("lora_alpha", "adapter.lora.alpha", GGUF_F32, None, 1e-30, 1e30),
)
LORA_NAME = re.compile(r"(?:base_model\.model\.)?model\.layers\.(0|[1-9]\d{0,3})\.(\w+\.\w+)"
                       r"\.lora_([AB])(?:\.default)?\.weight")
LORA_HF = "base_model.model.model.layers.%d.%s.lora_%s.weight"
# A matrix that an adapter can be on: its place in a layer, names there without ".weight".
LORA_ON = {row[0][:-7]: (place, row[1][:-7]) for place, row in enumerate(LLAMA_LAYER)
           if len(row[2]) == 2}


def read_adapter(where):
    """(path of adapter_config.json, its keys, tensors) of a folder, or of one file in it."""
    folder = where if os.path.isdir(where) else os.path.dirname(where)
    config = os.path.join(folder, ADAPTER_FILES[0])
    if not os.path.isdir(where):
        input_size(where, "is no folder; give the one that holds adapter_config.json and "
                   "adapter_model.safetensors")
        return config, read_json(config), read_weights(where)
    if not os.path.isfile(config):
        raise Bad(where, "holds no adapter_config.json; give the folder of a LoRA adapter as PEFT "
                  "saves it (a whole model is given as --llama)")
    for name in (ADAPTER_FILES[1], "adapter_model.bin"):
        path = os.path.join(where, name)
        if os.path.isfile(path):
            return config, read_json(config), read_weights(path)
    raise Bad(where, "holds no adapter_model.safetensors and no adapter_model.bin")


def adapter_config(path, raw):
    """Rank and alpha of a plain LoRA adapter."""
    for key, wanted in LORA_ONLY:
        if raw.get(key, wanted) != wanted:
            raise only(path, raw, key, wanted)
    for key in raw:
        if raw[key] and key not in LORA_HARMLESS:
            raise Bad(path, "%s is %s; only plain LoRA is supported, without it"
                      % (shown(key), spelt(raw[key])))
    beginning = raw.get("init_lora_weights")
    if isinstance(beginning, str) and beginning.lower().startswith(LORA_BEGINNINGS):
        raise Bad(path, "init_lora_weights is %s, which changes the model's own weights too; save "
                  "the adapter as plain LoRA (peft: path_initial_model_for_weight_conversion)"
                  % spelt(beginning))
    config = read_config(path, raw, LORA_KEYS, "hf")
    if raw.get("use_rslora"):               # scales by alpha / sqrt(r), not by alpha / r
        config["lora_alpha"] = shortest(config["lora_alpha"] * math.sqrt(config["r"]))
    return config


def adapter_order(found):
    """By layer, there as the matrices stand in a weights file, A before B."""
    layer, matrix, half = found
    return layer, LORA_ON[matrix][0], half


def adapter_halves(where, tensors, rank, allowed):
    """The tensors of adapters under (layer, matrix, "A" or "B"), or all their faults."""
    found, faults = {}, []
    for name, t in tensors.items():
        m = LORA_NAME.fullmatch(name)
        if m is None or m[2] not in LORA_ON:
            faults.append("%s is no half of an adapter on a matrix of LLaMA's layers" % shown(name))
        elif len(t.shape) != 2 or t.shape["AB".index(m[3])] != rank:
            faults.append("%s is %s; its rank should be %d" % (shown(name), list(t.shape), rank))
        elif t.dtype not in allowed:
            faults.append("%s has type %s, not %s" % (shown(name), shown(t.dtype),
                                                      ", ".join(allowed)))
        elif (int(m[1]), m[2], m[3]) in found:
            faults.append("%s stands there under two names" % shown(name))
        else:
            found[int(m[1]), m[2], m[3]] = t
    for layer, matrix, half in () if faults else sorted(found):
        other = "AB"["BA".index(half)]
        if (layer, matrix, other) not in found:
            faults.append("%s is missing" % (LORA_HF % (layer, matrix, other)))
    if faults or not found:
        named = faults[:MAX_NAMED] + ["and %d more" % n for n in [len(faults) - MAX_NAMED] if n > 0]
        raise Bad(where, "its tensors are not those of plain LoRA:\n  " + "\n  ".join(named)
                  if faults else "holds no adapters")
    return found


def adapter_jobs(where, config, tensors):
    """Jobs that write adapters as lvm reads them."""
    found = adapter_halves(where, tensors, config["r"], FLOATS)
    return [Job("blk.%d.%s.weight.lora_%s" % (layer, LORA_ON[matrix][1], half.lower()), t.dtype,
                t.shape, t, None)
            for (layer, matrix, half), t in sorted(found.items(),
                                                   key=lambda item: adapter_order(item[0]))]


def adapter_folder(path, keys, tensors):
    """(adapter_config.json, jobs) of a file of adapters; tensors in the order of their names."""
    names = {gguf: matrix for matrix, (_, gguf) in LORA_ON.items()}
    renamed, ranks = {}, set()
    for name, t in tensors.items():
        m = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(\w+)\.weight\.lora_([ab])", name)
        if m is None or m[2] not in names or len(t.shape) != 2:
            raise Bad(path, "tensor %s is no half of an adapter" % shown(name))
        renamed[LORA_HF % (int(m[1]), names[m[2]], m[3].upper())] = t
        ranks.add(t.shape["ab".index(m[3])])
    if len(ranks) > 1:
        raise Bad(path, "has adapters of ranks %s; only one rank for all can be written"
                  % ", ".join(map(str, sorted(ranks))))
    if keys.get("adapter.type") != "lora":
        raise only(path, keys, "adapter.type", "lora")
    rank = max(ranks, default=0)
    config = read_config(path, keys, LORA_KEYS[1:], "gguf")
    found = adapter_halves(path, renamed, rank, FLOATS)
    alpha = config["lora_alpha"]
    layers = sorted({layer for layer, _, _ in found})
    jobs = [Job(name, t.dtype, t.shape, t, None) for name, t in sorted(renamed.items())]
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
            "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none",
            "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
            "target_modules": sorted({matrix.split(".")[1] for _, matrix, _ in found}),
            "layers_to_transform": None if layers == list(range(len(layers))) else layers,
            "inference_mode": True}, jobs


# ---- moving numbers ------------------------------------------------------------------------------

def file_bytes(path, pos, left, piece):
    """So many bytes of a file, in pieces."""
    with open(path, "rb") as f:
        f.seek(pos)
        while left:
            data = f.read(min(left, piece))
            if not data:
                raise Bad(path, "became shorter while it was read; try again")
            left -= len(data)
            yield data


def chunks(tensor):
    """The tensor's bytes in pieces of PIECE elements."""
    elements, size = TYPES[tensor.dtype][1:]
    piece = PIECE // elements * size
    if tensor.view is None:
        return file_bytes(tensor.path, tensor.pos, tensor.nbytes, piece)
    pieces = regroup(view_bytes(tensor, size), piece)
    return (negated(data, size) for data in pieces) if tensor.view.negative else pieces


SIGN = bytes(b ^ 0x80 for b in range(256))


def negated(data, size):
    """Floats with the other sign: the top bit of each one's last byte."""
    out = bytearray(data)
    out[size - 1::size] = out[size - 1::size].translate(SIGN)
    return bytes(out)


def regroup(pieces, size):
    """The same bytes in pieces of one size."""
    held = bytearray()
    for data in pieces:
        held += data
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def view_bytes(tensor, size):
    """The bytes of a tensor in a storage, in any pieces; with gaps, all it spans is held."""
    start, strides, packed, _ = tensor.view
    span = span_of(tensor.shape, strides) * size
    if packed is None:
        pieces = file_bytes(tensor.path, tensor.pos + start, span, PIECE)
    else:
        pieces = inflate(tensor.path, tensor.pos, packed, start, span)
    if is_dense(tensor.shape, strides):
        return pieces
    data = memoryview(b"".join(pieces)).cast({2: "H", 4: "I"}[size])
    dims = [(n, step) for n, step in zip(tensor.shape, strides) if n != 1]
    return rows_of(data, 0, dims)


def rows_of(data, at, dims):
    """The innermost rows of a tensor that begins at an element: dims are its (size, stride)."""
    (n, step), inner = dims[0], dims[1:]
    if inner:
        for i in range(n):
            yield from rows_of(data, at + i * step, inner)
    else:
        row = data[at:at + (n - 1) * step + 1:step or 1].tobytes()
        yield row if step else row * n


def unpacked(path, pos, packed):
    """All that a deflated piece of a file holds, in any pieces."""
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for data in file_bytes(path, pos, packed, PIECE):
            while data:
                yield machine.decompress(data, PIECE)
                data = machine.unconsumed_tail
        yield machine.flush()
    except zlib.error:
        raise Bad(path, "holds compressed data that is damaged; copy it again") from None


def inflate(path, pos, packed, skip, left):
    """So many of the bytes that a deflated piece of a file holds, behind those to skip."""
    for out in unpacked(path, pos, packed):
        skipped = min(skip, len(out))
        out = out[skipped:skipped + left]
        skip, left = skip - skipped, left - len(out)
        yield out
        if not left:
            return
    raise Bad(path, "holds less compressed data than it says; copy it again")


def floats(values):
    """float32 bytes, little-endian on every machine."""
    out = array.array("f", values)
    if sys.byteorder == "big":
        out.byteswap()
    return out.tobytes()


def widen(data, dtype):
    """F32 from any other type, exactly: 11 bits of a scale and 8 of a quant fit into F32's 24."""
    if dtype == "F32":
        return data
    if dtype == "BF16":                 # the upper half of a float32
        out = bytearray(2 * len(data))
        out[2::4], out[3::4] = data[0::2], data[1::2]
        return bytes(out)
    if dtype == "F16":
        return floats(struct.unpack("<%de" % (len(data) // 2), data))
    if dtype == "Q8_0":                 # f16 d, 32 x int8 q: d * q
        return floats([d * q for d, *quants in struct.iter_unpack("<e32b", data) for q in quants])
    out = []                            # Q4_0: f16 d, 16 bytes: element i low nibble, 16 + i high
    for d, *pairs in struct.iter_unpack("<e16B", data):
        value = [d * (q - 8) for q in range(16)]
        out += [value[q & 15] for q in pairs]
        out += [value[q >> 4] for q in pairs]
    return floats(out)


def narrow(data, dtype):
    """F32 bytes as dtype, or None where that would change a bit of any value."""
    if dtype == "F32":
        return data
    out = bytearray(len(data) // 2)
    if dtype == "BF16":
        out[0::2], out[1::2] = data[2::4], data[3::4]
    else:
        n = len(data) // 4
        try:
            struct.pack_into("<%de" % n, out, 0, *struct.unpack("<%df" % n, data))
        except OverflowError:
            return None
    return bytes(out) if widen(out, dtype) == data else None


def recode(data, source, target):
    if source == target:
        return data
    return widen(data, source) if target == "F32" else narrow(data, target)


def swap_inner(data, size, rows, a, b):
    """Every one of the rows, an [a, b] matrix of size-byte elements, transposed to [b, a]."""
    code = {2: "H", 4: "I"}[size]
    source, out = array.array(code, data), array.array(code)
    for start in range(0, rows * a * b, a * b):
        row = source[start:start + a * b]
        if b < a:
            for j in range(b):
                out.extend(row[j::b])
        else:
            transposed = array.array(code, bytes(size * a * b))
            for i in range(a):
                transposed[i::a] = row[i * b:(i + 1) * b]
            out.extend(transposed)
    return out.tobytes()


@functools.lru_cache(None)
def below(top):
    """The bytes in which a float can end that is smaller, whatever its sign, than one with top."""
    return bytes(b for b in range(256) if b & 0x7F < top)


def count_beyond(data, dtype, limit):
    """How many floats are NaN, infinite, or as large as limit. Without their signs, floats of one
    type are ordered as their bits are; so the last bytes, all looked at in one go, nearly always
    tell that there are none."""
    size = TYPES[dtype][2]
    (least,) = struct.unpack("<I", struct.pack("<f", limit))
    least = {"F32": least, "BF16": -(-least >> 16), "F16": 0x7C00}[dtype]
    if not data[size - 1::size].translate(None, below(least >> 8 * size - 8)):
        return 0
    values, sign = array.array({2: "H", 4: "I"}[size], data), 1 << 8 * size - 1
    if sys.byteorder == "big":
        values.byteswap()
    return sum(value & ~sign >= least for value in values)


def checked(job, pieces):
    """The pieces, if all numbers in them can be computed with."""
    beyond = 0
    for data in pieces:
        beyond += count_beyond(data, job.dtype, job.limit)
        yield data
    if beyond:
        raise Bad(job.source.path, "tensor %s: %d of its %d values are NaN or infinite%s; the file "
                  "is damaged or its training failed (--allow-nonfinite writes them all the same)"
                  % (shown(job.source.name), beyond, math.prod(job.shape),
                     "" if math.isinf(job.limit) else ", or too large for float16"))


def job_pieces(job):
    """The bytes to write for a job."""
    pieces = (recode(data, job.source.dtype, job.dtype) for data in chunks(job.source))
    pieces = pieces if job.limit is None else checked(job, pieces)
    if job.swap is None:
        yield from pieces
    else:
        yield swap_inner(b"".join(pieces), TYPES[job.dtype][2], *job.swap)


# ---- files out -----------------------------------------------------------------------------------

class Stopped(BaseException):
    """A signal asks to stop."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Signals:
    """A signal stops the work wherever it is, but not inside a `with` of this, whose steps belong
    together; all after the first are passed over, since the first is being obeyed."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXFSZ")

    def __init__(self):
        self.held, self.caught, self.written = 0, None, False

    def install(self):
        for number in [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]:
            ignored = signal.getsignal(number) == signal.SIG_IGN        # by nohup, say
            if not ignored or number == getattr(signal, "SIGXFSZ", None):   # by Python itself
                signal.signal(number, self.catch)

    def catch(self, number, _):
        first, self.caught = self.caught is None, self.caught or number
        if first and not self.held:
            raise Stopped(number)

    def __enter__(self):
        self.held += 1

    def __exit__(self, *_):
        self.held -= 1
        if self.caught and not self.held:
            raise Stopped(self.caught)


SIGNALS = Signals()


class Outputs:
    """Files that appear together, whole, or never: written beside their places under other names,
    then renamed. A link stays: the file that it leads to is replaced, with its own mode. What is no
    ordinary file (a device, a pipe, standard output) is written to as it is."""

    def __init__(self, inputs, force, quiet):
        self.inputs, self.force = inputs, force
        self.bar = sys.stderr.isatty() and not quiet
        self.places = {}            # of each output: the file at the end of its links, or None
        self.temps = {}             # of each output that is an ordinary file: the temporary one
        self.aside, self.made = [], []      # other temporary files; folders made
        self.done, self.total, self.start, self.told = 0, 1, time.time(), 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with SIGNALS:
            for temp in [*self.temps.values(), *self.aside]:
                if os.path.lexists(temp):
                    os.remove(temp)
            for folder in self.made:
                if os.path.isdir(folder) and not os.listdir(folder):
                    os.rmdir(folder)
            if self.bar:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def paths(self):
        """Of outputs that have one which others can open."""
        return list(self.temps)

    def open(self, path):
        """Makes sure of an output before the work for it begins: refuses a place that must not be
        written to, and makes the temporary file."""
        if not path:
            raise Bad(path, "the name is empty; give the output a name")
        try:
            found = os.stat(path) if path != "-" else None
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if path == "-" or found and same_as_stdout(found):
            if os.isatty(1):
                raise Bad(path, "is a terminal; give a file, or pipe the output on")
            self.places[path] = None
        elif found and stat.S_ISDIR(found.st_mode) or path.endswith("/"):
            raise Bad(path, "is a folder; give the name of a file")
        elif found and not stat.S_ISREG(found.st_mode):
            self.places[path] = path
        else:
            self.open_file(path, found)

    def open_file(self, path, found):
        place = os.path.realpath(path)
        if not os.path.isdir(os.path.dirname(place)):
            raise Bad(path, "its folder does not exist; make it first")
        if place in self.places.values():
            raise Bad(path, "is the same file as another output")
        self.places[path] = place
        self.refuse_inputs(self.inputs)
        if found and not self.force:
            raise Bad(path, "exists already; choose another output, or add --force to replace it")
        self.temps[path] = self.temp(path)

    def open_folder(self, path):
        """Makes a folder for outputs, which goes again if nothing comes of them."""
        at = path
        while at and not os.path.lexists(at):
            self.made.append(at)
            at = os.path.dirname(at)
        try:
            os.makedirs(path, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise Bad(path, "its name is taken by what is no folder") from None

    def refuse_inputs(self, inputs):
        """Refuses outputs that are inputs, under whatever names."""
        for path, place in self.places.items():
            if place and os.path.exists(place) and any(os.path.samefile(place, i) for i in inputs):
                raise Bad(path, "is also an input; choose another output")

    def temp(self, path):
        """A new file beside the place of an output, with a short name, however long that one is."""
        for n in itertools.count():
            temp = os.path.join(os.path.dirname(self.places[path]),
                                ".lvm-%d-%d.tmp" % (os.getpid(), n))
            try:
                with SIGNALS:
                    os.close(os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                    self.aside.append(temp)
                return temp
            except FileExistsError:
                continue
            except OSError as fault:
                raise Bad(path, "cannot be written: %s" % fault.strerror) from None

    def expect(self, size):
        """Refuses to begin what the disk has no room for."""
        self.total = max(size, 1)
        for path, temp in self.temps.items():
            disk = shutil.disk_usage(os.path.dirname(temp))
            if 0 < disk.total and disk.free < size:
                raise Bad(path, "cannot be written: it needs %d MB, and %d MB are free there"
                          % (size >> 20, disk.free >> 20))

    def write(self, path, pieces):
        """Writes an output."""
        temp, place = self.temps.get(path), self.places[path]
        try:
            f = open(temp or place, "r+b" if temp else "wb") if temp or place else stdout_bytes()
            with f:
                self.fill(path, f, pieces)
                if temp:
                    os.fsync(f.fileno())
        except BrokenPipeError:
            if place is None:               # who read standard output has seen enough
                raise Stopped(getattr(signal, "SIGPIPE", signal.SIGTERM)) from None
            raise Bad(path, "its reader is gone") from None
        except OSError as fault:
            raise Bad(fault.filename or path, "cannot be written: %s" % fault.strerror) from None

    def write_aside(self, path, pieces):
        """Writes a temporary file more beside an output; returns its name."""
        temp = self.temp(path)
        try:
            with open(temp, "r+b") as f:
                self.fill(path, f, pieces)
        except OSError as fault:
            raise Bad(path, "cannot be written: %s" % fault.strerror) from None
        return temp

    def fill(self, path, f, pieces):
        for data in pieces:
            f.write(data)
            self.progress(path, len(data))
        f.flush()

    def progress(self, path, n):
        self.done += n
        now = time.time()
        if self.bar and now - self.told > 0.1:
            self.told = now
            percent = min(100, 100 * self.done // self.total)
            rate = self.done / 1e6 / max(now - self.start, 1e-3)
            sys.stderr.write("\r\x1b[K%s %3d %%  %.0f MB/s"
                             % (shortened(shown_path(path), 50), percent, rate))
            sys.stderr.flush()

    def commit(self):
        """All outputs take their places, under the modes of the files that they replace."""
        with SIGNALS:
            for path, temp in self.temps.items():
                place = self.places[path]
                if os.path.exists(place):
                    os.chmod(temp, stat.S_IMODE(os.stat(place).st_mode))
                os.replace(temp, place)
            SIGNALS.written = True


def same_as_stdout(found):
    try:
        return os.path.samestat(found, os.fstat(1))
    except OSError:
        return False


def stdout_bytes():
    return os.fdopen(os.dup(1), "wb")


def gguf_string(text):
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def gguf_key(key, kind, value):
    """One key of a GGUF file; the arrays of this format all hold int32."""
    if kind == GGUF_ARRAY:
        body = struct.pack("<IQ%di" % len(value), GGUF_I32, len(value), *value)
    elif kind == GGUF_STRING:
        body = gguf_string(value)
    else:
        body = struct.pack({GGUF_U32: "<I", GGUF_F32: "<f", GGUF_BOOL: "<?"}[kind], value)
    return gguf_string(key) + struct.pack("<I", kind) + body


def gguf_head(keys, jobs):
    """A GGUF file up to its data: header, keys, tensor descriptions."""
    head = [b"GGUF", struct.pack("<IQQ", 3, len(jobs), len(keys))] + keys
    offset = 0
    for job in jobs:
        head.append(gguf_string(job.name))
        head.append(struct.pack("<I%dQ" % len(job.shape), len(job.shape), *reversed(job.shape)))
        head.append(struct.pack("<IQ", TYPES[job.dtype][0], offset))
        size = nbytes(job.dtype, job.shape)
        offset += size + len(padding(size))
    head = b"".join(head)
    return head + padding(len(head))


def gguf_pieces(keys, jobs):
    """A whole GGUF file: its head, then the tensors one after the other."""
    yield gguf_head(keys, jobs)
    for job in jobs:
        yield from job_pieces(job)
        yield padding(nbytes(job.dtype, job.shape))


def safetensors_pieces(jobs):
    """A whole safetensors file; wider types come first, which aligns every tensor to its type."""
    jobs = sorted(jobs, key=lambda job: -TYPES[job.dtype][2])
    header, pos = {"__metadata__": {"format": "pt"}}, 0
    for job in jobs:
        size = nbytes(job.dtype, job.shape)
        header[job.name] = dict(dtype=job.dtype, shape=job.shape, data_offsets=[pos, pos + size])
        pos += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for job in jobs:
        yield from job_pieces(job)


# ---- GGUF in -------------------------------------------------------------------------------------

GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?",
                10: "Q", 11: "q", 12: "d"}


class Cursor:
    """Reads a file forward; no length or count is believed beyond the bytes that are left."""

    def __init__(self, path, f, size):
        self.path, self.f, self.pos, self.end = path, f, 0, min(size, MAX_HEADER)

    def bad(self, text):
        return Bad(self.path, "%s, near byte %d; the file is damaged: copy it again"
                   % (text, self.pos))

    def take(self, n):
        data = self.f.read(n) if n <= self.end - self.pos else b""
        if len(data) != n:
            raise self.bad("%d bytes are wanted and %d are left" % (n, self.end - self.pos))
        self.pos += n
        return data

    def number(self, code):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, smallest):
        """A count of things that take at least so many bytes each."""
        n = self.number("Q")
        if n > (self.end - self.pos) // smallest:
            raise self.bad("%d items cannot fit" % n)
        return n

    def string(self):
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("a string is not UTF-8") from None

    def value(self, kind):
        if kind == GGUF_STRING:
            return self.string()
        if kind == GGUF_ARRAY:
            return self.items(self.number("I"))
        if kind not in GGUF_SCALARS:
            raise self.bad("there is no type %d of keys" % kind)
        return self.number(GGUF_SCALARS[kind])

    def items(self, kind):
        """An array of numbers, or None if no key of this format can be so: strings, or long."""
        if kind == GGUF_STRING:
            for _ in range(self.count(8)):
                self.string()
            return None
        if kind not in GGUF_SCALARS:
            raise self.bad("there is no array of type %d" % kind)
        size = struct.calcsize("<" + GGUF_SCALARS[kind])
        n = self.count(size)
        data = self.take(n * size)
        return list(struct.unpack("<%d%s" % (n, GGUF_SCALARS[kind]), data)) if n <= 1024 else None


def read_keys(cur, count):
    keys = {}
    for _ in range(count):
        key = cur.string()
        if key in keys:
            raise cur.bad("key %s stands there twice" % shown(key))
        keys[key] = cur.value(cur.number("I"))
    return keys


def read_description(cur):
    """One tensor description, as a Tensor whose pos still counts from the data section."""
    numbers = {number: name for name, (number, _, _) in TYPES.items()}
    name, dims = cur.string(), cur.number("I")
    if not 1 <= dims <= 4:
        raise cur.bad("tensor %s has %d dimensions" % (shown(name), dims))
    shape = tuple(reversed([cur.number("Q") for _ in range(dims)]))
    kind, offset = cur.number("I"), cur.number("Q")
    if kind not in numbers:
        raise cur.bad("tensor %s has type %d, none of %s" % (shown(name), kind, ", ".join(TYPES)))
    if 0 in shape or shape[-1] % TYPES[numbers[kind]][1]:
        raise cur.bad("tensor %s of type %s cannot be %s"
                      % (shown(name), numbers[kind], list(shape)))
    return Tensor(cur.path, name, numbers[kind], shape, offset, nbytes(numbers[kind], shape))


def place(cur, tensors, align, size):
    """The tensors with their places in the file, which must be aligned, inside it and apart."""
    start = (cur.pos + align - 1) // align * align
    last, placed = None, {}
    for t in sorted(tensors, key=lambda t: t.pos):
        if t.name in placed:
            raise cur.bad("tensor %s stands there twice" % shown(t.name))
        if t.pos % align or start + t.pos + t.nbytes > size:
            raise cur.bad("tensor %s is unaligned or lies outside the file" % shown(t.name))
        if last and t.pos < last.pos + last.nbytes:
            raise Bad(cur.path, "tensor %s overlaps tensor %s; copy the file again"
                      % (shown(t.name), shown(last.name)))
        placed[t.name], last = t._replace(pos=start + t.pos), t
    return placed


def read_gguf(path):
    """(keys, tensors) of a weights file."""
    size = input_size(path)
    with open(path, "rb") as f:
        cur = Cursor(path, f, size)
        if size < 24 or cur.take(4) != b"GGUF":
            raise Bad(path, "not a weights file (no GGUF at its start); give one of lvm")
        version = cur.number("I")
        if version != 3:
            raise Bad(path, "is GGUF version %d; only version 3 can be read" % version)
        n_tensors, n_keys = cur.count(32), cur.count(13)
        keys = read_keys(cur, n_keys)
        align = keys.get("general.alignment", 32)
        if not isinstance(align, int) or align not in [1 << n for n in range(3, 17)]:
            raise Bad(path, "general.alignment is %s; it must be a power of two from 8 to 65536"
                      % spelt(align))
        tensors = place(cur, [read_description(cur) for _ in range(n_tensors)], align, size)
    for key, wanted in (("general.architecture", "lvm"), ("lvm.format_version", 1)):
        if keys.get(key) != wanted:
            raise only(path, keys, key, wanted)
    return keys, tensors


# ---- checkpoint to weights file ------------------------------------------------------------------

def to_gguf_jobs(pairs):
    jobs = []
    for spec, t in pairs:
        swap = (t.shape[0], t.shape[1], t.shape[2] * t.shape[3]) if len(t.shape) == 4 else None
        dtype = "F32" if len(t.shape) == 1 else t.dtype
        jobs.append(Job(spec.gguf, dtype, channels_last(t.shape), t, swap))
    return jobs


def tie(path, raw, tensors, notes):
    """Whether the output matrix is the embedding; tensors then hold it once, as the embedding. As
    in transformers 5: where config.json says that they are one, either may be the one that was
    kept; two that differ both count."""
    head, embedding = (tensors.get(name) for name in TIED)
    if not raw.get("tie_word_embeddings"):
        return False
    if head is not None and embedding is not None:
        same = head.dtype == embedding.dtype in FLOATS and head.shape == embedding.shape
        if not same or any(a != b for a, b in zip(chunks(head), chunks(embedding))):
            notes.append("%s: tie_word_embeddings is true, but lm_head.weight is not equal to "
                         "model.embed_tokens.weight: both are written" % shown_path(path))
            return False
    if head is not None:
        del tensors["lm_head.weight"]
        tensors["model.embed_tokens.weight"] = head if embedding is None else embedding
    return True


def check_claims(where, tensors, inputs):
    """Refuses tensors that take far more than their files: many that share one storage, or are
    packed better than weights can be. They would fill a disk."""
    claimed = sum(t.nbytes for t in tensors.values())
    given = sum(os.path.getsize(path) for path in set(inputs))
    if claimed > 4 * given + (1 << 20):
        raise Bad(where, "its tensors would take %d bytes, far more than the %d of its files; save "
                  "each tensor whole and unpacked" % (claimed, given))


def special_token(path, raw, key, codes, vocab, notes):
    """A special token's number, or None when it is an image token or none at all."""
    ids = raw.get(key) if isinstance(raw.get(key), list) else [raw.get(key)]
    for number in ids:
        if isinstance(number, int) and codes <= number < vocab:
            return number
    if ids != [None]:
        notes.append("%s: %s %s is an image token or outside the vocabulary: not written"
                     % (shown_path(path), key, spelt(raw[key])))
    return None


def llama_part(args, codes, notes):
    """(keys, jobs, inputs) of the transformer."""
    path, raw, tensors = read_checkpoint(args.llama, "llama")
    inputs = [path] + [t.path for t in tensors.values()]
    check_claims(args.llama, tensors, inputs)
    raw = check_llama_json(path, raw)
    config = llama_config(path, raw, "hf")
    vocab = config["vocab_size"]
    if args.vqgan and vocab < codes:
        raise Bad(path, "vocab_size is %d, less than the tokenizer's %d codes; give two parts "
                  "that belong together" % (vocab, codes))
    for key in TOKEN_KEYS:
        config[key.hf] = special_token(path, raw, key.hf, codes, vocab, notes)
    if args.bos is not None:
        if args.bos >= vocab:
            raise Bad(path, "--bos %d is outside the vocabulary of %d" % (args.bos, vocab))
        config["bos_token_id"] = args.bos if args.bos >= 0 else None
    tensors = own_tensors(args.llama, tensors, "llama", notes)
    tied = tie(path, raw, tensors, notes)
    pairs = match(args.llama, llama_specs(config, tied), tensors, "hf", FLOATS)
    biased = any(spec.group for spec, _ in pairs)
    if raw.get("attention_bias") and not biased:
        raise Bad(args.llama, "config.json promises attention biases, but no tensor holds one")
    if raw.get("attention_bias") is False and biased:
        raise Bad(args.llama, "config.json says that attention has no biases, but tensors hold "
                  "some; set attention_bias to true, or remove them")
    return part_keys(LLAMA_KEYS + TOKEN_KEYS, config), to_gguf_jobs(pairs), inputs


def vqgan_part(args, notes):
    """(keys, jobs, inputs, number of codes) of the tokenizer."""
    path, raw, tensors = read_checkpoint(args.vqgan, "vqgan")
    inputs = [path] + [t.path for t in tensors.values()]
    check_claims(args.vqgan, tensors, inputs)
    config = vqgan_config(path, raw, "hf")
    tensors = own_tensors(args.vqgan, tensors, "vqgan", notes)
    pairs = match(args.vqgan, vqgan_specs(config), tensors, "hf", FLOATS)
    return part_keys(VQGAN_KEYS, config), to_gguf_jobs(pairs), inputs, config["num_embeddings"]


def part_keys(keys, config):
    given = [(key, config[key.hf]) for key in keys if config[key.hf] is not None]
    return [gguf_key(key.gguf, key.kind, value) for key, value in given]


def general_keys(args):
    keys = [gguf_key("general.architecture", GGUF_STRING, "lvm"),
            gguf_key("general.alignment", GGUF_U32, ALIGN)]
    for name in ("name", "license", "description"):
        if getattr(args, name) is not None:
            keys.append(gguf_key("general." + name, GGUF_STRING, getattr(args, name)))
    return keys + [gguf_key("lvm.format_version", GGUF_U32, 1)]


def find_lvm(args):
    """The program that quantises, sought before any work is done."""
    lvm = args.lvm or os.path.join(os.path.dirname(os.path.abspath(__file__)), "lvm")
    if not os.path.isfile(lvm) or not os.access(lvm, os.X_OK):
        raise Bad(lvm, "is no program; --type, --vq-type and --encoder-type need lvm: run make, or "
                  "give --lvm PATH")
    return os.path.abspath(lvm)


def quantize(lvm, args, exact, outputs):
    """Lets lvm write the quantised file in the place that waits for the output."""
    small = outputs.temps[args.output]
    command = [lvm, "quantize", os.path.abspath(exact), os.path.abspath(small), "--force"]
    command += ["--type", args.type] if args.type else []
    command += ["--vq-type", args.vq_type] if args.vq_type else []
    command += ["--encoder-type", args.encoder_type] if args.encoder_type else []
    status = run(command)
    if status != 0 or os.path.getsize(small) == 0:
        raise Bad(lvm, "quantising failed (status %d); see its message above" % status)


def run(command):
    """The exit status of a program, which ends when this one is stopped."""
    child = None
    try:
        with SIGNALS:                   # or a signal now would leave it on its own
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        return child.wait()
    except BaseException:
        if child is not None:
            child.terminate()           # and takes away its own temporary file
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
        raise


def limited(args, job):
    """The job with the limit of its values: what becomes infinite in the end is refused too. The
    scales of Q8_0 and Q4_0 are float16 like the whole of rows that do not divide into blocks."""
    if args.allow_nonfinite:
        return job
    in_vq = job.name.startswith("vq.")
    wanted = args.vq_type if in_vq else args.type
    if job.name.startswith("vq.encoder."):
        wanted = args.encoder_type or wanted
    kind = wanted if len(job.shape) > 1 else None
    blocks = kind in ("q8_0", "q4_0") and job.shape[-1] % 32 == 0 and not in_vq
    most = {"q8_0": 127, "q4_0": 8}[kind] if blocks else 1
    limit = 65520.0 * most if kind in ("f16", "q8_0", "q4_0") else math.inf
    return job._replace(limit=limit)


def convert_adapter(args):
    path, raw, tensors = read_adapter(args.lora)
    inputs = [path] + [t.path for t in tensors.values()]
    with Outputs(set(inputs), args.force, args.quiet) as outputs:
        outputs.open(args.output)
        check_claims(args.lora, tensors, inputs)
        config = adapter_config(path, raw)
        keys = general_keys(args) + [gguf_key("general.type", GGUF_STRING, "adapter"),
                                     gguf_key("adapter.type", GGUF_STRING, "lora")]
        keys += part_keys(LORA_KEYS[1:], config)
        jobs = [limited(args, job) for job in adapter_jobs(args.lora, config, tensors)]
        outputs.expect(sum(nbytes(job.dtype, job.shape) for job in jobs))
        outputs.write(args.output, gguf_pieces(keys, jobs))
        outputs.commit()
    report(args, outputs.paths(), [])


def convert(args):
    lvm = find_lvm(args) if args.type or args.vq_type or args.encoder_type else None
    given = {path for path in (args.llama, args.vqgan) if path and os.path.isfile(path)}
    with Outputs(given, args.force, args.quiet) as outputs:
        outputs.open(args.output)
        if lvm and args.output not in outputs.temps:
            raise Bad(args.output, "is no ordinary file; quantising needs one: give another "
                      "output, or leave out --type, --vq-type and --encoder-type")
        notes = write_weights(args, lvm, outputs)
        outputs.commit()
    report(args, outputs.paths(), notes)


def write_weights(args, lvm, outputs):
    """Writes the weights file; returns notes."""
    keys, jobs, inputs, codes, notes = general_keys(args), [], [], 8192, []
    if args.vqgan is not None:
        vq_keys, vq_jobs, inputs, codes = vqgan_part(args, notes)
    if args.llama is not None:
        more_keys, jobs, more_inputs = llama_part(args, codes, notes)
        keys, inputs = keys + more_keys, inputs + more_inputs
    if args.vqgan is not None:
        keys, jobs = keys + vq_keys, jobs + vq_jobs
    outputs.refuse_inputs(inputs)
    outputs.expect(sum(nbytes(job.dtype, job.shape) for job in jobs))
    pieces = gguf_pieces(keys, [limited(args, job) for job in jobs])
    if lvm:
        quantize(lvm, args, outputs.write_aside(args.output, pieces), outputs)
    else:
        outputs.write(args.output, pieces)
    return notes


# ---- weights file to checkpoint ------------------------------------------------------------------

HF_FILES = ("config.json", "model.safetensors")


def to_hf_jobs(pairs, embedding):
    """Jobs that write tensors as the checkpoint had them, and the type of its matrices."""
    native = next(t.dtype for spec, t in pairs if spec.hf == embedding)
    native = native if native in FLOATS else "F32"
    vectors = {t.name for _, t in pairs if len(t.shape) == 1 and t.dtype == "F32"}
    lossless = all(narrow(data, native) is not None
                   for _, t in pairs if t.name in vectors for data in chunks(t))
    jobs = []
    for spec, t in pairs:
        dtype = t.dtype if t.dtype in FLOATS else "F32"
        dtype = native if t.name in vectors and lossless else dtype
        swap = None
        if len(spec.shape) == 4:
            swap = (spec.shape[0], spec.shape[2] * spec.shape[3], spec.shape[1])
        jobs.append(Job(spec.hf, dtype, spec.shape, t, swap))
    return jobs, native


def llama_folder(path, keys, tensors):
    """(config.json, jobs) of the transformer in a weights file."""
    config, tied = llama_config(path, keys, "gguf"), "output.weight" not in tensors
    if not tied and "token_embd.weight" not in tensors:
        tensors["token_embd.weight"], tied = tensors.pop("output.weight"), True
    pairs = match(path, llama_specs(config, tied), tensors, "gguf", tuple(TYPES))
    jobs, native = to_hf_jobs(pairs, "model.embed_tokens.weight")
    config.update((key.hf, None) for key in TOKEN_KEYS)     # else the class would put in 1 and 2
    given = read_config(path, keys, [key for key in TOKEN_KEYS if key.gguf in keys], "gguf")
    for name, number in given.items():
        if number >= config["vocab_size"]:
            raise Bad(path, "%s %d lies outside the vocabulary of %d"
                      % (name, number, config["vocab_size"]))
        config[name] = number if number >= 0 else None
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return dict(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
        **config,
        head_dim=config["hidden_size"] // config["num_attention_heads"], rope_scaling=None,
        attention_bias=any(spec.group for spec, _ in pairs), mlp_bias=False, attention_dropout=0.0,
        tie_word_embeddings=tied, initializer_range=0.02, torch_dtype=names[native],
        use_cache=True), jobs


def vqgan_folder(path, keys, tensors):
    """(config.json, jobs) of the tokenizer; training settings get the class's defaults."""
    config = vqgan_config(path, keys, "gguf")
    pairs = match(path, vqgan_specs(config), tensors, "gguf", tuple(TYPES))
    jobs, _ = to_hf_jobs(pairs, "quantize.embedding.weight")
    return dict({"_class_name": "VQGANModel", "_version": "0.0.1", "num_channels": 3}, **config,
                dropout=0.0, commitment_cost=0.25), jobs


def adapter_to_hf(args, keys, tensors):
    with Outputs({args.weights}, args.force, args.quiet) as outputs:
        outputs.open_folder(args.to_hf)
        config_path, model_path = (os.path.join(args.to_hf, name) for name in ADAPTER_FILES)
        outputs.open(config_path)
        outputs.open(model_path)
        config, jobs = adapter_folder(args.weights, keys, tensors)
        outputs.expect(sum(nbytes(job.dtype, job.shape) for job in jobs))
        limit = None if args.allow_nonfinite else math.inf
        outputs.write(config_path, [json.dumps(config, indent=2).encode() + b"\n"])
        outputs.write(model_path, safetensors_pieces([job._replace(limit=limit) for job in jobs]))
        outputs.commit()
    report(args, [args.to_hf], [])


def to_hf(args):
    if not args.to_hf:
        raise Bad(args.to_hf, "the name is empty; give --to-hf a folder")
    keys, tensors = read_gguf(args.weights)
    if keys.get("general.type") == "adapter":
        adapter_to_hf(args, keys, tensors)
        return
    vq = {name: t for name, t in tensors.items() if name.startswith("vq.")}
    llama = {name: t for name, t in tensors.items() if name not in vq}
    sources = [part for part in (("llama", llama_folder, llama), ("vqgan", vqgan_folder, vq))
               if part[2]]
    if not sources:
        raise Bad(args.weights, "holds no tensors")
    folders = [os.path.join(args.to_hf, name) for name, _, _ in sources]
    with Outputs({args.weights}, args.force, args.quiet) as outputs:
        for folder in folders:
            outputs.open_folder(folder)
            for name in HF_FILES:
                outputs.open(os.path.join(folder, name))
        parts = [describe(args.weights, keys, part) for _, describe, part in sources]
        if len(parts) == 2 and parts[0][0]["vocab_size"] < parts[1][0]["num_embeddings"]:
            raise Bad(args.weights, "the tokenizer has %d codes, the transformer's vocabulary %d"
                      % (parts[1][0]["num_embeddings"], parts[0][0]["vocab_size"]))
        outputs.expect(sum(nbytes(job.dtype, job.shape) for _, jobs in parts for job in jobs))
        limit = None if args.allow_nonfinite else math.inf
        for folder, (config, jobs) in zip(folders, parts):
            config_path, model_path = (os.path.join(folder, name) for name in HF_FILES)
            outputs.write(config_path, [json.dumps(config, indent=2).encode() + b"\n"])
            outputs.write(model_path,
                          safetensors_pieces([job._replace(limit=limit) for job in jobs]))
        outputs.commit()
    report(args, folders, [])


# ---- main ----------------------------------------------------------------------------------------

def report(args, paths, notes):
    """Notes to people, and to stdout what was written, one path a line."""
    for note in notes if not args.quiet else []:
        print("convert.py: " + note, file=sys.stderr)
    for path in paths:
        print(path)
    sys.stdout.flush()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """What was typed may hold anything: one line, fit for a terminal."""
        self.print_usage(sys.stderr)
        self.exit(2, "convert.py: error: %s\n" % shortened(
            message if message.isprintable() else ascii(message)[1:-1], 400))


def bos_number(text):
    """--bos: a token's number, or -1 for none."""
    if text == "none":
        return -1
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("a token's number or none, not %r" % text)
    return int(text)


def parse_arguments(argv):
    parser = Parser(prog="convert.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", nargs="?", help="the weights file that --to-hf reads")
    add("--to-hf", metavar="DIR", help="write DIR/llama and DIR/vqgan from a weights file, or "
        "DIR from a file of adapters")
    add("-o", "--output", metavar="FILE", help="the weights file to write; - is standard output")
    add("--llama", metavar="DIR", help="checkpoint of the transformer")
    add("--vqgan", metavar="DIR", help="checkpoint of the tokenizer")
    add("--lora", metavar="DIR", help="LoRA adapters of a transformer, as PEFT saves them")
    add("--type", choices=("f32", "f16", "bf16", "q8_0", "q4_0"), help="the transformer's type")
    add("--vq-type", choices=("f32", "f16", "bf16", "q8_0"), help="the tokenizer's type")
    add("--encoder-type", choices=("f32", "f16", "bf16", "q8_0"),
        help="its encoder's (f16 with --vq-type q8_0: a quantised one finds other tokens)")
    add("--bos", type=bos_number, metavar="ID|none", help="the token in front of every sequence")
    add("--lvm", metavar="PATH", help="the lvm program (default: beside convert.py)")
    for name in ("name", "license", "description"):
        add("--" + name, metavar="TEXT", help="written into the file")
    add("--force", action="store_true", help="replace files that exist")
    add("--allow-nonfinite", action="store_true", help="write NaN and infinity as they are")
    add("--quiet", action="store_true", help="no progress, no notes")
    args = parser.parse_args(argv)
    making = ("output", "llama", "vqgan", "lora", "type", "vq_type", "encoder_type", "bos",
              "lvm", "name", "license", "description")
    if args.to_hf is not None:
        if args.weights is None or any(getattr(args, name) is not None for name in making):
            parser.error("--to-hf takes one weights file, and beside it only --force, --quiet and "
                         "--allow-nonfinite")
    elif args.lora is not None:
        if args.weights is not None or args.output is None or any(
                getattr(args, name) is not None for name in
                ("llama", "vqgan", "type", "vq_type", "encoder_type", "bos", "lvm")):
            parser.error("--lora takes -o FILE, and beside it only --name, --license, "
                         "--description, --force, --quiet and --allow-nonfinite")
    elif args.weights is not None or args.output is None or (
            args.llama is None and args.vqgan is None):
        parser.error("give -o FILE and --llama DIR, --vqgan DIR or both, or --lora DIR; or FILE "
                     "--to-hf DIR")
    if (args.type or args.bos is not None) and args.llama is None:
        parser.error("--type and --bos need --llama")
    if (args.vq_type or args.encoder_type) and args.vqgan is None:
        parser.error("--vq-type and --encoder-type need --vqgan")
    return args


def work(args):
    """The exit status: 0 done, 1 failed, with one message."""
    try:
        (to_hf if args.to_hf is not None else convert_adapter if args.lora is not None
         else convert)(args)
        return 0
    except Bad as fault:
        text = str(fault)
    except OSError as fault:
        name = fault.filename if isinstance(fault.filename, (str, bytes)) else None
        text = "%s: %s" % (shown_path(os.fsdecode(name or args.output or args.to_hf)),
                           fault.strerror or fault)
    except MemoryError:
        text = "%s: there is not enough memory for its largest tensor" % shown_path(
            args.weights or args.llama or args.vqgan or args.lora)
    print("convert.py: " + text, file=sys.stderr)
    return 1


def main(argv):
    """Exit status: 0 done, 1 the work failed, 2 wrong usage, 128 + N stopped by signal N."""
    args = parse_arguments(argv)
    try:
        return work(args)
    except Stopped as stopped:
        number = stopped.number
    except KeyboardInterrupt:
        number = signal.SIGINT
    reason = {"SIGINT": "interrupted", "SIGTERM": "asked to stop", "SIGHUP": "the terminal is gone",
              "SIGXFSZ": "the output is larger than files may be here (ulimit -f)"}
    name = signal.Signals(number).name
    if name in reason:
        print("convert.py: %s; %s" % (reason[name], "all was written before" if SIGNALS.written
                                      else "no file was changed"), file=sys.stderr)
    return 128 + number


def leave(status):
    """Ends the program; as the signal would have, if one stopped it, so that a shell sees which."""
    try:
        sys.stdout.flush()
    except OSError:                         # it was said already, or there is no one to hear it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if status > 128 and os.name == "posix":
        signal.signal(status - 128, signal.SIG_DFL)
        os.kill(os.getpid(), status - 128)
    sys.exit(status)


if __name__ == "__main__":
    SIGNALS.install()
    for stream in ("stdout", "stderr"):     # closed ones are None, which print takes for stdout
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))
    sys.stdout.reconfigure(errors="surrogateescape")    # a path may be any bytes
    leave(main(sys.argv[1:]))
