#!/usr/bin/env python3
"""thinkey and Hugging Face transformers (float32) side by side: the same GGUF file, the same threads, in turns.

    pip install torch transformers gguf accelerate  # transformers 5
    cargo build --release
    python tests/peers/transformers_side_by_side.py [--threads 2] [--rounds 5] [--model FILE.gguf] [--json]

Each round measures one thing of thinkey (in a process of its own, `thinkey bench`) and then the same thing of
transformers, A B A B, so that a disturbance of the machine meets both. What is compared are medians over the rounds.
thinkey computes with the 4-bit weights and the thin cache of its defaults (λ = 0.5, f16); transformers with the same
weights dequantised to float32, its scaled-dot-product attention and its dynamic cache. Prompts are tokens of no
meaning. Stop other programs first: a load average above 0.5 is refused without --busy.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

ROOT = Path(__file__).resolve().parents[2]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/thinkey")
    parser.add_argument("--model", type=Path, help="a GGUF file [default: thinkey's default model, pulled]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded in a round")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--depth", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine all the same")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


class Ours:
    """thinkey, a process a measurement."""

    def __init__(self, args, model):
        self.command = [args.binary, "bench", model, "--json", "--repetitions", "1"]
        self.command += ["--threads", str(args.threads), "--tokens", str(args.tokens)]

    def run(self, *options):
        out = subprocess.run([*map(str, self.command), *options], check=True, capture_output=True, text=True)
        return json.loads(out.stdout)

    def prefill(self, tokens):
        return self.run("--prefill", str(tokens), "--no-decode")["prefill"][0]["speed"]["median"]

    def decode(self, depth):
        return self.run("--depth", str(depth), "--no-prefill")["decode"][0]["speed"]["median"]


class Theirs:
    """transformers, one model for all measurements; the cache of a depth is filled once and cropped after a round."""

    def __init__(self, args, model):
        torch.set_num_threads(args.threads)
        self.model = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
        self.model.eval()
        self.vocab = self.model.config.vocab_size
        self.tokens = args.tokens
        self.caches = {}

    def prompt(self, tokens):
        return torch.tensor([[(at * 7919 + 13) % self.vocab for at in range(tokens)]])

    @torch.inference_mode()
    def prefill(self, tokens):
        prompt = self.prompt(tokens)
        start = time.perf_counter()
        self.model(prompt, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        return tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    def decode(self, depth):
        if depth not in self.caches:
            cache = DynamicCache()
            self.model(self.prompt(depth), past_key_values=cache, use_cache=True, logits_to_keep=1)
            self.caches[depth] = cache
        cache = self.caches[depth]
        steps = self.prompt(self.tokens)
        start = time.perf_counter()
        for at in range(self.tokens):
            self.model(steps[:, at : at + 1], past_key_values=cache, use_cache=True)
        speed = self.tokens / (time.perf_counter() - start)
        cache.crop(-self.tokens)
        return speed


def main():
    args = arguments()
    load = os.getloadavg()[0]
    if load > 0.5 and not args.busy:
        sys.exit(f"the machine is busy (load average {load:.1f}): the numbers would mean nothing; --busy measures anyway")
    model = args.model
    if model is None:
        out = subprocess.run([args.binary, "pull"], check=True, capture_output=True, text=True)
        model = Path(out.stdout.strip())
    ours, theirs = Ours(args, model), Theirs(args, model)
    what = [("prefill", tokens) for tokens in args.prefill] + [("decode", depth) for depth in args.depth]
    speeds = {point: ([], []) for point in what}
    for kind, size in what:  # Once for nothing: files are read, memory is touched.
        getattr(theirs, kind)(size)
    for round_ in range(args.rounds):
        for point in what:
            kind, size = point
            print(f"\rround {round_ + 1} of {args.rounds}: {kind} {size}    ", end="", file=sys.stderr, flush=True)
            speeds[point][0].append(getattr(ours, kind)(size))
            speeds[point][1].append(getattr(theirs, kind)(size))
    print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    rows = []
    for (kind, size), (a, b) in speeds.items():
        rows.append(
            {
                "what": kind,
                "tokens": size,
                "thinkey": statistics.median(a),
                "transformers": statistics.median(b),
                "ratio": statistics.median(a) / statistics.median(b),
                "ratios": [x / y for x, y in zip(a, b)],
            }
        )
    if args.json:
        json.dump({"processor": processor(), "threads": args.threads, "rows": rows}, sys.stdout, indent=2)
        print()
        return
    print(f"{processor()}, {args.threads} threads, medians of {args.rounds} rounds, tokens a second\n")
    print("| | thinkey | transformers f32 | ratio (least to most) |\n|---|---|---|---|")
    for row in rows:
        name = f"prefill of {row['tokens']}" if row["what"] == "prefill" else f"decode at depth {row['tokens']}"
        spread = f"{min(row['ratios']):.1f} to {max(row['ratios']):.1f}"
        print(f"| {name} | {row['thinkey']:.0f} | {row['transformers']:.1f} | **{row['ratio']:.1f}** ({spread}) |")


if __name__ == "__main__":
    main()
