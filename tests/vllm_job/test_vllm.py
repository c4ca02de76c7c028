"""vLLM with the cap inside against transformers with the hooks: the same log-probabilities, firing fraction, and greedy text."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from vllm import LLM

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis import vllm_cap as plugin
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.directions import unit
from trimtab.axis.files import read_jsonl
from trimtab.axis.sampling import SamplingOptions
from trimtab.train.vllm_rollouts import VLLMRollouts

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = 24
GREEDY = SamplingOptions(max_new_tokens=TOKENS, temperature=0.0, top_p=1.0)


def rollouts_of(form: ChatFormat, floor: Floor, mode: str, **parts: Any) -> VLLMRollouts:
    """Rollouts through TRL's own generation, all of it but its constructor, which can't open NCCL here, nor choose the dtype."""
    generation = object.__new__(VLLMGeneration)
    vars(generation).update(
        mode=mode, top_k=0, min_p=0.0, repetition_penalty=1.0, logprobs=0, generation_kwargs={},
        structured_outputs_regex=None, enable_sleep_mode=False, tensor_parallel_size=1, model=torch.nn.Identity(),
        accelerator=SimpleNamespace(is_main_process=True, process_index=0), **parts,
    )  # fmt: skip
    return VLLMRollouts(generation, form, floor, most=int)


@pytest.fixture(scope="module")
def rollouts(folder: Path, form: ChatFormat, floor: Floor) -> Iterator[VLLMRollouts]:
    """vLLM in this process, eager, float32, with its prefix cache on."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=16,
        enable_prefix_caching=True, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    found = rollouts_of(form, floor, "colocate", llm=llm)
    yield found
    found.close()


@contextlib.contextmanager
def capped(model: Any, floor: Floor, strength: float) -> Iterator[Any]:
    with torch.no_grad(), ActivationController.of(model).capping(floor, strength, count=True) as counter:
        yield counter


def logprobs(model: Any, prompt: list[int], said: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(said)[:, None])[:, 0]


def texts(rollouts: VLLMRollouts, prompts: list[list[int]], strength: float) -> list[list[int]]:
    with rollouts.capped(strength):
        return [answer.ids for answer in rollouts.sample(prompts, GREEDY)]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_what_it_says_of_its_tokens_is_what_transformers_says(
    rollouts: VLLMRollouts, reference: Any, prompts: list[list[int]], form: ChatFormat, floor: Floor, strength: float
) -> None:
    with rollouts.capped(strength):
        answers = rollouts.sample(prompts, GREEDY)
    apart = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        said = [*answer.ids, form.end_token] if answer.ended else answer.ids
        assert answer.logprobs is not None
        with capped(reference, floor, strength):
            wanted = logprobs(reference, prompt, said)
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=1e-3, rtol=0)
        with torch.no_grad():
            apart += float((logprobs(reference, prompt, said) - wanted).abs().mean()) / len(prompts)
    print(f"strength {strength}: capped and uncapped lie {apart:.3f} nat a token apart")
    assert apart >= 0.05 * strength


def test_it_fires_as_often(rollouts: VLLMRollouts, reference: Any, prompts: list[list[int]], floor: Floor) -> None:
    model = rollouts.generation.llm.llm_engine.model_executor.driver_worker.get_model()
    fired = {layer: [0, 0] for layer in floor.layers}

    def count(layer: int, tau: float, direction: Tensor) -> Any:
        def hook(_: Any, args: Any) -> None:
            below = args[0].float() @ direction < tau
            fired[layer][0] += int(below.sum())
            fired[layer][1] += below.numel()

        return hook

    handles = []
    for i, layer in enumerate(floor.layers):
        own = model.model.layers[layer].trimtab_cap
        handles.append(own.register_forward_pre_hook(count(layer, float(floor.tau[i]), floor.directions[i])))
    with rollouts.capped(1.0):
        answers = rollouts.sample(prompts, GREEDY)
    for handle in handles:
        handle.remove()
    seen = sum(total for _, total in fired.values())
    # the last token is sampled, and never fed through the model
    fed = [
        [*prompt, *answer.ids, *([0] if answer.ended else [])][:-1]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    wanted, slots = 0.0, 0.0
    for row in fed:
        with capped(reference, floor, 1.0) as counter:
            reference(torch.tensor([row]))
        wanted, slots = wanted + counter.fired, slots + counter.seen
    share = sum(part for part, _ in fired.values()) / seen
    print(f"firing fraction: vLLM {share:.4f}, transformers {wanted / slots:.4f}")
    assert 0.1 < share < 0.9
    # shared prefixes are computed once in vLLM, so the tokens are not quite the same
    assert share == pytest.approx(wanted / slots, abs=0.05)


def test_greedy_text_and_no_prefix_of_the_one_serves_the_other(
    rollouts: VLLMRollouts, reference: Any, prompts: list[list[int]], floor: Floor, form: ChatFormat
) -> None:
    off, on = texts(rollouts, prompts, 0.0), texts(rollouts, prompts, 1.0)
    assert [one != other for one, other in zip(off, on, strict=True)].count(True) >= len(prompts) // 2
    assert texts(rollouts, prompts, 0.0) == off
    assert texts(rollouts, prompts, 1.0) == on
    same = 0
    for prompt, ids in zip(prompts, on, strict=True):
        with capped(reference, floor, 1.0):
            row = reference.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=form.end_ids
            )[0, len(prompt) :].tolist()
        same += [token for token in row if token not in form.end_ids] == ids
    assert same >= len(prompts) - 1  # ties of float32 may fall either way


