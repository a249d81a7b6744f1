# lvm: one C file. `make` builds the program; `make test` builds and runs every test.
#   make debug      the tests under the address and undefined-behaviour sanitizers
#   make tsan       the threaded tests under the thread sanitizer
#   make fuzz       every fuzz target for FUZZ_SECONDS, two at a time (clang)
#   make static     lvm-static, which needs no library of the system (by musl-gcc if there is one)
#   make lvm.exe    for Windows, by mingw-w64
#   make liblvm.so  the library
#   make cuda       lvm and liblvm.so with the GPU's part, by nvcc (NVCC=, CUDA=, CUDA_ARCH=)
#   make scenes     examples/scenes.c, which renders a world to learn from
#   make train-demo renders a world and teaches it to weights.bin, on the CPU (four minutes)
#   make lvm.h      its header, which is chapter 0 of lvm.c
#   make evaluate   measures weights.bin on prompt/ and writes docs/evaluation.md (half an hour)
#   make install    PREFIX=DIR: program, manual page, library, lvm.h, lvm.pc; `make uninstall`
CC      ?= cc
CFLAGS  ?= -O3
WARN    = -Wall -Wextra -Wshadow -Wpedantic
STD     = -std=c11 -ffp-contract=off
LIBS    = -lm -lpthread
PREFIX  ?= /usr/local
LIBDIR  ?= $(PREFIX)/lib
STATIC_CC    ?= $(shell command -v musl-gcc || echo "$(CC)")
WINDOWS_CC   ?= x86_64-w64-mingw32-gcc
B       ?= build
TEST_CFLAGS  ?= -O2
FUZZ_SECONDS ?= 60

# The commit, for --version: of a checkout of lvm itself, and nothing without git. It is looked up
# when a program is built for another reason; a new commit alone builds nothing.
COMMIT = $(shell [ -e .git ] && git describe --always --dirty 2> /dev/null | \
    sed -n 's/^[A-Za-z0-9._-]*$$/-DLVM_COMMIT=\\"&\\"/p')

# The library's names once it is installed. Before 1.0 every minor version has its own ABI.
VERSION := $(shell sed -n 's/^.define LVM_VERSION "\(.*\)"/\1/p' lvm.c)
ABI     := $(basename $(VERSION))
ifeq ($(shell uname),Darwin)
LIB      = liblvm.dylib
LIB_ABI  = liblvm.$(ABI).dylib
LIB_FILE = liblvm.$(VERSION).dylib
SHARED   = -dynamiclib -install_name $(LIBDIR)/$(LIB_ABI)
else
LIB      = liblvm.so
LIB_ABI  = liblvm.so.$(ABI)
LIB_FILE = liblvm.so.$(VERSION)
SHARED   = -shared -fPIC -Wl,-soname,$(LIB_ABI)
endif

lvm: lvm.c
	$(CC) $(STD) $(WARN) $(CFLAGS) $(COMMIT) -o $@ lvm.c $(LDFLAGS) $(LIBS)

static: lvm-static
lvm-static: lvm.c
	$(STATIC_CC) $(STD) $(WARN) $(CFLAGS) $(COMMIT) -static -o $@ lvm.c $(LDFLAGS) $(LIBS)

lvm.exe: lvm.c
	$(WINDOWS_CC) $(STD) $(WARN) $(CFLAGS) $(COMMIT) -static -o $@ lvm.c $(LDFLAGS) $(LIBS)

liblvm.so: lvm.c
	$(CC) $(STD) $(WARN) $(CFLAGS) -DLVM_NO_MAIN $(SHARED) -o $@ lvm.c $(LDFLAGS) $(LIBS)

# The GPU's part: code for the chips that are there, and PTX, which the driver compiles for later
# ones. CUDA's runtime is linked in, so that the program starts on machines without any of it.
NVCC      ?= nvcc
CUDA      ?= $(patsubst %/bin/nvcc,%,$(shell command -v $(NVCC)))
CUDA_ARCH ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
             -gencode arch=compute_90,code=compute_90
CUDA_LIBS  = -L$(CUDA)/lib64 -L$(CUDA)/lib -lcudart_static -ldl -lrt -lstdc++
NVCC_WARN  = --Werror all-warnings -Xcompiler -Wall,-Wextra,-Wno-unused-function

cuda: $(B)/lvm_cuda.o lvm.c
	$(CC) $(STD) $(WARN) $(CFLAGS) $(COMMIT) -DLVM_CUDA -o lvm lvm.c $(B)/lvm_cuda.o $(LDFLAGS) \
	    $(CUDA_LIBS) $(LIBS)
	$(CC) $(STD) $(WARN) $(CFLAGS) -DLVM_CUDA -DLVM_NO_MAIN $(SHARED) -o $(LIB) lvm.c \
	    $(B)/lvm_cuda.o $(LDFLAGS) $(CUDA_LIBS) $(LIBS)

$(B)/lvm_cuda.o: lvm_cuda.cu lvm.c | $(B)
	$(NVCC) -std=c++17 -O3 --threads 2 $(CUDA_ARCH) $(NVCC_WARN) -Xcompiler -fPIC -c -o $@ \
	    lvm_cuda.cu

