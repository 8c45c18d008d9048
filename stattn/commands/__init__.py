"""Subcommands of `stattn`, a module each, and what only they need; ``stattn.cli`` lists them."""
