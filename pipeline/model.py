"""The recurrent-depth language model of Huginn-0125 (arXiv 2502.05171): prelude, iterated core, coda.

Shapes: B batch, S sequence, H width (`n_embd`), V vocabulary. State-dict names, shapes and semantics are those of
the reference's `RavenForCausalLM`, so that an export is a copy and not a translation.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import causal_attention
from kernels.noise import truncated_normal
from kernels.rms_norm import RMSNorm
from kernels.rotary import apply_rotary, rotary_table
from pipeline.errors import ConfigError

# The loop lives in one module, which keeps ZeRO stage 3 able to treat it as a single leaf; the reference has no
# such level in its names.
_LOOP = "recurrence."


@dataclass(kw_only=True)
class ModelConfig:
    """The shape of a model. Field names are the reference's Hugging Face configuration keys."""

    n_embd: int
    """Width H of the residual stream."""
    n_heads: int
    """Attention heads; must divide `n_embd` into an even head width (rotary pairs)."""
    intermediate_size: int
    """Hidden width of the gated MLP."""
    vocab_size: int
    """Rows of the tied embedding; at least the tokenizer's vocabulary."""
    block_size: int
    """Longest sequence that the model is trained on, in tokens."""
    n_layers_in_prelude: int
    n_layers_in_recurrent_block: int
    n_layers_in_coda: int
    norm_eps: float = 1e-6
    rope_base: float = 50_000.0

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

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_heads

    def effective_depth(self, mean_recurrence: float) -> float:
        """Return the number of blocks that a token passes on average: prelude + core * r + coda."""
        return self.n_layers_in_prelude + self.n_layers_in_recurrent_block * mean_recurrence + self.n_layers_in_coda


@dataclass
class Trace:
    """What the loop looked like from inside.

    Attributes:
        keep: iterations (from 1) whose state is kept.
        states: iteration -> state (B, S, H).
        state_rms: sqrt(mean(s_i^2)) an iteration, float32 scalars on the device.
        relative_residual: token mean of |s_i - s_(i-1)| / |s_i| an iteration, likewise.
    """

    keep: frozenset[int] = frozenset()
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    state_rms: list[torch.Tensor] = field(default_factory=list)
    relative_residual: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def record(self, iteration: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Note one iteration that took the state (B, S, H) from `before` to `after`."""
        if iteration in self.keep:
            self.states[iteration] = after
        before, after = before.float(), after.float()
        self.state_rms.append(after.pow(2).mean().sqrt())
        norm = torch.linalg.vector_norm(after, dim=-1).clamp_min(1e-12)
        self.relative_residual.append((torch.linalg.vector_norm(after - before, dim=-1) / norm).mean())

    def to_lists(self) -> dict[str, list[float]]:
        """Return the two series as plain numbers under the names of the run log; waits for the device."""
        return {
            "state_rms": [float(value) for value in self.state_rms],
            "relative_residual": [float(value) for value in self.relative_residual],
        }


class CausalSelfAttention(nn.Module):
    """Multi-head attention with a learned bias on queries and keys, added before the rotary embedding."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.backend = config.n_heads, config.head_dim, backend
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim))
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Attend over x (B, S, H) with the rotary table of its S positions; same shape."""
        query, key, value = (part.unflatten(-1, (self.heads, self.head_dim)) for part in self.Wqkv(x).chunk(3, -1))
        query_bias, key_bias = self.qk_bias.unbind(0)
        query, key = apply_rotary(query + query_bias, rotary), apply_rotary(key + key_bias, rotary)
        attended: torch.Tensor = self.proj(causal_attention(query, key, value, self.backend).flatten(-2))
        return attended


class GatedMLP(nn.Module):
    """silu(a) * b with a and b from one fused projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, S, H) to the same shape."""
        gate, up = self.fc(x).chunk(2, -1)
        projected: torch.Tensor = self.proj(F.silu(gate) * up)
        return projected


class SandwichBlock(nn.Module):
    """A block whose residual stream is normalised after each sub-layer: x = n2(x + Attn(n1(x))); n4(x + MLP(n3(x)))."""

    def __init__(self, config: ModelConfig, attention_backend: str) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, attention_backend)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.norm_3 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Map x (B, S, H) to the same shape."""
        x = self.norm_2(x + self.attn(self.norm_1(x), rotary))
        x = self.norm_4(x + self.mlp(self.norm_3(x)))
        return x


class Recurrence(nn.Module):
    """The core: s_i = blocks(adapter([s_(i-1), e])), iterated n times without gradient and then k times with it."""

    def __init__(self, config: ModelConfig, attention_backend: str, checkpoint_iterations: bool) -> None:
        super().__init__()
        self.checkpoint_iterations = checkpoint_iterations
        self.adapter = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.core_block = nn.ModuleList(
            SandwichBlock(config, attention_backend) for _ in range(config.n_layers_in_recurrent_block)
        )

    def iterate(self, state: torch.Tensor, injected: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Apply the core once to state (B, S, H); `injected` is the adapter's share of the prelude's output."""
        state = F.linear(state, self.adapter.weight[:, : state.shape[-1]]) + injected
        for block in self.core_block:
            state = block(state, rotary)
        return state

    def forward(
        self,
        state: torch.Tensor,
        embedded: torch.Tensor,
        rotary: torch.Tensor,
        num_steps: tuple[int, int],
        trace: Trace | None = None,
    ) -> torch.Tensor:
        """Return the state (B, S, H) after n + k iterations, `num_steps` = (n, k); gradients reach the last k."""
        n, k = num_steps
        # The adapter acts on [s, e]; e does not change in the loop, so its half is computed once.
        injected = F.linear(embedded, self.adapter.weight[:, embedded.shape[-1] :])
        for iteration in range(1, n + k + 1):
            before = state
            if iteration <= n:
                with torch.no_grad():
                    state = self.iterate(state, injected, rotary)
            elif self.checkpoint_iterations and torch.is_grad_enabled():
                state = checkpoint(self.iterate, state, injected, rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self.iterate(state, injected, rotary)
            if trace is not None:
                trace.record(iteration, before, state)
        return state


def reference_name(name: str) -> str:
    """Return the reference's name of a parameter of `RecurrentDepthModel`."""
    return name.replace("transformer." + _LOOP, "transformer.", 1)


def _to_reference_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + _LOOP)]:
        state_dict[prefix + name.removeprefix(prefix + _LOOP)] = state_dict.pop(name)


