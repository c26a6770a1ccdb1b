"""Settings shared by all tests: examples are the same in every run, and a busy machine fails none of them."""
from hypothesis import settings

settings.register_profile("rnnbook", deadline=None, derandomize=True, database=None)
settings.load_profile("rnnbook")
