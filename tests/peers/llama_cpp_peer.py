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


class Context:
    """A sequence of `tokens` tokens at most."""

    def __init__(self, model, threads, tokens, kind, flash):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = tokens, 2048, 512, 1
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KINDS[kind]
        params.flash_attn_type = FLASH[flash]
        self.model, self.held = model, 0
        self.handle = llama_cpp.llama_init_from_model(model.model, params)
        if not self.handle:
            raise RuntimeError(f"llama.cpp cannot make a context of {tokens} tokens with a {kind} cache")
        self.memory = llama_cpp.llama_get_memory(self.handle)

    def feed(self, count):
        at = range(self.held, self.held + count)
        tokens = (llama_cpp.llama_token * count)(*((i * 7919 + 13) % self.model.vocab for i in at))
        if llama_cpp.llama_decode(self.handle, llama_cpp.llama_batch_get_one(tokens, count)) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.handle)
        self.held += count

    def fill(self, tokens):
        while self.held < tokens:
            self.feed(min(2048, tokens - self.held))

    def cut(self, tokens):
        llama_cpp.llama_memory_seq_rm(self.memory, 0, tokens, -1)
        self.held = tokens


class LlamaCpp:
    """One kind of cache; a context for each point, filled once and cut back after each measurement."""

    def __init__(self, model, threads, tokens, kind, flash):
        self.make = lambda size: Context(model, threads, size, kind, flash)
        self.tokens, self.contexts = tokens, {}

    def context(self, point, size):
        if point not in self.contexts:
            self.contexts[point] = self.make(size)
        return self.contexts[point]

    def prefill(self, tokens):
        context = self.context(("prefill", tokens), tokens)
        context.cut(0)
        start = time.perf_counter()
        context.fill(tokens)
        return tokens / (time.perf_counter() - start)

    def decode(self, depth):
        context = self.context(("decode", depth), depth + self.tokens + 1)
        context.fill(depth)
        # One token for nothing: the first after a fill builds the graph of a single token.
        context.feed(1)
        context.cut(depth)
        start = time.perf_counter()
        for _ in range(self.tokens):
            context.feed(1)
        speed = self.tokens / (time.perf_counter() - start)
        context.cut(depth)
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
    LlamaCpp(Model(path), int(threads), 16, kind, flash == "1").decode(int(depth))
    print(_peak() - before)
