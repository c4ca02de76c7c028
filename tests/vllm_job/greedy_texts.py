"""Greedy answers of a vLLM in a process of its own: before a floor, capped, and with the cap off again; printed as JSON."""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams

from trimtab.axis import Floor
from trimtab.axis import vllm_cap as plugin


def main() -> None:
    folder, floor, given, options = sys.argv[1:]
    llm = LLM(model=folder, dtype="float32", max_model_len=256, max_num_seqs=8, **json.loads(options))

    def texts() -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(given)]
        rows = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        return [list(row.outputs[0].token_ids) for row in rows]

    said = [texts()]
    if plugin.asked_for():
        answers = llm.collective_rpc(plugin.LOAD_FLOOR, args=(plugin.floor_payload(Floor.load(floor)),))
        plugin.check_loaded(Floor.load(floor), answers)
        for strength in ("1.0", "0.0"):
            llm.collective_rpc(plugin.SET_STRENGTH, args=(strength,))
            llm.reset_prefix_cache()
            said.append(texts())
    print("SAID", json.dumps(said))


if __name__ == "__main__":
    main()
