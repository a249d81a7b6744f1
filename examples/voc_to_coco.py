#!/usr/bin/env python3
"""Pascal VOC's annotations as COCO's JSON, for `lvm sentences boxes`. Standard library only.

    python3 examples/voc_to_coco.py VOC2012/Annotations -o voc.json [--images LIST.txt]
    lvm sentences boxes VOC2012/JPEGImages voc.json --tokenizer weights.bin -o boxes.tok

A folder has an XML file an image. LIST.txt names those that count, one a line without ending, as
ImageSets/Main/train.txt does. Categories are numbered from 1 in the order of their names. VOC counts
pixels from 1 and its boxes hold both ends: xmin 48, xmax 195 become x 47, width 148. Objects marked
as difficult stay; their "iscrowd" is 0, for VOC knows no crowds.
"""

import argparse
import json
import os
import sys
import xml.etree.ElementTree as ET


def read_annotation(path):
    """File name, width, height and objects (name, x, y, width, height) of one image."""
    root = ET.parse(path).getroot()
    name = root.findtext("filename") or os.path.splitext(os.path.basename(path))[0] + ".jpg"
    objects = []
    for thing in root.iter("object"):
        box = thing.find("bndbox")
        x0, y0, x1, y1 = (float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
        objects.append((thing.findtext("name"), x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1))
    return name, int(root.findtext("size/width")), int(root.findtext("size/height")), objects


def to_coco(annotations):
    names = sorted({thing[0] for image in annotations for thing in image[3]})
    number = {name: i for i, name in enumerate(names, 1)}
    images, boxes = [], []
    for i, (name, width, height, objects) in enumerate(annotations, 1):
        images.append({"id": i, "file_name": name, "width": width, "height": height})
        for kind, *box in objects:
            boxes.append({"id": len(boxes) + 1, "image_id": i, "category_id": number[kind],
                          "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return {"images": images, "annotations": boxes,
            "categories": [{"id": number[name], "name": name} for name in names]}


def main():
    parser = argparse.ArgumentParser(description="Pascal VOC's XML files as COCO's JSON")
    parser.add_argument("folder", help="of XML files, an image each")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.json")
    parser.add_argument("--images", metavar="LIST.txt", help="names of the images that count")
    args = parser.parse_args()
    annotations = []
    try:
        if args.images:
            with open(args.images, encoding="utf-8") as f:
                names = [line.split()[0] + ".xml" for line in f if line.strip()]
        else:
            names = sorted(name for name in os.listdir(args.folder) if name.endswith(".xml"))
        if not names:
            sys.exit("%s: there are no XML files" % args.folder)
        for name in names:
            path = os.path.join(args.folder, name)
            try:
                annotations.append(read_annotation(path))
            except (ET.ParseError, AttributeError, TypeError, ValueError) as fault:
                sys.exit("%s: is no annotation of VOC: %s" % (path, fault))
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump(to_coco(annotations), f)
    except OSError as fault:
        sys.exit("%s: %s" % (fault.filename, fault.strerror))


if __name__ == "__main__":
    main()
