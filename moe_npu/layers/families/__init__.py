"""Model families: the config of transformers to our arguments, its tensor names to ours. One file per lineage."""

from moe_npu.layers.families import (  # noqa: F401 - importing them registers their families
    dbrx,
    deepseek,
    ernie,
    gemma,
    gpt_oss,
    granite,
    hunyuan,
    inkling,
    jetmoe,
    llama4,
    longcat,
    mistral,
    mixtral,
    muse_spark,
    nemotron,
    qwen,
    sigmoid,
    step,
    unsupported,
)
from moe_npu.layers.families.base import family_names, unsupported_blocks
from moe_npu.layers.families.transfer import (
    from_config,
    from_hf,
    hf_state_dict,
    is_moe_layer,
    load_hf_state_dict,
    router_from_hf,
    to_hf,
)

__all__ = [
    "family_names",
    "from_config",
    "from_hf",
    "hf_state_dict",
    "is_moe_layer",
    "load_hf_state_dict",
    "router_from_hf",
    "to_hf",
    "unsupported_blocks",
]
