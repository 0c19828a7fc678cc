"""Checkpoints in the layout of Hugging Face: a copy under the reference's names, and the way back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_prep.files import published_directory
from data_prep.tokenizer import Tokenizer
from pipeline.accelerator import select_device
from pipeline.checkpoint import resolve_checkpoint, save_tensors
from pipeline.config import RunConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluate import load_model
from pipeline.model import ModelConfig, RecurrentDepthModel, reference_problem, stream_key

WEIGHTS = "model.safetensors"
_ROTARY = "freqs_cis"
# Fields of `ModelConfig` that are keys of the reference's configuration under the same name; the others are variants.
SHAPE_KEYS = (
    "n_embd",
    "n_heads",
    "intermediate_size",
    "vocab_size",
    "block_size",
    "n_layers_in_prelude",
    "n_layers_in_recurrent_block",
    "n_layers_in_coda",
    "norm_eps",
    "rope_base",
)
# The names of the files that the reference publishes beside its weights; transformers looks for them.
_AUTO_MAP = {
    "AutoConfig": "raven_config_minimal.RavenConfig",
    "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
}


def export_checkpoint(checkpoint: Path, out: Path) -> float:
    """Write `out` with config.json, model.safetensors and the tokenizer, and read it back.

    Args:
        checkpoint: a checkpoint, or a run for its newest intact one.
        out: directory to make; it appears whole or not at all.

    Returns:
        The largest absolute difference between the logits of the checkpoint and of the export.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or broken, or `out` exists.
        ConfigError: the model is a variant that `RavenForCausalLM` cannot express.
    """
    reader = resolve_checkpoint(checkpoint)
    model, config = load_model(reader, select_device(0))
    if problem := reference_problem(config.model):
        raise ConfigError(f"{reader.directory}: {problem}; it can be trained and evaluated here, but not exported")
    tokenizer_dir = reader.directory.parent.parent / "tokenizer"
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.sha256 != reader.manifest.tokenizer_sha256:
        raise CheckpointError(f"{tokenizer_dir}: not the tokenizer that {reader.directory} was trained with")
    with published_directory(out) as partial:
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        weights[_ROTARY] = model.rotary(config.model.block_size, torch.device("cpu")).contiguous()
        save_tensors(weights, partial / WEIGHTS, {"format": "pt"})
        _write_json(partial / "config.json", hugging_face_config(config, tokenizer))
        generation = {
            "bos_token_id": tokenizer.begin_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }
        _write_json(partial / "generation_config.json", generation)
        for file in sorted(tokenizer_dir.iterdir()):
            shutil.copyfile(file, partial / file.name)
        difference = _compare(model, load_export(partial), config)
    return difference


def hugging_face_config(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return config.json of an export: the keys of the reference's `RavenConfig`.

    `tie_word_embeddings` must never be among them: the reference passes it on a second time and fails.
    """
    model = config.model
    return {
        "model_type": "huginn_raven",
        "architectures": ["RavenForCausalLM"],
        "auto_map": _AUTO_MAP,
        "architecture_class_name": "RecurrentGPT",
        "block_class_name": "SandwichBlock",
        "norm_class_name": "RMSNorm_llama",
        "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU",
        "injection_type": "linear",
        "init_strategy": model.init,
        "init_orthogonal": False,
        "state_init": "like-init",
        "activation_checkpoint_impl": "per-iteration",
        "sampling_scheme": "poisson-lognormal-filling",
        "mean_recurrence": config.depth.mean_recurrence,
        "mean_backprop_depth": config.depth.mean_backprop_depth,
        **{key: getattr(model, key) for key in SHAPE_KEYS},
        "n_layers": model.n_layers_in_prelude + model.n_layers_in_recurrent_block + model.n_layers_in_coda,
        # Tools that do not know the architecture take the longest context from here.
        "max_position_embeddings": model.block_size,
        # The reference rounds the vocabulary up to this; it must leave ours as it is.
        "padding_multiple": math.gcd(model.vocab_size, 4096),
        "tie_embeddings": model.tie_embeddings,
        "qk_bias": True,
        "bias": False,
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": "float32",
    }


def load_export(directory: Path) -> RecurrentDepthModel:
    """Return the model of a directory in the layout of Hugging Face, on the CPU.

    Raises:
        CheckpointError: files are missing or do not describe such a model.
    """
    try:
        record = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = load_file(directory / WEIGHTS)
        shape = {key: record[key] for key in SHAPE_KEYS}
        model = RecurrentDepthModel(ModelConfig(**shape, tie_embeddings=record["tie_embeddings"]))
        del weights[_ROTARY]
        model.load_state_dict(weights, strict=True)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not an exported model ({error})") from None
    return model.eval()


@torch.no_grad()
def _compare(model: RecurrentDepthModel, exported: RecurrentDepthModel, config: RunConfig) -> float:
    """Return the largest difference of logits on one sequence of every part of the vocabulary."""
    device = next(model.parameters()).device
    length = min(config.model.block_size, 64)
    input_ids = torch.linspace(0, config.model.vocab_size - 1, length).long()[None]
    keys = torch.tensor([stream_key(config.seed, "export")])
    steps = (config.depth.mean_recurrence, 0)
    ours = model(input_ids.to(device), model.initial_state(keys.to(device), length), steps)
    theirs = exported(input_ids, exported.initial_state(keys, length), steps)
    return float((ours.cpu() - theirs).abs().max())


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
