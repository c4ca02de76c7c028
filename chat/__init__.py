"""The chat page: base, base + cap and tuned model answer side by side, on this machine."""
