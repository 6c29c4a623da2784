#!/usr/bin/env python3
"""What a CUDA device allows, and what PyTorch, llama.cpp and thinkey make of it.

    cargo build --release --features cuda
    pip install torch
    CMAKE_ARGS=-DGGML_CUDA=on pip install llama-cpp-python
    python tests/peers/cuda.py --model MODEL.gguf [--peers torch,llama.cpp] [--depth 4096,16384,65536] [--json]

Without a model, only the device's copy bandwidth and PyTorch's decode attention are measured: D = 128, 8 KV heads of 4 query
heads, f16, with the fastest of its kernels for scaled-dot-product attention. With one, `thinkey bench --device cuda` and
llama.cpp decode it at the same depths. Everything is the median of several runs.

This has not been run where it was written: there was no device.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD_DIM, KV_HEADS, GROUP = 128, 8, 4


def numbers(text):
    return [int(number) for number in text.split(",") if number]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/thinkey")
    parser.add_argument("--model", type=Path, help="a GGUF file")
    parser.add_argument("--peers", default="torch,llama.cpp")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--depth", type=numbers, default=[4096, 16384, 65536])
    parser.add_argument("--policies", default="full;think;balanced", help="thinkey's, apart by semicolons")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def timed(torch, rounds, call):
    """Median seconds of `call` on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def torch_attention(options):
    """The copy bandwidth, and for each batch and depth the bytes of the cache and the seconds of each kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = timed(torch, options.rounds, lambda: target.copy_(source))
    bandwidth = 2 * source.numel() / seconds
    del source, target
    rows = []
    for batch in options.batch:
        for depth in options.depth:
            size = 2 * batch * depth * KV_HEADS * HEAD_DIM * 2
            if size > torch.cuda.mem_get_info()[0] // 2:
                continue
            keys, values = (
                torch.randn(batch, KV_HEADS, depth, HEAD_DIM, dtype=torch.float16, device="cuda") for _ in range(2)
            )
            queries = torch.randn(batch, KV_HEADS * GROUP, 1, HEAD_DIM, dtype=torch.float16, device="cuda")
            row = {"batch": batch, "depth": depth, "bytes": size, "seconds": {}}
            kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
            for kernel in kernels:
                def call():
                    with sdpa_kernel(kernel):
                        scaled_dot_product_attention(queries, keys, values, enable_gqa=True)

                try:
                    row["seconds"][kernel.name.lower()] = timed(torch, options.rounds, call)
                except RuntimeError as error:
                    print(f"{kernel.name} cannot do it: {str(error).splitlines()[0]}", file=sys.stderr)
            rows.append(row)
    return {"device": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth, "attention": rows}


def thinkey(options, depth):
    """Tokens a second with each policy."""
    command = [options.binary, "bench", options.model, "--device", "cuda", "--json", "--no-prefill", "--depth", depth]
    for policy in options.policies.split(";"):
        command += ["--policy", policy]
    out = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    series = json.loads(out.stdout)["series"]
    return {policy: one["decode"][0]["speed"]["median"] for policy, one in zip(options.policies.split(";"), series)}


def llama_cpp(options, depth):
    """Tokens a second with all layers on the device and flash attention."""
    from llama_cpp import Llama

    model = Llama(
        str(options.model), n_gpu_layers=-1, n_ctx=depth + 64, n_batch=512, flash_attn=True, verbose=False, logits_all=False
    )
    vocabulary = model.n_vocab()
    model.eval([1 + token * 7919 % (vocabulary - 1) for token in range(depth)])
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            model.eval([1])
        speeds.append(8 / (time.perf_counter() - start))
    return statistics.median(speeds)


def main():
    options = arguments()
    peers, report = options.peers.split(","), {}
    if "torch" in peers:
        report["torch"] = torch_attention(options)
    if options.model:
        report["decode"] = []
        for depth in options.depth:
            row = {"depth": depth, "thinkey": thinkey(options, depth)}
            if "llama.cpp" in peers:
                row["llama.cpp"] = llama_cpp(options, depth)
            report["decode"].append(row)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        return
    if "torch" in report:
        bandwidth = report["torch"]["copy_bytes_per_second"]
        print(f"{report['torch']['device']}: copies {bandwidth / 1e9:.0f} GB/s")
        for row in report["torch"]["attention"]:
            name, best = min(row["seconds"].items(), key=lambda item: item[1])
            share = row["bytes"] / best / bandwidth
            print(f"  batch {row['batch']:3} depth {row['depth']:6}: {best * 1e6:9.1f} µs ({name}), {share:.0%} of it")
    for row in report.get("decode", []):
        speeds = {**row["thinkey"], **({"llama.cpp": row["llama.cpp"]} if "llama.cpp" in row else {})}
        print(f"depth {row['depth']:6}: " + ", ".join(f"{name} {speed:.1f} tok/s" for name, speed in speeds.items()))


if __name__ == "__main__":
    main()
