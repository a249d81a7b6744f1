"""Small random transformers, and what PyTorch says their gradients are: tests/golden_training/.

    python make_training_golden.py [--out DIR] [NAME...]

Needs torch, transformers, peft, safetensors and numpy. The models are transformers'
LlamaForCausalLM, adapters on them are PEFT's, gradients are autograd's, and the optimiser is
torch.optim.AdamW behind clip_grad_norm_: all in float64 from the weights as stored, and rounded to
float32 at the end. RoPE's angles stay float32, as transformers has them in any type. The same in
float32, without any change to the published code, is computed beside it; how far the two lie apart
is printed: what a float32 program may be asked for.
Everything follows from the names of the cases, so two runs on one machine write the same bytes.
"""
import argparse
import contextlib
import math
import os

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import make_golden
import oracle

# What make_golden.LLAMAS has. Heads of 24, 12 and 10 numbers; rows that fill no vector register.
MODELS = {
    "plain": dict(type="f32", hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=2, intermediate_size=28, vocab_size=34),
    "gqa": dict(type="f16", hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=28, vocab_size=38, rms_norm_eps=1e-5,
                rope_theta=500000.0, attention_bias=True, style=5),
    "tied": dict(type="bf16", hidden_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=1, intermediate_size=20, vocab_size=34,
                 tie_word_embeddings=True),
}

# The model; the tokens of its two rows, sentence by sentence, that attend to each other; those
# behind them are padding. Attention works on blocks of 256 keys: some cross their border.
CASES = {
    "plain": ("plain", 300, [[300], [300]]),
    "gqa": ("gqa", 61, [[61], [61]]),
    "tied": ("tied", 40, [[40], [40]]),
    "isolate": ("tied", 290, [[31, 259], [100, 1, 130]]),
    "lora": ("gqa", 61, [[61], [61]]),
}
RANK, ALPHA = 4, 8
LORA_ON = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Ten steps of the model "plain" on ten batches. The gradient's norm lies on both sides of CLIP.
STEPS, WARMUP, LR, MIN_LR, CLIP, DECAY, CONTEXT = 10, 3, 4e-3, 4e-4, 6.0, 0.1, 40
WATCHED = ("model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight")


@contextlib.contextmanager
def precise_norms(dtype):
    """RMSNorm as published computes in float32 whatever the model's type: for float64 the same
    lines without that."""
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)
                                              + self.variance_epsilon))
    published = LlamaRMSNorm.forward
    if dtype == torch.float64:
        LlamaRMSNorm.forward = forward
    try:
        yield
    finally:
        LlamaRMSNorm.forward = published


def open_model(folder, dtype):
    """In "eager" attention scores are float32 in any type; "sdpa" keeps the type."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                             attn_implementation="sdpa").to(dtype)
    return model.train()


def sentence_mask(context, sentences):
    """(rows, 1, context, context): who sees whom; and positions, which restart. A padding token
    sees itself alone, so that it has something to see."""
    mask = torch.eye(context, dtype=torch.bool).repeat(len(sentences), 1, 1, 1)
    positions = torch.zeros(len(sentences), context, dtype=torch.long)
    for row, lengths in enumerate(sentences):
        at = 0
        for n in lengths:
            mask[row, 0, at:at + n, at:at + n] = torch.ones(n, n, dtype=torch.bool).tril()
            positions[row, at:at + n] = torch.arange(n)
            at += n
    return mask, positions


def weighted_loss(model, batch):
    """The sum of w (-ln p) over the sum of w, in the model's own type."""
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"],
                   position_ids=batch["positions"], use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(),
                                            reduction="none")
    weights = batch["weights"].to(nll.dtype).flatten()
    return (weights * nll).sum() / weights.sum()


def chain(rng, vocab, shape):
    """Ids that are partly to be foreseen: mostly the last one's one successor, else any."""
    successor = make_golden.generator("chain", vocab).permutation(vocab)
    ids = rng.randint(0, vocab, shape)
    for i in range(1, shape[1]):
        follow = rng.uniform(size=shape[0]) < 0.7
        ids[:, i] = np.where(follow, successor[ids[:, i - 1]], ids[:, i])
    return ids


def make_batch(rng, vocab, context, sentences):
    """Loss weights as a .tok file has them, in sixteenths, many of them 0; padding's are 0."""
    ids = chain(rng, vocab, (len(sentences), context + 1))
    weights = rng.choice([0, 0, 4, 16, 16, 16, 40], (len(sentences), context)) / 16
    for row, lengths in enumerate(sentences):
        weights[row, sum(lengths):] = 0
    mask, positions = sentence_mask(context, sentences)
    return dict(ids=torch.from_numpy(ids[:, :-1].copy()), mask=mask, positions=positions,
                targets=torch.from_numpy(ids[:, 1:].copy()),
                weights=torch.from_numpy(weights.astype(np.float32)))


def save_batch(folder, batch):
    oracle.save(folder, "ids", batch["ids"].numpy(), "<i4")
    oracle.save(folder, "targets", batch["targets"].numpy(), "<i4")
    oracle.save(folder, "weights", batch["weights"].numpy(), "<f4")


def add_adapters(model, case):
    """PEFT's, with numbers in B too, which begins as zeros; then a gradient reaches A."""
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0,
                                             target_modules=list(LORA_ON)))
    rng = make_golden.generator(case, "adapters")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(make_golden.draw(rng, tuple(p.shape), 0.5 / p.shape[1] ** 0.5))
    return model


