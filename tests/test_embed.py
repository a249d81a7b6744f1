#!/usr/bin/env python3
"""Tests of embedding: python3 tests/test_embed.py. Standard library, cc, make and the weights.

The examples are built with the very commands that stand on top of them and must give the bytes that
the command line gives. `make install` must leave what a program needs to compile and link, the
library must export nothing but lvm_ names and keep no state that can change.

LVM names the program (./lvm), WEIGHTS the shipped model (weights.bin).
"""

import ctypes
import glob
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib

TESTS = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(TESTS)
LVM = os.path.abspath(os.environ.get("LVM", os.path.join(TOP, "lvm")))
WEIGHTS = os.path.abspath(os.environ.get("WEIGHTS", os.path.join(TOP, "weights.bin")))
BOTH = os.path.join(TESTS, "golden", "both")
STRICT = ["-O2", "-Wall", "-Wextra", "-Wshadow", "-Wpedantic", "-Werror"]
TIMEOUT = 300


def run(command, cwd, **kwargs):
    """(status, stdout, stderr) of a command, a line for the shell or a list of words."""
    done = subprocess.run(command, cwd=cwd, shell=isinstance(command, str), timeout=TIMEOUT,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, **kwargs)
    return done.returncode, done.stdout, done.stderr


def must(command, cwd, **kwargs):
    """What a command printed; an error where it fails."""
    status, out, err = run(command, cwd, **kwargs)
    if status:
        raise AssertionError("%s: status %d\n%s%s" % (command, status, out, err))
    return out


def read(path):
    with open(path, "rb") as f:
        return f.read()


def commands(example):
    """The commands in an example's first comment."""
    found = []
    for line in read(os.path.join(TOP, "examples", example)).decode().splitlines()[:12]:
        words = line.lstrip("/").split()
        if words and (words[0] in ("cc", "c++", "make", "python3") or words[0].startswith("./")):
            found.append(" ".join(words))
    return found


def pixels_of(path):
    """(width, height, RGB bytes) of an 8-bit RGB PNG without interlacing."""
    data, at, packed = read(path), 8, b""
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (depth, colour, data[28]) == (8, 2, 0), path
    while at < len(data):
        size, = struct.unpack(">I", data[at:at + 4])
        if data[at + 4:at + 8] == b"IDAT":
            packed += data[at + 8:at + 8 + size]
        at += 12 + size
    raw, n, rows = zlib.decompress(packed), 3 * width, [bytes(3 * width)]
    for y in range(height):
        start = y * (n + 1)
        kind, row, above = raw[start], bytearray(raw[start + 1:start + 1 + n]), rows[-1]
        for i in range(n):
            a, b, c = (row[i - 3] if i > 2 else 0), above[i], (above[i - 3] if i > 2 else 0)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            row[i] = (row[i] + (0, a, b, (a + b) // 2, paeth)[kind]) & 255
        rows.append(bytes(row))
    return width, height, b"".join(rows[1:])


def write_grey(path, source):
    """The grey copy that examples/embed.c makes of an image."""
    width, height, rgb = pixels_of(source)
    grey = bytes((299 * rgb[i] + 587 * rgb[i + 1] + 114 * rgb[i + 2] + 500) // 1000
                 for i in range(0, len(rgb), 3))
    rows = b"".join(b"\0" + grey[y * width:(y + 1) * width] for y in range(height))

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data +
                struct.pack(">I", zlib.crc32(kind + data)))
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0,
                                                                  0, 0, 0)) +
                chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


class Place:
    """A folder that looks like a fresh clone, for commands that are given as to a reader. What make
    builds there it builds with -O1: twice as fast, and numbers do not depend on it."""

    def __init__(self):
        os.environ["CFLAGS"] = "-O1"
        self.folder = tempfile.mkdtemp(prefix="test_embed.")
        for name in ("lvm.c", "Makefile", "examples", "prompt", "tests"):
            os.symlink(os.path.join(TOP, name), self.path(name))
        os.symlink(WEIGHTS, self.path("weights.bin"))
        if os.path.exists(LVM):
            shutil.copy2(LVM, self.path("lvm"))
        must([sys.executable, os.path.join(TOP, "convert.py"), "-o", self.path("both.bin"),
              "--llama", os.path.join(BOTH, "llama"), "--vqgan", os.path.join(BOTH, "vqgan")],
             self.folder)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def must(self, command):
        return must(command, self.folder)

    def take(self, name):
        """The bytes of a file that a command just wrote; gone for the next one."""
        data = read(self.path(name))
        os.remove(self.path(name))
        return data

    def cli(self, weights, images, *options):
        """What the command line predicts, by file name."""
        names = self.must(["./lvm", weights] + images + list(options)).split()
        return {name: without_text(self.take(name)) for name in names}


