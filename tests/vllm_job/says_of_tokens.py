"""What a vLLM in a process of its own says of the tokens that it samples, uncapped and capped; printed as JSON."""

from __future__ import annotations

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams

from trimtab.axis import Floor
from trimtab.axis import vllm_cap as plugin


def main() -> None:
    folder, file, given = sys.argv[1:]
    llm = LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    floor = Floor.load(file)
    plugin.check_loaded(floor, llm.collective_rpc(plugin.LOAD_FLOOR, args=(plugin.floor_payload(floor),)))
    said = {}
    for strength in (0.0, 1.0):
        llm.collective_rpc(plugin.SET_STRENGTH, args=(str(strength),))
        llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(given)]
        options = SamplingParams(temperature=1.0, max_tokens=12, logprobs=0, seed=0, ignore_eos=True)
        rows = [row.outputs[0] for row in llm.generate(prompts, options, use_tqdm=False)]
        said[str(strength)] = [
            (list(row.token_ids), [at[token].logprob for token, at in zip(row.token_ids, row.logprobs, strict=True)])
            for row in rows
        ]
    print("SAID", json.dumps(said))


if __name__ == "__main__":
    main()
