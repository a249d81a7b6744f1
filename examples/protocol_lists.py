#!/usr/bin/env python3
"""Draw the episodes of the visual prompting protocols (Bar et al. 2022, arXiv 2209.00647) exactly as
their program does, as lists for `lvm score protocol`; Python's standard library alone.

    python3 examples/protocol_lists.py vp-segmentation --program CODE --fold 0 > fold0.txt
    python3 examples/protocol_lists.py vp-detection --program CODE --data VOC > detection.txt
    python3 examples/protocol_lists.py vp-colorization --data IMAGENET > colorization.txt

CODE is a copy of github.com/amirbar/visual_prompting, for its folds (evaluate/splits/pascal/val) and
its list of detection images (evaluate_detection/2012_val_flattened_set.pth). VOC holds VOCdevkit/
VOC2012, IMAGENET holds val/ with a folder a class. Then, with weights W and the data D:

    lvm score protocol vp-segmentation fold0.txt --base D -o prompts
    lvm batch W prompts/prompts.jsonl -o answers
    lvm score protocol vp-segmentation answers fold0.txt --base D

The program draws by NumPy's legacy generator, seeded 0 (segmentation, detection) or 5: the Mersenne
twister, which Python's random has too, and three ways to use it, which are here."""
import argparse
import codecs
import os
import pickle
import random
import sys
import xml.etree.ElementTree
import zipfile

CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
           "person pottedplant sheep sofa train tvmonitor").split()
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EPISODES = 1000


class Legacy:
    """numpy.random.RandomState(seed), as far as it is needed."""

    def __init__(self, seed):
        state = [seed]
        for i in range(1, 624):
            state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xffffffff)
        self.twister = random.Random()
        self.twister.setstate((3, tuple(state) + (624,), None))

    def below(self, n):
        """choice(n), randint(n): draws of as many bits as n - 1 has, until one is below n."""
        if n == 1:
            return 0
        mask = (1 << (n - 1).bit_length()) - 1
        while True:
            v = self.twister.getrandbits(32) & mask
            if v < n:
                return v

    def permutation(self, n):
        """permutation(n), and what shuffle makes of 0 .. n - 1."""
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


def segmentation(splits, fold):
    """evaluate/pascal_dataloader.py: the fold's images in order; a support is drawn until it is
    another image than the query."""
    rng = Legacy(0)
    with open(os.path.join(splits, "fold%d.txt" % fold)) as f:
        images = [line.split("__") for line in f.read().split("\n")[:-1]]
    images = [(name, int(number)) for name, number in images]
    for episode in range(EPISODES):
        query, number = images[episode % len(images)]
        same = [name for name, other in images if other == number]
        while True:
            support = same[rng.permutation(len(same))[0]]
            if support != query:
                break
        yield "%s %s %d" % (query, support, number)


class Flattened(pickle.Unpickler):
    """What torch.save wrote: pairs of a number and a NumPy integer. Nothing else is made."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        if name == "dtype":
            return NoType
        if name == "scalar":
            return lambda kind, data: int.from_bytes(data, "little", signed=True)
        raise pickle.UnpicklingError("%s.%s has no place here" % (module, name))


class NoType:
    """A NumPy dtype, of which nothing is needed."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def read_flattened(path):
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(name) as f:
            return [int(index) for index, _ in Flattened(f).load()]


def read_objects(voc, name):
    """Width, height and (class, x0, y0, x1, y1) of the objects of an image."""
    root = xml.etree.ElementTree.parse(os.path.join(voc, "Annotations", name + ".xml")).getroot()
    size = root.find("size")
    objects = []
    for thing in root.findall("object"):
        box = thing.find("bndbox")
        x0, y0, x1, y1 = (float(box.find(side).text) for side in ("xmin", "ymin", "xmax", "ymax"))
        objects.append((CLASSES.index(thing.find("name").text) + 1, x0 - 1, y0 - 1, x1, y1))
    return int(size.find("width").text), int(size.find("height").text), objects


def single_objects(voc, split):
    """Images with one object, whose box has less than a fifth of their area."""
    kept = []
    with open(os.path.join(voc, "ImageSets/Main", split + ".txt")) as f:
        for name in (line.strip() for line in f):
            width, height, objects = read_objects(voc, name)
            if len(objects) != 1:
                continue
            number, x0, y0, x1, y1 = objects[0]
            if (x1 - x0) * (y1 - y0) / (width * height) < 0.2:
                kept.append((name, number, "%d %d %d %d %d %d" % (width, height, x0, y0, x1, y1)))
    return kept


def detection(voc, flattened):
    """evaluate_detection/canvas_ds.py. Its data sets look an image's place up in the list of the
    whole val split, also in their own, shorter lists and for train: some images come twice."""
    rng = Legacy(0)
    train, val = single_objects(voc, "train"), single_objects(voc, "val")
    for episode in range(len(val)):
        name, number, box = val[flattened[episode]]
        rng.below(1)                       # the class, of one
        for i in rng.permutation(len(train)):
            support, other, support_box = train[flattened[i]]
            if other == number:
                break                      # if none is of the class, the last one stays
        yield "%s %s %d %s %s" % (name, support, number, box, support_box)


def colorization(val):
    """evaluate/in_colorization_dataloader.py: 1000 queries; supports are of the first 999 images."""
    rng = Legacy(5)
    files = []
    for folder in sorted(entry.name for entry in os.scandir(val) if entry.is_dir()):
        for path, _, names in sorted(os.walk(os.path.join(val, folder), followlinks=True)):
            files += [os.path.relpath(os.path.join(path, name), val).replace(os.sep, "/")
                      for name in sorted(names) if name.lower().endswith(IMAGES)]
    if len(files) <= EPISODES:
        raise OSError("%s: %d images; more than %d are needed" % (val, len(files), EPISODES))
    queries = rng.permutation(len(files) - 1)[:EPISODES]
    for query in queries:
        yield "%s %s" % (files[query], files[rng.below(EPISODES - 1)])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=["vp-segmentation", "vp-detection", "vp-colorization"])
    parser.add_argument("--program", help="a copy of the published program")
    parser.add_argument("--data", help="the folder of the images")
    parser.add_argument("--fold", type=int, choices=range(4), default=0)
    args = parser.parse_args()
    needs_program = args.protocol != "vp-colorization"
    if needs_program and not args.program or args.protocol != "vp-segmentation" and not args.data:
        parser.error("%s needs %s" % (args.protocol, {"vp-segmentation": "--program", "vp-detection":
                                      "--program and --data", "vp-colorization": "--data"}[args.protocol]))
    if args.protocol == "vp-segmentation":
        lines = segmentation(os.path.join(args.program, "evaluate/splits/pascal/val"), args.fold)
    elif args.protocol == "vp-detection":
        flattened = read_flattened(os.path.join(args.program, "evaluate_detection",
                                                "2012_val_flattened_set.pth"))
        lines = detection(os.path.join(args.data, "VOCdevkit/VOC2012"), flattened)
    else:
        lines = colorization(os.path.join(args.data, "val"))
    print("# " + args.protocol)
    for line in lines:
        print(line)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, LookupError, StopIteration, zipfile.BadZipFile,
            pickle.UnpicklingError, xml.etree.ElementTree.ParseError) as fault:
        sys.exit("protocol_lists.py: %s" % fault)
