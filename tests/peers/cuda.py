#!/usr/bin/env python3
"""What a CUDA device allows, and what PyTorch, llama.cpp and thinkey make of it.

    export CUDARC_CUDA_VERSION=12060       # the toolkit's version, where nvcc is not on the path
    cargo build --release --features cuda
    pip install torch                      # 2.5 or newer; on a Jetson the build for its JetPack
    CMAKE_ARGS=-DGGML_CUDA=on pip install llama-cpp-python
    python tests/peers/cuda.py [--model MODEL.gguf] [--peers torch,llama.cpp] [--depth 4096,16384,65536] [--json]

Without a model, only decode attention is measured, beside the device's copy bandwidth: D = 128, 8 KV heads of 4 query heads,
in PyTorch in f16 with the fastest of its kernels for scaled-dot-product attention, in thinkey by `cargo bench --bench device`
with half of the channels. With a model, `thinkey bench --device cuda` and llama.cpp decode it at those of the depths that its
context holds. PyTorch's and llama.cpp's numbers are medians of several runs, and thinkey's tokens a second too.

This is ready to run and has not run on a GPU: there was none where it was written.
"""

import argparse
import json
import re
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
    parser.add_argument("--kernels", type=Path, help="the benchmark `device`, built elsewhere, for a board without cargo")
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
    torch.cuda.empty_cache()
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
            # Query heads of a KV head as so many queries of it: the same numbers, and keys and values are read once.
            grouped = queries.view(batch, KV_HEADS, GROUP, HEAD_DIM)
            row = {"batch": batch, "depth": depth, "bytes": size, "seconds": {}}
            kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
            for kernel in kernels:
                for way, query, gqa in (("", queries, {"enable_gqa": True}), (", grouped", grouped, {})):
                    name = kernel.name.lower() + way

                    def call():
                        with sdpa_kernel(kernel):
                            scaled_dot_product_attention(query, keys, values, **gqa)

                    try:
                        row["seconds"][name] = timed(torch, options.rounds, call)
                    except RuntimeError as error:
                        print(f"{name} cannot do it: {str(error).splitlines()[0]}", file=sys.stderr)
            if row["seconds"]:
                rows.append(row)
            # What PyTorch keeps for itself the others would lack.
            del keys, values, queries, grouped
            torch.cuda.empty_cache()
    return {"device": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth, "attention": rows}


def run(command):
    """What a command prints; what it complains of goes where this program's complaints go."""
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def thinkey_attention(options):
    """What thinkey's kernels take: for each storage, batch and depth the seconds, the bytes and the share of the bandwidth."""
    line = re.compile(r"(\w+) +batch +(\d+) tokens +(\d+): +([\d.]+) µs, +([\d.]+) MB, +(\d+)%")
    cargo = ["cargo", "bench", "--quiet", "-p", "thinkey-kernels", "--features", "cuda", "--bench", "device"]
    text = run([options.kernels.resolve()] if options.kernels else cargo)
    rows = [
        {
            "storage": storage, "batch": int(batch), "depth": int(depth), "seconds": float(us) / 1e6,
            "bytes": float(megabytes) * 1e6, "share": int(share) / 100,
        }
        for storage, batch, depth, us, megabytes, share in line.findall(text)
    ]
    if not rows:
        sys.exit(f"thinkey's kernels were not measured: {text.strip()}")
    return {"attention": rows, "text": text}


def thinkey(options, depth):
    """Tokens a second with each policy."""
    command = [options.binary.resolve(), "bench", options.model.resolve(), "--device", "cuda", "--json", "--no-prefill"]
    command += ["--depth", depth]
    for policy in options.policies.split(";"):
        command += ["--policy", policy]
    series = json.loads(run(command))["series"]
    return {policy: one["decode"][0]["speed"]["median"] for policy, one in zip(options.policies.split(";"), series)}


def context(options):
    """The most tokens that the model takes."""
    return json.loads(run([options.binary.resolve(), "inspect", options.model.resolve(), "--json"]))["context"]


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
    report["thinkey"] = thinkey_attention(options)
    if options.model:
        report["decode"] = []
        # 5 times 16 tokens are decoded.
        most = context(options) - 80
        for depth in options.depth:
            if depth > most:
                print(f"depth {depth} is left out: the model takes {most + 80} tokens", file=sys.stderr)
                continue
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
            for ours in report["thinkey"]["attention"]:
                if (ours["batch"], ours["depth"]) == (row["batch"], row["depth"]):
                    print(
                        f"    thinkey {ours['storage']:5} {ours['seconds'] * 1e6:9.1f} µs: {best / ours['seconds']:.2f} times as fast, "
                        f"for {row['bytes'] / ours['bytes']:.2f} times fewer bytes"
                    )
    print(report["thinkey"]["text"], end="")
    for row in report.get("decode", []):
        speeds = {**row["thinkey"], **({"llama.cpp": row["llama.cpp"]} if "llama.cpp" in row else {})}
        print(f"depth {row['depth']:6}: " + ", ".join(f"{name} {speed:.1f} tok/s" for name, speed in speeds.items()))


if __name__ == "__main__":
    main()