def without_text(png):
    """The command line writes into its images what decided them; a program's are without."""
    at = png.index(b"iTXt") - 4
    return png[:at] + png[at + 12 + int.from_bytes(png[at:at + 4], "big"):]


PLACE = None


def setUpModule():
    global PLACE
    PLACE = Place()


def tearDownModule():
    shutil.rmtree(PLACE.folder)


class TestExamples(unittest.TestCase):
    """Each example as its comment says, then on the small model."""

    WANT = {}   # (weights, images) -> what the command line makes of them

    def built(self, name):
        """Builds an example as it says; returns the words that run it: program, weights, ..."""
        lines = commands(name)
        self.assertGreaterEqual(len(lines), 2, name)
        for line in lines[:-1]:
            if not shutil.which(line.split()[0]):
                self.skipTest("no " + line.split()[0])
            PLACE.must(line)
        return lines[-1].split()

    def wanted(self, weights, images):
        """Two candidates of the command line: the first is what one alone gives."""
        key = (weights,) + tuple(images)
        if key not in self.WANT:
            self.WANT[key] = PLACE.cli(weights, images, "-c", "2")
        return self.WANT[key]

    def check_failures(self, program, *between):
        """Faults end with status 1 and one line that names them; no image is written."""
        for weights, image in (("nothing.bin", "prompt/01.png"), ("both.bin", "nothing.png"),
                                 ("prompt/01.png", "prompt/01.png"), ("both.bin", "both.bin")):
            status, out, err = run(program + [weights] + list(between) + [image], PLACE.folder)
            self.assertEqual(status, 1, (program, weights, image))
            self.assertEqual(err.count("\n"), 1, err)
            self.assertIn(weights if weights != "both.bin" else image, err)
            self.assertEqual(glob.glob(PLACE.path("out*")), [])

    def test_c(self):
        words = self.built("embed.c")
        for weights in ("weights.bin", "both.bin"):
            greys = []
            for i, name in enumerate(words[2:]):
                greys += ["grey%d.png" % i, name]
                write_grey(PLACE.path(greys[-2]), PLACE.path(name))
            out = PLACE.must([words[0], weights] + words[2:])
            self.assertTrue(out.startswith("out.png: "), out)
            self.assertEqual(PLACE.take("out.png"), PLACE.cli(weights, greys[:-1])["out.png"])
        self.check_failures([words[0]])

    def test_cpp(self):
        words = self.built("embed.cpp")
        for weights in ("weights.bin", "both.bin"):
            names = PLACE.must([words[0], weights] + words[2:]).split()
            self.assertEqual({name: PLACE.take(name) for name in names},
                             self.wanted(weights, words[2:]))
        self.check_failures([words[0]])

    def test_cancel(self):
        words = self.built("cancel.c")
        for weights in ("weights.bin", "both.bin"):
            out = PLACE.must([words[0], weights] + words[2:]).split("\n")
            self.assertEqual(PLACE.take("out.png"),
                             self.wanted(weights, words[3:])["out-1a.png"])
            if weights == "weights.bin":    # takes seconds, so half of one is too early
                self.assertRegex(out[0], "^stopped at [a-z]+, [0-9]+ of [0-9]+$")
            self.assertEqual(out[-2], "out.png")
        self.check_failures([words[0]], "0")

    def test_stream(self):
        words = self.built("stream.c")
        for weights, rows in (("weights.bin", 16), ("both.bin", 8)):
            out = PLACE.must([words[0], weights] + words[2:]).splitlines()
            self.assertEqual(out, ["out.png: %d of %d rows" % (n, rows)
                                   for n in range(4, rows + 1, 4)])
            self.assertEqual(PLACE.take("out.png"), self.wanted(weights, words[2:])["out-1a.png"])
        self.check_failures([words[0]])

    def test_python(self):
        words = self.built("embed.py")
        for weights in ("weights.bin", "both.bin"):
            ids, name = PLACE.must(words[:2] + [weights] + words[3:]).splitlines()
            self.assertEqual(PLACE.take(name), self.wanted(weights, words[3:])["out-1a.png"])
            with open(PLACE.path("ids"), "w") as f:
                f.write(ids + "\n")
            PLACE.must(["./lvm", "decode", weights, "ids", "-o", "copy.png"])
            self.assertEqual(PLACE.take("copy.png"),
                             self.wanted(weights, words[3:])["out-1a.png"])
        self.check_failures(words[:2])

    def test_python_structs(self):
        """embed.py's structs are those of the header, field by field."""
        spec = importlib.util.spec_from_file_location("embed", PLACE.path("examples", "embed.py"))
        embed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(embed)
        structs = {"lvm_error": embed.Error, "lvm_image": embed.Image, "lvm_info": embed.Info,
                   "lvm_sampling": embed.Sampling}
        lines, want = [], []
        for name, fields in structs.items():
            lines.append('printf("%%zu\\n", sizeof(%s));' % name)
            want.append(ctypes.sizeof(fields))
            for field in fields._fields_:
                lines.append('printf("%%zu\\n", offsetof(%s, %s));' % (name, field[0]))
                want.append(getattr(fields, field[0]).offset)
        with open(PLACE.path("structs.c"), "w") as f:
            f.write('#define LVM_API_ONLY\n#include "lvm.c"\n#include <stdio.h>\n'
                    "int main(void) {\n%s\nreturn 0;\n}\n" % "\n".join(lines))
        PLACE.must("cc -o structs structs.c")
        self.assertEqual([int(n) for n in PLACE.must("./structs").split()], want,
                         "a struct of lvm.c changed: change it in examples/embed.py too")


