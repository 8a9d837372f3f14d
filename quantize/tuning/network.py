"""The model that learns: a checkpoint in torch, frozen, with peft's LoRA factors beside its linear layers.

Owns loading, 4 bits, dtypes and devices, and what a batch of sequences gives; knows neither steps nor files
of a run. peft is asked for nothing but the adapter.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from quantize.errors import QuantizeError
from quantize.tuning.encoding import Example
from quantize.tuning.four_bit import replace_linears
from quantize.tuning.quantized_base import fill
from quantize.tuning.quiet import quiet

Compute = Literal["f32", "bf16"]
HEAD_NUMBERS = 1 << 26  # logits made at once


class TuneExtraMissing(QuantizeError):
    """The packages of the extra `tune` are not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"lq tune needs the package {package}, which is not installed; "
            f"install the extra: {sys.executable} -m pip install 'peft>=0.18'"
        )


class BadModule(QuantizeError):
    """Linear layers that are named but not there, or too narrow for the rank."""


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What the adapter looks like. `modules`: last parts of the layers' names; empty: every linear layer."""

    rank: int
    alpha: float
    dropout: float = 0.0
    modules: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / self.rank


def require_peft() -> None:
    """Raise TuneExtraMissing rather than fail in the middle."""
    if importlib.util.find_spec("peft") is None:
        raise TuneExtraMissing("peft")


def default_device() -> str:
    """The GPU, where torch has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_compute(device: str) -> Compute:
    """bf16 where the hardware has it; CPUs without it compute it many times slower than float32."""
    return (
        "bf16" if device.startswith("cuda") and is_there(device) and torch.cuda.is_bf16_supported() else "f32"
    )


def is_there(device: str) -> bool:
    """Whether this machine has a device, by torch's name of it."""
    found = re.fullmatch(r"cuda(?::(\d+))?", device)
    return device == "cpu" or (found is not None and int(found[1] or 0) < torch.cuda.device_count())


class Frozen:
    """A model of transformers that only predicts. `decoder` and `head` are its own."""

    def __init__(self, model: Any, *, device: str, compute: Compute) -> None:
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.cap = getattr(model.config, "final_logit_softcapping", None)
        self.device, self.compute = device, compute

    @classmethod
    def load(cls, folder: Path, *, device: str, compute: Compute) -> "Frozen":
        """A checkpoint as it is."""
        with quiet():
            model = _pretrained(folder, compute).to(device).eval()
        return cls(model, device=device, compute=compute)

    def hidden(self, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(n, width): the last states that predict every wanted token of the batch, and those tokens (n,).

        Sequence after sequence, each token in order. Sequences are padded behind, where a causal model does
        not look.
        """
        width = max(len(example.tokens) for example in batch)
        tokens, wanted = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), bool)
        for row, example in enumerate(batch):
            tokens[row, : len(example.tokens)] = example.tokens
            wanted[row, : len(example.tokens)] = example.wanted
        ids = torch.from_numpy(tokens).to(self.device)
        predicts = torch.from_numpy(wanted[:, 1:]).to(self.device)
        with self._autocast():
            states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return states[predicts], ids[:, 1:][predicts]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocabulary) float32 of what `hidden` gave."""
        with self._autocast():
            logits = self.head(hidden)
        logits = logits.float()
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _autocast(self):
        if self.compute == "f32":
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], dtype=torch.bfloat16)


