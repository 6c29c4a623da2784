#!/usr/bin/env python3
"""thinkey, llama.cpp and Hugging Face transformers side by side: the same GGUF file, the same threads, in turns.

    pip install llama-cpp-python                        # builds llama.cpp for this machine
    pip install torch transformers gguf accelerate      # transformers 5; or --peers llama.cpp
    cargo build --release
    python tests/peers/side_by_side.py [--rounds 5] [--threads 2] [--peers llama.cpp,transformers] [--json]

Each round measures one point of thinkey (in a process of its own, `thinkey bench`) and then the same point of each peer,
A B A B, so that a disturbance of the machine meets all. Ratios are of medians over the rounds. llama.cpp runs with f16,
q8_0 and q4_0 caches, f16 with and without flash attention (quantised values need it): at each point the fastest of its
settings is what counts (the two that were fastest in a first round are measured in all the others). transformers computes in float32 with its scaled-dot-product attention and its dynamic cache.
Prompts are tokens of no meaning. A measurement during which another program took over a twentieth of a processor is thrown
away and made again; a machine that never gets idle is refused without --busy. Stopped early (Ctrl-C, SIGTERM), it shows what
it has by then.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import machine
from thinkey import Thinkey

ROOT = Path(__file__).resolve().parents[2]


def numbers(text):
    return [int(number) for number in text.split(",") if number]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/thinkey")
    parser.add_argument("--model", type=Path, help="a GGUF file [default: thinkey's default model, pulled]")
    parser.add_argument("--peers", default="llama.cpp,transformers", help="which of llama.cpp, transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded in a measurement")
    parser.add_argument("--prefill", type=numbers, default=[512, 2048])
    parser.add_argument("--depth", type=numbers, default=[0, 512, 4096, 8000])
    parser.add_argument("--kinds", default="f16,int8", help="thinkey's caches; the first is the one of prefill")
    parser.add_argument("--weights", default="", help="Q4_0,Q8_0: more kinds of weights, requantised by llama.cpp; depth 0 and prefill")
    parser.add_argument("--caches", default="f16,q8_0,q4_0", help="llama.cpp's caches; filling deep quantised ones takes it minutes")
    parser.add_argument("--lambda", dest="lambda_", default="0.5")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory at the greatest depth out")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine all the same")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class Measurer:
    """Takes measurements, and takes them again where the machine was disturbed."""

    def __init__(self, busy):
        self.busy, self.disturbed, self.stopped = busy, 0, None

    def __call__(self, what, measure):
        print(f"\r{what:70.70}", end="", file=sys.stderr, flush=True)
        for _ in range(4):
            with machine.Watch() as watch:
                value = measure()
            if self.busy or watch.foreign < 0.05:
                return value
            self.disturbed += 1
            if not machine.wait_until_idle():
                break
        sys.exit("\nthe machine is busy: the numbers would mean nothing; --busy measures all the same")


def contenders(args, model, weights):
    """What runs at each point: (label, settings by name), each with prefill(tokens) and decode(depth)."""
    ours = {
        kind: Thinkey(args.binary, model, args.threads, args.tokens, kind, args.lambda_) for kind in args.kinds.split(",")
    }
    peers = {}
    for peer in args.peers.split(","):
        if peer == "llama.cpp":
            from llama_cpp_peer import SETTINGS, LlamaCpp, Model

            loaded = Model(model)
            peers[peer] = {
                f"{kind}{', flash' if flash else ''}": LlamaCpp(loaded, args.threads, args.tokens, kind, flash)
                for kind, flash in SETTINGS
                if kind in args.caches.split(",")
            }
        elif peer == "transformers" and not weights:
            from transformers_peer import Transformers

            peers[peer] = {"f32": Transformers(model, args.threads, args.tokens)}
        elif peer != "transformers":
            sys.exit(f"there is no peer {peer!r}; choose llama.cpp or transformers")
    return ours, peers


def measure(args, model, weights, take):
    ours, peers = contenders(args, model, weights)
    points = [("prefill", size) for size in args.prefill]
    points += [("decode", depth) for depth in args.depth if not weights or depth == 0]
    speeds, scouted = {}, {}

    def point(round_, kind, size):
        for name, settings in [("thinkey", ours), *peers.items()]:
            if name == "thinkey":
                if round_ < 0:
                    continue  # Its processes warm up by themselves.
                # The kind of cache hardly matters to prefill and at depth 0: one is enough there.
                candidates = list(settings)[: 1 if kind == "prefill" or size == 0 else None]
            else:
                # Once with every setting for nothing: files are read, memory is touched, caches are filled. The two that
                # were fastest then go on.
                scout = scouted.setdefault((kind, size, name), {})
                candidates = sorted(settings, key=lambda setting: -scout.get(setting, 0))[: 2 if round_ >= 0 else None]
            for setting in candidates:
                what = f"round {round_ + 1} of {args.rounds}: {kind} {size}, {name} {setting} {weights}"
                speed = take(what, lambda: getattr(settings[setting], kind)(size))
                if round_ < 0:
                    scout[setting] = speed
                else:
                    speeds.setdefault((kind, size), {}).setdefault(name, {}).setdefault(setting, []).append(speed)

    try:
        for round_ in range(-1, args.rounds):
            for kind, size in points:
                point(round_, kind, size)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Hours of rounds are not lost with the last one.
        take.stopped = str(stop) or "stopped"
    rows = []
    for (kind, size), by_name in speeds.items():
        if any(peer not in by_name for peer in peers):
            continue
        for setting, values in by_name["thinkey"].items():
            row = {"weights": weights or "as given", "what": kind, "tokens": size, "cache": setting}
            row["thinkey"] = statistics.median(values)
            for peer in peers:
                best, theirs = max(by_name[peer].items(), key=lambda item: statistics.median(item[1]))
                row[peer] = {
                    "speed": statistics.median(theirs),
                    "setting": best,
                    "ratio": row["thinkey"] / statistics.median(theirs),
                    "ratios": sorted(a / b for a, b in zip(values, theirs)),
                    "all": {name: statistics.median(value) for name, value in by_name[peer].items()},
                }
            rows.append(row)
    return rows


def show(args, rows, memory):
    peers = [peer for peer in args.peers.split(",") if any(peer in row for row in rows)]
    print(f"{machine.processor()}, {args.threads} threads, medians of {args.rounds} rounds, tokens a second\n")
    header = ["", "thinkey"]
    for peer in peers:
        header += [f"{peer}", "ratio (least to most)"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        what = f"prefill of {row['tokens']}" if row["what"] == "prefill" else f"decode at depth {row['tokens']}"
        if row["weights"] != "as given":
            what += f", {row['weights']} weights"
        elif row["what"] == "decode" and row["tokens"] > 0:
            what += f", {row['cache']}"
        cells = [what, f"{row['thinkey']:.0f}"]
        for peer in peers:
            if peer not in row:
                cells += ["", ""]
                continue
            other = row[peer]
            setting = f" ({other['setting']})" if peer == "llama.cpp" else ""
            cells.append(f"{other['speed']:.1f}{setting}")
            cells.append(f"**{other['ratio']:.2f}** ({other['ratios'][0]:.2f} to {other['ratios'][-1]:.2f})")
        print("| " + " | ".join(cells) + " |")
    for row in memory:
        print(
            f"\nPeak memory at {row['depth']} tokens, f16 cache: thinkey {row['thinkey'] / 2**20:.0f} MiB, llama.cpp "
            f"{row['llama.cpp'] / 2**20:.0f} MiB (without Python), ratio **{row['thinkey'] / row['llama.cpp']:.2f}**"
        )


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not args.busy and not machine.wait_until_idle(30):
        sys.exit("the machine is busy: the numbers would mean nothing; --busy measures all the same")
    model = args.model
    if model is None:
        out = subprocess.run([args.binary, "pull"], check=True, capture_output=True, text=True)
        model = Path(out.stdout.strip())
    take = Measurer(args.busy)
    rows = measure(args, model, "", take)
    memory = []
    if "llama.cpp" in args.peers:
        import llama_cpp_peer

        with tempfile.TemporaryDirectory() as folder:
            for kind in filter(None, args.weights.split(",")):
                if take.stopped:
                    break
                target = Path(folder) / f"{model.stem}.{kind}.gguf"
                llama_cpp_peer.requantise(model, target, kind)
                rows += measure(args, target, kind, take)
        if not args.no_memory and not take.stopped:
            depth = max(args.depth)
            ours = Thinkey(args.binary, model, args.threads, args.tokens, "f16", args.lambda_).memory(depth)
            theirs = min(llama_cpp_peer.memory(model, args.threads, "f16", flash, depth) for flash in (False, True))
            memory.append({"depth": depth, "thinkey": ours, "llama.cpp": theirs})
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
    if args.json:
        report = {"processor": machine.processor(), "threads": args.threads, "disturbed": take.disturbed, "stopped": take.stopped}
        json.dump({**report, "rows": rows, "memory": memory}, sys.stdout, indent=2)
        print()
    else:
        show(args, rows, memory)
        if take.disturbed:
            print(f"\n{take.disturbed} disturbed measurements were made again.")
    if take.stopped:
        sys.exit(f"not all was measured: {take.stopped.strip()}")


if __name__ == "__main__":
    main()
