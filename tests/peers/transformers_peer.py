"""Hugging Face transformers in float32 on the same GGUF file (pip install torch transformers gguf accelerate)."""

import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers:
    """One model for all measurements; the cache of a depth is filled once and cropped after each."""

    def __init__(self, model, threads, tokens):
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
        self.model.eval()
        self.vocab = self.model.config.vocab_size
        self.tokens = tokens
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
        cache = self.caches.setdefault(depth, DynamicCache())
        if cache.get_seq_length() < depth:
            self.model(self.prompt(depth), past_key_values=cache, use_cache=True, logits_to_keep=1)
        steps = self.prompt(self.tokens)
        start = time.perf_counter()
        for at in range(self.tokens):
            self.model(steps[:, at : at + 1], past_key_values=cache, use_cache=True)
        speed = self.tokens / (time.perf_counter() - start)
        cache.crop(-self.tokens)
        return speed
