"""What a vLLM in a process of its own says of the tokens that it samples, printed as JSON: uncapped, capped, and with the weights
of an adapter that a learner sent it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from on_cpu import keep_weights
from peft import PeftModel
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from trimtab.axis import Floor
from trimtab.axis import vllm_cap as plugin
from trimtab.axis.adapters import merged_weights


def main() -> None:
    folder, adapter, file, given = sys.argv[1:]
    keep_weights()
    # before vLLM, which makes some of transformers' classes its own
    learner = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    llm = LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    floor = Floor.load(file)
    plugin.check_loaded(floor, llm.collective_rpc(plugin.LOAD_FLOOR, args=(plugin.floor_payload(floor),)))
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(given)]
    options = SamplingParams(temperature=1.0, max_tokens=12, logprobs=0, seed=0, ignore_eos=True)

    def under(strength: float) -> list[Any]:
        llm.collective_rpc(plugin.SET_STRENGTH, args=(str(strength),))
        llm.reset_prefix_cache()
        rows = [row.outputs[0] for row in llm.generate(prompts, options, use_tqdm=False)]
        return [
            (list(row.token_ids), [at[token].logprob for token, at in zip(row.token_ids, row.logprobs, strict=True)])
            for row in rows
        ]

    said = {"uncapped": under(0.0), "capped": under(1.0)}
    for name, weight in merged_weights(learner):  # as TRL sends them
        llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights([(name, weight)])
    said["sent"] = under(1.0)
    print("SAID", json.dumps(said))


if __name__ == "__main__":
    main()
