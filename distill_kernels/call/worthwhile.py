"""Where losses and gradients from a sample of the vocabulary are faster than those of all of it."""

# Below this many tokens or columns, or above this share of them, the products saved are worth less than scoring, drawing and gathering: by
# what two CPU cores show (benchmarks/results/columns_break_even.csv), for want of a GPU's figures everywhere.
LEAST_TOKENS = 96
LEAST_VOCABULARY = 8192
MOST_FRACTION = 0.4
# What column_fraction="auto" chooses among.
FRACTIONS = (0.02, 0.04, 0.08, 0.16, 0.32)


def kept_columns(vocabulary: int, fraction: float | str | None) -> int:
    """K, or 0 where the exact products are to run: no fraction was given, or sampling would not be faster. The most of "auto"."""
    share = FRACTIONS[-1] if isinstance(fraction, str) else fraction
    if not share or vocabulary < LEAST_VOCABULARY or share > MOST_FRACTION:
        return 0
    return max(1, round(share * vocabulary))
