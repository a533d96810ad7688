"""A progress bar on stderr."""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Given = TypeVar("Given", covariant=True)


class Bar(Protocol[Given]):
    """What is used of a tqdm bar; by itself it gives the items of its iterable."""

    def __iter__(self) -> Iterator[Given]: ...

    def __enter__(self) -> "Bar[Given]": ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


def progress(iterable: Iterable[Item], description: str, **options: Any) -> Bar[Item]:
    """tqdm's bar around an iterable."""
    from tqdm import tqdm

    bar: Bar[Item] = tqdm(iterable, desc=f"{description:24}", dynamic_ncols=True, **options)
    return bar