def _from_reference_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *load_arguments: object) -> None:
    for child in ("adapter.", "core_block."):
        for name in [name for name in state_dict if name.startswith(prefix + child)]:
            state_dict[prefix + _LOOP + name.removeprefix(prefix)] = state_dict.pop(name)


class Transformer(nn.Module):
    """All parameters; state dicts carry the reference's names."""

    def __init__(self, config: ModelConfig, attention_backend: str, checkpoint_iterations: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.prelude = nn.ModuleList(
            SandwichBlock(config, attention_backend) for _ in range(config.n_layers_in_prelude)
        )
        self.recurrence = Recurrence(config, attention_backend, checkpoint_iterations)
        self.coda = nn.ModuleList(SandwichBlock(config, attention_backend) for _ in range(config.n_layers_in_coda))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.register_state_dict_post_hook(_to_reference_names)
        self.register_load_state_dict_pre_hook(_from_reference_names)


class RecurrentDepthModel(nn.Module):
    """Prelude, recurrence, coda and the tied head.

    Args:
        config: the shape.
        attention_backend: see `kernels.attention`.
        checkpoint_iterations: recompute each iteration in the backward pass instead of keeping its activations.
    """

    def __init__(
        self, config: ModelConfig, attention_backend: str = "sdpa", checkpoint_iterations: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, attention_backend, checkpoint_iterations)
        # Not a buffer: casting the module to bf16 must leave the table in float32.
        self._rotary: torch.Tensor | None = None

    def rotary(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the rotary table (1, length, 1, head_dim / 2, 2) of the first `length` <= block_size positions."""
        if self._rotary is None or self._rotary.device != device:
            self._rotary = rotary_table(self.config.block_size, self.config.head_dim, self.config.rope_base, device)
        return self._rotary[:, :length]

    def initial_state(self, keys: torch.Tensor, length: int) -> torch.Tensor:
        """Return s_0 (B, length, H) for `keys` (B,): normal with variance 2/5, truncated at 3 sigma (section 1.1)."""
        noise = truncated_normal(keys, length, self.config.n_embd, math.sqrt(2 / 5))
        return noise.to(self.transformer.wte.weight.dtype)

    def latent(
        self,
        input_ids: torch.Tensor,
        initial_state: torch.Tensor,
        num_steps: tuple[int, int],
        trace: Trace | None = None,
    ) -> torch.Tensor:
        """Return the state after the loop (B, S, H), before the final norm."""
        rotary = self.rotary(input_ids.shape[1], input_ids.device)
        embedded = self.transformer.wte(input_ids) * math.sqrt(self.config.n_embd)
        for block in self.transformer.prelude:
            embedded = block(embedded, rotary)
        state: torch.Tensor = self.transformer.recurrence(initial_state, embedded, rotary, num_steps, trace)
        return state

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Map a state of the loop (B, S, H) through norm, coda, the same norm again and the head: (B, S, V) float32."""
        rotary = self.rotary(state.shape[1], state.device)
        x = self.transformer.ln_f(state)
        for block in self.transformer.coda:
            x = block(x, rotary)
        return F.linear(self.transformer.ln_f(x), self.transformer.wte.weight).float()

    def forward(
        self,
        input_ids: torch.Tensor,
        initial_state: torch.Tensor,
        num_steps: tuple[int, int],
        labels: torch.Tensor | None = None,
        trace: Trace | None = None,
    ) -> torch.Tensor:
        """Return the logits (B, S, V), or the mean cross-entropy in nats if `labels` (B, S, already shifted) are given.

        Args:
            input_ids: (B, S) int64, S <= block_size.
            initial_state: (B, S, H).
            num_steps: iterations (without, with) gradient.
            labels: (B, S) int64 or None.
            trace: filled with what the loop did, if given.
        """
        logits = self.logits(self.latent(input_ids, initial_state, num_steps, trace))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def init_weights(self, seed: int, mean_recurrence: float) -> None:
        """Initialise after Takase (arXiv 2312.16903), a pure function of (seed, parameter name).

        Matrices: normal with variance 2 / (5 H), truncated at 3 sigma; projections back into the residual stream:
        1 / (5 H l) with the effective depth l. Norms 1, biases 0.
        """
        width, depth = self.config.n_embd, self.config.effective_depth(mean_recurrence)
        for name, parameter in self.named_parameters():
            if name.endswith("qk_bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = math.sqrt(1 / (5 * width * depth) if name.endswith("proj.weight") else 2 / (5 * width))
                key = torch.tensor([stream_key(seed, reference_name(name))], device=parameter.device)
                rows, columns = parameter.shape
                parameter.copy_(truncated_normal(key, rows, columns, std)[0])


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
