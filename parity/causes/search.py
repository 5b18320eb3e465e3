"""The search for a cause."""

from parity.causes import Cause, Departure


def find_cause(departure: Departure) -> Cause | None:
    """Return the variant that explains a departure; None if no known one does."""
    return None