USER = """#include <lvm.h>
#include <stdio.h>
#ifndef LVM_VERSION
#error "no lvm.h"
#endif
int main(int argc, char **argv) {
    lvm_error error;
    lvm_model *model = lvm_open(argv[argc - 1], 0, &error);
    if (model == NULL) return printf("%s\\n", error.text), 1;
    printf("%s %d\\n", lvm_version(), lvm_model_info(model).tokens_per_image);
    lvm_close(model);
    return 0;
}
"""


class TestInstall(unittest.TestCase):
    """make install and what a program finds afterwards."""

    @classmethod
    def setUpClass(cls):
        cls.root = PLACE.path("installed")
        with open(PLACE.path("user.c"), "w") as f:
            f.write(USER)
        shutil.copy(PLACE.path("user.c"), PLACE.path("user.cpp"))
        cls.version = PLACE.must("./lvm --version").split()[1]
        PLACE.must(["make", "install", "PREFIX=" + cls.root])

    def files(self, root):
        return sorted(os.path.relpath(os.path.join(folder, name), root)
                      for folder, _, names in os.walk(root) for name in names)

    def check_user(self, compiler, flags, libs, source="user.c"):
        program = PLACE.path("user_program")
        PLACE.must(compiler + STRICT + flags + [source, "-o", program] + libs)
        env = dict(os.environ, LD_LIBRARY_PATH=os.path.join(self.root, "lib"),
                   DYLD_LIBRARY_PATH=os.path.join(self.root, "lib"))
        self.assertEqual(must([program, "both.bin"], PLACE.folder, env=env).split(),
                         [self.version, "64"])

    def test_files(self):
        self.assertIn("bin/lvm", self.files(self.root))
        self.assertEqual(must([os.path.join(self.root, "bin", "lvm"), "--version"],
                              PLACE.folder).split()[1], self.version)
        page = read(os.path.join(self.root, "share", "man", "man1", "lvm.1")).decode()
        self.assertTrue(page.startswith(".TH LVM 1 "), page[:40])
        names = {name: os.path.realpath(os.path.join(self.root, "lib", name))
                 for name in os.listdir(os.path.join(self.root, "lib")) if name != "pkgconfig"}
        self.assertEqual(len(names), 3, names)
        self.assertEqual(len(set(names.values())), 1, names)
        self.assertIn(self.version, list(names.values())[0])

    def test_by_hand(self):
        self.check_user(["cc", "-std=c11"], ["-I" + os.path.join(self.root, "include")],
                        ["-L" + os.path.join(self.root, "lib"), "-llvm"])

    def test_cpp(self):
        if not shutil.which("c++"):
            self.skipTest("no c++")
        self.check_user(["c++", "-std=c++11"], ["-I" + os.path.join(self.root, "include")],
                        ["-L" + os.path.join(self.root, "lib"), "-llvm"], "user.cpp")

    def test_pkg_config(self):
        pc = os.path.join(self.root, "lib", "pkgconfig")
        if not shutil.which("pkg-config"):
            with open(os.path.join(pc, "lvm.pc")) as f:
                self.assertIn("Version: %s\n" % self.version, f.read())
            self.skipTest("no pkg-config")
        env = dict(os.environ, PKG_CONFIG_PATH=pc)

        def ask(*what):
            return must(("pkg-config",) + what + ("lvm",), PLACE.folder, env=env).split()
        self.assertEqual(ask("--modversion"), [self.version])
        self.assertIn("-lpthread", ask("--static", "--libs"))
        self.check_user(["cc", "-std=c11"], ask("--cflags"), ask("--libs"))

    def test_the_soname(self):
        """A program needs the versioned name, so that another version does not take its place."""
        if not shutil.which("readelf"):
            self.skipTest("no readelf")
        library = os.path.join(self.root, "lib", "liblvm.so")
        name, = [line.split("[")[1].rstrip("]") for line in
                 PLACE.must(["readelf", "-d", library]).splitlines() if "(SONAME)" in line]
        self.assertEqual(name, "liblvm.so." + self.version.rpartition(".")[0])
        self.assertTrue(os.path.exists(os.path.join(self.root, "lib", name)))

    def test_destdir_and_uninstall(self):
        stage = PLACE.path("stage")
        where = ["DESTDIR=" + stage, "PREFIX=/usr", "LIBDIR=/usr/lib/somewhere"]
        PLACE.must(["make", "install"] + where)
        with open(os.path.join(stage, "usr/lib/somewhere/pkgconfig/lvm.pc")) as f:
            text = f.read()
        self.assertIn("prefix=/usr\n", text)
        self.assertIn("libdir=/usr/lib/somewhere\n", text)
        self.assertNotIn(stage, text)
        self.assertEqual({os.path.basename(name) for name in self.files(stage)},
                         {os.path.basename(name) for name in self.files(self.root)})
        PLACE.must(["make", "uninstall"] + where)
        self.assertEqual(self.files(stage), [])

    def test_the_header_is_chapter_0(self):
        """Nothing of the implementation, and all that the file's first part has."""
        with open(os.path.join(self.root, "include", "lvm.h")) as f:
            header = f.read()
        source = read(os.path.join(TOP, "lvm.c")).decode()
        part = source[source.index("#ifndef LVM_H\n"):source.index("#endif /* LVM_H */")]
        self.assertIn(part, header)
        self.assertIn("Ownership.", header)
        self.assertEqual(header.count("#include"), 2)
        self.assertNotIn("static", header)
        for word in ("Chapter 1", "_POSIX_C_SOURCE"):
            self.assertNotIn(word, header)


