"""Small random models and what the published implementations make of them: tests/golden/.

    python make_golden.py --open-muse DIR [--out DIR] [--large] [NAME...]

Needs torch, transformers, safetensors, numpy and a checkout of open-muse (DIR holds muse/).
Everything follows from the names of the models, so two runs on one machine write the same bytes.
All outputs come from open-muse's VQGANModel and transformers' LlamaForCausalLM in float32 on the
CPU, computed from the weights as stored: rounded to their type, then upcast. (GroupNorm alone has
float64 inside: see oracle.py.)
--large adds tokenizers of several MB, too big to commit; they want another --out.
"""
import argparse
import json
import os
import zlib

import numpy as np
import torch
from safetensors.torch import save_file

import oracle

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LEAST_GAP = 2e-3    # a greedy continuation must not hang on the last bits of a logit
LEAST_IDS = 16      # of its 64 must differ: a loop of few proves little

# type, ids in the sequence, image tokens, then config.json. bos_token_id 1 and eos_token_id 2 are
# what published checkpoints inherit: image tokens, not special ids.
LLAMAS = {
    "llama_gqa": dict(type="f16", n=700, codes=64, hidden_size=64, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
                      vocab_size=64, rms_norm_eps=1e-5, shards=2),
    "llama_tied": dict(type="bf16", n=640, codes=256, hidden_size=96, num_hidden_layers=2,
                       num_attention_heads=3, num_key_value_heads=1, intermediate_size=32,
                       vocab_size=256, max_position_embeddings=4096, tie_word_embeddings=True),
    "llama_bias": dict(type="f32", n=577, codes=64, hidden_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
                       vocab_size=64, rope_theta=500000.0, attention_bias=True, style=5),
    "llama_hd96": dict(type="f16", n=600, codes=32, hidden_size=96, num_hidden_layers=1,
                       num_attention_heads=1, num_key_value_heads=1, intermediate_size=32,
                       vocab_size=32, max_position_embeddings=768),
    "llama_hd100": dict(type="bf16", n=530, codes=32, hidden_size=200, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, intermediate_size=28,
                        vocab_size=32),
    "llama_vocab8292": dict(type="f16", n=530, codes=8192, hidden_size=16, num_hidden_layers=3,
                            num_attention_heads=1, num_key_value_heads=1, intermediate_size=32,
                            vocab_size=8292, tie_word_embeddings=True, bos_token_id=8192,
                            eos_token_id=8193, positions=[0, 256]),
}

VQGANS = {
    # one level: no resampling at all; attention over 1024 places
    "vqgan_one_level": dict(type="f16", resolution=32, channel_mult=[1], num_res_blocks=2,
                            attn_resolutions=[32], z_channels=32, num_embeddings=1024,
                            quantized_embed_dim=8, kinds=[2]),
    # widths that fall and rise; one residual block: the encoder's attention exists and never runs,
    # the decoder's runs
    "vqgan_widths": dict(type="bf16", resolution=48, channel_mult=[2, 1], num_res_blocks=1,
                         attn_resolutions=[24], no_attn_mid_block=True, z_channels=24,
                         num_embeddings=256, quantized_embed_dim=12, f32_vectors=True,
                         kinds=[1]),
    # no attention anywhere, as in the published LVM's tokenizer
    "vqgan_plain": dict(type="f16", resolution=16, channel_mult=[1], num_res_blocks=1,
                        attn_resolutions=[], no_attn_mid_block=True, z_channels=16,
                        num_embeddings=256, quantized_embed_dim=16, kinds=[2]),
}

LARGE = {
    "vqgan_1_2": dict(type="f16", resolution=32, channel_mult=[1, 2], num_res_blocks=2,
                      attn_resolutions=[16], z_channels=64, num_embeddings=512,
                      quantized_embed_dim=32),
    "vqgan_1_1_2": dict(type="bf16", resolution=64, channel_mult=[1, 1, 2], num_res_blocks=4,
                        attn_resolutions=[32, 16], z_channels=36, num_embeddings=512,
                        quantized_embed_dim=36, resample_with_conv=False),
    "vqgan_1_2_4": dict(type="f16", resolution=64, channel_mult=[1, 2, 4], num_res_blocks=1,
                        attn_resolutions=[16, 32], z_channels=128, num_embeddings=512,
                        quantized_embed_dim=16, no_attn_mid_block=True),
    "vqgan_f32": dict(type="f32", resolution=80, channel_mult=[1, 2, 1], num_res_blocks=2,
                      attn_resolutions=[], z_channels=4, num_embeddings=512,
                      quantized_embed_dim=4),
}

