"""The recurrent-depth language model of Huginn-0125 (arXiv 2502.05171): prelude, iterated core, coda.

Shapes: B batch, S sequence, H width (`n_embd`), V vocabulary. State-dict names, shapes and semantics are those of
the reference's `RavenForCausalLM`, so that an export is a copy and not a translation; `reference_problem` says which
variants the reference has not.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.noise import truncated_normal
from kernels.rms_norm import RMSNorm
from kernels.rotary import rotary_table
from pipeline.blocks import Positions, build_blocks, document_mask
from pipeline.errors import ConfigError
from pipeline.initialization import INITS, initialize
from pipeline.loader import IGNORED
from pipeline.objective import ObjectiveConfig, loss
from pipeline.recompute import pass_block
from pipeline.recurrence import Recurrence, Steps
from pipeline.trace import Trace

# The loop lives in one module, which keeps ZeRO stage 3 able to treat it as a single leaf; the reference has no
# such level in its names.
_LOOP = "recurrence."

_CHOICES = {
    "injection": ("concat", "add", "gate", "diagonal"),
    "block": ("sandwich", "pre_norm", "parameter_free_sandwich"),
    "state_init": ("truncated_normal", "zero", "unit"),
    "init": INITS,
}


@dataclass(kw_only=True)
class ModelConfig:
    """The shape of a model. Field names up to `tie_embeddings` are the reference's Hugging Face configuration keys."""

    n_embd: int
    """Width H of the residual stream."""
    n_heads: int
    """Attention heads; must divide `n_embd` into an even head width (rotary pairs)."""
    intermediate_size: int
    """Hidden width of the gated MLP."""
    vocab_size: int
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    block_size: int
    """Longest sequence that the model is trained on, in tokens."""
    n_layers_in_prelude: int
    n_layers_in_recurrent_block: int
    n_layers_in_coda: int
    norm_eps: float = 1e-6
    rope_base: float = 50_000.0
    tie_embeddings: bool = True
    """Whether the head is the embedding's matrix; false gives it its own."""
    injection: str = "concat"
    """How the prelude's output enters each iteration: concat (learned adapter), add, gate (product) or diagonal."""
    block: str = "sandwich"
    """Norms of a block: sandwich, pre_norm or parameter_free_sandwich (norms without weights)."""
    state_init: str = "truncated_normal"
    """First state of the loop: truncated_normal (variance 2/5), zero, or unit (each token of mean 0 and variance 1)."""
    init: str = "takase"
    """Depth that scales the initial projections: takase (blocks passed in the mean) or scaled (blocks that exist)."""
    prelude_norm: bool | None = None
    """Whether the prelude's output is normalised; null: with the diagonal injection only."""
    scale_embedding: bool = True
    """Whether the embedding is multiplied by sqrt(`n_embd`)."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        positive = ("n_embd", "n_heads", "intermediate_size", "vocab_size", "block_size", "n_layers_in_recurrent_block")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not positive")
        for name in ("norm_eps", "rope_base"):
            if getattr(self, name) <= 0.0:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is not positive")
        for name in ("n_layers_in_prelude", "n_layers_in_coda"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name}: {getattr(self, name)} is negative")
        if self.n_embd % self.n_heads or self.n_embd // self.n_heads % 2:
            raise ConfigError(
                f"model.n_heads: {self.n_heads} does not divide model.n_embd = {self.n_embd} into heads of even width"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"model.{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.injection == "gate" and self.state_init == "zero":
            raise ConfigError(
                "model.state_init: zero stays zero under model.injection = gate, which multiplies the state;"
                " use truncated_normal or unit"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_heads

    @property
    def normalises_prelude(self) -> bool:
        """Whether the prelude's output passes a norm (Parcae, arXiv 2604.12946, exploded without it)."""
        return self.injection == "diagonal" if self.prelude_norm is None else self.prelude_norm

    def effective_depth(self, mean_recurrence: float) -> float:
        """Return the number of blocks that a token passes on average: prelude + core * r + coda."""
        return self.n_layers_in_prelude + self.n_layers_in_recurrent_block * mean_recurrence + self.n_layers_in_coda


def reference_problem(config: ModelConfig) -> str | None:
    """Return which key of a variant `RavenForCausalLM` cannot express, or None if it is the reference's model."""
    variants = {
        "injection": ("concat", config.injection),
        "block": ("sandwich", config.block),
        "state_init": ("truncated_normal", config.state_init),
        "scale_embedding": (True, config.scale_embedding),
        "prelude_norm": (False, config.normalises_prelude),
    }
    for key, (reference, value) in variants.items():
        if value != reference:
            return f"model.{key}: {value!r} is not in the architecture RavenForCausalLM, which has {reference!r}"
    return None


