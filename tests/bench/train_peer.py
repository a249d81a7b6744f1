#!/usr/bin/env python3
"""Training steps in PyTorch, to measure `lvm train` beside:

    python train_peer.py [--context 1024 4096] [--setting NAME...] [--threads 2] [--steps 5]
    python train_peer.py --turns --context 1024 --setting lean

Needs torch, and transformers for the setting of that name; a C++ compiler for those that compile.
The model is a transformer of 25.0 million numbers (8194 ids, 7 layers of width 448, 7 heads,
feed-forward 1280), in float32; a step is 4096 tokens: forward, cross-entropy over all of them,
backward, clipping at norm 1, AdamW. Printed are the seconds of the median step after three to warm
up, tokens a second and model FLOPs a second (6 a matrix's number and token, 6 L D T a token for
causal attention, embedding's rows for free; nothing is counted twice where it is computed again).

With --turns one setting answers every line of standard input by the median seconds of --steps,
so that another program can be measured in turn with it.

    transformers           LlamaForCausalLM with scaled_dot_product_attention
    lean                   the same model in a page: fused QKV and gate-up products, F.rms_norm
    ... compiled           by torch.compile; the optimiser too
"""
import argparse
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F

VOCAB, WIDTH, LAYERS, HEADS, FFN, BATCH = 8194, 448, 7, 7, 1280, 4096
HEAD = WIDTH // HEADS
WARM_UP = 3


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_norm = torch.nn.Parameter(torch.ones(WIDTH))
        self.ffn_norm = torch.nn.Parameter(torch.ones(WIDTH))
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.o = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = torch.nn.Linear(WIDTH, 2 * FFN, bias=False)
        self.down = torch.nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        rows, context, _ = x.shape
        h = F.rms_norm(x, (WIDTH,), self.attn_norm, 1e-6)
        qkv = self.qkv(h).view(rows, context, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        low, high = qkv[:2].chunk(2, -1)
        q, k = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        o = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        x = x + self.o(o.transpose(1, 2).reshape(rows, context, WIDTH))
        gate, up = self.gate_up(F.rms_norm(x, (WIDTH,), self.ffn_norm, 1e-6)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Lean(torch.nn.Module):
    def __init__(self, context):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = torch.nn.Parameter(torch.ones(WIDTH))
        self.output = torch.nn.Linear(WIDTH, VOCAB, bias=False)
        angles = torch.outer(torch.arange(context).float(),
                             10000 ** (-torch.arange(0, HEAD, 2).float() / HEAD))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.output(F.rms_norm(x, (WIDTH,), self.norm, 1e-6))


def published(context):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=HEADS,
                         intermediate_size=FFN, max_position_embeddings=context,
                         tie_word_embeddings=False, use_cache=False)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    return model, lambda ids: model(input_ids=ids).logits


def lean(context):
    model = Lean(context)
    return model, model


SETTINGS = {"transformers": (published, False), "lean": (lean, False),
            "transformers compiled": (published, True), "lean compiled": (lean, True)}


def flops_of(model, context):
    """Model FLOPs of a step."""
    numbers = sum(p.numel() for p in model.parameters() if p.dim() == 2) - VOCAB * WIDTH
    return BATCH * (6 * numbers + 6 * LAYERS * WIDTH * context)


class Training:
    """A setting ready to be measured."""

    def __init__(self, setting, context, optimiser):
        make, self.compiled = SETTINGS[setting]
        torch.manual_seed(1)
        self.model, forward = make(context)
        for p in self.model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
        self.flops = flops_of(self.model, context)
        self.numbers = sum(p.numel() for p in self.model.parameters())
        self.ids = torch.randint(0, VOCAB, (BATCH // context, context + 1))
        self.adamw = torch.optim.AdamW(
            [dict(params=[p for p in self.model.parameters() if p.dim() == 2], weight_decay=0.1),
             dict(params=[p for p in self.model.parameters() if p.dim() == 1], weight_decay=0)],
            lr=3e-4, betas=(0.9, 0.95), eps=1e-8, **{optimiser: True})

        def loss(ids):
            return F.cross_entropy(forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.loss = torch.compile(loss) if self.compiled else loss
        for _ in range(WARM_UP):
            first = self.step()
        if not math.isfinite(first):
            sys.exit(f"{setting}: the loss is {first}")

    def step(self):
        loss = self.loss(self.ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.item()

    def seconds(self, steps):
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--optimiser", nargs="+", choices=("fused", "foreach"), default=["fused"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.turns:
        training = Training(args.setting[0], args.context[0], args.optimiser[0])
        for _ in sys.stdin:
            print(f"{training.seconds(args.steps):.3f}", flush=True)
        return
    print(f"PyTorch {torch.__version__}, {args.threads} threads, median of {args.steps} steps")
    for context in args.context:
        for setting in args.setting:
            for optimiser in args.optimiser:
                training = Training(setting, context, optimiser)
                seconds = training.seconds(args.steps)
                print(f"{setting:22} {optimiser:8} context {context}: {seconds:.2f} s a step, "
                      f"{BATCH / seconds:.0f} tok/s, {training.flops / seconds / 1e9:.0f} GFLOP/s, "
                      f"{training.numbers / 1e6:.1f} M numbers", flush=True)


if __name__ == "__main__":
    main()
