"""Models of the user's own code: `FILE.py:FUNCTION`."""
