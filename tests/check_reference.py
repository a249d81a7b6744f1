"""Reference vectors of a full-size model, as transformers and open-muse compute them.

    python check_reference.py --open-muse DIR (--hf DIR | --llama DIR --vqgan DIR)
                              --out DIR FOLDER...

Needs torch, transformers, safetensors, numpy, Pillow up to 12.1 and a checkout of open-muse.
--hf is a folder as `convert.py --to-hf` writes it, with llama/ and vqgan/. Every FOLDER of images
is one prompt, read in the order of the names. OUT/FOLDER's name/ gets, in float32 on the CPU
(GroupNorm as in oracle.py):

    pixels (n, R, R, 3) u1, ids (n, T), gap (n, T)         tokens; gap between the two nearest codes
    positions (3,), logits (3, V)                          of BOS and all tokens of the prompt
    nll (m - 1,)                                           of these m tokens; the last T of it are
                                                           the last image's
    greedy (T,), greedy_gap (T,), greedy_pixels (1, 72, R, 3)   the top of the next image, unclamped
"""
import argparse
import os
import sys

import numpy as np
import torch
from PIL import Image

import oracle


def read_prompt(folder, size):
    names = sorted(f for f in os.listdir(folder) if f.lower().endswith((".png", ".jpg", ".jpeg")))
    images = [Image.open(os.path.join(folder, f)).convert("RGB") for f in names
              if not f.startswith("truth")]
    if not images:
        sys.exit(f"{folder}: no images")
    return np.stack([np.asarray(i if i.size == (size, size) else
                                i.resize((size, size), Image.BICUBIC)) for i in images])


def special(config, name, n_codes):
    """An id of config.json where it stands behind the image tokens, else None."""
    value = config.get(name)
    return value if value is not None and n_codes <= value < config["vocab_size"] else None


def reference(folder, out, vqgan, llama, bos):
    pixels = read_prompt(folder, vqgan.config.resolution)
    ids, gap = oracle.codes(vqgan, oracle.latents(vqgan, pixels))
    sequence = np.concatenate([[] if bos is None else [bos], ids.reshape(-1)]).astype(np.int64)
    logits, cache = oracle.read_sequence(llama, sequence)
    n, tokens = len(sequence), ids.shape[1]
    at = [0, tokens, n - 1]
    nll = oracle.likelihoods(logits, sequence)
    new, new_gap = oracle.greedy(llama, logits[-1], cache, tokens, vqgan.config.num_embeddings)
    oracle.save(out, "pixels", pixels, "|u1")
    oracle.save(out, "ids", ids, "<i4")
    oracle.save(out, "gap", gap, "<f4")
    oracle.save(out, "positions", at, "<i4")
    oracle.save(out, "logits", logits[at], "<f4")
    oracle.save(out, "nll", nll, "<f4")
    oracle.save(out, "greedy", new, "<i4")
    oracle.save(out, "greedy_gap", new_gap, "<f4")
    oracle.save(out, "greedy_pixels", oracle.images(vqgan, [new])[:, :72], "<f4")
    print(f"{folder}: {len(pixels)} images, {n} tokens, gaps below 1e-3: {(gap < 1e-3).sum()}; "
          f"last image {nll[-tokens:].mean():.6f} nats a token; least greedy gap "
          f"{min(new_gap):.5f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--open-muse", required=True, metavar="DIR")
    parser.add_argument("--hf", metavar="DIR")
    parser.add_argument("--llama", metavar="DIR")
    parser.add_argument("--vqgan", metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args()
    if not args.hf and not (args.llama and args.vqgan):
        parser.error("give --hf, or --llama and --vqgan")
    llama_folder = args.llama or os.path.join(args.hf, "llama")
    vqgan_folder = args.vqgan or os.path.join(args.hf, "vqgan")
    vqgan = oracle.open_vqgan(vqgan_folder, oracle.published_vqgan(args.open_muse))
    llama = oracle.open_llama(llama_folder)
    config = oracle.read_config(llama_folder)
    bos = special(config, "bos_token_id", vqgan.config.num_embeddings)
    torch.set_num_threads(2)
    for folder in args.folders:
        out = os.path.join(args.out, os.path.basename(os.path.abspath(folder)))
        reference(folder, out, vqgan, llama, bos)


if __name__ == "__main__":
    main()