# The test lets CUDA's allocations fail.
comma    = ,
CUDA_WRAP = $(patsubst %,-Wl$(comma)--wrap=cuda%,Malloc MallocHost HostAlloc HostRegister \
            StreamCreate StreamCreateWithFlags StreamCreateWithPriority EventCreate \
            EventCreateWithFlags StreamBeginCapture GraphInstantiate FuncSetAttribute \
            FuncGetAttributes DeviceGetAttribute MemcpyAsync)

$(B)/test_cuda: tests/cuda/test_cuda.c $(wildcard tests/*.h) lvm.c $(B)/lvm_cuda.o
	$(CC) $(STD) $(WARN) $(TEST_CFLAGS) -DLVM_CUDA -Itests -o $@ $< $(B)/lvm_cuda.o $(LDFLAGS) \
	    $(CUDA_WRAP) $(CUDA_LIBS) $(LIBS)

$(B)/cuda_golden: tests/test_golden.c $(wildcard tests/*.h) lvm.c $(B)/lvm_cuda.o
	$(CC) $(STD) $(WARN) $(TEST_CFLAGS) -DLVM_CUDA -o $@ $< $(B)/lvm_cuda.o $(LDFLAGS) \
	    $(CUDA_LIBS) $(LIBS)

$(B)/lvm: lvm.c | $(B)
	$(CC) $(STD) $(WARN) $(TEST_CFLAGS) -o $@ lvm.c $(LDFLAGS) $(LIBS)

# A driver is the whole program, of which gcc then compiles only what it uses: half of the time.
WHOLE   := $(shell $(CC) --version 2> /dev/null | grep -q "Free Software" && echo -fwhole-program)

$(B)/test_%: tests/test_%.c $(wildcard tests/*.h) lvm.c | $(B)
	$(CC) $(STD) $(WARN) $(TEST_CFLAGS) $(WHOLE) -o $@ $< $(LDFLAGS) $(LIBS)

# A program of its own: a world to learn from.
scenes: examples/scenes.c
	$(CC) $(STD) $(WARN) $(CFLAGS) -o $@ $< $(LDFLAGS) $(LIBS)

$(B)/scenes: examples/scenes.c | $(B)
	$(CC) $(STD) $(WARN) $(TEST_CFLAGS) -o $@ $< $(LDFLAGS) $(LIBS)

$(B):
	mkdir -p $@

test:
	./run_tests.sh

debug:
	SANITIZE=address,undefined ./run_tests.sh

tsan:
	SANITIZE=thread ./run_tests.sh

fuzz:
	tests/fuzz.sh $(FUZZ_SECONDS)

train-demo: lvm scenes
	examples/train_demo.sh

evaluate: lvm
	python3 tests/evaluate.py

# The header is chapter 0 of lvm.c: its comment, then everything between the guards.
lvm.h: lvm.c
	echo '/* lvm.h - the public part of lvm.c $(VERSION), from which make takes it. MIT licence.' > $@
	echo >> $@
	sed -n -e '/^   Objects\. /,/\*\/$$/p' lvm.c >> $@
	echo >> $@
	sed -n -e '/^.ifndef LVM_H/,/^.endif .* LVM_H /p' lvm.c >> $@

$(B)/lvm.1: lvm | $(B)
	./lvm help --man > $@

MAN      = $(B)/lvm.1
BIN_TO   = $(DESTDIR)$(PREFIX)/bin
LIB_TO   = $(DESTDIR)$(LIBDIR)
H_TO     = $(DESTDIR)$(PREFIX)/include
MAN_TO   = $(DESTDIR)$(PREFIX)/share/man/man1

install: lvm liblvm.so lvm.h $(MAN)
	install -d $(BIN_TO) $(LIB_TO)/pkgconfig $(H_TO) $(MAN_TO)
	install -m 755 lvm $(BIN_TO)/lvm
	install -m 755 liblvm.so $(LIB_TO)/$(LIB_FILE)
	ln -sf $(LIB_FILE) $(LIB_TO)/$(LIB_ABI)
	ln -sf $(LIB_ABI) $(LIB_TO)/$(LIB)
	install -m 644 lvm.h $(H_TO)/lvm.h
	printf '%s\n' 'prefix=$(PREFIX)' 'libdir=$(LIBDIR)' 'includedir=$${prefix}/include' '' \
	    'Name: lvm' 'Description: Large Vision Models: prompts are images, answers are images' \
	    'Version: $(VERSION)' 'Libs: -L$${libdir} -llvm' 'Libs.private: -lm -lpthread' \
	    'Cflags: -I$${includedir}' > $(LIB_TO)/pkgconfig/lvm.pc
	install -m 644 $(MAN) $(MAN_TO)/lvm.1

uninstall:
	rm -f $(BIN_TO)/lvm $(H_TO)/lvm.h $(LIB_TO)/pkgconfig/lvm.pc $(MAN_TO)/lvm.1 \
	    $(LIB_TO)/$(LIB) $(LIB_TO)/$(LIB_ABI) $(LIB_TO)/$(LIB_FILE)

clean:
	rm -rf lvm lvm-static lvm.exe liblvm.so lvm.h scenes build

.DELETE_ON_ERROR:
.PHONY: static cuda test debug tsan fuzz train-demo evaluate install uninstall clean
