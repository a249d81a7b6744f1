"""The models that the vectors come from, computed by other people's code in float32.

Needs torch, transformers, safetensors and numpy; only the scripts that make vectors import this.
The transformer is transformers' LlamaForCausalLM. The tokenizer is open-muse's VQGANModel, taken
from a checkout of https://github.com/huggingface/open-muse (the folder that holds muse/).
"""
import functools
import json
import os
import sys
import types

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


def published_vqgan(checkout):
    """The class VQGANModel of an open-muse checkout, without the packages it does not need here."""
    folder = os.path.join(checkout, "muse")
    if not os.path.isfile(os.path.join(folder, "modeling_taming_vqgan.py")):
        sys.exit(f"{checkout}: holds no muse/modeling_taming_vqgan.py")
    muse = types.ModuleType("muse")
    muse.__path__, muse.__version__ = [folder], "0.0.1"
    sys.modules["muse"] = muse
    # modeling_utils imports accelerate for loading large files; a stand-in serves, and goes again,
    # because transformers would take its presence for the real package.
    missing = "accelerate" not in sys.modules
    if missing:
        utils = types.ModuleType("accelerate.utils")
        utils.set_module_tensor_to_device = None
        sys.modules["accelerate"] = types.ModuleType("accelerate")
        sys.modules["accelerate.utils"] = utils
    from muse.modeling_taming_vqgan import VQGANModel
    if missing:
        del sys.modules["accelerate"], sys.modules["accelerate.utils"]
    return VQGANModel


def read_config(folder):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        return json.load(f)


def read_weights(folder):
    """All tensors of model.safetensors or of its shards, upcast to float32."""
    index = os.path.join(folder, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            names = sorted(set(json.load(f)["weight_map"].values()))
    weights = {}
    for name in names:
        weights.update(load_file(os.path.join(folder, name)))
    return {k: v.float() for k, v in weights.items()}


def precise_group_norm(norm, x):
    """What norm computes, with float64 inside. The float32 code of torch 1.13 on CPUs loses half
    its digits when values drift along a group, as they do in images: 0.4 % of the deviation after
    conv_in of a 256-pixel photo, 1.7 % in its worst group. Its var_mean has no such fault."""
    return torch.nn.functional.group_norm(
        x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps).float()


def mend(vqgan):
    for module in vqgan.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = functools.partial(precise_group_norm, module)
    return vqgan.eval()


def open_vqgan(folder, vqgan_class):
    config = {k: v for k, v in read_config(folder).items() if not k.startswith("_")}
    model = vqgan_class(**config)
    model.load_state_dict(read_weights(folder))
    return mend(model)


def open_llama(folder):
    config = read_config(folder)
    rope = config.pop("rope_parameters", None)      # what transformers 5 writes
    if rope:
        config["rope_theta"] = rope["rope_theta"]
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    model = LlamaForCausalLM._from_config(LlamaConfig(**config), attn_implementation="eager")
    weights = read_weights(folder)
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def latents(vqgan, pixels):
    """(n, R, R, 3) of 0..255 -> (n, T, D): what the quantiser looks up."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
    z = torch.cat([vqgan.quant_conv(vqgan.encoder(one)) for one in x.split(1)])
    return z.permute(0, 2, 3, 1).reshape(len(x), -1, z.shape[1])


@torch.no_grad()
def codes(vqgan, z):
    """(n, T, D) -> the published class's ids (n, T), and the gaps (n, T) between the two least
    squared distances, in float64 from these float32 latents."""
    n, tokens, width = z.shape
    side = int(round(tokens ** 0.5))
    ids = vqgan.quantize.get_code(z.reshape(n, side, side, width).permute(0, 3, 1, 2))
    book = vqgan.quantize.embedding.weight.double()
    gaps = []
    for rows in z.reshape(-1, width).double().split(256):
        least = ((rows[:, None] - book[None]) ** 2).sum(2).topk(2, 1, largest=False).values
        gaps.append(least[:, 1] - least[:, 0])
    return ids.numpy(), torch.cat(gaps).reshape(n, tokens).numpy()


@torch.no_grad()
def images(vqgan, ids):
    """(n, T) -> (n, R, R, 3) float32, 0..1 where the decoder stays inside, not clamped."""
    rows = torch.as_tensor(np.asarray(ids), dtype=torch.long).split(1)
    return torch.cat([vqgan.decode_code(one) for one in rows]).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def read_sequence(llama, ids):
    """Logits (n, V) after each of the n ids, and the cache to go on from."""
    out = llama(torch.as_tensor(np.asarray(ids), dtype=torch.long)[None], use_cache=True)
    return out.logits[0], out.past_key_values


@torch.no_grad()
def greedy(llama, logits, cache, count, n_codes):
    """count ids, each the likeliest below n_codes, and how far ahead of the second it was."""
    ids, gaps = [], []
    for _ in range(count):
        best = logits[:n_codes].topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        out = llama(best.indices[:1][None], past_key_values=cache, use_cache=True)
        logits, cache = out.logits[0, -1], out.past_key_values
    return ids, gaps


def likelihoods(logits, ids):
    """-log p(ids[i+1] | ids[..i]) for every i, over the whole vocabulary."""
    logp = torch.log_softmax(logits[:-1].double(), -1)
    following = torch.as_tensor(np.asarray(ids)[1:], dtype=torch.long)
    return -logp.gather(1, following[:, None])[:, 0].numpy()


def save(folder, name, values, dtype):
    """A .npy file of format version 1.0, C order."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name + ".npy"), "wb") as f:
        array = np.ascontiguousarray(np.asarray(values), dtype=dtype)
        np.lib.format.write_array(f, array, version=(1, 0))
