"""The numbers of the special tokens, the same in every vocabulary."""

__all__ = ["EOS", "PAD", "SPECIAL", "UNKNOWN"]

PAD, EOS, UNKNOWN = 0, 1, 2
SPECIAL = ("<pad>", "</s>", "<unk>")