def test_after_the_block_nothing_is_capped(rollouts: VLLMRollouts, prompts: list[list[int]]) -> None:
    off = texts(rollouts, prompts, 0.0)
    with pytest.raises(RuntimeError, match="stop"), rollouts.capped(1.0):
        raise RuntimeError("stop")
    assert [answer.ids for answer in rollouts.sample(prompts, GREEDY)] == off


def test_compiled_and_over_three_tensor_parallel_workers(
    folder: Path, form: ChatFormat, floor: Floor, tmp_path: Path
) -> None:
    """In processes of their own, one without the plugin first: its compiled graph must not be taken for one with caps."""
    floor.save(tmp_path / "floor.safetensors")
    prompts = [form.prompt_ids([{"role": "user", "content": text}]) for text in ("Who are you?", "Tell me of the sea.")]

    def said(asked: str, **options: Any) -> Any:
        variables = {
            "TRIMTAB_VLLM_CAP": asked,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        }
        command = [sys.executable, str(Path(__file__).with_name("greedy_texts.py")), str(folder)]
        command += [str(tmp_path / "floor.safetensors"), json.dumps(prompts), json.dumps(options)]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.split("SAID")[1])

    (plain,) = said("0")
    off, on, again = said("1")
    assert off == plain == again
    assert on != off
    parallel = said("1", tensor_parallel_size=3, enforce_eager=True)  # it has 9 heads
    assert parallel == [off, on, again]


@contextlib.contextmanager
def server(folder: Path, log: Path, asked: str) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # what `vllm serve` runs; the command itself looks for a distribution of that name, and the CPU build has another
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-prefix-caching", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--logprobs-mode", "processed_logprobs"]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "TRIMTAB_VLLM_CAP": asked, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=file, stderr=file)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_a_server_caps_the_same(
    rollouts: VLLMRollouts, folder: Path, form: ChatFormat, floor: Floor, prompts: list[list[int]], tmp_path: Path
) -> None:
    wanted = [texts(rollouts, prompts, strength) for strength in (0.0, 1.0)]
    with server(folder, tmp_path / "server.log", "1") as url:
        client = VLLMClient(base_url=url, connection_timeout=240)
        served = rollouts_of(form, floor, "server", vllm_client=client)
        found = [texts(served, prompts, strength) for strength in (0.0, 1.0, 0.0)]
        assert found == [*wanted, wanted[0]]
        with served.capped(1.0):
            answer = served.sample(prompts[:1], GREEDY)[0]
    with rollouts.capped(1.0):
        assert rollouts.sample(prompts[:1], GREEDY)[0].logprobs == pytest.approx(answer.logprobs, abs=1e-3)


def test_a_server_that_does_not_cap_is_refused(folder: Path, form: ChatFormat, floor: Floor, tmp_path: Path) -> None:
    with server(folder, tmp_path / "server.log", "0") as url:
        client = VLLMClient(base_url=url, connection_timeout=240)
        with pytest.raises(UserError, match="does not cap") as caught:
            rollouts_of(form, floor, "server", vllm_client=client)
    assert "TRIMTAB_VLLM_CAP=1" in str(caught.value.remedy)