def gradients(folder, case, dtype, batch):
    """(the loss, {name: gradient}, {name: adapter})"""
    with precise_norms(dtype):
        model = open_model(folder, torch.float32)
        if case == "lora":
            model = add_adapters(model, case)
        model = model.to(dtype)
        loss = weighted_loss(model, batch)
        loss.backward()
    learn = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return (loss.item(), {k: p.grad.double() for k, p in learn.items()},
            {k: p.detach() for k, p in learn.items() if "lora_" in k})


def distance(a, b):
    """The largest over all tensors of max|a - b| / max|b|, and of the same by L2 norms."""
    most = max(((a[k] - b[k]).abs().max() / b[k].abs().max()).item() for k in b)
    return most, max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in b)


def flat(tensors, layers):
    """Adapters one behind the other: layers, in each of them q, k, v, o, gate, up, down, of each A
    [rank][in] and B [out][rank]."""
    parts = []
    for layer in range(layers):
        for module in LORA_ON:
            for which in ("lora_A", "lora_B"):
                parts += [t.numpy().ravel() for k, t in tensors.items()
                          if f"layers.{layer}." in k and module in k and which in k]
    assert len(parts) == len(tensors)
    return np.concatenate(parts)


def make_model(out, name):
    folder = os.path.join(out, name, "llama")
    spec = MODELS[name]
    make_golden.write_model(folder, make_golden.llama_config(spec), make_golden.llama_weights(
        spec, make_golden.generator("training", name)))


def make_case(out, case):
    """Of lora the adapters and theirs as arrays, else the gradients in the layout of a checkpoint,
    which convert.py reads as if they were weights."""
    name, context, sentences = CASES[case]
    spec, folder, model = MODELS[name], os.path.join(out, case), os.path.join(out, name, "llama")
    os.makedirs(folder, exist_ok=True)
    batch = make_batch(make_golden.generator("training", case, "ids"), spec["vocab_size"], context,
                       sentences)
    loss, exact, adapters = gradients(model, case, torch.float64, batch)
    loss32, single, _ = gradients(model, case, torch.float32, batch)
    save_batch(folder, batch)
    pieces = [(row * context + sum(lengths[:i]), n) for row, lengths in enumerate(sentences)
              for i, n in enumerate(lengths)]
    oracle.save(folder, "pieces", pieces, "<i4")
    oracle.save(folder, "loss", [loss], "<f4")
    if case == "lora":
        oracle.save(folder, "adapters", flat(adapters, spec["num_hidden_layers"]), "<f4")
        oracle.save(folder, "adapter_gradients", flat(exact, spec["num_hidden_layers"]), "<f4")
    else:
        config = make_golden.llama_config(dict(spec, type="f32"))
        make_golden.write_model(os.path.join(folder, "gradients"), config,
                                {k: g.float() for k, g in exact.items()})
    print(f"{case}: loss {loss:.4f}, {len(exact)} tensors; in float32 the loss is "
          f"{loss32 - loss:+.1e}, gradients %.1e by the largest, %.1e by L2"
          % distance(single, exact))


def rate(step):
    """The learning rate of a step; the first is 1."""
    if step <= WARMUP:
        return LR * step / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * share))


def train(folder, dtype, batches):
    """(losses before each step, norms before clipping, the model afterwards)"""
    with precise_norms(dtype):
        model, losses, norms = open_model(folder, dtype), [], []
        groups = [dict(params=[p for p in model.parameters() if p.dim() == 2], weight_decay=DECAY),
                  dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)]
        adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
        for step, batch in enumerate(batches, 1):
            for group in adamw.param_groups:
                group["lr"] = rate(step)
            adamw.zero_grad()
            loss = weighted_loss(model, batch)
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
            losses.append(loss.item())
            adamw.step()
    return losses, norms, {k: p.detach().double() for k, p in model.named_parameters()}


def make_steps(out):
    folder, model = os.path.join(out, "steps"), os.path.join(out, "plain", "llama")
    os.makedirs(folder, exist_ok=True)
    batches = [make_batch(make_golden.generator("training steps", i),
                          MODELS["plain"]["vocab_size"], CONTEXT, [[CONTEXT], [CONTEXT]])
               for i in range(STEPS)]
    losses, norms, exact = train(model, torch.float64, batches)
    losses32, norms32, single = train(model, torch.float32, batches)
    save_batch(folder, {k: torch.cat([b[k] for b in batches])
                        for k in ("ids", "targets", "weights")})
    oracle.save(folder, "lr", [rate(step + 1) for step in range(STEPS)], "<f4")
    oracle.save(folder, "losses", losses, "<f4")
    oracle.save(folder, "norms", norms, "<f4")
    for name in WATCHED:
        part = "ffn_down" if "down_proj" in name else "attn_norm"
        oracle.save(folder, part, exact[name].numpy(), "<f4")
    print("steps: losses", " ".join(f"{x:.3f}" for x in losses))
    print("steps: norms", " ".join(f"{x:.3f}" for x in norms))
    print("steps: in float32 losses %.1e, norms %.1e, weights %.1e by the largest, %.1e by L2" % (
        max(abs(a - b) for a, b in zip(losses, losses32)),
        max(abs(a - b) / b for a, b in zip(norms32, norms)), *distance(single, exact)))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*CASES, 'steps'])}")
    parser.add_argument("--out", default=os.path.join(here, "golden_training"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for name in MODELS:
        make_model(args.out, name)
    for name in args.names or [*CASES, "steps"]:
        if name == "steps":
            make_steps(args.out)
        elif name in CASES:
            make_case(args.out, name)
        else:
            parser.error(f"no case {name!r}")


if __name__ == "__main__":
    main()
