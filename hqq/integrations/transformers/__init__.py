"""HQQ inside transformers: quantising in `from_pretrained`, saving, loading, and the quantised cache.

Installed by `BaseQuantizeConfig`, and so by `HqqConfig`; nothing has to be called. `support()` says what this version
of transformers needs, `install()` does it now.
"""

from hqq.integrations.transformers.adopt import on_quantized
from hqq.integrations.transformers.install import install, on_config
from hqq.integrations.transformers.versions import Support, support

__all__ = ["Support", "install", "on_config", "on_quantized", "support"]
