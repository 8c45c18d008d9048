"""Experiments about video; `stattn study` runs them."""
