"""Weights that a new run begins from: an export, the reference's own, or layers cut out of a Llama-style model.

Every parameter of ours has a source: tensors of the file by name and shape, and how they are put together. So a
checkpoint is judged by its headers, before anything is written, and the same sources are read afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from data_prep.tokenizer import TOKENIZER_FILE, token_ids
from pipeline.errors import ConfigError
from pipeline.model import ModelConfig, RecurrentDepthModel, build_meta_model, reference_name

if TYPE_CHECKING:
    from pipeline.config import RunConfig

KINDS = ("auto", "export", "llama")
_EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")


@dataclass(kw_only=True)
class InitFromConfig:
    """Where a new run takes its weights from; a run that resumes has its own."""

    path: str | None = None
    """Directory with config.json and model.safetensors (or its index); null for fresh weights."""
    kind: str = "auto"
    """export (`rookery export`, or weights of RavenForCausalLM), llama, or auto: what config.json says."""
    prelude: list[int] = field(default_factory=list)
    """Of a Llama-style model: its layers, from 0, that become the prelude, in order."""
    core: list[int] = field(default_factory=list)
    """Its layers that become the core."""
    coda: list[int] = field(default_factory=list)
    """Its layers that become the coda."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.kind not in KINDS:
            raise ConfigError(f"init_from.kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.path is None and self.kind != "auto":
            raise ConfigError(f"init_from.kind: {self.kind} without init_from.path; name it, or leave both out")
        for name in ("prelude", "core", "coda"):
            layers = getattr(self, name)
            if layers and (self.path is None or self.kind == "export"):
                raise ConfigError(f"init_from.{name}: {layers} are layers of a Llama-style model; name it in init_from")
            if any(layer < 0 for layer in layers):
                raise ConfigError(f"init_from.{name}: {layers} has a negative layer")


@dataclass(frozen=True)
class _Source:
    """Tensors of the file (name -> shape), in the order in which `join` takes them."""

    shapes: Mapping[str, tuple[int, ...]]
    join: Callable[..., torch.Tensor]


def _only(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Weights:
    """The tensors of a directory in the layout of Hugging Face, by name, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}
        try:
            self.record: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            index = directory / "model.safetensors.index.json"
            names = [directory / "model.safetensors"]
            if index.is_file():
                listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                names = [directory / Path(name).name for name in sorted(listed)]
            for path in names:
                with safe_open(path, framework="pt") as file:
                    self.files.update(dict.fromkeys(file.keys(), path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ConfigError(
                f"init_from.path: {directory} has no config.json and safetensors ({error}); of a run,"
                " `rookery export` makes them"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            value: torch.Tensor = file.get_tensor(name)
        return value.float()

    def demand(self, key: str, stored: object, ours: object) -> None:
        """Refuse a model of another shape."""
        if stored != ours:
            raise ConfigError(f"{key}: {ours!r}, but {self.directory} has {stored!r}; set {key}={stored}")


def check_init_from(config: RunConfig) -> None:
    """See that the checkpoint of `init_from` is there and fits `model`, from its headers alone.

    Raises:
        ConfigError: it does not.
    """
    if config.init_from.path is not None:
        _plan(config.init_from, config.model)
        _check_tokenizer(Path(config.init_from.path), Path(config.data.tokenizer))


def _check_tokenizer(theirs: Path, ours: Path) -> None:
    """Refuse weights whose tokens have other ids than ours; a directory without a tokenizer is taken on trust."""
    if not (theirs / TOKENIZER_FILE).is_file():
        return
    old, new = token_ids(theirs), token_ids(ours)
    for token, number in old.items():
        if new.get(token) != number:
            raise ConfigError(
                f"init_from.path: the token {token!a} has id {number} in {theirs} and {new.get(token)} in"
                f" data.tokenizer = {ours}; build the data with the tokenizer of the weights"
            )


@torch.no_grad()
def load_pretrained(config: RunConfig, model: RecurrentDepthModel) -> list[str]:
    """Fill `model`, whose weights are initialised and whole, from `init_from`; return the names that were not filled.

    Rows of the embedding beyond the checkpoint's vocabulary keep their initial values.

    Raises:
        ConfigError: as `check_init_from`.
    """
    if config.init_from.path is None:
        return []
    weights, sources = _plan(config.init_from, config.model)
    parameters = {reference_name(name): parameter for name, parameter in model.named_parameters()}
    for name, source in sources.items():
        value = source.join(*map(weights.tensor, source.shapes))
        parameters[name][: len(value)].copy_(value)
    return sorted(parameters.keys() - sources.keys())


def _plan(init_from: InitFromConfig, model: ModelConfig) -> tuple[_Weights, dict[str, _Source]]:
    """Return the opened checkpoint, and the source of every parameter that is taken from it."""
    assert init_from.path is not None
    weights = _Weights(Path(init_from.path))
    kind, stored = init_from.kind, weights.record.get("model_type")
    if kind == "auto":
        kind = {"huginn_raven": "export", "llama": "llama"}.get(str(stored), "")
    if not kind:
        raise ConfigError(
            f"init_from.kind: {weights.directory} is of the type {stored!r}, which is neither an export (huginn_raven)"
            " nor llama; name the kind whose tensors it has"
        )
    sources = _reference_sources(weights, model) if kind == "export" else _llama_sources(weights, init_from, model)
    for name, source in sources.items():
        for tensor, expected in source.shapes.items():
            if tensor not in weights.files:
                raise ConfigError(
                    f"init_from.path: {weights.directory} has no {tensor}, from which {name} would be made;"
                    " make the keys of `model` those of its config.json, or name other layers"
                )
            _check_shape(weights, tensor, expected, name in _EMBEDDINGS)
    return weights, sources


def _check_shape(weights: _Weights, tensor: str, expected: tuple[int, ...], may_be_shorter: bool) -> None:
    found = weights.shape(tensor)
    if may_be_shorter and found[1:] == expected[1:]:
        if found[0] > expected[0]:
            raise ConfigError(
                f"model.vocab_size: {expected[0]} is smaller than the {found[0]} of {weights.directory};"
                f" set model.vocab_size={found[0]}"
            )
    elif found != expected:
        raise ConfigError(
            f"init_from.path: {tensor} of {weights.directory} has the shape {list(found)}, the model {list(expected)};"
            " make the keys of `model` those of its config.json"
        )


def _reference_sources(weights: _Weights, model: ModelConfig) -> dict[str, _Source]:
    """Return a copy of every parameter: the names are ours."""
    for key in ("n_heads", "rope_base", "norm_eps", "tie_embeddings"):
        weights.demand(f"model.{key}", weights.record.get(key, getattr(model, key)), getattr(model, key))
    weights.demand("model.scale_embedding", True, model.scale_embedding)
    sources = {
        name: _Source({name: tuple(value.shape)}, _only) for name, value in build_meta_model(model).state_dict().items()
    }
    # The reference keeps its rotary table, and may store a tied head again.
    surplus = weights.files.keys() - sources.keys() - {"freqs_cis", "lm_head.weight"}
    if surplus:
        raise ConfigError(
            f"init_from.path: {weights.directory} has {min(surplus)}, which the model has not;"
            " make the keys of `model` those of its config.json"
        )
    return sources


def _llama_sources(weights: _Weights, init_from: InitFromConfig, model: ModelConfig) -> dict[str, _Source]:
    """Return where the parameters come from in `LlamaForCausalLM`; injection, other norms and biases are not there."""
    key_heads = _check_llama(weights, model)
    _check_layers(init_from, model)
    embedding = {"model.embed_tokens.weight": (model.vocab_size, model.n_embd)}
    head = {"lm_head.weight": (model.vocab_size, model.n_embd)}
    sources = {
        "transformer.wte.weight": _Source(embedding, _only),
        "transformer.ln_f.weight": _Source({"model.norm.weight": (model.n_embd,)}, _only),
    }
    if not model.tie_embeddings:
        sources["lm_head.weight"] = _Source(head if "lm_head.weight" in weights.files else embedding, _only)
    for part, layers in (("prelude", init_from.prelude), ("core_block", init_from.core), ("coda", init_from.coda)):
        for position, layer in enumerate(layers):
            theirs = f"model.layers.{layer}."
            block = _llama_block(theirs, model, key_heads)
            sources.update({f"transformer.{part}.{position}.{name}.weight": source for name, source in block.items()})
            used = {tensor for source in block.values() for tensor in source.shapes}
            surplus = {name for name in weights.files if name.startswith(theirs) and "rotary" not in name} - used
            if surplus:
                raise ConfigError(
                    f"init_from.path: {weights.directory} has {min(surplus)}, for which the model has no place"
                )
    return sources


def _llama_block(prefix: str, model: ModelConfig, key_heads: int) -> dict[str, _Source]:
    """Return the sources of one block, which is a layer as it is (retrofitted recurrence, arXiv 2511.07384).

    Llama's rotary embedding pairs channel i with i + d / 2 and ours 2i with 2i + 1, so the rows of queries and keys are
    reordered; keys and values that heads share (grouped-query attention) are repeated for each of them.
    """
    width, inner, shared = model.n_embd, model.intermediate_size, key_heads * model.head_dim

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = (
            part.unflatten(0, (key_heads, -1)).repeat_interleave(model.n_heads // key_heads, 0).flatten(0, 1)
            for part in (_interleaved(key, model.head_dim), value)
        )
        return torch.cat((_interleaved(query, model.head_dim), keys, values))

    def stacked(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.cat((gate, up))

    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    projections = {
        f"{attention}q_proj.weight": (width, width),
        f"{attention}k_proj.weight": (shared, width),
        f"{attention}v_proj.weight": (shared, width),
    }
    return {
        "attn.Wqkv": _Source(projections, fused),
        "attn.proj": _Source({f"{attention}o_proj.weight": (width, width)}, _only),
        "mlp.fc": _Source({f"{mlp}gate_proj.weight": (inner, width), f"{mlp}up_proj.weight": (inner, width)}, stacked),
        "mlp.proj": _Source({f"{mlp}down_proj.weight": (width, inner)}, _only),
        "norm_1": _Source({f"{prefix}input_layernorm.weight": (width,)}, _only),
        "norm_2" if model.block == "pre_norm" else "norm_3": _Source(
            {f"{prefix}post_attention_layernorm.weight": (width,)}, _only
        ),
    }


def _interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head from halves (i, i + d / 2) to pairs (2i, 2i + 1)."""
    reordered: torch.Tensor = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return reordered


def _check_llama(weights: _Weights, model: ModelConfig) -> int:
    """Return the number of key and value heads, once what the tensors' shapes do not tell is known to agree."""
    record, directory = weights.record, weights.directory
    if model.block == "parameter_free_sandwich":
        raise ConfigError(f"model.block: {model.block} has no place for the norms of {directory}; use pre_norm")
    weights.demand("model.scale_embedding", False, model.scale_embedding)
    heads = record.get("num_attention_heads")
    weights.demand("model.n_heads", heads, model.n_heads)
    rope = record.get("rope_parameters") or {}
    weights.demand("model.rope_base", record.get("rope_theta", rope.get("rope_theta", 10_000.0)), model.rope_base)
    weights.demand("model.norm_eps", record.get("rms_norm_eps", 1e-6), model.norm_eps)
    if record.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError(f"init_from.path: {directory} scales its rotary embedding, which the model cannot")
    if record.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"init_from.path: {directory} has the activation {record['hidden_act']!r}, not silu")
    if model.tie_embeddings and "lm_head.weight" in weights.files and not record.get("tie_word_embeddings", False):
        raise ConfigError(
            f"model.tie_embeddings: {directory} has a head of its own; set model.tie_embeddings=false to keep it"
        )
    shared = record.get("num_key_value_heads", heads)
    if not isinstance(shared, int) or shared < 1 or model.n_heads % shared:
        raise ConfigError(f"init_from.path: {directory} has {shared!r} key heads for {heads} heads")
    return shared


def _check_layers(init_from: InitFromConfig, model: ModelConfig) -> None:
    """Refuse lists of layers that are not as long as the model's parts."""
    for name, key in (
        ("prelude", "n_layers_in_prelude"),
        ("core", "n_layers_in_recurrent_block"),
        ("coda", "n_layers_in_coda"),
    ):
        layers, wanted = getattr(init_from, name), getattr(model, key)
        if len(layers) != wanted:
            raise ConfigError(f"init_from.{name}: {layers} names {len(layers)} layers, but model.{key} = {wanted}")
