"""Other projects' state dicts to ours and back."""
