"""A LoRA adapter and what PEFT computes with it: tests/golden_lora/.

    python make_lora_golden.py [--out DIR]

Needs torch, transformers, peft and numpy. The adapter is of rank 4 on all seven matrices of
tests/golden/llama_bias, with an alpha that is no multiple of it and B not zero; saved by PEFT
itself. ids (n,): a sequence; logits (n, V): after each of them, in float32 on one CPU thread, by the
model with the adapter beside it, not merged."""
import argparse
import os

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

TESTS = os.path.dirname(os.path.abspath(__file__))
BASE = os.path.join(TESTS, "golden", "llama_bias")
N = 40


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=os.path.join(TESTS, "golden_lora"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(19)
    base = LlamaForCausalLM.from_pretrained(os.path.join(BASE, "llama"), torch_dtype=torch.float32,
                                            attn_implementation="eager").eval()
    model = get_peft_model(base, LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                        "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
        ids = torch.from_numpy(np.load(os.path.join(BASE, "ids.npy"))[:N].astype(np.int64))[None]
        plain, logits = base_logits(model, ids), model(ids).logits[0]
    print("largest logit %.2f, largest change by the adapter %.2f"
          % (logits.abs().max(), (logits - plain).abs().max()))
    model.peft_config["default"].base_model_name_or_path = "llama_bias"
    model.save_pretrained(out)
    os.chmod(os.path.join(out, "adapter_model.safetensors"), 0o644)
    os.remove(os.path.join(out, "README.md"))
    np.save(os.path.join(out, "ids.npy"), ids[0].numpy().astype(np.int32))
    np.save(os.path.join(out, "logits.npy"), logits.numpy().astype(np.float32))


def base_logits(model, ids):
    with model.disable_adapter():
        return model(ids).logits[0]


if __name__ == "__main__":
    main()
