"""Memory of the distillation loss: in chunks against over all logits at once, forward and backward, as tokens grow.

    python benchmarks/distill_memory.py [--json out.json]

The figure is the most that PyTorch's allocator gave out beyond the inputs. In chunks it must not grow with tokens x vocabulary,
only with tokens x hidden size: the gradient of the hidden states.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measuring import peak_bytes
from torch import Tensor

from trimtab.axis.files import write_json
from trimtab.losses import chunked_divergence, divergence_terms


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    options.add_argument("--hidden", type=int, default=576)
    options.add_argument("--vocabulary", type=int, default=49152)
    options.add_argument("--kind", choices=["forward_kl", "reverse_kl", "jsd"], default="reverse_kl")
    options.add_argument("--json", type=Path, metavar="FILE")
    arguments = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.vocabulary, arguments.hidden)
    weight = (torch.randn(shape, generator=generator) / 24).to(device, torch.bfloat16)

    def head(hidden: Tensor) -> Tensor:
        return hidden @ weight.T

    rows = []
    print("tokens   in chunks, MiB   all at once, MiB   ratio   losses")
    for tokens in arguments.tokens:
        states = torch.randn(2, tokens, arguments.hidden, generator=generator).to(device, torch.bfloat16)
        losses: dict[str, float] = {}

        def run(name: str, states: Tensor = states, losses: dict[str, float] = losses) -> None:
            student = states[0].clone().requires_grad_()
            if name == "chunked":
                loss = chunked_divergence(student, states[1], head, arguments.kind)
            else:
                loss = divergence_terms(head(student), head(states[1]).detach(), arguments.kind).sum()
            loss.backward()
            losses[name] = float(loss.detach()) / states.shape[1]

        peaks = {name: peak_bytes(lambda name=name: run(name)) for name in ("chunked", "whole")}  # type: ignore[misc]
        mib = {name: value / 2**20 for name, value in peaks.items()}
        rows.append({"tokens": tokens, **{f"{name}_bytes": value for name, value in peaks.items()}, "losses": losses})
        print(
            f"{tokens:6d}   {mib['chunked']:14.1f}   {mib['whole']:16.1f}   {mib['chunked'] / mib['whole']:5.3f}   "
            f"{losses['chunked']:.4f} {losses['whole']:.4f}"
        )
    if arguments.json:
        write_json(arguments.json, {"benchmark": "distill_memory", "kind": arguments.kind, "rows": rows})


if __name__ == "__main__":
    main()
