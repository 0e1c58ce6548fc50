"""Level 2: configuration, tokenizer, chat template and decoding settings."""

from tunesmith.verify.assets.check import check_assets

__all__ = [
    "check_assets",
]
