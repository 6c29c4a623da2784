"""Writes golden.bin: for every weight format 512 weights as blocks, then the values that the PyPI package `gguf`
(0.19) dequantises them to. Formats come in the order of `WeightFormat::ALL`.

    pip install gguf==0.19.0 && python golden.py
"""

import pathlib

import gguf
import numpy as np

WEIGHTS = 512
# Offsets of the f16 scales in a block; every other byte of it may be anything.
FORMATS = [("F32", None), ("F16", None), ("BF16", None), ("Q8_0", [0]), ("Q4_0", [0]), ("Q4_1", [0, 2]), ("Q5_0", [0]),
           ("Q5_1", [0, 2]), ("Q4_K", [0, 2]), ("Q5_K", [0, 2]), ("Q6_K", [208])]
# Zeros of both signs, the least and greatest subnormal, the least normal, the greatest, -1.
EXTREMES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0xBC00]

rng = np.random.default_rng(20241)
out = bytearray()
for name, scales in FORMATS:
    kind = gguf.GGMLQuantizationType[name]
    if scales is None:
        values = rng.normal(0, 0.05, WEIGHTS).astype(np.float32)
        values[:8] = [0.0, -0.0, 6e-8, -6e-5, 65504.0, -65504.0, 1.0, -1.0]
        blocks = gguf.quants.quantize(values, kind).view(np.uint8)
    else:
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (WEIGHTS // block_len, block_bytes), dtype=np.uint8)
        extreme = iter(rng.permutation(EXTREMES * 4))
        for i, block in enumerate(blocks):
            for at in scales:
                # Every second block has an ordinary scale.
                scale = np.float16(rng.normal(0, 0.01)) if i % 2 else np.uint16(next(extreme)).view(np.float16)
                block[at:at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        blocks = blocks.reshape(-1)
    values = gguf.quants.dequantize(blocks, kind).astype("<f4").reshape(-1)
    assert len(values) == WEIGHTS
    out += blocks.tobytes() + values.tobytes()
pathlib.Path(__file__).with_name("golden.bin").write_bytes(out)
