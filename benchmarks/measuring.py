"""What the benchmarks share: arms in random order, ratios within a round, machine facts, the verdict.

Machines are noisy, so arms take turns within a round and are compared within it: whatever slows the machine for a while slows
them all. The figure is the median over rounds of the ratio to the base arm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.axis import Floor
from trimtab.axis.calibration import window_by_rule
from trimtab.axis.directions import unit
from trimtab.axis.files import write_json
from trimtab.axis.layers import shape_of, text_config_of
from trimtab.axis.machine import machine_facts

FEWEST_ROUNDS = 4  # one stalled step of a busy machine is all there is to see in fewer
WIDEST_SPREAD = (
    0.1  # of the quartiles: beyond it a starved machine has been seen to put an arm that does more work below 1
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m", help="hub id, folder or embedded model")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--rounds", type=positive, default=6, help="rounds, in each of which every arm runs once")
    made.add_argument("--seed", type=int, default=0, help="of the order of arms")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the result, with the machine's facts")
    return made


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def bench_floor(model: Any) -> Floor:
    """A floor with the layers that calibration would choose, along random directions, and tau 0."""
    layers = window_by_rule(text_config_of(model).model_type, shape_of(model)[0])
    generator = torch.Generator().manual_seed(0)
    directions = unit(torch.randn(len(layers), shape_of(model)[1], generator=generator))
    return Floor(layers, directions, torch.zeros(len(layers)), torch.ones(len(layers)))


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes that ``work`` had from PyTorch's allocator at a time, beyond what was there before.

    On a CPU too: resident memory varies from run to run, and what the allocator gives out is the same every time.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    totals = [int(event["args"]["Total Allocated"]) for event in events]
    return max(totals) - (totals[0] - int(events[0]["args"]["Bytes"]))


def synchronise() -> None:
    """Wait for the GPU, where there is one, so that a clock read afterwards counts its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_rounds(arms: Mapping[str, Callable[[], float | None]], rounds: int, seed: int) -> dict[str, list[float]]:
    """Run every arm once a round, in an order drawn anew for each round, after one round that is thrown away.

    Args:
        arms: name -> what it does. It may return its own figure, such as a median over steps; None means its wall time.
        rounds: number of rounds that count.
        seed: of the orders.

    Returns:
        Arm -> its figure in each round.
    """
    generator = random.Random(seed)
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        order = list(arms)
        generator.shuffle(order)
        for name in order:
            synchronise()
            started = time.perf_counter()
            figure = arms[name]()
            synchronise()
            if number:
                figures[name].append(time.perf_counter() - started if figure is None else figure)
    return figures


def compare(
    figures: Mapping[str, Sequence[float]], arm: str, base: str, target: float | None, *, exact: bool = False
) -> dict[str, Any]:
    """The median over rounds of arm / base, with the quartiles of those ratios and the verdict on the target.

    The verdict is ``unclear`` where the noise decides: the quartiles lie on both sides of the target or more than 0.1 apart, or
    there are fewer than 4 rounds.

    Args:
        figures: arm -> its figure in each round.
        arm: the arm in question.
        base: the arm it is compared with.
        target: the largest ratio that is good; None gives no verdict.
        exact: the figures are the same in every run, so that one round is enough.
    """
    ratios = [one / other for one, other in zip(figures[arm], figures[base], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios * 3)
    ratio = statistics.median(ratios)
    verdict = None
    if target is not None:
        verdict = "met" if high <= target else "missed" if low > target else "unclear"
        if not exact and (len(ratios) < FEWEST_ROUNDS or high - low > WIDEST_SPREAD):
            verdict = "unclear"
    return {
        "arm": arm,
        "base": base,
        "ratio": round(ratio, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "rounds": len(ratios),
        "target": target,
        "verdict": verdict,
    }


def tell(what: str, result: Mapping[str, Any]) -> None:
    """Print one comparison."""
    low, high = result["quartiles"]
    line = f"{what}: {result['arm']} / {result['base']} = {result['ratio']:.4f} (quartiles {low:.4f} to {high:.4f}"
    line += f", {result['rounds']} round{'s' * (result['rounds'] > 1)})"
    if result["target"] is not None:
        line += f", target <= {result['target']:.2f}: {result['verdict']}"
    print(line, flush=True)


def facts_of_now() -> dict[str, Any]:
    """What a reader needs to judge the numbers; the load says how noisy the machine was."""
    libraries = {name: __import__(name).__version__ for name in ("torch", "transformers", "trl", "peft")}
    load = [round(value, 2) for value in os.getloadavg()]
    return {**machine_facts(), "load": load, "python": platform.python_version(), **libraries}


def finish(arguments: argparse.Namespace, benchmark: str, result: Mapping[str, Any]) -> None:
    """Write the result, where a file was asked for."""
    if arguments.json is not None:
        # files lie where they lie on this machine: no part of the result
        settings = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
        write_json(arguments.json, {"benchmark": benchmark, "machine": facts_of_now(), "settings": settings, **result})
