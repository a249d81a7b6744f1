#!/usr/bin/env python3
"""The tokenizer under other programs, one image at a time, for compare.py:

    echo encode decode | python vqgan_torch.py --open-muse DIR --setting "PyTorch f32"

Runs in a Python that has torch, and what tests/oracle.py and open-muse ask for: transformers,
safetensors, numpy and requests; onnx, onnxscript and onnxruntime, or openvino, for the settings of
these names. The model is open-muse's VQGANModel with random weights. The first line printed tells
the program's version and how many of 256 codes the setting shares with PyTorch's float32; then
every word of standard input, encode or decode, is answered by one line with the seconds of the
fastest of three runs, or of two that take longer than two seconds, as `lvm bench` counts.

Encoding goes from pixels to codes, decoding from codes to pixels. A setting whose float32 pixels
differ from PyTorch's own by more than one in ten thousand of their range is an error.
"""
import argparse
import json
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
sys.dont_write_bytecode = True
import oracle  # noqa: E402
import torch  # noqa: E402

SHAPES = {
    "published": dict(hidden_channels=128, channel_mult=(1, 2, 2, 4, 6), attn_resolutions=(),
                      no_attn_mid_block=True),
    "shipped": dict(hidden_channels=64, channel_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,),
                    no_attn_mid_block=False)}
SIDE, TOKENS, CODES, WIDTH = 256, 256, 8192, 64


class Encode(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model.get_code(pixels)


class Decode(Encode):
    def forward(self, codes):
        return self.model.decode_code(codes)


def in_torch(dtype, layout, compiled):
    """PyTorch itself. What is compiled has its weights frozen, so that they are packed once."""
    def prepare(module, example, threads, folder):
        module = module.to(dtype=dtype, memory_format=layout)
        if compiled:
            import torch._inductor.config
            torch._inductor.config.freezing = True
            module = torch.compile(module)

        def run(x):
            if x.is_floating_point():
                x = x.to(dtype=dtype, memory_format=layout)
            return module(x)
        return run
    return prepare


def in_onnxruntime(module, example, threads, folder):
    import onnxruntime
    path = os.path.join(folder, type(module).__name__ + ".onnx")
    torch.onnx.export(module, (example,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def in_openvino(precision):
    def prepare(module, example, threads, folder):
        import openvino
        model = openvino.convert_model(module, example_input=example)
        compiled = openvino.compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY"})
        return lambda x: torch.from_numpy(compiled([x.numpy()])[0])
    return prepare


ROWS, TILES = torch.contiguous_format, torch.channels_last
SETTINGS = {
    "PyTorch f32": in_torch(torch.float32, ROWS, False),
    "PyTorch f32 channels_last": in_torch(torch.float32, TILES, False),
    "PyTorch f32 compiled": in_torch(torch.float32, ROWS, True),
    "PyTorch f32 compiled channels_last": in_torch(torch.float32, TILES, True),
    "PyTorch bf16": in_torch(torch.bfloat16, ROWS, False),
    "PyTorch bf16 channels_last": in_torch(torch.bfloat16, TILES, False),
    "PyTorch bf16 compiled channels_last": in_torch(torch.bfloat16, TILES, True),
    "onnxruntime f32": in_onnxruntime,
    "openvino f32": in_openvino("f32"),
    "openvino bf16": in_openvino("bf16")}


def version(setting):
    program = setting.split()[0].replace("PyTorch", "torch")
    return __import__(program).__version__


def make_model(open_muse, shape):
    """Random weights; the codes are spread as far as what is looked up among them, so that the
    nearest one seldom is a tie."""
    torch.manual_seed(1)
    model = oracle.published_vqgan(open_muse)(
        resolution=SIDE, num_res_blocks=2, z_channels=WIDTH, num_embeddings=CODES,
        quantized_embed_dim=WIDTH, **SHAPES[shape]).eval()
    pixels = torch.rand(1, 3, SIDE, SIDE)
    latents = model.quant_conv(model.encoder(pixels))
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    model.quantize.embedding.weight.copy_(mean + std * torch.randn(CODES, WIDTH))
    return model, pixels, torch.randint(CODES, (1, TOKENS))


def same_codes(setting, runs, wanted, pixels, codes):
    """How many codes come out as PyTorch's; for float32 nearly all must, and the pixels."""
    same = int((runs["encode"](pixels).reshape(-1) == wanted["encode"].reshape(-1)).sum())
    decoded, true = runs["decode"](codes).float(), wanted["decode"]
    off = float((decoded - true).abs().max() / (true.max() - true.min()))
    if " f32" in setting and (off > 1e-4 or same < TOKENS - 4):
        sys.exit("%s: pixels differ by %.2g of their range, %d of %d codes are the same"
                 % (setting, off, same, TOKENS))
    return same


def fastest(run, x):
    took = []
    while len(took) < 3 and not (len(took) > 1 and took[-1] > 2):
        start = time.perf_counter()
        run(x)
        took.append(time.perf_counter() - start)
    return min(took)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-muse", required=True, metavar="DIR", help="holds muse/")
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="published")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, pixels, codes = make_model(args.open_muse, args.shape)
    modules = {"encode": Encode(model), "decode": Decode(model)}
    inputs = {"encode": pixels, "decode": codes}
    wanted = {stage: module(inputs[stage]) for stage, module in modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        runs = {stage: SETTINGS[args.setting](module, inputs[stage], args.threads, folder)
                for stage, module in modules.items()}
        print(json.dumps({"version": version(args.setting),
                          "same_codes": same_codes(args.setting, runs, wanted, pixels, codes)}),
              flush=True)
        for line in sys.stdin:
            for stage in line.split():
                print(json.dumps({"seconds": fastest(runs[stage], inputs[stage])}), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
