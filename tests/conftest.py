from __future__ import annotations

from hypothesis import settings

# A busy machine must not fail a test: how long an example takes says nothing here.
settings.register_profile("translora", deadline=None)
settings.load_profile("translora")