def trained(folder: Path, method: str, sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Train by recipe and entry script, vLLM colocated; the metrics of each step."""
    content = {
        "model": {"name": "smollm2-135m", "device": "cpu"},
        "axis": {"roles": 2, "held_out_roles": 1, "questions": 2, "sampling": {"max_new_tokens": 12}},
        "floor": {"layers": "14-24", "percentile": 75, "pool": 12, "drift_rows": 4, "min_firing": 0},
        "data": {"drift_prompts": 12, "conversation_turns": 2, "benign_share": 0.25},
        "lora": {"r": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
    }  # fmt: skip
    train = {
        "learning_rate": 1.0e-3, "save_strategy": "no", "use_vllm": True, "vllm_max_model_length": 1024,
        "gradient_checkpointing": False, "vllm_gpu_memory_utilization": 0.3, "per_device_train_batch_size": 8, "max_steps": 3,
    }  # fmt: skip
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**content, **sections, "train": {**train, **sections["train"]}}))
    command = [sys.executable, str(Path(__file__).with_name("on_cpu.py")), str(ROOT / "train" / f"{method}.py")]
    command += ["--config", str(recipe), "--output_dir", str(folder / "run"), "--quiet"]
    variables = {"VLLM_CACHE_ROOT": str(folder / "cache"), "TRIMTAB_VLLM_CAP": ""}
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Traceback" not in done.stderr
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").exists()
    rows = read_jsonl(folder / "run" / "metrics.jsonl")
    print(json.dumps(rows))
    return rows


def test_grpo_by_recipe_samples_capped_and_learns(tmp_path: Path) -> None:
    """``train.use_vllm: true`` and the entry script: the learner's weights sent each step, the base's for benign rows."""
    method = {"name": "grpo", "rewards": [{"name": "persona_llr"}], "cap_schedule": "linear"}
    rows = trained(tmp_path, "grpo", {"method": method, "train": {"num_generations": 4, "max_completion_length": 16}})
    assert [row["cap_strength"] for row in rows] == pytest.approx([1.0, 2 / 3, 1 / 3])
    # in bfloat16; the cap itself is worth ten times as much
    assert all(row["vllm/distance"] < 0.1 < 0.2 < row["off_policy/log_ratio"] for row in rows[:2])


def test_sft_by_recipe_samples_every_round_from_vllm(tmp_path: Path) -> None:
    """Drift rows by the current weights under the cap, benign rows by the base, two rounds."""
    sampling = {"max_new_tokens": 16, "batch_size": 16}
    method = {"name": "sft", "sampling": sampling, "regenerate_every": 2, "cap_schedule": "constant"}
    rows = trained(tmp_path, "sft", {"method": method, "train": {"max_steps": 4}})
    assert [row["vllm/distance"] < 0.1 for row in rows if "vllm/distance" in row] == [True, True]
    rollouts = [row for path in sorted((tmp_path / "run" / "rollouts").iterdir()) for row in read_jsonl(path)]
    assert len(rollouts) == 32
    assert {(row["kind"], row["sampler"], row["cap_strength"]) for row in rollouts} == {
        ("drift", "capped", 1.0),
        ("benign", "base", 0.0),
    }


def test_the_plugin_is_what_vllm_finds() -> None:
    from importlib.metadata import entry_points

    (found,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "trimtab"]
    assert found.load() is plugin.register


# Wide enough for the heads that vLLM's CPU kernels know.
TINY = {
    "hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": []}


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo3", "cohere", "exaone4"],
)
def test_every_family_is_capped_where_transformers_caps_it_and_takes_the_learners_weights(
    kind: str, form: ChatFormat, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Random models of each architecture: layers return the stream in two parts, whole, or whole beside a stale residual."""
    own = {"qwen3_moe": EXPERTS, "cohere": {"logit_scale": 1.0}}  # Cohere's own scale hides what is to be seen
    extra = own.get(kind, {"query_pre_attn_scalar": 64} if kind.startswith("gemma") else {})
    config = AutoConfig.for_model(kind, **TINY, **extra, vocab_size=len(form.tokenizer), eos_token_id=2, pad_token_id=2)  # type: ignore[arg-type]
    torch.manual_seed(0)
    attention = "eager" if kind.startswith("gemma") else "sdpa"
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    plain.save_pretrained(tmp_path / "model")
    form.tokenizer.save_pretrained(tmp_path / "model")
    model: Any = get_peft_model(
        plain, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    directions = unit(torch.randn(2, TINY["hidden_size"], generator=torch.Generator().manual_seed(1)))
    floor = Floor((1, 2), directions, torch.tensor([1.0, 1.0]), torch.ones(2))
    floor.save(tmp_path / "floor.safetensors")
    command = [sys.executable, str(Path(__file__).with_name("says_of_tokens.py")), str(tmp_path / "model")]
    command += [str(tmp_path / "adapter"), str(tmp_path / "floor.safetensors"), json.dumps(prompts[:4])]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    policies = {"uncapped": (0.0, False), "capped": (1.0, False), "sent": (1.0, True)}
    for said, rows in json.loads(done.stdout.split("SAID")[1]).items():
        distances = {}
        for name, (strength, adapted) in policies.items():
            with contextlib.nullcontext() if adapted else model.disable_adapter(), capped(model, floor, strength):
                apart = [
                    (logprobs(model, prompt, ids) - torch.tensor(told)).abs().mean()
                    for prompt, (ids, told) in zip(prompts, rows, strict=False)
                ]
            distances[name] = float(max(apart))
        own, others = distances.pop(said), distances
        print(f"{kind}, {said}: {own:.1e} from the same policy, {min(others.values()):.1e} from the others")
        assert own < 2e-3 < 0.02 < min(others.values())
