"""A progress bar on stderr."""

from typing import Any


def progress(iterable, description: str, **options: Any):
    """tqdm's bar around an iterable."""
    from tqdm import tqdm

    return tqdm(iterable, desc=f"{description:24}", dynamic_ncols=True, **options)
