"""llama.cpp through the PyPI package llama-cpp-python, on the same GGUF file.

Speeds are those of `llama_decode` alone: no sampling, no copy of logits, nothing of Python in a token but the call.
"""

import ctypes
import subprocess
import sys
import time

# OMP_WAIT_POLICY stays as it is: "active" would let llama.cpp's threads spin on while the others are measured.
import llama_cpp

KINDS = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
FLASH = {False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED}

# Values can be quantised under flash attention only.
SETTINGS = [("f16", False), ("f16", True), ("q8_0", True), ("q4_0", True)]


@llama_cpp.llama_log_callback
def _silence(_level, _text, _data):
    pass


llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))


class Model:
    def __init__(self, path):
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))


class LlamaCpp:
    """A context of one cache kind; the cache of a depth is filled once and cut back after each measurement."""

    def __init__(self, model, threads, tokens, kind, flash, context):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, 2048, 512, 1
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KINDS[kind]
        params.flash_attn_type = FLASH[flash]
        self.model, self.tokens, self.context = model, tokens, context
        self.handle = llama_cpp.llama_init_from_model(model.model, params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens with a {kind} cache")
        self.memory = llama_cpp.llama_get_memory(self.handle)
        self.held = 0

    def feed(self, first, count):
        tokens = (llama_cpp.llama_token * count)(*((at * 7919 + 13) % self.model.vocab for at in range(first, first + count)))
        if llama_cpp.llama_decode(self.handle, llama_cpp.llama_batch_get_one(tokens, count)) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.handle)

    def cut(self, depth):
        llama_cpp.llama_memory_seq_rm(self.memory, 0, depth, -1)
        self.held = min(self.held, depth)

    def fill(self, depth):
        self.cut(depth)
        while self.held < depth:
            count = min(2048, depth - self.held)
            self.feed(self.held, count)
            self.held += count

    def prefill(self, tokens):
        self.cut(0)
        start = time.perf_counter()
        self.fill(tokens)
        return tokens / (time.perf_counter() - start)

    def decode(self, depth):
        self.fill(depth)
        # One token for nothing: the first after a fill builds the graph of a single token.
        self.feed(depth, 1)
        self.cut(depth)
        start = time.perf_counter()
        for at in range(self.tokens):
            self.feed(depth + at, 1)
        speed = self.tokens / (time.perf_counter() - start)
        self.held = depth + self.tokens
        self.cut(depth)
        return speed


def requantise(source, target, kind):
    """Writes the model of `source` with weights of another kind, as llama.cpp's own tool does."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[kind]
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp cannot requantise {source} to {kind}")


def memory(model, threads, kind, flash, depth):
    """Most bytes of a process that holds `depth` tokens and decodes, less what Python took before the model was loaded."""
    command = [sys.executable, __file__, str(model), str(threads), kind, str(int(flash)), str(depth)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


if __name__ == "__main__":
    path, threads, kind, flash, depth = sys.argv[1:]
    before = _peak()
    peer = LlamaCpp(Model(path), int(threads), 16, kind, flash == "1", int(depth) + 16)
    peer.decode(int(depth))
    print(_peak() - before)
