"""Checkpoints in the layout of Hugging Face: a copy under the reference's names, and the way back.

No accelerator is used, and the weights are in memory at most once: they are copied tensor by tensor from wherever the
ranks' pieces lie, compared tensor by tensor, and the two models whose logits are compared exist one after the other.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from data_prep.files import published_output
from data_prep.tokenizer import Tokenizer
from pipeline.checkpoints.reader import CheckpointReader, resolve_checkpoint
from pipeline.checkpoints.shard import SafetensorsWriter
from pipeline.config import RunConfig, config_from_record
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluate import load_model
from pipeline.model import ModelConfig, RecurrentDepthModel, build_meta_model, reference_problem, stream_key

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


def export_checkpoint(checkpoint: Path, out: Path, *, other_owners: bool = False) -> float:
    """Write `out` with config.json, model.safetensors and the tokenizer, read it back and compare it.

    Args:
        checkpoint: a checkpoint of any world size and ZeRO stage, or a run for its newest intact one.
        out: directory to make; it appears whole or not at all.
        other_owners: read a checkpoint that belongs to another user.

    Returns:
        The largest absolute difference between the logits of the checkpoint and of the export.

    Raises:
        CheckpointError, DataError: the checkpoint or the run's tokenizer is missing or broken, `out` exists, there is
            no room for it, or a weight does not read back as it was.
        ConfigError: the model is a variant that `RavenForCausalLM` cannot express.
    """
    reader = resolve_checkpoint(checkpoint, other_owners=other_owners)
    config = config_from_record(reader.manifest.config, str(reader.directory))
    if problem := reference_problem(config.model):
        raise ConfigError(f"{reader.directory}: {problem}; it can be trained and evaluated here, but not exported")
    tokenizer_dir = reader.directory.parent.parent / "tokenizer"
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.sha256 != reader.manifest.tokenizer_sha256:
        raise CheckpointError(f"{tokenizer_dir}: not the tokenizer that {reader.directory} was trained with")
    with published_output(out) as partial:
        _copy_weights(reader, config.model, partial / WEIGHTS)
        _write_json(partial / "config.json", hugging_face_config(config, tokenizer))
        generation = {
            "bos_token_id": tokenizer.begin_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }
        _write_json(partial / "generation_config.json", generation)
        for file in sorted(tokenizer_dir.iterdir()):  # with whatever else belongs to it, such as a chat template
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        _check_weights(reader, partial / WEIGHTS, out)
        # One after the other, the mapped one first: what is unmapped is given back at once, what is freed may not be.
        theirs = _logits(load_export(partial), config)
        difference = float((_logits(load_model(reader, torch.device("cpu"))[0], config) - theirs).abs().max())
    return difference


def _copy_weights(reader: CheckpointReader, config: ModelConfig, path: Path) -> None:
    model = build_meta_model(config)
    table = model.rotary(config.block_size, torch.device("cpu"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: (shape, torch.float32) for name, shape in shapes.items()}
    with SafetensorsWriter(path, {**tensors, _ROTARY: (tuple(table.shape), table.dtype)}, {"format": "pt"}) as writer:
        for name in shapes:
            writer.write(name, reader.weight(name))
        writer.write(_ROTARY, table)


def _check_weights(reader: CheckpointReader, path: Path, out: Path) -> None:
    """Compare each weight with the checkpoint's, bit by bit; the file is read by the package that users read it with.

    Raises:
        CheckpointError: they differ.
    """
    for name in reader.manifest.shapes:
        with safe_open(path, framework="pt") as file:  # opened anew, to let go of the pages that were read
            stored = file.get_tensor(name)
        if not torch.equal(stored.view(torch.int32), reader.weight(name).view(torch.int32)):
            raise CheckpointError(f"{out}: {name} does not read back as it is in {reader.directory}; export it again")


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
    """Return the model of a directory in the layout of Hugging Face, on the CPU; its weights stay in the file, mapped.

    Raises:
        CheckpointError: files are missing or do not describe such a model.
    """
    try:
        record = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = load_file(directory / WEIGHTS)
        shape = {key: record[key] for key in SHAPE_KEYS}
        model = build_meta_model(ModelConfig(**shape, tie_embeddings=record["tie_embeddings"]))
        del weights[_ROTARY]
        model.load_state_dict(weights, strict=True, assign=True)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not an exported model ({error})") from None
    return model.eval()


@torch.no_grad()
def _logits(model: RecurrentDepthModel, config: RunConfig) -> torch.Tensor:
    """Return the logits of one sequence of every part of the vocabulary (1, S, V)."""
    length = min(config.model.block_size, 64)
    input_ids = torch.linspace(0, config.model.vocab_size - 1, length).long()[None]
    keys = torch.tensor([stream_key(config.seed, "export")])
    logits: torch.Tensor = model(input_ids, model.initial_state(keys, length), (config.depth.mean_recurrence, 0))
    return logits


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
