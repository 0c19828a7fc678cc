"""A new run begins from an export, from the reference's weights, or from layers of a Llama-style model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.model import ModelConfig
from pipeline.pretrained import InitFromConfig, check_init_from, load_pretrained
from tests.pipeline.small_models import small_batch, small_config, small_model

GOLDEN = Path(__file__).parents[1] / "golden" / "raven_tiny"


def run_config(model: ModelConfig, **init_from: Any) -> RunConfig:
    """The two sections of a configuration that matter here."""
    data = SimpleNamespace(tokenizer="unused: these weights come without a tokenizer")
    return cast(RunConfig, SimpleNamespace(model=model, data=data, init_from=InitFromConfig(**init_from)))


# The reference ------------------------------------------------------------------------------------------------------


@pytest.fixture
def raven(tmp_path: Path) -> Path:
    """The golden weights in the layout of Hugging Face, cut into two files in bf16 as large models are."""
    directory = tmp_path / "raven"
    directory.mkdir()
    record = {**json.loads((GOLDEN / "config.json").read_text()), "model_type": "huginn_raven"}
    (directory / "config.json").write_text(json.dumps(record))
    weights = {name: value.bfloat16() for name, value in load_file(GOLDEN / "weights.safetensors").items()}
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[:30], "model-00002-of-00002.safetensors": names[30:]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def golden_config(**changes: Any) -> ModelConfig:
    record = json.loads((GOLDEN / "config.json").read_text())
    shape = {key: record[key] for key in ModelConfig.__dataclass_fields__ if key in record}
    return ModelConfig(**{**shape, **changes})


def test_weights_of_the_reference_are_taken_whole(raven: Path) -> None:
    config = run_config(golden_config(), path=str(raven))
    check_init_from(config)
    model = small_model(**vars(config.model))
    assert load_pretrained(config, model) == []
    expected = load_file(GOLDEN / "weights.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].bfloat16().float()), name


def test_new_tokens_keep_their_initial_rows_and_a_longer_block_is_no_matter(raven: Path) -> None:
    config = run_config(golden_config(vocab_size=260, block_size=128), path=str(raven), kind="export")
    check_init_from(config)
    model = small_model(**vars(config.model))
    initial = model.transformer.wte.weight.detach().clone()
    load_pretrained(config, model)
    expected = load_file(GOLDEN / "weights.safetensors")["transformer.wte.weight"].bfloat16().float()
    assert torch.equal(model.transformer.wte.weight[:256], expected)
    assert torch.equal(model.transformer.wte.weight[256:], initial[256:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 255}, r"model\.vocab_size: 255 is smaller than the 256"),
        ({"n_heads": 2}, r"model\.n_heads: 2, but .* has 4; set model\.n_heads=4"),
        ({"rope_base": 1e4}, r"model\.rope_base"),
        ({"norm_eps": 1e-5}, r"model\.norm_eps"),
        ({"tie_embeddings": False}, r"model\.tie_embeddings"),
        ({"scale_embedding": False}, r"model\.scale_embedding"),
        ({"intermediate_size": 80}, r"mlp\.fc\.weight of .* has the shape \[176, 32\], the model \[160, 32\]"),
        ({"n_layers_in_coda": 1}, r"has transformer\.coda\.1.*, which the model has not"),
        ({"n_layers_in_coda": 3}, r"has no transformer\.coda\.2"),
        ({"injection": "add"}, r"has transformer\.adapter\.weight, which the model has not"),
        ({"injection": "diagonal"}, r"has no transformer\.prelude_norm\.weight"),
        ({"block": "pre_norm"}, r"norm_3\.weight, which the model has not"),
    ],
)
def test_weights_of_another_shape_are_refused(raven: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_init_from(run_config(golden_config(**changes), path=str(raven)))


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def cut_weights(directory: Path) -> None:
    path = directory / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def break_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("[]")


def remove_all(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize("damage", [remove_config, cut_weights, break_index, remove_all])
def test_a_broken_checkpoint_is_refused_with_its_path(raven: Path, damage: Callable[[Path], None]) -> None:
    damage(raven)
    with pytest.raises(ConfigError, match=r"init_from\.path: .*raven"):
        check_init_from(run_config(golden_config(), path=str(raven)))


def test_an_unknown_type_is_refused(raven: Path) -> None:
    (raven / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"init_from\.kind: .*gpt2"):
        check_init_from(run_config(golden_config(), path=str(raven)))


# Llama --------------------------------------------------------------------------------------------------------------

WIDTH, HEADS, INNER, VOCABULARY, LAYERS = 16, 4, 24, 32, 5
LLAMA = {"model_type": "llama", "num_attention_heads": HEADS, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5}


def write_llama(
    directory: Path, *, key_heads: int = HEADS, tied: bool = True, **record: Any
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int = WIDTH) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul(columns**-0.5)

    weights = {"model.embed_tokens.weight": matrix(VOCABULARY), "model.norm.weight": torch.ones(WIDTH)}
    if not tied:
        weights["lm_head.weight"] = matrix(VOCABULARY)
    for layer in range(LAYERS):
        prefix, kept = f"model.layers.{layer}.", key_heads * WIDTH // HEADS
        for name, value in (
            ("input_layernorm", torch.rand(WIDTH, generator=generator) + 0.5),
            ("post_attention_layernorm", torch.rand(WIDTH, generator=generator) + 0.5),
            ("self_attn.q_proj", matrix(WIDTH)),
            ("self_attn.k_proj", matrix(kept)),
            ("self_attn.v_proj", matrix(kept)),
            ("self_attn.o_proj", matrix(WIDTH)),
            ("mlp.gate_proj", matrix(INNER)),
            ("mlp.up_proj", matrix(INNER)),
            ("mlp.down_proj", matrix(WIDTH, INNER)),
        ):
            weights[f"{prefix}{name}.weight"] = value
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "model.safetensors")
    fields = {**LLAMA, "num_key_value_heads": key_heads, "tie_word_embeddings": tied, **record}
    (directory / "config.json").write_text(json.dumps(fields))
    return weights


def llama_logits(weights: dict[str, torch.Tensor], layers: list[int], ids: torch.Tensor) -> torch.Tensor:
    """The architecture by its definition, with the layers named: rotary halves, grouped keys, pre-norm."""
    length, width = ids.shape[1], WIDTH // HEADS

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (WIDTH,), weights[f"{name}.weight"], 1e-5)

    angles = torch.outer(torch.arange(length), 10_000.0 ** -(torch.arange(0, width, 2) / width)).repeat(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    x = weights["model.embed_tokens.weight"][ids]
    for layer in layers:
        prefix = f"model.layers.{layer}."
        normed = norm(x, f"{prefix}input_layernorm")
        query, key, value = (
            (normed @ weights[f"{prefix}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, width)).transpose(1, 2)
            for name in "qkv"
        )
        attended = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True, enable_gqa=True)
        x = x + attended.transpose(1, 2).flatten(2) @ weights[f"{prefix}self_attn.o_proj.weight"].T
        normed = norm(x, f"{prefix}post_attention_layernorm")
        gated = F.silu(normed @ weights[f"{prefix}mlp.gate_proj.weight"].T)
        inner = gated * (normed @ weights[f"{prefix}mlp.up_proj.weight"].T)
        x = x + inner @ weights[f"{prefix}mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def llama_config(**changes: Any) -> ModelConfig:
    """s + e from the state 0 in pre-norm blocks: at one iteration the layers in a row."""
    shape: dict[str, Any] = {
        "n_heads": HEADS,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 0,
        "norm_eps": 1e-5,
        "rope_base": 10_000.0,
        "block": "pre_norm",
        "injection": "add",
        "state_init": "zero",
        "scale_embedding": False,
    }
    return small_config(**{**shape, **changes})


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_of_a_llama_are_itself_at_one_iteration(tmp_path: Path, key_heads: int, tied: bool) -> None:
    weights = write_llama(tmp_path, key_heads=key_heads, tied=tied)
    model_config = llama_config(tie_embeddings=tied)
    config = run_config(model_config, path=str(tmp_path), prelude=[0], core=[2, 4])
    check_init_from(config)
    model, ids = small_model(**vars(model_config)), small_batch(2)
    fresh = load_pretrained(config, model)
    assert {name.split(".")[-1] for name in fresh} == {"qk_bias"}
    logits = model(ids, model.initial_state(torch.arange(2), 12), (0, 1))
    torch.testing.assert_close(logits, llama_logits(weights, [0, 2, 4], ids), rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_begins_as_the_tied_one(tmp_path: Path) -> None:
    weights = write_llama(tmp_path)
    config = run_config(llama_config(tie_embeddings=False), path=str(tmp_path), prelude=[0], core=[2, 4])
    model = small_model(**vars(config.model))
    load_pretrained(config, model)
    assert torch.equal(model.state_dict()["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_sandwich_takes_the_norms_before_its_layers(tmp_path: Path) -> None:
    weights = write_llama(tmp_path)
    model_config = llama_config(block="sandwich", injection="concat", n_layers_in_coda=1)
    config = run_config(model_config, path=str(tmp_path), prelude=[0], core=[1, 2], coda=[4])
    check_init_from(config)
    model = small_model(**vars(model_config))
    fresh = load_pretrained(config, model)
    assert {name.removeprefix("transformer.").split(".", 2)[-1] for name in fresh} == {
        "weight",  # of the adapter
        "attn.qk_bias",
        "norm_2.weight",
        "norm_4.weight",
    }
    block = model.state_dict()
    assert torch.equal(block["transformer.coda.0.norm_1.weight"], weights["model.layers.4.input_layernorm.weight"])
    expected = weights["model.layers.4.post_attention_layernorm.weight"]
    assert torch.equal(block["transformer.coda.0.norm_3.weight"], expected)


@pytest.mark.parametrize(
    ("model", "llama", "init_from", "message"),
    [
        ({"n_heads": 2}, {}, {}, r"model\.n_heads: 2, but .* has 4"),
        ({"rope_base": 5e4}, {}, {}, r"model\.rope_base: 50000.0, but .* has 10000.0; set model\.rope_base=10000.0"),
        ({"norm_eps": 1e-6}, {}, {}, r"model\.norm_eps"),
        ({"scale_embedding": True}, {}, {}, r"model\.scale_embedding"),
        ({"block": "parameter_free_sandwich"}, {}, {}, r"model\.block: parameter_free_sandwich"),
        ({"intermediate_size": 20}, {}, {}, r"gate_proj\.weight of .* has the shape \[24, 16\], the model \[20, 16\]"),
        ({"vocab_size": 31}, {}, {}, r"model\.vocab_size: 31"),
        ({}, {"tied": False}, {}, r"model\.tie_embeddings: .* set model\.tie_embeddings=false"),
        ({}, {"rope_scaling": {"rope_type": "llama3"}}, {}, r"scales its rotary embedding"),
        ({}, {"hidden_act": "gelu"}, {}, r"'gelu', not silu"),
        ({}, {}, {"core": [1]}, r"init_from\.core: \[1\] names 1 layers, but model\.n_layers_in_recurrent_block = 2"),
        ({}, {}, {"prelude": []}, r"init_from\.prelude: \[\] names 0 layers"),
        ({}, {}, {"core": [1, 9]}, r"has no model\.layers\.9\."),
    ],
)
def test_a_llama_that_does_not_fit_is_refused(
    tmp_path: Path, model: dict[str, Any], llama: dict[str, Any], init_from: dict[str, Any], message: str
) -> None:
    write_llama(tmp_path, **llama)
    with pytest.raises(ConfigError, match=message):
        check_init_from(
            run_config(llama_config(**model), **{"path": str(tmp_path), "prelude": [0], "core": [1, 2], **init_from})
        )


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    weights = write_llama(tmp_path)
    save_file({**weights, "model.layers.2.self_attn.q_proj.bias": torch.ones(WIDTH)}, tmp_path / "model.safetensors")
    config = run_config(llama_config(), path=str(tmp_path), prelude=[0], core=[1, 2])
    with pytest.raises(ConfigError, match=r"has model\.layers\.2\.self_attn\.q_proj\.bias, for which"):
        check_init_from(config)
    check_init_from(run_config(llama_config(), path=str(tmp_path), prelude=[0], core=[1, 3]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gguf"}, r"init_from\.kind: 'gguf'"),
        ({"kind": "llama"}, r"init_from\.kind: llama without init_from\.path"),
        ({"prelude": [0]}, r"init_from\.prelude: .* name it in init_from"),
        ({"path": "x", "kind": "export", "core": [1]}, r"init_from\.core"),
        ({"path": "x", "coda": [-1]}, r"init_from\.coda: .* negative"),
    ],
)
def test_meaningless_choices_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InitFromConfig(**fields)


def test_without_a_path_nothing_is_looked_at() -> None:
    config, model = run_config(small_config()), small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_init_from(config)
    assert load_pretrained(config, model) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