class TestLibrary(unittest.TestCase):
    """What the compiled library shows and keeps."""

    def test_the_header_beside_the_file(self):
        """make lvm.h: all that a program needs of lvm.c, in C and in C++; make clean removes it."""
        folder = PLACE.path("header")
        os.mkdir(folder)
        for name in ("lvm.c", "Makefile"):
            os.symlink(os.path.join(TOP, name), os.path.join(folder, name))
        must("make lvm.h", folder)
        for name in ("user.c", "user.cpp"):
            with open(os.path.join(folder, name), "w") as f:
                f.write(USER.replace("<lvm.h>", '"lvm.h"'))
        must("cc -O1 -ffp-contract=off -DLVM_NO_MAIN -c -o lvm.o lvm.c", folder)
        for compiler, source in (("cc -std=c11", "user.c"), ("c++ -std=c++11", "user.cpp")):
            if not shutil.which(compiler.split()[0]):
                self.skipTest("no c++")
            must("%s %s -o user %s lvm.o -lm -lpthread" % (compiler, " ".join(STRICT), source),
                 folder)
            self.assertEqual(must(["./user", PLACE.path("both.bin")], folder).split()[1], "64")
        with open(os.path.join(TOP, ".gitignore")) as f:
            self.assertIn("/lvm.h\n", f)
        must("make clean", folder)
        self.assertFalse(os.path.exists(os.path.join(folder, "lvm.h")))

    def test_exports(self):
        if not shutil.which("nm") or not sys.platform.startswith("linux"):
            self.skipTest("no nm -D")
        PLACE.must("make liblvm.so")
        names = {line.split()[-1].partition("@")[0] for line in
                 PLACE.must("nm -D --defined-only liblvm.so").splitlines()}
        header = read(os.path.join(TOP, "lvm.c")).decode().partition("#endif /* LVM_H */")[0]
        self.assertGreater(len(names), 15)
        for name in names:
            self.assertTrue(name.startswith("lvm_"), name)
            self.assertIn(name + "(", header)

    def test_no_mutable_state(self):
        """An object file's writable sections stay empty: .data and .bss, also of threads.
        (Constants with pointers in them lie in .data.rel.ro, which the loader closes.)"""
        if not shutil.which("size"):
            self.skipTest("no size")
        PLACE.must("cc -O0 -ffp-contract=off -fPIC -fno-common -DLVM_NO_MAIN -c -o state.o lvm.c")
        sizes = {}
        for line in PLACE.must("size -A state.o").splitlines():
            words = line.split()
            if len(words) == 3 and words[1].isdigit():
                sizes[words[0]] = int(words[1])
        self.assertGreater(sizes[".text"], 10000)
        writable = [name for name, size in sizes.items() if size > 0 and
                    name.startswith((".data", ".bss", ".tdata", ".tbss")) and
                    not name.startswith(".data.rel.ro")]
        self.assertEqual(writable, [])
        with open(PLACE.path("state.c"), "w") as f:     # a variable would be seen
            f.write("static int state; int next(void) { return ++state; }\n")
        PLACE.must("cc -O1 -fPIC -c -o state.o state.c")
        self.assertRegex(PLACE.must("size -A state.o"), r"\.bss +4 ")


if __name__ == "__main__":
    unittest.main()
