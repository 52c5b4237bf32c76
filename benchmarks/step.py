"""What a decoded token's time is made of: its matrices alone, and the whole model, in each format.

``python benchmarks/step.py``. GPT-2 124M with random weights, one token behind 100 others; medians
of 30, and the bytes of the weights over the matrices' time beside what this machine streams.
"""

import torch
from machine import bandwidth, describe, medians
from rich.console import Console
from rich.table import Table

from gpt import GPT, ModelConfig, prepare_for_inference
from gpt.device import keep_freed_memory


@torch.inference_mode()
def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    plain = GPT(ModelConfig()).eval()
    speed = bandwidth()
    title = f"milliseconds a token; this machine streams {speed / 1e9:.0f} GB/s"
    table = Table("weights", "matrices", "the whole model", "GB/s", "of the stream", title=title)
    x, hidden, token = torch.randn(1, 1, 768), torch.randn(1, 1, 3072), torch.tensor([[3]])
    for kind in ("float32", "bfloat16", "int8", "int4"):
        model = prepare_for_inference(plain, kind)
        cache = model.new_cache()
        cache.lengths = [100]

        def matrices(model=model) -> None:
            for block in model.blocks:
                block.attn.qkv(x), block.attn.out(x), block.mlp.up(x), block.mlp.down(hidden)
            model.head(x)

        def step(model=model, cache=cache) -> None:
            model(token, cache=cache)
            cache.truncate(100)

        time = medians({"matrices": matrices, "step": step}, runs=30)
        layers = [module for module in model.modules() if hasattr(module, "matrix")]
        tensors = {id(b): b for layer in layers for b in layer.matrix.buffers()}
        rate = sum(tensor.nbytes for tensor in tensors.values()) / time["matrices"]
        figures = (f"{1000 * time[name]:.2f}" for name in ("matrices", "step"))
        table.add_row(kind, *figures, f"{rate / 1e9:.0f}", f"{rate / speed:.0%}")
    console = Console()
    console.print(describe(), highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