class Tunable(Frozen):
    """A frozen model with factors that learn; `model` is peft's. A teacher, if any, is what they aim at."""

    def __init__(self, model: Any, *, device: str, compute: Compute, teacher: Frozen | None = None) -> None:
        inner = model.get_base_model()
        super().__init__(inner, device=device, compute=compute)
        self.model, self.teacher, self._inner = model, teacher, inner

    @classmethod
    def of(
        cls,
        folder: Path,
        shape: LoraShape,
        *,
        four_bit: bool,
        seed: int,
        device: str,
        compute: Compute,
        checkpointing: bool,
        base: Path | None = None,
        teacher: Frozen | None = None,
    ) -> "Tunable":
        """Load safetensors, freeze, add factors (A random by `seed`, B zero). Raises BadModule.

        `base`: a GGUF of the same model whose weights take the place of the checkpoint's.
        """
        require_peft()
        with quiet():
            # in its own dtype until most of it has 4 bits: an 8B model has 32 GB in float32
            model = _pretrained(folder, compute, as_stored=four_bit and base is None)
            names = linear_names(model, shape.modules)
            _check_rank(model, names, shape.rank)
            if base is not None:
                fill(model, folder, base)
            if four_bit:
                replace_linears(model, linear_names(model, ()), dtype=_dtype(compute))
                for parameter in model.parameters():
                    parameter.data = parameter.data.to(_dtype(compute))
            model.to(device)
            made = _with_factors(model, names, shape, seed, checkpointing)
        return cls(made, device=device, compute=compute, teacher=teacher)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by a name that tells module and factor."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def factors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Module as in the checkpoint -> (b, a) as float32, scale not in them."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                b, a = module.lora_B["default"].weight, module.lora_A["default"].weight
                b, a = (part.detach().float().cpu().numpy().copy() for part in (b, a))
                found[name.removeprefix("base_model.model.")] = b, a
        return found

    def assign(self, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Put (b, a) of the trained rank or a lower one in the factors' place, the scale not in them."""
        with torch.no_grad():
            for module, (b, a) in factors.items():
                layer = self._inner.get_submodule(module)
                for weight, value in (
                    (layer.lora_B["default"].weight, b),
                    (layer.lora_A["default"].weight, a),
                ):
                    weight.zero_()
                    rows, columns = value.shape
                    weight[:rows, :columns] = torch.from_numpy(value)

    def base_norm(self, module: str) -> float:
        """Frobenius norm of a module's frozen weight."""
        layer = self._inner.get_submodule(module)
        return float(layer.base_layer.weight.detach().float().norm())

    def token_losses(self, batch: Sequence[Example]) -> Tensor:
        """(n,) of the wanted tokens, in nats: -log p, or KL(teacher || this) where there is a teacher."""
        hidden, targets = self.hidden(batch)
        aims = [targets]
        if self.teacher is not None:
            with torch.no_grad():
                aims.append(self.teacher.hidden(batch)[0])
        rows = max(1, HEAD_NUMBERS // self.head.out_features)
        if len(targets) <= rows:
            return self._row_losses(hidden, *aims)
        # logits of many tokens take more memory than all the rest, so they are made again for the gradient
        parts = [[part[i : i + rows] for part in (hidden, *aims)] for i in range(0, len(targets), rows)]
        return torch.cat([checkpoint(self._row_losses, *part, use_reentrant=False) for part in parts])

    def _row_losses(self, hidden: Tensor, targets: Tensor, taught: Tensor | None = None) -> Tensor:
        logits = self.logits(hidden)
        if taught is None or self.teacher is None:
            return functional.cross_entropy(logits, targets, reduction="none")
        with torch.no_grad():
            aim = self.teacher.logits(taught).log_softmax(-1)
        return (aim.exp() * (aim - logits.log_softmax(-1))).sum(-1)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model alone."""
        with self.model.disable_adapter():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout within."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


def linear_names(model: Any, wanted: Sequence[str]) -> list[str]:
    """Names of the decoder's linear layers whose last part is wanted; all of them for none wanted."""
    within = {id(module) for module in model.get_decoder().modules()}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in within]
    known = sorted({name.rpartition(".")[2] for name in names})
    if unknown := sorted(set(wanted) - set(known)):
        raise BadModule(
            f"--modules {unknown[0]!r} is no linear layer of this model; there are {', '.join(known)}"
        )
    return [name for name in names if not wanted or name.rpartition(".")[2] in wanted]


def _dtype(compute: Compute) -> torch.dtype:
    return torch.bfloat16 if compute == "bf16" else torch.float32


def _pretrained(folder: Path, compute: Compute, *, as_stored: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto" if as_stored else _dtype(compute),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.requires_grad_(False)


def _check_rank(model: Any, names: Sequence[str], rank: int) -> None:
    for name in names:
        linear = model.get_submodule(name)
        width = min(linear.in_features, linear.out_features)
        if rank > width:
            raise BadModule(
                f"--rank is {rank}, but {name} is {linear.out_features} by {linear.in_features}; "
                f"give at most {width}, or leave this layer out with --modules"
            )


def _with_factors(model: Any, names: list[str], shape: LoraShape, seed: int, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,  # pyright: ignore[reportArgumentType]  # fractions work, its type says int
        lora_dropout=shape.dropout,
        target_modules=names,
    )
    made = get_peft_model(model, config)
    for parameter in made.parameters():
        if parameter.requires_grad:  # small steps vanish in 16 bits; products are in `compute` all the same
            parameter.data = parameter.data.float()
    return made
