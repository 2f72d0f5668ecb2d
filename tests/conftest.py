"""Fixtures of several rooms."""

import pytest

from fed_dpprune.dpsgd.poisson_loader import DrawnBatches, Ticket


@pytest.fixture
def made_up_batches():
    """A test's own batch counts as one that the loader drew just then, where it fits none that was drawn."""
    admit = DrawnBatches.admit

    def drawn(self, rows):
        if self._current is None or self._current.closed or self._current.left < rows:
            self.forget()
            self._current = Ticket(rows)
        return admit(self, rows)

    with pytest.MonkeyPatch.context() as patch:  # its own: tests undo theirs
        patch.setattr(DrawnBatches, "admit", drawn)
        yield
