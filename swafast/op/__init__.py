"""The op: an update planned, checked, launched, and shared out among the backends."""
