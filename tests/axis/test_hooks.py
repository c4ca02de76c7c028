"""The hooks: the cap does what its formula says, in generation, under compile, adapters and checkpointing, and nothing else."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, HIDDEN, LAYERS, VOCAB, build_floor, build_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.axis import ActivationController, Floor, UserError, cap, find_decoder_layers, project
from trimtab.axis.directions import unit
from trimtab.losses.axis_floor import axis_floor_loss

IDS = torch.tensor([[5, 9, 77, 130, 255, 40, 12, 299], [3, 250, 101, 6, 200, 60, 33, 8]])


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def halfway_floor(model: Any, layers: tuple[int, ...] = (1, 2)) -> Floor:
    """A floor that about half of the tokens are below, so that the cap both fires and does not."""
    floor = build_floor(layers)
    with ActivationController.of(model).recording(layers) as recording:
        logits(model)
    tau = [project(recording.last(layer), floor.directions[i]).median() for i, layer in enumerate(layers)]
    return Floor(layers, floor.directions, torch.stack(tau), torch.ones(len(layers)))


def adapted(model: Any, **more: Any) -> Any:
    """The model with a LoRA adapter that does something."""
    torch.manual_seed(5)
    peft_model: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2, **more))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return peft_model


class TestFormula:
    def test_both_forms_agree_and_only_the_short_are_moved(self) -> None:
        hidden = 3 * torch.randn(5, 7, HIDDEN, generator=torch.Generator().manual_seed(0))
        v = build_floor((0,)).directions[0]
        tau = 0.8
        capped = cap(hidden, v, tau)
        p = hidden @ v
        assert torch.allclose(capped, hidden - (p - tau).clamp(max=0).unsqueeze(-1) * v, atol=1e-6)
        assert torch.allclose(capped @ v, p.clamp(min=tau), atol=1e-5)
        assert 0.2 < (p < tau).float().mean() < 0.8
        assert torch.equal(capped[p >= tau], hidden[p >= tau])
        across = capped - (capped @ v).unsqueeze(-1) * v
        assert torch.allclose(across, hidden - p.unsqueeze(-1) * v, atol=1e-5), (
            "nothing but the component along v moves"
        )

    def test_strength(self) -> None:
        hidden = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
        v = build_floor((0,)).directions[0]
        p = hidden @ v
        assert torch.equal(cap(hidden, v, 1.0, 0.0), hidden)
        assert torch.allclose(cap(hidden, v, 1.0, 0.5) @ v, p + 0.5 * (1.0 - p).relu(), atol=1e-5)

    def test_bfloat16_within_the_rounding_of_the_hidden_state(self) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden = 3 * torch.randn(500, 2048, generator=generator)
        hidden[:, 5] = 300  # the massive dimension of real residual streams
        v = unit(torch.randn(2048, generator=generator))
        capped = cap(hidden.bfloat16(), v, 10.0)
        assert capped.dtype == torch.bfloat16
        short = (10.0 - project(capped, v)).relu()
        assert 0 < short.max() < 0.1
        assert torch.allclose(cap(hidden.half(), v, 10.0).float() @ v, torch.tensor(10.0).expand(500), atol=2e-2)


class TestCapping:
    def test_every_token_of_every_floor_layer_and_no_other(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        seen: dict[int, Tensor] = {}
        plain = logits(model)
        with controller.capping(floor):
            # later hooks on the same layers see the capped output
            handles = [
                layer.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out))
                for i, layer in enumerate(find_decoder_layers(model))
            ]
            capped = logits(model)
        for handle in handles:
            handle.remove()
        for i, layer in enumerate(floor.layers):
            assert (project(seen[layer], floor.directions[i]) >= floor.tau[i] - 1e-5).all()
        assert not torch.allclose(capped, plain, atol=1e-2)
        assert torch.equal(logits(model), plain), "off again"

    def test_recording_and_reading_see_the_state_before_the_cap(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        read: list[Tensor] = []
        with controller.recording([1]) as plain:
            logits(model)
        with (
            controller.capping(floor),
            controller.recording([1, 2]) as raw,
            controller.reading([1], lambda layer, h: read.append(h)),
        ):
            logits(model)
        assert torch.equal(raw.last(1), plain.last(1)) and torch.equal(read[0], plain.last(1))
        with controller.capping(floor), controller.reading([1, 3], lambda layer, h: read.append(h), after_cap=True):
            logits(model)
        assert torch.equal(read[1], cap(plain.last(1), floor.directions[0], floor.tau[0]))
        assert len(read) == 3, "a layer without a floor is read once too"
        with pytest.raises(RuntimeError, match="no state was recorded at layer 3"):
            raw.last(3)
        assert sorted(raw.states) == [1, 2]

    def test_it_switches_off_after_an_exception(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor, plain = halfway_floor(model), logits(model)

        def fail(layer: int, hidden: Tensor) -> None:
            raise KeyboardInterrupt

        with (
            pytest.raises(KeyboardInterrupt),
            controller.capping(floor),
            controller.recording([1]),
            controller.reading([2], fail, after_cap=True),
        ):
            logits(model)
        assert controller.cap_strength == 0 and torch.equal(logits(model), plain)
        with controller.capping(floor), controller.recording([1]), controller.reading([2], lambda layer, h: None):
            assert not torch.equal(logits(model), plain)

    def test_nested_caps_and_recordings_are_refused(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        with controller.capping(floor, 0.7):
            with pytest.raises(RuntimeError, match="don't nest"), controller.capping(floor):
                pass
            assert controller.cap_strength == 0.7, "the outer one stays on"
        with controller.recording([1]), pytest.raises(RuntimeError, match="recording"), controller.recording([2]):
            pass
        with (
            controller.reading([1], print),
            pytest.raises(RuntimeError, match="reader"),
            controller.reading([2], print),
        ):
            pass

    def test_a_floor_that_does_not_fit_is_refused(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        with pytest.raises(UserError, match="beyond the model"), controller.capping(build_floor((1, LAYERS))):
            pass
        with pytest.raises(UserError, match="width 16"), controller.capping(build_floor((1,), hidden=16)):
            pass
        assert controller.cap_strength == 0

    def test_disabled_and_zero_strength_do_nothing(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor, plain = halfway_floor(model), logits(model)
        for arguments in ({"enabled": False}, {"strength": 0.0}):
            with controller.capping(floor, **arguments):  # type: ignore[arg-type]
                assert controller.cap_strength == 0 and torch.equal(logits(model), plain)

    def test_uncapped_suspends_and_restores(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor, plain = halfway_floor(model), logits(model)
        with controller.capping(floor, 0.5):
            capped = logits(model)
            with controller.uncapped():
                assert torch.equal(logits(model), plain) and controller.cap_strength == 0
                with controller.capping(floor):  # another arm inside the suspension
                    assert not torch.allclose(logits(model), capped)
            assert controller.cap_strength == 0.5
            assert torch.equal(logits(model), capped) and not torch.equal(capped, plain)

    def test_one_controller_a_model(self) -> None:
        model = build_model("llama")
        controller = ActivationController(model)
        assert ActivationController.of(model) is controller
        with pytest.raises(RuntimeError, match="already"):
            ActivationController(model)
        peft_model = adapted(model)
        assert ActivationController.of(peft_model) is controller
        merged = peft_model.merge_and_unload()
        assert ActivationController.of(merged) is controller
        controller.remove()
        assert ActivationController.of(model) is not controller

    def test_tensors_of_the_cap_are_no_part_of_the_model(self) -> None:
        model = build_model("llama")
        keys = set(model.state_dict())
        with ActivationController.of(model).capping(halfway_floor(model)):
            logits(model)
            assert set(model.state_dict()) == keys


class TestGeneration:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_capped_generation_equals_the_capped_full_forward(self, architecture: str) -> None:
        """With the KV cache, greedily, left-padded, beyond the sliding window of the Gemmas."""
        model = build_model(architecture)
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
        padded[0, :5] = 0
        mask = torch.ones_like(padded)
        mask[0, :5], mask[1, :3] = 0, 0
        with controller.capping(floor), torch.no_grad():
            out = model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=10,
                do_sample=False,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
            stepwise = torch.stack(out.logits, 1)
            for row in range(2):
                bare = out.sequences[row, int(mask[row].eq(0).sum()) :][None]
                full = model(input_ids=bare).logits[0, -11:-1]
                assert torch.allclose(stepwise[row], full, atol=2e-4), (stepwise[row] - full).abs().max()
        uncapped = logits(model, out.sequences[1:, 3:])[0, -11:-1]
        assert (uncapped - stepwise[1]).abs().max() > 0.05, "the cap made a difference"

    def test_tuple_layers_are_capped_and_keep_their_other_parts(self) -> None:
        # transformers turns such layers into plain ones, release by release
        settings: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": 4}
        settings["attention_types"] = [[["global"], LAYERS]]
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt_neo", **settings, initializer_range=0.2), dtype=torch.float32
        ).eval()
        controller = ActivationController.of(model)
        kinds: set[type] = set()
        handle = find_decoder_layers(model)[1].register_forward_hook(lambda m, a, out: kinds.add(type(out)))
        floor, plain = halfway_floor(model), logits(model)
        handle.remove()
        assert kinds == {tuple}, "this test is about layers that return tuples"
        with controller.capping(floor), torch.no_grad():
            out = model.generate(
                input_ids=IDS, max_new_tokens=5, do_sample=False, eos_token_id=None,
                pad_token_id=0, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            full = model(input_ids=out.sequences).logits[:, -6:-1]
        assert torch.allclose(torch.stack(out.logits, 1), full, atol=1e-4)
        assert torch.equal(logits(model), plain) and not torch.allclose(logits(model, out.sequences)[:, -6:-1], full)


class TestCompile:
    @pytest.mark.slow
    def test_on_off_on(self) -> None:
        torch._dynamo.reset()
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor, plain = halfway_floor(model), logits(model)
        with controller.capping(floor):
            capped = logits(model)
        compiled = torch.compile(model, backend="aot_eager")
        assert ActivationController.of(compiled) is controller  # type: ignore[arg-type]
        for on in (False, True, False, True):
            with controller.capping(floor, enabled=on):
                assert torch.allclose(logits(compiled), capped if on else plain, atol=1e-5)

    @pytest.mark.slow
    def test_an_annealed_strength_does_not_outrun_the_recompile_limit(self) -> None:
        torch._dynamo.reset()
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        compiled = torch.compile(model, backend="eager")
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
            for step in range(12):
                strength = 1 - step / 12
                with controller.capping(floor, strength):
                    found, expected = logits(compiled), logits(model)
                assert torch.allclose(found, expected, atol=1e-5)
        torch._dynamo.reset()

    @pytest.mark.slow
    def test_recording_under_compile_has_gradients(self) -> None:
        torch._dynamo.reset()
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        compiled: Any = torch.compile(model, backend="aot_eager")
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            with controller.recording(floor.layers) as recording:
                run(input_ids=IDS)
            states = {layer: recording.last(layer, with_grad=True) for layer in floor.layers}
            axis_floor_loss(states, floor, torch.ones_like(IDS)).backward()
            gradients.append(model.model.layers[0].mlp.down_proj.weight.grad.clone())
        assert gradients[0].abs().max() > 1e-4 and torch.allclose(gradients[0], gradients[1], atol=1e-5)


class TestAdapters:
    def test_disable_adapter_leaves_the_cap_on(self) -> None:
        base = build_model("llama")
        floor = halfway_floor(base)
        with ActivationController.of(base).capping(floor):
            expected = logits(base)
        model = adapted(base)
        controller = ActivationController.of(model)
        with controller.capping(floor):
            assert not torch.allclose(logits(model), expected, atol=1e-2), "the adapter does something"
        with controller.capping(floor), model.disable_adapter():
            assert torch.equal(logits(model), expected), "adapter off, cap on: the capped self"

    @pytest.mark.parametrize("architecture", ["llama", "gemma2"])
    @pytest.mark.parametrize("kind", ["none", "nonreentrant", "reentrant"])
    def test_recording_gives_the_right_gradients_under_checkpointing(self, architecture: str, kind: str) -> None:
        def gradients(model: Any, states: dict[int, Tensor], model_loss: Tensor) -> dict[str, Tensor]:
            (model_loss + axis_floor_loss(states, floor, torch.ones_like(IDS))).backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        base = build_model(architecture)
        floor = halfway_floor(base)
        reference: Any = adapted(copy.deepcopy(base)).train()
        out = reference(input_ids=IDS, labels=IDS, output_hidden_states=True)
        expected = gradients(reference, {layer: out.hidden_states[layer + 1] for layer in floor.layers}, out.loss)

        model = adapted(base).train()
        if kind != "none":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            layer: Any = find_decoder_layers(model)[0]
            assert layer.gradient_checkpointing
            assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is (kind == "reentrant")
        with ActivationController.of(model).recording(floor.layers) as recording:
            loss = model(input_ids=IDS, labels=IDS).loss
        states = {layer: recording.last(layer, with_grad=True) for layer in floor.layers}
        found = gradients(model, states, loss)
        assert found.keys() == expected.keys() and len(found) == 3 * 2 * LAYERS
        for name in expected:
            assert torch.allclose(found[name], expected[name], atol=2e-5, rtol=1e-4), name

        # the penalty reaches the adapter at and below the deepest floor layer: without it the gradient differs
        reference.zero_grad()
        reference(input_ids=IDS, labels=IDS).loss.backward()
        bare = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        first = next(name for name in expected if "layers.0." in name and "lora_B" in name)
        assert (bare[first] - expected[first]).abs().max() > 1e-3

    def test_with_grad_skips_states_of_no_grad_forwards(self) -> None:
        model = adapted(build_model("llama"))
        with ActivationController.of(model).recording([1]) as recording:
            model(input_ids=IDS)
            logits(model)
        assert len(recording.states[1]) == 2
        assert recording.last(1, with_grad=True).requires_grad and not recording.last(1).requires_grad
        with ActivationController.of(model).recording([1]) as recording:
            logits(model)
        with pytest.raises(RuntimeError, match="requires grad"):
            recording.last(1, with_grad=True)


class TestDeepcopy:
    def test_a_copy_has_a_controller_of_its_own_switched_off(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor, plain = halfway_floor(model), logits(model)
        with controller.capping(floor), controller.recording([1]) as recording:
            twin = copy.deepcopy(model)
            other = ActivationController.of(twin)
            assert other is not controller and other.cap_strength == 0
            assert torch.equal(logits(twin), plain), "the copy is not capped"
            assert recording.states == {}, "and not recorded"
        with other.capping(floor):
            assert torch.equal(logits(model), plain) and not torch.equal(logits(twin), plain)

    def test_the_copys_hooks_can_be_removed(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        twin = copy.deepcopy(model)
        ActivationController.of(twin).remove()
        gc.collect()
        assert all(not layer._forward_hooks for layer in find_decoder_layers(twin))
        assert ActivationController.of(model) is controller, "the original keeps its own"


class TestCounting:
    def test_the_fraction_is_what_a_hand_count_gives(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]])
        for kept in (torch.ones_like(mask), mask):
            controller.count_tokens(kept)
            with controller.capping(floor, count=True) as counter, controller.recording(floor.layers) as recording:
                logits(model)
            controller.count_tokens(None)
            fired = sum(
                int(((project(recording.last(layer), floor.directions[i]) < floor.tau[i]) & kept.bool()).sum())
                for i, layer in enumerate(floor.layers)
            )
            assert counter.fired == fired > 0
            assert counter.seen == 2 * int(kept.sum())
            assert counter.fraction == fired / counter.seen < 1

    def test_without_counting_nothing_is_counted_and_generation_counts_every_step(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        floor = halfway_floor(model)
        with controller.capping(floor) as counter:
            logits(model)
        assert counter.seen == 0 and counter.fraction == 0
        with controller.capping(floor, count=True) as counter:
            model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert counter.seen == 2 * 2 * (8 + 3)

    def test_a_mask_of_another_shape_is_an_error_not_a_wrong_number(self) -> None:
        model = build_model("llama")
        controller = ActivationController.of(model)
        controller.count_tokens(torch.ones(1, 3))
        with (
            pytest.raises(ValueError, match=r"counting mask is \(1, 3\), the forward \(2, 8\)"),
            controller.capping(halfway_floor(model), count=True),
        ):
            logits(model)


def test_a_layer_on_its_own_still_deep_copies() -> None:
    """Trainers copy single layers too; the copied layer's hook must not reach the original's controller."""
    model = build_model("llama")
    controller = ActivationController.of(model)
    layer: nn.Module = copy.deepcopy(find_decoder_layers(model)[1])
    (hook,) = layer._forward_hooks.values()
    assert hook.controller is not controller  # type: ignore[attr-defined]
