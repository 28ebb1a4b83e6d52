"""How far a quantised model's predictions are from the full model's, window by window."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqq import Calibration, HQQLinear, QuantConfig, quantize_model
from hqq.core.quantizer import quantize_tensor
from hqq.models.calibration.text import tokens_for

_BATCH = 4


@dataclass(frozen=True)
class Setting:
    """How all linear layers but the head are quantised.

    calibration: "none", "self" or "random". seed: of the text or the random tokens.
    """

    nbits: float
    group_size: int | None
    axis: int
    solver: str
    calibration: str = "none"
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """One setting's mean values per window, and the bits that a weight takes with its share of scale and zero.

    kl: KL(full || quantised), nats a token. nll: nats a token. bits: of the quantised layers alone. error: squared
    error of the weights, relative to their squares.
    """

    kl: Tensor
    nll: Tensor
    bits: float
    error: float


class Study:
    """A model, the text it is judged on, and what it predicts at full precision."""

    def __init__(self, path: str, text: Path, windows: int, length: int, device: torch.device) -> None:
        self.model = cast(Any, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        self.model.to(device).eval()
        tokens = AutoTokenizer.from_pretrained(path)(text.read_text(encoding="utf-8"))["input_ids"]
        windows = min(windows, (len(tokens) - 1) // length)
        if windows < 2:
            raise SystemExit(
                f"got {len(tokens)} tokens of text; two windows of {length} need {2 * length + 1}"
            )
        used = torch.tensor(tokens[: windows * length + 1], device=device)
        self.windows = windows
        self._inputs = torch.split(used[:-1].view(windows, length), _BATCH)
        self._targets = torch.split(used[1:].view(windows, length), _BATCH)
        self.layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not self.model.get_output_embeddings()
        }
        self._full = [self._predict(batch).to("cpu") for batch in self._inputs]
        self.full_nll = self._nll(self._full)
        self._texts: dict[int, Tensor] = {}

    @torch.inference_mode()
    def _predict(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=inputs, use_cache=False).logits
        return logits.float().log_softmax(-1)

    def _nll(self, predictions: list[Tensor]) -> Tensor:
        """Return the mean negative log-likelihood of each window, float64."""
        found = [
            -predicted.gather(-1, targets.unsqueeze(-1).to(predicted.device)).squeeze(-1).double().mean(1)
            for predicted, targets in zip(predictions, self._targets, strict=True)
        ]
        return torch.cat(found).cpu()

    def judge(self, setting: Setting, dtype: torch.dtype) -> Outcome:
        """Quantise, with scale and zero stored in `dtype`, compare, and put the full weights back."""
        full = {name: layer.weight.data for name, layer in self.layers.items()}
        size = lost = squares = 0.0
        calibrated = None if setting.calibration == "none" else self._calibrated(setting, dtype)
        try:
            for name, layer in self.layers.items():
                if calibrated is None:
                    W, nbytes = quantised(full[name], setting, dtype)
                else:
                    q = cast(HQQLinear, calibrated.get_submodule(name)).qtensor()
                    W, nbytes = q.dequantize(torch.float32), q.nbytes
                layer.weight.data = W
                size += nbytes
                lost += (W - full[name]).square().sum().item()
                squares += full[name].square().sum().item()
            kl, nll = self._compare()
        finally:
            for name, layer in self.layers.items():
                layer.weight.data = full[name]
        return Outcome(kl, nll, 8 * size / sum(W.numel() for W in full.values()), lost / squares)

    def _calibrated(self, setting: Setting, dtype: torch.dtype) -> nn.Module:
        """Return a quantised copy of the model."""
        data: Any = setting.calibration
        if data == "self":
            data = self._text(setting.seed)
        config = QuantConfig(setting.nbits, setting.group_size, setting.axis, solver=setting.solver)
        model = copy.deepcopy(self.model)
        calibration = Calibration(data, seed=setting.seed)
        quantize_model(model, config, calibration=calibration, compute_dtype=dtype, progress=False)
        return cast(nn.Module, model)

    def _text(self, seed: int) -> Tensor:
        """Return what the model writes from this seed: what calibration="self" does, but once for all settings."""
        if seed not in self._texts:
            widest = max(layer.in_features for layer in self.layers.values())
            written = tokens_for(self.model, Calibration("self", seed=seed), widest, False)
            assert written is not None
            self._texts[seed] = written
        return self._texts[seed]

    def _compare(self) -> tuple[Tensor, Tensor]:
        kl, nll = [], []
        for inputs, targets, kept in zip(self._inputs, self._targets, self._full, strict=True):
            found, full = self._predict(inputs), kept.to(inputs.device)
            kl.append((full.exp() * (full - found)).sum(-1).double().mean(1))
            nll.append(-found.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().mean(1))
        return torch.cat(kl).cpu(), torch.cat(nll).cpu()


def quantised(W: Tensor, setting: Setting, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return what `W` is after quantisation with scale and zero in `dtype`, in float32, and its size in bytes."""
    q = quantize_tensor(
        W,
        nbits=setting.nbits,
        group_size=setting.group_size,
        axis=setting.axis,
        optimize=setting.solver != "minmax",
        # What the original's configuration asks for; only its own solver and min-max rounding heed it.
        round_zero=setting.nbits == 4,
        solver=None if setting.solver == "minmax" else setting.solver,
        storage_dtype=dtype,
    )
    assert isinstance(q.scale, Tensor)
    assert isinstance(q.zero, Tensor)
    q.scale, q.zero = q.scale.to(dtype), q.zero.to(dtype)
    return q.dequantize(torch.float32), q.nbytes


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean over windows and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def ratio_and_error(values: Tensor, others: Tensor) -> tuple[float, float]:
    """Return the ratio of two means over the same windows and its standard error, by leaving out one at a time."""
    n = len(values)
    left_out = (values.sum() - values) / (others.sum() - others)
    spread = (left_out - left_out.mean()).square().sum() * (n - 1) / n
    return (values.sum() / others.sum()).item(), spread.sqrt().item()
