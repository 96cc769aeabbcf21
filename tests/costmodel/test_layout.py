"""Layouts: published parameter counts, and cuts that always fall between rows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.families import preset_names
from costmodel.model.encoded_model import without_encodings
from costmodel.model.layout import CUT_ROWS, SMALL_CHUNK_BYTES, model_layers
from costmodel.model.loading import load_model_spec
from tests.costmodel.machines import DECODER_BYTES, HEAD_BYTES, make_mixture, make_model

# As the model cards on the Hugging Face hub state them; OPT-66B and 175B as the paper does.
PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65.7e9,
    "opt-175b": 174.6e9,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mistral-large-123b": 122_610_069_504,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57.4e9,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "granite-3.1-2b": 2_533_539_840,
    "granite-3.1-8b": 8_170_864_640,
    "gemma-2b": 2.506e9,
    "gemma-7b": 8.538e9,
    "phi-1.5": 1.418e9,
    "phi-2": 2.78e9,
    "phi-3-mini-4k": 3.821e9,
    "phi-3-medium-4k": 13.96e9,
    "phi-4": 14.66e9,
    "pythia-1b": 1.0118e9,
    "pythia-2.8b": 2.775e9,
    "pythia-6.9b": 6.857e9,
    "pythia-12b": 11.846e9,
    "gpt-neox-20b": 20.555e9,
    "gpt-j-6b": 6.051e9,
    "falcon-7b": 6.922e9,
    "falcon-40b": 41.303e9,
    "stablelm-3b-4e1t": 2.795e9,
    "stablelm-2-1.6b": 1.645e9,
    "starcoder2-3b": 3.03e9,
    "starcoder2-7b": 7.174e9,
    "command-r-35b": 34.981e9,
    "aya-23-8b": 8.028e9,
    "glm-4-9b": 9.4e9,
    "glm-4-9b-0414": 9.4e9,
    "glm-4.5-air": 106.85e9,
    "glm-4.6": 352.8e9,
    "minimax-m2": 228.69e9,
    "smollm3-3b": 3.075e9,
    "seed-oss-36b": 36.151e9,
    "ernie-4.5-0.3b": 0.3607e9,
    "olmo-1b": 1.1768e9,
    "olmo-7b": 6.888e9,
    "minitron-4b": 4.19e9,
    "smollm2-135m": 0.13452e9,
    "smollm2-360m": 0.36182e9,
    "smollm2-1.7b": 1.7114e9,
    "tinyllama-1.1b": 1.1e9,
    "yi-6b": 6.061e9,
    "yi-1.5-9b": 8.829e9,
    "yi-34b": 34.389e9,
    "codellama-7b": 6.739e9,
    "codellama-34b": 33.744e9,
    "deepseek-llm-7b": 6.91e9,
    "deepseek-coder-33b": 33.343e9,
    "solar-10.7b": 10.732e9,
    "qwen1.5-7b": 7.721e9,
    "qwen1.5-32b": 32.512e9,
    "qwen1.5-110b": 111.21e9,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3.884e9,
    "gemma-3-12b": 11.771e9,
    "gemma-3-27b": 27.016e9,
    "command-r7b": 8_028_033_024,
    "command-a-111b": 111_057_580_032,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
    "exaone-4.0-1.2b": 1.28e9,
    "exaone-4.0-32b": 32.0e9,
    "exaone-3.5-2.4b": 2_405_327_360,
    "exaone-3.5-7.8b": 7_818_448_896,
    "ministral-8b": 8_019_808_256,
    "mistral-small-3.1-24b": 23_572_403_200,
    "qwen2.5-vl-3b": 3_085_938_688,
    "qwen2.5-vl-7b": 7_615_616_512,
    "qwen2.5-vl-32b": 32_763_876_352,
    "qwen2.5-vl-72b": 72_706_203_648,
    "qwen3-vl-2b": 1_720_574_976,
    "qwen3-vl-4b": 4_022_468_096,
    "qwen3-vl-8b": 8_190_735_360,
    "qwen3-vl-32b": 32_762_123_264,
    "internlm3-8b": 8_804_241_408,
    "afm-4.5b": 4.62e9,
    "hunyuan-7b": 7.505e9,
    "nanochat-d32": 1.879e9,
    "ministral-3-3b": 3.43e9,
    "ministral-3-8b": 8.49e9,
    "ministral-3-14b": 13.51e9,
    "deepseek-v2-lite": 15.706e9,
    "deepseek-v2": 235.741e9,
    # Without the layer of multi-token prediction.
    "deepseek-v3": 671.026e9,
    "deepseek-r1": 671.026e9,
    "kimi-k2": 1.0264e12,
    "bloom-560m": 559_214_592,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "biogpt": 346_763_264,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "cerebras-gpt-13b": 12.853e9,
    "starcoder-15.5b": 15_517_456_384,
    "starcoderbase-1b": 1.137e9,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "codegen-350m": 0.357e9,
    "codegen-2b": 2.78e9,
    "mpt-7b": 6_649_286_656,
    "mpt-30b": 29.95e9,
    "falcon-rw-1b": 1.312e9,
    "persimmon-8b": 9.4e9,
    "command-r-plus-104b": 103_810_674_688,
    "stablelm-2-12b": 12_143_605_760,
    "gpt-oss-20b": 20.914e9,
    "gpt-oss-120b": 116.829e9,
    "granite-3.0-1b-a400m": 1.3346e9,
    "granite-3.0-3b-a800m": 3.2987e9,
    "phi-3.5-moe-4k": 41.87e9,
    "ernie-4.5-21b-a3b": 21.83e9,
    "dots.llm1": 142.77e9,
    "hunyuan-a13b": 80.39e9,
    # Without the encoder of images.
    "llama-4-scout": 107.77e9,
    "llama-4-maverick": 400.71e9,
    "dbrx": 131.597e9,
}


def test_every_preset_has_a_published_count() -> None:
    assert set(preset_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    spec = without_encodings(load_model_spec(name))
    layers = model_layers(spec)
    counted = sum(
        component.num_units * math.prod(tensor.shape)
        for layer in layers
        for component in layer.components
        for tensor in component.tensors
    )
    assert counted == pytest.approx(PUBLISHED[name], rel=2e-3)
    padded = sum(layer.num_bytes for layer in layers) / spec.dtype_bytes
    assert padded == pytest.approx(PUBLISHED[name], rel=1e-2)


# Presets that ship quantized. The bytes of gpt-oss are those of its model card (arXiv 2508.10925,
# table 1). Of FP8, the shape of the embedding and the head, which stay in bfloat16, is enough.
GIB = 2**30
SHIPPED = {"gpt-oss-20b": 12.8 * GIB, "gpt-oss-120b": 60.8 * GIB}
FP8 = {"deepseek-v3": (129280, 7168), "deepseek-r1": (129280, 7168), "kimi-k2": (163840, 7168)}
FP8["minimax-m2"] = 200064, 3072


@pytest.mark.parametrize("name", [*SHIPPED, *FP8])
def test_presets_have_the_bytes_of_what_ships(name: str) -> None:
    if name in FP8:
        # Without routers and norms, which are a thousandth.
        plain = 2 * math.prod(FP8[name])
        expected = 2 * plain + (PUBLISHED[name] - plain) * (1 + 4 / 128**2)
    else:
        expected = SHIPPED[name]
    found = sum(layer.num_bytes for layer in model_layers(load_model_spec(name)))
    assert found == pytest.approx(expected, rel=1e-2)


def test_bytes_by_hand() -> None:
    layers = model_layers(make_model())
    assert [layer.kind for layer in layers] == ["embed"] + ["decoder"] * 8 + ["head"]
    assert layers[0].num_bytes == 0  # tied: the head's rows serve
    assert {layer.num_bytes for layer in layers[1:-1]} == {DECODER_BYTES}
    assert layers[-1].num_bytes == HEAD_BYTES


@pytest.mark.parametrize("vocab_size", [1000, 5003, 60_000])
def test_head_chunks_cover_the_vocabulary_once(vocab_size: int) -> None:
    layers = model_layers(make_model(vocab_size=vocab_size))
    chunks = [c for layer in layers if layer.kind == "head" for c in layer.components]
    row = 0
    for chunk in chunks:
        assert chunk.first_row == row
        row += chunk.tensors[-1].shape[0]
    assert row == vocab_size
    # Chunks exist so that the head's staging buffer is no larger than a layer's, give or take.
    assert max(chunk.num_bytes for chunk in chunks) <= 1.5 * DECODER_BYTES


def test_small_chunks_of_the_head_are_equal_but_the_last() -> None:
    spec = load_model_spec("qwen3-30b-a3b")
    usual, small = (model_layers(spec, has_small_chunks=small) for small in (False, True))
    assert usual[: len(small) - 19] == small[: len(small) - 19]
    heads = [layer for layer in small if layer.kind == "head"]
    assert len(heads) == 19 and usual[-1].kind == "head" != usual[-2].kind
    sizes = [layer.num_bytes for layer in heads]
    assert 0.9 * SMALL_CHUNK_BYTES < min(sizes) <= max(sizes) < 1.1 * SMALL_CHUNK_BYTES
    rows = [layer.components[0].tensors[-1].shape[0] for layer in heads]
    assert sum(rows) == spec.vocab_size and len(set(rows[:-1])) == 1


@given(
    share=st.floats(-0.1, 1.1),
    name=st.sampled_from(["opt-125m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b"]),
    which=st.sampled_from([0, 1, -1]),
)
def test_cut_falls_between_the_nearest_rows(share: float, name: str, which: int) -> None:
    for component in model_layers(load_model_spec(name))[which].components:
        cut = component.cut_near(share * component.num_bytes)
        boundaries = {component.num_bytes, 0}
        for tensor in component.tensors:
            rows = range(0, tensor.num_rows, CUT_ROWS)
            boundaries |= {tensor.offset_bytes + row * tensor.row_bytes for row in rows}
        assert cut in boundaries
        wanted = min(max(share, 0), 1) * component.num_bytes
        nearest = min(abs(wanted - boundary) for boundary in boundaries)
        # The gap behind a tensor counts as part of its last row.
        assert abs(cut - wanted) <= nearest + 64


def test_experts_by_hand() -> None:
    """Four layers, of which the first is dense: a mixture is visited as attention and experts."""
    model = make_mixture(mlp_only_layers=[0], intermediate_size=512)
    layers = model_layers(model)
    kinds = ["embed", "decoder", *["attention", "experts"] * 3, "head"]
    assert [layer.kind for layer in layers] == kinds
    assert [[c.name for c in layer.components] for layer in layers[1:4]] == [
        ["attention", "mlp"],
        ["attention"],
        ["router", "experts"],
    ]
    router, experts = layers[3].components
    # A norm and a row for each expert; gate, up and down of each.
    assert (router.num_units, router.num_bytes) == (1, 2 * (256 + 8 * 256))
    assert (experts.num_units, experts.unit_bytes) == (8, 2 * 3 * 128 * 256)
    assert experts.num_bytes == 8 * experts.unit_bytes
    assert experts.num_matrix_elements == 8 * 3 * 128 * 256


def test_equal_layers_share_one_object() -> None:
    """What is derived of a layout is derived once for all layers that are equal."""
    layers = model_layers(make_mixture(mlp_only_layers=[1]))
    assert layers[3].kind == "decoder"
    # Layers 0, 2 and 3 are mixtures.
    assert len({id(layers[i]) for i in (1, 4, 6)}) == len({id(layers[i]) for i in (2, 5, 7)}) == 1
    assert len({id(layer) for layer in model_layers(make_model())}) == 3


@given(
    share=st.floats(-0.1, 1.1), bits=st.sampled_from([None, 4]), num_experts=st.sampled_from([8, 1])
)
def test_experts_are_cut_between_the_nearest_units(
    share: float, bits: int | None, num_experts: int
) -> None:
    model = make_mixture(num_experts=num_experts, num_experts_per_tok=1)
    (experts,) = (
        component
        for component in model_layers(model, bits, 32)[2].components
        if component.name == "experts"
    )
    units, rest = divmod(experts.cut_near(share * experts.num_bytes), experts.unit_bytes)
    assert rest == 0 and 0 <= units <= num_experts
    assert abs(units - num_experts * min(max(share, 0), 1)) <= 0.5
