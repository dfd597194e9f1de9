"""The engine beside the model that it is made of: same results, less work."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from manipi.errors import ConfigError, UnknownNameError
from manipi.model import VLA, ModelInput
from manipi.model.config import Adapters, Compat, GemmaSize, LoRA, Pi0FastConfig
from manipi.model.inference.engine import Engine, compile_layers
from manipi.model.inference.fused import Float8, Int8Rows, Int8Weights, PackedInt8, compute_dtype

B, C, L, H, A = 3, 2, 7, 5, 6
NATIVE = compute_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
EXACT = {"atol": 1e-5, "rtol": 1e-5}
MASKS = {
    "all valid": ([[1, 1], [1, 1], [1, 1]], [7, 7, 7]),
    "one camera for all": ([[0, 1], [0, 1], [0, 1]], [4, 4, 4]),
    "ragged": ([[1, 1], [0, 1], [1, 0]], [7, 5, 2]),
    "no camera": ([[0, 0], [0, 0], [0, 0]], [3, 1, 7]),
}


def masked(batch: ModelInput, name: str) -> ModelInput:
    cameras, lengths = MASKS[name]
    token_valid = torch.arange(L) < torch.tensor(lengths)[:, None]
    return replace(batch, image_valid=torch.tensor(cameras).bool(), token_valid=token_valid, token_causal=None)


def row(batch: ModelInput, index: int) -> ModelInput:
    """A batch of one."""
    return batch.split(B)[index]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, H, A, generator=torch.Generator().manual_seed(4))


def oracle(model: VLA, batch: ModelInput, draws: torch.Tensor, num_steps: int = 4) -> torch.Tensor:
    """The whole padded batch."""
    model.trim = False
    return model.sample(batch, draws, num_steps)


def model_of(config, build) -> VLA:
    """Actions of the size that they have in use: of order one."""
    model = build(config)
    for name, parameter in model.named_parameters():
        if "action_out" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_it_repeats_the_models_actions(configs, build, batch, name, masks):
    model, inputs = model_of(configs[name], build), masked(batch, masks)
    expected = oracle(model, inputs, noise(B))
    engine = Engine(model, num_steps=4)
    torch.testing.assert_close(engine.sample(inputs, noise(B)), expected, **EXACT)
    for index in range(B):
        alone = engine.sample(row(inputs, index), noise(B)[index : index + 1])
        torch.testing.assert_close(alone, expected[index : index + 1], **EXACT)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_in_bfloat16_it_points_the_same_way(configs, build, batch, name):
    model, inputs = model_of(replace(configs[name], dtype="bfloat16"), build).bfloat16(), masked(batch, "ragged")
    expected = oracle(model, inputs, noise(B)).flatten()
    found = Engine(model, num_steps=4).sample(inputs, noise(B)).flatten()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


@pytest.mark.skipif(NATIVE, reason="this processor computes in bfloat16")
@pytest.mark.parametrize("name", ["pi0", "pi05", "pi0_fast"])
def test_where_bfloat16_is_emulated_it_computes_in_float32(configs, build, batch, name):
    """From weights that stay in bfloat16."""
    inputs, config = masked(batch, "ragged"), configs[name]
    exact = model_of(config, build).bfloat16()  # computes in float32
    model = build(replace(config, dtype="bfloat16")).bfloat16()
    model.load_state_dict(exact.state_dict())
    engine = Engine(model, num_steps=4)
    assert {b.dtype for b in engine.gemma.blocks.buffers()} == {torch.bfloat16}
    if name == "pi0_fast":
        assert torch.equal(engine.decode_tokens(inputs, 14, rule), exact.decode_tokens(inputs, 14, rule))
    else:
        torch.testing.assert_close(engine.sample(inputs, noise(B)), oracle(exact, inputs, noise(B)), **EXACT)


@pytest.mark.parametrize("masks", ["all valid", "ragged"])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_it_goes_on_from_a_previous_chunk(configs, build, batch, name, masks):
    model, inputs = model_of(configs[name], build), masked(batch, masks)
    left = torch.arange(H) < torch.tensor([H, 4, 2])[:, None]
    inputs = replace(inputs, actions=noise(B) / 2, action_valid=left, delay=torch.tensor([1, 3, 2]))
    expected = oracle(model, inputs, noise(B))
    assert not torch.allclose(expected, oracle(model, replace(inputs, delay=None), noise(B)), atol=1e-2)
    torch.testing.assert_close(Engine(model, num_steps=4).sample(inputs, noise(B)), expected, **EXACT)
    with pytest.raises(ConfigError, match="no gradient passes"):
        Engine(model, num_steps=4, quantization="int8").sample(inputs, noise(B))


@pytest.mark.parametrize("draws", [(), (2,)])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_trained_prefix_is_given_as_the_model_has_it(configs, build, batch, name, draws):
    """Delays differ by row; longer ones than were trained are met by guidance."""
    model, inputs = model_of(configs[name], build), masked(batch, "ragged")
    for norm in (n for n, _ in model.named_modules() if name == "pi05" and n.endswith("modulation") and "action" in n):
        torch.nn.init.normal_(model.get_submodule(norm).weight, std=0.05)
    left = torch.arange(H) < torch.tensor([H, 4, 1])[:, None]
    inputs = replace(inputs, actions=noise(B) / 2, action_valid=left, delay=torch.tensor([1, 3, 2]))
    x = noise(B, *draws)
    model.trim = False
    by_prefix, by_guidance = (model.sample(inputs, x, 4, max_delay) for max_delay in (3, 2))
    assert not torch.allclose(by_prefix, by_guidance, atol=1e-2)
    engine = Engine(model, num_steps=4)
    torch.testing.assert_close(engine.sample(inputs, x, 4, 3), by_prefix, **EXACT)
    torch.testing.assert_close(engine.sample(inputs, x, 4, 2), by_guidance, **EXACT)
    assert torch.equal(engine.sample(inputs, x, 4, 3)[1, ..., :3, :], inputs.actions[1, :3].expand(*draws, 3, A))


@pytest.mark.parametrize("masks", ["all valid", "ragged"])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_many_noises_share_one_prefix(configs, build, batch, name, masks):
    model, inputs = model_of(configs[name], build), masked(batch, masks)
    expected = oracle(model, inputs, noise(B, 3))
    engine, calls = Engine(model, num_steps=4), []
    engine.gemma.blocks[0].register_forward_hook(
        lambda _, inputs, __: calls.extend(len(x) for name, x in inputs[0].items() if name == "vlm")
    )
    torch.testing.assert_close(engine.sample(inputs, noise(B, 3)), expected, **EXACT)
    assert calls == [B]


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_padded_dimensions_and_several_key_heads(configs, build, batch, name):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "depth": 2}
    config = replace(
        configs[name],
        vlm=GemmaSize(width=32, mlp_dim=48, **sizes),
        action_expert=GemmaSize(width=24, mlp_dim=40, **sizes),
    )
    model, inputs = model_of(config, build), replace(masked(batch, "ragged"), action_dim_valid=torch.arange(A) < 4)
    expected = oracle(model, inputs, noise(B))
    torch.testing.assert_close(Engine(model, num_steps=4).sample(inputs, noise(B)), expected, **EXACT)


def test_adapters_are_merged(configs, build, batch):
    lora = LoRA(rank=2, alpha=4.0)
    config = replace(configs["pi05"], vlm_adapters=Adapters(attention=lora, feed_forward=lora))
    model, inputs = model_of(config, build), masked(batch, "ragged")
    expected = oracle(model, inputs, noise(B))
    torch.testing.assert_close(Engine(model, num_steps=4).sample(inputs, noise(B)), expected, **EXACT)


def test_the_weights_are_in_memory_once(configs, build):
    model = build(configs["pi0"])
    engine = Engine(model)
    fused = engine.gemma.blocks[0].experts["vlm"].fused
    stores = {p.untyped_storage().data_ptr() for p in fused.buffers()}
    block = model.gemma.blocks[0].experts["vlm"]
    assert {one.weight.untyped_storage().data_ptr() for one in (block.q_proj, block.k_proj, block.v_proj)} == stores


def test_other_steps_than_its_tables_have(configs, build, batch):
    with pytest.raises(ConfigError, match="4 steps"):
        Engine(build(configs["pi05"]), num_steps=4).sample(batch, noise(B), num_steps=5)


@pytest.mark.slow
def test_traced_layers_repeat_the_models_actions_at_any_length(configs, build, batch):
    """By torch's tracer, without its compiler."""
    model = model_of(configs["pi05"], build)
    inputs = [masked(batch, name) for name in ("all valid", "one camera for all")]
    expected = [oracle(model, one, noise(B), num_steps=1) for one in inputs]
    engine = Engine(model, num_steps=1)
    engine.compile(backend="eager")
    for one, answer in zip(inputs, expected, strict=True):
        torch.testing.assert_close(engine.sample(one, noise(B)), answer, **EXACT)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_cuda_graphs_repeat_the_models_actions(configs, build, batch, name):
    model = model_of(configs[name], build)
    cases = [(row(masked(batch, masks), 0), noise(1) + shift) for masks in ("all valid", "ragged") for shift in (0, 1)]
    expected = [oracle(model, inputs, draws) for inputs, draws in cases]
    engine = Engine(model.cuda(), num_steps=4)
    engine.compile()
    for (inputs, draws), answer in zip(cases, expected, strict=True):
        found = engine.sample(inputs.to("cuda"), draws.cuda()).cpu()
        torch.testing.assert_close(found, answer, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_graphs_on_another_gpu_than_the_first(configs, build, batch):
    model, inputs = model_of(configs["pi05"], build), row(masked(batch, "all valid"), 0)
    expected = oracle(model, inputs, noise(1))
    engine = Engine(model.to("cuda:1"), num_steps=4)
    engine.compile()
    with ThreadPoolExecutor(1) as thread:  # in which torch starts on the first one, as a server's does
        found = thread.submit(engine.sample, inputs.to("cuda:1"), noise(1).to("cuda:1")).result().cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("thread", ["the same", "another"])
def test_a_layer_has_more_variants_than_torch_makes_by_default(thread):
    """Also in the thread of a server, which has torch's settings of its own."""

    class Layer(torch.nn.Module):
        def forward(self, x):
            return x.relu() + 1

    torch._dynamo.reset()
    layer, compiled = Layer(), CompileCounter()
    compile_layers([layer], torch.device("cpu"), backend=compiled, dynamic=False)
    sizes = range(2, 26)

    def call() -> None:
        for size in sizes:
            layer(torch.ones(size))

    if thread == "another":
        with ThreadPoolExecutor(1) as other:
            other.submit(call).result()
    else:
        call()
    assert compiled.frame_count == len(sizes)


# π0-FAST


def rule(ids) -> np.ndarray:
    """Two forced tokens, seven free ones of a few, two forced ones, EOS."""
    free = np.array([7, 19, 23, 31, 40, 52])
    forced = {0: 11, 1: 12, 9: 13, 10: 14}
    return np.array([forced[len(ids)]]) if len(ids) in forced else free if len(ids) < 9 else np.array([1])


@pytest.mark.parametrize("masks", MASKS)
def test_it_repeats_the_models_tokens(configs, build, batch, masks):
    model, inputs = build(configs["pi0_fast"]), masked(batch, masks)
    model.trim = False
    expected = model.decode_tokens(inputs, 14, rule)
    engine, spans = Engine(model), []
    engine.gemma.blocks[0].register_forward_hook(lambda _, inputs, __: spans.append(inputs[0]["vlm"].shape[1]))
    assert torch.equal(engine.decode_tokens(inputs, 14, rule), expected)
    assert len(set(expected[:, 2:9].flatten().tolist())) > 1
    # The forced beginning goes as one, and nothing goes of the forced end.
    assert spans[1:] == [2, 1, 1, 1, 1, 1, 1]
    for index in range(B):
        assert torch.equal(engine.decode_tokens(row(inputs, index), 14, rule), expected[index : index + 1])


def test_the_references_quirks_of_decoding_are_refused(configs, build):
    config = replace(configs["pi0_fast"], compat=Compat(fast_contiguous_cache=True))
    assert isinstance(config, Pi0FastConfig)
    with pytest.raises(ConfigError, match="fast_contiguous_cache"):
        Engine(build(config))


# Quantization


@pytest.mark.parametrize("kind", ["int8_weights", "int8"])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_int8_stays_close(configs, build, batch, name, kind):
    model, inputs = model_of(configs[name], build), masked(batch, "ragged")
    expected = oracle(model, inputs, noise(B)).flatten()
    found = Engine(model, num_steps=4, quantization=kind).sample(inputs, noise(B)).flatten()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("matrix", [Int8Weights, Int8Rows, PackedInt8, Float8])
def test_products_in_8_bits_are_off_by_roundings_alone(matrix, rows):
    torch.manual_seed(5)
    weight, bias, x = torch.randn(24, 64), torch.randn(24), torch.randn(2, rows, 64)
    exact, found = torch.nn.functional.linear(x, weight, bias), matrix(weight, bias)(x)
    assert 1e-6 < (found - exact).norm() / exact.norm() < 0.04
    without = matrix(weight, None)(x)
    torch.testing.assert_close(without + bias, found, atol=0.1, rtol=1e-2)


def test_quantizations_that_cannot_be(configs, build):
    with pytest.raises(ConfigError, match="compute capability"):
        Engine(build(configs["pi05"]), quantization="fp8")
    with pytest.raises(UnknownNameError, match="int8"):
        Engine(build(configs["pi05"]), quantization="int9")