# Four images of 64 tokens behind a BOS; the last token is never fed, hence 4 * 64 - 1 + 1.
BOTH_LLAMA = dict(type="f16", codes=256, hidden_size=64, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
                  vocab_size=260, max_position_embeddings=256, bos_token_id=256, eos_token_id=257)
BOTH_VQGAN = dict(type="bf16", resolution=32, channel_mult=[1, 1, 1], num_res_blocks=1,
                  attn_resolutions=[8], z_channels=16, num_embeddings=256, quantized_embed_dim=16,
                  resample_with_conv=False)
WINDOW = 4


def generator(*names):
    return np.random.RandomState(zlib.crc32(" ".join(map(str, names)).encode()))


def draw(rng, shape, std, mean=0.0):
    return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))


def llama_config(spec):
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
                  bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-6, rope_theta=10000.0,
                  max_position_embeddings=1024, attention_bias=False, mlp_bias=False,
                  tie_word_embeddings=False)
    config.update({k: v for k, v in spec.items()
                   if k not in ("type", "n", "codes", "shards", "style", "positions")})
    name = str(TYPES[spec["type"]]).split(".")[1]
    if spec.get("style") == 5:
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"),
                                     "rope_type": "default"}
        config["dtype"] = name
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    else:
        config["torch_dtype"] = name
    return config