def reference_name(name: str) -> str:
    """Return the reference's name of a parameter of `RecurrentDepthModel`."""
    return name.replace("transformer." + _LOOP, "transformer.", 1)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Return whether weight decay applies: not to norms, biases and the diagonal injection's rates.

    `parameter` has its whole shape, not a shard's.
    """
    return parameter.dim() >= 2 and not name.endswith("bias")


def _to_reference_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + _LOOP)]:
        state_dict[prefix + name.removeprefix(prefix + _LOOP)] = state_dict.pop(name)


def _from_reference_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *load_arguments: object) -> None:
    for child in ("adapter.", "core_block."):
        for name in [name for name in state_dict if name.startswith(prefix + child)]:
            state_dict[prefix + _LOOP + name.removeprefix(prefix)] = state_dict.pop(name)


class Transformer(nn.Module):
    """All parameters but a head of its own; state dicts carry the reference's names."""

    def __init__(self, config: ModelConfig, attention_backend: str, activation_checkpointing: str) -> None:
        super().__init__()
        # Not drawn here: `init_weights` does that, and to draw on the meta device takes PyTorch a second of imports.
        undrawn = torch.empty(config.vocab_size, config.n_embd)
        self.wte: nn.Embedding = nn.Embedding.from_pretrained(undrawn, freeze=False)
        self.prelude = build_blocks(config.n_layers_in_prelude, config, attention_backend)
        self.prelude_norm = RMSNorm(config.n_embd, config.norm_eps) if config.normalises_prelude else None
        self.recurrence = Recurrence(config, attention_backend, activation_checkpointing)
        # Parcae's output projection of the state.
        diagonal = config.injection == "diagonal"
        self.readout = nn.Linear(config.n_embd, config.n_embd, bias=False) if diagonal else None
        self.coda = build_blocks(config.n_layers_in_coda, config, attention_backend)
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.register_state_dict_post_hook(_to_reference_names)
        self.register_load_state_dict_pre_hook(_from_reference_names)


