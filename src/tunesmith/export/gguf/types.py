"""The types that a GGUF file can be written in, and who writes each.

The converter writes full-precision types, ``q8_0`` and the ternary ones.  Four and five bits of the first generation
the official ``gguf`` package writes by itself.  K and IQ types only llama.cpp's own program ``llama-quantize`` writes.
"""

from __future__ import annotations

from typing import Literal

from tunesmith.errors import OutputError

Maker = Literal["converter", "package", "llama-quantize"]

CONVERTER = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
PACKAGE = ("q4_0", "q4_1", "q5_0", "q5_1")
PROGRAM = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
    "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s",
)  # fmt: skip
ADAPTER = ("f32", "f16", "bf16", "q8_0")
MODEL_DEFAULT, ADAPTER_DEFAULT = "bf16", "f32"


def maker_of(type_name: str) -> Maker:
    """Who writes a type.

    Raises:
        OutputError: there is no such type.
    """
    if type_name in CONVERTER:
        return "converter"
    if type_name in PACKAGE:
        return "package"
    if type_name in PROGRAM:
        return "llama-quantize"
    raise OutputError(
        "There is no such GGUF type.", expected=", ".join((*CONVERTER, *PACKAGE, *PROGRAM)), found=type_name
    )


def check_adapter_type(type_name: str) -> None:
    """Refuse a type that an adapter cannot be written in.

    Raises:
        OutputError: it cannot.
    """
    if type_name not in ADAPTER:
        raise OutputError(
            "An adapter cannot be written in this GGUF type.", expected=", ".join(ADAPTER), found=type_name
        )
