"""Lets transformers use flash-attn on the CPU, which it refuses without an accelerator.

Named in VERL_USE_EXTERNAL_MODULES, verl imports it in every process of a run.
"""

from wrapt import register_post_import_hook


def _yes() -> bool:
    return True


def _permit(attention) -> None:
    attention.is_flash_attn_2_available = _yes
    known = attention.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    known["general_availability_check"] = _yes
    known["supported_devices"] = (*known["supported_devices"], (_yes, "cpu"))


register_post_import_hook(_permit, "transformers.modeling_flash_attention_utils")
