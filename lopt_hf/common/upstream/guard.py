"""What happens when a library no longer has a private name: one line that says which, and what to install."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

__all__ = ["Upstream"]


class Upstream:
    """A library, and the versions with which its private names were tried.

    A newer version is not refused: only a name that is gone is.

    Args:
        package: Name of the distribution.
        oldest: The oldest version tried.
        below: The first version not tried yet.
    """

    def __init__(self, package: str, oldest: str, below: str) -> None:
        self.package = package
        self.requirement = f"{package}>={oldest},<{below}"

    @contextmanager
    def names(self) -> Iterator[None]:
        """Guards import statements of private names.

        Raises:
            ImportError: If one of the names is gone.
        """
        try:
            yield
        except (ImportError, AttributeError) as error:
            raise self._gone(str(error).split(" (/")[0]) from error

    def check(self, owner: Any, *names: str) -> None:
        """Raises if an object lacks one of the attributes that the package uses.

        Raises:
            ImportError: If one of the names is gone.
        """
        for name in names:
            if not hasattr(owner, name):
                kind = owner if isinstance(owner, type) else type(owner)
                raise self._gone(f"{kind.__module__}.{kind.__qualname__} has no attribute {name!r}")

    def _gone(self, what: str) -> ImportError:
        return ImportError(
            f"{self.package} {version(self.package)}: {what}. lopt_hf needs this private name and was tried with "
            f"{self.requirement}; run: pip install '{self.requirement}'",
            name=self.package,
        )
