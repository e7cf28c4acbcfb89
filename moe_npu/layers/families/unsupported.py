"""MoE layers of transformers that are no :class:`MoE`, and why."""

from __future__ import annotations

from moe_npu.layers.families.base import register_unsupported

register_unsupported(
    "its experts are rows of embedding tables, found by product keys.", model_types=("doge",), blocks=("DogeCDMoE",)
)
register_unsupported(
    "its router reads what the router of the layer before computed, and may skip all experts.",
    model_types=("zaya",),
    blocks=("ZayaSparseMoeBlock",),
)
register_unsupported(
    "its experts drop tokens beyond their capacity in the order of the batch.",
    model_types=("switch_transformers",),
    blocks=("SwitchTransformersSparseMLP",),
)
register_unsupported(
    "its code sends every token through experts 0 and 1, whatever the router chose.",
    model_types=("nllb-moe",),
    blocks=("NllbMoeSparseMLP",),
)
register_unsupported(
    "the data set an image comes from chooses the expert, there is no router.",
    model_types=("vitpose_backbone",),
    blocks=("VitPoseBackboneMoeMLP",),
)