class RecurrentDepthModel(nn.Module):
    """Prelude, recurrence, coda and the head.

    Args:
        config: the shape.
        attention_backend: see `kernels.attention`.
        activation_checkpointing: what the backward pass computes again; see `pipeline.recompute`.
        objective: what `forward` returns if it is given labels.

    Attributes:
        cross_entropy: of the last forward pass with labels, in nats a token, whatever the objective; detached.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention_backend: str = "sdpa",
        activation_checkpointing: str = "none",
        objective: ObjectiveConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or ObjectiveConfig()
        self.transformer = Transformer(config, attention_backend, activation_checkpointing)
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = torch.full((), math.nan)
        # Not a buffer: casting the module to bf16 must leave the table in float32.
        self._rotary: torch.Tensor | None = None

    def rotary(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the rotary table (1, length, 1, head_dim / 2, 2) of the first `length` <= block_size positions."""
        if self._rotary is None or self._rotary.device != device:
            self._rotary = rotary_table(self.config.block_size, self.config.head_dim, self.config.rope_base, device)
        return self._rotary[:, :length]

    def initial_state(self, keys: torch.Tensor, length: int) -> torch.Tensor:
        """Return s_0 (B, length, H) for `keys` (B,), after `model.state_init`.

        The reference's (arXiv 2502.05171, section 3.1) is normal with variance 2/5, truncated at 3 sigma.
        """
        width, kind = self.config.n_embd, self.config.state_init
        if kind == "zero":
            return self.transformer.wte.weight.new_zeros(len(keys), length, width)
        noise = truncated_normal(keys, length, width, math.sqrt(2 / 5))
        if kind == "unit":
            deviation, mean = torch.std_mean(noise, dim=-1, keepdim=True)
            noise = (noise - mean) / deviation
        return noise.to(self.transformer.wte.weight.dtype)

    def latent(
        self,
        input_ids: torch.Tensor,
        initial_state: torch.Tensor,
        num_steps: Steps,
        trace: Trace | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the state after the loop (B, S, H), before the final norm."""
        positions = self._positions(input_ids, documents)
        embedded = self._embed(input_ids, positions)
        state: torch.Tensor = self.transformer.recurrence(initial_state, embedded, positions, num_steps, trace)[0]
        return state

    def logits(
        self, state: torch.Tensor, documents: torch.Tensor | None = None, trace: Trace | None = None
    ) -> torch.Tensor:
        """Map a state of the loop (B, S, H) through norm, coda, the same norm again and the head: (B, S, V) float32."""
        transformer, positions = self.transformer, self._positions(state, documents)
        x = transformer.ln_f(state if transformer.readout is None else transformer.readout(state))
        if trace is not None:
            trace.read_out(state, x)
        for block in transformer.coda:
            x = pass_block(transformer.recurrence.activation_checkpointing, block, x, positions)
        x = transformer.ln_f(x)
        if trace is not None:
            trace.hidden(x)
        head = transformer.wte if self.lm_head is None else self.lm_head
        return F.linear(x, head.weight).float()

    def forward(
        self,
        input_ids: torch.Tensor,
        initial_state: torch.Tensor,
        num_steps: Steps,
        labels: torch.Tensor | None = None,
        trace: Trace | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits (B, S, V), or the mean objective if `labels` are given; see `pipeline.objective.loss`.

        With labels and a trace that keeps states: the summed cross-entropy of each of them (len(trace.keep),), from the
        shallowest on.

        Args:
            input_ids: (B, S) int64, S <= block_size.
            initial_state: (B, S, H).
            num_steps: iterations (without, with) gradient, of the batch or of each sequence.
            labels: (B, S) int64, already shifted, or None.
            trace: filled with what the loop did, if given.
            documents: (B, S) int64 or None: the number of each position's document, within which attention stays.
        """
        positions = self._positions(input_ids, documents)
        embedded = self._embed(input_ids, positions)
        direction = None
        if labels is not None and self.objective.jacobian_penalty and torch.is_grad_enabled():
            # Noise that follows from the text alone: the same whatever rank and micro-batch it falls to.
            keys = (input_ids * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).sum(1)
            direction = truncated_normal(keys, embedded.shape[1], embedded.shape[2], 1.0)
        state, gain = self.transformer.recurrence(initial_state, embedded, positions, num_steps, trace, direction)
        if labels is not None and trace is not None and trace.keep:
            kept = (self.logits(trace.states[depth], documents) for depth in sorted(trace.keep))
            return torch.stack([F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="sum") for x in kept])
        logits = self.logits(state, documents, trace)
        if labels is None:
            return logits
        mean = loss(logits, labels, self.objective, num_steps)
        with torch.no_grad():
            plain = self.objective.is_cross_entropy
            self.cross_entropy = mean if plain else loss(logits, labels, ObjectiveConfig(), num_steps)
            self.cross_entropy = self.cross_entropy.detach()
        if direction is None:
            return mean
        # Weighted as the loss is, by labels that count, so that the split into micro-batches does not matter.
        counts = (labels != IGNORED).sum(1)
        weighted: torch.Tensor = (gain * counts).sum() / counts.sum().clamp_min(1)
        return mean + self.objective.jacobian_penalty * weighted

    def init_weights(self, seed: int, mean_recurrence: float) -> None:
        """Set all parameters (`pipeline.initialization`), a pure function of (seed, parameter name)."""
        for name, parameter in self.named_parameters():
            key = stream_key(seed, reference_name(name))
            initialize(parameter, self.config, reference_name(name), mean_recurrence, key)

    def _positions(self, batch: torch.Tensor, documents: torch.Tensor | None) -> Positions:
        table = self.rotary(batch.shape[1], batch.device)
        return Positions(table, None if documents is None else document_mask(documents))

    def _embed(self, input_ids: torch.Tensor, positions: Positions) -> torch.Tensor:
        embedded: torch.Tensor = self.transformer.wte(input_ids)
        if self.config.scale_embedding:
            embedded = embedded * math.sqrt(self.config.n_embd)
        policy = self.transformer.recurrence.activation_checkpointing
        for block in self.transformer.prelude:
            embedded = pass_block(policy, block, embedded, positions)
        return embedded if self.transformer.prelude_norm is None else self.transformer.prelude_norm(embedded)


def stream_key(seed: int, *labels: int | str) -> int:
    """Return a 63-bit key for `kernels.noise` that names one stream of noise of a run."""
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def build_meta_model(config: ModelConfig) -> RecurrentDepthModel:
    """Return the model without storage, to count and to name its parameters."""
    with torch.device("meta"):
        return RecurrentDepthModel(config)


def count_parameters(model: nn.Module) -> int:
    """Return the number of unique parameters (the tied head counts once)."""
    return sum(parameter.numel() for parameter in model.parameters())
