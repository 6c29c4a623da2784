"""thinkey, a process a measurement: `thinkey bench`, the median of three, for the peers are warm from point to point."""

import json
import subprocess

NAME = "thinkey"


class Thinkey:
    def __init__(self, binary, model, threads, tokens, kv_type="f16", lambda_=0.5, extra=()):
        self.command = [binary, "bench", model, "--json", "--repetitions", "3", "--threads", threads]
        self.command += ["--tokens", tokens, "--kv-type", kv_type, "--lambda", lambda_, *extra]

    def run(self, *options):
        command = [str(part) for part in (*self.command, *options)]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(out.stdout)

    def prefill(self, tokens):
        return self.run("--prefill", tokens, "--no-decode")["series"][0]["prefill"][0]["speed"]["median"]

    def decode(self, depth):
        return self.run("--depth", depth, "--no-prefill")["series"][0]["decode"][0]["speed"]["median"]

    def memory(self, depth):
        """Most bytes of a process that holds `depth` tokens and decodes."""
        return self.run("--depth", depth, "--no-prefill")["process_bytes"]
