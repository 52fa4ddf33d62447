"""`make bench-gpu`: the paper's shapes on a CUDA device, by the project's reference path: needs torch, transformers and numpy, not vLLM.

Random weights in bfloat16: Qwen2.5 1.5 B and 7 B as bases, 0.5 B as the memory decoder. Per decoding step: the base alone; base and memory
in turn; and the memory on a stream of its own beside the base. Each way is one CUDA graph, so that what is timed is the device's work.
The floor is the bytes of all weights over the base's, and the table also has what the device's own copy of so many bytes would take.
Prints a table and one JSON line last. Without a CUDA device, `--device cpu --tiny` shows that the script runs; its figures mean nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

from memdec.server.model.mixing import mix

QWEN = {  # Qwen2.5's published shapes
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944},
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
VOCABULARY = {"0.5B": 151_936, "1.5B": 151_936, "7B": 152_064}
PAIRS = (("1.5B", "0.5B"), ("7B", "0.5B"))
CONTEXT, LAMBDA, WARM = 512, 0.6, 3
Step = Callable[[], torch.Tensor]


class Decoder:
    """One model with a static cache, decoding one token of each row at a fixed position."""

    def __init__(self, name: str, batch: int, device: torch.device, tiny: bool) -> None:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=1000 if tiny else VOCABULARY[name], tie_word_embeddings=name != "7B", max_position_embeddings=2 * CONTEXT,
            **(TINY if tiny else QWEN[name]),
        )  # fmt: skip
        with device:
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            self.model = Qwen2ForCausalLM(config).eval()
            torch.set_default_dtype(default)
        self.cache = StaticCache(config=config, max_cache_len=CONTEXT)
        self.position = torch.full((1,), CONTEXT // 2, device=device)
        self.batch = batch
        read = sum(p.nbytes for p in self.model.parameters())
        # A step gathers a few rows of the embeddings; tied ones are read whole, as the output layer.
        self.bytes = read if config.tie_word_embeddings else read - self.model.get_input_embeddings().weight.nbytes

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, V] for ids [batch, 1]."""
        places = self.position.expand(self.batch, 1)
        output: Any = self.model(ids, past_key_values=self.cache, position_ids=places, cache_position=self.position, use_cache=True)
        logits: torch.Tensor = output.logits[:, -1]
        return logits


@torch.inference_mode()
def measure(base_name: str, memory_name: str, batch: int, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of each way, and the floor."""
    base, memory = (Decoder(name, batch, device, args.tiny) for name in (base_name, memory_name))
    ids = torch.randint(1, 999, (batch, 1), device=device)
    lam = torch.full((batch,), LAMBDA, device=device)
    beside = torch.cuda.Stream() if device.type == "cuda" else None

    def alone() -> torch.Tensor:
        return base(ids).argmax(-1)

    def in_turn() -> torch.Tensor:
        return mix(base(ids), memory(ids), lam).argmax(-1)

    def side_by_side() -> torch.Tensor:
        assert beside is not None
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            own = memory(ids)
        logits = base(ids)
        torch.cuda.current_stream().wait_stream(beside)
        return mix(logits, own, lam).argmax(-1)

    ways: dict[str, Step] = {"base": alone, "in turn": in_turn} | ({"side by side": side_by_side} if beside is not None else {})
    steps = {name: captured(step) if device.type == "cuda" else step for name, step in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):  # interleaved: a device's clock drifts
        for name, step in steps.items():
            times[name].append(timed(step, args.steps, device))
    floor = 1 + memory.bytes / base.bytes
    return {
        "base": base_name, "memory": memory_name, "batch": batch, "floor": round(floor, 3), "bytes": base.bytes + memory.bytes,
        "ms": {name: round(statistics.median(values), 4) for name, values in times.items()},
        "ratio": {name: round(statistics.median(b / a for a, b in zip(times["base"], v, strict=True)), 3) for name, v in times.items()},
    }  # fmt: skip


def captured(step: Step) -> Callable[[], Any]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Milliseconds per step."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    step()
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return 1000 * (time.perf_counter() - started) / steps


def bandwidth(device: torch.device) -> float:
    """Bytes a second that the device reads and writes while copying."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2000 * source.nbytes / timed(lambda: target.copy_(source), 20, device)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="models of a few kilobytes, to try the script")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench-gpu: --device cuda: no CUDA device here")
    device = torch.device(args.device)
    speed = bandwidth(device)
    rows = [measure(base, memory, batch, device, args) for base, memory in PAIRS for batch in args.batches]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}; copies {speed / 1e9:.0f} GB/s; python loadtest/bench_gpu.py, {args.rounds} rounds of {args.steps} steps\n"
    )
    print("| base | memory | batch | way | ms per token | over base | floor | ms at copy speed |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        for way, ms in row["ms"].items():
            print(
                f"| {row['base']} | {row['memory']} | {row['batch']} | {way} | {ms} | {row['ratio'][way]} | {row['floor']} "
                f"| {1000 * row['bytes'] / speed:.3f} |"
            )
    ratios = {f"{r['base']}+{r['memory']} b{r['batch']}": {**r["ratio"], "floor": r["floor"]} for r in rows}
    print(json.dumps({"benchmark": "bench-gpu", "hardware": name, "tiny": args.tiny, "ratio": ratios}))


if __name__ == "__main__":
    main()
