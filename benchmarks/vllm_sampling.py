"""Capped sampling by vLLM beside transformers: tokens a second at 64 prompts, and whether the two agree about log-probabilities.

    make test-vllm                                          # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/vllm_sampling.py       # eager; about five minutes on two cores
    .venv-vllm/bin/python benchmarks/vllm_sampling.py --compiled --floor runs/demo/floor.safetensors

SmolLM2-135M-Instruct, role prompts, every answer of the full length. The two sample in turns in one process, so what else the
machine does meets both. Agreement: transformers scores vLLM's own tokens under the same cap, and without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ |= {"TRIMTAB_VLLM_CAP": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from measuring import bench_floor
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from trimtab.axis import ActivationController, Floor
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import fetch_embedded, load_tokenizer
from trimtab.axis.sampling import SamplingOptions, sample_batch
from trimtab.axis.vllm_cap import LOAD_FLOOR, SET_STRENGTH, check_loaded, floor_payload
from trimtab.recipes import data


class Endless(ChatFormat):
    """A chat format in which nothing ends an answer, so that all are of one length."""

    @property
    def end_ids(self) -> list[int]:
        """No tokens."""
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floor", type=Path, help="floor.safetensors of a run; default: random directions, tau 0")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile, which takes some minutes")
    given = parser.parse_args()
    folder = fetch_embedded("smollm2-135m")
    form = Endless(load_tokenizer(str(folder), None))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, given.dtype)).eval()
    roles, questions = data.roles("dev"), data.questions("dev")
    prompts = [
        form.prompt_ids(chat(roles[i % len(roles)].prompts[0], questions[i % len(questions)]))
        for i in range(given.prompts)
    ]
    floor = Floor.load(given.floor) if given.floor else bench_floor(model)
    llm = LLM(
        model=str(folder), dtype=given.dtype, enforce_eager=not given.compiled, max_model_len=1024,
        max_num_seqs=given.prompts, enable_prefix_caching=False, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    check_loaded(floor, llm.collective_rpc(LOAD_FLOOR, args=(floor_payload(floor),)))
    options = SamplingOptions(max_new_tokens=given.tokens, temperature=1.0, top_p=1.0, batch_size=given.prompts)

    def by_vllm() -> list[Any]:
        parameters = SamplingParams(temperature=1.0, max_tokens=given.tokens, ignore_eos=True, logprobs=0)
        rows = llm.generate([{"prompt_token_ids": row} for row in prompts], parameters, use_tqdm=False)
        return [row.outputs[0] for row in rows]

    def by_transformers() -> None:
        sample_batch(model, form, prompts, range(len(prompts)), options, seeds=range(len(prompts)), floor=floor)

    seconds: dict[str, list[float]] = {"vllm": [], "transformers": []}
    for repeat in range(given.repeats + 1):
        for name, sample in (("vllm", by_vllm), ("transformers", by_transformers)):
            llm.collective_rpc(SET_STRENGTH, args=("1.0",))
            started = time.perf_counter()
            sample()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    total = given.prompts * given.tokens
    for name, taken in seconds.items():
        print(f"{name}: {total / statistics.median(taken):.0f} tokens a second (median of {given.repeats})")
    ratio = statistics.median(b / a for a, b in zip(seconds["vllm"], seconds["transformers"], strict=True))
    print(f"vLLM / transformers: {ratio:.2f} (median of the pairs)")
    for strength in (1.0, 0.0):
        llm.collective_rpc(SET_STRENGTH, args=(str(strength),))
        answers = by_vllm()[:16]
        distances = {"capped": 0.0, "uncapped": 0.0}
        for prompt, answer in zip(prompts, answers, strict=False):
            ids = list(answer.token_ids)
            said = torch.tensor([row[token].logprob for token, row in zip(ids, answer.logprobs, strict=True)])
            for name in distances:
                controller = ActivationController.of(model)
                with torch.no_grad(), controller.capping(floor, enabled=name == "capped"):
                    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
                wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
                distances[name] += float((wanted - said).abs().mean()) / len(answers)
        print(
            f"cap strength {strength:g} in vLLM: mean |log-probability - transformers'| {distances['capped']:.4f} capped, "
            f"{distances['uncapped']:.4f} uncapped (nat a token)"
        )


if __name__ == "__main__":
    main()
