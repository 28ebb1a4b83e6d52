"""The original's main import path; the code is in the modules named below."""

import torch as torch
from torch import Tensor as Tensor
from torch import nn as nn

from hqq.core.backend import HQQBackend
from hqq.core.bitpack import BitPack
from hqq.core.config import BaseQuantizeConfig, hqq_base_quant_config
from hqq.core.linear import HQQLinear
from hqq.core.quantizer import Quantizer

# torch, nn and Tensor are part of the path's contract: published snippets star-import this module and use them.
__all__ = [
    "BaseQuantizeConfig",
    "BitPack",
    "HQQBackend",
    "HQQLinear",
    "Quantizer",
    "Tensor",
    "hqq_base_quant_config",
    "nn",
    "torch",
]