def llama_weights(spec, rng):
    """Scores with a deviation of about 2 before the softmax, logits of about 2."""
    width, ffn, vocab = (spec[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = width // spec["num_attention_heads"] * spec["num_key_value_heads"]
    gain = {"self_attn.q_proj": (width, width, 1.5), "self_attn.k_proj": (kv, width, 1.4),
            "self_attn.v_proj": (kv, width, 1.5), "self_attn.o_proj": (width, width, 1.5),
            "mlp.gate_proj": (ffn, width, 1.5), "mlp.up_proj": (ffn, width, 1.2),
            "mlp.down_proj": (width, ffn, 1.0)}
    tied = spec.get("tie_word_embeddings")
    w = {"model.embed_tokens.weight": draw(rng, (vocab, width), 2 / width ** 0.5 if tied else 1)}
    for layer in range(spec["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        w[at + "input_layernorm.weight"] = draw(rng, (width,), 0.2, 1)
        w[at + "post_attention_layernorm.weight"] = draw(rng, (width,), 0.2, 1)
        for name, (rows, cols, g) in gain.items():
            w[at + name + ".weight"] = draw(rng, (rows, cols), g / cols ** 0.5)
            if spec.get("attention_bias") and "attn" in name:
                w[at + name + ".bias"] = draw(rng, (rows,), 0.3)
    w["model.norm.weight"] = draw(rng, (width,), 0.2, 1)
    if not tied:
        w["lm_head.weight"] = draw(rng, (vocab, width), 2 / width ** 0.5)
    return {k: v.to(TYPES[spec["type"]]) for k, v in w.items()}


def write_model(folder, config, weights, shards=1):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)
        f.write("\n")
    if shards == 1:
        save_file(weights, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        return
    names, where = sorted(weights), {}
    for i in range(shards):
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({k: weights[k] for k in part}, os.path.join(folder, file), {"format": "pt"})
        where.update({k: file for k in part})
    total = sum(v.numel() * v.element_size() for v in weights.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, f, indent=2)
        f.write("\n")


def make_llama(out, name, spec):
    n, n_codes, folder = spec["n"], spec["codes"], os.path.join(out, name)
    rng = generator(name, "ids")
    ids = rng.randint(0, n_codes, n)
    if spec.get("bos_token_id", 0) >= n_codes:
        ids[0] = spec["bos_token_id"]
    for salt in range(100):
        write_model(os.path.join(folder, "llama"), llama_config(spec),
                    llama_weights(spec, generator(name, salt)), spec.get("shards", 1))
        model = oracle.open_llama(os.path.join(folder, "llama"))
        logits, cache = oracle.read_sequence(model, ids)
        new, gaps = oracle.greedy(model, logits[-1], cache, 64, n_codes)
        if min(gaps) > LEAST_GAP and len(set(new)) >= LEAST_IDS:
            break
    at = spec.get("positions", [0, 1, 255, 256, 257, 511, 512, n - 1])
    oracle.save(folder, "codes", [n_codes], "<i4")
    oracle.save(folder, "ids", ids, "<i4")
    oracle.save(folder, "positions", at, "<i4")
    oracle.save(folder, "logits", logits[at], "<f4")
    nll = oracle.likelihoods(logits, ids)
    oracle.save(folder, "nll", nll, "<f4")
    oracle.save(folder, "greedy", new, "<i4")
    oracle.save(folder, "greedy_gap", gaps, "<f4")
    print(f"{name}: weights {salt}, logits {logits.std():.2f}, nll {nll.mean():.2f}, "
          f"{len(set(new))} distinct of 64, least gap {min(gaps):.4f}")


def smooth(rng, size, cells):
    """(size, size, 3): random colours on a coarse grid, interpolated."""
    grid = rng.uniform(0, 1, (cells + 1, cells + 1, 3))
    place = np.linspace(0, cells, size, endpoint=False)
    low, part = place.astype(int), place - place.astype(int)
    rows = grid[low] * (1 - part)[:, None, None] + grid[low + 1] * part[:, None, None]
    return rows[:, low] * (1 - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]


def image(rng, size, kind):
    """0: smooth colours, 1: noise, 2: shaded discs before a textured ground, like a photo."""
    if kind == 0:
        image = smooth(rng, size, 4)
    elif kind == 1:
        image = rng.uniform(0, 1, (size, size, 3))
    else:
        image = 0.7 * smooth(rng, size, 2) + 0.15 * smooth(rng, size, 8)
        y, x = np.mgrid[0:size, 0:size] / size
        for _ in range(6):
            cx, cy, r = rng.uniform(0, 1, 2).tolist() + [rng.uniform(0.08, 0.3)]
            inside = np.clip((r - np.hypot(x - cx, y - cy)) * size + 0.5, 0, 1)[..., None]
            light = np.clip(0.6 + (cx - x + cy - y) / r * 0.4, 0, 1)[..., None]
            image = image * (1 - inside) + inside * light * rng.uniform(0, 1, 3)
        image = image + rng.normal(0, 0.02, image.shape)
    return np.clip(np.round(image * 255), 0, 255).astype(np.uint8)


def vqgan_config(spec):
    config = dict(_class_name="VQGANModel", _version="0.0.1", num_channels=3, hidden_channels=32,
                  no_attn_mid_block=False, dropout=0.0, resample_with_conv=True,
                  commitment_cost=0.25)
    config.update({k: v for k, v in spec.items() if k not in ("type", "f32_vectors", "kinds")})
    return config


def vqgan_weights(model, rng):
    """Convolutions that keep the deviation near 1; attention scores with one of about 2."""
    w = {}
    for name, old in model.state_dict().items():
        shape, last = tuple(old.shape), name.split(".")[-2]
        if "norm" in last:
            w[name] = draw(rng, shape, 0.2, 1 if name.endswith("weight") else 0)
        elif name.endswith("bias"):
            mean, std = (0.5, 0.1) if name == "decoder.conv_out.bias" else (0, 0.2)
            w[name] = draw(rng, shape, std, mean)
        elif last == "embedding":
            w[name] = old
        else:
            gain = {"q": 1.5, "k": 1.5, "conv_in": 2.0, "quant_conv": 2.0}.get(last, 1.4)
            if name == "decoder.conv_out.weight":
                gain = 0.25
            w[name] = draw(rng, shape, gain / np.prod(shape[1:]) ** 0.5)
    return w


def stored(weights, spec):
    """Rounded to the model's type, norms and biases left at float32 where the spec says so."""
    keep = spec.get("f32_vectors")
    return {k: v if keep and v.dim() == 1 else v.to(TYPES[spec["type"]])
            for k, v in weights.items()}


def make_vqgan(folder, name, spec, vqgan_class):
    """A random network, and a codebook of places that its latents visit."""
    rng, config = generator(name), vqgan_config(spec)
    model = oracle.mend(vqgan_class(**{k: v for k, v in config.items() if k[0] != "_"}))
    weights = vqgan_weights(model, rng)
    model.load_state_dict({k: v.float() for k, v in stored(weights, spec).items()})
    size, rows = spec["resolution"], spec["num_embeddings"]
    seen = np.stack([image(rng, size, i % 3) for i in range(30)])
    z = oracle.latents(model, seen).reshape(-1, spec["quantized_embed_dim"])
    book = z[torch.from_numpy(rng.choice(len(z), rows, replace=False))]
    weights["quantize.embedding.weight"] = book + 0.1 * z.std() * draw(rng, book.shape, 1)
    write_model(folder, config, stored(weights, spec))
    return oracle.open_vqgan(folder, vqgan_class)


def vqgan_vectors(folder, name, model, kinds):
    size = model.config.resolution
    rng = generator(name, "images")
    pixels = np.stack([image(rng, size, kind) for kind in kinds])
    z = oracle.latents(model, pixels)
    ids, gap = oracle.codes(model, z)
    out = oracle.images(model, ids)
    oracle.save(folder, "pixels", pixels, "|u1")
    oracle.save(folder, "latent", z, "<f4")
    oracle.save(folder, "ids", ids, "<i4")
    oracle.save(folder, "gap", gap, "<f4")
    oracle.save(folder, "pixels_out", out, "<f4")
    print(f"{name}: latents {z.std():.2f}, {len(np.unique(ids))} codes of "
          f"{model.config.num_embeddings} in {ids.size}, gaps below 1e-3: {(gap < 1e-3).sum()}, "
          f"median {np.median(gap):.3f}; pixels {out.mean():.2f} +- {out.std():.2f}")
    return ids


def slide(llama, history, bos, n_codes, count):
    """The published loop: at most WINDOW - 1 last images, one new image, again."""
    history, gaps = [list(h) for h in history], []
    given = len(history)
    for _ in range(count):
        ids = [bos] + [i for h in history[-(WINDOW - 1):] for i in h]
        logits, cache = oracle.read_sequence(llama, ids)
        new, gap = oracle.greedy(llama, logits[-1], cache, len(history[0]), n_codes)
        history.append(new)
        gaps += gap
    return history[given:], gaps


def make_both(out, vqgan_class):
    folder, spec, bos = os.path.join(out, "both"), BOTH_LLAMA, BOTH_LLAMA["bos_token_id"]
    vqgan = make_vqgan(os.path.join(folder, "vqgan"), "both", BOTH_VQGAN, vqgan_class)
    ids = vqgan_vectors(folder, "both", vqgan, [2, 0, 2, 1, 2])
    for salt in range(400):
        write_model(os.path.join(folder, "llama"), llama_config(spec),
                    llama_weights(spec, generator("both", salt)))
        llama = oracle.open_llama(os.path.join(folder, "llama"))
        runs = {"greedy": slide(llama, ids, bos, spec["codes"], 3),
                "greedy_short": slide(llama, ids[:2], bos, spec["codes"], 3)}
        least = min(min(gaps) for _, gaps in runs.values())
        if least > LEAST_GAP:
            break
    for name, (new, gaps) in runs.items():
        oracle.save(folder, name, np.concatenate(new), "<i4")
        oracle.save(folder, name + "_gap", gaps, "<f4")
        print(f"both {name}: {[len(set(p)) for p in new]} distinct of 64, least {min(gaps):.4f}")
    oracle.save(folder, "greedy_pixels", oracle.images(vqgan, runs["greedy"][0]), "<f4")
    sentence = np.concatenate([[bos], ids[-WINDOW:].reshape(-1)])
    logits, _ = oracle.read_sequence(llama, sentence)
    nll = oracle.likelihoods(logits, sentence)
    oracle.save(folder, "codes", [spec["codes"]], "<i4")
    oracle.save(folder, "sentence", sentence, "<i4")
    oracle.save(folder, "nll", nll, "<f4")
    print(f"both: weights {salt}, logits {logits.std():.2f}, nll {nll.mean():.2f}")


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only these models")
    parser.add_argument("--open-muse", required=True, metavar="DIR")
    parser.add_argument("--out", default=os.path.join(here, "golden"))
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    vqgan_class = oracle.published_vqgan(args.open_muse)
    tokenizers = dict(VQGANS, **LARGE) if args.large else VQGANS
    wanted = args.names or [*LLAMAS, *tokenizers, "both"]
    for name in wanted:
        if name in LLAMAS:
            make_llama(args.out, name, LLAMAS[name])
        elif name in tokenizers:
            folder = os.path.join(args.out, name)
            model = make_vqgan(os.path.join(folder, "vqgan"), name, tokenizers[name], vqgan_class)
            vqgan_vectors(folder, name, model, tokenizers[name].get("kinds", [0, 2]))
        elif name == "both":
            make_both(args.out, vqgan_class)
        else:
            parser.error(f"no model {name!r}; there are {', '.join([*LLAMAS, *tokenizers])}, both")


if __name__ == "__main__":
    main()
