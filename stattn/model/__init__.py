"""What ``stattn.modules`` and ``stattn.dit`` consist of: attention, blocks, shapes, settings."""
