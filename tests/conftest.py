"""Tiny real models and a tiny real tokenizer, made in code: nothing is fetched.

Every model has 4 decoder layers, hidden size 32 and a vocabulary of 300, random weights from a fixed seed, float32, on the CPU.
"""

from __future__ import annotations

import os

# Before any library is imported: tests reach no hub, send no telemetry and share the machine with other work.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from judge_endpoint import KEY, Endpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.directions import Floor, unit
from trimtab.axis.hooks import cap
from trimtab.axis.models import Loaded
from trimtab.axis.sampling import SamplingOptions
from trimtab.eval.answers.arms import Arms
from trimtab.train.builds import drop_stale_locks

torch.set_num_threads(1)

LAYERS, HIDDEN, VOCAB = 4, 32, 300
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gemma3_text")

SENTENCES = [
    "How do I bake bread at home when the oven is small?",
    "You are a helpful assistant. You are a pirate who speaks of the sea.",
    "Tell me about the weather, the harbour and the ships that come and go.",
    "Explain to a child why the sky is blue and the grass is green.",
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma 2 does: the template itself refuses a system message.
CHATML_WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A run of tests that was killed while DeepSpeed compiled must not hang the next one."""
    if not hasattr(session.config, "workerinput"):
        drop_stale_locks(minutes=0)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: what is packed has the time in it, and two workers would collect tests of other names."""
    return argname if isinstance(val, bytes) else None


def build_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens: any text is encoded and decoded exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=template,
    )


def build_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny causal language model of ``architecture`` (a transformers model type) with lively random weights."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        # wide enough that layers, tokens and caps make a difference one can see
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    if architecture.startswith("gemma"):
        settings |= {"query_pre_attn_scalar": 8, "sliding_window": 8}
    settings |= changes
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    implementation = "eager" if architecture.startswith("gemma") else "sdpa"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()


def save_model(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with its tokenizer in a folder, as ``from_pretrained`` wants them, with room for 2048 tokens; the folder."""
    build_model("llama", **{"max_position_embeddings": 2048, **changes}).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build_floor(layers: tuple[int, ...] = (1, 2), *, tau: float = 0.5, hidden: int = HIDDEN, seed: int = 7) -> Floor:
    """A floor along random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = unit(torch.randn(len(layers), hidden, generator=generator))
    return Floor(layers, directions, torch.full((len(layers),), tau), torch.ones(len(layers)))


@contextlib.contextmanager
def capped_by_hand(model: Any, floor: Floor) -> Iterator[None]:
    """Cap the floor's layers by hooks that are not the package's; ``model`` is a Llama, PEFT-wrapped or not."""
    layers = getattr(model, "get_base_model", lambda: model)().model.layers

    def hook(position: int) -> Any:
        return lambda module, inputs, output: cap(output, floor.directions[position], floor.tau[position])

    handles = [layers[layer].register_forward_hook(hook(i)) for i, layer in enumerate(floor.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def quick_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that start ``sys.executable`` start :func:`quick_python`."""
    from quick_python import quick_python

    monkeypatch.setattr(sys, "executable", quick_python())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer with a ChatML template that has a system role, saved for AutoTokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_without_system_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a template that refuses system messages."""
    folder = tmp_path_factory.mktemp("tokenizer_without_system")
    build_tokenizer(CHATML_WITHOUT_SYSTEM).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    """A fresh tokenizer with a system role."""
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def form(tokenizer: Any) -> ChatFormat:
    """The chat format of that tokenizer."""
    return ChatFormat(tokenizer)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny chat model, by architecture: weights, config and tokenizer, as ``from_pretrained`` wants them."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            build_model(architecture).save_pretrained(made[architecture])
            build_tokenizer().save_pretrained(made[architecture])
        return made[architecture]

    return folder


@pytest.fixture
def loaded(tokenizer: Any) -> Loaded:
    """A tiny Llama with its tokenizer, in memory."""
    return Loaded(build_model("llama"), tokenizer, {"model": "tiny-llama", "revision": None})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv(KEY, "secret")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Endpoint()
    yield server
    server.close()


def build_arms(form: ChatFormat, folder: Path, options: SamplingOptions, **changes: Any) -> Arms:
    """Base, and another tiny model in the place of the tuned weights, under a floor that acts."""
    models = {
        name: build_model("llama", seed=seed, max_position_embeddings=2048)
        for seed, name in enumerate(("base", "tuned"))
    }
    weights = {name: (lambda model=model: contextlib.nullcontext(model)) for name, model in models.items()}
    return Arms(weights, form, build_floor(tau=1.0), folder, options, seed=5, **changes)


@pytest.fixture
def browser() -> Iterator[Any]:
    """A real browser that reaches this machine alone."""
    playwright = needs.package("playwright.sync_api", get="pip install playwright")
    path = needs.chromium()
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--no-proxy-server"])
        yield launched
        launched.close()
