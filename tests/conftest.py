"""Settings shared by all tests: the same examples on every run, and no deadline on busy machines."""

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("project")
