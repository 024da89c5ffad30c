"""What tests of the runtime share."""

import pytest

from attncc.schedule import linear as schedule_linear


@pytest.fixture
def many_segments(monkeypatch):
    """Segments of one chunk each, as on a GPU with room for all of them."""
    monkeypatch.setattr(schedule_linear, "SEGMENT", 1)
    monkeypatch.setattr(schedule_linear, "WAVES", 1000)
